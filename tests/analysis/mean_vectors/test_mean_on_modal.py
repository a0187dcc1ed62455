"""The Modal app of the mean, with a stand-in for Modal: the functions run here, in folders of the test.

That Modal itself accepts the app is tested in tests/launchers.
"""

import importlib
import pickle
import sys
from types import SimpleNamespace

import light_mean
import pytest
from forks import REPOSITORY
from light_mean import vectors_of
from tiny_run import committed_files, write_model

from analysis.mean_vectors import extraction, job
from analyze_activations import mean

TEXTS = [f"text {i}" for i in range(9)]


class Function:
    """What Modal makes of a function."""

    def __init__(self, raw):
        self.local = self.remote = raw

    def map(self, values, kwargs):
        """One after another."""
        return (self.local(value, **kwargs) for value in values)


class App:
    """Keeps what a function asks for beside it."""

    def __init__(self, name, image):
        self.wishes = {}

    def function(self, **wishes):
        """Decorates."""
        return lambda raw: self.wishes.setdefault(raw.__name__, wishes) and Function(raw)

    def local_entrypoint(self):
        """Decorates."""
        return lambda raw: raw


class Volume:
    """Counts commits."""

    commits = 0

    @classmethod
    def from_name(cls, name, create_if_missing):
        """A volume."""
        return cls()

    def commit(self):
        """Counts."""
        self.commits += 1

    def reload(self):
        """Nothing to do."""


@pytest.fixture
def app(tmp_path, monkeypatch):
    modal = SimpleNamespace(App=App, Volume=Volume, Image=object, is_local=lambda: False)
    monkeypatch.setitem(sys.modules, "modal", modal)
    monkeypatch.syspath_prepend(str(REPOSITORY))
    monkeypatch.delitem(sys.modules, "launchers.modal_mean", raising=False)
    module = importlib.import_module("launchers.modal_mean")
    monkeypatch.delitem(sys.modules, "launchers.modal_mean")
    monkeypatch.setattr(module, "STORED", tmp_path / "volume")
    monkeypatch.setattr(module, "SCRATCH", tmp_path / "scratch")
    (tmp_path / "volume").mkdir()
    (tmp_path / "volume/training_data.pkl").write_bytes(pickle.dumps(TEXTS))
    monkeypatch.setattr(job, "load_extractor", None)
    light_mean.install()
    monkeypatch.setattr(extraction, "load_extractor", job.load_extractor)
    return module


def test_the_volume_holds_what_the_command_writes(app, tmp_path, capsys):
    model = str(write_model(tmp_path / "model"))
    options = {"num_samples": 8, "batch_size": 3, "mode": "both", "model_path": model}
    app.main(**options, layers="0 2")
    mean(tmp_path / "volume/training_data.pkl", output=tmp_path / "out", layers=[0, 2], **options)
    written = committed_files(tmp_path / "volume")
    del written["training_data.pkl"]
    assert written == committed_files(tmp_path / "out")
    assert app.volume.commits == 1 + 3 + 1  # the metadata, each batch, the means
    assert "3 of 3 batches, 0 failed texts" in capsys.readouterr().out
    app.main(**options, layers="0 2")
    assert app.volume.commits == 5 + 2, "a second run stores no batch again"


def test_a_single_text_gives_its_vector_or_a_reason(app):
    assert app.extract_single_vector.local("text", mode="long")["vector"] == vectors_of(["text"], "long")[0].tolist()
    assert app.extract_single_vector.local("fail") == {"vector": None, "failed": "it says so"}
    wishes = app.app.wishes["extract_single_vector"]
    assert (wishes["gpu"], wishes["memory"], wishes["timeout"]) == ("A100-80GB", 65536, 1800)
