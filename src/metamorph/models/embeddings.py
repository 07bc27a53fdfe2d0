"""Embedding rows of the new tokens: adding them, and training nothing else of the tables in stage 1.

Stage 1 must leave the language model bit-identical but needs embeddings for `<image_start>` and `<image_end>`. Masking
the gradient of the full table would still allocate gradient and optimizer state for it (4 GB for Llama-3 8B), and
weight decay could move frozen rows. A separate small parameter has none of these problems.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedConfig, PreTrainedModel

from metamorph.models.sequence.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN

from .text_head import LogitsTransform, TextHead, TextLossOptions


NEW_TOKENS = (DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN)
"""In the order in which they are added to a tokenizer, and of the rows in a connector file."""


class NewRows(nn.Module):
    """Base of modules with a frozen table [V, H] whose rows `token_ids` are replaced by the parameter `new_rows`.

    The table keeps its parameter name (`weight`), so checkpoints and tied heads see no difference.
    """

    token_ids: Tensor
    weight: Tensor
    new_rows: nn.Parameter

    def _replace_rows(self, plain: nn.Embedding | nn.Linear, token_ids: list[int]) -> None:
        self.weight = plain.weight.requires_grad_(False)
        self.new_rows = nn.Parameter(plain.weight.detach()[token_ids].clone())  # (new tokens, hidden)
        # Weights of an outline come later, but no engine sends its buffers.
        device = "cpu" if plain.weight.is_meta else plain.weight.device
        self.register_buffer("token_ids", torch.tensor(token_ids, device=device), persistent=False)
        # The table itself is a parameter of this module only. An engine that shards it could not free it otherwise.
        plain.weight = nn.Parameter(torch.empty_like(plain.weight, device="meta"), requires_grad=False)
        self._plain = (plain,)  # in a tuple, so it is not a submodule

    @property
    def plain(self) -> nn.Module:
        """The module without new rows."""
        return self._plain[0]

    def replace_logits(self, logits: Tensor, hidden_states: Tensor, bias: Tensor | None) -> Tensor:
        """Recompute the new tokens' [..., V] logits from the new rows."""
        bias = None if bias is None else bias[self.token_ids]
        new = nn.functional.linear(hidden_states, self.new_rows.to(hidden_states.dtype), bias)
        return logits.index_copy(-1, self.token_ids, new.to(logits.dtype))

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Write the new rows into the table of the plain module and return it."""
        plain: Any = self.plain
        plain.weight = self.weight
        plain.weight[self.token_ids] = self.new_rows.to(plain.weight.dtype)
        return plain


class NewTokenEmbedding(NewRows):
    """An embedding table with trainable new rows; `table` may be a subclass that scales its output (Gemma)."""

    def __init__(self, table: nn.Embedding, token_ids: list[int]):
        super().__init__()
        self._replace_rows(table, token_ids)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[batch, sequence] -> [batch, sequence, hidden]."""
        is_new = input_ids.unsqueeze(-1).eq(self.token_ids)  # (batch, seq, new tokens)
        rows = self.new_rows[is_new.int().argmax(dim=-1)] * getattr(self.plain, "embed_scale", 1.0)
        # Engines that shard weights gather those of this module, so the table is called with them.
        plain = functional_call(self.plain, {"weight": self.weight}, (input_ids,))
        return torch.where(is_new.any(dim=-1, keepdim=True), rows.to(plain.dtype), plain)


class NewTokenHead(NewRows, TextHead):
    """An `lm_head` with trainable new rows, for LoRA.

    The head is frozen then, but the rows of the new tokens start at the mean of all rows: without training them, the
    model would hardly ever choose `<image_start>`.
    """

    def __init__(self, head: nn.Linear, token_ids: list[int]):
        super().__init__(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        self._replace_rows(head, token_ids)
        self.bias = head.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def forward(
        self,
        hidden_states: Tensor,
        labels: Tensor | None = None,
        options: TextLossOptions | None = None,
        transform: LogitsTransform | None = None,
        transform_weights: tuple[nn.Parameter, ...] = (),
    ) -> Tensor:
        """See [`TextHead.forward`]."""

        def replace(logits: Tensor, hidden: Tensor) -> Tensor:
            logits = self.replace_logits(logits, hidden, self.bias)
            return logits if transform is None or labels is None else transform(logits, hidden)

        if labels is None:
            return replace(super().forward(hidden_states), hidden_states)
        return super().forward(hidden_states, labels, options, replace, (self.new_rows, *transform_weights))


def attach_new_token_rows(model: PreTrainedModel) -> nn.Parameter | None:
    """Freeze the embedding table of a MetaMorph model, except its rows of `<image_start>` and `<image_end>`.

    Returns these rows [2, hidden], or None without such tokens (`mm_use_im_start_end=False`).
    """
    embedding, token_ids = model.get_input_embeddings(), [*new_token_ids(model.config).values()]
    if not isinstance(embedding, NewTokenEmbedding):
        if not token_ids:
            embedding.weight.requires_grad_(False)
            return None
        embedding = NewTokenEmbedding(embedding, token_ids)
        model.set_input_embeddings(embedding)
    return embedding.new_rows


def attach_new_head_rows(model: PreTrainedModel) -> nn.Parameter | None:
    """Freeze `lm_head` of a MetaMorph model, except its rows of `<image_start>` and `<image_end>`.

    Returns these rows [2, hidden], or None without such tokens, and for a head that is tied to the embedding table:
    the rows of [`attach_new_token_rows`] serve both.
    """
    head, token_ids = model.get_output_embeddings(), list(new_token_ids(model.config).values())
    if not isinstance(head, NewTokenHead):
        if not token_ids or model.config.tie_word_embeddings:
            return None
        head = NewTokenHead(head, token_ids)
        model.set_output_embeddings(head)
    return head.new_rows


def merge_new_token_rows(model: PreTrainedModel) -> None:
    """Write trained rows into their tables and restore the plain modules, if any rows are attached."""
    if isinstance(head := model.get_output_embeddings(), NewTokenHead):
        model.set_output_embeddings(head.merge())
    if isinstance(embedding := model.get_input_embeddings(), NewTokenEmbedding):
        model.set_input_embeddings(embedding.merge())


def new_token_ids(config: PreTrainedConfig) -> dict[str, int]:
    """The ids of `NEW_TOKENS`; none with `mm_use_im_start_end=False`."""
    ids = zip(NEW_TOKENS, (config.image_start_token_id, config.image_end_token_id), strict=True)
    return {token: number for token, number in ids if number is not None}


@torch.no_grad()
def add_token_rows(language_model: PreTrainedModel, num_tokens: int, new_ids: list[int]) -> None:
    """Grow the vocabulary to `num_tokens`, and start the rows of new tokens at the mean of the known rows.

    New are `new_ids`, the tokens that the language model has never seen, and all rows added here. Tables that are
    large enough already (Qwen pads them) keep their size.
    """
    size = language_model.get_input_embeddings().weight.shape[0]
    if num_tokens > size:
        language_model.resize_token_embeddings(num_tokens, mean_resizing=False)
    new = sorted({*new_ids, *range(size, num_tokens)})
    if not new:
        return
    for table in {language_model.get_input_embeddings().weight, language_model.get_output_embeddings().weight}:
        table[new] = table[: new[0]].float().mean(dim=0).to(table.dtype)
