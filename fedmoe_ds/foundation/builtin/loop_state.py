"""Loop state: an unfinished pre-training in the cache, from which the next start goes on to the same bits.

An entry of one file: a line of JSON (format, key of the content that is being made, SHA-256 of the rest), then safetensors:
parameters, buffers, AdamW's moments and step counts, torch's generator, and the loss of every step, whose number is the step.
Rate and batches follow from the step. What is damaged, of other content, or may be somebody else's, is told and not used.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedmoe_ds.storage import cache
from fedmoe_ds.storage.file_modes import doubt
from fedmoe_ds.storage.strict_json import parse_json

FILE = "state"
FORMAT = 1
_LOSSES, _GENERATOR = "losses", "generator"
_LONGEST_HEAD = 4096  # bytes


class TrainingState:
    """The place of one unfinished pre-training.

    Args:
        entry: its folder in the cache; need not exist, and may be deleted at any time.
        key: hash of everything that determines the weights.
        note: takes one line for the user.
    """

    def __init__(self, entry: Path, key: str, note: Callable[[str], None]) -> None:
        self.entry, self.key, self._note = entry, key, note

    def save(self, model: Any, optimizer: torch.optim.Optimizer, losses: list[float]) -> str:
        """Keep a training after `len(losses)` steps; what became of it, in words for the user. Never raises for a full disk."""
        state = _state(model, optimizer)
        # safetensors takes no strided tensors, and none that share memory.
        tensors = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
        # Losses are floats of Python, whose bits float64 keeps.
        tensors |= {_LOSSES: torch.tensor(losses, dtype=torch.float64), _GENERATOR: torch.get_rng_state()}
        content = save(tensors)
        head = {"format": FORMAT, "key": self.key, "sha256": hashlib.sha256(content).hexdigest()}
        try:
            # What is there never stays: it is of fewer steps, or was not usable.
            with cache.draft(self.entry, good=lambda: False) as draft:
                (draft / FILE).write_bytes(json.dumps(head).encode() + b"\n" + content)
        except OSError as error:
            return f"pre-training begins again, because {self.entry.parent} cannot be written: {error.strerror or error}"
        return f"pre-training goes on after its step {len(losses)}"

    def restore(self, model: Any, optimizer: torch.optim.Optimizer, most: int) -> list[float]:
        """Put a kept training into model, optimizer and torch's generator, whole or not at all.

        Args:
            model: as it was before the first step.
            optimizer: without state.
            most: steps, at most.
        Returns:
            The loss of every step so far; none where nothing usable is kept.
        """
        try:
            tensors = self._read()
            losses, generator = tensors.pop(_LOSSES), tensors.pop(_GENERATOR)
            _check(tensors, model)
            now = torch.get_rng_state()
            if not 0 < len(losses) <= most or (generator.shape, generator.dtype) != (now.shape, now.dtype):
                raise ValueError("it is of another training")
        except FileNotFoundError:
            return []
        except (OSError, ValueError, LookupError, TypeError, RecursionError, SafetensorError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._note(f"foundation: the unfinished pre-training {self.entry} is not used ({reason}); beginning again")
            return []
        _fill(tensors, model, optimizer)
        torch.set_rng_state(generator)
        found: list[float] = losses.tolist()
        self._note(f"foundation: pre-training goes on after step {len(found)} of {most}")
        return found

    def remove(self) -> None:
        """The training is finished."""
        shutil.rmtree(self.entry, ignore_errors=True)

    def _read(self) -> dict[str, Tensor]:
        for path in (self.entry, self.entry / FILE):
            if (reason := doubt(path)) is not None:
                raise ValueError(reason)
        with (self.entry / FILE).open("rb") as file:
            head, content = parse_json(file.readline(_LONGEST_HEAD)), file.read()
        if (head["format"], head["key"]) != (FORMAT, self.key):
            raise ValueError("it is of another training")
        if head["sha256"] != hashlib.sha256(content).hexdigest():
            raise ValueError("it is damaged")
        tensors: dict[str, Tensor] = load(content)
        return tensors


def _state(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor that training changes; a parameter that never had a gradient has no state in the optimizer."""
    tensors = {f"buffer/{name}": buffer for name, buffer in model.named_buffers()}
    for name, parameter in model.named_parameters():
        tensors[f"parameter/{name}"] = parameter
        tensors |= {f"{entry}/{name}": value for entry, value in optimizer.state.get(parameter, {}).items()}
    return tensors


def _check(tensors: dict[str, Tensor], model: Any) -> None:
    """Raise ValueError unless all of it fits: nothing is changed before."""
    named = dict(model.named_parameters())
    wanted = {f"parameter/{name}": parameter for name, parameter in named.items()}
    wanted |= {f"buffer/{name}": buffer for name, buffer in model.named_buffers()}
    fits = wanted.keys() <= tensors.keys()
    for place, tensor in tensors.items():
        entry, _, name = place.partition("/")
        like = wanted.get(place, named.get(name) if entry in ("exp_avg", "exp_avg_sq") else None)
        fits &= (
            (entry == "step" and name in named) if like is None else (tensor.shape, tensor.dtype) == (like.shape, like.dtype)
        )
    if not fits:
        raise ValueError("it does not fit the model")


@torch.no_grad()
def _fill(tensors: dict[str, Tensor], model: Any, optimizer: torch.optim.Optimizer) -> None:
    named = dict(model.named_parameters())
    for name, buffer in model.named_buffers():
        buffer.copy_(tensors.pop(f"buffer/{name}"))
    for name, parameter in named.items():
        parameter.copy_(tensors.pop(f"parameter/{name}"))
    for place, value in tensors.items():
        entry, _, name = place.partition("/")
        optimizer.state[named[name]][entry] = value.clone()
