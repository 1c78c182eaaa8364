"""Fixtures shared by the tests that run the real command."""

from __future__ import annotations

import inspect
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--examples", type=int, default=1, metavar="N", help="N times as many examples per property, drawn anew")


def pytest_configure(config: pytest.Config) -> None:
    """Choose the examples of property tests: the same ones at every start, so that no landing is a draw, or N times as many.

    How long an example takes tells something about the machine, which others use too; a test that hangs meets its timeout.
    """
    settings.register_profile("fedmoe-ds", deadline=None, derandomize=config.option.examples == 1)
    settings.load_profile("fedmoe-ds")


# A shell starts jobs in the background with SIGINT ignored, and every process below inherits that: Ctrl-C could not be tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# On a host with a GPU, too: two ranks of a test would share one. What needs a device asks torch for it.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

# Real text in four groups of unequal size, on every machine, and small enough that a start costs imports and little else.
GROUPS = {
    "json": ("json.decoder", "json.encoder", "json.scanner"),
    "csv": ("csv",),
    "text": ("textwrap", "shlex", "string"),
    "files": ("fnmatch", "glob", "filecmp", "stat"),
    "numbers": ("fractions", "statistics"),
    "queues": ("heapq", "bisect", "queue", "sched"),
}


NEEDS_A_DEVICE = "needs a CUDA device"


@pytest.hookimpl(tryfirst=True)  # before pytest looks at -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mark_device_tests(items)
    if config.option.examples > 1:
        leave_properties(items, config.option.examples)


def mark_device_tests(items: list[pytest.Item]) -> None:
    """Mark tests that are skipped for want of a device, so that `launch/bench.py gpu` can choose them where there is one."""
    for item in items:
        if any(mark.kwargs.get("reason") == NEEDS_A_DEVICE for mark in item.iter_markers("skipif")):
            item.add_marker(pytest.mark.cuda)


def leave_properties(items: list[pytest.Item], times: int) -> None:
    """Leave the tests that draw examples, and let each draw so many times as many."""
    items[:] = [item for item in items if hasattr(getattr(item, "obj", None), "hypothesis")]
    # Tests say how many by themselves, which a profile does not reach; cases of one test share its function.
    for test in {item.obj for item in items}:  # type: ignore[attr-defined]
        own = test._hypothesis_internal_use_settings
        test._hypothesis_internal_use_settings = settings(own, max_examples=times * own.max_examples)


@pytest.fixture(scope="session")
def foundation_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder in which the built-in nano foundation (seed 0) has been pre-trained once."""
    from fedmoe_ds.config import PretrainConfig
    from fedmoe_ds.foundation.builtin.pretrain import pretrain_preset

    cache = tmp_path_factory.mktemp("cache")
    pretrain_preset("nano-olmoe", PretrainConfig(steps=20), 0, cache, lambda text: None)
    return cache


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file with columns `text` and `group`: sources of the standard library, cut into paragraphs of 30 lines."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    with path.open("w") as file:
        for group, modules in GROUPS.items():
            for module in modules:
                lines = inspect.getsource(__import__(module, fromlist=["x"])).splitlines()
                for start in range(0, len(lines), 30):
                    row = {"text": "\n".join(lines[start : start + 30]) + "\n", "group": group}
                    file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="session")
def nano(foundation_cache: Path, corpus: Path) -> dict[str, Any]:
    """A small federation: six clients of unequal size, four of them in a round, three tiers; `output` is still to be set."""
    return {
        "name": "nano",
        "foundation": {"preset": "nano-olmoe", "cache": str(foundation_cache), "pretrain": {"steps": 20}},
        "adapters": {"rank": 4},
        "federation": {"rounds": 2, "participation": 0.75},
        "local": {"max_steps": 3, "batch_size": 4, "lr": 5.0e-3},
        "data": {
            "source": str(corpus),
            "sequence_length": 64,
            "partition": {"kind": "natural", "column": "group"},
        },
        "evaluation": {"max_sequences": 8},
    }
