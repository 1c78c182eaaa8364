"""Class sums: features of the targets of every class added up, and how many these are.

Legend: N targets, C classes (of images, or tokens), D width of a feature.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.model.objective import Sums

CLASS_FEATURES, CLASS_TARGETS = "features_per_class", "targets_per_class"
"""Sums [C, D] and [C] over targets."""
_ROWS = 4096
"""Targets at a time: of more, a row per class would take more memory than their logits."""


def class_shapes(classes: int, width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the two sums, for `Method.sums`."""
    return {CLASS_FEATURES: (classes, width), CLASS_TARGETS: (classes,)}


@torch.no_grad()
def class_sums(features_ND: Tensor, labels_N: Tensor, classes: int, counted: bool = True) -> Sums:
    """The two sums of these targets, float64; zeros under the same names where they are not `counted`."""
    features_CD = features_ND.new_zeros(classes, features_ND.shape[1], dtype=torch.float64)
    counts_C = features_ND.new_zeros(classes, dtype=torch.float64)
    for first in range(0, len(labels_N) if counted else 0, _ROWS):
        part = slice(first, first + _ROWS)
        # A product, which adds in one fixed order; adding at indices has none on a GPU.
        of_class_NC = (labels_N[part].unsqueeze(1) == torch.arange(classes, device=labels_N.device)).double()
        features_CD += of_class_NC.T @ features_ND[part].double()
        counts_C += of_class_NC.sum(0)
    return {CLASS_FEATURES: features_CD, CLASS_TARGETS: counts_C}


def class_means(sums: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """One client's mean feature of every class, zero for those that it does not have, and its targets of each."""
    counts_C = sums[CLASS_TARGETS]
    return sums[CLASS_FEATURES] / np.maximum(counts_C, 1.0)[:, None], counts_C
