"""A model over the programs of `whole.py`: what the shared engine asks of one."""

from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from functools import cached_property

import mindspore
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn

from msft.backend import names, random
from msft.backend.contract import IGNORE, Batch, Runtime, Tuning
from msft.backend.mindspore import ops, whole
from msft.backend.plan import Plan
from msft.errors import RunError
from msft.models import rope
from msft.models.adapters import peft_names
from msft.models.shapes import tensor_shapes
from msft.models.spec import ModelSpec


@contextmanager
def graph_mode():
    """Compile cells as whole programs inside."""
    before = mindspore.get_context("mode")
    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    try:
        yield
    finally:
        mindspore.set_context(mode=before)


class WholeModel:
    """Parameters under the names of the model, and programs over them that are built when they are asked for."""

    def __init__(self, spec: ModelSpec, source, tuning: Tuning, runtime: Runtime, plan: Plan):
        rope.check(spec)
        self.spec, self.runtime, self.plan = spec, runtime, plan
        self.kernels = ops.kernels(spec, runtime)
        self.lora = tuning.lora
        self.has_adapter = tuning.lora is not None
        self.partial: set[str] = set()
        self.decoder = self
        self.tensors: dict[str, Parameter] = {}
        self.tuned: dict[str, Parameter] = {}
        self.programs: dict[tuple[str, bool, bool], nn.Cell] = {}
        tuned = set(tuning.parameters)
        for name in tensor_shapes(spec):
            self._place(name, source.read(name), name if name in tuned else None)
        if tuning.lora:
            names.check_modules(tuning.lora.modules, spec)
            for module in tuning.lora.modules:
                self._add_lora(module)
        # As they are before MindSpore cuts them.
        self.whole_shapes = self.tuned_shapes()

    def _place(self, name: str, array: np.ndarray, tuned_as: str | None) -> None:
        kind = "float32" if tuned_as else self.runtime.precision.parameters
        tensor = ops.from_numpy(array, self.runtime.device, kind)
        self.tensors[name] = Parameter(tensor, name=name, requires_grad=tuned_as is not None)
        if tuned_as:
            self.tuned[tuned_as] = self.tensors[name]

    def _add_lora(self, module: str) -> None:
        rows, columns = self.tensors[f"{module}.weight"].shape
        name_a, name_b = peft_names(module)
        drawn = random.lora_a(self.runtime.seed, module, self.lora.rank, columns)
        self._place(f"{module}.lora_A.weight", drawn, name_a)
        self._place(f"{module}.lora_B.weight", np.zeros((rows, self.lora.rank), np.float32), name_b)

    def network(self, gives: str, dropout: bool = False, adapter: bool = True) -> nn.Cell:
        """Return the program that gives something; see `whole.Settings`."""
        key = gives, dropout, adapter
        if key not in self.programs:
            precision, lora = self.runtime.precision, self.lora
            settings = whole.Settings(
                spec=self.spec,
                plan=self.plan,
                kernels=self.kernels,
                compute=precision.compute,
                rotary=precision.rotary,
                softmax=precision.softmax,
                norm=precision.norm,
                recompute=self.runtime.recompute and gives == "loss",
                scaling=lora.alpha / lora.rank if lora else 0.0,
                dropout=lora.dropout if lora and dropout else 0.0,
                adapter=adapter,
                gives=gives,
                tensors=self.tensors,
            )
            self.programs[key] = whole.Staged(settings) if self.plan.pipeline > 1 else whole.Whole(settings)
        return self.programs[key]

    @cached_property
    def weights(self) -> ParameterTuple:
        """The tuned parameters, in the order of `tuned`."""
        return ParameterTuple(self.tuned.values())

    def inputs(self, batch: Batch, scale: float, dropout_step: int | None) -> whole.Batch:
        """Return what a program takes of a batch: each supervised token weighs `scale`."""
        keys = np.zeros(batch.input_ids.shape, np.int32)
        if dropout_step is not None:
            keys = random.token_keys(self.runtime.seed, dropout_step, batch.row_ids, batch.position_ids)
        supervised = batch.labels != IGNORE
        cosine, sine = rope.tables(self.spec, batch.position_ids)
        half = self.spec.head_dim // 2
        arrays = (
            batch.input_ids,
            np.where(supervised, batch.labels, 0).astype(np.int32),
            supervised * np.float32(scale),
            batch.position_ids,
            batch.segment_ids,
            keys,
            cosine,
            np.concatenate((-sine[..., :half], sine[..., half:]), -1),
        )
        return whole.Batch(*(Tensor(np.ascontiguousarray(array)) for array in arrays))

    def _run(self, program: nn.Cell, batch: Batch, scale: float = 1.0, dropout_step: int | None = None):
        with graph_mode():
            return program(*self.inputs(batch, scale, dropout_step))

    def loss_and_gradients(self, batch: Batch, scale: float, dropout_step: int | None):
        """See `Model.loss_and_gradients`."""
        if self.plan.devices > 1:
            raise RunError("gradients are shown by parallel_mode 0; in mode 1 they exist inside of a step alone")
        key = "gradients", dropout_step is not None, True
        if key not in self.programs:
            self.programs[key] = _Gradients(self.network("loss", dropout=key[1]), self.weights)
        # By itself, so that the loss is exact whatever its gradient is scaled by.
        loss, found = self._run(self.programs[key], batch, scale, dropout_step)
        return float(loss.asnumpy()) / scale, dict(zip(self.tuned, found, strict=True))

    def loss_sum(self, batch: Batch) -> float:
        """See `Model.loss_sum`."""
        return float(self._run(self.network("loss"), batch).asnumpy())

    def token_logprobs(self, batch: Batch, adapter: bool) -> np.ndarray:
        """See `Model.token_logprobs`."""
        losses = self._run(self.network("losses", adapter=adapter), batch).asnumpy().reshape(batch.labels.shape)
        return np.where(batch.labels == IGNORE, np.float32(0), -losses)

    def logits(self, batch: Batch) -> np.ndarray:
        """See `Model.logits`."""
        found = self._run(self.network("logits"), batch).asnumpy().reshape(*batch.labels.shape, -1).copy()
        found[batch.segment_ids == 0] = 0
        return found

    def activations(self, batch: Batch, adapter: bool) -> dict[str, np.ndarray]:
        """See `Model.activations`."""
        layers = [f"model.layers.{number}" for number in range(self.spec.num_hidden_layers)]
        found = self._run(self.network("states", adapter=adapter), batch)
        return dict(zip(("model.embed_tokens", *layers, "model.norm"), map(ops.to_numpy, found), strict=True))

    def parameter(self, name: str, dtype: str) -> np.ndarray:
        """See `Model.parameter`."""
        if name == names.HEAD and self.spec.tie_word_embeddings:
            name = "model.embed_tokens.weight"
        tensor = self.tuned[name] if name in self.tuned else self.tensors[name]
        return ops.to_numpy(Tensor(tensor.asnumpy()).astype(ops.dtype(dtype)))

    def is_head_tied(self) -> bool:
        """Whether head and embedding are one tensor."""
        return self.spec.tie_word_embeddings

    def rotate(self, hidden: np.ndarray, position_ids: np.ndarray) -> np.ndarray:
        """See `Decoder.rotate`."""
        cosine, sine = (table[:, None] for table in rope.tables(self.spec, position_ids))
        first, second = np.split(hidden, 2, -1)
        return hidden * cosine + np.concatenate((-second, first), -1) * sine

    def export_tuned(self, chosen: Iterable[str]) -> dict[str, np.ndarray]:
        """Return copies of some of the tuned tensors."""
        return {name: self.tuned[name].asnumpy().copy() for name in chosen}

    def import_tuned(self, weights: Mapping[str, np.ndarray]) -> None:
        """Overwrite tuned tensors by name."""
        for name, array in weights.items():
            self.tuned[name].set_data(Tensor(np.array(array, np.float32)))

    def tuned_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tuned tensors."""
        return {name: tuple(parameter.shape) for name, parameter in self.tuned.items()}

    def dtypes(self) -> dict[str, str]:
        """See `Model.dtypes`."""
        precision = self.runtime.precision
        computed = {"compute": precision.compute, "softmax": precision.softmax, "norm": precision.norm}
        exact = dict.fromkeys(("tuned", "loss", "gradients"), "float32")
        return {"frozen": precision.parameters, **exact, **computed, "rotary": precision.rotary}

    def describe(self) -> dict[str, str]:
        """Say what was applied."""
        precision, plan = self.runtime.precision, self.plan
        cut = f"data {plan.data} x context {plan.context} x model {plan.tensor} x {plan.pipeline} stages"
        return {
            "device": self.runtime.device,
            "parameters": f"frozen {precision.parameters}, tuned float32",
            "compute": precision.compute,
            "program": f"one for the whole step, cut by MindSpore: {cut}",
            "attention": "flash attention" if self.kernels.is_attention_fused else "plain operators",
            "recompute": str(self.runtime.recompute),
        }


class _Gradients(nn.Cell):
    """A program's loss and its gradients."""

    def __init__(self, network: nn.Cell, weights: ParameterTuple):
        super().__init__(auto_prefix=False)
        self.differentiated = mindspore.value_and_grad(network, None, weights)

    def construct(self, *inputs):
        return self.differentiated(*inputs)
