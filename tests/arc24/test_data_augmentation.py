import copy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arc24.data_augmentation import (
    Augmentation,
    apply_data_augmentation,
    augmentation_for,
    get_random_color_map,
    revert_data_augmentation,
    revert_task_augmentation,
)

ROOT = Path(__file__).parents[2]
TASK = {
    "train": [
        {"input": [[0, 1, 2], [3, 4, 5]], "output": [[6]]},
        {"input": [[7, 8]], "output": [[9], [1]]},
        {"input": [[1]], "output": [[2, 2, 3]]},
    ],
    "test": [{"input": [[5, 0], [0, 6], [7, 7]], "output": [[8, 0]]}, {"input": [[4]]}],
    "note": "kept",
}

augmentations = st.builds(
    Augmentation,
    hflip=st.booleans(),
    n_rot90=st.integers(0, 3),
    color_map=st.permutations(range(10)).map(tuple),
    train_order=st.none() | st.permutations(range(3)).map(tuple),
    swapped_train_pair=st.none() | st.integers(0, 2),
)


@given(augmentations)
@settings(deadline=None)
def test_every_augmentation_of_a_task_reverts(augmentation):
    before = copy.deepcopy(TASK)
    assert revert_task_augmentation(apply_data_augmentation(TASK, augmentation), augmentation) == TASK
    assert before == TASK


@given(augmentations)
@settings(deadline=None)
def test_every_augmentation_of_a_grid_reverts(augmentation):
    moved = apply_data_augmentation(TASK, augmentation)
    original = TASK["train"] + TASK["test"]
    reverted = [
        {side: revert_data_augmentation(grid, augmentation) for side, grid in pair.items()}
        for pair in moved["train"] + moved["test"]
    ]
    assert sorted(map(repr, reverted)) == sorted(map(repr, original))


def test_rotation_is_counter_clockwise_and_after_the_flip():
    task = {"train": [{"input": [[1, 2], [3, 4]], "output": [[1]]}], "test": [{"input": [[0]]}]}

    def turned(**how):
        return apply_data_augmentation(task, Augmentation(**how))["train"][0]["input"]

    assert turned(n_rot90=1) == [[2, 4], [1, 3]]
    assert turned(hflip=True) == [[2, 1], [4, 3]]
    assert turned(hflip=True, n_rot90=1) == [[1, 3], [2, 4]]


def test_colours_and_order_change_as_told():
    changed = apply_data_augmentation(
        TASK, Augmentation(color_map=(0, 9, 8, 7, 6, 5, 4, 3, 2, 1), train_order=(2, 0, 1))
    )
    assert changed["train"][0] == {"input": [[9]], "output": [[8, 8, 7]]}
    assert changed["train"][1]["input"] == [[0, 9, 8], [7, 6, 5]]
    assert changed["note"] == "kept"


def test_swap_exchanges_a_training_pair_and_the_first_test():
    changed = apply_data_augmentation(TASK, Augmentation(swapped_train_pair=1))
    assert changed["train"][1] == TASK["test"][0]
    assert changed["test"] == [TASK["train"][1], TASK["test"][1]]


def test_augmentations_that_do_not_fit_are_refused():
    without_output = {"train": TASK["train"], "test": [{"input": [[1]]}]}
    with pytest.raises(ValueError, match="without an output"):
        apply_data_augmentation(without_output, Augmentation(swapped_train_pair=0))
    with pytest.raises(ValueError, match="training pair 3 of 3"):
        apply_data_augmentation(TASK, Augmentation(swapped_train_pair=3))
    with pytest.raises(ValueError, match="does not fit a task with 3"):
        apply_data_augmentation(TASK, Augmentation(train_order=(0, 1)))
    with pytest.raises(ValueError, match="must permute"):
        Augmentation(color_map=(0,) * 10)
    with pytest.raises(ValueError, match="must permute"):
        Augmentation(train_order=(0, 0))


def test_eight_predictions_are_the_eight_symmetries_of_a_square():
    square = np.arange(9).reshape(3, 3)
    seen = set()
    for prediction in range(8):
        augmentation = augmentation_for(42, 3, prediction, 3)
        plain = Augmentation(hflip=augmentation.hflip, n_rot90=augmentation.n_rot90)
        task = {"train": [{"input": square.tolist(), "output": [[0]]}], "test": [{"input": [[0]]}]}
        seen.add(repr(apply_data_augmentation(task, plain)["train"][0]["input"]))
    symmetries = {repr(np.rot90(base, turns).tolist()) for base in (square, square.T) for turns in range(4)}
    assert seen == symmetries
    later = augmentation_for(42, 3, 8, 3)
    first = augmentation_for(42, 3, 0, 3)
    assert (later.hflip, later.n_rot90) == (first.hflip, first.n_rot90)
    assert later.color_map != first.color_map


def test_an_augmentation_depends_on_seed_position_and_prediction_alone():
    keys = [(seed, position, prediction) for seed in (0, 1) for position in (0, 1, 2) for prediction in (0, 8)]
    forwards = {key: augmentation_for(*key, 4) for key in keys}
    assert forwards == {key: augmentation_for(*key, 4) for key in reversed(keys)}
    assert len({augmentation.color_map for augmentation in forwards.values()}) == len(keys)


def test_another_process_makes_the_same_augmentation():
    # Written down because a sample's prompt must survive new versions of Python and numpy, not only new processes.
    expected = Augmentation(
        hflip=True,
        n_rot90=1,
        color_map=(0, 4, 7, 8, 2, 5, 6, 3, 1, 9),
        train_order=(0, 2, 1, 3),
        swapped_train_pair=None,
    )
    code = "from arc24.data_augmentation import augmentation_for; print(augmentation_for(42, 7, 5, 4))"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env={"PYTHONHASHSEED": "77"}
    )
    assert repr(augmentation_for(42, 7, 5, 4)) == other.stdout.strip() == repr(expected)


def test_colour_maps_permute_and_keep_the_background_nine_times_in_ten():
    rng = np.random.default_rng(0)
    maps = [get_random_color_map(rng) for _ in range(4000)]
    assert all(sorted(color_map) == list(range(10)) for color_map in maps)
    # Of the tenth that permutes ten colours, a tenth leaves 0 in place: 9% move it; 0.5% is one standard deviation.
    moved = sum(color_map[0] != 0 for color_map in maps) / len(maps)
    assert 0.07 < moved < 0.11
    images_of_one = Counter(color_map[1] for color_map in maps if color_map[0] == 0)
    assert set(images_of_one) == set(range(1, 10))
    assert max(images_of_one.values()) < 1.3 * min(images_of_one.values())


def test_background_changes_never_or_always_when_told_so():
    rng = np.random.default_rng(0)
    assert all(get_random_color_map(rng, 0.0)[0] == 0 for _ in range(200))
    assert any(get_random_color_map(rng, 1.0)[0] != 0 for _ in range(200))
