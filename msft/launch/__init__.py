"""Several processes: msrun for MindSpore, torchrun for PyTorch, watched so that they all end when one fails."""
