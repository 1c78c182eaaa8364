"""Private: any method with a plain mean, its clients' changes clipped and noise on their sum (DP-FedAvg).

Legend: L layers, E experts.

READ (McMahan, Ramage, Talwar, Zhang; arXiv 1710.06963, flat clipping). COMPLETION: a fixed number n of clients is drawn, where
the paper tosses a coin for each, so that the size of a round is known:

    Delta_i = x_i - received_i  over all that client i sends;    Delta_i <- Delta_i min(1, C / ||Delta_i||_2)
    x <- x + (1 / n) sum_i Delta_i + N(0, (z C / n)^2)  per element

n is the number of clients that a round draws, whoever of them comes back: a denominator that depended on data would tell of
them. All clients weigh the same, however much data they have. The noise follows from the seed, a secret (`privacy.key_file`),
the round, and a tensor's own name, with layer and global expert, so no bit depends on the topology. Who is drawn follows from
seed, secret and round, as the account is that of clients of whom nobody can know whether they took part. The server is trusted:
it sees the updates. What the noise protects is the adapters; the record of the run is about clients by name.
"""

from __future__ import annotations

import hashlib
import math
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedmoe_ds.aggregation.weighing import MEAN, Weighing
from fedmoe_ds.clients.client_view import ClientView
from fedmoe_ds.clients.update import ClientUpdate
from fedmoe_ds.config import Config
from fedmoe_ds.config.privacy_section import PrivacyConfig
from fedmoe_ds.errors import UserError
from fedmoe_ds.methods.base import Method
from fedmoe_ds.methods.round_plan import MeanContext, TensorRule
from fedmoe_ds.model.adapter_bank import BlockSpec
from fedmoe_ds.randomness import generator

SQUARES = "private:"
"""What names of measures begin with that are sums of squares of a block's change."""
KEY = "privacy.key_file"
"""What a run's identity calls the digest of the secret."""
LEAST_SECRET = 32
_TELLS = {
    "weights": "its weights follow from clients' data",
    "weightings": "its weights follow from clients' data",
    "element_weights": "its weights follow from clients' data",
    "memory": "clients tell the server more than their changes",
    "statistics": "clients tell the server more than their changes",
    "renew": "the server makes something of how clients' tokens are routed",
    "plan": "its rounds are planned by what clients have told, or have data",
    "after_mean": "it changes the mean by a rule of its own",
    "server_rate": "its server's rate follows from who takes part",
}
"""What a method may override that noise on a sum of changes does not cover."""


class Private(Method):
    """What is laid over a method's own class."""

    privacy: ClassVar[PrivacyConfig]
    weighing = Weighing(changes=True)

    def measure(self, view: ClientView) -> dict[str, Tensor]:
        """Sums of squares of what the client sends, per (layer, expert) or layer, beside what the method measures itself."""
        found = super().measure(view)
        for spec in view.blocks():
            if not spec.personal:
                change = view.value(spec).double() - view.received(spec).double()
                found[SQUARES + spec.name] = change.square().flatten(2 if spec.expert else 1).sum(-1)
        return found

    def weights(self, spec: BlockSpec, update: ClientUpdate, data_share: float) -> np.ndarray:
        norm, clip = change_norm(update), self.privacy.clip
        assert norm is not None and clip is not None
        shape = update.counts_LE.shape if spec.expert else (len(spec.layers),)
        # A norm of zero is below any bound.
        return np.full(shape, (clip / norm if norm > clip else 1.0) / self.facts.participants)

    def after_mean(self, context: MeanContext) -> TensorRule | None:
        privacy = self.privacy
        assert privacy.clip is not None
        deviation = privacy.noise_multiplier * privacy.clip / self.facts.participants
        if deviation == 0.0:
            return None

        def noisy(key: str, mean: Tensor) -> Tensor:
            draw = generator(self.facts.seed, "privacy", self.secret, context.round, key)
            noise = torch.from_numpy(draw.standard_normal(tuple(mean.shape)))
            return (mean.double() + deviation * noise.to(mean.device)).float()

        return noisy

    @cached_property
    def secret(self) -> str:
        """What draws are addressed by; nothing where there is no file. Read when it is needed: whoever only opens a finished
        run need not have it."""
        return "" if self.privacy.key_file is None else secret(self.privacy.key_file).hex()


def private(method: Method, config: Config) -> Method:
    """The method under `config.privacy`.

    Raises:
        UserError: noise on a sum of clipped changes would not cover what it does, or its account does not hold.
    """
    name, privacy = config.method.name, config.privacy
    where = f"privacy.clip: {privacy.clip}"
    reasons = [why for hook, why in _TELLS.items() if method.overrides(hook)]
    reasons += ["it collects clients' factors"] * method.collects
    reasons += ["its weights are those of changes"] * (method.weighing != MEAN)
    reasons += ["nothing is averaged"] * (not method.averages or method.pooled)
    if reasons:
        raise UserError(f"{where}: method {name} cannot be private: {reasons[0]}; use fedit, ffa-lora, fedsa-lora or fft-moe")
    if config.local.drift not in ("none", "fedprox"):
        raise UserError(
            f"{where}: local.drift={config.local.drift} sends clients' variables as well, without noise; use none or fedprox"
        )
    if config.federation.participation < 1.0 and config.federation.sampling != "uniform":
        raise UserError(
            f"{where}: federation.sampling={config.federation.sampling} draws some clients more often, and the account is one "
            "of equal chances; use uniform"
        )
    if config.devices.simulated:
        raise UserError(f"{where}: on simulated devices availability decides who takes part; drop devices, or privacy")
    return _laid_over(type(method), privacy)(method.params)  # type: ignore[arg-type]


@cache
def _laid_over(kind: type[Method], privacy: PrivacyConfig) -> type[Method]:
    """The class of a private method; one class for equal settings, so that two objects of it are of one type."""
    return type(f"Private{kind.__name__}", (Private, kind), {"privacy": privacy})


def drawn_by(method: Method) -> str:
    """The secret that a run's participants are drawn by; nothing where the seed alone decides."""
    return method.secret if isinstance(method, Private) else ""


def change_norm(update: ClientUpdate) -> float | None:
    """The L2 norm of a client's change over all that it sends; None of a run without privacy."""
    squares = [math.fsum(np.ravel(value)) for name, value in update.measured.items() if name.startswith(SQUARES)]
    return math.sqrt(math.fsum(squares)) if squares else None


def secret(key_file: str) -> bytes:
    """The bytes of a key file. Raises UserError where it cannot be read, or is too short to be one."""
    try:
        found = Path(key_file).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"privacy.key_file: {key_file}: {error.strerror or error}; give a file that all hosts read") from None
    if len(found) < LEAST_SECRET:
        raise UserError(
            f"privacy.key_file: {key_file}: {len(found)} bytes; give {LEAST_SECRET} or more random ones, for example "
            f"`head -c {LEAST_SECRET} /dev/urandom > {key_file}`"
        )
    return found


def key_digest(privacy: PrivacyConfig) -> dict[str, Any]:
    """What of the key belongs to a run's identity: nothing where there is none."""
    if privacy.key_file is None:
        return {}
    # A hash with a name of its own: it is written down, and must not be what noise is drawn by.
    return {KEY: hashlib.sha256(b"identity:" + secret(privacy.key_file)).hexdigest()}
