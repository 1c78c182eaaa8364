"""Clients: who they are, what they do in a round, and the fused local training of those in flight."""
