"""Train a tokenizer, then a model on its ids, then show what it has learned.

    python train.py                                          shapes drawn on the fly, on a CPU, in minutes
    python train.py --dataset cifar10                        the same on CIFAR-10
    python train.py --dataset imagenet --tokenizer vqgan_jax_strongaug.ckpt         the paper's recipe
    python train.py --model addp --predictor out/shapes-mage                        ADDP, which learns from a trained MAGE
    torchrun --standalone --nproc-per-node 8 train.py ...    the same flags on 8 GPUs

A run is a folder, out/<dataset>-<model> or, with --labels, out/<dataset>-<model>-labels: tokenizer.pt, ids-*.npy, model.pt, log.jsonl,
loss.png, reconstructions.png, samples.png.
"""
import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import shlex
import shutil
import signal
import sys
import time
import zipfile

import numpy
import PIL.Image
import PIL.ImageDraw
import torch
import torch.distributed
import tqdm
from torch.utils.flop_counter import FlopCounterMode

import probe
import unified
from unified import Stopped, UserError, flag

try:
    import fcntl
except ImportError:                                                                         # Windows: nothing keeps a second process out
    fcntl = None


@dataclasses.dataclass
class Config:
    dataset: str = flag("shapes", "shapes, cifar10, imagenet, or a folder of images, of class folders, or of train and val with class folders")
    data_dir: str = flag("", "where the data set lies, if not in data/<dataset>")
    model: str = flag("mage", "what to train; mae, maskdit and dit are the ends of UMD, not the official networks", choices=list(unified.MODELS))
    size: str = flag(None, "size of model and tokenizer; tiny, or base on imagenet",
                       choices=["tiny", "small", "base", "large"])
    image_size: int = flag(None, "side in pixels; 32, or on folders 256, 64 for tiny and small",
                             least=8, most=4096)
    ids: int = flag(None, "ids, or patches of pixels, an image; 16 on shapes (64 of pixels), else 64 below 128 pixels and 256 from "
                            "there on; from 256 pixels on one for 16 x 16 pixels", least=4, most=2**20)
    codes: int = flag(None, "entries of the codebook; 128 on shapes, else 1024", most=2**20)
    steps: int = flag(None, "optimizer steps of the model; or say --epochs")
    epochs: float = flag(None, "the same in passes over the training set", least=1e-9)
    tokenizer_steps: int = flag(None, "optimizer steps of the tokenizer")
    tokenizer_batch_size: int = flag(None, "images in each of them; 16 for small sets and on a CPU, else 256",
                                       most=10**6)
    adversarial: float = flag(None, "weight of the discriminator in the tokenizer's loss; 0.8 from 256 pixels on, else 0",
                                least=0)
    tokenizer: str = flag("", "use this one instead: a run folder (its ids are shared), a tokenizer.pt or a published file")
    predictor: str = flag("", "addp: the trained MAGE it learns from, a run folder (its ids are shared), a checkpoint or a published file")
    views: int = flag(None, "random crops of each image kept as ids; 1 keeps the whole picture, 0 tokenises fresh crops in every step. "
                              "Models of pixels: 0 takes the whole picture, 1 a fresh crop in every step",
                       least=0, most=1000)
    labels: bool = flag(False, "condition on class labels, so that sample.py --label works")
    init: str = flag("", "a run of the same model and size to start from; with --labels, to teach it the classes")
    init_encoder: str = flag("", "a run whose encoder blocks, of the same width, to start from")
    batch_size: int = flag(None, "images an optimizer step, all devices and accumulated micro-batches together",
                             most=10**6)
    micro_batch: int = flag(None, "images that one device computes at once; as many as fit, if not given",
                              most=10**6)
    lr: float = flag(None, "learning rate for 256 images a step; scaled with --batch-size", least=1e-9)
    seed: int = flag(0, "of everything random", least=0, most=2**32 - 1)
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "where to compute")
    dtype: str = flag(None, "of activations; bfloat16 on GPUs that compute in it, else float32",
                        choices=["float32", "bfloat16"])
    compile: bool = flag(torch.cuda.is_available(), "compile the blocks")
    workers: int = flag(min(8, os.cpu_count()), "processes that decode images of a folder",
                          least=0, most=1000)
    strict_images: bool = flag(False, "stop at an unreadable image instead of training on another")
    benchmark: bool = flag(False, "measure the speed of training on random data, and leave")
    out_dir: str = flag("", "the run's folder, if not out/<dataset>-<model>, or -<model>-labels")
    resume: bool = flag(False, "go on where the run in this folder stopped; same flags, more --steps if you like")
    log_every: int = flag(None, "steps between rows of log.jsonl")
    eval_every: int = flag(None, "steps between held-out losses and sample grids; 0 for never", least=0)
    save_every: int = flag(None, "steps between checkpoints")


# Defaults by data set. FOLDER is the papers' recipe: the method's own for the model, see unified.MODELS, and MaskGIT's for the tokenizer.
SHAPES = dict(size="tiny", image_size=32, ids=16, codes=128, steps=3000, batch_size=64, lr=6e-3, views=1, tokenizer_size="toy",
              tokenizer_steps=2000, tokenizer_batch_size=16, tokenizer_lr=4e-3, log_every=50, eval_every=1000, save_every=500)
CIFAR10 = dict(SHAPES, ids=64, codes=1024, steps=4000, views=4, tokenizer_size=None, tokenizer_steps=4500)
FOLDER = dict(size="base", image_size=256, ids=None, codes=1024, views=10, tokenizer_steps=1_000_000,
              tokenizer_lr=1e-4, log_every=20, eval_every=5000, save_every=1000)
SMALL_FOLDER = dict(CIFAR10, image_size=64, ids=None)                                       # with --size tiny or small
RESUME_MAY_CHANGE = {"steps", "epochs", "workers", "device", "log_every", "save_every", "eval_every", "resume"}


def recipe_of(cfg):
    """How cfg.model is trained."""
    method = unified.MODELS[cfg.model]
    return method.tune_recipe or method.recipe if cfg.init and cfg.labels else method.recipe


def settle(cfg):
    """Fill in what was not said on the command line; refuse what cannot be."""
    method = unified.MODELS[cfg.model]
    folder = SMALL_FOLDER if cfg.size in ("tiny", "small") else {**FOLDER, **recipe_of(cfg)["paper"]}
    recipe = {"shapes": SHAPES, "cifar10": CIFAR10}.get(cfg.dataset, folder)
    if cfg.steps and cfg.epochs:
        raise UserError(f"--steps {cfg.steps} and --epochs {cfg.epochs:g} say the same thing twice; give one")
    if (cfg.size or recipe["size"]) == "tiny":
        recipe = {**recipe, **recipe_of(cfg)["tiny"]}
    if not method.tokenizer:
        recipe = {**recipe, "views": 0 if cfg.dataset == "shapes" else 1}
    cfg.image_size = cfg.image_size or recipe["image_size"]
    if cfg.image_size >= 256:
        recipe = {**recipe, "ids": (cfg.image_size // 16) ** 2}
    for name, value in recipe.items():
        if getattr(cfg, name, 0) is None and not (name in ("steps", "epochs") and (cfg.steps or cfg.epochs)):
            setattr(cfg, name, value)
    cfg.ids = cfg.ids or (64 if cfg.image_size < 128 else 256)
    cfg.adversarial = (0.8 if cfg.image_size >= 256 else 0.0) if cfg.adversarial is None else cfg.adversarial
    cfg.tokenizer_batch_size = cfg.tokenizer_batch_size or (256 if cfg.device.startswith("cuda") else 16)    # a CPU takes minutes for 256
    cfg.dtype = cfg.dtype or unified.default_dtype(cfg.device)
    cfg.out_dir = cfg.out_dir or f"out/{pathlib.Path(cfg.dataset).name}-{cfg.model}" + "-labels" * cfg.labels
    teacher = unified.MODELS[cfg.model].predictor
    if teacher and not cfg.predictor:
        data = "" if cfg.dataset == "shapes" else f" --dataset {cfg.dataset}"
        raise UserError(f"{cfg.model} learns from a trained {teacher.upper()}: run python train.py{data} --model {teacher}, then this with "
                        f"--predictor out/{pathlib.Path(cfg.dataset).name}-{teacher}")
    if cfg.labels and not method.model.takes_labels and not teacher:
        raise UserError(f"--labels: {cfg.model} takes none; --model dit or mage do")
    if cfg.predictor and (not teacher or cfg.labels or cfg.tokenizer):
        raise UserError("--predictor belongs to --model addp, and neither --tokenizer, which it brings along, nor --labels go with it")
    cfg.tokenizer = cfg.tokenizer or cfg.predictor
    check_sizes(cfg, method)
    if not method.tokenizer and cfg.views > 1:
        raise UserError(f"{cfg.model} reads one crop of an image, fresh in every step: --views {cfg.views} is for models that read ids; "
                        "take 1, or 0 for no crop")
    if method.views == 2 and cfg.views == 1 and cfg.dataset != "shapes":
        raise UserError(f"{cfg.model} compares two crops of an image; --views 1 keeps one; take 0 or 2 and more")
    if cfg.dataset == "shapes" and method.views == 2:
        cfg.views = max(cfg.views, 4) if cfg.views else 0
    for name in ("tokenizer", "predictor", "init", "init_encoder"):
        path = getattr(cfg, name)
        if not os.path.exists(path or "."):
            raise UserError(f"--{name.replace('_', '-')}: there is no {path}; name a run or a checkpoint")
    if not cfg.benchmark:
        writable(cfg.out_dir, "--out-dir", folder=True)
    return cfg, recipe


def check_sizes(cfg, method):
    """Refuse an --image-size that cannot be halved enough, or that --ids does not cut into equal squares."""
    size, side = cfg.image_size, math.isqrt(cfg.ids)
    if method.reads == "pixels":
        unit = 2 ** (len(method.sizes[cfg.size].get("ch_mult", "1")) - 1)
        if size % unit:
            raise UserError(f"--image-size {size} is no multiple of {unit}, as this --model and --size need; "
                            f"take {size + -size % unit}")
    elif not cfg.tokenizer:
        squares = (2, 4, 8, 16) if method.tokenizer else range(1, size + 1)
        if side ** 2 != cfg.ids or size % side or size // side not in squares:
            unit = 16 if size >= 64 else 4
            fit = [f"--image-size {size + -size % unit} --ids {(-size // unit) ** 2}"] * (size % unit > 0)
            sides = [s for s in reversed(squares) if size % s == 0 and 1 < s <= min(16, size // 2)]
            fit = " or ".join(fit + [f"--ids {(size // s) ** 2}" for s in sides[:3]])
            raise UserError(f"--ids {cfg.ids} does not cut --image-size {size} into equal squares"
                            + " of 2, 4, 8 or 16 pixels" * method.tokenizer + f"; take {fit}")


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


class Run:
    """What every part of a run needs to know: flags, folder, device, place among the processes, and whether to stop."""

    def __init__(self, cfg, recipe):
        self.cfg, self.recipe, self.folder, self.lock = cfg, recipe, pathlib.Path(cfg.out_dir), None
        self.device = unified.join_processes(cfg.device)
        self.rank, self.world = unified.rank_and_world()
        self.autocast = functools.partial(torch.autocast, self.device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")
        if cfg.batch_size % ((cfg.micro_batch or 1) * self.world):
            raise UserError(f"--batch-size {cfg.batch_size} is not a multiple of " + (f"--micro-batch {cfg.micro_batch} x " if cfg.micro_batch else "")
                            + f"{self.world} process{'es' * (self.world > 1)}")

    def tell(self, text):
        """Print, once for all processes."""
        if self.rank == 0:
            tqdm.tqdm.write(text)

    def log(self, **row):
        """One row of log.jsonl."""
        if self.rank == 0:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")

    def rows(self):
        """log.jsonl so far; lines that were cut off or damaged do not count."""
        path, rows = self.folder / "log.jsonl", []
        for line in path.read_bytes().splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):                                       # no UTF-8, no JSON
                rows.append(json.loads(line))
        return [r for r in rows if isinstance(r, dict) and isinstance(r.get("step"), int) and "stage" in r]

    def save(self, name, **state):
        """Write a checkpoint of the run's folder, once for all processes."""
        if self.rank == 0:
            save_checkpoint(self.folder / name, state)

    def micro_batch(self, batch, image_bytes):
        """Images computed at once: what was asked for, else the largest divisor of the batch whose activations fill at most 60 % of the memory."""
        share, rest = divmod(batch, self.world)
        if rest:
            raise UserError(f"a batch of {batch} cannot be shared by {self.world} processes; take a multiple of {self.world}")
        if self.cfg.micro_batch:
            return math.gcd(self.cfg.micro_batch, share)
        memory = torch.cuda.mem_get_info(self.device)[1] if self.device.type == "cuda" else 2 << 30
        return next(m for m in range(share, 0, -1) if share % m == 0 and (m * image_bytes <= 0.6 * memory or m == 1))


def listen():
    """From now on Ctrl-C and SIGTERM only ask for the end: all that runs long looks into unified.SIGNALS before its next step or batch."""
    def ask(number, frame):
        if unified.SIGNALS and time.monotonic() - min(unified.SIGNALS.values()) > 2:                        # not what torchrun merely passes on
            raise KeyboardInterrupt
        unified.SIGNALS.setdefault(number, time.monotonic())
        if unified.rank_and_world()[0] == 0:
            with contextlib.suppress(OSError):                                              # print() might be at work on a line right now
                os.write(2, b"\nstopping after this step or batch; asked once more, at once\n")
    unified.SIGNALS.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)


def open_run(run, train):
    """Make or check the run's folder, and lock it against a second process; from here on a signal asks for a checkpoint first."""
    run.folder.mkdir(parents=True, exist_ok=True)
    run.lock = open(run.folder / ".lock", "w")
    try:
        if fcntl:
            fcntl.flock(run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)                            # it dies with the process
    except OSError:
        raise UserError(f"{run.folder} is in use by another train.py; take another --out-dir")
    if not run.cfg.resume and any(p.name != ".lock" for p in run.folder.iterdir()):
        raise UserError(f"{run.folder} is not empty; --resume goes on with it, --out-dir takes another place")
    for path in (run.folder / "model.pt", run.folder / "tokenizer.pt"):
        if path.exists():
            was, now = unified.load_checkpoint(path)["config"], dataclasses.asdict(run.cfg)
            for name in now.keys() - RESUME_MAY_CHANGE:
                if was.get(name, now[name]) != now[name]:
                    raise UserError(f"this run has --{name.replace('_', '-')} {was[name]}, not {now[name]}; repeat its flags, or take another --out-dir")
            probe.check_same_data(was, train, run.folder, "put them back, or take another --out-dir")
            return


permutation = functools.lru_cache(2)(unified.shuffled)          # a batch may reach from one epoch into the next


def plan(n, seed, views, batch, micro, rank, world, start, steps):
    """Which images, in which crops, each micro-batch of this process holds: yields index (B,), crops (B, views), or None for whole
    pictures if views is 0. All of it follows from the step, so it is the same after an interruption and, taken together, for any number of processes."""
    for step in range(start, steps):
        for first in range(rank * micro, batch, world * micro):
            p = step * batch + first + torch.arange(micro)
            index = torch.cat([permutation(n, seed, e)[p[p // n == e] % n] for e in (p // n).unique().tolist()])
            yield index, unified.hash_ints(seed, p[:, None], torch.arange(views)) if views else None


def cached_batches(ids, labels, plan):
    """Batches of cached ids (N, crops, L), views chosen by the crops' numbers, two of one image never the same: yields (B, V, L), labels."""
    K = ids.size(1)
    for index, crops in plan:
        first = crops[:, :1] % K
        view = torch.cat([first, (first + 1 + crops[:, 1:] % max(1, K - 1)) % K], 1)
        where, view = (unified.to_device(v, ids.device) for v in (index, view))
        found = ids[where[:, None], view].int()
        yield found & 0xFFFF if ids.dtype == torch.int16 else found, labels[index]          # torch has no uint16 that can be indexed


def trainable(net):
    """{name: parameter} of those that learn."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def optimizer_of(net, lr, recipe, fused=True):
    """AdamW as the recipe says, whose plain(name, parameter) tells which parameters do not decay; fused: in one kernel, None: as torch would."""
    groups = {True: [], False: []}
    for name, p in trainable(net).items():
        groups[recipe["no_decay"](name, p)].append(p)
    groups = [{"params": params, "weight_decay": 0.0 if plain else recipe["weight_decay"]} for plain, params in groups.items()]
    return torch.optim.AdamW(groups, lr=lr, betas=recipe["betas"], fused=fused)


def averages(net, recipe):
    """A copy of the weights, {name: tensor}, to be averaged in training; empty if the recipe averages none."""
    return {name: p.detach().clone() for name, p in trainable(net).items()} if recipe["ema"] else {}


@contextlib.contextmanager
def averaged(net, ema):
    """For a while the weights are their average ema, {name: tensor}, if there is one."""
    own = {name: p.detach().clone() for name, p in trainable(net).items()} if ema else {}
    net.load_state_dict(ema or {}, strict=False)
    try:
        yield
    finally:
        net.load_state_dict(own, strict=False)                                              # or a stop in between would save the average


@dataclasses.dataclass
class Stage:
    """One of the two trainings of a run, the tokenizer's or the model's."""
    name: str                       # 'tokenizer' or 'model'; NAME.pt is its checkpoint
    net: torch.nn.Module            # forward(x, labels, ...) -> loss, logs
    arch: dict                      # joins the flags in the checkpoint's config
    batches: callable               # plan -> yields x, labels
    images: int                     # in the training set
    views: int                      # crops of each image in a batch; 0 for the whole picture
    steps: int
    batch: int
    micro: int
    peak: float                     # learning rate
    recipe: dict                    # of unified.MODELS: optimizer, clipping, warm-up, averaging
    extra: callable = lambda step, first: {}            # more arguments of net.forward, for a micro-batch that begins at image first of the batch
    evaluate: callable = lambda: {}                     # -> held-out figures, drawing pictures on the way
    named: callable = "image {}".format                 # number of an image -> what it is called


def save_checkpoint(path, state):
    """Write under a temporary name, flush, keep the previous file as NAME.prev, rename: a crash at any moment leaves a whole one.
    UserError if it cannot be written, for want of room say; then nothing has changed."""
    path = pathlib.Path(path)
    new = path.with_name(path.name + ".tmp")
    try:
        with open(new, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            keep_previous(path, path.with_name(path.name + ".prev"))
        os.replace(new, path)
    except (OSError, RuntimeError) as error:                                                # torch makes a RuntimeError of the file's
        new.unlink(missing_ok=True)
        reason = " ".join(str(error.__context__ or error).split())[:200]
        raise UserError(f"{path} could not be written ({reason}); the last good checkpoint is untouched: make room, then --resume")


def keep_previous(path, previous):
    """The same file under a second name: somebody might be reading it under the first one."""
    previous.unlink(missing_ok=True)
    try:
        os.link(path, previous)
    except OSError:                                                                         # not every file system can
        os.replace(path, previous)


def restore(run, stage, optimizer, ema):
    """Load NAME.pt if it is there, drop the log's rows that came after it, and return the step to go on from."""
    path, step = run.folder / f"{stage.name}.pt", 0
    if path.exists() or path.with_name(path.name + ".prev").exists():
        state = unified.load_checkpoint(path)
        unified.load_strictly(stage.net, state["model"], path)
        optimizer.load_state_dict(state["optimizer"])
        for name, average in ema.items():
            average.copy_(state["ema"][name])
        step = state["step"]
    if run.rank == 0:                                                                       # whole lines only: the last may be cut off
        kept = [json.dumps(r) + "\n" for r in run.rows() if r["stage"] != stage.name or r["step"] <= step]
        write_file(run.folder / "log.jsonl", lambda file: file.write("".join(kept).encode()))
    return step


class Meter:
    """Progress bar and log of one stage. Losses add up on the device and are read once a log interval."""

    def __init__(self, run, stage, step):
        self.run, self.stage, self.logs, self.since, self.seen = run, stage, {}, time.time(), step
        self.started, self.first, self.skipped, self.in_a_row = None, step, 0, 0            # the last two: steps without a finite gradient
        self.bar = tqdm.tqdm(total=stage.steps, initial=step, desc=stage.name, unit=" steps", disable=run.rank > 0, dynamic_ncols=True)

    def add(self, loss, logs):
        """Losses of one micro-batch: scalars on the device."""
        for name, value in {"loss": loss, **logs}.items():
            (total, count), value = self.logs.get(name, (0, 0)), value.detach()
            self.logs[name] = total + value.nan_to_num(0, 0, 0), count + value.isfinite()

    def step(self, step, norm, lr, ema):
        """One optimizer step is done: write a row, evaluate, if it is time to. norm: of the gradient; ema: averaged weights."""
        self.bar.update()
        bad = ~norm.isfinite()
        self.skipped, self.in_a_row = self.skipped + bad, (self.in_a_row + 1) * bad         # on the device: nothing waits
        self.warn(step)
        if step % self.run.cfg.log_every == 0 or step == self.stage.steps:
            means = self.check(step)
            rate = (step - self.seen) * self.stage.batch / (time.time() - self.since)
            memory = torch.cuda.max_memory_allocated(self.run.device) / 2**30 if self.run.device.type == "cuda" else None
            norm = norm.item()
            self.run.log(stage=self.stage.name, step=step, **means, lr=lr, grad_norm=norm if math.isfinite(norm) else None,
                         images_per_second=rate, memory_gib=memory)
            self.bar.set_postfix(loss=f"{means['loss']:.4f}", images=f"{rate:.0f}/s", refresh=False)
            self.logs, self.since, self.seen = {}, time.time(), step
        every = self.run.cfg.eval_every
        if every and (step % every == 0 or step == self.stage.steps):
            if self.run.rank == 0:
                self.evaluate(step, ema)
            self.since, self.seen = time.time(), step

    def evaluate(self, step, ema):
        """Held-out figures and images, unless a signal asks for the end meanwhile: the step itself is saved then."""
        self.stage.net.eval()
        with contextlib.suppress(Stopped), averaged(self.stage.net, ema):
            self.run.log(stage=self.stage.name, step=step, **self.stage.evaluate())
        self.stage.net.train()

    def warn(self, step):
        """Say once, after the first steps, of which the very first is no measure, if all would take more than a day."""
        done, now = step - self.first, time.time()
        if done == 1:
            self.started = now
        if done == 4:
            days = (self.stage.steps - step) * (now - self.started) / 3 / 86400
            if days > 1:
                tokens = "--tokenizer-steps, --tokenizer-batch-size" if self.stage.name == "tokenizer" else "--steps, --batch-size"
                self.run.tell(f"at this pace the {self.stage.name} takes {days:.0f} more days; {tokens}, --size tiny or --image-size 64 shorten that")

    def check(self, step):
        """Mean of what was added, over all processes, of which some may lack a term. Steps whose gradient was not finite have moved no weight;
        they are told, and several in a row end the run here, before it is saved."""
        names = [list(self.logs)]
        if self.run.world > 1:
            names = [None] * self.run.world
            torch.distributed.all_gather_object(names, list(self.logs))
        names = list(dict.fromkeys(itertools.chain(*names)))                                # those of all, in the same order everywhere
        sums = torch.zeros(len(names), 2, device=self.run.device)
        for row, name in zip(sums, names):
            row[0], row[1] = self.logs.get(name, (0, 0))
        if self.run.world > 1:
            torch.distributed.all_reduce(sums)
        means = dict(zip(names, (sums[:, 0] / sums[:, 1]).tolist()))
        skipped, in_a_row = int(self.skipped), int(self.in_a_row)
        if skipped and (in_a_row >= 5 or in_a_row == step - self.first):
            names = to_blame(self.run, self.stage, step)
            raise UserError(f"the loss or its gradient is not finite, {in_a_row} steps in a row up to step {step}; {self.run.folder} keeps the last good "
                            "checkpoint; " + (f"{', '.join(names)} alone {'does' if len(names) == 1 else 'do'} that: take it out" if names else
                                              "a lower --lr may help, or another --seed"))
        if skipped:
            self.run.tell(f"{skipped} of the steps up to {step} were skipped: their gradient was not finite")
            self.skipped = 0
        return means


def to_blame(run, stage, step):
    """Names of the images, at most three, whose gradient alone is not finite; none if that of every image of the step is not."""
    found, batch, images = [], plan(stage.images, run.cfg.seed, stage.views, stage.batch, stage.micro, run.rank, run.world, step - 1, step), 0
    for index, crops in batch:
        alone = [(index[i:i + 1], None if crops is None else crops[i:i + 1]) for i in range(len(index))]
        for i, (x, labels) in zip(index.tolist(), stage.batches(alone)):
            x, labels, images = unified.to_device(x, run.device), unified.to_device(labels, run.device), images + 1
            with run.autocast():
                loss, _ = stage.net(x.squeeze(1) if stage.views == 1 else x, labels if run.cfg.labels else None)
            gradients = torch.autograd.grad(loss, trainable(stage.net).values(), allow_unused=True)
            if not all(g.isfinite().all() for g in gradients if g is not None):
                found.append(stage.named(i))
    return found[:3] if len(found) < images else []


def update(run, stage, net, optimizer, weights, ema, step, batches, add):
    """One optimizer step over as many micro-batches as make a batch: add(loss, logs) is told the losses of each; nothing here waits for
    the device. Returns the gradient's norm, still there, and the learning rate."""
    accumulate, recipe = stage.batch // (stage.micro * run.world), stage.recipe
    rate = probe.learning_rate(step + 1, recipe["warmup"] * stage.steps, stage.steps + 1, stage.peak, recipe["min_lr"] * stage.peak)
    for micro in range(accumulate):
        x, labels = next(batches)
        place = micro * run.world + run.rank
        torch.manual_seed(unified.hash_ints(run.cfg.seed, len(stage.name), step, place))
        with contextlib.nullcontext() if micro == accumulate - 1 or run.world == 1 else net.no_sync():
            with run.autocast():
                x, labels = (unified.to_device(v, run.device) for v in (x, labels))
                loss, logs = net(x.squeeze(1) if stage.views == 1 else x, labels if run.cfg.labels else None,
                                 **stage.extra(step, place * stage.micro))
            (loss / accumulate).backward()
        add(loss, logs)
    norm = torch.nn.utils.clip_grad_norm_(weights.values(), recipe["grad_clip"])
    if optimizer.defaults["fused"]:                                                         # as torch's GradScaler says it: then no weight moves
        optimizer.grad_scale, optimizer.found_inf = None, (~norm.isfinite()).float()
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if ema:                                                                                 # follows faster at first, or it would show the start
        torch._foreach_lerp_(list(ema.values()), list(weights.values()), 1 - min(recipe["ema"], (2 + step) / (11 + step)))
    return norm, rate


def fit(run, stage):
    """Train stage.net from its checkpoint, or from the start, to its last step; leave the finished checkpoint behind."""
    cfg, net = run.cfg, stage.net.to(run.device)
    optimizer = optimizer_of(net, stage.peak, stage.recipe)
    weights = trainable(net)
    ema = averages(net, stage.recipe)
    step = restore(run, stage, optimizer, ema)
    if cfg.compile:
        probe.compile_blocks(net)
    ddp = torch.nn.parallel.DistributedDataParallel(net, find_unused_parameters=stage.name == "tokenizer" or bool(cfg.init)) if run.world > 1 else net
    batches = stage.batches(plan(stage.images, cfg.seed, stage.views, stage.batch, stage.micro, run.rank, run.world, step, stage.steps))
    meter = Meter(run, stage, step)
    net.train()

    def save():
        run.save(f"{stage.name}.pt", model=net.state_dict(), ema=ema, optimizer=optimizer.state_dict(), stage=stage.name, step=step,
                 config={**dataclasses.asdict(cfg), **stage.arch})
    while step < stage.steps:
        try:
            norm, rate = update(run, stage, ddp, optimizer, weights, ema, step, batches, meter.add)
        except UserError:                                                                   # an image or a worker: no weight has moved yet
            if step:
                save()
            raise
        step += 1
        meter.step(step, norm, rate, ema)
        stop = unified.asked_to_stop()
        if step % cfg.save_every == 0 or step == stage.steps or stop:
            meter.check(step)
            save()
        if stop and step < stage.steps:
            raise Stopped(f"at step {step} of the {stage.name}")
    net.eval()
    return ema


# What the run does with these: the tokenizer, the model, and what is shown of them.


def measure_tokenizer(run, vqgan, data, count):
    """PSNR over all pixels, in dB, and the share of codes used, on count pictures."""
    vqgan.eval()
    used = torch.zeros(vqgan.quantize.embedding.num_embeddings, dtype=torch.bool)

    def squared_error(x):
        with run.autocast():
            y, ids = vqgan.reconstruct(x)
        used[ids.unique().cpu()] = True
        return (y - x).square().mean((1, 2, 3))
    error, _ = probe.map_images(squared_error, data, count, workers=run.cfg.workers, device=run.device, name="PSNR" if count > 1000 else None)
    return {"psnr": -10 * math.log10(error.mean().item()), "codes_used": used.float().mean().item()}


def draw_reconstructions(run, reconstruct, data):
    """reconstructions.png: at most 32 test pictures, each row of originals above the rows that reconstruct(x) makes of them."""
    x, _ = probe.map_images(lambda x: x, data, 32, workers=run.cfg.workers)
    torch.manual_seed(0)
    with run.autocast():
        columns = [x, *(y.cpu() for y in reconstruct(x.to(run.device)))]
    rows = [part for rows in zip(*(c.split(8) for c in columns)) if len(rows[0]) == min(8, len(x)) for part in rows]
    unified.image_grid(torch.cat(rows)).save(run.folder / "reconstructions.png")


TOKENIZER_RECIPE = dict(unified.MAGE_RECIPE, betas=(0.9, 0.99), weight_decay=0.0)


def get_frozen(run, train, test):
    """What the model is built on, and its config: the MAGE named by --predictor, or the tokenizer named by --tokenizer, or one trained here."""
    cfg = run.cfg
    if cfg.predictor:
        predictor, config = unified.load_model(cfg.predictor, tell=run.tell)
        if type(predictor) is not unified.MAGE or predictor.image_size != cfg.image_size:
            raise UserError(f"--predictor {cfg.predictor} holds {config['arch']['model']} at --image-size {predictor.image_size}; "
                            f"{cfg.model} needs mage at --image-size {cfg.image_size}")
        return predictor, config["arch"]
    if cfg.tokenizer:
        vqgan, arch = unified.load_tokenizer(cfg.tokenizer)
        if cfg.image_size % vqgan.stride:
            raise UserError(f"--tokenizer {cfg.tokenizer} needs an --image-size that is a multiple of {vqgan.stride}, not {cfg.image_size}")
        return vqgan.to(run.device), arch
    torch.manual_seed(cfg.seed)
    arch = unified.tokenizer_config(run.recipe.get("tokenizer_size") or cfg.size, cfg.image_size // math.isqrt(cfg.ids), cfg.codes)
    net = unified.TokenizerTraining(unified.VQGAN(**arch))
    batch, steps = cfg.tokenizer_batch_size, cfg.tokenizer_steps

    def evaluate():
        draw_reconstructions(run, lambda x: net.vqgan.reconstruct(x)[:1], test)
        return measure_tokenizer(run, net.vqgan, test, 500)
    bytes_each = 8 * cfg.image_size ** 2 * arch["ch"] * arch["blocks"] * 12
    views = 0 if isinstance(train, unified.ImageTensor) else 1                                 # enlarged crops of 32 pixels are all blur
    fit(run, Stage("tokenizer", net, {"tokenizer_arch": arch, **probe.describe_data(train)}, lambda plan: train.batches(plan, cfg.workers), len(train), views, steps, batch,
                   run.micro_batch(batch, bytes_each), run.recipe["tokenizer_lr"], TOKENIZER_RECIPE,
                   lambda step, first: {"adversarial_weight": cfg.adversarial * (step >= steps // 5)}, evaluate, name_of(train)))
    return net.vqgan, arch


def name_of(data):
    """What its images are called: number -> path, or "image 17"."""
    return (lambda i: unified.shown(data.paths[i])) if isinstance(data, unified.ImageFolder) else "image {}".format


# Ids on disk. Tokenising costs more than a small model's whole training step, so every image is tokenised once, in V crops. The work is
# cut into shards, each a file of its own, so that any number of processes can share it, on machines that share a disk too, and any other
# number can go on with it. No file is ever changed: each is written under another name and renamed, and its name says what it depends on.

SHARD = 2048                        # images


def fingerprint(vqgan, data, views):
    """What ids depend on, as one hexadecimal word: the tokenizer, the images (of files name, size and time of change), their crops."""
    digest = hashlib.sha256(repr((views, data.size, data.scale, len(data))).encode())
    if isinstance(data, unified.ImageFolder):
        images = map(functools.partial(file_mark, data.root), data.paths)
    else:
        images = (part.cpu().numpy().tobytes() for part in data.images.split(1000))
    weights = (p.detach().cpu().numpy().tobytes() for p in vqgan.parameters())
    for part in itertools.chain(weights, images, [data.labels.numpy().tobytes()]):
        digest.update(part)
    return digest.hexdigest()[:16]


def file_mark(root, path):
    """Bytes that tell a file from another one, and from itself after a change."""
    with contextlib.suppress(OSError):
        stat = path.stat()
        return b"%s %d %d\n" % (os.fsencode(path.relative_to(root)), stat.st_size, stat.st_mtime_ns)
    return os.fsencode(path.relative_to(root))                                              # a link to nowhere, say


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


def read_shard(path):
    """Ids (m, V, L) and labels (m,) of the images that are done, in lists of one; empty lists if the file is damaged or not there."""
    try:
        with numpy.load(path) as shard:
            return [shard["ids"]], [shard["labels"]]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return [], []


def make_shards(shards, vqgan, data, views, workers):
    """Complete shards, [(path, the images it holds: int (m,)), ...], as far as they are this process's; ends after the next batch if asked to."""
    code = numpy.uint16 if len(vqgan.quantize.embedding.weight) <= 2**16 else numpy.int32
    device = next(vqgan.parameters()).device
    todo = [(path, index[sum(map(len, read_shard(path)[1])):]) for path, index in probe.local_shard(shards)]
    todo = [(path, index.split(max(1, probe.images_at_once(data, device) // views))) for path, index in todo if len(index)]
    plan = [(part, None if views == 1 else unified.hash_ints(part[:, None], torch.arange(views))) for _, parts in todo for part in parts]
    bar = tqdm.tqdm(total=len(plan), desc="ids of every image", unit=" batches", disable=unified.rank_and_world()[0] > 0 or not plan, dynamic_ncols=True)
    batches = data.batches(plan, workers)
    for path, parts in todo:
        (ids, labels), saved = read_shard(path), time.monotonic()
        for left in reversed(range(len(parts))):
            x, y = next(batches)
            with torch.no_grad():
                found = vqgan.encode(x.flatten(0, -4).to(device))                           # (B * V, h, w)
            ids.append(found.cpu().numpy().astype(code).reshape(len(y), views, -1))
            labels.append(y.numpy())
            bar.update()
            if not left or unified.SIGNALS or time.monotonic() - saved > 60:
                done, saved = {"ids": numpy.concatenate(ids), "labels": numpy.concatenate(labels)}, time.monotonic()
                write_file(path, lambda file: numpy.savez(file, **done))
            if unified.SIGNALS:
                return


def join_shards(shards, ids_path, labels_path, shape):
    """One file of the ids of all shards, shape (N, V, L), and before it one of their labels: when the ids are there, so is everything."""
    def write(file):
        labels = []
        for path, index in shards:
            ids, found = read_shard(path)
            if sum(map(len, found)) != len(index):
                raise UserError(f"{path} was lost while ids were made; start again with --resume")
            if not labels:
                numpy.lib.format.write_array_header_1_0(file, {"descr": ids[0].dtype.str, "fortran_order": False, "shape": shape})
            file.write(ids[0].tobytes())
            labels += found
        write_file(labels_path, lambda file: numpy.save(file, numpy.concatenate(labels)))
    if not ids_path.exists():                                                               # else another run was faster
        write_file(ids_path, write)
    shutil.rmtree(shards[0][0].parent, ignore_errors=True)


def cache_ids(folder, vqgan, data, views, workers=0):
    """Ids of every image, (N, V, L), mapped from folder/ids-<fingerprint>.npy, and the labels (N,) that belong to them.

    views  V crops of each image; 1 means the whole picture.
    Finished ids of the same tokenizer, data and crops are read, unfinished ones continued; processes share the work, runs may share the
    folder. uint16, or int32 where the codebook has more codes than that counts. Raises Stopped if a signal asks for the end.
    """
    mark = unified.rank_zero_first(lambda: fingerprint(vqgan, data, views))
    ids, labels = (pathlib.Path(folder) / f"{name}-{mark}.npy" for name in ("ids", "labels"))
    if not unified.rank_zero_first(ids.exists):
        shards = [(ids.with_suffix("") / f"{k:06d}.npz", index) for k, index in enumerate(torch.arange(len(data)).split(SHARD))]
        make_shards(shards, vqgan, data, views, workers)
        if unified.asked_to_stop():
            raise Stopped("while ids were made")
        unified.rank_zero_first(lambda: join_shards(shards, ids, labels, (len(data), views, (data.size // vqgan.stride) ** 2)))
    try:
        return numpy.load(ids, mmap_mode="c"), torch.from_numpy(numpy.load(labels))
    except (OSError, ValueError) as error:
        raise UserError(f"{ids} and its labels cannot be read ({error}); delete them, and they are made anew")


def get_ids(run, vqgan, train):
    """plan -> batches of the model's training: pixels, to be tokenised in every step if the model wants ids (--views 0), or cached ids."""
    cfg = run.cfg
    if cfg.views == 0 or vqgan is None:
        return lambda plan: train.batches(plan, cfg.workers)
    shared = pathlib.Path(cfg.tokenizer)
    folder = shared if cfg.tokenizer and shared.is_dir() and os.access(shared, os.W_OK) else run.folder
    ids, labels = cache_ids(folder, vqgan, train, cfg.views, cfg.workers)
    ids = torch.from_numpy(ids.view("int16") if ids.dtype == numpy.uint16 else ids)
    if run.device.type == "cuda" and ids.nbytes < torch.cuda.mem_get_info(run.device)[0] / 4:
        ids = ids.to(run.device)
    return lambda plan: cached_batches(ids, labels, plan)


def start_from(run, model):
    """Weights of other runs, as --init and --init-encoder ask. What only labels need starts afresh."""
    for path, wanted in ((run.cfg.init, ("",)), (run.cfg.init_encoder, (*model.stem, "blocks"))):
        if path:
            there, ours = unified.load_model(path)[0].state_dict(), model.state_dict()
            state = {k: v for k, v in there.items() if k.startswith(wanted) and k in ours and v.shape == ours[k].shape}
            fresh = [k for k in ours if k not in state]
            lost = [k for k in fresh if k.startswith(wanted) and not k.startswith("label_embed")]
            if not state or (path == run.cfg.init and lost):
                raise UserError(f"{path} does not fit --model {run.cfg.model} --size {run.cfg.size}: it has no {(lost or ['encoder block'])[0]} of this shape")
            model.load_state_dict(state, strict=False)
            run.tell(f"{len(state)} tensors from {path}; fresh: {', '.join(sorted({k.split('.')[0] for k in fresh})) or 'none'}")


def image_bytes(cfg, model):
    """Memory that one image takes in a training step, roughly."""
    return sum(60 * c * h * w for c, h, w in model.layers.values()) * (2 if cfg.dtype == "float32" else 1) * unified.MODELS[cfg.model].views


def get_model(run, frozen, arch, train, test):
    """The trained model, and its averaged weights, if it has any. frozen: the tokenizer or predictor it is built on, and arch its config."""
    cfg, method = run.cfg, unified.MODELS[run.cfg.model]
    torch.manual_seed(cfg.seed + 1)
    arch = unified.model_config(cfg.model, cfg.size, cfg.image_size, math.isqrt(cfg.ids), arch, len(train.classes) if cfg.labels else 0,
                                tune=bool(cfg.init and cfg.labels))
    model = unified.build(arch)
    if frozen:
        (model.token_predictor if method.predictor else model.vqgan).load_state_dict(frozen.state_dict())
    start_from(run, model)
    model.to(run.device)
    steps = cfg.steps or math.ceil(cfg.epochs * len(train) / cfg.batch_size)
    micro = run.micro_batch(cfg.batch_size, image_bytes(cfg, model))
    peak = cfg.lr * cfg.batch_size / 256
    run.tell(f"{cfg.model} {cfg.size}: {sum(p.numel() for p in trainable(model).values()):,} parameters, "
             f"{model.length or 'no'} tokens an image, {steps} steps of {cfg.batch_size} ({micro} at once), learning rate {peak:.2g}"
             + (f"; the loss starts near ln {model.codes} = {math.log(model.codes):.2f}" if method.tokenizer else ""))
    if method.views == 2 and micro * run.world < cfg.batch_size:
        run.tell(f"the contrastive term compares {micro * run.world} of the {cfg.batch_size} images with each other: those computed at once")
    held_out = functools.cache(lambda: probe.map_images(model.to_ids if method.tokenizer else lambda x: x, test, 512, workers=cfg.workers,
                                                            device=run.device))             # read by the first process, when it evaluates

    def evaluate():
        draw_what_it_does(run, model, test, steps=None if method.tokenizer else 20)
        held, labels = held_out()
        torch.manual_seed(0)
        parts = zip(held.to(run.device).split(16), labels.to(run.device).split(16))         # each draws a hidden share of its own
        with torch.no_grad(), run.autocast():
            return {"held_out": torch.stack([model(x, y if cfg.labels else None)[0] for x, y in until_asked(parts)]).mean().item()}
    ema = fit(run, Stage("model", model, {"arch": arch, **probe.describe_data(train)}, get_ids(run, model.tokenizer, train), len(train),
                         method.views if method.tokenizer else cfg.views, steps, cfg.batch_size, micro, peak, recipe_of(cfg),
                         lambda step, first: model.micro_batch_args(first, micro), evaluate, name_of(train)))
    return model, ema


def draw_what_it_does(run, model, test, steps=None):
    """samples.png, if the model can start from nothing; reconstructions.png, if it rebuilds what is hidden of a picture."""
    if model.generates:
        unified.image_grid(sample_grid(run, model, steps)).save(run.folder / "samples.png")
    if model.reconstructs and not model.tokenizer:
        draw_reconstructions(run, model.reconstruct, test)


def sample_grid(run, model, steps, n=64):
    """n pictures of fixed seeds; with labels, a column a class."""
    labels = {"labels": torch.arange(n, device=run.device) % 8 % model.classes} if run.cfg.labels else {}
    with run.autocast():
        for state in until_asked(model.sample_steps(n, **({"steps": steps} if steps else {}), **labels)):
            pass
        return model.render(state).float().cpu()


def until_asked(items):
    """The items, until a signal asks for the end."""
    for item in items:
        if unified.SIGNALS:
            raise Stopped("while results were drawn")
        yield item


def line_chart(curves, title, size=(900, 500)):
    """Line chart as a PIL image. curves: {name: [(x, y), ...]}, drawn on one scale, logarithmic where y grows tenfold, with its extremes
    written at the axes. Curves of few points have dots."""
    image = PIL.Image.new("RGB", size, "white")
    draw, points = PIL.ImageDraw.Draw(image), [p for curve in curves.values() for p in curve if math.isfinite(p[1])]
    left, top, right, bottom = 70, 40, size[0] - 20, size[1] - 40
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points)) if points else ((0, 1), (0, 1))
    scale, middle = (math.log, math.sqrt(y0 * y1)) if 0 < 10 * y0 < y1 else (float, (y0 + y1) / 2)
    draw.rectangle((left, top, right, bottom), outline="gray")
    draw.text((left, 12), title + ", logarithmic" * (scale is math.log), fill="black")
    for value, height in ((y0, bottom - 10), (middle, (top + bottom) / 2 - 6), (y1, top)):
        draw.text((8, height), f"{value:.4g}", fill="black")
    draw.text((left, bottom + 8), f"{x0:g}", fill="black")
    draw.text((right - 50, bottom + 8), f"{x1:g}", fill="black")
    for i, (name, curve) in enumerate(curves.items()):
        color = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")[i % 5]
        line = [(left + (x - x0) / max(x1 - x0, 1e-9) * (right - left),
                 bottom - (scale(y) - scale(y0)) / max(scale(y1) - scale(y0), 1e-9) * (bottom - top)) for x, y in curve if math.isfinite(y)]
        draw.line(line, fill=color, width=2)
        for x, y in line if len(line) < 20 else ():
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=color)
        draw.text((left + 200 + 150 * i, 12), name, fill=color)
    return image


def stack_images(images):
    """PIL images of one width, below each other."""
    sheet = PIL.Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)), "white")
    for k, image in enumerate(images):
        sheet.paste(image, (0, sum(i.height for i in images[:k])))
    return sheet


def draw_losses(run):
    """loss.png: training and held-out loss of both stages."""
    rows = run.rows()
    for stage in ("tokenizer", "model"):
        rows_of = {name: [r for r in rows if r["stage"] == stage and name in r] for name in ("loss", "held_out")}
        curves = {name: [(r["step"], r.get("masked", r[name])) for r in found] for name, found in rows_of.items()}     # of MAGE-C without the contrast
        curves = {name: curve for name, curve in curves.items() if curve}
        if curves:
            yield line_chart(curves, f"{stage}: loss by step")


def report(run, model, ema, train, test):
    """What has been learned, in figures and pictures, and what to type next."""
    cfg, vqgan = run.cfg, model.tokenizer
    figures = measure_tokenizer(run, vqgan, test, len(test)) if vqgan else {}
    with averaged(model, ema):
        draw_what_it_does(run, model, test, steps=None if unified.MODELS[cfg.model].tokenizer else 25)
    stack_images(list(draw_losses(run))).save(run.folder / "loss.png")
    top1 = closing_probe(run, model, ema, train, test) if len(train.classes) > 1 and len(train) >= 20 and test.unseen else {}
    run.log(stage="report", step=0, **figures, probe=top1)
    for data, fate in ((train, "another took its place"), (test, "left out")):
        if data.unreadable:
            run.tell(f"{len(data.unreadable)} images of {unified.shown(data.root)} cannot be read: {fate}")
    if vqgan:
        run.tell(f"\ntokenizer   {figures['psnr']:.2f} dB PSNR on {len(test)} test pictures, {figures['codes_used']:.0%} of the codes used")
    made = ", ".join(f"{run.folder}/{name}.png" for name in ("samples", "reconstructions", "loss") if (run.folder / f"{name}.png").exists())
    run.tell(f"pictures    {made}")
    if top1:
        run.tell(f"linear probe (ridge, {min(len(train), 10_000)} training pictures), accuracy on the test set")
        for name, title in (("features", "features of this model"), ("the same network untrained",) * 2, ("raw pixels",) * 2):
            run.tell(f"    {top1[name]:6.1%}  {title}")
    else:
        run.tell("no probe: it takes two classes, 20 images to train on, and others to test on")
    folder = shlex.quote(str(run.folder))
    run.tell("next")
    if model.generates:
        run.tell(f"    python sample.py {folder} --n 64 --gif                 more pictures, and how they come about")
    run.tell(f"    python probe.py {folder} --head knn                    other ways to read the features\n" if top1 else "")


def closing_probe(run, model, ema, train, test):
    """{what is read: accuracy on the test set} by ridge regression, of the model, of the same network untrained, and of pixels."""
    cfg, top1 = run.cfg, {}
    fresh = unified.build(unified.load_checkpoint(run.folder / "model.pt")["config"]["arch"]).to(run.device).eval()
    if model.tokenizer:
        fresh.vqgan.load_state_dict(model.vqgan.state_dict())
    torch.manual_seed(0)
    for name, embed in (("features", model.embed), ("the same network untrained", fresh.embed), ("raw pixels", probe.pixel_vectors)):
        with averaged(model, ema if recipe_of(cfg)["probe_ema"] else {}):
            parts = [probe.map_images(embed, data, 10_000, workers=cfg.workers, device=run.device, name=name) for data in (train, test)]
        top1[name] = probe.ridge_probe(*parts[0], *parts[1])
    return top1


# How fast it is: --benchmark. Rates are of whole steps, optimizer included, on random data; operations are those of the model, counted once.


def count_operations(model, function):
    """Floating-point operations that function(model) takes, found on a copy of the model that computes nothing."""
    with FlopCounterMode(display=False) as counter:
        function(copy.deepcopy(model).to("meta"))
    return counter.get_total_flops()


def seconds_of(device, function, least=1.5):
    """Seconds a call of function(), over at least so many seconds of calls, after a few that do not count."""
    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()
    for _ in range(10 if device.type == "cuda" else 1):
        function()
    wait()
    calls, started = 0, time.perf_counter()
    while not calls or time.perf_counter() - started < least:
        for _ in range(50 if device.type == "cuda" else 1):
            function()
            calls += 1
        wait()
    return (time.perf_counter() - started) / calls


def machine_rates(device, dtype):
    """What the device can do, measured now: a large matrix product, in operations a second, and a copy, in bytes read and written a second."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n * n, device=device)
    return 2 * n ** 3 / seconds_of(device, lambda: a @ a, 0.5), 2 * b.nbytes / seconds_of(device, b.clone, 0.5)


def write_out_attention(model):
    """From now on the readable equation instead of the fused kernel, in transformer blocks."""
    for module in model.modules():
        if isinstance(module, unified.Attention):
            module.fused = False


def step_operations(model, x):
    """Floating-point operations of a training step on a batch like x; of making ids only the encoder's convolutions count, as in the papers."""
    def step(model):
        ids = x.to("meta")
        if model.tokenizer and x.is_floating_point():
            z = model.vqgan.encoder(ids.flatten(0, -4))
            ids = z[:, 0].flatten(1).long().view(*x.shape[:-3], -1)
        model(ids)[0].backward()
    return count_operations(model, step)


def benchmark(run):
    """Print the speed of training: of this model as train.py runs it, on ids made in every step too if it reads ids, and as plain as
    can be: float32, attention written out, nothing compiled or fused, and a wait for the device in every step. All are measured five times,
    in turn, since the speed of a machine drifts: the figures are medians."""
    cfg, method = run.cfg, unified.MODELS[run.cfg.model]
    stride = cfg.image_size // math.isqrt(cfg.ids)
    torch.manual_seed(cfg.seed)
    tokenizer = unified.tokenizer_config(run.recipe.get("tokenizer_size") or cfg.size, stride, cfg.codes) if method.tokenizer else None
    model = unified.build(unified.model_config(cfg.model, cfg.size, cfg.image_size, math.isqrt(cfg.ids), tokenizer)).to(run.device)
    batch = cfg.micro_batch or run.micro_batch(cfg.batch_size, image_bytes(cfg, model))
    pixels = torch.rand(batch, method.views, 3, cfg.image_size, cfg.image_size, device=run.device)
    paths = {"pixels": (pixels, False), "pixels, plain path": (pixels, True)}
    if method.tokenizer:
        ids = torch.randint(model.codes, (batch, method.views, model.length), device=run.device)
        paths = {"cached ids": (ids, False), "cached ids, plain path": (ids, True), "ids made in every step": (pixels, False)}
    yardstick = torch.float32 if run.device.type == "cpu" else getattr(torch, cfg.dtype)     # most CPUs only emulate bfloat16
    steps, turns = {}, []
    for title, (x, plain) in paths.items():
        steps[title] = training_step(run, copy.deepcopy(model), x, method, plain)
        if run.device.type == "cuda" and len(steps) == 1:
            print(f"memory at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    for _ in tqdm.tqdm(range(5), "measuring", leave=False):
        turns.append((*machine_rates(run.device, yardstick), *(seconds_of(run.device, s[0]) for s in steps.values())))
    product, copying, *seconds = numpy.array(turns).T                                       # (5,) each
    print(f"{cfg.model} {cfg.size}, {cfg.image_size} pixels, {batch} images a step, {cfg.dtype} on {run.device}"
          f"\nmeasured here: {str(yardstick)[6:]} matrix product {numpy.median(product) / 1e12:.3g} TFLOP/s, copy {numpy.median(copying) / 1e9:.3g} GB/s")
    for took, (title, (_, loss, start)) in zip(seconds, steps.items()):
        rate = step_operations(model, paths[title][0].squeeze(1)) / took
        print(f"{title:24s} {numpy.median(batch / took):8.1f} images/s +- {numpy.ptp(took) / 2 / numpy.median(took):.0%}  "
              f"{numpy.median(rate) / 1e12:8.3f} TFLOP/s  {numpy.median(rate / product):4.0%} of the product  loss {loss:.4f}  ready after {start:.1f} s")
    print("; ".join(f"{title}: {numpy.median(took / seconds[0]):.2f} times as long" for took, title in zip(seconds[1:], [*steps][1:])))
    if cfg.dataset != "shapes":
        try:
            print(f"images of {cfg.dataset}, read and cropped by {cfg.workers} workers: {reading_rate(cfg, batch, method.views):.1f} images/s")
        except UserError as error:
            print(f"reading was not measured: {error}")


def reading_rate(cfg, batch, views):
    """Images a second that the data set hands over: in memory, or decoded by worker processes."""
    data = unified.open_data(cfg.dataset, cfg.data_dir, cfg.image_size, True, cfg.device, cfg.strict_images, recipe_of(cfg)["min_crop"])
    batches = data.batches(plan(len(data), cfg.seed, views, batch, batch, 0, 1, 0, 10**6), cfg.workers)
    return batch / seconds_of(torch.device("cpu"), lambda: next(batches)[0].flatten()[0].item(), 5.0)       # .item(): wait for it


def training_step(run, model, x, method, plain):
    """A function that does one optimizer step on the batch x, the loss before any, on draws that are the same for every path, and the
    seconds that both take at first, compilation included. plain: see benchmark()."""
    stage = Stage("model", model.train(), {}, None, len(x), method.views, 10**6, len(x), len(x), 1e-4, method.recipe,
                  lambda step, first: model.micro_batch_args(first, len(x)))
    run = copy.copy(run)
    run.world = 1
    if plain:
        run.autocast = contextlib.nullcontext
        write_out_attention(model)
    elif run.cfg.compile:
        probe.compile_blocks(model)
    optimizer, weights = optimizer_of(model, stage.peak, method.recipe, None if plain else True), trainable(model)
    ema, labels = averages(model, method.recipe), torch.zeros(len(x), dtype=torch.long)
    started = time.perf_counter()
    torch.manual_seed(0)
    with torch.no_grad(), run.autocast():
        loss = model.eval()(x.squeeze(1), **stage.extra(0, 0))[0].item()
    model.train()

    def step():
        return update(run, stage, model, optimizer, weights, ema, 0, itertools.repeat((x, labels)), lambda loss, logs: loss.item() if plain else None)
    step()[0].item()                                                                        # .item(): wait for it
    return step, loss, time.perf_counter() - started


def main():
    cfg, recipe = settle(unified.parse_flags(Config, __doc__.split("\n")[0]))
    code, run = 0, Run(cfg, recipe)
    if cfg.benchmark:
        return benchmark(run)
    try:
        train, test = (unified.open_data(cfg.dataset, cfg.data_dir, cfg.image_size, part, run.device, cfg.strict_images, recipe_of(cfg)["min_crop"])
                       for part in (True, False))
        if train.summary:
            run.tell(train.summary)
        if cfg.labels and not train.classes:
            raise UserError(f"--labels: {unified.shown(train.root)} has no class folders")
        unified.rank_zero_first(lambda: open_run(run, train))
        listen()
        model, ema = get_model(run, *(get_frozen(run, train, test) if unified.MODELS[cfg.model].tokenizer else (None, None)), train, test)
        unified.leave_processes()                                                           # nobody need wait for the report
        if run.rank == 0:
            report(run, model, ema, train, test)
    except torch.OutOfMemoryError:
        raise UserError(f"out of memory; try --micro-batch {max(1, (cfg.micro_batch or cfg.batch_size // run.world) // 2)}")
    except Stopped as where:                                                                # all processes are here
        run.tell(f"stopped {where}; everything is saved, --resume goes on")
        code = 128 + next(iter(unified.SIGNALS), signal.SIGTERM)
    finally:
        unified.leave_processes()
        if run.lock:
            run.lock.close()                                                                # for whoever calls main() again
    sys.exit(code)


if __name__ == "__main__":
    unified.run_main(main)
