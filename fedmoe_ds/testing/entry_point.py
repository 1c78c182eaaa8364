"""Entry point: a method under test is found by its name, as if its package were installed, also by processes started here."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path

from fedmoe_ds.errors import UserError
from fedmoe_ds.methods import Method
from fedmoe_ds.methods.registry import GROUP

NAME = "method-under-test"


@contextmanager
def announced(method: type[Method], processes: bool) -> Iterator[str]:
    """The name under which `method.name` finds a class during the body: that of its own entry point where it has one.

    Args:
        processes: whether other processes will import it.
    Raises:
        UserError: nobody can import it: it is defined in a function, or, with `processes`, in a notebook or a script.
    """
    place = f"{method.__module__}:{method.__qualname__}"
    if "<locals>" in place:
        raise UserError(f"method: {place}: is defined in a function; define it at the top of a module")
    if processes and method.__module__ == "__main__":
        raise UserError(
            f"method: {place}: no other rank can import what a notebook or a script defines; put it into a module, or check it "
            "on one rank: check_method(..., ranks=1)"
        )
    own = [point.name for point in entry_points(group=GROUP) if point.value == place]
    if own:
        yield own[0]
        return
    with tempfile.TemporaryDirectory(prefix="fedmoe-method-") as site:
        # What `pip install` leaves behind: the way is the one that users go.
        info = Path(site) / "method_under_test-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: method-under-test\nVersion: 0\n", encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{NAME} = {place}\n", encoding="utf-8")
        sys.path.insert(0, site)
        try:
            yield NAME
        finally:
            sys.path.remove(site)
