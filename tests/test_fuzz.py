"""Fuzz: whatever a file holds, its reader succeeds or says one line.

`make test` runs a sample. `make test-sweep ARGS=tests/test_fuzz.py`, or `python -m pytest -m sweep -s tests/test_fuzz.py`, runs
1000 cases of each of the seven kinds (five minutes on one core) and prints what became of them. One case again:
`FUZZ='manifest 17' python -m pytest -m sweep -s tests/test_fuzz.py`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import yaml
from federations import SAMPLES, alone, build, finish, make_config, write_inputs
from fuzzing import Raw, damage, emit, fuzz, shuffle_bytes
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, ViTConfig, ViTForImageClassification

from fedmoe_ds.checkpoint import reader as checkpoint
from fedmoe_ds.checkpoint.skipped_clients import SkippedClients, read_lines
from fedmoe_ds.config import Config, DataConfig, dump_config, load_config
from fedmoe_ds.data import prepare
from fedmoe_ds.data.encoder import Encoder
from fedmoe_ds.distributed.topology import check_layout
from fedmoe_ds.federation import resumption, session
from fedmoe_ds.federation.build import Parts, load_shared_foundation
from fedmoe_ds.federation.run_spec import check_plan
from fedmoe_ds.foundation import planned_sparse, planned_task
from fedmoe_ds.foundation.tokenizer import load_tokenizer
from fedmoe_ds.methods import method_for, with_defaults
from fedmoe_ds.report import MetricsLog, final_table, read_metrics, write_report
from fedmoe_ds.report import metrics as report_metrics
from fedmoe_ds.report.client_tables import FOLDER
from fedmoe_ds.studies.compare.aggregate import Comparison
from fedmoe_ds.studies.compare.plot import picture
from fedmoe_ds.studies.compare.record import check_same_ground, read_record
from fedmoe_ds.studies.compare.report import Study, numbers, text
from fedmoe_ds.studies.run import Run
from fedmoe_ds.studies.scaling.measured import measure

REPOSITORY = Path(__file__).parents[1]
SAMPLE, WHOLE = 10, 1000
VOCABULARY = 320


@dataclass
class Kit:
    """Sound files, from which cases are made."""

    root: Path
    config: Config
    parts: Parts
    tokenizer: Any

    @property
    def run(self) -> Path:
        return Path(self.config.output) / self.config.name

    @property
    def saved(self) -> Path:
        return checkpoint.candidates(self.run / "checkpoints")[0]


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    root = tmp_path_factory.mktemp("fuzz")
    write_inputs(root, SAMPLES[-4:], num_hidden_layers=2, num_experts=4, num_experts_per_tok=2)
    model = AutoModelForCausalLM.from_pretrained(root / "model")
    model.save_pretrained(root / "sharded", max_shard_size="20KB")
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=VOCABULARY, **shape)).save_pretrained(root / "dense")
    images = ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=3, **shape)
    ViTForImageClassification(images).save_pretrained(root / "vit")
    for folder in ("sharded", "dense"):
        AutoTokenizer.from_pretrained(root / "model").save_pretrained(root / folder)
    small = {"local": {"max_steps": 1, "batch_size": 2}, "evaluation": {"max_sequences": 2, "client_sequences": 1}}
    config = make_config(root, "run", small)
    parts, journal = build(config, *alone())
    finish(parts, journal)
    journal.folder.joinpath("config.yaml").write_text(dump_config(config))
    return Kit(root, config, parts, AutoTokenizer.from_pretrained(root / "model"))


# Configuration ------------------------------------------------------------------------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)
TEXTS = [
    BOMB,
    "a: &a [*a]\n",
    "a: &a {b: *a}\n",
    "a: &a " + "x" * 10_000 + "\nb: [" + "*a, " * 2000 + "]\n",
    "name: !!python/object/apply:os.system [id]\n",
    "name: !!binary aGk=\n",
    "%YAML 1.99999999999999999999\n---\nname: x\n",
    '"\\U7FFFFFFF": 1\n',
    'name: "\\ud800"\n',
    'name: "a\\0b"\n',
    'output: "\\x1b[2J"\n',
    "? [a]\n: 1\n",
    "<<: {seed: 3}\n",
    "seed: 0x" + "f" * 5000 + "\n",
    "seed: " + "9" * 5000 + "\n",
    "a: 1\n---\nb: 2\n",
    "- " * 400 + "x\n",
    "{a: " * 400 + "1" + "}" * 400 + "\n",
    "[" * 5000 + "\n",
    "x" * 400_000,
    "a: |\n" + " x\n" * 20_000,
    "# only\n",
    "\ufeffseed: 1\n",
]
"""What a YAML file may hold that bytes and trees do not come to."""


ODD_KEYS = ["seed", "federation.tiers.0.share", "deepspeed.a.b.c", f"federation.tiers.{'9' * 5000}", "a" + ".a" * 3000]


def configuration(kit: Kit) -> Callable[[random.Random, Path], None]:
    files = [*sorted((REPOSITORY / "configs").glob("*.yaml")), kit.run / "config.yaml"]
    sound = [file.read_bytes() for file in files]
    trees = [yaml.safe_load(content) for content in sound]
    keys = [f"{section}.{key}" for section, keys in trees[-1].items() if isinstance(keys, dict) for key in keys]

    def override(draw: random.Random) -> str:
        key = draw.choice([*keys, *ODD_KEYS])
        value = draw.choice([damage(draw, draw.choice((0, {}, [1], "x"))), draw.choice(TEXTS), "\udcff", ""])
        whole = f"{key}={value}"
        return whole if draw.random() < 0.8 else draw.choice(("=", "", "x", whole.replace(".", ".."), "\udcff=1", f" {whole}"))

    def case(draw: random.Random, folder: Path) -> None:
        path = folder / "run.yaml"
        way, pick = draw.random(), draw.randrange(len(sound))
        if way < 0.35:
            content = shuffle_bytes(draw, sound[pick], sound)
        elif way < 0.75:
            content = damage(draw, trees[pick]).encode()
        elif way < 0.85:
            content = draw.choice(TEXTS).encode("utf-8", "surrogatepass")
        else:
            content = sound[pick]
        path.write_bytes(content)
        config = load_config(path, [override(draw) for _ in range(draw.choice((0, 0, 1, 2) if way < 0.85 else (1, 2)))])
        method = method_for(config)
        check_layout(config.topology, 4)
        check_plan(config, draw.random() < 0.5)
        (folder / "config.yaml").write_text(dump_config(with_defaults(config, method)), encoding="utf-8")
        assert load_config(folder / "config.yaml") == with_defaults(config, method)

    return case


# Data ---------------------------------------------------------------------------------------------------------------------


ODD_CELLS: list[Any] = [None, b"\xff", [1], {"a": 1}, 2**63, "\0", "NUL", 1e308]


def data(kit: Kit) -> Callable[[random.Random, Path], None]:
    rows = [json.loads(line) for line in (kit.root / "data.jsonl").read_text().splitlines()]
    lines = (kit.root / "data.jsonl").read_bytes()
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, kit.root / "data.parquet")
    pyarrow.feather.write_feather(table, kit.root / "data.arrow", compression="uncompressed")
    columns = list(rows[0])
    sheet = "\n".join([",".join(columns), *(",".join(f'"{row[name]}"' for name in columns) for row in rows)]).encode()
    binary = (kit.root / "data.parquet").read_bytes()
    files = {".jsonl": lines, ".csv": sheet, ".parquet": binary, ".arrow": (kit.root / "data.arrow").read_bytes()}
    files |= {".json": json.dumps(rows).encode(), ".jsonl.gz": gzip.compress(lines)}
    section = kit.config.data.model_dump()

    def content(draw: random.Random, suffix: str) -> bytes:
        if draw.random() < 0.5 and suffix == ".jsonl":
            place = draw.randrange(len(rows))
            return "\n".join([*map(emit, rows[:place]), damage(draw, rows[place]), *map(emit, rows[place + 1 :])]).encode()
        if draw.random() < 0.3 and suffix == ".parquet":
            odd = [draw.choice(ODD_CELLS)] * len(rows)
            name = draw.choice(columns)
            changed = table.set_column(columns.index(name), name, pa.array(odd, pa.uint64() if odd[0] == 2**63 else None))
            pq.write_table(changed, kit.root / "odd.parquet")
            return (kit.root / "odd.parquet").read_bytes()
        return shuffle_bytes(draw, files[suffix], list(files.values()))

    def case(draw: random.Random, folder: Path) -> None:
        suffix = draw.choice((".jsonl", *files))
        path = folder / f"data{suffix}"
        path.write_bytes(content(draw, suffix))
        odd = {"partition": {"kind": draw.choice(("natural", "iid", "dirichlet")), "column": "group", "clients": 3}}
        config = DataConfig.model_validate({**section, "source": str(path), **(odd if draw.random() < 0.3 else {})})
        found = prepare(config, 0, kit.tokenizer, folder / "cache")
        for client in range(len(found)):
            found.train(client), found.holdout(client)
        if draw.random() < 0.2:  # the prepared store is read once more, damaged
            file = draw.choice(("header.json", "sequences.arrow", "clients.arrow"))
            store = found.path / file
            by_tree = file == "header.json" and draw.random() < 0.7
            stored = store.read_bytes()
            store.write_bytes(damage(draw, json.loads(stored)).encode() if by_tree else shuffle_bytes(draw, stored))
            again = prepare(config, 0, kit.tokenizer, folder / "cache")
            assert again.fingerprint == found.fingerprint or file == "header.json"

    return case


# Model folders ------------------------------------------------------------------------------------------------------------


def start(folder: Path) -> None:
    """What a run does with `foundation.path`, up to the loaded model."""
    config = Config.model_validate({"name": "x", "foundation": {"path": str(folder), "cache": str(folder / "cache")}})
    planned_task(config.foundation), planned_sparse(config.foundation)
    load_shared_foundation(config, *alone(), SimpleNamespace(note=lambda line: None))  # type: ignore[arg-type]


def copied(sound: Path, folder: Path) -> Path:
    return Path(shutil.copytree(sound, folder / "model"))


def tree_or_bytes(draw: random.Random, content: bytes, others: tuple[bytes, ...] = ()) -> bytes:
    return damage(draw, json.loads(content)).encode() if draw.random() < 0.7 else shuffle_bytes(draw, content, others)


def model(kit: Kit) -> Callable[[random.Random, Path], None]:
    def case(draw: random.Random, folder: Path) -> None:
        which = draw.choice(("sharded", "sharded", "model", "dense", "vit"))
        broken = copied(kit.root / which, folder)
        name = draw.choice(("config.json", "model.safetensors.index.json") if which == "sharded" else ("config.json",))
        (broken / name).write_bytes(tree_or_bytes(draw, (broken / name).read_bytes()))
        start(broken)

    return case


def header(kit: Kit) -> Callable[[random.Random, Path], None]:
    """Headers of weights, and of adapters in a checkpoint."""

    def case(draw: random.Random, folder: Path) -> None:
        if draw.random() < 0.7:
            broken = copied(kit.root / draw.choice(("model", "model", "dense")), folder)
            file = broken / "model.safetensors"
            file.write_bytes(_headed(draw, file.read_bytes()))
            start(broken)
            return
        saved = _run_with(kit, folder) / kit.saved.name
        file = draw.choice(sorted(saved.glob("*.safetensors")))
        file.write_bytes(_headed(draw, file.read_bytes()))
        manifest = json.loads((saved / "manifest.json").read_text())
        manifest["files"][file.name] = checkpoint.sha256_of(file)
        (saved / "manifest.json").write_text(_sealed(json.dumps(manifest)))
        _resumed(kit, saved.parent)

    return case


ODD_ENTRIES: list[Any] = [
    [], [0], [-1], [1, 2**62], [2**63], [2**32, 2**32], "F4", "U8", "BOOL", "F64", [0, 2**63], [2**62, 2**62 + 1], None, [1, 0],
]  # fmt: skip


def _headed(draw: random.Random, content: bytes) -> bytes:
    """A safetensors file with another header: 8 bytes of length, JSON, numbers."""
    size = struct.unpack("<Q", content[:8])[0]
    tree, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
    way = draw.random()
    if way < 0.25:
        length = draw.choice((0, 1, size - 1, size + 1, size + 8, 2**31, 2**40, 2**62, 2**63, 2**64 - 1))
        return struct.pack("<Q", length) + content[8:]
    if way < 0.4:
        return shuffle_bytes(draw, content)
    name = draw.choice(list(tree))
    other = draw.choice(list(tree))
    if way < 0.6 and "shape" in tree[name]:
        changed = {draw.choice(("shape", "data_offsets", "dtype")): draw.choice(ODD_ENTRIES)}
        tree[name] = {**tree[name], **changed}
    elif way < 0.7:
        tree[name] = tree[other]
    else:
        tree = Raw(damage(draw, tree))
    text = emit(tree).encode()
    return struct.pack("<Q", len(text)) + text + (rest if draw.random() < 0.8 else rest[: draw.randrange(len(rest))])


TOKENIZER_FILES = ("tokenizer.json",) * 2 + ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def tokenizer(kit: Kit) -> Callable[[random.Random, Path], None]:
    words = ["w1 w2", "", "</s> a", "é 𝟙\u0301 \0 x", "### Response:\n" * 20]

    def case(draw: random.Random, folder: Path) -> None:
        broken = copied(kit.root / "model", folder)
        name = draw.choice(TOKENIZER_FILES)
        file = broken / name
        content = file.read_bytes() if file.exists() else b'{"additional_special_tokens": ["<x>"], "eos_token": "</s>"}'
        file.write_bytes(tree_or_bytes(draw, content))
        encode = Encoder(load_tokenizer(broken, VOCABULARY))
        encode(words)

    return case


# Runs ---------------------------------------------------------------------------------------------------------------------


def _sealed(text: str) -> str:
    """A manifest with the checksum that it would have: somebody may have written it like this."""
    try:
        tree = json.loads(text)
        tree.pop("checksum", None)
        return json.dumps({**tree, "checksum": checkpoint.checksum(tree)})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return text


def _run_with(kit: Kit, folder: Path) -> Path:
    """A copy of the run's folder with its last checkpoint; return where its checkpoints are."""
    root = folder / "run" / "checkpoints"
    shutil.copytree(kit.saved, root / kit.saved.name)
    shutil.copy(kit.run / "metrics.jsonl", folder / "run")
    return root


def _resumed(kit: Kit, root: Path) -> None:
    source = session.claim_folder(root.parent, "auto")
    if source["checkpoint"] is not None:
        snapshot, _ = resumption.restore(Path(source["checkpoint"]), kit.parts)
        json.dumps(snapshot.partial)


PARTIAL = {
    "done": {"0": {"client": "client-000", "status": "ok", "tokens": 3, "targets": 2}},
    "activation": {"2": [[1, 2, 3, 4], [4, 3, 2, 1]]},
    "seconds": 1.5,
    "sums": 2,
}


def manifest(kit: Kit) -> Callable[[random.Random, Path], None]:
    def case(draw: random.Random, folder: Path) -> None:
        root = _run_with(kit, folder)
        saved = root / kit.saved.name
        if draw.random() < 0.25:
            file = draw.choice(("config.yaml", "absent.jsonl"))
            place = saved / file if file == "config.yaml" else root.parent / file
            content = place.read_bytes() if place.exists() else b'["0123456789abcdef", 1, 2]\n'
            by_tree = damage(draw, yaml.safe_load(content)).encode()
            place.write_bytes(shuffle_bytes(draw, content) if draw.random() < 0.5 else by_tree)
        tree = json.loads((saved / "manifest.json").read_text())
        tree["files"] = {path.name: checkpoint.sha256_of(path) for path in saved.iterdir() if path.name != "manifest.json"}
        if draw.random() < 0.3:
            tree |= {"round": 1, "partial": PARTIAL}
        content = json.dumps(tree).encode()
        way = draw.random()
        broken = damage(draw, tree) if way < 0.75 else shuffle_bytes(draw, content) if way < 0.9 else content
        written = broken if isinstance(broken, bytes) else _sealed(broken).encode() if draw.random() < 0.85 else broken.encode()
        (saved / "manifest.json").write_bytes(written)
        SkippedClients(root.parent, {}, read_lines(root.parent)).of(1)
        _resumed(kit, root)

    return case


def with_tables(kit: Kit) -> Path:
    """The run's record as one of very many clients has it."""
    folder = kit.root / "tables"
    with MetricsLog(folder / "metrics.jsonl") as log:
        rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for event in read_metrics(kit.run / "metrics.jsonl"):
            kind, fields = event["event"], {key: value for key, value in event.items() if key not in ("event", "time")}
            if kind == "client" or fields.get("split") == "client":
                rows.setdefault((kind, fields["round"]), []).append(fields)
            else:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(report_metrics, "MOST_LINES", 0)
                    log.write_data(**fields) if kind == "data" else log.write(kind, **fields)
        for (kind, round_index), found in rows.items():
            log.write_table(kind, round_index, found)
    return folder


ODD_COLUMNS: list[Any] = [pa.array([]), ["x"], [None], [-1], [1.5], [math.inf], [[1, 2]], [2**62], [b"x"], ["9" * 30]]


def damage_table(draw: random.Random, folder: Path) -> None:
    """Damage one of a record's tables, most often so that its line agrees."""
    path = draw.choice(sorted((folder / FOLDER).iterdir()))
    sound = path.read_bytes()
    way = draw.random()
    if way < 0.4:
        path.write_bytes(shuffle_bytes(draw, sound))
    elif way < 0.9:
        table = pq.read_table(path)
        name, odd = draw.choice(table.column_names), draw.choice(ODD_COLUMNS)
        place = table.column_names.index(name)
        kept = table.remove_column(place)
        pq.write_table(kept if len(odd) == 0 else kept.add_column(place, name, pa.array(odd * len(table))), path)
    else:
        pq.write_table(pq.read_table(path).slice(1), path)
    if draw.random() < 0.8:
        seals = [hashlib.sha256(content).hexdigest() for content in (sound, path.read_bytes())]
        record = folder / "metrics.jsonl"
        record.write_text(record.read_text().replace(*seals))


def metrics(kit: Kit) -> Callable[[random.Random, Path], None]:
    """The report page, the final table, a comparison and a study of scaling, of one damaged record, or of its tables."""
    sound = {
        folder: (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True) for folder in (kit.run, with_tables(kit))
    }

    def damaged(draw: random.Random, lines: list[bytes]) -> bytes:
        if draw.random() < 0.3:
            return shuffle_bytes(draw, b"".join(lines))
        kinds: dict[str, list[int]] = {}
        for index, line in enumerate(lines):
            kinds.setdefault(json.loads(line)["event"], []).append(index)
        place = draw.choice(kinds[draw.choice(list(kinds))])
        changed = damage(draw, json.loads(lines[place])).encode() + b"\n"
        return b"".join([*lines[:place], changed, *lines[place + 1 :]])

    def case(draw: random.Random, folder: Path) -> None:
        place = folder / kit.config.name
        place.mkdir()
        source = draw.choice(list(sound))
        if source != kit.run:
            shutil.copytree(source / FOLDER, place / FOLDER)
        by_table = source != kit.run and draw.random() < 0.7
        (place / "metrics.jsonl").write_bytes(b"".join(sound[source]) if by_table else damaged(draw, sound[source]))
        if by_table:
            damage_table(draw, place)
        text_of_config = (kit.run / "config.yaml").read_bytes()
        (place / "config.yaml").write_bytes(shuffle_bytes(draw, text_of_config) if draw.random() < 0.1 else text_of_config)
        session.recorded(place / "metrics.jsonl")
        final_table(read_metrics(place / "metrics.jsonl"))
        write_report(place)
        run = Run("flame", 0, kit.config.model_copy(update={"output": str(folder)}))
        if run.finished:
            records = [read_record(run)]
            check_same_ground(records)
            comparison = Comparison(["flame"], 1, records)
            study = Study("x", "x", kit.config, [], [], [run], comparison, [], {})
            picture(comparison), numbers(study), text(study, "x.svg")
            measure(run)

    return case


KINDS = {
    "config": configuration,
    "data": data,
    "model": model,
    "header": header,
    "manifest": manifest,
    "metrics": metrics,
    "tokenizer": tokenizer,
}


def check(kind: str, kit: Kit, seeds: range, scratch: Path) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    findings = fuzz(KINDS[kind](kit), seeds, scratch)
    print(findings.line(kind))
    if os.environ.get("FUZZ_SHOW"):
        print("\n".join(findings.lines))
    assert not findings.bad, f"{len(findings.bad)} of {len(seeds)}:\n" + "\n\n".join(findings.bad[:12])
    # Of a thousand manifests a third is refused; of the ten of `make test` at least two.
    assert findings.outcomes["refused"] > len(seeds) // 10, "the cases are hardly damaged"


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_cases(kind: str, kit: Kit, tmp_path: Path) -> None:
    check(kind, kit, range(SAMPLE), tmp_path)


@pytest.mark.sweep
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_every_case(kind: str, kit: Kit, tmp_path: Path) -> None:
    wanted = os.environ.get("FUZZ", "").split()
    if wanted and wanted[0] not in (kind, "all"):
        pytest.skip("another kind is asked for")
    first = int(wanted[1]) if len(wanted) > 1 else 0
    count = int(wanted[2]) if len(wanted) > 2 else 1 if len(wanted) > 1 else WHOLE
    check(kind, kit, range(first, first + count), tmp_path)
