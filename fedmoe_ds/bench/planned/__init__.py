"""Planned: the planner's prediction beside a measurement of the same job."""
