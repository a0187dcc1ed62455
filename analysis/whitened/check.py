"""`whiten check`: is what a whitening gives white?"""

from dataclasses import dataclass
from typing import Any

from analysis.stats import PassOptions, remove_partials
from analysis.whitened.fit import LayerRequest, moments_of_layer
from analysis.whitening import Whitening, WhiteningCheck, load_whitening
from core.base.errors import UsageError
from core.reading import open_activations

TOLERANCE = 1e-5


@dataclass(frozen=True)
class CheckReport:
    """Attributes:
    check: the errors. tolerance: of `check.max_error`. n_tokens: that were checked.
    """

    check: WhiteningCheck
    whitening: Whitening
    tolerance: float
    n_tokens: int

    @property
    def ok(self) -> bool:
        """Whether max |WSW^T - I| is within the tolerance."""
        return self.check.max_error <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        figures = {"tolerance": self.tolerance, "n_tokens": self.n_tokens, "shrinkage": self._settings.shrinkage}
        return {"ok": self.ok} | self.check.to_json() | figures | {"reasons": self._reasons()}

    def lines(self) -> list[str]:
        """The error first, then why it is above the tolerance, where that is known."""
        verdict = "within" if self.ok else "above"
        figures = f"max |WSW^T - I| = {self.check.max_error:.3g} of {self.n_tokens} tokens"
        return [f"{figures}: {verdict} the tolerance of {self.tolerance:g}", *([] if self.ok else self._reasons())]

    @property
    def _settings(self) -> Any:
        return self.whitening.settings

    def _reasons(self) -> list[str]:
        """What makes an identity impossible, whatever the numerics."""
        check, reasons = self.check, []
        if check.rank < check.width:
            reasons.append(
                f"rank: {check.rank} of {check.width} directions vary above the floor ({self.n_tokens} tokens allow at "
                f"most {check.rank_limit}), so the others cannot have variance 1; in those {check.rank} directions the "
                f"error is {check.kept_error:.3g}"
            )
        if self._settings.shrinkage != "none":
            estimate = self._settings.shrinkage
            reasons.append(f"shrinkage: it whitens the covariance that {estimate} estimates, not that of the tokens")
        if self.whitening.n_samples != self.n_tokens:
            reasons.append(f"tokens: it was fitted on {self.whitening.n_samples} tokens, these are {self.n_tokens}")
        return reasons


def whiten_check(
    request: LayerRequest, whitening: str, options: PassOptions, tolerance: float = TOLERANCE
) -> CheckReport:
    """Compares the covariance of the whitened tokens of a layer with the identity.

    whitening: the file. Raises UsageError where it does not fit the layer.
    """
    loaded = load_whitening(whitening)
    moments = moments_of_layer(request, options)
    if moments.width != loaded.width:
        raise UsageError(f"{whitening} whitens rows of {loaded.width} values: these have {moments.width}")
    if request.stats is None:
        acts = open_activations(request.url)
        remove_partials(acts, request.stats_request(acts), options)
    return CheckReport(loaded.check(moments), loaded, tolerance, moments.count)
