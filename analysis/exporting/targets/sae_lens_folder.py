"""sae_lens: what SAELens reads with `use_cached_activations=True`: a saved dataset of arrays (C, D).

The column is named after the hook; `token_ids` are lists of C numbers. Its reader does not shuffle, so rows are
shuffled here. With C = 1, the default, a row is a token, and tokens of all samples are mixed.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from analysis.exporting.items.request import ExportRequest
from analysis.exporting.targets.base import FileContent, TargetTraits
from analysis.exporting.targets.gathering import PaddedItems, padded_items
from analysis.exporting.targets.saved_dataset import dataset_files, stream_name, write_stream
from core.object_store.sinks import Sink
from core.shards.formats.arrow_columns import ArrayColumn, nested_lists, table_schema
from qwen2_jax.mapping.hook_names import transformer_lens_name

_BATCH_BYTES = 16 << 20


class SaeLensTarget:
    """See the module."""

    name = "sae_lens"
    traits = TargetTraits(
        dtypes=("float16", "float32"),
        context_size=1,
        keeps_short=False,
        is_shuffled=True,
        needs_tokens=True,
        needs="pyarrow",
    )

    def hook_name(self, site: str, layer: int) -> str:
        """TransformerLens' name."""
        name = transformer_lens_name(site)
        return f"{site}.{layer}" if name is None else name.replace("{i}", str(layer))

    def file_name(self, request: ExportRequest, number: int, n_files: int) -> str:
        """As datasets names them."""
        return stream_name(number, n_files)

    def write(self, content: FileContent, sink: Sink) -> dict[str, Any]:
        """Writes a file of shuffled rows."""
        items = padded_items(content, shuffle=True)
        write_stream(sink, _schema(content.request), _batches(content.request, items))
        return {}

    def metadata(self, request: ExportRequest, files: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
        """What makes the folder a dataset."""
        return dataset_files(_schema(request), files)


def _schema(request: ExportRequest) -> Any:
    column = ArrayColumn(request.hook_name, request.dtype, request.width, request.item_rows)
    return table_schema([column], {"token_ids": f"[int32]*{request.item_rows}"})


def _batches(request: ExportRequest, items: PaddedItems) -> Iterator[Any]:
    import pyarrow

    schema, size = _schema(request), request.item_rows
    step = max(1, _BATCH_BYTES // (size * request.row_bytes))
    for start in range(0, len(items.values), step):
        values = items.values[start : start + step]
        flat = pyarrow.array(items.token_ids[start : start + step].reshape(-1))
        columns = {
            "token_ids": pyarrow.FixedSizeListArray.from_arrays(flat, size),
            request.hook_name: nested_lists(values.reshape(-1, request.width), np.full(len(values), size)),
        }
        yield pyarrow.record_batch([columns[name] for name in schema.names], schema=schema)
