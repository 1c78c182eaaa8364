"""Target: what a command is given to open: a run, one of its checkpoints, a model folder or hub id, or an adapter of PEFT's."""

from __future__ import annotations

from pathlib import Path

from fedmoe_ds.checkpoint.reader import progress_of
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation.meta_model import CONFIG_FILE
from fedmoe_ds.results.trained_run import TrainedRun, open_run
from fedmoe_ds.storage.files import expanded

ADAPTER_FILE = "adapter_config.json"


def open_target(given: str, round_index: int | str | None = None, model: Path | None = None) -> TrainedRun | None:
    """The run that is named, or None where a model folder, a hub id or an adapter of PEFT's is.

    Args:
        round_index, model: as `open_run` takes them; a model has neither, an adapter has its base model.
    Raises:
        UserError: nothing of the kind is there; as `open_run`.
    """
    path = expanded(given, "run")
    if path.is_dir():
        if progress_of(path) is not None or (path / "checkpoints").is_dir():
            return open_run(path, round_index, model)
        if not (is_adapter(given) or (path / CONFIG_FILE).is_file()):
            raise UserError(
                f"{given}: neither a run (no folder checkpoints) nor a model (no {CONFIG_FILE}) nor an adapter of PEFT's (no "
                f"{ADAPTER_FILE}); give one of them"
            )
    elif path.exists() or _is_a_path(given):
        raise UserError(f"{given}: no such folder; give a run folder, a checkpoint of it, a model folder or a hub id")
    for option, value in (("--round", round_index), ("--model", None if is_adapter(given) else model)):
        if value is not None:
            raise UserError(f"{option}: {value}: {given} is a model and no run; drop the option")
    return None


def is_adapter(given: str) -> bool:
    """Whether this is a folder with an adapter of PEFT's and no whole model."""
    path = expanded(given, "run")
    return (path / ADAPTER_FILE).is_file() and not (path / CONFIG_FILE).is_file()


def _is_a_path(given: str) -> bool:
    """Whether this is surely no hub id, `name` or `owner/name`."""
    owner, slash, _ = given.partition("/")
    # runs/mine is no hub id where there is a folder runs.
    return (
        given.startswith((".", "~", "/")) or given.count("/") > 1 or given.endswith("/") or bool(slash and Path(owner).is_dir())
    )
