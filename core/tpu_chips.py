"""What the laboratory knows of TPU chips, and what they cost: a table to edit.

Speeds and sizes are those of Google's pages on each generation (docs.cloud.google.com/tpu/docs). Prices are on-demand
list prices of us regions in dollars an hour; a contract or a spot machine has others: change them here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One chip and its share of the machine around it. Sizes in bytes, speeds in bytes or operations a second.

    Attributes:
      clock: cycles a second, with which the compiler's cycles become seconds: peak over what the matrix units multiply
        in a cycle. v4 is not here, since its programs come out at a third of its peak by any such clock.
      peak: bfloat16 operations a second of the matrix units.
      memory, memory_speed: HBM.
      chips_per_host: of a slice of several hosts.
      links_speed: what a chip receives from the chips around it.
      host_link: chip to host memory; an assumption, it is not published.
      network: one host's network card.
      accelerator_type: an example that makes the compiler describe this generation.
      dollars_per_hour: of one chip.
    """

    clock: float
    peak: float
    memory: int
    memory_speed: float
    chips_per_host: int
    links_speed: float
    host_link: float
    network: float
    accelerator_type: str
    dollars_per_hour: float


CHIPS = {
    "v5e": Chip(1.5e9, 197e12, 16 << 30, 819e9, 4, 200e9, 15e9, 12.5e9, "v5litepod-64", 1.20),
    "v5p": Chip(1.75e9, 459e12, 95 << 30, 2765e9, 4, 600e9, 15e9, 25e9, "v5p-8", 4.20),
    "v6e": Chip(1.75e9, 918e12, 32 << 30, 1640e9, 4, 400e9, 30e9, 50e9, "v6e-64", 2.70),
}
