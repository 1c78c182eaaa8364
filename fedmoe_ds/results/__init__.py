"""What a run has learnt, opened in one process: evaluated, asked, and handed to `fedmoe_ds.export`."""

from fedmoe_ds.results.run_checkpoint import round_choice
from fedmoe_ds.results.trained_run import Selection, TrainedRun, open_run

__all__ = ["Selection", "TrainedRun", "open_run", "round_choice"]
