"""The pass that computes the moments of some layers of a site.

Axis letters: k rows of a range, D width of a row.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32

from analysis.moments import Moments, TokenOrigins, merge
from analysis.passes import PartFacts
from core.base.errors import RunError
from core.base.safetensors_file import read_tensors, safetensors_header
from core.reading import PartRows, ShardPart
from core.reading.dropping import Dropping

LayerMoments = dict[int, Moments]
# Rows of one layer in memory at once, as stored.
_SPAN_BYTES = 32 << 20


@dataclass(frozen=True)
class MomentsPass:
    """Moments of every stored token that `drop` leaves, for each of `layers`; float64 throughout."""

    site: str
    layers: tuple[int, ...]
    drop: Dropping

    @property
    def name(self) -> str:
        """See `Pass`."""
        return "stats"

    @property
    def version(self) -> int:
        """See `Pass`."""
        return 1

    @property
    def settings(self) -> Mapping[str, Any]:
        """See `Pass`."""
        return {"site": self.site, "layers": list(self.layers), "drop": asdict(self.drop)}

    def facts(self, part: ShardPart) -> PartFacts:
        """See `Pass`. Nothing but the content of its files decides a part's moments: not where they lie."""
        files = [file for file in part.files if file.site in (None, self.site)]
        name = next(file.name for file in files if file.site == self.site)
        identity = [part.folder, [[file.name, file.bytes, file.crc32c, file.sha256] for file in files]]
        return PartFacts(f"{part.folder}/{name}", sum(file.bytes for file in files), identity)

    def map(self, part: ShardPart) -> LayerMoments:
        """Reads range after range of rows. Raises RunError that names the file, for NaN and infinity too."""
        rows = part.read(self.site, self.layers)
        found = {layer: Moments.empty(rows.form.width) for layer in self.layers}
        for span in rows.spans(_SPAN_BYTES):
            kept, origins = self._tokens(rows, span)
            for layer in self.layers:
                values = rows.rows(layer, *span)
                found[layer] = merge(found[layer], self._moments(part, layer, values[kept], origins))
        return found

    def merge(self, a: LayerMoments, b: LayerMoments) -> LayerMoments:
        """Layer by layer."""
        return {layer: merge(a[layer], b[layer]) for layer in self.layers}

    def finish(self, partial: LayerMoments) -> LayerMoments:
        """The moments of all parts."""
        return partial

    def pack(self, partial: LayerMoments) -> bytes:
        """A safetensors file with arrays such as `14/scatter`."""
        arrays = {name: a for layer in self.layers for name, a in partial[layer].to_arrays(f"{layer}/").items()}
        tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        return b"".join([safetensors_header(tensors, {}), *(tensor.tobytes() for tensor in tensors.values())])

    def unpack(self, data: bytes) -> LayerMoments:
        """The inverse of `pack`."""
        arrays = read_tensors(data)
        return {layer: Moments.from_arrays(arrays, f"{layer}/") for layer in self.layers}

    def _tokens(self, rows: PartRows, span: tuple[int, int]) -> tuple[Bool[np.ndarray, "k"], TokenOrigins]:
        """Which rows of a range count, and where these come from."""
        samples, positions, token_ids = rows.token_index([span])
        kept = self.drop.kept(rows, samples, positions, token_ids)
        kept = np.ones(len(samples), bool) if kept is None else kept
        columns = (rows.sample_idx[samples], positions, token_ids)
        return kept, TokenOrigins(*(column[kept].astype(np.int64) for column in columns))

    def _moments(
        self, part: ShardPart, layer: int, values: Float32[np.ndarray, "k D"], origins: TokenOrigins
    ) -> Moments:
        try:
            return Moments.of(values, origins)
        except RunError as error:
            where = f"{part.root}/{self.facts(part).name}, layer {layer}"
            raise RunError(
                f"{where}: {error}; inspect the run with `python analyze_activations.py verify {part.root}`"
            ) from error
