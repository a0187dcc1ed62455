"""Which stored tokens a reader leaves out: by position, by token id, by kind of token.

Axis letters: k rows of a range.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64

from core.base.errors import UsageError
from core.reading.shard_part import PartRows
from core.samples.selection import parse_positions, token_facts

FIRST = "first"
_KINDS = ("bos", "pad", "eos", "special")
Rule = str | int


@dataclass(frozen=True)
class Dropping:
    """Rules that leave tokens out; a token is dropped if any of them applies.

    Attributes:
      token_ids: dropped wherever they stand.
      positions: ranges as Python slices a sample's tokens (those that the model saw).
    """

    token_ids: tuple[int, ...] = ()
    positions: tuple[tuple[int | None, int | None], ...] = ()

    def kept(
        self,
        rows: PartRows,
        samples: Int64[np.ndarray, "k"],
        positions: Int32[np.ndarray, "k"],
        token_ids: Int32[np.ndarray, "k"],
    ) -> Bool[np.ndarray, "k"] | None:
        """Which rows of a part stay, by their `PartRows.token_index`; None: all."""
        if not self.token_ids and not self.positions:
            return None
        dropped = np.isin(token_ids, self.token_ids)
        for first, last in self.positions:
            lengths: Any = None
            if min(first or 0, last or 0) < 0:
                lengths = rows.sample_lengths[samples]
            is_inside = positions >= _end(first or 0, lengths)
            if last is not None:
                is_inside &= positions < _end(last, lengths)
            dropped |= is_inside
        return ~dropped if dropped.any() else None


def _end(end: int, lengths: Any) -> Any:
    """An end of a slice as a position; a negative one counts from the end of each sample."""
    return end if end >= 0 else np.maximum(lengths + end, 0)


def dropping(drop: Rule | Iterable[Rule] | None, tokenizer: Any = None) -> Dropping:
    """Parses one rule or several.

    A rule is `first` (the token in position 0), a range of positions as `--positions` takes it (`0:4`, `-8:`), a token
    id, or a kind of token (`bos`, `pad`, `eos`, `special`), which needs the tokenizer. Raises UsageError.
    """
    rules = [drop] if isinstance(drop, str | int) else list(drop or ())
    token_ids: set[int] = set()
    positions: list[tuple[int | None, int | None]] = []
    for rule in rules:
        if isinstance(rule, int):
            token_ids.add(int(rule))
        elif rule == FIRST:
            positions.append((0, 1))
        elif rule in _KINDS:
            if tokenizer is None:
                raise UsageError(
                    f"drop={rule!r} needs tokenizer=…, since a run stores no tokenizer; "
                    f"or drop its token id, or {FIRST!r} for the token in position 0"
                )
            token_ids |= token_facts(tokenizer).ids[rule]
        elif isinstance(rule, str) and ":" in rule:
            positions.append(parse_positions(rule))
        else:
            known = f"{FIRST}, START:STOP, a token id, {', '.join(_KINDS)}"
            raise UsageError(f"drop={rule!r}: expected one or several of {known}")
    return Dropping(tuple(sorted(token_ids)), tuple(positions))
