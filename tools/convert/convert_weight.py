"""`python tools/convert/convert_weight.py ...` is the `convert_weight` command, without installation."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from msft.cli.convert_weight import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
