"""Latent attention as a torch module for transformers' decoder layers. Only latents are cached.

Cache layout, one tensor per layer of shape (batch, 1, tokens, P + R): the rotated shared key, then the latent.
Keys are read from its first P + k_rank columns and values from its last v_rank, so an absorbed decode step is
one multi-query attention over views of the cache: nothing is rebuilt and nothing is copied.

What is cached is linear in the features of the input (care.types). Where the source normalizes its keys, a token's
own keys are computed once, normalized, and then projected into its cache entry; they are not cached.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache

from ..kernels import Cached
from ..rope import rotate_half_split, rotate_interleaved, rotation
from .kernel_choice import kernel_fits
from .shape import LatentShape


class BlockNorm(nn.Module):
    """RMSNorm over blocks of the last dim, one head or all of them; fp32 inside."""

    def __init__(self, size: int, eps: float, offset: float) -> None:
        super().__init__()
        self.eps = eps
        self.offset = offset
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape in and out."""
        blocks = x.float().unflatten(-1, (-1, len(self.weight)))
        blocks = blocks * torch.rsqrt(blocks.square().mean(-1, keepdim=True) + self.eps)
        return (blocks * (self.weight.float() + self.offset)).flatten(-2).type_as(x)


def capped_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, shape: LatentShape, *, causal: bool
) -> Tensor:
    """Attention (B, H, T, V) whose scores are softcap * tanh(score / softcap); a mask is Boolean or additive."""
    assert shape.softcap is not None
    group = query.shape[1] // keys.shape[1]
    scores = query @ keys.repeat_interleave(group, 1).mT * shape.scale
    scores = shape.softcap * (scores / shape.softcap).tanh()
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1, dtype=torch.float32).type_as(values) @ values.repeat_interleave(group, 1)


class LatentAttentionModule(nn.Module):
    """One attention layer in either mode, with the call signature of transformers' attention modules.

    Prefill expands the latent to per-head keys and values; a decode step of an absorbed layer never does.
    """

    def __init__(self, shape: LatentShape, layer_idx: int) -> None:
        super().__init__()
        s = shape
        self.shape = shape
        self.layer_idx = layer_idx
        self._table: Tensor | None = None
        self.q_proj = nn.Linear(s.hidden_size, s.num_heads * s.head_dim, bias=s.qkv_bias)
        if s.qk_norm is not None:
            self.q_norm = BlockNorm(s.qk_norm.query_size, s.qk_norm.eps, s.qk_norm.offset)
            self.k_proj = nn.Linear(s.hidden_size, s.num_kv_heads * s.head_dim, bias=s.qkv_bias)
            self.k_norm = BlockNorm(s.qk_norm.key_size, s.qk_norm.eps, s.qk_norm.offset)
        if s.mode == "absorbed":
            self.q_head_map = nn.Parameter(torch.zeros(s.num_heads, s.nope_dim + s.rope_dim, s.head_dim))
        self.kv_a_proj_with_mqa = nn.Linear(s.feature_size, s.kv_lora_rank + s.rope_dim, bias=s.qkv_bias)
        if s.key_rank:
            self.k_b_proj = nn.Linear(s.key_rank, s.num_kv_heads * s.nope_dim, bias=False)
        self.v_b_proj = nn.Linear(s.value_rank, s.num_kv_heads * s.v_head_dim, bias=False)
        self.o_proj = nn.Linear(s.num_heads * s.v_head_dim, s.hidden_size, bias=s.out_bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **_: Any,  # noqa: ANN401 - arguments for other attention classes
    ) -> tuple[Tensor, None]:
        """Hidden states (B, T, D) to attention output (B, T, D).

        transformers 5.24 renamed `past_key_values` to `cache`; both are taken. `position_embeddings` are
        the source's and are not used: each layer carries its own frequencies.
        """
        cache = past_key_values if cache is None else cache
        positions, key_positions = self._positions(hidden_states, position_ids, cache)
        q_BHTK = self._source_queries(hidden_states)
        entry_B1TC = self._cache_entry(hidden_states, positions)
        if cache is not None:
            # Everything is in one tensor; the cache's second one stays empty.
            entry_B1TC, _empty = cache.update(entry_B1TC, entry_B1TC[..., :0], self.layer_idx)
        if self.shape.mode == "rebuild":
            q_BHTK = rotate_half_split(q_BHTK, *self._angles(positions, q_BHTK))
            mixed_BHTV = self._rebuild(q_BHTK, entry_B1TC, key_positions, attention_mask)
        else:
            q_nope, q_rope = self._split_queries(q_BHTK, positions)
            attend = self._absorbed if q_BHTK.shape[2] == 1 else self._expanded
            mixed_BHTV = attend(q_nope, q_rope, entry_B1TC, attention_mask)
        return self.o_proj(mixed_BHTV.transpose(1, 2).flatten(2)), None

    def _source_queries(self, hidden_states: Tensor) -> Tensor:
        """The source's query heads before RoPE: (B, H, T, K)."""
        q_BTE = self.q_proj(hidden_states)
        return self._heads(q_BTE if self.shape.qk_norm is None else self.q_norm(q_BTE), self.shape.num_heads)

    def _split_queries(self, q_BHTK: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """No-rope queries (B, H, T, N) and rotated ones (B, H, T, P) of an absorbed layer."""
        q_BHTQ = torch.einsum("hqk,bhtk->bhtq", self.q_head_map, q_BHTK)
        q_nope, q_rope = q_BHTQ.split([self.shape.nope_dim, self.shape.rope_dim], dim=-1)
        return q_nope, rotate_interleaved(q_rope, *self._angles(positions, q_rope))

    def _positions(self, x_BTD: Tensor, position_ids: Tensor | None, cache: Cache | None) -> tuple[Tensor, Tensor]:
        """Positions (B or 1, tokens) of the queries and of all keys, cached ones included.

        Only rebuilt keys need the latter. A padded batch does not tell where cached tokens stood, but slots
        of the cache are as far apart as the tokens in them, and distances are all that RoPE sees.
        """
        T = x_BTD.shape[1]
        if cache is None or self.shape.mode == "absorbed":
            own = torch.arange(T, device=x_BTD.device)[None] if position_ids is None else position_ids
            return own, own
        num_cached = int(cache.get_seq_length(self.layer_idx))
        num_keys, first_key = cache.get_mask_sizes(T, self.layer_idx)
        queries = torch.arange(num_cached, num_cached + T, device=x_BTD.device)
        return queries[None], torch.arange(first_key, first_key + num_keys, device=x_BTD.device)[None]

    def _angles(self, positions_BT: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B or 1, 1, T, F), computed in fp32 as transformers does."""
        cos, sin = rotation(positions_BT[:, None], self._frequencies(like.device))
        return cos.to(like.dtype), sin.to(like.dtype)

    def _frequencies(self, device: torch.device) -> Tensor:
        """The table on a device; made once, as a GPU would stop for it at every call."""
        if self._table is None or self._table.device != device:
            self._table = torch.tensor(self.shape.frequencies, dtype=torch.float32, device=device)
        return self._table

    def _heads(self, x_BTE: Tensor, num_heads: int) -> Tensor:
        return x_BTE.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    def _cache_entry(self, hidden_states: Tensor, positions: Tensor) -> Tensor:
        """What a token leaves in the cache: (B, 1, T, P + R)."""
        phi = hidden_states
        if self.shape.qk_norm is not None:
            phi = torch.cat((self.k_norm(self.k_proj(hidden_states)), hidden_states), dim=-1)
        latent, key = self.kv_a_proj_with_mqa(phi).split([self.shape.kv_lora_rank, self.shape.rope_dim], -1)
        if not self.shape.rope_dim:
            return latent[:, None]
        key = rotate_interleaved(key[:, None], *self._angles(positions, key))
        return torch.cat((key, latent[:, None]), dim=-1)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, entry_B1UC: Tensor, mask: Tensor | None) -> Tensor:
        """One new token attends to the cache as it lies: heads become queries of a single key head."""
        if kernel_fits(self.shape, entry_B1UC, mask):
            return self._head_values(self._decode(self._absorbed_queries(q_nope), q_rope, entry_B1UC))
        query = self._latent_queries(q_nope, q_rope)
        keys = entry_B1UC[..., : self.shape.rope_dim + self.shape.key_rank]
        values = entry_B1UC[..., entry_B1UC.shape[-1] - self.shape.value_rank :]
        mixed_B1HR = self._weigh(query.transpose(1, 2), keys, values, mask)
        return self._head_values(mixed_B1HR.transpose(1, 2))

    def _decode(self, q_latent: Tensor, q_rope: Tensor, entry_B1UC: Tensor) -> Tensor:
        """Means of latents (B, H, 1, R), by the kernel."""
        from ..kernels.decode import decode  # noqa: PLC0415 - needs Triton

        B, _, U, _ = entry_B1UC.shape
        lengths_B = torch.full((B,), U, dtype=torch.int32, device=entry_B1UC.device)
        cached = Cached(entry_B1UC[:, 0], lengths_B, self.shape.kv_lora_rank, rope_first=True)
        return decode(q_latent[:, :, 0], q_rope[:, :, 0].contiguous(), cached, self.shape.scale)[:, :, None]

    def _latent_queries(self, q_nope: Tensor, q_rope: Tensor) -> Tensor:
        """Queries of the cache itself: (B, H, T, P + k_rank), as its first columns lie."""
        return torch.cat((q_rope, self._absorbed_queries(q_nope)), dim=-1) if self.shape.key_rank else q_rope

    def _absorbed_queries(self, q_nope: Tensor) -> Tensor:
        """Queries of the latent: (B, H, T, k_rank)."""
        B, H, T, _ = q_nope.shape
        k_up_GNR = self.k_b_proj.weight.view(self.shape.num_kv_heads, self.shape.nope_dim, -1)
        q_BGAN = q_nope.reshape(B, self.shape.num_kv_heads, -1, self.shape.nope_dim)
        return torch.einsum("bgan,gnr->bgar", q_BGAN, k_up_GNR).reshape(B, H, T, -1)

    def _head_values(self, mixed_BHTR: Tensor) -> Tensor:
        """Each head's mixture of latents, as wide as v_rank, as values: (B, H, T, V)."""
        B, H, T, R = mixed_BHTR.shape
        v_up_GVR = self.v_b_proj.weight.view(self.shape.num_kv_heads, self.shape.v_head_dim, R)
        mixed_BGAR = mixed_BHTR.reshape(B, self.shape.num_kv_heads, -1, R)
        return torch.einsum("bgar,gvr->bgav", mixed_BGAR, v_up_GVR).reshape(B, H, T, -1)

    def _expanded(self, q_nope: Tensor, q_rope: Tensor, entry_B1UC: Tensor, mask: Tensor | None) -> Tensor:
        """Prefill: per-head no-rope keys and values, computed once for many queries."""
        key_rope = entry_B1UC[..., : self.shape.rope_dim].expand(-1, self.shape.num_kv_heads, -1, -1)
        if not self.shape.key_rank:
            return self._attend(q_rope, key_rope, entry_B1UC, mask)
        keys = torch.cat((key_rope, self._no_rope_keys(entry_B1UC)), dim=-1)
        return self._attend(torch.cat((q_rope, q_nope), dim=-1), keys, entry_B1UC, mask)

    def _rebuild(self, q_BHTK: Tensor, entry_B1UC: Tensor, key_positions: Tensor, mask: Tensor | None) -> Tensor:
        """Rebuild every cached key, rotate it at its position, attend as the source does."""
        keys = self._no_rope_keys(entry_B1UC)
        keys = rotate_half_split(keys, *self._angles(key_positions, keys))
        return self._attend(q_BHTK, keys, entry_B1UC, mask)

    def _no_rope_keys(self, entry_B1UC: Tensor) -> Tensor:
        first = self.shape.rope_dim
        latent = entry_B1UC[:, 0, :, first : first + self.shape.key_rank]
        return self._heads(self.k_b_proj(latent), self.shape.num_kv_heads)

    def _attend(self, query: Tensor, keys: Tensor, entry_B1UC: Tensor, mask: Tensor | None) -> Tensor:
        latent = entry_B1UC[:, 0, :, entry_B1UC.shape[-1] - self.shape.value_rank :]
        values = self._heads(self.v_b_proj(latent), self.shape.num_kv_heads)
        # Fused kernels want values as wide as keys; the alternative materializes all scores.
        values = functional.pad(values, (0, max(query.shape[-1] - self.shape.v_head_dim, 0)))
        causal = mask is None and query.shape[2] > 1
        return self._weigh(query, keys, values, mask, causal=causal)[..., : self.shape.v_head_dim]

    def _weigh(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *, causal: bool = False
    ) -> Tensor:
        """Attention by torch's kernels, or written out where scores are capped, which no kernel does."""
        if self.shape.softcap is not None:
            return capped_attention(query, keys, values, mask, self.shape, causal=causal)
        return functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=causal, scale=self.shape.scale,
            enable_gqa=query.shape[1] != keys.shape[1],
        )  # fmt: skip
