"""The sections of the report page about the run as a whole: results, convergence, time, topology, configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedmoe_ds.report import formats
from fedmoe_ds.report.history import TASK_METRICS, Event, History, TierResult, tier_results
from fedmoe_ds.report.markup import Markup, choices, join, legend, table, tag
from fedmoe_ds.report.svg import Column, Series, line_chart, shown_of, stacked_columns, thinned, tier_colours, tier_mark
from fedmoe_ds.report.tasks import HOLD_OUT, across_table, task_table

TIME_UNITS = (("h", 3600.0), ("min", 60.0), ("s", 1.0))
MOST_ROUNDS = 2000
PHASES = ("schedule", "train", "aggregate", "evaluate", "checkpoint")


def results_section(history: History) -> Markup:
    """Foundation against the last evaluated round, per tier and hold-out."""
    results = tier_results(history.evaluations.values())
    if not results:
        return tag("p", "Nothing has been evaluated yet.", cls="empty")
    colours = tier_colours(history.tiers)
    head = [
        "hold-out",
        "tier",
        "perplexity before",
        "after",
        "ratio",
        "",
        "accuracy before",
        "after",
        "change",
        "targets",
    ]
    rows = [_result_row(result, colours[result.tier]) for result in results]
    last = max(result.after.get("round", 0) for result in results)
    after = f"after is the global model of round {last}. A ratio below 1 is better." if last else "no round is evaluated yet."
    lead = f"Before is {history.before}, {after}"
    lead += " In brackets: the 95 % interval of the accuracy for its number of targets, taken as independent."
    if any(" " in result.tier for result in results):
        lead += " Tiers of one top-k differ in what else they buy: r is the LoRA rank, e the experts trained per batch."
    body = tag("div", table(head, rows, text_columns=2), cls="scroll")
    return tag("div", tag("p", lead, cls="lead"), body, task_table(history), across_table(history))


def _result_row(result: TierResult, css: str) -> list[str]:
    ratio = result.ratio
    bar = (
        tag("span", tag("i", cls=f"bar {css}", style=f"width:{100 * min(1.0, ratio):.1f}%"), cls="ratio")
        if ratio is not None
        else ""
    )
    return [
        HOLD_OUT[result.split],
        tag("td", tier_mark(css, result.tier)),
        formats.score(result.before, "perplexity", formats.number),
        formats.score(result.after, "perplexity", formats.number),
        formats.number(ratio),
        tag("td", bar),
        formats.accuracy(result.before),
        formats.accuracy(result.after),
        formats.points(result.gain, result.digits),
        formats.count(formats.targets_of(result.after)),
    ]


def convergence_section(history: History) -> Markup:
    """Perplexity (logarithmic) and accuracy over rounds, one line per tier, a panel per hold-out."""
    splits = [split for split in HOLD_OUT if any(key[1] == split for key in history.evaluations)]
    if not splits:
        return tag("p", "Nothing has been evaluated yet.", cls="empty")
    lead = tag(
        "p",
        f"Round 0 is {history.before} before any client has trained. Each line is the global model at one budget tier or, "
        "where clients have models of their own, all of a tier's.",
        cls="lead",
    )
    return tag("div", lead, choices("hold-out", [(HOLD_OUT[split], _curves(history, split)) for split in splits]))


def _curves(history: History, split: str) -> Markup:
    colours = tier_colours(history.tiers)

    def lines(metric: str, form: Callable[[Event], str]) -> list[Series]:
        found = []
        for tier in history.tiers:
            points = history.curve(split, tier, metric)
            rows = [history.evaluations[x, split, tier] for x, _ in points]
            tips = [f"round {row['round']}\ntop-k {tier}\n{metric} {form(row)}" for row in rows]
            if points:
                found.append(Series(colours[tier], f"k={tier}", points, tips))
        return found

    perplexity = line_chart(
        lines("perplexity", lambda row: formats.score(row, "perplexity", formats.number)),
        title="Perplexity (log scale, lower is better)", x_label="round", form=tick, log=True,
    )  # fmt: skip
    accuracy = line_chart(
        lines("accuracy", formats.accuracy),
        title="Next-token accuracy, % (higher is better)", x_label="round", form=lambda y: tick(100 * y), most=1.0,
    )  # fmt: skip
    return tag("div", tag("figure", perplexity), tag("figure", accuracy), *_task_curves(history, lines), cls="pair")


def _task_curves(history: History, lines: Callable[[str, Callable[[Event], str]], list[Series]]) -> list[Markup]:
    """A figure for every task metric that the run has."""
    found = []
    known = history.own_scores.known.union(*history.evaluations.values())
    for name in (name for name in TASK_METRICS if name in known):
        series = lines(name, lambda row, name=name: formats.counted_share(row, name, row.get("samples")))  # type: ignore[misc]
        title = f"{TASK_METRICS[name].capitalize()}, % of samples (higher is better)"
        chart = line_chart(series, title=title, x_label="round", form=lambda y: tick(100 * y), most=1.0)
        found.append(tag("figure", chart))
    return found


def tick(value: float) -> str:
    """A value beside an axis."""
    return f"{value:,.6g}".replace(",", formats.NARROW_SPACE)


def time_section(history: History) -> Markup:
    """Seconds per round by phase, tokens per second, and the total of each phase."""
    rounds = sorted(history.rounds.items())
    if not rounds:
        return tag("p", "No round has finished yet.", cls="empty")
    named = {phase for _, event in rounds for phase in event.get("phases") or {}}
    # Known phases in the order of a round; a phase of another version comes after them.
    phases = [*(phase for phase in PHASES if phase in named), *sorted(named - set(PHASES))]
    # By place in the full list: a phase keeps its colour where another one is absent.
    colours = {phase: f"p{min(index, 7)}" for index, phase in enumerate([*PHASES, *sorted(named - set(PHASES))])}
    longest = max(sum(spent or 0.0 for spent in (event.get("phases") or {}).values()) for _, event in rounds)
    # The largest unit in which the longest round is more than 3: small numbers without many zeros.
    unit, scale = next(((unit, scale) for unit, scale in TIME_UNITS if longest > 3 * scale), TIME_UNITS[-1])
    columns = [(number, Column(str(number), _phase_parts(number, event, phases, colours, scale))) for number, event in rounds]
    totals = {phase: sum((event.get("phases") or {}).get(phase) or 0.0 for _, event in rounds) for phase in phases}
    whole = sum(totals.values()) or 1.0
    keys = legend(
        (colours[phase], f"{phase} {formats.percent(totals[phase] / whole)} ({formats.duration(totals[phase])})")
        for phase in phases
    )
    stacked = stacked_columns(columns, title=f"Time per round, {unit}", x_label="round", form=tick)
    return tag(
        "div",
        keys,
        tag("div", tag("figure", stacked), tag("figure", _speed(rounds)), cls="pair"),
        _rounds_table(history),
    )


def _phase_parts(
    number: int, event: Event, phases: Sequence[str], colours: dict[str, str], scale: float
) -> list[tuple[str, float, str]]:
    spent = event.get("phases") or {}
    whole = sum(value or 0.0 for value in spent.values()) or 1.0
    parts = [(phase, spent.get(phase) or 0.0) for phase in phases]
    return [
        (
            colours[phase],
            value / scale,
            f"round {number}\n{phase}: {formats.duration(value)}, {formats.percent(value / whole)}",
        )
        for phase, value in parts
    ]


def _speed(rounds: Sequence[tuple[int, Event]]) -> Markup:
    tips = [
        f"round {number}\n{formats.count(event.get('tokens_per_s'))} tokens/s\n"
        f"{formats.count(event.get('tokens'))} tokens\n"
        f"{formats.count(event.get('participants'))} clients in {formats.count(event.get('waves'))} waves"
        for number, event in rounds
    ]
    series = Series("speed", "", [(number, event.get("tokens_per_s")) for number, event in rounds], tips)
    return line_chart([series], title="Training speed, tokens/s", x_label="round", form=tick, zero=True)


def _rounds_table(history: History) -> Markup:
    """Rounds in figures, collapsed."""
    rounds = sorted(history.rounds.items())
    head = ["round", "participants", "dropped", "waves", "tokens", "tokens/s", "time", "weight entropy"]
    # Of methods that deal experts alone.
    dealt = any(event.get("load_variation") is not None for _, event in rounds)
    private = any(event.get("epsilon") is not None for _, event in rounds)
    trained = any(event.get("server_loss_last") is not None for _, event in rounds)
    head += ["load variation"] * dealt + ["epsilon"] * private + ["server's loss"] * trained
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
            *([formats.number(event.get("load_variation"))] * dealt),
            *([formats.number(event.get("epsilon"))] * private),
            *([formats.number(event.get("server_loss_last"))] * trained),
        ]
        for number, event in thinned(rounds, MOST_ROUNDS)
    ]
    body = tag("div", table(head, rows), cls="scroll")
    return tag("details", tag("summary", f"Every round in figures{shown_of(len(rounds), 'round', MOST_ROUNDS)}"), join([body]))


def topology_section(history: History) -> Markup:
    """Ranks as a grid: a row is a cluster (expert-parallel group), a column an expert shard (aggregation group)."""
    ranks = history.topology
    if not ranks:
        return tag("p", "The run has not recorded its topology.", cls="empty")
    clusters = sorted({rank["cluster"] for rank in ranks})
    shards = sorted({rank["shard"] for rank in ranks})
    # All clusters hold the same experts in the same shard, so any rank of it will do.
    experts = {rank["shard"]: rank.get("experts") for rank in ranks}
    # By position and not by row: a cut or edited table may lack ranks.
    place = {(rank["cluster"], rank["shard"]): rank for rank in ranks}
    head = [
        "",
        *(join([f"shard {shard}", tag("small", f"experts {experts[shard] or formats.MISSING}")]) for shard in shards),
    ]
    rows = [[f"cluster {cluster}", *(_rank_cell(place.get((cluster, shard))) for shard in shards)] for cluster in clusters]
    lead = (
        "A row is one expert-parallel group: tokens travel inside it. "
        "A column is one aggregation group: it sums adapters once per round."
    )
    grid = tag("div", table(head, rows, text_columns=1 + len(shards), cls="grid-table"), cls="scroll")
    return tag("div", tag("p", lead, cls="lead"), grid, _resumes(history))


def _rank_cell(rank: Event | None) -> str:
    if rank is None:
        return formats.MISSING
    return tag("td", f"rank {rank['rank']}", tag("small", str(rank.get("host") or "")))


def _resumes(history: History) -> Markup | None:
    if not history.resumes:
        return None
    rows = [
        [
            formats.clock(event.get("time")),
            str(event.get("round", formats.MISSING)),
            str(event.get("world_size", formats.MISSING)),
            str(event.get("checkpoint")),
        ]
        for event in history.resumes
    ]
    return tag(
        "div",
        tag("h3", "Resumed"),
        tag("div", table(["when", "after round", "ranks", "checkpoint"], rows, text_columns=4), cls="scroll"),
    )


def config_section(history: History, config: str | None) -> Markup:
    """The resolved configuration and the versions of the software."""
    versions = history.run.get("versions") or {}
    shown = table(["software", "version"], [[str(name), str(version)] for name, version in versions.items()], text_columns=2)
    text = (
        tag("pre", config)
        if config is not None
        else tag("p", "The run folder holds no config.yaml (a link is not read).", cls="empty")
    )
    # Collapsed: most readers come for the results.
    parts = [tag("details", tag("summary", "Full configuration (config.yaml)"), text)]
    if versions:
        parts.append(tag("details", tag("summary", "Software versions"), tag("div", shown, cls="scroll")))
    return tag("div", *parts)
