"""The command is understood, and what is wrong with its recipe is told before a process starts."""

import shlex
from pathlib import Path

import pytest

from msft.errors import InputError
from msft.launch.program import PROJECT, from_text, from_train_words


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Commands work from any folder."""
    monkeypatch.chdir(tmp_path)


def test_words_and_recipe(write_recipe):
    recipe = write_recipe()
    program = from_text(f"run_finetune.py --config {recipe} --seed 5 runner_config.epochs=3 --debug")
    script = str(PROJECT / "run_finetune.py")
    assert program.words == (script, "--config", str(recipe), "--seed", "5", "runner_config.epochs=3", "--debug")
    assert (program.recipe.seed, program.recipe.runner_config.epochs) == (5, 3)


def test_ways_to_write_the_same(write_recipe):
    recipe = write_recipe()
    expected = (str(PROJECT / "run_finetune.py"), "--config", str(recipe))
    for text in (
        f"python run_finetune.py --config {recipe}",
        f"/usr/bin/python3.11 run_finetune.py \\\n --config {recipe}",
    ):
        assert from_text(text).words == expected
    assert from_text(f"run_finetune.py --config={recipe}").words == (expected[0], f"--config={recipe}")
    trained = ("-m", "msft", "train", "--config", str(recipe), "--seed", "1")
    for text in (f"msft train {recipe} --seed 1", f"python -m msft train --config {recipe} --seed 1"):
        assert from_text(text).words == trained
    assert from_train_words([str(recipe), "--seed", "1"]).words == trained


def test_quotes_are_the_shells(write_recipe):
    recipe = write_recipe(name="my recipe.yaml")
    program = from_text(f"run_finetune.py --config {shlex.quote(str(recipe))} --output_dir '$HOME; true'")
    assert program.words[-1] == "$HOME; true" == program.recipe.output_dir


def test_a_program_of_ones_own_is_found_from_here(write_recipe, tmp_path):
    recipe = write_recipe()
    (tmp_path / "mine.py").touch()
    assert from_text(f"mine.py --config {recipe}").words[0] == "mine.py"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "the command is empty"),
        ("python", "the command is empty"),
        ("run_finetune.py 'x", "cannot be read"),
        (
            "run_mindformer.py --config X.yaml",
            "run_mindformer.py: there is no such program, msft's program is run_fine",
        ),
        ("run_finetune.py --seed 3", "names no recipe: it needs --config X.yaml"),
        ("run_finetune.py --config", "names no recipe"),
        ("run_finetune.py --config nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_commands_that_cannot_be(text, problem):
    with pytest.raises(InputError, match=problem):
        from_text(text)


def test_every_problem_of_the_recipe_is_told(write_recipe):
    with pytest.raises(InputError) as error:
        from_text(f"run_finetune.py --config {write_recipe(sed=3)} --epochs none")
    assert len(error.value.problems) == 2 and "did you mean 'seed'" in str(error.value)
    with pytest.raises(InputError, match="/no/such/data does not exist"):
        from_text(f"run_finetune.py --config {write_recipe()} --train_dataset_dir /no/such/data")


def test_several_processes_train_in_parallel(write_recipe):
    recipe = write_recipe()
    assert from_text(f"run_finetune.py --config {recipe}").parallel().words[-2:] == ("--use_parallel", "True")
    for asked in (f"{write_recipe(use_parallel=True, name='p.yaml')}", f"{recipe} --use_parallel True"):
        program = from_text(f"run_finetune.py --config {asked}")
        assert program.parallel() is program
    with pytest.raises(InputError, match="--use_parallel False: several processes train one model together"):
        from_text(f"run_finetune.py --config {recipe} --use_parallel False").parallel()


def test_a_recipe_that_says_false_is_outvoted(write_recipe):
    program = from_text(f"run_finetune.py --config {write_recipe(use_parallel=False)}")
    assert program.parallel().words[-2:] == ("--use_parallel", "True")


def test_the_project_is_where_the_program_is():
    assert Path(PROJECT, "run_finetune.py").is_file()
