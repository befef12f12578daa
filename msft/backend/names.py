"""Which parameters weight decay leaves alone."""


def is_norm_or_bias(name: str) -> bool:
    """Whether a parameter is a norm's weight or a bias, which AdamW does not decay unless asked."""
    return name.endswith(".bias") or "norm." in name
