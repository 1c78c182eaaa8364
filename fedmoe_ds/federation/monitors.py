"""Monitors: the figures of a run in TensorBoard, W&B, Comet and CSV files, through DeepSpeed's own writers.

A step is a round; every value is one that metrics.jsonl has, too, or a mean or sum of such. What is not finite is left out. The
files lie in the run folder unless the configuration names another place. A resumed run trains some rounds again: their earlier
rows are removed from the CSV files, and TensorBoard is told to forget them. Services get them twice, in a run of their own.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from fedmoe_ds.config import Config
from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.evaluation import Score
from fedmoe_ds.report.history import tier_of
from fedmoe_ds.storage.files import check_replaceable, make_folder, write_whole

if TYPE_CHECKING:
    from deepspeed.monitor.monitor import MonitorMaster

Figure = tuple[str, float, int]
"""Name, value, round: what DeepSpeed's writers take."""
FOLDER = "monitor"
_PACKAGES = {"tensorboard": ("tensorboard", "tensorboard"), "wandb": ("wandb", "wandb"), "comet": ("comet_ml", "comet")}
"""By monitor: the package it needs beside DeepSpeed, and the extra of this project that installs it."""
_NAMES = (*_PACKAGES, "csv_monitor")
_IN_FILES = ("tensorboard", "csv_monitor")
_CLIENT_LOSSES = ("loss_first", "loss_last")


def check_monitors(section: Mapping[str, Any]) -> None:
    """Raise UserError where a monitor that is asked for lacks its package."""
    for name in _wanted(section):
        package, extra = _PACKAGES.get(name, (None, None))
        # Asked beforehand: DeepSpeed's writers print advice of their own and end with an ImportError.
        if package is not None and importlib.util.find_spec(package) is None:
            raise UserError(
                f"deepspeed.{name}.enabled: true: it needs the package {package}, which is not installed: pip install "
                f"'fedmoe-ds[{extra}]', or set it to false"
            )


def start_monitors(config: Config, folder: Path, runtime: Runtime, resumed: int | None) -> MonitorMaster | None:
    """DeepSpeed's monitors, on every rank; None where none is asked for.

    Args:
        folder: of the run.
        resumed: rounds of the checkpoint that this start continues; None: it begins.
    Raises:
        UserError: one cannot start (no account, a folder that cannot be written).
    """
    wanted = _wanted(config.deepspeed)
    if not wanted:
        return None
    # Not at the top: a dry run asks for packages alone, without DeepSpeed's seconds of imports.
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    section, last = filled(config, folder), -1 if resumed is None else resumed
    # Files elsewhere may be another run's; only one that is continued has written them.
    own = [name for name in _IN_FILES if name in section and (resumed is not None or _is_inside(section[name], folder))]

    def start() -> MonitorMaster:
        try:
            if runtime.is_main:
                _prepare(section, folder, config.name)
                if "csv_monitor" in own:
                    keep_rounds(Path(section["csv_monitor"]["output_path"]) / section["csv_monitor"]["job_name"], last)
            master = MonitorMaster(get_monitor_config(section))
            if runtime.is_main:
                _continue(master, last, "tensorboard" in own)
        except UserError:
            raise
        except Exception as error:  # whatever a service's own client raises
            raise UserError(
                f"deepspeed.{' and '.join(wanted)}: cannot start: {type(error).__name__}: {error}; mend that, or set "
                "enabled=false"
            ) from error
        return master

    return runtime.run_on_all_ranks(start)


def _wanted(section: Mapping[str, Any]) -> list[str]:
    return [name for name in _NAMES if section.get(name, {}).get("enabled")]


def filled(config: Config, folder: Path) -> dict[str, Any]:
    """The monitors' sections with what their user left open: in the run folder, under the run's name, every round."""
    ours: dict[str, dict[str, Any]] = {
        name: {"output_path": str(folder / FOLDER / name), "job_name": config.name} for name in _IN_FILES
    }
    # Comet counts samples, and would leave out 99 of 100 rounds.
    ours |= {"wandb": {"group": config.name}, "comet": {"samples_log_interval": 1, "experiment_name": config.name}}
    return {name: {**ours[name], **config.deepspeed[name]} for name in _wanted(config.deepspeed)}


def _is_inside(options: dict[str, Any], folder: Path) -> bool:
    """Whether a monitor writes into the run folder."""
    return (folder / FOLDER) in Path(options["output_path"]).parents


def _prepare(section: dict[str, Any], folder: Path, run: str) -> None:
    """Make the folders in the run folder, of which none may be a link."""
    for name in (name for name in _IN_FILES if name in section and _is_inside(section[name], folder)):
        place = Path(section[name]["output_path"])
        for made in (folder / FOLDER, place, place / section[name]["job_name"]):
            make_folder(made)
    # What DeepSpeed does not pass on, W&B takes from the environment.
    if "wandb" in section and "WANDB_DIR" not in os.environ:
        for made in (folder / FOLDER, folder / FOLDER / "wandb"):
            make_folder(made)
        os.environ["WANDB_DIR"] = str(folder / FOLDER / "wandb")
    if "wandb" in section:
        os.environ.setdefault("WANDB_NAME", run)


def keep_rounds(folder: Path, last: int) -> None:
    """Remove the rows of later rounds from DeepSpeed's CSV files, and headers that stand between rows.

    Raises OSError: a file cannot be rewritten, or is a link.
    """
    for path in sorted(folder.glob("*.csv")):
        check_replaceable(path, links=False)  # DeepSpeed would append to what a link names
        header, *rows = list(csv.reader(io.StringIO(path.read_text()))) or [[]]
        if len(header) != 2 or header[0] != "step":
            continue  # not of a monitor
        kept = [row for row in rows if row and row[0].isdigit() and int(row[0]) <= last]
        text = io.StringIO()
        csv.writer(text).writerows([header, *kept])
        write_whole(path, text.getvalue())


def _continue(master: MonitorMaster, last: int, forget: bool) -> None:
    """Let the writers go on in files that are there, before they have written anything."""
    if master.csv_monitor is not None:
        # Those whose header is written already.
        master.csv_monitor.filenames += [path.stem for path in Path(master.csv_monitor.log_dir).glob("*.csv")]
    if master.tb_monitor is not None and forget:
        from torch.utils.tensorboard import SummaryWriter

        log_dir = master.tb_monitor.summary_writer.log_dir
        if len(list(Path(log_dir).glob("events.out.tfevents.*"))) == 1:
            return  # the writer's own
        master.tb_monitor.summary_writer.close()
        # A mark in the record: TensorBoard forgets what it has read of this round and later ones.
        master.tb_monitor.summary_writer = SummaryWriter(log_dir, purge_step=last + 1)


def write_figures(master: MonitorMaster, figures: list[Figure]) -> list[str]:
    """Let every monitor write, on rank 0; a line about each service that could not.

    Raises OSError: a file in which figures are kept cannot be written.
    """
    for files in (master.tb_monitor, master.csv_monitor):
        if files is not None:
            files.write_events(figures)
    # A service may be down for an hour of a run of days, and the record has the same figures.
    services = {"wandb": master.wandb_monitor, "comet": master.comet_monitor}
    return _failures(
        {name: functools.partial(one.write_events, figures) for name, one in services.items() if one is not None},
        "these figures are in metrics.jsonl alone",
    )


def close_monitors(master: MonitorMaster, failed: bool) -> list[str]:
    """Bring everything out, on rank 0; a process of a run ends without the handlers that the services' clients would do it in.

    The record is complete by now, so a monitor that fails here ends nothing.

    Args:
        failed: the run ends by an error.
    Returns:
        A line about each monitor that could not be closed.
    """
    actions: dict[str, Callable[[], object]] = {}
    if master.tb_monitor is not None:
        actions["tensorboard"] = master.tb_monitor.summary_writer.close
    if master.wandb_monitor is not None:
        import wandb

        actions["wandb"] = functools.partial(wandb.finish, exit_code=int(failed))
    if master.comet_monitor is not None:
        actions["comet"] = master.comet_monitor.experiment.end
    return _failures(actions, "its last figures may be in metrics.jsonl alone")


def _failures(actions: Mapping[str, Callable[[], object]], lost: str) -> list[str]:
    lines = []
    for name, action in actions.items():
        try:
            action()
        except Exception as error:  # whatever a service's own client raises
            lines.append(f"deepspeed.{name}: {type(error).__name__}: {error}; {lost}")
    return lines


def of_evaluation(round_index: int, rows: Iterable[Score]) -> list[Figure]:
    """Curves of every tier on the pooled hold-outs; one per client would be unreadable."""
    found = {
        f"{name}/{row.split}/k{row.label}": value
        for row in rows
        if row.split != "client"
        for name, value in {"perplexity": row.perplexity, "accuracy": row.accuracy, "loss": row.loss, **row.metrics}.items()
    }
    return _figures(found, round_index)


def of_round(round_index: int, clients: list[dict[str, Any]], fields: Mapping[str, Any]) -> list[Figure]:
    """Figures of one round: what its `round` event holds, and the means of its clients' first and last training losses.

    Args:
        clients: the fields of its `client` events.
        fields: those of its `round` event.
    """
    found: dict[str, float | None] = {
        f"round/{name}": fields[name]
        for name in ("tokens", "targets", "seconds", "tokens_per_s", "participants", "dropped", "waves", "lr")
    }
    found["round/bytes"] = sum(tally["bytes"] for tally in fields["collectives"].values())
    found |= {f"bytes/{name}": tally["bytes"] for name, tally in fields["collectives"].items()}
    found |= {f"seconds/{name}": seconds for name, seconds in fields["phases"].items()}
    found |= {f"server/{name}": fields[f"server_{name}"] for name in _CLIENT_LOSSES if f"server_{name}" in fields}
    found |= dict(_mean_losses(clients))
    return _figures(found, round_index)


def _mean_losses(clients: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Over the participants, and those of each tier; a client without a finite loss has none to give."""
    tiers = dict.fromkeys(tier_of(client) for client in clients)
    for name in _CLIENT_LOSSES:
        told = [(tier_of(client), value) for client in clients if _finite(value := client[name])]
        for place, losses in [
            (f"round/{name}", [value for _, value in told]),
            *((f"{name}/k{label}", [value for tier, value in told if tier == label]) for label in tiers),
        ]:
            if losses:
                yield place, math.fsum(losses) / len(losses)


def _figures(found: Mapping[str, float | None], round_index: int) -> list[Figure]:
    # A name becomes a file's name, and a label of a tier may hold a space.
    return [(name.replace(" ", "-"), value, round_index) for name, value in found.items() if _finite(value)]


def _finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
