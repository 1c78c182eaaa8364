"""Evaluate: a run's own figures again, other rows, tiers, clients x models, model folders, and one line for every mistake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_inputs import dense_config, write_dense
from distributed import run_distributed
from every import every
from federations import Result, joined, make_config, run_alone, run_joined
from test_task_metrics import LABELS, write_labels
from transformers import AutoModelForCausalLM

from fedmoe_ds.errors import UserError
from fedmoe_ds.export.command import main as export
from fedmoe_ds.federation.evaluation import Score
from fedmoe_ds.results import open_run
from fedmoe_ds.results.evaluate_command import main
from fedmoe_ds.results.loaded_model import LoadedModel
from fedmoe_ds.results.score_tables import WIDEST, table
from fedmoe_ds.results.scoring import Row, Scores

FIELDS = ("tier", "tier_label", "split", "client", "perplexity", "accuracy", "loss", "targets", "exact_match", "ranked_choice")
SHORT: dict[str, Any] = {
    "federation": {"rounds": 1},
    "local": {"steps": 2},
    "evaluation": {"generations": 0, "metrics": ["exact_match", "ranked_choice"], "max_sequences": 6, "client_sequences": 2},
}
PERSONAL: dict[str, Any] = {"adapters": {"router": "frozen"}, "evaluation": {"metrics": []}}
METHODS: dict[str, dict[str, Any]] = {
    "flame": {},
    "fedsa-lora": PERSONAL,
    "local-only": PERSONAL,
    "flora": {**PERSONAL, "federation": {"tiers": None, "budget": "rank"}},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    write_dense(folder)
    write_labels(folder)
    return folder


class Runs:
    """Finished runs by name, each made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root, self.results = root, dict[str, Result]()

    def folder(self, name: str) -> Path:
        return self[name].parts.checkpoints.parent

    def __getitem__(self, name: str) -> Result:
        if name not in self.results:
            self.results[name] = run_alone(self._config(name))
        return self.results[name]

    def _config(self, name: str) -> Any:
        if name == "images":
            return dense_config(self.root, "vit", "images", {"federation": {"rounds": 1}, "data": {"max_samples": 12}})
        if name == "fft-moe":
            labels = {key: value for key, value in LABELS.items() if key == "data"}
            return dense_config(self.root, "llama", "fft-moe", labels, SHORT, {"evaluation": {"metrics": ["exact_match"]}})
        return make_config(self.root, name, LABELS, SHORT, {"method": {"name": name}}, METHODS[name])


@pytest.fixture(scope="module")
def runs(root: Path) -> Runs:
    return Runs(root)


def rows_of(capsys: pytest.CaptureFixture[str], *argv: object) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main([*map(str, argv), "--lines"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def of_round(result: Result, index: int) -> list[tuple[Any, ...]]:
    return [tuple(e.get(key) for key in FIELDS) for e in result.events if e["event"] == "eval" and e["round"] == index]


@pytest.mark.parametrize("name", [*METHODS, "fft-moe", "images"])
def test_a_runs_own_figures_to_the_last_digit(runs: Runs, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the first round and after the last one, at every tier, of every client."""
    found = rows_of(capsys, runs.folder(name), "--before")
    for index in (0, 1):
        expected = of_round(runs[name], index)
        assert [tuple(row.get(key) for key in FIELDS) for row in found if row["round"] == index] == expected
        assert len({row[4] for row in expected}) > 1, "they differ"
    assert of_round(runs[name], 0) != of_round(runs[name], 1)
    assert every(row["tokens"] > row["targets"] > 0 and row["samples"] > 0 for row in found)


def work(rank: int, root: Path) -> list[dict[str, Any]]:
    changes = {"method": {"name": "fedsa-lora"}}, PERSONAL, {"topology": {"ep_size": 2}}
    return run_joined(make_config(root, "two", LABELS, SHORT, *changes), joined(rank)).events


@pytest.mark.cluster
def test_a_run_of_two_ranks_in_one_process(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Experts and clients' own adapters in two shards, evaluated by two ranks: the same bits here."""
    events = run_distributed(work, 2, root)[0]
    expected = [tuple(e.get(key) for key in FIELDS) for e in events if e["event"] == "eval" and e["round"] == 1]
    found = rows_of(capsys, root / "runs" / "two")
    assert [tuple(row.get(key) for key in FIELDS) for row in found] == expected != []


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "data.jsonl").read_text().splitlines()]


def test_all_rows_of_other_data(runs: Runs, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Read as the run's own, whatever the file is called; words change how; what is left out is told."""
    rows = read_rows(root)
    given = write_rows(tmp_path / "given.jsonl", [*rows[:20], {"group": "client-0", "text": "", "label": "a"}])
    found = rows_of(capsys, runs.folder("flame"), "evaluation.batch_size=5", "--data", given, "--tier", "2")
    assert [(row["tier_label"], row["split"], row["samples"]) for row in found] == [("2", "global", 21)]
    assert 0 <= found[0]["exact_match"] <= found[0]["ranked_choice"] <= 1
    other = write_rows(
        tmp_path / "other.jsonl", [{"body": "x" * 200, "label": "b"}, *({"body": r["text"], "label": r["label"]} for r in rows)]
    )
    words = ("data.columns.text=body", "evaluation.metrics=[]", "data.sequence_length=32", "evaluation.max_sequences=7")
    folder, file = runs.folder("flame"), tmp_path / "figures.json"
    assert main([str(folder), "--data", str(other), *words, "--json", str(file)]) == 0
    shown, document = capsys.readouterr(), json.loads(file.read_text())
    assert "1 of 64 cut at data.sequence_length" in shown.err and "| all" in shown.out
    assert document["checkpoint"] == "round-00001" and document["omissions"]["total"] == {"cut": 1}
    assert {row["samples"] for row in document["rows"]} == {7} and len(document["rows"]) == 2


def test_a_checkpoint_says_what_its_run_says(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs.folder("flame")
    ours = rows_of(capsys, folder, "--round", 1)
    assert ours == rows_of(capsys, folder / "checkpoints" / "round-00001") != []


def test_clients_and_models(runs: Runs, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The diagonal is what training measured; other rows have clients that the run does not know."""
    for name in ("fedsa-lora", "local-only"):
        result, folder = runs[name], runs.folder(name)
        found = rows_of(capsys, folder, "--clients")
        clients, tiers = [c.name for c in result.parts.clients], {c.name: c.tier for c in result.parts.clients}
        assert len(found) == len(clients) * (len(clients) + len(set(tiers.values())))
        own = {row["client"]: row["loss"] for row in found if row["model"] == row["client"]}
        events = [e for e in result.events if e["event"] == "eval" and e["round"] == 1 and e["split"] == "client"]
        assert own == {e["client"]: e["loss"] for e in events} and len(own) == len(clients) == 4
        shared = {(row["client"], row["tier_label"]): row["loss"] for row in found if row["model"] == "global"}
        assert every(shared[client, tiers[client]] != loss for client, loss in own.items())
    given = write_rows(
        tmp_path / "given.jsonl", [row | {"group": f"new {i % 3}"} for i, row in enumerate(read_rows(root)[:12])]
    )
    options = ("--data", given, "--client", "client-1", "--tier", tiers["client-1"])
    found = rows_of(capsys, folder, *options)
    assert [(row["client"], row["model"], row["samples"]) for row in found] == [
        (f"new {i}", model, 4) for model in ("global", "client-1") for i in range(3)
    ]
    assert main([str(folder), *map(str, options)]) == 0
    text = capsys.readouterr().out
    assert f"global {tiers['client-1']}" in text and "| new 2" in text and text.startswith("perplexity\n")
    # Whose models are not personal: the tiers' alone.
    found = rows_of(capsys, runs.folder("flame"), "--clients")
    assert {row["model"] for row in found} == {"global"}
    events = [e for e in runs["flame"].events if e["event"] == "eval" and e["round"] == 1 and e["split"] == "client"]
    assert [row["loss"] for row in found] == [e["loss"] for e in events] != []


def test_a_wide_matrix_is_summed_up() -> None:
    names = [f"c{i}" for i in range(WIDEST)]
    score = lambda client, loss: Score(2, "2", "client", loss, 0.5, 3, client, 1)  # noqa: E731
    rows = [Row(score(client, 0.0 if client == model else 1.0), 1, model) for model in ("global", *names) for client in names]
    text = table(Scores(rows), given=True)
    assert "others, mean" in text and f"{WIDEST} models of clients" in text
    line = next(line for line in text.splitlines() if line.startswith("| c3"))
    assert [cell.strip() for cell in line.split("|")[1:-1]] == ["c3", "2.7183", "1.0000", "2.7183"]


def test_a_model_folder(runs: Runs, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The foundation says what the run said before its first round; so does any folder that transformers has saved."""
    words = ("data.template=classification", "data.sequence_length=40", "evaluation.batch_size=3")
    given = ("--data", root / "data.jsonl")
    before, after = rows_of(capsys, runs.folder("flora"), "--before", *given, "--tier", "8")
    assert (before["round"], after["round"]) == (0, 1) and before["loss"] != after["loss"]
    saved = tmp_path / "saved"
    shutil.copytree(root / "model", saved)
    AutoModelForCausalLM.from_pretrained(root / "model").save_pretrained(saved)
    for folder in (root / "model", saved):
        (row,) = rows_of(capsys, folder, *words, *given)
        assert row == {key: value for key, value in before.items() if key != "round"}
    (dense,) = rows_of(capsys, root / "llama", *words, *given, "data.partition.column=group", "--clients")[:1]
    assert dense["client"] == "client-0" and dense["tier_label"] == "1"


def test_an_adapter_that_was_exported(runs: Runs, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A client's own adapter in both of PEFT's formats scores every client's rows as the run's model of that client does."""
    folder, clients = runs.folder("local-only"), runs["local-only"].parts.clients
    name = next(client.name for client in clients if client.tier == "8")
    given = ("--data", root / "data.jsonl")
    ours = [row["loss"] for row in rows_of(capsys, folder, "--client", name, *given) if row["model"] == name]
    words = (
        "data.template=classification",
        "data.sequence_length=40",
        "evaluation.batch_size=3",
        "data.partition.column=group",
    )
    for fmt in ("peft", "peft-fused"):
        out = tmp_path / fmt
        assert export([str(folder), "--format", fmt, "--client", name, "--out", str(out)]) == 0
        found = rows_of(capsys, out, "--model", root / "model", *words, *given, "--clients")
        assert [row["loss"] for row in found] == ours and len(ours) == len(clients)
        assert {(row["tier_label"], row["model"]) for row in found} == {("8", "global")}


def test_what_is_served_is_what_was_trained(runs: Runs) -> None:
    """Logits of the loaded model at each tier, and of a client with its own rescaler: those of the run's evaluator."""
    result = runs["flame"]
    loaded, part = LoadedModel.of_run(open_run(runs.folder("flame"))), result.parts.data.global_holdout().select(range(2))
    evaluator, personal = result.parts.evaluator, result.parts.state.personal
    client = result.parts.clients[1]
    seen = []
    for tier, name in (("8", None), ("2", None), (None, client.name)):
        members = [client] if name else evaluator.tiers[str(tier)]
        evaluator.load_mean(members, personal)
        how = evaluator.assigned(members[0], personal, False)
        with torch.no_grad(), evaluator.receiving(how):
            expected = evaluator.run_pass([part], how).logits_NV
        with loaded.serving(tier, name) as forward:
            assert torch.equal(forward([part]).logits_NV, expected)
        seen.append(expected)
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{root}/nowhere"], r"nowhere: no such folder; give a run folder"),
        (["{root}/llama/config.json", "--data", "x"], r"config\.json: no such folder; give a run folder"),
        (["{root}"], r"neither a run \(no folder checkpoints\) nor a model"),
        (["{root}/empty"], r"holds no intact checkpoint; wait for its first round$"),
        (["{run}", "--round", "7"], r"^--round: 7: no checkpoint of it is kept; there are 1"),
        (["{run}", "--tier", "5"], r"^--tier: 5: is no tier of this run; choose among '8', '2'"),
        (["{run}", "--client", "client-9"], r"^--client: client-9: no client of this run has this name; did you mean 'client-"),
        (["{run}", "--data", "{root}/none.jsonl"], r"^data\.source: .*none\.jsonl: no such file"),
        (["{run}", "--data", "{root}/plain.jsonl"], r"^data\.columns: text: no such column for template 'classification'"),
        (["{run}", "--data", "{root}/data.jsonl", "data.template=text"], r"^evaluation\.metrics: exact_match: samples of data"),
        (["{run}", "--data", "digits"], r"^data\.source: digits: labelled images"),
        (["{images}", "--data", "{root}/data.jsonl"], r"^data\.source: .*: plain text, and the foundation is an image"),
        (["{images}", "evaluation.metrics=[exact_match]"], r"^evaluation\.metrics: exact_match: images have a class"),
        (["{images}", "--data", "digits", "--clients"], r"^--clients: digits: nothing says whose a row is"),
        (["{run}", "federation.rounds=3"], r"^federation\.rounds=3: federation\.rounds changes nothing .*; drop it$"),
        (["{run}", "data.template=text"], r"changes nothing in an evaluation of the run's own hold-outs; give --data"),
        (["{run}", "evaluation.batchsize=3"], r"batchsize changes nothing .*these do: evaluation\.batch_size"),
        (["{run}", "evaluation.batch_size=none"], r"^evaluation\.batch_size: none: expected integer"),
        (["{run}", "evaluation.client_sequences=0", "--clients"], r"^--clients: no client has a hold-out that counts"),
        (["{run}", "data.source={root}/plain.jsonl", "data.columns={}"], r"data\.columns changes nothing"),
        (["{run}", "data.source={root}/fewer.jsonl"], r"^data\.source: .*: not the data of this run any more"),
        (["{run}", "--json", "{root}/none/x.json"], r"^--json: .*no such folder, or it cannot be written"),
        (["{root}/model"], r"^--data: missing: .* is a model and has no hold-outs"),
        (["{root}/model", "--data", "{root}/data.jsonl", "--tier", "2"], r"^--tier: 2: a model folder has its own top-k \(8\)"),
        (["{root}/model", "--data", "{root}/data.jsonl", "--client", "x"], r"^--client: x: a model folder has no clients"),
        (["{root}/model", "--data", "{root}/data.jsonl", "--before"], r"^--before: a model folder has no rounds"),
        (["{root}/model", "--data", "x", "--round", "2"], r"^--round: 2: .* is a model and no run; drop the option$"),
        (["{root}/model", "--data", "{root}/data.jsonl", "local.lr=1"], r"^local\.lr=1: local\.lr changes nothing .*drop it$"),
        (["{root}/strange", "--data", "{root}/data.jsonl"], r"strange.*'mamba'"),
        (["{root}/adapter", "--data", "x"], r"^adapter: .*adapter_config\.json"),
    ],
)  # fmt: skip
def test_mistakes(runs: Runs, root: Path, words: list[str], message: str) -> None:
    if not (root / "strange").exists():
        (root / "empty" / "checkpoints").mkdir(parents=True)
        (root / "adapter").mkdir()
        (root / "adapter" / "adapter_config.json").write_text("{}")
        (root / "strange").mkdir()
        (root / "strange" / "config.json").write_text(json.dumps({"model_type": "mamba"}))
        write_rows(root / "plain.jsonl", [{"body": "x", "group": "client-0"}] * 3)
        write_rows(root / "fewer.jsonl", read_rows(root)[:-1])
    places = {"root": root, "run": runs.folder("flame"), **({"images": runs.folder("images")} if "{images}" in words else {})}
    with pytest.raises(UserError, match=message) as caught:
        main([word.replace("{}", "{{}}").format(**places) for word in words])
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
