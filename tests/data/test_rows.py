"""Chunks cover every row exactly once with its number, for any chunk size, and broken files are named."""

import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msft.data.formats import BadRow
from msft.data.rows import chunks, find_files, rows
from msft.errors import InputError

VALUES = [{"a": 'b] , } \\ " [{'}, [], [[1], {}], "x]", 12345, None, {"ü": "你好 😀 \u2028"}, -1.5e3, {"a": {"b": [1]}}]


def read(path, size):
    return [row for chunk in chunks(str(path), size) for row in rows(chunk)]


@pytest.mark.parametrize("style", [{}, {"indent": 2}, {"ensure_ascii": False}, {"separators": (",", ":")}])
@pytest.mark.parametrize("size", [1, 3, 64, 100_000])
def test_json_list(tmp_path, style, size):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(VALUES * 3, **style), encoding="utf-8")
    assert read(path, size) == list(enumerate(VALUES * 3))


@pytest.mark.parametrize("size", [1, 3, 64, 100_000])
def test_json_lines_with_blank_lines_and_windows_ends(tmp_path, size):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"v": value}, ensure_ascii=False) for value in VALUES]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\n  \n".join(lines).encode())
    assert read(path, size) == [(number, {"v": value}) for number, value in enumerate(VALUES)]


@given(st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=8), max_size=2), max_size=8), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_any_list_in_chunks_of_any_size(tmp_path_factory, values, size):
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_text(json.dumps(values, indent=1))
    assert read(path, size) == list(enumerate(values))


def test_a_bad_line_is_one_bad_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n{"a": "\xff"}\n{"a": 4}\n')
    found = read(path, 1 << 20)
    assert [number for number, _ in found] == [0, 1, 2, 3]
    assert isinstance(found[1][1], BadRow) and isinstance(found[2][1], BadRow)
    assert found[3][1] == {"a": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "row 0: the file ends within the row"),
        ('[{"a": 1}', "row 0: the file ends within the row"),
        ('[{"a": 1}, {"b": 2} {"c": 3}]', "row 1: expected ',' or ']' after the row, found '{'"),
        ('[{"a": 1},]', "row 1: broken JSON"),
        ("[1] x", "text after the end of the list"),
        ("[" * 100_000, "nested too deeply"),
        ('{\n "a": 1\n}', "neither a JSON list of rows nor JSON Lines"),
        ("a,b\n1,2", "neither a JSON list of rows nor JSON Lines"),
    ],
)
def test_broken_files_are_named(tmp_path, text, message):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read(path, 16)
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_a_list_that_is_not_utf8(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(InputError, match="not UTF-8 text at byte 8"):
        read(path, 100)


def test_empty_files_have_no_rows(tmp_path):
    for number, text in enumerate(["", " \n", "[]", "[ ]\n"]):
        path = tmp_path / f"{number}.json"
        path.write_text(text)
        assert read(path, 10) == []


def test_finding_chunks_of_a_long_list_takes_little_memory(tmp_path):
    path = tmp_path / "rows.json"
    with open(path, "w") as file:
        file.write("[" + ",".join(json.dumps({"text": "x" * 1000}) for _ in range(20_000)) + "]")
    tracemalloc.start()
    count = sum(1 for _ in chunks(str(path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count > 100
    assert peak < 4 << 20, f"{peak} bytes for a file of {path.stat().st_size}"


def test_find_files(tmp_path):
    for name in ("b.json", "a.json", "c.txt", "odd[1].json"):
        (tmp_path / name).write_text("[]")
    assert find_files(str(tmp_path / "?.json")) == [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert find_files(str(tmp_path / "odd[1].json")) == [str(tmp_path / "odd[1].json")]
    with pytest.raises(InputError, match="no file matches"):
        find_files(str(tmp_path / "*.jsonl"))
