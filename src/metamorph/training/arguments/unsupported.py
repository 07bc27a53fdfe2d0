"""Flags of `transformers.TrainingArguments` that would do nothing here."""

from typing import Any


_LOSSES_ONLY = "evaluation measures losses and keeps no predictions"
_PRECISION = "evaluation computes in the precision of training: --bf16 or --fp16"
_LIGER = "--text_loss liger uses the kernel of liger-kernel that fits this model"
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
        "every sample is trained on exactly once in each epoch, and in a last step with fewer samples each of them "
        "weighs as much as in all others",
    ),
    "dataloader_in_order": ((True,), "batches come in the order of the plan, which resuming relies on"),
    "debug": (("", "underflow_overflow", [], ["underflow_overflow"], None), "only underflow_overflow is"),
    "do_predict": ((False,), "this command trains; `metamorph evaluate` and `metamorph generate` predict"),
    "enable_jit_checkpoint": (
        (False,),
        "it lets every process decide by itself when to save. At SIGTERM or SIGUSR1 all processes save after the same "
        "step, without a flag",
    ),
    "eval_accumulation_steps": ((None,), _LOSSES_ONLY),
    "eval_do_concat_batches": ((True,), _LOSSES_ONLY),
    "eval_use_gather_object": ((False,), _LOSSES_ONLY),
    "fp16_full_eval": ((False,), _PRECISION),
    "include_for_metrics": (([], None), _LOSSES_ONLY),
    "label_names": ((None, ["labels"]), "the labels are always `labels`"),
    "label_smoothing_factor": ((0,), "the text loss is the plain cross-entropy"),
    "length_column_name": (("length",), "lengths are counted from the samples, not read from a column"),
    "liger_kernel_config": ((None,), _LIGER),
    "optim_target_modules": ((None,), "only GaLore and APOLLO read it, which are not supported"),
    "parallelism_config": ((None,), "batches are planned for data-parallel processes: see --sharding"),
    "prediction_loss_only": ((True,), _LOSSES_ONLY),
    "remove_unused_columns": ((False,), "the dataset yields exactly what the collator needs"),
    "use_cache": ((False,), "training keeps no keys and values"),
    "use_liger_kernel": ((False,), _LIGER),
}
"""Flags of Transformers that would do nothing here: the values that are accepted, and why no other one is."""
