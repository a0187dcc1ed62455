"""Activations as other tools store them, sample by sample. Their files are untrusted."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int32, Shaped

from core.base.dtypes import DTYPES
from core.base.errors import ModelError, RunError, UsageError
from core.base.safetensors_file import read_tensors
from core.shards.formats.arrow_columns import read_nested
from qwen2_jax.mapping.hook_names import parse_hook_name
from qwen2_jax.taps import SITES

NO_TOKEN = -1
"""The token id where the source has none."""


@dataclass(frozen=True)
class ForeignSample:
    """One sample of another tool; labels say where it is from."""

    values: Shaped[np.ndarray, "L T D"]
    token_ids: Int32[np.ndarray, "T"]
    labels: dict[str, Any]


class ForeignSource(Protocol):
    """Stored activations of another tool.

    Attributes:
      layers: their numbers where the source names them, else 0, 1, ….
      files: name and size of each file, in their order: they stand for the content in the identity of the output.
    """

    layers: tuple[int, ...]
    width: int
    dtype: str
    files: tuple[tuple[str, int], ...]

    def samples(self, first: int) -> Iterator[ForeignSample]:
        """The samples from number `first` on, in order. Raises RunError naming a damaged file."""
        ...


class VllmSource:
    """What vLLM's ExampleHiddenStatesConnector writes: one safetensors file a request.

    `hidden_states` (T, L, D), `token_ids` (T,). The order of requests is that of the file names.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, paths = folder, sorted(folder.rglob("*.safetensors"))
        if not paths:
            raise UsageError(f"{folder}: no *.safetensors there, which vLLM writes for each request")
        self.files = tuple((str(path.relative_to(folder)), path.stat().st_size) for path in paths)
        states = self._read(paths[0])[0]
        self.layers, self.width, self.dtype = tuple(range(len(states))), states.shape[2], states.dtype.name

    def samples(self, first: int) -> Iterator[ForeignSample]:
        """See `ForeignSource`."""
        for name, _ in self.files[first:]:
            values, token_ids = self._read(self._folder / name)
            if (len(values), values.shape[2], values.dtype.name) != (len(self.layers), self.width, self.dtype):
                raise RunError(f"{self._folder / name}: hidden_states differ from those of {self.files[0][0]} in form")
            yield ForeignSample(values, token_ids, {"file": name})

    def _read(self, path: Path) -> tuple[Shaped[np.ndarray, "L T D"], Int32[np.ndarray, "T"]]:
        try:
            tensors = read_tensors(path.read_bytes())
            states, token_ids = tensors["hidden_states"], tensors["token_ids"]
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise RunError(f"{path}: no hidden_states and token_ids of vLLM: {error!r}") from error
        if states.ndim != 3 or token_ids.shape != states.shape[:1] or states.dtype not in DTYPES.values():
            raise RunError(f"{path}: hidden_states {states.dtype} {states.shape}, token_ids {token_ids.shape}")
        return states.transpose(1, 0, 2), token_ids.astype(np.int32)


class SaeLensSource:
    """SAELens' cached activations: a saved dataset with a column (C, D) for each hook, and perhaps `token_ids`.

    site: whose layers are read; others are left out.
    """

    def __init__(self, folder: Path, site: str) -> None:
        try:
            features = json.loads((folder / "dataset_info.json").read_bytes())["features"]
            listed = json.loads((folder / "state.json").read_bytes())["_data_files"]
            self._paths = [folder / Path(file["filename"]).name for file in listed]
            self.files = tuple((path.name, path.stat().st_size) for path in self._paths)
            arrays = {name: feature for name, feature in features.items() if feature.get("_type") == "Array2D"}
            self._hooks = dict(sorted(_hooks_of(arrays, site).items()))
            forms = {(*arrays[hook]["shape"], arrays[hook]["dtype"]) for hook in self._hooks.values()}
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            raise UsageError(f"{folder}: not cached activations of SAELens (a saved dataset): {error!r}") from error
        if len(forms) != 1:
            raise UsageError(f"{folder}: no column of {site}, or of different shapes: it has {', '.join(arrays)}")
        self.layers, self._has_tokens = tuple(self._hooks), "token_ids" in features
        _, self.width, self.dtype = forms.pop()
        if self.dtype not in DTYPES or type(self.width) is not int:
            raise UsageError(f"{folder}: its columns are {self.dtype} of width {self.width}")

    def samples(self, first: int) -> Iterator[ForeignSample]:
        """See `ForeignSource`."""
        import pyarrow

        number = 0
        for path in self._paths:
            try:
                with pyarrow.memory_map(str(path)) as file:
                    for batch in pyarrow.ipc.open_stream(file):
                        if number + batch.num_rows > first:
                            yield from self._rows(batch, max(0, first - number))
                        number += batch.num_rows
            except (pyarrow.ArrowException, LookupError, OSError, ValueError) as error:
                raise RunError(f"{path}: cannot be read: {error}") from error

    def _rows(self, batch: Any, first: int) -> Iterator[ForeignSample]:
        batch.validate(full=True)
        arrays = [read_nested(batch.column(hook), DTYPES[self.dtype], self.width) for hook in self._hooks.values()]
        offsets = arrays[0][1]
        for row in range(first, batch.num_rows):
            start, stop = offsets[row : row + 2].tolist()
            ids = batch.column("token_ids")[row].as_py() if self._has_tokens else [NO_TOKEN] * (stop - start)
            values = np.stack([rows[start:stop] for rows, _ in arrays])
            yield ForeignSample(values, np.array(ids, np.int32), {})


def _hooks_of(columns: Sequence[str] | dict[str, Any], site: str) -> dict[int, str]:
    """The columns that are layers of a site, by layer."""
    found = {}
    for column in columns:
        try:
            hook = parse_hook_name(column, tuple(SITES))
        except ModelError:
            continue
        if hook.site == site:
            found[hook.layer or 0] = column
    return found
