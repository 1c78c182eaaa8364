"""Studies: many runs, one table: `compare/` methods, `scaling/` over ranks, experts and clients."""
