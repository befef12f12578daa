"""Protects: answers stop at stop texts wherever these fall among tokens, and streamed pieces add up to the answer."""

import pytest

from msft.backend.contract import Sampling
from msft.predict.answers import Answerer


class Letters:
    """A tokenizer of one character a token."""

    def decode(self, ids, skip_special=True):
        return "".join(map(chr, ids))


class Scripted:
    """An engine that says fixed texts, one character a token, and obeys `on_token`."""

    def __init__(self, *texts):
        self.texts = texts

    def generate(self, prompts, sampling, on_token):
        answers = []
        for row, text in enumerate(self.texts):
            answers.append([])
            for letter in text:
                answers[-1].append(ord(letter))
                if on_token(row, ord(letter)):
                    break
        return answers


@pytest.mark.parametrize(
    "said,stops,expected",
    [
        ("red, blue. Green", ["."], "red, blue"),
        ("abcEND and more", ["END"], "abc"),
        ("abcEN", ["END"], "abcEN"),
        ("aENbEND", ["END"], "aENb"),
        ("aEEND", ["END"], "aE"),
        ("one\n\nHuman: two", ["Human:", "\n\n"], "one"),
        ("all of it", [], "all of it"),
        ("ENDing", ["END"], ""),
    ],
)
def test_an_answer_ends_before_its_stop_text(said, stops, expected):
    pieces = []
    answerer = Answerer(Scripted(said, said), Letters(), Sampling(), stops)
    assert answerer.answer([[1], [1]], pieces.append) == [expected, expected]
    assert "".join(pieces) == expected


def test_rows_are_counted_over_calls():
    class Recording(Scripted):
        def generate(self, prompts, sampling, on_token):
            rows.append(sampling.first_row)
            return super().generate(prompts, sampling, on_token)

    rows = []
    answerer = Answerer(Recording("a", "b"), Letters(), Sampling(first_row=10))
    answerer.answer([[1], [1]])
    answerer.answer([[1], [1]])
    assert rows == [10, 12]


def test_generation_goes_no_further_than_the_stop():
    engine = Scripted("yes. no")
    counted = []
    original = engine.generate

    def generate(prompts, sampling, on_token):
        answers = original(prompts, sampling, on_token)
        counted.extend(answers[0])
        return answers

    engine.generate = generate
    Answerer(engine, Letters(), Sampling(), ["."]).answer([[1]])
    assert len(counted) == len("yes.")
