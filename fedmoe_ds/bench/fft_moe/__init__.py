"""FFT-MoE: what a large pool of adapter experts costs a client step."""
