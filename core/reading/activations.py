"""The activations of a run, opened for reading."""

from dataclasses import dataclass
from typing import Any

from core.base.errors import UsageError
from core.reading.catalog import Catalog, read_catalog, require_alike
from core.reading.shard_part import ShardPart


def open_activations(url: str) -> "Activations":
    """Opens the output of a run: a local path, `gs://` or any fsspec URL, or one worker's folder in it.

    Reads the identity and the commit records, no activations. An unfinished run has the windows that are committed now.
    Raises UsageError when no window is committed there, RunError naming a record that is damaged.
    """
    catalog = read_catalog(url)
    if not catalog.parts:
        raise UsageError(f"{url}: no window with a sample is committed there yet")
    require_alike(catalog.parts)
    return Activations(catalog)


@dataclass(frozen=True)
class Activations:
    """The committed activations of a run."""

    catalog: Catalog

    @property
    def url(self) -> str:
        """Where they are."""
        return self.catalog.url

    @property
    def identity(self) -> dict[str, Any]:
        """What decides their bytes: the content of `run.json`."""
        return self.catalog.identity

    @property
    def parts(self) -> tuple[ShardPart, ...]:
        """The parts of all committed windows, in order: together they hold every stored sample once."""
        return self.catalog.parts

    @property
    def folders(self) -> tuple[str, ...]:
        """The workers' folders, or those of the dataset shards."""
        return tuple(dict.fromkeys(part.folder for part in self.parts))

    @property
    def sites(self) -> tuple[str, ...]:
        """The stored sites."""
        return tuple(self.parts[0].sites)

    def layers_of(self, site: str | None = None) -> tuple[int, ...]:
        """The stored layers of a site, in their stored order; site may be left out where there is one."""
        return self.parts[0].sites[self.parts[0].site(site)].layers

    @property
    def layers(self) -> tuple[int, ...]:
        """Every stored layer of any site, in order."""
        return tuple(sorted({layer for site in self.sites for layer in self.layers_of(site)}))

    @property
    def dtype(self) -> str:
        """Of the stored values: `bfloat16`, or `int8` for codes."""
        return self.parts[0].dtype

    def width(self, site: str | None = None) -> int:
        """Values of a restored row: the site's width, or the projection's."""
        return self.parts[0].sites[self.parts[0].site(site)].width

    def __len__(self) -> int:
        """Stored samples."""
        return sum(part.n_samples for part in self.parts)

    @property
    def n_tokens(self) -> int:
        """Stored tokens; with pools: tokens that were pooled."""
        return sum(part.n_tokens for part in self.parts)
