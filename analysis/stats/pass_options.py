"""How and where the commands run their passes: what their flags have in common."""

from dataclasses import dataclass

from analysis.passes import PartialStore, RunnerChoice

NO_PARTIALS = "none"
_WRITABLE = ("file", "gs", "gcs", "local", "memory")


@dataclass(frozen=True)
class PassOptions:
    """Attributes:
    runner: see `RunnerChoice`; None: processes where `workers` is above 1, else this process.
    partials: a folder for partial results, local or a URL; None: `analysis` in the output read; `none`: nowhere.
    keep_partials: leave them there at the end, for the next pass over an output that has grown.
    """

    runner: str | None = None
    workers: int | None = None
    ray_address: str | None = None
    partials: str | None = None
    keep_partials: bool = False

    def choice(self, default: RunnerChoice | None = None) -> RunnerChoice:
        """The runner. default: where none of the three is given. Raises UsageError."""
        if default is not None and (self.runner, self.workers, self.ray_address) == (None, None, None):
            return default
        name = "ray" if self.ray_address else "processes" if (self.workers or 1) > 1 else "local"
        return RunnerChoice(self.runner or name, self.workers, self.ray_address)

    def store(self, output: str) -> PartialStore | None:
        """Where partials of passes over `output` lie."""
        if self.partials is not None:
            return None if self.partials == NO_PARTIALS else PartialStore(self.partials)
        # Other storages can be read, but do not create a file exclusively.
        scheme, separator, _ = output.partition("://")
        return None if separator and scheme not in _WRITABLE else PartialStore(f"{output}/analysis")
