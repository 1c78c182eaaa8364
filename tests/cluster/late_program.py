"""`launch/train.py` as a rank that comes late: it tells where rank 0's watchdog listens, and connects seconds afterwards.

    python late_program.py FILE SECONDS [arguments of launch/train.py]

Ranks of a busy host are late like this, and strangers have the time in between.
"""

from __future__ import annotations

import runpy
import socket
import sys
import time
from pathlib import Path
from typing import Any

LAUNCH = Path(__file__).parent.parent.parent / "launch"
_place, _seconds = Path(sys.argv[1]), float(sys.argv[2])
_real = socket.create_connection


def _connect(address: tuple[str, int], *args: Any, **options: Any) -> socket.socket:
    """The first connection of a rank from Python is the one to rank 0's watchdog."""
    socket.create_connection = _real
    draft = _place.with_suffix(".draft")
    draft.write_text(f"{address[0]} {address[1]}")
    draft.rename(_place)
    time.sleep(_seconds)
    return _real(address, *args, **options)


socket.create_connection = _connect  # type: ignore[assignment]
sys.path.insert(0, str(LAUNCH))
sys.argv = [str(LAUNCH / "train.py"), *sys.argv[3:]]
runpy.run_path(sys.argv[0], run_name="__main__")
