"""Worker: one rank that `started.start` has started: `python -m fedmoe_ds.api.worker FOLDER [--resume auto]`."""

from __future__ import annotations

from fedmoe_ds.distributed.stop_request import StopRequest

STOP = StopRequest().install()  # before the imports that take seconds

import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from fedmoe_ds.api.running import run_here  # noqa: E402
from fedmoe_ds.api.started import tell  # noqa: E402
from fedmoe_ds.config import load_config  # noqa: E402
from fedmoe_ds.distributed.launcher import known_rank  # noqa: E402
from fedmoe_ds.distributed.runtime import run_entry  # noqa: E402
from fedmoe_ds.errors import EXIT_STOPPED, LostError, UserError  # noqa: E402


def main() -> int:
    """Run every job of the folder; the first that is stopped ends all. Returns the exit code."""
    folder, again = Path(sys.argv[1]), "auto" in sys.argv[2:]
    try:
        for path in sorted(folder.glob("*.yaml"), key=lambda path: int(path.stem)):
            resume = "auto" if again else path.with_suffix(".resume").read_text(encoding="utf-8")
            interrupted = run_here(load_config(path), resume, STOP)
            if known_rank() == 0:
                tell(path.with_suffix(".ending"), interrupted=interrupted)
            if interrupted is not None:
                return EXIT_STOPPED
    except (UserError, LostError) as error:
        tell(folder / f"error-{known_rank():06d}", error=str(error))
        raise
    return 0


if __name__ == "__main__":
    run_entry(main)
