"""Faults that engines have had, each put into one engine of a parity check.

A fault takes a built engine, or what an engine is built from, and spoils one thing; `FAULTS` says where it must show.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module

import numpy as np

from msft.backend import random
from msft.train import setup


@dataclass(frozen=True)
class Fault:
    """`tuned` is what the run trains (lora, full); stage, name and cause are regular expressions of the report."""

    plant: object
    tuned: str
    stage: str
    name: str
    cause: str


def rotary_halves_swapped(engine, monkeypatch):
    if engine == "torch":
        import torch
        from transformers.models.llama import modeling_llama

        def swapped(hidden):
            first, second = hidden.chunk(2, dim=-1)
            return torch.cat((second, -first), dim=-1)

        monkeypatch.setattr(modeling_llama, "rotate_half", swapped)
        return
    ops = import_module("msft.backend.mindspore.ops")
    right = ops._Rotary

    def swapped_rotary(*arguments):
        rotary = right(*arguments)

        def swapped(heads, cosine, sine):
            return rotary(heads, cosine, -sine)

        return swapped

    monkeypatch.setattr(ops, "_Rotary", swapped_rotary)
    monkeypatch.setattr(ops, "_kernels", ops._kernels.__wrapped__)


def norm_epsilon_wrong(engine, monkeypatch):
    def spoil(spec, source, tuning, runtime):
        config = {**spec.hf_config, "rms_norm_eps": 1e-4}
        return replace(spec, norm_eps=1e-4, hf_config=config), source, tuning, runtime

    _build_from(engine, monkeypatch, spoil)


def labels_shifted(engine, monkeypatch):
    model = import_module(f"msft.backend.{engine}.model").Model
    losses = model._losses
    monkeypatch.setattr(model, "_losses", lambda self, batch: losses(self, _shifted(batch)))


def _shifted(batch):
    return replace(batch, labels=np.roll(batch.labels, -1, axis=1))


def mean_of_means(engine, monkeypatch):
    def spoil(built):
        accumulate = built._accumulate

        def averaged(micro_batches, scale):
            parts = [accumulate([batch], scale / len(micro_batches)) for batch in micro_batches]
            return _joined(built, parts, scale, sum(part.loss for part in parts) / len(parts))

        built._accumulate = averaged

    _after_building(engine, monkeypatch, spoil)


def _joined(built, parts, scale, loss):
    gradients = parts[0].gradients
    for part in parts[1:]:
        gradients = built.optimizer.add(gradients, part.gradients)
    return parts[0]._replace(
        loss=loss,
        losses=tuple(part.losses[0] for part in parts),
        gradients=gradients,
        norm=built.optimizer.global_norm(gradients) / scale,
    )


def lora_without_alpha(engine, monkeypatch):
    def spoil(spec, source, tuning, runtime):
        return spec, source, replace(tuning, lora=replace(tuning.lora, alpha=1.0)), runtime

    _build_from(engine, monkeypatch, spoil)


def head_not_tied(engine, monkeypatch):
    def spoil(built):
        decoder = built.model.decoder
        if engine == "torch":
            import torch

            decoder.network.lm_head.weight = torch.nn.Parameter(decoder.network.lm_head.weight.detach().clone())
            return
        parameter, head = decoder.parameter, decoder.parameter("lm_head.weight").copy()
        decoder.parameter = lambda name: head if name == "lm_head.weight" else parameter(name)

    _after_building(engine, monkeypatch, spoil)


class KeysAndValuesSwapped:
    """A weight source whose second layer has its keys' matrix in the place of its values' and the other way round."""

    def __init__(self, source):
        self.source, self.tensors = source, source.tensors

    def read(self, name):
        swap = {"k_proj": "v_proj", "v_proj": "k_proj"}
        *_, leaf, kind = name.split(".")
        if name.startswith("model.layers.1.") and leaf in swap:
            name = name.replace(leaf, swap[leaf])
        return self.source.read(name)


def keys_and_values_swapped(engine, monkeypatch):
    def spoil(spec, source, tuning, runtime):
        return spec, KeysAndValuesSwapped(source), tuning, runtime

    _build_from(engine, monkeypatch, spoil)


def no_bias_correction(engine, monkeypatch):
    _change_optimizer(engine, monkeypatch, bias_correction=False)


def norms_decayed(engine, monkeypatch):
    _change_optimizer(engine, monkeypatch, decay_norms_and_biases=True)


def _change_optimizer(engine, monkeypatch, **changes):
    def spoil(spec, source, tuning, runtime):
        return spec, source, tuning, replace(runtime, optimizer=replace(runtime.optimizer, **changes))

    _build_from(engine, monkeypatch, spoil)


def clipped_at_each_micro_batch(engine, monkeypatch):
    def spoil(built):
        accumulate = built._accumulate

        def clipped(micro_batches, scale):
            tokens = sum(batch.supervised for batch in micro_batches)
            parts = []
            for batch in micro_batches:
                share = batch.supervised / tokens
                part = accumulate([batch], scale * share)
                # Again with a smaller scale, which clips the gradient.
                parts.append(accumulate([batch], scale * share * built._clip(part.norm * share)))
            loss = sum(part.losses[0] for part in parts) / tokens
            return _joined(built, parts, scale, loss)

        built._accumulate = clipped

    _after_building(engine, monkeypatch, spoil)


def another_shuffle(engine, monkeypatch):
    make = setup.train_stream

    def shuffled(prepared, mesh):
        if prepared.recipe.backend == engine:
            prepared = replace(prepared, recipe=prepared.recipe.model_copy(update={"seed": prepared.recipe.seed + 1}))
        return make(prepared, mesh)

    monkeypatch.setattr(setup, "train_stream", shuffled)


def dropout_left_on(engine, monkeypatch):
    def spoil(built):
        decoder, mode = built.model.decoder, built.model.decoder.mode

        def with_dropout(function):
            def call(batch, *rest):
                keys = random.token_keys(0, 0, batch.row_ids, batch.position_ids)
                decoder.mode = lambda _, adapter: mode(keys, adapter)
                try:
                    return function(batch, *rest)
                finally:
                    decoder.mode = mode

            return call

        for name in ("activations", "logits", "loss_sum"):
            setattr(built.model, name, with_dropout(getattr(built.model, name)))

    _after_building(engine, monkeypatch, spoil)


def adapters_not_applied(engine, monkeypatch):
    def spoil(built):
        mode = built.model.decoder.mode
        built.model.decoder.mode = lambda keys, adapter: mode(keys, False)

    _after_building(engine, monkeypatch, spoil)


def second_beta_wrong(engine, monkeypatch):
    _change_optimizer(engine, monkeypatch, beta2=0.99)


def first_micro_batch_forgotten(engine, monkeypatch):
    def spoil(built):
        accumulate = built._accumulate

        def forgetful(micro_batches, scale):
            tokens = sum(batch.supervised for batch in micro_batches)
            share = micro_batches[-1].supervised / tokens
            last = accumulate(micro_batches[-1:], scale * share)
            return accumulate(micro_batches, scale)._replace(gradients=last.gradients, norm=last.norm * share)

        built._accumulate = forgetful

    _after_building(engine, monkeypatch, spoil)


def frozen_weight_moves(engine, monkeypatch):
    def spoil(built):
        apply, name, decoder = built.optimizer.apply, "model.layers.1.mlp.up_proj.weight", built.model.decoder

        def moving(*arguments):
            apply(*arguments)
            if engine == "torch":
                decoder.parameter(name).data.add_(1e-3)
            else:
                decoder.frozen[name] = decoder.frozen[name] + 1e-3

        built.optimizer.apply = moving

    _after_building(engine, monkeypatch, spoil)


def cache_position_off_by_one(engine, monkeypatch):
    session = import_module(f"msft.backend.{engine}.generation").Session
    prefill = session.prefill

    def late(self, input_ids, padding):
        logits = prefill(self, input_ids, padding)
        self.turned = self.turned + 1
        return logits

    monkeypatch.setattr(session, "prefill", late)


def _build_from(engine, monkeypatch, spoil):
    """Build that engine from spoiled arguments."""
    module = import_module(f"msft.backend.{engine}.engine")
    build = module.build
    monkeypatch.setattr(module, "build", lambda *arguments: build(*spoil(*arguments)))


def _after_building(engine, monkeypatch, spoil):
    """Spoil that engine when it is built."""
    module = import_module(f"msft.backend.{engine}.engine")
    build = module.build

    def spoiled(*arguments):
        built = build(*arguments)
        spoil(built)
        return built

    monkeypatch.setattr(module, "build", spoiled)


@contextmanager
def planted(fault: Fault, engine: str, monkeypatch):
    """Have the fault in that engine inside."""
    with monkeypatch.context() as patch:
        fault.plant(engine, patch)
        yield


FIRST_BLOCK = r"model\.layers\.0"
ADAPTED = r".*lora_[AB]\.weight"
FAULTS = {
    "rotary halves swapped": Fault(
        rotary_halves_swapped, "lora", "weights", "rotary layout", "ENGINE: rotary .*halves"
    ),
    "norm epsilon wrong": Fault(
        norm_epsilon_wrong, "full", "forward", FIRST_BLOCK, r"first to differ, model\.embed_tokens agrees"
    ),
    "labels shifted": Fault(labels_shifted, "full", "loss", "loss of its own logits", "ENGINE: .*shifted by one"),
    "mean of means": Fault(mean_of_means, "full", "loss", "normalisation", "ENGINE: .*mean of the micro-batches"),
    "LoRA without alpha": Fault(
        lora_without_alpha, "lora", "forward", FIRST_BLOCK, r"(0\.12|8\.).* times .*scaling \(alpha / rank\)"
    ),
    "adapters not applied": Fault(adapters_not_applied, "lora", "forward", FIRST_BLOCK, "ENGINE does not apply them"),
    "head not tied": Fault(head_not_tied, "full", "weights", "head tied .*", "ENGINE: .*one tensor"),
    "k and v swapped": Fault(
        keys_and_values_swapped,
        "lora",
        "weights",
        r"model\.layers\.1\.self_attn\.k_proj\.weight",
        r"k_proj\.weight what .+ has under model\.layers\.1\.self_attn\.v_proj\.weight",
    ),
    "no bias correction": Fault(
        no_bias_correction, "lora", "step", f"update of {ADAPTED}", "ENGINE: .*they are without bias correction"
    ),
    "second beta wrong": Fault(
        second_beta_wrong, "lora", "step", f"second moment of {ADAPTED} from its gradient", "ENGINE: .*beta2"
    ),
    "frozen weight moves": Fault(
        frozen_weight_moves, "lora", "step", "frozen weights stay", r"ENGINE: model\.layers\.1\.mlp\.up_proj\.weight "
    ),
    "clipped at each micro-batch": Fault(
        clipped_at_each_micro_batch, "full", "backward", "sum of the micro-batches.*", "ENGINE: .*clipping of micro-b"
    ),
    "first micro-batch forgotten": Fault(
        first_micro_batch_forgotten, "full", "backward", "sum of the micro-batches.*", "ENGINE: .*one left out"
    ),
    "another shuffle": Fault(another_shuffle, "lora", "data", "step 1: rows", "order of the samples"),
    "norms decayed": Fault(
        norms_decayed, "full", "step", r"update of .*norm\.weight", "ENGINE: .*with weight decay on norms"
    ),
    "dropout left on": Fault(dropout_left_on, "lora", "forward", FIRST_BLOCK, "not by scaling alone.*dropout"),
    "cache position off by one": Fault(
        cache_position_off_by_one, "full", "generation", "answer . is what its own .*", "ENGINE: .*key-value cache"
    ),
}
