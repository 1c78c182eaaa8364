"""Privacy account: what a number of rounds spends, (epsilon, delta) for whole clients.

Rounds draw a fixed number of clients without replacement. The account is Renyi differential privacy of that (Wang, Balle,
Kasiviswanathan; arXiv 1808.00087, theorem 27), by the library dp-accounting; it holds when one client is replaced by any other.
A sum of changes of norm at most C moves by at most 2 C then, so to the account noise of z C is a multiplier of z / 2.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from fedmoe_ds.config import Config
from fedmoe_ds.config.privacy_section import PrivacyConfig
from fedmoe_ds.errors import UserError
from fedmoe_ds.federation.sampling import participant_count
from fedmoe_ds.methods.private import key_digest

ORDERS = (1.25, 1.5, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128)
"""Of Renyi divergences. The bound holds with any of them; more would be slower and hardly tighter."""


def epsilon(config: Config, clients: int, rounds: int) -> float:
    """What so many rounds of a federation of `clients` have spent; infinite without noise.

    Raises:
        UserError: dp-accounting is not installed.
    """
    privacy = config.privacy
    if rounds == 0:
        return 0.0
    if privacy.noise_multiplier == 0:
        return float("inf")
    drawn = participant_count(clients, config.federation.participation)
    return _epsilon(clients, drawn, privacy.noise_multiplier, rounds, privacy.delta)


def spent_by(config: Config, clients: int, round_index: int) -> dict[str, float]:
    """What the record of a round says; nothing where nothing is private, or no noise makes it so."""
    if config.privacy.clip is None or config.privacy.noise_multiplier == 0:
        return {}
    return {"epsilon": epsilon(config, clients, round_index)}


@cache
def _epsilon(clients: int, drawn: int, noise_multiplier: float, rounds: int, delta: float) -> float:
    accounting, rdp = _library()
    accountant = rdp.RdpAccountant(list(ORDERS), accounting.NeighboringRelation.REPLACE_ONE)
    noise = accounting.GaussianDpEvent(noise_multiplier / 2)
    a_round = accounting.SampledWithoutReplacementDpEvent(clients, drawn, noise)
    accountant.compose(accounting.SelfComposedDpEvent(a_round, rounds))
    return float(accountant.get_epsilon(delta))


def _library() -> tuple[Any, Any]:
    try:
        import dp_accounting
        from dp_accounting import rdp
    except ImportError:
        raise UserError(
            "privacy.clip: its account needs the package dp-accounting; run `pip install 'fedmoe-ds[privacy]'`"
        ) from None
    return dp_accounting, rdp


def check_at_hand(privacy: PrivacyConfig) -> None:
    """Raise UserError where this machine lacks the library of the account, or the secret that noise follows from."""
    key_digest(privacy)
    if privacy.clip is not None and privacy.noise_multiplier > 0:
        _library()


def check_budget(config: Config, clients: int) -> None:
    """Raise UserError where the rounds of the configuration spend more than it allows."""
    privacy, rounds = config.privacy, config.federation.rounds
    if privacy.clip is None:
        return
    spent = epsilon(config, clients, rounds)
    if privacy.epsilon is None or spent <= privacy.epsilon:
        return
    low, high = 0, rounds
    # What is spent grows with the rounds.
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if epsilon(config, clients, middle) <= privacy.epsilon else (low, middle)
    most = f"use at most {low} rounds, or a larger noise_multiplier" if low else "use a larger noise_multiplier"
    drawn = participant_count(clients, config.federation.participation)
    raise UserError(
        f"privacy.epsilon: {privacy.epsilon:g}: {rounds} rounds of {drawn} out of {clients} clients spend {spent:.3g} at delta "
        f"{privacy.delta:g}; {most}"
    )


def account(config: Config, clients: int) -> str:
    """What a start says of it; nothing where nothing is private."""
    privacy = config.privacy
    if privacy.clip is None:
        return ""
    spent = epsilon(config, clients, config.federation.rounds)
    # Whoever has the record has the seed, and with it the noise.
    drawn = " (noise by the seed: who has it can take the noise out)" if privacy.key_file is None else ""
    return (
        f"; private: changes of norm {privacy.clip:g} at most, noise {privacy.noise_multiplier:g} times that on their sum"
        f"{drawn}, epsilon {spent:.3g} at delta {privacy.delta:g} after {config.federation.rounds} rounds"
    )
