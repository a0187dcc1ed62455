"""Mean, covariance, norms and extremes of rows of activations: exact to merge, in any order."""

from analysis.moments.device import DeviceSums, StepMoments, device_moments, moments_of_device
from analysis.moments.extremes import Extremes, OutlierDimension
from analysis.moments.largest import LargestTokens, TokenOrigins
from analysis.moments.moments import Moments, merge
from analysis.moments.norms import Norms
from analysis.moments.statistics import Statistics

__all__ = [
    "DeviceSums",
    "Extremes",
    "LargestTokens",
    "Moments",
    "Norms",
    "OutlierDimension",
    "Statistics",
    "StepMoments",
    "TokenOrigins",
    "device_moments",
    "merge",
    "moments_of_device",
]
