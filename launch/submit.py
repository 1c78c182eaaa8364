"""Submit: a run as a SLURM job.

The program is `fedmoe_ds/commands/submit.py`; an installed package has it as `fedmoe submit`.
"""

from fedmoe_ds.commands.program import start

if __name__ == "__main__":
    start("submit")
