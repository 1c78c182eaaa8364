"""`fedmoe_ds.run` and what belongs to it: the same bits as the command, and a process that is afterwards as it was before."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
from every import every
from federations import Result as Engine
from federations import make_config, run_alone, write_inputs
from launching import run as command

import fedmoe_ds
from fedmoe_ds import UserError
from fedmoe_ds.api import started, world
from fedmoe_ds.api.started import start
from fedmoe_ds.distributed.activity import activity
from fedmoe_ds.distributed.supervisor import Supervisor
from fedmoe_ds.errors import EXIT_STOPPED
from fedmoe_ds.terminal import note
from fedmoe_ds.testing.tiny_federation import tiny_tree

SMALL: dict[str, Any] = {"local": {"max_steps": 1}, "execution": {"clients_in_flight": 2}}
PERSONAL: dict[str, Any] = {"method": {"name": "fedsa-lora"}, "seed": 5}
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("python")
    write_inputs(root, (13, 9, 7), num_experts=4, num_experts_per_tok=4)
    return root


@pytest.fixture(scope="module")
def engine(root: Path) -> Engine:
    """The run that most tests repeat, as the tests of the engine do it."""
    return run_alone(make_config(root, "engine", SMALL))


@pytest.fixture(autouse=True)
def same_process(root: Path) -> Iterator[None]:
    """After every test this process is what it was before it."""

    def state() -> Any:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
        return dict(os.environ), handlers, torch.get_num_threads(), torch_dist.is_initialized()

    before = state()
    yield
    # pytest's own entry names the phase of the test.
    old, new = ({**found[0], "PYTEST_CURRENT_TEST": ""} for found in (before, state()))
    assert new == old and state()[1:] == before[1:]


def when_training(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    """Do something once, where round 2 begins to train."""
    enter, done = activity.enter, []

    def entered(phase: str, round_index: int | None = None) -> None:
        enter(phase, round_index)
        if phase == "train" and activity.round == 2 and not done:
            done.append(phase)
            action()

    monkeypatch.setattr(activity, "enter", entered)


def test_the_import_is_cheap() -> None:
    code = "import fedmoe_ds, sys; fedmoe_ds.run, fedmoe_ds.Result; print({'torch', 'numpy', 'deepspeed'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    assert set(fedmoe_ds.__all__) <= set(dir(fedmoe_ds)) and every(hasattr(fedmoe_ds, name) for name in fedmoe_ds.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'runn'"):
        _ = fedmoe_ds.runn


def test_one_after_the_other(root: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run twice, and another one between them: in a thread, with streams as a notebook has them."""
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    first = fedmoe_ds.run(tiny_tree(root, "first", SMALL))
    others: list[fedmoe_ds.Result] = []
    streams = {"stdout": sys.stdout, "stderr": sys.stderr}
    try:
        sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
        thread = threading.Thread(target=lambda: others.append(fedmoe_ds.run(tiny_tree(root, "other", SMALL, PERSONAL))))
        thread.start()
        thread.join()
        said = sys.stdout.getvalue(), sys.stderr.getvalue()
    finally:
        sys.stdout, sys.stderr = streams["stdout"], streams["stderr"]
    again = fedmoe_ds.run(fedmoe_ds.load_config(tiny_tree(root, "other", SMALL)), "name=again")
    assert said[0] == "" and "round 2: perplexity" in said[1]
    assert first.digest == again.digest == engine.digest != others[0].digest
    assert [row["loss"] for row in first.evaluations] == [row["loss"] for row in engine.events if row["event"] == "eval"]


def test_what_a_result_holds(root: Path, engine: Engine) -> None:
    result = fedmoe_ds.run(tiny_tree(root, "held", SMALL))
    assert result.folder == root / "runs" / "held" and result.finished and result.interrupted is None
    assert dict(result.config.local)["max_steps"] == 1 and result.config.method.model_dump()["name"] == "flame"
    rows = result.evaluations
    assert list(rows[0])[:5] == ["round", "tier", "split", "client", "targets"]
    assert {row["round"] for row in rows} == {0, 1, 2} and {row["tier"] for row in rows} == {"4", "2", "1"}
    assert {row["split"] for row in rows} == {"global", "clients", "client"} and every(row["perplexity"] > 1 for row in rows)
    assert {row["client"] for row in rows if row["split"] == "client"} == set(result.clients)
    assert set(result.adapters) == set(engine.adapters) and "nobody" not in result.adapters
    assert every(torch.equal(value, torch.from_numpy(engine.adapters[key])) for key, value in result.adapters.items())
    with pytest.raises(KeyError):
        result.adapters["nobody"]
    assert result.metrics("end")[0]["digest"] == result.digest and len(result.metrics()) == len(engine.events) + 1
    assert str(result).splitlines()[-2:] == [f"digest: {result.digest}", f"run: {result.folder}"]
    opened = fedmoe_ds.open_run(str(result.folder))
    assert opened == result and opened.digest == result.digest and opened.evaluations == rows


def test_personal_models(root: Path) -> None:
    result = fedmoe_ds.run(tiny_tree(root, "personal", SMALL, PERSONAL))
    one, other = (result.client_adapters(client) for client in result.clients[:2])
    assert set(one) == set(other) > set(result.adapters)
    assert every(torch.equal(one[name], value) and torch.equal(other[name], value) for name, value in result.adapters.items())
    # With FedSA-LoRA the A are everybody's and the B a client's own.
    assert every(not torch.equal(one[name], other[name]) for name in set(one) - set(result.adapters))
    assert every(name.endswith("lora_A") for name in result.adapters)
    with pytest.raises(UserError, match="client-00: no client of this run has this name"):
        result.client_adapters("client-00")


def test_ctrl_c(root: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """After the wave that runs, with a checkpoint; the second one does not wait, and nothing is left locked or open."""
    tree = tiny_tree(root, "stopped", SMALL)
    when_training(monkeypatch, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match="runs/stopped was asked to stop; resume='auto' continues it"):
        fedmoe_ds.run(tree)
    assert capfd.readouterr().err.count("SIGINT: the run ends after the wave that is running") == 1
    stopped = fedmoe_ds.open_run(root / "runs" / "stopped")
    assert not stopped.finished and stopped.digest is None and "resume='auto' continues it" in str(stopped)
    assert (stopped.folder / "checkpoints" / "round-00001-partial").is_dir()

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.undo()
    when_training(monkeypatch, twice)
    with pytest.raises(KeyboardInterrupt):
        fedmoe_ds.run(tree, resume="auto")
    assert fedmoe_ds.run(tree, resume="auto").digest == engine.digest


def test_sigterm_is_told_in_the_result(root: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tiny_tree(root, "terminated", SMALL)
    when_training(monkeypatch, lambda: signal.raise_signal(signal.SIGTERM))
    stopped = fedmoe_ds.run(tree)
    assert stopped.interrupted == "SIGTERM" and not stopped.finished and set(stopped.adapters) == set(engine.adapters)
    with pytest.raises(UserError, match="already holds a run; add --resume auto"):
        fedmoe_ds.run(tree)
    continued = fedmoe_ds.run(tree, resume="auto")
    assert continued.digest == engine.digest and continued.interrupted is None
    assert fedmoe_ds.run(tree, resume="auto").digest == engine.digest, "a finished run is not trained again"


def test_a_handler_of_the_programs_own_stays(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        when_training(monkeypatch, lambda: signal.raise_signal(signal.SIGUSR1))
        assert fedmoe_ds.run(tiny_tree(root, "own-handler", SMALL)).interrupted is None
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1]


def test_a_world_of_the_programs_own_stays(root: Path, engine: Engine) -> None:
    torch_dist.init_process_group("gloo", store=torch_dist.HashStore(), rank=0, world_size=1)
    try:
        assert fedmoe_ds.run(tiny_tree(root, "own-world", SMALL)).digest == engine.digest
        assert torch_dist.is_initialized()
    finally:
        torch_dist.destroy_process_group()
    assert fedmoe_ds.run(tiny_tree(root, "no-world", SMALL)).digest == engine.digest


def test_mistakes_are_exceptions(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tiny_tree(root, "wrong", SMALL)
    for call, message in (
        (lambda: fedmoe_ds.run(tree, "method.name=flam"), "^method.name: flam: there is no such method"),
        (lambda: fedmoe_ds.run(tree, "topology.ep_size=2"), "^topology.ep_size: 2: the world of 1 ranks is not divisible"),
        (lambda: fedmoe_ds.run(root / "nothing.yaml"), "nothing.yaml: no such file"),
        (lambda: fedmoe_ds.run(7), "^config: 7: give a path or a name"),
        (lambda: fedmoe_ds.run(tree, ["seed=1"]), r"^override: \['seed=1'\]: is no text"),
        (lambda: fedmoe_ds.run(tree, resume="always"), "^resume: 'always': choose 'never' or 'auto'"),
        (lambda: fedmoe_ds.run(tree, ranks=0), "^ranks: 0: must be at least 1"),
        (lambda: fedmoe_ds.run(tree, ranks=2, max_restarts=-1), "^max_restarts: -1: must be at least 0"),
        (lambda: fedmoe_ds.run(tree, max_restarts=1), "^max_restarts: 1: .* add ranks=N"),
        (lambda: fedmoe_ds.plan(tree, "topology.ep_size=2", ranks=3), "^topology.ep_size: 2: the world of 3 ranks"),
        (lambda: fedmoe_ds.open_run(root), "holds no run"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    with monkeypatch.context() as inside:
        inside.setenv("RANK", "0")
        inside.setenv("WORLD_SIZE", "1")
        with pytest.raises(UserError, match=r"^ranks: 2: environment has started the ranks already"):
            fedmoe_ds.run(tree, ranks=2)
    with world.joined(fedmoe_ds.load_config(tree)), pytest.raises(UserError, match=r"^run: another run works in this process"):
        fedmoe_ds.run(tree)
    assert "2 clusters x ep_size 1 = 2 ranks" in fedmoe_ds.plan(tree, ranks=2)


def test_a_tree_is_taken_as_a_file_is(root: Path) -> None:
    tree = tiny_tree(root, "tree", {"adapters": {"attention": ("q_proj", "v_proj")}})
    given = {**tree, "output": root / "elsewhere"}
    config = fedmoe_ds.load_config(given, "adapters.attention.0=k_proj", "seed=3")
    assert config.adapters.attention == ["k_proj", "v_proj"] and config.seed == 3 and config.output == str(root / "elsewhere")
    assert given["adapters"]["attention"] == ("q_proj", "v_proj") and "seed" not in given, "the caller's own"
    assert fedmoe_ds.load_config(config) == config


@pytest.mark.sweep
def test_the_command_has_this_digest(root: Path, engine: Engine, tmp_path: Path) -> None:
    assert command(tiny_tree(root, "command", SMALL), tmp_path).digest == engine.digest


@pytest.mark.cluster
def test_processes_that_are_started(root: Path, engine: Engine) -> None:
    """How each run ended, and a mistake, come back from the ranks; on two ranks: `check_method` on the page."""
    job = fedmoe_ds.load_config(tiny_tree(root, "started", SMALL))
    with pytest.raises(UserError, match=r"runs/started already holds a run; add --resume auto to continue it"):
        start([(job, "never"), (job, "never")], ranks=1)
    assert fedmoe_ds.open_run(root / "runs" / "started").digest == engine.digest


PROGRAM = """
import json, os, sys
import fedmoe_ds
tree = json.loads(sys.argv[1])
first = fedmoe_ds.run(tree, "name=program-1")
try:
    fedmoe_ds.run(tree, "name=program-2", "topology.timeout_s=99999")
except fedmoe_ds.UserError as error:
    print(os.environ["RANK"], str(error)[:20])
second = fedmoe_ds.run(tree, "name=program-3", "topology.ep_size=2")
print(os.environ["RANK"], first.digest == second.digest, first.digest)
"""


@pytest.mark.cluster
def test_a_program_under_a_launcher(root: Path, engine: Engine, capfd: pytest.CaptureFixture[str]) -> None:
    """Its ranks are the world of every run; a later run cannot have longer limits than the groups of the first."""
    program = [sys.executable, "-c", PROGRAM, json.dumps(tiny_tree(root, "program", SMALL))]
    assert Supervisor(program, 2, 0, 60.0, note).run() == 0
    lines = sorted(line for line in capfd.readouterr().out.splitlines() if line[:2] in ("0 ", "1 "))
    expected = [f"{rank} {text}" for rank in (0, 1) for text in (f"True {engine.digest}", "topology.timeout_s: ")]
    assert lines == sorted(expected)


def test_ranks_that_were_stopped_while_they_started(tmp_path: Path) -> None:
    """None of them has told how it ended, and the run has no record yet."""
    assert started._endings(tmp_path, 2, EXIT_STOPPED, "SIGTERM") == ["SIGTERM", "SIGTERM"]
    started.tell(tmp_path / "0.ending", interrupted=None)
    assert started._endings(tmp_path, 2, EXIT_STOPPED, "SIGUSR1") == [None, "SIGUSR1"]
    assert str(fedmoe_ds.Result(tmp_path, "SIGTERM")) == f"not begun: resume='auto' begins it\nrun: {tmp_path}"
