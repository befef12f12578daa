"""Reading a recipe needs no framework and little time; msft.config stands at the bottom of the house."""

import subprocess
import sys

from recipe_texts import MINIMAL

HEAVY = ("torch", "mindspore", "transformers", "peft", "numpy", "msft.backend", "msft.models", "rich")


def modules_after(tmp_path, text: str) -> tuple[set[str], float]:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    script = (
        "import sys\n"
        "from msft.config.load import load_recipe\n"
        "from msft.errors import InputError\n"
        f"try: load_recipe({str(path)!r}, ['--epochs', '3'])\n"
        "except InputError as error: print(error, file=sys.stderr)\n"
        "import resource\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_utime + resource.getrusage(resource.RUSAGE_SELF).ru_stime)\n"
        "print(*sys.modules)\n"
    )
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True) for _ in range(3)
    ]
    seconds = min(float(run.stdout.splitlines()[0]) for run in runs)
    return set(runs[0].stdout.splitlines()[1].split()), seconds


def test_a_good_and_a_bad_recipe_are_read_without_frameworks_in_a_moment(tmp_path):
    for text in (MINIMAL, MINIMAL + "sed: 3\n"):
        modules, seconds = modules_after(tmp_path, text)
        assert not modules & set(HEAVY)
        assert "msft.config.schema" in modules
        assert seconds < 0.3
