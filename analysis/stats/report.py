"""Statistics for people and for programs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from analysis.moments import Statistics

_SHOWN = 4
_COLUMNS = ("site", "layer", "tokens", "width", "mean norm", "median", "largest", "norm of mean", "variance")


@dataclass(frozen=True)
class StatsReport:
    """Attributes:
    url: of the output that was read. drop: the rules, as plain values. output: the file, or None.
    layers: by site and layer, what `Statistics.summary` says, and `mean_norm`, the norm of the mean.
    """

    url: str
    drop: Mapping[str, Any]
    output: str | None
    layers: Mapping[str, Mapping[int, Mapping[str, Any]]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """`{"url", "drop", "output", "sites": {site: {layer: {"count", "mean_norm", …}}}}`."""
        sites = {site: {str(layer): dict(s) for layer, s in layers.items()} for site, layers in self.layers.items()}
        return {"url": self.url, "drop": dict(self.drop), "output": self.output, "sites": sites}

    def lines(self) -> list[str]:
        """A table, then the massive activations of each layer."""
        found = [(site, layer, each) for site, layers in self.layers.items() for layer, each in layers.items()]
        lines = _table([_COLUMNS, *(_row(*entry) for entry in found)])
        for site, layer, each in found:
            lines += [f"{site} {layer}: {line}" for line in _massive(each)]
        return lines + [f"output: {self.output}"] * (self.output is not None)


def summary_of(statistics: Statistics) -> dict[str, Any]:
    """What the report keeps of a layer: no array of the width of a row."""
    found = statistics.summary()
    return found | {"mean_norm": found["norm_of_mean"]}


def _row(site: str, layer: int, found: Mapping[str, Any]) -> tuple[str, ...]:
    norm, (low, high) = found["norm"], found["norm"]["median_between"]
    figures = (norm["mean"], (low * high) ** 0.5, norm["max"], found["norm_of_mean"], found["total_variance"])
    return site, str(layer), str(found["count"]), str(found["width"]), *(f"{figure:.4g}" for figure in figures)


def _massive(found: Mapping[str, Any]) -> list[str]:
    tokens = [
        f"{t['norm']:.4g} (sample {t['sample_idx']}, position {t['position']}, id {t['token_id']})"
        for t in found["largest_tokens"][:_SHOWN]
    ]
    outliers = found["outlier_dimensions"]
    dimensions = [f"{o['dimension']} (up to {o['peak']:.4g}, {_times(o)} the median)" for o in outliers[:_SHOWN]]
    more = f" and {len(outliers) - _SHOWN} more" * (len(outliers) > _SHOWN)
    return [
        *([f"largest tokens: {', '.join(tokens)}"] if tokens else []),
        *([f"outlier dimensions: {', '.join(dimensions)}{more}"] if dimensions else []),
    ]


def _times(outlier: Mapping[str, Any]) -> str:
    ratio = outlier["peak_ratio"]
    return "many times" if ratio is None else f"{ratio:.3g} times"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
