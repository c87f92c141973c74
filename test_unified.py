"""The proof of unified.py, in the same order: read the two side by side. A test is named after the sentence
it proves.

Tests with `golden` in their names compare with numbers that the authors' own code computed on tiny
networks: assets/golden/*.pt, or files of the same form in the folder $UNIFIED_GOLDEN. All sizes come from
the file, none from here. The other tests need nothing but this folder: no data, no network, no GPU. Run:
python -m pytest -q
"""
import argparse
import ast
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import datetime
import errno
import faulthandler
import fractions
import functools
import gc
import hashlib
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import pathlib
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import tarfile
import threading
import time
import types
import warnings
import zlib

import numpy
import PIL.Image
import PIL.ImageOps
import pytest
import torch
import torch.distributed
import torch.multiprocessing
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.flop_counter

import probe
import sample
import train
import unified

torch.set_num_threads(1)            # several wait for each other in a loop, and on a busy machine for minutes
probe.PIXEL_SIDE = 8                # the probe of raw pixels took half of the time of every run here,
train.SAMPLES = 16                  # and samples much of the rest

HERE = pathlib.Path(__file__).parent
GOLDEN = pathlib.Path(os.environ.get("UNIFIED_GOLDEN", HERE / "assets/golden"))
PUBLISHED_FAKE_CLASS = 76           # id 1100 = 1024 codes + class 76, by an accident in the original

# ------------------------------------------------------------------------------------------------------------
# What the tests share: how near is near, the golden files, and networks small enough to run a hundred times


def assert_close(ours, theirs, rtol=1e-4, name=""):
    """Same shape, and no element further off than rtol of the largest magnitude. (A NaN is further off than
    anything.)"""
    ours, theirs = (torch.as_tensor(v).detach().double() for v in (ours, theirs))
    assert ours.shape == theirs.shape, name
    error, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert error <= rtol * scale, f"{name} off by {error:.3g} where the largest magnitude is {scale:.3g}"


def assert_near(ours, theirs, atol=1e-4, name=""):
    """Same shape, no element further off than the 1e-4 that tells a wrong eps of a norm from rounding."""
    assert ours.shape == theirs.shape, name
    error = (ours.detach().double() - theirs.double()).abs().max()
    assert error <= atol, (name, error)


def assert_outputs(theirs, ours, compare=assert_close, **tolerance):
    """Each of ours is the golden output of its name: whole numbers and masks are equal, other numbers
    near."""
    for name, value in ours.items():
        if value.is_floating_point():
            compare(value, theirs[name], name=name, **tolerance)
        else:
            assert value.equal(theirs[name].to(value.dtype)), name


def assert_refused(words, call, *args, **options):
    """call(...) ends with a user's mistake, which is told in words that match these."""
    with pytest.raises(unified.UserError, match=words):
        call(*args, **options)


def golden(name):
    """A golden file's config, state_dict, inputs and outputs, as attributes."""
    return types.SimpleNamespace(**torch.load(GOLDEN / f"{name}.pt", weights_only=True))


def recorded(module, call, outputs=False):
    """call(), and what the module read or returned meanwhile."""
    seen = []
    with module.register_forward_hook(
            lambda module, args, output: seen.append(output if outputs else args[0].detach())):
        return call(), seen


def tokenizer(levels=3, codes=32, seed=0):
    """A VQGAN with fresh weights; stride 4 unless said otherwise."""
    torch.manual_seed(seed)
    return unified.VQGAN(codes, 8, 8, [1] * levels, 1, groups=4).eval()


def mage(image_size=16, vqgan=None, sharp=False, kind=unified.MAGE, **options):
    """A fresh MAGE, or another kind of it, in eval mode; 4 x 4 ids below 32 unless said otherwise. sharp:
    larger embeddings, so that its predictions differ."""
    vqgan = vqgan or tokenizer()
    torch.manual_seed(1)
    sizes = dict(width=32, depth=2, heads=4, decoder_width=24, decoder_depth=2, decoder_heads=3)
    model = kind(vqgan, image_size, **{**sizes, **options}).eval()
    if sharp:
        nn.init.normal_(model.token_emb.word_embeddings.weight)
    return model


def some_ids(model, n=4, seed=2):
    return torch.randint(model.codes, (n, model.length), generator=torch.Generator().manual_seed(seed))


def some_noise(*shape, seed=3):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def some_gauss(*shape, seed=5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_images(n=4, side=16, seed=4):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def image_set(n=6, side=16, scale=(0.2, 1.0)):
    images = torch.randint(256, (n, 3, side, side), generator=torch.Generator().manual_seed(0),
                           dtype=torch.uint8)
    return probe.ImageTensor(images, torch.arange(n) % 3, ["a", "b", "c"], scale)


def forbidden(*args, **kwargs):
    raise AssertionError("this must not run")


def failing(number, text):
    """A function of anything that fails as the system does, with this errno."""
    def fail(*args):
        raise OSError(number, text)
    return fail


# Every method of MODELS, at its smallest; and the examples for a method of one's own.

def shown_in_the_tutorial(first, lines):
    """All names of unified.py, and those that so many lines of its comments define, from the line `first`."""
    text, names = inspect.getsource(unified), {**vars(unified)}
    shown = text[text.index(f"#     {first}"):].split("\n")[:lines]
    exec("\n".join(line.removeprefix("#     ") for line in shown), names)
    return names


DENOISER = unified.Method(unified.Denoiser, {"tiny": {}}, unified.UMD_RECIPE, tokens="patches")
MASKGIT = shown_in_the_tutorial("class MaskGIT(TokenModel):", 35)["MaskGIT"]
METHODS = {**unified.MODELS, "denoiser": DENOISER,
           "maskgit": unified.Method(MASKGIT, {"tiny": {}}, unified.MAGE_RECIPE)}
EVERY = pytest.mark.parametrize("name", list(METHODS))
KINDS = list(unified.MODELS)
DECODES_IDS = [name for name, method in METHODS.items() if method.tokenizer]
TAKES_LABELS = [name for name, method in METHODS.items() if method.model.takes_labels]


def small(name, classes=0, size="tiny", tune=False):
    """A model of 32 x 32 pixels and 4 x 4 ids or patches. No weight is all zero, or nothing would depend on
    anything, and the targets that a predictor makes are sharp."""
    torch.manual_seed(1)
    ids = unified.tokenizer_config("toy", 8, 128) if METHODS[name].tokenizer else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(unified.MODELS, name, METHODS[name])
        model = unified.build(unified.model_config(name, size, 32, 4, ids, classes, tune))
    for key, p in model.named_parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
        if key.startswith("token_predictor.") and "word_embeddings" in key:
            nn.init.normal_(p)
    return model


def batch(name, n=4):
    """Images as a training step reads them: as many crops of each as the method wants."""
    return some_images(n * METHODS[name].views, 32).unflatten(0, (n, -1)).squeeze(1)


def corrupting(model):
    """A t at three tenths of the model's range."""
    most = model.t_range[1]
    return type(most)(0.3 * most)


def ways_to_sample(model, n=4):
    """Options of sample_steps: from nothing, and inpainting, as far as the model can."""
    known = dict(known=some_images(n, 32), mask=inpainting_masks()[0])
    return [{}] * model.generates + [known] * ("known" in inspect.signature(model.sample_steps).parameters)


def learn(model, x, steps, lr=3e-3, **draws):
    """Train on one batch whose random draws stay the same; returns the losses."""
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr), []
    for _ in range(steps):
        torch.manual_seed(0)
        loss, _ = model(x, **draws)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def inpainting_masks(side=32):
    """Four images' own masks: a square, a corner, one pixel, none. And how many of 8 x 8 ids each masks:
    those that it touches and a ring around them."""
    mask = torch.zeros(4, side, side, dtype=torch.bool)
    mask[0, 8:16, 8:16] = mask[1, :4, -4:] = mask[2, 13, 13] = True
    return mask, [16, 4, 9, 0]


# ------------------------------------------------------------------------------------------------------------
# 0. The files themselves


def test_no_function_is_longer_than_a_screen():
    for node in ast.walk(ast.parse((HERE / "unified.py").read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("name, needs", [("unified", {"torch", "numpy", "PIL"}),
                                         ("probe", {"torch", "numpy", "PIL", "tqdm", "unified"})])
def test_unified_needs_three_packages_and_the_scripts_one_more(name, needs):
    nodes = list(ast.walk(ast.parse((HERE / f"{name}.py").read_text())))
    names = [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    names += [n.module for n in nodes if isinstance(n, ast.ImportFrom)]
    packages = {name.split(".")[0] for name in names}
    assert packages - set(sys.stdlib_module_names) == needs


def test_the_tables_of_cifar10_are_made_of_the_logs():
    spec = importlib.util.spec_from_file_location("table", HERE / "assets" / "runs" / "table.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    features, samples, brief = table.tables(table.all_logs())
    assert f"\n\n{brief}\n\n" in (HERE / "README.md").read_text()
    page = (HERE / "assets" / "results.md").read_text()
    assert all(f"\n\n{made}\n\n" in page for made in (features, samples))
    assert [len(made.splitlines()) for made in (features, samples, brief)] == [14, 14, 17]


def test_nothing_stands_in_the_table_of_faults_without_a_test():
    table = (HERE / "assets" / "faults.md").read_text()
    cells = [row.split("|")[-2] for row in table.splitlines() if row.startswith("| ")]
    names = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    tests = [name for name in globals() if name.startswith("test_")]
    assert len(names) > 15 and [name for name in names if not any(name in test for test in tests)] == []


def test_a_method_that_is_declared_wrongly_fails_when_it_is_built(monkeypatch):
    class Half(unified.Model):
        def __init__(self, image_size, grid):
            super().__init__()
            self.image_size, self.layers = image_size, {}

    class Unlabelled(unified.Denoiser):
        takes_labels = True
    row = unified.Method(Half, {"tiny": {}}, unified.UMD_RECIPE, tokens="patches")
    monkeypatch.setitem(unified.MODELS, "half", row)
    with pytest.raises(TypeError, match="Half lacks best_layer, embed, features, sample_steps; "):
        unified.build(unified.model_config("half", "tiny", 32, 8))
    with pytest.raises(ValueError, match="the row of half in MODELS has no size base"):
        unified.model_config("half", "base", 32, 8)
    with pytest.raises(TypeError, match="Unlabelled lacks labels of sample_steps"):
        unified.complete(Unlabelled(32, 8))
    monkeypatch.setitem(unified.MODELS, "half", row._replace(tokens="pixels"))
    with pytest.raises(ValueError, match="its tokens, 'pixels', are none of"):
        unified.model_config("half", "tiny", 32, 8)


def test_no_two_tests_have_one_name():
    nodes = ast.parse(pathlib.Path(__file__).read_text()).body
    names = [node.name for node in nodes if isinstance(node, ast.FunctionDef)]
    assert sorted(names) == sorted(set(names))


# ------------------------------------------------------------------------------------------------------------
# 1. Attention


def test_fused_attention_is_the_equation():
    results = []
    for fused in (True, False):
        torch.manual_seed(0)                                            # the same weights and input
        layer, x = unified.Attention(32, 4, fused=fused), torch.randn(2, 9, 32, requires_grad=True)
        y = layer(x)
        results.append([y, *torch.autograd.grad((y * torch.randn(2, 9, 32)).sum(), [x, *layer.parameters()])])
    for ours, spelled_out in zip(*results):
        assert_close(ours, spelled_out, 1e-5)


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(),
                               reason="this kernel runs on a GPU, and there is none")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_attention_in_bfloat16_is_the_equation_in_float32(device):      # on a GPU by the fused kernel
    layer, x = unified.Attention(128, 4).to(device), torch.randn(4, 257, 128).to(device)
    with torch.autocast(device, torch.bfloat16):
        fused = layer(x)
    layer.fused = False
    assert fused.dtype == torch.bfloat16
    assert_close(fused, layer(x), 1e-2)                                 # a bfloat16 has three digits


def test_dropout_acts_in_each_place_in_training_and_nowhere_otherwise():
    """Constant weights make all outputs alike. Then zeros are dropout of the output, and what varies else
    of the inside: of the attention map, of the hidden layer."""
    for layer in (unified.Attention(32, 4, 0.5), unified.MLP(32, 64, 0.5)):
        for p in layer.parameters():
            nn.init.constant_(p, 0.1)
        y, dropped = layer.eval()(torch.ones(4, 9, 32)), layer.train()(torch.ones(4, 9, 32))
        assert_close(y, y[0, 0, 0].expand_as(y), 1e-5)
        assert 0.3 < (dropped == 0).float().mean() < 0.7 and dropped[dropped > 0].std() > 0.1 * y.mean()
    embedding, ids = unified.TokenEmbedding(5, 9, 32, 0.5), torch.zeros(4, 9, dtype=torch.long)
    assert embedding.eval()(ids).all() and 0.3 < (embedding.train()(ids) == 0).float().mean() < 0.7
    modules = list(mage().modules())
    assert {m.p for m in modules if isinstance(m, nn.Dropout)} == {0.1}     # as published
    assert {m.dropout for m in modules if isinstance(m, unified.Attention)} == {0.1}


# ------------------------------------------------------------------------------------------------------------
# 2. The tokenizer


def golden_vqgan():
    g = golden("vqgan")
    vqgan = unified.VQGAN(**unified.published_tokenizer(g.state_dict))
    vqgan.load_state_dict(g.state_dict)
    return g, vqgan.eval()


def test_golden_tokenizer_sizes_are_read_off_the_shapes():
    g, vqgan = golden_vqgan()
    config, official = unified.published_tokenizer(g.state_dict), g.config["ddconfig"]
    for ours, theirs in (("ch", "ch"), ("ch_mult", "ch_mult"), ("blocks", "num_res_blocks")):
        assert config[ours] == official[theirs]
    assert (config["codebook_size"], config["codebook_dim"]) == (g.config["n_embed"], g.config["embed_dim"])
    assert vqgan.stride == g.inputs["image"].size(-1) // g.outputs["indices"].size(-1)


def test_golden_tokenizer_turns_images_into_ids_and_back():
    g, vqgan = golden_vqgan()
    x, ids = g.inputs["image"], g.outputs["indices"]
    z, codes = vqgan.encoder(x), vqgan.quantize.lookup(ids)
    rounded = unified.straight_through(z, codes)
    assert codes.equal(g.outputs["codebook_entry"])
    assert_outputs(g.outputs, dict(
        pre_quant=z, indices=vqgan.encode(x), quant_straight_through=rounded,
        reconstruction=vqgan.decoder(rounded), decode_from_indices=vqgan.decode(ids),
        decode_random_indices=vqgan.decode(g.inputs["random_indices"])))


def test_golden_tokenizer_losses_and_their_gradients():
    g, vqgan = golden_vqgan()
    training = unified.TokenizerTraining(vqgan)
    (_, logs), [z] = recorded(vqgan.encoder, lambda: training(g.inputs["image"]), outputs=True)
    error = g.outputs["reconstruction"] - g.inputs["image"]
    assert_close(logs["l1"], error.abs().mean())
    assert_close(logs["l2"], (error ** 2).mean())
    # The legacy form has beta on the codebook's term; TokenizerTraining weighs them the right way round.
    weights = (1.0, g.config["beta"]) if g.config["legacy"] else (g.config["beta"], 1.0)
    loss = weights[0] * logs["commitment"] + weights[1] * logs["codebook"]
    rounded = unified.straight_through(z, vqgan.quantize.lookup(g.outputs["indices"]))
    upstream = loss + (rounded * g.inputs["grad_upstream"]).sum()
    grads = torch.autograd.grad(upstream, [z, vqgan.quantize.embedding.weight])
    assert_outputs(g.outputs, dict(quantizer_loss=loss, grad_z=grads[0], grad_codebook=grads[1]))


def test_distances_stay_in_float32_under_autocast():
    vqgan = tokenizer()
    z = vqgan.encoder(some_images())
    with torch.autocast("cpu", torch.bfloat16):
        lower = vqgan.quantize.distances(z)
    assert lower.dtype == torch.float32 and lower.equal(vqgan.quantize.distances(z))


def test_images_are_decoded_in_parts_if_they_are_many():
    vqgan, z = tokenizer(), torch.randn(4, 8, 4, 4)
    runs = [recorded(vqgan.decoder, lambda: vqgan.decode_codes(z, pixels))
            for pixels in (4 * 16 ** 2, 16 ** 2)]
    assert [[len(part) for part in seen] for _, seen in runs] == [[4], [1] * 4]
    assert_close(runs[1][0], runs[0][0], 1e-5)


def test_entropy_gap_lies_between_minus_ln_k_and_zero():
    K = 16
    undecided, all_the_same = torch.zeros(64, K), F.one_hot(torch.zeros(64).long(), K) * -1.0
    each_its_own = F.one_hot(torch.arange(64) % K, K) * -1.0
    assert abs(unified.entropy_loss(undecided)) < 1e-3    # no position is sure. (There is a 1e-5 in the log.)
    assert abs(unified.entropy_loss(all_the_same)) < 1e-3               # all are sure of the same code
    assert abs(unified.entropy_loss(each_its_own) + math.log(K)) < 1e-3
    assert -math.log(K) < unified.entropy_loss(torch.rand(64, K) * 0.05) < 0


def test_each_term_of_the_tokenizers_loss_moves_what_it_should():
    training = unified.TokenizerTraining(tokenizer())
    logs = training(some_images())[1]
    z, codes = training.vqgan.encoder.conv_out.weight, training.vqgan.quantize.embedding.weight
    for term, moved in [("commitment", (True, False)), ("codebook", (False, True)), ("l1", (True, False)),
                        ("l2", (True, False))]:
        grads = torch.autograd.grad(logs[term], [z, codes], retain_graph=True, allow_unused=True)
        assert tuple(g is not None and g.abs().max().item() > 0 for g in grads) == moved, term


def test_generator_and_discriminator_do_not_touch_each_other_and_none_outweighs_the_reconstruction():
    training = unified.TokenizerTraining(tokenizer())
    logs = training(some_images(), adversarial_weight=0.8)[1]
    names, parameters = zip(*training.named_parameters())
    for term, owner in [("generator", "vqgan"), ("discriminator", "discriminator")]:
        grads = torch.autograd.grad(logs[term], parameters, retain_graph=True, allow_unused=True)
        moved = {k.split(".")[0] for k, g in zip(names, grads) if g is not None and g.any()}
        assert moved == {owner}
    terms, last = (logs["generator"], logs["l1"] + logs["l2"]), training.vqgan.decoder.conv_out.weight
    lengths = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in terms]
    assert_close(*lengths, 1e-3)                                      # not equal: 1e-4 keeps the ratio finite


def test_the_tokenizers_loss_is_the_weighted_sum_of_its_terms():
    training = unified.TokenizerTraining(tokenizer())
    loss, logs = training(some_images(), adversarial_weight=0.8)
    weights = {**training.WEIGHTS, "generator": 0.8, "discriminator": 1.0}
    assert_close(loss, sum(weights[k] * logs[k] for k in weights), 1e-6)
    assert weights["commitment"] < weights["codebook"]                  # not the legacy form
    assert "generator" not in training(some_images())[1]                # in the warm-up no discriminator runs


def trained_tokenizer(entropy, monkeypatch):
    """60 steps on 64 shapes of 16 x 16 pixels: errors of the first and the last step, and how many of 64
    codes are used."""
    monkeypatch.setitem(unified.TokenizerTraining.WEIGHTS, "entropy", entropy)
    x = unified.draw_shapes(torch.arange(64), 16)[0].float() / 255
    training = unified.TokenizerTraining(tokenizer(codes=64))
    optimizer, errors = torch.optim.Adam(training.parameters(), 3e-3), []
    for _ in range(60):
        loss, logs = training(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(logs["l2"].item())
    return errors[0], errors[-1], len(training.vqgan.encode(x).unique())


def test_training_lowers_the_error_and_the_entropy_term_brings_codes_into_use(monkeypatch):
    first, last, used = trained_tokenizer(unified.TokenizerTraining.WEIGHTS["entropy"], monkeypatch)
    assert last < first / 10
    assert used > 1.5 * trained_tokenizer(0.0, monkeypatch)[2]


@pytest.mark.parametrize("size", ["toy", "tiny", "small"])
def test_flat_images_of_any_value_train(size):
    for value in (0.0, 1 / 255, 0.5, 1.0):
        torch.manual_seed(0)
        net = unified.TokenizerTraining(unified.VQGAN(**unified.tokenizer_config(size, 4, 32)))
        optimizer = torch.optim.AdamW(net.parameters(), 3e-4)
        losses = []
        for _ in range(4):
            loss, _ = net(torch.full((2, 3, 16, 16), value))
            loss.backward()
            losses.append(loss.item())
            assert torch.nn.utils.clip_grad_norm_(net.parameters(), 3.0).isfinite()
            optimizer.step()
            optimizer.zero_grad()
        assert min(losses[1:]) < losses[0]


def test_grain_is_for_flat_images_only_and_below_a_grey_level():
    x = some_images(3)
    x[1] = torch.tensor([0.2, 0.0, 0.7])[:, None, None]
    seen = unified.add_grain(x, some_noise(3, 3, 16, 16))
    assert seen[[0, 2]].equal(x[[0, 2]]) and 0 < (seen[1] - x[1]).abs().max() <= 0.5 / 255


# ------------------------------------------------------------------------------------------------------------
# 3. What every model offers. These tests hold for every row of MODELS, and so for a row that a fork adds, and
#    for the method that section 13 shows. What is true of one method alone stands beside that method.


@EVERY
@pytest.mark.parametrize("steps", [1, 3])
def test_sampling_takes_as_many_steps_as_it_says_and_ends_with_what_sample_returns(steps, name):
    model = small(name).eval()
    for options in ways_to_sample(model):
        states = list(model.sample_steps(4, steps=steps, **options))
        frames = torch.stack([model.render(state) for state in states])
        assert len(states) == model.num_steps(steps) and frames.shape[1:] == (4, 3, 32, 32)
        assert frames.dtype == torch.float32 and frames.min() >= 0 and frames.max() <= 1
        assert model.sample(4, steps=steps, **options).equal(frames[-1])
        assert all(not a.equal(b) for a, b in zip(frames, frames[1:]))


@EVERY
def test_an_images_seed_does_not_depend_on_its_company(name):
    model = small(name).eval()
    for options in ways_to_sample(model):
        def frames(rows, seeds, options=options):
            options = {key: v[rows] for key, v in options.items()}
            states = model.sample_steps(len(rows), steps=5, seeds=torch.tensor(seeds), **options)
            return torch.stack([model.render(state) for state in states])
        together = frames([0, 1, 0, 3], [3, 8, 3, -1])
        assert_close(frames([1], [8]), together[:, 1:2])        # another batch may be summed in another order
        assert_close(together[:, 0], together[:, 2])
        assert options or not together[-1, 0].allclose(together[-1, 1], atol=0.01)
        assert options or not together[-1, 0].allclose(together[-1, 3], atol=0.01)


@EVERY
def test_an_int_as_seeds_is_the_first_of_n(name):
    model = small(name).eval()
    if model.generates:
        for seeds, first in ((None, 0), (-1, -1)):
            given = torch.arange(first, first + 2, dtype=torch.int32)
            assert model.sample(2, steps=2, seeds=seeds).equal(model.sample(2, steps=2, seeds=given))
        assert not model.sample(2, steps=2).allclose(model.sample(2, steps=2, seeds=2))


@EVERY
def test_the_inpainting_mask_is_filled_and_known_pixels_stay(name):
    model = small(name).eval()
    for options in [options for options in ways_to_sample(model) if options]:
        known, mask = options["known"], options["mask"][:, None].expand(-1, 3, -1, -1)
        x = model.sample(4, steps=4, **options)
        assert_close(x[~mask], known[~mask], 1e-6)
        assert not x[mask].allclose(known[mask], atol=0.05)
        for i in range(4):                                   # each has its own mask, whatever the others have
            alone = {key: v[i:i + 1] for key, v in options.items()}
            assert_close(model.sample(1, steps=4, seeds=i, **alone), x[i:i + 1])
        other = model.sample(4, steps=4, **{**options, "known": torch.where(mask, 1 - known, known)})
        assert other.equal(x)                                           # what the mask covers is never read,
        other = model.sample(4, steps=4, **{**options, "known": torch.where(mask, known, 1 - known)})
        assert not other[mask].allclose(x[mask], atol=1e-3)             # and what is around it decides


@EVERY
def test_features_depend_less_on_the_noise_at_the_least_t_than_in_the_middle(name):
    model, x = small(name).eval(), some_images(4, 32)
    low, high, _ = model.t_range

    def spread(t):
        a, b = (model.features(x, t, noise=model.noise(torch.arange(4) + seed))[0] for seed in (0, 9))
        return (a - b).norm() / a.norm()
    assert low == high or spread(low) < 0.3 * spread(type(high)((low + high) / 2))


@EVERY
def test_features_have_the_shapes_that_layers_promises_in_the_order_asked_for(name):
    model, x = small(name).eval(), some_images(4, 32)
    options = dict(t=corrupting(model), noise=model.noise(torch.arange(4)))
    maps = model.features(x, layers=list(model.layers), **options)
    assert [tuple(m.shape[1:]) for m in maps] == list(model.layers.values())
    first, last = min(model.layers), max(model.layers)
    backwards = model.features(x, layers=[last, first], **options)
    assert backwards[0].equal(maps[-1]) and backwards[1].equal(maps[0])
    [best] = model.features(x, **options)
    assert best.equal(maps[list(model.layers).index(model.best_layer)])
    assert all(model.mirror(model.mirror(layer)) == layer for layer in model.layers)


@EVERY
def test_no_block_after_the_last_layer_asked_for_runs(name):
    model, x, ran = small(name).eval(), some_images(2, 32), []
    for module in model.modules():
        module.register_forward_hook(lambda module, args, output: ran.append(module))
    before = []
    for layer in model.layers:
        ran.clear()
        model.features(x, layers=[layer])
        # all that the layer before it needs, and more
        assert ran[:len(before)] == before and len(ran) > len(before)
        before = list(ran)


@EVERY
def test_added_maps_change_what_comes_after_them_and_pass_gradients_on(name):
    model, x, layers = small(name).eval(), some_images(4, 32), list(small(name).layers)
    options = dict(layers=layers, noise=model.noise(torch.arange(4)))
    for t in {0, corrupting(model)}:
        plain = model.features(x, t, **options)
        for b in layers[:-1]:
            extra = torch.randn(4, *model.layers[b], generator=torch.Generator().manual_seed(b),
                                requires_grad=True)
            maps = model.features(x, t, add={b: extra}, **options)
            same = [m.equal(p) for m, p in zip(maps, plain)]
            assert same == [layer < b for layer in layers]
            assert_close(maps[b - 1], plain[b - 1] + extra, 1e-6)
            maps[-1].square().sum().backward()
            assert t or (extra.grad != 0).any(1).all()          # it reaches every position, if none is masked
        zeros = {b: torch.zeros(4, *model.layers[b]) for b in layers}
        for again in (model.features(x, t, add=zeros, **options), model.features(x, t, **options)):
            assert all(m.equal(p) for m, p in zip(again, plain))        # nothing is left behind


@EVERY
def test_features_need_given_noise_to_be_repeatable(name):
    model, x, t = small(name).eval(), some_images(4, 32), corrupting(small(name))
    if t:
        noise = model.noise(torch.tensor([5, 6, 7, 8]))
        one, = model.features(x, t, noise=noise)
        assert one.equal(model.features(x, t, noise=noise)[0])
        assert not model.features(x, t)[0].allclose(model.features(x, t)[0])
        assert_close(model.features(x[2:3], t, noise=model.noise(torch.tensor([7])))[0], one[2:3])
        assert not model.features(x, t, noise=model.noise(torch.tensor([5, 6, 9, 8])))[0][2].allclose(one[2])


@EVERY
def test_every_pooling_embeds_an_image_whatever_its_company_and_can_be_learned_through(name):
    model, x, noise = small(name).eval(), some_images(4, 32), small(name).noise(torch.arange(4))
    for pool in model.pools:
        z = model.embed(x, noise, pool=pool)
        assert z.shape == (4, model.layers[model.best_layer][0]) and not z[0].allclose(z[1])
        assert_close(model.embed(x[1:2], noise[1:2], pool=pool), z[1:2])
        weights = [p for p in model.parameters() if p.requires_grad]
        assert any(g is not None and g.any()
                   for g in torch.autograd.grad(z.square().sum(), weights, allow_unused=True))
    assert model.embed(x, noise).equal(model.embed(x, noise, pool=model.pools[0]))


@EVERY
def test_every_trainable_parameter_gets_a_gradient_and_no_other(name):
    for classes in {0, 3 * METHODS[name].model.takes_labels}:
        model = small(name, classes).train()
        model(batch(name, 8), torch.arange(8) % 3 if classes else None)[0].backward()
        for key, p in model.named_parameters():
            assert p.grad.abs().max() > 0 if p.requires_grad else p.grad is None, key
        frozen = {key.split(".")[0] for key, p in model.named_parameters()
                  if key.startswith(("vqgan.", "token_pred"))}
        assert not any(p.requires_grad for key in frozen for p in getattr(model, key).parameters())


@EVERY
def test_one_batch_is_learned(name):
    losses = learn(small(name).train(), batch(name), steps=40)
    assert losses[-1] < 0.7 * losses[0]


@EVERY
def test_a_loss_is_drawn_anew_unless_the_seed_is_given(name):
    model, x = small(name).train(), batch(name)
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(model(x)[0].item())
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.tokenizer])
def test_pixels_and_their_cached_ids_give_the_same_loss(name):
    model, x = small(name).train(), batch(name)
    ids = model.to_ids(x.reshape(-1, 3, 32, 32)).view(*x.shape[:-3], -1)
    losses = []
    for v in (x, ids, ids.int(), torch.from_numpy(ids.numpy().astype(numpy.uint16))):
        torch.manual_seed(0)
        losses.append(model(v)[0])
    assert all(loss.equal(losses[0]) for loss in losses)
    torch.manual_seed(0)
    assert not model((ids + 1) % model.codes)[0].equal(losses[0])


@pytest.mark.parametrize("name", TAKES_LABELS)
def test_a_label_changes_the_loss_and_the_image_and_guidance_1_is_the_conditional_model(name):
    model, x = small(name, 3, tune=True).eval(), batch(name)
    losses, images = [], []
    for c in (None, 0, 2):
        torch.manual_seed(0)
        labels = c if c is None else torch.full((4,), c)
        losses.append(model(x, labels)[0].item())
        images.append(model.sample(4, steps=3, labels=labels))
    assert len(set(losses)) == 3 and not images[0].allclose(images[1]) and not images[1].allclose(images[2])
    assert model.sample(4, steps=3, labels=labels, guidance=1.0).equal(images[2])
    assert not model.sample(4, steps=3, labels=labels, guidance=3.0).allclose(images[2])


# ------------------------------------------------------------------------------------------------------------
# 4. Masking and unmasking


def test_the_mask_ratio_follows_the_truncated_normal_law():
    quantiles = {.01: .50347, .05: .51726, .10: .53437, .25: .58557, .50: .67567, .75: .78681, .90: .88478,
                 .95: .93232, .99: .98377}
    ratio = unified.truncated_normal(torch.tensor(list(quantiles)))
    assert (ratio - torch.tensor(list(quantiles.values()))).abs().max() < 1e-5  # scipy.stats.truncnorm
    spread = unified.truncated_normal((torch.arange(100_000).double() + 0.5) / 100_000)
    assert abs(spread.mean() - 0.69360) < 1e-5 and abs(spread.std() - 0.12859) < 1e-5
    assert_close(unified.truncated_normal(torch.tensor([0.0, 1.0])), [0.5, 1.0], 1e-6)
    assert spread.min() >= 0.5 and spread.max() <= 1.0


def test_ranks_are_places_in_the_sorted_row():
    rows = torch.tensor([[0.3, 0.1, 0.2], [5.0, 5.0, 1.0]])
    assert unified.rank_in_row(rows).tolist() == [[2, 0, 1], [1, 2, 0]]
    noise = some_noise(3, 50)
    for n in (0, 17, 50):
        smallest = unified.rank_in_row(noise) < n
        assert (smallest.sum(1) == n).all()
        inside, outside = noise.masked_fill(~smallest, -1).amax(1), noise.masked_fill(smallest, 2).amin(1)
        assert (inside < outside).all()


def counts_of(initial, steps):
    """num_masked after each step, for images that start with different numbers of masked ids."""
    counts = [torch.tensor(initial)]
    for t in range(1, steps + 1):
        counts.append(unified.num_masked(counts[0], counts[-1], t, steps))
    return torch.stack(counts[1:]).T.tolist()


def test_masked_ids_fall_along_the_cosine_image_by_image():
    assert counts_of([256], 12) == [[253, 247, 236, 221, 203, 181, 155, 128, 97, 66, 33, 1]]
    twenty = [255, 252, 248, 243, 236, 228, 218, 207, 194, 181, 166, 150, 133, 116, 97, 79, 59, 40, 20, 1]
    assert counts_of([256], 20) == [twenty]
    together = counts_of([256, 40, 3, 1, 0], 8)
    assert together == [counts_of([n], 8)[0] for n in (256, 40, 3, 1, 0)]
    assert together[2] == [2, 1, 1, 1, 1, 1, 1, 1]                # always one less, never none before the end
    assert together[3:] == [[1] * 8, [0] * 8]


def test_unmask_keeps_known_ids_and_masks_the_least_confident():
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.5, 0.5]]).expand(2, 4, 2)
    ids, mask = torch.tensor([[0, 0, 0, 1]] * 2), torch.tensor([[True, True, True, False]] * 2)
    u, noise = torch.tensor([[0.5, 0.5, 0.5, 0.1]] * 2), torch.zeros(2, 4)
    ids, mask = unified.unmask(p.log(), ids, mask, torch.tensor([1, 2]), u, noise)
    assert ids.tolist() == [[0, 0, 1, 1]] * 2                      # the last is known: 0.1 would have drawn 0
    assert mask.tolist() == [[False, True, False, False], [False, True, True, False]]
    noise[:, 0] = -5.0                                         # noise on the confidence turns the order round
    mask = unified.unmask(p.log(), ids, ~ids.eq(9), torch.tensor([1, 1]), u, noise)[1]
    assert mask.nonzero().tolist() == [[0, 0], [1, 0]]


def still_masked(state):
    """bool (n, L): the tokens without an id that counts."""
    return state.token_mask & (not state.last)


@pytest.mark.parametrize("name", DECODES_IDS)
def test_decoding_never_changes_a_known_id_and_ends_with_none_masked(name):
    model = small(name).eval()
    ids, mask = model.initial_state(3)[:2]
    for state in model.sample_steps(3, steps=8):
        assert not (state.token_mask & ~mask).any()                           # once known, known for good
        assert state.ids[~mask].equal(ids[~mask]) and (state.ids < model.codes).all()
        ids, mask = state.ids, still_masked(state)
    assert not mask.any()


@pytest.mark.parametrize("name", ["mage", "addp"])
def test_a_schedule_and_an_order_of_ones_own_decide_which_tokens_stay_masked(name):
    row_by_row = shown_in_the_tutorial("def row_by_row(confidence, mask, t):", 2)["row_by_row"]
    states = small(name).eval().sample_steps(2, steps=4, schedule=lambda t, T: 1 - t / T, order=row_by_row)
    for state, visible in zip(states, (4, 8, 12, 16), strict=True):
        assert still_masked(state).equal((torch.arange(16) >= visible).expand(2, -1))


def test_haltons_order_is_that_of_the_official_code_on_16_x_16_ids():
    """All 256 cells, row by row, as halton_sampler.py of valeoai/Halton-MaskGIT lists them."""
    assert bytes(sample.halton_cells(16).tolist()).hex() == (
        "854ac127ac63e81e9055db32b77df4098e41c62ba268ed149a5fd035ba71f70c8349ce20a66be2179d54d93fb176fc03"
        "884dc42aaf60e51b9257dc33b97ef0068b42c82da469ef11965cd338be75fa0f8045ca21a76ce3189e50d53bb277fd04"
        "894e26ab1d945adf30b57af2078c43c92ea066eb12975dd439bff648cd25aa6fe0159b52d73cb479fe01864bc228ad64"
        "e91f9156b8f50a8f40c5a167ec13995e36bb720d84dab002874cc329aee658dd347ff1a56a10955bd237bc74f90e8146"
        "cb22a86de41a9f51b378058a4fc061e71c93de7b8d44983a7047cc23a96e163dffea7cf3d173f8cfe19c53d83efbc72c"
        "a3eebd625931082f650b82240019d6b6")


@pytest.mark.parametrize("name", DECODES_IDS)
def test_in_haltons_order_tokens_are_kept_along_it_from_a_place_that_the_seed_decides(name):
    """Whatever their confidence, in any batch; where an image is inpainted, masked ones alone."""
    model, seeds, cells = small(name).eval(), torch.arange(20), sample.halton_cells(4).tolist()

    def kept(seeds, **inpainting):
        """For each image the tokens in the order in which they are kept, one in each of 16 steps."""
        order, before, found = sample.halton_order(4, seeds), None, [[] for _ in seeds]
        for state in model.sample_steps(len(seeds), steps=16, schedule="linear", temperature=0.0, order=order,
                                        seeds=seeds, **inpainting):
            for image, now in enumerate(still_masked(state)):
                was = torch.ones(16).bool() if before is None else before[image]
                new = (was & ~now).nonzero().flatten().tolist()
                assert len(new) == 1 or inpainting              # a linear schedule: one by one
                found[image] += new
            before = still_masked(state)
        return found
    found = kept(seeds)
    starts = [cells.index(order[0]) for order in found]
    assert found == [cells[start:] + cells[:start] for start in starts] and len(set(starts)) > 5
    others = kept(seeds + (1 << 32))                                        # those of --seed 1
    assert [cells.index(order[0]) for order in others] != starts
    assert kept(seeds[7:9]) == found[7:9]
    known, mask = some_noise(2, 3, 32, 32), torch.zeros(2, 32, 32).bool()
    mask[:, :4, :4] = True                                                  # tokens 0, 1, 4 and 5 are masked
    for order, image in zip(kept(seeds[:2], known=known, mask=mask), found):
        assert [i for i in order if i in (0, 1, 4, 5)] == [i for i in image if i in (0, 1, 4, 5)]


@pytest.mark.parametrize("name", DECODES_IDS)
def test_temperature_decides_which_ids_are_kept(name):
    model = small(name).eval()
    cold, hot = ([*model.sample_steps(4, steps=5, temperature=t)][2] for t in (0.0, 50.0))
    assert not cold.token_mask.equal(hot.token_mask)
    cold, hot = (next(model.sample_steps(4, steps=5, temperature=t)) for t in (0.0, 50.0))
    assert cold.ids.equal(hot.ids)                                 # the same predictions, others of them kept


# ------------------------------------------------------------------------------------------------------------
# 5. MAGE: training


def golden_mage():
    """The golden file, our model with its weights, and the names it holds that our model does not have."""
    g = golden("mage")
    heads = (g.config["num_heads"], g.config["decoder_num_heads"])
    config, state, dead = unified.published_mage(g.state_dict, heads=heads)
    fake = g.config["fake_class_label"] - g.config["codebook_size"]
    if fake != PUBLISHED_FAKE_CLASS:                              # else published_mage must know it by itself
        config["fake_class"] = fake
    model = unified.build(config)
    model.load_state_dict(state)
    return g, model.eval(), dead


def test_golden_model_sizes_are_read_off_the_file():
    g, model, _ = golden_mage()
    c = g.config
    assert [model.image_size, model.grid, model.length] == [c[k] for k in ("img_size", "grid", "seq_len")]
    ids = [model.codes, model.fake_id, model.mask_id, model.mask_id + 1]
    assert ids == [c[k] for k in ("codebook_size", "fake_class_label", "mask_token_label", "vocab_size")]
    widths = [c["embed_dim"]] * c["depth"] + [c["decoder_embed_dim"]] * c["decoder_depth"]
    assert list(model.layers.values()) == [(width, c["grid"], c["grid"]) for width in widths]
    heads = [b.attn.heads for b in [*model.blocks, *model.decoder_blocks]]
    assert heads == [c["num_heads"]] * c["depth"] + [c["decoder_num_heads"]] * c["decoder_depth"]
    eps = {k: m.eps for k, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    assert eps.pop("mlm_layer.ln") == c["mlm_ln_eps"] and set(eps.values()) == {c["norm_eps"]}
    assert model.best_layer == c["depth"]


WRITTEN = dict(label_smoothing=0.1, mask_ratio_min=0.5, mask_ratio_max=1.0, mask_ratio_mu=0.55,
               mask_ratio_std=0.25, mlp_ratio=4)


@pytest.mark.parametrize("name, more", [("mage", {}), ("addp", {"mask_grid_steps": 100})])
def test_golden_constants_are_those_written_into_unified(name, more):
    written, config = {**WRITTEN, **more}, golden(name).config
    assert {k: config[k] for k in written} == written


def masking(model, x, mask_ratio=None, mask_noise=None):
    """Ids of x, which of them are masked, and which enter the encoder, as in MAGE.forward."""
    ids = model.to_ids(x)
    mask_noise = torch.rand(ids.shape) if mask_noise is None else mask_noise
    mask_ratio = unified.truncated_normal(torch.rand(())) if mask_ratio is None else mask_ratio
    return ids, *unified.random_masking(mask_noise, mask_ratio)


def golden_step():
    """The golden training step, piece by piece: file, model, ids, mask, and which ids enter the encoder."""
    g, model, _ = golden_mage()
    return g, model, *masking(model, g.inputs["image"], g.inputs["mask_rate"], g.inputs["noise"])


def ids_predicted(model, x, vocab_size=None):
    """What the head of MAGE or ADDP makes of its decoder's output: logits of the codes, or of more ids."""
    weight = getattr(model.token_emb, "word_embeddings", model.token_emb).weight
    return model.mlm_layer(model.decoder_norm(x), weight[:vocab_size or model.codes])


def test_golden_ids_and_masks():
    g, model, ids, mask, ids_keep = golden_step()
    dropped, read = torch.ones_like(mask).scatter(1, ids_keep, False), model.input_ids(ids, mask)
    assert_outputs(g.outputs, dict(
        gt_indices=ids, token_all_mask=F.pad(mask, (1, 0)),             # column 0 is the class: never masked
        token_drop_mask=F.pad(dropped, (1, 0)),
        encoder_input_ids=torch.cat([read[:, :1], read[:, 1:].gather(1, ids_keep)], 1)))


def test_golden_latent_and_logits():
    g, model, ids, mask, ids_keep = golden_step()
    latent = model.encode(model.input_ids(ids, mask), ids_keep)
    x = model.decoder_input(latent, mask, ids_keep)
    for block in model.decoder_blocks:
        x = block(x)
    everything = ids_predicted(model, x, g.config["vocab_size"])        # the whole vocabulary, all positions
    codes = model.decode(latent, mask, ids_keep)
    assert_close(codes, everything[:, 1:, :model.codes], 1e-5)
    assert_outputs(g.outputs, dict(
        latent=latent, logits_at_positions=everything[:, g.inputs["logit_positions"]],
        logits_codebook_logsumexp=everything[..., :model.codes].logsumexp(-1),
        logits_at_target=codes.gather(2, ids[..., None])[..., 0]))


def test_golden_loss_and_gradients():
    g, model, dead = golden_mage()
    loss, _ = model(g.inputs["image"], mask_ratio=g.inputs["mask_rate"], mask_noise=g.inputs["noise"])
    loss.backward()
    assert_close(loss, g.outputs["loss"])
    grads = {k: p.grad for k, p in model.named_parameters()}
    norms = {k: grad.norm().item() for k, grad in grads.items() if grad is not None}
    assert norms == pytest.approx(g.outputs["grad_norms"], rel=1e-4, abs=0)
    dead = [k for k in dead if g.state_dict[k].is_floating_point()]   # position_ids is a buffer, no parameter
    assert set(dead) <= set(official("mage dead", w=1))
    without = [k for k, grad in grads.items() if grad is None] + dead
    assert sorted(without) == sorted(g.outputs["params_without_grad"])
    rows = grads["token_emb.word_embeddings.weight"].abs().sum(1).nonzero().flatten()
    assert rows.equal(g.outputs["word_embedding_rows_with_grad"])


@pytest.mark.parametrize("side", [16, 12])                              # 16 ids, and 9: an odd number
def test_exactly_half_of_the_tokens_never_enter_the_encoder(side):
    model = mage(side)
    for ratio in (0.5, 0.51, 0.77, 1.0):
        _, mask, ids_keep = masking(model, some_ids(model), ratio)
        _, [x] = recorded(model.blocks[0], lambda: model(some_ids(model), mask_ratio=ratio))
        assert (mask.sum(1) == math.ceil(model.length * ratio)).all()
        assert mask.scatter(1, ids_keep, True).all()                    # whoever stays outside is masked
        assert ids_keep.equal(ids_keep.sort(1).values)
        assert ids_keep.size(1) == model.length // 2 == x.size(1) - 1


def test_one_mask_ratio_is_drawn_for_the_batch():
    model = mage()
    counts = [masking(model, some_ids(model))[1].sum(1).unique() for _ in range(200)]
    assert all(len(c) == 1 for c in counts)
    assert set(torch.cat(counts).tolist()) == set(range(9, 17))         # ceil(16 r), 0.5 < r < 1


def test_the_loss_starts_at_ln_k_and_a_little_at_any_width():
    little = 0.02 ** 2 * 768 / 2                                        # half the variance of the logits
    for width in (32, 128):
        model = mage(width=width)
        assert abs(model(some_ids(model, 64))[1]["masked"].item() - math.log(model.codes) - little) < 0.1


def test_only_tokens_that_were_read_and_biases_of_codes_learn_from_the_prediction():
    model = mage(classes=3)
    ids, mask, _ = masking(model, some_ids(model), 0.8, some_noise(4, 16))
    model(ids, mask_ratio=0.8, mask_noise=some_noise(4, 16))[0].backward()
    # as output matrix the table gets no gradient
    read = set(ids[~mask].tolist()) | {model.fake_id, model.mask_id}
    grad = model.token_emb.word_embeddings.weight.grad
    assert set(grad.abs().sum(1).nonzero().flatten().tolist()) == read and len(read) < model.codes
    bias = model.mlm_layer.bias.grad[0, 0]
    assert (bias[:model.codes] != 0).all() and (bias[model.codes:] == 0).all()


def test_mage_learns_more_of_a_batch_than_where_ids_are_and_how_frequent():
    losses = learn(mage(), some_ids(mage(), 8), 100, 1e-2, mask_ratio=0.5, mask_noise=some_noise(8, 16))
    assert losses[-1] < 0.4 * losses[0]                      # an id's place alone leaves 0.53, frequency 0.92


def test_fresh_weights_are_drawn_as_the_authors_drew_them():
    vqgan = tokenizer()
    before = {k: v.clone() for k, v in vqgan.state_dict().items()}
    model = mage(vqgan=vqgan)
    qkv, table = model.blocks[0].attn.qkv, model.token_emb.word_embeddings.weight
    assert 0.95 < qkv.weight.abs().max() / math.sqrt(6 / (32 + 3 * 32)) <= 1  # Xavier; q, k, v are one matrix
    for table in (table, model.decoder_pos_embed_learned[0]):
        assert abs(table.std() / (0.02 * (768 / table.size(1)) ** 0.5) - 1) < 0.1  # 0.02 at the papers' width
    biases = [m.bias for m in model.modules() if isinstance(m, nn.Linear)] + [model.mlm_layer.bias]
    assert not any(b.any() for b in biases)
    assert all(v.equal(before[k]) for k, v in model.vqgan.state_dict().items())  # the tokenizer keeps its own


def test_a_state_dict_of_our_own_is_not_read_as_a_file_of_the_authors(tmp_path):
    for classes in (0, 10):
        state = unified.build(unified.model_config("mage", "base", 32, tokenizer=unified.tokenizer_config(
            "toy", 8, 32), classes=classes) | {"depth": 1, "decoder_depth": 1}).state_dict()
        torch.save(state, tmp_path / "own.pth")
        assert_refused(f"own.pth.* has {classes + 1} ids for labels, not 1,000", unified.load_model,
                       tmp_path / "own.pth")


def test_bytes_and_no_images_make_no_sheet():
    for x in (unified.draw_shapes(torch.arange(2), 8)[0], torch.zeros(0, 3, 8, 8)):
        with pytest.raises(ValueError, match="images must be float .*divide bytes by 255"):
            unified.image_grid(x)


def test_seeds_of_any_integer_type_draw_the_same_shapes():
    (x, y), *others = (unified.draw_shapes(torch.arange(20, dtype=kind), 8)
                       for kind in (torch.int64, torch.int32, torch.uint8))
    assert all(x.equal(other) and y.equal(labels) for other, labels in others)


def test_arguments_that_would_give_something_else_are_refused():
    model, guide = mage(classes=3).eval(), mage(classes=3)
    guide.vqgan.load_state_dict(model.vqgan.state_dict())
    x = torch.rand(1, 3, model.image_size, model.image_size)
    for words, call in (("fake_class is None or one of 3", lambda: mage(classes=3, fake_class=3)),
                        ("class_tokens is 1", lambda: unified.UMD(16, 4, 32, 1, 2, 1, 0.5, 0.75, 0.4, 0, 0)),
                        ("layers must be", lambda: model.features(x, layers=[])),
                        ("evaluation mode", lambda: model.sample(1, guide=guide.train(), guidance=2.0))):
        with pytest.raises(ValueError, match=words):
            call()
    assert model.sample(1, guide=guide.eval(), guidance=2.0, steps=2).shape == x.shape


class Passing(unified.Denoiser):
    def sample_steps(self, n, method="ddim", **options):
        assert method == "ddpm"
        yield from super().sample_steps(n, **options)


def test_a_subclass_may_pass_options_on_and_call_one_of_them_method():
    model, x = Passing(16, 4, 32, 1, 2).eval(), torch.rand(2, 3, 16, 16)
    hole = torch.zeros(2, 16, 16, dtype=torch.bool)
    hole[:, :4] = True
    painted = model.sample(2, method="ddpm", steps=2, known=x, mask=hole)
    assert_close(painted[:, :, 4:], x[:, :, 4:], 1e-6)


def test_noise_of_token_models_is_of_their_weights_type():
    model = mage().double()
    x = torch.rand(2, 3, model.image_size, model.image_size).double()
    assert model.features(x, t=0.5, noise=model.noise(torch.arange(2)))[0].dtype == torch.float64


def test_the_vocabulary_is_codes_classes_fake_class_and_mask():
    model = mage(classes=3)
    assert (model.codes, model.fake_id, model.mask_id) == (32, 35, 36)
    assert model.token_emb.word_embeddings.num_embeddings == 37
    shared = mage(classes=3, fake_class=1)                            # the published layout: no id of its own
    assert (shared.fake_id, shared.mask_id) == (33, 35)


# MAGE: labels


def test_labels_are_masked_in_a_tenth_of_the_images_in_training_only():
    model, n = mage(classes=3), 4000
    ids, labels = torch.zeros(n, 16, dtype=torch.long), torch.arange(n) % 3
    mask = torch.zeros(n, 16, dtype=torch.bool)
    assert model.input_ids(ids, mask, labels)[:, 0].equal(model.codes + labels)
    dropped = (model.train().input_ids(ids, mask, labels)[:, 0] == model.fake_id).float().mean().item()
    assert abs(dropped - 0.1) < 0.02
    kept = model.input_ids(ids, mask, labels, keep_label=labels == 1)[:, 0]
    assert kept.equal(torch.where(labels == 1, model.codes + 1, model.fake_id))


def test_guidance_exaggerates_what_the_label_changes():
    model = mage(classes=3, sharp=True)
    ids, mask, labels = some_ids(model, 2), torch.ones(2, 16, dtype=torch.bool), torch.tensor([0, 2])
    u, c = model.logits(ids, mask), model.logits(ids, mask, labels)
    assert (u - c).abs().amax((1, 2)).min() > 1e-2
    guided = model.guided_logits(unified.Decoding(ids, mask, mask.sum(1)), labels, 3.0)
    assert_close(guided, u + 3 * (c - u), 1e-5)


def test_guidance_grows_linearly_over_the_steps():
    model, used = mage(classes=3), []
    guided_logits = model.guided_logits

    def spy(state, labels, w, guide):
        used.append(w)
        return guided_logits(state, labels, w, guide)
    model.guided_logits = spy
    model.sample(1, steps=4, guidance=3.0, labels=torch.tensor([1]))
    assert used == [1.5, 2.0, 2.5, 3.0]


# Guidance of all models: a part of the way, and by a weaker model

GUIDED = [name for name, method in METHODS.items()
          if "guide" in inspect.signature(method.model.sample_steps).parameters and small(name).generates]


def twin(model):
    """The same network and tokenizer with other weights."""
    other = copy.deepcopy(model)
    torch.manual_seed(5)
    for key, p in other.named_parameters():
        if "vqgan." not in key:
            p.data.add_(0.1 * torch.randn_like(p))
    return other


def passes(model, **options):
    """How often sampling runs the last block of a model, or of its guide, in each step."""
    last, count, found = list(model.layers)[-1], 0, []
    def counted(*_):
        nonlocal count
        count += 1
    nets = [net for net in (model, options.get("guide")) if net is not None]
    blocks = [[*net.blocks, *getattr(net, "decoder_blocks", ())][last - 1] for net in nets]
    with contextlib.ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.register_forward_hook(counted))
        for _ in model.sample_steps(2, steps=4, **options):
            found.append(count)
            count = 0
    return found


@pytest.mark.parametrize("name", GUIDED)
def test_outside_its_interval_guidance_changes_nothing_and_saves_a_pass(name):
    model, guide = small(name).eval(), twin(small(name).eval())
    alone = passes(model)
    whole, half = (passes(model, guide=guide, guidance=2.0, guidance_interval=interval)
                   for interval in ((0.0, 1.0), (0.4, 0.7)))
    assert whole == [2 * count for count in alone]
    guided = [count // one for count, one in zip(half, alone)]
    if isinstance(model, unified.UMD):                                  # timesteps 1000, 750, 500, 250 and 1
        assert guided == [1, 1, 2, 1, 1]
    elif isinstance(model, (unified.MAGE, unified.ADM)):                # 0, a third or half of the way, more
        assert guided == [1, 1, 2, 1]
    assert sorted(set(guided)) == [1, 2]
    plain, late = (model.sample(2, steps=4, guide=guide, guidance=w, guidance_interval=(0.9995, 1.0))
                   for w in (1.0, 2.0))
    assert plain.equal(late) and plain.equal(model.sample(2, steps=4))


@pytest.mark.parametrize("name", TAKES_LABELS)
def test_of_labels_too_only_steps_in_the_interval_are_guided(name):
    model, labels = small(name, 3, tune=True).eval(), torch.tensor([0, 2])
    if model.generates:
        options = dict(labels=labels, guidance=3.0)
        whole, half = (passes(model, **options, guidance_interval=part) for part in ((0.0, 1.0), (0.0, 0.3)))
        alone = passes(model, labels=labels)
        assert whole == [2 * count for count in alone] and half == whole[:2] + alone[2:]


@pytest.mark.parametrize("name", GUIDED)
def test_a_guide_is_moved_away_from_and_at_weight_0_alone_decides(name):
    model, guide = small(name).eval(), twin(small(name).eval())
    once = {"steps": 1} if model.tokenizer else {"steps": 3}                    # there w grows from 1
    once |= {"eta": 0.0} if "eta" in inspect.signature(model.sample_steps).parameters else {}
    plain, other = (net.sample(3, **once) for net in (model, guide))
    towards, away = (model.sample(3, **once, guide=guide, guidance=w) for w in (0.0, 2.0))
    assert_close(towards, other, 1e-5)
    assert not plain.allclose(other, atol=1e-3) and not plain.allclose(away, atol=1e-3)
    assert_close(model.sample(3, **once, guide=model, guidance=2.0), plain, 1e-4)
    alone = model.sample(1, **once, seeds=torch.tensor([2]), guide=guide, guidance=2.0)
    assert_close(alone, away[2:], 1e-4)                                 # as it is in company


@pytest.mark.parametrize("name", GUIDED)
def test_a_guide_of_another_kind_size_or_tokenizer_is_refused(name):
    model = small(name).eval()
    strangers = [small("adm" if name != "adm" else "umd").eval(), nn.Linear(1, 1)]
    if METHODS[name].model.takes_labels:
        strangers.append(small(name, 3).eval())
    if model.tokenizer:
        strangers.append(twin(model))
        strangers[-1].vqgan.encoder.conv_in.weight.data.add_(0.01)
    if name == "adm":
        strangers.append(copy.copy(model))
        strangers[-1].alpha_bar = unified.noise_schedule("linear")
    for guide in strangers:
        with pytest.raises(ValueError, match="^guide must be"):
            model.sample(2, steps=2, guide=guide, guidance=2.0)
    with pytest.raises(ValueError, match="^guidance must be 1"):
        model.sample(2, steps=2, guidance=2.0)


# MAGE: generation


def replayed(monkeypatch, sampled, gumbel):
    """Make the decoding loop draw these ids (steps, n, L) and this Gumbel noise; returns a list that fills
    with what each step reads, the ids it sampled, and what it masked again.

    The ids that the official sampler drew go back in through the front door, as the middle of their slice
    of (0, 1)."""
    unmask, steps = unified.unmask, []

    def replay(logits, ids, mask, count, u, noise, *args, **more):
        drawn = sampled[len(steps)][..., None]
        cdf = F.pad(logits.double().softmax(-1).cumsum(-1), (1, 0))
        u = ((cdf.gather(-1, drawn) + cdf.gather(-1, drawn + 1)) / 2)[..., 0].float()
        step = types.SimpleNamespace(logits=logits, ids=ids, mask=mask, count=count, u=u, noise=noise)
        step.sampled, step.again = unmask(logits, ids, mask, count, u, noise, *args, **more)
        steps.append(step)
        return step.sampled, step.again
    monkeypatch.setattr(unified, "unmask", replay)
    monkeypatch.setattr(unified, "to_gumbel", lambda u: gumbel[len(steps)].float())
    return steps


@pytest.fixture
def decoding(monkeypatch):
    """The golden decoding, replayed by our sample_steps with its draws: file, model, its steps, states."""
    g, model, _ = golden_mage()
    steps = replayed(monkeypatch, g.inputs["gen_categorical_samples"], g.inputs["gen_gumbel"])
    n, rounds = g.inputs["gen_gumbel"].size(1), g.inputs["gen_num_iter"]
    states = list(model.sample_steps(n, rounds, temperature=g.inputs["gen_choice_temperature"]))
    assert len(states) == len(steps) == rounds
    return g, model, steps, states


def test_golden_decoding_step_by_step(decoding):
    g, model, steps, _ = decoding
    rows = g.outputs["gen_logits_first_step_image0"]
    stride = 8 if len(range(0, model.length, 8)) == len(rows) else model.length // len(rows)
    assert_close(steps[0].logits[0, ::stride], rows)
    names = ("input_ids", "sampled_ids", "masking", "next_ids", "logits_logsumexp", "selected_probs",
             "mask_len", "temperature")
    for i, s in enumerate(steps):
        theirs = {f"gen_{name}": g.outputs[f"gen_{name}"][i] for name in names}
        assert_outputs(theirs, dict(
            gen_input_ids=s.ids.masked_fill(s.mask, model.mask_id), gen_sampled_ids=s.sampled,
            gen_masking=s.again, gen_next_ids=s.sampled.masked_fill(s.again, model.mask_id),
            gen_logits_logsumexp=s.logits.logsumexp(-1)))
        drawn = unified.sample_categorical(s.logits.softmax(-1), s.u)
        assert drawn.equal(g.inputs["gen_categorical_samples"][i])
        official = theirs["gen_selected_probs"]
        p = s.logits.softmax(-1).gather(-1, s.sampled[..., None])[..., 0]
        assert official.isinf().equal(~s.mask)                          # what was known before is certain
        assert_close(p[s.mask], official[s.mask])
        assert set(s.count.tolist()) == set(s.again.sum(1).tolist()) == {theirs["gen_mask_len"]}
        noise = theirs["gen_temperature"] * g.inputs["gen_gumbel"][i]
        assert_close(s.noise, noise, 1e-4 if i + 1 < len(steps) else 0)  # the last step has no noise


def test_golden_decoding_ends_with_the_image(decoding):
    g, model, _, states = decoding
    assert states[-1].ids.unflatten(1, (model.grid, model.grid)).equal(g.outputs["gen_final_ids"])
    assert_close(model.vqgan.decode(g.outputs["gen_final_ids"]), g.outputs["gen_image"])
    assert_close(model.render(states[-1]), g.outputs["gen_image"].clamp(0, 1))


def test_a_film_shows_fewer_masked_ids_in_every_frame():
    model = mage(sharp=True)
    states = list(model.sample_steps(2, steps=5))
    counts = torch.stack([still_masked(s).sum(1) for s in states])
    assert (counts.diff(dim=0) < 0).all()
    dark = torch.stack([(model.render(s) == 0.2).all(1).sum((1, 2)) for s in states])  # masked ids are dark
    assert dark.equal(counts * model.vqgan.stride ** 2)


@pytest.mark.parametrize("name", ["mage", "addp"])
def test_the_ids_that_an_inpainting_mask_touches_are_masked_and_a_ring_of_one(name):
    build = dict(mage=mage, addp=addp)[name]
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)                     # as 256 pixels at stride 16
    mask[0, 16:48, 16:48] = True                                        # pixels 64 - 191 there
    masked = build(64).initial_state(1, some_images(1, 64), mask)[1].unflatten(1, (16, 16))
    assert masked.any(2)[0].nonzero().flatten().tolist() == list(range(3, 13))  # tokens 3 - 12, not 4 - 11
    model, known, (mask, counts) = build(32, sharp=True), some_images(4, 32), inpainting_masks()
    ids, masked = model.initial_state(4, known, mask)[:2]
    assert masked.sum(1).tolist() == counts
    assert ids.equal(model.to_ids(known * ~mask[:, None]))        # what it covers never reaches the tokenizer
    states = list(model.sample_steps(4, steps=4, known=known, mask=mask))
    for state in states:
        assert state.ids[~masked].equal(ids[~masked]) and not (state.token_mask & ~masked).any()
    x = model.render(states[-1])
    assert x.movedim(1, -1)[~mask].equal(known.movedim(1, -1)[~mask])
    if name == "mage":
        left = torch.stack([still_masked(state).sum(1) for state in states]).T.tolist()
        assert left[:3] == [c[:-1] + [0] for c in counts_of(counts[:3], 4)] and left[3] == [0] * 4


# MAGE: representation


def test_golden_features():
    g, model, _ = golden_mage()
    pooled = model.features(g.inputs["image"])[0].mean((2, 3))          # without the class, before any norm
    fc_norm, head = ([g.inputs[f"{name}_{part}"] for part in ("weight", "bias")]
                     for name in ("finetune_fc_norm", "probe_head"))
    tuned = F.layer_norm(pooled, pooled.shape[1:], *fc_norm, eps=g.config["norm_eps"])
    assert_outputs(g.outputs, dict(
        pooled_tokens=pooled, probe_features=model.embed(g.inputs["image"]),
        cls_features=model.embed(g.inputs["image"], pool="class"), finetune_features=tuned,
        finetune_logits=F.linear(tuned, *head)))


def test_golden_probe():
    g, model, _ = golden_mage()
    classes, dim = g.inputs["probe_head_weight"].shape
    head, z = probe.ProbeHead(dim, classes), model.embed(g.inputs["image"])
    head.linear.load_state_dict({k: g.inputs[f"probe_head_{k}"] for k in ("weight", "bias")})
    statistics = {k: g.inputs[f"probe_bn_{k}"] for k in ("running_mean", "running_var")}
    head.norm.load_state_dict(statistics, strict=False)
    assert [name for name, _ in head.named_parameters()] == ["linear.weight", "linear.bias"]
    assert_outputs(g.outputs, dict(
        probe_logits=head.eval()(z), probe_logits_train_bn=head.train()(z),
        probe_bn_running_mean_after=head.norm.running_mean, probe_bn_running_var_after=head.norm.running_var))


def test_golden_lars():
    g = golden("mage")
    given = g.inputs["lars"]
    for key in [k for k in g.outputs["lars"] if k.startswith("weight")]:
        weight, bias = (nn.Parameter(given[k].clone()) for k in ("weight", "bias"))
        optimizer = probe.LARS([weight, bias], lr=given["lr"], weight_decay=float(key.split("wd")[1]),
                               momentum=given["momentum"], trust=given["trust_coefficient"])
        for weight.grad, bias.grad in zip(given["grad_weight"].clone(), given["grad_bias"].clone()):
            optimizer.step()
        assert_outputs(g.outputs["lars"], {key: weight, key.replace("weight", "bias"): bias})


def test_mages_layers_are_the_encoders_and_the_decoders_and_the_head_reads_the_last():
    model, ids, noise = mage(), some_ids(mage()), some_noise(4, 16)
    assert model.layers == {1: (32, 4, 4), 2: (32, 4, 4), 3: (24, 4, 4), 4: (24, 4, 4)}
    assert model.best_layer == 2
    assert [model.mirror(b) for b in model.layers] == [4, 3, 2, 1]
    [last] = model.features(ids, 0.5, layers=[max(model.layers)], noise=noise)
    logits = model.logits(ids, unified.rank_in_row(noise) < 8)
    assert_close(ids_predicted(model, last.flatten(2).mT), logits, 1e-5)


def test_t_is_the_ratio_of_ids_that_are_masked():
    model, noise = mage(sharp=True), some_noise(1, 16)
    ids = some_ids(model, 1)
    changed = torch.where(torch.eye(16).bool(), (ids + 1) % model.codes, ids)  # row j differs in id j only
    for t in (0.0, 0.3, 0.75):
        base = model.features(ids, t, noise=noise)[0]
        [maps] = model.features(changed, t, noise=noise.expand(16, -1))
        moved = (maps - base).abs().amax((1, 2, 3)) > 1e-4
        assert moved.equal(unified.rank_in_row(noise)[0] >= math.ceil(16 * t))


def test_embed_is_the_normed_mean_of_the_features():
    model, x = mage(), some_images()
    read = model.input_ids(model.to_ids(x), torch.zeros(4, 16, dtype=torch.bool))
    assert model.embed(x, pool="class").equal(model.encode(read)[:, 0])
    features = model.features(x)[0]
    for size in (1, 1e-3):                                        # so small that the norm's eps of 1e-6 shows
        model.features = lambda x: [size * features]
        pooled = size * features.mean((2, 3))
        pooled = pooled - pooled.mean(1, keepdim=True)
        assert_close(model.embed(x), pooled / (pooled.square().mean(1, keepdim=True) + 1e-6).sqrt(), 1e-5)


# ------------------------------------------------------------------------------------------------------------
# 6. MAGE-C and MAGE-E


def unit_vectors(B, width=6):
    torch.manual_seed(0)
    return F.normalize(torch.randn(B, 2, width), dim=-1)


def test_info_nce_is_the_equation_written_out():
    z, B = unit_vectors(5), 5
    views, terms = [(i, v) for i in range(B) for v in (0, 1)], []
    for i, v in views:
        similarity = {other: math.exp(z[i, v] @ z[other] / 0.2) for other in views if other != (i, v)}
        terms.append(-math.log(similarity[i, 1 - v] / sum(similarity.values())))
    assert_close(unified.info_nce(z), sum(terms) / (2 * B), 1e-5)
    assert_close(unified.info_nce(z), unified.info_nce(z.flip(1)), 1e-6)  # neither view is special


def contrast_worker(folder, z):
    unified.join_processes("cpu")
    rank, world = unified.rank_and_world()
    mine = z.chunk(world)[rank].clone().requires_grad_()
    loss = unified.info_nce(mine) if z.dim() == 3 else echo_loss(mine)
    loss.backward()
    torch.save((loss.detach(), mine.grad), f"{folder}/{rank}.pt")
    unified.leave_processes()


def echo_loss(z):
    """MAGE-E's loss of unit vectors z (B, 4), whose echoes are they themselves, turned by a quarter."""
    return unified.echo_nce(z, z.detach().roll(1, 1))


@pytest.mark.parametrize("law", [unified.info_nce, echo_loss])
def test_contrast_over_two_processes_is_contrast_over_one(law, tmp_path):
    z = (unit_vectors(4) if law is unified.info_nce else unit_vectors(4)[:, 0]).requires_grad_()
    loss = law(z)
    loss.backward()
    both(tmp_path, contrast_worker, tmp_path, z.detach())
    losses, grads = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)))
    assert_close(torch.stack(losses).mean(), loss, 1e-6)
    assert_close(torch.cat(grads) / 2, z.grad, 1e-5)                    # DDP takes the mean over processes


def test_two_views_are_masked_apart_and_compared():
    model = mage(kind=unified.ContrastiveMAGE)
    x, noise = some_ids(model, 6).unflatten(0, (3, 2)), some_noise(6, 16)
    draws = dict(mask_ratio=0.6, mask_noise=noise)
    (loss, logs), [latent] = recorded(model.norm, lambda: model(x, **draws), outputs=True)
    z = F.normalize(model.projection(latent[:, 1:].mean(1)), dim=-1)    # the class position has no part in it
    assert_close(logs["contrast"], unified.info_nce(z.unflatten(0, (3, 2))), 1e-6)
    assert_close(logs["masked"], model(x.flatten(0, 1), **draws)[0], 1e-6)
    assert_close(loss, logs["masked"] + 0.1 * logs["contrast"], 1e-6)


def test_one_view_is_plain_mage():
    x = some_images()
    draws = dict(mask_ratio=0.6, mask_noise=some_noise(4, 16))
    loss, logs = mage(kind=unified.ContrastiveMAGE)(x, **draws)
    assert "contrast" not in logs and loss == mage()(x, **draws)[0]


def mage_e(**options):
    """A fresh MAGE-E in eval mode; 4 x 4 ids below 32. Its teacher differs from it."""
    model = mage(kind=unified.EchoMAGE, **options)
    for p in model.teacher.parameters():
        p.add_(0.05 * torch.randn(p.shape))
    return model


def read_by_the_teacher(model, logits, ids, mask):
    """Echoes (B, L), [MASK] where they have no id, and the teacher's vectors of them."""
    e, [seen] = recorded(model.teacher[0], lambda: model.echo(logits, ids, mask))
    assert (seen[:, 0] == model.fake_id).all()
    return seen[:, 1:], e


def test_echoes_keep_visible_ids_and_draw_masked_ones_from_the_decoders_logits_but_never_the_best():
    model, B = mage_e(), 4000
    ids, mask = some_ids(model, B), some_noise(B, 16) < 0.6
    logits = 2 * some_gauss(16, 32).expand(B, -1, -1)                   # the same for all images
    parts = zip(logits.split(500), ids.split(500), mask.split(500))                 # each has its own square
    echo = torch.cat([read_by_the_teacher(model, *part)[0] for part in parts])
    kept = echo != model.mask_id
    assert echo[kept & ~mask].equal(ids[kept & ~mask]) and 0.2 < kept.float().mean() < 0.8
    for place in range(16):
        drawn = echo[:, place][kept[:, place] & mask[:, place]]
        found = F.one_hot(drawn, 32).float().mean(0)
        best = logits[0, place].argsort(descending=True)[1:16]
        wanted = torch.zeros(32).scatter(0, best, logits[0, place, best].softmax(0))
        assert not found[wanted == 0].any() and (found - wanted).abs().max() < 0.06


def test_an_echo_is_a_square_of_half_to_all_of_the_side_as_large_for_all_images_and_anywhere():
    model, places = mage_e(), set()
    for seed in range(20):
        torch.manual_seed(seed)
        echo, _ = read_by_the_teacher(model, torch.zeros(50, 16, 32), some_ids(model, 50),
                                      torch.zeros(50, 16, dtype=torch.bool))
        kept, sides = (echo != model.mask_id).unflatten(1, (4, 4)), set()
        for square in kept:
            rows, columns = (square.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
            top, left, side = rows[0], columns[0], len(rows)
            assert square[top:top + side, left:left + side].all() and square.sum() == side ** 2
            sides.add(side)
            places.add((side, top, left))
        assert len(sides) == 1
    assert places == {(side, top, left) for side in (2, 3, 4)
                      for top in range(5 - side) for left in range(5 - side)}


def test_the_loss_of_echoes_is_the_equation_written_out():
    model, x, seen = mage_e(), some_ids(mage_e(), 5), []
    draws = dict(mask_ratio=0.6, mask_noise=some_noise(5, 16))
    model.teacher[1].register_forward_hook(lambda layer, args, e: seen.append(e))
    (loss, logs), [latent] = recorded(model.norm, lambda: model(x, **draws), outputs=True)
    z = F.normalize(model.prediction(model.projection(latent[:, 1:].mean(1))), dim=-1)
    similarity = (F.normalize(seen[0], dim=-1) @ z.T / 0.3).exp()
    assert_close(logs["contrast"], -sum((similarity[a, a] / similarity[a].sum()).log() for a in range(5)) / 5)
    plain = mage()
    plain.load_state_dict(model.state_dict(), strict=False)
    assert_close(logs["masked"], plain(x, **draws)[0], 1e-6)
    assert_close(loss, logs["masked"] + 0.1 * logs["contrast"], 1e-6)


def test_the_teacher_reads_like_the_encoder_without_gradient_or_dropout():
    model = mage_e(dropout=0.5).train()
    ids, mask = some_ids(model), torch.arange(16) < torch.tensor([[0], [5], [10], [16]])
    logits = torch.zeros(4, 16, 32, requires_grad=True)
    for _ in range(2):
        torch.manual_seed(0)
        echo, e = read_by_the_teacher(model, logits, ids, mask)
    twin = mage_e()
    parts = (twin.token_emb, twin.blocks, twin.norm, twin.projection)
    with torch.no_grad():
        for p, average in zip(nn.ModuleList(parts).parameters(), model.teacher.parameters()):
            p.copy_(average)
    latent = twin.encode(twin.input_ids(echo, echo == twin.mask_id))
    assert_close(e, F.normalize(twin.projection(latent[:, 1:].mean(1)), dim=-1), 1e-5)
    assert logits.requires_grad and not e.requires_grad


def train_echoes(folder, model, stop_before=None, after_step=None):
    """Three steps of two micro-batches; or an unreadable image ends them before the step stop_before."""
    ids = torch.randint(model.codes, (32, 1, 16), generator=torch.Generator().manual_seed(0))

    def batches(plan):
        for i, batch in enumerate(train.cached_batches(ids, torch.zeros(32), plan)):
            if i // 2 == stop_before:
                raise unified.UserError("an image")
            yield batch
    cfg = train.settings(train.Config(device="cpu", compile=False, eval_every=0, out_dir=str(folder)))
    recipe = {**unified.MAGE_RECIPE, "steps": 3, "views": 1, "lr": 1e-3, "batch_size": 8, "micro_batch": 4}
    train.train(cfg, "model", model, recipe, image_set(32), batches, {}, None, lambda step, first: {},
                after_step or model.after_step)


def test_the_teacher_starts_as_the_encoder_and_follows_it_once_in_each_step(tmp_path):
    fresh, model = (unified.EchoMAGE(tokenizer(), 16, 32, 2, 4, 24, 2, 3, contrastive=0.1), mage_e())
    for net in (fresh, model):
        ours = [*nn.ModuleList([net.token_emb, net.blocks, net.norm, net.projection]).parameters()]
        same = [p.equal(average) for p, average in zip(ours, net.teacher.parameters(), strict=True)]
        assert all(same) or net is model
    wanted, seen = [p.clone() for p in model.teacher.parameters()], []

    def after_step():
        seen.append([p.detach().clone() for p in ours])
        model.after_step()
    train_echoes(tmp_path, model, after_step=after_step)
    for weights in seen:
        wanted = [0.996 * average + 0.004 * p for average, p in zip(wanted, weights)]
    assert len(seen) == 3 and not seen[0][0].equal(seen[2][0])
    for average, w in zip(model.teacher.parameters(), wanted):
        assert_close(average, w, 1e-5)


def test_a_teacher_goes_on_where_it_was(tmp_path):
    whole, first, second = (mage_e() for _ in range(3))
    train_echoes(tmp_path / "whole", whole)
    assert_refused("an image", train_echoes, tmp_path / "parts", first, stop_before=2)
    train_echoes(tmp_path / "parts", second)
    assert all(v.equal(second.state_dict()[name]) for name, v in whole.state_dict().items())


# ------------------------------------------------------------------------------------------------------------
# 7. ADDP


def golden_addp():
    """The golden file, our model with its weights, and the names it holds that our model does not have."""
    g = golden("addp")
    c = g.config
    heads, predictor = ((c[of + "num_heads"], c[of + "decoder_num_heads"]) for of in ("", "mage_"))
    config, state, dead = unified.published_addp(g.state_dict, heads, predictor)
    fake = c["fake_class_label"] - c["codebook_size"]
    if fake != PUBLISHED_FAKE_CLASS:                              # else published_mage must know it by itself
        config["predictor"]["fake_class"] = fake
    model = unified.build(config)
    model.load_state_dict(state)
    return g, model.eval(), dead


def test_golden_addp_sizes_are_read_off_the_file():
    g, model, dead = golden_addp()
    c, predictor = g.config, model.token_predictor
    side = c["img_size"] // c["patch_size"]
    sizes = [model.image_size, model.vqgan.stride, model.length]
    assert sizes == [c[k] for k in ("img_size", "patch_size", "num_tokens")]
    ids = [model.codes, predictor.fake_id, predictor.mask_id]
    assert ids == [c[k] for k in ("codebook_size", "fake_class_label", "mask_token_label")]
    assert model.token_emb.weight.shape == (c["vocab_size"], c["embed_dim"])
    widths = [c["embed_dim"]] * c["depth"] + [c["decoder_embed_dim"]] * c["decoder_depth"]
    assert list(model.layers.values()) == [(width, side, side) for width in widths] and model.grid == side
    for net, of in ((model, ""), (predictor, "mage_")):
        heads = [block.attn.heads for block in [*net.blocks, *net.decoder_blocks]]
        theirs = [[c[of + part + "num_heads"]] * c[of + part + "depth"] for part in ("", "decoder_")]
        assert heads == sum(theirs, [])
    assert predictor.vqgan is model.vqgan and set(dead) | model.state_dict().keys() == g.state_dict.keys()
    # the numbers would not show most
    eps = {k: m.eps for k, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    assert all(v == (1e-5 if k.endswith("mlm_layer.ln") else 1e-6) for k, v in eps.items())


def test_golden_addp_mask_ratios():
    theirs = golden("addp").outputs["mask_schedule"]
    ratio, weight = unified.nested_mask_ratios()
    assert ratio.tolist() == pytest.approx(theirs["ratios"].tolist(), abs=1e-7)
    assert weight.tolist() == pytest.approx(theirs["probs"].tolist(), rel=1e-6)  # theirs: ratios in float32


def nested_masks(model, x, *how):
    """Ids of x, and ADDP.nested_masks of them."""
    ids = model.to_ids(x)
    return ids, *model.nested_masks(ids, *how)


def addp_loss(model, given):
    return model(given["image"], index=given["mask_ratio_index"], gap=given["index_offset"],
                 mask_noise=given["noise"])[0]


def code_map(model, tokens):
    """(B, L, C) -> (B, C, h, w), the layout of the official tensors."""
    return tokens.mT.unflatten(2, (model.grid, model.grid))


@pytest.mark.parametrize("case", ["train", "train_all_masked"])
def test_golden_addp_training_step_piece_by_piece(case):
    g, model, _ = golden_addp()
    given, theirs, codes = g.inputs[case], g.outputs[case], model.vqgan.quantize.embedding.weight
    how = [given[k] for k in ("image", "mask_ratio_index", "index_offset", "noise")]
    ids, mask, earlier, visible = nested_masks(model, *how)
    assert set((~mask).sum(1).tolist()) == {visible}
    r, q = (model.token_predictor.logits(ids, m) for m in (earlier, mask))
    xt, z = recorded(model.vqgan.decoder, lambda: model.next_image(ids, mask, r))
    latent = model.encode(theirs["x_t"])
    x = model.decoder_input(latent, ids, mask, visible)
    for block in model.decoder_blocks:
        x = block(x)
    # the whole vocabulary, appended tokens too
    everything = ids_predicted(model, x, len(model.token_emb.weight))
    assert_outputs(theirs, dict(
        token_ids=ids, mask_t=mask, mask_t_next=earlier, z0=code_map(model, codes[ids]),
        soft_tokens=code_map(model, r.softmax(-1) @ codes), target=code_map(model, q.softmax(-1)),
        z_t=torch.cat(z), x_t=xt, encoder_input=model.patches(theirs["x_t"]), latent=latent,
        logits_codebook=everything[..., :model.codes], logits_mask_label=everything[..., -1],
        logits_logsumexp=everything.logsumexp(-1)), assert_near)
    logits = model.decode(latent, ids, mask, visible)
    assert_close(logits, everything[:, 1:1 + model.length, :model.codes], 1e-5)
    loss, [seen] = recorded(model.patch_embed["proj"], lambda: addp_loss(model, given))
    assert_near(loss, theirs["loss"])                                  # through the whole step, in which this
    assert_near(seen * model.color_std + model.color_mean, theirs["x_t"].clamp(0, 1))       # image is read


def test_golden_addp_gradients():
    g, model, dead = golden_addp()
    theirs = dict(g.outputs["train"]["grads"])
    addp_loss(model, g.inputs["train"]).backward()
    ours = {k: p.grad for k, p in model.named_parameters() if p.requires_grad}
    rows = ours["token_emb.weight"].abs().sum(1).nonzero().flatten()
    assert rows.equal(theirs.pop("token_emb.weight:rows"))
    assert_near(ours["token_emb.weight"][rows], theirs.pop("token_emb.weight:values"))
    for name, grad in theirs.items():
        assert_near(ours[name], grad)
    without = [k for k, grad in ours.items() if grad is None]
    without += [k for k in dead if not k.startswith("token_predictor.") and k != "decoder_pos_embed"]
    assert sorted(without) == sorted(g.outputs["train"]["params_without_grad"])


@pytest.mark.parametrize("case", ["sample_cosine", "sample_linear"])
def test_golden_addp_decoding(case, monkeypatch):
    g, model, _ = golden_addp()
    given, theirs = g.inputs[case], g.outputs[case]
    steps, rounds = replayed(monkeypatch, given["sampled_ids"], given["gumbel"]), int(given["num_iter"])
    n, temperature = given["gumbel"].size(1), given["choice_temperature"].item()
    options = dict(temperature=temperature, schedule=given["schedule"])
    states, read = recorded(model.vqgan.decoder, lambda: list(model.sample_steps(n, rounds, **options)))
    images, z = recorded(model.vqgan.decoder,
                         lambda: [model.next_image(s.ids, s.token_mask, s.logits) for s in states])
    nothing_kept = sum(bool(state.token_mask.all()) for state in states)    # such steps read no image
    assert [*map(torch.equal, read, z[nothing_kept:-1])] == [True] * (rounds - 1 - nothing_kept)
    assert len(states) == len(steps) == len(z) == rounds
    for i, (step, state) in enumerate(zip(steps, states)):
        official = {k: theirs[k][i] for k in ("mask_in", "mask_next", "logits", "tokens", "z_q", "images")}
        assert_outputs(official, dict(mask_in=step.mask, mask_next=step.again, logits=step.logits,
                                      tokens=step.sampled, z_q=z[i], images=images[i]), assert_near)
        assert state.ids.equal(step.sampled)
        assert_near(step.noise, given["gumbel"][i].float() * temperature * (1 - (i + 1) / rounds))
    assert states[-1].ids.equal(theirs["final_tokens"]) and states[-1].last
    assert_near(model.render(states[-1]), theirs["final_image"].clamp(0, 1))


def test_golden_addp_features():
    g, model, _ = golden_addp()
    x, theirs = g.inputs["features"]["image"], g.outputs["features"]
    latent, [seen] = recorded(model.patch_embed["proj"], lambda: model.encode(x))
    assert_outputs(theirs, dict(normalized_image=seen, pretrain_encoder_input=model.patches(x),
                                pretrain_encoder_output=latent, pretrain_pooled=model.embed(x)), assert_near)
    assert_near(model.embed(x, pool="class"), theirs["pretrain_encoder_output"][:, 0])
    assert_near(model.norm(model.features(x)[0].flatten(2).mT), theirs["pretrain_encoder_output"][:, 1:])


@pytest.mark.parametrize("case", ["finetune", "finetune_interp"])
def test_golden_addp_finetuning(case):
    g, model, _ = golden_addp()
    x, theirs, head = g.inputs[case]["image"], g.outputs[case], g.inputs["finetune_head"]
    [tokens], [seen] = recorded(model.patch_embed["proj"], lambda: model.features(x, finetune=True))
    pooled = tokens.mean((2, 3))
    tuned = F.layer_norm(pooled, pooled.shape[1:], head["fc_norm.weight"], head["fc_norm.bias"], eps=1e-6)
    logits = F.linear(tuned, head["head.weight"], head["head.bias"])
    assert_outputs(theirs, dict(normalized_image=seen, pos_embed=model.resized_pos_embed(tokens.size(-1)),
                                pooled=pooled, pre_logits=tuned, logits=logits), assert_near)
    assert_near(tokens.flatten(2).mT, theirs["tokens"][:, 1:])


def addp(image_size=16, predictor=None, sharp=False, **options):
    """A fresh ADDP in eval mode; 4 x 4 ids below 32 unless said otherwise. sharp: as for mage()."""
    predictor = predictor or mage(image_size, sharp=sharp)
    torch.manual_seed(1)
    sizes = dict(width=32, depth=2, heads=4, decoder_depth=2, decoder_heads=4)
    model = unified.ADDP(predictor, image_size, **{**sizes, **options}).eval()
    if sharp:
        nn.init.normal_(model.token_emb.weight)
    return model


def test_what_was_masked_earlier_is_what_is_masked_now_and_more():
    model, ids = addp(64), some_ids(addp(64), 2)
    ratio = unified.nested_mask_ratios()[0]
    for index, gap in ((0, 1), (30, 5), (64, 1), (65, 3)):
        _, mask, earlier, visible = nested_masks(model, ids, index, gap, some_noise(2, 256))
        assert (mask <= earlier).all() and visible == 256 - mask[0].sum()
        for m, i in ((mask, index), (earlier, min(65, index + gap))):
            assert m.sum(1).tolist() == [math.ceil(256 * ratio[i])] * 2
    counts = [math.ceil(256 * r) for r in ratio]
    assert counts[:8] == [131, 134, 138, 141, 144, 148, 151, 154]
    assert counts[-12:] == [252, 253, 253, 254, 254, 255, 255, 256, 256, 256, 256, 256]


def test_drawn_mask_ratios_follow_their_weights():
    model, ratio = addp(64), unified.nested_mask_ratios()[0]
    ids = some_ids(model, 1)
    masked, earlier = torch.tensor([[m.sum() for m in model.nested_masks(ids)[:2]]
                                    for _ in range(1500)]).T / 256
    assert abs(masked.mean() - 0.747) < 0.01 and abs(earlier.mean() - 0.775) < 0.01
    assert 0.17 < (masked > 0.9).float().mean() < 0.24 and masked.min() >= ratio[0]


def test_the_predictor_predicts_both_in_one_batch():
    model = addp()
    _, calls = recorded(model.token_predictor.blocks[0], lambda: model(some_ids(model), index=12, gap=5))
    assert [len(x) for x in calls] == [8]


def test_predictor_and_tokenizer_are_one_network_each_and_stay_as_they_are():
    model, draws = addp(dropout=0.0).train(), dict(index=12, gap=2, mask_noise=some_noise(4, 16))
    assert model.vqgan is model.token_predictor.vqgan and model.blocks[0].training
    assert not any(m.training for m in model.token_predictor.modules())  # the official one drops out here
    assert model(some_ids(model), **draws)[0].equal(model(some_ids(model), **draws)[0])
    model.token_predictor.train()                             # the official way: no two predictions are alike
    assert not model(some_ids(model), **draws)[0].equal(model(some_ids(model), **draws)[0])


def test_every_parameter_takes_part_even_if_all_is_masked():
    model = addp()
    model(some_ids(model), index=65)[0].backward()            # several processes would wait for a missing one
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not any(p.grad.any() for p in model.blocks.parameters())     # the image says nothing then


def test_addp_learns_most_of_what_its_predictor_can_teach():
    model, draws = addp(sharp=True), dict(index=3, gap=2, mask_noise=some_noise(8, 16))
    ids, vocab_size = some_ids(model, 8), len(model.token_emb.weight)
    mask = model.nested_masks(ids, **draws)[0]
    target = 0.9 * model.token_predictor.logits(ids, mask).softmax(-1)
    target = F.pad(target, (0, vocab_size - model.codes)) + 0.1 / vocab_size
    entropy = -(target * target.log()).sum(-1)[mask].mean()
    losses = learn(model, ids, 80, 1e-2, **draws)
    assert losses[-1] - entropy < 0.3 * (losses[0] - entropy)


def test_while_all_is_masked_no_image_is_read_and_none_would_matter():
    model, ids = addp(sharp=True), some_ids(addp())
    mask = torch.ones_like(ids, dtype=torch.bool)
    skipped = model.step_logits(unified.Decoding(ids, mask, mask.sum(1)))
    for x in (some_images(), torch.zeros(4, 3, 16, 16)):
        assert_close(model.decode(model.encode(x), ids, mask, 0), skipped, 1e-6)
    model.encode = forbidden
    states = model.sample_steps(2, steps=16)
    # rounded up: nothing is kept
    assert [next(states).token_mask.sum(1).tolist() for _ in range(2)] == [[16, 16]] * 2
    with pytest.raises(AssertionError):
        list(states)


def test_addp_generates_without_its_predictor_but_inpainting_begins_with_its_prediction():
    model, known, (mask, _) = addp(32, sharp=True), some_images(4, 32), inpainting_masks()
    state = model.initial_state(4, known, mask)
    mask = state.token_mask
    logits = model.token_predictor.logits(state.ids, mask)
    first, same, other = (model.step_logits(state._replace(logits=v)) for v in (None, logits, -logits))
    assert first.equal(same) and not first.allclose(other)
    model.token_predictor.logits = forbidden
    assert len(list(model.sample_steps(3, steps=6))) == 6


def test_addp_features_are_of_pixels():
    model, x = addp(), some_images()
    assert probe.tokenize(model, x) is x and probe.tokenize(mage(), x).equal(mage().to_ids(x))
    assert model.layers == {b: (32, 4, 4) for b in (1, 2, 3, 4)} and model.best_layer == 2
    ids = model.to_ids(x)
    decoded = model.vqgan.decode(ids.unflatten(1, (4, 4)))
    assert model.features(ids)[0].equal(model.features(decoded)[0])
    assert model.embed(ids).equal(model.embed(decoded)) and not model.embed(ids).allclose(model.embed(x))
    # the decoder's maps: all is visible
    logits = model.decode(model.encode(x), ids, torch.zeros(4, 16, dtype=torch.bool), 16)
    assert_close(ids_predicted(model, model.features(x, layers=[4])[0].flatten(2).mT), logits, 1e-5)


def test_finetuning_reads_without_clamp_and_norm_and_at_any_size():
    model, x = addp(), 2 * some_images() - 0.5
    assert model.features(x)[0].equal(model.features(x.clamp(0, 1))[0])
    before = model.features(x, finetune=True)[0]
    assert not before.allclose(model.features(x.clamp(0, 1), finetune=True)[0])
    nn.init.zeros_(model.tokenizer_norm.weight)
    assert model.features(x, finetune=True)[0].equal(before)
    assert model.features(some_images(2, 24), finetune=True)[0].shape == (2, 32, 6, 6)
    assert mage().features(x, finetune=True)[0].equal(mage().features(x)[0])  # MAGE has one path only


def test_addp_has_the_vocabulary_of_its_predictor():
    assert len(addp().token_emb.weight) == 32 + 2
    labelled = addp(predictor=mage(classes=5, fake_class=2))
    assert len(labelled.token_emb.weight) == 32 + 5 + 1 and labelled.classes == 0


def test_fresh_addp_weights_are_drawn_as_the_authors_drew_them():
    predictor = mage()
    before = {k: v.clone() for k, v in predictor.state_dict().items()}
    model = addp(predictor=predictor)
    learned = ("pos_embed", "decoder_pos_embed_learned", "decoder_pos_mask_embed", "decoder_pos_token_embed")
    for name in (*learned, "token_emb.weight"):
        assert abs(model.state_dict()[name].std() / (0.02 * (768 / 32) ** 0.5) - 1) < 0.15, name
    patch = model.patch_embed["proj"].weight                            # Xavier on the matrix of a patch
    assert 0.95 < patch.abs().max() / math.sqrt(6 / (32 + 3 * 4 * 4)) <= 1
    assert not model.mlm_layer.bias.any() and model.mlm_layer.bias.size(2) == len(model.token_emb.weight)
    assert all(v.equal(before[k]) for k, v in model.token_predictor.state_dict().items())


@pytest.mark.parametrize("build, words", [
    (lambda: unified.Attention(30, 4), "30.*4"), (lambda: mage(18), "18.*4"),
    (lambda: addp(32, predictor=mage(16)), "32.*16"), (lambda: umd(image_size=18), "18.*4"),
    (lambda: adm(18, ch_mult=(1, 1, 1)), "18"), (lambda: adm(head=12), "16.*12"),
    (lambda: unified.Attention(30, -1), "-1 heads"), (lambda: adm(head=-4), "-4"), (lambda: adm(0), "size 0"),
    (lambda: umd(mask_ratio_clean=75), "75"), (lambda: umd(mask_ratio_noised=1.0), r"\[0, 1\)"),
    (lambda: umd(mask_ratio_noised=0.99), "leave a patch visible"),
    (lambda: unified.noise_schedule("linear", 20), "more than 20 timesteps, not 20"),
    (lambda: umd(clean=2.0), "2.0"), (lambda: unified.VQGAN(8, 4, 8, [1], 1, groups=-1), "-1"),
    (lambda: unified.tokenizer_config("toy", 32), "2, 4, 8 or 16, not 32"),
    (lambda: unified.noise_schedule("sqrt"), "'sqrt'"), (lambda: umd(clean=1.0).sample(2), "from nothing"),
    (lambda: unified.spaced_timesteps(6, [1, 4]), "4 steps.*3"),
    (lambda: addp().features(some_images(), 0.5), "0.5")])
def test_sizes_that_do_not_fit_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()


# ------------------------------------------------------------------------------------------------------------
# 8. Noise


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_golden_noise_schedule(schedule):
    g = golden("adm_unet")
    abar, rows = unified.noise_schedule(schedule, g.config["diffusion_steps"]), g.inputs["schedule_index"]
    before = F.pad(abar[:-1], (1, 0), value=1.0)
    zero, one = (torch.full((len(abar), 3, 1, 1), v, dtype=torch.float64) for v in (0.0, 1.0))
    mean = [unified.ddim_step(x, x0, abar, before, eta=1.0)[:, 0, 0, 0]
            for x, x0 in ((zero, one), (one, zero))]
    small, large = unified.log_variances(abar)
    ours = dict(alphas_cumprod=abar, betas=large.exp(), posterior_log_variance_clipped=small,
                posterior_variance=unified.posterior_variance(abar, before),
                posterior_mean_coef1=mean[0], posterior_mean_coef2=mean[1])
    assert_outputs(g.outputs, {f"{schedule}_{name}": v[rows] for name, v in ours.items()}, rtol=1e-9)


def test_golden_kept_steps():
    g = golden("adm_unet")
    for name in [k for k in g.outputs if k.startswith("space_timesteps_")]:
        law, T = name.removeprefix("space_timesteps_"), g.config["diffusion_steps"]
        ours = unified.strided_timesteps(T, int(law[4:])) if law.startswith("ddim") \
            else unified.spaced_timesteps(T, [int(n) for n in law.split(",")])
        assert ours == g.outputs[name].tolist()
    assert unified.strided_timesteps(10, 4) == [0, 3, 6, 9]
    assert len(unified.strided_timesteps(10, 7)) == 5            # no stride gives 7: there the authors refuse


def test_golden_dit_schedule():
    g = golden("dit")
    abar = unified.noise_schedule("linear", len(g.outputs["alphas_cumprod_linear"]))
    kept = unified.spaced_timesteps(len(abar), [len(g.outputs["respaced_betas"])])
    for name, theirs in g.outputs["timestep_maps"].items():
        if not name.startswith("ddim"):
            assert unified.spaced_timesteps(len(abar), [int(name)]) == list(theirs)
    short, dim = abar[kept], g.outputs["timestep_embedding"].size(1)
    assert_outputs(g.outputs, dict(
        alphas_cumprod_linear=abar, respaced_betas=1 - short / torch.cat([torch.ones(1), short[:-1]]),
        train_x_t=unified.q_sample(g.inputs["train_x0"], abar[g.inputs["train_t"]], g.inputs["train_noise"]),
        timestep_embedding=unified.timestep_embedding(g.inputs["t"], dim, dim // 2, "cos sin")))


# ------------------------------------------------------------------------------------------------------------
# 9. UMD: the golden files. The authors' code is in JAX: names, layouts and the order of axes differ


def flax_slots(model, of=lambda p: p.data):
    """(flax name, layer or None, our tensor, flax tensor -> our layout) for every parameter; of(parameter)
    may also be its gradient."""
    def matrix(name, weight, bias, layer=None):
        yield f"{name}/kernel", layer, weight, lambda w: w.reshape(weight.mT.shape).mT
        yield f"{name}/bias", layer, bias, lambda w: w.reshape(bias.shape)

    def dense(name, linear, layer=None):
        yield from matrix(name, of(linear.weight), of(linear.bias), layer)

    def norm(name, module, layer=None):
        yield f"{name}/scale", layer, of(module.weight), lambda w: w
        yield f"{name}/bias", layer, of(module.bias), lambda w: w

    def block(name, block, i):
        for j, (module, linear) in enumerate(((block.norm1, block.mlp.fc1), (block.norm2, block.mlp.fc2))):
            yield from norm(f"{name}/LayerNorm_{j}", module, i)
            yield from dense(f"{name}/MlpBlock_0/Dense_{j}", linear, i)
        yield from dense(f"{name}/Dense_0", block.modulation, i)
        qkv, attention = block.attn.qkv, f"{name}/MultiHeadDotProductAttention_0"
        for part, weight, bias in zip(("query", "key", "value"), of(qkv.weight).chunk(3),
                                      of(qkv.bias).chunk(3)):
            yield from matrix(f"{attention}/{part}", weight, bias, i)
        yield from dense(f"{attention}/out", block.attn.proj, i)

    for stack, blocks, last in (("Encoder", model.blocks, model.norm),
                                ("Decoder", model.decoder_blocks, model.decoder_norm)):
        yield from norm(f"{stack}/encoder_norm", last)
        for i, each in enumerate(blocks):
            yield from block(f"{stack}/ScanCheckpointEncoder1DBlock_0", each, i)
    for trunk, (first, second) in (("time", model.time_embed[::2]), ("label", model.label_embed[1::2])):
        yield from dense(f"{trunk}_trunk/Dense_0", first)
        yield from dense(f"{trunk}_trunk/Dense_1", second)
    yield from dense("final_modulation", model.decoder_modulation)
    named = {"cls": model.cls_token, "pos_embedding": model.pos_embed,
             "dec_pos_embedding": model.decoder_pos_embed, "image_mask_embedding": model.mask_token,
             "label_emb/embedding/embedding": model.label_embed[0].weight,
             "embedding/bias": model.patch_embed.bias, "final_conv/bias": model.to_pixels.bias}
    yield from ((name, None, of(p), lambda w: w) for name, p in named.items())
    yield "embedding/kernel", None, of(model.patch_embed.weight), lambda w: w.permute(3, 2, 0, 1)
    kernel = of(model.to_pixels.weight)
    # flax does not turn it round
    yield "final_conv/kernel", None, kernel, lambda w: w.flip(0, 1).permute(2, 3, 0, 1)


def golden_umd(preset="umd"):
    """The golden file, our model with its weights, the inputs and the outputs of one preset."""
    g = golden("umd")
    c, p = g.config["model"], g.config["presets"][preset]
    patch, = set(c["patch_size"])
    sizes = [c[k] for k in ("width", "depth", "num_heads", "dec_depth")]
    ratios = [p[k] for k in ("no_noise_prob", "mask_ratio_no_noise", "mask_ratio")]
    model = unified.UMD(c["img_size"], c["img_size"] // patch, *sizes, *ratios, c["num_classes"],
                        g.config["num_cls"])
    names = set()
    for name, layer, ours, convert in flax_slots(model):
        theirs = g.state_dict[name]
        ours.copy_(convert(theirs if layer is None else theirs[layer]))
        names.add(name)
    assert names == g.state_dict.keys()                                 # every one of theirs has its place
    return g, model.eval(), g.inputs["presets"][preset], g.outputs["presets"][preset]


def channels_first(x):
    """Pixels or predictions with channels last -> with channels first."""
    return x.movedim(-1, -3)


def golden_draws(g, given):
    """The arguments of our forward that repeat the golden draws. There the largest of the uniform numbers
    are masked."""
    noised, B = len(given["t"]), len(g.inputs["images"])
    length = (g.config["model"]["img_size"] // g.config["model"]["patch_size"][0]) ** 2
    rows = [given.get(f"{part}_mask_uniform", torch.zeros(n, length))
            for part, n in (("noised", noised), ("clean", B - noised))]
    drop = given.get("noised_label_drop")
    return dict(t=given["t"] + 1, noise=channels_first(given["eps"]), mask_noise=-torch.cat(rows),
                keep_label=None if drop is None else ~drop)


PRESETS = pytest.mark.parametrize("preset", ["umd", "mae", "dit", "maskdit", "finetune"])


@functools.cache
def golden_umd_gradients(preset):
    """File, our model after the backward pass of one preset, official numbers, our loss and its terms, and
    for each prediction what it was made from, by the names of predict(), and itself."""
    g, model, given, theirs = golden_umd(preset)
    calls, predict = [], model.predict

    def spy(*args, **more):
        given = inspect.signature(predict).bind(*args, **more).arguments
        calls.append((given, predict(*args, **more)))
        return calls[-1][1]
    model.predict = spy
    labels = g.inputs["labels"] if g.config["presets"][preset]["use_labels"] else None
    loss, logs = model((channels_first(g.inputs["images"]) + 1) / 2, labels, **golden_draws(g, given))
    loss.backward()
    return g, model, theirs, dict(logs, loss=loss), calls


@PRESETS
def test_golden_umd_corruption_and_predictions(preset):
    g, model, theirs, _, calls = golden_umd_gradients(preset)
    parts = [part for part in ("noised", "clean") if f"{part}_pred" in theirs]
    assert len(parts) == len(calls)
    for part, (given, prediction) in zip(parts, calls):
        x, visible = given["x"], given["ids_keep"]
        assert_close(x, channels_first(theirs["x_t"] if part == "noised" else g.inputs["images"][-len(x):]))
        latent = model.encode(x, model.condition(given["t"], given["labels"], given["keep_label"]), visible)
        assert_outputs(theirs, {f"{part}_features": latent[:, :g.config["num_cls"]].mean(1),
                                f"{part}_pred": torch.cat(prediction, 1).movedim(1, -1)})
        official = theirs.get(f"{part}_image_mask")
        assert (visible is None) == (official is None)
        assert official is None or model.pixel_mask(visible).equal(channels_first(official).bool())


@PRESETS
def test_golden_umd_losses(preset):
    _, _, theirs, logs, _ = golden_umd_gradients(preset)
    ours = dict(loss=logs["loss"], mae_loss=logs.get("x0_clean", torch.tensor(0.0)))
    if "eps" in logs:
        ours.update(dit_loss=(logs["x0"] + logs["eps"]) / 2, x0_loss=logs["x0"], eps_loss=logs["eps"])
    assert {"loss", "mae_loss"} | ({"dit_loss"} if "eps" in logs else set()) <= theirs.keys()
    assert_outputs(theirs, {name: v for name, v in ours.items() if name in theirs})


@PRESETS
def test_golden_umd_gradient_norms(preset):
    _, model, theirs, _, _ = golden_umd_gradients(preset)
    squares = collections.Counter()
    for name, _, grad, _ in flax_slots(model, lambda p: torch.zeros_like(p) if p.grad is None else p.grad):
        squares[name] += grad.double().square().sum().item()
    largest = max(theirs["grad_norms"].values())
    assert squares.keys() == theirs["grad_norms"].keys()
    for name, norm in theirs["grad_norms"].items():         # a key's bias has only rounding: the second bound
        assert abs(squares[name] ** 0.5 - norm) <= max(1e-4 * norm, 1e-7 * largest), name


def test_golden_umd_probe_features():
    g, model, _, _ = golden_umd("umd")
    x = (channels_first(g.inputs["images"]) + 1) / 2
    clean = model.predict(2 * x - 1, torch.zeros(len(x), dtype=torch.long))
    _, noisy, _, _ = golden_umd("dit")                # no clean part: index 50, which the network knows as 51
    assert noisy.best_t == 51
    assert_outputs(g.outputs, dict(
        probe_features=model.embed(x), clean_unmasked_pred=torch.cat(clean, 1).movedim(1, -1),
        probe_features_noised_t50=noisy.embed(x, noise=channels_first(g.inputs["probe_noise"]))))


def test_golden_umd_sampling_step():
    g, model, _, _ = golden_umd("umd")
    given, how = g.inputs["sampling"], g.config["sampling"]
    x, t = channels_first(given["x"]), torch.full((len(given["x"]),), how["t"] + 1)
    now, after = model.alpha_bar[how["t"] + 1], model.alpha_bar[how["t_next"] + 1]
    with torch.no_grad():
        plain = model.predict(x, t, given["y"])
        x0, eps = model.guided(x, t, given["y"], how["cfg_scale"])
    ours = dict(model_pred=torch.cat(plain, 1), model_pred_cfg=torch.cat([x0, eps], 1),
                step_eps_model_eps=eps)
    for name, believed in (("eps", unified.x0_from_eps(x, now, eps)), ("x0", x0)):
        believed = believed.clamp(-1, 1)
        step = unified.ddim_step(x, believed, now, after, how["eta"], channels_first(given["step_noise"]))
        ours.update({f"step_{name}_pred_x0": believed, f"step_{name}_sample": step})
    assert_outputs({name: channels_first(g.outputs["sampling"][name]) for name in ours}, ours)


def test_golden_umd_sampling_loop():
    g, model, _, _ = golden_umd("umd")
    given, theirs, how = g.inputs["sampling"], g.outputs["sampling"], g.config["sampling"]
    noise = {0: given["loop_init_noise"], **{2 * i + 1: z for i, z in enumerate(given["loop_step_noise"])}}
    model.noise = lambda seeds, draw=0: channels_first(noise[draw])
    times, predict = [], model.predict
    model.predict = lambda x, t, *a, **k: times.append(t[0].item() - 1) or predict(x, t, *a, **k)
    *_, last = model.sample_steps(len(given["y"]), how["sampling_steps"], how["eta"], how["cfg_scale"],
                                  given["y"])
    assert_close(last.x, channels_first(theirs["loop_sample"]), 1e-3)   # random weights amplify rounding
    assert times[::2] == theirs["loop_timesteps"].tolist()            # each twice: with the label and without


def test_golden_umd_lists_of_steps():
    g, model, _, _ = golden_umd("umd")
    for steps, theirs in g.outputs["ddim_timesteps"].items():
        assert model.timesteps(int(steps)) == [t + 1 for t in theirs]
    assert_close(model.alpha_bar[1:], g.outputs["alphas_cumprod"])


def test_golden_fewshot():
    for case in golden("umd").fewshot:
        x, y, x_test, y_test = (case["inputs"][k] for k in ("x", "y", "x_test", "y_test"))
        scores = probe.fewshot_scores(x, y, x_test, case["config"]["num_classes"], case["config"]["l2_reg"])
        assert_close(scores, case["outputs"]["scores"], 1e-3)       # the column of 100s costs float32 a digit
        accuracy = (scores.argmax(1) == y_test).float().mean().item()
        assert accuracy == pytest.approx(float(case["outputs"]["accuracy"]), abs=1e-6)


# UMD, MAE, MaskDiT and DiT: what tells them apart


def umd(clean=0.5, mask_ratio_clean=0.75, mask_ratio_noised=0.375, seed=1, fresh=False, **options):
    """A small UMD in eval mode, 4 x 4 patches of 4 pixels. Its modulation is drawn, so that t and label
    matter, or fresh."""
    torch.manual_seed(seed)
    ratios = dict(clean_ratio=clean, mask_ratio_clean=mask_ratio_clean, mask_ratio_noised=mask_ratio_noised)
    sizes = dict(image_size=16, grid=4, width=32, depth=2, heads=4, decoder_depth=1)
    model = unified.UMD(**{**sizes, **ratios, **options}).eval()
    for name, p in model.named_parameters():
        if not fresh and "modulation" in name:
            nn.init.normal_(p, std=0.1)
    return model


def test_a_part_of_the_batch_stays_clean_and_both_parts_count_by_their_size():
    x, model = some_images(5), umd(clean=0.5)
    draws = dict(t=torch.tensor([3, 500, 900]), noise=torch.randn(3, 3, 16, 16), mask_noise=some_noise(5, 16))
    loss, logs = model(x, **draws)                                     # int(5 x 0.5) = 2 clean ones, the last
    assert_close(loss, 0.6 * (logs["x0"] + logs["eps"]) / 2 + 0.4 * logs["x0_clean"], 1e-6)
    changed = x.clone()
    changed[3:] = 0.5
    assert model(changed, **draws)[1]["eps"].equal(logs["eps"])


def test_micro_batches_share_the_clean_part_of_the_whole_batch():
    model = umd(clean=0.05)
    assert sum(model.micro_batch_args(first, 8)["n_clean"] for first in range(0, 256, 8)) == int(256 * 0.05)
    assert {umd(clean=0.5).micro_batch_args(first, 4)["n_clean"] for first in range(0, 64, 4)} == {2}


def test_the_smallest_of_the_random_numbers_are_masked_in_every_method():
    u, visible = some_noise(4, 16), umd().visible_patches(some_noise(4, 16), 0.75)
    ids, of_umd = some_ids(mage()), umd().pixel_mask(visible)[:, 0, ::4, ::4].flatten(1)
    masks = [masking(mage(), ids, 0.75, u)[1], addp().nested_masks(ids, 20, 1, u)[0], of_umd]
    for mask in masks:
        assert mask.equal(u.argsort(1).argsort(1) < mask[0].sum()) and mask.any() and not mask.all()
    assert mask.sum(1).tolist() == [12] * 4


def test_a_fresh_model_does_not_know_the_timestep():
    x = torch.randn(2, 3, 16, 16)
    for model, alike in ((umd(fresh=True), True), (umd(), False)):
        early, late = (model.predict(x, torch.full((2,), t))[0] for t in (0, 900))
        assert early.equal(late) if alike else not early.allclose(late)


def test_umd_masks_classes_in_a_tenth_of_the_images_in_training_only():
    model = umd(classes=3)
    t, labels = torch.full((2000,), 5), torch.ones(2000, dtype=torch.long)
    free = model.condition(t[:1])
    assert not model.condition(t, labels).isclose(free, atol=1e-5).all(1).any()
    dropped = model.train().condition(t, labels).isclose(free, atol=1e-5).all(1).float().mean()
    assert 0.07 < dropped < 0.13


def test_a_reconstruction_keeps_what_was_seen():
    model, x = umd(), some_images()
    seen, rebuilt = model.reconstruct(x, some_noise(4, 16))
    mask = (seen == 0.2).all(1, keepdim=True)
    assert mask.float().mean() == 0.75
    assert torch.where(mask, x, rebuilt).equal(x) and not rebuilt.allclose(x)


@pytest.mark.parametrize("t", [0, 300])
def test_umd_features_are_what_the_last_block_gave_the_norm(t):
    model, x, noise = umd(), some_images(), torch.randn(4, 3, 16, 16)
    [last] = model.features(x, t, [2], noise=noise)
    assert_close(model.norm(last.flatten(2).mT), model.encode(*model.noised(x, t, noise))[:, 4:], 1e-5)


# ------------------------------------------------------------------------------------------------------------
# 10. ADM: the network


def golden_unet(config, state):
    """Our ADM with the weights of an official state dict; what shapes cannot tell comes from the official
    flags."""
    ours, kept, dead = unified.published_adm(state, head=config["num_head_channels"])
    flags = dict(image_size=config["image_size"], schedule=config["noise_schedule"],
                 steps=config["diffusion_steps"])
    model = unified.build({**ours, **flags})
    model.load_state_dict(kept)
    assert not dead
    return model.eval()


def golden_adm():
    g = golden("adm_unet")
    return g, golden_unet(g.config, g.state_dict)


def adm(image_size=16, steps=100, **options):
    """A fresh ADM in eval mode, 9 blocks unless said otherwise; the layers that start at 0 are drawn, or
    nothing would depend on anything."""
    torch.manual_seed(1)
    sizes = dict(ch=8, ch_mult=(1, 2), blocks=1, attention=(2,), head=8, groups=4)
    model = unified.ADM(image_size, steps=steps, **{**sizes, **options}).eval()
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return model


def test_golden_unet_sizes_are_read_off_the_shapes():
    g, model = golden_adm()
    ours, c = unified.published_adm(g.state_dict)[0], g.config
    sides = [int(side) for side in c["attention_resolutions"].split(",")]
    assert (ours["ch"], ours["blocks"]) == (c["num_channels"], c["num_res_blocks"])
    assert ours["ch_mult"] == [float(m) for m in c["channel_mult"].split(",")]
    assert ours["attention"] == sorted(c["attention_ds"]) == sorted(c["image_size"] // side for side in sides)
    assert sum(p.numel() for p in model.parameters()) == c["n_params"] and len(model.layers) == c["n_blocks"]
    channels = (model.out[2].out_channels, model.input_blocks[0][0].in_channels)
    assert channels == (c["out_channels"], c["in_channels"])


def test_golden_unet_and_its_blocks():
    (g, model), seen = golden_adm(), []
    x, t, layers = g.inputs["x_feat"], g.inputs["t_feat"], list(model.layers)
    assert sorted(k for k in g.outputs if k.startswith("feature_")) == [f"feature_{b:02d}" for b in layers]
    model.time_embed.register_forward_hook(lambda module, args, y: seen.append((*args, y)))
    side = model.image_size
    model.predict(torch.zeros(len(g.inputs["t_emb"]), 3, side, side), g.inputs["t_emb"])
    assert_outputs(g.outputs, dict(
        forward=model.predict(g.inputs["x"], g.inputs["t"]), forward_feat=model.predict(x, t),
        timestep_embedding=seen[0][0], time_embed=seen[0][1],
        **{f"feature_{b:02d}": m for b, m in zip(layers, model.predict(x, t, layers))}))


def test_golden_residual_block_and_attention():
    g = golden("adm_unet")
    state, width = g.state_dict_unit_resblock, g.inputs["unit_emb"].size(1)
    out, inp = state["in_layers.2.weight"].shape[:2]
    block = unified.ADMResBlock(inp, out, width, groups=32, dropout=0.0)
    block.load_state_dict(state)
    assert_close(block(g.inputs["unit_res_x"], g.inputs["unit_emb"]), g.outputs["unit_res"])
    x, head = g.inputs["unit_attn_x"], g.config["num_head_channels"]
    for order, name in (("legacy", "unit_attn_legacy"), ("new", "unit_attn_new_order")):
        for heads in (dict(head=head), dict(head=64, heads=x.size(1) // head)):
            attention = unified.ADMAttention(x.size(1), groups=32, order=order, **heads)
            attention.load_state_dict(g.state_dict_unit_attention)
            assert_close(attention(x), g.outputs[name])


@functools.cache
def published_unet():
    """The network for 256 pixels, shapes without memory."""
    with torch.device("meta"):
        return unified.build(unified.model_config("adm", "base", 256))


def test_the_published_network_has_37_blocks_of_the_published_shapes():
    model = published_unet()
    widths = [256] * 7 + [512] * 6 + [1024] * 12 + [512] * 6 + [256] * 6
    down = [side for side in (256, 128, 64, 32, 16, 8) for _ in range(3)]
    sides = down + [8] * 3 + [side for side in (16, 32, 64, 128) for _ in range(3)] + [256] * 4
    assert model.layers == {b: (c, s, s) for b, (c, s) in enumerate(zip(widths, sides), 1)}
    assert sum(p.numel() for p in model.parameters()) == 552_814_086 and len(model.state_dict()) == 566
    assert (model.best_layer, model.best_t, model.t_range[:2]) == (24, 90, (0, 999))
    alike = [b for b in model.layers if b > 19 and model.layers[b] == model.layers[model.mirror(b)]]
    assert set(range(20, 38)) - set(alike) == {22, 25, 28, 31, 34} and model.mirror(19) == 19


def test_reading_block_24_costs_29_percent_of_the_whole_network():
    model, macs = published_unet(), []
    for layers in ([24], None):
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            model.predict(torch.empty(1, 3, 256, 256, device="meta"), torch.empty(1, device="meta"), layers)
        macs.append(round(counter.get_total_flops() / 2e9, 1))
    assert macs == [319.6, 1119.8]


def test_a_fresh_network_predicts_no_noise_at_all():
    model = unified.ADM(16, ch=8, ch_mult=(1, 2), blocks=1, attention=(2,), head=8, groups=4)
    assert not model.predict(some_gauss(2, 3, 16, 16), torch.tensor([0, 7])).any()
    noise = some_gauss(4, 3, 16, 16)
    assert_close(model(some_images(), noise=noise)[1]["mse"], noise.square().mean(), 1e-6)


# ADM: loss, generation, features


def golden_losses(kept, t):
    """mse and vb of the golden batch, at steps t of the process of the steps kept."""
    g, model = golden_adm()
    kept = torch.tensor(kept)
    abar, x0, noise = model.alpha_bar[kept], g.inputs["x0"], g.inputs["noise_loss"]
    xt = unified.q_sample(x0, abar[t], noise)
    return g, model, xt, unified.hybrid_loss(model.predict(xt, kept[t]), x0, xt, noise, t, abar)


def test_golden_loss_terms():
    inputs, T = golden("adm_unet").inputs, golden("adm_unet").config["diffusion_steps"]
    g, model, xt, (mse, vb) = golden_losses(range(T), inputs["t_loss"])
    terms = dict(loss_hybrid_mse=mse, loss_hybrid_vb=vb, loss_hybrid_loss=mse + vb)
    assert_outputs(g.outputs, dict(q_sample=xt, **terms))
    for i in range(len(mse)):                                # each on its own scale: t = 0 is far the largest
        assert_outputs({k: g.outputs[k][i] for k in terms}, {k: v[i] for k, v in terms.items()})
    loss, logs = model((g.inputs["x0"] + 1) / 2, t=g.inputs["t_loss"], noise=g.inputs["noise_loss"])
    assert_close(loss, g.outputs["loss_hybrid_loss"].mean())
    assert_close(logs["mse"] + logs["vb"], loss, 1e-6)
    _, _, _, (mse, vb) = golden_losses(unified.spaced_timesteps(T, [250]), inputs["t_loss_respaced"])
    assert_close(mse, g.outputs["loss_respaced250_mse"])
    # of a shortened process; that file rescales vb
    for ours, official in zip(vb, g.outputs["loss_respaced250_vb"]):
        assert_close(ours * 250 / T, official)


def golden_step_back(clip=True):
    """The golden single steps: file, log-variance, what ddim_step needs, model. In float64, for x0 at t =
    999 carries the network's rounding error times 157, and that of the file alone takes up most of the
    tolerance."""
    g, model = golden_adm()
    x, t, model = g.inputs["x_t"].double(), g.inputs["t_step"], model.double()
    eps, v = model.predict(x, t).chunk(2, 1)
    now, after = model.alpha_bar[t], F.pad(model.alpha_bar, (1, 0), value=1.0)[t]
    x0 = unified.x0_from_eps(x, now, eps)
    x0 = x0.clamp(-1, 1) if clip else x0
    return g, unified.learned_log_variance(v, t, model.alpha_bar), (x, x0, now, after), model


AMPLIFIED = 5e-4                        # the tolerance where t = 999 takes part


def test_golden_steps_back():
    g, log_var, step, model = golden_step_back()
    noise, std, unclipped = g.inputs["noise_step"], (0.5 * log_var).exp(), golden_step_back(clip=False)[2]
    noisier = F.pad(model.alpha_bar, (0, 1))[g.inputs["t_step"] + 1]
    assert_outputs(g.outputs, dict(
        p_mean_variance_pred_xstart=step[1], p_mean_variance_mean=unified.ddim_step(*step, eta=1.0),
        p_mean_variance_variance=log_var.exp(), p_mean_variance_log_variance=log_var,
        p_sample_pred_xstart=step[1], p_sample=unified.ddim_step(*step, eta=1.0, noise=noise, std=std),
        p_sample_noclip=unified.ddim_step(*unclipped, eta=1.0, noise=noise, std=std),
        ddim_eta0=unified.ddim_step(*step, 0.0, noise), ddim_eta07=unified.ddim_step(*step, 0.7, noise),
        ddim_reverse=unified.ddim_step(*step[:3], noisier)), rtol=AMPLIFIED)


@pytest.mark.parametrize("name, eta", [("ddpm", 1.0), ("ddim", 0.0)])
def test_golden_sampling_loops(name, eta):
    (g, model), seen = golden_adm(), []
    kept = g.outputs["loop_timestep_map" if name == "ddpm" else "loop_ddim_timestep_map"].tolist()
    predict, start, noise = model.double().predict, g.inputs["loop_x_T"].double(), g.inputs["loop_noise"]
    model.noise = lambda seeds, draw=0: noise[draw // 2] if draw else start
    model.predict = lambda x, t, *more: seen.append(t.unique().item()) or predict(x, t, *more)
    *_, state = model.sample_steps(1, steps=len(kept), eta=eta)
    assert seen == kept[::-1]
    assert_close(state.x, g.outputs[f"loop_{name}"], AMPLIFIED)


def test_discretised_nll_is_a_distribution_over_256_bytes():
    bytes_ = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, std in [(0.1, 0.3), (-0.5, 0.02), (2.0, 1.0)]:
        mass = (-unified.discretised_nll(bytes_, torch.tensor(mean), torch.tensor(std).double().log())).exp()
        assert abs(mass.sum() - 1) < 1e-6
        assert bytes_[mass.argmax()] == pytest.approx(max(-1, min(1, mean)), abs=1 / 127.5)


def test_vb_teaches_the_variance_and_nothing_else():
    model = adm()
    _, logs = model(some_images(), t=torch.tensor([0, 5, 50, 99]))
    last = model.out[2].weight                                # rows 0 - 2 predict the noise, rows 3 - 5 are v
    for term, rows in [("mse", slice(0, 3)), ("vb", slice(3, 6))]:
        grad = torch.autograd.grad(logs[term], last, retain_graph=True)[0].flatten(1).abs().amax(1)
        assert grad.nonzero().flatten().tolist() == list(range(6))[rows]


def test_the_loss_in_bfloat16_is_nearly_that_in_float32():
    model, draws = adm(), dict(t=torch.tensor([0, 5, 50, 99]), noise=some_gauss(4, 3, 16, 16))
    plain, _ = model(some_images(), **draws)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model(some_images(), **draws)
    assert loss.dtype == torch.float32 and not loss.equal(plain)
    assert_close(loss, plain, 1e-2)


def test_all_timesteps_are_drawn_alike():
    model, seen = adm(), []
    predict = model.predict
    model.predict = lambda x, t, *more: seen.append(t) or predict(x, t, *more)
    for _ in range(8):
        model(some_images(64))
    t = torch.cat(seen)
    assert t.min() < 5 and t.max() > 94 and t.bincount(minlength=100).max() < 20  # 512 draws from 100 steps


def test_noise_of_eta_0_is_added_in_no_step_and_of_1_in_all_but_the_last():
    model = adm()
    noise = model.noise
    for eta, matters in [(0.0, []), (0.5, [1, 3, 5]), (1.0, [1, 3, 5])]:
        images = []
        for changed in (None, 1, 3, 5, 7):
            model.noise = lambda seeds, draw=0: noise(seeds, draw) + (draw == changed)
            images.append(model.sample(1, steps=4, eta=eta))
        assert [draw for draw, x in zip((1, 3, 5, 7), images[1:]) if not x.equal(images[0])] == matters


def test_at_every_step_what_is_known_is_as_noisy_as_the_rest():
    model, known, mask = adm(), some_images(1), torch.zeros(1, 16, 16, dtype=torch.bool)
    abar = [*model.alpha_bar[unified.spaced_timesteps(100, [5])].flip(0), torch.ones((), dtype=torch.float64)]
    for step, state in enumerate(model.sample_steps(1, steps=5, known=known, mask=mask)):
        noisy = unified.q_sample(2 * known - 1, abar[step + 1], model.noise(torch.arange(1), 2 * step + 2))
        assert_close(state.x, noisy, 1e-6)


def test_adm_reads_each_image_at_a_timestep_of_its_own_and_embeds_it_at_nine_percent():
    model, x, noise = adm(), some_images(), some_gauss(4, 3, 16, 16)
    [each] = model.features(x, torch.tensor([30, 0, 30, 99]), noise=noise)
    assert_close(each[::2], model.features(x, 30, noise=noise)[0][::2], 1e-5)
    assert_close(model.embed(x, noise), model.features(x, 9, noise=noise)[0].mean((2, 3)), 1e-6)


def test_added_maps_reach_the_next_block_and_the_mirror():
    model, x, noise = adm(), some_images(), some_gauss(4, 3, 16, 16)
    extra, [plain] = torch.randn(4, *model.layers[2]), model.features(x, 20, [2], noise=noise)
    for block, channels in ((3, slice(None)), (model.mirror(2), slice(-len(extra[0]), None))):
        _, [read] = recorded(model.blocks[block - 1],
                             lambda: model.features(x, 20, [9], add={2: extra}, noise=noise))
        assert_close(read[:, channels], plain + extra, 1e-6)


# ------------------------------------------------------------------------------------------------------------
# The heads of probe.py that read maps


def golden_heads(case):
    """The golden file, the settings of a case, and {(layer, t): map} of the features it gives."""
    g = golden("diffssl_heads")
    names = [name for name in g.inputs if name.startswith("feat_b")]
    maps = {tuple(map(int, name.removeprefix("feat_b").split("_t"))): g.inputs[name] for name in names}
    return g, g.config["cases"][case], maps


def load_official(head, state):
    """Load an official state dict; there are no published files of heads, so two names of ours are
    plainer."""
    names = {"intra_inter_block_attention.cls_token": "cls_token", "head.weight": "linear.weight",
             "head.bias": "linear.bias"}
    last = max((int(k.split(".")[1]) for k in state if k.startswith("fcs.")), default=-1)

    def ours(name):
        if name.startswith("intra_inter_block_attention.layers."):
            number, rest = name.split(".", 2)[2].split(".", 1)
            return f"blocks.{int(number) - 1}.{rest}"
        return names.get(name, name.replace(f"fcs.{last}.", "linear."))
    head.load_state_dict({ours(k): v.clone() for k, v in state.items()})
    return head.eval()


def golden_difformer(g, settings, layers, steps):
    """A DifFormer of a case's settings."""
    dims, sides = g.config["feature_dims"], g.config["feature_sizes"]
    shapes = {b: (channels, side, side) for (b, channels), side in zip(dims.items(), sides.values())}
    arc = settings["fusion_arc"].split("Attention:")[1].split(",")[0]
    dim, heads, ratio, depth = (int(n) for n in arc.split(":"))
    places = {t: layers for t in steps}
    return probe.DifFormer(shapes, places, g.config["num_classes"], settings["pre_pool_size"], dim, heads,
                           ratio, depth)


@pytest.mark.parametrize("case", ["linear", "mlp"])
def test_golden_linear_and_mlp_heads(case):
    g, settings, maps = golden_heads(case)
    x = probe.pool_cells(maps[settings["block"], settings["t"]], settings["pre_pool_size"]).flatten(1)
    hidden = [int(n) for n in settings["head_arc"].split("_") if n]
    head = load_official(probe.MLPHead(x.size(1), g.config["num_classes"], hidden), g.state_dict[case])
    assert_close(head(x), g.outputs[case])


@pytest.mark.parametrize("case", ["attention", "difformer"])
def test_golden_attention_head_and_difformer(case):
    g, settings, maps = golden_heads(case)
    blocks, steps = settings["blocks"], settings["steps"]
    head = load_official(golden_difformer(g, settings, blocks, steps), g.state_dict[case])
    found = [maps[b, t] for t in steps for b in blocks]
    ours = {case: head(*found)}
    if case == "difformer":
        for b in blocks:
            tokens = head.pre_layer[str(b)](maps[b, steps[0]])
            ours[f"difformer_tokens_b{b}_t{steps[0]}"] = tokens.flatten(2).mT
        for t, z in zip(steps, head.read(*found).chunk(len(steps), 1)):
            ours[f"difformer_cls_t{t}"] = z
    assert_outputs(g.outputs, ours)


def golden_encoder():
    g = golden("diffssl_heads")
    return g, golden_unet(g.config["unet"], g.state_dict["encoder"]).requires_grad_(False)


def test_golden_encoder_gives_the_features_that_heads_read():
    g, model = golden_encoder()
    dims, sides = g.config["feature_dims"], g.config["feature_sizes"]
    assert {b: (dims[b], sides[b], sides[b]) for b in dims} == model.layers
    for (b, t), official in golden_heads("difformer")[2].items():
        [ours] = model.features((g.inputs["x0"] + 1) / 2, t, [b], noise=g.inputs[f"noise_t{t}"])
        assert_close(ours, official)


def golden_diffeed():
    """The golden DifFeed: file, settings, network, head, and what the head reads."""
    (g, model), settings = golden_encoder(), golden("diffssl_heads").config["cases"]["diffeed"]
    inner = golden_difformer(g, settings, settings["second_fw_b_list"], [settings["t"]])
    feedback = {b: model.mirror(b) for b in settings["feedback_b_list"]}
    head = probe.DifFeed(model.features, model.layers, feedback,
                         load_official(inner, g.state_dict["diffeed_head"]))
    head.feedback_layers.load_state_dict(copy.deepcopy(g.state_dict["diffeed_feedback_layers"]))
    return g, settings, model, head.eval(), ((g.inputs["x0"] + 1) / 2, g.inputs[f"noise_t{settings['t']}"])


def test_golden_diffeed():
    g, settings, model, head, (x, noise) = golden_diffeed()
    add = head.fed_back(model.features(x, settings["t"], list(head.feedback), noise=noise))
    ours = {"diffeed": head(x, noise)}
    for name in g.outputs:
        *_, b = name.split("_b")
        if name.startswith("diffeed_feedback_from_b"):
            ours[name] = add[model.mirror(int(b))]
        if name.startswith("diffeed_second_pass_b"):
            ours[name], = model.features(x, settings["t"], [int(b)], add, noise)
    assert_outputs(g.outputs, ours)


class Threshold(nn.Module):
    """ReLU with its corner elsewhere."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def forward(self, x):
        return x * (x > self.at)


def test_golden_diffeed_training_step():
    grads = []
    for corner in (3e-6, -3e-6, 1e-5, -1e-5):     # what float32 cannot tell from 0 is cut off, or let through
        g, _, model, head, (x, noise) = golden_diffeed()
        # as the official run: gradients gather rounding errors
        model.to(memory_format=torch.contiguous_format)
        for layer in head.train().feedback_layers:
            layer[2] = Threshold(corner)
        logits = head(x, noise)
        loss = F.cross_entropy(logits, g.inputs["y"])
        loss.backward()
        norm = head.feedback_layers[0][1]
        ours = dict(train_logits=logits, train_loss=loss, grad_head_weight=head.linear.weight.grad,
                    grad_cls_token=head.head.cls_token.grad, running_mean_0=norm.running_mean,
                    running_var_0=norm.running_var)
        assert_outputs(g.outputs, {f"diffeed_{name}": v for name, v in ours.items()})
        assert all(p.grad is None for p in model.parameters())          # frozen
        grads.append([layer[0].weight.grad for layer in head.feedback_layers])
    for i, ways in enumerate(zip(*grads)):            # row by row, the official run has done one or the other
        official = g.outputs[f"diffeed_grad_feedback_{i}_conv"]
        errors = torch.stack([(ours - official).abs().flatten(1).amax(1) for ours in ways])
        right = errors <= 1e-4 * official.abs().max()
        assert right.any(0).all() and right.all(0).float().mean() > 0.8  # few rows are in question


def settings(**options):
    """Flags of probe.py as settle() leaves them."""
    return probe.settle(probe.Config(run="", device="cpu", workers=0, **options))


def test_a_difformer_of_one_place_is_the_attention_head():
    sizes = dict(classes=5, cells=4, dim=16, heads=4)
    head, m = probe.DifFormer({3: (12, 6, 6)}, {90: [3]}, **sizes), torch.randn(2, 12, 6, 6)
    norm, project = head.pre_layer["3"][1:]
    x = project(F.layer_norm(probe.pool_cells(m, 4), (12, 4, 4), norm.weight, norm.bias)).flatten(2).mT
    x = torch.cat([head.cls_token.expand(2, -1, -1), x], 1)
    for block in head.blocks:
        x = block(x)
    assert_close(head(m), head.linear(x[:, 0]), 1e-6)
    twice = probe.DifFormer({3: (12, 6, 6)}, {90: [3], 150: [3]}, **sizes)
    twice.load_state_dict({**head.state_dict(), "linear.weight": head.linear.weight.repeat(1, 2),
                           "linear.bias": head.linear.bias})
    assert_close(twice.read(m, m), head.read(m).repeat(1, 2), 1e-6)     # all steps share one transformer
    assert_close(head(m.flip(3)), head(m), 1e-5)                        # fresh, it knows no places


def test_the_published_heads_have_the_published_numbers_of_parameters():
    shapes = published_unet().layers
    with torch.device("meta"):
        attention = probe.DifFormer(shapes, {150: [24]}, 1000)
        fused = probe.DifFormer(shapes, dict.fromkeys((90, 150, 300), [19, 24, 30]), 1000)
        feedback = probe.feedback_of(published_unet(), types.SimpleNamespace(feedback=""))
        fed = probe.DifFeed(None, shapes, feedback, attention)
        heads = [probe.MLPHead(4 * 1024, 1000), attention, fused, fed]
    assert [sum(p.numel() for p in head.parameters())
            for head in heads] == [4_097_000, 27_786_216, 31_802_344, 30_545_896]


def test_diffeed_learns_through_a_frozen_network_of_any_kind():
    # 7 and 9 change size or channels on their way
    for model, layers, late in [(adm(), [8], [6, 7, 9]), (mage(), [2], [3, 4])]:
        cfg = settings(head="diffeed", pool="2", feedback=",".join(map(str, late)))
        kind, most, x = type(model.t_range[1]), model.t_range[1], some_images()
        wanted = [probe.Place(b, t, "2") for t in (kind(0.1 * most), kind(0.3 * most)) for b in layers]
        found = probe.reader({"top1": model}, wanted, cfg)(x, torch.arange(4))
        head = probe.new_head("top1", {"top1": model}, wanted, found, 3, cfg)
        assert list(head.feedback.items()) == [(b, model.mirror(b)) for b in late]
        head(*probe.features_of(found, "top1")).square().sum().backward()
        used = [early < max(layers) for early in head.feedback.values()]
        for layer, early in zip(head.feedback_layers, head.feedback.values()):
            assert early > max(layers) or layer[0].weight.grad.abs().max() > 0
        assert any(used) and all(p.grad is None and not p.requires_grad for p in model.parameters())
        assert set(dict(head.named_parameters())) == set(dict(head.named_parameters(remove_duplicate=False)))
        assert not {id(p) for p in head.parameters()} & {id(p) for p in model.parameters()}
        fed_back, model = head.fed_back, model.requires_grad_(True)
        head.fed_back = lambda maps: fed_back(maps) if not any(m.requires_grad for m in maps) else forbidden()
        head.read(*probe.features_of(found, "top1"))  # even if it were to learn: not through the first pass


def test_what_is_fed_back_by_default_is_the_last_of_each_size_or_all():
    cfg = types.SimpleNamespace(feedback="")
    assert probe.feedback_of(published_unet(), cfg) == {21: 17, 24: 14, 27: 11, 30: 8, 33: 5, 36: 2}
    assert probe.feedback_of(mage(depth=3, decoder_depth=3), cfg) == {4: 3, 5: 2}
    for model, wrong, right in [(published_unet(), "1", "20 to 37"), (published_unet(), "40", "20 to 37"),
                                (mage(), "2", "3 to 4")]:
        with pytest.raises(unified.UserError, match=f"--feedback {wrong}.*{right}"):
            probe.feedback_of(model, types.SimpleNamespace(feedback=wrong))


def test_the_learning_rate_of_diffssl_is_torchs_step_law():
    cfg = settings(head="attention", sgd=True)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.05)
    law = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.1)
    for epoch in range(28):
        torchs = pytest.approx(optimizer.param_groups[0]["lr"])
        assert probe.lr_at(epoch, cfg) == torchs and probe.lr_at(epoch + 0.99, cfg) == torchs
        optimizer.step()
        law.step()
    peaks = {name: probe.lr_at(0, settings(head=name, sgd=True)) for name in probe.SGD}
    assert peaks == pytest.approx({"linear": 0.01, "mlp": 0.01, "attention": 0.05, "difformer": 0.05,
                                   "diffeed": 0.01})
    cosine = [probe.lr_at(e, settings(head="linear", lr=0.1)) for e in (0, 10, 90)]
    assert cosine == pytest.approx([0, 1.6, 0])


def test_an_image_always_looks_the_same_and_a_fresh_crop_does_not():
    model, x = adm(), some_images()
    wanted = [probe.Place(b, t, "mean") for t in (9, 30) for b in (3, 8)]
    cfg = settings(head="linear", seed=1)
    read = probe.reader({"top1": model, "untrained": model}, wanted, cfg)
    one, again, other = read(x, torch.arange(4)), read(x[2:], torch.arange(2, 4)), read(x, torch.arange(4, 8))
    assert {name for name, _ in one} == {"top1", "untrained", "pixels"}
    for place in wanted:
        assert_close(one["top1", place][2:], again["top1", place], 1e-5)
        assert not one["top1", place].allclose(other["top1", place], atol=1e-3)
        assert one["top1", place].equal(one["untrained", place])        # all networks see the same noise
        alone = probe.feature_vectors(model, [place], x, unified.hash_ints(1, torch.arange(4)))[place]
        assert_close(one["top1", place], alone, 1e-5)                   # whatever else is read
    assert one["pixels", None].equal(probe.pool_cells(x, probe.PIXEL_SIDE).flatten(1))


def test_places_are_read_as_their_names_say():
    model, x, seeds = adm(), some_images(), torch.arange(4)
    own, mean, four = probe.Place(8, 9, "mean"), probe.Place(3, 9, "mean"), probe.Place(3, 9, "2")
    assert (model.best_layer, model.best_t) == own[:2]
    found = probe.feature_vectors(model, [own, mean, four], x, seeds)
    noise = probe.noise_of(model, 9, seeds)
    assert found[own].equal(model.embed(x, noise))
    m = model.features(x, 9, [3], noise=noise)[0]
    assert_close(found[mean], F.layer_norm(m.mean((2, 3)), (8,), eps=1e-6), 1e-5)
    assert_close(found[four], torch.stack([m[:, :, r:r + 4, c:c + 4].mean((2, 3)) for r in (0, 4)
                                           for c in (0, 4)], 2).flatten(1), 1e-5)
    assert list(found) == [own, mean, four] and probe.pool_cells(m, 100).equal(m)


def test_a_sweep_reads_every_layer_at_the_steps_of_diffssl():
    wanted = probe.places_to_read(published_unet(), settings(sweep=True))
    assert len(wanted) == 37 * 8 and {place.layer for place in wanted} == set(range(1, 38))
    assert list(dict.fromkeys(place.t for place in wanted)) == [0, 10, 30, 50, 90, 150, 300, 500]
    assert probe.places_to_read(mage(), settings()) == [probe.Place(2, 0.0, "mean")]
    assert {place.t for place in probe.places_to_read(mage(), settings(sweep=True, t="0,0.5"))} == {0.0, 0.5}
    assert probe.places_to_read(published_unet(), settings()) == [probe.Place(24, 90, "mean")]


def test_probing_many_places_at_once_is_probing_each():
    (x, y), (x_test, y_test) = clouds(120, 2.0), clouds(90, 2.0, seed=1)
    places = torch.stack([x, x.flip(1), x * torch.randn(5)])
    tests = torch.stack([x_test, x_test.flip(1), torch.randn(90, 5)])
    each = [probe.ridge_probe(a, y, b, y_test) for a, b in zip(places, tests)]
    assert probe.ridge_probe(places, y, tests, y_test) == each


def test_matryoshka_reads_the_first_dimensions_only_and_all_sizes_at_once():
    head, x = probe.ProbeHead(32, 3), torch.randn(16, 32)
    full, narrow = head.nested(x, dims=[32, 8])
    assert full.equal(head(x))
    z = head.eval().read(x)
    assert_close(head.nested(x, dims=[8])[0], z[:, :8] @ head.linear.weight[:, :8].T + head.linear.bias, 1e-6)
    cfg, y = settings(head="linear", sgd=True, epochs=12, lr=20.0, batch_size=64), torch.arange(64) % 4
    # half is known from the first four
    x = torch.cat([F.one_hot(y // 2 * 2, 4).float(), F.one_hot(y, 4).float()], 1)
    heads = {"top1": probe.MLPHead(8, 4)}
    probe.train_heads(heads, lambda epoch: [({("top1", 0): x}, y)] * 10, 10, [4, 8], cfg)
    four, eight = ((logits.argmax(1) == y).float().mean().item()
                   for logits in heads["top1"].nested(x, dims=[4, 8]))
    assert (four, eight) == (0.5, 1.0)


def test_a_heat_map_is_darker_where_accuracy_is_higher():
    scores = {probe.Place(b, t, "mean"): (b + 10 * t) / 40 for b in (1, 2, 3) for t in (0, 1, 2)}
    best = max(scores, key=scores.get)
    image = probe.heat_map(scores, best, "title", w=40, h=30).convert("RGB")
    dark = [255 - image.getpixel((60 + 40 * i + 5, 60 + 30 * j + 5))[0] for i in (0, 1, 2) for j in (0, 1, 2)]
    assert dark == sorted(dark) and dark[0] == 0 and dark[-1] == 255 - 0x1f
    framed = [image.getpixel((60 + 40 * i + 1, 60 + 30 * j + 10)) == (0xd6, 0x27, 0x28) for i in (0, 1, 2)
              for j in (0, 1, 2)]
    assert framed == [False] * 8 + [True]


def test_a_pooling_that_all_places_share_is_not_repeated_in_titles():
    one = {probe.Place(b, t, "mean"): 0.0 for b in (1, 2) for t in (0.0, 0.5)}
    assert list(probe.columns_of(one).values()) == ["t 0", "t 0.5"]
    two = one | {probe.Place(1, 0.5, "2"): 0.0}
    assert list(probe.columns_of(two).values()) == ["t 0, mean", "t 0.5, mean", "t 0.5, 2"]


def test_knn_and_few_shot_choose_their_place_by_knn_and_the_others_by_ridge():
    """An exclusive or, which neighbours tell and no plane, and a plane hidden among noise."""
    g = torch.Generator().manual_seed(0)
    y, noise = torch.arange(400) % 2, torch.randn(400, 60, generator=g)
    corners = torch.randint(2, (400, 2), generator=g)
    corners[:, 1] = (corners[:, 0] + y) % 2
    places = {"xor": 2.0 * corners - 1 + 0.1 * noise[:, :2],
              "plane": torch.cat([0.5 * (2 * y[:, None] - 1), noise], 1)}
    for head, best in (("ridge", "plane"), ("linear", "plane"), ("knn", "xor"), ("fewshot", "xor")):
        scores = probe.score_places(places, y, 100, settings(head=head))
        assert max(scores, key=scores.get) == best, (head, scores)
    x = places["xor"]
    assert probe.score_places(places, y, 100, settings(head="knn", k=3))["xor"] == \
        probe.knn(x[100:], y[100:], x[:100], y[:100], 3)


@pytest.mark.parametrize("held, warned", [(99, True), (100, False)])
def test_few_held_out_images_that_choose_a_place_are_warned_of_in_a_line(held, warned, monkeypatch, capsys):
    wanted = [probe.Place(b, 0.0, "mean") for b in (1, 2)]
    y = torch.arange(10 * held) % 2
    found = {("model", place): torch.randn(len(y), 2) for place in wanted}
    monkeypatch.setattr(probe, "extract_features", lambda *_: (found, y))
    probe.choose(mage(), wanted, None, torch.arange(len(y)), settings(head="ridge"))
    lines = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(lines) == warned and all(f"{held} held-out images" in line for line in lines)


def test_features_that_do_not_fit_into_memory_are_a_users_mistake_where_its_size_is_known(monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 100)                # 10,000 bytes
    cfg, data = settings(head="ridge"), image_set(6, 16)
    read = (lambda x, names: {"": x.flatten(1)}, data, torch.arange(6), cfg, "")
    assert_refused("6 images need .*--limit", probe.extract_features, *read)
    monkeypatch.delattr(os, "sysconf")                                  # as on Windows: nobody says how much
    assert probe.extract_features(*read)[0][""].shape == (6, 768)


# ------------------------------------------------------------------------------------------------------------
# The scripts of ADM and of the heads


@pytest.fixture(scope="module")
def finished_adm(photos, tmp_path_factory):
    """The folder of a U-Net's checkpoint, its weights drawn."""
    folder, arch = tmp_path_factory.mktemp("adm"), dict(model="adm", image_size=16, ch=8, ch_mult=(1, 2),
                                                        blocks=1, attention=(2,), head=8, groups=4, steps=100)
    config = {"arch": arch, "dataset": str(photos), "classes": ["cat", "dog"]}
    train.save_checkpoint(folder / "model.pt", {"model": adm().state_dict(), "config": config})
    return folder


def rows_of(run, name="probe.jsonl"):
    """What the file holds, none if it is not there."""
    path = run / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def probed(run, *args):
    """What probe.py prints, and the rows that it adds to probe.jsonl."""
    before = len(rows_of(run))
    printed = script("probe.py", run, "--device", "cpu", "--workers", 0, *args)
    return printed, rows_of(run)[before:]


QUICK = ("--epochs", 2, "--batch-size", 16)


@pytest.mark.parametrize("which", ["mage", "adm"])
@pytest.mark.parametrize("head, more, layer, rows", [
    ("linear", ("--sgd", "--pool", 2, "--matryoshka", *QUICK), "best", None),
    ("mlp", ("--hidden", "16,8", *QUICK), "best", 1),
    ("attention", ("--pool", 2, "--layers", "2,3", "--sgd", *QUICK), None, 1),
    ("difformer", ("--pool", 2, "--layers", "2,3", "--t", "two", *QUICK), [2, 3], 1),
    ("diffeed", ("--pool", 2, "--epochs", 1, "--sgd", "--augment"), "best", 1),
    ("linear", ("--augment", "--epochs", 2), "best", 1), ("ridge", ("--layers", "2,3"), None, 1),
    ("knn", (), "best", 1), ("fewshot", (), "best", 3), ("finetune", QUICK, "best", 1)])
def test_every_head_reads_every_network(which, head, more, layer, rows, finished, finished_adm):
    run, steps = (finished[0], [0.0, 0.3]) if which == "mage" else (finished_adm, [9, 30])
    more = [",".join(map(str, steps)) if word == "two" else word for word in more]
    printed, found = probed(run, "--head", head, *more)
    best = unified.load_model(run)[0].best_layer
    without_pixels = head in (*probe.ON_MAPS, "finetune") or "--matryoshka" in more
    assert {row["head"].split("-")[0] for row in found} == {head} and len(found) == rows or not rows
    for row in found:
        assert row["layer"] == (best if layer == "best" else layer) or not layer and row["layer"] in (2, 3)
        assert 0 <= row["top1"] <= 1 and 0 <= row["untrained"] <= 1
        assert (row["pixels"] is None) == without_pixels
        assert (row["n_train"] == 48 or head == "fewshot")
        assert row["t"] == (steps if head == "difformer" else steps[0])
    if "--matryoshka" in more:
        assert [row["head"] for row in found][:3] == ["linear-8", "linear-16", "linear-32"]
        assert f"{found[-1]['head']} on" in printed
    assert ("same network untrained" in printed or head == "finetune")
    assert ("raw pixels" in printed) != without_pixels


def test_a_sweep_prints_a_table_draws_it_and_reads_the_best_place(finished_adm):
    printed, (row,) = probed(finished_adm, "--sweep", "--t", "0,30")
    model = unified.load_model(finished_adm)[0]
    table = [line.split() for line in printed.splitlines() if line[:5].strip().isdigit()]
    assert [int(line[0]) for line in table] == list(model.layers) and all(len(line) == 3 for line in table)
    cells = {(int(layer), t): text for layer, *row in table for t, text in zip((0, 30), row)}
    taken, = [place for place, text in cells.items() if text.startswith("[")]
    accuracy = {place: float(text.strip("[]")) for place, text in cells.items()}
    assert taken == (row["layer"], row["t"]) and accuracy[taken] == max(accuracy.values())
    assert min(PIL.Image.open(finished_adm / "sweep.png").size) > 100
    head, = [line for line in printed.splitlines() if line.startswith("layer ")]
    assert head.split() == ["layer", "t", "0", "t", "30"]               # as in sweep.png


def test_a_row_of_a_probe_says_what_it_is_of(finished_adm):
    _, (row,) = probed(finished_adm, "--head", "knn", "--seed", 3)
    of = {"run": str(finished_adm), "model": "adm", "head": "knn", "layer": 8, "t": 9, "pool": "mean",
          "k": 20, "n_train": 48, "n_test": 16, "seed": 3, "lr": None, "epochs": None}
    assert {key: row[key] for key in of} == of and {"untrained", "pixels", "seconds", "dataset"} <= row.keys()
    assert row["standard_error"] == pytest.approx(math.sqrt(row["top1"] * (1 - row["top1"]) / 16), abs=1e-4)
    age = datetime.datetime.now(datetime.timezone.utc) - datetime.datetime.fromisoformat(row["date"])
    assert datetime.timedelta(minutes=-1) < age < datetime.timedelta(minutes=9)
    _, (row,) = probed(finished_adm, "--head", "linear", "--epochs", 2, "--lr", 0.5)
    assert (row["epochs"], row["lr"], row["k"], row["n_test"]) == (2, 0.5, None, 16)


def test_neighbours_are_counted_as_asked_and_said(finished_adm):
    for more, k in (((), 20), (("--k", 3), 3), (("--k", 100), 100)):
        printed, (row,) = probed(finished_adm, "--head", "knn", *more)
        assert row["k"] == k and f", k {k}, 48 training images, 16 test images" in printed
        assert ("48 training images only, and all of them vote" in printed) == (k == 100)


def test_shots_that_are_not_there_are_said(finished_adm):
    printed, (row,) = probed(finished_adm, "--head", "fewshot", "--shots", 100)
    assert "only 24 training images; with 100 a class" in printed and row["n_train"] == 48
    assert ", 48 training images," in printed and "from draw to draw" in printed


def test_a_unet_generates_and_inpaints_as_a_user_asks(photos, finished_adm, tmp_path):
    file = next((photos / "val" / "cat").iterdir())
    for name, more in [("a", ("--steps", 5)), ("b", ("--eta", 0, "--steps", 4, "--gif")),
                       ("c", ("--image", file, "--box", "2,2,9,9", "--steps", 5))]:
        script("sample.py", finished_adm, "--n", 3, "--out", tmp_path / f"{name}.png", *more)
        assert numpy.array(PIL.Image.open(tmp_path / f"{name}.png")).std() > 10
    assert PIL.Image.open(tmp_path / "b.gif").n_frames == 4


@pytest.mark.parametrize("args, words", [
    (["--head", "difformer", "--sweep"], "--sweep belongs to"), (["--matryoshka"], "--matryoshka belongs to"),
    (["--sgd", "--head", "knn"], "--sgd belongs to"), (["--feedback", "5"], "--feedback belongs to"),
    (["--head", "attention", "--pool", "mean"], "cells"), (["--pool", "0"], "pooling '0'"),
    (["--pool", "class"], "no class position"), (["--layers", "40"], "no layer 40"),
    (["--t", "100"], "--t 100"), (["--t", "1.5"], "--t 1.5"), (["--k", "5"], "--k belongs to"),
    (["--head", "knn", "--shots", "4"], "--shots belongs to --head fewshot"),
    (["--head", "knn", "--hidden", "64"], "--hidden belongs to --head mlp"),
    (["--save", "a.txt"], "no .npz at its end"), (["--save", "no/where/a.npz"], "in no folder that can"),
    (["--save", "a.npz", "--sweep"], "one place"), (["--save", "a.npz", "--head", "knn"], "probes nothing"),
    (["--save", "a.npz", "--labels", "0.1"], "probes nothing"), (["--save", "a.npz", "--t", "9,30"], "place"),
    (["--head", "fewshot", "--epochs", "3"], "--epochs belongs to"),
    (["--head", "diffeed", "--feedback", "2"], "--feedback 2"),
    (["--head", "segment", "--pool", "mean"], "--pool takes the number"),
    (["--head", "segment", "--ignore", "x"], "--ignore takes"), (["--labels", "2"], "--labels"),
    (["--head", "segment", "--sweep"], "--sweep belongs"),
    (["--save", "a" * 250 + ".npz"], "too long a name"),
    (["--sweep", "--layers", "2", "--t", "0"], "--sweep compares places"),
    (["--head", "diffeed", "--layers", "1"], "and the last one read is 1"),
    (["--head", "linear", "--batch-size", "1"], "take 2 or more for each"),
    (["--samples", "a.npz", "--seed", "7"], "leave --head"),
    (["--dataset", "tree", "--data-dir", "."], "another folder"),
    (["--head", "segment", "--dataset", "tree", "--labels", "0.1"], "take 20"),
    (["--head", "segment", "--dataset", "tree", "--subset", "no.txt"], "no.txt cannot be read as a list of")])
def test_a_probe_that_cannot_be_is_refused_in_one_sentence(args, words, finished_adm, tmp_path, monkeypatch):
    masks_tree(tmp_path / "tree", "tree")
    monkeypatch.chdir(tmp_path)
    assert words in attempt("probe.py", finished_adm, "--device", "cpu", "--workers", 0, *args)


# ------------------------------------------------------------------------------------------------------------
# Segmentation


def test_the_mean_iou_is_that_of_a_count_by_hand():
    generator = torch.Generator().manual_seed(0)
    labels, predictions = (torch.randint(0, 4, (3, 5, 7), generator=generator) for _ in range(2))
    labels[labels == 3] = -1                                # class 3 is predicted only, 4 occurs nowhere
    confusion = sum(probe.confusion_of(y, p, 5) for y, p in zip(labels, predictions))
    pairs = [(y, p) for y, p in zip(labels.flatten().tolist(), predictions.flatten().tolist()) if y >= 0]
    by_hand = [sum(y == p == c for y, p in pairs) / sum(c in (y, p) for y, p in pairs) for c in range(4)]
    iou = probe.intersection_over_union(confusion)
    assert iou[:4].tolist() == by_hand and iou[3] == 0 and iou[4].isnan() and confusion.sum() == len(pairs)
    assert iou.nanmean().item() == pytest.approx(sum(by_hand) / 4)


@pytest.mark.parametrize("height, width", [(12, 12), (12, 13), (12, 41), (30, 12)])
def test_windows_cover_every_pixel_and_weigh_evenly(height, width):
    places, weights = torch.arange(height * width).view(1, 1, height, width), []

    def predict(window, i):
        weights.append(torch.isin(places, window)[0, 0])
        first = window[0, 0, 0, 0].item()
        assert window[0, 0].equal(places[0, 0, first // width:, first % width:][:12, :12])
        return F.one_hot(torch.full((1, 12, 12), i), 20).movedim(-1, 1).float()
    p = probe.over_windows(predict, places, 12)[0]
    held = torch.stack(weights).float()                                                     # (V, h, w)
    assert held.sum(0).min() == 1 and held.flatten(1).sum(1).eq(144).all()
    assert_close(p, F.pad(held / held.sum(0), (0, 0, 0, 0, 0, 20 - len(held))), 1e-6)
    starts = [sorted({divmod(v.flatten().int().argmax().item(), width)[i] for v in held}) for i in (0, 1)]
    assert all(later - start <= 8 for v in starts for start, later in zip(v, v[1:]))        # two thirds
    assert len(held) == len(starts[0]) * len(starts[1])


@pytest.mark.parametrize("kind", ["files", "memory"])
def test_an_image_that_is_its_label_stays_so_through_scale_crop_and_flip(kind, tmp_path):
    label = numpy.kron(numpy.arange(6).reshape(2, 3), numpy.ones((20, 20), int)).astype(numpy.uint8)
    if kind == "files":
        for folder, image in (("images", numpy.dstack([label] * 3)), ("masks", label)):
            for part in ("train", "val"):
                (tmp_path / folder / part).mkdir(parents=True)
                PIL.Image.fromarray(image).save(tmp_path / folder / part / "0.png")
        data = open_masks(tmp_path)[0]
    else:
        x = torch.from_numpy(numpy.dstack([label] * 3 + [label + 1])).movedim(2, 0)[None, :, :40, 10:50]
        data = probe.ImageTensor(x, torch.zeros(1), [*"012345"], (0.25, 1.0))
    side, flips = data.size, set()
    for crops in [None, *torch.arange(40).view(-1, 1, 1)]:
        x, _ = next(data.batches([(torch.zeros(1, dtype=torch.long), crops)]))
        image, mask = (255 * x.view(4, side, side)).split([3, 1])
        assert_close(mask.round(), mask, 1e-6)                                          # never between two
        assert {*mask.unique().round().int().tolist()} <= {*range(1, 7)}
        inside = F.max_pool2d(mask, 5, 1, 2).eq(-F.max_pool2d(-mask, 5, 1, 2))[0]
        assert inside.any() and (image[:, inside] - mask[:, inside] + 1).abs().max() < 0.6
        flips |= set(mask[0, side // 4].round().diff().sign().tolist())
    assert flips == {-1, 0, 1}


def test_masks_of_shapes_are_exact_and_change_no_image():
    images, labels = unified.draw_shapes(torch.arange(100), 32)
    with_masks, same = unified.draw_shapes(torch.arange(100), 32, masks=True)
    assert with_masks[:, :3].equal(images) and with_masks.dtype == torch.uint8 and same.equal(labels)
    masks = with_masks[:, 3]
    assert masks.flatten(1).amax(1).equal((labels + 2).byte())
    ground = (images == unified.GROUND[:, None, None]).all(1)
    assert (masks[ground] == 1).all()
    for image, mask in zip(images, masks):                          # the edge is at half of the colour
        color = image[:, mask > 1].float().sub(128).abs().amax(1)
        depth = (image.float() - 128).abs().amax(0) / color.max()
        assert ((depth > 0.5) == (mask > 1)).float().mean() > 0.99


def test_the_head_reaches_the_ceiling_on_features_that_hold_the_label():
    data, _ = unified.draw_shapes(torch.arange(48), 16, masks=True)
    data = probe.ImageTensor(data, torch.zeros(48), ["ground", *unified.SHAPES], (0.5, 1.0))

    def read(x, names):
        mask = (255 * x[:, 3]).round()
        maps = F.adaptive_avg_pool2d(F.one_hot(mask.long() - 1, 9).movedim(-1, 1).float(), 8)
        return {("model", None): maps, ("mask", None): mask.byte()}
    torch.manual_seed(0)
    heads, cfg = {"model": probe.SegmentHead(9, 9)}, settings(head="segment", lr=1.6, epochs=20)
    x = read(next(data.batches([(torch.arange(48), None)]))[0], None)
    probe.train_heads(heads, probe.cached_batches(x, torch.zeros(48), cfg), 3, [None], cfg)
    confusions, examples = probe.score_segments(heads, read, data, cfg)
    found, ceiling = (probe.intersection_over_union(confusions[name]).mean() for name in ("model", "ceiling"))
    assert found > ceiling - 0.02 > 0.5 and len(examples) == 8
    assert confusions["model"].sum() == 48 * 16 * 16
    nn.init.constant_(heads["model"].linear.bias[:1].data, 1e3)         # it sees ground everywhere ...
    assert probe.score_segments(heads, read, data, cfg)[0]["model"][:, 1:].sum() == 0
    for ignored in ([0], [0, 3, 8]):                                    # ... unless ground is ignored
        confusions, _ = probe.score_segments(heads, read, probe.without(data, ignored), cfg)
        assert all(confusion[:, ignored].sum() == 0 for confusion in confusions.values())


def open_masks(root, **options):
    """The sets to train and to test on of a folder with masks, at 16 pixels."""
    return probe.open_masks(root, "", 16, settings(head="segment", **options))


def masks_tree(folder, layout):
    """Three images of 20 x 24 pixels to train on and one to test on, in the layout; a row of each mask is
    0, 1, 2, 255, the other rows are 2."""
    names = {"voc": ("JPEGImages", "SegmentationClass") * 2,
             "tree": ("images/train", "masks/train", "images/val", "masks/val"),
             "ade": ("images/training", "annotations/training",
                     "images/validation", "annotations/validation")}[layout]
    for i in range(4):
        images, masks = (folder / name for name in (names[:2] if i < 3 else names[2:]))
        images.mkdir(parents=True, exist_ok=True)
        masks.mkdir(parents=True, exist_ok=True)
        values = numpy.full((24, 20), 2, numpy.uint8)
        values[0] = numpy.repeat([0, 1, 2, 255], 5)
        mask = PIL.Image.fromarray(values)
        if layout == "voc":
            mask.putpalette(list(range(256)) * 3)
        mask.save(masks / f"{i}.png")
        PIL.Image.fromarray(numpy.full((24, 20, 3), 60 * i, numpy.uint8)).save(images / f"{i}.jpg")
    if layout == "voc":
        (folder / "ImageSets/Segmentation").mkdir(parents=True)
        (folder / "ImageSets/Segmentation/train.txt").write_text("0\n1\n2\n")
        (folder / "ImageSets/Segmentation/val.txt").write_text("3\n")
    return folder


@pytest.mark.parametrize("layout, ignore, row, rest, classes", [
    ("ade", "", [-1, 0, 1, -1], 1, 150), ("voc", "", [0, 1, 2, -1], 2, 21),
    ("tree", "", [0, 1, 2, -1], 2, 3), ("tree", "0", [-1, 1, 2, -1], 2, 3)])
def test_masks_are_read_as_their_layout_says_and_shifted_once(layout, ignore, row, rest, classes, tmp_path):
    train_set, test_set = open_masks(str(masks_tree(tmp_path, layout)), ignore=ignore)
    assert (len(train_set), len(test_set), len(train_set.classes)) == (3, 1, classes)
    x, _ = next(test_set.batches([(torch.arange(1), None)]))
    assert x.shape == (1, 4, 24, 20)                                                        # its own size
    label = (255 * x[0, 3]).round().int() - 1
    assert label[0, ::5].tolist() == row and (label[1:] == rest).all()
    for crops, shape in ((None, (3, 4, 16, 16)), (torch.arange(3)[:, None], (3, 1, 4, 16, 16))):
        x, _ = next(train_set.batches([(torch.arange(3), crops)]))
        assert x.shape == shape
        assert {*(255 * x[..., 3, :, :]).round().int().sub(1).unique().tolist()} <= {*row, rest}


def test_a_void_class_of_shapes_does_not_count(monkeypatch):
    monkeypatch.setattr(probe, "shapes", lambda train, size, masks: (
        *unified.draw_shapes(torch.arange(100), size, masks=masks), list(unified.SHAPES)))
    void, everything = (open_masks("shapes", ignore=value)[1].images[:, 3] for value in ("0,8", ""))
    assert void.equal(torch.where((everything == 1) | (everything == 9), 0, everything))
    assert everything.unique().tolist() == list(range(1, 10))


@pytest.mark.parametrize("layout, ignore, ignored", [("tree", "1,9", [1]), ("ade", "3", [2]),
                                                     ("voc", "", [])])
def test_ignored_values_are_classes_that_are_never_predicted(layout, ignore, ignored, tmp_path):
    sets = open_masks(masks_tree(tmp_path, layout), ignore=ignore)
    assert [data.ignored for data in sets] == [ignored, ignored]
    assert open_masks("shapes", ignore="0,8")[1].ignored == [0, 8]


def grey_png(values, bits):
    """Bytes of a grey PNG with so many bits a value, which Pillow cannot write."""
    digits = values[..., None] >> numpy.arange(bits)[::-1] & 1
    rows = b"".join(b"\0" + numpy.packbits(row).tobytes() for row in digits)

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return b"\x89PNG\r\n\x1a\n" + b"".join([
        chunk(b"IHDR", struct.pack(">IIBBBBB", *values.shape[::-1], bits, 0, 0, 0, 0)),
        chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_value_of_a_grey_mask_is_the_class_at_any_depth(bits, tmp_path):
    values = (numpy.arange(8 * 16).reshape(8, 16) % 2 ** bits).astype(numpy.uint8)
    (tmp_path / "mask.png").write_bytes(grey_png(values, bits))
    assert (probe.read_mask(tmp_path / "mask.png", 0, [255], 254, (16, 8)) == values + 1).all()


def test_a_list_that_voc_lacks_is_asked_for(tmp_path):
    root = masks_tree(tmp_path, "voc")
    (root / "ImageSets/Segmentation/val.txt").unlink()
    assert_refused("there is no .*val.txt", open_masks, root)


def test_masks_without_a_pixel_that_counts_are_refused_before_any_work(tmp_path):
    root = masks_tree(tmp_path, "tree")
    PIL.Image.new("L", (20, 24), 255).save(root / "masks/val/3.png")
    assert_refused("no mask to test on .* has a pixel of any class", open_masks, root)


def test_names_of_classes_are_read(tmp_path):
    root = masks_tree(tmp_path / "tree", "tree")
    (root / "classes.txt").write_text("ground\ncat\ndog\nbird\n")
    assert open_masks(root)[0].classes == ["ground", "cat", "dog", "bird"]
    (root / "classes.txt").write_text("ground\ncat\ndog\n\n")                       # a blank line is no class
    assert len(open_masks(root)[0].classes) == 3
    for text, sentence in (("\xe9t\xe9\n".encode("latin1"), "cannot be read as a list of names"),
                           (b"ground\n\nother\n", "has no name for class 1"),
                           (b"ground\nother\nother\n", "names other twice")):
        (root / "classes.txt").write_bytes(text)
        assert_refused(sentence, open_masks, root)
    root = masks_tree(tmp_path / "ade", "ade")
    lines = [f"{k}\tthing {k}\n" for k in range(1, 151)]
    (root / "objectInfo150.txt").write_text("Idx\tName\n" + "".join(lines))
    names = open_masks(root)[1].classes
    assert (names[0], names[149], len(names)) == ("thing 1", "thing 150", 150)


@pytest.mark.parametrize("layout, spoil, sentence", [
    ("tree", lambda mask: mask.convert("RGB"), "holds colours .RGB.*save one channel"),
    ("voc", lambda mask: mask.convert("RGB"), "holds colours .RGB"),
    ("tree", lambda mask: None, "cannot be read as a mask"),
    ("tree", lambda mask: mask.resize((20, 25)), "has 20 x 25 pixels and its image 20 x 24"),
    ("tree", lambda mask: PIL.Image.fromarray(numpy.uint16([[300] * 20] * 24)), "holds the class 300"),
    ("ade", lambda mask: mask.point(lambda v: 151), "holds the class 151, and 150 is the highest"),
    ("voc", lambda mask: mask.point(lambda v: 21), "holds the class 21, and 20 is the highest")])
def test_a_mask_that_cannot_be_one_is_refused_in_a_sentence_that_names_it(layout, spoil, sentence, tmp_path):
    root = masks_tree(tmp_path, layout)
    [path] = root.rglob("3.png")
    spoiled = spoil(PIL.Image.open(path))
    path.unlink()
    if spoiled:
        spoiled.save(path)
    with pytest.raises(unified.UserError, match=rf"3\.png {sentence}") as caught:
        open_masks(root)
    assert "\n" not in str(caught.value)


def test_a_mask_lies_on_its_image_as_viewers_show_it(tmp_path):
    root, turned = masks_tree(tmp_path, "tree"), PIL.Image.Exif()
    turned[0x0112] = 6                                                                      # by a quarter
    PIL.Image.new("RGB", (24, 20)).save(root / "images/train/1.jpg", exif=turned)
    plan = [(torch.tensor([1]), None)]
    assert next(open_masks(root)[0].batches(plan))[0].shape == (1, 4, 16, 16)
    PIL.Image.new("RGB", (20, 24)).save(root / "images/train/1.jpg", exif=turned)
    assert_refused(r"1\.png has 20 x 24 pixels and its image 24 x 20", open_masks, root)
    (root / "images/train/1.jpg").unlink()                              # a TIFF is turned as it is read
    PIL.Image.new("RGB", (24, 20)).save(root / "images/train/1.tif", exif=turned)
    assert next(open_masks(root)[0].batches(plan))[0].shape == (1, 4, 16, 16)
    mask = PIL.Image.open(root / "masks/train/1.png")
    turned[0x0112] = 3                                                  # the mask has a turn of its own
    mask.save(root / "turned.png", exif=turned)
    there, back = (probe.read_mask(root / name, 0, [255], 254, (20, 24))
                   for name in ("masks/train/1.png", "turned.png"))
    assert (there == back[::-1, ::-1]).all() and (there != back).any()


def test_a_folder_without_masks_is_told_the_layouts(photos):
    assert_refused("no images with masks in .*annotations/training .*masks/tr", open_masks, photos)


def test_a_part_that_lacks_masks_and_a_mask_of_two_images_are_named(tmp_path):
    root = masks_tree(tmp_path, "tree")
    shutil.copy(next((root / "images/train").glob("1.*")), root / "images/train/1.jpeg")
    assert_refused("share the mask .*1.png", open_masks, root)
    shutil.rmtree(root / "images/val")
    assert_refused("no images with masks in .*images/val, which the part val", open_masks, root)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_with_a_mask_is_named_and_replaced_or_left_out(workers, tmp_path, capsys):
    root = masks_tree(tmp_path, "tree")
    train_set, test_set = open_masks(root)
    for name in ("train/1", "val/3"):
        (root / f"images/{name}.jpg").write_bytes((root / f"images/{name}.jpg").read_bytes()[:200])
    [(x, _)] = train_set.batches([(torch.arange(3), torch.arange(3)[:, None])], workers)
    assert x[:, 0, 3].amax((1, 2)).gt(0).all()                                              # none is black
    [(x, y)] = test_set.batches([(torch.arange(1), None)], workers, False)
    assert not x.any() and x.shape == (1, 4, 16, 16) and y == -1                            # nothing counts
    assert capsys.readouterr().err.count("unreadable") == 2


@pytest.mark.parametrize("which, more, layers", [
    ("mage", (), 4), ("mage", ("--layers", "2,3", "--augment"), [2, 3]),
    ("adm", ("--layers", "1,3", "--t", "9,30", "--pool", "4"), [1, 3])])
def test_a_linear_head_segments_by_any_network(which, more, layers, finished, finished_adm, tmp_path):
    run, root = finished[0] if which == "mage" else finished_adm, masks_tree(tmp_path, "tree")
    printed, [row] = probed(run, "--head", "segment", "--dataset", root, "--epochs", 2, "--batch-size", 2,
                            *more)
    assert f"{row['protocol']}" in printed and "+-" not in printed
    for words in ("mIoU", "averaged to the cells", "untrained", "a patch a cell", "of a model trained on"):
        assert words in printed
    assert all(0 <= row[key] <= 1 for key in ("miou", "untrained", "pixels", "ceiling", "pixel_accuracy"))
    assert row["dataset"] == str(root) and list(row["iou"]) == ["0", "1", "2"] and row["layer"] == layers
    with PIL.Image.open(run / "segments.png") as sheet:
        assert sheet.width > sheet.height


# ------------------------------------------------------------------------------------------------------------
# Few labels, other data


def test_few_labels_are_balanced_and_the_same_whatever_is_probed(photos):
    data = probe.open_data(str(photos), "", 16, True)
    few, same, other, all_of_them = (
        probe.images_to_train_on(data, settings(head=head, labels=ratio, seed=seed))
        for head, ratio, seed in (("knn", 0.5, 0), ("finetune", 0.5, 0), ("knn", 0.5, 1), ("knn", 1.0, 0)))
    assert few.equal(same) and not few.sort().values.equal(other.sort().values)
    assert data.labels[few].bincount().tolist() == [12, 12] and len(few.unique()) == 24
    assert all_of_them.equal(probe.shuffled(48, 0)) and not few.equal(few.sort().values)
    with pytest.raises(unified.UserError, match="leave 10 training images"):
        probe.images_to_train_on(data, settings(head="knn", labels=0.2))


def test_a_subset_holds_the_images_that_a_file_names(photos, tmp_path):
    data, path = probe.open_data(str(photos), "", 16, True), tmp_path / "1percent.txt"
    cfg = settings(head="knn", subset=str(path))
    names = [p.name for p in data.paths[:15]] + [f"{p.parent.name}/{p.name}" for p in data.paths[24:39]]
    path.write_text("\n".join(names) + "\n")
    assert sorted(probe.images_to_train_on(data, cfg).tolist()) == [*range(15), *range(24, 39)]
    limited = probe.images_to_train_on(data, dataclasses.replace(cfg, labels=0.8, limit=20))
    assert len(limited) == 20 and set(limited.tolist()) < {*range(15), *range(24, 39)}
    path.write_text("\n".join(["none.png", *names, "neither.png"]))
    assert_refused("1percent.txt names 2 images .*none.png first", probe.images_to_train_on, data, cfg)
    path.write_text("\n")
    assert_refused("names no image", probe.images_to_train_on, data, cfg)
    path.write_text("\n".join(names))
    assert_refused("leave it out", probe.images_to_train_on, image_set(30, 16), cfg)  # it has no files


def test_a_subset_of_one_class_is_no_data_for_a_probe(photos, finished_adm, tmp_path):
    cats = sorted((photos / "train" / "cat").iterdir())
    (tmp_path / "cats.txt").write_text("\n".join(path.name for path in cats))
    printed = script("probe.py", finished_adm, "--workers", 0, "--subset", tmp_path / "cats.txt", expect=2)
    assert "24 training images are left, all of one class" in printed


def test_an_unreadable_image_of_a_subset_is_replaced_by_one_of_the_subset(tree):
    (tree / "train/ant/2.png").write_bytes(b"not an image")
    cfg = probe.Config(run=["x"], batch_size=3, workers=0, device="cpu", augment=True)
    for index, allowed in (([0, 2, 5], {(0, 0), (50, 1)}), ([2, 1, 5], {(10, 0), (50, 1)})):
        data, index = folder(tree / "train"), torch.tensor(index)
        batches = probe.fresh_batches(lambda x, names: {"": x}, data, index, cfg)
        seen = {pair for epoch in range(20) for x, y in batches(epoch) for pair in greys([(x[""], y)])}
        assert seen == allowed


def test_features_without_labels_say_why_they_have_none(photos, finished, tmp_path):
    odd = tmp_path / "odd"
    shutil.copytree(photos, odd)
    shutil.rmtree(odd / "val" / "cat")
    printed = script("probe.py", finished[0], "--dataset", odd, "--workers", 0, "--save", tmp_path / "z.npz")
    assert "no labels: " in printed and "cat only in one of them" in printed


def test_a_folder_that_may_not_be_opened_is_left_out_and_told(tree, monkeypatch):
    (tree / "train" / "lost+found").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "lost" not in os.fspath(path) and access(path, mode))
    data, _ = both_parts(tree)
    assert data.classes == ["ant", "bee"] and "lost+found" in data.summary


def test_a_subset_takes_the_class_or_the_folder_before_a_name_that_several_have(tmp_path, capsys):
    make_images(tmp_path, [f"{c}/deep/{i}.png" for c in "ab" for i in range(30)])
    data, path = probe.open_data(str(tmp_path), "", 8, True), tmp_path / "list.txt"
    cfg = settings(head="knn", subset=str(path))
    own = [f"a/{p.name}" for p, c in zip(data.paths, data.labels) if c == 0]
    path.write_text("\n".join(own))
    assert set(data.labels[probe.images_to_train_on(data, cfg)].tolist()) == {0}
    path.write_text("\n".join(p.removeprefix("a/") for p in own))
    assert_refused("several folders have.*write CLASS/NAME", probe.images_to_train_on, data, cfg)
    data.labels[:8] = 1
    probe.images_to_train_on(data, settings(head="knn", labels=1.0))
    assert "images, as some classes have fewer than" in capsys.readouterr().out


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_an_image_that_cannot_be_read_makes_a_batch_smaller_and_not_the_training_none(head, photos, finished,
                                                                                      tmp_path):
    data = shutil.copytree(photos, tmp_path / "photos")
    next((data / "train/cat").iterdir()).write_bytes(b"no image")
    printed = script("probe.py", finished[0], "--dataset", data, "--head", head, "--epochs", 2,
                     "--workers", 0)
    assert "2 epochs, 47 images a step" in printed and "47 training images" in printed


@pytest.mark.parametrize("head, more", [("ridge", ()), ("linear", QUICK), ("finetune", QUICK), ("knn", ())])
def test_a_model_of_other_data_is_probed_with_few_labels(head, more, finished, tmp_path):
    drawn_tree(tmp_path, 120, 120, 32, lambda i, shape: str(shape // 4))
    printed, [row] = probed(finished[0], "--head", head, "--dataset", tmp_path, "--labels", 0.2, *more)
    assert (row["n_train"], row["labels"], row["dataset"]) == (24, 0.2, str(tmp_path))
    assert f"on {tmp_path}, of a model trained on {row['trained_on']}: layer" in printed
    assert "24 training images" in printed


def test_finetuning_has_the_recipe_of_its_model():
    rates = []
    for net, large, recipe in (
            (unified.MAGE, False, (2.5e-4, 0.65, 0.05)), (unified.MAGE, True, (2.5e-4, 0.75, 0.1)),
            (unified.ADDP, False, (1e-3, 0.65, 0.2)), (unified.ADDP, True, (2.5e-4, 0.8, 0.1)),
            (unified.UMD, False, (2.5e-4, 0.65, 0.05))):
        assert net.finetuning[large] == recipe
        cfg = probe.fit_recipe(settings(head="finetune"), 600_000, net.finetuning[large])
        rates.append(probe.lr_at(recipe[2] * cfg.epochs, cfg, recipe[2]))                   # the peak
    assert rates == pytest.approx([2.5e-4, 2.5e-4, 1e-3, 2.5e-4, 2.5e-4])


# ------------------------------------------------------------------------------------------------------------
# 11. Sizes


@pytest.mark.parametrize("name", KINDS)
def test_every_preset_can_be_built_from_plain_values(name):
    method = unified.MODELS[name]
    strides = (2, 4, 8, 16) if method.tokenizer else (4,)
    for size, stride, tune in itertools.product(method.sizes, strides, (False, True)):
        ids = unified.tokenizer_config(size, stride) if method.tokenizer else None
        side = 256 if (name, size) == ("adm", "base") else 16 * stride
        config = unified.model_config(name, size, side, 16, ids, classes=10, tune=tune)
        config = json.loads(json.dumps(config))                         # plain values survive this
        with torch.device("meta"):
            model = unified.build(config)
        assert model.image_size == side and model.layers[1][1:] == (side if name == "adm" else 16,) * 2
        assert model.classes == (10 if method.model.takes_labels else 0)
        if method.tokenizer:
            assert model.vqgan.stride == stride
            assert bool(config.get("contrastive")) == (name in ("mage-c", "mage-e"))


@pytest.mark.parametrize("name, size, side, classes, parameters", [
    ("adm", "tiny", 32, 0, 794_982), ("adm", "small", 32, 0, 42_858_886),
    ("umd", "base", 64, 0, 174.2e6), ("umd", "base", 64, 1000, 177.3e6)])
def test_presets_have_the_published_numbers_of_parameters(name, size, side, classes, parameters):
    with torch.device("meta"):
        model = unified.build(unified.model_config(name, size, side, 16, classes=classes))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, abs=5e4 * (name == "umd"))


# ------------------------------------------------------------------------------------------------------------
# 12. Published weights


OFFICIAL = json.loads((HERE / "assets/golden/official_names.json").read_text())


def spelled_out(name, depth):
    """A name of the table -> all that it stands for."""
    found = re.search(r"\{(.*?)\}", name)
    if not found:
        return [f"{name[:-1]}weight", f"{name[:-1]}bias"] if name.endswith(".*") else [name]
    words = found[1].replace("depth", f"0-{depth - 1}").split(",")
    if "-" in words[0]:
        low, high = words[0].split("-")
        words = range(int(low), int(high) + 1)
    return [each for word in words
            for each in spelled_out(f"{name[:found.start()]}{word}{name[found.end():]}", depth)]


def official(kind, **sizes):
    """{name: shape} of what the authors published, of a width w and a depth where there are several."""
    def size(n):
        return n if isinstance(n, int) else int(n[:-1] or 1) * sizes[n[-1]]
    shapes = {}
    for pattern, shape in OFFICIAL[kind].items():
        for name in spelled_out(pattern, sizes.get("depth", 0)):
            if shape[0] in OFFICIAL:
                part = official(shape[0], **{**sizes, "i": size(shape[1]), "o": size(shape[2])})
                shapes |= {name + key: v for key, v in part.items()}
            else:
                one = pattern.endswith(".*") and name.endswith(".bias")
                shapes[name] = tuple(map(size, shape))[:1 if one else None]
    return shapes


def hollow(shapes):
    """A state dict of these shapes that takes no room: every tensor is one number seen many times."""
    def kind(name):
        return torch.long if name.endswith("position_ids") else torch.float32
    return {k: torch.zeros((), dtype=kind(k)).expand(v) for k, v in shapes.items()}


def count(model, *prefixes):
    """How many trained numbers a model has under these names."""
    return sum(p.numel() for k, p in model.named_parameters() if k.startswith(prefixes))


def load_hollow(path, load=unified.load_model, **more):
    """Shapes without memory: a model and its config from a file, and what was said."""
    said = []
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "for .*copying from a non-meta parameter")
        return *load(path, **(dict(tell=said.append) if load is unified.load_model else {}), **more), said


BASE, LARGE = dict(w=768, depth=12), dict(w=1024, depth=24)


@pytest.mark.parametrize("size, heads, used, encoder, embedding, decoder, head", [
    (BASE, (12, 16), 144_896_745, 85_056_000, 1_754_112, 57_492_480, 594_153),
    (LARGE, (16, 16), 407_788_521, 302_311_424, 2_338_816, 102_084_608, 1_053_673)], ids=["base", "large"])
def test_published_mage_files_load_strictly(tmp_path, size, heads, used, encoder, embedding, decoder, head):
    file = {"model": hollow(official("mage", **size)), "epoch": 1599, "args": argparse.Namespace(blr=1.5e-4)}
    torch.save(file, tmp_path / "mage.pth")
    model, _, [said] = load_hollow(tmp_path / "mage.pth")
    assert all(name in said for name in official("mage dead", **size)) and not model.training
    assert (model.fake_id, model.mask_id, model.length, model.image_size) == (1100, 2024, 256, 256)
    assert (model.blocks[0].attn.heads, model.decoder_blocks[0].attn.heads) == heads
    assert count(model, "vqgan.") == 54_515_587 and count(model, "") - count(model, "vqgan.") == used
    assert (count(model, "blocks.", "norm."), count(model, "token_emb.")) == (encoder, embedding)
    assert (count(model, "decoder_"), count(model, "mlm_layer.")) == (decoder, head)


def test_published_sorcen_files_load_with_mages_tokenizer_beside_them_and_lease_is_refused(tmp_path):
    shapes = {k: v for k, v in official("mage", **BASE).items() if not k.startswith("vqgan.")}
    shapes |= {k.replace("blocks", "blocks_momentum"): v for k, v in shapes.items() if k[:7] == "blocks."}
    for name, (inp, hidden) in {"projector": (768, 4096), "momentum_projector": (768, 4096),
                                "predictor": (512, 2048)}.items():
        shapes |= {f"{name}.projector.0.weight": (hidden, inp), f"{name}.projector.1.running_mean": (hidden,),
                   f"{name}.projector.1.num_batches_tracked": (), f"{name}.projector.3.weight": (512, hidden)}
    shapes |= {"classifier.0.weight": (512, 768), "classifier.2.weight": (1000, 512)}
    torch.save({"model": hollow(shapes), "args": argparse.Namespace(blr=1.5e-4)}, tmp_path / "sorcen.pth")
    with pytest.raises(unified.UserError, match="sorcen.pth holds no tokenizer; put .*vqgan_jax_strong"):
        load_hollow(tmp_path / "sorcen.pth")
    torch.save({"state_dict": hollow(official("tokenizer"))}, tmp_path / "vqgan_jax_strongaug.ckpt")
    model, config, [said] = load_hollow(tmp_path / "sorcen.pth")
    assert type(model) is unified.MAGE and (model.fake_id, model.mask_id, model.length) == (1100, 2024, 256)
    assert config["arch"]["tokenizer"] == unified.tokenizer_config("base", 16) and not model.training
    assert "unknown" not in said and "blocks_momentum, classifier" in said and len(said) < 400
    torch.save({"model": hollow(shapes | {"pos2d": (1, 256, 768)})}, tmp_path / "lease.pth")
    assert_refused("lease.pth.*LEASE", load_hollow, tmp_path / "lease.pth")


def test_a_file_of_sorcen_samples_and_gives_the_features_of_mage(tmp_path, monkeypatch):
    ours, vqgan = mage(classes=1000, fake_class=76), tokenizer()
    state = ours.state_dict() | {"projector.projector.0.weight": torch.zeros(2, 2)}
    torch.save({"model": {k: v for k, v in state.items() if not k.startswith("vqgan.")}}, tmp_path / "s.pth")
    torch.save(vqgan.state_dict(), tmp_path / "vqgan_jax_strongaug.ckpt")
    monkeypatch.setitem(unified.PUBLISHED_HEADS, 32, (4, 3))
    monkeypatch.setattr(unified, "published_tokenizer", lambda state: dict(
        codebook_size=32, codebook_dim=8, ch=8, ch_mult=[1, 1, 1], blocks=1, groups=4))
    model, _ = unified.load_model(tmp_path / "s.pth", tell=lambda line: None)
    assert model.embed(some_images()).equal(ours.embed(some_images()))
    assert model.sample(2, steps=2).equal(ours.sample(2, steps=2))


@pytest.mark.parametrize("size, heads, used, encoder", [
    (BASE, (12, 16), 145.88, 85.85), (LARGE, (16, 16), 409.10, 303.37)], ids=["base", "large"])
def test_published_addp_files_load_strictly(tmp_path, size, heads, used, encoder):
    torch.save({"model": hollow(official("addp", **size)), "args": argparse.Namespace(blr=1e-4)},
               tmp_path / "addp.pth")
    model, config, [said] = load_hollow(tmp_path / "addp.pth")
    assert isinstance(model, unified.ADDP) and not model.training and "unknown" not in said
    dead = [*official("addp dead", **size),
            *(f"token_predictor.{name}" for name in official("mage dead", **size))]
    assert all(name in said for name in dead)
    predictor = model.token_predictor
    assert (predictor.fake_id, predictor.mask_id, model.image_size) == (1100, 2024, 256)
    assert len(model.token_emb.weight) == 2025
    for net in (model, predictor):
        assert (net.blocks[0].attn.heads, net.decoder_blocks[0].attn.heads) == heads
    parts = ("cls_token", "pos_embed", "patch_embed.", "tokenizer_norm.", "blocks.", "norm.")
    frozen = count(model, "vqgan.", "token_predictor.")
    assert [round(n / 1e6, 2) for n in (count(model, "") - frozen, count(model, *parts))] == [used, encoder]
    preset = "large" if size["depth"] == 24 else "base"
    ours = unified.model_config("addp", preset, 256, 16, unified.tokenizer_config("base", 16))
    assert all(config["arch"][k] == v for k, v in ours.items() if k != "predictor")


@pytest.mark.parametrize("key", [None, "state_dict"])
def test_published_tokenizer_files_load_strictly(tmp_path, key):
    state = hollow(official("tokenizer"))
    torch.save({key: state} if key else state, tmp_path / "vqgan.ckpt")
    vqgan, config, _ = load_hollow(tmp_path / "vqgan.ckpt", unified.load_tokenizer)
    parts = [count(vqgan, name) for name in ("encoder.", "decoder.", "quantize.")]
    assert parts == [23_775_104, 30_478_339, 262_144] and count(vqgan, "") == sum(parts)
    assert config == unified.tokenizer_config("base", 16) and vqgan.stride == 16


def test_configs_of_older_checkpoints_still_build():
    for name, renamed in (("umd", {"clean": "clean_ratio", "hidden_clean": "mask_ratio_clean",
                                   "hidden_noised": "mask_ratio_noised"}), ("adm", {})):
        config = unified.model_config(name, "tiny", 32, 4)
        older = {**config, **{old: config[new] for old, new in renamed.items()}, "classes": 0}
        model = unified.build({k: v for k, v in older.items() if k not in renamed.values()})
        assert model.state_dict().keys() == unified.build(config).state_dict().keys()
        assert all(vars(model)[new] == config[new] for new in renamed.values())


def test_the_published_unet_loads_strictly_and_one_with_classes_is_refused(tmp_path):
    torch.save(hollow(official("unet")), tmp_path / "0.pt")
    model, config, _ = load_hollow(tmp_path / "0.pt")
    assert model.image_size == 256 and not model.training and model.blocks[23][1].heads == 16
    preset = unified.model_config("adm", "base", 256)
    assert json.loads(json.dumps(config["arch"])) == json.loads(json.dumps(preset | {"head": 64}))
    torch.save(hollow(official("unet") | {"label_emb.weight": (1000, 1024)}), tmp_path / "1000.pt")
    assert_refused("1000.pt.*class-conditional", unified.load_model, tmp_path / "1000.pt")


@pytest.mark.parametrize("kind, lost", [
    ("mage", "norm.weight"), ("mage", "decoder_pos_embed_learned"), ("mage", "vqgan.encoder.conv_in.weight"),
    ("mage", "vqgan.decoder.conv_in.bias"), ("addp", "decoder_pos_token_embed"), ("addp", "token_emb.weight"),
    ("addp", "token_predictor.norm.weight"), ("unet", "input_blocks.4.0.out_layers.3.weight")])
def test_a_published_file_that_lacks_a_weight_is_refused_and_the_weight_named(tmp_path, kind, lost):
    state = hollow(official(kind, **BASE))
    torch.save({"model": {k: v for k, v in state.items() if k != lost}}, tmp_path / "lacking.pth")
    assert_refused(f"lacking.pth.*{lost.removeprefix('vqgan.')}", load_hollow, tmp_path / "lacking.pth")


@pytest.mark.parametrize("name", ["mage", "addp"])
def test_golden_file_on_disk_samples_and_gives_features(name, tmp_path, monkeypatch):
    g, model, _ = {"mage": golden_mage, "addp": golden_addp}[name]()
    c = g.config
    if c["fake_class_label"] != c["codebook_size"] + PUBLISHED_FAKE_CLASS:
        pytest.skip("a file with another fake class than the published ones cannot say so by itself")
    heads, predictor = ((c.get(of + "num_heads"), c.get(of + "decoder_num_heads")) for of in ("", "mage_"))
    monkeypatch.setitem(unified.PUBLISHED_HEADS, c["embed_dim"], heads)
    published = unified.published_addp                # two widths may be alike here: heads are passed by hand
    monkeypatch.setitem(unified.PUBLISHED, "token_predictor.",
                        lambda state: published(state, heads, predictor))
    torch.save({"model": g.state_dict}, tmp_path / "file.pth")
    loaded, config = unified.load_model(tmp_path / "file.pth", tell=lambda line: None)
    if name == "mage":
        assert_close(loaded.embed(g.inputs["image"]), g.outputs["probe_features"])
    else:
        assert_near(loaded.embed(g.inputs["features"]["image"]), g.outputs["features"]["pretrain_pooled"])
    assert loaded.sample(2, steps=2).equal(model.sample(2, steps=2))
    # a config is all that a checkpoint needs to say
    again = unified.build(json.loads(json.dumps(config["arch"])))
    again.load_state_dict(loaded.state_dict())


@pytest.mark.parametrize("name", ["x_embedder.proj.weight", "decoder_pred.weight"])
def test_files_of_the_official_dit_and_mae_are_refused_in_one_sentence(name, tmp_path):
    torch.save({"model": {name: torch.ones(2)}}, tmp_path / "official.pt")
    assert_refused("two ends of UMD", unified.load_model, tmp_path / "official.pt")
    assert "not the official networks" in " ".join(script("train.py", "-h").split())


# Files of ours and of others


TINY_VQGAN = dict(codebook_size=32, codebook_dim=8, ch=8, ch_mult=[1, 1], blocks=1, groups=4)
TINY = {"mage": dict(model="mage", tokenizer=TINY_VQGAN, image_size=8, width=32, depth=1, heads=4,
                     decoder_width=32, decoder_depth=1, decoder_heads=4),
        "umd": dict(model="umd", image_size=8, grid=4, classes=0, width=32, depth=1, heads=4, decoder_depth=1,
                    **unified.MODELS["umd"].options),
        "adm": dict(model="adm", image_size=16, ch=32, ch_mult=[1, 2], blocks=1, attention=[2], head=64)}


def run_checkpoint(arch):
    """What train.py keeps of a model, or of a tokenizer, with fresh weights."""
    net, key = unified.build(arch), "arch" if "model" in arch else "tokenizer_arch"
    state = net.state_dict() if key == "arch" else nn.ModuleDict({"vqgan": net}).state_dict()
    return {"model": state, "ema": {}, "stage": "model", "step": 3, "config": {key: arch}}


def load_any(path):
    if "tokenizer" in path.name:
        return unified.load_tokenizer(path)[0]
    return unified.load_model(path, tell=lambda line: None)[0]


def saved(value):
    """The bytes of torch.save."""
    torch.save(value, file := io.BytesIO())
    return file.getvalue()


def test_a_run_of_ours_is_loaded_from_its_folder(tmp_path):
    addp_arch = unified.model_config("addp", "tiny", 16, 4, unified.tokenizer_config("toy", 4, 32))
    for name, arch in (("mage", dict(TINY["mage"], classes=2)), ("addp", addp_arch)):
        model, x = unified.build(arch).eval(), some_images(2, arch["image_size"])
        state = {"model": model.state_dict(), "config": {"arch": arch, "lr": 0.1}}
        (tmp_path / name).mkdir()
        train.save_checkpoint(tmp_path / name / "model.pt", state)
        loaded, config = unified.load_model(tmp_path / name)
        assert config["lr"] == 0.1 and not loaded.training
        losses = []
        for net in (model, loaded):
            torch.manual_seed(0)
            losses.append(net(x)[0])
        assert losses[0].equal(losses[1])  # a predictor's weights are those stored
        assert loaded.embed(x).equal(model.embed(x))
        assert loaded.sample(2, steps=3).equal(model.sample(2, steps=3))
    assert loaded.vqgan is loaded.token_predictor.vqgan
    vqgan = unified.build(TINY_VQGAN)  # of a tokenizer train.py keeps its whole training
    state = {"model": unified.TokenizerTraining(vqgan).state_dict(), "config": {"tokenizer_arch": TINY_VQGAN}}
    train.save_checkpoint(tmp_path / "tokenizer.pt", state)
    loaded, config = unified.load_tokenizer(tmp_path)
    assert config == TINY_VQGAN and loaded.encode(x).equal(vqgan.encode(x))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("key", ["", "model", "state_dict", "model_state_dict", "model_ema", "ema"])
def test_weights_are_found_wherever_others_keep_them(prefix, key, tmp_path):
    for name, arch in (("unet", TINY["adm"]), ("tokenizer", dict(TINY_VQGAN, ch=32, groups=32))):
        state = unified.build(arch).state_dict()
        found = {prefix + k: v for k, v in state.items()}
        torch.save({key: found, "epoch": 3} if key else found, tmp_path / f"{name}.pt")
        assert all(v.equal(state[k]) for k, v in load_any(tmp_path / f"{name}.pt").state_dict().items())


def test_averaged_weights_of_others_are_read_if_asked_for(tmp_path):
    raw = unified.build(TINY["adm"]).state_dict()
    averaged = {"module." + k: v + 1 for k, v in raw.items()}
    torch.save({"model": raw, "model_ema": averaged}, tmp_path / "both.pt")
    for ema, more in ((True, 1), (None, 1), (False, 0)):
        state = unified.load_model(tmp_path / "both.pt", ema, tell=lambda line: None)[0].state_dict()
        assert all(v.equal(raw[k] + more) for k, v in state.items())


def test_a_unet_that_others_trained_loads_with_its_heads_and_order_and_says_what_is_assumed(tmp_path):
    options, x, said = dict(ch=32, groups=32, ch_mult=(1, 2), attention=(2,)), some_images(2), []
    kinds = ({}, "heads of 64 channels, legacy order"), (dict(heads=4, order="new"), "heads 4, new order")
    for more, words in kinds:
        ours = adm(image_size=16, steps=1000, **{**options, "head": 64}, **more)
        torch.save(ours.state_dict(), tmp_path / "own.pt")
        loaded, config = unified.load_model(tmp_path / "own.pt", tell=said.append, **more)
        assert words in said.pop() and loaded.embed(x, noise=x).equal(ours.embed(x, noise=x))
        again = unified.build(json.loads(json.dumps(config["arch"]))).eval()
        again.load_state_dict(loaded.state_dict())
        assert again.embed(x, noise=x).equal(ours.embed(x, noise=x))
    default = unified.load_model(tmp_path / "own.pt", tell=said.append)[0]
    assert not torch.allclose(default.embed(x, noise=x), ours.embed(x, noise=x))
    flags = ("--n", 1, "--steps", 2, "--adm-heads", 4, "--adm-order", "new")
    assert "heads 4, new order" in script("sample.py", tmp_path / "own.pt", *flags)
    refused = script("sample.py", tmp_path / "own.pt", "--adm-heads", 5, "--seed", 1, expect=2)
    assert "no multiple of 5, see --adm-heads" in refused


NOT_OURS = {"missing": None, "empty": b"", "text": b"hello", "list": saved([1]), "number": pickle.dumps(3, 2),
            "cut off": saved({"model": torch.zeros(10_000)})[:20_000],
            "a dict": saved({"weights": torch.zeros(3)}),
            "another model": saved({"model": {"fc.weight": torch.zeros(3)}}),
            "no weights": saved({"model": 3, "state_dict": 3}),
            "only a codebook": saved({"quantize.embedding.weight": torch.zeros(4, 4)}),
            "only embeddings": saved({"token_emb.word_embeddings.weight": torch.zeros(4, 4)}),
            "unknown width": saved({"model": hollow(official("mage", w=512, depth=2))})}


@pytest.mark.parametrize("kind", NOT_OURS)
def test_a_file_that_is_no_checkpoint_or_not_ours_is_named(tmp_path, kind):
    if kind != "missing":
        (tmp_path / "bad.pt").write_bytes(NOT_OURS[kind])
    for load in (unified.load_model, unified.load_tokenizer):
        assert_refused("bad.pt", load, tmp_path / "bad.pt")


def test_loading_executes_nothing(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)
    torch.save({"model": Trap()}, tmp_path / "bad.pt")
    assert_refused("bad.pt", unified.load_checkpoint, tmp_path / "bad.pt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("value, name", [
    (numpy.float64(1), "scalar"), (pathlib.PurePosixPath("a"), "PurePosixPath"), (nn.Linear(2, 2), "Linear"),
    (fractions.Fraction(1, 2), "Fraction")], ids=str)
def test_an_intact_file_that_holds_more_than_tensors_is_not_called_damaged(value, name, tmp_path):
    (tmp_path / "own.pt").write_bytes(saved({"state_dict": {"w": torch.ones(2)}, "more": value}))
    with pytest.raises(unified.UserError, match=rf"own.pt holds \S*{name} .*run code.*state_dict") as error:
        unified.load_model(tmp_path / "own.pt")
    for words in ("damaged", "download", "weights_only", "trusted"):    # the last two are torch's advice
        assert words not in str(error.value)


@pytest.mark.parametrize("name", [*TINY, "tokenizer"])
def test_a_tokenizer_where_a_model_belongs_is_called_what_it_is_and_the_reverse(name, tmp_path):
    state = run_checkpoint(TINY.get(name, TINY_VQGAN))
    others = {k.removeprefix("vqgan.") if name == "tokenizer" else k: v for k, v in state["model"].items()}
    load, words = (unified.load_tokenizer, "a model, not a tokenizer")
    if name == "tokenizer":
        load, words = (unified.load_model, "a tokenizer, not a model")
    for what in (state, {"state_dict": others}):                        # as train.py and as others keep it
        torch.save(what, tmp_path / "a.pt")
        assert_refused(f"a.pt is {words}", load, tmp_path / "a.pt")


def test_a_flipped_bit_in_a_weight_is_not_loaded_and_the_previous_checkpoint_named(tmp_path):
    path = tmp_path / "model.pt"
    train.save_checkpoint(path, {"model": torch.full((99,), 0.5)})
    data = bytearray(path.read_bytes())
    data[data.index(torch.full((99,), 0.5).numpy().tobytes()) + 3] ^= 64
    for mend in ("copy or download it again", "rename .*model.pt.prev"):
        path.write_bytes(data)
        assert_refused(f"model.pt .*checksum.*{mend}", unified.load_checkpoint, path)
        (tmp_path / "model.pt.prev").write_bytes(data)


def with_another_value(nested, value):
    """Copies of nested dicts, each with one value replaced, or left out if it is ...; and with one more."""
    for k, v in nested.items():
        yield {i: w for i, w in nested.items() if i != k} | ({} if value is ... else {k: value})
        for inner in with_another_value(v, value) if isinstance(v, dict) else ():
            yield {**nested, k: inner}
    yield {**nested, "unknown": value}


@pytest.mark.parametrize("name", [*TINY, "tokenizer"])
@pytest.mark.parametrize("value", [10**9, -1, 0, 1.5, "many", None, ...], ids=str)
def test_absurd_sizes_in_a_checkpoint_end_in_one_sentence(tmp_path, name, value):
    """What no weight depends on may differ: ratios in their range, no labels, the side of a U-Net's image."""
    state = run_checkpoint(TINY.get(name, TINY_VQGAN))
    [(part, arch)] = state["config"].items()
    harmless = [("classes", None), ("image_size", 10**9), *((k, 0) for k in arch if "ratio" in k)]
    with limits(60, 1):
        for config in with_another_value(state["config"], value):
            torch.save({**state, "config": config}, tmp_path / f"{name}.pt")
            if result_or_sentence(load_any, tmp_path / f"{name}.pt") is not None:
                assert all(v == arch.get(k) or (k, v) in harmless for k, v in config.get(part, {}).items())


@pytest.mark.parametrize("name", ["mage", "tokenizer"])
@pytest.mark.parametrize("value", [3, "x", None, [], {}, {3: 4}, {"vqgan.a": 3}, torch.zeros(3)], ids=str)
def test_a_checkpoint_with_something_else_in_place_of_a_part_ends_in_one_sentence(tmp_path, name, value):
    state = run_checkpoint(TINY.get(name, TINY_VQGAN))
    for part in ("model", "config"):
        rest = {k: v for k, v in state.items() if k != part}
        for changed in (rest, {**rest, part: value}):
            torch.save(changed, tmp_path / f"{name}.pt")
            assert result_or_sentence(load_any, tmp_path / f"{name}.pt") is None


# ------------------------------------------------------------------------------------------------------------
# 13. Behind the scenes: random numbers by seed


def test_murmur_is_murmurs():
    def murmur(x):
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16
    values = [0, 1, 2**31, 2**32 - 1, 0xDEADBEEF]
    assert murmur(1) == 0x514E28B7                                      # a published test value
    assert unified.murmur(torch.tensor(values)).tolist() == [murmur(v) for v in values]


def test_a_random_number_depends_on_seed_draw_and_position_only():
    seeds = torch.tensor([5, -3, 2**40 + 5, 7])
    u = unified.hashed_uniform(seeds, 3, 10)
    assert unified.hashed_uniform(seeds[2:3], 3, 10).equal(u[2:3])             # alone or in company
    assert unified.hashed_uniform(seeds, 3, 4).equal(u[:, :4])                 # however many are asked for
    everything = torch.cat([unified.hashed_uniform(seeds, draw, 10).flatten() for draw in range(50)])
    assert len(everything.unique()) > 0.999 * len(everything)          # every other name gives another number


def test_random_numbers_lie_strictly_between_zero_and_one(monkeypatch):
    for bits in (0, 0xFFFFFFFF):                                        # the most extreme hashes there are
        monkeypatch.setattr(unified, "murmur", lambda x, bits=bits: torch.full_like(x, bits))
        u = unified.hashed_uniform(torch.zeros(1, dtype=torch.long), 0, 1)
        assert 0 < u.item() < 1 and unified.to_gumbel(u).isfinite().all()


def test_random_numbers_look_uniform_and_independent():
    # (draw, seed, position)
    u = torch.stack([unified.hashed_uniform(torch.arange(64), draw, 64) for draw in range(64)])
    counts = torch.histc(u, 256, 0, 1)
    assert ((counts - 1024) ** 2 / 1024).sum() < 255 + 4 * math.sqrt(2 * 255)  # chi-square, four deviations
    for dim in range(3):
        neighbours = torch.stack([u.narrow(dim, 0, 63).flatten(), u.narrow(dim, 1, 63).flatten()])
        assert abs(neighbours.corrcoef()[0, 1]) < 4 / math.sqrt(neighbours.size(1))


def test_gumbel_noise_has_gumbels_distribution():
    u = (torch.arange(1000).double() + 0.5) / 1000
    g = unified.to_gumbel(u)
    assert_close((-(-g).exp()).exp(), u, 1e-9)
    assert abs(g.mean() - 0.5772) < 0.01                                # Euler's constant


def test_categorical_draws_follow_their_distribution():
    p, u = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0]), (torch.arange(1000) + 0.5) / 1000
    counts = torch.bincount(unified.sample_categorical(p.expand(1000, -1), u), minlength=6)
    assert (counts - 1000 * p).abs().max() <= 1                      # rounding of the last draw of a category
    assert (counts[p == 0] == 0).all()
    extreme = unified.sample_categorical(p.expand(2, -1), torch.tensor([2**-24, 1 - 2**-24]))
    assert extreme.tolist() == [1, 4]


# ------------------------------------------------------------------------------------------------------------
# 13. Behind the scenes: command lines, checkpoints


@dataclasses.dataclass
class Options:
    run: str = unified.flag("out", "a folder", positional=True, nargs="?")
    batch_size: int = unified.flag(64, "images a step")
    kind: str = unified.flag("a", "which", choices=["a", "b"])
    compile: bool = unified.flag(True, "compile or not")


DOC = "What it does.\n\n    python script.py out/RUN\n\nMore."


def test_a_dataclass_is_a_command_line(capsys):
    assert unified.parse_flags(Options, DOC, []) == {}
    typed = "here --batch-size 8 --kind=b --no-compile".split()
    given = dict(run="here", batch_size=8, kind="b", compile=False)
    assert unified.parse_flags(Options, DOC, typed) == given and Options(**given).run == "here"
    assert unified.parse_flags(Options, DOC, ["--batch-size", "64"]) == {"batch_size": 64}     # the default
    with pytest.raises(SystemExit) as stop:
        unified.parse_flags(Options, DOC, ["-h"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "usage: " in said and "run [options]" in said
    assert all(words in said
               for words in ("run", "--batch-size", "--kind {a,b}", "--no-compile", "images a step [64]"))


@pytest.mark.parametrize("words, blamed", [("--bach-size 8", "--bach-size"), ("--batch-size many", "many"),
                                           ("--kind c", "'c'"),
                                           ("--batch 8", "--batch"), ("here there", "there")])
def test_a_wrong_flag_is_named_in_one_sentence(words, blamed):
    with pytest.raises(unified.UserError, match=blamed) as error:
        unified.parse_flags(Options, DOC, words.split())
    assert "\n" not in str(error.value)


def test_a_users_mistake_ends_in_one_line_and_exit_code_2_a_bug_of_ours_does_not(capsys):
    def mistaken():
        raise unified.UserError("take another --out-dir")
    with pytest.raises(SystemExit) as stop:
        unified.run_main(mistaken)
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("take another --out-dir\n")
    with pytest.raises(ZeroDivisionError):
        unified.run_main(lambda: 1 / 0)


def test_a_device_that_is_not_there_is_named():
    assert unified.pick_device("cpu") == torch.device("cpu")
    for name in ["toaster"] + ["cuda"] * (not torch.cuda.is_available()):
        assert_refused(name, unified.pick_device, name)


def test_a_crash_while_saving_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    train.save_checkpoint(path, {"step": 1})
    monkeypatch.setattr(torch, "save", lambda state, file: file.write(b"half a fi") and 1 / 0)
    pytest.raises(ZeroDivisionError, train.save_checkpoint, path, {"step": 2})
    assert unified.load_checkpoint(path) == {"step": 1}
    path.rename(tmp_path / "model.pt.prev")                             # killed between the two renames
    assert unified.load_checkpoint(path) == {"step": 1}


# ------------------------------------------------------------------------------------------------------------
# 13. Behind the scenes: images


def test_pixels_are_rounded_into_bytes():
    x = torch.tensor([-1.0, 0.0, 0.499 / 255, 0.501 / 255, 1.0, 2.0]).view(1, 1, 6).expand(3, 1, 6)
    assert unified.to_uint8(x)[0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]
    assert unified.to_uint8(x).shape == (1, 6, 3)


def noisy_image(width, height, seed=0):
    pixels = numpy.random.default_rng(seed).integers(0, 256, (height, width, 3), numpy.uint8)
    return PIL.Image.fromarray(pixels)


def test_an_image_is_read_with_its_shorter_side_and_its_centre():
    wide = noisy_image(60, 20)
    assert (unified.from_image(wide, 20).movedim(0, -1).numpy() == numpy.array(wide)[:, 20:40]).all()
    large = noisy_image(292, 292)                                       # 256 of 292, as in every evaluation
    assert (unified.from_image(large, 256).movedim(0, -1).numpy() == numpy.array(large)[18:274, 18:274]).all()
    assert unified.from_image(noisy_image(7, 5).convert("L"), 16).shape == (3, 16, 16)


def test_a_file_that_is_no_image_is_named(tmp_path):
    noisy_image(20, 20).save(tmp_path / "good.png")
    x = unified.read_image(tmp_path / "good.png", 20)
    assert (unified.to_uint8(x) == numpy.array(noisy_image(20, 20))).all()
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:300])
    for name in ("bad.png", "missing.png"):
        assert_refused(name, unified.read_image, tmp_path / name, 20)


def test_a_grid_holds_every_image_in_its_place():
    x = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 4, 4) / 2       # black, grey, white
    x = x * 0.8                                                         # lines are white
    sheet = numpy.array(unified.image_grid(x, columns=2, min_side=1))
    assert sheet.shape == (14, 14, 3)
    for value, top, left in [(0, 2, 2), (102, 2, 8), (204, 8, 2)]:
        assert (sheet[top:top + 4, left:left + 4] == value).all()
    lines = numpy.ones((14, 14), bool)
    lines[2:6, 2:6] = lines[2:6, 8:12] = lines[8:12, 2:6] = False
    assert (sheet[lines] == 255).all()
    assert unified.image_grid(x, columns=2, min_side=64).size == (2 * 32 + 6, 2 * 32 + 6)


def test_images_are_stacked_below_each_other():
    sheet = train.stack_images([PIL.Image.new("RGB", (4, 2), "black"), PIL.Image.new("RGB", (3, 5), "red")])
    assert sheet.size == (4, 7)
    colors = [sheet.getpixel(at) for at in [(3, 1), (2, 2), (2, 6), (3, 6)]]
    assert colors == [(0, 0, 0), (255, 0, 0), (255, 0, 0), (255, 255, 255)]


def test_a_chart_draws_its_curves_higher_where_values_are_larger():
    blue, red = (0x1f, 0x77, 0xb4), (0xd6, 0x27, 0x28)

    def places(curves, color):
        image = numpy.array(train.line_chart(curves, "loss", (400, 300)))[42:248, 72:318]
        return (image == color).all(2).nonzero()
    curves = {"a": [(0, 0.0), (10, 1.0)], "b": [(0, 1.0), (5, math.nan), (10, 0.0)]}
    for color, way in ((blue, -1), (red, 1)):                           # rows are counted downwards
        rows, columns = places(curves, color)
        assert way * numpy.corrcoef(rows, columns)[0, 1] > 0.9 and numpy.ptp(columns) > 200
    rows, columns = places({"a": [(0, 1.0), (10, 100.0)], "b": [(5, 10.0)]}, red)
    assert abs(rows.mean() - 103) < 8 and abs(columns.mean() - 123) < 8     # 10 is midway from 1 to 100
    assert not len(places({}, blue)[0])


@pytest.mark.parametrize("low, high, logarithmic, expected", [
    (50, 3000, False, [500, 1000, 1500, 2000, 2500, 3000]), (0, 1, False, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    (3.7, 4.85, False, [3.8, 4, 4.2, 4.4, 4.6, 4.8]), (0.03, 0.4, True, [0.05, 0.1, 0.2]),
    (1e-3, 2.0, True, [0.001, 0.01, 0.1, 1])])
def test_an_axis_has_round_ticks(low, high, logarithmic, expected):
    assert train.ticks(low, high, logarithmic) == pytest.approx(expected)


def test_ends_of_curves_that_meet_are_named_apart_and_inside_the_chart(monkeypatch):
    at, text = {}, PIL.ImageDraw.ImageDraw.text

    def noted(self, xy, words, *more, **options):
        at[words] = xy
        text(self, xy, words, *more, **options)
    monkeypatch.setattr(PIL.ImageDraw.ImageDraw, "text", noted)
    curves = {"loss": [(1, 9.0), (50, 1.0)], "held_out": [(25, 5.0), (50, 1.01)]}
    train.line_chart(curves, "model", (400, 300))
    assert {"step", "model", "loss", "held_out", "0", "50"} <= at.keys()
    assert at["held_out"][1] <= at["loss"][1] - 20 and at["loss"][1] <= 250 and at["loss"][0] > 320


def test_names_stand_beside_the_rows_and_above_the_columns_of_a_sheet():
    sheet = PIL.Image.new("RGB", (300, 200), "red")
    page = numpy.array(unified.with_names(sheet, ["a", "b", "c"], ["input", "output"], 14))
    height, width = page.shape[:2]
    assert (page[height - 200:, width - 300:] == (255, 0, 0)).all() and (width, height) > (300, 200)
    dark = (page < 128).all(2)
    rows, columns = dark[height - 200:, :width - 300], dark[:height - 200, width - 300:]
    assert rows[:100].any() and rows[100:].any() and not rows[98:102].any()
    assert all(columns[:, k:k + 100].any() for k in (0, 100, 200))
    assert unified.with_names(sheet, [], [], 14).size == sheet.size


@pytest.mark.parametrize("side, columns", [(32, 2), (32, 8), (32, 32), (256, 3), (256, 8), (64, 12)])
def test_names_of_columns_are_apart_and_legible_at_every_size(side, columns, monkeypatch):
    at, text = [], PIL.ImageDraw.ImageDraw.text

    def noted(self, xy, words, fill, font, anchor):
        at.append((xy[0] - font.getlength(words) / 2, xy[0] + font.getlength(words) / 2, font.size))
        text(self, xy, words, fill, font, anchor=anchor)
    monkeypatch.setattr(PIL.ImageDraw.ImageDraw, "text", noted)
    unified.image_grid(torch.zeros(columns, 3, side, side), names=["sample"] * columns)
    assert all(left[1] < right[0] for left, right in zip(at, at[1:])) and at[0][0] >= 0
    assert all(size >= 10 for *_, size in at)


# ------------------------------------------------------------------------------------------------------------
# 13. Behind the scenes: data sets


def test_hash_ints_tells_every_combination_apart():
    a, b = torch.arange(100)[:, None], torch.arange(100)
    both = unified.hash_ints(7, a, b)
    assert len(both.unique()) == 100 * 100 and not both.equal(both.T)   # the order of the values counts
    # plain integers give the same
    assert both[3, 5] == unified.hash_ints(7, 3, 5) and not both.equal(unified.hash_ints(8, a, b))
    assert len({unified.hash_ints(5 + (high << 32)) for high in range(1000)}) == 1000


def test_a_crop_is_decided_by_its_number():
    crops = unified.hash_ints(torch.arange(1000)[:, None], torch.arange(2)).flatten()
    boxes = probe.crop_boxes(crops, 40, 30, (0.2, 1.0))
    alone = probe.crop_boxes(crops[7:8], 40, 30, (0.2, 1.0))
    assert all(a[7:8].equal(b) for a, b in zip(boxes, alone))
    left, top, w, h, flip = boxes
    assert (left >= 0).all() and (top >= 0).all() and (left + w <= 40.001).all() and (top + h <= 30.001).all()
    assert (w * h).min() / 1200 == pytest.approx(0.2, abs=0.01) and 0.9 < (w * h).max() / 1200 <= 1
    inner = (w < 40) & (h < 30)
    assert ((w / h)[inner] >= 0.7499).all() and ((w / h)[inner] <= 1.3334).all()
    assert abs(flip.float().mean() - 0.5) < 0.05
    assert len(left.unique()) > 1500                                    # both views of every image differ


def box_of(left, top, w, h, flip=False):
    """A crop_boxes() that always cuts this box."""
    return lambda crops, width, height, scale: [torch.full(crops.shape, v)
                                                for v in (float(left), float(top), float(w), float(h), flip)]


def test_the_crop_of_everything_is_the_image(monkeypatch):
    data, crops = image_set(), torch.arange(6)
    x = data.images.float() / 255
    for flip in (False, True):
        monkeypatch.setattr(probe, "crop_boxes", box_of(0, 0, 16, 16, flip))
        assert_close(data.crop(x, crops), x.flip(3) if flip else x, 1e-5)


def test_both_kinds_of_data_set_cut_the_same_crop(monkeypatch):
    x = F.interpolate(torch.rand(1, 3, 5, 5), size=32, mode="bicubic").clamp(0, 1)
    image = PIL.Image.fromarray(unified.to_uint8(x[0]))
    for flip in (False, True):
        monkeypatch.setattr(probe, "crop_boxes", box_of(9, 5, 16, 20, flip))
        ours = probe.ImageTensor(x, None, [], (0.2, 1.0)).crop(x, torch.zeros(1).long())[0]
        folders = probe.ImageFolder(pathlib.Path(), [], [], [], 32, (0.2, 1.0)).crop(image, [0])[0] / 255
        # PIL rounds to bytes and repeats the box's rim
        assert (ours - folders)[:, 2:-2, 2:-2].abs().max() < 1.5 / 255
        rim = x[..., 5:25, 9:25].flip(3) if flip else x[..., 5:25, 9:25]
        rim = F.interpolate(rim, size=(32, 32), mode="bilinear")[0]
        assert (ours - rim)[:, 2:-2, 2:-2].abs().max() < 1e-4


def test_a_large_jpeg_is_decoded_smaller_only_where_its_crops_stay_large_enough():
    smooth = F.interpolate(torch.rand(1, 3, 6, 8), size=(375, 501), mode="bicubic").clamp(0, 1)
    PIL.Image.fromarray(unified.to_uint8(smooth[0])).save(file := io.BytesIO(), "JPEG", quality=95)
    for area, decoded in ((0.9, (63, 47)), (0.05, (251, 188)), (0.01, (501, 375))):
        data = probe.ImageFolder(pathlib.Path(), [], [], [], 32, (area, area))
        whole = data.crop(PIL.Image.open(file).convert("RGB"), [0, 1])  # no file any more: as it was decoded
        opened = PIL.Image.open(file)
        assert (data.crop(opened, [0, 1]).float() - whole.float()).abs().mean() < 1.5
        assert opened.size == decoded


def test_a_plan_gives_whole_images_or_crops_with_their_labels():
    data, index = image_set(), torch.tensor([4, 0])
    crops = torch.tensor([[7, 8, 9], [10, 11, 12]])
    (whole, labels), (cut, same) = data.batches([(index, None), (index, crops)])
    assert whole.mul(255).round().byte().equal(data.images[index])
    assert labels.tolist() == same.tolist() == [1, 0]
    assert cut.shape == (2, 3, 3, 16, 16) and 0 <= cut.min() and cut.max() <= 1
    # the crop's number decides, not its company
    assert_close(cut[1, 2], data.crop(whole[1:], torch.tensor([12]))[0], 1e-6)


@pytest.fixture
def tree(tmp_path):
    """DIR/{train,val}/{ant,bee}/{0,1,2}.png of 20 x 20 pixels, every image of one grey level of its own."""
    for p, part in enumerate(("train", "val")):
        for c, name in enumerate(("ant", "bee")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(3):
                grey = (100 * p + 30 * c + 10 * i,) * 3
                PIL.Image.new("RGB", (20, 20), grey).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def greys(batches):
    """(grey level, label) of every image in the batches."""
    return [(round(x[i].mean().item() * 255), y[i].item()) for x, y in batches for i in range(len(y))]


def test_a_folder_is_read_in_order_with_its_labels(tree):
    data = probe.open_data("anything", str(tree), 16, train=True)
    assert data.classes == ["ant", "bee"] and len(data) == 6
    plan = [(torch.tensor([0, 5]), None), (torch.tensor([3]), torch.tensor([[1, 2]]))]
    (x, y), (crops, label) = data.batches(plan)
    assert x.shape == (2, 3, 16, 16) and crops.shape == (1, 2, 3, 16, 16) and label.tolist() == [1]
    assert greys([(x, y)]) == [(0, 0), (50, 1)]
    test = probe.open_data(str(tree), "", 16, train=False)
    assert greys(test.batches([(torch.arange(6), None)]))[3] == (130, 1)


def folder(root, classes=("ant", "bee"), size=16, **options):
    """A Folder of root/<class>/*, not looked at beforehand."""
    files = [(path, c) for c, name in enumerate(classes) for path in probe.image_files(root / name, [])]
    return probe.ImageFolder(root, *zip(*files), list(classes), size, (0.2, 1.0), **options)


def test_an_unreadable_image_gives_its_place_to_one_that_is_drawn_or_is_left_out(tree, capsys):
    (tree / "train/ant/2.png").write_bytes(b"not an image")
    broken = tree / "train/bee/2.png"
    broken.write_bytes(broken.read_bytes()[:-30])                       # looks like one until it is decoded
    data, plan = folder(tree / "train"), [(torch.arange(6), None)] * 2
    first, again = greys(data.batches(plan[:1])), greys(folder(tree / "train").batches(plan[1:]))
    good = [(0, 0), (10, 0), (30, 1), (40, 1)]
    assert first == again and [first[i] for i in (0, 1, 3, 4)] == good and {first[2], first[5]} <= set(good)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4 and all("another image takes its place" in line for line in said)
    assert "ant/2.png" in said[0] and "bee/2.png" in said[1] and sorted(data.unreadable) == [2, 5]
    data = folder(tree / "train")
    left = [greys(data.batches(plan[:1], replace=False)) for _ in range(2)]
    assert left[0] == left[1] == good[:2] + [(0, -1)] + good[2:] + [(0, -1)]
    assert [line.count("left out: ") for line in capsys.readouterr().err.splitlines()] == [1, 1]  # told once
    means, labels = probe.map_images(lambda x: x.mean((1, 2, 3)), data)
    assert labels.tolist() == [0, 0, 1, 1] and len(means) == 4
    assert_refused("ant/2.png", list, folder(tree / "train", strict=True).batches(plan))


def test_those_that_take_the_place_of_unreadable_images_are_many_and_no_neighbours(tmp_path, monkeypatch):
    """As the twins that a Mac leaves, and classes of empty files: the next good one was the same for all."""
    for i in range(60):
        PIL.Image.new("RGB", (8, 8), (i,) * 3).save(tmp_path / f"{i:02d}.png")
    for i in range(0, 60, 2):
        (tmp_path / f"{i:02d}.png").write_bytes(b"")
    opened, data = [], probe.ImageFolder(tmp_path, sorted(tmp_path.iterdir()), [0] * 60, [], 8, (0.2, 1.0))
    open_ = PIL.Image.open
    monkeypatch.setattr(PIL.Image, "open", lambda path, *more: (opened.append(path), open_(path, *more))[1])
    found = [g for g, _ in greys(data.batches([(torch.arange(60), None)]))]
    taken = [found[i] for i in range(0, 60, 2)]
    assert found[1::2] == list(range(1, 60, 2)) and len(set(taken)) > 12
    assert all(abs(g - i) > 1 for g, i in zip(taken, range(0, 60, 2)))
    assert all(opened.count(p) == 1 for p in data.paths[::2])           # remembered
    list(data.batches([(torch.arange(60), None)]))
    assert all(opened.count(p) == 1 for p in data.paths[::2])


def test_many_unreadable_images_take_no_more_time_than_they_are(tmp_path):
    for i in range(1500):
        (tmp_path / f"{i:04d}.png").write_bytes(b"version https://git-lfs" if i % 3 else b"")
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "0700.png")
    data = probe.ImageFolder(tmp_path, sorted(tmp_path.iterdir()), [0] * 1500, [], 8, (0.2, 1.0))
    assert_refused("1500 .* looked at|of 500 images that were looked at", probe.check_sample, data)
    started = time.time()
    list(data.batches([(torch.arange(1500), None)], replace=False))
    assert time.time() - started < 20 and len(data.unreadable) == 1499


def test_a_folder_of_nothing_but_corrupt_images_is_a_users_mistake(tree):
    for path in (tree / "train").rglob("*.png"):
        path.write_bytes(b"not an image")
    assert_refused("png", list, folder(tree / "train").batches([(torch.arange(2), None)]))
    assert_refused("6 of 6 images.*none of ant, bee", probe.open_data, "anything", str(tree), 16, train=True)


def test_a_class_or_a_tenth_that_cannot_be_opened_stops_the_run_before_it_starts(tree):
    for i in range(3, 40):
        PIL.Image.new("RGB", (20, 20)).save(tree / f"train/ant/{i:02d}.png")
    for path in (tree / "train/bee").iterdir():
        path.write_bytes(b"")
    assert_refused("3 of 43 images.*none of bee", probe.open_data, "anything", str(tree), 16, train=True)
    PIL.Image.new("RGB", (20, 20)).save(tree / "train/bee/0.png")
    assert len(probe.open_data("anything", str(tree), 16, train=True)) == 43              # two in 43
    for i in range(3, 6):
        (tree / f"train/ant/{i:02d}.png").write_bytes(b"")
    assert_refused("5 of 43", probe.open_data, "anything", str(tree), 16, train=True)


def test_unreadable_test_images_count_in_no_accuracy(tree, monkeypatch):
    (tree / "val/ant/1.png").write_bytes(b"")
    data, cfg = folder(tree / "val"), settings(head="linear")
    logits = lambda x: F.one_hot((x.mean((1, 2, 3)) > 0.49).long(), 2).float()              # right for all
    head = types.SimpleNamespace(nested=lambda x, dims: [logits(x)])
    head.eval = lambda: head
    found = probe.score_heads({"a": head}, lambda x, names: {("a", ""): x}, data, [None], cfg)
    assert found == (5, {"a": [1.0]})                                   # of five that can be read, all
    found, y = probe.extract_features(lambda x, names: {"x": x.mean((2, 3))}, data,
                                      torch.arange(6), cfg, None)
    assert y.tolist() == [0, 0, 1, 1, 1] and len(found["x"]) == 5


@contextlib.contextmanager
def no_more_than(limit, of):
    """A limit of this process, such as RLIMIT_NOFILE, is lower meanwhile."""
    before = resource.getrlimit(of)
    resource.setrlimit(of, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(of, before)


def test_a_batch_of_a_folder_takes_no_file_handle_an_image(tree):
    data, plan = probe.open_data("anything", str(tree), 16, train=True), [(torch.arange(600) % 6, None)] * 3
    with limits(60), no_more_than(200, resource.RLIMIT_NOFILE):
        assert [len(y) for _, y in data.batches(plan, workers=1)] == [600] * 3


# What people bring


def converted(*modes):
    """A grey image in one mode after the other."""
    return lambda g: functools.reduce(lambda image, mode: image.convert(mode), modes, PIL.Image.fromarray(g))


MODES = {        # of one grey image g, uint8 (h, w), or of a coloured one, in every mode that a file can have
    **{mode: converted(mode) for mode in ("1", "L", "P", "RGB", "CMYK", "LA", "RGBA", "PA", "RGBX")},
    **{modes[-1]: converted(*modes)
       for modes in (("RGB", "YCbCr"), ("RGB", "HSV"), ("RGBA", "RGBa"), ("LA", "La"))},
    "I;16": lambda g: PIL.Image.fromarray(g.astype(numpy.uint16) * 257),
    "I;16B": lambda g: PIL.Image.frombytes("I;16B", g.shape[::-1],
                                           (g.astype(">u2") * 257).astype(">u2").tobytes()),
    "I of 8 bits": lambda g: PIL.Image.fromarray(g.astype(numpy.int32)),
    "I of 16 bits": lambda g: PIL.Image.fromarray(g.astype(numpy.int32) * 257),
    "I of 31 bits": lambda g: PIL.Image.fromarray(g.astype(numpy.int32) * (2**31 // 255)),
    "F": lambda g: PIL.Image.fromarray((g / 255).astype(numpy.float32))}


def test_images_of_any_mode_are_their_twins_in_8_bit_rgb():
    g = numpy.linspace(0, 255, 400).astype(numpy.uint8).reshape(20, 20)
    g[0, 0], g[-1, -1] = 0, 255
    for mode, made in MODES.items():
        image, twin = made(g), PIL.Image.fromarray(g).convert("1" if mode == "1" else "L").convert("RGB")
        assert image.mode == mode.split(" of")[0]
        off = numpy.abs(numpy.asarray(unified.upright(image)).astype(int) - numpy.asarray(twin)).max()
        assert off <= 1, (mode, off)


FILES = {"png": ["1", "L", "P", "RGB", "LA", "RGBA", "I;16"], "gif": ["P"], "webp": ["RGB", "RGBA"],
         "jpg": ["CMYK", "L"],
         "tif": ["I;16", "I;16B", "I of 16 bits", "I of 31 bits", "F", "CMYK", "YCbCr", "RGBX"]}


@pytest.mark.parametrize("mode, suffix",
                         [(mode, suffix) for suffix, modes in FILES.items() for mode in modes])
def test_training_probing_and_inpainting_read_files_of_any_mode_alike(mode, suffix, tmp_path):
    g = numpy.kron(numpy.array([[0, 80], [160, 255]]), numpy.ones((16, 16))).astype(numpy.uint8)
    for name, image in (("a", MODES[mode](g)),
                        ("b", PIL.Image.fromarray(g).convert("1" if mode == "1" else "L").convert("RGB"))):
        (tmp_path / name).mkdir()
        lossless = {"lossless": True} if suffix == "webp" else {"quality": 100} if suffix == "jpg" else {}
        image.save(tmp_path / name / (f"x.{suffix}" if name == "a" else "x.png"),
                   **(lossless if name == "a" else {}))
    try:
        PIL.Image.open(tmp_path / "a" / f"x.{suffix}").load()
    except OSError:
        pytest.skip("this Pillow does not read the file that it wrote, as before 13 of YCbCr in TIFF")
    data = [folder(tmp_path, [name], 32) for name in ("a", "b")]
    plan = [(torch.tensor([0]), None), (torch.tensor([0]), torch.tensor([[1, 2, 3]]))]     # probing, training
    for (ours, _), (theirs, _) in zip(*(d.batches(plan) for d in data)):
        assert (ours - theirs).abs().max() <= (3 if suffix == "jpg" else 1) / 255 + 1e-6
    ours, theirs = (unified.read_image(d.paths[0], 32) for d in data)
    assert (ours - theirs).abs().max() <= (3 if suffix == "jpg" else 1) / 255 + 1e-6


@pytest.mark.parametrize("values", [-1.0, 3.0, 255.0, math.nan, math.inf])
def test_floats_of_unknown_range_are_refused(values, tmp_path):
    PIL.Image.fromarray(numpy.full((8, 8), values, numpy.float32)).save(tmp_path / "depth.tif")
    assert_refused("depth.tif.*not 0 .. 1", unified.read_image, tmp_path / "depth.tif", 8)


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_photos_lie_as_viewers_show_them(number, suffix, tmp_path):
    g = numpy.kron(numpy.array([[250, 10, 90], [170, 130, 50]]), numpy.ones((40, 40))).astype(numpy.uint8)
    exif, path = PIL.Image.Exif(), tmp_path / f"a.{suffix}"
    exif[0x0112] = number
    PIL.Image.fromarray(g).convert("RGB").save(path, exif=exif, quality=100)
    with PIL.Image.open(path) as image:
        seen = PIL.ImageOps.exif_transpose(image).convert("L")
    assert seen.size == ((120, 80) if number < 5 else (80, 120))
    assert (unified.read_image(path, 80)[0] - unified.from_image(seen, 80)[0] / 255).abs().mean() < 0.02
    data, twin = folder(tmp_path, [""], 8), probe.ImageFolder(tmp_path, [], [], [], 8, (0.2, 1.0))
    crops = torch.tensor([[3, 4, 5, 6]])                       # small ones, of a JPEG that is decoded smaller
    (ours, _), = data.batches([(torch.tensor([0]), crops)])
    assert (ours[0] - twin.crop(seen.convert("RGB"), crops[0].tolist()).float() / 255).abs().mean() < 0.03


def test_exif_that_cannot_be_read_says_nothing(tmp_path):
    PIL.Image.new("RGB", (8, 8), "red").save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xffgarbage")
    assert unified.read_image(tmp_path / "a.jpg", 8)[0].mean() > 0.95


@pytest.mark.parametrize("mode, suffix", [("RGBA", "png"), ("LA", "png"), ("P", "png"), ("P", "gif"),
                                          ("RGBA", "webp"), ("L", "png")])
def test_what_is_transparent_is_white(mode, suffix, tmp_path):
    icon = numpy.zeros((8, 8, 4), numpy.uint8)                          # black on a transparent ground
    icon[2:6, 2:6, 3] = 255
    image, path, more = PIL.Image.fromarray(icon), tmp_path / f"icon.{suffix}", {}
    if mode in "PL":
        image = PIL.Image.fromarray((icon[..., 3] == 0).astype(numpy.uint8)).convert(mode)
        image.putpalette([0] * 6) if mode == "P" else None
        more = {"transparency": 1}
    image = image if mode in "PL" else image.convert(mode)
    image.save(path, **more)
    x = unified.read_image(path, 8)
    assert x[:, 3:5, 3:5].max() < 0.02 and x[:, 0].min() == 1


def test_a_gigapixel_file_is_named_wherever_it_is_given(tmp_path, photos, finished):
    """A header of 40,000 x 40,000 pixels without any."""
    PIL.Image.new("1", (40, 40)).save(file := io.BytesIO(), "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = struct.pack(">II", 40_000, 40_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "giga.png").write_bytes(data)
    assert_refused("giga.png", unified.read_image, tmp_path / "giga.png", 32)
    assert "giga.png" in script("sample.py", finished[0], "--image", tmp_path / "giga.png", "--box",
                                "0,0,8,8", expect=2)
    assert_refused("giga.png", probe.open_data, "anything", str(tmp_path), 32, train=True)


def trained(folder, model, recipe, batches, steps=None, evaluate=None, data=None, forward_args=lambda step,
            first: {}, **cfg):
    """train.train() on batches, a function of a plan; recipe: numbers beside MAGE's. Rows of its log; what
    else is in cfg are flags."""
    cfg = train.settings(train.Config(**{"device": "cpu", "compile": False, "log_every": 1, "eval_every": 0,
                                         "save_every": 10**6, "out_dir": str(folder), **cfg}))
    recipe = {**unified.MAGE_RECIPE, "steps": steps, "views": 1, "lr": 1e-3, **recipe}
    recipe.setdefault("micro_batch", recipe["batch_size"])
    train.train(cfg, "model", model, recipe, data, batches, {}, evaluate, forward_args)
    return train.read_rows(folder)


class Linear(nn.Module):
    """A small network with a loss: the mean of the squares."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 1)

    def forward(self, x, labels=None):
        return self.inner(x).square().mean(), {}


def poisoned_steps(folder, bad, images=range(8), save_every=100, **recipe):
    """Twelve steps of four of 8 images, whose gradient is not finite in the steps of bad: [weight before each
    step], rows of the log. Alone, only these images have no finite gradient."""
    model, seen = Linear(), []

    def batches(plan):
        for index, _ in plan:
            if len(index) == 1:
                yield torch.full((1, 3), math.nan if index in images else 1.0), torch.zeros(1)
            else:
                seen.append(model.inner.weight.detach().clone())
                yield torch.full((4, 3), math.nan if len(seen) - 1 in bad else 1.0), torch.zeros(4)
    recipe = dict(recipe, ema=0.5, batch_size=4, lr=1e-2)
    return seen, trained(folder, model, recipe, batches, 12, data=image_set(8, 8), log_every=100,
                         save_every=save_every)


def test_a_run_that_lost_its_tokenizer_goes_on_with_that_of_its_model(finished, tmp_path):
    run = shutil.copytree(finished[0], tmp_path / "run")
    for file in run.glob("tokenizer.pt*"):
        file.unlink()
    script("train.py", "--resume", run, "--steps", 7, "--no-report", "--eval-every", 0)
    then, now = (unified.load_model(folder)[0].tokenizer.state_dict() for folder in (finished[0], run))
    assert all(v.equal(now[name]) for name, v in then.items()) and not (run / "tokenizer.pt").exists()
    assert [row["step"] for row in train.read_rows(run) if row["stage"] == "model"][-1] == 7
    lent, arch = unified.load_tokenizer(run)                            # and lends it
    assert all(v.equal(then[name]) for name, v in lent.state_dict().items())
    unified.build(arch).load_state_dict(then)


def test_a_run_cannot_be_resumed_with_fewer_steps_than_it_has(finished):
    printed = script("train.py", "--resume", finished[0], "--steps", 3, expect=2)
    assert "has had 6 steps, and --steps 3 is less" in printed
    printed = script("train.py", "--resume", finished[0], "--epochs", 0.5, expect=2)
    assert "has had 6 steps, and --epochs 0.5 is less" in printed


def test_nor_by_typing_its_command_with_fewer_steps(tmp_path):
    command = ("train.py", "--model", "umd", "--eval-every", 0, "--no-report", "--out-dir", tmp_path / "run")
    script(*command, "--steps", 2)
    printed = script(*command, "--steps", 1, "--resume", expect=2)
    assert "has had 2 steps of the model, and 1 is less" in printed


def test_a_sheet_that_is_there_hides_no_other_mistake(finished, photos, tmp_path):
    out = tmp_path / "there.png"
    out.write_bytes(b"")
    image = next((photos / "val" / "cat").iterdir())
    for words, *flags_ in (("in pixels of the model", "--image", image, "--box", "0,0,99,99"),
                           ("cannot be read as an image", "--image", tmp_path / "no.png", "--box", "0,0,9,9"),
                           ("toaster", "--label", "toaster"), ("does not take --eta", "--eta", 0),
                           ("is there already", "--image", image, "--box", "0,0,9,9"),
                           ("is there already", "--image", image, "--reconstruct"), ("is there already",)):
        assert words in script("sample.py", finished[0], "--out", out, *flags_, expect=2)


def test_each_tenth_of_few_images_is_predicted_by_the_others():
    """As many right as by nine tenths' own regressions."""
    torch.manual_seed(0)
    y, order = torch.randint(4, (60,)), torch.randperm(60)
    x = torch.randn(2, 60, 5) + torch.randn(4, 5)[y]
    found = probe.cross_validate(x, F.one_hot(y, 4), order, (1e-3, 1.0))
    for i, penalty in enumerate((1e-3, 1.0)):
        hits = 0
        for held in order.split(6):
            rest = order[~torch.isin(order, held)]
            parts = probe.moments(x[:, rest], y[rest], torch.zeros(5), torch.ones(5), 4)
            weight = probe.ridge(*parts, penalty)
            scores = x[:, held] @ weight[:, :-1] + weight[:, -1:]
            hits = hits + scores.argmax(-1).eq(y[held]).sum(-1)
        assert found[i].equal(hits / 60)


def test_averages_keep_no_graph_of_the_steps_behind_them(tmp_path):
    """A graph that grows in each step fills any memory in the end."""
    model = Linear()
    weights, recipe = train.trainable(model), dict(unified.UMD_RECIPE, steps=3, lr=1e-3)
    optimizer, ema = train.adamw(weights, recipe), {k: p.detach().clone() for k, p in weights.items()}
    for step in range(3):
        model(torch.ones(4, 3))[0].backward()
        train.update(optimizer, weights, ema, recipe, step)
    assert not any(v.requires_grad for v in ema.values())
    assert all(p.requires_grad for p in weights.values())


def momentum(weights, recipe):
    """An optimizer of a fork's own, which is not fused."""
    return torch.optim.SGD(weights.values(), 0.1, 0.9, weight_decay=0.1)


@pytest.mark.parametrize("recipe", [{}, {"optimizer": momentum}])
def test_a_step_whose_gradient_is_not_finite_moves_nothing_and_is_told(recipe, tmp_path, capsys):
    seen, rows = poisoned_steps(tmp_path, {3, 7}, **recipe)
    assert all(w.isfinite().all() for w in seen)
    assert [i for i in range(11) if seen[i + 1].equal(seen[i])] == [3, 7]
    assert math.isfinite(rows[-1]["loss"])
    assert "2 of the steps up to 12 were skipped" in capsys.readouterr().out
    state = unified.load_checkpoint(tmp_path / "model.pt")
    assert all(v.isfinite().all() for part in ("model", "ema") for v in state[part].values())


def test_several_steps_in_a_row_without_a_finite_gradient_end_the_run(tmp_path):
    told = f"6 steps in a row up to step 12; {tmp_path} keeps the last good checkpoint; a lower --lr"
    assert_refused(told, poisoned_steps, tmp_path, set(range(6, 12)), save_every=6)
    (tmp_path / "new").mkdir()
    assert_refused("up to step 12; a lower --lr", poisoned_steps, tmp_path / "new", set(range(12)))


class Terms(Linear):
    """One that returns terms of its own."""
    terms = {}

    def forward(self, x, labels=None, **draws):
        loss, _ = super().forward(x, labels, **draws)
        return loss, self.terms


def some_terms(folder, **terms):
    """The last row of a training of two steps, in which forward() returns these terms."""
    model = Terms()
    model.terms = terms

    def batches(plan):
        return ((torch.ones(2, 3), torch.zeros(2)) for _ in plan)
    return trained(folder, model, dict(batch_size=2), batches, 2, data=image_set(8, 8), log_every=2)[-1]


def test_a_row_has_terms_that_are_numbers_or_nothing_where_they_are_not_finite(tmp_path):
    (tmp_path / "a").mkdir()
    row = some_terms(tmp_path, plain=0.5, scalar=torch.tensor(2.0), lost=torch.tensor(math.nan))
    assert (row["plain"], row["scalar"], row["lost"]) == (0.5, 2.0, None)
    assert "NaN" not in (tmp_path / "log.jsonl").read_text() and list(train.loss_charts(tmp_path))
    for wrong in (dict(lr=1.0), dict(step=1.0), dict(several=torch.ones(2))):
        with pytest.raises(ValueError, match=f"a term {[*wrong][0]} of shape"):
            some_terms(tmp_path / "a", **wrong)


def test_a_statistic_does_not_take_the_place_of_a_term(tmp_path, monkeypatch):
    update = train.update
    monkeypatch.setattr(train, "update", lambda *args: {**update(*args), "plain": 7.0, "lost": None})
    with pytest.raises(ValueError, match=r"a term plain of shape \(\): .* not called .*plain"):
        some_terms(tmp_path, plain=0.5)
    (tmp_path / "b").mkdir()
    assert some_terms(tmp_path / "b", other=0.5)["plain"] == 7.0
    monkeypatch.setattr(train, "update", lambda *args: {**update(*args), "held_out": 7.0})
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match="a term held_out"):                # a curve of loss.png
        some_terms(tmp_path / "c", other=0.5)


def test_an_image_that_alone_is_to_blame_for_such_steps_is_named(tmp_path):
    recipe = dict(batch_size=4, micro_batch=4, views=0)
    bad = torch.cat([index for index, _ in train.plan(8, 0, recipe, 11, 12)])[2].item()
    with pytest.raises(unified.UserError, match=f"step 12; .*image {bad} alone does that: take it out"):
        poisoned_steps(tmp_path, set(range(6, 12)), [bad])


# Folders


def make_images(root, names, start=0):
    for i, name in enumerate(names, start):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (12, 12), (i % 256, i // 256, 0)).save(root / name, "PNG")


def both_parts(root):
    return [probe.open_data(str(root), "", 8, train) for train in (True, False)]


def test_class_folders_are_read_recursively_and_by_content_where_the_suffix_says_nothing(tree):
    make_images(tree / "train", [                                       # of programs, at any depth
        ".ipynb_checkpoints/0.png", "__MACOSX/0.png", "ant/._0.png", "ant/.cache/1.png", "ant/__thumbs/1.png",
        "ant/.DS_Store"])
    train, _ = both_parts(tree)
    assert train.classes == ["ant", "bee"] and len(train) == 6 and "left out" not in train.summary
    make_images(tree / "train", ["ant/deep/er/a.jfif", "ant/b", "ant/c.JPG", "ant/d.img", "bee/2024/e.jpe"])
    (tree / "train/ant/notes.txt").write_text("hello")
    (tree / "train/ant/table").write_bytes(b"1,2,3")
    (tree / "train/ant/deep/up").symlink_to(tree / "train")             # no endless tale
    train, _ = both_parts(tree)
    assert len(train) == 11 and {p.name for p in train.paths} >= {"a.jfif", "b", "c.JPG", "d.img", "e.jpe"}
    assert "left out 2 files that are no images (notes.txt, table)" in train.summary
    for name in ("ant/p.HEIC", "labels.csv"):                           # a phone's; beside the classes
        (tree / "train" / name).write_bytes(b"no image that Pillow reads")
    assert "left out 4 files that are no images; save .HEIC as JPEG (notes.txt, p.HEIC, table, ...)" in \
        both_parts(tree)[0].summary
    (tree / "train/labels.csv").unlink()
    make_images(tree, ["more/a.png"])
    assert f"{tree}: left out 1 folders beside train (more)" in both_parts(tree)[0].summary
    shutil.rmtree(tree / "more")
    (tree / "train").rename(tree / "Training")
    (tree / "val").rename(tree / "Testing")
    assert [len(part) for part in both_parts(tree)] == [11, 6]
    (tree / "Training").rename(tree / "train")
    (tree / "Testing").rename(tree / "val")
    for second in ("valid", "validation", "test"):                      # as people call it
        next(path for path in tree.iterdir() if path.name != "train").rename(tree / second)
        train, test = both_parts(tree)
        assert (len(train), len(test), test.classes) == (11, 6, ["ant", "bee"])
        assert f"6 to test on ({second}/)" in train.summary


def test_of_class_folders_alone_a_tenth_is_held_out_that_stays_so_when_others_come(tmp_path):
    make_images(tmp_path, [f"{name}/{i}.png" for name in ("ant", "bee") for i in range(100)])
    train, test = both_parts(tmp_path)
    assert train.classes == test.classes == ["ant", "bee"]
    assert len(train) + len(test) == 200 and 10 <= len(test) <= 32
    assert not {*train.paths} & {*test.paths} and "by a hash" in train.summary and test.unseen
    for data in (train, test):
        assert all(data.classes[label] == path.parent.name for path, label in zip(data.paths, data.labels))
    make_images(tmp_path, [f"ant/{i}-new.png" for i in range(50)])
    more, held = both_parts(tmp_path)
    assert {*train.paths} <= {*more.paths} and {*test.paths} <= {*held.paths}
    make_images(tmp_path, ["train/0.png", "train/1.png"])               # a class of trains
    assert both_parts(tmp_path)[0].classes == ["ant", "bee", "train"]


def test_images_without_classes_train_and_are_not_probed(tmp_path):
    make_images(tmp_path / "mine", [f"{i}.png" for i in range(40)])
    train, test = both_parts(tmp_path / "mine")
    assert train.classes == [] and len(train) + len(test) == 40 and "without classes" in train.summary
    assert train.labels.eq(0).all()
    printed = script("train.py", *flags(tmp_path / "mine", tmp_path / "run", "--eval-every", 0))
    assert "no probe: it takes images of two" in printed and (tmp_path / "run" / "samples.png").exists()
    assert "two classes" in script("probe.py", tmp_path / "run", "--workers", 0, expect=2)
    assert "mine has no classes (no class folders)" in script(
        "train.py", *flags(tmp_path / "mine", tmp_path / "other", "--labels"), expect=2)


@pytest.mark.parametrize("of_train, of_test, unseen, lacking", [
    ([0, 1] * 15, [0, 1], True, ""), ([0, 1] * 15, [1, 1], True, "of one class; lay some"),
    ([1] * 30, [0, 1], True, "two classes"), ([0, 1] * 9, [0, 1], True, "20 images to train on, not 18"),
    ([0, 1] * 15, [0, 1], False, "others to test on")])
def test_an_accuracy_takes_two_classes_in_both_parts_and_twenty_images(of_train, of_test, unseen, lacking):
    train_set, test_set = (
        probe.ImageTensor(torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8), torch.tensor(labels),
                          ["ant", "bee"], (1, 1)) for labels in (of_train, of_test))
    test_set.unseen = unseen
    found = probe.no_probe(train_set, test_set)
    assert lacking in found and bool(found) == bool(lacking)


@pytest.mark.parametrize("names", [["a.png"], ["ant/a.png", "bee/b.png"],
                                   ["ant/a.png", "ant/b.png", "bee/c.png", "bee/d.png", "cow/e.png"]])
def test_sets_as_small_as_people_start_with_are_trained_on(names, tmp_path):
    make_images(tmp_path / "few", names)
    train, test = both_parts(tmp_path / "few")
    assert len(train) >= 1 and len(test) >= 1
    printed = script("train.py", *flags(tmp_path / "few", tmp_path / "run", "--eval-every", 3))
    assert "no probe" in printed and "python sample.py" in printed and "--save features.npz" in printed
    if len(train) == len(names):
        assert not test.unseen and "too few to hold any out" in printed


def test_what_cannot_be_a_data_set_is_refused_with_the_tree_that_is_expected(tree):
    (tree / "train/empty").mkdir()
    train, _ = both_parts(tree)
    assert train.classes == ["ant", "bee"] and "left out 1 folders without an image (empty)" in train.summary
    (tree / "val/bee").rename(tree / "val/cow")
    assert_refused("bee, cow", both_parts, tree)
    for path in [*(tree / "val").rglob("*.png")]:
        path.rename(tree / "val" / f"{path.parent.name}-{path.name}")   # flat, as in ImageNet's archive
    assert_refused("(?s)differ in their classes.*n01440764", both_parts, tree)
    assert_refused("there is no folder .*nowhere", both_parts, tree / "nowhere")
    assert_refused("did you mean .*/train", both_parts, tree / "trian")
    assert_refused("it is a file; name its folder", both_parts, next((tree / "train").rglob("*.png")))
    assert_refused("(?s)no image in.*n01440764", both_parts, tree / "train/empty")
    shutil.rmtree(tree / "train")
    assert_refused("no image in .*train", both_parts, tree)


def test_names_of_any_bytes_are_read_and_shown(tmp_path, photos):
    root = tmp_path / "my photos"
    for i in range(60):
        make_images(root, [os.fsdecode(b"caf\xe9 %d/\xff\xfd %d.png" % (i % 2, i))], i)
    (root / os.fsdecode(b"caf\xe9 0") / os.fsdecode(b"\xff broken.png")).write_bytes(b"")
    code, printed = finish(start(tmp_path / "printed", run_script, "train.py",
                                 flags(root, tmp_path / "a run", "--labels", "--eval-every", 0)))
    assert code == 0 and "broken.png" in printed, printed
    assert f"python sample.py '{tmp_path / 'a run'}'" in printed, printed
    assert finish(start(tmp_path / "printed", run_script, "probe.py",
                        (tmp_path / "a run", "--workers", 0)))[0] == 0


@pytest.mark.parametrize("name", list(unified.SHAPES))
def test_a_shape_stays_inside_the_circle_that_is_placed_inside_the_image(name):
    x, y = torch.meshgrid(torch.linspace(-1.5, 1.5, 301), torch.linspace(-1.5, 1.5, 301), indexing="xy")
    r = (x * x + y * y).sqrt()
    inside = unified.SHAPES[name](x, y, r) < 0
    # of the circle's area; none of it outside
    assert 0.1 < inside.float().mean() * 9 / math.pi < 1 and r[inside].max() <= 1.0


def test_shapes_are_decided_by_their_seeds():
    images, labels = unified.draw_shapes(torch.arange(400), 32)
    assert images.dtype == torch.uint8 and images.shape == (400, 3, 32, 32)
    alone = unified.draw_shapes(torch.tensor([17]), 32)
    assert alone[0][0].equal(images[17]) and alone[1][0] == labels[17]
    assert set(labels.tolist()) == set(range(len(unified.SHAPES)))
    drawn = (images != unified.GROUND[:, None, None]).any(1).flatten(1).float().mean(1)
    assert drawn.min() > 0.02 and drawn.max() < 0.6
    colors = (images.flatten(2).mT[:, :, None] == unified.PALETTE).all(3).any(1)            # (400, 6)
    # one colour each, every colour in a class
    assert (colors.sum(1) == 1).all() and colors[labels == 0].any(0).all()


def test_drawings_are_found_among_images_and_nothing_else_is(tmp_path, capsys):
    x, labels = unified.draw_shapes(torch.arange(30), 16)
    drawings, found = probe.nearest_drawings(x)
    assert found.equal(labels) and ((drawings.int() - x).abs().amax(1) > 32).float().mean((1, 2)).max() < 0.05
    assert probe.nearest_drawings(x[7:8])[0][0].equal(drawings[7])              # alone as in company
    noisy = (x + 20 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255).byte()
    noise = torch.randint(0, 256, x.shape, dtype=torch.uint8)
    blended = (x.int() + x.flip(0)) // 2
    for images, words in ((x, "100.0%"), (noisy, "100.0%"), (noise, "0.0%"), (blended.byte(), "0.0%")):
        probe.print_drawn("images", images)
        assert capsys.readouterr().out.startswith(f"{words:>6}")
    model = small("umd").eval()
    for name, array in (("no.npz", None), ("flat.npz", numpy.zeros((3, 32, 32), numpy.uint8)),
                        ("float.npz", numpy.zeros((3, 32, 32, 3)))):
        if array is not None:
            numpy.savez(tmp_path / name, array)
        cfg = probe.Config(run=["out/x"], samples=str(tmp_path / name))
        assert_refused("--npz", probe.judge_samples, model, {"dataset": "shapes"}, cfg)


def gaussian_features(n, seed=0):
    """Float (n, 5), with a mean and correlations that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    mixing, mean = torch.randn(5, 5, generator=generator), torch.randn(5, generator=generator)
    return torch.randn(n, 5, generator=generator) @ mixing + mean


def test_the_frechet_distance_is_that_of_two_normal_distributions():
    x, y = gaussian_features(200, 0).double(), gaussian_features(300, 1).double()
    assert probe.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    moved = x * 3 + torch.arange(5)                                             # the covariances commute
    expected = (moved.mean(0) - x.mean(0)).square().sum() + 4 * x.var(0).sum()
    assert probe.frechet_distance(x, moved) == pytest.approx(expected.item(), rel=1e-9)
    cov, cov_y = numpy.cov(x.T), numpy.cov(y.T)
    overlap = numpy.linalg.eigvals(cov @ cov_y).real.clip(0) ** 0.5             # of the product as it is
    expected = (x.mean(0) - y.mean(0)).square().sum() + numpy.trace(cov + cov_y) - 2 * overlap.sum()
    for pair in ((x, y), (y, x), (x.flip(0), y[torch.randperm(300)])):          # either way, in any order
        assert probe.frechet_distance(*pair) == pytest.approx(expected.item(), rel=1e-9)
    assert 0 < probe.frechet_distance(x[:4], y) < math.inf                      # singular


def test_precision_and_recall_count_who_is_nearer_to_another_than_its_third_neighbour():
    x, y = gaussian_features(60, 0).double(), gaussian_features(700, 1).double()

    def covered(points, others):
        radii = [(others - other).norm(dim=1).sort().values[3] for other in others]
        return sum(any((point - other).norm() <= r for other, r in zip(others, radii))
                   for point in points) / len(points)
    assert probe.precision_and_recall(x, y[:40]) == (covered(x, y[:40]), covered(y[:40], x))
    assert probe.precision_and_recall(x, y) == probe.precision_and_recall(y, x)[::-1]
    assert probe.precision_and_recall(x, y) == probe.precision_and_recall(x.flip(0), y.flip(0))
    assert min(probe.precision_and_recall(y[:350], y[350:])) > 0.8
    assert probe.precision_and_recall(y + 100, y) == (0, 0)
    precision, recall = probe.precision_and_recall(y[:1] + 1e-6 * torch.randn(200, 5), y)  # always one
    assert precision == 1 and recall < 0.1


def figures(monkeypatch, x, at_once=64):
    """What measure_samples() says of x against shapes, by a classifier with the weights it begins with."""
    cfg = probe.Config(run=["out/x"], device="cpu", workers=0)
    train_set, test_set = (probe.ImageTensor(*unified.draw_shapes(seeds, 16), list(unified.SHAPES), (1, 1))
                           for seeds in (torch.arange(300), torch.arange(1000, 1120)))
    monkeypatch.setattr(probe, "images_at_once", lambda data, device: at_once)
    return probe.measure_samples(probe.new_classifier(8, 16).eval()[0], small("umd"), x, train_set, test_set,
                                 cfg)


def test_samples_are_measured_the_same_in_any_order_and_in_batches_of_any_size(monkeypatch):
    x, _ = unified.draw_shapes(torch.arange(2000, 2100), 16)
    (results, *sizes), (others, *_) = figures(monkeypatch, x), figures(monkeypatch, x.flip(0), 7)
    assert list(results) == ["samples", "test images", "noise"] and sizes == [100, 300]
    for title in results:
        assert results[title] == pytest.approx(others[title], rel=1e-4)
    samples, test, noise = results.values()
    assert samples[0] < 2 * test[0] and 10 * test[0] < noise[0] and test[1] > 0.5 > noise[1]


def small_cifar(folder, monkeypatch):
    """An archive with the published layout and ten images a batch; unified takes its checksums for the
    published ones."""
    inside = folder / "cifar-10-batches-py"
    inside.mkdir(parents=True)
    pixels = (numpy.arange(30720) % 256).astype(numpy.uint8).reshape(10, 3072)
    data = {"data": pixels, "labels": list(range(10)), "label_names": list("abcdefghij")}
    for name in ["data_batch_%d" % i for i in range(1, 6)] + ["test_batch", "batches.meta"]:
        (inside / name).write_bytes(pickle.dumps(data))
        monkeypatch.setitem(probe.CIFAR10_MD5, name, hashlib.md5((inside / name).read_bytes()).hexdigest())
    return inside


def test_cifar10_is_read_only_if_its_checksum_is_right(tmp_path, monkeypatch):
    inside = small_cifar(tmp_path, monkeypatch)
    data = probe.open_data("cifar10", str(tmp_path), 32, train=True)
    assert data.images.shape == (50, 3, 32, 32) and len(data.classes) == 10
    # planes of 1024 bytes
    assert data.images[0, 1, 0, :3].tolist() == [0, 1, 2] and data.labels[:12].tolist() == [*range(10), 0, 1]
    assert len(probe.open_data("cifar10", str(tmp_path), 32, train=False)) == 10
    (inside / "test_batch").write_bytes(pickle.dumps({"data": 1}))
    assert_refused("test_batch", probe.open_data, "cifar10", str(tmp_path), 32, train=False)
    (inside / "data_batch_3").unlink()
    assert_refused("data_batch_3", probe.open_data, "cifar10", str(tmp_path), 32, train=True)
    assert_refused("64", probe.open_data, "cifar10", str(tmp_path), 64, train=True)


# ------------------------------------------------------------------------------------------------------------
# 13. Behind the scenes: damaged files and downloads
#
# UNIFIED_FUZZ=1000 python -m pytest -s -k damaged test_unified.py     damages a thousand of each kind


def answer(fault, archive):
    """What a server says that hands out an archive with this fault."""
    found, half = b"HTTP/1.1 200 OK\r\n", archive[:len(archive) // 2]
    length = b"Content-Length: %d\r\n\r\n" % len(archive)
    return {"archive": found + length + archive, "length-unknown": found + b"\r\n" + archive,
            "moved": b"HTTP/1.1 302 Found\r\nLocation: /archive\r\n\r\n",
            "moved-nowhere": b"HTTP/1.1 302 Found\r\nLocation: /missing\r\n\r\n",
            "missing": b"HTTP/1.1 404 Not Found\r\n\r\n", "broken": b"HTTP/1.1 500 Internal Error\r\n\r\n",
            "silent": b"", "no-http": b"hello\r\n", "garbage": found + length + bytes(len(archive)),
            "chunk-cut-off": found + b"Transfer-Encoding: chunked\r\n\r\nffff\r\n" + half[:99],
            }.get(fault, found + length + half)                         # cut-off, reset, stalled, slow ...


class Web(socketserver.StreamRequestHandler):
    """Answers with the fault that the address names."""

    def handle(self):
        fault = self.rfile.readline().split()[1].decode()[1:]
        while self.rfile.readline().strip():
            pass
        first, archive = fault not in self.server.asked, self.server.archive
        self.server.asked.append(fault)
        self.wfile.write(answer(fault, archive))
        if fault == "reset":                                            # an error, not an end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        if fault == "interrupted":
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        if fault in ("stalled", "interrupted") or fault == "stalled-once" and first:
            self.server.over.wait(20)
        elif fault in ("slow", "stalled-once"):
            time.sleep(0.3)
            self.wfile.write(archive[len(archive) // 2:])


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A local server in place of CIFAR-10's: .archive, bytes; .asked for which faults; .pick(fault)."""
    inside = small_cifar(tmp_path / "web", monkeypatch)
    with tarfile.open(tmp_path / "web.tar.gz", "w:gz") as tar:
        tar.add(inside, inside.name)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Web) as server:
        server.daemon_threads, server.asked, server.over = True, [], threading.Event()

        def pick(fault, archive=(tmp_path / "web.tar.gz").read_bytes()):
            server.archive = archive
            monkeypatch.setattr(probe, "CIFAR10_URL", "http://%s:%d/" % server.server_address + fault)
            monkeypatch.setitem(probe.CIFAR10_MD5, inside.name.removesuffix("batches-py") + "python.tar.gz",
                                hashlib.md5(archive).hexdigest())
        server.pick = pick
        monkeypatch.setenv("no_proxy", "*")
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


def nothing_is_left_and_the_next_call_succeeds(web, folder):
    """After a failure."""
    assert [p.name for p in folder.iterdir()] == [".lock"]
    web.pick("archive")
    probe.download_cifar10(folder)
    assert len(probe.open_data("cifar10", str(folder), 32, train=False)) == 10


@pytest.mark.parametrize("fault", ["missing", "broken", "moved-nowhere", "silent", "no-http", "garbage",
                                   "cut-off", "chunk-cut-off", "reset", "stalled"])
def test_a_download_that_fails_ends_in_one_sentence_and_leaves_nothing(web, tmp_path, fault):
    web.pick(fault)
    with pytest.raises(unified.UserError, match="--data-dir") as error:
        probe.download_cifar10(tmp_path / "data", timeout=0.3)
    assert "\n" not in str(error.value)
    nothing_is_left_and_the_next_call_succeeds(web, tmp_path / "data")


@pytest.mark.parametrize("fault", ["moved", "length-unknown"])
def test_a_download_may_be_moved_and_of_unknown_length(web, tmp_path, fault):
    web.pick(fault)
    probe.download_cifar10(tmp_path)
    assert len(probe.open_data("cifar10", str(tmp_path), 32, train=True)) == 50


def test_a_download_is_unpacked_by_a_python_without_filters(web, tmp_path, monkeypatch):
    monkeypatch.delattr(tarfile, "data_filter")
    monkeypatch.setattr(tarfile.TarFile, "extractall", lambda self, path: [
        self.extract(member, path, filter="fully_trusted") for member in self])
    web.pick("archive")
    probe.download_cifar10(tmp_path)
    assert len(probe.open_data("cifar10", str(tmp_path), 32, train=True)) == 50


def test_a_download_with_another_checksum_is_not_unpacked(web, tmp_path, monkeypatch):
    web.pick("archive")
    monkeypatch.setitem(probe.CIFAR10_MD5, "cifar-10-python.tar.gz", "0" * 32)
    assert_refused("checksum", probe.download_cifar10, tmp_path / "data")
    nothing_is_left_and_the_next_call_succeeds(web, tmp_path / "data")


@pytest.mark.parametrize("ratio", [0.5, 1.5])                           # while it fetches, while it unpacks
def test_a_full_disk_ends_a_download_in_one_sentence(web, tmp_path, ratio):
    web.pick("archive")
    with no_more_than(int(ratio * len(web.archive)), resource.RLIMIT_FSIZE):    # an error of the same kind
        assert_refused("File too large.*--data-dir", probe.download_cifar10, tmp_path / "data")
    nothing_is_left_and_the_next_call_succeeds(web, tmp_path / "data")


@contextlib.contextmanager
def handlers_kept():
    """What handles SIGINT and SIGTERM before does so afterwards, and Python does meanwhile."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_ctrl_c_in_a_download_leaves_nothing(web, tmp_path):
    web.pick("interrupted")
    with handlers_kept(), pytest.raises(KeyboardInterrupt):
        probe.download_cifar10(tmp_path / "data")
    nothing_is_left_and_the_next_call_succeeds(web, tmp_path / "data")


@pytest.mark.parametrize("kind", ["above", "absolute", "link"])
def test_an_archive_writes_nothing_outside_its_folder(web, tmp_path, kind):
    target = tmp_path / "evil"
    evil = tarfile.TarInfo({"above": "../../evil", "absolute": str(target), "link": "way"}[kind])
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w:gz") as tar:
        if kind == "link":
            evil.type, evil.linkname = tarfile.SYMTYPE, str(tmp_path)
            tar.addfile(evil)
            evil = tarfile.TarInfo("way/evil")
        tar.addfile(evil)
    web.pick("archive", file.getvalue())
    assert_refused("--data-dir", probe.download_cifar10, tmp_path / "data")
    assert not target.exists()
    assert [p.name for p in (tmp_path / "data").iterdir()] == [".lock"]


def in_process(folder, **options):
    """A download in a process of its own, which ends with code 2 after a UserError."""
    def download():
        try:
            probe.download_cifar10(folder, **options)
        except unified.UserError:
            os._exit(2)
    process = torch.multiprocessing.get_context("fork").Process(target=download, daemon=True)
    process.start()
    return process


def exit_codes(processes):
    """Of all of them, after 20 seconds at most."""
    end = time.time() + 20
    for process in processes:
        process.join(max(0.0, end - time.time()))
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def test_of_several_processes_one_downloads_and_the_others_wait(web, tmp_path):
    web.pick("slow")
    assert exit_codes([in_process(tmp_path) for _ in range(4)]) == [0] * 4
    assert web.asked == ["slow"] and len(probe.open_data("cifar10", str(tmp_path), 32, train=True)) == 50


def test_when_the_one_that_downloads_fails_the_others_of_its_group_end_soon(web, tmp_path, monkeypatch):
    web.pick("stalled")
    monkeypatch.setattr(unified, "rank_and_world", lambda: (0, 4))
    started = time.time()
    assert exit_codes([in_process(tmp_path, timeout=1.5) for _ in range(4)]) == [2] * 4
    assert web.asked == ["stalled"] and time.time() - started < 5       # one by one they would take 6


def test_when_the_one_that_downloads_is_killed_another_run_takes_over(web, tmp_path):
    web.pick("stalled-once")
    first = in_process(tmp_path)
    while not web.asked and first.is_alive():
        time.sleep(0.01)
    second = in_process(tmp_path)
    time.sleep(0.2)
    first.kill()
    assert exit_codes([first, second]) == [-signal.SIGKILL, 0]
    assert len(probe.open_data("cifar10", str(tmp_path), 32, train=True)) == 50


def test_without_locks_the_first_to_finish_counts(web, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "lockf")                                    # as on Windows
    web.pick("slow")
    assert exit_codes([in_process(tmp_path) for _ in range(3)]) == [0] * 3
    assert web.asked == ["slow"] * 3
    assert len(probe.open_data("cifar10", str(tmp_path), 32, train=True)) == 50


def test_what_is_killed_while_unpacking_does_not_pass_for_complete(web, tmp_path):
    web.pick("archive")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", lambda *_: os.kill(os.getpid(), signal.SIGKILL))        # the last moment
        assert exit_codes([in_process(tmp_path)]) == [-signal.SIGKILL]
    assert not (tmp_path / "cifar-10-batches-py").exists()
    probe.download_cifar10(tmp_path)
    assert len(probe.open_data("cifar10", str(tmp_path), 32, train=True)) == 50


# Accidents, by a seed


ACCIDENTS = int(os.environ.get("UNIFIED_FUZZ", 60))


def damaged(data, others, g):
    """The bytes of a file after an accident that g chooses, more often near an end, where headers are."""
    data, at = bytearray(data), (g.random(8) ** 3 * len(data)).astype(int)
    if g.random() < 0.3:
        at = len(data) - 1 - at
    kind = g.choice(["flips", "cut off", "another header", "absurd number", "zeros", "garbage behind"])
    if kind == "flips":
        for i in at[:g.integers(1, 9)]:
            data[i] ^= 1 << int(g.integers(8))
    if kind == "cut off":
        del data[at[0]:]
    if kind == "another header":
        n = 2 ** int(g.integers(1, 8))
        data[:n] = others[g.integers(len(others))][:n]
    if kind == "absurd number":
        i = int(g.integers(64))
        data[i:i + 4] = bytes.fromhex(g.choice(["00000000", "ffffffff", "ffffff7f", "00000080", "00002710"]))
    if kind == "zeros":
        data[at[0]:at[0] + 512] = bytes(len(data[at[0]:at[0] + 512]))
    if kind == "garbage behind":
        data += g.bytes(at[0] + 1)
    return bytes(data)


@contextlib.contextmanager
def limits(seconds=60 + ACCIDENTS, gib=2):
    """What takes longer, or more memory than this on top of what was taken before, fails."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.time()
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"{seconds} seconds were not enough"))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    print(f"{time.time() - started:.1f} s, {memory:.2f} GiB more than before")
    assert memory < gib


def result_or_sentence(read, path):
    """What read(path) returns, or None if it is a UserError that names the file, and nothing else may be."""
    try:
        return read(path)
    except unified.UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)


def image_files_of_all_formats():
    """{suffix and kind: bytes}."""
    image, files, formats = noisy_image(24, 20).resize((60, 50)), {}, {"jpg": "jpeg", "tif": "tiff"}
    for kind, mode, options in [
            ("png", "RGB", {}), ("png", "P", {}), ("png", "RGBA", {}), ("jpg", "RGB", {}),
            ("jpg", "CMYK", {}), ("jpg", "RGB", {"progressive": True}), ("gif", "P", {}), ("bmp", "RGB", {}),
            ("tif", "RGB", {}), ("tif", "RGB", {"compression": "tiff_lzw"}),
            ("tif", "RGB", {"compression": "jpeg"}), ("webp", "RGB", {}),
            ("webp", "RGB", {"lossless": True})]:
        image.convert(mode).save(file := io.BytesIO(), formats.get(kind, kind), **options)
        files[f"{kind} {mode} {options}"] = file.getvalue()
    return files


def test_damaged_images_are_read_or_named(tmp_path, capfd):
    files, g, counts = image_files_of_all_formats(), numpy.random.default_rng(5), collections.Counter()
    others = [*files.values(), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"8BPS\0\1", b"PK\3\4",
              b"P6\n99999 99999\n255\n"]
    good, first = noisy_image(60, 50, 1), torch.tensor([0])
    (tmp_path / "a").mkdir()
    good.save(tmp_path / "a/good.png")
    with limits():
        for i, (kind, data) in zip(range(ACCIDENTS), itertools.cycle(files.items())):
            path = tmp_path / f"a/bad.{kind.split()[0]}"
            path.write_bytes(damaged(data, others, g))
            x = result_or_sentence(lambda path: unified.read_image(path, 16), path)
            found = folder(tmp_path, ["a"])
            (whole, _), (crops, _) = found.batches([(first, None), (first, torch.tensor([[1, 2]]))])
            assert found.paths[0] == path and crops.shape == (1, 2, 3, 16, 16)
            assert whole[0].equal(unified.from_image(good, 16).float() / 255 if x is None else x)
            assert (x is None) == (0 in found.unreadable)              # then the next one took its place
            counts[x is not None] += 1
            path.unlink()
        print(f"{counts[True]} damaged images read, {counts[False]} named")
    with capfd.disabled():
        print(*capfd.readouterr().out.splitlines(), sep=", ")


@pytest.mark.parametrize("error", [struct.error("4 bytes"), EOFError(), IndexError("pop"), KeyError(7),
                                   TypeError("None"), RuntimeError("codec"), MemoryError(), zlib.error("-3"),
                                   PIL.Image.DecompressionBombError("large")], ids=repr)
def test_whatever_a_codec_raises_the_image_is_named(tree, monkeypatch, error):
    def load(image):
        raise error
    data = folder(tree / "train", ["ant"])
    monkeypatch.setattr(PIL.PngImagePlugin.PngImageFile, "load", load)
    for crops in (None, [1, 2]):
        assert sorted(folder(tree / "train", ["ant"])[0, crops, True][2]) == [0, 1, 2]
    assert_refused("0.png", unified.read_image, data.paths[0], 16)


def test_an_image_of_a_hair_takes_no_memory(tmp_path):
    PIL.Image.new("RGB", (1, 60_000)).save(tmp_path / "hair.png")
    with limits(20, 0.5), pytest.raises(unified.UserError, match="hair.png.*1 x 60000"):   # took 1.4 GiB
        unified.read_image(tmp_path / "hair.png", 64)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_checkpoints_are_read_whole_or_named(tmp_path, capfd):
    published = unified.build(dict(TINY_VQGAN, ch=32, groups=32)).state_dict()
    files = {"model.pt": run_checkpoint(TINY["mage"]), "tokenizer.pt": run_checkpoint(TINY_VQGAN),
             "unet.pt": unified.build(TINY["adm"]).state_dict(), "tokenizer.ckpt": {"state_dict": published}}
    files = {name: saved(state) for name, state in files.items()}
    torch.save({"state_dict": published}, file := io.BytesIO(), _use_new_zipfile_serialization=False)
    files["old tokenizer.ckpt"] = file.getvalue()                       # before torch 1.6: no checksums
    g, counts, whole = numpy.random.default_rng(0), collections.Counter(), {}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        whole[name] = load_any(tmp_path / name).state_dict()
    others = [*files.values(), b"\x89PNG\r\n\x1a\n", b"hello", b"\x80\2"]
    with limits():
        for i, (name, data) in zip(range(ACCIDENTS), itertools.cycle(files.items())):
            (tmp_path / name).write_bytes(damaged(data, others, g))
            model = result_or_sentence(load_any, tmp_path / name)
            right = model and all(v.equal(whole[name][k]) for k, v in model.state_dict().items())
            assert model is None or right or name == "old tokenizer.ckpt"
            counts["named" if model is None else "right" if right else "wrong"] += 1
        print(f"{counts['right']} damaged checkpoints read, {counts['named']} named, "
              f"{counts['wrong']} without checksums read with other weights")
    with capfd.disabled():
        print(*capfd.readouterr().out.splitlines(), sep=", ")


def test_a_damaged_line_of_the_log_does_not_count(tmp_path):
    rows = [{"stage": "model", "step": i, "loss": 0.5} for i in range(3)]
    assert train.read_rows(tmp_path) == []
    good = [json.dumps(row).encode() for row in rows]
    for bad in (b'{"stage": "model", "st{"stage": "model", "step": 9}', b"\xff\xfe}", bytes(40), b"3", b"",
                b'{"step": 4}', b'{"stage": "model"}', b'{"stage": "model", "step": "4"}'):
        (tmp_path / "log.jsonl").write_bytes(b"\n".join([good[0], bad, *good[1:], good[0][:9]]))
        assert train.read_rows(tmp_path) == rows


# ------------------------------------------------------------------------------------------------------------
# The id cache, the learning rate, the closed-form probe


def test_cached_ids_are_the_ids_of_the_same_crops(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "images_at_once", lambda data, device: 4)
    vqgan, data = tokenizer(2), image_set(10, 8)
    ids, labels = train.cache_ids(tmp_path, vqgan, data, 3)
    assert ids.shape == (10, 3, 16) and ids.dtype == numpy.uint16 and labels.equal(data.labels)
    crops = unified.hash_ints(torch.arange(10)[:, None], torch.arange(3))
    x, _ = next(data.batches([(torch.arange(10), crops)]))
    assert torch.from_numpy(ids.astype(int)).equal(vqgan.encode(x.flatten(0, 1)).view(10, 3, 16))
    whole, _ = train.cache_ids(tmp_path, vqgan, data, 1)
    # one view: the picture
    assert torch.from_numpy(whole.astype(int)).equal(vqgan.encode(data.images.float() / 255).view(10, 1, 16))


@pytest.mark.parametrize("done", [0, 3, 11, 20, 29])
def test_ids_that_were_interrupted_are_continued_and_equal_uninterrupted_ones(done, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "images_at_once", lambda data, device: 2)     # one image of two views
    monkeypatch.setattr(train, "SHARD", 12)
    monkeypatch.setattr(probe, "SIGNALS", {})
    vqgan, data, read = tokenizer(2), image_set(30, 8), []
    for name in ("through", "stopped"):
        (tmp_path / name).mkdir()
    through, _ = train.cache_ids(tmp_path / "through", vqgan, data, 2)
    batches = data.batches

    def counted(plan, workers):
        for item in batches(plan):
            read.append(item)
            if len(read) == done + 1:
                probe.SIGNALS[signal.SIGINT] = 0.0
            yield item
    data.batches = counted
    with pytest.raises(train.Stopped, match="ids"):
        train.cache_ids(tmp_path / "stopped", vqgan, data, 2)
    assert len(read) == done + 1                                        # it stopped right there,
    probe.SIGNALS.clear()
    stopped, labels = train.cache_ids(tmp_path / "stopped", vqgan, data, 2)
    assert len(read) == 30                                              # and what was done is not done twice
    assert (stopped == through).all() and labels.equal(data.labels)
    assert sorted(p.name.split("-")[0] for p in (tmp_path / "stopped").iterdir()) == ["ids", "labels"]


def test_finished_ids_are_read_and_those_of_another_tokenizer_are_not(tmp_path):
    data = image_set(10, 8)
    first, _ = train.cache_ids(tmp_path, tokenizer(2), data, 2)
    batches, data.batches = data.batches, lambda plan, workers: map(forbidden, plan)
    again, labels = train.cache_ids(tmp_path, tokenizer(2), data, 2)
    assert (again == first).all() and labels.equal(data.labels)
    data.batches = batches
    other, _ = train.cache_ids(tmp_path, tokenizer(2, seed=9), data, 2)
    assert (other != first).any()


def test_runs_that_share_a_folder_keep_each_others_ids(tmp_path):
    data, other = image_set(10, 8), image_set(12, 8)
    first, labels = train.cache_ids(tmp_path, tokenizer(2), data, 2)
    before, files = numpy.array(first), {p: p.read_bytes() for p in tmp_path.iterdir()}
    for options in ((tokenizer(2), other, 2), (tokenizer(2), data, 3), (tokenizer(2, seed=9), data, 2)):
        train.cache_ids(tmp_path, *options)
    assert all(p.read_bytes() == content for p, content in files.items())
    assert (first == before).all() and len([*tmp_path.glob("ids-*.npy")]) == 4  # still mapped, still itself


def test_images_that_were_exported_again_under_their_names_get_ids_of_their_own(tree):
    first, _ = train.cache_ids(tree, tokenizer(2), probe.open_data("any", str(tree), 8, train=True), 1)
    PIL.Image.effect_noise((20, 20), 99).convert("RGB").save(tree / "train/ant/0.png")
    second, _ = train.cache_ids(tree, tokenizer(2), probe.open_data("any", str(tree), 8, train=True), 1)
    assert (first[0] != second[0]).any() and (first[1:] == second[1:]).all()


def test_a_folder_that_was_moved_keeps_its_ids(tree, tmp_path_factory):
    vqgan, moved = tokenizer(2), tmp_path_factory.mktemp("moved") / "here"
    marks = [train.fingerprint(vqgan, probe.open_data("any", str(tree), 8, train=True), 1)]
    tree.rename(moved)
    marks.append(train.fingerprint(vqgan, probe.open_data("any", str(moved), 8, train=True), 1))
    (moved / "train/ant/2.png").unlink()
    (moved / "train/ant/2.png").symlink_to("nowhere")
    marks.append(train.fingerprint(vqgan, probe.open_data("any", str(moved), 8, train=True), 1))
    assert marks[0] == marks[1] != marks[2]


def test_every_image_in_memory_counts_for_its_ids():
    vqgan, data = tokenizer(2), image_set(10, 8)
    before = train.fingerprint(vqgan, data, 1)
    data.images[7, 0, 0, 0] ^= 1
    changed = train.fingerprint(vqgan, data, 1)
    data.images[7, 0, 0, 0] ^= 1
    data.labels = data.labels.flip(0)                                   # another order, the same sum
    assert len({before, changed, train.fingerprint(vqgan, data, 1)}) == 3


def test_a_corrupt_image_in_the_cache_has_the_label_of_its_replacement(tree):
    (tree / "train/ant/2.png").write_bytes(b"not an image")
    data = probe.open_data("anything", str(tree), 8, train=True)
    ids, labels = train.cache_ids(tree, tokenizer(2), data, 1)
    assert labels.tolist() == [0, 0, 1, 1, 1, 1] and (ids[2] == ids[3]).all()


@pytest.mark.parametrize("codes, kind", [(65536, numpy.uint16), (65537, numpy.int32), (70000, numpy.int32)])
def test_ids_of_any_codebook_fit_their_file(codes, kind, tmp_path):
    vqgan, data = tokenizer(2, codes), image_set(4, 8)
    with torch.no_grad():
        vqgan.quantize.embedding.weight[:-3] = 99  # all z are nearest to one of the last codes
    ids, labels = train.cache_ids(tmp_path, vqgan, data, 1)
    assert ids.dtype == kind and ids.min() >= codes - 3
    ids = torch.from_numpy(ids.view("int16") if ids.dtype == numpy.uint16 else ids)
    (x, _), = train.cached_batches(ids, labels, [(torch.arange(4), torch.zeros(4, 1, dtype=torch.long))])
    assert x[:, 0].long().equal(vqgan.encode(data.images.float() / 255).flatten(1))


def test_a_damaged_shard_is_made_again_and_damaged_ids_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SHARD", 4)
    vqgan, data = tokenizer(2), image_set(10, 8)
    whole = numpy.array(train.cache_ids(tmp_path, vqgan, data, 2)[0])
    (ids,), joined = tmp_path.glob("ids-*.npy"), train.join_shards
    monkeypatch.setattr(train, "join_shards", lambda *_: None)
    (content := ids.read_bytes()), ids.unlink()
    # all shards are there, and were not joined
    assert_refused("delete them", train.cache_ids, tmp_path, vqgan, data, 2)
    shards = sorted(ids.with_suffix("").iterdir())
    shards[0].write_bytes(shards[0].read_bytes()[:-40])
    shards[1].write_bytes(b"junk")
    shards[2].with_name("000002.npz.9.tmp").write_bytes(b"half a")
    monkeypatch.setattr(train, "join_shards", joined)
    assert (train.cache_ids(tmp_path, vqgan, data, 2)[0] == whole).all()
    ids.write_bytes(content[:-9])
    assert_refused("delete them", train.cache_ids, tmp_path, vqgan, data, 2)


def test_images_are_mapped_in_order_or_the_same_part_of_them_every_time(monkeypatch):
    monkeypatch.setattr(probe, "images_at_once", lambda data, device: 4)
    data = image_set(10, 8)
    x = data.images.float() / 255
    means, labels = probe.map_images(lambda x: x.mean((2, 3)), data)
    assert means.equal(x.mean((2, 3))) and labels.equal(data.labels)
    part, labels = probe.map_images(lambda x: x[:, 0, 0, 0], data, count=5)
    which = (x[:, 0, 0, 0] == part[:, None]).nonzero()[:, 1]
    assert len(which.unique()) == 5 and labels.equal(data.labels[which])
    monkeypatch.setattr(probe, "images_at_once", lambda data, device: 3)
    assert probe.map_images(lambda x: x[:, 0, 0, 0], data, count=5)[0].equal(part)


@pytest.fixture
def half_labelled(monkeypatch):
    """What open_data() finds: 60 images in memory to train on and to test on, half of them without label."""
    data = image_set(60, 32)
    data.labels[::2] = -1
    monkeypatch.setattr(probe, "open_data", lambda *_: data)
    return data


def test_an_image_without_a_label_is_read_as_any_other(half_labelled):
    assert len(probe.map_images(lambda x: x, half_labelled)[0]) == 60
    assert len(probe.map_images(lambda x: x, half_labelled, 8)[0]) == 8


@pytest.mark.parametrize("head", ["ridge", "knn", "linear"])
def test_a_probe_leaves_images_without_a_label_out_and_says_so(head, half_labelled, finished):
    epochs = ("--epochs", 1) * (head == "linear")
    half_labelled.summary = "60 images to train on"
    printed, [row] = probed(finished[0], "--dataset", "half", "--head", head, *epochs)
    assert (row["n_train"], row["n_test"]) == (30, 30)
    assert printed.count("30 of 60 images have a label") == 2 and "60 images to train on" not in printed


def test_a_report_counts_the_images_that_have_a_label(half_labelled, report_of, capsys):
    report_of(half_labelled)
    assert "(ridge, 30 training images)" in capsys.readouterr().out


def test_training_on_labels_takes_one_for_every_image(half_labelled):
    assert_refused("60 images of half have no label", train.open_data,
                   train.settings(train.Config(dataset="half", labels=True, model="umd", steps=5)))
    half_labelled.labels.fill_(-1)
    assert probe.no_probe(half_labelled, half_labelled)
    train.open_data(train.settings(train.Config(dataset="half", model="umd", steps=5)))    # without labels


def test_golden_learning_rate():
    g = golden("mage")
    s = g.inputs["lr_schedule"]
    ours = [probe.learning_rate(e, s["warmup_epochs"], s["epochs"], s["lr"], s["min_lr"])
            for e in s["at_epochs"]]
    assert ours == pytest.approx(g.outputs["lr_schedule"], rel=1e-6, abs=1e-18)


def clouds(n, spread, seed=0):
    """Points around one centre for each of three classes, on axes of very different scale."""
    g = torch.Generator().manual_seed(seed)
    centres, labels = torch.randn(3, 5, generator=torch.Generator().manual_seed(9)), torch.arange(n) % 3
    x = centres[labels] + spread * torch.randn(n, 5, generator=g)
    return x * torch.tensor([1e-3, 1, 1, 1, 100]) + 7, labels


def test_ridge_is_least_squares_with_a_penalty():
    x, y = clouds(3000, 0.3)                                            # more than one chunk of the sums
    mean, std = x.mean(0), x.std(0)
    ones = numpy.pad(((x - mean) / std).double().numpy(), ((0, 0), (0, 1)), constant_values=1)
    for penalty in (0.01, 0.1):
        # a penalty is rows that ask for zero
        rows = numpy.concatenate([ones, math.sqrt(penalty * 3000) * numpy.eye(6)])
        target = numpy.concatenate([numpy.eye(3)[y.numpy()], numpy.zeros((6, 3))])
        weight = probe.ridge(*probe.moments(x, y, mean, std, 3), penalty)
        assert_close(weight, torch.from_numpy(numpy.linalg.lstsq(rows, target, rcond=None)[0]), 1e-5)


def test_the_ridge_probe_solves_a_separable_problem_and_the_test_set_chooses_nothing():
    assert probe.ridge_probe(*clouds(300, 0.05), *clouds(90, 0.05, seed=1)) == 1.0
    (x, y), (x_test, y_test) = clouds(120, 2.0), clouds(90, 2.0, seed=1)
    together = probe.ridge_probe(x, y, x_test, y_test)
    apart = [probe.ridge_probe(x, y, x_test[i:i + 1], y_test[i:i + 1]) for i in range(90)]
    assert 0.34 < together < 0.9 and together == pytest.approx(sum(apart) / 90)


# ------------------------------------------------------------------------------------------------------------
# The scripts, with the words that a user types


def script(name, *args, expect=0):
    """What `python NAME ARGS` does and prints, after checking that its exit code is expected, or among
    those; in this process, since starting one takes longer than most tests."""
    printed, code = io.StringIO(), 0
    out, err = contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed)
    with pytest.MonkeyPatch.context() as patch, out, err, handlers_kept():
        patch.setattr(sys, "argv", [str(HERE / name), *map(str, args)])
        try:
            unified.run_main(importlib.import_module(name.removesuffix(".py")).main)
        except SystemExit as leaving:
            code = leaving.code or 0
    assert code in numpy.atleast_1d(expect), printed.getvalue()
    return printed.getvalue()


def drawn_tree(root, train, val, side, name):
    """A tree in ImageNet's layout, so many drawings to train and to test on, in the class name(i, shape)."""
    for part, first, n in (("train", 0, train), ("val", 1000, val)):
        x, y = unified.draw_shapes(torch.arange(first, first + n), side)
        for i, tile in enumerate(x.movedim(1, -1).numpy()):
            folder = root / part / name(i, y[i].item())
            folder.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(tile).save(folder / f"{i:03d}.png")
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes, 24 images to train on and 8 to test on in each."""
    return drawn_tree(tmp_path_factory.mktemp("photos"), 48, 16, 40, lambda i, shape: ("cat", "dog")[i % 2])


def flags(photos, folder, *more):
    """A training of seconds."""
    return ("--dataset", photos, "--out-dir", folder, "--size", "tiny", "--image-size", 32, "--ids", 16,
            "--codes", 32, "--tokenizer-steps", 3, "--steps", 6, "--batch-size", 8, "--views", 2,
            "--log-every", 2, "--eval-every", 4, "--save-every", 1, "--workers", 0, "--device", "cpu", *more)


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    """The folder of a finished run, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, script("train.py", *flags(photos, folder, "--labels"))


@pytest.mark.parametrize("count", [1, 5, 8, 13, 40])
def test_reconstructions_stand_below_their_images_however_few_these_are(count, tmp_path, monkeypatch):
    x = some_images(count, 32)
    monkeypatch.setattr(probe, "map_images", lambda function, data, n, **_: (x[:n], None))
    cfg = types.SimpleNamespace(out_dir=tmp_path, workers=0, device="cpu", dtype="float32")
    sheets = []
    monkeypatch.setattr(unified, "image_grid", lambda *args, **more: sheets.append((args, more)) or
                        PIL.Image.new("RGB", (8, 8)))
    train.draw_reconstructions(cfg, lambda x: (1 - x,), None)
    (tiles, columns), names = sheets[0][0], sheets[0][1]["rows"]
    rows = list(tiles.split(columns))
    assert len(rows) == len(names) and all(len(row) == columns for row in rows)
    for above, below, *pair in zip(rows[::2], rows[1::2], names[::2], names[1::2]):
        assert below.equal(1 - above) and pair == ["input", "output"]


def test_a_run_leaves_images_figures_and_the_next_commands(finished):
    folder, printed = finished
    for name in ("samples.png", "reconstructions.png", "loss.png"):
        assert min(PIL.Image.open(folder / name).size) > 100
    for words in ("PSNR", "of the codes used", "untrained", "raw pixels", "python sample.py",
                  "python probe.py", "ln 32 = 3.47", "in all: tokenizer "):
        assert words in printed
    rows = rows_of(folder, "log.jsonl")
    assert [r["step"] for r in rows if r["stage"] == "model" and "loss" in r] == [2, 4, 6]
    assert all(r["loss"] > 0 and r["images_per_second"] > 0 and r["grad_norm"] > 0 for r in rows
               if "loss" in r)
    assert {"model", "ema", "optimizer", "stage", "step",
            "config"} <= set(unified.load_checkpoint(folder / "model.pt"))


def test_mage_c_trains_on_two_views_of_a_shared_tokenizer(photos, finished, tmp_path):
    printed = script("train.py", *flags(photos, tmp_path / "c", "--model", "mage-c", "--tokenizer",
                                        finished[0], "--micro-batch", 4))
    assert "contrastive term compares 4 of the 8" in printed and not [*(tmp_path / "c").glob("ids*")]
    assert '"contrast"' in (tmp_path / "c" / "log.jsonl").read_text()


def test_mage_e_trains_on_one_cached_view_of_a_shared_tokenizer(photos, finished, tmp_path):
    tokenizer = finished[0] / "tokenizer.pt"                            # a file: the ids stay in this run
    printed = script("train.py", *flags(photos, tmp_path, "--model", "mage-e", "--tokenizer", tokenizer,
                                        "--micro-batch", 4, "--views", 1))
    assert "contrastive term compares 4 of the 8" in printed
    assert '"contrast"' in (tmp_path / "log.jsonl").read_text()
    model, _ = unified.load_model(tmp_path)
    assert isinstance(model, unified.EchoMAGE) and "untrained" in printed


def test_samples_in_every_form(finished, tmp_path):
    run = finished[0]
    for name, more in (("a", ("--gif", "--png-dir", tmp_path / "flat")), ("b", ("--batch", 2))):
        script("sample.py", run, "--n", 5, "--label", "dog,0", "--guidance", 2, "--steps", 4,
               "--out", tmp_path / f"{name}.png", "--npz", tmp_path / f"{name}.npz", *more)
    one, two = (numpy.load(tmp_path / name)["arr_0"] for name in ("a.npz", "b.npz"))
    assert one.shape == (5, 32, 32, 3) and one.dtype == numpy.uint8
    assert numpy.abs(one.astype(int) - two).max() <= 1                  # the batch size changes no image
    flat = numpy.stack([numpy.array(PIL.Image.open(p)) for p in sorted((tmp_path / "flat").glob("*.png"))])
    assert (flat == one).all() and PIL.Image.open(tmp_path / "a.gif").n_frames == 4
    assert "--overwrite" in script("sample.py", run, "--out", tmp_path / "a.png", expect=2)


def test_the_run_may_stand_before_or_after_images_masks_and_boxes(photos, finished, tmp_path):
    run, files = finished[0], sorted((photos / "val" / "cat").iterdir())[:2]
    out, mask = tmp_path / "a.png", tmp_path / "mask.png"
    PIL.Image.fromarray(numpy.kron([[255, 0], [0, 0]], numpy.ones((16, 16))).astype(numpy.uint8)).save(mask)
    found = []
    images, box = ["--image", *files], ["--box", "0,0,16,16"]
    for words in ([run, *images, *box], [*images, run, *box], [*box, *images, run / "model.pt"],
                  [*images, *box, run], [*images, "--mask", mask, run]):
        script("sample.py", *words, "--steps", 2, "--n", 1, "--out", out, "--overwrite")
        found.append(out.read_bytes())
    assert len(set(found)) == 1
    for words in ([], ["--image", run], [*images, *box]):
        assert "sample.py out/RUN" in script("sample.py", *words, expect=2)


def test_a_schedule_is_any_of_unifieds_and_refused_where_there_is_none(finished, diffused, tmp_path):
    def images(name, *more):
        script("sample.py", finished[0], "--n", 3, "--steps", 4, "--out", tmp_path / f"{name}.png",
               "--npz", tmp_path / f"{name}.npz", *more)
        return torch.from_numpy(numpy.load(tmp_path / f"{name}.npz")["arr_0"])
    plain = images("plain")
    cosine, linear = (images(name, "--schedule", name) for name in ("cosine", "linear"))
    assert plain.equal(cosine) and not plain.equal(linear)
    ours = unified.load_model(finished[0], ema=True)[0].sample(3, steps=4, schedule="linear")
    assert numpy.abs(unified.to_uint8(ours).astype(int) - linear.numpy()).max() <= 1
    printed = script("sample.py", diffused[0], "--schedule", "linear", expect=2)
    assert "umd does not take --schedule; leave it out" in printed
    assert "choose from" in script("sample.py", finished[0], "--schedule", "square", expect=2)


def test_labels_that_are_numbers_are_names_and_a_name_may_have_a_comma():
    def asked(label, names):
        return sample.class_numbers(sample.Config(run="run", label=label), names).tolist()
    assert asked("2,1", ["1", "2", "cat, small"]) == [1, 0]
    assert asked("cat, small", ["1", "cat, small"]) == [1]
    assert asked("0,dog", ["cat", "dog"]) == [0, 1] and asked("all", ["1", "2"]) == [0, 1]
    assert asked("all", ["all", "cat"]) == [0]
    assert_refused("--label 0 is no class; they are 1, 2$", asked, "0", ["1", "2"])


def test_an_image_is_inpainted_with_guidance_by_a_label_and_by_a_guide(finished, tmp_path):
    sheets, guide = [], ("--guide", finished[0], "--guidance", 3)
    PIL.Image.new("RGB", (32, 32), "gray").save(tmp_path / "grey.png")
    for number, more in enumerate([(), ("--label", "cat", "--guidance", 3), guide]):
        out = tmp_path / f"{number}.png"
        script("sample.py", finished[0], "--image", tmp_path / "grey.png", "--box", "0,0,16,16", "--n", 2,
               "--steps", 2, "--out", out, *more)
        sheets.append(out.read_bytes())
    assert sheets[0] == sheets[2] != sheets[1]      # who guides himself is not moved; a label moves


def test_a_guide_and_an_interval_change_samples_and_are_refused_where_they_do_nothing(finished, diffused,
                                                                                      tmp_path):
    def pixels(name, *more):
        script("sample.py", finished[0], "--n", 3, "--steps", 4, "--out", tmp_path / f"{name}.png",
               "--png-dir", tmp_path / name, *more)
        return [path.read_bytes() for path in sorted((tmp_path / name).glob("*.png"))]
    guide = twin(unified.load_model(finished[0], ema=True)[0])
    other = tmp_path / "other.pt"
    state = unified.load_checkpoint(finished[0] / "model.pt")
    torch.save({**state, "model": guide.state_dict(), "ema": None}, other)
    guided = ("--guidance", 3, "--guide", other)
    plain, whole, part = (pixels(name, *more) for name, more in (
        ("plain", ()), ("whole", guided), ("part", (*guided, "--guidance-interval", "0.5,1"))))
    assert plain != whole != part != plain
    command = ("sample.py", finished[0], "--n", 4, "--steps", 4, *guided, "--png-dir", tmp_path / "part")
    assert "other weights, options" in script(*command, "--out", tmp_path / "a.png", expect=2)
    for words, more in (("cannot guide", ("--guide", diffused[0], "--guidance", 2)),
                        ("--guide does nothing at --guidance 1", ("--guide", other)),
                        ("--guidance-interval does nothing", ("--guidance-interval", "0,0.5")),
                        ("not LO,HI", ("--guidance-interval", "0.5,0.2", *guided)),
                        ("add --label, or a --guide", ("--guidance", 2))):
        assert words in script("sample.py", finished[0], *more, expect=2)


def test_two_images_with_inpainting_masks_in_different_places_in_one_call(photos, finished, tmp_path):
    files = sorted((photos / "val" / "cat").iterdir())[:2]
    script("sample.py", finished[0], "--image", *files, "--box", "4,4,12,12", "10,16,32,32", "--n", 1,
           "--gif", "--steps", 3, "--out", tmp_path / "p.png")
    sheet = numpy.array(PIL.Image.open(tmp_path / "p.png")).astype(int)
    zoom = (sheet.shape[1] - 8) // 96                                   # three tiles of 32 with 2-pixel lines
    side = 32 * zoom
    sheet = sheet[-2 * side - 6:]                                       # below the columns' names
    for row, (x0, y0, x1, y1) in enumerate(((4, 4, 12, 12), (10, 16, 32, 32))):
        original, filled = (sheet[2 + row * (side + 2):, 2 + column * (side + 2):][:side:zoom, :side:zoom]
                            for column in (0, 2))
        outside = numpy.ones((32, 32), bool)
        outside[y0:y1, x0:x1] = False
        assert (original[outside] == filled[outside]).all() and (original[~outside] != filled[~outside]).any()
    assert "wrote" in script("sample.py", finished[0], "--image", files[0], "--reconstruct", "--out",
                             tmp_path / "r.png")


def test_an_option_that_would_change_nothing_is_refused(finished, photos, sampled):
    file = next((photos / "val" / "cat").iterdir())
    for more in (("--steps", 3), ("--temperature", 1), ("--label", "cat")):
        printed = script("sample.py", finished[0], "--image", file, "--reconstruct", *more, expect=2)
        assert f"{more[0]} changes nothing" in printed
    for more in (("--limit", 40), ("--layers", 1), ("--labels", 0.5), ("--pool", "mean")):
        assert more[0] in script("probe.py", *sampled, *more, expect=2)


@pytest.fixture(scope="module")
def diffused(photos, tmp_path_factory):
    """The folder of a finished UMD run, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "umd"
    return folder, script("train.py", *flags(photos, folder, "--model", "umd", "--micro-batch", 4, "--views",
                                             1, "--save-every", 2))


def test_a_run_that_ended_before_its_first_checkpoint_is_begun_again_by_the_same_command(photos, tmp_path):
    run = tmp_path / "run"
    make_images(run, ["samples.png", "reconstructions.png"])
    (run / "log.jsonl").write_text('{"stage": "model", "step": 2, "loss": 9.0}\n')
    assert "type the command that began it once more" in script("train.py", "--resume", run, expect=2)
    script("train.py", *flags(photos, run, "--model", "umd", "--views", 1, "--no-report"))
    assert 9.0 not in [row.get("loss") for row in train.read_rows(run)]
    (run / "notes.txt").write_text("mine")
    assert "is not empty" in script("train.py", *flags(photos, run, "--model", "umd", "--views", 1), expect=2)


def test_a_resumed_run_may_stop_being_strict_and_spells_its_data_as_it_likes(photos, diffused, tmp_path):
    run = shutil.copytree(diffused[0], tmp_path / "run")
    script("train.py", "--resume", run, "--steps", 7, "--no-strict-images", "--no-report")
    script("train.py", "--resume", run, "--steps", 8, "--dataset", f"{photos}/", "--no-report")
    (run / "log.jsonl").unlink()
    assert "out" in script("train.py", "--resume", run) and not (run / "nothing").exists()


def test_init_takes_the_weights_of_the_same_method_alone_of_pixels_too(photos, diffused, tmp_path):
    assert "holds umd, not dit" in script("train.py", *flags(
        photos, tmp_path / "dit", "--model", "dit", "--views", 1, "--init", diffused[0]), expect=2)


def test_a_film_of_an_earlier_command_is_not_passed_off_as_one_of_this_sheet(finished, tmp_path):
    args = (finished[0], "--n", 2, "--out", tmp_path / "a.png", "--steps", 2)
    assert "earlier command" not in script("sample.py", *args, "--gif")
    assert "a.gif is of an earlier command" in script("sample.py", *args, "--overwrite")


def test_where_all_is_predicted_at_once_there_is_one_image_and_no_seed(finished, photos, tmp_path):
    image = ("--image", sorted(photos.rglob("*.png"))[0], "--out", tmp_path / "a.png")
    for flag, value in (("--n", 2), ("--steps", 3)):
        refused = script("sample.py", finished[0], *image, "--reconstruct", flag, value, expect=2)
        assert f"{flag} changes nothing" in refused
    script("train.py", *flags(photos, tmp_path / "mae", "--model", "mae", "--views", 1, "--no-report"))
    for flag, value in (("--n", 2), ("--seed", 4)):
        refused = script("sample.py", tmp_path / "mae", *image, "--box", "0,0,9,9", flag, value, expect=2)
        assert f"{flag} changes nothing" in refused
    script("sample.py", tmp_path / "mae", *image, "--box", "0,0,9,9")


def test_steps_that_strides_do_not_allow_are_told(diffused, tmp_path):
    printed = script("sample.py", diffused[0], "--n", 2, "--steps", 3, "--out", tmp_path / "a.png")
    assert "--steps 3: 4 are taken" in printed


def test_a_mask_that_its_exif_turns_is_turned_once(tmp_path):
    mask, exif = PIL.Image.new("L", (100, 60)), PIL.Image.Exif()
    PIL.Image.new("RGB", (100, 60)).save(tmp_path / "a.png")
    PIL.ImageDraw.Draw(mask).rectangle((20, 0, 50, 30), fill=255)
    mask.save(tmp_path / "m.png")
    exif[0x0112] = 6
    mask.transpose(PIL.Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    plain, turned = (sample.read_mask(tmp_path / name, tmp_path / "a.png", 32)
                     for name in ("m.png", "turned.png"))
    assert plain.any() and turned.equal(plain)


@pytest.mark.parametrize("name", ["umd", "adm"])
def test_an_untrained_network_mixes_what_it_reads_and_one_from_scratch_starts_as_training_does(name):
    arch = unified.model_config(name, "tiny", 32, 4)
    torch.manual_seed(0)
    model, x = unified.build(arch).eval(), some_images(3, 32)
    scratch, fresh = (probe.untrained(model, {"arch": arch}, from_zero) for from_zero in (True, False))
    assert all(ours.equal(theirs) for ours, theirs in zip(scratch.parameters(), model.parameters()))
    drawn = [key for key, p in fresh.named_parameters() if not p.equal(model.get_parameter(key))]
    zeros = {key.rpartition(".")[0] for key, p in model.named_parameters() if p.dim() > 1 and not p.any()}
    assert {key.rpartition(".")[0] for key in drawn} == zeros - {""}            # the class tokens stay at 0
    with torch.no_grad():                                       # whether it sees that an image is turned over
        seen = [(net.embed(x, noise=x * 0) - net.embed(x.flip(3), noise=x * 0)).abs().max()
                for net in (scratch, fresh)]
    assert seen[0] < 0.01 < 0.05 < seen[1]


def test_layers_that_start_at_0_are_drawn_whatever_they_are_and_frozen_ones_are_left():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(unified.zero_init(layer) for layer in (
                torch.nn.Linear(4, 4), torch.nn.ConvTranspose2d(3, 3, 2), torch.nn.Embedding(3, 4),
                torch.nn.LayerNorm(4)))
            self.frozen = unified.zero_init(torch.nn.Linear(4, 4)).requires_grad_(False)
            self.scale = torch.nn.Parameter(torch.zeros(4))
    own, state = Own(), torch.get_rng_state()
    unified.draw_zero_layers(own)
    assert all(layer.weight.any() for layer in own.layers)
    assert not own.frozen.weight.any() and not own.scale.any()
    assert torch.get_rng_state().equal(state)                   # what is drawn after it stays the same


def test_averaged_weights_that_a_method_does_not_keep_cannot_be_asked_for(finished):
    assert "keeps no averaged weights" in script("probe.py", finished[0], "--weights", "ema", expect=2)


def test_many_threads_load_models_at_once(finished):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        models = [*pool.map(lambda _: unified.load_model(finished[0], tell=lambda line: None)[0], range(16))]
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in models]
    assert all(w.equal(weights[0]) for w in weights)


def test_a_model_of_pixels_trains_samples_inpaints_and_is_probed_like_any_other(photos, diffused, tmp_path):
    run, printed = diffused
    assert "16 tokens an image" in printed and "untrained" in printed and not (run / "tokenizer.pt").exists()
    assert "no clean image" not in printed
    assert re.search(r"in all: umd \d s; then the report", printed)
    for name in ("samples.png", "reconstructions.png", "loss.png"):
        assert min(PIL.Image.open(run / name).size) > 100
    weights = dict(unified.load_model(run)[0].named_parameters())
    assert unified.load_checkpoint(run / "model.pt")["ema"].keys() == weights.keys()
    file = sorted((photos / "val" / "cat").iterdir())[0]
    script("sample.py", run, "--n", 3, "--steps", 50, "--gif", "--out", tmp_path / "a.png")
    assert PIL.Image.open(tmp_path / "a.gif").n_frames <= 26
    for more in (("--box", "4,4,12,12", "--steps", 3, "--n", 1), ("--reconstruct",)):
        script("sample.py", run, "--image", file, *more, "--out", tmp_path / f"{len(more)}.png")
    _, [row] = probed(run, "--layers", "1,4", "--t", "0,50")
    assert row["layer"] in (1, 4) and row["t"] in (0, 50) and row["pool"] == "mean"
    assert "0 to 1000" in script("probe.py", run, "--t", "1001", expect=2)


def test_the_unet_trains_and_shows_samples(photos, tmp_path):
    script("train.py", *flags(photos, tmp_path / "run", "--model", "adm", "--views", 1, "--steps", 2,
                              "--eval-every", 0, "--image-size", 16))
    assert min(PIL.Image.open(tmp_path / "run" / "samples.png").size) > 100
    assert '"vb"' in (tmp_path / "run" / "log.jsonl").read_text()
    assert "takes none" in script("train.py", *flags(photos, tmp_path / "other", "--model", "adm", "--views",
                                                     1, "--labels"), expect=2)


def test_averaged_weights_resume_to_the_same_bits(photos, diffused, tmp_path):
    more = ("--model", "umd", "--micro-batch", 4, "--views", 1, "--eval-every", 0)
    process = start(tmp_path / "printed", run_script, "train.py", flags(photos, tmp_path / "run", *more))
    until((tmp_path / "run" / "model.pt").exists, process)
    process.kill()
    finish(process)
    script("train.py", *flags(photos, tmp_path / "run", *more, "--resume"))
    ours, theirs = (unified.load_checkpoint(folder / "model.pt")
                    for folder in (tmp_path / "run", diffused[0]))
    for part in ("model", "ema"):
        assert all(torch.equal(v, theirs[part][k]) for k, v in ours[part].items())
    reports = [row for folder in (tmp_path / "run", diffused[0]) for row in rows_of(folder, "log.jsonl")
               if row["stage"] == "report"]
    assert ["cpu_minutes" in row for row in reports] == [False, True]       # of a part it would mislead


def test_a_trained_model_learns_the_classes_and_lends_its_encoder(photos, finished, diffused, tmp_path):
    printed = script("train.py", *flags(photos, tmp_path / "l", "--model", "umd", "--labels", "--init",
                                        diffused[0], "--views", 1, "--eval-every", 0))
    assert "fresh: label_embed" in printed
    assert "no clean image: 5% of 8 are none; --batch-size 20" in printed
    model, config = unified.load_model(tmp_path / "l")
    assert (model.clean_ratio, model.mask_ratio_noised, model.classes) == (0.05, 0.0, 2)
    script("sample.py", tmp_path / "l", "--label", "dog", "--guidance", 2, "--n", 2, "--steps", 2, "--out",
           tmp_path / "l.png")
    printed = script("train.py", *flags(photos, tmp_path / "m", "--model", "mae", "--init-encoder",
                                        diffused[0], "--views", 1, "--eval-every", 0))
    assert re.search(r"\b(\d+) of \1 tensors from", printed)
    assert not (tmp_path / "m" / "samples.png").exists()
    assert "it has no blocks.0." in script("train.py", *flags(
        photos, tmp_path / "x", "--model", "umd", "--init-encoder", finished[0], "--views", 1), expect=2)
    assert "start from nothing" in script("sample.py", tmp_path / "m", expect=2)
    file = next((photos / "val" / "cat").iterdir())
    printed = script("sample.py", tmp_path / "m", "--image", file, "--box", "0,0,9,9", "--eta", 0, expect=2)
    assert "--eta changes nothing" in printed
    assert "does not fit" in script("train.py", *flags(photos, tmp_path / "n", "--model", "umd", "--init",
                                                       diffused[0], "--views", 1, "--ids", 64), expect=2)


def test_the_untrained_twin_of_the_closing_report_does_not_depend_on_what_ran_before(finished, photos,
                                                                                     monkeypatch):
    model, _ = unified.load_model(finished[0])
    cfg = types.SimpleNamespace(out_dir=finished[0], model="mage", init="", labels=True, workers=0,
                                device="cpu")
    data = probe.open_data(str(photos), "", 32, train=False)
    monkeypatch.setattr(probe, "ridge_probe", lambda features, *_: features.clone())
    reports = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        reports.append(train.probe_features(cfg, model, {}, data, data))
    assert len(reports[0]) == 3
    assert all(found.equal(reports[1][name]) for name, found in reports[0].items())


def test_one_run_is_called_by_its_name(finished):
    of, line = script("probe.py", finished[0], "--workers", 0).splitlines()[2:4]
    assert line.split("  ")[-1] == finished[0].name and "48 training images, 16 test images" in of
    assert script("probe.py", finished[0] / "model.pt", "--workers", 0).splitlines()[3] == line


def test_several_runs_make_one_table_in_which_equal_baselines_stand_once(photos, finished, diffused,
                                                                         tmp_path):
    """A twin of a run has the same baselines; UMD is read at another position."""
    twin, runs = tmp_path / "twin", [finished[0], diffused[0]]
    twin.mkdir()
    shutil.copy(finished[0] / "model.pt", twin)
    lines = [re.split(r"  +", line.strip()) for line in
             script("probe.py", *runs, twin, "--workers", 0).split("ridge  ")[-1].splitlines()]
    rows = [rows_of(run)[-1] for run in (*runs, twin)]
    assert lines[0] == ["layer", "t", "pool", "train", "test", "training"]
    for line, name, row in zip(lines[1:], ("run", "umd", "twin"), rows):
        accuracy = f"{row['top1']:.1%} +- {row['standard_error']:.1%}"
        assert line == [name, accuracy, str(row["layer"]), f"{row['t']:g}", row["pool"], "48", "16",
                        f"{'umd' if name == 'umd' else 'mage'}, 6 x 8 {photos.name}"]
    assert [line[0] for line in lines[4:7]] == ["untrained (run, twin)", "untrained (umd)", "raw pixels"]
    assert [line[1].split("%")[0] for line in lines[4:7]] == \
        [f"{100 * v:.1f}" for v in (rows[0]["untrained"], rows[1]["untrained"], rows[0]["pixels"])]
    assert lines[7] == ["note that the pool differs: mean, class; --pool mean makes it the same"]
    assert re.fullmatch(r"ridge: \w+ is best; 16 test images cannot tell it from \w+.*", lines[8][0])


def test_a_table_of_runs_that_are_read_alike_warns_of_nothing(finished, diffused):
    same = script("probe.py", finished[0], diffused[0], "--workers", 0, "--pool", "mean",
                  "--head", "fewshot", "--shots", 4)
    assert "note that" not in same and same.splitlines()[-7].split()[0] == "fewshot-4" and "+-" in same


@pytest.mark.parametrize("homes, told", [(("cats", "dogs"), True), (("cats", "cats"), False),
                                         (("dogs", "dogs"), False)])
def test_a_table_tells_which_run_is_at_home_on_the_data(homes, told, capsys):
    row = {"head": "knn", "layer": 4, "t": 0, "pool": "mean", "top1": 0.5, "untrained": None, "pixels": None,
           "n_train": 9, "n_test": 4, "training": "mage", "model": "mage", "dataset": "cats"}
    probe.print_table([[row | {"run": run, "trained_on": home}] for run, home in zip("ab", homes)])
    assert ("note that a learned from this data set, and the others" in capsys.readouterr().out) == told


@pytest.mark.parametrize("n, told", [(100, "; 100 test images cannot tell it from a, b"),
                                     (400, "; 400 test images cannot tell it from b"), (40_000, "")])
def test_a_table_tells_which_run_is_best_and_which_may_be_as_good(n, told, capsys):
    """Two standard errors of the difference of 0.60 and 0.63 are 0.14 with 100 images, 0.07 with 400."""
    scores = {"a": 0.5, "b": 0.6, "c": 0.63}
    probe.tell_best([*scores], [[{"head": "ridge", "dataset": "cats", "n_test": n, "top1": p}]
                                for p in scores.values()])
    assert capsys.readouterr().out == f"ridge: c is best{told}\n"


@pytest.mark.parametrize("p, n, error", [(0.5, 100, 0.05), (0.0, 3, 0.231), (1.0, 3, 0.231)])
def test_no_accuracy_is_certain(p, n, error):
    assert probe.standard_error(p, n) == pytest.approx(error, abs=1e-3)


def test_a_training_is_told_with_its_data_and_where_it_stopped():
    config = {"arch": {"model": "umd"}, "steps": 30, "batch_size": 8, "dataset": "my/photos"}
    assert probe.training_of(config) == "umd, 30 x 8 photos"
    assert probe.training_of(config | {"stopped": 7}) == "umd, 7 of 30 x 8 photos"
    assert probe.training_of(config | {"steps": None, "epochs": 2.0}) == "umd, 2 epochs of photos"
    assert probe.training_of({"arch": {"model": "umd"}}) == "umd"


def test_a_data_set_is_the_same_however_its_path_is_spelled(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    assert probe.same_data(f"{tmp_path}/", str(tmp_path / "link")) and probe.same_data("shapes", "shapes")
    assert not probe.same_data("shapes", "cifar10") and not probe.same_data(None, "shapes")


def test_a_table_names_data_that_differ_and_runs_of_one_name_by_their_path(capsys):
    row = {"head": "knn", "layer": [2, 3], "t": 0, "pool": "mean", "top1": 0.5, "untrained": None,
           "pixels": None, "n_train": 9, "n_test": 4, "training": "mage", "model": "mage"}
    probe.print_table([[row | {"run": f"{name}/run", "dataset": name}] for name in ("a", "b")])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in printed[1:3]] == ["a/run", "b/run"]
    assert "50.0% +- 25.0%" in printed[1]
    assert len(printed) == 4 and "dataset differs: a, b; --dataset" in printed[3]


def test_a_mistake_in_the_last_of_several_runs_is_told_before_the_first_is_read(finished, diffused, tmp_path):
    before = rows_of(finished[0])
    for second, more, words in ((tmp_path / "typo", (), "typo"), (diffused[0], ("--t", 0.5), "--t 0.5")):
        printed = script("probe.py", finished[0], second, *more, "--workers", 0, expect=2)
        assert words in printed and "training images" not in printed
    assert "one run" in script("probe.py", finished[0], diffused[0], "--save", tmp_path / "a.npz", expect=2)
    state = unified.load_checkpoint(finished[0] / "model.pt")
    state["config"]["dataset"], unlabelled = str(tmp_path), tmp_path / "unlabelled.pt"
    torch.save(state, unlabelled)
    PIL.Image.new("RGB", (40, 40)).save(tmp_path / "0.png")
    printed = script("probe.py", finished[0], unlabelled, "--workers", 0, expect=2)
    assert "cannot be probed" in printed and "training images," not in printed
    assert before == rows_of(finished[0])


def save(run, folder, file, *more):
    """What probe.py --save says and keeps."""
    printed = script("probe.py", run, "--dataset", folder, "--save", file, "--workers", 0, *more)
    with numpy.load(file) as kept:
        return printed, dict(kept)


def test_features_of_ten_photos_in_a_flat_folder_are_kept(finished, tmp_path):
    x, _ = unified.draw_shapes(torch.arange(10), 40)
    for i, tile in enumerate(x.movedim(1, -1).numpy()):
        PIL.Image.fromarray(tile).save(tmp_path / f"{i}.png")
    (tmp_path / "5.png").write_bytes(b"not an image")
    printed, kept = save(finished[0], tmp_path, tmp_path / "z.npz")
    files = [f"{i}.png" for i in range(10) if i != 5]
    assert sorted(kept) == ["classes", "features", "files", "labels"] and kept["files"].tolist() == files
    assert not len(kept["classes"])
    assert kept["labels"].tolist() == [-1] * 9 and kept["features"].dtype == numpy.float32
    model, config = unified.load_model(finished[0])
    x = torch.stack([unified.read_image(tmp_path / name, config["image_size"]) for name in files])
    z = model.embed(x)
    assert_close(torch.from_numpy(kept["features"]), z.detach(), 1e-5)
    told = [line for line in printed.splitlines() if "5.png" in line]
    line, *hint = printed.splitlines()[-3:]
    assert len(told) == 1 and all(v in line for v in (str(kept["features"].shape), "z.npz", "unreadable: 1"))
    exec("import numpy\n" + "\n".join(line.strip() for line in hint), {})         # the hint is Python
    assert "z.npz" in script("probe.py", finished[0], "--save", tmp_path / "z.npz", expect=2)   # not replaced
    (tmp_path / "one").mkdir()
    (tmp_path / "0.png").rename(tmp_path / "one/0.png")
    assert save(finished[0], tmp_path / "one", tmp_path / "o.npz")[1]["features"].shape == (1, 128)
    (tmp_path / "none").mkdir()
    none = ("--dataset", tmp_path / "none", "--save", tmp_path / "n.npz")
    assert "there is no folder" in script("probe.py", finished[0], "--dataset", tmp_path / "no", expect=2)
    assert "no image in" in script("probe.py", finished[0], *none, expect=2)
    (tmp_path / "none/a.png").write_bytes(b"not an image")
    assert "none of 1 images can be read" in script("probe.py", finished[0], *none, expect=2)
    (tmp_path / "one/p.heic").write_bytes(b"no image that Pillow reads")
    printed, kept = save(finished[0], tmp_path / "one", tmp_path / "p.npz")
    assert "left out 1 files that are no images; save .HEIC as JPEG (p.heic)" in printed
    assert kept["files"].tolist() == ["0.png"]
    (tmp_path / "one/0.png").unlink()
    assert "left out 1 files that are no images" in script(
        "probe.py", finished[0], "--dataset", tmp_path / "one", "--save", tmp_path / "n.npz", expect=2)
    assert not (tmp_path / "n.npz").exists()


def test_features_of_a_folder_of_any_layout_are_kept_with_the_labels_that_it_has(photos, finished, tmp_path):
    names = [[f"{part}/{c}/{i:03d}.png" for i in range(k, n, 2)]
             for part, n in (("train", 48), ("val", 16)) for k, c in enumerate(("cat", "dog"))]
    kept = save(finished[0], photos, tmp_path / "a.npz")[1]
    assert kept["files"].tolist() == sum(names, [])
    assert kept["labels"].tolist() == [0] * 24 + [1] * 24 + [0] * 8 + [1] * 8
    place = ("--layers", 2, "--t", 0.5, "--workers", 0)
    own = script("probe.py", finished[0], "--save", tmp_path / "own.npz", *place)
    assert "(64, 128) of layer 2, t 0.5, mean" in own                   # the run's own data
    some = save(finished[0], photos, tmp_path / "some.npz", "--limit", 20)[1]
    rows = [sum(names, []).index(name) for name in some["files"]]
    assert len(rows) == 20 and rows == sorted(rows)
    assert_close(torch.from_numpy(some["features"]), torch.from_numpy(kept["features"])[rows], 1e-5)
    classes = shutil.copytree(photos / "train", tmp_path / "classes")
    kept = save(finished[0], classes, tmp_path / "b.npz")[1]
    assert kept["labels"].tolist() == [0] * 24 + [1] * 24 and kept["files"][-1] == "dog/047.png"
    assert kept["classes"].tolist() == ["cat", "dog"]
    shutil.copy(classes / "cat/000.png", classes / "beside.png")        # what trains leaves it out
    kept = save(finished[0], classes, tmp_path / "c.npz")[1]
    assert kept["files"][0] == "beside.png" and kept["labels"].tolist() == [-1] + [0] * 24 + [1] * 24
    three = shutil.copytree(photos, tmp_path / "three")                 # a part that no training reads
    shutil.copytree(photos / "val", three / "test")
    kept = save(finished[0], three, tmp_path / "e.npz")[1]
    found = [c for file, c in zip(kept["files"], kept["labels"]) if file.startswith("test/")]
    assert found == [0] * 8 + [1] * 8
    odd = shutil.copytree(photos, tmp_path / "odd")
    shutil.rmtree(odd / "val/dog")                                      # no training takes this
    assert set(save(finished[0], odd, tmp_path / "d.npz")[1]["labels"].tolist()) == {-1}


def test_training_and_test_shapes_are_different_images_and_a_set_in_memory_can_be_read_whole(tmp_path,
                                                                                             monkeypatch):
    monkeypatch.setattr(unified, "draw_shapes", lambda seeds, size: (seeds[:, None, None, None], seeds))
    parts, seeds, names = zip(*(probe.shapes(part, 32) for part in (True, False, None)))
    assert torch.cat(seeds[:2]).equal(seeds[2]) and len(seeds[2].unique()) == 22_000
    assert [len(part) for part in parts[:2]] == [20_000, 2_000] and len(names[1]) == len(unified.SHAPES)
    small_cifar(tmp_path, monkeypatch)
    parts = [probe.cifar10(tmp_path, part)[0] for part in (True, False, None)]
    assert torch.cat(parts[:2]).equal(parts[2]) and len(parts[2]) == 60


def test_a_run_inside_a_data_set_is_no_class_of_it(tree, tmp_path):
    for root in (tree, tree / "train", tmp_path / "flat"):
        make_images(tmp_path / "flat", ["a.png", "b.png", "c.png"])
        for folder in (root / "look", root / "train/look"):
            make_images(folder, ["samples.png", "reconstructions.png"])
            (folder / "log.jsonl").write_text("{}\n")
        _, classes, parts, notes = probe.find_images(root)
        assert classes == (["ant", "bee"] if root != tmp_path / "flat" else [])
        assert not any("look" in str(path) for files, _ in parts.values() for path in files)
        assert "beside the class folders" not in notes


def test_a_part_that_differs_from_another_in_capitals_alone_is_told_as_left_out(tree):
    shutil.copytree(tree / "train", tree / "Train")
    _, _, parts, notes = probe.find_images(tree)
    assert len(parts[True][0]) == 6 and "1 folders beside train (Train)" in notes


def broken_tree(root, what):
    """A copy-sized tree with one thing wrong."""
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            if what != "empty":
                PIL.Image.new("RGB", (32, 32)).save(root / part / name / "a.png")
    if what == "classes":
        (root / "val" / "dog").rename(root / "val" / "cow")
    if what == "corrupt":
        (root / "train" / "cat" / "b.jpg").write_bytes(b"\xff\xd8 not an image")
    return root


@pytest.mark.parametrize("args, words", [
    (["--dataset", "imagenet", "--data-dir", "{tmp}/nowhere"], "nowhere"),
    (["--dataset", "cifar10", "--data-dir", "{tmp}/nowhere"], "nowhere"),
    (["--dataset", "{empty}"], "no image in"), (["--dataset", "{classes}"], "cow"),
    (["--dataset", "{corrupt}", "--strict-images", "--image-size", "32", "--size", "tiny", "--workers", "0",
      "--tokenizer-steps", "2"], "b.jpg"),
    (["--data-dir", "{empty}"], "shapes is drawn, not read from"),
    (["--dataset", "{tmp}/nowhere"], "there is no folder"), (["{empty}"], "did you mean --dataset"),
    (["--batch-size", "10", "--micro-batch", "4"], "10"), (["--ids", "17"], "--ids 17"),
    (["--image-size", "36", "--tokenizer", "{tokenizer}"], "36"), (["--device", "cuda:77"], "cuda:77"),
    (["--tokenizer", "{truncated}"], "truncated.pt"), (["--out", "x"], "--out-dir"),
    (["--model", "umd", "--tokenizer", "{tokenizer}"], "umd has no tokenizer"), (["--colour"], "--colour"),
    (["--model", "addp", "--init", "{tokenizer}", "--labels"], "addp takes none")])
def test_a_users_mistake_ends_in_one_sentence_and_exit_code_2(args, words, finished, tmp_path):
    (tmp_path / "truncated.pt").write_bytes((finished[0] / "model.pt").read_bytes()[:5000])
    places = {"tmp": tmp_path, "tokenizer": finished[0] / "tokenizer.pt",
              "truncated": tmp_path / "truncated.pt",
              **{what: broken_tree(tmp_path / what, what) for what in ("empty", "classes", "corrupt")}}
    printed = script("train.py", "--out-dir", tmp_path / "run", *(a.format(**places) for a in args), expect=2)
    assert words in printed and "Traceback" not in printed


@pytest.fixture
def sampled(finished, tmp_path, monkeypatch):
    """A copy of a run in a folder of its own, and the samples to measure it by."""
    monkeypatch.setitem(probe.CLASSIFIER, "images", 96)
    shutil.copytree(finished[0], tmp_path / "out/run")
    x = torch.randint(256, (10, 32, 32, 3), generator=torch.Generator().manual_seed(0))
    numpy.savez(tmp_path / "x.npz", arr_0=x.byte().numpy())
    return tmp_path / "out/run", "--samples", tmp_path / "x.npz", "--workers", 0, "--device", "cpu"


def test_fd_local_has_anchors_and_a_classifier_that_is_trained_once(sampled, photos, monkeypatch):
    printed, [row] = probed(*sampled)
    path = sampled[0].parent / f"{photos.name}-classifier.pt"
    for words in ("FD-local", "precision", "test images through the tokenizer", "noise", "on the test set",
                  "10 images of each against 48 training images"):
        assert words in printed
    assert row["n"] == 10 and row["head"] == "samples" and len(row["anchors"]) == 3 and row["date"]
    first = path.read_bytes()
    assert unified.load_checkpoint(path)["top1"] == row["classifier_top1"]
    monkeypatch.setattr(probe, "train_classifier", forbidden)
    printed, [again] = probed(*sampled)
    assert "appended" in printed and path.read_bytes() == first
    assert {**row, "seconds": 0, "date": 0} == {**again, "seconds": 0, "date": 0}


@pytest.mark.parametrize("spoil", ["damaged", "of other images"])
def test_a_classifier_that_does_not_fit_is_trained_anew(sampled, photos, monkeypatch, spoil):
    path = sampled[0].parent / f"{photos.name}-classifier.pt"
    script("probe.py", *sampled)
    right = path.read_bytes()
    if spoil == "damaged":
        path.write_bytes(right[:1000])
    else:
        torch.save({**torch.load(path), "fingerprint": "another"}, path)
    script("probe.py", *sampled)
    assert all(v.equal(w) for v, w in zip(torch.load(path)["model"].values(),
                                          torch.load(io.BytesIO(right))["model"].values()))


def test_a_data_set_with_three_test_images_is_too_small_to_measure_samples(sampled, monkeypatch):
    monkeypatch.setattr(probe, "open_data", lambda *args: image_set(48 if args[3] else 3, 32))
    assert "3 images to test on" in script("probe.py", *sampled, "--dataset", "any", expect=2)


def test_of_several_processes_the_first_measures_samples_as_if_alone(sampled, photos, monkeypatch):
    rows = []
    for rank in (None, "0"):
        if rank:
            monkeypatch.setenv("WORLD_SIZE", "2"), monkeypatch.setenv("RANK", rank)
        rows += probed(*sampled)[1]
        (sampled[0].parent / f"{photos.name}-classifier.pt").unlink()
    assert {**rows[0], "seconds": 0, "date": 0} == {**rows[1], "seconds": 0, "date": 0}
    monkeypatch.setenv("RANK", "1"), monkeypatch.setattr(probe, "judge_samples", forbidden)
    assert not script("probe.py", *sampled)


def test_ctrl_c_stops_the_classifier_and_leaves_nothing_behind(sampled, photos, monkeypatch):
    def interrupted(*args):
        for features, y in batches(*args)(0):
            yield features, y
            signal.raise_signal(signal.SIGINT)
    batches = probe.fresh_batches
    monkeypatch.setattr(probe, "fresh_batches", lambda *args: lambda epoch: interrupted(*args))
    assert "stopped" in script("probe.py", *sampled, expect=130)
    assert {p.name for p in sampled[0].parent.iterdir()} == {"run"}


@pytest.mark.parametrize("name", ["sample.py", "probe.py"])
def test_a_truncated_or_foreign_checkpoint_ends_in_one_sentence_too(name, finished, tmp_path):
    (tmp_path / "cut.pt").write_bytes((finished[0] / "model.pt").read_bytes()[:5000])
    torch.save({"weight": torch.ones(2)}, tmp_path / "foreign.pt")
    for file in ("cut.pt", "foreign.pt"):
        assert file in script(name, tmp_path / file, expect=2)


def test_a_run_that_is_there_is_not_overwritten(photos, finished):
    before = (finished[0] / "model.pt").read_bytes()
    for more, words in (((), "--resume"), (("--resume", "--batch-size", 16), "--batch-size 8, not 16")):
        assert words in script("train.py", *flags(photos, finished[0], "--labels", *more), expect=2)
    assert (finished[0] / "model.pt").read_bytes() == before


def test_a_run_of_another_optimizer_is_refused_in_a_sentence(tmp_path):
    weights = {"w": torch.nn.Parameter(torch.ones(2))}
    model, sgd = torch.nn.ParameterDict(weights), torch.optim.SGD(weights.values())
    cfg, recipe = train.Config(out_dir=str(tmp_path)), dict(unified.MAGE_RECIPE, lr=1.0)
    adam, one_group = train.adamw(weights, recipe), torch.optim.AdamW(weights.values())
    for kept, others in ((sgd, (adam, one_group)), (one_group, (sgd,))):        # as many groups, or not
        train.save_checkpoint(tmp_path / "model.pt", {"model": model.state_dict(), "step": 3, "ema": {},
                                                      "optimizer": kept.state_dict()})
        for other in others:
            with pytest.raises(unified.UserError, match="another optimizer.* start another|this method's"):
                train.restore(cfg, "model", model, other, {})
        assert train.restore(cfg, "model", model, kept, {}) == 3


def with_amsgrad(optimizer):
    for group in optimizer.param_groups:
        group["amsgrad"] = True
    return optimizer


class OtherAdamW(torch.optim.AdamW):
    """One with the same options, whose state may mean something else."""


@pytest.mark.parametrize("make, told", [
    (lambda w, r: torch.optim.Adam(w.values(), fused=True), "class Adam and not AdamW"),
    (lambda w, r: OtherAdamW(w.values()), "class OtherAdamW"),
    (lambda w, r: torch.optim.RAdam(w.values()), "class RAdam"),
    (lambda w, r: with_amsgrad(train.adamw(w, r)), r"amsgrad \[True, True\] and not \[False, False\]"),
    (lambda w, r: train.adamw(w, {**r, "no_decay": lambda name, p: True}), r"number of weights \[2, 0\]")])
def test_a_resumed_run_says_what_its_optimizer_was_and_is(make, told, tmp_path):
    model = torch.nn.Linear(2, 2)
    weights, recipe = dict(model.named_parameters()), dict(unified.MAGE_RECIPE, lr=1e-3)
    cfg, now = train.Config(out_dir=str(tmp_path)), train.adamw(weights, recipe)
    for then in (make(weights, recipe), train.adamw(weights, dict(recipe, lr=7.0, weight_decay=0.3))):
        model(torch.ones(1, 2)).sum().backward()
        then.step()
        train.save_checkpoint(tmp_path / "model.pt", {
            "model": model.state_dict(), "step": 3, "ema": {}, "optimizer": train.state_of(then)})
        if type(then) is not torch.optim.AdamW or then.param_groups[0]["lr"] < 7:
            assert_refused(told + ".* start another run", train.restore, cfg, "model", model, now, {})
    assert train.restore(cfg, "model", model, now, {}) == 3
    assert [group["weight_decay"] for group in now.param_groups] == [0.0, 0.3]              # as it was saved
    train.update(now, weights, {}, dict(recipe, steps=5, grad_clip=1.0), 3)
    assert_refused("averages of 0 weights, not of 2", train.restore, cfg, "model", model, now, dict(weights))


@pytest.mark.parametrize("then, now", [(True, None), (None, True)])
def test_a_run_goes_on_with_the_kernels_of_the_optimizer_at_hand(then, now, tmp_path):
    model = torch.nn.Linear(2, 2)
    weights, recipe = dict(model.named_parameters()), dict(unified.MAGE_RECIPE, lr=0.1, steps=5)
    first, again = (train.adamw(weights, recipe, fused=fused) for fused in (then, now))
    for optimizer in (first, again):
        before = model.weight.detach().clone()
        model(torch.ones(1, 2)).sum().backward()
        train.update(optimizer, weights, {}, recipe, 3)
        assert not model.weight.equal(before)
        train.save_checkpoint(tmp_path / "model.pt", {
            "model": model.state_dict(), "step": 3, "ema": {}, "optimizer": train.state_of(first)})
        train.restore(train.Config(out_dir=str(tmp_path)), "model", model, again, {})
        assert again.param_groups[0]["fused"] is now


def test_a_run_that_stopped_early_says_so_wherever_it_is_loaded(finished, tmp_path, capsys):
    unified.load_model(finished[0])
    assert "stopped" not in capsys.readouterr().out
    torch.save({**unified.load_checkpoint(finished[0] / "model.pt"), "step": 4}, tmp_path / "model.pt")
    unified.load_model(tmp_path)
    assert "training stopped at step 4 of 6" in capsys.readouterr().out


@pytest.fixture
def report_of(finished, tmp_path, monkeypatch):
    """Prints the report on a copy of a run, with these images, or so many, and so many codes used."""
    model, config = unified.load_model(finished[0])
    cfg = train.Config(**{k: v for k, v in config.items() if k in vars(train.Config())})
    cfg.out_dir = str(shutil.copytree(finished[0], tmp_path / "run"))
    monkeypatch.setattr(train, "draw_images", lambda *_, **__: None)

    def report(data, codes_used=1.0):
        monkeypatch.setattr(train, "measure_tokenizer",
                            lambda *_: ({"psnr": 30.0, "codes_used": codes_used}, 20.0))
        if isinstance(data, int):
            images = torch.zeros(data, 3, 32, 32, dtype=torch.uint8)
            data = probe.ImageTensor(images, torch.arange(data), [], (1, 1))
        train.report(cfg, model, {}, data, data)
        return model
    return report


@pytest.mark.parametrize("untrained, n, told", [
    (0.5, 2000, ""), (0.5, 9, "the difference is within chance"), (0.7, 9, "the difference is within chance"),
    (0.7, 2000, "training harmed the features")])
def test_features_that_training_has_not_surely_made_better_are_told_of(untrained, n, told, report_of,
                                                                       monkeypatch, capsys):
    top1 = {"features": 0.6, "the same network untrained": untrained, "raw pixels": 0.1}
    monkeypatch.setattr(train, "probe_features", lambda *_: top1)
    monkeypatch.setattr(probe, "no_probe", lambda *_: "")
    model, printed = report_of(n), capsys.readouterr().out
    line = f"the network has {untrained:.1%} untrained, 60.0% trained: {told}"
    assert line in printed if told else "the network has" not in printed
    assert f"features of mage: layer {model.best_layer}, t 0, mean" in printed


def test_pipes_links_in_circles_and_runs_in_a_folder_of_images_are_passed_by(tmp_path):
    make_images(tmp_path, [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(12)])
    os.mkfifo(tmp_path / "cat/pipe")
    (tmp_path / "cat/me").symlink_to(tmp_path / "cat/me")
    (tmp_path / "cat/see-dog").symlink_to(tmp_path / "dog")
    (tmp_path / "dog/see-cat").symlink_to(tmp_path / "cat")
    make_images(tmp_path, ["dog/out/run/samples.png"])
    (tmp_path / "dog/out/run/log.jsonl").touch()
    files = [p.relative_to(tmp_path).as_posix() for p in probe.image_files(tmp_path, [])]
    assert len(files) == 48 and {f.rpartition("/")[0] for f in files} == {"cat", "dog", "cat/see-dog",
                                                                        "dog/see-cat"}


@pytest.mark.parametrize("given, steps", [({"steps": 7, "epochs": 3}, 7), ({}, 0),
                                          ({"epochs": 1.5, "images": 10, "batch_size": 4}, 4)])
def test_a_run_knows_its_steps(given, steps):
    assert unified.steps_of(given) == steps


def test_a_run_is_named_by_its_folder_or_its_file():
    names = [probe.name_of(run) for run in ("out/a", "out/a/model.pt", "out/a_model.pt", "mage.pth")]
    assert names == ["a", "a", "a_model.pt", "mage.pth"]


def test_a_run_goes_on_with_the_tokenizer_that_it_began_with(photos, finished, tmp_path):
    """The run that lent it has another one meanwhile. And one that was lent before its end is told of."""
    lender, run = shutil.copytree(finished[0], tmp_path / "lender"), tmp_path / "run"
    state = unified.load_checkpoint(lender / "tokenizer.pt")
    torch.save(state | {"step": 1}, lender / "tokenizer.pt")
    printed = script("train.py", *flags(photos, run, "--tokenizer", lender, "--no-report"))
    assert "tokenizer.pt: training stopped at step 1 of 3" in printed and "then the report" not in printed
    own, other = unified.load_model(run)[0].vqgan.state_dict(), state["model"]
    torch.save(state | {"model": {k: v + 0.1 * v.isfinite() for k, v in other.items()}},
               lender / "tokenizer.pt")
    cfg = train.settings(train.Config(**train.resumed({"resume": str(run), "steps": 8, "device": "cpu"})))
    data = probe.open_data(str(photos), "", 32, True)
    frozen, arch = train.get_tokenizer(cfg, data, data)
    assert not frozen.encoder.conv_in.weight.equal(own["encoder.conv_in.weight"])
    model, _ = train.build_model(cfg, frozen, arch, data)
    assert all(v.equal(own[k]) for k, v in model.vqgan.state_dict().items())


@pytest.mark.parametrize("seconds, words", [(33.4, "33 s"), (59.6, "1 min 00 s"), (3984, "1 h 06 min"),
                                            (100_000, "27 h 46 min")])
def test_a_duration_has_units(seconds, words):
    assert train.in_words(seconds) == words


@pytest.mark.parametrize("given, idle", [
    ({"model": "umd", "tokenizer_steps": 3}, "--tokenizer-steps"), ({"tokenizer_steps": 3}, ""),
    ({"tokenizer": "out/a", "codes": 9, "adversarial": 0.5}, "--adversarial, --codes"),
    ({"model": "umd", "ids": 16}, ""), ({"model": "adm", "ids": 9}, "--ids")])
def test_flags_of_a_tokenizer_that_is_not_trained_are_named(given, idle):
    line = train.idle_flags(train.Config(**given), given.keys())
    assert line == (f"no tokenizer is trained here, so this does nothing: {idle}" if idle else "")


@pytest.mark.parametrize("given, advice", [
    ({"tokenizer_steps": 300}, "--tokenizer-steps than 300 (2000 are usual)"),
    ({"tokenizer_steps": 2500}, "--tokenizer-steps than 2500"),
    ({"predictor": "out/a", "tokenizer": "out/a"}, "take another --predictor"),
    ({"init": "out/a"}, "take another --init"), ({"tokenizer": "out/a"}, "take another --tokenizer")])
def test_a_poor_tokenizer_is_mended_where_it_comes_from(given, advice):
    assert train.better_tokenizer(train.Config(**given)).endswith(advice)


@pytest.mark.parametrize("count, told", [(1, True), (2, False)])
def test_codes_that_so_few_images_cannot_use_are_no_fault_of_the_tokenizer(count, told, report_of, capsys):
    report_of(count, codes_used=0.06)                                   # 16 ids an image, of 32 codes
    printed = capsys.readouterr().out
    assert ("(16 tokens can use 50%)" in printed) == told
    assert ("has learned little" in printed) != told


def test_resume_needs_the_run_alone_and_names_all_flags_that_contradict_it(photos, finished, tmp_path):
    run = shutil.copytree(finished[0], tmp_path / "copy")
    wrong = script("train.py", "--resume", run, "--codes", 64, "--batch-size", 16, "--dataset", "shapes",
                   expect=2)
    for words in ("--codes 32, not 64", "--batch-size 8, not 16", f"--dataset {photos}, not shapes"):
        assert words in wrong                                           # shapes is the default
    assert "no checkpoint is there" in script("train.py", "--resume", tmp_path / "none", expect=2)
    for name, call in (("train.py", ["--resume"]), ("sample.py", []), ("probe.py", [])):
        assert f"did you mean {run}?" in script(name, *call, tmp_path / "cpoy", expect=2)
    stopped = tmp_path / "stopped"                                      # between tokenizer and model
    stopped.mkdir()
    shutil.copy(run / "tokenizer.pt", stopped)
    assert f"train.py --resume {stopped} goes on" in script("sample.py", stopped, expect=2)
    (run / "model.pt").rename(run / "model.pt.prev")                    # killed between two renames
    printed = script("train.py", "--resume", run, "--steps", 8, "--no-report", "--device", "cpu")
    assert "model: 8 of 8 steps" in printed and "linear probe" not in printed
    config = unified.load_checkpoint(run / "model.pt")["config"]
    assert config["steps"] == 8 and config["labels"] and config["codes"] == 32
    assert config["out_dir"] == str(run)


@pytest.mark.parametrize("device, dataset, size, expected", [
    ("cpu", "photos", None, ("tiny", 64)), ("cuda", "photos", None, ("small", 64)),
    ("cpu", "photos", "base", ("base", 256)), ("cpu", "imagenet", None, ("base", 256)),
    ("cpu", "imagenet", "tiny", ("tiny", 64)), ("cpu", "shapes", None, ("tiny", 32))])
def test_folders_get_what_a_device_can_bear_and_imagenet_the_papers_recipe(device, dataset, size, expected):
    cfg = train.Config(dataset=dataset, size=size, device=device)
    values = train.defaults(cfg)
    assert (cfg.size or values["size"], values["image_size"]) == expected
    assert ("epochs" in values) == (expected[1] == 256) and values["tokenizer_steps"] <= 10**6


def help_of(name):
    """{flag: what -h says of it}, {group: its flags}, and all of it in one line."""
    said = script(name, "-h")
    body = said.split("\nexamples:")[0]
    flags = {words.split()[0]: " ".join(words.split()) for words in re.split(r"\n  (?=--)", body)[1:]}
    groups = dict(re.findall(r"(?m)^([a-z ]+):\n((?:  .*\n)+)", body + "\n"))
    return flags, groups, " ".join(said.split())


@pytest.mark.parametrize("table", ["SHAPES", "CIFAR10", "SMALL_FOLDER", "FOLDER"])
def test_help_tells_every_default_that_depends_on_the_data_set(table):
    said = help_of("train.py")[0]
    tables = [getattr(train, table)] + [method.recipe["tiny"] for method in unified.MODELS.values()]
    for values in tables:
        for name, value in values.items():
            flag = "--" + name.replace("_", "-")
            if flag in said and value is not None:
                assert re.search(rf"\b{value}\b", said[flag].split("[", 1)[1]), (flag, value, said[flag])
    missing = [flag for flag, text in said.items() if " INT" in text and "[" not in text]
    assert missing == []


@pytest.mark.parametrize("args, ids", [
    (dict(dataset="photos"), 256), (dict(dataset="photos", size="small"), 64), (dict(), 64),
    (dict(dataset="photos", image_size=128), 256), (dict(dataset="imagenet"), 256),
    (dict(dataset="photos", model="mage"), 64), (dict(dataset="photos", model="adm"), 64)])
def test_64_patches_become_256_where_a_token_could_not_carry_their_values(args, ids):
    assert train.defaults(train.Config(**{"device": "cpu", "model": "umd", **args}))["ids"] == ids


@pytest.mark.parametrize("ids, told", [(16, True), (64, False)])
def test_patches_whose_noise_cannot_pass_are_told_of(ids, told, tmp_path):
    said = script("train.py", "--model", "umd", "--ids", ids, "--steps", 1, "--batch-size", 4, "--no-report",
                  "--eval-every", 0, "--device", "cpu", "--out-dir", tmp_path / "run")
    assert ("samples will stay noisy: a patch has 192 values" in said) == told


NO_SHAPES = {"views": "cifar10 and folders 4", "codes": "else 1024", "steps": "cifar10 and folders 4000",
             "tokenizer_steps": "cifar10 and folders 4500", "ids": "else 64"}


@pytest.mark.parametrize("more, told", [
    ({}, {"size": "tiny", "image_size": "32", "ids": "shapes 16", "views": "shapes 1", "codes": "shapes 128",
          "tokenizer_steps": "shapes 2000", "tokenizer_batch_size": "16", "adversarial": "else 0",
          "steps": "shapes 3000", "batch_size": "64", "lr": "0.006", "log_every": "50", "eval_every": "1000",
          "save_every": "500"}),
    ({"dataset": "cifar10"}, {"size": "tiny", "image_size": "32", **NO_SHAPES}),
    ({"dataset": "photos"}, {"size": "tiny", "image_size": "folders 64", **NO_SHAPES}),
    ({"dataset": "photos", "device": "cuda"}, {"size": "folders small", "tokenizer_batch_size": "16"}),
    ({"dataset": "imagenet"}, {"size": "imagenet base", "image_size": "as published 256",
                               "views": "as published 10", "log_every": "as published 20",
                               "adversarial": "0.8", "tokenizer_steps": "as published 1000000",
                               "tokenizer_batch_size": "16"}),
    ({"dataset": "imagenet", "size": "tiny"}, {"tokenizer_batch_size": "16"}),
    ({"dataset": "imagenet", "device": "cuda"}, {"tokenizer_batch_size": "as published 256"}),
    ({"model": "adm"}, {"steps": "tiny adm 2000", "batch_size": "dit and adm 32", "views": "shapes 0"}),
    ({"model": "dit"}, {"steps": "maskdit and dit 3000", "batch_size": "dit and adm 32",
                        "ids": "of pixels 64", "lr": "maskdit and dit 0.018"}),
    ({"model": "dit", "dataset": "cifar10"}, {"steps": "maskdit and dit 3000", "views": "else 1"})])
def test_a_default_that_help_tells_is_the_one_that_is_taken(more, told):
    taken = train.defaults(train.Config(**{"device": "cpu", **more}))
    texts = {field.name: field.metadata["help"] for field in dataclasses.fields(train.Config)}
    for name, words in told.items():
        assert re.search(rf"(\[|[;,] |and ){words}\b", texts[name]), (name, words)
        assert words.split()[-1] == str(taken[name]).removesuffix(".0"), (name, words)
    if not more:                                                        # a new default is told, too
        assert told.keys() == taken.keys() & texts.keys() - {"compile"}
    asked = train.Config(**{**more, "device": "cpu"}, tokenizer_batch_size=8)
    assert train.settings(asked).tokenizer_batch_size == 8


@pytest.mark.parametrize("name, titles, twins", [
    ("train.py", {"data", "model", "tokenizer", "optimisation", "run and log", "hardware"},
     {"--compile", "--strict-images"}),
    ("sample.py", {"what is generated", "images of your own", "how", "where to", "hardware"}, set()),
    ("probe.py", {"what is read", "data", "single heads", "training of a head", "weights", "hardware"},
     {"--compile", "--strict-images"})])
def test_help_has_groups_examples_units_and_no_twin_without_a_meaning(name, titles, twins):
    flags, groups, said = help_of(name)
    assert titles <= groups.keys() and all(groups.values()) and f"examples: python {name}" in said
    assert {flag.strip(",") for flag, words in flags.items() if ", --no-" in words} == twins
    for flag, words in flags.items():
        assert flag.strip("-").replace("-", "_").upper() not in words.split()      # a unit, no name


def test_before_the_first_step_a_line_says_what_is_trained_on_what_and_how_long(finished):
    _, printed = finished
    assert "48 images of 2 classes to train on, 16 to test on" in printed and "48 images are few" in printed
    assert "\n32 pixels; tokenizer: 3 steps; mage tiny: 6 steps of 8 images\n" in printed
    assert "16 test images are few: one is 6.2% of an accuracy" in printed
    lines = [line for line in printed.splitlines() if line.startswith("model: ")]
    assert [line.split(",")[0] for line in lines] == [f"model: {k} of 6 steps" for k in (0, 2, 4, 6)]
    assert all("loss=" in line and "left" in line for line in lines[1:]) and "\r" not in printed


# ------------------------------------------------------------------------------------------------------------
# The command line: refused in a sentence, before any work


class Begun(Exception):
    """What a script would take its time with has begun."""


def attempt(name, *args):
    """None if the script begins, or does as it was asked; else the one sentence that it ends with."""
    try:
        last = script(name, *args, expect=(0, 2)).splitlines()[-1]
    except Begun:
        return None
    return last if last.startswith(f"{name}: ") else None


def begin(*args, **kwargs):
    raise Begun


def fields(name, *kinds):
    """The options of a script that are of these types, as a user types them; not those of a few words."""
    config = importlib.import_module(name.removesuffix(".py")).Config
    return ["--" + field.name.replace("_", "-") for field in dataclasses.fields(config)
            if field.type in kinds and not {"choices", "positional"} & field.metadata.keys()]


@pytest.fixture
def words(photos, finished, tmp_path, monkeypatch):
    """{script: what makes it begin}; nothing is trained, sampled or probed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe, "open_data", begin)
    monkeypatch.setattr(unified.MAGE, "sample_steps",
                        functools.wraps(unified.MAGE.sample_steps)(lambda *_, **__: begin()))
    load, there = unified.load_model, unified.load_model(finished[0])   # once, since it takes longest
    monkeypatch.setattr(unified, "load_model",
                        lambda path, *a, **k: there if path == str(finished[0]) else load(path, *a, **k))
    return {"train.py": flags(photos, tmp_path / "new"),
            "sample.py": (finished[0], "--device", "cpu", "--n", 2, "--steps", 1),
            "probe.py": (finished[0], "--device", "cpu", "--workers", 0)}


SCRIPTS = ["train.py", "sample.py", "probe.py"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_number_out_of_range_is_refused_whatever_the_flag(name, words, monkeypatch):
    assert attempt(name, *words[name]) is None
    loads = []
    monkeypatch.setattr(unified, "load_model", lambda *args, **more: loads.append(args) or begin())
    for flag in fields(name, int, float):
        for value in ("nan", "inf", -1, 10**30):
            sentence = attempt(name, *words[name], flag, value)
            assert sentence and flag in sentence and not loads, (flag, value, sentence)
        sentence = attempt(name, *words[name], flag, 0)                 # may mean something
        assert sentence is None or flag in sentence or "say the same thing twice" in sentence
        loads.clear()


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_word_makes_a_traceback_whatever_the_flag(name, words, tmp_path):
    (tmp_path / "file").write_text("hello")
    (tmp_path / "folder").mkdir()
    for flag in fields(name, str):
        for value in ("file", "folder", "file/below", "no/where", "x" * 300, "nan", "-1", "9" * 5000, "²"):
            attempt(name, *words[name], f"{flag}={value}")
        if name == "sample.py":
            for more in (["--image", value, "--box", "1,1,9,9"], ["--image", "file", "--mask", value]):
                attempt(name, *words[name], *more)
    assert (tmp_path / "file").read_text() == "hello"


@pytest.mark.parametrize("flag, value", [
    ("--hidden", "0"), ("--hidden", "512,-1"), ("--hidden", "9" * 30), ("--t", "nan"), ("--layers", "-1"),
    ("--pool", "²"), ("--pool", "9" * 5000), ("--feedback", "99")])
def test_numbers_inside_words_are_checked_before_any_work(flag, value, words):
    head = {"--hidden": "mlp", "--feedback": "diffeed"}.get(flag, "ridge")
    assert flag in attempt("probe.py", *words["probe.py"], "--head", head, flag, value)


@pytest.mark.parametrize("flag, value", [
    *(("--out", value) for value in ("grid", "grid.gif", "grid.xyz", "folder", "folder.png", "no/grid.png",
                                     "file/grid.png", "g" * 300 + ".png")),
    *(("--npz", value) for value in ("folder", "grid.png", "grid.gif", "no/x.npz")),
    *(("--png-dir", value) for value in ("file", "file/below", "."))])
def test_what_cannot_be_written_is_refused_before_weights_are_read(flag, value, words, tmp_path, monkeypatch):
    for name in ("folder", "folder.png"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("hello")
    monkeypatch.setattr(unified, "load_model", begin)
    before = sorted(tmp_path.iterdir())
    assert attempt("sample.py", *words["sample.py"], "--out", "grid.png", "--gif") is None
    assert value in attempt("sample.py", *words["sample.py"], "--out", "grid.png", "--gif", flag, value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name, more", [
    ("sample.py", ("--out", "closed/a.png")), ("sample.py", ("--png-dir", "closed/a")),
    ("train.py", ("--out-dir", "closed/a")), ("train.py", ("--out-dir", "file")),
    ("train.py", ("--init", "nowhere")), ("train.py", ("--tokenizer", "no/where"))])
def test_a_place_that_is_closed_or_not_there_is_refused_at_once(name, more, words, tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "file").write_text("hello")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "closed" not in str(path) and access(path, mode))
    assert more[0] in attempt(name, *words[name], *more)


def test_results_of_a_read_only_run_go_to_the_current_folder(finished, diffused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    closed = [finished[0], diffused[0]]
    monkeypatch.setattr(os, "access", lambda path, mode: pathlib.Path(path) not in closed)
    assert "wrote samples-7.png" in script("sample.py", finished[0], "--n", 1, "--steps", 1, "--seed", 7)
    assert "appended to probe.jsonl" in script("probe.py", diffused[0], "--workers", 0, "--head", "knn")
    assert {p.name for p in tmp_path.iterdir()} == {"samples-7.png", "probe.jsonl"}
    closed.append(pathlib.Path())
    for name in ("sample.py", "probe.py"):
        assert "start this in a folder of your own" in script(name, finished[0], expect=2)


def test_more_steps_than_timesteps_or_ids_are_said_to_gain_nothing(finished, finished_adm, tmp_path):
    for run, steps, words in ((finished[0], 17, "16 ids only"), (finished_adm, 101, "100 timesteps only")):
        asked = (run, "--n", 1, "--out", tmp_path / "a.png", "--overwrite", "--steps")
        assert script("sample.py", *asked, steps).count(words) == 1
        assert "only" not in script("sample.py", *asked, steps - 1)


ONE_OF_EACH_SIZE = {(method.tokens, str(method.sizes)): name for name, method in unified.MODELS.items()
                    if not method.predictor}


@pytest.mark.parametrize("model", ONE_OF_EACH_SIZE.values())
def test_every_image_size_is_built_or_refused_in_a_sentence_that_helps(model):
    for size in {"tiny", "small", "base"} & METHODS[model].sizes.keys():
        for side in range(8, 601):
            try:
                cfg = train.settings(train.Config(model=model, size=size, image_size=side, device="cpu"))
            except unified.UserError as error:
                assert f"--image-size {side} " in str(error) and ("--ids" in str(error)) == (model != "adm")
                remedy = str(error).split("take ")[1].split(" or ")[0].split()
                remedy = remedy if model != "adm" else ["--image-size", *remedy]
                remedy = dict(zip(remedy[::2], remedy[1::2]))
                side, ids = int(remedy.get("--image-size", side)), int(remedy.get("--ids", 0)) or None
                train.settings(train.Config(model=model, size=size, image_size=side, ids=ids, device="cpu"))
                continue
            if side < 40 or side % 128 == 0:
                grid = math.isqrt(cfg.ids)
                with torch.device("meta"):
                    ids = METHODS[model].tokenizer and unified.tokenizer_config("toy", side // grid)
                    unified.build(unified.model_config(model, size, side, grid, ids))
    for side, ids in ((256, 256), (512, 1024)):
        assert train.settings(train.Config(model=model, image_size=side, device="cpu")).ids == ids


def test_pngs_are_continued_only_by_what_made_them(finished, diffused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, made = tmp_path / "flat", iter(range(100))

    def ask(*more, run=finished[0], expect=0):
        asked = ("--n", 3, "--steps", 2, "--png-dir", folder, "--out", f"{next(made)}.png", *more)
        return script("sample.py", run, *asked, expect=expect)
    ask()
    whole = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert sorted(whole) == ["000000.png", "000001.png", "000002.png", "made-by.json"]
    (folder / "000001.png").unlink()
    ask()                                                               # the same again completes it
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == whole
    assert "schedule" not in json.loads(whole["made-by.json"])          # as in sets begun before it could be
    others = ("--seed", 1), ("--temperature", 1), ("--steps", 1), ("--label", "cat"), ("--schedule", "linear")
    for more in others:
        assert "--overwrite" in ask(*more, expect=2)
    assert "--overwrite" in ask(run=diffused[0], expect=2)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == whole
    ask("--seed", 1, "--overwrite", "--n", 2)                           # nothing of the other seed stays
    assert sorted(p.name for p in folder.iterdir()) == ["000000.png", "000001.png", "made-by.json"]
    (folder / "made-by.json").unlink()
    assert "--overwrite" in ask("--seed", 1, "--n", 2, expect=2)        # images of unknown origin


def test_the_command_that_began_a_set_of_pngs_goes_on_with_it_typed_again(finished, tmp_path):
    command = ("sample.py", finished[0], "--n", 3, "--steps", 2, "--png-dir", tmp_path / "set", "--out",
               tmp_path / "sheet.png", "--gif")
    script(*command)
    whole = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    (tmp_path / "set" / "000001.png").unlink()
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "sheet.png")           # of another command since
    script(*command, "--order", "confidence", "--schedule", "cosine")   # the usual ones
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == whole
    assert "which deletes those" in script(*command, "--seed", 1, expect=2)
    for path in (tmp_path / "set").glob("*.png"):
        path.unlink()                                                   # begun, but none is finished
    assert "which deletes those" in script(*command, "--seed", 1, expect=2)


def test_two_commands_may_fill_one_folder_of_pngs(tmp_path):
    fill = ("import numpy, pathlib, sample\n"
            "batches = (([i], numpy.full((1, 8, 8, 3), i % 256, 'uint8')) for i in range(1500))\n"
            f"sample.write_pngs(pathlib.Path({str(tmp_path)!r}), ((numpy.array(i), x) for i, x in batches))")
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda folder: python(folder, "-c", fill), folders))
    for i, path in enumerate(sorted(tmp_path.glob("*.png"))):
        assert path.name == f"{i:06d}.png" and (numpy.array(PIL.Image.open(path)) == i % 256).all()
    assert i == 1499 and not list(tmp_path.glob("*.tmp"))


def test_sampling_says_which_options_change_nothing(finished, tmp_path):
    outs = (tmp_path / f"{i}.png" for i in itertools.count())

    def said(*more):
        return script("sample.py", finished[0], "--n", 1, "--out", next(outs), *more)
    L = unified.load_model(finished[0])[0].length
    assert f"--schedule linear changes nothing in {L} steps" in said("--steps", L, "--schedule", "linear")
    assert "--schedule" not in said("--steps", L // 2, "--schedule", "linear")
    assert "--temperature changes nothing in a single step" in said("--steps", 1, "--temperature", 9)
    guided = ("--steps", 4, "--guide", finished[0], "--guidance", 2, "--guidance-interval")
    printed = said(*guided, "0.3,0.31")
    assert "is shorter than one of 4 steps" in printed and "and changes nothing" in printed
    assert "is shorter than one" not in said(*guided, "0.3,0.6")


def test_an_option_that_a_fork_adds_tells_sets_of_images_apart(monkeypatch):
    monkeypatch.setattr(sample, "OPTIONS", (*sample.OPTIONS, "churn"))
    model, config = unified.UMD(16, 4, 32, 1, 2, 1, 0.5, 0.75, 0.375), {"arch": {}}
    cfg = vars(sample.Config(run="run"))
    notes = [sample.made_by(model, config, types.SimpleNamespace(**cfg, churn=churn))
             for churn in (None, 1, 2)]
    assert notes[0] != notes[1] != notes[2] and "churn" not in notes[0]


def test_heads_and_order_belong_to_published_files_of_adm(finished, finished_adm):
    for run in (finished[0], finished_adm):
        for name in ("sample.py", "probe.py"):
            assert "leave --adm-... out" in script(name, run, "--adm-heads", 4, expect=2)


def test_a_mask_says_what_a_box_says_and_is_cropped_like_the_image(photos, finished, tmp_path):
    files = sorted((photos / "val" / "cat").iterdir())[:2]              # 40 x 40, of which 36 are read, as 32
    small, large = numpy.zeros((32, 32), numpy.uint8), numpy.zeros((40, 40), numpy.uint8)
    small[4:12, 8:20] = large[:20] = 255
    for name, mask in (("small", small), ("large", large), ("none", 0 * small)):
        PIL.Image.fromarray(mask).save(tmp_path / f"{name}.png")

    def inpaint(out, *more, expect=0):
        asked = ("--image", *files, *more, "--n", 1, "--steps", 2, "--out", tmp_path / f"{out}.png")
        printed = script("sample.py", finished[0], *asked, expect=expect)
        return printed if expect else numpy.array(PIL.Image.open(tmp_path / f"{out}.png"))
    masks = [tmp_path / f"{name}.png" for name in ("small", "large", "none")]
    for more in ([], ["--outside"]):
        one = inpaint("a" + "".join(more), "--mask", masks[0], *more)
        assert (one == inpaint("b" + "".join(more), "--box", "8,4,20,12", *more)).all()
    assert (inpaint("c", "--mask", *masks[:2]) == inpaint("d", "--box", "8,4,20,12", "0,0,32,16")).all()
    assert "nothing to inpaint" in inpaint("e", "--mask", masks[2], expect=2)
    assert "nothing to inpaint" in inpaint("e", "--box", "0,0,32,32", "--outside", expect=2)
    assert "either --box" in inpaint("e", "--mask", masks[0], "--box", "8,4,20,12", expect=2)
    assert "3 masks or boxes for 2" in inpaint("e", "--mask", *masks, expect=2)


def test_a_mask_of_any_size_lies_where_it_lies_on_its_image(tmp_path):
    strokes = numpy.zeros((64, 96), numpy.uint8)
    strokes[10:30, 20:70] = 255
    image, mask = tmp_path / "image.png", PIL.Image.fromarray(strokes)
    PIL.Image.new("RGB", (96, 64)).save(image)
    found = []
    for width, height in ((96, 64), (192, 128), (48, 32)):
        mask.resize((width, height), PIL.Image.Resampling.NEAREST).save(tmp_path / "mask.png")
        found.append(sample.read_mask(tmp_path / "mask.png", image, 32))
    see_through = PIL.Image.new("RGBA", (96, 64), (255, 255, 255, 0))   # white strokes on nothing
    see_through.putalpha(mask)
    see_through.save(tmp_path / "mask.png")
    assert all(m.equal(found[0]) for m in (*found, sample.read_mask(tmp_path / "mask.png", image, 32)))
    assert 0 < found[0].sum() < 32 * 32
    mask.resize((64, 64)).save(tmp_path / "mask.png")
    with pytest.raises(unified.UserError, match="64 x 64 pixels and .* 96 x 64; give it the image's shape"):
        sample.read_mask(tmp_path / "mask.png", image, 32)


class Terminal(io.StringIO):
    """What a script prints into, as if someone watched."""

    def isatty(self):
        return True


def test_progress_counts_steps(photos, finished, diffused, tmp_path, monkeypatch):
    bars, new_bar = [], probe.progress_bar
    monkeypatch.setattr(sample, "progress_bar", lambda *args: bars.append(new_bar(*args)) or bars[-1])
    monkeypatch.setattr(io, "StringIO", Terminal)
    file = next((photos / "val" / "cat").iterdir())
    asked = ("--n", 5, "--batch", 2, "--steps", 4, "--out", tmp_path / "a.png", "--overwrite")
    inpainting = ("--image", file, "--box", "4,4,12,12")
    for run, more, steps in ((finished[0], (), 12), (finished[0], inpainting, 12), (diffused[0], (), 15)):
        printed = script("sample.py", run, *asked, *more)
        assert bars[-1].n == bars[-1].total == steps
        assert f"0/{steps}" in printed and "steps" in printed, printed


def test_where_there_is_no_terminal_a_bar_is_a_line_now_and_then(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    for title, steps in (("features", 100), ("short", 20), (None, 100)):
        with probe.progress_bar(steps, title, "batches") as bar:
            for _ in range(steps):
                now[0] += 1
                bar.update()
    said = capsys.readouterr().err
    assert said == "".join(f"features: {n} of 100 batches, {left} left\n"
                           for n, left in ((30, "01:10"), (60, "00:40"), (90, "00:10")))


def test_bars_vanish_and_without_a_terminal_there_are_none(finished, tmp_path, monkeypatch):
    def printed():
        asked = ("--n", 2, "--steps", 2, "--out", tmp_path / "a.png", "--overwrite")
        return script("sample.py", finished[0], *asked) + script("probe.py", finished[0], "--workers", 0)
    assert "\r" not in printed()
    monkeypatch.setattr(io, "StringIO", Terminal)
    seen = printed()
    assert seen.count("steps/s") > 0 < seen.count("training set:")
    assert not any("%|" in line.split("\r")[-1] for line in seen.split("\n"))


# ------------------------------------------------------------------------------------------------------------
# Several processes


def train_together(folder, micro, contrastive):
    """Twenty optimizer steps of 16 images as one of several processes; leaves losses, first gradients and
    parameters in folder/WORLD.pt."""
    unified.join_processes("cpu")
    rank, world = unified.rank_and_world()
    (folder / str(world)).mkdir(exist_ok=True)
    model = mage(kind=unified.ContrastiveMAGE if contrastive else unified.MAGE, dropout=0.0).train()
    views = 2 if contrastive else 1
    data = torch.randint(model.codes, (20, 16, views, model.length),
                         generator=torch.Generator().manual_seed(1))
    noise = some_noise(20, 16 * views, model.length)

    def draws(step, first):  # given, since a micro-batch of 16 draws other numbers than two of 8
        return dict(mask_ratio=torch.tensor(0.6),
                    mask_noise=noise[step, first * views:(first + micro) * views]) if contrastive else {}

    def batches(plan):
        places = ((step, first) for step in range(20) for first in range(rank * micro, 16, world * micro))
        labels = torch.zeros(micro, dtype=torch.long)
        return ((data[step, first:first + micro], labels) for step, first in places)
    first = {}

    def optimizer(weights, recipe):
        def keep_first(*_):
            if not first:
                first.update({k: p.grad.clone() for k, p in weights.items()})
        adamw = train.adamw(weights, recipe)
        adamw.register_step_pre_hook(keep_first)
        return adamw
    recipe = dict(batch_size=16, micro_batch=micro, optimizer=optimizer)
    rows = trained(folder / str(world), model, recipe, batches, 20, data=image_set(16, 8), forward_args=draws)
    if rank == 0:
        losses = torch.tensor([row["loss"] for row in rows])
        torch.save((losses, first, {k: p.detach() for k, p in train.trainable(model).items()}),
                   folder / f"{world}.pt")
    unified.leave_processes()


def without_keys(name, p):
    """Attention does not change when all keys shift alike, so the gradient of their bias is nothing but
    rounding, which AdamW enlarges."""
    return torch.cat([p.chunk(3)[0], p.chunk(3)[2]]) if name.endswith("qkv.bias") else p


@pytest.mark.parametrize("contrastive, alone, losses_agree", [(False, 8, 1e-5), (True, 16, 1e-4)])
def test_two_processes_train_as_one_does(contrastive, alone, losses_agree, tmp_path):
    """MAGE: one process that accumulates 2 x 8 images against two processes of 8. MAGE-C, which compares
    what is computed at once: 16 against 2 x 8."""
    torch.set_num_threads(1)
    train_together(tmp_path, alone, contrastive)
    both(tmp_path, train_together, tmp_path, 8, contrastive)
    (losses, first, weights), (losses2, first2, weights2) = (torch.load(tmp_path / f"{world}.pt")
                                                             for world in (1, 2))
    assert losses[0] != losses[-1]
    assert_close(losses2, losses, losses_agree)
    whole = torch.cat([without_keys(k, g).flatten() for k, g in first.items()])
    assert_close(torch.cat([without_keys(k, g).flatten() for k, g in first2.items()]), whole, 1e-5)
    if not contrastive:
        for name, p in weights.items():
            assert (without_keys(name, weights2[name]) - without_keys(name, p)).abs().max() < 1e-5, name


def python(folder, *args):
    """What a Python of its own prints, which must end with code 0 within the limit; its group is killed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(folder / "printed", "w") as file:
        process = subprocess.Popen([sys.executable, *map(str, args)], stdout=file, stderr=file, cwd=HERE,
                                   start_new_session=True, env=environment)
    try:
        process.wait(LIMIT)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    printed = (folder / "printed").read_text()
    assert process.returncode == 0, printed
    return printed


def test_a_probe_of_few_images_at_several_places_ends_on_several_threads(tmp_path):
    """LU decompositions of several matrices, on two threads that are asked for so, hang in torch 2.13."""
    python(tmp_path, "-c", "import torch, probe; torch.set_num_threads(2); y = torch.arange(400) % 8\n"
           "x = torch.randn(3, 400, 128); probe.ridge_probe(x, y, x, y)")


def test_two_processes_share_the_ids_and_leave_one_run(photos, tmp_path):
    """As a user starts them, with torchrun."""
    printed = python(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                     HERE / "train.py", *flags(photos, tmp_path / "run", "--labels"))
    assert printed.count("python sample.py") == 1
    vqgan, _ = unified.load_tokenizer(tmp_path / "run")
    data = probe.open_data(str(photos), "", 32, train=True)
    (tmp_path / "alone").mkdir()
    alone, labels = train.cache_ids(tmp_path / "alone", vqgan, data, 2)
    (ids,) = (tmp_path / "run").glob("ids-*.npy")
    assert (numpy.load(ids) == alone).all() and labels.equal(data.labels)


def make_ids(folder, shard):
    unified.join_processes("cpu")
    train.SHARD = shard
    train.cache_ids(folder, tokenizer(2), image_set(30, 8), 2)
    unified.leave_processes()


def test_ids_that_two_processes_began_are_finished_by_one_and_the_reverse(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SHARD", 4)
    vqgan, data = tokenizer(2), image_set(30, 8)
    alone, _ = train.cache_ids(tmp_path, vqgan, data, 2)
    alone, (ids,) = numpy.array(alone), tmp_path.glob("ids-*.npy")
    monkeypatch.setattr(train, "join_shards", lambda *_: None)
    ids.unlink()
    with pytest.raises(unified.UserError):
        train.cache_ids(tmp_path, vqgan, data, 2)
    for path in sorted(ids.with_suffix("").iterdir())[::3]:
        path.unlink()
    both(tmp_path, make_ids, tmp_path, 4)
    assert (numpy.load(ids) == alone).all()


def test_two_processes_probe_as_one_does(diffused, tmp_path):
    rows, args = [], (diffused[0], "--head", "mlp", "--epochs", 3, "--workers", 0)
    for printed in (finish(start(tmp_path / "printed", run_script, "probe.py", args))[1],
                    both(tmp_path, run_script, "probe.py", args)):
        assert printed.count("raw pixels") == 1, printed
        rows.append(rows_of(diffused[0])[-1])
    one, two = ({k: v for k, v in row.items() if k not in ("seconds", "date")} for row in rows)
    assert one == two


def test_two_processes_make_the_images_of_one(finished, tmp_path):
    flags = ["--n", 5, "--batch", 2, "--steps", 3, "--device", "cpu"]
    both(tmp_path, run_script, "sample.py", [finished[0], *flags, "--out", tmp_path / "two.png", "--npz",
                                             tmp_path / "two.npz", "--png-dir", tmp_path / "flat"])
    script("sample.py", finished[0], *flags, "--out", tmp_path / "one.png", "--npz", tmp_path / "one.npz")
    one, two = (numpy.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("one", "two"))
    # another number of threads rounds another way
    assert abs(one.astype(int) - two).max() <= 1 and len(list((tmp_path / "flat").glob("*.png"))) == 5


# ------------------------------------------------------------------------------------------------------------
# Signals, and what is lost when something fails: nothing


@pytest.fixture
def no_signals(monkeypatch):
    """What probe.SIGNALS holds of its own."""
    monkeypatch.setattr(probe, "SIGNALS", {})
    return probe.SIGNALS


def same_weights(one, two, names=("tokenizer.pt", "model.pt"), parts=("model", "ema", "optimizer")):
    """Whether the checkpoints of two runs hold the same bits."""
    def leaves(value):
        if isinstance(value, dict):
            return [leaf for key in value for leaf in leaves(value[key])]
        several = isinstance(value, (list, tuple))
        return [leaf for item in value for leaf in leaves(item)] if several else [value]
    states = [[unified.load_checkpoint(folder / name) for name in names] for folder in (one, two)]
    one, two = (leaves([[state[part] for part in (*parts, "step")] for state in side]) for side in states)
    return len(one) == len(two) and all(v.equal(w) if isinstance(v, torch.Tensor) else v == w
                                        for v, w in zip(one, two))


BARS = ("tokenizer:", "ids of every image:", "model:")                # what is printed when a stage begins


def slow_ids():
    """Ids a shard and an image at a time, as of a large set; and steps long enough to be hit."""
    train.SHARD, probe.images_at_once = 8, lambda data, device: 2
    learning_rate = probe.learning_rate
    probe.learning_rate = lambda *args: (time.sleep(0.02), learning_rate(*args))[1]


def killed(photos, run, more, stages, seed):
    """Exit codes of a run that is ended in each of the stages, without warning or asked to stop, at moments
    that a seed decides; each time it goes on with --resume. In the report, stage 3, it is ended less often:
    nothing is trained there."""
    dice, codes = random.Random(seed), []
    for stage in stages:
        for k in range([5, 5, 7, 3][stage]):
            number = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGTERM)[k % 5]
            (run / "loss.png").unlink(missing_ok=True)
            process = start(f"{run}-printed-{len(codes)}", run_script, "train.py",
                            flags(photos, run, "--resume", *more), slow_ids)

            def begun():
                text = process.printed.read_text() if process.printed.exists() else ""
                return (run / "loss.png").exists() if stage == 3 else any(bar in text for bar in BARS[stage:])
            until(begun, process)
            time.sleep(0.4 * dice.random() ** 2)
            os.kill(process.pid, number)
            codes.append(finish(process)[0])
            (run / "model.pt.tmp").write_bytes(b"half a checkpoint")    # as a kill while saving leaves it
    return codes


def test_a_run_killed_at_twenty_moments_ends_with_the_same_bits(photos, tmp_path):
    more = ("--labels", "--tokenizer-steps", 12, "--steps", 12, "--save-every", 3)
    runs = [tmp_path / "early", tmp_path / "late"]
    with concurrent.futures.ThreadPoolExecutor() as both_at_once:
        through = both_at_once.submit(lambda: finish(start(tmp_path / "quiet", run_script, "train.py",
                                                           flags(photos, tmp_path / "through", *more),
                                                           slow_ids))[0])
        stages = [(0, 1), (2, 3)]
        codes = sum(both_at_once.map(lambda i: killed(photos, runs[i], more, stages[i], i), (0, 1)), [])
    assert through.result() == 0 and codes.count(-signal.SIGKILL) == 8, codes
    assert {-signal.SIGKILL, 128 + signal.SIGTERM,
            128 + signal.SIGINT} >= set(codes) - {-signal.SIGTERM, 0, 130}, codes
    for run in runs:
        code, printed = finish(start(tmp_path / "printed", run_script, "train.py",
                                     flags(photos, run, "--resume", *more), slow_ids))
        assert code == 0 and "python probe.py" in printed and "Traceback" not in printed
        assert same_weights(run, tmp_path / "through")
        rows = [[(r["stage"], r["step"], r["loss"]) for r in rows_of(folder, "log.jsonl") if "loss" in r]
                for folder in (run, tmp_path / "through")]
        steps = [{row[:2] for row in side} for side in rows]
        assert [row for row in rows[0] if row not in rows[1]] == [] or steps[0] == steps[1]


def chosen_method(method):
    torch.multiprocessing.set_start_method(method, force=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_signal_to_all_of_a_group_reaches_no_worker_before_its_parent(method, number, photos, tmp_path):
    """As SLURM, systemd, timeout and a terminal send it. What decodes images is forked or not."""
    args = flags(photos, tmp_path / "run", "--model", "umd", "--views", 1, "--steps", 100_000, "--workers", 2,
                 "--eval-every", 0)
    process = start(tmp_path / "printed", run_script, "train.py", args,
                    functools.partial(chosen_method, method))
    until((tmp_path / "run" / "model.pt").exists, process)
    os.killpg(process.pid, number)
    code, printed = finish(process, 60)
    assert code == 128 + number and "stopping" in printed and "--resume goes on" in printed, printed
    assert "Traceback" not in printed, printed
    assert unified.load_checkpoint(tmp_path / "run" / "model.pt")["step"] > 0


def test_a_worker_that_dies_ends_the_run_in_a_sentence_with_what_was_trained_saved(photos, tmp_path):
    args = flags(photos, tmp_path / "run", "--model", "umd", "--views", 1, "--steps", 100_000, "--workers", 1,
                 "--eval-every", 0, "--save-every", 100_000)
    process = start(tmp_path / "printed", run_script, "train.py", args)
    until(lambda: (tmp_path / "run" / "log.jsonl").exists()
          and '"step": 4' in (tmp_path / "run" / "log.jsonl").read_text(), process)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    code, printed = finish(process, 120)
    assert code == 2 and "shared memory (/dev/shm)" in printed and "--workers 0" in printed, printed
    assert "Traceback" not in printed, printed
    assert unified.load_checkpoint(tmp_path / "run" / "model.pt")["step"] >= 4


def read_with_a_worker(tree):
    before = signal.getsignal(signal.SIGCHLD)
    data = probe.open_data("anything", str(tree), 16, train=True)
    for _ in data.batches([(torch.arange(6), None)], workers=1):
        print("same" if signal.getsignal(signal.SIGCHLD) == before else "torch's")


def test_nothing_raises_in_the_middle_of_a_step_when_a_worker_dies(tree, tmp_path):
    # torch's handler of SIGCHLD would
    assert finish(start(tmp_path / "printed", read_with_a_worker, tree)) == (0, "same\n")


def test_workers_that_hand_nothing_over_end_the_wait(monkeypatch):
    class Stuck(torch.utils.data.Dataset):
        def __getitem__(self, i):
            time.sleep(3)
    loader = torch.utils.data.DataLoader(Stuck(), sampler=[0], num_workers=1, timeout=1,
                                         multiprocessing_context="fork")
    assert_refused("/dev/shm.*--workers 0", next, probe.batches_of(loader, patience=1))


def test_a_bug_in_a_worker_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"):
        list(probe.batches_of(item() for item in [lambda: (_ for _ in ()).throw(RuntimeError("a bug"))]))


def test_what_workers_hand_over_at_once_fits_into_a_containers_shared_memory(tree, monkeypatch):
    sizes, collate = [], probe.collate

    def measured(items):
        x, *rest = collate(items)
        sizes.append(x.nbytes)
        return x, *rest
    monkeypatch.setattr(probe, "collate", measured)
    data = probe.open_data("anything", str(tree), 64, train=True)
    index = torch.arange(256) % 6
    # what made ids stand still at its third batch
    x, y = next(data.batches([(index, unified.hash_ints(index[:, None], torch.arange(10)))]))
    assert x.shape == (256, 10, 3, 64, 64) and y.equal(data.labels[index]) and sum(sizes) == x.numel()
    assert max(sizes) <= 2**20
    alone = (index[251:252], unified.hash_ints(index[251:252, None], torch.arange(10)))
    assert x[251].equal(next(data.batches([alone]))[0][0])


def test_every_long_loop_stops_at_its_next_batch(no_signals, monkeypatch):
    """Features and PSNR, results that are drawn; of ids see test_ids_that_were_interrupted_..."""
    monkeypatch.setattr(probe, "images_at_once", lambda data, device: 2)
    read = []

    def embed(x):
        read.append(len(x))
        if len(read) == 3:
            no_signals[signal.SIGINT] = 0.0
        return x.mean((2, 3))
    with pytest.raises(probe.Stopped, match="images were read"):
        probe.map_images(embed, image_set(20, 8))
    assert len(read) == 3
    with pytest.raises(probe.Stopped, match="drawn"):
        list(train.until_asked(read))


def test_a_stop_while_averaged_weights_are_shown_saves_the_raw_ones(no_signals, tmp_path):
    model, shown = Linear(), []

    def evaluate():
        shown.append(model.inner.weight.detach().clone())
        no_signals[signal.SIGTERM] = 0.0
        raise probe.Stopped("while it is shown")
    batches = itertools.repeat((torch.ones(4, 3), torch.zeros(4)))
    with pytest.raises(probe.Stopped, match="at step 1 of the model"):
        trained(tmp_path, model, dict(ema=0.5, batch_size=4), lambda plan: batches, 9, evaluate=evaluate,
                data=image_set(8, 8), eval_every=1)
    state = unified.load_checkpoint(tmp_path / "model.pt")
    own, ema = state["model"]["inner.weight"], state["ema"]["inner.weight"]
    assert shown[0].equal(ema) and not own.equal(ema) and own.equal(model.inner.weight) and model.training


def test_a_signal_is_answered_in_words_at_once_and_a_second_one_at_once_in_deed(
        no_signals, capfd, monkeypatch):
    with handlers_kept():
        train.stop_when_asked()
        signal.raise_signal(signal.SIGTERM)
        said = capfd.readouterr().err
        assert "stopping after this step or batch" in said and "again, after 2 s" in said
        assert list(no_signals) == [signal.SIGTERM]
        signal.raise_signal(signal.SIGTERM)         # what torchrun passes on a moment later changes nothing
        no_signals[signal.SIGTERM] -= 3
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        train.stop_when_asked()
        assert not no_signals


def slowly_and_unevenly():
    """The second of two processes takes longer over what comes between two steps, and so sees a signal in
    another one."""
    step_done = train.Log.step_done
    train.Log.step_done = lambda *args: (time.sleep(0.05 * unified.rank_and_world()[0]), step_done(*args))


def test_two_processes_stop_after_the_same_step_and_save_once(photos, finished, tmp_path):
    args = flags(photos, tmp_path / "run", "--labels", "--tokenizer", finished[0], "--steps", 100_000,
                 "--eval-every", 0, "--save-every", 100_000)
    processes = start_two(tmp_path, run_script, "train.py", args, slowly_and_unevenly)
    log = tmp_path / "run" / "log.jsonl"
    until(lambda: log.exists() and '"step": 6' in log.read_text(), processes[0])
    os.kill(processes[1].pid, signal.SIGTERM)                           # one of them alone is told
    ended = [finish(process) for process in processes]
    assert [code for code, _ in ended] == [128 + signal.SIGTERM] * 2, ended
    assert ended[0][1].count("everything is saved") == 1 and "everything" not in ended[1][1]
    step = unified.load_checkpoint(tmp_path / "run" / "model.pt")["step"]
    assert step >= 6 and f"stopped at step {step} of the model" in ended[0][1]
    assert "Traceback" not in ended[0][1] + ended[1][1]


def test_processes_may_log_different_terms(photos, tmp_path):
    """One image each: of UMD one process has the clean part alone, the other the noised."""
    both(tmp_path, run_script, "train.py", flags(photos, tmp_path / "run", "--model", "umd", "--views", 1,
                                                 "--batch-size", 2, "--micro-batch", 1,
                                                 "--steps", 2, "--eval-every", 0))
    row = rows_of(tmp_path / "run", "log.jsonl")[0]
    assert {"x0", "eps", "x0_clean"} <= row.keys() and row["loss"] > 0


def test_terms_count_as_often_as_they_were_logged():
    log = train.Log(train.Config(device="cpu"), "model", {"steps": 1}, 0, forbidden)
    for loss, terms in ((1.0, {"x0": 1.0}), (3.0, {"x0_clean": 5.0}), (5.0, {"x0": 3.0})):
        log.add({name: torch.tensor(v) for name, v in {"loss": loss, **terms}.items()})
    assert log.means() == {"loss": 3.0, "x0": 2.0, "x0_clean": 5.0}


def fail_in_a_step():
    def fail(*_):
        assert [o for o in gc.get_objects() if type(o) is nn.parallel.DistributedDataParallel]
        raise KeyError("a bug in a step")
    probe.learning_rate, destroy = fail, torch.distributed.destroy_process_group

    def parted():
        left = [o for o in gc.get_objects() if type(o) is nn.parallel.DistributedDataParallel]
        print(f"{len(left)} wrappers left")
        destroy()
    torch.distributed.destroy_process_group = parted


def test_ddp_is_gone_before_its_group_is_even_after_a_failure(photos, finished, tmp_path):
    """Freed later it could wait for the group's thread, which waits for Python: for good."""
    args = flags(photos, tmp_path / "run", "--labels", "--tokenizer", finished[0], "--eval-every", 0)
    ended = [finish(process) for process in start_two(tmp_path, run_script, "train.py", args, fail_in_a_step)]
    for code, printed in ended:
        assert code == 1 and "a bug in a step" in printed and "\n0 wrappers left" in "\n" + printed, printed


@pytest.mark.parametrize("name, world, device, backend", [
    ("cuda", 2, "cuda:1", "cpu:gloo,cuda:nccl"), ("cpu", 2, "cpu", "gloo"), ("cuda:3", 1, "cuda:3", None)])
def test_a_process_touches_its_own_device_only_and_waits_for_hours(name, world, device, backend, monkeypatch):
    touched, joined = [], []
    monkeypatch.setenv("WORLD_SIZE", str(world)), monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch, "empty", lambda n,
                        device: touched.append(device) or types.SimpleNamespace(device=torch.device(device)))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: touched.append(str(device)))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend,
                        timeout: joined.append((backend, timeout)))
    assert unified.join_processes(name) == torch.device(device) and set(touched) == {device}
    assert len(joined) == (backend is not None)
    assert all(used == backend and wait >= datetime.timedelta(hours=1) for used, wait in joined)


def test_what_a_run_was_trained_on_must_not_change(photos, finished, tmp_path):
    tree, run = shutil.copytree(photos, tmp_path / "photos"), tmp_path / "run"
    script("train.py", *flags(tree, run, "--labels", "--eval-every", 0))
    rerun = flags(tree, run, "--labels", "--eval-every", 0, "--resume")
    for part in ("train", "val"):
        (tree / part / "cat").rename(tree / part / "zebra")             # the labels change places
    said = script("train.py", *rerun, expect=2)
    assert "classes cat then and zebra now" in said and "--out-dir" in said
    said = script("probe.py", run, "--workers", 0, expect=2)
    assert "classes cat then" in said and f"--dataset {tree}" in said
    assert "raw pixels" in script("probe.py", run, "--workers", 0, "--dataset", tree)
    for part in ("train", "val"):
        (tree / part / "zebra").rename(tree / part / "cat")
    next((tree / "train" / "cat").iterdir()).unlink()
    assert "images 48 then and 47 now" in script("train.py", *rerun, expect=2)


def no_room(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


@pytest.mark.parametrize("limit, last", [(8_000_000, "tokenizer.pt"), (600_000, None)])
def test_a_disk_without_room_is_a_sentence_and_the_last_checkpoint_stays(limit, last, photos, tmp_path):
    process = start(tmp_path / "printed", run_script, "train.py", flags(photos, tmp_path / "run"),
                    functools.partial(no_room, limit))
    code, printed = finish(process)
    assert code == 2 and "make room" in printed and "Traceback" not in printed, printed
    assert not [*(tmp_path / "run").glob("*.tmp")]
    if last:
        assert "last good checkpoint is untouched" in printed
        assert unified.load_checkpoint(tmp_path / "run" / last)["step"] == 3


@pytest.mark.parametrize("links", [True, False])
def test_a_checkpoint_comes_back_and_can_be_read_while_it_is_replaced(links, tmp_path, monkeypatch):
    path, replace, there = tmp_path / "model.pt", os.replace, []
    state = {"step": 1, "model": {"w": torch.full((2,), 3.0)}, "config": {"a": [1, None, "b"]}}
    train.save_checkpoint(path, state)
    monkeypatch.setattr(os, "replace", lambda *names: (there.append(path.exists()), replace(*names)))
    if not links:                                                       # as some network file systems
        monkeypatch.setattr(os, "link", failing(errno.EPERM, "Operation not permitted"))
    for step in (2, 3):
        train.save_checkpoint(path, state | {"step": step})
    one, previous = (unified.load_checkpoint(tmp_path / name) for name in ("model.pt", "model.pt.prev"))
    assert one.pop("model")["w"].tolist() == [3.0, 3.0] and one == {"step": 3, "config": state["config"]}
    assert previous["step"] == 2 and len([*tmp_path.iterdir()]) == 2
    assert there == [True] * 2 if links else there == [True, False] * 2         # then .prev is read


def test_features_that_repeat_are_warned_of_where_they_are_saved(finished, tmp_path):
    (tmp_path / "photos").mkdir()
    for i, shade in enumerate((10, 10, 200)):
        PIL.Image.new("RGB", (32, 32), (shade, 50, 90)).save(tmp_path / "photos" / f"{i}.png")
    printed = script("probe.py", finished[0], "--dataset", tmp_path / "photos", "--save", tmp_path / "a.npz",
                     "--workers", 0)
    rows = numpy.load(tmp_path / "a.npz")["features"]
    assert f"warning: {3 - len(numpy.unique(rows, axis=0))} of 3 rows repeat another" in printed


def test_a_size_that_a_method_lacks_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setitem(unified.MODELS, "denoiser", DENOISER)
    train.settings(train.Config(model="denoiser", device="cpu"))
    assert_refused("denoiser has no size small; --size takes tiny", train.settings,
                   train.Config(model="denoiser", size="small", device="cpu"))


def test_a_run_of_pixels_that_is_named_as_a_tokenizer_is_told_so(tmp_path):
    (tmp_path / "model.pt").touch()
    assert_refused("a run of pixels has no tokenizer; name one of mage", unified.load_checkpoint,
                   tmp_path / "tokenizer.pt")


def test_a_run_needs_no_locks_where_a_file_system_has_none_and_gives_way_where_it_has(tmp_path, monkeypatch):
    cfg = train.settings(train.Config(device="cpu", out_dir=str(tmp_path / "run")))
    with contextlib.ExitStack() as lock, contextlib.ExitStack() as second:
        train.open_folder(cfg, [], lock)
        assert_refused("is in use by another train.py", train.open_folder, cfg, [], second)
        monkeypatch.setattr(train.fcntl, "flock", failing(errno.ENOSYS, "Function not implemented"))
        train.open_folder(cfg, [], second)


def test_a_save_that_fails_changes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    train.save_checkpoint(path, {"step": 1})
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC, "No space left on device"))
    assert_refused("No space left.*untouched.*--resume", train.save_checkpoint, path, {"step": 2})
    assert unified.load_checkpoint(path) == {"step": 1} and [*tmp_path.iterdir()] == [path]


def without_unix():
    """As on Windows, as far as the scripts can see."""
    for name in ("SC_PHYS_PAGES", "sysconf", "sched_getaffinity"):
        if hasattr(os, name):
            delattr(os, name)
    del signal.pthread_sigmask, signal.SIGCHLD
    sys.modules["fcntl"] = None
    importlib.reload(train)


@pytest.mark.parametrize("name", ["train.py", "probe.py"])
def test_scripts_run_without_what_windows_lacks(name, photos, finished, tmp_path):
    args = flags(photos, tmp_path / "run", "--labels", "--eval-every",
                 0) if name == "train.py" else (finished[0], "--workers", 0)
    code, printed = finish(start(tmp_path / "printed", run_script, name, args, without_unix))
    assert code == 0, printed


def test_a_training_of_more_than_a_day_is_announced_once(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    for name, steps, seconds in (("tokenizer", 1_000_000, 60), ("model", 2_000_000, 5), ("model", 100, 60)):
        log = train.Log(train.Config(), name, {"steps": steps}, 7, forbidden)
        for step in range(8, 30):
            now[0] += 500 if step == 8 else seconds                     # the first step compiles
            log.step_done(step, torch.tensor(1.0))
    told = [line for line in capsys.readouterr().out.splitlines() if "at this pace" in line]
    assert len(told) == 2 and "694 more days" in told[0] and "--tokenizer-batch-size" in told[0]
    assert "116 more days" in told[1]


@pytest.mark.parametrize("psnr, used, warned", [(21.0, 0.5, False), (19.0, 0.5, True), (21.0, 0.09, True)])
def test_a_tokenizer_that_learned_little_is_told_of_with_what_mean_colours_reach(
        psnr, used, warned, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "measure_tokenizer", lambda *_: ({"psnr": psnr, "codes_used": used}, 20.0))
    run = shutil.copytree(finished[0], tmp_path / "run")
    printed = script("train.py", "--resume", run, "--device", "cpu")
    assert ("more --tokenizer-steps" in printed) == warned == ("colour, has 20.00 dB" in printed)
    assert "tokenizer: all 3 steps are done" in printed and "model: all 6 steps are done" in printed


def test_what_a_tokenizer_reaches_is_measured_beside_a_mosaic_of_mean_colours():
    squares = torch.rand(3, 3, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    bright = torch.arange(16) % 2 / 4.0                                 # stripes inside each square
    vqgan = unified.build(dict(TINY_VQGAN, ch_mult=[1, 1, 1]))
    assert vqgan.stride == 4
    data = probe.ImageTensor(((squares / 2 + bright) * 255).to(torch.uint8),
                             torch.zeros(3, dtype=torch.long), [], (1, 1))
    figures, floor = train.measure_tokenizer(train.Config(device="cpu", dtype="float32"), vqgan, data, 3)
    assert floor == pytest.approx(-20 * math.log10(1 / 8), abs=0.1)     # the mean is 1/8 off everywhere
    assert figures["psnr"] < floor and 0 < figures["codes_used"] <= 1


# ------------------------------------------------------------------------------------------------------------
# The library: a wrong call is a ValueError


PUBLIC = ("forward", "sample_steps", "features", "embed", "reconstruct", "noise")


def right_arguments(model, method, views=1):
    """Arguments of a call that succeeds, {} of a method that the model lacks; each allows one number of
    rows only. A method of a fork whose own arguments are to be checked, too, gets a line here, and one in
    FORMS."""
    rows, x = torch.arange(4), some_images(8, 32).unflatten(0, (4, 2))
    known = dict(x=x[:, :views].squeeze(1), ids=torch.arange(64).view(4, 4, 4) % 32, n=4, steps=2,
                 temperature=0.5, eta=0.5, guidance=1.5, guidance_interval=(0.2, 0.8), guide=model,
                 known=x[:, 0], mask=x[:, 0, 0] > 0.5, seeds=rows, schedule="linear", draw=3,
                 mask_ratio=0.7, index=20, gap=2, n_clean=2, layers=[1, 2])
    if isinstance(model, unified.Model):
        number = 4 if method != "forward" else 2 if isinstance(model, unified.UMD) else 4 * views
        known.update(labels=rows % 3 if model.classes else None, mask_noise=some_noise(4 * views, 16),
                     keep_label=torch.arange(number) > 0, noise=model.noise(torch.arange(number)),
                     pool=model.pools[0], add={1: torch.zeros(4, *model.layers[1])}, t=corrupting(model))
        if method == "forward":
            low, high, _ = model.t_range
            known["t"] = torch.linspace(low, high, 2 + number)[1:-1].to(torch.tensor(high).dtype)
    call = getattr(model, method, None)
    found = {key: known[key] for key in inspect.signature(call).parameters if key in known} if call else {}
    if "guide" not in found and found.get("labels") is None:                # no guidance without either
        found.pop("guidance", None)
    return found


def near_tensors(v):
    """What is like a tensor but for rank, size, length, kind, device or values."""
    yield from (v[None], v[0], v[..., None], v[:-1], torch.cat([v, v]), v[..., :-1], torch.cat([v, v], -1),
                v.to("meta"), v.tolist(), v.numpy(), torch.tensor(0), None, 3, 0.5, "many", [],
                v.movedim(-1, 0), v > 0, v.to(torch.complex64), v[:0])
    yield from (v.to(dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int16,
                                          torch.int32, torch.uint8, torch.uint16))
    if v.dim() > 1:
        yield from (v.movedim(1, -1), v[:, :1], v[:, :, None], F.pad(v, (1, 1)), (255 * v.float()).byte())
    if not v.is_floating_point() and v.dtype != torch.bool:
        yield from (-1 - v, v + 10**6, v - 2**40)


def near_values(key, v):
    """What comes near an argument and is wrong, mostly."""
    if isinstance(v, torch.Tensor):
        return list(near_tensors(v))
    if key == "layers":
        return [3, [0], [-1], [99], "1", [None], [1.5], [[1]], torch.tensor([1, 2]), [torch.tensor([1, 2])],
                (b for b in [1, 2]), [10**30], [math.nan], 1.0]
    if key == "add":
        m = v[1]
        return [3, None, [1], "add", m, {99: m}, {0: m}, {"1": m}, {None: m}, {math.nan: m},
                *({1: w} for w in near_tensors(m))]
    if isinstance(v, str):
        return ["other", "", None, 3, [v], (v,), torch.tensor(0), v.upper()]
    if v is None:
        return [torch.zeros(4, dtype=torch.long)] if key == "labels" else []
    many = 10**4 if key == "steps" else 10**30          # a sampler may make a table of them to begin with
    return [-1, 0, -0.5, 0.5, many, -10**30, math.nan, math.inf, -math.inf, 1j, "two", None, [1], (), {},
            torch.tensor([1, 2]), torch.tensor(math.nan), torch.tensor(1, device="meta"), numpy.ones(2)]


def shapes(result):
    """Of all tensors of a result; of a generator's first state."""
    result = next(result) if isinstance(result, types.GeneratorType) else result
    return [v.shape for v in torch.utils._pytree.tree_leaves(result) if isinstance(v, torch.Tensor)]


def fitting(expected, v):
    """What the shapes of four images become if only v tells their number, and, where v are maps of ids,
    their size."""
    if not isinstance(v, torch.Tensor) or not v.dim():
        return expected
    return [torch.Size([len(v), *(size[1:] if v.dim() != 3 else (3, 4 * v.size(1), 4 * v.size(2)))])
            for size in expected]


@torch.no_grad()
def assert_guarded(model, method, views=1):
    """Each argument in turn is replaced by what comes near it: that is a ValueError, or the shapes are
    right."""
    given, refused = right_arguments(model, method, views), set()
    expected = shapes(getattr(model, method)(**given)) if given else []
    for key, v in given.items():
        for wrong in near_values(key, v):
            try:
                found = shapes(getattr(model, method)(**{**given, key: wrong}))
            except ValueError as error:
                assert re.match(r"\w+", str(error))[0] in given, (key, wrong)
                refused.add(key)
            except Exception as error:
                raise AssertionError(f"{method}({key}={wrong})") from error
            else:
                assert found in (expected, fitting(expected, wrong)), f"{method}({key}={wrong})"
    assert refused == {key for key, v in given.items() if v is not None or key == "labels"}


@pytest.mark.parametrize("method", PUBLIC)
@EVERY
def test_every_wrong_argument_of_every_public_method_is_a_value_error_or_harmless(name, method):
    for labels in {0, 3 * METHODS[name].model.takes_labels}:
        assert_guarded(small(name, labels).eval(), method, METHODS[name].views if method == "forward" else 1)


@pytest.mark.parametrize("method", ["encode", "decode", "reconstruct"])
def test_every_wrong_argument_of_the_tokenizer_is_a_value_error_or_harmless(method):
    assert_guarded(tokenizer(), method)


@pytest.mark.parametrize("name", ["mage", "mage-c", "mage-e", "addp"])
def test_ids_are_checked_as_pixels_are(name):
    model = small(name).eval()
    ids = some_ids(model)
    for method in ("forward", "features", "embed"):
        call = getattr(model, method)
        for dtype in (torch.uint8, torch.int16, torch.int32, torch.uint16):
            assert shapes(call(ids.to(dtype))) == shapes(call(ids))
        for wrong in (ids + 128, -1 - ids, ids.float(), ids[0], ids[:, :-1], ids[None], ids > 3,
                      ids.to("meta"), ids.to(torch.complex64)):
            with pytest.raises(ValueError, match="^x must be .* int "):
                call(wrong)


@EVERY
def test_a_refusal_says_what_was_given_and_what_is_expected(name):
    model, x = small(name).eval(), some_images(2, 32)
    inpaints = "known" in inspect.signature(model.sample_steps).parameters
    for call, words in [
            (lambda: model.features((255 * x).byte()),
             r"float \(B, 3, 32, 32\).*not torch.uint8 \(2, 3, 32, 32\).*divide.*255"),
            (lambda: model.embed(x[0]), r"float \(B, 3, 32, 32\).*not torch.float32 \(3, 32, 32\)"),
            (lambda: model.embed(x.to("meta")), "on meta; the model is torch.float32 on cpu"),
            (lambda: model.features(x, layers=[99]), rf"layers in \[1, {len(model.layers)}\], not \[99\]"),
            (lambda: model.features(x, t=1001), rf"t must be .*{model.t_range[1]}\], not 1001"),
            (lambda: model.embed(x, pool="max"), "among .*mean.*, not 'max'"),
            *[(lambda: model.sample(0, known=x, mask=x[:, 0] > 0), "n must be int in .*, not 0"),
              (lambda: model.sample(2, known=x), "known and mask go together")] * inpaints,
            (lambda: model(x.repeat(2, 1, 1, 1), torch.arange(4)), "labels must be .*not torch.int64")]:
        with pytest.raises(ValueError, match=words):
            call()


def test_pixels_that_are_far_outside_are_refused_where_an_image_is_finished():
    model, x = small("umd").eval(), some_images(2, 32)
    for wrong in (255 * x, 2 * x - 1, x / 0):
        for call in (model, model.features, model.embed, model.reconstruct, small("adm"),
                     small("adm").features, tokenizer().encode, small("mage").eval().embed,
                     lambda x: model.sample(2, steps=1, known=x, mask=x[:, 0] > 0)):
            with pytest.raises(ValueError, match="^(x|known) must be"):
                call(wrong)
    for wrong in (255 * x, x / 0):
        for call in (small("addp").features, small("addp").eval().embed):   # fresh decoders overshoot more
            with pytest.raises(ValueError, match="^x must be"):
                call(wrong)


@EVERY
def test_wrong_options_are_refused_before_the_first_step(name):
    model = small(name)
    for options in (dict(steps=0), dict(seeds=torch.arange(3)), dict(schedule="sqrt"), dict(eta=1.5),
                    dict(temperature=math.nan), dict(mask=torch.ones(2, 32, 32) > 0),
                    dict(labels=torch.arange(2))):                      # small() has no classes
        with pytest.raises(ValueError):
            model.sample_steps(2, **options)


def test_the_change_of_a_method_that_section_13_shows_trains_with_its_mask_ratio(monkeypatch):
    monkeypatch.setattr(unified, "MODELS", dict(unified.MODELS))
    names = shown_in_the_tutorial("class MAGE75(MAGE):", 4)
    config = unified.model_config("mage-75", "tiny", 32, 4, unified.tokenizer_config("toy", 8, 128))
    model, draws = unified.build(config), dict(mask_noise=some_noise(4, 16))
    ids = some_ids(model)
    assert isinstance(model, names["MAGE75"])
    assert model(ids, **draws)[0].equal(unified.MAGE.forward(model, ids, mask_ratio=0.75, **draws)[0])


@pytest.mark.parametrize("name", ["mage", "addp"])
def test_an_order_of_ones_own_sees_the_mask_before_its_step_and_the_number_of_the_step(name):
    seen, model = [], small(name).eval()

    def order(confidence, mask, t):
        seen.append((mask, t))
        return confidence
    plain = list(model.sample_steps(3, steps=4))
    for state, before, (mask, t), number in zip(model.sample_steps(3, steps=4, order=order),
                                                [model.initial_state(3), *plain], seen, range(1, 5)):
        assert t == number and mask.equal(before.token_mask)
    assert len(seen) == 4 and state.ids.equal(plain[-1].ids)                # as without an order


@pytest.mark.parametrize("name", ["mage", "addp"])
def test_the_order_that_section_13_shows_first_decides_tokens_without_a_decided_neighbour(name):
    names = shown_in_the_tutorial("def far_apart(confidence, mask, t):", 4)
    model = names["model"] = small(name).eval()                             # of 4 x 4 tokens
    states = model.sample_steps(5, steps=16, order=names["far_apart"], schedule=[*range(15, -1, -1)])
    for _, state in zip(range(4), states):
        around = F.avg_pool2d((~state.token_mask).float().view(5, 4, 4), 3, 1, 1) * 9       # with itself
        if state.count[0] >= 14:                                            # there is room for two apart
            assert around[~state.token_mask.view(5, 4, 4)].round().eq(1).all()
    assert state.count.tolist() == [12] * 5


@pytest.mark.parametrize("extreme", [math.inf, -math.inf, math.nan])
def test_what_was_visible_stays_whatever_the_order_says(extreme):
    mask, ids = torch.tensor([[False, True, True]]), torch.zeros(1, 3, dtype=torch.long)
    order = torch.tensor([[0.0, extreme, 0.3]])
    for count in (1, 2):
        u, gumbel = torch.full((1, 3), 0.5), torch.zeros(1, 3)
        _, still = unified.unmask(torch.zeros(1, 3, 4), ids, mask, torch.tensor([count]), u, gumbel,
                                  lambda *_: order, 1)
        assert still.sum() == count and not still[0, 0]
    assert still.tolist() == [[False, True, True]]


@pytest.mark.parametrize("name", ["mage", "addp"])
def test_the_schedules_that_section_13_shows_leave_so_many_tokens_masked(name):
    names, text = {"model": small(name).eval()}, inspect.getsource(unified)

    def masked_after_each_step(line):
        states = eval(line.replace("sample", "sample_steps"), names)
        return [still_masked(state).sum(1).unique().tolist() for state in states]
    counts = re.search(r"#     (model\.sample\(16, steps=4,.*\)) +# or how many", text)[1]
    assert masked_after_each_step(counts) == [[12], [8], [4], [0]]
    squares = re.search(r"#     (model\.sample\(16, steps=4,.*\)) +# ratio", text)[1]
    assert masked_after_each_step(squares) == [[15], [12], [7], [0]]


@pytest.mark.parametrize("name", ["mage", "addp"])
def test_a_schedule_of_counts_has_one_for_each_step_and_leaves_no_more_masked_than_there_were(name):
    model, known = small(name).eval(), some_noise(2, 3, 32, 32)
    mask = torch.zeros(2, 32, 32).bool()
    mask[:, :4, :4] = True                                                  # four tokens are masked
    counts = [state.count.tolist() for state in
              model.sample_steps(2, steps=3, schedule=[9, 3, 0], known=known, mask=mask)]
    assert counts == [[4, 4], [3, 3], [1, 1]]
    for wrong in ([12, 8], [12, 8, 4, 2, 1], [17, 8, 1], [12, -1, 1], [12, 8.5, 1], "12"):
        with pytest.raises(ValueError, match="schedule"):
            list(model.sample_steps(2, steps=3, schedule=wrong))


def test_a_schedule_may_have_any_name(monkeypatch):
    monkeypatch.setitem(unified.SCHEDULES, "power 1.5", lambda t, T: 1 - (t / T) ** 1.5)
    small("mage").eval().sample(1, steps=2, schedule="power 1.5")


@pytest.mark.parametrize("name", ["mage", "addp"])
def test_what_a_schedule_or_an_order_of_ones_own_must_return_is_said(name):
    model = small(name).eval()
    for wrong in (math.nan, 2.0, -0.5, None, "half"):
        with pytest.raises(ValueError, match="schedule must return a ratio in .*, at t = 1 of 4 not"):
            next(model.sample_steps(2, steps=4, schedule=lambda t, T: wrong))
    for wrong in (None, 1.0, torch.zeros(2, 15)):
        with pytest.raises(ValueError, match="order must return"):
            next(model.sample_steps(2, steps=4, order=lambda confidence, mask, t: wrong))
    model.sample(2, steps=4, schedule=lambda t, T: 1 - math.sin(math.pi / 2 * t / T) - 1e-16)


class Plugin:
    """A base class beside Model that wants to know of its subclasses."""
    found = []

    def __init_subclass__(cls, tag, **options):
        super().__init_subclass__(**options)
        Plugin.found.append(tag)


def test_a_subclass_may_pass_arguments_on_and_have_other_bases():
    class Own(unified.UMD, Plugin, tag="own"):
        def forward(self, x, *args, **options):
            return super().forward(x, *args, **options)

        def sample_steps(self, n, **options):
            return super().sample_steps(n, **options)

    model, x = Own(16, 4, 32, 2, 4, 1, 0.5, 0.75, 0.375), some_images(2, 16)
    loss, _ = model(x, n_clean=1)
    assert loss.isfinite() and model.sample(2, steps=2).shape == x.shape and Plugin.found == ["own"]
    with pytest.raises(ValueError, match="n_clean must be"):
        model(x, n_clean=3)
    with pytest.raises(ValueError, match="takes no n_cleen"):
        model(x, n_cleen=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_of_sixteen_bits_are_refused_with_a_word_on_autocast(dtype):
    model = small("umd").eval().to(dtype)
    with pytest.raises(ValueError, match=f"float32, not {dtype}; torch.autocast"):
        model.embed(some_images(2, 32).to(dtype))


@EVERY
def test_every_model_computes_in_float64(name):
    model = small(name).double()
    x = some_images(2 * METHODS[name].views, 32).double()
    loss, _ = model(x.unflatten(0, (2, 2)) if METHODS[name].views == 2 else x)
    loss.backward()
    maps = [model.eval().embed(x), *model.features(x)]
    maps += [model.sample(2, steps=2)] if model.generates else []
    assert {v.dtype for v in maps} == {torch.float64}


@EVERY
def test_a_float32_model_does_not_depend_on_torchs_default_dtype(name):
    model, x = small(name).eval(), some_images(2, 32)
    t = min(model.t_range[1], 500)

    def everything():
        noise = model.noise(torch.arange(2))
        maps = [model.embed(x, noise=noise), *model.features(x, t=t, noise=noise)]
        return maps + [model.sample(2, steps=2)] if model.generates else maps
    before = everything()
    torch.set_default_dtype(torch.bfloat16)
    try:
        after = everything()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(a.equal(b) for a, b in zip(before, after))


@EVERY
def test_no_images_at_all_are_refused(name):
    model = small(name).eval()
    for call in (model, model.features, model.embed):
        with pytest.raises(ValueError, match=r"x must be .*\(0, 3, 32, 32\)"):
            call(some_images(2, 32)[:0])


def test_labels_and_seeds_may_lie_on_the_cpu():
    model = small("umd", 3).eval().to("meta")
    with Elsewhere():
        assert next(model.sample_steps(2, seeds=torch.arange(2), labels=torch.tensor([0, 2]))).x.is_meta
        assert model(torch.zeros(2, 3, 32, 32, device="meta"), torch.tensor([0, 2]))[0].is_meta
        with pytest.raises(ValueError, match="labels"):
            model(torch.zeros(2, 3, 32, 32, device="meta"), torch.tensor([0, 3]))


# ------------------------------------------------------------------------------------------------------------
# GPU paths, checked without a GPU: a model on "meta" has no numbers, and who asks for one would have waited


class Elsewhere(torch.utils._python_dispatch.TorchDispatchMode):
    """Makes "meta" a GPU without float64, for which nobody waits. Refused: to read values off it, to copy
    to it and wait, shapes that values decide, float64, and what mixes devices. The first reads have
    answers, if any are given."""

    WAITS = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "bincount", "equal"}

    def __init__(self, *answers):
        super().__init__()
        self.answers = list(answers)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        given = [v for v in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        there = any(v.is_meta for v in given)
        if name in ("_to_copy", "copy_"):
            return self.copy(func, args, kwargs)
        if there:
            assert name not in self.WAITS, f"{name} waits"
            assert all(v.is_meta or v.dim() == 0 for v in given), f"{name} of two devices"
            assert not name.startswith("index") or given[1].dtype != torch.bool, f"{name} by a mask waits"
        return self.checked(func(*args, **kwargs))

    def copy(self, func, args, kwargs):
        source, target = args[0], kwargs.get("device", args[0].device)
        if func.overloadpacket.__name__ == "copy_":
            source, target = args[1], args[0].device
        if source.is_meta and target.type == "cpu":
            assert self.answers, "a copy to the CPU waits"
            return self.answers.pop(0)
        if not source.is_meta and target.type == "meta":
            assert kwargs.get("non_blocking", args[2:] == (True,)), "a copy to the device waits"
        return self.checked(func(*args, **kwargs))

    def checked(self, result):
        found = [v for v in torch.utils._pytree.tree_leaves(result) if isinstance(v, torch.Tensor)
                 and v.is_meta]
        assert all(v.dtype != torch.float64 for v in found), "float64 on the device"
        return result


def test_elsewhere_refuses_what_it_should():
    x, i = torch.ones(3, device="meta"), torch.zeros(2, dtype=torch.long)
    for wrong in (lambda: x.sum().item(), lambda: bool((x > 0).all()), lambda: x.tolist(), lambda: x.cpu(),
                  lambda: x.nonzero(), lambda: x.unique(), lambda: x[x > 0],
                  lambda: x.index_put_((x > 0,), x[0]),
                  lambda: torch.ones(3).to("meta"), lambda: x.copy_(torch.ones(3)), lambda: x.double(),
                  lambda: i[i.to("meta", non_blocking=True)], lambda: x[i], lambda: x + torch.ones(3)):
        with Elsewhere(), pytest.raises(AssertionError):
            wrong()
    with Elsewhere(i):
        assert x.cpu() is i and (x + torch.ones((), dtype=torch.float64)).is_meta


def fused_elsewhere(weights, recipe):
    """AdamW as if it were fused: "meta" has no fused one."""
    optimizer = train.adamw(weights, recipe, fused=None)
    optimizer.defaults["fused"], step = True, optimizer.step

    def step_as_if():
        assert optimizer.found_inf.is_meta
        del optimizer.found_inf, optimizer.grad_scale
        step()
    optimizer.step = step_as_if
    return optimizer


def train_watched(folder, model, method, device, watches, size=32, **cfg):
    """Train on 8 images a step as train.py does, from cached ids or a set on the device: a step in each of
    the contexts `watches`, which begins with the step's batch and ends before the next one."""
    views, recipe = (method.views, method.recipe) if method else (1, train.TOKENIZER_RECIPE)
    recipe = {**recipe, "views": views, "batch_size": 8, "lr": 1e-4}
    if device == "meta":
        recipe["optimizer"] = fused_elsewhere
    y, x = torch.arange(32) % 3, torch.randint(256, (32, 3, size, size), dtype=torch.uint8)
    data = probe.ImageTensor(x, y, [], (0.8, 1.0), device)
    ids = torch.randint(model.codes, (32, 4, model.length),
                        dtype=torch.int16).to(device) if method and method.tokenizer else None

    def batches(plan):
        source = data.batches(plan) if ids is None else train.cached_batches(ids, y, plan)
        for watch in watches:
            with watch:
                yield next(source)
    watched = batches(train.plan(32, 0, {**recipe, "micro_batch": 8}, 0, 100))

    def args(step, first):
        return model.micro_batch_args(first, 8) if method else {"adversarial_weight": 0.8}
    with contextlib.closing(watched), contextlib.suppress(StopIteration):                   # no watch is left
        trained(folder, model, recipe, lambda plan: watched, 100, data=data, forward_args=args, device=device,
                log_every=100, **cfg)


@pytest.mark.parametrize("name", [*KINDS, "tokenizer"])
def test_no_training_step_waits_for_the_device_or_needs_float64_there(name, tmp_path, monkeypatch):
    method = unified.MODELS.get(name)
    labels = name in TAKES_LABELS
    model = small(name, 3 * labels) if method else unified.TokenizerTraining(tokenizer())
    monkeypatch.setattr(probe, "autocast", lambda cfg: contextlib.nullcontext())
    norms, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        lambda *args: norms.append(clip(*args)) or norms[-1])
    train_watched(tmp_path, model.to("meta"), method, "meta", [Elsewhere()], labels=labels, dtype="float32")
    assert len(norms) == 1 and norms[0].is_meta


@EVERY
def test_generation_never_waits_for_the_device_once_it_has_begun(name):
    token = METHODS[name].tokenizer
    model = small(name, 3 * (name in TAKES_LABELS and name != "mae")).eval().to("meta")
    told = dict(labels=torch.zeros(4, dtype=torch.long, device="meta"), guidance=2.0) if model.classes else {}
    takes = inspect.signature(model.sample_steps).parameters
    for more in ways_to_sample(model):
        for option in [{}] + [{"temperature": 0.0}] * token + [{"eta": 0.0}] * ("eta" in takes):
            read = bool(more) and (token or name == "mae")           # once: how large each inpainting mask is
            more = {key: v.to("meta") for key, v in more.items()}
            with Elsewhere(*[torch.tensor([9, 4, 16, 9])] * read) as device:
                states = model.sample_steps(4, steps=2, **option, **told, **more)
                first = next(states)
                assert not device.answers
                assert all(model.render(state).is_meta for state in (first, *states))


@EVERY
def test_features_need_no_float64_on_the_device(name):
    model, x = small(name).eval().to("meta"), torch.zeros(4, 3, 32, 32, device="meta")
    with Elsewhere():
        for t in {0, corrupting(model)}:
            noise = model.noise(torch.arange(4, device="meta"))
            assert all(m.is_meta for m in model.features(x, t, layers=list(model.layers), noise=noise))
        assert all(model.embed(x, pool=pool).is_meta for pool in model.pools)
        assert not model.reconstructs or all(y.is_meta for y in model.reconstruct(x))


class Apples(torch.Tensor):
    """Numbers that lie on a device of Apple's, as far as they can be told: it has no float64."""

    device = property(lambda self: torch.device("mps"))

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs)
        assert not isinstance(result, cls) or result.dtype != torch.float64, "float64 on the device"
        return result


def test_closed_form_probes_need_no_float64_on_the_device():
    x, y = torch.randn(120, 8), torch.arange(120) % 3
    there = [v.as_subclass(Apples) for v in (x, y, x, y)]
    assert probe.ridge_probe(*there) == probe.ridge_probe(x, y, x, y)
    several = probe.ridge_probe(there[0][None], there[1], there[0][None], there[3])
    assert several == [probe.ridge_probe(x, y, x, y)]
    assert probe.fewshot_umd(*there, 3) == probe.fewshot_umd(x, y, x, y, 3)
    assert probe.knn(*there) == probe.knn(x, y, x, y)


def test_copies_to_apples_devices_are_waited_for(monkeypatch):
    how, x = [], types.SimpleNamespace(to=lambda device, non_blocking: how.append(non_blocking))
    for device in ("cuda:1", torch.device("mps"), "cpu"):
        unified.to_device(x, device)
    assert how == [True, False, True]


# Attention: what fused kernels take.


class Bfloat16(torch.overrides.TorchFunctionMode):
    """What autocast does on a GPU, also where there is none: matrix products and convolutions in bfloat16."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.linear, F.conv2d, F.conv1d, F.conv_transpose2d):
            args = [v.to(torch.bfloat16) if isinstance(v, torch.Tensor) else v for v in args]
        return func(*args, **(kwargs or {}))


@pytest.fixture
def attended(monkeypatch):
    """q, k, v and the dropout of every fused attention since."""
    calls, fused = [], F.scaled_dot_product_attention

    def recorded(q, k, v, dropout_p=0.0):
        calls.append((q, k, v, dropout_p))
        return fused(q, k, v, dropout_p=dropout_p)
    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    return calls


@pytest.mark.parametrize("name", [*KINDS, "difformer"])
def test_a_fused_kernel_takes_every_attention(name, attended):
    if name == "difformer":
        model, x = probe.DifFormer({1: (32, 4, 4)}, {0: [1]}, 3, heads=4), torch.zeros(4, 32, 4, 4)
    else:
        model = small(name, 0, "small" if name.startswith(("mage", "addp")) else "tiny")  # these have dropout
        x = torch.zeros(4, unified.MODELS[name].views, 3, 32, 32).squeeze(1)
    model, x = model.to("meta"), x.to("meta")
    for dtype, mode in ((torch.float32, contextlib.nullcontext()), (torch.bfloat16, Bfloat16())):
        with mode:
            model.train()(x)
            if name != "difformer":
                model.eval().features(x.reshape(-1, 3, 32, 32), layers=list(model.layers))
        assert attended and {v.dtype for call in attended for v in call[:3]} == {dtype}
        assert all(v.stride(-1) == 1 for call in attended for v in call[:3])
        dropped = {call[3] for call in attended}
        assert dropped == ({0.0, 0.1} if name.startswith(("mage", "addp")) else {0.0})
        attended.clear()


@EVERY
def test_torch_itself_chooses_a_fused_kernel(name, attended):
    model = small(name).eval()
    model.features(some_images(2, 32), layers=list(model.layers))
    fused = torch.nn.attention.SDPBackend.FLASH_ATTENTION.value
    assert attended and all(torch._fused_sdp_choice(q, k, v) == fused for q, k, v, _ in attended)


@pytest.mark.parametrize("version, first", [("2.13.0", "CUDNN_ATTENTION"), ("2.9.1", "FLASH_ATTENTION")])
def test_hopper_takes_cudnns_attention_first_unless_it_would_round_the_dropout(version, first, monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(unified, "sdpa_kernel", lambda order, set_priority: [kernel.name for kernel in order])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    order = unified.attention_kernels()
    assert order[0] == first and order[3:] == ["MATH"]
    assert sorted(order[:2]) == ["CUDNN_ATTENTION", "FLASH_ATTENTION"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert isinstance(unified.attention_kernels(), contextlib.nullcontext)


# bfloat16: where it ends, and who takes it.


@EVERY
def test_pixels_are_float32_whatever_the_network_computes_in(name):
    model, made = small(name).eval(), []
    last = model.vqgan.decoder.conv_out if METHODS[name].tokenizer else getattr(model, "to_pixels", None)
    (last or model.out[-1]).register_forward_hook(lambda layer, args, y: made.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        for options in ways_to_sample(model):
            x = [model.render(state) for state in model.sample_steps(4, steps=2, **options)]
            assert {v.dtype for v in (*x, model.sample(4, steps=2, **options))} == {torch.float32}
        if model.reconstructs:
            assert {v.dtype for v in model.reconstruct(some_images(2, 32))} == {torch.float32}
    assert set(made) == {torch.float32}


@pytest.fixture
def gpu(monkeypatch):
    """gpu(7, 5): from now on there seems to be a GPU of this CUDA capability."""
    def pretend(*capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(unified, "pick_device", torch.device)
    return pretend


@pytest.mark.parametrize("capability, dtype", [((7, 0), "float32"), ((7, 5), "float32"),
                                               ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_bfloat16_is_the_default_where_it_is_computed_in(capability, dtype, gpu, monkeypatch):
    gpu(*capability)
    monkeypatch.setattr(unified, "join_processes", torch.device)
    monkeypatch.setattr(sample, "run", lambda cfg, device: settled.append(cfg.dtype))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # looks for the device
    for device, expected in (("cuda", dtype), ("cuda:1", dtype), ("cpu", "float32"), ("mps", "float32")):
        settled = [unified.pick_dtype(None, device), train.settings(train.Config(device=device)).dtype,
                   probe.settle(probe.Config(run="", device=device)).dtype]
        monkeypatch.setattr(unified, "parse_flags", lambda *_: dict(run="", device=device))
        sample.main()
        assert set(settled) == {expected}
    assert train.settings(train.Config(device="cuda", dtype="float32")).dtype == "float32"
    assert probe.settle(probe.Config(run="", device="cuda", dtype="float32")).dtype == "float32"


def test_a_containers_limits_of_cores_and_memory_are_kept(tmp_path):
    cores, memory = unified.usable_cores(tmp_path), probe.machine_memory(tmp_path)      # no container
    assert 1 <= cores <= os.cpu_count() and memory > 2**28
    for text, expected in (("max 100000", cores), ("150000 100000", min(2, cores)), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(text + "\n")
        assert unified.usable_cores(tmp_path) == expected
    for text, expected in (("max", memory), (str(2**27), 2**27), (str(2**70), memory)):
        (tmp_path / "memory.max").write_text(text + "\n")
        assert probe.machine_memory(tmp_path) == expected


def test_without_a_compiler_blocks_run_as_they_are_and_a_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(probe.shutil, "which", lambda name: None)
    model, x = small("umd").eval(), some_images(2, 32)
    probe.compile_blocks(model)
    assert "torch.compile needs a C compiler" in capsys.readouterr().out
    assert all(block._compiled_call_impl is None for block in model.blocks)


def test_a_device_that_is_not_there_is_refused_in_a_sentence():
    for name in ("hpu", "cuda:99", "gpu"):
        with pytest.raises(unified.UserError, match=f"--device {name} is not available here"):
            unified.pick_device(name)


def test_crops_at_the_border_repeat_its_pixels():
    """As padding_mode="border" would, which some devices lack."""
    for side in (8, 32, 96):
        data = probe.ImageTensor(some_images(3, side).mul(255).byte(), torch.zeros(3), ["a"], (0.2, 1.0))
        crops, grids, real = torch.arange(3) * 7, [], F.grid_sample
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "affine_grid", lambda *args, real=F.affine_grid, **more:
                          grids.append(real(*args, **more)) or grids[-1])
            cut = data.crop(data.images / 255, crops)
        assert_close(cut, real(data.images / 255, grids[0], padding_mode="border", align_corners=False), 1e-5)


@pytest.mark.parametrize("processor, instructions, warned", [
    ("x86_64", "AVX2", True), ("AMD64", "DEFAULT", True), ("x86_64", "AVX512", False),
    ("arm64", "DEFAULT", False)])
def test_bfloat16_that_a_processor_only_emulates_is_warned_of(processor, instructions, warned, monkeypatch,
                                                              capsys):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    monkeypatch.setattr(unified.platform, "machine", lambda: processor)
    for settle, Config in (train.settings, train.Config), (probe.settle, functools.partial(probe.Config, "")):
        assert settle(Config(device="cpu", dtype="bfloat16")).dtype == "bfloat16"
        assert ("warning: bfloat16 is only emulated" in capsys.readouterr().out) == warned
    assert unified.pick_dtype("float32", "cpu") == unified.pick_dtype(None, "cpu") == "float32"
    assert not capsys.readouterr().out


@pytest.mark.parametrize("capability, warned", [((7, 5), True), ((8, 0), False)])
def test_bfloat16_that_a_gpu_only_emulates_is_warned_of(capability, warned, gpu, capsys):
    gpu(*capability)
    assert unified.pick_dtype("bfloat16", "cuda") == "bfloat16"
    assert ("warning: bfloat16" in capsys.readouterr().out) == warned


def test_a_probe_compiles_on_a_gpu_and_not_on_a_cpu(gpu):
    gpu(8, 0)
    for device, compile in (("cuda", True), ("cuda:1", True), ("cpu", False), ("mps", False)):
        assert probe.settle(probe.Config(run="", device=device)).compile == compile
    assert not probe.settle(probe.Config(run="", device="cuda", compile=False)).compile


def test_a_compiled_probe_finds_what_the_plain_one_does(graphs, monkeypatch):
    found, config = [], {"arch": unified.model_config("umd", "tiny", 32, 4)}
    data = probe.ImageTensor(*unified.draw_shapes(torch.arange(40), 32), list(unified.SHAPES), (1.0, 1.0))
    monkeypatch.setattr(unified, "load_model",
                        lambda *_, **__: (unified.build(config["arch"]).eval(), config))
    monkeypatch.setattr(probe, "open_sets", lambda *_: ("", data, data))
    monkeypatch.setattr(probe, "report", lambda wanted, labels, results, *rest: found.append(results))
    for compile in (False, True):
        torch.manual_seed(0)
        probe.run(settings(head="knn", compile=compile), True)
        assert len(graphs) == compile  # one for all blocks, none for a single image
    assert found[0] == found[1]


def test_the_head_of_finetuning_is_float32_beside_a_network_in_bfloat16(monkeypatch):
    model, seen = small("mage"), []

    def loss(logits, x, y):
        seen.append(logits(x))
        return seen[0].sum()
    monkeypatch.setattr(probe, "mixup_loss", loss)
    cfg = settings(head="finetune", dtype="bfloat16", batch_size=8, epochs=1, lr=1e-3)
    data = probe.ImageTensor((255 * some_images(8, 32)).byte(), torch.arange(8) % 2, ["a", "b"], (1.0, 1.0))
    probe.finetune(model, data, torch.arange(8), data, 1.0, "", cfg)
    assert seen[0].dtype == torch.float32 and not seen[0].equal(seen[0].bfloat16().float())


# Compiled blocks and DistributedDataParallel.


def test_ddp_leaves_compiled_blocks_whole(graphs):
    """A block is as large as three of DDP's buckets here. By default torch would cut it where these end."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        numbers = []
        parallel = functools.partial(torch.nn.parallel.DistributedDataParallel, bucket_cap_mb=1)
        for wrap in (lambda net: net, parallel):
            torch._dynamo.reset()
            graphs.clear()
            model = mage(width=256, decoder_width=256, decoder_heads=4)
            probe.compile_blocks(model)
            net = wrap(model)
            for _ in range(2):
                net(some_ids(model))[0].backward()
            numbers.append(len(graphs))
        assert numbers == [2, 2]
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------
# Speed


def block_operations(n, d):
    """Of a block's forward pass over n tokens of width d: four projections, two layers of 4 d, and two
    products with the attention map."""
    return 24 * n * d ** 2 + 4 * n ** 2 * d


def mage_operations(C, depth, decoder, L=256, K=1024):
    D, decoder_depth, seen = decoder[0], decoder[1], 1 + L - math.ceil(L / 2)
    encoder, decoder = depth * block_operations(seen, C), decoder_depth * block_operations(1 + L, D)
    forward = encoder + 2 * seen * C * D + decoder + 2 * L * (D * C + C * K)
    return 3 * forward - 2 * L * C * K                       # the embeddings get no gradient as output matrix


def umd_operations(D, depth, decoder_depth, L=256, p=4):
    clean, noised, patch = 4 + L // 4, 4 + int(L * 0.625), 2 * L * D * 3 * p * p
    blocks = sum(depth * block_operations(n, D) + decoder_depth * block_operations(1 + L, D)
                 for n in (clean, noised)) / 2
    told = 2 * (depth + decoder_depth) * 6 * D * D + 2 * 4 * D * D + 2 * 2 * D * D
    # to_pixels has twice the channels; pixels get no gradient
    return 3 * (blocks + told + 2 * patch) + 2 * patch - patch


@pytest.mark.parametrize("name, size, pixels, formula, published", [
    ("mage", "base", 256, mage_operations(768, 12, (768, 8)), 162.7e9),
    ("mage", "large", 256, mage_operations(1024, 24, (1024, 8)), 404.9e9),
    ("umd", "base", 64, umd_operations(768, 12, 4), 107.5e9)])
def test_operations_are_those_of_the_formulas(name, size, pixels, formula, published):
    tokenizer = unified.tokenizer_config("base", 16) if unified.MODELS[name].tokenizer else None
    with torch.device("meta"):
        model = unified.build(unified.model_config(name, size, pixels, 16, tokenizer))
        x = torch.zeros(2, 256, dtype=torch.long) if tokenizer else torch.zeros(2, 3, pixels, pixels)
    counted = train.step_operations(model, x) / 2
    assert counted == pytest.approx(formula, rel=0.01) and counted == pytest.approx(published, rel=0.03)
    if (name, size) == ("mage", "base"):
        with_tokenizer = train.step_operations(model, torch.zeros(2, 3, 256, 256, device="meta")) / 2
        assert with_tokenizer - counted == pytest.approx(128.6e9, rel=0.01)


def test_the_benchmark_compares_with_the_plain_path(monkeypatch):
    monkeypatch.setattr(train, "SECONDS", 0.01)
    printed = script("train.py", "--benchmark", "--batch-size", 4, "--device", "cpu")
    assert "of the product" in printed and "plain path" in printed and "times as long" in printed
    losses = [float(line.split("loss")[1].split()[0]) for line in printed.splitlines() if "loss" in line
              and "every step" not in line]
    assert len(losses) == 2 and losses[0] == pytest.approx(losses[1], abs=2e-3)


@pytest.fixture
def graphs(monkeypatch):
    """What torch.compile has traced since; the traces run as they are, without a compiler. What it cannot
    trace whole raises."""
    made, compile = [], nn.Module.compile

    def run_as_it_is(graph, inputs):
        made.append(graph)
        return graph.forward
    traced = functools.partialmethod(compile, backend=run_as_it_is, fullgraph=True)
    monkeypatch.setattr(nn.Module, "compile", traced)
    torch._dynamo.reset()
    yield made
    torch._dynamo.reset()


def compiled(name):
    """A small model with compiled blocks."""
    model = small(name)
    probe.compile_blocks(model)
    return model


@EVERY
def test_compiled_blocks_compute_the_same_loss(name, graphs):
    losses = []
    for model in (compiled(name), small(name)):
        torch.manual_seed(0)
        losses.append(model(batch(name))[0])
    assert graphs and losses[0].equal(losses[1])


def test_blocks_of_one_shape_are_compiled_once(graphs):
    model = compiled("mage")
    for _ in range(2):
        model(some_ids(model))[0].backward()
    assert len(graphs) == 2          # for the encoder's blocks, which read half of the ids, and the decoder's
    model.vqgan.decode(torch.zeros(1, 4, 4, dtype=torch.long))
    assert len(graphs) == 2 + 4                                         # 4, 8, 16 and 32 pixels


def test_addps_decoder_is_compiled_once_for_any_number_of_tokens(graphs):
    model = compiled("addp")
    for index in (0, 10, 30, 60):
        model(some_ids(model), index=index)
        first = len(graphs) if index == 0 else first
    assert len(graphs) == first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@EVERY
def test_no_step_waits_for_the_gpu_or_takes_the_slow_attention(name, tmp_path):
    method = unified.MODELS[name]
    tokenizer_arch = unified.tokenizer_config("tiny", 4) if method.tokenizer else None
    model = unified.build(unified.model_config(name, "small", 64, 16, tokenizer_arch)).to("cuda")
    from torch.nn.attention import SDPBackend, sdpa_kernel

    @contextlib.contextmanager
    def no_waiting():
        torch.cuda.set_sync_debug_mode("error")
        yield
        torch.cuda.set_sync_debug_mode("default")
    watches = [contextlib.nullcontext() for _ in range(3)] + [no_waiting() for _ in range(10)]
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION,
                      SDPBackend.EFFICIENT_ATTENTION]):      # all but the slow one
        train_watched(tmp_path, model, method, "cuda", watches, size=64, dtype="bfloat16")
    torch.cuda.set_sync_debug_mode("default")
def test_addp_trains_on_the_ids_of_its_predictor_then_samples_and_is_probed(photos, finished, tmp_path):
    run, (ids,) = tmp_path / "run", finished[0].glob("ids-*.npy")
    before = ids.read_bytes()
    printed = script("train.py", *flags(photos, run, "--model", "addp", "--predictor", finished[0],
                                        "--micro-batch", 4))
    assert "untrained" in printed and not [*run.glob("ids*")] and not (run / "tokenizer.pt").exists()
    assert [*finished[0].glob("ids*")] == [ids] and ids.read_bytes() == before
    ours, theirs = (unified.load_checkpoint(folder / "model.pt")["model"] for folder in (run, finished[0]))
    assert all(ours[f"token_predictor.{k}"].equal(v) for k, v in theirs.items())
    assert '"held_out"' in (run / "log.jsonl").read_text()
    script("sample.py", run, "--image", next((photos / "val" / "cat").iterdir()), "--box", "4,4,12,12", "--n",
           1, "--gif", "--steps", 4)
    assert PIL.Image.open(run / "painted-0.gif").n_frames == 4
    assert probed(run, "--head", "finetune", "--epochs", 1, "--batch-size", 16)[1][0]["head"] == "finetune"


def test_a_run_that_starts_from_another_keeps_the_ids_that_it_has_learned(photos, finished, tmp_path):
    begun = flags(photos, tmp_path / "run", "--labels", "--init", finished[0], "--seed", 5)
    printed = script("train.py", *begun)
    assert "fresh: none" in printed and f"tokenizer: {finished[0]}" in printed
    assert not (tmp_path / "run" / "tokenizer.pt").exists()                 # nor is another one trained
    ours, theirs = (unified.load_checkpoint(folder / "model.pt")["model"]
                    for folder in (tmp_path / "run", finished[0]))
    assert all(v.equal(theirs[k]) for k, v in ours.items() if k.startswith("vqgan."))
    unlike = flags(photos, tmp_path / "unlike", "--init", finished[0])
    assert "--labels must be as there" in script("train.py", *unlike, expect=2)
    assert "leave --tokenizer" in script("train.py", *begun, "--tokenizer", finished[0], expect=2)
    assert "holds mage, not mage-c" in script("train.py", *flags(photos, tmp_path / "c", "--model", "mage-c",
                                                                  "--init", finished[0]), expect=2)


def test_a_run_begun_from_another_has_its_number_of_patches_unless_told_otherwise(tmp_path):
    torch.save({"config": {"image_size": 32, "ids": 16}}, tmp_path / "model.pt")
    given = {"dataset": "shapes", "model": "umd", "init": str(tmp_path)}
    assert train.settings(train.Config(**given)).ids == 16
    assert train.settings(train.Config(**given, ids=64)).ids == 64


def test_views_that_were_asked_for_are_taken():
    def views(**given):
        return train.settings(train.Config(model="mage-c", **given)).views
    assert [views(), views(views=2), views(views=3), views(views=5), views(views=0)] == [4, 2, 3, 5, 0]
    assert_refused("--views 1 keeps one", views, views=1)


def test_ids_of_a_training_that_replaced_images_are_none_of_one_that_is_strict(tmp_path):
    make_images(tmp_path / "data", [f"{i}.png" for i in range(24)])
    data = probe.open_data(str(tmp_path / "data"), "", 8, True)
    train.cache_ids(tmp_path, tokenizer(2), data, 1)
    data.strict = True
    train.cache_ids(tmp_path, tokenizer(2), data, 1)
    assert len(list(tmp_path.glob("ids-*.npy"))) == 2


def test_images_to_test_on_that_cannot_be_read_are_told_before_any_training(photos, tmp_path):
    split = tmp_path / "split"
    shutil.copytree(photos / "train", split / "train")
    for name in ("cat", "dog"):
        (split / "val" / name).mkdir(parents=True)
        whole = next((photos / "val" / name).iterdir()).read_bytes()
        (split / "val" / name / "a.png").write_bytes(whole[:60])
    printed = script("train.py", *flags(split, tmp_path / "run", "--model", "umd", "--views", 1), expect=2)
    assert "none of the images to test on can be read" in printed and not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag, file, side", [
    ("tokenizer", "", 32), ("tokenizer", "tokenizer.pt", 32), ("predictor", "model.pt", 32), ("init", "", 32),
    ("tokenizer", "other.pt", 64)])
def test_a_run_built_on_another_has_its_image_size_unless_told_otherwise(tmp_path, flag, file, side):
    for name in ("tokenizer.pt", "model.pt", "other.pt"):
        torch.save({"config": {"image_size": 32}}, tmp_path / name)
    given = {"dataset": str(tmp_path), "model": "addp" if flag == "predictor" else "mage-c",
             flag: str(tmp_path / file)}
    assert train.settings(train.Config(**given)).image_size == side
    assert train.settings(train.Config(**given, image_size=64)).image_size == 64
    torch.save({"weights": 1}, tmp_path / "model.pt")                       # of another program
    assert train.config_of_run(str(tmp_path)) == {}


def test_a_predictor_that_is_missing_or_unfit_ends_in_one_sentence(photos, finished, tmp_path):
    def refused(*more):
        printed = script("train.py", *flags(photos, tmp_path / "run", "--model", "addp", *more), expect=2)
        *found, said = printed.splitlines()
        assert not found or len(found) == 5 and "to test on" in found[0]       # what the folder holds
        return said
    first = f"run python train.py --dataset {photos} --image-size 32 --model mage"
    assert f"{first}, then this with --predictor out/{photos.name}-mage" in refused()
    assert "--image-size 64" in refused("--predictor", finished[0], "--image-size", 64)
    assert "belongs to --model addp" in refused("--predictor", finished[0], "--labels")


# ------------------------------------------------------------------------------------------------------------
# Plumbing. Processes are forked from one that has imported everything, since that takes longer than what most
# of them do. Each leads a group of its own, which dies with it, at the latest after LIMIT seconds.


@pytest.fixture(scope="session")
def terminal(pytestconfig):
    """A file that pytest does not capture."""
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        return os.fdopen(os.dup(2), "w")


@pytest.fixture(autouse=True)
def the_same_draws_as_many_threads_and_at_most_ten_minutes_every_time(terminal):
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    # says where it hangs, and ends the suite
    faulthandler.dump_traceback_later(600, exit=True, file=terminal)
    yield
    faulthandler.cancel_dump_traceback_later()
    torch.set_num_threads(threads)


LIMIT = 240
FORKS = torch.multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["test_unified", "torch._dynamo"])       # which optimizers import, slowly


def act(printed, environment, call, args):
    """What a started process does."""
    os.setsid()
    file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    threads = int(environment.pop("threads"))
    os.environ.update(environment)
    torch.set_num_threads(threads)
    call(*args)


def start(printed, call, *args, **environment):
    """A process that calls call(*args); it prints into the file printed."""
    environment.setdefault("threads", str(torch.get_num_threads()))     # another number rounds another way
    process = FORKS.Process(target=act, args=(str(printed), environment, call, args))
    process.start()
    process.printed = pathlib.Path(printed)
    return process


def finish(process, seconds=LIMIT):
    """Wait for it; returns its exit code, negative for a signal, and what it printed. All that it has
    started is killed."""
    process.join(seconds)
    code, printed = process.exitcode, ""
    if process.printed.exists():
        printed = process.printed.read_text(errors="replace")
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    assert code is not None, f"still running after {seconds} seconds; it had printed\n{printed}"
    return code, printed


def until(condition, process, seconds=LIMIT):
    """Wait for a condition that a running process brings about."""
    end = time.monotonic() + seconds
    while not condition() and process.is_alive() and time.monotonic() < end:
        time.sleep(0.005)
    if not condition():
        pytest.fail(f"it never came to that; {finish(process, 0.1)}")


def start_two(folder, call, *args):
    """Two processes that meet as those of torchrun do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [start(folder / f"printed-{rank}", call, *args, RANK=str(rank), LOCAL_RANK=str(rank),
                  WORLD_SIZE="2",
                  MASTER_ADDR="127.0.0.1", MASTER_PORT=port, threads="1") for rank in range(2)]


def both(folder, call, *args):
    """What two processes printed that must end well."""
    ended = [finish(process) for process in start_two(folder, call, *args)]
    assert [code for code, _ in ended] == [0, 0], ended
    return "".join(printed for _, printed in ended)


def run_script(name, args, before=None):
    """`python NAME ARGS`, after before(), in a process of its own."""
    sys.argv = [str(HERE / name), *map(str, args)]
    if before:
        before()
    unified.run_main(importlib.import_module(name.removesuffix(".py")).main)


def test_the_tutorials_probe_finds_classes_where_they_are_and_nowhere_else():
    _, labels = unified.draw_shapes(torch.arange(10**6, 10**6 + 2000), 32)
    torch.manual_seed(0)
    for z, low, high in ((F.one_hot(labels, 8).float(), 1.0, 1.0), (torch.randn(2000, 8), 0.05, 0.2)):
        model = types.SimpleNamespace(embed=lambda x, z=z: z)
        assert all(low <= unified.linear_probe(model, labelled) <= high for labelled in (40, 1000))


@pytest.mark.parametrize("method", ["mage", "addp", "umd", "adm"])
def test_the_tutorial_runs_and_writes_its_samples(method, tmp_path, monkeypatch, capsys):
    sample = unified.Model.sample
    monkeypatch.setattr(unified.Model, "sample", lambda model, n, steps: sample(model, n, steps=2))
    monkeypatch.setattr(unified, "linear_probe", lambda *_: 0.5)
    unified.main(method, tokenizer_steps=8, steps=8, out=tmp_path / "shapes.png")
    printed = capsys.readouterr().out.splitlines()
    trained = {"mage": ["TokenizerTraining", "MAGE"], "addp": ["TokenizerTraining", "MAGE", "ADDP"],
               "umd": ["UMD"], "adm": ["ADM"]}[method]
    assert [line.split()[0] for line in printed] == [*trained, "linear", "linear", "wrote"]
    assert method in ("umd", "adm") or float(printed[1].split()[-1]) < 2 * math.log(128)
    assert PIL.Image.open(tmp_path / "shapes.png").width > 1000
