"""A mean vector as a file: `mean_vector_short.pkl`, a pickle of one dict of plain data and three arrays.

Axis letters: W width of a vector.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from analysis.mean_vectors.stored.batches import dump_plain
from analysis.mean_vectors.stored.names import ARRAYS, mean_name
from analysis.mean_vectors.stored.plain_pickle import load_plain
from core.base.errors import RunError, UsageError
from core.base.json_types import require_all, require_types
from core.object_store import ObjectStore

_KINDS: dict[str, tuple[type, ...]] = {
    "mean": (np.ndarray,),
    "normalized": (np.ndarray,),
    "standard_error": (np.ndarray,),
    "count": (int,),
    "mode": (str,),
    "layers": (list,),
    "model_digest": (str,),
}


@dataclass(frozen=True)
class MeanVector:
    """The mean of `count` vectors.

    Attributes:
      normalized: the mean divided by its L2 norm; zeros where the mean is zero.
      standard_error: of each dimension of the mean; NaN where count is 1.
    """

    mean: Float32[np.ndarray, "W"]
    normalized: Float32[np.ndarray, "W"]
    standard_error: Float32[np.ndarray, "W"]
    count: int
    mode: str
    layers: tuple[int, ...]
    model_digest: str

    @property
    def norm(self) -> float:
        """The L2 norm of the mean."""
        return float(np.linalg.norm(self.mean.astype(np.float64)))

    def array(self, name: str) -> Float32[np.ndarray, "W"]:
        """One of `ARRAYS` by its name."""
        return getattr(self, name)


def encode_mean(mean: MeanVector) -> bytes:
    """The bytes of the file: equal means have equal bytes."""
    arrays = {name: np.ascontiguousarray(mean.array(name)) for name in ARRAYS}
    facts = {"mode": mean.mode, "layers": list(mean.layers), "model_digest": mean.model_digest}
    return dump_plain(arrays | {"count": mean.count} | facts)


def decode_mean(data: bytes) -> MeanVector:
    """The mean in the bytes of a file. Raises ValueError saying what is wrong with them."""
    value = load_plain(data)
    require_types(value, _KINDS)
    require_all(value["layers"], int, "layers")
    if any(value[name].dtype != np.float32 or value[name].ndim != 1 for name in ARRAYS):
        raise ValueError("its arrays are not vectors of float32")
    if len({len(value[name]) for name in ARRAYS}) != 1 or not np.isfinite(value["mean"]).all():
        raise ValueError("its vectors are not finite, or not of one length")
    return MeanVector(
        **{name: value[name] for name in ARRAYS},
        count=value["count"],
        mode=value["mode"],
        layers=tuple(value["layers"]),
        model_digest=value["model_digest"],
    )


def read_mean(store: ObjectStore, mode: str) -> MeanVector:
    """The stored mean of a mode. Raises UsageError where there is none, RunError for a damaged one."""
    name = mean_name(mode)
    try:
        mean = decode_mean(store.read_bytes(name))
    except FileNotFoundError:
        raise UsageError(f"{store.url}: it has no {name}: the run of that mode is missing or unfinished") from None
    except ValueError as error:
        raise RunError(f"{store.url}/{name}: damaged ({error}): run the command that made it again") from error
    return mean
