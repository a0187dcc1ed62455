"""The sites of a model that can be captured, with their names and sizes. Reads its config, no weights."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from core.run.progress import format_bytes
from core.step.capture import existing_layer, site_bytes
from core.step.model_shape import ModelShape, check_sample_length
from qwen2_jax.families import FAMILIES
from qwen2_jax.mapping.hook_names import hugging_face_name, transformer_lens_name
from qwen2_jax.taps import SITES, Capture


@dataclass(frozen=True)
class HookRow:
    """One site of a model. Bytes are those of the stored arrays, before compression.

    Attributes:
      transformer_lens, hugging_face: other accepted names, with `{i}` for the layer; None where there is none.
      layers: the layer numbers under which it is stored; width: values of a token in each of them.
      bytes_per_token: in one layer; bytes_per_token_all_layers: in `layers`.
      bytes_per_sample: of a sample of `max_seq_length` tokens; None without a length.
    """

    site: str
    meaning: str
    transformer_lens: str | None
    hugging_face: str | None
    layers: tuple[int, ...]
    width: int
    bytes_per_token: int
    bytes_per_token_all_layers: int
    bytes_per_million_tokens: int
    bytes_per_sample: int | None


@dataclass(frozen=True)
class HookTable:
    """The sites of a model, in the order of the forward pass."""

    model: str
    family: str
    n_layers: int
    d_model: int
    dtype: str
    max_seq_length: int | None
    rows: tuple[HookRow, ...]

    def to_json(self) -> dict[str, Any]:
        """The table as plain values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The table as lines of text."""
        head = ["site", "TransformerLens", "Hugging Face", "shape", "layers", "a token", "all layers", "1M tokens"]
        sample = [] if self.max_seq_length is None else [f"{self.max_seq_length} tokens"]
        cells = [head + sample, *(self._cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        first_numeric = 3
        table = [
            "  ".join(
                cell.rjust(width) if column >= first_numeric else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        ]
        about = f"{self.model}: {self.family}, {self.n_layers} layers, d_model {self.d_model}; stored as {self.dtype}"
        return [about, *table, "", *(f"{row.site}: {row.meaning}" for row in self.rows)]

    def _cells(self, row: HookRow) -> list[str]:
        sample = [] if row.bytes_per_sample is None else [format_bytes(row.bytes_per_sample)]
        return [
            row.site,
            row.transformer_lens or "-",
            row.hugging_face or "-",
            f"({row.width},)",
            _span(row.layers),
            format_bytes(row.bytes_per_token),
            format_bytes(row.bytes_per_token_all_layers),
            format_bytes(row.bytes_per_million_tokens),
            *sample,
        ]


def _span(layers: tuple[int, ...]) -> str:
    is_run = len(layers) > 2 and layers[-1] - layers[0] == len(layers) - 1
    return f"{layers[0]}..{layers[-1]}" if is_run else ",".join(map(str, layers))


def hook_table(
    path: str,
    model: ModelShape,
    *,
    layers: Sequence[int] | None = None,
    dtype: str = "float16",
    max_seq_length: int | None = None,
) -> HookTable:
    """Every site of `model` at `layers` (None: all). Raises UsageError for an invalid layer or length."""
    if max_seq_length is not None:
        check_sample_length(max_seq_length, model, path)
    wanted = sorted({existing_layer(layer, f"--layers {layer}", model, path) for layer in layers or ()})
    capture = Capture(tuple(wanted) or tuple(range(model.n_layers)), tuple(model.site_widths))
    sizes = site_bytes(capture, model, dtype)
    # Module names of other families are unknown.
    is_known = model.family in FAMILIES

    def row(site: str, width: int) -> HookRow:
        stored = capture.layers_of(site, model.n_layers)
        return HookRow(
            site=site,
            meaning=SITES[site].meaning,
            transformer_lens=transformer_lens_name(site),
            hugging_face=hugging_face_name(site, model.family, model.site_widths) if is_known else None,
            layers=stored,
            width=width,
            bytes_per_token=sizes[site] // len(stored),
            bytes_per_token_all_layers=sizes[site],
            bytes_per_million_tokens=sizes[site] * 10**6,
            bytes_per_sample=None if max_seq_length is None else sizes[site] * max_seq_length,
        )

    rows = tuple(row(site, width) for site, width in model.site_widths.items())
    return HookTable(path, model.family, model.n_layers, model.d_model, dtype, max_seq_length, rows)
