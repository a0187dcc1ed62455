"""llamascopium (formerly Language-Model-SAEs): `<hook>/chunk-00000000.safetensors`.

Without a context size, or with 1, a chunk is flat: `activation` (N, D); `tokens` int64, `mask` and `attention_mask`
int32 (N,). With a context size C it is two-dimensional: (I, C, D) and (I, C), contexts that are shorter are padded, and
both masks are 0 there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis.exporting.items.request import ExportRequest
from analysis.exporting.targets.base import FileContent, TargetTraits
from analysis.exporting.targets.gathering import flat_rows, padded_items
from analysis.exporting.targets.safetensors_files import write_tensors
from core.base.dtypes import DTYPES
from core.object_store.sinks import Sink
from qwen2_jax.mapping.hook_names import transformer_lens_name


class LlamascopiumTarget:
    """See the module."""

    name = "llamascopium"
    traits = TargetTraits(dtypes=tuple(DTYPES), context_size=1, pads=True, needs_tokens=True)

    def hook_name(self, site: str, layer: int) -> str:
        """TransformerLens' name."""
        name = transformer_lens_name(site)
        return f"{site}.{layer}" if name is None else name.replace("{i}", str(layer))

    def file_name(self, request: ExportRequest, number: int, n_files: int) -> str:
        """A chunk."""
        return f"{request.hook_name}/chunk-{number:08d}.safetensors"

    def write(self, content: FileContent, sink: Sink) -> dict[str, Any]:
        """Writes a chunk."""
        if content.request.item_rows == 1:
            rows = flat_rows(content)
            values, tokens, mask = rows.values, rows.token_ids, np.ones(len(rows.values), np.int32)
        else:
            items = padded_items(content)
            values, tokens, mask = items.values, items.token_ids, items.mask.astype(np.int32)
        tensors = {"activation": values, "tokens": tokens.astype(np.int64), "mask": mask, "attention_mask": mask}
        write_tensors(sink, tensors, {})
        return {}

    def metadata(self, request: ExportRequest, files: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
        """Nothing: its reader takes what it needs from the chunks."""
        return {}
