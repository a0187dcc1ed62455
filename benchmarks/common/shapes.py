"""Published model shapes, and the cases measured with them without weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2_jax import DecoderConfig, load_config
from qwen2_jax.families import decoder_config

_SHAPES = Path(__file__).with_name("model_shapes.json")


@dataclass(frozen=True)
class Case:
    """The residuals of some layers (None: all), in rows of `length` tokens, and the MFU to reach.

    layout, rows: how the model is split over the chips of a host, and rows per copy of it, if not the default.
    """

    model: str
    layers: tuple[int, ...] | None
    length: int
    target: float | None = None
    layout: str = "auto"
    rows: int = 0

    @property
    def name(self) -> str:
        """The name of the case in tables and baselines."""
        layers = "all layers" if self.layers is None else f"layer {self.layers[0]}"
        layout = "" if self.layout == "auto" else f", mesh {self.layout}"
        return f"{self.model}, {layers}, rows of {self.length}{layout}"

    def layers_of(self, config: DecoderConfig) -> tuple[int, ...]:
        """Which layers are captured."""
        return self.layers or tuple(range(config.n_layers))


def published_shapes() -> dict[str, dict[str, Any]]:
    """The fields of config.json that define a model's shape, by the model's name."""
    shapes: dict[str, dict[str, Any]] = json.loads(_SHAPES.read_text())
    return shapes


def shape_of(model: str) -> DecoderConfig:
    """The config of a published shape by name, or of a folder or hub id. Raises UsageError or ModelError."""
    shapes = published_shapes()
    return decoder_config(shapes[model]) if model in shapes else load_config(model)
