"""The `evaluation:` and `checkpoint:` sections: which rounds are scored, which are kept, and which of them is the best."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from fedmoe_ds.config.section import Section


class EvaluationConfig(Section):
    """Perplexity and next-token accuracy at every budget tier, and what the task asks for."""

    every: int = Field(1, ge=1, description="rounds between evaluations; the last round is always evaluated")
    batch_size: int = Field(8, ge=1)
    max_sequences: int | None = Field(64, ge=1, description="cap on the global hold-out; null: all of it")
    client_sequences: int = Field(2, ge=0, description="hold-out sequences per client; 0: no per-client evaluation")
    clients_every: int = Field(0, ge=0, description="rounds between per-client evaluations; 0: foundation and last")
    metrics: list[Literal["exact_match", "ranked_choice"]] = Field(
        default_factory=list,
        description="beside perplexity and accuracy; exact_match: greedy decoding gives the answer, token by token, for no "
        "further pass; ranked_choice: of all answers in the data the right one is the likeliest, one more pass for each",
    )
    generations: int = Field(
        0, ge=0, description="hold-out samples whose greedy answers, before and after, are written as text into run and report"
    )
    max_new_tokens: int = Field(32, ge=1, description="longest answer of `generations`; a whole pass for each token")


class CheckpointConfig(Section):
    """Round checkpoints."""

    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    every: int = Field(1, ge=1, description="rounds between checkpoints; the last round is always saved")
    background: bool = Field(True, description="write a copy while the next round trains; false: wait for the disk")
    best: Literal["perplexity", "accuracy", "exact_match", "ranked_choice"] | None = Field(
        None, description="keep the checkpoint of the best evaluated round by this metric beside the newest ones, too"
    )
    best_split: Literal["global", "clients"] = Field("global", description="the hold-out that decides which round is best")
    best_tier: str | None = Field(None, description="the tier that decides, as outputs call it (4, or 4 r2); null: the largest")

    @field_validator("best_tier", mode="before")
    @classmethod
    def _label_of_a_number(cls, given: Any) -> Any:
        # Most labels are a top-k, which YAML reads as a number.
        return str(given) if isinstance(given, int) and not isinstance(given, bool) else given


def problem_of_best(checkpoint: CheckpointConfig, evaluation: EvaluationConfig) -> str | None:
    """What keeps `checkpoint.best` from ever finding its figures; None: nothing."""
    best = checkpoint.best
    if best in ("exact_match", "ranked_choice") and best not in evaluation.metrics:
        return f"checkpoint.best: {best}: it is not evaluated; add it to evaluation.metrics"
    # Clients' hold-outs are scored after the last round in any case, and one round cannot be the best of several.
    if best is not None and checkpoint.best_split == "clients":
        needed = {"clients_every": evaluation.clients_every, "client_sequences": evaluation.client_sequences}
        for key in (key for key, value in needed.items() if value == 0):
            return (
                f"checkpoint.best_split: clients: evaluation.{key} is 0, so no round is scored on clients' hold-outs; set it "
                "to 1 or more, or use best_split=global"
            )
    return None
