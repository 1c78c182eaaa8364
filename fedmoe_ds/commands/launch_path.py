"""Launch path: where the script is that a launcher starts: `deepspeed $(fedmoe launch-path train) --config quickstart`.

In the repository it is the program behind launch/train.py, which may as well be given.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fedmoe_ds.commands.program import COMMANDS, LAUNCHED, refuse
from fedmoe_ds.errors import UserError
from fedmoe_ds.terminal import show


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subcommand", help=f"{LAUNCHED}: the one whose ranks a launcher starts")
    name = parser.parse_args(argv).subcommand
    show(str(script(name)))
    return 0


def script(name: str) -> Path:
    """Raises UserError for a subcommand that no launcher starts, or that there is not."""
    if name not in COMMANDS:
        refuse(name)
    if name != LAUNCHED:
        raise UserError(
            f"launch-path: {name}: no launcher starts it, it has no ranks; call `fedmoe {name}`, or give {LAUNCHED}"
        )
    return Path(__file__).with_name(f"{COMMANDS[LAUNCHED].module.rpartition('.')[2]}.py")


if __name__ == "__main__":
    from fedmoe_ds.commands.program import start

    start("launch-path")
