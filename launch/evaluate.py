"""Evaluate: a run, a checkpoint or a model folder is scored.

The program is `fedmoe_ds/results/evaluate_command.py`; an installed package has it as `fedmoe evaluate`.
"""

from fedmoe_ds.commands.program import start

if __name__ == "__main__":
    start("evaluate")
