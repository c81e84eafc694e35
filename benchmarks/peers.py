"""What is measured: three workloads, and the ways to run a step of them: plain, PyTorch's own checkpoints, Rekindle."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.t5.modeling_t5 import T5Block

sys.path.append(str(Path(__file__).parents[1] / "examples"))
sys.path.append(str(Path(__file__).parents[1] / "tests"))
import nets
from helpers import random_states
from peak import peak_bytes


@dataclass(frozen=True)
class Workload:
    """A model in train mode, one batch, the class of the blocks that people checkpoint by hand, and the type to which
    the forward pass is cast."""

    name: str
    model: nn.Module
    batch: dict[str, Any]
    block: type[nn.Module]
    autocast: torch.dtype | None = None

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(self.model.parameters()).device

    def step(self, way: AbstractContextManager[Any]) -> Tensor:
        """One forward and backward, run in `way`. Gradients are zeroed, not freed, so that they never count."""
        self.model.zero_grad(set_to_none=False)
        with way:
            loss = self.loss()
            loss.backward()
        return loss.detach()

    def loss(self) -> Tensor:
        """One forward pass."""
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            result = self.model(**self.batch)
        loss: Tensor = result if isinstance(result, Tensor) else result.loss
        return loss  # nobody holds the logits any longer

    def peak(self, way: AbstractContextManager[Any]) -> int:
        """The most bytes a step in `way` held beyond what was there before it."""
        self.model.zero_grad(set_to_none=False)
        with self._buffers_put_back():
            return peak_bytes(lambda: self.step(way), str(self.device))

    @contextmanager
    def _buffers_put_back(self) -> Iterator[None]:
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        yield
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(before[name])

    def standing(self) -> int:
        """Bytes of what a budget counts beside what a step allocates: parameters, gradients, buffers, the batch."""
        tensors = [*self.model.parameters(), *self.model.buffers(), *self.batch.values()]
        tensors += [parameter.grad for parameter in self.model.parameters()]
        storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())

    def blocks(self) -> list[nn.Module]:
        """The blocks, in order."""
        return [module for module in self.model.modules() if isinstance(module, self.block)]

    def outcome(self, way: AbstractContextManager[Any]) -> dict[str, str]:
        """A digest of each thing that a step in `way` leaves behind, begun from one random state and put back after."""
        torch.manual_seed(0)
        with self._buffers_put_back():
            left = {"loss": _digest(self.step(way))}
            for name, parameter in self.model.named_parameters():
                if parameter.grad is not None:
                    left[f"gradient of {name}"] = _digest(parameter.grad)
            left |= {f"buffer {name}": _digest(buffer) for name, buffer in self.model.named_buffers()}
            left |= {f"random state {name}": _digest(state) for name, state in random_states().items()}
        return left


def gpt2(
    layers: int = 12, width: int = 768, heads: int = 12, length: int = 512, vocabulary: int = 50257, batch: int = 1
) -> Workload:
    """GPT-2 with dropout; the defaults are the smallest published size, and one sequence."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=heads,
        n_positions=max(1024, length),
        vocab_size=vocabulary,
        bos_token_id=0,
        eos_token_id=0,
    )
    name = f"GPT-2, {layers} layers, {batch} x {length} tokens"
    return _warm(Workload(name, GPT2LMHeadModel(config), _text(vocabulary, batch, length), GPT2Block))


def llama(
    layers: int = 12, width: int = 512, heads: int = 8, length: int = 512, vocabulary: int = 8000, batch: int = 2
) -> Workload:
    """A Llama-like model, and two sequences if not told otherwise."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=43 * width // 16,
        num_attention_heads=heads,
        vocab_size=vocabulary,
    )
    name = f"Llama-like, {layers} layers, width {width}, {batch} x {length} tokens"
    return _warm(Workload(name, LlamaForCausalLM(config), _text(vocabulary, batch, length), LlamaDecoderLayer))


def t5(batch: int = 4) -> Workload:
    """T5-small without dropout on its inputs, pairs of sequences."""
    torch.manual_seed(0)
    text = _text(32128, batch, 128)
    model = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0))
    return _warm(Workload(f"T5-small, {batch} x 128 tokens", model, text, T5Block))


def bert(batch: int = 4) -> Workload:
    """BERT-base with dropout."""
    torch.manual_seed(0)
    tokens = torch.randint(30522, (batch, 128))
    text = {"input_ids": tokens, "labels": tokens}
    return _warm(Workload(f"BERT-base, {batch} x 128 tokens", BertForMaskedLM(BertConfig()), text, BertLayer))


def resnet(
    layers: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 1000, batch: int = 6, size: int = 224
) -> Workload:
    """A ResNet with in-place ReLU and in-place residual adds, as it is usually written; the defaults are ResNet-50."""
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, size, size), torch.randint(classes, (batch,))
    name = f"ResNet-{3 * sum(layers) + 2}, {batch} x 3 x {size} x {size}"
    model = nets.ResNet(layers, width, classes)
    return _warm(Workload(name, model, {"images": images, "labels": labels}, nets.Bottleneck))


def _text(vocabulary: int, batch: int, length: int) -> dict[str, Any]:
    tokens = torch.randint(vocabulary, (batch, length))
    return {"input_ids": tokens, "labels": tokens, "use_cache": False}


def _warm(workload: Workload) -> Workload:
    """Allocate the gradients, and let libraries allocate what they keep for ever."""
    workload.model.train()
    workload.step(nullcontext())
    return workload


class Checkpointed:
    """PyTorch's own way, for the length of a `with`: run `forward` of each block again in backward."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        self._blocks = blocks

    def __enter__(self) -> None:
        for block in self._blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)

    def __exit__(self, *error: object) -> None:
        for block in self._blocks:
            del block.forward


def _digest(tensor: Tensor) -> str:
    return hashlib.blake2b(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
