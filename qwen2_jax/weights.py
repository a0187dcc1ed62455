"""From checkpoint tensors to stacked parameters, one stacked tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from qwen2_jax.config import DecoderConfig
from qwen2_jax.decoder import ParamSpec, parameter_specs
from qwen2_jax.errors import ModelError, reading
from qwen2_jax.sharding import parameter_sharding

FLOAT_TYPES = ("F64", "F32", "F16", "BF16")


class WeightSource(Protocol):
    """A checkpoint: named float tensors laid out (out, in) as transformers publishes them."""

    path: Path

    def names(self) -> Collection[str]:
        """Every tensor in the checkpoint."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        ...

    def read(self, name: str) -> np.ndarray:
        """A tensor in the float type it is stored in."""
        ...


class SafetensorsFolder:
    """`model.safetensors`, or the files `model.safetensors.index.json` names; tensors are read when asked for.

    A model saved without its head names its tensors without the prefix `model.`; here they all have it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.files = weight_files(folder)

    @cached_property
    def _stored(self) -> dict[str, tuple[Any, str]]:
        """Name -> the open file that holds the tensor, and the tensor's name there."""
        handles = [_open(path) for path in self.files]
        stored = {name: (handle, name) for handle in handles for name in handle.keys()}  # noqa: SIM118 - no mapping
        if any(name.startswith("model.") for name in stored):
            return stored
        return {f"model.{name}": owner for name, owner in stored.items()}

    def _slice(self, name: str) -> Any:
        handle, stored_name = self._stored[name]
        return handle.get_slice(stored_name)

    def names(self) -> Collection[str]:
        """Every tensor in the checkpoint."""
        return self._stored.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """The tensor as stored, bfloat16 included. Raises `ModelError` when it is not a float tensor."""
        dtype = self._slice(name).get_dtype()
        if dtype not in FLOAT_TYPES:
            raise ModelError(f"{self.path}: {name} is stored as {dtype}; supported are {', '.join(FLOAT_TYPES)}")
        handle, stored_name = self._stored[name]
        return handle.get_tensor(stored_name)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in name order. Raises `ModelError` naming what is not there."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ModelError(f"{folder}: no model.safetensors(.index.json); convert the weights to safetensors first")
    with reading(index):
        content = index.read_bytes()
    try:
        weight_map = json.loads(content.decode())["weight_map"]
        files = sorted({folder / file for file in weight_map.values()})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index}: no weight_map could be read from it; download it again") from error
    if missing := [file for file in files if not file.is_file()]:
        raise ModelError(f"{missing[0]}: missing, though {index.name} names it; download it again")
    return files


def _open(path: Path) -> Any:
    try:
        with reading(path):
            path.open("rb").close()  # safe_open says "no such file" of one it may not read
            return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ModelError(f"{path}: not a whole safetensors file ({error}); download it again") from error


def load_parameters(
    source: WeightSource,
    names: Mapping[str, str],
    config: DecoderConfig,
    *,
    n_layers: int,
    with_head: bool,
    dtype: np.dtype,
    mesh: jax.sharding.Mesh | None,
) -> dict[str, jax.Array]:
    """The parameters of the first `n_layers` layers on the device (every device of `mesh`), cast to `dtype`.

    names: checkpoint name -> parameter name, "{layer}" standing for the layer.
    Host memory peaks at one stacked tensor. Raises `ModelError` for missing, left-over and misshapen tensors.
    """
    wanted = _tensors_of(parameter_specs(config), names, config.n_layers)
    _check_names(source, wanted, config, optional=() if with_head else wanted.get("lm_head", ()))
    params = {}
    for param, spec in parameter_specs(config, with_head=with_head).items():
        tensors = wanted[param][:n_layers]
        if spec.axes[0] == "layers":
            array = _stack(source, tensors, spec, dtype)
        else:
            array = _checked(source, tensors[0], spec.shape).astype(dtype)
        params[param] = jax.device_put(array, None if mesh is None else parameter_sharding(mesh, spec.axes))
    return params


def _tensors_of(specs: Mapping[str, ParamSpec], names: Mapping[str, str], n_layers: int) -> dict[str, list[str]]:
    """Parameter name -> its checkpoint tensors, one a layer for a stacked parameter."""
    return {
        param: [name.format(layer=layer) for layer in range(n_layers)] if "{layer}" in name else [name]
        for name, param in names.items()
        if param in specs
    }


def _check_names(
    source: WeightSource, wanted: Mapping[str, list[str]], config: DecoderConfig, optional: Collection[str]
) -> None:
    expected = {name for tensors in wanted.values() for name in tensors}
    present = {name for name in source.names() if not name.endswith("rotary_emb.inv_freq")}  # derived from the config
    if missing := sorted(expected - present - set(optional)):
        raise ModelError(f"{source.path}: the checkpoint lacks {_some(missing)}; is it complete and of this family?")
    left_over = sorted(present - expected)
    if config.tie_embeddings and left_over == ["lm_head.weight"]:
        return _check_tied(source, wanted["embedding"][0])
    if left_over:
        raise ModelError(f"{source.path}: the config has no place for {_some(left_over)}; is it the right one?")
    return None


def _check_tied(source: WeightSource, embedding: str) -> None:
    if not np.array_equal(source.read("lm_head.weight"), source.read(embedding)):
        raise ModelError(f"{source.path}: lm_head.weight differs from {embedding} though config.json ties them")


def _some(names: list[str], shown: int = 4) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _stack(source: WeightSource, tensors: list[str], spec: ParamSpec, dtype: np.dtype) -> np.ndarray:
    out = np.empty((len(tensors), *spec.shape[1:]), dtype)
    for layer, name in enumerate(tensors):
        out[layer] = _checked(source, name, spec.shape[1:])
    return out


def _checked(source: WeightSource, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if source.shape(name) != shape:
        raise ModelError(f"{source.path}: {name} has shape {source.shape(name)} where the config needs {shape}")
    return source.read(name)
