"""Rows on the disk, so that they can be put in any order while memory holds 28 bytes of each."""

import hashlib
import pickle
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from jaxtyping import Int32, Int64

_DIGEST_BYTES = 16


@dataclass(frozen=True)
class SpooledRow:
    """One row: where it stood in the source, its token ids, and the values of the label columns."""

    where: str
    token_ids: Int32[np.ndarray, "T"]
    labels: tuple[Any, ...]


class RowSpool:
    """Rows by number, in the order in which they were added; `open_spool` makes one.

    They lie in a file without a name that this process alone can open: unpickling it reads what this process wrote.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._offsets = array("q", [0])
        self._lengths = array("i")
        self._texts = bytearray()
        self._content = hashlib.sha256()

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, row: SpooledRow, text: str) -> None:
        """Adds a row; of its text only a digest is kept, for `first_of_each_text`."""
        ids = row.token_ids.tobytes()
        data = pickle.dumps((row.where, ids, row.labels), pickle.HIGHEST_PROTOCOL)
        self._file.write(data)
        self._offsets.append(self._offsets[-1] + len(data))
        self._lengths.append(len(row.token_ids))
        self._texts += hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=_DIGEST_BYTES).digest()
        for part in (ids, repr(row.labels).encode("utf-8", "surrogatepass")):
            self._content.update(len(part).to_bytes(8, "little") + part)

    def read(self, index: int) -> SpooledRow:
        """The row of that number."""
        start, stop = self._offsets[index], self._offsets[index + 1]
        self._file.seek(start)
        where, ids, labels = pickle.loads(self._file.read(stop - start))
        return SpooledRow(where, np.frombuffer(ids, np.int32), labels)

    @property
    def lengths(self) -> Int32[np.ndarray, "rows"]:
        """The number of tokens of each row."""
        return np.array(self._lengths, np.int32)

    @property
    def digest(self) -> str:
        """Of all token ids and labels, in order: 16 hex digits."""
        return self._content.hexdigest()[:16]

    def first_of_each_text(self) -> Int64[np.ndarray, "unique"]:
        """The numbers of the rows whose text no row before them has, ascending."""
        halves = np.frombuffer(bytes(self._texts), np.uint64).reshape(-1, 2)
        order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: equal texts stay in the order of their rows
        ordered = halves[order]
        is_first = np.ones(len(order), bool)
        is_first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
        return np.sort(order[is_first])


@contextmanager
def open_spool(folder: str | None) -> Iterator[RowSpool]:
    """An empty spool on the disk of `folder` (None: the folder for temporary files); gone when the block ends."""
    with tempfile.TemporaryFile(dir=folder, buffering=1 << 20) as file:
        yield RowSpool(file)
