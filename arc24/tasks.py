"""ARC tasks: plain dicts of training pairs and tests, and the check that one is well formed."""

from typing import Any

Grid = list[list[int]]
Task = dict[str, Any]
"""`{"train": [{"input": Grid, "output": Grid}, ...], "test": [{"input": Grid, "output": Grid or absent}, ...]}`"""

SIDES = ("input", "output")


def validate_task(task: Any) -> None:
    """Raises ValueError, naming the pair and the row, unless `task` is a well-formed ARC task.

    Grids are non-empty rectangles of integers 0..9 of any size. A test's output may be absent or None.
    """
    if not isinstance(task, dict):
        raise ValueError(f"an ARC task must be an object, not {type(task).__name__}")
    for part in ("train", "test"):
        if part not in task:
            raise ValueError(f"the task has no {part!r}")
        pairs = task[part]
        if not isinstance(pairs, list):
            raise ValueError(f"{part!r} must be a list of pairs, not {type(pairs).__name__}")
        if not pairs:
            raise ValueError(f"the task has no {part} pairs")
        for index, pair in enumerate(pairs):
            _validate_pair(pair, f"{part}[{index}]", needs_output=part == "train")


def _validate_pair(pair: Any, where: str, needs_output: bool) -> None:
    if not isinstance(pair, dict):
        raise ValueError(f"{where} must be an object with 'input' and 'output', not {type(pair).__name__}")
    for side in SIDES:
        if pair.get(side) is not None:
            validate_grid(pair[side], f"{where}.{side}")
        elif side == "input" or needs_output:
            raise ValueError(f"{where} has no {side!r}")


def validate_grid(grid: Any, where: str = "grid") -> None:
    """Raises ValueError unless `grid` is a non-empty rectangular list of rows of integers 0..9."""
    if not isinstance(grid, list) or not grid:
        raise ValueError(f"{where} is not a non-empty list of rows")
    for index, row in enumerate(grid):
        if not isinstance(row, list) or not row:
            raise ValueError(f"{where} row {index} is not a non-empty list of integers")
        if len(row) != len(grid[0]):
            raise ValueError(f"{where} is not rectangular: row {index} has {len(row)} cells, row 0 has {len(grid[0])}")
        # type() and not isinstance(): JSON's true is an int to isinstance.
        if set(map(type, row)) != {int}:
            odd = next(cell for cell in row if type(cell) is not int)
            raise ValueError(f"{where} row {index} contains {odd!r}: cells must be integers 0..9")
        if min(row) < 0 or max(row) > 9:
            odd = next(cell for cell in row if not 0 <= cell <= 9)
            raise ValueError(f"{where} row {index} contains {odd}: cells must be integers 0..9")
