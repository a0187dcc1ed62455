"""Zip files whose members are stored, not compressed: equal content gives equal bytes, and a member is read alone.

A zip has its table of contents at the end, so it is written in one go. Formats: PKWARE's APPNOTE.TXT,
`numpy.lib.format`.
"""

import io
import itertools
import math
import zipfile
from typing import BinaryIO

import numpy as np
import zstandard
from jaxtyping import Int64, Shaped

from core.base.dtypes import ARRAY_DTYPES
from core.base.errors import UNREADABLE
from core.object_store.sinks import Sink

# zip stores a time for every member; this is the earliest that it can represent.
_NO_TIME = (1980, 1, 1, 0, 0, 0)
_UNIX = 3
DAMAGED_ZIP = (*UNREADABLE, zipfile.BadZipFile, zstandard.ZstdError)
"""What zipfile, numpy and zstandard raise for damaged files."""


class _Unseekable:
    """A sink as zipfile wants one that it cannot seek in."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def write(self, data: bytes, /) -> int:
        """Appends `data`."""
        return self._sink.write(data)

    def flush(self) -> None:
        """Nothing waits here."""

    def close(self) -> None:
        """The sink stays open."""


def new_archive(sink: Sink) -> zipfile.ZipFile:
    """A zip that is written to `sink`; a context manager."""
    return zipfile.ZipFile(_Unseekable(sink), "w")


def add_member(archive: zipfile.ZipFile, name: str, *pieces: bytes | memoryview) -> None:
    """Adds a member that holds these bytes, which have to stay as they are until the sink has written them."""
    member = zipfile.ZipInfo(name, _NO_TIME)
    # Else it would say on which system it was written.
    member.create_system = _UNIX
    member.file_size = sum(map(len, pieces))
    with archive.open(member, "w") as file:
        for piece in pieces:
            file.write(piece)


def add_array(archive: zipfile.ZipFile, name: str, array: Shaped[np.ndarray, "..."]) -> None:
    """Adds the member `name.npy`, without a copy of the values."""
    array = np.ascontiguousarray(array)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    add_member(archive, f"{name}.npy", header.getvalue(), array.reshape(-1).view(np.uint8).data)


def open_archive(stream: BinaryIO) -> zipfile.ZipFile:
    """A zip for reading; a context manager. Raises ValueError if its members together are longer than the file."""
    archive = zipfile.ZipFile(stream)
    size = stream.seek(0, io.SEEK_END)
    names = archive.namelist()
    if len(set(names)) != len(names) or sum(member.file_size for member in archive.infolist()) > size:
        raise ValueError("two of its members overlap or have one name")
    return archive


def member_bytes(archive: zipfile.ZipFile, name: str) -> bytes:
    """A member's bytes; zipfile checks their CRC. A compressed member is refused: it can expand to any size."""
    member = archive.getinfo(name)
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    return archive.read(member)


def npy_header(head: bytes, n_bytes: int) -> tuple[np.dtype, tuple[int, ...], int]:
    """Dtype, shape and offset of the values of a `.npy` file of `n_bytes` that begins with `head`.

    Raises ValueError unless it is an array of a dtype that shards have, with as many bytes as its shape says.
    """
    stream = io.BytesIO(head)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("it is no .npy file of version 1.0")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    start = stream.tell()
    if is_fortran or dtype not in (*ARRAY_DTYPES.values(), np.int64) or min(shape, default=0) < 0:
        raise ValueError(f"its values are {dtype} of shape {shape}")
    if math.prod(shape) * dtype.itemsize != n_bytes - start:
        raise ValueError(f"it has {n_bytes - start} bytes for {dtype} of shape {shape}")
    return dtype, shape, start


def parse_npy(data: bytes | memoryview) -> Shaped[np.ndarray, "..."]:
    """The array of a `.npy` file, as a view. Nothing is allocated by what its header says. Raises ValueError."""
    dtype, shape, start = npy_header(bytes(data[:MAX_NPY_HEADER]), len(data))
    return np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape)


MAX_NPY_HEADER = 1 << 10
"""Headers of arrays without fields are shorter than this."""


def cut_by_sample(
    offsets: Int64[np.ndarray, "S_plus_1"], n_rows: int, array: Shaped[np.ndarray, "N *_"]
) -> list[Shaped[np.ndarray, "K *_"]]:
    """The rows of each sample. Raises ValueError unless the offsets cut all of `n_rows` rows."""
    if (
        len(array) != n_rows
        or not len(offsets)
        or offsets[0] != 0
        or offsets[-1] != n_rows
        or (np.diff(offsets) < 0).any()
    ):
        raise ValueError(f"its sample offsets do not cut {len(array)} tokens")
    return [array[start:stop] for start, stop in itertools.pairwise(offsets)]
