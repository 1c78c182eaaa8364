"""Several hosts on one machine: namespaces of their own, real ssh between them, cables that can be pulled.

    with Hosts(folder, count=3) as hosts:
        result = hosts.run(1, ["pdsh", "-R", "ssh", "-w", hosts.list(), "hostname"])
        hosts.link_down(2)

A host is a network, UTS, mount, IPC and PID namespace with sshd as its first process, an `eth0` with an address and a /dev/shm;
files and CPUs are shared. As on Debian, a host's own name means 127.0.1.1 to itself. The bridge between hosts is in a namespace
of its own, too, so nothing of the machine's network is touched. No namespace has a name: all of it vanishes with the processes,
and these die with this one. Two sets of hosts on one machine do not meet, although they use the same addresses.

The PID namespaces matter for safety: DeepSpeed's pdsh launcher runs `pkill -f` on every host when it is interrupted.
Needs root and the Debian packages openssh-server, pdsh, iproute2 and util-linux.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil

BINARIES = ("ip", "nsenter", "unshare", "setpriv", "ssh", "ssh-keygen", "pdsh", "pkill")
SSHD = "/usr/sbin/sshd"
PACKAGES = "openssh-server openssh-client pdsh iproute2 util-linux procps"
NETWORK = "10.77.0"
START_S = 20.0

# What docs/hosts.md asks of real hosts, so that launchers notice a host that is gone: the two ServerAlive lines here and
# tcp_retries2 below.
_CLIENT = """\
Host *
  ServerAliveInterval 3
  ServerAliveCountMax 3
  IdentityFile {folder}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  BatchMode yes
"""
_SERVER = """\
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile none
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
MaxStartups 100
PrintMotd no
# /dev/shm is a host's own: what MPI's daemons leave behind goes with it.
SetEnv TMPDIR=/dev/shm
"""
# What the first process of a host does before it becomes sshd.
_INIT = """\
set -e
hostname {name}
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd
mount --bind {folder}/{name}.hosts /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
mount -o remount,rw /proc/sys 2> /dev/null || true
echo 5 > /proc/sys/net/ipv4/tcp_retries2
until ip link show eth0 > /dev/null 2>&1; do sleep 0.02; done
exec {sshd} -D -e -f {folder}/sshd_config
"""


class Hosts:
    """Running hosts, numbered from 1; leaving the block ends them with everything on them.

    Args:
        folder: for keys, configuration and logs of sshd.
        count: how many.
    """

    def __init__(self, folder: Path, count: int = 3) -> None:
        self.folder, self.count = folder, count
        self._mark = uuid.uuid4().hex[:4]  # names are unique: MPI's session folders in /tmp are called by them
        self._holders: dict[int, subprocess.Popen[bytes]] = {}  # by host; 0 is the bridge
        self._first: dict[int, psutil.Process] = {}

    def __enter__(self) -> Hosts:
        missing = [name for name in (*BINARIES, SSHD) if shutil.which(name) is None]
        assert not missing, f"tests on several hosts need {', '.join(missing)}: install {PACKAGES}"
        assert os.geteuid() == 0, "tests on several hosts make network namespaces, which needs root"
        assert not _root_is_locked(), "sshd refuses root, locked by `!` in /etc/shadow, even with a key: `usermod -p '*' root`"
        try:
            self._write()
            for host in range(self.count + 1):
                self._hold(host)
            for host in range(1, self.count + 1):
                self._connect(host)
            self._wait_for_sshd()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()

    def name(self, host: int) -> str:
        return f"node{host}-{self._mark}"

    @staticmethod
    def address(host: int) -> str:
        return f"{NETWORK}.{host}"

    def list(self, hosts: Sequence[int] = ()) -> str:
        """Names with commas between them; of all hosts if none is given."""
        return ",".join(self.name(host) for host in hosts or range(1, self.count + 1))

    def hostfile(self, slots: Mapping[int, int]) -> Path:
        """A hostfile with so many ranks on each host."""
        path = self.folder / f"hostfile-{'-'.join(f'{host}x{ranks}' for host, ranks in slots.items())}"
        path.write_text("".join(f"{self.name(host)} slots={ranks}\n" for host, ranks in slots.items()))
        return path

    def command(self, host: int, arguments: Sequence[str], folder: Path | None = None) -> list[str]:
        """What runs `arguments` on a host, in `folder` or the current one, in the current environment."""
        place = f"--wd={folder or os.getcwd()}"
        inside = ["nsenter", "--target", str(self._first[host].pid), "--all", place, "--"]
        return [*inside, "env", "TMPDIR=/dev/shm", *arguments]

    def run(self, host: int, arguments: Sequence[str], timeout_s: float = 60.0) -> str:
        """Run a command on a host to its end; its standard output. Raises CalledProcessError."""
        done = subprocess.run(self.command(host, arguments), capture_output=True, text=True, timeout=timeout_s, check=True)
        return done.stdout

    def link_down(self, host: int) -> None:
        """Pull a host's cable: no connection is closed, nothing arrives any more."""
        self._inside(0, f"ip link set v{host} down")

    def link_up(self, host: int) -> None:
        self._inside(0, f"ip link set v{host} up")

    def kill(self, host: int) -> None:
        """Cut a host's power: every process is gone at once, and no connection is closed."""
        self.link_down(host)
        self._first.pop(host)
        holder = self._holders.pop(host)
        holder.kill()
        holder.wait()

    def processes(self, host: int) -> list[psutil.Process]:
        """All living processes of a host but the first, as this machine numbers them."""
        if host not in self._first:
            return []
        space = _space(self._first[host])
        return [p for p in psutil.process_iter() if p.pid != self._first[host].pid and space is not None and _space(p) == space]

    def sweep(self, host: int) -> list[str]:
        """Kill what a job has left on a host, and name it; sshd stays."""
        names = []
        for process in self.processes(host):
            with contextlib.suppress(psutil.NoSuchProcess):
                names.append(f"{process.pid} {' '.join(process.cmdline())}")
                process.kill()
        return names

    def end(self) -> None:
        """The first process of a PID namespace takes all others along."""
        for holder in self._holders.values():
            holder.kill()
            holder.wait()
        self._holders.clear()
        self._first.clear()

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "key")], check=True)
        (self.folder / "ssh_config").write_text(_CLIENT.format(folder=self.folder))
        (self.folder / "sshd_config").write_text(_SERVER.format(folder=self.folder))
        for host in range(1, self.count + 1):
            others = [other for other in range(1, self.count + 1) if other != host]
            lines = ["127.0.0.1 localhost", f"127.0.1.1 {self.name(host)}"]
            lines += [f"{self.address(other)} {self.name(other)}" for other in others]
            (self.folder / f"{self.name(host)}.hosts").write_text("\n".join(lines) + "\n")

    def _hold(self, host: int) -> None:
        """Start the process that a host (or the bridge) lives in; it dies with this one."""
        dies = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--fork", "--kill-child"]
        if host == 0:
            command = [*dies, "sleep", "infinity"]
        else:
            init = _INIT.format(name=self.name(host), folder=self.folder, sshd=SSHD)
            command = [*dies, "--uts", "--mount", "--ipc", "--pid", "--mount-proc", "bash", "-c", init]
        with (self.folder / f"host{host}.log").open("wb") as log:
            self._holders[host] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        holder = psutil.Process(self._holders[host].pid)
        self._await(holder.children, f"host {host} did not start")
        (self._first[host],) = holder.children()

    def _connect(self, host: int) -> None:
        bridge = "" if host > 1 else "ip link add br0 type bridge && ip link set br0 up && "
        cable = f"ip link add v{host} type veth peer name eth0 netns {self._first[host].pid}"
        self._inside(0, f"{bridge}{cable} && ip link set v{host} master br0 up")
        address = f"ip addr add {self.address(host)}/24 brd + dev eth0"
        self._inside(host, f"ip link set lo up && {address} && ip link set eth0 up")

    def _inside(self, host: int, command: str) -> None:
        inside = ["nsenter", "--target", str(self._first[host].pid), "--net", "sh", "-c", command]
        subprocess.run(inside, check=True, capture_output=True, timeout=START_S)

    def _wait_for_sshd(self) -> None:
        for host in range(1, self.count + 1):
            knock = f"exec 3<>/dev/tcp/{self.address(host)}/22"
            arguments = self.command(1, ["bash", "-c", knock])
            self._await(
                lambda arguments=arguments: subprocess.run(arguments, capture_output=True).returncode == 0,
                f"sshd of host {host} does not answer",
            )

    def _await(self, condition: Callable[[], object], trouble: str) -> None:
        deadline = time.monotonic() + START_S
        while not condition():
            logs = "\n".join(path.read_text() for path in self.folder.glob("host*.log"))
            assert time.monotonic() < deadline, f"{trouble}\n{logs}"
            time.sleep(0.02)


def _root_is_locked() -> bool:
    """Whether sshd without PAM takes root for locked; a password that nothing matches (`*`) is not locked."""
    return any(line.startswith("root:!") for line in Path("/etc/shadow").read_text().splitlines())


def _space(process: psutil.Process) -> str | None:
    try:
        return os.readlink(f"/proc/{process.pid}/ns/pid")
    except OSError:
        return None
