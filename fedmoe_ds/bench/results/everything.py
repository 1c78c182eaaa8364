"""`launch/bench.py all`: every measurement behind the table of targets, one after the other, then the table."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedmoe_ds.bench.harness.command import Note, Report
from fedmoe_ds.bench.harness.document import read_documents
from fedmoe_ds.bench.results import suite
from fedmoe_ds.bench.results.targets_command import add_reasons, read_reasons, targets_table


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="folder of the results; made where missing"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"some of: {', '.join(suite.SUITE)}; or subcommands")
    parser.add_argument("--quick", action="store_true", help="as little work as goes through everything; figures mean nothing")
    add_reasons(parser)


def run(args: argparse.Namespace, note: Note) -> tuple[str, int]:
    reasons = read_reasons(args.reasons)
    names = suite.chosen(args.only)
    suite.make_folder(args.output)
    failed = suite.run_suite(names, args.output, args.quick, note)
    return targets_table(read_documents(args.output), reasons).text() + "\n", 1 if failed else 0


REPORT = Report("all", "every measurement behind the targets, one after the other", options, run)
