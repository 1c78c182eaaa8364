"""Channel: a fading radio channel, what power a transmission needs in it, and the energy of computing and of sending.

Textbook models, numpy alone. Legend: N clients.

    fading     h = g |z|^2, z circular complex normal, so that |z|^2 ~ Exp(1): Rayleigh, one draw per (seed, round, client)
    path loss  g = 10^-(128.1 + 37.6 log10 d) / 10, d in km (3GPP TR 36.814, urban macro cell at 2 GHz)
    rate       r = B log2(1 + p h / (B N0))                                                       (Shannon)
    least power for S bits in t seconds   p = (B N0 / h) (2^(S / (B t)) - 1)                      (the rate's inverse)
    energy     sending p t,   computing kappa c f^2                                               (CMOS: c cycles at f Hz)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmoe_ds.randomness import generator

Floats = NDArray[np.float64]

NEAREST = 10.0
"""Metres: nobody stands nearer to the base station, where the path loss is no longer one of far fields."""


def fading(seed: int, round_index: int, clients: Iterable[int]) -> Floats:
    """|z|^2 of these clients in this round, float64 [N]: mean 1. The amplitude of a Rayleigh channel is its square root."""
    # By the client's own index: who else is drawn changes nobody's channel.
    return np.array([generator(seed, "fading", round_index, client).standard_exponential() for client in clients])


def distances(seed: int, clients: Iterable[int], radius: float) -> Floats:
    """Metres between these clients and the base station, float64 [N]: evenly spread over a disc, the same in every round."""
    share = np.array([generator(seed, "distance", client).random() for client in clients])
    # The square root: area grows with the square of the distance.
    return np.maximum(radius * np.sqrt(share), NEAREST)


def path_gain(metres: Floats) -> Floats:
    """The share of the power that arrives, without fading."""
    loss_db = 128.1 + 37.6 * np.log10(metres / 1000.0)
    gain: Floats = 10.0 ** (-loss_db / 10.0)
    return gain


def watts(dbm: float) -> float:
    """A power in dBm as watts; of a spectral density in dBm/Hz, watts per Hz."""
    return float(10.0 ** ((dbm - 30.0) / 10.0))


@dataclass(frozen=True)
class Band:
    """One client's part of the spectrum.

    Attributes:
        hertz: its width B.
        noise_density: N0, watts per Hz.
    """

    hertz: float
    noise_density: float

    @property
    def noise(self) -> float:
        """The noise power in the band, watts."""
        return self.hertz * self.noise_density

    def rate(self, power: Floats | float, gain: Floats | float) -> Floats:
        """Bits per second."""
        return np.asarray(self.hertz * np.log1p(np.asarray(power * gain / self.noise)) / math.log(2.0), np.float64)

    def least_power(self, bits: Floats | float, seconds: Floats | float, gain: Floats | float) -> Floats:
        """Watts that bring these bits through in these seconds; infinite where no time is left.

        The energy p t grows with p for given bits, so the least power that meets a deadline is also the cheapest.
        """
        left = np.asarray(seconds, np.float64)
        # Where the exponent is beyond float64 the power is, too, and no device has it: infinity says so.
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            exponent = math.log(2.0) * np.asarray(bits) / (self.hertz * left)
            return np.where(left > 0.0, self.noise / gain * np.expm1(exponent), np.inf)


def computing_joules(cycles: Floats | float, hertz: float, capacitance: float) -> Floats:
    """Energy of so many cycles at this clock; `capacitance` is kappa, the effective switched capacitance."""
    return np.asarray(capacitance * np.asarray(cycles) * hertz * hertz, np.float64)
