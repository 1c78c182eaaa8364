"""All-reduce: the sums of a round against the libraries' own."""
