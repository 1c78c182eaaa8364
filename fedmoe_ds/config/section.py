"""Section: the base of every part of the configuration tree."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of all sections: strict types, no unknown keys, immutable."""

    # strict: YAML has types, so "4" for 4 is a mistake. frozen: what was checked and saved is what runs.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
