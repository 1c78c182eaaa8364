"""The frozen sparse mixture-of-experts model: presets, on-the-spot pre-training, sharded loading, expert hosting."""

from fedmoe_ds.foundation.foundation import Foundation, load_foundation, resolve_foundation
from fedmoe_ds.foundation.hosting import HostedLayer

__all__ = ["Foundation", "HostedLayer", "load_foundation", "resolve_foundation"]
