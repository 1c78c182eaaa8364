"""Planner: what a run will cost, before anyone queues it: memory, bytes, seconds, the best topology. docs/planning.md."""

from fedmoe_ds.planner.hardware import Hardware, load_hardware
from fedmoe_ds.planner.prediction import Prediction, predict, predict_job
from fedmoe_ds.planner.workload import Job, resolve
from fedmoe_ds.planner.world import World

__all__ = ["Hardware", "Job", "Prediction", "World", "load_hardware", "predict", "predict_job", "resolve"]
