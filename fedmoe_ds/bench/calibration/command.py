"""`launch/bench.py calibrate`: measure on this machine what the planner otherwise assumes, for `launch/plan.py --hardware`.

Passes and stages of a round run in processes of their own, alone and one per core; collectives between two and between four
real processes; memory comes from a small real job on two ranks. The shapes are in waves.py.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from fedmoe_ds.bench.calibration.least_squares import Together, errors, fit, fit_link, fit_stage, fit_together, spread
from fedmoe_ds.bench.calibration.waves import FEW, SEVERAL, Sample
from fedmoe_ds.bench.harness.command import Command, Note
from fedmoe_ds.bench.harness.jobs import run_job
from fedmoe_ds.bench.harness.process import scratch_folder
from fedmoe_ds.bench.harness.ranks import run_on_ranks
from fedmoe_ds.bench.harness.table import Row, Table
from fedmoe_ds.config import Config
from fedmoe_ds.machine import available_mib, machine_facts
from fedmoe_ds.planner.hardware import Compute, Hardware, Link, Links, Network, load_hardware
from fedmoe_ds.planner.prediction import predict_job
from fedmoe_ds.planner.work import Work
from fedmoe_ds.planner.workload import resolve
from fedmoe_ds.planner.world import World

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


def run(args: argparse.Namespace, note: Note) -> list[Row]:
    return [calibrate(note).model_dump(mode="json")]


def calibrate(note: Note) -> Hardware:
    """Measure this machine; takes about two minutes on two cores."""
    units, residual, stages, gain = _waves(note)
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
        flops_per_s={"float32": 1.0 / max(units["flops"], 1e-15), "bfloat16": gain / max(units["flops"], 1e-15)},
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
    slack = _child("slack")
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


def _waves(note: Note) -> tuple[dict[str, float], float, dict[str, list[tuple[int, int, float]]], float]:
    note("passes and stages of a round")
    found = _child("waves")
    samples = _samples(found["samples"])
    units = fit(samples, found["known"])
    return units, spread(errors(samples, units)), found["stages"], found["narrow_gain"]


def _samples(trees: list[dict[str, Any]]) -> list[Sample]:
    return [Sample(Work(**tree["work"]), tree["seconds"], tree["exchanges"], tree["bytes"]) for tree in trees]


def _network(clusters: dict[int, Any], together: dict[int, Together], assumed: Hardware, cores: int) -> Network:
    """Links of one host; between hosts nothing can be measured here, so the table's assumptions stay."""
    # Ranks that share a core wait for each other; the planner counts that itself, so it is taken out of the links.
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
    """Passes and collectives of a cluster of real ranks, as rank 0 has seen them."""
    note(f"a cluster of {ranks} ranks")
    with scratch_folder("fedmoe-calibrate-") as folder:
        _child("models", folder=str(folder))  # before the ranks, which would write them twice
        return _child("cluster", ranks, folder=str(folder))


def _memory(slack: float) -> tuple[float, float]:
    """(bytes that every rank holds beside what is counted, bytes more on rank 0), data already prepared."""
    with scratch_folder("fedmoe-calibrate-") as folder:
        tree = {**MEMORY_JOB, "output": str(folder)}
        tree["foundation"] = {**tree["foundation"], "cache": str(folder)}
        job = resolve(Config.model_validate({**tree, "name": "prepared"}))  # prepares the data, so that the job finds them
        peak = run_job({**tree, "name": "memory"}, folder, FEW).peak
        empty = load_hardware("cpu").model_copy(update={"baseline_bytes": 0.0, "activation_slack": slack})
        counted = predict_job(job, FEW, job.config.execution.clients_in_flight, World(1, FEW), empty).memory_total
        return float(peak[1] - counted), float(max(peak[0] - peak[1], 0))


def _child(part: str, ranks: int = 1, **request: Any) -> Any:
    """A part in processes of its own: what this one holds would count in their memory and share their caches."""
    return run_on_ranks("fedmoe_ds.bench.calibration.child", {"part": part, **request}, ranks)[0]


def table(rows: list[Row]) -> Table:
    """A calibration in a few lines."""
    hardware = Hardware.model_validate(rows[0])
    compute, tokens, sums = hardware.compute, hardware.network.all_to_all.intra, hardware.network.all_reduce.intra
    cells = [
        ["cores", f"{hardware.slots}"],
        ["matrix products, one core", f"{compute.flops_per_s['float32'] / 1e9:.1f} GFLOP/s"],
        ["with weights in bfloat16", f"{compute.flops_per_s['bfloat16'] / 1e9:.1f} GFLOP/s"],
        ["elementwise work, one core", f"{compute.bytes_per_s / 1e9:.1f} GB/s"],
        ["a framework call", f"{compute.call_s * 1e6:.1f} us"],
        ["a group of a grouped product", f"{compute.group_s * 1e6:.1f} us"],
        ["several ranks at once / more than cores", f"x {compute.crowding:.2f} / x {compute.oversubscription:.2f}"],
        ["token all-to-all", f"{tokens.alpha_s * 1e6:.0f} us + {tokens.bytes_per_s / 1e9:.2f} GB/s"],
        ["all-reduce", f"{sums.alpha_s * 1e6:.0f} us + {sums.bytes_per_s / 1e9:.2f} GB/s"],
        ["a process before the run", f"{hardware.baseline_bytes / 2**20:.0f} MiB"],
        ["residual of the fit, passes (rms)", f"{100 * hardware.facts['pass_residual_rms']:.0f} %"],
    ]
    return Table(["this machine", "measured"], cells)


def stored(rows: list[Row]) -> Any:
    """The calibration itself: a file that `launch/plan.py --hardware` reads."""
    return rows[0]


HELP = "measure this machine for launch/plan.py --hardware FILE"
ABOUT = "What this machine does per second, for predictions of the planner."
COMMAND = Command("calibrate", HELP, (), run, table=table, stored=stored, about=ABOUT)
