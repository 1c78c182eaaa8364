"""Result: what a run has left in its folder, read when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmoe_ds.config import Config
from fedmoe_ds.config import load_config as load_file
from fedmoe_ds.errors import UserError
from fedmoe_ds.storage.files import expanded
from fedmoe_ds.terminal import visible

if TYPE_CHECKING:
    from torch import Tensor

_FIRST = ("round", "tier", "split", "client")
_NO_FIGURES = {"event", "time", "tier_label", "top_k", "tokens"}


class Tensors(Mapping[str, "Tensor"]):
    """Tensors by their canonical names. Each is read anew when it is asked for, on the CPU, float32."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # a mapping would read the tensor to find out

    def __repr__(self) -> str:
        return f"<{len(self)} tensors: {', '.join([*self._names][:2])}, ...>"


@dataclass(frozen=True)
class Result:
    """A run, finished or not.

    Attributes:
        folder: of the run: `metrics.jsonl`, `report.html`, `config.yaml`, `checkpoints/`.
        interrupted: the name of the signal that ended the start which returned this, or None.
    """

    folder: Path
    interrupted: str | None = None

    @cached_property
    def config(self) -> Config:
        """What was run: the whole configuration, with the method's own defaults."""
        return load_file(self.folder / "config.yaml")

    @cached_property
    def _events(self) -> list[dict[str, Any]]:
        from fedmoe_ds.report import Record  # imports numpy and more: `import fedmoe_ds` must stay cheap

        return list(Record(self.folder / "metrics.jsonl"))

    def metrics(self, event: str | None = None) -> list[dict[str, Any]]:
        """The events of the record (docs/outputs.md) in their order: all of them, or those of one kind. Rows about clients are
        among them wherever they are stored, those of a table after its `table` event, which has their summary; of very many
        clients, ask for one kind. Raises UserError: a table whose rows are asked for is missing or damaged."""
        return [one for row in self._events for one in _told(row, event)]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """One row per evaluated round, tier and hold-out; round 0 is the foundation, or the start (`adapters.start`).

        `round`, `tier` (its label), `split` (`global`, `clients`, or `client` with the name in `client`, which is None in the
        others), `loss`, `perplexity`, `accuracy`, `targets`, and the task metrics with their `samples`.
        """
        rows = []
        for event in self.metrics("eval"):
            # Records of older versions name the tier by its top-k and count targets as tokens.
            tier = str(event.get("tier_label", event.get("tier", event.get("top_k"))))
            known: dict[str, Any] = {"round": event["round"], "tier": tier, "split": event["split"]}
            known |= {"client": event.get("client"), "targets": event.get("targets", event.get("tokens"))}
            rows.append(known | {key: value for key, value in event.items() if key not in _NO_FIGURES | known.keys()})
        return rows

    @property
    def finished(self) -> bool:
        """Whether all rounds are trained."""
        return bool(self._events) and self._events[-1]["event"] == "end"

    @property
    def digest(self) -> str | None:
        """The digest that the command prints: the same for the same result, to the bit. None while rounds are to be trained."""
        return str(self._events[-1]["digest"]) if self.finished else None

    @property
    def clients(self) -> list[str]:
        """The clients' names, in the order of the run."""
        from fedmoe_ds.report.holdings import Holdings

        found = [event for event in self._events if event["event"] == "data"]
        return Holdings(found[-1]).names if found else []

    @cached_property
    def adapters(self) -> Mapping[str, Tensor]:
        """The global adapters of the newest checkpoint.

        Raises:
            UserError: there is no intact checkpoint yet.
        """
        from fedmoe_ds.checkpoint.reader import TensorReader, newest_intact

        found, notes = newest_intact(self.folder / "checkpoints")
        if found is None:
            damage = f": {notes[0]}" if notes else ""
            raise UserError(f"run: {self.folder}: holds no intact checkpoint{damage}; wait for its first round, or continue it")
        reader = TensorReader(found, "adapters")
        return Tensors(sorted(reader), reader.read)

    def client_adapters(self, client: str) -> Mapping[str, Tensor]:
        """One client's adapters in the newest checkpoint: the global ones with its own in their place (personal models), LoRA
        rows that it does not hold being zero.

        Raises:
            UserError: there is no such client, no intact checkpoint, or the base model is gone or another one.
        """
        from fedmoe_ds.results import open_run as open_trained

        trained = open_trained(self.folder)
        selection, blocks = trained.select(client=client), dict(trained.items())
        return Tensors(blocks, lambda name: trained.value(name, blocks[name], selection))

    def __str__(self) -> str:
        """What the command prints last: the table of tiers, the digest, the folder."""
        from fedmoe_ds.report import final_table

        if not (self.folder / "metrics.jsonl").is_file():  # stopped while it was loading
            return f"not begun: resume='auto' begins it\nrun: {visible(self.folder)}"
        ending = f"digest: {self.digest}" if self.finished else "not finished: resume='auto' continues it"
        return "\n".join([final_table(self._events), ending, f"run: {visible(self.folder)}"])


def _told(event: dict[str, Any], kind: str | None) -> Iterator[dict[str, Any]]:
    """What an event of a `Record` says, as far as it is of a kind; None: of any."""
    from fedmoe_ds.report.record import ROWS, expanded

    line = {key: value for key, value in event.items() if key != ROWS}
    is_table = event["event"] == "table"
    if is_table and kind in (None, "table"):
        yield line
    # A table has rows of one kind: those of another need not be read.
    if kind in (None, event["of"] if is_table else event["event"]):
        # A `data` event keeps its table and its summary beside its clients.
        yield from (dict(one) if is_table else {**line, **one} for one in expanded(event))


def open_run(folder: str | Path) -> Result:
    """Return the result of a run that is there, finished or not.

    Raises:
        UserError: the folder holds no run.
    """
    path = expanded(str(folder), "run")
    if not (path / "metrics.jsonl").is_file():
        raise UserError(f"run: {path}: holds no run (no metrics.jsonl); give the folder that a run has written")
    result = Result(path)
    result._events  # a damaged record is told here, not at the first look; a table when it is read  # noqa: B018
    return result
