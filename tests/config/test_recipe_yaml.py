"""The YAML reader: the same data as PyYAML, the right line for every key, and nothing harmful or endless."""

import time

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from msft.config.yaml_lines import MAX_BYTES, parse_value, read_yaml, write_yaml
from msft.errors import InputError


def read(tmp_path, text: str):
    path = tmp_path / "a.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_yaml(path)


def refused(tmp_path, text) -> str:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    return str(caught.value).replace(str(tmp_path) + "/", "")


NUMBERS = {
    "1.e-5": 1e-5,
    "1e-5": 1e-5,
    "1.E-4": 1e-4,
    "1E4": 1e4,
    ".5": 0.5,
    "1.0e+3": 1e3,
    "-1.5": -1.5,
    "+3": 3,
    "1_000": 1000,
    "0x10": 16,
    "-1": -1,
    "0": 0,
}
TEXTS = ["010", "1:30", "2024-01-01", "1.2.3", "e5", "1e", "-", "0x", "12a", "1.e", "_1"]


@pytest.mark.parametrize("text,value", NUMBERS.items())
def test_numbers(tmp_path, text, value):
    found = read(tmp_path, f"a: {text}").data["a"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", TEXTS)
def test_what_only_looks_like_a_number_is_text(tmp_path, text):
    assert read(tmp_path, f"a: [{text}, {text}]").data["a"] == [text, text]


def test_lines_of_keys_and_values(tmp_path):
    document = read(tmp_path, "# comment\na: 1\nb:\n  c:\n    - x\n    -\n      d:\n        5\n")
    lines = {path: place.order for path, place in document.values.items()}
    assert lines[("a",)] == 2
    assert lines[("b", "c", 0)] == 5
    assert lines[("b", "c", 1, "d")] == 8
    assert document.keys[("b", "c", 1, "d")].order == 7
    assert document.place(("b", "c", "unknown")).order == 4
    assert document.place(("a",)).text.endswith("a.yaml:2")


def test_anchors_and_merges_keep_the_line_where_a_key_is_written(tmp_path):
    text = "base: &base\n  x: 1\n  y: 2\nmore: &more {z: 3, x: 9}\nc:\n  <<: [*base, *more]\n  y: 5\nd: *base\n"
    document = read(tmp_path, text)
    assert document.data["c"] == {"x": 1, "y": 5, "z": 3} == yaml.safe_load(text)["c"]
    assert document.data["d"] == {"x": 1, "y": 2}
    assert document.data["d"] is not document.data["base"]
    assert document.keys[("c", "x")].order == 2
    assert document.keys[("c", "y")].order == 7
    assert document.keys[("d", "x")].order == 2


def test_a_repeated_key_names_both_lines(tmp_path):
    document = read(tmp_path, "a: 1\nb: {c: 1,\n  c: 2}\na: 3\n")
    found = [str(problem).replace(str(tmp_path) + "/", "") for problem in document.problems]
    assert sorted(found) == [
        "a.yaml:3: b.c: stands twice (first in line 2)",
        "a.yaml:4: a: stands twice (first in line 1)",
    ]


def test_keys_that_are_no_text_and_tags_are_problems(tmp_path):
    text = "1: a\non: b\n? [x]\n: c\nd: !!python/object/apply:os.system [ls]\ne: !!binary aGk=\nf: !!int x\n"
    text += "g: !!set {a}\n"
    document = read(tmp_path, text)
    assert [problem.place.order for problem in document.problems] == [1, 2, 3, 5, 6, 7, 8]
    assert document.problems[3].message == (
        "the tag 'tag:yaml.org,2002:python/object/apply:os.system' is not allowed in a recipe"
    )


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "a.yaml: the file holds no keys"),
        ("# nothing\n", "a.yaml: the file holds no keys"),
        ("- a\n", "a.yaml:1: the top level must be a block of keys"),
        ("a: 1\n---\nb: 2\n", "a.yaml:2: is no YAML: expected a single document in the stream"),
        ("a: 1\n b: 2\n", "a.yaml:2: is no YAML: mapping values are not allowed here"),
        ("a: *x\n", "a.yaml:1: is no YAML: found undefined alias 'x'"),
        ("a: 1\nb: \x07\n", "a.yaml:2: is no YAML: the character"),
        ("a: {\n", "a.yaml:2: is no YAML: while parsing a flow node, expected the node content, but found"),
        (b"a: 1\nb: \xff\n", "a.yaml:2: is not UTF-8 text"),
        ("a: &x [*x]\n", "a.yaml:1: the recipe is too large or too deep"),
        ("a: &x {<<: *x}\n", "a.yaml:1: '<<' merges a block into itself, or too many"),
        ("a: " + "[" * 5000, "a.yaml: is no YAML that can be read (nested too deeply"),
        ("a: " + "[" * 60 + "]" * 60, "a.yaml:1: the recipe is too large or too deep"),
        ("a: '" + "x" * MAX_BYTES + "'", "a.yaml: is larger than 256 KiB, so it is no recipe"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path, text, message):
    assert refused(tmp_path, text).startswith(message)


def test_alias_bombs_end_quickly(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    merges = ["b0: &b0 {x: 1}"] + [f"b{i}: &b{i} {{<<: [{', '.join([f'*b{i - 1}'] * 10)}]}}" for i in range(1, 12)]
    for bomb in (lines, merges):
        start = time.perf_counter()
        assert "too" in refused(tmp_path, "\n".join(bomb))
        assert time.perf_counter() - start < 2


def test_files_that_are_not_there(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path, "a\0b"):
        with pytest.raises(InputError):
            read_yaml(path)


DATA = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=8), DATA, min_size=1, max_size=5))
def test_what_is_written_is_read_back_here_and_by_pyyaml(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "written.yaml"
    text = write_yaml(data)
    assume(yaml.safe_load(yaml.safe_dump(data, allow_unicode=True)) == data)  # PyYAML loses some line breaks
    path.write_text(text, encoding="utf-8", newline="")
    document = read_yaml(path)
    assert document.problems == []
    assert document.data == data == yaml.safe_load(text)


@pytest.mark.parametrize(
    "text,value",
    [
        ("3", 3),
        ("1e-4", 1e-4),
        ("True", True),
        ("false", False),
        ("null", None),
        ("", ""),
        ("text", "text"),
        ("[1, a]", [1, "a"]),
        ("{a: 1}", {"a": 1}),
        (".*wq|.*wk", ".*wq|.*wk"),
        ("*wq", "*wq"),
        ("{path}/x.ckpt", "{path}/x.ckpt"),
        ("a: b", "a: b"),
        ("# no comment", "# no comment"),
        ("!!python/none x", "!!python/none x"),
        ("[1, 2", "[1, 2"),
    ],
)
def test_words_of_the_command_line(text, value):
    assert parse_value(text) == value


@pytest.mark.parametrize("sign", ["\x85", "\u2028", "\u2029", "\n", "\r", "\t", "\ufeff"])
def test_line_breaks_of_every_kind_survive_writing_and_reading(tmp_path, sign):
    data = {"key": f"a{sign}b", f"c{sign}": f"{sign} d", "list": [sign]}
    assert read(tmp_path, write_yaml(data)).data == data == yaml.safe_load(write_yaml(data))
