"""nnsight: a trace that saves the outputs of the captured layers and stops after the last one."""

import nnsight
import torch

from benchmarks.peers.hf_model import load_causal_lm
from benchmarks.peers.peer_sides import BatchedSide, Request, by_length


def side(request: Request, *, dtype: torch.dtype) -> BatchedSide:
    """Sorted by length, over the decoder without logits."""
    model = nnsight.NNsight(load_causal_lm(request.model_path, dtype).model)

    def forward(tokens: torch.Tensor, mask: torch.Tensor) -> dict[int, torch.Tensor]:
        with model.trace(tokens, attention_mask=mask, use_cache=False) as tracer:
            saved = nnsight.save([])
            for layer in request.layers:
                saved.append(model.layers[layer].output)
            tracer.stop()
        outputs = [output[0] if isinstance(output, tuple) else output for output in saved]
        return dict(zip(request.layers, outputs, strict=True))

    return BatchedSide(forward, request, by_length(request.samples))
