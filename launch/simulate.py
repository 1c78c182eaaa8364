"""Simulate: a federation of any size on paper: rates, bytes, memory, failures, and the next walls.

The program is `fedmoe_ds/commands/simulate.py`; an installed package has it as `fedmoe simulate`.
"""

from fedmoe_ds.commands.program import start

if __name__ == "__main__":
    start("simulate")
