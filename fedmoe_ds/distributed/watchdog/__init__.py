"""Watchdog: no job hangs because one of its ranks is gone."""
