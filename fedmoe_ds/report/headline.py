"""The head of the report page: what ran, how it ended, and the change of every tier."""

from __future__ import annotations

from fedmoe_ds.report import formats
from fedmoe_ds.report.history import Event, History, TierResult, tier_results
from fedmoe_ds.report.markup import Markup, tag
from fedmoe_ds.report.svg import tier_colours


def header(history: History) -> Markup:
    """Name, state, what it was, the change of every tier, key facts and the digest."""
    run = history.run
    name = str(run.get("name") or "unnamed run")
    end = history.end
    done = (
        f"finished {formats.clock(end.get('time'))}"
        if end
        else f"not finished, {formats.many(history.last_round, 'round')} so far"
    )
    eyebrow = tag("p", "fedmoe-ds run report", tag("span", done, cls="state ok" if end else "state"), cls="eyebrow")
    return tag(
        "header",
        eyebrow,
        tag("h1", name),
        tag("p", _sentence(history), cls="sub"),
        _tiles(history),
        _facts(history),
        _digest(end),
    )


def _sentence(history: History) -> str:
    run = history.run
    if not run:
        return "Nothing has been recorded yet."
    # A record of an older version, or one that was cut, may lack any of these.
    clients = run.get("clients") or len(history.client_names())
    tiers, rounds = formats.many(len(history.tiers), "budget tier"), formats.many(history.last_round, "round")
    ranks = run.get("world_size") or len(history.topology)
    where = f" on {formats.many(ranks, 'rank')}" if ranks else ""
    if run.get("clusters") and run.get("ep_size"):
        where += f" ({formats.many(run['clusters'], 'cluster')} × {run['ep_size']} expert-parallel)"
    return f"Method {run.get('method') or formats.MISSING}: {formats.many(clients, 'client')} in {tiers}, {rounds}{where}"


def _tiles(history: History) -> Markup | None:
    colours = tier_colours(history.tiers)
    tiles = [
        _tile(result, colours[result.tier]) for result in tier_results(history.evaluations.values()) if result.split == "global"
    ]
    return tag("div", *tiles, cls="tiles") if tiles else None


def _tile(result: TierResult, css: str) -> Markup:
    before, after = (formats.score(event, "perplexity", formats.number) for event in (result.before, result.after))
    change = formats.signed_percent(None if result.ratio is None else result.ratio - 1, 0)
    return tag(
        "div",
        tag("p", f"top-k {result.tier}", cls="what"),
        tag("p", after, cls="value"),
        tag("p", f"perplexity, from {before} ({change})", cls="how"),
        cls=f"tile {css}",
    )


def _facts(history: History) -> Markup:
    run, rounds = history.run, list(history.rounds.values())
    # `or 0`: a null field, such as a figure that was not finite, counts as nothing.
    tokens = sum(event.get("tokens") or 0 for event in rounds)
    busy = sum((event.get("phases") or {}).get("train") or 0.0 for event in rounds)
    experts, top_k, layers = run.get("num_experts"), run.get("top_k"), run.get("layers")
    facts = [
        (
            "Model",
            f"{experts} experts, top-{top_k}, {formats.many(layers or 0, 'layer')}" if experts else formats.MISSING,
        ),
        ("Tokens trained", formats.count(tokens)),
        ("Training speed", f"{formats.count(tokens / busy)} tokens/s" if busy else formats.MISSING),
        (
            "Run time",
            formats.duration((history.end or {}).get("seconds") or sum(event.get("seconds") or 0 for event in rounds) or None),
        ),
        ("Started", formats.clock(run.get("time"))),
        ("Seed", str(run.get("seed", formats.MISSING))),
        ("Reproducible", str(run.get("reproducible", formats.MISSING))),
        ("Foundation", str(run.get("foundation") or formats.MISSING)),
        # Shown only where it happened: readers should know that foreign code ran.
        *(
            [("Weights", str(run["foundation_converted"]).removeprefix("foundation: "))]
            if run.get("foundation_converted")
            else []
        ),
        *([("Tokenizer ran own code", str(run["foundation_code"]))] if run.get("foundation_code") else []),
    ]
    return tag("dl", *(tag("div", tag("dt", term), tag("dd", value, data_t=value)) for term, value in facts), cls="facts")


def _digest(end: Event | None) -> Markup | None:
    digest = str((end or {}).get("digest") or "")
    if not digest:
        return None
    copy = tag("button", "copy", type="button", data_copy=digest)
    return tag("p", tag("span", "Digest of the global adapters", cls="what"), tag("code", digest), copy, cls="digest")
