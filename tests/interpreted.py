"""Triton's interpreter as a program of its own: `TRITON_INTERPRET=1 python interpreted.py` checks Triton's kernels on a CPU.

The interpreter is chosen when a kernel is decorated, so the process that compiles kernels cannot interpret them as well.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy
import torch
import triton.language as tl
from test_grouped_triton import check_grouped
from test_lora_products import CPU, ROWS_G
from test_lora_triton import check_products
from triton.runtime import interpreter

RANKS = (1, 3, 8, 17, 64)
WIDTHS = (7, 100)
BOTH = ((7, 100), (100, 7), (130, 72))


def multiply_bfloat16() -> None:
    """The interpreter keeps bfloat16 as integers and would multiply those: give `tl.dot` the numbers they stand for."""
    original = interpreter.InterpreterBuilder.create_dot

    def numbers(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = operand.data.astype(numpy.uint32) << 16
        return interpreter.TensorHandle(bits.view(numpy.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, numbers(a), numbers(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


if __name__ == "__main__":
    multiply_bfloat16()
    for rank, width, dtype in itertools.product(RANKS, WIDTHS, (torch.float32, torch.bfloat16)):
        check_products(width, rank, dtype, CPU)
    print(f"{len(RANKS) * len(WIDTHS) * 2} problems of {len(ROWS_G)} groups")
    halves = torch.bfloat16
    kinds = [(torch.float32, torch.float32), (halves, halves), (halves, torch.float32)]
    for widths, kind in itertools.product(BOTH, kinds):
        check_grouped(*widths, *kind, CPU)
    print(f"{len(BOTH) * len(kinds)} problems of grouped products")
