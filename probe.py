"""Read what a trained model has understood: how much its features say about the class of an image.

    python probe.py out/RUN                                ridge regression on the model's vectors
    python probe.py out/RUN --sweep                        first find the best place to read; draws sweep.png
    python probe.py out/RUN --layers 2,4,6 --pool mean,2   the same among a few places
    python probe.py out/RUN --head knn                     or fewshot, linear, mlp, attention, finetune
    python probe.py out/A out/B --pool mean                several runs in one table
    python probe.py out/RUN --dataset photos --save z.npz  no probe: the features of every image, to keep
    python probe.py out/RUN --head difformer --layers 19,24,30 --t 90,150,300
                                                           these places together; diffeed: and fed back
    python probe.py mage-vitb-1600.pth --dataset imagenet --head linear --augment
                                                           published weights and recipe of MAGE
    python probe.py 256x256_diffusion_uncond.pt --dataset imagenet --head linear --sgd --pool 2 --augment
                                                           the same of DiffSSL
    python probe.py out/RUN --head segment --layers 2,4    a class for each pixel; draws segments.png
    python probe.py out/RUN --samples samples.npz          FD-local, precision and recall of samples, which
                                                           sample.py --npz writes

Every accuracy stands beside two others, got in the same way: from the raw pixels, unless the head needs
feature maps, and from the same network untrained, where layers that training starts at 0 are random, too.
What they reach needs no training. Results are appended to probe.jsonl in the run's folder. The test set is
read once; training images choose places and penalties.

    1  Heads computed in one go    knn, fewshot, ridge
    2  Heads that are trained      linear, mlp, attention and difformer, diffeed, finetune
    3  Training                    one loop, its recipes, and the score on the test set
    4  Where features are read     layer, t and pooling: feature maps and vectors
    5  The search for a place      --layers, --t, --pool, --sweep, and the heat map
    6  A probe from end to end     settings, the data set, what is compared, the report
    7  Segmentation                segment: a linear head on feature maps, windows, mIoU, segments.png
    8  Behind the scenes           features of many images, processes, torch.compile, learning rate
    9  Data sets                   folders, CIFAR-10, drawn shapes; train.py reads them from here; masks

Shapes   B images, N training images, M test images    S image side
         C width of a vector (B, C), or channels of a map (B, C, h, w)
"""
import collections
import contextlib
import copy
import dataclasses
import difflib
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import pickle
import shutil
import signal
import statistics
import sys
import tarfile
import tempfile
import threading
import time
import typing
import urllib.request
import zipfile

import numpy
import PIL.Image
import PIL.ImageColor
import PIL.ImageDraw
import torch
import torch.distributed
import torch.nn as nn
import torch.nn.functional as F
import tqdm
from torch.utils._triton import has_triton

import unified
from unified import UserError, flag


@dataclasses.dataclass(frozen=True)
class Config:
    run: str = flag(dataclasses.MISSING, "run folder, checkpoint, or weight file published by the authors; "
                                         "several are compared in one table", positional=True, nargs="+",
                    group="what is read")
    head: str = flag("ridge", "what reads the features", choices=[
        "ridge", "linear", "knn", "fewshot", "mlp", "attention", "difformer", "diffeed", "finetune",
        "segment"])
    layers: str = flag("", "blocks to read, counted from 1, such as 2,4,6 [the one that the paper reads]")
    t: str = flag("", "how corrupted the images are, such as 0,0.3 for MAGE's mask ratio or 90,150 "
                      "for timesteps [as in the paper]")
    pool: str = flag("", "mean: over the image; class: the class position; 2: averages of 2 x 2 cells; "
                         "several with commas: the best one")
    sweep: bool = flag(False, "try every layer, and t from hardly to half corrupted, "
                              "unless --layers and --t say otherwise")
    samples: str = flag("", "no probe: FD-local, precision, recall of the images in this .npz of "
                          "sample.py; of shapes also how many are drawings")
    save: str = flag("", "no probe: keep features, labels and file names of all images in this new .npz")
    seed: int = flag(0, "random seed", min=0, max=2**32 - 1)

    dataset: str = flag("", "shapes, cifar10, imagenet, or a folder of class folders; with --save any folder "
                            "of images [the run's own]",
                        group="data")
    data_dir: str = flag("", "dataset folder, if not data/<dataset>")
    limit: int = flag(None, "use at most so many training images; a tenth of them chooses penalty and place",
                      min=20)
    labels: float = flag(None, "fraction of the training images, such as 0.01: equally many of each class, "
                               "the same for every model", min=1e-9, max=1)
    subset: str = flag("", "file of the training images, NAME or CLASS/NAME a line, as SimCLR's 1percent.txt")
    strict_images: bool = flag(None, "stop at an unreadable image instead of leaving it out")

    k: int = flag(None, "knn: neighbours that vote, for fewshot on the place to read [20]",
                  group="single heads")
    shots: int = flag(None, "fewshot: so many images a class, scored as UMD's authors do, who take 100 "
                            "[5, 10 and 25, by a ridge that fits so few]")
    hidden: str = flag("512", "mlp: widths of its hidden layers, such as 512,256")
    feedback: str = flag("", "diffeed: the layers fed back to their mirrors [the last of each map size]")
    ignore: str = flag("", "segment: values in masks that count as no class, such as 0; 255 is always one")

    augment: bool = flag(False, "fresh crops and noise in every epoch, as published; "
                                "else features are computed once", group="training of a head")
    sgd: bool = flag(False, "DiffSSL's plain SGD, for linear on features as they are; "
                            "else LARS for linear, AdamW for the others")
    matryoshka: bool = flag(False, "learn at the same time from the first 8, 16, 32, ... dimensions alone")
    batch_size: int = flag(None, "images per step [4096 for linear, 256 for finetune, 16 for diffeed and "
                                 "segment, 128 for the others and with --sgd]", max=10**6)
    epochs: int = flag(None, "passes over the training set [90 for linear, 20 for finetune, 28 with --sgd, "
                             "10 for the others]")
    lr: float = flag(None, "learning rate for 256 images per step [for linear 0.1, for finetune 2.5e-4, for "
                           "that of ADDP 1e-3, or ten times that below 500,000 images]", min=1e-9)

    weights: str = flag("", "raw, or ema for the averaged ones [as in the paper]", choices=["raw", "ema"],
                        group="weights")
    adm_heads: int = flag(None, "attention heads in a file of guided-diffusion, whose own default is 4 "
                                "[one for 64 channels]")
    adm_order: str = flag(None, "channels' order in that file [legacy]; new after --use_new_attention_order",
                          choices=["legacy", "new"])

    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1, mps",
                       group="hardware")
    dtype: str = flag(None, "of activations [bfloat16 on GPUs that compute in it, else float32]",
                      choices=["float32", "bfloat16"])
    compile: bool = flag(None, "torch.compile the blocks [on cuda]")
    workers: int = flag(min(8, unified.usable_cores()), "data-loading processes, for folders", min=0,
                        max=1000)


# ----------------------------------------------------------------------------------------------------------
# 1. Heads computed in one go
#
# Vectors x (N, C) and labels y (N,) to fit, x_test (M, C) and y_test (M,) to test -> accuracy in [0, 1].
#
# Nearest neighbours fit nothing: images of one class should lie in one direction.


def knn(x, y, x_test, y_test, k=20, temperature=0.07):
    """Vote of the k training images at the smallest angle, each with weight exp(cosine / temperature)
    (official file: DINO's eval_knn.py)."""
    x, votes, hits = F.normalize(x), F.one_hot(y).float(), 0
    for queries, labels in zip(x_test.split(256), y_test.split(256)):   # all cosines at once may not fit
        cosine, nearest = (F.normalize(queries) @ x.T).topk(min(k, len(x)))                 # (256, k) each
        weights = (cosine / temperature).exp()[..., None]
        hits += ((votes[nearest] * weights).sum(1).argmax(1) == labels).sum()
    return hits.item() / len(y_test)


# Few-shot: some images of each class, drawn three times. Two closed-form fits, UMD's and one for very few.


def fewshot(x, y, x_test, y_test, classes, cfg):
    """5, 10 and 25 images a class by fewshot_ridge, or --shots of them by fewshot_umd; x and x_test are
    {name: vectors}. Returns what compare() does, three accuracies each."""
    fit = functools.partial(fewshot_umd, classes=classes) if cfg.shots else fewshot_ridge
    smallest, results = y.bincount(minlength=classes).min().item(), []
    for shots in [cfg.shots] if cfg.shots else (5, 10, 25):
        if shots > smallest:
            print(f"few-shot: some class has only {smallest} training images; with {shots} a class, "
                  "such classes give what they have")
        draws = [draw_shots(y, shots, unified.hash_ints(cfg.seed, shots, i)) for i in range(3)]
        accuracies = {name: [fit(v[index], y[index], x_test[name], y_test) for index in draws]
                      for name, v in x.items()}
        results.append((f"fewshot-{shots}", len(draws[0]), len(y_test), accuracies))
    return results


def draw_shots(y, shots, seed):
    """Labels int (N,) -> numbers of `shots` random images of each class, or of all it has: int (n,)."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).to(y.device)
    return torch.cat([order[y[order] == label][:shots] for label in y.unique()])


def fewshot_umd(x, y, x_test, y_test, classes):
    """Accuracy by UMD's few-shot evaluator."""
    x, y, x_test, y_test = where_float64_is(x, y, x_test, y_test)
    return (fewshot_scores(x, y, x_test, classes).argmax(1) == y_test).float().mean().item()


def fewshot_scores(x, y, x_test, classes, penalty=1024.0):
    """Scores (M, classes) of ridge regression on targets of +-1, from standardised features and a column
    of 100 (official file: UMD's evaluators/fewshot_lsr.py)."""
    mean, std = x.mean(0), x.std(0, correction=0) + 1e-5
    x, x_test = (F.pad((v - mean) / std, (0, 1), value=100.0).double() for v in (x, x_test))
    target = 2.0 * F.one_hot(y, classes).double() - 1
    gram = x.T @ x + penalty * torch.eye(x.size(1), dtype=x.dtype, device=x.device)
    return (x_test @ solve(gram, x.T @ target)).float()


def fewshot_ridge(x, y, x_test, y_test, penalties=(1e-3, 1e-2, 1e-1, 1.0, 10.0)):
    """Accuracy of ridge regression from a handful of images, too few to hold any out.

    The penalty is chosen by leave-one-out, whose errors need no second fit: residual / (1 - leverage),
    from one singular value decomposition x = u s v. Features are not scaled: the deviation of ten values
    means little.
    """
    target = F.one_hot(y).float()
    mean, target_mean = x.mean(0), target.mean(0)
    u, s, v = torch.linalg.svd(x - mean, full_matrices=False)
    moment, energy = u.T @ (target - target_mean), s ** 2

    def leave_one_out_error(penalty):
        kept = energy / (energy + penalty * energy.mean())              # what is left of each direction
        leverage = 1 / len(x) + (u ** 2 * kept).sum(1, keepdim=True)
        return ((target - target_mean - u * kept @ moment) / (1 - leverage)).square().mean().item()
    penalty = min(penalties, key=leave_one_out_error)
    scores = (x_test - mean) @ v.T * (s / (energy + penalty * energy.mean())) @ moment + target_mean
    return (scores.argmax(1) == y_test).float().mean().item()


# Ridge regression, the quickest linear probe:
#
#     W = (X^T X + N penalty I)^-1 X^T Y        X standardised features and a column of ones, Y one-hot labels
#
# Both products are sums over images. Places that are equally wide are probed in one batched product.


def ridge_probe(x, y, x_test, y_test, penalties=(1e-4, 1e-3, 1e-2, 1e-1, 1.0)):
    """Accuracy of ridge regression; a tenth of the training images chooses the penalty, or each in turn, if
    they are fewer than 1,000. x (N, C) gives a number, x (places, N, C) a list of them."""
    x, y, x_test, y_test = where_float64_is(x, y, x_test, y_test)
    mean, std = x.mean(-2, keepdim=True), x.std(-2, keepdim=True) + 1e-6
    classes = 1 + max(y.max(), y_test.max()).item()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    held, rest = order[:len(y) // 10], order[len(y) // 10:]
    gram, cross = moments(x[..., rest, :], y[rest], mean, std, classes)
    gram_held, cross_held = moments(x[..., held, :], y[held], mean, std, classes)

    def accuracy(weight, x, y):
        scores = ((x - mean) / std @ weight[..., :-1, :] + weight[..., -1:, :] for x in x.split(2048, -2))
        return torch.cat([s.argmax(-1) for s in scores], -1).eq(y).float().mean(-1)
    if len(y) < 1000:
        found = cross_validate((x - mean) / std, F.one_hot(y, classes), order, penalties)
    else:
        found = torch.stack([accuracy(ridge(gram, cross, p), x[..., held, :], y[held]) for p in penalties])
    best = torch.tensor(penalties, dtype=gram.dtype, device=gram.device)[found.argmax(0)][..., None, None]
    return accuracy(ridge(gram + gram_held, cross + cross_held, best), x_test, y_test).tolist()


def cross_validate(x, target, order, penalties):
    """Standardised features (..., N, C), one-hot labels (N, classes) -> accuracy (penalties, ...) on the
    tenths of `order`, int (N,), each by what the others teach. W = X^T (X X^T + N penalty I)^-1 Y, since N is
    small."""
    x, hits = F.pad(x, (0, 1), value=1.0).double(), 0
    kernel = x @ x.mT                                                                       # (..., N, N)
    for held in order.split(max(1, len(order) // 10)):
        rest = order[~torch.isin(order, held)]
        inner, outer = kernel[..., rest[:, None], rest], kernel[..., held[:, None], rest]
        identity, y = len(rest) * torch.eye(len(rest), dtype=x.dtype, device=x.device), target[rest].double()
        scores = torch.stack([outer @ solve(inner + p * identity, y) for p in penalties])
        hits = hits + scores.argmax(-1).eq(target[held].argmax(-1)).sum(-1)
    return hits / len(order)


def moments(x, y, mean, std, classes):
    """Features x (..., N, C), labels y (N,) -> X^T X (..., C + 1, C + 1), X^T Y (..., C + 1, classes).
    In float64, a chunk at a time, since a copy of x in float64 may not fit."""
    gram, cross = 0, 0
    for x, y in zip(x.split(2048, -2), y.split(2048)):
        x = F.pad((x - mean) / std, (0, 1), value=1.0).double()
        gram, cross = gram + x.mT @ x, cross + x.mT @ F.one_hot(y, classes).double()
    return gram, cross


def ridge(gram, cross, penalty):
    """Moments -> weight (..., C + 1, classes), whose last row is the bias. penalty: for each image, of
    which there are gram[-1, -1]; a number, or (..., 1, 1)."""
    diagonal = penalty * gram[..., -1:, -1:] * torch.eye(gram.size(-1), dtype=gram.dtype, device=gram.device)
    return solve(gram + diagonal, cross).float()


def solve(a, b):
    """a^-1 b of positive definite a (..., N, N). By Cholesky: on a CPU torch.linalg.solve() may hang forever
    over several matrices, after torch.set_num_threads() (seen with torch 2.13 and MKL)."""
    return torch.cholesky_solve(b, torch.linalg.cholesky(a))


def where_float64_is(*tensors):
    """The tensors, on the CPU if their device, as Apple's, has no float64."""
    return [v.cpu() if v.device.type == "mps" else v for v in tensors]


# ----------------------------------------------------------------------------------------------------------
# 2. Heads that are trained
#
# Each turns what is read into a vector z (B, D), and `linear` turns z into logits (B, classes).


class Head(nn.Module):
    """A subclass defines linear, and read(*features) -> z (B, D)."""

    def forward(self, *features):
        return self.linear(self.read(*features))

    def nested(self, *features, dims):
        """Logits from the first d dimensions of z alone, for each d of dims, all by the same linear layer
        [Matryoshka, Kusupati et al. 2022, 2205.13147, 'MRL-E']."""
        z = self.read(*features)
        return [F.linear(z[:, :d], self.linear.weight[:, :d], self.linear.bias) for d in dims]


class ProbeHead(Head):
    """The linear probe: BatchNorm without parameters, then a linear layer: (B, dim) -> (B, classes). The
    norm lets one learning rate serve features of any scale. [MAE, appendix A]
    (official file: main_linprobe.py)"""

    def __init__(self, dim, classes):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(dim, affine=False, eps=1e-6), nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def read(self, x):
        return self.norm(x)


class MLPHead(Head):
    """Linear layers with ReLU between them, none hidden for a linear head: (B, dim) -> (B, classes)
    (official file: DiffSSL's head.py)."""

    def __init__(self, dim, classes, hidden=()):
        super().__init__()
        self.fcs = nn.ModuleList(nn.Linear(i, o) for i, o in zip([dim, *hidden], hidden))
        self.linear = nn.Linear([dim, *hidden][-1], classes)

    def read(self, x):
        for fc in self.fcs:
            x = F.relu(fc(x))
        return x


class HeadBlock(unified.Block):
    """A transformer block as DiffSSL has it: PyTorch's own initialisation and eps, no bias for q, k, v."""

    def __init__(self, dim, heads, ratio):
        super().__init__(dim, heads)
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(dim), nn.LayerNorm(dim), unified.MLP(dim, ratio * dim)
        self.attn.qkv = nn.Linear(dim, 3 * dim, bias=False)


class DifFormer(Head):
    """Reads any places of a network together; with a single one it is DiffSSL's attention head.
    [DifFeed, 2311.17921] (official file: attention_fusion.py)

    Each map is pooled and projected by its layer's tokenizer. The cells of all maps of one t become the
    tokens of a small transformer, behind a class token, whose outputs for all t, side by side, are z. No
    token is told its position, nor t.

        t = 90     layer 19 -- pool, norm, project --|
                   layer 24 -- pool, norm, project --|-- [class] and cells -- transformer -- [class] --|
                   layer 30 -- pool, norm, project --|                                                 |-- z
        t = 150    ...                                                                       [class] --|

    shapes  {layer: (C, h, w)}
    steps   {t: [layer, ...]}: read() takes maps (B, C, h, w) of these places in this order
    cells   on a side of a pooled map, at most
    dim, heads, ratio, depth  of the transformer; dim None: the widest map's channels
    """

    def __init__(self, shapes, steps, classes, cells=16, dim=None, heads=8, ratio=4, depth=2):
        super().__init__()
        self.steps, layers = steps, sorted(set(sum(steps.values(), [])))
        dim = dim or max(shapes[b][0] for b in layers)

        def tokenizer(channels, side):      # LayerNorm over channels and cells: one mean an image
            return nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.LayerNorm([channels, side, side]),
                                 nn.Conv2d(channels, dim, 1))
        self.pre_layer = nn.ModuleDict({
            str(b): tokenizer(shapes[b][0], min(shapes[b][1], cells)) for b in layers})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(HeadBlock(dim, heads, ratio) for _ in range(depth))
        self.linear = nn.Linear(len(steps) * dim, classes)

    def read(self, *maps):
        maps, z = iter(maps), []
        for layers in self.steps.values():
            tokens = [self.pre_layer[str(b)](next(maps)).flatten(2).mT for b in layers]     # (B, h * w, dim)
            x = torch.cat([self.cls_token.expand(len(tokens[0]), -1, -1), *tokens], 1)
            for block in self.blocks:
                x = block(x)
            z.append(x[:, 0])
        return torch.cat(z, 1)


class DifFeed(Head):
    """Two passes through the frozen network: what late layers have seen is projected and added to early
    ones, and the second pass is read. [DifFeed, 2311.17921] (official file: ssl_model_feedback_fusion.py)

        image, noise -- network -- late maps
                                      | 1x1 convolution, BatchNorm, ReLU, resize
        image, noise -- network <-----+ added to the mirror layers -- maps -- DifFormer -- z

    features  (x, t, layers, add, noise) -> [map, ...], of the network
    shapes    {layer: (C, h, w)}
    feedback  {late layer: the early one that it is added to}
    head      the DifFormer; read(x, *noise) takes images, or their ids, and the noise of each of its t

    Only the head and the projections learn, through the second pass. BatchNorm is in training mode
    throughout the training; in the official code the first evaluation ends that, after a quarter.
    """

    def __init__(self, features, shapes, feedback, head):
        super().__init__()
        self.features, self.shapes, self.feedback, self.head = features, shapes, feedback, head
        channels = ((shapes[late][0], shapes[early][0]) for late, early in feedback.items())
        self.feedback_layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, d, 1, bias=False), nn.BatchNorm2d(d), nn.ReLU()) for c, d in channels)

    @property
    def linear(self):
        return self.head.linear

    def fed_back(self, maps):
        """Maps of the late layers -> {early layer: what is added to it (B, C, h, w)}."""
        return {early: enlarged(layer(m), self.shapes[early][1:])
                for early, layer, m in zip(self.feedback.values(), self.feedback_layers, maps)}

    def read(self, x, *noise):
        maps = []
        for (t, layers), eps in zip(self.head.steps.items(), noise):
            with torch.no_grad():
                late = self.features(x, t, list(self.feedback), {}, eps)
            maps += self.features(x, t, layers, self.fed_back(late), eps)
        return self.head.read(*maps)


def feedback_of(model, cfg, last=math.inf):
    """{late layer: its mirror} for DifFeed: of --feedback or, as DiffSSL chose, of the last layer of each map
    size that the mirror has, too, without the first layer's; of all such layers if there is one size only.
    last: the last layer that is read. UserError for what is fed back behind it, or if nothing is."""
    late = [b for b in model.layers if model.mirror(b) < b]
    chosen = parse_numbers(cfg.feedback, int, "--feedback")
    for b in chosen:
        if b not in late:
            raise UserError(f"--feedback {b} is no layer of this model's second half; "
                            f"they are {late[0]} to {late[-1]}")
    if not chosen:
        size = {b: shape[1:] for b, shape in model.layers.items()}
        chosen = [b for b in late if model.mirror(b) > 1 and size[b] == size[model.mirror(b)]]
        of_size = {size[b]: b for b in chosen}
        chosen = list(of_size.values()) if len(of_size) > 1 else chosen
    behind = [b for b in chosen if model.mirror(b) > last]
    if behind or not chosen:
        fault = "this model has no layers that are fed back by default" if not behind else \
            f"layer {behind[0]} is fed back to {model.mirror(behind[0])}, and the last one read is {last}"
        raise UserError(f"--head diffeed: {fault}; name others with --layers or --feedback, or take --head "
                        "difformer")
    return {b: model.mirror(b) for b in chosen}


class FineTuned(Head):
    """The network itself learns, below a linear layer on the mean of its best layer's map; its tokenizer
    stays as it is. read(x) takes images (B, 3, S, S). [MAE, appendix A] (official file: main_finetune.py)"""

    def __init__(self, net, classes, cfg):
        super().__init__()
        width = net.layers[net.best_layer][0]
        self.net, self.features = net, float32_features(net, cfg)
        self.norm, self.linear = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)
        nn.init.trunc_normal_(self.linear.weight, std=2e-5)
        nn.init.zeros_(self.linear.bias)

    def train(self, mode=True):
        """Dropout acts after the embedding and nowhere else."""
        for name, part in self.net.named_children():
            part.train(mode and name in self.net.stem)
        return self

    def read(self, x):
        m = self.features(x, self.net.best_t, finetune=True)[0]
        return self.norm(m.mean((2, 3)))


def new_head(name, nets, places, sample, classes, cfg):
    """A fresh head for what is read in one of nets, or in pixels; sample is what was read of one image."""
    torch.manual_seed(cfg.seed)
    if cfg.head == "segment":
        return SegmentHead(sum(m.size(1) for m in features_of(sample, name)), classes)
    if cfg.head in ON_MAPS:
        model, steps = nets[name], {t: [place.layer for place in at_t] for t, at_t in by_t(places).items()}
        head = DifFormer(model.layers, steps, classes, int(cfg.pool))
        if cfg.head == "diffeed":
            model.requires_grad_(False)
            feedback = feedback_of(model, cfg, max(place.layer for place in places))
            head = DifFeed(float32_features(model, cfg), model.layers, feedback, head)
        return head
    width = features_of(sample, name)[0].size(1)
    if cfg.head == "linear" and not cfg.sgd:
        return ProbeHead(width, classes)
    return MLPHead(width, classes, parse_numbers(cfg.hidden, int, "--hidden") if cfg.head == "mlp" else ())


# ----------------------------------------------------------------------------------------------------------
# 3. Training
#
# One loop for all heads. lr is for 256 images a step; fit_recipe fills in where it is None.

RECIPES = {
    "linear": dict(batch_size=4096, epochs=90, lr=None),                    # of MAE and MAGE
    "mlp": dict(batch_size=128, epochs=10, lr=2e-3, pool="1"),              # ours, for small data sets
    "attention": dict(batch_size=128, epochs=10, lr=2e-3, pool="16"),
    "difformer": dict(batch_size=128, epochs=10, lr=2e-3, pool="16"),
    "diffeed": dict(batch_size=16, epochs=10, lr=1.6e-2, pool="16"),
    "finetune": dict(batch_size=256, epochs=20, lr=None),                   # MAGE's has 1024 and 100
    "segment": dict(batch_size=16, epochs=10, lr=1.6e-2, pool="256"),       # DINOv3 has 32 on ADE20K
}
SGD = {                                                     # of DiffSSL: 0.01 or 0.05 at these batches
    "linear": dict(batch_size=128, epochs=28, lr=0.02, pool="1"),
    "mlp": dict(batch_size=128, epochs=28, lr=0.02, pool="1"),
    "attention": dict(batch_size=128, epochs=28, lr=0.1, pool="16"),
    "difformer": dict(batch_size=128, epochs=28, lr=0.1, pool="16"),
    "diffeed": dict(batch_size=16, epochs=28, lr=0.16, pool="16"),
}


def fit_recipe(cfg, images, finetuning=None):
    """The settings with a recipe for so many training images. Batches are not larger than these, since
    incomplete ones are left out, and each process has an equal part of them.

    Learning rates of small data sets are ten times the published ones. LARS changes a matrix by a
    fraction of its length, in all by lr x epochs x images / 256 of these fractions, whatever the batch:
    with the published 0.1 a set of 5,000 images hardly leaves the start, 29 % on shapes, against 57 %
    with 1.0, where ridge has 67 %. Fine-tuning on 2,000 shapes for 60 epochs reached 80 % with the
    published rate and 98 % with eight times as much.
    """
    batch, lr = cfg.batch_size, cfg.lr
    if batch > images:
        print(f"--batch-size {batch} is more than the {images} training images; "
              f"taking {images}, with its learning rate")
        batch = images
    batch -= batch % unified.rank_and_world()[1]
    if batch < 2 * unified.rank_and_world()[1]:
        raise UserError(f"--batch-size {cfg.batch_size} leaves a process one image, and heads normalise over "
                        "several; take 2 or more for each")
    if lr is None:
        lr = finetuning[0] if cfg.head == "finetune" else 0.1
        lr *= 1 if images >= 500_000 else 10
    print(f"{cfg.head}: {cfg.epochs} epochs, {batch} images a step, learning rate {lr * batch / 256:.3g}")
    return dataclasses.replace(cfg, batch_size=batch, lr=lr)


def lr_at(epoch, cfg, warmup=0.05):
    """Learning rate at an epoch, fractions included: warm-up and a cosine or, for SGD, a tenth a quarter."""
    peak = cfg.lr * cfg.batch_size / 256
    if cfg.sgd:
        return peak * 0.1 ** int(4 * epoch / cfg.epochs)
    warmup = 10 / 90 if cfg.head == "linear" else warmup
    return learning_rate(epoch, warmup * cfg.epochs, cfg.epochs, peak, 1e-6 * (cfg.head == "finetune"))


def train(learners, batches, steps, title, cfg, warmup=0.05):
    """The loop.

    learners  [(loss, optimizer), ...], which see the same batches: loss(features, y) -> scalar
    batches   epoch -> yields features and labels y (B,), `steps` times
    """
    with progress_bar(cfg.epochs * steps, title, "steps") as bar:
        for epoch in range(cfg.epochs):
            for step, (features, y) in enumerate(batches(epoch)):
                for loss, optimizer in learners:
                    optimizer.zero_grad()
                    loss(features, y).backward()
                    for group in optimizer.param_groups:
                        average_gradients(group["params"])
                        group["lr"] = lr_at(epoch + step / steps, cfg, warmup) * group.get("scale", 1.0)
                    optimizer.step()
                bar.update()


def train_heads(heads, batches, steps, dims, cfg):
    """Train heads, {name: head}, each from the first d dimensions for every d of dims at once."""
    optimizer_class = torch.optim.SGD if cfg.sgd else LARS if cfg.head == "linear" else torch.optim.AdamW
    more = {"weight_decay": 1e-3} if cfg.head == "segment" else {}

    def loss(name, features, y):
        if cfg.head == "segment":
            return segment_loss(heads[name](*features_of(features, name)), features["mask", None])
        logits = heads[name].nested(*features_of(features, name), dims=dims)
        return sum(F.cross_entropy(v, y) for v in logits) / len(dims)
    learners = []
    for name, head in heads.items():
        optimizer = optimizer_class(head.to(cfg.device).train().parameters(), lr=0.0, **more)
        learners.append((functools.partial(loss, name), optimizer))
    train(learners, batches, steps, cfg.head, cfg)


def finetuning_of(model):
    """Learning rate for 256 images, layer decay and warm-up published for the model's size: its encoder's
    depth tells a ViT-L from smaller ones."""
    return model.finetuning[model.best_layer >= 24]


def finetune(net, data, index, test, decay, title, cfg):
    """Train net, which is changed, on the images index (N,) of data; score_heads() on the data set test.

    As published for MAGE and ADDP: AdamW, warm-up and cosine, layer decay, random resized crops, flips, mixup
    0.8, label smoothing 0.1, dropout. Left out, since they pay in long trainings only: RandAugment, cutmix,
    stochastic depth and ADDP's erasing.
    """
    torch.manual_seed(cfg.seed)
    head = FineTuned(net, len(data.classes), cfg).to(cfg.device).train()
    optimizer = torch.optim.AdamW(layer_groups(head, decay), lr=0.0, betas=(0.9, 0.999))
    batches = fresh_batches(lambda x, names: {"x": x}, data, index, cfg)
    train([(lambda features, y: mixup_loss(head, features["x"], y), optimizer)],
          batches, len(index) // cfg.batch_size, title, cfg, finetuning_of(net)[2])
    return score_heads({"model": head}, lambda x, names: {("model", ""): x}, test, [None], cfg)


def mixup_loss(logits, x, y, alpha=0.8, smoothing=0.1):
    """Cross-entropy of blends, each image with another of the batch, whose label counts as much as its pixels
    [mixup, Zhang et al. 2017, 1710.09412]."""
    ratio = torch.distributions.Beta(alpha, alpha).sample().item()
    blended = logits(ratio * x + (1 - ratio) * x.flip(0))
    own, other = (F.cross_entropy(blended, label, label_smoothing=smoothing) for label in (y, y.flip(0)))
    return ratio * own + (1 - ratio) * other


def layer_groups(head, decay, weight_decay=0.05):
    """Parameters of a FineTuned for an optimizer. The further from the output, the less is left to learn:
    'scale' is decay ** (layers above). Vectors, such as biases, are not pulled to zero."""
    named = [(name.removeprefix("net.").split("."), p) for name, p in head.named_parameters()
             if p.requires_grad]
    top = 1 + len({rest[0] for (part, *rest), _ in named if part == "blocks"})
    groups = {}
    for (part, *rest), p in named:                          # 0 is the stem, i + 1 is blocks.i, top the rest
        depth = int(rest[0]) + 1 if part == "blocks" else 0 if part in head.net.stem else top
        groups.setdefault((depth, p.dim() > 1), []).append(p)
    return [{"params": params, "scale": decay ** (top - depth),
             "weight_decay": weight_decay if is_matrix else 0.0}
            for (depth, is_matrix), params in groups.items()]


class LARS(torch.optim.Optimizer):
    """SGD with momentum for which each matrix's gradient is scaled to trust x the matrix's length
    (official file: util/lars.py).

    Vectors, such as biases, are neither decayed nor scaled. Where weights or gradient have length 0
    nothing is scaled.
    """

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.9, trust=0.001):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                change = p.grad
                if p.dim() > 1:
                    change = change + group["weight_decay"] * p
                    length, change_length = p.norm(), change.norm()
                    scale = group["trust"] * length / change_length
                    change = change * torch.where((length > 0) & (change_length > 0), scale, 1.0)
                momentum = self.state[p].setdefault("mu", torch.zeros_like(p))
                momentum.mul_(group["momentum"]).add_(change)
                p.add_(momentum, alpha=-group["lr"])


# Batches for a process: its part of each batch. The last, incomplete batch is left out, as published.


def cached_batches(features, y, cfg):
    """epoch -> batches of features {key: (N, ...)} that were computed once."""
    def batches(epoch):
        order = shuffled(len(y), cfg.seed, epoch).to(y.device)
        for batch in order.split(cfg.batch_size)[:len(y) // cfg.batch_size]:
            mine = local_shard(batch)
            yield {key: v[mine] for key, v in features.items()}, y[mine]
    return batches


def fresh_batches(read, data, index, cfg):
    """The same of features that are computed anew, from random crops with --augment and in fine-tuning."""
    data.stand_ins = index.sort().values.tolist()           # else few labels would become more

    def batches(epoch):
        order = index[shuffled(len(index), cfg.seed, epoch)]
        mine = [local_shard(batch) for batch in order.split(cfg.batch_size)[:len(index) // cfg.batch_size]]
        parts = [part for batch in mine for part in batch.split(images_at_once(data, cfg.device))]
        plan = [(part, None) for part in parts]
        if cfg.augment or cfg.head == "finetune":
            plan = [(part, unified.hash_ints(cfg.seed, epoch, part)[:, None]) for part in parts]
        features, labels = [], []
        for of_part, y in read_batches(read, data, plan, cfg.device, cfg.workers, replace=True):
            features.append(of_part)
            labels.append(y)
            if sum(map(len, labels)) == len(mine[0]):
                yield {key: torch.cat([f[key] for f in features]) for key in of_part}, torch.cat(labels)
                features, labels = [], []
    return batches


# The score on the whole test set, once, after the last epoch. (MAE and MAGE report their best epoch.)


def score_heads(heads, read, data, dims, cfg):
    """How many images of a data set can be read; {name: [accuracy in [0, 1] on these for each d of dims]}."""
    @torch.no_grad()
    def predict(x, names):
        features = read(x, names)
        return {name: torch.stack([v.argmax(1) for v in head.eval().nested(*features_of(features, name),
                                                                           dims=dims)], 1)
                for name, head in heads.items()}                                            # (B, len(dims))
    found, y = extract_features(predict, data, torch.arange(len(data)), cfg, None)
    return len(y), {name: (v == y[:, None]).float().mean(0).tolist() for name, v in found.items()}


# ----------------------------------------------------------------------------------------------------------
# 4. Where features are read
#
# A reader turns images x (B, 3, S, S) and their names int (B,) into {(network, what): (B, ...)}. All that
# is compared is read from one image while it is at hand, since decoding it may take longest. A whole
# image's name is its number, a crop's name is the crop's: what is random follows from the name, so that a
# fresh crop has fresh noise, and the same image always looks the same.

ON_MAPS = ("attention", "difformer", "diffeed", "segment")      # these heads read maps, the others vectors


class Place(typing.NamedTuple):
    """After which block, how corrupted the image is, and how the map becomes a vector: 'mean', 'class',
    or '2' for averages of 2 x 2 cells."""
    layer: int
    t: float
    pool: str


def reader(nets, places, cfg, comparable=False):
    """Reads what --head needs of nets, {name: model}, and of 'pixels'. comparable: see feature_vectors()."""
    @torch.no_grad()
    def read(x, names):
        seeds = unified.to_device(unified.hash_ints(cfg.seed, names), x.device)
        x, mask, features = x[:, :3], x[:, 3:], {}
        with autocast(cfg):
            inputs = tokenize(next(iter(nets.values())), x)     # once: all networks have the same tokenizer
            for name, model in nets.items():
                for what, v in read_network(model, places, inputs, seeds, cfg, comparable).items():
                    features[name, what] = v.float() if v.is_floating_point() else v
        if cfg.head == "segment":
            cells = max(m.size(-1) for m in features.values())
            side = -(-x.size(-1) // cells)                      # of a patch, one for each cell
            features["pixels", None] = F.pixel_unshuffle(F.interpolate(x, cells * side), side)
            features["mask", None] = (255 * mask[:, 0]).round().byte()
        elif cfg.head not in ON_MAPS and not cfg.save:
            features["pixels", None] = pixel_vectors(x)
        return features
    return read


def read_network(model, places, x, seeds, cfg, comparable):
    """Vectors or maps of one network at the places or, for DifFeed, what it computes maps from."""
    if cfg.head == "diffeed":
        return {"x": x, **{t: noise_of(model, t, seeds) for t in by_t(places)}}
    if cfg.head in ON_MAPS:
        return {place: pool_cells(m, int(cfg.pool)) for place, m in feature_maps(model, places, x, seeds)}
    return feature_vectors(model, places, x, seeds, comparable)


def by_t(places):
    """{t: its places}, in their order."""
    return {t: [place for place in places if place.t == t] for t in distinct(place.t for place in places)}


def features_of(features, name):
    """What a reader has read in one network, in its order."""
    return [v for (network, _), v in features.items() if network == name]


def feature_maps(model, places, x, seeds):
    """Images x (B, 3, S, S), or ids (B, L) -> yields (place, map (B, C, h, w)); one pass for each t."""
    for t, at_t in by_t(places).items():
        layers = sorted({place.layer for place in at_t})
        maps = dict(zip(layers, model.features(x, t, layers, noise=noise_of(model, t, seeds))))
        for place in at_t:
            yield place, maps[place.layer]


def feature_vectors(model, places, x, seeds, comparable=False):
    """The same as {place: vectors (B, C)}: means normalised image by image, cells as they are. The place
    that the model itself reads is model.embed, normalised as its authors do; or, if all means shall be
    comparable, a mean like the others. The class position is always model.embed's."""
    own = Place(model.best_layer, model.best_t, "mean")
    embedded = [place for place in places if place.pool == "class" or place == own and not comparable]
    vectors = {place: model.embed(x, noise=noise_of(model, place.t, seeds), pool=place.pool)
               for place in embedded}
    for place, m in feature_maps(model, [place for place in places if place not in embedded], x, seeds):
        if place.pool == "mean":
            vectors[place] = F.layer_norm(m.mean((2, 3)), m.shape[1:2], eps=1e-6)
        else:
            vectors[place] = pool_cells(m, int(place.pool)).flatten(1)
    return vectors


def pool_cells(m, side):
    """Averages of a map (B, C, h, w) over side x side cells, or as many as there are: (B, C, side, side)."""
    return F.adaptive_avg_pool2d(m, min(side, m.size(-1)))


PIXEL_SIDE = 32                 # raw pixels are averaged to it: then a closed-form fit still takes seconds


def pixel_vectors(x):
    """(B, 3, S, S) -> (B, 3 * S * S), with S at most PIXEL_SIDE."""
    return pool_cells(x, PIXEL_SIDE).flatten(1)


def noise_of(model, t, seeds):
    """What the corruption to degree t is drawn from; the seeds (B,) decide it."""
    return model.noise(unified.hash_ints(seeds, round(1000 * t)))


def tokenize(model, x):
    """Images as ids for a model that reads these, so that it is done once for several places and networks."""
    return model.to_ids(x) if model.reads_ids else x


def float32_features(model, cfg):
    """model.features under autocast, with maps in float32."""
    def features(*args, **options):
        with autocast(cfg):
            return [m.float() for m in model.features(*args, **options)]
    return features


def autocast(cfg):
    """--dtype, as a context."""
    return torch.autocast(torch.device(cfg.device).type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")


# ----------------------------------------------------------------------------------------------------------
# 5. The search for a place
#
# For every candidate, ridge or k-NN on nine tenths of the training images is scored on the other tenth.

BY_NEIGHBOURS = ("knn", "fewshot")                              # k-NN chooses the place of these, not ridge
ONE_PLACE = ("ridge", "linear", "knn", "fewshot", "mlp", "attention")   # these heads read the best place
CHOICE = 10_000             # training images for the search at most: all places of one t must fit into memory
SWEEP = (0, 0.01, 0.03, 0.05, 0.09, 0.15, 0.3, 0.5)             # of the largest t: DiffSSL's timesteps


def places_to_read(model, cfg):
    """All combinations of --layers, --t and --pool; the class position only where the model reads it.
    UserError if the model has no such place."""
    layers, ts = parse_numbers(cfg.layers, int, "--layers"), parse_numbers(cfg.t, float, "--t")
    searched = bool(layers or ts or cfg.sweep)
    if cfg.head in (*ON_MAPS, "finetune"):
        pools = ["mean"]                                        # a place for maps is chosen by their means
    else:
        pools = cfg.pool.split(",") if cfg.pool else ["mean" if searched else model.pools[0]]
    low, high, meaning = model.t_range
    for layer in layers:
        if layer not in model.layers:
            raise UserError(f"this model has no layer {layer}; "
                            f"--layers takes {min(model.layers)} to {max(model.layers)}")
    for t in ts:
        if not low <= t <= high or isinstance(high, int) and t != int(t):
            raise UserError(f"--t {t:g} does not fit this model; it is {meaning}, {low} to {high}")
    for pool in pools:
        if pool not in ("mean", "class") and not is_side(pool):
            raise UserError(f"there is no pooling {pool!r}; --pool takes mean, class, or cells on a side")
    if "class" in pools and "class" not in model.pools:
        raise UserError("this model has no class position; --pool takes mean, or cells on a side")
    if pools == ["class"] and searched:
        raise UserError(f"--pool class reads layer {model.best_layer} of the whole image; "
                        "leave --layers, --t and --sweep out")
    layers = layers or (list(model.layers) if cfg.sweep else [model.best_layer])
    ts = ts or ([low + fraction * (high - low) for fraction in SWEEP] if cfg.sweep else [model.best_t])
    ts = map(round if isinstance(high, int) else float, ts)
    places = [Place(layer, t, pool) for t in ts for layer in layers for pool in pools if pool != "class"]
    places = distinct(places + [Place(model.best_layer, model.best_t, "class")] * ("class" in pools))
    if cfg.sweep and len(places) == 1:
        raise UserError("--sweep compares places, and --layers and --t leave one; leave one of these out")
    return places


def choose(model, places, train_set, index, cfg):
    """The best place, by at most CHOICE of the training images index (N,)."""
    if len(places) == 1:
        return places[0]
    index, scores = index[:CHOICE], {}
    held = len(index) // 10
    for t, at_t in by_t(places).items():
        read = reader({"model": model}, at_t, dataclasses.replace(cfg, head="ridge"), comparable=True)
        features, y = extract_features(read, train_set, index, cfg, f"t {t:g}, {len(at_t)} places")
        scores |= score_places({place: features["model", place] for place in at_t}, y, held, cfg)
    best, judge = max(places, key=scores.get), "k-NN" if cfg.head in BY_NEIGHBOURS else "ridge"
    print(f"{judge} on {len(y) - held} training images, accuracy in % on {held} others of them; [taken]")
    print_scores(scores, best)
    if held < 100:
        print(f"warning: {held} held-out images are too few to tell {len(places)} places apart for certain")
    if cfg.sweep and unified.rank_and_world()[0] == 0:
        path, title = results_folder(cfg.run) / "sweep.png", f"{judge} accuracy (percent), {best.pool}; "
        heat_map(scores, best, title + f"best: layer {best.layer}, t {best.t:g}").save(path)
        print(f"drawn in {path}")
    return best


def score_places(vectors, y, held, cfg):
    """{place: vectors (N, C)} -> {place: accuracy on the first `held` images, by what the others teach}."""
    if cfg.head in BY_NEIGHBOURS:
        return {place: knn(x[held:], y[held:], x[:held], y[:held], cfg.k) for place, x in vectors.items()}
    scores = {}
    for width in {v.size(1) for v in vectors.values()}:                 # equally wide ones in one product
        places = [place for place, v in vectors.items() if v.size(1) == width]
        x = torch.stack([vectors[place] for place in places])
        scores |= zip(places, ridge_probe(x[:, held:], y[held:], x[:, :held], y[:held]))
    return scores


def columns_of(scores):
    """{(t, pool): its title} of all places; a pooling that they share is not repeated."""
    columns = distinct(place[1:] for place in scores)
    several = len({pool for _, pool in columns}) > 1
    return {(t, pool): f"t {t:g}" + f", {pool}" * several for t, pool in columns}


def print_scores(scores, best):
    """A table of {place: accuracy}: a row a layer, a column a t and pooling, the best one in brackets."""
    columns = columns_of(scores)
    texts = {p: f"[{100 * v:.1f}]" if p == best else f"{100 * v:.1f} " for p, v in scores.items()}
    print_columns([["layer", *columns.values()]] + [
        [str(layer), *(texts.get((layer, *column), "") for column in columns)]
        for layer in sorted({place.layer for place in scores})])


def print_columns(rows):
    """Rows of as many words each, one below the other: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *others in rows:
        print("  ".join([first.ljust(widths[0])] + [v.rjust(w) for v, w in zip(others, widths[1:])]).rstrip())


def heat_map(scores, best, title, w=36, h=26):
    """{place: accuracy} -> PIL image, laid out as the table: dark is good, a frame best."""
    rows, columns = sorted({place.layer for place in scores}), columns_of(scores)
    left, top, low, high = 60, 60, min(scores.values()), max(scores.values())
    w = max(w, 7 * max(map(len, columns.values())))
    image = PIL.Image.new("RGB", (max(left + w * len(columns), 400) + 20, top + h * len(rows) + 20), "white")
    draw = PIL.ImageDraw.Draw(image)

    def write_centred(x, y, text, fill="black"):
        draw.text((x - draw.textlength(text) / 2, y - 6), text, fill=fill)
    draw.text((20, 12), title, fill="black")
    write_centred(left / 2, top - 10, "layer")
    for i, text in enumerate(columns.values()):
        write_centred(left + (i + 0.5) * w, top - 10, text)
    for j, layer in enumerate(rows):
        write_centred(left / 2, top + (j + 0.5) * h, str(layer))
    for place, score in scores.items():
        x, y = left + [*columns].index(place[1:]) * w, top + rows.index(place.layer) * h
        depth = (score - low) / max(high - low, 1e-9)
        color = tuple(round(255 + depth * (dark - 255)) for dark in (0x1f, 0x77, 0xb4))
        frame = "#d62728" if place == best else None
        draw.rectangle((x, y, x + w - 2, y + h - 2), fill=color, outline=frame, width=3)
        write_centred(x + w / 2 - 1, y + h / 2 - 1, f"{100 * score:.1f}", "white" if depth > 0.6 else "black")
    return image


# ----------------------------------------------------------------------------------------------------------
# 6. A probe from end to end


def main():
    typed = Config(**unified.parse_flags(Config, __doc__))
    check_flags(typed)
    cfgs = [settle(dataclasses.replace(typed, run=run)) for run in distinct(typed.run)]
    if typed.samples and int(os.environ.get("RANK", 0)):
        return                                                          # the first process measures alone
    join = unified.pick_device if typed.samples else unified.join_processes
    device = str(join(typed.device))
    first = unified.rank_and_world()[0] == 0
    try:
        with contextlib.redirect_stdout(sys.stdout if first else None):             # all compute, one prints
            for cfg in cfgs[1:]:                                        # refused, if at all, before any work
                model, config, _ = load(cfg)
                open_sets(model, config, dataclasses.replace(cfg, device="cpu"))
            runs = [run(dataclasses.replace(cfg, device=device), first) for cfg in cfgs]
            if first and len(runs) > 1:
                print_table(runs)
    finally:
        unified.leave_processes()


def load(cfg):
    """Model, its config, and the places to read. UserError for flags that do not fit it."""
    model, config = unified.load_model(cfg.run, {"raw": False, "ema": True}.get(cfg.weights),
                                       heads=cfg.adm_heads, order=cfg.adm_order)
    if cfg.weights == "ema" and not unified.MODELS[config["arch"]["model"]].recipe["ema"]:
        raise UserError(f"--weights ema: {cfg.run} keeps no averaged weights; leave that out")
    places = places_to_read(model, cfg)
    if cfg.head == "diffeed":
        feedback_of(model, cfg, max(place.layer for place in places))
    return model, config, places


def run(cfg, first):
    """Read, compare and report. first: this process writes the results. Returns the rows of probe.jsonl."""
    started = time.time()
    model, config, places = load(cfg)
    if cfg.compile:
        compile_blocks(model)
    if cfg.samples:
        return judge_samples(model, config, cfg)
    if cfg.save:
        return save_features(model.to(cfg.device), config, places, first, cfg)
    dataset, *sets = open_sets(model.to(cfg.device), config, cfg)
    train_set, test_set = map(with_labels, sets)
    print(train_set.summary or f"{dataset}: {len(train_set)} images to train on, {len(test_set)} to test on")
    for line in few_to_test_on(len(test_set)) * (cfg.head != "segment"):
        print(line)
    index = images_to_train_on(train_set, cfg)
    if cfg.head != "segment" and len(train_set.labels[index].unique()) < 2:
        raise UserError(f"{len(index)} training images are left, all of one class; take more with --limit or "
                        "--labels, or name those of others in --subset")
    if cfg.head in RECIPES:
        cfg = fit_recipe(cfg, len(index), finetuning_of(model))
    if cfg.head in ONE_PLACE:
        places = [choose(model, places, train_set, index, cfg)]
    if cfg.head in ON_MAPS:
        places = [place._replace(pool=cfg.pool) for place in places]
    nets = {"model": model, "untrained": untrained(model, config, from_zero=cfg.head == "finetune")}
    if cfg.compile:
        compile_blocks(nets["untrained"])
    results = compare(nets, places, train_set, index, test_set, cfg)
    about = {"run": cfg.run, "model": config["arch"]["model"], "dataset": dataset,
             "trained_on": config.get("dataset"), "training": training_of(config), "labels": cfg.labels,
             "subset": cfg.subset or None, "weights": cfg.weights or None,
             "seconds": round(time.time() - started, 1)}
    rows = report(places, titles(model, cfg), results, about, cfg) if first else []
    for data, fate in ((train_set, "left out or replaced"), (test_set, "left out")):
        if data.unreadable:
            print(f"{len(data.unreadable)} unreadable images, named above, were {fate}")
    return rows


def compare(nets, places, train_set, index, test_set, cfg):
    """Accuracies of the networks {'model': ..., 'untrained': ...}, and of 'pixels', read by --head.
    Returns [(head, training images, readable test images, {name: [accuracy, ...]}), ...]."""
    if cfg.head == "finetune":                      # from scratch without layer decay
        decay = finetuning_of(nets["model"])[1]
        n, tuned = finetune(nets["model"], train_set, index, test_set, decay, "fine-tuning", cfg)
        n, fresh = finetune(nets["untrained"], train_set, index, test_set, 1.0, "from scratch", cfg)
        return [("finetune", len(index), n, {"model": tuned["model"], "untrained": fresh["model"]})]
    read = reader(nets, places, cfg)
    if cfg.head in RECIPES:
        return compare_trained(read, nets, places, train_set, index, test_set, cfg)
    whole = torch.arange(len(test_set))
    x_test, y_test = extract_features(read, test_set, whole, cfg, f"features of {name_of(cfg.run)}, test set")
    x, y = extract_features(read, train_set, index, cfg, f"features of {name_of(cfg.run)}, training set")
    x, x_test = ({name: v for (name, _), v in features.items()} for features in (x, x_test))
    if cfg.head == "fewshot":
        return fewshot(x, y, x_test, y_test, len(train_set.classes), cfg)
    if cfg.head == "knn" and cfg.k > len(y):
        print(f"--k {cfg.k}: there are {len(y)} training images only, and all of them vote")
    head = {"ridge": ridge_probe, "knn": functools.partial(knn, k=cfg.k)}[cfg.head]
    return [(cfg.head, len(y), len(y_test), {name: [head(x[name], y, x_test[name], y_test)] for name in x})]


def compare_trained(read, nets, places, train_set, index, test_set, cfg):
    """compare() for heads that are trained on frozen features."""
    classes, sample = len(train_set.classes), read_one(read, train_set, index, cfg)
    pixels = not cfg.matryoshka                         # whose first values are a corner, and mean nothing
    names = distinct(name for name, _ in sample if name != "mask" and (pixels or name != "pixels"))
    heads = {name: new_head(name, nets, places, sample, classes, cfg) for name in names}
    if cfg.augment or cfg.head == "diffeed":
        batches, images = fresh_batches(read, train_set, index, cfg), len(index)
    else:
        print(f"{cfg.head}: on features of whole images, computed once; "
              "--augment takes fresh crops in every epoch, as published")
        x, y = extract_features(read, train_set, index, cfg, f"features of {name_of(cfg.run)}, training set")
        if cfg.batch_size > len(y):                             # some images could not be read
            cfg = fit_recipe(cfg, len(y))
        batches, images = cached_batches(x, y, cfg), len(y)
    width = heads["model"].linear.weight.size(1)
    dims = [2 ** k for k in range(3, 32) if 2 ** k < width] + [width] if cfg.matryoshka else [None]
    train_heads(heads, batches, images // cfg.batch_size, dims, cfg)
    if cfg.head == "segment":
        cells = max(m.size(-1) for m in features_of(sample, "model"))
        return segment_results(heads, read, test_set, images, cells, cfg)
    n, scores = score_heads(heads, read, test_set, dims, cfg)
    return [(f"{cfg.head}-{d}" if d else cfg.head, images, n,
             {name: [values[i]] for name, values in scores.items()}) for i, d in enumerate(dims)]


def titles(model, cfg):
    """{name: how the report calls it} of all that is compared."""
    fresh = untrained_title(model)
    if cfg.head == "finetune":
        fresh = "the same network from scratch, by the same recipe but without layer decay"
    pixels = "raw pixels" + ", a patch a cell" * (cfg.head == "segment")
    return {"model": name_of(cfg.run), "pixels": pixels, "untrained": fresh,
            "ceiling": "the masks themselves, averaged to the cells"}


def untrained_title(model):
    """How reports call the model of untrained()."""
    return "the same network untrained" + ", but for its tokenizer" * bool(model.tokenizer)


def training_of(config):
    """A model and its training, in words: 'umd, 3000 x 32 shapes', steps and images a step."""
    steps, batch, epochs = (config.get(key) for key in ("steps", "batch_size", "epochs"))
    steps = f"{config['stopped']} of {unified.steps_of(config)}" if "stopped" in config else steps
    length = f"{steps} x {batch}" if steps and batch else f"{epochs:g} epochs of" if epochs else ""
    name = pathlib.Path(config.get("dataset", "")).name
    return config["arch"]["model"] + f", {length} {name}".rstrip() * bool(length)


def name_of(run):
    """The name of a run's folder, or of a file of weights."""
    path = pathlib.Path(run)
    return (path.parent if path.name == "model.pt" else path).resolve().name


def same_data(a, b):
    """Whether two names mean one data set, however a path is spelled."""
    return a == b or None not in (a, b) and os.path.realpath(a) == os.path.realpath(b)


def standard_error(p, n):
    """Of an accuracy p on n test images, as others would have varied it (binomial). If all are right, or all
    wrong, as if one more were wrong, and one right."""
    p = p if 0 < p < 1 else (p * n + 1) / (n + 2)
    return math.sqrt(p * (1 - p) / n)


def few_to_test_on(n):
    """A line, in a list, on test images of which one changes an accuracy."""
    return [f"{n} test images are few: one is {1 / n:.1%} of an accuracy; half of the images to train on and "
            "half to test on, as in train/ and val/, test more"] * (n < 100)


def with_error(p, n, head):
    """A figure and its standard error, if it is an accuracy, in words."""
    return f"{p:6.1%}" + f" +- {standard_error(p, n):.1%}" * (head != "segment")


def by_chance(p, q, n):
    """Whether accuracies p and q on n test images differ by at most two standard errors."""
    return abs(p - q) <= 2 * math.hypot(standard_error(p, n), standard_error(q, n))


def tell_no_gain(trained, untrained, n):
    """Print a line if features are not surely better than the untrained network's, on n test images."""
    chance = by_chance(trained, untrained, n)
    if chance or untrained > trained:
        verdict = "the difference is within chance" if chance else "training harmed the features"
        print(f"             the network has {untrained:.1%} untrained, {trained:.1%} trained: {verdict}")


def report(places, titles, results, about, cfg):
    """Print the results of compare() and append them to probe.jsonl, with what is known about the run."""
    rows = []
    layers, ts = distinct(place.layer for place in places), distinct(place.t for place in places)
    metric, own = "miou" if cfg.head == "segment" else "top1", about["trained_on"]
    for head, images, n, accuracies, *more in results:
        print(f"{head} on {about['dataset']}"
              + f", of a model trained on {own}" * (own is not None and not same_data(own, about["dataset"]))
              + f": layer {', '.join(map(str, layers))}, t {', '.join(f'{t:g}' for t in ts)}"
              + f", {places[0].pool}" * (head != "segment") + f", k {cfg.k}" * (head == "knn")
              + f", {images} training images, {n} test images; "
              + ("mIoU" if head == "segment" else "+- one standard error"))
        row = {"head": head, "layer": layers if layers[1:] else layers[0], "t": ts if ts[1:] else ts[0],
               "pool": places[0].pool, "k": cfg.k, metric: None, "untrained": None, "pixels": None}
        for name, values in accuracies.items():
            p = round(sum(values) / len(values), 4)             # as it stands in probe.jsonl and in tables
            draws = f", {statistics.stdev(values):.1%} from draw to draw" if len(values) > 1 else ""
            print(f"    {with_error(p, n, head)}  {titles[name]}{draws}")
            row[metric if name == "model" else name] = p
        if cfg.head != "finetune":
            tell_no_gain(row[metric], row["untrained"], math.inf if cfg.head == "segment" else n)
        row |= dict(*more) or {"standard_error": round(standard_error(row["top1"], n), 4)}
        if len(accuracies["model"]) > 1:
            row["deviation"] = round(statistics.stdev(accuracies["model"]), 4)
        options = ("seed", "lr", "epochs", "batch_size", "augment", "sgd", "hidden", "feedback", "dtype")
        rows.append({**row, **about, "n_train": images, "n_test": n,
                     **{name: getattr(cfg, name) for name in options}})
    return append_rows(rows, cfg)


def append_rows(rows, cfg):
    """Append rows to probe.jsonl, with the date, and return them."""
    path, date = results_folder(cfg.run) / "probe.jsonl", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    rows = [{**row, "date": date} for row in rows]
    with open(path, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"appended to {path}")
    return rows


def print_table(runs):
    """Rows of several runs, a list for each, as one table: a line a network, a column a head. A baseline
    that is the same for several runs stands there once."""
    names = [name_of(rows[0]["run"]) for rows in runs]
    names = names if len(set(names)) == len(names) else [rows[0]["run"] for rows in runs]
    heads, lines = distinct(row["head"] for rows in runs for row in rows), {}
    for kind, title in (("top1", ""), ("miou", ""), ("untrained", "untrained"), ("pixels", "raw pixels"),
                        ("ceiling", "ceiling")):
        for name, rows in zip(names, runs):
            if rows[0].get(kind) is not None:
                lines.setdefault((title or name, *table_cells(rows, heads, kind)), []).append(name)
    print_columns([["", *heads, "layer", "t", "pool", "train", "test", "training"]] + [
        [title if title in names or len(of) == len(runs) else f"{title} ({', '.join(of)})", *cells]
        for (title, *cells), of in lines.items()])
    for key, remedy in (("pool", "--pool mean"), ("dataset", "--dataset")):
        if len(found := distinct(rows[0][key] for rows in runs)) > 1:
            print(f"note that the {key} differs: {', '.join(found)}; {remedy} makes it the same")
    at_home = [name for name, (row, *_) in zip(names, runs)
               if same_data(row.get("trained_on"), row["dataset"])]
    if 0 < len(at_home) < len(names):
        print(f"note that {', '.join(at_home)} learned from this data set, and the others did not")
    tell_best(names, runs)


def tell_best(names, runs):
    """Print, for each head, which run has the highest accuracy, and which may be as good."""
    scores = collections.defaultdict(list)
    for name, rows in zip(names, runs):
        for row in rows:
            if "top1" in row:
                scores[row["head"], row["dataset"], row["n_test"]].append((row["top1"], name))
    for (head, _, n), of_runs in scores.items():
        top, best = max(of_runs, key=lambda found: found[0])
        near = [name for p, name in of_runs if name != best and by_chance(p, top, n)]
        doubt = f"; {n} test images cannot tell it from {', '.join(near)}" * bool(near)
        if len(of_runs) > 1:
            print(f"{head}: {best} is best{doubt}")


def table_cells(rows, heads, kind):
    """A line of the table behind its title, from the rows of one run."""
    n, images = rows[0]["n_test"], ", ".join(distinct(str(row["n_train"]) for row in rows))
    cells = {row["head"]: with_error(row[kind], n, row["head"]).strip() for row in rows}
    layer, t, pool = (rows[0][key] for key in ("layer", "t", "pool"))
    t = f"{t:g}" if isinstance(t, float) else t                    # "0", as of timesteps
    place = [str(cell) * (kind != "pixels") for cell in (layer, t, pool)]
    tokens = unified.MODELS[rows[0]["model"]].tokenizer
    own = rows[0]["training"]
    training = {"top1": own, "miou": own, "untrained": "tokenizer alone" * tokens}
    return *(cells.get(head, "") for head in heads), *place, images, str(n), training.get(kind, "")


def save_features(model, config, places, first, cfg):
    """--save: features (N, C) of every image that can be read, labels (N,), -1 for none, file names (N,); and
    the names of the classes that labels count."""
    data = open_data(*data_of(config, cfg), model.image_size, None, cfg.device, cfg.strict_images)
    print(data.summary, end="\n" * bool(data.summary))
    labels, data.labels = data.labels, torch.arange(len(data))          # to see which of them were read
    index = shuffled(len(data), cfg.seed)[:cfg.limit].sort().values
    x, kept = extract_features(reader({"model": model}, places, cfg), data, index, cfg, "features")
    if not len(kept):
        raise UserError(f"none of {len(index)} images can be read, {shown(data.paths[0])} for one")
    x, labels, files = x["model", places[0]].cpu().numpy(), labels[kept.cpu()].numpy(), kept.tolist()
    if isinstance(data, ImageFolder):
        files = [shown(data.paths[i].relative_to(data.root).as_posix()) for i in files]
    place = f"layer {places[0].layer}, t {places[0].t:g}, {places[0].pool}; {training_of(config)}"
    if first:
        arrays = {"features": x, "labels": labels, "files": numpy.array(files, str),
                  "classes": numpy.array(data.classes, str)}
        write_file(pathlib.Path(cfg.save), lambda file: numpy.savez(file, **arrays))
    if repeated := len(x) - len({hash(row.tobytes()) for row in x}):
        print(f"warning: {repeated} of {len(x)} rows repeat another: these images, or their ids, are the "
              "same to this network")
    print(f"features {x.shape} of {place}: {cfg.save}; images without a label (-1): {(labels < 0).sum()}, "
          f"left out as unreadable: {len(index) - len(kept)}\n"
          f'    z = numpy.load("{cfg.save}")\n    z["features"], z["labels"], z["files"], z["classes"]')


# Samples of shapes: the set's possible drawings are known, so one can see which images are among them.


@functools.cache
def many_drawings(size):
    """What decides drawings (N, 7), and their pixels float (N, 3 * size * size)."""
    numbers = unified.hashed_uniform(torch.arange(10_000), 1, 7)
    drawings = [unified.draw_shapes(None, size, part)[0] for part in numbers.split(100)]
    return numbers, torch.cat(drawings).flatten(1).float()


def nearest_drawings(x):
    """Images uint8 (B, 3, S, S) -> the drawing nearest to each, like x, and its class (B,). The best of many
    drawings is improved: not in class, colour and quarter turn, but in radius, place and further turn."""
    size, generator = x.size(-1), torch.Generator().manual_seed(0)
    numbers, drawings = many_drawings(size)
    best = numbers[torch.cdist(x.flatten(1).float(), drawings).argmin(1)]                           # (B, 7)
    for scale in (0.2, 0.1, 0.05, 0.02, 0.01):
        moves = scale * torch.randn(8, 7, generator=generator) * torch.tensor([0, 0, 1, 1, 1, 0, 1])
        tries = (best[:, None] + F.pad(moves, (0, 0, 1, 0))).clamp(1e-6, 1 - 1e-6)              # (B, 9, 7)
        drawings, _ = unified.draw_shapes(None, size, tries.flatten(0, 1))
        distance = (drawings.unflatten(0, tries.shape[:2]).float() - x[:, None]).square().sum((2, 3, 4))
        best = tries[torch.arange(len(x)), distance.argmin(1)]
    return unified.draw_shapes(None, size, best)


def print_drawn(title, x):
    """Print how many of the images uint8 (N, 3, S, S) are drawings, and of which class: at most one pixel in
    twenty is further than 32 levels from the nearest drawing."""
    drawings, labels = map(torch.cat, zip(*map(nearest_drawings, x.split(50))))
    far = (drawings.int() - x).abs().amax(1) > 32                                               # (N, S, S)
    found = far.double().mean((1, 2)) <= 0.05
    ratio, counts = found.double().mean().item(), torch.bincount(labels[found], minlength=len(unified.SHAPES))
    kinds = ", ".join(f"{kind} {count}" for kind, count in zip(unified.SHAPES, counts))
    print(f"{ratio:6.1%} +- {standard_error(ratio, len(x)):.1%} of {len(x)} {title} are drawings: {kinds}")


def judge_drawings(model, x, test):
    """Print how many are drawings of x, of test images, and of what the tokenizer keeps of these."""
    print_drawn("samples", x)
    print_drawn("test images", test.cpu())
    if model.tokenizer:
        y = unified.to_uint8(model.reconstruct(test / 255)[0])
        print_drawn("test images through the tokenizer", torch.from_numpy(y).movedim(-1, 1))


# Samples of any data set with classes. FD-local is the Frechet distance of FID, in the features of a small
# classifier trained here on the set's own training images: it compares models of one data set, and no FID.

CLASSIFIER = dict(images=200_000, batch_size=128, lr=4e-3, seed=0)      # images: repetitions count, too


def new_classifier(classes, size):
    """Images (B, 3, size, size), seen at 64 x 64 at most -> features (B, 256), from [0] -> logits."""
    layers, widths = [nn.AdaptiveAvgPool2d(min(size, 64))], (3, 32, 64, 128, 256)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(CLASSIFIER["seed"])
        for inp, out in zip(widths, widths[1:]):
            layers += [nn.Conv2d(inp, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
                       nn.MaxPool2d(2, ceil_mode=True)]
        body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return nn.Sequential(body, nn.Linear(out, classes)).to(memory_format=torch.channels_last)


def classifier_of(name, train_set, test_set, cfg):
    """The data set's classifier, from its file beside the runs or trained now; its test accuracy."""
    net = new_classifier(len(train_set.classes), train_set.size).to(cfg.device)
    folder = results_folder(results_folder(cfg.run).parent)
    mark = fingerprint(net, train_set, (CLASSIFIER, fingerprint(net, test_set, "")))
    path = folder / f"{pathlib.Path(name).resolve().name}-classifier.pt"
    with contextlib.suppress(UserError):                                # missing or damaged: it is made anew
        state = unified.load_checkpoint(path)
        if state.get("fingerprint") == mark:
            return unified.load_strictly(net, state["model"], path).eval(), state["top1"]
    train_classifier(net, train_set, cfg)
    found, y = map_images(lambda x: net.eval()(x).argmax(1), test_set, None, cfg.workers, cfg.device)
    state = {"fingerprint": mark, "model": net.state_dict(), "top1": (found == y).double().mean().item()}
    write_file(path, lambda file: torch.save(state, file))
    return net, state["top1"]


def train_classifier(net, data, cfg):
    """Train on random crops and flips of a data set; net is changed."""
    images, batch, lr, seed = CLASSIFIER.values()
    index = shuffled(len(data), seed)[:images]
    batch, epochs = min(batch, len(index)), round(images / len(index))
    cfg = dataclasses.replace(cfg, augment=True, batch_size=batch, epochs=epochs, lr=lr, seed=seed)
    optimizer = torch.optim.AdamW(net.train().parameters(), lr=0.0)
    train([(lambda x, y: F.cross_entropy(net(x["x"]), y), optimizer)],
          fresh_batches(lambda x, names: {"x": x}, data, index, cfg), len(index) // batch, "classifier", cfg)


def frechet_distance(x, y):
    """|mean_x - mean_y|^2 + tr(cov_x + cov_y - 2 (cov_x^1/2 cov_y cov_x^1/2)^1/2) of features x (N, C) and
    y (M, C), in float64."""
    x, y = x.double(), y.double()
    cov_x, cov_y = x.T.cov(), y.T.cov()
    values, vectors = torch.linalg.eigh(cov_x)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ cov_y @ root).clamp(min=0).sqrt().sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + (cov_x + cov_y).trace() - 2 * overlap).item()


def precision_and_recall(x, y, k=3):
    """Ratio of samples x (N, C) in the manifold of the reference y (M, C), and of y in that of x. A manifold
    is a ball around each point, up to its k-th nearest other [Kynkaanniemi et al. 2019, 1904.06991]."""
    x, y = x.double(), y.double()
    radii_x, radii_y = (torch.cat([torch.cdist(part, v).kthvalue(k + 1).values for part in v.split(500)])
                        for v in (x, y))                                # the nearest is the point itself
    precise, recalled = [], torch.zeros(len(y), dtype=torch.bool)
    for part, radii in zip(x.split(500), radii_x.split(500)):
        distance = torch.cdist(part, y)                                                         # (500, M)
        precise.append((distance <= radii_y).any(1))
        recalled |= (distance <= radii[:, None]).any(0)
    return torch.cat(precise).double().mean().item(), recalled.double().mean().item()


def measure_samples(body, model, x, train_set, test_set, cfg):
    """{title: (FD-local, precision, recall)} of samples x uint8 (N, 3, S, S) and of anchors, n images each,
    in features body(images); n; the number of training images."""
    n, generator = min(len(x), len(train_set), len(test_set)), torch.Generator().manual_seed(0)
    noise = torch.randint(256, x[:n].shape, generator=generator).byte()
    own, noise = (ImageTensor(v, torch.zeros(len(v)).long(), [], (1, 1), cfg.device) for v in (x, noise))

    def features(title, data, count=n, change=torch.clone):
        return map_images(lambda x: body(change(x)), data, count, cfg.workers, cfg.device, title)[0]
    reference, found = features("training images", train_set, 50_000), {}
    found["samples"], found["test images"] = features("samples", own), features("test images", test_set)
    if model.tokenizer:
        title = "test images through the tokenizer"
        found[title] = features(title, test_set, change=lambda x: model.reconstruct(x)[0])
    found["noise"] = features("noise", noise)
    if min(map(len, found.values())) < 4:
        raise UserError("fewer than 4 of the images to test on can be read, and --samples needs 4; mend them")
    near = reference[shuffled(len(reference), 0)[:n]]
    with progress_bar(len(found), "distances", "set") as bar:
        for title, z in found.items():
            found[title] = (frechet_distance(z, reference), *precision_and_recall(z, near))
            bar.update()
    return found, n, len(reference)


def judge_samples(model, config, cfg):
    """--samples: FD-local, precision and recall beside their anchors; of shapes first how many are drawings.
    Returns the row of probe.jsonl, in a list."""
    started, x, size = time.time(), torch.zeros(0), model.image_size
    with contextlib.suppress(OSError, EOFError, ValueError, KeyError, TypeError, IndexError,
                             zipfile.BadZipFile):
        x = torch.from_numpy(numpy.load(cfg.samples)["arr_0"]).movedim(-1, 1)
    if x.dtype != torch.uint8 or x.shape[1:] != (3, size, size) or len(x) < 4:
        raise UserError("--samples takes what sample.py --npz made, 4 images or more of "
                        f"{size} x {size} pixels, not {cfg.samples}")
    name, train_set, test_set = open_sets(model.to(cfg.device), config, cfg)
    if len(test_set) < 4:
        raise UserError(f"{name} has {len(test_set)} images to test on, and --samples needs 4")
    if name == "shapes":
        judge_drawings(model, x, test_set.images[:500])
    net, top1 = classifier_of(name, with_labels(train_set), with_labels(test_set), cfg)
    results, n, n_train = measure_samples(net[0], model, x, train_set, test_set, cfg)
    print(f"{n} images of each against {n_train} training images of {name} (precision and recall: {n}); "
          f"the classifier has {top1:.1%} on the test set")
    print_columns([["", "FD-local", "precision", "recall"]] + [
        [title, f"{distance:.4g}", f"{precision:.1%}", f"{recall:.1%}"]
        for title, (distance, precision, recall) in results.items()])
    rows = {title: dict(zip(("fd_local", "precision", "recall"), v)) for title, v in results.items()}
    return append_rows([{"head": "samples", **rows.pop("samples"), "anchors": rows, "classifier_top1": top1,
                         "n": n, "n_train": n_train, "samples": cfg.samples, "run": cfg.run, "dataset": name,
                         "model": config["arch"]["model"], "seconds": round(time.time() - started, 1)}], cfg)


# Settings.


def settle(cfg):
    """The settings for one run, with the defaults that depend on others. UserError for what cannot be."""
    recipe = {"k": 20} if cfg.head in BY_NEIGHBOURS else (SGD if cfg.sgd else RECIPES).get(cfg.head, {})
    cfg = dataclasses.replace(
        cfg, dtype=unified.pick_dtype(cfg.dtype, cfg.device),
        compile=cfg.device.startswith("cuda") if cfg.compile is None else cfg.compile,
        **{name: value for name, value in recipe.items() if getattr(cfg, name) in (None, "")})
    if cfg.head in ON_MAPS and not is_side(cfg.pool):
        raise UserError(f"--head {cfg.head} reads maps; --pool takes the number of cells on a side, "
                        "16 if not given, for segment all up to 256")
    results_folder(cfg.run)
    return cfg


def check_flags(cfg):
    """UserError for flags that do not belong to --head."""
    belongs = {"shots": ["fewshot"], "k": BY_NEIGHBOURS, "sgd": SGD, "augment": [*SGD, "segment"],
               "matryoshka": SGD, "feedback": ["diffeed"], "sweep": ONE_PLACE, "ignore": ["segment"],
               "batch_size": RECIPES, "epochs": RECIPES, "lr": RECIPES, "hidden": ["mlp"]}
    for key, heads in belongs.items():
        if getattr(cfg, key) != getattr(Config, key) and cfg.head not in heads:
            raise UserError(f"--{key.replace('_', '-')} belongs to --head {', '.join(heads)}, not {cfg.head}")
    place = cfg.layers + cfg.t + cfg.pool
    other_probe = cfg.head != "ridge" or cfg.sweep or cfg.labels or cfg.subset or len(cfg.run) > 1
    faults = {
        "--save reads one place of one run and probes nothing; name one run, the images with --dataset, and "
        "leave --head and --sweep out": cfg.save and (other_probe or "," in place),
        "--samples is about images, of one run, beside its whole data set; leave --head, --layers, --t, "
        "--pool, --sweep, --labels, --subset, --limit, --seed, --dtype and --save out":
            cfg.samples and (other_probe or place or cfg.limit or cfg.seed or cfg.dtype or cfg.save),
        f"--save {cfg.save} is there already; take another name": cfg.save and os.path.exists(cfg.save),
        f"--save {cfg.save} has no .npz at its end; add it": cfg.save and not cfg.save.endswith(".npz"),
        f"--save {cfg.save} is in no folder that can be written to; make it, or take another":
            cfg.save and not os.access(os.path.dirname(cfg.save) or ".", os.W_OK),
        f"--save {cfg.save} is too long a name; take a shorter one":
            len(os.fsencode(os.path.basename(cfg.save))) > 240,
        f"--data-dir {cfg.data_dir} is another folder than --dataset {cfg.dataset}; leave one of them out":
            cfg.data_dir and cfg.dataset not in ("cifar10", "imagenet") and os.path.isdir(cfg.dataset)
            and os.path.realpath(cfg.data_dir) != os.path.realpath(cfg.dataset),
        "--head finetune trains all that leads to the layer the paper reads; leave --layers, --t and --pool "
        "out": cfg.head == "finetune" and place}
    for fault, found in faults.items():
        if found:
            raise UserError(fault)
    parse_numbers(cfg.hidden, int, "--hidden", low=1, high=2**16)


def parse_numbers(text, kind, flag, low=0, high=10**6):
    """'4,5,6' -> [4, 5, 6], all of them from low to high, else UserError."""
    try:
        numbers = [kind(part) for part in text.split(",")] if text else []
    except ValueError:
        numbers = [math.nan]
    if not all(low <= number <= high for number in numbers):
        raise UserError(f"{flag} takes numbers from {low} to {high} with commas between them, not {text}")
    return numbers


def images_to_train_on(data, cfg):
    """Numbers of the training images that --subset, --labels and --limit leave, in random order."""
    index = shuffled(len(data), cfg.seed)
    if cfg.subset:
        index = index[torch.isin(index, listed_images(data, cfg.subset))]
    if cfg.labels:
        y = data.labels[index]
        shots = max(1, round(cfg.labels * len(index) / len(y.unique())))
        index = index[draw_shots(y, shots, cfg.seed).sort().values]
        if len(index) < shots * len(y.unique()):
            print(f"--labels {cfg.labels:g}: {len(index)} images, as some classes have fewer than {shots}")
    if (cfg.labels or cfg.subset) and len(index) < 20:
        raise UserError(f"--labels and --subset leave {len(index)} training images; take 20 or more")
    return index[:cfg.limit]


def listed_images(data, file):
    """Numbers int (n,) of the images that a file names, NAME or CLASS/NAME a line; UserError for names that
    none has, or several have."""
    with unified.reading(file, "a list of images"):
        names = dict.fromkeys(pathlib.Path(file).read_text("utf-8-sig").split("\n"))
    names.pop("", None)
    if not names or not data.paths:
        raise UserError(f"--subset {file}: " + ("it names no image" if data.paths else
                                               "it names files, and these images are none; leave it out"))
    found = collections.defaultdict(set)
    for i, path in enumerate(data.paths):
        for folder in ("", path.parent.name + "/", data.classes[data.labels[i]] + "/"):
            found[folder + path.name].add(i)
    for fault, remedy, wrong in (
            ("are not in the training set", "take them out", [n for n in names if n not in found]),
            ("several folders have", "write CLASS/NAME", [n for n in names if len(found.get(n, ())) > 1])):
        if wrong:
            raise UserError(f"{file} names {len(wrong)} images that {fault}, {shown(wrong[0])} first; "
                            f"{remedy}")
    return torch.tensor(sorted(set().union(*(found[name] for name in names))))


def is_side(pool):
    """Whether --pool says cells on a side."""
    return pool.isdecimal() and 0 < len(pool) < 6 and int(pool) > 0


def results_folder(run):
    """Where the checkpoint lies or, if that is read-only, the current folder; UserError if both are."""
    folder = pathlib.Path(run) if os.path.isdir(run) else pathlib.Path(run).parent
    for place in (folder, pathlib.Path()):
        if os.access(place, os.W_OK):
            return place
    raise UserError(f"neither {folder} nor the current folder can be written to; "
                    "start this in a folder of your own")


# What is compared, and on which data.


def untrained(model, config, from_zero=False):
    """The same network with fresh weights of seed 0, but the trained tokenizer, which is not in question.

    from_zero  True: to be trained, with the layers that start at 0. False: to be compared with, without these
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = unified.build(config["arch"])
        fresh = fresh if from_zero else unified.draw_zero_layers(fresh)
    if model.tokenizer:
        fresh.vqgan.load_state_dict(model.vqgan.state_dict())
    return fresh.to(model.device).eval()


def data_of(config, cfg):
    """Name of the data set and where it lies, "" for its usual place."""
    own = config.get("dataset")
    name = cfg.dataset or own
    if not name:
        raise UserError(f"{cfg.run} does not say what it was trained on; "
                        "add --dataset shapes, cifar10, imagenet or a folder")
    return name, cfg.data_dir or (config.get("data_dir", "") if name == own else "")


def open_sets(model, config, cfg):
    """Name of the data set, its training and its test part: the run's own unless --dataset says otherwise."""
    name, folder = data_of(config, cfg)
    if cfg.head == "segment":
        return name, *open_masks(name, folder, model.image_size, cfg)
    # DiffSSL keeps at least 0.8 of the sides, and so does the short training for --samples.
    crop = 0.64 if cfg.augment and cfg.sgd or cfg.samples else 0.2
    train_set, test_set = (
        open_data(name, folder, model.image_size, part, cfg.device, cfg.strict_images, crop)
        for part in (True, False))
    if reason := no_probe(train_set, test_set):
        raise UserError(f"{name} cannot be probed: {reason}; --dataset shapes or cifar10 lends others, and "
                        "--save FILE.npz keeps the features of yours")
    if not cfg.dataset:
        check_same_data(config, train_set, cfg.run, f"put them back, or say --dataset {name} to probe these")
    return name, train_set, test_set


def no_probe(train_set, test_set):
    """Why these sets cannot be probed; "" if they can. In a single class, every accuracy means nothing."""
    known = [data.labels[data.labels >= 0] for data in (train_set, test_set)]
    train, test = (len(labels.unique()) for labels in known)
    if train > 1 >= test and not test_set.unseen:
        return "it takes others to test on"
    if train > 1 >= test:
        return "all images to test on are of one class; lay some of every class into val/"
    if train < 2:
        return "it takes images of two classes or more"
    few = f"it takes 20 images to train on, not {len(known[0])}" * (len(known[0]) < 20)
    return few or "it takes others to test on" * (not test_set.unseen)


def describe_data(data):
    """What a run was trained on, for its checkpoint."""
    return {"classes": data.classes, "images": len(data), "layout": data.layout}


def with_labels(data):
    """A data set without the images of label -1; only an ImageTensor may have any to train or to test on."""
    known = data.labels >= 0
    if known.all():
        return data
    print(f"{known.sum()} of {len(data)} images have a label; the others are left out")
    part = copy.copy(data)
    part.images, part.labels = data.images[known.to(data.images.device)], data.labels[known]
    part.summary = ""                                   # which counts the others, too
    return part


def check_same_data(config, data, run, remedy):
    """UserError, ending in the remedy, if data are not what the run with this config was trained on: its
    labels would mean something else."""
    for name, now in describe_data(data).items():
        then = config.get(name, now)                                    # older checkpoints do not say
        if then == now:
            continue
        if name == "classes":                                           # up to five that only one of them has
            then, now = (", ".join([c for c in these if c not in those][:5] or these[:5])
                         for these, those in ((then, now), (now, then)))
        raise UserError(f"{run} was trained on other data, {name} {then} then and {now} now; {remedy}")


# ----------------------------------------------------------------------------------------------------------
# 7. Segmentation: a class for each pixel
#
#     maps (B, C, h, w) -> enlarged to the largest of them, concatenated -> linear head -> enlarged to labels
#
# An image comes with its mask as a fourth channel: 1 + the class of a pixel, 0 where it does not count.


class SegmentHead(Head):
    """Maps (B, C, h, w), of C channels in all -> logits (B, classes, *sides of the largest map)
    (official file: DINOv3's eval/segmentation)."""

    def __init__(self, channels, classes):
        super().__init__()
        self.norm = nn.Sequential(nn.Dropout2d(0.1), nn.BatchNorm2d(channels))
        self.linear = nn.Conv2d(channels, classes, 1)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def read(self, *maps):
        size = max(m.shape[2:] for m in maps)
        return self.norm(torch.cat([enlarged(m, size) for m in maps], 1))


enlarged = functools.partial(F.interpolate, mode="bilinear")        # map (B, C, h, w), size -> (B, C, *size)


def segment_loss(logits, mask):
    """Mean cross-entropy over the pixels that count: logits (B, classes, h, w), mask uint8 (B, S, S)."""
    logits, y = enlarged(logits, mask.shape[1:]), mask.long() - 1
    return F.cross_entropy(logits, y, ignore_index=-1, reduction="sum") / (y >= 0).sum().clamp(min=1)


def over_windows(predict, x, S):
    """Probabilities (..., K, h, w) of images x (B, C, h, w): the mean of predict(window (B, C, S, S), its
    number) -> (..., K, S, S) over the windows that hold a pixel. There is one every two thirds of S."""
    sides, step = x.shape[2:], S * 2 // 3
    rows, columns = ([min(start, side - S) for start in range(0, side - S + step, step)] for side in sides)
    total = 0
    for i, (top, left) in enumerate((top, left) for top in rows for left in columns):
        p = predict(x[:, :, top:top + S, left:left + S], i)
        total = total + F.pad(p, (left, sides[1] - left - S, top, sides[0] - top - S))
    return total / total.sum(-3, keepdim=True)


def segment(heads, read, x, names, data):
    """Images with masks (B, 4, H, W) of any size, their names (B,) -> {name: class of each pixel (B, H, W)},
    none of those ignored, by windows of the network's own size S: no position embedding is stretched. What
    is called ceiling is predicted by the mask itself, averaged to the cells of the head's map."""
    S, classes = data.size, len(data.classes)
    sides = [max(S, round(S * side / min(x.shape[2:]))) for side in x.shape[2:]]
    small = torch.cat([F.interpolate(x[:, :3], sides, mode="bilinear", antialias=True),
                       F.interpolate(x[:, 3:], sides, mode="nearest-exact")], 1)

    def predict(window, i):
        features = read(window, unified.hash_ints(names, i))
        logits = [head.eval()(*features_of(features, name)) for name, head in heads.items()]
        one_hot = F.one_hot(features["mask", None].long(), classes + 1)[..., 1:].movedim(-1, 1).float()
        logits.append(F.adaptive_avg_pool2d(one_hot, logits[0].shape[2:]))
        return torch.stack([enlarged(v, (S, S)).softmax(1) for v in logits])                # (n, B, K, S, S)
    p = over_windows(predict, small, S)
    p[:, :, list(data.ignored)] = -1                    # else a stray pixel would make the class count, as 0
    return {name: enlarged(v, x.shape[2:]).argmax(1) for name, v in zip([*heads, "ceiling"], p)}


@torch.no_grad()
def score_segments(heads, read, data, cfg):
    """{name: confusion int (K, K)}, pixels of class i, in the whole data set, that were taken for class j;
    [(image (3, H, W), label and prediction (H, W)), ...] of the first images."""
    confusions, examples, together = collections.Counter(), [], data.layout == "in memory"
    index = local_shard(torch.arange(len(data))).split(images_at_once(data, cfg.device) if together else 1)
    with progress_bar(len(index), "test set", "batches") as bar:
        for part, (x, _) in zip(index, data.batches([(part, None) for part in index], 0, False)):
            found = segment(heads, read, x, unified.to_device(part, x.device), data)
            y = (255 * x[:, 3]).round().long() - 1                                          # (B, H, W)
            for name, prediction in found.items():
                confusions[name] += confusion_of(y, prediction, len(data.classes))
            examples += [*zip(x[:, :3], y, found["model"])][:8 - len(examples)]
            bar.update()
    return {name: summed(confusion) for name, confusion in confusions.items()}, examples


def confusion_of(y, prediction, classes):
    """Labels and predictions of one shape -> counts int (classes, classes), without pixels of label -1."""
    pairs = y[y >= 0] * classes + prediction[y >= 0]
    return torch.bincount(pairs, minlength=classes ** 2).view(classes, classes)


def intersection_over_union(confusion):
    """Counts (K, K) -> (K,), NaN for a class that occurs neither in labels nor in predictions."""
    confusion = confusion.cpu().double()                                # Apple's GPUs have no float64
    hits = confusion.diag()
    return hits / (confusion.sum(0) + confusion.sum(1) - hits)


def segment_results(heads, read, data, images, cells, cfg):
    """What compare() returns, with {"iou", "pixel_accuracy", "protocol"} behind it; prints and draws them."""
    confusions, examples = score_segments(heads, read, data, cfg)
    iou = {name: intersection_over_union(v) for name, v in confusions.items()}
    print_columns([["IoU in %", name_of(cfg.run), "untrained", "raw patches", "ceiling"]] + [
        [c, *("-" if v[i].isnan() else f"{100 * v[i]:.1f}" for v in iou.values())]
        for i, c in enumerate(data.classes)])
    if unified.rank_and_world()[0] == 0:
        segment_sheet(examples, data.classes).save(results_folder(cfg.run) / "segments.png")
    protocol = (f"{cells} x {cells} cells; dropout 0.1, BatchNorm, 1x1 convolution; AdamW, weight decay "
                f"1e-3, learning rate {cfg.lr * cfg.batch_size / 256:.3g}, {cfg.epochs} epochs of "
                f"{cfg.batch_size} images a step; "
                + (f"crops of {data.scale[0]:.0%} of the area or more" if cfg.augment else "central squares")
                + f"; tested at the labels' size, by windows of {data.size} every {data.size * 2 // 3}"
                + f"; ignored: {cfg.ignore}" * bool(cfg.ignore))
    right = (confusions["model"].trace() / confusions["model"].sum()).item()
    print(f"{protocol}; {right:.1%} of the pixels are right, mIoU:")
    about = {"iou": {c: None if v != v else round(v, 4) for c, v in zip(data.classes, iou["model"].tolist())},
             "pixel_accuracy": round(right, 4), "protocol": protocol}
    n = len(data) - len(data.unreadable)
    return [("segment", images, n, {name: [v.nanmean().item()] for name, v in iou.items()}, about)]


def segment_sheet(examples, classes, side=128):
    """[(image, label, prediction), ...] -> PIL image: a row of squares each, and a legend."""
    palette = [PIL.ImageColor.getrgb(f"hsl({137 * c % 360}, {70 * (c > 0)}%, {(30, 50, 70)[c % 3]}%)")
               for c in range(len(classes))] + [(255, 255, 255)]                            # ignored: -1
    colors = torch.tensor(palette) / 255
    tiles = [v.cpu() if v.dim() == 3 else colors[v.cpu()].movedim(2, 0) for row in examples for v in row]
    tiles = torch.cat([F.interpolate(v[None], (side, side)) for v in tiles])
    rows = unified.image_grid(tiles, min_side=1, names=("image", "label", "prediction"))
    seen = torch.cat([v.flatten() for _, *pair in examples for v in pair]).unique().tolist()
    sheet = PIL.Image.new("RGB", (rows.width + 160, max(rows.height, 20 * len(seen) + 30)), "lightgrey")
    sheet.paste(rows)
    draw = PIL.ImageDraw.Draw(sheet)
    for i, c in enumerate(seen):
        y = 20 * i + 24
        draw.rectangle((rows.width + 8, y, rows.width + 24, y + 16), fill=palette[c], outline="black")
        draw.text((rows.width + 32, y + 2), "ignored" if c < 0 else classes[c], fill="black")
    return sheet


# ----------------------------------------------------------------------------------------------------------
# 8. Behind the scenes
#
# Features of many images. A plan, see section 9, is a list of (index (B,), crops (B, 1) or None).


def extract_features(read, data, index, cfg, title):
    """Features of the whole images index (N,), read by all processes together: {key: (N, ...)}, labels
    (N,), without unreadable images, see with_labels(). UserError if they do not fit into memory."""
    sample = read_one(read, data, index, cfg)
    need = len(index) * sum(v.nbytes for v in sample.values())
    memory = torch.cuda.mem_get_info()[0] if cfg.device.startswith("cuda") else machine_memory()
    if need > 0.8 * memory:
        raise UserError(f"features of {len(index)} images need {need / 2**30:.0f} GiB; "
                        f"--limit {int(0.5 * memory / need * len(index))} fits, a smaller --pool may, "
                        "and trained heads have --augment, which keeps none")
    features, y = read_images(read, data, local_shard(index), cfg.workers, cfg.device, title)
    y = gather(y, len(index))
    return {key: gather(v, len(index))[y >= 0] for key, v in features.items()}, y[y >= 0]


def read_images(read, data, index, workers, device, name):
    """Features {key: (N, ...)} and labels (N,) of the whole images index (N,), without gradient, on the
    device or where read puts them. name: of a progress bar. Stopped if a signal asks for the end."""
    plan = [(part, None) for part in index.split(images_at_once(data, device))]
    features, labels, done = {}, torch.empty(len(index), dtype=torch.long, device=device), 0
    with torch.no_grad(), progress_bar(len(plan), name, "batches") as bar:
        for of_batch, y in read_batches(read, data, plan, device, workers):
            if SIGNALS:
                raise Stopped("while images were read")
            rows = slice(done, done + len(y))
            for key, v in of_batch.items():
                features.setdefault(key, v.new_empty(len(index), *v.shape[1:]))[rows] = v
            labels[rows] = y
            done += len(y)
            bar.update()
    return features, labels


def map_images(function, data, count=None, workers=0, device="cpu", name=None):
    """function(x (B, 3, S, S) on device) -> tensor (B, ...), applied to `count` whole images of a data
    set, None: all. Which ones is random, but the same every time. Returns results (count, ...), labels
    (count,), on the CPU, without unreadable images."""
    index = torch.arange(len(data))
    if count and count < len(data):
        index = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:count]

    def read(x, names):
        return {"": function(x).cpu()}
    features, labels = read_images(read, data, index, workers, device, name)
    readable = torch.tensor([i not in data.unreadable for i in index.tolist()], dtype=torch.bool)
    return features[""][readable], labels.cpu()[readable]


def read_one(read, data, index, cfg):
    """What a reader finds in the first image of index: {key: (1, ...)}; not compiled for a single one."""
    with torch.compiler.set_stance("force_eager"):
        return next(read_batches(read, data, [(index[:1], None)], cfg.device, cfg.workers))[0]


def read_batches(read, data, plan, device, workers=0, replace=False):
    """Yields features {key: (B, ...)}, labels (B,) for each entry of a plan. An unreadable image has the
    label -1 or, to be replaced, another one takes its place."""
    for (index, crops), (x, y) in zip(plan, data.batches(plan, workers, replace)):
        x, y = unified.to_device(x.flatten(0, -4), device), unified.to_device(y, device)
        yield read(x, index if crops is None else crops.flatten()), y


def images_at_once(data, device):
    """How many images of a data set to read at once: 2^21 pixels on a GPU; on a CPU 2^16, which is
    fastest with what its caches hold; at least 4."""
    return max(4, 2 ** (16 if torch.device(device).type == "cpu" else 21) // data.size ** 2)


def machine_memory(limits=unified.CONTAINER):
    """Bytes of memory of this machine, or of the container; no limit where nobody says, as on Windows."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 1 << 60
    with contextlib.suppress(OSError, ValueError):                      # no container; "max": no limit
        memory = min(memory, int((limits / "memory.max").read_text()))
    return memory


# Processes: each has an equal part of every batch, and the same weights. Signals ask them to end.


class Stopped(Exception):
    """A signal has asked for the end, and nothing is left half done; the text says where."""


SIGNALS = {}    # {number: when it came}: what has asked a training for its end; all that runs long looks here


def asked_to_stop():
    """Whether a signal has reached any of the processes. All of them come here together, so all stop after
    the same step."""
    return bool(summed(torch.tensor(len(SIGNALS))))                      # on the CPU: no device is waited for


def progress_bar(total, title, unit, start=0, stay=False):
    """A bar that vanishes or stays, in the first process only; none without a title. Where there is no
    terminal, a line now and then, and at the start if it stays."""
    lines = dict(file=Lines(), delay=0 if stay else 1, mininterval=30, maxinterval=math.inf, miniters=1,
                 bar_format="{desc}: {n_fmt} of {total_fmt}{unit}{postfix}, {remaining} left")
    more = dict(leave=stay, dynamic_ncols=True) if sys.stderr.isatty() else dict(leave=False, **lines)
    silent = title is None or unified.rank_and_world()[0] > 0
    return tqdm.tqdm(total=total, initial=start, desc=title, unit=f" {unit}", disable=silent, **more)


class Lines:
    """Where a bar is written to, instead of a terminal: a line each time it is drawn."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr)


def local_shard(items):
    """What this process takes of a list or tensor: of W processes each every W-th item."""
    rank, world = unified.rank_and_world()
    return items[rank::world]


def summed(x):
    """A tensor, to which those of the other processes have been added."""
    if unified.rank_and_world()[1] > 1:
        torch.distributed.all_reduce(x)
    return x


def gather(mine, n):
    """Rows of local_shard -> all n rows, in every process."""
    if unified.rank_and_world()[1] == 1:
        return mine
    everything = mine.new_zeros(n, *mine.shape[1:])
    local_shard(everything)[:] = mine
    return summed(everything)


def average_gradients(parameters):
    """Over the processes, each of which has seen its part of the batch."""
    for p in parameters:
        if p.grad is not None:
            summed(p.grad).div_(unified.rank_and_world()[1])


# What train.py uses, too.


def learning_rate(position, warmup, total, peak, end=0.0):
    """Linear rise, then half a cosine down to end: position, warmup and total in one unit
    (official file: util/lr_sched.py)."""
    if position < warmup:
        return peak * position / warmup
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (position - warmup) / (total - warmup)))


def compile_blocks(model):
    """torch.compile block by block, frozen parts too, for each shape that they meet: in a transformer one
    block is compiled and the others follow; those of a U-Net and of a tokenizer differ. Only ADDP's
    decoder has no fixed number of tokens. Where that cannot be had, a line says so."""
    compilers = filter(None, (os.environ.get("CC"), os.environ.get("CXX"), "gcc", "clang", "cc", "cl"))
    if not any(map(shutil.which, compilers)) or next(model.parameters()).is_cuda and not has_triton():
        print("nothing is compiled, which is slower: torch.compile needs a C compiler and, on GPUs, Triton")
        return
    torch._dynamo.config.cache_size_limit = 256
    torch._dynamo.config.optimize_ddp = False                   # else a block is cut where DDP's buckets end
    dynamic = [block for part in model.modules() if isinstance(part, unified.Model)
               for block in part.dynamic_blocks]
    for module in model.modules():
        if isinstance(module, (unified.Block, unified.ResBlock, unified.ADMBlock)):
            module.compile(dynamic=module in dynamic)


def write_file(path, write):
    """write(file) under a name of this process's own, then rename: path is whole or not there."""
    path.parent.mkdir(exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(new, "wb") as file:
            write(file)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def writable(path, flag, folder=False):
    """The pathlib.Path of a file, or folder, that can be written or made; UserError with the flag, if not."""
    path = place = pathlib.Path(path)
    while not os.path.exists(place) and (folder or place == path):
        place = place.parent
    right = os.path.isdir(place) == (folder or place != path)
    if not right or not os.access(place, os.W_OK) or len(os.fsencode(path.name)) > 240:
        raise UserError(f"{flag} {path} cannot be written as a {'folder' if folder else 'file'} here; "
                        "name another place" + ", in a folder that is there" * (not folder))
    return path


def distinct(values):
    """Values without repetitions, in their order."""
    return list(dict.fromkeys(values))


# ----------------------------------------------------------------------------------------------------------
# 9. Data sets
#
# Each has: images of one size, labels, class names, and batches(plan): for every
# (index (B,), crops (B, V) or None) of the plan one (x, labels), x float in [0, 1] of shape (B, V, 3, S, S),
# or (B, 3, S, S) for the whole image when crops is None. A crop is named by an integer, so that the same
# crop comes out on any machine and after any interruption.


def crop_boxes(crops, width, height, scale):
    """Random resized crops: area in scale x the image, aspect 3/4 .. 4/3, place uniform, flipped every
    other time; one draw each, clipped to the image (official file: util/crop.py). int64 (B,) -> left, top,
    width, height, flip: float (B,) each, bool (B,)."""
    area, ratio, x, y, flip = unified.hashed_uniform(crops, 0, 5).unbind(1)
    area = width * height * (scale[0] + area * (scale[1] - scale[0]))
    ratio = (math.log(4 / 3) * (2 * ratio - 1)).exp()
    w, h = (area * ratio).sqrt().clamp(max=width), (area / ratio).sqrt().clamp(max=height)
    return x * (width - w), y * (height - h), w, h, flip < 0.5


def shuffled(n, *seeds):
    """0 .. n - 1 in an order that follows from the seeds: int64 (n,)."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(unified.hash_ints(*seeds)))


class ImageTensor:
    """A whole set in memory as uint8 (N, 3, S, S), on the device; crops are cut there, a batch at a time. A
    fourth channel is a mask, see section 7, and not interpolated. labels int64 (N,), on the CPU, are indices
    of classes, a list of names; -1 is none: such images are trained on, if not with --labels, and not probed.
    Tokenizers are trained on its whole images, since crops would be enlarged. Attributes as of ImageFolder;
    layout, summary and unseen may be set later.

    scale  fraction of the area that a crop keeps, (0.2, 1) in the papers
    """
    ignored = ()

    def __init__(self, images, labels, classes, scale, device="cpu"):
        self.images, self.labels, self.classes, self.scale = images.to(device), labels, classes, scale
        self.size, self.layout, self.summary, self.root = images.size(-1), "in memory", "", pathlib.Path()
        self.paths, self.unreadable, self.unseen = [], {}, True

    def __len__(self):
        return len(self.images)

    def batches(self, plan, workers=0, replace=True):
        """The images of the plan, (x, labels) at a time; no workers are needed, and all can be read."""
        for index, crops in plan:
            x = self.images[unified.to_device(index, self.images.device)].float() / 255
            if crops is not None:
                x = x.repeat_interleave(crops.size(1), 0)
                x = self.crop(x, unified.to_device(crops.flatten(), x.device)).unflatten(0, crops.shape)
            yield x, self.labels[index]

    def crop(self, x, crops):
        """Cut and resize by one bilinear sampling; a flip is a negative width."""
        side = x.size(-1)
        *box, flip = crop_boxes(crops, side, side, self.scale)
        left, top, w, h = (v / side for v in box)
        zero, sign = torch.zeros_like(w), 1 - 2 * flip.float()
        matrix = torch.stack([w * sign, zero, 2 * left + w - 1, zero, h, 2 * top + h - 1], 1)
        # Within the centres of the border's pixels: padding_mode="border", which Apple's GPUs lack.
        grid = F.affine_grid(matrix.view(-1, 2, 3), x.shape, align_corners=False)
        grid = grid.clamp(1 / side - 1, 1 - 1 / side)
        cut = functools.partial(F.grid_sample, grid=grid, align_corners=False)
        return torch.cat([cut(x[:, :3]), cut(x[:, 3:], mode="nearest")], 1) if x.size(1) > 3 else cut(x)


class ImageFolder(torch.utils.data.Dataset):
    """Image files, decoded by worker processes when they are asked for; as floats on the device only.

    paths, labels  of the images, int (N,)       classes  names, none for images without labels
    layout         how it lies on the disk       summary  what was found, in lines, or ""
    root           what messages are about       strict   stop at an unreadable image
    unseen         False for test images that stand in for too few: they are those to train on
    stand_ins      numbers of the images that may replace an unreadable one
    ignored        numbers of classes that no pixel is to be taken for
    """
    channels, ignored = 3, ()

    def __init__(self, root, paths, labels, classes, size, scale, strict=False, device="cpu", layout="",
                 summary=""):
        self.root, self.paths, self.labels, self.classes = root, paths, torch.tensor(labels), classes
        self.size, self.scale, self.strict, self.device = size, scale, strict, torch.device(device)
        self.layout, self.summary = layout, summary
        self.unreadable, self.named, self.unseen = {}, {}, True             # index: why; those that were told
        self.stand_ins = range(len(paths))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, item):
        """(index, crops, replace) -> uint8 (V, 3, S, S) or (3, S, S); label; {index: what is wrong} of
        unreadable images met just now.

        In place of an unreadable image comes a black one of label -1 or, to replace it, another one that the
        first crop's number, or else the index, decides, never its neighbour on the disk. Each is opened once.
        """
        (index, crops, replace), bad, i, draw = item, {}, item[0], 0
        while True:
            # Then nothing but neighbours is left.
            if i not in self.unreadable and (i == index or abs(i - index) > 1 or draw > 100):
                try:
                    with unified.reading(self.paths[i], "an image"), PIL.Image.open(self.paths[i]) as image:
                        return self.crop(image, crops), self.labels[i], bad
                except UserError as error:
                    bad[i] = self.unreadable[i] = str(error.__cause__)
            if not replace or self.strict or all(i in self.unreadable for i in self.stand_ins):
                views = () if crops is None else (len(crops),)
                black = torch.zeros(*views, self.channels, self.size, self.size, dtype=torch.uint8)
                return black, torch.tensor(-1), bad
            draw += 1
            number = unified.hash_ints(index if crops is None else crops[0], draw)
            i = self.stand_ins[number % len(self.stand_ins)]

    def crop(self, image, crops, nearest=False):
        """PIL image, numbers of V crops -> uint8 (V, 3, S, S); None -> the whole image (3, S, S). nearest:
        without new values between the pixels'."""
        if crops is None:
            return unified.from_image(image, self.size, nearest)
        jpeg, views = image.format == "JPEG", []
        image = image if jpeg else unified.upright(image)
        how = PIL.Image.Resampling["NEAREST" if nearest else "BILINEAR"]
        width, height = shown_size(image) if jpeg else image.size
        left, top, w, h, flips = crop_boxes(torch.as_tensor(crops), width, height, self.scale)
        least = self.size / min(w.min(), h.min()).item()
        if jpeg:                                               # is decoded at 1/2, 1/4 or 1/8 if that will do
            image.draft("RGB", tuple(math.ceil(least * side) for side in image.size))
            image = unified.upright(image)
        boxes = torch.stack([left, top, left + w, top + h], 1) / round(width / image.width)
        for box, flip in zip(boxes.tolist(), flips):
            view = numpy.array(image.resize((self.size, self.size), how, box))
            views.append(torch.from_numpy(view[:, ::-1].copy() if flip else view).movedim(2, 0))
        return torch.stack(views)

    def batches(self, plan, workers=0, replace=True):
        """The images of the plan, (x, labels) at a time, decoded by so many processes. Unreadable ones are
        named, and replaced by others or given the label -1; UserError if strict, or if there is nothing else.

        Workers hand over at most a mebibyte at once, in shared memory, of which containers have little: a
        batch comes in several parts.
        """
        lengths = collections.deque()

        def parts():
            for index, crops in plan:
                lengths.append(len(index))
                crops_of = [None] * len(index) if crops is None else crops.tolist()
                items = [(i, c, replace) for i, c in zip(index.tolist(), crops_of)]
                n = max(1, 2**20 // (3 * self.size ** 2 * (1 if crops is None else crops.size(1))))
                yield from (items[k:k + n] for k in range(0, len(items), n))
        loader = torch.utils.data.DataLoader(
            self, batch_sampler=parts(), num_workers=workers, collate_fn=collate,
            worker_init_fn=ignore_interrupt, pin_memory=self.device.type == "cuda",
            timeout=5 if workers else 0)
        images, labels = [], []
        for x, y, bad in batches_of(loader):
            for i, error in bad.items():
                if self.strict or replace and -1 in y:
                    remedy = f": no other in {shown(self.root)} can"
                    raise UserError(f"{shown(self.paths[i])} cannot be read as an image ({error}); mend it"
                                    + (", or take --no-strict-images" if self.strict else remedy))
                if i not in self.named:
                    fate = "another image takes its place" if replace else "left out"
                    print(f"unreadable, {fate}: {shown(self.paths[i])} ({error})", file=sys.stderr)
                self.unreadable[i] = self.named[i] = error
            images.append(unified.to_device(x, self.device))
            labels.append(y)
            if sum(map(len, labels)) == lengths[0]:
                yield torch.cat(images).float().div_(255), torch.cat(labels)
                lengths.popleft()
                images, labels = [], []


def ignore_interrupt(worker):
    """Ctrl-C is for the parent to answer; on Windows, which blocks no signals, each process gets it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def signals_blocked():
    """Processes started in here ignore Ctrl-C and SIGTERM, which are for their parent to answer. And the
    parent's handler of SIGCHLD stays as it is: the one that torch sets raises wherever the program happens to
    be, in the middle of an optimizer step, say."""
    if not hasattr(signal, "pthread_sigmask"):                                    # Windows has neither signal
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def batches_of(loader, patience=300):
    """What a DataLoader's workers hand over; UserError if one dies, or nothing comes for so many seconds."""
    with signals_blocked():
        parts, since = iter(loader), time.monotonic()
    while True:
        try:
            part = next(parts)
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith("DataLoader"):
                raise
            # Torch looks for dead workers each time.
            if "timed out" in str(error) and time.monotonic() - since < patience:
                continue
            raise UserError(f"the processes that decode images have stopped ({error}); they may lack memory, "
                            "or shared memory (/dev/shm), of which containers have little: "
                            "--workers 0 does without them") from None
        yield part
        since = time.monotonic()


def collate(items):
    """What ImageFolder has of each image of a batch, put together by the process that decoded them: an array
    a batch is quicker handed on than one an image, and takes one file handle."""
    x, labels, bad = zip(*items)
    return torch.stack(x), torch.stack(labels), dict(item for part in bad for item in part.items())


def shown_size(image):
    """Sides of a PIL image, just opened, as a viewer shows it."""
    if image.format == "TIFF":
        image.load()                                                            # which turns it
    return image.size[::-1] if unified.turn_of(image) in list(unified.TURNS.values())[3:] else image.size


def shown(path):
    """A path as it can be printed, whatever bytes it is made of."""
    return os.fsencode(path).decode(errors="replace")


# Folders, as people have them. Names that begin with . or __ belong to programs, not to the data,
# at any depth.

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm",
            ".pgm", ".jp2", ".avif"}
# Of files whose suffix says nothing.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "MPO")


def entries(folder):
    """What lies in a folder, sorted by name: (folders but for runs of train.py, files)."""
    found = sorted(os.scandir(folder), key=lambda e: e.name) if folder.is_dir() else []
    found = [e for e in found if not e.name.startswith((".", "__"))]
    # isdir() forgives a link in a circle.
    inner = [e for e in found if (os.path.isdir(e) if e.is_symlink() else e.is_dir())]
    files = [e for e in found if e not in inner and (e.is_symlink() or e.is_file())]         # no pipe
    closed = [e for e in inner if not os.access(e, os.R_OK | os.X_OK)]          # told as no image is
    inner, files = [folder / e.name for e in inner if e not in closed], files + closed
    return [p for p in inner if not (p / "log.jsonl").exists()], [folder / e.name for e in files]


def is_image(path):
    """By its suffix or, if that says nothing, by how the file begins."""
    PIL.Image.init()
    return path.suffix.lower() in SUFFIXES or opens(path, [f for f in FORMATS if f in PIL.Image.OPEN])


def opens(path, formats=None):
    """Whether Pillow makes sense of the head of a file."""
    try:
        with PIL.Image.open(path, formats=formats):
            return True
    except Exception:                                       # of any kind; it is told when the image is read
        return False


def image_files(folder, others, above=frozenset()):
    """Image files in a folder and in those inside it, but for links that lead back. What is no image joins
    the list others. above: folders on the way here."""
    folders, files = entries(folder)
    images = [p for p in files if is_image(p)]
    others += sorted(set(files) - set(images))
    above = above | {folder.resolve(), *folder.resolve().parents}
    inner = [p for p in folders if p.resolve() not in above]
    return images + [file for p in inner for file in image_files(p, others, above)]


def shapes(train, size, **options):
    """20,000 images to train on or 2,000 others to test on, or, None, all of these."""
    seeds = torch.cat([torch.arange(20_000)] * (train is not False)
                      + [torch.arange(1_000_000, 1_002_000)] * (not train))
    images, labels = zip(*(unified.draw_shapes(part, size, **options) for part in seeds.split(1000)))
    return torch.cat(images), torch.cat(labels), list(unified.SHAPES)


CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_MD5 = {
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
}


def cifar10(folder, train):
    """The public archive's batches -> uint8 (N, 3, 32, 32), labels (N,), class names. They are pickles, which
    can run code, so each is read only if it has the published checksum."""
    def read(name):
        path = folder / "cifar-10-batches-py" / name
        data = path.read_bytes() if path.exists() else b""
        if hashlib.md5(data).hexdigest() != CIFAR10_MD5[name]:
            raise UserError(f"{path} is missing or damaged; delete its folder and leave --data-dir out")
        return pickle.loads(data, encoding="latin1")
    names = [f"data_batch_{i}" for i in range(1, 6)] * (train is not False) + ["test_batch"] * (not train)
    batches = [read(name) for name in names]
    images = torch.from_numpy(numpy.concatenate([b["data"] for b in batches])).unflatten(1, (3, 32, 32))
    return images, torch.tensor(sum((b["labels"] for b in batches), [])), read("batches.meta")["label_names"]


def download_cifar10(folder, timeout=60):
    """Fetch and unpack the public archive (163 MiB) into folder, once; it takes its name when it is complete.
    Who else shares the disk waits meanwhile; if it has no locks, all fetch and the first to finish counts."""
    inside, started, digest = folder / "cifar-10-batches-py", time.monotonic(), hashlib.md5()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as lock:
            with contextlib.suppress(AttributeError, OSError):                              # not on Windows
                os.lockf(lock.fileno(), os.F_LOCK, 0)                                       # dies with us
            if inside.exists():
                return
            if unified.rank_and_world()[1] > 1 and time.monotonic() - started > 1:
                raise TimeoutError("another process has tried")         # else all would fail one by one
            with tempfile.TemporaryDirectory(prefix=".", dir=folder) as own, \
                    tempfile.TemporaryFile(dir=folder) as archive, \
                    urllib.request.urlopen(CIFAR10_URL, timeout=timeout) as source, \
                    progress_bar(163, "CIFAR-10", "MiB") as bar:
                for chunk in iter(lambda: source.read(1 << 20), b""):
                    digest.update(chunk)
                    archive.write(chunk)
                    bar.update()
                if digest.hexdigest() != CIFAR10_MD5["cifar-10-python.tar.gz"]:
                    raise ValueError(f"{archive.tell()} bytes came, with a wrong checksum")
                archive.seek(0)
                safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}    # from Python 3.11.4
                tarfile.open(fileobj=archive).extractall(own, **safe)
                os.rename(os.path.join(own, inside.name), inside)
    except Exception as error:                                      # sockets, HTTP, gzip and tar have theirs
        if not inside.exists():
            raise UserError(f"CIFAR-10 could not be downloaded ({error!r}); try again, or unpack "
                            f"{CIFAR10_URL} yourself and pass its folder as --data-dir")


EXPECTED_TREE = """
    {root}/train/n01440764/n01440764_10026.JPEG ...     a folder a class
    {root}/val/n01440764/ILSVRC2012_val_00000293.JPEG ...
If val/ is flat, as in the official archive, sort its files into the same class folders first.
Class folders without train/ and val/, or images without classes, will do too."""


def labelled(folder, notes):
    """{class: its image files} of a folder of class folders, {"": files} if images lie right in it. Notes
    gets a line on all that was left out."""
    others, (folders, files) = [], entries(folder)
    found = {p.name: image_files(p, others) for p in folders}
    loose = [p for p in files if is_image(p)]
    others += sorted(set(files) - set(loose))
    empty = [name for name, files in found.items() if not files]
    found = {name: files for name, files in found.items() if files} or ({"": loose} if loose else {})
    beside = [p.name for p in loose if "" not in found]
    notes += [*left_out(folder, "folders without an image", empty), *no_images(folder, others),
              *left_out(folder, "images beside the class folders", beside)]
    return found


def left_out(folder, what, names):
    """A line on what was left out of a folder, in a list, if there is anything."""
    some = ", ".join(map(shown, names[:3])) + ", ..." * (len(names) > 3)
    return [f"{shown(folder)}: left out {len(names)} {what} ({some})"] if names else []


def no_images(folder, files):
    """The same of files that are no images, or none that Pillow reads."""
    phones = "; save .HEIC as JPEG" * any(p.suffix.lower() in (".heic", ".heif") for p in files)
    return left_out(folder, f"files that are no images{phones}", [p.name for p in files])


def is_held_out(files, labels):
    """Whether each file is held out to test on: a tenth of each class, by a hash of its name, so that nothing
    changes when others come; none of a class of which nothing would be left."""
    picked = [int(hashlib.md5(os.fsencode(p.name)).hexdigest(), 16) % 10 == 0 for p in files]
    left = {c for held, c in zip(picked, labels) if not held}
    return [held and c in left for held, c in zip(picked, labels)]


def check_drawn(dataset, data_dir):
    """UserError if images that are drawn, as shapes, are said to lie in a folder."""
    if data_dir:
        raise UserError(f"--dataset {dataset} is drawn, not read from {data_dir}; leave --data-dir out, or "
                        "name the folder as --dataset")


def check_folder(root):
    """UserError if there is no such folder."""
    if os.path.isfile(root):
        raise UserError(f"there is no folder {shown(root)}, it is a file; name its folder, "
                        f"{shown(root.parent)}")
    if not os.path.isdir(root):
        near = difflib.get_close_matches(root.name, [p.name for p in entries(root.parent)[0]], 1)
        raise UserError(f"there is no folder {shown(root)}; "
                        + (f"did you mean {shown(root.with_name(near[0]))}?" if near else
                           "--dataset takes shapes, cifar10, imagenet or a folder, --data-dir the place "
                           "where imagenet or cifar10 lies"))


def find_images(root):
    """(layout, classes, {True: files and labels to train on, False: to test on}, lines on what was found) of
    a folder. UserError if there is nothing, or if the classes of its parts differ."""
    notes, tree = [], EXPECTED_TREE.format(root=shown(root))
    folders, _ = entries(root)
    inner = {p.name.lower(): p.name for p in folders}
    first, second = (next((inner[name] for name in names if name in inner), None) for names in
                     (("train", "training"), ("val", "valid", "validation", "test", "testing")))
    split = second or first and entries(root / first)[0]                    # else it may be a class of trains
    names = [first or "train", second] if second else [first] if split else [""]
    parts = [labelled(root / name, notes) for name in names]
    beside = [p.name for p in folders if p.name not in names and image_files(p, [])]
    notes += left_out(root, f"folders beside {names[0]}", beside) if split else []
    for name, part in zip(names, parts):
        if not part:
            found = f" ({'; '.join(notes)})" * bool(notes)
            raise UserError(f"no image in {shown(root / name)}, nor in class folders there{found}; expected"
                            + tree)
    odd = sorted(set(parts[0]) ^ set(parts[-1]))
    if odd:
        some = ", ".join(odd[:5]) + " ..." * (len(odd) > 5)
        raise UserError(f"{shown(root)}/{names[0]} and {shown(root)}/{second} differ in their classes: "
                        f"{some} only in one of them" + ("; expected" + tree) * ("" in odd))
    (files, labels), *rest = (([p for files in part.values() for p in files],
                               [c for c, files in enumerate(part.values()) for _ in files]) for part in parts)
    if second:
        how, train, test = f"{second}/", (files, labels), rest[0]
    else:
        each = " of each class" * ("" not in parts[0])
        how, held = f"a tenth{each}, by a hash of the file's name", is_held_out(files, labels)
        train, test = ([[v for v, h in zip(column, held) if h == part] for column in (files, labels)]
                       for part in (False, True))
    classes = [name for name in parts[0] if name]
    kind = f"of {len(classes)} classes" if classes else "without classes"
    tests = f"{len(test[0])} to test on ({how})" if test[0] else \
        "too few to hold any out: what is shown and measured is of these"
    notes.insert(0, f"{shown(root)}: {len(train[0])} images {kind} to train on, {tests}")
    layout = f"{' and '.join(names) or 'one part'}, {'class folders' if classes else 'flat'}"
    return layout, classes, {True: train, False: test}, "\n".join(notes)


def check_sample(data, count=500):
    """Open the heads of some images of every class. UserError if none of a class can be opened, or if one in
    ten cannot."""
    bad, seen, whole = [], 0, []
    for c, name in enumerate(data.classes or [""]):
        index = (data.labels == c).nonzero().flatten()
        some = min(len(index), max(2, count // max(1, len(data.classes))))
        some = index[torch.linspace(0, len(index) - 1, some).long()].tolist()
        failed = [i for i in some if not opens(data.paths[i])]
        bad, seen, whole = bad + failed, seen + len(some), whole + [name] * (len(failed) == len(some))
    if whole or len(bad) > max(1, seen / 10):
        none = f"; none of {', '.join(whole[:3])}" if data.classes and whole else ""
        raise UserError(f"{len(bad)} of {seen} images that were looked at in {shown(data.root)} cannot be "
                        f"opened, {shown(data.paths[bad[0]])} for one{none}; mend them, or take them out")


def open_data(dataset, data_dir, size, train, device="cpu", strict=False, crop=0.2):
    """A data set by name: 'shapes', 'cifar10', 'imagenet', or the path of a folder: class folders in train
    and val (or valid, validation, test), class folders alone, or images without classes.

    data_dir  where it lies, '' for ./data/<name>        size  S        strict  see ImageFolder
    train     True: training part, False: test part, None: all there is, in a folder of any layout,
              with the label -1 where there is no class
    crop      min fraction of the area that a crop keeps; of shapes at least half, since less may show none

    A kind of your own returns an ImageTensor, as cifar10 does, with the same classes, a list of str, for each
    part, and both parts together for None. It is asked for one part at a time, with size 64 for want of
    --image-size, unless it has defaults of its own, by name, in train.py, and raises a UserError if its
    images have another size. One known by what lies in its folder comes after check_folder(). If its files
    may change, its layout says which they are, such as "in memory, MD5 1f3a"; else --resume and probe.py go
    on with others, if number and classes are the same. If they have moved, data_dir says where to: a run
    keeps the first name. If its test images are those to train on, set unseen to False, and say so in
    summary. Half of all crops are mirrored. For --head segment open_masks() is asked instead. The help of
    --dataset names all kinds.
    """
    root = pathlib.Path(data_dir or (f"data/{dataset}" if dataset in ("cifar10", "imagenet") else dataset))
    if dataset == "shapes":
        check_drawn(dataset, data_dir)
        return ImageTensor(*shapes(train, size), (max(crop, 0.5), 1.0), device)
    if dataset == "cifar10":
        if size != 32:
            raise UserError(f"CIFAR-10 has 32 x 32 pixels and fits no model or --image-size of {size}")
        if not data_dir:
            download_cifar10(root)
        return ImageTensor(*cifar10(root, train), (crop, 1.0), device)
    check_folder(root)
    if train is None:
        others, no_labels = [], ""
        files, labels, classes = image_files(root, others), {}, []
        try:
            _, classes, parts, _ = find_images(root)
            labels = {path: c for part in parts.values() for path, c in zip(*part)} if classes else {}
        except UserError as error:                                      # a layout that no training takes
            if not files:
                raise
            no_labels = f"no labels: {error}".partition("; expected")[0]
        named = {name: c for c, name in enumerate(classes)} if labels else {}       # as in a third part, test
        for path in set(files) - labels.keys():
            inside = [named[name] for name in path.relative_to(root).parts[:-1] if name in named]
            labels[path] = inside[0] if inside else -1
        labels = [labels[path] for path in files]
        return ImageFolder(root, files, labels, classes, size, (crop, 1.0), strict, device,
                           summary="\n".join(filter(None, [no_labels, *no_images(root, others)])))
    layout, classes, parts, summary = find_images(root)
    files, labels = parts[train] if parts[train][0] else parts[True]
    data = ImageFolder(root, files, labels, classes, size, (crop, 1.0), strict, device, layout, summary)
    data.unseen = not train and bool(parts[False][0])
    if train and not strict:
        check_sample(data)
    return data


def fingerprint(net, data, about):
    """What ids, or the weights of a classifier, depend on, as one hexadecimal word: a network, the images
    (of files name, size and time of change), their crops, and what else there is to say about it."""
    digest = hashlib.sha256(repr((about, data.size, data.scale, len(data))).encode())
    if isinstance(data, ImageFolder):
        images = map(functools.partial(file_mark, data.root), data.paths)
    else:
        images = (part.cpu().numpy().tobytes() for part in data.images.split(1000))
    weights = (p.detach().cpu().numpy().tobytes() for p in net.parameters())
    for part in itertools.chain(weights, images, [data.labels.numpy().tobytes()]):
        digest.update(part)
    return digest.hexdigest()[:16]


def file_mark(root, path):
    """Bytes that tell a file from another one, and from itself after a change."""
    with contextlib.suppress(OSError):
        stat = path.stat()
        return b"%s %d %d\n" % (os.fsencode(path.relative_to(root)), stat.st_size, stat.st_mtime_ns)
    return os.fsencode(path.relative_to(root))          # a link to nowhere, say


# Images with masks, in which the value of a pixel is its class. All masks are checked before any work.

MASKS = {                       # layout: images and masks of a part, the parts, first class, their names
    "ADE20K": ("images/{}", "annotations/{}", ("training", "validation"), 1,
               [str(value) for value in range(1, 151)]),
    "Pascal VOC": ("JPEGImages", "SegmentationClass", ("train", "val"), 0, (
        "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
        "person pottedplant sheep sofa train tvmonitor").split()),
    "tree": ("images/{}", "masks/{}", ("train", "val"), 0, []),
}


class MaskFolder(ImageFolder):
    """An ImageFolder whose images have their masks as a fourth channel, see read_mask().

    masks  {path of an image: arguments of read_mask, but for the size}
    whole  whether whole images keep their own size; else they are central squares, resized
    """
    channels = 4

    def __init__(self, masks, whole, *args):
        super().__init__(*args)
        self.masks, self.whole = masks, whole

    def crop(self, image, crops):
        mask = PIL.Image.fromarray(read_mask(*self.masks[image.filename], shown_size(image)))
        if self.whole and crops is None:
            return torch.from_numpy(numpy.dstack([unified.upright(image), mask])).movedim(2, 0)
        views = super().crop(image, crops), super().crop(mask, crops, nearest=True)
        return torch.cat([views[0], views[1][..., :1, :, :]], -3)


def open_masks(dataset, data_dir, size, cfg):
    """Images with masks to train and to test on: 'shapes', or a folder that lies as one of MASKS."""
    void = parse_numbers(cfg.ignore, int, "--ignore", high=255)
    if dataset in ("cifar10", "imagenet"):
        raise UserError(f"{dataset} has no masks; --head segment takes shapes, or a folder with masks")
    if dataset == "shapes":
        check_drawn(dataset, data_dir)
        sets = [shapes(train, size, masks=True) for train in (True, False)]
        for images, _, _ in sets:
            images[:, 3] *= ~torch.isin(images[:, 3], torch.tensor(void) + 1)
        sets = [ImageTensor(images[:4000], labels[:4000], ["ground", *names], (0.5, 1.0), cfg.device)
                for images, labels, names in sets]
        return [without(data, void) for data in sets]
    root, sets, tops = pathlib.Path(data_dir or dataset), [], []
    check_folder(root)
    layout, first, classes, parts, others = find_masks(root)
    rule = first, [255, *range(first), *void], first + len(classes) - 1 if classes else 254
    with progress_bar(sum(map(len, parts)), "masks", "masks") as bar:
        for image, mask in sum(parts, []):
            with unified.reading(image, "an image"), PIL.Image.open(image) as opened:
                tops.append(read_mask(mask, *rule, shown_size(opened)).max())
            bar.update()
    n = len(parts[0])
    for purpose, of_part in (("train", tops[:n]), ("test", tops[n:])):
        if not any(of_part):
            raise UserError(f"no mask to {purpose} on in {shown(root)} has a pixel of any class: all are 255 "
                            "or ignored")
    classes = classes or [str(value) for value in range(max(2, *tops))]
    summary = f"{shown(root)}: {layout}, {' and '.join(str(len(part)) for part in parts)} images with masks"
    summary = "\n".join([summary, *no_images(root, others)])
    for part, whole in zip(parts, (False, True)):
        masks = {str(image): (mask, *rule) for image, mask in part}
        sets.append(MaskFolder(masks, whole, root, [image for image, _ in part], [0] * len(part), classes,
                               size, (0.25, 1.0), cfg.strict_images, cfg.device, layout, summary))
    return [without(data, [value - first for value in void]) for data in sets]


def without(data, ignored):
    """The data set, in which the classes of these numbers are not to be predicted."""
    data.ignored = [c for c in ignored if 0 <= c < len(data.classes)]
    return data


def find_masks(root):
    """(layout, value of the first class, names of classes if they are known, pairs of an image and its mask
    to train and to test on, files that are no images) of a folder."""
    layout = next((name for name, row in MASKS.items() if (root / row[1].format(row[2][0])).is_dir()), "tree")
    images, masks, names, first, classes = MASKS[layout]
    for path in (root / "classes.txt", root / "objectInfo150.txt"):
        if path.exists():                                               # ADE20K's begins with titles
            with unified.reading(path, "a list of names"):
                lines = path.read_text("utf-8-sig").rstrip().splitlines()[path.name != "classes.txt":]
            classes = [line.split("\t")[-1].strip() for line in lines]
            if "" in classes:
                raise UserError(f"{shown(path)} has no name for class {classes.index('')}; every line is the "
                                "name of a class")
            if twice := [c for c in classes if classes.count(c) > 1]:
                raise UserError(f"{shown(path)} names {twice[0]} twice; give every class a name of its own")
    parts, others = [], []
    for name in names:
        folder, listed = root / images.format(name), root / f"ImageSets/Segmentation/{name}.txt"
        if layout == "Pascal VOC" and not listed.exists():
            raise UserError(f"there is no {shown(listed)}, which names the images of this part; make it, or "
                            "lay images and masks out as images/{train,val} and masks/{train,val}")
        files = [folder / f"{stem}.jpg" for stem in listed.read_text().split()] if listed.exists() else \
            image_files(folder, others)
        parts.append([(path, root / masks.format(name) / path.relative_to(folder).with_suffix(".png"))
                      for path in files])
    missing = [name for name, part in zip(names, parts) if not part]
    if 0 < len(missing) < len(parts):
        raise UserError(f"there are no images with masks in {shown(root / images.format(missing[0]))}, which "
                        f"the part {missing[0]} is to have; lay some there")
    if missing:
        expected = " or ".join(f"{images} and {masks} ({layout})".format(*names[:1] * 2)
                               for layout, (images, masks, names, *_) in MASKS.items())
        raise UserError(f"there are no images with masks in {shown(root)}; expected {expected}")
    owners = {}
    for image, mask in sum(parts, []):
        if owners.setdefault(mask, image) != image:
            raise UserError(f"{shown(owners[mask])} and {shown(image)} share the mask {shown(mask)}; give "
                            "each a name of its own")
    return layout, first, classes, parts, others


def read_mask(path, first, void, last, size):
    """A mask file -> uint8 (H, W): 1 for the class of value first, 2 for the next, 0 for the values void.
    UserError for what cannot be the mask of an image of this size (W, H) with classes up to last."""
    with unified.reading(path, "a mask"), PIL.Image.open(path) as mask:
        depth = mask.tile[0][3] if mask.tile else None      # grey of 2 and 4 bits is stretched to 0 .. 255
        mask.load()
        mask = mask if unified.turn_of(mask) is None else mask.transpose(unified.turn_of(mask))
        values = numpy.array(mask).astype(int) // {"L;2": 85, "L;4": 17}.get(str(depth), 1)
    counts = ~numpy.isin(values, void)
    wrong = values[counts & ((values < 0) | (values > last))]
    if values.ndim > 2:
        problem = f"holds colours ({mask.mode}) instead of class numbers; save one channel, or a palette"
    elif mask.size != size:
        problem = f"has {mask.width} x {mask.height} pixels and its image {size[0]} x {size[1]}"
    elif len(wrong):
        problem = f"holds the class {wrong.max()}, and {last} is the highest; mend it, or make it 255"
    else:
        return numpy.where(counts, values - first + 1, 0).astype(numpy.uint8)
    raise UserError(f"{shown(path)} {problem}")


if __name__ == "__main__":
    unified.run_main(main)
