"""Fuzzing: damaged and hostile files, made by seed, and workers in which readers meet them.

A case is (kind, seed). A worker is a fork of the test's process: imports and inputs are there already. It holds the reader to
what every reader promises: it succeeds, or raises `UserError` with one printable line that names what is wrong, within seconds
and without much memory. Whatever else happens, the death of the worker included, is a finding.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmoe_ds.errors import UserError

LONGEST_S = 20
MOST_MIB = 1024
"""Of memory that a case may add to the process."""

Case = Callable[[random.Random, Path], None]
"""(random, empty folder): write damaged files there and read them as the program does."""


_NAMED = re.compile(r"(--)?[a-z][a-z_.0-9-]*: |.+: unknown key[;,]", re.IGNORECASE)
"""How a line begins that names a key or an option; an unknown key may look like anything."""
_SHOUTS = ("Traceback (most recent call last)", "panicked at")
"""What nobody wants on a terminal beside the line."""


class Raw(str):
    """JSON text that stands as it is, whatever it says."""

    __slots__ = ()


BYTES = {
    "inserted": [
        b"\0", b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\x1b[31m", b"\r", b"\n", b"\x85", b"\xe2\x80\xa8",
        *(str(number).encode() for number in (2**31, 2**63, 10**400, -1)), b"x" * 1000, b"x" * 300_000,
    ],
    "first": [b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\n\n", b"#", b"\x1f\x8b", b"PK\x03\x04"],
    "instead": [b'"', b"'", b"{", b"}", b"[", b"]", b",", b":", b"-", b"&a", b"*a", b"!!x", b"%", b"|", b"\\"],
    "opened": [opening * count for opening in (b"[", b"{", b"- ", b'{"a":', b"? ") for count in (70, 400, 5000)],
    "whole": [b"", b"\n", b"{}", b"[]", b"null", b"0", b'""', b"\0" * 100],
}  # fmt: skip
"""What bytes become."""


class Pairs(list[tuple[str, Any]]):
    """An object whose keys may occur twice."""


def emit(value: Any) -> str:
    """JSON of a tree with `Raw` and `Pairs` in it."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict | Pairs):
        items = value.items() if isinstance(value, dict) else value
        return "{" + ", ".join(f"{json.dumps(key)}: {emit(item)}" for key, item in items) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(emit, value)) + "]"
    return json.dumps(value)


def nested(levels: int, left: str = "[", right: str = "]") -> Raw:
    return Raw(left * levels + right * levels)


ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 255, 65536, 2**31 - 1, 2**31, 2**53 + 1, 2**63, 2**64, 10**30, -(10**30), 0.5, -0.0,
    1e-320, 1e308, -1e308, Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw("9" * 400), Raw("9" * 5000),
    Raw("-" + "1" * 4400), Raw("0x10"), Raw("01"), Raw("."), Raw("--1"), Raw(""), "", " ", "x", "0", "-1", "null", "NUL", "CON",
    "a/b", "../x", "/dev/null", "~", ".", "\0", "a\0b", Raw('"\\ud800"'), Raw('"x\\udfffy"'), "\ufeff", "\u2028", "\x1b[2J\x07",
    "\n", "é", "e\u0301", "\u202e", "𝟙", "٣", "x" * 100_000, "word " * 20_000, [], {}, [[]], [{}], [None], [0], ["x"],
    {"": None}, {"x": {}}, [[[[1]]]], nested(70), nested(400), nested(900), nested(5000), nested(99_999),
    nested(400, '{"a":', "}"),
    nested(5000, '{"a":', "}"), list(range(1000)), {str(i): i for i in range(300)}, [1, "x", None, {}],
]  # fmt: skip
"""Values that a field does not expect."""


def damage(draw: random.Random, tree: Any) -> str:
    """JSON of a tree with one to three changes."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        tree = _changed(draw, tree)
    return emit(tree)


def _changed(draw: random.Random, tree: Any) -> Any:
    """A copy of a tree in which a value, deep inside or the whole, is another one."""
    if isinstance(tree, dict) and tree and draw.random() < 0.92:
        key = draw.choice(list(tree))
        kind = draw.random()
        if kind < 0.08:
            return {name: value for name, value in tree.items() if name != key}
        if kind < 0.12:
            return Pairs([*tree.items(), (key, draw.choice(ODD))])
        if kind < 0.17:
            name = draw.choice(("", "x" * 300, "\0", "NUL", key.upper(), f"{key} ", "../x", "__class__"))
            return {(name if known == key else known): value for known, value in tree.items()}
        if kind < 0.2:
            return {**tree, draw.choice(("x", "", "\0", "format", "name")): draw.choice(ODD)}
        return {**tree, key: _changed(draw, tree[key])}
    if isinstance(tree, list) and not isinstance(tree, Pairs) and tree and draw.random() < 0.8:
        place = draw.randrange(len(tree))
        kind = draw.random()
        if kind < 0.1:
            return tree[:place] + tree[place + 1 :]
        if kind < 0.2:
            return [*tree, tree[place]]
        if kind < 0.25:
            return tree[::-1]
        return [*tree[:place], _changed(draw, tree[place]), *tree[place + 1 :]]
    if isinstance(tree, int | float) and not isinstance(tree, bool) and draw.random() < 0.5:
        return draw.choice((-tree, tree + 1, tree - 1, tree * 2, tree * 1000, str(tree), float(tree), [tree]))
    if isinstance(tree, str) and draw.random() < 0.3:
        return draw.choice((tree[:-1], tree + "x", tree.upper(), f" {tree}", tree * 50, [tree], tree[::-1]))
    return draw.choice(ODD)


def shuffle_bytes(draw: random.Random, content: bytes, others: Iterable[bytes] = ()) -> bytes:
    """Content with one to four changes that know nothing of its format."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4))):
        a, b = sorted(draw.randrange(len(data) + 1) for _ in range(2))
        b = min(b, a + draw.choice((1, 4, 40, 4000)))
        match draw.randrange(11):
            case 0:
                data[a:b] = b""
            case 1:
                data = data[:a]
            case 2:
                data[a:a] = data[a:b] * draw.choice((1, 3, 200))
            case 3:
                data[a:b] = draw.randbytes(b - a)
            case 4:
                for _ in range(draw.choice((1, 8)) if data else 0):
                    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            case 5:
                data[a:a] = draw.choice(BYTES["inserted"])
            case 6:
                data[0:0] = draw.choice(BYTES["first"])
            case 7:
                data[a:b] = draw.choice(BYTES["instead"])
            case 8:
                data[a:a] = draw.choice(BYTES["opened"])
            case 9 if pool := list(others):
                other = draw.choice(pool)
                data = data[:a] + other[draw.randrange(len(other) + 1) :]
            case _:
                data = bytearray(draw.choice((*BYTES["whole"], bytes(data) * 2)))
    return bytes(data)


@dataclass
class Findings:
    """What became of the cases of one kind."""

    outcomes: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    seconds: float = 0.0
    slowest: float = 0.0
    peak_mib: float = 0.0

    def line(self, kind: str) -> str:
        told = ", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items()))
        return (
            f"{kind}: {sum(self.outcomes.values())} cases in {self.seconds:.0f} s, the slowest {self.slowest:.1f} s, at most "
            f"{self.peak_mib:.0f} MiB more than before: {told}"
        )


class _Hang(BaseException):
    """A case was too long."""


def fuzz(case: Case, seeds: Iterable[int], scratch: Path) -> Findings:
    """Run the cases of one kind, one after the other, in a worker that is replaced when it dies."""
    findings, began = Findings(), time.monotonic()
    worker: _Worker | None = None
    for seed in seeds:
        worker = worker or _Worker(case, scratch)
        outcome, text, seconds, grown = worker.ask(seed)
        findings.outcomes[outcome] += 1
        findings.lines.append(f"{seed}: {outcome}: {text[:300]}")
        findings.slowest, findings.peak_mib = max(findings.slowest, seconds), max(findings.peak_mib, grown)
        if outcome not in ("read", "refused") or grown > MOST_MIB:
            findings.bad.append(f"seed {seed}: {outcome} ({seconds:.1f} s, {grown:.0f} MiB): {text}")
        if outcome == "died":
            worker.end()
            worker = None
    if worker is not None:
        worker.end()
    findings.seconds = time.monotonic() - began
    return findings


class _Worker:
    """A fork that answers seeds with (outcome, text, seconds, MiB)."""

    def __init__(self, case: Case, scratch: Path) -> None:
        context = multiprocessing.get_context("fork")
        self._here, there = context.Pipe()
        self._log = scratch / "worker.log"
        self._process = context.Process(target=_serve, args=(case, scratch, self._here, there, self._log), daemon=True)
        self._process.start()
        there.close()

    def ask(self, seed: int) -> tuple[str, str, float, float]:
        began = time.monotonic()
        try:
            self._here.send(seed)
            if self._here.poll(LONGEST_S + 10):
                answer: tuple[str, str, float, float] = self._here.recv()
                return answer
            self._process.kill()
        except (EOFError, OSError):
            pass
        self._process.join()
        tail = self._log.read_text(errors="replace")[-600:]
        return "died", f"exit code {self._process.exitcode}: {tail}", time.monotonic() - began, 0.0

    def end(self) -> None:
        self._here.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(case: Case, scratch: Path, other_end: Any, channel: Any, log: Path) -> None:
    other_end.close()  # or its end would not be noticed
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    room = (_kib("VmSize") << 10) + (4 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, _alarm)
    with contextlib.suppress(EOFError):
        while True:
            seed = channel.recv()
            folder = scratch / f"case-{seed}"
            folder.mkdir()
            before = log.stat().st_size
            outcome, *rest = _judged(case, seed, folder)
            said = log.read_bytes()[before:].decode(errors="replace")
            shouted = outcome in ("read", "refused") and any(word in said for word in _SHOUTS)
            channel.send(("shouted", said[-600:], *rest[1:]) if shouted else (outcome, *rest))
            shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)  # without the clean-up of the process that was forked


def _alarm(number: int, frame: Any) -> None:
    raise _Hang


def _judged(case: Case, seed: int, folder: Path) -> tuple[str, str, float, float]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, began = _kib("VmRSS"), time.monotonic()
    signal.alarm(LONGEST_S)
    try:
        outcome, text = _outcome(case, seed, folder)
    except _Hang:
        outcome, text = "hang", traceback.format_exc(limit=-4)
    finally:
        signal.alarm(0)
    return outcome, text, time.monotonic() - began, (_kib("VmHWM") - before) / 1024


def _outcome(case: Case, seed: int, folder: Path) -> tuple[str, str]:
    try:
        case(random.Random(seed), folder)
    except UserError as error:
        line = str(error)
        named = _NAMED.match(line) or str(folder) in line
        told = line.isprintable() and 10 < len(line) < 4200 and named
        return ("refused", line) if told else ("no line", repr(line[:300]))
    except _Hang:
        raise
    except BaseException as error:
        return f"{type(error).__name__}", "".join(traceback.format_exception(error)[-6:])[-1500:]
    return "read", ""


def _kib(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{name}:")[2].split()[0])
