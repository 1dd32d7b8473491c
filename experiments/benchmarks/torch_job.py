"""Times training steps of a ResNet in PyTorch; prints the median seconds of a step.

``python torch_job.py BLOCKS WIDTH SIZE BATCH THREADS`` runs in an environment with PyTorch. The
network is that of ``experiments.models.resnet``, in the layout channels_last.
"""

import statistics
import sys
import time

import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

WARM_UP, STEPS = 5, 15


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut without parameters."""

    def __init__(self, before: int, after: int) -> None:
        """Make the layers."""
        super().__init__()
        self.widen = after - before
        stride = 2 if self.widen else 1
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)

    def forward(self, x):
        """Map features to features."""
        shortcut = x
        if self.widen:
            half = self.widen // 2
            shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, self.widen - half))
        x = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(x)) + shortcut)


class ResNet(nn.Module):
    """A ResNet of 6n + 2 layers."""

    def __init__(self, blocks: int, width: int) -> None:
        """Make the layers."""
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        widths = [width * 2**stage for stage in range(3) for _ in range(blocks)]
        self.blocks = nn.Sequential(*map(Block, [width, *widths[:-1]], widths))
        self.classifier = nn.Linear(4 * width, 10)

    def forward(self, x):
        """Return logits."""
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.classifier(x.mean((2, 3)))


def main(blocks: int, width: int, size: int, batch: int, threads: int) -> None:
    """Train and print."""
    torch.set_num_threads(threads)
    model = ResNet(blocks, width).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    labels, times = torch.arange(batch) % 10, []
    for _ in range(WARM_UP + STEPS):
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    print(statistics.median(times[WARM_UP:]))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
