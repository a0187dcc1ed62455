"""Progress of a pass: a bar on a terminal, a line every ten seconds elsewhere."""

import sys
import threading
import time
from collections.abc import Callable

from tqdm import tqdm

from core.run.progress import format_bytes

_LINE_EVERY_S = 10.0
_BAR_EVERY_S = 0.5


class PassProgress:
    """Counts parts and the bytes that were read of them. Parts found stored cost no time, so the rate leaves them out.

    Args:
      n_parts, n_bytes: of all parts.
    """

    def __init__(self, name: str, n_parts: int, n_bytes: int, log: Callable[[str], None]) -> None:
        self._name, self._n_parts, self._n_bytes, self._log = name, n_parts, n_bytes, log
        self._started = time.monotonic()
        self._finished = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="pass progress", daemon=True)
        self.parts = self.bytes = self.stored_parts = self.stored_bytes = 0

    def __enter__(self) -> "PassProgress":
        self._ticker.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._finished.set()
        self._ticker.join()

    def add(self, n_parts: int, n_bytes: int, *, was_stored: bool) -> None:
        """Counts parts that are done."""
        self.parts += n_parts
        self.bytes += n_bytes
        if was_stored:
            self.stored_parts += n_parts
            self.stored_bytes += n_bytes

    def line(self) -> str:
        """`stats: 12/48 parts, 3.1 of 12.4 GiB, 210.0 MiB/s, 44 s left`."""
        found = f" ({self.stored_parts} found stored)" * bool(self.stored_parts)
        amount = f"{format_bytes(self.bytes)} of {format_bytes(self._n_bytes)}"
        return f"{self._name}: {self.parts}/{self._n_parts} parts{found}, {amount}, {self._pace()}"

    def _pace(self) -> str:
        rate = (self.bytes - self.stored_bytes) / max(time.monotonic() - self._started, 1e-9)
        if not rate:
            return "no estimate yet"
        return f"{format_bytes(rate)}/s, {(self._n_bytes - self.bytes) / rate:.0f} s left"

    def _tick(self) -> None:
        if sys.stderr.isatty():
            self._show_bar()
            return
        while not self._finished.wait(_LINE_EVERY_S):
            self._log(self.line())

    def _show_bar(self) -> None:
        with tqdm(total=self._n_parts, unit="part", desc=self._name, dynamic_ncols=True) as bar:
            is_finished = False
            while not is_finished:
                is_finished = self._finished.wait(_BAR_EVERY_S)
                bar.set_postfix_str(self._pace(), refresh=False)
                bar.update(self.parts - bar.n)
                bar.refresh()
