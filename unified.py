"""Generate and represent images with one network: the whole family, in one file.

One idea runs through it: CORRUPT an image, LEARN TO UNDO the corruption. What the network has to understand in order to undo
it is a representation; undoing it step by step, starting from nothing, is generation.

    method   what it reads   how that was corrupted                   what it predicts
    MAGE     token ids       a random share hidden (70 % on average)  the hidden ids
    MAGE-C   the same, of two crops of an image                       + which crops belong together
    ADDP     pixels          painted from ids, hidden ones guessed    what a frozen MAGE holds possible
    UMD      pixels          half: 75 % of the patches hidden; half:  pixels where hidden, noise where seen
                             noise added and 37.5 % hidden            (its ends: MAE, MaskDiT, DiT)
    ADM      pixels          noise added                              the noise, and its variance

Read from the top.

    1  attention and blocks          every token reads from every other token
    2  pictures <-> ids              the VQ tokenizer: a picture becomes a short sequence of integers, and back
    3  what is hidden or noised      how many ids, which ids; how much noise, and the way back; random numbers by name
    4  MAGE                          guess the hidden ids; train, generate, inpaint, represent
    5  MAGE-C                        the same network also learns which two crops show the same image
    6  ADDP                          the encoder reads pixels, the decoder guesses ids; a trained MAGE teaches both
    7  UMD, MAE, MaskDiT, DiT        hide patches, or add noise to them, or both
    8  ADM                           guess the noise with a U-Net; its blocks represent, too
    9  presets, published weights    sizes, and how files of the original authors are read
    10 pictures, runs and files      data sets, the id cache, PNG grids, ridge regression, checkpoints

Letters    B images    L tokens of an image    M of them that an encoder reads    C width    C' the decoder's    n heads    d = C / n
           K codebook entries    W words    V crops of an image    S image side in pixels    h x w the token grid, h * w = L
           x pixels    z encoder output, before it is rounded to the codebook    t, T noise step, their number
In generation n is the number of pictures to make.
Pixels are floats in [0, 1]; only where noise is added or guessed do they lie in [-1, 1]. Masks are boolean and True means hidden, everywhere.
Everything random can be passed in: a function that draws says which argument replaces the draw.

Papers     [UMD] Hansen-Estruch et al. 2024, arXiv 2406.17688    [DiT] Peebles and Xie 2022, 2212.09748    [MaskDiT] Zheng et al. 2023, 2306.09305
           [MAGE] Li et al. 2022, arXiv 2211.09117      [MaskGIT] Chang et al. 2022, 2202.04200     [VQGAN] Esser et al. 2020, 2012.09841
           [MAE] He et al. 2021, 2111.06377             [ViT] Dosovitskiy et al. 2020, 2010.11929   [Attention] Vaswani et al. 2017, 1706.03762
           [SimCLR] Chen et al. 2020, 2002.05709        [VQ-VAE] van den Oord et al. 2017, 1711.00937     [DDPM] Ho et al. 2020, 2006.11239
           [iDDPM] Nichol and Dhariwal 2021, 2102.09672    [DDIM] Song et al. 2020, 2010.02502          [ADDP] Tian et al. 2023, 2306.05423
           [RePaint] Lugmayr et al. 2022, 2201.09865    [ADM] Dhariwal and Nichol 2021, 2105.05233
           [DiffSSL] Mukhopadhyay et al. 2023, 2307.08702 and 2311.17921
"""
import argparse
import collections
import contextlib
import dataclasses
import datetime
import errno
import functools
import gc
import hashlib
import inspect
import io
import math
import os
import pathlib
import pickle
import re
import signal
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import typing
import urllib.request
import zipfile

import numpy
import PIL.Image
import torch
import torch.distributed.nn
import torch.nn as nn
import torch.nn.functional as F
import tqdm
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_parameter_registration_hook

# ---------------------------------------------------------------------------------------------------------------------------
# 1. Attention: every token reads from every other token
#
#     A = softmax(Q K^T / sqrt(d)) V          Q, K, V: (B, n, L, d)                                    [Attention, eq. 1]
#
# A block lets the tokens exchange information (attention) and then thinks about each of them alone (MLP). Both only add to
# what is already there, so the gradient finds a straight way down through any number of blocks.


class Attention(nn.Module):
    """Multi-head self-attention over a set of tokens, without a causal mask. (B, L, C) -> (B, L, C).

    dim      width C, a multiple of heads, else ValueError
    heads    number of heads n
    dropout  share of attention probabilities, and of outputs, that is dropped in training
    fused    True: one fused kernel, the attention map never exists in memory; False: the equation above, spelled out to be
             read (test_fused_attention_is_the_equation)
    """

    def __init__(self, dim, heads, dropout=0.0, fused=True):
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} is not a multiple of {heads} heads")
        self.heads, self.dropout, self.fused = heads, dropout, fused
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)     # 3 x (B, n, L, d)
        p = self.dropout if self.training else 0.0
        if self.fused and (q.device.type != "cpu" or q.dtype == torch.float32 and p == 0):  # a CPU's kernel has no dropout, and slow bfloat16
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        else:
            x = F.dropout((q @ k.mT * q.size(-1) ** -0.5).softmax(-1), p) @ v
        return F.dropout(self.proj(x.transpose(1, 2).flatten(2)), p)                        # (B, L, C)


class MLP(nn.Module):
    """Two linear layers with a GELU between them, exact ("none") or by "tanh", applied to each token alone. (B, L, C) -> (B, L, C)."""

    def __init__(self, dim, hidden, dropout=0.0, gelu="none"):
        super().__init__()
        self.fc1, self.fc2, self.dropout, self.gelu = nn.Linear(dim, hidden), nn.Linear(hidden, dim), nn.Dropout(dropout), gelu

    def forward(self, x):
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x), approximate=self.gelu))))


class Block(nn.Module):
    """Pre-norm transformer block [ViT]: x + attention(norm(x)), then x + mlp(norm(x)). (B, L, C) -> (B, L, C)."""

    def __init__(self, dim, heads, dropout=0.0, gelu="none"):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads, dropout)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), MLP(dim, 4 * dim, dropout, gelu)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def take(x, index):
    """Tokens (B, L, C) at the positions index, int (B, M) -> (B, M, C)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.size(2)))


def put(into, index, x):
    """The inverse: a copy of into (B, L, C) with x (B, M, C) at the positions index."""
    return into.scatter(1, index[..., None].expand(-1, -1, x.size(2)), x)


def send(x, device):
    """x on the device. Nobody waits for the copy but on Apple's, which would read x when it may be freed."""
    return x.to(device, non_blocking=torch.device(device).type != "mps")


def in_float32(layer, x):
    """layer(x) in float32 at least, whatever autocast says: pixels, and sums over a whole width, need it."""
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):  # "meta" has no autocast
        return layer(x.to(torch.promote_types(x.dtype, torch.float32)))


def guarded(method):
    """The method, which answers a wrong call with a ValueError, see checked()."""
    return functools.wraps(method)(lambda *args, **options: checked(method, args, options))


# ---------------------------------------------------------------------------------------------------------------------------
# 2. Pictures <-> ids: the VQ tokenizer
#
#     z = E(x)        id = argmin_k |z - e_k|^2        x' = D(e_id)                                   [VQ-VAE, eq. 1 and 2]
#
# A convolutional encoder E shrinks the picture to a grid of vectors, each vector is rounded to the nearest of K codebook
# entries e_k, a decoder D paints the picture back from the entries. From then on a picture IS its ids: 256 x 256 pixels are
# 256 integers below 1024. The layers are those of MaskGIT's tokenizer, which MAGE uses frozen (official file:
# taming/modules/diffusionmodules/model.py); it differs from the well-known VQGAN: no attention, no convolution around the
# codebook, average pooling on the way down, and hardly any bias.


def norm(channels, groups=32):
    """GroupNorm. Published tokenizers have 32 groups; narrow ones need fewer, since a group of one channel forgets how bright it was."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut. (B, inp, h, w) -> (B, out, h, w)."""

    def __init__(self, inp, out, groups):
        super().__init__()
        self.norm1, self.conv1 = norm(inp, groups), nn.Conv2d(inp, out, 3, padding=1, bias=False)
        self.norm2, self.conv2 = norm(out, groups), nn.Conv2d(out, out, 3, padding=1, bias=False)
        if inp != out:
            self.nin_shortcut = nn.Conv2d(out, out, 1, bias=False)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        # Where the width changes, the published tokenizers send the block's OUTPUT, not its input, through the shortcut. It was
        # a slip in the original code, but every released weight was trained with it.
        return h + (self.nin_shortcut(h) if hasattr(self, "nin_shortcut") else x)


def level(inp, out, blocks, groups):
    """The residual blocks of one resolution, named as in the published files."""
    return nn.ModuleDict({"block": nn.ModuleList(ResBlock(inp if j == 0 else out, out, groups) for j in range(blocks))})


def middle(width, groups):
    """The two residual blocks at the lowest resolution."""
    return nn.ModuleDict({"block_1": ResBlock(width, width, groups), "block_2": ResBlock(width, width, groups)})


class Encoder(nn.Module):
    """Pixels (B, 3, S, S) in [0, 1] -> z (B, dim, S / stride, S / stride), with stride = 2 ** (len(ch_mult) - 1).

    ch, ch_mult  width of level i is ch * ch_mult[i]        blocks  residual blocks a level
    dim          width of the codebook                      groups  of every GroupNorm; divides every width
    """

    def __init__(self, ch, ch_mult, blocks, dim, groups):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1, bias=False)
        self.down = nn.ModuleList(level(inp, out, blocks, groups) for inp, out in zip([ch] + widths, widths))
        self.mid = middle(widths[-1], groups)
        self.norm_out, self.conv_out = norm(widths[-1], groups), nn.Conv2d(widths[-1], dim, 1)

    def forward(self, x):
        x = self.conv_in(x)
        for i, level in enumerate(self.down):
            x = x if i == 0 else F.avg_pool2d(x, 2)
            for block in level["block"]:
                x = block(x)
        x = self.mid["block_2"](self.mid["block_1"](x))
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """The way back: (B, dim, h, w) -> pixels (B, 3, S, S), close to [0, 1] but not clamped. Arguments as for Encoder."""

    def __init__(self, ch, ch_mult, blocks, dim, groups):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(dim, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1], groups)
        self.up = nn.ModuleList(level(inp, out, blocks, groups) for inp, out in zip(widths[1:] + widths[-1:], widths))
        for i, width in enumerate(widths[1:], 1):                                           # up.0 is already at full resolution
            self.up[i]["upsample"] = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, padding=1)})
        self.norm_out, self.conv_out = norm(widths[0], groups), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):
        x = self.conv_in(z)
        x = self.mid["block_2"](self.mid["block_1"](x))
        for level in reversed(self.up):
            for block in level["block"]:
                x = block(x)
            if "upsample" in level:
                x = level["upsample"]["conv"](F.interpolate(x, scale_factor=2.0))
        return in_float32(self.conv_out, F.silu(self.norm_out(x)))


class Codebook(nn.Module):
    """K vectors of width dim; rounds to the nearest one."""

    def __init__(self, size, dim):
        super().__init__()
        self.embedding = nn.Embedding(size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / size, 1 / size)

    def distances(self, z):
        """Squared distance of every position to every code, in float32: (B, dim, h, w) -> (B * h * w, K), row by row."""
        def squares(z, e=self.embedding.weight):
            return ((z * z).sum(1, keepdim=True) + (e * e).sum(1)).addmm_(z, e.T, alpha=-2)     # in place: no second large matrix
        return in_float32(squares, z.movedim(1, -1).flatten(0, -2))

    def lookup(self, ids):
        """Codes of an id map: int (B, h, w) -> (B, dim, h, w)."""
        return self.embedding(ids).movedim(-1, 1)


class VQGAN(nn.Module):
    """The tokenizer. Its training objective comes after it, in TokenizerTraining.

    codebook_size  K        codebook_dim  width of a code        ch, ch_mult, blocks, groups  as for Encoder
    """

    forms = {"x": "float (B, 3, {S}, {S}) in [-0.5, 1.5]", "ids": "int (B, h, w) in [0, {m.codes})"}      # see Model

    def __init__(self, codebook_size, codebook_dim, ch, ch_mult, blocks, groups=32):
        super().__init__()
        self.codes, self.stride = codebook_size, 2 ** (len(ch_mult) - 1)
        self.encoder = Encoder(ch, ch_mult, blocks, codebook_dim, groups)
        self.decoder = Decoder(ch, ch_mult, blocks, codebook_dim, groups)
        self.quantize = Codebook(codebook_size, codebook_dim)
        self.to(memory_format=torch.channels_last)                                          # the layout that convolutions are fastest in

    @guarded
    def encode(self, x):
        """Pixels (B, 3, S, S) in [0, 1] -> ids (B, h, w). S must be a multiple of the stride."""
        z = self.encoder(x)
        return self.quantize.distances(z).argmin(1).view(-1, *z.shape[2:])

    @guarded
    def decode(self, ids):
        """Ids (B, h, w) -> pixels (B, 3, S, S), not clamped: a released decoder overshoots [0, 1] a little."""
        return self.paint(self.quantize.lookup(ids))

    def paint(self, z, pixels=2**22):
        """Codes, or mixtures of them, (B, dim, h, w) -> pixels as decode() has them; so many at once, which take a few GiB."""
        return torch.cat([self.decoder(part) for part in z.split(max(1, pixels // (self.stride ** 2 * math.prod(z.shape[2:]))))])

    @guarded
    @torch.no_grad()
    def reconstruct(self, x):
        """Pixels (B, 3, S, S) -> what is left of them after a round trip through ids, in [0, 1], and the ids (B, h, w)."""
        ids = self.encode(x)
        return self.decode(ids).clamp(0, 1), ids


# How it is trained. Rounding has no gradient, so the decoder's gradient is copied to the encoder ("straight through"), and two
# terms pull z and its code together: the commitment term moves z, the codebook term moves the code [VQ-VAE, eq. 3]. That alone
# leaves most codes unused. The entropy term [MaskGIT's training code] rewards positions that are sure of their code
# (low entropy each) and a batch that uses all codes (high entropy of the mean); the coverage term moves every code, used or not,
# towards the nearest z, so that none is stranded where no z ever comes. A patch discriminator can be added: it sharpens
# what L1 and L2 leave blurred. MaskGIT adds a pretrained perceptual network too; we do without, since its weights would be a
# fifth dependency. The price is texture: expect a clearly higher reconstruction FID than the released tokenizers' 2 to 3.


def straight_through(z, codes):
    """Value of codes, gradient to z. Both (B, dim, h, w)."""
    return z + (codes - z).detach()


def entropy_gap(distances, temperature=0.01):
    """Mean entropy of a position minus entropy of the mean, of softmax(-distances / temperature): (N, K) -> scalar in [-ln K, 0].
    The temperature is MaskGIT's."""
    logits = distances / -temperature
    p, logp = logits.softmax(1), logits.log_softmax(1)                                      # exp(logp) would be slow where p underflows
    mean = p.mean(0)
    return -(p * logp).sum(1).mean() + (mean * (mean + 1e-5).log()).sum()


def with_grain(x, grain):
    """Pixels (B, 3, S, S) in which images of one flat colour get grain, uniform in [0, 1] and like x, of half a grey level. All black and without
    biases a dozen norms would see no variance at all, and each make the gradient a thousand times as long."""
    flat = (x.amax((2, 3), keepdim=True) == x.amin((2, 3), keepdim=True)).all(1, keepdim=True)     # (B, 1, 1, 1)
    return x + flat * (grain - 0.5) / 255


class PatchDiscriminator(nn.Module):
    """Says of each patch of about 22 pixels whether it is real. Pixels (B, 3, S, S) -> scores (B, 1, S / 8, S / 8)."""

    def __init__(self, width=64):
        super().__init__()
        widths = [3, width, 2 * width, 4 * width]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 4, 2, 1) for i, o in zip(widths, widths[1:]))
        self.norms = nn.ModuleList([nn.Identity()] + [norm(w) for w in widths[2:]])         # none right after the pixels
        self.score = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms):
            x = F.leaky_relu(norm(conv(x)), 0.2)
        return self.score(x)


class TokenizerTraining(nn.Module):
    """The tokenizer, the discriminator that it is trained against, and their loss as one module.

    vqgan  the VQGAN to train; WEIGHTS are those of the terms, ours but for the commitment's [VQ-VAE]
    forward(x (B, 3, S, S) in [0, 1], adversarial, grain) -> (scalar loss, dict of its terms). The adversarial weight is an argument
    since it is 0 during a warm-up; 0.8 is [VQGAN]'s; grain, see with_grain, is drawn if None. Generator and discriminator terms do
    not touch each other's parameters, so one backward pass and one optimizer step serve both.
    """

    WEIGHTS = {"l1": 3.0, "l2": 10.0, "commitment": 0.25, "codebook": 1.0, "coverage": 0.5, "entropy": 0.03}

    def __init__(self, vqgan):
        super().__init__()
        self.vqgan, self.discriminator = vqgan, PatchDiscriminator()

    def forward(self, x, labels=None, adversarial=0.0, grain=None):
        x = with_grain(x, torch.rand_like(x) if grain is None else grain)
        z = self.vqgan.encoder(x)
        distances = self.vqgan.quantize.distances(z)
        codes = self.vqgan.quantize.lookup(distances.argmin(1).view(-1, *z.shape[2:]))
        nearest = z.detach().movedim(1, -1).flatten(0, -2)[distances.min(0).indices]        # (K, dim): to each code the nearest z
        y = self.vqgan.decoder(straight_through(z, codes))
        logs = {"l1": (y - x).abs().mean(), "l2": F.mse_loss(y, x),
                "commitment": F.mse_loss(z, codes.detach()), "codebook": F.mse_loss(codes, z.detach()),
                "coverage": F.mse_loss(self.vqgan.quantize.embedding.weight, nearest), "entropy": entropy_gap(distances)}
        loss = sum(self.WEIGHTS[k] * v for k, v in logs.items())
        if adversarial:
            logs["generator"], logs["discriminator"] = self.adversarial(x, y, logs["l1"] + logs["l2"])        # their bare sum sets the scale
            loss = loss + adversarial * logs["generator"] + logs["discriminator"]
        return loss, logs

    def adversarial(self, x, y, reconstruction):
        """Hinge losses of generator and discriminator, the former scaled so that at the decoder's last layer its gradient is
        as long as that of the reconstruction [VQGAN, eq. 7]."""
        fixed = {k: p.detach() for k, p in self.discriminator.named_parameters()}
        fool = -torch.func.functional_call(self.discriminator, fixed, (y,)).mean()
        last = self.vqgan.decoder.conv_out.weight
        size = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (reconstruction, fool)]
        real, fake = self.discriminator(x), self.discriminator(y.detach())
        return (size[0] / (size[1] + 1e-4)).clamp(0, 1e4) * fool, (F.relu(1 - real) + F.relu(1 + fake)).mean() / 2


# ---------------------------------------------------------------------------------------------------------------------------
# 3. What is hidden or noised
#
# Which ids are hidden is decided by ranking: of uniform noise in training, of the network's confidence in generation; the smallest
# are hidden. How many is a matter of purpose. In training the hidden share is drawn from N(0.55, 0.25^2) cut off to [0.5, 1], mean
# 0.69: enough is left to understand the picture, or nothing, which is where generation starts [MAGE, section 3]. In generation the
# share falls from 1 to 0 along a cosine: few ids are filled in at first, when all is guesswork, many at the end [MaskGIT, eq. 3].


def truncated_normal(u, mean=0.55, std=0.25, low=0.5, high=1.0):
    """Turn uniform draws u in [0, 1] into draws of a normal law restricted to [low, high], by inverting its distribution."""
    a, b = (math.erf((bound - mean) / std / math.sqrt(2)) for bound in (low, high))
    return (mean + std * math.sqrt(2) * torch.erfinv(a + u * (b - a))).clamp(low, high)


def ranks(noise):
    """Rank of each entry in its row, 0 for the smallest: (B, L) -> int (B, L). Rows' n smallest are ranks(noise) < n."""
    return noise.argsort(stable=True, dim=1).argsort(1)


def hidden_left(initial, hidden, step, steps, schedule="cosine", up=False):
    """How many ids of each picture stay hidden after a step, counted from 0: a share of those hidden at the start, which falls along a
    cosine, or a straight line (schedule "linear"). Rounded down and at least one less than before, or rounded up; and at least one as
    long as there is any. initial, hidden: int (B,) -> int (B,)."""
    left = initial.double() * (math.cos(math.pi / 2 * (step + 1) / steps) if schedule == "cosine" else 1 - (step + 1) / steps)
    left = left.ceil().long() if up else left.floor().long().minimum(hidden - 1)
    return left.clamp(min=1).minimum(hidden)


# Random numbers by name. In generation, a number depends on (the picture's seed, which draw, which position) and on nothing else: it
# is the same for a picture made alone or among a thousand, on any device. (The pictures agree but for rounding, which may tip a
# close choice.) An integer hash does it, MurmurHash3's last mix.


def mix(x):
    """Scramble the low 32 bits of int64 values; a product that overflows keeps its low 32 bits, which are all that is used."""
    x = x & 0xFFFFFFFF
    x = ((x ^ x >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ x >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ x >> 16


def uniform(seeds, draw, n):
    """n uniform numbers strictly inside (0, 1) for each seed: int64 (B,), int -> float32 (B, n)."""
    row = mix(mix(mix(seeds) ^ (seeds >> 32)) + draw)
    bits = mix(row[:, None] + 0x9E3779B9 * torch.arange(1, n + 1, device=seeds.device))
    return ((bits >> 9).float() + 0.5) / 2**23                                              # 23 bits: 1 is never reached


def gumbel(u):
    """Uniform numbers in (0, 1) -> standard Gumbel noise, -log(-log u)."""
    return -(-u.log()).log()


def normal(u):
    """Uniform numbers in (0, 1) -> standard normal ones, by inverting the distribution function."""
    return math.sqrt(2) * torch.erfinv(2 * u - 1)


def categorical(p, u):
    """One category a row by inverting the distribution function: p (..., K) sums to 1, u (...) in (0, 1) -> int64 (...)."""
    cdf = p.cumsum(-1)
    return torch.searchsorted(cdf, u[..., None] * cdf[..., -1:]).squeeze(-1).clamp(max=p.size(-1) - 1)


# Noise hides pixels as a mask hides ids, only by degrees. What is left of a picture at step t is one number, abar_t, falling from
# nearly 1 to nearly 0 over T steps:
#
#     x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,   eps ~ N(0, 1)                                   [DDPM, eq. 4]
#
# A network that guesses eps from x_t guesses x_0 with it. Generation starts at noise and goes to ever larger abar: guess x_0, then
# put back as much noise as the next step has. Below, abar is a float64 tensor (B,) or (), on the CPU like the steps, since some
# GPUs have no float64 and reading a step off any of them would mean waiting; and pixels are in [-1, 1].


def alpha_bar(schedule, steps=1000):
    """abar of steps 0 .. T-1, float64 (T,): 'linear' betas [DDPM] or the 'cosine' law, which keeps more of a small picture [iDDPM, eq. 17]."""
    if schedule == "linear":
        beta = torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64)
    elif schedule != "cosine":
        raise ValueError(f"a noise schedule is 'linear' or 'cosine', not {schedule!r}")
    else:
        left = (((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008) * math.pi / 2).cos() ** 2
        beta = (1 - left[1:] / left[:-1]).clamp(max=0.999)
    return (1 - beta).cumprod(0)


def spread(a, x):
    """A float64 number a picture, (B,) or (), rounded and sent to where pixels x (B, 3, S, S) can be multiplied by it."""
    return send(a.to(x.dtype), x.device).view(-1, 1, 1, 1) if a.dim() else a.to(x.dtype)


def q_sample(x0, abar, noise):
    """The noised picture x_t, the equation above; noise like x0."""
    return spread(abar.sqrt(), x0) * x0 + spread((1 - abar).sqrt(), x0) * noise


def x0_from_noise(x, abar, eps):
    """The same equation solved for x_0."""
    return spread(abar.rsqrt(), x) * x - spread((1 / abar - 1).sqrt(), x) * eps


def posterior_variance(abar, abar_next):
    """Variance of x at abar_next, given x at abar and x_0 [DDPM, eq. 7]: float64, 0 at abar_next 1."""
    return (1 - abar_next) / (1 - abar) * (1 - abar / abar_next).clamp(min=0)


def ddim_step(x, x0, abar, abar_next, eta=0.0, noise=0.0, std=None):
    """One step from x at abar to abar_next, believing in x0 [DDIM, eq. 12 and 16].

    eta 0: no noise is added, the noise seen is kept; 1: as much as an ancestral step of DDPM adds; noise like x. std (like x): what
    scales the noise instead, if the network has learned it. abar_next 1 gives x0 itself; abar_next < abar goes backwards, into noise.
    """
    eps = (spread(abar.rsqrt(), x) * x - x0) / spread((1 / abar - 1).sqrt(), x)
    variance = eta ** 2 * posterior_variance(abar, abar_next)
    std = spread(variance.sqrt(), x) if std is None else std * spread(torch.as_tensor(abar_next < 1), x)
    return spread(abar_next.sqrt(), x) * x0 + spread((1 - abar_next - variance).sqrt(), x) * eps + std * noise


class Denoising(typing.NamedTuple):
    """Pictures on their way out of noise: x (n, 3, S, S), clean ones in [-1, 1]."""
    x: torch.Tensor


def denoise(guess, noise, abar, eta=1.0, known=None, mask=None):
    """Pictures from noise: yields a Denoising after each step; the last one is clean.

    guess        x, step -> x0 in [-1, 1], and what scales the noise (see ddim_step) or None
    noise        draw -> standard normal numbers (n, 3, S, S): 0 is the start, 2 step + 1 is added by that step, 2 step + 2 is put on known
    abar         float64 (steps,), on the CPU, ascending: how noisy x is when each step begins
    known, mask  pixels in [0, 1] and bool (n, S, S), True = to be painted: after every step the rest is what is
                 known, made as noisy as x [RePaint], in the end not at all
    """
    x = noise(0)
    for step, (now, after) in enumerate(zip(abar, [*abar[1:], torch.ones_like(abar[0])])):
        x0, std = guess(x, step)
        x = ddim_step(x, x0, now, after, eta, noise(2 * step + 1), std)
        if known is not None:
            x = torch.where(mask[:, None], x, q_sample(2 * known - 1, after, noise(2 * step + 2)))
        yield Denoising(x)


def kept_steps(steps, counts):
    """A shorter process: the 0 .. steps - 1 in as many equal sections as there are counts, of each section that many, evenly spread.
    Returns them ascending. ValueError if a section has fewer steps than asked for. (Official file: respace.py.)"""
    kept, start = [], 0
    for i, count in enumerate(counts):
        size = steps // len(counts) + (i < steps % len(counts))
        if count > size:
            raise ValueError(f"{count} steps do not fit into a section of {size}")
        stride, at = (size - 1) / max(1, count - 1), 0.0
        for _ in range(count):
            kept.append(start + round(at))                                                  # added up as the official code does: ties
            at += stride                                                                    # fall the same way
        start += size
    return kept


def strided_steps(steps, count):
    """The same with one whole stride, beginning at 0: what DDIM's results were made with ('ddimN' in respace.py, which refuses a count that
    no stride gives; here it is the next smaller one that some stride gives)."""
    return list(range(0, steps, -(-steps // count)))


def angles(t, width, last):
    """t as width / 2 phases at frequencies from 1 down to about 1 / 10000: (B,) -> (B, width / 2), float32. The frequencies are
    10000 ** (-j / last), j = 0 .. width / 2 - 1."""
    return t.float()[:, None] * (-math.log(10000) / last * torch.arange(width // 2, device=t.device)).exp()


# Every model can be read after any of its blocks, and fed at them; every model can be sampled, a step at a time. What follows is common to all.


def run_blocks(x, blocks, first, layers, add, maps, places, *condition):
    """Run blocks, numbered from first on, but none beyond the last of layers.

    x, places   tokens (B, ., C); those at places, a slice, are the patches of the picture, h x h of them, row by row
    layers      numbers of the blocks whose outputs are put into the dict maps, as (B, C, h, h)
    add         {number: map (B, C, h, h)} added to that block's output
    """
    side = math.isqrt(places.stop - places.start)
    for b, block in enumerate(blocks[:max(layers) - first + 1], first):
        x = block(x, *condition)
        if b in add:
            x = torch.cat([x[:, :places.start], x[:, places] + add[b].flatten(2).mT, x[:, places.stop:]], 1)
        if b in layers:
            maps[b] = x[:, places].mT.unflatten(2, (side, side))
    return x


class Model(nn.Module):
    """What all models share. Each adds

    forward(x, labels) -> loss, logs        sample_steps(n, ...) -> states        features(x, t, layers, ...) -> maps        embed(x) -> vectors
    image_size, classes                     layers {number: (channels, h, w)}     best_layer, best_t, pools, as its authors read it
    t_range  (least, most, meaning) of features(t=)

    and those that hide, reconstruct(x) -> pictures. It is all that the scripts know of a model. A call of one of these with an argument
    that has not its form is a ValueError. forms {argument or method.argument: form, see fits()}; seeds become int64 (n,).
    """

    generates = True                    # it can start from nothing
    forms = {"x": "float (B, 3, {S}, {S})", "known": "float ({B}, 3, {S}, {S}) in [-0.5, 1.5]", "mask": "bool ({B}, {S}, {S})",
             "noise": "float ({N}, 3, {S}, {S})", "mask_noise": "float ({B}, {m.length})", "keep_label": "bool ({N})",
             "t": "{time} in [{m.t_range[0]}, {m.t_range[1]}]", "forward.t": "{time} ({N}) in [{m.t_range[0]}, {m.t_range[1]}]",
             "n": "int in [1, inf]", "steps": "int in [1, inf]", "temperature": "float in [0, 1]", "guidance": "float in [-1e9, 1e9]",
             "seeds": "int ({B})", "sample_steps.seeds": "int in [-9e18, 9e18] or int ({B})", "labels": "int ({B}) in [0, {m.classes})",
             "pool": "among {m.pools}", "layers": "layers in [1, {D}]", "add": "maps in [1, {D}]", "schedule": "among cosine, linear",
             "draw": "int in [0, 9e18]", "clean": "int in [0, {B}]", "rate": "float in [0.5, 1]", "index": "int in [0, 66)",
             "gap": "int in [1, 5]"}
    forms["embed.x"] = forms["reconstruct.x"] = forms["x"] + " in [-0.5, 1.5]"              # decoders overshoot a little

    def __init_subclass__(cls):
        for name in vars(cls).keys() & {"forward", "sample_steps", "reconstruct", "noise", "features", "embed"}:
            setattr(cls, name, guarded(vars(cls)[name]))

    def sample(self, n, **options):
        """Images (n, 3, S, S) in [0, 1]. Options as for sample_steps. The same seeds give the same images: count them on in a loop, as in
        for first in range(0, 1000, 64): x = model.sample(64, seeds=first)."""
        for state in checked(type(self).sample_steps, (self, n), options, wait=True):
            pass
        return self.render(state)

    def render(self, state):
        """Denoising -> pixels (n, 3, S, S) in [0, 1]."""
        return ((state.x + 1) / 2).clamp(0, 1)

    @guarded
    def noise(self, seeds, draw=0):
        """What features(noise=) takes, decided by each picture's seed: int64 (B,) -> standard normal (B, 3, S, S)."""
        return normal(uniform(seeds, draw, 3 * self.image_size ** 2)).view(-1, 3, self.image_size, self.image_size)

    def draws(self, first, count):
        """What forward() must be told of pictures first .. first + count - 1 of a whole batch when it sees only them."""
        return {}

    def mirror(self, layer):
        """The layer at equal distance from the other end: to it a second pass can be fed what the first found at this layer [DifFeed]."""
        return len(self.layers) + 1 - layer


# ---------------------------------------------------------------------------------------------------------------------------
# 4. MAGE: guess the hidden ids
#
#     loss = mean over hidden positions i of  -log p(id_i | the ids that are not hidden)                [MAGE, eq. 1]
#     (with label smoothing 0.1)
#
# An encoder reads what is left, a decoder puts the result back into place, fills every gap with the encoder's summary of THIS
# picture (its output at position 0), and predicts the gaps. As in MAE the encoder is spared most of the gaps: half of all
# positions, always hidden ones but other ones in every picture, never enter it; since their number is fixed, shapes are static. The
# hidden ids beyond them enter as the word [MASK], and the decoder overwrites their outputs as well. In generation and for features
# nothing is dropped. Hiding much teaches features, hiding all teaches generation: one network, one loss, both uses.
#
# Position 0 holds a class word instead of a patch: a label if there is one, else the "fake class", which means any picture.


class TokenEmbedding(nn.Module):
    """LayerNorm(word + position), then dropout: ids (B, 1 + L) -> (B, 1 + L, C). Official name: BertEmbeddings."""

    def __init__(self, words, positions, dim, dropout):
        super().__init__()
        self.word_embeddings, self.position_embeddings = nn.Embedding(words, dim), nn.Embedding(positions, dim)
        self.LayerNorm, self.dropout = nn.LayerNorm(dim, eps=1e-6), nn.Dropout(dropout)

    def forward(self, ids):
        return self.dropout(self.LayerNorm(self.word_embeddings(ids) + self.position_embeddings.weight))


class Head(nn.Module):
    """Logits over words: the output matrix is the table of input words, cut off from the gradient as in the official code.

    forward(x (B, L, C'), words (W, C)) -> (B, L, W)
    """

    def __init__(self, inp, dim, words):
        super().__init__()
        self.fc, self.ln = nn.Linear(inp, dim), nn.LayerNorm(dim)                           # eps 1e-5 here, 1e-6 elsewhere
        self.bias = nn.Parameter(torch.zeros(1, 1, words))

    def forward(self, x, words):
        return F.linear(self.ln(F.gelu(self.fc(x))), words.detach(), self.bias[0, 0, :len(words)]).float()    # softmax follows


def masked_loss(logits, target, mask):
    """Mean over the hidden positions, mask (B, L), of the cross-entropy between logits (B, L, W) and target, ids (B, L) or probabilities
    (B, L, W), smoothed by 0.1 (official file: models_mage.py). Positions are rows: a softmax is fastest over the last dimension."""
    nll = F.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1), label_smoothing=0.1, reduction="none")
    return (nll * mask.flatten()).sum() / mask.sum()


class Decoding(typing.NamedTuple):
    """Pictures being decoded: ids (n, L), of which some are still hidden (n, L); if pixels were known beforehand, these (n, 3, S, S) and
    where they are not, bool (n, S, S); the pictures so far (n, 3, S, S), if the model paints them in every step."""
    ids: torch.Tensor
    hidden: torch.Tensor
    known: torch.Tensor = None
    mask: torch.Tensor = None
    x: torch.Tensor = None

    def with_known(self, x):
        """Pixels x (n, 3, S, S) with the known ones put back."""
        return x if self.known is None else torch.where(self.mask[:, None], x, self.known)


def learned(length, dim):
    """A learned table of vectors (1, length, dim), drawn like the embeddings below."""
    return nn.Parameter(torch.randn(1, length, dim) * 0.02 * (768 / dim) ** 0.5)


def initialise(module):
    """Xavier-uniform matrices (the fused qkv counts as one), zero biases, N(0, 0.02) embeddings: MAE's and MAGE's start. 0.02 belongs to
    width 768; scaled like this, the logits of fresh weights spread alike at any width, since the words are also the output matrix."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02 * (768 / module.embedding_dim) ** 0.5)


class MAGE(Model):
    """Masked generative encoder (official files: models_mage.py, models_vit_mage.py, gen_img_uncond.py).

    vqgan           the frozen tokenizer, part of this module and of its checkpoint
    image_size      S, a multiple of the tokenizer's stride, else ValueError
    width, depth, heads, decoder_width, decoder_depth, decoder_heads        of the two stacks of blocks
    classes         0, or the number of labels it can be conditioned on
    fake_class      None: the fake class has a word of its own. A number c: it shares the word of class c (published files: 76)
    contrastive     weight of the contrastive term of section 5; 0 for plain MAGE

    Words: 0 .. K-1 the codes, then the classes, then the fake class (unless shared), then [MASK].
    """

    def __init__(self, vqgan, image_size, width, depth, heads, decoder_width, decoder_depth, decoder_heads,
                 classes=0, fake_class=None, contrastive=0.0, dropout=0.1):
        super().__init__()
        if image_size % vqgan.stride:
            raise ValueError(f"image size {image_size} is not a multiple of the tokenizer's stride {vqgan.stride}")
        self.image_size, self.grid, self.classes, self.contrastive = image_size, image_size // vqgan.stride, classes, contrastive
        self.codes, self.length = vqgan.quantize.embedding.num_embeddings, self.grid ** 2    # K, L
        self.fake_id = self.codes + (classes if fake_class is None else fake_class)
        self.mask_id = self.codes + classes + (fake_class is None)
        widths, self.best_layer = depth * [width] + decoder_depth * [decoder_width], depth  # encoder first; the paper reads its last
        self.layers = {b: (width, self.grid, self.grid) for b, width in enumerate(widths, 1)}

        self.token_emb = TokenEmbedding(self.mask_id + 1, 1 + self.length, width, dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.decoder_pos_embed_learned = learned(1 + self.length, decoder_width)
        self.decoder_blocks = nn.ModuleList(Block(decoder_width, decoder_heads, dropout) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=1e-6)
        self.mlm_layer = Head(decoder_width, width, self.mask_id + 1)
        if contrastive:
            self.projection = nn.Sequential(nn.Linear(width, 4096), nn.ReLU(), nn.Linear(4096, 256))
        self.apply(initialise)
        self.vqgan = vqgan.requires_grad_(False)                                            # after apply: it keeps its weights

    ids = " or int (B, {m.length}) in [0, {m.codes})"
    forms = {**Model.forms, "x": Model.forms["x"] + ids, "embed.x": Model.forms["embed.x"] + ids, "noise": "float ({N}, {m.length})",
             "forward.x": Model.forms["x"] + ids + " or float (B, 2, 3, {S}, {S})" + ids.replace("B", "B, 2"), "temperature": "float in [0, inf]"}

    # ---- training

    def forward(self, x, labels=None, *, rate=None, noise=None, keep_label=None):
        """Loss of one batch.

        x           pixels (B, 3, S, S) in [0, 1] or ids (B, L); with two views: (B, 2, 3, S, S) or (B, 2, L)
        labels      int (B,) in 0 .. classes - 1, or None
        rate        hidden share in [0.5, 1], one for the batch (as official); noise (B, L), (2B, L) with two views: the smallest are
                    hidden; keep_label bool (B,): which labels are shown. All drawn if None
        returns     scalar loss, dict of its terms
        """
        pair = x.dim() == (5 if x.is_floating_point() else 3)
        if pair:
            x, labels = x.flatten(0, 1), None if labels is None else labels.repeat_interleave(2)
        ids, mask, keep = self.hide(x, rate, noise)
        latent = self.encode(self.words(ids, mask, labels, keep_label), keep)
        loss = masked_loss(self.decode(latent, mask, keep), ids, mask)
        logs = {"masked": loss}
        if pair and self.contrastive:
            z = self.projection(latent[:, 1:].mean(1)).unflatten(0, (-1, 2))                # (B, 2, 256)
            logs["contrast"] = info_nce(F.normalize(z, dim=-1))
            loss = loss + self.contrastive * logs["contrast"]
        return loss, logs

    def hide(self, x, rate=None, noise=None):
        """Pixels or ids -> ids (B, L); which are hidden: bool (B, L); which positions enter the encoder: int (B, L/2), ascending."""
        ids = self.to_ids(x)
        noise = torch.rand(ids.shape, device=ids.device) if noise is None else noise
        rate = truncated_normal(torch.rand(())) if rate is None else rate                   # a CPU's
        order = ranks(noise)
        mask = order < math.ceil(self.length * float(rate))
        dropped = math.ceil(0.5 * self.length)                                              # half of all, always hidden ones
        return ids, mask, order.argsort(1)[:, dropped:].sort(1).values

    @torch.no_grad()
    def to_ids(self, x):
        """Pixels (B, 3, S, S) -> ids (B, L), row by row; ids, from the cache, stay ids."""
        return self.vqgan.encode(x).flatten(1) if x.is_floating_point() else x.long()

    def words(self, ids, mask, labels=None, keep_label=None):
        """What the encoder reads: [MASK] where hidden, the class in front. In training one label in ten is replaced by the fake
        class, so that the network also knows pictures without label, which guidance needs. (B, L) -> (B, 1 + L)."""
        front = torch.full_like(ids[:, :1], self.fake_id)
        if labels is not None:
            if keep_label is None:
                keep_label = torch.rand(labels.shape, device=ids.device) >= (0.1 if self.training else 0.0)
            front = torch.where(keep_label[:, None], self.codes + labels[:, None], front)
        return torch.cat([front, ids.masked_fill(mask, self.mask_id)], 1)

    def encode(self, words, keep=None):
        """Words (B, 1 + L), of which only the class and the positions in keep (B, M) enter -> latent (B, 1 + M, C)."""
        x = self.token_emb(words)
        if keep is not None:
            x = torch.cat([x[:, :1], take(x[:, 1:], keep)], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decode(self, latent, *places, rows=None):
        """Latent (B, 1 + M, C), and what decoder_input needs besides -> logits over the first rows words, the K codes if None, at every
        position (B, L, rows)."""
        x = self.decoder_input(latent, *places)
        for block in self.decoder_blocks:
            x = block(x)
        return self.head(x[:, 1:1 + self.length], rows)

    def decoder_input(self, latent, mask, keep=None):
        """Tokens back in their places; the class output, which summarises this picture, wherever a token is dropped or hidden."""
        x = self.decoder_embed(latent)                                                      # (B, 1 + M, C')
        front = x[:, :1].expand(-1, self.length, -1)
        seen = x[:, 1:] if keep is None else put(front, keep, x[:, 1:])
        x = torch.cat([x[:, :1], torch.where(mask[..., None], front, seen)], 1)
        return x + self.decoder_pos_embed_learned                                           # (B, 1 + L, C')

    table = property(lambda self: self.token_emb.word_embeddings.weight)       # (W, C): guesses are compared with it, too

    def head(self, x, rows=None):
        """Decoder output -> logits over the first rows words; the K codes unless said otherwise: nothing else is ever guessed."""
        return self.mlm_layer(self.decoder_norm(x), self.table[:rows or self.codes])

    # ---- generation

    rounds_up = False                                           # see hidden_left

    def logits(self, ids, hidden, labels=None, guidance=1.0, x=None, counts=None):
        """Logits (n, L, K) of partly hidden ids; nothing is dropped here, so the encoder reads every [MASK]. For ADDP:
        x, the picture so far, and counts, how many ids of each are hidden, int (n,) on the CPU."""
        def one(labels):
            return self.decode(self.encode(self.words(ids, hidden, labels)), hidden)
        if labels is None or guidance == 1:
            return one(labels)
        free = one(None)
        return free + guidance * (one(labels) - free)

    def start(self, n, known=None, mask=None):
        """-> ids, hidden, both (n, L). Nothing known: all hidden.

        Else the hole is blackened before the picture is tokenised, since neighbouring ids would leak
        its content, and its ids are hidden together with a ring of one around, since those describe the blackness."""
        device = self.norm.weight.device
        if known is None:
            return torch.zeros(n, self.length, dtype=torch.long, device=device), torch.ones(n, self.length, dtype=torch.bool, device=device)
        touched = F.max_pool2d(mask[:, None].float(), self.vqgan.stride)
        hidden = F.max_pool2d(touched, 3, 1, 1).flatten(1) > 0
        return self.to_ids(known.masked_fill(mask[:, None], 0.0)), hidden

    def paint(self, ids, hidden, logits):
        """The picture so far, where the model itself reads it; MAGE reads ids, and the film is painted by render()."""

    @torch.no_grad()
    def sample_steps(self, n, steps=None, temperature=None, guidance=1.0, labels=None, known=None, mask=None, seeds=None, schedule="cosine"):
        """Parallel decoding [MaskGIT, section 3.2]: guess every hidden id, keep the guesses that the network is surest of, hide
        the rest again, repeat. Noise on the confidence, fading with the steps, keeps the pictures from all turning out alike.

        n, steps      pictures, rounds; 20 as published, or fewer if there are fewer ids
        temperature   of the noise on the confidence at the first step; 6 as published for a grid of 16 x 16, less for smaller ones (ours)
        labels        int (n,) or None            guidance  1: as trained; more: exaggerates what the label changes, linearly over the steps
        known, mask   pixels (n, 3, S, S) and bool (n, S, S), True = to be painted; each picture may have its own hole
        seeds         int (n,): all that an image depends on besides the weights; or the first of n in a row, which is 0 if None
        schedule      how the hidden share falls: "cosine", or "linear", as published for ADDP with 256 steps
        yields        a Decoding after each step; nothing is hidden in the last one
        """
        steps, x = steps or min(20, self.length), None
        alike = known is None and labels is None
        temperature = 6.0 * self.grid / 16 if temperature is None else temperature
        ids, hidden = self.start(n, known, mask)
        initial = counts = torch.full((n,), self.length) if known is None else hidden.sum(1).cpu()
        for step in range(steps):
            progress = (step + 1) / steps
            w, first = 1 + (guidance - 1) * progress, 1 if alike and step == 0 else n   # from nothing, all begin alike: one pass will do
            logits = self.logits(ids[:first], hidden[:first], labels, w, x, counts[:first]).expand(n, -1, -1)
            counts = hidden_left(initial, counts, step, steps, schedule, self.rounds_up)    # what hidden.sum(1) will be
            noise = temperature * (1 - progress) * gumbel(uniform(seeds, 2 * step + 1, self.length))
            ids, hidden = demask(logits, ids, hidden, counts, uniform(seeds, 2 * step, self.length), noise)
            x = self.paint(ids, hidden, logits)
            if step + 1 == steps:
                hidden = torch.zeros_like(hidden)               # hidden_left() never returns 0; here every guess is kept
            yield Decoding(ids, hidden, known, mask, x)

    @torch.no_grad()
    def render(self, state):
        """Decoding -> pixels (n, 3, S, S) in [0, 1]: dark where ids are hidden, the known pixels where there are any."""
        x = self.vqgan.decode(state.ids.unflatten(1, (self.grid, self.grid))).clamp(0, 1)
        cells = state.hidden.unflatten(1, (1, self.grid, self.grid)).float()
        return state.with_known(torch.where(F.interpolate(cells, scale_factor=float(self.vqgan.stride)) > 0, 0.2, x))

    def reconstruct(self, x):
        """What the ids keep of pixels (B, 3, S, S), in a tuple of one."""
        return self.vqgan.reconstruct(x)[:1]

    # ---- representation

    t_range, best_t = (0.0, 1.0, "the share of ids that is hidden"), 0.0                    # of features(t=); embed's
    pools = ("mean", "class")                                                               # of embed(pool=); the paper's first
    reads_ids = True                                                                        # features and embed may be given ids

    def noise(self, seeds):
        """What features(noise=) takes, decided by each picture's seed: int64 (B,) -> (B, L)."""
        return uniform(seeds, 0, self.length)

    def features(self, x, t=0.0, layers=None, add={}, noise=None, finetune=False):
        """Block outputs as maps, before any final norm, without the class position; no block after the last one asked for runs.

        x       pixels (B, 3, S, S) or ids (B, L)          layers  which blocks; [best_layer] if None
        t       hidden share in [0, 1], 0 for the whole picture; noise (B, L) says which are hidden, drawn if None
        add     {layer: map (B, C, h, w)} added to the output of that layer
        finetune  makes no difference here: MAGE is fine-tuned as it was trained
        returns [map (B, C, h, w) for each of layers]
        """
        ids = self.to_ids(x)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        if t:
            noise = torch.rand(ids.shape, device=ids.device) if noise is None else noise
            mask = ranks(noise) < math.ceil(t * self.length)
        return self.maps(self.token_emb(self.words(ids, mask)), lambda latent: self.decoder_input(latent, mask), layers, add)

    def maps(self, x, middle, layers, add, front=1, *condition):
        """features() from the first block's input x (B, front + L, C) on. middle: latent -> the first decoder block's (B, 1 + L ..., C)."""
        layers, maps, L = layers or [self.best_layer], {}, x.size(1) - front
        x = run_blocks(x, self.blocks, 1, layers, add, maps, slice(front, front + L), *condition)
        if max(layers) > len(self.blocks):
            run_blocks(middle(self.norm(x)), self.decoder_blocks, len(self.blocks) + 1, layers, add, maps, slice(1, 1 + L), *condition)
        return [maps[b] for b in layers]

    def embed(self, x, noise=None, pool="mean"):
        """The vector the paper probes: (B, C). Nothing is hidden; 'mean': the encoder's last outputs averaged over the picture, without
        its final norm, then normalised; 'class': the normed output at the class position."""
        if pool == "mean":
            return F.layer_norm(self.features(x)[0].mean((2, 3)), self.norm.normalized_shape, eps=1e-6)
        ids = self.to_ids(x)
        return self.encode(self.words(ids, torch.zeros_like(ids, dtype=torch.bool)))[:, 0]


def demask(logits, ids, hidden, left, u, noise):
    """One step of parallel decoding, without a random number of its own.

    logits (n, L, K)    ids, hidden (n, L)    left int (n,): how many to hide again    u (n, L) in (0, 1) draws the ids
    noise (n, L) is added to the log-probability of what was drawn; the least certain are hidden again, ids known before never
    returns ids with every position filled, and bool (n, L): hidden again
    """
    p = logits.softmax(-1)
    ids = torch.where(hidden, categorical(p, u), ids)
    confidence = p.gather(-1, ids[..., None]).squeeze(-1).log() + noise
    return ids, ranks(confidence.masked_fill(~hidden, math.inf)) < send(left, ids.device)[:, None]


# ---------------------------------------------------------------------------------------------------------------------------
# 5. MAGE-C: which two crops belong together?
#
#     loss = mean over all 2B views a of  -log softmax_b(z_a . z_b / tau) [b = the other view of a's image]      [SimCLR, eq. 1]
#
# Two crops of each image go through MAGE, each with its own hidden ids. The mean of the encoder's outputs is projected to a unit
# vector z and must be closer to that of the other crop than to those of all other images. Weight 0.1 beside the masked loss
# [MAGE, section 3.3]. The authors released no training code for it: the projection head's sizes and tau are our choice.


def info_nce(z, temperature=0.2):
    """Contrastive loss of unit vectors z (B, 2, P), row i holding the two views of image i; the other 2B - 2 are negatives. With
    several processes the views of all of them take part, gradients included."""
    views, first = z.flatten(0, 1), 0
    everyone = views
    if torch.distributed.is_initialized():
        everyone = torch.cat(torch.distributed.nn.all_gather(views))
        first = torch.distributed.get_rank() * len(views)
    me = torch.arange(first, first + len(views), device=z.device)
    similarity = views @ everyone.T / temperature                                           # (2B, 2B * processes)
    similarity = similarity.scatter(1, me[:, None], -math.inf)                              # nobody is their own partner
    return F.cross_entropy(similarity, me ^ 1)                                              # neighbours 2i and 2i + 1 belong together


# ---------------------------------------------------------------------------------------------------------------------------
# 6. ADDP: read pixels, guess ids
#
#     x_t = D(z)       z_i = e_(id_i) where the id is known, sum_k r_i(k) e_k where it is hidden          r: MAGE's guess from fewer ids
#     loss = mean over hidden positions i of  -sum_k q_i(k) log p_i(k | x_t, the known ids)             q: MAGE's guess from the known ids
#                                                                                                          [ADDP, figure 4]
#
# Ids are good to generate with; to recognise with, pixels are better, since rounding loses what may matter. ADDP has an encoder of
# pixels and a decoder of ids, and generation alternates: guess the ids from the picture, keep the surest, paint the next picture, in
# which a known id is its code and a hidden one the mean of all codes, weighted by how likely they are. In training, a frozen MAGE
# shows how such half-known pictures look: its guess r, from even fewer ids than are known, is what an earlier step would have painted.
# It is the teacher too: where MAGE's target is one id, here it is q, all that MAGE holds possible. No step number enters the
# network; it can see how far the picture is.
#
# What is not written below is MAGE's: blocks, ranks of noise, the loop of decoding, the choice of what to keep.


def nested_shares():
    """Hidden shares of training, ascending, and how often each is drawn: float64 (66,) each. Of the cosine's 101 values at 0, 0.01 .. 1
    those in [0.5, 1), with the weights of MAGE's normal law. As the values lie closest near 1, more is hidden than in MAGE: 74.5 % on
    average. (Official file: utils.py.)"""
    share = (math.pi / 2 * torch.arange(100, -1, -1, dtype=torch.float64) / 100).cos()
    share = share[(share >= 0.5) & (share < 1)]
    weight = (-((share - 0.55) / 0.25) ** 2 / 2).exp()
    return share, weight / weight.sum()


class ADDP(MAGE):
    """Alternating denoising diffusion process (official files: models_addp.py, engine_generate.py, models_vit.py).

    predictor       a trained MAGE. It is frozen, and its tokenizer is this model's. It has no part in generating from nothing
    image_size      S, which must be the predictor's, else ValueError
    width, depth, heads, decoder_depth, decoder_heads       of the two stacks, of one width since words enter both ends

    It has as many words as the predictor. Only codes are ever read or guessed, but the softmax of the loss runs over all words. That loss
    is smoothed, known ids enter the decoder as words too, and a painting is 1 to 5 steps behind: so the code, not the paper's figure.
    """

    def __init__(self, predictor, image_size, width, depth, heads, decoder_depth, decoder_heads, dropout=0.1):
        if image_size != predictor.image_size:
            raise ValueError(f"image size {image_size} is not the predictor's {predictor.image_size}")
        super().__init__(predictor.vqgan, image_size, width, depth, heads, width, decoder_depth, decoder_heads, dropout=dropout)
        words, patch = predictor.mask_id + 1, self.vqgan.stride
        self.token_emb, self.mlm_layer = nn.Embedding(words, width), Head(width, width, words)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})       # one patch is one id's place
        self.token_emb.apply(initialise), self.mlm_layer.apply(initialise)
        nn.init.xavier_uniform_(self.patch_embed["proj"].weight.data.flatten(1))            # it is a linear layer on patches
        self.cls_token, self.mask_token, self.pos_embed = learned(1, width), learned(1, width), learned(1 + self.length, width)
        self.decoder_pos_mask_embed, self.decoder_pos_token_embed = learned(1 + self.length, width), learned(1 + self.length, width)
        self.tokenizer_norm, self.dropout = nn.LayerNorm(width, eps=1e-6), nn.Dropout(dropout)
        self.register_buffer("color_mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)     # ImageNet's
        self.register_buffer("color_std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)
        self.token_predictor = predictor.requires_grad_(False)

    def train(self, mode=True):
        """The predictor stays in eval mode. In the official training model.train() reached it too, so that its guesses, pictures and
        targets alike, had dropout 0.1; model.token_predictor.train() afterwards gives that."""
        super().train(mode)
        self.token_predictor.eval()
        return self

    forms = {**MAGE.forms, **dict.fromkeys(("forward.x", "embed.x"), MAGE.forms["x"])}      # one view; and what is read is clamped

    # ---- training

    def forward(self, x, labels=None, *, index=None, gap=None, noise=None):
        """Loss of one batch.

        x           pixels (B, 3, S, S) in [0, 1] or ids (B, L); labels are not read
        index, gap  which of nested_shares() is hidden, one for the batch (as official), and how many entries more were hidden when the
                    picture was painted, 1 .. 5; noise (B, L): the smallest are hidden. All drawn if None
        returns     scalar loss, dict of its terms
        """
        ids, mask, earlier, seen = self.hide(x, index, gap, noise)
        with torch.no_grad():
            painted, target = self.token_predictor.logits(ids.repeat(2, 1), torch.cat([earlier, mask])).chunk(2)
            x = self.paint(ids, mask, painted)
        logits = self.decode(self.encode(x), ids, mask, seen, rows=len(self.table))
        target = F.pad(target.softmax(-1), (0, logits.size(2) - self.codes))
        loss = masked_loss(logits, target, mask)
        return loss, {"masked": loss}

    def hide(self, x, index=None, gap=None, noise=None):
        """Pixels or ids -> ids (B, L); which are hidden, and which were a few steps earlier, those and more: bool (B, L) each; and how
        many of each picture are not hidden: int."""
        ids = self.to_ids(x)
        noise = torch.rand(ids.shape, device=ids.device) if noise is None else noise
        share, weight = nested_shares()                                                     # on the CPU: the number decides shapes
        index = int(categorical(weight, torch.rand((), dtype=torch.float64)) if index is None else index)
        gap = int(torch.randint(1, 6, ()) if gap is None else gap)
        few, more = (math.ceil(self.length * share[min(i, len(share) - 1)].item()) for i in (index, index + gap))
        order = ranks(noise)
        return ids, order < few, order < more, self.length - few

    def paint(self, ids, hidden, logits):
        """The picture x_t (n, 3, S, S), not clamped: known ids as their codes, hidden ones as the mean of all codes, weighted by softmax(logits)."""
        codes = self.vqgan.quantize.embedding.weight
        z = torch.where(hidden[..., None], logits.softmax(-1) @ codes, codes[ids]).mT.unflatten(2, (self.grid, self.grid))
        return self.vqgan.paint(z)

    def patches(self, x, finetune=False):
        """Pixels (B, 3, S, S) -> what the encoder's blocks read (B, 1 + L, C). Fine-tuning goes without the clamp and tokenizer_norm."""
        x = ((x if finetune else x.clamp(0, 1)) - self.color_mean) / self.color_std
        x = self.patch_embed["proj"](x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).mT], 1) + self.positions(x.size(-1))
        return x if finetune else self.dropout(self.tokenizer_norm(x))

    def positions(self, side):
        """Position table for side x side patches (1, 1 + side * side, C), resized if these are not as many as in training."""
        if side == self.grid:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].mT.unflatten(2, (self.grid, self.grid))
        grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).mT], 1)

    def encode(self, x):
        """Pixels (B, 3, S, S) -> latent (B, 1 + L, C). Every patch enters: hidden ids show as blurred patches."""
        x = self.patches(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decoder_input(self, latent, ids, mask, seen):
        """The latent, a learned token where an id is hidden and, unlike in MAGE, at position 0; behind it the words of the seen ids, as
        many in each picture: (B, 1 + L + seen, C). Each of the three kinds of tokens has positions of its own."""
        x = torch.cat([self.mask_token.expand(len(ids), -1, -1), self.decoder_embed(latent[:, 1:])], 1) + self.decoder_pos_embed_learned
        x = torch.where(F.pad(mask, (1, 0))[..., None], self.mask_token + self.decoder_pos_mask_embed, x)
        words = self.token_emb(ids) + self.decoder_pos_token_embed[:, 1:]
        return torch.cat([x, take(words, mask.int().argsort(stable=True, dim=1)[:, :seen])], 1)      # the seen ones, row by row

    table = property(lambda self: self.token_emb.weight)

    # ---- generation

    rounds_up = True                                            # the first step may keep nothing

    def logits(self, ids, hidden, labels=None, guidance=1.0, x=None, counts=None):
        """Logits (n, L, K) from the picture so far and the known ids. Labels are not read. While all is hidden, no picture is needed: the
        decoder overwrites whatever the encoder says. A hole begins with what the predictor expects in it."""
        counts = hidden.sum(1).cpu() if counts is None else counts
        if counts.min() == self.length:
            latent = self.cls_token.expand(len(ids), 1 + self.length, -1)
        else:
            latent = self.encode(self.paint(ids, hidden, self.token_predictor.logits(ids, hidden)) if x is None else x)
        logits = torch.empty(*ids.shape, self.codes, device=ids.device)
        for count in set(counts.tolist()):                      # words are appended in equal numbers only
            rows = send((counts == count).nonzero().flatten(), ids.device)
            logits[rows] = self.decode(latent[rows], ids[rows], hidden[rows], self.length - count)
        return logits

    def render(self, state):
        """Decoding -> pixels (n, 3, S, S) in [0, 1]: the picture so far. In the last one a single id is still a mean of codes, as official."""
        return state.with_known(state.x.clamp(0, 1))

    # ---- representation

    reads_ids = False                                           # ids would only be decoded, and that is not the picture they came from
    t_range, best_t = (0, 0, "always 0, since no step number enters the network"), 0

    def features(self, x, t=0.0, layers=None, add={}, noise=None, finetune=False):
        """As MAGE's, of pixels (B, 3, S, S), or of ids (B, L), decoded. t must be 0, else ValueError. Decoder layers see all ids.

        finetune  True: as the authors fine-tuned it, without clamp and tokenizer_norm, though pre-trained with them; S may then be another
        """
        x = self.to_pixels(x)

        def middle(latent):
            ids = self.to_ids(x)
            return self.decoder_input(latent, ids, torch.zeros_like(ids, dtype=torch.bool), self.length)
        return self.maps(self.patches(x, finetune), middle, layers, add)

    @torch.no_grad()
    def to_pixels(self, x):
        """Ids (B, L) -> pixels (B, 3, S, S); pixels stay pixels."""
        return x if x.is_floating_point() else self.vqgan.decode(x.long().unflatten(1, (self.grid, self.grid)))

    def embed(self, x, noise=None, pool="mean"):
        """A vector for a frozen probe: (B, C). 'mean': the encoder's normed outputs averaged over the picture; 'class': at position 0."""
        latent = self.encode(self.to_pixels(x))
        return latent[:, 0] if pool == "class" else latent[:, 1:].mean(1)


# ---------------------------------------------------------------------------------------------------------------------------
# 7. UMD, with MAE and DiT as its ends: hide, or add noise, or both
#
#     clean part    a share q of the batch, t = 0, much hidden:    (x0' - x0)^2 on what is hidden                  [MAE]
#     noised part   the rest, t >= 1, less or nothing hidden:      half (eps' - eps)^2 on what is seen,
#                                                                  half (x0' - x0)^2 on what is hidden             [UMD, section 3]
#                   nothing hidden:                                both halves everywhere
#
# Here nothing is tokenised: a token is a patch of pixels. Hiding patches teaches what pictures look like at large, removing noise
# teaches every scale of detail, and both are the same act, corrupting and undoing. If clean is called t = 0, with abar_0 = 1, then
# q_sample covers both parts and three numbers tell four methods apart:
#
#                 share of clean pictures    hidden if clean    hidden if noised
#     UMD                  0.5                    0.75               0.375
#     MAE                  1                      0.75                 -
#     MaskDiT              0                       -                  0.5
#     DiT                  0                       -                   0
#
# The ends are UMD's own. The published MAE has fixed positions, a narrow decoder and targets normalised patch by patch; the published
# DiT reads latents, has no decoder, guesses the noise alone and learns a variance. Their weights do not fit.


class ConditionedBlock(Block):
    """A Block that is told something, here t and the label: shift, scale and gate of both halves follow from a condition c (B, C)
    (adaLN-Zero [DiT, section 3.2]). All of them start at 0, so a fresh block passes x (B, L, C) on unchanged."""

    def __init__(self, dim, heads):
        super().__init__(dim, heads, gelu="tanh")
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, -1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class UMD(Model):
    """Unified masked diffusion (official files: models/ae.py, trainers/train_ae.py of small-vision; there in JAX).

    image_size, grid                            S, and patches along a side; S a multiple of grid, else ValueError
    width, depth, heads, decoder_depth          both stacks have the same width and heads
    clean, hidden_clean, hidden_noised          the three numbers of the table above
    classes                                     0, or the number of labels it can be conditioned on

    Time t, everywhere: 0 for clean pictures, 1 .. T for noised ones.
    """

    def __init__(self, image_size, grid, width, depth, heads, decoder_depth, clean, hidden_clean, hidden_noised, classes=0, class_tokens=4):
        super().__init__()
        if image_size % grid:
            raise ValueError(f"image size {image_size} is not a multiple of the grid, {grid}")
        self.image_size, self.grid, self.length, self.classes = image_size, grid, grid ** 2, classes
        self.best_layer, self.layers = depth, dict.fromkeys(range(1, depth + decoder_depth + 1), (width, grid, grid))
        self.clean, self.hidden_clean, self.hidden_noised, patch = clean, hidden_clean, hidden_noised, image_size // grid
        self.abar = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar("cosine")])    # (1 + T,); no buffer
        self.t_range = (0, len(self.abar) - 1, "the noise step, 0 for none")
        self.generates = clean < 1
        self.best_t = 0 if clean else 51                # where nothing clean was ever seen, a little noise serves best [official default]

        self.time_embed = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        if classes:
            self.label_embed = nn.Sequential(nn.Embedding(classes + 1, width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.pos_embed, self.decoder_pos_embed = (nn.Parameter(torch.randn(1, self.length, width) / self.length ** 0.5) for _ in range(2))
        self.cls_token = nn.Parameter(torch.zeros(1, class_tokens, width))      # equal at the start and so for ever: one token that counts four times
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width), requires_grad=clean * hidden_clean + hidden_noised > 0)
        self.blocks = nn.ModuleList(ConditionedBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_blocks = nn.ModuleList(ConditionedBlock(width, heads) for _ in range(decoder_depth))
        self.decoder_norm, self.decoder_modulation = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, 2 * width)
        self.to_pixels = nn.ConvTranspose2d(width, 6, patch, patch)
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """The authors' start: Xavier-uniform matrices (q, k and v one by one), LeCun-normal embeddings of pixels, time and label, no modulation."""
        for block in (*self.blocks, *self.decoder_blocks):
            for weight in (*block.attn.qkv.weight.chunk(3), block.attn.proj.weight, block.mlp.fc1.weight, block.mlp.fc2.weight):
                nn.init.xavier_uniform_(weight)
            for bias in (block.attn.qkv.bias, block.attn.proj.bias, block.modulation.weight, block.modulation.bias):
                nn.init.zeros_(bias)
            for bias in (block.mlp.fc1.bias, block.mlp.fc2.bias):
                nn.init.normal_(bias, std=1e-6)
        for layer in (self.patch_embed, *self.time_embed, *(self.label_embed if self.classes else ())):
            if isinstance(layer, nn.Embedding):
                nn.init.normal_(layer.weight, std=layer.embedding_dim ** -0.5)
            elif not isinstance(layer, nn.SiLU):
                std = layer.weight[0].numel() ** -0.5 / 0.8796          # 0.8796: what cutting off at two deviations leaves of one
                nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.to_pixels.weight, std=0.02)
        for zero in (self.decoder_modulation.weight, self.decoder_modulation.bias, self.to_pixels.bias):
            nn.init.zeros_(zero)

    # ---- training

    def draws(self, first, count):
        """How many of these pictures stay clean, so that the share is right in the whole batch."""
        return {"clean": int((first + count) * self.clean) - int(first * self.clean)}

    def forward(self, x, labels=None, *, clean=None, t=None, noise=None, mask_noise=None, keep_label=None):
        """Loss of one batch.

        x           pixels (B, 3, S, S) in [0, 1]           labels  int (B,) in 0 .. classes - 1, or None; the clean part never sees them
        clean       how many, the last ones, stay clean; int(B * share) if None. The rest, N of them, are noised:
        t, noise    int (N,) in 1 .. T and (N, 3, S, S), standard normal
        mask_noise  (B, L), the smallest are masked         keep_label  bool (N,): which labels are shown. All drawn if None
        returns     scalar loss, dict of its terms
        """
        x0, B = 2 * x - 1, len(x)
        N = B - (int(B * self.clean) if clean is None else clean)
        t = torch.randint(1, len(self.abar), (N,)) if t is None else t.cpu()
        noise = torch.randn_like(x0[:N]) if noise is None else noise
        mask_noise = torch.rand(B, self.length, device=x.device) if mask_noise is None else mask_noise
        loss, logs = 0, {}
        if N:
            logs["x0"], logs["eps"] = self.errors(x0[:N], t, noise, mask_noise[:N], self.hidden_noised,
                                                  None if labels is None else labels[:N], keep_label)
            loss = N / B * (logs["x0"] + logs["eps"]) / 2
        if N < B:
            logs["x0_clean"], _ = self.errors(x0[N:], t.new_zeros(B - N), torch.zeros_like(x0[N:]), mask_noise[N:], self.hidden_clean)
            loss = loss + (B - N) / B * logs["x0_clean"]
        return loss, logs

    def errors(self, x0, t, noise, mask_noise, ratio, labels=None, keep_label=None):
        """Mean squared errors of x0, where it was hidden, and of the noise, where it could be seen; of both everywhere if nothing is hidden."""
        visible = self.visible(mask_noise, ratio) if ratio else None
        guess = self.predict(q_sample(x0, self.abar[t], noise), t, labels, visible, keep_label)
        if not ratio:
            return tuple(F.mse_loss(ours, target) for ours, target in zip(guess, (x0, noise)))
        hidden = self.hidden_pixels(visible)
        return tuple(((ours - target).square() * where).sum() / (3 * where.sum())
                     for ours, target, where in zip(guess, (x0, noise), (hidden, ~hidden)))

    def visible(self, mask_noise, ratio):
        """The patches of largest noise (B, L), so many that a share ratio is masked: int (B, M)."""
        return mask_noise.argsort(dim=1, stable=True)[:, self.length - int(self.length * (1 - ratio)):]

    def hidden_pixels(self, visible):
        """Visible patches, int (B, M) -> bool (B, 1, S, S), True = hidden."""
        hidden = torch.ones(len(visible), self.length, dtype=torch.bool, device=visible.device).scatter(1, visible, False)
        patch = self.image_size // self.grid
        return hidden.view(-1, 1, self.grid, self.grid).repeat_interleave(patch, 2).repeat_interleave(patch, 3)

    def predict(self, x, t, labels=None, visible=None, keep_label=None):
        """Pixels (B, 3, S, S) in about [-1, 1], noised to t (B,) -> guesses of x0 and of the noise, each (B, 3, S, S).

        visible  int (B, M): the patches that the network sees, all if None        labels, keep_label as for forward
        """
        c = self.condition(send(t, x.device), labels, keep_label)
        return self.decode(self.encode(x, c, visible), c, visible)

    def condition(self, t, labels=None, keep_label=None):
        """What every block is told: (B, C). In training one label in ten is left out, which guidance needs."""
        phases = angles(t, self.norm.weight.numel(), self.norm.weight.numel() / 2 - 1)
        c = self.time_embed(torch.cat([phases.sin(), phases.cos()], 1))
        if self.classes:
            if labels is not None and keep_label is None:
                keep_label = torch.rand(labels.shape, device=t.device) >= (0.1 if self.training else 0.0)
            none = torch.full_like(t, self.classes)
            c = c + self.label_embed(none if labels is None else torch.where(keep_label, labels, none))
        return F.silu(c)

    def encode(self, x, c, visible=None):
        """Noised pixels -> class tokens, then the visible patches: (B, 4 + M, C)."""
        x = self.tokens(x)
        x = x if visible is None else take(x, visible)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x, c)
        return self.norm(x)

    def tokens(self, x):
        """A token a patch, which knows its place: (B, 3, S, S) -> (B, L, C)."""
        return self.patch_embed(x).flatten(2).mT + self.pos_embed

    def decode(self, latent, c, visible=None):
        """Latent (B, 4 + M, C) -> guesses of x0 and of the noise, each (B, 3, S, S)."""
        x = self.decoder_input(latent, visible)
        for block in self.decoder_blocks:
            x = block(x, c)
        shift, scale = self.decoder_modulation(c)[:, None].chunk(2, -1)
        x = self.decoder_norm(x)[:, 1:] * (1 + scale) + shift
        return in_float32(self.to_pixels, x.mT.unflatten(2, (self.grid, self.grid))).chunk(2, 1)

    def decoder_input(self, latent, visible=None):
        """The mean of the class tokens, all that the decoder learns of the picture as a whole; then patches in their places, the
        mask token in every gap: (B, 1 + L, C)."""
        front, x = latent[:, :self.cls_token.size(1)].mean(1, keepdim=True), latent[:, self.cls_token.size(1):]
        x = x if visible is None else put(self.mask_token.to(x.dtype).expand(len(x), self.length, -1), visible, x)
        return torch.cat([front, x + self.decoder_pos_embed], 1)

    # ---- generation

    def guided(self, x, t, labels=None, guidance=1.0):
        """predict(), with what the label changes exaggerated."""
        if labels is None or guidance == 1:
            return self.predict(x, t, labels)
        return tuple(free + guidance * (ours - free) for ours, free in zip(self.predict(x, t, labels), self.predict(x, t)))

    @torch.no_grad()
    def sample_steps(self, n, steps=None, temperature=None, guidance=1.0, labels=None, known=None, mask=None, seeds=None):
        """From noise to pictures: yields a Denoising after each step.

        n, steps      pictures; steps, 125 as published: from T down in strides of T / steps, rounded up, and t = 1 at the end
        temperature   eta of ddim_step, 0 to 1: 1 as published (DDPM), 0 for DDIM, which adds no noise on the way
        labels, guidance, known, mask, seeds        as for MAGE.sample_steps; guidance is the same at every step
        ValueError    if it was trained on clean pictures only (MAE) and there is nothing known: it fills holes, in one step
        """
        if self.clean == 1:
            yield self.fill(known, mask)
            return
        T = len(self.abar) - 1
        t = [*range(T, 1, -math.ceil(T / (steps or 125))), 1]

        def guess(x, step):
            _, eps = self.guided(x, torch.full((n,), t[step], device=x.device), labels, guidance)
            return x0_from_noise(x, self.abar[t[step]], eps).clamp(-1, 1), None
        eta = 1.0 if temperature is None else temperature
        yield from denoise(guess, lambda draw: self.noise(seeds, draw), self.abar[t], eta, known, mask)

    def fill(self, known, mask):
        """MAE's way to inpaint: patches that the mask touches are hidden, and guessed at once from the rest."""
        hidden = F.max_pool2d(mask[:, None].float(), self.image_size // self.grid).flatten(1).int()
        visible, counts = hidden.argsort(stable=True, dim=1), (1 - hidden).sum(1).cpu()
        x, x0 = 2 * known - 1, torch.empty_like(known)
        for count in set(counts.tolist()):                                                  # holes differ in size
            rows = send((counts == count).nonzero().flatten(), x.device)
            x0[rows], _ = self.predict(x[rows], torch.zeros_like(rows), visible=visible[rows, :count])
        return Denoising(torch.where(mask[:, None], x0.clamp(-1, 1), x))

    @torch.no_grad()
    def reconstruct(self, x, mask_noise=None):
        """How MAE is looked at: pixels (B, 3, S, S) -> the same with the clean part's share hidden, and with the network's guess there."""
        mask_noise = torch.rand(len(x), self.length, device=x.device) if mask_noise is None else mask_noise
        visible = self.visible(mask_noise, self.hidden_clean)
        hidden = self.hidden_pixels(visible)
        guess = (self.predict(2 * x - 1, torch.zeros(len(x), dtype=torch.long, device=x.device), visible=visible)[0] + 1) / 2
        return torch.where(hidden, 0.2, x), torch.where(hidden, guess.clamp(0, 1), x)

    # ---- representation

    maps = MAGE.maps

    def noised(self, x, t, noise=None):
        """Pixels (B, 3, S, S) in [0, 1] -> what the network reads at time t, and its condition (B, C)."""
        xt = q_sample(2 * x - 1, self.abar[int(t)], torch.randn_like(x) if noise is None else noise)
        return xt, self.condition(torch.full((len(x),), int(t), device=x.device))

    def features(self, x, t=0, layers=None, add={}, noise=None, finetune=False):
        """Block outputs as maps; arguments as for MAGE.features, with t from 0 (clean) to T and noise (B, 3, S, S)."""
        x, c = self.noised(x, t, noise)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.tokens(x)], 1)
        return self.maps(x, self.decoder_input, layers, add, self.cls_token.size(1), c)

    pools = ("class", "mean")

    def embed(self, x, noise=None, pool="class"):
        """The vector the paper probes: (B, C). 'class': the mean of the normed class tokens; 'mean': of the last encoder layer over the
        picture, normalised. At t = best_t: clean, or for a model that never saw clean pictures with a little noise (B, 3, S, S)."""
        if pool == "mean":
            return F.layer_norm(self.features(x, self.best_t, noise=noise)[0].mean((2, 3)), self.norm.normalized_shape, eps=1e-6)
        return self.encode(*self.noised(x, self.best_t, noise))[:, :self.cls_token.size(1)].mean(1)


# ---------------------------------------------------------------------------------------------------------------------------
# 8. ADM: guess the noise, pixel by pixel
#
#     loss = mean (eps - eps'(x_t, t))^2  +  vb            x_t as in section 3, t uniform              [DDPM, eq. 14] [iDDPM, eq. 16]
#
# The plainest way to undo noise: a network that looks at the noised picture and names the noise. It is a U-Net: residual blocks
# on ever smaller maps, and back to ever larger ones, where each block also gets the map that the block opposite to it on the way
# down has made. Nothing is hidden and nothing is tokenised; t is told to every block. Frozen, it can be read like any other network
# [DiffSSL]: best soon after its middle, from a picture with a little noise. (Official files: unet.py, gaussian_diffusion.py, nn.py.)


def zero(module):
    """The same layer with all weights 0: what ends a branch adds nothing at first, so every block starts as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class TimedResBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; between them, emb scales and shifts every channel. Official name: ResBlock.

    forward(x (B, inp, h, w), emb (B, E)) -> (B, out, h', w'). resize halves or doubles the map, before the first convolution and on
    the shortcut alike.
    """

    def __init__(self, inp, out, emb, groups, dropout, resize=None):
        super().__init__()
        self.resize = resize or nn.Identity()
        self.in_layers = nn.Sequential(nn.GroupNorm(groups, inp), nn.SiLU(), nn.Conv2d(inp, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * out))
        self.out_layers = nn.Sequential(nn.GroupNorm(groups, out), nn.SiLU(), nn.Dropout(dropout), zero(nn.Conv2d(out, out, 3, padding=1)))
        self.skip_connection = nn.Identity() if inp == out else nn.Conv2d(inp, out, 1)

    def forward(self, x, emb):
        h = self.in_layers[2](self.resize(self.in_layers[:2](x)))
        scale, shift = self.emb_layers(emb)[..., None, None].chunk(2, 1)
        h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        return self.skip_connection(self.resize(x)) + h


class MapAttention(nn.Module):
    """Self-attention over a map (B, C, h, w), without positions. Heads of width head, or so many; order of
    channels "legacy": q, k, v of each head; "new": q of all heads, k, v. Official name: AttentionBlock."""

    def __init__(self, dim, head, groups, heads=None, order="legacy"):
        super().__init__()
        if dim % (heads or head):
            raise ValueError(f"width {dim} is no multiple of {heads or head}, see --adm-heads")
        self.heads = n = heads or dim // head
        self.split = {"legacy": ((n, 3, -1), (3, 0, 2, 1, 4)), "new": ((3, n, -1), (2, 0, 3, 1, 4))}[order]
        self.norm = nn.GroupNorm(groups, dim)
        self.qkv, self.proj_out = nn.Conv1d(dim, 3 * dim, 1), zero(nn.Conv1d(dim, dim, 1))

    def forward(self, x):
        qkv = F.linear(self.norm(x).flatten(2).mT, self.qkv.weight[..., 0], self.qkv.bias)  # (B, L, 3C): what convolutions give is in
        q, k, v = qkv.unflatten(2, self.split[0]).permute(self.split[1])        # no fused kernel's order
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + F.linear(y, self.proj_out.weight[..., 0], self.proj_out.bias).mT.view(x.shape)


class TimedBlock(nn.Sequential):
    """The layers of one block; residual blocks are told the time. (B, C, h, w), (B, E) -> (B, C', h', w')."""

    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimedResBlock) else layer(x)
        return x


# How much noise a step back puts in again need not be known beforehand. At least it is what would be right if x_0 were known,
# at most what would be right if every picture were noise; the network says for every pixel where between the two, on a
# logarithmic scale [iDDPM, eq. 15]. It learns that from the variational bound: how many bits, a pixel and color, are lost if
# the step back is drawn from the network's normal distribution instead of the true one. In there eps' is detached: vb teaches the
# variance alone. Its weight is 1: the paper's 0.001 stands before a sum over 1000 steps, of which one t drawn gives the mean.


def log_variances(abar):
    """Logarithms of the smallest and the largest variance of each step back: float64 (T,) -> twice (T,). The last step, to x_0, needs
    none, and its logarithm would be infinite; it gets the smallest variance of its neighbour."""
    before = F.pad(abar[:-1], (1, 0), value=1.0)
    small = posterior_variance(abar, before)
    return torch.cat([small[1:2], small[1:]]).log(), (1 - abar / before).log()


def learned_log_variance(v, i, abar):
    """The network's v (B, 3, S, S), about -1 .. 1, at steps i of the process abar (T,) -> log of the variance, like v."""
    small, large = (spread(table[i], v) for table in log_variances(abar))
    return (1 + v) / 2 * large + (1 - v) / 2 * small


def discretised_nll(x, mean, log_std):
    """-log of the mass, in nats, that a normal distribution puts on the byte that x in [-1, 1] stands for; the first and last byte take
    all that lies beyond. Elementwise; its cdf is the usual approximation by tanh, as official (losses.py)."""
    def cdf(z):
        return 0.5 * (1 + (math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3)).tanh())
    below, above = (cdf((x - mean + side / 255) * (-log_std).exp()) for side in (-1, 1))
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return -mass.clamp(min=1e-12).log()


def hybrid_loss(out, x0, xt, noise, i, abar):
    """The two terms of the loss for each picture: squared error of the noise, and vb in bits. (B,) each.

    out  (B, 6, S, S): guess of the noise, and v        x0, xt, noise  (B, 3, S, S), x0 in [-1, 1]
    i    int (B,), on the CPU: steps of the process abar (T,), which may be one that kept_steps has shortened
    """
    eps, v = out.chunk(2, 1)
    now, after = abar[i], F.pad(abar, (1, 0), value=1.0)[i]
    true = ddim_step(xt, x0, now, after, eta=1.0)                                           # means of the two normal distributions
    mean = ddim_step(xt, x0_from_noise(xt, now, eps.detach()), now, after, eta=1.0)
    log_var, log_true = learned_log_variance(v, i, abar), spread(log_variances(abar)[0][i], v)
    kl = 0.5 * (log_var - log_true - 1 + (log_true - log_var).exp() + (true - mean) ** 2 * (-log_var).exp())
    nats = torch.where(spread(i == 0, x0) > 0, discretised_nll(x0, mean, 0.5 * log_var), kl).mean((1, 2, 3))
    return (noise - eps).square().mean((1, 2, 3)), nats / math.log(2)


class ADM(Model):
    """Diffusion U-Net without labels.

    image_size           S; a multiple of 2 ** (levels - 1), else ValueError
    ch, ch_mult, blocks  width of level i is ch * ch_mult[i]; residual blocks a level, and one more on the way up
    attention            how many times smaller than the picture the maps are that get attention; the middle always does
    head, heads, order   see MapAttention   groups  of every GroupNorm; divides every width
    schedule, steps      of the noise, see alpha_bar       classes  0: labels have no place here, else ValueError

    Blocks are counted from 1: N on the way down, the middle N + 1, then those on the way up, of which number b also reads the map of
    its mirror, 2N + 2 - b. What a block puts out is what all its layers have made, attention and change of size included.
    """

    def __init__(self, image_size, ch, ch_mult, blocks, attention, head=64, dropout=0.0, groups=32, schedule="linear", steps=1000, classes=0,
                 heads=None, order="legacy"):
        super().__init__()
        if image_size % 2 ** (len(ch_mult) - 1):
            raise ValueError(f"image size {image_size} cannot be halved {len(ch_mult) - 1} times")
        if classes:
            raise ValueError("this network takes no labels")
        self.image_size, self.classes, self.layers = image_size, classes, {}                # layers: {block: (channels, h, w)}
        self.abar = alpha_bar(schedule, steps)                                              # no buffer
        self.stride = 2 ** (len(ch_mult) - 1)
        self.t_range, self.best_t = (0, steps - 1, "the step of the noise"), round(0.09 * steps)    # [DiffSSL] reads at 90 of 1000
        self.time_embed = nn.Sequential(nn.Linear(ch, 4 * ch), nn.SiLU(), nn.Linear(4 * ch, 4 * ch))
        residual = functools.partial(TimedResBlock, emb=4 * ch, groups=groups, dropout=dropout)
        attention_of = functools.partial(MapAttention, head=head, groups=groups, heads=heads, order=order)
        widths = [int(ch * m) for m in ch_mult]

        def attend(i):
            return [attention_of(widths[i])] if 2 ** i in attention else []

        def block(width, level, *layers):
            self.layers[len(self.layers) + 1] = (width, image_size >> level, image_size >> level)
            return TimedBlock(*layers)
        c = widths[0]
        self.input_blocks = nn.ModuleList([block(c, 0, nn.Conv2d(3, c, 3, padding=1))])
        for i, width in enumerate(widths):
            if i:
                self.input_blocks.append(block(c, i, residual(c, c, resize=nn.AvgPool2d(2))))
            for _ in range(blocks):
                self.input_blocks.append(block(width, i, residual(c, width), *attend(i)))
                c = width
        self.middle_block = block(c, i, residual(c, c), attention_of(c), residual(c, c))
        self.output_blocks = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            for j in range(blocks + 1):
                up = [residual(width, width, resize=nn.Upsample(scale_factor=2.0))] if i and j == blocks else []
                inp = c + self.layers[self.mirror(len(self.layers) + 1)][0]
                self.output_blocks.append(block(width, i - len(up), residual(inp, width), *attend(i), *up))
                c = width
        self.best_layer = min(len(self.input_blocks) + 2 + 2 * blocks, len(self.layers))    # [DiffSSL]: 24 of 37, before maps grow a second time
        self.out = nn.Sequential(nn.GroupNorm(groups, c), nn.SiLU(), zero(nn.Conv2d(c, 6, 3, padding=1)))
        self.to(memory_format=torch.channels_last)                                          # up to twice as fast, on CPUs too

    @property
    def blocks(self):
        """All blocks in the order they run."""
        return [*self.input_blocks, self.middle_block, *self.output_blocks]

    def predict(self, x, t, layers=None, add={}):
        """The network itself: noised pixels x (B, 3, S, S), of clean ones in [-1, 1], and steps t int (B,) -> (B, 6, S, S): the noise, and
        v of learned_log_variance. With layers: [map (B, C, h, w) for each of layers] instead, and no block after the last of them runs.

        add  {layer: map} is added to the output of that layer, before anyone reads it
        """
        phase = angles(send(t, x.device), self.time_embed[0].in_features, self.time_embed[0].in_features // 2)
        emb, stack, maps = self.time_embed(torch.cat([phase.cos(), phase.sin()], 1).to(x.dtype)), [], {}
        for b, block in enumerate(self.blocks, 1):
            if b > len(self.input_blocks) + 1:
                x = torch.cat([x, stack.pop()], 1)
            x = block(x, emb)
            if b in add:
                x = x + add[b]
            if b <= len(self.input_blocks):
                stack.append(x)
            if layers and b in layers:
                maps[b] = x
                if b == max(layers):
                    return [maps[b] for b in layers]
        return in_float32(self.out, x)

    def noised(self, x, t, noise=None):
        """Pixels (B, 3, S, S) in [0, 1] and steps int (B,) -> x_0 in [-1, 1], x_t, and the noise in it, drawn if None."""
        noise = torch.randn_like(x) if noise is None else noise
        return 2 * x - 1, q_sample(2 * x - 1, self.abar[t], noise), noise

    # ---- training

    def forward(self, x, labels=None, *, t=None, noise=None):
        """Loss of one batch: pixels (B, 3, S, S) in [0, 1] -> scalar, dict of its terms. t int (B,) and noise like x are drawn if None."""
        t = torch.randint(len(self.abar), (len(x),)) if t is None else t.cpu()
        x0, xt, noise = self.noised(x, t, noise)
        mse, vb = hybrid_loss(self.predict(xt, t), x0, xt, noise, t, self.abar)
        return (mse + vb).mean(), {"mse": mse.mean(), "vb": vb.mean()}

    # ---- generation

    @torch.no_grad()
    def sample_steps(self, n, steps=None, temperature=None, guidance=1.0, labels=None, known=None, mask=None, seeds=None):
        """Ancestral sampling [DDPM, algorithm 2] with the learned variance, or DDIM, on a shortened process.

        n, steps      pictures, steps; 250 as published, 25 for DDIM
        temperature   0 to 1. 1: ancestral; less: DDIM, eta of ddim_step, which adds less noise, at 0 none
        known, mask, seeds        as for MAGE.sample_steps
        yields        a Denoising after each step. labels must be None: this network takes none, so guidance means nothing
        """
        T, eta = len(self.abar), 1.0 if temperature is None else temperature
        steps = min(steps or (250 if eta else 25), T)
        kept = kept_steps(T, [steps]) if eta else strided_steps(T, steps)
        abar, last = self.abar[kept], len(kept) - 1

        def guess(x, step):
            i = last - step
            eps, v = self.predict(x, torch.full((n,), kept[i], device=x.device)).chunk(2, 1)
            std = (0.5 * learned_log_variance(v, i, abar)).exp() if eta == 1 and i else None
            return x0_from_noise(x, abar[i], eps).clamp(-1, 1), std
        yield from denoise(guess, lambda draw: self.noise(seeds, draw), abar.flip(0), eta, known, mask)

    # ---- representation

    forms = {**Model.forms, "t": Model.forms["t"] + " or int ({B}) in [{m.t_range[0]}, {m.t_range[1]}]"}

    def mirror(self, layer):
        """The block on the other side, whose map goes into this one, and to which feedback heads feed this one back."""
        return 2 * len(self.input_blocks) + 2 - layer

    def features(self, x, t=0, layers=None, add={}, noise=None, finetune=False):
        """Block outputs as maps; no block after the last one asked for runs.

        x       pixels (B, 3, S, S) in [0, 1]      layers  which blocks; [best_layer] if None      finetune  changes nothing here
        t       step of the noise, int or int (B,); noise like x, drawn if None
        add     {layer: map (B, C, h, w)} added to the output of that layer
        returns [map (B, C, h, w) for each of layers]
        """
        t = torch.as_tensor(t).cpu().long().expand(len(x))
        return self.predict(self.noised(x, t, noise)[1], t, layers or [self.best_layer], add)

    pools = ("mean",)

    def embed(self, x, noise=None, pool="mean"):
        """The vector the paper probes: (B, C), the mean over the map of the best layer at the best step. noise as for features."""
        return self.features(x, self.best_t, noise=noise)[0].mean((2, 3))


# Wrong calls. One guard stands before all public methods, a fork's too. It knows arguments by their names, and their forms
# from the class: "float (B, 3, 32, 32) in [0, 1]" is a tensor, "int in [1, 9)" a number. Kind, shape and device can be
# looked at without waiting for a GPU; values are if they lie on the CPU, and in sample() wherever they lie.

FORM = re.compile(r"(\w+)(?: \((.*?),?\))?(?: in \[(\S+), (\S+)([])]))?")


def is_number(v, kind, low, high):
    """Whether v is a finite int or float, or a tensor of one on the CPU, from low to high."""
    if isinstance(v, torch.Tensor) and v.dim() == 0 and v.device.type == "cpu":
        v = v.item()
    real = isinstance(v, (int, float, numpy.integer, numpy.floating))
    return real and low <= v <= high and abs(v) < math.inf and (kind == "float" or v % 1 == 0)


def is_tensor(v, kind, shape, low, high, weight, near, wait):
    """Whether v is a tensor of this kind and shape, where letters are any number, beside the weight, or near (on the CPU). Floats are of
    the weight's type or, under autocast, of any not above 32 bits. wait: for values from low to high on any device."""
    if not isinstance(v, torch.Tensor) or kind not in str(v.dtype) or v.dim() != len(shape):
        return False
    if any(s not in (str(n), "B", "h", "w") for s, n in zip(shape, v.shape)):
        return False
    if v.device != weight.device and not (near and v.device.type == "cpu"):
        return False
    if kind == "float" and v.dtype != weight.dtype:
        return v.element_size() < 8 and torch.is_autocast_enabled("cpu" if v.is_meta else v.device.type)
    if (low, high) == (-math.inf, math.inf) or v.is_meta or not v.numel() or v.device.type != "cpu" and not wait:
        return True
    least, most = (v.long() if kind == "int" else v).aminmax()
    return bool(low <= least and most <= high)


def fits(v, form, weight, near=False, wait=False):
    """Whether v is of one of the forms that "or" connects; "among a, b" are names, "layers" and "maps" collections of numbers."""
    if " or " in form:
        return any(fits(v, part, weight, near, wait) for part in form.split(" or "))
    if form.startswith("among "):
        return isinstance(v, str) and v in re.findall(r"[\w-]+", form)[1:]
    kind, shape, low, high, end = FORM.fullmatch(form).groups()
    low, high = float(low or -math.inf), float(high or math.inf) - (end == ")")
    if kind in ("layers", "maps"):
        several = typing.Mapping if kind == "maps" else typing.Collection
        return isinstance(v, several) and all(is_number(b, "int", low, high) for b in v)
    return is_number(v, kind, low, high) if shape is None else is_tensor(v, kind, shape.split(", "), low, high, weight, near, wait)


def sizes(model, a):
    """What the letters in forms stand for, given the arguments a: B images, N of them that are noised or two crops each, S, D layers."""
    x, n, m = a.get("x"), a.get("n"), model
    S, D, stride = getattr(m, "image_size", 0), len(getattr(m, "layers", ())), getattr(m, "stride", 0)
    if a.get("finetune") and isinstance(m, ADDP):               # whose encoder takes other sizes
        stride = m.vqgan.stride
    if stride and isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim():                        # any multiple will do
        side = max(x.size(-1) // stride, 1) * stride
        S, D = side, m.best_layer if isinstance(m, ADDP) and side != S else D
    B = len(x) if isinstance(x, torch.Tensor) and x.dim() else int(n) if is_number(n, "int", 1, math.inf) else "B"
    N = B
    if "clean" in a and B != "B":
        N = B - (int(B * m.clean) if not is_number(a["clean"], "int", 0, B) else int(a["clean"]))
    elif isinstance(x, torch.Tensor) and x.dim() in (3, 5):                                                 # (B, 2, L), (B, 2, 3, S, S)
        N = 2 * B
    return {"m": m, "S": S, "D": D, "B": B, "N": N, "time": type(getattr(m, "t_range", (0, 0))[1]).__name__}


def require(key, v, form, weight, **more):
    """ValueError if v is not of the form."""
    if not fits(v, form, weight, **more):
        found = f"{v.dtype} {tuple(v.shape)} on {v.device}; the model is {weight.dtype} on {weight.device}" \
            if isinstance(v, torch.Tensor) else repr(v)[:200]
        raise ValueError(f"{key} must be {form}, not {found}" + "; divide bytes by 255" * found.startswith("torch.uint8"))


def checked(method, args, options, wait=False):
    """Call a method if its arguments are of the forms that its class states, else ValueError. Integers become int or int64;
    labels and seeds go to the model's device, seeds are counted from one number. wait: for values that are not on the CPU."""
    signature, model = inspect.signature(method), args[0]
    given = signature.bind(*args, **options)
    given.apply_defaults()
    a, weight = given.arguments, next(model.parameters())
    known = a.get("known") is not None
    if known != (a.get("mask") is not None) or "n" in a and not (known or model.generates):
        raise ValueError("known and mask go together, and a model that cannot start from nothing needs both")
    size = sizes(model, a)
    for key, v in a.items():
        form = model.forms.get(f"{method.__name__}.{key}", model.forms.get(key, "")).format(**size)
        if not form or v is None and signature.parameters[key].default is None:
            continue
        near = key in ("labels", "seeds", "t")
        require(key, v, form, weight, near=near, wait=wait or key == "t")
        if key == "layers":
            a[key] = [*map(int, v)]
        elif key == "add":
            a[key] = {int(b): m for b, m in v.items()}
            for b, m in a[key].items():
                C, *sides = model.layers[b]
                require(f"add[{b}]", m, f"float ({size['B']}, {C}, {', '.join(str(n * size['S'] // model.image_size) for n in sides)})", weight)
        elif isinstance(v, torch.Tensor) and v.dim():
            v = v if v.is_floating_point() or v.dtype == torch.bool else v.long()
            a[key] = send(v, weight.device) if key in ("labels", "seeds") else v
        elif form.startswith("int"):
            a[key] = int(v)
    if "n" in a and not isinstance(a.get("seeds", weight), torch.Tensor):
        a["seeds"] = torch.arange(a["n"], device=weight.device) + (a["seeds"] or 0)
    return method(*given.args, **given.kwargs)


# ---------------------------------------------------------------------------------------------------------------------------
# 9. Presets, and weights of the original authors
#
# A model is a name and a dict of plain numbers; a checkpoint stores that dict, build() turns it back into a model. Published
# files store none, so their sizes are read off the shapes of their tensors. Base and large are the papers' sizes; of ADM that is the
# network for 256 pixels, and small the one that DDPM has for 32, in ADM's manner.

TOKENIZERS = {
    "toy":   dict(codebook_dim=16, ch=16, ch_mult=(1, 1, 1, 1, 1), blocks=1, groups=1),     # enough for shapes in flat colours
    "tiny":  dict(codebook_dim=16, ch=32, ch_mult=(1, 1, 1, 1, 1), blocks=1, groups=1),
    "small": dict(codebook_dim=32, ch=64, ch_mult=(1, 1, 2, 2, 4), blocks=2, groups=8),
    "base":  dict(codebook_dim=256, ch=128, ch_mult=(1, 1, 2, 2, 4), blocks=2),
}
TOKENIZERS["large"] = TOKENIZERS["base"]

MAGE_SIZES = {
    "tiny":  dict(width=128, depth=4, heads=4, decoder_width=128, decoder_depth=2, decoder_heads=4, dropout=0.0),
    "small": dict(width=384, depth=12, heads=6, decoder_width=384, decoder_depth=4, decoder_heads=6),
    "base":  dict(width=768, depth=12, heads=12, decoder_width=768, decoder_depth=8, decoder_heads=16),
    "large": dict(width=1024, depth=24, heads=16, decoder_width=1024, decoder_depth=8, decoder_heads=16),
}
ADDP_SIZES = {size: {k: v for k, v in args.items() if k != "decoder_width"} for size, args in MAGE_SIZES.items()}


UMD_SIZES = {
    "tiny":  dict(width=128, depth=4, heads=4, decoder_depth=2),
    "small": dict(width=384, depth=12, heads=6, decoder_depth=4),
    "base":  dict(width=768, depth=12, heads=12, decoder_depth=4),
    "large": dict(width=1024, depth=24, heads=16, decoder_depth=8),
}


def timm_plain(name, p):
    """Parameters without weight decay in MAE and MAGE: all vectors."""
    return p.dim() <= 1 or name.endswith(".bias")


def umd_plain(name, p):
    """The same in UMD: norms decay there, tokens do not."""
    return name.endswith("bias") or name in ("cls_token", "mask_token")


# How each is trained: AdamW with these; clip is of the gradient's norm; the learning rate rises for a share warmup of the steps and falls
# to a share least of itself; crop is the share of a picture that is kept at least. ema is how slowly the averaged weights, which sampling
# then reads, follow, 0 for none; probe_ema: so do probes. paper: length, batch and learning rate for 256 images of the papers' ImageNet runs;
# tiny: what serves the tiny models of pixels better than the small sets' defaults (train.py).
MAGE_RECIPE = dict(betas=(0.9, 0.95), decay=0.05, plain=timm_plain, clip=3.0, warmup=0.025, least=0.0, crop=0.2, ema=0.0, probe_ema=False,
                   paper=dict(epochs=1600, batch_size=4096, lr=1.5e-4), tiny={})
ADDP_RECIPE = dict(MAGE_RECIPE, paper=dict(epochs=1600, batch_size=4096, lr=1e-4))
UMD_RECIPE = dict(betas=(0.9, 0.95), decay=0.05, plain=umd_plain, clip=1.0, warmup=0.05, least=0.0, crop=0.8, ema=0.9999, probe_ema=False,
                  paper=dict(epochs=800, batch_size=1024, lr=1.5e-4), tiny=dict(ids=64, batch_size=32, steps=3000, lr=18e-3))
MAE_RECIPE = dict(UMD_RECIPE, ema=0.0, paper=dict(epochs=800, batch_size=4096, lr=1.5e-4))
TUNE_RECIPE = dict(UMD_RECIPE, betas=(0.9, 0.999), decay=0.0, crop=0.95, paper=dict(epochs=50, batch_size=256, lr=1.5e-4))
ADM_RECIPE = dict(betas=(0.9, 0.999), decay=0.0, plain=timm_plain, clip=math.inf, warmup=0.0, least=1.0, crop=0.8, ema=0.9999, probe_ema=True,
                  paper=dict(epochs=396, batch_size=256, lr=1e-4), tiny=dict(batch_size=32, steps=2000))

ADM_SIZES = {
    "tiny":  dict(ch=16, ch_mult=(1, 2, 4), blocks=1, attention=(4,), head=32, groups=4, schedule="cosine"),
    "small": dict(ch=128, ch_mult=(1, 2, 2, 2), blocks=2, attention=(2,), dropout=0.1, schedule="cosine"),
    "base":  dict(ch=256, ch_mult=(1, 1, 2, 2, 4, 4), blocks=2, attention=(8, 16, 32)),
}
ADM_SIZES["large"] = ADM_SIZES["base"]


class Method(typing.NamedTuple):
    """A row of MODELS: the class, its constructor's arguments by size, and those that make it this method."""
    model: type
    sizes: dict
    options: dict
    tune: dict = {}                     # what changes when a trained model learns to be conditioned on labels
    tokenizer: bool = True              # reads ids; else pixels
    predictor: str = ""                 # the row of the trained model that it learns from
    views: int = 1                      # crops it reads of an image
    recipe: dict = MAGE_RECIPE
    tune_recipe: dict = MAGE_RECIPE


def umd_method(clean, hidden_clean, hidden_noised):
    """UMD with these three numbers. Learning labels it sees noised pictures whole, and a few clean ones, so as not to forget them."""
    options = dict(clean=clean, hidden_clean=hidden_clean, hidden_noised=hidden_noised)
    return Method(UMD, UMD_SIZES, options, dict(clean=0.05 if clean else 0.0, hidden_noised=0.0), tokenizer=False,
                  recipe=UMD_RECIPE if clean < 1 else MAE_RECIPE, tune_recipe=TUNE_RECIPE)


MODELS = {
    "mage":    Method(MAGE, MAGE_SIZES, {}),
    "mage-c":  Method(MAGE, MAGE_SIZES, {"contrastive": 0.1}, views=2),
    "addp":    Method(ADDP, ADDP_SIZES, {}, predictor="mage", recipe=ADDP_RECIPE),
    "umd":     umd_method(0.5, 0.75, 0.375),
    "mae":     umd_method(1.0, 0.75, 0.0),
    "maskdit": umd_method(0.0, 0.0, 0.5),
    "dit":     umd_method(0.0, 0.0, 0.0),
    "adm":     Method(ADM, ADM_SIZES, {}, tokenizer=False, recipe=ADM_RECIPE),
}


def tokenizer_config(size, stride, codes=1024):
    """VQGAN arguments of a preset, cut down to the levels that a stride of 2, 4, 8 or 16 needs."""
    config = dict(TOKENIZERS[size], codebook_size=codes)
    config["ch_mult"] = list(config["ch_mult"][:int(math.log2(stride)) + 1])
    return config


def model_config(name, size, image_size, grid=None, tokenizer=None, classes=0, tune=False):
    """Everything build() needs, as plain values.

    grid       patches along a side, for models that read pixels
    tokenizer  VQGAN arguments, for models that read ids; or the config of the predictor, which is one of the same size if not given
    classes    > 0: conditioned on labels, which models with a predictor are not        tune  True: starting from a trained model
    """
    method = MODELS[name]
    if method.predictor:
        source = {"predictor": tokenizer if "model" in tokenizer else model_config(method.predictor, size, image_size, grid, tokenizer)}
    elif method.tokenizer:
        source = {"tokenizer": tokenizer, "classes": classes}
    elif "grid" in inspect.signature(method.model).parameters:
        source = {"grid": grid, "classes": classes}
    else:
        source = {"classes": classes}
    return {"model": name, "image_size": image_size, **source, **method.sizes[size], **method.options, **(method.tune if tune else {})}


def build(config):
    """Config -> model with fresh weights. A config without 'model' is a tokenizer's."""
    if "model" not in config:
        return VQGAN(**config)
    rest = {k: v for k, v in config.items() if k not in ("model", "tokenizer", "predictor")}
    frozen = [build(config[k]) for k in ("tokenizer", "predictor") if k in config]
    return MODELS[config["model"]].model(*frozen, **rest)


def parts(state, prefix):
    """A state dict's part whose names begin with prefix, which is cut off."""
    return {k[len(prefix):]: v for k, v in state.items() if k.startswith(prefix)}


def count(state, prefix):
    """How many blocks the state dict has under prefix."""
    return len({k.split(".")[0] for k in parts(state, prefix)})


def published_tokenizer(state):
    """VQGAN arguments read off a state dict with the official names (vqgan_jax_strongaug.ckpt)."""
    ch = state["encoder.conv_in.weight"].size(0)
    widths = [state[f"encoder.down.{i}.block.0.conv1.weight"].size(0) for i in range(count(state, "encoder.down."))]
    size, dim = state["quantize.embedding.weight"].shape
    return dict(codebook_size=size, codebook_dim=dim, ch=ch, ch_mult=[w // ch for w in widths], blocks=count(state, "encoder.down.0.block."))


# What shapes cannot tell: heads of encoder and decoder by width. And what the published MAGE and ADDP files carry although no line
# of their code reads it: leftovers of MAE.
PUBLISHED_HEADS = {768: (12, 16), 1024: (16, 16)}
DEAD = ("cls_token", "pos_embed", "mask_token", "decoder_pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias",
        "decoder_pred.weight", "decoder_pred.bias", "token_emb.position_ids", "pos_token_embed", "pos_mask_embed")


def published_mage(state, heads=None):
    """Official MAGE state dict -> (config, the state that our MAGE loads strictly, names left out).

    heads  (encoder, decoder); by default those of the published widths, 768 and 1024
    """
    tokenizer = published_tokenizer(parts(state, "vqgan."))
    words, width = state["token_emb.word_embeddings.weight"].shape
    positions, decoder_width = state["decoder_pos_embed_learned"].shape[1:]
    heads = heads or PUBLISHED_HEADS[width]
    config = {"model": "mage", "tokenizer": tokenizer, "image_size": math.isqrt(positions - 1) * 2 ** (len(tokenizer["ch_mult"]) - 1),
              "width": width, "depth": count(state, "blocks."), "heads": heads[0], "decoder_width": decoder_width,
              "decoder_depth": count(state, "decoder_blocks."), "decoder_heads": heads[1],
              "classes": words - tokenizer["codebook_size"] - 1, "fake_class": 76}
    with torch.device("meta"):
        ours = build(config).state_dict().keys()
    kept = {k: v for k, v in state.items() if k in ours}
    table = "token_emb.position_embeddings.weight"
    kept[table] = kept[table][:positions]                                                   # a longer table has rows never read
    return config, kept, sorted(state.keys() - ours)


def published_addp(state, heads=None, predictor_heads=None):
    """The same for an official ADDP state dict (addp-vit-*.pth), which holds its predictor and, twice, the tokenizer."""
    predictor, kept, dead = published_mage(parts(state, "token_predictor."), predictor_heads)
    own = {k: v for k, v in state.items() if not k.startswith("token_predictor.")}
    width = own["token_emb.weight"].size(1)
    heads = heads or PUBLISHED_HEADS[width]
    config = {"model": "addp", "predictor": predictor, "image_size": predictor["image_size"], "width": width, "depth": count(own, "blocks."),
              "heads": heads[0], "decoder_depth": count(own, "decoder_blocks."), "decoder_heads": heads[1]}
    with torch.device("meta"):
        ours = build(config).state_dict().keys()
    kept = {**{k: v for k, v in own.items() if k in ours}, **{f"token_predictor.{k}": v for k, v in kept.items()}}
    return config, kept, sorted(own.keys() - ours) + [f"token_predictor.{k}" for k in dead]


def published_adm(state, head=64, **attention):
    """Official ADM state dict (256x256_diffusion_uncond.pt and its like) -> (config, the same state, no names left out).

    Heads, order of channels, noise and side of the image cannot be seen; published heads are 64 wide, the
    smallest maps 8 x 8. attention: heads and order, if others. ValueError for a conditional one: labels have no place.
    """
    if "label_emb.weight" in state:
        raise ValueError("it is class-conditional; ADM is read without classes only")
    ch, ups = state["time_embed.0.weight"].size(1), range(count(state, "output_blocks."))
    levels = 1 + sum(any(f"output_blocks.{i}.{j}.in_layers.0.weight" in state for j in (1, 2)) for i in ups)    # those that enlarge
    blocks = count(state, "input_blocks.") // levels - 1
    first = [f"input_blocks.{1 + i * (blocks + 1)}" for i in range(levels)]
    config = {"model": "adm", "image_size": 8 * 2 ** (levels - 1), "ch": ch, "blocks": blocks, "head": head,
              **attention, "ch_mult": [state[f"{name}.0.out_layers.3.weight"].size(0) / ch for name in first],
              "attention": [2 ** i for i, name in enumerate(first) if f"{name}.1.norm.weight" in state]}
    return config, state, []


# Which reader a file is for, by the first prefix that any of its names has.
PUBLISHED = {"token_predictor.": published_addp, "token_emb.word_embeddings.": published_mage, "input_blocks.0.": published_adm}


def published_weights(state, ema=True):
    """{name: tensor}, wherever a file has them, less prefixes of wrappers; ema: the averaged, if any."""
    keys = ["model", "state_dict", "model_state_dict", "model_ema", "ema"]
    found = [state[k] for k in keys[::-1 if ema else 1] if isinstance(state.get(k), dict)] or [state]
    return {re.sub(r"^((module|_orig_mod)\.)+", "", name): v for name, v in {**found[-1], **found[0]}.items()}


# ---------------------------------------------------------------------------------------------------------------------------
# 10. Pictures, runs and files
#
# No method is explained from here on. Files are checked when they are read, checkpoints are written under another name and then
# renamed, loads execute nothing, and a user's mistake ends in one sentence.


class UserError(Exception):
    """A mistake the user can mend; its text says how. Scripts print it without a traceback and exit with code 2."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)        # what an OSError says when a disk, a quota or a file has no room left


def attention_kernels():
    """A context in which Hopper GPUs take cuDNN's attention first, said to be the fastest there; other GPUs take what torch chooses.
    cuDNN's has dropout in sixteenths only: torch 2.12 gives another one to flash, older ones have it rounded, so there flash is first."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9:
        order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        order.insert(0 if torch.__version__ >= (2, 12) else 1, SDPBackend.CUDNN_ATTENTION)
        return sdpa_kernel(order, set_priority=True)
    return contextlib.nullcontext()


def run_script(main):
    """Call main(), answering a UserError with one line and exit code 2. Bugs of ours keep their traceback and exit code 1."""
    torch.set_flush_denormal(True)      # gates that start at 0 make gradients whose squares are denormal: a CPU takes ten times as long for those
    torch.backends.cudnn.benchmark = True       # shapes stay the same: a GPU tries once which convolution is fastest
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")                                   # names of files may be any bytes
    try:
        with attention_kernels():
            main()
    except (UserError, OSError) as error:
        if getattr(error, "errno", FULL[0]) not in FULL:
            raise
        mend = "; make room, then start it again" * isinstance(error, OSError)
        print(f"{pathlib.Path(sys.argv[0]).name}: {error}{mend}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def pick_device(name):
    """'cpu', 'cuda', 'cuda:1', ... -> torch.device. UserError if there is none of this name here."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name} is not to be had here; --device cpu always is")


def default_dtype(name):
    """'bfloat16' on GPUs that compute in it, else 'float32': CPUs, and GPUs before Ampere, only emulate it."""
    cuda = pick_device(name).type == "cuda"
    return "bfloat16" if cuda and torch.cuda.get_device_capability(name)[0] >= 8 else "float32"


def option(default, help, least=1, most=2**31 - 1, **more):
    """A field that parse() makes an option of, numbers from least to most. more: choices, positional=True."""
    return dataclasses.field(default=default, metadata={"help": help, "range": (least, most), **more})


def parse(cls, description, argv=None):
    """Command line -> instance of the dataclass cls: an option a field, dashes outside, underscores inside; bool gives --x / --no-x."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)

    def refuse(message):
        raise UserError(f"{message} ({parser.prog} -h lists the options)")
    parser.error = refuse
    for field in dataclasses.fields(cls):
        more = {k: v for k, v in field.metadata.items() if k != "range"}
        name = field.name if more.pop("positional", False) else "--" + field.name.replace("_", "-")
        more["help"] += "" if field.default in (None, "", (), False, dataclasses.MISSING) else f" [{field.default}]"
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
        parser.add_argument(name, default=field.default, **kind, **more)
    cfg = cls(**vars(parser.parse_args(argv)))
    for field in dataclasses.fields(cls):
        value, (least, most) = getattr(cfg, field.name), field.metadata["range"]
        if field.type in (int, float) and value is not None and not least <= value <= most:     # nor is nan
            refuse(f"--{field.name.replace('_', '-')} takes a number from {least} to {most}, not {value}")
    return cfg


# Checkpoints: a dict of plain values and tensors, written by train.py with the previous one beside them.


@contextlib.contextmanager
def reading(path, kind):
    """Whatever fails in here is the fault of the file at path: a UserError says so, caused by what failed."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:              # of a dozen kinds; torch's advice to trust the file is left out
        if held := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(f"{path} holds {held[1]} beside its tensors, and loading that could run code; "
                            "where the file was made, save the model's state_dict() alone") from error
        text = " ".join(f"{type(error).__name__}: {error}".partition(": Weights only")[0].split())[:200]
        mend = f"rename {path}.prev to it" if os.path.exists(f"{path}.prev") else "copy or download it again"
        raise UserError(f"{path} cannot be read as {kind} ({text}); if it is damaged, {mend}") from error


def load_checkpoint(path):
    """The dict in a checkpoint, on the CPU; nothing in it runs. UserError if missing, foreign or damaged."""
    path, previous = pathlib.Path(path), pathlib.Path(f"{path}.prev")
    path = previous if previous.exists() and not path.exists() else path            # killed between the two
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}; python train.py makes one")
    with reading(path, "a checkpoint"), open(path, "rb") as file:
        if file.read(2) == b"PK" and (bad := zipfile.ZipFile(file).testzip()):          # torch does not check
            raise ValueError(f"wrong checksum of {bad}")
        with torch.serialization.safe_globals([argparse.Namespace]):                    # in published files
            state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise UserError(f"{path} holds {type(state).__name__}, not the dict of a checkpoint")
    return state


def load_strictly(model, state, path):
    """load_state_dict, with one sentence instead of a page if it does not fit."""
    with reading(path, "weights of this model"):
        model.load_state_dict(state)
    return model


def rebuild(config, state, path):
    """A config's model with these weights, in eval mode. Absurd sizes: UserError before they take memory."""
    left = iter([None] * (2 * len(state) + 1000))                   # each is set twice, and some may lack
    with torch.device("meta"), register_module_parameter_registration_hook(lambda *_: next(left)):
        build(config).load_state_dict(state, assign=True)
    return load_strictly(build(config), state, path).eval()


def load_model(path, ema=None, tell=print, heads=None, order=None):
    """Trained model, in eval mode, and its config, from a run folder, a checkpoint, or a file published by the authors of MAGE, ADDP or ADM.

    ema   True: the averaged weights, where a checkpoint has them; None: if the paper reads features off them
    tell  called with one line about what is assumed or never read     heads, order  of ADM, see MapAttention
    """
    path = pathlib.Path(path, "model.pt" if os.path.isdir(path) else "")
    state, attention = load_checkpoint(path), {k: v for k, v in dict(heads=heads, order=order).items() if v}
    with reading(path, "a model of train.py, nor as MAGE, ADDP or ADM in a size that was published"):
        if (ours := isinstance(state.get("config"), dict) and "arch" in state["config"]) and not attention:
            config = state["config"]["arch"]
            ema = MODELS[config["model"]].recipe["probe_ema"] if ema is None else ema
            return rebuild(config, {**state["model"], **(ema and state.get("ema") or {})}, path), state["config"]
        weights = published_weights(state, ema is not False)
        readers = [reader for name, reader in PUBLISHED.items() if parts(weights, name)]
        if "x_embedder.proj.weight" in weights or "decoder_pred.weight" in weights and not readers:
            raise UserError(f"{path} is a file of the official DiT or MAE and does not fit: dit and mae here are the two ends of UMD, other networks")
        if not readers or attention and (ours or readers != [published_adm]):
            tokenizer = {"quantize.embedding.weight", "vqgan.quantize.embedding.weight"} & weights.keys()
            raise UserError(f"{path} is " + ("no published ADM; leave --adm-... out" if attention else
                            "a tokenizer, not a model; name its run's folder or model.pt" if tokenizer else
                            "neither a checkpoint of train.py nor a file published for MAGE, ADDP or ADM"))
        config, weights, dead = readers[0](weights, **attention)
        unknown = [n for n in dead if n.removeprefix("token_predictor.") not in DEAD]
        assumed = f"; assumed: heads {heads or 'of 64 channels'}, {order or 'legacy'} order" if "head" in config else ""
        tell(f"{path.name}: published layout; dead in the original, left out: {', '.join(n for n in dead if n not in unknown) or 'nothing'}"
             + (f"; unknown to us, left out too: {', '.join(unknown)}" if unknown else "") + assumed)
        return rebuild(config, weights, path), {"arch": config}


def load_tokenizer(path):
    """Trained VQGAN and its config from a run folder, a tokenizer.pt, or a published tokenizer file."""
    path = pathlib.Path(path, "tokenizer.pt" if os.path.isdir(path) else "")
    state = load_checkpoint(path)
    with reading(path, "a tokenizer of train.py or a published one"):
        if isinstance(state.get("config"), dict) and "tokenizer_arch" in state["config"]:
            config, weights = state["config"]["tokenizer_arch"], parts(state["model"], "vqgan.")
        elif any(parts(weights := published_weights(state), name) for name in (*PUBLISHED, "blocks.")):
            raise UserError(f"{path} is a model, not a tokenizer; name its run's folder or a tokenizer.pt")
        else:
            config = published_tokenizer(weights)
        return rebuild(config, weights, path), config


# Pictures in and out.


def to_uint8(x):
    """Pixels (..., 3, S, S) in [0, 1] -> numpy uint8 (..., S, S, 3), rounded."""
    return (x.detach().float().cpu().clamp(0, 1) * 255).round().byte().movedim(-3, -1).numpy()


TURNS = dict(enumerate((PIL.Image.Transpose[name] for name in ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270",
                                                                "TRANSVERSE", "ROTATE_90")), 2))        # by EXIF's orientation


def turn_of(image):
    """What has to be done to a PIL image so that it lies as a viewer shows it; None for nothing, or if its EXIF cannot be read."""
    try:
        return TURNS.get(image.getexif().get(0x0112))
    except Exception:
        return None


def grey_levels(image):
    """A PIL image of more than 8 bits a value -> mode L. Integers by the range of their type (of 32 bits, which also hold less: the smallest of
    8, 16 and 31 that fits), floats in [0, 1]; ValueError for others, whose range nobody knows."""
    x = numpy.asarray(image).astype(numpy.float64)
    low, high = x.min(), x.max()
    top = 1.0 if image.mode == "F" else 65535 if image.mode != "I" else 255 if high < 256 else 65535 if high < 65536 else 2**31 - 1
    if not 0 <= low <= high <= top:
        raise ValueError(f"its values lie in {low:g} .. {high:g}, not 0 .. {top:g}")
    return PIL.Image.fromarray((x * (255 / top)).round().astype(numpy.uint8))


def upright(image):
    """A PIL image, just opened, as a viewer shows it: RGB, turned as EXIF says, on white where it is transparent."""
    image.load()                                                                            # TIFF files are turned in here
    turn = turn_of(image)
    if image.mode[0] in "IF":
        image = grey_levels(image)
    elif image.mode.lower().endswith("a") or "transparency" in image.info:
        image = image.convert({"La": "LA"}.get(image.mode, image.mode)).convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def from_image(image, size):
    """PIL image, just opened -> uint8 (3, size, size): shorter side resized, centre cropped, as every evaluation does [MAGE, 292 / 256]."""
    image = upright(image)
    scale = size * (1.14 if min(image.size) >= size * 1.14 else 1) / min(image.size)
    sides = [max(size, round(side * scale)) for side in image.size]
    if math.prod(sides) > 2 * PIL.Image.MAX_IMAGE_PIXELS:                               # PIL reads no more
        raise ValueError(f"{image.size[0]} x {image.size[1]} pixels are too narrow")
    image = image.resize(sides, PIL.Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    return torch.from_numpy(numpy.array(image.crop((left, top, left + size, top + size)))).movedim(2, 0)


def read_image(path, size):
    """File -> pixels (3, size, size) in [0, 1]. UserError if it is no readable image."""
    with reading(path, "an image"), PIL.Image.open(path) as image:
        return from_image(image, size).float() / 255


def grid(x, columns=8, least=1024):
    """Pictures (n, 3, S, S) in [0, 1] -> one PIL image, row by row with thin white lines; small ones are enlarged to about least pixels."""
    n, _, side, _ = x.shape
    columns = min(columns, n)
    zoom = max(1, least // (columns * side))
    tiles = to_uint8(x).repeat(zoom, 1).repeat(zoom, 2)
    side, gap = side * zoom, 2
    sheet = numpy.full((-(-n // columns) * (side + gap) + gap, columns * (side + gap) + gap, 3), 255, numpy.uint8)
    for i, tile in enumerate(tiles):
        top, left = gap + i // columns * (side + gap), gap + i % columns * (side + gap)
        sheet[top:top + side, left:left + side] = tile
    return PIL.Image.fromarray(sheet)


# Data sets. Each has: images of one size, labels, class names, and batches(plan): for every (index (B,), crops (B, V) or None) of
# the plan one (x, labels), x float in [0, 1] of shape (B, V, 3, S, S), or (B, 3, S, S) for the whole picture when crops is None.
# A crop is named by an integer, so that the same crop comes out on any machine and after any interruption.


def fold(*values):
    """Integers, or int64 tensors, scrambled into one."""
    state = 0
    for value in values:
        state = mix(mix(value) + 0x9E3779B9 * (state + 1))
    return state


def crop_boxes(crops, width, height, scale):
    """Random resized crops: area in scale x the picture, aspect 3/4 .. 4/3, place uniform, flipped every other time; one draw each,
    clipped to the picture (official file: util/crop.py). int64 (B,) -> left, top, width, height, flip: float (B,) each, bool (B,)."""
    area, ratio, x, y, flip = uniform(crops, 0, 5).unbind(1)
    area = width * height * (scale[0] + area * (scale[1] - scale[0]))
    ratio = (math.log(4 / 3) * (2 * ratio - 1)).exp()
    w, h = (area * ratio).sqrt().clamp(max=width), (area / ratio).sqrt().clamp(max=height)
    return x * (width - w), y * (height - h), w, h, flip < 0.5


def shuffled(n, *seeds):
    """0 .. n - 1 in an order that follows from the seeds: int64 (n,)."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(fold(*seeds)))


class Pictures:
    """A whole set in memory as uint8 (N, 3, S, S), on the device; crops are cut there, a batch at a time. Attributes as Folder's.

    scale  share of the area that a crop keeps, (0.2, 1) in the papers
    """

    def __init__(self, images, labels, classes, scale, device="cpu"):
        self.images, self.labels, self.classes, self.scale = images.to(device), labels, classes, scale
        self.size, self.layout, self.summary, self.unreadable, self.unseen = images.size(-1), "in memory", "", {}, True

    def __len__(self):
        return len(self.images)

    def batches(self, plan, workers=0, replace=True):
        """The pictures of the plan, (x, labels) at a time; workers are not needed here, and all can be read."""
        for index, crops in plan:
            x = self.images[send(index, self.images.device)].float() / 255
            if crops is not None:
                x = x.repeat_interleave(crops.size(1), 0)
                x = self.crop(x, send(crops.flatten(), x.device)).unflatten(0, crops.shape)
            yield x, self.labels[index]

    def crop(self, x, crops):
        """Cut and resize by one bilinear sampling; a flip is a negative width."""
        side = x.size(-1)
        *box, flip = crop_boxes(crops, side, side, self.scale)
        left, top, w, h = (v / side for v in box)
        zero, sign = torch.zeros_like(w), 1 - 2 * flip.float()
        matrix = torch.stack([torch.stack([w * sign, zero, 2 * left + w - 1], 1), torch.stack([zero, h, 2 * top + h - 1], 1)], 1)
        return F.grid_sample(x, F.affine_grid(matrix, x.shape, align_corners=False), padding_mode="border", align_corners=False)


class Folder(torch.utils.data.Dataset):
    """Image files, decoded by worker processes when they are asked for; as floats they exist on the device only.

    paths, labels  of the images, int (N,)       classes  names, none for images without labels       root  what messages are about
    layout         how it lies on the disk       summary  what was found, in lines, or ""             strict  stop at an unreadable image
    unseen         False for test images that stand in for too few: they are those to train on
    """

    def __init__(self, root, paths, labels, classes, size, scale, strict=False, device="cpu", layout="", summary=""):
        self.root, self.paths, self.labels, self.classes, self.size, self.scale = root, paths, torch.tensor(labels), classes, size, scale
        self.strict, self.device, self.layout, self.summary = strict, torch.device(device), layout, summary
        self.unreadable, self.named, self.unseen = {}, {}, True                             # index: why; those that were told

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, item):
        """(index, crops, replace) -> uint8 (V, 3, S, S) or (3, S, S); label; {index: what is wrong} of unreadable images met just now.

        In place of an unreadable image comes a black one of label -1 or, to replace it, another one that the first crop's number, or else the
        index, decides, never its neighbour on the disk. Each is opened once.
        """
        (index, crops, replace), bad, i, draw = item, {}, item[0], 0
        while True:
            if i not in self.unreadable and (i == index or abs(i - index) > 1 or draw > 100):  # then nothing but neighbours is left
                try:
                    with reading(self.paths[i], "an image"), PIL.Image.open(self.paths[i]) as image:
                        return self.crop(image, crops), self.labels[i], bad
                except UserError as error:
                    bad[i] = self.unreadable[i] = str(error.__cause__)
            if not replace or self.strict or len(self.unreadable) == len(self):
                side = (self.size, self.size)
                return torch.zeros((3, *side) if crops is None else (len(crops), 3, *side), dtype=torch.uint8), torch.tensor(-1), bad
            draw += 1
            i = fold(index if crops is None else crops[0], draw) % len(self)

    def crop(self, image, crops):
        """PIL image, numbers of V crops -> uint8 (V, 3, S, S); None -> the whole picture (3, S, S)."""
        if crops is None:
            return from_image(image, self.size)
        jpeg, views = image.format == "JPEG", []
        image = image if jpeg else upright(image)
        sideways = jpeg and turn_of(image) in list(TURNS.values())[3:]
        width, height = image.size[::-1] if sideways else image.size
        left, top, w, h, flips = crop_boxes(torch.as_tensor(crops), width, height, self.scale)
        least = self.size / min(w.min(), h.min()).item()
        if jpeg:                                                                            # is decoded at 1/2, 1/4 or 1/8 if that will do
            image.draft("RGB", tuple(math.ceil(least * side) for side in image.size))
            image = upright(image)
        boxes = torch.stack([left, top, left + w, top + h], 1) / round(width / image.width)
        for box, flip in zip(boxes.tolist(), flips):
            view = numpy.array(image.resize((self.size, self.size), PIL.Image.Resampling.BILINEAR, box))
            views.append(torch.from_numpy(view[:, ::-1].copy() if flip else view).movedim(2, 0))
        return torch.stack(views)

    def batches(self, plan, workers=0, replace=True):
        """The images of the plan, (x, labels) at a time, decoded by so many processes. Unreadable ones are named, and replaced by others or
        given the label -1; UserError if strict, or if there is nothing else.

        Workers hand over at most a mebibyte at once, in shared memory, of which containers have little: a batch comes in several parts.
        """
        sizes = collections.deque()

        def parts():
            for index, crops in plan:
                sizes.append(len(index))
                items = [(i, None if crops is None else crops[j].tolist(), replace) for j, i in enumerate(index.tolist())]
                n = max(1, 2**20 // (3 * self.size ** 2 * (1 if crops is None else crops.size(1))))
                yield from (items[k:k + n] for k in range(0, len(items), n))
        loader = torch.utils.data.DataLoader(self, batch_sampler=parts(), num_workers=workers, collate_fn=together,
                                             pin_memory=self.device.type == "cuda", timeout=5 if workers else 0)
        images, labels = [], []
        for x, y, bad in handed_over(loader):
            for i, error in bad.items():
                if self.strict or replace and -1 in y:
                    raise UserError(f"{shown(self.paths[i])} cannot be read as an image ({error}); mend it" +
                                    (", or leave --strict-images out" if self.strict else f": no other in {shown(self.root)} can"))
                if i not in self.named:
                    print(f"unreadable, {'another image takes its place' if replace else 'left out'}: {shown(self.paths[i])} ({error})", file=sys.stderr)
                self.unreadable[i] = self.named[i] = error
            images.append(send(x, self.device))
            labels.append(y)
            if sum(map(len, labels)) == sizes[0]:
                yield torch.cat(images).float().div_(255), torch.cat(labels)
                sizes.popleft()
                images, labels = [], []


@contextlib.contextmanager
def shielded():
    """Processes started in here ignore Ctrl-C and SIGTERM, which are for their parent to answer. And the parent's handler of SIGCHLD stays
    as it is: the one that torch sets raises wherever the program happens to be, in the middle of an optimizer step, say."""
    if not hasattr(signal, "pthread_sigmask"):                                              # Windows has neither signal
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


def handed_over(loader, patience=300):
    """What a DataLoader's workers hand over; UserError if one of them dies, or if nothing comes for so many seconds."""
    with shielded():
        parts, since = iter(loader), time.monotonic()
    while True:
        try:
            part = next(parts)
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith("DataLoader"):
                raise
            if "timed out" in str(error) and time.monotonic() - since < patience:           # torch looks for dead workers each time
                continue
            raise UserError(f"the processes that decode images have stopped ({error}); they may lack memory, or shared memory (/dev/shm), "
                            "of which containers have little: --workers 0 does without them") from None
        yield part
        since = time.monotonic()


def together(items):
    """What Folder has of each image of a batch, put together by the process that decoded them: an array a batch is quicker handed on than
    one an image, and takes one file handle."""
    x, labels, bad = zip(*items)
    return torch.stack(x), torch.stack(labels), dict(item for part in bad for item in part.items())


def shown(path):
    """A path as it can be printed, whatever bytes it is made of."""
    return os.fsencode(path).decode(errors="replace")


# Folders, as people have them. Names that begin with . or __ belong to programs, not to the data, at any depth.

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif"}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "MPO")      # of files whose suffix says nothing


def entries(folder):
    """What lies in a folder, sorted by name: (folders, files)."""
    found = [e for e in sorted(os.scandir(folder), key=lambda e: e.name) if not e.name.startswith((".", "__"))] if folder.is_dir() else []
    return [folder / e.name for e in found if e.is_dir()], [folder / e.name for e in found if not e.is_dir()]


def is_image(path):
    """By its suffix or, if that says nothing, by how the file begins."""
    if path.suffix.lower() in SUFFIXES:
        return True
    PIL.Image.init()
    try:
        with PIL.Image.open(path, formats=[f for f in FORMATS if f in PIL.Image.OPEN]):
            return True
    except Exception:                                                                       # anything else than an image
        return False


def image_files(folder, others):
    """Image files in a folder and in those inside it, but for links that lead up again. What is no image joins the list others."""
    folders, files = entries(folder)
    images = [p for p in files if is_image(p)]
    others += sorted(set(files) - set(images))
    here = folder.resolve()
    return images + [file for p in folders if p.resolve() not in (here, *here.parents) for file in image_files(p, others)]


# The set that needs no download: eight shapes in four colours on a plain ground; place, size and turn vary a little. Colour says
# nothing about the class, so shape is what there is to learn. Each is a signed distance: negative inside, in units of its radius.


def box(x, y, w, h):
    """Distance to a rectangle of half sides w and h."""
    return (x.abs() - w).maximum(y.abs() - h)


def star(x, y, r):
    """Five points: the plane folded ten times onto one edge, which runs from (0.42, 0) to the tip at 36 degrees."""
    fifth = 2 * math.pi / 5
    angle = (torch.atan2(y, x) % fifth - fifth / 2).abs()
    return (r * angle.cos() - 0.42) * 0.8345 - r * angle.sin() * 0.551


SHAPES = {
    "circle":   lambda x, y, r: r - 0.85,
    "ring":     lambda x, y, r: (r - 0.75).abs() - 0.2,
    "square":   lambda x, y, r: box(x, y, 0.7, 0.7),
    "bar":      lambda x, y, r: box(x, y, 0.95, 0.28),
    "cross":    lambda x, y, r: box(x, y, 0.95, 0.3).minimum(box(x, y, 0.3, 0.95)),
    "triangle": lambda x, y, r: torch.stack([x, -x / 2 + y * 0.866, -x / 2 - y * 0.866]).amax(0) - 0.5,
    "star":     lambda x, y, r: star(x, y, r),
    "crescent": lambda x, y, r: (r - 0.95).maximum(0.8 - ((x - 0.5) ** 2 + y ** 2).sqrt()),
}
GROUND = torch.tensor([128.0, 128.0, 128.0])
PALETTE = GROUND + torch.tensor([[100, -68, -78], [-100, 68, 78], [-88, -18, 96], [88, 18, -96]])             # red, teal, blue, amber


def draw_shapes(seeds, size):
    """Seeds int64 (B,) -> uint8 pictures (B, 3, size, size), labels (B,). Radius 33 to 41 % of the side, turned by quarters
    give or take 9 degrees, always wholly visible."""
    kind, color, radius, cx, cy, turn, wobble = uniform(seeds, 0, 7)[:, :, None, None].unbind(1)
    radius = size / 32 * (10.5 + 2.5 * radius)
    cx, cy = (size / 32 * (14.5 + 3 * c) for c in (cx, cy))
    turn = math.pi / 2 * ((4 * turn).floor() + 0.2 * (wobble - 0.5))
    row = torch.arange(size) + 0.5
    x, y = (row - cx) / radius, (row[:, None] - cy) / radius                                # (B, 1, S), (B, S, 1)
    x, y = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()                 # (B, S, S)
    labels = (kind.flatten() * len(SHAPES)).long()
    distance = torch.stack([shape(x, y, (x * x + y * y).sqrt()) for shape in SHAPES.values()])[labels, torch.arange(len(seeds))]
    alpha = (0.5 - distance * radius).clamp(0, 1)[:, None]                                  # one pixel of soft edge
    paint = PALETTE[(color.flatten() * len(PALETTE)).long()][:, :, None, None]
    return (alpha * paint + (1 - alpha) * GROUND[:, None, None]).round().byte(), labels


def shapes(train, size):
    """20,000 pictures to train on or 2,000 others to test on."""
    seeds = torch.arange(20_000) if train else torch.arange(1_000_000, 1_002_000)
    images, labels = zip(*(draw_shapes(part, size) for part in seeds.split(1000)))
    return torch.cat(images), torch.cat(labels), list(SHAPES)


CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_MD5 = {"cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
               "data_batch_1": "c99cafc152244af753f735de768cd75f", "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
               "data_batch_3": "54ebc095f3ab1f0389bbae665268c751", "data_batch_4": "634d18415352ddfa80567beed471001a",
               "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb", "test_batch": "40351d587109b95175f43aff81a1287e",
               "batches.meta": "5ff9c542aee3614f3951f8cda6e48888"}


def cifar10(folder, train):
    """The public archive's batches -> uint8 (N, 3, 32, 32), labels (N,), class names. They are pickles, which can run code, so
    each is read only if it has the published checksum."""
    def read(name):
        path = folder / "cifar-10-batches-py" / name
        data = path.read_bytes() if path.exists() else b""
        if hashlib.md5(data).hexdigest() != CIFAR10_MD5[name]:
            raise UserError(f"{path} is missing or damaged; delete its folder and leave --data-dir out")
        return pickle.loads(data, encoding="latin1")
    batches = [read(f"data_batch_{i}") for i in range(1, 6)] if train else [read("test_batch")]
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
            if processes()[1] > 1 and time.monotonic() - started > 1:         # else all would fail one by one
                raise TimeoutError("another process has tried")
            with tempfile.TemporaryDirectory(prefix=".", dir=folder) as own, \
                    tempfile.TemporaryFile(dir=folder) as archive, \
                    urllib.request.urlopen(CIFAR10_URL, timeout=timeout) as source:
                for chunk in tqdm.tqdm(iter(lambda: source.read(1 << 20), b""), "CIFAR-10", 163, unit=" MiB"):
                    digest.update(chunk)
                    archive.write(chunk)
                if digest.hexdigest() != CIFAR10_MD5["cifar-10-python.tar.gz"]:
                    raise ValueError(f"{archive.tell()} bytes came, with a wrong checksum")
                archive.seek(0)
                tarfile.open(fileobj=archive).extractall(own, filter="data")
                os.rename(os.path.join(own, inside.name), inside)
    except Exception as error:                                      # sockets, HTTP, gzip and tar have theirs
        if not inside.exists():
            raise UserError(f"CIFAR-10 could not be downloaded ({error!r}); try again, or unpack "
                            f"{CIFAR10_URL} yourself and pass its folder as --data-dir")


EXPECTED_TREE = """
    {root}/train/n01440764/n01440764_10026.JPEG ...     a folder a class
    {root}/val/n01440764/ILSVRC2012_val_00000293.JPEG ...
If val/ is flat, as in the official archive, sort its files into the same class folders first. Class folders without train/ and val/, or
images without classes, will do too."""


def labelled(folder, notes):
    """{class: its image files} of a folder of class folders, {"": files} if images lie right in it. Notes gets a line on all that was left out."""
    others = []
    found = {p.name: image_files(p, others) for p in entries(folder)[0]}
    loose = [p for p in entries(folder)[1] if is_image(p)]
    empty = [name for name, files in found.items() if not files]
    found = {name: files for name, files in found.items() if files} or ({"": loose} if loose else {})
    for what, names in (("folders without an image", empty), ("files that are no images", [shown(p.name) for p in others]),
                        ("images beside the class folders", [shown(p.name) for p in loose if "" not in found])):
        if names:
            notes.append(f"{shown(folder)}: left out {len(names)} {what} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})")
    return found


def held_out(files, labels):
    """Whether each file is held out to test on: a tenth of each class, by a hash of its name, so that nothing changes when others come; none of
    a class of which nothing would be left."""
    picked = [int(hashlib.md5(os.fsencode(p.name)).hexdigest(), 16) % 10 == 0 for p in files]
    left = {c for held, c in zip(picked, labels) if not held}
    return [held and c in left for held, c in zip(picked, labels)]


def find_images(root):
    """(layout, classes, {True: files and labels to train on, False: to test on}, lines on what was found) of a folder. UserError if there is
    nothing, or if the classes of its parts differ."""
    notes, tree = [], EXPECTED_TREE.format(root=shown(root))
    second = next((name for name in ("val", "valid", "validation", "test") if (root / name).is_dir()), None)
    split = second or entries(root / "train")[0]                                            # else it may be a class of trains
    names = ["train", second] if second else ["train"] if split else [""]
    parts = [labelled(root / name, notes) for name in names]
    for name, part in zip(names, parts):
        if not part:
            raise UserError(f"no image in {shown(root / name)}, nor in class folders there; expected" + tree)
    odd = sorted(set(parts[0]) ^ set(parts[-1]))
    if odd:
        raise UserError(f"{shown(root)}/train and {shown(root)}/{second} differ in their classes: {', '.join(odd[:5])} {'...' if odd[5:] else ''} only in one of them"
                        + ("; expected" + tree) * ("" in odd))
    files, labels = zip(*(([p for files in part.values() for p in files], [c for c, files in enumerate(part.values()) for _ in files]) for part in parts))
    if second:
        how, train, test = f"{second}/", (files[0], labels[0]), (files[1], labels[1])
    else:
        how, held = "a tenth of each class, by a hash of the file's name", held_out(files[0], labels[0])
        train, test = ([[v for v, h in zip(column, held) if h == part] for column in (files[0], labels[0])] for part in (False, True))
    classes = [name for name in parts[0] if name]
    notes.insert(0, f"{shown(root)}: {len(train[0])} images {f'of {len(classes)} classes' if classes else 'without classes'} to train on, "
                 + (f"{len(test[0])} to test on ({how})" if test[0] else "too few to hold any out: what is shown and measured is of these"))
    return f"{' and '.join(names) or 'one part'}, {'class folders' if classes else 'flat'}", classes, {True: train, False: test}, "\n".join(notes)


def look_at(data, count=500):
    """Open the heads of some images of every class. UserError if none of a class can be opened, or if one in ten cannot."""
    bad, seen, whole = [], 0, []
    for c, name in enumerate(data.classes or [""]):
        index = (data.labels == c).nonzero().flatten()
        some = index[torch.linspace(0, len(index) - 1, min(len(index), max(2, count // max(1, len(data.classes))))).long()].tolist()
        failed = []
        for i in some:
            try:
                with PIL.Image.open(data.paths[i]):
                    pass
            except Exception:                                                               # what it is will be said when it is read
                failed.append(i)
        bad, seen, whole = bad + failed, seen + len(some), whole + [name] * (len(failed) == len(some))
    if whole or len(bad) > max(1, seen / 10):
        raise UserError(f"{len(bad)} of {seen} images that were looked at in {shown(data.root)} cannot be opened, {shown(data.paths[bad[0]])} for one"
                        + (f"; none of {', '.join(whole[:3])}" if data.classes and whole else "") + "; mend them, or take them out")


def open_data(dataset, data_dir, size, train, device="cpu", strict=False, crop=0.2):
    """A data set by name: 'shapes', 'cifar10', 'imagenet', or the path of a folder: class folders in train and val (or valid, validation, test),
    class folders alone, or images without classes.

    data_dir  where it lies, '' for ./data/<name>        size  S        train  True: training part        strict  see Folder
    crop      share of the area that a crop keeps at least; one half and more of shapes, since less may show none
    """
    root = pathlib.Path(data_dir or (f"data/{dataset}" if dataset in ("cifar10", "imagenet") else dataset))
    if dataset == "shapes":
        return Pictures(*shapes(train, size), (max(crop, 0.5), 1.0), device)
    if dataset == "cifar10":
        if size != 32:
            raise UserError(f"CIFAR-10 has 32 x 32 pixels, which does not fit a model or --image-size of {size}")
        if not data_dir:
            download_cifar10(root)
        return Pictures(*cifar10(root, train), (crop, 1.0), device)
    layout, classes, parts, summary = find_images(root)
    data = Folder(root, *(parts[train] if parts[train][0] else parts[True]), classes, size, (crop, 1.0), strict, device, layout, summary)
    data.unseen = not train and bool(parts[False][0])
    if train and not strict:
        look_at(data)
    return data


# Processes, and the signals that ask them to end.


class Stopped(Exception):
    """A signal has asked for the end, and nothing is left half done; the text says where."""


SIGNALS = {}                        # {number: when it came}: what has asked a training for its end; all that runs long looks here


def asked_to_stop():
    """Whether a signal has reached any of the processes. All of them come here together, so all stop after the same step."""
    asked = torch.tensor(len(SIGNALS))
    if processes()[1] > 1:
        torch.distributed.all_reduce(asked)                                                 # on the CPU: no device is waited for
    return bool(asked)


def join_processes(name):
    """Meet the processes that torchrun started beside this one, if it did; returns the device of this one, name being --device."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"                                           # not even a context on another's device
    device = pick_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                             timeout=datetime.timedelta(hours=2))           # the longest wait: for the slowest with its ids
    return device


def leave_processes():
    """Part from them, if there are any: all together, else the last may hang (gloo in torch 2.6). Only who fails waits for nobody.

    DistributedDataParallel must be gone before: freed after the group it can hang for good, and a failure's traceback keeps it alive.
    """
    if torch.distributed.is_initialized():
        error = sys.exc_info()[1]
        if error is None:
            torch.distributed.barrier()
        while error:
            traceback.clear_frames(error.__traceback__)
            error = error.__context__
        gc.collect()
        torch.distributed.destroy_process_group()


def processes():
    """Rank of this process and their number; 0 and 1 without torchrun."""
    there = torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if there else (0, 1)


def first_alone(work):
    """What work() returns in the first process, for which the others wait. Its UserError, which it alone tells, ends them all."""
    rank, world = processes()
    found = [None, None]
    if rank == 0:
        try:
            found[0] = work()
        except UserError as error:
            found[1] = error
    if world > 1:
        torch.distributed.broadcast_object_list(found)
    result, error = found
    if error:
        raise error if rank == 0 else SystemExit(2)
    return result


