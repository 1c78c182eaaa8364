"""Report: `comparison.md`, `comparison.svg` and `comparison.json` of a study; nothing in the text depends on the machine."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedmoe_ds.clients.tiers import tier_top_k
from fedmoe_ds.config import Config
from fedmoe_ds.config.problems import shown
from fedmoe_ds.data.sources import source_name
from fedmoe_ds.report.tables import markdown
from fedmoe_ds.studies.compare import device_time, reading
from fedmoe_ds.studies.compare.aggregate import HIGHER_IS_BETTER, Comparison
from fedmoe_ds.studies.compare.plan import Variant
from fedmoe_ds.studies.compare.plot import picture
from fedmoe_ds.studies.compare.protocol import Expectation
from fedmoe_ds.studies.compare.table import fairness_table, task_table, tier_table, verdict_table
from fedmoe_ds.studies.compare.verdict import Answer, Verdict, judge
from fedmoe_ds.studies.report_files import write_files
from fedmoe_ds.studies.run import Run, differences

STEM = "comparison"
STUDIED = {"name", "output", "seed", "method"}  # what differs between runs of a study by design
ANSWERS: tuple[Answer, ...] = ("held", "did not hold", "not decided", "not tested")


@dataclass(frozen=True)
class Study:
    """What a report is made of. `reasons` says by run name why a run is missing; the others were not started or not ended."""

    command: str
    base: str
    base_config: Config
    variants: Sequence[Variant]
    overrides: Sequence[str]
    runs: Sequence[Run]
    comparison: Comparison
    expectations: Sequence[Expectation]
    reasons: Mapping[str, str]

    @property
    def missing(self) -> dict[str, str]:
        there = {record.name for record in self.comparison.records}
        return {run.name: self.reasons.get(run.name, "not finished") for run in self.runs if run.name not in there}

    @property
    def verdicts(self) -> list[Verdict]:
        return judge(self.expectations, self.comparison)

    def fairness(self, tier: str) -> str:
        """Accuracy over clients, where an ordering that is tested asks for it."""
        asked = any(verdict.in_points and verdict.answer != "not tested" for verdict in self.verdicts)
        return fairness_table(self.comparison, tier) if asked else ""


def write_report(study: Study, output: Path, copy: Path | None) -> Path:
    """Write the three files into `output`, and text and picture to `copy` (a .md file) as well; return the text's path.

    Raises:
        UserError: a file cannot be written.
    """
    target = output / f"{STEM}.md"
    content = {
        target: text(study, f"{STEM}.svg"),
        target.with_suffix(".svg"): picture(study.comparison),
        **_time_picture(study, target),
        target.with_suffix(".json"): json.dumps(_finite(numbers(study)), indent=1, allow_nan=False, ensure_ascii=False) + "\n",
    }
    if copy is not None:
        content |= {copy: text(study, copy.with_suffix(".svg").name), copy.with_suffix(".svg"): picture(study.comparison)}
        content |= _time_picture(study, copy)
    write_files(content)
    return target


def _time_picture(study: Study, target: Path) -> dict[Path, str]:
    """Beside the text: a picture more, of a study on simulated devices."""
    if not device_time.simulated(study.comparison):
        return {}
    return {target.with_name(f"{target.stem}-time.svg"): device_time.picture(study.comparison)}


def results_text(study: Study) -> str:
    """The tables alone, for a terminal; the sources of the orderings are in the report."""
    comparison = study.comparison
    parts = []
    for tier in comparison.tiers:
        parts += [f"top-k {tier}", tier_table(comparison, tier), task_table(comparison, tier), study.fairness(tier)]
        parts += [device_time.device_table(comparison, tier), _order(comparison, tier)]
    tested = [verdict for verdict in study.verdicts if verdict.answer != "not tested"]
    for title, verdicts in (("Published orderings", measured(tested)), ("By count alone", counted(tested))):
        parts += [title, verdict_table(verdicts, sources=False)] if verdicts else []
    return "\n\n".join(part for part in parts if part)


def text(study: Study, svg: str) -> str:
    """The Markdown report; `svg` is the picture's name beside it."""
    comparison = study.comparison
    parts = ["# Comparison of methods", _lead(study), reading.caveat(study.base_config, study.comparison.seeds)]
    parts += ["## What was run", _methods(study), _setting(study)]
    if study.missing:
        rows = [[name, reason] for name, reason in study.missing.items()]
        parts += [
            "## Missing runs",
            "The figures below are without these runs.",
            markdown(["run", "why"], rows, text_columns=2),
        ]
    if comparison.tiers:
        without = [] if all(record.experts for record in study.comparison.records) else [reading.WITHOUT_EXPERTS]
        parts += ["## Results", reading.COLUMNS, *without, reading.holdouts(study.base_config, study.comparison.records)]
        parts += [reading.tests(study.comparison, study.verdicts), f"![Perplexity per tier and method]({svg})"]
        if device_time.simulated(comparison):
            parts += [f"![Perplexity over virtual time]({svg.removesuffix('.svg')}-time.svg)"]
    for tier in comparison.tiers:
        tasks = task_table(comparison, tier)
        parts += [f"### top-k {tier}", tier_table(comparison, tier), *([reading.TASKS, tasks] if tasks else [])]
        fairness = study.fairness(tier)
        parts += [reading.FAIRNESS, fairness] if fairness else []
        devices = device_time.device_table(comparison, tier)
        parts += [*([device_time.LEAD, devices] if devices else []), _order(comparison, tier)]
    results, counts = measured(study.verdicts), counted(study.verdicts)
    if results:
        parts += ["## Published orderings", _verdict_lead(results), verdict_table(results)]
    if counts:
        parts += ["## Orderings by count alone", reading.COUNTED, verdict_table(counts)]
    parts += ["## How to repeat it", f"```\n{study.command}\n```", _versions(comparison)]
    return "\n\n".join(part for part in parts if part) + "\n"


def measured(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """What training decided."""
    return [verdict for verdict in verdicts if not verdict.arithmetic]


def counted(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """What follows from counting."""
    return [verdict for verdict in verdicts if verdict.arithmetic]


def _lead(study: Study) -> str:
    labels, seeds = ", ".join(study.comparison.labels), study.comparison.seeds
    done = len(study.comparison.records)
    everything = "All runs are finished." if done == len(study.runs) else f"{done} of {len(study.runs)} runs are finished."
    return f"Methods: {labels}. Seeds: {', '.join(str(seed) for seed in range(seeds))}. {everything}"


def _methods(study: Study) -> str:
    # Seeds differ in nothing that is shown; the first one stands for all.
    configs = {run.label: run.config for run in reversed(study.runs)}
    rows = []
    for variant in study.variants:
        own = configs[variant.label].method.model_dump(exclude={"name"})
        changed = [f"method.{key}={shown(value)}" for key, value in own.items()]
        mine = configs[variant.label].model_dump(exclude=STUDIED)
        compared = differences(study.base_config.model_dump(exclude=STUDIED), mine)
        changed += [f"{key}={shown(new)}" for key, _, new in compared]
        rows.append([variant.label, variant.name, ", ".join(changed) or "-", variant.origin])
    return markdown(["label", "method", "its own keys", "from"], rows, text_columns=4)


def _setting(study: Study) -> str:
    config, overrides = study.base_config, " ".join(study.overrides)
    clients = config.data.partition.clients
    facts = [
        f"Everything else is `{study.base}`" + (f" with `{overrides}`" if overrides else "") + ": ",
        f"foundation {reading.model(config)}, data {source_name(config.data.source)} ({config.data.partition.kind} partition",
        f", {clients} clients" if clients else "",
        f"), {config.federation.rounds} rounds, ",
        reading.steps(config),
        f" of {config.local.batch_size} sequences of {config.data.sequence_length} tokens, learning rate {config.local.lr:g}. ",
        "The methods of one seed share foundation, data, clients and tiers, which was checked after the runs.",
    ]
    return "".join(facts)


def _order(comparison: Comparison, tier: str) -> str:
    """Neighbours by sign, then all decided pairs: that neighbours are not told apart does not chain."""
    # `a ≈ b ≈ c < d` does not say whether a < d, so the decided pairs follow in full.
    order = comparison.order(tier)
    if len(order) < 2:
        return ""
    labels = [label for _, label in order]
    text = "Lowest perplexity first: " + " ".join(f"{sign} {label}".strip() for sign, label in order)
    decided = comparison.below(tier)
    lower = {label: [high for high in labels if (label, high) in decided] for label in labels}
    pairs = "; ".join(f"{label} < {', '.join(higher)}" for label, higher in lower.items() if higher)
    return (
        f"{text}\n\n{len(decided)} of {len(comparison.tests(tier, 'perplexity'))} pairs decided{f': {pairs}' if pairs else '.'}"
    )


def _verdict_lead(verdicts: Sequence[Verdict]) -> str:
    counts = {answer: sum(verdict.answer == answer for verdict in verdicts) for answer in ANSWERS}
    tally = ", ".join(f"{count} {answer}" for answer, count in counts.items() if count)
    lead = f"Orderings that papers report, on their models and data, and what became of them in this study: {tally}."
    lead += f" {reading.EQUAL}"
    failed = [f"`{v.expectation.claim}` at k={v.tier}" for v in verdicts if v.answer == "did not hold"]
    return lead + (f" Did not hold: {', '.join(failed)}." if failed else "")


def _versions(comparison: Comparison) -> str:
    found = dict.fromkeys(", ".join(f"{name} {v}" for name, v in record.versions.items()) for record in comparison.records)
    return "Versions: " + "; ".join(found) + "." if found else ""


def numbers(study: Study) -> dict[str, Any]:
    """Everything in the report and every figure of every run, for programs."""
    comparison = study.comparison
    return {
        "command": study.command,
        "base": study.base,
        "overrides": list(study.overrides),
        "seeds": comparison.seeds,
        "methods": [{"label": v.label, "name": v.name, "from": v.origin} for v in study.variants],
        "runs": [_run_numbers(study, run) for run in study.runs],
        "missing": study.missing,
        "tiers": [
            {**_named(tier), "lines": _line_numbers(comparison, tier), "pairs": _pair_numbers(comparison, tier)}
            for tier in comparison.tiers
        ],
        "expectations": [
            {
                **verdict.expectation.model_dump(exclude={"tiers"}),
                **_named(verdict.tier),
                "verdict": verdict.answer,
                "arithmetic": verdict.arithmetic,
                "test": asdict(verdict.test) if verdict.test else None,
                "equal_flops": verdict.equal_flops,
                _difference_key(verdict): dict(verdict.difference.values) if verdict.difference else None,
            }
            for verdict in study.verdicts
        ],
    }


def _difference_key(verdict: Verdict) -> str:
    return "difference_by_seed" if verdict.in_points else "log_ratio_by_seed"


def _run_numbers(study: Study, run: Run) -> dict[str, Any]:
    head = {"name": run.name, "label": run.label, "seed": run.seed, "config": run.config.model_dump(exclude={"output"})}
    found = [record for record in study.comparison.records if record.name == run.name]
    if not found:
        return head | {"finished": False}
    (record,) = found
    facts = {"finished": True, "digest": record.digest, "versions": record.versions, "foundation": record.ground["foundation"]}
    return head | facts | {"before": record.before, "after": record.after}


def _named(tier: str) -> dict[str, Any]:
    return {"tier": tier_top_k(tier), "tier_label": tier}


def _line_numbers(comparison: Comparison, tier: str) -> list[dict[str, Any]]:
    return [
        {"label": line.label, "seeds": line.seeds}
        | {name: {"mean": s.mean, "std": s.std, "by_seed": dict(s.values)} for name, s in line.figures.items()}
        for line in comparison.lines(tier)
    ]


def _pair_numbers(comparison: Comparison, tier: str) -> list[dict[str, Any]]:
    """Every test behind the order of a tier."""
    return [
        {"left": left, "right": right, "figure": figure, **asdict(test)}
        for figure in HIGHER_IS_BETTER
        for (left, right), test in comparison.tests(tier, figure).items()
    ]


def _finite(value: Any) -> Any:
    """The same with null for every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
