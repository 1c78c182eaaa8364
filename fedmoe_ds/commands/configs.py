"""Configs: the configurations that come with the package, by the names that --config takes, and what each is.

Those of studies are for `fedmoe compare --study` and `fedmoe scaling --config`, the others for `fedmoe train --config`.
"""

from __future__ import annotations

import argparse

from fedmoe_ds.config.shipped import FOLDER, shipped_names, summary
from fedmoe_ds.terminal import show


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", action="store_true", help="only the folder in which they lie")
    if parser.parse_args(argv).path:
        show(str(FOLDER))
        return 0
    names = shipped_names()
    width = max(map(len, names))
    show("\n".join(f"{name:{width}}  {summary(name)}" for name in names))
    return 0


if __name__ == "__main__":
    from fedmoe_ds.commands.program import start

    start("configs")
