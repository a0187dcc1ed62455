"""What attention must give: every pair of a row, in numpy's float64."""

import numpy as np


def attention_in_float64(q, k, v, segment_ids, *, scale, window=None, softcap=None):
    """q: (B, T, K, G, H); k, v: (B, S, K, H); causal inside each segment, as `qwen2_jax.attention.attention`."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    index = np.arange(q.shape[1])
    distance = index[:, None] - index
    visible = (distance >= 0) & (segment_ids[:, :, None] == segment_ids[:, None, :])
    if window is not None:
        visible &= distance < window
    logits = np.einsum("BTKGH,BSKH->BKGTS", q, k) * scale
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    logits = np.where(visible[:, None, None], logits, -np.inf)
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("BKGTS,BSKH->BTKGH", probs / probs.sum(-1, keepdims=True), v)
