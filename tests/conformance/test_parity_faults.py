"""A parity check names the stage and the thing that a planted fault spoils, whichever engine has the fault."""

import json
import re

import pytest
import yaml

from msft.cli.parity import main
from tests.conformance.planted_faults import FAULTS, planted
from tests.conftest import TINY, counting_rows, write_rows

ENGINES = ("torch", "mindspore")
OTHER = {"torch": "mindspore", "mindspore": "torch"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Recipes lora.yaml and full.yaml over a tiny Llama with a tied head and unequal micro-batches, clipped."""
    from msft.convert.random_weights import RandomWeights
    from msft.convert.weights import write_hf_folder
    from msft.models.families import spec_from_hf

    folder = tmp_path_factory.mktemp("faults")
    spec = spec_from_hf({**TINY, "tie_word_embeddings": True})
    write_hf_folder(RandomWeights(spec, 7), spec, folder / "model")
    write_rows(folder / "rows.mindrecord", counting_rows(16, seed=1))
    pet = {"pet_type": "lora", "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.1}
    for tuned in ("lora", "full"):
        recipe = {
            "device": "cpu",
            "seed": 3,
            "run_mode": "finetune",
            "output_dir": str(folder / "output"),
            "model": {"pretrained": str(folder / "model"), **({"pet_config": pet} if tuned == "lora" else {})},
            "runner_config": {"epochs": 2, "batch_size": 2, "gradient_accumulation_steps": 2},
            "optimizer": {"type": "AdamW", "learning_rate": 0.003, "weight_decay": 0.1},
            "runner_wrapper": {"max_grad_norm": 0.1},
            "train_dataset": {"data_loader": {"dataset_dir": str(folder / "rows.mindrecord")}, "padding": "max_length"},
        }
        (folder / f"{tuned}.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def golden(folder):
    """Return a function that gives the golden folder of an engine without faults, recorded once."""

    def record(engine, tuned):
        place = folder / f"golden-{engine}-{tuned}"
        if not place.exists():
            words = ["--engines", engine, "--steps", "3", "--export-golden", str(place)]
            assert main([str(folder / f"{tuned}.yaml"), *words]) == 0
        return place

    return record


def compare(folder, golden, engine, tuned, output):
    """Compare an engine with what the other one recorded; returns (exit code, stages of parity.json)."""
    words = ["--engines", engine, "--against", str(golden(OTHER[engine], tuned)), "--output_dir", str(output)]
    code = main([str(folder / f"{tuned}.yaml"), *words])
    return code, json.loads((output / "parity.json").read_text())["stages"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tuned", ["lora", "full"])
def test_engines_without_faults_pass(folder, golden, tmp_path, engine, tuned):
    code, stages = compare(folder, golden, engine, tuned, tmp_path)
    assert code == 0 and len(stages) == 9
    assert all(stage["passed"] and stage["verdict"] in ("BIT-EQUAL", "WITHIN fp32") for stage in stages.values())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(folder, golden, tmp_path, monkeypatch, capsys, engine, name):
    fault = FAULTS[name]
    golden(OTHER[engine], fault.tuned)
    with planted(fault, engine, monkeypatch):
        code, stages = compare(folder, golden, engine, fault.tuned, tmp_path)
    check(code, stages, fault, engine, capsys.readouterr().out)


@pytest.mark.parametrize("name", ["k and v swapped", "LoRA without alpha", "dropout left on", "mean of means"])
def test_a_fault_is_named_when_both_engines_run(folder, tmp_path, monkeypatch, capsys, name):
    """With whole tensors in the place of fingerprints."""
    fault = FAULTS[name]
    with planted(fault, "torch", monkeypatch):
        code = main([str(folder / f"{fault.tuned}.yaml"), "--steps", "3", "--output_dir", str(tmp_path)])
    check(code, json.loads((tmp_path / "parity.json").read_text())["stages"], fault, "torch", capsys.readouterr().out)


def check(code, stages, fault, engine, said):
    """The fault shows at its stage, under its name, with its cause, and nowhere before."""
    assert code == 1
    *passed, (stage, failed) = stages.items()
    assert all(result["passed"] for _, result in passed) and not failed["passed"]
    assert stage == fault.stage
    assert re.fullmatch(fault.name, failed["first_difference"]), failed["first_difference"]
    assert re.search(fault.cause.replace("ENGINE", engine), failed["cause"]), failed["cause"]
    assert f"parity: FAILED at {stage}: {failed['first_difference']}" in said
