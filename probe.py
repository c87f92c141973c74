"""Read what a trained model has understood: its features, and how much they say about the class of a picture.

    python probe.py out/RUN                                         ridge regression on the model's vectors, in a minute
    python probe.py out/RUN --sweep                                 first find the best place to read, on training pictures only; draws sweep.png
    python probe.py out/RUN --layers 2,4,6 --pool mean,2            the same among a few places
    python probe.py out/RUN --head knn                              or fewshot, linear (the probe of MAE and MAGE), mlp, attention, finetune
    python probe.py out/RUN --head difformer --layers 19,24,30 --t 90,150,300         all these places together; diffeed: and fed back
    python probe.py mage-vitb-1600.pth --dataset imagenet --head linear --augment       the published recipe on published weights
    python probe.py 256x256_diffusion_uncond.pt --dataset imagenet --head linear --sgd --pool 2 --augment           DiffSSL's

Every accuracy stands beside two others, got in the same way: from the raw pixels, and from the same network untrained. What they reach
needs no training. (There is no pixel row where a head needs maps.) Results are appended to probe.jsonl in the run's folder. The test set
is read once and chooses nothing.
"""
import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import sys
import time
import typing

import PIL.Image
import PIL.ImageDraw
import torch
import torch.distributed
import torch.nn as nn
import torch.nn.functional as F
import tqdm

import unified
from unified import UserError, flag


@dataclasses.dataclass
class Config:
    run: str = flag(dataclasses.MISSING, "run folder, checkpoint, or weight file published by the authors", positional=True)
    head: str = flag("ridge", "what reads the features",
                       choices=["ridge", "linear", "knn", "fewshot", "mlp", "attention", "difformer", "diffeed", "finetune"])
    layers: str = flag("", "blocks to read, counted from 1, such as 2,4,6; the one that the paper reads, if not given")
    t: str = flag("", "how corrupted the pictures are, such as 0,0.3 for MAGE's hidden share or 90,150 for a step of noise; else as the paper")
    pool: str = flag("", "mean: over the picture; class: the class position; 2: averages of 2 x 2 cells. Several with commas: the best one")
    shots: int = flag(None, "fewshot: so many pictures a class, judged as UMD's authors do (100); if not given 5, 10 and 25 by a ridge that fits so few")
    sweep: bool = flag(False, "try every layer, and t from hardly to half corrupted, wherever --layers and --t do not say otherwise")
    sgd: bool = flag(False, "trained heads: DiffSSL's plain SGD, for linear on features as they are; else LARS for linear, AdamW for the others")
    hidden: str = flag("512", "mlp: widths of its hidden layers, such as 512,256")
    feedback: str = flag("", "diffeed: the layers fed back to their mirrors; the last one of each size of map, if not given")
    matryoshka: bool = flag(False, "trained heads: at the same time from the first 8, 16, 32, ... dimensions alone")
    dataset: str = flag("", "shapes, cifar10, imagenet, or a folder of class folders; else the run's own")
    data_dir: str = flag("", "where the data set lies, if not in data/<dataset>")
    limit: int = flag(None, "training images used at most; a tenth of them is held out", least=20)
    augment: bool = flag(False, "trained heads: fresh crops and noise in every epoch, as published, instead of features computed once")
    batch_size: int = flag(None, "images a step; 4096 for linear, 256 for finetune, 128 for the others and with --sgd, 16 for diffeed",
                             most=10**6)
    epochs: int = flag(None, "passes over the training set; 90 for linear, 20 for finetune, 10 for the others, 28 with --sgd")
    lr: float = flag(None, "learning rate for 256 images a step; for linear 0.1, for finetune 2.5e-4, or ten times that below 500,000 images",
                       least=1e-9)
    seed: int = flag(0, "of everything random", least=0, most=2**32 - 1)
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "where to compute")
    dtype: str = flag(None, "of the network's activations; bfloat16 on GPUs that compute in it, else float32",
                        choices=["float32", "bfloat16"])
    compile: bool = flag(None, "compile the blocks; on cuda, if not said otherwise")
    weights: str = flag("", "raw, or ema for the averaged ones; as in the paper, if not given",
                          choices=["raw", "ema"])
    workers: int = flag(min(8, os.cpu_count()), "processes that decode images of a folder",
                          least=0, most=1000)
    strict_images: bool = flag(False, "stop at an unreadable image instead of leaving it out")
    adm_heads: int = flag(None, "attention heads in a file of guided-diffusion, whose own default is 4; "
                                  "one for 64 channels, if not given")
    adm_order: str = flag(None, "their channels' order in it; new after --use_new_attention_order True",
                            choices=["legacy", "new"])


# Batch, epochs, lr for 256 images; None is set when the images have been counted, see fit_recipe. The linear row is MAE's and MAGE's.
# MAGE's row for finetune has 1024 and 100, which is a week on a laptop. The other rows are ours, for small sets and few steps; DiffSSL's
# are those of SGD, whose learning rates are 0.01 for linear, mlp and diffeed, 0.05 for attention and difformer, at these batches.
RECIPES = {"linear": (4096, 90, None), "mlp": (128, 10, 2e-3), "attention": (128, 10, 2e-3), "difformer": (128, 10, 2e-3),
           "diffeed": (16, 10, 1.6e-2), "finetune": (256, 20, None)}
SGD = {"linear": (128, 28, 0.02), "mlp": (128, 28, 0.02), "attention": (128, 28, 0.1), "difformer": (128, 28, 0.1), "diffeed": (16, 28, 0.16)}
ON_MAPS = ("attention", "difformer", "diffeed")         # these read maps of cells, the others vectors
ONE_PLACE = ("ridge", "linear", "knn", "fewshot", "mlp", "attention")           # these read the best of the places asked for
CHOICE = 10_000                 # training images on which --layers, --t and --pool are chosen: all places of a t must fit into memory
UNTRAINED = 0                   # seed of the untrained network
STEPS = (0, 0.01, 0.03, 0.05, 0.09, 0.15, 0.3, 0.5)     # of --sweep, as shares of the largest t: those of DiffSSL


def settle(cfg):
    """Fill in what was not said on the command line; refuse what cannot be."""
    for name, heads in [("shots", ["fewshot"]), ("sgd", SGD), ("augment", SGD), ("matryoshka", SGD), ("feedback", ["diffeed"]), ("sweep", ONE_PLACE)]:
        if getattr(cfg, name) and cfg.head not in heads:
            raise UserError(f"--{name} belongs to --head {', '.join(heads)}, not to {cfg.head}")
    recipe = (SGD if cfg.sgd else RECIPES).get(cfg.head, ())
    for name in ("batch_size", "epochs", "lr"):
        if getattr(cfg, name) is not None and not recipe:
            raise UserError(f"--{name.replace('_', '-')} belongs to --head {', '.join(RECIPES)}; {cfg.head} is computed in one go")
    for name, value in zip(("batch_size", "epochs", "lr"), recipe):
        setattr(cfg, name, value if getattr(cfg, name) is None else getattr(cfg, name))
    numbers(cfg.hidden, int, "--hidden", least=1, most=2**16)
    if cfg.head == "finetune" and (cfg.layers, cfg.t, cfg.pool) != ("", "", ""):
        raise UserError("--head finetune trains all that leads to the layer the paper reads; leave --layers, --t and --pool out")
    cfg.dtype = cfg.dtype or unified.default_dtype(cfg.device)
    cfg.compile = cfg.device.startswith("cuda") if cfg.compile is None else cfg.compile
    cfg.pool = cfg.pool or ("16" if cfg.head in ON_MAPS else "1" if cfg.sgd or cfg.head == "mlp" else "")
    if cfg.head in ON_MAPS and not is_side(cfg.pool):
        raise UserError(f"--head {cfg.head} reads maps; --pool takes the number of cells on a side, 16 if not given")
    results_folder(cfg.run)
    return cfg


# Where features are read, and what is compared with them.


class Place(typing.NamedTuple):
    """After which block, how corrupted the picture is, and how the map becomes a vector: 'mean', 'class', or cells on a side."""
    layer: int
    t: float
    pool: str


def numbers(text, kind, flag, least=0, most=10**6):
    """'4,5,6' -> [4, 5, 6], all of them from least to most."""
    try:
        found = [kind(part) for part in text.split(",")] if text else []
    except ValueError:
        found = [math.nan]
    if not all(least <= value <= most for value in found):
        raise UserError(f"{flag} takes numbers from {least} to {most} with commas between them, not {text}")
    return found


def is_side(pool):
    """Whether --pool says cells on a side."""
    return pool.isdecimal() and 0 < len(pool) < 6 and int(pool) > 0


def places(model, cfg):
    """All combinations of --layers, --t and --pool. The class position is only read where the model itself would."""
    best, (least, most, meaning) = model.best_layer, model.t_range
    layers, levels = numbers(cfg.layers, int, "--layers"), numbers(cfg.t, float, "--t")
    pools = cfg.pool.split(",") if cfg.pool else ["mean"] if layers or levels or cfg.sweep else [model.pools[0]]
    pools = ["mean"] if cfg.head in ON_MAPS else pools                                      # a place for maps is chosen by their means
    for layer in layers:
        if layer not in model.layers:
            raise UserError(f"this model has no layer {layer}; --layers takes {min(model.layers)} to {max(model.layers)}")
    for t in levels:
        if not least <= t <= most or (isinstance(most, int) and t != int(t)):
            raise UserError(f"--t {t:g} does not fit this model; it is {meaning}, {least} to {most}")
    for pool in pools:
        if pool not in ("mean", "class") and not is_side(pool):
            raise UserError(f"there is no pooling {pool!r}; --pool takes mean, class, or cells on a side")
    if "class" in pools and "class" not in model.pools:
        raise UserError("this model has no class position; --pool takes mean, or cells on a side")
    if pools == ["class"] and (layers or levels or cfg.sweep):
        raise UserError(f"--pool class reads layer {best} of the whole picture; leave --layers, --t and --sweep out")
    kind = round if isinstance(most, int) else float
    layers = layers or (list(model.layers) if cfg.sweep else [best])
    levels = [kind(t) for t in levels or ([least + share * (most - least) for share in STEPS] if cfg.sweep else [model.best_t])]
    grid = [Place(layer, t, pool) for t in levels for layer in layers for pool in pools if pool != "class"]
    return list(dict.fromkeys(grid + [Place(best, model.best_t, "class")] * ("class" in pools)))


def noise_of(model, t, seeds):
    """What t hides of each picture, or the noise it stands for, follows from seeds (B,): the same picture always looks the same."""
    return model.noise(unified.hash_ints(seeds, round(1000 * t)))


def feature_maps(model, wanted, x, seeds):
    """Pictures x (B, 3, S, S), or their ids (B, L) -> yields (place, map (B, C, h, w)); one pass through the network for each t."""
    for t in dict.fromkeys(place.t for place in wanted):
        found = [place for place in wanted if place.t == t]
        layers = sorted({place.layer for place in found})
        by_layer = dict(zip(layers, model.features(x, t, layers, noise=noise_of(model, t, seeds))))
        yield from ((place, by_layer[place.layer]) for place in found)


def pool_cells(m, side):
    """Averages of side x side cells of maps (B, C, h, w), or of as many as there are: (B, C, side, side)."""
    return F.adaptive_avg_pool2d(m, min(side, m.size(-1)))


def feature_vectors(model, wanted, x, seeds, alike=False):
    """The same as {place: vectors (B, C)}: means normalised picture by picture, cells as they are. Where the model itself would read, it is
    model.embed, normalised as its authors do; but if means shall be alike, to be compared, then only at the class position."""
    own = [place for place in wanted if place.pool == "class" or (place == (model.best_layer, model.best_t, "mean") and not alike)]
    found = {place: model.embed(x, noise=noise_of(model, place.t, seeds), pool=place.pool) for place in own}
    for place, m in feature_maps(model, [place for place in wanted if place not in own], x, seeds):
        mean = place.pool == "mean"
        found[place] = F.layer_norm(m.mean((2, 3)), m.shape[1:2], eps=1e-6) if mean else pool_cells(m, int(place.pool)).flatten(1)
    return found


def tokenize(model, x):
    """What a token model makes of pictures first, so that it is done once for several places or networks; pictures for all others."""
    return model.to_ids(x) if model.reads_ids else x


def pixel_vectors(x):
    """(B, 3, S, S) -> (B, 3 * S * S); above 32 pixels averaged down to 32, where a closed-form fit of 3072 values still takes seconds."""
    return pool_cells(x, 32).flatten(1)


def untrained(model, config):
    """The same network with fresh weights of a fixed seed. It keeps the trained tokenizer, whose features are not what is in question."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(UNTRAINED)
        fresh = unified.build(config["arch"])
    if model.tokenizer:
        fresh.vqgan.load_state_dict(model.vqgan.state_dict())
    return fresh.to(next(model.parameters()).device).eval()


def describe_data(data):
    """What a run was trained on, for its checkpoint."""
    return {"classes": data.classes, "images": len(data), "layout": data.layout}


def check_same_data(config, data, run, remedy):
    """UserError, ending in the remedy, if data are not what the run with this config was trained on: its labels would mean something else."""
    for name, now in describe_data(data).items():
        was = config.get(name, now)                                                         # older checkpoints do not say
        if was != now:
            was, now = (", ".join([c for c in a if c not in b][:5] or a[:5]) if name == "classes" else a for a, b in ((was, now), (now, was)))
            raise UserError(f"{run} was trained on other data, {name} {was} then and {now} now; {remedy}")


def local_shard(items):
    """What this process takes of a list or tensor: of W processes each every W-th item."""
    rank, world = unified.rank_and_world()
    return items[rank::world]


def images_at_once(data, device):
    """How many pictures of a data set to read at once: 2^21 pixels on a GPU; on a CPU 2^16, which is fastest with what its caches hold; at least 4."""
    return max(4, 2 ** (16 if torch.device(device).type == "cpu" else 21) // data.size ** 2)


def read_images(read, data, index, workers=0, device="cpu", name=None):
    """The whole pictures index (N,) of a data set, read without gradient: read(x (B, 3, S, S) on device, index (B,)) -> {key: (B, ...)}.

    name: shows a progress bar. Returns {key: (N, ...)} on the device that read put them on, labels (N,) on the CPU.
    """
    batch = images_at_once(data, device)
    found, labels, parts = {}, torch.empty(len(index), dtype=torch.long), index.split(batch)
    bar = tqdm.tqdm(parts, name, unit=" batches", disable=name is None or unified.rank_and_world()[0] > 0, dynamic_ncols=True)
    with torch.no_grad():
        for i, (part, (x, y)) in enumerate(zip(bar, data.batches(((part, None) for part in parts), workers, replace=False))):
            if unified.SIGNALS:
                raise unified.Stopped("while images were read")
            rows = slice(i * batch, i * batch + len(y))
            for key, v in read(x.to(device), part).items():
                found.setdefault(key, v.new_empty(len(index), *v.shape[1:]))[rows] = v
            labels[rows] = y
    return found, labels


def map_images(function, data, count=None, workers=0, device="cpu", name=None):
    """function(x (B, 3, S, S) on device) -> tensor (B, ...), applied to count whole pictures of a data set, all if None, as by read_all.

    A part is taken at random, the same one every time. Returns results (count, ...), labels (count,), on the CPU.
    """
    index = torch.arange(len(data))
    if count and count < len(data):
        index = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:count]
    found, labels = read_images(lambda x, _: {"": function(x).cpu()}, data, index, workers, device, name)
    return found[""][labels >= 0], labels[labels >= 0]


def learning_rate(position, warmup, total, peak, least=0.0):
    """Linear rise, then half a cosine down to least: position, warmup and total in one unit (official file: util/lr_sched.py)."""
    if position < warmup:
        return peak * position / warmup
    return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * (position - warmup) / (total - warmup)))


def compile_blocks(model):
    """torch.compile block by block, frozen parts too, for each shape that they meet: in a transformer one block is compiled and the others
    follow, in training and in sampling; those of a U-Net and of a tokenizer differ. Only ADDP's decoder has no fixed number of tokens."""
    torch._dynamo.config.cache_size_limit = 256
    torch._dynamo.config.optimize_ddp = False                   # else a block is cut where DDP's buckets end
    dynamic = [block for part in model.modules() if isinstance(part, unified.Model) for block in part.dynamic_blocks]
    for module in model.modules():
        if isinstance(module, (unified.Block, unified.ResBlock, unified.ADMBlock)):
            module.compile(dynamic=module in dynamic)


# Features of many pictures. A reader turns pictures x (B, 3, S, S) and their names (B,) into {key: (B, ...)}; all that is compared is read
# from one picture while it is at hand, since decoding it may be what takes longest. A picture's name is its number, a crop's is the crop's:
# what is random in features follows from the name, so that fresh crops also come with fresh noise.


def autocast(cfg):
    """--dtype, as a context."""
    return torch.autocast(torch.device(cfg.device).type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")


def reader(nets, wanted, cfg, alike=False):
    """The reader of what --head needs, alike as for vectors(). Its keys are (net, which): of each of nets, {'top1': model, 'untrained': fresh},
    the vector or the map, averaged to cells, at each place; of 'pixels' a vector. diffeed computes its own features, and gets the picture
    and the draws of each t."""
    @torch.no_grad()
    def read(x, names):
        seeds, found = unified.to_device(unified.hash_ints(cfg.seed, names), x.device), {}
        with autocast(cfg):
            seen = tokenize(nets["top1"], x)                                                  # both networks have the same tokenizer
            for net, model in nets.items():
                if cfg.head == "diffeed":
                    part = {"x": seen, **{t: noise_of(model, t, seeds) for t in dict.fromkeys(place.t for place in wanted)}}
                elif cfg.head in ON_MAPS:
                    part = {place: pool_cells(m, int(cfg.pool)) for place, m in feature_maps(model, wanted, seen, seeds)}
                else:
                    part = feature_vectors(model, wanted, seen, seeds, alike)
                found |= {(net, which): v.float() if v.is_floating_point() else v for which, v in part.items()}
        return found if cfg.head in ON_MAPS else {**found, ("pixels", None): pixel_vectors(x)}
    return read


def found_in(found, net):
    """What a reader has found in one network, in its order."""
    return [v for (owner, _), v in found.items() if owner == net]


def stream(read, data, plan, cfg, replace=False):
    """Batches of features: for each (index (B,), crops (B, 1) or None) of the list plan yields {key: (B, ...)}, labels (B,). An unreadable
    image has label -1; or, to be replaced, another one takes its place."""
    for (index, crops), (x, y) in zip(plan, data.batches(plan, cfg.workers, replace)):
        x, y = (unified.to_device(v, cfg.device) for v in (x.flatten(0, -4), y))
        yield read(x, index if crops is None else crops.flatten()), y


def read_one(read, data, index, cfg):
    """What a reader finds in the first picture of index: {key: (1, ...)}; not compiled for a single one."""
    with torch.compiler.set_stance("force_eager"):
        return next(stream(read, data, [(index[:1], None)], cfg))[0]


def machine_memory():
    """Bytes of memory of this machine; no limit where nobody says, as on Windows."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 1 << 60


def extract_features(read, data, index, cfg, title):
    """Features of the whole pictures index (N,): {key: (N, ...)}, labels (N,). UserError if they do not fit into memory."""
    sample = read_one(read, data, index, cfg)
    need = len(index) * sum(v.nbytes for v in sample.values())
    there = torch.cuda.mem_get_info()[0] if cfg.device.startswith("cuda") else machine_memory()
    if need > 0.8 * there:
        raise UserError(f"features of {len(index)} pictures need {need / 2**30:.0f} GiB; --limit {int(0.5 * there / need * len(index))} fits, "
                        "a smaller --pool may, and trained heads have --augment, which keeps none")
    found, y = read_images(read, data, local_shard(index), cfg.workers, cfg.device, title)
    y = gather(y.to(cfg.device), len(index))
    return {key: gather(v, len(index))[y >= 0] for key, v in found.items()}, y[y >= 0]      # unreadable images count nowhere


def gather(mine, n):
    """Rows of which each process has its share -> all n of them, in every process."""
    if unified.rank_and_world()[1] == 1:
        return mine
    everything = mine.new_zeros(n, *mine.shape[1:])
    local_shard(everything)[:] = mine
    torch.distributed.all_reduce(everything)
    return everything


def average_gradients(parameters):
    """Over the processes, each of which has seen its share of the batch."""
    world = unified.rank_and_world()[1]
    for p in parameters:
        if world > 1 and p.grad is not None:
            torch.distributed.all_reduce(p.grad)
            p.grad /= world


# The quickest linear probe: ridge regression in closed form, its strength chosen on a tenth of the training set. Leading dimensions are
# probes of their own: many places of a network are probed in the matrix products of one.


def moments(x, y, mean, std, classes):
    """Sums over pictures that ridge regression needs, in float64, a chunk at a time, since a copy of x in float64 may not fit: x (..., N, C),
    y (N,) -> features with themselves (..., C + 1, C + 1), features with one-hot labels (..., C + 1, classes); a 1 is appended as last feature."""
    gram, cross = 0, 0
    for x, y in zip(x.split(2048, -2), y.split(2048)):
        x = F.pad((x - mean) / std, (0, 1), value=1.0).double()
        gram, cross = gram + x.mT @ x, cross + x.mT @ F.one_hot(y, classes).double()
    return gram, cross


def ridge(gram, cross, penalty):
    """Least squares with an L2 penalty a picture (gram[-1, -1] of them) from moments() -> weight (..., C + 1, classes), the last row the
    bias. penalty: one, or (..., 1, 1)."""
    diagonal = penalty * gram[..., -1:, -1:] * torch.eye(gram.size(-1), dtype=gram.dtype, device=gram.device)
    return torch.cholesky_solve(cross, torch.linalg.cholesky(gram + diagonal)).float()


def ridge_probe(x, y, x_test, y_test, penalties=(1e-4, 1e-3, 1e-2, 1e-1, 1.0)):
    """Accuracy in [0, 1] on the test set of the best ridge on standardised features; the test set chooses nothing. x (N, C) gives a number,
    x (places, N, C) a list of them; y (N,). Computed on the CPU if the device, as Apple's, has no float64."""
    x, y, x_test, y_test = (v.cpu() if v.device.type == "mps" else v for v in (x, y, x_test, y_test))
    mean, std, classes = x.mean(-2, keepdim=True), x.std(-2, keepdim=True) + 1e-6, 1 + max(y.max(), y_test.max()).item()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    held, rest = order[:len(y) // 10], order[len(y) // 10:]
    (gram, cross), (gram_held, cross_held) = (moments(x[..., part, :], y[part], mean, std, classes) for part in (rest, held))

    def accuracy(weight, x, y):
        guesses = [((x - mean) / std @ weight[..., :-1, :] + weight[..., -1:, :]).argmax(-1) for x in x.split(2048, -2)]
        return torch.cat(guesses, -1).eq(y).float().mean(-1)
    scores = torch.stack([accuracy(ridge(gram, cross, p), x[..., held, :], y[held]) for p in penalties])
    best = torch.tensor(penalties, dtype=gram.dtype, device=gram.device)[scores.argmax(0)][..., None, None]
    return accuracy(ridge(gram + gram_held, cross + cross_held, best), x_test, y_test).tolist()


# Where to read? Every candidate is probed by ridge regression on training pictures: nine tenths to fit, one tenth to judge.


def choose(model, candidates, train, index, cfg):
    """The place where ridge regression on nine tenths of (at most CHOICE of) the training pictures does best on the other tenth."""
    if len(candidates) == 1:
        return candidates[0]
    scores, held = {}, min(CHOICE, len(index)) // 10
    for t in dict.fromkeys(place.t for place in candidates):
        wanted = [place for place in candidates if place.t == t]
        read = reader({"top1": model}, wanted, dataclasses.replace(cfg, head="ridge"), alike=True)
        x, y = extract_features(read, train, index[:CHOICE], cfg, f"t {t:g}, {len(wanted)} places")
        for width in {v.size(1) for v in found_in(x, "top1")}:                                    # equally wide ones in one product
            alike = [place for place in wanted if x["top1", place].size(1) == width]
            v = torch.stack([x["top1", place] for place in alike])
            scores.update(zip(alike, ridge_probe(v[:, held:], y[held:], v[:, :held], y[:held])))
    best = max(candidates, key=scores.get)
    print(f"ridge on {len(y) - held} training pictures, accuracy in % on {held} others of the training set; [taken]")
    columns = list(dict.fromkeys(place[1:] for place in candidates))
    print("layer" + "".join(f"{f't {t:g}, {pool}':>14}" for t, pool in columns))
    for layer in sorted({place.layer for place in candidates}):
        row = [Place(layer, *column) for column in columns]
        texts = [f"{100 * scores[place]:.1f}" if place in scores else "" for place in row]
        print(f"{layer:5d}" + "".join(f"{f'[{text}]' if place == best else text + ' ':>14}" for place, text in zip(row, texts)))
    if cfg.sweep and unified.rank_and_world()[0] == 0:
        path = results_folder(cfg.run) / "sweep.png"
        heat_map(scores, best, f"ridge accuracy (percent); layers to the right, t down; best: layer {best.layer}, t {best.t:g}").save(path)
        print(f"drawn in {path}")
    return best


def heat_map(scores, best, title, w=36, h=26):
    """{place: accuracy} -> PIL image: a column a layer, a row a t and pooling, the darker the better, the best one framed."""
    columns, rows = sorted({place.layer for place in scores}), list(dict.fromkeys(place[1:] for place in scores))
    left, top, low, high = 90, 60, min(scores.values()), max(scores.values())
    image = PIL.Image.new("RGB", (max(left + w * len(columns), 480) + 20, top + h * len(rows) + 20), "white")
    draw = PIL.ImageDraw.Draw(image)

    def write(x, y, text, fill="black"):                                                    # centred
        draw.text((x - draw.textlength(text) / 2, y - 6), text, fill=fill)
    draw.text((left, 12), title, fill="black")
    for i, layer in enumerate(columns):
        write(left + (i + 0.5) * w, top - 10, str(layer))
    for j, (t, pool) in enumerate(rows):
        write(left / 2, top + (j + 0.5) * h, f"t {t:g}, {pool}")
    for place, score in scores.items():
        x, y = left + columns.index(place.layer) * w, top + rows.index(place[1:]) * h
        depth = (score - low) / max(high - low, 1e-9)
        color = tuple(round(255 + depth * (dark - 255)) for dark in (0x1f, 0x77, 0xb4))
        draw.rectangle((x, y, x + w - 2, y + h - 2), fill=color, outline="#d62728" if place == best else None, width=3)
        write(x + w / 2 - 1, y + h / 2 - 1, f"{100 * score:.1f}", "white" if depth > 0.6 else "black")
    return image


# Heads that are computed in one go: vectors (N, C), labels (N,), the same of the test set -> accuracy in [0, 1].


def knn(x, y, x_test, y_test, k=20, temperature=0.07):
    """Vote of the k training pictures at the smallest angle, each with weight exp(cosine / temperature) (DINO's eval_knn.py)."""
    x, votes, hits = F.normalize(x), F.one_hot(y).float(), 0
    for query, answer in zip(x_test.split(256), y_test.split(256)):                         # all similarities at once may not fit
        cosine, nearest = (F.normalize(query) @ x.T).topk(min(k, len(x)))
        winner = (votes[nearest] * (cosine / temperature).exp()[..., None]).sum(1).argmax(1)
        hits += (winner == answer).sum()
    return hits.item() / len(y_test)


def fewshot_scores(x, y, x_test, classes, penalty=1024.0):
    """Scores (M, classes) of ridge regression on +-1 targets as UMD is judged by: standardised features and a column of 100
    (official file: evaluators/fewshot_lsr.py). x (N, C), y (N,), x_test (M, C)."""
    mean, std = x.mean(0), x.std(0, correction=0) + 1e-5
    x, x_test = (F.pad((v - mean) / std, (0, 1), value=100.0).double() for v in (x, x_test))
    target = 2.0 * F.one_hot(y, classes).double() - 1
    gram = x.T @ x + penalty * torch.eye(x.size(1), dtype=x.dtype, device=x.device)
    return (x_test @ torch.linalg.solve(gram, x.T @ target)).float()


def few_ridge(x, y, x_test, y_test, penalties=(1e-3, 1e-2, 1e-1, 1.0, 10.0)):
    """Ridge regression from a handful of pictures, too few to hold any out: the strength is chosen by leave-one-out, whose errors follow
    from one singular value decomposition x = u s v without fitting again: residual / (1 - leverage). Features are centred but not scaled:
    the deviation of ten values means little."""
    target = F.one_hot(y).float()
    mean, center = x.mean(0), target.mean(0)
    u, s, v = torch.linalg.svd(x - mean, full_matrices=False)
    moment, energy = u.T @ (target - center), s ** 2

    def error(penalty):
        kept = energy / (energy + penalty * energy.mean())          # what the penalty leaves of each direction
        leverage = 1 / len(x) + (u ** 2 * kept).sum(1, keepdim=True)
        return ((target - center - u * kept @ moment) / (1 - leverage)).square().mean().item()
    best = min(penalties, key=error)
    scores = (x_test - mean) @ v.T * (s / (energy + best * energy.mean())) @ moment + center
    return (scores.argmax(1) == y_test).float().mean().item()


def few_indices(y, shots, seed):
    """Numbers of shots random pictures of each class, or of all it has: int (N,) -> int (M,)."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).to(y.device)
    return torch.cat([order[y[order] == label][:shots] for label in y.unique()])


def few_umd(x, y, x_test, y_test, classes):
    """Accuracy by UMD's few-shot evaluator. Computed on the CPU if the device, as Apple's, has no float64."""
    x, y, x_test, y_test = (v.cpu() if v.device.type == "mps" else v for v in (x, y, x_test, y_test))
    return (fewshot_scores(x, y, x_test, classes).argmax(1) == y_test).float().mean().item()


def fewshot(x, y, x_test, y_test, classes, cfg):
    """Some pictures a class, three draws each: [(head, pictures, {name: three accuracies})]. 5, 10 and 25 by few_ridge, --shots by few_umd."""
    results, least, seed = [], y.bincount(minlength=classes).min().item(), cfg.seed
    fit = functools.partial(few_umd, classes=classes) if cfg.shots else few_ridge
    for shots in [cfg.shots] if cfg.shots else (5, 10, 25):
        if shots > least:
            print(f"few-shot: some class has only {least} training pictures; with {shots} a class, such classes give what they have")
        draws = [few_indices(y, shots, unified.hash_ints(seed, shots, i)) for i in range(3)]
        scores = {name: [fit(v[d], y[d], x_test[name], y_test) for d in draws] for name, v in x.items()}
        results.append((f"fewshot-{shots}", len(draws[0]), scores))
    return results


# Heads that are trained. Each reads a vector z (B, D) from what a reader has found for it, and ends in a linear layer of the same name.


class Head(nn.Module):
    """read(*found) -> z (B, D), then logits (B, classes)."""

    def forward(self, *found):
        return self.linear(self.read(*found))

    def nested(self, *found, dims):
        """Logits from the first d dimensions of z alone, for each d of dims, by the same linear layer [Matryoshka, 2205.13147, 'MRL-E']."""
        z = self.read(*found)
        return [F.linear(z[:, :d], self.linear.weight[:, :d], self.linear.bias) for d in dims]


class ProbeHead(Head):
    """BatchNorm without parameters of its own, then a linear layer: (B, dim) -> (B, classes) [MAE, appendix A]. The normalisation lets one
    learning rate serve features of any scale. (Official file: main_linprobe.py.)"""

    def __init__(self, dim, classes):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(dim, affine=False, eps=1e-6), nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def read(self, x):
        return self.norm(x)


class MLPHead(Head):
    """Linear layers with ReLU between them, none hidden for a linear head (DiffSSL's head.py:Head): (B, dim) -> (B, classes)."""

    def __init__(self, dim, classes, hidden=()):
        super().__init__()
        self.fcs = nn.ModuleList(nn.Linear(i, o) for i, o in zip([dim, *hidden], hidden))
        self.linear = nn.Linear([dim, *hidden][-1], classes)

    def read(self, x):
        for fc in self.fcs:
            x = F.relu(fc(x))
        return x


class HeadBlock(unified.Block):
    """A transformer block as DiffSSL has it: PyTorch's own initialisation and eps of 1e-5, no bias for q, k and v."""

    def __init__(self, dim, heads, ratio):
        super().__init__(dim, heads)
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(dim), nn.LayerNorm(dim), unified.MLP(dim, ratio * dim)
        self.attn.qkv = nn.Linear(dim, 3 * dim, bias=False)


class DifFormer(Head):
    """Reads any places of a network together [DiffSSL 2311.17921] (official file: attention_fusion.py); a single one is its attention head.

    The cells of all maps of one t, each map projected by a tokenizer of its layer, become the tokens of a small transformer, behind a class
    token; what that has become, for all t side by side, is z. No token is told its place in the picture, nor t.

    shapes  {layer: (C, h, w)}        steps  {t: [layer, ...]}, the places; read(*maps) takes their maps (B, C, h, w) in this order
    cells   on a side of the map at most          dim, heads, ratio, depth  of the transformer; dim None: as wide as the widest map
    """

    def __init__(self, shapes, steps, classes, cells=16, dim=None, heads=8, ratio=4, depth=2):
        super().__init__()
        self.steps, layers = steps, sorted(set(sum(steps.values(), [])))
        dim = dim or max(shapes[b][0] for b in layers)

        def tokenizer(channels, side):                  # LayerNorm over channels and cells at once: one mean and deviation a picture
            return nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.LayerNorm([channels, side, side]), nn.Conv2d(channels, dim, 1))
        self.pre_layer = nn.ModuleDict({str(b): tokenizer(shapes[b][0], min(shapes[b][1], cells)) for b in layers})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(HeadBlock(dim, heads, ratio) for _ in range(depth))
        self.linear = nn.Linear(len(steps) * dim, classes)

    def read(self, *maps):
        maps, z = iter(maps), []
        for layers in self.steps.values():
            x = torch.cat([self.pre_layer[str(b)](next(maps)).flatten(2).mT for b in layers], 1)                # (B, cells, dim)
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
            for block in self.blocks:
                x = block(x)
            z.append(x[:, 0])
        return torch.cat(z, 1)


class DifFeed(Head):
    """Two passes through the frozen network [DiffSSL 2311.17921]: what late layers have seen is projected and added to early ones, and the
    second pass is read (official file: ssl_model_feedback_fusion.py). Only head and projections learn, through the second pass.

    features  (x, t, layers, add, noise) -> maps, of the network        feedback  {layer: the earlier layer it is added to}
    head      a DifFormer over the second pass; read(x, *draws) takes pictures and the draws of each of its steps

    BatchNorm is in training mode throughout the training. (In the official code the first evaluation ends that, after a quarter.)
    """

    def __init__(self, features, shapes, feedback, head):
        super().__init__()
        self.features, self.shapes, self.feedback, self.head = features, shapes, feedback, head
        self.feedback_layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(shapes[late][0], shapes[early][0], 1, bias=False), nn.BatchNorm2d(shapes[early][0]), nn.ReLU())
            for late, early in feedback.items())

    @property
    def linear(self):
        return self.head.linear

    def fed_back(self, maps):
        """Maps of the late layers -> {early layer: what is added to it}, in its size."""
        return {early: F.interpolate(layer(m), self.shapes[early][1:], mode="bilinear")
                for early, layer, m in zip(self.feedback.values(), self.feedback_layers, maps)}

    def read(self, x, *draws):
        maps = []
        for (t, layers), noise in zip(self.head.steps.items(), draws):
            with torch.no_grad():
                first = self.features(x, t, list(self.feedback), {}, noise)
            maps += self.features(x, t, layers, self.fed_back(first), noise)
        return self.head.read(*maps)


def feedback_of(model, cfg):
    """{late layer: its mirror} for diffeed: --feedback, or the last layer of each size of map whose mirror has that size, the first layer
    spared, which gives DiffSSL's choice; all of them, where there is one size only."""
    late, second = numbers(cfg.feedback, int, "--feedback"), [b for b in model.layers if model.mirror(b) < b]
    for b in late:
        if b not in second:
            raise UserError(f"--feedback {b} is no layer of this model's second half; they are {second[0]} to {second[-1]}")
    if not late:
        late = [b for b in second if model.mirror(b) > 1 and model.layers[b][1:] == model.layers[model.mirror(b)][1:]]
        last = {model.layers[b][1:]: b for b in late}
        late = list(last.values()) if len(last) > 1 else late
    return {b: model.mirror(b) for b in late}


def new_head(net, nets, wanted, sample, classes, cfg):
    """A fresh head for what a reader finds in one of nets, or in pixels; sample is what it has found for one picture."""
    torch.manual_seed(cfg.seed)
    if cfg.head not in ON_MAPS:
        width = found_in(sample, net)[0].size(1)
        return ProbeHead(width, classes) if cfg.head == "linear" and not cfg.sgd else \
            MLPHead(width, classes, numbers(cfg.hidden, int, "--hidden") if cfg.head == "mlp" else ())
    model, steps = nets[net], {}
    for place in wanted:
        steps.setdefault(place.t, []).append(place.layer)
    head = DifFormer(model.layers, steps, classes, int(cfg.pool))
    if cfg.head != "diffeed":
        return head

    def features(x, t, layers, add, noise):
        with autocast(cfg):
            return [m.float() for m in model.features(x, t, layers, add, noise)]
    model.requires_grad_(False)
    return DifFeed(features, model.layers, feedback_of(model, cfg), head)


class LARS(torch.optim.Optimizer):
    """SGD with momentum; before, the gradient of each matrix is scaled to trust x the matrix's length (official file: util/lars.py).

    Vectors, such as biases, are neither decayed nor scaled. Where weights or gradient have length 0 nothing is scaled.
    """

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.9, trust=0.001):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad
                if p.dim() > 1:
                    g = g + group["weight_decay"] * p
                    length, change = p.norm(), g.norm()
                    g = g * torch.where((length > 0) & (change > 0), group["trust"] * length / change, 1.0)
                m = self.state[p].setdefault("mu", torch.zeros_like(p))
                m.mul_(group["momentum"]).add_(g)
                p.add_(m, alpha=-group["lr"])


def cached_batches(x, y, batch, seed):
    """epoch -> this process's share of batches of features (N, ...) that were computed once; the last, incomplete one is left out, as published."""
    def batches(epoch):
        for part in unified.shuffled(len(y), seed, epoch).to(y.device).split(batch)[:len(y) // batch]:
            part = local_shard(part)
            yield {key: v[part] for key, v in x.items()}, y[part]
    return batches


def fresh_batches(read, data, index, batch, cfg):
    """epoch -> the same of features computed anew, with --augment of fresh random crops, read in smaller parts than a batch."""
    def batches(epoch):
        whole = [local_shard(one) for one in index[unified.shuffled(len(index), cfg.seed, epoch)].split(batch)[:len(index) // batch]]
        parts = [part for one in whole for part in one.split(images_at_once(data, cfg.device))]
        rows, labels = [], []
        for found, y in stream(read, data, [(part, unified.hash_ints(cfg.seed, epoch, part)[:, None] if cfg.augment else None) for part in parts], cfg, replace=True):
            rows, labels = rows + [found], labels + [y]
            if sum(map(len, labels)) == len(whole[0]):
                yield {key: torch.cat([row[key] for row in rows]) for key in found}, torch.cat(labels)
                rows, labels = [], []
    return batches


def progress(steps, title):
    """A bar, shown by the first process only."""
    return tqdm.tqdm(total=steps, desc=title, unit="step", dynamic_ncols=True, disable=unified.rank_and_world()[0] > 0)


def rate(epoch, cfg):
    """Learning rate at an epoch, a fraction included: warm-up and a cosine, or for SGD a tenth after each quarter (StepLR), as published."""
    peak = cfg.lr * cfg.batch_size / 256
    if cfg.sgd:
        return peak * 0.1 ** int(4 * epoch / cfg.epochs)
    warmup = 10 / 90 if cfg.head == "linear" else 0.05
    return learning_rate(epoch, warmup * cfg.epochs, cfg.epochs, peak, least=1e-6 * (cfg.head == "finetune"))


def train_heads(heads, batches, steps, dims, cfg):
    """Train heads, {net: head}, on the same batches, each from the first d dimensions for every d of dims at once.

    batches  epoch -> batches of what a reader finds, labels (B,); steps of them
    """
    law = torch.optim.SGD if cfg.sgd else LARS if cfg.head == "linear" else torch.optim.AdamW
    optimizers = {net: law(head.to(cfg.device).train().parameters(), lr=0.0) for net, head in heads.items()}
    with progress(cfg.epochs * steps, cfg.head) as bar:
        for epoch in range(cfg.epochs):
            for i, (found, y) in enumerate(batches(epoch)):
                for net, head in heads.items():
                    loss = sum(F.cross_entropy(logits, y) for logits in head.nested(*found_in(found, net), dims=dims)) / len(dims)
                    optimizers[net].zero_grad()
                    loss.backward()
                    average_gradients(head.parameters())
                    optimizers[net].param_groups[0]["lr"] = rate(epoch + i / steps, cfg)
                    optimizers[net].step()
                bar.update()


@torch.no_grad()
def score_heads(heads, read, data, dims, cfg):
    """Accuracy of each head on a whole data set, for each d of dims: {net: [in [0, 1], ...]}. (MAE and MAGE report their best epoch.)"""
    plan = [(part, None) for part in local_shard(torch.arange(len(data))).split(images_at_once(data, cfg.device))]
    hits = {net: torch.zeros(len(dims), device=cfg.device) for net in heads}
    readable = torch.zeros((), device=cfg.device)
    for found, y in stream(read, data, plan, cfg):
        readable += (y >= 0).sum()
        for net, head in heads.items():
            hits[net] += torch.stack([(logits.argmax(1) == y).sum() for logits in head.eval().nested(*found_in(found, net), dims=dims)])
    for count in (readable, *hits.values()) if unified.rank_and_world()[1] > 1 else ():
        torch.distributed.all_reduce(count)
    return {net: (count / readable).tolist() for net, count in hits.items()}


# Fine-tuning (official file: main_finetune.py): the whole network learns the classes; the tokenizer stays as it is.


def depth_of(name, blocks, stem):
    """0 for what comes before the blocks, i + 1 for blocks.i, blocks + 1 for all that comes after."""
    first = name.split(".")[0]
    if first == "blocks":
        return int(name.split(".")[1]) + 1
    return 0 if first in stem else blocks + 1


def groups(net, head, decay, weight_decay=0.05):
    """Parameters for an optimizer. The further from the output, the less is left to learn: 'scale' is decay ** (layers above). Vectors,
    such as biases, are not pulled to zero."""
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    blocks = max([depth_of(name, 0, net.stem) for name, _ in named if name.startswith("blocks.")], default=0)
    alike = {}
    for depth, p in [(depth_of(name, blocks, net.stem), p) for name, p in named] + [(blocks + 1, p) for p in head.parameters()]:
        alike.setdefault((depth, p.dim() > 1), []).append(p)
    return [{"params": params, "scale": decay ** (blocks + 1 - depth), "weight_decay": weight_decay * matrix}
            for (depth, matrix), params in alike.items()]


def finetune(net, data, index, test, decay, title, cfg):
    """Train net, which is changed, and a linear head on the mean of its best layer's map; accuracy in [0, 1] on the data set test.

    As published: AdamW, warm-up and cosine, layer decay, random resized crops, flips, mixup 0.8, label smoothing 0.1, dropout after the
    embedding and nowhere else. Left out, since they pay in long trainings only: RandAugment, cutmix and stochastic depth.
    """
    torch.manual_seed(cfg.seed)
    width = net.layers[net.best_layer][0]
    head = nn.Sequential(nn.LayerNorm(width, eps=1e-6), nn.Linear(width, len(data.classes))).to(cfg.device)
    nn.init.trunc_normal_(head[1].weight, std=2e-5)
    nn.init.zeros_(head[1].bias)
    optimizer = torch.optim.AdamW(groups(net, head, decay), lr=0.0, betas=(0.9, 0.999))
    steps = len(index) // cfg.batch_size

    def logits(x):
        with autocast(cfg):
            m = net.features(unified.to_device(x, cfg.device), net.best_t, finetune=True)[0]
        return head(m.float().mean((2, 3)))
    dropouts = [part.train() for name, part in net.named_children() if name in net.stem]
    with progress(cfg.epochs * steps, title) as bar:
        for epoch in range(cfg.epochs):
            parts = index[unified.shuffled(len(index), cfg.seed, epoch)].split(cfg.batch_size)[:steps]
            plan = [(part, unified.hash_ints(cfg.seed, epoch, part)[:, None]) for part in map(local_shard, parts)]
            for i, (x, y) in enumerate(data.batches(plan, cfg.workers)):
                mixup_loss(logits, x.squeeze(1), unified.to_device(y, cfg.device)).backward()
                average_gradients(p for group in optimizer.param_groups for p in group["params"])
                for group in optimizer.param_groups:
                    group["lr"] = rate(epoch + i / steps, cfg) * group["scale"]
                optimizer.step()
                optimizer.zero_grad()
                bar.update()
    for part in dropouts:
        part.eval()
    return accuracy(logits, test, cfg)


def mixup_loss(logits, x, y, alpha=0.8, smoothing=0.1):
    """Cross-entropy of blends, each picture with another of the batch, whose label counts as much as its pixels [mixup, 1710.09412]."""
    share = torch.distributions.Beta(alpha, alpha).sample().item()
    guess = logits(share * x + (1 - share) * x.flip(0))
    first, second = (F.cross_entropy(guess, label, label_smoothing=smoothing) for label in (y, y.flip(0)))
    return share * first + (1 - share) * second


@torch.no_grad()
def accuracy(logits, data, cfg):
    """Share of a data set's whole pictures where the largest of logits(x) is the label's."""
    plan = [(part, None) for part in local_shard(torch.arange(len(data))).split(images_at_once(data, cfg.device))]
    hits = [torch.stack([logits(x).argmax(1) == y, y >= 0], 1) for x, y in
            ((x, y.to(cfg.device)) for x, y in data.batches(plan, cfg.workers, replace=False))]
    right, readable = gather(torch.cat(hits).float(), len(data)).sum(0).tolist()
    return right / readable


# What is asked for, and how it is told.


def open_sets(model, config, cfg):
    """Name of the data set, its training and its test part: the run's own unless --dataset says otherwise."""
    name = cfg.dataset or config.get("dataset")
    if not name:
        raise UserError(f"{cfg.run} does not say what it was trained on; add --dataset shapes, cifar10, imagenet or a folder")
    folder = cfg.data_dir or (config.get("data_dir", "") if name == config.get("dataset") else "")
    train, test = (unified.open_data(name, folder, model.image_size, part, cfg.device, cfg.strict_images) for part in (True, False))
    if len(train.classes) < 2 or not test.unseen or len(train) < 20:
        raise UserError(f"{name} cannot be probed, which takes two classes, 20 images to train on and others to test on: {train.summary}")
    if not cfg.dataset:
        check_same_data(config, train, cfg.run, f"put them back, or say --dataset {name} to probe it on these")
    return name, train, test


def fit_recipe(cfg, train, images):
    """Adapt the recipe to the number of training images: --batch-size is at most that, since incomplete batches are left out.

    LARS changes a matrix by a share of its length, in all by lr x epochs x images / 256 of these shares, whatever the batch. With the
    published 0.1 a set of 5,000 images hardly leaves the start: 29 % on shapes, against 57 % with 1.0, where ridge has 67 %. Fine-tuning on
    2,000 shapes for 60 epochs reached 80 % with the published rate and 98 % with eight times as much.
    """
    if cfg.batch_size > images:
        print(f"--batch-size {cfg.batch_size} is more than the {images} training images; taking {images}, with its learning rate")
        cfg.batch_size = images
    cfg.batch_size -= cfg.batch_size % unified.rank_and_world()[1]                               # everyone's share is the same
    if cfg.lr is None:
        cfg.lr = {"linear": 0.1, "finetune": 2.5e-4}[cfg.head] * (1 if images >= 500_000 else 10)
    if cfg.augment and cfg.sgd:
        train.scale = (0.64, 1.0)                                                           # DiffSSL keeps at least 0.8 of the sides
    print(f"{cfg.head}: {cfg.epochs} epochs, {cfg.batch_size} images a step, learning rate {cfg.lr * cfg.batch_size / 256:.3g}")


def compare(nets, wanted, train, index, test, cfg):
    """Features of {'top1': this model, 'untrained': ...}, and pixels, read by --head: [(head, training images, {name: [accuracy, ...]})]."""
    read = reader(nets, wanted, cfg)
    if cfg.head in RECIPES:
        return compare_trained(read, nets, wanted, train, index, test, cfg)
    x_test, y_test = extract_features(read, test, torch.arange(len(test)), cfg, "test set")
    x, y = extract_features(read, train, index, cfg, "training set")
    x, x_test = ({name: v for (name, _), v in found.items()} for found in (x, x_test))
    if cfg.head == "fewshot":
        return fewshot(x, y, x_test, y_test, len(train.classes), cfg)
    head = {"ridge": ridge_probe, "knn": knn}[cfg.head]
    return [(cfg.head, len(y), {name: [head(x[name], y, x_test[name], y_test)] for name in x})]


def compare_trained(read, nets, wanted, train, index, test, cfg):
    """compare() for heads that are trained."""
    sample = read_one(read, train, index, cfg)
    heads = {net: new_head(net, nets, wanted, sample, len(train.classes), cfg) for net in dict.fromkeys(net for net, _ in sample)}
    width = heads["top1"].linear.in_features
    dims = [2 ** k for k in range(3, width.bit_length()) if 2 ** k < width] + [width] if cfg.matryoshka else [None]
    if cfg.augment or cfg.head == "diffeed":
        batches, images = fresh_batches(read, train, index, cfg.batch_size, cfg), len(index)
    else:
        print(f"{cfg.head}: on features of whole pictures, computed once; --augment takes fresh crops in every epoch, as published")
        x, y = extract_features(read, train, index, cfg, "training set")
        batches, images = cached_batches(x, y, cfg.batch_size, cfg.seed), len(y)
    train_heads(heads, batches, images // cfg.batch_size, dims, cfg)
    scores = score_heads(heads, read, test, dims, cfg)
    return [(cfg.head + (f"-{d}" if d else ""), images, {name: [score[i]] for name, score in scores.items()}) for i, d in enumerate(dims)]


def results_folder(run):
    """Where the checkpoint lies or, if that is read-only, the current folder; UserError if both are."""
    folder = pathlib.Path(run) if os.path.isdir(run) else pathlib.Path(run).parent
    for place in (folder, pathlib.Path()):
        if os.access(place, os.W_OK):
            return place
    raise UserError(f"neither {folder} nor the current folder can be written to; "
                    "start this in a folder of your own")


def report(wanted, dataset, labels, results, seconds, cfg):
    """Print the accuracies and append them to probe.jsonl.

    wanted  the places read        labels  {'top1': what it is, ...} of what is compared        results  as compare() returns them
    """
    path = results_folder(cfg.run) / "probe.jsonl"
    layers, levels = (list(dict.fromkeys(column)) for column in zip(*((place.layer, place.t) for place in wanted)))
    for head, images, scores in results:
        print(f"{head} on {dataset}: layer {', '.join(map(str, layers))}, t {', '.join(f'{t:g}' for t in levels)}, {wanted[0].pool}, "
              f"{images} training images")
        draws = {name: torch.tensor(values, dtype=torch.float64) for name, values in scores.items()}
        for name, values in draws.items():
            spread = f" +- {values.std():.1%}" if len(values) > 1 else ""
            print(f"    {values.mean():6.1%}{spread}  {labels[name]}")
        row = {"head": head, "layer": layers if layers[1:] else layers[0], "t": levels if levels[1:] else levels[0], "pool": wanted[0].pool}
        row.update({name: round(draws[name].mean().item(), 4) if name in draws else None for name in labels})
        if len(draws["top1"]) > 1:
            row["deviation"] = round(draws["top1"].std().item(), 4)
        with open(path, "a") as file:
            file.write(json.dumps({**row, "images": images, "seconds": round(seconds, 1), "dataset": dataset}) + "\n")
    print(f"appended to {path}")


def main():
    cfg = settle(unified.parse_flags(Config, __doc__.split("\n")[0]))
    cfg.device = str(unified.join_processes(cfg.device))
    first = unified.rank_and_world()[0] == 0
    try:
        with contextlib.redirect_stdout(sys.stdout if first else None):                     # all do the same, one tells
            run(cfg, first)
    finally:
        unified.leave_processes()


def run(cfg, first):
    """All that is asked for. first: this process writes the results."""
    started = time.time()
    model, config = unified.load_model(cfg.run, {"raw": False, "ema": True}.get(cfg.weights),
                                       heads=cfg.adm_heads, order=cfg.adm_order)
    wanted = places(model, cfg)
    if cfg.head == "diffeed":
        feedback_of(model, cfg)                         # refuses, if at all, before any work
    dataset, train, test = open_sets(model.to(cfg.device), config, cfg)
    print(train.summary or f"{dataset}: {len(train)} images to train on, {len(test)} to test on")
    index = unified.shuffled(len(train), cfg.seed)[:cfg.limit]
    if cfg.compile:
        compile_blocks(model)
    if cfg.head in RECIPES:
        fit_recipe(cfg, train, len(index))
    if cfg.head in ONE_PLACE:
        wanted = [choose(model, wanted, train, index, cfg)]
    if cfg.head in ON_MAPS:
        wanted = [place._replace(pool=cfg.pool) for place in wanted]
    nets = {"top1": model, "untrained": untrained(model, config)}
    if cfg.compile:
        compile_blocks(nets["untrained"])
    labels = {"top1": "this model", "pixels": "raw pixels",
              "untrained": "the same network untrained" + " (transformer untrained, tokenizer trained)" * bool(model.tokenizer)}
    if cfg.head == "finetune":
        labels["untrained"] = "the same network from scratch, by the same recipe but without layer decay"
        decay = 0.75 if model.best_layer >= 24 else 0.65                                    # as published for large and base
        scores = {"top1": [finetune(model, train, index, test, decay, "fine-tuning", cfg)],
                  "untrained": [finetune(nets["untrained"], train, index, test, 1.0, "from scratch", cfg)]}
        results = [("finetune", len(index), scores)]
    else:
        results = compare(nets, wanted, train, index, test, cfg)
    if first:
        report(wanted, dataset, labels, results, time.time() - started, cfg)
    for data, fate in ((train, "left out or replaced"), (test, "left out")):
        if data.unreadable:
            print(f"{len(data.unreadable)} unreadable images, named above, were {fate}")


if __name__ == "__main__":
    unified.run_main(main)
