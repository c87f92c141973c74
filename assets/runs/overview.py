"""The README's first figure: test images of CIFAR-10, masked and predicted by one run, noised and denoised by
another, which also fills a hole and generates. All with seed 0.

    python assets/runs/overview.py out/cifar10-mae out/cifar10-adm assets/overview.png
"""
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import probe
import unified


@torch.no_grad()
def main(masks, noise, out, n=4):
    (mae, config), (adm, _) = unified.load_model(masks), unified.load_model(noise, ema=True)
    S, seeds = mae.image_size, torch.arange(n)
    data = probe.open_data(config["dataset"], config["data_dir"], S, train=False)
    x, _ = next(data.batches([(seeds, None)], replace=False))                               # (n, 3, S, S)
    masked, predicted = mae.reconstruct(x, unified.hashed_uniform(seeds, 0, mae.length))
    t = torch.full((n,), 300)
    _, xt, _ = adm.noised(x, t, adm.noise(seeds))
    denoised = unified.x0_from_eps(xt, adm.alpha_bar[t], adm.predict(xt, t).chunk(2, 1)[0])
    mask = torch.zeros(n, S, S, dtype=torch.bool)
    mask[:, S // 4:-S // 4, S // 4:-S // 4] = True
    columns = {"image": x, "masked": masked, "predicted": predicted,
               "noised": (xt + 1) / 2, "denoised": (denoised + 1) / 2,
               "hole": torch.where(mask[:, None], 0.2, x),
               "inpainted": adm.sample(n, known=x, mask=mask, seeds=0), "generated": adm.sample(n, seeds=0)}
    tiles = torch.stack([v.clamp(0, 1) for v in columns.values()], 1).flatten(0, 1)
    unified.image_grid(tiles, min_side=800, names=[*columns]).save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
