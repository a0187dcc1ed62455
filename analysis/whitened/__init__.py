"""The commands `whiten fit`, `whiten apply` and `whiten check`: `analysis.whitening` over committed shards."""

from analysis.whitened.apply import ApplyReport, ApplyRequest, whiten_apply
from analysis.whitened.check import CheckReport, whiten_check
from analysis.whitened.fit import FitReport, LayerRequest, whiten_fit

__all__ = [
    "ApplyReport",
    "ApplyRequest",
    "CheckReport",
    "FitReport",
    "LayerRequest",
    "whiten_apply",
    "whiten_check",
    "whiten_fit",
]
