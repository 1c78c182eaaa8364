"""`fedmoe`: its list of subcommands, what costs no second, configurations by name, and the scripts that launchers start."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from every import every
from launching import REPOSITORY
from test_report import record_run

from fedmoe_ds.bench.fullsize.weights import SHAPE
from fedmoe_ds.commands import configs, launch_path, program
from fedmoe_ds.config import find_config, load_config
from fedmoe_ds.config.shipped import FOLDER, shipped_names, summary
from fedmoe_ds.errors import UserError
from fedmoe_ds.studies.compare.protocol import read_protocol
from fedmoe_ds.studies.scaling.study import read_study

LAUNCH = REPOSITORY / "launch"
HEAVY = {"bench", "evaluate", "export", "generate"}
"""Their help is that of measurements and formats, which are imported for it."""
HELPS = """
import json, sys
from fedmoe_ds.commands import program

helped = {}
for name in json.loads(sys.argv[1]):
    sys.argv = ["fedmoe", *name]
    try:
        program.main()
    except SystemExit as end:
        helped[" ".join(name)] = end.code
assert "torch" not in sys.modules and "deepspeed" not in sys.modules
print(json.dumps(helped), file=sys.stderr)
"""


def ended(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """`fedmoe` with these words, in this process; the code it ends with."""
    monkeypatch.setattr(sys, "argv", ["fedmoe", *words])
    with pytest.raises(SystemExit) as end:
        program.main()
    assert isinstance(end.value.code, int)
    return end.value.code


def test_the_list(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(monkeypatch, "--help") == 0
    said = capsys.readouterr().out
    for name, command in program.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.summary)}$", said, re.MULTILINE), name
    assert every(len(line) <= 100 for line in said.splitlines())
    assert ended(monkeypatch) == 2 and capsys.readouterr().out == said
    assert ended(monkeypatch, "--version") == 0 and re.fullmatch(r"fedmoe-ds \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("word", "way"),
    [("tarin", "did you mean 'train'?"), ("launchpath", "did you mean 'launch-path'?"), ("x", "choose one of bench, cache,")],
)
def test_an_unknown_subcommand(
    word: str, way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(monkeypatch, word) == 2
    said = capsys.readouterr()
    assert (
        said.err.startswith(f"error: fedmoe: {word}: no such subcommand; {way}") and said.err.count("\n") == 1 and not said.out
    )


def test_help_loads_no_torch(tmp_path: Path) -> None:
    """Of `fedmoe` and of its subcommands, and what they answer at once, in one process: what one loads, the check finds."""
    page = tmp_path / "run" / "report.html"
    record_run(page.parent)
    asked = [["--help"], ["configs"], ["launch-path", "train"], ["cache", "list", "--cache", str(tmp_path)]]
    asked += [["report", str(page.parent)], *([name, "-h"] for name in sorted(set(program.COMMANDS) - HEAVY))]
    done = subprocess.run([sys.executable, "-c", HELPS, json.dumps(asked)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr) == {" ".join(words): 0 for words in asked}
    for name in set(program.COMMANDS) - HEAVY:
        assert f"usage: fedmoe {name} [-h]" in done.stdout, name
    assert page.exists()


@pytest.mark.parametrize("name", program.COMMANDS)
def test_subcommands_and_their_scripts(name: str) -> None:
    """Every subcommand is there; what launch/ has begins it in the same way, and so does the file in the package."""
    command = program.COMMANDS[name]
    assert callable(importlib.import_module(command.module).main) and "\n" not in command.summary
    script = LAUNCH / f"{name}.py"
    assert script.exists() != (name in ("configs", "launch-path"))
    own = Path(str(importlib.import_module(command.module).__file__))
    # Modules of other packages are no files to start.
    files = [path for path in (own, script) if path.exists() and path.parent.name in ("commands", "launch")]
    for file in files:
        text = file.read_text()
        assert f'    start("{name}")\n' in text and "from fedmoe_ds.commands.program import start" in text, file
    if script.exists():
        assert len(script.read_text().splitlines()) < 12, "thin"


def test_the_script_of_ranks_listens_before_it_imports() -> None:
    """What launchers start: a signal in the second that imports take must not end a rank as if it were lost."""
    text = Path(str(importlib.import_module("fedmoe_ds.commands.train").__file__)).read_text()
    first = re.search(r"^(?:import|from) (?!__future__).*$", text, re.MULTILINE)
    assert first is not None and text.index('    start("train")\n') < first.start()


def test_every_script_is_a_subcommand() -> None:
    assert {path.stem for path in LAUNCH.glob("*.py")} == set(program.COMMANDS) - {"configs", "launch-path"}


def test_the_path_for_a_launcher(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch_path.main(["train"]) == 0
    assert Path(capsys.readouterr().out.removesuffix("\n")) == REPOSITORY / "fedmoe_ds" / "commands" / "train.py"
    for name, message in (
        ("plan", "launch-path: plan: no launcher starts it"),
        ("tran", "fedmoe: tran: no such subcommand; did"),
    ):
        with pytest.raises(UserError, match=message):
            launch_path.main([name])


def test_a_module_of_somebody_else_is_not_taken_for_ours(tmp_path: Path) -> None:
    """Python puts a script's folder first: there is a `cache.py` in ours, and in that of a user."""
    (tmp_path / "cache.py").write_text("import sys; sys.exit(7)")
    for script in (LAUNCH / "configs_probe.py", Path(program.__file__)):
        code = f"import sys; sys.path.insert(0, {str(script.parent)!r}); sys.modules['__main__'].__file__ = {str(script)!r}\n"
        code += "from fedmoe_ds.commands import program; program._forget_own_folder(); import cache"
        done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": f"{REPOSITORY}:{tmp_path}"}, check=False)
        assert done.returncode == 7, script


def test_shipped_configurations(capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        path.relative_to(REPOSITORY / "configs").with_suffix("").as_posix() for path in (REPOSITORY / "configs").rglob("*.yaml")
    }
    assert set(shipped_names()) == files and len(files) > 30 and "quickstart" in files
    assert configs.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(files) and every(len(line.split(None, 1)) == 2 for line in lines)
    assert lines[shipped_names().index("methods/hetlora")].split(None, 1) == ["methods/hetlora", summary("methods/hetlora")]
    assert configs.main(["--path"]) == 0 and Path(capsys.readouterr().out.strip()) == REPOSITORY / "configs"


def test_a_name_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the files name themselves is found, too: a model, the base of a study, the methods beside one."""
    monkeypatch.chdir(tmp_path)
    assert load_config(Path("quickstart")) == load_config(REPOSITORY / "configs" / "quickstart.yaml")
    assert load_config(Path("methods/flame")).method.name == "flame"
    model = load_config(Path("olmoe-7b")).foundation.path
    assert model is not None and (Path(model) / "config.json").samefile(SHAPE)
    assert load_config(Path("olmoe-7b"), ["foundation.path=configs/mine"]).foundation.path == "configs/mine", "the user's own"
    study = find_config(Path("scaling/weak"))
    assert (study.parent / read_study(study).base).is_file()
    protocol = find_config(Path("compare-study"))
    assert (protocol.parent / "methods" / "flame.yaml").is_file() and read_protocol(protocol).expectations
    assert {summary(name)[-1:] for name in shipped_names()} <= {"."}, "sentences"


def test_a_file_here_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert find_config(Path("quickstart")) == FOLDER / "quickstart.yaml", "a folder is no configuration"
    (tmp_path / "quickstart").rmdir()
    (tmp_path / "quickstart").write_text("name: mine\n")
    assert load_config(Path("quickstart")).name == "mine"
    # A path is a path: nothing else is looked for.
    with pytest.raises(UserError, match=r"^config: quickstart\.yaml: no such file"):
        load_config(Path("quickstart.yaml"))


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("quikstart", "did you mean 'quickstart'?"),
        ("methods/flam", "did you mean 'methods/flame'?"),
        ("flame", "did you mean 'methods/flame'?"),
        ("zzz", "`fedmoe configs` lists"),
    ],
)
def test_an_unknown_name(name: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=rf"^config: {name}: neither a file here nor a configuration of the package; {re.escape(way)}"
    ):
        load_config(Path(name))


@pytest.mark.parametrize("path", ["configs/methods/flame.yaml", "flame.yaml", "configs/quickstart.yaml", "quickstart.yml"])
def test_a_path_of_the_repository_elsewhere(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "quickstart" if "quick" in path else "methods/flame"
    with pytest.raises(UserError, match=f"^config: {path}: no such file; the package has one: did you mean '{name}'\\?$"):
        load_config(Path(path))
