"""`python tools/preprocess/alpaca_converter.py ...` is the `msft alpaca_converter` command, without installation."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from msft.cli.alpaca_converter import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
