"""arrow: the folder that `datasets.save_to_disk` makes, which `load_from_disk` maps to memory in place.

Files are Arrow's IPC streams. Format: https://arrow.apache.org/docs/format/Columnar.html#ipc-streaming-format
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from analysis.exporting.items.request import ExportRequest
from analysis.exporting.targets.base import FileContent, TargetTraits
from analysis.exporting.targets.item_table import item_batches, item_schema
from core.base.canonical_json import canonical_json
from core.object_store.sinks import Sink
from core.shards.formats.arrow_sink import ArrowSink


class SavedDatasetTarget:
    """See the module."""

    name = "arrow"
    traits = TargetTraits(dtypes=("float16", "float32"), needs="pyarrow", file_bytes=450_000_000)

    def hook_name(self, site: str, layer: int) -> str:
        """Our names."""
        return f"{site}_layer_{layer}"

    def file_name(self, request: ExportRequest, number: int, n_files: int) -> str:
        """As datasets names them."""
        return stream_name(number, n_files)

    def write(self, content: FileContent, sink: Sink) -> dict[str, Any]:
        """Writes a file, a record batch for each block."""
        write_stream(sink, item_schema(content.request), item_batches(content))
        return {}

    def metadata(self, request: ExportRequest, files: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
        """What makes the folder a dataset."""
        return dataset_files(item_schema(request), files)


def stream_name(number: int, n_files: int) -> str:
    """The name that datasets gives to a file."""
    return f"data-{number:05d}-of-{n_files:05d}.arrow"


def write_stream(sink: Sink, schema: Any, batches: Iterator[Any]) -> None:
    """Writes an IPC stream."""
    import pyarrow

    with pyarrow.ipc.new_stream(pyarrow.PythonFile(ArrowSink(sink), mode="w"), schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def dataset_files(schema: Any, files: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """`dataset_info.json` and `state.json` of a saved dataset."""
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    contents = canonical_json([[file["name"], file["bytes"], file["crc32c"]] for file in files])
    state: dict[str, Any] = {
        "_data_files": [{"filename": file["name"]} for file in files],
        "_fingerprint": hashlib.sha256(contents).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    return {"dataset_info.json": canonical_json(info), "state.json": canonical_json(state)}
