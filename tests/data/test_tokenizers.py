"""Ids equal sentencepiece's and transformers' AutoTokenizer's; every token knows the characters it stands for."""

import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from text_folders import TEXTS, byte_level_folder, llama_model, metaspace_folder, train_sentencepiece, write_config

from msft.data.text_stream import TextStream
from msft.data.tokenizers import encode_text, open_tokenizer
from msft.errors import InputError

unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
SENTENCEPIECE = ["llama", "unigram", "marked"]
FOLDERS = ["byte_level", "added", "nfc", "legacy", "new", "untold", "no_space", "mistral", "own_class", "unigram_json"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    models = {
        "llama": llama_model(),
        "unigram": train_sentencepiece(root / "unigram", model_type="unigram", character_coverage=1.0),
        "marked": train_sentencepiece(
            root / "marked",
            model_type="bpe",
            vocab_size=400,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            control_symbols=["[INST]"],
            user_defined_symbols=["<tab>", "  "],
        ),
    }
    byte_level_folder(root / "byte_level")
    added = {"id": 0, "single_word": False, "lstrip": False, "rstrip": True, "normalized": False, "special": True}
    byte_level_folder(
        root / "added",
        pad_token={"__type": "AddedToken", **added, "content": "<pad>"},
        additional_special_tokens=["<|tool|>"],
        added_tokens_decoder={"400": {**added, "content": "<|end|>"}, "401": {**added, "content": "x y"}},
    )
    _edit(byte_level_folder(root / "nfc"), lambda state: state.update(normalizer={"type": "NFC"}))
    metaspace_folder(root / "legacy", legacy=True)
    metaspace_folder(root / "new", legacy=False)
    metaspace_folder(root / "untold")
    metaspace_folder(root / "no_space", add_prefix_space=False)
    metaspace_folder(root / "mistral", legacy=False)
    (root / "mistral" / "config.json").write_text('{"model_type": "mistral"}')
    metaspace_folder(root / "own_class", tokenizer_class="PreTrainedTokenizerFast", pad_token="[PAD]")
    _unigram_folder(root / "unigram_json")
    return models | {name: root / name for name in FOLDERS}


def _edit(folder, change):
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))


def _unigram_folder(folder):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = [("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz ")]
    tokenizer = Tokenizer(models.Unigram(pieces + [("▁hello", -1.0), ("lead", -1.5)], unk_id=0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    write_config(folder, tokenizer_class="PreTrainedTokenizerFast", unk_token="<unk>")


def sliced(text, tokenizer):
    encoding = tokenizer.encode([text])[0]
    return [text[start:end] for start, end in zip(encoding.starts, encoding.ends, strict=True)]


@pytest.mark.parametrize("name", SENTENCEPIECE)
@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_is_the_oracle_for_model_files(folders, name, text):
    tokenizer = open_tokenizer(folders[name])
    model = sentencepiece.SentencePieceProcessor(model_file=str(folders[name]))
    for word in tokenizer.special_tokens:  # sentencepiece itself does not read these
        text = text.replace(word, "")
    encoding = tokenizer.encode([text])[0]
    oracle = model.encode(text, out_type="offset_mapping")
    assert encoding.ids.tolist() == oracle["ids"]
    spans = list(zip(encoding.starts.tolist(), encoding.ends.tolist(), strict=True))
    if name == "unigram":  # this model normalises: its own offsets are the answer
        assert spans == oracle["offsets"]
    else:
        assert "".join(sliced(text, tokenizer)) == text or not text.isascii()
        assert tokenizer.decode(encoding.ids) == model.decode(oracle["ids"])


@given(unicode_text)
@settings(max_examples=100, deadline=None)
def test_llama_offsets_equal_sentencepiece_offsets(text):
    tokenizer = _llama()
    model = sentencepiece.SentencePieceProcessor(model_file=str(llama_model()))
    if any(word in text for word in tokenizer.special_tokens):
        return
    encoding = tokenizer.encode([text])[0]
    oracle = model.encode(text, out_type="offset_mapping")
    assert encoding.ids.tolist() == oracle["ids"]
    for start, end, (first, last) in zip(encoding.starts, encoding.ends, oracle["offsets"], strict=True):
        # sentencepiece gives a character of several byte tokens to one of them; ours all stand for it.
        assert start == first and (end == last or (first == last and end == start + 1))


_opened = []


def _llama():
    if not _opened:
        _opened.append(open_tokenizer(llama_model()))
    return _opened[0]


def test_special_tokens_split_a_text_into_parts_that_are_tokenized_alone():
    tokenizer = _llama()
    model = sentencepiece.SentencePieceProcessor(model_file=str(llama_model()))
    text = "one</s>two <s>"
    encoding = tokenizer.encode([text])[0]
    assert encoding.ids.tolist() == [*model.encode("one"), 2, *model.encode("two "), 1]
    assert sliced(text, tokenizer)[-1] == "<s>"
    assert tokenizer.decode(encoding.ids, skip_special=False) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)
    assert encode_text(tokenizer, "one") == [1, *model.encode("one")]


def test_byte_tokens_stand_for_their_whole_character():
    tokenizer = _llama()
    text = "a\U0001f9ff b"
    pieces = sliced(text, tokenizer)
    assert pieces.count("\U0001f9ff") == 4 and pieces[-1] == " b"


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_equal_auto_tokenizer(folders, name):
    from transformers import AutoTokenizer

    ours, theirs = open_tokenizer(folders[name]), AutoTokenizer.from_pretrained(folders[name])
    for text in [*TEXTS, "a <|end|>  b<|tool|>x yz", "Hello [PAD] <pad>"]:
        ids = theirs(text).input_ids
        assert encode_text(ours, text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids)
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    padding = [theirs.pad_token_id, theirs.unk_token_id, theirs.eos_token_id]
    assert ours.pad_id == next(token for token in padding if token is not None)


@pytest.mark.parametrize("name", FOLDERS)
def test_every_character_belongs_to_a_token(folders, name):
    tokenizer = open_tokenizer(folders[name])
    for text in TEXTS:
        encoding = tokenizer.encode([text])[0]
        covered = {
            place for start, end in zip(encoding.starts, encoding.ends, strict=True) for place in range(start, end)
        }
        missing = "".join(text[place] for place in range(len(text)) if place not in covered)
        # A composed letter (NFC) stands for its first character; Unigram drops the spaces it normalises away.
        assert not missing or name == "unigram_json" or (name, missing) == ("nfc", "\u0301"), (text, missing)


@pytest.mark.parametrize("name", ["byte_level", "nfc"])
def test_byte_level_offsets_equal_the_tokenizers_library(folders, name):
    from tokenizers import Tokenizer

    ours, theirs = open_tokenizer(folders[name]), Tokenizer.from_file(str(folders[name] / "tokenizer.json"))
    theirs.post_processor = None  # its trimming of spaces is what we leave out
    for text in TEXTS:
        encoding = ours.encode([text])[0]
        assert list(zip(encoding.starts, encoding.ends, strict=True)) == theirs.encode(text).offsets, text


@given(unicode_text)
@settings(max_examples=60, deadline=None)
def test_streamed_text_equals_decoded_text(text):
    tokenizer = _llama()
    ids = tokenizer.encode([text])[0].ids.tolist()
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids] + [stream.flush()]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces[:-1]) or "\ufffd" in text


def test_stream_keeps_the_space_after_a_special_token():
    tokenizer = _llama()
    ids = tokenizer.encode(["a</s>USER: b"])[0].ids.tolist()
    stream = TextStream(tokenizer)
    assert "".join(stream.push(token) for token in ids) + stream.flush() == tokenizer.decode(ids) == "a USER: b"


def test_stream_holds_back_half_characters(folders):
    tokenizer = open_tokenizer(folders["byte_level"])
    ids = tokenizer.encode(["ok \U0001f9ff"])[0].ids.tolist()
    stream = TextStream(tokenizer)
    shown = [stream.push(token) for token in ids[:-1]]
    assert "ok".startswith("".join(shown).rstrip()) and shown[0]
    assert "".join(shown) + stream.push(ids[-1]) == "ok \U0001f9ff"
    stream = TextStream(tokenizer)
    stream.push(*ids[:-1])
    assert stream.flush().endswith("\ufffd")


@pytest.mark.parametrize("name", ["llama", "byte_level", "legacy"])
def test_a_saved_copy_is_the_same_tokenizer(folders, tmp_path, name):
    original = open_tokenizer(folders[name])
    original.save_copy(tmp_path / "copy")
    copy = open_tokenizer(tmp_path / "copy")
    for text in TEXTS:
        assert encode_text(copy, text) == encode_text(original, text)
    assert dict(copy.chat_templates) == dict(original.chat_templates)


def test_a_folder_with_only_a_sentencepiece_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(llama_model().read_bytes())
    bare = open_tokenizer(tmp_path)
    assert encode_text(bare, "Hi  there") == encode_text(_llama(), "Hi  there")
    write_config(tmp_path, add_bos_token=False, add_eos_token=True, pad_token="</s>", chat_template="{{ 1 }}")
    told = open_tokenizer(tmp_path)
    assert encode_text(told, "Hi") == [*encode_text(_llama(), "Hi")[1:], 2]
    assert told.pad_id == 2 and told.chat_templates == {"default": "{{ 1 }}"}


def test_chat_templates_of_files_win_and_lists_are_named(tmp_path):
    folder = byte_level_folder(
        tmp_path, chat_template=[{"name": "default", "template": "A"}, {"name": "rag", "template": "B"}]
    )
    assert open_tokenizer(folder).chat_templates == {"default": "A", "rag": "B"}
    (folder / "chat_template.jinja").write_text("C")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("D")
    assert open_tokenizer(folder).chat_templates == {"default": "C", "tool_use": "D"}


def test_what_cannot_be_opened(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.model").write_bytes(b"not a model")
    for name in ("json", "config"):
        byte_level_folder(tmp_path / name)
    (tmp_path / "json" / "tokenizer.json").write_text("{}")
    (tmp_path / "config" / "tokenizer_config.json").write_text("{")
    for path, message in [
        ("nowhere", "no file or folder"),
        ("empty", "neither tokenizer.json nor tokenizer.model"),
        ("bad.model", "not a sentencepiece model"),
        ("json", "tokenizer.json: not a tokenizer"),
        ("config", "tokenizer_config.json: not JSON"),
    ]:
        with pytest.raises(InputError, match=message):
            open_tokenizer(tmp_path / path)


@pytest.mark.parametrize(
    "config,message",
    [
        ({"added_tokens_decoder": "x"}, "'added_tokens_decoder' must be an object, not 'x'"),
        ({"added_tokens_decoder": {"a": {"content": "b"}}}, "'a' must be a number with a token"),
        ({"added_tokens_decoder": {"7": "b"}}, "'7' must be a number with a token, not 'b'"),
        ({"added_tokens_decoder": {"7": {"content": "b", "lstrip": "x"}}}, "the flags of 7 must be true or false"),
        ({"eos_token": 2}, "'eos_token' must be a token's text, not 2"),
        ({"eos_token": "\ud800"}, "'eos_token' must be a token's text"),
    ],
)
def test_a_wrong_config_is_named(tmp_path, config, message):
    with pytest.raises(InputError, match=f"tokenizer_config.json: .*{message}"):
        open_tokenizer(byte_level_folder(tmp_path, **config))


def test_odd_chat_templates_are_none(tmp_path):
    for entry in (5, [5, {"name": "a"}, {"name": 1, "template": "A"}], [["name", "template"]]):
        assert open_tokenizer(byte_level_folder(tmp_path, chat_template=entry)).chat_templates == {}
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match="chat_template.jinja: is not UTF-8 text"):
        open_tokenizer(tmp_path)


def test_a_panic_of_the_library_is_an_error_of_the_file(tmp_path):
    """Rust's panics are no Exceptions; this post-processor puts a token that it does not define."""
    folder = byte_level_folder(tmp_path)
    document = json.loads((folder / "tokenizer.json").read_text())
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    document["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {}}
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="tokenizer.json: not a tokenizer that can be used"):
        open_tokenizer(folder)


def test_a_flipped_bit_in_a_sentencepiece_model(tmp_path):
    data = bytearray(llama_model().read_bytes())
    data[data.index("\u2581the".encode()) + 1] ^= 0x40
    (tmp_path / "x.model").write_bytes(data)
    with pytest.raises(InputError, match="x.model: not a sentencepiece model, or a damaged one"):
        open_tokenizer(tmp_path / "x.model")


def test_a_tokens_number_does_not_decide_how_much_memory_is_taken(tmp_path):
    folder = byte_level_folder(tmp_path)
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["vocab"]["zz"] = 2**31
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="tokenizer.json: a token has the number 2147483648, beyond any vocabulary"):
        open_tokenizer(folder)
