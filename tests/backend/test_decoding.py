"""Protects: how tokens are chosen and when generation stops, on hand-made logits."""

from dataclasses import replace

import numpy as np

from msft.backend import decoding
from msft.backend.contract import Sampling
from msft.backend.decoding import choose, generate


class Scripted:
    """A session whose row r says token script[r][n] at its n-th step."""

    bucket = 4

    def __init__(self, script):
        self.script, self.step = script, 0

    def _logits(self):
        logits = np.zeros((len(self.script), 10), np.float32)
        for row, tokens in enumerate(self.script):
            logits[row, tokens[min(self.step, len(tokens) - 1)]] = 1
        self.step += 1
        return logits

    def prefill(self, input_ids, padding):
        self.input_ids, self.padding = input_ids, padding
        return self._logits()

    def decode(self, tokens):
        return self._logits()


def test_prompts_are_left_padded_to_the_bucket():
    session = Scripted([[1], [1]])
    generate(session, [[5, 6, 7, 8, 9], [3]], Sampling(max_new_tokens=1))
    assert session.input_ids.tolist() == [[0, 0, 0, 5, 6, 7, 8, 9], [0, 0, 0, 0, 0, 0, 0, 3]]
    assert session.padding.tolist() == [3, 7]


def test_a_row_ends_at_its_stop_id_which_is_not_returned_while_others_go_on():
    answers = generate(Scripted([[1, 2, 9, 5], [3, 9, 4, 4], [6, 6, 6, 6]]), [[1]] * 3, Sampling(4, stop_ids=(9,)))
    assert answers == [[1, 2], [3], [6, 6, 6, 6]]


def test_a_row_ends_where_the_caller_says_so_with_that_token_kept():
    seen = []

    def on_token(row, token):
        seen.append((row, token))
        return token == 2

    assert generate(Scripted([[1, 2, 3], [4, 5, 6]]), [[1], [1]], Sampling(3), on_token) == [[1, 2], [4, 5, 6]]
    assert seen == [(0, 1), (1, 4), (0, 2), (1, 5), (1, 6)]


def test_rows_draw_the_same_however_they_are_dealt_to_batches():
    class Flat(Scripted):
        def _logits(self):
            return np.zeros((len(self.script), 10), np.float32)

    sampling = Sampling(8, temperature=1.0, seed=7)
    whole = generate(Flat([[0]] * 3), [[1]] * 3, sampling)
    parts = [generate(Flat([[0]]), [[1]], replace(sampling, first_row=row))[0] for row in range(3)]
    assert whole == parts and len(set(map(tuple, whole))) == 3


def test_the_largest_random_number_draws_a_token():
    class Largest:
        def random(self):
            return float(np.nextafter(1, 0))

    for seed in range(20):
        logits = np.random.default_rng(seed).normal(0, 3, 49152).astype(np.float32)
        chosen = choose(logits, Sampling(temperature=0.7), Largest())
        assert (logits < logits[chosen]).mean() < 0.5


def test_top_k_and_top_p_keep_the_likely_tokens_and_temperature_flattens():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    generator = np.random.default_rng(0)

    def shares(**settings):
        sampling = Sampling(temperature=settings.pop("temperature", 1.0), **settings)
        drawn = [choose(logits, sampling, generator) for _ in range(4000)]
        return np.bincount(drawn, minlength=4) / 4000

    assert np.abs(shares() - [0.5, 0.3, 0.15, 0.05]).max() < 0.04
    assert np.abs(shares(top_k=2) - [0.625, 0.375, 0, 0]).max() < 0.04
    # 0.5 alone is below 0.7, so the second is kept too: the smallest set that reaches top_p.
    assert np.abs(shares(top_p=0.7) - [0.625, 0.375, 0, 0]).max() < 0.04
    flat = np.array([0.5, 0.3, 0.15, 0.05]) ** 0.5
    assert np.abs(shares(temperature=2.0) - flat / flat.sum()).max() < 0.04
    assert choose(logits, Sampling(), generator) == 0


class Counting:
    """A session that says which tokens it was given."""

    bucket = 2

    def __init__(self, room, log):
        self.log = log
        log.append(f"room {room}")

    def prefill(self, input_ids, padding):
        self.log.append([ids[start:].tolist() for ids, start in zip(input_ids, padding, strict=True)])
        return np.eye(8)[[1] * len(input_ids)]

    def decode(self, tokens):
        self.log.append(tokens.tolist())
        return np.eye(8)[(tokens + 1) % 8]


def test_a_session_begins_anew_where_a_text_crosses_the_border():
    """Prompts of 2 and 1 tokens and a border at 4: the first crosses it with its third new token, then the second."""
    log = []
    session = decoding.BegunAnew(lambda room: Counting(room, log), 5, 4)
    answers = generate(session, [[7, 7], [6]], Sampling(max_new_tokens=5))
    assert log[:4] == ["room 5", [[7, 7], [6]], [1, 1], [2, 2]]
    assert log[4:6] == ["room 2", [[7, 7, 1, 2, 3], [6, 1, 2, 3]]]
    assert log[6:] == ["room 1", [[7, 7, 1, 2, 3, 1], [6, 1, 2, 3, 1]]]
    assert answers == [[1, 2, 3, 1, 1]] * 2
