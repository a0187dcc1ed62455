"""Load a model: find it, read its config, put its weights on the device."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from absl import logging

from core.base.errors import ModelError, reading
from qwen2_jax.checkpoints import weight_cache
from qwen2_jax.checkpoints.bin_source import bin_index
from qwen2_jax.checkpoints.gguf import open_gguf
from qwen2_jax.checkpoints.locate import (
    CONFIG_FILES,
    TOKENIZER_FILES,
    VOCABULARY_FILES,
    ModelFiles,
    find_gguf,
    find_model,
    locate_model,
)
from qwen2_jax.checkpoints.safetensors_source import safetensors_index
from qwen2_jax.checkpoints.weight_source import Checkpoint, StoredTensor, WeightSource
from qwen2_jax.checkpoints.weights import cut_config, load_parameters
from qwen2_jax.config import DecoderConfig
from qwen2_jax.decoder import Decoder
from qwen2_jax.families import FAMILIES, Family, decoder_config
from qwen2_jax.mapping.hf_config import read_config_json
from qwen2_jax.parameters import parameter_specs
from qwen2_jax.sharding import ModelMesh

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMPUTE_DTYPES = ("float32", "bfloat16")


def load_config(path: str, revision: str | None = None) -> DecoderConfig:
    """The model's config, without its weights. Raises `ModelError` for what is missing or not supported."""
    gguf = find_gguf(path)
    return open_gguf(gguf).config if gguf else _config_in(locate_model(path, revision, CONFIG_FILES), path)


def _config_in(folder: Path, place: str) -> DecoderConfig:
    """place: what messages call the folder where it is a copy of another."""
    try:
        return decoder_config(read_config_json(folder))
    except ModelError as error:
        text = str(error) if str(folder) in str(error) else f"{folder / 'config.json'}: {error}"
        raise type(error)(text.replace(str(folder), place if "://" in place else str(folder))) from error


def load_model(
    path: str,
    *,
    dtype: jnp.dtype | type = jnp.float32,
    revision: str | None = None,
    mesh: ModelMesh | None = None,
    n_layers: int | None = None,
    with_final_norm: bool = True,
    with_head: bool = True,
    weights_cache_dir: str | None = None,
) -> Decoder:
    """A decoder with its weights on the device (laid out over `mesh`), held and computed in `dtype`.

    path: a Hugging Face folder, a hub id, a URL such as gs:// of a folder, a .gguf file or a folder holding one.
    n_layers: only the first so many layers are read and held; a decoder cut short has no final norm and no head.
    with_head=False leaves out the output projection, with_final_norm=False as well the norm before it.
    weights_cache_dir: weights that `convert_weights` put there are taken instead of the checkpoint's.
    Raises `ModelError` in one line for anything missing, left over, misshapen or not supported.
    """
    compute_dtype = _compute_dtype(dtype)
    files = find_model(path, revision)
    family, config = _family_and_config(files)
    n_loaded = config.n_layers if n_layers is None else n_layers
    if not 1 <= n_loaded <= config.n_layers:
        raise ModelError(f"{path}: {n_loaded} layers asked for, the model has {config.n_layers}")
    whole = n_loaded == config.n_layers
    parts = {"with_final_norm": with_final_norm and whole, "with_head": with_head and whole}
    params = None
    if weights_cache_dir is not None and weight_cache.exists(weights_cache_dir):
        specs = parameter_specs(cut_config(config, n_loaded), **parts)
        cache = weight_cache.WeightCache(weights_cache_dir, _digest(files), compute_dtype.name, parameter_specs(config))
        params = weight_cache.load_cached(cache, specs, compute_dtype, mesh)
    if params is None:
        source = open_weights(files)
        params = load_parameters(source, family, config, n_layers=n_loaded, dtype=compute_dtype, mesh=mesh, **parts)
    return Decoder(cut_config(config, n_loaded), params, mesh)


@dataclass(frozen=True)
class Converted:
    """What `convert_weights` did. bytes: that were written, 0 where the cache was there already."""

    url: str
    digest: str
    dtype: str
    bytes: int


def convert_weights(
    path: str, weights_cache_dir: str, *, dtype: str = "bfloat16", revision: str | None = None
) -> Converted:
    """Writes the model's weights, stacked and cast, where `load_model` finds them with the same `weights_cache_dir`.

    Holds the whole model on the first device. Raises `ModelError` as `load_model` does.
    """
    compute_dtype = _compute_dtype(dtype)
    files = find_model(path, revision)
    digest = _digest(files)
    family, config = _family_and_config(files)
    cache = weight_cache.WeightCache(weights_cache_dir, digest, dtype, parameter_specs(config))
    try:
        if cache.read() is not None:
            return Converted(cache.url, digest, dtype, 0)
    except weight_cache.DamagedCacheError as error:
        logging.warning("%s; writing it anew", error)
    source = open_weights(files)
    params = load_parameters(source, family, config, n_layers=config.n_layers, dtype=compute_dtype, mesh=None)
    return Converted(cache.url, digest, dtype, cache.write(params))


def _compute_dtype(dtype: jnp.dtype | type | str) -> np.dtype:
    if np.dtype(dtype).name not in COMPUTE_DTYPES:
        raise ModelError(
            f"compute dtype {np.dtype(dtype).name} is not supported; choose from {', '.join(COMPUTE_DTYPES)}"
        )
    return np.dtype(dtype)


def _family_and_config(files: ModelFiles) -> tuple[Family, DecoderConfig]:
    if files.folder is None:
        gguf = open_gguf(files.weights[0])
        return gguf.family, gguf.config
    config = _config_in(files.folder, files.place)
    return FAMILIES[config.family], config


def open_weights(files: ModelFiles) -> WeightSource:
    """The checkpoint, of which only headers are read so far. Raises `ModelError` for a damaged file."""
    if files.folder is None:
        return open_gguf(files.weights[0])
    index = bin_index if files.weights[0].name.endswith(".bin") else safetensors_index
    tensors: dict[str, StoredTensor] = {}
    with ThreadPoolExecutor(8) as pool:
        for file, found in zip(files.weights, pool.map(index, files.weights), strict=True):
            if twice := tensors.keys() & found.keys():
                name = min(twice)
                raise ModelError(f"{file.url}: {name} is there and in {tensors[name].file.name}; keep one of them")
            tensors |= found
    return Checkpoint(files.place, tensors)


def model_identity(path: str, revision: str | None = None) -> dict[str, str | None]:
    """{"family", "revision", "digest"}: what makes two runs use the same model, wherever its files lie.

    digest: sha256 over the config's bytes and the name, size and crc32c of every weight file. Reads every local weight
    once; a bucket keeps the checksums of its objects.
    revision: the commit for a model from the hub, else None.
    """
    files = find_model(path, revision)
    _, config = _family_and_config(files)
    return {"family": config.family, "revision": files.commit, "digest": _digest(files)}


def model_digest(path: str, revision: str | None = None) -> str:
    """The digest of `model_identity`, for a model of any family."""
    return _digest(find_model(path, revision))


def _digest(files: ModelFiles) -> str:
    config = b"" if files.folder is None else (files.folder / "config.json").read_bytes()
    described = [[file.name, file.size, file.crc32c()] for file in files.weights]
    return hashlib.sha256(json.dumps(described).encode() + config).hexdigest()


def tokenizer_digest(path: str, revision: str | None = None) -> str | None:
    """A content digest of the tokenizer's files: sha256 over their names and bytes; None when there are none.

    For a GGUF file, which holds tokenizer and weights together, it is that of the file's crc32c.
    """
    gguf = find_gguf(path)
    if gguf is not None:
        return hashlib.sha256(gguf.crc32c().encode()).hexdigest()
    found = locate_model(path, revision, TOKENIZER_FILES)
    names = {name for pattern in TOKENIZER_FILES for name in found.glob(pattern)}
    files = sorted(name for name in names if name.name not in CONFIG_FILES and "index.json" not in name.name)
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        with reading(file):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, hub id or URL, or one built from a GGUF file's metadata. Needs no torch.

    Raises `ModelError` when there is none, its vocabulary is empty or the GGUF file's kind is not known.
    """
    # transformers' advice to install torch is not for those who need a tokenizer alone.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    gguf = find_gguf(path)
    if gguf is not None:
        from qwen2_jax.checkpoints.gguf_tokenizer import gguf_tokenizer

        return gguf_tokenizer(open_gguf(gguf))
    found = locate_model(path, revision, TOKENIZER_FILES)
    if not any(file for pattern in VOCABULARY_FILES for file in found.glob(pattern)):
        raise ModelError(f"no tokenizer files in {path if '://' in path else found}; give one with --tokenizer_path")
    tokenizer = _tokenizer_of_folder(path, found)
    # transformers builds some kinds around no vocabulary at all, and they then find no token in any text.
    if not tokenizer.vocab_size:
        raise ModelError(f"{path}: the tokenizer's vocabulary is empty; give one with --tokenizer_path")
    return tokenizer


def _tokenizer_of_folder(path: str, found: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(found, trust_remote_code=False)
    except Exception as error:  # transformers lets through whatever a file's content makes its code raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{path}: no tokenizer could be loaded ({reason}); give one with --tokenizer_path") from error
