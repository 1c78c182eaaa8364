"""`launch/bench.py targets`: what the project wants to reach in speed, beside what was measured."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path

from fedmoe_ds.bench.harness.command import Note, Report, option
from fedmoe_ds.bench.harness.document import Document, read_documents
from fedmoe_ds.bench.harness.repeats import with_range
from fedmoe_ds.bench.harness.table import Table
from fedmoe_ds.bench.results.goals import TARGETS
from fedmoe_ds.bench.results.targets import Measured, Target
from fedmoe_ds.config.yaml12 import parse_yaml
from fedmoe_ds.errors import UserError, nearest

FOLDER = Path("docs/performance")
REASONS = FOLDER / "reasons.yaml"
NO_REASON = "missed, no reason given"
HEADER = ["target", "wanted", "measured", "repetitions", "met", "peer or reference", "note"]
WORDS = ("target", "peer or reference", "note")
REASONS_OPTION = option("--reasons", REASONS, f"why targets are missed (default: {REASONS})")
OPTIONS = (option("folder", FOLDER, f"default: {FOLDER}", nargs="?", metavar="FOLDER"), REASONS_OPTION)


def read_reasons(path: Path) -> dict[str, str]:
    """Reasons by target name.

    Raises:
        UserError: no such file, or it names no target, or says nothing.
    """
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--reasons: {path}: cannot be read: {error}; run it in the repository, or name the file") from None
    if not isinstance(tree or {}, dict):
        raise UserError(f"--reasons: {path}: must be lines of `target: reason`")
    names = [target.name for target in TARGETS]
    for name, reason in (tree or {}).items():
        if name not in names:
            raise UserError(f"--reasons: {path}: {name}: no such target{nearest(name, names)}")
        if not isinstance(reason, str) or not reason.strip():
            raise UserError(f"--reasons: {path}: {name}: must be a sentence")
    return {name: " ".join(reason.split()) for name, reason in (tree or {}).items()}


def targets_table(documents: list[Document], reasons: Mapping[str, str], targets: Iterable[Target] = TARGETS) -> Table:
    """One line per target. Raises UserError where a stored row lacks what a target reads."""
    cells = [_cells(target, _measured(target, documents), reasons.get(target.name)) for target in targets]
    return Table(HEADER, cells, words=WORDS)


def _measured(target: Target, documents: list[Document]) -> Measured | None:
    """The figure that stands for the target."""
    try:
        found = target.pick(target.source(documents))
        return target.worst(found) if found else None
    except (KeyError, TypeError) as error:
        raise UserError(
            f"FOLDER: the rows for '{target.what}' lack something: {error}; measure them again with this version"
        ) from None


def _cells(target: Target, measured: Measured | None, reason: str | None) -> list[str]:
    if measured is None:
        return [target.what, target.threshold, "not measured", "", "", "", reason or ""]
    answer = target.decided(measured)
    note = "" if answer == "yes" else reason or (NO_REASON if answer == "no" else "")
    figure = with_range(measured.samples, target.form)
    return [target.what, target.threshold, figure, _repetitions(measured), answer, measured.against, note]


def _repetitions(measured: Measured) -> str:
    """How many, and in how many runs where they are several."""
    count = str(len(measured.samples))
    return count if len(measured.runs) == 1 else f"{count} in {len(measured.runs)} runs"


def run(args: argparse.Namespace, note: Note) -> tuple[str, int]:
    table = targets_table(read_documents(args.folder), read_reasons(args.reasons))
    return table.text() + "\n", 0


REPORT = Report("targets", "what is wanted beside what was measured, from stored results", OPTIONS, run)
