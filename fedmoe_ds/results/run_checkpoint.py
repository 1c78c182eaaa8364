"""Run checkpoint: which checkpoint of a run is opened, and whether all of it is of one round.

A run that was stopped within round r + 1 has `round-r-partial`. Its global adapters are those of round r, but what clients keep
of their own is of round r + 1 already for those that were done: together they are no model that the run has ever had.
"""

from __future__ import annotations

from pathlib import Path

from fedmoe_ds.aggregation.postprocessors import OK
from fedmoe_ds.checkpoint.reader import Snapshot, candidates, find_damage, progress_of
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.best_round import best_round
from fedmoe_ds.storage.files import expanded

BEST = "best"
"""In place of a round's number: the best by the run's own `checkpoint.best`."""


def round_choice(text: str) -> int | str:
    """What `--round` says: a number, or `best`. For argparse; raises ValueError."""
    return BEST if text == BEST else int(text)


def find_checkpoint(path: Path, round_index: int | str | None) -> Path:
    """The folder that is meant, intact: `path` itself, or of the run at `path` the one of a round, or the newest.

    Args:
        round_index: as `open_run` takes it.
    Raises:
        UserError: there is no run, no such checkpoint, or it is damaged.
    """
    path = expanded(str(path), "run")
    if progress_of(path) is not None:
        if round_index is not None and progress_of(path) != (round_index, False):
            raise UserError(f"--round: {round_index}: {path} is a checkpoint already; give the run folder, or drop --round")
        return _intact(path)
    root = path / "checkpoints"
    if not root.is_dir():
        raise UserError(f"run: {path}: holds no run (no folder checkpoints); give the folder of a run, or a checkpoint of it")
    if round_index is None:
        return _newest(path)
    number = _best(path) if isinstance(round_index, str) else round_index
    there = {kept: folder for kept, _, folder in reversed(_by_round(root))}
    if number not in there:
        known = ", ".join(map(str, sorted(there))) or "none"
        raise UserError(f"--round: {number}: no checkpoint of it is kept; there are {known} (checkpoint.keep says how many)")
    return _intact(there[number])


def check_whole(checkpoint: Path, snapshot: Snapshot) -> None:
    """All of a checkpoint of a run whose clients keep something is of one round.

    Raises:
        UserError: some clients' own state is a round further than the adapters; it names a checkpoint that can be opened.
    """
    reports = {} if snapshot.partial is None else snapshot.partial["done"]
    further = sum(report["status"] == OK for report in reports.values())
    if not further:
        return
    # Intact ones alone: what is named must be a way out.
    kept = ((number, folder) for number, partial, folder in _by_round(checkpoint.parent) if not partial)
    number = next((number for number, folder in kept if find_damage(folder) is None), None)
    other = "" if number is None else f", or take round {number} (--round {number})"
    raise UserError(
        f"checkpoint: {checkpoint}: the run was stopped within round {snapshot.round + 1}, and what {further} of its clients "
        f"keep for themselves is of that round already, while the adapters are of round {snapshot.round}; finish the run "
        f"(--resume auto){other}"
    )


def _newest(run: Path) -> Path:
    notes = []
    for _, _, folder in _by_round(run / "checkpoints"):
        damage = find_damage(folder)
        if damage is None:
            return folder
        notes.append(f": checkpoint {folder.name} is damaged ({damage})")
    raise UserError(f"run: {run}: holds no intact checkpoint{notes[0] if notes else ''}; wait for its first round")


def _by_round(root: Path) -> list[tuple[int, bool, Path]]:
    """(rounds completed, whether one more has begun, folder), the latest round first; of one round the complete one first."""
    found = [(*progress, folder) for folder in candidates(root) if (progress := progress_of(folder)) is not None]
    return sorted(found, key=lambda each: (-each[0], each[1]))


def _best(folder: Path) -> int:
    found = best_round(folder)
    if found is None:
        raise UserError(
            f"--round: {BEST}: {folder} keeps no best round: checkpoint.best is null, or none has been evaluated; name a round"
        )
    return found


def _intact(checkpoint: Path) -> Path:
    if (damage := find_damage(checkpoint)) is not None:
        raise UserError(f"checkpoint: {checkpoint}: it is damaged: {damage}; give another one of the run")
    return checkpoint
