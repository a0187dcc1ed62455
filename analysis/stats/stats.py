"""The command `stats`: statistics of an output, to a file and as a report."""

from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from analysis.stats.compute import StatsRequest, layer_moments, remove_partials
from analysis.stats.pass_options import PassOptions
from analysis.stats.report import StatsReport, summary_of
from analysis.stats.stats_file import require_own, stats_writer
from core.base.canonical_json import content_hash
from core.reading import Activations, open_activations


def stats(url: str, request: StatsRequest, options: PassOptions, output: str | None = None) -> StatsReport:
    """Statistics of the tokens that count, by site and layer; with `output` also as arrays in a file.

    Raises UsageError for what is not stored, RunError naming a damaged file.
    """
    acts = open_activations(url)
    about = about_of(acts, request)
    if output is not None:
        require_own(output, about)
    summaries: dict[str, dict[int, dict[str, Any]]] = {}
    with nullcontext() if output is None else stats_writer(output, about) as file:
        for site, layer, moments in layer_moments(acts, request, options):
            summaries.setdefault(site, {})[layer] = summary_of(moments.finish())
            if file is not None:
                file.add(site, layer, moments)
            del moments
    remove_partials(acts, request, options)
    return StatsReport(acts.url, asdict(request.drop), output, summaries)


def about_of(acts: Activations, request: StatsRequest) -> dict[str, Any]:
    """What decides the statistics, whatever folder it lies in: the run, the committed files, the rules."""
    files = [[part.folder, [[file.name, file.sha256] for file in part.files]] for part in acts.parts]
    return {"run": content_hash(acts.identity), "files": content_hash(files), "drop": asdict(request.drop)}
