"""The participants of a run on the report page: what each client did, or, of very many, how they lie and who is at the ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.report import formats
from fedmoe_ds.report.by_client import Floats
from fedmoe_ds.report.client_tables import HELD
from fedmoe_ds.report.history import TASK_METRICS, Event, History, tier_of
from fedmoe_ds.report.markup import Markup, table, tag
from fedmoe_ds.report.population import MOST_CLIENTS
from fedmoe_ds.report.quantiles import quantile_table
from fedmoe_ds.report.svg import tier_colours, tier_mark

ENDS = 25
"""Clients that are named at either end, where not all are."""
CLIENT_LEAD = (
    "Steps, tokens and time are sums over the rounds a client took part in. First loss is that of its first step ever, "
    "last loss that of its latest step. Click a column to sort."
)
MANY_LEAD = (
    "Steps, tokens and time are sums over the rounds a client took part in. First loss is that of its first step ever, "
    "last loss that of its latest step; own perplexity is by the model of the client's tier, or its own. With {clients} the "
    "page names those at either end; the other {others} are in the run's record (metrics.jsonl, and the tables in clients/ if "
    "there are any). {idle}"
)
SCORED_LEAD = "Its own hold-out is scored by the model of the client's tier or, where clients have some, by its own."
HELD_LEAD = (
    "Experts held are those of a layer, on average, in its latest round; a client without a number held all, or was not "
    "trained in that round."
)
Form = Callable[[float | None], str]
TRAINED: Mapping[str, tuple[str, Form]] = {
    "rounds": ("rounds", formats.count),
    "steps": ("steps", formats.count),
    "tokens": ("tokens", formats.count),
    "loss_first": ("first loss", formats.number),
    "loss_last": ("last loss", formats.number),
    "change": ("change", formats.signed_percent),
    "rescaler": ("rescaler", formats.number),
    HELD: ("experts held", formats.number),
    "seconds": ("train time", formats.duration),
}
"""Figures of `Participation`, what they are called, and how they are written."""
_SUMS = ("rounds", "steps", "tokens", "seconds")


def client_section(history: History) -> Markup:
    """What every client trained over all rounds and how its own loss moved."""
    if not history.trained:
        return tag("p", "No client has finished a round yet.", cls="empty")
    names = history.client_names()
    if len(names) > MOST_CLIENTS:
        return _many(history, len(names))
    described = {client["name"]: client for client in history.holdings}
    # Every known client gets a row, those that were never drawn as well.
    columns = _Table(history)
    body = columns.of(names, described)
    filter_ = tag("input", type="search", placeholder=f"Filter {len(names)} clients", aria_label="Filter clients", cls="filter")
    scored, held = SCORED_LEAD if len(columns.perplexity) else "", HELD_LEAD if columns.masked else ""
    lead = tag("p", " ".join(part for part in (CLIENT_LEAD, scored, held) if part), cls="lead")
    return tag("div", lead, _lost(history), filter_ if len(names) > 15 else None, tag("div", body, cls="scroll"))


def _many(history: History, clients: int) -> Markup:
    """Quantiles of every figure, and the clients at both ends."""
    holdings, columns = history.holdings, _Table(history)
    low, high, by = _ends(history, columns)
    wanted = {*low, *high}
    places = {name: place for place, name in enumerate(holdings.names) if name in wanted}
    described = {name: holdings[place] for name, place in places.items()}
    idle = clients - len(history.trained)
    told = f"{formats.many(idle, 'client')} of them took part in no round yet." if idle else ""
    others = formats.count(clients - len(wanted))
    lead = MANY_LEAD.format(clients=formats.many(clients, "client"), others=others, idle=told)
    ends = tag("div", columns.of([*low, *high], described), cls="scroll")
    title = f"The {len(low)} with the lowest {by} and the {len(high)} with the highest"
    parts = [quantile_table("figure", columns.rows()), tag("h3", title), ends]
    lead = f"{lead} {HELD_LEAD}" if columns.masked else lead
    return tag("div", tag("p", lead, cls="lead"), _lost(history), *(parts if wanted else parts[:1]))


def _ends(history: History, columns: _Table) -> tuple[list[str], list[str], str]:
    """Names at both ends, and of which figure: of the clients' own hold-outs where these are scored, else the last loss."""
    own, trained = history.own_scores, history.trained
    scored = columns.perplexity
    told = bool(np.isfinite(scored).any())
    names, values = (list(own.places), scored) if told else (list(trained.places), trained.figure("loss_last"))
    # By place among equals: the page is the same whenever it is built.
    order = [int(place) for place in np.argsort(values, kind="stable") if np.isfinite(values[place])]
    low = order[: min(ENDS, -(-len(order) // 2))]
    high = order[max(len(low), len(order) - ENDS) :]
    return [names[place] for place in low], [names[place] for place in high], "own perplexity after" if told else "last loss"


def _lost(history: History) -> Markup | None:
    """Names the updates that were left out."""
    lost, count = history.trained.lost, history.trained.lost_count
    if not count:
        return None
    shown = ", ".join(f"{name} (round {round_})" for round_, name in lost)
    more = f" and {count - len(lost)} more" if count > len(lost) else ""
    return tag(
        "p",
        tag("b", f"{formats.many(count, 'client update')} left out (not finite, or out of memory): "),
        shown + more,
        cls="warning",
    )


def _own_tiers(history: History) -> NDArray[np.int64]:
    """The tiers of the clients whose hold-outs are scored, as `OwnScores.ends` takes them."""
    holdings, trained = history.holdings, history.trained
    names, known = holdings.names, set(holdings.names)
    # A record may be cut, and hold no word about a client but what it has trained.
    others = {name: trained.tier(place) for name, place in trained.places.items() if name not in known}
    return history.own_scores.tier_codes([*names, *others], [*holdings.tiers, *others.values()])


class _Table:
    """The columns about clients: what they trained, and how their own hold-outs were scored by their tiers' models."""

    def __init__(self, history: History) -> None:
        self._trained, self._own = history.trained, history.own_scores
        self._colours = tier_colours(history.tiers)
        self._figures = {name: self._trained.figure(name) for name in TRAINED}
        self._shown = [name for name in TRAINED if name != HELD or np.isfinite(self._figures[HELD]).any()]
        scored = ["perplexity", *(name for name in TASK_METRICS if name in self._own.known)] if self._own else []
        own_tiers = _own_tiers(history)
        self._scores: list[tuple[str, Floats, Form]] = []
        for name in scored:
            called, form = ("perplexity", formats.number) if name == "perplexity" else (TASK_METRICS[name], formats.percent)
            before, after = self._own.ends(name, own_tiers)
            self._scores += [(f"{called} before", before, form), ("after", after, form)]

    @property
    def masked(self) -> bool:
        """Whether some client held only some of the experts."""
        return HELD in self._shown

    @property
    def perplexity(self) -> Floats:
        """That of the clients' own hold-outs at last [clients]; of none where these are not scored."""
        return self._scores[1][1] if self._scores else np.full(0, np.nan)

    def rows(self) -> list[tuple[str, Floats, Form]]:
        """Every figure over all clients that have it."""
        trained = [(called, self._figures[name], form) for name, (called, form) in TRAINED.items()]
        befores = [called.removesuffix(" before") for called, _, _ in self._scores[::2]]
        titles = [f"own {name} {when}" for name in befores for when in ("before", "after")]
        found = trained + [(title, values, form) for title, (_, values, form) in zip(titles, self._scores, strict=True)]
        return [row for row in found if np.isfinite(row[1]).any()]

    def of(self, names: Sequence[str], described: Mapping[str, Event]) -> Markup:
        """A row per client."""
        trained = [TRAINED[name][0] for name in self._shown]
        head = ["client", "top-k", *trained, *(called for called, _, _ in self._scores)]
        return table(head, [self._row(name, described.get(name, {})) for name in names], cls="sortable")

    def _row(self, name: str, described: Event) -> list[str]:
        place, own = self._trained.places.get(name), self._own.places.get(name)
        # A record may be cut before a client's tier is known.
        tier, top_k = (tier_of(described), described["top_k"]) if described.get("top_k") else self._last_tier(place, described)
        figures = [
            _figure(_at(self._figures[key], place, 0.0 if key in _SUMS else None), TRAINED[key][1]) for key in self._shown
        ]
        figures += [_figure(_at(values, own), form) for _, values, form in self._scores]
        mark = tier_mark(self._colours.get(tier or "", "t0"), tier)
        return [tag("td", name, cls="name"), tag("td", mark, cls="num", data_v=top_k), *figures]

    def _last_tier(self, place: int | None, described: Event) -> tuple[str | None, float]:
        top_k = None if described else _at(self._trained.figure("top_k"), place)
        return (self._trained.tier(place), top_k) if top_k and place is not None else (None, 0)


def _at(values: Floats, place: int | None, absent: float | None = None) -> float | None:
    if place is None:
        return absent
    value = float(values[place])
    return None if np.isnan(value) else value


def _figure(value: float | None, form: Form) -> Markup:
    # The raw number goes with the cell: report.js sorts by it, not by "12.3 k".
    return tag("td", form(value), cls="num", data_v=None if value is None else f"{value:.9g}")
