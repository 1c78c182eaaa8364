"""Train: the script that deepspeed, torchrun, mpirun and srun start, and plain python.

The program is `fedmoe_ds/commands/train.py`; an installed package has it as `fedmoe train`.
"""

from fedmoe_ds.commands.program import start

if __name__ == "__main__":
    start("train")
