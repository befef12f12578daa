"""What is known of DeepSpeed's configuration: its top-level keys, and what a recipe leaves no choice in."""

# Keys of DeepSpeed 0.17 to 0.19 that may stand in a user's configuration.
TOP_LEVEL = frozenset(
    """
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps
    optimizer scheduler fp16 bf16 torch_autocast data_types
    gradient_clipping communication_data_type prescale_gradients gradient_predivide_factor gradient_allreduce_op
    zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    disable_allgather dataloader_drop_last dump_state steps_per_print wall_clock_breakdown memory_breakdown
    disable_python_gc comms_logger flops_profiler timers log_level
    tensorboard wandb csv_monitor comet monitor_config aio
    """.split()
)
# Keys that train otherwise than the recipe says, or do what msft does itself.
REFUSED = frozenset(
    """
    managed_gradient_accumulation bfloat16 amp sparse_gradients activation_checkpointing checkpoint compile
    autotuning hybrid_engine tensor_parallel expert_parallel pipeline elasticity nebula data_efficiency
    curriculum_learning progressive_layer_drop eigenvalue quantize_training compression_training sparse_attention
    weight_quantization sequence_parallel_size seq_parallel_communication_data_type
    """.split()
)

_SUMS = "the loss over all supervised tokens of a step, which is made for the mean over ranks"
# The recipe has no key for these: the value, and what it belongs to.
FIXED = {
    "gradient_allreduce_op": ("mean", _SUMS),
    "prescale_gradients": (False, _SUMS),
    "gradient_predivide_factor": (1.0, _SUMS),
    "torch_autocast.enabled": (False, "model.compute_dtype, whose casts msft makes itself"),
}

# The recipe's kind of schedule -> DeepSpeed's name for it.
RATES = {"constant": "WarmupLR", "linear": "WarmupDecayLR", "cosine": "WarmupCosineLR"}
