"""Mean vectors in the formats of other tools: safetensors, npy, pt."""

import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from analysis.mean_vectors.modes import POOLS
from analysis.mean_vectors.stored.means import MeanVector, read_mean
from analysis.mean_vectors.stored.metadata import read_metadata
from analysis.mean_vectors.stored.names import ARRAYS
from core.base.errors import RunError, UsageError
from core.base.safetensors_file import safetensors_header
from core.object_store import open_store
from core.object_store.single_file import create_result

Arrays = Mapping[str, np.ndarray]


def export_means(folder: str, to: str, output: str, mode: str | None, array: str) -> tuple[str, ...]:
    """Writes the means of a folder to one file, create-only; returns the names of the arrays in it.

    mode: None: every mode of the folder. array: which of `ARRAYS` an npy file holds, which has room for one. Raises
    UsageError for what the folder does not have, and where `output` exists with other content.
    """
    store = open_store(folder)
    metadata = read_metadata(store)
    if metadata is None:
        raise UsageError(f"{store.url}: no metadata.json: it is not an output of `mean`")
    stored = metadata.identity["mode"]
    modes = (mode,) if mode else tuple(name for name in POOLS if stored in (name, "both"))
    if to == "npy" and len(modes) > 1:
        raise UsageError(f"--to npy: the file has room for one vector: add --mode {' or '.join(modes)}")
    means = [read_mean(store, name) for name in modes]
    wanted = (array,) if to == "npy" else ARRAYS
    arrays = {f"{name}_{mean.mode}": mean.array(name) for mean in means for name in wanted}
    create_result(output, WRITERS[to](arrays, _facts(means)))
    return tuple(arrays)


def _facts(means: list[MeanVector]) -> dict[str, Any]:
    counts = {f"count_{mean.mode}": mean.count for mean in means}
    return counts | {"layers": list(means[0].layers), "model_digest": means[0].model_digest}


def _safetensors(arrays: Arrays, facts: dict[str, Any]) -> bytes:
    texts = {name: json.dumps(value) for name, value in facts.items()}
    return safetensors_header(dict(arrays), texts) + b"".join(array.tobytes() for array in arrays.values())


def _npy(arrays: Arrays, facts: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, next(iter(arrays.values())), allow_pickle=False)
    return stream.getvalue()


def _pt(arrays: Arrays, facts: dict[str, Any]) -> bytes:
    try:
        import torch
    except ImportError as error:
        raise RunError("--to pt needs torch: pip install -c constraints.txt -e '.[torch]'") from error
    stream = io.BytesIO()
    torch.save({name: torch.from_numpy(array.copy()) for name, array in arrays.items()} | facts, stream)
    return stream.getvalue()


WRITERS: dict[str, Callable[[Arrays, dict[str, Any]], bytes]] = {"safetensors": _safetensors, "npy": _npy, "pt": _pt}
