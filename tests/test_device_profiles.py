"""Device profiles: built-in and configured ones, mixes, traces, and when devices are on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from every import every
from hypothesis import given
from hypothesis import strategies as st

from fedmoe_ds.config import config_of
from fedmoe_ds.devices import BUILTIN, SECOND, Availability, DeviceProfile, make_fleet, ticks
from fedmoe_ds.devices.profile import FIGURES
from fedmoe_ds.devices.trace import read_trace
from fedmoe_ds.errors import UserError


def fleet(devices: dict[str, object], clients: int = 10, seed: int = 0, names: tuple[str, ...] = ()):  # type: ignore[no-untyped-def]
    return make_fleet(config_of({"devices": devices}).devices, clients, names, seed)


def test_there_are_none_unless_they_are_asked_for() -> None:
    assert fleet({}) is None and fleet({"availability": "always"}) is None


def test_builtin_profiles_are_within_reason() -> None:
    """From phones to edge boxes: faster ones cost less energy per operation, phones more than cables per byte."""
    assert every(profile.name == name for name, profile in BUILTIN.items())
    assert every(getattr(profile, figure) > 0 for profile in BUILTIN.values() for figure in FIGURES)
    assert every(1 < profile.flops_per_s * profile.joules_per_flop < 200 for profile in BUILTIN.values()), "watts"
    assert BUILTIN["phone-mid"].joules_per_byte_sent > BUILTIN["edge-small"].joules_per_byte_sent
    assert BUILTIN["edge-large"].availability.always and not BUILTIN["phone-mid"].availability.always


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(1, 300), st.integers(0, 5))
def test_a_mix_is_dealt_as_its_shares_say(shares: list[int], clients: int, seed: int) -> None:
    names = list(BUILTIN)[: len(shares)]
    found = fleet({"mix": {name: float(share) for name, share in zip(names, shares, strict=True)}}, clients, seed)
    counts = [found.counts().get(name, 0) for name in names]
    assert sum(counts) == clients == len(found)
    assert every(abs(count - share / sum(shares) * clients) < 1 for count, share in zip(counts, shares, strict=True))
    again = fleet({"mix": {name: float(share) for name, share in zip(names, shares, strict=True)}}, clients, seed)
    assert np.array_equal(found.kind_N, again.kind_N) and np.array_equal(found.shift_N, again.shift_N)


def test_seeds_deal_other_devices() -> None:
    mix = {"mix": {"phone-mid": 1.0, "laptop": 1.0}}
    assert not np.array_equal(fleet(mix, 50, 0).kind_N, fleet(mix, 50, 1).kind_N)


def test_profiles_of_ones_own() -> None:
    mine = {
        "mix": {"mine": 1.0},
        "profiles": {"mine": {"like": "laptop", "flops_per_s": 1e9, "on": [[0, 10], [20, 30]], "period_s": 40}},
    }
    profile = fleet(mine)[3].profile
    assert profile.name == "mine" and profile.flops_per_s == 1e9
    assert profile.up_bytes_per_s == BUILTIN["laptop"].up_bytes_per_s
    assert profile.availability == Availability(40 * SECOND, (0, 20 * SECOND), (10 * SECOND, 30 * SECOND))
    assert fleet({**mine, "availability": "always"}).always_on and not fleet(mine).always_on


spans = st.lists(st.integers(0, 50), min_size=2, max_size=10, unique=True).map(sorted).filter(lambda cuts: len(cuts) % 2 == 0)


@given(spans, st.integers(0, 200), st.integers(0, 60))
def test_availability_is_what_its_intervals_say(cuts: list[int], time: int, extra: int) -> None:
    """Against a plain list of seconds."""
    on = list(zip(cuts[::2], cuts[1::2], strict=True))
    period = max(cuts) + extra
    found = Availability.of([list(interval) for interval in on], period)
    alive = [any(begin <= second % period < end for begin, end in on) for second in range(6 * period)]
    if all(alive):
        assert found.always
        return
    until = found.until(time % period * SECOND)
    place = time % period
    assert (until is not None) == alive[place]
    if until is not None:
        assert until == next(second for second in range(place, 6 * period) if not alive[second]) * SECOND
    assert found.next(place * SECOND) == next(second for second in range(place, 6 * period) if alive[second]) * SECOND


def test_ticks_are_rounded_up() -> None:
    assert (ticks(0.0), ticks(1e-12), ticks(1.5)) == (0, 1, 1_500_000_000)


CSV = "name,like,flops_per_s,on,period_s\nbox,edge-small,1e9,0:10 20:30,40\nother,laptop,,,\n"


def test_traces_of_both_kinds_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(CSV)
    rows = [
        {"name": "box", "like": "edge-small", "flops_per_s": 1e9, "on": [[0, 10], [20, 30]], "period_s": 40},
        {"name": "other", "like": "laptop"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two = read_trace(tmp_path / "a.csv"), read_trace(tmp_path / "a.jsonl")
    assert one.profiles == two.profiles and one.digest != two.digest
    assert one.profiles[1] == DeviceProfile(**{**vars(BUILTIN["laptop"]), "name": "other"})
    dealt = fleet({"trace": str(tmp_path / "a.csv")}, 7)
    assert sum(dealt.counts().values()) == 7 and abs(dealt.counts()["box"] - 3.5) < 1 and dealt.digest == one.digest


def test_rows_may_name_their_clients(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("client,like\nb,laptop\na,phone-mid\n")
    found = fleet({"trace": str(tmp_path / "a.csv")}, 2, names=("a", "b"))
    assert [device.profile.name for device in found] == ["phone-mid", "laptop"]
    with pytest.raises(UserError, match="no row names client 'c'"):
        fleet({"trace": str(tmp_path / "a.csv")}, 2, names=("a", "c"))


WRONG = {
    "a.txt": ("like\nlaptop\n", r"ends in \.csv or \.jsonl"),
    "b.csv": ("", "holds no device"),
    "c.csv": ("lik\nlaptop\n", "line 2: lik: unknown key; did you mean 'like'"),
    "d.csv": ("like,flops_per_s\nlaptop,fast\n", "line 2: flops_per_s: fast: expected a number"),
    "e.csv": ("like,flops_per_s\nlaptop,nan\n", "line 2: flops_per_s"),
    "f.csv": ("like,flops_per_s\nlaptop,0\n", r"line 2: flops_per_s: 0\.0: expected number >= 1"),
    "g.csv": ("flops_per_s\n1e9\n", "line 2: memory_bytes: missing"),
    "h.csv": ("like\ntablet\n", "line 2: like: tablet: there is no such built-in profile"),
    "i.csv": ("like,on\nlaptop,10-20\n", "line 2: on: 10-20: expected from:to"),
    "j.csv": ("like,on\nlaptop,20:10\n", "line 2: on: .* expected .from, to."),
    "k.csv": ("like,on\nlaptop,0:20 10:30\n", "line 2: on: .* begins before"),
    "l.csv": ("like\nlaptop,1\n", "line 2: 2 fields, and there are 1 columns"),
    "m.csv": ("like,like\nlaptop,laptop\n", "line 1: names a column twice"),
    "n.csv": ('like\n"laptop\n', "line 2: not valid CSV"),
    "o.csv": ("like,client\nlaptop,a\nlaptop,a\n", "line 3: client: a: line 2 has it already"),
    "p.csv": ("like,client\nlaptop,a\nlaptop,\n", "line 3: client: missing"),
    "q.csv": ("like,client\nlaptop,\nlaptop,a\n", "line 3: client: rows above have none"),
    "r.jsonl": ("[1]\n", "line 1: expected one JSON object"),
    "s.jsonl": ('\n{"like": "laptop", "flops_per_s": "9"}\n', "line 2: flops_per_s"),
    "t.jsonl": ('{"like": NaN}\n', "line 1: not valid JSON"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_trace_is_one_line(name: str, tmp_path: Path) -> None:
    text, message = WRONG[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_trace(tmp_path / name)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("devices.trace: ")


def test_wrong_sections() -> None:
    for devices, message in (
        ({"mix": {"tablet": 1.0}}, "devices.mix.tablet: there is no such profile"),
        ({"mix": {"laptop": 0.0}}, "laptop: 0.0: expected a share above 0"),
        ({"mix": {"laptop": 1.0}, "trace": "a.csv"}, "given by mix already"),
        ({"trace": "absent.csv"}, "absent.csv: cannot be read"),
        ({"mix": {"mine": 1.0}, "profiles": {"mine": {"flops_per_s": 1e9}}}, "devices.profiles.mine.memory_bytes: missing"),
        ({"mix": {"mine": 1.0}, "profiles": {"mine": {"like": "tablet"}}}, "mine.like: tablet: there is no such built-in"),
    ):
        with pytest.raises(UserError, match=message):
            fleet(devices)
