"""Console: what a start shows on the terminal, and where it keeps a copy: `--log FILE`, `--quiet`, `--verbose`.

One rule says who writes where. A name without `%r` is one file: what rank 0 says, and the supervisor of `--ranks`. With `%r` in
it every rank has a file of its own, `%r` being its number. Files are appended to, so that a run that is resumed has one log.
"""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import sys
from pathlib import Path

from fedmoe_ds.errors import UserError
from fedmoe_ds.storage.files import expanded, open_plain
from fedmoe_ds.terminal import note, show, voice

RANK = "%r"
_LAST = 2
"""Lines of standard output that stay with `--quiet`: the digest and the run's folder."""


def logging_options(parser: argparse.ArgumentParser) -> None:
    """Add the three options."""
    parser.add_argument(
        "--log", metavar="FILE", help="append all lines, with the time, to FILE (rank 0's); with %%r in FILE one file per rank"
    )
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--quiet", action="store_true", help="show errors and the last two lines only")
    amount.add_argument(
        "--verbose", action="store_true", help="show what every rank notes, seconds by phase, folders of the cache, versions"
    )


def start_console(args: argparse.Namespace, rank: int) -> None:
    """Speak as the options say from here on; to be called before anything else is done.

    Args:
        args: with the attributes of `logging_options`.
        rank: of this process; 0 for a supervisor.
    Raises:
        UserError: the log cannot be written.
    """
    voice.quiet, voice.verbose, voice.rank = args.quiet, args.verbose, rank
    if args.log is None or (rank > 0 and RANK not in args.log):
        return
    if not args.log:
        raise UserError("--log: '': names no file; give one, or drop the option")
    path = expanded(args.log.replace(RANK, str(rank)), "--log")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Appended: every write goes to the end, also where a supervisor and its rank 0 share the file.
        handle = open_plain(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--log: {path}: cannot be written: {reason}; name a file in a folder of yours") from None
    voice.log_to(open(handle, "a", encoding="utf-8", errors="backslashreplace"))  # noqa: SIM115  (lives as long as the process)
    voice.record(f"rank {rank} on {socket.gethostname()}: {shlex.join([*Path(sys.argv[0]).name.split(), *sys.argv[1:]])}")


def show_ending(lines: list[str]) -> None:
    """Write the last lines of a run to standard output; with `--quiet` the table before them goes to the log alone."""
    first = max(len(lines) - _LAST, 0) if voice.quiet else 0
    for line in lines[:first]:
        # A stopped run must not look like a finished one.
        (note if line.startswith("stopped by ") else voice.record)(line)
    show("\n".join(lines[first:]))
    # What a launcher cuts off must be out before the ranks part.
    sys.stdout.flush()
