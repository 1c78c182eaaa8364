"""The `privacy:` section: what hides a single client in the global adapters."""

from __future__ import annotations

from pydantic import Field, model_validator

from fedmoe_ds.config.section import Section

ACCOUNTS = ("epsilon", "delta")
"""Keys of the account alone: they change no bit."""


class PrivacyConfig(Section):
    """Differential privacy of whole clients (docs/privacy.md). None without `clip`."""

    clip: float | None = Field(None, gt=0, description="C: largest L2 norm of a client's change in the sum; null: no privacy")
    noise_multiplier: float = Field(1.0, ge=0, le=1e6, description="z: noise of standard deviation z C on the sum of changes")
    delta: float = Field(1e-5, gt=0, lt=1, description="of (epsilon, delta); well below 1 / clients")
    epsilon: float | None = Field(None, gt=0, description="the most that federation.rounds may spend; more is refused")
    key_file: str | None = Field(
        None,
        min_length=1,
        description="file of 32 or more secret bytes that noise and participants are drawn by; null: by `seed`",
    )

    @model_validator(mode="after")
    def _check_clip(self) -> PrivacyConfig:
        for name, field in type(self).model_fields.items():
            if self.clip is None and name != "clip" and getattr(self, name) != field.default:
                raise ValueError(
                    f"privacy.{name}: {getattr(self, name)}: has no effect without privacy.clip; set that, or drop the key"
                )
        return self
