"""Any text as a recipe, any words as overrides: accepted, or refused with an InputError, quickly."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_texts import MINIMAL

from msft.config.load import load_recipe
from msft.config.structure import used_keys
from msft.config.yaml_lines import dotted, write_yaml
from msft.errors import InputError

EXAMPLES = settings(max_examples=150, deadline=5000)

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
SNIPPETS = st.sampled_from(
    [*MINIMAL.splitlines(), "- ", "  ", ": ", "\n", "&a ", "*a", "<<: ", "{", "}", "[", "]", "'", '"', "|\n", "!!"]
    + ["# ", "!!python/object:os.system", "? ", "---", "%YAML 9.9", "\t", "\x00", "\ud800", "\\u", "1e999"]
    + ["0x" + "f" * 99]
)


def check(tmp_path_factory, text: str, words=()):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        recipe = load_recipe(path, words)
    except InputError as error:
        assert error.problems
        for problem in error.problems:
            assert re.match(r"\S.*: ", problem), problem
            assert "\n" not in problem and len(problem) < 1000
            problem.encode("utf-8")
    else:
        path.write_text(recipe.to_yaml(), encoding="utf-8")
        assert load_recipe(path).to_yaml() == recipe.to_yaml()


@EXAMPLES
@given(st.dictionaries(TOP, BLOCKS, max_size=4))
def test_blocks_of_known_keys_with_any_values(tmp_path_factory, blocks):
    check(tmp_path_factory, write_yaml({"model": {"pretrained": "x"}, **blocks}))


@EXAMPLES
@given(st.lists(SNIPPETS | st.text(max_size=5), max_size=25))
def test_any_text(tmp_path_factory, pieces):
    check(tmp_path_factory, "".join(pieces))


@EXAMPLES
@given(st.data())
def test_a_recipe_with_a_piece_replaced(tmp_path_factory, data):
    start = data.draw(st.integers(0, len(MINIMAL)))
    end = data.draw(st.integers(start, min(len(MINIMAL), start + 12)))
    check(tmp_path_factory, MINIMAL[:start] + data.draw(SNIPPETS | st.text(max_size=4)) + MINIMAL[end:])


NAMES = st.sampled_from(sorted({dotted((*path, key)) for path, key in used_keys()}))
WORDS = st.one_of(
    NAMES.map(lambda name: f"--{name}"),
    st.builds("{}={}".format, NAMES, st.text(max_size=6)),
    st.sampled_from(["--epochs", "--options", "--predict_data", "--callbacks.1.x", "--", "-", "=", "--=", "--a..b"]),
    st.text(max_size=6),
    st.sampled_from(["{a: 1}", "[1, 2", "[]", "*a", "&a b", "!!int x", "1e-5", "True", "9" * 99, "{", "a: b"]),
)


@EXAMPLES
@given(st.lists(WORDS, max_size=6))
def test_any_words(tmp_path_factory, words):
    check(tmp_path_factory, MINIMAL, words)
