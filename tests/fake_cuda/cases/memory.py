"""Bytes on the device: none of logits outlast their chunk, and a pass that does not fit is cut, remembered, and given back."""

from __future__ import annotations

import functools
import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from every import every
from federations import Result, build, finish, make_config, write_inputs
from torch import nn

from fake_cuda.runs import on_device, root
from fedmoe_ds.checkpoint.skipped_clients import read_lines
from fedmoe_ds.clients.local_training import WaveTrainer
from fedmoe_ds.model import cross_entropy

RUN: dict[str, Any] = {
    "execution": {"reproducible": "fast", "micro_batch_size": None, "clients_in_flight": 3},
    "federation": {"rounds": 2, "participation": 0.5},
    "local": {"max_steps": 1, "batch_size": 16},
    "evaluation": {"every": 9, "max_sequences": 1, "client_sequences": 0},
}
"""A step is all that a client has, up to 16 sequences: the largest needs about half of what three clients need together."""
BLOCK = 512
"""What allocations are rounded up to."""


@contextmanager
def chunks_of(logits: int) -> Iterator[None]:
    before, cross_entropy.LOGITS = cross_entropy.LOGITS, logits
    try:
        yield
    finally:
        cross_entropy.LOGITS = before


def case_no_logit_is_kept(fake: Any) -> None:
    """Of any number of targets, forward and backward: a gradient as large as the hidden states, and one chunk."""
    wide, classes, rows = 8, 1024, 64
    head, peaks = nn.Linear(wide, classes, bias=False).to(fake.device).requires_grad_(False), []
    with chunks_of(rows * classes):
        for count in (4 * rows, 16 * rows):
            x_ND = torch.randn(count, wide, device=fake.device, requires_grad=True)
            labels_N = torch.arange(count, device=fake.device) % classes
            fake.COUNT.reset_peak()
            before = fake.COUNT.now
            total, nll_N = cross_entropy.weighted_loss(head, x_ND, labels_N, torch.ones(count, device=fake.device))
            kept = fake.COUNT.now - before
            assert kept <= 4 * count * (wide + 2) + 4 * BLOCK, kept
            total.backward()  # type: ignore[no-untyped-call]
            peaks.append(fake.COUNT.peak - before - 4 * count * (3 * wide + 4))
            cross_entropy.scores(head, [x_ND], labels_N)
            assert nll_N.shape == (count,)
    chunk = 4 * rows * classes
    assert max(peaks) <= (cross_entropy.COPIES + 0.1) * chunk and peaks[1] <= peaks[0] + 8 * BLOCK, (peaks, chunk)


def case_a_pass_has_one_chunk(fake: Any) -> None:
    """Through the whole model: a vocabulary ten times as large costs a pass one chunk more, and not its targets' logits."""
    found = {}
    for words in (320, 3200):
        with tempfile.TemporaryDirectory() as folder, chunks_of(8 * words):
            write_inputs(Path(folder), samples=(20, 18), vocab_size=words)
            found[words] = [peak for peak, _, _ in passes(fake, make_config(Path(folder), "words", RUN))]
    more = max(found[3200]) - max(found[320])
    # A chunk has 8 targets, a pass more than a hundred.
    assert more <= 2 * 16 * 8 * (3200 - 320), more


def passes(fake: Any, config: Any) -> list[tuple[int, int, int]]:
    """Of every pass of a run: bytes at its peak and at its end, beyond those before it; and how many clients it had."""
    found = []
    with watched(lambda run, trainer, works: found.append(measured(fake, run, works))):
        finish(*build(config, *on_device()))
    return found


def measured(fake: Any, run: Callable[[], None], works: list[Any]) -> tuple[int, int, int]:
    fake.COUNT.reset_peak()
    before = fake.COUNT.now
    run()
    return fake.COUNT.peak - before, fake.COUNT.now - before, len(works)


@contextmanager
def watched(around: Callable[[Callable[[], None], WaveTrainer, list[Any]], Any]) -> Iterator[None]:
    """Let `around` call every training pass."""
    real = WaveTrainer._run

    def run(self: WaveTrainer, works: list[Any], *rest: Any) -> None:
        around(lambda: real(self, works, *rest), self, works)

    WaveTrainer._run = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        WaveTrainer._run = real  # type: ignore[method-assign]


@functools.cache
def needs(fake: Any) -> tuple[int, int]:
    """Bytes of a pass of all clients of the first wave, and of its largest client alone."""
    together = max(peak for peak, _, _ in passes(fake, make_config(root(), "together", RUN)))
    alone = max(peak for peak, _, _ in passes(fake, make_config(root(), "alone", RUN, {"execution": {"clients_in_flight": 1}})))
    assert alone < 0.8 * together, (alone, together)
    return together, alone


def short(fake: Any, name: str, room: float, *changes: dict[str, Any]) -> tuple[Result, list[bool]]:
    """A run whose passes have so many bytes, and whether each of them fitted."""
    fitted: list[bool] = []

    def limited(run: Callable[[], None], trainer: WaveTrainer, works: list[Any]) -> None:
        fake.COUNT.limit = fake.COUNT.now + int(room)
        fitted.append(False)
        try:
            run()
            fitted[-1] = True
        finally:
            fake.COUNT.limit = None

    with watched(limited):
        return finish(*build(make_config(root(), name, RUN, *changes), *on_device())), fitted


def statuses(result: Result) -> dict[str, int]:
    found = [event["status"] for event in result.events if event["event"] == "client"]
    return {status: found.count(status) for status in set(found)}


def case_who_fits_alone_is_trained(fake: Any) -> None:
    together, alone = needs(fake)
    result, fitted = short(fake, "apart", 1.1 * alone)
    assert statuses(result) == {"ok": 6} and not fitted[0] and 1.1 * alone < together
    # Nobody's step was cut, and the second round did not try anything again.
    assert every(limit["each"] is None for limit in result.events if limit["event"] == "limits")
    failed = [place for place, fits in enumerate(fitted) if not fits]
    assert failed == list(range(len(failed))) and len(failed) <= 3, failed


def case_a_step_is_cut_before_anyone_is_left_out(fake: Any) -> None:
    _, alone = needs(fake)
    result, fitted = short(fake, "parts", 0.7 * alone)
    assert statuses(result) == {"ok": 6} and not fitted[0]
    told = [event for event in result.events if event["event"] == "limits"]
    assert [event["round"] for event in told] == [2] and 1 <= told[0]["each"] < 8, told
    limits = result.parts.skipped.limits(2)
    assert limits.each == told[0]["each"] and len([line for line in read_lines(result.parts.skipped.path.parent) if line]) >= 3


def case_who_needs_a_whole_step_is_left_out(fake: Any) -> None:
    """And everything that its pass held is given back, also where the routers' losses refer to it."""
    _, alone = needs(fake)
    result, _ = short(fake, "balanced", 0.7 * alone, {"local": {"balance_loss": 0.01}})
    found = statuses(result)
    assert found["out-of-memory"] >= 1 and found["ok"] >= 3, found


def case_a_failed_pass_is_given_back(fake: Any) -> None:
    parts, _ = build(make_config(root(), "back", RUN, {"local": {"balance_loss": 0.01, "z_loss": 0.01}}), *on_device())
    _, alone = needs(fake)
    held: list[int] = []

    def limited(run: Callable[[], None], trainer: WaveTrainer, works: list[Any]) -> None:
        held.append(fake.COUNT.now)
        fake.COUNT.limit = fake.COUNT.now + alone
        run()

    wave = [parts.clients[:3]]
    gc.collect()
    gc.disable()  # what refers to nothing must go by itself, before anybody collects
    try:
        with watched(limited):
            parts.trainer.train(wave, 1, parts.state.adapters, parts.state.personal.state, parts.training_data.train)
        raise AssertionError("it fits")
    except Exception as error:
        assert type(error).__name__ == "OutOfMemory", error
    finally:
        gc.enable()
        fake.COUNT.limit = None
    gc.collect()
    assert fake.COUNT.now <= held[0] + 16 * BLOCK, (fake.COUNT.now, held)
