"""Rounds: where the time of whole rounds goes, and what being federated costs."""
