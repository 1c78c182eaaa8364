"""Federated rank: one rank of whole rounds of the workload: `python -m fedmoe_ds.bench.baselines.federated_rank`.

Every rank is a cluster of its own. Schedule, wave trainer, sums of a round, control messages and server step are those of a
run; there is no evaluation and no checkpoint. Rank 0 reads requests and answers them, see `bench.harness.program`.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from fedmoe_ds.bench.harness.inputs import whole_client
from fedmoe_ds.bench.harness.worker import Request, reply, take_channel
from fedmoe_ds.bench.harness.workload import Workload
from fedmoe_ds.bench.wave.fused import Fused
from fedmoe_ds.clients.client import Client
from fedmoe_ds.config import TopologyConfig
from fedmoe_ds.distributed.launcher import detect_launch
from fedmoe_ds.distributed.runtime import Runtime, init_runtime, run_entry
from fedmoe_ds.distributed.topology import Topology, build_topology
from fedmoe_ds.federation.schedule import schedule
from fedmoe_ds.federation.server import Server
from fedmoe_ds.machine import peak_mib


class FederatedRank(Fused):
    """This rank's share of the clients, and the server step that every rank takes."""

    def __init__(self, folder: Path, workload: Workload, bitwise: bool, runtime: Runtime, topology: Topology) -> None:
        self.share = math.ceil(len(workload.caps) / topology.layout.clusters)
        super().__init__(folder, replace(workload, caps=workload.caps[: self.share]), bitwise)
        self.caps, self.runtime, self.topology = workload.caps, runtime, topology
        self.server = Server(self.spec, self.foundation, self._clients("timed"))
        self.own, self.cost = self.server.initial_state(runtime.device), self.spec.cost

    def round(self, stage: str) -> dict[str, Any]:
        """One round from the global adapters to the next ones; they agree on all ranks afterwards."""
        clients, layout = self._clients(stage), self.topology.layout
        data = {client.index: self._sequences(stage, client) for client in clients}
        self.runtime.barrier()  # nobody's clock runs while others still lay out their data
        began = time.perf_counter()
        waves = schedule(clients, self.cost, self.local, layout.clusters, 1, self.share)[self.topology.cluster]
        sums = self.server.new_sums(len(clients), self.runtime.device)
        done = {}
        training = 0.0
        for wave in waves:
            started = time.perf_counter()
            trained = self.trainer.train(wave, 0, self.start, lambda _: {}, data.__getitem__)
            training += time.perf_counter() - started
            for local, report in trained:
                assert report.finite, report.client
                self.server.fold(sums, report.client.index, local, report)
                done[report.client.index] = report.losses
        sums.reduce(self.topology)
        everybody = {int(index): losses for part in self.runtime.gather(done) for index, losses in part.items()}
        self.server.step(sums, self.start, self.own, 1)
        spent = {"seconds": time.perf_counter() - began, "training": training, "peak_mib": peak_mib()}
        ranks = self.runtime.gather(spent)
        return {
            "seconds": max(rank["seconds"] for rank in ranks),
            "training_seconds": sum(rank["training"] for rank in ranks),
            "peak_mib": sum(rank["peak_mib"] for rank in ranks),
            "losses": [everybody[client.index] for client in clients],
        }

    def save(self, file: Path) -> None:
        """Store the global adapters under their canonical names."""
        save_file({key: value.contiguous() for key, _, value in self.start.items(first_expert=0)}, file)

    def _clients(self, stage: str) -> list[Client]:
        load = self.workload
        count = load.stage_steps(stage) * load.sequences
        return [whole_client(i, cap, count, load.length) for i, cap in enumerate(self.caps)]


class RankWorker:
    """What rank 0 is asked, every rank does."""

    def __init__(self, runtime: Runtime, topology: Topology) -> None:
        self.runtime, self.topology = runtime, topology

    def open(self, folder: str, workload: dict[str, Any], bitwise: bool) -> None:
        self.rank = FederatedRank(Path(folder), Workload.from_json(workload), bitwise, self.runtime, self.topology)

    def round(self, stage: str) -> dict[str, Any]:
        return self.rank.round(stage)

    def save(self, file: str) -> None:
        if self.runtime.is_main:
            self.rank.save(Path(file))


def main() -> int:
    channel = take_channel()
    config = TopologyConfig(device="cpu")
    runtime = init_runtime(detect_launch(), config)
    worker = RankWorker(runtime, build_topology(config, runtime))
    # Rank 0 alone has a channel: it reads a request for all of them; at the end of its input all of them end.
    while (request := runtime.run_on_rank0(next_request)) is not None:
        answer = reply(worker, request)
        if runtime.is_main:
            channel.write(answer)
    return 0


def next_request() -> Request | None:
    """The next line of standard input; None at its end."""
    request: Request | None = json.loads(sys.stdin.readline() or "null")
    return request


if __name__ == "__main__":
    run_entry(main)
