"""Method info: a method's row in the table of methods (docs/methods.md)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MethodInfo:
    """What the table of methods says about one of them."""

    title: str
    paper: str
    adapts: str
    trains: str
    sends: str
    weighs: str
    completion: str
