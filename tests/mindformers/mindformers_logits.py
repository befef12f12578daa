"""Comparing models by their logits on the same ids."""

import numpy as np


def transformers_logits(folder, ids, adapter=None) -> np.ndarray:
    """Return what transformers computes with a Hugging Face folder, and peft with an adapter on it."""
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(torch.tensor(ids, dtype=torch.int64)).logits.numpy()


def assert_same_on_real_tokens(theirs, ours, tiny, atol=2e-5) -> None:
    """Compare two trained models' logits, and be sure that training moved them away from the start's."""
    real = tiny.ids != 0
    assert np.abs(theirs - tiny.logits)[real].max() > 0.05, "training changed nothing"
    np.testing.assert_allclose(ours[real], theirs[real], atol=atol)
