"""Export: one of a run's models in a format that other tools load.

    fedmoe export RUN --format peft         LoRA, one key per expert: PEFT, vLLM, SGLang
    fedmoe export RUN --format peft-fused   LoRA, PEFT's target_parameters: to go on training with PEFT
    fedmoe export RUN --format merged       a whole model in Hugging Face's format: also what LoRA files have no place for

RUN is a run folder, or one of its checkpoints. Nothing is trained, and one process on the CPU is enough, whatever topology
wrote the checkpoint. The folder appears when all of it is written; its README.md says how it is loaded. The result is one line
on standard output.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path

from fedmoe_ds.config import load_config
from fedmoe_ds.distributed.stop_request import unwinding_on_sigterm
from fedmoe_ds.errors import UserError
from fedmoe_ds.export.card import write_card
from fedmoe_ds.export.formats import FORMATS
from fedmoe_ds.export.lora import DTYPES
from fedmoe_ds.export.written import Request, folder_size, without_common_model
from fedmoe_ds.results import Selection, TrainedRun, open_run, round_choice
from fedmoe_ds.storage.file_modes import follow_umask, keep_private
from fedmoe_ds.storage.files import expanded, remove, sync
from fedmoe_ds.storage.in_use import alone_with, hold
from fedmoe_ds.terminal import note, show, visible

_DRAFT = ".draft-export-"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, or a checkpoint folder of it")
    parser.add_argument("--format", required=True, choices=tuple(FORMATS), help="what is written")
    parser.add_argument(
        "--round", type=round_choice, metavar="N", help="rounds completed, or best (default: the newest checkpoint)"
    )
    parser.add_argument("--tier", metavar="K", help="top-k or label of a budget tier (default: the largest)")
    parser.add_argument("--client", metavar="NAME", help="the client's own model, where the method keeps some")
    parser.add_argument("--out", type=Path, metavar="DIR", help="new folder (default: RUN/export-...)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="folder of the base model, where it has moved")
    parser.add_argument("--base", metavar="NAME", help="name of the base model in what is written, for instance its hub id")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of LoRA tensors (default: float32, as they were trained)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    fmt = FORMATS[args.format]
    if args.dtype is not None and not fmt.takes_dtype:
        raise UserError(f"--dtype: {args.dtype}: format {args.format} keeps the types of the base model's files; drop it")
    with unwinding_on_sigterm():
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    run = open_run(args.run, args.round, args.model)
    selection = select(run, args.tier, args.client)
    out = expanded(str(args.out), "--out") if args.out is not None else run.folder / default_name(args.format, run, selection)
    request = Request(run, selection, out, base_name(run, args.base), args.dtype)
    said = export(args.format, request)
    show(visible(f"export: {out}: {said}"))
    return 0


def export(name: str, request: Request) -> str:
    """Write one model into `request.out`, all of it or nothing; a few words on what it is.

    Raises:
        UserError: the format cannot hold the model, the folder is there already, or cannot be written.
    """
    out = request.out
    try:
        if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
            raise UserError(f"--out: {out}: exists already; give another folder, or remove it")
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = _draft(out.parent)
    except OSError as error:
        raise UserError(f"--out: {out}: cannot be made: {error.strerror or error}; give another folder") from None
    try:
        said = _filled(name, request, draft)
        draft.rename(out)
        sync(out.parent)
    except OSError as error:
        raise UserError(f"--out: {out}: cannot be written: {error.strerror or error}; make room, or give another") from None
    finally:
        # Gone by now, unless something went wrong.
        if draft.exists():
            remove(draft)
    return said


def _draft(folder: Path) -> Path:
    """A new folder that this process holds; those of exports that were killed are removed first. Raises OSError."""
    for path in folder.glob(f"{_DRAFT}*"):
        # As in the cache: a draft without a lock has lost its writer. Where there are no locks, it stays.
        with contextlib.suppress(OSError), alone_with(path) as taken:
            if taken is None and path.stat().st_uid == os.geteuid():
                remove(path)
    # Another export may come between its making and its lock, and remove it.
    while not hold(draft := Path(tempfile.mkdtemp(prefix=_DRAFT, dir=folder))):
        pass
    return draft


def _filled(name: str, request: Request, draft: Path) -> str:
    drafted = replace(request, out=draft)
    written = FORMATS[name].write(drafted)
    write_card(drafted, written)
    for line in written.notes:
        note(line)
    # A client's own model is this user's alone, as in its checkpoint.
    own = request.selection.client is not None
    for path in [*draft.rglob("*"), draft]:
        (keep_private if own else follow_umask)(path)
        with contextlib.suppress(IsADirectoryError):
            sync(path)
    model = "a client's own model" if own else f"tier {request.selection.tier}"
    return f"{name}, {model}, round {request.run.round}, {folder_size(draft)}: {written.said}"


def select(run: TrainedRun, tier: str | None, client: str | None) -> Selection:
    """The model that is meant. Raises UserError where there is none."""
    method, personal = run.spec.method, any(block.personal for block in run.spec.blocks)
    if client is not None and not (personal or method.personal_models):
        raise UserError(f"--client: {client}: method {run.config.method.name} keeps no model per client; drop --client")
    if client is None and without_common_model(run):
        raise UserError(
            f"--client: missing: with method {run.config.method.name} every client has a model of its own; name the client"
        )
    return run.select(tier, client)


def default_name(fmt: str, run: TrainedRun, selection: Selection) -> str:
    """The folder of an export beside the run's files; it names no client."""
    client = selection.client
    model = f"tier-{selection.tier.replace(' ', '-')}" if client is None else f"client-{client.index}"
    return f"export-{fmt}-{model}-round-{run.round}"


def base_name(run: TrainedRun, given: str | None) -> str:
    """What the base model is called where others read it: never a path of this machine, which would mean nothing there.

    The given name, a hub id, or the last part of a path; of a built-in foundation its preset.
    """
    if given is not None:
        return given
    # As configured: a run that was opened with --model has another folder.
    config = load_config(run.checkpoint / "config.yaml").foundation
    if config.path is None:
        return str(config.preset)
    if _HUB_ID.fullmatch(config.path) and not os.path.isdir(config.path):
        return config.path
    return Path(config.path).name or Path(config.path).resolve().name
