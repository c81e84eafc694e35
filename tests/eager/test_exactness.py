"""What eager code may do, in small: under every policy the same bits as plain training.

Each case is a training step of one small network. They are run with policies that keep little, much, or only what a
plan says, and once with even the smallest activations evicted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import helpers
from helpers import seeded
from rekindle import EveryN, KeepNone, MemoryOptimal, PerModule, Session

pytestmark = pytest.mark.filterwarnings("ignore:PerModule.*no module that ran")  # some models here have no such module

WIDTH = 32


class Net(nn.Module):
    """Some parameters for a step to use as it likes, and the modules it asks for."""

    def __init__(self, make_modules: Callable[[], dict[str, nn.Module]], dtype: torch.dtype) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=dtype) / 8)
        self.v = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=dtype) / 8)
        self.b = nn.Parameter(torch.randn(WIDTH, dtype=dtype))
        self.m = nn.ModuleDict(make_modules())


POLICIES: dict[str, tuple[Callable[[], Any], int]] = {
    "keep-none": (KeepNone, 1024),
    "keep-none-nor-small": (KeepNone, 0),
    "every-2": (lambda: EveryN(2), 1024),
    "every-3-nor-small": (lambda: EveryN(3), 0),
    "memory-optimal": (lambda: MemoryOptimal(0.3), 1024),
    "per-module": (lambda: PerModule(nn.Sequential, helpers.Layer), 0),
}
CASES: dict[str, tuple[Callable[[], Net], helpers.Step]] = {}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small kernels are faster on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch(number: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random rows, made without touching the global random state."""
    return torch.randn(WIDTH, WIDTH, dtype=dtype, generator=seeded(number))


def step(
    modules: Callable[[], dict[str, nn.Module]] = dict, dtype: torch.dtype = torch.float32
) -> Callable[[helpers.Step], helpers.Step]:
    """Register a whole training step under the name of its function."""

    def register(function: helpers.Step) -> helpers.Step:
        CASES[function.__name__] = (partial(Net, modules, dtype), function)
        return function

    return register


def loss(
    modules: Callable[[], dict[str, nn.Module]] = dict, dtype: torch.dtype = torch.float32
) -> Callable[[Callable[[Net, Tensor], Tensor]], Callable[[Net, Tensor], Tensor]]:
    """Register the loss of an ordinary training step under the name of its function."""

    def register(function: Callable[[Net, Tensor], Tensor]) -> Callable[[Net, Tensor], Tensor]:
        def run(net: Net, number: int, managed: helpers.Managed) -> Tensor:
            x = batch(number, dtype)
            with managed:
                result = function(net, x)
                result.backward()
            return result

        CASES[function.__name__] = (partial(Net, modules, dtype), run)
        return function

    return register


@cache
def plain_training(name: str) -> list[helpers.Snapshot]:
    """What plain training leaves behind, computed once for all policies."""
    return helpers.train(*CASES[name])


def layers() -> dict[str, nn.Module]:
    """A chain with dropout."""
    return {"chain": nn.Sequential(*(helpers.Layer(WIDTH) for _ in range(3)))}


# -- ways to run forward and backward ---------------------------------------------------------------------------------


@step(layers)
def autocast(net: Net, number: int, managed: helpers.Managed) -> Tensor:
    """Casts are recorded like any op."""
    x = batch(number)
    with managed:
        with torch.autocast("cpu", torch.bfloat16):
            result = F.gelu(net.m["chain"](x) @ net.w).float().pow(2).mean()
        result.backward()
    return result


@step(layers)
def retained_graph(net: Net, number: int, managed: helpers.Managed) -> Tensor:
    """What the first backward pass recomputed goes again, and comes again in the second."""
    x = batch(number)
    with managed:
        result = F.gelu(net.m["chain"](x) @ net.w).pow(2).mean()
        result.backward(retain_graph=True)
        result.backward()
    return result


@step(layers)
def gradient_penalty(net: Net, number: int, managed: helpers.Managed) -> list[Tensor]:
    """The backward ops of the first derivative are forward ops of the second."""
    x = batch(number).requires_grad_()
    with managed:
        out = torch.tanh(net.m["chain"](x) @ net.w).pow(2).mean()
        (slope,) = torch.autograd.grad(out, x, create_graph=True)
        total = out + (slope.norm(dim=1) - 1).pow(2).mean()
        total.backward()
    return [total, slope]


@step(layers)
def created_graph_in_backward(net: Net, number: int, managed: helpers.Managed) -> Tensor:
    """`backward(create_graph=True)`, then the gradient of the gradients."""
    x = batch(number)
    with managed:
        out = torch.tanh(net.m["chain"](x) @ net.w).pow(2).mean()
        out.backward(create_graph=True, inputs=[net.w])
        first = net.w.grad
        assert first is not None
        net.w.grad = None
        (first * torch.tanh(first)).sum().backward()
    return out


@step(layers)
def accumulation(net: Net, number: int, managed: helpers.Managed) -> Tensor:
    """Three forward passes, a backward pass after each."""
    with managed:
        for part in range(3):
            result = F.gelu(net.m["chain"](batch(10 * number + part)) @ net.w).pow(2).mean()
            result.backward()
    return result


@step(layers)
def accumulation_in_entries(net: Net, number: int, managed: helpers.Managed) -> Tensor:
    """The same, entering the session for each."""
    for part in range(3):
        with managed:
            result = F.gelu(net.m["chain"](batch(10 * number + part)) @ net.w).pow(2).mean()
            result.backward()
    return result


@step(layers)
def accumulation_together(net: Net, number: int, managed: helpers.Managed) -> Tensor:
    """Three forward passes, then one backward pass through all."""
    with managed:
        parts = [F.gelu(net.m["chain"](batch(10 * number + part)) @ net.w).pow(2).mean() for part in range(3)]
        result = torch.stack(parts).sum()
        result.backward()
    return result


@step(layers)
def accumulation_in_turn(net: Net, number: int, managed: helpers.Managed) -> Tensor:
    """Three forward passes, then a backward pass for each, the oldest first."""
    with managed:
        parts = [F.gelu(net.m["chain"](batch(10 * number + part)) @ net.w).pow(2).mean() for part in range(3)]
        for result in parts:
            result.backward()
    return result


@step(layers)
def backward_after_the_block(net: Net, number: int, managed: helpers.Managed) -> Tensor:
    """Replays need no active session."""
    x = batch(number)
    with managed:
        result = F.gelu(net.m["chain"](x) @ net.w).pow(2).mean()
    result.backward()
    return result


@step(layers)
def backward_in_a_later_entry(net: Net, number: int, managed: helpers.Managed) -> Tensor:
    """Nor the entry that recorded them."""
    x = batch(number)
    with managed:
        result = F.gelu(net.m["chain"](x) @ net.w).pow(2).mean()
    with managed:
        other = F.gelu(net.m["chain"](x + 1) @ net.v).pow(2).mean()
        result.backward()
    other.backward()
    return result


@step(layers)
def gradients_of_parts(net: Net, number: int, managed: helpers.Managed) -> list[Tensor]:
    """`torch.autograd.grad` for some inputs now and for others later."""
    x = batch(number).requires_grad_()
    with managed:
        hidden = net.m["chain"](x)
        out = torch.tanh(hidden @ net.w).pow(2).mean()
        (of_hidden,) = torch.autograd.grad(out, hidden, retain_graph=True)
        of_both = torch.autograd.grad(out, (x, net.w))
    return [of_hidden, *of_both]


@step(layers)
def truncated(net: Net, number: int, managed: helpers.Managed) -> Tensor:
    """A hidden state that is detached and carried over from one backward pass to the next."""
    x, hidden = batch(number), torch.zeros(WIDTH, WIDTH)
    with managed:
        for _ in range(4):
            hidden = torch.tanh(net.m["chain"](x + hidden) @ net.w)
            result = hidden.pow(2).mean()
            result.backward()
            hidden = hidden.detach()
    return result


@step(layers)
def truncated_across_entries(net: Net, number: int, managed: helpers.Managed) -> Tensor:
    """The same across entries of the session."""
    x, hidden = batch(number), torch.zeros(WIDTH, WIDTH)
    for _ in range(4):
        with managed:
            hidden = torch.tanh(net.m["chain"](x + hidden) @ net.w)
            result = hidden.pow(2).mean()
            result.backward()
            hidden = hidden.detach()
    return result


@step(layers)
def two_losses(net: Net, number: int, managed: helpers.Managed) -> Tensor:
    """The generator's forward pass outlives the discriminator's backward pass and step."""
    x = batch(number)
    with managed:
        fake = net.m["chain"](x)
        judge = lambda made: F.gelu(F.gelu(made @ net.w + net.b) @ net.v).pow(2).mean()  # noqa: E731
        judge(fake.detach()).backward()
        with torch.no_grad():
            for parameter in (net.w, net.v, net.b):
                parameter.sub_(0.01 * parameter.grad)
        result = judge(fake)
        result.backward()
    return result


@loss(layers)
def reentrant_checkpoint(net: Net, x: Tensor) -> Tensor:
    """The user's own checkpointing runs `forward` again inside the backward pass."""
    for layer in net.m["chain"]:
        x = checkpoint(layer, x.requires_grad_(), use_reentrant=True)
    return F.gelu(x @ net.w).pow(2).mean()


@loss(layers)
def nonreentrant_checkpoint(net: Net, x: Tensor) -> Tensor:
    """The same, with hooks of its own inside ours."""
    for layer in net.m["chain"]:
        x = checkpoint(layer, x, use_reentrant=False)
    return F.gelu(x @ net.w).pow(2).mean()


@step(layers)
def steps_in_backward_hooks(net: Net, number: int, managed: helpers.Managed) -> Tensor:
    """Parameters are written as soon as their gradients are there; plain autograd has no more use for them."""

    def descend(parameter: Tensor) -> None:
        with torch.no_grad():
            parameter.sub_(0.01 * parameter.grad)

    hooks = [p.register_post_accumulate_grad_hook(descend) for p in net.parameters()]
    x = batch(number)
    with managed:
        result = F.gelu(net.m["chain"](x) @ net.w + net.b).pow(2).mean()
        result.backward()
    for hook in hooks:
        hook.remove()
    return result


@loss(layers)
def without_grad(net: Net, x: Tensor) -> Tensor:
    """A teacher under `torch.no_grad`, whose result is used with gradients."""
    with torch.no_grad():
        goal = net.m["chain"](x).mul_(2)
    return F.gelu((net.m["chain"](x) - goal) @ net.w).pow(2).mean()


@loss(lambda: {"norm": nn.BatchNorm1d(WIDTH), **layers()})
def inference(net: Net, x: Tensor) -> Tensor:
    """A forward pass in inference mode, with gradients switched on in it or not, that moves batch statistics."""
    with torch.inference_mode():
        goal = F.gelu(net.m["norm"](net.m["chain"](x))).add_(1)
        with torch.enable_grad():
            other = net.m["chain"](x).relu_()
    return F.gelu((net.m["chain"](x) + goal + other) @ net.w).pow(2).mean()


# -- modules ----------------------------------------------------------------------------------------------------------


@loss(layers)
def frozen_layers(net: Net, x: Tensor) -> Tensor:
    """Layers whose parameters take no gradient."""
    net.m["chain"][1].requires_grad_(False)
    return F.gelu(net.m["chain"](x) @ net.w).pow(2).mean()


@loss(lambda: {"one": nn.Linear(WIDTH, WIDTH), **layers()})
def shared_weight(net: Net, x: Tensor) -> Tensor:
    """One weight in two layers, once transposed."""
    x = F.gelu(net.m["one"](x))
    return F.gelu(F.linear(F.gelu(net.m["one"](x)), net.m["one"].weight.t())).pow(2).mean()


@loss(layers)
def forward_hooks(net: Net, x: Tensor) -> Tensor:
    """Hooks of the user that replace what a module takes and returns, and gradients."""
    chain = net.m["chain"]
    hooks = [
        chain[0].register_forward_hook(lambda module, args, out: out * 2),
        chain[1].register_forward_pre_hook(lambda module, args: (args[0].sin(),)),
        chain[2].register_full_backward_hook(lambda module, into, out: (into[0] * 0.5,)),
    ]
    result = chain(x)
    result.register_hook(lambda grad: grad.clone().mul_(3))
    for hook in hooks:
        hook.remove()
    return F.gelu(result @ net.w).pow(2).mean()


@loss(lambda: {"norm": nn.BatchNorm1d(WIDTH), "none": nn.BatchNorm1d(WIDTH, momentum=None)})
def batch_norm(net: Net, x: Tensor) -> Tensor:
    """Running statistics move once for each forward pass, however often it is replayed."""
    x = F.relu(net.m["norm"](x @ net.w), inplace=True)
    x = F.relu(net.m["norm"](x @ net.v), inplace=True)
    return F.gelu(net.m["none"](x)).pow(2).mean()


@step(lambda: {"norm": nn.BatchNorm1d(WIDTH)})
def batch_norm_in_turns(net: Net, number: int, managed: helpers.Managed) -> list[Tensor]:
    """Statistics that were read in evaluation are overwritten by training: before a cut, after it, and outside."""
    x, norm, results = batch(number), net.m["norm"], []

    def evaluate() -> Tensor:
        return F.gelu(norm.eval()(x @ net.w)).pow(2).mean()

    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with managed:
            first, second, third = evaluate(), evaluate(), evaluate()
            with mode():
                norm.train()(x + 3)
            first.backward()
            with mode():
                norm.train()(x - 3)
            second.backward()
        norm.train()(x + 1)
        third.backward()
        results += [first, second, third]
    return results


@loss(
    lambda: {
        "group": nn.GroupNorm(2, 4),
        "instance": nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        "conv": nn.Conv2d(2, 4, 3, padding=1),
        "pool": nn.AdaptiveAvgPool2d(4),
    }
)
def norms_in_channels_last(net: Net, x: Tensor) -> Tensor:
    """Strides come back as they were."""
    x = (x @ net.w).view(4, 2, 8, 16).to(memory_format=torch.channels_last)
    x = F.silu(net.m["instance"](F.silu(net.m["group"](net.m["conv"](x)))))
    return F.gelu(net.m["pool"](F.max_pool2d(x, 2))).pow(2).mean() + F.interpolate(x, scale_factor=2).pow(2).mean()


@loss(lambda: {"attention": nn.MultiheadAttention(WIDTH, 2, dropout=0.2, batch_first=True)})
def attention(net: Net, x: Tensor) -> Tensor:
    """With weights and without, by the module and by the function, each with dropout."""
    x = (x @ net.w).view(4, 8, WIDTH)
    with_weights, weights = net.m["attention"](x, x, x)
    without, _ = net.m["attention"](x, with_weights, x, need_weights=False)
    heads = without.view(4, 8, 2, 16).transpose(1, 2)
    direct = F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.3, is_causal=True)
    plain = F.scaled_dot_product_attention(heads, direct, heads)
    return F.gelu(plain).pow(2).mean() + weights.std()


@loss()
def dropouts(net: Net, x: Tensor) -> Tensor:
    """Every kind of dropout, and noise drawn into a tensor that was there."""
    x = F.dropout(x @ net.w, 0.3)
    x = F.alpha_dropout(F.gelu(x), 0.2, training=True)
    x = F.dropout1d(x.view(4, 8, WIDTH), 0.2).view(WIDTH, WIDTH)
    x = F.rrelu(x @ net.v, training=True) + torch.empty_like(x).normal_() + torch.bernoulli(torch.sigmoid(x))
    x = F.dropout(x, 0.1, inplace=True) * torch.rand_like(x) + torch.randperm(WIDTH) + torch.randint(5, (WIDTH,))
    return F.gelu(x + F.gumbel_softmax(x) + torch.normal(x.detach(), 1.0)).pow(2).mean()


@step()
def own_generator(net: Net, number: int, managed: helpers.Managed) -> list[Tensor]:
    """Noise from the user's generator is drawn again from its state of then, and that state is left alone."""
    generator, x = seeded(number), batch(number)
    with managed:
        hidden = x @ net.w
        mask = torch.empty_like(hidden).bernoulli_(0.7, generator=generator)
        hidden = F.gelu(hidden * mask) + torch.randn(WIDTH, WIDTH, generator=generator)
        result = F.gelu(hidden * torch.bernoulli(mask * 0.5, generator=generator) @ net.v).pow(2).mean()
        before = generator.get_state()
        result.backward()
    assert torch.equal(generator.get_state(), before)
    return [result, torch.rand(4, generator=generator)]


@step(lambda: {"words": nn.Embedding(40, WIDTH, sparse=True), "bag": nn.EmbeddingBag(40, WIDTH, mode="mean")})
def embeddings(net: Net, number: int, managed: helpers.Managed) -> Tensor:
    """Sparse gradients, and bags."""
    words = torch.randint(40, (16, 4), generator=seeded(number))
    with managed:
        result = F.gelu(net.m["words"](words).mean(1) @ net.w + net.m["bag"](words)).pow(2).mean()
        result.backward()
    return result


@loss(
    lambda: {
        "spectral": nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
        "weight": nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
        "words": nn.Embedding(WIDTH, WIDTH, max_norm=1.0),
    }
)
def modules_that_write(net: Net, x: Tensor) -> Tensor:
    """Power iterations and norm limits write to buffers and weights in the forward pass."""
    words = net.m["words"](torch.arange(WIDTH))
    x = net.m["weight"](F.gelu(net.m["spectral"](x + words)))
    return F.gelu(net.m["spectral"](x) + net.m["words"](torch.arange(WIDTH)).detach()).pow(2).mean()


@loss(lambda: {"gru": nn.GRU(WIDTH, WIDTH, bidirectional=True), "cell": nn.LSTMCell(WIDTH, WIDTH)})
def recurrent(net: Net, x: Tensor) -> Tensor:
    """Packed sequences, and a cell called in a loop."""
    sequences = [x @ net.w, (x @ net.v)[:9], x[:3]]
    with torch.device("cpu"):  # where lengths have to be
        packed = nn.utils.rnn.pack_sequence(sequences)
    out, _ = nn.utils.rnn.pad_packed_sequence(net.m["gru"](packed)[0])
    state = None
    for row in out[:6, :, :WIDTH]:
        state = net.m["cell"](row, state)
    return state[0].pow(2).mean() + out.pow(2).mean()


@loss()
def losses(net: Net, x: Tensor) -> Tensor:
    """Losses with buffers or decisions of their own."""
    scores = (x @ net.w).log_softmax(-1)
    spelled = F.ctc_loss(scores.view(8, 4, WIDTH), torch.ones(4, 3, dtype=torch.long), [8] * 4, [3] * 4)
    total = spelled + F.cosine_embedding_loss(scores, torch.tanh(x @ net.v), torch.ones(WIDTH), margin=0.1)
    total = total + F.triplet_margin_loss(scores, x, scores.roll(1, 0)) + F.smooth_l1_loss(scores, x)
    total = total + F.kl_div(scores, x.softmax(-1), reduction="batchmean") + F.margin_ranking_loss(x, scores, x.sign())
    return total + F.cross_entropy(scores, torch.arange(WIDTH), label_smoothing=0.1)


# -- control flow and functions ---------------------------------------------------------------------------------------


@step(layers)
def control_flow(net: Net, number: int, managed: helpers.Managed) -> Tensor:
    """Each step runs other ops, by its data and its number: plans do not fit, the numbers do."""
    x = batch(number)
    with managed:
        for index in range(1 + number % 3):
            x = net.m["chain"][index](x) if x.detach().sum() > 0 else F.gelu(x @ net.v)
        result = F.gelu(x[x.sum(1) > 0] @ net.w).pow(2).sum() + F.gelu(x @ net.w)[: 3 + number].sum()
        result.backward()
    return result


@loss()
def routing(net: Net, x: Tensor) -> Tensor:
    """Order, ties, shapes that depend on data."""
    x = F.gelu(x @ net.w)
    best, where = x.round().topk(4, -1)
    rows = torch.nonzero(x[:, 0] > 0).flatten()
    sent = x.index_select(0, rows) @ net.v
    x = x.index_add(0, rows, F.gelu(sent)).scatter_add(1, where, best)
    x = torch.where(x > 0.5, x, 0.25) + x.masked_fill(x < 0, 0.5) + x.sort(-1).values.cumsum(-1)
    return F.gelu(x).pow(2).mean() + torch.masked_select(x, x > 1).sum() + x.detach().unique().sum()


class Scale(torch.autograd.Function):
    """Saves an input, an intermediate and its output; keeps another tensor on `ctx`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        """An intermediate that only the backward pass sees again."""
        inner = torch.sigmoid(x @ w)
        out = inner * x
        ctx.save_for_backward(x, w, inner, out)
        ctx.on_the_side = x.cos()
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Not the true derivative; it only has to be the same twice."""
        x, w, inner, out = ctx.saved_tensors
        return grad * inner + out * ctx.on_the_side + (grad * x) @ w.t(), x.t() @ (grad * out)


class Double(torch.autograd.Function):
    """Writes over its input, and reads it in between and afterwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """`mark_dirty` counts one more write than there was."""
        x.mul_(2)
        y = x.sin()
        x.add_(y)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x, y, x.cos())
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Not the true derivative; it only has to be the same twice."""
        x, y, z = ctx.saved_tensors
        return grad * x + y * z


@loss()
def own_functions(net: Net, x: Tensor) -> Tensor:
    """Custom functions that save and that write in place."""
    x = Scale.apply(x, net.w)
    y = Double.apply(Scale.apply(F.gelu(x), net.v) @ net.w)
    return (F.gelu(y) * y @ net.v + Double.apply(net.b * 2)).pow(2).mean()


@loss()
def mapped(net: Net, x: Tensor) -> Tensor:
    """`torch.vmap`, with randomness."""
    x = torch.vmap(lambda row: F.gelu(net.w @ row))(x)
    return torch.vmap(lambda row: F.dropout(F.gelu(net.v @ row)), randomness="different")(x).pow(2).mean()


class Unseen(torch.autograd.Function):
    """Writes to its input where no dispatcher sees it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """`mark_dirty` is the only sign of it."""
        x.detach().numpy()[...] *= -3.0
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Of nothing."""
        return grad


@loss()
def unseen_writes(net: Net, x: Tensor) -> Tensor:
    """Writes that no dispatcher sees, through an alias that outlives the tensor that was recorded."""
    alias = F.gelu(x @ net.w).detach()
    alias.sum()  # known, and read
    return (Unseen.apply(alias) @ net.v * net.b).mean() + F.gelu(x @ net.w).mean()


@loss()
def unseen_after_seen(net: Net, x: Tensor) -> Tensor:
    """The same, of what an op wrote in place and nothing has read since."""
    x = F.gelu(x @ net.w)
    x.mul_(2)
    Unseen.apply(x.detach())
    return ((x @ net.v) * net.b).pow(2).mean()


# -- views, aliases, writes -------------------------------------------------------------------------------------------


@loss()
def views(net: Net, x: Tensor) -> Tensor:
    """Saved tensors that are windows: turned, sliced, strided, expanded, of another shape."""
    x = x @ net.w
    y = x.t()[3:, ::2] * x.flip(0).view(8, 4, WIDTH)[:, 1, :29].t().repeat(1, 2)
    z = x.unfold(1, 4, 2).mean(-1) @ x.as_strided((15, 5), (2, 7), 9)
    parts = torch.cat([part.sin() * part for part in x.chunk(4, 1)], 1).narrow(0, 3, 7)
    row = x[0].expand(WIDTH, WIDTH)
    return (y * y).mean() + F.gelu(z).sum() + F.gelu(parts).sum() + (row * x.diagonal() * row.exp()).mean()


@loss()
def expanded_inputs(net: Net, x: Tensor) -> Tensor:
    """Inputs that take fewer bytes than they show."""
    wide = x[:, :1].expand(WIDTH, WIDTH)
    return F.gelu((wide * net.w.sum() + net.b[None].expand(WIDTH, WIDTH)) @ net.v * wide).pow(2).mean()


@loss()
def empty_and_scalar(net: Net, x: Tensor) -> Tensor:
    """Tensors without elements, and without dimensions."""
    none = F.gelu(x[:0] @ net.w)
    scale = torch.tanh(net.b.mean()) * torch.tensor(2.0)
    x = torch.cat([F.gelu(x @ net.v * scale), none])
    return (x * x.max() / x.norm()).pow(2).mean() + none.sum() + torch.zeros(()) * scale.exp()


@loss()
def in_place(net: Net, x: Tensor) -> Tensor:
    """Writes into activations: all of them, a column, by index, by mask, by list."""
    x = (x @ net.w).relu_()
    y = F.gelu(x + 1)
    y[:, 0] = 0
    y[1:, 2:5].mul_(2)
    y.add_(x.sin()).clamp_(-3, 3)
    y.index_put_((torch.arange(4), torch.arange(4)), x[0, :4], accumulate=True)
    y[x > 1] = 0.5
    y.index_fill_(0, torch.tensor([2]), 1.5).masked_fill_(x < -1, 0.1).scatter_(1, torch.zeros(4, 1).long(), 3.0)
    z = torch.sigmoid(y @ net.v)
    torch._foreach_mul_([h := z * 1, k := z + 1], 2.0)
    torch._foreach_copy_([m := torch.empty(WIDTH, WIDTH), n := torch.empty(WIDTH)], [h.detach(), k.detach()[0]])
    sums = torch._foreach_add([h, k], [m, n])
    turned = (x + 1).t_().unsqueeze_(0).squeeze_(0)
    return F.gelu(sums[0] * sums[1] @ (z + turned.mul_(2).t_())).pow(2).mean()


@loss()
def in_place_on_overlaps(net: Net, x: Tensor) -> Tensor:
    """A write through a window whose elements overlap does not fill the storage, though they are as many."""
    x = x @ net.w
    y = x.detach().clone()
    y.view(-1).as_strided((WIDTH, WIDTH), (16, 1)).fill_(2.0)
    z = x.detach().clone().t()
    z.copy_(y)
    return F.gelu(F.gelu(y * x) @ net.v * z).pow(2).mean()


@loss()
def filled_bit_by_bit(net: Net, x: Tensor) -> Tensor:
    """An uninitialised tensor filled by slices, by `out=`, and read in between."""
    x = x @ net.w
    whole = torch.empty(WIDTH, WIDTH)
    whole[:16].copy_(x.detach()[:16])
    early = F.gelu(whole[:16] + net.b)
    whole[16:] = F.gelu(x[16:]).detach()
    done = F.gelu(whole @ net.v)
    out = torch.empty(WIDTH, WIDTH)
    torch.mul(whole, 2, out=out)
    late = F.gelu(out + net.b)
    torch.add(out, 1, out=out)
    torch.sin(x.detach(), out=out[:, :WIDTH])
    built = torch.zeros(2, WIDTH, WIDTH)
    built[0], built[1] = done, late
    return early.sum() + F.gelu(built.sum(0) @ (net.w * out)).pow(2).mean()


@loss()
def behind_autograd(net: Net, x: Tensor) -> Tensor:
    """Writes through `.data` change what autograd saved and nothing that was computed from it."""
    x = torch.sigmoid(x @ net.w)
    y = torch.tanh(x * net.v) + F.gelu(x)
    x.data.add_(1)
    data = y.data
    z = torch.sin(y @ net.v)
    data.mul_(2)
    data[3:5] = 0
    net.b.data.mul_(0.5)
    return (z * F.gelu(y * x + net.b)).pow(2).mean()


@step()
def behind_autograd_after_a_cut(net: Net, number: int, managed: helpers.Managed) -> Tensor:
    """The same between two backward passes, to parameters and activations of the older forward pass."""
    x = batch(number)
    with managed:
        hidden = F.gelu(x @ net.w + net.b)
        second = F.gelu(F.gelu(hidden + 1) @ net.v).pow(2).mean()
        third = F.gelu(F.gelu(x + net.b) @ net.v).pow(2).mean()
        (x * net.v).sin().sum().backward()
        net.w.data.add_(1)
        hidden.data.add_(1)
        with torch.no_grad():
            net.b.add_(1)
        second.backward()
        net.b.data.mul_(2)
    with managed:
        x.mul_(2)
        third.backward()
    return second + third


@loss()
def other_data(net: Net, x: Tensor) -> Tensor:
    """A tensor that is given another storage takes its recorded content with it nowhere."""
    hidden = x @ net.w
    result = F.gelu(F.gelu(hidden + net.b) @ net.v) @ net.w
    hidden.data = torch.zeros_like(hidden)
    net.w.data, net.b.data = net.w.data * 2, torch.ones_like(net.b)
    return F.gelu(result + hidden @ net.w).pow(2).mean()


@step()
def freed_storage(net: Net, number: int, managed: helpers.Managed) -> Tensor:
    """A storage that the user frees by hand is recomputed like one that died."""
    x = batch(number)
    with managed:
        with torch.no_grad():
            hidden = x @ net.w
        result = F.gelu(F.gelu(hidden + net.b) @ net.v).pow(2).mean()
        hidden.untyped_storage().resize_(0)
        result.backward()
    return result


@loss()
def detached(net: Net, x: Tensor) -> Tensor:
    """Straight-through estimators, and copies that are written."""
    x = torch.tanh(x @ net.w)
    hard = x + (x.round() - x).detach()
    copy = x.detach().clone().mul_(3)
    copy[0].zero_()
    return F.gelu(hard * copy @ net.v).pow(2).mean() + F.gelu(x * x.detach()).sum()


@loss(dtype=torch.complex64)
def complex_numbers(net: Net, x: Tensor) -> Tensor:
    """Lazy conjugates and negations, read and written through."""
    first = torch.mm(net.w.conj(), x)
    second = torch.mm(net.w, first)
    third = torch.mm(second.conj(), net.v) + torch.mm(second, net.v)
    copy = torch.empty_like(x)
    copy.conj().copy_(third)
    pair = torch.view_as_real(copy).mul(2)
    again = torch.view_as_complex(pair) * third.conj().imag * first.mH.real
    return (torch.tanh(again) * copy).abs().mean() + torch.fft.fft(again).angle().cos().mean()


@loss()
def other_types(net: Net, x: Tensor) -> Tensor:
    """Half precision, bits seen as another type, integers on the way."""
    x = (x @ net.w).bfloat16()
    y = F.gelu(x) * 0.1 + torch.tensor(2.0)
    bits = (y.detach().view(torch.int16) & -16).view(torch.bfloat16)
    return F.gelu((y * bits).double() @ net.v.double()).float().pow(2).mean() + (x.long() / 2).mean()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CASES)
def test_trains_to_the_last_bit(name: str, policy: str) -> None:
    """Not one bit of training differs, nothing stays alive, and what nobody keeps was evicted and replayed."""
    make_policy, min_nbytes = POLICIES[policy]
    session = helpers.assert_same_training(
        *CASES[name], make_policy(), plain=plain_training(name), min_nbytes=min_nbytes
    )
    if policy == "keep-none-nor-small":
        helpers.assert_worked(session)


# -- memory -----------------------------------------------------------------------------------------------------------


def recurrent_step(net: Net, hidden: Tensor) -> Tensor:
    """One step of truncated back-propagation: the hidden state to carry on."""
    hidden = torch.tanh(net.m["chain"](hidden * 0.9) @ net.w)
    hidden.pow(2).mean().backward()
    return hidden.detach()


def footprint(session: Session) -> tuple[int, int, int]:
    """What a session holds: live bytes, storages it follows, activations there are."""
    ledger = session._ledger
    return ledger.live_nbytes, len(ledger.storages), helpers.live_activations()


@pytest.mark.parametrize("policy", [KeepNone(), EveryN(2), MemoryOptimal(0.3)], ids=repr)
@pytest.mark.parametrize("many", [False, True], ids=["one-entry", "many-entries"])
def test_truncated_back_propagation_holds_memory_flat(policy: Any, many: bool) -> None:
    """A state carried over from step to step does not chain the steps together, in one entry of the session or in
    many: after two hundred steps it holds what it held after twenty."""
    torch.manual_seed(0)
    net, session = Net(layers, torch.float32), Session(policy)
    hidden, held = batch(0), {}
    with nullcontext() if many else session:
        for number in range(200):
            with session if many else nullcontext():
                hidden = recurrent_step(net, hidden)
            if number in (19, 199):
                held[number] = footprint(session)
    assert held[19] == held[199]


@pytest.mark.parametrize("policy", [KeepNone(), EveryN(2)], ids=repr)
def test_a_loop_without_gradients_holds_memory_flat(policy: Any) -> None:
    """Thousands of ops that nothing is saved of are forgotten on the way."""
    session, hidden, held = Session(policy), batch(0), []
    with session, torch.no_grad():
        for number in range(20_000):
            hidden = torch.sin(hidden)
            if number % 4000 == 3999:
                held.append(helpers.live_activations())
    assert max(held) < 5000
    assert helpers.live_activations() == 0


@pytest.mark.parametrize("min_nbytes", [0, 1024])
def test_recomputed_values_go_after_each_backward_pass(min_nbytes: int) -> None:
    """With `retain_graph=True` what was recomputed goes again, and the next backward pass replays the same ops."""
    torch.manual_seed(0)
    net, session = Net(layers, torch.float32), Session(KeepNone(), min_nbytes=min_nbytes)
    with session:
        result = F.gelu(net.m["chain"](batch(0)) @ net.w).pow(2).mean()
        before, replayed = session._ledger.live_nbytes, []
        for retain in (True, True, False):
            count = session.last_step.ops_replayed
            grads = torch.autograd.grad(result, list(net.m.parameters()), retain_graph=retain)
            replayed.append(session.last_step.ops_replayed - count)
            del grads
            assert session._ledger.live_nbytes <= before
    assert replayed[0] == replayed[1] == replayed[2] > 0


def test_a_long_chain_of_ops_is_freed() -> None:
    """A graph of ten thousand ops in a row goes without overflowing the stack."""
    net, session = Net(layers, torch.float32), Session(KeepNone())
    with session:
        hidden = batch(0) @ net.w
        for _ in range(10_000):
            hidden = hidden.sin()
        del hidden
    assert helpers.live_activations() == 0


def test_sparse_results() -> None:
    """An op that makes a sparse tensor of a dense one: what it read is evicted and replayed, the result is kept."""
    x = torch.tensor([[1.0, 0.0], [0.5, 2.0]], requires_grad=True)
    (plain,) = torch.autograd.grad(x.exp().sub(1).to_sparse().to_dense().sin().sum(), x)
    with Session(KeepNone(), min_nbytes=0) as session:
        (managed,) = torch.autograd.grad(x.exp().sub(1).to_sparse().to_dense().sin().sum(), x)
    assert helpers.same_bits(plain, managed)
    assert session.stats.ops_replayed > 0


def test_normalisation_without_statistics() -> None:
    """The overload of a normalisation op that takes no running statistics is an op like any other."""
    x = batch(0).requires_grad_()

    def result() -> Tensor:
        return torch.ops.aten._native_batch_norm_legit(x.exp(), None, None, True, 0.1, 1e-5)[0].sin().sum()

    (plain,) = torch.autograd.grad(result(), x)
    with Session(KeepNone(), min_nbytes=0) as session:
        (managed,) = torch.autograd.grad(result(), x)
    assert helpers.same_bits(plain, managed)
    assert session.stats.ops_replayed > 0
