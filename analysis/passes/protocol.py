"""What a pass is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

Part = TypeVar("Part", contravariant=True)
Partial = TypeVar("Partial")
Result = TypeVar("Result", covariant=True)


@dataclass(frozen=True)
class PartFacts:
    """What the runners say of a part without reading it.

    Attributes:
      name: for people, such as `tpu_0/residual/shard_0007.planes`.
      n_bytes: what `map` reads, for the rate and the time left.
      identity: plain values that decide its content, such as the checksums of its files.
    """

    name: str
    n_bytes: int
    identity: Any


class Pass(Protocol[Part, Partial, Result]):
    """One computation over parts: pure, and picklable with its parts and partials.

    Attributes:
      name: in lower case, without spaces: a folder is named after it.
      version: raised whenever the code would give other partials.
      settings: plain values; with name and version they decide what `map` gives for a part.
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...

    @property
    def settings(self) -> Mapping[str, Any]: ...

    def facts(self, part: Part) -> PartFacts:
        """Of a part, by its record alone."""

    def map(self, part: Part) -> Partial:
        """Reads one part. Raises RunError in one line that names the file and says what to do."""

    def merge(self, a: Partial, b: Partial) -> Partial:
        """Of the parts of both, `a` before `b`; neither is changed."""

    def finish(self, partial: Partial) -> Result:
        """The result, from the partial of all parts."""

    def pack(self, partial: Partial) -> bytes:
        """A partial as bytes, every bit of it."""

    def unpack(self, data: bytes) -> Partial:
        """The inverse of `pack`. Raises ValueError, KeyError or TypeError for other bytes."""
