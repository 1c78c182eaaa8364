"""The expert-activation heat maps: layers x experts, one panel per tier, one frame per round."""

from __future__ import annotations

import json
from collections.abc import Sequence

from fedmoe_ds.clients.tiers import tier_order
from fedmoe_ds.report import formats
from fedmoe_ds.report.axis import whole_ticks
from fedmoe_ds.report.history import Cells, History
from fedmoe_ds.report.markup import Markup, tag
from fedmoe_ds.report.svg import thinned, tier_colours, tier_mark

MOST_ROUNDS = 24
WIDTH, LEFT, BOTTOM = 480.0, 34.0, 38.0


def expert_section(history: History) -> Markup:
    """All panels for the last recorded round, and the data of the other rounds for the slider."""
    # Records of layers without any expert have nothing to draw.
    recorded = sorted({round_ for (round_, _), cells in history.experts.items() if any(cells)})
    if not recorded:
        return tag("p", "No expert activations have been recorded yet.", cls="empty")
    rounds = thinned(recorded, MOST_ROUNDS)
    frames = {key: cells for key, cells in history.experts.items() if key[0] in rounds and any(cells)}
    tiers = sorted({tier for _, tier in frames}, key=tier_order)
    # One peak for all tiers and rounds: equal colours mean equal shares, also when the slider moves.
    peak = max((cell for frame in frames.values() for layer in frame for cell in layer), default=100) or 100
    colours = tier_colours(history.tiers)
    panels = [_panel(tier, rounds, frames, peak, colours[tier]) for tier in tiers]
    data = {
        "rounds": rounds,
        "peak": peak,
        "frames": {tier: [_flat(frames.get((r, tier))) for r in rounds] for tier in tiers},
    }
    script = tag("script", _embedded(data), type="application/json", id="activation-data")
    parts = [_slider(rounds, len(recorded)), _scale(peak), tag("div", *panels, cls="pair")]
    return tag("div", *parts, script if len(rounds) > 1 else None, cls="heat")


def _flat(frame: Cells | None) -> list[int] | None:
    return None if frame is None else [cell for layer in frame for cell in layer]


def _embedded(data: object) -> Markup:
    """JSON that no HTML parser can end early."""
    # `</script>` inside a string would end the element; \u003c means the same in JSON.
    return Markup(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))


def _slider(rounds: Sequence[int], recorded: int) -> Markup | None:
    if len(rounds) == 1:
        return tag("p", f"Round {rounds[0]}.", cls="note")
    last = len(rounds) - 1
    bar = tag("input", type="range", id="activation-round", min=0, max=last, step=1, value=last)
    shown = tag("output", f"round {rounds[-1]}", for_="activation-round", id="activation-shown")
    thinned = f" ({len(rounds)} of {recorded} rounds kept)" if recorded > len(rounds) else ""
    return tag("p", tag("label", f"Round{thinned}", for_="activation-round"), bar, shown, cls="slider")


def _scale(peak: int) -> Markup:
    """The colour scale; its square root makes room for the many experts around the even share."""
    even = 100 * (100 / peak) ** 0.5 if peak >= 100 else 100.0
    marks = [tag("span", "0", style="left:0%"), tag("span", "1 × even share", style=f"left:{even:.1f}%")]
    # Beyond that, both labels would overlap.
    if even < 68:
        marks.append(tag("span", f"{formats.number(peak / 100)} ×", style="left:100%"))
    return tag("div", tag("div", cls="ramp"), tag("div", *marks, cls="ramp-marks"), cls="ramp-frame")


def _level(cell: int, peak: int) -> str:
    # The same square root as in the scale; report.css mixes two colour ramps, hence 200.
    return f"--v:{200 * (cell / peak) ** 0.5:.0f}%"


def _panel(tier: str, rounds: Sequence[int], frames: dict[tuple[int, str], Cells], peak: int, css: str) -> Markup:
    # A tier may be absent from the last round: none of its clients was drawn.
    newest = max(r for r in rounds if (r, tier) in frames)
    frame = frames[newest, tier]
    layers, experts = len(frame), max(len(layer) for layer in frame)
    # Many layers get thinner rows, so that the panel stays about as high as wide.
    tall = min(26.0 if layers > 2 else 40.0, max(9.0, 170.0 / layers))
    wide = (WIDTH - LEFT) / experts
    cells = [
        tag(
            "rect",
            x=f"{LEFT + expert * wide:.2f}",
            y=f"{layer * tall:.1f}",
            width=f"{wide - (0.8 if wide > 5 else 0.2):.2f}",
            height=f"{tall - 0.8:.1f}",
            style=_level(cell, peak),
            data_c=f"{layer},{expert},{cell}",
        )
        for layer, row in enumerate(frame)
        for expert, cell in enumerate(row)
    ]
    floor = layers * tall
    names = [
        tag("text", str(n), x=LEFT - 8, y=f"{(n + 0.5) * tall + 4:.1f}", cls="tick left") for n in whole_ticks(0, layers - 1)
    ]
    ticks = whole_ticks(0, experts - 1, 9)
    numbers = [tag("text", str(n), x=f"{LEFT + (n + 0.5) * wide:.1f}", y=f"{floor + 14:.1f}", cls="tick middle") for n in ticks]
    middle = f"translate(10 {floor / 2:.1f}) rotate(-90)"
    axes = [
        tag("text", "expert", x=f"{LEFT + (WIDTH - LEFT) / 2:.1f}", y=f"{floor + 33:.1f}", cls="axis middle"),
        tag("text", "layer", transform=middle, cls="axis middle"),
    ]
    size, title = f"0 0 {WIDTH:.0f} {floor + BOTTOM:.0f}", f"expert activation, top-k {tier}"
    chart = tag("svg", *cells, *names, *numbers, *axes, viewBox=size, role="img", aria_label=title, cls="chart", data_tier=tier)
    caption = tag("figcaption", tier_mark(css, tier), tag("span", _load(frame), cls="note", data_load=tier))
    return tag("figure", caption, chart)


def _load(frame: Cells) -> str:
    """What the panel shows in one line; report.js words the other rounds the same way."""
    cells = [cell for layer in frame for cell in layer]
    idle = sum(1 for cell in cells if cell == 0)
    return f"busiest {max(cells) / 100:.1f} × even share; {idle} of {len(cells)} never used"
