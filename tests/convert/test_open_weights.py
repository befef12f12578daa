"""open_weights tells formats apart by content and always answers with Hugging Face's names and the right rows."""

import json
import shutil

import numpy as np
import pytest

from msft.convert.check import check_against
from msft.convert.open import open_weights, read_hf_config, read_spec
from msft.convert.weights import write_ckpt
from msft.errors import InputError


def check_equal(source, expected, same_bits):
    assert set(source.tensors) == set(expected)
    for name, array in expected.items():
        assert same_bits(source.read(name), array), name


@pytest.fixture
def ckpt_file(hf_folder, spec, tmp_path):
    write_ckpt(open_weights(hf_folder), spec, tmp_path / "run" / "x.ckpt")
    return tmp_path / "run" / "x.ckpt"


def test_names_do_not_matter(hf_folder, ckpt_file, tmp_path, expected, same_bits):
    shutil.copyfile(hf_folder / "model.safetensors", tmp_path / "weights.data")
    shutil.copyfile(ckpt_file, tmp_path / "weights.bin")
    check_equal(open_weights(tmp_path / "weights.data"), expected, same_bits)
    check_equal(open_weights(tmp_path / "weights.bin"), expected, same_bits)


def test_a_ckpt_its_folder_and_the_parent_of_rank_0(ckpt_file, tmp_path, expected, same_bits, spec):
    check_equal(open_weights(ckpt_file), expected, same_bits)
    check_equal(open_weights(ckpt_file.parent), expected, same_bits)
    rank = tmp_path / "checkpoint_network" / "rank_0"
    rank.mkdir(parents=True)
    shutil.copyfile(ckpt_file, rank / "network.ckpt")
    shutil.copyfile(ckpt_file.with_name("x.config.json"), rank.parent / "config.json")
    check_equal(open_weights(rank.parent), expected, same_bits)
    assert read_spec(rank.parent) == read_spec(ckpt_file)
    assert read_spec(ckpt_file).num_attention_heads == spec.num_attention_heads


def test_joined_query_key_value_are_split_by_the_spec(hf_folder, spec, tmp_path, expected, same_bits):
    path = tmp_path / "x.ckpt"
    write_ckpt(open_weights(hf_folder), spec, path, qkv_concat=True)
    check_equal(open_weights(path), expected, same_bits)  # by the config beside it
    (tmp_path / "x.config.json").unlink()
    check_equal(open_weights(path, spec), expected, same_bits)
    with pytest.raises(InputError, match="x.ckpt: holds 'model.layers.0.attention.w_qkv.weight'.*--config"):
        open_weights(path)


def test_joined_tensors_that_do_not_fit_the_heads_are_named(hf_folder, spec, tmp_path):
    from dataclasses import replace

    write_ckpt(open_weights(hf_folder), spec, tmp_path / "x.ckpt", qkv_concat=True)
    wrong = replace(spec, num_key_value_heads=1)
    with pytest.raises(InputError, match=r"w_qkv.weight' has 64 rows, but the parts in it have \[32, 8, 8\]"):
        open_weights(tmp_path / "x.ckpt", wrong)


def test_a_mindspore_safetensors_file_with_mindformers_names(ckpt_file, tmp_path, expected, same_bits):
    import mindspore

    params = mindspore.load_checkpoint(str(ckpt_file))
    mindspore.save_checkpoint(
        [{"name": name, "data": value} for name, value in params.items()],
        str(tmp_path / "ms.safetensors"),
        format="safetensors",
    )
    check_equal(open_weights(tmp_path / "ms.safetensors"), expected, same_bits)


def test_a_training_checkpoint_gives_the_model_alone(ckpt_file, tmp_path, expected, same_bits, capsys):
    """MindFormers' checkpoint/rank_K files hold moments and counters, which are left out and counted."""
    import mindspore

    params = mindspore.load_checkpoint(str(ckpt_file))
    state = [{"name": f"adam_m.{name}", "data": value} for name, value in params.items()]
    counters = {"global_step": 10, "epoch_num": 1, "step_num": 10, "loss_scale": 1.0}
    mindspore.save_checkpoint(
        [{"name": name, "data": value} for name, value in params.items()] + state,
        str(tmp_path / "train.ckpt"),
        append_dict=counters,
    )
    check_equal(open_weights(tmp_path / "train.ckpt"), expected, same_bits)
    assert f"left out {len(params) + 4} tensors of optimizer and trainer state" in capsys.readouterr().err


def test_several_ckpts_in_a_folder_are_listed(ckpt_file):
    shutil.copyfile(ckpt_file, ckpt_file.with_name("y.ckpt"))
    with pytest.raises(InputError, match=r"holds 2 files of weights \(x.ckpt, y.ckpt\)"):
        open_weights(ckpt_file.parent)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "nothing: does not exist"),
        (lambda path: path.mkdir(), "holds no weights"),
        (lambda path: path.write_bytes(b""), "is no weight file"),
        (lambda path: path.write_text("hello"), "is no weight file"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n"), "Git LFS pointer"),
        (lambda path: (path.mkdir(), (path / "adapter_config.json").write_text("{}")), "is a LoRA adapter"),
        (
            lambda path: (
                path.mkdir(),
                (path / "adapter_model.safetensors").write_text("{}"),
                (path / "adapter_config.json").write_text("{}"),
            ),
            "is a LoRA adapter",
        ),
        (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)), "is no weight file"),
        (lambda path: path.symlink_to("loop") or path.with_name("loop").symlink_to("nothing"), "nothing"),
    ],
)
def test_what_is_no_model_is_said(tmp_path, make, message):
    make(tmp_path / "nothing")
    with pytest.raises(InputError, match=message):
        open_weights(tmp_path / "nothing")


def test_configs_are_found_from_any_file(hf_folder, ckpt_file, tmp_path):
    config = json.loads((hf_folder / "config.json").read_text())
    for path in (hf_folder, hf_folder / "config.json", hf_folder / "model.safetensors"):
        assert read_hf_config(path) == config
    shutil.copyfile(hf_folder / "config.json", tmp_path / "other_name.json")
    assert read_hf_config(tmp_path / "other_name.json") == config
    ckpt_file.with_name("x.config.json").unlink()
    with pytest.raises(InputError, match="x.ckpt: there is no x.config.json or config.json beside it"):
        read_hf_config(ckpt_file)


def test_missing_unexpected_misshaped_and_integer_tensors_come_in_one_error(write_folder, expected, spec):
    tensors = dict(expected)
    del tensors["model.norm.weight"]
    tensors["model.norm.wieght"] = np.ones(32, np.float32)
    tensors["model.layers.1.mlp.down_proj.weight"] = np.ones((48, 32), np.float32)
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.ones((32, 32), np.int8)
    folder = write_folder(tensors)
    with pytest.raises(InputError) as error:
        check_against(spec, open_weights(folder))
    file = str(folder / "model.safetensors")
    assert sorted(error.value.problems) == sorted(
        [
            f"{file}: tensor 'model.norm.weight' [32] is missing, did you mean 'model.norm.wieght'?",
            f"{file}: unexpected tensor 'model.norm.wieght' [32]",
            f"{file}: tensor 'model.layers.1.mlp.down_proj.weight' has shape [48, 32], but the config says [32, 48]",
            f"{file}: tensor 'model.layers.0.self_attn.q_proj.weight' holds int8; quantised weights are not supported",
        ]
    )


def test_the_list_of_problems_stays_readable(write_folder, expected, spec):
    with pytest.raises(InputError) as error:
        check_against(spec, open_weights(write_folder({f"x.{name}": value for name, value in expected.items()})))
    assert (
        len(error.value.problems) == 21
        and error.value.problems[-1] == "... and 22 more tensors that do not fit the config"
    )


def test_harmless_extras(write_folder, expected, spec, capsys):
    """Rotary buffers pass silently; a head that the config ties is left out aloud."""
    from dataclasses import replace

    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for layer in (0, 1)}
    source = open_weights(write_folder({**expected, **buffers}))
    check_against(spec, source)
    assert capsys.readouterr().err == ""
    check_against(replace(spec, tie_word_embeddings=True), source)
    assert "model.safetensors: lm_head.weight is left out; the config ties the head" in capsys.readouterr().err


def test_a_model_without_its_head_is_told_about_tying(write_folder, expected, spec):
    tensors = {name: value for name, value in expected.items() if name != "lm_head.weight"}
    with pytest.raises(InputError, match=r"'lm_head.weight' \[96, 32\] is missing; is the head tied"):
        check_against(spec, open_weights(write_folder(tensors)))
