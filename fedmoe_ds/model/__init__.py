"""Model: adapters as stacked per-client parameters, capped routing, dispatch over the expert-parallel group, experts."""
