"""Measure: every number that this project claims comes from a subcommand here; `all` runs those behind docs/performance.md.

Everything runs on one CPU thread per process. Absolute numbers depend on the machine; ratios inside one run are what counts.
"""

from __future__ import annotations

import argparse
import signal
import sys

from fedmoe_ds.terminal import note, show


def main(argv: list[str]) -> int:
    from fedmoe_ds.bench.commands import COMMANDS
    from fedmoe_ds.bench.harness.command import JSON, Command, Report, add_options
    from fedmoe_ds.bench.results.reports import REPORTS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parsers = parser.add_subparsers(dest="command", required=True)
    offered: list[Command | Report] = [*COMMANDS.values(), *REPORTS.values()]
    for command in offered:
        subparser = parsers.add_parser(command.name, help=command.help)
        add_options(subparser, [*command.options, *([JSON] if command.name in COMMANDS else [])])
    args = parser.parse_args(argv)
    for asked in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(asked) != signal.SIG_IGN:  # as nohup does
            signal.signal(asked, lambda number, frame: sys.exit(128 + number))  # an ordinary end: children are ended, too
    if args.command in COMMANDS:
        return measure(args, argv)
    text, code = REPORTS[args.command].run(args, note)
    show(text.removesuffix("\n"))
    return code


def measure(args: argparse.Namespace, argv: list[str]) -> int:
    from fedmoe_ds.bench.commands import COMMANDS
    from fedmoe_ds.bench.harness import table
    from fedmoe_ds.bench.harness.command import command_line

    chosen = COMMANDS[args.command]
    # Before a measurement that may take hours.
    table.check_writable(args.json)
    rows = chosen.run(args, note)
    show(chosen.show(rows).text())
    if args.json is not None:
        asked = command_line(argv)
        table.write_json(chosen.stored(rows) if chosen.stored else table.document(chosen.name, asked, rows), args.json)
    return 0 if chosen.code is None else chosen.code(rows)


if __name__ == "__main__":
    from fedmoe_ds.commands.program import start

    start("bench")
