"""transformers as a user would run it: `output_hidden_states=True`, no cache, its default attention."""

import torch

from benchmarks.peers.hf_model import load_causal_lm
from benchmarks.peers.peer_sides import BatchedSide, Forward, Request, by_length


def side(request: Request, *, dtype: torch.dtype, is_sorted: bool, compiled: bool, cut: bool) -> BatchedSide:
    """One setting; `cut` removes the layers after the last captured one."""
    samples = by_length(request.samples) if is_sorted else request.samples
    return BatchedSide(load_forward(request, dtype, compiled=compiled, cut=cut), request, samples)


def load_forward(request: Request, dtype: torch.dtype, *, compiled: bool, cut: bool) -> Forward:
    """The decoder alone, without logits.

    The final norm becomes the identity: transformers applies it to its last hidden state, which would then not be the
    residual stream. This saves the peer the time of one norm.
    """
    decoder = load_causal_lm(request.model_path, dtype).model
    decoder.norm = torch.nn.Identity()
    if cut:
        decoder.layers = decoder.layers[: max(request.layers) + 1]
    # Batches are ragged: one program for all shapes.
    call = torch.compile(decoder, dynamic=True) if compiled else decoder

    def forward(tokens: torch.Tensor, mask: torch.Tensor) -> dict[int, torch.Tensor]:
        states = call(tokens, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
        return {layer: states[layer + 1] for layer in request.layers}

    return forward
