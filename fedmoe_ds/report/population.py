"""The clients of a run on the report page: how the data lie on them, and what each one did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from fedmoe_ds.clients.tiers import tier_order
from fedmoe_ds.data.omissions import MEANING, describe
from fedmoe_ds.report import formats
from fedmoe_ds.report.history import Event, History, tier_of
from fedmoe_ds.report.holdings import Holdings
from fedmoe_ds.report.markup import Markup, choices, legend, table, tag
from fedmoe_ds.report.quantiles import quantile_table
from fedmoe_ds.report.samples import length_table
from fedmoe_ds.report.svg import Column, bar_rows, dense_columns, thinned, tier_colours, tier_mark

NAMED_ROWS = 40
MOST_CLIENTS = 500
"""Of more, a picture shows evenly spaced ones, and tables show quantiles and the ends."""
MOST_OMISSIONS = 100
LABEL_COLOURS = 8

Part = tuple[str, float, str]


def data_section(history: History) -> Markup:
    """Targets per client in the colour of its tier, or samples per label where clients mix several labels."""
    clients = history.holdings
    if not len(clients):
        return tag("p", "The run has not recorded how its data are dealt yet.", cls="empty")
    colours, tiers, targets = tier_colours(history.tiers), clients.tiers, clients.targets
    ranks = {tier: tier_order(tier) for tier in set(tiers)}
    # The largest tier first, and within it the most data: the shape of both distributions shows.
    order = _shown(sorted(range(len(clients)), key=lambda index: (ranks[tiers[index]], -targets[index])), tiers)
    bars = _bars(clients, order, colours, _target_bars(clients, colours), "targets")
    views = [("targets", tag("div", _tier_legend(tiers, colours), bars))]
    # Clients with a single label each say nothing more than their names do.
    if clients.mix_labels:
        labels = _Labels(clients)
        samples = tag("div", legend(labels.legend()), _bars(clients, order, colours, labels.samples, "samples"))
        shares = tag("div", legend(labels.legend()), _bars(clients, order, colours, labels.shares, "share of samples"))
        views = [("samples by label", samples), ("label shares", shares), *views]
    lead = tag("p", _spread(targets), cls="lead")
    parts = [choices("what the bars show", views), _sizes(tiers, targets, colours), length_table(history)]
    return tag("div", lead, _omitted(clients), *parts)


def _shown(order: list[int], tiers: Sequence[str]) -> list[int]:
    """At most about `MOST_CLIENTS` of them: of every tier evenly spaced ones, which are its quantiles, both ends included."""
    if len(order) <= MOST_CLIENTS:
        return order
    groups: dict[str, list[int]] = {}
    for index in order:
        groups.setdefault(tiers[index], []).append(index)
    return [i for group in groups.values() for i in thinned(group, max(2, round(MOST_CLIENTS * len(group) / len(order))))]


def _sizes(tiers: Sequence[str], targets: Sequence[int], colours: dict[str, str]) -> Markup | None:
    """Quantiles of the targets per client, where a picture cannot show all of them."""
    if len(targets) <= MOST_CLIENTS:
        return None
    values, labels = np.array(targets, dtype=np.float64), np.array(tiers)
    rows = [
        (tag("td", tier_mark(colours[tier], tier)), values[labels == tier], formats.count)
        for tier in sorted(set(tiers), key=tier_order)
    ]
    return tag("div", tag("h3", "Targets per client"), quantile_table("tier", rows))


def _omitted(clients: Holdings) -> Markup | None:
    """The samples that no client has, or not whole; clients by falling number."""
    counted = clients.omissions
    told = describe(counted) if counted else None
    if not counted or told is None:
        return None
    kinds = sorted(counted["total"])
    order = sorted(counted["clients"].items(), key=lambda item: (-sum(item[1].values()), item[0]))
    most = len(order) if len(order) <= MOST_CLIENTS else MOST_OMISSIONS
    rows = [[name, *(formats.count(counts.get(kind, 0)) for kind in kinds)] for name, counts in order[:most]]
    if len(order) > most:
        left = [sum(counts.get(kind, 0) for _, counts in order[most:]) for kind in kinds]
        rows.append([f"{formats.many(len(order) - most, 'other client')}", *map(formats.count, left)])
    rows.append(["all samples", *(formats.count(counted["total"][kind]) for kind in kinds)])
    heads = ["client", *(MEANING[kind] for kind in kinds)]
    per_client = tag("details", tag("summary", "By client"), tag("div", table(heads, rows), cls="scroll"))
    return tag("div", tag("p", f"{told}.", cls="warning"), per_client)


def _spread(unordered: Sequence[int]) -> str:
    targets = sorted(unordered)
    total = formats.count(sum(targets))
    middle = formats.count(targets[len(targets) // 2])
    if len(targets) == 1:
        return f"1 client holds all {total} training targets."
    return (
        f"{len(targets)} clients hold {total} training targets; the smallest {formats.count(targets[0])}, "
        f"the middle one {middle}, the largest {formats.count(targets[-1])}. "
        "Clients are grouped by tier, the largest first."
    )


def _tier_legend(tiers: Sequence[str], colours: dict[str, str]) -> Markup:
    sizes = sorted(Counter(tiers).items(), key=lambda size: tier_order(size[0]))
    return legend((colours[tier], f"top-k {tier}: {formats.many(size, 'client')}") for tier, size in sizes)


def _targets(client: Event) -> int:
    return formats.targets_of(client) or 0


def _target_bars(clients: Holdings, colours: dict[str, str]) -> Callable[[int], list[Part]]:
    def parts(index: int) -> list[Part]:
        client = clients[index]
        facts = f"{formats.count(client.get('samples'))} samples, {formats.count(client.get('sequences'))} sequences"
        tip = f"{client['name']}\ntop-k {tier_of(client)}\n{formats.count(_targets(client))} targets\n{facts}"
        return [(colours[tier_of(client)], float(_targets(client)), tip)]

    return parts


class _Labels:
    """The commonest labels get a colour of their own, the others share one."""

    def __init__(self, clients: Holdings) -> None:
        self._names, self._clients = clients.labels, clients
        names = self._names
        totals = clients.label_totals
        order = sorted(range(len(names)), key=lambda label: -totals[label])
        # The last colour is kept for "other labels" where there are any.
        own = LABEL_COLOURS if len(names) <= LABEL_COLOURS else LABEL_COLOURS - 1
        # Chosen by size, shown in the data's order: colours stay put between two views.
        self._shown, self._rest = sorted(order[:own]), order[own:]

    def legend(self) -> list[tuple[str, str]]:
        keys = [(f"l{place}", self._names[label]) for place, label in enumerate(self._shown)]
        return [*keys, ("l7", f"{len(self._rest)} other labels")] if self._rest else keys

    def samples(self, index: int) -> list[Part]:
        return self._parts(index, 1.0)

    def shares(self, index: int) -> list[Part]:
        return self._parts(index, 1.0 / max(1, sum(self._clients.counts_of(index))))

    def _parts(self, index: int, scale: float) -> list[Part]:
        row = self._clients.counts_of(index)
        pieces = [(f"l{place}", self._names[label], row[label]) for place, label in enumerate(self._shown)]
        pieces += [("l7", "other labels", sum(row[label] for label in self._rest))] if self._rest else []
        total = max(1, sum(row))
        return [
            (css, scale * n, f"{name}: {formats.count(n)} samples, {formats.percent(n / total)}")
            for css, name, n in pieces
            if n
        ]


def _bars(
    clients: Holdings,
    order: Sequence[int],
    colours: dict[str, str],
    parts: Callable[[int], list[Part]],
    unit: str,
) -> Markup:
    """Named rows for a few clients, one dense chart for many."""

    def column(index: int) -> Column:
        client = clients[index]
        head = f"{client['name']}\ntop-k {tier_of(client)}"
        return Column(
            head,
            # Tips of targets begin with the client's name already.
            [(css, size, tip if tip.startswith(client["name"]) else f"{head}\n{tip}") for css, size, tip in parts(index)],
        )

    columns = [column(index) for index in order]
    shares = unit.startswith("share")
    if len(clients) <= NAMED_ROWS:
        rows = []
        for index, bar in zip(order, columns, strict=True):
            client = clients[index]
            # Bars of shares are all equally long, so the figure tells the size.
            figure = formats.count(client.get("samples")) if shares else formats.count(bar.total)
            rows.append((client["name"], tier_mark(colours[tier_of(client)], tier_of(client)), bar, figure))
        return tag(
            "div",
            bar_rows(rows),
            tag("p", f"{unit} per client{'; the figure is the number of samples' if shares else ''}", cls="note"),
        )
    high = "100 %" if shares else formats.count(max((bar.total for bar in columns), default=0.0))
    chart = dense_columns(columns, [colours[tier_of(clients[index])] for index in order])
    axis = tag("div", tag("span", high), tag("span", "0"), cls="dense-axis", aria_hidden="true")
    some = f" ({formats.count(len(order))} of {formats.many(len(clients), 'client')}, evenly spaced within every tier)"
    of_all = some if len(order) < len(clients) else ""
    note = tag(
        "p", f"{unit} per client{of_all}, one column each; the line below shows the tier. Names: point at a column.", cls="note"
    )
    return tag("div", tag("div", axis, tag("div", chart, cls="scroll-x"), cls="dense-frame"), note)
