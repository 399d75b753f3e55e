"""Which keys of a config may change when a run goes on, and what a change means. Each key has its own decision: a new one needs one too."""

from ops.registry import OPS

IN_PLACE = "in place"  # in the run's own folder, and with --resume_from
ELSEWHERE = "elsewhere"  # with --resume_from alone: a new run, in its own folder, that continues another one
NEVER = "never"  # it is another run; --init_from takes the weights of the old one

UNUSED = "not used: the weights come from the run's own checkpoint"
LAYOUT = "how ranks share the work; results differ by rounding"
KERNELS = "which kernels compute; results differ by rounding"
SAVING = "when and how checkpoints are written from here on"
LOGGING = "what is measured and written from here on"
RESULT = "what is written at the end"
UPDATE = "the updates from here on"
MODEL = "other parameters, or other values of the same ones"
DATA = "other rows, or another order of them: the place in the data would have no meaning"
TRAINED = "other parameters have optimizer state"


def _of(section, names, where, meaning):
    return {f"{section}.{name}": (where, meaning) for name in names.split()}


# key: (where it may change, what the change means)
RULES = {
    "model": (NEVER, MODEL),
    **_of(
        "model_args",
        "model_type vocab_size hidden_size num_layers num_heads num_kv_heads head_dim ffn_size tie_embeddings qk_norm qkv_bias"
        " norm_placement rms_norm_eps initializer_range max_position rope_theta num_experts experts_per_token moe_ffn_size norm_topk_prob"
        " decoder_sparse_step mlp_only_layers router_aux_coef router_z_coef router_bias moe_block_size moe_capacity_factor bos_id eos_id"
        " pad_id param_dtype compute_dtype",
        NEVER,
        MODEL,
    ),
    **_of("yarn", "factor original_max_position", NEVER, MODEL),
    "resume_from": (IN_PLACE, UNUSED),
    "init_from": (IN_PLACE, UNUSED),
    "partial": (IN_PLACE, UNUSED),
    "train.steps": (IN_PLACE, "the run becomes longer or shorter, and the learning rate follows the new length from here on"),
    **_of("train", "batch_size batch_ramp", ELSEWHERE, "rows a step from here on; the place in the data counts rows, and stays"),
    **_of("train", "seq_len seed", NEVER, DATA),
    **_of("train", "log_every eval_every eval_rows eval_tasks monitor_every profile_steps", IN_PLACE, LOGGING),
    "train.layer_loop": (IN_PLACE, "how layers are compiled; results differ by rounding"),
    "train.recompute": (IN_PLACE, "what is computed again in the backward pass; memory and speed change"),
    "train.loss_chunks": (IN_PLACE, "how the loss is computed; results differ by rounding"),
    **_of("train", "save_hf save_hf_every sample_tokens sample_prompt exact_match_rows", IN_PLACE, RESULT),
    **_of("train", "freeze_include freeze_exclude", NEVER, TRAINED),
    "train.mup_base_width": (NEVER, "other initial values, and other learning rates of the matrices"),
    "train.ema_decay": (NEVER, "the average of the steps before had another weight, or there is none"),
    "train.frozen_dtype": (IN_PLACE, "in which dtype frozen matrices are kept from here on; a narrower one rounds them"),
    **_of("lora", "rank alpha rslora dropout init targets adapter", NEVER, MODEL),
    **_of(
        "prefer",
        "loss beta margin label_smoothing length_normalised desirable_weight undesirable_weight",
        NEVER,
        "another objective: the rewards of the two parts could not be compared",
    ),
    "prefer.row_pairs": (NEVER, DATA),
    **_of(
        "rl",
        "loss reward deviation clip_low clip_high kl_coef",
        NEVER,
        "another objective: the two parts could not be compared",
    ),
    **_of("rl", "group_size max_new_tokens", NEVER, DATA),
    "rl.updates": (NEVER, "the optimizer counts its updates"),
    "rl.reward_timeout_s": (IN_PLACE, "how long a reward may take from here on"),
    "rl.reward_processes": (IN_PLACE, "how many processes compute rewards"),
    "rl.slots": (IN_PLACE, "how many answers are sampled at a time; the answers stay the same"),
    "rl.log_samples": (IN_PLACE, LOGGING),
    "optim.name": (NEVER, "its state has other arrays"),
    **_of(
        "optim", "lr lr_groups schedule warmup_steps warmup_ratio decay_fraction min_lr_ratio b1 b2 muon_momentum eps", ELSEWHERE, UPDATE
    ),
    **_of("optim", "weight_decay clip_norm skip_spikes router_bias_rate", ELSEWHERE, UPDATE),
    **_of("checkpoint", "every on_exit keep_last keep_every async_save compression on_error timeout_s", IN_PLACE, SAVING),
    **_of(
        "data",
        "path tokenizer vocab_size held_out split max_bytes max_samples reset_at_eod conversations format enable_thinking"
        " train_empty_think packing too_long stream json_key shuffle_buffer",
        NEVER,
        DATA,
    ),
    **_of("watch", "trackers project", IN_PLACE, LOGGING),
    "data.max_documents": (IN_PLACE, "how attention is told of documents; results differ by rounding"),
    "data.skip_bad": (IN_PLACE, "whether unusable records are left out from here on"),
    "data.cache_dir": (IN_PLACE, "where index files are kept"),
    **_of("ops", " ".join(OPS), IN_PLACE, KERNELS),
    **_of(
        "parallel",
        "dp tp pp pp_schedule virtual_stages stage_layers cp cp_attention cp_ulysses ep micro_batches zero seq_parallel seq_gather_again"
        " lowering",
        IN_PLACE,
        LAYOUT,
    ),
}


def keys(*wheres):
    """Returns the keys that may change at these places."""
    return tuple(key for key, (where, _) in RULES.items() if where in wheres)
