"""DeepSpeed's own tools, where they make sense for many clients: monitors, communication log, FLOPs profile, checkpointing.

The section has been checked when the configuration was loaded (`config.deepspeed_section`); here it is put to work.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as ds_comm
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from deepspeed.profiling.flops_profiler import FlopsProfiler

from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.federation.journal import Journal
from fedmoe_ds.storage.files import write_whole

_MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "csv_monitor": None, "comet": "comet_ml"}
"""Package that a monitor needs beside DeepSpeed."""


class DeepSpeedTools:
    """The tools of one start. `section` is the run's `deepspeed:` section."""

    def __init__(self, section: dict[str, Any], parts: Parts, journal: Journal) -> None:
        self.section, self.parts = section, parts
        self.profile: _PassProfile | None = None
        journal.monitor = _monitor(section, parts.runtime)
        comms = section.get("comms_logger", {})
        if comms.get("enabled"):
            options = {key: comms[key] for key in ("prof_all", "prof_ops", "debug") if key in comms}
            ds_comm.configure(enabled=True, **options)
        if section.get("flops_profiler", {}).get("enabled"):
            self.profile = parts.runtime.run_on_all_ranks(lambda: _profile(section["flops_profiler"], parts, journal.folder))
        if "activation_checkpointing" in section:
            _use_deepspeed_checkpointing(section, parts)

    def close(self, folder: Path) -> None:
        """Finish the profile; write the communication log: one file per rank, bytes and milliseconds by operation and size."""
        if self.profile is not None:
            self.profile.finish()
        if not self.section.get("comms_logger", {}).get("enabled"):
            return
        rows = ["operation,bytes,count,total_ms,mean_ms"]
        for operation, sizes in sorted(ds_comm.comm.comms_logger.comms_dict.items()):
            for size, (count, latencies, *_) in sorted(sizes.items()):
                total = sum(latencies)
                rows.append(f"{operation},{size},{count},{total:.3f},{total / max(count, 1):.4f}")
        target = folder / f"comms-rank{self.parts.runtime.rank}.csv"
        self.parts.runtime.run_on_all_ranks(lambda: _write(target, "\n".join(rows) + "\n"))


def _monitor(section: dict[str, Any], runtime: Runtime) -> MonitorMaster | None:
    """DeepSpeed's monitors, on every rank; None where none is asked for.

    Raises:
        UserError: a monitor's package is missing, or it cannot start (no account, a folder that cannot be written).
    """
    wanted = [name for name in _MONITORS if section.get(name, {}).get("enabled")]
    if not wanted:
        return None

    def start() -> MonitorMaster:
        for name in wanted:
            package = _MONITORS[name]
            # Asked beforehand: DeepSpeed's writers print advice of their own and end with an ImportError.
            if package is not None and importlib.util.find_spec(package) is None:
                raise UserError(
                    f"deepspeed.{name}.enabled: true: it needs the package {package}, which is not installed: pip install "
                    f"{package}, or set it to false"
                )
        try:
            return MonitorMaster(get_monitor_config(section))
        except Exception as error:  # whatever a service's own client raises
            raise UserError(
                f"deepspeed.{' and '.join(wanted)}: cannot start: {type(error).__name__}: {error}; mend that, or set "
                "enabled=false"
            ) from error

    return runtime.run_on_all_ranks(start)


def _write(target: Path, text: str) -> None:
    try:
        write_whole(target, text)
    except OSError as error:
        raise UserError(f"output: {target}: cannot write: {error.strerror or error}; make room") from None


class _PassProfile:
    """Profiles forward pass number `profile_step` into flops.txt.

    Expert products run inside one custom autograd function, which the profiler's patches do not see: it reports the dense part.
    """

    def __init__(self, options: dict[str, Any], model: Any, folder: Path) -> None:
        self.options, self.passes = options, 0
        self.target = folder / (options.get("output_file") or "flops.txt")
        if not self.target.parent.is_dir():
            raise UserError(f"deepspeed.flops_profiler.output_file: {self.target.parent}: no such folder; make it first")
        # Rank 0's part of the model: every rank of a cluster has the same dense part.
        self.profiler = FlopsProfiler(model)
        model.base_model.register_forward_pre_hook(self._before)

    def _before(self, module: Any, args: Any) -> None:
        self.passes += 1
        if self.passes == self.options.get("profile_step", 1):
            self.profiler.start_profile()
        else:
            self.finish()  # not from a hook after the pass: the profiler's own hooks would still have to run

    def finish(self) -> None:
        """Write the profile of the pass that ran last, if that was the one."""
        if not self.profiler.started:
            return
        options = {key: self.options[key] for key in ("module_depth", "top_modules", "detailed") if key in self.options}
        step = self.options.get("profile_step", 1)
        with tempfile.TemporaryDirectory(prefix=".flops-", dir=self.target.parent) as folder:
            draft = Path(folder) / self.target.name  # the profiler would write through a link
            self.profiler.print_model_profile(profile_step=step, output_file=str(draft), **options)
            _write(self.target, draft.read_text())
        self.profiler.end_profile()


def _profile(options: dict[str, Any], parts: Parts, folder: Path) -> _PassProfile | None:
    return _PassProfile(options, parts.foundation.model, folder) if parts.runtime.is_main else None


def _use_deepspeed_checkpointing(section: dict[str, Any], parts: Parts) -> None:
    """Recompute decoder layers through DeepSpeed's checkpointing (for instance with `cpu_checkpointing`)."""
    options = section["activation_checkpointing"]
    deepspeed.checkpointing.configure(
        None,
        # Only these two: partitioning activations needs a tensor-parallel group, and there is none.
        checkpoint_in_cpu=options.get("cpu_checkpointing", False),
        synchronize=options.get("synchronize_checkpoint_boundary", False),
    )
    for module in parts.foundation.model.modules():
        # transformers calls this function for the layers that execution.activation_checkpointing has switched on.
        if getattr(module, "gradient_checkpointing", None) is True:
            module._gradient_checkpointing_func = deepspeed.checkpointing.non_reentrant_checkpoint
