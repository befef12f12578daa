"""The whole recipe: MindFormers 1.3.2's YAML layout plus `backend`, `device` and `model.pretrained`."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr

from msft.config.block import Block
from msft.config.markers import Count, Interval, OnlyOn, Positive, Refused, Switch, Texts, Unused, shown
from msft.config.schema_data import Dataset, EvalDataset, EvalTask, TrainTask
from msft.config.schema_model import Model, ModelKeys, Processor
from msft.config.schema_train import Callback, LrSchedule, OptimizerBlock, Recompute, Runner, Wrapper
from msft.config.yaml_lines import write_yaml

Profiling = Annotated[Any, Unused("profiling is left to the framework's own tools")]
Tuning = Annotated[Any, Unused("data loading needs no tuning")]
Graphs = Annotated[Any, Unused("MindSpore's graph compiler is left at its defaults")]
Memory = Annotated[Any, Unused("memory is left to the framework")]
Layout = Annotated[Any, Unused("parallel_config.data_parallel and model_parallel say how processes share the work")]
Gathered = Unused("keys and values are gathered before attention, as in Llama 3's training (arXiv 2407.21783)")
Slices = Annotated[Any, Unused("load_checkpoint is always joined and cut anew for this run")]
Strategy = Annotated[Literal["ddp", "fsdp", "deepspeed"], OnlyOn("torch", "its processes have the whole model each")]
Hub = Annotated[Any, Unused("nothing is uploaded")]
Images = Annotated[Any, Unused("it is for image models")]


PARALLEL_MODES = {"data_parallel": 0, "stand_alone": 0, "semi_auto_parallel": 1, "semi_auto": 1}


def _parallel_mode(value: Any) -> Any:
    known = PARALLEL_MODES.get(str(value).lower(), value)
    if known in (0, 1) and not isinstance(known, bool | float):
        return known
    words = "0 (data_parallel, stand_alone) or 1 (semi_auto_parallel)"
    raise ValueError(f"must be {words}, not {shown(value)}: MindSpore's own search for layouts is not used")


class Context(Block):
    """MindSpore's context, of which `device_target` decides the device when `device` is not set."""

    device_target: Annotated[Literal["Ascend", "CPU", "GPU"] | None, OnlyOn("mindspore", "`device` decides")] = None
    mode: Annotated[Any, Unused("the training step is always compiled")] = None
    device_id: Annotated[Any, Unused("the first free device is taken; the launcher spreads several")] = None
    max_device_memory: Memory = None
    mempool_block_size: Memory = None
    variable_memory_max_size: Memory = None
    memory_optimize_level: Memory = None
    memory_offload: Memory = None
    max_call_depth: Graphs = None
    save_graphs: Graphs = None
    save_graphs_path: Graphs = None
    enable_graph_kernel: Graphs = None
    graph_kernel_flags: Graphs = None
    jit_config: Graphs = None
    jit_level: Graphs = None
    ascend_config: Graphs = None
    precompile_only: Graphs = None
    runtime_num_threads: Graphs = None
    inter_op_parallel_num: Graphs = None
    op_timeout: Graphs = None
    deterministic: Graphs = None
    enable_dump: Graphs = None
    save_dump_path: Graphs = None
    enable_reduce_precision: Graphs = None
    enable_auto_mixed_precision: Graphs = None
    auto_tune_mode: Graphs = None
    enable_profiling: Graphs = None
    profiling_options: Graphs = None
    reserve_class_name_in_scope: Graphs = None
    check_bprop: Graphs = None
    print_file_path: Graphs = None
    enable_sparse: Graphs = None
    env_config_path: Graphs = None
    save_compile_cache: Graphs = None
    load_compile_cache: Graphs = None
    grad_for_scalar: Graphs = None
    pynative_synchronize: Graphs = None
    enable_compile_cache: Graphs = None
    compile_cache_path: Graphs = None


class Parallel(Block):
    """MindSpore's parallel context; `parallel_mode` 1 leaves the cut of the model to MindSpore, on Ascend."""

    parallel_mode: Annotated[
        int,
        BeforeValidator(_parallel_mode),
        OnlyOn("mindspore", "the same layout is computed by explicit slices"),
    ] = 0
    gradients_mean: Annotated[Any, Unused("gradients are always those of the global token mean")] = None
    loss_repeated_mean: Annotated[Any, Unused("gradients are always those of the global token mean")] = None
    gradient_fp32_sync: Annotated[Any, Unused("gradients are always reduced in float32")] = None
    enable_alltoall: Layout = None
    full_batch: Layout = None
    dataset_strategy: Layout = None
    search_mode: Layout = None
    auto_parallel_search_mode: Layout = None
    auto_pipeline: Layout = None
    pipeline_stages: Layout = None
    pipeline_config: Layout = None
    device_num: Layout = None
    global_rank: Layout = None
    parameter_broadcast: Layout = None
    enable_parallel_optimizer: Switch = False
    parallel_optimizer_config: Layout = None
    grad_accumulation_step: Layout = None
    all_reduce_fusion_config: Layout = None
    comm_fusion: Layout = None
    strategy_ckpt_config: Slices = None
    strategy_ckpt_save_file: Slices = None
    strategy_ckpt_load_file: Slices = None


class ParallelConfig(Block):
    """How processes share the work: `data_parallel` models (unset: as many as there are) of `pipeline_stage` stages.

    Each stage is `model_parallel` processes; `micro_batch_num` micro-batches go through the stages in a step.
    The tokens of each model's rows are dealt to `context_parallel` times as many. Of those of a model each has its part
    of the tokens between matrices with `use_seq_parallel`, and its rows of embedding and head with `vocab_emb_dp:
    False`.
    """

    data_parallel: Positive | None = None
    model_parallel: Positive = 1
    context_parallel: Positive = 1
    context_parallel_algo: Annotated[Literal["colossalai_cp", "ulysses_cp", "hybrid_cp"] | None, Gathered] = None
    ulysses_degree_in_cp: Annotated[Any, Gathered] = None
    expert_parallel: Layout = None
    pipeline_stage: Positive = 1
    use_seq_parallel: Switch = False
    optimizer_shard: Layout = None
    micro_batch_num: Positive = 1
    vocab_emb_dp: Switch = True
    gradient_aggregation_group: Layout = None
    auto_parallel: Layout = None
    mem_coeff: Layout = None


class Trainer(Block):
    """MindFormers' kind of task."""

    type: Literal["CausalLanguageModelingTrainer"] = "CausalLanguageModelingTrainer"
    model_name: Annotated[Any, Unused("the model is described by the block model")] = None


def _resume(value: Any) -> Any:
    if isinstance(value, bool | str):
        words = {"true": True, "false": False, "": False}
        return words.get(value.lower(), value) if isinstance(value, str) else value
    raise ValueError(f"must be True, False or the name of a checkpoint, not {shown(value)}")


def _device(value: Any) -> Any:
    names = {"gpu": "cuda", "ascend": "npu"}
    return names.get(value.lower(), value.lower()) if isinstance(value, str) else value


def _deepspeed(value: Any) -> Any:
    if value is None or isinstance(value, dict) or isinstance(value, str) and value:
        return value
    raise ValueError(f"must be the path of a JSON file or a block of DeepSpeed's own keys, not {shown(value)}")


class Recipe(Block):
    """Everything about a run; frozen. Defaults are MindFormers' where it has any.

    `ignored` (list of Ignored), `source` (dotted key -> 'file.yaml:7' or '--flag') and `name` (the file) are
    set by `load_recipe`.
    """

    backend: Literal["mindspore", "torch"] = "mindspore"
    device: Annotated[Literal["auto", "cpu", "cuda", "npu"], BeforeValidator(_device)] | None = None
    run_mode: Literal["train", "finetune", "eval", "predict"] = "train"
    seed: Count = 0
    output_dir: Annotated[str, Field(min_length=1)] = "./output"
    load_checkpoint: str = ""
    src_strategy_path_or_dir: str = ""
    resume_training: Annotated[bool | str, BeforeValidator(_resume)] = False
    use_parallel: Switch = False
    hang_timeout: Count = 1200
    strategy: Strategy = "ddp"
    deepspeed: Annotated[Any, BeforeValidator(_deepspeed), OnlyOn("torch", "DeepSpeed is PyTorch's")] = None
    torch_compile: Annotated[Switch, OnlyOn("torch", "its blocks are always compiled")] = False
    model: Model = Model()
    runner_config: Runner = Runner()
    optimizer: OptimizerBlock = OptimizerBlock()
    lr_schedule: LrSchedule = LrSchedule()
    train_dataset: Dataset = Dataset()
    eval_dataset: EvalDataset = EvalDataset()
    do_eval: Switch = False
    eval_step_interval: Interval = 100
    eval_epoch_interval: Interval = -1
    runner_wrapper: Wrapper = Wrapper()
    recompute_config: Recompute = Recompute()
    callbacks: list[Callback] = Field(
        default=[{"type": "MFLossMonitor"}, {"type": "CheckpointMonitor", "save_checkpoint_steps": 500}],
        validate_default=True,
    )
    processor: Processor = Processor()
    micro_batch_interleave_num: Positive = 1
    predict_data: Texts = []
    predict_batch_size: Positive = 1
    context: Context = Context()
    parallel: Parallel = Parallel()
    parallel_config: ParallelConfig = ParallelConfig()
    trainer: Trainer = Trainer()
    train_dataset_task: TrainTask = TrainTask()
    eval_dataset_task: EvalTask = EvalTask()

    base_config: Annotated[Any, Refused("write all keys into one file", ())] = None
    register_path: Annotated[Any, Refused("python files named by a recipe are not run", ("",))] = None
    lr_scale: Annotated[Any, Refused("write the learning rate that is meant", (False,))] = None
    moe_config: Annotated[Any, Refused("experts are the model's own; model.moe_aux_loss_coef balances them", ())] = None
    data_skip_steps: Annotated[Any, Refused("a resumed run skips by itself", (0,))] = None
    swap_config: Annotated[Any, Refused("swapping activations is not built", ())] = None
    metric: Annotated[Any, Unused("evaluation gives the mean loss per token and the perplexity")] = None
    eval_callbacks: Annotated[Any, Unused("evaluation has no callbacks")] = None
    check_for_nan_in_loss_and_grad: Annotated[Any, Unused("every step is checked")] = None
    calculate_per_token_loss: Annotated[Any, Unused("the loss is always the mean over all supervised tokens")] = None
    data_seed: Annotated[Any, Unused("the order of rows follows seed")] = None
    ignore_data_skip: Annotated[Any, Unused("a resumed run continues with the row after the last one")] = None
    resume_by_last_timestamp_ckpt: Annotated[Any, Unused("the newest whole checkpoint is taken")] = None
    adapter_id: Annotated[Any, Unused("one adapter at a time")] = None
    save_file: Annotated[Any, Unused("predictions are written to output_dir")] = None
    auto_trans_ckpt: Slices = None
    transform_process_num: Slices = None
    transform_by_rank: Slices = None
    npu_num_per_node: Slices = None
    only_save_strategy: Slices = None
    load_ckpt_format: Annotated[Any, Unused("the format is seen from the file")] = None
    device_num: Layout = None
    rank_id: Layout = None
    enable_mindio_ttp_save_ckpt: Annotated[Any, Unused("checkpoints are written by msft itself")] = None
    auto_tune: Tuning = None
    filepath_prefix: Tuning = None
    autotune_per_step: Tuning = None
    profile: Profiling = None
    profile_start_step: Profiling = None
    profile_stop_step: Profiling = None
    profile_output: Profiling = None
    profile_rank_ids: Profiling = None
    profile_pipeline: Profiling = None
    profiler_level: Profiling = None
    with_stack: Profiling = None
    data_simplification: Profiling = None
    init_start_profile: Profiling = None
    profile_communication: Profiling = None
    profile_memory: Profiling = None
    layer_scale: Images = None
    layer_decay: Images = None
    lr_scale_factor: Annotated[Any, Unused("it belongs to lr_scale")] = None
    remote_save_url: Hub = None
    push_to_hub: Hub = None
    hub_model_id: Hub = None
    hub_token: Hub = None
    hub_private_repo: Hub = None

    _ignored: list = PrivateAttr(default_factory=list)
    _source: dict = PrivateAttr(default_factory=dict)
    _name: str = PrivateAttr(default="")
    _toolkit: str = PrivateAttr(default="")

    @property
    def ignored(self) -> list:
        """Keys that were written and have no meaning here (place, dotted path, why), in file order."""
        return self._ignored

    @property
    def source(self) -> dict[str, str]:
        """Where each written value came from: dotted path -> 'file.yaml:7' or '--flag'; defaults are absent."""
        return self._source

    @property
    def name(self) -> str:
        """The file the recipe was read from."""
        return self._name

    @property
    def toolkit(self) -> str:
        """The toolkit whose file that was, '' for a recipe."""
        return self._toolkit

    def to_yaml(self) -> str:
        """Return the resolved recipe, defaults included, as YAML that loads to the same recipe."""
        values = self.model_dump(by_alias=True, exclude_none=True)
        if self.model.config:
            values["model"] = {key: item for key, item in values["model"].items() if key not in ModelKeys.model_fields}
        if self.optimizer.betas:
            del values["optimizer"]["beta1"], values["optimizer"]["beta2"]
            values["optimizer"]["betas"] = list(self.optimizer.betas)
        return write_yaml(values)
