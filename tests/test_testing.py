"""`fedmoe_ds.testing`: a sound method passes its check, and every kind of defect is told in one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from torch import Tensor

from fedmoe_ds.errors import UserError
from fedmoe_ds.methods import (
    BlockSpec,
    Client,
    ClientUpdate,
    ClientView,
    Combined,
    FactorPair,
    Method,
    MethodInfo,
    PlanContext,
    RoundPlan,
    Weighing,
    method_names,
)
from fedmoe_ds.methods.registry import GROUP
from fedmoe_ds.testing import MethodError, check_method, tiny_federation
from fedmoe_ds.testing.method_check import check_functions

sys.path.append(str(Path(__file__).parent / "third_party"))

SHORT: dict[str, Any] = {"federation": {"rounds": 1}, "local": {"max_steps": 1}, "evaluation": {"client_sequences": 0}}


class Named(Method):
    info = MethodInfo("Named", "example", "k", "A, B", "A, B", "data size", "all of it")


class Misspelt(Named):
    def weigths(self, spec: BlockSpec, update: ClientUpdate, data_share: float) -> np.ndarray:
        return np.ones(1)


class OldParameters(Named):
    def weights(self, spec: BlockSpec, update: ClientUpdate) -> np.ndarray:  # type: ignore[override]
        return np.ones(1)


class Collects(Named):
    collects = True


class Teaches(Named):
    def teaches(self) -> bool:
        return True


class Observes(Named):
    observes = ("counts",)


class Accounts(Named):
    accounts = True


class Tallies(Named):
    weighing = Weighing(changes=True, tallies=("norm",))


class MeansOfFactors(Named):
    collects = True

    def combine(self, pair: FactorPair, fresh_a_RI: Tensor) -> Combined:
        return Combined(pair.a_RI, pair.b_OR)

    def server_rate(self, round_index: int, participants: Sequence[Client]) -> float:
        return 0.5


class Absorbs(Named):
    absorbs = True


class ChoosesRank(MeansOfFactors):
    chooses_rank = True


class TakesAnything(Named):
    class Params(BaseModel):  # type: ignore[assignment]
        exponent: float = 1.0


class Forgets(Named):
    def memory(self) -> dict[str, tuple[int, ...]]:
        return {"loss": ()}


class Nothing(Named):
    """Multiplies every gradient by zero."""

    def adjust(self, view: ClientView) -> None:
        for spec in view.blocks():
            view.grad(spec).zero_()


class Infinite(Named):
    def adjust(self, view: ClientView) -> None:
        for spec in view.blocks():
            view.grad(spec).fill_(float("inf"))


class PlansFreely(Named):
    """A plan out of what a process remembers: another start trains other clients."""

    planned = 0

    def plan(self, context: PlanContext) -> RoundPlan:
        type(self).planned += 1
        return RoundPlan([context.clients[(self.planned + place) % 6] for place in range(3)])


class DrawsFreely(Named):
    """A draw that has no address: another order of clients gives another result."""

    def adjust(self, view: ClientView) -> None:
        for spec in view.blocks():
            grad = view.grad(spec)
            grad.mul_(torch.rand(()) + 0.5)


FUNCTIONS: list[tuple[Any, str]] = [
    (Misspelt, r"^Misspelt\.weigths: nobody calls it; did you mean `weights`\? Else call it _weigths$"),
    (OldParameters, r"^OldParameters\.weights\(self, spec, update\): is called with \(self, spec, update, data_share\)"),
    (Collects, r"^Collects\.combine: is called where collects = True"),
    (Absorbs, r"^Absorbs\.absorbs: `combine` moves products into the frozen weights; set collects = True"),
    (ChoosesRank, r"^ChoosesRank\.chooses_rank: of products that move into the frozen weights; set absorbs = True"),
    (Teaches, r"^Teaches\.teaches: an objective asks the received model; override `objective`"),
    (Observes, r"^Observes\.observes: \('counts',\): an observer returns these"),
    (Accounts, r"^Accounts\.accounts: its plans say what clients spend; override `plan`$"),
    (Tallies, r"^Tallies\.weighing: Weighing\(.*\): asks for `tally`; override it$"),
    (MeansOfFactors, r"^MeansOfFactors\.server_rate: `combine` makes adapters of clients' factors, and it would not reach"),
    (TakesAnything, r"^TakesAnything\.Params: takes a key that it does not know"),
    (Forgets, r"^Forgets\.memory: names what `memorise` gives the values of; override both or neither"),
    (type("Bare", (Method,), {}), r"^Bare\.info: missing"),
    (dict, r"is no subclass of fedmoe_ds\.methods\.Method"),
]


@pytest.mark.parametrize(("method", "message"), FUNCTIONS)
def test_what_the_engine_could_not_call(method: Any, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        check_functions(method)


def test_ours_are_such_methods() -> None:
    found = [point.load() for point in entry_points(group=GROUP) if point.value.startswith("fedmoe_ds.")]
    assert len(found) >= 13
    for method in found:
        check_functions(method)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Nothing, "^training changed no figure of the evaluation"),
        (Infinite, "^round 1: the update of client-00.* was left out: non-finite"),
        (PlansFreely, r"^with two clients in flight instead of all, the result has other bits"),
        (DrawsFreely, r"^with two clients in flight instead of all, the result has other bits \(\d+ of \d+ global adapters"),
    ],
)
def test_what_a_run_shows(method: type[Method], message: str, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=message):
        check_method(method, changes=SHORT, ranks=1, folder=tmp_path)


def test_a_sound_method_in_this_process(tmp_path: Path) -> None:
    """Its own entry point is used where it has one; a parameter that it refuses is the user's mistake."""
    import tempered

    result = check_method(tempered.Tempered, {"exponent": 0.25}, SHORT, ranks=1, folder=tmp_path)
    assert result.finished and result.config.method.model_dump() == {"name": "method-under-test", "exponent": 0.25}
    assert "method-under-test" not in method_names() and not any("fedmoe-method-" in entry for entry in sys.path)
    with pytest.raises(UserError, match=r"^method\.exponent: 2\.0: Input should be less than or equal to 1"):
        check_method(tempered.Tempered, {"exponent": 2.0}, ranks=1)
    with pytest.raises(UserError, match=r"^folder: .*: holds runs already; give an empty or a new one"):
        check_method(tempered.Tempered, ranks=1, folder=tmp_path)
    tree = tiny_federation(tmp_path, SHORT, {"local": {"max_steps": 2}})
    assert tree["local"]["max_steps"] == 2 and tree["evaluation"]["client_sequences"] == 0


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.sweep)])
def test_one_that_plans_its_rounds(ranks: int, tmp_path: Path) -> None:
    import struggling

    result = check_method(
        struggling.Struggling, {"power": 4.0}, SHORT | {"federation": {"rounds": 2}}, ranks=ranks, folder=tmp_path
    )
    by_round = [{row["client"] for row in result.metrics("client") if row["round"] == index} for index in (1, 2)]
    assert [len(names) for names in by_round] == [3, 3], "three of six, so that there is something to choose"


def test_what_nobody_can_import() -> None:
    class Local(Named):
        pass

    with pytest.raises(UserError, match=r"^method: test_testing:.*Local: is defined in a function"):
        check_method(Local, ranks=1)
    script = type("Script", (Named,), {"__module__": "__main__"})
    with pytest.raises(UserError, match=r"^method: __main__:Script: no other rank can import what a notebook or a script"):
        check_method(script)


SGD = {"local": {"optimizer": "sgd", "lr": 0.05}}
SPECIAL: dict[str, dict[str, Any]] = {
    "cc-fao": {**SGD, "server": {"optimizer": "fedams", "lr": 0.01}},
    "fednova": SGD,
    "q-fedavg": SGD,
    "flood": {"execution": {"micro_batch_size": None}},
    "flex-moe": {"adapters": {"router": "train"}},
    "fl-games": {
        "adapters": {"head": "train"},
        "federation": {"participation": 1.0},
        "local": {"optimizer": "sgd", "lr": 0.05, "clip": None},
    },
    "hfedmoe": {"adapters": {"router": "train"}, "execution": {"micro_batch_size": None}},
}
"""What a method cannot do without."""


OTHERS = {"fft-moe", "mor", "split-mix", "shefl", "raffm", "read-me", "bmsfed", "fedbe"}
"""They run on other models."""


@pytest.mark.sweep
@pytest.mark.parametrize("name", sorted(set(method_names()) - OTHERS))
def test_ours_on_two_ranks(name: str) -> None:
    """All that run on the tiny federation's own model, by their own names."""
    method = next(point.load() for point in entry_points(group=GROUP) if point.name == name)
    assert check_method(method, changes=SPECIAL.get(name)).digest is not None
