"""The reader of plain pickles: what pickle writes, and what an attacker would."""

import io
import os
import pickle
import pickletools
import struct
import time
import tracemalloc

import numpy as np
import pytest

from analysis.mean_vectors.stored.plain_pickle import load_plain

PROTOCOL = b"\x80\x04"


def text(value: str) -> bytes:
    data = value.encode()
    return b"\x8c" + bytes([len(data)]) + data


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_lists_of_texts_are_read_as_pickle_reads_them(protocol):
    shared = "twice"
    value = ["", "one", "two\nlines", "grüße 😀", shared, shared, "x" * 70_000, *map(str, range(3000))]
    assert load_plain(pickle.dumps(value, protocol)) == value
    rows = [{"text": "a", "n": 1, "f": 1.5, "b": [True, None, (1, -2)]}, {}]
    assert load_plain(pickle.dumps(rows, protocol)) == rows


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["<f4", "<f8", "<i8"])
def test_arrays_of_numbers_are_read_as_pickle_reads_them(protocol, dtype):
    array = np.arange(12).reshape(3, 4).astype(dtype)
    stored = pickle.dumps({"a": array, "empty": array[:0]}, protocol)
    if protocol == 2:
        with pytest.raises(ValueError):  # its bytes are a text that a function of Python 2 would encode
            load_plain(stored)
        return
    found = load_plain(stored)
    np.testing.assert_array_equal(found["a"], array)
    assert (found["a"].dtype, found["empty"].shape) == (array.dtype, (0, 4))


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_nothing_that_a_pickle_names_is_called(tmp_path):
    marker = tmp_path / "called"
    for value in ([Call(os.mkdir, str(marker))], [Call(eval, f"open({str(marker)!r}, 'w')")], [np.float32]):
        with pytest.raises(ValueError, match=r"it holds \w+\.\w+: only texts"):
            load_plain(pickle.dumps(value))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("empty", b""),
        ("cut off", pickle.dumps(["text"] * 10)[:-3]),
        ("no pickle", b"\xff\xfe"),
        ("text of 2^62 bytes", PROTOCOL + b"\x8d" + struct.pack("<Q", 1 << 62) + b"."),
        ("bytes of 2^62", PROTOCOL + b"\x8e" + struct.pack("<Q", 1 << 62) + b"."),
        ("frame of 2^62 bytes", PROTOCOL + b"\x95" + struct.pack("<Q", 1 << 62) + b"."),
        ("memo that is not there", PROTOCOL + b"h\x05."),
        ("dict with a tuple as key", PROTOCOL + b"}))Ns."),
        ("append to a text", PROTOCOL + text("a") + text("b") + b"a."),
        ("no mark", PROTOCOL + b"]e."),
        ("less than nothing", PROTOCOL + b"\x87."),
        ("takes what is below a mark", PROTOCOL + b"]N(a."),
        ("two values", PROTOCOL + b"NN."),
        ("an open mark", PROTOCOL + b"N(."),
        ("persistent id", PROTOCOL + b"NQ."),
        ("extension", PROTOCOL + b"\x82\x01."),
        ("set", pickle.dumps({1, 2})),
        ("object array", pickle.dumps(np.array([None, 1], object), 4)),
        ("structured array", pickle.dumps(np.zeros(2, "f4,i4"), 4)),
        ("text array", pickle.dumps(np.array(["a"]), 4)),
        ("big-endian array", pickle.dumps(np.zeros(2, ">f4"), 4)),
        ("Fortran order", pickle.dumps(np.zeros((2, 3), order="F"), 4)),
    ],
)
def test_what_is_no_plain_data_is_one_line(name, data):
    with pytest.raises(ValueError) as caught:
        load_plain(data)
    assert "\n" not in str(caught.value)


def test_an_array_larger_than_its_bytes_is_refused():
    stored = pickle.dumps(np.zeros((2, 3), np.float32), 4)
    forged = stored.replace(b"K\x02K\x03\x86", b"K\x02J\xff\xff\xff\x7f\x86")
    assert forged != stored
    with pytest.raises(ValueError):
        load_plain(forged)


def test_memory_is_bounded_by_the_file_whatever_it_declares():
    """A memo place of 2^31 is 2 GB to pickle; 60 doublings of a tuple are for ever to hash or to walk."""
    memo = PROTOCOL + b"Nr" + struct.pack("<I", 0x7FFFFFFF) + b"."
    doubled = PROTOCOL + b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60)) + b"."
    tracemalloc.start()
    start = time.process_time()
    assert load_plain(memo) is None
    assert isinstance(load_plain(doubled), tuple)
    with pytest.raises(ValueError, match="keys that are not texts"):
        load_plain(PROTOCOL + b"}" + doubled[2:-1] + b"Ns.")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert time.process_time() - start < 1


def test_too_many_instructions_are_refused(monkeypatch):
    from analysis.mean_vectors.stored import plain_pickle

    monkeypatch.setattr(plain_pickle, "_MOST_OPCODES", 100)
    assert len(load_plain(pickle.dumps(["a"] * 40))) == 40
    with pytest.raises(ValueError, match="more than 100 instructions"):
        load_plain(pickle.dumps([str(i) for i in range(100)]))


def test_every_instruction_of_pickle_is_known_or_refused():
    """None of them ends in another error than ValueError, alone on an empty stack."""
    for opcode in pickletools.opcodes:
        argument = b"0\n0\n" if opcode.arg is not None else b""
        data = io.BytesIO()
        data.write(opcode.code.encode("latin-1") + argument + bytes(8) + b".")
        try:
            load_plain(data.getvalue())
        except ValueError:
            continue
