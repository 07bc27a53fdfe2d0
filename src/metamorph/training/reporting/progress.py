"""Shows the progress of a run: a bar or lines, and one line for each log entry."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from metamorph.runs.progress import Progress, duration, log_line


logger = logging.getLogger(__name__)

VALIDATION = {
    "eval_loss": "loss",
    "eval_text_loss": "text",
    "eval_visual_loss": "visual",
    "eval_visual_cosine": "cosine",
}
"""Validation metrics over all sources -> their labels."""


class ShowProgress(TrainerCallback):
    """A bar on a terminal, lines elsewhere; see `Progress`. All other values are in `trainer_state.json` and trackers.

    With `log_entries`, each log entry is a line; `shown` maps values of it to their labels next to the bar.
    """

    def __init__(self, title: str, *, log_entries: bool = True, shown: dict[str, str] | None = None) -> None:
        self.title = title
        self.log_entries = log_entries
        self.shown = shown or {"loss": "loss"}
        self._progress: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start at the step of the checkpoint, if the run resumes."""
        self._progress = Progress(
            desc=self.title,
            total=state.max_steps,
            unit="step",
            initial=state.global_step,
            bar=not args.disable_tqdm,
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance."""
        if self._progress is not None:
            self._progress.update(state.global_step - self._progress.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the entry: of training, of a validation, or of the entire run."""
        progress, logs = self._progress, logs or {}
        if progress is None:
            return
        if "loss" in logs:
            shown = self.shown if progress.has_bar else {"loss": "loss"}
            progress.set_postfix({label: f"{logs[name]:.3f}" for name, label in shown.items() if name in logs})
            if state.is_world_process_zero:
                values = ", ".join(f"{name} {value:.4g}" for name, value in logs.items())
                logger.debug("step %d, all values: %s", state.global_step, values)
        if not self.log_entries:
            return
        if "loss" in logs:
            unit = "tokens" if "tokens_per_second" in logs else "samples"
            rate = logs.get(f"{unit}_per_second", 0.0)
            progress.say(log_line(progress, state.epoch or 0.0, logs["loss"], logs["learning_rate"], rate, unit))
        elif "eval_loss" in logs:
            found = [f"{label} {logs[name]:.4f}" for name, label in VALIDATION.items() if name in logs]
            progress.say(" · ".join([f"validation after step {state.global_step}", *found]))
        elif "train_runtime" in logs:
            rate, loss = logs["train_samples_per_second"], logs["train_loss"]
            progress.say(
                f"trained for {duration(logs['train_runtime'])} · {rate:,.1f} samples/s · mean loss {loss:.4f}"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self._progress is not None:
            self._progress.close()
