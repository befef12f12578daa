"""`python -m msft` is the `msft` command."""

import sys

from msft.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
