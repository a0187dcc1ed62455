"""The matrix of `--project`: read, checked, and told apart from others by its content.

Axis letters: D width of the site, E width behind the projection, L stored layers.
"""

import hashlib
import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32

from core.errors import UsageError
from core.formats.safetensors_shard import read_tensors
from core.object_store import open_store

_MATRIX, _MEAN = "matrix", "mean"


@dataclass(frozen=True, eq=False)
class Projection:
    """(x - mean) @ matrix, one for all layers or one for each.

    Attributes:
      matrix: (1, D, E) or (L, D, E), the layers in their stored order.
      mean: (1, D) or (L, D).
      name: what messages call it.
    """

    matrix: Float32[np.ndarray, "L D E"]
    mean: Float32[np.ndarray, "L D"]
    name: str

    @property
    def out_width(self) -> int:
        """E."""
        return self.matrix.shape[2]

    def check(self, site: str, width: int, n_layers: int) -> None:
        """Raises UsageError when it is not for `n_layers` layers of a site of that width."""
        layers, rows, _ = self.matrix.shape
        if rows != width:
            raise UsageError(f"--project {self.name}: its matrix has {rows} rows, {site} is {width} wide")
        if layers not in (1, n_layers):
            raise UsageError(f"--project {self.name}: it has matrices for {layers} layers, {site} has {n_layers}")

    def to_json(self) -> dict[str, Any]:
        """What the plan keeps: a digest of the numbers, whatever file they came in."""
        digest = hashlib.sha256(repr(self.matrix.shape).encode())
        for array in (self.matrix, self.mean):
            digest.update(np.ascontiguousarray(array, "<f4").data)
        return {"digest": digest.hexdigest(), "width": self.out_width}


def read_projection(url: str) -> Projection:
    """Reads a .npy (the matrix alone), .npz or .safetensors (`matrix` and, if it is there, `mean`), local or gs://.

    matrix: (D, E), or (L, D, E) with one for each stored layer; mean: (D,) or (L, D). Raises UsageError in one line.
    """
    folder, _, name = url.rpartition("/")
    try:
        with open_store(folder or ("/" if url.startswith("/") else ".")).open(name) as stream:
            arrays = _arrays(stream.read(), url)
    except FileNotFoundError as error:
        raise UsageError(f"--project {url}: there is no such file") from error
    except OSError as error:
        raise UsageError(f"--project {url}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"--project {url}: it cannot be read ({error})") from error
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
        return {_MATRIX: loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    raise UsageError(f"--project {url}: expected a file that ends in .npy, .npz or .safetensors")


def _projection(matrix: np.ndarray, mean: np.ndarray | None, url: str) -> Projection:
    if matrix.ndim not in (2, 3) or 0 in matrix.shape:
        raise UsageError(f"--project {url}: {_MATRIX} has shape {matrix.shape}: expected (D, k) or (layers, D, k)")
    if matrix.ndim == 2:
        matrix = matrix[None]
    layers, rows, _ = matrix.shape
    if mean is None:
        mean = np.zeros((layers, rows), np.float32)
    if mean.shape not in ((rows,), (layers, rows)):
        raise UsageError(f"--project {url}: {_MEAN} has shape {mean.shape}: expected ({rows},)")
    mean = np.broadcast_to(mean, (layers, rows))
    for name, array in ((_MATRIX, matrix), (_MEAN, mean)):
        # 'V' is what numpy calls the floats of ml_dtypes.
        if array.dtype.kind not in "fV":
            raise UsageError(f"--project {url}: {name} is {array.dtype}: expected floating-point numbers")
    matrix, mean = matrix.astype(np.float32), mean.astype(np.float32)
    if not (np.isfinite(matrix).all() and np.isfinite(mean).all()):
        raise UsageError(f"--project {url}: it holds NaN or infinity")
    return Projection(matrix, mean, url)
