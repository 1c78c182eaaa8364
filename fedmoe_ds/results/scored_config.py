"""Scored config: the configuration of a run, or of a model folder, as an evaluation of other data uses it.

Template, prompt, chat template and length are the run's: rows are read as clients' rows were. What belongs to the run's own
files (split, encoding, separator, validation) is not; `key=value` words change either. A word that changes nothing is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedmoe_ds.adapter_formats import read_adapter
from fedmoe_ds.config import CheckpointConfig, Config, DataConfig, with_overrides
from fedmoe_ds.errors import UserError
from fedmoe_ds.results.loaded_model import config_here
from fedmoe_ds.results.target import is_adapter
from fedmoe_ds.results.trained_run import TrainedRun
from fedmoe_ds.storage.files import expanded

_OF_FILES = ("split", "separator", "encoding", "validation")
_ALWAYS = ("evaluation.batch_size", "evaluation.max_sequences", "evaluation.metrics", "execution.reproducible",
           "execution.threads", "execution.adapter_kernels", "foundation.cache", "foundation.trust_remote_code",
           "data.chat_template")  # fmt: skip
_GIVEN = ("data.split", "data.separator", "data.encoding", "data.template", "data.prompt", "data.columns", "data.label_names",
          "data.sequence_length", "execution.packing")  # fmt: skip
_OWN = ("data.source", "data.validation", "evaluation.client_sequences")
_OWNER, _MODEL = "data.partition.column", "foundation.dtype"


def config_of_run(run: TrainedRun, data: Sequence[str], words: Sequence[str], by_client: bool) -> Config:
    """The run's configuration for its own hold-outs (no `data`), or for the rows of these sources.

    Raises:
        UserError: a word is none, changes nothing here, or is wrong.
    """
    allowed = (*_ALWAYS, *(_GIVEN if data else _OWN), *((_OWNER,) if data and by_client else ()))
    _check(words, allowed, "of the run's own hold-outs; give --data for other rows" if not data else "of given rows")
    own = _without_training(config_here(run))
    if not data:
        return with_overrides(own, words)
    config, plain = own, DataConfig()
    fresh: dict[str, Any] = {key: getattr(plain, key) for key in _OF_FILES} | {"source": _source(data)}
    # What `auto` meant for the run's columns, and not what it would mean for these.
    if config.data.template == "auto" and (read := _template(run)) is not None:
        fresh["template"] = read
    if config.data.partition.kind != "natural":  # its column, if there is one, is a label
        fresh["partition"] = config.data.partition.model_copy(update={"column": None})
    return with_overrides(_all_rows(config.model_copy(update={"data": config.data.model_copy(update=fresh)})), words)


def config_of_model(
    folder: str, data: Sequence[str], words: Sequence[str], by_client: bool, base: Path | None = None
) -> Config:
    """A configuration with a model, or an adapter of PEFT's and its `base` model, given rows, and defaults for the rest.

    Raises:
        UserError: as `config_of_run`; nothing tells the base model.
    """
    if not data:
        raise UserError(f"--data: missing: {folder} is a model and has no hold-outs of its own; give --data FILE")
    _check(words, (*_ALWAYS, *_GIVEN, _MODEL, *((_OWNER,) if by_client else ())), "of a model")
    plain, start = Config(), folder if is_adapter(folder) else None
    sections = {
        "foundation": plain.foundation.model_copy(update={"path": _base(folder, base) if start else folder, "preset": None}),
        "data": plain.data.model_copy(update={"source": _source(data)}),
        "adapters": plain.adapters.model_copy(update={"start": start}),
    }
    return with_overrides(_all_rows(plain.model_copy(update=sections)), words)


def _base(adapter: str, given: Path | None) -> str:
    named = str(given) if given is not None else read_adapter(expanded(adapter, "adapter"), "adapter").base_model
    if named is None:
        raise UserError(f"--model: missing: {adapter} does not name its base model; give its folder or hub id with --model")
    return named


def _without_training(config: Config) -> Config:
    """Less what asks for figures or answers that an evaluation need not have: `checkpoint.best`, and generated answers."""
    evaluation = config.evaluation.model_copy(update={"generations": 0})
    return config.model_copy(update={"checkpoint": CheckpointConfig(), "evaluation": evaluation})


def _all_rows(config: Config) -> Config:
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"max_sequences": None})})


def _source(data: Sequence[str]) -> str | list[str]:
    return data[0] if len(data) == 1 else list(data)


def _template(run: TrainedRun) -> str | None:
    reading: dict[str, Any] = next((event.get("reading", {}) for event in run.events if event["event"] == "data"), {})
    return reading.get("template")


def _check(words: Sequence[str], allowed: Sequence[str], where: str) -> None:
    for word in words:
        key, equals, _ = word.partition("=")
        # Without "=" it is no override, and the line about that is `with_overrides`'.
        if equals and not any(_is_at(key, known) for known in allowed):
            raise UserError(f"{word}: {key} changes nothing in an evaluation {where}{_near(key, allowed)}")


def _is_at(key: str, known: str) -> bool:
    return key == known or key.startswith(f"{known}.")


def _near(key: str, allowed: Sequence[str]) -> str:
    section = sorted(_of_section(key.partition(".")[0], allowed))
    return f"; of this section these do: {', '.join(section)}" if section else "; drop it"


def _of_section(section: str, allowed: Sequence[str]) -> Iterator[str]:
    return (known for known in allowed if known.startswith(f"{section}."))
