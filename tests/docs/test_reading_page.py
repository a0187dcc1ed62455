"""docs/reading.md as a reader runs it, block after block, on a run of random activations."""

import re

import pytest
from doc_snippets import DOCS

from benchmarks.storage.synthetic_run import SyntheticRun, write_run


def test_every_block_of_the_page_runs_after_those_before_it(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("grain")
    run = SyntheticRun({"residual": ((7, 14), 576)}, shard_format="safetensors")
    write_run(tmp_path / "activations", run, [[40, 90, 3], [60, 70]])
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", (DOCS / "reading.md").read_text(), flags=re.MULTILINE)
    assert len(blocks) >= 7
    names: dict[str, object] = {}
    for block in blocks:
        code = re.sub(r"^    ", "", block, flags=re.MULTILINE)
        exec(compile(code, "docs/reading.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "('residual',) (7, 14) bfloat16 576 5 263" in printed
    assert "sample 3 {'parity': 1} (60, 576)" in printed
    assert "(258, 576)" in printed, "the first tokens of five samples are dropped"
    assert "torch.Size([7, 576])" in printed, "263 tokens are four batches of 64 and 7 tokens"
    assert "tpu_0 1 3 133 [{'parity': 0}, {'parity': 1}, {'parity': 0}]" in printed
