"""What convolutions without any training reach on CIFAR-10, by the ridge regression of train.py: 256 filters
of 6 x 6 pixels, drawn from a normal distribution or cut out of training images, on whitened patches; both
signs, averaged over four quarters. Prints the accuracies and writes them to ladder.jsonl.

    python assets/runs/ladder.py data/cifar10
"""
import json
import pathlib
import pickle
import sys

import torch
import torch.nn.functional as F

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import probe


def read(folder, names):
    """Pixels (N, 3, 32, 32) in [0, 1] and labels (N,) of the archive's batches."""
    files = [folder / "cifar-10-batches-py" / name for name in names]
    parts = [pickle.loads(file.read_bytes(), encoding="bytes") for file in files]
    x = torch.cat([torch.from_numpy(part[b"data"]).view(-1, 3, 32, 32) for part in parts])
    return x.float() / 255, torch.tensor([label for part in parts for label in part[b"labels"]])


def patches(x):
    """Pixels (B, 3, 32, 32) -> each of their 27 x 27 patches (B, 729, 108), with mean 0 and variance 1."""
    p = F.unfold(x, 6).mT
    return (p - p.mean(2, keepdim=True)) / (p.var(2, keepdim=True) + 10 / 255 ** 2).sqrt()


def features(x, mean, whiten, filters):
    """Pixels (B, 3, 32, 32) -> (B, 8 * filters)."""
    a = ((patches(x) - mean) @ whiten @ filters.T).mT.unflatten(2, (27, 27))        # (B, filters, 27, 27)
    return F.adaptive_avg_pool2d(torch.cat([F.relu(a - 0.25), F.relu(-a - 0.25)], 1), 2).flatten(1)


def main(folder):
    torch.manual_seed(0)
    x, y = read(folder, [f"data_batch_{i}" for i in range(1, 6)])
    test, test_y = read(folder, ["test_batch"])
    index = torch.randperm(len(x))[:10_000]
    seen = patches(x[index[:2000]]).flatten(0, 1)
    seen = seen[torch.randperm(len(seen))[:100_000]]
    mean, (values, vectors) = seen.mean(0), torch.linalg.eigh(torch.cov(seen.T))
    whiten = vectors @ torch.diag((values + 0.1).rsqrt()) @ vectors.T

    def convolutions(filters):
        filters = F.normalize(filters, dim=1)
        return lambda v: torch.cat([features(part, mean, whiten, filters) for part in v.split(100)])
    readers = {"untrained convolutions, filters at random": convolutions(torch.randn(256, 108)),
               "untrained convolutions, filters cut from images": convolutions((seen[:256] - mean) @ whiten)}
    rows = []
    for name, read_features in readers.items():
        z, test_z = (read_features(v) for v in (x[index], test))
        rows.append({"name": name, "top1": round(probe.ridge_probe(z, y[index], test_z, test_y), 4)})
        print(f"{name:48s} {rows[-1]['top1']:.1%}")
    (HERE / "ladder.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
