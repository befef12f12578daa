"""One recipe, two engines: fine-tune language models on MindSpore and on PyTorch with the same result."""

__version__ = "0.1.0"
