"""Own code: Python in a model folder never runs, whatever is on standard input, but a tokenizer's where the switch is on."""

from __future__ import annotations

import ast
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from federations import alone, make_config, read_events, write_inputs
from transformers import dynamic_module_utils

import fedmoe_ds
from fedmoe_ds.config import Config
from fedmoe_ds.errors import UserError
from fedmoe_ds.export import modeling_fft_moe
from fedmoe_ds.federation import session
from fedmoe_ds.federation.build import load_parts, load_shared_foundation
from fedmoe_ds.federation.journal import Journal
from fedmoe_ds.federation.rounds import Federation
from fedmoe_ds.foundation import planned_sparse, planned_task, resolve_foundation
from fedmoe_ds.foundation.tokenizer import load_tokenizer
from fedmoe_ds.planner.dry_run import describe
from fedmoe_ds.planner.workload import resolve
from fedmoe_ds.report import write_report

CODE = """
from pathlib import Path
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

Path({victim!r}).touch()


class OwnConfig(PreTrainedConfig):
    model_type = "own"


class OwnModel(PreTrainedModel):
    config_class = OwnConfig


class OwnTokenizer(PreTrainedTokenizerFast):
    def __call__(self, text, *args, **kwargs):
        changed = text.replace("w", "{letter}") if isinstance(text, str) else [line.replace("w", "{letter}") for line in text]
        return super().__call__(changed, *args, **kwargs)
"""
MODEL = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel", "AutoModel": "own.OwnModel"}
TOKENIZER = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
OTHER_CLASS = {"tokenizer_class": "OwnTokenizer"}

# what the folder's config.json and tokenizer_config.json say besides, and the line that refuses it; None: it loads without code
FOLDERS: dict[str, tuple[dict[str, Any], dict[str, Any], str | None]] = {
    "a known family": ({"auto_map": MODEL}, {"auto_map": TOKENIZER}, None),
    "a known family, settings of old": ({"auto_map": MODEL}, {"auto_map": ["own.OwnTokenizer", None]}, None),
    "another model": (
        {"auto_map": MODEL, "model_type": "own"},
        {},
        "its model is Python code of this folder, and a model's code",
    ),
    "no model type": ({"auto_map": MODEL, "model_type": None}, {}, "config.json cannot be used|its model is Python code"),
    "no language model": ({"auto_map": MODEL, "model_type": "dinov2"}, {}, "its model is Python code|no causal language model"),
    "code of another repository": (
        {"auto_map": {name: f"somebody/else--{place}" for name, place in MODEL.items()}, "model_type": "own"},
        {"auto_map": {"AutoTokenizer": [None, "somebody/else--own.OwnTokenizer"]}},
        "its model is Python code",
    ),
}


def edit(file: Path, **changes: Any) -> None:
    tree = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("own-code")
    write_inputs(root, (6, 5), num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)
    return root


@pytest.fixture
def folder(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sound model with code beside it that nothing names yet; everybody who asks is told yes."""
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model" / "own.py").write_text(CODE.format(victim=str(tmp_path / "victim"), letter="v"))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 1000))
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "model"


def small(root: Path, **foundation: Any) -> Config:
    return make_config(
        root,
        "run",
        {
            "federation": {"rounds": 1},
            "local": {"max_steps": 1},
            "foundation": foundation,
            "data": {
                "template": "text",
                "columns": {"text": "output"},
                "partition": {"kind": "iid", "clients": 2, "column": None},
            },
        },
    )


def _load(config: Config) -> Any:
    return load_shared_foundation(config, *alone(), SimpleNamespace(note=lambda line: None))  # type: ignore[arg-type]


ENTRIES: dict[str, Callable[[Config], Any]] = {
    "planned task": lambda config: planned_task(config.foundation),
    "planned kind": lambda config: planned_sparse(config.foundation),
    "resolve": lambda config: resolve_foundation(config.foundation, 0, print),
    "start": _load,
    "dry run": lambda config: describe(config, 1),
    "planner": lambda config: resolve(config),
    "tokenizer": lambda config: load_tokenizer(Path(str(config.foundation.path)), 320),
}
LOAD_ALL = ("start", "dry run", "planner")
"""These refuse whatever is to be refused; the others have looked at a part only."""


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("case", FOLDERS)
def test_code_of_a_folder_never_runs(case: str, entry: str, folder: Path) -> None:
    model, tokenizer, line = FOLDERS[case]
    edit(folder / "config.json", **{"auto_map": None, **model})
    edit(folder / "tokenizer_config.json", **tokenizer)
    try:
        ENTRIES[entry](small(folder.parent))
        assert line is None or entry not in LOAD_ALL
    except UserError as error:
        assert line is not None
        assert re.search(line, str(error)) and str(folder) in str(error), error
    assert not (folder.parent / "victim").exists()


def test_a_tokenizer_that_only_its_code_makes_is_refused(folder: Path) -> None:
    """Its model has no tokenizer of its own in transformers, so that nothing else can load it: the line names the switch."""
    edit(folder / "config.json", model_type="dinov2")
    edit(folder / "tokenizer_config.json", auto_map=TOKENIZER, **OTHER_CLASS)
    with pytest.raises(
        UserError, match=r"foundation\.path: .*its tokenizer is Python code .*foundation\.trust_remote_code=true"
    ):
        load_tokenizer(folder, 320)
    assert not (folder.parent / "victim").exists()


def begin(config: Config, resume: str) -> Journal:
    """A start, as `session.train` does it, in a world of one without a process group."""
    runtime, topology = alone()
    place = Path(config.output) / config.name
    source = session.claim_folder(place, resume)
    journal = Journal(place, runtime)
    parts = load_parts(config, runtime, topology, journal.progress)
    session.begin(parts, journal, source["checkpoint"])
    Federation(parts, journal).run()
    journal.close()
    return journal


def test_the_switch_runs_a_tokenizers_code_and_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """End to end: other data, a line at the start, a field in the record and the report, and part of the run's identity."""
    root = folder.parent
    edit(folder / "config.json", auto_map=MODEL)
    edit(folder / "tokenizer_config.json", auto_map=TOKENIZER)

    def train(config: Config, resume: str = "never") -> list[dict[str, Any]]:
        journal = begin(config, resume)
        return read_events(journal.folder)

    off = train(small(root).model_copy(update={"name": "off"}))
    assert not (root / "victim").exists()
    on = small(root, trust_remote_code=True)
    events = train(on)
    assert (root / "victim").exists()
    assert not (root / "modules").exists(), "other users' code must not come out of a folder that they can write to"
    told = capsys.readouterr().err
    assert f"foundation.trust_remote_code: the tokenizer runs Python code of {folder}" in told
    code = events[0]["foundation_code"]
    assert len(code) == 64 and off[0]["foundation_code"] is None
    assert events[1]["fingerprint"] != off[1]["fingerprint"], "the code has had a say"
    assert code in write_report(root / "runs" / "run").read_text()
    more = on.model_copy(update={"federation": on.federation.model_copy(update={"rounds": 2})})
    (folder / "own.py").write_text(CODE.format(victim=str(root / "victim"), letter="u"))
    with pytest.raises(UserError, match=r"--resume: foundation\.code: [0-9a-f]{64}: the checkpoint was written with"):
        train(more, "auto")
    (folder / "own.py").write_text(CODE.format(victim=str(root / "victim"), letter="v"))
    without = more.model_copy(update={"foundation": more.foundation.model_copy(update={"trust_remote_code": False})})
    with pytest.raises(UserError, match=r"--resume: foundation\.code: None: the checkpoint was written with"):
        train(without, "auto")
    assert [event["event"] for event in train(more, "auto")].count("round") == 2


def test_the_switch_without_code_says_that_it_does_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small(folder.parent, trust_remote_code=True)
    begin(config, "never")
    assert "foundation.trust_remote_code: without effect" in capsys.readouterr().err
    assert not (folder.parent / "victim").exists()


@pytest.mark.parametrize("name", ["somebody/else--own.OwnTokenizer", "../own.OwnTokenizer", "gone.OwnTokenizer", "own", 7])
def test_the_switch_runs_nothing_from_elsewhere(name: Any, folder: Path) -> None:
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, name]})
    with pytest.raises(UserError, match=r"auto_map: .*: no class of a file in this folder"):
        load_tokenizer(folder, 320, trust=True)
    assert not (folder.parent / "victim").exists()


def test_every_call_decides() -> None:
    """A call of transformers that leaves it open asks on the terminal, and a `y` in standard input is an answer."""
    open_calls = []
    # The modelling file of an export is never run here: it runs where somebody has said `trust_remote_code=True`.
    ours = {*Path(fedmoe_ds.__file__).parent.rglob("*.py")} - {Path(modeling_fft_moe.__file__)}
    for file in sorted(ours):
        source = file.read_text()
        calls = ast.walk(ast.parse(source)) if re.search(r"from_(pretrained|config)\b", source) else ()
        for call in calls:
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                asks = call.func.attr in ("from_pretrained", "from_config")
                if asks and "trust_remote_code" not in [keyword.arg for keyword in call.keywords]:
                    open_calls.append(f"{file}:{call.lineno}")
    assert not open_calls
