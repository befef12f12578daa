"""The PyTorch engine: transformers and peft under msft's own loop."""

import warnings

# peft asks transformers for an attribute under its old name; the user can do nothing about it.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
