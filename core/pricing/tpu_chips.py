"""A table of TPU chips and their prices, to be edited.

Speeds, sizes and slices are from Google's pages on each generation (docs.cloud.google.com/tpu/docs). Prices are
on-demand list prices of US regions in dollars per hour; edit them for contracts and spot machines.
"""

from collections.abc import Sequence
from dataclasses import dataclass

_CUBE = 4


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip and its share of its host. Sizes in bytes, speeds in bytes or operations per second.

    Attributes:
      clock: cycles per second, to convert the compiler's cycles: peak over operations of the matrix units per cycle.
        v4 is missing, because with any such clock its programs come out at a third of its peak.
      peak: bfloat16 operations per second of the matrix units.
      memory, memory_speed: HBM.
      chips_per_host: of a slice of several hosts.
      link_speed: of the link between two neighbours, each way: a chip's published bandwidth over its number of links.
      host_link: chip to host memory; an assumption, since it is not published.
      network: one host's network card.
      slices: the available shapes.
      largest_cubes: the sides of the largest slice of 4x4x4 cubes; all smaller shapes of cubes are available, too, with
        their sides in ascending order.
      accelerator_type: an example, from which the compiler derives the generation.
      dollars_per_hour: of one chip.
    """

    clock: float
    peak: float
    memory: int
    memory_speed: float
    chips_per_host: int
    link_speed: float
    host_link: float
    network: float
    slices: tuple[str, ...]
    largest_cubes: tuple[int, ...] = ()
    accelerator_type: str
    dollars_per_hour: float

    def has_slice(self, shape: str) -> bool:
        """Whether there is a slice such as `8x8`."""
        if shape in self.slices:
            return True
        sides = [int(side) for side in shape.split("x")]
        return (
            len(sides) == len(self.largest_cubes)
            and sides == sorted(sides)
            and all(side and side % _CUBE == 0 for side in sides)
            and all(side <= largest for side, largest in zip(sides, self.largest_cubes, strict=True))
        )

    @property
    def known_slices(self) -> str:
        """The shapes that `has_slice` accepts, as text."""
        listed = ", ".join(self.slices)
        if not self.largest_cubes:
            return listed
        largest = "x".join(map(str, self.largest_cubes))
        return f"{listed}, and ascending multiples of {_CUBE} up to {largest}"


_FLAT_SLICES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CHIPS = {
    "v5e": Chip(
        clock=1.5e9,
        peak=197e12,
        memory=16 << 30,
        memory_speed=819e9,
        chips_per_host=4,
        link_speed=50e9,
        host_link=15e9,
        network=12.5e9,
        slices=_FLAT_SLICES,
        accelerator_type="v5litepod-64",
        dollars_per_hour=1.20,
    ),
    "v5p": Chip(
        clock=1.75e9,
        peak=459e12,
        memory=95 << 30,
        memory_speed=2765e9,
        chips_per_host=4,
        link_speed=100e9,
        host_link=15e9,
        network=25e9,
        slices=("2x2x1", "2x2x2", "2x2x4", "2x4x4"),
        largest_cubes=(16, 16, 24),
        accelerator_type="v5p-8",
        dollars_per_hour=4.20,
    ),
    "v6e": Chip(
        clock=1.75e9,
        peak=918e12,
        memory=32 << 30,
        memory_speed=1640e9,
        chips_per_host=4,
        link_speed=100e9,
        host_link=30e9,
        network=50e9,
        slices=_FLAT_SLICES,
        accelerator_type="v6e-64",
        dollars_per_hour=2.70,
    ),
}


def links_inside(chips: Sequence[Sequence[int]]) -> int:
    """The minimum number of links, at least 1, that a chip has to others of the chips at these coordinates.

    Neighbouring chips have a link. Wraparound links of a slice do not count.
    """

    def neighbours(chip: Sequence[int]) -> int:
        return sum(sum(abs(a - b) for a, b in zip(chip, other, strict=True)) == 1 for other in chips)

    return max(1, min(map(neighbours, chips)))
