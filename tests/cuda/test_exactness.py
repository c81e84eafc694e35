"""What only a CUDA device does, under sessions that evict everything: the same bits as plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import helpers
import rekindle
from rekindle import KeepNone, MemoryOptimal


class Attention(nn.Module):
    """A block of attention with dropout inside."""

    def __init__(self, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend to what came before."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.project(self.norm(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=0.2, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


def attention(number: int) -> Tensor:
    """A batch of sequences."""
    generator = torch.Generator("cuda").manual_seed(number)
    return torch.randn(4, 64, 128, device="cuda", generator=generator)


def blocks() -> nn.Module:
    """Three of them."""
    return nn.Sequential(Attention(), Attention(), Attention()).to("cuda")


def check(make: Callable[[], nn.Module], step: helpers.Step) -> None:
    """Train plain, with everything evicted, and by a plan."""
    plain = helpers.train(make, step)
    for policy in (KeepNone(), MemoryOptimal(0.3)):
        session = helpers.assert_same_training(make, step, policy, plain=plain, min_nbytes=0)
        helpers.assert_worked(session)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None], ids=["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
def test_attention_kernels(backend: SDPBackend, dtype: torch.dtype | None) -> None:
    """Fused attention draws its dropout from a seed and an offset of the device's generator: it draws the same again,
    under autocast too."""
    if backend is SDPBackend.FLASH_ATTENTION and dtype is None:
        pytest.skip("there is no such kernel for float32")

    def step(model: nn.Module, number: int, managed: Any) -> Tensor:
        with managed, sdpa_kernel(backend), torch.autocast("cuda", dtype, enabled=dtype is not None):
            loss = model(attention(number)).float().square().mean()
            loss.backward()
        return loss

    check(blocks, step)


def test_gradient_scaler() -> None:
    """Half precision with a scaled loss."""
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0)

    def step(model: nn.Module, number: int, managed: Any) -> Tensor:
        with managed, torch.autocast("cuda", torch.float16):
            loss = model(attention(number)).float().square().mean()
            scaler.scale(loss).backward()
        return loss

    check(blocks, step)


def test_generator_of_the_user() -> None:
    """Noise from a generator on the device comes again as it was."""

    def step(model: nn.Module, number: int, managed: Any) -> list[Tensor]:
        noise, x = torch.Generator("cuda").manual_seed(number), attention(number)
        with managed:
            x = model(x)
            loss = (x * torch.rand(x.shape, device="cuda", generator=noise)).sin().square().mean()
            loss.backward()
        return [loss, noise.get_state()]

    check(blocks, step)


def test_channels_last() -> None:
    """Convolutions in the other memory format, with batch norm by cuDNN."""

    def make() -> nn.Module:
        parts = [
            nn.Conv2d(8, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 8, 3, padding=1),
        ]
        return nn.Sequential(*parts).to("cuda", memory_format=torch.channels_last)

    def step(model: nn.Module, number: int, managed: Any) -> Tensor:
        x = attention(number).view(4, 8, 32, 32).contiguous(memory_format=torch.channels_last)
        with managed:
            loss = model(x).square().mean()
            loss.backward()
        return loss

    check(make, step)


def test_both_devices() -> None:
    """A step that goes to the CPU and back."""

    def step(model: nn.Module, number: int, managed: Any) -> Tensor:
        x = attention(number).cpu().pin_memory()
        with managed:
            y = model(x.to("cuda", non_blocking=True))
            z = y.cpu().sin().exp()
            loss = (z.to("cuda") * y.detach()).square().mean()
            loss.backward()
        return loss

    check(blocks, step)


def test_recurrent_layers() -> None:
    """cuDNN's recurrent layers, which keep dropout state of their own, are kept; what is around them is not."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = nn.Linear(128, 128), nn.Linear(64, 128)
            self.lstm = nn.LSTM(128, 64, num_layers=2, dropout=0.3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.after(self.lstm(self.before(x).tanh().sin())[0]).sin()

    def step(model: nn.Module, number: int, managed: Any) -> Tensor:
        with managed:
            loss = model(attention(number)).square().mean()
            loss.backward()
        return loss

    check(lambda: Net().to("cuda"), step)


# -- streams -----------------------------------------------------------------------------------------------------------

CYCLES = 200_000_000  # of the device's clock: a tenth of a second


def racing(x: Tensor, policy: Any) -> Tensor:
    """The gradient of a step part of which runs, late, on another stream, while the first one goes on allocating."""
    side = torch.cuda.Stream()
    x = x.detach().clone().requires_grad_()
    with rekindle.Session(policy, min_nbytes=0):
        y = x.exp().sin()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(CYCLES)
            z = y.cos()
        del y  # autograd would have kept it for `cos`
        for _ in range(8):
            torch.empty_like(x).fill_(7)
        torch.cuda.current_stream().wait_stream(side)
        loss = (z * x).sum()
        loss.backward()
    torch.cuda.synchronize()
    return x.grad


def test_other_streams_read_in_peace() -> None:
    """What a kernel of another stream has yet to read is not given to the next one at home."""
    x = torch.rand(1 << 20, device="cuda")
    expected = racing(x, rekindle.KeepAll())
    for _ in range(3):
        assert torch.equal(racing(x, KeepNone()), expected)


def test_backward_on_another_stream() -> None:
    """A backward pass that begins elsewhere gets recomputed values that are complete."""
    x = torch.rand(1 << 20, device="cuda", requires_grad=True)

    def gradient(policy: Any) -> Tensor:
        side = torch.cuda.Stream()
        x.grad = None
        with rekindle.Session(policy, min_nbytes=0):
            with torch.cuda.stream(side):
                loss = x.exp().sin().cos().sum()
            torch.cuda.current_stream().wait_stream(side)
            loss.backward()
        torch.cuda.synchronize()
        assert x.grad is not None
        return x.grad

    assert torch.equal(gradient(KeepNone()), gradient(rekindle.KeepAll()))
