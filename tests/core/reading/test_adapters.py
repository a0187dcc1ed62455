"""Batches of tokens in torch, Grain and JAX: each token once over all workers, and a state that continues."""

import json
import pickle
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from reading_oracle import exact_rows

from benchmarks.storage.synthetic_run import SyntheticRun, write_run
from core.base.errors import UsageError
from core.reading import Activations, open_activations
from core.reading.adapters import grain_dataset, torch_dataset

SETTINGS = {"layer": 2, "batch_size": 16, "shuffle": True, "buffer_bytes": 3000, "chunk_bytes": 60, "open_shards": 2}


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    write_run(out, SyntheticRun({"mlp": ((0, 2), 8)}), [rng.integers(1, 20, 4).tolist() for _ in range(9)])
    return out


@pytest.fixture(scope="module")
def acts(out) -> Activations:
    return open_activations(str(out))


def tokens_of(batches) -> list[tuple[int, int]]:
    """Sample and position of each row of dicts of arrays or tensors."""
    return [pair for b in batches for pair in zip(b["sample_idx"].tolist(), b["positions"].tolist(), strict=True)]


def equal(one: list[dict], other: list[dict]) -> bool:
    assert len(one) == len(other)
    return all(np.array_equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a)


def test_ranks_and_workers_of_torch_share_the_tokens(out, acts):
    torch = pytest.importorskip("torch")
    exact = {key[1:]: values for key, (_, values) in exact_rows(out, "mlp", 2).items()}
    found = []
    for rank in range(2):
        dataset = torch_dataset(acts, rank=rank, world_size=2, **SETTINGS)
        for batch in torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2):
            assert batch["activations"].dtype == torch.float32
            pairs = tokens_of([batch])
            np.testing.assert_array_equal(batch["activations"].numpy(), np.stack([exact[pair] for pair in pairs]))
            found += pairs
    assert sorted(found) == sorted(exact)


def test_torch_continues_from_every_batch_and_keeps_bfloat16(acts):
    torch = pytest.importorskip("torch")
    settings = SETTINGS | {"restore": False, "epochs": 2}
    dataset = torch_dataset(acts, **settings)
    assert dataset.state_dict() == {}
    batches, states = [], [{}]
    for batch in dataset:
        assert batch["activations"].dtype == torch.bfloat16
        batches.append({name: tensor.float().numpy() for name, tensor in batch.items()})
        states.append(json.loads(json.dumps(dataset.state_dict())))
    for step, state in enumerate(states):
        again = pickle.loads(pickle.dumps(torch_dataset(acts, **settings)))
        again.load_state_dict(state)
        rest = [{name: tensor.float().numpy() for name, tensor in batch.items()} for batch in islice(again, 2)]
        assert equal(rest, batches[step : step + 2])


def test_grain_continues_from_every_batch(acts):
    grain = pytest.importorskip("grain")
    dataset = grain_dataset(acts, **SETTINGS).map(lambda batch: batch | {"twice": 2 * batch["activations"]})
    iterator = iter(dataset)
    assert isinstance(iterator, grain.DatasetIterator)
    states, batches = [iterator.get_state()], []
    for batch in iterator:
        batches.append(batch)
        states.append(iterator.get_state())
    assert sorted(tokens_of(batches)) == sorted(set(tokens_of(batches)))
    assert len(tokens_of(batches)) == acts.n_tokens
    for step, state in enumerate(states):
        again = iter(dataset)
        again.set_state(state)
        assert equal(list(islice(again, 2)), batches[step : step + 2])


def test_slices_of_grain_share_the_tokens(acts):
    pytest.importorskip("grain")
    found = []
    for outer in range(2):
        for worker in range(2):
            dataset = grain_dataset(acts, share=(outer, 2), **SETTINGS)
            dataset.set_slice(slice(worker, None, 2))
            found += tokens_of(dataset)
    assert len(found) == acts.n_tokens == len(set(found))


def test_jax_batches_lie_on_the_mesh_and_continue_from_every_batch(acts):
    import jax

    from core.reading.adapters.jax_batches import DeviceBatches

    mesh = jax.make_mesh((1,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    wanted = list(acts.tokens(**SETTINGS))
    iterator = DeviceBatches(acts.tokens(**SETTINGS), sharding)
    states, found = [iterator.state_dict()], []
    for batch in iterator:
        assert batch.activations.sharding == sharding
        found.append(batch)
        states.append(iterator.state_dict())
    for step, state in enumerate(states):
        again = DeviceBatches(acts.tokens(**SETTINGS), sharding)
        again.load_state_dict(state)
        for batch, host in zip(islice(again, 2), wanted[step : step + 2], strict=True):
            np.testing.assert_array_equal(batch.activations, host.activations)
            np.testing.assert_array_equal(batch.host.sample_idx, host.sample_idx)


def test_settings_are_refused_before_a_worker_begins(acts):
    pytest.importorskip("torch")
    for make in (torch_dataset, grain_dataset):
        with pytest.raises(UsageError, match="layer 7 of mlp is not stored"):
            make(acts, **SETTINGS | {"layer": 7})
