"""Which items go into which file: in their order, or shuffled. A block is (part, first item, one past the last)."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int64

Block = tuple[int, int, int]
_BLOCKS, _ITEMS = range(2)


def blocks_in_order(counts: Sequence[int]) -> list[Block]:
    """A block for each part."""
    return [(part, 0, count) for part, count in enumerate(counts) if count]


def shuffled_blocks(counts: Sequence[int], size: int, seed: int) -> list[Block]:
    """Blocks of `size` neighbouring items, in an order that depends on the counts, the size and the seed alone."""
    blocks = [
        (part, first, min(first + size, count)) for part, count in enumerate(counts) for first in range(0, count, size)
    ]
    return [blocks[place] for place in permutation(len(blocks), seed, _BLOCKS).tolist()]


def cut_blocks(blocks: Sequence[Block], ends: Sequence[int]) -> Iterator[tuple[Block, ...]]:
    """The blocks of each file: file k has items ends[k - 1] to ends[k] - 1 of the sequence that the blocks make."""
    queue, start = iter(blocks), 0
    rest: Block | None = None
    for end in ends:
        taken: list[Block] = []
        while start < end:
            part, first, last = next(queue) if rest is None else rest
            stop = min(last, first + end - start)
            taken.append((part, first, stop))
            rest = (part, stop, last) if stop < last else None
            start += stop - first
        yield tuple(taken)


def file_order(n_items: int, seed: int, number: int) -> Int64[np.ndarray, "I"]:
    """The order of the items of a shuffled file."""
    return permutation(n_items, seed, _ITEMS, number)


def permutation(n: int, *key: int) -> Int64[np.ndarray, "n"]:
    """A permutation that depends on n and the key alone."""
    # Raw PCG64 words are the only random stream that numpy guarantees across versions.
    return np.argsort(np.random.PCG64(np.random.SeedSequence(list(key))).random_raw(n), kind="stable")
