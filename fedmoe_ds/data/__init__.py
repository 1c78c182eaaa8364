"""Where text and images come from, how text becomes token sequences, and how samples are dealt to clients."""

from fedmoe_ds.data.federated import FederatedData, prepare
from fedmoe_ds.data.store import Sequences
from fedmoe_ds.data.task import ImageInput, Task, check_task

__all__ = ["FederatedData", "ImageInput", "Sequences", "Task", "check_task", "prepare"]
