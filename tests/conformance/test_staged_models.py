"""Protects pipelines: a model whose layers are dealt to two or four stages trains as the whole one, on both engines.

Five micro-batches of unequal lengths, one without a label; with slices and shares of rows, a head that is the
embedding's tensor, recompute, clipping, dropout, a dealt optimizer; and what stages show as one.
"""

import json

import pytest

from tests.conformance.test_cut_models import check_equal_to_one_process, train

RECOMPUTE, SHARD, CLIP = {"recompute": True}, {"shard_optimizer": True}, {"max_grad_norm": 0.3}
# What else the ranks of a stage share out.
SEQUENCE, VOCABULARY = {"sequence": True}, {"vocabulary": True}


@pytest.mark.parametrize(
    ("backend", "kind", "tensor", "parts", "pipeline", "workers", "settings"),
    [
        ("torch", "lora", 2, 1, 2, 4, RECOMPUTE | SEQUENCE),
        ("mindspore", "tied", 1, 1, 2, 2, CLIP),
        pytest.param("torch", "full", 1, 1, 2, 2, {"compute": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param("torch", "tied", 1, 1, 2, 4, SHARD | CLIP, marks=pytest.mark.slow),
        *(
            pytest.param(backend, *sizes, settings, marks=pytest.mark.slow)
            for backend in ("torch", "mindspore")
            for *sizes, settings in (
                ("lora", 1, 1, 2, 2, RECOMPUTE),
                ("full", 2, 1, 2, 4, RECOMPUTE | SEQUENCE | VOCABULARY),
                ("tied", 2, 1, 2, 4, {}),
                ("tied", 1, 1, 4, 4, {}),
                ("lora", 1, 1, 2, 4, SHARD | CLIP),
                ("lora", 1, 2, 2, 4, RECOMPUTE),
            )
        ),
    ],
)
def test_a_model_in_stages_trains_as_the_whole_one(
    backend, kind, tensor, parts, pipeline, workers, settings, write_recipe, tmp_path
):
    recipe = write_recipe(backend)
    check_equal_to_one_process(backend, kind, tensor, workers, recipe, tmp_path, settings, parts, pipeline)


@pytest.mark.slow
@pytest.mark.parametrize(("tuned", "first", "second"), [("lora", "torch", "mindspore"), ("full", "mindspore", "torch")])
def test_one_process_of_the_other_engine_goes_on_from_stages(tuned, first, second, write_recipe, tiny_data, tmp_path):
    """Two stages train, evaluate and write a checkpoint of parts; the log is that of one undisturbed process."""
    recipe = write_recipe(
        first,
        model__pet_config=None if tuned == "full" else {"pet_type": "lora", "lora_rank": 4, "lora_dropout": 0.1},
        optimizer={"type": "AdamW", "learning_rate": 0.002},
        train_dataset__padding="longest",
        callbacks=[{"type": "CheckpointMonitor", "save_checkpoint_steps": 2}],
        runner_config={"epochs": 1, "batch_size": 2},
        do_eval=True,
        eval_step_interval=2,
        eval_dataset={"data_loader": {"dataset_dir": str(tiny_data[1])}},
    )

    def go(name, workers, stop, backend, *words):
        flags = {"output_dir": name, "runner_config.stop_step": stop, "backend": backend}
        given = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
        done = train(["--config", str(recipe), *given, *words], tmp_path, workers)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout + done.stderr

    accumulated = "--gradient_accumulation_steps", "2"
    go("one", 1, 4, first, *accumulated)
    said = go("two", 2, 2, first, "--parallel_config.pipeline_stage", "2", "--parallel_config.micro_batch_num", "2")
    assert "processes: 2, 1 shares of every batch, each for a model in 2 stages" in said
    go("two", 1, 4, second, *accumulated, "--resume_training", "True")
    logs = [(tmp_path / name / "trainer_log.jsonl").read_text().splitlines() for name in ("one", "two")]
    for left, right in zip(*([json.loads(line) for line in log] for log in logs), strict=True):
        for name in ("loss", "grad_norm", "eval_loss"):
            assert right.get(name) == pytest.approx(left.get(name), abs=1e-5)
        assert right["step"] == left["step"]
