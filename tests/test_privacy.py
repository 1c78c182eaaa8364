"""Privacy of clients: changes clipped and noise on their sum, beside a plain loop; who can be private; what rounds spend."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from every import every
from federations import Result, alone, build, finish, make_config, run_alone, write_inputs
from hypothesis import given
from hypothesis import settings as tried
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from scipy.stats import kstest, norm

from fedmoe_ds.aggregation.server_optimizer import ServerOptimizer
from fedmoe_ds.clients.assignment import Assignment
from fedmoe_ds.clients.client import Client
from fedmoe_ds.clients.client_view import ClientView
from fedmoe_ds.clients.update import ClientUpdate
from fedmoe_ds.config import Config
from fedmoe_ds.config.privacy_section import PrivacyConfig
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation import privacy_account
from fedmoe_ds.federation.build import Parts
from fedmoe_ds.federation.identity import of_settings
from fedmoe_ds.federation.privacy_account import account, check_at_hand, check_budget, epsilon, spent_by
from fedmoe_ds.methods import Method, MethodParams, RoundContext, method_for
from fedmoe_ds.methods.private import change_norm, key_digest, secret
from fedmoe_ds.methods.private import private as laid_over
from fedmoe_ds.methods.registry import method_names

Change = dict[str, NDArray[np.float64]]
QUICK: dict[str, Any] = {
    "federation": {"rounds": 1, "participation": 0.8},
    "local": {"max_steps": 2},
    "evaluation": {"max_sequences": 2, "client_sequences": 0},
}
WHOLE: dict[str, Any] = {"execution": {"micro_batch_size": None}}
PRIVATE = {"fedit", "ffa-lora", "fedsa-lora", "embracing-fl", "fft-moe", "mor"}
"""The methods whose mean is a plain one, of what clients send and nothing else."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("privacy")
    write_inputs(folder)
    return folder


def private(root: Path, name: str, *changes: dict[str, Any], **keys: Any) -> Config:
    return make_config(root, name, QUICK, {"method": {"name": "fedit"}}, *changes, {"privacy": keys})


class Watched:
    """Every client's change, before the sum, by canonical key."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.norms: list[float] = []

    def __call__(self, view: ClientView, update: ClientUpdate) -> str | None:
        found: Change = {}
        for spec in view.blocks():
            if not spec.personal:
                change = (view.value(spec).double() - view.received(spec).double()).numpy()
                for place in np.ndindex(*change.shape[: 2 if spec.expert else 1]):
                    found[spec.key(spec.layers[place[0]], place[1] if spec.expert else None)] = change[place]
        self.changes.append(found)
        measured = change_norm(update)
        assert measured is not None
        self.norms.append(measured)
        return None


def watched(config: Config) -> tuple[Result, Watched, dict[str, NDArray[np.float32]]]:
    parts, journal = build(config, *alone())
    before = {key: value.numpy().copy() for key, _, value in parts.state.adapters.items(parts.first_expert)}
    watch = Watched()
    return finish(parts, journal, watch), watch, before


def test_a_round_is_the_mean_of_clipped_changes(root: Path) -> None:
    free, everybody, _ = watched(private(root, "loose", clip=1e6, noise_multiplier=0.0))
    bound = float(np.median(everybody.norms))
    result, watch, before = watched(private(root, "clipped", clip=bound, noise_multiplier=0.0))
    norms = [math.sqrt(sum(float(np.square(value).sum()) for value in change.values())) for change in watch.changes]
    assert watch.norms == pytest.approx(norms, rel=1e-12) and min(norms) < bound < max(norms)
    drawn = len(norms)
    assert drawn == round(0.8 * len(result.parts.clients))
    for key, value in result.adapters.items():
        shares = [change[key] * min(1.0, bound / norm_) / drawn for change, norm_ in zip(watch.changes, norms, strict=True)]
        expected = before[key].astype(np.float64) + np.sum(shares, axis=0)
        assert np.allclose(value, expected, rtol=0, atol=1e-7), key
    # What the server does is bounded by C, whatever anybody sends.
    step = math.sqrt(sum(float(np.square(value - before[key]).sum()) for key, value in result.adapters.items()))
    assert 0 < step <= bound * (1 + 1e-5)
    rows = [event for event in result.events if event["event"] == "client"]
    assert sorted(event["change_norm"] for event in rows) == sorted(watch.norms)
    # Without a bound that binds, every client weighs the same.
    for key, value in free.adapters.items():
        mean = before[key].astype(np.float64) + np.mean([change[key] for change in everybody.changes], axis=0)
        assert np.allclose(value, mean, rtol=0, atol=1e-7), key


def draws(parts: Parts, participation: float) -> list[list[int]]:
    """Who would take part in twenty rounds of so many."""
    federation = parts.config.federation.model_copy(update={"participation": participation})
    spec = replace(parts.spec, config=parts.config.model_copy(update={"federation": federation}))
    return [[client.index for client in spec.drawn_among(parts.clients, round_index)] for round_index in range(1, 21)]


def test_noise_is_gaussian_by_key_and_name(root: Path, tmp_path: Path) -> None:
    keys = {name: tmp_path / name for name in ("first", "second")}
    for number, path in enumerate(keys.values()):
        path.write_bytes(bytes([number]) * 32)
    clip, multiplier = 0.5, 2.0
    # Of everybody: who is drawn follows from the key as well.
    all_ = {"federation": {"participation": 1.0}}
    still = run_alone(private(root, "still", all_, clip=clip, noise_multiplier=0.0))
    noise: dict[str, NDArray[np.float64]] = {}
    drawn: dict[str, list[list[int]]] = {}
    parts: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
    for name, file in (("seed", None), *((name, str(path)) for name, path in keys.items())):
        noisy = run_alone(private(root, f"noisy-{name}", all_, clip=clip, noise_multiplier=multiplier, key_file=file))
        drawn[name] = draws(noisy.parts, 0.5)
        for key, value in noisy.adapters.items():
            parts[name].append((value.astype(np.float64) - still.adapters[key]).ravel())
        noise[name] = np.concatenate(parts[name])
    # The account holds against those alone who cannot compute who took part.
    assert drawn["seed"] == draws(still.parts, 0.5) and drawn["first"] != drawn["second"] != drawn["seed"] != drawn["first"]
    deviation = multiplier * clip / len(still.parts.clients)
    for values in noise.values():
        assert kstest(values / deviation, norm.cdf).pvalue > 1e-3
    # Two keys, and two tensors of one shape, have nothing in common.
    assert abs(np.corrcoef(noise["first"], noise["second"])[0, 1]) < 0.05
    one, other = [part for part in parts["first"] if len(part) == len(parts["first"][0])][:2]
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("name", method_names())
def test_who_can_be_private(root: Path, name: str) -> None:
    """A method of which noise on a sum of changes would not tell the whole truth is refused in one line."""
    change: dict[str, Any] = {"adapters": {"router": "train"}, "method": {"name": name}}
    if name == "fft-moe":
        change = {"adapters": {"attention": [], "moe": {"experts": 4, "top_k": 2}}, "method": {"name": name}}
    if name == "mor":
        # Samples of text have no score, which the balance by degradation asks for.
        moe = {"experts": 4, "top_k": 2, "width": 1, "linear": True}
        change = {"adapters": {"attention": [], "moe": moe}, "method": {"name": name, "balance": "switch"}}
    config = make_config(root, "any", QUICK, WHOLE, change, {"privacy": {"clip": 1.0}})
    if name in PRIVATE:
        assert type(method_for(config)).__name__.startswith("Private")
        return
    with pytest.raises(UserError, match=rf"^privacy\.clip: 1\.0: method {name} cannot be private: .+; use fedit, "):
        method_for(config)


def test_a_rate_by_who_takes_part_is_refused(root: Path) -> None:
    class Rated(Method):
        def server_rate(self, round_index: int, participants: Sequence[Client]) -> float:
            return 1.0 / sum(client.samples for client in participants)

    with pytest.raises(
        UserError, match=r"^privacy\.clip: 1\.0: method fedit cannot be private: its server's rate follows from"
    ):
        laid_over(Rated(MethodParams()), private(root, "rated", clip=1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"local": {"drift": "scaffold", "optimizer": "sgd"}}, "local.drift=scaffold sends clients' variables"),
        ({"local": {"drift": "feddyn", "proximal": 0.1}}, "local.drift=feddyn sends clients' variables"),
        ({"federation": {"sampling": "size"}}, "federation.sampling=size draws some clients more often"),
        ({"devices": {"mix": {"laptop": 1.0}}}, "availability decides who takes part"),
    ],
)
def test_what_the_account_does_not_cover_is_refused(root: Path, change: dict[str, Any], message: str) -> None:
    config = private(root, "refused", change, clip=1.0)
    with pytest.raises(UserError, match=rf"^privacy\.clip: 1\.0: .*{message}"):
        method_for(config)


def test_targets_of_all_clients_tokens_are_refused(root: Path) -> None:
    adapters = {"attention": [], "moe": {"experts": 4, "top_k": 2}}
    method = {"name": "fft-moe", "auxiliary": "global"}
    config = make_config(root, "global", QUICK, WHOLE, {"adapters": adapters, "method": method}, {"privacy": {"clip": 1.0}})
    with pytest.raises(UserError, match=r"^method\.auxiliary: global: its targets are counts of all clients' tokens"):
        method_for(config)


def test_the_account_belongs_to_no_identity_and_the_key_does(root: Path, tmp_path: Path) -> None:
    def known(**keys: Any) -> dict[str, Any]:
        config = private(root, "identity", clip=1.0, **keys)
        tree = of_settings(json.loads(config.model_dump_json()))
        return tree | key_digest(config.privacy)

    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(bytes(32))
    second.write_bytes(bytes(33))
    assert known() == known(epsilon=1e9) == known(delta=1e-3)
    assert known() != known(noise_multiplier=0.5) and known() != known(key_file=str(first)) != known(key_file=str(second))
    (tmp_path / "copy").write_bytes(bytes(32))
    assert known(key_file=str(first)) == known(key_file=str(tmp_path / "copy"))
    assert bytes(32).hex() not in json.dumps(known(key_file=str(first)))


def test_a_key_without_effect_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"privacy\.noise_multiplier: 2\.0: has no effect without privacy\.clip"):
        PrivacyConfig(noise_multiplier=2.0)


def test_a_key_file_is_long_enough_and_there(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"1234")
    with pytest.raises(UserError, match=r"^privacy\.key_file: .*short: 4 bytes; give 32 or more random ones"):
        secret(str(tmp_path / "short"))
    with pytest.raises(UserError, match=r"^privacy\.key_file: .*none: No such file or directory; give a file"):
        secret(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"^privacy\.key_file: .*none: No such file"):
        check_at_hand(PrivacyConfig(clip=1.0, key_file=str(tmp_path / "none")))


def test_a_missing_secret_is_told_before_anything_is_loaded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmoe_ds.federation.build.load_shared_foundation", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match=r"^privacy\.key_file: .*none: No such file"):
        build(private(root, "no-secret", clip=1.0, key_file=str(root / "none")), *alone())


def settings(**keys: Any) -> Config:
    federation = {"rounds": keys.pop("rounds", 10), "participation": keys.pop("participation", 0.1)}
    return Config.model_validate({"federation": federation, "privacy": {"clip": 1.0, **keys}})


@given(st.floats(0.5, 20), st.integers(1, 50), st.floats(1e-8, 1e-2))
def test_of_everybody_the_account_is_gaussian_noise(multiplier: float, rounds: int, delta: float) -> None:
    """Without sampling the exact epsilon is known (Balle & Wang, arXiv 1805.06530): the account is no smaller, and near it."""
    config = settings(noise_multiplier=multiplier, participation=1.0, delta=delta)
    spent = epsilon(config, 20, rounds)
    # So many rounds are one, of a sum that moves by 2 / z times the root of their number.
    mu = 2 * math.sqrt(rounds) / multiplier

    def exact(value: float) -> float:
        return float(norm.cdf(mu / 2 - value / mu) - math.exp(value) * norm.cdf(-mu / 2 - value / mu)) if value < 600 else 0.0

    assert exact(spent) <= delta
    # Orders of a table end at 1.25 and 128: between them, and of little noise, a bound by Renyi divergences is a third off.
    assert spent > 50 or exact(0.5 * spent) > delta


@tried(max_examples=25)
@given(st.integers(1, 40), st.integers(2, 500))
def test_the_account_grows_with_rounds_and_falls_with_noise_and_sampling(rounds: int, clients: int) -> None:
    spent = epsilon(settings(), clients, rounds)
    assert 0 < spent <= epsilon(settings(), clients, rounds + 1)
    assert (
        epsilon(settings(noise_multiplier=3.0), clients, rounds)
        <= spent
        <= epsilon(settings(participation=1.0), clients, rounds)
    )


def test_what_is_said_and_recorded(root: Path) -> None:
    config = private(root, "recorded", {"federation": {"rounds": 2}}, clip=0.1, noise_multiplier=1.0, delta=1e-2)
    result = run_alone(config)
    clients = len(result.parts.clients)
    spent = [event["epsilon"] for event in result.events if event["event"] == "round"]
    assert spent == [epsilon(config, clients, rounds) for rounds in (1, 2)] and spent[0] < spent[1]
    assert f"epsilon {spent[1]:.3g} at delta 0.01 after 2 rounds" in account(config, clients)
    assert "noise by the seed: who has it can take the noise out" in account(config, clients)
    plain = make_config(root, "plain", QUICK)
    assert account(plain, clients) == "" and spent_by(plain, clients, 1) == {}
    without_noise = private(root, "clipped-alone", clip=0.1, noise_multiplier=0.0)
    assert "epsilon inf" in account(without_noise, clients) and spent_by(without_noise, clients, 1) == {}


def test_a_budget_is_kept_before_anything_is_spent(root: Path) -> None:
    check_budget(settings(epsilon=100.0), 50)
    config = settings(epsilon=12.0, rounds=100)
    most = max(rounds for rounds in range(1, 101) if epsilon(config, 50, rounds) <= 12.0)
    with pytest.raises(UserError, match=rf"^privacy\.epsilon: 12: 100 rounds of 5 out of 50 .* use at most {most} rounds, or"):
        check_budget(config, 50)
    with pytest.raises(UserError, match=r"use a larger noise_multiplier$"):
        check_budget(settings(epsilon=0.01), 50)
    with pytest.raises(UserError, match=r"^privacy\.epsilon: 0\.5: 1 rounds of"):
        build(private(root, "too-much", clip=1.0, epsilon=0.5), *alone())


def test_without_its_library_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, *rest: Any) -> Any:
        raise ImportError(name)

    privacy_account._epsilon.cache_clear()
    monkeypatch.setattr("builtins.__import__", missing)
    with pytest.raises(UserError, match=r"pip install 'fedmoe-ds\[privacy\]'"):
        privacy_account._library()


def test_no_other_client_hears_of_tokens(root: Path) -> None:
    seen: list[bool] = []

    parts, journal = build(private(root, "hears", {"federation": {"rounds": 2}}, clip=1.0), *alone())
    plain = parts.spec.method.assign

    def assign(client: Client, context: RoundContext) -> Assignment:
        seen.append(context.utilisation_LE is None)
        return plain(client, context)

    parts.spec.method.assign = assign  # type: ignore[method-assign]
    finish(parts, journal)
    assert every(seen) and parts.state.utilisation_LE is not None


def test_a_servers_optimizer_steps_along_what_is_private(root: Path) -> None:
    config = private(root, "adam", {"server": {"optimizer": "fedadam", "lr": 0.01}}, clip=0.1)
    result = run_alone(config)
    assert isinstance(result.parts.server.optimizer, ServerOptimizer)
    assert result.digest != run_alone(private(root, "no-adam", clip=0.1)).digest
