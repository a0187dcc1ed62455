"""transformers' side of the GPU benchmark: the same weights and samples, in bfloat16, on the same device.

Axis letters: L captured layers, B samples, T tokens of a sample, D d_model.
"""

import gc
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Array, Int32
from transformers import AutoConfig, AutoModel

from qwen2_jax import DecoderConfig
from qwen2_jax.families import FAMILIES
from qwen2_jax.parameters import parameter_specs


class TransformersSide:
    """The decoder cut after the last captured layer, without head, final norm or padding.

    A user of transformers would have to cut it by hand; it is the fastest setup of transformers.
    attention: the name of an implementation. compiled: by `torch.compile`, for this one shape.
    """

    def __init__(
        self,
        fields: Mapping[str, Any],
        config: DecoderConfig,
        parameters: Mapping[str, Array],
        tokens: Int32[np.ndarray, "B T"],
        layers: tuple[int, ...],
        *,
        attention: str,
        compiled: bool,
        device: str,
    ) -> None:
        decoder = _decoder(fields, config, parameters, attention, device)
        self._call = torch.compile(decoder, dynamic=False) if compiled else decoder
        self._tokens = torch.from_numpy(tokens.astype(np.int64)).to(device)
        self._layers = layers
        self._copies = torch.cuda.Stream() if device == "cuda" else None
        self._hosts: list[list[torch.Tensor]] = [[], []]

    def forward(self, steps: int) -> None:
        """Runs `steps` steps without copies."""
        for _ in range(steps):
            self._step()
        self._synchronize()

    def extract(self, steps: int) -> None:
        """The same, and copies the output of each step to one of two pinned buffers during the next."""
        for number in range(steps):
            found = self._step()
            if self._copies is None:
                continue  # the output is on the host already
            hosts = self._hosts[number % 2]
            if not hosts:
                hosts += [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in found]
            self._copies.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._copies):
                for host, x in zip(hosts, found, strict=True):
                    host.copy_(x, non_blocking=True)
                    x.record_stream(self._copies)
        self._synchronize()

    def activations(self) -> np.ndarray:
        """(L, B, T, D), float32."""
        return np.stack([x.float().cpu().numpy() for x in self._step()])

    @torch.no_grad()
    def _step(self) -> list[torch.Tensor]:
        every = len(self._layers) > 1
        output = self._call(self._tokens, use_cache=False, output_hidden_states=every)
        if not every:
            return [output.last_hidden_state]
        return [output.hidden_states[layer + 1] for layer in self._layers]

    def _synchronize(self) -> None:
        if self._copies is not None:
            torch.cuda.synchronize()


def forget_other_cases() -> None:
    """Resets torch's compiler, which stops compiling a model's code after it has compiled it for several models."""
    torch.compiler.reset()
    gc.collect()  # compiled code and the model refer to each other and keep their memory until then
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _decoder(
    fields: Mapping[str, Any], config: DecoderConfig, parameters: Mapping[str, Array], attention: str, device: str
) -> Any:
    """A decoder as deep as `config`, with our weights.

    The final norm becomes the identity: transformers applies it to its last hidden state, which would then not be the
    residual stream.
    """
    settings = {key: value for key, value in fields.items() if key != "model_type"}
    theirs = AutoConfig.for_model(fields["model_type"], **settings | {"num_hidden_layers": config.n_layers})
    with torch.device(device):
        decoder = AutoModel.from_config(theirs, dtype=torch.bfloat16, attn_implementation=attention).eval()
    decoder.norm = torch.nn.Identity()
    found = dict(decoder.named_parameters())
    table, base = FAMILIES[config.family].weights(config), FAMILIES[config.family].base
    with torch.no_grad():
        for name, spec in parameter_specs(config, with_final_norm=False, with_head=False).items():
            stored = table[name]
            assert stored.rows is None, "fused tensors are not supported here"
            assert not stored.transposed
            ours = torch.from_dlpack(parameters[name])
            for layer, tensor in enumerate(ours if spec.stacked else [ours]):
                found.pop(stored.name.format(layer=layer).removeprefix(base)).copy_(tensor)
    assert not found, f"{sorted(found)} have no counterpart"
    return decoder
