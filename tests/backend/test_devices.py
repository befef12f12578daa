"""Protects: the best device present is taken, and one that is absent is never replaced by another."""

import pytest

from msft.backend.devices import choose
from msft.errors import InputError

KINDS = ("npu", "cuda", "cpu")


@pytest.mark.parametrize(("here", "best"), [(("npu", "cpu"), "npu"), (("cuda", "cpu"), "cuda"), (("cpu",), "cpu")])
def test_auto_takes_the_best_present(here, best):
    assert choose("auto", KINDS, here.__contains__, "torch 2")[0] == best


def test_an_absent_or_unknown_device_is_an_error():
    with pytest.raises(InputError, match="device: 'npu' was asked for, but torch 2 sees none here"):
        choose("npu", KINDS, ("cpu",).__contains__, "torch 2")
    with pytest.raises(InputError, match="'cpuu' is unknown to torch 2, did you mean 'cpu'"):
        choose("cpuu", KINDS, ("cpu",).__contains__, "torch 2")
    assert choose("cpu", KINDS, ("cuda", "cpu").__contains__, "torch 2") == ("cpu", "asked for")
