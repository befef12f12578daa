"""Protects the borders: framework imports, import direction, twin engine folders, a fast command line."""

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import msft

PACKAGE = Path(msft.__file__).parent
ENGINES = ("torch", "mindspore")
FRAMEWORKS = {"torch", "mindspore", "transformers", "peft", "deepspeed", "accelerate", "mindformers"}


def imports(file: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_frameworks_are_imported_by_their_own_engine_only(file):
    engine = next((name for name in ENGINES if PACKAGE / "backend" / name in file.parents), None)
    own = {"torch": {"torch", "transformers", "peft", "deepspeed"}, "mindspore": {"mindspore"}}.get(engine, set())
    foreign = {module.split(".")[0] for module in imports(file)} & (FRAMEWORKS - own)
    assert not foreign, f"{file.relative_to(PACKAGE)} imports {', '.join(sorted(foreign))}"


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_but_the_engine_itself_imports_an_engine_folder(engine):
    folder = PACKAGE / "backend" / engine
    for file in PACKAGE.rglob("*.py"):
        if folder not in file.parents:
            assert not any(name.startswith(f"msft.backend.{engine}") for name in imports(file)), file


@pytest.mark.parametrize("package", ["config", "data", "convert", "models"])
def test_lower_packages_know_nothing_of_training_or_the_command_line(package):
    for file in (PACKAGE / package).rglob("*.py"):
        upper = {name for name in imports(file) if name.split(".")[:2] in (["msft", "cli"], ["msft", "train"])}
        assert not upper, f"{file} imports {upper}"


def public_api(file: Path) -> dict[str, str]:
    """Public functions and classes of a module: name -> signature, methods of classes included."""
    api = {}
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            api[node.name] = argument_names(node)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            fields = any(getattr(base, "id", "") == "NamedTuple" for base in node.bases) or any(
                "dataclass" in ast.dump(decorator) for decorator in node.decorator_list
            )
            api[node.name] = "fields" if fields else "class"
            for method in node.body:
                public = isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
                if public or (isinstance(method, ast.FunctionDef) and method.name == "__init__"):
                    api[f"{node.name}.{method.name}"] = argument_names(method)
    return api


def argument_names(function: ast.FunctionDef) -> str:
    arguments = function.args
    names = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
    return f"({', '.join(names)})"


# What stands around torch's own modules: FSDP2 and DeepSpeed put hooks on them that ask for other ways to gradients.
TORCH_ALONE = {"elsewhere.py", "lora.py", "network.py", "placed.py", "replaced.py", "sharding.py", "sharded.py"}
TORCH_ALONE |= {"zero.py", "zero_parts.py"}
# What a network is made of where transformers has none, and what torch compiles beforehand.
TORCH_ALONE |= {"skeleton.py", "warm_up.py"}


# The program that MindSpore's semi-automatic mode cuts; torch's processes compute the same layout by explicit slices.
# What stands around the layers is transformers' on torch.
MINDSPORE_ALONE = {"deep_norm.py", "fused_attention.py", "outside.py", "parts.py", "reading_block.py"} | {
    "whole.py",
    "whole_engine.py",
    "whole_model.py",
    "whole_step.py",
}


def test_both_engine_folders_hold_the_same_files():
    torch, mindspore = ({file.name for file in (PACKAGE / "backend" / engine).glob("*.py")} for engine in ENGINES)
    assert torch - TORCH_ALONE == mindspore - MINDSPORE_ALONE
    assert torch >= TORCH_ALONE and mindspore >= MINDSPORE_ALONE


# How a block and its attention are computed is each engine's own: MindSpore's are written out and compiled, torch's
# take the place of what transformers' and peft's modules compute.
OWN = {"attention.py", "block.py", "cached_block.py", "experts.py", "sequence.py"} | TORCH_ALONE
OWN |= {"state_block.py", "cached_state.py", "relative_attention.py"}
# What only one framework needs; MindSpore's gradients are written out, torch differentiates by itself.
ONE_SIDED = {
    "ops.py": {"dropout", "linear", "sum_in_blocks", "token_losses_and_gradient"}
    | {"gradient", "line_attention", "product", "product_a", "rotary_tables"},
    "decoder.py": {"Decoder.hidden", "Decoder.through", "Decoder.set_dropout", "Decoder.entered"}
    | {"Decoder.autocast", "Decoder.run", "Decoder.shape_of", "Decoder.blocks"}
    | {"Decoder.forward", "Decoder.backward", "Trace", "by_position"},
    "encoder_decoder.py": {"Stack", "Stack.__init__", "Stack.blocks", "Stack.numbers", "Stack.tuned", "Way", "Trace"}
    | {"EncoderDecoder.forward", "EncoderDecoder.backward", "EncoderDecoder.hidden", "EncoderDecoder.encoded"}
    | {f"EncoderDecoder.{part}" for part in ("attention_of", "heads", "attended", "normed", "fed_forward")},
    "model.py": {"Model.tuned"},
    "distributed.py": {"device_mesh", "placed"},
    "vocabulary.py": {"Vocabulary.embed_backward", "Vocabulary.token_losses_and_gradient"},
    "device.py": {"bind_threads"},
    "state_space.py": {"Scan.forward", "Scan.backward", "Scan.plan", "Scan.plan_of", "Scan.results", "Plan"},
}


@pytest.mark.parametrize("file", sorted({file.name for file in (PACKAGE / "backend" / "torch").glob("*.py")} - OWN))
def test_both_engines_offer_the_same_names_with_the_same_signatures(file):
    left, right = (public_api(PACKAGE / "backend" / engine / file) for engine in ENGINES)
    for name in ONE_SIDED.get(file, ()):
        left.pop(name, None), right.pop(name, None)
    assert left == right


def test_help_is_fast_and_imports_nothing_heavy():
    code = "import sys; from msft.cli.main import main; main(['--help']); print(sorted(sys.modules), file=sys.stderr)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3
    loaded = set(ast.literal_eval(done.stderr.strip().splitlines()[-1]))
    assert not loaded & (FRAMEWORKS | {"numpy", "pydantic", "rich", "yaml"})
