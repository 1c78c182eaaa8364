"""The planner's counts of framework calls and moved numbers, counted again on a real pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedmoe_ds.bench.calibration.least_squares import KINDS, fit, fit_link, fit_stage, fit_together
from fedmoe_ds.bench.calibration.waves import Bench, Sample
from fedmoe_ds.bench.harness.shapes import Shape
from fedmoe_ds.federation.execution import enable_checkpointing
from fedmoe_ds.kernels import matrix, rows
from fedmoe_ds.kernels.lora_products import NativeProducts
from fedmoe_ds.model import dispatcher, expert_pass
from fedmoe_ds.planner.exchanges import exchanged
from fedmoe_ds.planner.work import Work

VIEWS = ("view", "select", "slice", "transpose", "t.", "unsqueeze", "squeeze", "expand", "alias", "detach", "split", "unbind",
         "chunk", "permute", "narrow", "as_strided", "empty", "_reshape_alias", "_local_scalar", "unsafe")  # fmt: skip
PRODUCTS = ("mm", "bmm", "addmm", "_grouped_mm", "_scaled_dot")


class Counting(TorchDispatchMode):
    """Calls that are no views, and bytes of those that are no matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes = 0, 0

    def native(self, patch: pytest.MonkeyPatch) -> None:
        """Count the native kernels as well, which no dispatch mode sees; products by calls alone."""
        for owner, name in ((rows, "_run"), (matrix, "grouped_product"), (NativeProducts, "_run")):
            real = getattr(owner, name)

            def noted(*arguments: Any, real: Any = real, moves: bool = owner is rows, **rest: Any) -> Any:
                self.calls += 1
                self.bytes += sum(tensor.nbytes for tensor in arguments[1]) if moves else 0
                return real(*arguments, **rest)

            patch.setattr(owner, name, noted)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = str(function).removeprefix("aten.")
        if not name.startswith(VIEWS):
            self.calls += 1
            if not name.startswith(PRODUCTS):
                tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if hasattr(leaf, "nbytes")]
                self.bytes += sum(tensor.nbytes for tensor in tensors)
        return result


@pytest.mark.parametrize(("layers", "width", "attention"), [(2, 64, ["q_proj", "v_proj"]), (3, 48, ["q_proj"])])
def test_calls_and_bytes_of_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int, width: int, attention: list[str]
) -> None:
    shape = Shape("x", experts=8, hidden=width, ffn=32, layers=layers, heads=2, vocab=320, top_k=4)
    bench = Bench(shape, attention, tmp_path)
    inner, counts = bench.trainer._pass, []

    def counted(*arguments: Any) -> None:
        with monkeypatch.context() as patch, Counting() as mode:
            mode.native(patch)
            inner(*arguments)
        counts.append(mode)

    bench.trainer._pass = counted  # type: ignore[method-assign]
    work = bench.train(4, 48, 3).work
    assert float(work.calls) == pytest.approx(counts[-1].calls, rel=0.12)
    assert float(work.bytes) == pytest.approx(counts[-1].bytes, rel=0.2)


@pytest.mark.parametrize("attention", [[], ["q_proj"]])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_exchanges_of_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attention: list[str], again: bool) -> None:
    """What travels where there are peers: counts, rows, weights and results, and their gradients."""
    shape = Shape("x", experts=8, hidden=64, ffn=32, layers=3, heads=2, vocab=320, top_k=4)
    bench = Bench(shape, attention, tmp_path)
    if again:
        enable_checkpointing(bench.foundation)
    travels: list[int] = []
    for owner, name in ((dispatcher._Counts, "of"), (expert_pass._Travel, "to_experts"), (expert_pass._WayHome, "sets_out")):
        real, place = getattr(owner, name), int(name == "sets_out")

        def noted(*rest: Any, real: Any = real, counts: bool = name == "of", place: int = place) -> Any:
            travels.append(0 if counts else rest[place].numel())
            return real(*rest)

        monkeypatch.setattr(owner, name, noted)
    inner = bench.trainer._pass

    def counted(*arguments: Any) -> None:
        travels.clear()
        inner(*arguments)

    bench.trainer._pass = counted  # type: ignore[method-assign]
    bench.train(4, 48, 3)
    execution = bench.job.config.execution.model_copy(update={"activation_checkpointing": again})
    job = replace(bench.job, config=bench.job.config.model_copy(update={"execution": execution}))
    assert exchanged(job, True, 4 * 48 * 3.0) == (len(travels), sum(travels))


UNITS = {"calls": 1e-5, "flops": 1e-11, "bytes": 1e-10, "groups": 1e-5, "scores": 2e-9, "adapters": 3e-11}


def made_up(sharing: float = 1.0, crowding: float = 1.0, alpha: float = 0.0, per_byte: float = 0.0) -> list[Sample]:
    """Passes of a machine with known units."""
    samples = []
    for i in range(1, 13):
        work = Work(100.0 * i, 1e7 * i**2, 1e6 * (13 - i), 10.0 * (i % 4), 1e4 * (i % 5) ** 2, 1e7 * (i % 6))
        seconds = sharing * crowding * sum(getattr(work, kind) * UNITS[kind] for kind in KINDS)
        exchanges, moved = 7.0 * (i % 3 + 1), 1e5 * (i % 7)
        samples.append(Sample(work, seconds + exchanges * alpha + moved / 2 * per_byte, exchanges, moved))
    return samples


def test_the_fit_finds_known_units() -> None:
    assert fit(made_up()) == pytest.approx(UNITS, rel=1e-6)


def test_what_is_known_stays() -> None:
    known = {"flops": UNITS["flops"], "scores": UNITS["scores"]}
    assert fit(made_up(), known) == pytest.approx(UNITS, rel=1e-6)


def test_the_fit_finds_a_known_network() -> None:
    found = fit_together(made_up(2.0, 1.25), made_up(2.0, 1.25, 3e-4, 1e-9), UNITS, ranks=2, sharing=2.0)
    assert (found.crowding, found.alpha_s, found.bytes_per_s) == pytest.approx((1.25, 3e-4, 1e9), rel=1e-6)


def test_lines_through_two_points() -> None:
    assert fit_stage([(4, 1000, 4e-5 + 1e-6), (4, 100000, 4e-5 + 1e-4)]) == pytest.approx((1e-5, 1e-9))
    assert fit_link([(0, 1e-3), (2000000, 2e-3)], 2) == pytest.approx((1e-3, 1e9))
