"""The README's first figure, of a run that reads ids: test images of its data set, with 60 % of their tokens
masked, predicted at once, with a hole, inpainted; and samples. All with seed 0.

    python assets/runs/overview.py out/cifar10-mage assets/overview.png
"""
import math
import pathlib
import sys

import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import probe
import unified


@torch.no_grad()
def main(run, out, n=4):
    model, config = unified.load_model(run)
    S, seeds = model.image_size, torch.arange(n)
    data = probe.open_data(config["dataset"], config["data_dir"], S, train=False)
    x, _ = next(data.batches([(seeds, None)], replace=False))                               # (n, 3, S, S)
    mask = unified.rank_in_row(model.noise(seeds)) < math.ceil(0.6 * model.length)          # (n, L)
    ids = model.to_ids(x)
    ids = torch.where(mask, model.logits(ids, mask).argmax(-1), ids)
    predicted = model.vqgan.decode(ids.unflatten(1, (model.grid, model.grid))).clamp(0, 1)
    masked = F.interpolate(mask.view(n, 1, model.grid, -1).float(), (S, S)) > 0             # (n, 1, S, S)
    hole = torch.zeros(n, S, S, dtype=torch.bool)
    hole[:, S // 4:-S // 4, S // 4:-S // 4] = True
    columns = {"image": x, "60 % masked": torch.where(masked, 0.2, x), "predicted at once": predicted,
               "known pixels": torch.where(hole[:, None], 0.2, x),
               "inpainted": model.sample(n, known=x, mask=hole, seeds=0),
               "generated": model.sample(n, seeds=0)}
    tiles = torch.stack([*columns.values()], 1).flatten(0, 1)
    unified.image_grid(tiles, min_side=600, names=[*columns]).save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
