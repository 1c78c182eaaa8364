"""The clients of a run on the report page: how the data lie on them, and what each one did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from fedmoe_ds.clients.tiers import tier_order
from fedmoe_ds.data.omissions import MEANING, describe
from fedmoe_ds.report import formats
from fedmoe_ds.report.history import TASK_METRICS, Event, History, tier_of
from fedmoe_ds.report.markup import Markup, choices, join, legend, table, tag
from fedmoe_ds.report.samples import length_table
from fedmoe_ds.report.svg import Column, bar_rows, dense_columns, shown_of, thinned, tier_colours, tier_mark

NAMED_ROWS = 40
MOST_ROUNDS = 2000
LABEL_COLOURS = 8
OK = "ok"
CLIENT_LEAD = (
    "Steps, tokens and time are sums over the rounds a client took part in. First loss is that of its first step ever, "
    "last loss that of its latest step. Click a column to sort."
)

Part = tuple[str, float, str]


def data_section(history: History) -> Markup:
    """Targets per client in the colour of its tier, or samples per label where clients mix several labels."""
    clients = list(history.data.get("clients") or [])
    if not clients:
        return tag("p", "The run has not recorded how its data are dealt yet.", cls="empty")
    colours = tier_colours(history.tiers)
    # The largest tier first, and within it the most data: the shape of both distributions shows.
    order = sorted(range(len(clients)), key=lambda index: (tier_order(tier_of(clients[index])), -_targets(clients[index])))
    bars = _bars(clients, order, colours, _target_bars(clients, colours), "targets")
    views = [("targets", tag("div", _tier_legend(clients, colours), bars))]
    distribution = history.data.get("distribution") or {}
    counts = distribution.get("counts") or []
    # Clients with a single label each say nothing more than their names do.
    if len(counts) == len(clients) and any(sum(1 for n in row if n) > 1 for row in counts):
        labels = _Labels(distribution["labels"], counts)
        samples = tag("div", legend(labels.legend()), _bars(clients, order, colours, labels.samples, "samples"))
        shares = tag("div", legend(labels.legend()), _bars(clients, order, colours, labels.shares, "share of samples"))
        views = [("samples by label", samples), ("label shares", shares), *views]
    lead = tag("p", _spread(clients), cls="lead")
    return tag("div", lead, _omitted(history), choices("what the bars show", views), length_table(history))


def _omitted(history: History) -> Markup | None:
    """The samples that no client has, or not whole; clients by falling number."""
    counted = history.data.get("omissions")
    told = describe(counted) if counted else None
    if not counted or told is None:
        return None
    kinds = sorted(counted["total"])
    order = sorted(counted["clients"].items(), key=lambda item: (-sum(item[1].values()), item[0]))
    rows = [[name, *(formats.count(counts.get(kind, 0)) for kind in kinds)] for name, counts in order]
    rows.append(["all samples", *(formats.count(counted["total"][kind]) for kind in kinds)])
    heads = ["client", *(MEANING[kind] for kind in kinds)]
    per_client = tag("details", tag("summary", "By client"), tag("div", table(heads, rows), cls="scroll"))
    return tag("div", tag("p", f"{told}.", cls="warning"), per_client)


def _spread(clients: Sequence[Event]) -> str:
    targets = sorted(_targets(client) for client in clients)
    total = formats.count(sum(targets))
    middle = formats.count(targets[len(targets) // 2])
    if len(clients) == 1:
        return f"1 client holds all {total} training targets."
    return (
        f"{len(clients)} clients hold {total} training targets; the smallest {formats.count(targets[0])}, "
        f"the middle one {middle}, the largest {formats.count(targets[-1])}. "
        "Clients are grouped by tier, the largest first."
    )


def _tier_legend(clients: Sequence[Event], colours: dict[str, str]) -> Markup:
    present = sorted({tier_of(client) for client in clients}, key=tier_order)
    sizes = [(tier, sum(1 for client in clients if tier_of(client) == tier)) for tier in present]
    return legend((colours[tier], f"top-k {tier}: {formats.many(size, 'client')}") for tier, size in sizes)


def _targets(client: Event) -> int:
    return formats.targets_of(client) or 0


def _target_bars(clients: Sequence[Event], colours: dict[str, str]) -> Callable[[int], list[Part]]:
    def parts(index: int) -> list[Part]:
        client = clients[index]
        facts = f"{formats.count(client.get('samples'))} samples, {formats.count(client.get('sequences'))} sequences"
        tip = f"{client['name']}\ntop-k {tier_of(client)}\n{formats.count(_targets(client))} targets\n{facts}"
        return [(colours[tier_of(client)], float(_targets(client)), tip)]

    return parts


class _Labels:
    """The commonest labels get a colour of their own, the others share one."""

    def __init__(self, names: Sequence[str], counts: Sequence[Sequence[int]]) -> None:
        self._names, self._counts = [str(name) for name in names], counts
        totals = [sum(row[label] for row in counts) for label in range(len(names))]
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
        return self._parts(index, 1.0 / max(1, sum(self._counts[index])))

    def _parts(self, index: int, scale: float) -> list[Part]:
        row = self._counts[index]
        pieces = [(f"l{place}", self._names[label], row[label]) for place, label in enumerate(self._shown)]
        pieces += [("l7", "other labels", sum(row[label] for label in self._rest))] if self._rest else []
        total = max(1, sum(row))
        return [
            (css, scale * n, f"{name}: {formats.count(n)} samples, {formats.percent(n / total)}")
            for css, name, n in pieces
            if n
        ]


def _bars(
    clients: Sequence[Event],
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
    note = tag("p", f"{unit} per client, one column each; the line below shows the tier. Names: point at a column.", cls="note")
    return tag("div", tag("div", axis, tag("div", chart, cls="scroll-x"), cls="dense-frame"), note)


def client_section(history: History) -> Markup:
    """One row per client: what it trained over all rounds and how its own loss moved."""
    names = history.client_names()
    if not history.clients:
        return tag("p", "No client has finished a round yet.", cls="empty")
    colours = tier_colours(history.tiers)
    described = {client["name"]: client for client in history.data.get("clients") or []}
    # Every known client gets a row, those that were never drawn as well.
    reports: dict[str, list[Event]] = {name: [] for name in names}
    for _, report in sorted(history.clients.items()):
        reports[report["client"]].append(report)
    scored = any(split == "client" for _, split, _, _ in history.evaluations)
    head = [
        "client",
        "top-k",
        "rounds",
        "steps",
        "tokens",
        "first loss",
        "last loss",
        "change",
        "rescaler",
        "train time",
    ]
    rows = [_client_row(name, described.get(name, {}), reports[name], colours) for name in names]
    if scored:
        own = _own_evaluations(history)
        tasks = [name for name in TASK_METRICS if any(name in event for events in own.values() for event in events)]
        head += ["perplexity before", "after", *(text for name in tasks for text in (f"{TASK_METRICS[name]} before", "after"))]
        rows = [[*row, *_before_after(own.get(name, []), tasks)] for row, name in zip(rows, names, strict=True)]
    body = table(head, rows, cls="sortable")
    filter_ = tag("input", type="search", placeholder=f"Filter {len(names)} clients", aria_label="Filter clients", cls="filter")
    lead = tag("p", CLIENT_LEAD, cls="lead")
    return tag("div", lead, _lost(history), filter_ if len(names) > 15 else None, tag("div", body, cls="scroll"))


def _lost(history: History) -> Markup | None:
    """Names the updates that were left out."""
    lost = [(round_, name) for (round_, name), report in sorted(history.clients.items()) if report.get("status", OK) != OK]
    if not lost:
        return None
    shown = ", ".join(f"{name} (round {round_})" for round_, name in lost[:20])
    more = f" and {len(lost) - 20} more" if len(lost) > 20 else ""
    return tag(
        "p",
        tag("b", f"{formats.many(len(lost), 'client update')} left out (not finite, or out of memory): "),
        shown + more,
        cls="warning",
    )


def _client_row(name: str, described: Event, reports: Sequence[Event], colours: dict[str, str]) -> list[str]:
    known = described or (reports[-1] if reports else {})
    # A record may be cut before a client's tier is known.
    tier, top_k = (tier_of(known), known["top_k"]) if known.get("top_k") else (None, 0)
    first = reports[0].get("loss_first") if reports else None
    last = reports[-1].get("loss_last") if reports else None
    change = last / first - 1 if first and last is not None else None
    figures = [
        _figure(float(len(reports)), formats.count),
        _figure(_total(reports, "steps"), formats.count),
        _figure(_total(reports, "tokens"), formats.count),
        _figure(first, formats.number),
        _figure(last, formats.number),
        _figure(change, formats.signed_percent),
        _figure(reports[-1].get("rescaler") if reports else None, formats.number),
        _figure(_total(reports, "seconds"), formats.duration),
    ]
    mark = tier_mark(colours.get(tier or "", "t0"), tier)
    return [tag("td", name, cls="name"), tag("td", mark, cls="num", data_v=top_k), *figures]


def _figure(value: float | None, form: Callable[[float | None], str]) -> Markup:
    # The raw number goes with the cell: report.js sorts by it, not by "12.3 k".
    return tag("td", form(value), cls="num", data_v=None if value is None else f"{value:.9g}")


def _total(reports: Iterable[Event], field: str) -> float:
    return float(sum(report.get(field) or 0 for report in reports))


def _own_evaluations(history: History) -> dict[str, list[Event]]:
    """Per client its own evaluations, in order of rounds."""
    own: dict[str, list[Event]] = {}
    for (_, split, _, client), event in sorted(history.evaluations.items()):
        if split == "client":
            own.setdefault(client, []).append(event)
    return own


def _before_after(evaluations: Sequence[Event], tasks: Sequence[str]) -> list[Markup]:
    ends = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
    cells = [_figure(event.get("perplexity"), formats.number) for event in ends]
    return cells + [_figure(event.get(name), formats.percent) for name in tasks for event in ends]


def rounds_table(history: History) -> Markup:
    """Rounds in figures, collapsed."""
    rounds = sorted(history.rounds.items())
    head = ["round", "participants", "dropped", "waves", "tokens", "tokens/s", "time", "weight entropy"]
    rows = [
        [
            str(number),
            formats.count(event.get("participants")),
            formats.count(event.get("dropped")),
            formats.count(event.get("waves")),
            formats.count(event.get("tokens")),
            formats.count(event.get("tokens_per_s")),
            formats.duration(event.get("seconds")),
            formats.number(event.get("weight_entropy")),
        ]
        for number, event in thinned(rounds, MOST_ROUNDS)
    ]
    body = tag("div", table(head, rows), cls="scroll")
    return tag("details", tag("summary", f"Every round in figures{shown_of(len(rounds), 'round', MOST_ROUNDS)}"), join([body]))
