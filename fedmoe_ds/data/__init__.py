"""Where text comes from, how it becomes token sequences, and how the sequences are dealt to clients."""

from fedmoe_ds.data.federated import FederatedData, prepare
from fedmoe_ds.data.store import Sequences

__all__ = ["FederatedData", "Sequences", "prepare"]
