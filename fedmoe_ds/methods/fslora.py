"""FSLoRA: random sketches of a global LoRA (Fang et al., arXiv 2501.19389).

    client i minimises E_S f_i(W + B S A),   S = diag: R / r_i on a random subset of r_i of the R coordinates, 0 elsewhere

so E[S] = I. A fresh subset is drawn for every client and round; the client trains only those columns of B and rows of A, and
the server adds the plain mean of the participants' changes. The paper feeds that mean to an optimizer: `server.optimizer`.

A participant that did not train a coordinate, or an expert, counts as a change of zero: that is the plain mean over all of
them.

Our completions: one subset for all adapters of a client; evaluation uses all coordinates with S = I at every tier.
"""

from __future__ import annotations

import numpy as np

from fedmoe_ds.methods import Assignment, BlockSpec, Client, ClientUpdate, Method, MethodInfo, RoundContext, generator


class FSLoRA(Method):
    """Random rows instead of leading ones."""

    info = MethodInfo(
        title="FSLoRA",
        paper="arXiv 2501.19389",
        adapts="LoRA rank r",
        trains="r random rows of A, columns of B",
        sends="changes of those",
        weighs="equal",
        completion="one subset for all adapters of a client; evaluation with S = I",
    )
    spends = "rank"
    needs = frozenset({"lora"})
    unequal_ranks = True
    missing_rows = "global"

    def assign(self, client: Client, context: RoundContext) -> Assignment:
        full = self.facts.rank
        # Round 0 is the evaluation of a tier, with all coordinates; so is a client that can afford all of them, with S = I.
        if context.round == 0 or client.rank >= full:
            return Assignment(client.cap)
        # Addressed by round and client: every rank draws the same subset, and a resumed round the same again.
        draw = generator(self.facts.seed, "sketch", context.round, client.index)
        rows_R = np.zeros(full, dtype=bool)
        rows_R[draw.choice(full, size=client.rank, replace=False)] = True
        # R / r makes up for the coordinates left out: E[S] = I, so the sketched gradient is right in the mean.
        return Assignment(client.cap, rows_R, scale=full / client.rank)

    def weights(self, spec: BlockSpec, update: ClientUpdate, data_share: float) -> np.ndarray:
        # Alike for all, also where the client routed no row: it counts as a change of zero.
        return super().weights(spec, update, 1.0)
