"""`launch/bench.py kernels`: products of row groups with frozen weights, by every processor class that is at hand and by torch.

Legend: N rows, G groups, D width of rows and results (weights are square).

Torch is given what suits it: rows of the weights' type, and the faster one of its batched and its grouped product. Our rows and
results are float32, which for bfloat16 weights is twice the memory. All allocate their results. Times are those of the
processor, one thread, kernels in turn.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from fedmoe_ds.bench.harness.checks import check_known, check_least, check_seed
from fedmoe_ds.bench.harness.command import SEED, Command, Note, option
from fedmoe_ds.bench.harness.repeats import make_row, paired, shown
from fedmoe_ds.bench.harness.table import Column, Row, two_digits, whole
from fedmoe_ds.errors import UserError
from fedmoe_ds.kernels import matrix
from fedmoe_ds.kernels.processor_class import CLASSES, classes_here
from fedmoe_ds.machine import available_mib

TORCH = "torch"
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_WIDTH_STEP = 8
"""Of bfloat16 that is 16 bytes, which F.grouped_mm asks of rows."""
COLUMNS: list[Column] = [
    ("weights", lambda row: row["dtype"]),
    ("experts", lambda row: str(row["groups"])),
    ("width", lambda row: str(row["width"])),
    ("rows each", lambda row: str(row["rows"])),
    ("product", lambda row: row["product"]),
    ("kernel", lambda row: row["system"]),
    ("GFLOP/s", lambda row: shown(row, "gflops", whole)),
    ("rate / torch's", lambda row: shown(row, "of_torch", two_digits)),
]
OPTIONS = (
    option("--dtype", ["float32", "bfloat16"], "of the weights"),
    option("--experts", [64, 16], "how many weights; with --width, in pairs"),
    option("--width", [512, 2048], "of rows and results"),
    option("--rows", [16, 64, 256], "of every expert"),
    option("--processors", None, "processor classes (default: all that are at hand)", nargs="+"),
    option("--rounds", 5, "turns"),
    SEED,
)
ABOUT = (
    "Products of groups of rows with the frozen weights of experts, forward (x W^T) and backward (dy W), one thread. Torch's "
    "is the faster one of its batched and its grouped product, with rows of the weights' type; our rows are float32."
)


def run(args: argparse.Namespace, note: Note) -> list[Row]:
    """Raises UserError before anything is measured: for a class that is not at hand, lists that do not match, sizes that are
    none."""
    for name in ("experts", "width", "rows", "rounds"):
        check_least(f"--{name}", getattr(args, name))
    check_seed(args.seed)
    check_known("--dtype", "type", args.dtype, TYPES)
    for width in args.width:
        if width % _WIDTH_STEP:
            raise UserError(f"--width: {width}: torch's product takes rows of whole 16 bytes; use a multiple of {_WIDTH_STEP}")
    if len(args.experts) != len(args.width):
        raise UserError(f"--experts, --width: {len(args.experts)} and {len(args.width)} values; give pairs")
    _check_memory(args)
    kernels = _kernels(args.processors, note)
    torch.set_num_threads(1)
    rows: list[Row] = []
    for dtype in args.dtype:
        for groups, width in zip(args.experts, args.width, strict=True):
            draw = torch.Generator().manual_seed(args.seed)
            weight_GDD = torch.randn(groups, width, width, generator=draw).to(TYPES[dtype])
            for count in args.rows:
                note(f"{dtype}, {groups} experts of {width} x {width}, {count} rows each")
                x_ND = torch.randn(groups * count, width, generator=draw)
                for transposed in (True, False):
                    rows += _measure(kernels, x_ND, weight_GDD, transposed, args.rounds)
    return rows


def _check_memory(args: argparse.Namespace) -> None:
    for experts, width in zip(args.experts, args.width, strict=True):
        # In float32 and in the type asked for; rows, and results of two kernels at a time.
        needed = 8 * experts * width * (width + 2 * max(args.rows)) / 2**20
        if needed > available_mib():
            raise UserError(
                f"--experts, --width, --rows: {experts}, {width}, {max(args.rows)}: need {needed:.0f} MiB, and "
                f"{available_mib():.0f} are left; use less"
            )


def _kernels(names: list[str] | None, note: Note) -> list[matrix.Kernel]:
    # The last class is any processor's: it says nothing where a better one is at hand.
    wanted = names or [one.name for one in CLASSES[:-1]] + [one.name for one in classes_here()[-1:] if len(classes_here()) == 1]
    found = {name: matrix.kernel_of(name) for name in wanted}
    missing = [name for name, kernel in found.items() if kernel is None]
    if missing and (names or len(missing) == len(found)):
        known = ", ".join(one.name for one in CLASSES)
        raise UserError(f"--processors: {', '.join(missing)}: cannot be had on this machine; classes are {known}")
    for name in missing:
        note(f"{name}: left out, cannot be had on this machine")
    return [kernel for kernel in found.values() if kernel is not None]


def _measure(
    kernels: list[matrix.Kernel], x_ND: torch.Tensor, weight_GDD: torch.Tensor, transposed: bool, rounds: int
) -> list[Row]:
    """One row per kernel, torch's last."""
    groups, width = weight_GDD.shape[:2]
    each = x_ND.shape[0] // groups
    ends_G = torch.arange(1, groups + 1, dtype=torch.int32) * each
    given_ND, right_GDD = x_ND.to(weight_GDD.dtype), weight_GDD.transpose(1, 2) if transposed else weight_GDD

    def ours(kernel: matrix.Kernel) -> Callable[[], object]:
        return lambda: matrix.grouped_product(x_ND, weight_GDD, ends_G, transposed, kernel)

    actions = [*map(ours, kernels)]
    actions.append(lambda: torch.bmm(given_ND.view(groups, each, width), right_GDD))
    actions.append(lambda: F.grouped_mm(given_ND, right_GDD, offs=ends_G))
    turns = [[_seconds(action) for action in actions] for _ in range(rounds + 1)][1:]  # the first one touches fresh memory
    *mine, batched, grouped = ([turn[place] for turn in turns] for place in range(len(actions)))
    theirs = [min(pair) for pair in zip(batched, grouped, strict=True)]
    facts = {"dtype": str(weight_GDD.dtype).removeprefix("torch."), "groups": groups, "width": width, "rows": each}
    work = 2.0e-9 * x_ND.shape[0] * width * width
    return [
        make_row("products", name, None, {"gflops": [work / s for s in spent], "of_torch": paired(theirs, spent)},
                 product="x W^T" if transposed else "dy W", **facts)
        for name, spent in zip([*(kernel.processor for kernel in kernels), TORCH], [*mine, theirs], strict=True)
    ]  # fmt: skip


def _seconds(action: Callable[[], object]) -> float:
    # Of this thread: what else the machine does counts less than on the clock.
    began = time.thread_time()
    action()
    return time.thread_time() - began


HELP = "products with frozen weights by every processor class at hand, against torch's"
COMMAND = Command("kernels", HELP, OPTIONS, run, COLUMNS, words=("weights", "product", "kernel"), about=ABOUT)
