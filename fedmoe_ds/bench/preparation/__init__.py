"""How long the preparation of a large data set takes, and what it leaves in the cache."""
