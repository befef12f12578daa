"""The stages before any computation: recipe, data, weights."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from msft.backend.contract import IGNORE, Batch
from msft.config import derive
from msft.data.tokenizer_files import has_tokenizer
from msft.models import rope
from msft.parity.fingerprint import fingerprint, norm
from msft.parity.observe import Observation
from msft.parity.side import Side
from msft.train import setup

# Where things lie may differ between machines; what they hold is compared by the later stages.
PLACES = {
    "backend",
    "device",
    "output_dir",
    "load_checkpoint",
    "src_strategy_path_or_dir",
    "model.pretrained",
    "model.model_config.checkpoint_name_or_path",
    "train_dataset.data_loader.dataset_dir",
    "train_dataset.data_loader.dataset_files",
    "train_dataset.data_loader.raw",
    "eval_dataset.data_loader.dataset_dir",
    "eval_dataset.data_loader.dataset_files",
    "processor.tokenizer.vocab_file",
}
SHOWN_TOKENS = 200


def observe_recipe(side: Side) -> Observation:
    """Every resolved key, what follows from the recipe, and the dtypes that the engine says it computes in."""
    recipe, tuning = side.prepared.recipe, side.prepared.tuning
    keys = {path: value for path, value in flat(recipe.model_dump(mode="json")) if path not in PLACES}
    resolved = {
        "schedule": setup.schedule(recipe, side.stream)._asdict(),
        "optimizer": vars(derive.optimizer(recipe)),
        "loss scale": vars(derive.loss_scale(recipe, side.session.device)),
        "max_grad_norm": derive.max_grad_norm(recipe),
        "rows of a step": side.stream.report()["rows_per_step"],
        "steps of the run": side.stream.total_steps,
        "pad id": side.prepared.pad_id,
        "tuned parameters": list(tuning.parameters),
        "lora": vars(tuning.lora) if tuning.lora else None,
        "model": {key: value for key, value in asdict(side.prepared.spec).items() if key != "hf_config"},
    }
    dtypes = {f"dtype of {what}": kind for what, kind in side.engine.dtypes().items()}
    facts = json.loads(
        json.dumps({**keys, **{f"resolved {name}": value for name, value in resolved.items()}, **dtypes})
    )
    return Observation(facts=facts, notes={"device": side.session.device, "applied": side.engine.describe()})


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings by dotted path."""
    if not isinstance(value, dict):
        yield path, value
        return
    for key, inner in value.items():
        yield from flat(inner, f"{path}.{key}" if path else str(key))


def observe_data(side: Side) -> Observation:
    """The rows, ids, labels, positions and segments of every step of the trajectory."""
    facts: dict[str, Any] = {}
    for number, micro_batches in enumerate(side.batches(side.steps)):
        step = f"step {number + 1}"
        facts[f"{step}: rows"] = side.stream.row_numbers(number)
        for name in ("input_ids", "labels", "position_ids", "segment_ids", "row_ids"):
            facts[f"{step}: {name}"] = _sha256([getattr(batch, name) for batch in micro_batches])
        facts[f"{step}: supervised tokens"] = sum(batch.supervised for batch in micro_batches)
    return Observation(facts=facts, notes={"sample": _sample(side, side.first_step[0])})


def _sha256(arrays: list[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _sample(side: Side, batch: Batch) -> str:
    """The first example as a person reads it: its text where a tokenizer is at hand, and how much is supervised."""
    from msft.data.tokenizers import open_tokenizer

    first = batch.segment_ids[0] == 1
    real = batch.input_ids[0][first]
    path, shown = _tokenizer(side), real[:SHOWN_TOKENS].tolist()
    text = repr(open_tokenizer(path).decode(shown, skip_special=False)) if path else str(shown)
    text += " ..." if len(real) > SHOWN_TOKENS else ""
    return f"{len(real)} tokens, {int((batch.labels[0][first] != IGNORE).sum())} supervised: {text}"


def _tokenizer(side: Side) -> Path | None:
    named = derive.tokenizer(side.prepared.recipe)
    path = Path(named) if named else None
    there = path and (path.is_file() or has_tokenizer(path))
    return path if there else None


def observe_weights(side: Side) -> Observation:
    """Every tensor's shape, dtype and hash as it is computed with, the tied head, and the rotary layout."""
    spec, seen = side.prepared.spec, Observation()
    seen.facts["head tied"] = side.engine.is_head_tied()
    seen.checks["head tied as the model says"] = float(side.engine.is_head_tied() != spec.tie_word_embeddings)
    for name, array, dtype in side.engine.parameters():
        print_ = fingerprint(array)
        seen.arrays[name], side.hashes[name] = print_, print_.sha256
        seen.facts[f"{name}: dtype"] = dtype
    if spec.head_dim:
        seen.checks["rotary layout"] = _rotary_error(side)
    return seen


def _rotary_error(side: Side) -> float:
    """How far the engine's rotary embedding is from the published one, each pair of features turned."""
    spec = side.prepared.spec
    positions = np.arange(8, dtype=np.int32)[None]
    hidden = np.random.default_rng(0).standard_normal((1, 1, 8, spec.head_dim)).astype(np.float32)
    cosine, sine = (table[:, None] for table in rope.tables(spec, positions))
    expected = hidden * cosine
    for first, second in rope.pairs(spec):
        expected[..., first] -= hidden[..., second] * sine[..., first]
        expected[..., second] += hidden[..., first] * sine[..., second]
    error = norm(side.engine.rotate(hidden, positions) - expected) / norm(expected)
    # The order of two additions may differ, which is no other layout.
    return error if error > 1e-6 else 0.0
