"""The stored rows of a step: its tokens, or pools of them.

Axis letters: B rows of a step, T tokens of a row, K tokens of a row that are fetched, P pools, U output rows
per row of the step: one for each fetched token, or P for each sample.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float32, Int32

from core.reduce.reductions import Pool
from core.samples.windows import TokenizedSample
from core.step.fetching import Fetch, Places, fetch_of, places_of
from core.step.layout import StepLayout, sample_spans


def fetch_rows(
    layout: StepLayout, samples: Sequence[TokenizedSample], lengths: Sequence[int], pools: Sequence[Pool]
) -> Fetch:
    """What is fetched of a step and what is stored of it. `samples` and their `lengths` are the window's.

    With pools, the tokens with a weight above 0 are fetched: all of them for a mean, one per sample for the last.
    """
    return _fetch_pools(layout, samples, lengths, pools) if pools else fetch_of(layout, samples, lengths)


def _fetch_pools(
    layout: StepLayout, samples: Sequence[TokenizedSample], lengths: Sequence[int], pools: Sequence[Pool]
) -> Fetch:
    weights = np.zeros((len(pools), layout.n_rows, layout.length), np.float32)
    slots = np.full((layout.n_rows, layout.length), -1, np.int32)
    in_row: dict[int, tuple[int, Places]] = {}
    taken = np.zeros(layout.n_rows, np.int32)
    for row, sample, start, _ in sample_spans(layout, lengths):
        places, slot = start + samples[sample].stored_places, int(taken[row])
        in_row[sample] = row, slice(slot * len(pools), (slot + bool(len(places))) * len(pools))
        if len(places):
            weights[:, row, places] = [pool.weights(len(places)) for pool in pools]
            slots[row, places] = slot
            taken[row] += 1
    n_slots = 1 << (max(1, int(taken.max())) - 1).bit_length()  # few sizes, because each is compiled
    slots[slots < 0] = n_slots
    wanted = np.any(weights > 0, axis=0)
    gathered = places_of(wanted)
    if gathered is not None:
        weights, slots = _gathered(weights, slots, wanted, gathered, n_slots)
    fetch = Fetch.of(gathered, in_row, (layout.n_rows, len(pools) * n_slots))
    return replace(fetch, weights=weights, slots=slots)


def _gathered(
    weights: Float32[np.ndarray, "P B T"],
    slots: Int32[np.ndarray, "B T"],
    wanted: Bool[np.ndarray, "B T"],
    places: Int32[np.ndarray, "B K"],
    n_slots: int,
) -> tuple[Float32[np.ndarray, "P B K"], Int32[np.ndarray, "B K"]]:
    """The weights and slots of the gathered tokens; tokens that fill up a row belong to no sample."""
    is_repeat = np.arange(places.shape[1]) >= wanted.sum(axis=1, keepdims=True)
    of_tokens = np.take_along_axis(slots, places, axis=1)
    return np.take_along_axis(weights, places[None], axis=2), np.where(is_repeat, np.int32(n_slots), of_tokens)
