"""Cache: what runs have kept to start faster (prepared data, built-in and shared models, compiled kernels), and its removal.

    fedmoe cache list  [--kind KIND]
    fedmoe cache clean (--older-than DAYS | --all) [--kind KIND]

Nothing is asked. What a running job uses stays, links stay, and every entry that goes is told with its size and what it was
made from; a later start makes anew what it needs. Ages count from the last use.
"""

from __future__ import annotations

import argparse

from fedmoe_ds.errors import UserError
from fedmoe_ds.storage import cache, cleaning
from fedmoe_ds.terminal import show, visible


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("list", "clean"))
    parser.add_argument("--cache", metavar="FOLDER", help="as foundation.cache (default: $FEDMOE_CACHE or ~/.cache/fedmoe_ds)")
    parser.add_argument("--kind", choices=tuple(cache.KINDS), help="only entries of this kind")
    parser.add_argument("--older-than", type=float, metavar="DAYS", help="clean: what was not used for so long")
    parser.add_argument("--all", action="store_true", help="clean: whatever its age")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    root = cache.root(args.cache)
    if args.action == "list":
        if args.all or args.older_than is not None:
            raise UserError("list: --all and --older-than are for clean; drop them")
        show("\n".join(map(visible, cleaning.listing(root, args.kind).splitlines())))
        return 0
    if args.all == (args.older_than is not None):
        raise UserError("clean: say what goes: either --older-than DAYS, or --all (with --kind KIND: of this kind)")
    if args.older_than is not None and not args.older_than >= 0:
        raise UserError(f"--older-than: {args.older_than}: must be 0 or more days")
    for line in cleaning.clean(root, 0.0 if args.all else args.older_than, args.kind):
        show(visible(line))
    return 0


if __name__ == "__main__":
    from fedmoe_ds.commands.program import start

    start("cache")
