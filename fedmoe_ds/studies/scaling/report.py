"""Report: `scaling.csv`, `scaling-memory.csv`, `scaling.md` and `scaling.svg` of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmoe_ds.report import formats
from fedmoe_ds.report.events import Machine
from fedmoe_ds.report.tables import markdown
from fedmoe_ds.studies.report_files import write_files
from fedmoe_ds.studies.scaling.plot import picture
from fedmoe_ds.studies.scaling.rows import Line, Row, differing, lines_of, same_everywhere
from fedmoe_ds.studies.scaling.study import Study
from fedmoe_ds.studies.scaling.table import csv_text, memory_text, speed_table, time_table

STEM = "scaling"
_HOSTS = 8
"""Hosts that are named one by one."""


@dataclass(frozen=True)
class Results:
    """What a report is made of. `missing` says by run name why it has no figures; `hardware` is the calibration file's name."""

    study: Study
    command: str
    rows: Sequence[Row]
    missing: Mapping[str, str]
    hardware: str | None

    @property
    def lines(self) -> list[Line]:
        return lines_of(self.rows)


def write_report(results: Results, output: Path, copy: Path | None) -> Path:
    """Write these files into `output`, and text and picture to `copy` (a .md file) too; return the text's path.

    Raises:
        UserError: a file cannot be written.
    """
    target = output / f"{STEM}.md"
    # Drawn once for both places; a study without a finished run has no picture.
    drawing = picture(results.study, results.lines) if results.rows else None
    content = {target.with_suffix(".csv"): csv_text(results.study, results.rows)}
    content[output / f"{STEM}-memory.csv"] = memory_text(results.study, results.rows)
    for path in filter(None, (target, copy)):
        content[path] = text(results, path.with_suffix(".svg").name)
        if drawing is not None:
            content[path.with_suffix(".svg")] = drawing
    write_files(content)
    return target


def results_text(results: Results) -> str:
    """The tables and what must be said with them, for a terminal."""
    if not results.rows:
        return "No run is finished."
    tables = [speed_table(results.study, results.lines), "Seconds of a round:", time_table(results.study, results.lines)]
    return "\n\n".join([*tables, *remarks(results), *_missing(results)])


def text(results: Results, svg: str) -> str:
    """The Markdown report; `svg` is the picture's name beside it."""
    study = results.study
    parts = [f"# {study.title}", _lead(results)]
    if results.rows:
        parts += [f"![Throughput, efficiency and time over {study.axis}]({svg})", "## Throughput"]
        parts += [_RATIOS, speed_table(study, results.lines), *remarks(results), "## Where the time goes", _READING]
        parts += [time_table(study, results.lines)]
    parts += _missing(results)
    parts += ["## How to repeat it", f"```\n{results.command}\n```", _machine(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


_RATIOS = """\
Efficiency is throughput per rank over that of the first value: of training alone (local training and the sums, where ranks
wait for the slowest cluster), and of the whole round with evaluation and checkpoint. In brackets: the 95 % interval that the
spread of both values leaves over their repeats; with one repeat nothing is known of it."""

_READING = """\
Seconds of a round on rank 0, mean ± sample standard deviation over repeats, without the first round; `shortest`, `median` and
`longest` are those of the rounds of one run. Phases add up to the
round; `other` is the checkpoint, the schedule and the journal. `aggregate` includes waiting for clusters that trained longer.
The time inside collectives is a part of the phases, and includes waiting for peers that have not arrived. What the runs did not
record is `-`."""


def _lead(results: Results) -> str:
    study = results.study
    first = results.rows[0].config if results.rows else None
    grown = ", ".join(f"{amount} x {study.per}s of `{key}`" for key, amount in study.grows.items())
    facts = [f"Values: {', '.join(map(str, study.values))}; {formats.many(study.repeats, 'repeat')} of each."]
    if grown:
        facts.append(f"What grows: {grown}.")
    elif study.scaling == "strong":
        facts.append("The federation is the same at every value.")
    if first is not None:
        rounds = first.federation.rounds
        facts.append(f"Foundation {first.foundation.path or first.foundation.preset}, {rounds} rounds, the first is not timed.")
    return " ".join(facts)


def remarks(results: Results) -> list[str]:
    """What a reader of the figures has to know: shared cores, digests, where predictions come from."""
    said = []
    crowded = [str(line.value) for line in results.lines if line.crowded]
    if crowded:
        (cores, *_) = sorted({line.measured.cores for line in results.lines if line.crowded and line.measured.cores})
        said.append(
            f"{results.study.axis} {', '.join(crowded)}: more ranks than the {formats.many(cores, 'core')} of the machine. "
            "Ranks took turns, and these lines say nothing about hardware with a core or a device per rank."
        )
    if results.study.by_flops:
        said.append("Efficiency compares GFLOP/s: on this axis a token is not the same work at every value.")
    pairs = differing(results.rows)
    if pairs:
        left, right = pairs[0]
        said.append(
            f"NOT THE SAME RESULT: {left.config.name} and {right.config.name} trained one federation to different digests."
        )
    elif same_everywhere(results.rows):
        said.append(f"All {len(results.rows)} runs ended with one digest: {results.rows[0].measured.digest}.")
    if results.hardware is not None:
        said.append(
            f"Predictions: the planner with {results.hardware}; they end before the checkpoint, "
            "and so does what they are compared with."
        )
    return said


def _missing(results: Results) -> list[str]:
    if not results.missing:
        return []
    return [
        "Missing runs; the figures are without them:",
        markdown(["run", "why"], list(map(list, results.missing.items())), 2),
    ]


def _machine(results: Results) -> str:
    """What every host was, and the versions on it."""
    found: dict[str, dict[str, None]] = {}
    for row in results.rows:
        measured = row.measured
        versions = ", ".join(f"{name} {version}" for name, version in measured.versions.items())
        # Runs of earlier versions know the machine alone on which the study was typed.
        for facts in measured.machines or [measured.machine]:
            machine = Machine.model_validate(facts)
            where = _described(machine)
            hosts = found.setdefault("; ".join(filter(None, (where, versions))), {})
            hosts |= {machine.host: None} if machine.host is not None else {}
    told = [f"{text}{f' (on {_some(list(hosts))})' if hosts else ''}" for text, hosts in found.items() if text]
    return "Measured on: " + "; ".join(told) + "." if told else ""


def _described(machine: Machine) -> str:
    """What is known of it: other versions have recorded less."""
    cores = None if machine.cores is None else f"{machine.cores} cores"
    memory = None if machine.memory_gib is None else f"{machine.memory_gib:.0f} GiB"
    gpu = machine.gpu
    device = None if gpu is None else " x ".join(str(fact) for fact in (gpu.count, gpu.name) if fact is not None)
    return ", ".join(filter(None, (machine.cpu, cores, memory, device, machine.system_name)))


def _some(hosts: Sequence[str]) -> str:
    return ", ".join(hosts) if len(hosts) <= _HOSTS else f"{hosts[0]} to {hosts[-1]}, {len(hosts)} hosts"
