"""Protects FSDP, and DeepSpeed in a run: what is shared out over processes trains as the whole model does.

Checkpoints know no layout.

Biases, an untied and a tied head, dropout, accumulation, clipping, decay, parts of unequal size and empty ones.
"""

import json
import math

import numpy as np
import pytest

from msft.backend import slices
from msft.backend.contract import EngineState
from msft.backend.mesh import Mesh
from msft.convert.open import open_weights
from msft.train import sliced
from tests.conformance import cut_models
from tests.conformance.test_cut_models import ALL, TOKENS, VOCABULARY, check_equal_to_one_process, shared_out, train

FSDP = {"strategy": "fsdp"}
# Of a step of a run: two, three and four processes have equal shares.
ROWS = 12
COUNTERS = ("step", "optimizer_step", "loss_scale", "good_steps")
APPLIED = {
    "fsdp": "strategy fsdp: parameters, gradients and moments in 2 parts",
    "deepspeed": "strategy deepspeed: ZeRO stage 3 over 2 ranks",
}
SHARED = {
    1: "processes: 2, each with its part of the model and its share of every batch ({})",
    2: "processes: 4, each with its part of the model ({}), 2 shares of every batch, each for a model that is cut over",
}


@pytest.mark.parametrize(
    ("kind", "workers", "settings"),
    [
        ("full", 2, {"recompute": True}),
        pytest.param("lora", 2, {}, marks=pytest.mark.slow),
        pytest.param("lora", 2, {"compile": True}, marks=pytest.mark.slow),
        pytest.param("full", 4, {}, marks=pytest.mark.slow),
        # Four rows of A do not make three equal parts, and the third one is empty; one process has two rows of data.
        pytest.param("lora", 3, {"recompute": True}, marks=pytest.mark.slow),
        pytest.param("tied", 3, {}, marks=pytest.mark.slow),
    ],
)
def test_a_sharded_model_trains_as_the_whole_one(kind, workers, settings, write_recipe, tmp_path):
    recipe = write_recipe("torch")
    check_equal_to_one_process("torch", kind, 1, workers, recipe, tmp_path, {**FSDP, **settings})
    whole = cut_models.engine("torch", kind)
    shapes = dict(whole.model.decoder.network.named_parameters())
    shapes = {f"parameter {name}": part.shape for name, part in shapes.items()}
    for moment in ("first", "second"):
        shapes |= {f"{moment} {name}": part.shape for name, part in whole.optimizer.first.items()}
    held = np.load(tmp_path / "held.npz")
    assert set(held) == set(shapes)
    for name, (rows, *width) in shapes.items():
        assert held[name] == -(-rows // workers) * math.prod(width), name


def test_a_cut_model_is_sharded_too_and_is_whole_again_on_either_engine(write_recipe, tmp_path):
    """Two models of two slices each, whose parts lie in two dimensions: of rows of slices by rows, and by columns."""
    expected = check_equal_to_one_process("torch", "both", 2, 4, write_recipe("torch"), tmp_path, FSDP | TOKENS)
    check_held_by_each_of_four(tmp_path, expected)
    found = np.load(tmp_path / "result.npz")
    for backend in ("torch", "mindspore"):
        engine = cut_models.engine(backend, "both")
        engine.import_state(state_of_parts(tmp_path / "parts", found["counters"]))
        state = engine.export_state()
        kinds = {"weights": state.weights, "first": state.first_moment, "second": state.second_moment}
        for name, array in ((f"{kind} {name}", kinds[kind][name]) for kind in kinds for name in kinds[kind]):
            np.testing.assert_array_equal(array, found[name], err_msg=f"{backend} {name}")


def check_held_by_each_of_four(folder, expected):
    """The first rank holds the first half of the rows of its slice of every tuned tensor, and of its moments."""
    held = np.load(folder / "held.npz")
    mesh = Mesh(2, 2, sequence=True)
    for name, whole in ((name, whole) for name, whole in expected.items() if name.startswith("first ")):
        rows, *width = slices.own_shape(name.removeprefix("first "), whole.shape, mesh)
        assert held[name] == -(-rows // 2) * math.prod(width), name


def state_of_parts(folder, counters):
    """The state that the ranks wrote, each its part."""
    kinds = (sliced.Tensors(folder, kind) for kind in sliced.KINDS)
    return EngineState(*kinds, dict(zip(COUNTERS, counters, strict=True)))


@pytest.mark.parametrize(
    ("kind", "tensor", "parts", "workers", "settings"),
    [
        ("full", 2, 1, 4, {}),
        ("full", 2, 1, 4, ALL | {"recompute": True}),
        ("full", 2, 2, 4, TOKENS),
        ("lora", 2, 1, 4, ALL | {"compile": True}),
        ("lora", 2, 2, 4, {"recompute": True}),
        ("bias", 2, 1, 4, ALL),
        ("tied", 2, 1, 4, {}),
        ("tied", 2, 1, 4, TOKENS),
        ("tied", 2, 1, 4, VOCABULARY),
        # Slices of 48, 32 and 16 rows of three, and four rows of A: parts of unequal size and an empty one.
        ("both", 2, 1, 6, {}),
    ],
)
@pytest.mark.slow
def test_slices_of_a_model_are_sharded(kind, tensor, parts, workers, settings, write_recipe, tmp_path):
    check_equal_to_one_process("torch", kind, tensor, workers, write_recipe("torch"), tmp_path, FSDP | settings, parts)


@pytest.mark.slow
def test_frozen_weights_are_shared_out_in_their_own_dtype(write_recipe, tmp_path):
    """bfloat16 beside float32 adapters; the bar is bfloat16's, as the rows of each process are multiplied alone."""
    whole = cut_models.engine("torch", "lora", compute="bfloat16")
    expected = cut_models.measure(whole, lambda one: one)
    np.savez(tmp_path / "start.npz", **expected)
    settings = {**FSDP, "compute": "bfloat16"}
    found, _ = shared_out("torch", "lora", 1, 2, write_recipe("torch"), tmp_path, settings)
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-2)


@pytest.mark.parametrize(
    ("strategy", "tuned", "tensor"),
    [
        ("fsdp", "full", 2),
        pytest.param("fsdp", "full", 1, marks=pytest.mark.slow),
        pytest.param("fsdp", "lora", 1, marks=pytest.mark.slow),
        pytest.param("fsdp", "lora", 2, marks=pytest.mark.slow),
        pytest.param("deepspeed", "lora", 1, marks=pytest.mark.deepspeed),
        pytest.param("deepspeed", "full", 1, marks=pytest.mark.deepspeed),
    ],
)
def test_a_sharded_run_is_gone_on_with_by_one_process(strategy, tuned, tensor, write_recipe, tmp_path, tiny_data):
    """One process reads its checkpoint, and the log is that of one process.

    17 rows in steps of 8: of the third step's micro-batches, one has a row for one of two shares and none for the
    other, the other has none at all. With `tensor` 2 each share is of two ranks.
    """
    changes = {"model__pet_config": None} if tuned == "full" else {}
    if strategy == "deepspeed":
        changes["deepspeed"] = {"zero_optimization": {"stage": 3}, "gradient_clipping": "auto"}
    recipe = write_recipe(
        "torch",
        strategy=strategy,
        optimizer={"type": "AdamW", "learning_rate": 0.002},
        train_dataset={
            "data_loader": {"dataset_dir": str(tiny_data[0]), "num_samples": 17},
            "drop_remainder": False,
            "padding": "longest",
        },
        eval_dataset={"data_loader": {"dataset_dir": str(tiny_data[1])}},
        do_eval=True,
        eval_step_interval=3,
        callbacks=[{"type": "CheckpointMonitor", "save_checkpoint_steps": 3}],
        runner_config={"epochs": 2, "gradient_accumulation_steps": 2},
        **changes,
    )
    common = ["--config", str(recipe)]
    done = train([*common, "--batch_size", "4", "--output_dir", "one"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"strategy {strategy}: one process has nobody to share the model with" in done.stdout + done.stderr
    words = ["--batch_size", "2", "--runner_config.stop_step", "3", "--output_dir", "two"]
    words += ["--parallel_config.model_parallel", str(tensor)]
    done = train([*common, *words], tmp_path, workers=2 * tensor)
    assert done.returncode == 0, done.stderr + done.stdout
    checkpoint = tmp_path / "two" / "checkpoints" / "step-3"
    assert sorted(path.name for path in checkpoint.glob("slices/*.safetensors")) == [
        f"rank-{rank}.safetensors" for rank in range(2 * tensor)
    ]
    assert [path.name for path in checkpoint.glob("*.safetensors")] == ["adapter_model.safetensors"] * (tuned == "lora")
    if tuned == "full":
        parts, model = sliced.Tensors(checkpoint, "weights"), open_weights(tmp_path / "two" / "model")
        assert all(np.array_equal(model.read(name), parts[name]) for name in model.tensors)
    said = done.stdout + done.stderr
    assert SHARED[tensor].format(strategy) in said
    assert APPLIED[strategy] in said
    if strategy == "deepspeed":
        written = json.loads((tmp_path / "two" / "deepspeed.json").read_text())
        assert (written["train_batch_size"], written["gradient_clipping"]) == (8, 1.0)
    done = train([*common, "--batch_size", "4", "--output_dir", "two", "--resume_training", "True"], tmp_path)
    assert done.returncode == 0, done.stderr
    logs = [(tmp_path / name / "trainer_log.jsonl").read_text().splitlines() for name in ("one", "two")]
    one, two = ([json.loads(line) for line in log] for log in logs)
    assert [record["step"] for record in two] == [1, 2, 3, 3, 4, 5, 6, 6]
    for left, right in zip(one, two, strict=True):
        for name in {"loss", "grad_norm", "eval_loss"} & set(left):
            assert right[name] == pytest.approx(left[name], abs=1e-5)
        for name in {"tokens", "supervised", "eval_supervised"} & set(left):
            assert right[name] == left[name]


def fsdp(workers, tensor=1):
    return "torch", workers, ["--strategy", "fsdp", *["--parallel_config.model_parallel", "2"] * (tensor == 2)]


def zero(stage):
    return "torch", 2, ["--strategy", "deepspeed", "--deepspeed", f"stage_{stage}.json"]


def one(backend):
    return backend, 1, []


def cut(backend):
    return backend, 2, ["--parallel_config.model_parallel", "2"]


@pytest.mark.parametrize(
    ("tuned", "layouts"),
    [
        pytest.param("full", [fsdp(4), fsdp(2), one("mindspore")], marks=pytest.mark.slow),
        pytest.param("lora", [cut("mindspore"), fsdp(3), cut("torch")], marks=pytest.mark.slow),
        pytest.param("full", [fsdp(4, 2), cut("mindspore"), fsdp(2)], marks=pytest.mark.slow),
        pytest.param("lora", [fsdp(3), fsdp(4, 2), one("mindspore")], marks=pytest.mark.slow),
        pytest.param("full", [zero(3), cut("torch"), one("mindspore")], marks=pytest.mark.deepspeed),
        pytest.param("lora", [cut("mindspore"), zero(1), fsdp(2)], marks=pytest.mark.deepspeed),
        pytest.param("full", [zero(2), zero(3), fsdp(2)], marks=pytest.mark.deepspeed),
    ],
)
def test_a_run_goes_on_under_another_strategy(tuned, layouts, write_recipe, tmp_path):
    """Two steps under each layout, from the parts that the one before wrote; the log is that of one process."""
    recipe = write_recipe(
        layouts[0][0],
        model__pet_config=None if tuned == "full" else {"pet_type": "lora", "lora_rank": 4, "lora_dropout": 0.1},
        optimizer={"type": "AdamW", "learning_rate": 0.002},
        train_dataset__padding="longest",
        callbacks=[{"type": "CheckpointMonitor", "save_checkpoint_steps": 2}],
        runner_config={"epochs": 2, "stop_step": 6},
    )
    for stage in (1, 2, 3):
        (tmp_path / f"stage_{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))

    def go(name, stop, backend, workers, words):
        shares = workers // 2 if "--parallel_config.model_parallel" in words else workers
        flags = {"output_dir": name, "backend": backend, "batch_size": ROWS // shares, "runner_config.stop_step": stop}
        given = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
        done = train(["--config", str(recipe), *given, *words], tmp_path, workers)
        assert done.returncode == 0, done.stderr + done.stdout

    go("one", 6, *one("torch"))
    for number, (backend, workers, words) in enumerate(layouts, 1):
        go("two", 2 * number, backend, workers, [*words, "--resume_training", "True"])
    logs = [(tmp_path / name / "trainer_log.jsonl").read_text().splitlines() for name in ("one", "two")]
    expected, found = ([json.loads(line) for line in log] for log in logs)
    assert [record["step"] for record in found] == [1, 2, 3, 4, 5, 6]
    for left, right in zip(expected, found, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], abs=1e-5)
        assert right["grad_norm"] == pytest.approx(left["grad_norm"], abs=1e-5)
        assert (right["tokens"], right["supervised"]) == (left["tokens"], left["supervised"])


@pytest.mark.slow
def test_a_recipe_of_deepspeed_is_evaluated_without_it(write_recipe, tiny_data, tmp_path):
    """Nothing is tuned, and 10 rows are dealt to 2 x 3: as one process finds it."""
    changes = {"model__pet_config": None, "train_dataset": None, "runner_config": {"batch_size": 3}}
    data = {"data_loader": {"dataset_dir": str(tiny_data[1])}}
    recipe = write_recipe("torch", run_mode="eval", strategy="deepspeed", eval_dataset=data, **changes)
    for name, workers in (("one", 1), ("two", 2)):
        done = train(["--config", str(recipe), "--output_dir", name], tmp_path, workers)
        assert done.returncode == 0, done.stderr + done.stdout
    one, two = (json.loads((tmp_path / name / "eval_summary.json").read_text()) for name in ("one", "two"))
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5) and two["supervised"] == one["supervised"]


def test_text_is_not_generated_by_a_sharded_model(write_recipe, tmp_path):
    """Which is told before a process starts."""
    recipe = write_recipe("torch", strategy="fsdp", run_mode="predict", predict_data=["w5 w6"])
    done = train(["--config", str(recipe)], tmp_path, workers=2)
    assert done.returncode == 2
    assert "text is generated by a model that is whole: run it with strategy ddp, or in one process" in done.stderr
