# mypy: disable-error-code="import-not-found, untyped-decorator"
"""The ClientApp: local training of one client with transformers and PEFT, from the adapters that the server sent.

An actor of the engine is a process that serves many clients; it keeps the loaded model from one message to the next.
"""

from __future__ import annotations

import functools
import json
import os
import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedmoe_ds.bench.harness.workload import Workload
from fedmoe_ds.bench.wave.peft import Peft
from fedmoe_ds.machine import peak_mib

IMPLEMENTATION = "grouped_mm"
"""The fastest experts implementation of transformers at the measured shapes."""

app = ClientApp()


class Member(Peft):
    """The PEFT model of an actor."""

    def fit(self, adapters: dict[str, Tensor], client: int, stage: str) -> tuple[float, float]:
        """Train one client; its adapters are then in the model. Returns its first and its last loss."""
        self.start = adapters
        return self._train_client(self.workload.caps[client], torch.from_numpy(self.workload.token_ids(stage, client)))

    def adapters(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self._trainables()}


@functools.cache
def member(folder: str, workload: str) -> Member:
    """The model of this process, loaded with the first message."""
    torch.set_num_threads(1)
    return Member(Path(folder), Workload.from_json(json.loads(workload)), IMPLEMENTATION)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer one message of a round."""
    config = message.content["config"]
    mine = member(str(config["folder"]), str(config["workload"]))
    client = int(context.node_config["partition-id"])
    began = time.perf_counter()
    first, last = mine.fit(message.content["arrays"].to_torch_state_dict(), client, str(config["stage"]))
    metrics = {
        "num-examples": mine.workload.stage_steps(str(config["stage"])) * mine.workload.sequences,
        "client": client,
        "first-loss": first,
        "last-loss": last,
        "seconds": time.perf_counter() - began,
        "process": os.getpid(),
        "peak-mib": peak_mib(),
    }
    content = RecordDict({"arrays": ArrayRecord(mine.adapters()), "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=message)
