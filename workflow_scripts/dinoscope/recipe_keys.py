"""Keys of the published trainer's recipes that are no settings here: ignored ones, and ones with a single value.

A YAML file written for the published trainer loads: each of its keys is a field of RunConfig, stands here, or is
refused as unknown. config/README.md shows both tables.
"""

from typing import Any, NamedTuple

__all__ = ["IGNORED_KEYS", "ONLY_VALUES", "REPLACED_BY_SCHEDULES", "OnlyValue"]


class OnlyValue(NamedTuple):
    """The value that a key must have, and what to do instead of another one."""

    value: Any
    instead: str


# Read, named in the log once, without effect: key or section -> why.
IGNORED_KEYS = {
    "MODEL.DEVICE": "the device is whatever the machine has",
    "MODEL.DTYPE": "see compute_precision",
    "coding_rate_loss.cls_loss_weight": "there is no coding rate loss",
    "coding_rate_loss.epsilon": "there is no coding rate loss",
    "coding_rate_loss.masked_patches_loss_weight": "there is no coding rate loss",
    "distillation.full_cfg_path": "the teacher's settings are read off its weights",
    "evaluation.config_files": "evaluation belongs to the workflow",
    "evaluation.low_freq_every": "evaluation belongs to the workflow",
    "gram.compute_stats": "not measured",
    "multidistillation.global_batch_size": "there is no multi-distillation",
    "optim.dump_fsdp_weights_path": "checkpoints hold the weights",
    "optim.multi_tensor_optim": "the optimizer always works on lists of tensors",
    "student.block_chunks": "blocks are never chunked",
    "student.ffn_ratio": "it belongs to student.arch",
    "student.fourier_encoding_dim": "there are no Fourier embeddings",
    "student.fp8_filter": "there is no fp8",
    "student.interpolate_antialias": "positions are rotary, nothing is interpolated",
    "student.interpolate_offset": "positions are rotary, nothing is interpolated",
    "student.pos_embed_grid_size": "positions are rotary, there is no grid",
    "train.cache_dataset": "the manifest is memory-mapped",
    "train.cell_augmentation_type": "see augmentation.recipe",
    "train.cudagraphs": "it would change nothing but speed",
    "train.monitor_gradient_norm": "gradient norms are always logged",
    "train.output_dir": "the workflow's run folder is used",
    "train.saveckp_freq": "see checkpointing.period",
    "train.sharded_eval_checkpoint": "teacher exports are single files",
}

_NO_SUCH_LOSS = "dinoscope has no coding rate loss"
_CONTINUE = "let the run continue another one (`continues` in config.yaml)"
_START = "name the file as MODEL.WEIGHTS"
_ROPE_ONLY = "positions are rotary, as in the published models"
_UNUSED = "no published model uses it"

ONLY_VALUES = {
    "MODEL.META_ARCHITECTURE": OnlyValue("SSLMetaArch", "there is one training method"),
    "coding_rate_loss.use_cls_loss": OnlyValue(False, _NO_SUCH_LOSS),
    "coding_rate_loss.use_masked_patches_loss": OnlyValue(False, _NO_SUCH_LOSS),
    "crops.localcrops_subset_of_globalcrops": OnlyValue(False, "local crops come from the whole window"),
    "crops.share_color_jitter": OnlyValue(False, "each crop is distorted on its own; see augmentation.color_jitter_p"),
    "crops.teacher_to_student_resolution_scale": OnlyValue(1.0, "teacher and student see the same global crops"),
    "dino.force_weight_norm": OnlyValue(False, "last layers have no weight norm"),
    "dino.head_norm_last_layer": OnlyValue(False, "last layers have no weight norm"),
    "dino.koleo_distributed_loss_group_data": OnlyValue(True, "see dino.koleo_distributed_loss_group_size"),
    "dino.koleo_distributed_replicas": OnlyValue(0, "see dino.koleo_distributed_loss_group_size"),
    "hrft.enabled": OnlyValue(False, _CONTINUE),
    "hrft.checkpoint_path": OnlyValue("", _CONTINUE),
    "ibot.head_norm_last_layer": OnlyValue(False, "last layers have no weight norm"),
    "ibot.separate_head": OnlyValue(True, "patches always have a head of their own"),
    "multidistillation.enabled": OnlyValue(False, "a run has one student; give each student a run of its own"),
    "student.cls_pos_embedding": OnlyValue(False, _ROPE_ONLY),
    "student.drop_path_shape": OnlyValue("uniform", "the rate is the same in every block"),
    "student.drop_path_uniform": OnlyValue(True, "the rate is the same in every block"),
    "student.fourier_embeddings": OnlyValue(False, _ROPE_ONLY),
    "student.fp8_enabled": OnlyValue(False, "use compute_precision.param_dtype: bf16"),
    "student.init_std_cls": OnlyValue(0.02, _UNUSED),
    "student.init_std_reg": OnlyValue(0.02, _UNUSED),
    "student.mask_attention": OnlyValue(False, _UNUSED),
    "student.mask_register_attention": OnlyValue(False, _UNUSED),
    "student.multiple_pos_embeddings": OnlyValue(False, _ROPE_ONLY),
    "student.patch_drop": OnlyValue(0.0, _UNUSED),
    "student.pos_embed_rope_gamma": OnlyValue(1.0, _UNUSED),
    "student.pos_embed_rope_init_multi_frequencies": OnlyValue(False, _UNUSED),
    "student.pos_embed_type": OnlyValue("rope", _ROPE_ONLY),
    "student.pretrained_weights": OnlyValue("", _START),
    "student.reg_pos_embedding": OnlyValue(False, _ROPE_ONLY),
    "student.rescale_weights_by_layer_id": OnlyValue(False, _UNUSED),
    "student.resume_from_teacher_chkpt": OnlyValue("", _START),
    "student.sin_cos_embeddings": OnlyValue(False, _ROPE_ONLY),
    "teacher.in_chans": OnlyValue(3, "slides are read as RGB"),
    "train.cell_augmentation": OnlyValue(False, "see augmentation.recipe"),
    "train.centering": OnlyValue("sinkhorn_knopp", "teacher targets are centred by Sinkhorn-Knopp"),
    "train.chunk_schedule": OnlyValue([], _UNUSED),
    "train.data_config": OnlyValue(None, "see train.dataset_path"),
    "train.learn_from_teacher_tokens": OnlyValue(False, _UNUSED),
    "train.use_teacher_head": OnlyValue(True, _UNUSED),
}

# Published recipes with a section `schedules` set these to null.
REPLACED_BY_SCHEDULES = (
    "optim.lr",
    "optim.min_lr",
    "optim.warmup_epochs",
    "optim.weight_decay",
    "optim.weight_decay_end",
    "optim.freeze_last_layer_epochs",
    "optim.schedule_trunc_extra",
    "teacher.momentum_teacher",
    "teacher.final_momentum_teacher",
    "teacher.teacher_temp",
    "teacher.warmup_teacher_temp",
    "teacher.warmup_teacher_temp_epochs",
)
