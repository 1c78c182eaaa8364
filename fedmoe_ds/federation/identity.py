"""Identity: what one start must have in common with another to continue its run: all that decides the result, and no more.

Every key of the configuration is either part of it, or shown to leave the result alone (tests/test_identity.py goes over all
of them). Beside keys it holds the contents of model and data, the kind of device, and the kernels that compute: other kernels
add up in another order. In fast mode, which promises no bits, the processor's instructions and the topology stay outside.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedmoe_ds.checkpoint.reader import read_snapshot
from fedmoe_ds.config import TARGETS, Config
from fedmoe_ds.config.privacy_section import ACCOUNTS
from fedmoe_ds.config.yaml12 import parse_yaml
from fedmoe_ds.data import FederatedData
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.kernel_identity import PRODUCTS
from fedmoe_ds.foundation import Foundation
from fedmoe_ds.methods.private import KEY, key_digest
from fedmoe_ds.storage.strict_json import tree_sha256

Identity = dict[str, Any]
_NO_REASON = [("data.template", *pair) for kind in ("text", "chat") for pair in (("auto", kind), (kind, "auto"))]
"""Differences that lead to the same data: earlier versions wrote down `text` where nothing was set."""
YARDSTICK = ("max_sequences", "client_sequences")
"""Keys of `evaluation` that decide on which sequences a score is measured: the rounds of one record are compared."""
START = "adapters.start"
GONE = ""
"""Digest of a start that is not read: what a checkpoint says is taken for it."""
_FIRST = ("foundation", "data", "seed", "adapters", "local", "method", "server", "federation")
"""What absences are kept under; runs of earlier versions have written theirs under these."""


def identity(
    config: Config,
    foundation: Foundation,
    data: FederatedData,
    kernels: Mapping[str, str],
    bitwise: bool,
    start: str | None = None,
    trace: str | None = None,
) -> Identity:
    """That of a start.

    Args:
        kernels: its own (`kernels_of`).
        start: the digest of what its adapters begin as.
        trace: that of a file of devices.
    """
    known = of_settings(json.loads(config.model_dump_json()))
    # Resolved: `auto` depends on the machine, so a checkpoint must say what it meant.
    known["execution"]["reproducible"] = "bitwise" if bitwise else "fast"
    known["topology"] = {"device": next(foundation.model.parameters()).device.type}
    contents = {"foundation.code": foundation.code, "foundation": foundation.fingerprint, "data": data.fingerprint}
    if data.tiers is not None:  # no token shows what the column of tiers says
        contents["federation.tier_column"] = tree_sha256({"tiers": data.tiers})
    if start is not None:
        contents[START] = start
    contents |= key_digest(config.privacy)
    if trace is not None:
        contents["devices.trace"] = trace
    return {**known, "kernels": dict(kernels), **contents}


def of_settings(tree: dict[str, Any]) -> Identity:
    """What a tree of keys says about it. `auto` says nothing: what it meant depends on the machine."""
    local, execution = tree["local"], tree["execution"]
    largest = local["batch_size"]  # a wider pass than the batch is the whole batch
    modes = {"micro_batch_size": min(execution["micro_batch_size"] or largest, largest), "packing": execution["packing"]}
    if modes["packing"] and modes["micro_batch_size"] < largest:
        # What a packed pass has memory for is counted in tokens of full sequences.
        modes["pass_tokens"] = modes["micro_batch_size"] * tree["data"]["sequence_length"]
    device, scheduled = tree["topology"]["device"], local["rounds_schedule"] != "constant"
    return {
        "seed": tree["seed"],
        **{name: tree[name] for name in ("local", "method", "server")},
        # Not where the start lies: the digest stands for the tensors themselves.
        "adapters": _adapters_alike(tree["adapters"]),
        START: None,
        # More rounds may be asked for at any time and all that happened so far stays the same, unless rates follow from them.
        "federation": {key: value for key, value in _tiers_alike(tree["federation"]).items() if key != "rounds" or scheduled},
        # Path, preset and cache do not count: the fingerprint stands for the weights themselves.
        # Runs save what `auto` meant; only a configuration from before there was the key, or the word, has none.
        "foundation.dtype": "float32" if tree["foundation"]["dtype"] == "auto" else tree["foundation"]["dtype"],
        "foundation.code": None,
        # Further layers are no part of the model's files, nor of their fingerprint; earlier versions had none.
        "foundation.expand": tree["foundation"].get("expand"),
        "evaluation": {key: tree["evaluation"][key] for key in YARDSTICK},
        "execution": modes | {key: execution[key] for key in ("reproducible",) if execution[key] != "auto"},
        "topology": {} if device == "auto" else {"device": device},
        "devices": _devices(tree["devices"]),
        "privacy": _privacy(tree["privacy"]),
        KEY: None,
    }


def _without(section: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """A section without later keys that say what was always done: earlier versions have not written them."""
    return {key: value for key, value in section.items() if key not in later or value != later[key]}


def _adapters_alike(adapters: dict[str, Any]) -> dict[str, Any]:
    """Adapters without where they started; those of `moe` are compared whole."""
    moe = adapters["moe"]
    found = {key: value for key, value in adapters.items() if key != "start"}
    later = {"linear": False, "shared": 0, "zero": 0, "router_input": "token", "gate": "softmax"}
    return {**found, "moe": _without(moe, later)} if isinstance(moe, dict) else found


def _tiers_alike(federation: dict[str, Any]) -> dict[str, Any]:
    """Tiers without the keys that they do not use: they are compared whole, and earlier versions did not have all keys."""
    tiers = federation["tiers"]
    if not isinstance(tiers, list):
        return federation
    later = (("clients", None), ("layers", None), ("blocks", None))
    plain = [{key: value for key, value in tier.items() if (key, value) not in later} for tier in tiers]
    return {**federation, "tiers": plain}


def _devices(devices: dict[str, Any]) -> dict[str, Any] | None:
    """What is simulated; of a trace its digest counts, not where it lies. None: nothing, as in earlier versions."""
    if not devices["mix"] and devices["trace"] is None:
        return None
    return {key: value for key, value in devices.items() if key not in ("trace", *TARGETS)}


def _privacy(privacy: dict[str, Any]) -> dict[str, Any] | None:
    """What clips and what is drawn; of the key its digest counts. None: nothing is private, as in earlier versions."""
    if privacy["clip"] is None:
        return None
    return {key: value for key, value in privacy.items() if key not in ("key_file", *ACCOUNTS)}


def memory_settings(config: Config, identity: Identity) -> dict[str, Any]:
    """What decides which clients there are and how much a pass of theirs needs."""
    execution = config.execution
    passes: dict[str, Any] = {key: getattr(execution, key) for key in ("micro_batch_size", "activation_checkpointing")}
    # Absent where a run does without, so that absences of earlier versions still count.
    later = {"packing": False, "moments_on": "device"}
    passes |= {key: getattr(execution, key) for key, usual in later.items() if getattr(execution, key) != usual}
    own = {
        "local": _without(identity["local"], {"dual_step": 1.0, "aggregation_step": 1.0}),
        "server": _without(identity["server"], {"training": None}),
        "adapters": _without(identity["adapters"], {"head": "frozen", "head_start": "foundation"}),
    }
    return {name: identity[name] for name in _FIRST} | own | passes


def check_identity(written: Identity, folder: Path, ours: Identity, config: Config) -> list[str]:
    """Refuse a checkpoint of another model, other data or other settings, naming the first difference.

    Checkpoints of earlier versions lack entries. What their `config.yaml` tells about these is compared like the others; what
    nobody wrote down (the kernels, what `auto` meant) is taken to agree.

    Args:
        written: the identity in the checkpoint's manifest.
        folder: of the checkpoint.
    Returns:
        Lines about what could not be compared, if there is anything.
    """
    # Entries that the manifest lacks are taken from the configuration beside it.
    tree = _settings(folder)
    _check_types(written, ours, folder)
    theirs = {**of_settings(tree), **written} if tree else dict(written)
    for name, value in theirs.items():
        if tree and isinstance(value, dict) and name != "kernels":
            theirs[name] = {**of_settings(tree).get(name, {}), **value}
    theirs = _as_kept(theirs)
    unknown, notes = list[str](), list[str]()
    for name in sorted(ours, key=lambda name: name in ("foundation", "data")):  # contents last: a key may explain them
        # A method's parameters, devices, privacy and further layers count whole: one that only one side has is a difference.
        if isinstance(ours[name], dict) and name not in ("method", "devices", "privacy", "foundation.expand"):
            there = theirs.get(name, {})
            unknown += [key if name == "kernels" else f"{name}.{key}" for key in ours[name] if key not in there]
            # Keys that the checkpoint does not say are told, not refused.
            _compare(name, {key: value for key, value in ours[name].items() if key in there}, there, config)
        elif name not in theirs:
            unknown.append(name)
        elif name == START:
            _compare_starts(ours[name], theirs[name], config.adapters.start, tree)
        elif name in ("foundation", "data"):
            _compare_contents(name, ours[name], theirs[name], json.loads(config.model_dump_json()), tree)
        else:
            _compare(name, ours[name], theirs[name], config)
    if unknown:
        notes.append(f"the checkpoint, of an earlier version, does not say what it was written with: {', '.join(unknown)}")
    return notes


def _as_kept(theirs: Identity) -> Identity:
    """Without a promise of bits on CUDA: earlier versions took and recorded it, and nothing there kept it."""
    execution, kernels = theirs.get("execution", {}), theirs.get("kernels", {})
    if theirs.get("topology", {}).get("device") != "cuda" or execution.get("reproducible") != "bitwise":
        return theirs
    kept = {name: kernel for name, kernel in kernels.items() if name == PRODUCTS}
    return {**theirs, "execution": {**execution, "reproducible": "fast"}, "kernels": kept}


def _check_types(written: Identity, ours: Identity, folder: Path) -> None:
    """Refuse an identity whose entries have other types than ours: nothing of this package has written it."""
    for name, value in ours.items():
        there = written.get(name)
        # None is legal on either side: `foundation.code` of a tokenizer without code.
        if there is not None and value is not None and not isinstance(there, type(value)):
            raise UserError(
                f"checkpoint: {folder}: identity.{name}: {there}: not written by this program; remove this checkpoint to go on "
                "from the one before"
            )


def check_no_effect(folder: Path, config: Config) -> None:
    """Refuse to finish a run once more with a key that could change nothing any more; where it lies and runs may differ."""
    written = _settings(folder)
    # The contents of model and data, and the name of the adapters' products, have been compared.
    places = ("name", "output", "foundation.", "data.", "topology.", START, PRODUCTS)
    for key, mine, other in differences(json.loads(config.model_dump_json()), written) if written else ():
        if not key.startswith(places) or key == "data.show_samples":
            raise UserError(
                f"--resume: {key}: {mine}: the run has trained its {config.federation.rounds} rounds with {other}, and "
                "nothing is left for it to change; set it back, raise federation.rounds, or use another name"
            )


def _settings(folder: Path) -> dict[str, Any]:
    """The configuration that a checkpoint lists; keys that were not there yet have their defaults. Empty: it lists none."""
    defaults = json.loads(Config().model_dump_json())
    try:
        if "config.yaml" not in read_snapshot(folder).files:
            return {}
        tree = parse_yaml((folder / "config.yaml").read_text(encoding="utf-8"), "config.yaml")
    except (OSError, LookupError, ValueError, UserError):
        return {}
    if not isinstance(tree, dict) or "foundation" not in tree:
        return {}
    sections = [name for name, value in defaults.items() if isinstance(value, dict)]
    return _over(defaults, tree) if all(isinstance(tree.get(name, {}), dict) for name in sections) else {}


def _over(base: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """`tree` over `base`, section by section."""
    inner = {
        key: _over(base[key], value)
        for key, value in tree.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return {**base, **tree, **inner}


def differences(ours: dict[str, Any], theirs: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, our value, their value) of every leaf that differs."""
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        mine, other = ours.get(key), theirs.get(key)
        if isinstance(mine, dict) and isinstance(other, dict):
            yield from differences(mine, other, f"{path}{key}.")
        elif mine != other:
            yield f"{path}{key}", mine, other


def _compare(name: str, ours: Any, theirs: Any, config: Config) -> None:
    found = (ours, theirs) if name == "kernels" else ({name: ours}, {name: theirs})
    for key, mine, other in differences(*found):
        # Under `auto` a start takes what the checkpoint names where it is at hand (continuation.py): it is not.
        chosen = name != "kernels" or (key == PRODUCTS and config.execution.adapter_kernels != "auto")
        way = "set it back" if chosen else "resume on a machine of that kind"
        if key == "federation.rounds":
            way = "the rate of every round follows from it (local.rounds_schedule), so set it back"
        raise UserError(f"--resume: {key}: {mine}: the checkpoint was written with {other}; {way}, or use another name")


def read_identity(checkpoint: Path) -> Identity:
    """What a checkpoint says of itself; what an earlier version left out, as the configuration beside it says."""
    tree = _settings(checkpoint)
    return {**(of_settings(tree) if tree else {}), **read_snapshot(checkpoint).identity}


def written_start(checkpoint: Path) -> str | None:
    """`adapters.start` of the run that wrote a checkpoint; None: it had none, or nothing tells."""
    path = _settings(checkpoint).get("adapters", {}).get("start")
    return path if isinstance(path, str) else None


def _compare_starts(ours: str | None, theirs: str | None, given: str | None, tree: dict[str, Any]) -> None:
    """Refuse adapters that began as others; a start that is not read is taken to be the checkpoint's, which has one."""
    if ours == theirs or (ours == GONE and theirs is not None):
        return
    path = tree.get("adapters", {}).get("start") or "nothing"
    raise UserError(f"--resume: {START}: {given}: the checkpoint was started from {path}; set it back, or use another name")


def _compare_contents(name: str, ours: str, theirs: str, tree: dict[str, Any], written: dict[str, Any]) -> None:
    """Model and data count by what is in them; a key of their section that differs tells why."""
    if ours == theirs:
        return
    kind, way = {
        "foundation": ("belongs to another model", "use the foundation of that run, or another name"),
        "data": ("was trained on other data", "restore them, or use another name"),
    }[name]
    changed = differences({name: tree[name]}, {name: written[name]} if written else {name: tree[name]})
    told = (found for found in changed if found[0] != "foundation.cache" and found not in _NO_REASON)
    key, mine, other = next(told, (name, ours[:12], theirs[:12]))
    raise UserError(f"--resume: {key}: {mine}: the checkpoint {kind} ({other}); {way}")
