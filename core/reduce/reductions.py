"""The reductions of activations on the device, in their order: select → project → pool → topk → quantize.

Selection is in `core.samples.selection`. Here are the settings of the others, parsed from flags and as they are stored;
their arithmetic is in `core.reduce.arithmetic`. A row of a stored array is a token, or one of the pools of a sample.

Axis letters: N rows, D width of the site, E width after the projection, W stored values of a row.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Shaped

from core.base.dtypes import CODE_DTYPES
from core.base.errors import UsageError
from core.reduce.projection import Projection

POOL_KINDS = ("mean", "first", "last", "max", "exp")
_WITH_HALF_LIFE = "exp"
QUANTIZATIONS = {"int8": CODE_DTYPES["int8"], "fp8": CODE_DTYPES["float8_e4m3fn"]}
LARGEST_CODE = {"int8": 127.0, "fp8": 448.0}
"""The code that the largest magnitude of a block gets."""
DEFAULT_BLOCK = {"int8": 32, "fp8": 0}
"""benchmarks/README.md has the error of each: fp8 gains little from more scales."""
VALUES, INDICES, SCALE = "activation", "indices", "scale"
"""The arrays of a row: its values or codes, the places of the values (topk), the scales of its blocks (quantize)."""


def array_name(site: str, array: str) -> str:
    """The name of an array of a site among the arrays of all sites: `residual`, `residual.scale`."""
    return site if array == VALUES else f"{site}.{array}"


def site_and_array(name: str) -> tuple[str, str]:
    """The inverse of `array_name`."""
    site, _, array = name.partition(".")
    return site, array or VALUES


@dataclass(frozen=True)
class Pool:
    """One vector of all selected tokens of a sample.

    half_life: for `exp`, a share of the number of tokens T: the token p places before the last one has the weight
    2^(-p / (half_life * T)).
    """

    kind: str
    half_life: float | None = None

    def __str__(self) -> str:
        return self.kind if self.half_life is None else f"{self.kind}:{self.half_life!r}"

    @property
    def is_linear(self) -> bool:
        """Whether it is a weighted mean."""
        return self.kind != "max"

    def weights(self, n_tokens: int) -> Float64[np.ndarray, "T"]:
        """The weight of each of `n_tokens` >= 1 tokens; the sum is 1. For `max` all are equal: all are fetched."""
        if self.kind in ("first", "last"):
            return np.eye(1, n_tokens, 0 if self.kind == "first" else n_tokens - 1)[0]
        if self.half_life is None:
            return np.full(n_tokens, 1 / n_tokens)
        weights = np.exp2(-np.arange(n_tokens)[::-1] / (self.half_life * n_tokens))
        return weights / weights.sum()


def parse_pool(text: str) -> Pool:
    """A pool as the user writes it, see `pool_spellings`. Raises UsageError."""
    kind, colon, share = text.partition(":")
    if kind in POOL_KINDS and bool(colon) == (kind == _WITH_HALF_LIFE):
        try:
            half_life = float(share) if colon else None
        except ValueError:
            half_life = math.nan
        if half_life is None or 0 < half_life < math.inf:
            return Pool(kind, half_life)
    *others, last = pool_spellings()
    raise UsageError(f"--pool {text}: expected {', '.join(others)} or {last}, such as {_WITH_HALF_LIFE}:0.067")


def pool_spellings() -> tuple[str, ...]:
    """What `--pool` takes, one for each kind: `mean`, `exp:SHARE`."""
    return tuple(f"{kind}:SHARE" if kind == _WITH_HALF_LIFE else kind for kind in POOL_KINDS)


@dataclass(frozen=True)
class Quantization:
    """kind: a key of QUANTIZATIONS. block: how many neighbouring values of a row share a scale; 0: all of them."""

    kind: str
    block: int

    def n_scales(self, width: int) -> int:
        """Scales of a row of `width` values; the last block may be shorter."""
        return -(-width // self.block) if self.block else 1


@dataclass(frozen=True)
class StoredArray:
    """One array of a site: `width` entries a row."""

    width: int
    dtype: np.dtype

    @property
    def row_bytes(self) -> int:
        """The bytes of one row in one layer."""
        return self.width * self.dtype.itemsize


@dataclass(frozen=True)
class Reduction:
    """The reduction of the selected tokens, in the order of the fields; None or empty: that step is skipped."""

    projection: Projection | None = None
    pools: tuple[Pool, ...] = ()
    topk: int | None = None
    quantization: Quantization | None = None

    @property
    def codes_rows(self) -> bool:
        """Whether rows are stored with a loss, by topk or quantization: see `restore`."""
        return self.topk is not None or self.quantization is not None

    def width(self, site_width: int) -> int:
        """Entries of a row before topk: E."""
        return site_width if self.projection is None else self.projection.out_width

    def arrays(self, site_width: int, dtype: np.dtype) -> dict[str, StoredArray]:
        """The stored arrays of a site. dtype: the dtype of values that are not quantized."""
        width = self.width(site_width)
        values = width if self.topk is None else self.topk
        arrays = {VALUES: StoredArray(values, dtype)}
        if self.topk is not None:
            arrays[INDICES] = StoredArray(self.topk, np.dtype(np.uint16 if width <= 1 << 16 else np.int32))
        if self.quantization is not None:
            arrays[VALUES] = StoredArray(values, QUANTIZATIONS[self.quantization.kind])
            arrays[SCALE] = StoredArray(self.quantization.n_scales(values), np.dtype(np.float32))
        return arrays

    def check(self, site_widths: Mapping[str, int], n_layers: Mapping[str, int]) -> None:
        """Raises UsageError that names a site to which the reduction does not apply."""
        for site, site_width in site_widths.items():
            if self.projection is not None:
                self.projection.check(site, site_width, n_layers[site])
            if self.topk is not None and self.topk > self.width(site_width):
                what = site if self.projection is None else f"the projected {site}"
                raise UsageError(f"--topk {self.topk}: {what} is only {self.width(site_width)} wide")

    def to_json(self) -> dict[str, Any]:
        """The settings as they are stored in the identity, under the names of their flags."""
        quantization = self.quantization
        return {
            "project": None if self.projection is None else self.projection.to_json(),
            "pool": [str(pool) for pool in self.pools],
            "topk": self.topk,
            "quantize": None if quantization is None else quantization.kind,
            "quantize_block": None if quantization is None else quantization.block,
        }

    def __str__(self) -> str:
        """The steps as text, in their order."""
        steps = []
        if self.projection is not None:
            steps.append(f"project to {self.projection.out_width}")
        if self.pools:
            steps.append("pool " + ", ".join(map(str, self.pools)))
        if self.topk is not None:
            steps.append(f"topk {self.topk}")
        if self.quantization is not None:
            shared = f"blocks of {self.quantization.block}" if self.quantization.block else "one scale a row"
            steps.append(f"quantize {self.quantization.kind} ({shared})")
        return ", ".join(steps)


def restore(
    arrays: Mapping[str, Shaped[np.ndarray, "*rows _"]], width: int, block: int | None
) -> Float32[np.ndarray, "*rows {width}"]:
    """The rows that stored arrays represent: codes times their scales, at their indices, zero elsewhere.

    width: E. block: of the quantization; needed where there are scales.
    """
    values = arrays[VALUES].astype(np.float32)
    if SCALE in arrays:
        scale, n_values = arrays[SCALE], values.shape[-1]
        values *= np.repeat(scale, block or n_values, axis=-1)[..., :n_values]
    if INDICES not in arrays:
        return values
    rows = np.zeros((*values.shape[:-1], width), np.float32)
    np.put_along_axis(rows, arrays[INDICES].astype(np.int64), values, axis=-1)
    return rows
