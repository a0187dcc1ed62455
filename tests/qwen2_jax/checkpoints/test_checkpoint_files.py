"""Checkpoint files read by ranges, against the libraries that wrote them; and files that lie."""

import contextlib
import copyreg
import io
import json
import pickle
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from core.base.errors import ModelError
from qwen2_jax.checkpoints.bin_source import bin_index
from qwen2_jax.checkpoints.files import LocalFile
from qwen2_jax.checkpoints.safetensors_source import safetensors_index

TENSORS = {
    "matrix": torch.randn(17, 5),
    "half": torch.randn(3, 4, 2).half(),
    "bf16": torch.randn(9, 2).bfloat16(),
    "double": torch.randn(6).double(),
    "one": torch.ones(1, 1),
    "empty": torch.zeros(0, 4),
}


def as_numpy(tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def assert_same(index, tensors):
    assert index.keys() == tensors.keys()
    for name, tensor in tensors.items():
        rows = len(tensor)
        for start, stop in {(0, rows), (rows // 3, rows // 2), (rows, rows)}:
            found, expected = index[name].read(start, stop), as_numpy(tensor)[start:stop]
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected)


def test_safetensors_rows_are_those_that_were_saved(tmp_path):
    save_file(
        {name: as_numpy(tensor) for name, tensor in TENSORS.items()}, tmp_path / "x.safetensors", {"format": "pt"}
    )
    assert_same(safetensors_index(LocalFile.of(tmp_path / "x.safetensors")), TENSORS)


def edited(edit):
    """A whole safetensors file whose header was edited."""
    data = save({"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 2), np.float16)})
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    changed = json.dumps(header).encode()
    return len(changed).to_bytes(8, "little") + changed + data[8 + length :]


LIES = {
    "empty": b"",
    "a length and nothing else": (10).to_bytes(8, "little"),
    "a header longer than the file": (1 << 40).to_bytes(8, "little") + b"{}",
    "no JSON": (4).to_bytes(8, "little") + b"{{{{",
    "a list": (2).to_bytes(8, "little") + b"[]",
    "a tensor beyond the end": edited(lambda h: h["b"].update(data_offsets=[24, 320], shape=[74, 2])),
    "overlapping tensors": edited(lambda h: h["b"].update(data_offsets=[16, 24])),
    "a gap": edited(lambda h: h["a"].update(data_offsets=[8, 24], shape=[4])),
    "a shape of no integers": edited(lambda h: h["a"].update(shape=[6.0])),
    "a shape that is not its bytes": edited(lambda h: h["a"].update(shape=[7])),
    "a negative shape": edited(lambda h: h["a"].update(shape=[-2, -3])),
    "an unknown type": edited(lambda h: h["a"].update(dtype="F31")),
    "no type": edited(lambda h: h["a"].pop("dtype")),
    "text for a shape": edited(lambda h: h["a"].update(shape="6")),
    "cut": edited(lambda h: None)[:-1],
    "longer than it says": edited(lambda h: None) + b"x",
}


@pytest.mark.parametrize("data", LIES.values(), ids=LIES)
def test_a_safetensors_file_that_lies_is_one_line(data, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match=r"x\.safetensors: not a whole safetensors file \(.+\); download it again$"):
        safetensors_index(LocalFile.of(tmp_path / "x.safetensors"))


def saved(tmp_path, content, **options):
    torch.save(content, tmp_path / "x.bin", **options)
    return LocalFile.of(tmp_path / "x.bin")


def test_bin_rows_are_those_that_were_saved(tmp_path):
    assert_same(bin_index(saved(tmp_path, TENSORS)), TENSORS)


def test_a_state_dict_with_its_metadata_parameters_and_shared_storage_is_read(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    state = model.state_dict(keep_vars=True)  # parameters, with an attribute of versions at the dict
    shared = torch.arange(20.0).reshape(10, 2)
    state["part"], state["whole"] = shared[3:7], shared
    expected = {name: tensor.detach() for name, tensor in state.items()}
    assert_same(bin_index(saved(tmp_path, state)), expected)


def test_integer_buffers_are_listed_and_not_read(tmp_path):
    index = bin_index(saved(tmp_path, {"mask": torch.ones(4, 4, dtype=torch.bool), "ids": torch.arange(5)}))
    assert {name: (tensor.kind, tensor.shape) for name, tensor in index.items()} == {
        "mask": ("BOOL", (4, 4)),
        "ids": ("I64", (5,)),
    }


class Exploding:
    """Writes to a file when it is unpickled freely."""

    def __reduce__(self):
        return open, ("/tmp/unpickled_freely", "w")


def bin_of(tmp_path, pickled, **members):
    """A file of torch.save whose pickle is replaced."""
    torch.save({"a": torch.zeros(4)}, tmp_path / "good.bin")
    with zipfile.ZipFile(tmp_path / "good.bin") as good, zipfile.ZipFile(tmp_path / "x.bin", "w") as bad:
        for info in good.infolist():
            name = info.filename.partition("/")[2]
            content = pickled if name == "data.pkl" else good.read(info)
            bad.writestr(f"x/{name}", members.get(name.replace(".", "_"), content))
    return LocalFile.of(tmp_path / "x.bin")


HOSTILE = {
    "a function": pickle.dumps({"a": Exploding()}, 2),
    "a method of an allowed class": b"ccollections\nOrderedDict.fromkeys\n.",
    "os.system": b"cos\nsystem\n(S'true'\ntR.",
    "torch's own loader": b"ctorch.storage\n_load_from_bytes\n(S'x'\ntR.",
    "a numpy array": pickle.dumps({"a": np.zeros(3)}),
    "another kind of reference": b"\x80\x02(X\x04\x00\x00\x00evilctorch\nFloatStorage\nX\x01\x00\x00\x000NK\x04tQ.",
    "a reference to no storage": b"\x80\x02(X\x07\x00\x00\x00storageK\x01X\x01\x00\x00\x000NK\x04tQ.",
    "no pickle": b"hello",
    "a cut pickle": pickle.dumps({"a": 1})[:-4],
}


@pytest.mark.parametrize("pickled", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_pickle_is_refused_by_name_and_runs_nothing(pickled, tmp_path):
    with pytest.raises(
        ModelError, match=r"x\.bin: refused: .+; ask for a safetensors version of the model$"
    ) as refusal:
        bin_index(bin_of(tmp_path, pickled))
    assert "\n" not in str(refusal.value)


def test_a_refusal_names_what_the_pickle_names(tmp_path):
    with pytest.raises(ModelError, match=r"refused: it names os\.system, which is no part of a checkpoint"):
        bin_index(bin_of(tmp_path, HOSTILE["os.system"]))


def test_the_registry_of_extensions_is_refused_even_where_it_knows_the_code(tmp_path, monkeypatch):
    monkeypatch.setitem(copyreg._extension_cache, 0x11, dict)
    assert pickle.loads(b"\x80\x02\x82\x11)R.") == {}
    with pytest.raises(ModelError, match="refused: it uses the extension registry"):
        bin_index(bin_of(tmp_path, b"\x80\x02\x82\x11)R."))


def with_attribute(opcodes):
    """A tensor of four floats whose storage has an attribute set by the pickle."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + opcodes + b"K\x00(K\x04t(K\x01t\x89}tR"
    return b"\x80\x02}X\x01\x00\x00\x00a" + rebuilt + b"s."


def test_a_tensor_described_by_hand_is_read(tmp_path):
    (tensor,) = bin_index(bin_of(tmp_path, with_attribute(b""))).values()
    np.testing.assert_array_equal(tensor.read(0, 4), np.zeros(4))


LIES_OF_A_PICKLE = {
    "another kind": b"}X\x04\x00\x00\x00kind]sb",
    "no bytes to an element": b"}X\x08\x00\x00\x00itemsizeK\x00sb",
    "a key that is no name": b"}X\x03\x00\x00\x00key]sb",
}


@pytest.mark.parametrize("opcodes", LIES_OF_A_PICKLE.values(), ids=LIES_OF_A_PICKLE)
def test_what_a_pickle_sets_afterwards_is_not_believed(opcodes, tmp_path):
    with pytest.raises(ModelError, match="a is a _Tensor where a tensor is expected"):
        bin_index(bin_of(tmp_path, with_attribute(opcodes)))


NOT_TENSORS = {
    "a list where a dict": [torch.zeros(2)],
    "module is a OrderedDict where a tensor": {"module": OrderedDict(a=torch.zeros(2))},
    "step is a int where a tensor": {"step": 7},
}


@pytest.mark.parametrize(("message", "content"), NOT_TENSORS.items(), ids=NOT_TENSORS)
def test_what_is_no_dict_of_tensors_is_named(message, content, tmp_path):
    with pytest.raises(ModelError, match=message):
        bin_index(saved(tmp_path, content))


def test_a_tensor_stored_out_of_order_is_refused(tmp_path):
    with pytest.raises(ModelError, match="rows of turned do not lie one after another"):
        bin_index(saved(tmp_path, {"turned": torch.randn(4, 6).T}))


def test_a_file_from_before_torch_1_6_says_how_to_convert_it(tmp_path):
    with pytest.raises(ModelError, match=r"saved by torch before 1\.6; .* rewrite it with python -c .* .*x\.bin$"):
        bin_index(saved(tmp_path, TENSORS, _use_new_zipfile_serialization=False))


def test_a_big_endian_file_is_refused(tmp_path):
    with pytest.raises(ModelError, match="big-endian"):
        bin_index(bin_of(tmp_path, pickle.dumps({}), byteorder=b"big"))


@pytest.mark.parametrize("keep", [0, 3, 100, -30, -400])
def test_a_cut_bin_is_one_line(keep, tmp_path):
    data = (saved(tmp_path, TENSORS).path).read_bytes()
    (tmp_path / "x.bin").write_bytes(data[:keep])
    with pytest.raises(ModelError, match=r"x\.bin: not a ") as refusal:
        bin_index(LocalFile.of(tmp_path / "x.bin"))
    assert "\n" not in str(refusal.value)


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path):
    good = saved(tmp_path, {"a": torch.zeros(4)})
    with zipfile.ZipFile(good.path) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    assert pickled.count(b"K\x04\x85") == 1  # the shape (4,)
    with pytest.raises(ModelError, match="a does not lie whole in x/data/0"):
        bin_index(bin_of(tmp_path, pickled.replace(b"K\x04\x85", b"K\x08\x85")))


def test_a_compressed_archive_is_refused(tmp_path):
    good = saved(tmp_path, {"a": torch.zeros(400)})
    with (
        zipfile.ZipFile(good.path) as archive,
        zipfile.ZipFile(tmp_path / "y.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    with pytest.raises(ModelError, match="a does not lie whole in"):
        bin_index(LocalFile.of(tmp_path / "y.bin"))


def pickle_of(content):
    """What torch.save pickles, and how to put another in its place."""
    stream = io.BytesIO()
    torch.save(content, stream)
    with zipfile.ZipFile(stream) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}

    def replaced(pickled):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for name, data in (members | {"data.pkl": pickled}).items():
                archive.writestr(f"archive/{name}", data)
        return MemoryFile(out.getvalue())

    return members["data.pkl"], replaced


PICKLED, REPLACED = pickle_of({"a": torch.zeros(4), "b": torch.zeros(2, 2).half()})


@given(st.lists(st.tuples(st.integers(0, len(PICKLED) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_damage_to_a_pickle_is_an_error_or_other_tensors_of_the_file(damage):
    damaged = bytearray(PICKLED)
    for offset, byte in damage:
        damaged[offset] = byte
    file = REPLACED(bytes(damaged))
    with contextlib.suppress(ModelError):
        for tensor in bin_index(file).values():
            if tensor.shape and tensor.kind in ("F32", "F16"):
                assert tensor.read(0, tensor.shape[0]).shape == tensor.shape


class MemoryFile:
    """A `ByteFile` that is bytes."""

    name = url = "memory.bin"

    def __init__(self, data):
        self.data, self.size = data, len(data)

    def read(self, start, stop):
        if stop > self.size:
            raise ModelError("after the end")
        return np.frombuffer(self.data[start:stop], np.uint8)


def test_a_directory_that_points_to_no_member_is_an_error(tmp_path):
    data = bytearray(saved(tmp_path, {"a": torch.zeros(4)}).path.read_bytes())
    local = data.index(b"PK\x03\x04", data.index(b"data/0") - 40)
    data[local : local + 4] = b"XXXX"
    (tmp_path / "y.bin").write_bytes(data)
    with pytest.raises(ModelError, match=r"not a whole file of torch\.save"):
        bin_index(LocalFile.of(tmp_path / "y.bin"))
