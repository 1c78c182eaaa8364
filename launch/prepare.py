"""Prepare: `python launch/prepare.py --config configs/quickstart.yaml [key=value ...]`: before a job what its start would do.

The program is `fedmoe_ds/commands/prepare.py`; an installed package has it as `fedmoe prepare`.
"""

from fedmoe_ds.commands.program import start

if __name__ == "__main__":
    start("prepare")
