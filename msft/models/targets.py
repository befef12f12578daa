"""Which modules get adapters and which parameters are trained, from patterns in either vocabulary.

MindFormers 1.3.2: `target_modules` and `exclude_layers` are regular expressions matched (`re.match`) on leaf
cell names; `freeze_include` and `freeze_exclude` are shell patterns (`fnmatch`) on parameter names.
"""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from msft.errors import InputError, did_you_mean
from msft.models import state_space
from msft.models.families import family
from msft.models.family import Family
from msft.models.shapes import linear_modules, tensor_shapes
from msft.models.spec import ModelSpec

# Without adapters: all experts of a layer are one tensor each, and their router is no linear module.
_OF_EXPERTS = "; experts and their router take no adapters: they are tuned without pet_config, or by freeze_exclude"
# Of models of this type peft (0.21) reads these leaves as those of experts, in layers that have none too.
_MISREAD = {"qwen3_moe": ("gate_proj", "up_proj", "down_proj")}


def lora_modules(
    patterns: str | Sequence[str] | None,
    spec: ModelSpec,
    exclude_layers: Sequence[str] = (),
    where: str = "target_modules",
) -> tuple[str, ...]:
    """Return the Hugging Face paths of the linear modules that the regular expressions choose, in model order.

    A pattern chooses a module when it matches the start of its leaf name or path in Hugging Face's names
    (`q_proj`) or MindFormers' (`wq`, `model.layers.0.attention.wq`). A list is a choice between its patterns;
    None is the family's default. `exclude_layers` takes modules out: by leaf, path, or a block around it.
    Raises InputError for a pattern that is no regular expression or matches nothing.
    """
    kind = family(spec.family)
    modules = linear_modules(spec)
    if patterns is None:
        wanted = set(kind.lora_targets)
        chosen = [module for module in modules if _leaf(module) in wanted]
    else:
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        compiled = _compile(patterns, where)
        names = {module: _names(module, kind) for module in modules}
        _refuse_idle(compiled, names, spec, where)
        chosen = [module for module in modules if any(_hits(regex, names[module]) for regex in compiled)]
    if exclude_layers:
        excluding = _compile(exclude_layers, where.replace("target_modules", "exclude_layers"))
        chosen = [module for module in chosen if not _excluded(module, excluding, kind)]
    misread = [module for module in chosen if _leaf(module) in _MISREAD.get(spec.family, ())]
    if misread:
        raise InputError(f"{where}: chooses {misread[0]}, whose adapter peft reads as one of experts: leave it out")
    if not chosen:
        raise InputError(f"{where}: matches no module that exclude_layers leaves ({_existing(modules, kind)})")
    return tuple(chosen)


def trained_adapters(
    modules: Sequence[str],
    spec: ModelSpec,
    freeze_include: Sequence[str] = (),
    freeze_exclude: Sequence[str] = (),
    where: str = "freeze_include",
) -> tuple[str, ...]:
    """Return the modules whose adapters `freeze_include` leaves free; a frozen adapter stays 0, so it is left out.

    Raises InputError when patterns freeze only A or B of an adapter, or all adapters.
    """
    kind = family(spec.family)
    free = []
    for module in modules:
        frozen = [
            _any_matches(names, freeze_include) and not _any_matches(names, freeze_exclude)
            for names in _adapter_names(module, kind)
        ]
        if frozen[0] != frozen[1]:
            raise InputError(f"{where}: freezes only one of the two matrices of the adapter of {module}")
        if not frozen[0]:
            free.append(module)
    if not free:
        raise InputError(f"{where}: freezes all adapters, so nothing is left to train")
    return tuple(free)


def tuned_parameters(
    spec: ModelSpec,
    freeze_include: Sequence[str] = (),
    freeze_exclude: Sequence[str] = (),
    lora: bool = True,
    where: tuple[str, str] = ("freeze_include", "freeze_exclude"),
) -> tuple[str, ...]:
    """Return the base parameters that are trained, by Hugging Face name.

    With LoRA none is, without it all are. A shell pattern in `freeze_include` freezes what it matches, one in
    `freeze_exclude` sets it free; a parameter that both match stays as it was (mindpet's freeze_delta).
    Raises InputError for a pattern that matches neither a parameter nor an adapter.
    """
    kind = family(spec.family)
    names = {name: (name, kind.mindformers.write(name)) for name in tensor_shapes(spec)}
    adapters = [pair for module in linear_modules(spec) for pair in _adapter_names(module, kind)] if lora else []
    known = [*names.values(), *adapters]
    idle = [
        (place, pattern)
        for place, patterns in zip(where, (freeze_include, freeze_exclude), strict=True)
        for pattern in patterns
        if not any(_any_matches(pair, [pattern]) for pair in known)
    ]
    if idle:
        hint = f"names look like {known[1][0]} or {known[1][1]}, * stands for any text"
        raise InputError(*(f"{place}: {pattern!r} matches no parameter ({hint})" for place, pattern in idle))
    chosen = []
    for name, both in names.items():
        frozen, freed = _any_matches(both, freeze_include), _any_matches(both, freeze_exclude)
        if (freed and not frozen) or (not lora and frozen == freed):
            chosen.append(name)
    return tuple(chosen)


def _leaf(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _names(module: str, kind: Family) -> tuple[str, ...]:
    """The four names of a module: leaf and path, Hugging Face's and MindFormers'."""
    mindformers = kind.mindformers.write(module + ".").removesuffix(".")
    return (_leaf(module), module, _leaf(mindformers), mindformers)


def _compile(patterns: Sequence[str], where: str) -> list[re.Pattern]:
    compiled, problems = [], []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except (re.error, RecursionError, OverflowError) as error:
            problems.append(f"{where}: {pattern!r} is no regular expression: {error}")
    if problems:
        raise InputError(*problems)
    return compiled


def _hits(regex: re.Pattern, names: Sequence[str]) -> bool:
    return any(regex.match(name) for name in names)


def _refuse_idle(compiled: list[re.Pattern], names: dict, spec: ModelSpec, where: str) -> None:
    idle = [regex.pattern for regex in compiled if not any(_hits(regex, every) for every in names.values())]
    if spec.state_space:
        _refuse_bypassed(idle, where)
    if idle or not compiled:
        known = _existing(list(names), family(spec.family)) + (_OF_EXPERTS if spec.experts else "")
        leaves = [name for every in names.values() for name in (every[0], every[2])]
        problems = [f"{where}: {pattern!r} matches no module{_near(pattern, leaves)} ({known})" for pattern in idle]
        raise InputError(*(problems or [f"{where}: names no module ({known})"]))


def _refuse_bypassed(idle: list[str], where: str) -> None:
    """Say why modules of a state space that a pattern names take no adapters."""
    found = {
        pattern: reason
        for pattern in idle
        for leaf, reason in state_space.WITHOUT_ADAPTERS.items()
        if re.search(rf"\b{leaf}\b", pattern)
    }
    if found:
        raise InputError(*(f"{where}: {pattern!r}: {reason}" for pattern, reason in found.items()))


def _near(pattern: str, leaves: Sequence[str]) -> str:
    """The nearest existing leaf to the last word of a pattern."""
    words = re.findall(r"\w+", pattern)
    return did_you_mean(words[-1], leaves) if words else ""


def _existing(modules: Sequence[str], kind: Family) -> str:
    leaves = dict.fromkeys(map(_leaf, modules))
    theirs = ", ".join(kind.mindformers.leaves[leaf] for leaf in leaves if leaf in kind.mindformers.leaves)
    return f"there are {', '.join(leaves)}; in MindFormers' names {theirs}"


def _excluded(module: str, excluding: list[re.Pattern], kind: Family) -> bool:
    """MindFormers skips a cell, and all inside it, when a pattern matches the cell's own name."""
    for path in (module, kind.mindformers.write(module + ".").removesuffix(".")):
        parts = path.split(".")
        names = {*parts, *(".".join(parts[: end + 1]) for end in range(len(parts)))}
        if any(_hits(regex, tuple(names)) for regex in excluding):
            return True
    return False


def _adapter_names(module: str, kind: Family) -> tuple[tuple[str, str], tuple[str, str]]:
    """What PEFT and MindFormers call the A and the B of a module's adapter."""
    cell = kind.mindformers.write(module + ".")
    return tuple((f"{module}.lora_{x}.weight", f"{cell}mindpet_delta_lora_{x.lower()}") for x in "AB")


def _any_matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)
