"""Memory: bytes of a client in flight, of two hundred rounds, of a foundation, and of loading one."""
