"""Identity: every key of the configuration either leaves a run's digest alone, or `--resume` refuses another value of it.

The keys are read from the schema; one that is in none of the sets below fails the first test until somebody has decided.
"""

from __future__ import annotations

import inspect
import json
import shutil
import types
from collections.abc import Iterator
from ctypes import CDLL
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from every import every
from federations import alone, make_config, write_inputs
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

from fedmoe_ds.checkpoint import reader as checkpoint
from fedmoe_ds.config import Config
from fedmoe_ds.config.data_form_section import DataFormConfig
from fedmoe_ds.config.foundation_section import ExpandConfig
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation import session
from fedmoe_ds.federation.build import Parts, load_parts
from fedmoe_ds.federation.identity import _compare_contents, check_identity, identity, of_settings
from fedmoe_ds.federation.journal import Journal
from fedmoe_ds.federation.kernel_identity import agreed, check_code, class_named, kernels_of
from fedmoe_ds.federation.rounds import Federation
from fedmoe_ds.federation.run_spec import check_plan
from fedmoe_ds.federation.start_events import start_line
from fedmoe_ds.kernels import matrix
from fedmoe_ds.kernels.processor_class import CLASSES
from fedmoe_ds.methods import load_method, with_defaults
from fedmoe_ds.results import open_run
from fedmoe_ds.results.loaded_model import LoadedModel

REFUSED = """
seed foundation.dtype adapters.rank adapters.alpha adapters.experts adapters.expert_training adapters.attention
adapters.feed_forward adapters.router adapters.moe.experts adapters.moe.width adapters.moe.top_k adapters.moe.linear
adapters.moe.shared adapters.moe.zero adapters.moe.router_input adapters.moe.gate federation.participation
federation.sampling federation.tiers.top_k federation.tiers.share federation.tiers.rank federation.tiers.experts
federation.tiers.clients federation.tiers.layers federation.tiers.blocks federation.tier_column foundation.expand.blocks
federation.budget federation.assignment local.epochs local.steps local.max_steps local.batch_size local.optimizer local.lr
local.schedule
local.warmup local.weight_decay local.momentum local.moments local.betas local.eps local.clip local.drift local.proximal
local.dual_step local.aggregation_step
local.balance_loss local.z_loss local.rounds_schedule local.final_lr adapters.dropout
method.name method.temperature server.optimizer server.lr server.beta1 server.beta2 server.tau
server.training.epochs server.training.lr server.training.warm_up
execution.reproducible execution.micro_batch_size execution.packing evaluation.max_sequences evaluation.client_sequences
devices.mix devices.availability devices.spread devices.dropout devices.aggregation devices.deadline_s
devices.over_selection devices.buffer devices.concurrency devices.staleness devices.max_staleness
devices.profiles.like devices.profiles.flops_per_s devices.profiles.memory_bytes devices.profiles.down_bytes_per_s
devices.profiles.up_bytes_per_s devices.profiles.joules_per_flop devices.profiles.joules_per_byte_sent
devices.profiles.joules_per_byte_received devices.profiles.on devices.profiles.period_s
privacy.clip privacy.noise_multiplier
"""
"""In the identity by their value: nothing need be loaded to see that."""
BY_CONTENT = """
foundation.path data.source data.template data.columns data.sequence_length data.max_samples data.holdout data.global_holdout
data.validation data.partition.kind data.partition.clients data.partition.column execution.adapter_kernels
data.prompt.end_of_text adapters.start
"""
"""In it by what they lead to: other weights, other sequences, other kernels, other adapters to begin with."""
NEUTRAL = """
name output foundation.preset foundation.cache foundation.mapped foundation.pretrain.steps foundation.pretrain.batch_size
foundation.pretrain.lr foundation.pretrain.threads topology.clusters topology.device topology.timeout_s topology.silence_s
topology.interface federation.rounds
data.show_samples data.label_names data.encoding data.partition.alpha data.partition.min_samples
execution.clients_in_flight devices.target_perplexity devices.target_accuracy
execution.activation_checkpointing execution.client_state_gib execution.owned_gib
evaluation.every evaluation.batch_size evaluation.clients_every evaluation.metrics
evaluation.generations evaluation.max_new_tokens checkpoint.keep checkpoint.every checkpoint.background
"""
ELSEWHERE = {
    "topology.ep_size": "test_topologies.py",
    "topology.control": "cluster/test_mpi.py",
    "topology.aggregation": "cluster/test_mpi.py",
    "checkpoint.best": "test_best_round.py",
    "checkpoint.best_split": "test_best_round.py",
    "checkpoint.best_tier": "test_best_round.py",
    "deepspeed": "test_deepspeed_tools.py",
    "execution.threads": "refused at every start in bitwise mode",
    "execution.moments_on": "fake_cuda/cases/rows_and_steps.py",
    "execution.expert_halves": "test_topologies.py",
    "foundation.trust_remote_code": "test_own_code.py",
    **{f"foundation.convert.{key}": "test_channel_groups.py" for key in ("kind", "experts", "order")},
    **{f"foundation.convert.{key}": "test_read_me.py" for key in ("permanent", "kept", "batches")},
    **{f"foundation.convert.router_{key}": "test_read_me.py" for key in ("width", "layers", "steps", "lr")},
    "data.chat_template": "test_data_chat.py",
    "data.prompt.preset": "test_data_prompts.py",
    "data.prompt.preamble": "test_data_prompts.py",
    "data.prompt.preamble_with_input": "test_data_prompts.py",
    "data.prompt.instruction_header": "test_data_prompts.py",
    "data.prompt.input": "test_data_prompts.py",
    "data.prompt.input_header": "test_data_prompts.py",
    "data.prompt.response_header": "test_data_prompts.py",
    "data.prompt.answer_lead": "test_data_prompts.py",
    "data.separator": "test_data_sources.py",
    "data.split": "test_data_sources.py",
    "data.public": "test_data_public.py",
    "data.labels": "test_data_public.py",
    **dict.fromkeys((f"data.form.{key}" for key in DataFormConfig.model_fields), "test_data_forms.py"),
    "devices.trace": "test_identity.py",
    **dict.fromkeys((f"privacy.{key}" for key in ("delta", "epsilon", "key_file")), "test_privacy.py"),
}
"""Neutral, and shown to be in another world than that of one process; or in the identity by other tokens, shown there."""

OTHER: dict[str, Any] = {
    "adapters.attention": ["q_proj"],
    "adapters.feed_forward": ["gate_proj"],
    "foundation.preset": "nano-olmoe",
    "foundation.dtype": "bfloat16",
    "topology.clusters": 1,
    "topology.device": "cpu",
    "federation.participation": 0.5,
    "local.drift": "fedprox",
    "local.betas": [0.9, 0.99],
    "local.steps": 2,
    "method.name": "fedit",
    "method.temperature": 3.0,
    "execution.reproducible": "fast",
    "execution.adapter_kernels": "torch",
    "data.template": "text",
    "data.prompt.end_of_text": False,
    "data.columns": {"output": "group"},
    "data.sequence_length": 24,
    "data.holdout": 0.6,
    "data.global_holdout": 0.4,
    "data.max_samples": 2,
    "data.partition.kind": "iid",
    "data.partition.clients": 3,
    "data.partition.column": "kind",
    "data.encoding": "ascii",
    "data.label_names": ["yes", "no"],
    "evaluation.metrics": ["exact_match"],
    "devices.mix": {"phone-mid": 1.0},
    "devices.aggregation": "buffered",
    "devices.over_selection": 2.0,
    "devices.target_perplexity": 90.0,
    "devices.profiles.like": "phone-high",
    "devices.profiles.flops_per_s": 1e9,
    "devices.profiles.memory_bytes": 1e9,
    "devices.profiles.down_bytes_per_s": 1e6,
    "devices.profiles.up_bytes_per_s": 1e6,
    "devices.profiles.on": [[0, 10]],
}
"""Another value, where the type does not suggest one."""
BESIDES = {
    "data.template": {"data": {"columns": {"text": "output"}}},
    "data.partition.kind": {"data": {"partition": {"clients": 4}}},
}
"""What another value needs beside it."""
SMALL: dict[str, Any] = {
    "local": {"max_steps": 1, "batch_size": 3},
    "execution": {"micro_batch_size": 2, "clients_in_flight": 3},
    "evaluation": {"max_sequences": 2, "client_sequences": 1},
}


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, type, default) of everything below a model that is no section, also in optional sections and in lists."""
    for name, field in model.model_fields.items():
        options = [field.annotation, *get_args(field.annotation)]
        options += [item for option in options for item in get_args(option) if get_origin(option) is list]
        section = next((o for o in options if inspect.isclass(o) and not get_args(o) and issubclass(o, BaseModel)), None)
        if section is not None:
            yield from leaves(section, f"{prefix}{name}.")
        else:
            yield prefix + name, field.annotation, field.default
    if model.model_config.get("extra") == "allow":  # a method's own keys: the default method's stand for all
        yield f"{prefix}temperature", float | None, None


def another(key: str, kind: Any, value: Any) -> Any:
    """A value of the same type that is not this one."""
    if key in OTHER:
        return OTHER[key]
    kinds = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if get_origin(kind) is Literal:
        return next(option for option in get_args(kind) if option != value)
    if bool in kinds:
        return not value
    if int in kinds:
        return (value or 0) + 1
    if float in kinds:
        return value / 2 if value else 0.25
    assert str in kinds, f"{key}: {kind}: give another value in OTHER"
    return f"{value}-2"


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def value_at(config: Config, key: str) -> Any:
    value: Any = config.model_dump()
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


KEYS = {key: kind for key, kind, _ in leaves(Config)}


def test_every_key_is_classified() -> None:
    known = [*" ".join((REFUSED, BY_CONTENT, NEUTRAL)).split(), *ELSEWHERE]
    assert sorted(known) == sorted(KEYS), set(known) ^ set(KEYS)
    tests = Path(__file__).parent
    assert every((tests / where).exists() for where in ELSEWHERE.values() if where.endswith(".py"))
    threaded = Config.model_validate({"execution": {"threads": 2}})
    with pytest.raises(UserError, match=r"execution\.threads: 2"):
        check_plan(threaded, bitwise=True)


@dataclass
class World:
    """A run of one round that waits to be continued (`first`), and the digest of one that trained both rounds in one go."""

    root: Path
    first: Config
    parts: Parts
    digest: str

    @property
    def saved(self) -> Path:
        return self.parts.checkpoints / "round-00001"

    def config(self, *changes: dict[str, Any]) -> Config:
        return make_config(self.root, "first", SMALL, *changes)

    def continued(self, config: Config) -> str:
        """The digest of a copy of the first run after its second round under `config`."""
        target = Path(config.output) / config.name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.saved.parent.parent, target)
        parts, outcome = run(config, "auto")
        assert parts.state.round == config.federation.rounds
        return outcome


def run(config: Config, resume: str) -> tuple[Parts, str]:
    """As `session.train` does it, in a world of one without a process group."""
    runtime, topology = alone()
    folder = Path(config.output) / config.name
    source = session.claim_folder(folder, resume)
    journal = Journal(folder, runtime)
    parts = load_parts(config, runtime, topology, journal.progress, resume=source["checkpoint"])
    session.begin(parts, journal, source["checkpoint"])
    outcome = Federation(parts, journal).run()
    journal.close()
    return parts, outcome.digest


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("identity")
    write_inputs(root, samples=(7, 6, 5, 4), num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)
    lines = [json.loads(line) for line in (root / "data.jsonl").read_text().splitlines()]
    rows = [{**row, "kind": f"kind-{place % 3}"} for place, row in enumerate(lines)]
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (root / "data.jsonl-2").write_text("")
    (root / "other.jsonl").write_text("\n".join(map(json.dumps, rows[1:])) + "\n")
    shutil.copytree(root / "model", root / "model-2")
    weights = load_file(root / "model-2" / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1.0
    save_file(weights, root / "model-2" / "model.safetensors", {"format": "pt"})
    _, digest = run(make_config(root, "straight", SMALL), "never")
    first = make_config(root, "first", SMALL, {"federation": {"rounds": 1}})
    parts, _ = run(first, "never")
    return World(root, first, parts, digest)


def refusal(world: World, config: Config, parts: Parts) -> str:
    """The line with which this configuration is refused to continue the first run."""
    config = with_defaults(config, load_method(config.method))
    ours = identity(config, parts.foundation, parts.data, parts.identity["kernels"], config.execution.reproducible == "bitwise")
    written = checkpoint.read_snapshot(world.saved).identity
    with pytest.raises(UserError) as caught:
        check_identity(written, world.saved, ours, config)
    return str(caught.value)


def test_packed_passes_are_cut_by_the_sequence_length() -> None:
    """The tokens may be the same with another one, and the passes not."""
    packed = {"execution": {"packing": True, "micro_batch_size": 1}}
    trees = [json.loads(Config.model_validate({**packed, "data": {"sequence_length": n}}).model_dump_json()) for n in (96, 128)]
    assert of_settings(trees[0]) != of_settings(trees[1])
    for tree in trees:
        tree["execution"]["micro_batch_size"] = None
    assert of_settings(trees[0]) == of_settings(trees[1])


@pytest.mark.parametrize("key", REFUSED.split())
def test_another_value_is_refused(key: str, world: World) -> None:
    """One line with the key, the new value, the old one and the ways out."""
    base = world.config()
    if key.startswith("federation.tiers."):
        here, old = "federation.tiers", "None"
        changed: dict[str, Any] = {"clients": ["a"]} if key.endswith("clients") else {"share": 1.0, key.rpartition(".")[2]: 1}
        tier = {"top_k": 2, **changed}
        config = world.config({"federation": {"tiers": [tier]}})
    elif key.startswith("adapters.moe."):
        # Attention as it was: without the key, adapter experts would come without LoRA, which is a difference of its own.
        changed = {"moe": {"experts": 4, "width": 4, "top_k": 2}, "attention": base.adapters.attention}
        here, old, config = "adapters.moe", "None", world.config({"adapters": changed})
    elif key.startswith("server.training."):
        here, old = "server.training", "None"
        config = world.config({"data": {"public": 0.1}}, nested(key, another(key, KEYS[key], None)))
    elif key.startswith("foundation.expand."):
        # Not read: LoRA beside further layers is no configuration.
        here, old = "foundation.expand", "None"
        expanded = base.foundation.model_copy(update={"expand": ExpandConfig(blocks=1)})
        config = base.model_copy(update={"foundation": expanded})
    elif key.startswith("devices."):
        here, old = "devices", "None"
        leaf, value = key.rpartition(".")[2], another(key, KEYS[key], value_at(base, key))
        own = {"profiles": {"laptop": {"like": "phone-mid", leaf: value}}} if ".profiles." in key else {leaf: value}
        changed = {"mix": {"laptop": 1.0}, **own}
        config = world.config({"devices": changed})
    elif key.startswith("privacy."):
        here, old, leaf = "privacy", "None", key.rpartition(".")[2]
        config = world.config({"privacy": {"clip": 1.0, leaf: another(key, KEYS[key], value_at(base, key))}})
    else:
        here, old = key, str(value_at(world.parts.config, key))
        config = world.config(nested(key, another(key, KEYS[key], value_at(base, key))))
    line = refusal(world, config, world.parts)
    assert line.startswith(f"--resume: {here}: ") and f"written with {old};" in line and "use another name" in line, line


@pytest.mark.parametrize("key", BY_CONTENT.split())
def test_another_content_is_refused(key: str, world: World) -> None:
    other = str(world.root / "other.jsonl")
    paths = {"foundation.path": str(world.root / "model-2"), "data.source": other, "data.validation": other}
    paths["adapters.start"] = str(world.root / "runs" / "straight")
    value = paths.get(key) or OTHER.get(key)
    config = world.config(BESIDES.get(key, {}), nested(key, value if value is not None else another(key, KEYS[key], 0.1)))
    runtime, topology = alone()
    parts = load_parts(config, runtime, topology, Journal(world.root / "scratch", runtime).progress)
    with pytest.raises(UserError) as caught:
        session.begin(parts, Journal(world.root / "scratch", runtime), str(world.saved))
    section = key.rpartition(".")[0]
    line = str(caught.value)
    assert line.startswith(f"--resume: {key}" if key not in BESIDES else f"--resume: {section}."), line
    assert "or another name" in line or "use another name" in line, line


def test_forms_of_experts_count_and_earlier_checkpoints_have_none() -> None:
    def settings(**forms: Any) -> dict[str, Any]:
        tree = json.loads(Config.model_validate({"adapters": {"moe": {"experts": 4, **forms}}}).model_dump_json())
        return of_settings(tree)["adapters"]  # type: ignore[no-any-return]

    changed = [{"linear": True}, {"shared": 1}, {"zero": 1}, {"router_input": "sample"}]
    assert every(settings(**forms) != settings() for forms in changed)
    assert settings()["moe"] == {"experts": 4, "width": 16, "top_k": 4}, "as it was written before there were forms"


def test_a_trace_counts_by_what_is_in_it() -> None:
    """Its place is no part of a run's identity; its digest is added where the file is read."""
    trees = [json.loads(Config.model_validate({"devices": {"trace": name}}).model_dump_json()) for name in ("a.csv", "b.csv")]
    assert of_settings(trees[0]) == of_settings(trees[1])
    assert of_settings(json.loads(Config.model_validate({}).model_dump_json()))["devices"] is None


def test_other_rounds_are_refused_where_rates_follow_from_them(world: World) -> None:
    scheduled = with_defaults(world.config({"local": {"rounds_schedule": "cosine"}}), world.parts.spec.method)
    facts = (world.parts.foundation, world.parts.data, world.parts.identity["kernels"], True)
    written, longer = identity(scheduled, *facts), scheduled.federation.model_copy(update={"rounds": 5})
    ours = identity(scheduled.model_copy(update={"federation": longer}), *facts)
    with pytest.raises(UserError, match=r"--resume: federation\.rounds: 5: .* with 2; the rate .*local\.rounds_schedule"):
        check_identity(written, world.root / "no-config", ours, scheduled)
    assert check_identity(written, world.root / "no-config", written, scheduled) == []


@pytest.mark.parametrize("key", NEUTRAL.split())
def test_another_value_changes_nothing(key: str, world: World) -> None:
    base = world.config()
    value = (
        str(world.root / "elsewhere") if key in ("output", "foundation.cache") else another(key, KEYS[key], value_at(base, key))
    )
    if key == "federation.rounds":
        value = 2  # the first run was to have one round
    config = world.config({"name": "copy"}, nested(key, value))
    assert world.continued(config) == world.digest


def test_kernels_and_devices(world: World) -> None:
    ours, config = world.parts.identity, world.parts.config
    written = checkpoint.read_snapshot(world.saved).identity
    assert ours["kernels"]["kernels.instructions"] == torch.backends.cpu.get_cpu_capability()
    for kernel in ours["kernels"]:
        other = ours | {"kernels": ours["kernels"] | {kernel: "of another kind"}}
        with pytest.raises(
            UserError, match=rf"--resume: {kernel}: of another kind: .* {ours['kernels'][kernel]}; resume on a mach"
        ):
            check_identity(written, world.saved, other, config)
        with pytest.raises(UserError, match=rf"rank 1 on far has other {kernel} \(of another kind\) than rank 0 on near"):
            agreed([ours["kernels"], other["kernels"]], ["near", "far"], bitwise=True)
    with pytest.raises(UserError, match=r"--resume: topology\.device: cuda: .* cpu; set it back"):
        check_identity(written, world.saved, ours | {"topology": {"device": "cuda"}}, config)
    assert agreed([{"a": "b"}, {"a": "c"}], ["near", "far"], bitwise=False) == {"a": "b"}


def test_every_class_of_processors_multiplies_bfloat16_otherwise(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 products have the same bits in all of them; those of earlier versions knew AVX512-BF16 alone."""
    parts, found = world.parts, {}
    for dtype in ("float32", "bfloat16"):
        config = world.config(nested("foundation.dtype", dtype))
        for name in [one.name for one in CLASSES]:
            monkeypatch.setattr(matrix, "kernel", partial(matrix.Kernel, name, CDLL(None)))
            of_rank = kernels_of(config, parts.foundation, [], torch.device("cpu"), bitwise=True)
            found[dtype, name] = of_rank["kernels.instructions"].removeprefix(torch.backends.cpu.get_cpu_capability())
    assert {name: class_named(f"AVX512{ending}") for (_, name), ending in found.items() if ending} == {
        name: name for name in ("AMX-BF16", "AVX512-BF16")
    }
    halves = {"AMX-BF16": "-AMX-BF16", "AVX512-BF16": "-BF16"}
    assert found == {(dtype, name): halves.get(name, "") if dtype == "bfloat16" else "" for dtype, name in found}


LESSER = [name for name in ("AVX512-BF16", "AVX512") if name != getattr(matrix.best(), "processor", name)]
"""Classes that bfloat16 weights may have been multiplied in, and that are not the best one here."""


@pytest.mark.parametrize("name", LESSER or [None])
def test_a_run_goes_on_in_the_class_of_its_checkpoint(name: str | None, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A better one would have other bits, and no key asks for one; without the checkpoint it is the best again."""
    if name is None or (lesser := matrix.kernel_of(name)) is None:
        pytest.skip("this processor has no lesser class")
    halves = {"foundation": {"dtype": "bfloat16"}}
    configs = {
        key: make_config(world.root, f"{key}-{name}", SMALL, halves, {"federation": {"rounds": n}})
        for key, n in (("whole", 2), ("moved", 1))
    }
    with monkeypatch.context() as there:
        there.setattr(matrix, "best", lambda: lesser)
        _, digest = run(configs["whole"], "never")
        first, _ = run(configs["moved"], "never")
        assert class_named(first.identity["kernels"]["kernels.instructions"]) == name
    longer = {"federation": {"rounds": 2}}
    # The type is left out: a run goes on in the one that it has.
    parts, outcome = run(make_config(world.root, f"moved-{name}", SMALL, longer), "auto")
    assert outcome == digest and parts.config.foundation.dtype == "bfloat16"
    assert f"matrix.cpp for {name}, as in the checkpoint" in start_line(parts)
    LoadedModel.of_run(open_run(world.root / "runs" / f"whole-{name}"))
    assert matrix.kernel() is lesser, "a run is evaluated with the bits of its training"
    runtime, topology = alone()
    parts = load_parts(configs["whole"], runtime, topology, Journal(world.root / "scratch", runtime).progress)
    assert matrix.kernel() is matrix.best() is not lesser and "checkpoint" not in start_line(parts)


def test_a_run_goes_on_with_the_products_of_its_checkpoint(world: World) -> None:
    """What `auto` takes may have changed since; what is asked for by name is not replaced."""
    torch_products, longer = {"execution": {"adapter_kernels": "torch"}}, {"federation": {"rounds": 2}}
    before, _ = run(make_config(world.root, "products", SMALL, {"federation": {"rounds": 1}}, torch_products), "never")
    after, _ = run(make_config(world.root, "products", SMALL, longer), "auto")
    assert after.config.execution.adapter_kernels == after.execution.kernels == "torch"
    assert after.identity["kernels"] == before.identity["kernels"] != world.parts.identity["kernels"]
    # Finished: the same command says so, and is not refused for what auto was taken to mean.
    run(make_config(world.root, "products", SMALL, longer), "auto")
    named = world.config(torch_products)
    other = world.parts.identity | {"kernels": before.identity["kernels"]}
    written = checkpoint.read_snapshot(world.saved).identity
    with pytest.raises(UserError, match=r"--resume: execution\.adapter_kernels: .*lowrank\.cpp; set it back"):
        check_identity(written, world.saved, other, named)


def test_bits_that_an_earlier_version_promised_on_cuda(world: World) -> None:
    """It took `bitwise` there, and did nothing for it: such a run goes on without the promise."""
    ours, config = world.parts.identity, world.parts.config
    device = {"topology": {"device": "cuda"}}
    written = ours | device | {"kernels": {"kernels.instructions": "of that machine"}}
    fast = {**ours["execution"], "reproducible": "fast"}
    check_identity(written, world.root / "no-config", ours | device | {"execution": fast, "kernels": {}}, config)
    with pytest.raises(UserError, match=r"--resume: execution\.reproducible: fast: .* with bitwise"):
        check_identity(ours, world.root / "no-config", ours | {"execution": fast}, config)


def test_a_checkpoint_of_an_earlier_version(world: World) -> None:
    """It lacks what its identity did not hold yet; the configuration beside it tells most of that."""
    ours, config = world.parts.identity, world.parts.config
    old = ("foundation", "data", "seed", "adapters", "local", "method", "server", "federation")
    written = {name: checkpoint.read_snapshot(world.saved).identity[name] for name in old}
    written["local"] = {key: value for key, value in written["local"].items() if key != "moments"}
    (note,) = check_identity(written, world.saved, ours, config)
    assert "kernels.instructions" in note and "topology.device" in note and "micro_batch_size" not in note
    for key, value in (("execution.micro_batch_size", 1), ("foundation.dtype", "bfloat16"), ("local.moments", "bfloat16")):
        changed = with_defaults(world.config(nested(key, value)), world.parts.spec.method)
        theirs = identity(changed, world.parts.foundation, world.parts.data, ours["kernels"], True)
        with pytest.raises(UserError, match=rf"--resume: {key}: {value}: "):
            check_identity(written, world.saved, theirs, changed)


def test_the_template_of_an_earlier_version_explains_nothing() -> None:
    """It wrote `text` where nothing was set; another key must have changed the data."""
    tree, written = (Config.model_validate({"data": data}).model_dump() for data in ({"holdout": 0.2}, {"template": "text"}))
    tree["data"]["label_names"], written["data"]["label_names"] = ["a"], []
    with pytest.raises(
        UserError, match=r"--resume: data\.label_names: \['a'\]: the checkpoint was trained on other data \(\[\]\)"
    ):
        _compare_contents("data", "a" * 64, "b" * 64, tree, written)


def test_compiled_code_of_ranks() -> None:
    """Equal sources and compilers everywhere; equal code where processors are equal."""
    hosts = ["near", "far", "far"]
    here = {"processor": "p", "rows.cpp": "1", "rows.so": "a"}
    others = {"processor": "q", "rows.cpp": "1", "rows.so": "b"}
    check_code([here, here, others], hosts, bitwise=True)
    check_code([{}, {}, {}], hosts, bitwise=True)  # on GPUs nothing is compiled here
    for theirs, message in (
        (here | {"rows.so": "b"}, r"rank 1 on far has other rows\.so \(b\) than rank 0 on near \(a\)"),
        (here | {"sums.cpp": "1"}, r"rank 1 on far has other sums\.cpp \(1\) than rank 0 on near \(None\)"),
        ({"processor": "p", "rows.cpp": "1"}, r"rank 1 on far has other rows\.so \(None\) than rank 0 on near \(a\)"),
        (others | {"rows.cpp": "2"}, r"rank 1 on far has other rows\.cpp \(2\) than rank 0 on near \(1\)"),
    ):
        with pytest.raises(UserError, match=rf"^execution\.reproducible: bitwise: {message}, .*reproducible=fast"):
            check_code([here, theirs, others], hosts, bitwise=True)
        check_code([here, theirs, others], hosts, bitwise=False)
    with pytest.raises(UserError, match=r"rank 2 on far has other rows\.so \(c\) than rank 1 on far \(b\)"):
        check_code([here, others, others | {"rows.so": "c"}], hosts, bitwise=True)
