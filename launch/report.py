"""Report: the page of a run, or of several side by side.

The program is `fedmoe_ds/commands/report.py`; an installed package has it as `fedmoe report`.
"""

from fedmoe_ds.commands.program import start

if __name__ == "__main__":
    start("report")
