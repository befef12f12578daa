"""Protects how parity sums up what it sees of a step's gradients."""

from msft.parity.computation import by_layer


def test_gradients_are_summed_up_by_block_whatever_a_family_calls_it():
    """Key biases have no gradient but rounding, and must not stand alone."""
    names = ["model.decoder.layers.1.self_attn.k_proj.bias", "model.decoder.layers.1.fc1.weight"]
    assert by_layer(names) == {"model.decoder.layers.1": names}
    experts = ["model.layers.0.mlp.experts.3.up_proj.weight", "model.layers.0.mlp.gate.weight"]
    assert by_layer([*experts, "model.norm.weight"]) == {
        "model.layers.0": experts,
        "model.norm.weight": ["model.norm.weight"],
    }
    adapter = "base_model.model.transformer.h.11.attn.c_attn.lora_A.weight"
    assert by_layer([adapter]) == {"transformer.h.11": [adapter]}
