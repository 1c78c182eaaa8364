"""DeepSpeed's own tools, where they make sense for many clients: communication log, FLOPs profile, checkpointing.

The section has been checked when the configuration was loaded (`config.deepspeed_section`); here it is put to work. Monitors
have a module of their own (`monitors`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as ds_comm
from deepspeed.profiling.flops_profiler import FlopsProfiler

from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.storage.files import write_whole


class DeepSpeedTools:
    """The tools of one start. `section` is the run's `deepspeed:` section, `folder` the run's."""

    def __init__(self, section: dict[str, Any], parts: Parts, folder: Path) -> None:
        self.section, self.parts = section, parts
        self.profile: _PassProfile | None = None
        comms = section.get("comms_logger", {})
        if comms.get("enabled"):
            options = {key: comms[key] for key in ("prof_all", "prof_ops", "debug") if key in comms}
            ds_comm.configure(enabled=True, **options)
        if section.get("flops_profiler", {}).get("enabled"):
            self.profile = parts.runtime.run_on_all_ranks(lambda: _profile(section["flops_profiler"], parts, folder))
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
