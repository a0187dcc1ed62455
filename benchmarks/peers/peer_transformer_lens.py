"""TransformerLens: `run_with_cache` of its bridge with only the captured hooks, stopped after the last one.

It uses the bridge because `HookedTransformer` supports only the models of its own list, which lacks SmolLM2.
"""

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer

from benchmarks.peers.hf_model import load_causal_lm
from benchmarks.peers.peer_sides import BatchedSide, Request, by_length


def side(request: Request) -> BatchedSide:
    """Sorted by length, float32."""
    folder = str(request.model_folder)
    model = TransformerBridge.boot_transformers(
        folder,
        hf_model=load_causal_lm(request.model_path),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        device="cpu",
    )
    names = {f"blocks.{layer}.hook_out": layer for layer in request.layers}

    def forward(tokens: torch.Tensor, mask: torch.Tensor) -> dict[int, torch.Tensor]:
        _, cache = model.run_with_cache(
            tokens, attention_mask=mask, names_filter=list(names), stop_at_layer=max(request.layers) + 1
        )
        return {layer: cache[name] for name, layer in names.items()}

    return BatchedSide(forward, request, by_length(request.samples))
