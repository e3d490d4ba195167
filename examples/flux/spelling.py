"""Suggestions for unknown field names: same word, another trainer's name, or similar spelling."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

#: Option names of other trainers, such as diffusers' scripts, TRL, kohya and Flow-GRPO, with the
#: field here. Names that docs/migrating.md has must agree with its table.
USUAL = {
    name: field
    for field, names in {
        "model.path": "pretrained_model_name_or_path model_name_or_path model_name pretrained base",
        "model.dtype": "mixed_precision precision torch_dtype bf16 fp16",
        "model.resolution": "height width image_size size",
        "model.guidance": "guidance_scale cfg cfg_scale",
        "model.lora_rank": "rank r lora_r network_dim",
        "model.lora_alpha": "alpha network_alpha",
        "model.lora_targets": "target_modules lora_layers lora_target_modules",
        "model.checkpointing": "gradient_checkpointing grad_checkpointing",
        "model.shard": "fsdp zero3 zero_stage deepspeed",
        "data.chains": "dataset dataset_name train_data_dir data_path train_data",
        "data.held_out": "validation validation_data eval_data test_data",
        "data.groups": "num_batches_per_epoch unique_sample_num_per_epoch",
        "data.group_size": "num_generations num_images_per_prompt num_image_per_prompt",
        "sampling.steps": "num_inference_steps num_steps sampling_steps sample_steps",
        "sampling.batch": "sample_batch_size",
        "training.rounds": "num_epochs epochs num_train_epochs max_epochs max_steps "
        "max_train_steps",
        "training.inner_epochs": "num_inner_epochs num_iterations ppo_epochs",
        "training.batch": "bs batch_size train_batch_size per_device_train_batch_size micro_batch",
        "training.minibatches": "num_minibatches gradient_step_per_epoch",
        "training.optimizer": "use_8bit_adam optim optimizer_type",
        "training.learning_rate": "lr learn_rate base_lr",
        "training.warmup_rounds": "warmup warmup_steps lr_warmup_steps",
        "training.schedule": "lr_scheduler lr_scheduler_type lr_schedule",
        "training.final_rate": "min_lr lr_end lr_min",
        "training.weight_decay": "wd adam_weight_decay",
        "training.max_grad_norm": "grad_clip clip_grad clip_grad_norm gradient_clipping",
        "training.ema_decay": "ema ema_rate use_ema",
        "training.ema_every": "ema_update_interval",
        "rewards.weights": "reward_fn reward_weights",
        "rewards.fusion": "advantage_aggregation multi_objective_aggregation",
        "rewards.std": "global_std scale_rewards",
        "rewards.advantage_limit": "adv_clip_max adv_clip_range",
        "objective.solver": "sde_type dynamics_type",
        "objective.stochastic_steps": "timestep_fraction num_sde_steps sde_window_size",
        "objective.renoise.distribution": "time_sampling_strategy",
        "objective.renoise.levels": "num_train_timesteps",
        "objective.renoise.shift": "time_shift",
        "objective.kl_coef": "kl kl_weight kl_beta beta",
        "objective.clip_high": "clip_range cliprange epsilon",
        "evaluation.steps": "eval_num_steps",
        "evaluation.every": "eval_freq eval_steps validation_steps eval_every",
        "output.folder": "output_dir save_dir logging_dir out",
        "output.resume": "resume_from resume_from_checkpoint",
        "output.checkpoint_every": "save_steps save_freq checkpointing_steps save_every",
        "output.keep": "checkpoints_total_limit save_total_limit num_checkpoint_limit",
        "output.trackers": "report_to log_with logger",
        "output.project": "project_name tracker_project_name wandb_project",
        "output.run": "run_name exp_name tracker_run_name",
    }.items()
    for name in names.split()
}
NEAR = 0.75  # least similarity, as difflib's ratio; "roundz" and "rounds" have 0.83


def hint(name: str, known: Iterable[str]) -> str:
    """Return ``"; perhaps FIELD"`` for an unknown name; "" if no field is similar.

    Args:
        name: dotted name, such as "training.lr"; its section may be missing or wrong.
        known: dotted names of the fields and their sections.

    Example:
        >>> hint("training.lr", ["training.learning_rate", "training.rounds"])
        '; perhaps training.learning_rate'
        >>> hint("batch", ["training.batch", "sampling.batch"])
        '; perhaps sampling.batch or training.batch'
        >>> hint("training.zzz", ["training.rounds"])
        ''
    """
    found = meant(name, known)
    return f"; perhaps {' or '.join(found)}" if found else ""


def meant(name: str, known: Iterable[str]) -> list[str]:
    """Return the fields that an unknown name may mean, from the most reliable rule that gives any.

    Args:
        name: dotted name; its section may be missing or wrong.
        known: dotted names of the fields and their sections.

    Example:
        >>> meant("lr", ["training.learning_rate", "training.rounds"])
        ['training.learning_rate']
    """
    known = sorted(set(known))
    section, _, word = name.rpartition(".")
    words = {field.rpartition(".")[2] for field in known}
    if word not in words and USUAL.get(word) in known:
        return [USUAL[word]]
    near = get_close_matches(word, words, n=1, cutoff=NEAR)  # the word itself, if it is one
    fields = [field for field in known if field.rpartition(".")[2] in near]
    return [field for field in fields if field.rpartition(".")[0] == section] or fields
