"""A whitening as a safetensors file, local or in a bucket: equal whitenings have equal bytes.

Tensors `mean` (D), `transform` (D, K) and `inverse` (K, D), float64; what else is known of it is metadata.
Format: https://huggingface.co/docs/safetensors.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from analysis.whitening.settings import WhiteningSettings
from analysis.whitening.whitening import Whitening
from core.base.errors import UsageError
from core.base.safetensors_file import read_metadata, read_tensors, safetensors_header
from core.object_store import open_store
from core.object_store.single_file import folder_and_name, read_file

_TENSORS = ("mean", "transform", "inverse")


def save_whitening(whitening: Whitening, url: str) -> None:
    """Writes the file, or replaces it in one step."""
    write_tensors(url, tensors_of(whitening), metadata_of(whitening))


def load_whitening(url: str) -> Whitening:
    """Reads what `save_whitening` wrote. Raises UsageError in one line for a file that is missing or another one."""
    data = read_file(url)
    with reading_whitening(url):
        return whitening_of(read_tensors(data), read_metadata(data))


def save_projection(whitening: Whitening, url: str) -> None:
    """Writes `matrix` and `mean` in float32, for `extract_activations.py --project`, which stores whitened rows."""
    tensors = {"matrix": whitening.transform.astype(np.float32), "mean": whitening.mean.astype(np.float32)}
    write_tensors(url, tensors, metadata_of(whitening))


def metadata_of(whitening: Whitening) -> dict[str, str]:
    """What `whitening_of` reads besides the tensors, and `kept`; floats keep every bit."""
    own = {
        "n_samples": whitening.n_samples,
        "rank": whitening.rank,
        "kept": whitening.kept,
        "shrinkage_amount": whitening.shrinkage_amount,
    }
    return whitening.settings.to_metadata() | {name: str(value) for name, value in own.items()}


def tensors_of(whitening: Whitening) -> dict[str, np.ndarray]:
    """What `whitening_of` reads besides the metadata."""
    return {name: getattr(whitening, name) for name in _TENSORS}


def whitening_of(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> Whitening:
    """The inverse of `tensors_of` and `metadata_of`. Raises KeyError or ValueError for what is missing or wrong."""
    mean, transform, inverse = (np.asarray(tensors[name], np.float64) for name in _TENSORS)
    if mean.ndim != 1 or transform.ndim != 2 or len(transform) != len(mean) or inverse.T.shape != transform.shape:
        raise ValueError(f"mean, transform and inverse have shapes {mean.shape}, {transform.shape}, {inverse.shape}")
    n_samples, rank, amount = int(metadata["n_samples"]), int(metadata["rank"]), float(metadata["shrinkage_amount"])
    return Whitening(mean, transform, inverse, n_samples, WhiteningSettings.from_metadata(metadata), rank, amount)


@contextmanager
def reading_whitening(url: str) -> Iterator[None]:
    """Turns what reading another file raises into a UsageError of one line."""
    try:
        yield
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise UsageError(f"{url}: it is not a whitening ({' '.join(str(error).split())})") from error


def write_tensors(url: str, tensors: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, or replaces it in one step. Tensors of 8 bytes first keep all of them aligned."""
    ordered = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    folder, name = folder_and_name(url)
    data = b"".join([safetensors_header(ordered, metadata), *(tensor.tobytes() for tensor in ordered.values())])
    open_store(folder).replace_bytes(name, data)
