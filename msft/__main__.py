"""`python -m msft` is the `msft` command."""

from msft.cli.main import main
from msft.launch.leave import leave

if __name__ == "__main__":
    leave(main())
