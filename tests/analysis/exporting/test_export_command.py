"""The commands are thin: flags in, one call, a report out."""

import json

import numpy as np
import pytest
from exported_run import LAYER, make_run, samples_of
from safetensors.numpy import load_file, save_file

from analyze_activations import build_parser
from core.reading import open_activations


def run_command(*words: object) -> None:
    args = build_parser().parse_args([*map(str, words)])
    args.run(args)


def test_export_prints_what_it_wrote_and_left_out(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    dropped = samples_of(run)[0].token_ids[1]
    words = ["--layer", LAYER, "--site", "residual", "--output", tmp_path / "out", "--drop", "first", "-1:", dropped]
    run_command("export", run, "--to", "llamascopium", *words, "--file_mb", "0.001", "--json")
    report = json.loads(capsys.readouterr().out)
    wanted = [s.token_ids[1:-1] for s in samples_of(run) if len(s.token_ids) > 2]
    wanted = np.concatenate(wanted)
    wanted = wanted[wanted != dropped]
    assert report["tokens"] == len(wanted)
    assert report["n_dropped"] == 65 - len(wanted)
    chunks = [load_file(path) for path in sorted((tmp_path / "out").glob("*/*.safetensors"))]
    assert len(chunks) == report["files"]
    assert np.concatenate([chunk["tokens"] for chunk in chunks]).tolist() == wanted.tolist()


def test_import_prints_what_it_stored(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    states = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    save_file({"hidden_states": states, "token_ids": np.arange(3)}, tmp_path / "in/a.safetensors")
    out = tmp_path / "out"
    run_command("import", tmp_path / "in", "--from", "vllm", "--layers", 4, 9, "--output", out, "--json")
    report = json.loads(capsys.readouterr().out)
    assert (report["samples"], report["tokens"], report["layers"]) == (1, 3, [4, 9])
    np.testing.assert_array_equal(open_activations(str(out))[0].activation(9), states[:, 1])


@pytest.mark.parametrize("words", [["--context_size", "0"], ["--file_mb", "0"], ["--seed", "-1"], ["--to", "csv"]])
def test_nonsense_is_refused_before_anything_is_read(tmp_path, words, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command("export", tmp_path / "nothing", "--to", "npz", "--output", tmp_path / "out", *words)
    assert ended.value.code == 2
    assert words[0] in capsys.readouterr().err
