"""Protects the README's table of layouts to verify: each row's flags are a layout of the command's 8 processes."""

import pytest

from msft.config import derive, semi_auto
from msft.config.layout import Layout, layout
from msft.config.load import load_recipe
from tests.cli.readme import LAYOUTS, ROOT

EXPECTED = (
    Layout(8),
    Layout(8),
    Layout(1, 8, sequence=True, vocabulary=True),
    Layout(4, context=2),
    Layout(4, pipeline=2),
    Layout(8, strategy="fsdp"),
    Layout(2, 4, "fsdp"),
    Layout(8, strategy="deepspeed"),
    Layout(2, 4),
)


@pytest.mark.parametrize(("flags", "expected"), zip(LAYOUTS, EXPECTED, strict=True), ids=LAYOUTS)
def test_the_flags_are_a_layout_of_eight_processes(flags, expected):
    path = ROOT / "configs" / "llama2" / "finetune_llama2_7b.yaml"
    recipe = load_recipe(path, [*flags.split(), "--model.model_config.num_layers", "2", "--use_parallel", "True"])
    spec = derive.model_spec(recipe)
    assert layout(recipe, spec, 8) == expected
    assert semi_auto.is_asked(recipe, 8) == ("parallel_mode" in flags)
