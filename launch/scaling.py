"""Scaling: a study over ranks, ep_size, clients, experts or k.

The program is `fedmoe_ds/commands/scaling.py`; an installed package has it as `fedmoe scaling`.
"""

from fedmoe_ds.commands.program import start

if __name__ == "__main__":
    start("scaling")
