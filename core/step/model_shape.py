"""The facts about a model that the engine needs before its weights are loaded."""

from collections.abc import Mapping
from typing import Protocol

from core.base.errors import UsageError


class ModelShape(Protocol):
    """A model's sizes; `qwen2_jax.DecoderConfig` is one. It satisfies `qwen2_jax.taps.Capturable`.

    Attributes:
      family: names the architecture in run.json.
      d_model: width of the residual stream.
      max_positions: tokens a sample may have at most.
      site_widths: the sites that the model has, in the order of `qwen2_jax.taps.SITES`, and each one's values a token.
    """

    @property
    def family(self) -> str: ...

    @property
    def n_layers(self) -> int: ...

    @property
    def d_model(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_positions(self) -> int: ...

    @property
    def site_widths(self) -> Mapping[str, int]: ...


def check_sample_length(max_seq_length: int, model: ModelShape, path: str, flag: str = "--max_seq_length") -> None:
    """Raises UsageError naming `flag` when samples of that many tokens do not fit the model at `path`."""
    if not 1 <= max_seq_length <= model.max_positions:
        raise UsageError(
            f"{flag} {max_seq_length}: {path} knows {model.max_positions} positions: "
            f"pass {flag} {model.max_positions} or less"
        )
