"""Builds mini-llama: a Llama of two million weights that has read about the miniature world but never seen it.

The conversations are those of `llama_data`: what images will later show is described in words. Two things let a model
this small learn in minutes which attribute belongs to which object: the initialisation of its weights (`llama_init`),
and lists of up to four things at the beginning, in which guessing is less often right than in a scene of two objects.
"""

from __future__ import annotations

import logging
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from metamorph.mini import AssetError
from tools.miniature.cards import AssetCard, write_card
from tools.miniature.llama_data import (
    Conversation,
    TextTask,
    build_vocabulary,
    evaluation_tasks,
    fact_conversation,
    fact_tasks,
    list_conversation,
    training_conversation,
)
from tools.miniature.llama_init import initialise
from tools.miniature.tokenizer import END_OF_TEXT_TOKEN, build_tokenizer
from tools.miniature.training_state import STATE_FILE, TrainingSchedule, step_rng, train


logger = logging.getLogger(__name__)

NAME = "mini-llama"
GATES = {"vqa.all": 0.95, "vqa.each_type": 0.90, "facts": 1.0}
"""Least accuracy of text-only question answering over all questions, of each question type, and of facts."""

_TRAINING_STREAM, _EVALUATION_STREAM, _POLISH_STREAM = 0, 1, 2
_POLISH_FOLDER = "polish"
_IGNORED = -100
_CHUNK = 16


@dataclass(frozen=True)
class LlamaRecipe:
    """Everything that decides what mini-llama becomes, besides the seed."""

    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int = 6
    max_position_embeddings: int = 1024
    batch_size: int = 32
    steps: int = 2000
    list_steps: int = 600
    """Steps at the beginning that read nothing but lists of things."""
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    polish_steps: int = 150
    """Steps at the end, from the weights as they are shipped (in bf16), of which half of the reading is facts."""
    polish_learning_rate: float = 7e-5


def new_model(recipe: LlamaRecipe, tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """An untrained mini-llama for the tokenizer."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        max_position_embeddings=recipe.max_position_embeddings,
        attention_bias=True,
        initializer_range=recipe.hidden_size**-0.5,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # On a CPU the backward pass of plain attention is a third faster than that of the fused kernel.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", trust_remote_code=False)
    initialise(model, seed)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TEXT_TOKEN)],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    return model


def encode(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of conversations in the chat format, padded on the right.

    Returns:
        Ids, attention mask, and labels that keep the assistant's words with their end of turn and are -100
        elsewhere; each `[conversations, sequence]`.
    """
    batch = tokenizer.apply_chat_template(
        list(conversations),
        tokenize=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"padding_side": "right"},
    )
    labels = batch["input_ids"].masked_fill(batch["assistant_masks"] == 0, _IGNORED)
    return batch["input_ids"], batch["attention_mask"], labels


def batch_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]
) -> tuple[Tensor, dict[str, float]]:
    """Mean cross-entropy over the assistant's tokens of a batch, and figures for the log.

    Short and long conversations run apart, so that little time goes into padding; the loss is that of one batch.
    """
    by_length = sorted(conversations, key=lambda turns: sum(len(turn["content"]) for turn in turns))
    total, count, right = torch.zeros(()), 0, 0
    for start in range(0, len(by_length), _CHUNK):
        input_ids, attention_mask, labels = encode(tokenizer, by_length[start : start + _CHUNK])
        targets = labels[:, 1:]
        chosen = targets != _IGNORED
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[:, :-1][chosen]).float()
        total = total + functional.cross_entropy(logits, targets[chosen], reduction="sum")
        count += int(chosen.sum())
        right += int((logits.argmax(-1) == targets[chosen]).sum())
    return total / count, {"token_accuracy": right / count}


@torch.no_grad()
def answered_exactly(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[TextTask], chunk: int = 64
) -> list[bool]:
    """Whether greedy decoding gives exactly each task's answer and then stops.

    Greedy decoding gives an answer exactly if and only if each of its tokens, the end of turn included, is
    the most likely one after those before it; so one forward pass over the right answer decides.
    """
    verdicts: list[bool] = []
    for start in range(0, len(tasks), chunk):
        conversations = [task.conversation() for task in tasks[start : start + chunk]]
        input_ids, attention_mask, labels = encode(tokenizer, conversations)
        logits = model(input_ids, attention_mask=attention_mask, use_cache=False).logits
        right = (logits[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == _IGNORED)
        verdicts += right.all(dim=1).tolist()
    return verdicts


def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, seed: int, *, scenes: int = 300
) -> dict[str, Any]:
    """Exact-answer accuracy on descriptions of reserved scenes, by question type and by task, and of facts."""
    rng = step_rng(seed, _EVALUATION_STREAM, 0)
    tasks = evaluation_tasks(rng, scenes)
    verdicts: dict[str, dict[str, list[bool]]] = {"vqa": defaultdict(list), "instructions": defaultdict(list)}
    by_objects: dict[int, list[bool]] = defaultdict(list)
    for task, right in zip(tasks, answered_exactly(model, tokenizer, tasks), strict=True):
        verdicts["vqa" if task.is_question else "instructions"][task.kind].append(right)
        by_objects[task.num_objects].append(right)
    figures: dict[str, Any] = {}
    for group, by_kind in verdicts.items():
        every = [right for rights in by_kind.values() for right in rights]
        figures[group] = {"all": _mean(every), **{kind: _mean(by_kind[kind]) for kind in sorted(by_kind)}}
    figures["vqa_by_objects"] = {"one": _mean(by_objects[1]), "two": _mean(by_objects[2])}
    figures["facts"] = _mean(answered_exactly(model, tokenizer, fact_tasks()))
    return figures


def missed_gates(figures: dict[str, Any]) -> dict[str, float]:
    """The figures that are below their gates, by name."""
    missed = {
        f"vqa.{kind}": value
        for kind, value in figures["vqa"].items()
        if value < GATES["vqa.all" if kind == "all" else "vqa.each_type"]
    }
    return missed if figures["facts"] >= GATES["facts"] else {**missed, "facts": figures["facts"]}


def check_gates(figures: dict[str, Any]) -> None:
    """Raise AssetError when a figure is below its gate, naming it."""
    if missed := missed_gates(figures):
        raise AssetError(
            f"{NAME} is below its gates {GATES}: {missed}. Train longer, or try another seed; "
            "--ignore_gates writes it all the same."
        )


def build(
    output_dir: Path,
    *,
    seed: int = 0,
    resume: bool = True,
    recipe: LlamaRecipe | None = None,
    work_dir: Path | None = None,
    enforce_gates: bool = True,
) -> dict[str, Any]:
    """Train, judge and write mini-llama.

    Args:
        output_dir: Folder of the finished asset; written only when the gates are passed.
        seed: Seed of weights and data.
        resume: Whether to continue an interrupted build.
        recipe: Hyper-parameters, the shipped ones by default.
        work_dir: Folder of the unfinished build, by default `<output_dir>.building`; removed at the end.
        enforce_gates: Whether figures below the gates are an error.

    Returns:
        The figures of the card.

    Raises:
        AssetError: A gate is not reached.
    """
    recipe = recipe or LlamaRecipe()
    work_dir = work_dir or output_dir.with_name(output_dir.name + ".building")
    tokenizer = build_tokenizer(build_vocabulary(), model_max_length=recipe.max_position_embeddings)
    model = new_model(recipe, tokenizer, seed)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = step_rng(seed, _TRAINING_STREAM, step)
        sample = list_conversation if step < recipe.list_steps else training_conversation
        conversations = [sample(rng) for _ in range(recipe.batch_size)]
        return batch_loss(model, tokenizer, conversations)

    schedule = TrainingSchedule(recipe.steps, recipe.learning_rate, recipe.warmup_steps)
    fingerprint = f"{NAME} seed {seed} vocabulary {len(tokenizer)} {recipe}"
    seconds = train(model, schedule, loss_of_step, work_dir, fingerprint=fingerprint, resume=resume)
    seconds += _polish(model, tokenizer, recipe, seed, work_dir / _POLISH_FOLDER, fingerprint, resume=resume)
    model.eval().to(torch.bfloat16).save_pretrained(work_dir)
    tokenizer.backend_tokenizer.no_padding()  # a trace of the last batch
    tokenizer.save_pretrained(work_dir)
    # The figures are those of the rounded weights, not of the ones in memory.
    shipped = LlamaForCausalLM.from_pretrained(work_dir, dtype=torch.float32).eval()
    figures = evaluate(shipped, tokenizer, seed)
    logger.info("%s: %s", NAME, figures)
    if enforce_gates:
        check_gates(figures)
    (work_dir / STATE_FILE).unlink()
    shutil.rmtree(work_dir / _POLISH_FOLDER)
    write_card(work_dir, _card(seed, seconds, recipe, figures))
    shutil.rmtree(output_dir, ignore_errors=True)
    work_dir.rename(output_dir)
    return figures


def _polish(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    recipe: LlamaRecipe,
    seed: int,
    folder: Path,
    fingerprint: str,
    *,
    resume: bool,
) -> float:
    """Train a little longer, at a low rate, on facts half of the time: a fact is right or wrong for good, so all count.

    Returns:
        Seconds that it took.
    """
    model.to(torch.bfloat16).float()

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = step_rng(seed, _POLISH_STREAM, step)
        half = recipe.batch_size // 2
        conversations = [training_conversation(rng) for _ in range(recipe.batch_size - half)]
        return batch_loss(model, tokenizer, conversations + [fact_conversation(rng) for _ in range(half)])

    schedule = TrainingSchedule(
        recipe.polish_steps, recipe.polish_learning_rate, warmup_steps=recipe.polish_steps // 10
    )
    return train(model, schedule, loss_of_step, folder, fingerprint=f"polish of {fingerprint}", resume=resume)


def _mean(verdicts: Sequence[bool]) -> float:
    return round(sum(verdicts) / max(1, len(verdicts)), 4)


def _card(seed: int, seconds: float, recipe: LlamaRecipe, figures: dict[str, Any]) -> AssetCard:
    missed = missed_gates(figures)
    verdict = f" It misses these gates: {', '.join(missed)}." if missed else " It passes all its gates."
    return AssetCard(
        name=NAME,
        summary=(
            "A `LlamaForCausalLM` that has read about the miniature world but has never seen an image, with a "
            "tokenizer like Llama-3's (same special tokens and chat format, byte fallback, no unknown token). It "
            "was trained from scratch on text generated by `metamorph.miniature`: descriptions of scenes, questions "
            "and answers about them, instructions that change them, and facts. An answer counts as right if greedy "
            "decoding produces it exactly and stops. The figures are for scenes that were never trained on, with "
            "the bf16 weights of this folder." + verdict
        ),
        build_command="python -m tools.miniature.rebuild llama",
        seed=seed,
        seconds=seconds,
        recipe=asdict(recipe),
        figures=figures,
        gates=dict(GATES),
    )
