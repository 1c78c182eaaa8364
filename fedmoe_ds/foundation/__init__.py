"""The frozen model, sparse or dense: presets, on-the-spot pre-training, sharded loading, hosted experts, feed-forward sites."""

from fedmoe_ds.foundation.autoep import HostedLayer
from fedmoe_ds.foundation.dense import FeedForwardSite
from fedmoe_ds.foundation.foundation import (
    Foundation,
    load_foundation,
    planned_sparse,
    planned_task,
    resolve_foundation,
)

__all__ = [
    "FeedForwardSite",
    "Foundation",
    "HostedLayer",
    "load_foundation",
    "planned_sparse",
    "planned_task",
    "resolve_foundation",
]
