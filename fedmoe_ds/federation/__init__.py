"""Federation: one run from its configuration to its last round."""
