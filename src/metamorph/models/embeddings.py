"""Embedding rows of the new tokens: adding them, and training nothing but them in stage 1.

Stage 1 must leave the language model bit-identical but needs embeddings for `<image_start>` and `<image_end>`. Masking
the gradient of the whole table would still allocate gradient and optimizer state for all of it (4 GB for Llama-3 8B),
and weight decay could move frozen rows. A small parameter of its own has none of these problems.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from .text_head import FinishLogits, TextHead, TextLossOptions


class NewTokenEmbedding(nn.Module):
    """An embedding table whose rows `token_ids` are replaced by the trainable parameter `new_rows`.

    The table keeps its parameter name (`weight`), so that checkpoints and tied heads see no difference.

    Args:
        table: [vocabulary, hidden]; it is frozen. May be a subclass that scales its output (Gemma).
        token_ids: the replaced rows.
    """

    def __init__(self, table: nn.Embedding, token_ids: list[int]):
        super().__init__()
        self.token_ids: Tensor
        self.weight = table.weight.requires_grad_(False)
        self.new_rows = nn.Parameter(table.weight.detach()[token_ids].clone())
        self.register_buffer("token_ids", torch.tensor(token_ids, device=table.weight.device), persistent=False)
        self._table = (table,)  # in a tuple: not a submodule, its weight is already registered here

    @property
    def table(self) -> nn.Embedding:
        """The plain table this module stands in for."""
        return self._table[0]

    def forward(self, input_ids: Tensor) -> Tensor:
        """[batch, sequence] -> [batch, sequence, hidden]."""
        is_new = input_ids.unsqueeze(-1).eq(self.token_ids)  # [batch, sequence, new tokens]
        rows = self.new_rows[is_new.int().argmax(dim=-1)] * getattr(self.table, "embed_scale", 1.0)
        # With the weight of this module, which is the one that engines gather.
        plain = functional_call(self.table, {"weight": self.weight}, (input_ids,))
        return torch.where(is_new.any(dim=-1, keepdim=True), rows.to(plain.dtype), plain)

    def replace_logits(self, logits: Tensor, hidden_states: Tensor, bias: Tensor | None) -> Tensor:
        """For heads tied to the table: the new tokens' logits must come from the new rows as well."""
        return _replace_logits(self, logits, hidden_states, bias)


class NewTokenHead(TextHead):
    """An `lm_head` whose rows `token_ids` are replaced by the trainable parameter `new_rows`.

    For adapters: the head is frozen, but the rows of the new tokens start at the mean of all rows, so that the model
    would hardly ever choose `<image_start>`. Weight and bias keep their parameter names.

    Args:
        head: [hidden] -> [vocabulary]; it is frozen.
        token_ids: the replaced rows.
    """

    def __init__(self, head: nn.Linear, token_ids: list[int]):
        super().__init__(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        self.token_ids: Tensor
        self.weight, self.bias = head.weight.requires_grad_(False), head.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.new_rows = nn.Parameter(head.weight.detach()[token_ids].clone())
        self.register_buffer("token_ids", torch.tensor(token_ids, device=head.weight.device), persistent=False)
        self._head = (head,)  # in a tuple: not a submodule, its weight is already registered here

    @property
    def head(self) -> nn.Linear:
        """The plain head this module stands in for."""
        return self._head[0]

    def forward(
        self,
        hidden_states: Tensor,
        labels: Tensor | None = None,
        options: TextLossOptions | None = None,
        finish: FinishLogits | None = None,
        finish_weights: tuple[nn.Parameter, ...] = (),
    ) -> Tensor:
        """As [`TextHead.forward`]."""

        def replace(logits: Tensor, hidden: Tensor) -> Tensor:
            logits = _replace_logits(self, logits, hidden, self.bias)
            return logits if finish is None or labels is None else finish(logits, hidden)

        if labels is None:
            return replace(super().forward(hidden_states), hidden_states)
        return super().forward(hidden_states, labels, options, replace, (self.new_rows, *finish_weights))


def _replace_logits(
    rows: NewTokenEmbedding | NewTokenHead, logits: Tensor, hidden_states: Tensor, bias: Tensor | None
) -> Tensor:
    """[..., V] logits, those of the new tokens by their rows in training."""
    bias = None if bias is None else bias[rows.token_ids]
    new = nn.functional.linear(hidden_states, rows.new_rows.to(hidden_states.dtype), bias)
    return logits.index_copy(-1, rows.token_ids, new.to(logits.dtype))


def attach_new_token_rows(model: PreTrainedModel) -> nn.Parameter | None:
    """Freezes the embedding table and makes the rows of `<image_start>` and `<image_end>` trainable on their own.

    Args:
        model: a MetaMorph model; its token ids come from its configuration.

    Returns:
        The new parameter [2, hidden], or None when the model has no such tokens (`mm_use_im_start_end=False`).
    """
    config = model.config
    token_ids = [i for i in (config.image_start_token_id, config.image_end_token_id) if i is not None]
    embedding = model.get_input_embeddings()
    if isinstance(embedding, NewTokenEmbedding):
        return embedding.new_rows
    if not token_ids:
        embedding.weight.requires_grad_(False)
        return None
    replacement = NewTokenEmbedding(embedding, token_ids)
    model.set_input_embeddings(replacement)
    return replacement.new_rows


def attach_new_head_rows(model: PreTrainedModel) -> nn.Parameter | None:
    """Freezes `lm_head` and makes its rows of `<image_start>` and `<image_end>` trainable on their own.

    Args:
        model: a MetaMorph model.

    Returns:
        The new parameter [2, hidden]. None when the model has no such tokens, or when the head is tied to the
        embedding table: then the rows of [`attach_new_token_rows`] serve both.
    """
    config, head = model.config, model.get_output_embeddings()
    token_ids = [i for i in (config.image_start_token_id, config.image_end_token_id) if i is not None]
    if isinstance(head, NewTokenHead):
        return head.new_rows
    if not token_ids or config.tie_word_embeddings:
        return None
    replacement = NewTokenHead(head, token_ids)
    model.set_output_embeddings(replacement)
    return replacement.new_rows


@torch.no_grad()
def merge_new_token_rows(model: PreTrainedModel) -> None:
    """Writes the trained rows into their tables and restores the plain ones. Without effect if none are attached."""
    head = model.get_output_embeddings()
    if isinstance(head, NewTokenHead):
        head.head.weight[head.token_ids] = head.new_rows.to(head.weight.dtype)
        model.set_output_embeddings(head.head)
    embedding = model.get_input_embeddings()
    if isinstance(embedding, NewTokenEmbedding):
        table = embedding.table
        table.weight[embedding.token_ids] = embedding.new_rows.to(table.weight.dtype)
        model.set_input_embeddings(table)


@torch.no_grad()
def add_token_rows(language_model: PreTrainedModel, num_tokens: int, new_ids: list[int]) -> None:
    """Grows the vocabulary to `num_tokens` and starts new rows at the mean of the known ones.

    New are `new_ids`, and all rows by which the table grows. Tables that are large enough (Qwen pads them) keep their
    size.

    Args:
        language_model: a causal language model, changed in place (input and output table).
        num_tokens: size of the tokenizer.
        new_ids: ids of the tokens that the language model has never seen.
    """
    size = language_model.get_input_embeddings().weight.shape[0]
    if num_tokens > size:
        language_model.resize_token_embeddings(num_tokens, mean_resizing=False)
    new = sorted({*new_ids, *range(size, num_tokens)})
    if not new:
        return
    for table in {language_model.get_input_embeddings().weight, language_model.get_output_embeddings().weight}:
        table[new] = table[: new[0]].float().mean(dim=0).to(table.dtype)
