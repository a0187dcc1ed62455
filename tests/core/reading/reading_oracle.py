"""What the tests of reading know of a run without our reader: its safetensors shards, read by their own package."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from core.reading import TokenBatch

Key = tuple[str, int, int]


def exact_rows(out: Path, site: str, layer: int) -> dict[Key, tuple[int, np.ndarray]]:
    """(folder, sample_idx, position) → token id and activation in float32, of safetensors shards."""
    rows: dict[Key, tuple[int, np.ndarray]] = {}
    for path in sorted(out.rglob("shard_*.safetensors")):
        if path.parent.name != site and len(path.relative_to(out).parts) != 2:
            continue
        tensors = load_file(path)
        offsets, folder = tensors["sample_offsets"], path.relative_to(out).parts[0]
        for sample, index in enumerate(tensors["sample_idx"].tolist()):
            for row in range(offsets[sample], offsets[sample + 1]):
                place = int(tensors["positions"][row]) if "positions" in tensors else row - int(offsets[sample])
                values = tensors[f"layer_{layer}"][row].astype(np.float32)
                rows[folder, index, place] = int(tensors["token_ids"][row]), values
    return rows


def keys(batches: list[TokenBatch], folders: tuple[str, ...]) -> list[Key]:
    """Which token each row of the batches is."""
    return [
        (folders[folder], int(sample), int(place))
        for batch in batches
        for folder, sample, place in zip(batch.folders, batch.sample_idx, batch.positions, strict=True)
    ]


def assert_exact(batches: list[TokenBatch], folders: tuple[str, ...], exact: dict) -> None:
    """Every row of the batches is that of the oracle."""
    rows = np.concatenate([batch.activations for batch in batches])
    ids = np.concatenate([batch.token_ids for batch in batches])
    wanted = [exact[key] for key in keys(batches, folders)]
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, np.stack([values for _, values in wanted]))
    np.testing.assert_array_equal(ids, [token for token, _ in wanted])


def same(one: list[TokenBatch], other: list[TokenBatch]) -> bool:
    """Whether two lists of batches are equal to the last bit."""
    if len(one) != len(other):
        return False
    names = ("activations", "sample_idx", "positions", "token_ids", "folders")
    return all(
        getattr(a, n).tobytes() == getattr(b, n).tobytes() for a, b in zip(one, other, strict=True) for n in names
    )
