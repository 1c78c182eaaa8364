"""Experts: capped routing, dispatch over the expert-parallel group, grouped products with a client axis."""
