"""EmbracingFL: weak clients train the layers next to the output (Lee et al., arXiv 2406.15125, IEEE TMC 2024).

Legend: N transformer layers of the model.

    client i trains its last n_i layers:   trained_i = {l : l >= N - n_i},   0 <= l < N
    w_l <- sum_{i in C_l} p_i w_l^i / sum_{i in C_l} p_i,   C_l = {i : l in trained_i},   p_i = |D_i| / sum |D|

READ (abstract, a public review): every client trains as many consecutive output-side layers as its memory holds; its input-side
layers only run forward, and a forward pass in several steps keeps the whole model out of its memory at any time; strong clients
have all of the memory, moderate ones about 40 %, weak ones about 15 %; layers are said to become alike across clients, those at
the output most; better than width reduction (HeteroFL, FjORD). NOT FOUND: the layers of each model that a share of memory buys,
the weights of the mean; no public code.

COMPLETION:
- `federation.tiers.N.layers` says n_i; without it a tier has the share top_k / K of the layers, at least one. A layer is its
  adapters of attention and of the feed-forward block, its experts, its router. What serves the whole model is trained by all.
- The mean goes over the clients that train the layer, by data size. A layer that nobody trains keeps its value.
- Evaluation is of the whole model at every tier: depth is what training costs, and no client serves a part.

Limits: the passes of several steps are a technique of devices and change no value, so they are not played through. The engine
saves what a client saves where a pass holds no deeper one: layers before the first that is trained run without autograd, so
their activations are not kept and their gradients not computed. FLOPs count so for every client. The foundation is frozen, so
"training a layer" is training its adapters; the paper trains the layers themselves.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedmoe_ds.methods import Assignment, Client, Method, MethodInfo, RoundContext


class EmbracingFL(Method):
    """A budget buys layers, counted from the output."""

    info = MethodInfo(
        title="EmbracingFL",
        paper="arXiv 2406.15125",
        adapts="layers trained, from the output",
        trains="everything in its last layers",
        sends="what it trains",
        weighs="data size among those who train the layer",
        completion="the layers that a tier buys; weights; evaluation of the whole model at every tier",
    )
    spends = "layers"

    def assign(self, client: Client, context: RoundContext) -> Assignment:
        assignment, depth = super().assign(client, context), self.facts.depth
        # A client of full depth is told nothing: it then is FedAvg's, to the bit. So is the evaluation, which trains nothing.
        if client.layers is None or client.layers >= depth or context.round == 0:
            return assignment
        return replace(assignment, trained_N=np.arange(depth) >= depth - client.layers)
