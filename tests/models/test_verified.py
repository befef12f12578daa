"""Protects what `msft list` says was verified: each test that it names is there, and is of the families it says."""

import re
from pathlib import Path

import pytest

from msft.models.families import FAMILIES
from msft.models.verified import CHECKS, EVERY, checks_of
from tests.conformance.families import CONFIGS, OF_TRANSFORMERS, spec_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.what)
def test_every_named_test_is_there(check):
    path, name = check.test.split("::")
    text = (ROOT / path).read_text(encoding="utf-8")
    assert re.search(rf"^def {name}\(", text, flags=re.M)
    assert set(check.families) <= set(FAMILIES)


def test_what_holds_for_every_family_runs_over_every_family():
    """The tests of conformance run over CONFIGS, which has all families; the others over the registry or the sizes."""
    assert {spec_of(name).family for name in CONFIGS} == set(FAMILIES)
    for check in CHECKS:
        if check.families == EVERY:
            text = (ROOT / check.test.split("::")[0]).read_text(encoding="utf-8")
            assert re.search(r"families\.CONFIGS|\bCONFIGS\b|\bFAMILIES\b|\bSIZES\b|\bALL\b", text), check.test


def test_adapters_are_held_against_peft_where_transformers_has_the_family():
    (check,) = (check for check in CHECKS if check.what == "adapters")
    assert set(check.families) == {spec_of(name).family for name in OF_TRANSFORMERS}


def test_a_family_alone_has_its_own_checks_too():
    assert "joined tensors" in [check.what for check in checks_of("internlm2")]
    assert "joined tensors" not in [check.what for check in checks_of("llama")]
