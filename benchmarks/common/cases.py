"""Shared by the benchmarks of the forward pass: which layers a case captures, and the flags that choose cases."""

from collections.abc import Sequence

from absl.flags import argparse_flags

from core.base.command_line import positive

CASES = ("middle", "all")


def middle_layer(n_layers: int) -> int:
    """Layer 14 of 30."""
    return n_layers // 2 - 1


def case_layers(case: str, n_layers: int) -> tuple[int, ...]:
    """The layers that a case captures."""
    return tuple(range(n_layers)) if case == "all" else (middle_layer(n_layers),)


def add_case_flags(parser: argparse_flags.ArgumentParser, *, dtypes: Sequence[str], repeats: int) -> None:
    """The flags of every benchmark that runs cases; the first of `dtypes` is the default."""
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=CASES, help="one middle layer or every layer (default both)")
    add("--batch_size", type=positive(int), default=4, help="rows per step, of every side (default 4)")
    add("--dtype", choices=tuple(dtypes), default=dtypes[0], help=f"dtype that every side stores (default {dtypes[0]})")
    add_output_flags(parser, repeats=repeats)


def add_output_flags(parser: argparse_flags.ArgumentParser, *, repeats: int) -> None:
    """The flags of every benchmark that repeats."""
    parser.add_argument(
        "--repeats", type=positive(int), default=repeats, help=f"repetitions of each side (default {repeats})"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout instead of the table")
