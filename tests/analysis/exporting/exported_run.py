"""A small committed run, and its samples as the safetensors package reads them."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from benchmarks.storage.synthetic_run import SyntheticRun, write_run

WINDOWS = [[5, 1, 9], [3, 30, 2, 7], [8]]
LAYER, WIDTH = 2, 6
SITES = {"mlp": ((0,), 4), "residual": ((0, LAYER), WIDTH)}


@dataclass(frozen=True)
class Sample:
    """One sample of the run: rows of the residual after layer 2, and their tokens."""

    sample_idx: int
    values: np.ndarray
    token_ids: np.ndarray
    positions: np.ndarray


def make_run(out: Path, **more) -> Path:
    """Commits a run of random values; float16 unless `more` says otherwise."""
    write_run(out, SyntheticRun(SITES, **{"dtype": "float16"} | more), WINDOWS)
    return out


def samples_of(out: Path) -> list[Sample]:
    """All samples of a run in the format safetensors, read by the package."""
    found = []
    for path in sorted(out.glob("tpu_0/residual/shard_*.safetensors")):
        tensors = load_file(path)
        offsets = tensors["sample_offsets"]
        for number, (start, stop) in enumerate(itertools.pairwise(offsets)):
            rows = slice(start, stop)
            places = tensors["positions"][rows] if "positions" in tensors else np.arange(stop - start)
            found.append(
                Sample(
                    int(tensors["sample_idx"][number]),
                    tensors[f"layer_{LAYER}"][rows],
                    tensors["token_ids"][rows],
                    places,
                )
            )
    return found


def contexts(samples: list[Sample], size: int, *, keeps_short: bool, skip: int = 0) -> list[tuple[np.ndarray, ...]]:
    """(values, token ids) of every run of `size` tokens; skip: tokens at the start of each sample."""
    cut = []
    for sample in samples:
        for start in range(skip, len(sample.values), size):
            rows = slice(start, start + size)
            if keeps_short or len(sample.values[rows]) == size:
                cut.append((sample.values[rows], sample.token_ids[rows]))
    return cut


def rows_as_set(rows: np.ndarray) -> list[bytes]:
    """Rows in an order of their own, to compare what may be shuffled."""
    return sorted(np.ascontiguousarray(row).tobytes() for row in rows)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
