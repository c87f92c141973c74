"""1,000 samples whose tokens are kept in a quasi-random order, the Halton sequence's [Besnier et al. 2025,
arXiv 2503.17076], instead of by confidence: an example of sample(order=). Without the paper's roll of the
order.

    python assets/runs/halton.py out/cifar10-mage 0 samples.npz         run, seed, file for probe.py --samples
"""
import pathlib
import sys

import numpy
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import unified


def radical_inverse(n, base):
    """The digits of n behind the point, in reverse: n = 6 in base 2, which is 110, gives 0.011 = 3 / 8."""
    x, place = 0.0, 1.0
    while n:
        place /= base
        n, digit = divmod(n, base)
        x += place * digit
    return x


def halton_priority(grid):
    """Of each cell, row by row: float (grid * grid,), highest for the cell that the sequence visits first."""
    n, cells = 0, {}
    while len(cells) < grid * grid:
        row, column = (int(radical_inverse(n, base) * grid) for base in (2, 3))
        cells.setdefault(row * grid + column, -len(cells))
        n += 1
    return torch.tensor([float(cells[cell]) for cell in range(grid * grid)])


def main(run, seed, out):
    model, _ = unified.load_model(run, ema=True)
    priority, parts = halton_priority(model.grid), []
    for first in range(0, 1000, 100):
        seeds = torch.arange(first, first + 100) + 10**6 * int(seed)
        parts.append(model.sample(100, seeds=seeds, order=lambda c: priority.expand_as(c)))
    images = (255 * torch.cat(parts)).round().byte().permute(0, 2, 3, 1)
    numpy.savez(out, images.numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
