"""The FLOPs of a step that the model requires, independent of the implementation: the numerator of every MFU."""

from math import prod

from qwen2_jax import Capture, DecoderConfig
from qwen2_jax.checkpoints.weights import cut_config
from qwen2_jax.parameters import parameter_specs


def model_flops(config: DecoderConfig, capture: Capture, samples: int, length: int) -> float:
    """Floating-point operations of `samples` samples of `length` tokens.

    2 × tokens × parameters of the matrices of the layers that run, plus causal attention within samples. The embedding
    is a lookup, and does not count.
    """
    specs = parameter_specs(cut_config(config, max(1, capture.layers_run(config.n_layers))), with_head=capture.logits)
    used = sum(prod(spec.shape) for name, spec in specs.items() if name.startswith("layers.") and len(spec.shape) > 2)
    used += config.vocab_size * config.d_model if capture.logits else 0
    seen = sum(
        window * (window + 1) // 2 + (length - window) * window for window in windows_run(config, capture, length)
    )
    return samples * (2.0 * used * length + 4.0 * seen * config.n_heads * config.head_dim)


def windows_run(config: DecoderConfig, capture: Capture, length: int) -> list[int]:
    """The window of each layer that runs, in tokens of a sample of `length`."""
    windows = config.windows[: capture.layers_run(config.n_layers)]
    return [min(window or length, length) for window in windows]
