"""No file runs code: whatever it says, the canary, a folder that the code in it would make, is never there."""

import contextlib
import io
import json
import pickle
import shutil
import zipfile

import pytest
from hypothesis import strategies as st

from msft.cli.main import main as msft
from msft.config.load import load_recipe
from msft.convert import torch_file, torch_pickle
from msft.convert.open import open_weights, read_spec
from msft.data.chat_template import ChatTemplate
from msft.data.formats import BadRow, Turn
from msft.errors import InputError
from tests.faults.inputs import result_or_error, short_and_long, try_all


@pytest.fixture
def canary(tmp_path):
    """The path that code would create; checked after each test."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code from a file was run"


TAGS = [
    "!!python/object/apply:os.mkdir ['{}']",
    "!!python/object/apply:os.system ['mkdir {}']",
    "!!python/object/new:os.mkdir ['{}']",
    "!!python/object/apply:subprocess.check_output [['mkdir', '{}']]",
    "!!python/object/apply:eval [\"__import__('os').mkdir('{}')\"]",
    "!<tag:yaml.org,2002:python/object/apply:os.mkdir> ['{}']",
    "!!python/module:antigravity",
    "!!python/name:os.mkdir",
    "!!map {{? !!python/object/apply:os.mkdir ['{}'] : 1}}",
]
KEYS = ["backend", "seed", "model", "output_dir", "x", "<<"]


@short_and_long(60, 1500)
def test_yaml_tags(tmp_path, canary, count):
    def check(lines):
        path = tmp_path / "r.yaml"
        path.write_text("\n".join(f"{key}: {tag.format(canary)}" for key, tag in lines))
        words = [f"{key}={tag.format(canary)}" for key, tag in lines]
        for action in (lambda: load_recipe(path), lambda: load_recipe(path, words)):
            assert result_or_error(action, ":") is None
        assert not canary.exists()

    try_all(count, st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(TAGS)), min_size=1, max_size=4), check)


def attacks(path: str) -> list[bytes]:
    """Opcodes that would make the folder `path` with Python's own unpickler, by every way of calling."""
    word = path.encode()
    text = b"X" + len(word).to_bytes(4, "little") + word
    name = b"S'" + word + b"'\n"
    stack_global = b"\x8c\x02os\x8c\x05mkdir\x93"
    evil = f"__import__('os').mkdir({path!r})".encode()
    code = b"X" + len(evil).to_bytes(4, "little") + evil
    return [
        b"cos\nmkdir\n" + text + b"\x85R",  # GLOBAL, REDUCE
        stack_global + text + b"\x85R",  # STACK_GLOBAL, REDUCE
        b"(" + name + b"ios\nmkdir\n",  # INST
        b"(cos\nmkdir\n" + name + b"o",  # OBJ
        b"cos\nmkdir\n" + text + b"\x85\x81",  # NEWOBJ
        b"cos\nmkdir\n" + text + b"\x85}\x92",  # NEWOBJ_EX
        b"cbuiltins\neval\n" + code + b"\x85R",
        b"cbuiltins\nexec\n" + code + b"\x85R",
        b"ccollections\nOrderedDict\n)R}X\x09\x00\x00\x00__class__cos\nmkdir\nsb",  # BUILD
        b"ctorch._utils\n_rebuild_tensor_v2\n(cos\nmkdir\n" + text + b"tR",
        b"cos\nmkdir\n" + text + b"Q",  # BINPERSID
        b"\x82\x01",  # EXT1
    ]


def test_the_attacks_are_real(tmp_path):
    """Those that call make the folder when Python's own unpickler reads them: surviving them means something."""
    made = 0
    for attack in attacks(str(tmp_path / "canary"))[:8]:
        with contextlib.suppress(pickle.UnpicklingError, TypeError):
            pickle.loads(b"\x80\x04" + attack + b".")
        made += (tmp_path / "canary").exists()
        shutil.rmtree(tmp_path / "canary", ignore_errors=True)
    assert made == 6


PIECES = [b"}", b"]", b")", b"(", b"t", b"\x85", b"\x86", b"s", b"u", b"a", b"e", b"R", b"b", b"o", b"\x81", b"\x92"]
PIECES += [b"0", b"2", b"q\x00", b"h\x00", b"\x94", b"N", b"K\x02", b"cos\nsystem\n", b"cbuiltins\neval\n", b"."]


@short_and_long(100, 4000)
def test_pickles(tmp_path, canary, count):
    """An attack among any other opcodes, alone and in a zip of torch.save."""
    found = st.sampled_from(attacks(str(canary)))
    pieces = st.lists(st.sampled_from(PIECES), max_size=6).map(b"".join)
    path = tmp_path / "x.bin"

    def check(drawn):
        before, attack, after, protocol = drawn
        data = b"\x80" + protocol + before + attack + after + b"."
        result_or_error(lambda: torch_pickle.load(data, "x.bin"), "x.bin")
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("archive/data.pkl", data)
        path.write_bytes(archive.getvalue())
        assert result_or_error(lambda: torch_file.read_index(path), str(path)) in (None, {})
        path.write_bytes(data)
        result_or_error(lambda: open_weights(path), str(path))
        assert not canary.exists()

    try_all(count, st.tuples(pieces, found, pieces, st.sampled_from([b"\x02", b"\x03", b"\x04"])), check)


SELVES = [
    "''",
    "[]",
    "{}",
    "1",
    "cycler",
    "joiner",
    "namespace",
    "range",
    "messages",
    "self",
    "loop",
    "raise_exception",
]
SELVES += ["strftime_now", "messages[0].items", "''.format", "(1).__class__", "dict", "none", "caller", "varargs"]
STEPS = ["__class__", "__mro__", "__subclasses__()", "__globals__", "__init__", "__base__", "__builtins__", "__dict__"]
STEPS += ["mro()", "_Namespace__attrs", "gi_frame", "f_globals", "f_builtins", "__func__", "__self__", "__wrapped__"]
STEPS += ["__import__('os')", "os", "mkdir", "environment", "_TemplateReference__context", "__reduce_ex__(2)"]
FILTERS = [
    "attr('{}')",
    "map(attribute='{}') | list",
    "selectattr('{}') | list",
    "groupby('{}')",
    "sort(attribute='{}')",
]


@st.composite
def templates(draw, path):
    expression = draw(st.sampled_from(SELVES))
    for _ in range(draw(st.integers(1, 5))):
        step = draw(st.sampled_from(STEPS))
        kind = draw(st.sampled_from([".", "[", "|"]))
        if kind == ".":
            expression += f".{step}"
        elif kind == "[":
            expression += f"['{step.removesuffix('()')}']"
        else:
            expression = f"({expression} | {draw(st.sampled_from(FILTERS)).format(step.removesuffix('()'))})"
    call = f"{expression}('{path}')" if draw(st.booleans()) else expression
    frames = [
        "{{{{ {} }}}}",
        "{{% for x in {} %}}{{{{ x('mkdir {}') }}}}{{% endfor %}}",
        "{{% set x = {} %}}{{{{ x }}}}",
    ]
    return draw(st.sampled_from(frames)).format(call, path)


@short_and_long(100, 4000)
def test_chat_templates(canary, count):
    def check(source):
        try:
            text = ChatTemplate(source, {}).render(None, [Turn("user", "hi")])
        except (BadRow, InputError):
            text = ""
        assert not canary.exists()
        assert "<class 'os." not in text and "module 'os'" not in text and "built-in function mkdir" not in text

    try_all(count, templates(str(canary)), check)


@pytest.mark.parametrize(
    "change",
    [
        {"auto_map": {"AutoConfig": "modeling.Canary", "AutoModelForCausalLM": "modeling.Canary"}},
        {"trust_remote_code": True, "auto_map": {"AutoTokenizer": ["modeling.Canary", None]}},
        {"architectures": ["modeling.Canary"]},
        {"model_type": "modeling.Canary"},
    ],
)
def test_a_model_folders_python_files_are_not_imported(write_recipe, tiny_model, tmp_path, canary, change, capfd):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "modeling.py").write_text(f"import os\nos.mkdir({str(canary)!r})\nclass Canary: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        document = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(document | change))
    recipe = write_recipe(model__pretrained=str(folder))
    assert msft(["train", str(recipe), "--dry_run"]) in (0, 2)
    assert "Traceback" not in capfd.readouterr().err
    result_or_error(lambda: open_weights(folder, read_spec(folder)), str(folder))


def test_python_files_of_a_recipe_are_not_run(write_recipe, tmp_path, canary):
    (tmp_path / "plugin.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    assert msft(["train", str(write_recipe()), "--register_path", str(tmp_path), "--dry_run"]) == 0
