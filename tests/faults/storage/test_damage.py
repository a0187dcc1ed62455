"""One byte flipped or cut in any stored file, or the file gone: `verify` names it, every file.

Not among them: metrics.jsonl, a log that runs append to, of which a crash may leave half a line.
"""

import random
import shutil
from pathlib import Path

import pytest
from fleets import counts, flags, is_full, make_dataset
from nursery import Nursery, Worker
from tally import DAMAGE
from tiny_run import token_lines

from analysis.verification.verify import verify
from core.commit.record import RECORD_NAME
from core.shards.formats import FORMATS

KINDS = {
    "shards, pickle": {},
    "shards, plain pickle of two sites": {"compress_shards": False, "activation_type": ("residual", "mlp")},
    "a stream with tokens left out": {"positions": ("0:20",), "max_bad_records": 2},
} | {
    f"a stream, {name}": {
        "format": name,
        "activation_type": ("residual", "mlp"),
        "dtype": "bfloat16" if "bfloat16" in fmt.dtypes else "float16",
    }
    for name, fmt in FORMATS.items()
    if name != "pickle"
}


@pytest.fixture(scope="module", params=KINDS)
def pristine(request, nursery: Nursery, memory) -> Path:
    """A finished run; with bad lines, of which the records keep the reasons."""
    folder = memory / request.param.replace(" ", "_").replace(",", "")
    lines = token_lines(30, longest=30)
    wanted = KINDS[request.param]
    if "max_bad_records" in wanted:
        lines[3] = {"input_ids": "not a list"}
    data = make_dataset(folder, len(lines), 2, lines)
    plain = {"use_sharded_dataset": False, "sharded_dataset_dir": None, "dataset_path": str(data / "shard_000")}
    nursery.start(
        Worker(flags(data, folder / "out") | wanted | (plain if request.param.startswith("a stream") else {}))
    ).finish()
    return folder / "out"


def stored_files(out: Path) -> list[str]:
    names = (str(path.relative_to(out)) for path in sorted(out.rglob("*")) if path.is_file())
    return [name for name in names if not name.endswith("metrics.jsonl")]


def said(out: Path) -> list[str]:
    return verify(str(out)).lines()


def names_it(lines: list[str], name: str) -> bool:
    """Whether a line says something of the file: its folder, then its name."""
    folder, last = name.partition("/")[0], name.rpartition("/")[2]
    return any(last in line and (folder in line or "/" not in name) for line in lines)


def damages(whole: bytes, rng: random.Random) -> dict[str, bytes]:
    place = rng.randrange(len(whole))
    flipped = bytearray(whole)
    flipped[place] ^= 1 << rng.randrange(8)
    return {"flipped": bytes(flipped), "cut by one": whole[:-1], "cut anywhere": whole[:place]}


def test_a_whole_output_has_nothing_to_say(pristine):
    report = verify(str(pristine))
    assert report.ok
    assert not any("PROBLEM" in line or "note" in line for line in report.lines()), report.lines()


@pytest.mark.parametrize("seed", counts(1, 10))
def test_a_flipped_or_cut_byte_in_any_file_is_named(seed, pristine, place, tally):
    out = Path(shutil.copytree(pristine, place / "out"))
    rng = random.Random(seed)
    names = stored_files(out)
    assert len(names) >= 10
    for name in names:
        whole = (out / name).read_bytes()
        for kind, damaged in damages(whole, rng).items():
            (out / name).write_bytes(damaged)
            assert names_it(said(out), name), f"{name}, {kind}: {said(out)}"
        (out / name).write_bytes(whole)
    assert not any("PROBLEM" in line for line in said(out))
    tally(DAMAGE, 3 * len(names))


def test_every_byte_of_a_record_counts(pristine, place, tally):
    """Also those that mean nothing: reasons of bad lines, spaces, the checksum itself."""
    out = Path(shutil.copytree(pristine, place / "out"))
    record = next(out.glob("*/shard_0001.json"))
    whole = record.read_bytes()
    offsets = range(0, len(whole), 1 if is_full() else 40)
    for offset in offsets:
        flipped = bytearray(whole)
        flipped[offset] ^= 1
        record.write_bytes(bytes(flipped))
        assert not verify(str(out)).ok, offset
    tally(DAMAGE, len(offsets))


def test_a_file_that_is_gone_is_named(pristine, place, tally):
    out = Path(shutil.copytree(pristine, place / "out"))
    # Claims and folder metadata may be missing: they are not part of the data.
    needed = [name for name in stored_files(out) if not name.startswith("claims/") and "metadata.json" not in name]
    needed = [name for name in needed if not RECORD_NAME.fullmatch(name.rpartition("/")[2])]
    assert {name.rpartition("/")[2][:4] for name in needed} >= {"run.", "stre", "shar", "samp"}
    for name in needed:
        moved = (out / name).rename(place / "moved")
        assert names_it(said(out), name), said(out)
        moved.rename(out / name)
    tally(DAMAGE, len(needed))
