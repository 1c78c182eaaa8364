"""Kernels: frozen, grouped, low-rank and per-client products: C++ for float32 on the CPU, Triton on CUDA."""

from fedmoe_ds.kernels import matrix, rows
from fedmoe_ds.kernels.compiling import library

__all__ = ["library", "matrix", "rows"]
