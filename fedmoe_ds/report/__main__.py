"""`python -m fedmoe_ds.report runs/x [runs/y ...]` rebuilds report.html from what the runs have recorded."""

from __future__ import annotations

import sys
from pathlib import Path

from fedmoe_ds.errors import EXIT_USER_ERROR, UserError
from fedmoe_ds.report.html import write_report


def main(arguments: list[str]) -> int:
    """Write one report per folder, print its path; return the exit code."""
    if not arguments or arguments[0].startswith("-"):
        sys.stderr.write("usage: python -m fedmoe_ds.report RUN_FOLDER [RUN_FOLDER ...]\n")
        return EXIT_USER_ERROR
    try:
        for folder in arguments:
            sys.stdout.write(f"{write_report(Path(folder))}\n")
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
