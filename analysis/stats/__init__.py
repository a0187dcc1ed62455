"""Statistics of the stored tokens, by site and layer: a pass over the shards with `analysis.moments`."""

from analysis.stats.compute import StatsRequest, layer_moments, remove_partials
from analysis.stats.drop_rules import drop_rules
from analysis.stats.pass_options import PassOptions
from analysis.stats.report import StatsReport
from analysis.stats.stats import about_of, stats
from analysis.stats.stats_file import as_stored, read_stats

__all__ = [
    "PassOptions",
    "StatsReport",
    "StatsRequest",
    "about_of",
    "as_stored",
    "drop_rules",
    "layer_moments",
    "read_stats",
    "remove_partials",
    "stats",
]
