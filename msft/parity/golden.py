"""Golden folders: one side's observations, small enough to carry to another machine.

`golden.json` holds facts, numbers, checks and each tensor's shape, hash and statistics; `samples.safetensors` up to
256 values of each tensor, named `stage/tensor`; `manifest.json` sizes and hashes of both.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from msft.errors import InputError
from msft.files import atomic_path, write_json
from msft.parity.fingerprint import Fingerprint
from msft.parity.observe import STAGES, Observation
from msft.train import manifest

FORMAT = 1
RECORD, SAMPLES = "golden.json", "samples.safetensors"


@dataclass(frozen=True)
class Golden:
    """What was recorded: by which side, over how many steps, with which versions."""

    label: str
    steps: int
    versions: dict
    observations: dict[str, Observation]

    def observe(self, stage: str) -> Observation:
        """Return what was seen in a stage."""
        return self.observations[stage]


def write(folder: Path, golden: Golden) -> None:
    """Write a golden folder in one rename; raises FileExistsError when there is something already."""
    from safetensors.numpy import save_file

    samples, stages = {}, {}
    for stage, seen in golden.observations.items():
        prints = seen.reduced().arrays
        samples |= {f"{stage}/{name}": print_.sample for name, print_ in prints.items()}
        tensors = {name: _numbers(print_) for name, print_ in prints.items()}
        stages[stage] = {
            "facts": seen.facts,
            "numbers": seen.numbers,
            "checks": seen.checks,
            "tensors": tensors,
            "notes": seen.notes,
        }
    header = {"format": FORMAT, "label": golden.label, "steps": golden.steps, "versions": golden.versions}
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        write_json(temporary / RECORD, {**header, "stages": stages})
        save_file(samples, temporary / SAMPLES)
        manifest.write(temporary)


def read(folder: Path) -> Golden:
    """Read a golden folder; raises InputError for what is absent, damaged or of another format."""
    from safetensors.numpy import load_file

    problems = manifest.problems(folder)
    if problems:
        raise InputError(*(f"--against: {problem}" for problem in problems))
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise InputError(
                f"--against: {folder / RECORD} has format {record['format']}, this version of msft reads {FORMAT}: "
                "record it again with the same version on both machines"
            )
        samples = load_file(folder / SAMPLES)
        observations = {stage: _observation(stage, record["stages"][stage], samples) for stage in STAGES}
        return Golden(f"{record['label']} (recorded)", record["steps"], record["versions"], observations)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--against: {folder} is no golden folder ({type(error).__name__}: {error})") from error


def _numbers(print_: Fingerprint) -> dict:
    fields = {name: getattr(print_, name) for name in ("sha256", "norm", "mean", "largest")}
    return {"shape": list(print_.shape), **fields}


def _observation(stage: str, record: dict, samples: dict) -> Observation:
    arrays = {
        name: Fingerprint(**{**entry, "shape": tuple(entry["shape"])}, sample=samples[f"{stage}/{name}"])
        for name, entry in record["tensors"].items()
    }
    return Observation(record["facts"], record["numbers"], record["checks"], arrays, record["notes"])
