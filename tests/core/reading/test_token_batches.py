"""Batches of tokens: every stored token once an epoch with its own values, in an order that can be continued."""

import json
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from reading_oracle import assert_exact, exact_rows, keys, same

from benchmarks.storage.synthetic_run import SyntheticRun, write_run
from core.base.errors import UsageError
from core.reading import Activations, open_activations

SITES = {"mlp": ((0, 2), 8), "residual": ((0, 2, 4), 6)}
FORMATS = {"pickle": True, "safetensors": False, "planes": False}
SMALL = {"buffer_bytes": 2000, "chunk_bytes": 40, "open_shards": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Two workers' folders of one stream, in each format, without a fifth of the tokens."""
    home = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    for name, gzipped in FORMATS.items():
        run = SyntheticRun(SITES, shard_format=name, gzipped=gzipped, dropped=0.2)
        for machine in range(2):
            windows = [rng.integers(1, 30, 4).tolist() for _ in range(4)]
            write_run(home / name, run, windows, folder=f"tpu_{machine}", machine=(machine, 2))
        rng = np.random.default_rng(0)
    return {name: home / name for name in FORMATS}


@pytest.fixture(scope="module")
def exact(runs) -> dict:
    return exact_rows(runs["safetensors"], "residual", 2)


def opened(runs, name: str = "safetensors") -> Activations:
    return open_activations(str(runs[name]))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_an_epoch_has_every_stored_token_once_with_its_values(runs, exact, name, shuffle):
    acts = opened(runs, name)
    batches = list(acts.tokens(2, "residual", batch_size=7, shuffle=shuffle, **SMALL))
    assert [len(batch) for batch in batches[:-1]] == [7] * (len(batches) - 1)
    assert_exact(batches, acts.folders, exact)
    found = keys(batches, acts.folders)
    assert sorted(found) == sorted(exact)
    assert len(found) == acts.n_tokens
    assert (found == list(exact)) is not shuffle


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_restored_state_continues_with_the_same_bits_from_every_batch(runs, name, shuffle):
    acts = opened(runs, name)

    def fresh(batch_size: int = 37):
        return acts.tokens(
            2, "residual", batch_size=batch_size, shuffle=shuffle, seed=3, epochs=2, drop="first", **SMALL
        )

    iterator, batches, states = fresh(), [], []
    states.append(iterator.state_dict())
    for batch in iterator:
        batches.append(batch)
        states.append(iterator.state_dict())
    assert len(json.dumps(states[-1])) < 200
    for step, state in enumerate(states):
        again = fresh()
        again.load_state_dict(json.loads(json.dumps(state)))
        # The next batch and the next state: so all that follow, step by step.
        assert same(list(islice(again, 1)), batches[step : step + 1]), step
        assert [again.state_dict()] == states[step + 1 :][:1] or step == len(batches)


def test_the_order_depends_on_seed_and_epoch_and_not_on_the_batch_size(runs):
    acts = opened(runs)

    def order(seed: int, batch_size: int, epochs: int = 1) -> list:
        batches = acts.tokens(2, "residual", batch_size=batch_size, shuffle=True, seed=seed, epochs=epochs, **SMALL)
        return keys(list(batches), acts.folders)

    one = order(0, 7)
    assert order(0, 64) == order(0, 1) == one
    assert order(1, 7) != one
    two = order(0, 7, epochs=2)
    assert two[: len(one)] == one
    assert two[len(one) :] != one
    assert sorted(two[len(one) :]) == sorted(one)


def test_every_format_gives_one_order_where_chunks_agree(runs):
    """All rows fit into the buffer, and a pickle and a planes file are one chunk."""
    orders = []
    for name in ("pickle", "planes"):
        acts = opened(runs, name)
        orders.append(keys(list(acts.tokens(0, "mlp", batch_size=5, shuffle=True)), acts.folders))
    assert orders[0] == orders[1]


def test_the_shuffle_mixes_shards(runs):
    acts = opened(runs)
    everything = {"buffer_bytes": 1 << 20, "open_shards": 8}
    found = keys(list(acts.tokens(2, "residual", batch_size=32, shuffle=True, **everything)), acts.folders)
    n_samples = len(acts)
    for start in range(0, len(found) - 32, 32):
        assert len({key[:2] for key in found[start : start + 32]}) > n_samples / 4


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_shares_have_each_token_once(runs, exact, shuffle, n):
    acts = opened(runs)
    found = []
    for share in range(n):
        batches = acts.tokens(2, "residual", batch_size=8, shuffle=shuffle, share=(share, n), **SMALL)
        found += keys(list(batches), acts.folders)
    assert sorted(found) == sorted(exact)


def test_a_share_beyond_the_last_shard_is_empty(runs):
    acts = opened(runs)
    assert list(acts.tokens(0, "mlp", batch_size=8, share=(90, 91), epochs=None)) == []


@pytest.mark.parametrize("drop", ["first", "0:3", "-2:", ["first", "-1:"], "1:-1"])
@pytest.mark.parametrize("name", FORMATS)
def test_positions_are_dropped_as_python_slices_a_sample(runs, exact, name, drop):
    acts = opened(runs, name)
    lengths = {(s.part.folder, s.sample_idx): len(s.token_ids) for s in acts.samples()}
    dropped = set()
    for rule in [drop] if isinstance(drop, str) else drop:
        ends = "0:1" if rule == "first" else rule
        span = slice(*(int(end) if end else None for end in ends.split(":")))
        dropped |= {(*key, place) for key, n in lengths.items() for place in range(n)[span]}
    for shuffle in (False, True):
        batches = list(acts.tokens(2, "residual", batch_size=8, drop=drop, shuffle=shuffle, **SMALL))
        assert sorted(keys(batches, acts.folders)) == sorted(exact.keys() - dropped)
        assert_exact(batches, acts.folders, exact)


def test_token_ids_are_dropped_and_a_kind_of_token_needs_its_tokenizer(runs, exact):
    acts = opened(runs)
    some = [token for token, _ in list(exact.values())[::5]]

    special = {"added_tokens_decoder": {}, "all_special_ids": some[:3]}
    tokenizer = SimpleNamespace(bos_token_id=some[3], pad_token_id=None, eos_token_id=None, **special)
    left = {key for key, (token, _) in exact.items() if token not in some}
    assert sorted(keys(list(acts.tokens(2, "residual", batch_size=8, drop=some)), acts.folders)) == sorted(left)
    kinds = acts.tokens(2, "residual", batch_size=8, drop=["bos", "special"], tokenizer=tokenizer)
    left = {key for key, (token, _) in exact.items() if token not in some[:4]}
    assert sorted(keys(list(kinds), acts.folders)) == sorted(left)
    for drop, message in (
        ("bos", "needs tokenizer"),
        ("newline", "expected one or several"),
        ("a:b", "expected START"),
    ):
        with pytest.raises(UsageError, match=message):
            acts.tokens(2, "residual", batch_size=8, drop=drop)


@pytest.mark.parametrize("name", FORMATS)
def test_several_layers_lie_side_by_side(runs, name):
    acts = opened(runs, name)
    wanted = [exact_rows(runs["safetensors"], "residual", layer) for layer in (4, 0)]
    for shuffle in (False, True):
        batches = list(acts.tokens([4, 0], "residual", batch_size=8, shuffle=shuffle, **SMALL))
        rows = np.concatenate([batch.activations for batch in batches])
        assert rows.shape == (acts.n_tokens, 2, 6)
        for slot, exact_layer in enumerate(wanted):
            stacked = np.stack([exact_layer[key][1] for key in keys(batches, acts.folders)])
            np.testing.assert_array_equal(rows[:, slot], stacked)


def test_stored_values_are_given_as_they_are(runs, exact):
    acts = opened(runs)
    for shuffle in (False, True):
        batches = list(acts.tokens(2, "residual", batch_size=8, shuffle=shuffle, restore=False, **SMALL))
        assert {batch.activations.dtype.name for batch in batches} == {"bfloat16"}
        rows = np.concatenate([batch.activations for batch in batches]).astype(np.float32)
        np.testing.assert_array_equal(rows, np.stack([exact[key][1] for key in keys(batches, acts.folders)]))


def test_a_short_last_batch_can_be_left_out(runs):
    acts = opened(runs)
    n = acts.n_tokens
    sizes = [len(b) for b in acts.tokens(0, "mlp", batch_size=32, epochs=2)]
    assert sizes == ([32] * (n // 32) + [n % 32]) * 2
    assert [len(b) for b in acts.tokens(0, "mlp", batch_size=32, epochs=2, drop_last=True)] == [32] * (n // 32 * 2)


def test_batches_without_end_go_on_and_stop_where_no_token_is_left(runs):
    acts = opened(runs)
    endless = acts.tokens(0, "mlp", batch_size=64, epochs=None, shuffle=True)
    n_batches = 4 * acts.n_tokens // 64
    assert sum(len(next(endless)) for _ in range(n_batches)) > 3 * acts.n_tokens
    for nothing in ({"drop": "0:"}, {"drop_last": True, "batch_size": 10**4}):
        with pytest.raises(UsageError, match="a whole epoch has no batch"):
            next(acts.tokens(0, "mlp", epochs=None, **{"batch_size": 8} | nothing))
    assert list(acts.tokens(0, "mlp", batch_size=8, drop="0:")) == []


def test_a_state_of_another_order_is_refused(runs):
    acts = opened(runs)
    state = acts.tokens(2, "residual", batch_size=8, shuffle=True, seed=1, **SMALL).state_dict()
    for other in ({"seed": 2}, {"drop": "first"}, {"shuffle": False}, {"share": (0, 2)}, {"buffer_bytes": 4000}):
        flags = {"shuffle": True, "seed": 1, **SMALL} | other
        with pytest.raises(UsageError, match="another order of tokens"):
            acts.tokens(2, "residual", batch_size=8, **flags).load_state_dict(state)
    with pytest.raises(UsageError, match="'row' is missing"):
        acts.tokens(2, "residual", batch_size=8).load_state_dict({"epoch": 0, "group": 0, "fill": 0})


def test_numbers_that_cannot_be_are_refused(runs):
    acts = opened(runs)
    for flags, message in (
        ({"batch_size": 0}, "must be positive"),
        ({"epochs": 0}, "epochs is 0"),
        ({"share": (2, 2)}, r"share is \(2, 2\)"),
        ({"layer": None}, "several layers of mlp are stored: choose from 0, 2"),
        ({"layer": 4}, "layer 4 of mlp is not stored"),
        ({"site": None}, "several sites are stored: choose one of mlp, residual"),
    ):
        with pytest.raises(UsageError, match=message):
            acts.tokens(**{"layer": 0, "site": "mlp", "batch_size": 4} | flags)
