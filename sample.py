"""Images from a trained model: from nothing, for a label, or inside a mask in images of your own.

    python sample.py out/RUN                                        64 images in one PNG
    python sample.py out/RUN --gif                                  and how they come about
    python sample.py out/RUN --label star --guidance 2              after training with --labels
    python sample.py out/RUN --guide out/WEAKER --guidance 2        clearer; 2 passes a step
    python sample.py out/RUN --image a.png --mask m.png             inpaint where the mask is white
    python sample.py out/RUN --image a.png b.png --box 8,8,24,24 0,0,16,32
                                                                    a box in each image; --outside: all
                                                                    but the box
    python sample.py out/RUN --n 50000 --npz samples.npz            for FID tools; others read --png-dir DIR
    torchrun --standalone --nproc-per-node 8 -- sample.py out/RUN   the same on 8 GPUs; mind the lone --

Image i depends on the weights, --seed and i, not on --n and, but for rounding, not on --batch.
"""
import collections
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import pathlib
import zipfile

import numpy
import PIL.Image
import torch
import torch.distributed

import unified
from probe import (compile_blocks, image_files, is_image, progress_bar, results_folder, shown_size, writable,
                   write_file)
from unified import UserError, flag


# What --order takes: functions (tokens on a side, seeds (n,)) -> order, as sample_steps takes it. For a row
# of your own extend the help of --order; if it ignores confidence check_flags() is to refuse --temperature.
# When inpainting, what is masked is known in the call of the order only. The cell of lowest priority stays
# masked to the end: ADDP shows its mean. A set of --png-dir knows the row by its name: after a change of the
# function begin another set.
# Random numbers of its own: unified.hashed_uniform(seeds, 2**31, n), as decoding takes the draws below.
ORDERS = {"confidence": lambda side, seeds: None, "halton": lambda side, seeds: halton_order(side, seeds)}


@dataclasses.dataclass(frozen=True)
class Config:
    run: str = flag(None, "run folder, checkpoint, or weight file published by the authors",
                    positional=True, nargs="?", group="what is generated")
    n: int = flag(None, "number of images [64, or 6 for each --image; 1 where all is predicted at once]",
                  max=10**7)
    seed: int = flag(0, "random seed; another one gives other images", min=0, max=2**32 - 1)
    label: str = flag("", "class name or number; several with commas take turns, all takes every class")
    guidance: float = flag(1.0, "how much to exaggerate what the label changes; 1 is not at all",
                           min=0, max=1000)
    guidance_interval: str = flag(None, "LO,HI: guide only between these points of the way; 0 is all "
                                        "noise or masked, 1 the image")
    guide: str = flag(None, "a weaker run of the same kind, or an earlier checkpoint: --guidance moves away "
                            "from what it predicts, with or without --label")
    gif: bool = flag(False, "also write the steps as a film")

    image: str = flag((), "images to inpaint, centre-cropped to the model's size", nargs="+",
                      group="images of your own")
    mask: str = flag((), "images, white where to inpaint, of the shape of --image and cropped like it, or "
                         "squares of the model's size; one for all or one for each",
                     nargs="+")
    box: str = flag((), "instead of masks x0,y0,x1,y1 in pixels of the model's size", nargs="+")
    outside: bool = flag(False, "keep the box, or what is white in the mask, and inpaint all around it")
    reconstruct: bool = flag(False, "only send each --image through the tokenizer and back; "
                                    "umd and mae mask most of it and predict that")

    steps: int = flag(None, "steps of decoding [20, or fewer if there are fewer ids; from noise 125, of adm "
                            "250, or 25 at --eta 0]", group="how")
    schedule: str = flag(None, "models of ids: how the number of masked ones falls [cosine]",
                         choices=list(unified.SCHEDULES))
    order: str = flag(None, "models of ids: which of them are kept first; halton: such as lie far apart, "
                            "whatever their confidence [confidence]", choices=list(ORDERS))
    temperature: float = flag(None, "models of ids: Gumbel noise on the confidence; more is more varied, "
                                    "less is cleaner [6 for 16 x 16 ids, 3 for 8 x 8]", min=0)
    eta: float = flag(None, "models that start from noise: 1 is DDPM, as published; 0 is DDIM, which adds no "
                            "noise on the way [1]", min=0, max=1)
    batch: int = flag(64, "images computed at once")
    weights: str = flag("ema", "the averaged ones, where the run has them, or raw", choices=["raw", "ema"])
    adm_heads: int = flag(None, "attention heads in a file of guided-diffusion, whose own default is 4 "
                                "[one for 64 channels]")
    adm_order: str = flag(None, "channels' order in that file [legacy]; new after --use_new_attention_order",
                          choices=["legacy", "new"])

    out: str = flag("", "the PNG to write [samples-<seed>.png in the run's folder]", group="where to")
    npz: str = flag("", "also write all images to this file, as arr_0, uint8 (N, S, S, 3)")
    png_dir: str = flag("", "also write each image to this folder; what this command began is continued, and "
                            "its other files are made anew")
    overwrite: bool = flag(False, "replace files that are there")

    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1, mps",
                       group="hardware")
    dtype: str = flag(None, "of activations [bfloat16 on GPUs that compute in it, else float32]",
                      choices=["float32", "bfloat16"])
    compile: bool = flag(False, "compile the blocks: slower to start, then faster")


def main():
    cfg = find_run(Config(**unified.parse_flags(Config, __doc__)))
    check_flags(cfg)
    path = sheet_path(cfg)
    device = unified.join_processes(cfg.device)
    cfg = dataclasses.replace(cfg, out=str(path), device=str(device),
                              dtype=unified.pick_dtype(cfg.dtype, device))
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            run(cfg, device)
    finally:
        unified.leave_processes()


def run(cfg, device):
    """Generate from nothing, by all processes together; or inpaint or reconstruct, by the first."""
    model, config = unified.load_model(cfg.run, ema=cfg.weights == "ema",
                                       heads=cfg.adm_heads, order=cfg.adm_order)
    model.to(device)
    if cfg.compile:
        compile_blocks(model)
    check_model(model, config, cfg)
    if cfg.guide and not unified.can_guide(guide_of(cfg), model):
        raise UserError(f"--guide {cfg.guide} cannot guide {cfg.run}; take a run {unified.GUIDE}")
    labels = class_numbers(cfg, config.get("classes") if config.get("labels") else None)
    cfg = dataclasses.replace(cfg, n=cfg.n or (64 if not cfg.image else 6 if model.generates else 1))
    first, taken = unified.rank_and_world()[0] == 0, model.num_steps(cfg.steps, cfg.eta)
    if cfg.steps and model.max_steps < cfg.steps and first:
        unit = "ids" if model.tokenizer else "timesteps"
        print(f"--steps {cfg.steps}: there are {model.max_steps} {unit} only, and more steps gain nothing")
    elif cfg.steps not in (None, taken) and first:
        print(f"--steps {cfg.steps}: {taken} are taken, in strides of whole timesteps")
    film = film_path(cfg)
    if film.exists() and not cfg.gif and first:
        print(f"{film} is of an earlier command; --gif with --overwrite makes it anew")
    for line in idle_lines(model, cfg, taken) * first:
        print(line)
    if not cfg.image:
        generate(model, config, cfg, labels)
    elif first and cfg.reconstruct:
        reconstruct(model, cfg)
    elif first:
        inpaint(model, cfg, labels)
    if first:
        print(f"wrote {cfg.out}" + f", {film}" * cfg.gif)


# ----------------------------------------------------------------------------------------------------------
# What is generated

GRID = 64                                                       # images in the sheet and the film


def generate(model, config, cfg, labels):
    """Images from nothing: the first 64 on a sheet and, if asked for, all as .npz or PNGs, and a film. If
    this command began its --png-dir, the others are made anew."""
    folder, note = pathlib.Path(cfg.png_dir), made_by(model, config, cfg) if cfg.png_dir else None
    if not (note and unified.rank_zero_first(lambda: was_begun(folder, note, cfg))):
        check_free(cfg)
    every, first = torch.arange(cfg.n), unified.rank_and_world()[0] == 0
    outputs = [(every[:GRID], lambda batches: write_sheet(cfg.out, batches))]
    if cfg.npz:
        shape = (cfg.n, model.image_size, model.image_size, 3)
        outputs.append((every, lambda batches: write_npz(pathlib.Path(cfg.npz), batches, shape)))
    if cfg.png_dir:
        missing = unified.rank_zero_first(lambda: missing_pngs(folder, note, cfg))
        outputs.append((missing, lambda batches: write_pngs(folder, batches)))
    for index, write in outputs:
        batches = image_batches(model, cfg, index, labels)
        if first:
            write(batches)
        else:
            collections.deque(batches, 0)                       # helps to make them, keeps none
    if cfg.gif and first:
        [(_, states)] = state_batches(model, cfg, [every[:GRID]], labels)
        write_film(film_path(cfg), frames(model, cfg, states))


def inpaint(model, cfg, labels):
    """A row for each --image: as it is, with its mask, and inpainted n times."""
    x = own_images(model, cfg).to(cfg.device)
    mask = inpainting_masks(cfg, model.image_size).to(cfg.device)
    check_free(cfg)
    inpainting = {"known": x.repeat_interleave(cfg.n, 0), "mask": mask.repeat_interleave(cfg.n, 0)}
    batches, films = torch.arange(len(x) * cfg.n).split(cfg.batch), []
    for _, states in state_batches(model, cfg, batches, labels, **inpainting):
        films.append(torch.stack(frames(model, cfg, states, 25 if cfg.gif else 1)))     # (steps, B, 3, S, S)
    film = torch.cat(films, 1).unflatten(1, (len(x), cfg.n))                    # (steps, images, n, 3, S, S)
    given = torch.stack([x, torch.where(mask[:, None], 0.2, x)], 1).cpu()       # (images, 2, 3, S, S)
    sheets = [torch.cat([given, frame], 1).flatten(0, 1) for frame in film]
    names = ["input", "mask"] + ["sample" if model.generates else "output"] * cfg.n
    unified.image_grid(sheets[-1], names=names).save(cfg.out)
    if cfg.gif:
        write_film(film_path(cfg), sheets, names)


def reconstruct(model, cfg):
    """Each --image beside what the model's reconstruct() makes of it."""
    x = own_images(model, cfg)
    check_free(cfg)
    torch.manual_seed(cfg.seed)
    row = [x, *(y.cpu() for y in model.reconstruct(x.to(cfg.device)))]
    names = ["input"] + ["masked"] * (len(row) - 2) + ["output"]
    unified.image_grid(torch.stack(row, 1).flatten(0, 1), names=names).save(cfg.out)


def own_images(model, cfg):
    """--image -> (images, 3, S, S) in [0, 1]."""
    return torch.stack([unified.read_image(path, model.image_size) for path in cfg.image])


def image_batches(model, cfg, index, labels):
    """Images with the numbers index (n,), --batch at a time and process: yields their numbers (B,) and
    uint8 (B, S, S, 3), to every process."""
    rank, world = unified.rank_and_world()
    batches = index.split(cfg.batch) if len(index) else ()
    mine = state_batches(model, cfg, batches[rank::world], labels)
    for _ in range(0, len(batches), world):
        made, everyone = [], [None] * world
        for batch, states in itertools.islice(mine, 1):
            *_, state = states
            made.append((batch, unified.to_uint8(model.render(state))))
        if world > 1:
            torch.distributed.all_gather_object(everyone, made)
        yield from itertools.chain(*everyone) if world > 1 else made


def state_batches(model, cfg, batches, labels, **inpainting):
    """For each of batches, numbers of images (B,), yields it and the states of their decoding, to be used up
    before the next; a bar counts steps. inpainting: known and mask of all images."""
    def counted(states):
        for state in states:
            bar.update()
            yield state
    with progress_bar(model.num_steps(cfg.steps, cfg.eta) * len(batches), "images", "steps") as bar:
        for batch in batches:
            of_batch = {name: v[batch.to(v.device)] for name, v in inpainting.items()}
            yield batch, counted(decode(model, cfg, batch.to(cfg.device), labels, **of_batch))


OPTIONS = ("steps", "schedule", "order", "temperature", "eta")  # of sample_steps, where a model takes them


def decode(model, cfg, index, labels, **inpainting):
    """The images with the numbers index (B,): yields the state after each step, see Model.sample_steps."""
    options, seeds = {name: getattr(cfg, name) for name in OPTIONS}, (cfg.seed << 32) + index
    options["order"] = ORDERS[cfg.order](model.grid, seeds) if cfg.order else None
    if labels is not None:
        options["labels"] = labels.to(cfg.device)[index % len(labels)]
    if cfg.guidance != 1:
        options |= {"guidance": cfg.guidance, "guide": guide_of(cfg)}
    if cfg.guidance_interval:
        options["guidance_interval"] = parse_interval(cfg.guidance_interval)
    options = {name: value for name, value in options.items() if value is not None}
    return model.sample_steps(len(index), seeds=seeds, **options, **inpainting)


# Tokens that are found in one step do not know of one another, so it helps if they lie far apart. Successive
# points of the Halton sequence do, and yet fill the grid evenly [Besnier et al. 2025, 2503.17076].


def halton_cell(i, base, side):
    """In which of side cells in a row the i-th point lies. Its digits are those of i, mirrored at the point:
    i = 6, which is 110 in base 2, gives 0.011, which is 3/8."""
    digits = numpy.base_repr(i, base)
    return side * int(digits[::-1], base) // base ** len(digits)


@functools.cache
def halton_cells(side):
    """The cells of a grid, numbered row by row, in the order in which points first fall into them: rows in
    base 2, columns in base 3, int (side * side,) (official file: halton_sampler.py)."""
    cells = {}
    for i in itertools.count(1):
        cells[side * halton_cell(i, 2, side) + halton_cell(i, 3, side)] = i
        if len(cells) == side * side:
            return torch.tensor([*cells])


def halton_order(side, seeds):
    """What sample_steps takes as order=, of images with these seeds (n,): each begins at a place of its own
    in halton_cells, and then goes round."""
    place = halton_cells(side).argsort().to(seeds.device)                                   # (L,)
    priority = (unified.hash_ints(seeds, side)[:, None] - place) % (side * side)            # (n, L)
    return lambda confidence, mask, t: priority


def guide_of(cfg):
    """The model of --guide; None without one."""
    return load_guide(cfg.guide, cfg.device, cfg.weights == "ema", cfg.adm_heads, cfg.adm_order) \
        if cfg.guide else None


@functools.cache                                                # every batch asks for it
def load_guide(path, device, ema, heads, order):
    return unified.load_model(path, ema=ema, heads=heads, order=order)[0].to(device)


# ----------------------------------------------------------------------------------------------------------
# How it is written: a sheet, a film, an .npz, a folder of PNGs


def write_sheet(path, batches):
    """One PNG of all images."""
    x = torch.cat([torch.from_numpy(x) for _, x in batches])                    # (n, S, S, 3)
    sheet = unified.image_grid(x.movedim(-1, 1) / 255)
    write_file(pathlib.Path(path), functools.partial(sheet.save, format="PNG"))


def write_film(path, frames, names=()):
    """Frames (n, 3, S, S) in [0, 1] -> a GIF of the sheet, three frames a second, the last one held."""
    sheets = [unified.image_grid(x, min_side=512, names=names) for x in frames]
    duration = [330] * (len(sheets) - 1) + [2500]
    write_file(pathlib.Path(path), lambda file: sheets[0].save(
        file, "GIF", save_all=True, append_images=sheets[1:], duration=duration, loop=0))


def frames(model, cfg, states, most=25):
    """Images (n, 3, S, S) of the states, at most so many, evenly spread, the last one included."""
    steps = model.num_steps(cfg.steps, cfg.eta)
    stride = math.ceil(steps / most)
    return [model.render(state).cpu() for i, state in enumerate(states, 1) if (steps - i) % stride == 0]


def write_npz(path, batches, shape):
    """All images, streamed into an .npz, so that 50,000 need no memory; complete or not there."""
    def write(file):
        with zipfile.ZipFile(file, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as array:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            numpy.lib.format.write_array_header_1_0(array, header)
            for _, x in batches:
                array.write(x.tobytes())
    write_file(path, write)


def write_pngs(folder, batches):
    """Each image as 000000.png, 000001.png, ...; none is ever half written."""
    for index, x in batches:
        for i, image in zip(index.tolist(), x):
            save = functools.partial(PIL.Image.fromarray(image).save, format="PNG")
            write_file(folder / f"{i:06d}.png", save)


NOTE = "made-by.json"                                           # in --png-dir; nobody takes it for an image


def made_by(model, config, cfg):
    """What images depend on: a digest of network and weights, and the options that change them; None for one
    that says what is usual."""
    digest = hashlib.sha256(json.dumps(config["arch"], sort_keys=True).encode())
    for net in filter(None, (model, guide_of(cfg))):
        for tensor in net.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
    usual = {"steps": model.num_steps(None, cfg.eta), "schedule": "cosine", "order": "confidence", "eta": 1.0}
    options = ["seed", "steps", "temperature", "eta", "label", "guidance", "dtype"]  # in notes of older sets
    found = {name: None if getattr(cfg, name) == usual.get(name) else getattr(cfg, name)
             for name in (*options, *OPTIONS, "guidance_interval")}
    return {"weights": digest.hexdigest(),
            **{name: value for name, value in found.items() if name in options or value is not None}}


def note_in(folder):
    """What made_by() said of the images in a folder; None if nobody knows."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / NOTE).read_text())


def was_begun(folder, note, cfg):
    """Whether a command with this note has begun to fill the folder. UserError if it holds images that were
    made otherwise, or more of these."""
    found = note_in(folder)
    same = found == note
    if (found or image_files(folder, [])) and not cfg.overwrite:
        if not same:
            raise UserError(f"{folder} holds images that other weights, options or another seed made, or no "
                            "sample.py at all; take another --png-dir, or --overwrite, which deletes those "
                            "that are numbered")
        if any(int(p.stem) >= cfg.n for p in folder.glob("*.png") if p.stem.isdecimal()):
            raise UserError(f"{folder} holds more of these images than --n {cfg.n}; name as many, or take "
                            "another --png-dir")
    return same


def missing_pngs(folder, note, cfg):
    """Numbers of the images that the folder lacks, with --overwrite all."""
    if cfg.overwrite:
        for path in folder.glob("*.png"):
            if path.stem.isdecimal():                           # else a smaller set would keep some of them
                path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / NOTE, lambda file: file.write(json.dumps(note).encode()))
    lacking = [i for i in range(cfg.n) if not (folder / f"{i:06d}.png").exists()]
    return torch.tensor(lacking, dtype=torch.long)


# ----------------------------------------------------------------------------------------------------------
# Flags: what they mean, and what makes no sense


def class_numbers(cfg, names):
    """--label -> class numbers (k,), of which image i gets number i modulo k; None without a label."""
    if not cfg.label:
        if cfg.guidance != 1 and not cfg.guide:
            raise UserError(f"--guidance {cfg.guidance:g} exaggerates a label; add --label, or a --guide")
        return None
    if not names:
        raise UserError(f"--label {cfg.label}: {cfg.run} was trained without labels; "
                        "train.py --labels makes one that takes them")
    by_number = not any(name.isdecimal() for name in names)             # else 1 would mean two classes
    numbers = {str(i): i for i in range(len(names)) if by_number} | {name: i for i, name in enumerate(names)}
    asked = [cfg.label] if cfg.label in names else names if cfg.label == "all" else cfg.label.split(",")
    for name in asked:
        if name not in numbers:
            known = ", ".join(names[:20]) + ", ..." * (len(names) > 20) + \
                f", or 0 to {len(names) - 1}" * by_number
            raise UserError(f"--label {name} is no class; they are {known}")
    return torch.tensor([numbers[name] for name in asked])


def inpainting_masks(cfg, size):
    """--mask or --box -> bool (images, size, size), True = inpainted. One serves all images."""
    places = cfg.mask or cfg.box
    places = places * len(cfg.image) if len(places) == 1 else places
    masks = [read_mask(place, image, size) if cfg.mask else box_mask(place, size)
             for place, image in zip(places, cfg.image)]
    for name, mask in zip(places, masks):
        if mask.all() if cfg.outside else not mask.any():
            raise UserError(f"{name} leaves nothing to inpaint, which is what is white, or inside a box, "
                            "or with --outside the rest")
    return torch.stack(masks) ^ cfg.outside


def read_mask(path, image, size):
    """A mask for an image, both files -> bool (size, size), True where it is white. A square of the model's
    size is that of what the model sees; any other has the image's shape, and is cut as the image is."""
    with unified.reading(image, "an image"), PIL.Image.open(image) as opened:
        width, height = shown_size(opened)
    with unified.reading(path, "a mask"), PIL.Image.open(path) as mask:
        mask = unified.upright(mask, "black")                                   # what is transparent is kept
    if mask.size == (size, size):
        width, height = mask.size
    if abs(mask.width * height - mask.height * width) > max(width, height, *mask.size):
        raise UserError(f"--mask {path} has {mask.width} x {mask.height} pixels and {image} {width} x "
                        f"{height}; give it the image's shape")
    return unified.from_image(mask.resize((width, height), PIL.Image.Resampling.NEAREST), size,
                              nearest=True).float().mean(0) > 127


def box_mask(box, size):
    """'x0,y0,x1,y1' -> bool (size, size), True inside."""
    try:
        x0, y0, x1, y1 = map(int, box.split(","))
    except ValueError:
        x0 = y0 = x1 = y1 = -1
    if not (0 <= x0 < x1 <= size and 0 <= y0 < y1 <= size):
        raise UserError(f"--box {box} is not x0,y0,x1,y1 with 0 <= x0 < x1 <= {size} "
                        f"and 0 <= y0 < y1 <= {size}, in pixels of the model")
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


def film_path(cfg):
    """Where the film goes, beside the sheet."""
    return pathlib.Path(cfg.out).with_suffix(".gif")


def sheet_path(cfg):
    """Where the sheet goes. UserError for outputs that cannot be written, or share a place."""
    kind = "reconstructed" if cfg.reconstruct else "painted" if cfg.image else "samples"
    path = pathlib.Path(cfg.out) if cfg.out else results_folder(cfg.run) / f"{kind}-{cfg.seed}.png"
    if path.suffix.lower() != ".png":
        raise UserError(f"--out {path} is to be a PNG; give it a name that ends in .png")
    places = {"--out": path, "--gif": cfg.gif and path.with_suffix(".gif"), "--npz": cfg.npz}
    files = [writable(place, name) for name, place in places.items() if place]
    if len({os.path.realpath(file) for file in files}) < len(files):
        raise UserError(f"--npz {cfg.npz} is where another output goes; name another file")
    folder = writable(cfg.png_dir, "--png-dir", folder=True) if cfg.png_dir else None
    if folder and os.path.realpath(folder) in {os.path.realpath(file.parent) for file in files}:
        raise UserError(f"--png-dir {folder} gets other output, too; name a folder for its images alone")
    return path


def check_free(cfg):
    """UserError if an output is there already. It comes last, so that other mistakes are told first."""
    for file in filter(None, (cfg.out, cfg.gif and film_path(cfg), cfg.npz)):
        if os.path.exists(file) and not cfg.overwrite:
            raise UserError(f"{file} is there already; --overwrite replaces it, --out takes another name, "
                            "--seed other images")


def find_run(cfg):
    """The settings with their run: behind --image A B, say, the parser took it for one of those."""
    for name in ("image", "mask", "box"):
        *words, last = getattr(cfg, name) or [""]
        if cfg.run is None and words and os.path.exists(last) and not is_image(pathlib.Path(last)):
            cfg = dataclasses.replace(cfg, run=last, **{name: words})
    if cfg.run is None:
        raise UserError("name the run, first or last: python sample.py out/RUN")
    return cfg


def check_flags(cfg):
    """UserError for flags that make no sense together."""
    if cfg.reconstruct and not cfg.image:
        raise UserError("--reconstruct needs images; name them with --image")
    if cfg.image and bool(cfg.box) + bool(cfg.mask) + cfg.reconstruct != 1:
        raise UserError("--image needs to know where to inpaint; say either --box x0,y0,x1,y1 or --mask FILE "
                        "or --reconstruct")
    if (cfg.box or cfg.mask or cfg.outside) and not cfg.image:
        raise UserError("--box, --mask and --outside are about your own images; name them with --image")
    if cfg.image and (cfg.npz or cfg.png_dir):
        raise UserError("--npz and --png-dir are for images from nothing; leave --image out")
    if cfg.order == "halton" and cfg.temperature is not None:
        raise UserError("--temperature does nothing with --order halton, which has no noise; leave it out")
    if cfg.reconstruct and cfg.outside:
        raise UserError("--outside is about a --box or --mask, and --reconstruct has none; leave one out")
    if cfg.reconstruct and cfg.gif:
        raise UserError("--gif films steps, --reconstruct makes them at once; leave one out")
    for name in ("guide", "guidance_interval"):
        if getattr(cfg, name) and cfg.guidance == 1:
            raise UserError(f"--{name.replace('_', '-')} does nothing at --guidance 1; add --guidance 2, say")
    parse_interval(cfg.guidance_interval or "0,1")
    count = len(cfg.box or cfg.mask)
    if count == 4 and all(part.isdecimal() for part in cfg.box):
        raise UserError(f"--box takes its numbers with commas between them: --box {','.join(cfg.box)}")
    if count not in (0, 1, len(cfg.image)):
        raise UserError(f"{count} masks or boxes for {len(cfg.image)} images; give one, or one for each")


def parse_interval(text):
    """'LO,HI' -> (LO, HI). UserError unless 0 <= LO < HI <= 1."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low = high = math.nan
    if not 0 <= low < high <= 1:
        raise UserError(f"--guidance-interval {text} is not LO,HI with 0 <= LO < HI <= 1; 0.2,0.8 is one")
    return low, high


def check_model(model, config, cfg):
    """UserError for what this model cannot do, and for options that its sample_steps does not take."""
    if not model.generates and not cfg.image:
        raise UserError(f"{cfg.run} has learned to fill in images, not to start from nothing; "
                        "add --image FILE --box x0,y0,x1,y1")
    if cfg.reconstruct and not model.reconstructs:
        raise UserError(f"--reconstruct: {cfg.run} has neither a tokenizer "
                        "nor learned to predict what is masked")
    signature = inspect.signature(model.sample_steps)
    asked = {name: getattr(cfg, name) for name in (*OPTIONS, "guide", "guidance_interval")}
    asked["guidance"] = cfg.guidance if cfg.guidance != 1 else None
    others = {"label": cfg.label or None, "n": cfg.n, "seed": None if cfg.reconstruct else cfg.seed or None}
    idle = [name for name, value in {**asked, **others}.items() if value is not None]
    if idle and (cfg.reconstruct or not model.generates):
        raise UserError(f"--{idle[0].replace('_', '-')} changes nothing where all is predicted at once; "
                        "leave it out")
    if cfg.image and not cfg.reconstruct:
        asked["known"] = cfg.image
    for name, value in asked.items():
        if value is not None and not unified.takes(signature, name):
            flag_name = "image" if name == "known" else name.replace("_", "-")
            other = {"temperature": "eta", "eta": "temperature"}.get(name)
            remedy = f"take --{other}" if other in signature.parameters else "leave it out"
            raise UserError(f"{config['arch']['model']} does not take --{flag_name}; {remedy}")
    widest = 65_000 // (model.image_size + 2) - 2               # a GIF's sides are below 2 ** 16
    if cfg.image and max(cfg.n or 6, len(cfg.image)) > widest:
        raise UserError(f"{len(cfg.image)} rows of --n {cfg.n or 6} are too large a sheet; take {widest} at "
                        "most")


def same_weights(a, b):
    """Whether two networks are one."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(v.equal(b[name]) for name, v in a.items())


def idle_lines(model, cfg, steps):
    """Lines on options that change nothing, or may, in so many steps."""
    def counts(schedule):
        left = [torch.tensor([model.length])]
        for t in range(1, steps + 1):
            left.append(unified.num_masked(left[0], left[-1], t, steps, schedule, model.round_up))
        return torch.cat(left).tolist()
    lines = []
    if cfg.guide and same_weights(guide_of(cfg), model):
        lines.append(f"--guide {cfg.guide} has the weights of {cfg.run}, and changes nothing")
    if steps == 1 and model.alpha_bar is not None and model.generates and not cfg.reconstruct:
        lines.append("a single step takes pure noise for an image that is almost clean, and leaves it so")
    if steps == 1 and cfg.temperature is not None:
        lines.append("--temperature changes nothing in a single step")
    if cfg.schedule not in (None, "cosine") and not cfg.image and counts(cfg.schedule) == counts("cosine"):
        lines.append(f"--schedule {cfg.schedule} changes nothing in {steps} steps for {model.length} ids; "
                     "take other --steps")
    low, high = parse_interval(cfg.guidance_interval or "0,1")
    if (high - low) * steps < 1:
        lines.append(f"--guidance-interval {cfg.guidance_interval} is shorter than one of {steps} steps, and "
                     "may hold none")
    return lines


if __name__ == "__main__":
    unified.run_main(main)
