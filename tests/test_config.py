"""Loading, overriding, refusing and dumping configurations."""

import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from every import every
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_ds.bench.results.targets_command import read_reasons
from fedmoe_ds.config import Config, checked_deepspeed_section, config_schema_markdown, dump_config, load_config
from fedmoe_ds.config.deepspeed_section import ALLOWED, REFUSED, REFUSED_INSIDE, DeepSpeedSection
from fedmoe_ds.config.yaml12 import inline_yaml, parse_yaml
from fedmoe_ds.errors import UserError
from fedmoe_ds.studies.compare.protocol import read_protocol
from fedmoe_ds.studies.scaling.study import read_study

ROOT = Path(__file__).parents[1]


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Write `text` to a file and load it with overrides."""

    def from_text(text: str, *overrides: str) -> Config:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides)

    return from_text


def refusal(load: Any, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- what is accepted ---------------------------------------------------------------------------------------


def test_empty_file_is_the_defaults(load: Any) -> None:
    assert load("") == load("# nothing but a comment\n") == load("federation:\ndeepspeed:\n") == Config()


def test_file_and_overrides_merge_key_by_key(load: Any) -> None:
    text = "seed: 3\nfederation: {rounds: 5, participation: 0.5}\nadapters: {attention: []}\n"
    config = load(text, "federation.rounds=20", "method.temperature=2", "adapters.attention=[q_proj, o_proj]", "seed=4")
    assert (config.seed, config.federation.rounds, config.federation.participation) == (4, 20, 0.5)
    assert config.adapters.attention == ["q_proj", "o_proj"]
    assert config.method.model_extra == {"temperature": 2}


def test_the_later_override_wins(load: Any) -> None:
    assert load("", "seed=1", "seed=2").seed == 2


def test_override_creates_nested_mappings(load: Any) -> None:
    assert load("", "deepspeed.tensorboard.enabled=true").deepspeed == {"tensorboard": {"enabled": True}}
    assert load("deepspeed:\n", "deepspeed.csv_monitor.job_name=x").deepspeed == {"csv_monitor": {"job_name": "x"}}
    assert load("", "data.columns.text=body").data.columns == {"text": "body"}


def test_override_addresses_list_items(load: Any) -> None:
    text = "federation: {tiers: [{top_k: 4, share: 1}, {top_k: 2, share: 1}]}"
    assert [tier.top_k for tier in load(text, "federation.tiers.1.top_k=1").federation.tiers] == [4, 1]


def test_override_value_may_hold_an_equals_sign_or_be_null(load: Any) -> None:
    config = load("", "output=a=b", "local.clip=null", "foundation.preset=")
    assert (config.output, config.local.clip, config.foundation.preset) == ("a=b", None, None)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("1E5", 1e5), (".5", 0.5), ("5.", 5.0), ("-1.5e+3", -1500.0), (".inf", math.inf), ("12", 12),
        ("+12", 12), ("007", 7), ("0x1F", 31), ("0o17", 15), ("true", True), ("False", False), ("null", None),
        ("~", None), ("no", "no"), ("off", "off"), ("yes", "yes"), ("On", "On"), ("12:30", "12:30"), ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"), ("1.2.3", "1.2.3"), ("e5", "e5"), ("'1e-3'", "1e-3"), ("=", "="), (".", "."),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    parsed = parse_yaml(text, "test")
    assert parsed == value and type(parsed) is type(value)


def test_keys_are_text_and_aliases_are_copied() -> None:
    assert parse_yaml("{1: a, true: b, null: c}", "test") == {"1": "a", "true": "b", "null": "c"}
    assert parse_yaml("a: &x {b: 1}\nc: *x", "test") == {"a": {"b": 1}, "c": {"b": 1}}


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("federation.roundz=3", ["federation.roundz: unknown key; did you mean 'rounds'?"]),
        ("data.partition.kinds=iid", ["data.partition.kinds: unknown key; did you mean 'kind'?"]),
        ("federtion.rounds=3", ["federtion: unknown key; did you mean 'federation'?"]),
        ("rounds=3", ["rounds: unknown key; did you mean 'federation.rounds'?"]),
        ("topology.zzz=3", ["topology.zzz: unknown key; choose one of aggregation, clusters, control, device, ep_size"]),
        ("federation.tiers=[{top_k: 1, shares: 1}]", ["federation.tiers.0.shares: unknown key; did you mean 'share'?"]),
        ("federation.rounds=many", ["federation.rounds: many: expected integer >= 1"]),
        ("federation.rounds=2.5", ["federation.rounds: 2.5: expected integer >= 1"]),
        ("federation.rounds=1e1", ["federation.rounds: 10.0: expected integer"]),
        ("federation.rounds=true", ["federation.rounds: true: expected integer"]),
        ("federation.rounds='3'", ["federation.rounds: '3': expected integer"]),
        ("federation.rounds=", ["federation.rounds: null: expected integer"]),
        ("federation.rounds=0", ["federation.rounds: 0: expected integer >= 1"]),
        ("federation.participation=1.5", ["federation.participation: 1.5: expected number > 0 and <= 1"]),
        ("local.lr=.nan", ["local.lr: .nan: expected number > 0"]),
        ("local.warmup=1", ["local.warmup: 1: expected number >= 0 and < 1"]),
        ("local.clip=0", ["local.clip: 0: expected number > 0 or null"]),
        ("local.betas=[0.9]", ["local.betas: [0.9]: expected list of number of length 2"]),
        ("local.betas=[0.9, x]", ["local.betas.1: x: expected number"]),
        ("local.optimizer=adam", ["local.optimizer: adam: expected one of adamw, sgd"]),
        ("adapters.experts=yes", ["adapters.experts: 'yes': expected true or false"]),
        ("adapters.attention=q_proj", ["adapters.attention: q_proj: expected list of string"]),
        (
            "federation=3",
            [
                "federation: 3: expected section (rounds, participation, sampling, tiers, budget, assignment, tier_column)"
            ],
        ),
        ("data.columns.text=3", ["data.columns.text: 3: expected string; put it in quotes"]),
        ("name=2024", ["name: 2024: expected string of length 1 or more; put it in quotes"]),
        ("name=''", ["name: '': expected string of length 1 or more"]),
        ("name=../x", ["name: ../x:", "letters, digits"]),
        ("method.name=3", ["method.name: 3: expected string"]),
        ("deepspeed=3", ["deepspeed: 3: expected mapping"]),
        ("seed", ["override: seed: is no override; write key=value"]),
        ("=3", ["override: =3: is no override"]),
        ("data.source=[x", ["override: data.source=[x, line 1: malformed YAML"]),
        ("name=@x", ["malformed YAML: found character '@'"]),
        ("name=!!python/name:os.system x", ["the YAML tag tag:yaml.org,2002:python/name:os.system is not supported"]),
        ("adapters.attention.7=x", ["override: adapters.attention.7=x: adapters.attention has items 0 to 0, not '7'"]),
        ("output.x=1", ["override: output.x=1: output holds here, not a section; set output itself"]),
    ],
)  # fmt: skip
def test_refused_override(load: Any, override: str, words: list[str]) -> None:
    message = refusal(load, "output: here\nadapters: {attention: [q_proj]}\n", override)
    assert every(word in message for word in words), message


def test_nothing_to_train(load: Any) -> None:
    message = refusal(load, "adapters: {experts: false, attention: []}")
    assert message.startswith("adapters: nothing would be trained")


def test_there_are_moments_to_keep(load: Any) -> None:
    plain = "local: {optimizer: sgd, moments: bfloat16"
    message = refusal(load, plain + "}")
    assert message.startswith("local.moments: bfloat16: sgd without momentum keeps no moments; use local.momentum above 0")
    assert "local.moments: float16: expected one of float32, bfloat16" in refusal(load, "local: {moments: float16}")
    assert load(plain + ", momentum: 0.9}").local.moments == "bfloat16"


def test_several_problems_are_counted(load: Any) -> None:
    message = refusal(load, "federation: {rounds: x, participation: 2}\nseed: -1\ndeepspeed: {bf16: {enabled: true}}")
    assert message.startswith("seed: -1: expected integer >= 0") and message.endswith("(and 3 more)")


def test_long_values_are_shortened(load: Any) -> None:
    assert len(refusal(load, f"seed: {'x' * 1000}")) < 120


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("federation:\n  rounds: 1\n  rounds: 2\n", ", line 3: federation.rounds: given twice, first in line 2"),
        ("seed: 1\nname: [a\nseed", ", line 3: malformed YAML: expected ',' or ']'"),
        ("seed: 1\n\tname: x\n", ", line 2: malformed YAML: "),
        ("seed: 1\nname: a\0b\n", ", line 2: malformed YAML: "),
        ("seed: 1\n---\nseed: 2\n", "malformed YAML: "),
        ("- 1\n- 2\n", "holds [1, 2]; expected a mapping of name, output"),
        ("data: &d\n  columns: *d\n", ", line 1: data.columns: a YAML alias contains itself"),
        ("[a]: 1\n", "a key must be text"),
        ("seed: !!int x\n", ", line 1: seed: 'x' is no int"),
        (f"seed: {'9' * 5000}\n", "is no int"),
        ("a: &a {x: 1}\nb: {<<: *a}\n", "a: unknown key"),
    ],
)  # fmt: skip
def test_malformed_files_name_the_line(load: Any, text: str, words: str) -> None:
    assert words in refusal(load, text)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("seed: 1")
    (tmp_path / "latin.yaml").write_bytes("name: caf\u00e9".encode("latin-1"))
    for name, words in {
        "quickstrat.yaml": "no such file; did you mean 'quickstart.yaml'?",
        "nowhere/run.yaml": "no such file",
        ".": "cannot be read: Is a directory",
        "quickstart.yaml/run.yaml": "cannot be read: Not a directory",
        "latin.yaml": "is not UTF-8 text",
    }.items():
        with pytest.raises(UserError, match=r"^config: ") as caught:
            load_config(tmp_path / name, [])
        assert words in str(caught.value)


# --- the DeepSpeed section ----------------------------------------------------------------------------------


def test_deepspeed_section_passes_through_unchanged() -> None:
    section = {
        "tensorboard": {"enabled": True, "output_path": "logs"},
        "comms_logger": {"enabled": True, "prof_ops": ["all_to_all"]},
        "flops_profiler": {"enabled": True, "profile_step": 2},
        "activation_checkpointing": {"cpu_checkpointing": True},
    }
    assert checked_deepspeed_section(section) == section


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_deepspeed_refuses_with_the_reason(load: Any, key: str) -> None:
    message = refusal(load, "", f"deepspeed.{key}.enabled=true")
    assert message == f"deepspeed.{key}: {{enabled: true}}: {REFUSED[key]}"
    assert "; " in REFUSED[key]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("deepspeed.gradient_clipping=1.0", "1.0: would clip over all clients jointly; use local.clip"),
        ("deepspeed.zero_optimization.stage=2", "deepspeed.zero_optimization: {stage: 2}: a stage above 0"),
        ("deepspeed.tensorbord.enabled=true", "not passed on by this project; did you mean 'tensorboard'?"),
        ("deepspeed.tensorboard.enable=true", "deepspeed.tensorboard.enable: unknown key; did you mean 'enabled'?"),
        ("deepspeed.wandb=true", "deepspeed.wandb: true: expected section (enabled, group, team, project)"),
        ("deepspeed.flops_profiler.profile_step=0", "deepspeed.flops_profiler.profile_step: 0: expected integer >= 1"),
        ("deepspeed.comms_logger.debug=on", "deepspeed.comms_logger.debug: 'on': expected true or false"),
        ("deepspeed.activation_checkpointing.cpu_checkpointing=true", "set execution.activation_checkpointing=true, or remove"
         " it"),
        ("deepspeed.comet.api_key=s3cret", "set the environment variable COMET_API_KEY"),
    ],
)  # fmt: skip
def test_deepspeed_mistakes(load: Any, override: str, words: str) -> None:
    message = refusal(load, "", override)
    assert message.startswith(words) or message.endswith(words)
    assert "s3cret" not in message


@pytest.mark.parametrize("key", sorted(REFUSED_INSIDE))
def test_deepspeed_refuses_keys_of_sections_with_the_reason(load: Any, key: str) -> None:
    assert refusal(load, "", f"deepspeed.{key}=true") == f"deepspeed.{key}: true: {REFUSED_INSIDE[key]}"


class Asked(dict[str, Any]):
    """An empty configuration that notes which of its keys are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.names.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.names.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self


def test_every_key_of_deepspeed_has_an_effect_or_is_refused_with_the_reason() -> None:
    """Its own configuration says which keys it reads."""
    from deepspeed.runtime.config import DeepSpeedConfig

    asked = Asked()
    DeepSpeedConfig._initialize_params(object.__new__(DeepSpeedConfig), asked)
    assert {"wall_clock_breakdown", "steps_per_print", "zero_optimization", "tensorboard", "timers"} <= asked.names
    assert asked.names - set(ALLOWED) - set(REFUSED) == set()


def test_deepspeed_section_knows_the_installed_deepspeed() -> None:
    """Every key we pass is one that the installed DeepSpeed reads; its other sub-keys are refused."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT

    theirs = {
        "tensorboard": set(TensorBoardConfig.model_fields),
        "wandb": set(WandbConfig.model_fields),
        "csv_monitor": set(CSVConfig.model_fields),
        "comet": set(CometConfig.model_fields) - {"api_key"},
        "comms_logger": set(CommsLoggerConfig.model_fields),
        "flops_profiler": set(vars(DeepSpeedFlopsProfilerConfig({}))),
        "activation_checkpointing": set(ACT_CHKPT_DEFAULT),
    }
    for key, subkeys in theirs.items():
        passed = set(DeepSpeedSection.model_fields[key].annotation.model_fields)
        assert passed == {name for name in subkeys if f"{key}.{name}" not in REFUSED_INSIDE}, key
    assert set(ALLOWED) == set(theirs)


# --- dump, reference ----------------------------------------------------------------------------------------


def test_dump_keeps_the_order_of_the_tree() -> None:
    document = yaml.safe_load(dump_config(Config()))
    assert list(document) == list(Config.model_fields)
    assert list(document["local"]) == list(type(Config().local).model_fields)
    assert "  attention: [q_proj, v_proj]\n" in dump_config(Config())


def test_dump_is_read_alike_by_a_yaml_1_1_reader(load: Any) -> None:
    labels = "data.label_names=['null', 'on', '2.', '0o7', '2024-01-01']"
    config = load("", "name='1e-3'", "output=no", "data.source='12:30'", "local.lr=1e-7", labels)
    assert yaml.safe_load(dump_config(config)) == config.model_dump()


characters = st.characters(codec="utf-8", exclude_characters="\0")  # which is refused
texts = st.text(characters, max_size=12)
tricky = ["no", "1e-3", "0x1F", "~", "", " ", "12:30", "a: b", "# x", "<<", "=", "\n", "\r\n", "\x85", "\u2028"]
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts | st.sampled_from(tricky)
free = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
names = st.text(characters, min_size=1, max_size=12)
counts = st.integers(min_value=1)
tiers = st.fixed_dictionaries(
    {
        "top_k": counts,
        "share": positive,
        "clients": st.none() | st.lists(texts, min_size=1, max_size=2),
        "rank": st.none() | counts,
        "experts": st.none() | counts,
        "layers": st.none() | counts,
        "blocks": st.none() | counts,
    }
)
values: dict[str, st.SearchStrategy[Any]] = {
    "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,11}", fullmatch=True),
    "seed": st.integers(min_value=0),
    "foundation.path": st.none() | names,
    "foundation.dtype": st.sampled_from(["float32", "bfloat16"]),
    "adapters.attention": st.lists(names, max_size=3),
    "federation.participation": st.floats(min_value=0, max_value=1, exclude_min=True),
    "federation.tiers": st.none() | st.lists(tiers, max_size=3),
    "local.lr": positive,
    "local.clip": st.none() | positive,
    "data.columns": st.dictionaries(names, names, max_size=3),
    "execution.activation_checkpointing": st.booleans(),
    "method.temperature": free,
    "method.nested.key": free,
    "deepspeed.flops_profiler.profile_step": st.integers(min_value=1),
    "deepspeed.tensorboard.job_name": names,
}


@settings(max_examples=200, deadline=None)
@given(st.fixed_dictionaries({}, optional=values))
def test_dump_and_load_round_trip(tmp_path_factory: pytest.TempPathFactory, chosen: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text("", encoding="utf-8")
    config = load_config(path, [f"{key}={inline_yaml(value)}" for key, value in chosen.items()])
    for key, value in chosen.items():
        found: Any = config.model_dump()
        for part in key.split("."):
            found = found[part]
        assert found == value and type(found) is type(value)
    path.write_text(dump_config(config), encoding="utf-8", newline="")
    assert load_config(path, []) == config


def test_reference_is_up_to_date() -> None:
    committed = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert committed == config_schema_markdown(), "run `make docs`"


def test_reference_is_what_the_module_prints() -> None:
    printed = subprocess.run([sys.executable, "-m", "fedmoe_ds.config"], capture_output=True, text=True, check=True)
    assert printed.stdout == config_schema_markdown()


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)
BOUNDED = {
    "aliases of aliases": (BOMB, "aliases make more than 65536 values and characters of it"),
    "an alias of a long text": ("a: &a " + "x" * 1000 + "\nb: [" + "*a, " * 1000 + "]", "aliases make more than 65536"),
    "an alias of keys": ("a: &a {" + "x" * 900 + ": 1}\nb: [" + "*a, " * 1000 + "]", "aliases make more than 65536"),
    "an alias of itself": ("a: &a [*a]", "a YAML alias contains itself"),
    "lists": ("[" * 5000 + "]" * 5000, "nested deeper than 64 levels"),
    "short of the stack": ("a: " + "[x, " * 100 + "]" * 100, "nested deeper than 64 levels"),
    "mappings": ("{a: " * 5000, "nested deeper than 64 levels"),
    "dashes": ("- " * 5000 + "x", "nested deeper than 64 levels"),
    "a long text": ("a: " + "x" * 70_000, "has more than 65536 characters"),
    "many lines": ("a: 1\n" * 20_000, "has more than 65536 characters"),
    "digits": ("seed: " + "9" * 5000, "'9999999999999999999999999999999999999999' is no int"),
    "hexadecimal digits": ("seed: 0x" + "f" * 5000, "is no integer of at most 512 bits"),
    "NUL": ('name: "a\\0b"', "holds a NUL or half of a surrogate pair"),
    "NUL in a key": ('"a\\0b": 1', "holds a NUL or half of a surrogate pair"),
    "half of a pair": ('name: "\\ud800"', "holds a NUL or half of a surrogate pair"),
    "beyond Unicode": ('name: "\\U7FFFFFFF"', "malformed YAML"),
    "a version of YAML": ("%YAML 1." + "9" * 5000 + "\n---\na: 1", "malformed YAML"),
    "a constructor": ("name: !!python/object/apply:os.system [id]", "the YAML tag tag:yaml.org,2002:python/object/apply"),
}  # fmt: skip


@pytest.mark.parametrize("case", BOUNDED)
def test_a_document_is_bounded(case: str, tmp_path: Path) -> None:
    """In every file that is read as YAML, and behind an override's equals sign."""
    text, message = BOUNDED[case]
    path = tmp_path / "file.yaml"
    path.write_text(text, encoding="utf-8")
    readers: dict[str, Callable[[], Any]] = {
        "configuration": lambda: load_config(path),
        "override": lambda: load_config(ROOT / "configs" / "quickstart.yaml", [f"method.x={text}"]),
        "study": lambda: read_study(path),
        "protocol": lambda: read_protocol(path),
        "reasons": lambda: read_reasons(path),
    }
    for name, read in readers.items():
        began = time.process_time()
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            read()
        assert str(caught.value).isprintable() and len(str(caught.value)) < 4200, name
        assert time.process_time() - began < 5, name
