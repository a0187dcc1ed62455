"""The benchmark of moments runs at a tiny size, and its rates add up."""

import json

import pytest

from benchmarks import moments


@pytest.mark.benchmark
def test_every_way_is_measured_at_every_width(capsys):
    flags = ["--widths", "8", "24", "--tokens", "1024", "--product", "64", "--repeats", "1", "--json"]
    moments.run(moments.build_parser().parse_args(flags))
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 1024
    assert [(rate["way"].partition(",")[0], rate["width"]) for rate in found["rates"]] == [
        ("Moments.of", 8),
        ("device_moments", 8),
        ("Moments.of", 24),
        ("device_moments", 24),
    ]
    for rate in found["rates"]:
        seconds = max(rate["timings"]["wall"][0], 1e-3)
        assert rate["mb_s"] == pytest.approx(1024 * rate["width"] * 2 / seconds / 1e6, rel=0.6, abs=0.1)
        assert rate["tokens_s"] == pytest.approx(rate["mb_s"] * 1e6 / (2 * rate["width"]), rel=0.2)
        assert rate["of_product"] > 0
