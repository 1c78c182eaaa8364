"""Written: what a format is asked to write, and what it says of the result.

A format is one function `write(Request) -> Written`. Its files go into a draft folder that appears under its name when all of
them are there (`command.py`), which also has the card.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation.pre_gate import PreGateShape
from fedmoe_ds.model.adapter_bank import ROUTER_BIAS
from fedmoe_ds.results import Selection, TrainedRun


@dataclass(frozen=True)
class Request:
    """One of a run's models, to be written.

    Attributes:
        out: an empty folder.
        base: what the base model is called in files that others read: a hub id, or the name of its folder.
        dtype: of the tensors, `float32`, `bfloat16` or `float16`; None: as the format has it.
    """

    run: TrainedRun
    selection: Selection
    out: Path
    base: str
    dtype: str | None = None

    @property
    def top_k(self) -> int:
        """Active experts per token of the model."""
        return self.selection.assignment.cap

    @property
    def full_top_k(self) -> int:
        """Active experts per token that the base model's configuration has."""
        return self.run.spec.expert_layout.top_k


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        library: Hugging Face's name of the library that loads it.
        said: a few words for the result line: sizes, and what a server has to be told.
        loading: Markdown for the card: how it is loaded.
        notes: lines for the user, for instance what does not fit into the format.
    """

    library: Literal["peft", "transformers"]
    said: str
    loading: str
    notes: tuple[str, ...] = ()


def without_common_model(run: TrainedRun) -> bool:
    """Whether clients have models of their own and nothing else: each has blocks of which nobody has the mean.

    Where they differ by the experts that they use alone (FedMoE), the adapters of all experts are a model, too.
    """
    return run.spec.method.personal_models and any(block.personal for block in run.spec.blocks)


def no_masks(selection: Selection, method: str, holder: str) -> str | None:
    """Why a model that may use some of the experts alone, or an ensemble of such models, is not written, and the way out;
    `holder` cannot say that. None: it uses all of them."""
    own, assignment = selection.client is not None, selection.assignment
    whose = "its client" if own else f"tier {selection.tier}"
    if assignment.members_MLE is not None:
        what = f"{assignment.models} model{'s' * (assignment.models > 1)}, each with experts of its own"
        other = "`fedmoe evaluate` and `fedmoe generate` run it as it is"
        return f"method {method} gives {whose} the mean of the logits of {what}, and {holder} can say that; {other}"
    if assignment.allowed_LE is None:
        return None
    other = "`fedmoe evaluate --client` and `fedmoe generate --client` run it as it is" if own else "export another tier"
    return f"method {method} lets {whose} use some of the experts alone, and {holder} can say that; {other}"


def check_router_bias(run: TrainedRun, where: str) -> None:
    """Raise UserError where routers have a bias, for which neither adapter formats nor transformers' models have a place."""
    if any(block.name == ROUTER_BIAS for block in run.spec.blocks):
        raise UserError(
            f"{where}: method {run.config.method.name} moves the choice of experts by a bias, which no file of this format can "
            "say; `fedmoe evaluate` and `fedmoe generate` run it as it is"
        )


def check_pre_gate(run: TrainedRun, where: str) -> None:
    """Raise UserError where the router runs before the layers: transformers' models have theirs in them."""
    if PreGateShape.of(run.outline.model.config) is not None:
        raise UserError(
            f"{where}: the foundation's router decides before its layers (foundation.convert.kind=read-me), which no file of "
            "this format can say; `fedmoe evaluate` and `fedmoe generate` run it as it is"
        )


def folder_size(folder: Path) -> str:
    """Size of the files in a folder, in words."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    unit, name = next((unit, name) for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")) if size >= unit)
    return f"{size / unit:.1f} {name}"
