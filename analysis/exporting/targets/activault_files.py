"""activault: files of torch tensors of one size, and the JSON files that describe them.

`<hook>/<uuid>--0_0.saved.pt` is a dict: `states` (I, C, D), `input_ids` (I, C) int64, `tensor_bytes`. Its reader asks
for exactly `bytes_per_file` bytes of each file, so a last one with fewer items is left out. `statistics.json` is of all
exported rows: `mean` and `std` of each dimension, `norm` the mean L2 norm, `M2` the summed squared deviations.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float64

from analysis.exporting.items.request import ExportRequest
from analysis.exporting.targets.base import FileContent, TargetTraits
from analysis.exporting.targets.gathering import PaddedItems, padded_items
from core.base.canonical_json import canonical_json
from core.base.dtypes import DTYPES
from core.base.errors import RunError
from core.object_store.sinks import Sink
from core.shards.formats.arrow_sink import ArrowSink

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
        file: Any = ArrowSink(sink)
        # To a path, torch would store the name of the file in it.
        torch.save(saved | {"tensor_bytes": states.numel() * states.element_size()}, file)
        return _sums(items)

    def metadata(self, request: ExportRequest, files: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
        """`cfg.json` of the run, `metadata.json` and `statistics.json` of the hook."""
        sizes = {file["bytes"] for file in files}
        if len(sizes) != 1:
            raise RunError(f"the files have {len(sizes)} different sizes: activault's reader needs one")
        named = {
            "metadata.json": _described(request, files[0]["n_items"], sizes.pop()),
            "statistics.json": _statistics([file["more"] for file in files]),
        }
        return {"cfg.json": canonical_json(_run(request, files))} | {
            f"{request.hook_name}/{name}": canonical_json(fields) for name, fields in named.items()
        }


def _described(request: ExportRequest, n_items: int, n_bytes: int) -> dict[str, Any]:
    """What the reader needs of every file of a hook."""
    shape = [n_items, request.item_rows, request.width]
    return {
        "batch_size": n_items,
        "sequence_length": request.item_rows,
        "dtype": f"torch.{request.dtype}",
        "d_in": request.width,
        "batches_per_file": 1,
        "shape": shape,
        "input_ids_shape": shape[:2],
        "bytes_per_file": n_bytes,
    }


def _run(request: ExportRequest, files: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the tool stores of a run."""
    upload = {"hooks": [request.hook_name], "batch_size": files[0]["n_items"], "batches_per_upload": 1}
    return {
        "run_name": request.described["run"],
        "transformer_config": {},
        "data_config": {},
        "upload_config": upload,
        "total_tokens": sum(file["n_rows"] for file in files),
        "d_model": request.width,
        "n_total_files": len(files),
        "batches_processed": len(files),
        "num_runs": 1,
    }


def _tensor(values: np.ndarray) -> Any:
    import torch

    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def _sums(items: PaddedItems) -> dict[str, Any]:
    """Count, mean, M2 and summed norms of the rows of a file."""
    rows = items.values.reshape(-1, items.values.shape[2])
    moments = _Moments()
    for start in range(0, len(rows), _STATISTICS_ROWS):
        block = rows[start : start + _STATISTICS_ROWS].astype(np.float64)
        mean = block.mean(0)
        norm = float(np.linalg.norm(block, axis=1).sum())
        moments = moments.merged(_Moments(len(block), mean, ((block - mean) ** 2).sum(0), norm))
    return {"n": moments.n, "mean": moments.mean.tolist(), "M2": moments.m2.tolist(), "norm": moments.norm}


def _statistics(sums: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of all files together, in their order."""
    moments = _Moments()
    for each in sums:
        more = _Moments(each["n"], np.array(each["mean"]), np.array(each["M2"]), each["norm"])
        moments = moments.merged(more)
    std = np.sqrt(moments.m2 / max(1, moments.n - 1))
    norm = moments.norm / moments.n
    return {"mean": moments.mean.tolist(), "std": std.tolist(), "norm": norm, "M2": moments.m2.tolist()}


@dataclass(frozen=True)
class _Moments:
    """Of `n` rows: their mean, the summed squares of their deviations from it, and the sum of their L2 norms."""

    n: int = 0
    mean: Float64[np.ndarray, "_"] = field(default_factory=lambda: np.zeros(1))
    m2: Float64[np.ndarray, "_"] = field(default_factory=lambda: np.zeros(1))
    norm: float = 0.0

    def merged(self, other: "_Moments") -> "_Moments":
        """Of the rows of both (Chan, Golub and LeVeque 1979)."""
        n, delta = self.n + other.n, other.mean - self.mean
        mean = self.mean + delta * (other.n / n)
        return _Moments(n, mean, self.m2 + other.m2 + delta**2 * (self.n * other.n / n), self.norm + other.norm)
