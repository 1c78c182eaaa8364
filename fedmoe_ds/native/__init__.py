"""Native: C++ kernels for float32 on the CPU, compiled on the spot; PyTorch's own operations serve everything else."""

from fedmoe_ds.native import matrix, rows
from fedmoe_ds.native.compiling import library

__all__ = ["library", "matrix", "rows"]
