"""The harness of measurements: systems in processes of their own, in alternating repeats, and what is written of them."""
