"""Every form that `load_checkpoint` accepts, through the command line: each gives the loss that training ended with."""

import json

import numpy as np
import pytest

from msft.cli.train import main

pytest.importorskip("torch")

SAVING = {
    "type": "CheckpointMonitor",
    "save_checkpoint_steps": 4,
    "keep_checkpoint_max": 2,
    "integrated_save": True,
    "prefix": "tiny",
}


@pytest.mark.parametrize("tuned", ["lora", "full"])
def test_every_form_evaluates_alike(tuned, write_recipe, tmp_path, tiny_data, tiny_model):
    changes = {} if tuned == "lora" else {"model__pet_config": None, "optimizer__learning_rate": 0.003}
    recipe, output = str(write_recipe(callbacks=[SAVING], **changes)), tmp_path / "output"
    evaluate = ["--eval_dataset_dir", str(tiny_data[1])]
    assert main([recipe, "--do_eval", "True", *evaluate, "--runner_config.stop_step", "15"]) == 0
    log = [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]
    trained = [record["eval_loss"] for record in log if "eval_loss" in record][-1]
    # 12 steps an epoch: steps 12 and 15 are the last of the first epoch and the third of the second.
    ckpts = output / "checkpoint" / "rank_0"
    assert sorted(path.name for path in ckpts.iterdir()) == [
        "meta.json",
        "tiny_rank_0-1_12.ckpt",
        "tiny_rank_0-2_3.ckpt",
    ]
    forms = [
        output / ("adapter" if tuned == "lora" else "model"),
        ckpts / "tiny_rank_0-2_3.ckpt",
        output / "checkpoint",
        output / "checkpoints" / "step-15",
        output / "checkpoints",
        output,
    ]
    for number, form in enumerate(forms):
        place = tmp_path / f"evaluation-{number}"
        words = ["--run_mode", "eval", *evaluate, "--load_checkpoint", str(form), "--output_dir", str(place)]
        assert main([recipe, *words]) == 0
        value = json.loads((place / "eval_summary.json").read_text())
        assert value["loss"] == pytest.approx(trained, rel=1e-6), form
    # The base alone evaluates to something else.
    words = ["--run_mode", "eval", *evaluate, "--load_checkpoint", str(tiny_model), "--output_dir", str(place)]
    assert main([recipe, *words]) == 0
    assert json.loads((place / "eval_summary.json").read_text())["loss"] > 1.01 * trained


def test_training_starts_from_the_parent_of_rank_0_and_a_new_run_sets_it_aside(write_recipe, tmp_path, capsys):
    recipe, output = str(write_recipe(callbacks=[SAVING])), tmp_path / "output"
    assert main([recipe]) == 0
    words = ["--load_checkpoint", str(output / "checkpoint"), "--epochs", "1"]
    assert main([recipe, *words]) == 2
    assert "is a result of an earlier run in output_dir" in capsys.readouterr().err
    assert main([recipe, *words, "--output_dir", str(tmp_path / "more")]) == 0
    runs = [
        [json.loads(line)["loss"] for line in (folder / "trainer_log.jsonl").read_text().splitlines()][:12]
        for folder in (output, tmp_path / "more")
    ]
    assert np.mean(runs[1]) < np.mean(runs[0])
    assert main([recipe, "--epochs", "1"]) == 0
    assert (output / "earlier" / "run-1" / "checkpoint" / "rank_0" / "meta.json").is_file()
