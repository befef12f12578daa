"""WikiText and Wikipedia become the blocks that MindFormers cuts, and what is left over is counted."""

import re
import time

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from text_folders import byte_level_folder, llama_model

from msft.data import wiki
from msft.data.mindrecord import open_mindrecord
from msft.data.preprocess import Options, preprocess
from msft.errors import InputError

ARTICLE = """ 
 = Robert Boulter = 
 
 Robert Boulter is an English film , television and theatre actor . He had a guest @-@ starring role in 2 @,@ 000 .
 In 2 @.@ 5 years , " he " starred ( or so ) in [ a ] { play } ; at 12 ° C : the boys ' own ' s 's N times !
 
 = = Career = = 
 
 Alongside <unk> he played <unk> , why ? 
"""  # noqa: W291


def mindformers_clean(text):
    """MindFormers 1.3.2's clean_wikitext, step by step."""
    text = text.replace("s '", "s'")
    text = re.sub(r"/' [0-9]/", r"/'[0-9]/", text)
    for sign in ("-", ",", "."):
        text = text.replace(f" @{sign}@ ", sign)
    for sign in (":", ";", ".", "!", "?", ","):
        text = text.replace(f" {sign} ", f"{sign} ")
    text = re.sub(r"\(\s*([^\)]*?)\s*\)", r"(\1)", text)
    text = re.sub(r"\[\s*([^\]]*?)\s*\]", r"[\1]", text)
    text = re.sub(r"{\s*([^}]*?)\s*}", r"{\1}", text)
    text = re.sub(r"\"\s*([^\"]*?)\s*\"", r'"\1"', text)
    text = re.sub(r"'\s*([^']*?)\s*'", r"'\1'", text)
    text = text.replace("= = = =", "====").replace("= = =", "===").replace("= =", "==")
    text = text.replace(" " + chr(176) + " ", chr(176)).replace(" \n", "\n").replace("\n ", "\n")
    return text.replace(" N ", " 1 ").replace(" 's", "'s")


def mindformers_tokens(text):
    """Its LlamaTokenizer: <unk> is a token and the parts around it are tokenized alone; <s> and </s> around each."""
    model, tokens = sentencepiece.SentencePieceProcessor(model_file=str(llama_model())), []
    for paragraph in mindformers_clean(text).split("\n\n"):
        if paragraph and not paragraph.strip().startswith("="):
            parts = [model.encode(part) for part in paragraph.split("<unk>")]
            tokens += [1, *parts[0], *(token for part in parts[1:] for token in (0, *part)), 2]
    return tokens


def rows(path):
    data = open_mindrecord(path)
    assert data.columns == ("input_ids",)
    return [data.row(number)["input_ids"] for number in range(len(data))]


@given(st.text(alphabet="()[]{}\"' ab\n\t\x1c\u3000=@-.,N", max_size=60))
@settings(deadline=None)
def test_cleaning_any_text_equals_mindformers(text):
    assert wiki.clean(text) == mindformers_clean(text)


@pytest.mark.parametrize("text", ["(" + " " * 10**5, "(" * 10**5, '"' + " \n" * 10**5, "{ " * 10**5, "[ ( " * 10**5])
def test_open_brackets_take_no_time(text):
    """MindFormers' expressions need 25 s for '(' and 3000 spaces; a thousand times that for ten times as many."""
    started = time.perf_counter()
    wiki.clean(text)
    assert time.perf_counter() - started < 5


def test_cleaning_equals_mindformers():
    assert wiki.clean(ARTICLE * 3) == mindformers_clean(ARTICLE * 3)
    assert wiki.clean("/' 5/ = = = = = x") == mindformers_clean("/' 5/ = = = = = x")


@pytest.mark.parametrize("repeat", [1, 3])
def test_wiki_blocks_equal_mindformers(tmp_path, repeat):
    (tmp_path / "wiki.tokens").write_text(ARTICLE * 4)
    output = tmp_path / "out" / "wiki.mindrecord"
    options = Options(str(tmp_path / "wiki.tokens"), str(llama_model()), str(output), "wiki", 16, repeat=repeat)
    report = preprocess(options)
    tokens = mindformers_tokens(ARTICLE * 4) * repeat
    blocks = [tokens[start : start + 17] for start in range(0, len(tokens) - 16, 17)]
    assert [row.tolist() for row in rows(output)] == blocks
    assert report.tokens["written"] == len(blocks) * 17
    assert report.tokens["cut_off"] == len(tokens) - len(blocks) * 17
    assert report.rows["written"] == len(blocks)


def test_several_files_and_processes_make_one_stream(tmp_path, monkeypatch):
    monkeypatch.setattr("msft.data.qa.BYTES_PER_WORKER", 100)
    monkeypatch.setattr("msft.data.wiki.TEXTS_PER_TASK", 2)
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(ARTICLE.replace("Robert", f"Robert{number}"))
    found = []
    for workers in (1, 2):
        output = tmp_path / f"out{workers}"
        preprocess(Options(str(tmp_path / "*.txt"), str(llama_model()), str(output), "wiki", 8, num_workers=workers))
        found.append(np.stack(rows(output)))
    np.testing.assert_array_equal(*found)


def test_a_tokenizer_without_begin_token(tmp_path):
    folder = byte_level_folder(tmp_path / "tokenizer")
    (tmp_path / "wiki.txt").write_text("one\n\ntwo\n\n = heading =")
    stream = np.concatenate(list(wiki.tokenize(wiki.paragraphs([str(tmp_path / "wiki.txt")]), str(folder), True, 1)))
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(folder / "tokenizer.json")).encode
    assert stream.tolist() == [*encode("one").ids, 2, *encode("two").ids, 2]


def test_text_too_short_for_one_block(tmp_path):
    (tmp_path / "wiki.txt").write_text("Hello.")
    with pytest.raises(InputError, match="no row is left to write"):
        preprocess(Options(str(tmp_path / "wiki.txt"), str(llama_model()), str(tmp_path / "out"), "wiki", 100))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wiki.txt"]


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "wiki.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="wiki.txt: not UTF-8 text at byte 3"):
        preprocess(Options(str(tmp_path / "wiki.txt"), str(llama_model()), str(tmp_path / "out")))


def test_wikipedia_blocks_are_framed_and_lose_no_token(tmp_path, monkeypatch):
    texts = ["  First line. \n\n second line\n", "Third text, a bit longer than the others."] * 5
    model = sentencepiece.SentencePieceProcessor(model_file=str(llama_model()))
    tokens = [
        token
        for text in texts
        for line in text.strip().split("\n")
        if line.strip()
        for token in model.encode(line.strip())
    ]
    monkeypatch.setattr(
        wiki, "lines", lambda paths: (line.strip() for text in texts for line in text.split("\n") if line.strip())
    )
    (tmp_path / "a.parquet").write_bytes(b"")
    per_pass = len(tokens) // 9
    options = {"dataset_type": "wikipedia", "seq_length": 10, "samples_num": per_pass + 2}
    report = preprocess(Options(str(tmp_path), str(llama_model()), str(tmp_path / "out"), **options))
    found = rows(tmp_path / "out")
    assert len(found) == per_pass + 2 and all(len(row) == 11 and row[0] == 1 and row[-1] == 2 for row in found)
    assert [token for row in found[:per_pass] for token in row[1:-1]] == tokens[: per_pass * 9]
    np.testing.assert_array_equal(found[per_pass], found[0])
    assert "the text was read 2 times" in report.notes[-1]


def test_wikipedia_parquet_files(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", exc_type=ImportError)
    import pyarrow.parquet as parquet

    table = pyarrow.table({"text": [" one \n\ntwo", "three"], "title": ["a", "b"]})
    parquet.write_table(table, tmp_path / "b.parquet")
    parquet.write_table(pyarrow.table({"text": ["four"]}), tmp_path / "c.parquet")
    assert list(wiki.lines([str(tmp_path / "b.parquet"), str(tmp_path / "c.parquet")])) == [
        "one",
        "two",
        "three",
        "four",
    ]
    (tmp_path / "d.parquet").write_bytes(b"junk")
    with pytest.raises(InputError, match="d.parquet: not a parquet file"):
        list(wiki.lines([str(tmp_path / "d.parquet")]))


def test_wikipedia_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install .pyarrow"):
        list(wiki.lines(["x.parquet"]))
