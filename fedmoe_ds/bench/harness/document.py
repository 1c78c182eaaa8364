"""Document: a stored result, as `launch/bench.py ... --json FILE` writes it, and a folder of them."""

from __future__ import annotations

import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedmoe_ds.bench.harness.table import Row
from fedmoe_ds.errors import UserError
from fedmoe_ds.storage.strict_json import read_json


class Gpu(BaseModel):
    """The GPUs that a measuring process could use."""

    model_config = ConfigDict(strict=True)

    name: str
    count: int = Field(ge=1)
    cuda: str | None


class Machine(BaseModel):
    """Hardware and versions, as `fedmoe_ds.machine.machine_facts` finds them."""

    model_config = ConfigDict(strict=True)

    cpu: str
    cores: int = Field(ge=1)
    threads: int = Field(ge=1)
    system_name: str
    versions: dict[str, str | None]
    gpu: Gpu | None = None


class Document(BaseModel):
    """One file. `name` is the file's, without its ending; `<name>.<anything>` is another run of the measurement `<name>`."""

    model_config = ConfigDict(extra="forbid")

    name: str
    benchmark: str
    command: str
    date: datetime.date
    machine: Machine
    rows: list[Row] = Field(min_length=1)

    @property
    def measurement(self) -> str:
        """What it is a run of."""
        return self.name.partition(".")[0]

    @property
    def on_gpu(self) -> bool:
        """Something in it was measured on a GPU: the machine has one, and a row says `device: cuda`."""
        return self.machine.gpu is not None and any(row.get("device") == "cuda" for row in self.rows)


def read_documents(folder: Path) -> list[Document]:
    """All results of a folder, by name.

    Raises:
        UserError: no such folder, or a file in it that is no result.
    """
    if not folder.is_dir():
        raise UserError(f"FOLDER: {folder}: no such folder; `python launch/bench.py all --output {folder}` makes and fills it")
    return [_read(path) for path in sorted(folder.glob("*.json"))]


def _read(path: Path) -> Document:
    try:
        content = read_json(path)
        if not isinstance(content, dict):
            raise _foreign(path, "not an object")
        return Document.model_validate({**content, "name": path.stem})
    except OSError as error:
        raise UserError(f"FOLDER: {path}: cannot be read: {error.strerror or error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise _foreign(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except ValueError as error:
        raise _foreign(path, str(error)) from None


def _foreign(path: Path, reason: str) -> UserError:
    return UserError(
        f"FOLDER: {path}: not a result of launch/bench.py ({reason}); measure it again with --json {path}, or move it elsewhere"
    )
