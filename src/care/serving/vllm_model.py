"""The native format in vLLM: the body is vLLM's Llama, attention is the absorbed form over vLLM's paged cache.

A layer's cache has one entry per token, as in care.modeling.attention: the rotated shared key, then the latent. vLLM
allocates pages by layer, so entries of different widths are not padded to one another. A query is as wide as an entry
and an entry is key and value at once: prefill, chunks of it and decode are one multi-query attention over pages.
"""

# vLLM is not installed where this is checked.
# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import WeightsMapper, extract_layer_index
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import MLAAttentionSpec

from ..architectures import architecture_for
from ..errors import InvalidRecipe
from ..formats.native import MODEL_TYPE_PREFIX
from ..modeling.attention import LatentAttentionModule
from ..modeling.native import layer_shapes

QUERY_BLOCK = 256
"""Queries of one request that are weighed at once in prefill: bounds the mask, and skips keys behind the last one."""


@dataclass
class LatentMetadata(AttentionMetadata):
    """Where the tokens of a batch lie: ends of queries and lengths by request, pages by request, slots by token."""

    query_starts: list[int]
    lengths: list[int]
    pages: Tensor
    slots: Tensor


class LatentMetadataBuilder(AttentionMetadataBuilder[LatentMetadata]):
    """The same for layers of every width."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, **_: Any) -> LatentMetadata:
        """What vLLM's scheduler decided, as lists: requests are looped over."""
        common = common_attn_metadata
        return LatentMetadata(
            query_starts=common.query_start_loc_cpu.tolist(),
            lengths=common.seq_lens.tolist(),
            pages=common.block_table_tensor,
            slots=common.slot_mapping,
        )


def attend(query_THC: Tensor, entries_UC: Tensor, scale: float, window: int | None) -> Tensor:
    """The last T of U tokens attend to all before them: (T, H, C) in and out, entries are keys and values."""
    T, H, C = query_THC.shape
    first = len(entries_UC) - T
    mixed_THC = torch.empty_like(query_THC)
    for start in range(0, T, QUERY_BLOCK):
        block = query_THC[start : start + QUERY_BLOCK]
        last = first + start + len(block)
        since = 0 if window is None else max(0, first + start + 1 - window)
        seen = entries_UC[since:last]
        if len(block) == 1:
            # Heads are as good as tokens here, and the entries are read once for all of them.
            keys = seen[None, None]
            mixed_THC[start] = functional.scaled_dot_product_attention(block[None], keys, keys, scale=scale)[0, 0]
            continue
        shape = (1, H, len(seen), C)
        keys = seen.expand(shape)
        ones = torch.ones(len(block), len(seen), dtype=torch.bool, device=seen.device)
        mask = ones.tril(first + start - since)
        if window is not None:
            mask &= ones.triu(first + start - since - window + 1)
        mixed = functional.scaled_dot_product_attention(
            block.transpose(0, 1)[None], keys, keys, attn_mask=mask, scale=scale
        )
        mixed_THC[start : start + len(block)] = mixed[0].transpose(0, 1)
    return mixed_THC


class LatentPages(AttentionImpl[LatentMetadata]):
    """Writes entries into a layer's pages and attends to them, in torch."""

    def __init__(self, num_heads: int, head_size: int, scale: float, *_: Any, window: int | None) -> None:
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = num_heads, head_size, scale, 1
        self.window = window

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: LatentMetadata | None,
        output: Tensor,
        **_: Any,
    ) -> Tensor:
        """Queries (T, H, C) and entries (T, 1, C) of all requests to mixtures (T, H, C), in `output`."""
        if attn_metadata is None:
            return output.zero_()  # vLLM measures memory before there is a cache
        starts, num_tokens = attn_metadata.query_starts, attn_metadata.query_starts[-1]
        page = kv_cache.shape[2]
        slots = attn_metadata.slots[:num_tokens].long()
        kv_cache[slots // page, 0, slots % page] = key[:num_tokens, 0]
        for index, (start, stop) in enumerate(pairwise(starts)):
            if stop == start:
                continue
            length = attn_metadata.lengths[index]
            pages = attn_metadata.pages[index, : -(-length // page)]
            entries_UC = kv_cache.index_select(0, pages).view(-1, self.head_size)[:length]
            output[start:stop] = attend(query[start:stop], entries_UC, self.scale, self.window)
        return output


class LatentBackend(AttentionBackend):
    """Names the parts above to vLLM."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]

    @staticmethod
    def get_name() -> str:
        """vLLM's name for backends that are not its own."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[LatentPages]:
        """Attention over pages."""
        return LatentPages

    @staticmethod
    def get_builder_cls() -> type[LatentMetadataBuilder]:
        """What it needs to know of a batch."""
        return LatentMetadataBuilder


class LatentCache(Attention):
    """vLLM's attention layer over entries of one layer's width."""

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> MLAAttentionSpec:
        """One entry per token and no second tensor; windows hide tokens, they free none."""
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size, num_kv_heads=1, head_size=self.head_size,
            dtype=self.kv_cache_torch_dtype,
        )  # fmt: skip


class VllmLatentAttention(LatentAttentionModule):
    """A native layer's own module with vLLM's cache in the place of transformers'."""

    def __init__(self, config: Any, cache_config: Any, prefix: str, **_: Any) -> None:
        index = extract_layer_index(prefix)
        super().__init__(layer_shapes(config)[index], index)
        source = {**config.to_dict(), "model_type": config.model_type.removeprefix(MODEL_TYPE_PREFIX)}
        windows = architecture_for(source).spec(source).windows
        s = self.shape
        self.attn = LatentCache(
            s.num_heads, s.rope_dim + s.kv_lora_rank, s.scale, num_kv_heads=1, cache_config=cache_config,
            attn_backend=LatentBackend, prefix=f"{prefix}.attn", window=windows[index] if windows else None,
        )  # fmt: skip

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Tokens of all requests in a row: (T, D) in and out."""
        hidden_BTD, positions_BT = hidden_states[None], positions[None]
        q_BHTC = self._latent_queries(*self._split_queries(self._source_queries(hidden_BTD), positions_BT))
        entry_TC = self._cache_entry(hidden_BTD, positions_BT)[0, 0]
        # A separate latent's last columns are values only.
        query = functional.pad(q_BHTC, (0, entry_TC.shape[-1] - q_BHTC.shape[-1]))[0].transpose(0, 1).contiguous()
        mixed = self.attn(query, entry_TC, entry_TC).view_as(query)
        mixed_BHTR = mixed[..., mixed.shape[-1] - self.shape.value_rank :].transpose(0, 1)[None]
        return self.o_proj(self._head_values(mixed_BHTR)[0].transpose(0, 1).flatten(1))


class LatentModel(LlamaModel):
    """vLLM's Llama, whose gate and up projections are one, and whose attention is not fused."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={".gate_proj": (".gate_up_proj", 0), ".up_proj": (".gate_up_proj", 1)}
    )


class LatentForCausalLM(LlamaForCausalLM):
    """A native checkpoint of any source whose body is Llama's."""

    hf_to_vllm_mapper = LatentModel.hf_to_vllm_mapper
    packed_modules_mapping: ClassVar[dict[str, Sequence[str]]] = {"gate_up_proj": ["gate_proj", "up_proj"]}
    supports_lora = False

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "", layer_type: Any = None) -> LatentModel:
        del layer_type  # the caller's default
        _check_serving(vllm_config)
        layer = partial(LlamaDecoderLayer, attn_layer_type=VllmLatentAttention)
        return LatentModel(vllm_config=vllm_config, prefix=prefix, layer_type=layer)


def _check_serving(vllm_config: VllmConfig) -> None:
    """Refuse what is asked of vLLM beside the checkpoint and has not been made exact here."""
    if vllm_config.cache_config.cache_dtype != "auto":
        raise InvalidRecipe("care's layers cache the model's own type; leave --kv-cache-dtype out")
    if vllm_config.parallel_config.world_size > 1:
        raise InvalidRecipe("care's layers run in one worker; leave --tensor-parallel-size and the like at 1")
    if vllm_config.quant_config is not None:
        raise InvalidRecipe("care's layers are not quantized; leave --quantization out")
