"""Programs by chance: a few registers of tensors, and instructions that compute, look, write, draw, mark and sweep.

A program is run plain or managed by a session, from the same seed, for some steps. What it leaves behind must not
differ in one bit. Every instruction makes do with whatever its registers hold, so that any list of them is a program
and a failing one shrinks to the few that matter; what PyTorch refuses is noted and skipped.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import rekindle
from helpers import random_states, seeded, set_random_states
from rekindle import EvictionPolicy, Session
from rekindle.policy import PolicyLike
from rekindle.record.torch_private import without_dispatch_modes

REGISTERS = 4
LARGEST = 4  # matrices in one register; what is larger is cut


class Stop(Exception):
    """An error of the user's own."""


@dataclass(frozen=True)
class Do:
    """An instruction: which, the registers that it reads, the one that it sets, a small number, and whether gradients
    are recorded."""

    what: str
    x: int = 0
    y: int = 1
    to: int = 0
    k: int = 0
    grad: bool = True


@dataclass(frozen=True)
class Fault:
    """An error of the user's own, raised by an instruction of a step, or by a hook on what that reads as the backward
    pass comes by; caught around the session, or inside of it, which then goes on with another forward pass."""

    step: int
    at: int
    hook: bool
    inside: bool


@dataclass(frozen=True)
class Program:
    """What is run: the instructions by module, and how each step ends.

    Attributes:
        blocks: instructions, those of one module each.
        ends: how the backward pass of each step is run: one of `ENDS`.
        width: of all matrices.
        autocast: runs in bfloat16 where PyTorch would.
        carry: the first register comes back in the last one of the next step: "", "detached" or "attached".
        holds: the registers are held during the backward pass.
        frozen: the weight takes no gradient.
        fault: an error of the user's own.
    """

    blocks: tuple[tuple[Do, ...], ...]
    ends: tuple[str, ...] = ("sum", "sum")
    width: int = 8
    autocast: bool = False
    carry: str = ""
    holds: bool = False
    frozen: bool = False
    fault: Fault | None = None


class Block(nn.Module):
    """Runs the instructions of one module."""

    def __init__(self, instructions: tuple[Do, ...]) -> None:
        super().__init__()
        self.instructions = instructions

    def forward(self, machine: Machine) -> None:
        """Run them."""
        for do in self.instructions:
            machine.run(do)


class Net(nn.Module):
    """The parameters and buffers that instructions use."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        width = program.width
        self.weight = nn.Parameter(torch.randn(width, width) / math.sqrt(width), not program.frozen)
        self.bias = nn.Parameter(torch.randn(width) / 4)
        self.scale = nn.Parameter(1 + torch.randn(width) / 8)
        self.kernel = nn.Parameter(torch.randn(2, 1, 3) / 2)
        self.table = nn.Parameter(torch.randn(5, width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))
        self.register_buffer("seen", torch.zeros(width))
        self.blocks = nn.ModuleList(map(Block, program.blocks))

    def forward(self, machine: Machine) -> Machine:
        """Run all."""
        for block in self.blocks:
            block(machine)
        return machine


@dataclass
class Machine:
    """One forward pass on its way.

    Attributes:
        registers: what the user holds.
        log: what PyTorch refused, by the number of the instruction.
        leaves: tensors made inside that take gradients.
        marks: what `session.mark` returned.
    """

    net: Net
    width: int
    registers: list[Tensor]
    generator: torch.Generator
    session: Session | None
    fault: Fault | None = None
    log: list[tuple[int, str]] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)
    marks: list[rekindle.Activation] = field(default_factory=list)
    number: int = -1

    def run(self, do: Do) -> None:
        """One instruction; what PyTorch refuses is noted."""
        self.number += 1
        if self.fault is not None and self.number == self.fault.at:
            self._fail(do)
        with self._noting(self.number), nullcontext() if do.grad else torch.no_grad():
            result = INSTRUCTIONS[do.what](self, self._at(do.x), self._at(do.y), do.k)
            if result is not None:
                self._set(do.to, result)

    def _at(self, register: int) -> Tensor:
        return self.registers[register % REGISTERS]

    def _set(self, register: int, result: Tensor | Iterable[Tensor]) -> None:
        results = [result] if isinstance(result, Tensor) else list(result)[:REGISTERS]
        for place, tensor in enumerate(results):
            self.registers[(register + place) % REGISTERS] = self._tame(tensor)

    def _tame(self, tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        if not tensor.is_floating_point():
            tensor = tensor.float()
        if tensor.numel() > LARGEST * self.width**2:
            tensor = tensor.reshape(-1)[: self.width**2]
        return tensor

    def _fail(self, do: Do) -> None:
        assert self.fault is not None
        if not self.fault.hook:
            raise Stop
        tensor = self._at(do.x)
        if hookable(tensor):
            tensor.register_hook(_stop)

    def losses(self) -> list[Tensor]:
        """One of each register that takes a gradient."""
        losses = []
        for register in range(REGISTERS):
            with self._noting(-1 - register):
                if self.registers[register].requires_grad:
                    losses.append(self.registers[register].float().square().mean())
        return losses

    @contextlib.contextmanager
    def _noting(self, number: int) -> Iterator[None]:
        try:
            yield
        except rekindle.BudgetInfeasible:
            raise
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            self.log.append((number, kind_of(error)))

    def wide(self, tensor: Tensor) -> Tensor:
        """As a matrix of rows of the width."""
        if tensor.dim() and tensor.shape[-1] == self.width:
            return tensor.reshape(-1, self.width)
        flat = tensor.reshape(-1)
        if flat.numel() >= self.width:
            return flat[: flat.numel() // self.width * self.width].view(-1, self.width)
        return flat[:1].expand(2, self.width)

    def single(self, tensor: Tensor) -> Tensor:
        """As a matrix of the type of the parameters."""
        return self.wide(tensor).to(self.net.weight.dtype)


_OVERWRITTEN = (
    "modified inplace",
    "modified by an inplace operation",
    "modified since by an in-place operation",  # what it would be recomputed from
)


def kind_of(error: BaseException) -> str:
    """The name of the kind of an error that is alike for plain PyTorch and for Rekindle."""
    if isinstance(error, RuntimeError):
        return "overwritten" if any(words in str(error) for words in _OVERWRITTEN) else "RuntimeError"
    return type(error).__name__


def hookable(tensor: Tensor) -> bool:
    """Whether it takes hooks. PyTorch crashes where an in-place write to a view of it has failed, unless it is asked
    for its node before, which raises there."""
    try:
        return tensor.requires_grad and (tensor.is_leaf or tensor.grad_fn is not None)
    except RuntimeError:
        return False


def _stop(gradient: Tensor) -> None:
    raise Stop


def like(other: Tensor, x: Tensor) -> Tensor:
    """Something of `other` that goes with `x`."""
    return other if other.shape == x.shape else other.reshape(-1)[:1]


def whole(tensor: Tensor) -> Tensor:
    """Itself, if it can be written to: an op that fails half-way is not taken to have written what it has."""
    if 0 in tensor.stride():
        raise RuntimeError("expanded")
    return tensor


def nothing(tensor: Tensor) -> None:
    """A buffer goes into no register: a write with gradients would have it hold the step for ever."""


class Cube(torch.autograd.Function):
    """Saves what it reads and what it makes."""

    @staticmethod
    def forward(ctx, x):
        """x to the third."""
        result = x * x * x
        ctx.save_for_backward(x, result)
        return result

    @staticmethod
    def backward(ctx, gradient):
        """Uses both."""
        x, result = ctx.saved_tensors
        return gradient * (3 * x * x) + 0 * result


class Kernel(torch.autograd.Function):
    """Writes to what it reads, as a kernel that no dispatcher shows; only `mark_dirty` tells of it."""

    @staticmethod
    def forward(ctx, x):
        """Three quarters of x, in place."""
        with without_dispatch_modes():
            x.detach().mul_(0.75)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        """Saves nothing."""
        return gradient * 0.75


# -- instructions ------------------------------------------------------------------------------------------------------

Instruction = Callable[[Machine, Tensor, Tensor, int], Any]
POINTWISE: dict[str, Instruction] = {
    "tanh": lambda m, x, y, k: x.tanh(),
    "exp": lambda m, x, y, k: x.clamp(max=2).exp(),
    "gelu": lambda m, x, y, k: F.gelu(x),
    "relu": lambda m, x, y, k: F.relu(x),
    "silu": lambda m, x, y, k: F.silu(x),
    "add": lambda m, x, y, k: x + like(y, x),
    "mul": lambda m, x, y, k: x * like(y, x),
    "square": lambda m, x, y, k: x * x,
    "div": lambda m, x, y, k: x / (1 + like(y, x).square()),
    "scaled": lambda m, x, y, k: x * (k / 4),
    "where": lambda m, x, y, k: torch.where(x > 0, x, like(y, x)),
    "maximum": lambda m, x, y, k: torch.maximum(x, like(y, x)),
    "lerp": lambda m, x, y, k: torch.lerp(x, like(y, x).to(x.dtype), 0.25),
    "addcmul": lambda m, x, y, k: torch.addcmul(x, x, like(y, x).to(x.dtype), value=0.5),
    "cube": lambda m, x, y, k: Cube.apply(x.clamp(-1, 1)),
    "double": lambda m, x, y, k: x.double(),
    "half": lambda m, x, y, k: x.bfloat16(),
    "clone": lambda m, x, y, k: x.clone(),
    "cumsum": lambda m, x, y, k: m.wide(x).cumsum(k % 2) / m.width,
    "sum": lambda m, x, y, k: m.wide(x).sum(k % 2, keepdim=True),
    "fft": lambda m, x, y, k: torch.fft.rfft(m.single(x)).conj() * 0.5,
    "norm": lambda m, x, y, k: F.normalize(m.wide(x), dim=k % 2),
}
LAYERS: dict[str, Instruction] = {
    "linear": lambda m, x, y, k: F.linear(m.single(x), m.net.weight, m.net.bias),
    "mm": lambda m, x, y, k: m.single(x) @ m.net.weight,
    "mm_t": lambda m, x, y, k: m.single(x) @ m.net.weight.t(),
    "gram": lambda m, x, y, k: m.wide(x) @ m.wide(y).to(x.dtype).t() / m.width,
    "bmm": lambda m, x, y, k: torch.einsum("ij,kj->ki", m.single(x), m.net.weight),
    "layer_norm": lambda m, x, y, k: F.layer_norm(m.single(x), (m.width,), m.net.scale, m.net.bias),
    "batch_norm": lambda m, x, y, k: F.batch_norm(
        m.single(x), m.net.mean, m.net.variance, m.net.scale, m.net.bias, training=k % 3 > 0
    ),
    "batch_norm_alone": lambda m, x, y, k: F.batch_norm(m.single(x), None, None, m.net.scale, training=True),
    "group_norm": lambda m, x, y, k: F.group_norm(m.single(x), 2, m.net.scale, m.net.bias),
    "rms_norm": lambda m, x, y, k: F.rms_norm(m.single(x), (m.width,), m.net.scale),
    "softmax": lambda m, x, y, k: m.wide(x).softmax(k % 2),
    "log_softmax": lambda m, x, y, k: m.wide(x).log_softmax(k % 2),
    "conv": lambda m, x, y, k: F.conv1d(m.single(x).unsqueeze(1), m.net.kernel, padding=1)[:, k % 2],
    "conv2d": lambda m, x, y, k: F.conv2d(m.single(x)[None, None], m.net.kernel[:, :, None], padding=(0, 1))[0, k % 2],
    "max_pool": lambda m, x, y, k: F.max_pool1d(m.single(x)[None], 2)[0],
    "avg_pool": lambda m, x, y, k: F.avg_pool1d(m.wide(x)[None], 3, 1, 1)[0],
    "embedding": lambda m, x, y, k: F.embedding(m.wide(x).argmax(1) % 5, m.net.table),
    "attention": lambda m, x, y, k: F.scaled_dot_product_attention(*[m.single(x)[None, None]] * 3)[0, 0],
    "scale": lambda m, x, y, k: m.single(x) * m.net.scale + m.net.bias,
    "weight": lambda m, x, y, k: m.net.weight,
    "weight_view": lambda m, x, y, k: m.net.weight.t()[k % m.width :],
    "cross_entropy": lambda m, x, y, k: F.cross_entropy(m.wide(x), m.wide(x).argmin(1)),
}
VIEWS: dict[str, Instruction] = {
    "same": lambda m, x, y, k: x,
    "transpose": lambda m, x, y, k: m.wide(x).t(),
    "slice": lambda m, x, y, k: x[k % max(1, x.shape[0]) :],
    "stepped": lambda m, x, y, k: x[..., k % 2 :: 2],
    "narrow": lambda m, x, y, k: m.wide(x).narrow(1, k % m.width, m.width - k % m.width),
    "expand": lambda m, x, y, k: m.wide(x)[:1].expand(3, -1),
    "flat": lambda m, x, y, k: x.reshape(-1),
    "view": lambda m, x, y, k: m.wide(x).view(m.width, -1),
    "select": lambda m, x, y, k: x[k % max(1, x.shape[0])],
    "chunk": lambda m, x, y, k: m.wide(x).chunk(2, k % 2),
    "split": lambda m, x, y, k: m.wide(x).split(3, 1),
    "unbind": lambda m, x, y, k: m.wide(x)[:2].unbind(0),
    "diagonal": lambda m, x, y, k: m.wide(x).diagonal(),
    "unfold": lambda m, x, y, k: m.wide(x).unfold(1, 3, 2),
    "squeeze": lambda m, x, y, k: x[None].squeeze(),
    "strided": lambda m, x, y, k: x.as_strided((2, 2), (1, 2), x.storage_offset()),
    "detach": lambda m, x, y, k: x.detach(),
    "contiguous": lambda m, x, y, k: x.contiguous(),
    "real": lambda m, x, y, k: torch.view_as_complex(m.single(x).reshape(-1, 2)).conj().imag,
}
SEVERAL: dict[str, Instruction] = {
    "topk": lambda m, x, y, k: m.wide(x).topk(1 + k % 4, dim=1),
    "max": lambda m, x, y, k: m.wide(x).max(k % 2),
    "max_all": lambda m, x, y, k: x.max(),
    "prod": lambda m, x, y, k: m.wide(x).tanh().prod(k % 2),
    "var_mean": lambda m, x, y, k: torch.var_mean(m.wide(x), k % 2, correction=0),
    "sort": lambda m, x, y, k: m.wide(x).sort(k % 2),
    "gather": lambda m, x, y, k: m.wide(x).gather(1, m.wide(x).argsort(1)[:, :3]),
    "index": lambda m, x, y, k: m.wide(x)[m.wide(y).argmax(1) % m.wide(x).shape[0]],
    "mask": lambda m, x, y, k: x[x > 0],
    "cat": lambda m, x, y, k: torch.cat([m.wide(x), m.wide(y).to(x.dtype)]),
    "stack": lambda m, x, y, k: torch.stack([x, x * like(y, x)]),
    "pad": lambda m, x, y, k: F.pad(m.wide(x), (1, k % 3)),
    "roll": lambda m, x, y, k: m.wide(x).roll(k, 1).flip(0),
    "tril": lambda m, x, y, k: m.wide(x).tril(k % 3),
    "empty": lambda m, x, y, k: torch.empty_like(x).copy_(x) * 2,
    "zeros": lambda m, x, y, k: torch.zeros_like(x) + like(y, x),
    "split_copy": lambda m, x, y, k: torch.split_copy(m.wide(x), 3, 1),
}
WRITES: dict[str, Instruction] = {
    "add_": lambda m, x, y, k: x.add_(like(y, x)),
    "mul_": lambda m, x, y, k: x.mul_(1 + k / 4),
    "mul_other_": lambda m, x, y, k: x.mul_(like(y, x)),
    "relu_": lambda m, x, y, k: x.relu_(),
    "tanh_": lambda m, x, y, k: x.tanh_(),
    "exp_": lambda m, x, y, k: x.clamp_(max=1).exp_(),
    "sigmoid_": lambda m, x, y, k: x.sigmoid_(),
    "zero_": lambda m, x, y, k: x.zero_(),
    "fill_": lambda m, x, y, k: x.fill_(k / 4),
    "copy_": lambda m, x, y, k: x.copy_(like(y, x)),
    "row_": lambda m, x, y, k: x[k % max(1, x.shape[0])].mul_(2),
    "column_": lambda m, x, y, k: x[..., k % 2 :: 2].add_(1),
    "set_": lambda m, x, y, k: x.__setitem__((..., k % 3), 0.5),
    "assign_": lambda m, x, y, k: x.__setitem__(slice(k % 3), y.reshape(-1)[:1]),
    "masked_": lambda m, x, y, k: x.masked_fill_(x.detach() > 0.5, 0.25),
    "mask_set_": lambda m, x, y, k: x.__setitem__(x.detach() > 0.5, 0.25),
    "index_add_": lambda m, x, y, k: m.wide(x).index_add_(0, torch.tensor([0]), m.wide(y)[:1].to(x.dtype)),
    "scatter_": lambda m, x, y, k: m.wide(x).scatter_(1, torch.zeros(1, 1).long(), 0.75),
    "addmm_": lambda m, x, y, k: m.single(x).addmm_(m.single(x), m.net.weight, alpha=0.1),
    "t_": lambda m, x, y, k: x.t_(),
    "out_": lambda m, x, y, k: torch.mul(x, like(y, x), out=x),
    "foreach_": lambda m, x, y, k: torch._foreach_mul_([whole(x), whole(y)], 1.25),
    "add_inner_": lambda m, x, y, k: m.wide(x).t()[: 1 + k % 3].add_(0.5),
    "diagonal_": lambda m, x, y, k: m.wide(x).fill_diagonal_(0.5),
    "normal_": lambda m, x, y, k: x.normal_(),
    "normal_row_": lambda m, x, y, k: x[: 1 + k % 2].uniform_(),
    "bernoulli_": lambda m, x, y, k: x.bernoulli_(0.5, generator=m.generator),
    "dropout_": lambda m, x, y, k: F.dropout(x, 0.3, inplace=True),
    "leaky_": lambda m, x, y, k: F.leaky_relu(x, 0.1, inplace=True),
    "zero_detached_": lambda m, x, y, k: x.detach()[..., :1].zero_(),
    "seen_": lambda m, x, y, k: nothing(m.net.seen.lerp_(m.single(x).detach().mean(0), 0.1)),
    "seen": lambda m, x, y, k: m.single(x) * m.net.seen,
    "statistics": lambda m, x, y, k: (m.single(x) - m.net.mean) * m.net.variance,
    "bias_": lambda m, x, y, k: m.net.bias.mul_(0.9),
    "weight_row_": lambda m, x, y, k: m.net.weight[k % 3].mul_(0.9),
}
DRAWS: dict[str, Instruction] = {
    "dropout": lambda m, x, y, k: F.dropout(x, 0.25),
    "feature_dropout": lambda m, x, y, k: F.dropout1d(m.wide(x)[None], 0.25)[0],
    "alpha_dropout": lambda m, x, y, k: F.alpha_dropout(x, 0.25, training=True),
    "rand_like": lambda m, x, y, k: x * torch.rand_like(x),
    "randn": lambda m, x, y, k: m.wide(x) + torch.randn(m.width, generator=m.generator),
    "bernoulli": lambda m, x, y, k: x * torch.bernoulli(x.detach().sigmoid(), generator=m.generator),
    "bernoulli_p": lambda m, x, y, k: x * torch.bernoulli(torch.full_like(x, 0.5)),
    "permuted": lambda m, x, y, k: m.wide(x)[torch.randperm(m.wide(x).shape[0])],
    "gumbel": lambda m, x, y, k: F.gumbel_softmax(m.single(x), hard=k % 2 > 0),
    "noisy_attention": lambda m, x, y, k: F.scaled_dot_product_attention(*[m.single(x)[None, None]] * 3, dropout_p=0.2)[
        0, 0
    ],
}


def _leaf(m: Machine, x: Tensor, y: Tensor, k: int) -> Tensor:
    """A new leaf, with the content of what was there."""
    leaf = (x.detach() if k % 2 else x.detach().clone()).requires_grad_()
    m.leaves.append(leaf)
    return leaf


def _branch(m: Machine, x: Tensor, y: Tensor, k: int) -> Tensor:
    return x.sin() if x.sum() > 0 else x * like(y, x)


def _truncate(m: Machine, x: Tensor, y: Tensor, k: int) -> Tensor:
    """A backward pass in the middle, and on without its graph."""
    x.square().mean().backward(retain_graph=k % 2 > 0)
    return x.detach()


def _inner_gradient(m: Machine, x: Tensor, y: Tensor, k: int) -> Tensor | None:
    (gradient,) = torch.autograd.grad(x.sin().sum(), m.net.scale, create_graph=True, allow_unused=True)
    return gradient


def _mark(m: Machine, x: Tensor, y: Tensor, k: int) -> None:
    if m.session is not None:
        with contextlib.suppress(rekindle.UnknownTensor):
            m.marks.append(m.session.mark(x))


def sweep(session: Session | None, k: int) -> None:
    """One of the ways to let go."""
    if session is None:
        return
    policy = EvictionPolicy.AGGRESSIVE if k % 2 else EvictionPolicy.ALWAYS_SAFE
    if k // 2 % 3 == 0:
        session.sweep(policy)
    elif k // 2 % 3 == 1:
        session.sweep_to_target(256 * k, policy)
    else:
        session.snapshots.cleanup_stale()


def _evict(m: Machine, x: Tensor, y: Tensor, k: int) -> None:
    if m.session is not None and m.marks:
        m.session.try_evict(
            m.marks[k % len(m.marks)], EvictionPolicy.AGGRESSIVE if k % 2 else EvictionPolicy.ALWAYS_SAFE
        )


@dataclass(frozen=True)
class Hook:
    """A tensor hook: sweeps, or changes the gradient."""

    session: Session | None
    k: int

    def __call__(self, gradient: Tensor | None) -> Tensor | None:
        sweep(self.session, self.k)
        return gradient * 0.5 if gradient is not None and self.k % 3 == 0 else None


def _hook(m: Machine, x: Tensor, y: Tensor, k: int) -> None:
    if hookable(x):
        x.register_hook(Hook(m.session, k))


def _looked_at(x: Tensor) -> Tensor | None:
    """A copy of what autograd saved: plain PyTorch gives away its own bytes, a twin that saves copies does not."""
    saved = getattr(x.grad_fn, "_saved_result", None)
    return saved.detach().clone() if isinstance(saved, Tensor) else None


CONTROL: dict[str, Instruction] = {
    "leaf": _leaf,
    "branch": _branch,
    "truncate": _truncate,
    "inner_gradient": _inner_gradient,
    "mark": _mark,
    "sweep": lambda m, x, y, k: sweep(m.session, k),
    "evict": _evict,
    "hook": _hook,
    "look": lambda m, x, y, k: _looked_at(x),
}
KERNELS: dict[str, Instruction] = {
    "kernel_": lambda m, x, y, k: Kernel.apply(x),
    "kernel_detached_": lambda m, x, y, k: nothing(Kernel.apply(x.detach())),
}
FAMILIES = (POINTWISE, LAYERS, VIEWS, SEVERAL, WRITES, WRITES, DRAWS, CONTROL)
INSTRUCTIONS: dict[str, Instruction] = {name: run for family in (*FAMILIES, KERNELS) for name, run in family.items()}
ENDS = ("sum", "outside", "pieces", "twice", "double", "grad", "none")


def _run(step: Callable[[], None]) -> None:
    step()


# -- running one -------------------------------------------------------------------------------------------------------


class Twin:
    """A program on its way, plain or managed, and the random states that it goes on with."""

    def __init__(self, program: Program, session: Session | None, copies: bool = False) -> None:
        """With `copies` autograd saves copies, which no write can change, and gives away others."""
        self.program, self.session, self.copies = program, session, copies
        self.applied = False
        torch.manual_seed(0)
        self.net = Net(program)
        self.generator = seeded(1)
        self.states = random_states()
        self.carried: Tensor | None = None

    def apply(self, policy: PolicyLike, **options: Any) -> Session:
        """Have the session that the network is applied with manage it."""
        self.session, self.applied = rekindle.session_of(rekindle.apply(self.net, policy, **options)), True
        return self.session

    def step(self, number: int, around: Callable[[Callable[[], None]], object] = _run) -> dict[str, Any]:
        """One step, run by `around`; all that it leaves behind."""
        self._untie()
        self.net.zero_grad()
        set_random_states(self.states)
        left: dict[str, Any] = {}
        with contextlib.suppress(Stop):
            around(lambda: self._step(number, left))
        self._untie()
        self.states = random_states()
        left |= {f"gradient of {name}": p.grad for name, p in self.net.named_parameters()}
        left |= {name: tensor.detach().clone() for name, tensor in self.net.state_dict().items()}
        left |= {f"random state, {device}": state for device, state in self.states.items()}
        left["generator"] = self.generator.get_state()
        with torch.no_grad():
            for parameter in self.net.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.nan_to_num().clamp(-1, 1), alpha=0.05)
        return left

    def _untie(self) -> None:
        """Detach the weight, if it is frozen and something with a gradient was written to it."""
        for parameter in self.net.parameters():
            if not parameter.is_leaf:
                parameter.detach_()

    def _copy(self, tensor: Tensor) -> Tensor:
        """A copy of all of its storage: with other strides, kernels may round in another way. Not of running
        statistics, to which writes are not counted."""
        tensor = tensor.detach()
        statistics = self.net.mean.untyped_storage(), self.net.variance.untyped_storage()
        if tensor.untyped_storage()._cdata in [storage._cdata for storage in statistics]:
            return tensor
        if tensor.is_conj() or tensor.is_neg():
            return tensor.clone()
        copy = torch.empty(0, dtype=tensor.dtype)
        return copy.set_(tensor.untyped_storage().clone(), tensor.storage_offset(), tensor.size(), tensor.stride())

    def take_over(self, other: Twin) -> None:
        """Be where the other one is."""
        self.net.load_state_dict(other.net.state_dict())
        self.states = other.states
        self.generator.set_state(other.generator.get_state())

    def _step(self, number: int, left: dict[str, Any]) -> None:
        fault, end = self.program.fault, self.program.ends[number]
        fault = fault if fault is not None and fault.step == number else None
        batches = [self._batch(number)]
        outside = None
        with ExitStack() as stack:
            if self.copies:
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._copy, self._copy))
            with nullcontext() if self.applied or self.session is None else self.session:
                try:
                    outside = self._once(batches[0], fault, end, left, "")
                except Stop:
                    if fault is None or not fault.inside:
                        raise
                    left["stopped"] = True
                    batches.append(self._batch(number + 100))
                    outside = self._once(batches[1], None, end, left, "again: ")
            if outside is not None:
                backward(outside, "sum", self, left)
        left |= {f"input {place}": tensor for place, tensor in enumerate(chain(*batches))}

    def _batch(self, seed: int) -> list[Tensor]:
        draw = seeded(seed)
        width = self.program.width
        x, y = (torch.randn(width, width, generator=draw) for _ in range(2))
        return [x, y.requires_grad_()]

    def _once(self, batch: list[Tensor], fault: Fault | None, end: str, left: dict[str, Any], name: str) -> Any:
        program = self.program
        registers = [batch[0] * 1, batch[0], batch[1] * 1, batch[1] if self.carried is None else self.carried]
        machine = Machine(self.net, program.width, registers, self.generator, self.session, fault)
        del registers
        self.carried = None  # whatever a fault leaves of it is nobody's
        with torch.autocast("cpu", torch.bfloat16) if program.autocast else nullcontext():
            self.net(machine)
            losses = machine.losses()
        left[f"{name}log"] = machine.log
        with torch.no_grad():
            left |= {f"{name}register {n}": tensor.detach().clone() for n, tensor in enumerate(machine.registers)}
        left |= {f"{name}loss {place}": loss.detach().clone() for place, loss in enumerate(losses)}
        left |= {f"{name}leaf {place}": leaf for place, leaf in enumerate(machine.leaves)}
        if program.carry:
            first = machine.registers[0]
            self.carried = first.detach() if program.carry == "detached" else first
            del first
        if not program.holds:
            machine.registers.clear()
            del machine
        if end == "outside":
            return losses
        backward(losses, end, self, left)
        return None


def backward(losses: list[Tensor], end: str, twin: Twin, left: dict[str, Any]) -> None:
    """Run the backward pass in one of the ways."""
    if not losses or end == "none":
        return
    try:
        _BACKWARD[end](losses, twin)
    except rekindle.BudgetInfeasible:
        raise
    except RuntimeError as error:
        left["backward"] = kind_of(error)
        left["why"] = str(error)
        for parameter in twin.net.parameters():
            if parameter.is_leaf:
                parameter.grad = None  # how far it came is nobody's business


def _pieces(losses: list[Tensor], twin: Twin) -> None:
    for loss in losses[:-1]:
        loss.backward(retain_graph=True)
        sweep(twin.session, 1)
    losses[-1].backward()


def _twice(losses: list[Tensor], twin: Twin) -> None:
    total = sum(losses)
    total.backward(retain_graph=True)
    sweep(twin.session, 0)
    total.backward()


def _double(losses: list[Tensor], twin: Twin) -> None:
    parameters = [p for p in twin.net.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(sum(losses), parameters, create_graph=True, allow_unused=True)
    seen = [gradient.square().sum() for gradient in gradients if gradient is not None and gradient.requires_grad]
    if seen:
        sum(seen).backward()


def _grad(losses: list[Tensor], twin: Twin) -> None:
    parameters = [p for p in twin.net.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(sum(losses), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


_BACKWARD: dict[str, Callable[[list[Tensor], Twin], None]] = {
    "sum": lambda losses, twin: sum(losses).backward(),
    "pieces": _pieces,
    "twice": _twice,
    "double": _double,
    "grad": _grad,
}


# -- drawing one -------------------------------------------------------------------------------------------------------

_registers = st.integers(0, REGISTERS - 1)
_gradients = st.sampled_from([True, True, True, True, True, True, True, False])
_names = st.one_of(*(st.sampled_from(sorted(family)) for family in FAMILIES))
_deep = st.sampled_from(["gelu", "tanh", "square", "dropout", "norm", *sorted(LAYERS), *sorted(DRAWS)])
anything = st.builds(Do, _names, _registers, _registers, _registers, st.integers(0, 7), _gradients)
kernels = st.builds(Do, st.sampled_from(sorted(KERNELS)), _registers, _registers, _registers, st.integers(0, 7))
layers = st.builds(Do, _deep, st.just(0), _registers, st.just(0), st.integers(0, 7))
"""One after the other on the first register: without these, most programs are as shallow as puddles."""
faults = st.builds(Fault, st.integers(0, 1), st.integers(0, 8), st.booleans(), st.booleans())


@st.composite
def programs(draw: st.DrawFn, any_of: Sequence[st.SearchStrategy[Do]] = (anything, layers), least: int = 1) -> Program:
    """Any program of up to three modules with up to ten instructions each."""
    one = st.lists(st.one_of(*any_of), min_size=least, max_size=10).map(tuple)
    blocks = draw(st.lists(one, min_size=1, max_size=3))
    return Program(
        tuple(blocks),
        tuple(draw(st.lists(st.sampled_from(ENDS), min_size=2, max_size=3))),
        autocast=draw(st.sampled_from([False, False, False, True])),
        carry=draw(st.sampled_from(["", "", "", "detached", "attached"])),
        holds=draw(st.booleans()),
        frozen=draw(st.sampled_from([False, False, False, True])),
        fault=draw(st.none() | st.none() | faults),
    )


@st.composite
def programs_within(draw: st.DrawFn) -> Program:
    """A program with many layers and large matrices, the backward pass inside the session, and no error of the user's
    own: of a budget of that size, what is kept back has room for states of generators."""
    program = draw(programs((anything, layers, layers, layers), least=6))
    inside = [end for end in ENDS if end not in ("outside", "none")]
    return replace(program, ends=(draw(st.sampled_from(inside)),) * 4, width=128, carry="", fault=None)
