"""Distributed: how ranks start, where they are, what they say to each other, and how a job ends."""
