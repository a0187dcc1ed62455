"""The matrix of `--project`: read, checked, and identified by its content.

Axis letters: D width of the site, E width after the projection, L stored layers.
"""

import hashlib
import io
import lzma
import tokenize
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32

from core.base.dtypes import CODE_DTYPES, DTYPES
from core.base.errors import UNREADABLE, UsageError
from core.base.safetensors_file import read_tensors
from core.object_store.single_file import read_file

_MATRIX, _MEAN = "matrix", "mean"
_BFLOAT16 = DTYPES["bfloat16"]
# The floats of ml_dtypes, which do not have numpy's kind "f".
_FLOATS_BESIDE_NUMPY = (_BFLOAT16, CODE_DTYPES["float8_e4m3fn"])
_UNREADABLE = (*UNREADABLE, SyntaxError, lzma.LZMAError, tokenize.TokenError, zipfile.BadZipFile)


@dataclass(frozen=True, eq=False)
class Projection:
    """(x - mean) @ matrix, each one for all layers or one for each.

    Attributes:
      matrix: (M, D, E), M = 1 or L, the layers in their stored order.
      mean: (N, D), N = 1 or L.
      name: its name in messages.
    """

    matrix: Float32[np.ndarray, "M D E"]
    mean: Float32[np.ndarray, "N D"]
    name: str

    @property
    def out_width(self) -> int:
        """E, the width of a projected row."""
        return self.matrix.shape[2]

    def check(self, site: str, width: int, n_layers: int) -> None:
        """Raises UsageError if it does not fit `n_layers` layers of a site of that width."""
        rows = self.matrix.shape[1]
        if rows != width:
            raise UsageError(f"--project {self.name}: its matrix has {rows} rows, {site} is {width} wide")
        for what, array in (("matrices", self.matrix), ("means", self.mean)):
            if len(array) not in (1, n_layers):
                layers = f"{what} for {len(array)} layers"
                raise UsageError(f"--project {self.name}: it has {layers}, {site} has {n_layers}")

    def to_json(self) -> dict[str, Any]:
        """A digest of the numbers, independent of their file, for the identity."""
        digest = hashlib.sha256(repr(self.matrix.shape).encode())
        for array in (self.matrix, self.mean):
            digest.update(np.ascontiguousarray(array, "<f4").data)
        return {"digest": digest.hexdigest(), "width": self.out_width}


def read_projection(url: str) -> Projection:
    """Reads a .npy (the matrix alone), .npz or .safetensors (`matrix` and, if it is there, `mean`), local or gs://.

    matrix: (D, E), or (L, D, E) with one for each stored layer; mean: (D,) or (L, D), also of one matrix.
    Raises UsageError in one line.
    """
    try:
        data = read_file(url)
    except UsageError as error:
        raise UsageError(f"--project {error}") from error
    try:
        arrays = _arrays(data, url)
    except _UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"--project {url}: it cannot be read ({reason})") from error
    unknown = arrays.keys() - {_MATRIX, _MEAN}
    if _MATRIX not in arrays or unknown:
        found = ", ".join(sorted(arrays)) or "nothing"
        raise UsageError(f"--project {url}: it holds {found}: expected {_MATRIX} and, if there is one, {_MEAN}")
    return _projection(arrays[_MATRIX], arrays.get(_MEAN), url)


def _arrays(data: bytes, url: str) -> Mapping[str, np.ndarray]:
    if url.endswith(".safetensors"):
        return read_tensors(data)
    if url.endswith((".npy", ".npz")):
        loaded = np.load(io.BytesIO(data), allow_pickle=False)
        arrays = {_MATRIX: loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
        for name, array in arrays.items():
            # numpy gives the bytes of a member that does not begin as an array does.
            if not isinstance(array, np.ndarray):
                raise ValueError(f"{name} is no array")
        return arrays
    raise UsageError(f"--project {url}: expected a file that ends in .npy, .npz or .safetensors")


def _projection(matrix: np.ndarray, mean: np.ndarray | None, url: str) -> Projection:
    if matrix.ndim not in (2, 3) or 0 in matrix.shape:
        raise UsageError(f"--project {url}: {_MATRIX} has shape {matrix.shape}: expected (D, k) or (layers, D, k)")
    if matrix.ndim == 2:
        matrix = matrix[None]
    layers, rows, _ = matrix.shape
    if mean is None:
        mean = np.zeros(rows, np.float32)
    # One matrix may have a mean for each layer, however many the run stores.
    means = mean.shape[0] if mean.ndim == 2 and mean.size and layers == 1 else layers
    if mean.shape not in ((rows,), (means, rows)):
        several = layers if layers > 1 else "layers"
        raise UsageError(f"--project {url}: {_MEAN} has shape {mean.shape}: expected ({rows},) or ({several}, {rows})")
    if mean.ndim == 1:
        mean = np.broadcast_to(mean, (layers, rows))
    matrix, mean = (_floats(name, array, url) for name, array in ((_MATRIX, matrix), (_MEAN, mean)))
    return Projection(matrix, mean, url)


def _floats(name: str, array: np.ndarray, url: str) -> Float32[np.ndarray, "..."]:
    """Raises UsageError for anything but finite floating-point numbers."""
    if array.dtype == np.dtype("V2"):
        # numpy reads a bfloat16 array from its own files as this dtype.
        array = array.view(_BFLOAT16)
    if array.dtype.kind != "f" and array.dtype not in _FLOATS_BESIDE_NUMPY:
        raise UsageError(f"--project {url}: {name} is {array.dtype}: expected floating-point numbers")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise UsageError(f"--project {url}: it holds NaN or infinity")
    return array
