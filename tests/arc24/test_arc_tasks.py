import copy

import pytest

from arc24.tasks import validate_task

TASK = {"train": [{"input": [[0, 1]], "output": [[2], [3]]}], "test": [{"input": [[4]]}]}


def test_a_task_without_a_test_output_is_valid():
    validate_task(TASK)
    validate_task({**TASK, "test": [{"input": [[4]], "output": None}]})


def test_a_grid_larger_than_any_of_arc_is_valid():
    validate_task({**TASK, "test": [{"input": [[9] * 40] * 31}]})


def with_value(value, *keys):
    task = copy.deepcopy(TASK)
    place = task
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return task


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ([], "an ARC task must be an object, not list"),
        ({"train": TASK["train"]}, "the task has no 'test'"),
        ({"test": TASK["test"]}, "the task has no 'train'"),
        (with_value([], "train"), "the task has no train pairs"),
        (with_value([], "test"), "the task has no test pairs"),
        (with_value({}, "train"), "'train' must be a list of pairs, not dict"),
        (with_value(3, "train", 0), "train[0] must be an object with 'input' and 'output', not int"),
        (with_value(None, "train", 0, "output"), "train[0] has no 'output'"),
        (with_value({}, "test", 0), "test[0] has no 'input'"),
        (with_value([], "train", 0, "input"), "train[0].input is not a non-empty list of rows"),
        (with_value("01", "train", 0, "input"), "train[0].input is not a non-empty list of rows"),
        (with_value([[]], "train", 0, "input"), "train[0].input row 0 is not a non-empty list of integers"),
        (
            with_value([[1, 2], [3]], "train", 0, "output"),
            "train[0].output is not rectangular: row 1 has 1 cells, row 0 has 2",
        ),
        (with_value([[1], [10]], "test", 0, "input"), "test[0].input row 1 contains 10: cells must be integers 0..9"),
        (with_value([[-1]], "test", 0, "input"), "test[0].input row 0 contains -1: cells must be integers 0..9"),
        (with_value([[True]], "test", 0, "input"), "test[0].input row 0 contains True: cells must be integers 0..9"),
        (with_value([[1.0]], "test", 0, "input"), "test[0].input row 0 contains 1.0: cells must be integers 0..9"),
        (with_value([[1]], "test", 0, "output"), None),
        (with_value([[11]], "test", 0, "output"), "test[0].output row 0 contains 11: cells must be integers 0..9"),
    ],
)
def test_what_is_wrong_is_named(task, reason):
    if reason is None:
        validate_task(task)
        return
    with pytest.raises(ValueError) as refusal:
        validate_task(task)
    assert str(refusal.value) == reason
