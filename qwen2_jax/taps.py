"""The places inside the model that can be captured, by name."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from qwen2_jax.errors import ModelError

SITES = {
    "resid_pre": "residual stream before block i",
    "attn": "what attention of block i adds to the residual stream",
    "resid_mid": "residual stream of block i between attention and MLP",
    "mlp": "what the MLP of block i adds to the residual stream",
    "residual": "residual stream after block i, before the final norm",
}


@dataclass(frozen=True)
class Capture:
    """What one forward pass keeps. Hashable: pass it as a static argument of `jax.jit`.

    layers: ascending block numbers. sites: keys of `SITES`. logits: also the next-token logits (runs every layer).
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
        if not self.layers and not self.logits:
            raise ModelError("nothing to capture: name at least one layer or ask for logits")
