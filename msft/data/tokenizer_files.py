"""The small files of a tokenizer folder: tokenizer_config.json, special tokens, chat templates."""

import json
import shutil
from pathlib import Path

from msft.errors import InputError

# What a tokenizer can be read from; the last is ChatGLM-6B's vocabulary.
ICE_TEXT = "ice_text.model"
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", ICE_TEXT)
TOKENIZER_FILES = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
TOKEN_FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")
TEMPLATE_FOLDER = "additional_chat_templates"
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds what a tokenizer can be read from."""
    return any((folder / name).is_file() for name in VOCABULARIES)


def read_json(path: Path) -> dict:
    """Return a JSON object, {} when there is no such file; raises InputError naming the file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON object is expected")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {error.start})") from None


def token_text(token) -> str | None:
    """Return the text of a token as configs write it: a string, or an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token if isinstance(token, str) else None


def read_config(folder: Path) -> dict:
    """Return tokenizer_config.json; tokens in an older folder's special_tokens_map.json win, as in transformers."""
    config = read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= read_json(folder / "special_tokens_map.json")
    problems = [f"{folder / 'tokenizer_config.json'}: {problem}" for problem in _wrong(config)]
    if problems:
        raise InputError(*problems[:20])
    return config


def _wrong(config: dict) -> list[str]:
    """Say which entries do not have the type that they need here."""
    tokens = {key: config[key] for key in config if key.endswith("_token") and not isinstance(config[key], bool)}
    problems = [
        f"{key!r:.80} must be a token's text, not {tokens[key]!r:.80}" for key in tokens if not _token(tokens[key])
    ]
    added = config.get("added_tokens_decoder")
    if not isinstance(added, dict | None):
        return [*problems, f"'added_tokens_decoder' must be an object, not {added!r:.80}"]
    for index, entry in (added or {}).items():
        if not (index.isdecimal() and len(index) < 10 and isinstance(entry, dict) and _token(entry)):
            problems.append(f"'added_tokens_decoder': {index!r:.80} must be a number with a token, not {entry!r:.80}")
        elif not all(isinstance(entry.get(flag, False), bool) for flag in TOKEN_FLAGS):
            problems.append(f"'added_tokens_decoder': the flags of {index} must be true or false")
    return problems


def _token(value) -> bool:
    text = value.get("content") if isinstance(value, dict) else value
    return text is None or isinstance(text, str) and _is_unicode(text)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def named_tokens(config: dict) -> dict[str, str]:
    """Return the texts of 'bos_token', 'eos_token' ... and of the config's own `*_token` entries."""
    names = [*NAMED_TOKENS, *(key for key in config if key.endswith("_token") and key not in NAMED_TOKENS)]
    found = {name: token_text(config.get(name)) for name in names}
    extra = config.get("extra_special_tokens")
    if isinstance(extra, dict):
        found |= {name: token_text(token) for name, token in extra.items()}
    return {name: text for name, text in found.items() if text is not None}


def extra_tokens(config: dict) -> list[str]:
    """Return the texts of the further special tokens that have no name."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    return [text for text in map(token_text, extra) if text is not None] if isinstance(extra, list) else []


def chat_templates(folder: Path, config: dict) -> dict[str, str]:
    """Return the chat templates by name: files win over entries of tokenizer_config.json, as in transformers."""
    file, more = folder / "chat_template.jinja", folder / TEMPLATE_FOLDER
    from_files = {"default": _read_text(file)} if file.is_file() else {}
    for extra in sorted(more.glob("*.jinja")) if more.is_dir() else ():
        from_files[extra.stem] = _read_text(extra)
    if from_files:
        return from_files
    entry = config.get("chat_template")
    if isinstance(entry, str):
        return {"default": entry}
    if isinstance(entry, dict):
        return {name: source for name, source in entry.items() if isinstance(source, str)}
    named = [item for item in entry if isinstance(item, dict)] if isinstance(entry, list) else []
    pairs = [(item.get("name"), item.get("template")) for item in named]
    return {name: source for name, source in pairs if isinstance(name, str) and isinstance(source, str)}


def copy_files(folder: Path, target: Path) -> None:
    """Copy the tokenizer's files of `folder` into `target`."""
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    if (folder / TEMPLATE_FOLDER).is_dir():
        shutil.copytree(folder / TEMPLATE_FOLDER, target / TEMPLATE_FOLDER, dirs_exist_ok=True)
