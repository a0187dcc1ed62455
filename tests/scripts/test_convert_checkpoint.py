"""The command that converts weights, and runs that start from what it wrote."""

import json
from pathlib import Path

import pytest
from tiny_run import committed_files, extract, run, token_lines, write_jsonl, write_model


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("stream") / "s.jsonl", token_lines(5))


def convert(folder: Path, *args: object) -> dict:
    result = run("scripts/convert_checkpoint.py", *args, "--json", cwd=folder, HOME=str(folder))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def shards(folder: Path, model: Path, stream: Path, *args: object) -> dict[str, bytes]:
    """What a run commits, started in `folder`, which is its home as well."""
    flags = ("--model_path", model, "--dataset_path", stream, "--output_dir", folder / "out")
    result = extract(folder, *flags, *args, HOME=str(folder))
    assert result.returncode == 0, result.stderr
    return committed_files(folder / "out")


def test_a_run_from_converted_weights_writes_the_same_bytes(stream, tmp_path):
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    model = write_model(tmp_path / "model")
    found = convert(tmp_path / "with", model, "--dtype", "float32")
    assert found["url"].startswith(str(tmp_path / "with/.cache/qwen2_jax/weights"))  # the default of both commands
    assert found["bytes"] > 0
    assert convert(tmp_path / "with", model, "--dtype", "float32")["bytes"] == 0
    assert shards(tmp_path / "with", model, stream) == shards(tmp_path / "without", model, stream)


def test_a_run_does_start_from_the_converted_weights(stream, tmp_path):
    """Shown by the weights of another model in their place."""
    ours, other = (write_model(tmp_path / f"model{seed}", seed=seed) for seed in range(2))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    there = ("--weights_cache_dir", tmp_path / "elsewhere")
    places = [Path(convert(tmp_path, model, "--dtype", "float32", *there)["url"]) for model in (ours, other)]
    assert {place.parent for place in places} == {tmp_path / "elsewhere"}
    places[0].rename(tmp_path / "aside")
    places[1].rename(places[0])
    swapped, expected = shards(tmp_path / "a", ours, stream, *there), shards(tmp_path / "b", other, stream)
    name = next(name for name in expected if name.endswith(".pkl.gz"))
    assert swapped[name] == expected[name]


def test_what_cannot_be_converted_is_one_line(tmp_path):
    result = run("scripts/convert_checkpoint.py", tmp_path / "nothing", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == f"error: {tmp_path / 'nothing'}: no such folder or file\n"
    assert result.stdout == ""
