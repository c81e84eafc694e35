"""Networks of our own that no test dependency has: ResNet written in place, U-Net, LSTMs, DenseNet, a long chain."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Bottleneck(nn.Module):
    """Three convolutions and a shortcut; ReLU and the residual add write in place."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Add to the shortcut what the convolutions make of `x`."""
        shortcut = self.shortcut(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += shortcut
        return self.relu(out)


class ResNet(nn.Module):
    """A ResNet of bottlenecks; the defaults make ResNet-50."""

    def __init__(self, layers: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, padding=3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, padding=1),
        )
        blocks: list[nn.Module] = []
        inputs = width
        for stage, count in enumerate(layers):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(Bottleneck(inputs, width << stage, stride))
                inputs = (width << stage) * Bottleneck.expansion
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy of `labels`."""
        features = self.blocks(self.stem(images)).mean((2, 3))
        return F.cross_entropy(self.head(features), labels)


class DoubleConv(nn.Sequential):
    """Two convolutions, each normalised over the batch and rectified in place."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class UNet(nn.Module):
    """Down by pooling, up by transposed convolution, with a skip connection at each size."""

    def __init__(self, width: int = 8, depth: int = 3, classes: int = 3) -> None:
        super().__init__()
        widths = [width << level for level in range(depth + 1)]
        self.down = nn.ModuleList(DoubleConv(i, o) for i, o in zip([3, *widths[:-2]], widths[:-1], strict=True))
        self.bottom = DoubleConv(widths[-2], widths[-1])
        self.grow = nn.ModuleList(
            nn.ConvTranspose2d(widths[level + 1], widths[level], 2, 2) for level in reversed(range(depth))
        )
        self.up = nn.ModuleList(DoubleConv(2 * widths[level], widths[level]) for level in reversed(range(depth)))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy of `labels`, one for each pixel."""
        x, skips = images, []
        for down in self.down:
            x = down(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for grow, up in zip(self.grow, self.up, strict=True):
            x = up(torch.cat((grow(x), skips.pop()), 1))
        return F.cross_entropy(self.head(x), labels)


class LSTM(nn.Module):
    """Two recurrent layers with dropout between them."""

    def __init__(self, vocabulary: int = 64, width: int = 32) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, dropout=0.1, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy of `targets`."""
        hidden, _ = self.lstm(self.tokens(tokens))
        return F.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten())


class DenseLayer(nn.Module):
    """A convolution that reads what all layers before it made, side by side."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, *features: Tensor) -> Tensor:
        """New features from all of the old ones."""
        return self.conv(F.relu(self.norm(torch.cat(features, 1))))


class DenseNet(nn.Module):
    """Each layer concatenates all before it, so that what is saved grows with the square of the depth."""

    def __init__(self, layers: int = 12, growth: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 2 * growth, 3, padding=1, bias=False)
        self.layers = nn.ModuleList(DenseLayer((2 + index) * growth, growth) for index in range(layers))
        self.head = nn.Linear((2 + layers) * growth, classes)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy of `labels`."""
        features = [self.stem(images)]
        for layer in self.layers:
            features.append(layer(*features))
        return F.cross_entropy(self.head(torch.cat(features, 1).mean((2, 3))), labels)


class UnrolledLSTM(nn.Module):
    """A cell that is called once for each step of the sequence, in Python."""

    def __init__(self, vocabulary: int = 64, width: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.cell = nn.LSTMCell(width, width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The cross-entropy of the last target."""
        hidden = cell = self.tokens(tokens[:, 0]) * 0
        for embedded in self.tokens(tokens).unbind(1):
            hidden, cell = self.cell(embedded, (hidden, cell))
        return F.cross_entropy(self.head(hidden), targets[:, -1])


class Link(nn.Module):
    """One small layer of a chain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """A linear layer and a bounded non-linearity."""
        return torch.tanh(self.linear(x))


class Chain(nn.Module):
    """Many small layers, one after another."""

    def __init__(self, length: int = 500, width: int = 32) -> None:
        super().__init__()
        self.links = nn.Sequential(*(Link(width) for _ in range(length)))

    def forward(self, x: Tensor) -> Tensor:
        """The mean square of what comes out."""
        return self.links(x).square().mean()
