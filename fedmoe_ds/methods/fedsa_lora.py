"""FedSA-LoRA: train A and B, share A, keep B (Guo et al., ICLR 2025, arXiv 2410.01463).

A learns what is common, B what is the client's own; only A travels. Every client therefore has a model of its own: evaluation
scores the models of a tier's clients, each on its own hold-out and on the global one. A client that has not taken part yet
has B = 0, the foundation. All participants count in every A, as the paper says; one that routed no row to an expert sends
back what it received.
"""

from __future__ import annotations

from dataclasses import replace

from fedmoe_ds.methods import BlockSpec, Method, MethodInfo


class FedSALoRA(Method):
    """B is personal."""

    info = MethodInfo(
        title="FedSA-LoRA",
        paper="arXiv 2410.01463",
        adapts="active experts k",
        trains="LoRA A and B",
        sends="A; B stays with the client",
        weighs="data size",
        completion="the budget buys k; personal models are scored one by one",
    )
    needs = frozenset({"lora"})
    personal_models = True

    def blocks(self, specs: list[BlockSpec]) -> list[BlockSpec]:
        # Axis 1 counts ranks in B [out, R]; blocks without a rank axis, such as a trained router, are shared.
        return [replace(spec, personal=True) if spec.rank_axis == 1 else spec for spec in specs]
