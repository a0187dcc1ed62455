"""How others read stored activations for training: `datasets`, and SAELens from its own cache of them.

Both hold float16, for neither has bfloat16, and give float32 as they do by default. Contexts are of one length, because
SAELens' rows are.
"""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

CONTEXT = 128
HOOK = "blocks.6.hook_resid_post"
PEERS = {
    "datasets, shuffled rows": ("datasets",),
    "datasets, shuffle buffer": ("datasets",),
    "SAELens": ("datasets", "sae_lens"),
}
_DATASETS_BUFFER_ROWS = 10_000
_SAE_LENS_ROWS = 8
Tokens = Callable[[], Iterator[np.ndarray]]
"""Begins an iterator of (n, width) arrays, whose rows are the tokens."""


def missing_package(peer: str) -> str | None:
    """The package that a peer needs and that is not installed."""
    return next((name for name in PEERS[peer] if importlib.util.find_spec(name) is None), None)


def write_rows(folder: Path, width: int, tokens: Tokens) -> None:
    """A dataset with a row for each token, as `datasets` shuffles them."""
    import datasets

    def rows() -> Iterator[dict[str, np.ndarray | int]]:
        values = np.concatenate(list(tokens())).astype(np.float16)
        yield from ({"activation": row, "place": place} for place, row in enumerate(values))

    row = datasets.List(datasets.Value("float16"), length=width)
    features = datasets.Features({"activation": row, "place": datasets.Value("int64")})
    _generated(rows, features, folder).save_to_disk(str(folder / "stored"))


def write_contexts(folder: Path, width: int, tokens: Tokens) -> None:
    """A dataset with a row for each context, as SAELens caches activations."""
    import datasets

    def contexts() -> Iterator[dict[str, np.ndarray]]:
        left = np.empty((0, width), np.float16)
        for values in tokens():
            left = np.concatenate([left, values.astype(np.float16)])
            while len(left) >= CONTEXT:
                yield {HOOK: left[:CONTEXT], "token_ids": np.zeros(CONTEXT, np.int32)}
                left = left[CONTEXT:]

    features = datasets.Features(
        {
            HOOK: datasets.Array2D(shape=(CONTEXT, width), dtype="float16"),
            "token_ids": datasets.List(datasets.Value("int32"), length=CONTEXT),
        }
    )
    _generated(contexts, features, folder).save_to_disk(str(folder / "stored"))


def _generated(make: Callable[[], Iterator[Any]], features: Any, folder: Path) -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.Dataset.from_generator(make, features=features, cache_dir=str(folder / "cache"))


def reader(peer: str, folder: Path, batch_size: int, n_tokens: int, width: int) -> Callable[[], int]:
    """A function that reads at least `n_tokens` tokens in batches, and returns how many."""
    if peer == "SAELens":
        return lambda: _read_sae_lens(folder, batch_size, n_tokens, width)
    return lambda: _read_datasets(folder, batch_size, n_tokens, is_streamed=peer.endswith("buffer"))


def _read_datasets(folder: Path, batch_size: int, n_tokens: int, *, is_streamed: bool) -> int:
    import datasets

    rows = datasets.load_from_disk(str(folder / "stored"))
    if is_streamed:
        shuffled = rows.to_iterable_dataset(num_shards=16).shuffle(seed=0, buffer_size=_DATASETS_BUFFER_ROWS)
    else:
        shuffled = rows.shuffle(seed=0)
    found = 0
    for batch in shuffled.with_format("numpy").iter(batch_size=batch_size):
        found += len(batch["activation"])
        if found >= n_tokens:
            break
    return found


def _read_sae_lens(folder: Path, batch_size: int, n_tokens: int, width: int) -> int:
    import torch
    from sae_lens.training.activations_store import ActivationsStore

    store = ActivationsStore(
        model=None,
        dataset=None,
        streaming=False,
        hook_name=HOOK,
        hook_head_index=None,
        context_size=CONTEXT,
        d_in=width,
        n_batches_in_buffer=64,
        total_training_tokens=n_tokens,
        store_batch_size_prompts=_SAE_LENS_ROWS,
        train_batch_size_tokens=batch_size,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=str(folder / "stored"),
    )
    found = 0
    while found < n_tokens:
        found += len(next(store))
    return found
