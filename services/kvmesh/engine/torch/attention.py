"""Attention over paged K and V with torch alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kvmesh.engine.torch.paged_kv import KvShape
from kvmesh.engine.torch.plan import PrefillSlice


def attend_prefill(
    shape: KvShape,
    blocks: torch.Tensor,
    q: torch.Tensor,
    piece: PrefillSlice,
    mask: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """One slice over its sequence; `blocks` is one layer of the pool.

    `mask`: what each row may see, [group * rows, length] bool (`slice_mask`). None: where
    nothing precedes the slice, and on a CPU, whose kernel needs none.

    K and V are gathered once for all rows of the slice, so at 128 rows and
    more the copy is a few per cent of the attention.
    """
    gathered = blocks.index_select(0, piece.blocks).permute(1, 2, 0, 3, 4)
    k, v = gathered.reshape(2, 1, shape.kv_heads, -1, shape.head_size)[:, :, :, : piece.length]
    queries = q[piece.begin : piece.end].view(1, -1, shape.heads, shape.head_size)
    if not piece.start:
        attended = F.scaled_dot_product_attention(
            queries.transpose(1, 2), k, v, is_causal=True, enable_gqa=True
        )
    elif mask is None:
        attended = _attend_after(shape, queries, k, v, piece.start)
    else:
        attended = F.scaled_dot_product_attention(_grouped(shape, queries), k, v, attn_mask=mask)
        attended = attended.reshape(1, shape.heads, -1, shape.head_size)
    out[piece.begin : piece.end] = attended[0].transpose(0, 1).flatten(1)


def slice_mask(shape: KvShape, piece: PrefillSlice, device: torch.device) -> torch.Tensor | None:
    """What the rows of a slice may see, once for each head that shares K and V."""
    if not piece.start:
        return None
    rows = piece.end - piece.begin
    mask = torch.ones(rows, piece.length, dtype=torch.bool, device=device).tril_(piece.start)
    return mask.repeat(shape.heads // shape.kv_heads, 1)


def attend_decode(
    shape: KvShape, blocks: torch.Tensor, q: torch.Tensor, tables: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Single rows [b, heads * head size], each over its sequence; `blocks` is one layer.

    `tables` are each row's slots, [b, blocks], padded to the longest; `bias` is 0 for those of
    their tokens that are its own and -inf for others (`row_bias`).

    Two products and a softmax: for a few rows a fused kernel has too little to share out, and
    takes two and a half times as long (H200, float32, 8 rows of 1,024 tokens).
    """
    # [b, blocks, 2, kv heads, block tokens, head size], tokens brought together.
    gathered = blocks[tables].permute(2, 0, 3, 1, 4, 5)
    k, v = gathered.reshape(2, len(tables), shape.kv_heads, -1, shape.head_size)
    # Heads that share K and V as rows: nothing has to be repeated.
    queries = q.view(len(tables), shape.kv_heads, -1, shape.head_size) * shape.head_size**-0.5
    shares = (torch.matmul(queries, k.transpose(-1, -2)).float() + bias).softmax(-1)
    return torch.matmul(shares.to(v.dtype), v).flatten(1)


def row_bias(lengths: torch.Tensor, tokens: int) -> torch.Tensor:
    """What is added to a row's scores: [b, 1, 1, tokens] float32, for `lengths` [b]."""
    seen = torch.arange(tokens, device=lengths.device) < lengths[:, None]
    bias = torch.zeros(seen.shape, dtype=torch.float32, device=lengths.device)
    return bias.masked_fill_(~seen, float("-inf"))[:, None, None]


def _grouped(shape: KvShape, queries: torch.Tensor) -> torch.Tensor:
    """[1, rows, heads, d] to [1, kv heads, group * rows, d]: heads that share K and V as
    further rows, so that nothing has to be repeated."""
    rows = queries.shape[1]
    grouped = queries.view(1, rows, shape.kv_heads, -1, shape.head_size).permute(0, 2, 3, 1, 4)
    return grouped.reshape(1, shape.kv_heads, -1, shape.head_size)


def _attend_after(
    shape: KvShape, queries: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int
) -> torch.Tensor:
    """Rows that follow `start` tokens: [1, rows, heads, d] to [1, heads, rows, d].

    Over what precedes them without a mask, over one another causally, and the two
    merged by their log-sum-exp (Dao et al., arXiv:2205.14135). With one mask over
    all, the kernel computes what the mask then takes away, and the mask costs as
    much again: 5 to 50 % slower at 128 to 512 rows after 512 to 1,536 tokens.
    """
    rows, size = queries.shape[1], shape.head_size
    group = shape.heads // shape.kv_heads
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    grouped = _grouped(shape, queries)
    before, before_sum = attend(grouped, k[:, :, :start], v[:, :, :start])
    own_k, own_v = (
        kv[:, :, None, start:].expand(-1, -1, group, -1, -1).reshape(1, shape.heads, rows, size)
        for kv in (k, v)
    )
    rows_of_heads = grouped.reshape(1, shape.heads, rows, size)
    own, own_sum = attend(rows_of_heads, own_k, own_v, is_causal=True)
    share = torch.sigmoid(before_sum.reshape(own_sum.shape) - own_sum).to(own.dtype)
    merged: torch.Tensor = torch.lerp(own, before.reshape(own.shape), share[..., None])
    return merged
