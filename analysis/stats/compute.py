"""Moments of layers of an output, a few layers at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from absl import logging

from analysis.moments import Moments
from analysis.passes import PartialStore, run_pass
from analysis.stats.moments_pass import MomentsPass
from analysis.stats.pass_options import PassOptions
from core.base.errors import RunError, UsageError
from core.reading import Activations, ShardPart
from core.reading.dropping import Dropping

GROUP_BYTES = 256 << 20
"""The scatter matrices of the layers of one pass: 2 layers of width 4096, 6 of 2304, 41 of 896."""
_SHARE_OF_INPUT = 4
_LARGEST_BLOCK = 64


@dataclass(frozen=True)
class StatsRequest:
    """What statistics are made of.

    Attributes:
      layers: None: all that are stored. sites: None: all that are stored.
    """

    layers: tuple[int, ...] | None = None
    sites: tuple[str, ...] | None = None
    drop: Dropping = field(default_factory=Dropping)

    def wanted(self, acts: Activations) -> list[tuple[str, tuple[int, ...]]]:
        """Each site with its layers. Raises UsageError for what is not stored."""
        first = acts.parts[0]
        sites = acts.sites if self.sites is None else tuple(first.site(site) for site in self.sites)
        if first.pools and (self.drop.token_ids or self.drop.positions):
            raise UsageError(f"{acts.url}: its rows are pools ({', '.join(first.pools)}), no tokens: use --drop none")
        if self.layers is not None:
            missing = [layer for layer in self.layers if layer not in {n for s in sites for n in acts.layers_of(s)}]
            if missing:
                first.layers(sites[0], missing)
        found = ((site, acts.layers_of(site)) for site in sites)
        if self.layers is None:
            return list(found)
        return [(site, kept) for site, stored in found if (kept := tuple(n for n in self.layers if n in stored))]


def layer_moments(acts: Activations, request: StatsRequest, options: PassOptions) -> Iterator[tuple[str, int, Moments]]:
    """Site, layer and moments of all tokens that count, in order; the layers of one group are in memory.

    Partials stay stored until `remove_partials`. Raises RunError naming a damaged file, or if no token counts.
    """
    groups, runner, partials = groups_of(acts, request), options.choice(), options.store(acts.url)
    for number, group in enumerate(groups, 1):
        if len(groups) > 1:
            layers = ", ".join(map(str, group.layers))
            logging.info("stats: pass %d of %d: %s, layers %s", number, len(groups), group.site, layers)
        found = run_pass(
            group,
            acts.parts,
            runner=runner,
            partials=partials,
            block=block_size(acts.parts, group, acts.width(group.site)),
        )
        for layer in group.layers:
            if found[layer].count < 2:
                raise RunError(f"{acts.url}: {found[layer].count} tokens are left: statistics need at least 2")
            yield group.site, layer, found.pop(layer)


def groups_of(acts: Activations, request: StatsRequest) -> list[MomentsPass]:
    """A pass for as many layers of a site as fit `GROUP_BYTES`."""
    passes = []
    for site, layers in request.wanted(acts):
        size = max(1, GROUP_BYTES // _moments_bytes(acts.width(site)))
        passes += [MomentsPass(site, layers[i : i + size], request.drop) for i in range(0, len(layers), size)]
    return passes


def block_size(parts: Sequence[ShardPart], group: MomentsPass, width: int) -> int:
    """Parts to a partial: as few as make it at most a quarter of what is read, a power of two, at most 64.

    It depends on nothing that may differ between an interrupted run and the next.
    """
    read = sum(group.facts(part).n_bytes for part in parts) / len(parts)
    wanted = _SHARE_OF_INPUT * _moments_bytes(width) * len(group.layers)
    size = 1
    while size * read < wanted and size < _LARGEST_BLOCK:
        size *= 2
    return size


def remove_partials(acts: Activations, request: StatsRequest, options: PassOptions) -> None:
    """Removes the stored partials, unless they are to be kept; to be called once the result is stored."""
    store: PartialStore | None = options.store(acts.url)
    if store is not None and not options.keep_partials:
        for group in groups_of(acts, request):
            store.remove(group)


def _moments_bytes(width: int) -> int:
    return 8 * width * width
