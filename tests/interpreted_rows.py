"""Triton's interpreter as a program of its own: `TRITON_INTERPRET=1 python interpreted_rows.py` checks kernels on a CPU."""

from __future__ import annotations

import itertools
from typing import Any

import numpy
import torch
import triton.language as tl
from test_optimizer_triton import SETTINGS, check_steps
from test_rows_triton import FLOATS, UNITS, check_gate, check_norm, check_rotation
from triton.runtime import interpreter

CPU = torch.device("cpu")
WIDTHS = (1, 7, 64, 1100)
HEADS = ((2, 3, 5, 6), (1, 4, 1, 128), (3, 2, 17, 8))


def round_to_nearest() -> None:
    """The interpreter cuts float32 off to bfloat16, where a GPU rounds to the nearest."""
    original = interpreter.InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return original(self, source, target)
        halves = torch.from_numpy(numpy.ascontiguousarray(source.data)).bfloat16().view(torch.int16)
        return interpreter.TensorHandle(halves.numpy().view(numpy.uint16), tl.bfloat16)

    for name in ("cast_impl", "create_fp_trunc"):
        setattr(interpreter.InterpreterBuilder, name, cast)


if __name__ == "__main__":
    round_to_nearest()
    problems = 0
    for dtype in FLOATS.values():
        for width, rows in itertools.product(WIDTHS, (1, 5)):
            check_norm(rows, width, dtype, CPU)
            problems += 1
        for shape in HEADS:
            check_rotation(shape, dtype, CPU)
            problems += 1
        for unit, width in itertools.product(UNITS.values(), WIDTHS):
            check_gate(unit, 5, width, dtype, CPU)
            problems += 1
    for settings in SETTINGS.values():
        check_steps(settings, CPU)
        problems += 1
    print(f"{problems} problems")
