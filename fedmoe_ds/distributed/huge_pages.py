"""Huge pages: 2 MiB of a process's memory under one address of the processor's tables, where Linux hands such out on request.

A pass walks through hundreds of MiB of weights, adapters and activations. In pages of 4 KiB the processor looks up again and
again where they lie, and what it fetches ahead ends with every page. glibc's malloc asks for huge pages where the environment
says so, from version 2.35 on, and it reads the environment once, when a process starts: so a process without the variable
starts itself again. Nothing that is computed depends on it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

VARIABLE, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_OFFERED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_SINCE = (2, 35)


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What an environment lacks for a process to get huge pages; empty where it would make no difference.

    A user's own word on the tunable stands, whatever it is.
    """
    said = environment.get(VARIABLE, "")
    if TUNABLE in said or _glibc() < _SINCE or not _on_request():
        return {}
    return {VARIABLE: ":".join(filter(None, (said, f"{TUNABLE}=1")))}


def begin_again(words: list[str]) -> None:
    """Start this process again with what it lacks for huge pages, under the same process id; otherwise return.

    Args:
        words: the arguments that this process was started with. A program that calls us from within has others, or none, and
            goes on: it has more to lose than a second's speed.
    """
    lacking = variables(os.environ)
    if not lacking or not words or sys.orig_argv[-len(words) :] != words:
        return
    # A file system that lets nobody start this interpreter again costs speed and nothing else.
    with contextlib.suppress(OSError):
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(command[0], command, {**os.environ, **lacking})  # noqa: S606  (our own words)


def _on_request() -> bool:
    """Whether the system gives huge pages to those that ask; with `always` nobody has to, with `never` nobody gets any."""
    try:
        return "[madvise]" in _OFFERED.read_text()
    except OSError:
        return False


def _glibc() -> tuple[int, ...]:
    """Its version; () with another C library."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return tuple(map(int, version.split("."))) if name == "glibc" else ()
    except (AttributeError, OSError, ValueError):  # no such function, no such name, or a version in words
        return ()
