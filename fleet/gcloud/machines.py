"""A TPU that is wanted: its name and place, and what it is created with."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """A TPU that the fleet wants, whether it exists or not."""

    name: str
    zone: str
    worker_id: int


@dataclass(frozen=True, order=True)
class Machine:
    """The configuration that a TPU is created with."""

    tpu_type: str
    runtime: str
    spot: bool
    queued: bool

    @property
    def label(self) -> str:
        """In words."""
        return f"{self.tpu_type} {self.runtime} {'spot' if self.spot else 'on demand'}{', queued' * self.queued}"
