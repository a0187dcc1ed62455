"""Commit records take nothing on trust, and the index follows from them alone."""

import copy
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.base.canonical_json import read_sealed_json, sealed_json
from core.commit.record import CommitRecord, StoredFile, StoredSite
from core.commit.stored_records import folder_metadata
from core.samples.windows import StreamPlace

TABLE = "samples_0001.jsonl.gz"
RECORD = CommitRecord(
    window=1,
    plan_hash="0" * 16,
    stream_hash="1" * 16,
    first_sample_idx=0,
    last_sample_idx=3,
    next_place=StreamPlace(4, 4),
    n_samples=4,
    n_tokens=30,
    n_truncated=1,
    n_dropped={"bos": 4, "limit": 6},
    n_empty=1,
    samples_per_record=1,
    sites={"embedding": StoredSite((-1,), 8), "q": StoredSite((0, 2), 4)},
    dtype="float16",
    files=tuple(
        StoredFile(name, site, 10, "0" * 8, "0" * 64)
        for name, site in (("embedding/shard_0001.pkl", "embedding"), ("q/shard_0001.pkl", "q"), (TABLE, None))
    ),
    bad_records=({"position": 2, "line": 3, "reason": "bad"},),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def paths(value, path=()):
    """The place of every value inside a JSON value."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from paths(inner, (*path, key))


FIELDS = read_sealed_json(RECORD.to_bytes())
PATHS = list(paths(FIELDS))


def changed(path, change) -> bytes:
    fields = copy.deepcopy(FIELDS)
    holder = fields
    for key in path[:-1]:
        holder = holder[key]
    change(holder, path[-1])
    return sealed_json(fields)


def test_a_record_is_read_back_as_it_was_written():
    assert CommitRecord.from_bytes(RECORD.to_bytes()) == RECORD
    last = replace(RECORD, next_place=None, bad_records=())
    assert CommitRecord.from_bytes(last.to_bytes()) == last
    assert RECORD.n_seen == 40


@given(st.sampled_from(PATHS), json_values)
def test_a_record_with_any_value_replaced_is_read_as_it_says_or_refused(path, value):
    data = changed(path, lambda holder, key: holder.__setitem__(key, value))
    try:
        record = CommitRecord.from_bytes(data)
    except ValueError:
        return
    assert json.loads(record.to_bytes()) == json.loads(data)


NEEDED = [p for p in PATHS if isinstance(p[-1], str) and p[:-1] != ("n_dropped",) and p[-1] not in ("line", "reason")]


@pytest.mark.parametrize("path", NEEDED, ids=str)
def test_a_record_without_one_of_its_fields_is_refused_by_name(path):
    named = "sites" if path[:-1] == ("sites",) else path[-1]
    with pytest.raises(ValueError, match=f"not a commit record: .*{named}"):
        CommitRecord.from_bytes(changed(path, lambda holder, key: holder.pop(key)))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("n_tokens", "30"),
        ("n_tokens", True),
        ("n_tokens", -1),
        ("n_tokens", 30.0),
        ("samples_per_record", 0),
        ("dtype", "int8"),
        ("sites", {"q": {"layers": [0], "width": 4}}),
        ("sites", ["q"]),
        ("sites", {"embedding": {"layers": [-1], "width": 8}, "q": {"layers": ["0", 2], "width": 4}}),
        ("n_dropped", {"bos": "4"}),
        ("next_place", {"position": 4, "sample_idx": None}),
        ("files", [{"name": 1}]),
        ("bad_records", [{"position": "2"}]),
    ],
)
def test_a_field_that_cannot_be_is_refused_by_name(name, wrong):
    with pytest.raises(ValueError, match=rf"not a commit record: '{name}"):
        CommitRecord.from_bytes(changed((name,), lambda holder, key: holder.__setitem__(key, wrong)))


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"7", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_object_is_refused(data):
    with pytest.raises(ValueError, match="not a commit record"):
        CommitRecord.from_bytes(data)


def test_the_index_sums_over_windows_and_lists_each_site_with_its_own_layers():
    second = replace(RECORD, window=2, n_tokens=5, n_dropped={"limit": 1}, n_empty=0, next_place=None)
    index = folder_metadata([RECORD, second])
    assert (index["total_shards"], index["total_tokens"], index["total_empty_samples"]) == (2, 35, 1)
    assert index["total_activations"] == 2 * 4 * 3
    assert index["total_dropped_tokens"] == {"bos": 4, "limit": 7}
    assert [(s["shard_id"], s["site"], s["layers"], s["width"]) for s in index["shards"]] == [
        (window, site, layers, width)
        for window in (1, 2)
        for site, layers, width in (("embedding", [-1], 8), ("q", [0, 2], 4))
    ]
