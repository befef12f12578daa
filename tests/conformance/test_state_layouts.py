"""Protects what several processes do with layers that have states: share batches and, by FSDP, weights; no more."""

import subprocess
import sys

import pytest

from msft.config import experts
from msft.config.layout import Layout, layout
from msft.config.load import load_recipe
from msft.errors import InputError
from msft.models.families import spec_from_hf
from tests.cli.test_families import model_of
from tests.conformance.families import CONFIGS
from tests.conformance.test_two_workers import LORA, MEASURED, records, two_workers
from tests.conftest import recipe_writer
from tests.launch.jobs import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "family", "strategy", "tuned"),
    [
        ("torch", "mamba", "fsdp", "full"),
        ("torch", "mamba2", "fsdp", "lora"),
        ("mindspore", "mamba2", "ddp", "full"),
    ],
)
def test_two_processes_train_as_one_does(backend, family, strategy, tuned, tmp_path, tiny_data):
    """Micro-batches, clipping, decay, recompute; in the last step a row for the first process alone."""
    write = recipe_writer(tmp_path, model_of(family, tmp_path / "model"), tiny_data)
    recipe = write(
        backend,
        strategy=strategy,
        model__pet_config={**LORA, "target_modules": ".*proj"} if tuned == "lora" else None,
        recompute_config={"recompute": True},
        runner_config={"epochs": 1, "gradient_accumulation_steps": 2},
        runner_wrapper={"use_clip_grad": True, "max_grad_norm": 0.8},
        train_dataset={"data_loader": {"dataset_dir": str(tiny_data[0]), "num_samples": 17}, "drop_remainder": False},
    )
    done = two_workers(f"run_finetune.py --config {recipe} --batch_size 2 --output_dir two", tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    alone = [sys.executable, str(ROOT / "run_finetune.py"), "--config", str(recipe)]
    subprocess.run([*alone, "--batch_size", "4", "--output_dir", "one"], cwd=tmp_path, capture_output=True, check=True)
    one, two = records(tmp_path / "one"), records(tmp_path / "two")
    assert len(one) == len(two) == 3
    for left, right in zip(one, two, strict=True):
        for name in MEASURED:
            if name in left:
                assert right[name] == pytest.approx(left[name], abs=1e-5), (left, right)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
@pytest.mark.parametrize("key", ["model_parallel", "context_parallel", "pipeline_stage"])
def test_layouts_that_cut_are_refused(family, key, write_recipe):
    recipe = load_recipe(write_recipe("torch", parallel_config={key: 2}))
    with pytest.raises(InputError, match=f"{key}: 2.*the layers of {family}"):
        layout(recipe, spec_from_hf(CONFIGS[family]), 2)
    plain = load_recipe(write_recipe("torch"))
    assert layout(plain, spec_from_hf(CONFIGS[family]), 2) == Layout(2)


@pytest.mark.parametrize("family", ["mamba", "qwen2_moe"])
def test_weights_that_deepspeed_would_not_gather_are_refused(family, write_recipe):
    """Of modules that the way through a layer reads, and does not call."""
    recipe, spec = load_recipe(write_recipe("torch", strategy="deepspeed")), spec_from_hf(CONFIGS[family])
    with pytest.raises(InputError, match="strategy: deepspeed gathers weights of modules that are called, which "):
        experts.check(recipe, spec, 2)
    experts.check(recipe, spec, 1)
