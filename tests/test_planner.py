"""The planner: hardware, legality, FLOPs of FLAME's tiers, predictions that react to what they are asked, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from every import every
from federations import make_config, write_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from method_variants import variant_config
from planned import OLMOE, olmoe, small

from fedmoe_ds.aggregation.averaged_statistics import AveragedStatistics
from fedmoe_ds.aggregation.round_sums import RoundSums
from fedmoe_ds.bench.harness.shapes import Shape, write_model
from fedmoe_ds.commands import plan as plan_command
from fedmoe_ds.config import Config, load_config
from fedmoe_ds.distributed.topology import ParallelLayout
from fedmoe_ds.errors import UserError
from fedmoe_ds.methods.client_drift import keeps_variables
from fedmoe_ds.planner import Job, World, load_hardware, predict_job, resolve
from fedmoe_ds.planner.flops import tier_flops
from fedmoe_ds.planner.hardware import TABLE
from fedmoe_ds.planner.legality import (
    check_ep_size,
    idle_clusters,
    idle_ranks,
    legal_sizes,
)
from fedmoe_ds.planner.plan import plan
from fedmoe_ds.planner.search import search
from fedmoe_ds.planner.text import format_span, layout_lines
from fedmoe_ds.planner.verify import check_partition
from fedmoe_ds.planner.work import PassWork, Work
from fedmoe_ds.planner.world import world_of
from fedmoe_ds.studies.scaling.measured import Measured
from fedmoe_ds.studies.scaling.predicted import Predictor

__all__ = ["olmoe", "small"]
# FLAME prints the first and the last; the two between follow from C(k) = C_dense + k C_expert.
FLAME = {8: 342.8e9, 4: 237.2e9, 2: 184.4e9, 1: 158.0e9}


def test_flame_table(olmoe: Job) -> None:
    """The cost of an active expert is FLAME's; its dense part is larger than what the model's matrices take."""
    ours = {int(tier.label): tier.total for tier in tier_flops(olmoe, tokens=128)}
    assert list(ours) == [8, 4, 2, 1]
    slope = (FLAME[8] - FLAME[1]) / 7
    for high, low in ((8, 4), (4, 2), (2, 1)):
        assert (ours[high] - ours[low]) / (FLAME[high] - FLAME[low]) == pytest.approx(1.0, abs=0.015)
    dense = FLAME[1] - slope
    remainder = dense - tier_flops(olmoe, tokens=128)[0].dense
    assert 30e9 < remainder < 40e9, "what FLAME counts beside attention, router, head and their adapters"
    for k, total in ours.items():
        assert total + remainder == pytest.approx(FLAME[k], rel=0.006), k


def test_expert_cost_is_exact(olmoe: Job) -> None:
    """One active expert in 16 layers: three 2048 x 1024 matrices, rank-16 adapters on both products, 2 FLOPs a number."""
    tiers = tier_flops(olmoe, tokens=1)
    numbers = 16 * (3 * 2048 * 1024 + 16 * (2048 + 2048 + 1024 + 2048))
    assert tiers[2].total - tiers[3].total == 2.0 * numbers


def test_shapes_come_from_the_configuration(olmoe: Job) -> None:
    assert olmoe.size.pool_parameters == 16 * 64 * 3 * 2048 * 1024
    assert olmoe.size.bytes_per_parameter == 2 and olmoe.head == 50304 * 2048
    assert olmoe.data.assumed is not None and "no tokenizer" in olmoe.data.assumed
    assert olmoe.steps(olmoe.clients[0], 1).rows.tolist() == [16 * 128] * 24


def test_assumed_clients_need_a_number(olmoe: Job) -> None:
    with pytest.raises(UserError, match=r"data\.partition\.clients: not set: .* holds no tokenizer"):
        resolve(load_config(OLMOE, [f"foundation.path={olmoe.config.foundation.path}", "data.partition.clients=null"]))


@given(st.integers(1, 600), st.integers(1, 600), st.integers(1, 600))
@settings(deadline=None, max_examples=300)
def test_a_layout_is_legal_or_refused_with_its_numbers(world: int, ep_size: int, experts: int) -> None:
    if ep_size in legal_sizes(world, experts):
        layout = check_ep_size(world, ep_size, experts)
        check_partition(layout, experts)
        assert layout.clusters * ep_size == world
        return
    with pytest.raises(UserError, match=rf"topology\.ep_size: {ep_size}: .*({world} ranks|{experts} experts)"):
        check_ep_size(world, ep_size, experts)


@given(st.integers(1, 5000), st.integers(1, 512))
@settings(deadline=None)
def test_legal_sizes_divide_both(world: int, experts: int) -> None:
    sizes = legal_sizes(world, experts)
    assert sizes[0] == 1 and sizes == sorted(size for size in range(1, 513) if world % size == 0 and experts % size == 0)


def test_partition_check_can_fail() -> None:
    class Crooked(ParallelLayout):
        def shard(self, rank: int) -> int:
            return 0

    with pytest.raises(AssertionError):
        check_partition(Crooked(8, 2), 8)


def test_every_machine_of_the_table_loads_and_names_its_source() -> None:
    names = list(yaml.safe_load(TABLE.read_text()))
    assert {"h100", "h200", "a100", "mi300x", "cpu"} <= set(names)
    for name in names:
        assert load_hardware(name).compute.flops_per_s["bfloat16"] > 1e9
    lines = TABLE.read_text().splitlines()
    figures = [line for line in lines if line.startswith("  ") and ("peak" in line or "memory_gb" in line or "inter:" in line)]
    assert every("#" in line for line in figures), "every figure says where it is from"


def test_unknown_hardware_and_broken_calibration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'h200'"):
        load_hardware("h20")
    (tmp_path / "old.json").write_text('{"name": "x"}')
    with pytest.raises(UserError, match=r"old\.json: not a calibration of this version .*bench calibrate"):
        load_hardware(tmp_path / "old.json")


def test_a_calibration_replaces_the_table(tmp_path: Path, small: Job) -> None:
    cpu = load_hardware("cpu")
    slower = cpu.model_copy(update={"name": "slow", "compute": cpu.compute.slower(3.0), "measured": ["compute"]})
    (tmp_path / "slow.json").write_text(slower.model_dump_json())
    again = load_hardware(tmp_path / "slow.json")
    assert again == slower
    fast, slow = (predict_job(small, 1, 8, World(1, 1), hardware).seconds["train"] for hardware in (cpu, again))
    assert slow == pytest.approx(3.0 * fast)


def test_worlds() -> None:
    h100 = load_hardware("h100")
    assert world_of(16, 8, None, h100).ranks == 128 and world_of(2, None, None, h100) == World(2, 8)
    assert world_of(None, None, 64, h100) == World(8, 8) and world_of(None, None, 4096, h100) == World(512, 8)
    assert world_of(None, None, 3, h100) == World(1, 3) and world_of(4, None, 16, h100) == World(4, 4)
    assert world_of(None, 16, 64, h100) == World(4, 16) == world_of(4, 16, 64, h100), "more than devices, as asked for"


def test_ranks_of_a_calibrated_machine_share_it() -> None:
    here = load_hardware("cpu").model_copy(update={"slots": 2, "measured": ["compute"]})
    assert world_of(None, None, 6, here) == World(1, 6) and world_of(3, None, 6, here) == World(3, 2)
    assert here.origin(1) == "measured here" and here.origin(2) == "measured here, links between hosts assumed"


@pytest.mark.parametrize(
    ("hosts", "per_host", "ranks", "reason"),
    [
        (None, None, 20, "--ranks: 20: not a whole number of hosts of 8 ranks"),
        (2, 8, 32, "--ranks: 32: not 2 hosts of 8 ranks"),
        (None, 8, 12, "--ranks: 12: not a whole number of hosts of 8 ranks"),
        (3, None, 64, "--ranks: 64: cannot be dealt evenly to 3 hosts"),
        (
            1,
            None,
            64,
            "--ranks: 64: 64 ranks on each of 1 hosts, and h100 has 8 devices; use --nodes 8, or say --gpus-per-node 64",
        ),
    ],
)
def test_worlds_that_contradict_themselves(hosts: int | None, per_host: int | None, ranks: int, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        world_of(hosts, per_host, ranks, load_hardware("h100"))


def test_prediction_counts_what_a_round_sends(small: Job) -> None:
    """Bytes of aggregation are exact: two 64-bit digits for every number and weight of what is averaged, and two windows."""
    cpu = load_hardware("cpu")
    alone, apart, shared = (
        predict_job(small, *place, cpu) for place in ((1, 8, World(1, 1)), (1, 8, World(1, 2)), (2, 8, World(1, 2)))
    )
    assert not alone.traffic
    numbers = sum(len(b.layers) * (16 if b.expert else 1) * (_product(b.item) + 1) for b in small.blocks if not b.personal)
    weights = sum(len(b.layers) * (16 if b.expert else 1) for b in small.blocks if not b.personal)
    assert apart.bytes["all_reduce"] == (numbers + weights) * 16
    assert 0 < apart.bytes["all_to_all"] < 100, "clients' own rows alone: no row of theirs leaves for experts"
    assert shared.bytes["all_to_all"] > 0
    rows = sum(int(small.steps(client, 1).rows.sum()) * client.cap for client in small.clients)
    wide = rows * len(small.expert_layout.layers) * small.expert_layout.width * 4 / 2
    assert 4.0 < shared.bytes["all_to_all"] / wide < 5.5, "rows and results, forward and backward, and evaluation"


@pytest.mark.parametrize("variant", ["flora", "scaffold", "fedvra-rows", "fedit", "ewwa-fl", "fednova", "fedfm"])
def test_prediction_counts_every_sum_of_a_method(tmp_path: Path, variant: str) -> None:
    """Factors, control variates, tallies, statistics and weights of elements travel, too: the bytes are those of a real round's
    sums, dense ones twice."""
    write_inputs(tmp_path)
    job, cpu = resolve(variant_config(tmp_path, variant, "planned")), load_hardware("cpu")
    participants, kept = len(job.participants(1)), keeps_variables(job.config.local)
    sums = RoundSums(
        job.blocks, job.expert_layout.num_experts // 2, True, participants if job.method.collects else None, kept,
        weighing=job.method.weighing, keyed=AveragedStatistics(job.method.statistics()),
    )  # fmt: skip
    sizes = [(spec.expert, tensor.nbytes) for spec, _, _, tensor in sums.tensors()]
    found = predict_job(job, 2, 8, World(1, 4), cpu)
    assert found.bytes["all_reduce"] == sum(size if expert else 2 * size for expert, size in sizes)
    assert found.traffic["all_reduce"].calls == {"scaffold": 8, "fedvra-rows": 8, "fedfm": 8}.get(variant, 4)


def _product(item: tuple[int, ...]) -> int:
    result = 1
    for length in item:
        result *= length
    return result


def test_more_ranks_than_cores_take_turns(small: Job) -> None:
    cpu = load_hardware("cpu")
    wide, narrow = (cpu.model_copy(update={"slots": cores}) for cores in (4, 1))
    fast, slow = (predict_job(small, 1, 8, World(1, 4), hardware).seconds["train"] for hardware in (wide, narrow))
    assert slow > 1.8 * fast


def test_the_last_round_evaluates_every_client(small: Job) -> None:
    cpu = load_hardware("cpu")
    first, last = (predict_job(small, 1, 8, World(1, 1), cpu, index).seconds["evaluate"] for index in (1, 2))
    assert last > first > 0


def test_a_study_counts_evaluations_as_often_as_they_happen(tmp_path: Path) -> None:
    """Rounds 0 to 6: the foundation, 2, 4 and 6; every client with the first and the last, and in round 4."""
    write_inputs(tmp_path)
    often = {"every": 2, "clients_every": 4, "client_sequences": 2}
    config = make_config(tmp_path, "study", {"federation": {"rounds": 6}, "evaluation": often})
    cpu, world = load_hardware("cpu"), World(1, 1)
    found = plan(config, world, cpu, searching=False)
    first, shared, own = (predict_job(found.job, 1, None, world, cpu, index).seconds["evaluate"] for index in (1, 2, 4))
    assert first == 0 and own > shared > 0
    assert found.evaluation_s == pytest.approx(shared + 3 * own)
    assert found.seed_seconds == pytest.approx(6 * found.prediction.round_seconds + shared + 3 * own)


def test_unequal_hosts_are_not_predicted(small: Job) -> None:
    run = Measured(3, 3, 1, 6, 2, (2,), 1e3, None, 1.0, 1.0, {}, None, None, None, "", True, {}, {})
    predictor = Predictor("cpu")
    assert predictor.seconds(small.config, run) is None
    assert (predictor.seconds(small.config, replace(run, hosts=3)) or 0.0) > 0


def test_auto_is_fast_on_a_gpu(tmp_path: Path) -> None:
    """Bitwise mode refuses threads and odd widths; a plan for a GPU must not refuse what would run there."""
    write_inputs(tmp_path)
    auto = {"execution": {"reproducible": "auto"}}
    config = make_config(tmp_path, "auto", auto, {"execution": {"threads": 2}})
    shown = plan(config, World(1, 1), load_hardware("h100"), searching=False).lines()
    assert any(line.endswith(", fast") for line in shown)
    with pytest.raises(UserError, match="bitwise mode needs 1"):
        plan(config, World(1, 1), load_hardware("cpu"))
    write_model(Shape("odd", experts=4, hidden=32, ffn=18, layers=1, heads=2, vocab=320, top_k=2), 0, tmp_path / "odd")
    assumed = {"partition": {"clients": 2}, "max_samples": 4}
    config = make_config(tmp_path, "odd", {"foundation": {"path": str(tmp_path / "odd")}, "data": assumed}, auto)
    assert not resolve(config, kind="cuda").bitwise
    with pytest.raises(UserError, match="widths 32 and 18 must be multiples of 4"):
        resolve(config)


def test_ranks_without_clients_are_told(olmoe: Job) -> None:
    """256 participants on 128 clusters of 8 ranks: two clients each, and six ranks that have none."""
    h200, world = load_hardware("h200"), World(128, 8)
    found = predict_job(olmoe, 8, 32, world, h200)
    assert found.homeless == 768 and found.balance == pytest.approx(1.0, abs=0.05)
    assert "768 of 1024 ranks have no client of their own" in str(idle_ranks(768, 1024, 128, 256))
    assert idle_ranks(100, 1024, 128, 256) is None and idle_ranks(768, 1024, 1024, 256) is None
    assert "768 of 1024 ranks without a client" in layout_lines(olmoe, world, 8, found)[0]


@pytest.mark.parametrize(("kind", "told"), [("cpu", "on a CPU that hides nothing"), ("cuda", "what that hides is derived")])
def test_rows_that_travel_in_halves_are_told(olmoe: Job, kind: str, told: str) -> None:
    found = predict_job(olmoe, 8, 32, World(2, 8), load_hardware("h200"))
    halves = olmoe.config.model_copy(update={"execution": olmoe.config.execution.model_copy(update={"expert_halves": True})})
    line = layout_lines(replace(olmoe, device=kind, config=halves), World(2, 8), 8, found)[0]
    assert f"; rows travel in two halves: {told}" in line
    assert "halves" not in layout_lines(olmoe, World(2, 8), 8, found)[0]


def test_a_range_on_assumed_machines() -> None:
    assert format_span(12.345, (0.67, 2.0)) == "8.3 to 25 s" and format_span(12.345) == "12.35 s"
    assert format_span(1e-4, (0.67, 2.0)) == "67 to 200 us" and format_span(4000.0, (0.67, 2.0)) == "0.74 to 2.2 h"
    h200 = load_hardware("h200")
    assert h200.spread == (0.67, 2.0) and h200.model_copy(update={"measured": ["compute"]}).spread == (1.0, 1.0)


def test_narrow_products_wait_for_memory(olmoe: Job) -> None:
    """A product with adapters does R FLOPs per number of its wide side: memory feeds no more, however fast the products are."""
    h200 = load_hardware("h200")
    work, compute = PassWork(olmoe, training=True), h200.compute
    frozen, narrow = (float(work.seconds(Work(**{kind: 1e12}), compute)) for kind in ("flops", "adapters"))
    bytes_ = 1e12 * olmoe.row_bytes / (2 * olmoe.config.adapters.rank)
    assert narrow == pytest.approx(bytes_ / compute.bytes_per_s) and narrow > 5 * frozen


def test_an_output_matrix_that_is_tied_is_a_product(tmp_path: Path, olmoe: Job) -> None:
    """It is counted once, and costs what one of its own costs."""
    tree = json.loads((Path(str(olmoe.config.foundation.path)) / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    tied = resolve(load_config(OLMOE, [f"foundation.path={tmp_path}"]))
    assert tied.size.tied and tied.size.dense_parameters == olmoe.size.dense_parameters - olmoe.head
    assert (tied.cost, tied.body, tied.head) == (olmoe.cost, olmoe.body, olmoe.head)


def test_idle_clusters_are_named() -> None:
    assert idle_clusters(8, 8) is None
    assert idle_clusters(8, 5) is not None and "3 of 8 clusters are idle: a round has 5 participants" in str(
        idle_clusters(8, 5)
    )


def test_search_prefers_the_faster(olmoe: Job) -> None:
    choices, _ = search(olmoe, World(2, 8), load_hardware("h200"))
    seconds = [choice.prediction.round_seconds for choice in choices]
    assert seconds == sorted(seconds) and seconds[-1] > 1.2 * seconds[0]
    assert {choice.ep_size for choice in choices} == {1, 2, 4, 8, 16}


def test_clusters_that_do_not_match(small: Job) -> None:
    tree = small.config.model_dump() | {"topology": {"clusters": 3}}
    with pytest.raises(UserError, match=r"topology\.clusters: 3: 4 ranks with ep_size 1 make 4 clusters"):
        plan(Config.model_validate(tree), World(1, 4), load_hardware("cpu"))


def run_command(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """`launch/plan.py` in this process."""
    assert plan_command.main(list(words)) == 0
    return capsys.readouterr().out


def test_the_command(tmp_path: Path, olmoe: Job, capsys: pytest.CaptureFixture[str]) -> None:
    world = ["--nodes", "2", "--gpus-per-node", "8", "--gpu", "h200", "--seeds", "3", "--json", str(tmp_path / "plan.json")]
    path = f"foundation.path={olmoe.config.foundation.path}"
    shown = run_command(capsys, "--config", str(OLMOE), *world, "--no-search", path, "federation.rounds=2")
    for words in (
        "world: 2 hosts x 8 = 16 ranks on h200 (table, efficiencies assumed)",
        "topology: 2 clusters x ep_size 8, 8 experts per rank and layer",
        "memory per rank:",
        "round 1 by phase:",
        "all_to_all",
        "FLOPs per tier, forward pass of one sequence of 128 rows",
        "study: 2 rounds x 3 seeds",
    ):
        assert words in shown, shown
    data: dict[str, Any] = json.loads((tmp_path / "plan.json").read_text())
    assert data["ranks"] == 16 and data["rank_hours"] == pytest.approx(data["seed_s"] / 3600 * 48)


def test_overrides_stand_anywhere(olmoe: Job, capsys: pytest.CaptureFixture[str]) -> None:
    path = f"foundation.path={olmoe.config.foundation.path}"
    words = [
        path,
        "--config",
        str(OLMOE),
        "--verify",
        "topology.ep_size=4",
        "--ranks",
        "16",
        "federation.rounds=2",
        "--no-search",
    ]
    shown = run_command(capsys, *words)
    assert "world: 2 hosts x 8 = 16 ranks" in shown and "topology: 4 clusters x ep_size 4" in shown
    assert "verified: as 6 of 16 ranks" in shown and "study: 2 rounds" in shown
    shown = run_command(capsys, *words, "--verify-all")
    assert "verified: as 16 of 16 ranks" in shown


def test_a_file_that_cannot_be_written_is_told_before_planning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"--json: .*nowhere/plan\.json: cannot be written"):
        run_command(capsys, "--config", str(OLMOE), "--json", str(tmp_path / "nowhere" / "plan.json"))
