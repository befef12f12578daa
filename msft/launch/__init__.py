"""Several processes: msrun for MindSpore, torchrun for PyTorch, watched so that they all end when one fails."""

# The environment variable in which a job's processes find the command that goes on with the whole job after a stop.
RESUME_COMMAND = "MSFT_RESUME_COMMAND"
