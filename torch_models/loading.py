"""Loads causal language models with transformers from a folder, a hub id or a GGUF file; missing weights are an error.

Code that comes with a model runs only with `trust_remote_code`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from absl import logging

from core.base.errors import ModelError
from qwen2_jax.checkpoints.locate import locate_model
from torch_models.probing import Taps, find_taps
from torch_models.structure import decoder_layers, possible_widths

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedConfig, PreTrainedModel

_CONFIG_FILES = ("*.json",)
_WEIGHT_FILES = ("*.json", "*.safetensors")
_BIN_FILES = ("*.json", "pytorch_model*.bin")
_CODE_FILES = ("*.py",)
# Of models without a limit in their config (ALiBi).
_NO_LIMIT = 2**31 - 1
_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
_SHOWN_NAMES = 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ModelSource:
    """A model's source: a folder, a hub id at `revision`, or a .gguf file; and whether its own code may run."""

    path: str
    revision: str | None = None
    trust_remote_code: bool = False

    def locate(self, files: tuple[str, ...]) -> Path:
        """The folder or GGUF file on the local disk; raises ModelError when there is none."""
        return locate_model(self.path, self.revision, files + (_CODE_FILES if self.trust_remote_code else ()))

    def locate_weights(self) -> Path:
        """The same with the weights; of a hub id that has both kinds, only safetensors."""
        found = self.locate(_WEIGHT_FILES)
        return found if found.is_file() or any(found.glob("*.safetensors")) else self.locate(_BIN_FILES)


@dataclass(frozen=True)
class TorchModelShape:
    """The sizes of a model. n_heads: 1 without attention. site_widths: of possible sites, checked on loading."""

    family: str
    n_layers: int
    d_model: int
    vocab_size: int
    max_positions: int
    n_heads: int
    site_widths: Mapping[str, int]


def read_config(source: ModelSource) -> PreTrainedConfig:
    """The config as transformers reads it. Raises a one-line ModelError."""
    from transformers import AutoConfig

    found = source.locate(_CONFIG_FILES)
    with _one_line(source):
        if found.is_file():
            return AutoConfig.from_pretrained(found.parent, gguf_file=found.name)
        return AutoConfig.from_pretrained(found, trust_remote_code=source.trust_remote_code)


def model_shape(source: ModelSource) -> TorchModelShape:
    """The sizes of a model, from its config and its module tree without weights. Raises a one-line ModelError."""
    from transformers import AutoModelForCausalLM

    config = read_config(source)
    with _one_line(source), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
    return shape_of(model)


def shape_of(model: PreTrainedModel) -> TorchModelShape:
    """The sizes of an instantiated model."""
    config = model.config.get_text_config(decoder=True)
    n_layers, d_model = _count(config, "num_hidden_layers"), _count(config, "hidden_size")
    n_heads = _count(config, "num_attention_heads") if hasattr(config, "num_attention_heads") else 1
    limits = (getattr(config, name, None) for name in _LIMITS)
    return TorchModelShape(
        family=model.config.model_type,
        n_layers=n_layers,
        d_model=d_model,
        vocab_size=_count(config, "vocab_size"),
        max_positions=next((limit for limit in limits if isinstance(limit, int)), _NO_LIMIT),
        n_heads=n_heads,
        site_widths=_in_order(possible_widths(model, n_layers, d_model, n_heads)),
    )


def _in_order(widths: Mapping[str, int]) -> dict[str, int]:
    from qwen2_jax.taps import SITES

    return {site: widths[site] for site in SITES if site in widths}


def _count(config: PreTrainedConfig, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"{config.model_type}: its config has no {name}, so its layers cannot be found")
    return value


def model_digest(source: ModelSource) -> str:
    """A content digest of config and weights, and of the code where it may run. Reads every weight once."""
    from qwen2_jax.checkpoints.loading import model_digest as weights_digest

    digest = weights_digest(source.path, source.revision)
    code = sorted(source.locate(_CODE_FILES).glob("*.py")) if source.trust_remote_code else []
    if not code:
        return digest
    parts = [digest.encode(), *(file.name.encode() + b"\0" + file.read_bytes() for file in code)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, without the blocks after the last one that is needed.

    Attributes:
      shape: of the whole model.
      layers: path of the list of its blocks, of which the first `n_layers` were kept.
      has_head: whether the files contain an output head.
    """

    model: PreTrainedModel
    shape: TorchModelShape
    layers: str
    n_layers: int
    has_head: bool

    @property
    def is_whole(self) -> bool:
        """Whether no block was cut off."""
        return self.n_layers == self.shape.n_layers


def load_causal_lm(
    source: ModelSource, dtype: str, *, n_layers: int | None = None, device: str = "cpu", attention: str | None = None
) -> LoadedModel:
    """The model in `dtype` ("float32" or "bfloat16") for inference.

    n_layers: how many blocks to keep, all by default. attention: transformers' name of an implementation, such as
    "eager"; None: its default. Raises a one-line ModelError, also for missing weights, which transformers would
    initialize randomly.
    """
    found = source.locate_weights()
    options: dict[str, Any] = {"dtype": DTYPES[dtype]}
    if attention is not None:
        options["attn_implementation"] = attention
    # float32 means float32 on every device.
    torch.set_float32_matmul_precision("highest")
    with _one_line(source), _quiet():
        model, has_head = _load_gguf(found, options) if found.is_file() else _load_folder(found, source, options)
    shape = shape_of(model)
    layers = decoder_layers(model, shape.n_layers)
    kept = shape.n_layers if n_layers is None else n_layers
    del model.get_submodule(layers)[kept:]  # type: ignore[operator]
    model.config.use_cache = False
    torch.nn.Module.to(model, device)
    return LoadedModel(model.eval().requires_grad_(False), shape, layers, kept, has_head)


def find_model_taps(loaded: LoadedModel) -> Taps:
    """Where the model's sites are read. Raises ModelError when no residual stream is found."""
    return find_taps(
        loaded.model,
        loaded.layers,
        loaded.n_layers,
        n_heads=loaded.shape.n_heads,
        vocab_size=loaded.shape.vocab_size,
        whole=loaded.is_whole,
    )


def _load_folder(folder: Path, source: ModelSource, options: dict[str, Any]) -> tuple[PreTrainedModel, bool]:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, trust_remote_code=source.trust_remote_code, **options
    )
    model, info = loaded
    return model, _has_head(source, model, info["missing_keys"], info["mismatched_keys"], info["unexpected_keys"])


def _load_gguf(file: Path, options: dict[str, Any]) -> tuple[PreTrainedModel, bool]:
    """As from_pretrained(gguf_file=…), which needs one more package that its parts do not need."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_config(config, **options)
    # Its progress bar cannot be disabled.
    with redirect_stderr(StringIO()):
        tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    result = model.load_state_dict(tensors, strict=False)
    tied = model.all_tied_weights_keys
    missing = [name for name in result.missing_keys if name not in tied]
    has_head = _has_head(ModelSource(str(file)), model, missing, (), result.unexpected_keys)
    model.tie_weights()
    return model, has_head


def _has_head(
    source: ModelSource,
    model: PreTrainedModel,
    missing: Iterable[str],
    mismatched: Iterable[Any],
    unexpected: Iterable[str],
) -> bool:
    """Whether the files have the head. Raises ModelError for other missing weights; no site comes after the head."""
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None)
    wrong = sorted(name for name in missing if head is None or not name.startswith(f"{head}."))
    wrong += sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in mismatched)
    if wrong:
        raise ModelError(
            f"{source.path}: {len(wrong)} weights are missing or have the wrong shape, {wrong[0]} first: "
            "download the model again"
        )
    leftover = sorted(unexpected)
    if leftover:
        shown = ", ".join(leftover[:_SHOWN_NAMES]) + ", …" * (len(leftover) > _SHOWN_NAMES)
        logging.warning("%s: transformers does not use %d tensors (%s)", source.path, len(leftover), shown)
    return head is not None and not any(name.startswith(f"{head}.") for name in missing)


@contextmanager
def _quiet() -> Iterator[None]:
    """Disables transformers' progress bars, and its report on weights, which `_has_head` checks."""
    from transformers.utils import logging as hf_logging

    verbosity = hf_logging.get_verbosity()
    had_bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if had_bars:
            hf_logging.enable_progress_bar()


@contextmanager
def _one_line(source: ModelSource) -> Iterator[None]:
    """Turns any exception of transformers into a one-line ModelError that says what to do."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # invalid model files may raise any type
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{source.path}: the model comes with its own code: read it, then pass "
                "--trust_remote_code --backend torch"
            ) from error
        raise ModelError(f"{source.path}: transformers cannot load it ({reason})") from error


def best_device() -> str:
    """CUDA where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
