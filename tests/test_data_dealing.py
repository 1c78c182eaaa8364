"""Dealing a million clients as a few arrays gives what dealing client by client gave, and stores of before are still read."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import reference_deal as reference
from every import every
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_ds.config.data_section import DataConfig, PartitionConfig
from fedmoe_ds.data import holdout, partition
from fedmoe_ds.data.dealing import ALL, MAX_LABELS, NOBODY, GivenHoldout, Prepared, Units, deal_units, distribution
from fedmoe_ds.data.federated import FederatedData, _write
from fedmoe_ds.data.omissions import Omissions
from fedmoe_ds.data.ragged import Ragged
from fedmoe_ds.data.sequences import Sequences, fingerprint
from fedmoe_ds.data.store import ROWS_SCHEMA, SCHEMA, usable, write_units
from fedmoe_ds.data.templates.samples import all_but_first, pack
from fedmoe_ds.distributed.stop_points import file_sha256
from fedmoe_ds.errors import UserError
from fedmoe_ds.randomness import generator, generators
from fedmoe_ds.storage import cache

WORDS = [f"label {i:02d}" for i in range(40)] + ["é", "c d"]
LABELS = st.one_of(
    st.lists(st.sampled_from(WORDS[:3]), min_size=2, max_size=60), st.lists(st.sampled_from(WORDS), min_size=20, max_size=120)
)
KINDS = ("natural", "iid", "dirichlet", "quantity")
SEEDS = st.integers(0, 5)


@st.composite
def partitions(draw: st.DrawFn, samples: int, kinds: tuple[str, ...] = KINDS) -> PartitionConfig:
    kind = draw(st.sampled_from(kinds))
    clients = None if kind == "natural" else draw(st.integers(1, min(9, samples)))
    least = draw(st.integers(1, max(1, samples // (clients or 1) // 3)))
    return PartitionConfig(kind=kind, clients=clients, alpha=draw(st.sampled_from([0.05, 0.5, 3.0])), min_samples=least)


@given(seed=st.integers(0, 2**63 - 1), addresses=st.lists(st.one_of(st.integers(0, 2**40), st.text(max_size=8)), max_size=6))
def test_a_moved_generator_draws_what_a_new_one_draws(seed: int, addresses: list[int | str]) -> None:
    for address, moved in zip(addresses, generators(seed, "test", addresses), strict=True):
        fresh = generator(seed, "test", address)
        # 32-bit and 64-bit draws, an odd number of them: nothing of one address may be left in the next.
        drawn = [(one.permutation(5).tolist(), one.random(), one.integers(0, 9, 3).tolist()) for one in (moved, fresh)]
        assert drawn[0] == drawn[1]


@settings(max_examples=150, deadline=None)
@given(labels=LABELS, seed=SEEDS, data=st.data())
def test_partitions_are_those_of_the_plain_algorithm(labels: list[str], seed: int, data: st.DataObject) -> None:
    config = data.draw(partitions(len(labels)))
    try:
        names, rows = partition.deal(labels, config, seed)
    except UserError:
        with pytest.raises(UserError):
            reference.deal(labels, config, seed)
        return
    plain = reference.deal(labels, config, seed)
    assert names == list(plain) and every(map(np.array_equal, rows, plain.values()))


@settings(max_examples=100, deadline=None)
@given(strata=LABELS, share=st.floats(0.01, 0.9), seed=SEEDS)
def test_global_holdouts_are_those_of_the_plain_algorithm(strata: list[str], share: float, seed: int) -> None:
    if len(set(strata)) < len(strata):
        assert np.array_equal(holdout.draw_global(strata, share, seed), reference.draw_global(strata, share, seed))


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), share=st.floats(0.001, 0.999), seed=SEEDS, data=st.data())
def test_splits_and_caps_are_those_of_the_plain_algorithm(
    sizes: list[int], share: float, seed: int, data: st.DataObject
) -> None:
    limit = data.draw(st.one_of(st.none(), st.integers(1, 30)))
    names = [f"client-{i}" for i in range(len(sizes))]
    shuffled = np.random.default_rng(seed).permutation(sum(sizes))
    rows = Ragged.of(shuffled, np.array(sizes))
    capped, split = holdout.cap_clients(rows, limit, seed, names), holdout.split_clients(rows, share, seed, names)
    for client, name in enumerate(names):
        own = rows[client]
        assert np.array_equal(capped[client], own[reference.cap(len(own), limit, seed, name)])
        train, held = reference.split_client(len(own), share, seed, name)
        assert np.array_equal(split[2 * client], own[train]) and np.array_equal(split[2 * client + 1], own[held])


@settings(max_examples=60, deadline=None)
@given(labels=LABELS, owners=st.integers(1, 5), seed=SEEDS)
def test_distributions_are_counted_alike(labels: list[str], owners: int, seed: int) -> None:
    owner_N = np.random.default_rng(seed).integers(0, owners + 1, len(labels))
    rows = Ragged.by_owner(owner_N, owners + 1)
    told, counts_CS = distribution(labels, rows)
    plain = reference.distribution([Counter(labels[row] for row in own) for own in rows], MAX_LABELS)
    assert {"labels": told, "counts": counts_CS.tolist()} == plain


def text_of(count: int, seed: int, shortest: int = 2) -> Sequences:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, 99, int(rng.integers(shortest, 12))) for _ in range(count)]
    return Sequences(ids, [rng.random(len(one)) < 0.5 for one in ids])


def plain_owners(units: Units, config: DataConfig, seed: int, given: GivenHoldout | None) -> tuple[list[str], list[Sequences]]:
    """Names, and what every owner has, client by client."""
    strata = units.labels if units.stratified else [ALL] * len(units.labels)
    held = np.empty(0, np.int64) if given else reference.draw_global(strata, config.global_holdout, seed)
    rest = np.setdiff1d(np.arange(len(units.labels)), held)
    dealt = reference.deal([units.labels[row] for row in rest], config.partition, seed)

    def finished(rows: Any) -> Sequences:
        if units.packed:
            return units.content.select(rows)
        chunks = pack([units.content.input_ids[row] for row in rows], config.sequence_length)
        return Sequences(chunks, [all_but_first(chunk) for chunk in chunks])

    owners = []
    for name, local in dealt.items():
        own = finished(rest[local])
        own = own.select(reference.cap(len(own), config.max_samples, seed, name))
        owners += [own.select(part) for part in reference.split_client(len(own), config.holdout, seed, name)]
    return list(dealt), [*owners, given.content.select(given.order) if given else finished(held)]


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, data=st.data())
def test_every_owner_has_what_it_had(seed: int, data: st.DataObject) -> None:
    """Sequences and documents, with a hold-out that is drawn or given, capped or not: the same content, and the same digest."""
    count = data.draw(st.integers(8, 60))
    packed, stratified = data.draw(st.booleans()), data.draw(st.booleans())
    labels = data.draw(st.lists(st.sampled_from(WORDS[:4]), min_size=count, max_size=count))
    units = Units(text_of(count, seed, 4), labels, packed, stratified and packed, list(range(count)))
    kinds = ("natural",) if stratified and packed else KINDS[1:]
    config = DataConfig(
        partition=data.draw(partitions(count // 2, kinds)),
        sequence_length=8,
        max_samples=data.draw(st.sampled_from([None, 2, 5])),
    )
    held = text_of(7, seed + 1)
    given = data.draw(st.sampled_from([None, GivenHoldout(held, np.random.default_rng(seed).permutation(7))]))
    try:
        prepared, client_N = deal_units(units, config, seed, given)
    except UserError as error:
        assert "larger alpha" in str(error) or "would empty a group" in str(error)
        return
    names, owners = plain_owners(units, config, seed, given)
    assert prepared.names == names and len(prepared.owned) == len(owners) == 2 * len(names) + 1
    for rows, plain in zip(prepared.owned, owners, strict=True):
        ours = prepared.content.select(rows)
        assert every([len(ours) == len(plain), *map(np.array_equal, ours.input_ids, plain.input_ids)])
        assert every([True, *map(np.array_equal, ours.loss_mask, plain.loss_mask)])
    assert fingerprint(prepared.content, prepared.owned) == reference.fingerprint(owners)
    assert ((client_N == NOBODY).sum() > 0) == (given is None) and client_N.max() < len(names)


def prepared_text(seed: int = 0, shared: bool = False, tiers: bool = False) -> Prepared:
    content = text_of(40, seed)
    units = Units(content, [f"user {row % 9}" for row in range(40)], packed=True, stratified=True)
    config = DataConfig(partition=PartitionConfig(kind="natural"))
    made, _ = deal_units(units, config, seed)
    told = [("4", "2", "4 r2")[i % 3] for i in range(len(made.names))] if tiers else None
    return Prepared(made.names, content, made.owned, made.labels, made.counts_CS, Omissions(rows=40), shared, told)


@pytest.mark.parametrize(("shared", "tiers"), [(False, False), (True, True)])
def test_what_is_stored_is_what_was_dealt(shared: bool, tiers: bool, tmp_path: Path) -> None:
    made = prepared_text(shared=shared, tiers=tiers)
    _write(tmp_path / "data" / "key", made, {"sequence_length": 12})
    data = FederatedData.open(tmp_path / "data" / "key")
    assert data.names == made.names and data.tiers == made.tiers
    assert data.distribution == {"labels": made.labels, "counts": made.counts_CS.tolist()}
    owners = [part for client in range(len(data)) for part in (data.train(client), data.holdout(client))]
    assert reference.fingerprint([*owners, data.global_holdout()]) == data.fingerprint
    for client in range(len(data)):
        train = data.train(client)
        assert len(train) == data.samples[client] == data.train_sequences[client]
        assert sum(int(mask.sum()) for mask in train.loss_mask) == data.train_tokens[client]
        assert sum(map(len, train.input_ids)) == data.train_rows[client]
        assert data.train_lengths(client).tolist() == [len(ids) for ids in train.input_ids]
    some = np.arange(0, len(data), 2)
    assert data.train_lengths_of(some).tolist() == [len(ids) for client in some for ids in data.train(client).input_ids]
    assert bool(list((tmp_path / "data").glob("units-*"))) == shared


def write_as_before(folder: Path, made: Prepared) -> None:
    """A store as earlier versions wrote it: one record batch an owner, and the clients in the header."""
    owners = [made.content.select(rows) for rows in made.owned]
    units = {"units": write_units(folder.parent, made.content, {"sequence_length": 12})} if made.shared else {}
    schema = ROWS_SCHEMA if made.shared else SCHEMA
    with cache.draft(folder, lambda: False) as draft:
        with pa.OSFile(str(draft / "sequences.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for rows, owner in zip(made.owned, owners, strict=True):
                if made.shared:
                    writer.write_batch(pa.record_batch([rows], schema=schema))
                    continue
                bounds = pa.array(np.cumsum([0, *map(len, owner.input_ids)]), type=pa.int64())
                ids = np.concatenate([np.empty(0, np.int64), *owner.input_ids])
                mask = np.concatenate([np.empty(0, np.bool_), *owner.loss_mask]).view(np.uint8)
                lists = [pa.LargeListArray.from_arrays(bounds, pa.array(values)) for values in (ids, mask)]
                writer.write_batch(pa.record_batch(lists, schema=schema))
        train = owners[:-1:2]
        header = {
            "names": made.names,
            "samples": [len(own) for own in train],
            "train_sequences": [len(own) for own in train],
            "train_tokens": [own.target_count() for own in train],
            "train_rows": [own.row_count() for own in train],
            "distribution": {"labels": made.labels, "counts": made.counts_CS.tolist()},
            "sequence_length": 12,
            "omissions": made.omissions.as_dict(),
            "tiers": made.tiers,
            "reading": {},
            "fingerprint": reference.fingerprint(owners),
            **units,
        }
        sealed = cache.sealed({**header, "checksum": file_sha256(draft / "sequences.arrow")})
        (draft / "header.json").write_text(json.dumps(sealed, indent=1, ensure_ascii=False), encoding="utf-8")


@pytest.mark.parametrize("shared", [False, True], ids=["sequences", "row numbers"])
def test_stores_of_earlier_versions_are_found_and_read(shared: bool, tmp_path: Path) -> None:
    made = prepared_text(shared=shared, tiers=True)
    write_as_before(tmp_path / "data" / "old", made)
    _write(tmp_path / "data" / "new", made, {"sequence_length": 12})
    assert usable(tmp_path / "data" / "old")
    old, new = (FederatedData.open(tmp_path / "data" / name) for name in ("old", "new"))
    assert (old.names, old.tiers, old.distribution, old.fingerprint) == (
        new.names,
        new.tiers,
        new.distribution,
        new.fingerprint,
    )
    for name in ("samples", "train_sequences", "train_tokens", "train_rows"):
        assert np.array_equal(getattr(old, name), getattr(new, name))
    for client in range(len(old)):
        for read in (FederatedData.train, FederatedData.holdout):
            assert reference.fingerprint([read(old, client)]) == reference.fingerprint([read(new, client)])
        assert old.train_lengths(client).tolist() == new.train_lengths(client).tolist()
    assert np.array_equal(*(data.train_lengths_of(np.array([0, 3, 4])) for data in (old, new)))
    assert reference.fingerprint([old.global_holdout()]) == reference.fingerprint([new.global_holdout()])


def test_files_do_not_grow_by_a_batch_a_client(tmp_path: Path) -> None:
    """A record batch an owner was 0.4 KiB, and an entry of the footer that every rank reads."""
    clients = 5_000
    content = text_of(2 * clients, 0)
    units = Units(content, [f"{row % clients:05d}" for row in range(2 * clients)], packed=True, stratified=False)
    made, _ = deal_units(units, DataConfig(partition=PartitionConfig(kind="iid", clients=clients // 2)), 0)
    _write(tmp_path / "data" / "key", made, {"sequence_length": 12})
    (path,) = (tmp_path / "data" / "key").glob("sequences.arrow")
    assert pa.ipc.open_file(pa.memory_map(str(path))).num_record_batches <= 3
    assert (tmp_path / "data" / "key" / "header.json").stat().st_size < 4_096
