"""Baselines: what users have today: Flower's simulation engine, and DeepSpeed's own MoE layer."""
