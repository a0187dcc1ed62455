"""`prepare.py` against transformers on the same weights, read back with datasets."""

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import datasets
from chess_games import D_MODEL, N_LAYERS, VOCAB, rows, write_gpt2, write_rows
from tiny_run import cache_dir
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

import prepare as command
from core.base.errors import RunError, UsageError
from parquet_cache import shard_writing
from parquet_cache.hidden_states import StateReader
from prepare import prepare
from qwen2_jax.checkpoints.gguf import open_gguf
from qwen2_jax.checkpoints.locate import find_gguf

LABELS = ("Site", "WhiteElo", "BlackElo", "Scores")
GAMES = rows(23)
N_POS = 64


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_are_shared():
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", cache_dir())
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    return write_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def games(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("games") / "games.jsonl", GAMES)


@pytest.fixture(scope="module")
def expected(gpt2) -> dict[str, np.ndarray]:
    """By text, transformers' hidden states, the embedding first; the last one before the final norm."""
    model = AutoModelForCausalLM.from_pretrained(gpt2).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(gpt2)
    before_norm: list[np.ndarray] = []
    model.transformer.h[-1].register_forward_hook(
        lambda *call: before_norm.append((call[2][0] if isinstance(call[2], tuple) else call[2])[0].numpy())
    )
    found = {}
    for row in GAMES:
        ids = tokenizer(row["Transcript"], truncation=True, max_length=N_POS, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states
        found[row["Transcript"]] = np.stack([*(one[0].numpy() for one in states[:-1]), before_norm.pop()])
    return found


@pytest.fixture
def run(gpt2, games, tmp_path):
    """Runs an export into `tmp_path / name` and returns its summary."""

    def run(name: str = "out", source: Path = games, **options):
        given = {"ds_label_columns": LABELS, "n_pos": N_POS, "dtype": "float32", "batch_size": 4} | options
        return prepare(str(gpt2), str(source), "Transcript", str(tmp_path / name), **given)

    return run


def load(folder: Path, cache: Path) -> datasets.Dataset:
    files = sorted(map(str, folder.glob("*.parquet")), key=lambda name: int(name.rpartition("_")[2][:-8]))
    return datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(cache))


def sites_of(folder: Path, cache: Path) -> list[str]:
    return load(folder, cache)["Site"][:]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def test_the_words_of_the_tokenizer_are_those_of_the_described_model():
    assert len(VOCAB) == 72


def test_the_printed_command_gives_the_hidden_states_of_transformers_and_the_labels(
    gpt2, games, expected, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    line = (
        "--output_dir data/activations/sorted --batches_per_shard 50 --auto_find_batch_size --max_shards_created 900 "
        f"--model_checkpoint {gpt2} --ds_config 202302-00000-00009 --ds_repo {games} --ds_split train "
        "--ds_input_column Transcript --ds_label_columns Site WhiteElo BlackElo Scores --n_pos 64 --log_file log.txt"
    )
    command.run_flags(command.build_parser().parse_args(line.split()))
    log = (tmp_path / "log.txt").read_text()
    assert "--ds_config 202302-00000-00009 is ignored" in log
    assert "memory analysis: " in log
    assert "batch size 32: tried with the longest texts, of 64 tokens" in log
    assert "1 shards, 1 of them new, 23 texts" in capsys.readouterr().err
    loaded = load(tmp_path / "data/activations/sorted", tmp_path / "cache")
    assert loaded.column_names == ["hidden_states", "input_ids", *LABELS]
    arrays = loaded.with_format("numpy", columns=["hidden_states"], dtype=np.float16)
    for row, of_text, labels in zip(GAMES, arrays, loaded.select_columns(LABELS), strict=True):
        state, theirs = of_text["hidden_states"], expected[row["Transcript"]][1:]
        assert (state.dtype, state.shape) == (np.float16, theirs.shape)
        np.testing.assert_allclose(state.astype(np.float32), theirs, rtol=2e-3, atol=2e-3)
        assert labels == {name: row[name] for name in LABELS}
    stored = json.loads((tmp_path / "data/activations/sorted/arguments.json").read_text())
    assert stored["arguments"]["ds_label_columns"] == list(LABELS)
    assert (stored["resolved"]["batch_size"], stored["found"]["rows"]) == (32, 23)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_layers_are_blocks_and_the_embedding_comes_first(run, expected, tmp_path, backend):
    run(with_embedding=True, layers=[2, 0], backend=backend)
    arrays = load(tmp_path / "out", tmp_path / "cache").with_format("numpy", columns=["hidden_states"])
    assert arrays.features["hidden_states"] == datasets.List(
        datasets.List(datasets.List(datasets.Value("float32"), length=D_MODEL)), length=3
    )
    for row, of_text in zip(GAMES, arrays, strict=True):
        theirs = expected[row["Transcript"]][[0, 1, 3]]
        np.testing.assert_allclose(of_text["hidden_states"], theirs, rtol=1e-4, atol=1e-4)


# In this order: names of transformers, names of the file.
GGUF_NAMES = (
    (r"^norm", "output_norm"),
    (r"layers", "blk"),
    (r"embed_tokens", "token_embd"),
    (r"input_layernorm", "attn_norm"),
    (r"post_attention_layernorm", "ffn_norm"),
    (r"self_attn\.o_proj", "attn_output"),
    (r"self_attn\.(\w)_proj", r"attn_\1"),
    (r"mlp\.(\w+)_proj", r"ffn_\1"),
)


def first_blocks_in_transformers(smollm2: Path, n_layers: int) -> LlamaModel:
    """The file's weights in transformers, by our reader: tests/qwen2_jax compares it with transformers' own."""
    file = open_gguf(find_gguf(str(smollm2)))
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=n_layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )
    model = LlamaModel(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            stored = functools.reduce(lambda text, pair: re.sub(*pair, text), GGUF_NAMES, name)
            weight.copy_(torch.from_numpy(file.read(stored, 0, len(weight)).astype(np.float32)))
    return model


def test_the_real_smollm2(smollm2, tmp_path):
    texts = ["The capital of France is", "Two plus two"]
    source = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    prepare(smollm2, source, "text", tmp_path / "out", dtype="float32", layers=[0, 1])
    model = first_blocks_in_transformers(smollm2, 3)
    arrays = load(tmp_path / "out", tmp_path / "cache").with_format("numpy")
    for row in arrays:
        with torch.no_grad():
            states = model(torch.tensor(row["input_ids"])[None], output_hidden_states=True).hidden_states
        theirs = np.stack([states[layer][0].numpy() for layer in (1, 2)])
        np.testing.assert_allclose(row["hidden_states"], theirs, rtol=1e-3, atol=1e-3)


def test_deduplication_keeps_the_last_text_and_the_first_of_two(run, tmp_path):
    """The described system drops the last sample."""
    made = [GAMES[0], GAMES[1] | {"Site": "a"}, GAMES[1] | {"Site": "b"}, GAMES[0] | {"Site": "c"}, GAMES[2]]
    run(source=write_rows(tmp_path / "twice.jsonl", made), deduplicate=True)
    assert sites_of(tmp_path / "out", tmp_path / "cache") == [GAMES[0]["Site"], "a", GAMES[2]["Site"]]


def test_one_batch_a_shard_fills_the_first_shard(run, tmp_path):
    """In the described system it is empty."""
    summary = run(batches_per_shard=1)
    assert summary.shards == 6
    counts = [load_one(tmp_path / "out" / shard_writing.shard_name(i), tmp_path / "cache") for i in range(6)]
    assert counts == [4, 4, 4, 4, 4, 3]


def load_one(path: Path, cache: Path) -> int:
    return datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(cache)).num_rows


def test_seed_0_shuffles(run, tmp_path):
    """The described system takes it for no seed."""
    order = {}
    for seed in (None, 0, 1):
        run(f"out{seed}", ds_shuffle_seed=seed, layers=[0])
        order[seed] = sites_of(tmp_path / f"out{seed}", tmp_path / "cache")
    in_source = [row["Site"] for row in GAMES]
    assert order[None] == in_source
    assert order[0] != in_source
    assert order[0] != order[1]
    assert sorted(order[0]) == sorted(order[1]) == sorted(in_source)


def test_a_short_last_batch_is_exported(run, tmp_path):
    """In the described system it raises."""
    assert len(GAMES) % 4
    assert run(layers=[0]).texts == len(GAMES)
    assert sites_of(tmp_path / "out", tmp_path / "cache")[-1] == GAMES[-1]["Site"]


def test_shards_are_as_many_as_was_asked_for(run, tmp_path):
    assert run(batches_per_shard=2, max_shards_created=2, layers=[0]).texts == 16
    assert sites_of(tmp_path / "out", tmp_path / "cache") == [row["Site"] for row in GAMES[:16]]


def test_the_filter_comes_first_and_sorting_last(run, tmp_path):
    options = {"ds_filter": "WhiteElo > 1800 and BlackElo < 1422", "deduplicate": True, "ds_shuffle_seed": 3}
    twin = GAMES[0] | {"WhiteElo": 2000, "Site": "twin"}
    source = write_rows(tmp_path / "games.jsonl", [GAMES[0], twin, *GAMES[1:]])
    run(source=source, **options, ds_sample=6, sort_ds_by_len=True, sort_ds_reversed=True, layers=[0])
    loaded = load(tmp_path / "out", tmp_path / "cache")
    lengths = [len(ids) for ids in loaded["input_ids"][:]]
    assert lengths == sorted(lengths, reverse=True)
    assert loaded.num_rows == 6
    assert all(elo > 1800 for elo in loaded["WhiteElo"][:])
    run("all", source=source, **options, layers=[0])
    assert "twin" in sites_of(tmp_path / "all", tmp_path / "cache"), "its first row is not wanted"


def test_a_sample_of_rows_keeps_their_order(run, tmp_path):
    run(ds_sample=5, layers=[0])
    sites = sites_of(tmp_path / "out", tmp_path / "cache")
    assert len(set(sites)) == 5
    assert sites == sorted(sites)
    with pytest.raises(UsageError, match="--ds_sample 24: there are 23 rows"):
        run("more", ds_sample=24)


def test_an_interrupted_export_finishes_with_the_same_bytes(run, tmp_path, monkeypatch):
    options = {"batches_per_shard": 2, "sort_ds_by_len": True}
    run("whole", **options)
    compute, calls = StateReader.__call__, []

    def fail_at_the_fourth_batch(self, texts, where):
        calls.append(where)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return compute(self, texts, where)

    monkeypatch.setattr(StateReader, "__call__", fail_at_the_fourth_batch)
    with pytest.raises(KeyboardInterrupt):
        run("broken", **options)
    assert {path.name for path in (tmp_path / "broken").iterdir()} == {"arguments.json", shard_writing.shard_name(0)}
    calls.extend([[]] * 4)
    assert run("broken", **options).written == 2
    assert bytes_of(tmp_path / "broken") == bytes_of(tmp_path / "whole")
    assert run("broken", **options).written == 0


def test_an_automatic_batch_size_is_that_of_the_shards_that_are_there(run, tmp_path):
    run(batch_size=8, auto_find_batch_size=True, batches_per_shard=1, max_shards_created=2, layers=[0])
    before = bytes_of(tmp_path / "out")
    (tmp_path / "out" / shard_writing.shard_name(0)).unlink()
    again = run(auto_find_batch_size=True, batches_per_shard=1, max_shards_created=2, layers=[0])
    assert (again.batch_size, again.written) == (8, 1)
    assert bytes_of(tmp_path / "out") == before


def test_a_batch_that_does_not_fit_is_halved(run, monkeypatch, caplog):
    from core.in_memory.capturer import Capturer

    capture = Capturer.__call__

    def small_device(self, samples, **options):
        if len(samples) > 4:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return capture(self, samples, **options)

    monkeypatch.setattr(Capturer, "__call__", small_device)
    caplog.set_level("INFO", logger="absl")
    assert run(batch_size=16, auto_find_batch_size=True, layers=[0]).batch_size == 4
    tried = [record.getMessage() for record in caplog.records if "does not fit in memory" in record.getMessage()]
    assert tried == [f"a batch of {n} texts does not fit in memory: trying {n // 2}" for n in (16, 8)]


def test_other_arguments_in_the_same_folder_are_refused_by_name(run, games, tmp_path):
    run(layers=[0])
    for options, message in (
        ({"layers": [1]}, r"layers is \[0\] there and \[1\] here"),
        ({"layers": [0], "dtype": "float16"}, "dtype is 'float32' there and 'float16' here"),
        ({"layers": [0], "batch_size": 8}, "batch_size is 4 there and 8 here"),
        ({"layers": [0], "source": write_rows(tmp_path / "o.jsonl", rows(24))}, "dataset_digest is .*; rows is 23 "),
    ):
        with pytest.raises(UsageError, match=message):
            run(**options)
    (tmp_path / "out/arguments.json").unlink()
    with pytest.raises(RunError, match=r"has Parquet files but no arguments\.json"):
        run(layers=[0])


@pytest.mark.parametrize(("text", "reason"), [(None, "is null"), ("", "is empty"), (7, "is 7, not a text")])
def test_a_row_without_a_text_is_refused_or_set_aside(run, tmp_path, text, reason):
    source = write_rows(tmp_path / "games.jsonl", [*GAMES[:3], GAMES[3] | {"Transcript": text}, GAMES[4]])
    with pytest.raises(RunError, match=rf"games\.jsonl:4: Transcript {reason}: --max_bad_records 1 or more"):
        run(source=source)
    summary = run(source=source, max_bad_records=1, layers=[0])
    assert (summary.texts, summary.set_aside) == (4, 1)
    assert json.loads((tmp_path / "out/set_aside.json").read_text()) == [
        {"reason": f"Transcript {reason}", "where": f"{source}:4"}
    ]


def test_labels_keep_their_types_from_parquet_and_a_saved_dataset(run, tmp_path):
    made = datasets.Dataset.from_list(GAMES)
    made.to_parquet(tmp_path / "games.parquet")
    made.save_to_disk(tmp_path / "saved")
    of_jsonl = run("out", layers=[0])
    for name in ("games.parquet", "saved"):
        assert run(f"out_{name}", source=tmp_path / name, layers=[0]).texts == of_jsonl.texts
        loaded = load(tmp_path / f"out_{name}", tmp_path / "cache").select_columns(LABELS)
        assert loaded.features == made.select_columns(LABELS).features
        assert loaded.to_list() == made.select_columns(LABELS).to_list()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ds_label_columns": ["Elo"]}, r"--ds_label_columns Elo: no such column: the columns are Transcript, Site"),
        ({"layers": [3]}, rf"--layers: .* has layers 0 to {N_LAYERS - 1}"),
        ({"n_pos": 97}, "--n_pos 97: .* knows 96 positions"),
        ({"ds_filter": "Elo > 3"}, r"games\.jsonl:1: --ds_filter: no column 'Elo'"),
        ({"ds_filter": "Site > 3"}, r"games\.jsonl:1: --ds_filter: 'https.* > 3: they have no order"),
        ({"ds_filter": "BlackElo > 5000"}, "no row is left to export"),
        ({"sort_ds_reversed": True}, "--sort_ds_reversed reverses the order of --sort_ds_by_len"),
        ({"batches_per_shard": 0}, "--batches_per_shard 0: must be at least 1"),
        ({"device": "tpu"}, "--device tpu: JAX runs on cpu here"),
        ({"device": "cuda", "backend": "torch"}, "--device cuda: the torch backend runs on cpu here"),
        ({"ds_label_columns": ["Site", "Site"]}, "--ds_label_columns: Site is given twice"),
        ({"ds_label_columns": ["hidden_states"]}, "--ds_label_columns hidden_states: .* name of its own"),
    ],
)
def test_what_cannot_be_is_one_line(run, options, message):
    with pytest.raises(RunError, match=message):
        run(**options)


def test_values_that_do_not_fit_float16_name_the_row(gpt2, games, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(gpt2)
    model.transformer.wte.weight.data *= 1e6
    model.save_pretrained(tmp_path / "loud")
    options = {"tokenizer_path": gpt2, "n_pos": N_POS, "layers": [0]}
    with pytest.raises(RunError, match=r"games\.jsonl:\d+, residual of layer 0, token 0: magnitude .* float16"):
        prepare(tmp_path / "loud", games, "Transcript", tmp_path / "out", **options)
