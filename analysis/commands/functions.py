"""The commands as functions with plain arguments, such as `analyze_activations.stats(...)` in a notebook.

`**passes` are the fields of `analysis.stats.PassOptions`: runner, workers, ray_address, partials, keep_partials.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from core.base.arguments import checked_arguments, path_text
from core.base.errors import UsageError

if TYPE_CHECKING:
    from analysis.stats import StatsReport
    from analysis.verification.report import VerificationReport
    from analysis.whitened import ApplyReport, CheckReport, FitReport, LayerRequest
    from core.reading.dropping import Rule


def verify(dir: str, *, allow_unfinished: bool = False, **passes: Any) -> "VerificationReport":
    """Checks every committed shard of an output: `report.ok`, `report.problems`, and counts.

    allow_unfinished: an unfinished run is not a problem. By default two threads read, and no partials are stored.
    Raises UsageError where there is no output.
    """
    from analysis.stats import PassOptions
    from analysis.verification import verify as verification

    url, options = path_text(dir, "dir"), PassOptions(**checked_arguments(PassOptions, passes))
    runner = options.choice(verification.DEFAULT_RUNNER)
    partials = None if options.partials is None else options.store(url)
    return verification.verify(url, allow_unfinished=allow_unfinished, runner=runner, partials=partials)


def stats(
    dir: str,
    *,
    layer: int | Sequence[int] | None = None,
    site: str | Sequence[str] | None = None,
    drop: "Rule | Iterable[Rule] | None" = None,
    tokenizer: str | None = None,
    output: str | None = None,
    **passes: Any,
) -> "StatsReport":
    """Mean, covariance, norms, extremes, largest tokens and outlier dimensions of stored tokens, by site and layer.

    Args:
      layer, site: one or several; None: all that are stored.
      drop: see --drop. tokenizer: a model, for kinds of tokens.
      output: a file for the arrays, `stats.npz`; created once.

    Raises UsageError for what is not stored, RunError naming a damaged file.
    """
    from analysis.stats import PassOptions, StatsRequest, drop_rules
    from analysis.stats import stats as compute

    layers = (layer,) if isinstance(layer, int) else None if layer is None else tuple(layer)
    sites = (site,) if isinstance(site, str) else None if site is None else tuple(site)
    request = StatsRequest(layers, sites, drop_rules(drop, tokenizer))
    options = PassOptions(**checked_arguments(PassOptions, passes))
    return compute(path_text(dir, "dir"), request, options, None if output is None else path_text(output, "output"))


def whiten_fit(
    dir: str,
    layer: int | None = None,
    *,
    site: str | None = None,
    method: str = "zca",
    shrinkage: str = "none",
    components: int | None = None,
    below: str = "drop",
    drop: "Rule | Iterable[Rule] | None" = None,
    tokenizer: str | None = None,
    stats: str | None = None,
    output: str | None = None,
    **passes: Any,
) -> "FitReport":
    """Fits a whitening of one layer: `report.whitening`, and a safetensors file at `output`.

    method, shrinkage, components, below: see `analysis.whitening.WhiteningSettings`.
    stats: what `stats` or `IncrementalWhitener.save` wrote, in place of the shards; `drop` is not used then.

    Raises UsageError for what is not stored or cannot be, RunError naming a damaged file.
    """
    from analysis.stats import PassOptions
    from analysis.whitened import whiten_fit as fit
    from analysis.whitening import WhiteningSettings

    request = _layer(dir, layer, site, drop, tokenizer, stats)
    settings = WhiteningSettings(method, shrinkage, below=below, n_components=components)
    options = PassOptions(**checked_arguments(PassOptions, passes))
    return fit(request, settings, options, None if output is None else path_text(output, "output"))


def whiten_apply(
    dir: str,
    whitening: str,
    output: str,
    layer: int | None = None,
    *,
    site: str | None = None,
    to: str = "npz",
    chunk_samples: int = 1000,
    dtype: str = "float16",
    drop: "Rule | Iterable[Rule] | None" = None,
    tokenizer: str | None = None,
    **passes: Any,
) -> "ApplyReport":
    """Writes one layer, whitened, as chunks of padded samples with masks, and metadata.json.

    Raises UsageError for what is not stored or does not fit, RunError naming a damaged file.
    """
    from analysis.stats import PassOptions
    from analysis.whitened import ApplyRequest
    from analysis.whitened import whiten_apply as apply

    own = path_text(whitening, "whitening"), path_text(output, "output").rstrip("/")
    request = ApplyRequest(_layer(dir, layer, site, drop, tokenizer, None), *own, to, chunk_samples, dtype)
    return apply(request, PassOptions(**checked_arguments(PassOptions, passes)))


def whiten_check(
    dir: str,
    whitening: str,
    layer: int | None = None,
    *,
    site: str | None = None,
    tolerance: float = 1e-5,
    drop: "Rule | Iterable[Rule] | None" = None,
    tokenizer: str | None = None,
    stats: str | None = None,
    **passes: Any,
) -> "CheckReport":
    """Compares the covariance of the whitened tokens with the identity: `report.ok`, `report.check.max_error`.

    Raises UsageError for what is not stored or does not fit, RunError naming a damaged file.
    """
    from analysis.stats import PassOptions
    from analysis.whitened import whiten_check as check

    request, options = _layer(dir, layer, site, drop, tokenizer, stats), checked_arguments(PassOptions, passes)
    return check(request, path_text(whitening, "whitening"), PassOptions(**options), tolerance)


def _layer(
    dir: str,
    layer: int | None,
    site: str | None,
    drop: "Rule | Iterable[Rule] | None",
    tokenizer: str | None,
    stats: str | None,
) -> "LayerRequest":
    from analysis.stats import drop_rules
    from analysis.whitened import LayerRequest

    if stats is not None and (drop, tokenizer) != (None, None):
        raise UsageError(f"drop, tokenizer: the tokens that count are those of {stats}: leave them out")
    stored = None if stats is None else path_text(stats, "stats")
    return LayerRequest(path_text(dir, "dir"), layer, site, drop_rules(drop, tokenizer), stored)
