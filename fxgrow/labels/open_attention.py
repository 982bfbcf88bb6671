"""``nn.MultiheadAttention`` in the open, so that its heads are literal sizes in a graph."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fxgrow.errors import TraceError


@fx.wrap
def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a mask adds to scores: -inf where it is of truth values and one is set.

    One node of a graph, for while tracing nobody knows what a mask is of.
    """
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def open_attention(module: nn.MultiheadAttention) -> None:
    """Let a module compute what it did in the open, in place.

    Its dropout becomes a module, so that a graph of it is the same in train and eval mode.
    """
    module.__class__ = OpenAttention
    if module.dropout > 0:
        module.drop = nn.Dropout(module.dropout).train(module.training)


class OpenAttention(nn.MultiheadAttention):
    """:class:`torch.nn.MultiheadAttention` for tracing, of batches.

    Source: the same computation as ``torch.nn.functional.multi_head_attention_forward``.
    """

    drop: nn.Dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the mixed values, and the attention weights if they are needed."""
        if is_causal and attn_mask is None:
            raise TraceError("nn.MultiheadAttention that is causal needs an attn_mask")
        q, k, v = self._projected(query, key, value)
        masks = [
            None if mask is None else added(mask, q.dtype) for mask in (attn_mask, key_padding_mask)
        ]
        if self.bias_k is not None or self.add_zero_attn:
            more = (self.bias_k is not None) + self.add_zero_attn
            masks = [None if mask is None else functional.pad(mask, (0, more)) for mask in masks]
        mask, padding = masks
        scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
        scores = _masked(scores, mask, padding, self.num_heads)
        scores = functional.softmax(scores, dim=-1)
        kept = self.drop(scores) if self.dropout > 0 else functional.dropout(scores, 0.0, False)
        mixed = kept @ v
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        out = out if self.batch_first else out.transpose(0, 1)
        if not need_weights:
            return out, None
        return out, scores.mean(1) if average_attn_weights else scores

    def _projected(self, *inputs: Tensor) -> list[Tensor]:
        """Return queries, keys and values by head: (batch, heads, length, width of a head)."""
        separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = separate if self.in_proj_weight is None else self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        learned = (None, self.bias_k, self.bias_v)
        found = []
        if not self.batch_first:
            inputs = tuple(x.transpose(0, 1) for x in inputs)
        for i, x in enumerate(inputs):  # chunks of what is traced cannot be iterated over
            made = functional.linear(x, weights[i], biases[i])
            last = learned[i]
            if last is not None:
                made = torch.cat((made, last.expand(made.shape[0], -1, -1)), 1)
            made = torch.unflatten(made, -1, (self.num_heads, self.head_dim)).transpose(1, 2)
            if self.add_zero_attn and i:
                made = functional.pad(made, (0, 0, 0, 1))
            found.append(made)
        return found


def _masked(scores: Tensor, mask: Tensor | None, padding: Tensor | None, heads: int) -> Tensor:
    """Return scores with what is added to them.

    Args:
        scores: (batch, heads, queries, keys).
        mask: (queries, keys), or (batch · heads, queries, keys).
        padding: (batch, keys).
        heads: their number.
    """
    if mask is not None:  # either shape fits where batch and heads are one dim
        scores = torch.unflatten(scores.flatten(0, 1) + mask, 0, (-1, heads))
    if padding is not None:
        scores = scores + padding.unsqueeze(1).unsqueeze(1)
    return scores
