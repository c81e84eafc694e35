"""Rehearsals: what they leave alone, what they look at, and what they refuse."""

from __future__ import annotations

import gc
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import rekindle
from helpers import Layer, live_activations, small_batch, small_model
from rekindle import RehearsalError
from rekindle.graph import Graph
from rekindle.runtime.rehearse import rehearse
from watch import modes


def names(graph: Graph) -> list[str]:
    """The ops of the forward pass, without namespace and overload, and without the gradient of the loss."""
    found = [op.name.split(".")[1] for op in graph.forward]
    return found[:-1] if found[-1] == "ones_like" else found


def real_graph(model: nn.Module, *args: Any) -> Graph:
    """The graph of a real step."""
    session = rekindle.Session(memory_budget="1TiB")
    with session:
        out = model(*args)
        (out if out.numel() == 1 else out.sum()).backward()
    assert session.graph is not None
    return session.graph


# -- what is left alone ------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Keeps count in a buffer, in an attribute, and in running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()
        self.norm = nn.BatchNorm1d(64)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        """Refine `x`."""
        self.calls += 1
        self.seen.append(tuple(x.shape))
        return self.norm(self.layer(x))


def test_the_model_is_not_touched() -> None:
    """Parameters, buffers, attributes, gradients, the input and the random state are what they were."""
    model, x = Counting(), small_batch(0)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random, before = torch.get_rng_state(), x.clone()
    parameters = list(model.parameters())
    graph = rehearse(model, (x,))
    assert "bernoulli_" in names(graph)
    assert all(map(torch.equal, state.values(), model.state_dict().values()))
    assert list(map(id, parameters)) == list(map(id, model.parameters()))
    assert [parameter.grad for parameter in parameters] == [None] * len(parameters)
    assert model.seen == []
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), random)


def test_gradients_that_are_there_stay() -> None:
    """A rehearsal begins with the gradients that the model has, adds to fakes of them, and leaves the real ones."""
    model, x = small_model(1), small_batch(0)
    fresh = rehearse(model, (x,))
    model(x).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    copies = [gradient.clone() for gradient in gradients if gradient is not None]
    again = rehearse(model, (x,))
    added = [op for op in again.ops if op.name == "aten.add_.Tensor" and op.backward]
    assert len(again.ops) - len(fresh.ops) == len(added) == len(gradients)
    assert again.standing - fresh.standing == sum(gradient.nbytes for gradient in copies)
    assert [parameter.grad for parameter in model.parameters()] == gradients
    assert all(map(torch.equal, copies, gradients))


def test_some_gradients() -> None:
    """With gradients for some parameters only, one of them in a longer type than its parameter, ops, values and
    standing bytes are those of the real step."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        model = small_model(2)
        for parameter in list(model.parameters())[::2]:
            parameter.grad = torch.zeros_like(parameter)
        model.bfloat16()
        model[2].weight.grad, model[2].weight.grad_dtype = None, torch.float32
        model[2].weight.grad = torch.zeros(64, 64)
        return model

    x = small_batch(0).bfloat16()
    real, fake = real_graph(make(), x), rehearse(make(), (x,))
    assert [op.name for op in fake.ops] == [op.name for op in real.ops]
    assert [value.nbytes for value in fake.values] == [value.nbytes for value in real.values]
    assert fake.standing == real.standing


def test_gradients_without_a_plain_storage() -> None:
    """Sparse gradients are refused as other sparse tensors are, with what to do instead."""
    model = nn.Sequential(nn.Embedding(16, 64, sparse=True), Layer())
    tokens = torch.zeros(4, 8, dtype=torch.long)
    model(tokens).sum().backward()
    with pytest.raises(RehearsalError, match=r"sparse.*rekindle\.Session\(memory_budget=\.\.\.\)"):
        rehearse(model, (tokens,))


def test_hooks_run_on_the_copy() -> None:
    """Forward hooks of modules are part of the step; they see no data."""
    model, x, seen = small_model(1), small_batch(0), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(module) or output * 2)
    assert names(rehearse(model, (x,))).count("mul") == names(rehearse(small_model(1), (x,))).count("mul") + 1
    assert len(seen) == 1
    assert seen[0] is not model[0]


def test_nothing_stays() -> None:
    """When it is over, or failed, no mode, hook, activation or tensor of it is left, and PyTorch is as it was."""
    model, x = small_model(1), small_batch(0)
    fake, log = torch._subclasses.FakeTensor, logging.getLogger("torch._subclasses.fake_tensor")
    hooks = torch.nn.modules.module._global_forward_hooks
    gc.collect()
    before = {id(thing) for thing in gc.get_objects() if issubclass(type(thing), fake)}
    rehearse(model, (x,))
    with pytest.raises(RehearsalError):
        rehearse(nn.Sequential(model, ByData()), (x,))
    gc.collect()
    assert (modes(), len(hooks), live_activations()) == (0, 0, 0)
    assert torch._subclasses.FakeTensor is fake
    assert not log.disabled
    assert not [thing for thing in gc.get_objects() if issubclass(type(thing), fake) and id(thing) not in before]


def test_where_it_is_called_from() -> None:
    """Gradients may be off, and somebody else's mode on, which sees nothing."""
    model, x = small_model(1), small_batch(0)
    expected = rehearse(model, (x,))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        assert rehearse(model, (x,)) == expected
    assert counter.get_total_flops() == 0


# -- what it needs not -------------------------------------------------------------------------------------------------


def test_a_model_on_the_meta_device() -> None:
    """Neither the weights nor the inputs need bytes."""
    with torch.device("meta"):
        model, x = small_model(), torch.empty(32, 64)
    assert rehearse(model, (x,)) == rehearse(small_model(), (small_batch(0),))


def test_more_memory_than_there_is() -> None:
    """A step of many terabytes takes none."""
    with torch.device("meta"):
        model, x = nn.Sequential(*(nn.Linear(1 << 20, 1 << 20) for _ in range(3))), torch.empty(1 << 16, 1 << 20)
    graph = rehearse(model, (x,))
    assert graph.standing > 12 << 40
    assert names(graph) == ["addmm", "addmm", "addmm", "sum"]


def test_shared_weights_and_views_of_one_batch() -> None:
    """A storage counts once, however many parameters or inputs look at it."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(96, 64), nn.Linear(64, 96, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self.head(self.embed(tokens)), targets)

    text = torch.arange(65) % 96
    graph = rehearse(Tied(), (text[:-1], text[1:]))
    assert graph.standing == 96 * 64 * 4 + text.nbytes
    assert [value.name for value in graph.values if value.name] == ["embed.weight"]


def test_inputs_by_keyword_and_in_containers() -> None:
    """Tensors are found wherever they are in the arguments, and frozen parameters get no gradients."""

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64).requires_grad_(False)

        def forward(self, pair: tuple[Tensor, Tensor], *, more: dict[str, list[Tensor]]) -> Tensor:
            return self.second(self.first(pair[0] + pair[1]) + more["rest"][0])

    x = small_batch(0)
    graph = rehearse(Nested(), ((x, x.clone()),), {"more": {"rest": [x.clone().requires_grad_()]}})
    made = [graph.values[value] for op in graph.ops if op.backward for value in op.outputs]
    assert [value.nbytes for value in made].count(64 * 64 * 4) == 1


# -- where the backward pass begins ------------------------------------------------------------------------------------


class Returns(nn.Module):
    """Returns what `wrap` makes of its output."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.layer, self.wrap = nn.Linear(64, 64), wrap

    def forward(self, x: Tensor) -> Any:
        """The output, wrapped."""
        return self.wrap(self.layer(x))


class Output:
    """An output with fields, as those of Transformers."""

    def __init__(self, loss: Tensor, logits: Tensor) -> None:
        self.loss, self.logits = loss, logits


@pytest.mark.parametrize(
    ("wrap", "loss", "tail"),
    [
        (lambda y: y.mean(), None, ["addmm", "mean"]),
        (lambda y: {"loss": y.mean(), "logits": y}, None, ["addmm", "mean"]),
        (lambda y: Output(y.mean(), y), None, ["addmm", "mean"]),
        (lambda y: y, None, ["addmm", "sum"]),
        (lambda y: (y, [y * 2], y.detach(), "text"), None, ["addmm", "mul", "sum", "sum", "stack", "sum"]),
        (lambda y: y, lambda y: y.square().mean(), ["addmm", "pow", "mean"]),
    ],
    ids=["scalar", "mapping", "field", "tensor", "several", "function"],
)
def test_the_loss(wrap: Any, loss: Any, tail: list[str]) -> None:
    """A scalar is the loss, then what is called so, then the sum of all that has gradients; or what the user says."""
    assert names(rehearse(Returns(wrap), (small_batch(0),), loss=loss)) == tail


@pytest.mark.parametrize("wrap", [lambda y: None, lambda y: y.detach(), lambda y: {"x": 1}])
def test_no_loss(wrap: Any) -> None:
    """Without anything to begin from, the message says how to name it."""
    with pytest.raises(RehearsalError, match="loss=lambda outputs"):
        rehearse(Returns(wrap), (small_batch(0),))


# -- what it looks at --------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """Goes another way if its mask leaves something out, and adds one row for each that is left."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`x`, transformed."""
        x = x * 2
        if bool((mask == 0).any()):
            x = x.tanh()
        rows = mask.long().cumsum(0)[-1].item()
        positions = torch.nonzero(torch.cat((mask, torch.ones_like(mask)))).flatten()
        return x[:rows].sum() + x[positions % len(x)].sum()


@pytest.mark.parametrize("left", [32, 20])
def test_integers_are_looked_at(left: int) -> None:
    """Masks and lengths have their content, through views and writes, so a step goes the way it would go for real."""
    mask = torch.ones(33, dtype=torch.long)[1:]
    mask[left:] = 0
    x = small_batch(0).requires_grad_()
    graph = rehearse(Masked(), (x, mask))
    assert ("tanh" in names(graph)) == (left < 32)
    real = real_graph(Masked(), x, mask)
    assert names(graph) == names(real)
    assert [value.nbytes for value in graph.values] == [value.nbytes for value in real.values]


def test_writes_to_integers_are_followed() -> None:
    """What an op wrote is what the next one sees, and the user's own tensor is not written."""

    class Writes(nn.Module):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            lengths[0].add_(3)
            lengths.t_()
            lengths += torch.tensor([[1], [2]])
            return x[: int(lengths.sum())].exp()

    x, lengths = small_batch(0).requires_grad_(), torch.tensor([[2, 4]])
    graph = rehearse(Writes(), (x, lengths))
    (exp,) = (graph.values[op.outputs[0]] for op in graph.forward if op.name == "aten.exp.default")
    assert exp.shape == (15, 64)
    assert lengths.tolist() == [[2, 4]]


class ByData(nn.Module):
    """Looks at its activations."""

    def forward(self, x: Tensor) -> Tensor:
        """`x`, or its negative."""
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(lambda x: x * x.sum().item(), id="item"),
        pytest.param(lambda x: x[x > 0], id="mask"),
        pytest.param(lambda x: x * torch.nonzero(x > 0).sum(), id="nonzero"),
        pytest.param(lambda x: x * torch.randint(9, (4,)).max().item(), id="random"),
        pytest.param(lambda x: x * torch.argsort(x.sum(1))[0].item(), id="made of floats"),
    ],
)
def test_content_of_activations_is_refused(step: Any) -> None:
    """What depends on data that is not there names the op and the module, and says what to do."""

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return step(x)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Linear(64, 64), Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.first(x))

    with pytest.raises(RehearsalError, match=r"aten\.\w+\.\w+ in module 'inner' \(Inner\) depends on the content") as e:
        rehearse(Outer(), (small_batch(0),))
    assert "rekindle.Session(memory_budget=...)" in str(e.value)
    assert "aten." in str(e.value)


def test_content_of_a_meta_tensor_is_refused() -> None:
    """A mask without bytes cannot be looked at."""
    with pytest.raises(RehearsalError, match="depends on the content"):
        rehearse(Masked(), (small_batch(0).requires_grad_(), torch.ones(32, dtype=torch.long, device="meta")))


def test_an_op_that_fails() -> None:
    """An op that raises is told as such, with what it said: it would fail for real, or fake tensors cannot do it."""
    with pytest.raises(RehearsalError, match=r"aten\.addmm\.default in module '0' \(Linear\) failed .*RuntimeError"):
        rehearse(nn.Sequential(nn.Linear(64, 64)), (torch.randn(4, 63),))


def test_a_model_that_cannot_be_copied() -> None:
    """The copy is what keeps the model untouched, so the message says why there is none."""
    model = small_model(1)
    model.lock = __import__("threading").Lock()
    with pytest.raises(RehearsalError, match=r"cannot be copied: TypeError: .*lock"):
        rehearse(model, (small_batch(0),))


def test_a_sparse_input() -> None:
    """A tensor without a plain storage is refused by its layout."""
    with pytest.raises(RehearsalError, match="sparse_coo tensor"):
        rehearse(small_model(1), (torch.eye(64).to_sparse(),))


# -- costs and devices -------------------------------------------------------------------------------------------------


def test_costs_of_the_users() -> None:
    """A function gives each op its seconds, from the op, its arguments and its result."""
    graph = rehearse(small_model(1), (small_batch(0),), cost=lambda func, args, kwargs, result: float(len(args)))
    assert {op.seconds for op in graph.ops if op.name == "aten.addmm.default"} == {3.0}


def test_costs_of_a_roofline() -> None:
    """Every op that computes has some, and a faster device less of it."""
    model, x = nn.Sequential(nn.Linear(1024, 1024), nn.GELU()), torch.empty(4096, 1024, device="meta")
    slow, fast = (rehearse(model, (x,), device=device) for device in ("a100", "h100"))
    assert all(op.seconds > 0 for op in slow.ops)
    assert sum(op.seconds for op in fast.ops) < sum(op.seconds for op in slow.ops)


@pytest.mark.parametrize("cost", ["measured", "fast", None, 3])
def test_costs_that_are_none(cost: Any) -> None:
    """Nothing is measured in a rehearsal; the message says what can be had."""
    with pytest.raises(RehearsalError, match='cost="roofline"'):
        rehearse(small_model(1), (small_batch(0),), cost=cost)


def test_a_device_nobody_knows() -> None:
    """The message lists the devices that are known."""
    with pytest.raises(RehearsalError, match="'a100', 'h100', 'h200', 'rtx4090', 'cpu'"):
        rehearse(small_model(1), (small_batch(0),), device="tpu")


def test_a_loss_on_cuda_is_as_small_as_it_looks() -> None:
    """That the CPU's kernel reduces in the storage of what it reduces is the CPU's alone."""
    model, x = Returns(lambda y: nn.functional.mse_loss(y, torch.zeros_like(y))), small_batch(0)
    cpu, cuda = (rehearse(model, (x,), device=device) for device in ("cpu", "h100"))
    (here,) = (cpu.values[op.outputs[0]].nbytes for op in cpu.forward if "mse_loss" in op.name)
    (there,) = (cuda.values[op.outputs[0]].nbytes for op in cuda.forward if "mse_loss" in op.name)
    assert (here, there) == (x.nbytes, 4)
    assert [value.nbytes for value in cpu.values] == [value.nbytes for value in real_graph(model, x).values]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 16), (torch.bfloat16, 12), (torch.float32, 16)])
def test_attention_on_cuda(dtype: torch.dtype, width: int, mask: str | None, dropout: float) -> None:
    """Attention takes one kernel forward and one backward, flash if it can, with grouped heads, a mask and dropout."""

    class Attends(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout, enable_gqa=True)

    q = torch.empty(2, 4, 32, width, dtype=dtype, device="meta", requires_grad=True)
    k, v = (torch.empty(2, 2, 32, width, dtype=dtype, device="meta", requires_grad=True) for _ in range(2))
    seen = None if mask is None else torch.empty(32, 32, dtype=torch.bool if mask == "bool" else dtype, device="meta")
    graph = rehearse(Attends(), (q, k, v, seen), device="h100")
    kind = "flash" if mask is None and dtype is torch.bfloat16 and width == 16 else "efficient"
    attention = [op.name for op in graph.ops if "attention" in op.name]
    name = f"aten._scaled_dot_product_{kind}_attention"
    assert attention == [f"{name}.default", f"{name}_backward.default"]
    assert not any("softmax" in op.name for op in graph.ops)
    (out,) = (graph.values[op.outputs[0]] for op in graph.forward if op.name == attention[0])
    assert out.nbytes == 2 * 4 * 32 * width * dtype.itemsize
