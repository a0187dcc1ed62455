"""SAELens' `CacheActivationsRunner`: one hook, contexts of one length, a Hugging Face dataset on disk.

It does not support ragged prompts: they are padded to the longest one, on the right, where no real token sees the
padding. It stores the padding too; `shards` removes it for the comparison.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

from benchmarks.peers.agreement import Shard
from benchmarks.peers.peer_sides import Request, longest, stored_item


@dataclass(frozen=True)
class SaeLensSide:
    """The runner with a tokenized dataset, which it processes once per run."""

    request: Request
    runner: CacheActivationsRunner

    @property
    def computed_tokens(self) -> int:
        """Tokens, padded to the longest prompt of all."""
        return len(self.request.samples) * longest(self.request.samples)

    def run(self, folder: Path) -> None:
        """Writes its own file format."""
        self.runner.cfg.new_cached_activations_path = str(folder)
        self.runner.run()

    def shards(self, folder: Path) -> Iterator[Shard]:
        """The stored activations without padding."""
        (layer,) = self.request.layers
        stored = datasets.load_from_disk(str(folder)).with_format("numpy")[self.runner.cfg.hook_name]
        items = [
            stored_item(sample, np.asarray(rows[: len(sample.token_ids)], self.request.dtype))
            for sample, rows in zip(self.request.samples, stored, strict=True)
        ]
        yield {layer: items}


def side(request: Request) -> SaeLensSide:
    """Loads the model, which stops after the hook. A buffer holds one batch, so that no buffer is filled twice."""
    (layer,) = request.layers
    context, batch = longest(request.samples), math.gcd(request.batch_size, len(request.samples))
    tokens = np.zeros((len(request.samples), context), np.int64)
    for row, sample in enumerate(request.samples):
        tokens[row, : len(sample.token_ids)] = sample.token_ids
    config = CacheActivationsRunnerConfig(
        dataset_path="prompts",
        model_name=str(request.model_folder),
        model_batch_size=batch,
        model_class_name="AutoModelForCausalLM",
        hook_name=f"model.layers.{layer}",
        d_in=request.d_model,
        training_tokens=tokens.size,
        context_size=context,
        new_cached_activations_path="unused",
        shuffle=False,
        dtype=request.dtype.name,
        device="cpu",
        buffer_size_gb=(batch * context * request.d_model * request.dtype.itemsize + 1) / 1e9,
        prepend_bos=False,
        streaming=False,
    )
    prompts = datasets.Dataset.from_dict({"input_ids": tokens.tolist()})
    return SaeLensSide(request, CacheActivationsRunner(config, override_dataset=prompts))
