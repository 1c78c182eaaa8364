"""Loss-guided selection: clients whose last training loss was high are drawn more often. A method outside the package."""

import numpy as np
from pydantic import Field

from fedmoe_ds.methods import ClientUpdate, Method, MethodInfo, MethodParams, PlanContext, RoundPlan, generator


class StrugglingParams(MethodParams):
    power: float = Field(1.0, ge=0, le=8, description="chances in proportion to loss^power; 0: all alike")


class Struggling(Method):
    Params = StrugglingParams
    info = MethodInfo(
        title="Struggling",
        paper="example",
        adapts="active experts k",
        trains="LoRA A and B",
        sends="A, B, its loss",
        weighs="data size",
        completion="all of it",
    )

    def memory(self) -> dict[str, tuple[int, ...]]:
        return {"loss": ()}

    def memorise(self, update: ClientUpdate) -> dict[str, np.ndarray]:
        assert update.losses is not None, "the home rank knows them, and this is called there"
        return {"loss": np.array(update.losses[1])}

    def plan(self, context: PlanContext) -> RoundPlan:
        known = {index: float(memory["loss"]) for index, memory in sorted(context.memories.items())}
        # Who was never trained counts as the mean of the others.
        usual = float(np.mean(list(known.values()))) if known else 1.0
        chances = np.array([known.get(client.index, usual) ** self.params.power for client in context.clients])
        # Addressed by the round: every rank draws the same, and a resumed round the same again.
        draw = generator(self.facts.seed, "struggling", context.round)
        chosen = draw.choice(len(chances), size=len(context.drawn), replace=False, p=chances / chances.sum())
        return RoundPlan([context.clients[int(place)] for place in chosen])
