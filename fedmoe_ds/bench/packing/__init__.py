"""Packing: a wave on short samples, packed and unpacked, with whole steps and with micro-batches."""
