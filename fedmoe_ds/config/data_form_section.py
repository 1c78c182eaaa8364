"""Data form: what becomes of an image set's pictures before clients see them."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from fedmoe_ds.config.section import Section

Kind = Literal["plain", "degraded", "grey-and-colour"]

# Whatever is not here belongs to another kind, and would have no effect.
_KEYS: dict[Kind, tuple[str, ...]] = {"plain": (), "degraded": ("blur", "noise", "skew"), "grey-and-colour": ("spread",)}
assert tuple(_KEYS) == get_args(Kind)


class DataFormConfig(Section):
    """What becomes of images before clients see them (docs/data.md)."""

    kind: Kind = Field(
        "plain",
        description="'plain': as they are; 'degraded': blurred and noisy by a drawn severity; 'grey-and-colour': two views, "
        "the digit and a blank in a colour of its class",
    )
    blur: float = Field(1.0, ge=0, description="degraded: standard deviation of the blur at severity 1, in pixels")
    noise: float = Field(0.5, ge=0, description="degraded: standard deviation of the noise at severity 1; ink is 1, paper -1")
    skew: float = Field(0.5, ge=0, le=1, description="degraded: share of a severity that all images of a client have alike")

    spread: float = Field(
        0.3, ge=0, description="grey-and-colour: standard deviation of a blank's red, green and blue about those of its class"
    )

    @model_validator(mode="after")
    def _check_keys(self) -> DataFormConfig:
        for name in sorted(self.model_fields_set - {"kind", *_KEYS[self.kind]}):
            # A saved configuration has all keys: only what differs from the default was asked for.
            if getattr(self, name) != type(self).model_fields[name].default:
                kinds = " or ".join(kind for kind, keys in _KEYS.items() if name in keys)
                raise ValueError(
                    f"data.form.{name}: {getattr(self, name)}: only data.form.kind={kinds} has it, and it is {self.kind}; "
                    "drop the key"
                )
        return self
