"""Full size: OLMoE-1B-7B with random weights, trained for a round on two ranks, beside what the planner says."""
