"""Generate: what a run's model answers.

The program is `fedmoe_ds/results/generate_command.py`; an installed package has it as `fedmoe generate`.
"""

from fedmoe_ds.commands.program import start

if __name__ == "__main__":
    start("generate")
