"""A checked run: its values, and what follows from them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from core.base.dtypes import DTYPES
from core.base.errors import RunError
from core.commit.identity import RunIdentity, StreamIdentity
from core.dataset_utils import (
    BadRecord,
    format_bad,
    read_stream,
)
from core.hosts.pod_slice import SINGLE_HOST, Hosts
from core.reduce.reductions import VALUES, Pool, Reduction, StoredArray
from core.run.config import RunConfig
from core.samples.prompts import Tokenizer
from core.samples.selection import NORM_SITES, Selection, TokenFacts
from core.samples.window_parts import PartOfWindow, parts_of_window
from core.samples.windows import StreamPlace, TokenizedSample, Window, cut_windows
from core.step.backend import Backend, StepRequest, batch_shape
from core.step.capture import site_bytes
from core.step.layout import BatchShape, StepLayout, lay_out_part
from core.step.model_shape import ModelShape
from qwen2_jax import Capture


@dataclass(frozen=True)
class Job:
    """A checked run that can start.

    Attributes:
      stream_path: the stream, in the spelling that exists, or the folder of a dataset shard.
      folder: of its activations in the output: the worker's folder, or that of the dataset shard.
      compute_dtype: resolved for this machine.
      facts: the tokenizer's facts about token ids, where the selection needs them.
      reduction: how the selected tokens are reduced; None: not at all.
      hosts: the hosts that share the windows.
    """

    config: RunConfig
    stream_path: str
    folder: str
    backend: Backend
    model: ModelShape
    capture: Capture
    compute_dtype: str
    identity: RunIdentity
    stream: StreamIdentity
    tokenizer: Tokenizer
    selection: Selection | None = None
    facts: TokenFacts | None = None
    reduction: Reduction | None = None
    hosts: Hosts = SINGLE_HOST

    @cached_property
    def layers(self) -> dict[str, tuple[int, ...]]:
        """By site, the layer numbers under which it is stored."""
        return {site: self.capture.layers_of(site, self.model.n_layers) for site in self.capture.sites}

    @cached_property
    def stored(self) -> dict[str, dict[str, StoredArray]]:
        """By site and name, the stored arrays."""
        reduction, dtype = self.reduction or Reduction(), DTYPES[self.config.dtype]
        return {site: reduction.arrays(self.model.site_widths[site], dtype) for site in self.capture.sites}

    @cached_property
    def stored_dtype(self) -> str:
        """The dtype of stored activations: of values, or of codes."""
        return next(iter(self.stored.values()))[VALUES].dtype.name

    @property
    def pools(self) -> tuple[Pool, ...]:
        """The vectors that are stored for each sample; empty: one for each token."""
        return () if self.reduction is None else self.reduction.pools

    @cached_property
    def bytes_per_token(self) -> dict[str, int]:
        """By site, the bytes of one token in the stored dtype before it is reduced: every layer, uncompressed."""
        return site_bytes(self.capture, self.model, self.config.dtype)

    @property
    def keeps_local_copy(self) -> bool:
        """Whether all stored files also stay on this machine's disk."""
        return self.config.local_copy_stays and (self.identity.parts == 1 or not self.config.uploads)

    @cached_property
    def bytes_per_row(self) -> dict[str, int]:
        """By site, the stored bytes of one token, or of one pool of a sample: every layer, before compression."""
        return {
            site: len(self.layers[site]) * sum(array.row_bytes for array in arrays.values())
            for site, arrays in self.stored.items()
        }

    @cached_property
    def step_request(self) -> StepRequest:
        """What the backend must compute."""
        return step_request(self.config, self.capture, self.compute_dtype, self.selection, self.reduction)

    @cached_property
    def batch_shape(self) -> BatchShape:
        """The shape of steps, into which each host lays its samples."""
        config = self.config
        return batch_shape(
            self.backend,
            self.model,
            self.step_request,
            batch_size=config.batch_size,
            pack=config.pack,
            longest=config.max_seq_length,
        )

    def items(self, start: StreamPlace | None = None) -> Iterator[TokenizedSample | BadRecord]:
        """The samples and bad records of the stream from `start` on; see `select`."""
        records = read_stream(
            self.stream_path,
            machine_id=self.config.machine_id,
            total_machines=self.config.total_machines,
            max_tasks=self.stream.max_tasks,
            start_position=start.position if start else 0,
        )
        items = self.tokenizer.samples(records, start.sample_idx if start else 0)
        return items if self.selection is None and not self.pools else map(self.select, items)

    def select(self, item: TokenizedSample | BadRecord) -> TokenizedSample | BadRecord:
        """A sample with the selection as far as it is known before the forward pass; a bad record unchanged."""
        if isinstance(item, BadRecord):
            return item
        item = replace(item, n_pools=len(self.pools))
        if self.selection is None:
            return item
        reasons = self.selection.before(item.token_ids, item.sample_idx, self.facts)
        most_stored = self.selection.most_stored(reasons) if self.selection.needs_norms else None
        return replace(item, reasons=reasons, most_stored=most_stored)

    def windows(
        self, *, start: StreamPlace | None = None, first_index: int = 1, bad_before: int = 0
    ) -> Iterator[Window]:
        """The windows of the stream from `start` on; raises RunError at one bad record too many."""
        return cut_windows(
            self._limit_bad_records(self.items(start), bad_before),
            bytes_per_row=max(self.bytes_per_row.values()),
            # Every part has its own files, each of which should reach the requested size.
            shard_bytes=self.config.shard_bytes * self.identity.parts,
            first_index=first_index,
        )

    def parts_of(self, window: Window) -> Iterator[PartOfWindow]:
        """The parts of a window that this host computes, turn by turn."""
        return parts_of_window(window, n_parts=self.identity.parts, host=self.hosts.host_id, n_hosts=self.hosts.count)

    def layouts_of(self, part: PartOfWindow) -> tuple[StepLayout, ...]:
        """How the samples of a part are laid out in steps."""
        return lay_out_part(part.own.lengths, self.batch_shape)

    def _limit_bad_records(
        self, items: Iterator[TokenizedSample | BadRecord], n_bad: int
    ) -> Iterator[TokenizedSample | BadRecord]:
        n_samples = 0
        for item in items:
            if isinstance(item, BadRecord):
                n_bad += 1
                if n_bad > self.config.max_bad_records:
                    raise RunError(
                        f"{format_bad(self.stream_path, item)} "
                        f"(fix the line, or set bad ones aside with --max_bad_records)"
                    )
            else:
                n_samples += 1
            yield item
        config = self.config
        is_share = config.total_machines > 1
        # A stream may have fewer lines than machines: a machine without lines is not an error.
        if not n_samples and (n_bad or not is_share):
            share = f" for machine {config.machine_id} of {config.total_machines}" if is_share else ""
            raise RunError(f"{self.stream_path}: no usable sample{share} ({n_bad} bad records)")


def step_request(
    config: RunConfig,
    capture: Capture,
    compute_dtype: str,
    selection: Selection | None = None,
    reduction: Reduction | None = None,
) -> StepRequest:
    """What the backend must compute in a run with these flags."""
    norm_sites = NORM_SITES if selection is not None and selection.needs_norms else ()
    return StepRequest(
        capture,
        # Rounding to the stored dtype comes after a reduction.
        config.dtype if reduction is None else compute_dtype,
        compute_dtype,
        tuple(site for site in capture.sites if site in norm_sites),
    )
