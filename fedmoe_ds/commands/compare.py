"""Compare: methods x seeds as runs of launch/train.py, resumable, with one report about all of them.

    fedmoe compare --methods flame,fedit --seeds 3 --jobs 2 [key=value ...]

A run lives in <output>/<label>-seed<k>, its resolved configuration and its messages beside it (.yaml, .log). Started again, the
same command leaves finished runs alone and continues the others; SIGINT or SIGTERM stops all of them with checkpoints.

--methods lists labels, separated by commas. A label is a method, or an entry under `methods` of the study file. It may add
keys: flame:method.temperature=0+method.rescaler=none (values with ',' or '+' belong into the study file); its label is then
flame-temperature-0-rescaler-none. Every key takes its value from the last of
  1. the base configuration (--config): foundation, data, federation, local training;
  2. the method's own keys: the `method` section of methods/<name>.yaml beside the study file (without that file, the method's
     defaults), then the keys that the study file lists for the label under `take` (from the same file) and `set`;
  3. key=value of this command line, for every run;
  4. the keys of the entry in --methods.
The seed decides data, foundation and training; all methods of one seed share foundation and data, which is checked at the end.
The study file also lists published orderings; the report says which of them held, did not hold, or are not decided: paired
t-tests over seeds, p-values corrected by Holm. Three seeds decide next to nothing. --seeds may be raised: finished runs stay.
The study `orderings` has those of the systems in docs/seeds.md:

    fedmoe compare --study orderings --config methods/fednova --methods fednova,fedavg --seeds 5

Exit code: 0 when every run is finished, 2 for a mistake in the input, otherwise 1.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from fedmoe_ds.terminal import note, show


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run, for instance federation.rounds=20")
    parser.add_argument("--methods", required=True, help="labels, separated by commas")
    parser.add_argument("--seeds", type=int, default=3, help="runs per method, with seeds 0, 1, ... (default: 3)")
    parser.add_argument("--config", type=Path, default=Path("compare"), help="base, as of train (default: %(default)s)")
    parser.add_argument("--study", type=Path, default=Path("compare-study"), help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), help="folder of all runs (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: 1)")
    parser.add_argument("--ranks", type=int, default=1, help="ranks per run: 1 is plain python, more the deepspeed launcher")
    parser.add_argument("--report", type=Path, help="write the text (.md) and the picture beside it here too")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    # Copied before the next line: the runs get the user's own choice of accelerator.
    environment = dict(os.environ)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # this process trains nothing; the runs choose for themselves
    from fedmoe_ds.studies.compare import Request, compare

    code, text = compare(Request(**vars(args)), Path(__file__).with_name("train.py"), environment, note)
    show(text)
    return code


if __name__ == "__main__":
    from fedmoe_ds.commands.program import start

    start("compare")
