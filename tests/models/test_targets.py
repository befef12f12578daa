"""Which modules LoRA tunes and which base parameters stay trainable, in either vocabulary."""

import re

import pytest

from msft.errors import InputError
from msft.models.families import spec_from_hf
from msft.models.llama import MINDFORMERS
from msft.models.shapes import tensor_shapes
from msft.models.targets import lora_modules, trained_adapters, tuned_parameters

SPEC = spec_from_hf(
    {
        "model_type": "llama",
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
)
LAYERS = range(SPEC.num_hidden_layers)


def attention(*names: str, layers=LAYERS) -> tuple[str, ...]:
    return tuple(f"model.layers.{layer}.self_attn.{name}" for layer in layers for name in names)


def mlp(*names: str, layers=LAYERS) -> tuple[str, ...]:
    return tuple(f"model.layers.{layer}.mlp.{name}" for layer in layers for name in names)


QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.mark.parametrize(
    "pattern,modules",
    {
        ".*wq|.*wk|.*wv|.*wo": attention(*QKVO),
        ".*wq|.*wv": attention("q_proj", "v_proj"),
        "wq": attention("q_proj"),
        ".*q_proj": attention("q_proj"),
        "q_proj|wk": attention("q_proj", "k_proj"),
        ".*w2": mlp("down_proj"),
        "w[13]$": mlp("gate_proj", "up_proj"),
        r"model\.layers\.3\.attention\.wq": attention("q_proj", layers=[3]),
        r"model\.layers\.1\.self_attn": attention(*QKVO, layers=[1]),
        r".*\.(1|11)\.self_attn\.[qk]_proj": attention("q_proj", "k_proj", layers=[1, 11]),
        r"model\.layers\.\d\.attention\.wo$": attention("o_proj", layers=range(10)),
        r".*\.feed_forward\.w1": mlp("gate_proj"),
        None: attention(*QKVO),
    }.items(),
)
def test_patterns_choose_by_leaf_or_path_in_both_vocabularies(pattern, modules):
    assert lora_modules(pattern, SPEC) == modules


def test_a_list_is_a_choice_and_order_is_the_models():
    assert lora_modules(["wo", "q_proj"], SPEC) == attention("q_proj", "o_proj")
    every = lora_modules(".*", SPEC)
    assert len(every) == 7 * 12 and every[:2] == attention("q_proj", "k_proj", layers=[0])


def test_leaf_patterns_choose_what_mindformers_chooses():
    """MindFormers walks the cells and takes a linear one when re.match(pattern, its own name)."""
    for pattern in (".*wq|.*wk|.*wv|.*wo", "w.*", ".*w[qv]", "wq$|w2", ".+o"):
        theirs = {leaf for leaf, cell in MINDFORMERS.leaves.items() if re.match(pattern, cell)}
        assert {module.rsplit(".", 1)[1] for module in lora_modules(pattern, SPEC)} >= theirs


@pytest.mark.parametrize(
    "exclude,modules",
    {
        ("wk", "v_proj"): attention("q_proj", "o_proj"),
        ("layers.0.*",): attention(*QKVO),
        (r"model\.layers\.0$",): attention(*QKVO, layers=range(1, 12)),
        (r"model\.layers\.[0-9]\.attention",): attention(*QKVO, layers=[10, 11]),
        ("0$",): attention(*QKVO, layers=range(1, 12)),
        ("feed_forward",): attention(*QKVO),
    }.items(),
)
def test_exclude_layers_takes_out_a_leaf_or_all_inside_a_block(exclude, modules):
    assert lora_modules(".*wq|.*wk|.*wv|.*wo", SPEC, exclude) == modules


KNOWN = (
    "there are q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj; "
    "in MindFormers' names wq, wk, wv, wo, w1, w3, w2"
)


@pytest.mark.parametrize(
    "pattern,exclude,messages",
    [
        ("query", (), [f"x: 'query' matches no module ({KNOWN})"]),
        (".*q_prj", (), [f"x: '.*q_prj' matches no module, did you mean 'q_proj'? ({KNOWN})"]),
        (
            ["wq", "wz", "k_prj"],
            (),
            [
                f"x: 'wz' matches no module ({KNOWN})",
                f"x: 'k_prj' matches no module, did you mean 'k_proj'? ({KNOWN})",
            ],
        ),
        ("[", (), ["x: '[' is no regular expression: unterminated character set at position 0"]),
        ("*wq", (), ["x: '*wq' is no regular expression: nothing to repeat at position 0"]),
        ([], (), [f"x: names no module ({KNOWN})"]),
        ("wq", ("wq",), [f"x: matches no module that exclude_layers leaves ({KNOWN})"]),
        ("wq", ("(",), ["x: '(' is no regular expression: missing ), unterminated subpattern at position 0"]),
    ],
)
def test_patterns_that_match_nothing_or_are_broken_say_what_exists(pattern, exclude, messages):
    with pytest.raises(InputError) as caught:
        lora_modules(pattern, SPEC, exclude, where="x")
    assert list(caught.value.problems) == messages


ALL = tuple(tensor_shapes(SPEC))


def test_lora_freezes_the_base_and_full_tuning_trains_it():
    assert tuned_parameters(SPEC) == ()
    assert tuned_parameters(SPEC, lora=False) == ALL


@pytest.mark.parametrize(
    "include,exclude,free",
    [
        ([], ["*norm*"], [name for name in ALL if "norm" in name]),
        ([], ["*lm_head*", "*tok_embeddings*"], ["model.embed_tokens.weight", "lm_head.weight"]),
        ([], ["model.layers.3.*"], [name for name in ALL if name.startswith("model.layers.3.")]),
        ([], ["*.attention_norm.weight"], [name for name in ALL if "input_layernorm" in name]),
        (["*.3.*"], ["*norm*"], [name for name in ALL if "norm" in name and ".3." not in name]),
        (["*norm*"], ["*norm*"], []),
        (["*lora*"], ["model.norm*"], ["model.norm.weight"]),
        ([], ["*mindpet_delta_lora*"], []),
    ],
)
def test_freeze_patterns_are_shell_patterns_in_either_vocabulary(include, exclude, free):
    assert list(tuned_parameters(SPEC, include, exclude)) == free


def test_freeze_follows_mindpets_rule_for_each_parameter():
    """mindpet: include and not exclude freezes, exclude and not include frees, both or none changes nothing."""
    from fnmatch import fnmatch

    include, exclude = ["*wq*", "*.1?.*"], ["*attention.w*", "*.11.*"]
    free = []
    for name in ALL:
        theirs, trained = MINDFORMERS.write(name), False
        frozen, freed = (any(fnmatch(theirs, pattern) for pattern in patterns) for patterns in (include, exclude))
        if frozen and not freed:
            trained = False
        elif freed and not frozen:
            trained = True
        if trained:
            free.append(name)
    assert list(tuned_parameters(SPEC, include, exclude)) == free


def test_a_freeze_pattern_that_matches_nothing_is_an_error():
    names = "model.layers.0.self_attn.q_proj.weight or model.layers.0.attention.wq.weight"
    hint = f"names look like {names}, * stands for any text"
    with pytest.raises(InputError) as caught:
        tuned_parameters(SPEC, ["norms"], ["*heads*"], where=("a", "b"))
    assert list(caught.value.problems) == [
        f"a: 'norms' matches no parameter ({hint})",
        f"b: '*heads*' matches no parameter ({hint})",
    ]
    with pytest.raises(InputError):
        tuned_parameters(SPEC, [], ["*lora_A*"], lora=False)


def test_frozen_adapters_are_left_out():
    modules = attention("q_proj", "k_proj")
    assert trained_adapters(modules, SPEC) == modules
    assert trained_adapters(modules, SPEC, ["*.wq.*"]) == attention("k_proj")
    assert trained_adapters(modules, SPEC, ["*layers.0.*"]) == attention("q_proj", "k_proj", layers=range(1, 12))
    assert trained_adapters(modules, SPEC, ["*"], ["*lora*"]) == modules
    for patterns, message in ((["*"], "freezes all adapters"), (["*lora_a"], "only one of the two matrices")):
        with pytest.raises(InputError, match=message):
            trained_adapters(modules, SPEC, patterns)
