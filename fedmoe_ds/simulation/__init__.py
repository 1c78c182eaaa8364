"""Simulation: a federation on paper, at any number of ranks and clients: rates, bytes, memory, failures, the next walls."""

from fedmoe_ds.simulation.federation import Simulated, simulate
from fedmoe_ds.simulation.setting import Setting

__all__ = ["Setting", "Simulated", "simulate"]
