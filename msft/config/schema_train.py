"""The blocks about training: epochs and batches, optimizer, schedule, loss scale, recompute, callbacks."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag

from msft.config.block import Block
from msft.config.markers import (
    Count,
    CountOrAll,
    NotNegative,
    Number,
    Positive,
    PositiveNumber,
    Refused,
    Share,
    Switch,
    Unused,
    shown,
)

Sink = Annotated[Any, Unused("steps are never sunk into the device: the loss of every step is seen")]
Resume = Annotated[Any, Unused("a resumed run finds its position in the checkpoint")]
Momentum = Annotated[Number, Field(ge=0, lt=1)]


class Runner(Block):
    """How long and how much at once; `batch_size` is per process and micro-batch, and wins over the dataset's.

    `stop_step` ends the run after so many optimizer steps. A step whose loss or gradient is not finite is skipped;
    after `max_skipped_steps` of them in a row the run fails.
    """

    epochs: Positive = 1
    batch_size: Positive | None = None
    gradient_accumulation_steps: Positive = 1
    stop_step: Count = 0
    max_skipped_steps: Positive = 10
    sink_mode: Sink = None
    sink_size: Sink = None
    initial_epoch: Resume = None
    initial_step: Resume = None
    has_trained_epoches: Resume = None
    has_trained_steps: Resume = None
    image_size: Annotated[Any, Unused("it is for images")] = None
    num_classes: Annotated[Any, Unused("it is for classifiers")] = None


class OptimizerBlock(Block):
    """`eps` unset is 1e-8 for AdamW and 1e-6 for MindFormers' kinds, as there."""

    type: Literal["AdamW", "FP32StateAdamWeightDecay", "AdamWeightDecay"] = "AdamW"
    learning_rate: NotNegative | None = None
    beta1: Momentum = 0.9
    beta2: Momentum = 0.999
    betas: tuple[Momentum, Momentum] | None = None
    eps: PositiveNumber | None = None
    weight_decay: NotNegative = 0.0
    decay_norms_and_biases: Switch = False


def _schedule_type(value: Any) -> Any:
    names = {"cosine": "CosineWithWarmUpLR", "linear": "LinearWithWarmUpLR", "constant": "ConstantWarmUpLR"}
    return names.get(value, value) if isinstance(value, str) else value


class LrSchedule(Block):
    """Learning rate over the steps; `total_steps` -1 is the length of the run. A ratio wins over a count of steps.

    The steps of a ratio are rounded down (MindFormers), or with `warmup_round_up` up (transformers).
    """

    type: Annotated[
        Literal["CosineWithWarmUpLR", "LinearWithWarmUpLR", "ConstantWarmUpLR"], BeforeValidator(_schedule_type)
    ] = "ConstantWarmUpLR"
    learning_rate: NotNegative | None = None
    lr_end: NotNegative = 0.0
    warmup_ratio: Share | None = None
    warmup_epochs: NotNegative | None = None
    warmup_steps: Count = 0
    warmup_lr_init: NotNegative = 0.0
    total_steps: CountOrAll = -1
    num_cycles: PositiveNumber = 0.5
    warmup_round_up: Switch = False
    decay_steps: Annotated[Any, Refused("the rate always falls until total_steps", ())] = None


class ScaleCell(Block):
    """A loss scale that moves: doubled after `scale_window` good steps, halved on an overflow (or fixed)."""

    type: Literal["DynamicLossScaleUpdateCell", "FixedLossScaleUpdateCell"] = "DynamicLossScaleUpdateCell"
    loss_scale_value: PositiveNumber = 65536.0
    scale_factor: Annotated[Number, Field(gt=1)] = 2.0
    scale_window: Positive = 1000


def _scale_kind(value: Any) -> str:
    return "<cell>" if isinstance(value, dict | ScaleCell) else "<number>"


ScaleSense = Annotated[
    Annotated[PositiveNumber, Tag("<number>")] | Annotated[ScaleCell, Tag("<cell>")], Discriminator(_scale_kind)
]


class Wrapper(Block):
    """Loss scale and clipping.

    Unset, `scale_sense` is dynamic for float16 and 1 otherwise, and gradients are clipped; only
    `type: MFTrainOneStepCell` without `use_clip_grad` means no clipping, which is MindFormers' default there.
    """

    type: Literal["MFTrainOneStepCell", "MFPipelineWithLossScaleCell"] | None = None
    scale_sense: ScaleSense | None = None
    use_clip_grad: Switch | None = None
    max_grad_norm: PositiveNumber = 1.0
    enable_check_overflow: Annotated[Any, Unused("a step whose gradient is not finite is always skipped")] = None
    local_norm: Annotated[Any, Unused("the norm of the whole gradient is logged")] = None
    calculate_per_token_loss: Annotated[Any, Unused("the loss is always the mean over all supervised tokens")] = None
    micro_batch_num: Annotated[Any, Unused("micro-batches are set by gradient_accumulation_steps")] = None


def _recompute(value: Any) -> Any:
    layers = value if isinstance(value, list) else [value]
    if all(isinstance(item, int) and item >= 0 for item in layers):
        return value
    raise ValueError(f"must be True, False or numbers of layers, not {shown(value)}")


class Recompute(Block):
    """`recompute` drops activations and computes them again; a number of layers counts as all of them."""

    recompute: Annotated[Any, BeforeValidator(_recompute)] = False
    select_recompute: Annotated[Any, Unused("blocks are recomputed as a whole")] = None
    select_comm_recompute: Annotated[Any, Unused("blocks are recomputed as a whole")] = None
    parallel_optimizer_comm_recompute: Annotated[Any, Unused("blocks are recomputed as a whole")] = None
    mp_comm_recompute: Annotated[Any, Unused("blocks are recomputed as a whole")] = None
    recompute_slice_activation: Annotated[Any, Unused("blocks are recomputed as a whole")] = None


class LossMonitor(Block):
    """The step log; every step is in trainer_log.jsonl, the console shows each `per_print_times`-th."""

    type: Literal["MFLossMonitor"]
    per_print_times: Positive = 1


def _prefix(value: Any) -> Any:
    if isinstance(value, str) and (not value or set(value) & set("/\\\0")):
        raise ValueError(f"must be the first part of a file name, not {shown(value)}")
    return value


class CheckpointMonitor(Block):
    """Saving (MindFormers' CheckpointMonitor, its defaults except for `async_save` and `integrated_save`).

    `integrated_save` writes the whole model beside each checkpoint, as MindFormers' CKPT under names that begin with
    `prefix` (unset: CKP). It is off unless asked for, because each save writes, and keeps, as many bytes as the model
    has.

    `async_save` writes a checkpoint in a thread while steps go on. It takes one float32 copy of the tuned weights and
    both their moments in host memory until the file is written; so does saving without it.
    """

    type: Literal["CheckpointMonitor"]
    prefix: Annotated[str, BeforeValidator(_prefix)] | None = None
    save_checkpoint_steps: Positive = 1
    keep_checkpoint_max: Positive = 5
    integrated_save: Switch = False
    async_save: Switch = True
    directory: Annotated[Any, Unused("checkpoints are written below output_dir")] = None
    save_checkpoint_seconds: Annotated[Any, Refused("checkpoints are taken by steps", (0,))] = None
    keep_checkpoint_per_n_minutes: Annotated[Any, Refused("checkpoints are kept by number", (0,))] = None
    save_network_params: Annotated[Any, Unused("weights are written at the end of every run")] = None
    save_trainable_params: Annotated[Any, Unused("adapters are written at the end of every run")] = None
    exception_save: Annotated[Any, Unused("an interrupted run goes on from its last checkpoint")] = None
    enc_key: Annotated[Any, Refused("encrypted checkpoints are not built", ())] = None
    enc_mode: Annotated[Any, Unused("it belongs to enc_key")] = None


class OtherCallback(Block):
    """A callback of MindFormers that does nothing here, with any keys."""

    model_config = ConfigDict(extra="allow", frozen=True)
    WHY: ClassVar[str] = "this callback does nothing here"
    type: Literal[
        "ObsMonitor",
        "SummaryMonitor",
        "ProfileMonitor",
        "EvalCallBack",
        "ColdHotExpertMointor",
    ]


class StopCallback(Block):
    """MindFormers' TrainCallBack."""

    type: Literal["TrainCallBack"]
    stop_step: Annotated[Any, Refused("write it as runner_config.stop_step", ())] = None


Callback = Annotated[LossMonitor | CheckpointMonitor | StopCallback | OtherCallback, Discriminator("type")]
