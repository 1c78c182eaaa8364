"""Frozen layers of a Hugging Face model, replaced by ones that treat every row by itself and in one pass over memory.

Legend: T rows, I input width, O output width, D model width.

Linear maps, RMS norms and rotary embeddings of a frozen model need the gradient of their input alone, so each is one autograd
function over one native kernel (`fedmoe_ds.kernels`). A bfloat16 model of a family that consists of nothing else keeps its
weights in bfloat16 and computes with float32 rows between its products: half the memory, and the products at their higher rate.
Where the kernels do not serve (other families in bfloat16, no compiler) the model stays as it is.

On a GPU linear maps stay PyTorch's. Norms and rotary embeddings of every family that computes them in the plain way become the
same autograd functions there, over `rows_on_device`: rows keep the type of the model, and of a norm its input and one number
per row are kept for the backward pass, where the operations of transformers keep a float32 copy of a bfloat16 input.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmoe_ds.kernels import matrix, rows, rows_on_device

INDEPENDENT = ("llama", "mistral", "mixtral", "olmo2", "olmoe", "qwen2", "qwen3", "qwen3_moe")
"""Model types in which, with these layers, no row's bits depend on the other rows of a pass: linear maps, RMS norms, rotary
embeddings, softmax routing, and experts that are all in the pool. Tests train each with one and with many clients in a pass."""


def is_batch_invariant(model_type: str, dtype: str, device: str) -> bool:
    """Whether clients may share a pass without a change to each other's bits, on this kind of device."""
    compiled = matrix.available() and rows.available()
    return model_type in INDEPENDENT and dtype in ("float32", "bfloat16") and device == "cpu" and compiled


def frozen_rows(x: Tensor, weight_OI: Tensor, transposed: bool) -> Tensor:
    """x W^T where `transposed`, else x W; no autograd."""
    y = matrix.product(x, weight_OI, transposed)
    return y if y is not None else x @ (weight_OI.t() if transposed else weight_OI)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        # x is not saved: dx = dy W needs the frozen weight alone, and there is no gradient for W.
        ctx.weight_OI = weight_OI
        return frozen_rows(x, weight_OI, transposed=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        return (frozen_rows(grads[0], ctx.weight_OI, transposed=False) if ctx.needs_input_grad[0] else None), None


def frozen_product(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T for a weight that is not trained."""
    return _FrozenProduct.apply(x, weight_OI)  # type: ignore[no-any-return, no-untyped-call]


class FrozenLinear(nn.Linear):
    """A linear layer whose parameters are not trained; they stay the same objects."""

    def __init__(self, linear: nn.Linear) -> None:
        # Not Linear's own constructor, which would allocate and fill a second weight.
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, input: Tensor) -> Tensor:
        y = frozen_product(input, self.weight)
        return y if self.bias is None else y + self.bias


class _RowNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        # The kernel takes pointers to dense rows; 1 / rms is kept so that the backward pass need not sum again.
        x = x.contiguous()
        found: tuple[Tensor, Tensor] = _kernels(x).norm(x, weight_D, eps)
        y, inverse_T = found
        ctx.save_for_backward(x, inverse_T)
        ctx.weight_D = weight_D
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, inverse_T = ctx.saved_tensors
        dx: Tensor = _kernels(x).norm_backward(grads[0].contiguous(), x, ctx.weight_D, inverse_T)
        return dx, None, None


def _kernels(x: Tensor) -> ModuleType:
    return rows_on_device if rows_on_device.serves(x) else rows


class RowNorm(nn.Module):
    """w x / sqrt(mean(x^2) + eps) with a frozen w (Zhang & Sennrich, arXiv 1910.07467)."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = weight, eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        # No copy where the model is float32; in a bfloat16 model on a CPU rows and norms are float32 between products.
        weight_D = self.weight.float() if self.weight.device.type == "cpu" else self.weight
        return _RowNorm.apply(hidden_states, weight_D, self.variance_epsilon)  # type: ignore[no-any-return, no-untyped-call]


class FloatEmbedding(nn.Module):
    """A frozen embedding whose rows come out in float32, whatever it stores."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight, self.padding_idx = embedding.weight, embedding.padding_idx

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.weight).float()


class _Rotation(torch.autograd.Function):
    """Heads [B, H, S, K] as attention holds them: views of [B, S, H, K]. Angles are [B, S, K], the same for all heads."""

    @staticmethod
    def forward(ctx: Any, x_BHSK: Tensor, cosine_BSK: Tensor, sine_BSK: Tensor) -> Tensor:
        ctx.save_for_backward(cosine_BSK, sine_BSK)
        return _turned(x_BHSK, cosine_BSK, sine_BSK, back=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cosine_BSK, sine_BSK = ctx.saved_tensors
        return _turned(grads[0], cosine_BSK, sine_BSK, back=True), None, None


def _turned(x_BHSK: Tensor, cosine_BSK: Tensor, sine_BSK: Tensor, back: bool) -> Tensor:
    x_BSHK = x_BHSK.transpose(1, 2)
    if rows_on_device.serves(x_BHSK):
        return rows_on_device.rotate(x_BSHK, cosine_BSK, sine_BSK, back).transpose(1, 2)
    # Usually no copy: the heads are views of [B, S, H, K], where a row's heads lie next to each other.
    x_BSHK = x_BSHK.contiguous()
    turned = rows.rotate(x_BSHK.flatten(0, 1), cosine_BSK.flatten(0, 1), sine_BSK.flatten(0, 1), back)
    return turned.view(x_BSHK.shape).transpose(1, 2)


Rotary = Callable[..., tuple[Tensor, Tensor]]


def batch_invariant_rotary(original: Rotary) -> Rotary:
    """`apply_rotary_pos_emb` of a transformers model; `original` serves what the kernel does not."""

    @functools.wraps(original)
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        # Some families rotate only a part of a head, or lay their axes out otherwise: these keep their own function.
        whole = q.shape[-1] == k.shape[-1] == cos.shape[-1] and cos.dim() == 3
        native = rows.serves(q, k, cos, sin)
        if unsqueeze_dim != 1 or not whole or not (native or rows_on_device.serves(q, k, cos, sin)):
            return original(q, k, cos, sin, unsqueeze_dim)
        shape = (q.shape[0], q.shape[2], cos.shape[-1])
        cosine_BSK, sine_BSK = cos.expand(shape), sin.expand(shape)
        if native:
            # Dense, once for both; on a device one row of angles serves all sequences where it did in the model.
            cosine_BSK, sine_BSK = cosine_BSK.contiguous(), sine_BSK.contiguous()
        turned: list[Tensor] = [_Rotation.apply(x, cosine_BSK, sine_BSK) for x in (q, k)]  # type: ignore[no-untyped-call]
        return turned[0], turned[1]

    apply_rotary_pos_emb.batch_invariant = True  # type: ignore[attr-defined]
    return apply_rotary_pos_emb


def row_dtype(model: Any) -> torch.dtype:
    """The type of the rows between a model's products, once `replace_frozen` has seen it."""
    weight = next(model.parameters())
    short = str(weight.dtype).removeprefix("torch.")
    return torch.float32 if is_batch_invariant(model.config.model_type, short, weight.device.type) else weight.dtype


def replace_frozen(model: Any) -> None:
    """Put layers that treat every row by itself into a frozen model, where kernels serve its weights. Safe to call again."""
    device = next(model.parameters()).device.type
    if device != "cuda" and row_dtype(model) != torch.float32:
        return
    replacement = _batch_invariant if device != "cuda" else functools.partial(_row_norm, dtype=row_dtype(model))
    # A list: modules are replaced while the loop runs.
    for name, module in list(model.named_modules()):
        new = replacement(module)
        if new is not None:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, new)
    for home in {type(module).__module__ for module in model.modules()}:
        _replace_rotary(sys.modules[home])


def _batch_invariant(module: nn.Module) -> nn.Module | None:
    # `type is` and not isinstance: a subclass may compute something else, and a layer replaced before stays as it is.
    if type(module) is nn.Linear and matrix.serves(module.weight) and not module.weight.requires_grad:
        return FrozenLinear(module)
    if type(module) is nn.Embedding and module.weight.dtype == torch.bfloat16:
        return FloatEmbedding(module)
    return _row_norm(module)


def _row_norm(module: nn.Module, dtype: torch.dtype | None = None) -> RowNorm | None:
    """A norm in one pass where this module is one; `dtype`: of the rows on a device, where they have the weights' type."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, nn.Parameter) or not isinstance(eps, float):
        return None
    # Of a float32 weight in a bfloat16 model families make different types of rows: such a norm stays as it is.
    served = rows_on_device.serves(weight) and weight.dtype == dtype if dtype else rows.serves(weight.float())
    suits = served and not weight.requires_grad and _is_plain_norm(module, weight, eps)
    return RowNorm(weight, eps) if suits else None


@torch.no_grad()
def _is_plain_norm(module: nn.Module, weight_D: Tensor, eps: float) -> bool:
    """Families differ in what they call an RMS norm (some scale by 1 + w): ask the layer itself."""
    x_TD = torch.linspace(-2.0, 3.0, 4 * len(weight_D), device=weight_D.device).view(4, -1).sin()
    plain_TD = weight_D.float() * x_TD * torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + eps)
    return torch.allclose(module(x_TD).float(), plain_TD, rtol=1e-5, atol=1e-6)


def _replace_rotary(home: Any) -> None:
    """Attention layers call their module's function by name, so that is the place to put another."""
    original = getattr(home, "apply_rotary_pos_emb", None)
    if original is None or not home.__name__.startswith("transformers.models.") or hasattr(original, "batch_invariant"):
        return
    if _is_plain_rotary(original):
        home.apply_rotary_pos_emb = batch_invariant_rotary(original)


@torch.no_grad()
def _is_plain_rotary(original: Rotary) -> bool:
    """Families differ in which numbers of a head they turn together, under one name and with equal shapes: ask the function."""
    if list(inspect.signature(original).parameters) != ["q", "k", "cos", "sin", "unsqueeze_dim"]:
        return False
    # The angles of the two halves differ: a function that reads one half of them for both is another one.
    drawn = torch.linspace(-2.0, 3.0, 5 * 24).sin().view(1, 5, 3, 8)
    q, k, cos, sin = drawn[:, :2], drawn[:, 2:3], drawn[:, 3:4], drawn[:, 4:]
    plain = [x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin for x in (q, k)]
    found = original(q, k, cos[0], sin[0])
    return all(torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6) for ours, theirs in zip(plain, found, strict=True))
