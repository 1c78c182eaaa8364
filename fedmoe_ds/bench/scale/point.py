"""One point of a curve, in a process of its own: `python -m fedmoe_ds.bench.scale.point NAME X FILE`.

The file gets the figures, and with them `peak_mib`: the peak of resident memory, interpreter and imports included.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from fedmoe_ds.bench.scale.curve import SECONDS, load_curve
from fedmoe_ds.machine import peak_mib


def main() -> None:
    name, x, file = sys.argv[1:]
    curve = load_curve(name)
    began = time.perf_counter()
    found = dict(curve.measure(int(x)))
    seconds = time.perf_counter() - began
    # As floats: a figure that NumPy or torch computed must not decide whether the point can be written.
    figures = {SECONDS: seconds, **{key: float(value) for key, value in found.items()}, "peak_mib": peak_mib()}
    Path(file).write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
