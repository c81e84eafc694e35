"""Real models in small: what exactness is checked on, and how to make each, its batches and its blocks.

Activations are large enough that a session does not keep them for being small (`min_nbytes`), and small enough that a
step takes milliseconds. Every model is in train mode, with dropout on wherever it has any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer
from transformers.models.t5.modeling_t5 import T5Block

import gpt
import nets
from helpers import seeded

Batch = dict[str, Any]
VOCABULARY = 96


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        name: what the tests call it.
        make: builds the model from the global random state.
        batch: the batch of a seed, made without touching the global random state.
        blocks: what `PerModule` takes: classes, or names with wildcards.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    blocks: tuple[type[nn.Module] | str, ...]

    def __repr__(self) -> str:
        return self.name


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of one forward pass: what the model returns, or its field of that name."""
    result = model(**batch)
    loss: Tensor = result if isinstance(result, Tensor) else result.loss
    return loss


def tokens(seed: int, batch: int = 2, length: int = 32, vocabulary: int = VOCABULARY) -> Tensor:
    """Random tokens."""
    return torch.randint(vocabulary, (batch, length), generator=seeded(seed))


def images(seed: int, batch: int, size: int) -> Tensor:
    """Random images."""
    return torch.randn(batch, 3, size, size, generator=seeded(seed))


def _language(seed: int) -> Batch:
    text = tokens(seed)
    return {"input_ids": text, "labels": text, "use_cache": False}


def _masked(seed: int) -> Batch:
    text = tokens(seed)
    padding = torch.ones_like(text)
    padding[0, -5:] = 0
    return {"input_ids": text, "labels": text.masked_fill(padding == 0, -100), "attention_mask": padding}


def _translation(seed: int) -> Batch:
    return {"input_ids": tokens(seed), "labels": tokens(seed + 1000, length=24), "use_cache": False}


def _next_token(seed: int) -> Batch:
    text = tokens(seed, length=33)
    return {"tokens": text[:, :-1], "targets": text[:, 1:]}


def _classified(seed: int) -> Batch:
    return {"images": images(seed, 4, 32), "labels": tokens(seed, 4, 1, 10).flatten()}


def _segmented(seed: int) -> Batch:
    return {"images": images(seed, 2, 32), "labels": tokens(seed, 2, 32 * 32, 3).view(2, 32, 32)}


def _gpt() -> nn.Module:
    return gpt.GPT(gpt.GPTConfig(vocabulary=VOCABULARY, context=32, layers=3, heads=2, width=32))


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=32, n_layer=3, n_head=2, n_embd=32, bos_token_id=0, eos_token_id=0
        )
    )


def _llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=80,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            attention_dropout=0.1,
        )
    )


def _bert() -> nn.Module:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=32,
        )
    )


def _vit() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            num_labels=10,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
        )
    )


def _vit_batch(seed: int) -> Batch:
    return {"pixel_values": images(seed, 4, 32), "labels": tokens(seed, 4, 1, 10).flatten()}


def _t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        )
    )


def _mixtral(experts: str) -> nn.Module:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=64,
            attention_dropout=0.1,
            router_jitter_noise=0.01,
            output_router_logits=True,
            experts_implementation=experts,
        )
    )


ZOO = (
    Entry("gpt", _gpt, _next_token, (gpt.Block,)),
    Entry("gpt2", _gpt2, _language, (GPT2Block,)),
    Entry("llama", _llama, _language, (LlamaDecoderLayer,)),
    Entry("bert", _bert, _masked, (BertLayer,)),
    Entry("vit", _vit, _vit_batch, ("vit.layers.*",)),
    Entry("t5", _t5, _translation, (T5Block,)),
    Entry("mixtral", lambda: _mixtral("eager"), _language, (MixtralDecoderLayer,)),
    Entry("mixtral-grouped", lambda: _mixtral("grouped_mm"), _language, (MixtralDecoderLayer,)),
    Entry("resnet", lambda: nets.ResNet((1, 2, 1), width=8, classes=10), _classified, (nets.Bottleneck,)),
    Entry("unet", nets.UNet, _segmented, (nets.DoubleConv,)),
    Entry("lstm", lambda: nets.LSTM(VOCABULARY), _next_token, (nn.LSTM,)),
)
