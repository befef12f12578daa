"""The PyTorch engine: transformers and peft under msft's own loop."""
