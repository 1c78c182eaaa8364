"""The best round: chosen by its evaluation rows alone, its checkpoint kept, whatever happens to the run; no bit changes."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from distributed import run_distributed
from federations import alone, joined, make_config, read_events, write_inputs
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedmoe_ds.checkpoint.reader import Snapshot, candidates
from fedmoe_ds.checkpoint.writer import CheckpointWriter
from fedmoe_ds.config import CheckpointConfig, Config, idle_keys
from fedmoe_ds.distributed.runtime import Runtime
from fedmoe_ds.distributed.topology import Topology, build_topology
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation import session
from fedmoe_ds.federation.best_round import BestRound, best_round
from fedmoe_ds.federation.build import load_parts
from fedmoe_ds.federation.evaluation import Score
from fedmoe_ds.federation.journal import Journal
from fedmoe_ds.federation.rounds import Federation
from fedmoe_ds.results import open_run, round_choice

SMALL: dict[str, Any] = {
    "federation": {"rounds": 5, "tiers": [{"top_k": 2, "share": 1.0}, {"top_k": 1, "share": 1.0}]},
    "local": {"max_steps": 1, "batch_size": 3},
    "execution": {"micro_batch_size": 2},
    "evaluation": {"max_sequences": 2, "client_sequences": 0},
}
BEST: dict[str, Any] = {"checkpoint": {"best": "perplexity", "keep": 1, "every": 10}}
CURVE = {0: 1.0, 1: 5.0, 2: 3.0, 3: 4.0, 4: 3.0, 5: 9.0}
"""Perplexity of the largest tier: the foundation is no candidate, and of equal rounds the first counts."""


class KilledError(BaseException):
    """Stands for a kill."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("best")
    write_inputs(folder, samples=(7, 6, 5), num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)
    return folder


def start(
    config: Config,
    world: tuple[Runtime, Topology],
    curve: Mapping[int, float] | None = None,
    dies: tuple[str, int] | None = None,
) -> str:
    """One start, as `session.train` does it; the digest at its end.

    Args:
        curve: perplexity of the largest tier by round, in place of what is evaluated.
        dies: a moment of a round in which the process is killed.
    """
    runtime, topology = world
    folder = Path(config.output) / config.name
    source = runtime.run_on_rank0(lambda: session.claim_folder(folder, "auto"))
    journal = Journal(folder, runtime)
    parts = load_parts(config, runtime, topology, journal.progress)
    session.begin(parts, journal, source["checkpoint"])
    federation = Federation(parts, journal)
    if curve is not None:
        real, figures = parts.evaluator.scores, curve

        def scores(personal: Any, per_client: bool, plain: bool) -> list[Score]:
            figure = math.log(figures[0 if plain else parts.state.round])
            return [replace(row, loss=figure if row.label == "2" else -figure) for row in real(personal, per_client, plain)]

        parts.evaluator.scores = scores  # type: ignore[method-assign]
    if dies is not None:
        _let_die(federation, journal, *dies)
    digest = federation.run().digest
    journal.close()
    return digest


def _let_die(federation: Federation, journal: Journal, moment: str, round_index: int) -> None:
    owner, name = {
        "evaluated": (journal, "round"),
        "reported": (federation.checkpoints, "round_done"),
        "saving": (journal, "start_round"),
    }[moment]
    real, last = getattr(owner, name), round_index + (moment == "saving")

    def deadly(index: int, *rest: Any) -> Any:
        if index == last:
            raise KilledError
        return real(index, *rest)

    setattr(owner, name, deadly)


def kept(config: Config) -> list[str]:
    return sorted(path.name for path in candidates(Path(config.output) / config.name / "checkpoints"))


@pytest.fixture(scope="module")
def plain(root: Path) -> str:
    """The digest of the run without a best round."""
    return start(make_config(root, "plain", SMALL), alone())


def test_the_best_round_is_kept_and_told(root: Path, plain: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(root, "straight", SMALL, BEST)
    assert start(config, alone(), CURVE) == plain
    folder = Path(config.output) / config.name
    assert kept(config) == ["round-00002", "round-00005"] and best_round(folder) == 2
    saved = [(e["round"], e["best"]) for e in read_events(folder) if e["event"] == "checkpoint"]
    assert saved == [(1, 1), (2, 2), (5, 2)], "where none was due, too"
    said = capsys.readouterr().err
    assert "best round so far: 2 (perplexity 3, the largest tier, global hold-out)" in said
    assert best_round(Path(config.output) / "plain") is None
    assert open_run(folder, round_choice("best")).round == 2 and open_run(folder, round_choice("5")).round == 5
    with pytest.raises(UserError, match=r"^--round: best: .*plain keeps no best round: checkpoint.best is null"):
        open_run(Path(config.output) / "plain", "best")
    with pytest.raises(ValueError):
        round_choice("newest")


MOMENTS = [(moment, round_index) for moment in ("evaluated", "reported", "saving") for round_index in (2, 3)]
FIRST = [("evaluated", 2), ("saving", 2), ("reported", 3)]


@pytest.mark.parametrize(
    "moment, round_index", [*FIRST, *(pytest.param(*case, marks=pytest.mark.sweep) for case in MOMENTS if case not in FIRST)]
)
def test_a_kill_and_a_resume_choose_alike(root: Path, plain: str, moment: str, round_index: int) -> None:
    config = make_config(root, f"killed-{moment}-{round_index}", SMALL, BEST, {"checkpoint": {"every": 1}})
    with pytest.raises(KilledError):
        start(config, alone(), CURVE, (moment, round_index))
    assert start(config, alone(), CURVE) == plain
    assert kept(config) == ["round-00002", "round-00005"]
    assert best_round(Path(config.output) / config.name) == 2


def test_a_best_round_that_a_disk_has_lost(root: Path, plain: str) -> None:
    """The newest checkpoint, which is the best, is damaged: it is trained again, and found again."""
    config = make_config(root, "damaged", SMALL, BEST, {"checkpoint": {"keep": 2, "every": 1}})
    with pytest.raises(KilledError):
        start(config, alone(), CURVE, ("evaluated", 3))
    folder = Path(config.output) / config.name
    (folder / "checkpoints" / "round-00002" / "manifest.json").write_text("")
    assert start(config, alone(), CURVE) == plain
    assert kept(config) == ["round-00002", "round-00004", "round-00005"]


def test_a_best_round_that_a_disk_has_damaged(root: Path, plain: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No longer compared with, nor protected: the best of the others is, at a resume and for whoever asks."""
    config = make_config(root, "flipped", SMALL, BEST, {"federation": {"rounds": 3}, "checkpoint": {"keep": 9, "every": 1}})
    start(config, alone(), CURVE)
    folder = Path(config.output) / config.name
    assert best_round(folder) == 2
    path = next((folder / "checkpoints" / "round-00002").glob("adapters-*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    line = f"checkpoint round-00002, the best round, is damaged ({path.name} does not match its checksum); taking the best of"
    capsys.readouterr()
    assert best_round(folder) == 3 and open_run(folder, "best").round == 3 and capsys.readouterr().err.count(line) == 2
    further = make_config(root, "flipped", SMALL, BEST)
    assert start(further, alone(), {**CURVE, 4: 3.5}) == plain, "round 4 is better than 3, and not than 2"
    assert line in capsys.readouterr().err
    assert kept(further) == ["round-00004", "round-00005"] and best_round(folder) == 4


def test_a_key_that_is_set_late_takes_what_is_there(root: Path) -> None:
    config = make_config(root, "late", SMALL, {"checkpoint": {"keep": 1}, "federation": {"rounds": 3}})
    start(config, alone(), CURVE)
    late = make_config(root, "late", SMALL, BEST)
    start(late, alone(), {**CURVE, 4: 4.5})
    assert kept(late) == ["round-00003", "round-00005"], "rounds 1 and 2 were gone"
    shutil.rmtree(Path(late.output) / "late" / "checkpoints" / "round-00003")
    assert best_round(Path(late.output) / "late") == 5


ROWS = st.lists(
    st.tuples(
        st.integers(0, 6),
        st.sampled_from(["global", "clients", "client"]),
        st.sampled_from(["4", "4 r2", "1"]),
        st.sampled_from([None, math.nan, math.inf, 0.0, 0.25, 0.5, 1.0]),
    ),
    max_size=30,
    unique_by=lambda row: row[:3],
)


@given(
    ROWS, st.sampled_from(["perplexity", "accuracy"]), st.sampled_from(["global", "clients"]), st.sampled_from([None, "4 r2"])
)
def test_the_choice_is_a_function_of_the_rows(rows: list[Any], metric: Any, split: Any, tier: str | None) -> None:
    saving = CheckpointConfig(best=metric, best_split=split, best_tier=tier)
    events = [
        {"event": "eval", "round": r, "split": s, "tier_label": label, metric: value, "loss": 1.0}
        for r, s, label, value in rows
    ]
    rounds = set(range(7))
    figures = {}
    for round_index in sorted(rounds - {0}):
        there = {label: value for r, s, label, value in rows if (r, s) == (round_index, split)}
        label = next((name for name in (("4", "4 r2", "1") if tier is None else (tier,)) if name in there), None)
        if label is not None and there[label] is not None and math.isfinite(there[label]):
            figures[round_index] = there[label]
    chosen = (min if metric == "perplexity" else max)(figures, key=lambda r: figures[r]) if figures else None
    for order in (events, events[::-1]):
        best = BestRound(saving)
        best.see_record(order, rounds)
        assert best.round == chosen
    # In two starts: what the first has seen is read from the record by the second.
    if chosen is not None:
        again = BestRound(saving)
        again.see_record(events, {chosen, *(r for r in rounds if r > chosen)})
        assert again.round == chosen


@pytest.mark.parametrize("background", [False, True])
def test_the_writer_spares_it(tmp_path: Path, background: bool) -> None:
    import torch

    def save(round_index: int, partial: dict[str, Any] | None, best: int | None) -> list[str]:
        writer = CheckpointWriter(tmp_path, alone()[0], 1, background)
        files = {"adapters-00000-of-00001.safetensors": {"x": torch.zeros(1)}}
        writer.begin(Snapshot(round_index, {}, 0, partial), files, {}, best)
        done = writer.finish()
        assert done is not None and done.best == best
        return [path.name for path in candidates(tmp_path)]

    partial: dict[str, Any] = {"done": {}, "activation": {}, "seconds": 0.0}
    assert save(1, None, 1) == ["round-00001"]
    assert save(2, None, 1) == ["round-00002", "round-00001"]
    assert save(3, None, 1) == ["round-00003", "round-00001"]
    assert save(3, partial, 1) == ["round-00003-partial", "round-00003", "round-00001"]
    assert save(4, None, 4) == ["round-00004"]
    assert save(5, None, 4) == ["round-00005", "round-00004"]
    assert save(6, None, None) == ["round-00006"]


@pytest.mark.parametrize(
    "tree, line",
    [
        (
            {"checkpoint": {"best": "exact_match"}},
            "checkpoint.best: exact_match: it is not evaluated; add it to evaluation.metrics",
        ),
        ({"checkpoint": {"best": "accuracy", "best_split": "clients"}}, "evaluation.clients_every is 0"),
        (
            {
                "checkpoint": {"best": "accuracy", "best_split": "clients"},
                "evaluation": {"clients_every": 1, "client_sequences": 0},
            },
            "evaluation.client_sequences is 0",
        ),
        ({"checkpoint": {"best": "speed"}}, "perplexity"),
    ],
)
def test_what_is_never_evaluated_is_refused(tree: dict[str, Any], line: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Config.model_validate(tree)
    assert line in str(caught.value)


def test_keys_beside_it(root: Path) -> None:
    assert CheckpointConfig.model_validate({"best": "accuracy", "best_tier": 4}).best_tier == "4", "as YAML reads it"
    assert [text.split("=")[0] for text in idle_keys(Config.model_validate({"checkpoint": {"best_tier": "2"}}))] == [
        "checkpoint.best_tier"
    ]
    with pytest.raises(UserError, match=r"^checkpoint.best_tier: 8: the run's tiers are 2, 1; name one of them"):
        start(make_config(root, "tier", SMALL, BEST, {"checkpoint": {"best_tier": "8"}}), alone())
    small = make_config(root, "small-tier", SMALL, BEST, {"checkpoint": {"best_tier": "1"}})
    start(small, alone(), CURVE)
    assert best_round(Path(small.output) / small.name) == 5, "its figures are the inverse ones"


def work(rank: int, root: Path) -> list[str]:
    runtime = joined(rank)
    digests = []
    for ep_size in (1, 2):
        tag = {"checkpoint": {"best": "accuracy", "keep": 1}, "topology": {"ep_size": ep_size}}
        for rounds in (3, 5):
            config = make_config(root, f"ranks-{ep_size}", SMALL, tag, {"federation": {"rounds": rounds}})
            digests.append(start(config, (runtime, build_topology(config.topology, runtime))))
    return digests


@pytest.mark.cluster
def test_ranks_agree(root: Path, plain: str) -> None:
    alone_too = make_config(root, "ranks-0", SMALL, {"checkpoint": {"best": "accuracy", "keep": 1}})
    assert start(alone_too, alone()) == plain
    for found in run_distributed(work, 2, root):
        assert found[1] == found[3] == plain
    runs = Path(alone_too.output)
    assert len({best_round(runs / f"ranks-{ep_size}") for ep_size in (0, 1, 2)}) == 1
