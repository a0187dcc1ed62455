"""The options of captures in memory; light to import, so that `--help` is quick."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from core.run.config import RunConfig


@dataclass(frozen=True)
class CaptureOptions:
    """What is captured, and how it is computed.

    Attributes:
      layers: block numbers from 0; None: all. The sites that exist once, `embedding` and `final_norm`, have the
        layer numbers -1 and n_layers.
      sites: names of `qwen2_jax.SITES`, or names of TransformerLens or Hugging Face.
      pool: vectors of each sample instead of its tokens, computed on the device, such as "last" or "exp:0.067" (the
        flag `--pool`).
      dtype: of the arrays, "float32", "float16" or "bfloat16".
      tokenizer: a transformers tokenizer; None: that of the model, which must then be a path.
      max_seq_length: the length that rows are laid out for; None: that of the longest sample. With the
        `max_seq_length` of a run the values are bit-identical to those of the run.
      revision, backend, compute_dtype, mesh, trust_remote_code, batch_size, pack: as the flags of
        extract_activations.py.
    """

    layers: int | Sequence[int] | None = None
    sites: str | Sequence[str] = "residual"
    pool: str | Sequence[str] = ()
    dtype: str = "float32"
    tokenizer: Any = None
    revision: str | None = None
    backend: str = "auto"
    compute_dtype: str = "auto"
    mesh: str = "auto"
    trust_remote_code: bool = False
    max_seq_length: int | None = None
    batch_size: int = RunConfig.batch_size
    pack: bool = True
