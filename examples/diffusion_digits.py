"""A diffusion model of handwritten digits, and what averages of its weights are worth.

    pip install 'sharded-ema[examples]'
    python examples/diffusion_digits.py

A small network learns to turn noise into the 8 x 8 digits that come with scikit-learn (rectified
flow: Liu et al., "Flow Straight and Fast", 2022). Its weights are averaged with a constant decay
and with two power functions, from whose snapshots averages of any width are built afterwards. Each
set of weights draws the same noise; how far its digits are from real ones is measured as in FID, a
Frechet distance between features, those of a small classifier. Writes OUT/digits.png and
OUT/results.json.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot, pad

from sharded_ema import ShardedEMA, synthesize

WIDTHS = (0.03, 0.04, 0.05, 0.07, 0.10, 0.13, 0.17, 0.22)
SNAPSHOTS = 30


class Flow(nn.Module):
    """The velocity of an image on its way from noise to a digit.

    Takes images of shape (N, 64), times in [0, 1] of shape (N, 1) and classes of shape (N,).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("waves", 2.0 ** torch.arange(6) * math.pi, persistent=False)
        self.net = nn.Sequential(
            *(nn.Linear(64 + 12 + 10, width), nn.SiLU()),
            *(nn.Linear(width, width), nn.SiLU()),
            *(nn.Linear(width, width), nn.SiLU()),
            nn.Linear(width, 64),
        )

    def forward(self, images: Tensor, times: Tensor, classes: Tensor) -> Tensor:
        angles = times * self.waves
        inputs = (images, angles.sin(), angles.cos(), one_hot(classes, 10).float())
        return self.net(torch.cat(inputs, 1))


@torch.no_grad()
def draw(model: nn.Module, number: int, steps: int = 40) -> Tensor:
    """Digits 0, 1, ... 9, 0, ... from the same noise for all weights; shape (number, 64)."""
    images = torch.randn(number, 64, generator=torch.Generator().manual_seed(1))
    classes = torch.arange(number) % 10
    for step in range(steps):
        times = torch.full((number, 1), step / steps)
        images = images + model(images, times, classes) / steps
    return images.clamp(-1, 1)


class Critic:
    """A Frechet distance to the real digits, in the features of a classifier of them."""

    def __init__(self, images: Tensor, classes: Tensor) -> None:
        self.features = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32), nn.ReLU())
        head = nn.Linear(32, 10)
        optimizer = torch.optim.AdamW([*self.features.parameters(), *head.parameters()], lr=3e-3)
        for _ in range(300):
            chosen = torch.randint(len(images), (256,))
            noisy = images[chosen] + 0.1 * torch.randn(256, 64)
            cross_entropy(head(self.features(noisy)), classes[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
        self.real = self.moments(images)

    @torch.no_grad()
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the features."""
        found = self.features(images).double()
        return found.mean(0), found.T.cov()

    def distance(self, images: Tensor) -> float:
        """``|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))`` (Heusel et al., 2017, equation 6)."""
        (mean, cov), (mean_real, cov_real) = self.moments(images), self.real
        root = torch.linalg.eigvals(cov @ cov_real).real.clamp(min=0).sqrt().sum()
        apart = (mean - mean_real).square().sum() + cov.trace() + cov_real.trace() - 2 * root
        return float(apart)


def train(args: argparse.Namespace, images: Tensor, classes: Tensor) -> tuple[Flow, ShardedEMA]:
    """The model after its last step, and its averages; snapshots lie in OUT/snapshots."""
    model = Flow(args.width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    averages = {"constant": f"half_life:{args.steps / 40}", "a": "power:0.05", "b": "power:0.10"}
    ema = ShardedEMA(model, averages, total_steps=args.steps)
    ema.attach(optimizer)
    for step in range(1, args.steps + 1):
        chosen = torch.randint(len(images), (args.batch,))
        data, noise, times = images[chosen], torch.randn(args.batch, 64), torch.rand(args.batch, 1)
        guess = model(times * data + (1 - times) * noise, times, classes[chosen])
        (guess - (data - noise)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, args.steps // SNAPSHOTS) == 0 or step == args.steps:
            ema.save(args.out / "snapshots" / f"step_{step}", step=step)
    return model, ema


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, build averages, judge all of them; the distance of each set of weights by name."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=256, help="of the network")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("runs/digits"))
    args = parser.parse_args(argv)
    for own in ("snapshots", "sweep"):  # of an earlier run
        shutil.rmtree(args.out / own, ignore_errors=True)
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1
    classes = torch.tensor(digits.target)
    critic = Critic(images, classes)
    model, ema = train(args, images, classes)

    drawn = {"raw": draw(model, args.samples)}
    with ema.swap("constant"):
        drawn["constant decay"] = draw(model, args.samples)
    report = synthesize(
        args.out / "snapshots", sigma_rel=WIDTHS, out=args.out / "sweep", progress=False
    )
    for width in WIDTHS:
        folder = args.out / "sweep" / report.facts["widths"][str(width)]["output"]
        other = Flow(args.width)
        other.load_state_dict(load_file(folder / "model.safetensors"))
        drawn[f"power:{width:g}"] = draw(other, args.samples)
    ema.close()

    distances = {name: critic.distance(samples) for name, samples in drawn.items()}
    for name, distance in distances.items():
        print(f"{name:<15} {distance:.3f}")
    (args.out / "results.json").write_text(json.dumps(distances, indent=1))
    picture(drawn, distances, args.out / "digits.png")
    return distances


def picture(drawn: dict[str, Tensor], distances: dict[str, float], path: Path) -> None:
    """Digits of the weights and of the best average, and the distance of every average."""
    best = min((name for name in drawn if name.startswith("power")), key=distances.__getitem__)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    raw, average, curve = figure.subplots(1, 3)
    for axes, name, title in ((raw, "raw", "raw weights"), (average, best, f"average {best}")):
        framed = pad(drawn[name][:80].reshape(8, 10, 8, 8), (2, 2, 2, 2), value=-1.0)
        grid = framed.permute(0, 2, 1, 3).reshape(8 * 12, 10 * 12)
        axes.imshow(grid, cmap="gray_r", vmin=-1, vmax=1)
        axes.set_title(f"{title}: {distances[name]:.2f}")
        axes.axis("off")
    curve.plot(WIDTHS, [distances[f"power:{w:g}"] for w in WIDTHS], "o-", label="built afterwards")
    curve.axhline(distances["raw"], color="black", label="raw weights")
    curve.axhline(distances["constant decay"], color="C3", linestyle="--", label="constant decay")
    curve.set(xlabel="relative width of the average", ylabel="Fréchet distance")
    curve.legend(fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
