# mypy: disable-error-code="import-not-found, untyped-decorator", allow-subclassing-any
"""The ServerApp: Flower's own FedAvg over all clients' adapters, whose rounds begin when they are asked for and are timed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import load_file
from torch import Tensor

from fedmoe_ds.bench.baselines.flower.client import IMPLEMENTATION
from fedmoe_ds.bench.harness.worker import Request
from fedmoe_ds.bench.harness.workload import Workload
from fedmoe_ds.bench.wave.peft import Peft
from fedmoe_ds.machine import peak_mib

Answer = Callable[[Any], None]


class OnRequest(FedAvg):
    """FedAvg without evaluation. A round lasts from the choice of clients to the new global adapters.

    Args:
        requests: what to do next: `round`, or `compare` with adapters in a file.
        answer: tells the result.
    """

    def __init__(
        self, folder: Path, workload: Workload, start: dict[str, Tensor], requests: Iterator[Request], answer: Answer
    ) -> None:
        everybody = len(workload.caps)
        super().__init__(fraction_evaluate=0.0, min_train_nodes=everybody, min_available_nodes=everybody)
        self.folder, self.workload, self.initial = folder, workload, start
        self.requests, self.answer = requests, answer
        self.peaks: dict[int, float] = {}
        self.began = 0.0

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Wait for the request of a round, then begin it."""
        while (request := next(self.requests))["do"] == "compare":
            self.answer(self._compare(arrays.to_torch_state_dict(), Path(request["file"])))
        assert request["do"] == "round", request
        config["stage"] = request["stage"]
        self.began = time.perf_counter()
        messages: Iterable[Message] = super().configure_train(server_round, arrays, config, grid)
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average, and tell about the round. Raises RuntimeError where a client failed, which FedAvg would ignore."""
        received = list(replies)
        found: tuple[ArrayRecord | None, MetricRecord | None] = super().aggregate_train(server_round, received)
        seconds = time.perf_counter() - self.began
        for reply in received:
            if reply.has_error():
                raise RuntimeError(f"a client failed: {reply.error.reason}")
        assert len(received) == len(self.workload.caps), "a client did not answer"
        clients = sorted((reply.content["metrics"] for reply in received), key=lambda metrics: metrics["client"])
        self.peaks |= {metrics["process"]: metrics["peak-mib"] for metrics in clients}
        self.answer(
            {
                "seconds": seconds,
                "training_seconds": sum(metrics["seconds"] for metrics in clients),
                "peak_mib": peak_mib() + sum(self.peaks.values()),
                "losses": [(metrics["first-loss"], metrics["last-loss"]) for metrics in clients],
                "processes": len(self.peaks),
            }
        )
        return found

    def _compare(self, adapters: dict[str, Tensor], file: Path) -> dict[str, float]:
        """Distance of the global adapters to those in a file, and to those at the beginning (Euclidean, all numbers)."""
        theirs = read_adapters(file, self.folder, self.workload)
        return {"distance": _distance(adapters, theirs), "moved": _distance(adapters, self.initial)}


@dataclass(frozen=True)
class Stored(Workload):
    """A workload that starts from given adapters, by canonical name."""

    values: dict[str, Tensor] = field(default_factory=dict)

    def initial_value(self, key: str, shape: torch.Size) -> Tensor:
        assert self.values[key].shape == shape, (key, shape)
        return self.values[key]


def read_adapters(file: Path, folder: Path, workload: Workload) -> dict[str, Tensor]:
    """Adapters stored under our names, under PEFT's."""
    return Peft(folder, Stored(**vars(workload), values=load_file(file)), IMPLEMENTATION).start


def _distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return float(sum(float((one[name].double() - other[name].double()).square().sum()) for name in one) ** 0.5)


def make_app(opening: Request, requests: Iterator[Request], answer: Answer) -> ServerApp:
    """The server of one simulation; it answers the opening request as soon as it knows the adapters to start from."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        workload, folder = Workload.from_json(opening["workload"]), Path(opening["folder"])
        start = Peft(folder, workload, IMPLEMENTATION).start
        answer({"versions": {name: version(name) for name in ("flwr", "ray", "torch", "transformers", "peft")}})
        config = ConfigRecord({"folder": str(folder), "workload": json.dumps(workload.to_json()), "stage": ""})
        strategy = OnRequest(folder, workload, start, requests, answer)
        strategy.start(grid, ArrayRecord(start), num_rounds=opening["rounds"], train_config=config)

    return app
