"""Target: what a command is given to open: a run folder, one of its checkpoints, or a model folder or hub id."""

from __future__ import annotations

from pathlib import Path

from fedmoe_ds.checkpoint.reader import progress_of
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation.meta_model import CONFIG_FILE
from fedmoe_ds.results.trained_run import TrainedRun, open_run
from fedmoe_ds.storage.files import expanded

ADAPTER_FILE = "adapter_config.json"


def open_target(given: str, round_index: int | str | None = None, model: Path | None = None) -> TrainedRun | None:
    """The run that is named, or None where a model folder or a hub id is.

    Args:
        round_index, model: as `open_run` takes them; a model has neither.
    Raises:
        UserError: nothing of the kind is there; as `open_run`.
    """
    path = expanded(given, "run")
    if path.is_dir():
        if progress_of(path) is not None or (path / "checkpoints").is_dir():
            return open_run(path, round_index, model)
        if (path / ADAPTER_FILE).is_file() and not (path / CONFIG_FILE).is_file():
            raise UserError(
                f"{given}: holds an adapter ({ADAPTER_FILE}) and no model; start a run from it with adapters.start, or export "
                "it merged and give that folder"
            )
        if not (path / CONFIG_FILE).is_file():
            raise UserError(f"{given}: neither a run (no folder checkpoints) nor a model (no {CONFIG_FILE}); give one of them")
    elif path.exists() or _is_a_path(given):
        raise UserError(f"{given}: no such folder; give a run folder, a checkpoint of it, a model folder or a hub id")
    for option, value in (("--round", round_index), ("--model", model)):
        if value is not None:
            raise UserError(f"{option}: {value}: {given} is a model and no run; drop the option")
    return None


def _is_a_path(given: str) -> bool:
    """Whether this is surely no hub id, `name` or `owner/name`."""
    owner, slash, _ = given.partition("/")
    # runs/mine is no hub id where there is a folder runs.
    return (
        given.startswith((".", "~", "/")) or given.count("/") > 1 or given.endswith("/") or bool(slash and Path(owner).is_dir())
    )
