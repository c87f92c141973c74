"""Train a tokenizer, then a model on its ids, then show what it has learned.

    python train.py                                     shapes drawn on the fly, on a CPU, in minutes
    python train.py --dataset photos --labels           a folder of class folders; cifar10 is known by name
    python train.py --dataset imagenet --tokenizer vqgan_jax_strongaug.ckpt         the paper's recipe
    python train.py --model addp --predictor out/shapes-mage            ADDP learns from a trained MAGE
    torchrun --standalone --nproc-per-node 8 train.py ...               the same flags on 8 GPUs

A run is a folder, out/<dataset>-<model> or, with --labels, out/<dataset>-<model>-labels: tokenizer.pt,
ids-*.npy, model.pt, log.jsonl, loss.png, reconstructions.png, samples.png.

main() shows the order of things, train() is the loop. What these two need follows in blocks: batches and
optimizer, log, files and signals, ids on disk, images and charts, speed.
"""
import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import zipfile

import numpy
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
import torch.distributed
import tqdm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import probe
import unified
from probe import Stopped, fingerprint, write_file
from unified import UserError, flag

try:
    import fcntl
except ImportError:                                     # Windows: nothing keeps a second process out
    fcntl = None


@dataclasses.dataclass
class Config:
    dataset: str = flag("shapes", "shapes, cifar10, imagenet, or a folder of images, of class folders, or of "
                                  "train and val with class folders", group="data")
    data_dir: str = flag("", "dataset folder, if not data/<dataset>", metavar="PATH")
    image_size: int = flag(None, "side in pixels; that of the run it builds on, if any [32; folders 64; as "
                                 "published 256]", min=8, max=4096)
    views: int = flag(None, "random crops of each image kept as ids; 1 keeps the whole image, 0 tokenises "
                            "fresh crops in every step [shapes 1, of mage-c 4, cifar10 and folders 4, as "
                            "published 10]. "
                            "Models of pixels: 0 takes the whole image, 1 a fresh crop in every step "
                            "[shapes 0, else 1]", min=0, max=1000)
    workers: int = flag(min(8, unified.usable_cores()), "data-loading processes, for folders", min=0,
                        max=1000)
    strict_images: bool = flag(None, "stop at an unreadable image instead of training on another")
    model: str = flag("mage", "what to train; mae, maskdit and dit are special cases of UMD, not the "
                              "official networks", choices=list(unified.MODELS), group="model")
    size: str = flag(None, "of model and tokenizer [tiny; folders small on a GPU; imagenet base]; imagenet, "
                           "and folders in base or large, are trained as published",
                     choices=["tiny", "small", "base", "large"])
    ids: int = flag(None, "tokens per image: ids, or patches of pixels [shapes 16, of pixels 64; else 64 "
                          "below 128 pixels, 256 below 256, then one for 16 x 16; 256 patches also where 64 "
                          "would have more values than the model is wide]", min=4, max=2**20)
    labels: bool = flag(False, "condition on class labels, which addp and adm do not take, so that "
                               "sample.py --label works")
    init: str = flag("", "start from this run of the same model and size, with its tokenizer; with --labels, "
                         "to teach it the classes", metavar="RUN")
    init_encoder: str = flag("", "start from the encoder blocks of this run of the same width", metavar="RUN")
    predictor: str = flag("", "addp: the trained MAGE it learns from, a run folder (its ids are shared), a "
                              "checkpoint or a published file", metavar="PATH")
    tokenizer: str = flag("", "use this one instead of training one: a run folder (its ids are shared), a "
                              "tokenizer.pt or a published file", metavar="PATH", group="tokenizer")
    codes: int = flag(None, "entries of the codebook [shapes 128, else 1024]", max=2**20)
    tokenizer_steps: int = flag(None, "optimizer steps [shapes 2000, cifar10 and folders 4500, as published "
                                      "1000000]")
    tokenizer_batch_size: int = flag(None, "images per step [16; as published 256 on a GPU]", max=10**6)
    adversarial: float = flag(None, "weight of the discriminator [0.8 from 256 pixels on, else 0]", min=0)
    steps: int = flag(None, "optimizer steps of the model [shapes 3000, cifar10 and folders 4000; tiny umd, "
                            "mae, maskdit and dit 3000, tiny adm 2000; as published --epochs]",
                      group="optimisation")
    epochs: float = flag(None, "instead of --steps: passes over the training set", min=1e-9)
    batch_size: int = flag(None, "images per step, on all devices together [64; tiny umd, mae, maskdit, "
                                 "dit and adm 32; or as published]", max=10**6)
    lr: float = flag(None, "learning rate for 256 images, scaled with --batch-size [0.006; tiny umd, "
                           "mae, maskdit and dit 0.018; or as published]", min=1e-9)
    seed: int = flag(0, "random seed", min=0, max=2**32 - 1)
    out_dir: str = flag("", "folder of the run [out/<dataset>-<model>, or out/<dataset>-<model>-labels]",
                        metavar="PATH", group="run and log")
    resume: str = flag(None, "go on where the run in this folder stopped, with its flags but those of "
                             "device, workers and report; --steps may be more. Without a folder: where a run "
                             "of these flags stopped",
                       nargs="?", const="", metavar="RUN")
    log_every: int = flag(None, "steps between rows of log.jsonl [50; as published 20]")
    eval_every: int = flag(None, "steps between held-out losses and sample grids, 0 for never [1000; as "
                                 "published 5000]", min=0)
    save_every: int = flag(None, "steps between checkpoints [500; as published 1000]")
    report: bool = flag(True, "leave out the closing report: samples, loss chart, probe of the features")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1, mps",
                       group="hardware")
    dtype: str = flag(None, "of activations [bfloat16 on GPUs that compute in it, else float32]",
                      choices=["float32", "bfloat16"])
    compile: bool = flag(None, "torch.compile the blocks [on cuda]")
    micro_batch: int = flag(None, "images that one device computes at once, on which random numbers depend "
                                  "[as many as fit]", max=10**6)
    benchmark: bool = flag(False, "measure the speed of training on random data, and exit")


# Defaults by data set. FOLDER is the papers' recipe: the method's own for the model, see
# unified.MODELS, and MaskGIT's for the tokenizer. It is for imagenet, and for anyone who asks for --size
# base or large. SMALL_FOLDER is for other folders, and for --size tiny and small.

SHAPES = dict(size="tiny", image_size=32, ids=16, codes=128, views=1, steps=3000, batch_size=64, lr=6e-3,
              tokenizer_size="toy", tokenizer_steps=2000, tokenizer_batch_size=16, tokenizer_lr=4e-3,
              log_every=50, eval_every=1000, save_every=500)
CIFAR10 = dict(SHAPES, ids=64, codes=1024, views=4, steps=4000, tokenizer_size=None, tokenizer_steps=4500)
FOLDER = dict(size="base", image_size=256, ids=None, codes=1024, views=10, tokenizer_size=None,
              tokenizer_steps=1_000_000, tokenizer_lr=1e-4, log_every=20, eval_every=5000, save_every=1000)
SMALL_FOLDER = dict(CIFAR10, image_size=64, ids=None)

TOKENIZER_RECIPE = dict(unified.MAGE_RECIPE, betas=(0.9, 0.99), weight_decay=0.0)
RESUME_MAY_CHANGE = {"steps", "epochs", "workers", "device", "log_every", "save_every", "eval_every",
                     "resume", "report", "out_dir", "compile", "strict_images", "data_dir"}
SEEDS = {"tokenizer": 9, "model": 5}  # keep their random numbers apart; these are the lengths of the names


def recipe_of(cfg):
    """How cfg.model is trained."""
    method = unified.MODELS[cfg.model]
    return method.tune_recipe or method.recipe if cfg.init and cfg.labels else method.recipe


def defaults(cfg):
    """What Config leaves open, {field: value}, and the tokenizer's size and learning rate, which have
    no flag."""
    method, recipe, cuda = unified.MODELS[cfg.model], recipe_of(cfg), cfg.device.startswith("cuda")
    large = cfg.size in ("base", "large") or cfg.dataset == "imagenet" and not cfg.size
    folder = {**FOLDER, **recipe["paper"]} if large else dict(SMALL_FOLDER, size="small" if cuda else "tiny")
    values = dict({"shapes": SHAPES, "cifar10": CIFAR10}.get(cfg.dataset, folder))
    if (cfg.size or values["size"]) == "tiny":
        values.update(recipe["tiny"])
    if not method.tokenizer:
        values["views"] = 0 if cfg.dataset == "shapes" else 1
    elif method.views == 2:
        values["views"] = max(4, values["views"])
    side = cfg.image_size or values["image_size"]
    if side >= 256:
        values["ids"] = (side // 16) ** 2
    values["ids"] = values["ids"] or (64 if side < 128 else 256)
    coarse = method.tokens == "patches" and not noise_fits(cfg, cfg.size or values["size"], side, 64)
    values["ids"] = 256 if values["ids"] == 64 and coarse and side % 16 == 0 else values["ids"]
    values["adversarial"] = 0.8 if side >= 256 else 0.0
    values.setdefault("tokenizer_batch_size", 256 if cuda else 16)      # a CPU takes minutes for 256
    values["tokenizer_size"] = values["tokenizer_size"] or cfg.size or values["size"]
    values["compile"] = cuda
    return values


def noise_fits(cfg, size, side, ids):
    """Whether a token is as wide as its patch has values: else most of the noise in a patch cannot pass the
    network, which then cannot predict it, and samples stay noise."""
    return 3 * side ** 2 / ids <= unified.MODELS[cfg.model].sizes.get(size, {}).get("width", math.inf)


CHECKPOINTS = ("model.pt", "tokenizer.pt")


def checkpoint_in(folder, names=CHECKPOINTS):
    """Path of the first of these files that is in the folder, if only as its .prev; None without any."""
    paths = (pathlib.Path(folder, name) for name in names)
    return next((p for p in paths if os.path.exists(p) or os.path.exists(f"{p}.prev")), None)


def resumed(given):
    """{flag: value} with those of the run that --resume names, but for what may change and was given.
    UserError if others contradict the run."""
    if not given.get("resume"):
        return given
    folder = pathlib.Path(given["resume"])
    path = checkpoint_in(folder)
    if path is None:
        unsaved = os.path.exists(folder / "log.jsonl")
        raise UserError(f"--resume {folder}: no checkpoint is there; "
                        + ("it ended before its first: type the command that began it once more" if unsaved
                           else unified.other_run(folder)))
    state = unified.load_checkpoint(path)
    length = {name: given[name] for name in ("steps", "epochs") if given.get(name)}
    for name, value in length.items():
        asked = unified.steps_of({**state["config"], "steps": None, **length})
        if path.name == "model.pt" and 0 < asked < state["step"]:       # 0: an older config does not say
            raise UserError(f"{folder} has had {state['step']} steps, and --{name} {value:g} is less; "
                            "leave it out, or take more")
    config = dict(state["config"], out_dir=str(folder))
    if config.get("predictor"):                         # which brings its tokenizer along
        config["tokenizer"] = ""
    fixed = sorted(given.keys() - (RESUME_MAY_CHANGE - {"out_dir"}))
    if wrong := contradictions(config, {name: given[name] for name in fixed}):
        raise UserError(f"{folder} was made with {wrong}: leave that out, or start another run with "
                        "--out-dir")
    length = {"steps", "epochs"} if length else set()
    kept = vars(Config()).keys() & config.keys() - length - {"device", "workers", "resume", "report"}
    return {**{name: config[name] for name in kept}, **given}


def contradictions(config, flags):
    """Those of the flags {name: value} of which a checkpoint's config says something else, in words."""
    def same(a, b):
        paths = isinstance(a, str) and isinstance(b, str)
        return a == b or paths and os.path.realpath(a) == os.path.realpath(b)
    return "; ".join(f"--{name.replace('_', '-')} {config[name]}, not {now}" for name, now in flags.items()
                     if not same(config.get(name, now), now))


def config_of_run(path):
    """The config of the run that path names, by its folder or a checkpoint in it; {} of other files."""
    folder, name = os.path.split(path)
    file = checkpoint_in(path) if os.path.isdir(path) else checkpoint_in(folder, {name} & {*CHECKPOINTS})
    config = unified.load_checkpoint(file).get("config") if file else None
    return config if isinstance(config, dict) else {}


def settings(cfg):
    """A copy of cfg with nothing left open; UserError for what cannot be."""
    for path in filter(None, (cfg.predictor, cfg.tokenizer, cfg.init)):         # what it builds on decides
        cfg = dataclasses.replace(cfg, image_size=cfg.image_size or config_of_run(path).get("image_size"))
    if cfg.init and unified.MODELS[cfg.model].tokens == "patches":
        cfg = dataclasses.replace(cfg, ids=cfg.ids or config_of_run(cfg.init).get("ids"))
    if cfg.steps and cfg.epochs:
        raise UserError(f"--steps {cfg.steps} and --epochs {cfg.epochs:g} say the same thing twice; give one")
    answered = {"steps", "epochs"} if cfg.steps or cfg.epochs else set()
    values = {name: value for name, value in defaults(cfg).items()
              if name not in answered and vars(cfg).get(name, 0) is None}
    name = pathlib.Path(cfg.dataset).resolve().name                         # of "." that of the folder
    folder = f"out/{name}-{cfg.model}" + "-labels" * cfg.labels
    cfg = dataclasses.replace(cfg, **values, out_dir=cfg.out_dir or folder,
                              dtype=unified.pick_dtype(cfg.dtype, cfg.device))
    check(cfg)
    return dataclasses.replace(cfg, tokenizer=cfg.tokenizer or cfg.predictor)


def check(cfg):
    """Refuse flags that do not go together, and files and folders that are not there."""
    method, predictor = unified.MODELS[cfg.model], unified.MODELS[cfg.model].predictor
    if cfg.size not in method.sizes:
        raise UserError(f"{cfg.model} has no size {cfg.size}; --size takes {', '.join(method.sizes)}")
    if predictor and not cfg.predictor and not cfg.init:
        data = "" if cfg.dataset == "shapes" else f" --dataset {cfg.dataset} --image-size {cfg.image_size}"
        run = f"out/{pathlib.Path(cfg.dataset).name}-{predictor}"
        raise UserError(f"{cfg.model} learns from a trained {predictor.upper()}: run python train.py{data} "
                        f"--model {predictor}, then this with --predictor {run}")
    if cfg.predictor and (not predictor or cfg.labels or cfg.tokenizer):
        raise UserError("--predictor belongs to --model addp, and neither --tokenizer, which it brings "
                        "along, nor --labels go with it")
    if cfg.labels and not method.model.takes_labels:
        takers = [name for name, other in unified.MODELS.items() if other.model.takes_labels]
        raise UserError(f"--labels: {cfg.model} takes none; --model {', '.join(takers)} do")
    if cfg.tokenizer and not method.tokenizer:
        raise UserError(f"--tokenizer {cfg.tokenizer}: {cfg.model} has no tokenizer; leave that out")
    if cfg.init and (cfg.tokenizer or cfg.predictor) and cfg.resume is None:        # older runs had both
        raise UserError(f"--init {cfg.init} brings along the tokenizer whose ids it has learned, and its "
                        "predictor; leave --tokenizer and --predictor out")
    check_sizes(cfg, method)
    if not method.tokenizer and cfg.views > 1:
        raise UserError(f"{cfg.model} reads one crop of an image, fresh in every step: --views {cfg.views} "
                        "is for models that read ids; take 1, or 0 for no crop")
    if method.views == 2 and cfg.views == 1:
        raise UserError(f"{cfg.model} compares two crops of an image; --views 1 keeps one; take 0 or 2 and "
                        "more")
    for name in ("tokenizer", "predictor", "init", "init_encoder"):
        path = vars(cfg)[name]
        if not os.path.exists(path or "."):
            remedy = "put back what this run began with" if cfg.resume else "name a run or a checkpoint"
            raise UserError(f"--{name.replace('_', '-')}: there is no {path}; {remedy}")
    if not cfg.benchmark:
        probe.writable(cfg.out_dir, "--out-dir", folder=True)


def check_sizes(cfg, method):
    """Refuse an --image-size that cannot be halved enough, or that --ids does not cut into equal squares."""
    size, side = cfg.image_size, math.isqrt(cfg.ids)
    if method.tokens == "none":
        unit = 2 ** (len(method.sizes[cfg.size].get("ch_mult", "1")) - 1)
        if size % unit:
            raise UserError(f"--image-size {size} is no multiple of {unit}, as this --model and --size need; "
                            f"take {size + -size % unit}")
    elif not cfg.tokenizer and not cfg.predictor and not (cfg.init and method.tokenizer):
        squares = (2, 4, 8, 16) if method.tokenizer else range(1, size + 1)
        if side ** 2 != cfg.ids or size % side or size // side not in squares:
            unit = 16 if size >= 64 else 4
            fit = [f"--image-size {size + -size % unit} --ids {(-size // unit) ** 2}"] * (size % unit > 0)
            sides = [s for s in reversed(squares) if size % s == 0 and 1 < s <= min(16, size // 2)]
            fit = " or ".join(fit + [f"--ids {(size // s) ** 2}" for s in sides[:3]])
            raise UserError(f"--ids {cfg.ids} does not cut --image-size {size} into equal squares"
                            + " of 2, 4, 8 or 16 pixels" * method.tokenizer + f"; take {fit}")


def check_batch_size(cfg, world):
    """Refuse a batch that micro-batches on so many processes do not make up."""
    if cfg.batch_size % ((cfg.micro_batch or 1) * world):
        parts = f"--micro-batch {cfg.micro_batch} x " if cfg.micro_batch else ""
        raise UserError(f"--batch-size {cfg.batch_size} is not a multiple of "
                        f"{parts}{world} process{'es' * (world > 1)}")


def idle_flags(cfg, given):
    """A line on flags given for a tokenizer's training where none is trained, "" if there are none."""
    method = unified.MODELS[cfg.model]
    idle = {"codes", "tokenizer_steps", "tokenizer_batch_size", "adversarial"}
    idle |= {"ids"} if method.tokens != "patches" else set()
    idle &= set() if method.tokenizer and not cfg.tokenizer and not cfg.init else given
    names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(idle))
    return f"no tokenizer is trained here, so this does nothing: {names}" * bool(idle)


def main():
    given = unified.parse_flags(Config, __doc__)
    cfg, code = settings(Config(**resumed(given))), 0
    unified.join_processes(cfg.device)  # from here on "cuda" is this process's GPU
    rank, world = unified.rank_and_world()
    check_batch_size(cfg, world)
    if cfg.benchmark:
        unified.leave_processes()                       # each measures its own device
        return benchmark(cfg)
    lock = contextlib.ExitStack()
    try:
        train_set, test_set = open_data(cfg)
        if line := idle_flags(cfg, given.keys()):
            print_once(line)
        unified.rank_zero_first(lambda: open_folder(cfg, train_set, lock))
        stop_when_asked()
        tokenizer, arch = get_tokenizer(cfg, train_set, test_set)
        model, arch = build_model(cfg, tokenizer, arch, train_set)
        ema = train_model(cfg, model, arch, train_set, test_set)
        unified.leave_processes()                       # nobody need wait for the report
        if rank == 0 and cfg.report:
            report(cfg, model, ema, train_set, test_set)
    except torch.OutOfMemoryError:
        micro = (cfg.micro_batch or cfg.batch_size // world) // 2
        raise UserError(f"out of memory; try --micro-batch {max(1, micro)}")
    except Stopped as where:                            # all processes are here
        print_once(f"stopped {where}; everything is saved, --resume goes on: "
                   f"python train.py --resume {shlex.quote(cfg.out_dir)}")
        code = 128 + next(iter(probe.SIGNALS), signal.SIGTERM)
    finally:
        unified.leave_processes()
        lock.close()                                    # for whoever calls main() again
    sys.exit(code)


# Data


def open_data(cfg):
    """The images to train on and those to test on."""
    train_set, test_set = (
        probe.open_data(cfg.dataset, cfg.data_dir, cfg.image_size, part, cfg.device, cfg.strict_images,
                          recipe_of(cfg)["min_crop"]) for part in (True, False))
    if isinstance(test_set, probe.ImageFolder) and not len(probe.map_images(torch.clone, test_set, 32)[0]):
        raise UserError(f"none of the images to test on can be read that were tried, "
                        f"{probe.shown(test_set.paths[0])} for one; mend them, or take them out")
    unlabelled = sum(int((data.labels < 0).sum()) for data in (train_set, test_set))
    print_once(train_set.summary or f"{cfg.dataset}: {len(train_set)} images of {len(train_set.classes)} "
               f"classes to train on, {len(test_set)} to test on"
               + f"; {unlabelled} of them have no label" * bool(unlabelled))
    steps = f"{cfg.steps} steps" if cfg.steps else f"{cfg.epochs:g} epochs"
    first = f"tokenizer: {cfg.tokenizer or cfg.init or f'{cfg.tokenizer_steps} steps'}; "
    first *= unified.MODELS[cfg.model].tokenizer
    print_once(f"{cfg.image_size} pixels; {first}{cfg.model} {cfg.size}: {steps} of {cfg.batch_size} images")
    if len(train_set) < 1000:
        look = "--tokenizer-steps 1200 " * bool(first) + "--steps 300 --image-size 32 --out-dir out/look"
        remedy = f"; take thousands or, for a first look, {look}" * (
            cfg.resume is None and (cfg.steps is None or cfg.steps > 300))
        print_once(f"{len(train_set)} images are few: trained for long, the model will know them by heart"
                   + remedy)
    known = int((test_set.labels >= 0).sum())
    if test_set.unseen and test_set.classes and known:
        for line in probe.few_to_test_on(known):
            print_once(line)
    if cfg.labels and not train_set.classes:
        raise UserError(f"--labels: {cfg.dataset} has no classes (no class folders)")
    if cfg.labels and unlabelled:
        raise UserError(f"--labels: {unlabelled} images of {cfg.dataset} have no label; leave --labels out")
    return train_set, test_set


def ids_or_images(cfg, vqgan, train_set):
    """What the model trains on, a function from a plan to batches: cached ids, or pixels, fresh in
    every step; a model of ids tokenises those itself (--views 0)."""
    if cfg.views == 0 or vqgan is None:
        return lambda plan: train_set.batches(plan, cfg.workers)
    shared = pathlib.Path(cfg.tokenizer)
    folder = shared if cfg.tokenizer and shared.is_dir() and os.access(shared, os.W_OK) else cfg.out_dir
    ids, labels = cache_ids(folder, vqgan, train_set, cfg.views, cfg.workers)
    ids = torch.from_numpy(ids.view("int16") if ids.dtype == numpy.uint16 else ids)
    if cfg.device.startswith("cuda") and ids.nbytes < torch.cuda.mem_get_info(cfg.device)[0] / 4:
        ids = ids.to(cfg.device)
    return lambda plan: cached_batches(ids, labels, plan)


# Tokenizer


def get_tokenizer(cfg, train_set, test_set):
    """What the model is built on, and its config: the MAGE named by --predictor, the tokenizer named by
    --tokenizer, what the run named by --init was built on, or a tokenizer that is trained here; None for
    models of pixels, and for --init, whose weights come all together, see copy_weights."""
    method = unified.MODELS[cfg.model]
    if cfg.init:
        arch = unified.load_model(cfg.init, tell=print_once)[1]["arch"]
        if arch["model"] != cfg.model:
            raise UserError(f"--init {cfg.init} holds {arch['model']}, not {cfg.model}; name a run of the "
                            "same model")
        return None, arch.get("predictor" if method.predictor else "tokenizer")
    if not method.tokenizer:
        return None, None
    if cfg.predictor:
        predictor, config = unified.load_model(cfg.predictor, tell=print_once)
        wanted, side = method.predictor, predictor.image_size
        if not isinstance(predictor, unified.MODELS[wanted].model) or side != cfg.image_size:
            raise UserError(f"--predictor {cfg.predictor} holds {config['arch']['model']} at --image-size "
                            f"{side}; {cfg.model} needs {wanted} at --image-size {cfg.image_size}")
        return predictor, config["arch"]
    own = [checkpoint_in(cfg.out_dir, [name]) for name in CHECKPOINTS]
    lost = cfg.resume is not None and own[0] and not own[1]     # model.pt has it, too
    if not cfg.tokenizer and not lost:
        return train_tokenizer(cfg, train_set, test_set)
    vqgan, arch = unified.load_tokenizer(cfg.tokenizer or cfg.out_dir, print_once)
    if cfg.image_size % vqgan.stride:
        raise UserError(f"--tokenizer {cfg.tokenizer} needs an --image-size that is a multiple of "
                        f"{vqgan.stride}, not {cfg.image_size}")
    return vqgan.to(cfg.device), arch


def tokenizer_arch(cfg):
    """Config of the tokenizer that cfg asks for."""
    stride = cfg.image_size // math.isqrt(cfg.ids)
    return unified.tokenizer_config(defaults(cfg)["tokenizer_size"], stride, cfg.codes)


def train_tokenizer(cfg, train_set, test_set):
    """A tokenizer trained on the images, and its config."""
    torch.manual_seed(cfg.seed)
    arch, steps, batch = tokenizer_arch(cfg), cfg.tokenizer_steps, cfg.tokenizer_batch_size
    net = unified.TokenizerTraining(unified.VQGAN(**arch))
    micro = micro_batch_size(cfg, batch, 96 * cfg.image_size ** 2 * arch["ch"] * arch["blocks"])
    views = 0 if isinstance(train_set, probe.ImageTensor) else 1  # enlarged crops of 32 pixels are all blur
    recipe = dict(TOKENIZER_RECIPE, steps=steps, batch_size=batch, micro_batch=micro, views=views,
                  lr=defaults(cfg)["tokenizer_lr"])
    if cfg.resume is None and cfg.views and unified.rank_and_world()[1] == 1:
        print_once(forecast(cfg, model_steps(cfg, train_set), net))

    def evaluate():
        draw_reconstructions(cfg, lambda x: net.vqgan.reconstruct(x)[:1], test_set)
        return measure_tokenizer(cfg, net.vqgan, test_set, 500)[0]
    train(cfg, "tokenizer", net, recipe, train_set, lambda plan: train_set.batches(plan, cfg.workers),
          {"tokenizer_arch": arch}, evaluate,
          lambda step, first: {"adversarial_weight": cfg.adversarial * (step >= steps // 5)})
    return net.vqgan, arch


def forecast(cfg, steps, net=None):
    """How long the training of the model, and before it of the tokenizer net, will take, from some steps of
    each on random data."""
    few, S = 64 if cfg.size == "tiny" else 1, cfg.image_size        # images: a step of them is to be short
    method, grid = unified.MODELS[cfg.model], math.isqrt(cfg.ids)
    model = unified.build(unified.model_config(cfg.model, cfg.size, S, grid, net and tokenizer_arch(cfg)))
    x = torch.rand(min(few, cfg.tokenizer_batch_size if net else cfg.batch_size), 3, S, S)
    ids = torch.randint(model.codes or 1, (min(few, cfg.batch_size), method.views, model.length)).squeeze(1)
    stages = {"tokenizer": (net, x, cfg.tokenizer_steps * cfg.tokenizer_batch_size)} if net else {}
    stages[cfg.model] = (model, ids if net else x, steps * cfg.batch_size)
    seconds = {name: images * seconds_an_image(cfg, *stage) for name, (*stage, images) in stages.items()}
    parts = ", ".join(f"{name} {in_words(v)}" for name, v in seconds.items())
    total = in_words(sum(seconds.values()))
    return f"about {total} of training in all: {parts}" + "; then the report" * cfg.report


def in_words(seconds):
    """A duration, such as '1 h 06 min'."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else \
        f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def seconds_an_image(cfg, model, x):
    """Seconds that the loss of an image of the batch x, and its gradient, take."""
    model, x = model.to(cfg.device), x.to(cfg.device)

    def step():
        with probe.autocast(cfg):
            loss, _ = model(x)
        loss.backward()
    took = seconds_a_call(cfg, step, 0.2)
    model.zero_grad()
    return took / len(x)


def measure_tokenizer(cfg, vqgan, data, count):
    """PSNR over all pixels, in dB, and the fraction of codes used, on count images; and the PSNR that the
    mean colour of each token's square would reach."""
    vqgan.eval()
    used, s = torch.zeros(vqgan.quantize.embedding.num_embeddings, dtype=torch.bool), vqgan.stride

    def squared_errors(x):
        with probe.autocast(cfg):
            y, ids = vqgan.reconstruct(x)
        used[ids.unique().cpu()] = True
        squares = x.unflatten(3, (-1, s)).unflatten(2, (-1, s)).var((3, 5), correction=0)   # (B, 3, h, w)
        return torch.stack([error.mean((1, 2, 3)) for error in ((y - x).square(), squares)], 1)
    title = "PSNR" if count > 1000 else None
    errors, _ = probe.map_images(squared_errors, data, count, cfg.workers, cfg.device, title)
    error, floor = (max(v.mean().item(), 1e-10) for v in errors.T.contiguous())
    figures = {"psnr": -10 * math.log10(error), "codes_used": used.float().mean().item()}
    return figures, -10 * math.log10(floor)


# Model


def build_model(cfg, frozen, arch, train_set):
    """The model with the weights it starts from, and its config. frozen: the tokenizer or predictor
    that it is built on, None if that comes with --init; arch: the config of that."""
    method, classes = unified.MODELS[cfg.model], len(train_set.classes) if cfg.labels else 0
    torch.manual_seed(cfg.seed + 1)
    arch = unified.model_config(cfg.model, cfg.size, cfg.image_size, math.isqrt(cfg.ids), arch, classes,
                                tune=bool(cfg.init and cfg.labels))
    model = unified.build(arch)
    if frozen:
        (model.token_predictor if method.predictor else model.vqgan).load_state_dict(frozen.state_dict())
    if cfg.init:
        copy_weights(cfg, model, cfg.init)
        then, now = config_of_run(cfg.init), train_set.classes
        if cfg.labels and then.get("labels") and (old := then.get("classes", now)) != now:
            print_once(f"what it learned of {', '.join(old[:5])} it now takes for {', '.join(now[:5])}")
    if cfg.init_encoder:
        copy_weights(cfg, model, cfg.init_encoder, (*model.stem, "time_embed", "blocks"))     # blocks read it
    path = checkpoint_in(cfg.out_dir, ["model.pt"])
    if path and model.tokenizer and cfg.resume is not None:         # ids are made with its own
        own = unified.load_checkpoint(path)["model"]
        model.load_state_dict({k: v for k, v in own.items() if k.startswith(("vqgan.", "token_predictor."))},
                              strict=False)
    return model.to(cfg.device), arch


def copy_weights(cfg, model, path, only=None):
    """Take over the weights of another run, those whose names begin with one of `only`, or all. What
    only labels need starts afresh."""
    wanted = only or ("",)
    there, ours = unified.load_model(path)[0].state_dict(), model.state_dict()
    there = {k: v for k, v in there.items() if k.startswith(wanted)}
    state = {k: v for k, v in there.items() if k in ours and v.shape == ours[k].shape}
    fresh = [k for k in ours if k not in state]
    lost = [k for k in fresh if k.startswith(wanted) and not k.startswith("label_embed")]
    begun = {k.split(".")[1] for k in state if k.startswith("blocks.")}
    partly = [k for k in lost if k.startswith("blocks.") and k.split(".")[1] in begun]
    if not state or partly or (lost and not only):
        first = (partly or lost or ["encoder block"])[0]
        raise UserError(f"{path} does not fit --model {cfg.model} --size {cfg.size}: it has no {first} of "
                        "this shape" + ", since classes are part of the vocabulary; --labels must be as "
                                       "there" * ("word_embeddings" in first)
                        + "; --ids and --image-size must be as there" * ("pos_embed" in first))
    model.load_state_dict(state, strict=False)
    names = ", ".join(sorted({k.split(".")[0] for k in fresh}))
    print_once(f"{len(state)} of {len(there)} tensors from {path}; fresh: {names or 'none'}")


def model_steps(cfg, train_set):
    """Optimizer steps of the model."""
    return unified.steps_of({**vars(cfg), "images": len(train_set)})


def train_model(cfg, model, arch, train_set, test_set):
    """Train the model, on ids that are made once if it reads ids; returns its averaged weights, {} if
    it has none."""
    method, batch, lr = unified.MODELS[cfg.model], cfg.batch_size, cfg.lr * cfg.batch_size / 256
    steps = model_steps(cfg, train_set)
    micro = micro_batch_size(cfg, batch, image_bytes(cfg, model))
    print_once(f"{cfg.model} {cfg.size}: {sum(p.numel() for p in trainable(model).values()):,} parameters, "
               f"{model.length or 'no'} tokens an image, {steps} steps of {batch} ({micro} at once), "
               f"learning rate {lr:.2g}" + (f"; the loss starts near ln {model.codes} = "
                                            f"{math.log(model.codes):.2f}" if method.tokenizer else ""))
    if steps < (usual := defaults(cfg).get("steps") or 0) / 4 and len(train_set) >= 1000:
        print_once(f"{steps} steps are for a first look; {usual} are usual")
    if cfg.resume is None and not method.tokenizer and unified.rank_and_world()[1] == 1:
        print_once(forecast(cfg, steps))
    if method.tokens == "patches" and model.generates and \
            not noise_fits(cfg, cfg.size, cfg.image_size, cfg.ids):
        values = 3 * cfg.image_size ** 2 // cfg.ids
        print_once(f"its samples will stay noisy: a patch has {values} values, more than a token can carry; "
                   f"--ids {4 * cfg.ids} makes patches smaller")
    if method.options.get("contrastive") and (at_once := micro * unified.rank_and_world()[1]) < batch:
        print_once(f"the contrastive term compares {at_once} of the {batch} images with each other: those "
                   "computed at once")
    if (ratio := arch.get("clean_ratio")) and not int(batch * ratio):
        print_once(f"it will see no clean image: {ratio:.0%} of {batch} are none; --batch-size "
                   f"{math.ceil(1 / ratio)} or more has some")
    recipe = dict(recipe_of(cfg), steps=steps, batch_size=batch, micro_batch=micro, lr=lr,
                  views=method.views if method.tokenizer else cfg.views)
    prepare = model.to_ids if method.tokenizer else lambda x: x
    held_out = functools.cache(lambda: probe.map_images(prepare, test_set, 512, cfg.workers, cfg.device))

    def evaluate():
        draw_images(cfg, model, test_set, steps=None if method.tokenizer else 20)
        x, labels = (v.to(cfg.device).split(16) for v in held_out())    # each part draws its own mask ratios
        parts = zip(x, labels if cfg.labels else itertools.repeat(None))
        torch.manual_seed(0)
        with torch.no_grad(), probe.autocast(cfg):
            found = [model(*part) for part in until_asked(parts)]
        losses = [terms.get("masked", loss) for loss, terms in found]       # 16 images have few contrasts
        return {"held_out": torch.stack(losses).mean().item()}
    return train(cfg, "model", model, recipe, train_set, ids_or_images(cfg, model.tokenizer, train_set),
                 {"arch": arch}, evaluate, lambda step, first: model.micro_batch_args(first, micro),
                 model.after_step)


# The training loop


def train(cfg, name, model, recipe, data, read, arch, evaluate, forward_args, after_step=lambda: None):
    """Train the model from NAME.pt, or from the start, to its last step, and leave NAME.pt behind.
    Returns the averaged weights, {name: tensor}, {} if the recipe averages none.

    name          tokenizer or model
    model         forward(x, labels, ...) -> loss, {term: value}
    recipe        of unified.MODELS, and steps, batch_size, micro_batch, views, lr (the peak); optimizer: a
                  function of ({name: parameter}, recipe), adamw() if there is none
    data, read    the images, and a function of a plan, see plan(), that yields their x, labels
    arch          joins the flags in the checkpoint's config
    evaluate      () -> held-out figures, {name: number}; draws images on the way
    forward_args  (step, first) -> more arguments of forward(), {name: value}, for a micro-batch that begins
                  with image `first` of the batch
    after_step    called after each step of the optimizer
    """
    (rank, world), steps, micro = unified.rank_and_world(), recipe["steps"], recipe["micro_batch"]
    accumulate = recipe["batch_size"] // (micro * world)  # micro-batches of this process in a step
    net, weights, optimizer, ema, step = set_up(cfg, name, model, recipe)
    batches = read(plan(len(data), cfg.seed, recipe, step, steps))
    log = Log(cfg, name, recipe, step, lambda step: images_to_blame(cfg, model, recipe, data, read, step))
    model.train()

    def save():
        save_checkpoint(pathlib.Path(cfg.out_dir, f"{name}.pt"), {
            "model": model.state_dict(), "ema": ema, "optimizer": state_of(optimizer), "stage": name,
            "step": step, "config": {**vars(cfg), **arch, **probe.describe_data(data)}})
    while step < steps:
        for i in range(accumulate):
            try:
                x, labels = (unified.to_device(v, cfg.device) for v in next(batches))
            except UserError:                           # an image or a worker: no weight has moved yet
                if step:
                    save()
                raise
            place = i * world + rank                    # among the micro-batches of all processes
            torch.manual_seed(unified.hash_ints(cfg.seed, SEEDS[name], step, place))
            more = forward_args(step, place * micro)
            with net.no_sync() if world > 1 and i < accumulate - 1 else contextlib.nullcontext():
                with probe.autocast(cfg):
                    loss, terms = net(x.squeeze(1), labels if cfg.labels else None, **more)
                (loss / accumulate).backward()
            log.add({"loss": loss, **terms})
        stats = update(optimizer, weights, ema, recipe, step)
        after_step()
        step += 1
        log.step_done(step, stats["grad_norm"])
        if step % cfg.log_every == 0 or step == steps:
            log.write(step, stats)
        if cfg.eval_every and (step % cfg.eval_every == 0 or step == steps):
            write_evaluation(cfg, name, step, model, ema, evaluate)
            log.restart_clock(step)
        stop = probe.asked_to_stop()
        if step % cfg.save_every == 0 or step == steps or stop:
            log.check_finite(step)
            save()
        if stop and step < steps:
            raise Stopped(f"at step {step} of the {name}")
    model.eval()
    return ema


def set_up(cfg, name, model, recipe):
    """The network to call, which on several devices averages gradients; the trainable weights {name:
    parameter}, their optimizer and averages; and the step: as NAME.pt has them, or at the start."""
    weights = trainable(model.to(cfg.device))
    optimizer = recipe.get("optimizer", adamw)(weights, recipe)
    ema = {k: p.detach().clone() for k, p in weights.items()} if recipe["ema"] else {}
    step = restore(cfg, name, model, optimizer, ema)            # 0 if there is none
    if step > recipe["steps"]:
        raise UserError(f"{cfg.out_dir} has had {step} steps of the {name}, and {recipe['steps']} is less; "
                        "take more")
    if step == recipe["steps"]:
        print_once(f"{name}: all {recipe['steps']} steps are done")
    if cfg.compile:
        probe.compile_blocks(model)
    unused, several = name == "tokenizer" or bool(cfg.init), unified.rank_and_world()[1] > 1
    net = DistributedDataParallel(model, find_unused_parameters=unused) if several else model
    return net, weights, optimizer, ema, step


@torch.no_grad()                                        # or the averages would keep the graph of all steps
def update(optimizer, weights, ema, recipe, step):
    """Step number `step`, from 0, of the weights and of their averages ema, {name: tensor} each; clips
    gradients, and drops them; they are means over all micro-batches and processes. (In train(), before the
    last micro-batch, they are sums of a process's own, and micro-batches need not be alike: UMD's hold other
    parts of the batch, and each of MAGE's draws a mask ratio.) Returns statistics of it, {name: a number, or
    a scalar tensor that is read with the row}, for rows of log.jsonl with a loss, as the first process has
    them; one of your own is a key more, of a name that no term has, None where it is not defined. What it has
    to see of single micro-batches it gets in train(), behind backward(); what it remembers save() in train()
    and restore(), which set_up() calls, are to keep; Log.write() has what stands on the bar. grad_norm is
    that before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(weights.values(), recipe["grad_clip"])
    lr = probe.learning_rate(step + 1, recipe["warmup"] * recipe["steps"], recipe["steps"] + 1, recipe["lr"],
                             recipe["min_lr"] * recipe["lr"])
    for group in optimizer.param_groups:
        group["lr"] = lr
    fused = optimizer.defaults.get("fused") and norm.device.type != "mps"          # which obeys no found_inf
    if fused:                                   # as torch's GradScaler says that no weight is to move
        optimizer.grad_scale, optimizer.found_inf = None, (~norm.isfinite()).float()
    if fused or norm.isfinite():                # for an optimizer that is not fused the GPU is waited for
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if ema:                                             # at first faster, or it would show the start
        decay = min(recipe["ema"], (2 + step) / (11 + step))
        torch._foreach_lerp_(list(ema.values()), list(weights.values()), 1 - decay)
    return {"lr": lr, "grad_norm": norm}


# Batches, weights, optimizer


permutation = functools.lru_cache(2)(probe.shuffled)  # a batch may reach from one epoch into the next


def plan(n, seed, recipe, start, stop):
    """Which of n images, in which crops, each micro-batch of this process holds in steps start .. stop
    - 1: yields index (B,), crops (B, views), or None for whole images if recipe["views"] is 0. All of
    it follows from the step, so it is the same after an interruption and, taken together, for any
    number of processes."""
    (rank, world), batch, micro = unified.rank_and_world(), recipe["batch_size"], recipe["micro_batch"]
    for step in range(start, stop):
        for first in range(rank * micro, batch, world * micro):
            p = step * batch + first + torch.arange(micro)
            epochs = (p // n).unique().tolist()
            index = torch.cat([permutation(n, seed, e)[p[p // n == e] % n] for e in epochs])
            views = torch.arange(recipe["views"])
            yield index, unified.hash_ints(seed, p[:, None], views) if len(views) else None


def cached_batches(ids, labels, plan):
    """Batches of cached ids (N, crops, L), views chosen by the crops' numbers, two of one image never
    the same: yields (B, V, L), labels."""
    K = ids.size(1)
    for index, crops in plan:
        first = crops[:, :1] % K
        view = torch.cat([first, (first + 1 + crops[:, 1:] % max(1, K - 1)) % K], 1)
        where, view = (unified.to_device(v, ids.device) for v in (index, view))
        found = ids[where[:, None], view].int()
        yield found & 0xFFFF if ids.dtype == torch.int16 else found, labels[index]      # uint16 has no index


def image_bytes(cfg, model):
    """Memory that one image takes in a training step, roughly."""
    activations = sum(60 * c * h * w for c, h, w in model.layers.values())
    return activations * (2 if cfg.dtype == "float32" else 1) * unified.MODELS[cfg.model].views


def micro_batch_size(cfg, batch, image_bytes):
    """Images computed at once: what was asked for, else the largest divisor of this process's part of
    the batch whose activations fill at most 60 % of the memory."""
    world = unified.rank_and_world()[1]
    part, rest = divmod(batch, world)
    if rest:
        raise UserError(f"a batch of {batch} cannot be divided among {world} processes; take a multiple of "
                        f"{world}")
    if cfg.micro_batch:
        return math.gcd(cfg.micro_batch, part)
    memory = torch.cuda.mem_get_info(cfg.device)[1] if cfg.device.startswith("cuda") else 2 << 30
    fits = [m for m in range(1, part + 1) if part % m == 0 and m * image_bytes <= 0.6 * memory]
    return max(fits, default=1)


def trainable(model):
    """{name: parameter} of those that learn."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def adamw(weights, recipe, fused=True):
    """AdamW for {name: parameter} as the recipe says. fused: in one kernel; None: as torch would."""
    groups = [{"params": [p for name, p in weights.items() if bool(recipe["no_decay"](name, p)) == plain],
               "weight_decay": 0.0 if plain else recipe["weight_decay"]} for plain in (True, False)]
    return torch.optim.AdamW(groups, lr=recipe["lr"], betas=recipe["betas"], fused=fused)


@contextlib.contextmanager
def averaged(model, ema):
    """For a while the weights are their average ema, {name: tensor}, if there is one."""
    own = {name: p.detach().clone() for name, p in trainable(model).items()} if ema else {}
    model.load_state_dict(ema or {}, strict=False)
    try:
        yield
    finally:
        model.load_state_dict(own, strict=False)        # or a stop in between would save the average


# Log: log.jsonl and what is printed


def print_once(text):
    """Print, once for all processes."""
    if unified.rank_and_world()[0] == 0:
        tqdm.tqdm.write(text)


def write_row(cfg, **row):
    """Append a row to log.jsonl, once for all processes."""
    if unified.rank_and_world()[0] == 0:
        with open(pathlib.Path(cfg.out_dir, "log.jsonl"), "a") as file:
            file.write(json.dumps(row) + "\n")


def read_rows(folder):
    """The rows of log.jsonl; lines that were cut off or damaged do not count."""
    path, rows = pathlib.Path(folder, "log.jsonl"), []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):           # no UTF-8, no JSON
            rows.append(json.loads(line))
    return [r for r in rows if isinstance(r, dict) and isinstance(r.get("step"), int) and "stage" in r]


# Names in rows of log.jsonl, beside the terms.
ROW = "stage", "step", "lr", "grad_norm", "images_per_second", "memory_gib", "held_out"


def check_scalar(name, value, taken):
    """ValueError for what a row cannot hold beside the names that are taken."""
    shape = tuple(torch.as_tensor(value).shape)
    if shape or name in taken:
        raise ValueError(f"log.jsonl cannot hold a term {name} of shape {shape}: terms of forward(), and "
                         f"statistics, are scalars, and not called {', '.join(taken)}, as rows have these")


class Log:
    """Progress bar and log of one training. What is added up stays on the device until a row is
    written: no step waits. It is not saved: the first row after --resume is of the steps since then."""

    def __init__(self, cfg, name, recipe, step, culprits):
        """culprits: step -> names of the images whose gradient alone is not finite."""
        self.cfg, self.name, self.recipe, self.first, self.culprits = cfg, name, recipe, step, culprits
        self.sums, self.skipped, self.in_a_row = {}, 0, 0  # the last two: steps without a finite gradient
        self.bar = probe.progress_bar(recipe["steps"], None if cfg.benchmark else name, "steps", step, True)
        self.restart_clock(step)

    def restart_clock(self, step):
        """Images a second are counted from here on."""
        self.since, self.seen = time.perf_counter(), step

    def add(self, values):
        """{name: number, or scalar on the device} of one micro-batch, to be averaged over micro-batches,
        steps and processes, where it is finite. ValueError for what a row cannot hold."""
        for name, value in values.items():
            (total, count), value = self.sums.get(name, (0, 0)), torch.as_tensor(value).detach()
            check_scalar(name, value, ROW)
            self.sums[name] = total + value.nan_to_num(0, 0, 0), count + value.isfinite()

    def means(self):
        """{name: mean} of what was added since the last call, over all processes, of which some may
        lack a term."""
        names, world = [list(self.sums)], unified.rank_and_world()[1]
        if world > 1:
            names = [None] * world
            torch.distributed.all_gather_object(names, list(self.sums))
        names = list(dict.fromkeys(itertools.chain(*names)))  # those of all, in the same order everywhere
        sums = torch.zeros(len(names), 2, device=self.cfg.device)
        for row, name in zip(sums, names):
            row[0], row[1] = self.sums.get(name, (0, 0))
        if world > 1:
            torch.distributed.all_reduce(sums)
        self.sums = {}
        return dict(zip(names, (sums[:, 0] / sums[:, 1]).tolist()))

    def step_done(self, step, norm):
        """One step more, whose gradient had this norm."""
        self.bar.update()
        bad = ~norm.isfinite()
        self.skipped, self.in_a_row = self.skipped + bad, (self.in_a_row + 1) * bad
        done = step - self.first
        if done == 1:                                   # the very first is no measure: it compiles
            self.started = time.perf_counter()
        if done == 4 and not self.bar.disable:
            days = (self.recipe["steps"] - step) * (time.perf_counter() - self.started) / 3 / 86400
            prefix = "--tokenizer-" if self.name == "tokenizer" else "--"
            if days > 1:
                print_once(f"at this pace the {self.name} takes {days:.0f} more days; {prefix}steps, "
                           f"{prefix}batch-size, --size tiny or --image-size 64 shorten that")

    def check_finite(self, step):
        """Tell of steps whose gradient was not finite, which have moved no weight; several in a row end
        the run."""
        skipped, in_a_row, self.skipped = int(self.skipped), int(self.in_a_row), 0
        if skipped and (in_a_row >= 5 or in_a_row == step - self.first):
            names = self.culprits(step)
            remedy = "a lower --lr may help, or another --seed"
            if names:
                does, it = ("does", "it") if len(names) == 1 else ("do", "them")
                remedy = f"{', '.join(names)} alone {does} that: take {it} out"
            kept = pathlib.Path(self.cfg.out_dir, f"{self.name}.pt").exists()
            raise UserError(f"the loss or its gradient is not finite, {in_a_row} steps in a row up to step "
                            f"{step}; " + f"{self.cfg.out_dir} keeps the last good checkpoint; " * kept
                            + remedy)
        if skipped:
            print_once(f"{skipped} of the steps up to {step} were skipped: their gradient was not finite")

    def write(self, step, stats):
        """A row: means of what was added, and the statistics of this step, see update()."""
        self.check_finite(step)
        means, cuda = self.means(), self.cfg.device.startswith("cuda")
        for name in stats.keys() - {"lr", "grad_norm"}:
            check_scalar(name, 0.0 if stats[name] is None else stats[name], (*ROW, *means, "masked"))
        row = {name: None if v is None or not math.isfinite(v) else float(v)
               for name, v in {**means, **stats}.items()}
        rate = (step - self.seen) * self.recipe["batch_size"] / (time.perf_counter() - self.since)
        memory = torch.cuda.max_memory_allocated(self.cfg.device) / 2**30 if cuda else None
        write_row(self.cfg, stage=self.name, step=step, **row, images_per_second=rate, memory_gib=memory)
        self.bar.set_postfix(loss=f"{means['loss']:.4f}", images=f"{rate:.0f}/s")
        self.restart_clock(step)


def write_evaluation(cfg, name, step, model, ema, evaluate):
    """A row of held-out figures of the averaged weights, by the first process alone, unless a signal asks for
    the end meanwhile."""
    if unified.rank_and_world()[0] > 0:
        return
    model.eval()
    with contextlib.suppress(Stopped), averaged(model, ema):
        write_row(cfg, stage=name, step=step, **evaluate())
    model.train()


def images_to_blame(cfg, model, recipe, data, read, step):
    """Names of the images, at most three, whose gradient alone is not finite; none if it is that of more
    than one in ten: then not they are to blame."""
    found, alone = [], list(plan(len(data), cfg.seed, dict(recipe, micro_batch=1), step - 1, step))
    for (index, _), batch in zip(alone, read(alone)):
        x, labels = (unified.to_device(v, cfg.device) for v in batch)
        with probe.autocast(cfg):
            loss, _ = model(x.squeeze(1), labels if cfg.labels else None)
        gradients = torch.autograd.grad(loss, trainable(model).values(), allow_unused=True)
        if not all(g.isfinite().all() for g in gradients if g is not None):
            in_files = isinstance(data, probe.ImageFolder)
            found.append(probe.shown(data.paths[index]) if in_files else f"image {index.item()}")
    return found if len(found) <= max(1, min(3, len(alone) // 10)) else []


# Files: the run's folder, checkpoints; and signals, which end a run only when all is saved


# What is in a run's folder before its first checkpoint.
UNSAVED = re.compile(r"\.lock|log\.jsonl|(samples|reconstructions)\.png|(ids|labels)-\w+(\.npy)?|"
                     r"\w+\.pt\.tmp|[\w.-]+\.\d+\.tmp")


def open_folder(cfg, train_set, lock):
    """Make or check the run's folder, and lock it against a second process, until the ExitStack `lock`
    is closed."""
    folder = pathlib.Path(cfg.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    file = lock.enter_context(open(folder / ".lock", "w"))
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)            # it dies with the process
    except BlockingIOError:
        raise UserError(f"{folder} is in use by another train.py; take another --out-dir")
    except OSError:                                                     # a file system without locks
        pass
    if cfg.resume is None and not all(UNSAVED.fullmatch(p.name) for p in folder.iterdir()):
        raise UserError(f"{folder} is not empty; --resume {folder} goes on with it and its flags (with more "
                        "--steps, if they are done), --out-dir takes another place")
    if path := checkpoint_in(folder):
        config = unified.load_checkpoint(path)["config"]
        fixed = {name: value for name, value in vars(cfg).items() if name not in RESUME_MAY_CHANGE}
        if wrong := contradictions(config, fixed):
            raise UserError(f"this run has {wrong}: --resume {cfg.out_dir} alone repeats its flags, and "
                            "--out-dir takes another place")
        probe.check_same_data(config, train_set, cfg.out_dir, "put them back, or take another --out-dir")


def save_checkpoint(path, state):
    """Write, by the first process alone, under a temporary name, flush, keep the previous file as
    NAME.prev, rename: a crash at any moment leaves a whole one. UserError if it cannot be written, for want
    of room say; then nothing has changed."""
    if unified.rank_and_world()[0] > 0:
        return
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
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of the file's
        new.unlink(missing_ok=True)
        reason = " ".join(str(error.__context__ or error).split())[:200]
        raise UserError(f"{path} could not be written ({reason}); the last good checkpoint is untouched: "
                        "make room, then --resume")


def keep_previous(path, previous):
    """The same file under a second name: somebody might be reading it under the first one."""
    previous.unlink(missing_ok=True)
    try:
        os.link(path, previous)
    except OSError:                                     # not every file system can
        os.replace(path, previous)


def restore(cfg, name, model, optimizer, ema):
    """Load NAME.pt if it is there, drop the log's rows that came after it, and return the step to go on
    from."""
    folder, step = pathlib.Path(cfg.out_dir), 0
    if path := checkpoint_in(folder, [f"{name}.pt"]):
        state = unified.load_checkpoint(path)
        unified.load_strictly(model, state["model"], path)
        with unified.reading(path, "a state of this method's optimizer"):
            check_same_optimizer(path, state["optimizer"], state_of(optimizer))
            for saved, own in zip(state["optimizer"]["param_groups"], optimizer.param_groups):
                saved.update((name, own[name]) for name in KERNELS & own.keys())
            optimizer.load_state_dict(state["optimizer"])
        if state["ema"].keys() != ema.keys():
            raise UserError(f"{path} has averages of {len(state['ema'])} weights, not of {len(ema)}; put the "
                            "recipe's ema back, or start another run with --out-dir")
        for key, average in ema.items():
            average.copy_(state["ema"][key].detach())
        step = state["step"]
    if unified.rank_and_world()[0] == 0:                # whole lines only: the last may be cut off
        kept = [json.dumps(r) + "\n" for r in read_rows(folder) if r["stage"] != name or r["step"] <= step]
        write_file(folder / "log.jsonl", lambda file: file.write("".join(kept).encode()))
    return step


def state_of(optimizer):
    """What a checkpoint keeps of an optimizer."""
    return {"class": type(optimizer).__name__, **optimizer.state_dict()}


KERNELS = {"fused", "foreach", "capturable"}            # options of an optimizer that decide how it computes


def kind_of(state):
    """What the state of an optimizer says of its kind: its class, how many weights its groups have, the names
    of its options, and the values of those that are True or False. Numbers may change from step to step."""
    groups = state["param_groups"]
    kind = {"class": state.get("class"), "number of weights": [len(group["params"]) for group in groups]}
    return kind | {name: [v if isinstance(v, bool) else "a number" for v in (g.get(name) for g in groups)]
                   for name in groups[0] if name not in KERNELS}


def check_same_optimizer(path, then, now):
    """UserError if the state `then`, which a checkpoint holds, is one of another optimizer than `now`."""
    then, now = kind_of(then), kind_of(now)
    for name in then | now:
        a, b = then.get(name), now.get(name)
        # Older checkpoints do not say the class; AdamW has decoupled_weight_decay since torch 2.7.
        if a != b and not (name in ("class", "decoupled_weight_decay") and None in (a, b)):
            raise UserError(f"{path} has the state of another optimizer, {name} {a} and not {b}; put "
                            "that one back, or start another run with --out-dir")


def stop_when_asked():
    """From now on Ctrl-C and SIGTERM only ask for the end: all that runs long looks into
    probe.SIGNALS before its next step or batch. A second one, two seconds later or more, ends it at
    once; torchrun passes one on sooner."""
    def ask(number, frame):
        if probe.SIGNALS and time.monotonic() - min(probe.SIGNALS.values()) > 2:
            raise KeyboardInterrupt
        probe.SIGNALS.setdefault(number, time.monotonic())
        if unified.rank_and_world()[0] == 0:
            with contextlib.suppress(OSError):          # print() might be at work on a line right now
                os.write(2, b"\nstopping after this step or batch; Ctrl-C again, after 2 s, quits at once\n")
    probe.SIGNALS.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)


def until_asked(items):
    """The items, until a signal asks for the end."""
    for item in items:
        if probe.SIGNALS:
            raise Stopped("while results were drawn")
        yield item


# Ids on disk. Tokenising costs more than a small model's whole training step, so every image is
# tokenised once, in V crops. The work is cut into shards, each a file of its own, so that any number of
# processes can divide it among them, on machines with a common disk too, and any other number can go on
# with it. No file is ever changed: each is written under another name and renamed, and its name says
# what it depends on.

SHARD = 2048                                            # images


def read_shard(path):
    """Ids (m, V, L) and labels (m,) of the images that are done, in lists of one; empty lists if the
    file is damaged or not there."""
    with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), numpy.load(path) as shard:
        return [shard["ids"]], [shard["labels"]]
    return [], []


def make_shards(shards, vqgan, data, views, workers):
    """Complete shards, [(path, the images it holds: int (m,)), ...], as far as they are this process's;
    ends after the next batch if asked to."""
    code = numpy.uint16 if len(vqgan.quantize.embedding.weight) <= 2**16 else numpy.int32
    device = next(vqgan.parameters()).device
    todo = [(path, index[sum(map(len, read_shard(path)[1])):]) for path, index in probe.local_shard(shards)]
    at_once = max(1, probe.images_at_once(data, device) // views)
    todo = [(path, index.split(at_once)) for path, index in todo if len(index)]
    crops = [(part, None if views == 1 else unified.hash_ints(part[:, None], torch.arange(views)))
             for _, parts in todo for part in parts]
    bar, batches = probe.progress_bar(len(crops), "ids", "batches"), data.batches(crops, workers)
    for path, parts in todo:
        (ids, labels), saved = read_shard(path), time.monotonic()
        for left in reversed(range(len(parts))):
            x, y = next(batches)
            with torch.no_grad():
                found = vqgan.encode(x.flatten(0, -4).to(device))       # (B * V, h, w)
            ids.append(found.cpu().numpy().astype(code).reshape(len(y), views, -1))
            labels.append(y.numpy())
            bar.update()
            if not left or probe.SIGNALS or time.monotonic() - saved > 60:
                done, saved = [numpy.concatenate(parts) for parts in (ids, labels)], time.monotonic()
                write_file(path, lambda file: numpy.savez(file, ids=done[0], labels=done[1]))
            if probe.SIGNALS:
                return


def join_shards(shards, ids_path, labels_path, shape):
    """One file of the ids of all shards, shape (N, V, L), and before it one of their labels: when the
    ids are there, so is everything."""
    def write(file):
        labels = []
        for path, index in shards:
            ids, found = read_shard(path)
            if sum(map(len, found)) != len(index):
                raise UserError(f"{path} was lost while ids were made; start again with --resume")
            if not labels:
                header = {"descr": ids[0].dtype.str, "fortran_order": False, "shape": shape}
                numpy.lib.format.write_array_header_1_0(file, header)
            file.write(ids[0].tobytes())
            labels += found
        write_file(labels_path, lambda file: numpy.save(file, numpy.concatenate(labels)))
    if not ids_path.exists():                           # else another run was faster
        write_file(ids_path, write)
    shutil.rmtree(shards[0][0].parent, ignore_errors=True)


def cache_ids(folder, vqgan, data, views, workers=0):
    """Ids of every image, (N, V, L), mapped from folder/ids-<fingerprint>.npy, and the labels (N,) that
    belong to them.

    views  V crops of each image; 1 means the whole image.
    Finished ids of the same tokenizer, data and crops are read, unfinished ones continued; processes divide
    the work, runs may use one folder. uint16, or int32 where the codebook has more codes than that counts.
    Raises Stopped if a signal asks for the end.
    """
    strict = isinstance(data, probe.ImageFolder) and data.strict        # then no image stands in for another
    about = (views, "strict") if strict else views
    mark = unified.rank_zero_first(lambda: fingerprint(vqgan, data, about))
    ids, labels = (pathlib.Path(folder) / f"{name}-{mark}.npy" for name in ("ids", "labels"))
    if not unified.rank_zero_first(ids.exists):
        parts = enumerate(torch.arange(len(data)).split(SHARD))
        shards = [(ids.with_suffix("") / f"{k:06d}.npz", index) for k, index in parts]
        make_shards(shards, vqgan, data, views, workers)
        if probe.asked_to_stop():
            raise Stopped("while ids were made")
        shape = (len(data), views, (data.size // vqgan.stride) ** 2)
        unified.rank_zero_first(lambda: join_shards(shards, ids, labels, shape))
    try:
        return numpy.load(ids, mmap_mode="c"), torch.from_numpy(numpy.load(labels))
    except (OSError, ValueError) as error:
        raise UserError(f"{ids} and its labels cannot be read ({error}); delete them, and they are made anew")


# Images, charts, and what the run has learned


SAMPLES = 64                                            # images on samples.png


def draw_images(cfg, model, test_set, steps):
    """samples.png of fixed seeds, with labels a column a class, if the model can start from nothing;
    reconstructions.png, if it rebuilds what is masked of an image."""
    if model.generates:
        columns = torch.arange(SAMPLES, device=cfg.device) % 8
        options = {"labels": columns % model.classes} if cfg.labels else {}
        total = model.num_steps(steps)
        with probe.autocast(cfg), probe.progress_bar(total, "samples", "steps") as bar:
            for state in until_asked(model.sample_steps(SAMPLES, steps=steps, **options)):
                bar.update()
            x = model.render(state).float().cpu()
        unified.image_grid(x).save(pathlib.Path(cfg.out_dir, "samples.png"))
    if model.reconstructs and not model.tokenizer:
        draw_reconstructions(cfg, model.reconstruct, test_set)


def draw_reconstructions(cfg, reconstruct, data):
    """reconstructions.png: at most 32 test images, each row of originals above the rows that
    reconstruct(x) makes of them."""
    x, _ = probe.map_images(lambda x: x, data, 32, workers=cfg.workers)
    torch.manual_seed(0)
    with probe.autocast(cfg):
        kinds = [x, *(y.cpu() for y in reconstruct(x.to(cfg.device)))]
    columns = min(8, len(x))
    rows = torch.stack([y[:len(x) // columns * columns].unflatten(0, (-1, columns)) for y in kinds], 1)
    names = (["input"] + ["masked"] * (len(kinds) - 2) + ["output"]) * len(rows)
    sheet = unified.image_grid(rows.flatten(0, 2), columns, rows=names)
    sheet.save(pathlib.Path(cfg.out_dir, "reconstructions.png"))


def ticks(low, high, logarithmic):
    """Round numbers from low to high, to be written at an axis."""
    found = [k * 10.0 ** decade for decade in range(-12, 13) for k in (1, 2, 5)]
    if logarithmic:
        found = [v for v in found if low <= v <= high]
        return found[::3] if len(found) > 8 else found
    unit = next((v for v in found if high - low <= 6 * v), high - low)
    return [k * unit for k in range(math.ceil(low / unit), math.floor(high / unit) + 1)]


def line_chart(curves, title, size=(900, 500), axes=("step", "loss"), logarithmic=True):
    """Line chart as a PIL image. curves: {name: [(x, y), ...]}, on one scale, logarithmic (if allowed) where
    y grows tenfold, and named where they end. Curves of few points have dots."""
    image, font = PIL.Image.new("RGB", size, "white"), PIL.ImageFont.load_default(14)
    draw, ends = PIL.ImageDraw.Draw(image), []          # (height, name, color) where a curve ends
    points = [p for curve in curves.values() for p in curve if math.isfinite(p[1])] or [(1, 1)]
    left, top, right, bottom = 70, 40, size[0] - 80, size[1] - 50
    (_, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points))
    y1 += y1 == y0
    scale = math.log if logarithmic and 0 < 10 * y0 < y1 else float

    def place(x, y):
        return (left + x / x1 * (right - left),
                bottom - (scale(y) - scale(y0)) / (scale(y1) - scale(y0)) * (bottom - top))

    def write(x, y, text, color="black", anchor="mm"):
        draw.text((x, y), text, color, font, anchor)
    write((left + right) / 2, 20, title)
    write((left + right) / 2, size[1] - 12, axes[0])
    write(left - 8, 20, axes[1], anchor="rm")
    for x in ticks(0, x1, False):
        write(place(x, y0)[0], bottom + 14, f"{x:g}")
    for y in ticks(y0, y1, scale is math.log):
        draw.line((place(0, y), place(x1, y)), "#dddddd")
        write(left - 8, place(0, y)[1], f"{y:.4g}", anchor="rm")
    draw.rectangle((left, top, right, bottom), outline="gray")
    for (name, curve), color in zip(curves.items(), ("#1f77b4", "#d62728")):
        line = [place(x, y) for x, y in curve if math.isfinite(y)]
        draw.line(line, color, 2)
        for x, y in line if len(line) < 20 else ():
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=color)
        ends += [(line[-1][1], name, color)] if line else []
    for above, (y, name, color) in enumerate(sorted(ends, reverse=True)):
        write(right + 8, y - 20 * above, name, color, anchor="lm")      # so apart, should the curves meet
    return image


def stack_images(images):
    """PIL images below each other."""
    sheet = PIL.Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)), "white")
    for k, image in enumerate(images):
        sheet.paste(image, (0, sum(i.height for i in images[:k])))
    return sheet


def loss_charts(folder):
    """Training and held-out loss of tokenizer and model, by step; without a contrastive term."""
    for stage in ("tokenizer", "model"):
        rows = [r for r in read_rows(folder) if r["stage"] == stage]
        curves = {name: [(r["step"], r.get("masked", r[name])) for r in rows if name in r]
                  for name in ("loss", "held_out")}
        curves = {name: [p for p in curve if p[1] is not None] for name, curve in curves.items()}
        if any(curves.values()):
            yield line_chart(curves, stage)


def report(cfg, model, ema, train_set, test_set):
    """What has been learned, in figures and images, and what to type next."""
    vqgan, folder = model.tokenizer, pathlib.Path(cfg.out_dir)
    figures, floor = measure_tokenizer(cfg, vqgan, test_set, len(test_set)) if vqgan else ({}, 0)
    with averaged(model, ema):
        draw_images(cfg, model, test_set, steps=None if vqgan else 25)
    if charts := list(loss_charts(folder)):             # none if log.jsonl is gone
        stack_images(charts).save(folder / "loss.png")
    no_probe = probe.no_probe(train_set, test_set)
    known = [] if no_probe else [probe.with_labels(data) for data in (train_set, test_set)]
    top1 = {} if no_probe else probe_features(cfg, model, ema, *known)
    spent = {"cpu_minutes": time.process_time() / 60} if cfg.resume is None else {}    # of this process alone
    write_row(cfg, stage="report", step=0, **figures, probe=top1, **spent)
    for data, fate in ((train_set, "another took its place"), (test_set, "left out")):
        if data.unreadable:
            print_once(f"{len(data.unreadable)} images of {probe.shown(data.root)} cannot be read: {fate}")
    if vqgan:
        possible = min(1, len(test_set) * model.length / model.codes)           # an id uses one code
        print_once(f"\ntokenizer   {figures['psnr']:.2f} dB PSNR on {len(test_set)} test images, "
                   f"{figures['codes_used']:.0%} of the codes used"
                   + f" ({len(test_set) * model.length} tokens can use {possible:.0%})" * (possible < 1))
        if figures["codes_used"] < 0.1 * possible or figures["psnr"] < floor:
            print_once(f"            it {better_tokenizer(cfg)}: a mosaic, each token's square in its mean "
                       f"colour, has {floor:.2f} dB")
    images = [folder / f"{name}.png" for name in ("samples", "reconstructions", "loss")]
    print_once(f"images      {', '.join(str(path) for path in images if path.exists())}")
    if top1:
        print_once(f"linear probe (ridge, {min(len(known[0]), 10_000)} training images), accuracy on the "
                   "test set")
        place = f"layer {model.best_layer}, t {model.best_t:g}, {model.pools[0]}"
        for name, title in zip(top1, (f"features of {cfg.model}: {place}", probe.untrained_title(model),
                                      "raw pixels")):
            print_once(f"    {top1[name]:6.1%}  {title}")
        probe.tell_no_gain(top1["features"], top1["the same network untrained"], len(known[1]))
    else:
        print_once(f"no probe: {no_probe}")
    run = shlex.quote(folder.as_posix())
    print_once("next")
    if model.generates:
        print_once(f"    python sample.py {run} --n 64 --gif         more images, and how they come about")
    probes = "--head knn            other ways to read the features"
    print_once(f"    python probe.py {run} " + (probes if top1 else
                                               "--save features.npz   features of all these images"))
    lent = "" if top1 else "--dataset shapes "
    print_once(f"    python probe.py {run} OTHER_RUN {lent}--pool mean --limit 2000   runs in one table\n")


def better_tokenizer(cfg):
    """What a poor tokenizer lacks, and how to get a better one, in words."""
    if lender := next((name for name in ("predictor", "init", "tokenizer") if getattr(cfg, name)), ""):
        return f"knows little of these images, take another --{lender}"
    usual = defaults(cfg)["tokenizer_steps"]
    more = f" ({usual} are usual)" * (usual > cfg.tokenizer_steps)
    return "has learned little; start another run, with another --out-dir and more --tokenizer-steps than " \
           f"{cfg.tokenizer_steps}{more}"


def probe_features(cfg, model, ema, train_set, test_set):
    """{what is read: accuracy on the test set} by ridge regression, of the model, of the same network
    untrained, and of pixels."""
    config = unified.load_checkpoint(pathlib.Path(cfg.out_dir, "model.pt"))["config"]
    fresh = probe.untrained(model, config)
    readers = {"features": model.embed, "the same network untrained": fresh.embed,
               "raw pixels": probe.pixel_vectors}
    top1 = {}
    with averaged(model, ema if recipe_of(cfg)["probe_ema"] else {}):
        for name, read in readers.items():
            parts = [probe.map_images(read, data, 10_000, cfg.workers, cfg.device, name)
                     for data in (train_set, test_set)]
            top1[name] = probe.ridge_probe(*parts[0], *parts[1])
    return top1


# How fast it is: --benchmark. Rates are of whole steps of train(), on random data; operations are those
# of the model, counted once.

SECONDS = 1.0                                           # that everything is repeated for, at least


def rounds(cfg, took, at_once=50, seconds=None):
    """Yields until so many seconds have passed, after a few times that do not count, and appends the
    seconds from one time to the next to the list took. A GPU is waited for after so many times at
    once."""
    cuda, started = cfg.device.startswith("cuda"), None
    at_once, warm = (at_once, 10) if cuda else (1, 1)
    for i in itertools.count(-warm):
        if cuda and i % at_once == 0:
            torch.cuda.synchronize()
        if i == 0:
            started = time.perf_counter()
        elif i > 0 and i % at_once == 0 and time.perf_counter() - started >= (seconds or SECONDS):
            return took.append((time.perf_counter() - started) / i)
        yield


def seconds_a_call(cfg, function, seconds=None):
    """Seconds that a call of function() takes."""
    took = []
    for _ in rounds(cfg, took, seconds=seconds):
        function()
    return took[0]


def seconds_a_step(cfg, model, x, plain):
    """Seconds that a step of train() takes on the batch x. plain: AdamW, if that it is, as torch would have
    it by default, and a wait for the device in every step."""
    took, batch, labels = [], len(x), torch.zeros(len(x), dtype=torch.long)
    recipe = dict(unified.MODELS[cfg.model].recipe, steps=10**9, batch_size=batch, micro_batch=batch, lr=1e-4)
    if plain:
        recipe.setdefault("optimizer", functools.partial(adamw, fused=None))
    batches = ((x, labels) for _ in rounds(cfg, took, 1 if plain else 50))
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(StopIteration):   # no more batches
        cfg = dataclasses.replace(cfg, out_dir=folder, log_every=10**9, eval_every=0, save_every=10**9)
        train(cfg, "model", model, recipe, x, lambda _: batches, {}, None,
              lambda step, first: model.micro_batch_args(first, batch), model.after_step)
    return took[0]


def step_operations(model, x):
    """Floating-point operations of a training step on a batch like x, found on a copy that computes
    nothing; of making ids only the encoder's convolutions count, as in the papers."""
    model, x = copy.deepcopy(model).to("meta"), x.to("meta")
    with FlopCounterMode(display=False) as counter:
        if model.tokenizer and x.is_floating_point():
            z = model.vqgan.encoder(x.flatten(0, -4))
            x = z[:, 0].flatten(1).long().view(*x.shape[:-3], -1)
        model(x)[0].backward()
    return counter.get_total_flops()


def benchmark_paths(cfg):
    """{title: (settings, model, images or ids)}: as train.py runs the model, on ids made in every step,
    too, if it reads ids, and as plain as can be: float32, attention written out, nothing compiled or
    fused."""
    method, grid = unified.MODELS[cfg.model], math.isqrt(cfg.ids)
    torch.manual_seed(cfg.seed)
    lent = cfg.tokenizer or cfg.init                            # --predictor is in --tokenizer by now
    arch = get_tokenizer(cfg, None, None)[1] if lent else tokenizer_arch(cfg) if method.tokenizer else None
    fast = unified.build(unified.model_config(cfg.model, cfg.size, cfg.image_size, grid, arch)).to(cfg.device)
    plain = copy.deepcopy(fast)
    batch = cfg.micro_batch or micro_batch_size(cfg, cfg.batch_size, image_bytes(cfg, fast))
    for module in plain.modules():
        if isinstance(module, unified.Attention):
            module.fused = False
    if cfg.compile:
        probe.compile_blocks(fast)
    cfg = dataclasses.replace(cfg, compile=False, labels=False)
    plain_cfg = dataclasses.replace(cfg, dtype="float32")
    x = torch.rand(batch, method.views, 3, cfg.image_size, cfg.image_size, device=cfg.device)
    if not method.tokenizer:
        return {"pixels": (cfg, fast, x), "pixels, plain path": (plain_cfg, plain, x)}
    ids = torch.randint(fast.codes, (batch, method.views, fast.length), device=cfg.device)
    return {"cached ids": (cfg, fast, ids), "cached ids, plain path": (plain_cfg, plain, ids),
            "ids made in every step": (cfg, fast, x)}


def reading_rate(cfg, batch):
    """Images a second that the data set hands over: in memory, or decoded by worker processes."""
    data, views = open_data(cfg)[0], unified.MODELS[cfg.model].views
    order = plan(len(data), cfg.seed, dict(views=views, batch_size=batch, micro_batch=batch), 0, 10**6)
    batches, on_cpu = data.batches(order, cfg.workers), dataclasses.replace(cfg, device="cpu")
    return batch / seconds_a_call(on_cpu, lambda: next(batches)[0].flatten()[0].item(), 5.0)


def first_loss(cfg, model, x):
    """The loss before any step, on draws that are the same for every path."""
    torch.manual_seed(0)
    with torch.no_grad(), probe.autocast(cfg):
        return model.eval()(x.squeeze(1), **model.micro_batch_args(0, len(x)))[0].item()


def benchmark(cfg):
    """Print the speed of training, by every path. All are measured five times, in turn, since the speed
    of a machine drifts: the figures are medians."""
    paths, cuda, memory, turns = benchmark_paths(cfg), cfg.device.startswith("cuda"), [], []
    losses = [first_loss(*path) for path in paths.values()]
    yardstick = getattr(torch, cfg.dtype) if cuda else torch.float32    # most CPUs only emulate bfloat16
    n = 8192 if cuda else 2048
    matrix = torch.randn(n, n, device=cfg.device, dtype=yardstick)
    numbers = torch.randn(n * n, device=cfg.device)
    for _ in tqdm.tqdm(range(5), "measuring", leave=False):
        turns.append([seconds_a_call(cfg, lambda: matrix @ matrix), seconds_a_call(cfg, numbers.clone)])
        for title, path in paths.items():
            turns[-1].append(seconds_a_step(*path, plain="plain" in title))
            memory.append(torch.cuda.max_memory_allocated() / 2**30 if cuda else 0)
    product, copying, *seconds = numpy.array(turns).T   # (5,) each
    product, copying = 2 * n ** 3 / product, 2 * numbers.nbytes / copying
    batch = len(next(iter(paths.values()))[2])
    if cuda:
        print(f"memory at most {memory[0]:.1f} GiB")
    print(f"{cfg.model} {cfg.size}, {cfg.image_size} pixels, {batch} images a step, {cfg.dtype} on "
          f"{cfg.device}")
    print(f"measured here: {str(yardstick)[6:]} matrix product {numpy.median(product) / 1e12:.3g} TFLOP/s, "
          f"copy {numpy.median(copying) / 1e9:.3g} GB/s")
    for took, loss, (title, (_, model, x)) in zip(seconds, losses, paths.items()):
        rate = step_operations(model, x.squeeze(1)) / took
        print(f"{title:24s} {numpy.median(batch / took):8.1f} images/s "
              f"+- {numpy.ptp(took) / 2 / numpy.median(took):.0%}  {numpy.median(rate) / 1e12:8.3f} TFLOP/s  "
              f"{numpy.median(rate / product):4.0%} of the product  loss {loss:.4f}")
    print("; ".join(f"{title}: {numpy.median(took / seconds[0]):.2f} times as long"
                    for took, title in zip(seconds[1:], list(paths)[1:])))
    if cfg.dataset != "shapes":
        try:
            print(f"images of {cfg.dataset}, read and cropped by {cfg.workers} workers: "
                  f"{reading_rate(cfg, batch):.1f} images/s")
        except UserError as error:
            print(f"reading was not measured: {error}")


if __name__ == "__main__":
    unified.run_main(main)
