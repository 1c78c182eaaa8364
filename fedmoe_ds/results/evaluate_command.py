"""Evaluate: `fedmoe evaluate RUN|CHECKPOINT|MODEL [--data FILE] [key=value ...]`.

Scores a finished run (newest checkpoint, or --round), one of its checkpoints, a model folder or hub id, or an adapter that PEFT
has saved, in one process, with the layers of training. --data is what data.source takes (a file, a glob, a folder with a file
for each client, a hub data set, `stdlib`, `evals` ...): all of its rows are scored, read with the run's template, prompt and
length; key=value words change these (data.template=chat, evaluation.metrics=[exact_match]). Without --data the run's own
hold-outs are scored once more.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedmoe_ds.errors import UserError
from fedmoe_ds.results.run_checkpoint import round_choice
from fedmoe_ds.storage.files import check_replaceable, write_whole
from fedmoe_ds.terminal import note, show

if TYPE_CHECKING:
    from fedmoe_ds.results.scoring import Request, Scores


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("target", metavar="RUN|CHECKPOINT|MODEL", help="a run, a checkpoint, a model or hub id, an adapter")
    parser.add_argument("words", nargs="*", metavar="key=value", help="for instance data.template=classification")
    parser.add_argument("--data", action="append", default=[], metavar="FILE", help="rows to score; may be given several times")
    parser.add_argument(
        "--round", type=round_choice, metavar="N", help="the checkpoint with so many rounds, or best (default: the newest)"
    )
    parser.add_argument("--tier", help="one tier, by its label (default: all)")
    parser.add_argument("--clients", action="store_true", help="every client's rows apart: clients x models, as a matrix")
    parser.add_argument("--client", action="append", default=[], metavar="NAME",
                        help="as --clients, with this client's own model; may be given several times")  # fmt: skip
    parser.add_argument("--before", action="store_true", help="also the figures before the first round")
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="the base model of a run or an adapter, where it has moved"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--lines", action="store_true", help="print one JSON object per row in place of a table")
    return parser.parse_intermixed_args(argv)  # words may stand between the options


def main(argv: Sequence[str] | None = None) -> int:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read by DeepSpeed when it is imported
    args = parse(argv)
    # Before a model is loaded, which may take minutes.
    _check_writable(args.json)
    from fedmoe_ds.results.score_tables import document, lines, table

    scores = _scored(args)
    show(lines(scores) if args.lines else table(scores, bool(args.data)))
    if args.json is not None:
        _write(args.json, document(scores, {"model": args.target}))
    return 0


def _scored(args: argparse.Namespace) -> Scores:
    from fedmoe_ds.results.scored_config import config_of_model, config_of_run
    from fedmoe_ds.results.scoring import score_model, score_run
    from fedmoe_ds.results.target import open_target

    request = _request(args)
    run = open_target(args.target, args.round, args.model)
    if run is None:
        config = config_of_model(args.target, args.data, args.words, request.matrix, args.model)
        return score_model(config, request, note)
    config = config_of_run(run, args.data, args.words, request.matrix)
    note(f"{args.target}: {run.checkpoint.name}, method {config.method.name}")
    return score_run(run, config, bool(args.data), request, note)


def _request(args: argparse.Namespace) -> Request:
    from fedmoe_ds.results.scoring import Request

    return Request(args.tier, args.clients or bool(args.client), args.client, args.before)


def _check_writable(path: Path | None) -> None:
    if path is None:
        return
    try:
        check_replaceable(path)
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise PermissionError(0, "no such folder, or it cannot be written")
    except OSError as error:
        raise UserError(f"--json: {path}: {error.strerror or error}; give another file") from None


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, text)
    except OSError as error:
        raise UserError(f"--json: {path}: cannot be written: {error.strerror or error}; give another file") from None
