"""What --activation_type and --layers_to_extract amount to together."""

from dataclasses import dataclass, field

import pytest

from core.base.errors import UsageError
from core.step.capture import resolve_capture, site_bytes
from qwen2_jax.taps import Capture

WIDTHS = {"embedding": 8, "resid_pre": 8, "k": 2, "attn": 8, "mlp_act": 24, "mlp": 8, "residual": 8, "final_norm": 8}


@dataclass(frozen=True)
class Model:
    family: str = "llama"
    n_layers: int = 4
    d_model: int = 8
    vocab_size: int = 10
    max_positions: int = 10
    site_widths: dict[str, int] = field(default_factory=lambda: dict(WIDTHS))


def capture(*names: str, layers: tuple[int, ...] | None = None) -> Capture:
    return resolve_capture(names, layers, Model(), "the-model")


@pytest.mark.parametrize(
    ("names", "layers", "expected"),
    [
        (["residual"], None, Capture((0, 1, 2, 3))),
        (["residual"], (2, 0, 2), Capture((0, 2))),
        (["resid_post"], (2,), Capture((2,))),
        (["resid_post", "residual", "mlp_out"], None, Capture((0, 1, 2, 3), ("mlp", "residual"))),
        (["blocks.1.hook_resid_post"], None, Capture((1,))),
        (["blocks.3.hook_resid_post", "model.layers.1"], None, Capture((1, 3))),
        (["hook_resid_post", "residual", "mlp"], (1,), Capture((1,), ("mlp", "residual"))),
        (["blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"], None, Capture((1,), ("mlp", "residual"))),
        (["blocks.1.hook_resid_post", "mlp"], (1,), Capture((1,), ("mlp", "residual"))),
        (["blocks.1.hook_resid_post", "embedding"], None, Capture((1,), ("embedding", "residual"))),
        (["final_norm", "hook_embed"], None, Capture((), ("embedding", "final_norm"))),
    ],
)
def test_names_and_layers_amount_to_one_capture(names, layers, expected):
    assert capture(*names, layers=layers) == expected


@pytest.mark.parametrize(
    ("names", "layers", "said"),
    [
        (["nonsense"], None, "--activation_type nonsense: no site has this name: this model has embedding, resid_pre"),
        (["resid_mid"], None, "--activation_type resid_mid: this model has no such site: it has embedding, "),
        (["residual"], (4,), "--layers_to_extract 4: the-model has layers 0 to 3"),
        (["residual"], (-1,), "--layers_to_extract -1: the-model"),
        (["blocks.4.hook_resid_post"], None, "--activation_type blocks.4.hook_resid_post: the-model has layers 0 to 3"),
        (["blocks.1.hook_resid_post"], (2,), r"blocks.1.hook_resid_post is layer 1, --layers_to_extract 2: all sites"),
        (["blocks.1.hook_resid_post", "blocks.2.hook_mlp_out"], None, "at layer 1, blocks.2.hook_mlp_out at 2: all"),
        (["blocks.1.hook_resid_post", "mlp"], None, "blocks.1.hook_resid_post is asked for at layer 1, mlp at 0 to 3"),
        (["embedding"], (1,), "--layers_to_extract: embedding is not there once a layer"),
    ],
)
def test_what_is_contradictory_or_absent_is_refused_in_one_line(names, layers, said):
    with pytest.raises(UsageError) as error:
        capture(*names, layers=layers)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_bytes_are_those_of_every_stored_layer_of_a_site():
    sizes = site_bytes(capture("embedding", "k", "mlp_act", layers=(0, 1, 3)), Model(), "bfloat16")
    assert sizes == {"embedding": 2 * 8, "k": 2 * 3 * 2, "mlp_act": 2 * 3 * 24}
