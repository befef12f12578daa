"""LLaMA-Factory's dataset_info.json: which file a data set is, and how its rows are written."""

import json
from pathlib import Path
from typing import Any

from msft.config.importers.translation import Translation
from msft.errors import InputError, did_you_mean

NAME = "dataset_info.json"
_HUBS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")


def raw_files(translation: Translation, key: str) -> list[dict[str, Any]]:
    """Return the raw block's files for the data sets that `key` names; what is wrong with them is reported."""
    keys = translation.keys
    names = [name.strip() for entry in getattr(keys, key) for name in entry.split(",") if name.strip()]
    path = Path(keys.dataset_dir, NAME)
    info = _info(translation, path) if names else {}
    files = []
    for name in names if info is not None else ():
        if name not in info:
            near = did_you_mean(name, info)
            translation.refuse(key, f"{path} has no data set {name!r}{near}")
            continue
        try:
            files.append(_file(info[name], f"{path}: {name}", Path(keys.dataset_dir), keys.max_samples))
        except InputError as error:
            translation.refuse(key, str(error))
    return files


def _info(translation: Translation, path: Path) -> dict[str, Any] | None:
    reason = ""
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        reason = "" if isinstance(info, dict) else "the top level must be an object"
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    except (ValueError, RecursionError):
        reason = "is no JSON"
    if reason:
        key = "dataset_dir" if translation.wrote("dataset_dir") else "dataset"
        translation.refuse(key, f"{path}: {reason} (dataset_dir is the folder that holds it)")
    return None if reason else info


def _file(entry: Any, where: str, folder: Path, max_samples: int | None) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise InputError(f"{where}: must be an object")
    hub = next((key for key in _HUBS if entry.get(key)), None)
    if hub:
        local = "put its JSON there and write file_name in its place"
        raise InputError(f"{where}: {hub} {entry[hub]!r} is not downloaded here: {local}")
    file, kind = entry.get("file_name"), entry.get("formatting", "alpaca")
    if not isinstance(file, str) or not file:
        raise InputError(f"{where}: file_name is missing")
    if entry.get("ranking"):
        raise InputError(f"{where}: ranking is for stages that compare answers, which are not built")
    if kind not in ("alpaca", "sharegpt"):
        raise InputError(f"{where}: formatting must be alpaca or sharegpt, not {kind!r}")
    found = {"path": str(folder / file), "formatting": kind}
    for key in ("columns", "tags"):
        value = entry.get(key)
        if value is not None and not (
            isinstance(value, dict) and all(isinstance(name, str) for name in value.values())
        ):
            raise InputError(f"{where}: {key} must be an object of texts")
        if value is not None:
            found[key] = value
    media = [key for key in ("images", "videos", "audios", "tools") if key in (found.get("columns") or {})]
    if media and media != ["tools"]:
        raise InputError(f"{where}: columns.{media[0]}: models of images, sounds and videos are not built")
    # LLaMA-Factory draws num_samples rows at random; the first ones are taken where max_samples asks for fewer.
    if entry.get("num_samples") and not max_samples:
        raise InputError(f"{where}: num_samples draws rows at random, which is not built: max_samples takes the first")
    return found | ({"num_samples": max_samples} if max_samples else {})
