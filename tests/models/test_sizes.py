"""Protects the table of published sizes: what is counted from each config is what was published of the model."""

import pytest

from msft.errors import InputError
from msft.models.catalog import parameters
from msft.models.families import FAMILIES, spec_from_hf
from msft.models.sizes import SIZES, config_of, published

# Counted by others: KerasHub's presets, safetensors' headers on Hugging Face, the Pythia paper, Baichuan's page. Tied
# heads count once, OPT's two unused rows of positions count.
PUBLISHED = {
    "llama": {
        "llama2-7b": 6_738_415_616,
        "llama2-13b": 13_015_864_320,
        "llama2-70b": 68_976_648_192,
        "llama3-8b": 8_030_261_248,
        "llama3-70b": 70_553_706_496,
        "llama3.1-8b": 8_030_261_248,
        "llama3.1-70b": 70_553_706_496,
        "llama3.2-1b": 1_235_814_400,
        "llama3.2-3b": 3_212_749_824,
        "vicuna-7b": 6_738_415_616,
        "vicuna-13b": 13_015_864_320,
        "yi-6b": 6_061_035_520,
        "yi-34b": 34_388_917_248,
        "tinyllama-1.1b": 1_100_048_384,
        "smollm2-135m": 134_515_008,
    },
    "mistral": {"7b-v0.1": 7_241_732_096, "7b-v0.3": 7_248_023_552},
    "qwen2": {
        "0.5b": 494_032_768,
        "1.5b": 1_543_714_304,
        "3b": 3_085_938_688,
        "7b": 7_615_616_512,
        "14b": 14_770_033_664,
        "32b": 32_763_876_352,
        "72b": 72_706_203_648,
        "qwen1.5-7b": 7_721_324_544,
    },
    "qwen3": {
        "0.6b": 596_049_920,
        "1.7b": 1_720_574_976,
        "4b": 4_022_468_096,
        "8b": 8_190_735_360,
        "14b": 14_768_307_200,
        "32b": 32_762_123_264,
    },
    "mixtral": {"8x7b": 46_702_792_704},
    "qwen2_moe": {"1.5-a2.7b": 14_315_784_192},
    "qwen3_moe": {"30b-a3b": 30_532_122_624},
    "gemma": {"2b": 2_506_172_416, "7b": 8_537_680_896},
    "gemma2": {"2b": 2_614_341_888, "9b": 9_241_705_984, "27b": 27_227_128_320},
    "baichuan": {"1-7b": 7_000_559_616, "1-13b": 13_264_901_120},
    "phi3": {
        "3-mini": 3_821_079_552,
        "3-medium": 13_960_238_080,
        "3-mini-128k": 3_821_079_552,
        "3-medium-128k": 13_960_238_080,
        "3.5-mini": 3_821_079_552,
        "4": 14_659_507_200,
    },
    "gpt2": {"124m": 124_439_808, "355m": 354_823_168, "774m": 774_030_080, "1.5b": 1_557_611_200},
    "gpt_neox": {
        "70m": 70_426_624,
        "160m": 162_322_944,
        "410m": 405_334_016,
        "1b": 1_011_781_632,
        "1.4b": 1_414_647_808,
        "2.8b": 2_775_208_960,
        "6.9b": 6_857_302_016,
        "12b": 11_846_072_320,
    },
    "opt": {"125m": 125_239_296, "1.3b": 1_315_758_080},
    "mamba": {
        "130m": 129_135_360,
        "370m": 371_516_416,
        "790m": 793_204_224,
        "1.4b": 1_372_178_432,
        "2.8b": 2_768_345_600,
    },
    "mamba2": {"codestral-7b": 7_285_403_648},
    "chatglm1": {"6b": 6_173_286_400},
    "t5": {
        "small": 60_506_624,
        "base": 222_903_552,
        "large": 737_668_096,
        "3b": 2_851_598_336,
        "11b": 11_307_321_344,
        "flan-small": 76_961_152,
        "flan-base": 247_577_856,
        "flan-large": 783_150_080,
        "flan-xl": 2_849_757_184,
        "flan-xxl": 11_135_332_352,
    },
    "bloom": {"560m": 559_214_592, "1b1": 1_065_314_304, "1b7": 1_722_408_960, "3b": 3_002_557_440},
}
# Published in words alone, in billions.
ROUNDED = {
    "llama": {"chinese-alpaca2-7b": 6.93, "chinese-alpaca2-13b": 13.25},
    "qwen2": {"qwen1.5-1.8b": 1.84, "qwen1.5-14b": 14.2, "qwen1.5-72b": 72.3},
    "internlm": {"7b": 7.3, "20b": 20.1},
    "internlm2": {"7b": 7.74, "20b": 19.9},
    "internlm3": {"8b": 8.80},
    "baichuan": {"2-7b": 7.5, "2-13b": 13.9},
    "chatglm": {"2-6b": 6.24, "3-6b": 6.24, "4-9b": 9.4},
    "glm": {"9b": 9.4},
    "glm4": {"9b": 9.4, "32b": 32.6},
    "opt": {"2.7b": 2.65, "6.7b": 6.66, "13b": 12.85},
    "bloom": {"7b1": 7.07},
    "mamba2": {"130m": 0.129, "370m": 0.37, "780m": 0.78, "1.3b": 1.344, "2.7b": 2.7},
    "falcon": {"7b": 6.92, "40b": 41.3},
    "mixtral": {"8x22b": 141},
    "qwen2_moe": {"57b-a14b": 57.4},
    "qwen3_moe": {"235b-a22b": 235},
}
ALL = [(family, size) for family, sizes in SIZES.items() for size in sizes]


def counted(family, size):
    return parameters(spec_from_hf(config_of(family, published(family, size))))


@pytest.mark.parametrize(("family", "size"), ALL)
def test_parameters_are_those_published(family, size):
    if size in PUBLISHED.get(family, ()):
        assert counted(family, size) == PUBLISHED[family][size]
    else:
        assert counted(family, size) / 1e9 == pytest.approx(ROUNDED[family][size], rel=6e-3)


def test_every_family_has_sizes_and_they_are_what_transformers_reads():
    """transformers' config class takes each, as its own name of the family, and keeps the numbers."""
    from transformers import AutoConfig

    assert SIZES.keys() == FAMILIES.keys()
    for family, size in ALL:
        if FAMILIES[family].native or FAMILIES[family].is_ported:
            continue
        config = config_of(family, published(family, size))
        theirs, spec = AutoConfig.for_model(**config), spec_from_hf(config)
        assert theirs.num_hidden_layers == spec.num_hidden_layers and theirs.hidden_size == spec.hidden_size
        heads = getattr(theirs, "num_attention_heads", 0)
        assert heads == spec.num_attention_heads and theirs.vocab_size == spec.vocab_size


def test_an_unknown_size_says_which_there_are():
    with pytest.raises(InputError, match=r"--size: qwen2 has no size '7', did you mean '7b'\? \(known: 0.5b, 1.5b, "):
        published("qwen2", "7")
