"""Generate and represent images with one network: MAGE, MAGE-C, MAGE-E, ADDP, UMD and ADM in one file.

One idea runs through all of them: corrupt an image, and train a network to undo it. To undo it, the network
has to understand the image, so its activations are a representation. Undone step by step, starting from
nothing, it is generation.

    method   reads               corruption                              prediction
    MAGE     token ids           about 70 % of the tokens masked         the masked ids
    MAGE-C   ids of two crops    the same                                + which crops belong together
    MAGE-E   token ids           the same                                + which image a redrawn copy is of
    ADDP     pixels, some ids    decoded from partly predicted ids       the distribution of each masked id
    UMD      pixels              half of the batch: 75 % masked;         masked pixels, and the noise
                                 half: noise added, 37.5 % masked
    ADM      pixels              noise added                             the noise; variance of a step back

MAGE is short for masked generative encoder, ADDP for alternating denoising diffusion process, UMD for unified
masked diffusion, ADM for ablated diffusion model. MAGE-E is a simple form of Sorcen. UMD's versions of MAE,
MaskDiT and DiT are UMD with other numbers. How a model is used:

    import torch, unified
    vqgan = unified.build(unified.tokenizer_config("toy", stride=8, codes=128))     # a fresh tokenizer
    model = unified.MAGE(vqgan, image_size=32, **unified.MAGE_SIZES["tiny"])        # and a fresh MAGE

    x = torch.rand(16, 3, 32, 32)                   # pixels in [0, 1]
    loss, logs = model(x)                           # model(ids), of token ids (16, L), works as well
    loss.backward()
    x = model.eval().sample(16, seeds=0)            # (16, 3, 32, 32) in [0, 1]
    z = model.embed(x)                              # (16, C), what a linear probe reads
    maps = model.features(x, layers=[2, 4])         # [(16, C, 4, 4), ...], after any block

    model, config = unified.load_model("out/shapes-mage")                           # a run of train.py

    1  Attention and blocks        every token attends to every other token
    2  The VQ tokenizer            image -> token ids -> image
    3  What every model offers     loss, samples, embeddings, feature maps
    4  Masking and unmasking       which tokens are masked in training; parallel decoding
    5  MAGE                        predict the masked ids; guidance
    6  A training loop             all of this, run: `python unified.py`, two minutes on a CPU
    7  MAGE-C, MAGE-E              and tell which two crops, or which image and echo, belong together
    8  ADDP                        read pixels, predict ids; learned from a trained MAGE
    9  Noise                       the noise schedule, and the way back: DDPM and DDIM
    10 UMD, MAE, MaskDiT, DiT      predict masked patches, or the noise, or both
    11 ADM                         predict the noise with a U-Net; its blocks are representations, too
    12 Side by side                results; what is probed; inpainting; DifFeed
    13 A method of your own        what it must have. Here the tutorial ends
    14 Sizes and recipes           presets, and how each method is trained
    15 Published weights           how files of the original authors are read
    16 Behind the methods          random numbers by seed, drawn shapes, checked arguments
    17 For the scripts             mistakes, flags, checkpoints, images, processes

Look these up when you meet them.

Sizes    B   images of a batch; n when they are generated
         N   in UMD the images of a batch that are noised; elsewhere any number of rows
         L   tokens of an image, on a grid of h x w; M of them enter an encoder
         C   channels of a token; C' in a decoder
         S   pixels on a side of an image
         K   codes in the codebook; V ids in a vocabulary, which has more than the codes
         k   class tokens, where there are several

Symbols  x, ids          an image as pixels, or as token ids
         z               output of the tokenizer's encoder, or an embedding
         h0, h1 ...      outputs of a transformer's encoder
         x0, eps, xt     clean pixels, noise, and their mixture; ADDP's xt is an image decoded from partly
                         decided ids
         x', x0', eps'   predictions of x, x0, eps; in code x0_hat, eps_hat
         alpha_bar       how much of x0 is left in xt: the square of its factor
         beta~, beta     smaller and larger variance of a step of DDPM; s^2: ADM's own, sigma^2 = eta^2 beta~
         r, n0           the mask ratio; how many tokens are masked at the start
         T               steps of decoding, in sections 4 to 8; timesteps of diffusion, in 9 to 11
         w               strength of guidance;  tau: a temperature;  sg: stop-gradient, detach()
         p, q            distributions: p is the network's, q its target
         e_k, D          code k, and the tokenizer's decoder, which turns codes into an image

         t runs in two directions. In sections 4 to 8 it counts steps of decoding, 1 ... T: the larger t, the
         less is masked. In 9 to 11 it is a timestep of diffusion: the larger t, the more noise. The t of
         features() says how corrupted x is: by a mask ratio in MAGE, by a timestep in UMD and ADM; in ADDP
         it is 0.

Pixels are floats in [0, 1] where they enter or leave a model. Inside diffusion models, and in the states that
their sample_steps() yields, they are in [-1, 1].
Masks are bool, True = masked. They are over tokens, unless a shape or a name says pixels. Nearly all that a
loss draws at random can also be passed in.

Parameters have the authors' names, and modules their nesting, so that published files of MAGE, ADDP and ADM
can be read. What looks odd is usually theirs; "official file" says where it stands.

Papers   [ADDP] Tian et al. 2023, arXiv 2306.05423          [ADM] Dhariwal and Nichol 2021, 2105.05233
         [Attention] Vaswani et al. 2017, 1706.03762        [Autoguidance] Karras et al. 2024, 2406.02507
         [CFG] Ho and Salimans 2022, 2207.12598             [Interval] Kynkäänniemi et al. 2024, 2404.07724
         [DDIM] Song et al. 2020, 2010.02502                [DDPM] Ho et al. 2020, 2006.11239
         [DiffSSL] Mukhopadhyay et al. 2023, 2307.08702     [DifFeed] Mukhopadhyay et al. 2023, 2311.17921
         [DiT] Peebles and Xie 2022, 2212.09748             [iDDPM] Nichol and Dhariwal 2021, 2102.09672
         [MAE] He et al. 2021, 2111.06377                   [MAGE] Li et al. 2022, 2211.09117
         [MaskDiT] Zheng et al. 2023, 2306.09305            [MaskGIT] Chang et al. 2022, 2202.04200
         [RePaint] Lugmayr et al. 2022, 2201.09865          [SimCLR] Chen et al. 2020, 2002.05709
         [Sorcen] Estepa et al. 2025, 2503.15060            [UMD] Hansen-Estruch et al. 2024, 2406.17688
         [ViT] Dosovitskiy et al. 2020, 2010.11929          [VQ-VAE] van den Oord et al. 2017, 1711.00937
         [VQGAN] Esser et al. 2020, 2012.09841
"""
import argparse
import contextlib
import copy
import dataclasses
import datetime
import difflib
import errno
import functools
import gc
import inspect
import io
import itertools
import math
import os
import pathlib
import platform
import re
import sys
import threading
import traceback
import typing
import zipfile

import numpy
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
import torch.distributed.nn
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_parameter_registration_hook

# ------------------------------------------------------------------------------------------------------------
# 1. Attention and blocks
#
#     A = softmax(Q K^T / sqrt(d)) V          Q, K, V: (B, heads, L, d)                    [Attention, eq. 1]
#
# A block first lets tokens exchange information (attention), then processes each token alone (MLP):
#
#          ____________________________    ______________________
#         |                            |  |                      |
#     x --+-- LayerNorm -- attention --+--+-- LayerNorm -- MLP --+--
#
# Both branches only add to x. So the gradient flows back along the upper line to the first block, and nothing
# on this line shrinks it. ResNets rest on the same idea.


class Attention(nn.Module):
    """Multi-head self-attention without a causal mask: (B, L, C) -> (B, L, C).

    dim      width C, a multiple of heads, else ValueError
    heads    number of heads; each has d = C / heads channels
    dropout  of attention probabilities and of outputs, in training
    fused    False: the equation above. True: the same result from one fast kernel, where that is faster; the
             (L, L) matrix then need not exist in memory
    """

    def __init__(self, dim, heads, dropout=0.0, fused=True):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"width {dim} is not a multiple of {heads} heads")
        self.heads, self.dropout, self.fused = heads, dropout, fused
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B, heads, L, d)
        drop = self.dropout if self.training else 0.0
        if self.fused and fused_is_faster(q, drop):
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=drop)                     # (B, heads, L, d)
        else:
            x = F.dropout((q @ k.mT * q.size(-1) ** -0.5).softmax(-1), drop) @ v
        return F.dropout(self.proj(x.transpose(1, 2).flatten(2)), drop)                     # (B, L, C)


def fused_is_faster(q, dropout):
    """Off a CPU always. On a CPU only in float32 and without dropout: its kernel has none, and is slow in
    bfloat16."""
    return q.device.type != "cpu" or q.dtype == torch.float32 and dropout == 0


class MLP(nn.Module):
    """Linear, GELU, linear, for each token: (B, L, C) -> (B, L, C). gelu: "none" is the exact one, "tanh" the
    approximation."""

    def __init__(self, dim, hidden_dim, dropout=0.0, gelu="none"):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)
        self.dropout, self.gelu = nn.Dropout(dropout), gelu

    def forward(self, x):
        x = self.dropout(F.gelu(self.fc1(x), approximate=self.gelu))                    # (B, L, hidden_dim)
        return self.dropout(self.fc2(x))                                                    # (B, L, C)


class Block(nn.Module):
    """Pre-norm transformer block [ViT]: (B, L, C) -> (B, L, C)."""

    def __init__(self, dim, heads, dropout=0.0, gelu="none"):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads, dropout)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), MLP(dim, 4 * dim, dropout, gelu)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def gather_tokens(x, index):
    """Tokens (B, L, C) at positions index, int (B, M) -> (B, M, C)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.size(2)))


def scatter_tokens(into, index, x):
    """The inverse: a copy of into (B, L, C) with tokens x (B, M, C) at positions index (B, M)."""
    return into.scatter(1, index[..., None].expand(-1, -1, x.size(2)), x)


# ------------------------------------------------------------------------------------------------------------
# 2. The VQ tokenizer
#
# A transformer needs tokens. The tokenizer turns an image into a grid of integers, the ids, and back. It
# has a codebook: a table of K learned vectors e_k, the codes. The encoder E makes a vector z for each place
# of the grid. The id of the place is the number of the code nearest to z. The decoder D sees only this
# code:
#
#     z = E(x)        id = argmin_k ||z - e_k||^2        x' = D(e_id)                    [VQ-VAE, eq. 1 and 2]
#
#     two codes of width 2:  e_0 = (0, 0), e_1 = (1, 1)
#     z = (0.9, 0.6)         distances 1.17 and 0.17, so id = 1, and D reads (1, 1)
#
#     image 256 x 256 x 3                                                        image
#       | E: residual blocks, average pooling                                ^  D: residual blocks, upsampling
#       |    256 x 256 x 128                                            256 x 256 x 128
#       |    128 x 128 x 128                                            128 x 128 x 128
#       |     64 x 64 x 256                                               64 x 64 x 256
#       |     32 x 32 x 256                                               32 x 32 x 256
#       v     16 x 16 x 512                                               16 x 16 x 512
#     z 16 x 16 x 256  --- nearest of the K = 1024 codes --->  ids 16 x 16  --->  e_id 16 x 16 x 256
#
# From here on this image is 256 integers below 1024. The layers are those of MaskGIT's tokenizer, which MAGE
# uses as it is (official file: taming/modules/diffusionmodules/model.py). It is simpler than the well-known
# VQGAN: no attention, no quant_conv and post_quant_conv, average pooling on the way down, hardly any bias.


def group_norm(channels, groups=32):
    """GroupNorm. Published tokenizers have 32 groups. Narrow ones need fewer: normalising one channel alone
    would erase its mean, and with it the brightness of the image."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, inp, h, w) -> (B, out, h, w)."""

    def __init__(self, inp, out, groups):
        super().__init__()
        self.norm1, self.conv1 = group_norm(inp, groups), nn.Conv2d(inp, out, 3, padding=1, bias=False)
        self.norm2, self.conv2 = group_norm(out, groups), nn.Conv2d(out, out, 3, padding=1, bias=False)
        if inp != out:
            self.nin_shortcut = nn.Conv2d(out, out, 1, bias=False)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))                                               # (B, out, h, w)
        h = self.conv2(F.silu(self.norm2(h)))
        # Where the width changes, the published tokenizers send the block's output, not its input, through
        # the shortcut. It was a slip in the original code, but every released weight was trained with it.
        return h + (self.nin_shortcut(h) if hasattr(self, "nin_shortcut") else x)


def res_blocks(inp, out, blocks, groups):
    """The residual blocks of one resolution, named as in the published files."""
    first, others = ResBlock(inp, out, groups), (ResBlock(out, out, groups) for _ in range(blocks - 1))
    return nn.ModuleDict({"block": nn.ModuleList([first, *others])})


def middle_blocks(width, groups):
    """The two residual blocks at the lowest resolution."""
    return nn.ModuleDict({name: ResBlock(width, width, groups) for name in ("block_1", "block_2")})


class Encoder(nn.Module):
    """Pixels (B, 3, S, S) in [0, 1] -> z (B, dim, S / stride, S / stride); stride = 2 ** (len(ch_mult) - 1).

    ch, ch_mult  level i has ch * ch_mult[i] channels       blocks  residual blocks per level
    dim          width of a codebook entry                  groups  of every group norm; divides every width
    """

    def __init__(self, ch, ch_mult, blocks, dim, groups):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1, bias=False)
        self.down = nn.ModuleList(res_blocks(inp, out, blocks, groups)
                                  for inp, out in zip([ch] + widths, widths))
        self.mid = middle_blocks(widths[-1], groups)
        self.norm_out, self.conv_out = group_norm(widths[-1], groups), nn.Conv2d(widths[-1], dim, 1)

    def forward(self, x):
        x = self.conv_in(x)                                                                 # (B, ch, S, S)
        for i, level in enumerate(self.down):
            x = x if i == 0 else F.avg_pool2d(x, 2)                                         # half the side
            for block in level["block"]:
                x = block(x)
        x = self.mid["block_2"](self.mid["block_1"](x))
        return self.conv_out(F.silu(self.norm_out(x)))                                      # (B, dim, h, w)


class Decoder(nn.Module):
    """The way back: (B, dim, h, w) -> pixels (B, 3, S, S), about [0, 1] but not clamped.
    Arguments as for Encoder."""

    def __init__(self, ch, ch_mult, blocks, dim, groups):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(dim, widths[-1], 3, padding=1)
        self.mid = middle_blocks(widths[-1], groups)
        self.up = nn.ModuleList(res_blocks(inp, out, blocks, groups)
                                for inp, out in zip(widths[1:] + widths[-1:], widths))
        for i, width in enumerate(widths[1:], 1):                                 # up.0 is at full resolution
            self.up[i]["upsample"] = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, padding=1)})
        self.norm_out, self.conv_out = group_norm(widths[0], groups), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):
        x = self.conv_in(z)                                                            # (B, widths[-1], h, w)
        x = self.mid["block_2"](self.mid["block_1"](x))
        for level in reversed(self.up):
            for block in level["block"]:
                x = block(x)
            if "upsample" in level:
                x = level["upsample"]["conv"](F.interpolate(x, scale_factor=2.0))           # twice the side
        return in_float32(self.conv_out, F.silu(self.norm_out(x)))                          # (B, 3, S, S)


def in_float32(layer, x):
    """layer(x) in float32 at least, even under autocast: 8 bits of mantissa are too few for pixels and for
    long sums."""
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):        # "meta" has no autocast
        return layer(x.to(torch.promote_types(x.dtype, torch.float32)))


class Codebook(nn.Module):
    """K vectors e_k of width dim."""

    def __init__(self, size, dim):
        super().__init__()
        self.embedding = nn.Embedding(size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / size, 1 / size)

    def distances(self, z):
        """||z - e_k||^2 = ||z||^2 + ||e_k||^2 - 2 z . e_k at every position: (B, dim, h, w) ->
        (B * h * w, K), in float32."""
        def squared(z, e=self.embedding.weight):
            norms = (z * z).sum(1, keepdim=True) + (e * e).sum(1)                           # (B * h * w, K)
            return norms.addmm_(z, e.T, alpha=-2)                           # in place: no second large matrix
        return in_float32(squared, z.movedim(1, -1).flatten(0, -2))

    def lookup(self, ids):
        """Codes of ids: int (B, h, w) -> (B, dim, h, w)."""
        return self.embedding(ids).movedim(-1, 1)


class VQGAN(nn.Module):
    """The tokenizer. Its training objective follows in TokenizerTraining.

    codebook_size  K        codebook_dim  width of a code        ch, ch_mult, blocks, groups  as for Encoder
    """

    def __init__(self, codebook_size, codebook_dim, ch, ch_mult, blocks, groups=32):
        super().__init__()
        if min(blocks, groups) < 1:
            raise ValueError(f"blocks and groups are 1 or more, not {blocks} and {groups}")
        self.codes, self.stride = codebook_size, 2 ** (len(ch_mult) - 1)
        self.encoder = Encoder(ch, ch_mult, blocks, codebook_dim, groups)
        self.decoder = Decoder(ch, ch_mult, blocks, codebook_dim, groups)
        self.quantize = Codebook(codebook_size, codebook_dim)
        self.to(memory_format=torch.channels_last)                                  # fastest for convolutions

    def encode(self, x):
        """Pixels (B, 3, S, S) in [0, 1] -> ids (B, h, w). S must be a multiple of the stride."""
        z = self.encoder(x)                                                                 # (B, dim, h, w)
        return self.quantize.distances(z).argmin(1).view(-1, *z.shape[2:])

    def decode(self, ids):
        """Ids (B, h, w) -> pixels (B, 3, S, S), not clamped: a released decoder overshoots [0, 1] a
        little."""
        return self.decode_codes(self.quantize.lookup(ids))

    def decode_codes(self, z, pixels=2**22):
        """As decode(), of codes or weighted means of codes, (B, dim, h, w). Large batches are decoded in
        parts of so many pixels, to save memory."""
        images = max(1, pixels // (self.stride ** 2 * math.prod(z.shape[2:])))
        return torch.cat([self.decoder(part) for part in z.split(images)])

    @torch.no_grad()
    def reconstruct(self, x):
        """Pixels (B, 3, S, S) -> the same after encode and decode, in [0, 1]; and the ids (B, h, w)."""
        ids = self.encode(x)
        return self.decode(ids).clamp(0, 1), ids


# Training the tokenizer. (On a first reading go on to section 3: all you need is that the loss is the error
# of the copy x', and that it keeps z near the codes and all codes in use.) To choose the nearest code is
# rounding, and rounding has no gradient. So the decoder reads z + sg(e_id - z), where sg is stop-gradient.
# Its value is e_id; its gradient goes straight to z:
#
#     z = 0.3, nearest code 0.5     the decoder reads 0.3 + sg(0.2) = 0.5, whose derivative by z is 1
#
# The loss is a weighted sum of these terms, each but the entropy a mean over all its entries:
#
#     term        weight formula                       trains
#     l1           3.0   |x' - x|                      decoder and encoder
#     l2          10.0   (x' - x)^2                    decoder and encoder
#     commitment   0.25  (z - sg(e_id))^2              encoder: z moves to its code           [VQ-VAE, eq. 3]
#     codebook     1.0   (sg(z) - e_id)^2              codes: each moves to its z             [VQ-VAE, eq. 3]
#     coverage     0.5   (e_k - sg(nearest z))^2       codes, unused ones too: each moves to the z of
#                                                      the batch nearest to it                       [ours]
#     entropy      0.03  mean H(p) - H(mean p)         codes and encoder, see below               [MaskGIT]
#
# Why the last two? With the others alone most codes stay unused, since a code that is nobody's nearest gets
# no gradient. Coverage moves such codes, too. And entropy rewards the use of all codes. In it
# p = softmax(-distances / 0.01) says how sure a place is of its code, and H is the entropy:
#
#     two places' p = (1, 0) and (0, 1)         0 - ln 2 = -0.69     best: sure, and both codes are used
#                     (1, 0) and (1, 0)         0 - 0    =  0        sure, but one code is never used
#                     (.5, .5) and (.5, .5)     ln 2 - ln 2 = 0      not sure
#
# From 256 pixels on train.py adds a patch discriminator d, for sharper textures [VQGAN, eq. 7]:
#
#     generator      0.8   -g d(x')                    decoder and encoder
#     discriminator  1.0   hinge(d(x), d(sg(x'))) / 2  d alone
#
# where hinge(a, b) = max(0, 1 - a) + max(0, 1 + b). The factor g is chosen anew in each step: it makes the
# gradient of g d(x') at the decoder's last layer as long as that of l1 + l2, taken without their weights. It
# is 10,000 at most.
#
# MaskGIT's perceptual loss needs a pretrained network. We do without, and pay in texture: expect a clearly
# higher reconstruction FID (section 12) than the 2 to 3 of released tokenizers.


def straight_through(z, codes):
    """The value of codes, the gradient of z. Both (B, dim, h, w)."""
    return z + (codes - z).detach()


def entropy_loss(distances, temperature=0.01):
    """Mean entropy per position minus entropy of the mean distribution: (N, K) -> scalar, from -ln K to about
    0. Temperature as MaskGIT's."""
    logits = distances / -temperature
    p, log_p = logits.softmax(1), logits.log_softmax(1)                                     # (N, K)
    mean = p.mean(0)                                                                        # (K,)
    return -(p * log_p).sum(1).mean() + (mean * (mean + 1e-5).log()).sum()


class PatchDiscriminator(nn.Module):
    """Judges whether each patch of about 22 pixels is real: (B, 3, S, S) -> scores (B, 1, S / 8, S / 8)."""

    def __init__(self, width=64):
        super().__init__()
        widths = [3, width, 2 * width, 4 * width]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 4, 2, 1) for i, o in zip(widths, widths[1:]))
        # There is no norm after the first convolution.
        self.norms = nn.ModuleList([nn.Identity()] + [group_norm(w) for w in widths[2:]])
        self.score = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms):
            x = F.leaky_relu(norm(conv(x)), 0.2)                                            # half the side
        return self.score(x)


class TokenizerTraining(nn.Module):
    """Tokenizer, discriminator, and the loss of both. One backward pass and one optimizer step serve both:
    the generator term does not reach the discriminator's parameters, nor the discriminator's term the
    tokenizer's.

    vqgan    the VQGAN to train
    WEIGHTS  of the terms above; commitment's and codebook's are [VQ-VAE]'s, the others are ours
    """

    WEIGHTS = {"l1": 3.0, "l2": 10.0, "commitment": 0.25, "codebook": 1.0, "coverage": 0.5, "entropy": 0.03}

    def __init__(self, vqgan):
        super().__init__()
        self.vqgan, self.discriminator = vqgan, PatchDiscriminator()

    def forward(self, x, labels=None, adversarial_weight=0.0, grain=None):
        """Loss of one batch; labels are not used.

        x                   pixels (B, 3, S, S) in [0, 1]
        grain               noise that add_grain() gives to images of one flat colour, drawn if None
        adversarial_weight  of the generator term: 0.8 in [VQGAN]; 0: no discriminator, as below 256 pixels
        returns             scalar loss, dict of its terms
        """
        x = add_grain(x, torch.rand_like(x) if grain is None else grain)
        z = self.vqgan.encoder(x)                                                           # (B, dim, h, w)
        distances = self.vqgan.quantize.distances(z)                                        # (B * h * w, K)
        codes = self.vqgan.quantize.lookup(distances.argmin(1).view(-1, *z.shape[2:]))      # (B, dim, h, w)
        # For each code the position whose z is nearest.
        nearest_z = z.detach().movedim(1, -1).flatten(0, -2)[distances.min(0).indices]      # (K, dim)
        y = self.vqgan.decoder(straight_through(z, codes))                                  # (B, 3, S, S)
        logs = {"l1": (y - x).abs().mean(),
                "l2": F.mse_loss(y, x),
                "commitment": F.mse_loss(z, codes.detach()),
                "codebook": F.mse_loss(codes, z.detach()),
                "coverage": F.mse_loss(self.vqgan.quantize.embedding.weight, nearest_z),
                "entropy": entropy_loss(distances)}
        loss = sum(self.WEIGHTS[k] * v for k, v in logs.items())
        if adversarial_weight:
            logs["generator"], logs["discriminator"] = self.adversarial_losses(x, y, logs["l1"] + logs["l2"])
            loss = loss + adversarial_weight * logs["generator"] + logs["discriminator"]
        return loss, logs

    def adversarial_losses(self, x, y, reconstruction):
        """Hinge losses of generator and discriminator. The former is scaled so that, at the decoder's last
        layer, its gradient is as long as that of the reconstruction, l1 + l2 unweighted [VQGAN, eq. 7]."""
        frozen = {k: p.detach() for k, p in self.discriminator.named_parameters()}
        generator = -torch.func.functional_call(self.discriminator, frozen, (y,)).mean()
        last = self.vqgan.decoder.conv_out.weight
        wanted, own = (torch.autograd.grad(term, last, retain_graph=True)[0].norm()
                       for term in (reconstruction, generator))
        real, fake = self.discriminator(x), self.discriminator(y.detach())
        discriminator = (F.relu(1 - real) + F.relu(1 + fake)).mean() / 2
        return (wanted / (own + 1e-4)).clamp(0, 1e4) * generator, discriminator


# ------------------------------------------------------------------------------------------------------------
# 3. What every model offers
#
# All models below offer the same four calls (but MAE cannot sample from nothing):
#
#     model(x, labels) -> loss, logs              training: how well is the corruption undone?
#     model.sample(n, **options) -> images        generation, from nothing or into a hole
#     model.embed(x) -> vectors                   representation: what a linear probe reads
#     model.features(x, t, layers) -> maps        outputs of any block; t: how corrupted x is
#
# A linear probe is a linear classifier on frozen embeddings: the usual test of a representation. Two
# arguments of features() are for heads of probe.py alone: add, of DifFeed (section 12), and finetune, of
# which only ADDP makes use. Wrong arguments of these calls raise a ValueError that says what is wanted.
# (Section 16 puts a guard around them: a traceback shows it as checked().)


class Model(nn.Module):
    """What all have in common. A subclass defines forward(), features(), embed(), and sample_steps(), which
    yields a state after each step: a Decoding of ids and their mask (section 4), or a Denoising of pixels
    (section 9). In its __init__ it sets image_size, layers = {number of a block: (channels, h, w)}, and
    best_layer, the block that features() reads if none is named. Section 13 lists its duties."""

    # What a method declares besides, in its class or in __init__, where it differs. (No need to learn these.)
    takes_labels, classes = False, 0            # whether it can be told labels, and how many
    t_range = (0, 0, "always 0")                # of the t of features(): least, largest, and what it is
    best_t, pools = 0, ("mean",)                # at which t, and how averaged, embed() reads
    max_steps, alpha_bar = math.inf, None       # of sampling; the noise schedule
    generates, reconstructs = True, False       # can it start from nothing; has it reconstruct()
    length, codes, reads_ids = 0, 0, False      # tokens; size of a codebook; are ids all it reads of an image

    def sample(self, n, **options):
        """Images (n, 3, S, S) in [0, 1], options as for sample_steps. Call eval() before: in training mode
        dropout acts, and labels are hidden now and then. An image depends on its seed, not on how many are
        made at once: for first in range(0, 1024, 64): x = model.sample(64, seeds=first)."""
        for state in self.sample_steps(n, **options):
            pass
        return self.render(state)

    def num_steps(self, steps=None, eta=None):
        """How many steps sample_steps(steps) takes. None: its usual number, which is 10 unless a method has
        another. (eta: at 0 ADM's usual number is smaller.)"""
        return min(steps or 10, self.max_steps)

    def render(self, state):
        """A state of sample_steps -> pixels (n, 3, S, S) in [0, 1]. Here its x is in [-1, 1]."""
        return ((state.x + 1) / 2).clamp(0, 1)

    def noise(self, seeds, draw=0):
        """Standard normal (B, 3, S, S), for sampling and for features(noise=), from a seed for each image,
        int64 (B,). Read it as torch.randn, but row i depends on seeds[i] and the number of the draw alone."""
        S, dtype = self.image_size, next(self.parameters()).dtype
        return to_normal(hashed_uniform(seeds, draw, 3 * S * S)).view(-1, 3, S, S).to(dtype)

    @property
    def device(self):
        """Where its weights lie."""
        return next(self.parameters()).device

    @property
    def tokenizer(self):
        """The frozen VQGAN, or None."""
        return self._modules.get("vqgan")

    # ---- for the scripts. On a first reading go on to section 4; what follows on section 13 explains these

    stem, dynamic_blocks = (), ()
    finetuning = (2.5e-4, 0.65, 0.05), (2.5e-4, 0.75, 0.1)

    def after_step(self):
        """Called after each step of the optimizer."""

    def micro_batch_args(self, first, count):
        """What train.py passes to forward(), besides, with images first .. first + count - 1 of a batch that
        does not fit into memory at once: what must differ between its parts."""
        return {}

    def mirror(self, layer):
        """The layer at equal distance from the other end, to which DifFeed, in probe.py, feeds back."""
        return len(self.layers) + 1 - layer


# ------------------------------------------------------------------------------------------------------------
# 4. Masking and unmasking
#
# MAGE in short: some ids of an image are masked; an encoder reads the others, and some [MASK]; a decoder
# predicts p, at each masked place a distribution over the ids. This section says which are masked, in
# training and, step by step, in generation.
#
# Training masks a random part of the tokens. The mask ratio r is drawn once for each call of forward(), from
# a truncated normal distribution [MAGE, section 3]:
#
#     r ~ N(0.55, 0.25^2) restricted to [0.5, 1]          mean 0.69
#
# This one number joins two tasks. At r = 0.5 half of the tokens are visible: enough to learn a
# representation. Near r = 1 almost none are, and the network learns to generate. Which tokens are masked?
# Each gets a random number, its mask_noise, and those with the smallest numbers are masked. (It is noise in
# name only: the numbers decide the order, and nothing is added to the image.)
#
# To save time, ceil(L / 2) tokens, all of them masked, are dropped: they do not enter the encoder. MAE drops
# all masked ones. MAGE drops this fixed number, so that shapes stay the same from batch to batch, and the
# other masked ones enter as [MASK]. (Their outputs are not used later, but all tokens attend to them, as in
# generation, where the encoder reads many.)
#
#     L = 256 tokens, r = 0.55: ceil(r L) = 141 are masked. Here they are sorted by their random numbers; in
#     the encoder they stand in the order of the image
#     |--------------- 141 masked ---------------|---------- 115 visible ----------|
#     |------- 128 dropped -------|- 13 [MASK] --|
#                                 |----- 128 tokens, with the class token 129 -----|     enter the encoder
#     |------------------ 256 tokens, with the class token 257 -------------------|     enter the decoder
#                                                         (the class token, at position 0, comes in section 5)


def truncated_normal(u, mean=0.55, std=0.25, low=0.5, high=1.0):
    """Uniform u in [0, 1] -> normal numbers restricted to [low, high], by inverting their distribution."""
    a, b = (math.erf((bound - mean) / std / math.sqrt(2)) for bound in (low, high))
    return (mean + std * math.sqrt(2) * torch.erfinv(a + u * (b - a))).clamp(low, high)


def rank_in_row(x):
    """Rank of each entry in its row, 0 for the smallest: (B, L) -> int (B, L)."""
    return x.argsort(stable=True, dim=1).argsort(1)


def random_masking(mask_noise, mask_ratio, drop_ratio=0.5):
    """Choose which tokens are masked, and which enter the encoder.

    mask_noise  (B, L); the smallest of each row are masked, the very smallest also dropped
    mask_ratio  in [drop_ratio, 1], one number for the batch (as in models_mage.py)
    returns     mask bool (B, L), True = masked; ids_keep int (B, L - dropped): positions, ascending (MAE's
                name; they are no token ids)
    """
    L = mask_noise.size(1)
    ids_shuffle = mask_noise.argsort(stable=True, dim=1)                        # (B, L), smallest noise first
    mask = ids_shuffle.argsort(1) < math.ceil(L * float(mask_ratio))                        # (B, L)
    ids_keep = ids_shuffle[:, math.ceil(L * drop_ratio):]                                   # (B, L - dropped)
    return mask, ids_keep.sort(1).values


# Generation starts with n0 masked tokens: all L or, when inpainting, the unknown ones and their neighbours.
# In each of T steps it predicts all masked tokens, keeps the most confident predictions, and masks the
# others again:
#
#     ids            _    _    a    _    b        _ is masked; tokens that are visible stay
#     prediction     c    d    a    e    b        sampled from p at masked tokens only
#     confidence   -.1 -1.6        -.9            log p(sampled id) + temperature (1 - t/T) Gumbel (here 0)
#     next           c    _    a    _    b        num_masked(t) = 2: the least confident are masked again
#
# Why in steps? In one step each token is sampled from its own p, and does not know what the others become.
# Two that may both be red or both be blue can turn out one of each. So few are decided at once, and in the
# next step the others see them.
#
# How many stay masked falls along a cosine [MaskGIT, 3.3], and in MAGE by at least one in each step, down to
# one:
#
#     num_masked(t) = max(1, min(floor(n0 cos(pi t / 2T)), num_masked(t-1) - 1)),       num_masked(0) = n0 > 0
#
#     256 tokens, 20 steps:  255 252 248 243 ... 59 40 20 1     few are kept at first, while all is uncertain
#
# After step T one token is still marked as masked, as in the official code. Each step predicts all masked
# tokens, so it has an id, too, which MAGE shows. ADDP shows a mean (section 8).
#
# The Gumbel noise varies which tokens are kept first, and with that the images. It shrinks to 0 in step T.
# The temperature scales this noise only: ids are always sampled from p itself. It is 6 for 16 x 16 tokens
# and, which is our choice, 6 h / 16 for h x h.

# The ratio of n0 that stays masked after step t of T, by names that sample.py --schedule takes, too.
SCHEDULES = {"cosine": lambda t, T: math.cos(math.pi / 2 * t / T), "linear": lambda t, T: 1 - t / T}


def num_masked(initial, before, t, T, schedule="cosine", round_up=False):
    """How many tokens of each image stay masked after step t = 1 ... T: int (n,) -> int (n,).

    initial   n0, how many were masked at the start          before  how many were before this step
    schedule  a name in SCHEDULES; or a function (t, T) -> the ratio of n0 that stays masked, such as
              lambda t, T: 1 - (t / T) ** 2, in [0, 1], else ValueError; or a list of T counts, how many stay
              masked after each step. One token always stays masked, if any was
    round_up  of a ratio. False: the rule above, so each step keeps at least one, until a single one is left.
              True, as in ADDP (section 8): rounded up, and a step may keep none
    """
    if isinstance(schedule, (list, tuple)):
        wanted = torch.full_like(before, schedule[t - 1])
    else:
        ratio = (SCHEDULES[schedule] if isinstance(schedule, str) else schedule)(t, T)
        if not is_number(ratio, "float", -1e-6, 1 + 1e-6):                                  # nan, say
            raise ValueError(f"schedule must return a ratio in [0, 1], at t = {t} of {T} not {ratio}")
        wanted = initial.double() * ratio
        wanted = wanted.ceil().long() if round_up else wanted.floor().long().minimum(before - 1)
    return wanted.clamp(min=1).minimum(before)                                              # 0 stays 0


# Besides weights and options an image depends on its seed alone, not on the batch in which it is made, so
# torch.rand() will not do. Read hashed_uniform(seeds, draw, L), of section 16, as torch.rand(n, L) whose row
# i follows from seeds[i] and the number of the draw.


def decoding_noise(seeds, t, L):
    """Two uniform numbers for each token in step t of decoding: float (n, L) in (0, 1) each."""
    return hashed_uniform(seeds, 2 * t - 2, L), hashed_uniform(seeds, 2 * t - 1, L)


def image_seeds(seeds, n, device):
    """What sample_steps takes as seeds, int (n,), or the first of n, or None for 0 -> int64 (n,)."""
    if not isinstance(seeds, torch.Tensor):
        seeds = torch.arange(n) + (seeds or 0)
    return to_device(seeds, device)


def to_gumbel(u):
    """Uniform numbers in (0, 1) -> standard Gumbel noise, -log(-log u)."""
    return -(-u.log()).log()


def sample_categorical(p, u):
    """One category a row by inverting the distribution function: p (..., K) sums to 1, u (...) in (0, 1) ->
    int64 (...)."""
    cdf = p.cumsum(-1)
    return torch.searchsorted(cdf, u[..., None] * cdf[..., -1:]).squeeze(-1).clamp(max=p.size(-1) - 1)


def unmask(logits, ids, mask, count, u, gumbel, order=None, t=None):
    """One step of parallel decoding: the four lines of the picture above.

    logits  (n, L, K)
    ids     (n, L)                          mask    (n, L), True = masked
    count   int (n,): how many stay masked
    u       (n, L) in (0, 1): samples the ids
    gumbel  (n, L): is added to log p
    order   None: the most confident tokens are kept. Or a function, (confidence (n, L), mask, t) -> priority
            (n, L) of any type, on any device, of which the highest are kept. confidence includes the Gumbel
            noise, and lies, like mask, on the model's device. Section 13 has examples
    t       number of the step, for order
    returns ids with every masked one predicted, and the new mask, (n, L) each
    """
    p = logits.softmax(-1)                                                                  # (n, L, K)
    ids = torch.where(mask, sample_categorical(p, u), ids)
    confidence = p.gather(-1, ids[..., None]).squeeze(-1).log() + gumbel                    # (n, L)
    priority = confidence if order is None else priority_of(order, confidence, mask, t)
    priority = priority.masked_fill(~mask, math.inf)                        # what was visible stays
    return ids, rank_in_row(priority) < to_device(count, ids.device)[:, None]           # the `count` lowest


class Decoding(typing.NamedTuple):
    """Images while they are decoded."""
    ids: torch.Tensor                   # (n, L); at masked places leftovers of the last step
    token_mask: torch.Tensor            # bool (n, L), True = masked, to be predicted by the next step
    count: torch.Tensor                 # int (n,), on the CPU: how many tokens of each image are masked
    logits: torch.Tensor = None         # (n, L, K) of the last step; ADDP makes its image from them
    known: torch.Tensor = None          # when inpainting: pixels (n, 3, S, S) ...
    inpaint_mask: torch.Tensor = None   # ... and bool (n, S, S), True = generated
    last: bool = False                  # after step T: one token is still masked, but MAGE shows its id, too

    def with_known(self, x):
        """Pixels x (n, 3, S, S), with the known ones put back."""
        return x if self.known is None else torch.where(self.inpaint_mask[:, None], x, self.known.clamp(0, 1))


def parallel_decoding(predict, state, steps, temperature, seeds, schedule="cosine", order=None,
                      round_up=False):
    """The loop: yields a Decoding after each step [MaskGIT, 3.2].

    predict      function (t, state) -> logits (n, L, K), t = 1 ... steps
    state        the Decoding to begin with            seeds  int64 (n,)
    temperature  of the Gumbel noise        schedule, round_up  see num_masked        order  see unmask
    """
    initial = state.count
    for t in range(1, steps + 1):
        logits = predict(t, state)
        count = num_masked(initial, state.count, t, steps, schedule, round_up)          # after this step
        u_ids, u_gumbel = decoding_noise(seeds, t, state.ids.size(1))                   # (n, L) each
        gumbel = temperature * (1 - t / steps) * to_gumbel(u_gumbel)
        ids, mask = unmask(logits, state.ids, state.token_mask, count, u_ids, gumbel, order, t)
        state = state._replace(ids=ids, token_mask=mask, count=count, logits=logits, last=t == steps)
        yield state


# ------------------------------------------------------------------------------------------------------------
# 5. MAGE: predict the masked ids
#
# An encoder reads what section 4 left: the visible ids and some [MASK]. Before them, at position 0, it reads
# the class token. A decoder then predicts the masked ids:
#
#     ids     [class]  a   _   _   b   _   _          4 of 6 tokens are masked
#     drop    [class]  a   _       b                  3, half of all, do not enter the encoder
#     encode    h0    ha   hm      hb                 hm, the output of [MASK], is not used by the decoder
#     fill      h0    ha   h0  h0  hb  h0  h0         h0 at every masked place
#     decode                p   p       p   p         each a softmax over the K codes
#
# At masked places, dropped or not, the decoder reads h0, the encoder's output at the class token. So
# training makes h0 a summary of the image. (In section 4's example the decoder reads h0, 115 outputs of
# visible ids, and h0 again at 141 places, all after a linear layer and with positions.) The loss is a
# cross-entropy at masked places, with label smoothing 0.1:
#
#     loss = - mean over masked i of  log p(id_i | visible ids)       but for the smoothing      [MAGE, eq. 1]
#
# The class token is an embedded id like the others. It is the label of the image or, without a label, the
# "fake class", which stands for any image. In training one label in ten is replaced by the fake class. Codes,
# labels, fake class and [MASK] share one vocabulary:
#
#     0 ... K-1 codes  |  K ... K+classes-1 labels  |  fake class  |  [MASK]
#
# (In the authors' files the fake class has the id of class 76.)
#
# Generation is the loop of section 4. There, as in the official code, no [MASK] is dropped: dropping saves
# time in training. So the network meets what it has never seen: at the start L times [MASK] in the encoder,
# where training has L / 2 at most; in the last third of the steps, and in embed(), fewer than half of the ids
# masked. By the paper's results it copes with that.


class TokenEmbedding(nn.Module):
    """LayerNorm(token + position): ids (B, 1 + L) -> (B, 1 + L, C). Official name: BertEmbeddings."""

    def __init__(self, vocab_size, positions, dim, dropout):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, dim)
        self.position_embeddings = nn.Embedding(positions, dim)
        self.LayerNorm, self.dropout = nn.LayerNorm(dim, eps=1e-6), nn.Dropout(dropout)

    def forward(self, ids):
        return self.dropout(self.LayerNorm(self.word_embeddings(ids) + self.position_embeddings.weight))


class Head(nn.Module):
    """Decoder output x (B, L, C') -> logits (B, L, V), in float32. V: the ids that weight (V, C) has, in MAGE
    the K codes alone.

    A logit is the product of the output with the embedding of that id, its row of weight, plus a bias: input
    and output share one table (weight tying). As in the official code it is detached here: the loss trains
    the table through the ids that the network reads, not through these products."""

    def __init__(self, inp, dim, vocab_size):
        super().__init__()
        self.fc, self.ln = nn.Linear(inp, dim), nn.LayerNorm(dim)             # eps 1e-5; MAGE's others 1e-6
        self.bias = nn.Parameter(torch.zeros(1, 1, vocab_size))

    def forward(self, x, weight):
        x = self.ln(F.gelu(self.fc(x)))                                                     # (B, L, C)
        logits = F.linear(x, weight.detach(), self.bias[0, 0, :len(weight)])
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def masked_cross_entropy(logits, target, mask):
    """Cross-entropy with label smoothing 0.1, averaged over masked tokens (official file: models_mage.py).

    logits (B, L, V)    target  ids (B, L), or probabilities (B, L, V)    mask bool (B, L)
    """
    logits, target = logits.flatten(0, 1), target.flatten(0, 1)                             # (B * L, ...)
    nll = F.cross_entropy(logits, target, label_smoothing=0.1, reduction="none")            # (B * L,)
    return (nll * mask.flatten()).sum() / mask.sum()


def learned_tokens(length, dim):
    """A learned parameter (1, length, dim), initialised like an embedding."""
    return nn.Parameter(torch.randn(1, length, dim) * 0.02 * (768 / dim) ** 0.5)


def init_weights(module):
    """MAE's and MAGE's initialisation: Xavier-uniform matrices (qkv as one), zero biases, N(0, 0.02^2)
    embeddings. The 0.02 belongs to width 768. It is scaled so that fresh logits, products with these
    embeddings, vary alike at any width."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02 * (768 / module.embedding_dim) ** 0.5)


# Guidance. MAGE and UMD may be told the label of an image. In training one label in ten is left out, so they
# can predict with a label and without. Classifier-free guidance exaggerates the difference that a label y
# makes [CFG]. It takes a second pass in each step:
#
#     guided = logits(no label) + w_t (logits(y) - logits(no label))         in UMD of eps, not of logits
#     w_t    = 1 + (w - 1) t / T         grows up to w in step T: strong guidance from the start would make
#                                        images alike (Muse, 2301.00704). In UMD and ADM it is w in every step
#
#     two codes, w_t = 3:  no label (1, 2), label (2, 1)  ->  guided (1 + 3 * 1, 2 + 3 * -1) = (4, -1)
#                          p of the first code:  0.27 without the label, 0.73 with it, 0.99 guided
#
# w = 1 is the plain prediction with the label, for which one pass is enough. Two variants:
#
# - An interval [Interval]. Diffusion needs guidance in the middle of sampling; early it harms, and late it
#   hardly matters. Let progress run from 0, all noise or all masked, to 1, the image. Guidance acts while
#   low <= progress < high; elsewhere w_t is 1.
# - A guide [Autoguidance]. A weaker network, such as an earlier checkpoint, takes the place of "no label". It
#   makes the same errors as the network, but larger ones. So the direction from its prediction to the
#   network's leads away from the error. Both see the same labels. ADDP and ADM take no labels: a guide is the
#   only guidance they have.


def guidance_at(progress, w, interval):
    """w inside the interval (low, high), 1 outside. progress: of the step's beginning, in [0, 1)."""
    low, high = interval
    return w if low <= progress < high else 1.0


# Generation is the same in MAGE and ADDP (section 8): the loop of section 4. So it stands in a class of its
# own, to which each adds its network, step_logits(). Who calls whom:
#
#     sample                      Model: all steps, then render()
#       sample_steps              TokenModel: seeds, temperature, inpainting
#         parallel_decoding       section 4: for t = 1 ... T
#           guided_logits         TokenModel: the prediction, with guidance or without
#             step_logits         MAGE, ADDP: one pass of the network
#           num_masked, unmask    section 4: how many stay masked, and which
#       render                    MAGE, ADDP: ids -> pixels


class TokenModel(Model):
    """What MAGE and ADDP share: both predict ids, and generate by parallel decoding.

    vqgan       the frozen tokenizer
    image_size  S, a multiple of the tokenizer's stride, else ValueError

    A subclass sets self.vqgan, and defines

    step_logits(state, labels=None)    a Decoding -> logits (n, L, K), the prediction of its next step
    render(state)                      a Decoding -> pixels (n, 3, S, S) in [0, 1]
    """

    reconstructs, pools = True, ("mean", "class")
    round_up = False                                            # of num_masked

    def __init__(self, vqgan, image_size):
        super().__init__()
        if image_size % vqgan.stride:
            raise ValueError(f"image size {image_size} is not a multiple of the stride {vqgan.stride}")
        self.image_size, self.grid = image_size, image_size // vqgan.stride
        self.codes, self.length = vqgan.quantize.embedding.num_embeddings, self.grid ** 2   # K, L
        self.max_steps = self.length

    @torch.no_grad()
    def to_ids(self, x):
        """Pixels (B, 3, S, S) -> ids (B, L), row by row. Ids stay ids."""
        return self.vqgan.encode(x).flatten(1) if x.is_floating_point() else x.long()

    def reconstruct(self, x):
        """Pixels (B, 3, S, S) -> what the ids keep of them, in a tuple of one."""
        return self.vqgan.reconstruct(x)[:1]

    def noise(self, seeds):
        """What features(noise=) takes, decided by each image's seed: int64 (B,) -> (B, L) in (0, 1)."""
        return hashed_uniform(seeds, 0, self.length).to(next(self.parameters()).dtype)

    def initial_state(self, n, known=None, mask=None):
        """The Decoding to begin with. From nothing, all tokens are masked.

        For inpainting the known image is tokenised. Its unknown pixels are set to 0 before, or ids nearby
        would betray them. Tokens that contain unknown pixels are masked. So are their neighbours, whose ids
        may describe the black hole. (Ids further off seldom change, although the encoder's norms see it
        all.)"""
        device = self.device
        if known is None:
            return Decoding(torch.zeros(n, self.length, dtype=torch.long, device=device),
                            torch.ones(n, self.length, dtype=torch.bool, device=device),
                            torch.full((n,), self.length))
        unknown = F.max_pool2d(mask[:, None].float(), self.vqgan.stride)                    # (n, 1, h, w)
        token_mask = F.max_pool2d(unknown, 3, 1, 1).flatten(1) > 0                          # (n, L)
        ids = self.to_ids(known.masked_fill(mask[:, None], 0.0))                            # (n, L)
        return Decoding(ids, token_mask, token_mask.sum(1).cpu(), known=known, inpaint_mask=mask)

    def num_steps(self, steps=None, eta=None):
        """steps if given, else 20, or one for each token if these are fewer."""
        return steps or min(20, self.length)

    @torch.no_grad()
    def sample_steps(self, n, steps=None, temperature=None, guidance=1.0, labels=None, known=None, mask=None,
                     seeds=None, schedule="cosine", order=None, guidance_interval=(0.0, 1.0), guide=None):
        """Parallel decoding, with guidance, from nothing or into known pixels.

        n, steps      images; steps: 20 as published, or fewer if there are fewer tokens
        temperature   of the Gumbel noise; 6 as published for 16 x 16 tokens, 6 * h / 16 for h x h (ours)
        labels        int (n,), or None
        guidance      w of classifier-free guidance, to which w_t grows
        known, mask   inpainting: pixels (n, 3, S, S), and bool (n, S, S), True = to be generated
        seeds         int (n,): all that an image depends on besides weights and options; or the first of n,
                      0 if None
        schedule      see num_masked
        order         see unmask; by confidence if None
        guidance_interval    (low, high): step t of T is guided if low <= (t - 1) / T < high
        guide         None, or a weaker model of this class, with the same tokenizer; it sees the same labels
        yields        a Decoding after each step
        """
        steps, seeds = self.num_steps(steps), image_seeds(seeds, n, self.device)
        temperature = 6.0 * self.grid / 16 if temperature is None else temperature

        def predict(t, state):                          # without guidance w_t is 1, and one pass is enough
            w_t = 1 + (guidance - 1) * t / steps
            w_t = guidance_at((t - 1) / steps, w_t, guidance_interval)
            return self.guided_logits(state, labels, w_t, guide)
        yield from parallel_decoding(predict, self.initial_state(n, known, mask), steps, temperature, seeds,
                                     schedule, order, self.round_up)

    def guided_logits(self, state, labels, w, guide=None):
        """step_logits, moved away from those of the guide or, without one, without a label: (n, L, K)."""
        own = self.step_logits(state, labels)
        if w == 1 or labels is None and guide is None:
            return own
        other = (guide or self).step_logits(state, labels if guide else None)
        return other + w * (own - other)


class MAGE(TokenModel):
    """Masked generative encoder (official files: models_mage.py, models_vit_mage.py, gen_img_uncond.py).

    vqgan           the frozen tokenizer, part of this module and of its checkpoint
    image_size      S, a multiple of the tokenizer's stride, else ValueError
    width, depth, heads, decoder_width, decoder_depth, decoder_heads        of encoder and decoder; in the
                    size "base" 768, 12, 12 and 768, 8, 16
    classes         0, or the number of labels it can be conditioned on
    fake_class      None: the fake class has an id of its own; c: it shares that of class c
                    (published files: 76)
    dropout         after the embedding and in the blocks
    """

    takes_labels, reads_ids = True, True
    t_range, stem = (0.0, 1.0, "the mask ratio"), ("token_emb",)

    def __init__(self, vqgan, image_size, width, depth, heads, decoder_width, decoder_depth, decoder_heads,
                 classes=0, fake_class=None, dropout=0.1):
        super().__init__(vqgan, image_size)
        own, self.classes = fake_class is None, classes         # own: the fake class has an id of its own
        if not own and not 0 <= fake_class < classes:
            raise ValueError(f"fake_class is None or one of {classes} classes, not {fake_class}")
        self.fake_id = self.codes + (classes if own else fake_class)
        self.mask_id = self.codes + classes + (1 if own else 0)
        vocab_size = self.mask_id + 1

        self.token_emb = TokenEmbedding(vocab_size, 1 + self.length, width, dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.decoder_pos_embed_learned = learned_tokens(1 + self.length, decoder_width)
        self.decoder_blocks = nn.ModuleList(Block(decoder_width, decoder_heads, dropout)
                                            for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=1e-6)
        self.mlm_layer = Head(decoder_width, width, vocab_size)
        self.apply(init_weights)
        self.vqgan = vqgan.requires_grad_(False)                # after apply(): it keeps its weights
        widths = [width] * depth + [decoder_width] * decoder_depth
        self.best_layer = depth                                 # the encoder's last
        self.layers = {b: (w, self.grid, self.grid) for b, w in enumerate(widths, 1)}

    # ---- training

    def forward(self, x, labels=None, *, mask_ratio=None, mask_noise=None, keep_label=None):
        """Loss of one batch.

        x           pixels (B, 3, S, S) in [0, 1] or ids (B, L)
        labels      int (B,) in [0, classes), or None
        mask_ratio  in [0.5, 1]        mask_noise  (B, L), see random_masking
        keep_label  bool (B,): False replaces the label by the fake class. All three are drawn if None
        returns     scalar loss, dict of its terms
        """
        ids = self.to_ids(x)                                                                # (B, L)
        mask, latent, logits = self.mask_and_predict(ids, labels, mask_ratio, mask_noise, keep_label)
        loss = masked_cross_entropy(logits, ids, mask)
        return loss, {"masked": loss}

    def mask_and_predict(self, ids, labels=None, mask_ratio=None, mask_noise=None, keep_label=None):
        """Ids (B, L) -> mask (B, L), latent (B, 1 + M, C), logits (B, L, K). Arguments as for forward."""
        mask_noise = torch.rand(ids.shape, device=ids.device) if mask_noise is None else mask_noise
        mask_ratio = truncated_normal(torch.rand(())) if mask_ratio is None else mask_ratio
        mask, ids_keep = random_masking(mask_noise, mask_ratio)
        latent = self.encode(self.input_ids(ids, mask, labels, keep_label), ids_keep)       # (B, 1 + M, C)
        logits = self.decode(latent, mask, ids_keep)                                        # (B, L, K)
        return mask, latent, logits

    def input_ids(self, ids, mask, labels=None, keep_label=None):
        """Ids (B, L) -> what the encoder reads (B, 1 + L): the class id first, [MASK] where masked. Where
        keep_label is False the fake class replaces the label; if None, for one in ten in training."""
        class_id = torch.full_like(ids[:, :1], self.fake_id)                                # (B, 1)
        if labels is not None:
            if keep_label is None:
                keep_label = torch.rand(labels.shape, device=ids.device) >= (0.1 if self.training else 0.0)
            class_id = torch.where(keep_label[:, None], self.codes + labels[:, None], class_id)
        return torch.cat([class_id, ids.masked_fill(mask, self.mask_id)], 1)

    def encode(self, input_ids, ids_keep=None):
        """Input ids (B, 1 + L) -> latent (B, 1 + M, C). Only the class id and positions ids_keep (B, M)
        enter; all if None."""
        x = self.token_emb(input_ids)                                                       # (B, 1 + L, C)
        if ids_keep is not None:
            x = torch.cat([x[:, :1], gather_tokens(x[:, 1:], ids_keep)], 1)                 # (B, 1 + M, C)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decode(self, latent, mask, ids_keep=None):
        """Latent (B, 1 + M, C) -> logits (B, L, K) of the codes, which come first in the vocabulary; labels,
        fake class and [MASK] are never an answer. mask, ids_keep: see random_masking."""
        x = self.decoder_input(latent, mask, ids_keep)                                      # (B, 1 + L, C')
        for block in self.decoder_blocks:
            x = block(x)
        x = self.decoder_norm(x[:, 1:])                                                     # (B, L, C')
        return self.mlm_layer(x, self.token_emb.word_embeddings.weight[:self.codes])

    def decoder_input(self, latent, mask, ids_keep=None):
        """The line "fill" in this section's first picture, with positions: outputs of visible tokens at their
        places, the output at position 0 at masked ones: (B, 1 + L, C')."""
        x = self.decoder_embed(latent)                                                      # (B, 1 + M, C')
        summary = x[:, :1].expand(-1, self.length, -1)                                      # (B, L, C')
        placed = x[:, 1:] if ids_keep is None else scatter_tokens(summary, ids_keep, x[:, 1:])
        # `placed` still has the outputs of [MASK], which the summary replaces.
        x = torch.cat([x[:, :1], torch.where(mask[..., None], summary, placed)], 1)
        return x + self.decoder_pos_embed_learned

    # ---- generation

    def step_logits(self, state, labels=None):
        """What the next step predicts, (n, L, K); see TokenModel."""
        return self.logits(state.ids, state.token_mask, labels)

    def logits(self, ids, mask, labels=None):
        """Logits (n, L, K) of masked ids (n, L). Nothing is dropped: the encoder reads every [MASK]."""
        return self.decode(self.encode(self.input_ids(ids, mask, labels)), mask)

    @torch.no_grad()
    def render(self, state):
        """Decoding -> pixels (n, 3, S, S) in [0, 1]: dark where tokens are masked, known pixels kept."""
        x = self.vqgan.decode(state.ids.unflatten(1, (self.grid, self.grid))).clamp(0, 1)
        mask = state.token_mask & (not state.last)                                          # (n, L)
        mask = mask.unflatten(1, (1, self.grid, self.grid)).float()
        mask = F.interpolate(mask, scale_factor=float(self.vqgan.stride)) > 0               # (n, 1, S, S)
        return state.with_known(torch.where(mask, 0.2, x))

    # ---- representation

    def features(self, x, t=0.0, layers=None, add={}, noise=None, finetune=False):
        """Outputs of blocks as feature maps, before the final norm and without the class token. Blocks after
        the last layer that is asked for do not run.

        x         pixels (B, 3, S, S) or ids (B, L)
        t         mask ratio in [0, 1]; noise (B, L): forward's mask_noise, the smallest are masked, drawn if
                  None
        layers    numbers of blocks, encoder first; [best_layer] if None
        add       {layer: map (B, C, h, w)} added to the output of that layer, in DifFeed's second pass
        finetune  changes nothing here: MAGE is fine-tuned as it was trained
        returns   [map (B, C, h, w) for each of layers]
        """
        ids = self.to_ids(x)                                                                # (B, L)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        if t:
            noise = torch.rand(ids.shape, device=ids.device) if noise is None else noise
            mask = rank_in_row(noise) < math.ceil(t * self.length)
        x = self.token_emb(self.input_ids(ids, mask))                                       # (B, 1 + L, C)
        # Section 12 has this function: encode() and decode() that keep the outputs of blocks.
        return encoder_decoder_features(self, x, lambda latent: self.decoder_input(latent, mask), layers, add)

    def embed(self, x, noise=None, pool="mean"):
        """The vector that the paper probes: (B, C). Nothing is masked.

        pool  'mean', as in the paper, although training made h0 the summary: outputs of the encoder's last
              block, averaged over the image, then through a LayerNorm without weights; 'class': h0, the
              encoder's normed output at the class token
        """
        if pool == "mean":
            mean = self.features(x)[0].mean((2, 3))                                         # (B, C)
            return F.layer_norm(mean, mean.shape[1:], eps=1e-6)
        ids = self.to_ids(x)
        return self.encode(self.input_ids(ids, torch.zeros_like(ids, dtype=torch.bool)))[:, 0]


# ------------------------------------------------------------------------------------------------------------
# 6. A training loop
#
# `python unified.py` runs the story so far: it trains a tokenizer, then MAGE on its ids, in two minutes on
# two CPU cores. The images need no download: draw_shapes() of section 16 draws eight kinds, such as circles
# and stars, whose colours say nothing about the kind. With seed 0, torch 2.13 and two threads it printed,
# among other lines:
#
#     TokenizerTraining step   600   loss 0.031
#     MAGE              step   100   loss 4.920
#     MAGE              step   900   loss 2.258
#     linear probe with 40 labels: 64.1%, before training 42.0%
#     linear probe with 1000 labels: 93.4%, before training 88.3%
#
# - At 0.031 the tokenizer makes a blurred copy of each image. (The entropy term in this loss, weighted,
#   is -0.14.)
# - At step 100 MAGE is no better than a guess: ln 128 = 4.85. Its loss varies with the mask ratio of the
#   batch, and label smoothing keeps it above 0.80, the entropy of a target that has 0.9 on the true id and
#   0.1 spread over all.
# - The probe tells the eight kinds apart. "Before training" is a fresh MAGE on the trained tokenizer: random
#   features of ids tell much already.
# - shapes.png shows 64 samples. Most are shapes, in two colours: the tokenizer has learned no more so far.
#
# `python unified.py umd` (or addp, adm) trains one of the methods to come; section 12 has the results.
# train.py has the same loop, and what a long run needs: ids that are computed once, averaged weights,
# MAGE-E's after_step(), evaluation, checkpoints, many GPUs.


def fit(net, steps, batch_size, peak_lr):
    """Train net on batches of drawn shapes. A simpler recipe than those of section 14. (Not for MAGE-C and
    MAGE-E, to come in section 7: they need two crops of an image, or after_step().)"""
    weights = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.95), weight_decay=0.05)
    lr_schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_lr, steps, cycle_momentum=False)
    for step in range(steps):
        seeds = torch.arange(step * batch_size, (step + 1) * batch_size)
        images, _ = draw_shapes(seeds, 32)                                              # uint8 (B, 3, 32, 32)
        loss, logs = net(images.float() / 255)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 3.0)
        optimizer.step()
        lr_schedule.step()
        if step % 100 == 99 or step + 1 == steps:
            print(f"{type(net).__name__:17s} step {step + 1:5d}   loss {loss.item():.3f}")


def linear_probe(model, labelled):
    """Least squares on the embeddings of `labelled` drawn shapes: its accuracy in [0, 1] on 1,000 others."""
    images, labels = draw_shapes(torch.arange(10**6, 10**6 + 2000), 32)
    with torch.no_grad():
        z = F.pad(model.embed(images.float() / 255), (0, 1), value=1.0)                     # (2000, C + 1)
    targets = F.one_hot(labels[:labelled], len(SHAPES)).float()                         # (labelled, classes)
    W = torch.linalg.lstsq(z[:labelled], targets).solution                                  # (C + 1, classes)
    return ((z[1000:] @ W).argmax(1) == labels[1000:]).float().mean().item()


def train_tokenizer(steps=600):
    """A tokenizer of 4 x 4 ids below 128."""
    vqgan = VQGAN(codebook_size=128, codebook_dim=16, ch=16, ch_mult=(1, 1, 1, 1), blocks=1, groups=1)
    fit(TokenizerTraining(vqgan), steps, batch_size=16, peak_lr=4e-3)
    return vqgan


def main(method="mage", tokenizer_steps=600, steps=900, out="shapes.png"):
    """Train a method, and what it needs before; probe its embeddings, and write a sheet of 64 samples."""
    if method not in ("mage", "addp", "umd", "adm"):
        raise UserError(f"python unified.py takes mage, addp, umd or adm, not {method}")
    if not os.access(os.path.dirname(os.path.abspath(out)), os.W_OK):
        raise UserError(f"{out} cannot be written in this folder; start it from another")
    torch.manual_seed(0)
    size = dict(image_size=32, width=128, depth=4, heads=4, decoder_depth=2)
    if method in ("mage", "addp"):
        vqgan = train_tokenizer(tokenizer_steps)
        model = MAGE(vqgan, **size, decoder_width=128, decoder_heads=4, dropout=0.0)
    # The other three come in sections 8, 10 and 11.
    if method == "addp":
        fit(model, steps, batch_size=64, peak_lr=1.5e-3)
        model = ADDP(model, **size, decoder_heads=4, dropout=0.0)
    if method == "umd":
        model = UMD(**size, grid=8, clean_ratio=0.5, mask_ratio_clean=0.75, mask_ratio_noised=0.375)
    if method == "adm":
        model = ADM(image_size=32, **ADM_SIZES["tiny"])
    # In the untrained copy what starts at 0 in UMD and ADM is random: else only shortcuts act (section 12).
    fresh = draw_zero_layers(copy.deepcopy(model)).eval()
    untrained = {labelled: linear_probe(fresh, labelled) for labelled in (40, 1000)}
    fit(model.train(), steps, batch_size=64 if method == "mage" else 16, peak_lr=1.5e-3)
    for labelled, before in untrained.items():
        after = linear_probe(model.eval(), labelled)
        print(f"linear probe with {labelled} labels: {after:.1%}, before training {before:.1%}")
    image_grid(model.sample(64, steps=8 if model.tokenizer else 50)).save(out)
    print(f"wrote {out}")


# ------------------------------------------------------------------------------------------------------------
# 7. MAGE-C and MAGE-E: which two views show the same image?
#
# MAGE-C adds a contrastive loss to MAGE. Two random crops of an image, its views, each of 20 % of its area or
# more and flipped with probability 1/2, are to have similar embeddings; views of different images are not.
# Each view is masked in its own places and goes through MAGE, whose loss is the mean over both. The encoder's
# outputs, after its last norm, are averaged to one vector: those at visible tokens and at [MASK], but not the
# class token's. Linear(C, 4096), ReLU and Linear(4096, 256) turn it into z, which is scaled to length 1:
#
#     loss = - mean over all 2B views a of  log( exp(z_a . z_b / tau) / sum_(v != a) exp(z_a . z_v / tau) )
#
#     b: the other view of a's image. v: all other views, b among them; with W processes, whose views all
#     count, there are 2BW - 2 negatives                                                     [SimCLR, eq. 1]
#
#     three images with the views 0 1 | 2 3 | 4 5:  a = 2 is to find b = 3 among v = 0, 1, 3, 4, 5
#
# Its weight beside the masked loss is 0.1 [MAGE, section 3]. The authors released no training code for
# MAGE-C: the layers' sizes and tau = 0.2 are ours (near MoCo v3's). Both views have the same mask ratio.


def info_nce(z, temperature=0.2):
    """Contrastive loss of unit vectors z (B, 2, P), row i holding the two views of image i.

    With several processes the negatives are the views of all of them, gradients included; each must have the
    same B. The gradient, averaged over processes, is then that of one loss over all views.
    """
    views = z.flatten(0, 1)                                                                 # (2B, P)
    everyone, me = of_all_processes(views)
    similarity = views @ everyone.T / temperature                                       # (2B, 2B * processes)
    similarity = similarity.scatter(1, me[:, None], -math.inf)                              # v != a
    return F.cross_entropy(similarity, me ^ 1)                  # XOR 1: view 2i is to find 2i + 1, and back


def of_all_processes(z):
    """Vectors z (N, P) -> those of all processes (N * processes, P), and which of them z are, int (N,)."""
    everyone, first = z, 0
    if torch.distributed.is_initialized():
        everyone, first = torch.cat(torch.distributed.nn.all_gather(z)), torch.distributed.get_rank() * len(z)
    return everyone, torch.arange(first, first + len(z), device=z.device)


class ContrastiveMAGE(MAGE):
    """MAGE-C. Arguments as for MAGE, and contrastive, the weight of the contrastive loss."""

    def __init__(self, *args, contrastive=0.1, **options):
        super().__init__(*args, **options)
        self.contrastive, width = contrastive, self.norm.weight.numel()
        self.projection = nn.Sequential(nn.Linear(width, 4096), nn.ReLU(), nn.Linear(4096, 256))
        self.projection.apply(init_weights)

    def forward(self, x, labels=None, *, mask_ratio=None, mask_noise=None, keep_label=None):
        """Loss of two crops of each image, pixels (B, 2, 3, S, S) or ids (B, 2, L), with mask_noise (2B, L)
        and keep_label (2B,); otherwise as MAGE.forward. Given one crop, as in evaluations, it is MAGE's
        loss."""
        one_crop = x.dim() == (4 if x.is_floating_point() else 2)
        if one_crop:
            return super().forward(x, labels, mask_ratio=mask_ratio, mask_noise=mask_noise,
                                   keep_label=keep_label)
        ids = self.to_ids(x.flatten(0, 1))                                                  # (2B, L)
        labels = None if labels is None else labels.repeat_interleave(2)                    # (2B,)
        mask, latent, logits = self.mask_and_predict(ids, labels, mask_ratio, mask_noise, keep_label)
        z = F.normalize(self.projection(latent[:, 1:].mean(1)), dim=-1)                     # (2B, 256)
        masked, contrast = masked_cross_entropy(logits, ids, mask), info_nce(z.unflatten(0, (-1, 2)))
        return masked + self.contrastive * contrast, {"masked": masked, "contrast": contrast}


# MAGE-E needs no second crop, so each image can be tokenised once, before training. Its second view is an
# "echo": the image as MAGE itself redraws it [Sorcen]. The decoder's logits are there anyway, for the masked
# loss, and where an id was masked, a new one is drawn from them:
#
#     ids     a  b  c  d     b is visible; a, c and d are masked
#     drawn   q  b  r  s     q, r, s: each one of the 2nd to 16th best codes, in proportion to p among these;
#                            the best one is never drawn
#     echo    _  b  r  _     [MASK] outside a random square; its side, one for the batch, is half to all of
#                            the grid's
#                            (this is one row of the grid, and the square covers its middle)
#
# The image, masked as in MAGE, goes through the encoder that is trained. The echo, with the fake class, goes
# through a teacher: a slow copy of encoder and projection, through which no gradient flows.
#
#     z_i = unit(prediction(projection(mean(encoder(image i)))))         prediction: 256 -> 2048 -> 256;
#                                                                        mean as in MAGE-C
#     u_i = unit(teacher's projection(mean(teacher's encoder(echo i))))
#
#     loss = - mean over images i of  log( exp(u_i . z_i / tau) / sum_j exp(u_i . z_j / tau) )       tau = 0.3
#
# Its weight beside the masked loss is 0.1, as in MAGE-C. After each step the teacher's weights move 0.4 % of
# the way to the model's, so they are an average over some 250 steps. The cost of the echo is one more pass of
# the encoder, over all tokens, without a backward pass.
#
# MAGE-E is our name; Sorcen's files are called LEASE (models_lease_tk_1600.py). There the teacher starts from
# random weights and has dropout, its projection is trained, and visible ids are redrawn, too, though no loss
# teaches the decoder what those are. And there is more: batch norm after the encoder, a uniformity loss of
# weight 0.01, a first phase with true ids as echoes, and a teacher that moves ever more slowly.


def echo_nce(z, u, temperature=0.3):
    """The loss above of unit vectors z, and u of their echoes, (B, P) each; the other images' z, those of all
    processes, are negatives."""
    everyone, me = of_all_processes(z)
    return F.cross_entropy(u @ everyone.T / temperature, me)


class EchoMAGE(ContrastiveMAGE):
    """MAGE-E. Arguments as for ContrastiveMAGE. A training loop of your own must call after_step()."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.prediction = nn.Sequential(nn.Linear(256, 2048), nn.ReLU(), nn.Linear(2048, 256))
        self.prediction.apply(init_weights)
        encoder = nn.Sequential(self.token_emb, *self.blocks, self.norm)
        self.teacher = copy.deepcopy(nn.ModuleList([encoder, self.projection])).requires_grad_(False)

    def forward(self, x, labels=None, *, mask_ratio=None, mask_noise=None, keep_label=None):
        """Loss of one crop of each image. Arguments as for MAGE.forward; the dict has contrast, too."""
        ids = self.to_ids(x)                                                                # (B, L)
        mask, latent, logits = self.mask_and_predict(ids, labels, mask_ratio, mask_noise, keep_label)
        z = self.prediction(self.projection(latent[:, 1:].mean(1)))                         # (B, 256)
        masked = masked_cross_entropy(logits, ids, mask)
        contrast = echo_nce(F.normalize(z, dim=-1), self.echo(logits, ids, mask))
        return masked + self.contrastive * contrast, {"masked": masked, "contrast": contrast}

    @torch.no_grad()
    def echo(self, logits, ids, mask):
        """Unit vectors u (B, 256) of new echoes."""
        scores, codes = (best[..., 1:] for best in logits.topk(min(16, self.codes)))        # (B, L, 15) each
        drawn = sample_categorical(scores.softmax(-1), torch.rand(ids.shape, device=ids.device))
        drawn_ids = torch.where(mask, codes.gather(-1, drawn[..., None]).squeeze(-1), ids)  # (B, L)
        encoder, projection = self.teacher.eval()                                           # without dropout
        latent = encoder(self.input_ids(drawn_ids, ~self.random_squares(ids)))              # (B, 1 + L, C)
        return F.normalize(projection(latent[:, 1:].mean(1)), dim=-1)

    def random_squares(self, ids):
        """A square of the grid for each image, True inside: bool (B, L). Their side is one for the batch."""
        h = self.grid
        side = int(torch.randint((h + 1) // 2, h + 1, ()))
        corner = torch.rand(len(ids), 2, 1, device=ids.device) * (h - side + 1)
        place = torch.arange(h, device=ids.device) - corner.long()                # (B, 2, h) from the corner
        rows, columns = ((place >= 0) & (place < side)).unbind(1)                           # (B, h) each
        return (rows[:, :, None] & columns[:, None]).flatten(1)

    @torch.no_grad()
    def after_step(self):
        """Move the average."""
        ours = nn.ModuleList([self.token_emb, self.blocks, self.norm, self.projection]).parameters()
        torch._foreach_lerp_([*self.teacher.parameters()], [*ours], 1 - 0.996)


# ------------------------------------------------------------------------------------------------------------
# 8. ADDP: read pixels, predict ids
#
# MAGE reads ids. They suit generation. For recognition pixels should be better: rounding to ids loses detail.
# ADDP reads pixels and predicts ids. Its generation alternates between the two, hence the name: ids, an image
# decoded from them, better ids, a better image. It is the loop of section 4, with an image inside:
#
#     ids, p_prev ----> codes ----> image xt ----> encoder ----> decoder ----> p
#          ^                                                                   |
#          '---- unmask: ids are sampled from p, the surest stay; p_prev = p --'
#
# In each step some places (at first none) have a visible id. The others are masked, and have p_prev, the
# prediction of the step before: a distribution over the K codes each. From both ADDP predicts a new one, p.
# In training there is no step before. There a trained MAGE, frozen, makes p_prev, and also the target of p.
# So ADDP learns to predict as MAGE does, and in generation its own p can take the place of MAGE's.
#
# One step, of an image of four places and a codebook of two codes. Places 1 and 4 are masked:
#
#     place                            1             2        3              4
#     ids                              _             1        0              _
#     p_prev, over the codes       (.7, .3)                              (.4, .6)
#
#     code                     .7 e_0 + .3 e_1      e_1      e_0     .4 e_0 + .6 e_1
#     xt = D(codes)                 blurred        sharp    sharp         blurred
#
#     encoder reads    [class]      patch1         patch2   patch3        patch4
#     and returns        h0           h1             h2       h3            h4
#
#     decoder reads     [M]          [M]             h2       h3           [M]          1      0
#     with positions   vis[0]       msk[1]         vis[2]   vis[3]       msk[4]       id[2]  id[3]
#     and predicts p               (.9, .1)                              (.5, .5)
#
#     sampled from p                   0                                     1
#     log p + Gumbel                 -.1                                   -.7          (as if Gumbel were 0)
#     next ids                         0             1        0              _          num_masked is 1
#     next p_prev                                                        (.5, .5)
#
# - Codes, image. A visible place has the code of its id. A masked one has the mean of all codes under p_prev,
#   sum over k of p_prev(k) e_k. D, the tokenizer's decoder, makes a blur of it. (An image needs pixels
#   everywhere: where nothing is decided p_prev shows what is likely.)
# - The encoder reads all patches of xt, clamped to [0, 1], normalised as ImageNet's pixels are, embedded with
#   class token and positions, and normalised again (tokenizer_norm).
# - The decoder reads the encoder's outputs at visible places, after a linear layer. At masked places, and at
#   position 0, where MAGE's decoder has the summary, it reads the mask token [M]. At the end come the visible
#   ids, embedded. Visible places, masked places and ids have each a table of positions: vis, msk and id
#   (in the code decoder_pos_embed_learned, decoder_pos_mask_embed and decoder_pos_token_embed).
# - So h0, h1 and h4 are thrown away. What the blur shows reaches the decoder through h2 and h3 alone, since
#   these have attended to it. The official code does this, too, and gives no reason. Perhaps it makes the
#   outputs of visible patches carry the whole image.
# - No timestep enters the network: it can see how much of the image is decided.
#
# Training. The predictor, that trained MAGE, makes p_prev from the ids that were visible earlier, and q, the
# target of p, from those that are visible now. So it runs with two nested masks: `mask_earlier` contains
# `mask`, and mostly masks more.
#
#     place            1     2     3     4
#     ids              a     b     c     d        of the image
#     mask_earlier     _     b     _     _        p_prev = MAGE(b), at 1 and 4 (at 3 it is not used)
#     mask             _     b     c     _        q      = MAGE(b, c), at 1 and 4
#                                                 p      = ADDP(b, c, p_prev), at 1 and 4
#     (MAGE reads as in generation: [MASK] at masked places, none of them dropped, and the fake class.)
#
#     loss = - mean over i in mask of  sum over k of q_i(k) log p_i(k | xt, visible ids)      [ADDP, figure 4]
#            with label smoothing 0.1, and p over the whole vocabulary; in generation, over the codes alone
#
# So the target is a distribution over codes, not the one true id. The paper sees a diffusion process in this:
# forward steps mask tokens, and MAGE fills each masked place with what it predicts; p is a step back, and the
# loss its KL(q || p): but for the smoothing, the cross-entropy less q's entropy, a constant.
#
# q follows from the visible ids alone, which ADDP reads, too; p_prev is no more than a hint at it. What is
# gained is an encoder of pixels. That the samples get better than MAGE's the loss does not explain.
#
# Tokenizer and MAGE are frozen: no gradient flows through xt or q. The encoder sees decoded images only; it
# is probed and fine-tuned on real ones.
#
# Both masks rank the same random numbers, so one contains the other. The ratios stand in one ascending list
# of 66, nested_mask_ratios(), with a probability each: `mask` takes entry i, drawn with these, and
# mask_earlier entry min(i + gap, 65), with gap uniform in 1 ... 5. i = 40 and gap = 3 are the ratios 0.918
# and 0.935: of 256 tokens 235 and 240 are masked.
#
# Generation. The steps are those of the picture. Of a masked place the next step gets to know p_prev alone,
# not the id that was sampled there. (A Decoding, of section 4, has all: ids, token_mask, and logits, whose
# softmax is p_prev; before step 1 logits is None.) How many tokens stay masked is rounded up, and need not
# fall, so a step may keep none:
#
#     num_masked(t) = max(1, ceil(n0 cos(pi t / 2T)))
#     256 tokens, 20 steps   ADDP  256 253 249 ...         MAGE  255 252 248 ...
#     16 tokens, 8 steps     ADDP  16 15 14 12 9 7 4 1     MAGE  15 14 13 11 8 6 3 1
#
# The first steps are special:
#
#     from nothing     While no image of the batch has a visible id, the decoder reads mask tokens alone. So
#                      the encoder is skipped, and p_prev not used. With 256 tokens and 20 steps these are
#                      steps 1 and 2.
#     inpainting       Ids are visible at once, but there is no p_prev. So in step 1 it is MAGE's. (A hole
#                      that leaves no id visible is filled as from nothing.)
#
# The token that is masked after the last step shows as its mean.


def nested_mask_ratios():
    """Mask ratios of training, ascending from 0.509 to 0.9999, and their probabilities: float64 (66,) each.
    They are cos(pi / 2 * j / 100) for j = 66, 65 ... 1, weighted by MAGE's normal density. As they are dense
    near 1, more is masked than in MAGE: 74.5 % on average. Counts are rounded up, so the five largest mask
    all 256 tokens: they teach the first steps of generation. (The encoder runs even then, but nothing reads
    its outputs.) Official file: utils.py."""
    ratio = (math.pi / 2 * torch.arange(100, -1, -1, dtype=torch.float64) / 100).cos()
    ratio = ratio[(ratio >= 0.5) & (ratio < 1)]
    weight = (-((ratio - 0.55) / 0.25) ** 2 / 2).exp()
    return ratio, weight / weight.sum()


class ADDP(TokenModel):
    """Alternating denoising diffusion process (official files: models_addp.py, engine_generate.py,
    models_vit.py).

    predictor       a trained MAGE, which is frozen and lends its tokenizer. Training and inpainting run it
    image_size      S, which must be the predictor's, else ValueError
    width, depth, heads, decoder_depth, decoder_heads, dropout      encoder and decoder have the same width

    It follows the official code where that differs from the paper's figure 4:
    - the loss has label smoothing, and its softmax runs over the whole vocabulary;
    - visible ids enter the decoder as tokens, beside the encoder's output;
    - p_prev comes from a mask ratio 1 to 5 entries further in the list, not from exactly one step before.
    """

    t_range = (0, 0, "always 0, since no timestep enters the network")
    stem = ("patch_embed", "pos_embed", "cls_token", "token_emb")
    dynamic_blocks = property(lambda self: tuple(self.decoder_blocks))
    finetuning = (1e-3, 0.65, 0.2), (2.5e-4, 0.8, 0.1)

    def __init__(self, predictor, image_size, width, depth, heads, decoder_depth, decoder_heads, dropout=0.1):
        if image_size != predictor.image_size:
            raise ValueError(f"image size {image_size} is not the predictor's {predictor.image_size}")
        super().__init__(predictor.vqgan, image_size)
        vocab_size, patch = predictor.mask_id + 1, predictor.vqgan.stride           # one patch for each id
        self.token_emb = nn.Embedding(vocab_size, width)                        # only the decoder reads ids
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm, self.decoder_embed = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, width)
        self.decoder_pos_embed_learned = learned_tokens(1 + self.length, width)
        self.decoder_blocks = nn.ModuleList(Block(width, decoder_heads, dropout)
                                            for _ in range(decoder_depth))
        self.decoder_norm, self.mlm_layer = nn.LayerNorm(width, eps=1e-6), Head(width, width, vocab_size)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.apply(init_weights)
        # It is a linear layer on patches, and initialised like one.
        nn.init.xavier_uniform_(self.patch_embed["proj"].weight.data.flatten(1))
        self.cls_token, self.mask_token = learned_tokens(1, width), learned_tokens(1, width)
        self.pos_embed = learned_tokens(1 + self.length, width)
        self.decoder_pos_mask_embed = learned_tokens(1 + self.length, width)
        self.decoder_pos_token_embed = learned_tokens(1 + self.length, width)
        self.tokenizer_norm, self.dropout = nn.LayerNorm(width, eps=1e-6), nn.Dropout(dropout)
        # Mean and standard deviation of ImageNet's pixels.
        for name, values in (("color_mean", (0.485, 0.456, 0.406)), ("color_std", (0.229, 0.224, 0.225))):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.vqgan, self.token_predictor = predictor.vqgan, predictor.requires_grad_(False).eval()
        self.best_layer = depth                                 # the encoder's last
        self.layers = dict.fromkeys(range(1, depth + decoder_depth + 1), (width, self.grid, self.grid))

    def train(self, mode=True):
        """The predictor stays in eval mode. In the official training it did not: its predictions, which are
        inputs and targets, had dropout 0.1. model.token_predictor.train() afterwards gives that."""
        super().train(mode)
        self.token_predictor.eval()
        return self

    # ---- the network

    def next_image(self, ids, mask, logits):
        """xt (n, 3, S, S), not clamped: decoded from the codes of visible ids and, where masked, from mean
        codes under softmax(logits)."""
        codes = self.vqgan.quantize.embedding.weight                                        # (K, dim)
        c = torch.where(mask[..., None], logits.softmax(-1) @ codes, codes[ids])            # (n, L, dim)
        return self.vqgan.decode_codes(c.mT.unflatten(2, (self.grid, self.grid)))

    def patches(self, x, finetune=False):
        """Pixels (B, 3, S, S) -> input of the encoder's blocks (B, 1 + L, C). Fine-tuning skips the clamp,
        tokenizer_norm and dropout."""
        x = ((x if finetune else x.clamp(0, 1)) - self.color_mean) / self.color_std
        x = self.patch_embed["proj"](x)                                                     # (B, C, h, w)
        cls_token = self.cls_token.expand(len(x), -1, -1)
        x = torch.cat([cls_token, x.flatten(2).mT], 1) + self.resized_pos_embed(x.size(-1))
        return x if finetune else self.dropout(self.tokenizer_norm(x))

    def encode(self, x):
        """Pixels (B, 3, S, S) -> latent (B, 1 + L, C). Every patch enters; masked ids show as blur."""
        x = self.patches(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decode(self, latent, ids, mask, num_visible, vocab_size=None):
        """Latent (B, 1 + L, C) -> logits (B, L, K), or over the first vocab_size ids. num_visible: how many
        ids are visible, the same number in each image."""
        x = self.decoder_input(latent, ids, mask, num_visible)                # (B, 1 + L + num_visible, C)
        for block in self.decoder_blocks:
            x = block(x)
        x = self.decoder_norm(x[:, 1:1 + self.length])                                      # (B, L, C)
        return self.mlm_layer(x, self.token_emb.weight[:vocab_size or self.codes])

    def decoder_input(self, latent, ids, mask, num_visible):
        """Latent (B, 1 + L, C) -> (B, 1 + L + num_visible, C). The mask token stands where an id is masked
        and, unlike in MAGE, at position 0; the visible ids are appended. Masked places, the others, and ids
        have position embeddings of their own."""
        mask_token = self.mask_token.expand(len(ids), -1, -1)
        x = torch.cat([mask_token, self.decoder_embed(latent[:, 1:])], 1)                   # (B, 1 + L, C)
        x = x + self.decoder_pos_embed_learned
        x = torch.where(F.pad(mask, (1, 0))[..., None], self.mask_token + self.decoder_pos_mask_embed, x)
        id_tokens = self.token_emb(ids) + self.decoder_pos_token_embed[:, 1:]               # (B, L, C)
        # Positions (B, num_visible): 0, for visible, sorts before 1, and a stable sort keeps their order.
        visible = mask.int().argsort(stable=True, dim=1)[:, :num_visible]
        return torch.cat([x, gather_tokens(id_tokens, visible)], 1)

    # ---- training

    def forward(self, x, labels=None, *, index=None, gap=None, mask_noise=None):
        """Loss of one batch.

        x           pixels (B, 3, S, S) in [0, 1] or ids (B, L). labels: None, since ADDP takes none
        index, gap  mask ratios, one pair for the batch (as in the official code): number index of
                    nested_mask_ratios(), 0 ... 65, is that of mask; number index + gap, gap 1 ... 5, that of
                    mask_earlier
        mask_noise  (B, L): the smallest are masked. All three are drawn if None
        returns     scalar loss, dict of its terms
        """
        ids = self.to_ids(x)                                                                # (B, L)
        mask, mask_earlier, num_visible = self.nested_masks(ids, index, gap, mask_noise)
        with torch.no_grad():                                           # MAGE, with both masks at once
            both = self.token_predictor.logits(ids.repeat(2, 1), torch.cat([mask_earlier, mask]))
            logits_prev, logits_now = both.chunk(2)                                      # (B, L, K) each
            xt = self.next_image(ids, mask, logits_prev)                                 # (B, 3, S, S)
        # Over the whole vocabulary, as in the official code: what is no code has the target 0 (and its share
        # of the label smoothing). In generation the softmax is over codes alone.
        logits = self.decode(self.encode(xt), ids, mask, num_visible, vocab_size=len(self.token_emb.weight))
        q = logits_now.softmax(-1)
        target = F.pad(q, (0, logits.size(2) - self.codes))                             # (B, L, vocab_size)
        loss = masked_cross_entropy(logits, target, mask)
        return loss, {"masked": loss}

    def nested_masks(self, ids, index=None, gap=None, mask_noise=None):
        """Masks of this step and of an earlier one, which contains or equals it: bool (B, L) each; and how
        many tokens are visible: int."""
        mask_noise = torch.rand(ids.shape, device=ids.device) if mask_noise is None else mask_noise
        ratio, weight = nested_mask_ratios()
        if index is None:
            index = int(sample_categorical(weight, torch.rand((), dtype=torch.float64)))
        gap = int(torch.randint(1, 6, ())) if gap is None else gap
        now, earlier = (math.ceil(self.length * ratio[min(i, len(ratio) - 1)].item())
                        for i in (index, index + gap))
        rank = rank_in_row(mask_noise)
        return rank < now, rank < earlier, self.length - now

    # ---- generation

    # The loop of TokenModel. The authors also ran their ViT-L with 256 steps and schedule="linear".
    round_up = True

    def step_logits(self, state, labels=None):
        """Logits (n, L, K) from the image so far and the visible ids.

        If all tokens of all images are masked the decoder reads mask tokens only, and the encoder is skipped.
        If some are visible, as in inpainting, but there is no p_prev, it takes the predictor's logits. With a
        guide, state.logits are the guided ones, so network and guide read the same xt; without a p_prev each
        makes it with its own predictor.
        """
        ids, mask, logits_prev = state.ids, state.token_mask, state.logits
        if state.count.min() == self.length:
            latent = self.norm.weight.new_zeros(len(ids), 1 + self.length, self.norm.weight.numel())
        else:
            if logits_prev is None:
                logits_prev = self.token_predictor.logits(ids, mask)
            latent = self.encode(self.next_image(ids, mask, logits_prev))
        # Inpainted images may differ in the number of visible ids, and the decoder takes one number. So
        # in_groups(), of section 16, puts those of equal number together, and calls
        # self.decode(latent, ids, mask, number) for each number.
        return in_groups(self.length - state.count, self.decode, latent, ids, mask)

    @torch.no_grad()
    def render(self, state):
        """Decoding -> pixels (n, 3, S, S) in [0, 1]: the image so far."""
        return state.with_known(self.next_image(state.ids, state.token_mask, state.logits).clamp(0, 1))

    # ---- representation

    def features(self, x, t=0.0, layers=None, add={}, noise=None, finetune=False):
        """As MAGE's, of pixels (B, 3, S, S), or of ids (B, L), which are decoded. t is 0. Layers of the
        decoder see all ids.

        finetune  True: as the authors fine-tune, without clamp, tokenizer_norm and dropout, although trained
                  with them. S may then be another multiple of the patch size, for layers of the encoder
        """
        x = self.to_pixels(x)

        def decoder_input(latent):
            ids = self.to_ids(x)
            return self.decoder_input(latent, ids, torch.zeros_like(ids, dtype=torch.bool), self.length)
        return encoder_decoder_features(self, self.patches(x, finetune), decoder_input, layers, add)

    @torch.no_grad()
    def to_pixels(self, x):
        """Ids (B, L) -> pixels (B, 3, S, S). Pixels stay pixels."""
        if x.is_floating_point():
            return x
        return self.vqgan.decode(x.long().unflatten(1, (self.grid, self.grid)))

    def embed(self, x, noise=None, pool="mean"):
        """A vector for a linear probe: (B, C). 'mean': the encoder's normed outputs, averaged over the image;
        'class': h0, although the decoder never reads it."""
        latent = self.encode(self.to_pixels(x))                                             # (B, 1 + L, C)
        return latent[:, 0] if pool == "class" else latent[:, 1:].mean(1)

    def resized_pos_embed(self, side):
        """Position embedding of side x side patches (1, 1 + side * side, C), interpolated if training had
        another number."""
        if side == self.grid:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].mT.unflatten(2, (self.grid, self.grid))                # (1, C, h, w)
        grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).mT], 1)


# ------------------------------------------------------------------------------------------------------------
# 9. Noise
#
# A mask hides a token at once. Noise hides a pixel by degrees. At timestep t the image is a mixture
#
#     xt = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps,      eps ~ N(0, 1)                  [DDPM, eq. 4]
#
# The noise schedule alpha_bar falls from almost 1, clean, to almost 0, noise, over T timesteps. They are
# counted in two ways:
#
#     here and in ADM    t = 0 ... T-1      at 0 there is a little noise already
#     UMD                t = 0 ... T        at 0 there is none; UMD's t = 1 is t = 0 here
#
# One gets there in small steps, each of which shrinks the image a little and adds a little noise:
#
#     x_t = sqrt(1 - beta_t) x_(t-1) + sqrt(beta_t) noise         alpha_bar_t: the product of 1 - beta up to t
#
# Normal noise added up is normal noise, so all steps together are the mixture above, which is drawn at once.
#
# The network reads xt and t, and predicts eps. This is the same as predicting x0, since the mixture can be
# solved for x0. Only the errors differ, by a factor:
#
#     |x0 - x0'|^2 = (1 / alpha_bar_t - 1) |eps - eps'|^2             x0' not clamped
#
# The loss is the plain error of eps, "L_simple" [DDPM, eq. 14]. By the line above it is the error of x0 with
# the weight alpha_bar_t / (1 - alpha_bar_t), which is small where there is much noise.
#
# A step of sampling leads from xt to x_next, which is less noisy: the image at timestep t - 1, or at a
# smaller one if some are skipped. From here on alpha_bar is that of xt, and alpha_bar_next, which is
# larger, that of x_next; the last step leads to alpha_bar_next = 1, where x_next is x0'. A step
#
#     1. solves the mixture for x0', given the predicted eps, and clamps x0' to [-1, 1], where pixels lie,
#     2. solves it for eps', given this x0'; if the clamp changed nothing it is the predicted eps again,
#     3. mixes the two anew [DDIM, eq. 12 and 16]:
#
#     x_next  = sqrt(alpha_bar_next) x0' + sqrt(1 - alpha_bar_next - sigma^2) eps' + sigma noise
#     sigma^2 = eta^2 beta~
#     beta~   = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
#
# Why in steps? Many x0 fit an xt with much noise, and the best prediction x0' is their mean, which is a blur.
# A step goes only part of the way to it, and then the network is asked again.
#
# eta decides how much of the noise in x_next is fresh: for each eta the variances of the eps' part and of
# the fresh noise sum to 1 - alpha_bar_next (but for ADM's own variance, section 11). eta = 0 adds none: this
# is DDIM. eta = 1 is DDPM with the smaller of its two variances, beta~ (the proof stands before
# posterior_mean()). One pixel, in figures:
#
#     alpha_bar = 0.25, x0 = 0.8, eps = -0.4       xt = 0.5 * 0.8 + 0.866 * -0.4              =  0.0536
#     the network predicts -0.5                    x0' = (0.0536 + 0.866 * 0.5) / 0.5         =  0.9732
#     alpha_bar_next = 0.64, eta = 0               x_next = 0.8 * 0.9732 + 0.6 * -0.5         =  0.479
#
# The error of eps is 0.1, that of x0' is 0.173: sqrt(1 / 0.25 - 1) = 1.73 times as large.
#
# Inpainting takes the same steps. After each the known pixels are put back, with as much noise as x_next has,
# drawn anew each time, even at eta = 0 [RePaint, without its jumps back].
#
# In this section pixels are in [-1, 1], except the known ones of inpainting, and alpha_bar is a float64
# tensor on the CPU: (B,), () or, of several timesteps, (T,). Sampling counts its steps from noise to clean.
# Four steps of ADM, at eta = 1, skip most of 1,000 timesteps:
#
#     step of denoise()        0        1        2        3
#     t                      999      666      333        0
#     alpha_bar           .00004     .011     .319    .9999         "linear"
#     alpha_bar_next        .011     .319    .9999        1         that of the next column; at the end 1
#
# A loss has all timesteps, in the order of t. There alpha_bar_next is alpha_bar of t - 1, and 1 if t is 0.


def noise_schedule(name, steps=1000):
    """alpha_bar at timesteps 0 ... T-1: float64 (T,). "linear" betas [DDPM], or "cosine", which keeps more of
    a small image visible at middle timesteps [iDDPM, eq. 17]."""
    if name == "linear":
        beta = torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64)
        if steps <= 20:                                                 # the last would be 1 or more
            raise ValueError(f"a linear noise schedule has more than 20 timesteps, not {steps}")
    elif name == "cosine":
        t = torch.arange(steps + 1, dtype=torch.float64) / steps
        f = (((t + 0.008) / 1.008) * math.pi / 2).cos() ** 2
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"a noise schedule is 'linear' or 'cosine', not {name!r}")
    return (1 - beta).cumprod(0)


def to_normal(u):
    """Uniform numbers in (0, 1) -> standard normal ones, by inverting the distribution function."""
    return math.sqrt(2) * torch.erfinv(2 * u - 1)


def per_image(a, x):
    """Float64 numbers (B,) or (), as factors of pixels x (B, 3, S, S): of its type, on its device."""
    return to_device(a.to(x.dtype), x.device).view(-1, 1, 1, 1) if a.dim() else a.to(x.dtype)


def q_sample(x0, alpha_bar, eps):
    """xt, the mixture above."""
    return per_image(alpha_bar.sqrt(), x0) * x0 + per_image((1 - alpha_bar).sqrt(), x0) * eps


def x0_from_eps(xt, alpha_bar, eps):
    """The same equation, solved for x0."""
    return per_image(alpha_bar.rsqrt(), xt) * xt - per_image((1 / alpha_bar - 1).sqrt(), xt) * eps


def posterior_variance(alpha_bar, alpha_bar_next):
    """beta~, the variance of q(x_next | xt, x0) [DDPM, eq. 7]: float64. It is 0 where alpha_bar_next is
    1."""
    return (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next).clamp(min=0)


def ddim_step(xt, x0, alpha_bar, alpha_bar_next, eta=0.0, noise=0.0, std=None):
    """Steps 2 and 3 above, from xt and a prediction of x0 to x_next. With alpha_bar_next = 1 that is x0.

    noise  standard normal, like xt; 0 gives the mean
    std    None: the noise has the factor sigma, as above. ADM with eta = 1 (section 11) has a factor of its
           own. Only "+ sigma noise" changes: the root subtracts sigma^2 all the same
    """
    factor = functools.partial(per_image, x=xt)
    eps = (factor(alpha_bar.rsqrt()) * xt - x0) / factor((1 / alpha_bar - 1).sqrt())
    variance = eta ** 2 * posterior_variance(alpha_bar, alpha_bar_next)                     # sigma^2
    if std is None:
        std = factor(variance.sqrt())
    else:
        std = std * factor(torch.as_tensor(alpha_bar_next < 1))             # the step to x0 adds no noise
    direction = factor((1 - alpha_bar_next - variance).sqrt()) * eps
    return factor(alpha_bar_next.sqrt()) * x0 + direction + std * noise


# Why eta = 1 is DDPM (on a first reading go on to class Denoising). A step of DDPM draws x_next from the
# posterior q(x_next | xt, x0), with x0' for x0. Its variance is beta~, its mean                 [DDPM, eq. 7]
#
#     sqrt(alpha_bar / alpha_bar_next) * (1 - alpha_bar_next) / (1 - alpha_bar) * xt
#         + sqrt(alpha_bar_next) * (1 - alpha_bar / alpha_bar_next) / (1 - alpha_bar) * x0
#
# Step 3 without its noise is this mean, with x0' for x0. To see it, put
# eps' = (xt - sqrt(alpha_bar) x0') / sqrt(1 - alpha_bar) into step 3. With eta = 1 its root can be taken: let
# a = alpha_bar / alpha_bar_next. Then 1 - alpha_bar - (1 - a) = a - alpha_bar = a (1 - alpha_bar_next), and
#
#     1 - alpha_bar_next - sigma^2 = (1 - alpha_bar_next) * (1 - (1 - a) / (1 - alpha_bar))
#                                  = (1 - alpha_bar_next)^2 * a / (1 - alpha_bar)
#
# So the factor of xt is that of the first line; call it f. And the factor of x0' is that of the second:
#
#     sqrt(alpha_bar_next) - sqrt(alpha_bar) f
#         = (alpha_bar_next - alpha_bar) / (1 - alpha_bar) / sqrt(alpha_bar_next)
#         = sqrt(alpha_bar_next) * (1 - alpha_bar / alpha_bar_next) / (1 - alpha_bar)


def posterior_mean(xt, x0, alpha_bar, alpha_bar_next):
    """Mean of q(x_next | xt, x0): a step with eta = 1, before noise is added."""
    return ddim_step(xt, x0, alpha_bar, alpha_bar_next, eta=1.0)


class Denoising(typing.NamedTuple):
    """Images on the way from noise: x (n, 3, S, S), clean ones in [-1, 1]."""
    x: torch.Tensor


def denoise(predict_x0, draw_noise, alpha_bar, eta=1.0, known=None, mask=None):
    """From noise to images: yields a Denoising after each step; the last one is clean.

    predict_x0   function (x, step) -> two things: x0_hat, clamped to [-1, 1]; std, as for ddim_step
    draw_noise   function k -> draw number k of each image, standard normal (n, 3, S, S)
    alpha_bar    (steps,): that of x when each step begins, so ascending, from noise to clean
    known, mask  inpainting: pixels in [0, 1] and bool (n, S, S), True = to be generated
    """
    x = draw_noise(0)
    alpha_bar_next = F.pad(alpha_bar[1:], (0, 1), value=1.0)
    for step in range(len(alpha_bar)):
        x0_hat, std = predict_x0(x, step)
        x = ddim_step(x, x0_hat, alpha_bar[step], alpha_bar_next[step], eta, draw_noise(2 * step + 1), std)
        if known is not None:
            noised = q_sample(2 * known - 1, alpha_bar_next[step], draw_noise(2 * step + 2))
            x = torch.where(mask[:, None], x, noised)
        yield Denoising(x)


def timestep_embedding(t, dim, denominator, layout):
    """Timesteps t (B,) as waves of many lengths, which a network can read: (B, dim), float32.

    Sines and cosines of t 10000^(-j / denominator), j = 0 ... dim / 2 - 1. In UMD the denominator is
    dim / 2 - 1 and the layout "sin cos", in ADM dim / 2 and "cos sin"."""
    j = torch.arange(dim // 2, dtype=torch.float32, device=t.device)                        # (dim / 2,)
    w = (-math.log(10000) / denominator * j).exp()
    phase = t.float()[:, None] * w                                                          # (B, dim / 2)
    return torch.cat([phase.sin(), phase.cos()] if layout == "sin cos" else [phase.cos(), phase.sin()], 1)


# ------------------------------------------------------------------------------------------------------------
# 10. UMD, MAE, MaskDiT, DiT: predict masked patches, or the noise, or both
#
# A token is now a patch of pixels. UMD trains one network on two tasks. To fill in masked patches, as MAE
# does, it must learn the large structure of images. To remove noise, as DDPM does, it must learn every scale
# of detail. A batch of B images has two parts:
#
#     the first N, noised     t uniform in 1 ... T; the ratio r_noised of the patches is masked
#         L_x0    = mean over masked pixels of (x0 - x0')^2
#         L_eps   = mean over visible pixels of (eps - eps')^2
#     the other B - N, clean  t = 0; the ratio r_clean of the patches is masked
#         L_clean = mean over masked pixels of (x0 - x0')^2                                              [MAE]
#
#     (In both parts: with mask ratio 0, as in DiT, each term is a mean over all pixels.)
#
#     loss = (N / B) (L_x0 + L_eps) / 2  +  ((B - N) / B) L_clean                            [UMD, section 3]
#                    two terms, so half of each: a noised image counts as much as a clean one
#
# The network predicts x0 and eps for every patch. At visible patches eps counts. At masked ones x0 counts:
# nothing there tells which noise was drawn, but the rest of the image tells what the patch may show.
#
#     noised part            1    _    3    4    _    6    _    8     3 of 8 patches are masked
#     encode   s s s s      h1        h3   h4        h6        h8     4 class tokens and the visible patches
#     decode      s'        h1    m   h3   h4    m   h6    m   h8     s': mean of the 4, m: mask token
#     loss                 eps   x0  eps  eps   x0  eps   x0  eps     both are predicted for every patch
#
#     clean part             1    _    _    _    _    6    _    _     6 of 8 patches are masked
#     loss                   -   x0   x0   x0   x0    -   x0   x0
#
#     With 64 patches and B = 16: 8 noised images of 4 + 40 tokens and 8 clean ones of 4 + 16 enter the
#     encoder, and 1 + 64 tokens of each the decoder.
#
# The 4 class tokens are learned vectors, whose outputs summarise the image. They start equal and have no
# positions, so they stay equal: in effect one token with four times the weight in attention. The authors'
# code has them, so they are kept.
#
# Every block is told the timestep t. For clean images t = 0 and alpha_bar_0 = 1, so q_sample returns x0. T is
# 1,000, and the noise schedule is the cosine. Three numbers make four methods of this:
#
#              clean_ratio   mask_ratio_clean   mask_ratio_noised   loss
#              (B - N) / B       r_clean            r_noised
#     UMD          0.5             0.75              0.375          (L_x0 + L_eps) / 4 + L_clean / 2
#     MAE          1               0.75                -            L_clean
#     MaskDiT      0                -                 0.5           (L_x0 + L_eps) / 2
#     DiT          0                -                  0            (L_x0 + L_eps) / 2, over all pixels
#                                                                   (-: not used)
#
# In generation from noise nothing is masked, though in training something mostly is: attention takes any
# number of tokens. Only the prediction of eps is used, as in DDPM. MAE cannot start from noise; it inpaints
# with its prediction of x0.
#
# Labels. Only the noised part is told its labels, as in the official code. One label in ten is hidden, for
# guidance, which works as in MAGE, but with the same w in every step:
#
#     eps = eps(no label) + w (eps(label) - eps(no label))
#
# As a rule a model is trained without labels first, and then trained on with them. In this second training
# r_noised is 0, and 5 % of the images are clean, so as not to forget them (none, if the first had none).
#
# MAE and DiT in this table are UMD's versions. The published ones are other networks, whose weights do not
# fit. The published MAE has fixed positions, a narrow decoder, and targets normalised patch by patch. The
# published DiT reads latents, has no decoder, and predicts no x0, but the noise and a variance.


def zero_init(module):
    """The layer with weights 0. As the last one of a branch it makes a block start as its shortcut alone."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class ConditionedBlock(Block):
    """A Block that is told a condition c, which stands for timestep and label (adaLN-Zero [DiT, 3.2]): x
    (B, L, C), c (B, C) -> (B, L, C). A linear layer turns c into six vectors, three for each half:

        x = x + gate1 * attention(LayerNorm(x) * (1 + scale1) + shift1)
        x = x + gate2 *       MLP(LayerNorm(x) * (1 + scale2) + shift2)

    This layer starts at 0. So the gates are 0, and a fresh block passes x on unchanged. (Unlike in DiT, the
    norms have weights of their own.)"""

    def __init__(self, dim, heads):
        super().__init__(dim, heads, gelu="tanh")
        self.modulation = zero_init(nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        modulation = self.modulation(c)[:, None].chunk(6, -1)                               # 6 x (B, 1, C)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


def masked_mse(prediction, target, mask):
    """Mean squared error, both (B, 3, S, S), over the pixels where mask (B, 1, S, S) is True."""
    return ((prediction - target).square() * mask).sum() / (3 * mask.sum())


class UMD(Model):
    """Unified masked diffusion (official files: models/ae.py, trainers/train_ae.py of small-vision, in JAX).

    image_size, grid                            S, and patches on a side, which divide S, else ValueError
    width, depth, heads, decoder_depth          encoder and decoder have the same width and heads
    clean_ratio, mask_ratio_clean, mask_ratio_noised        the three numbers of the table above
    classes                                     0, or the number of labels it can be conditioned on
    class_tokens                                how many it has in its encoder

    The timestep t is 0 for clean images, and 1 ... T for noised ones.
    """

    takes_labels = True
    pools, stem = ("class", "mean"), ("patch_embed", "pos_embed", "cls_token")

    def __init__(self, image_size, grid, width, depth, heads, decoder_depth, clean_ratio, mask_ratio_clean,
                 mask_ratio_noised, classes=0, class_tokens=4):
        super().__init__()
        if image_size % grid:
            raise ValueError(f"image size {image_size} is not a multiple of the grid, {grid}")
        ratios = clean_ratio, mask_ratio_clean, mask_ratio_noised
        if class_tokens < 1:
            raise ValueError(f"class_tokens is 1 or more, not {class_tokens}")
        if not all(0 <= r <= 1 for r in ratios) or int(grid ** 2 * (1 - max(ratios[1:]))) < 1:
            raise ValueError("clean_ratio lies in [0, 1], mask ratios in [0, 1), and leave a patch visible; "
                             f"not {', '.join(map(str, ratios))}")
        self.image_size, self.grid, self.length, self.classes = image_size, grid, grid ** 2, classes
        self.clean_ratio = clean_ratio
        self.mask_ratio_clean, self.mask_ratio_noised = mask_ratio_clean, mask_ratio_noised
        self.alpha_bar = torch.cat([torch.ones(1).double(), noise_schedule("cosine")])  # (1 + T,)
        patch = image_size // grid
        self.time_embed = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        if classes:
            self.label_embed = nn.Sequential(nn.Embedding(classes + 1, width), nn.Linear(width, 2 * width),
                                             nn.SiLU(), nn.Linear(2 * width, width))
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.pos_embed = nn.Parameter(torch.randn(1, self.length, width) / self.length ** 0.5)
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, self.length, width) / self.length ** 0.5)
        self.cls_token = nn.Parameter(torch.zeros(1, class_tokens, width))
        # Frozen if nothing is ever masked: several GPUs would wait for its gradient.
        masks = bool(clean_ratio and mask_ratio_clean) or mask_ratio_noised > 0
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width), requires_grad=masks)
        self.blocks = nn.ModuleList(ConditionedBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_blocks = nn.ModuleList(ConditionedBlock(width, heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_modulation = zero_init(nn.Linear(width, 2 * width))
        self.to_pixels = nn.ConvTranspose2d(width, 6, patch, patch)
        self.initialise()
        self.best_layer = depth                                 # the encoder's last
        self.layers = dict.fromkeys(range(1, depth + decoder_depth + 1), (width, grid, grid))
        # As in the official code: a network that never saw a clean image reads slightly noised ones.
        self.best_t = 0 if clean_ratio else 51
        self.generates, self.reconstructs = clean_ratio < 1, mask_ratio_clean > 0
        self.max_steps = len(self.alpha_bar) - 1                                            # T
        self.t_range = (0, self.max_steps, "the timestep, 0 for no noise")

    # ---- training

    def forward(self, x, labels=None, *, n_clean=None, t=None, noise=None, mask_noise=None, keep_label=None):
        """Loss of one batch.

        x           pixels (B, 3, S, S) in [0, 1]
        labels      int (B,) in [0, classes), or None; the clean part does not see them
        n_clean     how many images, the last ones, stay clean: B - N; int(B * clean_ratio) if None
        t, noise    int (N,) in 1 ... T and eps (N, 3, S, S)
        mask_noise  (B, L): the smallest are masked        keep_label  bool (N,): False hides the label. All
                    drawn if None
        returns     scalar loss, dict of its terms
        """
        x0, B = 2 * x - 1, len(x)
        N = B - (int(B * self.clean_ratio) if n_clean is None else n_clean)
        t = torch.randint(1, len(self.alpha_bar), (N,)) if t is None else t.cpu()
        noise = torch.randn_like(x0[:N]) if noise is None else noise
        mask_noise = torch.rand(B, self.length, device=x.device) if mask_noise is None else mask_noise
        loss, logs = 0, {}
        if N:
            labels = None if labels is None else labels[:N]
            logs["x0"], logs["eps"] = self.losses(x0[:N], t, noise, mask_noise[:N], self.mask_ratio_noised,
                                                  labels, keep_label)
            loss = N / B * (logs["x0"] + logs["eps"]) / 2
        if N < B:
            zeros = torch.zeros_like(x0[N:])
            logs["x0_clean"], _ = self.losses(x0[N:], t.new_zeros(B - N), zeros, mask_noise[N:],
                                              self.mask_ratio_clean)
            loss = loss + (B - N) / B * logs["x0_clean"]
        return loss, logs

    def losses(self, x0, t, eps, mask_noise, mask_ratio, labels=None, keep_label=None):
        """L_x0, over masked pixels, and L_eps, over visible ones; both over all pixels if nothing is
        masked."""
        ids_keep = self.visible_patches(mask_noise, mask_ratio) if mask_ratio else None     # (B, M)
        x0_hat, eps_hat = self.predict(q_sample(x0, self.alpha_bar[t], eps), t, labels, ids_keep, keep_label)
        if not mask_ratio:
            return F.mse_loss(x0_hat, x0), F.mse_loss(eps_hat, eps)
        mask = self.pixel_mask(ids_keep)                                                    # (B, 1, S, S)
        return masked_mse(x0_hat, x0, mask), masked_mse(eps_hat, eps, ~mask)

    def visible_patches(self, mask_noise, mask_ratio):
        """Positions of the patches that enter the encoder, ids_keep: int (B, M), in any order. Those with the
        smallest mask_noise do not enter. M is rounded down: of 49 patches 12 enter at ratio 0.75."""
        return mask_noise.argsort(dim=1, stable=True)[:, self.length - int(self.length * (1 - mask_ratio)):]

    def pixel_mask(self, ids_keep):
        """Visible patches, int (B, M) -> bool (B, 1, S, S), True = masked."""
        mask = torch.ones(len(ids_keep), self.length, dtype=torch.bool, device=ids_keep.device)
        mask = mask.scatter(1, ids_keep, False).view(-1, 1, self.grid, self.grid)           # (B, 1, h, w)
        patch = self.image_size // self.grid
        return mask.repeat_interleave(patch, 2).repeat_interleave(patch, 3)

    def predict(self, x, t, labels=None, ids_keep=None, keep_label=None):
        """Pixels (B, 3, S, S) in about [-1, 1], noised to t (B,) -> predictions of x0 and eps,
        (B, 3, S, S) each.

        ids_keep            int (B, M): the patches that the network sees, all if None
        labels, keep_label  as for forward
        """
        c = self.condition(to_device(t, x.device), labels, keep_label)                      # (B, C)
        return self.decode(self.encode(x, c, ids_keep), c, ids_keep)

    def condition(self, t, labels=None, keep_label=None):
        """Timestep (B,) and labels -> c of the blocks (B, C). In training one label in ten is hidden, for
        classifier-free guidance."""
        width = self.norm.weight.numel()
        c = self.time_embed(timestep_embedding(t, width, width / 2 - 1, "sin cos").to(self.norm.weight.dtype))
        if self.classes:
            if labels is not None and keep_label is None:
                keep_label = torch.rand(labels.shape, device=t.device) >= (0.1 if self.training else 0.0)
            label = no_label = torch.full_like(t, self.classes)
            if labels is not None:
                label = torch.where(keep_label, labels, no_label)
            c = c + self.label_embed(label)
        return F.silu(c)

    def encode(self, x, c, ids_keep=None):
        """Pixels (B, 3, S, S) -> latent: class tokens, then the visible patches (B, k + M, C)."""
        x = self.patches(x)                                                                 # (B, L, C)
        x = x if ids_keep is None else gather_tokens(x, ids_keep)                           # (B, M, C)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x, c)
        return self.norm(x)

    def patches(self, x):
        """Pixels (B, 3, S, S) -> embedded patches with their positions (B, L, C)."""
        return self.patch_embed(x).flatten(2).mT + self.pos_embed

    def decode(self, latent, c, ids_keep=None):
        """Latent (B, k + M, C) -> predictions of x0 and eps, (B, 3, S, S) each."""
        x = self.decoder_input(latent, ids_keep)                                            # (B, 1 + L, C)
        for block in self.decoder_blocks:
            x = block(x, c)
        shift, scale = self.decoder_modulation(c)[:, None].chunk(2, -1)                     # (B, 1, C) each
        x = self.decoder_norm(x)[:, 1:] * (1 + scale) + shift                               # (B, L, C)
        x = x.mT.unflatten(2, (self.grid, self.grid))                                       # (B, C, h, w)
        return in_float32(self.to_pixels, x).chunk(2, 1)

    def decoder_input(self, latent, ids_keep=None):
        """The mean of the class tokens, then all patches: visible ones at their places, the mask token at the
        others (B, 1 + L, C)."""
        k = self.cls_token.size(1)
        summary, x = latent[:, :k].mean(1, keepdim=True), latent[:, k:]
        if ids_keep is not None:
            x = scatter_tokens(self.mask_token.to(x.dtype).expand(len(x), self.length, -1), ids_keep, x)
        return torch.cat([summary, x + self.decoder_pos_embed], 1)

    # ---- generation

    def guided(self, x, t, labels=None, guidance=1.0, guide=None):
        """predict() with guidance. A guide's prediction takes the place of the one without a label."""
        if guidance == 1 or labels is None and guide is None:
            return self.predict(x, t, labels)
        reference = self.predict(x, t) if guide is None else guide.predict(x, t, labels)
        wanted = self.predict(x, t, labels)
        return tuple(other + guidance * (own - other) for own, other in zip(wanted, reference))

    def num_steps(self, steps=None, eta=None):
        """One for each of timesteps(). MAE: 1."""
        return len(self.timesteps(steps)) if self.generates else 1

    def timesteps(self, steps=None):
        """From T down in strides of T / steps, rounded up, and then 1. None is 125 strides, as published:
        1000, 992, ... 8, 1. So steps = 4 gives five timesteps, 1000, 750, 500, 250 and 1, and 300 gives
        251."""
        return [*range(self.max_steps, 1, -math.ceil(self.max_steps / (steps or 125))), 1]

    @torch.no_grad()
    def sample_steps(self, n, steps=None, eta=1.0, guidance=1.0, labels=None, known=None, mask=None,
                     seeds=None, guidance_interval=(0.0, 1.0), guide=None):
        """From noise to images: yields a Denoising after each step. The prediction of eps is what is used.

        n, steps      images; see num_steps
        eta           1 as published: DDPM; 0: DDIM, which adds no noise on the way
        labels, guidance, known, mask, seeds, guide    as for TokenModel.sample_steps, but guidance does not
                      grow
        guidance_interval    (low, high): a step at timestep t is guided if low <= 1 - t / T < high

        A model that saw clean images only (MAE) cannot start from nothing. It inpaints, in one step.
        """
        if not self.generates:
            yield self.inpaint(known, mask)
            return
        t = self.timesteps(steps)

        def predict_x0(x, step):
            w = guidance_at(1 - t[step] / self.max_steps, guidance, guidance_interval)
            _, eps_hat = self.guided(x, torch.full((n,), t[step], device=x.device), labels, w, guide)
            return x0_from_eps(x, self.alpha_bar[t[step]], eps_hat).clamp(-1, 1), None
        seeds = image_seeds(seeds, n, self.device)
        draw_noise = functools.partial(self.noise, seeds)       # number k of each image: (n, 3, S, S)
        yield from denoise(predict_x0, draw_noise, self.alpha_bar[t], eta, known, mask)

    def inpaint(self, known, mask):
        """As MAE does: patches that contain pixels to be generated are masked,
        and predicted at once from the others."""
        masked = F.max_pool2d(mask[:, None].float(), self.image_size // self.grid).flatten(1).int()  # (n, L)
        visible_first, num_visible = masked.argsort(stable=True, dim=1), (1 - masked).sum(1).cpu()
        x = 2 * known - 1

        def predict(x, visible_first, count):                           # images with as many visible patches
            t = torch.zeros(len(x), dtype=torch.long, device=x.device)
            return self.predict(x, t, ids_keep=visible_first[:, :count])[0]
        x0_hat = in_groups(num_visible, predict, x, visible_first)
        return Denoising(torch.where(mask[:, None], x0_hat.clamp(-1, 1), x))

    @torch.no_grad()
    def reconstruct(self, x, mask_noise=None):
        """Pixels (B, 3, S, S) -> the same with r_clean of the patches masked, and with the predictions there,
        as the authors of MAE show them."""
        mask_noise = torch.rand(len(x), self.length, device=x.device) if mask_noise is None else mask_noise
        ids_keep = self.visible_patches(mask_noise, self.mask_ratio_clean)
        mask, t = self.pixel_mask(ids_keep), torch.zeros(len(x), dtype=torch.long, device=x.device)
        prediction = (self.predict(2 * x - 1, t, ids_keep=ids_keep)[0] + 1) / 2
        return torch.where(mask, 0.2, x), torch.where(mask, prediction.clamp(0, 1), x)

    # ---- representation

    def noised(self, x, t, noise=None):
        """Pixels (B, 3, S, S) in [0, 1] -> xt at timestep t, and the condition (B, C). noise: eps."""
        xt = q_sample(2 * x - 1, self.alpha_bar[int(t)], torch.randn_like(x) if noise is None else noise)
        return xt, self.condition(torch.full((len(x),), int(t), device=x.device))

    def features(self, x, t=0, layers=None, add={}, noise=None, finetune=False):
        """Outputs of blocks as feature maps; as MAGE.features, with a timestep t, and noise (B, 3, S, S)."""
        x, c = self.noised(x, t, noise)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patches(x)], 1)          # (B, k + L, C)
        k = self.cls_token.size(1)
        return encoder_decoder_features(self, x, self.decoder_input, layers, add, prefix=k, condition=(c,))

    def embed(self, x, noise=None, pool="class"):
        """The vector that the paper probes: (B, C). 'class': the mean of the normed class tokens; 'mean': as
        MAGE's. At timestep best_t."""
        if pool == "mean":
            mean = self.features(x, self.best_t, noise=noise)[0].mean((2, 3))               # (B, C)
            return F.layer_norm(mean, mean.shape[1:], eps=1e-6)
        return self.encode(*self.noised(x, self.best_t, noise))[:, :self.cls_token.size(1)].mean(1)

    @torch.no_grad()
    def initialise(self):
        """The authors' initialisation: Xavier-uniform matrices (q, k and v one by one); LeCun-normal
        embeddings of patches, timestep and label; normal output and, almost zero, biases of MLPs."""
        for block in (*self.blocks, *self.decoder_blocks):
            attn, mlp = block.attn, block.mlp
            for weight in (*attn.qkv.weight.chunk(3), attn.proj.weight, mlp.fc1.weight, mlp.fc2.weight):
                nn.init.xavier_uniform_(weight)
            for bias in (attn.qkv.bias, attn.proj.bias):
                nn.init.zeros_(bias)
            for bias in (mlp.fc1.bias, mlp.fc2.bias):
                nn.init.normal_(bias, std=1e-6)
        for layer in (self.patch_embed, *self.time_embed, *(self.label_embed if self.classes else ())):
            if isinstance(layer, nn.Embedding):
                nn.init.normal_(layer.weight, std=layer.embedding_dim ** -0.5)
            elif not isinstance(layer, nn.SiLU):
                # 0.8796: std of a standard normal truncated at +-2.
                std = layer.weight[0].numel() ** -0.5 / 0.8796
                nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.to_pixels.weight, std=0.02)
        nn.init.zeros_(self.to_pixels.bias)

    # ---- for train.py

    def micro_batch_args(self, first, count):
        """How many images of this part of a batch stay clean, so that the ratio is right in the whole."""
        return {"n_clean": int((first + count) * self.clean_ratio) - int(first * self.clean_ratio)}


# ------------------------------------------------------------------------------------------------------------
# 11. ADM: predict the noise with a U-Net
#
#     loss = mean (eps - eps'(xt, t))^2 + L_vb          t uniform in 0 ... T-1                 [iDDPM, eq. 16]
#
# The network reads the noised image xt and predicts the noise; the first term is that of section 9. (It has a
# second output, v, which decides how much noise a step of sampling adds with eta = 1, and which L_vb trains.
# Both are explained after class ADMBlock.)
#
# The network is a U-Net of residual blocks, with attention on small maps. The side is halved on the way down
# and doubled on the way up. The output of each block on the way down is kept, and its mirror, the block as
# far from the other end, reads it, too:
#
#     size "tiny", 32 pixels: ch=16, ch_mult=(1, 2, 4), blocks=1, attention=(4,)
#     block                              1   2   3   4   5   6   7   8   9  10  11  12  13
#     side of its output                32  32  16  16   8   8   8   8  16  16  32  32  32
#     channels                          16  16  16  32  32  64  64  64  64  32  32  16  16
#     also reads the output of block                                 6   5   4   3   2   1
#
# Blocks 3 and 5 halve the side; 9 and 11 end by doubling it; 6 to 9 have attention. Every residual block is
# told the timestep.
#
# The frozen network is a representation, too [DiffSSL]. The best features come from blocks soon after the
# middle, of an image with a little noise. (Official files: unet.py, gaussian_diffusion.py, nn.py.)


class ADMResBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, inp, h, w), emb (B, 4 ch) -> (B, out, h', w').

    emb scales and shifts every channel between the convolutions. resize, a layer that halves or doubles the
    side, acts before the first convolution and on the shortcut. Official name: ResBlock.
    """

    def __init__(self, inp, out, emb, groups, dropout, resize=None):
        super().__init__()
        self.resize = resize or nn.Identity()
        self.in_layers = nn.Sequential(nn.GroupNorm(groups, inp), nn.SiLU(),
                                       nn.Conv2d(inp, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * out))
        self.out_layers = nn.Sequential(nn.GroupNorm(groups, out), nn.SiLU(), nn.Dropout(dropout),
                                        zero_init(nn.Conv2d(out, out, 3, padding=1)))
        self.skip_connection = nn.Identity() if inp == out else nn.Conv2d(inp, out, 1)

    def forward(self, x, emb):
        norm, silu, conv = self.in_layers
        h = conv(self.resize(silu(norm(x))))                                                # (B, out, h', w')
        scale, shift = self.emb_layers(emb)[..., None, None].chunk(2, 1)                # (B, out, 1, 1) each
        h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        return self.skip_connection(self.resize(x)) + h


class ADMAttention(nn.Module):
    """Self-attention over a map, without positions: (B, C, h, w) -> (B, C, h, w). Official name:
    AttentionBlock.

    head, heads  width of a head, or their number
    order        of the 3 C channels: "legacy": q, k, v of the first head, of the second, ...; "new":
                 q of all heads, k, v
    """

    def __init__(self, dim, head, groups, heads=None, order="legacy"):
        super().__init__()
        if (heads or head) < 1 or dim % (heads or head):
            raise ValueError(f"width {dim} is no multiple of {heads or head}, see --adm-heads")
        self.heads, self.order = heads or dim // head, order
        self.norm = nn.GroupNorm(groups, dim)
        self.qkv, self.proj_out = nn.Conv1d(dim, 3 * dim, 1), zero_init(nn.Conv1d(dim, dim, 1))

    def forward(self, x):
        # The 1x1 convolutions are computed as linear layers: a convolution's output is in no order that fused
        # kernels take.
        qkv = F.linear(self.norm(x).flatten(2).mT, self.qkv.weight[..., 0], self.qkv.bias)  # (B, L, 3C)
        if self.order == "legacy":
            q, k, v = qkv.unflatten(2, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)      # 3 x (B, heads, L, d)
        else:
            q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)              # (B, L, C)
        return x + F.linear(y, self.proj_out.weight[..., 0], self.proj_out.bias).mT.view(x.shape)


class ADMBlock(nn.Sequential):
    """The layers of one block; residual blocks read the timestep's embedding: (B, C, h, w), (B, 4 ch) ->
    (B, C_out, h', w')."""

    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ADMResBlock) else layer(x)
        return x


# The variance. How much noise should a step of sampling add? With a thousand steps that hardly matters, with
# few it does. So ADM predicts the variance s^2 of each step, too. The best one depends on the images, and
# lies between those of two extremes [DDPM, 3.2]. (The one that is predicted may miss it, and lie beyond.)
#
#     beta~ = (1 - alpha_bar_next) / (1 - alpha_bar) * beta          if x0 were known (section 9)
#     beta  = 1 - alpha_bar / alpha_bar_next                         if all that is known were x0 ~ N(0, 1)
#
# (In the second case x_next and xt are N(0, 1), too. Their correlation is the root of alpha_bar /
# alpha_bar_next, and the variance of one, given the other, is 1 minus its square.)
#
# The second output v, one for each pixel and channel, goes from one to the other on a logarithmic scale:
# v = -1 gives beta~, v = 1 gives beta. Nothing clamps v, though training tends to keep s^2 between the two.
#
#     log s^2   = (1 + v) / 2 log beta + (1 - v) / 2 log beta~                                [iDDPM, eq. 15]
#
#     alpha_bar = 0.25, alpha_bar_next = 0.64     beta = 0.609, beta~ = 0.293; v = 0 gives s^2 = 0.422, their
#                                                 geometric mean
#
# A step of sampling is that of section 9, and v changes one thing in it: with eta = 1 the fresh noise has the
# factor s instead of sigma = sqrt(beta~). The mean does not change, and so beta~ stays in its root:
#
#     x_next    = sqrt(alpha_bar_next) x0' + sqrt(1 - alpha_bar_next - beta~) eps' + s noise
#                 the last step, which leads to x0, adds no noise
#
#     eta        timesteps, unless told otherwise        sigma^2 in root     noise is added as
#     1          250 of 1,000, evenly spaced             beta~               s noise
#     between    the same                                eta^2 beta~         eta sqrt(beta~) noise, not s
#     0          25 in whole strides: 0, 40, ... 960     0                   none: v is not used
#                (pure noise is taken for t = 960, too)
#
# As alpha_bar_next is that of the next timestep visited, beta and beta~ fit the stride.


def log_variances(alpha_bar):
    """log beta~ and log beta: alpha_bar float64 (T,) in the order of t, clean first -> (T,) each. When
    sampling skips timesteps, alpha_bar is that of the visited ones. At t = 0 beta~ is 0, so its logarithm is
    replaced by that of t = 1 (if T = 1, of beta). That matters to L_vb alone, as the step from t = 0 to x0
    adds no noise."""
    alpha_bar_next = F.pad(alpha_bar[:-1], (1, 0), value=1.0)                           # that of t - 1
    beta_tilde, beta = posterior_variance(alpha_bar, alpha_bar_next), 1 - alpha_bar / alpha_bar_next
    first = beta_tilde[1:2] if len(beta) > 1 else beta
    return torch.cat([first, beta_tilde[1:]]).log(), beta.log()


def learned_log_variance(v, t, alpha_bar):
    """log s^2 as above: v (B, 3, S, S) at timesteps t of the process alpha_bar (T,) -> like v."""
    log_beta_tilde, log_beta = (per_image(bound[t], v) for bound in log_variances(alpha_bar))
    return (1 + v) / 2 * log_beta + (1 - v) / 2 * log_beta_tilde


# The loss of v. L_vb is a term of the variational bound. It compares two normal distributions of x_next. q
# knows the true x0. p has the prediction x0' instead, and the variance s^2:
#
#     q(x_next | xt, x0) = N( mean(xt, x0), beta~ )
#     p(x_next | xt)     = N( mean(xt, x0'), s^2 )                          x0' from sg(eps')
#
# mean(xt, x0) is the step of section 9 with eta = 1, without noise: posterior_mean(). In L_vb x0' is not
# clamped, in sampling it is. In bits, and averaged over pixels and channels:
#
#     L_vb = KL(q || p) / ln 2           in all steps but the last                               [DDPM, eq. 5]
#            KL = (log(s^2 / beta~) - 1 + beta~ / s^2 + (difference of the means)^2 / s^2) / 2
#                 with the figures above, and equal means: (0.367 - 1 + 0.693) / 2 = 0.030, or 0.043 bits
#     L_vb = - log P(x0 | xt) / ln 2     in the last, to x0. As x0 is a byte, P is the probability, under p,
#                                        of half a grey level around it on either side
#
# L_vb is to train v, not eps', so eps' is detached in the mean of p. (Both terms move the layers that v and
# eps' share.) The paper adds 0.001 times the sum of L_vb over all timesteps. For T = 1000 this is their mean,
# and one random t estimates a mean, so here the weight is 1, for any T, as in the official code by default.


def discretised_nll(x, mean, log_std):
    """-log of the probability, in nats, of the byte that x in [-1, 1] stands for, under a normal
    distribution. The first and the last byte get all that lies beyond. Elementwise. The cdf is approximated
    by tanh, as in the official losses.py."""
    def cdf(z):
        return 0.5 * (1 + (math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3)).tanh())
    below, above = (cdf((x - mean + side / 255) * (-log_std).exp()) for side in (-1, 1))
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return -mass.clamp(min=1e-12).log()


def hybrid_loss(out, x0, xt, eps, t, alpha_bar):
    """Both terms of the loss for each image: squared error of eps, and L_vb in bits. (B,) each.

    out  (B, 6, S, S): predictions of eps, and v        x0, xt, eps  (B, 3, S, S), x0 in [-1, 1]
    t    int (B,), on the CPU: timesteps of the process alpha_bar (T,)
    """
    eps_hat, v = out.chunk(2, 1)
    now, after = alpha_bar[t], F.pad(alpha_bar, (1, 0), value=1.0)[t]   # of t; of t - 1, where the step leads
    q_mean = posterior_mean(xt, x0, now, after)
    p_mean = posterior_mean(xt, x0_from_eps(xt, now, eps_hat.detach()), now, after)
    log_var = learned_log_variance(v, t, alpha_bar)
    log_beta_tilde = per_image(log_variances(alpha_bar)[0][t], v)
    kl = 0.5 * (log_var - log_beta_tilde - 1 + (log_beta_tilde - log_var).exp()
                + (q_mean - p_mean) ** 2 * (-log_var).exp())
    nll = discretised_nll(x0, p_mean, 0.5 * log_var)
    to_x0 = to_device(t == 0, x0.device).view(-1, 1, 1, 1)                              # the last step
    nats = torch.where(to_x0, nll, kl).mean((1, 2, 3))                                      # (B,)
    return (eps - eps_hat).square().mean((1, 2, 3)), nats / math.log(2)


def spaced_timesteps(steps, counts):
    """A shorter process, ascending: spaced_timesteps(1000, [4]) is [0, 333, 666, 999]. With several counts
    the timesteps 0 ... steps - 1 are cut into as many equal sections, of which each gets its own count.
    ValueError if a section has fewer timesteps. (Official file: respace.py.)"""
    kept, start = [], 0
    for i, count in enumerate(counts):
        size = steps // len(counts) + (i < steps % len(counts))
        if count > size:
            raise ValueError(f"{count} steps do not fit into a section of {size}")
        stride, at = (size - 1) / max(1, count - 1), 0.0
        for _ in range(count):
            kept.append(start + round(at))
            at += stride                          # added up as in the official code, so that ties round alike
        start += size
    return kept


def strided_timesteps(steps, count):
    """The same with one whole stride from 0 on, as DDIM was evaluated: strided_timesteps(1000, 4) is
    [0, 250, 500, 750]. If no stride gives this count the next smaller one is taken: 250 for 300. ('ddimN' in
    respace.py, which refuses such counts.)"""
    return list(range(0, steps, -(-steps // count)))


class ADM(Model):
    """Diffusion U-Net without labels.

    image_size           S; a multiple of 2 ** (len(ch_mult) - 1), else ValueError
    ch, ch_mult, blocks  level i has ch * ch_mult[i] channels; blocks per level, one more on the way up
    attention            strides of the maps that get attention: (8, 16) for maps of S / 8 and S / 16. The
                         middle has it always
    head, heads, order   see ADMAttention        groups  of every group norm; divides every width
    schedule, steps      of the noise, see noise_schedule        dropout  in residual blocks

    Blocks are counted from 1: down, middle, up. The output of a block is what all its layers made, attention
    and change of size included.
    """

    def __init__(self, image_size, ch, ch_mult, blocks, attention, head=64, dropout=0.0, groups=32,
                 schedule="linear", steps=1000, heads=None, order="legacy"):
        super().__init__()
        if image_size < 1 or image_size % 2 ** (len(ch_mult) - 1):
            raise ValueError(f"image size {image_size} cannot be halved {len(ch_mult) - 1} times")
        self.image_size, self.stride, self.layers = image_size, 2 ** (len(ch_mult) - 1), {}
        self.alpha_bar = noise_schedule(schedule, steps)                                    # (T,)
        self.max_steps = steps
        # [DiffSSL] reads at 90 of 1000.
        self.t_range, self.best_t = (0, steps - 1, "the timestep"), round(0.09 * steps)
        self.time_embed = nn.Sequential(nn.Linear(ch, 4 * ch), nn.SiLU(), nn.Linear(4 * ch, 4 * ch))
        widths = [int(ch * m) for m in ch_mult]

        def residual(inp, out, resize=None):
            return ADMResBlock(inp, out, 4 * ch, groups, dropout, resize)

        def attend(width, level):
            return [ADMAttention(width, head, groups, heads, order)] if 2 ** level in attention else []
        width, bottom = widths[0], len(widths) - 1
        # Down: blocks 1 to 6 of the table. skips: (channels, level) of each block's output, which a block on
        # the way up will read; in the table (16, 0) (16, 0) (16, 1) (32, 1) (32, 2) (64, 2).
        downs, skips = [ADMBlock(nn.Conv2d(3, width, 3, padding=1))], [(width, 0)]
        for level, out in enumerate(widths):
            if level:
                downs.append(ADMBlock(residual(width, width, nn.AvgPool2d(2))))
                skips.append((width, level))
            for _ in range(blocks):
                downs.append(ADMBlock(residual(width, out), *attend(out, level)))
                skips.append((out, level))
                width = out
        self.input_blocks = nn.ModuleList(downs)
        self.middle_block = ADMBlock(residual(width, width), ADMAttention(width, head, groups, heads, order),
                                     residual(width, width))
        # Up: blocks 8 to 13, which take the skips from the end. Each level has blocks + 1 of them, one for
        # each output that the way down has left at this size: those of its blocks, and that of what came
        # before them, the block that halved the side or the first convolution. Below full size the last one
        # ends in a residual block that doubles the side.
        outputs, ups = [*skips, (width, bottom)], []            # outputs: (channels, level) of all blocks
        for level, out in reversed([*enumerate(widths)]):
            for j in range(blocks + 1):
                double = level > 0 and j == blocks
                resize = [residual(out, out, nn.Upsample(scale_factor=2.0))] if double else []
                skip, _ = skips.pop()
                ups.append(ADMBlock(residual(width + skip, out), *attend(out, level), *resize))
                outputs.append((out, level - 1 if double else level))
                width = out
        self.output_blocks = nn.ModuleList(ups)
        self.layers = {b: (c, image_size >> level, image_size >> level)
                       for b, (c, level) in enumerate(outputs, 1)}
        self.best_layer = min(len(downs) + 2 + 2 * blocks, len(self.layers))            # [DiffSSL]: 24 of 37
        self.out = nn.Sequential(nn.GroupNorm(groups, width), nn.SiLU(),
                                 zero_init(nn.Conv2d(width, 6, 3, padding=1)))
        self.to(memory_format=torch.channels_last)                          # up to twice as fast, on CPUs too

    @property
    def blocks(self):
        """All blocks in the order in which they run."""
        return [*self.input_blocks, self.middle_block, *self.output_blocks]

    def predict(self, x, t, layers=None, add={}):
        """Noised pixels x (B, 3, S, S) and timesteps t int (B,) -> (B, 6, S, S): predictions of eps, and v.

        layers  with them: [map (B, C, h, w) for each of layers] instead,
                and blocks after the last of them do not run
        add     {layer: map} added to the output of that layer, before anything reads it
        """
        ch = self.time_embed[0].in_features
        emb = timestep_embedding(to_device(t, x.device), ch, ch // 2, "cos sin")            # (B, ch)
        emb = self.time_embed(emb.to(x.dtype))                                              # (B, 4 ch)
        skips, maps = [], {}
        for b, block in enumerate(self.blocks, 1):
            if b > len(self.input_blocks) + 1:
                x = torch.cat([x, skips.pop()], 1)
            x = block(x, emb)                                                           # (B, *self.layers[b])
            if b in add:
                x = x + add[b]
            if b <= len(self.input_blocks):
                skips.append(x)
            if layers and b in layers:
                maps[b] = x
                if b == max(layers):
                    return [maps[b] for b in layers]
        return in_float32(self.out, x)

    def noised(self, x, t, noise=None):
        """Pixels (B, 3, S, S) in [0, 1] and timesteps int (B,) -> x0 in [-1, 1], xt, eps. noise is eps,
        drawn if None."""
        eps = torch.randn_like(x) if noise is None else noise
        return 2 * x - 1, q_sample(2 * x - 1, self.alpha_bar[t], eps), eps

    # ---- training

    def forward(self, x, labels=None, *, t=None, noise=None):
        """Loss of one batch: pixels (B, 3, S, S) in [0, 1] -> scalar, dict of its terms. t int (B,) and noise
        like x, drawn if None."""
        t = torch.randint(len(self.alpha_bar), (len(x),)) if t is None else t.cpu()
        x0, xt, eps = self.noised(x, t, noise)
        mse, vb = hybrid_loss(self.predict(xt, t), x0, xt, eps, t, self.alpha_bar)          # (B,) each
        return (mse + vb).mean(), {"mse": mse.mean(), "vb": vb.mean()}

    # ---- generation

    def num_steps(self, steps=None, eta=None):
        """250 as published; 25, evenly strided, at eta = 0; at most T."""
        return len(self.timesteps(steps, 1.0 if eta is None else eta))

    def timesteps(self, steps, eta):
        """The timesteps of sampling, ascending: evenly spaced or, at eta = 0, in whole strides."""
        steps = min(steps or (250 if eta else 25), self.max_steps)
        return spaced_timesteps(self.max_steps, [steps]) if eta else strided_timesteps(self.max_steps, steps)

    @torch.no_grad()
    def sample_steps(self, n, steps=None, eta=1.0, known=None, mask=None, seeds=None, guidance=1.0,
                     guidance_interval=(0.0, 1.0), guide=None):
        """From noise to images on a shortened process: yields a Denoising after each step.

        n, steps      images; see num_steps
        eta           1: ancestral sampling [DDPM, algorithm 2]; the fresh noise has the factor s, the learned
                      one. Less: DDIM; it has the factor eta sqrt(beta~), and v is not used
        known, mask, seeds        as for TokenModel.sample_steps
        guide, guidance   None, or a weaker ADM: eps = eps(guide) + w (eps - eps(guide)), with the same w in
                          each step. The variance is not guided
        guidance_interval       (low, high): a step at timestep t is guided if low <= 1 - (t + 1) / T < high,
                          where T - 1 is all noise
        """
        kept = self.timesteps(steps, eta)
        alpha_bar = self.alpha_bar[kept]

        def predict_x0(x, step):
            i = len(kept) - 1 - step                            # the timestep of the shortened process
            t = torch.full((n,), kept[i], device=x.device)
            eps_hat, v = self.predict(x, t).chunk(2, 1)
            w = guidance_at(1 - (kept[i] + 1) / self.max_steps, guidance, guidance_interval)
            if guide and w != 1:
                reference, _ = guide.predict(x, t).chunk(2, 1)
                eps_hat = reference + w * (eps_hat - reference)
            std = (0.5 * learned_log_variance(v, i, alpha_bar)).exp() if eta == 1 else None
            return x0_from_eps(x, alpha_bar[i], eps_hat).clamp(-1, 1), std
        draw_noise = functools.partial(self.noise, image_seeds(seeds, n, self.device))
        yield from denoise(predict_x0, draw_noise, alpha_bar.flip(0), eta, known, mask)

    # ---- representation

    def features(self, x, t=0, layers=None, add={}, noise=None, finetune=False):
        """Outputs of blocks as feature maps; as MAGE.features, with a timestep t, int or int (B,), and noise
        like x."""
        t = torch.as_tensor(t).cpu().long().expand(len(x))
        return self.predict(self.noised(x, t, noise)[1], t, layers or [self.best_layer], add)

    def embed(self, x, noise=None, pool="mean"):
        """What probes read unless told otherwise: (B, C), the map of best_layer at timestep best_t, averaged
        over the image. (The paper's best probe averages over its quarters.)"""
        return self.features(x, self.best_t, noise=noise)[0].mean((2, 3))


# ------------------------------------------------------------------------------------------------------------
# 12. Side by side
#
# Results. What `python unified.py METHOD` (section 6) shows: accuracy of a linear probe on the embeddings,
# before -> after the training of the method; mage's tokenizer is trained in both. For "before" layers that
# start at 0 (UMD's gates, ADM's last convolutions) are drawn at random, or only shortcuts would act. Compare
# before with after, not one row with another, since batches differ, and addp needs a trained mage.
#
#     method   minutes   batch        40 labels        1,000 labels     64 samples, shapes.png
#     mage     2         64           42.0 -> 64.1 %   88.3 -> 93.4 %   most are shapes, in two colours
#     addp     3         16           31.0 -> 46.8 %   78.3 -> 81.4 %   shapes of the same colours, rounder
#     umd      2         16           42.9 -> 50.3 %   80.3 -> 86.8 %   flat colours: it needs longer training
#     adm      3         16           32.5 -> 39.6 %   70.7 -> 83.4 %   blobs with sharp edges, in all colours
#
# At scale the papers report, of ViT-B (ADM: a U-Net) and ImageNet at 256 pixels, and FID (the distance of
# samples from images: lower is better) without labels:
#
#              linear probe    fine-tuned    FID
#     MAGE     74.7 %          82.5 %        11.1
#     MAGE-C   77.1 %                                  in shorter trainings, in which MAGE has 73.3 %
#     Sorcen   75.1 %                         9.6      of which MAGE-E is a simple form
#     ADDP     low             83.9 %         8.9      "low": its reviewers; its README has no figure
#     ADM      64.9 %                        26.2      probe by [DiffSSL]: block 24, 2 x 2 cells
#
# And UMD's authors at 64 pixels, with 100 labels a class for the probe, and FID after further training with
# labels and noise, which lets MAE generate, too. These three are to be compared with one another alone:
#
#     UMD      31.8 %                        19.8
#     its MAE  36.6 %                        26.8
#     its DiT  25.6 %                        18.9
#
# So MAGE has features and images from one loss. ADDP improves its images, and its features once they are
# fine-tuned. UMD lies between all masks, which give better features, and all noise, which gives slightly
# better images.
#
# What an embedding is, and so what such a probe reads, differs:
#
#     MAGE     the encoder's last block, nothing masked: the mean over tokens, normalised
#     ADDP     the encoder's output, of the image itself: the mean over patches
#     UMD      the encoder's class tokens, at t = 0, or 51 if no clean image was seen in training
#     ADM      block 10 of 13 at t = 90 (24 of 37 in the published size): the mean over the map
#
# Inpainting differs, too, in what is done and in what is approximate about it:
#
#     MAGE, ADDP    Unknown pixels are set to 0, and the image is tokenised. Tokens with an unknown pixel, and
#                   their neighbours, are masked (section 5, initial_state), and decoded in the usual steps.
#                   render() pastes the known pixels over what it shows. MAGE takes labels and a guide, ADDP
#                   a guide alone. In step 1 ADDP has no p_prev, and MAGE's serves.
#                   Approximate: what is known is read as ids (in ADDP's xt, too, it is decoded from ids), so
#                   without what the tokenizer loses. Known pixels in masked tokens are hardly read; a seam
#                   may show where they are pasted. Ids far from the hole seldom change by it. ADDP
#                   shows the token that stays masked as its mean (section 8).
#     UMD, ADM      All pixels start as noise. After each step the known ones are put back, with as much noise
#                   as x_next has (section 9, denoise). No patch is masked. The steps are those of generation:
#                   UMD takes labels and a guide, ADM a guide alone, and its own variance at eta = 1.
#                   Approximate: a step changes both parts so that they fit each other, but the change of the
#                   known part is then overwritten. [RePaint] goes back and repeats steps, so that they fit.
#     MAE           Patches with an unknown pixel are masked, and predicted in one step; known pixels in them
#                   are kept (section 10, inpaint).
#                   Approximate: these pixels are not read, and a seam may show; one step gives a mean.
#
# DifFeed, a head in probe.py for any of these models, feeds late blocks, which know more of the image, back
# to early ones. It runs the frozen network twice, at the t of the probe, with the same noise or mask:
#
#     block     1   2   3   4   5   6   7   8   9  10  11  12  13     ADM in size "tiny"
#                   ^       ^       ^       |       |       |
#                   |       |       '-------'       |       |        f_8, f_10 and f_12 of pass 1 are added
#                   |       '-----------------------'       |        to the outputs of 6, 4 and 2 in pass 2,
#                   '---------------------------------------'        as ReLU(norm(conv(f_b)))
#
#     late = [12, 10, 8]
#     f    = model.features(x, t, late, noise=noise)
#     add  = {model.mirror(b): relu(norm_b(conv_b(f_b))) for b, f_b in zip(late, f)}
#     maps = model.features(x, t, [model.best_layer], add=add, noise=noise)       # of 10, for the head
#
# The mirror is the block as far from the other end: number of blocks + 1 - b. In transformers encoder and
# decoder are counted through. What is added to its output is there before anything reads that. conv_b is 1x1,
# to the channels of the mirror, and norm_b a batch norm. They and the head learn, by the gradient through
# pass 2; the network's weights stay. (With --layers the head reads others than best_layer.)
#
# Which b, by default?
#
#     ADM            leave out the final block, whose mirror, 1, is a mere convolution. Of the others behind
#                    the middle whose maps are as large as their mirrors', take the last of each size
#
#                        block of "tiny"           8    9   10   11   12   13
#                        side of its map           8   16   16   32   32   32
#                        its mirror                6    5    4    3    2    1
#                        side of that one's map    8    8   16   16   32   32
#                        taken                     *         *         *
#
#     transformers   all blocks whose mirror comes before them, but the last: 4 and 5 of 4 + 2 blocks, whose
#                    mirrors are 3 and 2; the head reads 4, best_layer
#
# The head itself is a small transformer, whose tokens are the cells of all maps that it reads.


# Feature maps. features() of MAGE, ADDP and UMD does not call encode() and decode(). It runs the blocks with
# these two functions, which keep the outputs that are wanted, add DifFeed's maps, and stop after the last
# layer that is wanted. No token is dropped, and no label given. (Tests hold both passes equal.)


def run_blocks(x, blocks, layers, add, patches, condition=(), first=1):
    """Run transformer blocks, none beyond the last of layers -> output (B, ., C), {layer: map (B, C, h, w)}.

    x          tokens (B, ., C); x[:, patches], patches a slice, are the image's, row by row
    layers     numbers of the blocks whose outputs are wanted; the first block has the number first
    add        {layer: map (B, C, h, w)} added to the output of that layer
    condition  further arguments of the blocks
    """
    side, maps = math.isqrt(patches.stop - patches.start), {}
    for b, block in enumerate(blocks[:max(layers) - first + 1], first):
        x = block(x, *condition)
        if b in add:
            more = add[b].flatten(2).mT                                                     # (B, h * w, C)
            x = torch.cat([x[:, :patches.start], x[:, patches] + more, x[:, patches.stop:]], 1)
        if b in layers:
            maps[b] = x[:, patches].mT.unflatten(2, (side, side))                           # (B, C, h, w)
    return x, maps


def encoder_decoder_features(model, x, decoder_input, layers, add, prefix=1, condition=()):
    """features() of a model with blocks and decoder_blocks -> [map (B, C, h, w) for each of layers].

    x              tokens (B, prefix + L, C), the input of the first block, prefix class tokens first
    condition      further arguments of all blocks
    decoder_input  normed encoder output -> tokens (B, 1 + L ..., C'), the input of the first decoder block
    """
    layers, L = layers or [model.best_layer], x.size(1) - prefix
    x, maps = run_blocks(x, model.blocks, layers, add, slice(prefix, prefix + L), condition)
    if max(layers) > len(model.blocks):
        x = decoder_input(model.norm(x))
        first = len(model.blocks) + 1
        _, more = run_blocks(x, model.decoder_blocks, layers, add, slice(1, 1 + L), condition, first)
        maps = {**maps, **more}
    return [maps[b] for b in layers]


# ------------------------------------------------------------------------------------------------------------
# 13. A method of your own
#
# A method that is new takes a class and a row in MODELS. The class is a Model, such as Denoiser below, or a
# TokenModel, such as MaskGIT below that. It must have
#
#     image_size, layers, best_layer      set in __init__: S; {layer: (channels, h, w)} of all blocks, counted
#                                         from 1; the layer that probes read if not told otherwise
#     t_range                             if features() takes a t other than 0: the least and the largest, and
#                                         what t is
#     forward(x, labels=None)             images (B, 3, S, S) -> scalar loss, {name: scalar} of its terms and
#                                         of what else is to be logged. If there is a term called masked, it
#                                         is charted in place of the loss
#     sample_steps(n, steps=None, seeds=None)             yields a Denoising after each step, as many as
#                                         num_steps(steps) says (10 unless you define it, too), without
#                                         gradient. Image i follows from seeds[i]: image_seeds() makes (n,) of
#                                         seeds, noise() draws from them
#     features(x, t=0, layers=None, add={}, noise=None, finetune=False)
#                                         -> [map (B, C, h, w) for each of layers]. add, {layer: map}, is
#                                         added to the output of that layer; finetune may be ignored.
#                                         Heads and fine-tuning need its gradient
#     embed(x, noise=None, pool="mean")   -> a vector for each image, (B, C), as probes are to read it: they
#                                         do not normalise it
#
# All else that Denoiser sets, such as stem, is optional; what follows on this section lists it.


class Denoiser(Model):
    """Diffusion transformer at its smallest: it reads patches of the noised image, to each of which the
    timestep is added, and predicts the noise. (UMD has more: masks, a decoder, class tokens, labels.)

    image_size, grid        S, and patches on a side        width, depth, heads    of the transformer
    """

    stem = ("patch_embed", "pos_embed")                         # before the blocks; for fine-tuning

    def __init__(self, image_size, grid, width=128, depth=4, heads=4):
        super().__init__()
        self.image_size, self.length, patch = image_size, grid ** 2, image_size // grid
        self.alpha_bar = noise_schedule("cosine")                                           # (T,)
        self.max_steps = len(self.alpha_bar)                                                # T
        self.t_range = (0, self.max_steps - 1, "the timestep")                          # t of features()
        self.best_t = 50                                        # that of embed(), else 0
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, self.length, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.to_pixels = nn.ConvTranspose2d(width, 3, patch, patch)
        self.best_layer, self.layers = depth, {b: (width, grid, grid) for b in range(1, depth + 1)}

    def maps(self, xt, t, layers, add={}):
        """Noised pixels xt (B, 3, S, S), timesteps t int (B,) -> [map (B, C, h, w) for each of layers]."""
        width = self.pos_embed.size(2)
        time = timestep_embedding(to_device(t, xt.device), width, width // 2, "cos sin")        # (B, C)
        x = self.patch_embed(xt).flatten(2).mT + self.pos_embed + time[:, None].to(xt.dtype)    # (B, L, C)
        _, maps = run_blocks(x, self.blocks, layers, add, slice(0, self.length))           # of section 12
        return [maps[b] for b in layers]

    def predict(self, xt, t):
        """Noised pixels (B, 3, S, S), timesteps int (B,) -> the noise in them, (B, 3, S, S)."""
        return in_float32(self.to_pixels, self.maps(xt, t, [len(self.blocks)])[0])

    def forward(self, x, labels=None, *, t=None, noise=None):
        t = torch.randint(self.max_steps, (len(x),)) if t is None else t.cpu()
        noise = torch.randn_like(x) if noise is None else noise
        loss = F.mse_loss(self.predict(q_sample(2 * x - 1, self.alpha_bar[t], noise), t), noise)
        return loss, {"mse": loss}

    def num_steps(self, steps=None, eta=None):
        return min(steps or 100, self.max_steps)

    @torch.no_grad()
    def sample_steps(self, n, steps=None, eta=1.0, known=None, mask=None, seeds=None):
        t = spaced_timesteps(self.max_steps, [self.num_steps(steps)])[::-1]             # from noise to clean
        alpha_bar, seeds = self.alpha_bar[t], image_seeds(seeds, n, self.device)

        def predict_x0(x, step):
            eps_hat = self.predict(x, torch.full((n,), t[step]))
            return x0_from_eps(x, alpha_bar[step], eps_hat).clamp(-1, 1), None
        yield from denoise(predict_x0, functools.partial(self.noise, seeds), alpha_bar, eta, known, mask)

    def features(self, x, t=0, layers=None, add={}, noise=None, finetune=False):
        noise = torch.randn_like(x) if noise is None else noise
        t = torch.full((len(x),), int(t))
        return self.maps(q_sample(2 * x - 1, self.alpha_bar[t], noise), t, layers or [self.best_layer], add)

    def embed(self, x, noise=None, pool="mean"):
        return self.features(x, self.best_t, noise=noise)[0].mean((2, 3))                   # (B, C)


# A method that predicts ids is a TokenModel, of section 5, which brings sample_steps() with it and asks for
# self.vqgan, step_logits() and render() instead; the other duties are the same. This is MaskGIT's network,
# without labels and with MAGE's mask ratios: one transformer, which reads [MASK] at every masked place.
#
#     class MaskGIT(TokenModel):
#         render = MAGE.render
#         pools, reads_ids = ("mean",), True          # embed() has no "class"; ids are all that it reads
#
#         def __init__(self, vqgan, image_size, width=128, depth=4, heads=4):
#             super().__init__(vqgan, image_size)                             # sets codes, length and grid
#             self.token_emb = TokenEmbedding(self.codes + 1, self.length, width, dropout=0.0)
#             self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
#             self.head, self.vqgan = nn.Linear(width, self.codes), vqgan.requires_grad_(False)
#             self.best_layer = depth
#             self.layers = {b: (width, self.grid, self.grid) for b in range(1, depth + 1)}
#
#         def maps(self, ids, mask, layers, add={}):
#             x = self.token_emb(ids.masked_fill(mask, self.codes))               # (B, L, C); codes is [MASK]
#             _, maps = run_blocks(x, self.blocks, layers, add, slice(0, self.length))
#             return [maps[b] for b in layers]                                    # (B, C, h, w) each
#
#         def step_logits(self, state, labels=None):
#             x, = self.maps(state.ids, state.token_mask, [len(self.blocks)])
#             return in_float32(self.head, x.flatten(2).mT)                       # (n, L, K)
#
#         def forward(self, x, labels=None, *, mask_noise=None):
#             ids = self.to_ids(x)                                                # (B, L)
#             mask_noise = torch.rand(ids.shape, device=ids.device) if mask_noise is None else mask_noise
#             mask, _ = random_masking(mask_noise, truncated_normal(torch.rand(())))
#             loss = masked_cross_entropy(self.step_logits(Decoding(ids, mask, None)), ids, mask)
#             return loss, {"masked": loss}
#
#         def features(self, x, t=0, layers=None, add={}, noise=None, finetune=False):
#             ids = self.to_ids(x)
#             return self.maps(ids, torch.zeros_like(ids).bool(), layers or [self.best_layer], add)
#
#         def embed(self, x, noise=None, pool="mean"):
#             return self.features(x)[0].mean((2, 3))                             # (B, C)
#
#     MODELS["maskgit"] = Method(MaskGIT, {"tiny": {}}, MAGE_RECIPE)


# The row. Put the class into this file, and its row below MODELS, of section 14, since --model is made of
# what stands there when the scripts begin. (To try the commands below, put Denoiser's row there.)
#
#     MODELS["denoiser"] = Method(Denoiser, {"tiny": {}}, UMD_RECIPE, tokens="patches")
#
# Its fields are the class; sizes, {size: arguments of the constructor}; a recipe, which says how it is
# trained (learning rate, batch size, steps and the like: for a start UMD_RECIPE, or MAGE_RECIPE if it
# predicts ids); and tokens, which says with what the constructor is called, before the arguments of the size:
#
#     "ids"      vqgan, image_size=...                the default. With predictor="mage" in the row, as in
#                                                     ADDP: a trained mage in place of vqgan
#     "patches"  image_size=..., grid=...             patches on a side
#     "none"     image_size=...
#
# Then the scripts know it, and so do the tests of what every method has in common:
#
#     python train.py --model denoiser
#     python sample.py out/shapes-denoiser
#     python probe.py out/shapes-denoiser
#     python -m pytest -q -k denoiser
#
# Often a change of a method is enough. This trains MAGE with three quarters of the tokens masked (to generate
# it would need ratios up to 1). It, too, goes below MODELS:
#
#     class MAGE75(MAGE):
#         def forward(self, x, labels=None, *, mask_ratio=0.75, **draws):
#             return super().forward(x, labels, mask_ratio=mask_ratio, **draws)
#     MODELS["mage-75"] = Method(MAGE75, MAGE_SIZES, MAGE_RECIPE)
#
# Where ids are predicted, another number of tokens a step, or another order of decoding, needs no class: both
# are arguments of sample(). (On the command line they have names. --schedule takes those in SCHEDULES, of
# section 4; --order those in ORDERS, in sample.py: functions of the grid's side and the seeds that return an
# order.)
#
#     model.sample(16, steps=4, schedule=lambda t, T: 1 - (t / T) ** 2)      # ratio that stays masked after t
#     model.sample(16, steps=4, schedule=[12, 8, 4, 1])                      # or how many do, of 16 tokens
#     # (by such ratios MAGE decides one token in each step at least; ADDP, or a list, may decide none)
#
#     def row_by_row(confidence, mask, t):                        # (n, L), bool (n, L), 1 ... T
#         return -torch.arange(confidence.size(1)).expand_as(confidence)
#     model.sample(16, order=row_by_row)                          # tokens of the highest priority are kept
#     # (it ignores confidence, and with that the Gumbel noise, so the temperature does nothing)
#
#     def far_apart(confidence, mask, t):                         # first those without a decided neighbour
#         decided = (~mask).float().unflatten(1, (model.grid, model.grid))                    # (n, h, w)
#         near = F.max_pool2d(decided, 3, 1, 1).flatten(1)                                    # (n, L), 1 or 0
#         return confidence - 1000 * near
#     model.sample(16, order=far_apart)
#
# mask is that before the step, so two neighbours may be kept in one step. (At very high temperatures
# confidence may differ by more than 1000; rank_in_row(confidence) - model.length * near is right at any.)


# The tutorial ends here; the rest is to look things up in. First, what a method may have besides. Scripts
# skip what it lacks, and refuse a flag that asks for it.
#
#     options of sample_steps()           found by their names in its signature: temperature, schedule, order
#                                         as in TokenModel, eta as in UMD; guidance, guidance_interval, guide,
#                                         labels, known and mask as in both
#     render(state)                       if x of its states is not in [-1, 1]
#     num_steps(steps=None, eta=None)     if 10 steps are not usual
#     noise(seeds)                        if what features() takes as noise is not like x; with draw=0, too,
#                                         if denoise() uses it
#     reconstruct(x)                      images (B, 3, S, S) -> tuple of images like x, to look at; then
#                                         reconstructs = True
#     after_step()                        called after each step of the optimizer
#     micro_batch_args(first, count)      dict: what forward() gets besides, with images first ... first +
#                                         count - 1 of a batch that does not fit into memory at once
#     mirror(layer)                       which block DifFeed feeds back to
#
#     attribute           what it says; class Model has the defaults
#     length              number of tokens; of patches, too
#     codes               entries of the codebook, if ids are predicted
#     classes             labels that this model is conditioned on
#     takes_labels        the class can be built with classes > 0, and sample_steps() takes labels, guidance
#                         and guidance_interval. Parameters that only such a model has are called
#                         label_embed, and --init skips them
#     alpha_bar           the noise schedule; denoise() takes that of the visited timesteps. Without one write
#                         a loop of your own
#     max_steps           sample.py takes no more sampling steps than these
#     generates           it can start from nothing; if not sample_steps() takes known, mask
#     best_t              the t of features() at which best_layer is probed; probe.py --sweep finds both
#     t_range             least t, the cleanest, largest t, and what t is; if the largest is an int, only ints
#                         are taken. t may be an int anyway, such as 0. --sweep reads the first half
#     pools               poolings that embed() knows, the authors' first
#     reads_ids           given ids instead of pixels, training and probing lose nothing. In ADDP they do:
#                         decoded ids are not the original image
#     reconstructs        it has reconstruct()
#     stem                names of what layer decay counts as before `blocks`, and --init-encoder copies with
#                         them (and with time_embed, if blocks read one); in fine-tuning only these are in
#                         training mode
#     dynamic_blocks      blocks whose number of tokens differs from call to call
#     finetuning          learning rate for 256 images, layer decay, fraction of warm-up: for a ViT-B, and for
#                         a ViT-L, whose best_layer is 24 or more
#
# Further:
#
# - A TokenModel takes ids for x as well. It inherits sample_steps(), num_steps(), noise() and reconstruct().
#   Its pools are "mean" and "class", unless it says otherwise. It sets self.vqgan after self.apply(), which
#   would initialise that anew, too.
# - To be fine-tuned, or to lend its encoder to --init-encoder, it calls its transformer blocks `blocks`, and
#   names in stem what comes before them.
# - Two views of an image, views=2 in its row, are for subclasses of ContrastiveMAGE: x is (B, 2, 3, S, S) or
#   (B, 2, L), and one view in evaluations.
# - A subclass of UMD inherits micro_batch_args(), which passes n_clean to forward(). The names device and
#   tokenizer are taken, by Model.
# - A size's `width`, if it has one, is that of a token. Where a patch has more values than this, train.py
#   says that samples will stay noisy. A network that does not predict noise has another word for it, such as
#   `dim`.
# - Pixels stay float32 under autocast, by in_float32(). The tests run a model in float64, too, so what is
#   float32, such as timestep_embedding(), is cast to the weights' type. They also change torch's default
#   type, so torch.full((n,), t) with a float t needs dtype=x.dtype. A float t of forward() has that, too.
# - features() has one t for all images. If forward() has one for each, (B,), both share a function, as
#   UMD.predict().
# - steps may be any number from 1 on. The samples that train.py draws on the way take 20.
# - The help of --steps in sample.py, and of --ids, --batch-size, --steps and --lr in train.py, names defaults
#   of methods. Add yours.
# - sample_steps() sends what it computes on the CPU to the device by to_device(), and reads nothing back, so
#   that a GPU never waits.
# - An argument with a name known from above, such as labels or mask_noise, is checked before the method runs
#   (FORMS, in section 16, has all). If yours means something else give it another name. That pixels lie in
#   [0, 1] is checked if FORMS has a line for the class, as "UMD.x".
# - guidance_interval: the tests take the progress of step i to be about (i - 1) / steps.


# ------------------------------------------------------------------------------------------------------------
# 14. Sizes and recipes
#
# A model is a name and a dict of plain numbers, the arguments of its constructor. A
# checkpoint stores that dict, and build() turns it back into a model. A row of MODELS tells how to make it
# and how to train it. These are the numbers of `train.py --model umd` on shapes, and where each comes from:
#
#     image_size=32, grid=8                                   train.py: the data set, and the recipe's 64
#                                                             tokens, `ids`
#     width=128, depth=4, heads=4, decoder_depth=2            sizes, UMD_SIZES["tiny"]; in other methods also
#                                                             dropout and, of ADM, the noise schedule
#     clean_ratio=0.5, mask_ratio_clean=0.75,                 options, the same in all sizes
#     mask_ratio_noised=0.375
#     AdamW, batch_size=32, steps=3000, lr=0.018, ...         recipe, UMD_RECIPE
#
# Base and large are the papers' sizes; ADM's base is the network for 256 pixels, its small as large as
# DDPM's for 32. Tiny and toy are ours, for a CPU.

TOKENIZERS = {
    # Enough for drawn shapes.
    "toy":   dict(codebook_dim=16, ch=16, ch_mult=(1, 1, 1, 1, 1), blocks=1, groups=1),
    "tiny":  dict(codebook_dim=16, ch=32, ch_mult=(1, 1, 1, 1, 1), blocks=1, groups=1),
    "small": dict(codebook_dim=32, ch=64, ch_mult=(1, 1, 2, 2, 4), blocks=2, groups=8),
    "base":  dict(codebook_dim=256, ch=128, ch_mult=(1, 1, 2, 2, 4), blocks=2),
}
TOKENIZERS["large"] = TOKENIZERS["base"]

MAGE_SIZES = {
    "tiny":  dict(width=128, depth=4, heads=4, decoder_width=128, decoder_depth=2, decoder_heads=4,
                  dropout=0.0),
    "small": dict(width=384, depth=12, heads=6, decoder_width=384, decoder_depth=4, decoder_heads=6),
    "base":  dict(width=768, depth=12, heads=12, decoder_width=768, decoder_depth=8, decoder_heads=16),
    "large": dict(width=1024, depth=24, heads=16, decoder_width=1024, decoder_depth=8, decoder_heads=16),
}
ADDP_SIZES = {size: {k: v for k, v in args.items() if k != "decoder_width"}                 # it has one width
              for size, args in MAGE_SIZES.items()}

UMD_SIZES = {
    "tiny":  dict(width=128, depth=4, heads=4, decoder_depth=2),
    "small": dict(width=384, depth=12, heads=6, decoder_depth=4),
    "base":  dict(width=768, depth=12, heads=12, decoder_depth=4),
    "large": dict(width=1024, depth=24, heads=16, decoder_depth=8),
}

ADM_SIZES = {
    "tiny":  dict(ch=16, ch_mult=(1, 2, 4), blocks=1, attention=(4,), head=32, groups=4, schedule="cosine"),
    "small": dict(ch=128, ch_mult=(1, 2, 2, 2), blocks=2, attention=(2,), dropout=0.1, schedule="cosine"),
    "base":  dict(ch=256, ch_mult=(1, 1, 2, 2, 4, 4), blocks=2, attention=(8, 16, 32)),
}
ADM_SIZES["large"] = ADM_SIZES["base"]


def mae_no_decay(name, p):
    """Parameters without weight decay, as in the published MAE: all vectors."""
    return p.dim() <= 1 or name.endswith(".bias")


def umd_no_decay(name, p):
    """The same in UMD's code: all biases, and class and mask tokens; weights of norms decay."""
    return name.endswith("bias") or name in ("cls_token", "mask_token")


# How each is trained:
#
#     betas, weight_decay    of AdamW
#     no_decay               function (name, parameter) -> True for those without weight decay
#     grad_clip              max norm of the gradient
#     warmup                 fraction of the steps in which the learning rate rises to its peak
#     min_lr                 final learning rate / peak, at the end of half a cosine
#     min_crop               a random crop keeps at least this ratio of the image's area
#     ema, probe_ema         decay of the averaged weights, 0 for none; less in the first steps, or a short
#                            run would average its start; whether probes read them, too
#     paper                  the papers' epochs, batch_size and lr on ImageNet, for sizes base and large
#     tiny                   batch_size, steps, lr and ids for size tiny, where they differ from the table
#                            below
#     optimizer              if not AdamW: function ({name: parameter}, recipe) -> optimizer, as adamw() in
#                            train.py. Its groups all get the schedule's learning rate, so give `tiny` and
#                            `paper` an lr that suits it, and tell it in the help of --lr (a test knows that
#                            of mage). --resume wants the same class and groups, and brings its other numbers
#                            back as they were saved. Not fused, it makes a GPU wait; fused, it must bear that
#                            its first step is skipped, which torch's SGD does not. With --labels --init a
#                            row's tune_recipe counts, in which UMD's four have AdamW. The function stands in
#                            this file. Keys of your own are allowed in a recipe
#
# train.py has its own values for sizes tiny and small; those in `tiny` come before them:
#
#                 shapes    CIFAR-10, folders
#     batch_size  64        64
#     steps       3000      4000
#     lr          0.006     0.006
#     ids         16        64                  tokens of an image: ids, or patches
#
# An lr is for batches of 256, and train.py makes peak = lr * batch_size / 256 of it. So UMD in size tiny
# has a peak of 0.018 * 32 / 256 = 0.00225, with lr and batch_size from UMD_RECIPE["tiny"]. (0.018 is ours.
# It is far more than the paper's 1.5e-4, but for a network of a ninetieth of base's parameters, and a run
# of a few minutes.)
#
# The MAGEs share MAGE_RECIPE; ADDP_RECIPE and, in train.py, the tokenizer's recipe are made from it. To
# change one method, give its row a dict of its own: dict(MAGE_RECIPE, weight_decay=0.1), say.

MAGE_RECIPE = dict(
    betas=(0.9, 0.95), weight_decay=0.05, no_decay=mae_no_decay, grad_clip=3.0, warmup=0.025, min_lr=0.0,
    min_crop=0.2, ema=0.0, probe_ema=False, paper=dict(epochs=1600, batch_size=4096, lr=1.5e-4), tiny={})
ADDP_RECIPE = dict(MAGE_RECIPE, paper=dict(epochs=1600, batch_size=4096, lr=1e-4))
UMD_RECIPE = dict(
    betas=(0.9, 0.95), weight_decay=0.05, no_decay=umd_no_decay, grad_clip=1.0, warmup=0.05, min_lr=0.0,
    min_crop=0.8, ema=0.9999, probe_ema=False, paper=dict(epochs=800, batch_size=1024, lr=1.5e-4),
    tiny=dict(ids=64, batch_size=32, steps=3000, lr=0.018))
MAE_RECIPE = dict(UMD_RECIPE, ema=0.0, paper=dict(epochs=800, batch_size=4096, lr=1.5e-4))
TUNE_RECIPE = dict(UMD_RECIPE, betas=(0.9, 0.999), weight_decay=0.0, min_crop=0.95,
                   paper=dict(epochs=50, batch_size=256, lr=1.5e-4))
ADM_RECIPE = dict(
    betas=(0.9, 0.999), weight_decay=0.0, no_decay=mae_no_decay, grad_clip=math.inf, warmup=0.0, min_lr=1.0,
    min_crop=0.8, ema=0.9999, probe_ema=True, paper=dict(epochs=396, batch_size=256, lr=1e-4),
    tiny=dict(batch_size=32, steps=2000))


class Method(typing.NamedTuple):
    """A row of MODELS."""
    model: type
    sizes: dict                         # {"tiny": constructor arguments, ...}, at least one
    recipe: dict                        # with all the keys above but optimizer, which it may have
    options: dict = {}                  # constructor arguments that make it this method
    # What its tokens are, and so how its constructor is called, before sizes and options: "ids": (vqgan or
    # predictor, image_size=...); "patches" of pixels: (image_size=..., grid=...); "none": (image_size=...).
    tokens: str = "ids"
    predictor: str = ""                 # the row of the trained model that takes vqgan's place
    views: int = 1                      # crops of an image that one step reads
    tune: dict = {}              # options that change when a trained model learns to be conditioned on labels
    tune_recipe: dict = {}              # recipe then, if another

    @property
    def tokenizer(self):
        """Whether it needs a tokenizer."""
        return self.tokens == "ids"


def umd_method(clean_ratio, mask_ratio_clean, mask_ratio_noised):
    """UMD with these three numbers. Learning labels, it sees noised images whole, and a few clean ones, so as
    not to forget them."""
    options = dict(clean_ratio=clean_ratio, mask_ratio_clean=mask_ratio_clean,
                   mask_ratio_noised=mask_ratio_noised)
    tune = dict(clean_ratio=0.05 if clean_ratio else 0.0, mask_ratio_noised=0.0)
    return Method(UMD, UMD_SIZES, UMD_RECIPE if clean_ratio < 1 else MAE_RECIPE, options, tokens="patches",
                  tune=tune, tune_recipe=TUNE_RECIPE)


MODELS = {
    "mage":    Method(MAGE, MAGE_SIZES, MAGE_RECIPE),
    "mage-c":  Method(ContrastiveMAGE, MAGE_SIZES, MAGE_RECIPE, {"contrastive": 0.1}, views=2),
    "mage-e":  Method(EchoMAGE, MAGE_SIZES, MAGE_RECIPE, {"contrastive": 0.1}),
    "addp":    Method(ADDP, ADDP_SIZES, ADDP_RECIPE, predictor="mage"),
    "umd":     umd_method(0.5, 0.75, 0.375),
    "mae":     umd_method(1.0, 0.75, 0.0),
    "maskdit": umd_method(0.0, 0.0, 0.5),
    "dit":     umd_method(0.0, 0.0, 0.0),
    "adm":     Method(ADM, ADM_SIZES, ADM_RECIPE, tokens="none"),
}


def tokenizer_config(size, stride, codes=1024):
    """VQGAN arguments of a preset, cut down to the levels that a stride of 2, 4, 8 or 16 needs."""
    if stride not in (2, 4, 8, 16):
        raise ValueError(f"a tokenizer's stride is 2, 4, 8 or 16, not {stride}")
    config = dict(TOKENIZERS[size], codebook_size=codes)
    config["ch_mult"] = list(config["ch_mult"][:int(math.log2(stride)) + 1])
    return config


def model_config(name, size, image_size, grid=None, tokenizer=None, classes=0, tune=False):
    """Everything build() needs, as plain values.

    grid       patches on a side, for models that read patches
    tokenizer  VQGAN arguments, for models that read ids; or the config of the predictor,
               one of the same size if not given
    classes    > 0: conditioned on labels, if the model takes them
    tune       True: starting from a trained model
    """
    method = MODELS[name]
    if method.tokens not in ("ids", "patches", "none") or size not in method.sizes:
        raise ValueError(f"the row of {name} in MODELS has no size {size}, or its tokens, {method.tokens!r}, "
                         "are none of 'ids', 'patches' and 'none'")
    if not method.predictor:
        source = {"ids": {"tokenizer": tokenizer}, "patches": {"grid": grid}, "none": {}}[method.tokens]
    elif "model" in tokenizer:
        source = {"predictor": tokenizer}
    else:
        source = {"predictor": model_config(method.predictor, size, image_size, grid, tokenizer)}
    labels = {"classes": classes} if method.model.takes_labels else {}
    return {"model": name, "image_size": image_size, **source, **labels,
            **method.sizes[size], **method.options, **(method.tune if tune else {})}


def build(config):
    """Config -> model with fresh weights. A config without 'model' is a tokenizer's."""
    if "model" not in config:
        return VQGAN(**config)
    frozen = [build(config[k]) for k in ("tokenizer", "predictor") if k in config]
    # OLD_NAMES (section 15): arguments as older checkpoints call them. complete(): see section 16.
    rest = {OLD_NAMES.get(k, k): v for k, v in config.items() if k not in ("model", "tokenizer", "predictor")}
    model = MODELS[config["model"]].model
    if not model.takes_labels and rest.pop("classes", 0):
        raise ValueError(f"{config['model']} takes no labels")
    return complete(model(*frozen, **rest))


# ------------------------------------------------------------------------------------------------------------
# 15. Published weights
#
# Files of the original authors store no config, so sizes are read off the shapes of their tensors. What
# shapes cannot tell stands in the next lines: heads of encoder and decoder by width; and what the published
# MAGE and ADDP files carry although no line of their code reads it, leftovers of MAE.

PUBLISHED_HEADS = {768: (12, 16), 1024: (16, 16)}
DEAD = ("cls_token", "pos_embed", "mask_token", "decoder_pos_embed", "patch_embed.proj.weight",
        "patch_embed.proj.bias", "decoder_pred.weight", "decoder_pred.bias", "token_emb.position_ids",
        "pos_token_embed", "pos_mask_embed")
# And what only training reads in Sorcen's, a MAGE-E.
TRAINING = ("blocks_momentum", "projector", "momentum_projector", "predictor", "classifier")


# Arguments as older checkpoints call them.
OLD_NAMES = {"clean": "clean_ratio", "hidden_clean": "mask_ratio_clean", "hidden_noised": "mask_ratio_noised"}


def sub_state(state, prefix):
    """A state dict's part whose names begin with prefix, which is cut off."""
    return {k[len(prefix):]: v for k, v in state.items() if k.startswith(prefix)}


def count_blocks(state, prefix):
    """How many blocks the state dict has under prefix."""
    return len({k.split(".")[0] for k in sub_state(state, prefix)})


def published_tokenizer(state):
    """VQGAN arguments read off a state dict with the official names (vqgan_jax_strongaug.ckpt)."""
    ch = state["encoder.conv_in.weight"].size(0)
    levels, blocks = count_blocks(state, "encoder.down."), count_blocks(state, "encoder.down.0.block.")
    widths = [state[f"encoder.down.{i}.block.0.conv1.weight"].size(0) for i in range(levels)]
    codes, dim = state["quantize.embedding.weight"].shape
    ch_mult = [width // ch for width in widths]
    return dict(codebook_size=codes, codebook_dim=dim, ch=ch, ch_mult=ch_mult, blocks=blocks)


def published_mage(state, heads=None):
    """Official MAGE state dict -> (config, the state that our MAGE loads strictly, names left out).

    heads  (encoder, decoder); by default those of the published widths, 768 and 1024
    """
    if "pos2d" in state:
        raise ValueError("it is LEASE's, whose encoder adds fixed positions for which MAGE has no place")
    tokenizer = published_tokenizer(sub_state(state, "vqgan."))
    vocab_size, width = state["token_emb.word_embeddings.weight"].shape
    positions, decoder_width = state["decoder_pos_embed_learned"].shape[1:]
    classes = vocab_size - tokenizer["codebook_size"] - 1
    if classes != 1000:                                 # else a model of ours would be read as another one
        raise ValueError(f"its vocabulary has {classes} ids for labels, not 1,000 as the authors' files; a "
                         "model of your own is rebuilt by build() and load_state_dict()")
    heads = heads or PUBLISHED_HEADS[width]
    stride = 2 ** (len(tokenizer["ch_mult"]) - 1)
    config = {"model": "mage", "tokenizer": tokenizer, "image_size": math.isqrt(positions - 1) * stride,
              "width": width, "depth": count_blocks(state, "blocks."), "heads": heads[0],
              "decoder_width": decoder_width, "decoder_depth": count_blocks(state, "decoder_blocks."),
              "decoder_heads": heads[1], "classes": classes, "fake_class": 76}
    with torch.device("meta"):
        ours = build(config).state_dict().keys()
    kept = {k: v for k, v in state.items() if k in ours}
    table = "token_emb.position_embeddings.weight"
    kept[table] = kept[table][:positions]                                 # a longer table has rows never read
    dead = {k.split(".")[0] if k.startswith(TRAINING) else k for k in state.keys() - ours}
    return config, kept, sorted(dead)


def published_addp(state, heads=None, predictor_heads=None):
    """The same for an official ADDP state dict (addp-vit-*.pth), which holds its predictor and, twice, the
    tokenizer."""
    predictor, kept, dead = published_mage(sub_state(state, "token_predictor."), predictor_heads)
    own = {k: v for k, v in state.items() if not k.startswith("token_predictor.")}
    width = own["token_emb.weight"].size(1)
    heads = heads or PUBLISHED_HEADS[width]
    config = {"model": "addp", "predictor": predictor, "image_size": predictor["image_size"],
              "width": width, "depth": count_blocks(own, "blocks."), "heads": heads[0],
              "decoder_depth": count_blocks(own, "decoder_blocks."), "decoder_heads": heads[1]}
    with torch.device("meta"):
        ours = build(config).state_dict().keys()
    kept = {f"token_predictor.{k}": v for k, v in kept.items()}
    kept |= {k: v for k, v in own.items() if k in ours}
    return config, kept, sorted(own.keys() - ours) + [f"token_predictor.{k}" for k in dead]


def published_adm(state, head=64, **attention):
    """Official ADM state dict (256x256_diffusion_uncond.pt and its like) ->
    (config, the same state, no names left out).

    Heads, order of channels, noise and side of the image cannot be seen; published heads are 64 wide, the
    smallest maps 8 x 8. attention: heads and order, if others. ValueError for a conditional one:
    labels have no place.
    """
    if "label_emb.weight" in state:
        raise ValueError("it is class-conditional; ADM is read without classes only")
    ch, ups = state["time_embed.0.weight"].size(1), range(count_blocks(state, "output_blocks."))
    # Those that enlarge.
    levels = 1 + sum(any(f"output_blocks.{i}.{j}.in_layers.0.weight" in state for j in (1, 2)) for i in ups)
    blocks = count_blocks(state, "input_blocks.") // levels - 1
    first = [f"input_blocks.{1 + i * (blocks + 1)}" for i in range(levels)]
    config = {"model": "adm", "image_size": 8 * 2 ** (levels - 1), "ch": ch, "blocks": blocks, "head": head,
              **attention, "ch_mult": [state[f"{name}.0.out_layers.3.weight"].size(0) / ch for name in first],
              "attention": [2 ** i for i, name in enumerate(first) if f"{name}.1.norm.weight" in state]}
    return config, state, []


# Which reader a file is for, by the first prefix that any of its names has.
PUBLISHED = {"token_predictor.": published_addp, "token_emb.word_embeddings.": published_mage,
             "input_blocks.0.": published_adm}


def published_weights(state, ema=True):
    """{name: tensor}, wherever a file has them, less prefixes of wrappers; ema: the averaged, if any."""
    keys = ["model", "state_dict", "model_state_dict", "model_ema", "ema"]
    found = [state[k] for k in keys[::-1 if ema else 1] if isinstance(state.get(k), dict)] or [state]
    return {re.sub(r"^((module|_orig_mod)\.)+", "", name): v for name, v in {**found[-1], **found[0]}.items()}


# ------------------------------------------------------------------------------------------------------------
# 16. Behind the methods
#
# Random numbers by seed. In generation a number depends on (the image's seed, which draw, which position) and
# on nothing else, so an image is the same alone or among a thousand, on any device
# (but for rounding, which may tip a close choice). An integer hash does it, the finaliser of MurmurHash3.


def murmur(x):
    """Scramble the low 32 bits of int64 values; a product that overflows keeps its low 32 bits, which are all
    that is used."""
    x = x & 0xFFFFFFFF
    x = ((x ^ x >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ x >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ x >> 16


def hash_ints(*values):
    """Integers, or int64 tensors, of 64 bits each, scrambled into one of 32."""
    state = 0
    for value in values:
        state = murmur((murmur(value) ^ (value >> 32)) + 0x9E3779B9 * (state + 1))
    return state


def hashed_uniform(seeds, draw, n):
    """n uniform numbers strictly inside (0, 1) for each seed: int64 (B,), int -> float32 (B, n). Draws that
    are taken: in step t = 1 ... T of decoding 2 t - 2 for the ids and 2 t - 1 for the confidence; in
    denoising 0 for the start, 2 s - 1 and 2 s for step s = 1, 2 ...; 0 for the noise of features() and for a
    drawn shape."""
    row = murmur(murmur(murmur(seeds) ^ (seeds >> 32)) + draw)
    bits = murmur(row[:, None] + 0x9E3779B9 * torch.arange(1, n + 1, device=seeds.device))
    return ((bits >> 9).float() + 0.5) / 2**23                                   # 23 bits: 1 is never reached


def to_device(x, device):
    """x on the device, without waiting for the copy. Apple's GPUs have to wait: there x might be freed before
    it is read."""
    return x.to(device, non_blocking=torch.device(device).type != "mps")


def priority_of(order, confidence, mask, t):
    """What an order of unmask() returns: float (n, L) like confidence, the lowest where it is nan. ValueError
    for another shape."""
    priority = order(confidence, mask, t)
    if numpy.shape(priority) != mask.shape:
        raise ValueError(f"order must return (n, L), here {tuple(mask.shape)}, not {numpy.shape(priority)}")
    return torch.as_tensor(priority).to(confidence).nan_to_num(-math.inf, neginf=-math.inf)


def in_groups(counts, function, *tensors):
    """function(*tensors, count) of the images that share a count of tokens, as a batch must, put together
    again in their order. counts int (n,), on the CPU."""
    counts, parts = counts.tolist(), []
    groups = [[i for i, c in enumerate(counts) if c == count] for count in sorted(set(counts))]
    for group in groups:
        i = to_device(torch.tensor(group), tensors[0].device)
        parts.append(function(*(x[i] for x in tensors), counts[group[0]]))
    order = torch.tensor([i for group in groups for i in group]).argsort()
    return torch.cat(parts)[to_device(order, tensors[0].device)]


# Drawn shapes: eight, in four colours on a plain ground. Place, size and turn vary a little. Colour says
# nothing about the class, so shape is what there is to learn. Each is a signed distance: negative inside, in
# units of its radius.


def box_distance(x, y, w, h):
    """Distance to a rectangle of half sides w and h."""
    return (x.abs() - w).maximum(y.abs() - h)


def star_distance(x, y, r):
    """Five points: the plane folded ten times onto one edge, which runs from (0.42, 0) to the tip at 36
    degrees."""
    fifth = 2 * math.pi / 5
    angle = (torch.atan2(y, x) % fifth - fifth / 2).abs()
    return (r * angle.cos() - 0.42) * 0.8345 - r * angle.sin() * 0.551


SHAPES = {
    "circle":   lambda x, y, r: r - 0.85,
    "ring":     lambda x, y, r: (r - 0.75).abs() - 0.2,
    "square":   lambda x, y, r: box_distance(x, y, 0.7, 0.7),
    "bar":      lambda x, y, r: box_distance(x, y, 0.95, 0.28),
    "cross":    lambda x, y, r: box_distance(x, y, 0.95, 0.3).minimum(box_distance(x, y, 0.3, 0.95)),
    "triangle": lambda x, y, r: torch.stack([x, -x / 2 + y * 0.866, -x / 2 - y * 0.866]).amax(0) - 0.5,
    "star":     lambda x, y, r: star_distance(x, y, r),
    "crescent": lambda x, y, r: (r - 0.95).maximum(0.8 - ((x - 0.5) ** 2 + y ** 2).sqrt()),
}
GROUND = torch.tensor([128.0, 128.0, 128.0])
# Red, teal, blue, amber.
PALETTE = GROUND + torch.tensor([[100, -68, -78], [-100, 68, 78], [-88, -18, 96], [88, 18, -96]])


def draw_shapes(seeds, size, numbers=None, masks=False):
    """Seeds int64 (B,) -> uint8 images (B, 3, size, size), labels (B,). Radius 33 to 41 % of the side,
    turned by quarters give or take 9 degrees, always wholly visible. All that is random about them is
    numbers (B, 7) in (0, 1): kind, colour, radius, x, y, quarter turn, further turn; drawn if None.
    masks: with a fourth channel, what each pixel shows: 1 for ground, 2 for the first shape, and so on."""
    numbers = hashed_uniform(seeds.long(), 0, 7) if numbers is None else numbers
    kind, color, radius, cx, cy, turn, wobble = numbers[:, :, None, None].unbind(1)
    radius = size / 32 * (10.5 + 2.5 * radius)
    cx, cy = (size / 32 * (14.5 + 3 * c) for c in (cx, cy))
    turn = math.pi / 2 * ((4 * turn).floor() + 0.2 * (wobble - 0.5))
    row = torch.arange(size) + 0.5
    x, y = (row - cx) / radius, (row[:, None] - cy) / radius                            # (B, 1, S), (B, S, 1)
    x, y = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()                 # (B, S, S)
    labels = (kind.flatten() * len(SHAPES)).long()
    r = (x * x + y * y).sqrt()
    distance = torch.stack([shape(x, y, r) for shape in SHAPES.values()])[labels, torch.arange(len(labels))]
    alpha = (0.5 - distance * radius).clamp(0, 1)[:, None]                            # one pixel of soft edge
    paint = PALETTE[(color.flatten() * len(PALETTE)).long()][:, :, None, None]
    images = (alpha * paint + (1 - alpha) * GROUND[:, None, None]).round().byte()
    shown = 1 + (distance < 0) * (1 + labels[:, None, None])                                # (B, S, S)
    return torch.cat([images, shown[:, None].byte()], 1) if masks else images, labels


def add_grain(x, grain):
    """Pixels (B, 3, S, S) in which images of one flat colour have noise of half a grey level. grain: uniform
    in [0, 1], like x.

    In a black image nothing varies. A dozen fresh group norms would divide by zero variance, each making the
    gradient a thousand times longer."""
    flat = (x.amax((2, 3), keepdim=True) == x.amin((2, 3), keepdim=True)).all(1, keepdim=True)  # (B, 1, 1, 1)
    return x + flat * (grain - 0.5) / 255


def complete(model):
    """The model, if its class is as section 13 asks of a method; else a TypeError names what it lacks."""
    wanted = {"image_size", "layers", "best_layer", "sample_steps", "features", "embed"}
    missing = sorted(name for name in wanted if not hasattr(model, name))
    if not missing and model.takes_labels and not takes(inspect.signature(model.sample_steps), "labels"):
        missing = ["labels of sample_steps, as takes_labels is True"]
    if missing:
        raise TypeError(f"{type(model).__name__} lacks {', '.join(missing)}; section 13 says what each is")
    return model


@torch.random.fork_rng(devices=[])
def draw_zero_layers(model):
    """The model, in which layers whose trained weights are all 0 have torch's default initialisation instead:
    a random network to compare with. A fresh UMD, whose gates start at 0, would mix nothing. (Parameters that
    belong to no layer of torch stay as they are.)"""
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        trained = isinstance(weight, nn.Parameter) and weight.requires_grad
        if trained and hasattr(layer, "reset_parameters") and not weight.any():
            layer.reset_parameters()
    return model


# Checked arguments. One guard stands before the public methods of all models. It knows an argument by its
# name, and its form from the table below: "float (B, 3, 32, 32) in [0, 1]" is a tensor, "int in [1, 9)" a
# number; what stands in braces follows from the model and the other arguments. Kind, shape and device can be
# looked at without waiting for a GPU. Values are looked at if they lie on the CPU, and in sample_steps()
# wherever they lie.

PIXELS, IDS = "float (B, 3, {S}, {S})", "int (B, {m.length}) in [0, {m.codes})"
FORMS = {                               # by [class.][method.]argument; decoders overshoot [0, 1] a little
    "x": PIXELS, "embed.x": PIXELS + " in [-0.5, 1.5]", "reconstruct.x": PIXELS + " in [-0.5, 1.5]",
    "UMD.x": PIXELS + " in [-0.5, 1.5]", "ADM.x": PIXELS + " in [-0.5, 1.5]",
    "ADDP.features.x": PIXELS + " in [-3, 4]", "ADDP.embed.x": PIXELS + " in [-3, 4]",     # of fresh decoders
    "ContrastiveMAGE.forward.x": f"{PIXELS} or {IDS} or float (B, 2, 3, {{S}}, {{S}}) or "
                                 "int (B, 2, {m.length}) in [0, {m.codes})",
    "EchoMAGE.forward.x": PIXELS,
    "ADDP.forward.x": PIXELS,
    "VQGAN.x": PIXELS + " in [-0.5, 1.5]", "VQGAN.ids": "int (B, h, w) in [0, {m.codes})",
    "labels": "int ({B}) in [0, {m.classes})", "keep_label": "bool ({N})",
    "MAGE.mask_ratio": "float in [0.5, 1]", "mask_noise": "float ({N}, {m.length})",
    "UMD.mask_noise": "float ({B}, {m.length})", "UMD.n_clean": "int in [0, {B}]",
    "ADDP.index": "int in [0, 66)", "ADDP.gap": "int in [1, 5]",
    "t": "{time} in [{m.t_range[0]}, {m.t_range[1]}]",
    "forward.t": "{time} ({N}) in [{m.t_range[0]}, {m.t_range[1]}]",
    "ADM.features.t": "int in [0, {m.t_range[1]}] or int ({B}) in [0, {m.t_range[1]}]",
    "noise": "float ({N}, 3, {S}, {S})", "TokenModel.noise": "float ({N}, {m.length})",
    "n": "int in [1, inf]", "steps": "int in [1, inf]", "temperature": "float in [0, inf]",
    "eta": "float in [0, 1]", "guidance": "float in [-1e9, 1e9]", "guidance_interval": "pair in [0, 1]",
    "schedule": "function or among {schedules} or counts ({T}) in [0, {m.length}]", "order": "function",
    "known": "float ({B}, 3, {S}, {S}) in [-0.5, 1.5]", "mask": "bool ({B}, {S}, {S})",
    "seeds": "int ({B})", "sample_steps.seeds": "int in [-9e18, 9e18] or int ({B})",
    "draw": "int in [0, 9e18]", "layers": "layers in [1, {D}]", "add": "maps in [1, {D}]",
    "pool": "among {pools}",
}
FORM = re.compile(r"(\w+)(?: \((.*?),?\))?(?: in \[(\S+), (\S+)([])]))?")


def is_number(v, kind, low, high):
    """Whether v is a finite int or float, or a tensor of one on the CPU, from low to high."""
    if isinstance(v, torch.Tensor) and v.dim() == 0 and v.device.type == "cpu":
        v = v.item()
    real = isinstance(v, (int, float, numpy.integer, numpy.floating))
    return real and low <= v <= high and abs(v) < math.inf and (kind == "float" or v % 1 == 0)


def is_tensor(v, kind, shape, low, high, weight, near, wait):
    """Whether v is a tensor of this kind and shape, where B is any number from 1 on, h and w are any, beside
    the weight, or near (on the CPU). Floats are of the weight's type or, under autocast, of any not above 32
    bits. wait: for values from low to high on any device."""
    if not isinstance(v, torch.Tensor) or kind not in str(v.dtype) or v.dim() != len(shape):
        return False
    if any(s not in (str(n), "B", "h", "w") or s == "B" and n == 0 for s, n in zip(shape, v.shape)):
        return False
    if v.device != weight.device and not (near and v.device.type == "cpu"):
        return False
    if kind == "float" and v.dtype != weight.dtype:
        return v.element_size() < 8 and torch.is_autocast_enabled("cpu" if v.is_meta else v.device.type)
    unbounded, hidden = (low, high) == (-math.inf, math.inf), v.device.type != "cpu" and not wait
    if unbounded or hidden or v.is_meta or not v.numel():
        return True
    least, most = (v.long() if kind == "int" else v).aminmax()
    return bool(low <= least and most <= high)


def fits(v, form, weight, near=False, wait=False):
    """Whether v has one of the forms that "or" connects; "among a, b" are names, "layers" and "maps"
    collections of numbers, "counts (T)" a list of T, "pair" two ascending ones."""
    if " or " in form:
        return any(fits(v, part, weight, near, wait) for part in form.split(" or "))
    if form == "function":
        return callable(v)
    if form.startswith("among "):
        return isinstance(v, str) and v in form.removeprefix("among ").split(", ")
    kind, shape, low, high, end = FORM.fullmatch(form).groups()
    low, high = float(low or -math.inf), float(high or math.inf) - (end == ")")
    if kind == "pair":
        two = isinstance(v, (tuple, list)) and len(v) == 2
        return two and all(is_number(b, "float", low, high) for b in v) and v[0] < v[1]
    if kind == "counts":
        listed = isinstance(v, (list, tuple)) and str(len(v)) == shape
        return listed and all(is_number(b, "int", low, high) for b in v)
    if kind in ("layers", "maps"):
        several = typing.Mapping if kind == "maps" else typing.Collection
        return isinstance(v, several) and (len(v) > 0 or kind == "maps") and \
            all(is_number(b, "int", low, high) for b in v)
    if shape is None:
        return is_number(v, kind, low, high)
    return is_tensor(v, kind, shape.split(", "), low, high, weight, near, wait)


def letters_of(model, a):
    """What the letters in forms stand for, given the arguments a: B images, N of them that are noised or two
    crops each, S, D layers, T steps of decoding."""
    x, n, m = a.get("x"), a.get("n"), model
    S, D, stride = getattr(m, "image_size", 0), len(getattr(m, "layers", ())), getattr(m, "stride", 0)
    if a.get("finetune") and isinstance(m, ADDP):               # whose encoder takes other sizes
        stride = m.vqgan.stride
    if stride and isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim():    # any multiple will do
        side = max(x.size(-1) // stride, 1) * stride
        S, D = side, m.best_layer if isinstance(m, ADDP) and side != S else D
    B = int(n) if is_number(n, "int", 1, math.inf) else "B"
    B = len(x) if isinstance(x, torch.Tensor) and x.dim() else B
    N = B
    if isinstance(m, UMD) and "n_clean" in a and B != "B":
        N = B - (int(a["n_clean"]) if is_number(a["n_clean"], "int", 0, B) else int(B * m.clean_ratio))
    elif isinstance(x, torch.Tensor) and x.dim() in (3, 5):                       # (B, 2, L), (B, 2, 3, S, S)
        N = 2 * B
    kind = type(getattr(m, "t_range", (0, 0))[1]).__name__
    steps = a.get("steps")
    T = int(steps) if is_number(steps, "int", 1, math.inf) else m.num_steps() if "schedule" in a else 0
    return {"m": m, "S": S, "D": D, "B": B, "N": N, "T": T, "time": kind, "schedules": ", ".join(SCHEDULES),
            "pools": ", ".join(getattr(m, "pools", ()))}


def form_of(model, method, argument):
    """The form of a method's argument, the most specific one first, "" if there is none. Where ids are
    predicted, x may be ids, too."""
    classes = [cls.__name__ + "." for cls in type(model).__mro__] + [""]
    names = [cls + name for cls in classes for name in (f"{method}.{argument}", argument)]
    form = next((FORMS[name] for name in names if name in FORMS), "")
    reads_ids = argument == "x" and method != "reconstruct" and isinstance(model, Model) and model.codes
    return f"{form} or {IDS}" if reads_ids and IDS not in form else form


def require(key, v, form, weight, **more):
    """ValueError if v is not of the form."""
    if not fits(v, form, weight, **more):
        found = f"{v.dtype} {tuple(v.shape)} on {v.device}; the model is {weight.dtype} on {weight.device}" \
            if isinstance(v, torch.Tensor) else repr(v)[:200]
        raise ValueError(f"{key} must be {form}, not {found}"
                         + "; divide bytes by 255" * found.startswith("torch.uint8"))


GUIDE = "of the same kind, image size, classes, and tokenizer or noise schedule"


def can_guide(guide, model):
    """Whether what a guide predicts can stand beside what the model does."""
    if type(guide) is not type(model):
        return False
    theirs, ours = ([*m.tokenizer.parameters()] if m.tokenizer else [] for m in (guide, model))
    if model.alpha_bar is not None:
        theirs, ours = [*theirs, guide.alpha_bar], [*ours, model.alpha_bar]
    like = [(m.image_size, m.classes, m.generates, [p.shape for p in shared])
            for m, shared in ((guide, theirs), (model, ours))]
    return like[0] == like[1] and all(p.to(q).equal(q) for p, q in zip(theirs, ours))


def takes(signature, name):
    """Whether a call may have an argument of this name: it is listed, or **options stands for any."""
    parameters = signature.parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def checked(method, name, args, options):
    """Call a method of this name if its arguments are of the forms that its class states, else ValueError.
    Integers become int or int64; labels and seeds go to the model's device."""
    signature, model = inspect.signature(method), args[0]
    if unknown := [option for option in options if not takes(signature, option)]:
        raise ValueError(f"{type(model).__name__}.{name} takes no {unknown[0]}; it takes "
                         + ", ".join([*signature.parameters][1:]))
    given = signature.bind(*args, **options)
    given.apply_defaults()
    a, weight = given.arguments, next(model.parameters())
    if weight.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(f"weights must be float32, not {weight.dtype}; torch.autocast computes in less")
    whole = {**a, **options}                            # with what **options passes on to a parent's method
    known, generating = whole.get("known") is not None, name == "sample_steps"
    if generating and (known != (whole.get("mask") is not None) or not (known or model.generates)):
        raise ValueError("known and mask go together, and a model that cannot start from nothing needs both")
    size = letters_of(model, whole)
    for key, v in a.items():
        form = form_of(model, name, key).format(**size)
        if not form or v is None and signature.parameters[key].default is None:
            continue
        near = key in ("labels", "seeds", "t")
        require(key, v, form, weight, near=near, wait=key == "t" or generating)
        if key == "layers":
            a[key] = [*map(int, v)]
        elif key == "add":
            a[key] = {int(b): m for b, m in v.items()}
            for b, m in a[key].items():
                C, *sides = model.layers[b]
                h, w = (side * size["S"] // model.image_size for side in sides)
                require(f"add[{b}]", m, f"float ({size['B']}, {C}, {h}, {w})", weight)
        elif isinstance(v, torch.Tensor) and v.dim():
            v = v if v.is_floating_point() or v.dtype == torch.bool else v.long()
            a[key] = to_device(v, weight.device) if key in ("labels", "seeds") else v
        elif form.startswith("int"):
            a[key] = int(v)
    if a.get("guide") is not None and not can_guide(a["guide"], model):
        raise ValueError(f"guide must be None or a model {GUIDE}")
    if a.get("guide") is not None and a["guide"].training and not model.training:
        raise ValueError("guide must be in evaluation mode, as the model is: call its eval()")
    if a.get("guidance", 1) != 1 and whole.get("labels") is None and whole.get("guide") is None:
        raise ValueError(f"guidance must be 1 without labels or a guide, not {a['guidance']}")
    return method(*given.args, **given.kwargs)


def guard(cls, public=("forward", "sample_steps", "reconstruct", "noise", "features", "embed")):
    """Let checked() stand before the public methods that a class defines."""
    for name in vars(cls).keys() & set(public):
        setattr(cls, name, guarded(vars(cls)[name], name))


def guarded(method, name):
    """The method of this name, behind checked()."""
    @functools.wraps(method)
    def call(*args, **options):
        return checked(method, name, args, options)
    return call


def with_subclasses(cls):
    """The class, and all classes made of it."""
    return [cls, *itertools.chain.from_iterable(map(with_subclasses, cls.__subclasses__()))]


for _class in with_subclasses(Model):
    guard(_class)


def guard_subclass(cls, **options):
    """The same for classes to come."""
    super(Model, cls).__init_subclass__(**options)
    guard(cls)


Model.__init_subclass__ = classmethod(guard_subclass)
guard(VQGAN, ("encode", "decode", "reconstruct"))


# ------------------------------------------------------------------------------------------------------------
# 17. For the scripts
#
# A user's mistake ends in one sentence.


class UserError(Exception):
    """A mistake the user can mend; its text says how. Scripts print it without a traceback and exit with code
    2."""


# What an OSError says when a disk, a quota or a file has no room left.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def attention_kernels():
    """A context in which Hopper GPUs take cuDNN's attention first, said to be the fastest there; other GPUs
    take what torch chooses. cuDNN's has dropout in sixteenths only: torch 2.12 gives another one to flash,
    older ones have it rounded, so there flash is first."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9:
        order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        order.insert(0 if torch.__version__ >= (2, 12) else 1, SDPBackend.CUDNN_ATTENTION)
        return sdpa_kernel(order, set_priority=True)
    return contextlib.nullcontext()


def run_main(script):
    """Call script(), answering a UserError with one line and exit code 2. Bugs of ours keep their traceback
    and exit code 1."""
    # Gates that start at 0 make gradients whose squares are denormal:
    # a CPU takes ten times as long for those.
    torch.set_flush_denormal(True)
    # Shapes stay the same: a GPU tries once which convolution is fastest.
    torch.backends.cudnn.benchmark = True
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")                    # names of files may be any bytes
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    try:
        with attention_kernels():
            script()
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
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(f"--device {name} is not available here; --device cpu always is")


CONTAINER = pathlib.Path("/sys/fs/cgroup")                      # where Linux keeps a container's limits


def usable_cores(limits=CONTAINER):
    """How many cores this process may use: torch does not ask for a container's limit, and many threads on
    few cores wait for one another."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):                      # no container; "max": no limit
        quota, period = map(int, (limits / "cpu.max").read_text().split())
        cores = min(cores, -(-quota // period))
    return cores


def pick_dtype(name, device):
    """The dtype asked for; if None 'bfloat16' on GPUs that compute in it, else 'float32'. Warns of a bfloat16
    that is emulated: on GPUs before Ampere, and on CPUs without AVX-512, where a training step of 32 images
    took 9 to 13 times as long [measured]."""
    device = pick_device(device)
    if device.type == "cuda":
        emulated = torch.cuda.get_device_capability(device)[0] < 8
    else:
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        emulated = device.type == "cpu" and x86 and torch.backends.cpu.get_cpu_capability() != "AVX512"
    if name == "bfloat16" and emulated:
        print("warning: bfloat16 is only emulated here, and slow; --dtype float32 is faster")
    return name or ("bfloat16" if device.type == "cuda" and not emulated else "float32")


def flag(default, help, min=1, max=2**31 - 1, **more):
    """A field of which parse_flags() makes a flag, with numbers from min to max. more: choices, say; group is
    the title over this flag and those after it."""
    return dataclasses.field(default=default, metadata={"help": help, "range": (min, max), **more})


def parse_flags(cls, doc, argv=None):
    """Command line -> {field of the dataclass cls: its value} of the flags given, with dashes outside and
    underscores inside. A bool gives --x, or --no-x if it is True by default, or both if it is None. -h prints
    the first line of the script's docstring, and its second paragraph as examples."""
    about, examples, *_ = (doc or "\n\n").split("\n\n")         # none under python -OO
    fields = dataclasses.fields(cls)
    names = [field.name + f" [{field.name} ...]" * (field.metadata.get("nargs") == "+")
             for field in fields if "positional" in field.metadata]
    parser = group = argparse.ArgumentParser(
        usage=" ".join(["%(prog)s", *names, "[options]"]), description=about, epilog=f"examples:\n{examples}",
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)

    def refuse(message):
        unknown = re.search("unrecognized arguments: ([^ =]+)", message)
        names = [f"--{field.name.replace('_', '-')}" for field in fields]
        close = difflib.get_close_matches(unknown[1] if unknown else "", names, 1)
        if unknown and os.path.isdir(unknown[1]) and "--dataset" in names:
            close = [f"--dataset {unknown[1]}"]
        hint = f"; did you mean {close[0]}?" if close else ""
        if unknown and os.path.exists(os.path.join(unknown[1], "model.pt")) and "--run" in names:
            hint = "; runs are named together, before the options"
        raise UserError(f"{message}{hint} ({parser.prog} -h lists the options)")
    parser.error = refuse
    for field in fields:
        more = {k: v for k, v in field.metadata.items() if k not in ("range", "group", "positional")}
        if "group" in field.metadata:
            group = parser.add_argument_group(field.metadata["group"])
        words = field.name.replace("_", "-")
        if "positional" in field.metadata:
            name, kind = field.name, {}
        elif field.type is bool:
            name = f"--no-{words}" if field.default else f"--{words}"
            action = {None: argparse.BooleanOptionalAction, True: "store_false", False: "store_true"}
            kind = {"action": action[field.default], "dest": field.name}
        else:
            unit = {int: "INT", float: "NUMBER", str: "TEXT"}[field.type]
            name, kind = f"--{words}", {"type": field.type, "metavar": None if "choices" in more else unit}
            if field.default not in (None, "", ()):
                more["help"] += f" [{field.default}]"
        group.add_argument(name, **{**kind, **more})
    given = vars(parser.parse_args(argv))
    for field in fields:
        value, (low, high) = given.get(field.name), field.metadata["range"]
        if field.type in (int, float) and value is not None and not low <= value <= high:       # nor is nan
            refuse(f"--{field.name.replace('_', '-')} takes a number from {low} to {high}, not {value}")
    return given


# Checkpoints: a dict of plain values and tensors, written by train.py with the previous one beside them.


def file_remedy(path, error):
    """What to do about a file that could not be read because of error, in words."""
    path = pathlib.Path(path)
    run = path.parent
    if isinstance(error, FileNotFoundError):
        return "look for it, or name another"
    if os.path.isdir(path):
        return "it is a folder, name a file"
    if isinstance(error, PIL.UnidentifiedImageError):
        return "it is no image, or of a kind that Pillow does not know"
    if os.path.exists(run / "model.pt") and path.suffix == ".pt" and "model.pt" not in path.name:
        return f"name the run, {run}"
    if os.path.exists(f"{path}.prev"):
        return f"if it is damaged, rename {path}.prev to it"
    return "if it is damaged, copy or download it again"


@contextlib.contextmanager
def reading(path, kind):
    """Whatever fails in here is the fault of the file at path: a UserError says so, caused by what failed. A
    UserError of its own passes."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:              # of a dozen kinds; torch's advice to trust the file is left out
        if held := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(f"{path} holds {held[1]} beside its tensors, and loading that could run code; "
                            "where the file was made, save the model's state_dict() alone") from error
        text = " ".join(f"{type(error).__name__}: {error}".partition(": Weights only")[0].split())[:200]
        raise UserError(f"{path} cannot be read as {kind} ({text}); {file_remedy(path, error)}") from error


def other_run(path):
    """What to type where there is no checkpoint of a run at path, in words."""
    run = path.parent if path.name == "model.pt" else path
    if path.name == "tokenizer.pt" and (path.parent / "model.pt").exists():
        return "a run of pixels has no tokenizer; name one of mage"
    if os.path.exists(run / "tokenizer.pt"):
        return f"its training has not come so far; if it has stopped, python train.py --resume {run} goes on"
    places = {run.parent, pathlib.Path("out")}
    runs = {str(p.parent) for place in places for p in place.glob("*/*.pt")
            if p.stem in ("model", "tokenizer")}
    near = difflib.get_close_matches(str(run), runs, 1)
    if near:
        return f"did you mean {near[0]}?"
    return f"there is {', '.join(sorted(runs)[:5])}" if runs else "python train.py makes one"


def load_checkpoint(path):
    """The dict in a checkpoint, on the CPU; nothing in it runs. UserError if missing, foreign or damaged."""
    path, previous = pathlib.Path(path), pathlib.Path(f"{path}.prev")
    path = previous if previous.exists() and not path.exists() else path            # killed between the two
    if not path.exists():
        published = path.suffix in (".pth", ".ckpt")
        raise UserError(f"there is no checkpoint {path}; "
                        + ("README.md says where it is published" if published else other_run(path)))
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


REBUILDING = threading.Lock()


def rebuild(config, state, path):
    """A config's model with these weights, in eval mode. Absurd sizes: UserError before they take memory."""
    left, me = iter([None] * (2 * len(state) + 1000)), threading.get_ident()    # each is set twice; some lack

    def count(*_):
        if threading.get_ident() == me:
            next(left)
    # The hook is one for all threads.
    with REBUILDING, torch.device("meta"), register_module_parameter_registration_hook(count):
        build(config).load_state_dict(state, assign=True)
    return load_strictly(build(config), state, path).eval()


def load_model(path, ema=None, tell=print, heads=None, order=None):
    """Trained model, in eval mode, and its config, from a run folder, a checkpoint, or a file published by
    the authors of MAGE, Sorcen, ADDP or ADM.

    ema   True: the averaged weights, where a checkpoint has them; None: if the paper reads features off them
    tell  called with one line about what is assumed or never read     heads, order  of ADM, see ADMAttention
    """
    path = pathlib.Path(path, "model.pt" if os.path.isdir(path) else "")
    state, attention = load_checkpoint(path), {k: v for k, v in dict(heads=heads, order=order).items() if v}
    with reading(path, "a model of train.py, nor as MAGE, ADDP or ADM in a size that was published"):
        if (ours := isinstance(state.get("config"), dict) and "arch" in state["config"]) and not attention:
            config = state["config"]["arch"]
            ema = MODELS[config["model"]].recipe["probe_ema"] if ema is None else ema
            weights = {**state["model"], **(ema and state.get("ema") or {})}
            about = state["config"]
            if state.get("step", math.inf) < (steps := steps_of(about)):
                tell(f"{path}: training stopped at step {state['step']} of {steps}")
                about = dict(about, stopped=state["step"])
            return rebuild(config, weights, path), about
        weights = published_weights(state, ema is not False)
        readers = [reader for name, reader in PUBLISHED.items() if sub_state(weights, name)]
        if "x_embedder.proj.weight" in weights or "decoder_pred.weight" in weights and not readers:
            raise UserError(f"{path} is a file of the official DiT or MAE and does not fit: "
                            "dit and mae here are the two ends of UMD, other networks")
        if not readers or attention and (ours or readers != [published_adm]):
            tokenizer = {"quantize.embedding.weight", "vqgan.quantize.embedding.weight"} & weights.keys()
            raise UserError(f"{path} is " + ("no published ADM; leave --adm-... out" if attention else
                            "a tokenizer, not a model; name its run's folder or model.pt" if tokenizer else
                            "neither a checkpoint of train.py nor a file published for MAGE, ADDP or ADM"))
        if published_mage in readers and not sub_state(weights, "vqgan.") and "pos2d" not in weights:
            weights |= tokenizer_beside(path)
        config, weights, dead = readers[0](weights, **attention)
        unknown = [n for n in dead if n.removeprefix("token_predictor.") not in DEAD + TRAINING]
        known = ", ".join(n for n in dead if n not in unknown) or "nothing"
        assumed = f"; assumed: heads {heads or 'of 64 channels'}, {order or 'legacy'} order"
        assumed = assumed if "head" in config else ""
        tell(f"{path.name}: published layout; dead in the original, left out: {known}"
             + (f"; unknown to us, left out too: {', '.join(unknown)}" if unknown else "") + assumed)
        return rebuild(config, weights, path), {"arch": config}


def steps_of(config):
    """Optimizer steps of a run with this config; 0 if it does not say."""
    epochs, images = config.get("epochs") or 0, config.get("images") or 0
    return config.get("steps") or math.ceil(epochs * images / (config.get("batch_size") or 1))


def tokenizer_beside(path):
    """{"vqgan." + name: tensor} for a file of Sorcen, which holds no tokenizer."""
    tokenizer = path.with_name("vqgan_jax_strongaug.ckpt")
    if not tokenizer.exists():
        raise UserError(f"{path} holds no tokenizer; put MAGE's {tokenizer.name} into the same folder")
    return {f"vqgan.{name}": v for name, v in load_tokenizer(tokenizer)[0].state_dict().items()}


def load_tokenizer(path, tell=print):
    """Trained VQGAN and its config from a run folder, a tokenizer.pt, or a published tokenizer file. tell: as
    for load_model. A run without a tokenizer.pt has it in its model.pt, if its model reads ids."""
    path, run = pathlib.Path(path, "tokenizer.pt" if os.path.isdir(path) else ""), pathlib.Path(path)
    if path != run and not any(run.glob("tokenizer.pt*")) and (run / "model.pt").exists():
        model, config = load_model(run, tell=tell)
        if model.tokenizer:
            return model.tokenizer, config["arch"].get("predictor", config["arch"])["tokenizer"]
    state = load_checkpoint(path)
    with reading(path, "a tokenizer of train.py or a published one"):
        if isinstance(state.get("config"), dict) and "tokenizer_arch" in state["config"]:
            config, weights = state["config"]["tokenizer_arch"], sub_state(state["model"], "vqgan.")
            if state.get("step", math.inf) < (steps := state["config"].get("tokenizer_steps") or 0):
                tell(f"{path}: training stopped at step {state['step']} of {steps}")
        elif any(sub_state(weights := published_weights(state), name) for name in (*PUBLISHED, "blocks.")):
            raise UserError(f"{path} is a model, not a tokenizer; name its run's folder or a tokenizer.pt")
        else:
            config = published_tokenizer(weights)
        return rebuild(config, weights, path), config


# Images in and out.


def to_uint8(x):
    """Pixels (..., 3, S, S) in [0, 1] -> numpy uint8 (..., S, S, 3), rounded."""
    return (x.detach().float().cpu().clamp(0, 1) * 255).round().byte().movedim(-3, -1).numpy()


TURNS = {orientation: PIL.Image.Transpose[name] for orientation, name in enumerate(                # of EXIF
    ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE",
     "ROTATE_90"), 2)}


def turn_of(image):
    """What has to be done to a PIL image so that it lies as a viewer shows it; None for nothing, or if its
    EXIF cannot be read."""
    try:
        return TURNS.get(image.getexif().get(0x0112))
    except Exception:
        return None


def grey_levels(image):
    """A PIL image of more than 8 bits a value -> mode L. Integers by the range of their type
    (of 32 bits, which also hold less: the smallest of 8, 16 and 31 that fits), floats in [0, 1]; ValueError
    for others, whose range nobody knows."""
    x = numpy.asarray(image).astype(numpy.float64)
    low, high = x.min(), x.max()
    tops = {"F": [1.0], "I": [255, 65535, 2**31 - 1]}.get(image.mode, [65535])
    top = next((top for top in tops if high <= top), tops[-1])
    if not 0 <= low <= high <= top:
        raise ValueError(f"its values lie in {low:g} .. {high:g}, not 0 .. {top:g}")
    return PIL.Image.fromarray((x * (255 / top)).round().astype(numpy.uint8))


def upright(image, ground="white"):
    """A PIL image, just opened, as a viewer shows it: RGB, turned as EXIF says, on white, or another ground,
    where it is transparent."""
    image.load()                                                               # TIFF files are turned in here
    turn = turn_of(image)
    if image.mode[0] in "IF":
        image = grey_levels(image)
    elif image.mode.lower().endswith("a") or "transparency" in image.info:
        image = image.convert({"La": "LA"}.get(image.mode, image.mode)).convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, ground), image)
    image = image.convert("RGB")
    if turn is None:
        return image
    return PIL.Image.fromarray(numpy.asarray(image.transpose(turn)))    # without EXIF, or it is turned again


def from_image(image, size, nearest=False):
    """PIL image, just opened -> uint8 (3, size, size): shorter side resized, centre cropped, as every
    evaluation does [MAGE, 292 / 256]. nearest: without new values between the pixels'."""
    image = upright(image)
    scale = size * (1.14 if min(image.size) >= size * 1.14 else 1) / min(image.size)
    sides = [max(size, round(side * scale)) for side in image.size]
    if math.prod(sides) > 2 * PIL.Image.MAX_IMAGE_PIXELS:                               # PIL reads no more
        raise ValueError(f"{image.size[0]} x {image.size[1]} pixels are too narrow")
    image = image.resize(sides, PIL.Image.Resampling["NEAREST" if nearest else "BICUBIC"])
    left, top = ((side - size) // 2 for side in image.size)
    return torch.from_numpy(numpy.array(image.crop((left, top, left + size, top + size)))).movedim(2, 0)


def read_image(path, size):
    """File -> pixels (3, size, size) in [0, 1]. UserError if it is no readable image."""
    with reading(path, "an image"), PIL.Image.open(path) as image:
        return from_image(image, size).float() / 255


def image_grid(x, columns=8, min_side=1024, names=(), rows=()):
    """Images (n, 3, S, S) in [0, 1] -> one PIL image, row by row with thin white lines; small ones are
    enlarged to about min_side pixels. names: of the columns, then as many as there are; rows: of the rows."""
    if x.dim() != 4 or not len(x) or not x.is_floating_point():
        raise ValueError(f"images must be float (n, 3, S, S) in [0, 1], one or more, not {x.dtype} "
                         f"{tuple(x.shape)}; divide bytes by 255")
    n, _, side, _ = x.shape
    columns = len(names) or min(columns, n)
    zoom = max(1, min_side // (columns * side))
    tiles = to_uint8(x).repeat(zoom, 1).repeat(zoom, 2)
    side, gap = side * zoom, 2
    height, width = (count * (side + gap) + gap for count in (-(-n // columns), columns))
    sheet = numpy.full((height, width, 3), 255, numpy.uint8)
    for i, tile in enumerate(tiles):
        top, left = gap + i // columns * (side + gap), gap + i % columns * (side + gap)
        sheet[top:top + side, left:left + side] = tile
    return with_names(PIL.Image.fromarray(sheet), names, rows, min(max(side // 8, 10), 32))


def with_names(sheet, columns, rows, letters):
    """A sheet with the names of its columns above them and of its rows left of them, if there are any.
    letters: their size in pixels."""
    font = PIL.ImageFont.load_default(letters)
    left, top = round(max(map(font.getlength, rows), default=-12)) + 12, 2 * letters * bool(columns)
    page = PIL.Image.new("RGB", (left + sheet.width, top + sheet.height), "white")
    page.paste(sheet, (left, top))
    draw = PIL.ImageDraw.Draw(page)
    for i, name in enumerate(rows):
        draw.text((left - 6, top + (i + 0.5) * sheet.height / len(rows)), name, "black", font, anchor="rm")
    for i, name in enumerate(columns):
        draw.text((left + (i + 0.5) * sheet.width / len(columns), top / 2), name, "black", font, anchor="mm")
    return page


# Processes.


def join_processes(name):
    """Meet the processes that torchrun started beside this one, if it did; returns the device of this one,
    name being --device."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"                     # not even a context on another's device
    device = pick_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                             # The longest wait: for the slowest with its ids.
                                             timeout=datetime.timedelta(hours=2))
    return device


def leave_processes():
    """Part from the other processes, all at once, else the last may hang (gloo in torch 2.6). A process that
    fails does not wait for them.

    DistributedDataParallel must be gone before: freed after the group it can hang for good, and a failure's
    traceback keeps it alive.
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


def rank_and_world():
    """Rank of this process and their number; 0 and 1 without torchrun."""
    there = torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if there else (0, 1)


def rank_zero_first(work):
    """What work() returns in the first process, for which the others wait. Its UserError, which it alone
    tells, ends them all."""
    rank, world = rank_and_world()
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


if __name__ == "__main__":
    run_main(lambda: main(*sys.argv[1:2]))
