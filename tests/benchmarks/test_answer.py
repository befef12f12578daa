"""Protects the arithmetic of the bench: medians, ratios, on which side of a limit a bar is met, the tables."""

import json

import pytest

from benchmarks.common.answer import Answer, Figure, Verdict, absolute, compare, compare_peaks
from benchmarks.common.report import draw, figures_table, share, table, verdicts_table, write_json
from benchmarks.common.training import Training, figure

MEGA = 1 << 20
OURS = Figure("ours", "tokens/s", [250.0, 240.0, 290.0], [300 * MEGA, 100 * MEGA, 200 * MEGA], 1.5)
PEER = Figure("peer", "tokens/s", [100.0, 125.0, 90.0], [400 * MEGA], 1.25)


def test_a_figure_is_the_median_of_its_repeats():
    assert OURS.value == 250 and PEER.value == 100
    assert OURS.peak == 200 * MEGA
    assert Figure("two", "s", [1.0, 2.0]).value == 1.5 and Figure("two", "s", [1.0]).peak is None


@pytest.mark.parametrize(("limit", "met"), [(2.4, True), (2.5, True), (2.6, False)])
def test_a_rate_must_reach_its_limit(limit, met):
    verdict = compare("speed", OURS, PEER, limit, at_least=True)
    assert verdict.ratio == 2.5 and verdict.met is met
    assert verdict.losses == (1.5, 1.25) and verdict.peaks == (200 * MEGA, 400 * MEGA)


@pytest.mark.parametrize(("limit", "met"), [(0.4, False), (0.5, True), (0.6, True)])
def test_memory_must_stay_below_its_limit(limit, met):
    verdict = compare_peaks("memory", OURS, PEER, limit)
    assert (verdict.ours, verdict.peer, verdict.ratio) == (200, 400, 0.5) and verdict.met is met


def test_a_bar_without_a_peer_is_the_value_itself():
    assert absolute("help", 0.1, "s", 0.15).met and not absolute("help", 0.2, "s", 0.15).met
    assert absolute("share", 81, "%", 80, at_least=True).met and not absolute("share", 79, "%", 80, at_least=True).met


def test_how_far_a_bar_is_met_is_above_one_on_its_right_side():
    assert share(compare("speed", OURS, PEER, 1.25, at_least=True)) == 2
    assert share(absolute("help", 0.2, "s", 0.1)) == 0.5
    assert share(absolute("growth", 0.0, "", 1.1)) == share(absolute("growth", -0.2, "", 1.1)) == 100


def test_tokens_per_second_leave_the_first_step_out():
    steps = [{"seconds": 9.0, "tokens": 10, "loss": 4.0}, {"seconds": 2.0, "tokens": 30, "loss": 2.0}]
    run = Training([*steps, {"seconds": 3.0, "tokens": 20, "loss": 1.5}], 5 * MEGA)
    assert run.tokens_per_second == (30 + 20) / (2.0 + 3.0) == 10
    assert run.step_seconds == 2.5 and run.loss == 2.5
    shown = figure("run", [run])
    assert (shown.value, shown.peak, shown.loss) == (10, 5 * MEGA, 2.5)


def test_tables_line_up_and_show_both_sides():
    assert table(("a", "b"), [("xyz", "1"), ("", "22")]) == "| a   | b  |\n| --- | -- |\n| xyz | 1  |\n|     | 22 |"
    (_, _, row) = verdicts_table([compare("speed", OURS, PEER, 3.0, at_least=True)]).splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "speed",
        "250 tokens/s",
        "100 tokens/s",
        "2.5",
        ">= 3",
        "NOT MET",
        "1.5000 / 1.2500",
        "200 MB / 400 MB",
    ]
    (_, _, row) = figures_table([OURS]).splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["ours", "250 tokens/s", "240 to 290", "200 MB", "1.5000"]


def test_json_keeps_every_number_and_what_follows(tmp_path):
    verdict = Verdict("speed", 250, 100, "tokens/s", 3, True)
    answer = Answer("how fast?", [OURS, PEER], [verdict], ["a note"], {"ours": [1, 2, 3]})
    write_json(tmp_path / "results.json", {"speed": answer}, {"cores": 2})
    read = json.loads((tmp_path / "results.json").read_text())
    assert read["machine"] == {"cores": 2}
    kept = read["questions"]["speed"]
    assert kept["raw"] == {"ours": [1, 2, 3]} and kept["figures"][0]["values"] == [250, 240, 290]
    assert kept["verdicts"][0]["ratio"] == 2.5 and kept["verdicts"][0]["met"] is False


def test_the_picture_is_a_png(tmp_path):
    answer = Answer("how fast?", [], [absolute("help", 0.1, "s", 0.15), absolute("error", 0.9, "s", 0.3)])
    draw(tmp_path / "ratios.png", {"startup": answer})
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")
