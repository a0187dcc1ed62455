"""A sink as pyarrow wants one to write to."""

from core.object_store.sinks import Sink


class ArrowSink:
    """Passes bytes on to `sink`; use as `pyarrow.PythonFile(ArrowSink(sink), mode="w")`."""

    closed = False

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._held: bytearray | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Writes a copy: Arrow uses its buffers again, and sinks may write later."""
        copy = bytes(data)
        if self._held is None:
            self._sink.write(copy)
        else:
            self._held += copy
        return len(copy)

    def hold(self) -> bytearray:
        """Keeps what follows in the returned bytes, in place of the sink."""
        self._held = bytearray()
        return self._held

    def flush(self) -> None:
        """Nothing waits here."""

    def close(self) -> None:
        """The sink stays open."""
