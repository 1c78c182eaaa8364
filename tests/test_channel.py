"""The radio channel against its definitions: bisection, derivatives by differences, moments of the draws."""

from __future__ import annotations

import math

import numpy as np
from every import every
from hypothesis import given
from hypothesis import strategies as st

from fedmoe_ds.devices.channel import Band, computing_joules, distances, fading, path_gain, watts

BAND = Band(1e6, watts(-174.0))
BITS, SECONDS, GAIN = st.floats(1e3, 1e7), st.floats(0.5, 100.0), st.floats(1e-14, 1e-8)


def test_decibels() -> None:
    assert watts(30.0) == 1.0 and math.isclose(watts(-174.0), 3.981071705534973e-21, rel_tol=1e-12)
    assert math.isclose(BAND.noise, 3.981071705534973e-15, rel_tol=1e-12)
    # 128.1 dB at a kilometre, 37.6 dB more at ten.
    assert np.allclose(-10.0 * np.log10(path_gain(np.array([1e3, 1e4]))), [128.1, 165.7], rtol=1e-12)


@given(BITS, SECONDS, GAIN)
def test_the_least_power_is_what_bisection_finds(bits: float, seconds: float, gain: float) -> None:
    power = float(BAND.least_power(bits, seconds, gain))
    low, high = 0.0, 2.0 * power
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if BAND.rate(middle, gain) * seconds >= bits else (middle, high)
    assert math.isclose(power, high, rel_tol=1e-9)
    assert math.isclose(float(BAND.rate(power, gain)) * seconds, bits, rel_tol=1e-9)


@given(BITS, SECONDS, GAIN, st.floats(1.01, 10.0))
def test_more_power_than_the_least_costs_more_energy(bits: float, seconds: float, gain: float, factor: float) -> None:
    powers = float(BAND.least_power(bits, seconds, gain)) * np.array([1.0, factor])
    energies = powers * bits / BAND.rate(powers, gain)
    assert energies[1] >= energies[0] * (1 - 1e-9)


def test_without_time_no_power_is_enough() -> None:
    assert np.isposinf(BAND.least_power(1e6, np.array([0.0, -1.0]), 1e-10)).all()
    # Beyond what float64 holds.
    assert np.isposinf(BAND.least_power(1e12, 1.0, 1e-10))


def test_energy_of_computing() -> None:
    assert math.isclose(float(computing_joules(2e9, 1e9, 1e-28)), 0.2)


def test_a_channel_is_its_clients_and_its_rounds() -> None:
    alone, among = fading(7, 3, [5]), fading(7, 3, [1, 5, 9])
    assert among[1] == alone[0] and len(set(among.tolist())) == 3
    assert every(fading(*address, [5])[0] != alone[0] for address in [(8, 3), (7, 4)])
    assert distances(7, [5], 500.0) == distances(7, [1, 5], 500.0)[1] != distances(8, [5], 500.0)


def test_fading_is_rayleigh_and_clients_fill_the_disc() -> None:
    draws = fading(1, 1, range(4000))
    # Of Exp(1): mean 1 with variance 1, second moment 2 with variance 20.
    assert abs(draws.mean() - 1) < 5 / math.sqrt(4000) and abs((draws**2).mean() - 2) < 5 * math.sqrt(20 / 4000)
    metres = distances(1, range(4000), 500.0)
    # Half of the area is within radius / sqrt(2).
    assert (
        metres.max() <= 500
        and metres.min() >= 10
        and abs((metres < 500 / math.sqrt(2)).mean() - 0.5) < 5 * 0.5 / math.sqrt(4000)
    )
