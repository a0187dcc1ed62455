"""`whiten fit`: a whitening from the moments of one layer."""

import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from analysis.moments import Moments
from analysis.stats import PassOptions, StatsRequest, as_stored, layer_moments, read_stats, remove_partials
from analysis.whitening import IncrementalWhitener, Whitening, WhiteningCheck, WhiteningSettings, save_whitening
from core.base.errors import UsageError
from core.object_store.single_file import create_result
from core.reading import Activations, open_activations
from core.reading.dropping import Dropping


@dataclass(frozen=True)
class LayerRequest:
    """One layer of an output, or what is known of it.

    Attributes:
      url: of the output. layer, site: may be left out where there is one.
      drop: which tokens do not count.
      stats: a file of `stats`, or one that `IncrementalWhitener.save` wrote: used in place of the shards.
    """

    url: str
    layer: int | None = None
    site: str | None = None
    drop: Dropping = field(default_factory=Dropping)
    stats: str | None = None

    def of(self, acts: Activations) -> tuple[str, int]:
        """Site and layer. Raises UsageError."""
        site = acts.parts[0].site(self.site)
        return site, acts.parts[0].layer(site, self.layer)

    def stats_request(self, acts: Activations) -> StatsRequest:
        """The same for the pass."""
        site, layer = self.of(acts)
        return StatsRequest((layer,), (site,), self.drop)


@dataclass(frozen=True)
class FitReport:
    """Attributes:
    whitening: what was fitted. check: of the rows that it was fitted on. output: where it is stored, or None.
    """

    whitening: Whitening
    check: WhiteningCheck
    output: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain values: settings, counts and errors."""
        own = self.whitening
        counts = {"n_tokens": own.n_samples, "width": own.width, "kept": own.kept, "rank": own.rank}
        shrinkage = {"shrinkage_amount": own.shrinkage_amount}
        return asdict(own.settings) | counts | shrinkage | {"check": self.check.to_json(), "output": self.output}

    def lines(self) -> list[str]:
        """For people."""
        own = self.whitening
        shrunk = f", shrinkage {own.shrinkage_amount:.3g}" * (own.settings.shrinkage != "none")
        shape = f"{own.width} values to {own.kept}, rank {own.rank}"
        return [
            f"{own.settings.method} of {own.n_samples} tokens: {shape}{shrunk}",
            f"on the same tokens max |WSW^T - I| is {self.check.max_error:.2g}",
            *([f"output: {self.output}"] if self.output else []),
        ]


def whiten_fit(
    request: LayerRequest, settings: WhiteningSettings, options: PassOptions, output: str | None = None
) -> FitReport:
    """Fits a whitening and stores it at `output`, as a safetensors file.

    Raises UsageError for what is not stored or cannot be, RunError naming a damaged file.
    """
    moments = moments_of_layer(request, options)
    whitening = Whitening.fit(moments, settings)
    if output is not None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "whitening.safetensors")
            save_whitening(whitening, str(path))
            create_result(output, path)
    if request.stats is None:
        acts = open_activations(request.url)
        remove_partials(acts, request.stats_request(acts), options)
    return FitReport(whitening, whitening.check(moments), output)


def moments_of_layer(request: LayerRequest, options: PassOptions) -> Moments:
    """From the file of statistics, or by a pass over the shards: the same bits. Partials stay stored."""
    if request.stats is None:
        acts = open_activations(request.url)
        ((_, _, moments),) = layer_moments(acts, request.stats_request(acts), options)
        return as_stored(moments)
    if not request.stats.endswith(".safetensors"):
        return read_stats(request.stats, request.site, request.layer)
    saved = IncrementalWhitener.load(request.stats).moments
    if saved is None:
        raise UsageError(f"{request.stats}: it has seen no batch yet")
    return saved
