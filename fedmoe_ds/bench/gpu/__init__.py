"""GPU: what one short visit to a machine with a GPU should measure, in order of value."""
