"""Mean, covariance, norms and extremes of rows of activations: exact to merge, in any order.

What runs on a device is in `analysis.moments.device`, which imports JAX; nothing here does.
"""

from analysis.moments.extremes import Extremes, OutlierDimension
from analysis.moments.largest import LargestTokens, TokenOrigins
from analysis.moments.moments import Moments, merge
from analysis.moments.norms import Norms
from analysis.moments.statistics import Statistics

__all__ = [
    "Extremes",
    "LargestTokens",
    "Moments",
    "Norms",
    "OutlierDimension",
    "Statistics",
    "TokenOrigins",
    "merge",
]
