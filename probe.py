"""Read what a trained model has understood: its features, and how much they say about the class of a picture.

    python probe.py out/RUN                                         ridge regression on the model's vectors, in a minute
    python probe.py out/RUN --layers 2,4,6 --pool mean,class        first find the best place to read, on training pictures only
    python probe.py out/RUN --head knn                              or fewshot, linear (the published probe), finetune
    python probe.py mage-vitb-1600.pth --dataset imagenet --head linear --augment       the published recipe on published weights

Every accuracy stands beside two others, got in the same way: from the raw pixels, and from the same network untrained. What they reach
needs no training. Results are appended to probe.jsonl in the run's folder. The test set is read once and chooses nothing.
"""
import dataclasses
import json
import os
import pathlib
import time
import typing

import torch
import torch.nn as nn
import torch.nn.functional as F
import tqdm

import unified
from unified import UserError, option


@dataclasses.dataclass
class Config:
    run: str = option(dataclasses.MISSING, "run folder, checkpoint, or weight file published by the authors", positional=True)
    head: str = option("ridge", "what reads the features", choices=["ridge", "linear", "knn", "fewshot", "finetune"])
    layers: str = option("", "blocks to read, counted from 1, such as 2,4,6; the one that the paper reads, if not given")
    t: str = option("", "how corrupted the pictures are: for MAGE the hidden share, such as 0,0.3; for models of noise the step, such as 0,50; as in the paper, if not given")
    pool: str = option("", "mean: average over the picture; class: the class position; mean,class: the better one; as in the paper, if not given")
    dataset: str = option("", "shapes, cifar10, imagenet, or a folder with train/<class>/* and val/<class>/*; else the run's own")
    data_dir: str = option("", "where the data set lies, if not in data/<dataset>")
    limit: int = option(None, "training images used at most")
    augment: bool = option(False, "linear: fresh crops in every epoch, as published, instead of features computed once")
    batch_size: int = option(None, "images a step; 4096 for linear, 256 for finetune")
    epochs: int = option(None, "passes over the training set; 90 for linear, 20 for finetune")
    lr: float = option(None, "learning rate for 256 images a step; for linear 0.1, or 1 below 500,000 images; for finetune 2.5e-4")
    seed: int = option(0, "of everything random")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "where to compute")
    dtype: str = option("float32", "of activations", choices=["float32", "bfloat16"])
    workers: int = option(min(8, os.cpu_count()), "processes that decode images of a folder")
    strict_images: bool = option(False, "stop at an unreadable image instead of skipping it")


# batch, epochs, lr for 256 images, share of the epochs that warms up. The linear row is the paper's; its finetune row has 1024 and 100,
# which is a week on a laptop. The linear lr is set when the images have been counted, see fit_recipe.
RECIPES = {"linear": (4096, 90, None, 10 / 90), "finetune": (256, 20, 2.5e-4, 0.05)}
CHOICE = 10_000                 # training images on which --layers, --t and --pool are chosen: all places at once must fit into memory
UNTRAINED = 0                   # seed of the untrained network


def settle(cfg):
    """Fill in what was not said on the command line; refuse what cannot be."""
    for name in ("batch_size", "epochs", "lr"):
        if getattr(cfg, name) is not None and cfg.head not in RECIPES:
            raise UserError(f"--{name.replace('_', '-')} belongs to --head linear and finetune; {cfg.head} is computed in one go")
    for name, value in zip(("batch_size", "epochs", "lr"), RECIPES.get(cfg.head, ())):
        setattr(cfg, name, value if getattr(cfg, name) is None else getattr(cfg, name))
        if getattr(cfg, name) is not None and getattr(cfg, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive, not {getattr(cfg, name)}")
    if cfg.augment and cfg.head != "linear":
        raise UserError(f"--augment belongs to --head linear, not to {cfg.head}")
    if cfg.limit is not None and cfg.limit < 20:
        raise UserError(f"--limit must be at least 20, since a tenth of the training images is held out, not {cfg.limit}")
    if cfg.head == "finetune" and (cfg.layers, cfg.t, cfg.pool) != ("", "", ""):
        raise UserError("--head finetune trains all that leads to the layer the paper reads; leave --layers, --t and --pool out")
    if cfg.workers < 0:
        raise UserError(f"--workers must be 0 or more, not {cfg.workers}")
    unified.pick_device(cfg.device)
    return cfg


# Where a vector is read, and what is compared with it.


class Place(typing.NamedTuple):
    """After which block, how corrupted the picture is, and how the map becomes a vector: 'mean' or 'class'."""
    layer: int
    t: float
    pool: str


def numbers(text, kind, flag):
    """'4,5,6' -> [4, 5, 6]."""
    try:
        return [kind(part) for part in text.split(",") if part]
    except ValueError:
        raise UserError(f"{flag} takes numbers with commas between them, not {text}")


def places(model, cfg):
    """All combinations of --layers, --t and --pool. The class position is only read where the model itself would."""
    best, (least, most, meaning) = model.best_layer, model.t_range
    layers, levels = numbers(cfg.layers, int, "--layers") or [best], numbers(cfg.t, float, "--t") or [float(model.best_t)]
    pools = cfg.pool.split(",") if cfg.pool else ["mean"] if cfg.layers or cfg.t else [model.pools[0]]
    for layer in layers:
        if layer not in model.layers:
            raise UserError(f"this model has no layer {layer}; --layers takes {min(model.layers)} to {max(model.layers)}")
    for t in levels:
        if not least <= t <= most or (isinstance(most, int) and t != int(t)):
            raise UserError(f"--t {t:g} does not fit this model; it is {meaning}, {least} to {most}")
    for pool in pools:
        if pool not in model.pools:
            raise UserError(f"there is no pooling {pool!r}; for this model --pool takes {' or '.join([*model.pools, ','.join(model.pools)][:1 + len(model.pools)])}")
    if pools == ["class"] and (layers != [best] or levels != [model.best_t]):
        raise UserError(f"--pool class reads layer {best} at t {model.best_t:g}; leave --layers and --t out")
    grid = [Place(layer, t, "mean") for t in levels for layer in layers if "mean" in pools]
    return list(dict.fromkeys(grid + [Place(best, float(model.best_t), "class")] * ("class" in pools)))


def vectors(model, wanted, x, index, seed=0):
    """Pictures x (B, 3, S, S), or their ids (B, L) -> {place: vectors (B, C)}.

    What the model itself calls its embedding is model.embed; the mean at other places is normalised alike. What t hides depends on the
    seed and on the pictures' numbers, index (B,), so that the same picture always looks the same.
    """
    noise = model.noise(unified.fold(seed, index).to(x.device))
    own = {Place(model.best_layer, float(model.best_t), pool) for pool in model.pools}
    found = {place: model.embed(x, noise=noise, pool=place.pool) for place in wanted if place in own}
    for t in sorted({place.t for place in wanted if place not in own}):
        layers = sorted({place.layer for place in wanted if place.t == t and place not in own})
        for layer, m in zip(layers, model.features(x, t, layers, noise=noise)):
            found[Place(layer, t, "mean")] = F.layer_norm(m.mean((2, 3)), m.shape[1:2], eps=1e-6)
    return found


def tokens(model, x):
    """What a token model makes of pictures first, so that it is done once for several places or networks; pictures for all others."""
    return model.to_ids(x) if getattr(model, "reads_ids", False) else x


def pixels(x):
    """(B, 3, S, S) -> (B, 3 * S * S); above 32 pixels averaged down to 32, where a closed-form fit of 3072 values still takes seconds."""
    return F.adaptive_avg_pool2d(x, min(32, x.size(-1))).flatten(1)


def untrained(model, config):
    """The same network with fresh weights of a fixed seed. It keeps the trained tokenizer, whose features are not what is in question."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(UNTRAINED)
        fresh = unified.build(config["arch"])
    if hasattr(model, "vqgan"):
        fresh.vqgan.load_state_dict(model.vqgan.state_dict())
    return fresh.to(next(model.parameters()).device).eval()


# Features of many pictures. A reader turns pictures x (B, 3, S, S) and their numbers (B,) into {name: vectors (B, C)}; all that is compared
# is read from one picture while it is at hand, since decoding it may be what takes longest.


def autocast(cfg):
    return torch.autocast(torch.device(cfg.device).type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")


def at_once(data, cfg):
    """How many pictures to read at once: 2^18 pixels on a CPU, 2^21 on a GPU; the tokenizer's first layers need the memory."""
    side = data.size if isinstance(data, unified.Folder) else data.images.size(-1)
    return max(1, 2 ** (18 if cfg.device == "cpu" else 21) // side ** 2)


@torch.no_grad()
def stream(read, data, plan, cfg):
    """Batches of features: for each (index (B,), crops (B, 1) or None) of the list plan yields {name: (B, C)}, labels (B,)."""
    for (index, _), (x, y) in zip(plan, data.batches(plan, cfg.workers)):
        with autocast(cfg):
            found = read(x.flatten(0, -4).to(cfg.device), index)
        yield {name: v.float() for name, v in found.items()}, y.to(cfg.device)


def collect(read, data, index, cfg, title):
    """Features of the whole pictures index (N,): {name: (N, C)}, labels (N,)."""
    found, labels, done = {}, torch.zeros(len(index), dtype=torch.long, device=cfg.device), 0
    plan = [(part, None) for part in index.split(at_once(data, cfg))]
    with tqdm.tqdm(total=len(index), desc=title, unit=" images", dynamic_ncols=True) as bar:
        for part, y in stream(read, data, plan, cfg):
            for name, v in part.items():
                found.setdefault(name, v.new_empty(len(index), v.size(1)))[done:done + len(y)] = v
            labels[done:done + len(y)] = y
            done += len(y)
            bar.update(len(y))
    return found, labels


def choose(model, candidates, train, index, cfg):
    """The place where ridge regression on nine tenths of (at most CHOICE of) the training pictures does best on the other tenth."""
    if len(candidates) == 1:
        return candidates[0]

    def read(x, index):
        return vectors(model, candidates, tokens(model, x), index, cfg.seed)
    x, y = collect(read, train, index[:CHOICE], cfg, f"{len(candidates)} places")
    held = len(y) // 10
    scores = {place: unified.ridge_probe(v[held:], y[held:], v[:held], y[:held]) for place, v in x.items()}
    best = max(candidates, key=scores.get)
    print(f"ridge on {len(y) - held} training pictures, accuracy on {held} others of the training set\n layer     t  pool   accuracy")
    for place in candidates:
        print(f"{place.layer:6d} {place.t:5g}  {place.pool:5s}    {scores[place]:6.1%} {'  <- taken' if place == best else ''}")
    return best


# Heads that are computed in one go: vectors (N, C), labels (N,), the same of the test set -> accuracy in [0, 1].


def knn(x, y, x_test, y_test, k=20, temperature=0.07):
    """Vote of the k training pictures at the smallest angle, each with weight exp(cosine / temperature) (DINO's eval_knn.py)."""
    x, votes, hits = F.normalize(x), F.one_hot(y).float(), 0
    for query, answer in zip(x_test.split(256), y_test.split(256)):                         # all similarities at once may not fit
        cosine, nearest = (F.normalize(query) @ x.T).topk(min(k, len(x)))
        winner = (votes[nearest] * (cosine / temperature).exp()[..., None]).sum(1).argmax(1)
        hits += (winner == answer).sum().item()
    return hits / len(y_test)


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


def draw(y, shots, seed):
    """Numbers of shots random pictures of each class, or of all it has: int (N,) -> int (M,)."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).to(y.device)
    return torch.cat([order[y[order] == label][:shots] for label in y.unique()])


def fewshot(x, y, x_test, y_test, seed, classes):
    """5, 10 and 25 pictures a class, three draws each: [(head, pictures, {name: three accuracies})]."""
    results, least = [], y.bincount(minlength=classes).min().item()
    for shots in (5, 10, 25):
        if shots > least:
            print(f"few-shot: some class has only {least} training pictures; with {shots} a class, such classes give what they have")
        draws = [draw(y, shots, unified.fold(seed, shots, i)) for i in range(3)]
        scores = {name: [few_ridge(v[d], y[d], x_test[name], y_test) for d in draws] for name, v in x.items()}
        results.append((f"fewshot-{shots}", len(draws[0]), scores))
    return results


# The linear probe as published (official file: main_linprobe.py).


class ProbeHead(nn.Module):
    """BatchNorm without parameters of its own, then a linear layer: (B, dim) -> (B, classes) [MAE, appendix A]. The normalisation lets one
    learning rate serve features of any scale."""

    def __init__(self, dim, classes):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(dim, affine=False, eps=1e-6), nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x):
        return self.linear(self.norm(x))


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


def shuffled(n, *seeds):
    return torch.randperm(n, generator=torch.Generator().manual_seed(unified.fold(*seeds)))


def cached_batches(x, y, batch, seed):
    """epoch -> batches of features (N, C) that were computed once; the last, incomplete batch is left out, as published."""
    def batches(epoch):
        for part in shuffled(len(y), seed, epoch).to(y.device).split(batch)[:len(y) // batch]:
            yield {name: v[part] for name, v in x.items()}, y[part]
    return batches


def fresh_batches(read, data, index, batch, cfg):
    """epoch -> batches of features of fresh random crops, read in smaller parts than a batch."""
    def batches(epoch):
        whole = index[shuffled(len(index), cfg.seed, epoch)].split(batch)[:len(index) // batch]
        parts = [part for one in whole for part in one.split(at_once(data, cfg))]
        rows, labels = [], []
        for found, y in stream(read, data, [(part, unified.fold(cfg.seed, epoch, part)[:, None]) for part in parts], cfg):
            rows, labels = rows + [found], labels + [y]
            if sum(map(len, labels)) == batch:
                yield {name: torch.cat([row[name] for row in rows]) for name in found}, torch.cat(labels)
                rows, labels = [], []
    return batches


def linear(batches, x_test, y_test, classes, steps, cfg):
    """Train a ProbeHead a name at once: {name: accuracy in [0, 1] after the last epoch}. The papers report the best epoch on the test set.

    batches  epoch -> batches of {name: (B, C)}, labels (B,); steps of them
    """
    torch.manual_seed(cfg.seed)
    heads = {name: ProbeHead(v.size(1), classes).to(cfg.device) for name, v in x_test.items()}
    optimizers = {name: LARS(head.linear.parameters(), lr=0.0) for name, head in heads.items()}
    warmup, peak = RECIPES["linear"][3] * cfg.epochs, cfg.lr * cfg.batch_size / 256
    with tqdm.tqdm(total=cfg.epochs * steps, desc="linear", unit="step", dynamic_ncols=True) as bar:
        for epoch in range(cfg.epochs):
            for i, (x, y) in enumerate(batches(epoch)):
                for name, head in heads.items():
                    loss = F.cross_entropy(head(x[name]), y)
                    optimizers[name].zero_grad()
                    loss.backward()
                    optimizers[name].param_groups[0]["lr"] = unified.learning_rate(epoch + i / steps, warmup, cfg.epochs, peak)
                    optimizers[name].step()
                bar.update()
    with torch.no_grad():
        return {name: (head.eval()(x_test[name]).argmax(1) == y_test).float().mean().item() for name, head in heads.items()}


# Fine-tuning (official file: main_finetune.py): the whole network learns the classes; the tokenizer stays as it is.


def depth_of(name, blocks):
    """0 for what comes before the blocks, i + 1 for blocks.i, blocks + 1 for all that comes after."""
    first = name.split(".")[0]
    if first == "blocks":
        return int(name.split(".")[1]) + 1
    return 0 if first in ("token_emb", "patch_embed", "pos_embed", "cls_token") else blocks + 1


def groups(net, head, decay, weight_decay=0.05):
    """Parameters for an optimizer. The further from the output, the less is left to learn: 'scale' is decay ** (layers above). Vectors,
    such as biases, are not pulled to zero."""
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    blocks = max([depth_of(name, 0) for name, _ in named if name.startswith("blocks.")], default=0)
    alike = {}
    for depth, p in [(depth_of(name, blocks), p) for name, p in named] + [(blocks + 1, p) for p in head.parameters()]:
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
    steps, warmup, peak = len(index) // cfg.batch_size, RECIPES["finetune"][3] * cfg.epochs, cfg.lr * cfg.batch_size / 256

    def logits(x):
        with autocast(cfg):
            return head(net.features(x.to(cfg.device), finetune=True)[0].mean((2, 3))).float()
    embedding = getattr(net, "token_emb", nn.Identity()).train()
    with tqdm.tqdm(total=cfg.epochs * steps, desc=title, unit="step", dynamic_ncols=True) as bar:
        for epoch in range(cfg.epochs):
            parts = index[shuffled(len(index), cfg.seed, epoch)].split(cfg.batch_size)[:steps]
            plan = [(part, unified.fold(cfg.seed, epoch, part)[:, None]) for part in parts]
            for i, (x, y) in enumerate(data.batches(plan, cfg.workers)):
                mixup_loss(logits, x.squeeze(1), y.to(cfg.device)).backward()
                rate = unified.learning_rate(epoch + i / steps, warmup, cfg.epochs, peak, least=1e-6)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["scale"]
                optimizer.step()
                optimizer.zero_grad()
                bar.update()
    embedding.eval()
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
    plan = [(part, None) for part in torch.arange(len(data)).split(at_once(data, cfg))]
    return torch.cat([logits(x).argmax(1).cpu() == y for x, y in data.batches(plan, cfg.workers)]).float().mean().item()


# What is asked for, and how it is told.


def open_sets(model, config, cfg):
    """Name of the data set, its training and its test part: the run's own unless --dataset says otherwise."""
    name = cfg.dataset or config.get("dataset")
    if not name:
        raise UserError(f"{cfg.run} does not say what it was trained on; add --dataset shapes, cifar10, imagenet or a folder")
    folder = cfg.data_dir or (config.get("data_dir", "") if name == config.get("dataset") else "")
    return name, *(unified.open_data(name, folder, model.image_size, part, cfg.device, cfg.strict_images) for part in (True, False))


def fit_recipe(cfg, images):
    """Adapt the recipe to the number of training images: --batch-size is at most that, since incomplete batches are left out.

    LARS changes a matrix by a share of its length, in all by lr x epochs x images / 256 of these shares, whatever the batch. With the
    published 0.1 a set of 5,000 images hardly leaves the start: 29 % on shapes, against 57 % with 1.0, where ridge has 67 %.
    """
    if cfg.batch_size > images:
        print(f"--batch-size {cfg.batch_size} is more than the {images} training images; taking {images}, with its learning rate")
        cfg.batch_size = images
    if cfg.lr is None:
        cfg.lr = 0.1 if images >= 500_000 else 1.0
    print(f"{cfg.head}: {cfg.epochs} epochs, {cfg.batch_size} images a step, learning rate {cfg.lr * cfg.batch_size / 256:.3g}")


def compare(model, fresh, place, train, index, test, cfg):
    """Features of this model, of the untrained one, and pixels, read by --head: [(head, training images, {name: [accuracy, ...]})]."""
    def read(x, index):
        seen = tokens(model, x)                                                             # both networks have the same tokenizer
        found = {name: vectors(net, [place], seen, index, cfg.seed)[place] for name, net in (("top1", model), ("untrained", fresh))}
        return {**found, "pixels": pixels(x)}
    x_test, y_test = collect(read, test, torch.arange(len(test)), cfg, "test set")
    if cfg.augment:
        batches, images = fresh_batches(read, train, index, cfg.batch_size, cfg), len(index)
    else:
        x, y = collect(read, train, index, cfg, "training set")
        if cfg.head == "fewshot":
            return fewshot(x, y, x_test, y_test, cfg.seed, len(train.classes))
        if cfg.head != "linear":
            head = {"ridge": unified.ridge_probe, "knn": knn}[cfg.head]
            return [(cfg.head, len(y), {name: [head(x[name], y, x_test[name], y_test)] for name in x})]
        print("linear: trained on features of whole pictures, computed once; --augment takes fresh crops in every epoch, as published")
        batches, images = cached_batches(x, y, cfg.batch_size, cfg.seed), len(y)
    scores = linear(batches, x_test, y_test, len(train.classes), images // cfg.batch_size, cfg)
    return [(cfg.head, images, {name: [score] for name, score in scores.items()})]


def report(place, dataset, labels, results, seconds, cfg):
    """Print the accuracies and append them to probe.jsonl, beside the checkpoint or, if that place is read-only, in the current folder.

    labels   {'top1': what it is, ...} of what is compared          results  as compare() returns them
    """
    folder = pathlib.Path(cfg.run) if pathlib.Path(cfg.run).is_dir() else pathlib.Path(cfg.run).parent
    path = (folder if os.access(folder, os.W_OK) else pathlib.Path()) / "probe.jsonl"
    for head, images, scores in results:
        print(f"{head} on {dataset}: layer {place.layer}, t {place.t:g}, {place.pool}, {images} training images")
        draws = {name: torch.tensor(values, dtype=torch.float64) for name, values in scores.items()}
        for name, values in draws.items():
            spread = f" +- {values.std():.1%}" if len(values) > 1 else ""
            print(f"    {values.mean():6.1%}{spread}  {labels[name]}")
        row = {"head": head, **place._asdict(), **{name: None for name in ("top1", "untrained", "pixels")}}
        row.update({name: round(values.mean().item(), 4) for name, values in draws.items()})
        if len(draws["top1"]) > 1:
            row["deviation"] = round(draws["top1"].std().item(), 4)
        with open(path, "a") as file:
            file.write(json.dumps({**row, "images": images, "seconds": round(seconds, 1), "dataset": dataset}) + "\n")
    print(f"appended to {path}")


def main():
    cfg, started = settle(unified.parse(Config, __doc__.split("\n")[0])), time.time()
    model, config = unified.load_model(cfg.run)
    candidates = places(model, cfg)
    dataset, train, test = open_sets(model.to(cfg.device), config, cfg)
    index = shuffled(len(train), cfg.seed)[:cfg.limit]
    if cfg.head in RECIPES:
        fit_recipe(cfg, len(index))
    place, fresh = choose(model, candidates, train, index, cfg), untrained(model, config)
    labels = {"top1": "this model", "pixels": "raw pixels",
              "untrained": "the same network untrained" + " (transformer untrained, tokenizer trained)" * hasattr(model, "vqgan")}
    if cfg.head == "finetune":
        labels["untrained"] = "the same network from scratch, by the same recipe but without layer decay"
        decay = 0.75 if model.best_layer >= 24 else 0.65                                    # as published for large and base
        scores = {"top1": [finetune(model, train, index, test, decay, "fine-tuning", cfg)],
                  "untrained": [finetune(fresh, train, index, test, 1.0, "from scratch", cfg)]}
        results = [("finetune", len(index), scores)]
    else:
        results = compare(model, fresh, place, train, index, test, cfg)
    report(place, dataset, labels, results, time.time() - started, cfg)
    unreadable = sum(len(getattr(data, "unreadable", ())) for data in (train, test))
    if unreadable:
        print(f"{unreadable} unreadable images were skipped and named above")


if __name__ == "__main__":
    unified.run_script(main)
