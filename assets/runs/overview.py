"""The README's first figure: test images of CIFAR-10, masked and predicted by one run, noised and denoised by
another, which also fills a hole and generates, a film of it. All with seed 0.

    python assets/runs/overview.py out/cifar10-mae out/cifar10-adm assets/overview.gif
"""
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import probe
import unified


@torch.no_grad()
def main(masks, noise, out, n=4, frames=14):
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
    still = {"image": x, "masked": masked, "mae predicts": predicted, "noised": (xt + 1) / 2,
             "adm denoises": (denoised + 1) / 2, "hole": torch.where(mask[:, None], 0.2, x)}
    last, sheets = adm.num_steps() - 1, []
    films = zip(adm.sample_steps(n, known=x, mask=mask, seeds=0), adm.sample_steps(n, seeds=0))
    for step, states in enumerate(films):
        if (last - step) % (last // (frames - 1)) == 0:
            columns = {**still, **dict(zip(["adm inpaints", "adm generates"], map(adm.render, states)))}
            tiles = torch.stack([v.clamp(0, 1) for v in columns.values()], 1).flatten(0, 1)
            sheets.append(unified.image_grid(tiles, min_side=800, names=[*columns]))
    colors = sheets[-1].quantize(256, dither=0)         # of all frames, so that what stands still does
    first, *others = (sheet.quantize(palette=colors, dither=0) for sheet in sheets)
    first.save(out, save_all=True, append_images=others, duration=[160] * len(others) + [4000], loop=0)


if __name__ == "__main__":
    main(*sys.argv[1:])
