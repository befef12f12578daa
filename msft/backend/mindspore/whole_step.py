"""A training step as one program, for MindSpore's semi-automatic mode.

Micro-batches, gradients, their norm, clipping and AdamW are one program, because that mode cuts tensors within a
program only. Parameters are cut when it is compiled, which is at the first step.
"""

from collections.abc import Sequence

import mindspore
import numpy as np
from mindspore import Tensor, nn
from mindspore import ops as operators
from mindspore.nn.wrap.cell_wrapper import _VirtualDatasetCell

from msft.backend import names
from msft.backend.contract import IGNORE, Batch, Optimizer
from msft.backend.mindspore import ops
from msft.backend.mindspore.whole_model import WholeModel, graph_mode


class WholeAdamW:
    """AdamW inside of the step's program; `step` counts the steps that were taken. See `optimizer.AdamW`."""

    shard = False

    def __init__(self, model: WholeModel, settings: Optimizer, max_grad_norm: float | None):
        self.model, self.settings, self.step = model, settings, 0
        self.decayed = {
            name for name in model.tuned if settings.decay_norms_and_biases or not names.is_norm_or_bias(name)
        }
        self.first = model.weights.clone(prefix="adam_m", init="zeros")
        self.second = model.weights.clone(prefix="adam_v", init="zeros")
        self.max_grad_norm = max_grad_norm
        self.programs: dict[int, nn.Cell] = {}

    def cuts(self) -> dict[str, tuple]:
        """Return what MindSpore says of how it cut each parameter of the step; nothing before the first one."""
        return {name: cut for program in self.programs.values() for name, cut in program.parameter_layout_dict.items()}

    def take(self, batches: Sequence[Batch], weight: float, scale: float, counter: int, learning_rate: float):
        """Take one step in one program and return (summed loss x `weight`, norm of the gradients without `scale`).

        Each supervised token weighs `weight`; nothing changes where the norm is not finite.
        """
        settings, step = self.settings, self.step + 1
        correct_first = 1 - settings.beta1**step if settings.bias_correction else 1.0
        correct_second = 1 - settings.beta2**step if settings.bias_correction else 1.0
        numbers = learning_rate / correct_first, correct_second**0.5, 1 - learning_rate * settings.weight_decay, scale
        tensors = [Tensor(number, mindspore.float32) for number in numbers]
        inputs = self.model.inputs(stacked(batches), weight, counter)
        with graph_mode():
            loss, norm = self._program(len(batches))(*tensors, *inputs)
        return float(loss.asnumpy()), float(norm.asnumpy())

    def _program(self, micro_batches: int) -> nn.Cell:
        if micro_batches not in self.programs:
            network = self.model.network("loss", dropout=True)
            if micro_batches > 1:
                network = nn.PipelineCell(network, micro_batches)
            if self.model.plan.devices > 1:
                # Without it MindSpore does not find where the micro-batches of its stages begin.
                network = _VirtualDatasetCell(network)
            self.programs[micro_batches] = Step(network, self)
        return self.programs[micro_batches]

    def zeros(self) -> dict[str, Tensor]:
        """See `AdamW.zeros`."""
        return {name: operators.zeros(shape, mindspore.float32) for name, shape in self.model.tuned_shapes().items()}

    def add(self, left: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `AdamW.add`."""
        return {name: gradient + right[name] for name, gradient in left.items()}

    def global_norm(self, gradients: dict[str, Tensor]) -> float:
        """See `AdamW.global_norm`."""
        return float(np.sqrt(sum(np.square(ops.to_numpy(one).astype(np.float64)).sum() for one in gradients.values())))

    def moments(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return copies of the first and second moments."""
        pairs = (zip(self.model.tuned, moments, strict=True) for moments in (self.first, self.second))
        first, second = ({name: moment.asnumpy().copy() for name, moment in found} for found in pairs)
        return first, second

    def shares(self) -> list[dict[str, np.ndarray]]:
        """Return copies of what this process holds of the tuned tensors, the first and the second moments."""
        return [self.model.export_tuned(self.model.tuned), *self.moments()]

    def load(self, first: dict[str, np.ndarray], second: dict[str, np.ndarray], step: int) -> None:
        """Take over moments and the number of steps taken."""
        for moments, given in ((self.first, first), (self.second, second)):
            for name, moment in zip(self.model.tuned, moments, strict=True):
                moment.set_data(Tensor(np.array(given[name], np.float32)))
        self.step = step

    def to_numpy(self, tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Return float32 copies."""
        return {name: ops.to_numpy(tensor) for name, tensor in tensors.items()}

    def dtypes(self) -> dict[str, str]:
        """Return what is held in which dtype."""
        return {"moments": "float32"}

    def describe(self) -> dict[str, str]:
        """Say what was applied."""
        form = "torch's AdamW" if self.settings.bias_correction else "FP32StateAdamWeightDecay (no bias correction)"
        dealt = ", dealt by MindSpore" if self.model.plan.shard_optimizer else ""
        return {"optimizer": f"{form}, float32 moments{dealt}, inside of the step's program"}


class Step(nn.Cell):
    """(step size, root of the second moment's correction, decay's factor, loss scale, a batch) -> loss and norm."""

    def __init__(self, network: nn.Cell, optimizer: WholeAdamW):
        super().__init__(auto_prefix=False)
        model, settings = optimizer.model, optimizer.settings
        self.weights, self.first, self.second = model.weights, optimizer.first, optimizer.second
        self.differentiated = mindspore.value_and_grad(network, None, self.weights)
        self.is_staged = model.plan.pipeline > 1
        if self.is_staged:
            self.over_micro_batches = nn.PipelineGradReducer(self.weights)
        self.decays = [name in optimizer.decayed for name in model.tuned]
        self.beta2, self.eps, self.limit = settings.beta2, settings.eps, optimizer.max_grad_norm
        # Here, because a compiled function subtracts in float32: 1 - 0.999 would be 1.3e-5 too small.
        self.new1, self.new2 = 1 - settings.beta1, 1 - settings.beta2
        # By this attribute MindSpore finds where to sum squares over devices, each slice counted once.
        self.square_sum = operators.ExpandDims().add_prim_attr("grad_scale", True)
        self.sum, self.root = operators.AddN(), operators.Sqrt()

    def construct(self, step_size, root, shrink, scale, *inputs):
        loss, gradients = self.differentiated(*inputs)
        if self.is_staged:
            gradients = self.over_micro_batches(gradients)
        squares = ()
        for gradient in gradients:
            squares = squares + (self.square_sum(operators.square(gradient).sum(), 0),)
        norm = self.root(self.sum(squares)).reshape(()) / scale
        factor = 1 / scale
        if self.limit is not None:
            factor = factor * operators.minimum(1.0, self.limit / (norm + 1e-6))
        if operators.isfinite(norm):
            loss = operators.depend(loss, self.update(gradients, step_size, root, shrink, factor))
        return loss, norm

    def update(self, gradients, step_size, root, shrink, factor):
        """Write new weights and moments."""
        done = ()
        for place in range(len(self.weights)):
            weight, gradient = self.weights[place], gradients[place] * factor
            first = self.first[place] + self.new1 * (gradient - self.first[place])
            second = self.beta2 * self.second[place] + self.new2 * gradient * gradient
            kept = weight * shrink if self.decays[place] else weight
            new = kept - step_size * first / (operators.sqrt(second) / root + self.eps)
            written = (operators.assign(weight, new), operators.assign(self.first[place], first))
            done = done + written + (operators.assign(self.second[place], second),)
        return done


def stacked(batches: Sequence[Batch]) -> Batch:
    """Return micro-batches as one batch, all of as many rows and tokens as the largest; what fills them is padding."""
    rows = max(batch.input_ids.shape[0] for batch in batches)
    length = max(batch.input_ids.shape[1] for batch in batches)

    def filled(array: np.ndarray, value: int) -> np.ndarray:
        missing = ((0, rows - array.shape[0]), (0, length - array.shape[1]))
        return np.pad(array, missing, constant_values=value)

    fields = ("input_ids", "labels", "position_ids", "segment_ids", "row_ids")
    values = {field: IGNORE if field == "labels" else 0 for field in fields}
    found = {
        field: np.concatenate([filled(getattr(batch, field), values[field]) for batch in batches]) for field in fields
    }
    return Batch(**found)
