"""A rehearsed step is the step: what fake tensors tell of real models, beside what a recorded step tells."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import rekindle
import zoo
from rekindle.graph import Plan, verify_graph
from rekindle.graph.timeline import simulate
from rekindle.runtime.rehearse import rehearse

BY_DATA = ("mixtral", "mixtral-grouped")  # tokens are routed to experts by what they are
COPIES = {"lstm"}  # on fake tensors the bias gradients that oneDNN returns twice are copied, for one kernel each
SAME = [entry for entry in zoo.ZOO if entry.name not in (*BY_DATA, *COPIES)]


each_model = pytest.mark.parametrize("entry", SAME, ids=repr)


def recorded(entry: zoo.Entry) -> rekindle.Graph:
    """The graph of a real step, from no gradients."""
    model, batch, session = entry.make(), entry.batch(0), rekindle.Session(memory_budget="1TiB")
    with session:
        zoo.loss_of(model, batch).backward()
    assert session.graph is not None
    return session.graph


def rehearsed(entry: zoo.Entry, device: str = "cpu") -> rekindle.Graph:
    """The graph of the same step without data."""
    return verify_graph(rehearse(entry.make(), (), entry.batch(0), device=device))


@each_model
def test_the_same_graph(entry: zoo.Entry) -> None:
    """Ops, values, when they go, demands and standing bytes are those of a real step on the CPU, all of them; seconds
    and temporaries of kernels are told by formulas.

    Temporaries are no less than the real kernels took, but for a scalar that they convert; so are peaks on paper, and
    not by more than a fifth.
    """
    real, fake = recorded(entry), rehearsed(entry)
    assert [op.name for op in fake.ops] == [op.name for op in real.ops]
    plain = [replace(op, seconds=0.0, temporaries=0) for op in real.ops]
    assert [replace(op, seconds=0.0, temporaries=0) for op in fake.ops] == plain
    assert [replace(value, device="") for value in fake.values] == [replace(value, device="") for value in real.values]
    assert fake.demands == real.demands
    assert fake.calls == real.calls
    assert fake.standing == real.standing
    assert [op for op, other in zip(fake.ops, real.ops, strict=True) if op.temporaries < other.temporaries - 16] == []
    for kept in (frozenset[int](), frozenset(value.number for value in real.evictable)):
        peak = simulate(real, Plan(kept)).peak
        assert peak <= simulate(fake, Plan(kept)).peak <= 1.2 * peak


def test_copies_of_bias_gradients() -> None:
    """oneDNN's recurrent layers: the same but for the copies, which make the peak no higher."""
    (entry,) = (entry for entry in zoo.ZOO if entry.name in COPIES)
    real, fake = recorded(entry), rehearsed(entry)
    copies = ("aten.new_empty_strided.default", "aten.copy_.default")
    assert [op.name for op in fake.ops if op.name not in copies] == [op.name for op in real.ops]
    assert len(fake.forward) == len(real.forward)
    assert simulate(fake, Plan(frozenset())).peak <= 1.2 * simulate(real, Plan(frozenset())).peak


@pytest.mark.parametrize("entry", [entry for entry in zoo.ZOO if entry.name in BY_DATA], ids=repr)
def test_routing_by_data_is_refused(entry: zoo.Entry) -> None:
    """A mixture of experts sends tokens where their content says: the error names the op and the module, and what to do
    instead."""
    with pytest.raises(
        rekindle.RehearsalError, match=r"aten\.\w+\.default in module 'model.layers.0.mlp.experts'"
    ) as e:
        rehearsed(entry)
    assert "rekindle.Session(memory_budget=...)" in str(e.value)


@each_model
def test_on_a_gpu_that_is_not_there(entry: zoo.Entry) -> None:
    """For a CUDA device attention takes the fused kernels and dropout the fused op, values are on it, and no more
    memory is needed than on the CPU."""
    cpu, cuda = rehearsed(entry), rehearsed(entry, "h100")
    names = {op.name for op in cuda.ops}
    assert not any("for_cpu" in name or "_safe_softmax" in name for name in names)
    assert not any("bernoulli" in name for name in names)
    assert {value.device for value in cuda.values} <= {"cuda", ""}
    assert simulate(cuda, Plan(frozenset())).peak <= 1.1 * simulate(cpu, Plan(frozenset())).peak


def test_llama_3_8b() -> None:
    """A step of a model with 8 billion parameters and 4096 tokens: no bytes for any of them, seconds for all.

    The gradients, the weights and what is saved add up to what arithmetic says.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width, vocabulary, length = 2, 4096, 128256, 4096
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=width,
                intermediate_size=14336,
                num_hidden_layers=layers,
                num_attention_heads=32,
                num_key_value_heads=8,
            )
        ).to(torch.bfloat16)
        tokens = torch.zeros(1, length, dtype=torch.long)
    graph = rehearse(model, (), {"input_ids": tokens, "labels": tokens, "use_cache": False}, device="h100")
    parameters = 2 * sum(parameter.numel() for parameter in model.parameters())
    inputs = model.model.rotary_emb.inv_freq.nbytes * 2 + tokens.nbytes
    assert graph.standing == pytest.approx(parameters + inputs, abs=1 << 20)
    kept = simulate(graph, Plan(frozenset(value.number for value in graph.evictable)))
    recomputed = simulate(graph, Plan(frozenset()))
    logits = 4 * length * vocabulary
    assert parameters + logits < recomputed.peak < kept.peak < 2 * parameters + 5 * logits + layers * (2 << 30)
    mms = [op for op in graph.forward if op.name == "aten.mm.default"]
    work = 2 * length * width * (2 * width + 2 * width // 4 + 3 * 14336) * layers + 2 * length * width * vocabulary
    assert math.fsum(op.seconds for op in mms) == pytest.approx(work / 989.4e12, rel=0.01)
    assert sum("flash_attention" in op.name for op in graph.ops) == 2 * layers
