"""Load a model: find it, read its config, put its weights on the device."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import google_crc32c
import jax
import jax.numpy as jnp
import numpy as np

from qwen2_jax import gguf
from qwen2_jax.config import DecoderConfig
from qwen2_jax.decoder import Decoder
from qwen2_jax.errors import ModelError, reading
from qwen2_jax.families import FAMILIES, decoder_config
from qwen2_jax.hf_config import read_config_json
from qwen2_jax.locate import CONFIG_FILES, TOKENIZER_FILES, VOCABULARY_FILES, WEIGHT_FILES, hub_commit, locate_model
from qwen2_jax.weights import SafetensorsFolder, load_parameters, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMPUTE_DTYPES = ("float32", "bfloat16")


def load_config(path: str, revision: str | None = None) -> DecoderConfig:
    """The model's config, without its weights. Raises `ModelError` for what is missing or not supported."""
    return _config(locate_model(path, revision, CONFIG_FILES))


def _config(found: Path) -> DecoderConfig:
    if found.is_file():
        return gguf.open_gguf(found).config
    try:
        return decoder_config(read_config_json(found))
    except ModelError as error:
        raise error if str(found) in str(error) else ModelError(f"{found / 'config.json'}: {error}") from error


def load_model(
    path: str,
    *,
    dtype: jnp.dtype | type = jnp.float32,
    revision: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    n_layers: int | None = None,
    with_head: bool = True,
) -> Decoder:
    """A decoder with its weights on the device (on every device of `mesh`), held and computed in `dtype`.

    path: a Hugging Face folder, a hub id, a .gguf file or a folder holding one.
    n_layers: only the first so many layers are read and held; a decoder cut short has no head.
    with_head=False leaves out the final norm and output projection, which only logits need.
    Raises `ModelError` in one line for anything missing, left over, misshapen or not supported.
    """
    compute_dtype = np.dtype(dtype)
    if compute_dtype.name not in COMPUTE_DTYPES:
        raise ModelError(
            f"compute dtype {compute_dtype.name} is not supported; choose from {', '.join(COMPUTE_DTYPES)}"
        )
    found = locate_model(path, revision, WEIGHT_FILES)
    config = _config(found)
    kept = config.n_layers if n_layers is None else n_layers
    if not 1 <= kept <= config.n_layers:
        raise ModelError(f"{path}: {kept} layers asked for, the model has {config.n_layers}")
    source = gguf.open_gguf(found) if found.is_file() else SafetensorsFolder(found)
    params = load_parameters(
        source,
        gguf.WEIGHTS if found.is_file() else FAMILIES[config.family].weights,
        config,
        n_layers=kept,
        with_head=with_head and kept == config.n_layers,
        dtype=compute_dtype,
        mesh=mesh,
    )
    return Decoder(dataclasses.replace(config, n_layers=kept, windows=config.windows[:kept]), params)


def model_identity(path: str, revision: str | None = None) -> dict[str, str | None]:
    """{"family", "revision", "digest"}: what makes two runs use the same model, wherever its files lie.

    digest: sha256 over the config's bytes and the name, size and crc32c of every weight file. Reads every weight once.
    revision: the commit for a model from the hub, else None.
    """
    found = locate_model(path, revision, WEIGHT_FILES)
    files = [found] if found.is_file() else weight_files(found)
    family = _config(found).family
    config = b"" if found.is_file() else (found / "config.json").read_bytes()
    described = [[file.name, file.stat().st_size, _crc32c(file)] for file in files]
    digest = hashlib.sha256(json.dumps(described).encode() + config).hexdigest()
    return {"family": family, "revision": hub_commit(found), "digest": digest}


def tokenizer_digest(path: str, revision: str | None = None) -> str | None:
    """A content digest of the tokenizer's files: sha256 over their names and bytes; None when there are none.

    For a GGUF file, which holds tokenizer and weights together, it is that of the file's crc32c.
    """
    found = locate_model(path, revision, TOKENIZER_FILES)
    if found.is_file():
        return hashlib.sha256(_crc32c(found).encode()).hexdigest()
    names = {name for pattern in TOKENIZER_FILES for name in found.glob(pattern)}
    files = sorted(name for name in names if name.name not in CONFIG_FILES and "index.json" not in name.name)
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        with reading(file):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _crc32c(path: Path) -> str:
    checksum = google_crc32c.Checksum()
    with reading(path), path.open("rb") as file:
        while block := file.read(8 << 20):
            checksum.update(block)
    return checksum.hexdigest().decode()


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id, or one built from a GGUF file's metadata. Needs no torch.

    Raises `ModelError` when there is none, its vocabulary is empty or the GGUF file's kind is not known.
    """
    found = locate_model(path, revision, TOKENIZER_FILES)
    # transformers' advice to install torch is not for those who need a tokenizer alone.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if found.is_file():
        from qwen2_jax.gguf_tokenizer import gguf_tokenizer

        return gguf_tokenizer(gguf.open_gguf(found))
    if not any(file for pattern in VOCABULARY_FILES for file in found.glob(pattern)):
        raise ModelError(f"no tokenizer files in {found}; give one with --tokenizer_path")
    tokenizer = _tokenizer_of_folder(path, found)
    # transformers builds some kinds around no vocabulary at all, and they then find no token in any text.
    if not tokenizer.vocab_size:
        raise ModelError(f"{path}: the tokenizer's vocabulary is empty; give one with --tokenizer_path")
    return tokenizer


def _tokenizer_of_folder(path: str, found: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(found)
    except Exception as error:  # transformers lets through whatever a file's content makes its code raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{path}: no tokenizer could be loaded ({reason}); give one with --tokenizer_path") from error
