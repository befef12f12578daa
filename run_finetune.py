"""`python run_finetune.py --config X.yaml ...` is `msft train X.yaml ...`."""

from msft.cli.train import main
from msft.launch.leave import leave

if __name__ == "__main__":
    leave(main())
