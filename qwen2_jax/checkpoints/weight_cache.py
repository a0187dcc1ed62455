"""Converted weights, written once with Orbax and taken by every later start.

    DIR/<model digest>-<dtype>-<layout>/<name>/         an Orbax checkpoint: the decoder's stacked parameters, cast
    DIR/<model digest>-<dtype>-<layout>/complete.json   written last: which <name> counts, and what its files must be

What `complete.json` does not name does not count. <layout> changes with the names and shapes of the parameters, so that
a version of this package does not find what one with other parameters has written. The rows of matrices are stored in
chunks, (layers, chunks, rows of a chunk, columns) with rows of zeros at the end, so that any part of any layer can be
read alone from a disk or a bucket: the cache is one more source of weights for `placement`.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from core.base.errors import ModelError
from qwen2_jax.checkpoints.files import files_below, is_remote, replace_file
from qwen2_jax.checkpoints.placement import Placement, place
from qwen2_jax.parameters import ParamSpec
from qwen2_jax.sharding import ModelMesh

_FORMAT = 2  # of the marker, and of how parameters are chunked
_CHUNK_BYTES = 1 << 20
_MARKER = "complete.json"


Params = dict[str, jax.Array]


class DamagedCacheError(ModelError):
    """Cached weights cannot be used; the checkpoint can."""


@dataclass(frozen=True)
class CachedArray:
    """A parameter in the cache, or one layer of it. Satisfies `placement.LayerArray`.

    chunk_rows: None for a vector, which is not cut into chunks.
    """

    store: Any
    layer: int | None
    chunk_rows: int | None
    transposed: bool = False

    def read(self, rows: slice, columns: slice | None) -> np.ndarray:
        """Part of the array."""
        store = self.store if self.layer is None else self.store[self.layer]
        if self.chunk_rows is None:
            return _read(store[rows])
        first, last = rows.start // self.chunk_rows, -(-rows.stop // self.chunk_rows)
        chunks = _read(store[first:last, :, columns])
        offset = first * self.chunk_rows
        return chunks.reshape(-1, chunks.shape[-1])[rows.start - offset : rows.stop - offset]


def _read(view: Any) -> np.ndarray:
    try:
        return view.read().result()
    except ValueError as error:  # what tensorstore raises for anything unreadable
        raise DamagedCacheError(str(error).splitlines()[0]) from error


class WeightCache:
    """The cached weights of one model in one dtype. specs: of all its parameters."""

    def __init__(self, folder: str, digest: str, dtype: str, specs: Mapping[str, ParamSpec]) -> None:
        root = folder if is_remote(folder) else str(Path(folder).expanduser().absolute())
        self.url, self._dtype = f"{root.rstrip('/')}/{digest}-{dtype}-{_layout_of(specs)}", dtype

    def read(self) -> CompleteCache | None:
        """What is there; None when there is nothing. Raises `DamagedCacheError`."""
        files = files_below(self.url)
        if _MARKER not in files:
            return None
        try:
            marker = json.loads(files[_MARKER].read(0, files[_MARKER].size).tobytes())
            expected = {f"{marker['name']}/{name}": tuple(stated) for name, stated in marker["files"].items()}
            complete = CompleteCache(f"{self.url}/{marker['name']}", marker["parameters"])
            is_ours = marker["format"] == _FORMAT and marker["dtype"] == self._dtype
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedCacheError(f"{self.url}/{_MARKER} cannot be understood") from error
        if not is_ours:
            raise DamagedCacheError(f"{self.url} was written by another version")
        for name, (size, crc32c) in expected.items():
            if name not in files or (files[name].size, files[name].crc32c()) != (size, crc32c):
                raise DamagedCacheError(f"{self.url}/{name} is missing or not as it was written")
        return complete

    def write(self, params: Mapping[str, jax.Array]) -> int:
        """Writes all parameters; returns the bytes. A cache that is there counts until the new one is complete."""
        name = uuid.uuid4().hex[:12]
        _save(f"{self.url}/{name}", params)
        files = {
            path.removeprefix(f"{name}/"): (file.size, file.crc32c())
            for path, file in files_below(self.url).items()
            if path.startswith(f"{name}/")
        }
        marker = {
            "format": _FORMAT,
            "dtype": self._dtype,
            "name": name,
            "parameters": {param: list(array.shape) for param, array in params.items()},
            "files": files,
        }
        replace_file(f"{self.url}/{_MARKER}", json.dumps(marker, indent=1).encode())
        return sum(size for size, _ in files.values())


def _layout_of(specs: Mapping[str, ParamSpec]) -> str:
    """A digest of what the parameters are and how they are stored."""
    described = [_FORMAT, *sorted((name, spec.shape, spec.axes) for name, spec in specs.items())]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class CompleteCache:
    """Cached weights whose files are all there. shapes: of every parameter."""

    url: str
    shapes: Mapping[str, list[int]]

    def load(self, specs: Mapping[str, ParamSpec], dtype: np.dtype, mesh: ModelMesh | None) -> Params:
        """The parameters on the devices, as many layers of each as its spec has. Raises `DamagedCacheError`."""
        stores = self._open(specs)
        placements = {}
        for name, spec in specs.items():
            stacked = spec.stacked
            layers = range(spec.shape[0]) if stacked else (None,)
            chunk_rows = stores[name].shape[-2] if len(spec.axes) - stacked == 2 else None
            arrays = tuple(CachedArray(stores[name], layer, chunk_rows) for layer in layers)
            sharding = None if mesh is None else mesh.sharding(spec.axes)
            placements[name] = Placement(spec.shape, sharding, arrays, stacked)
        return place(placements, dtype, from_network=is_remote(self.url))

    def _open(self, specs: Mapping[str, ParamSpec]) -> dict[str, Any]:
        import tensorstore

        kvstore = {"driver": "ocdbt", "base": self.url if is_remote(self.url) else f"file://{self.url}/"}
        context = tensorstore.Context()
        opened = {}
        for name, spec in specs.items():
            if name not in self.shapes:
                raise DamagedCacheError(f"{self.url}: parameter {name} is missing")
            whole = tuple(self.shapes[name])
            first = int(spec.stacked)
            if len(whole) != len(spec.shape) or whole[first:] != spec.shape[first:] or whole < spec.shape:
                raise DamagedCacheError(f"{self.url}: {name} has shape {whole} where {spec.shape} is needed")
            described = {"driver": "zarr3", "kvstore": {**kvstore, "path": f"{name}/"}}
            opened[name] = tensorstore.open(described, context=context, open=True, read=True)
        try:
            return {name: future.result() for name, future in opened.items()}
        except ValueError as error:
            raise DamagedCacheError(f"{self.url}: {str(error).splitlines()[0]}") from error


def load_cached(
    cache: WeightCache, specs: Mapping[str, ParamSpec], dtype: np.dtype, mesh: ModelMesh | None
) -> Params | None:
    """The parameters from the cache; None, and a line in the log, where it cannot give them."""
    try:
        complete = cache.read()
        return None if complete is None else complete.load(specs, dtype, mesh)
    except ModelError as error:
        logging.warning("cached weights: %s; reading the checkpoint (convert_checkpoint.py writes them anew)", error)
        return None


def _save(url: str, params: Mapping[str, jax.Array]) -> None:
    import orbax.checkpoint as ocp

    arrays = {name: _chunked(np.asarray(array), name.startswith("layers.")) for name, array in params.items()}
    # All but the rows of a chunk and the columns are axes that Orbax is to cut to 1.
    args = {name: ocp.SaveArgs(shard_axes=tuple(range(array.ndim - 2))) for name, array in arrays.items()}
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(url, args=ocp.args.PyTreeSave(arrays, save_args=args))


def _chunked(array: np.ndarray, stacked: bool) -> np.ndarray:
    """(L, out, in) as (L, chunks, rows, in), (out, in) as (chunks, rows, in); vectors stay as they are."""
    if array.ndim - stacked < 2:
        return array
    *layers, rows, columns = array.shape
    most = max(1, _CHUNK_BYTES // (columns * array.itemsize))
    chunk = max(size for size in range(1, min(most, rows) + 1) if rows % size == 0)
    if chunk * 4 <= most and chunk < rows:  # no good divisor: end with rows of zeros
        chunk = min(most, rows)
        array = np.pad(array, [(0, 0)] * len(layers) + [(0, -rows % chunk), (0, 0)])
    return array.reshape(*layers, -1, chunk, columns)


def exists(folder: str) -> bool:
    """Whether there may be cached weights: says no only where there is no such local folder."""
    return is_remote(folder) or Path(folder).expanduser().is_dir()
