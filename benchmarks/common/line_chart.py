"""Line charts as SVG, side by side, with only the standard library."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT = 460, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 20, 44, 50
_COLOURS = ("#0550ae", "#9a6700", "#cf222e", "#116329", "#8250df")
_STYLE = "text { font-family: Helvetica, Arial, sans-serif; font-size: 12px; fill: #1f2328; }"


@dataclass(frozen=True)
class Chart:
    """Series of (x, share), shares from 0 to 1."""

    title: str
    x_label: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    log_x: bool = False

    def x(self, value: float) -> float:
        """Pixels from the left."""
        values = [point[0] for points in self.series.values() for point in points]
        scale = math.log10 if self.log_x else float
        low, high = scale(min(values)), scale(max(values))
        share = (scale(value) - low) / (high - low) if high > low else 0.5
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)

    def svg(self) -> str:
        """The elements of the chart at the origin."""
        return "\n".join([*self._axes(), *self._lines()])

    def _axes(self) -> list[str]:
        parts = [f'<text x="{_LEFT}" y="22" font-weight="bold">{self.title}</text>']
        for tenth in range(0, 11, 2):
            height = _y(tenth / 10)
            parts.append(f'<line x1="{_LEFT}" y1="{height}" x2="{_WIDTH - _RIGHT}" y2="{height}" stroke="#d0d7de"/>')
            parts.append(f'<text x="{_LEFT - 8}" y="{height + 4}" text-anchor="end">{tenth * 10}%</text>')
        values = sorted({point[0] for points in self.series.values() for point in points})
        parts += [f'<text x="{self.x(x)}" y="{_HEIGHT - 30}" text-anchor="middle">{x:g}</text>' for x in values]
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        return [*parts, f'<text x="{middle}" y="{_HEIGHT - 10}" text-anchor="middle">{self.x_label}</text>']

    def _lines(self) -> list[str]:
        parts = []
        for row, (name, points) in enumerate(self.series.items()):
            colour = _COLOURS[row % len(_COLOURS)]
            path = " ".join(f"{self.x(x)},{_y(y)}" for x, y in points)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
            parts += [f'<circle cx="{self.x(x)}" cy="{_y(y)}" r="3" fill="{colour}"/>' for x, y in points]
            place = _y(0) - 12 - 16 * (len(self.series) - 1 - row)
            parts.append(f'<text x="{_LEFT + 12}" y="{place}" style="fill: {colour}">{name}</text>')
        return parts


def charts_svg(charts: Sequence[Chart]) -> str:
    """One picture, the charts from left to right on a white background."""
    width = _WIDTH * len(charts)
    body = "\n".join(
        f'<g transform="translate({index * _WIDTH} 0)">\n{chart.svg()}\n</g>' for index, chart in enumerate(charts)
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT}" width="{width}" height="{_HEIGHT}">'
    )
    return f'{head}\n<style>{_STYLE}</style>\n<rect width="100%" height="100%" fill="#ffffff"/>\n{body}\n</svg>\n'


def _y(share: float) -> float:
    """Pixels from the top."""
    return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)
