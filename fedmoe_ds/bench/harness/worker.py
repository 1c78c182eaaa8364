"""Worker: the end of a `Program` that answers: `python -m fedmoe_ds.bench.harness.worker MODULE NAME`.

The module's `make_worker(name)` returns an object whose methods are the requests. Flower's environment imports this file.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from fedmoe_ds.errors import UserError

Request = dict[str, Any]


def take_channel() -> TextIO:
    """What was standard output. Whatever libraries print goes to standard error from now on."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return channel


def reply(worker: Any, request: Request) -> str:
    """The line that answers `{"do": METHOD, **arguments}`; a user's mistake is an answer, too."""
    try:
        arguments = {name: value for name, value in request.items() if name != "do"}
        return json.dumps({"result": getattr(worker, request["do"])(**arguments)}) + "\n"
    except UserError as error:
        return json.dumps({"user_error": str(error)}) + "\n"


def serve(worker: Any, requests: Iterable[str], write: Callable[[str], Any]) -> None:
    """Answer until the requests end."""
    for line in requests:
        write(reply(worker, json.loads(line)))


def main() -> None:
    channel = take_channel()  # before the module's imports, which may print
    import torch

    torch.set_num_threads(1)  # before anything is computed: all figures are those of one thread
    module, name = sys.argv[1:]
    serve(importlib.import_module(module).make_worker(name), sys.stdin, channel.write)
    channel.flush()
    os._exit(0)  # no atexit handler may wait for peers


if __name__ == "__main__":
    main()
