"""Compare: methods x seeds as runs, with one report about all of them.

The program is `fedmoe_ds/commands/compare.py`; an installed package has it as `fedmoe compare`.
"""

from fedmoe_ds.commands.program import start

if __name__ == "__main__":
    start("compare")
