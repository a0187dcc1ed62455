"""A run from a GGUF file is certified against the file itself and against the folder that it was made from."""

import json

import pytest

torch = pytest.importorskip("torch")

import gguf_writing
from tiny_run import VOCAB, cache_dir, token_lines, write_jsonl
from transformers import AutoModelForCausalLM, LlamaConfig

from analysis.certificate.certified_outputs import certify_output
from analysis.certificate.certified_runs import certify_run
from core.run.config import RunConfig
from core.run.runner import run
from torch_models.loading import ModelSource


def test_a_gguf_run_is_that_of_transformers_by_the_file_and_by_its_original(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "original")
    gguf_writing.write_model(model, tmp_path / "tiny.gguf")
    flags = RunConfig(
        model_path=str(tmp_path / "tiny.gguf"),
        dataset_path=str(write_jsonl(tmp_path / "s.jsonl", token_lines(4, longest=40))),
        output_dir=str(tmp_path / "out"),
        checkpoint_dir=str(tmp_path / "ck"),
        compilation_cache_dir=cache_dir(),
        max_seq_length=128,
        dtype="float32",
        certify=2,
        certify_against=str(tmp_path / "original"),
    )
    run(flags, certify_run)
    report = json.loads((tmp_path / "out/tpu_0/fidelity.json").read_text())
    assert report["verdict"] == "pass"
    assert "other files" in report["notes"][0]
    again = certify_output(str(tmp_path / "out"), ModelSource(str(tmp_path / "tiny.gguf")), 4)
    assert again.ok
    assert again.notes == ()
