"""Processor classes: sets of instructions for which kernels are compiled apart, chosen when a process starts.

A class is compiled with its own instructions and no others, also on a processor that has more. A kernel of a class so has the
same code wherever it runs, and every class that a processor has can be asked for (tests and benchmarks do).
"""

from __future__ import annotations

from dataclasses import dataclass

from fedmoe_ds.kernels.compiling import NATIVE, processor

_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_PAIRS = (*_AVX512, "-mavx512bf16")


@dataclass(frozen=True)
class ProcessorClass:
    """Attributes:
    name: as the start line says it.
    needs: flags of /proc/cpuinfo.
    instructions: flags of the compiler.
    """

    name: str
    needs: frozenset[str]
    instructions: tuple[str, ...]


def _class(name: str, instructions: tuple[str, ...], *needs: str) -> ProcessorClass:
    return ProcessorClass(name, frozenset(needs), instructions)


_WIDE = ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl")
CLASSES = (
    _class("AMX-BF16", (*_PAIRS, "-mamx-tile", "-mamx-bf16"), *_WIDE, "avx512_bf16", "amx_tile", "amx_bf16"),
    _class("AVX512-BF16", _PAIRS, *_WIDE, "avx512_bf16"),
    _class("AVX512", _AVX512, *_WIDE),
    _class("AVX2", _AVX2, "avx2", "fma"),
    _class("native", NATIVE),
)
"""The best first; the last one is any processor, with what its compiler makes of it."""


def classes_here() -> list[ProcessorClass]:
    """Those whose instructions this processor has, the best first. The system may still refuse their registers."""
    flags = {flag for line in processor().decode().splitlines() for flag in line.partition(":")[2].split()}
    return [one for one in CLASSES if one.needs <= flags]
