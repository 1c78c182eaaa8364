"""Prompt: the text around an instruction and its answer, and the presets that published work uses.

A prompt is repeated to the letter at inference, so everything in it is a setting, and docs/data.md shows every preset.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from pydantic import Field, model_validator

from fedmoe_ds.config.section import Section

Input = Literal["if_any", "always", "ignored", "only"]
Preset = Literal[
    "plain", "alpaca", "openfedllm", "flowertune-general", "flowertune-finance", "flowertune-medical", "flowertune-code"
]


@dataclass(frozen=True)
class Prompt:
    """The pieces of a prompt, in their order.

    `preamble`, `instruction_header`, the instruction, `input_header`, the input, `response_header`; then the answer: targets
    are `answer_lead`, the output and, with `end_of_text`, the model's end-of-text token. `input` says what becomes of the
    input: it is there where it is not blank (`if_any`), `always`, `ignored`, or stands in the place of the instruction
    (`only`). `preamble_with_input` takes the place of the preamble where there is an input.
    """

    preamble: str = ""
    preamble_with_input: str = ""
    instruction_header: str = "### Instruction:\n"
    input: Input = "if_any"
    input_header: str = "\n\n### Input:\n"
    response_header: str = "\n\n### Response:\n"
    answer_lead: str = ""
    end_of_text: bool = True

    def question(self, instruction: str, extra: str) -> str:
        """Return the text before the answer; `extra` is the input."""
        if self.input == "only":
            return f"{self.preamble}{self.instruction_header}{extra}{self.response_header}"
        joined = self.input == "always" or (self.input == "if_any" and bool(extra.strip()))
        middle = f"{self.input_header}{extra}" if joined else ""
        preamble = self.preamble_with_input if joined else self.preamble
        return f"{preamble}{self.instruction_header}{instruction}{middle}{self.response_header}"


_TASK = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request."
_FLOWERTUNE = {
    "preamble": f"{_TASK}. {_REQUEST}\n",
    "preamble_with_input": f"{_TASK}. {_REQUEST}\n",
    "input_header": " ",
    "response_header": "\n### Response:",
    "answer_lead": " ",
    "end_of_text": False,
}
# Sources: tatsu-lab/stanford_alpaca (train.py); rui-ye/OpenFedLLM (utils/template.py, utils/process_dataset.py); adap/flower
# (the flwr_tune template of `flwr new`, dataset.py). Facts of format, written anew.
PRESETS: dict[str, Prompt] = {
    "plain": Prompt(),
    "alpaca": Prompt(
        preamble=f"{_TASK}. {_REQUEST}\n\n",
        preamble_with_input=f"{_TASK}, paired with an input that provides further context. {_REQUEST}\n\n",
        response_header="\n\n### Response:",
    ),
    "openfedllm": Prompt(
        preamble=f"{_TASK}. {_REQUEST}\n\n",
        preamble_with_input=f"{_TASK}. {_REQUEST}\n\n",
        input_header=" ",
        response_header=" \n\n### Response:",
        answer_lead=" ",
    ),
    "flowertune-general": Prompt(**_FLOWERTUNE, input="ignored"),  # type: ignore[arg-type]
    "flowertune-finance": Prompt(**_FLOWERTUNE, input="always"),  # type: ignore[arg-type]
    "flowertune-medical": Prompt(**_FLOWERTUNE, input="only"),  # type: ignore[arg-type]
    "flowertune-code": Prompt(**_FLOWERTUNE, input="always"),  # type: ignore[arg-type]
}


class PromptConfig(Section):
    """A preset by name (`data.prompt: alpaca` is short for `preset: alpaca`), and pieces that differ from it."""

    preset: Preset = Field("plain", description="`prompt: NAME` for short; the texts are in docs/data.md")
    preamble: str | None = Field(None, description="text before everything else; this and what follows: null for the preset's")
    preamble_with_input: str | None = Field(None, description="the same where there is an input; null: `preamble`, where given")
    instruction_header: str | None = Field(None, description="text before the instruction")
    input: Input | None = Field(
        None, description="the input is there where it is not blank, always, never, or in the place of the instruction"
    )
    input_header: str | None = Field(None, description="text between instruction and input")
    response_header: str | None = Field(None, description="text between those and the answer; the last that is no target")
    answer_lead: str | None = Field(None, description="text before the output; the first that is a target")
    end_of_text: bool | None = Field(None, description="whether the answer ends with the model's end-of-text token")

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        return {"preset": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _check_headers(self) -> PromptConfig:
        """Refuse pieces that the way of the input leaves out: they would have no effect."""
        way, plain = self.resolved().input, ("if_any", "always")
        for key in ("input_header", "preamble_with_input"):
            if getattr(self, key) is not None and way not in plain:
                raise ValueError(f"data.prompt.{key}: the input is not joined to the instruction (input: {way}); drop the key")
        return self

    def resolved(self) -> Prompt:
        """The preset with the pieces that are given."""
        given = {field.name: getattr(self, field.name) for field in fields(Prompt) if getattr(self, field.name) is not None}
        if "preamble" in given:
            # One text for both cases, unless the other is given as well.
            given.setdefault("preamble_with_input", given["preamble"])
        return replace(PRESETS[self.preset], **given)
