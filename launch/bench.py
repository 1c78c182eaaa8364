"""Measure: every number that this project claims.

The program is `fedmoe_ds/commands/bench.py`; an installed package has it as `fedmoe bench`.
"""

from fedmoe_ds.commands.program import start

if __name__ == "__main__":
    start("bench")
