"""parquet: a folder that can be uploaded to the Hugging Face hub as it is: Parquet files and a card."""

from collections.abc import Mapping, Sequence
from typing import Any

from analysis.exporting.items.request import ExportRequest
from analysis.exporting.targets.base import FileContent, TargetTraits
from analysis.exporting.targets.item_table import item_batches, item_schema
from core.object_store.sinks import Sink
from core.shards.formats.parquet_shard import write_parquet

_CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
tags:
- activations
---

# Activations: {hook_name}

{n_items} rows with {n_rows} tokens. `{hook_name}` holds arrays (tokens, {width}) in {dtype}, taken at the site
`{site}` of layer {layer} of a model of the family {family}. `token_ids` and `positions` name the tokens, `sample_idx`
and `labels` (JSON) the text.

    from datasets import load_dataset

    rows = load_dataset("path/of/this/folder", split="train")
    arrays = rows.select_columns(["{hook_name}"]).with_format("numpy", dtype="{dtype}")
"""


class HubParquetTarget:
    """See the module."""

    name = "parquet"
    # Files on the hub are at most 500 MB by its own choice; values are compressed, and the tokens come on top.
    traits = TargetTraits(dtypes=("float16", "float32"), needs="pyarrow", file_bytes=450_000_000)

    def hook_name(self, site: str, layer: int) -> str:
        """Our names."""
        return f"{site}_layer_{layer}"

    def file_name(self, request: ExportRequest, number: int, n_files: int) -> str:
        """As the hub names them."""
        return f"data/train-{number:05d}-of-{n_files:05d}.parquet"

    def write(self, content: FileContent, sink: Sink) -> dict[str, Any]:
        """Writes a file, a row group for each block."""
        write_parquet(sink, item_schema(content.request), item_batches(content))
        return {}

    def metadata(self, request: ExportRequest, files: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
        """The card."""
        counts = {name: sum(file[name] for file in files) for name in ("n_items", "n_rows")}
        fields = {"site": request.cut.site, "layer": request.cut.layer, "family": request.described["family"]}
        fields |= {"hook_name": request.hook_name, "width": request.width, "dtype": request.dtype}
        return {"README.md": _CARD.format(**counts, **fields).encode()}
