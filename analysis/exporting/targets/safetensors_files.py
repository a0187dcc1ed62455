"""safetensors: rows of all items one after the other, with the offsets that cut them.

`activations-00000-of-00003.safetensors` has `activations` (N, D), `token_ids` and `positions` (N,) int32, `sample_idx`
(I,) int64 and `offsets` (I+1,) int64: item i has rows offsets[i] to offsets[i + 1].
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis.exporting.items.request import ExportRequest
from analysis.exporting.targets.base import FileContent, TargetTraits
from analysis.exporting.targets.gathering import flat_rows
from core.base.canonical_json import canonical_json
from core.base.dtypes import DTYPES
from core.base.safetensors_file import safetensors_header
from core.object_store.sinks import Sink


class SafetensorsTarget:
    """See the module."""

    name = "safetensors"
    traits = TargetTraits(dtypes=tuple(DTYPES))

    def hook_name(self, site: str, layer: int) -> str:
        """Our names."""
        return f"{site}_layer_{layer}"

    def file_name(self, request: ExportRequest, number: int, n_files: int) -> str:
        """As the hub names the files of a model."""
        return f"activations-{number:05d}-of-{n_files:05d}.safetensors"

    def write(self, content: FileContent, sink: Sink) -> dict[str, Any]:
        """Writes a file."""
        rows = flat_rows(content)
        tensors = {
            "activations": rows.values,
            "token_ids": rows.token_ids,
            "positions": rows.positions,
            "sample_idx": rows.sample_idx,
            "offsets": rows.offsets,
        }
        metadata = {"hook_name": content.request.hook_name, "source": json.dumps(content.request.described)}
        write_tensors(sink, tensors, metadata)
        return {}

    def metadata(self, request: ExportRequest, files: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
        """Which file has how many items and rows."""
        listed = [{name: file[name] for name in ("name", "n_items", "n_rows")} for file in files]
        return {"index.json": canonical_json({"hook_name": request.hook_name, "files": listed})}


def write_tensors(sink: Sink, tensors: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, wide dtypes first so that every tensor is aligned to its own."""
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    sink.write(safetensors_header(ordered, metadata))
    for tensor in ordered.values():
        sink.write(np.ascontiguousarray(tensor).view(np.uint8).reshape(-1).data)
