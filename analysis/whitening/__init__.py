"""Whitening of activations: from their moments, or incrementally from batches."""

from analysis.whitening.folding import CoderWeights, fold_whitening
from analysis.whitening.incremental import IncrementalWhitener
from analysis.whitening.quantized import QuantizedRows, quantize_rows
from analysis.whitening.settings import BELOW_FLOOR, METHODS, SHRINKAGES, WhiteningSettings
from analysis.whitening.stored_whitening import load_whitening, save_projection, save_whitening
from analysis.whitening.whitening import Whitening, WhiteningCheck

__all__ = [
    "BELOW_FLOOR",
    "METHODS",
    "SHRINKAGES",
    "CoderWeights",
    "IncrementalWhitener",
    "QuantizedRows",
    "Whitening",
    "WhiteningCheck",
    "WhiteningSettings",
    "fold_whitening",
    "load_whitening",
    "quantize_rows",
    "save_projection",
    "save_whitening",
]
