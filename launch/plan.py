"""Plan: what a run would take, before it is queued.

The program is `fedmoe_ds/commands/plan.py`; an installed package has it as `fedmoe plan`.
"""

from fedmoe_ds.commands.program import start

if __name__ == "__main__":
    start("plan")
