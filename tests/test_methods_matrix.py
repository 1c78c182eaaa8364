"""Every method x drift correction x server optimizer x sampling x adapters: equal to its plain reference, or refused.

The gradients are the package's own (`replay.py`), all that is made of them is done again in float64. `make test` takes a set in
which every two choices meet; `make test-sweep` takes all methods, corrections, optimizers and adapters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from dense_inputs import DIGITS, write_dense
from every import every
from federations import alone, build, make_config, own_tensors, write_inputs
from read_me_inputs import CONVERT
from reference import Adapters
from reference_ensembles import ObservedSplitMix
from reference_flex_moe import ObservedFlexMoE
from reference_flux import ObservedFlux
from reference_games import FLGames
from reference_inputs import client_rank, draw, fresh, initial, tasks
from reference_late import CCFAO
from reference_methods import EmbracingFL, FedIT, FedProx, FedSALoRA, FedVRA, FFALoRA, FSLoRA, HetLoRA, LocalOnly, Scaffold
from reference_objectives import ObservedBMSFed, ObservedFedFM, ObservedFLood, ObservedPRISM
from reference_products import FedExLoRA, FedRotLoRA, FlexLoRA, FLoRA, FLoRIST, LoRAFair
from reference_raffm import RaFFM
from reference_read_me import ReadMe as ObservedReadMe
from reference_server import ServerRule
from reference_ub_smoe import ObservedUBSMoE
from reference_weights import EWWAFL, FedNova, QFedAvg
from reference_wireless import OverTheAir
from replay import ObservedFedMoE, ObservedHFedMoE, PersonalFlame, Replay

from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.federation.rounds import Federation
from fedmoe_ds.methods import method_for, method_names, registry

SAMPLES = (13, 9, 7, 5)
MODEL: dict[str, Any] = {"num_hidden_layers": 1, "num_experts": 8, "num_experts_per_tok": 4, "hidden_size": 16}
LR, CLIP, MU, SERVER = 0.5, 0.5, 0.3, {"lr": 0.03, "beta1": 0.8, "beta2": 0.9, "tau": 0.01}
SMALL: dict[str, Any] = {
    "federation": {"participation": 0.75, "rounds": 9},
    "local": {"max_steps": 2, "batch_size": 2, "optimizer": "sgd", "lr": LR, "clip": CLIP},
    "execution": {"micro_batch_size": None},
    "evaluation": {"max_sequences": 1, "client_sequences": 0, "every": 9},
    "checkpoint": {"every": 9},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "frozen router": {"attention": ["q_proj", "v_proj"]},
    "router": {"attention": ["q_proj"], "router": "train"},
    "full": {"attention": [], "router": "train", "expert_training": "full"},
    "attention": {"experts": False, "attention": ["k_proj", "o_proj"]},
    "beside": {"attention": ["q_proj"], "feed_forward": ["up_proj"], "moe": {"experts": 8, "width": 8, "top_k": 4}},
    "plain": {"attention": ["v_proj"], "feed_forward": ["gate_proj", "down_proj"]},
}
VIEWED = {"bmsfed"}
ENSEMBLES = {"split-mix", "shefl"} | VIEWED
RANKS: dict[str, Any] = {
    "attention": ["q_proj"],
    "moe": {"experts": 8, "width": 1, "top_k": 4, "linear": True, "shared": 2, "zero": 3},
}
"""What stands for `beside` where adapter experts are ranks."""
EXPANDED = {"fedbe"}
"""Of layers that a model has beside its own, without adapters: in `test_fedbe.py`."""
ALONE: dict[str, Any] = {"attention": [], "moe": {"experts": 8, "width": 8, "top_k": 1}}
"""What stands for `beside` where every adapter expert is a model of its own."""
GROUPED = {"raffm"}
GROUPS: dict[str, Any] = {"attention": ["q_proj"], "expert_training": "full"}
"""What stands for `full` where experts are groups of a dense block's channels."""
GAME: dict[str, Any] = {
    "adapters": {"head": "train"},
    "federation": {"participation": 1.0},
    "local": {"clip": None},
}
"""Of a game of all clients' heads."""
IMAGES: dict[str, Any] = {
    "adapters": {"attention": [], "moe": {"experts": 2, "width": 8, "top_k": 1}},
    "federation": {"tiers": None},
    "data": DIGITS
    | {"max_samples": 12, "form": {"kind": "grey-and-colour"}, "partition": {"kind": "iid", "clients": 4, "column": None}},
}
"""What stands for it where each reads a view of an image."""
DUAL = {"proximal": MU, "dual_step": 0.7, "aggregation_step": 0.4}
DRIFTS: dict[str, dict[str, Any]] = {"none": {}, "fedprox": {"proximal": MU}, "scaffold": {}, "fedvra": DUAL}
SERVERS = ["fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "fedams"]
SAMPLINGS = ["uniform", "size", "budget"]


@dataclass(frozen=True)
class Told:
    """A method in the reference's words; `buys` is what a tier's budget buys."""

    kind: type[FedIT]
    options: dict[str, Any]
    buys: str = "top_k"


HET = {"gamma": 0.5, "penalty": 0.05, "pruning": True, "sparsity": True}
GATED = {"mix": 0.5, "beta": 0.1, "tau": 0.1, "rank_by": "information", "participation": "trained"}
METHODS: dict[str, tuple[dict[str, Any], Told]] = {
    "flame": ({"temperature": 2.0}, Told(PersonalFlame, {"temperature": 2.0})),
    "fedit": ({}, Told(FedIT, {})),
    "hfedmoe": ({"tau_share": 0.8}, Told(ObservedHFedMoE, GATED, "experts")),
    "fed-moe": ({"profile_rounds": 1, "least": 1}, Told(ObservedFedMoE, {}, "experts")),
    "flex-moe": ({}, Told(ObservedFlexMoE, {}, "experts")),
    "split-mix": ({}, Told(ObservedSplitMix, {}, "experts")),
    "shefl": ({"kappa": 1.5, "upload": 1.5}, Told(ObservedSplitMix, {"kappa": 1.5, "upload": "1.5"}, "experts")),
    "bmsfed": ({"selection": "random", "alpha": 2.0}, Told(ObservedBMSFed, {"classes": 20}, "experts")),
    "flux": ({"samples": 1, "exploit": 0.5}, Told(ObservedFlux, {}, "experts")),
    "hetlora": ({"gamma": 0.5, "penalty": 0.05}, Told(HetLoRA, HET, "rank")),
    "flexlora": ({}, Told(FlexLoRA, {}, "rank")),
    "flora": ({}, Told(FLoRA, {}, "rank")),
    "florist": ({"tau": 0.7}, Told(FLoRIST, {"tau": 0.7}, "rank")),
    "fedex-lora": ({}, Told(FedExLoRA, {})),
    "fedrot-lora": ({"strength": 0.6}, Told(FedRotLoRA, {"strength": 0.6, "turns": "AB"})),
    "fslora": ({}, Told(FSLoRA, {}, "rank")),
    "lora-fair": ({"server_steps": 5}, Told(LoRAFair, {"regularisation": 0.01, "steps": 5, "lr": 0.05})),
    "ffa-lora": ({}, Told(FFALoRA, {})),
    "embracing-fl": ({}, Told(EmbracingFL, {}, "layers")),
    "fedsa-lora": ({}, Told(FedSALoRA, {})),
    "local-only": ({}, Told(LocalOnly, {})),
    "centralised": ({}, Told(FedIT, {})),
    "fft-moe": ({}, Told(FedIT, {})),
    "mor": ({"balance": "switch"}, Told(FedIT, {})),
    "ewwa-fl": ({"alpha": 2.0, "eps": 1e-4}, Told(EWWAFL, {"alpha": 2.0, "beta1": 0.9, "beta2": 0.999, "eps": 1e-4})),
    "cc-fao": (
        {"amsgrad": False, "steps": 1, "max_delay": 2, "delay_threshold": 0},
        Told(CCFAO, {"most": 2, "threshold": 1}),
    ),
    "flood": ({"horizon": 3}, Told(ObservedFLood, {"alpha": 0.5})),
    "ub-smoe": (
        {"momentum": 0.3},
        Told(ObservedUBSMoE, {"momentum": 0.3, "eps": 1e-3, "of": "tokens"}),
    ),
    # The second round of whoever was there in the first is reinforcement.
    "prism": ({"rho": 0.5, "horizon": 2}, Told(ObservedPRISM, {})),
    # Of text nobody hides the labels.
    "fedmox": ({}, Told(FedIT, {})),
    "fl-games": ({"buffer": 2, "box": 0.3}, Told(FLGames, {"lr": LR, "buffer": 2, "box": 0.3})),
    "fedfm": ({"matching": 0.5}, Told(ObservedFedFM, {"classes": 320})),
    "fednova": ({}, Told(FedNova, {"lr": LR})),
    "q-fedavg": ({"q": 2.0}, Told(QFedAvg, {"q": 2.0, "lipschitz": 1 / LR})),
    "ota-ffl": ({"epsilon": 0.2, "snr_db": 20.0}, Told(OverTheAir, {"epsilon": 0.2, "snr_db": 20.0})),
    "raffm": ({"missing": "zero"}, Told(RaFFM, {"missing": "zero"})),
    "read-me": ({}, Told(ObservedReadMe, {})),
    # A channel for everybody, all the time in the world: FedIT.
    "wireless-fl": ({"channels": 9, "epochs": 1, "deadline_s": 1e6}, Told(FedIT, {})),
}
PAIRS = {
    "hetlora",
    "flexlora",
    "flora",
    "florist",
    "fedex-lora",
    "fedrot-lora",
    "fslora",
    "lora-fair",
    "ffa-lora",
    "fedsa-lora",
}
NOT_ONE_MEAN = {"cc-fao", "ewwa-fl", "flood", "fednova", "ota-ffl", "q-fedavg", "raffm"}
NO_MEAN = {"flexlora", "flora", "florist", "fedex-lora", "fedrot-lora", "lora-fair", "local-only", "centralised"}


class Case(NamedTuple):
    method: str
    drift: str
    server: str
    sampling: str
    adapters: str

    def refused(self) -> bool:
        """Whether this has no meaning; the words are in `test_methods_refusals.py`."""
        plain = self.adapters == "plain"
        return (
            (self.method in NO_MEAN and self.server != "fedavg")
            or (self.method in NO_MEAN - {"local-only"} and self.drift in ("scaffold", "fedvra"))
            or (self.method == "local-only" and self.drift != "none")
            or (self.method == "cc-fao" and self.drift == "scaffold")
            or (self.method == "fl-games" and (self.drift, self.server) != ("none", "fedavg"))
            or (self.method in NOT_ONE_MEAN and self.drift == "fedvra")
            or (self.method in PAIRS and self.adapters == "full")
            or (self.method in ("fed-moe", "ub-smoe") and self.adapters in ("attention", "plain"))
            or (self.method == "flux" and self.adapters in ("attention", "beside", "plain"))
            or (self.method == "fed-moe" and self.adapters in ("router", "full", "beside") and self.drift == "fedvra")
            or (self.method in ("flex-moe", "hfedmoe") and self.adapters in ("frozen router", "attention", "plain"))
            or (self.method in {"fft-moe", "mor"} | ENSEMBLES and self.adapters != "beside")
            or (self.method == "read-me" and self.adapters not in ("router", "full"))
            or (self.method in GROUPED and self.adapters != "full")
            or (self.method == "shefl" and self.drift in ("scaffold", "fedvra"))
            or (plain and self.sampling == "budget")
        )

    def changes(self) -> list[dict[str, Any]]:
        server = {"optimizer": self.server, **({} if self.server == "fedavg" else SERVER)}
        plain, (own, told) = self.adapters == "plain", METHODS[self.method]
        # FLAME has no parameters where there are no experts; ranks are what tiers can differ by there.
        own = {} if plain and self.method == "flame" else own
        buys, budgets = ("rank", (4, 2, 1)) if plain else ("experts", (8, 3, 1))
        bought = (plain and told.buys == "rank") or self.method in ENSEMBLES
        tiers = {"tiers": [{buys: budget, "share": 1.0} for budget in budgets]} if bought else {}
        own_beside = {**dict.fromkeys(ENSEMBLES, ALONE), "mor": RANKS} if self.adapters == "beside" else {}
        adapters = own_beside.get(self.method, ADAPTERS[self.adapters])
        grouped = self.method in GROUPED and self.adapters == "full"
        adapters = GROUPS if grouped else adapters
        images = IMAGES if self.method in VIEWED and self.adapters == "beside" else {}
        return [
            SMALL,
            {"foundation": {"convert": {"experts": 4}}} if grouped else {},
            {"method": {"name": self.method, **own}, "adapters": adapters, "federation": tiers},
            {"local": {"drift": self.drift, **DRIFTS[self.drift]}, "server": _used(server)},
            {"federation": {"sampling": self.sampling}},
            GAME if self.method == "fl-games" else {},
            images,
        ]


def _used(server: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that the optimizer does not have."""
    none = {"fedavg": ("lr", "beta1", "beta2", "tau"), "fedavgm": ("beta2", "tau"), "fedadagrad": ("beta2",)}
    idle = none.get(server["optimizer"], ())
    return {key: value for key, value in server.items() if key not in idle}


EVERY = [Case(*choice) for choice in itertools.product(METHODS, DRIFTS, SERVERS, SAMPLINGS, ADAPTERS)]
ACCEPTED = [case for case in EVERY if not case.refused()]


def pairwise(cases: list[Case]) -> Iterator[Case]:
    """A small subset in which every two choices that can meet do: greedily the case with most pairs that are still missing."""

    def pairs(case: Case) -> set[tuple[Any, ...]]:
        return set(itertools.combinations(enumerate(case), 2))

    missing = set().union(*map(pairs, cases))
    while missing:
        best = max(cases, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        yield best


SOME = list(pairwise(ACCEPTED))
REST = [case for i, case in enumerate(ACCEPTED) if case not in SOME and case.sampling == SAMPLINGS[i // len(ADAPTERS) % 3]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("matrix"))


def write_models(folder: Path) -> Path:
    """A dense model, and sparse ones with few and with many experts."""
    write_dense(folder, ("llama", "vit-rgb"), SAMPLES)
    (folder / "many").mkdir()
    write_inputs(folder / "many", SAMPLES, **MODEL | {"num_experts": 32})
    write_inputs(folder, SAMPLES, **MODEL)
    return folder


def config_of(root: Path, case: Case, tag: str, *changes: dict[str, Any]) -> Any:
    made = {"read-me": {"convert": CONVERT}}.get(case.method, {})
    model = "llama" if made or case.adapters in ("beside", "plain") or case.method in GROUPED else "model"
    model = "vit-rgb" if case.method in VIEWED and case.adapters == "beside" else model
    foundation = {"path": str(root / model), **made}
    name = "-".join([*case, tag]).replace(" ", "-")
    return make_config(root, name, {"foundation": foundation}, *case.changes(), *changes)


def test_every_combination_is_accepted_or_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(METHODS) | EXPANDED == set(method_names())
    installed = registry.entry_points(group=registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: installed)  # looked up once, not a thousand times
    for case in EVERY:
        if case.sampling != SAMPLINGS[0]:  # no refusal asks for it
            continue
        config = config_of(tmp_path, case, "asked")
        if not case.refused():
            method_for(config)
            continue
        with pytest.raises(UserError) as caught:
            method_for(config)
        assert "\n" not in str(caught.value) and "; " in str(caught.value), case
    assert len(ACCEPTED) > 1000 and len(SOME) < len(METHODS) * len(ADAPTERS), "about one per method and adapters"


@pytest.mark.parametrize("case", SOME, ids="-".join)
def test_rounds_are_the_plain_ones(root: Path, case: Case) -> None:
    compare(root, case)


@pytest.mark.sweep
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", sorted({case.method for case in REST}))
def test_rounds_of_every_combination_are_the_plain_ones(root: Path, method: str) -> None:
    for case in REST:
        if case.method == method:
            compare(root, case)


SAME = [
    Case("fedit", d, s, SAMPLINGS[i % 3], list(ADAPTERS)[i % 5]) for i, (d, s) in enumerate(itertools.product(DRIFTS, SERVERS))
]


def test_flame_without_experts_is_fedit_to_the_bit(root: Path) -> None:
    ours, theirs = (
        trained(config_of(root, Case(name, "none", "fedavg", "size", "plain"), "same")) for name in ("flame", "fedit")
    )
    assert ours.keys() == theirs.keys() and not [key for key, value in ours.items() if not torch.equal(value, theirs[key])]


@pytest.mark.parametrize("case", SAME, ids="-".join)
def test_flame_without_its_parts_is_fedit_to_the_bit(root: Path, case: Case) -> None:
    """t = 0 and no rescaler, under every drift correction and server optimizer; what the server remembers included."""
    even = {} if case.adapters == "attention" else {"temperature": 0.0}  # refused where no expert is averaged
    flame = {"method": {"name": "flame", "rescaler": "none", **even}}
    ours, theirs = (trained(config_of(root, case, tag, change)) for tag, change in (("flame", flame), ("fedit", {})))
    assert ours.keys() == theirs.keys() and any(bool(value.any()) for value in ours.values())
    assert not [key for key, value in ours.items() if not torch.equal(value, theirs[key])]


# Of local-only, the server has no experts: nothing of them could move. Noise on the channel, and pseudo-gradients, reach all;
# groups of channels are used by every row of those who hold them. Read-ME's tokens have one expert each (`test_read_me.py`),
# and of two experts with a view each none is unused.
@pytest.mark.parametrize(
    "method", [name for name in METHODS if name not in ("local-only", "ota-ffl", "raffm", "read-me", "ub-smoe", *VIEWED)]
)
def test_experts_that_nobody_used_stay(root: Path, method: str) -> None:
    """Few rows and active experts per client, half of the clients at one rank of two."""
    adapters = "beside" if method in {"fft-moe", "mor"} | ENSEMBLES else "router"
    tier: dict[str, Any] = {"tiers": [{"top_k": 2, "share": 1.0}, {"top_k": 1, "share": 1.0}], "participation": 1.0}
    if METHODS[method][1].buys == "rank":
        tier |= {"budget": "both"}
    if method in ENSEMBLES:
        tier |= {"tiers": [{"experts": 2, "share": 1.0}, {"experts": 1, "share": 1.0}]}
    few = {"federation": tier, "local": {"max_steps": 1, "batch_size": 1}, "adapters": {"rank": 2}}
    many = (
        {"adapters": {"moe": {"experts": 32}}} if adapters == "beside" else {"foundation": {"path": str(root / "many/model")}}
    )
    parts, journal = build(config_of(root, Case(method, "none", "fedavg", "uniform", adapters), "unused", few, many), *alone())
    federation, touched, left_alone = Federation(parts, journal), set(), 0
    for round_index in (1, 2, 3):
        before = {key: value.clone() for key, value in moving(parts)}
        federation._round(round_index)
        assert parts.state.utilisation_LE is not None
        used_LE = parts.state.utilisation_LE > 0
        for layer, expert in zip(*(~used_LE).nonzero(), strict=True):
            place = f"layers.{layer}.experts.{expert}."
            now = {key: value for key, value in moving(parts) if key.startswith(place)}
            assert every(torch.allclose(value, before[key], rtol=1e-6, atol=1e-8) for key, value in now.items()), place
            left_alone += (layer, expert) in touched
        touched |= set(zip(*used_LE.nonzero(), strict=True))
    journal.close()
    assert left_alone, "experts that were trained in a round and not used in a later one"


def moving(parts: Parts) -> Iterator[tuple[str, torch.Tensor]]:
    """What the server has of experts: merged weights where products move into them, else adapters."""
    bank = parts.state.server["base"] if parts.spec.method.absorbs else parts.state.adapters
    yield from ((key, value) for key, spec, value in bank.items(0) if spec.expert)


def trained(config: Any, rounds: int = 2) -> dict[str, torch.Tensor]:
    """Everything that these rounds leave behind."""
    parts, journal = build(config, *alone())
    federation = Federation(parts, journal)
    for round_index in range(1, rounds + 1):
        assert not federation._round(round_index)
    journal.close()
    return {f"{name}.{key}": value for name, values in found(parts).items() for key, value in values.items()}


def compare(root: Path, case: Case) -> None:
    """Two rounds: global adapters, personal state and the server's own agree after each of them."""
    parts, journal = build(config_of(root, case, "rounds"), *alone())
    expected, told = reference_of(parts, case), METHODS[case.method][1]
    federation, replay = Federation(parts, journal), expected.reference
    assert isinstance(replay, Replay)
    for round_index in (1, 2):
        replay.forget()
        assert not federation._round(round_index)
        drawn = [0] if parts.spec.method.pooled else [client.index for client in draw(parts, round_index)]
        assert [client.index for client in parts.participants(round_index)] == sorted(replay.updates) == drawn
        expected.round(tasks(parts, round_index, told.buys), fresh(parts, round_index))
        check(wanted(expected), found(parts), f"{case} round {round_index}")
    journal.close()


def reference_of(parts: Parts, case: Case) -> FedIT:
    told = METHODS["fedit" if (case.method, case.adapters) == ("flame", "plain") else case.method][1]
    correction = {"none": [], "fedprox": [FedProx], "scaffold": [Scaffold], "fedvra": [FedVRA]}[case.drift]
    kind: type[FedIT] = type(case.method, (*correction, told.kind), {})
    server = ServerRule(case.server, **({} if case.server == "fedavg" else SERVER))
    start = initial(parts)
    if "rescaler" in parts.execution.bank:
        start["model.rescaler"] = torch.ones(1, dtype=torch.float64)
    ranks = {client.index: client_rank(parts, client) for client in parts.clients}
    clients = [0] if parts.spec.method.pooled else [client.index for client in parts.clients]
    replay: Any = Replay(parts, LR, parts.config.local.clip or math.inf)
    more = {"pull": MU} if case.drift == "fedprox" else {}
    more |= {"dual": DUAL["dual_step"], "ahead": DUAL["aggregation_step"]}
    sizes = {client.index: client.samples for client in parts.clients}
    seed = parts.config.seed
    return kind(replay, start, clients, server, **told.options, **more, mu=MU, ranks=ranks, sizes=sizes, seed=seed)


def wanted(expected: FedIT) -> dict[str, Adapters]:
    memories = [expected.memory(index) for index in expected.clients]
    personal = {key: torch.stack([memory[key] for memory in memories]) for key in memories[0]}
    return {"adapters": dict(expected.adapters), "personal": personal, **expected.extras()}


def found(parts: Parts) -> dict[str, Adapters]:
    banks = {"adapters": parts.state.adapters, **parts.state.server}
    ours = {name: {key: value.double() for key, _, value in bank.items(0)} for name, bank in banks.items()}
    ours["personal"] = {key: value.double() for key, value in own_tensors(parts).items()}
    return ours


UNTOUCHED = {"momentum": 0.0, "variance": SERVER["tau"] ** 2, "largest": 0.0}
DIGITS = {"control": (2e-4, 0.05), "variance": (2e-5, 1e-4), "largest": (2e-5, 1e-4)}
"""What float32 keeps of a kind of state: relative to the largest value of a tensor, but to no less than the second number."""


def check(theirs: dict[str, Adapters], ours: dict[str, Adapters], case: str) -> None:
    assert any(theirs.values()) and any(ours.values()), f"{case}: nothing to compare"
    for name in theirs.keys() | ours.keys():
        expected, values = theirs.get(name, {}), ours.get(name, {})
        assert expected.keys() <= values.keys() and (expected.keys() == values.keys() or name in UNTOUCHED), (case, name)
        for key, value in values.items():
            kind = "control" if "control" in f"{name}.{key}" else name
            # With a maximum of it, the second moment begins at zero.
            begun = 0.0 if "largest" in ours else UNTOUCHED.get(name, 0.0)
            wanted = expected.get(key, torch.full_like(value, begun))
            relative, floor = DIGITS.get(kind, (2e-5, 0.01))
            apart = float((value - wanted).abs().max())
            assert apart <= relative * max(float(wanted.abs().max()), floor), (case, name, key, apart)
