"""What was verified here of each family, how, and by which test of this repository.

Everything ran on CPU, in float32. The tests are the record: `tests/models/test_verified.py` sees that each exists.
"""

from typing import NamedTuple

from msft.models.families import FAMILIES

EVERY: tuple[str, ...] = ()
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")
CUT = "2 and 4 processes train as one does: losses within 1e-5, LoRA and full"


class Check(NamedTuple):
    """`what` was held against what (`how`), by which `test`, of which `families` (EVERY = all of them)."""

    what: str
    how: str
    test: str
    families: tuple[str, ...] = EVERY


CHECKS = (
    Check(
        "logits and gradients",
        "transformers' class (where it has none, the equations) with the same tiny random weights: logits 2e-5, cosine "
        "of each gradient above 0.99999",
        "tests/conformance/test_families.py::test_logits_and_gradients_are_transformers",
    ),
    Check(
        "no independent oracle",
        "transformers has no class: in place of one, for logits, gradients and whole passes, the published equations "
        "as the tests have written them, and positions and masks worked out by hand; no released weights were seen",
        "tests/backend/test_prefix.py::test_positions_are_those_worked_out_by_hand",
        ("chatglm1",),
    ),
    Check(
        "generation and packing",
        "greedy tokens with a cache are those of the same oracle's whole passes; packed rows equal rows by themselves",
        "tests/conformance/test_families.py::test_generation_and_packed_examples",
    ),
    Check(
        "training",
        "steps of both engines with dropout, decay and clipping, LoRA and full: losses and norms within 1e-5",
        "tests/conformance/test_families.py::test_both_engines_train_alike",
    ),
    Check(
        "adapters",
        "PEFT loads them beside transformers' class: the same logits, merged ones too",
        "tests/conformance/test_families.py::test_adapters_are_pefts_and_can_be_merged",
        tuple(name for name, kind in FAMILIES.items() if kind.native is None and not kind.is_ported),
    ),
    Check(
        "encoder and decoder",
        "long and packed examples, layers computed again: logits and gradients of transformers' class",
        "tests/conformance/test_encoder_decoder.py::test_long_and_packed_examples_and_recomputed_layers",
        ("t5",),
    ),
    Check(
        "data parallel",
        "2 processes that share batches and moments train as one does: losses within 1e-4",
        "tests/cli/test_t5_training.py::test_two_processes_that_share_batches_and_moments_equal_one",
        ("t5",),
    ),
    Check(
        "conversion",
        "Hugging Face to CKPT and back, bit for bit",
        "tests/convert/test_file_names.py::test_every_family_goes_to_ckpt_and_back_bit_for_bit",
    ),
    Check(
        "joined tensors",
        "the releases' own split of joined matrices",
        "tests/convert/test_file_names.py::test_files_hold_what_the_family_says",
        ("internlm2", "baichuan", "chatglm"),
    ),
    Check(
        "files of experts",
        "transformers' own files, of one shard and of many, to CKPT and back, bit for bit",
        "tests/convert/test_expert_files.py::test_transformers_own_files_go_to_ckpt_and_back",
        EXPERTS,
    ),
    Check(
        "balance loss",
        "transformers' load balancing loss: its value and every gradient, also of routers and experts",
        "tests/conformance/test_experts.py::test_the_balance_loss_is_transformers",
        EXPERTS,
    ),
    Check(
        "two processes",
        "data parallel on both engines and FSDP train as one process does: losses, balance losses, norms within 2e-5",
        "tests/cli/test_experts.py::test_two_processes_train_as_one_does",
        ("qwen2_moe",),
    ),
    Check(
        "sizes",
        "parameters counted from published configs equal published counts",
        "tests/models/test_sizes.py::test_parameters_are_those_published",
    ),
    Check(
        "templates and end tokens",
        "text as FastChat or transformers renders it; what ends an answer is one token, learned and stopped at",
        "tests/data/test_family_templates.py::test_an_answers_end_is_one_token_that_generation_stops_at",
    ),
    Check(
        "recipes",
        "every size's recipe, full and LoRA, passes the checks of configuration and tunes what it says",
        "tests/recipes/test_write.py::test_every_recipe_loads_and_tunes_what_it_says",
    ),
    Check(
        "scans",
        "the papers' recurrence in float64, token by token, with long and short time steps: outputs, all gradients",
        "tests/conformance/test_scans.py::test_a_scan_is_the_recurrence",
        ("mamba", "mamba2"),
    ),
    Check(
        "tensor parallel",
        CUT,
        "tests/conformance/test_cut_models.py::test_a_cut_model_trains_as_the_whole_one",
        ("llama",),
    ),
    Check(
        "tensor parallel; on torch stages, shared rows and fsdp too",
        "2 and 4 processes train as one does, with biases, windows and norms of heads: losses and norms within 1e-5",
        "tests/conformance/test_cut_models.py::test_families_like_llama_are_cut_as_llama_is",
        ("mistral", "qwen2", "qwen3"),
    ),
    Check(
        "pipeline parallel",
        CUT,
        "tests/conformance/test_staged_models.py::test_a_model_in_stages_trains_as_the_whole_one",
        ("llama",),
    ),
    Check(
        "parity",
        "faults planted in either engine are named by msft parity",
        "tests/conformance/test_parity_faults.py::test_a_planted_fault_is_named",
        ("llama",),
    ),
    Check(
        "MindFormers 1.3.2 itself",
        "its own run: losses and steps of the same recipe, weights and rows",
        "tests/mindformers/test_mindformers_training.py::test_our_training_repeats_its_steps",
        ("llama",),
    ),
)


def checks_of(model_type: str) -> tuple[Check, ...]:
    """Return what was verified of a family."""
    return tuple(check for check in CHECKS if check.families == EVERY or model_type in check.families)
