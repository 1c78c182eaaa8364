"""Audit: installed packages against known vulnerabilities, for `make check`. Run as a program.

pip-audit ends with 1 for a vulnerability as for a network that is not there. Here the one fails, and the other is told in one
line and passes: a check that needs the network must not keep anybody without one from working. pip-audit lives in an
environment of its own (.venv-audit), which is made when the database can be reached: it decides about no version here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.version import Version

ROOT = Path(__file__).parents[1]
ACCEPTED = Path(__file__).with_name("accepted_vulnerabilities.txt")
ENVIRONMENT = ROOT / ".venv-audit"
REQUIREMENT = "pip-audit>=2.9,<3"
DATABASE = "https://pypi.org/pypi/jinja2/2.4.1/json"  # a release with known vulnerabilities, asked for as pip-audit asks
PROBE_S, LIMIT_S = 10, 300  # seconds for the first answer, and for all
UNREACHABLE = re.compile(
    r"ConnectionError|Connect ?Timeout|Read ?Timeout|ProxyError|SSLError|Max retries|Name or service not known"
    r"|Temporary failure|Could not connect|timed out|Connection refused|\b(?:403|429|50[0234]) (?:Client|Server) Error",
)


def accepted(text: str) -> dict[tuple[str, str], str]:
    """(id, package) -> reason, of the lines of a list. Raises ValueError for a line without one of the three."""
    found = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            words = line.split(None, 2)
            if len(words) < 3:
                raise ValueError(f"{ACCEPTED.name}: '{line}': write id, package and the reason")
            found[words[0], words[1].lower()] = words[2]
    return found


def judge(out: str, err: str, known: dict[tuple[str, str], str]) -> tuple[int, list[str]]:
    """Exit code and lines for the user, from what pip-audit wrote."""
    try:
        packages: list[dict[str, Any]] = json.loads(out)["dependencies"]
    except (ValueError, LookupError, TypeError):
        reason = (err.strip().splitlines() or ["it said nothing"])[-1]
        return _unreachable(reason) if UNREACHABLE.search(err) else (1, [f"error: pip-audit failed: {reason}"])
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    if packages and len(skipped) == len(packages):
        return _unreachable(f"it knows none of {len(packages)} packages")
    faults = {
        (fault["id"], package["name"]): _line(fault, package)
        for package in packages
        for fault in package.get("vulns", [])
        if not known.keys() & {(name, package["name"].lower()) for name in (fault["id"], *fault.get("aliases", []))}
    }
    unknown = f"; not in the database: {', '.join(skipped)}" if skipped else ""
    total = (
        f"audit: {len(packages) - len(skipped)} packages, {len(faults)} known vulnerabilities that are not accepted{unknown}"
    )
    return (1 if faults else 0), [*faults.values(), total]


def _line(fault: dict[str, Any], package: dict[str, Any]) -> str:
    fixed = ", ".join(fault.get("fix_versions", [])) or "no version"
    where = f"{package['name']} {package['version']}: {fault['id']} (fixed in {fixed})"
    return f"error: {where}; raise its bound, or accept it with the reason in {ACCEPTED.relative_to(ROOT)}"


def _unreachable(reason: str) -> tuple[int, list[str]]:
    return 0, [f"audit skipped: the database of vulnerabilities cannot be reached ({reason[:160]})"]


def probe(url: str = DATABASE) -> str | None:
    """Why the database cannot be reached; None where it tells what it must. A mirror of the index may have other pages only."""
    try:
        with urllib.request.urlopen(url, timeout=PROBE_S) as answer:  # noqa: S310  (https, and file: in its test)
            known = json.load(answer)["vulnerabilities"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"{url}: {getattr(error, 'reason', None) or error}"
    return None if known else f"{url}: tells of no vulnerability where there are some"


def installed() -> list[str]:
    """Every package of this environment but ours, with the version under which it is published: `2.13.0`, not `2.13.0+cpu`."""
    found = {each.metadata["Name"]: Version(each.version).public for each in metadata.distributions()}
    return [f"{name}=={version}" for name, version in sorted(found.items()) if name != "fedmoe-ds"]


def _run_audit() -> tuple[int, list[str]]:
    program = ENVIRONMENT / "bin" / "pip-audit"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
        install = [ENVIRONMENT / "bin" / "python", "-m", "pip", "-qq", "install", REQUIREMENT]
        subprocess.run(install, check=True, timeout=LIMIT_S)
    listed = ENVIRONMENT / "installed.txt"
    listed.write_text("\n".join(installed()) + "\n")
    options = ["--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off", "--timeout", str(PROBE_S)]
    done = subprocess.run([program, "--requirement", listed, *options], capture_output=True, text=True, timeout=LIMIT_S)
    return judge(done.stdout, done.stderr, accepted(ACCEPTED.read_text()))


def main() -> int:
    """Audit this environment."""
    reason = probe()
    try:
        code, lines = _unreachable(reason) if reason is not None else _run_audit()
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:  # of pip: it has said why
        code, lines = _unreachable(str(error))
    sys.stdout.write("\n".join(lines) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
