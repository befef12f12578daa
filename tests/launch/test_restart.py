"""A failed job is started again as long as it gets further."""

from pathlib import Path

import pytest

from msft.errors import RunError, Stopped
from msft.launch import restart
from msft.launch.layout import Layout
from msft.launch.report import JobFailed


class Job:
    """Attempts that go as they are told: each ends with the newest checkpoint's step, None is a success."""

    def __init__(self, *steps, again=True, began=True):
        self.steps, self.again, self.began = list(steps), again, began
        self.resumed, self.step = [], 0

    def attempt(self, resume):
        self.resumed.append(resume)
        step = self.steps.pop(0)
        if step is None:
            return
        self.step = step
        error = JobFailed("rank 1 failed", self.again)
        error.began = self.began
        raise error

    def run(self, max_restarts, layout=None):
        restart.run(self.attempt, lambda: self.step, max_restarts, layout or Layout(2, 2, log_dir=Path("no-logs")))


def test_without_restarts_a_failure_is_the_end():
    job = Job(10)
    with pytest.raises(JobFailed, match="^rank 1 failed$"):
        job.run(0)
    assert job.resumed == [False]


def test_a_success_is_the_end():
    job = Job(10, 20, None, 30)
    job.run(1)
    assert job.resumed == [False, True, True] and job.steps == [30]


@pytest.mark.parametrize(
    ("steps", "starts"), [((0, 0, 0), 3), ((5, 5, 5), 3), ((5, 5, 6, 6, 6), 5), ((9, 4, 9), 3), ((1, 2, 3, 3, 3), 5)]
)
def test_restarts_in_a_row_without_a_newer_checkpoint_end_it(steps, starts, capsys):
    """With two allowed: the start after which there is a third restart without progress is the last."""
    job = Job(*steps, 100)
    with pytest.raises(RunError, match="rank 1 failed; restarted .* 2 in a row without a newer checkpoint"):
        job.run(2)
    assert len(job.resumed) == starts
    told = capsys.readouterr().err
    assert told.count("; the cause: rank 1 failed") == starts - 1
    assert f"restart {starts - 1} (2 of 2 without progress)" in told


def test_a_job_that_never_came_to_train_is_not_resumed_from_an_older_runs_checkpoint():
    job = Job(50, 50, None, began=False)
    job.run(2)
    assert job.resumed == [False, False, False]


def test_bad_input_and_a_stop_are_not_tried_again():
    job = Job(10, None, again=False)
    with pytest.raises(JobFailed):
        job.run(5)
    assert job.resumed == [False]

    def stopped(resume):
        raise Stopped(15)

    with pytest.raises(Stopped):
        restart.run(stopped, lambda: 0, 5, Layout(2, 2))


def test_the_logs_of_each_attempt_are_kept(tmp_path):
    layout = Layout(2, 2, log_dir=tmp_path)
    job = Job(1, 2, None)

    def attempt(resume):
        for log in layout.logs:
            log.write_text(f"attempt {len(job.resumed)}")
        job.attempt(resume)

    restart.run(attempt, lambda: job.step, 1, layout)
    for number in (1, 2):
        for rank in range(2):
            assert (tmp_path / f"attempt-{number}" / f"worker_{rank}.log").read_text() == f"attempt {number - 1}"
    assert (tmp_path / "worker_0.log").read_text() == "attempt 2"
