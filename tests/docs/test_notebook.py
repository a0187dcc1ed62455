"""docs/notebook.md as a reader runs it, block after block, on the real SmolLM2."""

import re

import numpy as np
from doc_snippets import DOCS

HUB_ID = "HuggingFaceTB/SmolLM2-135M"


def test_every_block_of_the_page_runs_after_those_before_it(smollm2, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", (DOCS / "notebook.md").read_text(), flags=re.M)
    assert len(blocks) >= 8
    names: dict[str, object] = {}
    for block in blocks:
        code = re.sub(r"^    ", "", block, flags=re.M).replace(HUB_ID, str(smollm2))
        exec(compile(code, "docs/notebook.md", "exec"), names)
    printed = capsys.readouterr().out
    assert " Paris" in printed, "the next token"
    assert "The capital of France is (5, 576)" in printed
    # What was captured in memory, from the loaded model and in the file is the same.
    captured, stored = names["found"]["residual"][14], names["shard"][14]
    for of_model, item in zip(captured, stored, strict=True):
        assert of_model.shape == item["shape"]
        np.testing.assert_allclose(of_model, item["activation"].astype(np.float32), rtol=2e-3, atol=2e-2)
