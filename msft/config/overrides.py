"""Values from the command line: MindFormers' flags, `--any.dotted.key value`, `any.dotted.key=value`."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from msft.config.problems import unknown_key
from msft.config.structure import field_at, is_text
from msft.config.yaml_lines import Document, Keys, Place, Problem, dotted, parse_value, readable
from msft.errors import did_you_mean

# Flags of MindFormers' run_mindformer.py (and two of ours) -> the keys they set.
FLAGS: dict[str, tuple[str, ...]] = {
    "backend": ("backend",),
    "device": ("device",),
    "run_mode": ("run_mode",),
    "do_eval": ("do_eval",),
    "train_dataset_dir": ("train_dataset.data_loader.dataset_dir",),
    "eval_dataset_dir": ("eval_dataset.data_loader.dataset_dir",),
    "predict_data": ("predict_data",),
    "predict_batch_size": ("predict_batch_size",),
    "load_checkpoint": ("load_checkpoint",),
    "resume_training": ("resume_training",),
    "seed": ("seed",),
    "use_parallel": ("use_parallel",),
    "epochs": ("runner_config.epochs",),
    "batch_size": ("runner_config.batch_size",),
    "gradient_accumulation_steps": ("runner_config.gradient_accumulation_steps",),
    "sink_mode": ("runner_config.sink_mode",),
    "num_samples": ("train_dataset.data_loader.num_samples", "eval_dataset.data_loader.num_samples"),
    "output_dir": ("output_dir",),
    "mode": ("context.mode",),
    "device_id": ("context.device_id",),
    "device_target": ("context.device_target",),
    "adapter_id": ("adapter_id",),
    "src_strategy_path_or_dir": ("src_strategy_path_or_dir",),
    "auto_trans_ckpt": ("auto_trans_ckpt",),
    "transform_process_num": ("transform_process_num",),
    "only_save_strategy": ("only_save_strategy",),
    "strategy_load_checkpoint": ("parallel.strategy_ckpt_load_file",),
    "remote_save_url": ("remote_save_url",),
    "profile": ("profile",),
    "register_path": ("register_path",),
}

_AFTER_ALL_LINES = 1_000_000_000


class Override(NamedTuple):
    """One key to set; `shown` is how the user wrote it."""

    path: Keys
    text: str | list[str]
    shown: str


def apply_overrides(document: Document, words: Sequence[str]) -> None:
    """Set what the words say in `document`, later ones last; what is wrong is added to its problems."""
    set_overrides(document, read_overrides(document, words))


def set_overrides(document: Document, overrides: Iterable[Override]) -> None:
    """Set what was read, in its order; what is wrong is added to the document's problems."""
    for order, override in enumerate(overrides):
        place = Place(_AFTER_ALL_LINES + order, readable(override.shown))
        message = _set(document, override.path, _value(override), place)
        if message:
            document.problems.append(Problem(place, dotted(override.path), message))


def is_of(override: Override, theirs: Collection[str]) -> bool:
    """Whether an override is of a key of another toolkit's, known or mistyped, and no flag of ours."""
    name = override.path[0]
    is_ours = FLAGS.get(name) == (name,) or name not in theirs and field_at((name,)) is not None
    return len(override.path) == 1 and not is_ours


def read_overrides(document: Document, words: Sequence[str], theirs: Collection[str] = ()) -> list[Override]:
    """Return what the words say; `theirs` are keys that may be given too. What is no flag becomes a problem."""
    words, overrides = list(words), []
    while words:
        word = words.pop(0)
        if word == "--options":
            overrides += [_assignment(words.pop(0)) for _ in _leading(words, lambda next: "=" in next)]
        elif word.startswith("--") and len(word) > 2:
            overrides += _flag(document, word, words, theirs)
        elif "=" in word.lstrip("=") and not word.startswith("-"):
            overrides.append(_assignment(word))
        else:
            _complain(document, word, "is no flag and no key=value")
    return overrides


def _leading(words: list[str], wanted) -> list[str]:
    """The first words that are no flags and that `wanted` accepts."""
    count = next((i for i, word in enumerate(words) if word.startswith("--") or not wanted(word)), len(words))
    return words[:count]


def _flag(document: Document, word: str, words: list[str], theirs: Collection[str]) -> list[Override]:
    shown, equals, text = word.partition("=")
    name = shown[2:]
    value: str | list[str] = text
    if not equals:
        values = _leading(words, lambda _: True)[: None if name == "predict_data" else 1]
        if not values:
            _complain(document, shown, "needs a value")
            return []
        del words[: len(values)]
        value = values if name == "predict_data" else values[0]
    if name not in FLAGS and name not in theirs and "." not in name and not field_at((name,)):
        near = did_you_mean(shown, [f"--{flag}" for flag in (*FLAGS, *theirs)])
        _complain(document, shown, f"unknown flag{near}" if near else unknown_key((name,), document.data))
        return []
    return [Override(_path(key), value, shown) for key in FLAGS.get(name, (name,))]


def _assignment(word: str) -> Override:
    key, _, text = word.partition("=")
    return Override(_path(key), text, key)


def _path(key: str) -> Keys:
    return tuple(int(part) if part.isascii() and part.isdigit() and len(part) < 6 else part for part in key.split("."))


def _value(override: Override) -> Any:
    if isinstance(override.text, list) or is_text(override.path):
        return override.text
    return parse_value(override.text)


def _complain(document: Document, shown: str, message: str) -> None:
    document.problems.append(Problem(Place(_AFTER_ALL_LINES, readable(shown)), "", message))


def _set(document: Document, path: Keys, value: Any, place: Place) -> str | None:
    """Set one value, making blocks on the way; returns what is wrong, if anything."""
    here: Any = document.data
    for depth, key in enumerate(path):
        if isinstance(here, list):
            if not isinstance(key, int) or key >= len(here):
                return f"'{dotted(path[:depth])}' is a list with the entries 0 to {len(here) - 1}, it has no '{key}'"
        elif not isinstance(here, dict):
            return f"'{dotted(path[:depth])}' is a single value, it has no keys"
        if depth == len(path) - 1:
            break
        inner = here[key] if isinstance(here, list) else here.get(key)
        if inner is None:
            here[key] = inner = _default(path[: depth + 1])
            _stands(document, path[: depth + 1], place)
        here = inner
    here[path[-1]] = value
    _stands(document, path, place)
    return None


def _stands(document: Document, path: Keys, place: Place) -> None:
    for places in (document.keys, document.values):
        for inside in [known for known in places if known[: len(path)] == path]:
            del places[inside]
        places[path] = place


def _default(path: Keys) -> Any:
    """What a missing block starts from: a list from its default entries, anything else empty."""
    field = field_at(path)
    if field is not None and isinstance(field.default, list):
        return [dict(entry) if isinstance(entry, dict) else entry for entry in field.default]
    return {}
