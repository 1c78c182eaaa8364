"""Adapters: what clients train, as stacked per-client parameters."""
