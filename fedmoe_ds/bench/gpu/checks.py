"""Checks: the steps of a visit that ask whether it works: what is there, tests, a run, torch's grouped kernel, NCCL."""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fedmoe_ds.bench.gpu.request import CORRECTNESS, QUICKSTART, Request, Tell, WrongError
from fedmoe_ds.bench.harness.jobs import SCRIPT, metrics_file
from fedmoe_ds.bench.harness.process import environment, run_to_end
from fedmoe_ds.bench.harness.shapes import write_with_tokenizer
from fedmoe_ds.config.shipped import find_config
from fedmoe_ds.config.yaml12 import parse_yaml
from fedmoe_ds.data import stdlib
from fedmoe_ds.distributed.launcher import free_port
from fedmoe_ds.storage import cache

ROOT = Path(__file__).parents[3]
NEEDS_A_DEVICE = "needs a CUDA device"
"""The reason that tests give which are skipped without one; tests/conftest.py marks them `cuda` by it."""
_FAR_S = 3600.0
"""A limit that is never reached: the visit ends a step that takes too long, with all processes below it."""
_GIB = 2**30


def facts(request: Request, tell: Tell) -> None:
    """The device, and the versions of what the package needs: which are missing, and which outside of its range."""
    device = torch.cuda.get_device_properties(0)
    tell(
        device=device.name,
        capability=".".join(map(str, torch.cuda.get_device_capability(0))),
        multiprocessors=device.multi_processor_count,
        memory_gib=device.total_memory / _GIB,
        devices=torch.cuda.device_count(),
    )
    tell(
        torch=torch.__version__, cuda=torch.version.cuda, triton=_version("triton"), nccl=_nccl(), python=sys.version.split()[0]
    )
    tell(cores=os.cpu_count(), root=str(ROOT), cache=str(cache.root(None)))
    tell(**packages())


def packages() -> dict[str, list[str]]:
    """What the package needs and is missing here, or has a version outside of its range."""
    missing, outside = [], []
    for requirement in _requirements():
        found = _version(requirement.name)
        if found is None:
            missing.append(str(requirement))
        elif not requirement.specifier.contains(found.partition("+")[0], prereleases=True):
            outside.append(f"{requirement.name} {found}, wanted {requirement.specifier}")
    return {"missing": missing, "outside": outside}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _nccl() -> str | None:
    """The version of NCCL; None in a build without it."""
    try:
        return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    except (AttributeError, RuntimeError):
        return None


def _requirements() -> Iterator[Any]:
    """What the package needs: of the checkout, or, where it is installed without one, of its metadata."""
    from packaging.requirements import Requirement  # of what transformers needs, too

    project = ROOT / "pyproject.toml"
    texts = (
        tomllib.loads(project.read_text())["project"]["dependencies"] if project.exists() else metadata.requires("fedmoe-ds")
    )
    return (one for text in texts or [] if (one := Requirement(text)).marker is None)


def correctness(request: Request, tell: Tell) -> None:
    """The tests that are marked for a device. Raises WrongError where one fails, or there are none."""
    tests = ROOT / "tests"
    if not tests.is_dir() or importlib.util.find_spec("pytest") is None:
        raise WrongError(f"{tests}: the tests are part of a checkout, and need pytest and pytest-timeout; install them there")
    chosen = device_tests(tests) if request.large else [tests / "test_grouped_mm.py"]
    report = Path(request.output) / CORRECTNESS
    words = ["-m", "cuda", "-p", "no:cacheprovider", "--tb=short", f"--rootdir={ROOT}", f"--junitxml={report}"]
    ended: RuntimeError | None = None
    try:
        run_to_end("pytest", [sys.executable, "-m", "pytest", *words, *map(str, chosen)], _FAR_S, env=_on_device())
    except RuntimeError as error:
        ended = error
    failed = list(_failed(report, tell)) if report.exists() else []
    if failed:
        raise WrongError(f"{len(failed)} failed: {', '.join(failed)}")
    if ended is not None:  # it has crashed, or was interrupted: the report says nothing of that, or is not there
        raise ended
    if not report.exists():
        raise WrongError(f"{report}: pytest has ended well and has not written it")


def device_tests(tests: Path) -> list[Path]:
    """The files that have tests for a device: collecting all of them would take longer than these run."""
    return sorted(file for file in tests.glob("test_*.py") if f'reason="{NEEDS_A_DEVICE}"' in file.read_text(encoding="utf-8"))


def _failed(report: Path, tell: Tell) -> Iterator[str]:
    """The names of tests that failed, out of pytest's own report; how many there were is told."""
    suite = ElementTree.parse(report).getroot().find("testsuite")  # noqa: S314  (written by the pytest that we have started)
    assert suite is not None
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    tell(**counts, files=sorted({case.attrib["classname"] for case in suite.iter("testcase")}))
    if counts["tests"] == counts["skipped"]:
        raise WrongError("no test ran on the device")
    for case in suite.iter("testcase"):
        problem = next((found for kind in ("failure", "error") if (found := case.find(kind)) is not None), None)
        if problem is not None:
            tell(test=case.attrib["name"], problem=problem.attrib.get("message", "")[:500])
            yield case.attrib["name"]


def quickstart(request: Request, tell: Tell) -> None:
    """The shipped quickstart through launch/train.py on the device: seconds by round, what it has learnt, its digest."""
    folder = Path(request.output) / QUICKSTART
    tree: dict[str, Any] = parse_yaml(find_config(Path("quickstart")).read_text(encoding="utf-8"), "quickstart")
    tree |= {"name": "quickstart", "output": str(folder), "topology": {"device": "cuda"}}
    folder.mkdir(parents=True)  # that of an earlier visit is gone by now: a run does not begin in the folder of another
    if not request.large:
        _cut(tree, request, folder)
    config = folder / "quickstart.yaml"
    config.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, str(SCRIPT), "--config", str(config)]
    run_to_end("quickstart", command, _FAR_S, env=_on_device())
    events = [json.loads(line) for line in metrics_file(tree).read_text(encoding="utf-8").splitlines()]
    by_name = {event["event"]: event for event in events}
    tell(device=by_name["run"]["device"], seconds=by_name["end"]["seconds"], digest=by_name["end"]["digest"])
    for event in events:
        if event["event"] == "round":
            tell(round=event["round"], seconds=event["seconds"], tokens_per_s=event["tokens_per_s"], dropped=event["dropped"])
        elif event["event"] == "eval" and event["split"] == "global":
            tell(round=event["round"], tier=event["tier"], perplexity=event["perplexity"], accuracy=event["accuracy"])
    if by_name["run"]["device"] == "cpu":  # a GPU stands there by its name
        raise WrongError("it ran on the CPU")


def _cut(tree: dict[str, Any], request: Request, folder: Path) -> None:
    """One step of a random model: as little work as goes through everything."""
    documents = stdlib.split(stdlib.documents())[0][:4]
    write_with_tokenizer(request.sizes, request.seed, folder / "model", [document.text[:2000] for document in documents])
    tree["foundation"] = {"path": str(folder / "model")}
    tree["federation"] = {"rounds": 1}
    tree["local"] |= {"max_steps": 1, "batch_size": 2}
    tree["data"] |= {"sequence_length": 32, "max_samples": 4}
    tree["evaluation"] = {"max_sequences": 2, "client_sequences": 0}


def _on_device() -> dict[str, str]:
    """The environment of a process that computes on the device."""
    return environment({"DS_ACCELERATOR": "cuda"})


GROUPS = {"some empty": [3, 0, 17, 0, 0, 40, 0, 1], "no rows": [0] * 8, "1023 groups": [index % 3 for index in range(1023)]}
"""Rows by group, where this package leans on torch's grouped kernel."""


def grouped(request: Request, tell: Tell) -> None:
    """Grouped products with empty groups, none at all and as many as the kernel takes, in memory that was poisoned before.

    Raises:
        WrongError: a gradient of a group without rows is not zero, or a number is not finite.
    """
    from fedmoe_ds.kernels.grouped_mm import grouped_mm, grouped_mm_t, grouped_outer
    from fedmoe_ds.kernels.groups import Groups

    wide_in, wide_out, wrong = 64, 32, []
    for name, rows in GROUPS.items():
        groups = Groups(torch.tensor(rows).cumsum(0).to("cuda", torch.int32), sum(rows))
        x, y = (torch.randn(sum(rows), wide, device="cuda").bfloat16() for wide in (wide_in, wide_out))
        weight = torch.randn(len(rows), wide_out, wide_in, device="cuda").bfloat16()
        # Freed at once: the allocator hands the same memory out again for the gradient.
        torch.full((len(rows), wide_out, wide_in), float("nan"), dtype=torch.bfloat16, device="cuda")
        outer = grouped_outer(y, x, groups).float()
        empty = torch.tensor([count == 0 for count in rows], device="cuda")
        found = {
            "empty_groups_zero": bool(outer[empty].eq(0).all()),
            "gradient_finite": bool(outer.isfinite().all()),
            "products_finite": bool(
                grouped_mm(x, weight, groups).isfinite().all() and grouped_mm_t(y, weight, groups).isfinite().all()
            ),
        }
        tell(groups=name, **found)
        wrong += [f"{name}: not {check}" for check, holds in found.items() if not holds]
    if wrong:
        raise WrongError("; ".join(wrong))


def nccl(request: Request, tell: Tell) -> None:
    """NCCL in a world of one, with the groups, types and splits that training uses. Raises WrongError for another result."""
    import deepspeed.comm
    import torch.distributed as torch_dist

    from fedmoe_ds.distributed import process_groups

    world = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(world, MASTER_PORT=str(free_port()))
    torch.cuda.set_device(0)
    process_groups.join_world(datetime.timedelta(seconds=60), torch.device("cuda", 0))
    ep_group, edp_group = process_groups.create_groups(1)
    tell(backend=torch_dist.get_backend())
    wrong = []
    for number in (torch.int64, torch.float64, torch.float32, torch.bfloat16):
        sent = torch.arange(12, device="cuda").to(number).view(6, 2)
        received, total, parts = torch.empty_like(sent), sent.clone(), [torch.empty_like(sent)]
        splits = {"output_split_sizes": [len(sent)], "input_split_sizes": [len(sent)]}
        deepspeed.comm.all_to_all_single(received, sent, group=ep_group, **splits)
        deepspeed.comm.all_reduce(total, group=edp_group)
        deepspeed.comm.all_gather(parts, sent, group=ep_group)
        torch.cuda.synchronize()
        same = all(torch.equal(found.cpu(), sent.cpu()) for found in (received, total, parts[0]))
        tell(type=str(number).removeprefix("torch."), equal=same)
        wrong += [] if same else [str(number)]
    nothing = torch.empty(0, 8, device="cuda")
    no_rows = {"output_split_sizes": [0], "input_split_sizes": [0]}
    deepspeed.comm.all_to_all_single(torch.empty_like(nothing), nothing, group=ep_group, **no_rows)
    torch.cuda.synchronize()
    # The control plane is gloo's, beside NCCL in the same process.
    control = torch.ones(3, dtype=torch.int64)
    torch_dist.all_reduce(control, group=torch_dist.new_group(backend="gloo"))
    tell(no_rows=True, control=control.tolist())
    if wrong:
        raise WrongError(f"other numbers than were sent: {', '.join(wrong)}")
