"""The workload as a Flower app, in Flower's simulation engine. It runs in an environment of its own: see `requirements.txt`.

Nothing here may import what that environment lacks: DeepSpeed, and whatever of this package needs it.
"""
