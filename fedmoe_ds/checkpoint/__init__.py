"""Checkpoint: what a run writes between waves and a start reads: state, personal state, skipped clients, digest."""
