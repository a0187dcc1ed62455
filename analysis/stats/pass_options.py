"""How and where the commands run their passes: what their flags have in common."""

from dataclasses import dataclass

from analysis.passes import PartialStore, RunnerChoice

NO_PARTIALS = "none"


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

    def choice(self, default: str | None = None) -> RunnerChoice:
        """The runner. default: where neither runner nor workers are given. Raises UsageError."""
        name = self.runner
        if name is None and self.workers is None and self.ray_address is None:
            name = default
        if name is None:
            name = "ray" if self.ray_address else "processes" if (self.workers or 1) > 1 else "local"
        return RunnerChoice(name, self.workers, self.ray_address)

    def store(self, output: str) -> PartialStore | None:
        """Where partials of passes over `output` lie."""
        if self.partials == NO_PARTIALS:
            return None
        return PartialStore(self.partials or f"{output}/analysis")
