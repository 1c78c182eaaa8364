"""Data file: a local file as its readers need it: unpacked while it is read, decoded, and with its place in every message."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa  # type: ignore[import-untyped]

from fedmoe_ds.distributed.stop_points import stop_point
from fedmoe_ds.errors import UserError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
BOMB_BYTES, BOMB_RATIO = 1 << 30, 200
"""An archive that gives more bytes than the first, and more than the second times its own size, is refused: text is packed to a
third or a tenth of its size, and what was made to fill a memory to a thousandth."""
_PIECE = 1 << 20
_BUFFER = 1 << 17


@dataclass(frozen=True)
class DataFile:
    """A path, and how the configuration says that it is to be read.

    Attributes:
        key: the key of the configuration that names the file; every message begins with it.
        separator: between the fields of a CSV file; None is the usual one of its kind.
        encoding: a codec of Python, for every kind of file that is text.
    """

    path: Path
    key: str = "data.source"
    separator: str | None = None
    encoding: str = "utf-8"

    @property
    def ending(self) -> str:
        """The kind of file in small letters: `.jsonl`, also of `A.JSONL.gz`."""
        return Path(self._unpacked_name).suffix.lower()

    @property
    def name(self) -> str:
        """The file's name without its endings."""
        return Path(self._unpacked_name).stem

    @property
    def packed(self) -> bool:
        return self.path.suffix.lower() in COMPRESSIONS

    @property
    def _unpacked_name(self) -> str:
        return self.path.stem if self.packed else self.path.name

    def error(self, message: str, line: int | None = None) -> UserError:
        """Return the error that names the key, the file, and the line where it is known."""
        return UserError(f"{self.key}: {self.path}{'' if line is None else f':{line}'}: {message}")

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open for reading, unpacked. Raises OSError as opening does, and UserError where an archive is damaged."""
        with self.path.open("rb") as file:
            if not self.packed:
                yield file
            else:
                raw = _Unpacked(self, file)
                # RawIOBase gives a few bytes at a time; lines are found in the buffer.
                yield cast(BinaryIO, io.BufferedReader(raw, _BUFFER))

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yield (number, line with its end). A line ends with LF; a byte order mark is left out."""
        if self._is_utf8:
            with self.open() as file:
                # Bytes first: decoding line by line keeps the number of a line that is not UTF-8.
                for number, raw in enumerate(file, start=1):
                    try:
                        text = raw.decode("utf-8")
                    except UnicodeDecodeError as error:
                        raise self._undecodable(number) from error
                    yield number, text.removeprefix("\ufeff") if number == 1 else text
            return
        rest, number = "", 0
        for piece in self.pieces():
            # Not bytes: in UTF-16 the byte of LF is half of other characters, too.
            *whole, rest = (rest + piece).split("\n")
            for line in whole:
                number += 1
                yield number, line + "\n"
        if rest:
            yield number + 1, rest

    def pieces(self) -> Iterator[str]:
        """Yield the text piece by piece, without a byte order mark."""
        decoder, line, first = codecs.getincrementaldecoder(self.encoding)(), 1, True
        with self.open() as file:
            while True:
                raw = file.read(_PIECE)
                stop_point()
                try:
                    piece = decoder.decode(raw, final=not raw)
                except UnicodeError as error:
                    raise self._undecodable(line + _lines_before(error)) from error
                line += piece.count("\n")
                yield piece.removeprefix("\ufeff") if first else piece
                first = first and not piece
                if not raw:
                    return

    @property
    def _is_utf8(self) -> bool:
        return codecs.lookup(self.encoding).name in ("utf-8", "utf-8-sig")

    def _undecodable(self, line: int) -> UserError:
        if self._is_utf8:
            return self.error("not UTF-8 text; save the file as UTF-8, or name its encoding in data.encoding", line)
        return self.error(f"not {self.encoding} text; name the encoding that it was saved with in data.encoding", line)


class _Unpacked(io.RawIOBase):
    """The bytes of an archive, never more of them in memory than are asked for."""

    def __init__(self, file: DataFile, packed: BinaryIO) -> None:
        self._file, self._given = file, 0
        self._stream = pa.CompressedInputStream(packed, COMPRESSIONS[file.path.suffix.lower()])
        self._most = max(BOMB_BYTES, BOMB_RATIO * file.path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            piece = self._stream.read(len(buffer))
        except OSError as error:  # of pyarrow: the archive's content, or the disk
            raise self._file.error(f"a damaged or unfinished archive ({in_one_line(error)}); pack or copy it again") from error
        self._given += len(piece)
        if self._given > self._most:
            raise self._file.error(
                f"an archive that unpacks to more than {BOMB_RATIO} times its size; if it is meant to, unpack it yourself"
            )
        buffer[: len(piece)] = piece
        return len(piece)


def known_encoding(name: str) -> bool:
    """Whether Python has this codec, and it makes text of bytes."""
    try:
        codecs.getincrementaldecoder(name)
        # Not only looked up: rot13 and base64 are codecs as well, and do not make text of bytes.
        b"a".decode(name)
    except UnicodeError:  # a single byte is no text in UTF-16
        return True
    except (LookupError, ValueError):  # ValueError: a name with a zero byte
        return False
    return True


def _lines_before(error: UnicodeError) -> int:
    """Lines that end before the byte that could not be decoded, among the bytes that the decoder had at hand."""
    if not isinstance(error, UnicodeDecodeError):
        return 0
    # `encoding` names the byte order that was found, where the configuration does not.
    return error.object[: error.start].decode(error.encoding, errors="replace").count("\n")


def in_one_line(error: BaseException) -> str:
    """Return the kind and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
