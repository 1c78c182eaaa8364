"""Evaluation's passes: as large as those of training are, and what is scored does not depend on how large that is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from federations import alone, make_config, write_inputs

from fedmoe_ds.config import Config
from fedmoe_ds.distributed.topology import ParallelLayout
from fedmoe_ds.federation.build import Parts, load_parts
from fedmoe_ds.federation.evaluation_passes import most_together
from fedmoe_ds.federation.journal import Journal
from fedmoe_ds.planner import evaluation as planned
from fedmoe_ds.planner import resolve
from fedmoe_ds.planner.hardware import load_hardware
from fedmoe_ds.planner.prediction import predict_job
from fedmoe_ds.planner.world import World

CLIENTS = 9
ALL: dict[str, Any] = {
    "method": {"name": "fedit"},
    "execution": {"clients_in_flight": None},
    "evaluation": {"max_sequences": 2, "client_sequences": 2},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("passes")
    write_inputs(folder, samples=(9,) * CLIENTS, num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)
    return folder


def started(root: Path, clusters: int) -> Parts:
    """The first rank of so many clusters."""
    runtime, topology = alone()
    config = make_config(root, f"clusters-{clusters}", ALL)
    journal = Journal(Path(config.output) / config.name, runtime)
    parts = load_parts(config, runtime, replace(topology, layout=ParallelLayout(clusters, 1)), journal.progress)
    journal.close()
    return parts


@pytest.mark.parametrize(("clusters", "clients"), [(1, CLIENTS), (3, 3), (CLIENTS, 1), (CLIENTS + 4, 1)])
def test_a_pass_is_as_large_as_one_of_training(root: Path, clusters: int, clients: int) -> None:
    """With all clients in flight, too: a rank's memory is for those of its cluster. A step has micro-batches of 3."""
    parts = started(root, clusters)
    assert parts.in_flight == clients
    assert parts.evaluator.together == 3 * clients


def test_figures_are_those_of_any_cut(root: Path) -> None:
    """And so on any number of clusters."""
    parts = started(root, 1)
    evaluator, personal = parts.evaluator, parts.state.personal
    found, passes = list[Any](), list[int]()
    for together in (2, 3, 7, 3 * CLIENTS):
        evaluator.together = together
        owners = [evaluator.client_part(client) for client in parts.clients]
        passes.append(len(evaluator._cut(owners)))
        found.append([(score, score.loss.hex(), score.accuracy.hex()) for score in evaluator.scores(personal, True, False)])
    assert passes == [5, 3, 2, 1] and len(found[0]) > CLIENTS
    assert found == [found[0]] * 4


def test_the_planner_cuts_alike(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, hardware = resolve(make_config(root, "planned", ALL), assume=False), load_hardware("cpu")
    homes: list[int] = []

    def counted(config: Config, home: int) -> int:
        homes.append(home)
        return most_together(config, home)

    monkeypatch.setattr(planned, "most_together", counted)
    for clusters, clients in ((1, CLIENTS), (3, 3), (CLIENTS, 1)):
        world = World(1, clusters)
        planned.evaluation_seconds(job, 1, world, hardware)
        predict_job(job, 1, None, world, hardware, job.config.federation.rounds)
        assert homes and {*homes} == {clients}
        homes.clear()
