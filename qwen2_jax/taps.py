"""The places inside the model that can be captured, by name.

Some are there once per block, two once per token. Those two stand under a layer number of their own, so that
everything stored is addressed alike: `embedding` under -1, before block 0, and `final_norm` under n_layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Protocol

from core.base.errors import ModelError


@dataclass(frozen=True)
class Site:
    """meaning: for people. per_layer: one a block, or one a token."""

    meaning: str
    per_layer: bool = True


# In the order in which a forward pass meets them.
SITES = {
    "embedding": Site("what the token embedding gives (scaled where the model scales it, no position added)", False),
    "resid_pre": Site("residual stream before block i"),
    "q": Site("queries of block i: projected and biased, before q norm and rotation, heads side by side"),
    "k": Site("keys of block i: projected and biased, before k norm and rotation, kv heads side by side"),
    "v": Site("values of block i: projected and biased, kv heads side by side"),
    "attn_heads": Site("what the heads of block i put out, before the output projection, heads side by side"),
    "attn_proj": Site("output projection of attention in block i, before the norm that follows it"),
    "attn": Site("what attention of block i adds to the residual stream"),
    "resid_mid": Site("residual stream of block i between attention and MLP"),
    "mlp_act": Site("MLP neurons of block i: what goes into its down projection"),
    "mlp_proj": Site("down projection of the MLP in block i, before the norm that follows it"),
    "mlp": Site("what the MLP of block i adds to the residual stream"),
    "residual": Site("residual stream after block i, before the final norm"),
    "final_norm": Site("residual stream after the last block, normalised: what the output head sees", False),
}
EMBEDDING_LAYER = -1
# The sites whose values are known before the MLP of their block runs.
BEFORE_MLP = frozenset(takewhile(lambda site: site != "mlp_act", SITES))


class Capturable(Protocol):
    """A model as far as capturing is concerned. site_widths: the sites it has, in the order of SITES, and their D."""

    @property
    def n_layers(self) -> int: ...

    @property
    def site_widths(self) -> Mapping[str, int]: ...


@dataclass(frozen=True)
class Capture:
    """What one forward pass keeps. Hashable: pass it as a static argument of `jax.jit`.

    layers: ascending block numbers, for the sites that each block has. sites: keys of `SITES`.
    logits: also the next-token logits (runs every layer).
    Raises `ModelError` for a site that does not exist or layers out of order.
    """

    layers: tuple[int, ...]
    sites: tuple[str, ...] = ("residual",)
    logits: bool = False

    def __post_init__(self) -> None:
        for site in self.sites:
            if site not in SITES:
                raise ModelError(f"site {site!r} does not exist: choose from {', '.join(SITES)}")
        if any(a >= b for a, b in pairwise(self.layers)):
            raise ModelError(f"capture layers {self.layers} must be ascending and without repeats")
        if any(SITES[site].per_layer for site in self.sites) and not self.layers and not self.logits:
            raise ModelError("nothing to capture: name at least one layer or ask for logits")

    @property
    def block_sites(self) -> tuple[str, ...]:
        """The sites among `sites` that each block has."""
        return tuple(site for site in self.sites if SITES[site].per_layer)

    def layers_of(self, site: str, n_layers: int) -> tuple[int, ...]:
        """The layer numbers under which `site` is stored, in the order of the captured arrays."""
        if SITES[site].per_layer:
            return self.layers
        return (EMBEDDING_LAYER,) if site == "embedding" else (n_layers,)

    def layers_run(self, n_layers: int) -> int:
        """How many blocks have to run."""
        if self.logits or "final_norm" in self.sites:
            return n_layers
        return self.layers[-1] + 1 if self.block_sites else 0

    @property
    def needs_final_norm(self) -> bool:
        """Whether the final norm has to be loaded."""
        return self.logits or "final_norm" in self.sites
