"""What a stranger's file may not do, and what may not be seen: pickles, names, URLs, secrets."""

import copyreg
import io
import logging
import os
import pickle
import pickletools
import struct

import ml_dtypes
import numpy as np
import pytest
from tiny_run import extract, run, token_lines, write_jsonl, write_model

from analysis.verification.stored_identity import read_dataset_shards
from core.base.canonical_json import canonical_json, sealed_json
from core.base.command_line import _refuse_plaintext_hub
from core.base.errors import RunError, UsageError
from core.base.redaction import RedactingFormatter, printable, redact
from core.commit.record import CommitRecord
from core.dataset_utils import resolve_stream_path, stream_identity
from core.object_store import LocalStore
from core.object_store.gcs import _emulator, _explain
from core.shards.formats import FORMATS
from core.shards.formats.pickle_shard import RestrictedUnpickler

# Pickles, written by hand: what `pickle.dumps` would never write.

END = pickle.STOP


def text(value: str) -> bytes:
    return pickle.SHORT_BINUNICODE + bytes([len(value)]) + value.encode()


def stack_global(module: str, name: str) -> bytes:
    return text(module) + text(name) + pickle.STACK_GLOBAL


def called(function: bytes, *args: str) -> bytes:
    return function + pickle.MARK + b"".join(map(text, args)) + pickle.TUPLE + pickle.REDUCE


HOSTILE = {
    "a function": called(stack_global("os", "system"), "touch hacked"),
    "an old global": b"cos\nsystem\n" + pickle.MARK + text("touch hacked") + pickle.TUPLE + pickle.REDUCE,
    "inst": pickle.MARK + text("touch hacked") + b"ios\nsystem\n",
    "obj": pickle.MARK + b"cos\nsystem\n" + text("touch hacked") + pickle.OBJ,
    "newobj": stack_global("subprocess", "Popen") + pickle.EMPTY_TUPLE + pickle.NEWOBJ,
    "a nested name": called(stack_global("numpy", "ndarray.tofile"), "hacked"),
    "a nested module": called(stack_global("numpy", "os.system"), "touch hacked"),
    "a name after one that is allowed": called(stack_global("numpy", "dtype.__class__"), "hacked"),
    "a module that begins like one that is allowed": called(stack_global("numpy.core.multiarray.os", "system"), "x"),
    "a module with a null": called(stack_global("numpy\0.os", "dtype"), "x"),
    "a module with another case": called(stack_global("Numpy", "dtype"), "x"),
    "a name from the memo": text("os") + pickle.MEMOIZE + text("system") + pickle.MEMOIZE + pickle.BINGET + b"\0"
    + pickle.BINGET + b"\1" + pickle.STACK_GLOBAL,
    "numpy's own loader": called(stack_global("numpy", "load"), "hacked"),
    "a builtin": called(stack_global("builtins", "eval"), "1"),
    "getattr": called(stack_global("builtins", "getattr"), "x", "y"),
    "a persistent id": pickle.PERSID + b"hacked\n",
    "a persistent object": text("hacked") + pickle.BINPERSID,
    "next buffer": pickle.NEXT_BUFFER,
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_pickle_is_refused_and_does_nothing(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = pickle.PROTO + b"\4" + HOSTILE[kind] + END
    with pytest.raises(ValueError, match="not a readable pickle shard"):
        FORMATS["pickle"].read(io.BytesIO(data))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("opcode", ["EXT1", "EXT2", "EXT4"])
@pytest.mark.parametrize("is_cached", [False, True])
def test_the_extension_registry_opens_no_way_around_the_list(opcode, is_cached, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = {"EXT1": "<B", "EXT2": "<H", "EXT4": "<i"}[opcode]
    code = 200
    copyreg.add_extension("os", "system", code)
    try:
        extension = pickle.PROTO + b"\2" + getattr(pickle, opcode) + struct.pack(size, code)
        if is_cached:
            assert pickle.loads(extension + END) is os.system
            assert code in copyreg._extension_cache
        call = pickle.MARK + pickle.BINUNICODE + struct.pack("<I", 12) + b"touch hacked" + pickle.TUPLE + pickle.REDUCE
        data = extension + call + END
        assert opcode in [operation.name for operation, _, _ in pickletools.genops(data)]
        with pytest.raises(ValueError, match=r"os\.system"):
            FORMATS["pickle"].read(io.BytesIO(data))
    finally:
        copyreg.remove_extension("os", "system", code)
    assert os.listdir(tmp_path) == []


def test_a_pickle_cannot_change_the_types_that_it_may_name():
    state = pickle.MARK + text("hacked") + pickle.INT + b"1\n" + pickle.DICT
    for module, name in (("numpy", "ndarray"), ("numpy", "dtype"), ("ml_dtypes", "bfloat16")):
        for wrapped in (state, pickle.NONE + state + pickle.TUPLE2):
            data = pickle.PROTO + b"\4" + stack_global(module, name) + wrapped + pickle.BUILD + END
            with pytest.raises(ValueError):
                FORMATS["pickle"].read(io.BytesIO(data))
    assert not any(hasattr(kind, "hacked") for kind in (np.ndarray, np.dtype, ml_dtypes.bfloat16))


def test_an_array_of_objects_brings_nothing_in():
    class Evil:
        def __reduce__(self):
            return os.system, ("touch hacked",)

    with pytest.raises(pickle.UnpicklingError, match=r"(posix|nt|os)\.system"):
        RestrictedUnpickler(io.BytesIO(pickle.dumps(np.array([Evil()], object)))).load()


NAMES = ["../x", "/etc/passwd", "a/../../x", "..", ".", "", "a\\b", "a\0b", "shard_0001.pkl.gz/", "C:\\x", "~/x",
         "shard_\u0661\u0661\u0661\u0661.pkl", "shard_000\uff11.pkl", "shard_0001\u202e.pkl", "shard_0001.pkl\n",
         "a//b", "shard_0002.pkl.gz", "residual/../shard_0001.pkl", "RESIDUAL/shard_0001.pkl",
         "-x/shard_0001.pkl"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_record_names_no_file_but_its_windows_own(name):
    record = {
        "window": 1, "plan_hash": "0", "stream_hash": "0", "first_sample_idx": 0, "last_sample_idx": 0,
        "next_place": None, "n_samples": 1, "n_tokens": 1, "n_truncated": 0, "n_dropped": {}, "n_empty": 0,
        "samples_per_record": 1, "sites": {"residual": {"layers": [0], "width": 1}}, "dtype": "float16",
        "files": [{"name": name, "site": "residual", "bytes": 1, "crc32c": "0", "sha256": "0"}], "bad_records": [],
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"files\.name"):
        CommitRecord.from_bytes(sealed_json(record))
    record["files"][0]["name"] = "residual/shard_0001.pkl.gz"
    assert CommitRecord.from_bytes(sealed_json(record)).window == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_dataset_of_an_output_names_no_folder_but_a_shards(name, tmp_path):
    stream = {"identity": {}, "machine_id": 0, "total_machines": 1, "max_tasks": None, "first_position": 0}
    content = {"shards": {name: stream}, "num_tasks": {name: 1}}
    (tmp_path / "dataset.json").write_bytes(canonical_json(content))
    with pytest.raises(RunError, match="is not the name of a shard"):
        read_dataset_shards(LocalStore(tmp_path))


CLEAR_URLS = ["http://example.com/s.jsonl", "HTTP://10.0.0.1/s.jsonl", "ftp://example.com/s.jsonl",
              "simplecache::http://example.com/s.jsonl", "http://127.0.0.1.example.com/s.jsonl",
              "http://127.0.0.1@example.com/s.jsonl", "http://example.com?@127.0.0.1/s.jsonl"]  # fmt: skip


@pytest.mark.parametrize("url", CLEAR_URLS)
def test_a_url_in_the_clear_is_refused_before_anything_is_asked(url):
    with pytest.raises(UsageError, match="loopback only"):
        resolve_stream_path(url)


def test_a_password_in_a_url_is_refused_and_not_repeated():
    with pytest.raises(UsageError, match=r"https://\*\*\*@example\.com.*leave user and password out") as refused:
        resolve_stream_path("https://me:hunter22@example.com/s.jsonl")
    assert "hunter22" not in str(refused.value)


@pytest.mark.parametrize(
    "host",
    [
        "http://example.com",
        "example.com:80",
        "http://127.0.0.1@example.com",
        "http://127.0.0.1.nip.io",
        "ftp://127.0.0.1",
    ],
)
def test_an_emulator_in_the_clear_is_refused(host, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", host)
    with pytest.raises(UsageError, match="loopback only"):
        _emulator()


@pytest.mark.parametrize("host", ["http://127.0.0.1:80", "localhost:80", "http://[::1]:80", "https://example.com"])
def test_an_emulator_on_this_machine_or_behind_tls_is_used(host, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", host)
    assert _emulator() is not None


def test_a_hub_in_the_clear_is_refused():
    with pytest.raises(UsageError, match="HF_ENDPOINT"):
        _refuse_plaintext_hub({"HF_ENDPOINT": "http://hub.example.com"})
    for endpoint in ("https://hub.example.com", "http://127.0.0.1:8000", ""):
        _refuse_plaintext_hub({"HF_ENDPOINT": endpoint})


SECRETS = {
    "https://me:hunter22@host/x": "hunter22",
    "PUT https://storage.googleapis.com/upload?uploadType=resumable&upload_id=ABPtcPq_12-x failed": "ABPtcPq_12-x",
    "https://host/x?X-Goog-Credential=who&X-Goog-Signature=0a1b2c3d&x=1": "0a1b2c3d",
    "https://host/x?sig=0a1b2c3d%3D&se=2": "0a1b2c3d%3D",
    "{'Authorization': 'Bearer ya29.a0AfH6SMC-x_y'}": "ya29.a0AfH6SMC-x_y",
    "token is hf_abcdefghijklmnopqrst, sorry": "hf_abcdefghijklmnopqrst",
    "refresh_token=1//0gabcdefghijklmnopqrstuvw": "1//0gabcdefghijklmnopqrstuvw",
    "-----BEGIN PRIVATE KEY-----\nMIIEvQ\n-----END PRIVATE KEY-----": "MIIEvQ",
    "key=AIzaSyA-abcdefghijklmnopqrstuv": "AIzaSyA-abcdefghijklmnopqrstuv",
    "password=hunter22 for host": "hunter22",
}


@pytest.mark.parametrize("said", SECRETS)
def test_a_secret_in_a_message_is_masked(said):
    assert SECRETS[said] not in redact(said)
    assert "***" in redact(said)


@pytest.mark.parametrize(
    "said",
    ["--max_seq_length 128: must be at least 1", "/data/s.jsonl:7: broken JSON at column 3", "gs://bucket/a/b@c.json",
     "n_tokens=5, key=value, tokenizer=x", "shard_000: claimed (lease 1)", "user@host.example.com"],
)  # fmt: skip
def test_what_is_no_secret_stays(said):
    assert redact(said) == said


def test_the_token_of_the_environment_is_masked_wherever_it_turns_up(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "an-unusual-token")
    record = logging.LogRecord("x", logging.ERROR, "f", 1, "sent %s", ("an-unusual-token",), None)
    assert RedactingFormatter("%(message)s").format(record) == "sent ***"
    assert "an-unusual-token" not in _explain(OSError("Forbidden: an-unusual-token"), 403, 1)


def test_a_signed_url_leaves_no_trace_in_what_is_kept(monkeypatch):
    monkeypatch.setattr("core.dataset_utils.resolve_stream_path", lambda path: path)
    monkeypatch.setattr("core.dataset_utils.find_shard", lambda path: None)
    monkeypatch.setattr("core.object_store.stored_files._open_stored", lambda path: io.BytesIO(b"{}\n"))
    identity = stream_identity("https://host/folder/s.jsonl?X-Goog-Signature=0a1b2c3d")
    assert identity["name"] == "s.jsonl"


def test_no_file_and_no_line_of_a_run_holds_the_token(tmp_path):
    model = write_model(tmp_path / "model", tokenizer=False)
    write_jsonl(tmp_path / "s.jsonl", token_lines(5, longest=30))
    secret = {"HF_TOKEN": "hf_averysecrettokenindeed"}
    args = ("--model_path", model, "--dataset_path", "s.jsonl", "--max_seq_length", 128, "--log_file", "log.txt")
    done = extract(tmp_path, *args, "--verbose", "--json", **secret)
    assert done.returncode == 0, done.stderr
    wrong = extract(tmp_path, *args, "--model_path", "nobody/hf_averysecrettokenindeed", "--verbose", **secret)
    assert wrong.returncode != 0
    said = [done.stdout, done.stderr, wrong.stdout, wrong.stderr]
    kept = [path.read_bytes().decode(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    assert not any("averysecrettoken" in content for content in (*said, *kept))
    assert "***" in wrong.stderr


def test_a_secret_on_a_command_line_that_is_refused_is_not_repeated(tmp_path):
    for script in ("extract_activations.py", "create_dataset_streams.py", "analyze_activations.py"):
        refused = run(script, "--hub_token", "hf_averysecrettokenindeed", "--nothing\x1b[2J", cwd=tmp_path)
        assert refused.returncode == 2
        assert refused.stderr.startswith("error: ")
        assert "averysecret" not in refused.stderr
        assert "\x1b" not in refused.stderr


def test_no_line_says_what_a_terminal_would_obey(tmp_path):
    """The keys of a stranger's plan, which a refusal quotes."""
    hostile = "a\x1b[2J\x9b2J\u202eb\x07"
    assert printable(f"{hostile}\nñ 字") == "a?[2J?2J?b??ñ 字"
    record = logging.LogRecord("x", logging.ERROR, "f", 1, "1\n\t%s", (hostile,), None)
    assert RedactingFormatter("%(message)s").format(record) == "1\n\ta?[2J?2J?b?"
    write_jsonl(tmp_path / "s.jsonl", token_lines(2))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/run.json").write_bytes(sealed_json({hostile: hostile}))
    model = write_model(tmp_path / "model", tokenizer=False)
    for flags in ((), ("--verbose",)):
        args = ("--model_path", model, "--dataset_path", "s.jsonl", "--output_dir", "out", "--max_seq_length", 128)
        refused = extract(tmp_path, *args, *flags)
        assert refused.returncode == 2
        assert "a?[2J?2J?b?" in refused.stderr
        assert all(letter.isprintable() or letter in "\n\t" for letter in refused.stderr)


def test_verbose_errors_keep_their_trace_and_their_exit_code(tmp_path):
    result = run("analyze_activations.py", "verify", tmp_path / "nothing", "--verbose", cwd=tmp_path)
    assert result.returncode == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")
    plain = run("analyze_activations.py", "verify", tmp_path / "nothing", cwd=tmp_path)
    assert (plain.returncode, len(plain.stderr.splitlines())) == (2, 1)
