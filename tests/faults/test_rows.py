"""Any JSON, and any bytes, as rows of data: what is read is written or listed with a reason, and nothing is lost."""

import json

import numpy as np
import pytest
from hypothesis import strategies as st

from msft.cli.alpaca_converter import main as alpaca_converter
from msft.cli.llama_preprocess import main as llama_preprocess
from msft.data import alpaca, rows
from msft.data.encode import Encoder
from msft.data.mindrecord import codec
from msft.data.qa import add_to, encode_chunk
from msft.data.report import Report
from msft.data.templates import open_template
from msft.data.tokenizers import open_tokenizer
from tests.data.text_folders import byte_level_folder
from tests.faults.inputs import result_or_error, short_and_long, try_all
from tests.faults.json_values import ODD_TEXTS, changed, damaged, scalars, values, written

ALPACA = [
    {"instruction": "Name a colour.", "input": "", "output": "Blue."},
    {"instruction": "Add.", "input": "1 and 2", "output": "3", "system": "Be brief.", "history": [["Hi", "Hello"]]},
]
CHATS = [
    {
        "id": "1",
        "conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Yes é 你."}],
    },
    {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "Two."},
            {"role": "user", "content": "Three?"},
            {"role": "assistant", "content": "<|im_end|>Four."},
        ]
    },
]
KEYS = "instruction input output system history conversations messages from value role content tool_calls".split()
ROLES = ["human", "gpt", "user", "assistant", "system", "bing", "tool", "{{", ""]
DEEP = [json.loads("[" * 200 + "]" * 200), [[["a"] * 3] * 3] * 3]
texts = st.one_of(scalars, st.sampled_from([*ROLES, *ODD_TEXTS, "<|im_start|>", "<|im_end|>\n", " ", "A: B"]))
known_keys = st.recursive(
    texts | st.sampled_from(DEEP),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=12,
)
any_rows = st.lists(
    st.one_of(values, known_keys, st.sampled_from(ALPACA + CHATS), st.sampled_from(ALPACA + CHATS).flatmap(changed)),
    max_size=6,
)


@st.composite
def files(draw):
    """(content, number of rows) of a JSON list or of JSON Lines with any rows."""
    found = draw(any_rows)
    style = draw(st.sampled_from(["list", "indented", "lines"]))
    if style == "lines":
        lines = [written(row) for row in found]
        broken = draw(st.lists(st.binary(min_size=1, max_size=20).filter(lambda line: line.split()), max_size=2))
        broken = [line.replace(b"\n", b" ").replace(b"\r", b"x") for line in broken]
        lines += [line for line in broken if line.strip()]
        lines = [b'{"instruction": "x", "output": "y"}', *lines]
        return draw(st.sampled_from([b"\n", b"\r\n", b"\n\n"])).join(lines), len(lines)
    text = json.dumps(found, ensure_ascii=draw(st.booleans()), indent=2 if style == "indented" else None)
    return text.encode("utf-8", "surrogatepass"), len(found)


DAMAGED = st.sampled_from(
    [written(ALPACA + CHATS), json.dumps(CHATS * 2, indent=1).encode(), b"\n".join(map(written, ALPACA + CHATS))]
).flatmap(damaged)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    tokenizer = open_tokenizer(byte_level_folder(tmp_path_factory.mktemp("tokenizer")))
    return {name: Encoder(tokenizer, open_template(name, tokenizer)) for name in ("chat", "vicuna_v1.1", "llama-2")}


def converted(path, output) -> Report | None:
    """What became of the rows of a file as alpaca rows; None when the file was refused."""
    report = Report({})
    output.unlink(missing_ok=True)
    if result_or_error(lambda: alpaca.convert_file(str(path), str(output), report) or True, str(path)) is None:
        assert not output.exists()
        return None
    assert report.rows["read"] == report.rows["written"] + report.rows["bad"]
    assert len(report.dropped) == report.rows["bad"]
    entries = json.loads(output.read_text(encoding="utf-8"))
    assert [entry["id"] for entry in entries] == [str(number + 1) for number in range(report.rows["written"])]
    assert all(isinstance(turn["value"], str) for entry in entries for turn in entry["conversations"])
    return report


def encoded(path, encoder, length: int = 60) -> Report | None:
    """What became of the rows of a file as conversations; None when the file was refused."""
    report = Report({})

    def encode():
        for chunk in rows.chunks(str(path), 200):
            part = encode_chunk(encoder, length, 0, chunk)
            for blob in part.blobs:
                ids, labels = (codec.decompress(column, np.dtype("<i4")) for column in codec.split(blob, 2))
                assert ids.shape == labels.shape == (length,)
                assert (labels[1:] != -100).any() and (ids >= 0).all()
            add_to(report, part)
        return True

    if result_or_error(encode, str(path)) is None:
        return None
    dropped = report.rows["bad"] + report.rows["without_supervision"]
    assert report.rows["read"] == report.rows["written"] + dropped
    assert len(report.dropped) == dropped
    report.write(str(path) + ".report.json")
    return report


@short_and_long(100, 3000)
def test_any_rows_as_alpaca(tmp_path, count):
    def check(file):
        (tmp_path / "rows.json").write_bytes(file[0])
        report = converted(tmp_path / "rows.json", tmp_path / "out.json")
        assert report is None or report.rows["read"] == file[1]

    try_all(count, files(), check)


@short_and_long(100, 3000)
def test_any_rows_as_conversations(tmp_path, encoder, count):
    def check(drawn):
        (content, number), template = drawn
        (tmp_path / "rows.json").write_bytes(content)
        report = encoded(tmp_path / "rows.json", encoder[template])
        assert report is None or report.rows["read"] == number

    try_all(count, st.tuples(files(), st.sampled_from(sorted(encoder))), check)


@short_and_long(100, 3000)
def test_damaged_files(tmp_path, encoder, count):
    def check(content):
        (tmp_path / "rows.json").write_bytes(content)
        first = converted(tmp_path / "rows.json", tmp_path / "out.json")
        second = encoded(tmp_path / "rows.json", encoder["chat"])
        assert (first is None) == (second is None)
        assert first is None or first.rows["read"] == second.rows["read"]

    try_all(count, DAMAGED | st.binary(max_size=60), check)


@short_and_long(8, 150)
def test_the_commands_end_with_code_0_or_2(tmp_path, capfd, count):
    """Exit code 1 would be an error that nobody foresaw."""
    model = byte_level_folder(tmp_path / "tokenizer")
    path, out = tmp_path / "rows.json", tmp_path / "out"

    def check(content):
        path.write_bytes(content)
        assert alpaca_converter(["--data_path", str(path), "--output_path", str(out / "a.json")]) in (0, 2)
        words = ["--dataset_type", "qa", "--input_glob", str(path), "--model_file", str(model), "--seq_length", "40"]
        words += ["--template", "chat", "--num_workers", "1", "--output_file", str(out / "a.mindrecord")]
        assert llama_preprocess(words) in (0, 2)
        assert "Traceback" not in capfd.readouterr().err

    try_all(count, DAMAGED | files().map(lambda file: file[0]), check)
