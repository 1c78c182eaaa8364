"""Stop points: places between two steps of long work at which it may be left.

Work calls `stop_point()` between its steps: pre-training, encoding, reading and hashing of large files. Nothing happens there
unless somebody listens (`long_work`), whose answer to a stop request is StopError. The work then keeps what it can, cleans up
what is half made, and lets the error out.

Who listens is known to one thread only: a background thread never takes part in what the ranks agree on.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from io import FileIO
from pathlib import Path
from typing import TypeVar

from fedmoe_ds.distributed.signs_of_work import SignsOfWork, process_counts

T = TypeVar("T")
_PIECE = 1 << 20  # bytes between two stop points of `file_sha256`
_LOOK_S = 0.2  # seconds between two of `run_waiting`

_listener: ContextVar[Callable[[], None] | None] = ContextVar("listener", default=None)
_asked: ContextVar[Callable[[], bool] | None] = ContextVar("asked", default=None)


class StopError(BaseException):
    """The run was asked to stop before it had anything to save in a checkpoint; raised on all ranks.

    Like KeyboardInterrupt no Exception: whoever turns the troubles of a parser or a download into one line lets it through.

    Attributes:
        signal: its name.
        kept: what of the work is kept, in words for the user.
    """

    def __init__(self, signal: str) -> None:
        self.signal, self.kept = signal, ""

    def __str__(self) -> str:
        return f"stopped by {self.signal} while loading{f'; {self.kept}' if self.kept else ''}"


def stop_point() -> None:
    """Between two steps of long work. Raises StopError where the run was asked to stop."""
    listener = _listener.get()
    if listener is not None:
        listener()


@contextmanager
def heard_by(listener: Callable[[], None], asked: Callable[[], bool] | None = None) -> Iterator[None]:
    """Let `listener` be called at every stop point of the body; `asked` says whether this process was asked to stop."""
    token, other = _listener.set(listener), _asked.set(asked)
    try:
        yield
    finally:
        _listener.reset(token)
        _asked.reset(other)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits; stop points between its pieces. Raises OSError as reading does."""
    # Unbuffered, into one buffer: the bytes are copied once.
    with path.open("rb", buffering=0) as file:
        return stream_sha256(file)


def stream_sha256(file: FileIO) -> str:
    """The same of an open file without a buffer of its own, from where it stands."""
    content, buffer = hashlib.sha256(), memoryview(bytearray(_PIECE))
    while count := file.readinto(buffer):
        content.update(buffer[:count])
        stop_point()
    return content.hexdigest()


def run_waiting(action: Callable[[], T], watched: Iterable[Path] = (), signs: SignsOfWork | None = None) -> T:
    """Run an action that has no stop points of its own, a download or a library's conversion, and have some while it works.

    Once it stands still there are no more of them, unless this process is asked to stop: the other ranks then wait for this
    one, and after `topology.timeout_s` the watchdog says so. After a stop it is left alone, in a thread that ends with the
    process: only for what is safe to end at any moment.

    Args:
        watched: folders that it fills; it works as long as another process fills them, for which it may have to wait.
        signs: of its work; by default what the system counts of this process.
    """
    # Without a listener a stop request cannot be noticed, so a thread would be of no use.
    if _listener.get() is None:
        return action()
    results: list[T] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            results.append(action())
        except BaseException as error:  # raised again in the thread that waits
            failures.append(error)

    thread = threading.Thread(target=work, name="long work", daemon=True)
    signs, asked = signs or SignsOfWork(partial(process_counts, list(watched))), _asked.get()
    thread.start()
    while thread.is_alive():
        thread.join(_LOOK_S)
        if signs.fresh() or (asked is not None and asked()):
            stop_point()
    if failures:
        raise failures[0]
    return results[0]
