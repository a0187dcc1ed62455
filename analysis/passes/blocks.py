"""The unit of work: a few parts in a row, mapped and merged where they are, and stored as one partial."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from analysis.passes.merge_tree import MergeTree
from analysis.passes.partials import PartialStore, partial_key
from analysis.passes.protocol import Pass

Part = TypeVar("Part")
Partial = TypeVar("Partial")


@dataclass(frozen=True)
class PartBlock(Generic[Part]):
    """Parts number * size to number * size + len(parts) - 1."""

    number: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class MappedBlock(Generic[Partial]):
    """The partial of a block; `was_stored`: by an earlier run."""

    number: int
    partial: Partial
    n_parts: int
    n_bytes: int
    was_stored: bool


@dataclass(frozen=True)
class BlockTask(Generic[Part, Partial]):
    """What a worker does with a block. Picklable; opens stores where it runs."""

    a_pass: Pass[Part, Partial, Any]
    partials: PartialStore | None

    def __call__(self, block: PartBlock[Part]) -> MappedBlock[Partial]:
        """Takes the stored partial of the block, or computes and stores it."""
        facts = [self.a_pass.facts(part) for part in block.parts]
        n_bytes = sum(fact.n_bytes for fact in facts)
        key = partial_key(self.a_pass, [fact.identity for fact in facts])
        stored = None if self.partials is None else self.partials.read(self.a_pass, key)
        if stored is not None:
            return MappedBlock(block.number, stored, len(facts), n_bytes, was_stored=True)
        tree = MergeTree[Partial](len(block.parts), self.a_pass.merge)
        for number, part in enumerate(block.parts):
            tree.add(number, self.a_pass.map(part))
        partial = tree.root()
        if self.partials is not None:
            partial = self.partials.create(self.a_pass, key, partial)
        return MappedBlock(block.number, partial, len(facts), n_bytes, was_stored=False)


def blocks_of(parts: Sequence[Part], size: int) -> Iterator[PartBlock[Part]]:
    """Runs of `size` parts, a power of two: then the result does not depend on it."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"blocks of {size} parts: expected a power of two")
    for number, start in enumerate(range(0, len(parts), size)):
        yield PartBlock(number, tuple(parts[start : start + size]))
