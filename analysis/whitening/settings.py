"""What decides a whitening besides its moments."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from core.base.errors import UsageError

METHODS = ("pca", "zca", "pca-cor", "zca-cor", "cholesky")
SHRINKAGES = ("none", "ledoit-wolf", "oas")
BELOW_FLOOR = ("drop", "floor")
DEFAULT_FLOOR = 1e-9
"""The smallest ratio that we measured in real activations, attention sinks included, is 2e-7; the error of an
eigenvalue in float64 is about 1e-15 of the largest."""
_ROTATED_BACK = ("zca", "zca-cor", "cholesky")


@dataclass(frozen=True)
class WhiteningSettings:
    """The settings of a whitening; a value that cannot be is a UsageError.

    Attributes:
      method: one of `METHODS`, as Kessy, Lewin and Strimmer, Optimal Whitening and Decorrelation (2018) define them.
      shrinkage: one of `SHRINKAGES`: the estimate of the covariance.
      floor: eigenvalues at most `floor` times the largest are below the floor. Of the correlation for pca-cor and
        zca-cor, else of the covariance.
      below: `drop`: directions below the floor are taken out of what is whitened, and do not come back when it is
        inverted. `floor`: they count as if their eigenvalue was the floor, so that their variance ends below 1.
      n_components: pca and pca-cor keep this many components, largest first; None for all.
    """

    method: str = "pca"
    shrinkage: str = "none"
    floor: float = DEFAULT_FLOOR
    below: str = "drop"
    n_components: int | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("method", self.method, METHODS),
            ("shrinkage", self.shrinkage, SHRINKAGES),
            ("below", self.below, BELOW_FLOOR),
        ):
            if value not in known:
                raise UsageError(f"whitening {name} {value!r}: expected one of {', '.join(known)}")
        if not 0 < self.floor < 1:
            raise UsageError(f"whitening floor {self.floor}: expected a share of the largest eigenvalue, 0 to 1")
        if self.n_components is not None and self.n_components < 1:
            raise UsageError(f"whitening to {self.n_components} components: expected at least 1")
        if self.n_components is not None and self.method in _ROTATED_BACK:
            raise UsageError(f"{self.method} has no components to keep {self.n_components} of: use pca or pca-cor")

    def check_width(self, width: int) -> None:
        """Raises UsageError for rows with fewer values than components to keep."""
        if self.n_components is not None and self.n_components > width:
            raise UsageError(f"whitening to {self.n_components} components: rows have only {width} values")

    @property
    def uses_correlation(self) -> bool:
        """Whether each dimension is divided by its standard deviation first."""
        return self.method.endswith("-cor")

    def to_metadata(self) -> dict[str, str]:
        """The fields as text, for the metadata of a safetensors file; floats keep every bit."""
        return {name: "" if value is None else str(value) for name, value in asdict(self).items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "WhiteningSettings":
        """The inverse of `to_metadata`. Raises KeyError, ValueError or UsageError for a field that is no such value."""
        components = metadata["n_components"]
        return cls(
            metadata["method"],
            metadata["shrinkage"],
            float(metadata["floor"]),
            metadata["below"],
            int(components) if components else None,
        )
