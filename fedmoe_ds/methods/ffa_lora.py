"""FFA-LoRA: freeze A, train and average B (Sun et al., ICLR 2024, arXiv 2403.12313).

With one fixed random A for everybody, sum_k p_k B_k A is the product of the means: aggregation is exact and half the size.
All participants count in every B, as the paper says; one that routed no row to an expert sends back what it received.
Everything that is no LoRA pair (a trained router) is averaged by data size.
"""

from __future__ import annotations

from dataclasses import replace

from fedmoe_ds.methods import BlockSpec, Method, MethodInfo


class FFALoRA(Method):
    """B alone."""

    info = MethodInfo(
        title="FFA-LoRA",
        paper="arXiv 2403.12313",
        adapts="active experts k",
        trains="LoRA B; A frozen at its initial value",
        sends="B",
        weighs="data size",
        completion="the budget buys k",
    )
    needs = frozenset({"lora"})

    def blocks(self, specs: list[BlockSpec]) -> list[BlockSpec]:
        # Axis 0 counts ranks in A [R, in]. Not trained: no optimizer and no aggregation, so A keeps its drawn value.
        return [replace(spec, trained=False) if spec.rank_axis == 0 else spec for spec in specs]
