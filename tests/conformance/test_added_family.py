"""Protects the worked example of docs/adding_a_family.md: its file adds a family to both engines as it stands there."""

import re
from types import ModuleType

import pytest

from msft.models.families import FAMILIES
from tests.conformance import families, test_families
from tests.conformance.tiny_engines import ENGINES
from tests.launch.jobs import ROOT

PAGE = ROOT / "docs" / "adding_a_family.md"
CONFIG = {**families.LIKE_LLAMA, "model_type": "stablelm", "use_qkv_bias": True, "partial_rotary_factor": 0.5}
KINDS = {"one after the other": CONFIG, "parallel": {**CONFIG, "use_parallel_residual": True}}


@pytest.fixture
def added(monkeypatch):
    """The family that the page's file describes, known as the others are."""
    file = re.search(r'```python\n("""StableLM.*?)```', PAGE.read_text(), re.DOTALL)[1]
    module = ModuleType("stablelm")
    exec(compile(file, str(PAGE), "exec"), vars(module))
    monkeypatch.setitem(FAMILIES, module.FAMILY.model_type, module.FAMILY)
    for kind, config in KINDS.items():
        monkeypatch.setitem(families.CONFIGS, kind, config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_file_on_the_page_is_a_family(added, engine, kind):
    test_families.test_logits_and_gradients_are_transformers(kind, engine)
