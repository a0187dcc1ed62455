"""The code of docs/statistics.md, over activations that no model computed."""

from types import SimpleNamespace

import numpy as np
from doc_snippets import snippet

import extract_activations
from analysis.moments.device import device_moments, moments_of_device
from analysis.whitening import IncrementalWhitener, WhiteningSettings, load_whitening


def test_the_blocks_run_as_they_stand_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    activations = [rng.normal(size=(300, 576)).astype(np.float32) for _ in range(4)]
    monkeypatch.setattr(extract_activations, "capture", lambda *_, **__: {"residual": {14: activations}})
    names = {"texts": []}
    exec(snippet("statistics.md", with_line="found = capture"), names)
    assert names["moments"].count == 4 * 299
    np.testing.assert_allclose(names["x"], activations[0], atol=1e-3)
    np.testing.assert_array_equal(load_whitening("whitening.safetensors").mean, names["statistics"].mean)


def test_the_blocks_of_steps_and_batches_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    x, x2 = rng.normal(size=(2, 4, 30, 8)).astype(np.float32)
    mask, mask2 = rng.random((2, 4, 30)) < 0.8
    steps = {"device_moments": device_moments, "moments_of_device": moments_of_device, "np": np}
    steps |= {"x": x, "x2": x2, "mask": mask, "mask2": mask2}
    exec(snippet("statistics.md", with_line="sums, norms ="), steps)
    assert steps["moments"].count == mask.sum() + mask2.sum()
    ids = rng.integers(3, 9, mask.shape)
    batch = SimpleNamespace(activations=x, attention_mask=mask, token_ids=ids)
    batches = {"IncrementalWhitener": IncrementalWhitener, "WhiteningSettings": WhiteningSettings, "batches": [batch]}
    exec(
        snippet("statistics.md", with_line="whitener = Incremental"),
        batches | {"activations": x, "attention_mask": mask, "token_ids": ids},
    )
    assert (tmp_path / "whitener.safetensors").exists()
