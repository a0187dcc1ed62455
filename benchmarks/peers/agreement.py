"""Checks that two sides wrote the same activations, before their times are compared."""

import gzip
import pickle
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core.base.errors import RunError

# By layer, the samples as the default format stores them.
Shard = dict[int, list[dict[str, Any]]]


def read_shards(folder: Path, *, recursive: bool = True) -> Iterator[Shard]:
    """The shards of one side. They are unpickled, so they must come from this process."""
    for path in sorted(folder.glob(("**/" if recursive else "") + "shard_*.pkl.gz")):
        with gzip.open(path) as file:
            yield pickle.load(file)


def worst_disagreement(ours: Iterable[Shard], theirs: Iterable[Shard], layers: Sequence[int], n_samples: int) -> float:
    """The largest relative L2 distance of any sample at any layer.

    Raises RunError when a sample is missing, there twice, or differs in shape or preview.
    """
    expected = {(layer, item["sample_idx"]): item for shard in theirs for layer in shard for item in shard[layer]}
    seen, worst = set(), 0.0
    for shard in ours:
        for layer, items in shard.items():
            for item in items:
                key = (layer, item["sample_idx"])
                other = expected.get(key)
                if other is None or key in seen or any(item[name] != other[name] for name in ("shape", "text_preview")):
                    raise RunError(f"layer {layer}, sample_idx {item['sample_idx']}: the two sides hold other samples")
                seen.add(key)
                worst = max(worst, relative_distance(item["activation"], other["activation"]))
    if len(seen) != len(layers) * n_samples or len(expected) != len(seen):
        raise RunError(f"{len(seen)} and {len(expected)} activations where {len(layers) * n_samples} were asked for")
    return worst


def relative_distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The relative L2 distance over the whole sample, in float64."""
    exact = theirs.astype(np.float64)
    return float(np.linalg.norm(ours - exact) / np.linalg.norm(exact))
