"""A tiny model folder in the published format, small streams, and the command line: what end-to-end tests share."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from forks import REPOSITORY, environment, shared
from safetensors.numpy import save_file

from core.run.config import RunConfig

VOCAB, D_MODEL, N_LAYERS = 320, 32, 3
CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": 64,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "use_sliding_window": False,
}


def write_model(folder: Path, *, seed: int = 0, scale: float = 1.0, tokenizer: bool = True) -> Path:
    """A random Qwen2 in `folder`; `scale` multiplies the embedding, and so every activation."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    head = D_MODEL // 4
    shapes = {"model.embed_tokens.weight": (VOCAB, D_MODEL), "model.norm.weight": (D_MODEL,)}
    for layer in range(N_LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (D_MODEL,),
            prefix + "post_attention_layernorm.weight": (D_MODEL,),
        }
        for name, rows in (("q", 4 * head), ("k", 2 * head), ("v", 2 * head)):
            shapes |= {f"{prefix}self_attn.{name}_proj.weight": (rows, D_MODEL)}
            shapes |= {f"{prefix}self_attn.{name}_proj.bias": (rows,)}
        shapes |= {
            prefix + "self_attn.o_proj.weight": (D_MODEL, 4 * head),
            prefix + "mlp.down_proj.weight": (D_MODEL, 64),
        }
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (64, D_MODEL) for name in ("gate", "up")}
    weights = {
        name: (np.ones(shape) if "norm" in name else rng.normal(0, 0.3, shape)).astype(np.float32)
        for name, shape in shapes.items()
    }
    weights["model.embed_tokens.weight"] *= scale
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if tokenizer:
        _write_tokenizer(folder)
    return folder


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token) for token in ("<|start|>", "<|end|>")])
    PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", pad_token="<|end|>", chat_template=CHAT_TEMPLATE
    ).save_pretrained(folder)


def write_jsonl(path: Path, lines: list[Any]) -> Path:
    """One JSON object a line; a str is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def token_lines(n: int, *, seed: int = 0, longest: int = 200) -> list[dict[str, Any]]:
    """`n` lines of ragged random token ids, with a label."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, n)
    return [{"input_ids": rng.integers(0, VOCAB, k).tolist(), "part": int(i % 3)} for i, k in enumerate(lengths)]


def arc_lines(n: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """`n` small ARC tasks."""
    rng = np.random.default_rng(seed)

    def grid() -> list[list[int]]:
        return rng.integers(0, 10, rng.integers(1, 5, 2)).tolist()

    def pair() -> dict[str, Any]:
        return {"input": grid(), "output": grid()}

    return [{"task_id": f"task{i}", "train": [pair(), pair()], "test": [pair()]} for i in range(n)]


def command(script: str, *args: object) -> list[str]:
    """The argv of one of the top-level commands."""
    return [sys.executable, str(REPOSITORY / script), *map(str, args)]


def run(script: str, *args: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, in a process of its own that has imported everything already.

    Unless `env` says where to import from: then Python itself is started.
    """
    if "PYTHONPATH" in env:
        argv = command(script, *args)
        return subprocess.run(argv, cwd=cwd, env=environment(**env), capture_output=True, text=True, check=False)
    done = shared().command(script, *args, cwd=cwd, env=environment(**env))
    return subprocess.CompletedProcess([script, *args], done.wait(300), done.output, done.errors)


def extract(cwd: Path, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
    """`extract_activations.py` with the compilation cache that all tests share."""
    return run("extract_activations.py", "--compilation_cache_dir", cache_dir(), *args, cwd=cwd, **env)


def cache_dir() -> str:
    """Where the tests keep compiled programs."""
    return os.environ.get(
        "TEST_COMPILATION_CACHE", str(Path(os.environ.get("TMPDIR", "/tmp")) / "qwen2_jax_test_cache")
    )


def stream_config(home: Path, model: Path, lines: list[Any], **flags: Any) -> RunConfig:
    """The flags of a run over `lines`, which are written to `home`; its output is `home / "out"`."""
    return RunConfig(
        model_path=str(model),
        dataset_path=str(write_jsonl(home / "s.jsonl", lines)),
        output_dir=str(home / "out"),
        checkpoint_dir=str(home / "ck"),
        compilation_cache_dir=cache_dir(),
        **flags,
    )


def committed_files(folder: Path) -> dict[str, bytes]:
    """Everything in an output folder but the metrics, which carry times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "metrics.jsonl"
    }
