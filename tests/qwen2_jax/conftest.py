"""A bucket to keep models in, and a home of the test's own."""

import pytest
from fake_gcs import FakeGcs, gcs_environment

from qwen2_jax.checkpoints.files import remote_files


@pytest.fixture
def home(tmp_path_factory, monkeypatch):
    """Where caches go: nothing of the user's is read or written."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.fixture
def bucket(monkeypatch, home):
    """The fake service, which gcsfs is told to talk to, with an empty bucket named "bucket"."""
    with FakeGcs() as server:
        for name, value in gcs_environment(server).items():
            monkeypatch.setenv(name, value)
        remote_files.cache_clear()
        yield server
    remote_files.cache_clear()
