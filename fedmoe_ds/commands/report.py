"""Report: the page of a run, or one page about several: `fedmoe report runs/a runs/b runs/c --output abc.html`.

One run: its own page, report.html in its folder, is built again from what it has recorded. Several, finished or not: their
curves in one picture per tier and figure, their final figures, digests, rounds, time and bytes, and what their configurations
differ in. Prints the path of the page.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fedmoe_ds.errors import UserError
from fedmoe_ds.terminal import show, visible


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, for instance runs/quickstart")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the page (default: of one run its own, of several report.html here)"
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    from fedmoe_ds.report import write_report
    from fedmoe_ds.report.several import check_target, write_comparison

    several = len(args.runs) > 1
    target = Path("report.html") if several and args.output is None else args.output
    try:
        if several:
            path = write_comparison(args.runs, target)
        else:
            if target is not None and target.resolve() != (args.runs[0] / "report.html").resolve():
                check_target(target)
            path = write_report(args.runs[0], target)
    except OSError as error:
        where = f"--output: {target}" if target is not None else f"run folder: {args.runs[0]}: report.html"
        raise UserError(f"{where}: cannot be written: {error.strerror or error}; give another --output") from None
    show(visible(str(path)))
    return 0


if __name__ == "__main__":
    from fedmoe_ds.commands.program import start

    start("report")
