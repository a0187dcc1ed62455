"""Whitening of activations: from their moments, incrementally from batches, or of a dataset of texts.

What runs a model is imported at its first use.
"""

import importlib
from typing import Any

from analysis.whitening.folding import CoderWeights, fold_whitening
from analysis.whitening.incremental import IncrementalWhitener
from analysis.whitening.quantized import QuantizedRows, quantize_rows
from analysis.whitening.settings import BELOW_FLOOR, METHODS, SHRINKAGES, WhiteningSettings
from analysis.whitening.stored_whitening import load_whitening, save_projection, save_whitening
from analysis.whitening.whitening import Whitening, WhiteningCheck

_OF_TEXTS = {
    "ChunkedActivationExtractor": "extractor",
    "DatasetCreator": "dataset",
    "WhitenedDataset": "dataset",
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
    if name not in _OF_TEXTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"analysis.text_whitening.{_OF_TEXTS[name]}"), name)
