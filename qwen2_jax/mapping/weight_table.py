"""How a family's checkpoint names and lays out the parameters of the decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Rows:
    """Some rows of a fused tensor: cut into `groups` equal groups, rows start..stop-1 of each group, in order."""

    start: int
    stop: int
    groups: int = 1


@dataclass(frozen=True)
class Stored:
    """One parameter in the checkpoint.

    name: the tensor's, "{layer}" standing for the layer. rows: those of the (out, in) tensor, or of the (out,) bias,
    that are the parameter; None for all. transposed: the checkpoint has the weight as (in, out).
    """

    name: str
    rows: Rows | None = None
    transposed: bool = False


# Parameter name -> where it is. Entries of parameters that a config has no use for (a bias, a tied head) do not apply.
WeightTable = Mapping[str, Stored]


def plain(names: Mapping[str, str]) -> dict[str, Stored]:
    """A table of parameters that are whole tensors, laid out as the decoder wants them."""
    return {param: Stored(name) for param, name in names.items()}
