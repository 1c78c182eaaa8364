"""`python -m fedmoe_ds.report runs/x [runs/y ...]` rebuilds report.html from what the runs have recorded."""

from __future__ import annotations

import sys
from pathlib import Path

from fedmoe_ds.errors import EXIT_USER_ERROR, UserError
from fedmoe_ds.report.html import write_report
from fedmoe_ds.terminal import note, show, visible


def main(arguments: list[str]) -> int:
    """Write one report per folder, print its path; return the exit code."""
    if not arguments or arguments[0].startswith("-"):
        note("usage: python -m fedmoe_ds.report RUN_FOLDER [RUN_FOLDER ...]")
        return EXIT_USER_ERROR
    try:
        for folder in arguments:
            show(visible(_report(Path(folder))))
    except UserError as error:
        note(error)
        return EXIT_USER_ERROR
    return 0


def _report(folder: Path) -> Path:
    try:
        return write_report(folder)
    except OSError as error:
        raise UserError(f"run folder: {folder}: report.html cannot be written: {error.strerror or error}") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
