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
from peak import peak_bytes


@dataclass(frozen=True)
class Workload:
    """A model in train mode, one batch, and the class of the blocks that people checkpoint by hand."""

    name: str
    model: nn.Module
    batch: dict[str, Any]
    block: type[nn.Module]

    def step(self, way: AbstractContextManager[Any]) -> Tensor:
        """One forward and backward, run in `way`. Gradients are zeroed, not freed, so that they never count."""
        self.model.zero_grad(set_to_none=False)
        with way:
            loss = self._loss()
            loss.backward()
        return loss.detach()

    def _loss(self) -> Tensor:
        result = self.model(**self.batch)
        loss: Tensor = result if isinstance(result, Tensor) else result.loss
        return loss  # nobody holds the logits any longer

    def peak(self, way: AbstractContextManager[Any]) -> int:
        """The most bytes a step in `way` held beyond what was there before it."""
        self.model.zero_grad(set_to_none=False)
        with self._buffers_put_back():
            return peak_bytes(lambda: self.step(way))

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
            left["random state"] = _digest(torch.get_rng_state())
        return left


def gpt2(layers: int = 12, width: int = 768, heads: int = 12, length: int = 512, vocabulary: int = 50257) -> Workload:
    """GPT-2 with dropout and one sequence; the defaults are the smallest published size."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0
    )
    tokens = torch.randint(vocabulary, (1, length))
    batch = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    return _warm(Workload(f"GPT-2, {layers} layers, 1 x {length} tokens", GPT2LMHeadModel(config), batch, GPT2Block))


def llama(layers: int = 12, width: int = 512, heads: int = 8, length: int = 512, vocabulary: int = 8000) -> Workload:
    """A Llama-like model and two sequences."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=43 * width // 16,
        num_attention_heads=heads,
        vocab_size=vocabulary,
    )
    tokens = torch.randint(vocabulary, (2, length))
    batch = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    name = f"Llama-like, {layers} layers, width {width}, 2 x {length} tokens"
    return _warm(Workload(name, LlamaForCausalLM(config), batch, LlamaDecoderLayer))


def t5() -> Workload:
    """T5-small without dropout on its inputs, four pairs of sequences."""
    torch.manual_seed(0)
    tokens = torch.randint(32128, (4, 128))
    batch = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    model = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0))
    return _warm(Workload("T5-small, 4 x 128 tokens", model, batch, T5Block))


def bert() -> Workload:
    """BERT-base with dropout, four sequences."""
    torch.manual_seed(0)
    tokens = torch.randint(30522, (4, 128))
    batch = {"input_ids": tokens, "labels": tokens}
    return _warm(Workload("BERT-base, 4 x 128 tokens", BertForMaskedLM(BertConfig()), batch, BertLayer))


def resnet(
    layers: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 1000, batch: int = 6, size: int = 224
) -> Workload:
    """A ResNet with in-place ReLU and in-place residual adds, as it is usually written; the defaults are ResNet-50."""
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, size, size), torch.randint(classes, (batch,))
    name = f"ResNet-{3 * sum(layers) + 2}, {batch} x 3 x {size} x {size}"
    model = nets.ResNet(layers, width, classes)
    return _warm(Workload(name, model, {"images": images, "labels": labels}, nets.Bottleneck))


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
    return hashlib.blake2b(tensor.detach().contiguous().numpy().tobytes()).hexdigest()
