"""The cost of one run of a compiled TPU program, by the compiler's own estimates in the program's text.

`compiled.as_text()` has `"estimated_cycles"` for most operations. A loop's body appears in it once, so every operation
is multiplied by how often it runs. Operations without an estimate (kernels, gathers, collectives) are listed
separately, never dropped silently.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from core.base.errors import RunError

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY_TEXT = re.compile(r"\w+\[[\d,]*\]")
# {{0,1},{2,3}}; and [2,2]<=[4], groups as an iota array of devices that is reshaped, and maybe transposed first.
_GROUP = re.compile(r"\b(?:replica_groups|source_target_pairs)=\{\{?([\d,]*)\}")
_IOTA_GROUPS = re.compile(r"\breplica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# Names and views; and operations that are counted elsewhere: a loop in its body, an async copy where it starts.
_FREE = (
    *("add-dependency", "after-all", "bitcast", "constant", "get-tuple-element", "iota", "opt-barrier", "parameter"),
    *("partition-id", "replica-id", "tuple", "call", "conditional", "while", "async-start"),
)
# Custom calls that generate no code.
_FREE_TARGETS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "LayoutConstraint")
_SCALAR_BYTES = 64
# Parts that JAX's calls, loops and conditionals add to operation names.
_NOISE = re.compile(r"jit\(.*|shard_map.*|closed_call.*|while|body|cond|branch_\d+_fun")


@dataclass(frozen=True)
class Instruction:
    """One line of the program. shape: as in the text. cycles: None where the compiler has no estimate."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @cached_property
    def cycles(self) -> int | None:
        """The compiler's estimate for one execution."""
        found = _CYCLES.search(self.attributes)
        return int(found[1]) if found else None

    @property
    def op_name(self) -> str:
        """The operation's place in the traced function."""
        found = _OP_NAME.search(self.attributes)
        return found[1].replace("\\'", "'") if found else ""

    @property
    def label(self) -> str:
        """`op_name` without the parts that all names share; the opcode of operations that the compiler added."""
        parts = [part for part in self.op_name.split("/") if not _NOISE.fullmatch(part)]
        return "/".join(parts) or self.opcode

    @property
    def is_async_copy(self) -> bool:
        """Whether it starts a copy that overlaps computation."""
        name = self.opcode.removesuffix("-start")
        return self.opcode.endswith("-start") and name not in COLLECTIVES and name != "async"

    @property
    def is_free(self) -> bool:
        """Whether its cost is negligible: names, views, scalars, and ends of operations counted where they start."""
        target = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return (
            self.opcode in _FREE
            or self.opcode.endswith(("-done", "-update"))
            or (target is not None and target[1] in _FREE_TARGETS)
            or shape_bytes(self.shape) <= _SCALAR_BYTES
        )

    @property
    def is_kernel(self) -> bool:
        """Whether it is a Pallas kernel."""
        return self.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in self.attributes

    @property
    def group(self) -> tuple[int, ...]:
        """The first group of devices of a collective; () where it names none, so that all devices are one group.

        Raises RunError for groups in an unknown notation.
        """
        if found := _GROUP.search(self.attributes):
            return tuple(int(device) for device in found[1].split(",") if device)
        if found := _IOTA_GROUPS.search(self.attributes):
            sizes, dims, order = (tuple(int(n) for n in (part or "").split(",") if n) for part in found.groups())
            devices = np.arange(prod(dims)).reshape(dims).transpose(order or None)
            return tuple(devices.reshape(sizes)[0].tolist())
        raise RunError(
            f"{self.opcode} {self.name} of the compiled program: its device groups are in an unknown notation"
        )

    def called(self, attribute: str) -> tuple[str, ...]:
        """The computations that an attribute names, such as `body`."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
        return tuple(_NAME.findall(found[1])) if found else ()


def shape_bytes(shape: str) -> int:
    """Bytes of all arrays in a shape's text; layouts and memory spaces are ignored."""
    return (
        sum(_element_bits(kind) * prod(int(n) for n in dims.split(",") if n) for kind, dims in _ARRAY.findall(shape))
        // 8
    )


def _element_bits(kind: str) -> int:
    found = _BITS.search(kind)
    return int(found[0]) if found else 8


@dataclass(frozen=True)
class Program:
    """A compiled program as computations of instructions."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str

    @classmethod
    def parse(cls, text: str) -> "Program":
        """From `compiled.as_text()`. Raises RunError for text without an entry computation."""
        computations: dict[str, list[Instruction]] = {}
        entry, current = "", []
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
            elif found := _INSTRUCTION.match(line):
                current.append(_instruction(found[2], found[3], is_root=bool(found[1])))
        if not entry:
            raise RunError("the compiled program has no entry: the text format of this libtpu version is not supported")
        return cls({name: tuple(body) for name, body in computations.items()}, entry)

    def executed(self) -> Iterator[tuple[int, Instruction]]:
        """Every instruction that runs by itself, and how often; instructions inside a fusion are part of the fusion.

        Of a conditional, the branch with the most cycles is counted.
        Raises RunError for a loop whose trip count is not in the text.
        """
        yield from self._run(self.entry, 1)

    def _run(self, computation: str, times: int) -> Iterator[tuple[int, Instruction]]:
        for instruction in self.computations[computation]:
            yield times, instruction
            if instruction.opcode == "while":
                count = times * self.trip_count(computation, instruction)
                for part in (*instruction.called("body"), *instruction.called("condition")):
                    yield from self._run(part, count)
            elif instruction.opcode == "conditional":
                branches = [list(self._run(branch, times)) for branch in instruction.called("branch_computations")]
                yield from max(branches, key=_total_cycles, default=[])
            elif instruction.opcode in ("call", "async-start"):
                for callee in instruction.called("to_apply") or instruction.called("calls"):
                    yield from self._run(callee, times)

    def collectives_in(self, instruction: Instruction) -> Iterator[Instruction]:
        """The executed instruction itself if it is a collective, or the collectives fused into it."""
        if instruction.opcode.removesuffix("-start") in COLLECTIVES:
            yield instruction
        elif instruction.opcode == "fusion":
            for callee in instruction.called("calls"):
                for inner in self.computations[callee]:
                    yield from self.collectives_in(inner)

    def trip_count(self, computation: str, loop: Instruction) -> int:
        """How often the body of a `while` runs: from the compiler's annotation, or from its counter."""
        if noted := _TRIP_COUNT.search(loop.attributes):
            return int(noted[1])
        (condition,), (body,) = loop.called("condition"), loop.called("body")
        try:
            compare = self._root(condition)
            counter = self._element(condition, compare.operands[0])
            start = self._value(computation, self._find(computation, loop.operands[0]).operands[counter])
            bound = self._value(condition, compare.operands[1])
            step = self._step(body, self._root(body).operands[counter])
        except (LookupError, ValueError) as error:
            raise RunError(f"loop {loop.name} of the compiled program: its trip count cannot be determined") from error
        if "direction=LT" not in compare.attributes or step < 1:
            raise RunError(f"loop {loop.name} of the compiled program does not count up, which is not supported")
        return max(0, -(-(bound - start) // step))

    def _root(self, computation: str) -> Instruction:
        return next(line for line in self.computations[computation] if line.is_root)

    def _find(self, computation: str, name: str) -> Instruction:
        return next(line for line in self.computations[computation] if line.name == name)

    def _source(self, computation: str, name: str) -> Instruction:
        """The instruction that computes a value, followed through copies and bitcasts."""
        line = self._find(computation, name)
        while line.opcode in ("copy", "bitcast"):
            line = self._find(computation, line.operands[0])
        return line

    def _element(self, computation: str, name: str) -> int:
        """Which element of the loop's tuple a value is."""
        line = self._source(computation, name)
        found = re.search(r"\bindex=(\d+)", line.attributes)
        if line.opcode != "get-tuple-element" or not found:
            raise ValueError(name)
        return int(found[1])

    def _value(self, computation: str, name: str) -> int:
        line = self._source(computation, name)
        if line.opcode != "constant":
            raise ValueError(name)
        return int(line.operands[0])

    def _step(self, body: str, name: str) -> int:
        line = self._source(body, name)
        if line.opcode != "add":
            raise ValueError(name)
        return self._value(body, line.operands[1])


def _total_cycles(executed: list[tuple[int, Instruction]]) -> int:
    return sum(times * (instruction.cycles or 0) for times, instruction in executed)


def _instruction(name: str, text: str, *, is_root: bool) -> Instruction:
    shape, rest = _split(text)
    opcode, _, rest = rest.partition("(")
    end = _closing(rest)
    operands = rest[:end]
    names = tuple(_NAME.findall(operands)) or tuple(part for part in operands.split(",") if part)
    return Instruction(name, shape, opcode, names, rest[end + 1 :], is_root)


def _split(text: str) -> tuple[str, str]:
    """Splits off a shape, which may be a tuple with spaces in it."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    end = _closing(text[1:]) + 2
    return text[:end], text[end + 1 :]


def _closing(text: str) -> int:
    """The index at which the parenthesis closes that was opened just before `text`."""
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return place
    return len(text)


@dataclass(frozen=True)
class Collective:
    """Data that devices exchange in a step.

    Attributes:
      group: the first group of devices that exchange data, by their positions in the mesh; (): one group of all.
      bytes: of a device's results, summed over all `times`.
    """

    operation: str
    group: tuple[int, ...]
    times: int
    bytes: int

    def sent(self, n_devices: int) -> float:
        """Bytes that each of `n_devices` sends, and receives, with a ring algorithm.

        Other collectives than reductions and gathers are counted in full.
        """
        others = (n_devices - 1) / n_devices
        factors = {"all-reduce": 2 * others, "all-gather": others, "reduce-scatter": n_devices - 1}
        return self.bytes * factors.get(self.operation, 1.0)


@dataclass(frozen=True)
class ProgramCost:
    """One run of a program on one device.

    Attributes:
      cycles: the compiler's estimates by operation, longest first.
      kernels: how many Pallas kernels run.
      unpriced: operation -> bytes that it writes, where the compiler has no estimate.
      copied_bytes: bytes of copies that overlap other operations.
    """

    cycles: dict[str, int]
    kernels: int
    unpriced: dict[str, int]
    collectives: tuple[Collective, ...]
    copied_bytes: int

    @classmethod
    def of(cls, program: Program) -> "ProgramCost":
        """Raises as `Program.executed` does."""
        cycles: Counter[str] = Counter()
        unpriced: Counter[str] = Counter()
        exchanged: list[tuple[int, Instruction]] = []
        kernels = copied = 0
        for times, line in program.executed():
            found = list(program.collectives_in(line))
            exchanged += [(times, inner) for inner in found]
            if line.cycles is not None:
                cycles[line.label] += times * line.cycles
            elif line.is_kernel:
                kernels += times
            elif line.is_async_copy:
                copied += times * _copied_bytes(line.shape)
            elif not found and not line.is_free:
                unpriced[f"{line.opcode} {line.label}"] += times * shape_bytes(line.shape)
        return cls(dict(cycles.most_common()), kernels, dict(unpriced), _totals(exchanged), copied)

    def then(self, other: "ProgramCost", name: str) -> "ProgramCost":
        """The cost of both, one after the other; labels of `other`'s operations are prefixed with `name`."""
        cycles = self.cycles | {f"{name}: {label}": spent for label, spent in other.cycles.items()}
        return ProgramCost(
            dict(Counter(cycles).most_common()),
            self.kernels + other.kernels,
            self.unpriced | {f"{name}: {label}": written for label, written in other.unpriced.items()},
            self.collectives + other.collectives,
            self.copied_bytes + other.copied_bytes,
        )


def _copied_bytes(shape: str) -> int:
    """Bytes of the target among a copy's source, target and context; it may be a slice of the source."""
    return sorted(map(shape_bytes, _ARRAY_TEXT.findall(shape)))[-2]


def _totals(exchanged: list[tuple[int, Instruction]]) -> tuple[Collective, ...]:
    times_of: Counter[tuple[str, tuple[int, ...]]] = Counter()
    bytes_of: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for times, line in exchanged:
        key = line.opcode.removesuffix("-start"), line.group
        times_of[key] += times
        bytes_of[key] += times * _result_bytes(line)
    return tuple(Collective(*key, times, bytes_of[key]) for key, times in sorted(times_of.items()))


def _result_bytes(line: Instruction) -> int:
    """Bytes of a collective's results. Except for all-reduce, a start's shape has operands, results and contexts."""
    if not line.opcode.endswith("-start") or line.opcode == "all-reduce-start":
        return shape_bytes(line.shape)
    sizes = [size for size in map(shape_bytes, _ARRAY_TEXT.findall(line.shape)) if size > _SCALAR_BYTES]
    return sum(sizes[len(sizes) // 2 :])
