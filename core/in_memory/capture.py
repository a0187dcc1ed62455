"""The activations of some samples, by one call."""

from collections.abc import Sequence
from typing import Any

from core.in_memory.capturer import Activations, load_capturer
from core.in_memory.given_samples import Sample
from core.run.config import RunConfig
from qwen2_jax import Decoder


def capture(
    model: str | Decoder,
    samples: Sample | Sequence[Sample],
    *,
    layers: int | Sequence[int] | None = None,
    sites: str | Sequence[str] = "residual",
    pool: str | Sequence[str] = (),
    dtype: str = "float32",
    tokenizer: Any = None,
    revision: str | None = None,
    backend: str = "auto",
    compute_dtype: str = "auto",
    mesh: str = "auto",
    trust_remote_code: bool = False,
    max_seq_length: int | None = None,
    batch_size: int = RunConfig.batch_size,
    pack: bool = True,
    progress: bool = False,
) -> Activations:
    """The activations of texts or token ids: site -> layer -> one (T, D) array a sample, in the order of `samples`.

    T is the number of tokens of the sample, D the width of the site. Samples are packed into rows and split over the
    devices of this process as in a run. The whole result is held in this host's memory.

    Args:
      model: a Hugging Face folder, hub id or .gguf file, of which only the needed layers are loaded; or a model from
        `qwen2_jax.load_model`, which runs in its own dtype on its own devices.
      samples: one or several texts or lists of token ids. Texts are tokenized with the tokenizer's defaults.
      layers: block numbers from 0; None: all. The sites that exist once, `embedding` and `final_norm`, have the
        layer numbers -1 and n_layers.
      sites: names of `qwen2_jax.SITES`, or names of TransformerLens or Hugging Face.
      pool: vectors of each sample instead of its tokens, computed on the device, such as "last" or "exp:0.067" (the
        flag `--pool`): the arrays are (P, D), in the order of the pools.
      dtype: of the arrays, "float32", "float16" or "bfloat16".
      tokenizer: a transformers tokenizer; None: that of `model`, which must then be a path.
      max_seq_length: the length that rows are laid out for; None: that of the longest sample. With the
        `max_seq_length` of a run the values are bit-identical to those of the run.
      revision, backend, compute_dtype, mesh, trust_remote_code, batch_size, pack: as the flags of
        extract_activations.py.
      progress: shows a bar on stderr.

    Raises UsageError for invalid arguments, ModelError for the model, RunError for values that are not finite or do
    not fit `dtype`.
    """
    capturer = load_capturer(
        model,
        layers=layers,
        sites=sites,
        pool=pool,
        dtype=dtype,
        tokenizer=tokenizer,
        revision=revision,
        backend=backend,
        compute_dtype=compute_dtype,
        mesh=mesh,
        trust_remote_code=trust_remote_code,
        max_seq_length=max_seq_length,
        batch_size=batch_size,
        pack=pack,
    )
    return capturer(samples, progress=progress)
