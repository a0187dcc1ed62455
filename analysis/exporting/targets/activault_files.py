"""activault: files of torch tensors of one size, and the JSON files that describe them.

`<hook>/<uuid>--0_0.saved.pt` is a dict: `states` (I, C, D), `input_ids` (I, C) int64, `tensor_bytes`. Its reader asks
for exactly `bytes_per_file` bytes of each file, so a last one with fewer items is left out. `statistics.json` is of all
exported rows: `mean` and `std` of each dimension, `norm` the mean L2 norm, `M2` the summed squared deviations.
"""

import io
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from analysis.exporting.items.request import ExportRequest
from analysis.exporting.targets.base import FileContent, TargetTraits
from analysis.exporting.targets.gathering import PaddedItems, padded_items
from core.base.canonical_json import canonical_json
from core.base.dtypes import DTYPES
from core.base.errors import RunError
from core.object_store.sinks import Sink

_HOOKS = {"residual": "post", "resid_pre": "pre", "mlp": "mlp.post", "attn": "self_attn.post"}
_STATISTICS_ROWS = 4096


class ActivaultTarget:
    """See the module."""

    name = "activault"
    traits = TargetTraits(
        dtypes=tuple(DTYPES),
        context_size=128,
        keeps_short=False,
        is_shuffled=True,
        needs_full_files=True,
        needs_tokens=True,
        needs="torch",
    )

    def hook_name(self, site: str, layer: int) -> str:
        """Like its own: the module of a Hugging Face model, and `pre` or `post`."""
        return f"models.layers.{layer}.{_HOOKS.get(site, site)}"

    def file_name(self, request: ExportRequest, number: int, n_files: int) -> str:
        """A name that depends on the export alone."""
        identity = uuid.uuid5(uuid.NAMESPACE_URL, f"{request.described['run']}/{request.hook_name}/{number}")
        return f"{request.hook_name}/{identity}--0_0.saved.pt"

    def write(self, content: FileContent, sink: Sink) -> dict[str, Any]:
        """Writes a file of shuffled contexts; returns sums for the statistics."""
        import torch

        items = padded_items(content, shuffle=True)
        states = _tensor(items.values)
        saved = {"states": states, "input_ids": torch.from_numpy(items.token_ids.astype(np.int64))}
        written = io.BytesIO()  # to a path, torch would store the name of the file in it
        torch.save(saved | {"tensor_bytes": states.numel() * states.element_size()}, written)
        sink.write(written.getbuffer())
        return _sums(items)

    def metadata(self, request: ExportRequest, files: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
        """`cfg.json` of the run, `metadata.json` and `statistics.json` of the hook."""
        sizes = {file["bytes"] for file in files}
        if len(sizes) != 1:
            raise RunError(f"the files have {len(sizes)} different sizes: activault's reader needs one")
        n_items, context = files[0]["n_items"], request.item_rows
        shape = [n_items, context, request.width]
        hook = {
            "batch_size": n_items,
            "sequence_length": context,
            "dtype": f"torch.{request.dtype}",
            "d_in": request.width,
            "batches_per_file": 1,
            "shape": shape,
            "input_ids_shape": shape[:2],
            "bytes_per_file": sizes.pop(),
        }
        run = {
            "run_name": request.described["run"],
            "transformer_config": {},
            "data_config": {},
            "upload_config": {"hooks": [request.hook_name], "batch_size": n_items, "batches_per_upload": 1},
            "total_tokens": sum(file["n_rows"] for file in files),
            "d_model": request.width,
            "n_total_files": len(files),
            "batches_processed": len(files),
            "num_runs": 1,
        }
        named = {"metadata.json": hook, "statistics.json": _statistics([file["more"] for file in files])}
        return {"cfg.json": canonical_json(run)} | {
            f"{request.hook_name}/{name}": canonical_json(fields) for name, fields in named.items()
        }


def _tensor(values: np.ndarray) -> Any:
    import torch

    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def _sums(items: PaddedItems) -> dict[str, Any]:
    """Count, mean, M2 and summed norms of the rows of a file."""
    rows = items.values.reshape(-1, items.values.shape[2])
    blocks = [rows[i : i + _STATISTICS_ROWS].astype(np.float64) for i in range(0, len(rows), _STATISTICS_ROWS)]
    mean = sum(block.sum(0) for block in blocks) / len(rows)
    m2 = sum(((block - mean) ** 2).sum(0) for block in blocks)
    norm = sum(float(np.linalg.norm(block, axis=1).sum()) for block in blocks)
    return {"n": len(rows), "mean": np.asarray(mean).tolist(), "M2": np.asarray(m2).tolist(), "norm": norm}


def _statistics(sums: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of all files together, in their order."""
    n, mean, m2 = 0, np.zeros(1), np.zeros(1)
    for each in sums:
        total, delta = n + each["n"], np.array(each["mean"]) - mean
        m2 = m2 + np.array(each["M2"]) + delta**2 * (n * each["n"] / total)
        mean, n = mean + delta * (each["n"] / total), total
    norm = sum(each["norm"] for each in sums) / n
    return {"mean": mean.tolist(), "std": np.sqrt(m2 / max(1, n - 1)).tolist(), "norm": norm, "M2": m2.tolist()}
