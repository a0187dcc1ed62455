"""npz: chunks of equally long samples, padded with zeros, and a metadata.json.

`chunks/chunk_0000.npz` has `activations` (I, C, D), `attention_mask` (I, C) int8 with 1 for a token, `token_ids`
(I, C) int32 and `sample_idx` (I,) int64. C is the context size, else the length of the longest sample.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis.exporting.items.request import ExportRequest
from analysis.exporting.targets.base import FileContent, TargetTraits
from analysis.exporting.targets.gathering import padded_items
from core.base.canonical_json import canonical_json
from core.object_store.sinks import Sink
from core.shards.formats.stored_zip import add_array, new_archive


class PaddedNpzTarget:
    """See the module."""

    name = "npz"
    traits = TargetTraits(dtypes=("float16", "float32"), pads=True)

    def hook_name(self, site: str, layer: int) -> str:
        """Our names."""
        return f"{site}_layer_{layer}"

    def file_name(self, request: ExportRequest, number: int, n_files: int) -> str:
        """A chunk."""
        return f"chunks/chunk_{number:04d}.npz"

    def write(self, content: FileContent, sink: Sink) -> dict[str, Any]:
        """Writes a chunk."""
        items = padded_items(content)
        with new_archive(sink) as archive:
            add_array(archive, "activations", items.values)
            add_array(archive, "attention_mask", items.mask.astype(np.int8))
            add_array(archive, "token_ids", items.token_ids)
            add_array(archive, "sample_idx", items.sample_idx)
        return {}

    def metadata(self, request: ExportRequest, files: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
        """What the chunks hold."""
        chunks = [{"file": file["name"], "n_items": file["n_items"], "n_tokens": file["n_rows"]} for file in files]
        fields = {
            "site": request.cut.site,
            "layer": request.cut.layer,
            "d_model": request.width,
            "dtype": request.dtype,
            "seq_len": request.item_rows,
            "n_samples": sum(file["n_items"] for file in files),
            "n_tokens": sum(file["n_rows"] for file in files),
            "chunks": chunks,
            "source": request.described,
        }
        return {"metadata.json": canonical_json(fields)}
