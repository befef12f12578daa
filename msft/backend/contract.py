"""What an engine must offer: every type that crosses the border between msft and a framework.

All arrays are numpy, all names are canonical: Hugging Face's for weights, PEFT's for adapters.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from msft.backend.plan import Plan

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank; all arrays are int32 [rows, length].

    `labels` are aligned with `input_ids`: labels[r, t] is the token to predict after input_ids[r, t],
    or -100 where nothing is supervised. `segment_ids` tell which example of its row a token belongs to, from 1
    on (0 = padding); attention never crosses segments, `position_ids` begin anew with each. `row_ids` are the
    positions of the tokens' examples in the global batch of the step, over all micro-batches and ranks (padding: 0):
    what dropout is counted by, so that an example has the same masks alone in a row and packed with others.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    segment_ids: np.ndarray
    row_ids: np.ndarray

    @property
    def supervised(self) -> int:
        """Number of label tokens that count in the loss."""
        return int((self.labels != IGNORE).sum())

    @property
    def tokens(self) -> int:
        """Number of real tokens, padding not counted."""
        return int((self.segment_ids != 0).sum())

    @property
    def is_shared(self) -> bool:
        """Whether other ranks compute tokens of the same rows."""
        return False


@dataclass(frozen=True)
class SharedBatch(Batch):
    """A micro-batch whose tokens several ranks share: this one computes those that are `own`, bool [rows, length].

    `labels` are -100 on all others; `backend.context` deals the tokens.
    """

    own: np.ndarray

    @property
    def tokens(self) -> int:
        """Number of real tokens that this rank computes."""
        return int(self.own.sum())

    @property
    def is_shared(self) -> bool:
        """Whether other ranks compute tokens of the same rows."""
        return True


@dataclass(frozen=True)
class Lora:
    """LoRA as PEFT defines it: W x + alpha / rank * B A dropout(x); `modules` are full HF module paths."""

    rank: int
    alpha: float
    dropout: float
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Tuning:
    """What is trained: adapters, and the base parameters (canonical names) in `parameters`."""

    parameters: tuple[str, ...] = ()
    lora: Lora | None = None


@dataclass(frozen=True)
class Precision:
    """Dtypes by name: float32, bfloat16 or float16.

    `parameters` holds frozen weights (tuned ones and optimizer moments are always float32), `compute` is what
    matrix products run in, `softmax`, `norm` and `rotary` what those run in. Loss and reductions are float32.
    Where transformers or a fused kernel decides itself (float32 inside), `Engine.describe` says so.
    """

    parameters: str = "float32"
    compute: str = "float32"
    softmax: str = "float32"
    norm: str = "float32"
    rotary: str = "float32"


@dataclass(frozen=True)
class Optimizer:
    """AdamW as torch defines it, or MindFormers' FP32StateAdamWeightDecay when `bias_correction` is False.

    Norm weights and biases, and a state space's decays and time steps, are decayed only when `decay_norms_and_biases`
    is True.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    bias_correction: bool = True
    decay_norms_and_biases: bool = False


@dataclass(frozen=True)
class LossScale:
    """Loss scaling: constant when `window` is 0; else / `factor` on overflow, x `factor` after `window` good steps.

    It does not fall below 2^-14, nor grow above 2^24.
    """

    initial: float = 1.0
    factor: float = 2.0
    window: int = 0


@dataclass(frozen=True)
class Runtime:
    """Where and how a model runs; `device` is what `device.pick` returned (cpu, cuda, npu).

    `max_grad_norm` None means no clipping. `recompute` drops a block's activations and computes them again
    in the backward pass. `compile` asks torch for a compiled norm, rotation and SwiGLU (MindSpore's blocks always are).
    `shard_optimizer` deals the optimizer's state to the ranks with different rows (ZeRO stage 1).
    `parallel` asks for the process group of the launcher (msrun, torchrun). `strategy` says what its ranks share out:
    rows alone (ddp), or the model, its gradients and moments too (fsdp; deepspeed: what `deepspeed`, its whole
    configuration, says). `plan` asks for MindSpore's semi-automatic mode, which cuts the model as it says.
    """

    device: str = "cpu"
    seed: int = 0
    precision: Precision = field(default_factory=Precision)
    optimizer: Optimizer = field(default_factory=Optimizer)
    loss_scale: LossScale = field(default_factory=LossScale)
    max_grad_norm: float | None = None
    recompute: bool = False
    compile: bool = False
    shard_optimizer: bool = False
    parallel: bool = False
    strategy: str = "ddp"
    deepspeed: dict[str, Any] | None = None
    plan: Plan | None = None


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: the loss is the mean over all supervised tokens of the global batch.

    `grad_norm` is the global norm before clipping, with any loss scale taken out. A step whose loss or
    gradient is not finite is skipped: parameters, moments and the optimizer's step count stay as they were.
    """

    loss: float
    supervised: int
    grad_norm: float
    skipped: bool
    loss_scale: float


@dataclass(frozen=True)
class StepGradients:
    """What an optimizer step would apply: `gradients` float32 by canonical name, before clipping, without loss scale.

    `loss` and `grad_norm` are the step's, over all micro-batches and ranks, `clip` is the factor of clipping.
    `losses` (summed) and `supervised` (tokens) have one entry for each of this rank's micro-batches.
    """

    loss: float
    losses: tuple[float, ...]
    supervised: tuple[int, ...]
    gradients: dict[str, np.ndarray]
    grad_norm: float
    clip: float


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedy at temperature 0; `stop_ids` end a row and are not returned.

    Each row draws from (seed, `first_row` + its place in the batch), so that answers need not depend on batches.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    first_row: int = 0


# Called with (row, token) for each new token that is no stop id; returns whether the row ends with it.
OnToken = Callable[[int, int], bool]


@dataclass
class EngineState:
    """Everything a run needs to go on, in float32 arrays by canonical name (mappings that may read when asked).

    `weights` holds the tuned tensors: base parameters under HF's names, adapters under PEFT's file names
    ('base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight', (rank, in)). `first_moment` and
    `second_moment` have the same keys. `counters`: 'step' (calls of train_step), 'optimizer_step'
    (steps not skipped), 'loss_scale', 'good_steps' (since the last overflow or growth).
    """

    weights: Mapping[str, np.ndarray]
    first_moment: Mapping[str, np.ndarray]
    second_moment: Mapping[str, np.ndarray]
    counters: dict[str, float]


class Place(NamedTuple):
    """Where a part of a tensor lies: the shape of the whole, the part's first index along each axis, and its shape.

    A part with one axis of a whole with several is a range of the whole's numbers in their order (DeepSpeed's parts).
    """

    whole: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]

    def of(self, array: np.ndarray) -> np.ndarray:
        """Return the part of a whole array, contiguous, as a view."""
        region = tuple(slice(first, first + size) for first, size in zip(self.start, self.shape, strict=True))
        return (array if len(self.start) == array.ndim else array.reshape(-1))[region]

    def fits(self) -> bool:
        """Whether the part lies within the whole."""
        bounds = self.whole if len(self.start) == len(self.whole) else (math.prod(self.whole),)
        if not len(bounds) == len(self.start) == len(self.shape):
            return False
        return all(
            first >= 0 and first + size <= bound
            for first, size, bound in zip(self.start, self.shape, bounds, strict=True)
        )


@dataclass
class StateParts:
    """What one process gives of the state, so that all processes together give each number once.

    `weights`, `first_moment` and `second_moment` are float32 parts by canonical name, all three of the same `places`.
    """

    weights: dict[str, np.ndarray]
    first_moment: dict[str, np.ndarray]
    second_moment: dict[str, np.ndarray]
    places: dict[str, Place]
    counters: dict[str, float]


class Engine(Protocol):
    """A model on a device, ready to train, score and generate; built by `backend.<engine>.engine.build`.

    Where it `is_sharded`, each rank holds a part of every tensor: all ranks make each call together. Where it
    `shares_state`, each rank holds a part of the moments: all ranks make the call of `export_state`.
    """

    is_sharded: bool
    shares_state: bool

    def train_step(self, micro_batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """One optimizer step over this rank's micro-batches, reduced over all ranks."""

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """Summed loss and number of supervised tokens of this rank's batch, without dropout."""

    def token_logprobs(self, batch: Batch, adapter: bool = True) -> np.ndarray:
        """Log-probability of each label, float32 [rows, length], 0 where nothing is supervised, by this rank if shared.

        `adapter=False` is the reference model: the adapters are left out.
        """

    def logits(self, batch: Batch) -> np.ndarray:
        """Logits of every position, float32 [rows, length, vocabulary], without dropout.

        0 on padding, and on the tokens that other ranks compute.
        """

    def gradients(self, batch: Batch) -> dict[str, np.ndarray]:
        """Gradients of the batch's mean loss for the tuned parameters, by canonical name, without dropout.

        Raises RunError for a model or rows that are shared out.
        """

    def step_gradients(self, micro_batches: Sequence[Batch]) -> StepGradients:
        """What `train_step` would apply to these micro-batches now, dropout included; nothing changes."""

    def activations(self, batch: Batch, adapter: bool = True) -> dict[str, np.ndarray]:
        """Hidden states by module in the order of the forward pass, without dropout, float32 [rows, length, hidden].

        0 on padding. 'model.embed_tokens', each block ('model.layers.0' ...), 'model.norm'. Raises RunError for rows
        that are shared.
        """

    def parameters(self) -> Iterator[tuple[str, np.ndarray, str]]:
        """Every tensor as it is computed with: canonical name, float32 values, dtype name; adapters come last.

        The head is 'lm_head.weight', also where it is the embedding's tensor.
        """

    def is_head_tied(self) -> bool:
        """Whether head and embedding are one tensor."""

    def rotate(self, hidden: np.ndarray, position_ids: np.ndarray) -> np.ndarray:
        """Apply the rotary embedding to float32 [rows, heads, length, head_dim] at int32 [rows, length]."""

    def decayed(self) -> tuple[str, ...]:
        """Canonical names of the tuned tensors that weight decay applies to."""

    def dtypes(self) -> dict[str, str]:
        """What is held and computed in which dtype: frozen, tuned, compute, softmax, norm, rotary, loss, gradients,
        moments."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, on_token: OnToken | None = None
    ) -> list[list[int]]:
        """The new token ids of each prompt, with a key-value cache; equal on both engines up to rounding.

        Raises RunError for a prompt without tokens or with ids outside the vocabulary.
        """

    def export_state(self) -> EngineState:
        """A copy of all tuned tensors, moments and counters; of a sharded model, the first rank alone gets tensors."""

    def export_weights(self, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """Copies of tuned tensors by name (None: all), whole; every process of a model calls it."""

    def export_parts(self) -> StateParts:
        """A copy of this process's share of the state; nothing is gathered."""

    def tuned_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tuned tensors, whole, by canonical name."""

    def tuned_names(self) -> list[str]:
        """Canonical names of all tuned tensors."""

    def export_adapter(self) -> dict[str, np.ndarray]:
        """Copies of the adapters' whole tensors; every process of a model calls it."""

    def import_state(self, state: EngineState) -> None:
        """Take over a state that either engine exported; raises RunError naming what does not fit."""

    def load_adapter(self, weights: dict[str, np.ndarray]) -> None:
        """Take over adapter tensors under PEFT's file names, without optimizer state."""

    def describe(self) -> dict[str, str]:
        """What was applied: device, dtypes, attention and optimizer kernels, for the run's report."""
