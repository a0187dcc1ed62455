"""`--auto_find_batch_size`: the compiler's memory analysis first, then a trial, halved until it fits."""

import os
from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np
from absl import logging
from jaxtyping import Int32

from core.base.errors import RunError
from core.in_memory.capturer import Capturer
from core.jax_utils import ExtractionStep
from core.run.progress import format_bytes
from core.step.device_mesh import device_bytes
from core.step.layout import default_row_lengths
from parquet_cache.options import MOST_TEXTS

# A larger batch is not faster: a step of so many tokens fills every device.
_MOST_TOKENS = 1 << 15
# Of the memory that is free: the rest is for what the analysis does not see.
_USED_SHARE = 0.8
# A batch is held twice on the host, since one is written while the next is computed.
_HOST_COPIES = 3

Texts = Sequence[Int32[np.ndarray, "_"]]


def find_batch_size(capturer: Capturer, lengths: Int32[np.ndarray, "rows"], longest: Texts, most: int | None) -> int:
    """The texts of a batch: a power of two, or `most` where that is what fits.

    Args:
      lengths: tokens of all texts that are exported.
      longest: token ids of some of the longest texts, which a trial computes, again and again until there are enough.
      most: never more than this.

    Raises RunError where not even one text fits.
    """
    length = int(lengths.max())
    ceiling = min(most or MOST_TEXTS, MOST_TEXTS, _power_of_two(2 * len(lengths) - 1), max(1, _MOST_TOKENS // length))
    ceiling = min(ceiling, max(1, _host_limit(capturer, length)))
    size = _by_analysis(capturer, length, ceiling)
    while not _fits(capturer, longest, size):
        if size == 1:
            raise RunError(f"--auto_find_batch_size: one text of {length} tokens does not fit in memory: lower --n_pos")
        logging.info("a batch of %d texts does not fit in memory: trying %d", size, size // 2)
        size //= 2
    logging.info("batch size %d: tried with the longest texts, of %d tokens", size, length)
    return size


def with_batch_size(capturer: Capturer, n_texts: int) -> Capturer:
    """The same model, computing `n_texts` texts in a step over all devices."""
    multiple = capturer.engine.row_multiple(capturer.shape, capturer.request)
    return replace(capturer, options=replace(capturer.options, batch_size=-(-n_texts // multiple)))


def _by_analysis(capturer: Capturer, length: int, ceiling: int) -> int:
    """The largest size up to `ceiling` that fits by the analysis; `ceiling` where the backend has none."""
    if not isinstance(capturer.step, ExtractionStep):
        logging.info("this backend has no memory analysis: trying %d texts", ceiling)
        return ceiling
    multiple = capturer.engine.row_multiple(capturer.shape, capturer.request)
    row = next(one for one in default_row_lengths(length) if one >= length)
    one, two = (capturer.step.memory_bytes(n * multiple, row) for n in (1, 2))
    lanes = capturer.engine.lanes(capturer.shape, capturer.request)
    per_row, free = max(1, two - one) * lanes, int(free_bytes() * _USED_SHARE)
    n_rows = 1 + max(0, (free - one * lanes) // per_row)
    fitting = min(ceiling, _power_of_two(int(n_rows) * multiple))
    sizes = format_bytes(per_row // multiple), format_bytes(free)
    logging.info("memory analysis: %s a text of %d tokens, %s usable: %d texts", sizes[0], length, sizes[1], fitting)
    return fitting


def free_bytes() -> int:
    """What is free on a device; on the CPU, in the host."""
    total = device_bytes()
    if total is None:
        return host_free_bytes()
    return total - (jax.local_devices()[0].memory_stats() or {}).get("bytes_in_use", 0)


def host_free_bytes() -> int:
    """Memory that this process may still take, by Linux's count and that of its control group."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max") as most, open("/sys/fs/cgroup/memory.current") as used:
            return min(available, int(most.read()) - int(used.read()))
    except (OSError, ValueError):  # no such group, or "max"
        return available


def _host_limit(capturer: Capturer, length: int) -> int:
    """Texts whose stored arrays fit on the host."""
    values = sum(len(layers) * capturer.shape.site_widths[site] for site, layers in capturer.layers.items())
    of_text = _HOST_COPIES * length * values * np.dtype(capturer.options.dtype).itemsize
    return int(host_free_bytes() * _USED_SHARE) // of_text


def _fits(capturer: Capturer, longest: Texts, n_texts: int) -> bool:
    texts = [longest[i % len(longest)] for i in range(n_texts)]
    try:
        with_batch_size(capturer, n_texts)(texts)
    except (MemoryError, RuntimeError) as error:
        # XLA's and torch's own errors are RuntimeErrors; torch may not be installed.
        is_torchs = type(error).__name__ == "OutOfMemoryError"
        if isinstance(error, MemoryError) or is_torchs or "RESOURCE_EXHAUSTED" in str(error):
            return False
        raise
    return True


def _power_of_two(most: int) -> int:
    """The largest that is not above `most`."""
    return 1 << max(1, most).bit_length() - 1
