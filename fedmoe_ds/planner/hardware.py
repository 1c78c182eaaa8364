"""Hardware: what a machine does per second, from the table of hardware.yaml or from a calibration on the machine at hand.

A prediction is a sum of amounts of work (work.py) times the seconds that one unit takes here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedmoe_ds.errors import UserError, nearest

Stage = Literal["update", "norm", "move", "fold", "serve"]
"""What happens to trainable numbers in a round: optimizer step, gradient norm, copies, sums, server step."""

TABLE_SPREAD = (0.67, 2.0)
"""Between which factors of a prediction the truth is taken to lie where efficiencies are assumed: a share of a peak may be half
as large as in the table, and seldom is half again as large."""

TABLE = Path(__file__).parent / "hardware.yaml"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Link(_Part):
    """One class of links as a collective of one rank sees it: alpha, a little for every peer beyond the first, n / beta."""

    alpha_s: float = Field(ge=0)
    peer_s: float = Field(0.0, ge=0)
    bytes_per_s: float = Field(gt=0)


class Compute(_Part):
    """Seconds of one unit of each kind of work, on one device or one CPU core.

    Attributes:
        flops_per_s: matrix products, by storage type of the frozen weights.
        bytes_per_s: elementwise work and everything else that only moves memory.
        call_s: one framework call (Python, dispatcher, autograd, kernel launch).
        group_s: one (expert, client) group of a grouped product, beyond its FLOPs.
        score_s: one attention score (head, query, key), forward and backward; None: counted by its FLOPs.
        adapter_s: one FLOP of a product with adapters; None: as fast as one with frozen weights.
        number_s: one trainable number through each stage of a round (update, norm, move, fold, serve), by stage; absent
            stages are counted by the bytes that they touch.
        block_s: one block of trainables through the same stages; absent stages are counted by their calls.
        crowding: factor on all of these where several ranks of a host compute at once.
        oversubscription: the same where they are more than its cores; sharing cores comes on top.
    """

    flops_per_s: dict[str, float]
    bytes_per_s: float = Field(gt=0)
    call_s: float = Field(gt=0)
    group_s: float = Field(0.0, ge=0)
    score_s: float | None = Field(None, ge=0)
    adapter_s: float | None = Field(None, ge=0)
    number_s: dict[Stage, float] = Field(default_factory=dict)
    block_s: dict[Stage, float] = Field(default_factory=dict)
    crowding: float = Field(1.0, ge=1)
    oversubscription: float = Field(1.0, ge=1)

    def slower(self, factor: float) -> Compute:
        """Everything takes `factor` times as long."""
        # Written field by field: a new field must decide whether it is a rate or a time.
        return Compute(
            flops_per_s={dtype: rate / factor for dtype, rate in self.flops_per_s.items()},
            bytes_per_s=self.bytes_per_s / factor,
            call_s=self.call_s * factor,
            group_s=self.group_s * factor,
            score_s=None if self.score_s is None else self.score_s * factor,
            adapter_s=None if self.adapter_s is None else self.adapter_s * factor,
            number_s={stage: seconds * factor for stage, seconds in self.number_s.items()},
            block_s={stage: seconds * factor for stage, seconds in self.block_s.items()},
        )


class Links(_Part):
    """Network of one rank: between ranks of one host, and between hosts."""

    intra: Link
    inter: Link


class Network(_Part):
    """By kind of message: what experts exchange, what aggregation sums, and the host-side control plane."""

    all_to_all: Links
    all_reduce: Links
    control: Links


class Hardware(_Part):
    """One kind of machine.

    Attributes:
        slots: ranks that compute at full speed on one host: devices, or CPU cores.
        memory_bytes: of one device; of a whole host where `shared_memory` (CPU ranks share it).
        baseline_bytes: of a rank before it holds anything of a run: libraries, allocator, CUDA context.
        host_memory_bytes: of a host whose ranks compute on devices; None where nobody knows, or the host is what computes.
        host_baseline_bytes: of such a rank on the host, before it holds anything of a run.
        main_extra_bytes: what rank 0 holds beyond that (data preparation, report).
        activation_slack: memory that passes take over what their tensors add up to (allocator).
        measured: which of the numbers were measured rather than assumed.
    """

    name: str
    kind: Literal["cpu", "cuda"]
    slots: int = Field(ge=1)
    memory_bytes: float = Field(gt=0)
    shared_memory: bool = False
    baseline_bytes: float = Field(ge=0)
    main_extra_bytes: float = Field(0.0, ge=0)
    host_memory_bytes: float | None = Field(None, gt=0)
    host_baseline_bytes: float = Field(0.0, ge=0)
    activation_slack: float = Field(1.15, gt=0)
    compute: Compute
    network: Network
    measured: list[str] = Field(default_factory=list)
    facts: dict[str, Any] = Field(default_factory=dict)

    def available(self, ranks_per_host: int) -> float:
        """Bytes that one rank may hold."""
        # On CPU all ranks of a host live in its one memory.
        return self.memory_bytes / ranks_per_host if self.shared_memory else self.memory_bytes

    def crowded(self, ranks_per_host: int) -> Compute:
        """What a rank computes with while the others of its host do the same."""
        if ranks_per_host == 1:
            return self.compute
        # Cores in use share caches and memory channels even while every rank has its own.
        return self.compute.slower(self.compute.crowding if ranks_per_host <= self.slots else self.compute.oversubscription)

    @property
    def spread(self) -> tuple[float, float]:
        """Between which factors of a predicted time the true one is taken to lie."""
        return (1.0, 1.0) if self.measured else TABLE_SPREAD

    def origin(self, hosts: int) -> str:
        """Where the numbers of a plan on so many hosts are from, for a heading."""
        if not self.measured:
            return "table, efficiencies assumed"
        return "measured here" if hosts == 1 else "measured here, links between hosts assumed"


def load_hardware(name: str | Path) -> Hardware:
    """A machine of the table, or the one described by a calibration file.

    Raises:
        UserError: neither a name of the table nor a readable calibration.
    """
    table = _table()
    # The table first: a file called `h100` must be given with its folder.
    if str(name) in table:
        return _assumed(str(name), table[str(name)])
    path = Path(name)
    if not path.is_file():
        raise UserError(f"--hardware: {name}: neither a calibration file nor in the table{nearest(str(name), table)}")
    try:
        return Hardware.model_validate_json(path.read_bytes())
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        # pydantic's text has many lines; a message has one.
        reason = str(error).replace("\n", " ")[:200]
        raise UserError(
            f"--hardware: {path}: not a calibration of this version ({reason}); make one with "
            "`fedmoe bench calibrate --json FILE`"
        ) from None


def table_names() -> list[str]:
    """Machines of the table."""
    return list(_table())


def _table() -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return tree


def _assumed(name: str, entry: dict[str, Any]) -> Hardware:
    """A table entry: peak figures times the efficiencies that are assumed for it."""
    efficiency = entry["assumed"]
    # Peak figures are a vendor's; the efficiencies are assumptions, kept apart so that a reader can tell them.
    peaks = {dtype: tera * 1e12 * efficiency["product"] for dtype, tera in entry["peak_tflops"].items()}
    compute = Compute(
        flops_per_s=peaks,
        bytes_per_s=entry["memory_gb_per_s"] * 1e9 * efficiency["memory"],
        call_s=efficiency["call_us"] * 1e-6,
        group_s=efficiency["group_us"] * 1e-6,
    )
    intra, inter = (
        Link(
            alpha_s=entry[place]["alpha_us"] * 1e-6,
            peer_s=efficiency["peer_us"] * 1e-6,
            bytes_per_s=entry[place]["gb_per_s"] * 1e9 * efficiency["link"],
        )
        for place in ("intra", "inter")
    )
    links = Links(intra=intra, inter=inter)
    message = efficiency["control_us"] * 1e-6
    # Host-side messages are small: their latency counts, and a nominal bandwidth will do.
    slow = Link(alpha_s=message, peer_s=message / 2, bytes_per_s=1e9)
    host = Links(intra=slow, inter=slow)
    return Hardware(
        name=name,
        kind=entry["kind"],
        slots=entry["per_host"],
        memory_bytes=entry["memory_gb"] * 1e9,
        shared_memory=entry["kind"] == "cpu",
        baseline_bytes=efficiency["baseline_gb"] * 1e9,
        host_memory_bytes=entry["host_memory_gb"] * 1e9 if "host_memory_gb" in entry else None,
        host_baseline_bytes=efficiency.get("host_gb", 0.0) * 1e9,
        compute=compute,
        network=Network(all_to_all=links, all_reduce=links, control=host),
    )
