"""Flags of `transformers.TrainingArguments` that have no effect here, and are refused."""

from typing import Any


_LOSSES_ONLY = "evaluation measures losses and keeps no predictions"
_PRECISION = "evaluation computes in the precision of training: --bf16 or --fp16"
_LIGER = "--text_loss liger uses liger-kernel's kernel for this model"
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "auto_find_batch_size": (
        (False,),
        "batches are planned before the first step. Where memory runs out, halve --per_device_train_batch_size and "
        "double --gradient_accumulation_steps: the steps stay the same (--dry-run estimates the memory)",
    ),
    "average_tokens_across_devices": (
        (True,),
        "--loss_normalization global always counts the tokens of all devices; micro_batch never does",
    ),
    "batch_eval_metrics": ((False,), _LOSSES_ONLY),
    "bf16_full_eval": ((False,), _PRECISION),
    "dataloader_drop_last": (
        (False,),
        "every epoch trains on every sample exactly once; in a last step with fewer samples each has the same weight "
        "as in the other steps",
    ),
    "dataloader_in_order": ((True,), "resuming relies on batches in the planned order"),
    "debug": (("", "underflow_overflow", [], ["underflow_overflow"], None), "only underflow_overflow is"),
    "do_predict": ((False,), "this command trains; `metamorph evaluate` and `metamorph generate` predict"),
    "enable_jit_checkpoint": (
        (False,),
        "it lets every process decide on its own when to save. On SIGTERM or SIGUSR1 all processes already save after "
        "the same step",
    ),
    "eval_accumulation_steps": ((None,), _LOSSES_ONLY),
    "eval_do_concat_batches": ((True,), _LOSSES_ONLY),
    "eval_use_gather_object": ((False,), _LOSSES_ONLY),
    "fp16_full_eval": ((False,), _PRECISION),
    "include_for_metrics": (([], None), _LOSSES_ONLY),
    "label_names": ((None, ["labels"]), "the labels are always `labels`"),
    "label_smoothing_factor": ((0,), "the text loss is the plain cross-entropy"),
    "length_column_name": (("length",), "lengths are computed from the samples, not read from a column"),
    "liger_kernel_config": ((None,), _LIGER),
    "optim_target_modules": ((None,), "only GaLore and APOLLO use it, which are not supported"),
    "parallelism_config": ((None,), "batches are planned for data-parallel processes: --sharding, --dp_replicate"),
    "prediction_loss_only": ((True,), _LOSSES_ONLY),
    "remove_unused_columns": ((False,), "the dataset returns exactly what the collator needs"),
    "use_cache": ((False,), "training keeps no keys and values"),
    "use_liger_kernel": ((False,), _LIGER),
}
"""Name -> accepted values, the default first, and why no other value is accepted."""
