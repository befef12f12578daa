"""Layouts that cannot be are refused, and the port is free before anything starts."""

import socket

import pytest

from msft.errors import InputError
from msft.launch.layout import Layout, check, choose_port


@pytest.fixture
def taken():
    """A port that somebody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("layout", "problem"),
    [
        (Layout(0, 0), "0 processes: there must be 1 or more"),
        (Layout(4, 3), "4 processes cannot be dealt to machines with 3 each"),
        (Layout(2, 4), "2 processes cannot be dealt to machines with 4 each"),
        (Layout(4, 2, node_rank=2), "node rank 2: 4 processes, 2 on each machine, are 2 machines, numbered from 0"),
        (Layout(2, 2, master_port=70000), "port 70000: ports are numbers from 1 to 65535"),
        (Layout(2, 2, timeout=0), "0 seconds: there must be 1 or more"),
        (Layout(4, 2, master_addr="no-such-host.invalid"), "no-such-host.invalid: no machine of this name"),
    ],
)
def test_impossible_layouts(layout, problem):
    with pytest.raises(InputError, match=problem):
        check(layout)


def test_possible_layouts():
    for layout in (Layout(1, 1), Layout(8, 8), Layout(8, 2, node_rank=3, master_addr="localhost", master_port=1)):
        check(layout)


def test_a_port_in_use_is_refused_with_a_free_one(taken):
    with pytest.raises(InputError, match=f"port {taken} is in use on this machine.* choose another, (\\d+) is free"):
        choose_port(Layout(2, 2, master_port=taken))


def test_a_default_port_in_use_is_replaced_on_one_machine_only(taken, monkeypatch):
    monkeypatch.setattr("msft.launch.layout.DEFAULT_PORT", taken)
    assert choose_port(Layout(2, 2)) != taken
    with pytest.raises(InputError, match="in use"):
        choose_port(Layout(4, 2))


def test_the_port_is_the_first_machines_business_and_nobodys_for_one_process(taken):
    assert choose_port(Layout(4, 2, master_port=taken, node_rank=1)) == taken
    assert choose_port(Layout(1, 1, master_port=taken)) == taken
