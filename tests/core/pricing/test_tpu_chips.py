"""Which slices there are, and over how many links chips reach each other."""

import pytest

from core.pricing.tpu_chips import CHIPS, links_inside


@pytest.mark.parametrize(
    ("generation", "shape", "exists"),
    [
        ("v5e", "1x1", True),
        ("v5e", "16x16", True),
        ("v6e", "8x16", True),
        ("v5e", "32x32", False),
        ("v5e", "100x100", False),
        ("v5e", "0x0", False),
        ("v5e", "3x5", False),
        ("v5e", "2x2x2", False),
        ("v6e", "2x2x2", False),
        ("v5p", "2x2x1", True),
        ("v5p", "4x4x4", True),
        ("v5p", "4x8x12", True),
        ("v5p", "16x16x24", True),
        ("v5p", "4x4", False),
        ("v5p", "8x4x4", False),
        ("v5p", "4x4x6", False),
        ("v5p", "16x20x24", False),
        ("v5p", "0x4x4", False),
    ],
)
def test_a_generation_has_the_slices_that_can_be_had(generation, shape, exists):
    assert CHIPS[generation].has_slice(shape) is exists


def test_neighbours_share_a_link_and_a_chip_of_a_square_has_two():
    corner, right, below, across = (0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)
    assert links_inside([corner, right]) == 1
    assert links_inside([corner, right, below, across]) == 2
    assert links_inside([corner, across]) == 1  # over the chip between them
    assert links_inside([(x, y, z) for x in range(2) for y in range(2) for z in range(2)]) == 3
