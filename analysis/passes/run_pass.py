"""Runs a pass: every part is mapped somewhere, and the partials are merged in the order of the parts."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from absl import logging

from analysis.passes.blocks import BlockTask, MappedBlock, PartBlock, blocks_of
from analysis.passes.merge_tree import MergeTree
from analysis.passes.partials import PartialStore
from analysis.passes.pass_progress import PassProgress
from analysis.passes.protocol import Pass
from analysis.passes.runners import Runner, RunnerChoice
from analysis.passes.runners.blas_threads import one_blas_thread

Part = TypeVar("Part")
Partial = TypeVar("Partial")
Result = TypeVar("Result")


def run_pass(
    a_pass: Pass[Part, Partial, Result],
    parts: Sequence[Part],
    *,
    runner: Runner | RunnerChoice | str = "local",
    partials: PartialStore | None = None,
    block: int = 1,
) -> Result:
    """The result of a pass over parts; its bits depend on the pass and the parts alone, whatever runs where.

    Args:
      runner: one of `RUNNERS`, with the default number of workers; a `RunnerChoice`; or anything that is a `Runner`.
      partials: where partials are stored and found; None: nowhere. They stay there: the caller removes them once it has
        stored the result.
      block: parts that one worker maps and merges before it stores and sends one partial; a power of two.

    Of n blocks at most about log2(n) partials and one for each running worker are in memory.
    Raises ValueError without parts, and what `map` raises for the first bad part that is met.
    """
    if not parts:
        raise ValueError(f"{a_pass.name}: there are no parts")
    blocks = list(blocks_of(parts, block))
    choice = RunnerChoice(runner) if isinstance(runner, str) else runner
    with one_blas_thread():
        tree = MergeTree[Partial](len(blocks), a_pass.merge)
        for mapped in _mapped(a_pass, parts, blocks, choice, partials):
            tree.add(mapped.number, mapped.partial)
            del mapped
        return a_pass.finish(tree.root())


def _mapped(
    a_pass: Pass[Part, Partial, Result],
    parts: Sequence[Part],
    blocks: Sequence[PartBlock[Part]],
    choice: Runner | RunnerChoice,
    partials: PartialStore | None,
) -> Iterator[MappedBlock[Partial]]:
    """Blocks in the order in which they are done."""
    runner = choice.open(len(blocks)) if isinstance(choice, RunnerChoice) else choice
    n_bytes = sum(a_pass.facts(part).n_bytes for part in parts)
    with PassProgress(a_pass.name, len(parts), n_bytes, lambda line: logging.info("%s", line)) as progress:
        for mapped in runner.run(BlockTask(a_pass, partials), blocks):
            progress.add(mapped.n_parts, mapped.n_bytes, was_stored=mapped.was_stored)
            yield mapped
            del mapped
