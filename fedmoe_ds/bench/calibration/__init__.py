"""Calibration: this machine as hardware for the planner."""
