"""Any text as a recipe, any words as overrides: accepted, or refused with file and line, quickly, running nothing."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import strategies as st

from msft.config import derive
from msft.config.checks import check_device, check_paths
from msft.config.load import load_recipe
from msft.config.report import ignored_lines
from msft.config.structure import used_keys
from msft.config.yaml_lines import dotted, write_yaml
from msft.errors import InputError
from tests.faults.inputs import bounded, result_or_error, short_and_long, try_all
from tests.faults.json_values import changed, damaged

CONFIGS = sorted(Path(__file__).parents[2].glob("configs/**/*.yaml"))
TEXTS = [path.read_text(encoding="utf-8") for path in CONFIGS]
REAL = [yaml.safe_load(text) for text in TEXTS]
QUICKSTART = TEXTS[CONFIGS.index(Path(__file__).parents[2] / "configs" / "quickstart.yaml")]

KEYS = sorted({key for _, key in used_keys()} | {"<<", "profile", "x"})
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=10),
    st.sampled_from(["CheckpointMonitor", "ObsMonitor", "AdamW", "float16", "1e-5", "", "~", "lora", "DynamicLoss"]),
)
BLOCKS = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=15,
)
TOP = st.sampled_from(sorted({path[0] if path else key for path, key in used_keys()}))
PIECES = (
    ["- ", "  ", ": ", "\n", "&a ", "*a", "<<: ", "<<: *a\n", "{", "}", "[", "]", "'", '"', "|\n", "!!", "# ", "? "]
    + ["!!python/object/apply:os.system ['touch x']", "!!python/name:os.system", "!!binary |\n  ", "!!set {a, b}"]
    + ["---", "...\n", "%YAML 9.9", "\t", "\x00", "\ud800", "\ufeff", "\u2028", "\\u", "1e999", "0x" + "f" * 99]
    + ["9" * 5000, "[" * 3000, "{a: " * 500, "- " * 500, "? " * 500, "!" * 300, "a" * 2000, "-.inf", "1_0", "0o17"]
)
SNIPPETS = st.sampled_from([*QUICKSTART.splitlines(), *PIECES]) | st.text(max_size=5)


def check(folder, content: str | bytes, words=()):
    path = folder / "fuzz.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        recipe = load_recipe(path, words)
    except InputError as error:
        assert error.problems
        for problem in error.problems:
            assert re.match(r"\S.*: ", problem), problem
            assert "\n" not in problem and len(problem) < 1000
            problem.encode("utf-8")
    else:
        use(recipe)
        path.write_text(recipe.to_yaml(), encoding="utf-8")
        assert load_recipe(path).to_yaml() == recipe.to_yaml()


def use(recipe):
    """What a run asks of a recipe before it opens any file but config.json."""
    assert all("\n" not in line for line in ignored_lines(recipe))
    result_or_error(lambda: check_paths(recipe), ":")
    result_or_error(lambda: check_device(recipe, "cpu"), ":")
    for question in (derive.schedule, derive.stop_step, derive.epochs, derive.saving, derive.evaluation):
        question(recipe)
    assert derive.global_batch_size(recipe, 2) > 0 and derive.eval_batch_size(recipe) > 0
    assert derive.log_every(recipe) > 0
    derive.runtime(recipe, "cpu", False)
    derive.sampling(recipe)
    if recipe.model.config:
        spec = result_or_error(lambda: derive.model_spec(recipe), "fuzz.yaml")
        if spec and spec.num_hidden_layers < 100:
            result_or_error(lambda: derive.tuning(recipe, spec), "fuzz.yaml")


@short_and_long(150, 4000)
def test_blocks_of_known_keys_with_any_values(tmp_path, count):
    blocks = st.dictionaries(TOP, BLOCKS, max_size=4)
    try_all(count, blocks, lambda value: check(tmp_path, write_yaml({"model": {"pretrained": "x"}, **value})))


@short_and_long(40, 1500)
def test_real_recipes_with_values_changed(tmp_path, count):
    documents = st.sampled_from(REAL).flatmap(changed)
    dump = yaml.SafeDumper
    try_all(count, documents, lambda value: check(tmp_path, yaml.dump(value, Dumper=dump, sort_keys=False)))


@st.composite
def lines_changed(draw):
    lines = draw(st.sampled_from(TEXTS)).splitlines()
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(lines) - 1))
        kind = draw(st.sampled_from(["drop", "repeat", "move", "indent", "value", "snippet"]))
        line = lines[at]
        if kind == "drop":
            del lines[at]
        elif kind == "repeat":
            lines.insert(draw(st.integers(0, len(lines))), line)
        elif kind == "move":
            lines.insert(draw(st.integers(0, len(lines) - 1)), lines.pop(at))
        elif kind == "indent":
            lines[at] = " " * draw(st.integers(1, 4)) + line
        elif kind == "value":
            lines[at] = line.split(":")[0] + ": " + draw(SNIPPETS)
        else:
            lines.insert(at, draw(SNIPPETS))
    return "\n".join(lines)


@short_and_long(40, 1500)
def test_real_recipes_with_lines_changed(tmp_path, count):
    try_all(count, lines_changed(), lambda text: check(tmp_path, text))


@short_and_long(40, 1500)
def test_real_recipes_with_bytes_changed(tmp_path, count):
    recipes = st.sampled_from([text.encode() for text in TEXTS]).flatmap(damaged)
    try_all(count, recipes, lambda content: check(tmp_path, content))


@short_and_long(150, 2000)
def test_any_text(tmp_path, count):
    try_all(count, st.lists(SNIPPETS, max_size=25).map("".join), lambda text: check(tmp_path, text))


@short_and_long(60, 1500)
def test_any_bytes(tmp_path, count):
    texts = st.text(max_size=60).map(lambda text: text.encode("utf-16", "surrogatepass"))
    try_all(count, st.binary(max_size=200) | texts, lambda content: check(tmp_path, content))


NAMES = st.sampled_from(sorted({dotted((*path, key)) for path, key in used_keys()}))
WORDS = st.one_of(
    NAMES.map(lambda name: f"--{name}"),
    st.builds("{}={}".format, NAMES, st.text(max_size=6)),
    st.sampled_from(["--epochs", "--options", "--predict_data", "--callbacks.1.x", "--", "-", "=", "--=", "--a..b"]),
    st.text(max_size=6),
    st.sampled_from(["{a: 1}", "[1, 2", "[]", "*a", "&a b", "!!int x", "1e-5", "True", "9" * 99, "{", "a: b"]),
    st.sampled_from(["[" * 300, "!!python/name:os.system", "--model.a.b.c", "--runner_config.epochs.x", "\ud800"]),
)


@short_and_long(150, 3000)
def test_any_words(tmp_path, count):
    try_all(count, st.lists(WORDS, max_size=6), lambda words: check(tmp_path, QUICKSTART, words))


BOMBS = {
    "aliases": "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60)),
    "merged blocks": "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n}\n  <<: [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60)),
    "a block in itself": "model: &a\n  pretrained: x\n  more: *a\n",
    "a block merged into itself": "model: &a\n  <<: *a\n",
    "depth": "a: " + "[" * 100_000,
    "deep blocks": "".join(" " * depth + "a:\n" for depth in range(600)),
    "size": "a: " + "x" * (1 << 20),
    "keys": "".join(f"k{n}: 1\n" for n in range(25_000)),
    "digits": "seed: " + "9" * 100_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(tmp_path, name):
    path = tmp_path / "bomb.yaml"
    path.write_text(BOMBS[name])
    with bounded(seconds=20), pytest.raises(InputError, match="bomb.yaml"):
        load_recipe(path)
