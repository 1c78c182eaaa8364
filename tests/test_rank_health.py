"""What the watchdog says about ranks that are silent, dead or waited for; who is blamed, and who is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from fedmoe_ds.distributed.activity import Activity
from fedmoe_ds.distributed.watchdog.rank_health import Limits, Peer, Process, _started, died, silence_message, silent, stuck

LIMITS = Limits(silence=10.0, waiting=30.0, ranks=4)


def peer(rank: int, waiting: str | None = None, for_s: float = 0.0, quiet_s: float = 0.0) -> Peer:
    found = Peer(rank, f"node{rank // 2}")
    found.hear({"round": 3, "phase": "train", "waiting": waiting, "for_s": for_s})
    found.heard = time.monotonic() - quiet_s
    return found


def test_a_rank_that_speaks_is_left_alone() -> None:
    peers = [peer(0), peer(1, "all_reduce over shard 0", 29.0), peer(2, quiet_s=9.0)]
    assert not silent(peers, LIMITS) and stuck(peers, LIMITS) is None


def test_silence_names_rank_host_round_phase_and_collective() -> None:
    peers = [peer(1), peer(2, "all_to_all over cluster 1", 1.0, quiet_s=11.0), peer(3, quiet_s=12.0)]
    found = silent(peers, LIMITS)
    assert [p.rank for p in found] == [2, 3]
    words = silence_message(found, LIMITS)
    assert words.startswith("rank 2 on node1 has been silent for 11 s")
    assert "round 3, train, waiting in all_to_all over cluster 1" in words and "1 more: rank 3 on node1" in words
    assert "topology.silence_s is 10" in words and words.endswith("--resume auto") and "\n" not in words


def test_a_rank_that_said_goodbye_is_not_missed() -> None:
    gone = peer(2, "all_reduce over shard 0", 99.0, quiet_s=99.0)
    gone.left = True
    assert not silent([gone], LIMITS) and stuck([gone], LIMITS) is None


def test_who_is_not_in_the_collective_is_blamed() -> None:
    peers = [peer(0, "gather over the world", 31.0), peer(1, None, 45.0), peer(2, "gather over the world", 31.0)]
    words = stuck(peers, LIMITS)
    assert words is not None and words.startswith(
        "rank 0 on node0 has waited for 31 s in gather over the world (round 3, train;"
    )
    assert "not in it: rank 1 on node0 (round 3, train, computing for 45 s)" in words and "rank 2" not in words


def test_when_all_are_in_it_the_network_is_blamed() -> None:
    peers = [peer(rank, "all_reduce over shard 0", 31.0) for rank in range(3)]
    assert "all ranks are in it: the network" in (stuck(peers, LIMITS) or "")


def test_time_since_the_last_sign_of_life_counts_as_waiting() -> None:
    assert stuck([peer(0, "sum over the world", 22.0, quiet_s=9.0), peer(1)], LIMITS) is not None


def test_death_is_told_with_the_last_known_place() -> None:
    assert died(peer(3)).startswith("rank 3 on node1 died (last heard in round 3, train, computing)")


def test_large_worlds_speak_less_often() -> None:
    beats = [Limits(60.0, 1800.0, ranks).beat for ranks in (2, 64, 1024, 4096)]
    assert beats == sorted(beats) and 4096 / beats[-1] <= 400 and beats[-1] < 60.0 / 4
    assert Limits(2.0, 1800.0, 4096).beat < 1.0


def test_only_a_process_of_this_host_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        try:
            own = Process.own()
            started = _started(child.pid)
            assert started >= own.started
            Process(child.pid, "another boot pid:[1]", started).kill_here()
            Process(child.pid, own.space, started - 1).kill_here()  # another process had this number before
            os.kill(child.pid, signal.SIGSTOP)
            assert child.poll() is None
            Process(child.pid, own.space, started).kill_here()
            assert child.wait(timeout=10) == -signal.SIGKILL
        finally:
            child.kill()


def test_activity_names_the_outermost_collective_and_counts_it() -> None:
    activity = Activity()
    activity.enter("train", 4)
    with activity.collective("gather", "the world", 5), activity.collective("all_reduce", "shard 0", 7):
        assert activity.state()["waiting"] == "gather over the world"
    assert activity.state()["waiting"] is None and activity.failed is None
    assert {name: (t["calls"], t["bytes"]) for name, t in activity.take().items()} == {"gather": (1, 5)}
    assert activity.take() == {} and (activity.round, activity.phase) == (4, "train")
    try:
        with activity.collective("sum", "cluster 1"):
            raise RuntimeError("Connection closed by peer")
    except RuntimeError:
        assert activity.failed == "sum over cluster 1"
