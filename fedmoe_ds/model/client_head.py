"""Client head: the head of one client, where clients train one (`adapters.head: train`).

The frozen head reads all rows of a pass out at once. A trained one is another for every client, so each client's hidden states
go through its own: the same product as a trained router's, whose gradient is added to the bank. A chunk of a client's targets
(`fedmoe_ds.model.cross_entropy`) adds to it where its logits are. How the rows of a client are cut depends on the client alone,
so not a bit of its gradient follows from who shares the pass.

Legend: N targets of one client, D model width, V vocabulary or classes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fedmoe_ds.kernels.per_client import Segment, client_bias, client_linear
from fedmoe_ds.model.adapter_bank import HEAD, HEAD_BIAS, Bank, BlockSpec
from fedmoe_ds.model.pass_context import Execution

_WHOLE_MODEL = -1


class ClientHead:
    """Logits of one client's hidden states by its own head: that of its slot in the bank.

    Args:
        slot: the client's home slot.
    """

    def __init__(self, execution: Execution, slot: int) -> None:
        self.execution, self.slot = execution, slot
        self.weight_CVD, self.grad_CVD = _both(execution.bank, HEAD)
        self.out_features = self.weight_CVD.shape[1]

    def __call__(self, x_ND: Tensor, /) -> Tensor:
        rows = [Segment(self.slot, 0, len(x_ND), 1)]
        y_NV = client_linear(x_ND, self.execution.anchor, self.weight_CVD, self.grad_CVD, rows)
        if HEAD_BIAS not in self.execution.bank:
            return y_NV
        bias_CV, grad_CV = _both(self.execution.bank, HEAD_BIAS)
        return client_bias(y_NV, bias_CV[self.slot], grad_CV[self.slot])


def _both(bank: Bank, name: str) -> tuple[Tensor, Tensor]:
    return bank.value(name, _WHOLE_MODEL), bank.grad(name, _WHOLE_MODEL)


def frozen_head(model: Any) -> nn.Linear:
    """The foundation's own head: of an image classifier, or the output matrix of a language model."""
    head = getattr(model, "classifier", None)
    found: nn.Linear = model.get_output_embeddings() if head is None else head
    return found


def head_path(model: Any) -> str:
    """Its name in the model."""
    head = frozen_head(model)
    path: str = next(name for name, module in model.named_modules() if module is head)
    return path


def head_blocks(model: Any) -> list[BlockSpec]:
    """The blocks of a trained head: its weight, and its bias where the foundation's has one."""
    head, whole = frozen_head(model), (_WHOLE_MODEL,)
    blocks = [BlockSpec(HEAD, whole, (head.out_features, head.in_features))]
    # No decay, as usual of what is added and not multiplied.
    return blocks if head.bias is None else [*blocks, BlockSpec(HEAD_BIAS, whole, (head.out_features,), decay=False)]


def head_values(model: Any) -> dict[str, Tensor]:
    """The foundation's own, by canonical key."""
    head = frozen_head(model)
    found = {f"model.{HEAD}": head.weight, f"model.{HEAD_BIAS}": head.bias}
    return {key: value for key, value in found.items() if value is not None}
