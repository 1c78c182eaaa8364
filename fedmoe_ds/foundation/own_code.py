"""Own code: Python in a model folder (`auto_map` of its settings), which runs only for a tokenizer and only where one asks.

Models never run it: hosting, kernels and planner read families by name, and code of a folder's own would compute what none of
them knows. A folder of a known family that has code beside its weights is loaded without it, and nobody is asked. A tokenizer
is another matter: what it makes of the data is all that counts. `foundation.trust_remote_code` lets it run; what it runs is in
the run's identity, and every start names it.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from functools import cache
from pathlib import Path

from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation.dense import type_task
from fedmoe_ds.foundation.meta_model import read_config
from fedmoe_ds.storage.strict_json import read_json

SWITCH = "foundation.trust_remote_code"
SETTINGS = "tokenizer_config.json"
_CLASS = re.compile(r"[A-Za-z_]\w*\.[A-Za-z_]\w*", re.ASCII)


def tokenizer_classes(folder: Path) -> list[str]:
    """What the tokenizer's settings name as code, `module.Class` each; empty where it needs none.

    Raises:
        UserError: a class that is in no file of this folder: another repository's, or a path.
    """
    try:
        settings = read_json(folder / SETTINGS, constants=True)
    except (OSError, ValueError):  # whoever loads the tokenizer says what is wrong with it
        return []
    named = settings.get("auto_map") if isinstance(settings, dict) else None
    named = named.get("AutoTokenizer") if isinstance(named, dict) else named
    found = [name for name in (named if isinstance(named, list) else [named]) if name is not None]
    for name in found:
        if not (isinstance(name, str) and _CLASS.fullmatch(name) and (folder / f"{name.partition('.')[0]}.py").is_file()):
            raise UserError(
                f"foundation.path: {folder}: {SETTINGS}: auto_map: {name}: no class of a file in this folder; {SWITCH} runs "
                "no other: put the code beside the tokenizer"
            )
    return found


def code_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of all Python files of a model folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        content = file.read_bytes()
        # The length in front keeps the border between two files in its place.
        digest.update(f"{file.relative_to(folder)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


@cache
def use_private_modules() -> tempfile.TemporaryDirectory[str]:
    """Let transformers import code from a folder of this process alone, which the cache of this function keeps.

    Its default is one folder below $HF_HOME, into which every rank copies at the same time, and which others may write to
    where a group shares it. The folder goes with the process.
    """
    from transformers import dynamic_module_utils

    folder = tempfile.TemporaryDirectory(prefix="fedmoe-code-")
    dynamic_module_utils.HF_MODULES_CACHE = folder.name
    return folder


def running(folder: Path, trust: bool) -> str | None:
    """The digest of the code that a start with this switch runs; None where it runs none, or the model reads no text."""
    if not trust or type_task(read_config(folder).model_type) != "causal_lm" or not tokenizer_classes(folder):
        return None
    return code_digest(folder)


def told(folder: Path, trust: bool) -> str | None:
    """The line about it that every start says before; None where the switch is off."""
    if not trust:
        return None
    code = running(folder, trust)
    if code is None:
        return f"{SWITCH}: without effect: no tokenizer in {folder} has code of its own"
    return f"warning: {SWITCH}: the tokenizer runs Python code of {folder} (sha256 {code[:12]})"
