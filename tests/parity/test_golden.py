"""Golden folders: what comes back, how small they are, and that damage and other formats are named."""

import json

import numpy as np
import pytest

from msft.errors import InputError
from msft.parity import golden
from msft.parity.fingerprint import fingerprint
from msft.parity.observe import STAGES, Observation
from msft.train import manifest


def sample(steps=3):
    array = np.random.default_rng(0).standard_normal((300, 400)).astype(np.float32)
    seen = Observation({"rows": [1, 2]}, {"loss": 1.5}, {"check": 0.0}, {"model.norm": array}, {"told": "this"})
    return golden.Golden("torch", steps, {"msft": "1"}, dict.fromkeys(STAGES, seen))


def test_everything_comes_back_and_tensors_as_fingerprints(tmp_path):
    golden.write(tmp_path / "golden", sample())
    found = golden.read(tmp_path / "golden")
    assert (found.label, found.steps, found.versions) == ("torch (recorded)", 3, {"msft": "1"})
    for stage in STAGES:
        seen, written = found.observe(stage), sample().observe(stage)
        assert (seen.facts, seen.numbers, seen.checks, seen.notes) == (
            written.facts,
            written.numbers,
            written.checks,
            written.notes,
        )
        expected, actual = fingerprint(written.arrays["model.norm"]), seen.arrays["model.norm"]
        assert vars(expected).keys() == vars(actual).keys()
        assert all(np.array_equal(getattr(expected, name), getattr(actual, name)) for name in vars(expected))


def test_it_is_small_whatever_the_tensors(tmp_path):
    golden.write(tmp_path / "golden", sample())
    size = sum(path.stat().st_size for path in (tmp_path / "golden").iterdir())
    assert size < 20_000 < 300 * 400 * 4


def test_what_is_there_is_not_written_over(tmp_path):
    golden.write(tmp_path / "golden", sample())
    with pytest.raises(FileExistsError):
        golden.write(tmp_path / "golden", sample(5))
    assert golden.read(tmp_path / "golden").steps == 3


@pytest.mark.parametrize("name", [golden.RECORD, golden.SAMPLES])
def test_damage_is_named(tmp_path, name):
    golden.write(tmp_path / "golden", sample())
    file = tmp_path / "golden" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"--against: .*{name} is damaged"):
        golden.read(tmp_path / "golden")


def test_another_format_is_named(tmp_path):
    golden.write(tmp_path / "golden", sample())
    record = json.loads((tmp_path / "golden" / golden.RECORD).read_text())
    (tmp_path / "golden" / golden.RECORD).write_text(json.dumps({**record, "format": 99}))
    (tmp_path / "golden" / manifest.NAME).unlink()
    manifest.write(tmp_path / "golden")
    with pytest.raises(InputError, match="has format 99, this version of msft reads 1"):
        golden.read(tmp_path / "golden")


def test_a_folder_that_is_none_is_named(tmp_path):
    with pytest.raises(InputError, match="--against: .*manifest.json is missing"):
        golden.read(tmp_path)
    (tmp_path / golden.RECORD).write_text("{}")
    manifest.write(tmp_path)
    with pytest.raises(InputError, match="is no golden folder"):
        golden.read(tmp_path)
