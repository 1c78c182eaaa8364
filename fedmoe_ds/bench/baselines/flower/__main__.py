# mypy: disable-error-code="import-not-found"
"""`python -m fedmoe_ds.bench.baselines.flower`: one simulation on requests from standard input, see `bench.harness.program`.

`run_simulation` starts the engine that `flwr run` starts, without a SuperLink process in between.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from flwr.simulation import run_simulation

from fedmoe_ds.bench.baselines.flower import client, server
from fedmoe_ds.bench.harness.worker import take_channel


def main() -> None:
    channel = take_channel()
    requests = (json.loads(line) for line in sys.stdin)
    opening = next(requests)

    def answer(result: Any) -> None:
        channel.write(json.dumps({"result": result}) + "\n")

    run_simulation(
        server_app=server.make_app(opening, requests, answer),
        client_app=client.app,
        num_supernodes=len(opening["workload"]["caps"]),
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": opening["cores"], "include_dashboard": False, "_temp_dir": opening["scratch"]},
        },
    )


if __name__ == "__main__":
    main()
