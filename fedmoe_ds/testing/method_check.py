"""Method check: what every method must keep, tried on a tiny federation.

* It is what the engine can call: a subclass of `Method` whose functions have the names and parameters of the base.
* It trains, and everything it gives is finite.
* The result is the same, to the bit, with any number of clients in flight, on one rank and on two (two clusters, and one
  cluster with the experts split), and after a stop in the middle of a round, continued on the same topology or another.
"""

from __future__ import annotations

import difflib
import inspect
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedmoe_ds.api.configuration import load_config
from fedmoe_ds.api.result import Result, open_run
from fedmoe_ds.api.running import run, run_here
from fedmoe_ds.api.started import start
from fedmoe_ds.config import Config
from fedmoe_ds.distributed.activity import activity
from fedmoe_ds.distributed.stop_request import StopRequest
from fedmoe_ds.errors import UserError
from fedmoe_ds.methods import Method, MethodInfo
from fedmoe_ds.methods.contradictions import contradictions
from fedmoe_ds.testing.entry_point import announced
from fedmoe_ds.testing.tiny_federation import tiny_federation

_TWO_IN_FLIGHT: dict[str, Any] = {"execution": {"clients_in_flight": 2}}


class MethodError(AssertionError):
    """A method does not keep what every method must; one line says what."""


def check_method(
    method: type[Method],
    parameters: Mapping[str, Any] | None = None,
    changes: Mapping[str, Any] | None = None,
    *,
    ranks: int = 2,
    folder: Path | None = None,
) -> Result:
    """Check a method on a tiny federation, and return its run on one rank: six clients, two rounds.

    A method that plans its rounds gets three of the six drawn: where all take part there is nothing to choose.

    Args:
        method: at the top of a module; its entry point need not be installed.
        parameters: values of its own keys.
        changes: what its configuration needs, `{"adapters": {"router": "train"}}`; nested, over the tiny federation's.
        ranks: 2 also starts two processes (a quarter of a minute); 1 stays in this one (a few seconds).
        folder: an empty or new one for model, data and runs; None: a temporary one, and the result's tensors are gone.
    Raises:
        MethodError: it does not keep what every method must.
        UserError: the federation refuses the method or its parameters.
    """
    check_functions(method)
    if folder is not None and (folder / "runs").exists():
        raise UserError(f"folder: {folder}: holds runs already; give an empty or a new one")
    with announced(method, processes=ranks > 1) as name, tempfile.TemporaryDirectory(prefix="fedmoe-check-") as temporary:
        told = ({"federation": {"participation": 0.5}} if method.overrides("plan") else {}, changes or {})
        tried = _Trial(Path(temporary) if folder is None else folder, {"name": name, **(parameters or {})}, told)
        whole = run(tried.config("whole"))
        check_figures(whole)
        tried.same(whole, run(tried.config("two-in-flight", _TWO_IN_FLIGHT)), "with two clients in flight instead of all")
        tried.stop("stopped")
        if ranks > 1:
            # Both topologies and the resume in one start of two processes: the start is what takes the time.
            tried.copy("stopped", "resumed-elsewhere")
            split = {"topology": {"ep_size": 2}}
            cases = {
                "two-clusters": ({}, "on two ranks, two clusters"),
                "split-experts": (split, "on two ranks that split the experts"),
                "resumed-elsewhere": (split, "stopped in a round on one rank and resumed on two"),
            }
            start([(tried.config(case, change), "auto") for case, (change, _) in cases.items()], ranks=2)
            for case, (_, words) in cases.items():
                tried.same(whole, open_run(tried.folder / "runs" / case), words)
        resumed = run(tried.config("stopped", _TWO_IN_FLIGHT), resume="auto")
        tried.same(whole, resumed, "stopped in a round and resumed")
        whole.metrics()  # read while the folder is there
        return whole


def check_functions(method: type[Method]) -> None:
    """Raise MethodError for what the engine could not call, or never would: a misspelt function is FedAvg in silence."""
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise MethodError(f"{method!r} is no subclass of fedmoe_ds.methods.Method")
    if not isinstance(getattr(method, "info", None), MethodInfo):
        raise MethodError(f"{method.__name__}.info: missing; give a MethodInfo, the method's row in tables")
    hooks = {name: value for name, value in vars(Method).items() if inspect.isfunction(value) and not name.startswith("__")}
    for owner in [each for each in method.__mro__ if issubclass(each, Method) and each is not Method]:
        for name, value in vars(owner).items():
            if not inspect.isfunction(value) or name.startswith("_"):
                continue
            if name in hooks:
                _check_parameters(f"{owner.__name__}.{name}", value, hooks[name])
            elif near := difflib.get_close_matches(name, hooks, n=1, cutoff=0.75):
                raise MethodError(f"{owner.__name__}.{name}: nobody calls it; did you mean `{near[0]}`? Else call it _{name}")
    for line in contradictions(method):
        raise MethodError(f"{method.__name__}.{line}")
    try:
        method.Params(**{"no such key": 1})
    except ValidationError:
        return
    raise MethodError(
        f"{method.__name__}.Params: takes a key that it does not know; subclass MethodParams, keep its model_config"
    )


def _check_parameters(name: str, given: Any, expected: Any) -> None:
    ours, theirs = list(inspect.signature(expected).parameters), inspect.signature(given).parameters
    try:
        inspect.signature(given).bind(*ours)  # the engine gives them in their order
    except TypeError:
        raise MethodError(f"{name}({', '.join(theirs)}): is called with ({', '.join(ours)}); take these") from None


def check_figures(result: Result) -> None:
    """Raise MethodError where a run left a client out, has a figure that is not finite, or has changed nothing."""
    for row in result.metrics("client"):
        if row["status"] != "ok":
            raise MethodError(f"round {row['round']}: the update of {row['client']} was left out: {row['status']}")
        if row["loss_last"] is None:
            raise MethodError(f"round {row['round']}: the training loss of {row['client']} is not finite")
    losses: dict[tuple[str, str, str | None], set[float]] = {}
    for row in result.evaluations:
        where = f"round {row['round']}, tier {row['tier']}, {row['split']} {row['client'] or ''}".rstrip()
        if row["loss"] is None or not math.isfinite(row["loss"]):
            raise MethodError(f"{where}: the loss is not finite")
        losses.setdefault((row["tier"], row["split"], row["client"]), set()).add(row["loss"])
    if all(len(values) == 1 for values in losses.values()):
        raise MethodError("training changed no figure of the evaluation: is anything trained, or averaged?")


class _StopInTraining(StopRequest):
    """Asks for a stop as soon as a wave has been trained."""

    @property
    def requested(self) -> bool:
        if activity.phase == "train":
            self.name = "SIGUSR1"
        return self.name is not None


@dataclass(frozen=True)
class _Trial:
    """Runs of one method in one folder."""

    folder: Path
    method: dict[str, Any]
    changes: Sequence[Mapping[str, Any]]

    def config(self, name: str, change: Mapping[str, Any] | None = None) -> Config:
        own = {"name": name, "method": self.method, "execution": {"reproducible": "bitwise"}}
        return load_config(tiny_federation(self.folder, *self.changes, own, change or {}))

    def stop(self, name: str) -> None:
        """Begin a run that is stopped after its first wave."""
        if run_here(self.config(name, _TWO_IN_FLIGHT), "never", _StopInTraining()) is None:
            raise MethodError("a run that was asked to stop after its first wave went on to its end")

    def copy(self, name: str, target: str) -> None:
        shutil.copytree(self.folder / "runs" / name, self.folder / "runs" / target)

    def same(self, whole: Result, other: Result, words: str) -> None:
        """Raise MethodError unless two runs have ended with the same bits."""
        if whole.digest == other.digest:
            return
        ours, theirs = whole.adapters, other.adapters
        changed = [name for name in ours if name not in theirs or not ours[name].equal(theirs[name])]
        where = f"{len(changed)} of {len(ours)} global adapters differ, {changed[0]} first" if changed else "clients' own do"
        raise MethodError(
            f"{words}, the result has other bits ({where}): what the method computes must not depend on which clients share a "
            "wave, a rank or a start; draw with `generator`, reduce nothing over rows or clients itself"
        )
