"""From pydantic's findings to one line each: what, where, the nearest right thing."""

from difflib import get_close_matches
from typing import Any

from msft.config.markers import shown
from msft.config.schema_model import ModelConfig, ModelKeys
from msft.config.structure import keys_at, used_keys
from msft.config.yaml_lines import Document, Keys, Problem, dotted
from msft.errors import did_you_mean

# What LLaMA-Factory, TRL and transformers call keys of ours that are spelled otherwise.
NAMED_ELSEWHERE = {"neat_packing": "train_dataset.packing", "group_by_length": "train_dataset.length_grouping"}
TAGS = ("<number>", "<cell>", "MFLossMonitor", "CheckpointMonitor", "TrainCallBack")


def from_pydantic(error: dict[str, Any], document: Document) -> tuple[Keys, Problem]:
    """Return the path of what is wrong and the problem in words; `error` is one of `ValidationError.errors()`."""
    path = _path(error["loc"], document.data)
    unknown = error["type"] == "extra_forbidden"
    message = unknown_key(path, document.data) if unknown else in_words(error, path)
    return path, Problem(document.place(path, of_key=unknown), dotted(path), message)


def _path(loc: tuple, data: Any) -> Keys:
    """pydantic's location without the names of union members."""
    path: Keys = ()
    for key in loc:
        inside = isinstance(data, dict) and key in data or isinstance(data, list) and isinstance(key, int)
        if inside or key not in TAGS:
            path = (*path, key)
            data = data[key] if inside and (not isinstance(data, list) or key < len(data)) else None
    return path


def unknown_key(path: Keys, data: dict[str, Any]) -> str:
    """Return what to say about a key that the schema does not know: where it belongs, or the nearest known one."""
    key, block = str(path[-1]), path[:-1]
    if key in NAMED_ELSEWHERE:
        return f"unknown key, here it is called '{NAMED_ELSEWHERE[key]}'"
    if block == ("model",) and key in ModelConfig.model_fields:
        return "unknown key: sizes stand in model.model_config, or come from the config.json of model.pretrained"
    homes = _homes(key, data)
    near = did_you_mean(key, keys_at(block))
    if homes and not (near and len(homes) > 3):
        return f"unknown key, it belongs in {' or '.join(homes[:3])}"
    return "unknown key" + (near or _far(key, data))


def _homes(key: str, data: dict[str, Any]) -> list[str]:
    """The blocks in which `key` is known, as users write them."""
    if key == "type":
        return []
    paths = [path for path, name in used_keys() if name == key and _fits(path, name, data)]
    return list(dict.fromkeys(dotted(path) if path else "the top level" for path in paths))


def _far(key: str, data: dict[str, Any]) -> str:
    names = {name: dotted((*path, name)) for path, name in used_keys() if _fits(path, name, data)}
    near = get_close_matches(key, names, n=1, cutoff=0.75)
    return f", did you mean '{names[near[0]]}'?" if near else ""


def _fits(path: Keys, key: str, data: dict[str, Any]) -> bool:
    """Whether this recipe's `model` block is of the kind that has the key there."""
    if path[:1] != ("model",):
        return True
    model = data.get("model")
    sized = isinstance(model, dict) and isinstance(model.get("model_config"), dict)
    inside = path[1:2] == ("model_config",)
    shared = (path[1] if len(path) > 1 else key) in ModelKeys.model_fields
    return inside == sized if shared or inside else True


def in_words(error: dict[str, Any], path: Keys) -> str:
    """Return what to say about a value at `path` that is not as it must be."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind in ("literal_error", "union_tag_invalid"):
        return _choice(kind, value, context)
    must = _MUST.get(kind, "")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"must be a block of keys ({_some(keys_at(path))}), not {shown(value)}" if keys_at(path) else must
    if kind == "missing":
        return "is missing"
    if kind == "union_tag_not_found":
        return "must be a block with the key type"
    if kind == "string_type":
        return f"must be text, not {shown(value)} (put it in quotes)"
    return f"must be {must.format(**context)}, not {shown(value)}" if must else f"{error['msg']}, not {shown(value)}"


def _choice(kind: str, value: Any, context: dict[str, Any]) -> str:
    if kind == "literal_error":
        expected = context["expected"]
    else:
        expected, value = context["expected_tags"], context["tag"]
    choices = [word.strip(" '") for word in expected.replace(" or ", ", ").split(",")]
    return f"must be {_some(choices, ' or ')}, not {shown(value)}{did_you_mean(str(value), choices)}"


def _some(words: list[str], last: str = ", ") -> str:
    if len(words) > 8:
        return ", ".join(words[:6]) + " ..."
    return ", ".join(words[:-1]) + last + words[-1] if len(words) > 1 else "".join(words)


_MUST = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number of sensible size",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "True or False",
    "list_type": "a list",
    "tuple_type": "a list",
    "string_too_short": "some text",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
}
