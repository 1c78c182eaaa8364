"""The walls of scale: what a cost of one process becomes as ranks, clients or parameters grow, as curves."""
