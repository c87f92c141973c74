"""Three laws of unified.py as curves, in schedules.png beside this file:

    python assets/runs/schedules.py
"""
import pathlib
import sys

import torch

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import train
import unified


def mask_ratios():
    """How often the mask ratio of training is at most so large, of MAGE and of ADDP."""
    u = torch.linspace(0, 1, 200)
    ratio, weight = unified.nested_mask_ratios()
    return {"MAGE": list(zip(unified.truncated_normal(u).tolist(), u.tolist())),
            "ADDP": list(zip(ratio.tolist(), weight.cumsum(0).tolist()))}


def masked_tokens():
    """How many of 256 tokens are masked after each of 20 steps of decoding."""
    curves = {}
    for schedule in ("cosine", "linear"):
        initial = count = torch.tensor([256])
        curves[schedule] = [(0, 256)]
        for t in range(1, 21):
            count = unified.num_masked(initial, count, t, 20, schedule)
            curves[schedule].append((t, count.item()))
    return curves


def noise_schedules():
    """How much of an image is left at each of 1,000 timesteps: alpha_bar."""
    return {name: [*enumerate(unified.noise_schedule(name).tolist())] for name in ("linear", "cosine")}


if __name__ == "__main__":
    charts = [train.line_chart(curves, title, (900, 320), axes, False) for curves, title, axes in (
        (mask_ratios(), "Training: P(mask ratio <= r)", ("r", "P")),
        (masked_tokens(), "Decoding: masked tokens of 256", ("after step", "tokens")),
        (noise_schedules(), "Noise: alpha_bar", ("timestep t", "")))]
    train.stack_images(charts).save(HERE / "schedules.png")
