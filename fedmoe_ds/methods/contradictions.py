"""Contradictions: a method that says one thing of itself and does another. The engine would go by one of the two in silence."""

from __future__ import annotations

from collections.abc import Iterator

from fedmoe_ds.aggregation.weighing import MEAN
from fedmoe_ds.methods.base import Method


def contradictions(method: Method | type[Method]) -> Iterator[str]:
    """What of a method does not go together, a line each: a name, why, and what to do.

    Of a class as of an object, which may have set its attributes from its parameters.
    """
    if method.overrides("memory") != method.overrides("memorise"):
        yield "memory: names what `memorise` gives the values of; override both or neither"
    if method.overrides("combine") != method.collects:
        yield "combine: is called where collects = True, and only there; set both or neither"
    if method.absorbs and not method.collects:
        yield "absorbs: `combine` moves products into the frozen weights; set collects = True, and override it"
    if method.chooses_rank and not method.absorbs:
        yield "chooses_rank: of products that move into the frozen weights; set absorbs = True, or drop it"
    if method.observes and not method.overrides("observer"):
        yield f"observes: {method.observes}: an observer returns these; override `observer`"
    if method.overrides("sums") and not method.overrides("objective"):
        yield "sums: an objective sums these up; override `objective`"
    if method.overrides("teaches") and not method.overrides("objective"):
        yield "teaches: an objective asks the received model; override `objective`"
    yield from _of_statistics(method)
    if method.accounts and not method.overrides("plan"):
        yield "accounts: its plans say what clients spend; override `plan`"
    if method.ensembles and method.spends != "experts":
        yield f"ensembles: budgets are models, an expert each, and here they buy {method.spends}; set spends to experts"
    for name, asked in (("fuses", method.fuses), ("views", method.views > 1)):
        if asked and not method.ensembles:
            yield f"{name}: of the models that a client trains side by side; set ensembles = True, or drop it"
    yield from _of_weights(method)


def _of_statistics(method: Method | type[Method]) -> Iterator[str]:
    if method.overrides("statistics") != method.overrides("summary"):
        yield "statistics: names what `summary` gives the values of; override both or neither"
    if not method.overrides("statistics"):
        if method.surveys:
            yield "surveys: what is seen then goes into statistics; override `statistics`"
        return
    if method.surveys and not method.overrides("survey"):
        yield "surveys: asks `survey` what is summed up; override it"
    if method.most_delay:
        yield "most_delay: statistics of past rounds are not kept for late clients; set it to 0, or drop `statistics`"
    if method.surveys and (method.unequal_ranks or method.personal_models or method.rescaler or method.ensembles):
        yield "surveys: the global adapters as they are pass over clients' data; drop what clients have of their own"


def _of_weights(method: Method | type[Method]) -> Iterator[str]:
    weighing = method.weighing
    asked = {"tally": bool(weighing.tallies), "weightings": len(weighing.shares) > 1, "element_weights": weighing.elements}
    for hook, needed in asked.items():
        if needed and not method.overrides(hook):
            yield f"weighing: {weighing}: asks for `{hook}`; override it"
    if not method.collects:
        return
    # Of what is collected there is no mean, which these are about.
    for hook in ("after_mean", "server_rate"):
        if method.overrides(hook):
            yield f"{hook}: `combine` makes adapters of clients' factors, and it would not reach them; drop one of the two"
    if weighing != MEAN:
        yield f"weighing: {weighing}: `combine` gets one weight per client and adapter; use the plain one"
    if method.personal_models:
        yield "personal_models: `combine` makes one adapter of clients' factors, of which none stays with its client; drop one"
