"""The items of a file as arrays. Axis letters: see `analysis.exporting`."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32, Int64, Shaped

from analysis.exporting.items.order import file_order
from analysis.exporting.targets.base import FileContent


@dataclass(frozen=True)
class PaddedItems:
    """Items of C rows; shorter ones are followed by zeros. mask: whether a row is there."""

    values: Shaped[np.ndarray, "I C D"]
    token_ids: Int32[np.ndarray, "I C"]
    mask: Bool[np.ndarray, "I C"]
    sample_idx: Int64[np.ndarray, "I"]


@dataclass(frozen=True)
class FlatRows:
    """All rows of a file, one after the other; item i has rows offsets[i] to offsets[i + 1]."""

    values: Shaped[np.ndarray, "N D"]
    token_ids: Int32[np.ndarray, "N"]
    positions: Int32[np.ndarray, "N"]
    sample_idx: Int64[np.ndarray, "I"]
    offsets: Int64[np.ndarray, "I_plus_1"]


def padded_items(content: FileContent, *, shuffle: bool = False) -> PaddedItems:
    """The items of a file, padded to `request.item_rows`; shuffled by the seed and the number of the file."""
    request = content.request
    shape = content.n_items, request.item_rows
    values = np.zeros((*shape, request.width), request.numpy_dtype)
    token_ids, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    sample_idx = np.empty(content.n_items, np.int64)
    order = file_order(content.n_items, request.seed, content.number) if shuffle else np.arange(content.n_items)
    done = 0
    for block in content.blocks():
        places = order[done : done + len(block.lengths)]
        items = np.repeat(places, block.lengths)
        columns = np.arange(len(items)) - np.repeat(np.cumsum(block.lengths) - block.lengths, block.lengths)
        values[items, columns] = block.values
        token_ids[items, columns], mask[items, columns] = block.token_ids, True
        sample_idx[places] = block.sample_idx
        done += len(block.lengths)
    return PaddedItems(values, token_ids, mask, sample_idx)


def flat_rows(content: FileContent) -> FlatRows:
    """The rows of a file."""
    n_rows = content.n_rows
    values = np.empty((n_rows, content.request.width), content.request.numpy_dtype)
    token_ids, positions = np.empty(n_rows, np.int32), np.empty(n_rows, np.int32)
    sample_idx, lengths, done = [np.empty(0, np.int64)], [np.zeros(1, np.int64)], 0
    for block in content.blocks():
        stop = done + len(block.values)
        values[done:stop], token_ids[done:stop], positions[done:stop] = block.values, block.token_ids, block.positions
        sample_idx.append(block.sample_idx)
        lengths.append(block.lengths)
        done = stop
    return FlatRows(values, token_ids, positions, np.concatenate(sample_idx), np.cumsum(np.concatenate(lengths)))
