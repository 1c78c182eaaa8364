"""Data form: what becomes of an image set's pictures before clients see them."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, field_validator, model_validator

from fedmoe_ds.config.section import Section

Kind = Literal["plain", "degraded", "low-resolution", "spurious-colour", "grey-and-colour"]

# Whatever is not here belongs to another kind, and would have no effect.
_KEYS: dict[Kind, tuple[str, ...]] = {
    "plain": (),
    "degraded": ("blur", "noise", "skew"),
    "low-resolution": (),
    "spurious-colour": ("agreement", "holdout_agreement", "tied_to"),
    "grey-and-colour": ("spread",),
}
assert tuple(_KEYS) == get_args(Kind)


class DataFormConfig(Section):
    """What becomes of images before clients see them (docs/data.md)."""

    kind: Kind = Field(
        "plain",
        description="'plain': as they are; 'degraded': blurred and noisy by a drawn severity; 'low-resolution': 2x2 blocks "
        "at their mean, but for the public split; 'spurious-colour': in an ink that agrees with the label for most of them, "
        "and misleads in the global hold-out; 'grey-and-colour': two views, the digit and a blank in a colour of its class",
    )
    blur: float = Field(1.0, ge=0, description="degraded: standard deviation of the blur at severity 1, in pixels")
    noise: float = Field(0.5, ge=0, description="degraded: standard deviation of the noise at severity 1; ink is 1, paper -1")
    skew: float = Field(0.5, ge=0, le=1, description="degraded: share of a severity that all images of a client have alike")

    spread: float = Field(
        0.3, ge=0, description="grey-and-colour: standard deviation of a blank's red, green and blue about those of its class"
    )
    agreement: list[float] = Field(
        [0.9, 0.8],
        min_length=1,
        description="spurious-colour: by environment, how likely an image has its label's colour; clients take them in turn",
    )
    holdout_agreement: float = Field(0.1, ge=0, le=1, description="spurious-colour: the same in the global hold-out")
    tied_to: Literal["parity", "class"] = Field(
        "parity", description="spurious-colour: one of 2 colours by an even or odd label, or one of 10"
    )

    @field_validator("agreement")
    @classmethod
    def _are_probabilities(cls, agreement: list[float]) -> list[float]:
        for value in agreement:
            if not 0 <= value <= 1:
                raise ValueError(f"data.form.agreement: {value}: a probability is between 0 and 1")
        return agreement

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
