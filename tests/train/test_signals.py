"""The first signal is a request, the second ends at once, and afterwards all is as before."""

import os
import signal
import threading

import pytest

from msft.errors import Stopped
from msft.train.signals import StopRequests


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_then_an_end(number, capfd):
    # A shell's background job, as these tests may be, ignores SIGINT.
    own = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    found = signal.signal(number, own)
    try:
        check_request(number, capfd)
    finally:
        signal.signal(number, found)


def check_request(number, capfd):
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped, StopRequests() as requests:
        assert requests.asked == 0
        os.kill(os.getpid(), number)
        assert requests.asked == number
        assert f"{number.name}: this step is finished and saved" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.exit_code == 143
    assert signal.getsignal(number) == before


def test_what_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequests() as requests:
            os.kill(os.getpid(), signal.SIGINT)
            assert requests.asked == 0
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_change_nothing():
    found = []

    def body():
        with StopRequests():
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [before]
