"""The activations of a window on the host: they arrive step by step, and leave as files.

Axis letters: L layers stored for a site, N stored rows of the window, B rows of a step, T tokens of a row, U what a row
of a step gives, W values of a stored row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float32, Shaped

from core.reduce.losses import LossSum
from core.reduce.reductions import StoredArray, array_name, site_and_array
from core.samples.selection import Selection
from core.samples.windows import TokenizedSample, Window
from core.shards.formats import ShardContent
from core.step.fetching import Fetch
from core.step.layout import StepLayout, sample_spans


@dataclass
class WindowActivations:
    """What is stored of a window, or of a part of it; sample s owns rows window.offsets[s:s+2] of each array.

    Attributes:
      window: with the part's samples alone.
      layers: by site, the layer numbers under which its arrays are stored.
      arrays: by `core.reduce.reductions.array_name`; N the rows that are stored, until `finish` at most.
      samples: those of `window`, replaced where norms decide what is stored of them.
      steps_left: how many have not arrived.
      part: the number of the part, where the window has several.
      losses: of rows of which less is stored.
    """

    window: Window
    layers: dict[str, tuple[int, ...]]
    arrays: dict[str, Shaped[np.ndarray, "L N _"]]
    samples: list[TokenizedSample]
    steps_left: int
    part: int | None = None
    losses: LossSum = field(default_factory=LossSum)

    @classmethod
    def allocate(
        cls,
        window: Window,
        layers: dict[str, tuple[int, ...]],
        stored: Mapping[str, Mapping[str, StoredArray]],
        n_steps: int,
        part: int | None = None,
    ) -> "WindowActivations":
        """Room for every stored array. stored: by site and name."""
        arrays = {
            array_name(site, name): np.empty((len(layers[site]), window.n_rows, array.width), array.dtype)
            for site, of_site in stored.items()
            for name, array in of_site.items()
        }
        return cls(window, layers, arrays, list(window.samples), n_steps, part)

    def scatter(self, fetch: Fetch, arrays: Mapping[str, Shaped[np.ndarray, "L B U _"]]) -> None:
        """Copies the samples of one step to their places."""
        offsets = self.window.offsets
        for name, array in self.arrays.items():
            for sample, (row, places) in fetch.samples.items():
                values = arrays[name][:, row, places]
                array[:, offsets[sample] : offsets[sample] + values.shape[1]] = values
        self.steps_left -= 1

    def select(
        self, layout: StepLayout, norms: Mapping[str, Float32[np.ndarray, "L B T"]], selection: Selection
    ) -> None:
        """Decides by their norms which tokens of a step's samples are stored."""
        stacked = np.concatenate(list(norms.values()))
        for row, index, start, stop in sample_spans(layout, self.window.lengths):
            sample = self.samples[index]
            assert sample.reasons is not None
            reasons = selection.after(sample.reasons, stacked[:, row, start:stop], sample.sample_idx)
            self.samples[index] = replace(sample, reasons=reasons, most_kept=None)

    def finish(self) -> None:
        """Closes the gaps, once all steps have arrived and norms have decided that fewer tokens are stored.

        Each sample's rows are the first ones of the room it had.
        """
        if all(final is first for final, first in zip(self.samples, self.window.samples, strict=True)):
            return
        room, self.window = self.window.offsets, replace(self.window, samples=tuple(self.samples))
        offsets = self.window.offsets
        for name, array in self.arrays.items():
            for sample in range(len(self.samples)):
                # Forward in the array, so that what is overwritten was moved before.
                size = offsets[sample + 1] - offsets[sample]
                array[:, offsets[sample] : offsets[sample + 1]] = array[:, room[sample] : room[sample] + size]
            self.arrays[name] = array[:, : offsets[-1]]

    def content(self, site: str) -> ShardContent:
        """What is written of a site."""
        named = ((site_and_array(name), array) for name, array in self.arrays.items())
        arrays = {name: array for (of_site, name), array in named if of_site == site}
        return ShardContent(site, self.layers[site], arrays, self.window.offsets, self.window.samples)
