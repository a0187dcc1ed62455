"""Where the texts of `mean` come from."""

import gzip
import json
import pickle

import pytest
import zstandard

from analysis.mean_vectors.options import MeanOptions
from analysis.mean_vectors.texts import chosen_texts
from core.base.errors import RunError, UsageError

TEXTS = ["one", "two", "three"]


def read(*paths, **options):
    texts = chosen_texts(MeanOptions(tuple(map(str, paths)), "m", "o", **options))
    return [(text.sample_idx, text.text) for text in texts]


def jsonl(column="text"):
    return "".join(json.dumps({column: text}) + "\n" for text in TEXTS).encode()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("t.pkl", pickle.dumps(TEXTS)),
        ("t.pickle", pickle.dumps([{"text": text, "id": 3} for text in TEXTS])),
        ("t.jsonl", jsonl()),
        ("t.jsonl.gz", gzip.compress(jsonl())),
        ("t.jsonl.zst", zstandard.ZstdCompressor().compress(jsonl())),
        ("t.txt", "\n".join(TEXTS).encode()),
        ("t.json", json.dumps([{"text": text} for text in TEXTS]).encode()),
    ],
)
def test_every_kind_of_file(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert read(tmp_path / name) == list(enumerate(TEXTS))
    assert read(tmp_path / name, num_samples=2) == list(enumerate(TEXTS))[:2]


def test_parquet_and_saved_datasets_with_a_column(tmp_path):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"body": TEXTS})
    dataset.to_parquet(tmp_path / "t.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    for source in ("t.parquet", "saved"):
        assert read(tmp_path / source, column="body") == list(enumerate(TEXTS))


def test_several_sources_are_one_and_blank_lines_are_counted(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(["three"]))
    assert read(tmp_path / "a.txt", tmp_path / "b.pkl") == [(0, "one"), (2, "two"), (3, "three")]


def test_a_seed_without_a_number_shuffles_all(tmp_path):
    (tmp_path / "t.pkl").write_bytes(pickle.dumps([str(i) for i in range(50)]))
    shuffled = read(tmp_path / "t.pkl", seed=1)
    assert sorted(shuffled) == [(i, str(i)) for i in range(50)]
    assert shuffled != sorted(shuffled)
    assert read(tmp_path / "t.pkl", seed=1, num_samples=10) == shuffled[:10]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.pkl", pickle.dumps({"a": 1}), "it holds a dict: expected a list of texts"),
        ("t.pkl", pickle.dumps(["a", 5]), "item 1: a int: expected a text"),
        ("t.pkl", pickle.dumps([b"a"], 4), "item 0: a bytes: expected a text"),
        ("t.pkl", pickle.dumps([print]), r"it holds \w+\.print"),
        ("t.pkl", b"\x80", "not a pickled list of texts"),
        ("t.jsonl", jsonl("body"), r"t\.jsonl:1: no column 'text': its columns are body"),
        ("t.jsonl", b'{"text": 5}\n', r"t\.jsonl:1: 'text' is 5, not a text"),
        ("t.jsonl", b'{"text": "a"}\n{\n', r"t\.jsonl:2: broken JSON"),
    ],
)
def test_what_is_no_text_is_named_with_its_place(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(RunError, match=message):
        read(tmp_path / name)


def test_a_source_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"no\.jsonl: no such file"):
        read(tmp_path / "no.jsonl")
    with pytest.raises(RunError, match=r"no\.pkl: cannot read"):
        read(tmp_path / "no.pkl")
