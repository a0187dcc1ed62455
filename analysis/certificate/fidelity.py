"""The error of activations relative to transformers in float32, and whether rounding explains it.

The yardstick is transformers itself in the run's compute dtype, rounded to the stored dtype: the values that it would
have stored. A site and layer passes when its errors are at most `YARDSTICKS` times the yardstick's.

Axis letters: L layers stored for a site, T tokens of a sample, K compared tokens, D width of the site.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float64, Int, Int32, Shaped

YARDSTICKS = 2.0
FLOOR = 3e-5
"""Errors up to this always pass: the yardstick of a run that is computed and stored in float32 is 0. Summation order
alone makes a difference of 3e-6 after the 30 layers of SmolLM2."""
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class FinalValues:
    """The values that determine the next token: the last block's output or, if `normed`, the final norm's."""

    values: Shaped[np.ndarray, "K D"]
    normed: bool


@dataclass(frozen=True)
class CertifiedSample:
    """One sample as this project computed it.

    Attributes:
      name: its index, prefixed with its folder for committed samples.
      token_ids: all tokens that the model sees.
      compared: the positions of the compared tokens, ascending.
      ours: by site, in the stored dtype.
      next_tokens: after each compared token, by our own output head; None where only `final` is known.
      final: what the reference's head can be given instead; None where that is not known either.
    """

    name: str
    token_ids: Int32[np.ndarray, "T"]
    compared: Int[np.ndarray, "K"]
    ours: Mapping[str, Shaped[np.ndarray, "L K _"]]
    next_tokens: Int[np.ndarray, "K"] | None = None
    final: FinalValues | None = None


@dataclass(frozen=True)
class Figures:
    """The error of one site and layer relative to the reference, over all tokens of all samples.

    Attributes:
      relative_error: L2 norm of the difference over that of the reference, all tokens together.
      token_error: mean over tokens of each token's relative error: tokens with huge norms count like any other.
      cosine_mean, cosine_worst: cosine similarity of a token's two vectors.
      max_error: the largest difference of any value.
    """

    relative_error: float
    token_error: float
    cosine_mean: float
    cosine_worst: float
    max_error: float

    @property
    def errors(self) -> tuple[float, float]:
        """The two errors that decide the verdict."""
        return self.relative_error, self.token_error


@dataclass
class Tally:
    """Accumulates the figures of one site and layer, sample by sample."""

    squared_difference: float = 0.0
    squared_reference: float = 0.0
    token_errors: float = 0.0
    cosines: float = 0.0
    cosine_worst: float = 1.0
    max_error: float = 0.0
    tokens: int = 0

    def add(self, ours: Shaped[np.ndarray, "K D"], reference: Shaped[np.ndarray, "K D"]) -> None:
        """Adds the tokens of one sample. A NaN or infinity on either side makes every error infinite."""
        a, b = ours.astype(np.float64), reference.astype(np.float64)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            self.squared_difference = self.token_errors = self.max_error = np.inf
            self.cosine_worst = -1.0
            self.tokens += len(a)
            return
        off = np.linalg.norm(a - b, axis=-1)
        norms, theirs = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
        cosines = _cosines(a, b, norms, theirs)
        self.squared_difference += float(np.square(off).sum())
        self.squared_reference += float(np.square(theirs).sum())
        self.token_errors += float(_ratios(off, theirs).sum())
        self.cosines += float(cosines.sum())
        self.cosine_worst = min(self.cosine_worst, float(cosines.min(initial=1.0)))
        self.max_error = max(self.max_error, float(np.abs(a - b).max(initial=0.0)))
        self.tokens += len(a)

    def figures(self) -> Figures:
        """The figures of all added samples."""
        tokens = max(self.tokens, 1)
        overall = _ratios(np.sqrt([self.squared_difference]), np.sqrt([self.squared_reference]))
        return Figures(
            relative_error=float(overall[0]),
            token_error=self.token_errors / tokens,
            cosine_mean=self.cosines / tokens,
            cosine_worst=self.cosine_worst,
            max_error=self.max_error,
        )


def _ratios(off: Float64[np.ndarray, "K"], norms: Float64[np.ndarray, "K"]) -> Float64[np.ndarray, "K"]:
    """off / norms; for a zero norm 0 if off is 0, else infinity."""
    return np.divide(off, norms, out=np.where(off > 0, np.inf, 0.0), where=norms > 0)


def _cosines(a: np.ndarray, b: np.ndarray, norms: np.ndarray, theirs: np.ndarray) -> Float64[np.ndarray, "K"]:
    product = norms * theirs
    default = np.where(norms == theirs, 1.0, 0.0)
    return np.clip(np.divide((a * b).sum(-1), product, out=default, where=product > 0), -1.0, 1.0)


@dataclass(frozen=True)
class LayerFidelity:
    """The verdict on one site and layer."""

    site: str
    layer: int
    ours: Figures
    yardstick: Figures

    @property
    def limits(self) -> tuple[float, float]:
        """The upper limit of each of `ours.errors`: the floor where the yardstick is not finite."""
        first, second = (
            max(YARDSTICKS * error, FLOOR) if np.isfinite(error) else FLOOR for error in self.yardstick.errors
        )
        return first, second

    @property
    def excess(self) -> float:
        """The worse of the two errors as a share of its limit; above 1 fails."""
        return max(error / limit for error, limit in zip(self.ours.errors, self.limits, strict=True))

    @property
    def ok(self) -> bool:
        """Whether both errors are within their limits."""
        return self.excess <= 1

    def to_json(self) -> dict[str, Any]:
        """The entry in fidelity.json."""
        return {"site": self.site, "layer": self.layer, "ok": self.ok, "limits": _finite(list(self.limits))} | {
            "ours": _finite(asdict(self.ours)),
            "yardstick": _finite(asdict(self.yardstick)),
        }


@dataclass(frozen=True)
class NextTokens:
    """How often the most likely next token is the reference's. by: how it was computed, or why it was not."""

    by: str
    ours: float | None = None
    yardstick: float | None = None
    positions: int = 0


@dataclass(frozen=True)
class FidelityReport:
    """The certificate.

    Attributes:
      about: model, identity, dtypes and versions.
      samples: their names; tokens: how many tokens were compared.
      not_compared: site → why the reference has no counterpart.
    """

    about: Mapping[str, Any]
    samples: tuple[str, ...]
    tokens: int
    layers: tuple[LayerFidelity, ...]
    next_tokens: NextTokens
    not_compared: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether something was compared and all of it passed."""
        return bool(self.layers) and all(layer.ok for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """The content of fidelity.json."""
        return {
            "verdict": "pass" if self.ok else "fail",
            "rule": {"yardsticks": YARDSTICKS, "floor": FLOOR, "errors": ["relative_error", "token_error"]},
            "about": dict(self.about),
            "samples": list(self.samples),
            "tokens": self.tokens,
            "sites": [layer.to_json() for layer in self.layers],
            "not_compared": dict(self.not_compared),
            "next_token_agreement": asdict(self.next_tokens),
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """The certificate as lines of text: the worst layer of each site, and bars for the errors of all layers."""
        by_site: dict[str, list[LayerFidelity]] = {}
        for layer in self.layers:
            by_site.setdefault(layer.site, []).append(layer)
        lines = [f"{len(self.samples)} samples, {self.tokens} tokens, against {self.about.get('reference')}"]
        lines.append("site        worst layer  error     yardstick  limit     worst cosine  by layer: error, yardstick")
        lines += [_site_line(site, layers) for site, layers in by_site.items()]
        lines += [f"{site}: not compared: {why}" for site, why in self.not_compared.items()]
        lines.append(_next_token_line(self.next_tokens))
        lines += [f"note: {note}" for note in self.notes]
        return [*lines, "faithful" if self.ok else "NOT faithful: " + self.failure()]

    def failure(self) -> str:
        """The worst site and layer, in one clause."""
        if not self.layers:
            return "nothing could be compared"
        worst = max(self.layers, key=lambda layer: layer.excess)
        error, limit, _ = _worse(worst)
        return f"{worst.site} of layer {worst.layer} is off by {error:.2g} where {limit:.2g} is allowed"


def _worse(layer: LayerFidelity) -> tuple[float, float, float]:
    """The worse error of a layer with its limit and its yardstick."""
    triples = zip(layer.ours.errors, layer.limits, layer.yardstick.errors, strict=True)
    return max(triples, key=lambda triple: triple[0] / triple[1])


def _site_line(site: str, layers: Sequence[LayerFidelity]) -> str:
    worst = max(layers, key=lambda layer: layer.excess)
    error, limit, yardstick = _worse(worst)
    cosine = min(layer.ours.cosine_worst for layer in layers)
    bars = "  ".join(_bars(layers))
    return f"{site:<11} {worst.layer:>11}  {error:<8.2g}  {yardstick:<9.2g}  {limit:<8.2g}  {cosine:<12.6f}  {bars}"


def _bars(layers: Sequence[LayerFidelity]) -> tuple[str, str]:
    """The token errors of a site and of its yardstick by layer, as bars on a common logarithmic scale.

    A layer that fails is `!`.
    """
    errors = np.array([[layer.ours.token_error, layer.yardstick.token_error] for layer in layers])
    known = errors[(errors > 0) & np.isfinite(errors)]
    low, high = (known.min(), known.max()) if len(known) else (1.0, 1.0)
    share = np.log(np.clip(errors, low, high) / low) / max(np.log(high / low), 1e-9)
    places = (share * (len(_BARS) - 1)).round().astype(int)
    ours = "".join(_BARS[place] if layer.ok else "!" for layer, place in zip(layers, places[:, 0], strict=True))
    return ours, "".join(_BARS[place] for place in places[:, 1])


def _next_token_line(agreement: NextTokens) -> str:
    if agreement.ours is None:
        return f"next token: not compared: {agreement.by}"
    beside = "" if agreement.yardstick is None else f", yardstick {agreement.yardstick:.2%}"
    return f"next token: {agreement.ours:.2%} of {agreement.positions} positions agree{beside} ({agreement.by})"


def _finite(value: Any) -> Any:
    """Replaces NaN and infinity, which JSON does not have, with null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return value if not isinstance(value, float) or np.isfinite(value) else None


class Comparison:
    """Tallies by site and layer. layers: site → the layer numbers of its arrays, in order."""

    def __init__(self, layers: Mapping[str, tuple[int, ...]]) -> None:
        self._layers = layers
        self._tallies = {(site, layer): Tally() for site, numbers in layers.items() for layer in numbers}

    def add(self, ours: Mapping[str, Shaped[np.ndarray, "L K _"]], reference: Mapping[str, np.ndarray]) -> None:
        """Adds one sample. Sites without a reference are skipped."""
        for site, numbers in self._layers.items():
            if site in reference:
                for slot, layer in enumerate(numbers):
                    self._tallies[site, layer].add(ours[site][slot], reference[site][slot])

    def figures(self) -> dict[tuple[str, int], Figures]:
        """By site and layer, where anything was added."""
        return {key: tally.figures() for key, tally in self._tallies.items() if tally.tokens}


def verdicts(
    ours: Mapping[tuple[str, int], Figures], yardstick: Mapping[tuple[str, int], Figures]
) -> tuple[LayerFidelity, ...]:
    """One for each site and layer that was compared."""
    return tuple(LayerFidelity(*key, figures, yardstick[key]) for key, figures in ours.items())


def agreement(ours: Iterable[np.ndarray], reference: Iterable[np.ndarray]) -> tuple[float, int]:
    """The share of positions at which two lists of next tokens agree, and the number of positions."""
    same = [a == b for a, b in zip(ours, reference, strict=True)]
    places = np.concatenate(same) if same else np.zeros(0, bool)
    return (float(places.mean()) if len(places) else 0.0), len(places)
