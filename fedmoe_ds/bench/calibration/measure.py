"""Calibrate: measure on this machine what the planner otherwise assumes, and describe it as hardware.

Passes and stages of a round run in processes of their own, alone and one per core; collectives between two and between four
real processes; memory comes from a small real job on two ranks. The shapes are in calibrate_waves.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedmoe_ds.bench.calibration.least_squares import Together, errors, fit, fit_link, fit_stage, fit_together, spread
from fedmoe_ds.bench.calibration.waves import FEW, SEVERAL, Sample
from fedmoe_ds.bench.harness.jobs import end_family, run_job
from fedmoe_ds.config import Config
from fedmoe_ds.distributed.launcher import free_port
from fedmoe_ds.machine import available_mib, machine_facts
from fedmoe_ds.planner.hardware import Compute, Hardware, Link, Links, Network, load_hardware
from fedmoe_ds.planner.prediction import predict_job
from fedmoe_ds.planner.work import Work
from fedmoe_ds.planner.workload import resolve
from fedmoe_ds.planner.world import World

Note = Callable[[str], None]

# A small job at a shape of its own: what a process holds beside what the planner counts.
MEMORY_JOB: dict[str, Any] = {
    "foundation": {"preset": "nano-olmoe", "pretrain": {"steps": 0}},
    "adapters": {"rank": 4, "attention": ["q_proj"]},
    "federation": {"rounds": 1},
    "local": {"steps": 2, "batch_size": 2},
    "data": {"sequence_length": 48, "max_samples": 8, "partition": {"kind": "natural", "clients": 3}},
    "evaluation": {"max_sequences": 4},
    "topology": {"ep_size": 2},
}
_TIMEOUT_S = 300.0  # of one child; twenty to forty seconds are usual


def calibrate(note: Note) -> Hardware:
    """Measure this machine; takes about two minutes on two cores."""
    units, residual, stages = _waves(note)
    for kind in ("flops", "bytes"):
        if units[kind] <= 0.0:
            note(f"warning: the fit gives {kind} no cost, plans take them as free; calibrate again on an idle machine")
    cores = len(os.sched_getaffinity(0))
    assumed = load_hardware("cpu")
    clusters = {ranks: _cluster(note, ranks) for ranks in (FEW, SEVERAL)}
    together = {
        ranks: fit_together(_samples(found["apart"]), _samples(found["together"]), units, ranks, max(1.0, ranks / cores))
        for ranks, found in clusters.items()
    }
    compute = Compute(
        flops_per_s={dtype: 1.0 / max(units["flops"], 1e-15) for dtype in ("float32", "bfloat16")},
        bytes_per_s=1.0 / max(units["bytes"], 1e-15),
        call_s=max(units["calls"], 1e-9),
        group_s=units["groups"],
        score_s=units["scores"],
        adapter_s=units["adapters"],
        number_s={stage: fit_stage(samples)[1] for stage, samples in stages.items()},
        block_s={stage: fit_stage(samples)[0] for stage, samples in stages.items()},
        crowding=together[FEW].crowding,
        oversubscription=together[SEVERAL].crowding,
    )
    network = _network(clusters, together, assumed, cores)
    note("memory of passes and of a small job")
    slack = _child("slack")["slack"]
    base, extra = _memory(slack)
    return Hardware(
        name="this machine",
        kind="cpu",
        slots=cores,
        memory_bytes=available_mib() * 2**20,
        shared_memory=True,
        baseline_bytes=base,
        main_extra_bytes=extra,
        activation_slack=slack,
        compute=compute,
        network=network,
        measured=["compute", "network between ranks of one host", "baseline memory"],
        facts={**machine_facts(), "pass_residual_rms": residual},
    )


def _waves(note: Note) -> tuple[dict[str, float], float, dict[str, list[tuple[int, int, float]]]]:
    note("passes and stages of a round")
    found = _child("waves")
    samples = _samples(found["samples"])
    units = fit(samples, found["known"])
    return units, spread(errors(samples, units)), found["stages"]


def _samples(trees: list[dict[str, Any]]) -> list[Sample]:
    return [Sample(Work(**tree["work"]), tree["seconds"], tree["exchanges"], tree["bytes"]) for tree in trees]


def _network(clusters: dict[int, Any], together: dict[int, Together], assumed: Hardware, cores: int) -> Network:
    """Links of one host; between hosts nothing can be measured here, so the table's assumptions stay."""
    sharing = {ranks: max(1.0, ranks / cores) for ranks in clusters}
    few, several = together[FEW], together[SEVERAL]
    peer = max(several.alpha_s / sharing[SEVERAL] - few.alpha_s / sharing[FEW], 0.0) / (SEVERAL - FEW)
    tokens = Link(alpha_s=few.alpha_s / sharing[FEW], peer_s=peer, bytes_per_s=few.bytes_per_s * sharing[FEW])
    links = {"all_to_all": Links(intra=tokens, inter=assumed.network.all_to_all.inter)}
    for name, turns in (("all_reduce", 1), ("control", SEVERAL - FEW)):
        alpha, rate = fit_link(clusters[FEW][name], FEW)
        more = fit_link(clusters[SEVERAL][name], SEVERAL)[0] / sharing[SEVERAL]
        alpha, rate = alpha / sharing[FEW], rate * sharing[FEW]
        intra = Link(alpha_s=alpha, peer_s=max(more - alpha, 0.0) / turns, bytes_per_s=rate)
        links[name] = Links(intra=intra, inter=getattr(assumed.network, name).inter)
    return Network(**links)


def _cluster(note: Note, ranks: int) -> Any:
    """Passes and collectives of a cluster of real ranks."""
    note(f"a cluster of {ranks} ranks")
    with tempfile.TemporaryDirectory(prefix="fedmoe-calibrate-") as folder:
        _child("models", folder)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
        command += ["--master_port", str(free_port()), "-m", "fedmoe_ds.bench.calibration.rank", folder]
        done = _ended(command)
    if done.returncode:
        raise RuntimeError(f"calibration with {ranks} ranks ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _memory(slack: float) -> tuple[float, float]:
    """(bytes that every rank holds beside what is counted, bytes more on rank 0), data already prepared."""
    with tempfile.TemporaryDirectory(prefix="fedmoe-calibrate-") as folder:
        tree = {**MEMORY_JOB, "output": folder}
        tree["foundation"] = {**tree["foundation"], "cache": folder}
        job = resolve(Config.model_validate({**tree, "name": "prepared"}))  # prepares the data, so that the job finds them
        peak = run_job({**tree, "name": "memory"}, Path(folder), FEW).peak
        empty = load_hardware("cpu").model_copy(update={"baseline_bytes": 0.0, "activation_slack": slack})
        counted = predict_job(job, FEW, job.config.execution.clients_in_flight, World(1, FEW), empty).memory_total
        return float(peak[1] - counted), float(max(peak[0] - peak[1], 0))


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}


def _child(part: str, *arguments: str) -> Any:
    command = [sys.executable, "-m", "fedmoe_ds.bench.calibration.measure", part, *arguments]
    done = _ended(command)
    if done.returncode:
        raise RuntimeError(f"calibration ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _ended(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; whatever happens here, nothing of it stays behind."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment()) as process:
        try:
            out, err = process.communicate(timeout=_TIMEOUT_S)
        finally:
            end_family(process)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def child(part: str, arguments: list[str]) -> None:
    """What a process of its own does; the answer is one line of JSON."""
    from fedmoe_ds.bench.calibration import waves
    from fedmoe_ds.bench.calibration.kernels import known_units

    answer: dict[str, Any] = {}
    if part == "models":
        waves.write_models(Path(arguments[0]))
    elif part == "slack":
        answer = {"slack": waves.activation_slack()}
    else:
        samples = waves.pass_samples(lambda text: None)
        known = known_units()
        answer = {"samples": [_plain(sample) for sample in samples], "stages": waves.stage_samples(), "known": known}
    sys.stdout.write(json.dumps(answer) + "\n")


def _plain(sample: Sample) -> dict[str, Any]:
    tree = asdict(sample)
    return {**tree, "work": {kind: float(value) for kind, value in tree["work"].items()}}


if __name__ == "__main__":
    child(sys.argv[1], sys.argv[2:])
