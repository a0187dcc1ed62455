"""`pytorch_model.bin`: where the tensors of a file written by `torch.save` are. Needs no torch, runs no pickled code.

The file is a zip archive of stored (not compressed) members: a pickle that describes the tensors, and one member of raw
bytes for each storage. The pickle may name what rebuilds tensors and nothing else.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from core.base.byte_streams import SeekableBytes
from core.base.errors import ModelError
from qwen2_jax.checkpoints.files import ByteFile, EndOfFileError
from qwen2_jax.checkpoints.weight_source import StoredTensor

# https://github.com/pytorch/pytorch/blob/main/torch/storage.py: the storage class says the type of its elements.
STORAGES = {
    "DoubleStorage": ("F64", 8),
    "FloatStorage": ("F32", 4),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "LongStorage": ("I64", 8),
    "IntStorage": ("I32", 4),
    "ShortStorage": ("I16", 2),
    "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1),
    "BoolStorage": ("BOOL", 1),
}
_LOCAL_HEADER = 30  # of a zip member, before its name and extra field
_EXTENSIONS = {"EXT1", "EXT2", "EXT4"}  # opcodes that call what a process-wide registry says, past find_class
_CONVERT = 'python -c "import sys, torch; torch.save(torch.load(sys.argv[1], weights_only=True), sys.argv[1])"'


def bin_index(file: ByteFile) -> dict[str, StoredTensor]:
    """Name -> place of every tensor. Raises `ModelError` for a damaged file and for whatever is not plain tensors."""
    try:
        if file.read(0, 4).tobytes() != b"PK\x03\x04":
            raise ModelError(
                f"{file.url}: not a zip archive: damaged, or saved by torch before 1.6; "
                f"where you trust it, rewrite it with {_CONVERT} {file.url}"
            )
        with zipfile.ZipFile(SeekableBytes(lambda *span: file.read(*span).tobytes(), file.size)) as archive:
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
                raise ModelError(f"{file.url}: saved on a big-endian machine, which is not supported")
            tensors = _unpickle(file, archive.read(members["data.pkl"]))
        return _stored_tensors(file, members, tensors)
    except (zipfile.BadZipFile, KeyError, EndOfFileError, NotImplementedError) as error:
        raise ModelError(f"{file.url}: not a whole file of torch.save ({error}); download it again") from error


@dataclass(frozen=True)
class _Storage:
    kind: str
    itemsize: int
    key: str


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(storage: Any, first: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    """Stands for torch._utils._rebuild_tensor_v2. What else is given says about gradients."""
    return _Tensor(storage, first, tuple(shape), tuple(strides))


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    """Stands for torch._utils._rebuild_parameter."""
    return data


class _TensorUnpickler(pickle.Unpickler):
    """Gives `_Tensor` in place of tensors, and refuses every name but those that rebuild them."""

    ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    } | {("torch", name): place for name, place in STORAGES.items()}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a checkpoint")
        return self.ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        tag, place, key, *_ = pid
        if tag != "storage" or place not in STORAGES.values():
            raise pickle.UnpicklingError(f"it refers to {tag!r}, which is no storage")
        kind, itemsize = place
        return _Storage(kind, itemsize, str(key))


def _unpickle(file: ByteFile, data: bytes) -> dict[str, _Tensor]:
    try:
        for opcode, _, _ in pickletools.genops(data):
            if opcode.name in _EXTENSIONS:
                raise pickle.UnpicklingError("it uses the extension registry")
        content = _TensorUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # whatever a hostile or damaged pickle makes the unpickler raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{file.url}: refused: {reason}; ask for a safetensors version of the model") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ModelError(f"{file.url}: holds a {type(content).__name__} where a dict of tensors by name is expected")
    for name, tensor in content.items():
        if not _is_tensor(tensor):
            raise ModelError(f"{file.url}: {name} is a {type(tensor).__name__} where a tensor is expected")
    return content


def _is_tensor(found: Any) -> bool:
    """Also of a `_Tensor` nothing is believed: a pickle may set any attribute of what it holds."""
    if not (isinstance(found, _Tensor) and isinstance(found.storage, _Storage)):
        return False
    storage, numbers = found.storage, (found.first, *found.shape, *found.strides)
    return (
        (storage.kind, storage.itemsize) in STORAGES.values()
        and isinstance(storage.key, str)
        and type(found.shape) is tuple
        and len(found.shape) == len(found.strides)
        and all(type(number) is int and number >= 0 for number in numbers)
    )


def _stored_tensors(
    file: ByteFile, members: dict[str, zipfile.ZipInfo], tensors: dict[str, _Tensor]
) -> dict[str, StoredTensor]:
    used = {tensor.storage.key: members[f"data/{tensor.storage.key}"] for tensor in tensors.values()}
    with ThreadPoolExecutor(16) as pool:  # one small read each, which takes its time on a network
        offsets = dict(zip(used, pool.map(partial(_data_offset, file), used.values()), strict=True))
    stored = {}
    for name, tensor in tensors.items():
        storage, member = tensor.storage, used[tensor.storage.key]
        count = _count_in_rows(file, name, tensor)
        start, stop = tensor.first * storage.itemsize, (tensor.first + count) * storage.itemsize
        if member.compress_type != zipfile.ZIP_STORED or stop > member.file_size:
            raise ModelError(f"{file.url}: {name} does not lie whole in {member.filename}; download it again")
        stored[name] = StoredTensor(file, offsets[storage.key] + start, storage.kind, tensor.shape)
    return stored


def _count_in_rows(file: ByteFile, name: str, tensor: _Tensor) -> int:
    """How many elements a tensor has. Raises `ModelError` unless they lie row after row."""
    count = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size != 1 and stride != count:
            raise ModelError(f"{file.url}: the rows of {name} do not lie one after another; convert it to safetensors")
        count *= size
    return count


def _data_offset(file: ByteFile, member: zipfile.ZipInfo) -> int:
    """Behind the member's local header, whose extra field pads the data and may differ from the directory's."""
    header = file.read(member.header_offset, member.header_offset + _LOCAL_HEADER).tobytes()
    if header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no member at byte {member.header_offset}")
    sizes = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return member.header_offset + _LOCAL_HEADER + sizes
