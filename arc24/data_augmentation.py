"""Revertible augmentation of ARC tasks: flip, rotation, colors, order of the training pairs, train-test swap.

Every random choice uses PCG64's raw 64-bit words, the only stream that numpy guarantees to keep: the methods of its
Generator may change between versions, but a sample must have the same prompt on every machine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from arc24.tasks import SIDES, Grid, Task

IDENTITY_COLOR_MAP = tuple(range(10))


@dataclass(frozen=True)
class Augmentation:
    """Changes to a task, applied in this order: swap, train order, then flip, rotation and colors of each grid."""

    hflip: bool = False
    n_rot90: int = 0
    """Quarter turns, counter-clockwise, after the flip."""
    color_map: tuple[int, ...] = IDENTITY_COLOR_MAP
    """Color c becomes color_map[c]."""
    train_order: tuple[int, ...] | None = None
    """Training pair i of the result is pair train_order[i]; None keeps the order."""
    swapped_train_pair: int | None = None
    """The training pair that changes places with the first test, which must have an output; None swaps nothing."""

    def __post_init__(self) -> None:
        if sorted(self.color_map) != list(range(10)):
            raise ValueError(f"a color map must permute 0..9, not {self.color_map}")
        if self.train_order is not None and sorted(self.train_order) != list(range(len(self.train_order))):
            raise ValueError(f"a train order must permute 0..{len(self.train_order) - 1}, not {self.train_order}")


def augmentation_for(seed: int, task_position: int, prediction: int, n_train: int) -> Augmentation:
    """The augmentation of one sample, which depends only on the arguments.

    Predictions 0..7 are the eight flips and rotations, then they repeat; each has its own colors and order.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, task_position, prediction])))
    return Augmentation(
        hflip=prediction % 8 >= 4,
        n_rot90=prediction % 4,
        color_map=get_random_color_map(rng),
        train_order=_random_order(rng, range(n_train)),
    )


def get_random_color_map(rng: np.random.Generator, change_background_probability: float = 0.1) -> tuple[int, ...]:
    """A permutation of the colors 1..9 and, with the given probability, of 0 (the background) too."""
    change_background = rng.bit_generator.random_raw() < change_background_probability * 2.0**64
    if change_background:
        return _random_order(rng, range(10))
    return (0, *_random_order(rng, range(1, 10)))


def apply_data_augmentation(task: Task, augmentation: Augmentation) -> Task:
    """A new task; keys other than train and test are kept. Raises ValueError if the augmentation does not fit."""
    train, test = list(task["train"]), list(task["test"])
    _swap(train, test, augmentation.swapped_train_pair)
    order = _order(augmentation, len(train))
    return {
        **task,
        "train": [_map_pair(train[index], augmentation, _augment_grid) for index in order],
        "test": [_map_pair(pair, augmentation, _augment_grid) for pair in test],
    }


def revert_task_augmentation(task: Task, augmentation: Augmentation) -> Task:
    """The task that `apply_data_augmentation` turned into `task`."""
    order = _order(augmentation, len(task["train"]))
    train: list[dict[str, Any]] = [{}] * len(order)
    for index, pair in zip(order, task["train"], strict=True):
        train[index] = _map_pair(pair, augmentation, revert_data_augmentation)
    test = [_map_pair(pair, augmentation, revert_data_augmentation) for pair in task["test"]]
    _swap(train, test, augmentation.swapped_train_pair)
    return {**task, "train": train, "test": test}


def revert_data_augmentation(grid: Grid, augmentation: Augmentation) -> Grid:
    """The grid that the augmentation turned into `grid`, such as a model's answer in the task's own colors."""
    colors = np.argsort(augmentation.color_map)
    turned = np.rot90(colors[np.asarray(grid)], -augmentation.n_rot90)
    return (np.fliplr(turned) if augmentation.hflip else turned).tolist()


def _augment_grid(grid: Grid, augmentation: Augmentation) -> Grid:
    cells = np.asarray(grid)
    turned = np.rot90(np.fliplr(cells) if augmentation.hflip else cells, augmentation.n_rot90)
    return np.asarray(augmentation.color_map)[turned].tolist()


def _map_pair(
    pair: dict[str, Any], augmentation: Augmentation, change: Callable[[Grid, Augmentation], Grid]
) -> dict[str, Any]:
    grids = {side: change(pair[side], augmentation) for side in SIDES if pair.get(side) is not None}
    return {**pair, **grids}


def _swap(train: list, test: list, index: int | None) -> None:
    if index is None:
        return
    if not 0 <= index < len(train):
        raise ValueError(f"cannot swap training pair {index} of {len(train)}")
    if test[0].get("output") is None:
        raise ValueError("cannot swap a test without an output into the training pairs")
    train[index], test[0] = test[0], train[index]


def _order(augmentation: Augmentation, n_train: int) -> Sequence[int]:
    order = augmentation.train_order
    if order is None:
        return range(n_train)
    if len(order) != n_train:
        raise ValueError(f"an order of {len(order)} training pairs does not fit a task with {n_train}")
    return order


def _random_order(rng: np.random.Generator, items: Sequence[int]) -> tuple[int, ...]:
    """Fisher-Yates; the modulo's bias is below 2**-58 for the lengths used here."""
    order = list(items)
    for last in range(len(order) - 1, 0, -1):
        other = int(rng.bit_generator.random_raw()) % (last + 1)
        order[last], order[other] = order[other], order[last]
    return tuple(order)
