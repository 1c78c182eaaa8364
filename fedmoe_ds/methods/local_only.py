"""Local only: every client trains for itself, nothing is shared. The lower bound of what federation is good for."""

from __future__ import annotations

from dataclasses import replace

from fedmoe_ds.methods import BlockSpec, Config, Method, MethodInfo, UserError


class LocalOnly(Method):
    """All blocks are personal."""

    info = MethodInfo(
        title="local only",
        paper="bound",
        adapts="active experts k",
        trains="everything, alone",
        sends="nothing",
        weighs="nothing is averaged",
        completion="personal models are scored one by one",
    )
    averages = False
    personal_models = True

    def check_config(self, config: Config) -> None:
        if config.local.drift != "none":
            raise UserError(f"local.drift: {config.local.drift}: method local-only has no global model to drift from; use none")

    def blocks(self, specs: list[BlockSpec]) -> list[BlockSpec]:
        # Personal blocks are never averaged, and with none left over nothing is sent.
        return [replace(spec, personal=True) for spec in specs]
