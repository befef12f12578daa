"""The keys of LLaMA-Factory's training files, with its defaults."""

from typing import Annotated, Any

from pydantic import Field

from msft.config.importers.training_arguments import (
    Hub,
    Kernels,
    NoEqual,
    Recomputed,
    Rows,
    Told,
    TrainingArguments,
    refused,
)
from msft.config.markers import Count, NotNegative, Number, Positive, PositiveNumber, Switch, Texts, Unused

Inference = Annotated[Any, Unused("it is for inference and export (msft generate, msft merge)")]
Images = Annotated[Any, Unused("it is for images, sounds and videos")]
Freezing = Annotated[Any, Unused("it is for finetuning_type freeze")]
Preferences = Annotated[Any, Unused("it is for stages that compare answers")]
Quantized = Annotated[Any, Unused("it is for quantized models")]
Ray = Annotated[Any, Unused("jobs are launched by msft launch, without Ray")]
OfMethod = Annotated[Any, Unused("it belongs to a method that is not asked for")]
Tokens = "the vocabulary is the tokenizer's and the model's own"
OPTIMIZERS = "optimizers are AdamW here"
ADAPTERS = "adapters are plain LoRA here"


class LlamaFactoryKeys(TrainingArguments):
    """What a YAML of LLaMA-Factory may hold."""

    model_name_or_path: Annotated[str, Field(min_length=1)] = ""
    adapter_name_or_path: Texts = []
    stage: str = "sft"
    finetuning_type: str = "lora"
    lora_rank: Positive = 8
    lora_alpha: PositiveNumber | None = None
    lora_dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    lora_target: Texts = ["all"]
    additional_target: Texts = []
    use_rslora: Switch = False
    moe_aux_loss_coef: NotNegative | None = None
    pure_bf16: Switch = False
    dataset: Texts = []
    eval_dataset: Texts = []
    dataset_dir: str = "data"
    template: str | None = None
    cutoff_len: Annotated[Positive, Field(ge=2)] = 2048
    max_samples: Positive | None = None
    packing: Switch | None = None
    neat_packing: Switch = False
    train_on_prompt: Switch = False
    mask_history: Switch = False
    val_size: NotNegative = 0.0
    disable_shuffling: Switch = False
    disable_gradient_checkpointing: Switch = False
    preprocessing_num_workers: Count | None = None

    quantization_bit: refused("quantized models are not built (finetuning_type lora on the model's own weights is)") = (
        None
    )
    use_dora: refused(ADAPTERS, False) = None
    pissa_init: refused(ADAPTERS, False) = None
    loraplus_lr_ratio: refused(ADAPTERS) = None
    create_new_adapter: refused("an adapter is trained on, or merged first (msft merge)", False) = None
    use_llama_pro: refused("blocks are not added to a model", False) = None
    use_galore: refused(OPTIMIZERS, False) = None
    use_apollo: refused(OPTIMIZERS, False) = None
    use_badam: refused(OPTIMIZERS, False) = None
    use_adam_mini: refused(OPTIMIZERS, False) = None
    use_muon: refused(OPTIMIZERS, False) = None
    use_dft_loss: refused("the loss is cross-entropy", False) = None
    use_asft_loss: refused("the loss is cross-entropy", False) = None
    use_eaft_loss: refused("the loss is cross-entropy", False) = None
    use_mca: refused("models are cut by parallel_config", False) = None
    use_kt: refused("weights stay on the device", False) = None
    fp8: refused("matrix products run in float32, bfloat16 or float16", False) = None
    rope_scaling: refused("a longer context stands in the model's config.json") = None
    shift_attn: refused("attention sees the whole context", False) = None
    mixture_of_depths: refused("mixtures of depths are not built") = None
    train_from_scratch: refused("sizes without weights are written as model.model_config", False) = None
    resize_vocab: refused(Tokens, False) = None
    add_tokens: refused(Tokens) = None
    add_special_tokens: refused(Tokens) = None
    new_special_tokens_config: refused(Tokens) = None
    split_special_tokens: refused("special tokens in the data are read as such", False) = None
    streaming: refused("data is prepared before a run", False) = None
    interleave_probs: refused("files are taken one after another and shuffled") = None
    mix_strategy: refused("files are taken one after another and shuffled", "concat") = None
    tokenized_path: refused("prepared rows are MindRecord: --train_dataset_dir names them") = None
    tool_format: refused("tool calls are not built") = None
    default_system: refused("write the system message into the data") = None
    ignore_pad_token_for_loss: refused("padding is never supervised", True) = None
    enable_thinking: refused("answers without a thought get an empty one that is supervised", True) = None
    mask_thinking: refused("thoughts are supervised", False) = None
    early_stopping_steps: refused("a run ends by its epochs or steps") = None
    freeze_language_model: refused("it is for models of images", False) = None
    sequence_parallel_size: refused("tokens are shared by parallel_config.context_parallel", 1) = None
    eval_on_each_dataset: refused("evaluation files are taken together", False) = None

    flash_attn: Kernels = None
    use_unsloth: Kernels = None
    use_unsloth_gc: Kernels = None
    enable_liger_kernel: Kernels = None
    use_v1_kernels: Kernels = None
    use_reentrant_gc: Recomputed = None
    upcast_layernorm: Annotated[Any, Unused("norms are computed in float32 (model.layernorm_compute_type)")] = None
    upcast_lmhead_output: Annotated[Any, Unused("the loss is computed in float32")] = None
    low_cpu_mem_usage: Annotated[Any, Unused("weights are read tensor by tensor")] = None
    trust_remote_code: Annotated[Any, Unused("code beside a model is never run")] = None
    use_fast_tokenizer: Annotated[Any, Unused("the kind of tokenizer is seen from its file")] = None
    cache_dir: Hub = None
    model_revision: Hub = None
    hf_hub_token: Hub = None
    ms_hub_token: Hub = None
    om_hub_token: Hub = None
    adapter_folder: Annotated[Any, Unused("adapter_name_or_path is the folder itself")] = None
    print_param_status: NoEqual = None
    offload_folder: NoEqual = None
    overwrite_cache: Rows = None
    preprocessing_batch_size: Rows = None
    buffer_size: Rows = None
    data_shared_file_system: Rows = None
    media_dir: Images = None
    compute_accuracy: NoEqual = None
    eval_num_beams: NoEqual = None
    include_effective_tokens_per_second: Told = None
    plot_loss: Annotated[Any, Unused("training_loss.png is drawn wherever matplotlib is installed")] = None
    use_swanlab: Told = None
    swanlab_project: Told = None
    swanlab_workspace: Told = None
    swanlab_run_name: Told = None
    swanlab_mode: Told = None
    swanlab_api_key: Told = None
    swanlab_logdir: Told = None
    swanlab_lark_webhook_url: Told = None
    swanlab_lark_secret: Told = None

    init_special_tokens: OfMethod = None
    loraplus_lr_embedding: OfMethod = None
    pissa_iter: OfMethod = None
    pissa_convert: OfMethod = None
    module_dropout: OfMethod = None
    oft_rank: OfMethod = None
    oft_block_size: OfMethod = None
    oft_target: OfMethod = None
    galore_target: OfMethod = None
    galore_rank: OfMethod = None
    galore_update_interval: OfMethod = None
    galore_scale: OfMethod = None
    galore_proj_type: OfMethod = None
    galore_layerwise: OfMethod = None
    apollo_target: OfMethod = None
    apollo_rank: OfMethod = None
    apollo_update_interval: OfMethod = None
    apollo_scale: OfMethod = None
    apollo_proj: OfMethod = None
    apollo_proj_type: OfMethod = None
    apollo_scale_type: OfMethod = None
    apollo_layerwise: OfMethod = None
    apollo_scale_front: OfMethod = None
    badam_mode: OfMethod = None
    badam_start_block: OfMethod = None
    badam_switch_mode: OfMethod = None
    badam_switch_interval: OfMethod = None
    badam_update_ratio: OfMethod = None
    badam_mask_mode: OfMethod = None
    badam_verbose: OfMethod = None
    kt_optimize_rule: OfMethod = None
    cpu_infer: OfMethod = None
    chunk_size: OfMethod = None
    mode: OfMethod = None
    fp8_backend: OfMethod = None
    fp8_enable_fsdp_float8_all_gather: OfMethod = None
    freeze_trainable_layers: Freezing = None
    freeze_trainable_modules: Freezing = None
    freeze_extra_modules: Freezing = None
    freeze_vision_tower: Images = None
    freeze_multi_modal_projector: Images = None
    image_max_pixels: Images = None
    image_min_pixels: Images = None
    image_do_pan_and_scan: Images = None
    crop_to_patches: Images = None
    video_max_pixels: Images = None
    video_min_pixels: Images = None
    video_fps: Images = None
    video_maxlen: Images = None
    use_audio_in_video: Images = None
    audio_sampling_rate: Images = None
    pref_beta: Preferences = None
    pref_ftx: Preferences = None
    pref_bco_weight: Preferences = None
    pref_loss: Preferences = None
    dpo_label_smoothing: Preferences = None
    kto_chosen_weight: Preferences = None
    kto_rejected_weight: Preferences = None
    simpo_gamma: Preferences = None
    ld_alpha: Preferences = None
    ppo_buffer_size: Preferences = None
    ppo_epochs: Preferences = None
    ppo_score_norm: Preferences = None
    ppo_target: Preferences = None
    ppo_whiten_rewards: Preferences = None
    ref_model: Preferences = None
    ref_model_adapters: Preferences = None
    ref_model_quantization_bit: Preferences = None
    reward_model: Preferences = None
    reward_model_adapters: Preferences = None
    reward_model_quantization_bit: Preferences = None
    reward_model_type: Preferences = None
    quantization_method: Quantized = None
    quantization_type: Quantized = None
    quantization_device_map: Quantized = None
    double_quantization: Quantized = None
    infer_backend: Inference = None
    infer_dtype: Inference = None
    use_kv_cache: Inference = None
    do_sample: Inference = None
    temperature: Inference = None
    top_p: Inference = None
    top_k: Inference = None
    num_beams: Inference = None
    max_length: Inference = None
    max_new_tokens: Inference = None
    repetition_penalty: Inference = None
    length_penalty: Inference = None
    skip_special_tokens: Inference = None
    vllm_maxlen: Inference = None
    vllm_gpu_util: Inference = None
    vllm_enforce_eager: Inference = None
    vllm_max_lora_rank: Inference = None
    vllm_config: Inference = None
    export_dir: Inference = None
    export_size: Inference = None
    export_device: Inference = None
    export_quantization_bit: Inference = None
    export_quantization_dataset: Inference = None
    export_legacy_format: Inference = None
    export_hub_model_id: Inference = None
    ray_run_name: Ray = None
    ray_storage_path: Ray = None
    ray_storage_filesystem: Ray = None
    ray_num_workers: Ray = None
    resources_per_worker: Ray = None
    placement_strategy: Ray = None
    ray_init_kwargs: Ray = None
