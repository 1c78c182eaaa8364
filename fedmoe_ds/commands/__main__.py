"""`python -m fedmoe_ds.commands SUBCOMMAND ...`: the same as `fedmoe SUBCOMMAND ...`."""

from fedmoe_ds.commands.program import main

if __name__ == "__main__":
    main()
