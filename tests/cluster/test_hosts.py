"""Several hosts for real: ssh, pdsh and mpirun between them, a host that is cut off or loses power; always the local digest.

The hosts are Debian's: to itself, each one's name means 127.0.1.1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from federations import make_config, run_alone, write_inputs
from hosts import Hosts
from launching import SCRIPT, read_events

from fedmoe_ds.config import Config
from fedmoe_ds.errors import EXIT_LOST, EXIT_USER_ERROR

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

BIN = Path(sys.executable).parent
SHORT: dict[str, Any] = {"federation": {"rounds": 1}, "local": {"max_steps": 2}, "evaluation": {"client_sequences": 0}}
# One client at a time and much training: a cable is pulled in the middle of a round, not between two.
LONG: dict[str, Any] = {
    "federation": {"rounds": 3},
    "local": {"max_steps": None, "steps": 40},
    "execution": {"clients_in_flight": 1},
    "evaluation": {"client_sequences": 0},
    "topology": {"silence_s": 4.0, "timeout_s": 60.0},
}
ENDS_S = 45.0
"""A job with a lost host is over by then, its launcher included: 4 s of silence, 10 s for ssh, 15 s for TCP, and slow cores."""
FORWARDED = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:/usr/bin:/bin"}


class Command:
    """One start of the script on several hosts, typed on host 1.

    Args:
        launcher: `pdsh` and `openmpi` are DeepSpeed's, `mpirun` is typed by itself.
        slots: ranks on each host.
    """

    def __init__(self, hosts: Hosts, launcher: str, slots: dict[int, int], config: Config, folder: Path) -> None:
        tree = config.model_dump(mode="json")
        self.hosts, self.slots = hosts, slots
        self.folder = Path(tree["output"]) / tree["name"]
        folder.mkdir()
        (folder / "config.yaml").write_text(json.dumps(tree))
        (folder / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in FORWARDED.items()))
        self._streams = (folder / "stdout", folder / "stderr")
        command = [*self._launcher(launcher), str(SCRIPT), "--config", str(folder / "config.yaml"), "--resume", "auto"]
        with self._streams[0].open("wb") as out, self._streams[1].open("wb") as err:
            inside = hosts.command(1, command, folder)
            self.process = subprocess.Popen(inside, stdout=out, stderr=err, env=os.environ | FORWARDED)

    def _launcher(self, launcher: str) -> list[str]:
        hostfile = str(self.hosts.hostfile(self.slots))
        forwarded = [part for name in FORWARDED for part in ("-x", name)]
        if launcher == "mpirun":
            where = ",".join(f"{self.hosts.name(host)}:{ranks}" for host, ranks in self.slots.items())
            return [str(BIN / "mpirun"), "--allow-run-as-root", "--host", where, *forwarded, sys.executable]
        options = ["--log_level", "error", "--hostfile", hostfile, "--launcher", launcher]
        if launcher == "openmpi":
            options += ["--launcher_args", " ".join(["--allow-run-as-root", "--prefix", str(BIN.parent), *forwarded])]
        return [str(BIN / "deepspeed"), *options]

    def finish(self, timeout_s: float = 200.0) -> int:
        """The exit code of the launcher; nothing is left of the job on the hosts that can be reached."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"still running after {timeout_s} s\n{self.text(0)}\n{self.text(1)}") from None
        finally:
            for host in self.slots:
                self.hosts.sweep(host)

    def wait_for_ranks_to_end(self, host: int, timeout_s: float) -> None:
        """Wait until the ranks of a host are gone, each by itself."""
        deadline = time.monotonic() + timeout_s
        while left := [process for process in self.hosts.processes(host) if str(SCRIPT) in _arguments(process)]:
            assert time.monotonic() < deadline, f"still on host {host}: {left}\n{self.text(1)}"
            time.sleep(0.1)

    def text(self, stream: int) -> str:
        return self._streams[stream].read_text(errors="replace")

    def digest(self) -> str:
        """The digest of a run that finished; pdsh puts a host's name before each line."""
        code = self.finish()
        assert code == 0, f"exit code {code}\n{self.text(0)}\n{self.text(1)}"
        (line,) = [line for line in self.text(0).splitlines() if "digest: " in line]
        return line.partition("digest: ")[2]

    def wait_for_round(self, round_index: int, timeout_s: float = 120.0) -> float:
        """Wait until a round is finished and saved; its seconds."""
        deadline = time.monotonic() + timeout_s
        while not (self.folder / "checkpoints" / f"round-{round_index:05d}").exists():
            assert self.process.poll() is None and time.monotonic() < deadline, f"{self.text(0)}\n{self.text(1)}"
            time.sleep(0.02)
        return float(read_events(self.folder, "round")[-1]["seconds"])


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model and data of all runs here."""
    root = tmp_path_factory.mktemp("federation")
    write_inputs(root)
    return root


@pytest.fixture(scope="module")
def short(root: Path) -> str:
    """The digest of the short run, on one rank of this machine."""
    return run_alone(make_config(root, "short", SHORT)).digest


@pytest.fixture(scope="module")
def long(root: Path) -> str:
    """The digest of the long run that nobody disturbs."""
    return run_alone(make_config(root, "long", LONG)).digest


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with Hosts(tmp_path / "hosts") as hosts:
        yield hosts


MEET = (
    "from mpi4py import MPI; from fedmoe_ds.distributed.address import choose_rendezvous; world = MPI.COMM_WORLD;"
    "print(*choose_rendezvous(world, world.Split_type(MPI.COMM_TYPE_SHARED)))"
)
GLOO = (
    "import os; from fedmoe_ds.distributed.address import set_gloo_interface; set_gloo_interface();"
    "print(os.environ.get('GLOO_SOCKET_IFNAME'))"
)


def test_mpi_ranks_meet_at_an_address_that_all_hosts_reach(hosts: Hosts) -> None:
    """To host 2, where rank 0 is, its own name means 127.0.1.1, and its first address is one that leads nowhere."""
    assert hosts.run(2, ["getent", "hosts", hosts.name(2)]).split()[0] == "127.0.1.1"
    hosts.run(2, ["ip", "addr", "add", "10.88.0.1/24", "dev", "lo"])
    only = ["--mca", "btl_tcp_if_include", "eth0"]  # MPI's own messages; DeepSpeed's launcher says the same
    mpirun = [str(BIN / "mpirun"), "--allow-run-as-root", *only, "--host", hosts.list([2, 1, 3])]
    told = {tuple(line.split()) for line in hosts.run(2, [*mpirun, sys.executable, "-c", MEET]).splitlines()}
    ((address, port),) = told  # all three say the same
    assert address == hosts.address(2) and int(port) > 1023
    given = hosts.run(2, [*mpirun, "-x", "MASTER_ADDR=10.77.0.2", "-x", "MASTER_PORT=4242", sys.executable, "-c", MEET])
    assert set(given.splitlines()) == {"10.77.0.2 4242"}


@pytest.mark.parametrize(
    ("master", "expected"), [("10.77.0.1", "eth0"), ("NAME", "eth0"), ("127.0.0.1", "None"), ("localhost", "None")]
)
def test_gloo_is_led_to_the_network(master: str, expected: str, hosts: Hosts) -> None:
    master = hosts.name(1) if master == "NAME" else master
    for host in (1, 2):
        told = hosts.run(host, ["env", f"MASTER_ADDR={master}", sys.executable, "-c", GLOO])
        assert told.strip() == expected
    kept = hosts.run(2, ["env", f"MASTER_ADDR={master}", "GLOO_SOCKET_IFNAME=ib0", sys.executable, "-c", GLOO])
    assert kept.strip() == "ib0"


WATCH = """
import os
from fedmoe_ds.config import TopologyConfig
from fedmoe_ds.distributed.launcher import detect_launch
from fedmoe_ds.distributed.runtime import init_runtime, run_entry
from fedmoe_ds.distributed.watchdog import start
listen = start.listen
start.listen = lambda addresses: [one for one in listen(addresses) if print("listens", one.getsockname()[0]) is None]

def main():
    runtime = init_runtime(detect_launch(), TopologyConfig(device="cpu", interface=os.environ.get("WANTED")))
    print("together", len(runtime.gather(None)))
    print(*runtime.notes, sep="\\n")

run_entry(main)  # as our own scripts end: a rank that only returns takes gloo's threads down while others still use them
"""


def watch(hosts: Hosts, places: tuple[int, ...], **more: str) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of a rank of WATCH on each of these hosts; host 1 is rank 0's."""
    ranks = []
    for rank, host in enumerate(places):
        place = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": len(places), "MASTER_ADDR": hosts.name(1), "MASTER_PORT": 29511}
        inside = hosts.command(host, [sys.executable, "-c", WATCH])
        environment = os.environ | FORWARDED | {name: str(value) for name, value in place.items()} | more
        ranks.append(subprocess.Popen(inside, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    told = [rank.communicate(timeout=120) for rank in ranks]
    return [(rank.returncode, *streams) for rank, streams in zip(ranks, told, strict=True)]


def test_the_watchdog_listens_only_where_a_name_leads_others(hosts: Hosts) -> None:
    """The name of rank 0's host means 127.0.1.1 to itself; the second rank is on that host, too."""
    told = watch(hosts, (1, 1, 2))
    assert [code for code, _, _ in told] == [0, 0, 0], told
    lines = [[line for line in out.splitlines() if line.startswith(("listens", "together"))] for _, out, _ in told]
    assert lines == [[f"listens {hosts.address(1)}", "together 3"], ["together 3"], ["together 3"]]
    assert "network: eth0 for gloo; no fabric (hsn, ib) connects all hosts" in told[0][1].splitlines()


def test_ranks_meet_over_a_fabric_that_all_hosts_have(hosts: Hosts) -> None:
    """Its name differs from host to host; one that a host lacks is refused on every rank, before any group is built."""
    for host, name in ((1, "ib0"), (2, "ibp3s0"), (3, "hsn0")):
        for command in ("link set eth0 down", f"link set eth0 name {name}", f"link set {name} up"):
            hosts.run(host, ["ip", *command.split()])
    told = watch(hosts, (1, 2, 3))
    assert [code for code, _, _ in told] == [0, 0, 0], told
    lines = [next(line for line in out.splitlines() if line.startswith("network: ")) for _, out, _ in told]
    network = f"({hosts.address(1).rpartition('.')[0]}.0/24)"
    assert lines == [f"network: {name} for gloo, {name} for NCCL {network}" for name in ("ib0", "ibp3s0", "hsn0")]
    refused = watch(hosts, (1, 2), WANTED="ib0")
    assert [code for code, _, _ in refused] == [EXIT_USER_ERROR] * 2
    why = f"topology.interface: ib0: {hosts.name(2)} has no such interface that is up with an IPv4 address; it has ibp3s0"
    said = [error.splitlines()[-1] for _, _, error in refused]
    assert said == [f"error: {why}", f"error: rank 1 on {hosts.name(2)}: {why}"]


def assert_who(command: Command, launcher: str, ep_size: int) -> None:
    """The run was what was asked for: every rank on the host that the hostfile names, no more and no fewer."""
    run = read_events(command.folder, "run")[-1]
    assert (run["launcher"], run["ep_size"]) == (launcher, ep_size)
    expected = [command.hosts.name(host) for host, ranks in command.slots.items() for _ in range(ranks)]
    assert [row["host"] for row in run["topology"]] == expected


@pytest.mark.parametrize(
    ("launcher", "slots", "ep_size", "named"),
    [
        ("pdsh", {1: 1, 2: 1, 3: 1}, 1, "deepspeed"),
        ("openmpi", {1: 1, 2: 1}, 2, "mpirun"),  # one expert pool across two hosts
        ("mpirun", {1: 2, 3: 2}, 4, "mpirun"),
    ],
)
def test_launchers(
    launcher: str,
    slots: dict[int, int],
    ep_size: int,
    named: str,
    hosts: Hosts,
    root: Path,
    short: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make_config(root, f"{launcher}-{ep_size}", SHORT, {"topology": {"ep_size": ep_size}})
    command = Command(hosts, launcher, slots, config, tmp_path / "job")
    if command.finish() == EXIT_LOST:  # seen once (docs/log.md); what its line says must work then
        with capsys.disabled():
            print(f"\n{launcher}: a rank was lost: {[line for line in command.text(1).splitlines() if 'error: ' in line]}")
        command = Command(hosts, launcher, slots, config, tmp_path / "again")
    assert command.digest() == short
    assert_who(command, named, ep_size)


@pytest.mark.parametrize(
    ("launcher", "fault", "victim"),
    [("pdsh", "cable", 2), ("mpirun", "cable", 3), ("openmpi", "power", 2)],
)
def test_a_host_is_gone(launcher: str, fault: str, victim: int, hosts: Hosts, root: Path, long: str, tmp_path: Path) -> None:
    """Its cable is pulled or its power cut in the middle of round 2. The run goes on with the other two."""
    config = make_config(root, f"{launcher}-{fault}-{victim}", LONG)
    slots = {1: 1, 2: 1, 3: 1}
    command = Command(hosts, launcher, slots, config, tmp_path / "job")
    seconds = command.wait_for_round(1)
    time.sleep(0.3 * seconds)
    (hosts.link_down if fault == "cable" else hosts.kill)(victim)
    began = time.monotonic()
    for host in (2, 3):  # also on the one that is alone now
        command.wait_for_ranks_to_end(host, 20.0)
    code = command.finish(ENDS_S)
    print(f"{launcher}, {fault} of host {victim}: the launcher ended after {time.monotonic() - began:.1f} s with {code}")
    assert code == (255 if launcher == "pdsh" else EXIT_LOST), command.text(1)  # pdsh tells of its ssh that broke
    said = [line for line in command.text(1).splitlines() if "error: rank" in line]
    (line,) = [line for line in said if f"error: rank {victim - 1} on {hosts.name(victim)} has been silent" in line]
    assert "(last heard in round 2, train, " in line and "start again with --resume auto" in line
    before = read_events(command.folder, "round")
    assert [event["round"] for event in before] == [1]

    rest = {host: 1 for host in slots if host != victim}
    again = Command(hosts, "mpirun", rest, config, tmp_path / "again")
    assert again.digest() == long
    assert "resumed from round-00001" in again.text(1)
    after = read_events(again.folder, "round")
    assert [event["round"] for event in after] == [1, 2, 3]
    assert after[0] == before[0], "round 1 was trained again"
