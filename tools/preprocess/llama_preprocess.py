"""`python tools/preprocess/llama_preprocess.py ...` is the `msft llama_preprocess` command, without installation."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from msft.cli.llama_preprocess import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
