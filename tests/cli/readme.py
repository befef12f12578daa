"""The README's commands, block by block, and what its tests change in them so that they run on any machine."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHAT_MODEL, LLAMA = "models/SmolLM2-135M-Instruct", "Llama-2-7b-hf"


class Step(NamedTuple):
    """A command by its first words; `end` of it is replaced by `instead`, so an empty `end` means added words."""

    start: str
    end: str = ""
    instead: str = ""


# What turns the recipes of Llama 2 7B into those of the small model, on a machine without accelerator.
SIZES = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 320, "intermediate_size": 48}
DTYPES = dict.fromkeys(("compute_dtype", "param_init_type", "softmax_compute_type", "rotary_dtype"), "float32")
SMALL = " --device cpu" + "".join(f" --model.model_config.{key} {value}" for key, value in (SIZES | DTYPES).items())
# The recipes' learning rates suit 7B models; on this one a few steps of them would change nothing that can be seen.
FASTER = f"{SMALL} --lr_schedule.learning_rate 0.01"

CUT = f'--parallel_config.model_parallel 2 {FASTER} --output_dir output/cut" 2'

# Every command of the README's bash blocks, in order, and the words that the test changes in it.
INSTALL = (Step("make demo"), Step("make test"))  # not run here
ACTIVATE = Step("source .venv/bin/activate")
QUICKSTART = (
    ACTIVATE,
    Step("msft llama_preprocess"),
    Step("msft train configs/quickstart.yaml --backend torch"),
    Step("msft generate", instead=" --max_new_tokens 16"),
    Step("msft merge"),
)
EXTRAS = (Step("pip install"),)  # not run here
WORKFLOW = (
    Step("convert_weight"),
    Step("python tools/preprocess/alpaca_converter.py"),
    Step("python tools/preprocess/llama_preprocess.py"),
    Step("python run_finetune.py --config configs/llama2/finetune_llama2_7b.yaml", instead=FASTER),
    Step("python run_finetune.py --config configs/llama2/lora_llama2_7b.yaml", instead=FASTER),
    # Two processes in place of eight: the machines that run the tests have two cores.
    Step("bash scripts/msrun/msrun_launcher.sh", end='" 8', instead=f'{FASTER} --parallel_config.data_parallel 2" 2'),
    Step("bash scripts/msrun/msrun_launcher.sh", end='4 --parallel_config.model_parallel 2" 8', instead=f"1 {CUT}"),
    Step("msft merge"),
)
FEW = " --steps 2 --device cpu"
PARITY = (
    Step("msft parity configs/quickstart.yaml", instead=FEW),
    Step("msft parity --model", end=" --steps 3", instead=FEW),
)
GOLDEN = (
    Step("msft parity configs/quickstart.yaml --engines torch", instead=FEW),
    Step("msft parity configs/quickstart.yaml --engines mindspore", instead=" --device cpu"),
    Step("msft parity configs/quickstart.yaml --perturb", instead=f"{FEW} --backend torch"),
)
ESTIMATE = (Step("msft estimate"),)
LAUNCH = (
    Step("msft launch configs/quickstart.yaml --nproc_per_node 2", instead=" --dry-run"),
    Step("msft launch configs/quickstart.yaml --hostfile hosts", instead=" --dry-run"),
)
# Two processes in place of eight again.
OF_TWO = f"1 --parallel_config.model_parallel 2 --nproc_per_node 2 --backend torch --steps 2{SMALL}"
VERIFY = (Step("msft verify_layout", end="2 --parallel_config.model_parallel 4", instead=OF_TWO),)
SEMI_AUTO = (Step("msft estimate"),)
FAMILIES = (
    Step("msft list"),
    Step("msft list qwen2"),
    Step("msft recipe --model qwen2"),
    Step("msft estimate qwen2_7b_lora.yaml"),
)
# The files are written by the test, with the small model in the place of theirs.
_FOREIGN = f" --model_name_or_path {CHAT_MODEL} --device cpu max_steps=3 gradient_accumulation_steps=1"
_FLOAT32 = " --model.compute_dtype float32 --model.param_init_type float32"
FOREIGN = (
    Step("msft train examples", end=" --model_name_or_path Meta-Llama-3-8B-Instruct", instead=_FOREIGN),
    Step("msft train train_args", end=" --model_name_or_path Qwen1.5-7B-Chat", instead=f"{_FOREIGN}{_FLOAT32}"),
)
BLOCKS = (INSTALL, QUICKSTART, EXTRAS, WORKFLOW, VERIFY, SEMI_AUTO, PARITY, GOLDEN, ESTIMATE, LAUNCH, FAMILIES, FOREIGN)

# What stands in the text between backquotes: whole commands, and flags to add to the commands above.
SUITES = ("make test", "make test-faults", "make test-netns", "make test-mindformers", "make test-deepspeed")
BENCH = ("make bench DATA=alpaca.json", 'make bench DATA=alpaca.json QUESTIONS="startup conversion"')
TARGETS = ("make demo", "make demo BACKEND=torch", "make model", *SUITES, *BENCH)  # not run here
DRY_RUN = "msft train RECIPE --dry_run"
# Layouts that `verify_layout` verifies: tests/cli/test_readme_layouts.py.
_OF = "--parallel_config."
LAYOUTS = (
    f"{_OF}data_parallel 8",
    "--parallel.enable_parallel_optimizer True",
    f"{_OF}data_parallel 1 {_OF}model_parallel 8 {_OF}use_seq_parallel True {_OF}vocab_emb_dp False",
    f"{_OF}data_parallel 4 {_OF}context_parallel 2",
    f"{_OF}data_parallel 4 {_OF}pipeline_stage 2 {_OF}micro_batch_num 4",
    "--backend torch --strategy fsdp",
    f"--backend torch --strategy fsdp {_OF}data_parallel 2 {_OF}model_parallel 4",
    "--backend torch --strategy deepspeed",
    f"--parallel.parallel_mode 1 {_OF}data_parallel 2 {_OF}model_parallel 4",
)
FLAGS = ("--backend mindspore", "--optimizer.weight_decay 0.1", "--backend torch", "--device cpu")


def commands(block):
    """The commands of a bash block as one line each, without comments."""
    lines = re.sub(r" *\\\n *", " ", block).splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def fences():
    """(language, text) of every fenced block."""
    return re.findall(r"^ *```(\w*)\n(.*?)^ *```$", README, flags=re.M | re.S)


def blocks():
    return [commands(text) for language, text in fences() if language == "bash"]


def spans():
    """What stands between backquotes in the text and has a space in it or begins as a flag."""
    text = re.sub(r"^ *```.*?^ *```$", "", README, flags=re.M | re.S)
    return [span for span in re.findall(r"`([^`\n]+)`", text) if " " in span or span.startswith("-")]


def adapted(command, step):
    assert command.startswith(step.start) and command.endswith(step.end), f"{command!r} is not as {step} says"
    return command.removesuffix(step.end) + step.instead


def command_of(block, start):
    """The adapted command of a block that starts so."""
    (number,) = [number for number, step in enumerate(BLOCKS[block]) if step.start.startswith(start)]
    return adapted(blocks()[block][number], BLOCKS[block][number])


def in_block(number):
    """(command, step) of a block."""
    return zip(blocks()[number], BLOCKS[number], strict=True)
