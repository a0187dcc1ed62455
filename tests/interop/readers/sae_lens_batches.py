"""OUT FOLDER HOOK CONTEXT_SIZE WIDTH: the batches that SAELens' ActivationsStore makes of cached activations."""

import sys
from types import SimpleNamespace

import numpy as np
import torch
from sae_lens.training.activations_store import ActivationsStore

out, folder, hook, context_size, width = sys.argv[1:]
model = SimpleNamespace(tokenizer=None)
store = ActivationsStore(
    model=None,
    dataset=None,
    streaming=False,
    hook_name=hook,
    hook_head_index=None,
    context_size=int(context_size),
    d_in=int(width),
    n_batches_in_buffer=4,
    total_training_tokens=64,
    store_batch_size_prompts=2,
    train_batch_size_tokens=4,
    prepend_bos=False,
    normalize_activations="none",
    device=torch.device("cpu"),
    dtype="float32",
    cached_activations_path=folder,
)
batches = [next(store).numpy() for _ in range(6)]
np.savez(out, values=np.concatenate(batches))
