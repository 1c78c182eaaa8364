"""Cache: what runs have kept to start faster, and its removal.

The program is `fedmoe_ds/commands/cache.py`; an installed package has it as `fedmoe cache`.
"""

from fedmoe_ds.commands.program import start

if __name__ == "__main__":
    start("cache")
