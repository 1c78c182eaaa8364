"""Nothing is pickled: no module of the package calls what pickles, or unpickles, over a network or from a file."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "multiprocessing"}
MPI = {"bcast", "allgather", "allreduce", "alltoall", "sendrecv", "isend", "irecv", "ssend", "issend", "bsend", "ibsend",
       "exscan", "mprobe", "improbe"}  # fmt: skip
"""Of mpi4py: the lower-case calls pickle; the others of their kind have names that others use, too."""
GLOO = "self.group"
"""A group of torch, whose calls of the same names take tensors."""
AMBIGUOUS = {"gather", "reduce", "scatter", "send", "recv", "scan"}
COMMUNICATOR = re.compile(r"(^|[._])(comm|communicator)$|COMM_(WORLD|SELF)$|\.Split(_type)?\(|mpi_world\(")


def offences(source: str) -> list[str]:
    """What a module does that pickles."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"imports {name}" for name in names if name.split(".")[0] in MODULES]
        if isinstance(node, ast.alias | ast.Attribute | ast.Name):
            names = [node.name if isinstance(node, ast.alias) else node.attr if isinstance(node, ast.Attribute) else node.id]
            found += [name for name in names if re.search(r"(_object|_object_list)$", name) and name != "tokenizer_object"]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, receiver = node.func.attr, ast.unparse(node.func.value)
            if (name in MPI and receiver != GLOO) or (name in AMBIGUOUS and COMMUNICATOR.search(receiver)):
                found.append(f"{receiver}.{name}")
            if (
                receiver in ("torch", "np", "numpy")
                and name in ("load", "save")
                and "weights_only=True" not in ast.unparse(node)
            ):
                found.append(f"{receiver}.{name}")
            if name == "read_pickle" or any(word.arg == "allow_pickle" for word in node.keywords):
                found.append(f"{receiver}.{name}")
    return found


def test_no_module_pickles() -> None:
    files = [*(ROOT / "fedmoe_ds").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
    assert len(files) > 100
    guilty = {str(path.relative_to(ROOT)): found for path in files if (found := offences(path.read_text()))}
    assert guilty == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from multiprocessing.connection import wait",
        "single = world.allreduce(1)",
        "offer = world.bcast(offer, root=0)",
        "theirs = self.comm.gather(x)",
        "MPI.COMM_WORLD.send(x, 1)",
        "world.Split(0, 1).reduce(x)",
        "torch_dist.all_gather_object(a, b)",
        "from torch.distributed import broadcast_object_list",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_what_pickles_is_found(line: str) -> None:
    assert offences(line)
