"""Pictures from a trained model: from nothing, for a label, or into the holes of your own pictures.

    python sample.py out/RUN                                                    64 pictures in one PNG
    python sample.py out/RUN --gif                                              and how they come about
    python sample.py out/RUN --label star --guidance 2                          after training with --labels
    python sample.py out/RUN --image a.png b.png --box 8,8,24,24 0,0,16,32      paint each picture's box anew; --outside: all but the box
    python sample.py out/RUN --image a.png --mask m.png                         paint where the mask is white
    python sample.py out/RUN --n 50000 --npz samples.npz                        for FID tools; --png-dir DIR for those that read PNG files
    torchrun --standalone --nproc-per-node 8 -- sample.py out/RUN ...           the same on 8 GPUs; mind the lone --

Picture i depends on the weights, --seed and i, not on --n or --batch.
"""
import collections
import contextlib
import dataclasses
import hashlib
import inspect
import itertools
import json
import os
import pathlib
import zipfile

import numpy
import PIL.Image
import torch
import torch.distributed
import tqdm

import unified
from probe import compile_blocks, results_folder
from train import writable, write_file
from unified import UserError, flag


@dataclasses.dataclass
class Config:
    run: str = flag(dataclasses.MISSING, "run folder, checkpoint, or weight file published by the authors", positional=True)
    n: int = flag(None, "pictures; 64, or 6 for each --image", most=10**7)
    batch: int = flag(64, "pictures computed at once")
    steps: int = flag(None, "rounds of decoding; 20, or fewer if there are fewer ids; from noise 125, of adm 250, or 25 at --eta 0")
    temperature: float = flag(None, "models of ids: Gumbel noise on the confidence; more is more varied, less is cleaner; 6 for 256 ids", least=0)
    eta: float = flag(None, "models that start from noise: 1 as published, DDPM; 0 is DDIM, which adds no noise on the way", least=0, most=1)
    seed: int = flag(0, "another one gives other pictures", least=0, most=2**32 - 1)
    label: str = flag("", "class name or number; several with commas take turns, all takes every class in turn")
    guidance: float = flag(1.0, "how much to exaggerate what the label changes; 1 is not at all",
                             least=0, most=1000)
    image: str = flag((), "pictures to paint into, centre-cropped to the model's size", nargs="+")
    box: str = flag((), "x0,y0,x1,y1 in pixels of the model's size: the hole, one for all pictures or one for each", nargs="+")
    mask: str = flag((), "instead of boxes images, white where to paint, cropped like the pictures; "
                           "one for all or one for each", nargs="+")
    outside: bool = flag(False, "keep the box, or what is white in the mask, and paint all around it")
    reconstruct: bool = flag(False, "only send each --image through the tokenizer and back; umd and mae hide most of it and guess it")
    gif: bool = flag(False, "also write the decoding as a film")
    npz: str = flag("", "also write all pictures to this file, as arr_0, uint8 (N, S, S, 3)")
    png_dir: str = flag("", "also write each picture to this folder; what this command began is continued")
    out: str = flag("", "the PNG to write, if not samples-<seed>.png in the run's folder")
    overwrite: bool = flag(False, "replace files that are there")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "where to compute")
    dtype: str = flag(None, "of activations; bfloat16 on GPUs that compute in it, else float32",
                        choices=["float32", "bfloat16"])
    weights: str = flag("ema", "the averaged ones, where the run has them, or raw", choices=["raw", "ema"])
    compile: bool = flag(False, "compile the blocks: slower to start, then faster")
    adm_heads: int = flag(None, "attention heads in a file of guided-diffusion, whose own default is 4; "
                                  "one for 64 channels, if not given")
    adm_order: str = flag(None, "their channels' order in it; new after --use_new_attention_order True",
                            choices=["legacy", "new"])


GRID = 64                                                                                   # pictures in the PNG and the film


def check(cfg):
    """Refuse what makes no sense together."""
    if cfg.reconstruct and not cfg.image:
        raise UserError("--reconstruct needs pictures; name them with --image")
    if cfg.image and bool(cfg.box) + bool(cfg.mask) + cfg.reconstruct != 1:
        raise UserError("--image needs a hole to paint; say either --box x0,y0,x1,y1 or --mask FILE, "
                        "or else --reconstruct")
    if (cfg.box or cfg.mask or cfg.outside) and not cfg.image:
        raise UserError("--box, --mask and --outside are about your own pictures; name them with --image")
    if cfg.image and (cfg.npz or cfg.png_dir):
        raise UserError("--npz and --png-dir are for pictures from nothing; leave --image out")
    if cfg.reconstruct and cfg.gif:
        raise UserError("--gif films steps, --reconstruct makes them at once; leave one out")
    if len(cfg.box or cfg.mask) not in (0, 1, len(cfg.image)):
        count = len(cfg.box or cfg.mask)
        raise UserError(f"{count} holes for {len(cfg.image)} pictures; give one, or one for each")


def target(cfg):
    """Where the grid goes. Refuses what cannot be written or is there, and two outputs in one place."""
    kind = "reconstructed" if cfg.reconstruct else "painted" if cfg.image else "samples"
    path = pathlib.Path(cfg.out) if cfg.out else results_folder(cfg.run) / f"{kind}-{cfg.seed}.png"
    if path.suffix.lower() != ".png":
        raise UserError(f"--out {path} is to be a PNG; give it a name that ends in .png")
    files = [writable(path, "--out"), *([writable(path.with_suffix(".gif"), "--gif")] if cfg.gif else []),
             *([writable(cfg.npz, "--npz")] if cfg.npz else [])]
    for p in files:
        if p.exists() and not cfg.overwrite:
            raise UserError(f"{p} is there already; --overwrite replaces it, --out takes another name, --seed other pictures")
    if len({os.path.realpath(p) for p in files}) < len(files):
        raise UserError(f"--npz {cfg.npz} is where another output goes; name another file")
    folder = writable(cfg.png_dir, "--png-dir", folder=True) if cfg.png_dir else None
    if folder and os.path.realpath(folder) in {os.path.realpath(p.parent) for p in files}:
        raise UserError(f"--png-dir {folder} gets other output, too; name a folder for its pictures alone")
    return path


def class_numbers(cfg, model, names):
    """--label -> class numbers, picture i gets number i modulo their count; None without a label."""
    if not cfg.label:
        if cfg.guidance != 1:
            raise UserError(f"--guidance {cfg.guidance:g} exaggerates a label; add --label")
        return None
    if not names:
        raise UserError(f"--label {cfg.label}: {cfg.run} was trained without labels; train.py --labels makes one that takes them")
    wanted = names if cfg.label == "all" else cfg.label.split(",")
    numbers = {**{str(i): i for i in range(len(names))}, **{name: i for i, name in enumerate(names)}}
    for name in wanted:
        if name not in numbers:
            raise UserError(f"--label {name} is no class; they are {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}, or 0 to {len(names) - 1}")
    return torch.tensor([numbers[name] for name in wanted])


def hole(box, size):
    """'x0,y0,x1,y1' -> bool (size, size), True inside."""
    try:
        x0, y0, x1, y1 = (int(v) for v in box.split(","))
        assert 0 <= x0 < x1 <= size and 0 <= y0 < y1 <= size
    except (ValueError, AssertionError):
        raise UserError(f"--box {box} is not x0,y0,x1,y1 with 0 <= x0 < x1 <= {size} and 0 <= y0 < y1 <= {size}")
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


def holes(cfg, size):
    """--box or --mask -> bool (images, size, size), True = painted. Masks are cropped as images are."""
    masks = [unified.read_image(p, size).mean(0) > 0.5 for p in cfg.mask] or [hole(b, size) for b in cfg.box]
    for name, mask in zip(cfg.mask or cfg.box, masks):
        if mask.all() if cfg.outside else not mask.any():
            raise UserError(f"{name} leaves nothing to paint; white, or the inside of a box, is painted, "
                            "or with --outside the rest")
    return torch.stack(masks * (len(cfg.image) if len(masks) == 1 else 1)) ^ cfg.outside


def generate(model, cfg, index, labels=None, **known):
    """Pictures with the numbers index (n,), as the states of their decoding: yields after each step."""
    index = index.to(cfg.device)
    seeds = (cfg.seed << 32) + index
    labels = None if labels is None else labels.to(cfg.device)[index % len(labels)]
    options = {"steps": cfg.steps, "temperature": cfg.temperature, "eta": cfg.eta, "labels": labels,
               "guidance": None if cfg.guidance == 1 else cfg.guidance}
    return model.sample_steps(len(index), seeds=seeds, **{name: v for name, v in options.items() if v is not None}, **known)


def decodings(model, cfg, parts, labels, **known):
    """For each of parts, numbers of pictures (n,), yields it and the states of their decoding, to be used up
    before the next; a bar counts passes through the network. known: of all pictures, by number."""
    def counted(states):
        for state in states:
            bar.update()
            yield state
    with tqdm.tqdm(total=model.num_steps(cfg.steps, cfg.eta) * len(parts), unit="pass", dynamic_ncols=True,
                   disable=unified.rank_and_world()[0] > 0) as bar:
        for part in parts:
            there = {name: v[part.to(v.device)] for name, v in known.items()}
            yield part, counted(generate(model, cfg, part, labels, **there))


def pictures(model, cfg, index, labels):
    """Pictures with the numbers index (n,), --batch at a time and process: yields their numbers and uint8
    (B, S, S, 3), to every process."""
    rank, world = unified.rank_and_world()
    parts = index.split(cfg.batch) if len(index) else ()
    mine = decodings(model, cfg, parts[rank::world], labels)
    for _ in range(0, len(parts), world):
        made, everyone = [], [None] * world
        for part, states in itertools.islice(mine, 1):
            *_, state = states
            made.append((part, unified.to_uint8(model.render(state))))
        if world > 1:
            torch.distributed.all_gather_object(everyone, made)
        yield from itertools.chain(*everyone) if world > 1 else made


def thinned(states):
    """At most 25 of them, evenly spread, the last one included."""
    return states[::-1][::-(-len(states) // 25)][::-1]


def write_film(path, frames, columns):
    """Frames (n, 3, S, S) in [0, 1] -> a GIF of the grid, three frames a second, the last one held."""
    sheets = [unified.image_grid(x, columns, 512) for x in frames]
    sheets[0].save(path, save_all=True, append_images=sheets[1:], duration=[330] * (len(sheets) - 1) + [2500], loop=0)


def write_grid(path, made):
    """One PNG of all pictures made."""
    x = torch.cat([torch.from_numpy(x) for _, x in made])
    unified.image_grid(x.movedim(-1, 1) / 255).save(path)


def write_decoding(path, model, cfg, labels):
    """The film of the same pictures: how they came about."""
    parts = [torch.arange(min(cfg.n, GRID))]
    [states] = [list(states) for _, states in decodings(model, cfg, parts, labels)]
    write_film(path, [model.render(s).cpu() for s in thinned(states)], 8)


def write_npz(path, made, shape):
    """All pictures, streamed into an .npz, so that 50,000 need no memory; complete or not there."""
    def write(whole):
        with zipfile.ZipFile(whole, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            numpy.lib.format.write_array_header_1_0(file, header)
            for _, x in made:
                file.write(x.tobytes())
    write_file(path, write)


NOTE = "made-by.json"                   # in --png-dir; no evaluator takes it for an image


def made_by(model, config, cfg):
    """What pictures depend on: a digest of network and weights, and the options that change them."""
    digest = hashlib.sha256(json.dumps(config["arch"], sort_keys=True).encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    options = ("seed", "steps", "temperature", "eta", "label", "guidance", "dtype")
    return {"weights": digest.hexdigest(), **{name: getattr(cfg, name) for name in options}}


def missing(folder, note, cfg):
    """Numbers of the pictures that the folder lacks. UserError if it holds some that were made otherwise."""
    numbered = [p for p in folder.glob("*.png") if p.stem.isdecimal()] if folder.exists() else []
    if cfg.overwrite:
        for path in numbered:                                   # or a shorter set would keep some
            path.unlink()
    elif unified.image_files(folder, []):
        with contextlib.suppress(OSError, ValueError):
            if json.loads((folder / NOTE).read_text()) == note:
                left = [i for i in range(cfg.n) if not (folder / f"{i:06d}.png").exists()]
                return torch.tensor(left, dtype=torch.long)
        raise UserError(f"{folder} holds images that other weights, options or a seed made, or who knows what; take "
                        "another --png-dir, or --overwrite, which deletes those that are numbered")
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / NOTE, lambda file: file.write(json.dumps(note).encode()))
    return torch.arange(cfg.n)


def write_pngs(folder, made):
    """Each picture as 000000.png, 000001.png, ...; none is ever half written."""
    for index, x in made:
        for i, tile in zip(index.tolist(), x):
            PIL.Image.fromarray(tile).save(folder / "unfinished", "PNG")
            os.replace(folder / "unfinished", folder / f"{i:06d}.png")


def write_painted(path, model, cfg, labels):
    """A row for each --image: as it is, with its hole, and n times painted."""
    size = model.image_size
    x = torch.stack([unified.read_image(p, size) for p in cfg.image]).to(cfg.device)
    mask = holes(cfg, size).to(cfg.device)
    everything, films = torch.arange(len(x) * cfg.n), []
    known = {"known": x.repeat_interleave(cfg.n, 0), "mask": mask.repeat_interleave(cfg.n, 0)}
    for _, states in decodings(model, cfg, everything.split(cfg.batch), labels, **known):
        states = thinned(list(states)) if cfg.gif else [*states][-1:]
        films.append(torch.stack([model.render(s).cpu() for s in states]))
    film = torch.cat(films, 1).unflatten(1, (len(x), cfg.n))                                # (steps, images, n, 3, S, S)
    left = torch.stack([x, torch.where(mask[:, None], 0.2, x)], 1).cpu()
    frames = [torch.cat([left, frame], 1).flatten(0, 1) for frame in film]
    unified.image_grid(frames[-1], cfg.n + 2).save(path)
    if cfg.gif:
        write_film(path.with_suffix(".gif"), frames, cfg.n + 2)


def write_reconstructed(path, model, cfg):
    """Each --image beside what the model's reconstruct() makes of it."""
    x = torch.stack([unified.read_image(p, model.image_size) for p in cfg.image])
    torch.manual_seed(cfg.seed)
    row = [x, *(y.cpu() for y in model.reconstruct(x.to(cfg.device)))]
    unified.image_grid(torch.stack(row, 1).flatten(0, 1), len(row)).save(path)


def main():
    cfg = unified.parse_flags(Config, __doc__.split("\n")[0])
    check(cfg)
    cfg.out = target(cfg)
    device = unified.join_processes(cfg.device)
    cfg.device, cfg.dtype = str(device), cfg.dtype or unified.default_dtype(device)
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            run(cfg, device)
    finally:
        unified.leave_processes()


def check_options(cfg, model, config):
    """Refuse what this model's sample_steps does not take."""
    takes = inspect.signature(model.sample_steps).parameters
    given = {"steps": cfg.steps, "temperature": cfg.temperature, "eta": cfg.eta, "known": cfg.image and not cfg.reconstruct}
    for name, value in given.items():
        if value not in (None, (), False) and name not in takes:
            other = {"temperature": "eta", "eta": "temperature"}.get(name)
            raise UserError(f"--{'image' if name == 'known' else name} is nothing that {config['arch']['model']} knows; "
                            + (f"take --{other}" if other in takes else "leave it out"))


def run(cfg, device):
    """All that is asked for."""
    attention = {"heads": cfg.adm_heads, "order": cfg.adm_order}
    model, config = unified.load_model(cfg.run, ema=cfg.weights == "ema", **attention)
    model.to(device)
    if cfg.compile:
        compile_blocks(model)
    if not model.generates and not cfg.image:
        raise UserError(f"{cfg.run} has learned to fill holes, not to start from nothing; add --image FILE --box x0,y0,x1,y1")
    if cfg.reconstruct and not model.reconstructs:
        raise UserError(f"--reconstruct: {cfg.run} has neither a tokenizer nor learned to guess what is hidden")
    check_options(cfg, model, config)
    cfg.n = cfg.n or (6 if cfg.image else 64)
    widest = 65_000 // (model.image_size + 2) - 2                   # a GIF's sides are below 2 ** 16
    if cfg.image and max(cfg.n, len(cfg.image)) > widest:
        raise UserError(f"{len(cfg.image)} rows of --n {cfg.n} are too large a sheet; take {widest} at most")
    labels = class_numbers(cfg, model, config.get("classes") if config.get("labels") else None)
    if cfg.steps and model.max_steps < cfg.steps and unified.rank_and_world()[0] == 0:
        unit = "ids" if model.tokenizer else "timesteps"
        print(f"--steps {cfg.steps}: there are {model.max_steps} {unit} only, and more steps gain nothing")
    first, path = unified.rank_and_world()[0] == 0, cfg.out
    if cfg.reconstruct and first:
        write_reconstructed(path, model, cfg)
    elif cfg.image and first:
        write_painted(path, model, cfg, labels)
    elif not cfg.image:
        everything = torch.arange(cfg.n)
        wanted = [(everything[:GRID], lambda made: write_grid(path, made))]
        if cfg.npz:
            wanted.append((everything, lambda made: write_npz(pathlib.Path(cfg.npz), made, (cfg.n, model.image_size, model.image_size, 3))))
        if cfg.png_dir:
            folder = pathlib.Path(cfg.png_dir)
            index = unified.rank_zero_first(lambda: missing(folder, made_by(model, config, cfg), cfg))
            wanted.append((index, lambda made: write_pngs(folder, made)))
        for index, write in wanted:
            made = pictures(model, cfg, index, labels)
            if first:
                write(made)
            else:
                collections.deque(made, 0)                                                  # helps to make them, keeps none
        if cfg.gif and first:
            write_decoding(path.with_suffix(".gif"), model, cfg, labels)
    if first:
        print(f"wrote {path}" + (f", {path.with_suffix('.gif')}" if cfg.gif else ""))


if __name__ == "__main__":
    unified.run_main(main)
