"""The planner's search for the best topology of 1 024 GPUs: every legal one, each with a schedule of the whole round."""

from __future__ import annotations

import time

from fedmoe_ds.config import Config
from fedmoe_ds.config.shipped import FOLDER
from fedmoe_ds.planner import World, load_hardware, resolve
from fedmoe_ds.planner.search import try_all

NAME = "planner_search"
X = "participants"
POINTS = (256, 1_000, 10_000, 100_000)
WALL = "one process schedules every topology: seconds at 10 000 participants, a minute at 100 000"


def measure(x: int) -> dict[str, float]:
    tree = {
        "foundation": {"path": str(FOLDER / "models" / "olmoe-1b-7b"), "dtype": "bfloat16"},
        "adapters": {"rank": 8, "attention": ["q_proj", "v_proj"]},
        "local": {"steps": 24, "batch_size": 4},
        "data": {"sequence_length": 512, "partition": {"clients": x}},
        "execution": {"clients_in_flight": 64},
    }
    job = resolve(Config.model_validate(tree), kind="cuda")
    began = time.perf_counter()
    choices, refusals = try_all(job, World(128, 8), load_hardware("h200"))
    return {"seconds": time.perf_counter() - began, "fit": float(len(choices)), "refused": float(len(refusals))}
