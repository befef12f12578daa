"""Several processes: msrun for MindSpore, torchrun for PyTorch, watched so that they all end when one fails."""

import os

# The environment variable in which a job's processes find the command that goes on with the whole job after a stop.
RESUME_COMMAND = "MSFT_RESUME_COMMAND"
# The folder for records; without it (a command line pasted from a dry run) nothing is written down.
RECORDS = "MSFT_LAUNCH_RECORDS"


def rank_name() -> str:
    """Return what this process is called, from the environment that msrun or torchrun gave it."""
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        return "scheduler"
    return f"worker_{os.environ.get('RANK_ID') or os.environ.get('RANK') or 0}"
