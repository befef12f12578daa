"""`python run_finetune.py --config X.yaml ...` is `msft train X.yaml ...`."""

import sys

from msft.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
