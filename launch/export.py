"""Export: one of a run's models in a format that other tools load.

The program is `fedmoe_ds/export/command.py`; an installed package has it as `fedmoe export`.
"""

from fedmoe_ds.commands.program import start

if __name__ == "__main__":
    start("export")
