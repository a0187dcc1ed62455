"""Whitening of activations: from their moments, incrementally from batches, or of a dataset of texts.

What imports JAX is imported at its first use.
"""

import importlib
from typing import Any

from analysis.whitening.folding import CoderWeights, fold_whitening
from analysis.whitening.incremental import IncrementalWhitener
from analysis.whitening.settings import BELOW_FLOOR, METHODS, SHRINKAGES, WhiteningSettings
from analysis.whitening.stored_whitening import load_whitening, save_projection, save_whitening
from analysis.whitening.whitening import Whitening, WhiteningCheck

_LATER = {
    "ChunkedActivationExtractor": "analysis.text_whitening.extractor",
    "DatasetCreator": "analysis.text_whitening.dataset",
    "QuantizedRows": "analysis.whitening.quantized",
    "WhitenedDataset": "analysis.text_whitening.dataset",
    "quantize_rows": "analysis.whitening.quantized",
}

__all__ = [
    "BELOW_FLOOR",
    "METHODS",
    "SHRINKAGES",
    "ChunkedActivationExtractor",
    "CoderWeights",
    "DatasetCreator",
    "IncrementalWhitener",
    "QuantizedRows",
    "WhitenedDataset",
    "Whitening",
    "WhiteningCheck",
    "WhiteningSettings",
    "fold_whitening",
    "load_whitening",
    "quantize_rows",
    "save_projection",
    "save_whitening",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)
