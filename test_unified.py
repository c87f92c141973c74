"""The proof of unified.py, in the same order: read the two side by side. A test is named after the sentence that it proves.

Tests with `golden` in their names compare with numbers that the authors' own code computed on tiny networks: assets/golden/*.pt,
or files of the same form in the folder $UNIFIED_GOLDEN. All sizes come from the file, none from here.
The other tests need nothing but this folder: no data, no network, no GPU.  Run: python -m pytest -q
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
import train
import unified

torch.set_num_threads(1)                                                # several wait for each other in a loop, and on a busy machine for minutes

HERE = pathlib.Path(__file__).parent
GOLDEN = pathlib.Path(os.environ.get("UNIFIED_GOLDEN", HERE / "assets/golden"))
PUBLISHED_FAKE_CLASS = 76                                               # id 1100 = 1024 codes + class 76, by an accident in the original

# ---------------------------------------------------------------------------------------------------------------------------
# What the tests share: how near is near, the golden files, and networks small enough to run a hundred times


@pytest.fixture(scope="session")
def terminal(pytestconfig):
    """A file that pytest does not capture."""
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        return os.fdopen(os.dup(2), "w")


@pytest.fixture(autouse=True)
def the_same_draws_as_many_threads_and_at_most_ten_minutes_every_time(terminal):
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    faulthandler.dump_traceback_later(600, exit=True, file=terminal)    # says where it hangs, and ends the suite
    yield
    faulthandler.cancel_dump_traceback_later()
    torch.set_num_threads(threads)


def assert_close(ours, theirs, rtol=1e-4):
    """Same shape, and no element further off than rtol of the largest magnitude. (A NaN is further off than anything.)"""
    ours, theirs = (torch.as_tensor(v).detach().double() for v in (ours, theirs))
    assert ours.shape == theirs.shape
    error, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert error <= rtol * scale, f"off by {error:.3g} where the largest magnitude is {scale:.3g}"


def golden(name):
    """A golden file's config, state_dict, inputs and outputs, as attributes."""
    return types.SimpleNamespace(**torch.load(GOLDEN / f"{name}.pt", weights_only=True))


def golden_vqgan():
    g = golden("vqgan")
    vqgan = unified.VQGAN(**unified.published_tokenizer(g.state_dict))
    vqgan.load_state_dict(g.state_dict)
    return g, vqgan.eval()


def golden_mage():
    """The golden file, our model with its weights, and the names it holds that our model does not have."""
    g = golden("mage")
    config, state, dead = unified.published_mage(g.state_dict, heads=(g.config["num_heads"], g.config["decoder_num_heads"]))
    fake = g.config["fake_class_label"] - g.config["codebook_size"]
    if fake != PUBLISHED_FAKE_CLASS:                                                        # else published_mage must know it by itself
        config["fake_class"] = fake
    model = unified.build(config)
    model.load_state_dict(state)
    return g, model.eval(), dead


def tokenizer(levels=3, codes=32, seed=0):
    """A VQGAN with fresh weights; stride 4 unless said otherwise."""
    torch.manual_seed(seed)
    return unified.VQGAN(codes, 8, 8, [1] * levels, 1, groups=4).eval()


def mage(image_size=16, vqgan=None, sharp=False, **options):
    """A fresh MAGE in eval mode; 4 x 4 ids below 32 unless said otherwise. sharp: larger words, so that its guesses differ."""
    vqgan = vqgan or tokenizer()
    torch.manual_seed(1)
    sizes = dict(width=32, depth=2, heads=4, decoder_width=24, decoder_depth=2, decoder_heads=3)
    model = unified.MAGE(vqgan, image_size, **{**sizes, **options}).eval()
    if sharp:
        nn.init.normal_(model.token_emb.word_embeddings.weight)
    return model


def some_ids(model, n=4, seed=2):
    return torch.randint(model.codes, (n, model.length), generator=torch.Generator().manual_seed(seed))


def some_noise(*shape, seed=3):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def some_pictures(n=4, side=16, seed=4):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def forbidden(*args, **kwargs):
    raise AssertionError("this must not run")


# Processes. They are forked from one that has imported everything, since that takes longer than what most of them do. Each leads a
# group of its own, which dies with it, at the latest after LIMIT seconds.

LIMIT = 240
FORKS = torch.multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["test_unified"])


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
    """Wait for it; returns its exit code, negative for a signal, and what it printed. All that it has started is killed."""
    process.join(seconds)
    code, printed = process.exitcode, process.printed.read_text(errors="replace") if process.printed.exists() else ""
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
    return [start(folder / f"printed-{rank}", call, *args, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
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


# ---------------------------------------------------------------------------------------------------------------------------
# 0. The file itself


def test_no_function_is_longer_than_a_screen():
    for node in ast.walk(ast.parse((HERE / "unified.py").read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_unified_needs_four_packages_only():
    imports = [n for n in ast.walk(ast.parse((HERE / "unified.py").read_text())) if isinstance(n, (ast.Import, ast.ImportFrom))]
    names = {name.split(".")[0] for n in imports for name in ([n.module] if isinstance(n, ast.ImportFrom) else [a.name for a in n.names])}
    assert names - set(sys.stdlib_module_names) == {"torch", "numpy", "PIL", "tqdm"}


def test_nothing_stands_in_the_readmes_table_of_faults_without_a_test():
    table = (HERE / "README.md").read_text().split("## When something goes wrong")[1].split("## ")[0]
    names = [name for row in table.splitlines() if row.startswith("| ") for name in re.findall(r"`(\w+)`", row.split("|")[-2])]
    tests = [name for name in globals() if name.startswith("test_")]
    assert len(names) > 15 and [name for name in names if not any(name in test for test in tests)] == []


def test_no_two_tests_have_one_name():
    names = [node.name for node in ast.parse(pathlib.Path(__file__).read_text()).body if isinstance(node, ast.FunctionDef)]
    assert sorted(names) == sorted(set(names))


# ---------------------------------------------------------------------------------------------------------------------------
# 1. Attention


def test_fused_attention_is_the_equation():
    results = []
    for fused in (True, False):
        torch.manual_seed(0)                                            # the same weights and input
        layer, x, weight = unified.Attention(32, 4, fused=fused), torch.randn(2, 9, 32, requires_grad=True), torch.randn(2, 9, 32)
        y = layer(x)
        results.append([y, *torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()])])
    for ours, spelled_out in zip(*results):
        assert_close(ours, spelled_out, 1e-5)


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="this kernel runs on a GPU, and there is none")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_attention_in_bfloat16_is_the_equation_in_float32(device):        # on a GPU by the fused kernel
    layer, x = unified.Attention(128, 4).to(device), torch.randn(4, 257, 128).to(device)
    with torch.autocast(device, torch.bfloat16):
        fused = layer(x)
    layer.fused = False
    assert fused.dtype == torch.bfloat16
    assert_close(fused, layer(x), 1e-2)                                 # a bfloat16 has three digits


def test_attention_refuses_a_width_that_heads_do_not_divide():
    with pytest.raises(ValueError, match="30.*4"):
        unified.Attention(30, 4)


def test_a_block_does_not_know_the_order_of_its_tokens():
    block, x, order = unified.Block(32, 4), torch.randn(2, 9, 32), torch.randperm(9)
    assert_close(block(x)[:, order], block(x[:, order]), 1e-5)


def test_dropout_acts_in_five_places_in_training_and_nowhere_otherwise(monkeypatch):
    rates, dropout, attention = [], F.dropout, F.scaled_dot_product_attention
    monkeypatch.setattr(F, "dropout", lambda x, p=0.5, training=True, *a: rates.append(p * training) or dropout(x, p, training, *a))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, dropout_p, **k: rates.append(dropout_p) or attention(*a, **k))
    model = mage()
    model(some_ids(model))
    assert not any(rates)
    rates.clear()
    model.train()(some_ids(model))
    assert [r for r in rates if r] == [0.1] * (1 + 4 * 4)              # the embedding; four in each of 2 + 2 blocks


# ---------------------------------------------------------------------------------------------------------------------------
# 2. The tokenizer


def test_golden_tokenizer_sizes_are_read_off_the_shapes():
    g, vqgan = golden_vqgan()
    config, official = unified.published_tokenizer(g.state_dict), g.config["ddconfig"]
    assert [config[k] for k in ("ch", "ch_mult", "blocks")] == [official[k] for k in ("ch", "ch_mult", "num_res_blocks")]
    assert [config[k] for k in ("codebook_size", "codebook_dim")] == [g.config[k] for k in ("n_embed", "embed_dim")]
    assert vqgan.stride == g.inputs["image"].size(-1) // g.outputs["indices"].size(-1)


def test_golden_tokenizer_turns_pictures_into_ids():
    g, vqgan = golden_vqgan()
    assert_close(vqgan.encoder(g.inputs["image"]), g.outputs["pre_quant"])
    assert vqgan.encode(g.inputs["image"]).equal(g.outputs["indices"])


def test_golden_tokenizer_turns_ids_into_pictures():
    g, vqgan = golden_vqgan()
    codes = vqgan.quantize.lookup(g.outputs["indices"])
    rounded = unified.straight_through(vqgan.encoder(g.inputs["image"]), codes)
    assert codes.equal(g.outputs["codebook_entry"])
    assert_close(rounded, g.outputs["quant_straight_through"])
    assert_close(vqgan.decoder(rounded), g.outputs["reconstruction"])
    assert_close(vqgan.decode(g.outputs["indices"]), g.outputs["decode_from_indices"])
    assert_close(vqgan.decode(g.inputs["random_indices"]), g.outputs["decode_random_indices"])


def test_golden_quantiser_loss_and_its_gradients():
    g, vqgan = golden_vqgan()
    seen = []
    vqgan.encoder.register_forward_hook(lambda module, args, z: seen.append(z))
    logs = unified.TokenizerTraining(vqgan)(g.inputs["image"])[1]
    # The legacy form has beta on the codebook's term; TokenizerTraining weighs them the right way round.
    weights = (1.0, g.config["beta"]) if g.config["legacy"] else (g.config["beta"], 1.0)
    loss = weights[0] * logs["commitment"] + weights[1] * logs["codebook"]
    assert_close(loss, g.outputs["quantizer_loss"])
    rounded = unified.straight_through(seen[0], vqgan.quantize.lookup(g.outputs["indices"]))
    loss = loss + (rounded * g.inputs["grad_upstream"]).sum()
    grad_z, grad_codebook = torch.autograd.grad(loss, [seen[0], vqgan.quantize.embedding.weight])
    assert_close(grad_z, g.outputs["grad_z"])
    assert_close(grad_codebook, g.outputs["grad_codebook"])


def test_golden_reconstruction_error_is_what_the_tokenizer_trains_on():
    g, vqgan = golden_vqgan()
    logs, error = unified.TokenizerTraining(vqgan)(g.inputs["image"])[1], g.outputs["reconstruction"] - g.inputs["image"]
    assert_close(logs["l1"], error.abs().mean())
    assert_close(logs["l2"], (error ** 2).mean())


def test_where_the_width_changes_the_output_goes_through_the_shortcut():
    same, wider, x = unified.ResBlock(8, 8, 4), unified.ResBlock(8, 16, 4), torch.randn(2, 8, 5, 5)
    branch = [b.conv2(F.silu(b.norm2(b.conv1(F.silu(b.norm1(x)))))) for b in (same, wider)]
    assert_close(same(x), branch[0] + x, 1e-6)
    assert_close(wider(x), branch[1] + wider.nin_shortcut(branch[1]), 1e-6)


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_the_stride_follows_from_the_levels(levels):
    vqgan, x = tokenizer(levels), some_pictures(2, 16)
    assert vqgan.stride == 2 ** (levels - 1)
    assert vqgan.encode(x).shape == (2, 16 // vqgan.stride, 16 // vqgan.stride)
    assert vqgan.decode(vqgan.encode(x)).shape == x.shape


def test_every_position_gets_its_nearest_code():
    vqgan, x = tokenizer(), some_pictures()
    z, codes = vqgan.encoder(x), vqgan.quantize.embedding.weight
    nearest = (z.movedim(1, -1)[..., None, :] - codes).norm(dim=-1).argmin(-1)              # every difference written out
    assert vqgan.encode(x).equal(nearest) and len(nearest.unique()) > 8
    assert vqgan.quantize.lookup(nearest).movedim(1, -1).equal(codes[nearest])


def test_distances_stay_in_float32_under_autocast():
    vqgan = tokenizer()
    z = vqgan.encoder(some_pictures())
    with torch.autocast("cpu", torch.bfloat16):
        lower = vqgan.quantize.distances(z)
    assert lower.dtype == torch.float32 and lower.equal(vqgan.quantize.distances(z))


def test_straight_through_has_the_value_of_the_code_and_the_gradient_of_z():
    z, codes = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4, requires_grad=True)
    y = unified.straight_through(z, codes)
    y.square().sum().backward()
    assert_close(y, codes, 1e-6)
    assert_close(z.grad, 2 * codes, 1e-6)
    assert codes.grad is None


def test_entropy_gap_lies_between_minus_ln_k_and_zero():
    K = 16
    undecided, all_the_same = torch.zeros(64, K), F.one_hot(torch.zeros(64).long(), K) * -1.0
    each_its_own = F.one_hot(torch.arange(64) % K, K) * -1.0
    assert abs(unified.entropy_loss(undecided)) < 1e-3                  # no position is sure. (1e-3: there is a 1e-5 inside the log.)
    assert abs(unified.entropy_loss(all_the_same)) < 1e-3               # all are sure of the same code
    assert abs(unified.entropy_loss(each_its_own) + math.log(K)) < 1e-3                      # sure, and all codes in use: the best
    assert -math.log(K) < unified.entropy_loss(torch.rand(64, K) * 0.05) < 0


def test_commitment_moves_the_encoder_and_the_codebook_term_moves_the_codes():
    training = unified.TokenizerTraining(tokenizer())
    logs = training(some_pictures())[1]
    z, codes = training.vqgan.encoder.conv_out.weight, training.vqgan.quantize.embedding.weight
    for term, moved in [("commitment", (True, False)), ("codebook", (False, True)), ("l1", (True, False)), ("l2", (True, False))]:
        grads = torch.autograd.grad(logs[term], [z, codes], retain_graph=True, allow_unused=True)
        assert tuple(g is not None and g.abs().max().item() > 0 for g in grads) == moved, term
    assert training.WEIGHTS["commitment"] < training.WEIGHTS["codebook"]                    # not the legacy form


def test_generator_and_discriminator_do_not_touch_each_other():
    training = unified.TokenizerTraining(tokenizer())
    logs = training(some_pictures(), adversarial_weight=0.8)[1]
    names, parameters = zip(*training.named_parameters())
    for term, owner in [("generator", "vqgan"), ("discriminator", "discriminator")]:
        grads = torch.autograd.grad(logs[term], parameters, retain_graph=True, allow_unused=True)
        assert {k.split(".")[0] for k, g in zip(names, grads) if g is not None and g.abs().max() > 0} == {owner}


def test_the_adversarial_gradient_is_as_long_as_the_reconstructions():
    training = unified.TokenizerTraining(tokenizer())
    logs, last = training(some_pictures(), adversarial_weight=0.8)[1], training.vqgan.decoder.conv_out.weight
    lengths = [torch.autograd.grad(t, last, retain_graph=True)[0].norm() for t in (logs["generator"], logs["l1"] + logs["l2"])]
    assert_close(*lengths, 1e-3)                                        # not equal: 1e-4 keeps the ratio finite


def test_the_tokenizers_loss_is_the_weighted_sum_of_its_terms():
    training = unified.TokenizerTraining(tokenizer())
    loss, logs = training(some_pictures(), adversarial_weight=0.8)
    weights = {**training.WEIGHTS, "generator": 0.8, "discriminator": 1.0}
    assert_close(loss, sum(weights[k] * logs[k] for k in weights), 1e-6)
    assert "generator" not in training(some_pictures())[1]              # during the warm-up the discriminator does not even run


def trained_tokenizer(entropy, monkeypatch):
    """60 steps on 64 shapes of 16 x 16 pixels: errors of the first and the last step, and how many of 64 codes are used."""
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


# ---------------------------------------------------------------------------------------------------------------------------
# 3. What is hidden, and random numbers by name


def test_the_hidden_share_follows_the_truncated_normal_law():
    quantiles = {.01: .50347, .05: .51726, .10: .53437, .25: .58557, .50: .67567, .75: .78681, .90: .88478, .95: .93232, .99: .98377}
    share = unified.truncated_normal(torch.tensor(list(quantiles)))
    assert (share - torch.tensor(list(quantiles.values()))).abs().max() < 1e-5              # scipy.stats.truncnorm, five digits
    spread = unified.truncated_normal((torch.arange(100_000).double() + 0.5) / 100_000)
    assert abs(spread.mean() - 0.69360) < 1e-5 and abs(spread.std() - 0.12859) < 1e-5
    assert_close(unified.truncated_normal(torch.tensor([0.0, 1.0])), [0.5, 1.0], 1e-6)
    assert spread.min() >= 0.5 and spread.max() <= 1.0


def test_ranks_are_places_in_the_sorted_row():
    assert unified.rank_in_row(torch.tensor([[0.3, 0.1, 0.2], [5.0, 5.0, 1.0]])).tolist() == [[2, 0, 1], [1, 2, 0]]
    noise = some_noise(3, 50)
    for n in (0, 17, 50):
        smallest = unified.rank_in_row(noise) < n
        assert (smallest.sum(1) == n).all()
        assert n in (0, 50) or noise[smallest].view(3, -1).amax(1).lt(noise[~smallest].view(3, -1).amin(1)).all()


def counts_of(initial, steps):
    """hidden_left after each step, for pictures that start with different numbers of hidden ids."""
    counts = [torch.tensor(initial)]
    for step in range(steps):
        counts.append(unified.num_masked(counts[0], counts[-1], step, steps))
    return torch.stack(counts[1:]).T.tolist()


def test_hidden_ids_fall_along_the_cosine():
    assert counts_of([256], 12) == [[253, 247, 236, 221, 203, 181, 155, 128, 97, 66, 33, 1]]
    assert counts_of([256], 20) == [[255, 252, 248, 243, 236, 228, 218, 207, 194, 181, 166, 150, 133, 116, 97, 79, 59, 40, 20, 1]]


def test_hidden_ids_are_counted_picture_by_picture():
    together = counts_of([256, 40, 3, 1, 0], 8)
    assert together == [counts_of([n], 8)[0] for n in (256, 40, 3, 1, 0)]
    assert together[2] == [2, 1, 1, 1, 1, 1, 1, 1]                     # always one less, never none before the end
    assert together[3:] == [[1] * 8, [0] * 8]


def test_mix_is_murmurs():
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
    assert len(everything.unique()) > 0.999 * len(everything)           # every other name gives another number


def test_random_numbers_lie_strictly_between_zero_and_one(monkeypatch):
    for bits in (0, 0xFFFFFFFF):                                        # the most extreme hashes there are
        monkeypatch.setattr(unified, "murmur", lambda x, bits=bits: torch.full_like(x, bits))
        u = unified.hashed_uniform(torch.zeros(1, dtype=torch.long), 0, 1)
        assert 0 < u.item() < 1 and unified.to_gumbel(u).isfinite().all()


def test_random_numbers_look_uniform_and_independent():
    u = torch.stack([unified.hashed_uniform(torch.arange(64), draw, 64) for draw in range(64)])     # (draw, seed, position)
    counts = torch.histc(u, 256, 0, 1)
    assert ((counts - 1024) ** 2 / 1024).sum() < 255 + 4 * math.sqrt(2 * 255)               # chi-square, four deviations
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
    assert (counts - 1000 * p).abs().max() <= 1                         # rounding of the last draw of a category
    assert (counts[p == 0] == 0).all()
    extreme = unified.sample_categorical(p.expand(2, -1), torch.tensor([2**-24, 1 - 2**-24]))
    assert extreme.tolist() == [1, 4]


# ---------------------------------------------------------------------------------------------------------------------------
# 4. MAGE: training


def test_golden_model_sizes_are_read_off_the_file():
    g, model, _ = golden_mage()
    c = g.config
    assert [model.image_size, model.grid, model.length] == [c[k] for k in ("img_size", "grid", "seq_len")]
    ids = [model.codes, model.fake_id, model.mask_id, model.mask_id + 1]
    assert ids == [c[k] for k in ("codebook_size", "fake_class_label", "mask_token_label", "vocab_size")]
    sizes = [(c["embed_dim"], c["grid"], c["grid"])] * c["depth"] + [(c["decoder_embed_dim"], c["grid"], c["grid"])] * c["decoder_depth"]
    assert list(model.layers.values()) == sizes and model.best_layer == c["depth"]
    heads = [b.attn.heads for b in [*model.blocks, *model.decoder_blocks]]
    assert heads == [c["num_heads"]] * c["depth"] + [c["decoder_num_heads"]] * c["decoder_depth"]
    assert {m.eps for k, m in model.named_modules() if isinstance(m, nn.LayerNorm) and k != "mlm_layer.ln"} == {c["norm_eps"]}
    assert model.mlm_layer.ln.eps == c["mlm_ln_eps"]


def masking(model, x, mask_ratio=None, mask_noise=None):
    """Ids of x, which of them are masked, and which enter the encoder, as in MAGE.forward."""
    ids = model.to_ids(x)
    mask_noise = torch.rand(ids.shape) if mask_noise is None else mask_noise
    return ids, *unified.random_masking(mask_noise, unified.truncated_normal(torch.rand(())) if mask_ratio is None else mask_ratio)


def golden_step():
    """The golden training step, piece by piece: file, model, and what hide() answers."""
    g, model, _ = golden_mage()
    return g, model, *masking(model, g.inputs["image"], g.inputs["mask_rate"], g.inputs["noise"])


def test_golden_ids_and_masks():
    g, model, ids, mask, keep = golden_step()
    dropped = torch.ones_like(mask).scatter(1, keep, False)
    assert ids.equal(g.outputs["gt_indices"])
    assert F.pad(mask, (1, 0)).equal(g.outputs["token_all_mask"].bool())                    # column 0 is the class: never hidden
    assert F.pad(dropped, (1, 0)).equal(g.outputs["token_drop_mask"].bool())
    words = model.input_ids(ids, mask)
    assert torch.cat([words[:, :1], words[:, 1:].gather(1, keep)], 1).equal(g.outputs["encoder_input_ids"])


def test_golden_latent_and_logits():
    g, model, ids, mask, keep = golden_step()
    latent = model.encode(model.input_ids(ids, mask), keep)
    assert_close(latent, g.outputs["latent"])
    x = model.decoder_input(latent, mask, keep)
    for block in model.decoder_blocks:
        x = block(x)
    everything = model.predict_ids(x, g.config["vocab_size"])                                      # all words, all positions
    assert_close(everything[:, g.inputs["logit_positions"]], g.outputs["logits_at_positions"])
    assert_close(everything[..., :model.codes].logsumexp(-1), g.outputs["logits_codebook_logsumexp"])
    codes = model.decode(latent, mask, keep)
    assert_close(codes, everything[:, 1:, :model.codes], 1e-5)
    assert_close(codes.gather(2, ids[..., None])[..., 0], g.outputs["logits_at_target"])


@functools.cache
def golden_gradients():
    """Loss and gradients of the golden batch: file, loss, {name: gradient or None}, names our model does not have."""
    g, model, dead = golden_mage()
    loss, _ = model(g.inputs["image"], mask_ratio=g.inputs["mask_rate"], mask_noise=g.inputs["noise"])
    loss.backward()
    return g, loss.detach(), {k: p.grad for k, p in model.named_parameters()}, dead


def test_golden_loss():
    g, loss, _, _ = golden_gradients()
    assert_close(loss, g.outputs["loss"])


def test_golden_gradient_norms():
    g, _, grads, _ = golden_gradients()
    ours = {k: grad.norm().item() for k, grad in grads.items() if grad is not None}
    assert ours == pytest.approx(g.outputs["grad_norms"], rel=1e-4, abs=0)                  # one by one; the names must agree too


def test_golden_parameters_without_gradient():
    g, _, grads, dead = golden_gradients()
    dead = [k for k in dead if g.state_dict[k].is_floating_point()]                         # position_ids is a buffer, no parameter
    assert set(dead) <= set(OFFICIAL_DEAD)
    assert sorted([k for k, grad in grads.items() if grad is None] + dead) == sorted(g.outputs["params_without_grad"])


def test_golden_word_rows_with_gradient():
    g, _, grads, _ = golden_gradients()
    rows = grads["token_emb.word_embeddings.weight"].abs().sum(1).nonzero().flatten()
    assert rows.equal(g.outputs["word_embedding_rows_with_grad"])


def test_golden_constants_are_those_written_into_unified():
    written = dict(label_smoothing=0.1, mask_ratio_min=0.5, mask_ratio_max=1.0, mask_ratio_mu=0.55, mask_ratio_std=0.25, mlp_ratio=4)
    assert {k: golden("mage").config[k] for k in written} == written


def test_only_hidden_tokens_are_scored():
    model = mage()
    ids, mask, _ = masking(model, some_ids(model), 0.6, some_noise(4, 16))
    logits = torch.randn(4, 16, model.codes, requires_grad=True)
    model.decode = lambda *args: logits
    loss, _ = model(ids, mask_ratio=0.6, mask_noise=some_noise(4, 16))
    loss.backward()
    assert (logits.grad[~mask] == 0).all() and (logits.grad[mask] != 0).all()
    assert_close(loss, F.cross_entropy(logits[mask], ids[mask], label_smoothing=0.1), 1e-6)


def test_hidden_ids_cannot_be_read():
    model = mage(sharp=True)
    x, noise = some_ids(model), some_noise(4, 16)
    mask = masking(model, x, 0.6, noise)[1]

    def guess(x):
        ids, mask, keep = masking(model, x, 0.6, noise)
        return model.decode(model.encode(model.input_ids(ids, mask), keep), mask, keep)
    other = (x + 1) % model.codes
    assert guess(torch.where(mask, other, x)).equal(guess(x))
    assert not guess(torch.where(mask, x, other)).allclose(guess(x), atol=1e-3)             # while those in sight do matter


@pytest.mark.parametrize("side", [16, 12])                              # 16 ids, and 9: an odd number
def test_exactly_half_of_the_tokens_never_enter_the_encoder(side):
    model, entered = mage(side), []
    model.blocks[0].register_forward_pre_hook(lambda module, args: entered.append(args[0].size(1)))
    for rate in (0.5, 0.51, 0.77, 1.0):
        _, mask, keep = masking(model, some_ids(model), rate)
        model(some_ids(model), mask_ratio=rate)
        assert (mask.sum(1) == math.ceil(model.length * rate)).all()
        assert mask.scatter(1, keep, True).all()                        # whoever stays outside is hidden
        assert keep.equal(keep.sort(1).values) and keep.size(1) == model.length // 2
    assert set(entered) == {1 + model.length // 2}


def test_the_smallest_noise_is_hidden_and_a_share_is_drawn_if_none_is_given():
    model, noise = mage(), some_noise(4, 16)
    mask = masking(model, some_ids(model), 0.5, noise)[1]
    assert (noise.masked_fill(~mask, -1).amax(1) < noise.masked_fill(mask, 2).amin(1)).all()
    counts = [masking(model, some_ids(model))[1].sum(1).unique() for _ in range(200)]
    assert all(len(c) == 1 for c in counts)                             # one share for the batch
    assert set(torch.cat(counts).tolist()) == set(range(9, 17))         # ceil(16 r), 0.5 < r < 1


def test_the_loss_starts_at_ln_k_and_a_little_at_any_width():
    little = 0.02 ** 2 * 768 / 2                                        # half the variance of the logits
    for width in (32, 128):
        model = mage(width=width)
        assert abs(model(some_ids(model, 64))[1]["masked"].item() - math.log(model.codes) - little) < 0.1


def test_pixels_and_their_cached_ids_give_the_same_loss():
    model, x, noise = mage(), some_pictures(), some_noise(4, 16)
    ids = model.to_ids(x)
    cached = torch.from_numpy(ids.numpy().astype(numpy.uint16))         # as the cache stores them
    losses = [model(v, mask_ratio=0.6, mask_noise=noise)[0] for v in (x, ids, cached)]
    assert losses[0].equal(losses[1]) and losses[0].equal(losses[2])
    assert ids.equal(model.vqgan.encode(x).flatten(1))                  # row by row


def test_the_output_matrix_gets_no_gradient():
    model = mage(classes=3)
    ids, mask, _ = masking(model, some_ids(model), 0.8, some_noise(4, 16))
    model(ids, mask_ratio=0.8, mask_noise=some_noise(4, 16))[0].backward()
    read = set(ids[~mask].tolist()) | {model.fake_id, model.mask_id}    # only words that were read can learn
    grad = model.token_emb.word_embeddings.weight.grad
    assert set(grad.abs().sum(1).nonzero().flatten().tolist()) == read and len(read) < model.codes


def test_every_trainable_parameter_gets_a_gradient_and_the_tokenizer_none():
    model = mage(contrastive=0.1)
    model(some_ids(model, 8).unflatten(0, (4, 2)), mask_ratio=0.7)[0].backward()
    for name, p in model.named_parameters():
        if name.startswith("vqgan."):
            assert not p.requires_grad and p.grad is None
        elif name == "mlm_layer.bias":
            assert (p.grad[..., :model.codes] != 0).all() and (p.grad[..., model.codes:] == 0).all()
        elif name != "token_emb.word_embeddings.weight":
            assert p.grad.abs().max() > 0, name


def test_one_batch_is_learned():
    model, x, noise, losses = mage(), some_ids(mage(), 8), some_noise(8, 16), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(100):
        loss, _ = model(x, mask_ratio=0.5, mask_noise=noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]                                 # knowing an id's place alone leaves 0.53, the frequent ids 0.92


def test_an_image_size_that_the_stride_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="18.*4"):
        mage(18)


def test_fresh_weights_are_drawn_as_the_authors_drew_them():
    vqgan = tokenizer()
    before = {k: v.clone() for k, v in vqgan.state_dict().items()}
    model = mage(vqgan=vqgan)
    qkv, words = model.blocks[0].attn.qkv, model.token_emb.word_embeddings.weight
    assert 0.95 < qkv.weight.abs().max() / math.sqrt(6 / (32 + 3 * 32)) <= 1                # Xavier; q, k and v are one matrix
    for table in (words, model.decoder_pos_embed_learned[0]):
        assert abs(table.std() / (0.02 * (768 / table.size(1)) ** 0.5) - 1) < 0.1           # 0.02 at the papers' width
    biases = [m.bias for m in model.modules() if isinstance(m, nn.Linear)] + [model.mlm_layer.bias]
    assert not any(b.any() for b in biases)
    assert all(v.equal(before[k]) for k, v in model.vqgan.state_dict().items())             # the tokenizer keeps its own


def test_the_vocabulary_is_codes_classes_fake_class_and_mask():
    model = mage(classes=3)
    assert (model.codes, model.fake_id, model.mask_id) == (32, 35, 36)
    assert model.token_emb.word_embeddings.num_embeddings == 37
    shared = mage(classes=3, fake_class=1)                              # the published layout: no word of its own
    assert (shared.fake_id, shared.mask_id) == (33, 35)


# ---------------------------------------------------------------------------------------------------------------------------
# 4. MAGE: labels


def test_labels_are_hidden_from_a_tenth_of_the_pictures_in_training_only():
    model, n = mage(classes=3), 4000
    ids, labels, mask = torch.zeros(n, 16, dtype=torch.long), torch.arange(n) % 3, torch.zeros(n, 16, dtype=torch.bool)
    assert model.input_ids(ids, mask, labels)[:, 0].equal(model.codes + labels)
    share = (model.train().input_ids(ids, mask, labels)[:, 0] == model.fake_id).float().mean().item()
    assert abs(share - 0.1) < 0.02
    kept = model.input_ids(ids, mask, labels, keep_label=labels == 1)[:, 0]
    assert kept.equal(torch.where(labels == 1, model.codes + 1, model.fake_id))


def test_a_label_changes_the_guesses():
    model = mage(classes=3, sharp=True)
    ids, hidden = some_ids(model, 1), torch.ones(1, 16, dtype=torch.bool)
    guesses = [model.logits(ids, hidden, labels) for labels in (None, torch.tensor([0]), torch.tensor([2]))]
    assert min((a - b).abs().max().item() for a, b in zip(guesses, guesses[1:] + guesses[:1])) > 1e-2
    losses = [model(ids, torch.tensor([c]), mask_ratio=0.6, mask_noise=some_noise(1, 16))[0] for c in (0, 2)]
    assert not losses[0].allclose(losses[1])


def test_guidance_exaggerates_what_the_label_changes():
    model = mage(classes=3, sharp=True)
    ids, hidden, labels = some_ids(model, 2), torch.ones(2, 16, dtype=torch.bool), torch.tensor([0, 2])
    free, told = model.logits(ids, hidden), model.logits(ids, hidden, labels)
    assert model.logits(ids, hidden, labels, guidance=1.0).equal(told)                      # 1 is the conditional model itself
    assert_close(model.logits(ids, hidden, labels, guidance=3.0), free + 3 * (told - free), 1e-5)


def test_guidance_grows_linearly_over_the_steps():
    model, used = mage(classes=3), []
    logits = model.logits
    model.logits = lambda ids, hidden, labels, guidance, *rest: used.append(guidance) or logits(ids, hidden, labels, guidance)
    model.sample(1, steps=4, guidance=3.0, labels=torch.tensor([1]))
    assert used == [1.5, 2.0, 2.5, 3.0]


# ---------------------------------------------------------------------------------------------------------------------------
# 4. MAGE: generation


def test_demask_keeps_known_ids_and_hides_the_least_certain():
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.5, 0.5]]).expand(2, 4, 2)
    ids, hidden = torch.tensor([[0, 0, 0, 1]] * 2), torch.tensor([[True, True, True, False]] * 2)
    u, noise = torch.tensor([[0.5, 0.5, 0.5, 0.1]] * 2), torch.zeros(2, 4)
    ids, hidden = unified.unmask(p.log(), ids, hidden, torch.tensor([1, 2]), u, noise)
    assert ids.tolist() == [[0, 0, 1, 1]] * 2                           # the last is known: 0.1 would have drawn 0
    assert hidden.tolist() == [[False, True, False, False], [False, True, True, False]]
    noise[:, 0] = -5.0                                                  # noise on the confidence turns the order round
    assert unified.unmask(p.log(), ids, ~ids.eq(9), torch.tensor([1, 1]), u, noise)[1].nonzero().tolist() == [[0, 0], [1, 0]]


def replayed(monkeypatch, sampled, gumbel):
    """Make the decoding loop draw these ids (steps, n, L) and this Gumbel noise; returns a list that fills with records of its steps.

    The ids that the official sampler drew go back in through the front door, as the middle of each one's slice of (0, 1).
    """
    demask, steps = unified.unmask, []
    names = ("logits", "ids", "mask", "left", "u", "noise", "sampled", "again")           # what demask() reads, what it answers

    def recorded(logits, ids, mask, left, u, noise, *_):
        drawn = sampled[len(steps)][..., None]
        cdf = F.pad(logits.double().softmax(-1).cumsum(-1), (1, 0))
        before = logits, ids, mask, left, ((cdf.gather(-1, drawn) + cdf.gather(-1, drawn + 1)) / 2)[..., 0].float(), noise
        after = demask(*before)
        steps.append(types.SimpleNamespace(**dict(zip(names, before + after))))
        return after
    monkeypatch.setattr(unified, "unmask", recorded)
    monkeypatch.setattr(unified, "to_gumbel", lambda u: gumbel[len(steps)].float())
    return steps


@pytest.fixture
def decoding(monkeypatch):
    """The golden run of the decoding loop, replayed by our sample_steps with its draws: file, model, records of each step, states."""
    g, model, _ = golden_mage()
    steps = replayed(monkeypatch, g.inputs["gen_categorical_samples"], g.inputs["gen_gumbel"])
    n, rounds = g.inputs["gen_gumbel"].size(1), g.inputs["gen_num_iter"]
    states = list(model.sample_steps(n, rounds, temperature=g.inputs["gen_choice_temperature"]))
    assert len(states) == len(steps) == rounds
    return g, model, steps, states


def test_golden_decoding_logits(decoding):
    g, model, steps, _ = decoding
    rows = g.outputs["gen_logits_first_step_image0"]
    stride = 8 if len(range(0, model.length, 8)) == len(rows) else model.length // len(rows)
    assert_close(steps[0].logits[0, ::stride], rows)
    assert_close(torch.stack([s.logits.logsumexp(-1) for s in steps]), g.outputs["gen_logits_logsumexp"])


def test_golden_decoding_ids(decoding):
    g, model, steps, states = decoding
    for i, s in enumerate(steps):
        assert s.ids.masked_fill(s.mask, model.mask_id).equal(g.outputs["gen_input_ids"][i])
        assert unified.sample_categorical(s.logits.softmax(-1), s.u).equal(g.inputs["gen_categorical_samples"][i])
        assert s.sampled.equal(g.outputs["gen_sampled_ids"][i])
        assert s.again.equal(g.outputs["gen_masking"][i])
        assert s.sampled.masked_fill(s.again, model.mask_id).equal(g.outputs["gen_next_ids"][i])
    assert states[-1].ids.unflatten(1, (model.grid, model.grid)).equal(g.outputs["gen_final_ids"])


def test_golden_decoding_confidences(decoding):
    g, _, steps, _ = decoding
    for i, s in enumerate(steps):
        p, theirs = s.logits.softmax(-1).gather(-1, s.sampled[..., None])[..., 0], g.outputs["gen_selected_probs"][i]
        assert theirs.isinf().equal(~s.mask)                          # what was known before is certain
        assert_close(p[s.mask], theirs[s.mask])


def test_golden_decoding_counts_and_temperatures(decoding):
    g, _, steps, _ = decoding
    for i, s in enumerate(steps):
        assert set(s.left.tolist()) == {g.outputs["gen_mask_len"][i]}
        assert set(s.again.sum(1).tolist()) == {g.outputs["gen_mask_len"][i]}
        noise = g.outputs["gen_temperature"][i] * g.inputs["gen_gumbel"][i]
        assert_close(s.noise, noise, 1e-4 if i + 1 < len(steps) else 0)                     # the last step is without noise


def test_golden_decoding_image(decoding):
    g, model, _, states = decoding
    assert_close(model.vqgan.decode(g.outputs["gen_final_ids"]), g.outputs["gen_image"])
    assert_close(model.render(states[-1]), g.outputs["gen_image"].clamp(0, 1))


def test_decoding_never_changes_a_known_id_and_ends_with_none_hidden():
    model = mage(sharp=True)
    seen = [unified.Decoding(torch.zeros(3, 16).long(), torch.ones(3, 16).bool()), *model.sample_steps(3, steps=8)]
    for before, after in zip(seen, seen[1:]):
        assert not (after.mask & ~before.mask).any()                # once known, known for good
        assert before.ids[~before.mask].equal(after.ids[~before.mask])
        assert (after.ids < model.codes).all()
    assert seen[-1].mask.sum() == 0


def test_a_film_shows_fewer_hidden_ids_in_every_frame():
    model = mage(sharp=True)
    states = list(model.sample_steps(2, steps=5))
    counts = torch.stack([s.mask.sum(1) for s in states])
    assert (counts.diff(dim=0) < 0).all()
    frames = torch.stack([model.render(s) for s in states])
    dark = (frames == 0.2).all(2).flatten(2).sum(2)                     # hidden ids are painted dark, stride ** 2 pixels each
    assert dark.equal(counts * model.vqgan.stride ** 2)
    assert model.sample(2, steps=5).equal(frames[-1])                   # the last state is what sample() renders


def test_a_picture_depends_on_its_seed_and_not_on_its_company():
    model = mage(sharp=True)
    together = list(model.sample_steps(4, steps=5, seeds=torch.tensor([3, 8, 3, -1])))
    alone = list(model.sample_steps(1, steps=5, seeds=torch.tensor([8])))
    for a, b in zip(together, alone):
        assert a.ids[1].equal(b.ids[0]) and a.mask[1].equal(b.mask[0])
    last = together[-1].ids
    assert last[0].equal(last[2]) and not last[0].equal(last[1]) and not last[0].equal(last[3])
    assert list(model.sample_steps(4, steps=5))[-1].ids.equal(list(model.sample_steps(4, steps=5, seeds=torch.arange(4)))[-1].ids)


def test_temperature_decides_which_ids_are_kept():
    model = mage(sharp=True)
    cold, hot = (next(model.sample_steps(4, steps=5, temperature=t)) for t in (0.0, 50.0))
    assert cold.ids.equal(hot.ids) and not cold.mask.equal(hot.mask)                    # the same guesses, others of them kept


def holes(side=32):
    """Four pictures with their own holes: a square, a corner, one pixel, none. And how many ids each hides: the touched ones and a ring."""
    mask = torch.zeros(4, side, side, dtype=torch.bool)
    mask[0, 8:16, 8:16] = mask[1, :4, -4:] = mask[2, 13, 13] = True
    return mask, [16, 4, 9, 0]


def test_a_hole_hides_the_ids_it_touches_and_a_ring_of_one():
    model = mage(64)                                                    # as 256 pixels at stride 16
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[0, 16:48, 16:48] = True                                        # pixels 64 - 191 there
    rows = model.initial_state(1, some_pictures(1, 64), mask)[1].unflatten(1, (16, 16)).any(2)[0].nonzero().flatten()
    assert rows.tolist() == list(range(3, 13))                          # tokens 3 - 12, not 4 - 11
    mask, counts = holes()
    assert mage(32).initial_state(4, some_pictures(4, 32), mask)[1].sum(1).tolist() == counts


def test_what_is_in_the_hole_never_reaches_the_tokenizer():
    model, known, (mask, _) = mage(32), some_pictures(4, 32), holes()
    other = torch.where(mask[:, None], 1 - known, known)
    assert model.initial_state(4, known, mask)[0].equal(model.initial_state(4, other, mask)[0])
    black = model.to_ids(known * ~mask[:, None])
    assert model.initial_state(4, known, mask)[0].equal(black)


def test_inpainting_fills_each_pictures_own_hole_and_nothing_else():
    model, known, (mask, counts) = mage(32, sharp=True), some_pictures(4, 32), holes()
    ids, hidden = model.initial_state(4, known, mask)
    states = list(model.sample_steps(4, steps=4, known=known, mask=mask))
    for s in states:
        assert s.ids[~hidden].equal(ids[~hidden]) and not (s.mask & ~hidden).any()
    left = torch.stack([s.mask.sum(1) for s in states]).T.tolist()
    assert left[:3] == [c[:-1] + [0] for c in counts_of(counts[:3], 4)] and left[3] == [0] * 4
    x = model.render(states[-1])
    assert x.movedim(1, -1)[~mask].equal(known.movedim(1, -1)[~mask]) and x[3].equal(known[3])
    assert not x.movedim(1, -1)[mask].allclose(known.movedim(1, -1)[mask])
    assert model.sample(4, steps=4, known=known, mask=mask).equal(x)


# ---------------------------------------------------------------------------------------------------------------------------
# 4. MAGE: representation


def test_golden_features():
    g, model, _ = golden_mage()
    pooled = model.features(g.inputs["image"])[0].mean((2, 3))
    assert_close(pooled, g.outputs["pooled_tokens"])                    # without the class, before any norm
    assert_close(model.embed(g.inputs["image"]), g.outputs["probe_features"])
    assert_close(model.embed(g.inputs["image"], pool="class"), g.outputs["cls_features"])
    weight, bias = g.inputs["finetune_fc_norm_weight"], g.inputs["finetune_fc_norm_bias"]
    tuned = F.layer_norm(pooled, pooled.shape[1:], weight, bias, eps=g.config["norm_eps"])
    assert_close(tuned, g.outputs["finetune_features"])
    assert_close(F.linear(tuned, g.inputs["probe_head_weight"], g.inputs["probe_head_bias"]), g.outputs["finetune_logits"])


def golden_head():
    """The golden file, its pooled features by our model, and the published linear probe with the golden weights and statistics."""
    g, model, _ = golden_mage()
    classes, dim = g.inputs["probe_head_weight"].shape
    head = probe.ProbeHead(dim, classes)
    head.linear.load_state_dict({k: g.inputs[f"probe_head_{k}"] for k in ("weight", "bias")})
    head.norm.load_state_dict({k: g.inputs[f"probe_bn_{k}"] for k in ("running_mean", "running_var")}, strict=False)
    return g, model.embed(g.inputs["image"]), head


def test_golden_probe_in_evaluation():
    g, features, head = golden_head()
    assert_close(head.eval()(features), g.outputs["probe_logits"])
    assert [name for name, _ in head.named_parameters()] == ["linear.weight", "linear.bias"]                    # all that is trained


def test_golden_probe_in_training():
    g, features, head = golden_head()
    assert_close(head.train()(features), g.outputs["probe_logits_train_bn"])
    assert_close(head.norm.running_mean, g.outputs["probe_bn_running_mean_after"])
    assert_close(head.norm.running_var, g.outputs["probe_bn_running_var_after"])


def test_golden_lars():
    g = golden("mage")
    given = g.inputs["lars"]
    for key in [k for k in g.outputs["lars"] if k.startswith("weight")]:
        weight, bias = (nn.Parameter(given[k].clone()) for k in ("weight", "bias"))
        optimizer = probe.LARS([weight, bias], lr=given["lr"], weight_decay=float(key.split("wd")[1]),
                               momentum=given["momentum"], trust=given["trust_coefficient"])
        for weight.grad, bias.grad in zip(given["grad_weight"].clone(), given["grad_bias"].clone()):
            optimizer.step()
        assert_close(weight, g.outputs["lars"][key])
        assert_close(bias, g.outputs["lars"][key.replace("weight", "bias")])


def test_features_have_the_shapes_that_layers_promises():
    model, x = mage(), some_pictures()
    assert model.layers == {1: (32, 4, 4), 2: (32, 4, 4), 3: (24, 4, 4), 4: (24, 4, 4)}
    maps = model.features(x, layers=list(model.layers))
    assert [tuple(m.shape[1:]) for m in maps] == list(model.layers.values())
    swapped = model.features(x, layers=[3, 1])                          # in the order asked for
    assert swapped[0].equal(maps[2]) and swapped[1].equal(maps[0])
    assert model.features(x)[0].equal(maps[model.best_layer - 1]) and model.best_layer == 2
    assert [model.mirror(b) for b in model.layers] == [4, 3, 2, 1]


def test_the_head_reads_its_logits_off_the_last_layer():
    model, ids, noise = mage(), some_ids(mage()), some_noise(4, 16)
    hidden = unified.rank_in_row(noise) < 8
    last = model.features(ids, 0.5, layers=[max(model.layers)], noise=noise)[0]
    assert_close(model.predict_ids(last.flatten(2).mT), model.logits(ids, hidden), 1e-5)


def test_no_block_after_the_last_layer_asked_for_runs():
    for stop, block in [(1, "blocks.1"), (2, "decoder_blocks.0"), (3, "decoder_blocks.1")]:
        model = mage()
        model.get_submodule(block).forward = forbidden
        model.features(some_pictures(), layers=[stop])
        with pytest.raises(AssertionError):
            model.features(some_pictures(), layers=[stop + 1])


def test_added_maps_enter_after_their_layer_and_pass_gradients_on():
    model, x = mage(), some_pictures()
    extra = torch.randn(4, 32, 4, 4, requires_grad=True)
    plain, added = model.features(x, layers=[1])[0], model.features(x, layers=[1], add={1: extra})[0]
    assert_close(added, plain + extra, 1e-6)
    deeper = model.features(x, layers=[3], add={1: extra})[0]
    assert not deeper.allclose(model.features(x, layers=[3])[0])
    deeper.square().sum().backward()
    assert (extra.grad != 0).any(1).all()                               # it reaches every position, whatever is asked for later
    assert model.features(x, layers=[1])[0].equal(plain)                # and leaves nothing behind


def test_t_hides_the_share_asked_for():
    model, noise = mage(sharp=True), some_noise(1, 16)
    ids = some_ids(model, 1)
    changed = torch.where(torch.eye(16).bool(), (ids + 1) % model.codes, ids)               # row j differs in id j only
    for t in (0.0, 0.3, 0.75):
        base = model.features(ids, t, noise=noise)[0]
        matters = (model.features(changed, t, noise=noise.expand(16, -1))[0] - base).abs().amax((1, 2, 3)) > 1e-4
        assert matters.equal(unified.rank_in_row(noise)[0] >= math.ceil(16 * t))
    assert not model.features(ids, 0.5)[0].equal(model.features(ids, 0.5)[0])               # drawn if not given


def test_embed_is_the_normed_mean_of_the_features():
    model, x = mage(), some_pictures()
    words = model.input_ids(model.to_ids(x), torch.zeros(4, 16, dtype=torch.bool))
    assert model.embed(x, pool="class").equal(model.encode(words)[:, 0])
    features = model.features(x)[0]
    for size in (1, 1e-3):                                              # features so small that the norm's eps of 1e-6 shows
        model.features = lambda x: [size * features]
        pooled = size * features.mean((2, 3))
        pooled = pooled - pooled.mean(1, keepdim=True)
        assert_close(model.embed(x), pooled / (pooled.square().mean(1, keepdim=True) + 1e-6).sqrt(), 1e-5)


def test_features_can_be_learned_through():
    model = mage().train()
    model.embed(some_pictures()).square().sum().backward()
    assert model.blocks[0].attn.qkv.weight.grad.abs().max() > 0


# ---------------------------------------------------------------------------------------------------------------------------
# 5. MAGE-C


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
    assert_close(unified.info_nce(z), unified.info_nce(z.flip(1)), 1e-6)                    # neither view is special


def contrast_worker(folder, z):
    unified.join_processes("cpu")
    rank, world = unified.rank_and_world()
    mine = z.chunk(world)[rank].clone().requires_grad_()
    loss = unified.info_nce(mine)
    loss.backward()
    torch.save((loss.detach(), mine.grad), f"{folder}/{rank}.pt")
    unified.leave_processes()


def test_info_nce_over_two_processes_is_info_nce_over_one(tmp_path):
    z = unit_vectors(4).requires_grad_()
    loss = unified.info_nce(z)
    loss.backward()
    both(tmp_path, contrast_worker, tmp_path, z.detach())
    losses, grads = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)))
    assert_close(torch.stack(losses).mean(), loss, 1e-6)
    assert_close(torch.cat(grads) / 2, z.grad, 1e-5)                    # DistributedDataParallel takes the mean over processes


def test_two_views_are_masked_apart_and_compared():
    model = mage(contrastive=0.1)
    x, noise, latents = some_ids(model, 6).unflatten(0, (3, 2)), some_noise(6, 16), []
    model.norm.register_forward_hook(lambda module, args, y: latents.append(y))
    loss, logs = model(x, mask_ratio=0.6, mask_noise=noise)
    z = F.normalize(model.projection(latents[0][:, 1:].mean(1)), dim=-1)                    # the class position has no part in it
    assert_close(logs["contrast"], unified.info_nce(z.unflatten(0, (3, 2))), 1e-6)
    assert_close(logs["masked"], model(x.flatten(0, 1), mask_ratio=0.6, mask_noise=noise)[0], 1e-6)
    assert_close(loss, logs["masked"] + 0.1 * logs["contrast"], 1e-6)


def test_two_views_of_pixels_are_two_views_of_ids():
    model, x = mage(contrastive=0.1, classes=3), some_pictures(6).unflatten(0, (3, 2))
    options = dict(labels=torch.tensor([0, 1, 2]), mask_ratio=0.6, mask_noise=some_noise(6, 16))
    ids = model.to_ids(x.flatten(0, 1)).unflatten(0, (3, 2))
    assert model(x, **options)[0].equal(model(ids, **options)[0])
    assert "contrast" not in model(x[:, 0], labels=options["labels"])[1]                    # one view: plain MAGE
    assert "contrast" not in mage()(x)[1]


# ---------------------------------------------------------------------------------------------------------------------------
# 6. ADDP


def golden_addp():
    """The golden file, our model with its weights, and the names it holds that our model does not have."""
    g = golden("addp")
    c = g.config
    config, state, dead = unified.published_addp(g.state_dict, (c["num_heads"], c["decoder_num_heads"]), (c["mage_num_heads"], c["mage_decoder_num_heads"]))
    fake = c["fake_class_label"] - c["codebook_size"]
    if fake != PUBLISHED_FAKE_CLASS:                                                        # else published_mage must know it by itself
        config["predictor"]["fake_class"] = fake
    model = unified.build(config)
    model.load_state_dict(state)
    return g, model.eval(), dead


def assert_near(ours, theirs):
    """Same shape, no element further off than the 1e-4 that tells a wrong eps of a norm from rounding."""
    assert ours.shape == theirs.shape
    assert torch.allclose(ours.detach().double(), theirs.double(), rtol=0, atol=1e-4), (ours - theirs).abs().max()


def recorded(module, call):
    """call(), and what the module read meanwhile."""
    seen = []
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    result = call()
    handle.remove()
    return result, seen


def test_golden_addp_sizes_are_read_off_the_file():
    g, model, dead = golden_addp()
    c, predictor = g.config, model.token_predictor
    side = c["img_size"] // c["patch_size"]
    assert [model.image_size, model.vqgan.stride, model.grid, model.length] == [c["img_size"], c["patch_size"], side, c["num_tokens"]]
    assert [model.codes, predictor.fake_id, predictor.mask_id] == [c[k] for k in ("codebook_size", "fake_class_label", "mask_token_label")]
    assert model.token_emb.weight.shape == (c["vocab_size"], c["embed_dim"])
    assert list(model.layers.values()) == [(c["embed_dim"], side, side)] * c["depth"] + [(c["decoder_embed_dim"], side, side)] * c["decoder_depth"]
    for net, of in ((model, ""), (predictor, "mage_")):
        heads = [block.attn.heads for block in [*net.blocks, *net.decoder_blocks]]
        assert heads == [c[of + "num_heads"]] * c[of + "depth"] + [c[of + "decoder_num_heads"]] * c[of + "decoder_depth"]
    assert predictor.vqgan is model.vqgan and set(dead) | model.state_dict().keys() == g.state_dict.keys()


def test_golden_addp_constants_are_those_written_into_unified():
    written = dict(label_smoothing=0.1, mask_ratio_min=0.5, mask_ratio_max=1.0, mask_ratio_mu=0.55, mask_ratio_std=0.25, mask_grid_steps=100, mlp_ratio=4)
    g, model, _ = golden_addp()
    assert {k: g.config[k] for k in written} == written
    eps = {k: m.eps for k, m in model.named_modules() if isinstance(m, nn.LayerNorm)}       # of most norms the numbers would not show it
    assert {v for k, v in eps.items() if not k.endswith("mlm_layer.ln")} == {1e-6} and eps["mlm_layer.ln"] == 1e-5


def test_golden_addp_shares():
    theirs = golden("addp").outputs["mask_schedule"]
    share, weight = unified.nested_mask_ratios()
    assert share.tolist() == pytest.approx(theirs["ratios"].tolist(), abs=1e-7)
    assert weight.tolist() == pytest.approx(theirs["probs"].tolist(), rel=1e-6)             # theirs are of ratios in float32


TRAINING = ["train", "train_all_masked"]


def nested_masks(model, x, *how):
    """Ids of x, and ADDP.nested_masks of them."""
    ids = model.to_ids(x)
    return ids, *model.nested_masks(ids, *how)


def addp_step(case):
    """A golden training step: model, official numbers, and what hide() answers."""
    g, model, _ = golden_addp()
    given = g.inputs[case]
    return model, g.outputs[case], *nested_masks(model, given["image"], given["mask_ratio_index"], given["index_offset"], given["noise"])


def addp_loss(model, given):
    return model(given["image"], index=given["mask_ratio_index"], gap=given["index_offset"], mask_noise=given["noise"])[0]


def code_map(model, tokens):
    """(B, L, C) -> (B, C, h, w), the layout of the official tensors."""
    return tokens.mT.unflatten(2, (model.grid, model.grid))


@pytest.mark.parametrize("case", TRAINING)
def test_golden_addp_ids_and_masks(case):
    model, theirs, ids, mask, earlier, seen = addp_step(case)
    assert ids.equal(theirs["token_ids"])
    assert mask.equal(theirs["mask_t"].bool()) and earlier.equal(theirs["mask_t_next"].bool())
    assert set((~mask).sum(1).tolist()) == {seen}


@pytest.mark.parametrize("case", TRAINING)
def test_golden_addp_guesses_of_the_predictor(case):
    model, theirs, ids, mask, earlier, _ = addp_step(case)
    codes = model.vqgan.quantize.embedding.weight
    assert_near(code_map(model, model.token_predictor.logits(ids, earlier).softmax(-1) @ codes), theirs["soft_tokens"])
    assert_near(code_map(model, model.token_predictor.logits(ids, mask).softmax(-1)), theirs["target"])
    assert_near(code_map(model, codes[ids]), theirs["z0"])


@pytest.mark.parametrize("case", TRAINING)
def test_golden_addp_picture(case):
    model, theirs, ids, mask, earlier, _ = addp_step(case)
    x, z = recorded(model.vqgan.decoder, lambda: model.next_image(ids, mask, model.token_predictor.logits(ids, earlier)))
    assert_near(torch.cat(z), theirs["z_t"])
    assert_near(x, theirs["x_t"])


@pytest.mark.parametrize("case", TRAINING)
def test_golden_addp_latent_and_logits(case):
    model, theirs, ids, mask, _, seen = addp_step(case)
    assert_near(model.patches(theirs["x_t"]), theirs["encoder_input"])
    latent = model.encode(theirs["x_t"])
    assert_near(latent, theirs["latent"])
    x = model.decoder_input(latent, ids, mask, seen)
    for block in model.decoder_blocks:
        x = block(x)
    everything = model.predict_ids(x, len(model.token_emb.weight))                                 # all words, appended tokens too
    assert_near(everything[..., :model.codes], theirs["logits_codebook"])
    assert_near(everything[..., -1], theirs["logits_mask_label"])
    assert_near(everything.logsumexp(-1), theirs["logits_logsumexp"])
    assert_close(model.decode(latent, ids, mask, seen), everything[:, 1:1 + model.length, :model.codes], 1e-5)


@pytest.mark.parametrize("case", TRAINING)
def test_golden_addp_loss_through_the_whole_step(case):
    g, model, _ = golden_addp()
    theirs = g.outputs[case]
    loss, seen = recorded(model.patch_embed["proj"], lambda: addp_loss(model, g.inputs[case]))
    assert_near(loss, theirs["loss"])
    assert_near(seen[0] * model.color_std + model.color_mean, theirs["x_t"].clamp(0, 1))    # it is this picture that enters the encoder


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
    without = [k for k, grad in ours.items() if grad is None] + [k for k in dead if not k.startswith("token_predictor.") and k != "decoder_pos_embed"]
    assert sorted(without) == sorted(g.outputs["train"]["params_without_grad"])             # decoder_pos_embed was frozen


@pytest.mark.parametrize("case", ["sample_cosine", "sample_linear"])
def test_golden_addp_decoding(case, monkeypatch):
    g, model, _ = golden_addp()
    given, theirs = g.inputs[case], g.outputs[case]
    steps, rounds = replayed(monkeypatch, given["sampled_ids"], given["gumbel"]), int(given["num_iter"])
    options = dict(temperature=given["choice_temperature"].item(), schedule=given["schedule"])
    states, z = recorded(model.vqgan.decoder, lambda: list(model.sample_steps(given["gumbel"].size(1), rounds, **options)))
    assert len(states) == len(steps) == len(z) == rounds
    for i, (step, state) in enumerate(zip(steps, states)):
        assert step.mask.equal(theirs["mask_in"][i]) and step.again.equal(theirs["mask_next"][i])
        assert_near(step.logits, theirs["logits"][i])
        assert step.sampled.equal(theirs["tokens"][i]) and state.ids.equal(theirs["tokens"][i])
        assert_near(step.noise, given["gumbel"][i].float() * options["temperature"] * (1 - (i + 1) / rounds))
        assert_near(z[i], theirs["z_q"][i])
        assert_near(state.x, theirs["images"][i])
    assert states[-1].ids.equal(theirs["final_tokens"]) and not states[-1].mask.any()
    assert_near(model.render(states[-1]), theirs["final_image"].clamp(0, 1))


def test_golden_addp_features():
    g, model, _ = golden_addp()
    x, theirs = g.inputs["features"]["image"], g.outputs["features"]
    latent, seen = recorded(model.patch_embed["proj"], lambda: model.encode(x))
    assert_near(seen[0], theirs["normalized_image"])
    assert_near(model.patches(x), theirs["pretrain_encoder_input"])
    assert_near(latent, theirs["pretrain_encoder_output"])
    assert_near(model.embed(x), theirs["pretrain_pooled"])
    assert_near(model.embed(x, pool="class"), theirs["pretrain_encoder_output"][:, 0])
    assert_near(model.norm(model.features(x)[0].flatten(2).mT), theirs["pretrain_encoder_output"][:, 1:])


@pytest.mark.parametrize("case", ["finetune", "finetune_interp"])
def test_golden_addp_finetuning(case):
    g, model, _ = golden_addp()
    x, theirs, head = g.inputs[case]["image"], g.outputs[case], g.inputs["finetune_head"]
    [tokens], seen = recorded(model.patch_embed["proj"], lambda: model.features(x, finetune=True))
    assert_near(seen[0], theirs["normalized_image"])
    assert_near(model.resized_pos_embed(tokens.size(-1)), theirs["pos_embed"])
    assert_near(tokens.flatten(2).mT, theirs["tokens"][:, 1:])
    assert_near(tokens.mean((2, 3)), theirs["pooled"])
    tuned = F.layer_norm(tokens.mean((2, 3)), tokens.shape[1:2], head["fc_norm.weight"], head["fc_norm.bias"], eps=1e-6)
    assert_near(tuned, theirs["pre_logits"])
    assert_near(F.linear(tuned, head["head.weight"], head["head.bias"]), theirs["logits"])


def addp(image_size=16, predictor=None, sharp=False, **options):
    """A fresh ADDP in eval mode; 4 x 4 ids below 32 unless said otherwise. sharp: larger words, so that its guesses differ."""
    predictor = predictor or mage(image_size, sharp=sharp)
    torch.manual_seed(1)
    sizes = dict(width=32, depth=2, heads=4, decoder_depth=2, decoder_heads=4)
    model = unified.ADDP(predictor, image_size, **{**sizes, **options}).eval()
    if sharp:
        nn.init.normal_(model.token_emb.weight)
    return model


def half_hidden(model, n=4):
    return unified.rank_in_row(some_noise(n, model.length)) < model.length // 2


def test_what_was_hidden_earlier_is_what_is_hidden_now_and_more():
    model, ids = addp(64), some_ids(addp(64), 2)
    share = unified.nested_mask_ratios()[0]
    for index, gap in ((0, 1), (30, 5), (64, 1), (65, 3)):
        _, mask, earlier, seen = nested_masks(model, ids, index, gap, some_noise(2, 256))
        assert (mask <= earlier).all() and seen == 256 - mask[0].sum()
        assert mask.sum(1).tolist() == [math.ceil(256 * share[index])] * 2 and earlier.sum(1).tolist() == [math.ceil(256 * share[min(65, index + gap)])] * 2
    counts = [math.ceil(256 * s) for s in share]
    assert counts[:8] == [131, 134, 138, 141, 144, 148, 151, 154] and counts[-12:] == [252, 253, 253, 254, 254, 255, 255, 256, 256, 256, 256, 256]


def test_drawn_shares_follow_their_weights():
    model, share = addp(64), unified.nested_mask_ratios()[0]
    ids = some_ids(model, 1)
    hidden, earlier = torch.tensor([[m.sum() for m in model.nested_masks(ids)[:2]] for _ in range(3000)]).T / 256
    assert abs(hidden.mean() - 0.747) < 0.01 and abs(earlier.mean() - 0.775) < 0.01          # as drawn by the official function, rounded up
    assert 0.17 < (hidden > 0.9).float().mean() < 0.24 and hidden.min() >= share[0]


def test_pixels_and_their_cached_ids_give_the_same_loss_in_addp():
    model, x, draws = addp(), some_pictures(), dict(index=12, gap=2, mask_noise=some_noise(4, 16))
    loss = model(x, **draws)[0]
    assert model(model.to_ids(x).int(), **draws)[0].equal(loss)                             # nothing but the ids is read
    assert not model(some_ids(model), **draws)[0].equal(loss)
    torch.manual_seed(0)
    one = model(x)[0]
    assert not model(x)[0].equal(one)                                                       # drawn if not given


def test_the_predictor_guesses_both_in_one_batch():
    model, calls = addp(), []
    logits = model.token_predictor.logits
    model.token_predictor.logits = lambda *args: calls.append(args) or logits(*args)
    model(some_ids(model), index=12, gap=5, mask_noise=some_noise(4, 16))
    (ids, hidden), = calls
    assert ids[:4].equal(ids[4:]) and (hidden[4:] < hidden[:4]).any() and (hidden[4:] <= hidden[:4]).all()


def test_predictor_and_tokenizer_are_one_network_each_and_stay_as_they_are():
    model = addp().train()
    assert model.vqgan is model.token_predictor.vqgan and model.blocks[0].training
    assert not any(m.training for m in model.token_predictor.modules())                     # the official one drops out here
    model(some_ids(model), index=12)[0].backward()
    for name, p in model.named_parameters():
        if name.startswith(("vqgan.", "token_predictor.")):
            assert not p.requires_grad and p.grad is None
        elif name != "token_emb.weight":
            assert p.grad.abs().max() > 0, name
    draws = dict(index=12, gap=2, mask_noise=some_noise(4, 16))
    still = addp(dropout=0.0).train()
    assert still(some_ids(still), **draws)[0].equal(still(some_ids(still), **draws)[0])
    still.token_predictor.train()                                                           # the official way: its guesses differ each time
    assert not still(some_ids(still), **draws)[0].equal(still(some_ids(still), **draws)[0])


def test_every_parameter_takes_part_even_if_all_is_hidden():
    model = addp()
    model(some_ids(model), index=65)[0].backward()                                          # several processes would wait for a missing one
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not any(p.grad.any() for p in model.blocks.parameters())                         # the picture says nothing then


def test_one_batch_is_learned_by_addp():
    model, losses = addp(sharp=True), []
    ids, draws = some_ids(model, 8), dict(index=3, gap=2, mask_noise=some_noise(8, 16))
    target = model.token_predictor.logits(ids, model.nested_masks(ids, **draws)[0]).softmax(-1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(80):
        loss, _ = model(ids, **draws)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    words = len(model.token_emb.weight)
    smoothed = F.pad(0.9 * target, (0, words - model.codes)) + 0.1 / words
    entropy = -(smoothed * smoothed.log()).sum(-1)[model.nested_masks(ids, **draws)[0]].mean()
    assert losses[-1] - entropy < 0.3 * (losses[0] - entropy)                               # what is left to learn, mostly is


def test_only_known_ids_and_the_latent_beside_them_reach_the_guesses():
    model, ids, hidden = addp(sharp=True), some_ids(addp()), half_hidden(addp())
    latent = model.encode(some_pictures())

    def guesses(latent, ids):
        return model.decode(latent, ids, hidden, model.length // 2)
    base = guesses(latent, ids)
    other = torch.cat([latent[:, :1] + 1, torch.where(hidden[..., None], 1.0, latent[:, 1:])], 1)           # position 0 does not count either
    assert guesses(other, torch.where(hidden, (ids + 1) % model.codes, ids)).equal(base)
    for j in range(model.length):
        nudge = torch.zeros_like(latent)
        nudge[:, 1 + j] = 1
        assert guesses(latent + nudge, ids).isclose(base).all((1, 2)).equal(hidden[:, j])
        changed = torch.where(torch.arange(model.length) == j, (ids + 1) % model.codes, ids)
        assert guesses(latent, changed).isclose(base).all((1, 2)).equal(hidden[:, j])


def test_while_all_is_hidden_no_picture_is_read_and_none_would_matter():
    model, ids = addp(sharp=True), some_ids(addp())
    hidden = torch.ones_like(ids, dtype=torch.bool)
    skipped = model.logits(ids, hidden)
    for x in (some_pictures(), torch.zeros(4, 3, 16, 16)):
        assert_close(model.decode(model.encode(x), ids, hidden, 0), skipped, 1e-6)
    model.encode = forbidden
    states = model.sample_steps(2, steps=16)
    assert [next(states).mask.sum(1).tolist() for _ in range(2)] == [[16, 16]] * 2        # rounded up: the first steps keep nothing
    with pytest.raises(AssertionError):
        list(states)


def test_addp_generates_without_its_predictor():
    model = addp(sharp=True)
    model.token_predictor.logits = forbidden
    states = list(model.sample_steps(3, steps=6))
    seen = [unified.Decoding(torch.zeros(3, 16).long(), torch.ones(3, 16).bool()), *states]
    for before, after in zip(seen, seen[1:]):
        assert not (after.mask & ~before.mask).any() and before.ids[~before.mask].equal(after.ids[~before.mask])
    assert not states[-1].mask.any()
    frames = [model.render(s) for s in states]
    assert all(f.shape == (3, 3, 16, 16) and f.min() >= 0 and f.max() <= 1 for f in frames)
    assert not any(a.equal(b) for a, b in zip(frames, frames[1:])) and model.sample(3, steps=6).equal(frames[-1])


def test_a_linear_schedule_ends_with_one_by_one():
    model = addp(sharp=True)
    assert [s.mask.sum(1).tolist()[0] for s in model.sample_steps(1, steps=16, schedule="linear")] == [*range(15, 0, -1), 0]
    assert [s.mask.sum(1).tolist()[0] for s in mage(sharp=True).sample_steps(1, steps=16, schedule="linear")] == [*range(15, 0, -1), 0]


def test_an_addp_picture_depends_on_its_seed_and_not_on_its_company():
    model = addp(sharp=True)
    together = list(model.sample_steps(3, steps=5, seeds=torch.tensor([3, 8, 3])))
    for a, b in zip(together, model.sample_steps(1, steps=5, seeds=torch.tensor([8]))):
        assert a.ids[1].equal(b.ids[0]) and a.mask[1].equal(b.mask[0])
        assert_close(a.x[1], b.x[0])                                    # some processors round another batch another way: 1.1e-5 was seen
    assert together[-1].ids[0].equal(together[-1].ids[2]) and not together[-1].ids[0].equal(together[-1].ids[1])


def test_addp_fills_holes_of_any_size_and_nothing_else():
    model, known, (mask, counts) = addp(32, sharp=True), some_pictures(4, 32), holes()
    ids, hidden = model.initial_state(4, known, mask)
    assert hidden.sum(1).tolist() == counts
    states = list(model.sample_steps(4, steps=4, known=known, mask=mask))
    for s in states:
        assert s.ids[~hidden].equal(ids[~hidden]) and not (s.mask & ~hidden).any()
    x = model.render(states[-1])
    assert x.movedim(1, -1)[~mask].equal(known.movedim(1, -1)[~mask]) and x[3].equal(known[3])
    assert not x.movedim(1, -1)[mask].allclose(known.movedim(1, -1)[mask])
    for i in range(4):                                                  # a hole alone, in a batch where no count differs
        alone = list(model.sample_steps(1, steps=4, known=known[i:i + 1], mask=mask[i:i + 1], seeds=torch.tensor([i])))
        assert alone[-1].ids.equal(states[-1].ids[i:i + 1])
        assert_close(alone[-1].x, states[-1].x[i:i + 1], 1e-5)
    other = torch.where(mask[:, None], 1 - known, known)                                    # what is in the hole never reaches the network
    assert model.sample(4, steps=4, known=other, mask=mask).movedim(1, -1)[mask].equal(x.movedim(1, -1)[mask])


def test_a_hole_begins_with_what_the_predictor_expects_in_it():
    model, known, (mask, _) = addp(32, sharp=True), some_pictures(4, 32), holes()
    ids, hidden = model.initial_state(4, known, mask)
    picture = model.next_image(ids, hidden, model.token_predictor.logits(ids, hidden))
    assert model.logits(ids, hidden).equal(model.logits(ids, hidden, x=picture))
    assert not model.logits(ids, hidden).allclose(model.logits(ids, hidden, x=known))


def test_many_pictures_are_painted_in_parts():
    vqgan, z = mage().vqgan, torch.randn(4, 8, 4, 4)
    (whole, seen), (x, parts) = (recorded(vqgan.decoder, lambda: vqgan.decode_codes(z, pixels)) for pixels in (4 * 16 ** 2, 16 ** 2))
    assert [len(z) for z in seen] == [4] and [len(z) for z in parts] == [1] * 4
    assert_close(x, whole, 1e-5)


def test_addp_features_are_of_pixels_and_have_the_shapes_that_layers_promises():
    model, x = addp(), some_pictures()
    assert probe.tokenize(model, x) is x and probe.tokenize(mage(), x).equal(mage().to_ids(x))
    assert model.layers == {b: (32, 4, 4) for b in (1, 2, 3, 4)} and model.best_layer == 2
    maps = model.features(x, layers=[4, 1, 2, 3])
    assert [tuple(m.shape) for m in maps] == [(4, 32, 4, 4)] * 4
    assert model.features(x)[0].equal(maps[2])
    ids = model.to_ids(x)
    assert model.features(ids)[0].equal(model.features(model.vqgan.decode(ids.unflatten(1, (4, 4))))[0])
    assert model.embed(ids).equal(model.embed(model.to_pixels(ids))) and not model.embed(ids).allclose(model.embed(x))
    logits = model.decode(model.encode(x), ids, torch.zeros(4, 16, dtype=torch.bool), 16)
    assert_close(model.predict_ids(maps[0].flatten(2).mT), logits, 1e-5)                           # the decoder's maps are of the picture, all known
    with pytest.raises(ValueError, match="0.5"):
        model.features(x, t=0.5)


def test_addp_features_stop_early_take_maps_and_pass_gradients():
    for stop, block in [(1, "blocks.1"), (2, "decoder_blocks.0"), (3, "decoder_blocks.1")]:
        model = addp()
        model.get_submodule(block).forward = forbidden
        model.features(some_pictures(), layers=[stop])
        with pytest.raises(AssertionError):
            model.features(some_pictures(), layers=[stop + 1])
    model, x, extra = addp(), some_pictures(), torch.randn(4, 32, 4, 4, requires_grad=True)
    for b in (1, 3):                                                    # 3: in the decoder, which has the known ids behind the picture
        assert_close(model.features(x, layers=[b], add={b: extra})[0], model.features(x, layers=[b])[0] + extra, 1e-6)
    model.features(x, layers=[4], add={3: extra})[0].square().sum().backward()
    assert (extra.grad != 0).any(1).all() and model.blocks[0].attn.qkv.weight.grad.abs().max() > 0


def test_finetuning_reads_without_clamp_and_norm_and_at_any_size():
    model, x = addp(), 2 * some_pictures() - 0.5
    assert model.features(x)[0].equal(model.features(x.clamp(0, 1))[0])
    assert not model.features(x, finetune=True)[0].allclose(model.features(x.clamp(0, 1), finetune=True)[0])
    nn.init.zeros_(model.tokenizer_norm.weight)
    before = model.features(x, finetune=True)[0]
    nn.init.ones_(model.tokenizer_norm.weight)
    assert model.features(x, finetune=True)[0].equal(before)
    assert model.features(some_pictures(2, 24), finetune=True)[0].shape == (2, 32, 6, 6)
    assert mage().features(x, finetune=True)[0].equal(mage().features(x)[0])                # MAGE has one path only


def test_addp_refuses_a_predictor_of_another_size():
    with pytest.raises(ValueError, match="32.*16"):
        addp(32, predictor=mage(16))


def test_addp_has_the_words_of_its_predictor():
    assert len(addp().token_emb.weight) == 32 + 2 and len(addp(predictor=mage(classes=5, fake_class=2)).token_emb.weight) == 32 + 5 + 1
    assert addp(predictor=mage(classes=5)).classes == 0


def test_fresh_addp_weights_are_drawn_as_the_authors_drew_them():
    predictor = mage()
    before = {k: v.clone() for k, v in predictor.state_dict().items()}
    model = addp(predictor=predictor)
    for name in ("pos_embed", "decoder_pos_embed_learned", "decoder_pos_mask_embed", "decoder_pos_token_embed", "token_emb.weight"):
        assert abs(model.state_dict()[name].std() / (0.02 * (768 / 32) ** 0.5) - 1) < 0.15, name
    patch = model.patch_embed["proj"].weight                            # Xavier on the matrix of a patch, not on the convolution
    assert 0.95 < patch.abs().max() / math.sqrt(6 / (32 + 3 * 4 * 4)) <= 1
    assert not model.mlm_layer.bias.any() and model.mlm_layer.bias.size(2) == len(model.token_emb.weight)
    assert all(v.equal(before[k]) for k, v in model.token_predictor.state_dict().items())   # the predictor keeps its own


ADDP_DEAD = {"decoder_pos_embed": (1, 257, 0), "pos_token_embed": (1, 257, 0), "pos_mask_embed": (1, 257, 0),
             "decoder_pred.weight": (768, 0), "decoder_pred.bias": (768,)}                  # 0 stands for the width


def official_addp(width, depth):
    """Names and shapes in addp-vit-base or -large, from the authors' table, none from our code."""
    shapes = {f"token_predictor.{k}": v for k, v in official_mage(width, depth).items()}
    shapes |= {f"vqgan.{k}": v for k, v in official_tokenizer().items()} | {k: tuple(n or width for n in v) for k, v in ADDP_DEAD.items()}
    shapes |= {"cls_token": (1, 1, width), "mask_token": (1, 1, width), "patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,),
               "token_emb.weight": (2025, width), "mlm_layer.bias": (1, 1, 2025)}
    shapes |= {name: (1, 257, width) for name in ("pos_embed", "decoder_pos_embed_learned", "decoder_pos_mask_embed", "decoder_pos_token_embed")}
    for linear in ("decoder_embed", "mlm_layer.fc"):
        shapes |= {f"{linear}.weight": (width, width), f"{linear}.bias": (width,)}
    for norm in ("tokenizer_norm", "norm", "decoder_norm", "mlm_layer.ln"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for name, blocks in [("blocks", depth), ("decoder_blocks", 8)]:
        for i in range(blocks):
            shapes |= official_transformer(f"{name}.{i}", width)
    return shapes


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
@pytest.mark.parametrize("width, depth, heads, used, encoder", [(768, 12, (12, 16), 145.88, 85.85), (1024, 24, (16, 16), 409.10, 303.37)], ids=["base", "large"])
def test_published_addp_files_load_strictly(tmp_path, width, depth, heads, used, encoder):
    torch.save({"model": hollow(official_addp(width, depth)), "args": argparse.Namespace(blr=1e-4)}, tmp_path / "addp.pth")
    said = []
    with torch.device("meta"):                                          # shapes without memory
        model, config = unified.load_model(tmp_path / "addp.pth", tell=said.append)
    assert isinstance(model, unified.ADDP) and not model.training and len(said) == 1 and "unknown" not in said[0]
    assert all(name in said[0] for name in [*ADDP_DEAD, *(f"token_predictor.{name}" for name in OFFICIAL_DEAD)])
    assert len(model.token_emb.weight) == 2025 and (model.token_predictor.fake_id, model.token_predictor.mask_id, model.image_size) == (1100, 2024, 256)
    for net in (model, model.token_predictor):
        assert (net.blocks[0].attn.heads, net.decoder_blocks[0].attn.heads) == heads
    shapes = {k: tuple(p.shape) for k, p in model.named_parameters() if p.requires_grad}
    assert round(count(shapes, "") / 1e6, 2) == used
    assert round(count(shapes, "cls_token", "pos_embed", "patch_embed.", "tokenizer_norm.", "blocks.", "norm.") / 1e6, 2) == encoder
    ours = unified.model_config("addp", "large" if depth == 24 else "base", 256, 16, unified.tokenizer_config("base", 16))
    assert all(config["arch"][k] == v for k, v in ours.items() if k != "predictor")         # our sizes are the published ones


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
def test_a_published_addp_file_that_lacks_a_weight_is_refused(tmp_path):
    state = hollow(official_addp(768, 12))
    for lost in ("decoder_pos_token_embed", "token_predictor.norm.weight", "token_emb.weight"):
        torch.save({"model": {k: v for k, v in state.items() if k != lost}}, tmp_path / "lacking.pth")
        with torch.device("meta"), pytest.raises(unified.UserError, match=f"lacking.pth.*{lost}"):
            unified.load_model(tmp_path / "lacking.pth", tell=lambda line: None)


def test_golden_addp_file_on_disk_samples_and_gives_features(tmp_path, monkeypatch):
    g, model, _ = golden_addp()
    c = g.config
    if c["fake_class_label"] != c["codebook_size"] + PUBLISHED_FAKE_CLASS:
        pytest.skip("a file with another fake class than the published ones cannot say so by itself")
    predictor = (c["mage_num_heads"], c["mage_decoder_num_heads"])
    published = unified.published_addp                                  # two widths may be alike here, which is why heads are passed by hand
    monkeypatch.setitem(unified.PUBLISHED, "token_predictor.", lambda state: published(state, (c["num_heads"], c["decoder_num_heads"]), predictor))
    torch.save({"model": g.state_dict}, tmp_path / "addp.pth")
    loaded, config = unified.load_model(tmp_path / "addp.pth", tell=lambda line: None)
    assert_near(loaded.embed(g.inputs["features"]["image"]), g.outputs["features"]["pretrain_pooled"])
    assert loaded.sample(2, steps=2).equal(model.sample(2, steps=2))
    unified.build(json.loads(json.dumps(config["arch"]))).load_state_dict(loaded.state_dict())


def test_a_run_of_addp_is_loaded_from_its_folder_predictor_included(tmp_path):
    arch = unified.model_config("addp", "tiny", 16, 4, unified.tokenizer_config("toy", 4, 32))
    model = unified.build(arch)
    train.save_checkpoint(tmp_path / "model.pt", {"model": model.state_dict(), "config": {"arch": arch}})
    loaded, _ = unified.load_model(tmp_path)
    assert loaded.vqgan is loaded.token_predictor.vqgan and not loaded.training
    assert loaded.sample(2, steps=3).equal(model.eval().sample(2, steps=3))
    draws = dict(index=12, gap=2, mask_noise=some_noise(2, 16))
    assert loaded(some_pictures(2), **draws)[0].equal(model(some_pictures(2), **draws)[0])  # the predictor's weights are those stored


def test_addp_trains_on_the_ids_of_its_predictor_then_samples_and_is_probed(photos, finished, tmp_path):
    run, (ids,) = tmp_path / "run", finished[0].glob("ids-*.npy")
    before = ids.read_bytes()
    printed = script("train.py", *flags(photos, run, "--model", "addp", "--predictor", finished[0], "--micro-batch", 4))
    assert "untrained" in printed and not [*run.glob("ids*")] and not (run / "tokenizer.pt").exists()
    assert [*finished[0].glob("ids*")] == [ids] and ids.read_bytes() == before
    ours, theirs = (unified.load_checkpoint(folder / "model.pt")["model"] for folder in (run, finished[0]))
    assert all(ours[f"token_predictor.{k}"].equal(v) for k, v in theirs.items())            # learned from, not changed
    assert '"held_out"' in (run / "log.jsonl").read_text()
    script("sample.py", run, "--image", next((photos / "val" / "cat").iterdir()), "--box", "4,4,12,12", "--n", 1, "--gif", "--steps", 4)
    assert PIL.Image.open(run / "painted-0.gif").n_frames == 4
    script("probe.py", run, "--head", "finetune", "--epochs", 1, "--batch-size", 16, "--workers", 0)
    assert json.loads((run / "probe.jsonl").read_text())["head"] == "finetune"


def test_a_predictor_that_is_missing_or_unfit_ends_in_one_sentence(photos, finished, tmp_path):
    def refused(*more):
        printed = script("train.py", *flags(photos, tmp_path / "run", "--model", "addp", *more), expect=2)
        *found, said = printed.splitlines()
        assert not found or "to test on" in found[0] and len(found) == 1                    # what the folder holds
        return said
    assert f"run python train.py --dataset {photos} --model mage, then this with --predictor out/{photos.name}-mage" in refused()
    assert "--image-size 64" in refused("--predictor", finished[0], "--image-size", 64)
    assert "belongs to --model addp" in refused("--predictor", finished[0], "--labels")


# ---------------------------------------------------------------------------------------------------------------------------
# 7. UMD: the golden files. The authors' code is in JAX: names, layouts and the order of axes (channels last) differ


def flax_slots(model, of=lambda p: p.data):
    """(flax name, layer or None, our tensor, flax tensor -> our layout) for every parameter; of(parameter) may also be its gradient."""
    def matrix(name, weight, bias, layer=None):
        yield f"{name}/kernel", layer, weight, lambda w: w.reshape(weight.mT.shape).mT
        yield f"{name}/bias", layer, bias, lambda w: w.reshape(bias.shape)

    def dense(name, linear, layer=None):
        yield from matrix(name, of(linear.weight), of(linear.bias), layer)

    def norm(name, module, layer=None):
        yield from ((f"{name}/{theirs}", layer, of(p), lambda w: w) for theirs, p in (("scale", module.weight), ("bias", module.bias)))
    for stack, blocks, last in (("Encoder", model.blocks, model.norm), ("Decoder", model.decoder_blocks, model.decoder_norm)):
        yield from norm(f"{stack}/encoder_norm", last)
        for i, block in enumerate(blocks):
            name = f"{stack}/ScanCheckpointEncoder1DBlock_0"
            for j, (module, linear) in enumerate(((block.norm1, block.mlp.fc1), (block.norm2, block.mlp.fc2))):
                yield from norm(f"{name}/LayerNorm_{j}", module, i)
                yield from dense(f"{name}/MlpBlock_0/Dense_{j}", linear, i)
            yield from dense(f"{name}/Dense_0", block.modulation, i)
            attention = f"{name}/MultiHeadDotProductAttention_0"
            for part, weight, bias in zip(("query", "key", "value"), of(block.attn.qkv.weight).chunk(3), of(block.attn.qkv.bias).chunk(3)):
                yield from matrix(f"{attention}/{part}", weight, bias, i)
            yield from dense(f"{attention}/out", block.attn.proj, i)
    for trunk, (first, second) in (("time", model.time_embed[::2]), ("label", model.label_embed[1::2])):
        yield from dense(f"{trunk}_trunk/Dense_0", first)
        yield from dense(f"{trunk}_trunk/Dense_1", second)
    yield from dense("final_modulation", model.decoder_modulation)
    for name, p in (("cls", model.cls_token), ("pos_embedding", model.pos_embed), ("dec_pos_embedding", model.decoder_pos_embed),
                    ("image_mask_embedding", model.mask_token), ("label_emb/embedding/embedding", model.label_embed[0].weight),
                    ("embedding/bias", model.patch_embed.bias), ("final_conv/bias", model.to_pixels.bias)):
        yield name, None, of(p), lambda w: w
    yield "embedding/kernel", None, of(model.patch_embed.weight), lambda w: w.permute(3, 2, 0, 1)
    yield "final_conv/kernel", None, of(model.to_pixels.weight), lambda w: w.flip(0, 1).permute(2, 3, 0, 1)         # flax does not turn it round


def golden_umd(preset="umd"):
    """The golden file, our model with its weights, the inputs and the outputs of one preset."""
    g, p = golden("umd"), golden("umd").config["presets"][preset]
    sizes = g.config["model"]
    patch, = set(sizes["patch_size"])
    model = unified.UMD(sizes["img_size"], sizes["img_size"] // patch, sizes["width"], sizes["depth"], sizes["num_heads"], sizes["dec_depth"],
                        p["no_noise_prob"], p["mask_ratio_no_noise"], p["mask_ratio"], sizes["num_classes"], g.config["num_cls"])
    left = dict(g.state_dict)
    for name, layer, ours, convert in flax_slots(model):
        theirs = left.pop(name) if layer is None else g.state_dict[name][layer]
        ours.copy_(convert(theirs))
        left = {k: v for k, v in left.items() if k != name}
    assert not left                                                                         # every one of theirs has its place
    return g, model.eval(), g.inputs["presets"][preset], g.outputs["presets"][preset]


def first(x):
    """Pixels or predictions with channels last -> with channels first."""
    return x.movedim(-1, -3)


def golden_draws(g, given, theirs):
    """The arguments of our forward that repeat the golden draws. There the largest of the uniform numbers are masked."""
    noised, B = len(given["t"]), len(g.inputs["images"])
    rows = [given.get(f"{part}_mask_uniform", torch.zeros(n, (g.config["model"]["img_size"] // g.config["model"]["patch_size"][0]) ** 2))
            for part, n in (("noised", noised), ("clean", B - noised))]
    return dict(t=given["t"] + 1, noise=first(given["eps"]), mask_noise=-torch.cat(rows),
                keep_label=~given["noised_label_drop"] if "noised_label_drop" in given else None)


PRESETS = ("umd", "mae", "dit", "maskdit", "finetune")


@functools.cache
def golden_umd_gradients(preset):
    """Loss, its terms and our model after the backward pass of one preset, every guess that predict() made, and what it made it from."""
    g, model, given, theirs = golden_umd(preset)
    calls, predict = [], model.predict
    model.predict = lambda x, t, labels, visible, keep: calls.append((x, t, labels, visible, keep, predict(x, t, labels, visible, keep))) or calls[-1][-1]
    labels = g.inputs["labels"] if g.config["presets"][preset]["use_labels"] else None
    loss, logs = model((first(g.inputs["images"]) + 1) / 2, labels, **golden_draws(g, given, theirs))
    loss.backward()
    return g, model, theirs, loss.detach(), {k: v.detach() for k, v in logs.items()}, calls


@pytest.mark.parametrize("preset", PRESETS)
def test_golden_umd_corruption_and_guesses(preset):
    g, model, theirs, _, _, calls = golden_umd_gradients(preset)
    parts = [part for part in ("noised", "clean") if f"{part}_pred" in theirs]
    assert len(parts) == len(calls)
    for part, (x, t, labels, visible, keep, guess) in zip(parts, calls):
        assert_close(x, first(theirs["x_t"]) if part == "noised" else first(g.inputs["images"][len(g.inputs["images"]) - len(x):]))
        assert_close(torch.cat(guess, 1), first(theirs[f"{part}_pred"]))
        latent = model.encode(x, model.condition(t, labels, keep), visible)
        assert_close(latent[:, :g.config["num_cls"]].mean(1), theirs[f"{part}_features"])
        if f"{part}_image_mask" in theirs:
            assert model.pixel_mask(visible).equal(first(theirs[f"{part}_image_mask"]).bool())
        else:
            assert visible is None


@pytest.mark.parametrize("preset", PRESETS)
def test_golden_umd_losses(preset):
    g, _, theirs, loss, logs, _ = golden_umd_gradients(preset)
    assert_close(loss, theirs["loss"])
    if "x0_clean" in logs:
        assert_close(logs["x0_clean"], theirs["mae_loss"])
    else:
        assert theirs["mae_loss"] == 0
    if "eps" in logs:
        assert_close((logs["x0"] + logs["eps"]) / 2, theirs["dit_loss"])
    for ours, name in (("x0", "x0_loss"), ("eps", "eps_loss")):
        if name in theirs:
            assert_close(logs[ours], theirs[name])


@pytest.mark.parametrize("preset", PRESETS)
def test_golden_umd_gradient_norms(preset):
    _, model, theirs, _, _, _ = golden_umd_gradients(preset)
    squares = {}
    for name, _, grad, _ in flax_slots(model, lambda p: torch.zeros_like(p) if p.grad is None else p.grad):
        squares[name] = squares.get(name, 0.0) + grad.double().square().sum().item()
    largest = max(theirs["grad_norms"].values())
    assert squares.keys() == theirs["grad_norms"].keys()
    for name, norm in theirs["grad_norms"].items():                     # a key's bias has no gradient but rounding, hence the second bound
        assert abs(squares[name] ** 0.5 - norm) <= max(1e-4 * norm, 1e-7 * largest), name


def test_golden_umd_probe_features():
    g, model, _, _ = golden_umd("umd")
    x = (first(g.inputs["images"]) + 1) / 2
    assert_close(model.embed(x), g.outputs["probe_features"])
    t = torch.zeros(len(x), dtype=torch.long)
    assert_close(torch.cat(model.predict(2 * x - 1, t), 1), first(g.outputs["clean_unmasked_pred"]))
    _, noisy, _, _ = golden_umd("dit")                                  # no clean part: index 50, which the network knows as 51
    assert noisy.best_t == 51
    assert_close(noisy.embed(x, noise=first(g.inputs["probe_noise"])), g.outputs["probe_features_noised_t50"])


def test_golden_umd_sampling_step():
    g, model, _, _ = golden_umd("umd")
    given, theirs, how = g.inputs["sampling"], g.outputs["sampling"], g.config["sampling"]
    x, t = first(given["x"]), torch.full((len(given["x"]),), how["t"] + 1)
    now, after = model.alpha_bar[how["t"] + 1], model.alpha_bar[how["t_next"] + 1]
    with torch.no_grad():
        assert_close(torch.cat(model.predict(x, t, given["y"]), 1), first(theirs["model_pred"]))
        x0, eps = model.guided(x, t, given["y"], how["cfg_scale"])
    assert_close(torch.cat([x0, eps], 1), first(theirs["model_pred_cfg"]))
    for name, believed in (("eps", unified.x0_from_eps(x, now, eps)), ("x0", x0)):
        believed = believed.clamp(-1, 1)
        assert_close(believed, first(theirs[f"step_{name}_pred_x0"]))
        ours = unified.ddim_step(x, believed, now, after, how["eta"], first(given["step_noise"]))
        assert_close(ours, first(theirs[f"step_{name}_sample"]))
    assert_close(eps, first(theirs["step_eps_model_eps"]))


def test_golden_umd_sampling_loop(monkeypatch):
    g, model, _, _ = golden_umd("umd")
    given, theirs, how = g.inputs["sampling"], g.outputs["sampling"], g.config["sampling"]
    noise = {0: given["loop_init_noise"], **{2 * i + 1: z for i, z in enumerate(given["loop_step_noise"])}}
    monkeypatch.setattr(model, "noise", lambda seeds, draw: first(noise[draw]))
    times, predict = [], model.predict
    monkeypatch.setattr(model, "predict", lambda x, t, *more: times.append(t[0].item() - 1) or predict(x, t, *more))
    *_, last = model.sample_steps(len(given["y"]), how["sampling_steps"], how["eta"], how["cfg_scale"], given["y"])
    assert_close(last.x, first(theirs["loop_sample"]), 1e-3)                                # random weights amplify rounding
    assert times[::2] == theirs["loop_timesteps"].tolist()                                  # each twice: with the label and without


def test_golden_umd_lists_of_steps(monkeypatch):
    g, model, _, _ = golden_umd("umd")
    visited = {}
    monkeypatch.setattr(unified, "denoise", lambda guess, noise, abar, *rest: visited.setdefault("abar", abar) * 0)
    for steps, theirs in g.outputs["ddim_timesteps"].items():
        visited.clear()
        list(model.sample_steps(1, int(steps)))
        assert visited["abar"].equal(model.alpha_bar[torch.as_tensor(theirs) + 1])
    assert_close(model.alpha_bar[1:], g.outputs["alphas_cumprod"])


def test_golden_fewshot():
    for case in golden("umd").__dict__["fewshot"]:
        x, y, x_test, y_test = (case["inputs"][k] for k in ("x", "y", "x_test", "y_test"))
        scores = probe.fewshot_scores(x, y, x_test, case["config"]["num_classes"], case["config"]["l2_reg"])
        assert_close(scores, case["outputs"]["scores"], 1e-3)           # the column of 100s costs float32 a digit
        assert (scores.argmax(1) == y_test).float().mean().item() == pytest.approx(float(case["outputs"]["accuracy"]), abs=1e-6)


def test_golden_dit_schedule():
    g = golden("dit")
    abar = unified.noise_schedule("linear", len(g.outputs["alphas_cumprod_linear"]))
    assert_close(abar, g.outputs["alphas_cumprod_linear"])
    kept = unified.spaced_timesteps(len(abar), [len(g.outputs["respaced_betas"])])
    short = abar[kept]
    assert_close(1 - short / torch.cat([torch.ones(1), short[:-1]]), g.outputs["respaced_betas"])
    for name, theirs in g.outputs["timestep_maps"].items():
        if not name.startswith("ddim"):
            assert unified.spaced_timesteps(len(abar), [int(name)]) == list(theirs)
    x_t = unified.q_sample(g.inputs["train_x0"], abar[g.inputs["train_t"]], g.inputs["train_noise"])
    assert_close(x_t, g.outputs["train_x_t"])
    theirs = g.outputs["timestep_embedding"]
    assert_close(unified.timestep_embedding(g.inputs["t"], theirs.size(1), theirs.size(1) // 2, "cos sin"), theirs)


# ---------------------------------------------------------------------------------------------------------------------------
# 7. UMD, MAE, MaskDiT and DiT: what they have in common, and what tells them apart


def umd(clean=0.5, mask_ratio_clean=0.75, mask_ratio_noised=0.375, seed=1, told=True, **options):
    """A small UMD in eval mode, 4 x 4 patches of 4 pixels. told: with random modulation, so that t and label matter."""
    torch.manual_seed(seed)
    sizes = dict(image_size=16, grid=4, width=32, depth=2, heads=4, decoder_depth=1)
    model = unified.UMD(**{**sizes, **options}, clean_ratio=clean, mask_ratio_clean=mask_ratio_clean, mask_ratio_noised=mask_ratio_noised).eval()
    for name, p in model.named_parameters():
        if told and "modulation" in name:
            nn.init.normal_(p, std=0.1)
    return model


def test_umd_without_noise_is_mae():
    x, u = some_pictures(), some_noise(4, 16)
    clean, _ = umd()(x, n_clean=4, mask_noise=u)
    alone, logs = umd(clean=1.0)(x, mask_noise=u)
    assert clean.equal(alone) and list(logs) == ["x0_clean"]
    visible = u.argsort(1)[:, -4:]                                      # written out: a quarter is seen, the error counts on the rest
    guess, _ = umd().predict(2 * x - 1, torch.zeros(4, dtype=torch.long), ids_keep=visible)
    hidden = torch.ones(4, 16).scatter(1, visible, 0.0).view(4, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert_close(alone, ((guess - (2 * x - 1)).square() * hidden).mean() / hidden.mean(), 1e-5)


def test_umd_without_mask_is_dit():
    x, t, noise = some_pictures(), torch.tensor([1, 20, 400, 1000]), torch.randn(4, 3, 16, 16)
    model = umd(clean=0.0, mask_ratio_noised=0.0)
    loss, _ = model(x, t=t, noise=noise)
    x0, eps = model.predict(unified.q_sample(2 * x - 1, model.alpha_bar[t], noise), t)
    assert_close(loss, (F.mse_loss(eps, noise) + F.mse_loss(x0, 2 * x - 1)) / 2, 1e-5)


def test_a_part_of_the_batch_stays_clean_and_both_parts_count_by_their_size():
    x = some_pictures(5)
    model = umd(clean=0.5)
    draws = dict(t=torch.tensor([3, 500, 900]), noise=torch.randn(3, 3, 16, 16), mask_noise=some_noise(5, 16))
    loss, logs = model(x, **draws)                                      # int(5 x 0.5) = 2 clean ones, the last
    assert_close(loss, 0.6 * (logs["x0"] + logs["eps"]) / 2 + 0.4 * logs["x0_clean"], 1e-6)
    changed = x.clone()
    changed[3:] = 0.5
    assert model(changed, **draws)[1]["eps"].equal(logs["eps"])


def test_what_is_hidden_and_what_is_noise_are_never_read():
    model, visible = umd(), torch.tensor([[0, 5, 10, 15]])
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([7])
    hidden = model.pixel_mask(visible)
    for ours, theirs in zip(model.predict(x, t, ids_keep=visible), model.predict(torch.where(hidden, 9.0, x), t, ids_keep=visible)):
        assert ours.equal(theirs)


def test_the_smallest_of_the_random_numbers_are_masked_in_every_method():
    u = some_noise(4, 16)
    smallest = u.argsort(1).argsort(1) < 12
    for masked in (masking(mage(), some_ids(mage()), 0.75, u)[1], addp().nested_masks(some_ids(mage()), 20, 1, u)[0],
                   umd().pixel_mask(umd().random_masking(u, 0.75))[:, 0, ::4, ::4].flatten(1)):
        assert masked.equal(u.argsort(1).argsort(1) < masked[0].sum()) and masked.any() and not masked.all()
    assert masked.equal(smallest)


def test_noise_is_learned_where_it_is_seen_and_pixels_where_they_are_hidden():
    model, visible = umd(), torch.tensor([[0, 1, 2, 3]])
    hidden = model.pixel_mask(visible)
    x0, noise, u = torch.rand(1, 3, 16, 16), torch.randn(1, 3, 16, 16), -torch.arange(16.0)[None]
    guesses = []
    model.predict = lambda *args: guesses.extend(torch.zeros(1, 3, 16, 16, requires_grad=True) for _ in range(2)) or guesses[-2:]
    sum(model.losses(x0, torch.tensor([9]), noise, u, 0.75)).backward()
    assert (guesses[0].grad != 0).equal(hidden.expand(1, 3, 16, 16)) and (guesses[1].grad != 0).equal(~hidden.expand(1, 3, 16, 16))


def test_a_fresh_model_does_not_know_the_time():
    model, x = umd(told=False), torch.randn(2, 3, 16, 16)
    early, late = (model.predict(x, torch.full((2,), t)) for t in (0, 900))
    assert all(a.equal(b) for a, b in zip(early, late))
    told = umd()
    assert not told.predict(x, torch.full((2,), 0))[0].allclose(told.predict(x, torch.full((2,), 900))[0])


def test_at_time_0_nothing_is_noised():
    model, x = umd(), some_pictures()
    read, _ = model.noised(x, 0, torch.randn_like(x))
    assert read.equal(2 * x - 1)


def test_classes_are_hidden_from_a_tenth_of_the_pictures_in_training_only():
    model = umd(classes=3)
    t, labels = torch.full((2000,), 5), torch.ones(2000, dtype=torch.long)
    free = model.condition(t[:1])
    assert not model.condition(t, labels).isclose(free, atol=1e-5).all(1).any()
    dropped = model.train().condition(t, labels).isclose(free, atol=1e-5).all(1).float().mean()
    assert 0.07 < dropped < 0.13


def test_guidance_1_is_the_conditional_model():
    model, x, t, labels = umd(classes=3), torch.randn(2, 3, 16, 16), torch.tensor([5, 5]), torch.tensor([0, 2])
    shown, free, more = model.predict(x, t, labels)[0], model.predict(x, t)[0], model.guided(x, t, labels, 3.0)[0]
    assert model.guided(x, t, labels, 1.0)[0].equal(shown)
    assert_close(more - free, 3 * (shown - free), 1e-4)


def test_ddim_is_deterministic_and_inverts_for_constant_noise():
    abar, eps, x0 = unified.noise_schedule("cosine")[::100], torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    x = x0
    for now, after in zip(abar, abar[1:]):                              # into the noise ...
        x = unified.ddim_step(x, unified.x0_from_eps(x, now, eps), now, after) if x is not x0 else unified.q_sample(x0, after, eps)
    assert_close(x, unified.q_sample(x0, abar[-1], eps), 1e-4)
    guess = lambda x, step: (unified.x0_from_eps(x, abar.flip(0)[step], eps), None)       # noqa: E731
    *_, back = unified.denoise(guess, {0: x, **dict.fromkeys(range(1, 99), torch.zeros(()))}.get, abar.flip(0), eta=0.0)
    assert_close(back.x, x0, 1e-3)                                      # ... and out of it


def test_ancestral_noise_is_what_the_posterior_of_ddpm_has():
    abar = unified.noise_schedule("linear")
    now, after, x, x0, noise = abar[500], abar[400], torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    beta = 1 - now / after                                              # [DDPM, eq. 7]
    mean = after.sqrt() * beta / (1 - now) * x0 + (1 - beta).sqrt() * (1 - after) / (1 - now) * x
    assert_close(unified.ddim_step(x, x0, now, after, 1.0, noise), mean + (beta * (1 - after) / (1 - now)).sqrt() * noise, 1e-5)


def test_diffusion_samples_depend_on_their_seed_and_not_on_their_company():
    model = umd()
    together = model.sample(3, steps=4, seeds=torch.tensor([5, 6, 7]))
    assert_close(together[1:2], model.sample(1, steps=4, seeds=torch.tensor([6])), 1e-4)
    assert not together[0].allclose(together[1])
    assert together.min() >= 0 and together.max() <= 1


def test_umd_inpaints_each_images_own_mask_and_nothing_else():
    model, x, mask = umd(), some_pictures(2), torch.zeros(2, 16, 16, dtype=torch.bool)
    mask[0, :8], mask[1, 4:8, 4:8] = True, True
    y = model.sample(2, steps=4, known=x, mask=mask)
    assert_close(torch.where(mask[:, None], x, y), x, 1e-6)
    assert not torch.where(mask[:, None], y, x).allclose(x)


def test_mae_fills_holes_and_says_that_it_cannot_start_from_nothing():
    model, x, mask = umd(clean=1.0), some_pictures(2), torch.zeros(2, 16, 16, dtype=torch.bool)
    mask[0, :8], mask[1, 5:7, 5:7] = True, True
    y = model.sample(2, known=x, mask=mask)
    assert_close(torch.where(mask[:, None], x, y), x, 1e-6)
    assert_close(y[1:], model.sample(1, known=x[1:], mask=mask[1:]), 1e-5)
    unseen = model.sample(2, known=x.masked_fill(mask[:, None], 0.0), mask=mask)
    assert_close(torch.where(mask[:, None], y, 0.0), torch.where(mask[:, None], unseen, 0.0), 1e-6)     # what is in the hole is not read
    with pytest.raises(ValueError, match="cannot start from nothing"):
        model.sample(2)


def test_a_reconstruction_keeps_what_was_seen():
    model, x = umd(), some_pictures()
    seen, rebuilt = model.reconstruct(x, some_noise(4, 16))
    hidden = (seen == 0.2).all(1, keepdim=True)
    assert hidden.float().mean() == 0.75
    assert torch.where(hidden, x, rebuilt).equal(x) and not rebuilt.allclose(x)


@pytest.mark.parametrize("t", [0, 300])
def test_umd_features_are_the_block_outputs_and_added_maps_enter_after_their_layer(t):
    model, x, noise = umd(), some_pictures(), torch.randn(4, 3, 16, 16)
    maps = model.features(x, t, [1, 2, 3], noise=noise)
    assert [m.shape[1:] for m in maps] == [model.layers[b] for b in (1, 2, 3)]
    read, c = model.noised(x, t, noise)
    latent = model.encode(read, c)
    last = model.norm(maps[1].flatten(2).mT)
    assert_close(last, latent[:, 4:], 1e-5)
    zero, shift = {1: torch.zeros_like(maps[0])}, {1: torch.ones_like(maps[0], requires_grad=True)}
    assert model.features(x, t, [3], zero, noise)[0].equal(maps[2])
    moved, = model.features(x, t, [3], shift, noise)
    assert not moved.allclose(maps[2])
    moved.sum().backward()
    assert shift[1].grad.abs().sum() > 0


def test_umd_features_stop_early():
    model = umd()
    model.blocks[1].forward = model.decoder_blocks[0].forward = forbidden
    model.features(some_pictures(), layers=[1])


@pytest.mark.parametrize("clean, ratios", [(1.0, (0.75, 0.0)), (0.5, (0.75, 0.375)), (0.0, (0.75, 0.5)), (0.0, (0.75, 0.0))])
def test_every_trainable_parameter_of_umd_gets_a_gradient(clean, ratios):
    model = umd(clean, *ratios, classes=2)
    model(some_pictures(), torch.tensor([0, 1, 0, 1]), t=torch.randint(1, 1001, (4 - int(4 * clean),)))[0].backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_umd_learns_one_batch():
    model, x = umd(told=False).train(), some_pictures(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draws = dict(t=torch.tensor([100, 300, 500, 700]), noise=torch.randn(4, 3, 16, 16), mask_noise=some_noise(8, 16))
    losses = []
    for _ in range(2 + 20):
        loss, logs = model(x, **draws)
        losses.append(logs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(losses[-1][k] < losses[0][k] for k in ("x0", "eps", "x0_clean"))


# ---------------------------------------------------------------------------------------------------------------------------
# 8. ADM: the network


def golden_unet(config, state):
    """Our ADM with the weights of an official state dict; config: the official flags. What shapes cannot tell comes from there."""
    ours, kept, dead = unified.published_adm(state, head=config["num_head_channels"])
    model = unified.build({**ours, "image_size": config["image_size"], "schedule": config["noise_schedule"], "steps": config["diffusion_steps"]})
    model.load_state_dict(kept)
    assert not dead
    return model.eval()


def golden_adm():
    g = golden("adm_unet")
    return g, golden_unet(g.config, g.state_dict)


def adm(image_size=16, steps=100, **options):
    """A fresh ADM in eval mode, 9 blocks unless said otherwise; the layers that start at 0 are drawn, or nothing would depend on anything."""
    torch.manual_seed(1)
    sizes = dict(ch=8, ch_mult=(1, 2), blocks=1, attention=(2,), head=8, groups=4)
    model = unified.ADM(image_size, steps=steps, **{**sizes, **options}).eval()
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return model


def some_gauss(*shape, seed=5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_golden_unet_sizes_are_read_off_the_shapes():
    g, model = golden_adm()
    ours, c = unified.published_adm(g.state_dict)[0], g.config
    assert (ours["ch"], ours["blocks"]) == (c["num_channels"], c["num_res_blocks"])
    assert ours["ch_mult"] == [float(m) for m in c["channel_mult"].split(",")]
    assert ours["attention"] == sorted(c["attention_ds"]) == sorted(c["image_size"] // int(side) for side in c["attention_resolutions"].split(","))
    assert sum(p.numel() for p in model.parameters()) == c["n_params"] and len(model.layers) == c["n_blocks"]
    assert model.out[2].out_channels == c["out_channels"] and model.input_blocks[0][0].in_channels == c["in_channels"]


def test_golden_unet_output():
    g, model = golden_adm()
    assert_close(model.predict(g.inputs["x"], g.inputs["t"]), g.outputs["forward"])
    assert_close(model.predict(g.inputs["x_feat"], g.inputs["t_feat"]), g.outputs["forward_feat"])


def test_golden_block_outputs():
    g, model = golden_adm()
    names = sorted(k for k in g.outputs if k.startswith("feature_"))
    assert [int(k[8:]) for k in names] == list(model.layers)
    for name, ours in zip(names, model.predict(g.inputs["x_feat"], g.inputs["t_feat"], list(model.layers))):
        assert_close(ours, g.outputs[name])


def test_golden_time_embedding():
    (g, model), seen = golden_adm(), []
    model.time_embed.register_forward_hook(lambda module, args, y: seen.append((*args, y)))
    t = g.inputs["t_emb"]
    model.predict(torch.zeros(len(t), 3, model.image_size, model.image_size), t)
    assert_close(seen[0][0], g.outputs["timestep_embedding"])
    assert_close(seen[0][1], g.outputs["time_embed"])


def test_golden_residual_block_and_attention():
    g = golden("adm_unet")
    state, width = g.state_dict_unit_resblock, g.inputs["unit_emb"].size(1)
    out, inp = state["in_layers.2.weight"].shape[:2]
    block = unified.ADMResBlock(inp, out, width, groups=32, dropout=0.0)
    block.load_state_dict(state)
    assert_close(block(g.inputs["unit_res_x"], g.inputs["unit_emb"]), g.outputs["unit_res"])
    attention = unified.ADMAttention(g.inputs["unit_attn_x"].size(1), g.config["num_head_channels"], groups=32)
    attention.load_state_dict(g.state_dict_unit_attention)
    assert_close(attention(g.inputs["unit_attn_x"]), g.outputs["unit_attn_legacy"])


@functools.cache
def published_unet():
    """The network for 256 pixels, shapes without memory."""
    with torch.device("meta"):
        return unified.build(unified.model_config("adm", "base", 256))


def test_the_published_network_has_37_blocks_of_the_published_shapes():
    model = published_unet()
    widths = [256] * 7 + [512] * 6 + [1024] * 12 + [512] * 6 + [256] * 6
    sides = [256] * 3 + [128] * 3 + [64] * 3 + [32] * 3 + [16] * 3 + [8] * 6 + [16] * 3 + [32] * 3 + [64] * 3 + [128] * 3 + [256] * 4
    assert model.layers == {b: (c, s, s) for b, (c, s) in enumerate(zip(widths, sides), 1)}
    maps = model.predict(torch.empty(1, 3, 256, 256, device="meta"), torch.empty(1, device="meta"), list(model.layers))
    assert [tuple(m.shape[1:]) for m in maps] == list(model.layers.values())
    assert sum(p.numel() for p in model.parameters()) == 552_814_086 and len(model.state_dict()) == 566
    assert (model.best_layer, model.best_t, model.t_range[:2]) == (24, 90, (0, 999))
    alike = [b for b in model.layers if b > 19 and model.layers[b] == model.layers[model.mirror(b)]]
    assert set(range(20, 38)) - set(alike) == {22, 25, 28, 31, 34} and model.mirror(19) == 19       # all but those that enlarge


def test_reading_block_24_costs_29_percent_of_the_whole_network():
    model, macs = published_unet(), []
    for layers in ([24], None):
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            model.predict(torch.empty(1, 3, 256, 256, device="meta"), torch.empty(1, device="meta"), layers)
        macs.append(round(counter.get_total_flops() / 2e9, 1))
    assert macs == [319.6, 1119.8]


def test_a_fresh_network_guesses_no_noise_at_all():
    model = unified.ADM(16, ch=8, ch_mult=(1, 2), blocks=1, attention=(2,), head=8, groups=4)
    assert not model.predict(some_gauss(2, 3, 16, 16), torch.tensor([0, 7])).any()
    noise = some_gauss(4, 3, 16, 16)
    assert_close(model(some_pictures(), noise=noise)[1]["mse"], noise.square().mean(), 1e-6)


def test_sizes_that_do_not_fit_are_refused():
    for options, words in [(dict(image_size=18, ch_mult=(1, 1, 1)), "18"), (dict(head=12), "16.*12")]:
        with pytest.raises(ValueError, match=words):
            adm(**options)


# ---------------------------------------------------------------------------------------------------------------------------
# 8. ADM: noise, loss, generation


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_golden_noise_schedule(schedule):
    g = golden("adm_unet")
    abar, rows = unified.noise_schedule(schedule, g.config["diffusion_steps"]), g.inputs["schedule_index"]
    before = F.pad(abar[:-1], (1, 0), value=1.0)
    zero, one = torch.zeros(len(abar), 3, 1, 1, dtype=torch.float64), torch.ones(len(abar), 3, 1, 1, dtype=torch.float64)
    mean = [unified.ddim_step(x, x0, abar, before, eta=1.0)[:, 0, 0, 0] for x, x0 in ((zero, one), (one, zero))]
    small, large = unified.log_variances(abar)
    for name, ours in [("alphas_cumprod", abar), ("betas", large.exp()), ("posterior_variance", unified.posterior_variance(abar, before)),
                       ("posterior_log_variance_clipped", small), ("posterior_mean_coef1", mean[0]), ("posterior_mean_coef2", mean[1])]:
        assert_close(ours[rows], g.outputs[f"{schedule}_{name}"], 1e-9)


def test_golden_kept_steps():
    g = golden("adm_unet")
    for name in [k for k in g.outputs if k.startswith("space_timesteps_")]:
        law, T = name.removeprefix("space_timesteps_"), g.config["diffusion_steps"]
        ours = unified.strided_timesteps(T, int(law[4:])) if law.startswith("ddim") else unified.spaced_timesteps(T, [int(n) for n in law.split(",")])
        assert ours == g.outputs[name].tolist()


def test_steps_are_kept_in_order_from_each_section_or_refused():
    assert unified.spaced_timesteps(10, [10]) == list(range(10))
    assert unified.spaced_timesteps(10, [2, 3]) == [0, 4, 5, 7, 9] and unified.spaced_timesteps(11, [2, 1]) == [0, 5, 6]
    with pytest.raises(ValueError, match="4 steps.*3"):
        unified.spaced_timesteps(6, [1, 4])
    assert unified.strided_timesteps(10, 4) == [0, 3, 6, 9] and len(unified.strided_timesteps(10, 7)) == 5                # no stride gives 7


def golden_losses(kept, t):
    """mse and vb of the golden batch, at steps t of the process of the steps kept."""
    g, model = golden_adm()
    kept = torch.tensor(kept)
    abar, x0, noise = model.alpha_bar[kept], g.inputs["x0"], g.inputs["noise_loss"]
    xt = unified.q_sample(x0, abar[t], noise)
    return g, model, xt, unified.hybrid_loss(model.predict(xt, kept[t]), x0, xt, noise, t, abar)


def test_golden_loss_terms():
    g, model, xt, (mse, vb) = golden_losses(range(golden("adm_unet").config["diffusion_steps"]), golden("adm_unet").inputs["t_loss"])
    assert_close(xt, g.outputs["q_sample"])
    for ours, name in [(mse, "mse"), (vb, "vb"), (mse + vb, "loss")]:
        assert_close(ours, g.outputs[f"loss_hybrid_{name}"])
        for one, official in zip(ours, g.outputs[f"loss_hybrid_{name}"]):                   # each on its own scale: t = 0 is far the largest
            assert_close(one, official)
    loss, logs = model((g.inputs["x0"] + 1) / 2, t=g.inputs["t_loss"], noise=g.inputs["noise_loss"])
    assert_close(loss, g.outputs["loss_hybrid_loss"].mean())
    assert_close(logs["mse"] + logs["vb"], loss, 1e-6)


def test_golden_loss_of_a_shortened_process():
    g, T = golden("adm_unet"), golden("adm_unet").config["diffusion_steps"]
    _, _, _, (mse, vb) = golden_losses(unified.spaced_timesteps(T, [250]), g.inputs["t_loss_respaced"])
    assert_close(mse, g.outputs["loss_respaced250_mse"])
    for ours, official in zip(vb, g.outputs["loss_respaced250_vb"]):
        assert_close(ours * 250 / T, official)                          # that file rescales vb, which we do not


def golden_step_back(clip=True):
    """The golden single steps: file, log-variance, what ddim_step needs, model. In float64, for x_0 at t = 999 carries the network's rounding
    error times 157, and that of the file alone takes up most of the tolerance."""
    g, model = golden_adm()
    x, t, model = g.inputs["x_t"].double(), g.inputs["t_step"], model.double()
    eps, v = model.predict(x, t).chunk(2, 1)
    now, after = model.alpha_bar[t], F.pad(model.alpha_bar, (1, 0), value=1.0)[t]
    x0 = unified.x0_from_eps(x, now, eps)
    return g, unified.learned_log_variance(v, t, model.alpha_bar), (x, x0.clamp(-1, 1) if clip else x0, now, after), model


AMPLIFIED = 5e-4                        # the tolerance where t = 999 takes part


def test_golden_ancestral_step():
    g, log_var, step, _ = golden_step_back()
    noise, std = g.inputs["noise_step"], (0.5 * log_var).exp()
    for name, ours in [("p_mean_variance_pred_xstart", step[1]), ("p_sample_pred_xstart", step[1]), ("p_mean_variance_log_variance", log_var),
                       ("p_mean_variance_variance", log_var.exp()), ("p_mean_variance_mean", unified.ddim_step(*step, eta=1.0)),
                       ("p_sample", unified.ddim_step(*step, eta=1.0, noise=noise, std=std))]:
        assert_close(ours, g.outputs[name], AMPLIFIED)
    _, _, step, _ = golden_step_back(clip=False)
    assert_close(unified.ddim_step(*step, eta=1.0, noise=noise, std=std), g.outputs["p_sample_noclip"], AMPLIFIED)


def test_golden_ddim_steps():
    g, _, (x, x0, now, after), model = golden_step_back()
    for eta, name in [(0.0, "ddim_eta0"), (0.7, "ddim_eta07")]:
        assert_close(unified.ddim_step(x, x0, now, after, eta, g.inputs["noise_step"]), g.outputs[name], AMPLIFIED)
    noisier = F.pad(model.alpha_bar, (0, 1))[g.inputs["t_step"] + 1]
    assert_close(unified.ddim_step(x, x0, now, noisier), g.outputs["ddim_reverse"], AMPLIFIED)


@pytest.mark.parametrize("name, eta", [("ddpm", 1.0), ("ddim", 0.0)])
def test_golden_sampling_loops(name, eta):
    (g, model), seen = golden_adm(), []
    kept = g.outputs["loop_timestep_map" if name == "ddpm" else "loop_ddim_timestep_map"].tolist()
    predict, start, noise = model.double().predict, g.inputs["loop_x_T"].double(), g.inputs["loop_noise"]
    model.noise = lambda seeds, draw: noise[draw // 2] if draw else start
    model.predict = lambda x, t: seen.append(t.unique().item()) or predict(x, t)
    *_, state = model.sample_steps(1, steps=len(kept), eta=eta)
    assert seen == kept[::-1]
    assert_close(state.x, g.outputs[f"loop_{name}"], AMPLIFIED)


def test_at_step_0_the_bytes_themselves_are_scored(monkeypatch):
    model, x, noise = adm(), some_pictures(), some_gauss(4, 3, 16, 16)
    monkeypatch.setattr(unified, "discretised_nll", lambda x, mean, log_std: torch.full_like(x, 7.0))
    x0, xt, _ = model.noised(x, torch.tensor([0, 1, 0, 99]), noise)
    vb = unified.hybrid_loss(model.predict(xt, torch.zeros(4)), x0, xt, noise, torch.tensor([0, 1, 0, 99]), model.alpha_bar)[1]
    assert_close(vb[[0, 2]], torch.full((2,), 7 / math.log(2)), 1e-6)
    assert (vb[[1, 3]] - 7 / math.log(2)).abs().min() > 0.1


def test_discretised_nll_is_a_distribution_over_256_bytes():
    bytes_ = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, std in [(0.1, 0.3), (-0.5, 0.02), (2.0, 1.0)]:
        mass = (-unified.discretised_nll(bytes_, torch.tensor(mean), torch.tensor(std).double().log())).exp()
        assert abs(mass.sum() - 1) < 1e-6
        assert bytes_[mass.argmax()] == pytest.approx(max(-1, min(1, mean)), abs=1 / 127.5)


def test_vb_teaches_the_variance_and_nothing_else():
    model = adm()
    _, logs = model(some_pictures(), t=torch.tensor([0, 5, 50, 99]))
    last = model.out[2].weight                                          # rows 0 - 2 guess the noise, rows 3 - 5 are v
    for term, rows in [("mse", slice(0, 3)), ("vb", slice(3, 6))]:
        grad = torch.autograd.grad(logs[term], last, retain_graph=True)[0].flatten(1).abs().amax(1)
        assert grad.nonzero().flatten().tolist() == list(range(6))[rows]


def test_every_parameter_of_the_unet_gets_a_gradient_and_one_batch_is_learned():
    model, x, t, noise, losses = adm(), some_pictures(8), torch.arange(5, 85, 10), some_gauss(8, 3, 16, 16), []
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(40):
        loss, logs = model(x, t=t, noise=noise)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.abs().max() > 0 for p in model.parameters())
        optimizer.step()
        losses.append(logs["mse"].item())
    assert losses[-1] < 0.5 * losses[0] and losses[-1] < 0.5           # 1 without having learned anything


def test_the_loss_in_bfloat16_is_nearly_that_in_float32():
    model, draws = adm(), dict(t=torch.tensor([0, 5, 50, 99]), noise=some_gauss(4, 3, 16, 16))
    plain, _ = model(some_pictures(), **draws)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model(some_pictures(), **draws)
    assert loss.dtype == torch.float32 and not loss.equal(plain)
    assert_close(loss, plain, 1e-2)


def test_t_and_noise_are_drawn_if_not_given():
    model, seen = adm(), []
    predict = model.predict
    model.predict = lambda x, t: seen.append(t) or predict(x, t)
    losses = [model(some_pictures(64))[0].item() for _ in range(8)]
    assert len(set(losses)) == 8 and torch.cat(seen).min() < 5 and torch.cat(seen).max() > 94
    assert torch.cat(seen).bincount(minlength=100).max() < 20           # 512 draws from 100 steps


def test_a_denoised_picture_depends_on_its_seed_and_not_on_its_company():
    model = adm()
    together = list(model.sample_steps(3, steps=5, seeds=torch.tensor([3, 8, 3])))
    alone = list(model.sample_steps(1, steps=5, seeds=torch.tensor([8])))
    assert len(together) == len(alone) == 5
    for a, b in zip(together, alone):
        assert_close(a.x[1:2], b.x, 1e-4)                               # a batch of another size may be summed in another order
        assert_close(a.x[0], a.x[2], 1e-4)
    x = model.sample(3, steps=5, seeds=torch.tensor([3, 8, 3]))
    assert x.equal(model.render(together[-1])) and 0 <= x.min() and x.max() <= 1 and not x[0].allclose(x[1], atol=0.1)
    assert [u.shape for u in model.noise(torch.arange(2)).unbind()] == [(3, 16, 16)] * 2


def test_noise_of_eta_0_is_added_in_no_step_and_of_1_in_all_but_the_last():
    model, asked = adm(), []
    noise = model.noise
    for eta, matters in [(0.0, []), (0.5, [1, 3, 5]), (1.0, [1, 3, 5])]:
        pictures = []
        for changed in (None, 1, 3, 5, 7):
            model.noise = lambda seeds, draw: noise(seeds, draw) + (draw == changed)
            pictures.append(model.sample(1, steps=4, eta=eta))
        assert [draw for draw, x in zip((1, 3, 5, 7), pictures[1:]) if not x.equal(pictures[0])] == matters


def test_diffusion_paints_each_pictures_own_hole_and_nothing_else():
    model, known = adm(), some_pictures(4)
    mask, _ = holes(16)
    *_, state = model.sample_steps(4, steps=5, known=known, mask=mask)
    x = model.render(state)
    outside = ~mask[:, None].expand_as(x)
    assert_close(x[outside], known[outside], 1e-6)
    assert not x[~outside].allclose(known[~outside], atol=0.05)
    other = model.sample(4, steps=5, known=torch.where(outside, 1 - known, known), mask=mask)
    assert not other[~outside].allclose(x[~outside], atol=1e-3)         # what is around a hole decides what goes into it
    hidden = model.sample(4, steps=5, known=torch.where(outside, known, 1 - known), mask=mask)
    assert hidden.equal(x)                                              # and what was in it does not


def test_at_every_step_what_is_known_is_as_noisy_as_the_rest():
    model, known, mask = adm(), some_pictures(1), torch.zeros(1, 16, 16, dtype=torch.bool)
    kept = unified.spaced_timesteps(100, [5])[::-1]
    for step, state in enumerate(model.sample_steps(1, steps=5, known=known, mask=mask)):
        abar = model.alpha_bar[kept[step + 1]] if step < 4 else torch.ones((), dtype=torch.float64)
        assert_close(state.x, unified.q_sample(2 * known - 1, abar, model.noise(torch.arange(1), 2 * step + 2)), 1e-6)


def test_labels_are_refused():
    with pytest.raises(ValueError, match="labels"):
        adm().sample(2, labels=torch.tensor([0, 1]))


# ---------------------------------------------------------------------------------------------------------------------------
# 8. ADM: representation


def test_features_are_block_outputs_of_the_noised_picture():
    model, x, noise = adm(), some_pictures(), some_gauss(4, 3, 16, 16)
    xt = model.alpha_bar[30].sqrt().float() * (2 * x - 1) + (1 - model.alpha_bar[30]).sqrt().float() * noise
    for layers in ([3], [9, 2]):                                        # in the order asked for
        for ours, plain in zip(model.features(x, 30, layers, noise=noise), model.predict(xt, torch.full((4,), 30), layers)):
            assert_close(ours, plain, 1e-5)
    each = model.features(x, torch.tensor([30, 0, 30, 99]), [3], noise=noise)[0]
    assert_close(each[::2], model.features(x, 30, [3], noise=noise)[0][::2], 1e-5)
    assert not model.features(x, 30)[0].equal(model.features(x, 30)[0])                     # drawn if not given
    assert [tuple(m.shape[1:]) for m in model.features(x, layers=list(model.layers))] == list(model.layers.values())
    assert_close(model.embed(x, noise), model.features(x, 9, [model.best_layer], noise=noise)[0].mean((2, 3)), 1e-6)     # 9 of 100


def test_no_block_of_the_unet_after_the_last_layer_asked_for_runs():
    model = adm()
    for b, block in enumerate(model.blocks, 1):
        if b == 6:
            block.forward = forbidden
    model.features(some_pictures(), layers=[5])
    with pytest.raises(AssertionError):
        model.features(some_pictures(), layers=[6])


def test_added_maps_reach_the_next_block_and_the_mirror():
    model, x, noise, seen = adm(), some_pictures(), some_gauss(4, 3, 16, 16), []
    zeros = {b: torch.zeros(4, *shape) for b, shape in model.layers.items()}
    plain = model.features(x, 20, list(model.layers), noise=noise)
    for ours, theirs in zip(model.features(x, 20, list(model.layers), add=zeros, noise=noise), plain):
        assert ours.equal(theirs)                                       # zeros add nothing
    extra = torch.randn(4, *model.layers[2], requires_grad=True)
    model.blocks[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.blocks[model.mirror(2) - 1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.features(x, 20, [9], add={2: extra}, noise=noise)[0].square().sum().backward()
    assert_close(seen[0], plain[1] + extra, 1e-6)
    assert_close(seen[1][:, -len(extra[0]):], plain[1] + extra, 1e-6)   # there, what comes from the mirror is second
    assert (extra.grad != 0).any(1).all()


# ---------------------------------------------------------------------------------------------------------------------------
# The heads of probe.py that read maps


def golden_heads(case):
    """The golden file, the settings of a case, and {(layer, t): map} of the features it gives."""
    g = golden("diffssl_heads")
    maps = {tuple(int(n) for n in k.removeprefix("feat_b").split("_t")): v for k, v in g.inputs.items() if k.startswith("feat_b")}
    return g, g.config["cases"][case], maps


def load_official(head, state):
    """Load an official state dict; there are no published files of heads, so two names of ours are plainer."""
    names = {"intra_inter_block_attention.cls_token": "cls_token", "head.weight": "linear.weight", "head.bias": "linear.bias"}
    last = max((int(k.split(".")[1]) for k in state if k.startswith("fcs.")), default=-1)

    def ours(name):
        if name.startswith("intra_inter_block_attention.layers."):
            number, rest = name.split(".", 2)[2].split(".", 1)
            return f"blocks.{int(number) - 1}.{rest}"
        return name.replace(f"fcs.{last}.", "linear.") if name.startswith(f"fcs.{last}.") else names.get(name, name)
    head.load_state_dict({ours(k): v.clone() for k, v in state.items()})
    return head.eval()


def golden_difformer(g, settings, layers, steps):
    """A DifFormer of a case's settings."""
    shapes = {b: (channels, side, side) for (b, channels), side in zip(g.config["feature_dims"].items(), g.config["feature_sizes"].values())}
    dim, heads, ratio, depth = (int(n) for n in settings["fusion_arc"].split("Attention:")[1].split(",")[0].split(":"))
    return probe.DifFormer(shapes, {t: layers for t in steps}, g.config["num_classes"], settings["pre_pool_size"], dim, heads, ratio, depth)


@pytest.mark.parametrize("case", ["linear", "mlp"])
def test_golden_linear_and_mlp_heads(case):
    g, settings, maps = golden_heads(case)
    x = probe.pool_cells(maps[settings["block"], settings["t"]], settings["pre_pool_size"]).flatten(1)
    head = load_official(probe.MLPHead(x.size(1), g.config["num_classes"], [int(n) for n in settings["head_arc"].split("_") if n]), g.state_dict[case])
    assert_close(head(x), g.outputs[case])


@pytest.mark.parametrize("case", ["attention", "difformer"])
def test_golden_attention_head_and_difformer(case):
    g, settings, maps = golden_heads(case)
    head = load_official(golden_difformer(g, settings, settings["blocks"], settings["steps"]), g.state_dict[case])
    found = [maps[b, t] for t in settings["steps"] for b in settings["blocks"]]
    assert_close(head(*found), g.outputs[case])
    if case == "difformer":
        for b in settings["blocks"]:
            name = f"difformer_tokens_b{b}_t{settings['steps'][0]}"
            assert_close(head.pre_layer[str(b)](maps[b, settings["steps"][0]]).flatten(2).mT, g.outputs[name])
        for t, z in zip(settings["steps"], head.read(*found).chunk(len(settings["steps"]), 1)):
            assert_close(z, g.outputs[f"difformer_cls_t{t}"])


def golden_encoder():
    g = golden("diffssl_heads")
    return g, golden_unet(g.config["unet"], g.state_dict["encoder"]).requires_grad_(False)


def test_golden_encoder_gives_the_features_that_heads_read():
    g, model = golden_encoder()
    assert {b: (g.config["feature_dims"][b], g.config["feature_sizes"][b], g.config["feature_sizes"][b]) for b in g.config["feature_dims"]} == model.layers
    _, _, maps = golden_heads("difformer")
    for (b, t), official in maps.items():
        ours, = model.features((g.inputs["x0"] + 1) / 2, t, [b], noise=g.inputs[f"noise_t{t}"])
        assert_close(ours, official)


def golden_diffeed():
    """The golden DifFeed: file, settings, network, head, and what the head reads."""
    (g, model), settings = golden_encoder(), golden("diffssl_heads").config["cases"]["diffeed"]
    inner = golden_difformer(g, settings, settings["second_fw_b_list"], [settings["t"]])
    feedback = {b: model.mirror(b) for b in settings["feedback_b_list"]}
    head = probe.DifFeed(model.features, model.layers, feedback, load_official(inner, g.state_dict["diffeed_head"]))
    head.feedback_layers.load_state_dict({k: v.clone() for k, v in g.state_dict["diffeed_feedback_layers"].items()})
    return g, settings, model, head.eval(), ((g.inputs["x0"] + 1) / 2, g.inputs[f"noise_t{settings['t']}"])


def test_golden_diffeed():
    g, settings, model, head, (x, noise) = golden_diffeed()
    assert_close(head(x, noise), g.outputs["diffeed"])
    add = head.fed_back(model.features(x, settings["t"], list(head.feedback), noise=noise))
    for name in [k for k in g.outputs if k.startswith("diffeed_feedback_from_b")]:
        assert_close(add[model.mirror(int(name.removeprefix("diffeed_feedback_from_b")))], g.outputs[name])
    for name in [k for k in g.outputs if k.startswith("diffeed_second_pass_b")]:
        second, = model.features(x, settings["t"], [int(name.removeprefix("diffeed_second_pass_b"))], add, noise)
        assert_close(second, g.outputs[name])


class Threshold(nn.Module):
    """ReLU with its corner elsewhere."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def forward(self, x):
        return x * (x > self.at)


def test_golden_diffeed_training_step():
    grads = []
    for corner in (3e-6, -3e-6, 1e-5, -1e-5):                           # what is too near to 0 for float32 to tell is cut off, or let through
        g, _, model, head, (x, noise) = golden_diffeed()
        model.to(memory_format=torch.contiguous_format)                 # as the official run, since gradients gather rounding errors
        for layer in head.train().feedback_layers:
            layer[2] = Threshold(corner)
        logits = head(x, noise)
        loss = F.cross_entropy(logits, g.inputs["y"])
        loss.backward()
        assert_close(logits, g.outputs["diffeed_train_logits"])
        assert_close(loss, g.outputs["diffeed_train_loss"])
        assert_close(head.linear.weight.grad, g.outputs["diffeed_grad_head_weight"])
        assert_close(head.head.cls_token.grad, g.outputs["diffeed_grad_cls_token"])
        assert_close(head.feedback_layers[0][1].running_mean, g.outputs["diffeed_running_mean_0"])
        assert_close(head.feedback_layers[0][1].running_var, g.outputs["diffeed_running_var_0"])
        assert all(p.grad is None for p in model.parameters())          # frozen
        grads.append([layer[0].weight.grad for layer in head.feedback_layers])
    for i, ways in enumerate(zip(*grads)):                              # row by row, the official run has done one or the other
        official = g.outputs[f"diffeed_grad_feedback_{i}_conv"]
        errors = torch.stack([(ours - official).abs().flatten(1).amax(1) for ours in ways])
        right = errors <= 1e-4 * official.abs().max()
        assert right.any(0).all() and right.all(0).float().mean() > 0.8                     # few rows are in question


def settings(**options):
    """Flags of probe.py as settle() leaves them."""
    return probe.settle(probe.Config(run="", device="cpu", workers=0, **options))


def test_a_difformer_of_one_place_is_the_attention_head():
    head, m = probe.DifFormer({3: (12, 6, 6)}, {90: [3]}, classes=5, cells=4, dim=16, heads=4), torch.randn(2, 12, 6, 6)
    norm, project = head.pre_layer["3"][1:]
    x = project(F.layer_norm(probe.pool_cells(m, 4), (12, 4, 4), norm.weight, norm.bias)).flatten(2).mT
    x = torch.cat([head.cls_token.expand(2, -1, -1), x], 1)
    for block in head.blocks:
        x = block(x)
    assert_close(head(m), head.linear(x[:, 0]), 1e-6)
    twice = probe.DifFormer({3: (12, 6, 6)}, {90: [3], 150: [3]}, classes=5, cells=4, dim=16, heads=4)
    twice.load_state_dict({**head.state_dict(), "linear.weight": head.linear.weight.repeat(1, 2), "linear.bias": head.linear.bias})
    assert_close(twice.read(m, m), head.read(m).repeat(1, 2), 1e-6)     # all steps share one transformer
    assert_close(head(m.flip(3)), head(m), 1e-5)                        # fresh, it knows no places


def test_the_published_heads_have_the_published_numbers_of_parameters():
    shapes = published_unet().layers
    with torch.device("meta"):
        attention, fused = probe.DifFormer(shapes, {150: [24]}, 1000), probe.DifFormer(shapes, {90: [19, 24, 30], 150: [19, 24, 30], 300: [19, 24, 30]}, 1000)
        fed = probe.DifFeed(None, shapes, probe.feedback_of(published_unet(), types.SimpleNamespace(feedback="")), attention)
        heads = [probe.MLPHead(4 * 1024, 1000), attention, fused, fed]
    assert [sum(p.numel() for p in head.parameters()) for head in heads] == [4_097_000, 27_786_216, 31_802_344, 30_545_896]


def test_diffeed_learns_through_a_frozen_network_of_any_kind():
    for model, layers, late in [(adm(), [8], [6, 7, 9]), (mage(), [2], [3, 4])]:            # 7 and 9 change size or channels on their way
        cfg = settings(head="diffeed", pool="2", feedback=",".join(map(str, late)))
        wanted, x = [probe.Place(b, t, "2") for t in map(type(model.t_range[1]), (0.1 * model.t_range[1], 0.3 * model.t_range[1])) for b in layers], some_pictures()
        found = probe.reader({"top1": model}, wanted, cfg)(x, torch.arange(4))
        head = probe.new_head("top1", {"top1": model}, wanted, found, 3, cfg)
        assert list(head.feedback.items()) == [(b, model.mirror(b)) for b in late]
        head(*probe.found_in(found, "top1")).square().sum().backward()
        used = [early < max(layers) for early in head.feedback.values()]
        for layer, early in zip(head.feedback_layers, head.feedback.values()):
            assert early > max(layers) or layer[0].weight.grad.abs().max() > 0
        assert any(used) and all(p.grad is None and not p.requires_grad for p in model.parameters())
        assert set(dict(head.named_parameters())) == set(dict(head.named_parameters(remove_duplicate=False)))
        assert not {id(p) for p in head.parameters()} & {id(p) for p in model.parameters()}
        fed_back, model = head.fed_back, model.requires_grad_(True)
        head.fed_back = lambda maps: fed_back(maps) if not any(m.requires_grad for m in maps) else forbidden()
        head.read(*probe.found_in(found, "top1"))                             # even if it were to learn: not through the first pass


def test_what_is_fed_back_by_default_is_the_last_of_each_size_or_all():
    cfg = types.SimpleNamespace(feedback="")
    assert probe.feedback_of(published_unet(), cfg) == {21: 17, 24: 14, 27: 11, 30: 8, 33: 5, 36: 2}
    assert probe.feedback_of(mage(depth=3, decoder_depth=3), cfg) == {4: 3, 5: 2}
    for model, wrong, right in [(published_unet(), "1", "20 to 37"), (published_unet(), "40", "20 to 37"), (mage(), "2", "3 to 4")]:
        with pytest.raises(unified.UserError, match=f"--feedback {wrong}.*{right}"):
            probe.feedback_of(model, types.SimpleNamespace(feedback=wrong))


def test_the_learning_rate_of_diffssl_is_torchs_step_law():
    cfg = settings(head="attention", sgd=True)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.05)
    law = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.1)
    for epoch in range(28):
        assert probe.rate(epoch, cfg) == pytest.approx(optimizer.param_groups[0]["lr"]) == pytest.approx(probe.rate(epoch + 0.99, cfg))
        optimizer.step()
        law.step()
    peaks = {name: probe.rate(0, settings(head=name, sgd=True)) for name in probe.SGD}
    assert peaks == pytest.approx({"linear": 0.01, "mlp": 0.01, "attention": 0.05, "difformer": 0.05, "diffeed": 0.01})
    assert [probe.rate(e, settings(head="linear", lr=0.1)) for e in (0, 10, 90)] == pytest.approx([0, 1.6, 0])


def test_a_picture_always_looks_the_same_and_a_fresh_crop_does_not():
    model, x = adm(), some_pictures()
    wanted = [probe.Place(b, t, "mean") for t in (9, 30) for b in (3, 8)]
    cfg = settings(head="linear", seed=1)
    read = probe.reader({"top1": model, "untrained": model}, wanted, cfg)
    one, again, other = read(x, torch.arange(4)), read(x[2:], torch.arange(2, 4)), read(x, torch.arange(4, 8))
    assert {name for name, _ in one} == {"top1", "untrained", "pixels"}
    for place in wanted:
        assert_close(one["top1", place][2:], again["top1", place], 1e-5)
        assert not one["top1", place].allclose(other["top1", place], atol=1e-3)
        assert one["top1", place].equal(one["untrained", place])                            # all networks see the same noise
        alone = probe.feature_vectors(model, [place], x, unified.hash_ints(1, torch.arange(4)))[place]
        assert_close(one["top1", place], alone, 1e-5)                   # whatever else is read
    assert one["pixels", None].equal(x.flatten(1))


def test_places_are_read_as_their_names_say():
    model, x, seeds = adm(), some_pictures(), torch.arange(4)
    own, mean, four = probe.Place(8, 9, "mean"), probe.Place(3, 9, "mean"), probe.Place(3, 9, "2")
    assert (model.best_layer, model.best_t) == own[:2]
    found = probe.feature_vectors(model, [own, mean, four], x, seeds)
    noise = probe.noise_of(model, 9, seeds)
    assert found[own].equal(model.embed(x, noise))
    m = model.features(x, 9, [3], noise=noise)[0]
    assert_close(found[mean], F.layer_norm(m.mean((2, 3)), (8,), eps=1e-6), 1e-5)
    assert_close(found[four], torch.stack([m[:, :, r:r + 4, c:c + 4].mean((2, 3)) for r in (0, 4) for c in (0, 4)], 2).flatten(1), 1e-5)
    assert list(found) == [own, mean, four] and probe.pool_cells(m, 100).equal(m)


def test_a_sweep_reads_every_layer_at_the_steps_of_diffssl():
    wanted = probe.places(published_unet(), settings(sweep=True))
    assert len(wanted) == 37 * 8 and {place.layer for place in wanted} == set(range(1, 38))
    assert list(dict.fromkeys(place.t for place in wanted)) == [0, 10, 30, 50, 90, 150, 300, 500]
    assert probe.places(mage(), settings()) == [probe.Place(2, 0.0, "mean")]
    assert {place.t for place in probe.places(mage(), settings(sweep=True, t="0,0.5"))} == {0.0, 0.5}
    assert probe.places(published_unet(), settings()) == [probe.Place(24, 90, "mean")]


def test_probing_many_places_at_once_is_probing_each():
    (x, y), (x_test, y_test) = clouds(120, 2.0), clouds(90, 2.0, seed=1)
    places, tests = torch.stack([x, x.flip(1), x * torch.randn(5)]), torch.stack([x_test, x_test.flip(1), torch.randn(90, 5)])
    assert probe.ridge_probe(places, y, tests, y_test) == [probe.ridge_probe(a, y, b, y_test) for a, b in zip(places, tests)]


def test_matryoshka_reads_the_first_dimensions_only_and_all_sizes_at_once():
    head, x = probe.ProbeHead(32, 3), torch.randn(16, 32)
    full, narrow = head.nested(x, dims=[32, 8])
    assert full.equal(head(x))
    z = head.eval().read(x)
    assert_close(head.nested(x, dims=[8])[0], z[:, :8] @ head.linear.weight[:, :8].T + head.linear.bias, 1e-6)
    cfg, y = settings(head="linear", sgd=True, epochs=12, lr=20.0, batch_size=64), torch.arange(64) % 4
    x = torch.cat([F.one_hot(y // 2 * 2, 4).float(), F.one_hot(y, 4).float()], 1)           # half is known from the first four
    heads = {"top1": probe.MLPHead(8, 4)}
    probe.train_heads(heads, lambda epoch: [({("top1", 0): x}, y)] * 10, 10, [4, 8], cfg)
    four, eight = ((logits.argmax(1) == y).float().mean().item() for logits in heads["top1"].nested(x, dims=[4, 8]))
    assert (four, eight) == (0.5, 1.0)


def test_a_heat_map_is_darker_where_accuracy_is_higher():
    scores = {probe.Place(b, t, "mean"): (b + 10 * t) / 40 for b in (1, 2, 3) for t in (0, 1, 2)}
    best = max(scores, key=scores.get)
    image = probe.heat_map(scores, best, "title", w=40, h=30).convert("RGB")
    dark = [255 - image.getpixel((90 + 40 * i + 5, 60 + 30 * j + 5))[0] for j in (0, 1, 2) for i in (0, 1, 2)]
    assert dark == sorted(dark) and dark[0] == 0 and dark[-1] == 255 - 0x1f
    framed = [image.getpixel((90 + 40 * i + 1, 60 + 30 * j + 10)) == (0xd6, 0x27, 0x28) for j in (0, 1, 2) for i in (0, 1, 2)]
    assert framed == [False] * 8 + [True]


def test_features_that_do_not_fit_into_memory_are_a_users_mistake(monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 100)                # 10,000 bytes
    cfg, data = settings(head="ridge"), pictures(6, 16)
    with pytest.raises(unified.UserError, match="6 pictures need .*--limit"):
        probe.extract_features(lambda x, names: {"": x.flatten(1)}, data, torch.arange(6), cfg, "")


# ---------------------------------------------------------------------------------------------------------------------------
# ADM and the heads: presets, published weights, scripts


@pytest.mark.parametrize("size, image_size, parameters", [("tiny", 32, 794_982), ("small", 32, 42_858_886), ("base", 256, 552_814_086)])
def test_every_preset_without_a_tokenizer_can_be_built_from_plain_values(size, image_size, parameters):
    config = json.loads(json.dumps(unified.model_config("adm", size, image_size, tokenizer={"never": "read"})))
    with torch.device("meta"):
        model = unified.build(config)
    assert "tokenizer" not in config and sum(p.numel() for p in model.parameters()) == parameters
    assert model.image_size == image_size and model.layers[1][1:] == (image_size, image_size)


def official_unet(classes=0):
    """Names and shapes in 256x256_diffusion_uncond.pt, or with its 1,000 classes, written down block by block."""
    def layer(name, *weight):
        return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}

    def residual(name, inp, out):
        shapes = layer(f"{name}.in_layers.0", inp) | layer(f"{name}.in_layers.2", out, inp, 3, 3) | layer(f"{name}.emb_layers.1", 2 * out, 1024)
        shapes |= layer(f"{name}.out_layers.0", out) | layer(f"{name}.out_layers.3", out, out, 3, 3)
        return shapes | (layer(f"{name}.skip_connection", out, inp, 1, 1) if inp != out else {})

    def attention(name, width):
        return layer(f"{name}.norm", width) | layer(f"{name}.qkv", 3 * width, width, 1) | layer(f"{name}.proj_out", width, width, 1)
    shapes = layer("time_embed.0", 1024, 256) | layer("time_embed.2", 1024, 1024) | layer("input_blocks.0.0", 256, 3, 3, 3)
    shapes |= layer("out.0", 256) | layer("out.2", 6, 256, 3, 3) | ({"label_emb.weight": (classes, 1024)} if classes else {})
    down = [(256, 256)] * 7 + [(256, 512)] + [(512, 512)] * 5 + [(512, 1024)] + [(1024, 1024)] * 4
    up = [(2048, 1024)] * 5 + [(1536, 1024), (1536, 512)] + [(1024, 512)] * 4 + [(768, 512), (768, 256)] + [(512, 256)] * 5
    for i, (inp, out) in enumerate(down[1:], 1):
        shapes |= residual(f"input_blocks.{i}.0", inp, out) | (attention(f"input_blocks.{i}.1", out) if i in (10, 11, 13, 14, 16, 17) else {})
    for i, (inp, out) in enumerate(up):
        shapes |= residual(f"output_blocks.{i}.0", inp, out) | (attention(f"output_blocks.{i}.1", out) if i < 9 else {})
        shapes |= residual(f"output_blocks.{i}.{2 if i < 9 else 1}", out, out) if i in (2, 5, 8, 11, 14) else {}
    return shapes | residual("middle_block.0", 1024, 1024) | attention("middle_block.1", 1024) | residual("middle_block.2", 1024, 1024)


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
def test_the_published_unet_loads_strictly_and_one_with_classes_is_refused(tmp_path):
    for classes in (0, 1000):
        torch.save(hollow(official_unet(classes)), tmp_path / f"{classes}.pt")
    with torch.device("meta"):
        model, config = unified.load_model(tmp_path / "0.pt", tell=lambda line: None)
    assert model.image_size == 256 and not model.training and model.blocks[23][1].heads == 16
    preset = unified.model_config("adm", "base", 256)
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in config["arch"].items()} | {"head": 64} == preset | {"head": 64}
    with pytest.raises(unified.UserError, match="1000.pt.*class-conditional"):
        unified.load_model(tmp_path / "1000.pt")
    torch.save(hollow({k: v for k, v in official_unet().items() if k != "input_blocks.4.0.out_layers.3.weight"}), tmp_path / "lacking.pt")
    with pytest.raises(unified.UserError, match="lacking.pt.*input_blocks.4.0.out_layers.3.weight"):
        unified.load_model(tmp_path / "lacking.pt")


@pytest.fixture(scope="module")
def finished_adm(photos, tmp_path_factory):
    """The folder of a U-Net's checkpoint, its weights drawn."""
    folder, arch = tmp_path_factory.mktemp("adm"), dict(model="adm", image_size=16, ch=8, ch_mult=(1, 2), blocks=1, attention=(2,), head=8, groups=4, steps=100)
    train.save_checkpoint(folder / "model.pt", {"model": adm().state_dict(), "config": {"arch": arch, "dataset": str(photos), "classes": ["cat", "dog"]}})
    return folder


def probed(monkeypatch, capsys, run, *args):
    """probe.py as a user runs it, in this process: what it printed, and the rows it added to probe.jsonl."""
    path = run / "probe.jsonl"
    before = len(path.read_text().splitlines()) if path.exists() else 0
    monkeypatch.setattr(sys, "argv", ["probe.py", str(run), "--device", "cpu", "--workers", "0", *map(str, args)])
    probe.main()
    return capsys.readouterr().out, [json.loads(line) for line in path.read_text().splitlines()[before:]]


QUICK = ("--epochs", 2, "--batch-size", 16)


@pytest.mark.parametrize("which", ["mage", "adm"])
@pytest.mark.parametrize("head, more, layer, rows", [
    ("linear", ("--sgd", "--pool", 2, "--matryoshka", *QUICK), "best", None), ("mlp", ("--hidden", "16,8", *QUICK), "best", 1),
    ("attention", ("--pool", 2, "--layers", "2,3", "--sgd", *QUICK), None, 1), ("difformer", ("--pool", 2, "--layers", "2,3", "--t", "two", *QUICK), [2, 3], 1),
    ("diffeed", ("--pool", 2, "--epochs", 1, "--sgd", "--augment"), "best", 1), ("linear", ("--augment", "--epochs", 2), "best", 1),
    ("knn", (), "best", 1), ("fewshot", (), "best", 3), ("finetune", QUICK, "best", 1)])
def test_every_head_reads_every_network(which, head, more, layer, rows, finished, finished_adm, monkeypatch, capsys):
    run, steps = (finished[0], [0.0, 0.3]) if which == "mage" else (finished_adm, [9, 30])
    more = [",".join(map(str, steps)) if word == "two" else word for word in more]
    printed, found = probed(monkeypatch, capsys, run, "--head", head, *more)
    best, without_pixels = unified.load_model(run)[0].best_layer, head in (*probe.ON_MAPS, "finetune")
    assert {row["head"].split("-")[0] for row in found} == {head} and len(found) == rows or not rows
    for row in found:
        assert row["layer"] == (best if layer == "best" else layer) or layer is None and row["layer"] in (2, 3)
        assert 0 <= row["top1"] <= 1 and 0 <= row["untrained"] <= 1 and (row["pixels"] is None) == without_pixels
        assert (row["images"] == 48 or head == "fewshot") and row["t"] == (steps if head == "difformer" else steps[0])
    if "--matryoshka" in more:
        assert [row["head"] for row in found][:3] == ["linear-8", "linear-16", "linear-32"]
    assert ("same network untrained" in printed or head == "finetune") and ("raw pixels" in printed) != without_pixels


def test_a_sweep_prints_a_table_draws_it_and_reads_the_best_place(finished_adm, monkeypatch, capsys):
    printed, (row,) = probed(monkeypatch, capsys, finished_adm, "--sweep", "--t", "0,30")
    model = unified.load_model(finished_adm)[0]
    table = [line.split() for line in printed.splitlines() if line[:5].strip().isdigit()]
    assert [int(line[0]) for line in table] == list(model.layers) and all(len(line) == 3 for line in table)
    taken, = [(int(line[0]), (0, 30)[i]) for line in table for i, text in enumerate(line[1:]) if text.startswith("[")]
    accuracy = {(int(line[0]), (0, 30)[i]): float(text.strip("[]")) for line in table for i, text in enumerate(line[1:])}
    assert taken == (row["layer"], row["t"]) and accuracy[taken] == max(accuracy.values())
    assert min(PIL.Image.open(finished_adm / "sweep.png").size) > 100


def test_a_unet_generates_and_paints_as_a_user_asks(photos, finished_adm, tmp_path, monkeypatch):
    import sample
    picture = next((photos / "val" / "cat").iterdir())
    for name, more in [("a", ("--steps", 5)), ("b", ("--eta", 0, "--steps", 4, "--gif")), ("c", ("--image", picture, "--box", "2,2,9,9", "--steps", 5))]:
        monkeypatch.setattr(sys, "argv", ["sample.py", str(finished_adm), "--device", "cpu", "--n", "3", "--out", str(tmp_path / f"{name}.png"), *map(str, more)])
        sample.main()
        assert numpy.array(PIL.Image.open(tmp_path / f"{name}.png")).std() > 10
    assert PIL.Image.open(tmp_path / "b.gif").n_frames == 4


@pytest.mark.parametrize("args, words", [
    (["--head", "difformer", "--sweep"], "--sweep belongs to"), (["--matryoshka"], "--matryoshka belongs to"), (["--sgd", "--head", "knn"], "--sgd belongs to"),
    (["--feedback", "5"], "--feedback belongs to"), (["--head", "attention", "--pool", "mean"], "cells"), (["--pool", "0"], "pooling '0'"),
    (["--pool", "class"], "no class position"), (["--layers", "40"], "no layer 40"), (["--t", "100"], "--t 100"), (["--t", "1.5"], "--t 1.5"),
    (["--head", "fewshot", "--epochs", "3"], "--epochs belongs to"), (["--head", "diffeed", "--feedback", "2"], "--feedback 2")])
def test_a_probe_that_cannot_be_is_refused_in_one_sentence(args, words, finished_adm, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["probe.py", str(finished_adm), "--device", "cpu", "--workers", "0", *args])
    with pytest.raises(unified.UserError, match=words):
        probe.main()


# ---------------------------------------------------------------------------------------------------------------------------
# 9. Presets and published weights


def official_block(name, inp, out):
    """A residual block's names and shapes in the published tokenizer."""
    shapes = {f"{name}.norm1.weight": (inp,), f"{name}.norm1.bias": (inp,), f"{name}.conv1.weight": (out, inp, 3, 3),
              f"{name}.norm2.weight": (out,), f"{name}.norm2.bias": (out,), f"{name}.conv2.weight": (out, out, 3, 3)}
    return {**shapes, **({f"{name}.nin_shortcut.weight": (out, out, 1, 1)} if inp != out else {})}


def official_tokenizer():
    """Names and shapes in vqgan_jax_strongaug.ckpt, from the authors' table, none from our code."""
    shapes = {"encoder.conv_in.weight": (128, 3, 3, 3), "encoder.conv_out.weight": (256, 512, 1, 1), "encoder.conv_out.bias": (256,),
              "encoder.norm_out.weight": (512,), "encoder.norm_out.bias": (512,), "quantize.embedding.weight": (1024, 256),
              "decoder.conv_in.weight": (512, 256, 3, 3), "decoder.conv_in.bias": (512,), "decoder.norm_out.weight": (128,),
              "decoder.norm_out.bias": (128,), "decoder.conv_out.weight": (3, 128, 3, 3), "decoder.conv_out.bias": (3,)}
    for side, levels in [("encoder.down", [(128, 128), (128, 128), (128, 256), (256, 256), (256, 512)]),
                         ("decoder.up", [(128, 128), (256, 128), (256, 256), (512, 256), (512, 512)])]:
        for i, (inp, out) in enumerate(levels):
            shapes |= official_block(f"{side}.{i}.block.0", inp, out) | official_block(f"{side}.{i}.block.1", out, out)
            if side == "decoder.up" and i:
                shapes |= {f"decoder.up.{i}.upsample.conv.weight": (out, out, 3, 3), f"decoder.up.{i}.upsample.conv.bias": (out,)}
    for name in ("encoder.mid.block_1", "encoder.mid.block_2", "decoder.mid.block_1", "decoder.mid.block_2"):
        shapes |= official_block(name, 512, 512)
    return shapes


def official_transformer(name, width):
    shapes = {}
    for part, out, inp in [("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)]:
        shapes |= {f"{name}.{part}.weight": (out * width, inp * width), f"{name}.{part}.bias": (out * width,)}
    return shapes | {f"{name}.{norm}.{kind}": (width,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}


OFFICIAL_DEAD = {"cls_token": (1, 1, 0), "pos_embed": (1, 257, 0), "mask_token": (1, 1, 0), "decoder_pos_embed": (1, 257, 0),
                 "patch_embed.proj.weight": (0, 3, 16, 16), "patch_embed.proj.bias": (0,), "decoder_pred.weight": (768, 0),
                 "decoder_pred.bias": (768,), "token_emb.position_ids": (1, 257)}           # 0 stands for the width


def official_mage(width, depth):
    """Names and shapes in mage-vit-b or -l, leftovers of MAE included."""
    shapes = {f"vqgan.{k}": v for k, v in official_tokenizer().items()}
    shapes |= {k: tuple(n or width for n in v) for k, v in OFFICIAL_DEAD.items()}
    shapes |= {"token_emb.word_embeddings.weight": (2025, width), "token_emb.position_embeddings.weight": (257, width),
               "decoder_pos_embed_learned": (1, 257, width), "mlm_layer.bias": (1, 1, 2025)}
    for linear in ("decoder_embed", "mlm_layer.fc"):
        shapes |= {f"{linear}.weight": (width, width), f"{linear}.bias": (width,)}
    for norm in ("token_emb.LayerNorm", "norm", "decoder_norm", "mlm_layer.ln"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for name, count in [("blocks", depth), ("decoder_blocks", 8)]:
        for i in range(count):
            shapes |= official_transformer(f"{name}.{i}", width)
    return shapes


def hollow(shapes):
    """A state dict of these shapes that takes no room: every tensor is one number seen many times."""
    return {k: torch.zeros((), dtype=torch.long if k.endswith("position_ids") else torch.float32).expand(v) for k, v in shapes.items()}


def count(shapes, *prefixes):
    return sum(math.prod(v) for k, v in shapes.items() if k.startswith(prefixes))


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
@pytest.mark.parametrize("width, depth, heads, used, encoder, embedding, decoder, head",
                         [(768, 12, (12, 16), 144_896_745, 85_056_000, 1_754_112, 57_492_480, 594_153),
                          (1024, 24, (16, 16), 407_788_521, 302_311_424, 2_338_816, 102_084_608, 1_053_673)], ids=["base", "large"])
def test_published_mage_files_load_strictly(tmp_path, width, depth, heads, used, encoder, embedding, decoder, head):
    file, said = tmp_path / "mage.pth", []
    torch.save({"model": hollow(official_mage(width, depth)), "epoch": 1599, "args": argparse.Namespace(blr=1.5e-4)}, file)
    with torch.device("meta"):                                          # shapes without memory
        model, _ = unified.load_model(file, tell=said.append)
    assert len(said) == 1 and all(name in said[0] for name in OFFICIAL_DEAD)                # named once
    assert (model.fake_id, model.mask_id, model.length, model.image_size) == (1100, 2024, 256, 256)
    assert (model.blocks[0].attn.heads, model.decoder_blocks[0].attn.heads) == heads
    shapes = {k: tuple(p.shape) for k, p in model.named_parameters()}
    assert count(shapes, "vqgan.") == 54_515_587 and count(shapes, "") - count(shapes, "vqgan.") == used
    assert (count(shapes, "blocks.", "norm."), count(shapes, "token_emb.")) == (encoder, embedding)
    assert (count(shapes, "decoder_"), count(shapes, "mlm_layer.")) == (decoder, head)
    assert not model.training


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
@pytest.mark.parametrize("key", [None, "state_dict"])
def test_published_tokenizer_files_load_strictly(tmp_path, key):
    state = hollow(official_tokenizer())
    torch.save({key: state} if key else state, tmp_path / "vqgan.ckpt")
    with torch.device("meta"):
        vqgan, config = unified.load_tokenizer(tmp_path / "vqgan.ckpt")
    shapes = {k: tuple(p.shape) for k, p in vqgan.named_parameters()}
    assert (count(shapes, "encoder."), count(shapes, "decoder."), count(shapes, "quantize.")) == (23_775_104, 30_478_339, 262_144)
    assert config == unified.tokenizer_config("base", 16) and vqgan.stride == 16


def test_golden_file_on_disk_samples_and_gives_features(tmp_path, monkeypatch):
    g, model, _ = golden_mage()
    if g.config["fake_class_label"] != g.config["codebook_size"] + PUBLISHED_FAKE_CLASS:
        pytest.skip("a file with another fake class than the published ones cannot say so by itself")
    monkeypatch.setitem(unified.PUBLISHED_HEADS, g.config["embed_dim"], (g.config["num_heads"], g.config["decoder_num_heads"]))
    torch.save({"model": g.state_dict}, tmp_path / "mage.pth")
    loaded, config = unified.load_model(tmp_path / "mage.pth", tell=lambda line: None)
    assert_close(loaded.embed(g.inputs["image"]), g.outputs["probe_features"])
    assert loaded.sample(2, steps=2).equal(model.sample(2, steps=2))
    again = unified.build(config["arch"])                               # a config is all that a checkpoint needs to say
    again.load_state_dict(loaded.state_dict())


@pytest.mark.parametrize("name", [name for name, method in unified.MODELS.items() if method.model is unified.UMD])
@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
@pytest.mark.parametrize("tune", [False, True])
def test_every_pixel_preset_can_be_built_from_plain_values(name, size, tune):
    config = json.loads(json.dumps(unified.model_config(name, size, 64, 16, classes=10, tune=tune)))
    with torch.device("meta"):
        model = unified.build(config)
    assert (model.image_size, model.classes, model.layers[model.best_layer][1:]) == (64, 10, (16, 16))
    if (name, size, tune) == ("umd", "base", False):                    # counted on the official model: 174.2 M, 177.3 M with 1000 labels
        with torch.device("meta"):
            count = [sum(p.numel() for p in unified.build(dict(config, classes=c)).parameters()) for c in (0, 1000)]
        assert [round(c / 1e6, 1) for c in count] == [174.2, 177.3]


@pytest.mark.parametrize("name", [name for name, method in unified.MODELS.items() if method.tokenizer])
@pytest.mark.parametrize("tokenizer_size", list(unified.TOKENIZERS))
def test_every_preset_can_be_built_from_plain_values(name, tokenizer_size):
    size = tokenizer_size if tokenizer_size in unified.MODELS[name].sizes else "tiny"
    for stride in (2, 4, 8, 16):
        config = unified.model_config(name, size, 16 * stride, 16, unified.tokenizer_config(tokenizer_size, stride), classes=10)
        config = json.loads(json.dumps(config))                         # plain values survive this
        with torch.device("meta"):
            model = unified.build(config)
            assert isinstance(unified.build(config.get("predictor", config)["tokenizer"]), unified.VQGAN)
        assert (model.vqgan.stride, model.length, model.classes) == (stride, 256, 0 if "predictor" in config else 10)
        assert (model.contrastive > 0) == (unified.MODELS[name].views == 2)


# ---------------------------------------------------------------------------------------------------------------------------
# 10. Command lines, checkpoints


@dataclasses.dataclass
class Options:
    run: str = unified.flag("out", "a folder", positional=True, nargs="?")
    batch_size: int = unified.flag(64, "images a step")
    kind: str = unified.flag("a", "which", choices=["a", "b"])
    compile: bool = unified.flag(True, "compile or not")


def test_a_dataclass_is_a_command_line(capsys):
    assert unified.parse_flags(Options, "", []) == Options("out", 64, "a", True)
    assert unified.parse_flags(Options, "", ["here", "--batch-size", "8", "--kind=b", "--no-compile"]) == Options("here", 8, "b", False)
    with pytest.raises(SystemExit) as stop:
        unified.parse_flags(Options, "", ["-h"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(words in said for words in ("run", "--batch-size", "--kind {a,b}", "--no-compile", "images a step [64]"))


@pytest.mark.parametrize("words, blamed", [("--bach-size 8", "--bach-size"), ("--batch-size many", "many"), ("--kind c", "'c'"),
                                           ("--batch 8", "--batch"), ("here there", "there")])
def test_a_wrong_flag_is_named_in_one_sentence(words, blamed):
    with pytest.raises(unified.UserError, match=blamed) as error:
        unified.parse_flags(Options, "", words.split())
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
        with pytest.raises(unified.UserError, match=name):
            unified.pick_device(name)


def test_a_checkpoint_comes_back_and_the_previous_one_is_kept(tmp_path):
    path = tmp_path / "model.pt"
    for step in (1, 2, 3):
        train.save_checkpoint(path, {"step": step, "model": {"w": torch.full((2,), float(step))}, "config": {"a": [1, None, "b"]}})
    state = unified.load_checkpoint(path)
    assert state["step"] == 3 and state["model"]["w"].tolist() == [3.0, 3.0] and state["config"] == {"a": [1, None, "b"]}
    assert unified.load_checkpoint(tmp_path / "model.pt.prev")["step"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pt", "model.pt.prev"]


def test_a_crash_while_saving_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    train.save_checkpoint(path, {"step": 1})
    monkeypatch.setattr(torch, "save", lambda state, file: file.write(b"half a fi") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.save_checkpoint(path, {"step": 2})
    assert unified.load_checkpoint(path) == {"step": 1}
    path.rename(tmp_path / "model.pt.prev")                             # killed between the two renames
    assert unified.load_checkpoint(path) == {"step": 1}


def saved(value):
    """The bytes of torch.save."""
    torch.save(value, file := io.BytesIO())
    return file.getvalue()


NO_CHECKPOINTS = {"missing": None, "empty": b"", "text": b"hello", "list": saved([1]), "number": pickle.dumps(3, 2),
                  "cut off": saved({"model": torch.zeros(10_000)})[:20_000]}


@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, kind):
    if kind != "missing":
        (tmp_path / "bad.pt").write_bytes(NO_CHECKPOINTS[kind])
    for load in (unified.load_checkpoint, unified.load_model, unified.load_tokenizer):
        with pytest.raises(unified.UserError, match="bad.pt"):
            load(tmp_path / "bad.pt")


def test_loading_executes_nothing(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)
    torch.save({"model": Trap()}, tmp_path / "bad.pt")
    with pytest.raises(unified.UserError, match="bad.pt"):
        unified.load_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "sprung").exists()


FOREIGN = {"a dict": {"weights": torch.zeros(3)},
           "another model": {"model": {"fc.weight": torch.zeros(3)}},
           "no weights": {"model": 3, "state_dict": 3},
           "only a codebook": {"quantize.embedding.weight": torch.zeros(4, 4)},
           "only words": {"token_emb.word_embeddings.weight": torch.zeros(4, 4)},
           "unknown width": {"model": hollow(official_mage(512, 2))}}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_dict_is_refused(tmp_path, kind):
    torch.save(FOREIGN[kind], tmp_path / "foreign.pt")
    for load in (unified.load_model, unified.load_tokenizer):
        with pytest.raises(unified.UserError, match="foreign.pt"):
            load(tmp_path / "foreign.pt")


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
@pytest.mark.parametrize("lost", ["norm.weight", "decoder_pos_embed_learned", "vqgan.encoder.conv_in.weight", "vqgan.decoder.conv_in.bias"])
def test_a_published_file_that_lacks_a_weight_is_refused_and_the_weight_named(tmp_path, lost):
    state = hollow(official_mage(768, 12))
    torch.save({"model": {k: v for k, v in state.items() if k != lost}}, tmp_path / "lacking.pth")
    with torch.device("meta"), pytest.raises(unified.UserError, match=f"lacking.pth.*{lost.removeprefix('vqgan.')}"):
        unified.load_model(tmp_path / "lacking.pth", tell=lambda line: None)


def test_a_run_of_ours_is_loaded_from_its_folder(tmp_path):
    tokenizer_arch = dict(codebook_size=32, codebook_dim=8, ch=8, ch_mult=[1, 1], blocks=1, groups=4)
    sizes = dict(width=32, depth=1, heads=4, decoder_width=32, decoder_depth=1, decoder_heads=4)
    arch, x = dict(model="mage", tokenizer=tokenizer_arch, image_size=8, classes=2, **sizes), some_pictures(2, 8)
    model = unified.build(arch)
    training = unified.TokenizerTraining(model.vqgan)                   # this is what train.py keeps of a tokenizer
    for name, net, config in [("model", model, {"arch": arch, "lr": 0.1}), ("tokenizer", training, {"tokenizer_arch": tokenizer_arch})]:
        train.save_checkpoint(tmp_path / f"{name}.pt", {"model": net.state_dict(), "config": config})
    loaded, config = unified.load_model(tmp_path)
    assert config["lr"] == 0.1 and not loaded.training
    assert loaded.embed(x).equal(model.eval().embed(x))
    vqgan, config = unified.load_tokenizer(tmp_path)
    assert config == tokenizer_arch and vqgan.encode(x).equal(model.vqgan.encode(x))


# ---------------------------------------------------------------------------------------------------------------------------
# 10. Pictures


def test_pixels_are_rounded_into_bytes():
    x = torch.tensor([-1.0, 0.0, 0.499 / 255, 0.501 / 255, 1.0, 2.0]).view(1, 1, 6).expand(3, 1, 6)
    assert unified.to_uint8(x)[0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]
    assert unified.to_uint8(x).shape == (1, 6, 3)


def noisy_image(width, height, seed=0):
    return PIL.Image.fromarray(numpy.random.default_rng(seed).integers(0, 256, (height, width, 3), numpy.uint8))


def test_a_picture_is_read_with_its_shorter_side_and_its_centre():
    wide = noisy_image(60, 20)
    assert unified.from_image(wide, 20).movedim(0, -1).numpy().tolist() == numpy.array(wide)[:, 20:40].tolist()
    large = noisy_image(292, 292)                                       # 256 of 292, as in every evaluation
    assert (unified.from_image(large, 256).movedim(0, -1).numpy() == numpy.array(large)[18:274, 18:274]).all()
    assert unified.from_image(noisy_image(7, 5).convert("L"), 16).shape == (3, 16, 16)      # small and grey ones too


def test_a_file_that_is_no_picture_is_named(tmp_path):
    noisy_image(20, 20).save(tmp_path / "good.png")
    x = unified.read_image(tmp_path / "good.png", 20)
    assert x.shape == (3, 20, 20) and x.mul(255).round().movedim(0, -1).tolist() == numpy.array(noisy_image(20, 20)).tolist()
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:300])
    for name in ("bad.png", "missing.png"):
        with pytest.raises(unified.UserError, match=name):
            unified.read_image(tmp_path / name, 20)


def test_a_grid_holds_every_picture_in_its_place():
    x = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 4, 4) / 2       # black, grey, white
    x = x * 0.8                                                         # lines are white
    sheet = numpy.array(unified.image_grid(x, columns=2, least=1))
    assert sheet.shape == (14, 14, 3)
    for value, top, left in [(0, 2, 2), (102, 2, 8), (204, 8, 2)]:
        assert (sheet[top:top + 4, left:left + 4] == value).all()
    lines = numpy.ones((14, 14), bool)
    lines[2:6, 2:6] = lines[2:6, 8:12] = lines[8:12, 2:6] = False
    assert (sheet[lines] == 255).all()
    assert unified.image_grid(x, columns=2, least=64).size == (2 * 32 + 6, 2 * 32 + 6)            # small pictures are enlarged


def test_images_are_stacked_below_each_other():
    sheet = train.stack_images([PIL.Image.new("RGB", (4, 2), "black"), PIL.Image.new("RGB", (3, 5), "red")])
    assert sheet.size == (4, 7)
    assert [sheet.getpixel(at) for at in [(3, 1), (2, 2), (2, 6), (3, 6)]] == [(0, 0, 0), (255, 0, 0), (255, 0, 0), (255, 255, 255)]


def test_a_chart_draws_its_curves():
    curves = {"a": [(0, 0.0), (10, 1.0)], "b": [(0, 1.0), (5, float("nan")), (10, 0.0)]}
    image = numpy.array(train.line_chart(curves, "loss", (400, 300))).astype(int)
    inside = image[42:258, 72:378]
    for color in ((0x1f, 0x77, 0xb4), (0xd6, 0x27, 0x28)):              # two curves that cross the whole frame
        columns = (inside == color).all(2).any(0)
        assert columns.mean() > 0.95
    rising = [(inside[:, x] == (0x1f, 0x77, 0xb4)).all(1).nonzero()[0].mean() for x in (10, 290)]
    assert rising[0] > 200 and rising[1] < 20                           # up is more
    image = numpy.array(train.line_chart({"a": [(0, 1.0), (10, 100.0)], "b": [(5, 10.0)]}, "falls a hundredfold", (400, 300))).astype(int)
    rows, columns = (image[42:258, 72:378] == (0xd6, 0x27, 0x28)).all(2).nonzero()
    assert abs(rows.mean() - 108) < 4 and abs(columns.mean() - 153) < 4 and len(rows) > 20      # a dot; 10 is midway from 1 to 100
    assert (numpy.array(train.line_chart({}, "nothing yet")) == 255).mean() > 0.9


# ---------------------------------------------------------------------------------------------------------------------------
# 10. Data sets


def test_fold_tells_every_combination_apart():
    a, b = torch.arange(100)[:, None], torch.arange(100)
    both = unified.hash_ints(7, a, b)
    assert len(both.unique()) == 100 * 100 and not both.equal(both.T)   # the order of the values counts
    assert both[3, 5] == unified.hash_ints(7, 3, 5) and not both.equal(unified.hash_ints(8, a, b))    # plain integers give the same


def test_a_crop_is_decided_by_its_number():
    crops = unified.hash_ints(torch.arange(1000)[:, None], torch.arange(2)).flatten()
    boxes = unified.crop_boxes(crops, 40, 30, (0.2, 1.0))
    alone = unified.crop_boxes(crops[7:8], 40, 30, (0.2, 1.0))
    assert all(a[7:8].equal(b) for a, b in zip(boxes, alone))
    left, top, w, h, flip = boxes
    assert (left >= 0).all() and (top >= 0).all() and (left + w <= 40.001).all() and (top + h <= 30.001).all()
    assert (w * h).min() / 1200 == pytest.approx(0.2, abs=0.01) and 0.9 < (w * h).max() / 1200 <= 1
    inner = (w < 40) & (h < 30)
    assert ((w / h)[inner] >= 0.7499).all() and ((w / h)[inner] <= 1.3334).all()
    assert abs(flip.float().mean() - 0.5) < 0.05
    assert len(left.unique()) > 1500                                    # both views of every picture differ


def pictures(n=6, side=16, scale=(0.2, 1.0)):
    images = torch.randint(256, (n, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return unified.ImageTensor(images, torch.arange(n) % 3, ["a", "b", "c"], scale)


def box_of(left, top, w, h, flip=False):
    """A crop_boxes() that always cuts this box."""
    return lambda crops, width, height, scale: [torch.full(crops.shape, v) for v in (float(left), float(top), float(w), float(h), flip)]


def test_the_crop_of_everything_is_the_picture(monkeypatch):
    data, crops = pictures(), torch.arange(6)
    x = data.images.float() / 255
    for flip in (False, True):
        monkeypatch.setattr(unified, "crop_boxes", box_of(0, 0, 16, 16, flip))
        assert_close(data.crop(x, crops), x.flip(3) if flip else x, 1e-5)


def test_both_kinds_of_data_set_cut_the_same_crop(monkeypatch):
    x = F.interpolate(torch.rand(1, 3, 5, 5), size=32, mode="bicubic").clamp(0, 1)
    image = PIL.Image.fromarray(unified.to_uint8(x[0]))
    for flip in (False, True):
        monkeypatch.setattr(unified, "crop_boxes", box_of(9, 5, 16, 20, flip))
        ours = unified.ImageTensor(x, None, [], (0.2, 1.0)).crop(x, torch.zeros(1).long())[0]
        folders = unified.ImageFolder(pathlib.Path(), [], [], [], 32, (0.2, 1.0)).crop(image, [0])[0] / 255
        assert (ours - folders)[:, 2:-2, 2:-2].abs().max() < 1.5 / 255  # PIL rounds to bytes and repeats the box's rim
        rim = x[..., 5:25, 9:25].flip(3) if flip else x[..., 5:25, 9:25]
        assert (ours - F.interpolate(rim, size=(32, 32), mode="bilinear")[0])[:, 2:-2, 2:-2].abs().max() < 1e-4


def test_a_large_jpeg_is_decoded_smaller_only_where_its_crops_stay_large_enough(monkeypatch):
    smooth = F.interpolate(torch.rand(1, 3, 6, 8), size=(375, 501), mode="bicubic").clamp(0, 1)
    file = io.BytesIO()
    PIL.Image.fromarray(unified.to_uint8(smooth[0])).save(file, "JPEG", quality=95)
    for w, h, decoded in ((480, 360, (63, 47)), (100, 90, (251, 188)), (60, 40, (501, 375))):
        monkeypatch.setattr(unified, "crop_boxes", box_of(15, 9, w, h, False))
        data, sizes = unified.ImageFolder(pathlib.Path(), [], [], [], 32, (0.2, 1.0)), []
        whole = data.crop(PIL.Image.open(file).convert("RGB"), [0, 1])                      # what is no file any more is not decoded again
        opened = PIL.Image.open(file)
        monkeypatch.setattr(opened, "convert", lambda mode: sizes.append(opened.size) or type(opened).convert(opened, mode))
        assert (data.crop(opened, [0, 1]).float() - whole.float()).abs().mean() < 1.5 and sizes == [decoded]


def test_a_plan_gives_whole_pictures_or_crops_with_their_labels():
    data, index = pictures(), torch.tensor([4, 0])
    crops = torch.tensor([[7, 8, 9], [10, 11, 12]])
    (whole, labels), (cut, same) = data.batches([(index, None), (index, crops)])
    assert whole.mul(255).round().byte().equal(data.images[index]) and labels.tolist() == same.tolist() == [1, 0]
    assert cut.shape == (2, 3, 3, 16, 16) and 0 <= cut.min() and cut.max() <= 1
    assert_close(cut[1, 2], data.crop(whole[1:], torch.tensor([12]))[0], 1e-6)              # the crop's number decides, not its company


@pytest.fixture
def tree(tmp_path):
    """DIR/{train,val}/{ant,bee}/{0,1,2}.png of 20 x 20 pixels, every picture of one grey level of its own."""
    for p, part in enumerate(("train", "val")):
        for c, name in enumerate(("ant", "bee")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(3):
                PIL.Image.new("RGB", (20, 20), (100 * p + 30 * c + 10 * i,) * 3).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def greys(batches):
    """(grey level, label) of every picture in the batches."""
    return [(round(x[i].mean().item() * 255), y[i].item()) for x, y in batches for i in range(len(y))]


def test_a_folder_is_read_in_order_with_its_labels(tree):
    data = unified.open_data("anything", str(tree), 16, train=True)
    assert data.classes == ["ant", "bee"] and len(data) == 6
    plan = [(torch.tensor([0, 5]), None), (torch.tensor([3]), torch.tensor([[1, 2]]))]
    (x, y), (crops, label) = data.batches(plan)
    assert x.shape == (2, 3, 16, 16) and crops.shape == (1, 2, 3, 16, 16) and label.tolist() == [1]
    assert greys([(x, y)]) == [(0, 0), (50, 1)]
    assert greys(unified.open_data(str(tree), "", 16, train=False).batches([(torch.arange(6), None)]))[3] == (130, 1)


def folder(root, classes=("ant", "bee"), size=16, **options):
    """A Folder of root/<class>/*, not looked at beforehand."""
    files = [(path, c) for c, name in enumerate(classes) for path in unified.image_files(root / name, [])]
    return unified.ImageFolder(root, *zip(*files), list(classes), size, (0.2, 1.0), **options)


def test_an_unreadable_image_gives_its_place_to_one_that_is_drawn_or_is_left_out(tree, capsys):
    (tree / "train/ant/2.png").write_bytes(b"not a picture")
    broken = tree / "train/bee/2.png"
    broken.write_bytes(broken.read_bytes()[:-30])                       # looks like one until it is decoded
    data, plan = folder(tree / "train"), [(torch.arange(6), None)] * 2
    first, again = greys(data.batches(plan[:1])), greys(folder(tree / "train").batches(plan[1:]))
    good = [(0, 0), (10, 0), (30, 1), (40, 1)]
    assert first == again and [first[i] for i in (0, 1, 3, 4)] == good and {first[2], first[5]} <= set(good)     # with their own labels
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4 and all("another image takes its place" in line for line in said)
    assert "ant/2.png" in said[0] and "bee/2.png" in said[1] and sorted(data.unreadable) == [2, 5]
    data = folder(tree / "train")
    left = [greys(data.batches(plan[:1], replace=False)) for _ in range(2)]
    assert left[0] == left[1] == good[:2] + [(0, -1)] + good[2:] + [(0, -1)]
    assert [line.count("left out: ") for line in capsys.readouterr().err.splitlines()] == [1, 1]                # told once
    means, labels = probe.map_images(lambda x: x.mean((1, 2, 3)), data)
    assert labels.tolist() == [0, 0, 1, 1] and len(means) == 4
    with pytest.raises(unified.UserError, match="ant/2.png"):
        list(folder(tree / "train", strict=True).batches(plan))


def test_those_that_take_the_place_of_unreadable_images_are_many_and_no_neighbours(tmp_path, monkeypatch):
    """As the twins that a Mac leaves, and classes of empty files: the next good one was the same for all."""
    for i in range(60):
        PIL.Image.new("RGB", (8, 8), (i,) * 3).save(tmp_path / f"{i:02d}.png")
    for i in range(0, 60, 2):
        (tmp_path / f"{i:02d}.png").write_bytes(b"")
    opened, data = [], unified.ImageFolder(tmp_path, sorted(tmp_path.iterdir()), [0] * 60, [], 8, (0.2, 1.0))
    open_ = PIL.Image.open
    monkeypatch.setattr(PIL.Image, "open", lambda path, *more: (opened.append(path), open_(path, *more))[1])
    found = [g for g, _ in greys(data.batches([(torch.arange(60), None)]))]
    taken = [found[i] for i in range(0, 60, 2)]
    assert found[1::2] == list(range(1, 60, 2)) and len(set(taken)) > 12 and all(abs(g - i) > 1 for g, i in zip(taken, range(0, 60, 2)))
    assert all(opened.count(p) == 1 for p in data.paths[::2])           # remembered
    list(data.batches([(torch.arange(60), None)]))
    assert all(opened.count(p) == 1 for p in data.paths[::2])


def test_many_unreadable_images_take_no_more_time_than_they_are(tmp_path):
    for i in range(1500):
        (tmp_path / f"{i:04d}.png").write_bytes(b"version https://git-lfs" if i % 3 else b"")
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "0700.png")
    opened, data = [0], unified.ImageFolder(tmp_path, sorted(tmp_path.iterdir()), [0] * 1500, [], 8, (0.2, 1.0))
    with pytest.raises(unified.UserError, match="1500 .* looked at|of 500 images that were looked at"):
        unified.check_sample(data)
    started = time.time()
    list(data.batches([(torch.arange(1500), None)], replace=False))
    assert time.time() - started < 20 and len(data.unreadable) == 1499


def test_a_folder_of_nothing_but_corrupt_images_is_a_users_mistake(tree):
    for path in (tree / "train").rglob("*.png"):
        path.write_bytes(b"not a picture")
    with pytest.raises(unified.UserError, match="png"):
        list(folder(tree / "train").batches([(torch.arange(2), None)]))
    with pytest.raises(unified.UserError, match="6 of 6 images.*none of ant, bee"):
        unified.open_data("anything", str(tree), 16, train=True)


def test_a_class_or_a_tenth_that_cannot_be_opened_stops_the_run_before_it_starts(tree):
    for i in range(3, 40):
        PIL.Image.new("RGB", (20, 20)).save(tree / f"train/ant/{i:02d}.png")
    for path in (tree / "train/bee").iterdir():
        path.write_bytes(b"")
    with pytest.raises(unified.UserError, match="3 of 43 images.*none of bee"):
        unified.open_data("anything", str(tree), 16, train=True)
    PIL.Image.new("RGB", (20, 20)).save(tree / "train/bee/0.png")
    assert len(unified.open_data("anything", str(tree), 16, train=True)) == 43              # two in 43
    for i in range(3, 6):
        (tree / f"train/ant/{i:02d}.png").write_bytes(b"")
    with pytest.raises(unified.UserError, match="5 of 43"):
        unified.open_data("anything", str(tree), 16, train=True)


def test_unreadable_test_images_count_in_no_accuracy(tree, monkeypatch):
    (tree / "val/ant/1.png").write_bytes(b"")
    data, cfg = folder(tree / "val"), settings(head="linear")
    logits = lambda x: F.one_hot((x.mean((1, 2, 3)) > 0.49).long(), 2).float()              # right for all
    assert probe.accuracy(logits, data, cfg) == 1.0
    found, y = probe.extract_features(lambda x, names: {"x": x.mean((2, 3))}, data, torch.arange(6), cfg, None)
    assert y.tolist() == [0, 0, 1, 1, 1] and len(found["x"]) == 5


def test_a_batch_of_a_folder_takes_no_file_handle_an_image(tree):
    data, (soft, hard) = unified.open_data("anything", str(tree), 16, train=True), resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        signal.signal(signal.SIGALRM, lambda *_: pytest.fail("no batch came"))
        signal.alarm(60)
        assert [len(y) for _, y in data.batches([(torch.arange(600) % 6, None)] * 3, workers=1)] == [600] * 3
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# What people bring


MODES = {                               # of one grey image g, uint8 (h, w), or of a coloured one, in every mode that a file can have
    "1": lambda g: PIL.Image.fromarray(g).convert("1"), "L": lambda g: PIL.Image.fromarray(g), "P": lambda g: PIL.Image.fromarray(g).convert("P"),
    "RGB": lambda g: PIL.Image.fromarray(g).convert("RGB"), "CMYK": lambda g: PIL.Image.fromarray(g).convert("CMYK"),
    "LA": lambda g: PIL.Image.fromarray(g).convert("LA"), "RGBA": lambda g: PIL.Image.fromarray(g).convert("RGBA"),
    "I;16": lambda g: PIL.Image.fromarray(g.astype(numpy.uint16) * 257),
    "I;16B": lambda g: PIL.Image.frombytes("I;16B", g.shape[::-1], (g.astype(">u2") * 257).astype(">u2").tobytes()),
    "I of 8 bits": lambda g: PIL.Image.fromarray(g.astype(numpy.int32)), "I of 16 bits": lambda g: PIL.Image.fromarray(g.astype(numpy.int32) * 257),
    "I of 31 bits": lambda g: PIL.Image.fromarray(g.astype(numpy.int32) * (2**31 // 255)), "F": lambda g: PIL.Image.fromarray((g / 255).astype(numpy.float32)),
    "YCbCr": lambda g: PIL.Image.fromarray(g).convert("RGB").convert("YCbCr"), "HSV": lambda g: PIL.Image.fromarray(g).convert("RGB").convert("HSV"),
    "PA": lambda g: PIL.Image.fromarray(g).convert("PA"), "RGBX": lambda g: PIL.Image.fromarray(g).convert("RGBX"),
    "RGBa": lambda g: PIL.Image.fromarray(g).convert("RGBA").convert("RGBa"), "La": lambda g: PIL.Image.fromarray(g).convert("LA").convert("La")}


def test_images_of_any_mode_are_their_twins_in_8_bit_rgb():
    g = numpy.linspace(0, 255, 400).astype(numpy.uint8).reshape(20, 20)
    g[0, 0], g[-1, -1] = 0, 255
    for mode, made in MODES.items():
        image, twin = made(g), PIL.Image.fromarray(g).convert("1" if mode == "1" else "L").convert("RGB")
        assert image.mode == mode.split(" of")[0]
        off = numpy.abs(numpy.asarray(unified.upright(image)).astype(int) - numpy.asarray(twin)).max()
        assert off <= 1, (mode, off)


@pytest.mark.parametrize("mode, suffix", [("1", "png"), ("L", "png"), ("P", "gif"), ("P", "png"), ("RGB", "png"), ("RGB", "webp"), ("LA", "png"), ("RGBA", "png"),
                                          ("RGBA", "webp"), ("I;16", "png"), ("I;16", "tif"), ("I;16B", "tif"), ("I of 16 bits", "tif"), ("I of 31 bits", "tif"),
                                          ("F", "tif"), ("CMYK", "tif"), ("YCbCr", "tif"), ("RGBX", "tif"), ("CMYK", "jpg"), ("L", "jpg")])
def test_training_probing_and_painting_read_files_of_any_mode_alike(mode, suffix, tmp_path):
    g = numpy.kron(numpy.array([[0, 80], [160, 255]]), numpy.ones((16, 16))).astype(numpy.uint8)
    for name, image in (("a", MODES[mode](g)), ("b", PIL.Image.fromarray(g).convert("1" if mode == "1" else "L").convert("RGB"))):
        (tmp_path / name).mkdir()
        lossless = {"lossless": True} if suffix == "webp" else {"quality": 100} if suffix == "jpg" else {}
        image.save(tmp_path / name / (f"x.{suffix}" if name == "a" else "x.png"), **(lossless if name == "a" else {}))
    data = [folder(tmp_path, [name], 32) for name in ("a", "b")]
    plan = [(torch.tensor([0]), None), (torch.tensor([0]), torch.tensor([[1, 2, 3]]))]     # probing, training
    for (ours, _), (theirs, _) in zip(*(d.batches(plan) for d in data)):
        assert (ours - theirs).abs().max() <= (3 if suffix == "jpg" else 1) / 255 + 1e-6
    assert (unified.read_image(data[0].paths[0], 32) - unified.read_image(data[1].paths[0], 32)).abs().max() <= (3 if suffix == "jpg" else 1) / 255 + 1e-6


@pytest.mark.parametrize("values", [-1.0, 3.0, 255.0, math.nan, math.inf])
def test_floats_of_unknown_range_are_refused(values, tmp_path):
    PIL.Image.fromarray(numpy.full((8, 8), values, numpy.float32)).save(tmp_path / "depth.tif")
    with pytest.raises(unified.UserError, match="depth.tif.*not 0 .. 1"):
        unified.read_image(tmp_path / "depth.tif", 8)


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_photos_lie_as_viewers_show_them(number, suffix, tmp_path):
    g = numpy.kron(numpy.array([[250, 10, 90], [170, 130, 50]]), numpy.ones((40, 40))).astype(numpy.uint8)     # 80 x 120, no symmetry
    exif, path = PIL.Image.Exif(), tmp_path / f"a.{suffix}"
    exif[0x0112] = number
    PIL.Image.fromarray(g).convert("RGB").save(path, exif=exif, quality=100)
    with PIL.Image.open(path) as image:
        seen = PIL.ImageOps.exif_transpose(image).convert("L")
    assert seen.size == ((120, 80) if number < 5 else (80, 120))
    assert (unified.read_image(path, 80)[0] - unified.from_image(seen, 80)[0] / 255).abs().mean() < 0.02
    data, twin = folder(tmp_path, [""], 8), unified.ImageFolder(tmp_path, [], [], [], 8, (0.2, 1.0))
    crops = torch.tensor([[3, 4, 5, 6]])                                # small ones, of a JPEG that is decoded smaller
    (ours, _), = data.batches([(torch.tensor([0]), crops)])
    assert (ours[0] - twin.crop(seen.convert("RGB"), crops[0].tolist()).float() / 255).abs().mean() < 0.03


def test_exif_that_cannot_be_read_says_nothing(tmp_path):
    PIL.Image.new("RGB", (8, 8), "red").save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xffgarbage")
    assert unified.read_image(tmp_path / "a.jpg", 8)[0].mean() > 0.95


@pytest.mark.parametrize("mode, suffix", [("RGBA", "png"), ("LA", "png"), ("P", "png"), ("P", "gif"), ("RGBA", "webp"), ("L", "png")])
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
    with pytest.raises(unified.UserError, match="giga.png"):
        unified.read_image(tmp_path / "giga.png", 32)
    assert "giga.png" in script("sample.py", finished[0], "--image", tmp_path / "giga.png", "--box", "0,0,8,8", expect=2)
    with pytest.raises(unified.UserError, match="giga.png"):
        unified.open_data("anything", str(tmp_path), 32, train=True)


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
    x = some_pictures(3)
    x[1] = torch.tensor([0.2, 0.0, 0.7])[:, None, None]
    seen = unified.add_grain(x, some_noise(3, 3, 16, 16))
    assert seen[[0, 2]].equal(x[[0, 2]]) and 0 < (seen[1] - x[1]).abs().max() <= 0.5 / 255


def trained(folder, model, recipe, batches, steps=None, evaluate=None, data=None, forward_args=lambda step, first: {}, **cfg):
    """train.train() on batches, a function of a plan; recipe: numbers beside MAGE's. Rows of its log; what else is in cfg are flags."""
    cfg = train.settings(train.Config(**{"device": "cpu", "compile": False, "log_every": 1, "eval_every": 0, "save_every": 10**6,
                                         "out_dir": str(folder), **cfg}))
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


def poisoned_steps(folder, bad, images=range(8)):
    """Twelve steps of four of 8 images, whose gradient is not finite in the steps of bad: [weight before each step], rows of the log. Alone,
    only these images have no finite gradient."""
    model, seen = Linear(), []

    def batches(plan):
        for index, _ in plan:
            if len(index) == 1:
                yield torch.full((1, 3), math.nan if index in images else 1.0), torch.zeros(1)
            else:
                seen.append(model.inner.weight.detach().clone())
                yield torch.full((4, 3), math.nan if len(seen) - 1 in bad else 1.0), torch.zeros(4)
    recipe = dict(ema=0.5, batch_size=4, lr=1e-2)
    return seen, trained(folder, model, recipe, batches, 12, data=pictures(8, 8), log_every=100)


def test_a_step_whose_gradient_is_not_finite_moves_nothing_and_is_told(tmp_path, capsys):
    seen, rows = poisoned_steps(tmp_path, {3, 7})
    assert all(w.isfinite().all() for w in seen)
    assert [i for i in range(11) if seen[i + 1].equal(seen[i])] == [3, 7]
    assert math.isfinite(rows[-1]["loss"]) and "2 of the steps up to 12 were skipped" in capsys.readouterr().out
    state = unified.load_checkpoint(tmp_path / "model.pt")
    assert all(v.isfinite().all() for part in ("model", "ema") for v in state[part].values())


def test_several_steps_in_a_row_without_a_finite_gradient_end_the_run(tmp_path):
    with pytest.raises(unified.UserError, match=f"6 steps in a row up to step 12; {tmp_path} keeps the last good checkpoint; a lower --lr"):
        poisoned_steps(tmp_path, set(range(6, 12)))


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
    return [unified.open_data(str(root), "", 8, train) for train in (True, False)]


def test_names_that_belong_to_programs_are_no_data_at_any_depth(tree):
    for name in (".ipynb_checkpoints/0.png", "__MACOSX/0.png", "ant/._0.png", "ant/.cache/1.png", "ant/__thumbs/1.png", "ant/.DS_Store"):
        make_images(tree / "train", [name])
    train, test = both_parts(tree)
    assert train.classes == ["ant", "bee"] and len(train) == 6 and "left out" not in train.summary


def test_class_folders_are_read_recursively_and_by_content_where_the_suffix_says_nothing(tree):
    make_images(tree / "train", ["ant/deep/er/a.jfif", "ant/b", "ant/c.JPG", "ant/d.img", "bee/2024/e.jpe"])
    (tree / "train/ant/notes.txt").write_text("hello")
    (tree / "train/ant/table").write_bytes(b"1,2,3")
    (tree / "train/ant/deep/up").symlink_to(tree / "train")             # no endless tale
    train, _ = both_parts(tree)
    assert len(train) == 11 and {p.name for p in train.paths} >= {"a.jfif", "b", "c.JPG", "d.img", "e.jpe"}
    assert "left out 2 files that are no images (notes.txt, table)" in train.summary


@pytest.mark.parametrize("second", ["val", "valid", "validation", "test"])
def test_a_second_part_may_be_called_as_people_call_it(second, tree):
    (tree / "val").rename(tree / second)
    train, test = both_parts(tree)
    assert (len(train), len(test), test.classes) == (6, 6, ["ant", "bee"]) and f"6 to test on ({second}/)" in train.summary


def test_of_class_folders_alone_a_tenth_is_held_out_that_stays_so_when_others_come(tmp_path):
    make_images(tmp_path, [f"{name}/{i}.png" for name in ("ant", "bee") for i in range(100)])
    train, test = both_parts(tmp_path)
    assert train.classes == test.classes == ["ant", "bee"] and len(train) + len(test) == 200 and 10 <= len(test) <= 32
    assert not {*train.paths} & {*test.paths} and "by a hash" in train.summary and test.unseen
    assert all(data.classes[label] == path.parent.name for data in (train, test) for path, label in zip(data.paths, data.labels))
    make_images(tmp_path, [f"ant/{i}-new.png" for i in range(50)])
    more, held = both_parts(tmp_path)
    assert {*train.paths} <= {*more.paths} and {*test.paths} <= {*held.paths}
    make_images(tmp_path, ["train/0.png", "train/1.png"])               # a class of trains
    assert both_parts(tmp_path)[0].classes == ["ant", "bee", "train"]


def test_images_without_classes_train_and_are_not_probed(tmp_path):
    make_images(tmp_path / "mine", [f"{i}.png" for i in range(40)])
    train, test = both_parts(tmp_path / "mine")
    assert train.classes == [] and len(train) + len(test) == 40 and "without classes" in train.summary and train.labels.eq(0).all()
    printed = script("train.py", *flags(tmp_path / "mine", tmp_path / "run", "--eval-every", 0))
    assert "no probe: it takes two classes" in printed and (tmp_path / "run" / "samples.png").exists()
    assert "two classes" in script("probe.py", tmp_path / "run", "--workers", 0, expect=2)
    assert "no class folders" in script("train.py", *flags(tmp_path / "mine", tmp_path / "other", "--labels"), expect=2)


@pytest.mark.parametrize("names", [["a.png"], ["ant/a.png", "bee/b.png"], ["ant/a.png", "ant/b.png", "bee/c.png", "bee/d.png", "cow/e.png"]])
def test_sets_as_small_as_people_start_with_are_trained_on(names, tmp_path):
    make_images(tmp_path / "few", names)
    train, test = both_parts(tmp_path / "few")
    assert len(train) >= 1 and len(test) >= 1
    printed = script("train.py", *flags(tmp_path / "few", tmp_path / "run", "--eval-every", 3))
    assert "no probe" in printed and "python sample.py" in printed
    if len(train) == len(names):
        assert not test.unseen and "too few to hold any out" in printed


def test_what_cannot_be_a_data_set_is_refused_with_the_tree_that_is_expected(tree):
    (tree / "train/empty").mkdir()
    train, _ = both_parts(tree)
    assert train.classes == ["ant", "bee"] and "left out 1 folders without an image (empty)" in train.summary
    (tree / "val/bee").rename(tree / "val/cow")
    with pytest.raises(unified.UserError, match="bee, cow"):
        both_parts(tree)
    for path in [*(tree / "val").rglob("*.png")]:
        path.rename(tree / "val" / f"{path.parent.name}-{path.name}")   # flat, as in ImageNet's archive
    with pytest.raises(unified.UserError, match="(?s)differ in their classes.*n01440764"):
        both_parts(tree)
    for root in (tree / "nowhere", tree / "train/empty"):
        with pytest.raises(unified.UserError, match="(?s)no image in.*n01440764"):
            both_parts(root)
    shutil.rmtree(tree / "train")
    with pytest.raises(unified.UserError, match="no image in .*train"):
        both_parts(tree)


def test_names_of_any_bytes_are_read_and_shown(tmp_path, photos):
    root = tmp_path / "my photos"
    for i in range(60):
        make_images(root, [os.fsdecode(b"caf\xe9 %d/\xff\xfe %d.png" % (i % 2, i))], i)
    (root / os.fsdecode(b"caf\xe9 0") / os.fsdecode(b"\xff broken.png")).write_bytes(b"")
    code, printed = finish(start(tmp_path / "printed", run_script, "train.py", flags(root, tmp_path / "a run", "--labels", "--eval-every", 0)))
    assert code == 0 and "broken.png" in printed and f"python sample.py '{tmp_path / 'a run'}'" in printed, printed
    assert finish(start(tmp_path / "printed", run_script, "probe.py", (tmp_path / "a run", "--workers", 0)))[0] == 0


@pytest.mark.parametrize("name", list(unified.SHAPES))
def test_a_shape_stays_inside_the_circle_that_is_placed_inside_the_picture(name):
    x, y = torch.meshgrid(torch.linspace(-1.5, 1.5, 301), torch.linspace(-1.5, 1.5, 301), indexing="xy")
    r = (x * x + y * y).sqrt()
    inside = unified.SHAPES[name](x, y, r) < 0
    assert 0.1 < inside.float().mean() * 9 / math.pi < 1 and r[inside].max() <= 1.0         # share of the circle; none of it outside


def test_shapes_are_decided_by_their_seeds():
    images, labels = unified.draw_shapes(torch.arange(400), 32)
    assert images.dtype == torch.uint8 and images.shape == (400, 3, 32, 32)
    alone = unified.draw_shapes(torch.tensor([17]), 32)
    assert alone[0][0].equal(images[17]) and alone[1][0] == labels[17]
    assert set(labels.tolist()) == set(range(len(unified.SHAPES)))
    painted = (images != unified.GROUND[:, None, None]).any(1).flatten(1).float().mean(1)
    assert painted.min() > 0.02 and painted.max() < 0.6
    colors = (images.flatten(2).mT[:, :, None] == unified.PALETTE).all(3).any(1)            # (400, 6)
    assert (colors.sum(1) == 1).all() and colors[labels == 0].any(0).all()                  # one colour each, every colour in a class


def test_training_and_test_shapes_are_different_pictures(monkeypatch):
    monkeypatch.setattr(unified, "draw_shapes", lambda seeds, size: (seeds[:, None, None, None], seeds))
    (train_seeds, *_), (test_seeds, _, names) = unified.shapes(True, 32), unified.shapes(False, 32)
    assert not set(train_seeds.flatten().tolist()) & set(test_seeds.flatten().tolist())
    assert (len(train_seeds), len(test_seeds), len(names)) == (20_000, 2_000, len(unified.SHAPES))


def small_cifar(folder, monkeypatch):
    """An archive with the published layout and ten pictures a batch; unified takes its checksums for the published ones."""
    inside = folder / "cifar-10-batches-py"
    inside.mkdir(parents=True)
    pixels = (numpy.arange(30720) % 256).astype(numpy.uint8).reshape(10, 3072)
    data = {"data": pixels, "labels": list(range(10)), "label_names": list("abcdefghij")}
    for name in ["data_batch_%d" % i for i in range(1, 6)] + ["test_batch", "batches.meta"]:
        (inside / name).write_bytes(pickle.dumps(data))
        monkeypatch.setitem(unified.CIFAR10_MD5, name, hashlib.md5((inside / name).read_bytes()).hexdigest())
    return inside


def test_cifar10_is_read_only_if_its_checksum_is_right(tmp_path, monkeypatch):
    inside = small_cifar(tmp_path, monkeypatch)
    data = unified.open_data("cifar10", str(tmp_path), 32, train=True)
    assert data.images.shape == (50, 3, 32, 32) and len(data.classes) == 10
    assert data.images[0, 1, 0, :3].tolist() == [0, 1, 2] and data.labels[:12].tolist() == [*range(10), 0, 1]   # planes of 1024 bytes
    assert len(unified.open_data("cifar10", str(tmp_path), 32, train=False)) == 10
    (inside / "test_batch").write_bytes(pickle.dumps({"data": 1}))
    with pytest.raises(unified.UserError, match="test_batch"):
        unified.open_data("cifar10", str(tmp_path), 32, train=False)
    (inside / "data_batch_3").unlink()
    with pytest.raises(unified.UserError, match="data_batch_3"):
        unified.open_data("cifar10", str(tmp_path), 32, train=True)
    with pytest.raises(unified.UserError, match="64"):
        unified.open_data("cifar10", str(tmp_path), 64, train=True)


def test_cifar10_is_downloaded_once_and_checked(tmp_path, monkeypatch):
    small_cifar(tmp_path / "web", monkeypatch)
    archive = tmp_path / "web/cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "web/cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(unified, "CIFAR10_URL", archive.as_uri())       # a file stands in for the network
    with pytest.raises(unified.UserError, match="checksum"):
        unified.download_cifar10(tmp_path / "data")
    monkeypatch.setitem(unified.CIFAR10_MD5, archive.name, hashlib.md5(archive.read_bytes()).hexdigest())
    unified.download_cifar10(tmp_path / "data")
    assert len(unified.open_data("cifar10", str(tmp_path / "data"), 32, train=False)) == 10
    archive.unlink()
    unified.download_cifar10(tmp_path / "data")                         # already there: nothing is fetched
    with pytest.raises(unified.UserError, match="--data-dir"):
        unified.download_cifar10(tmp_path / "other")


# ---------------------------------------------------------------------------------------------------------------------------
# 10. Damaged files and downloads
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
            monkeypatch.setattr(unified, "CIFAR10_URL", "http://%s:%d/" % server.server_address + fault)
            monkeypatch.setitem(unified.CIFAR10_MD5, inside.name.removesuffix("batches-py") + "python.tar.gz",
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
    unified.download_cifar10(folder)
    assert len(unified.open_data("cifar10", str(folder), 32, train=False)) == 10


@pytest.mark.parametrize("fault", ["missing", "broken", "moved-nowhere", "silent", "no-http", "garbage",
                                   "cut-off", "chunk-cut-off", "reset", "stalled"])
def test_a_download_that_fails_ends_in_one_sentence_and_leaves_nothing(web, tmp_path, fault):
    web.pick(fault)
    with pytest.raises(unified.UserError, match="--data-dir") as error:
        unified.download_cifar10(tmp_path / "data", timeout=0.3)
    assert "\n" not in str(error.value)
    nothing_is_left_and_the_next_call_succeeds(web, tmp_path / "data")


@pytest.mark.parametrize("fault", ["moved", "length-unknown"])
def test_a_download_may_be_moved_and_of_unknown_length(web, tmp_path, fault):
    web.pick(fault)
    unified.download_cifar10(tmp_path)
    assert len(unified.open_data("cifar10", str(tmp_path), 32, train=True)) == 50


def test_a_download_with_another_checksum_is_not_unpacked(web, tmp_path, monkeypatch):
    web.pick("archive")
    monkeypatch.setitem(unified.CIFAR10_MD5, "cifar-10-python.tar.gz", "0" * 32)
    with pytest.raises(unified.UserError, match="checksum"):
        unified.download_cifar10(tmp_path / "data")
    nothing_is_left_and_the_next_call_succeeds(web, tmp_path / "data")


@pytest.mark.parametrize("share", [0.5, 1.5])                           # while it fetches, while it unpacks
def test_a_full_disk_ends_a_download_in_one_sentence(web, tmp_path, share):
    web.pick("archive")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:                                                                # an error of the same kind
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * len(web.archive)), limits[1]))
        with pytest.raises(unified.UserError, match="File too large.*--data-dir"):
            unified.download_cifar10(tmp_path / "data")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    nothing_is_left_and_the_next_call_succeeds(web, tmp_path / "data")


def test_ctrl_c_in_a_download_leaves_nothing(web, tmp_path):
    web.pick("interrupted")
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            unified.download_cifar10(tmp_path / "data")
    finally:
        signal.signal(signal.SIGINT, handler)
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
    with pytest.raises(unified.UserError, match="--data-dir"):
        unified.download_cifar10(tmp_path / "data")
    assert not target.exists()
    assert [p.name for p in (tmp_path / "data").iterdir()] == [".lock"]


def in_process(folder, **options):
    """A download in a process of its own, which ends with code 2 after a UserError."""
    def download():
        try:
            unified.download_cifar10(folder, **options)
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
    assert web.asked == ["slow"] and len(unified.open_data("cifar10", str(tmp_path), 32, train=True)) == 50


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
    assert len(unified.open_data("cifar10", str(tmp_path), 32, train=True)) == 50


def test_without_locks_the_first_to_finish_counts(web, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "lockf")                                    # as on Windows
    web.pick("slow")
    assert exit_codes([in_process(tmp_path) for _ in range(3)]) == [0] * 3
    assert web.asked == ["slow"] * 3
    assert len(unified.open_data("cifar10", str(tmp_path), 32, train=True)) == 50


def test_what_is_killed_while_unpacking_does_not_pass_for_complete(web, tmp_path):
    web.pick("archive")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", lambda *_: os.kill(os.getpid(), signal.SIGKILL))        # the last moment
        assert exit_codes([in_process(tmp_path)]) == [-signal.SIGKILL]
    assert not (tmp_path / "cifar-10-batches-py").exists()
    unified.download_cifar10(tmp_path)
    assert len(unified.open_data("cifar10", str(tmp_path), 32, train=True)) == 50


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
    with pytest.raises(unified.UserError, match="0.png"):
        unified.read_image(data.paths[0], 16)


def test_an_image_of_a_hair_takes_no_memory(tmp_path):
    PIL.Image.new("RGB", (1, 60_000)).save(tmp_path / "hair.png")
    with limits(20, 0.5), pytest.raises(unified.UserError, match="hair.png.*1 x 60000"):   # took 1.4 GiB
        unified.read_image(tmp_path / "hair.png", 64)


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


def test_a_flipped_bit_in_a_weight_is_not_loaded_and_the_previous_checkpoint_named(tmp_path):
    path = tmp_path / "model.pt"
    for step in (1, 2):
        train.save_checkpoint(path, {"step": step, "model": torch.full((99,), 0.5)})
        if step == 1:
            data = bytearray(path.read_bytes())
            data[data.index(torch.full((99,), 0.5).numpy().tobytes()) + 3] ^= 64
            path.write_bytes(data)
            with pytest.raises(unified.UserError, match="model.pt .*checksum.*copy or download it again"):
                unified.load_checkpoint(path)
    path.write_bytes(data)
    with pytest.raises(unified.UserError, match="model.pt .*checksum.*rename .*model.pt.prev"):
        unified.load_checkpoint(path)


def test_torchs_advice_to_trust_a_file_is_not_passed_on(tmp_path):
    (tmp_path / "bad.pt").write_bytes(saved({"model": fractions.Fraction(1, 2)}))
    with pytest.raises(unified.UserError, match="bad.pt holds fractions.Fraction") as error:
        unified.load_checkpoint(tmp_path / "bad.pt")
    assert "weights_only" not in str(error.value) and "trusted" not in str(error.value)


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
    state = run_checkpoint(TINY.get(name, TINY_VQGAN))
    with limits(60, 1):
        for config in with_another_value(state["config"], value):
            torch.save({**state, "config": config}, tmp_path / f"{name}.pt")
            result_or_sentence(load_any, tmp_path / f"{name}.pt")


@pytest.mark.parametrize("name", ["mage", "tokenizer"])
@pytest.mark.parametrize("value", [3, "x", None, [], {}, {3: 4}, {"vqgan.a": 3}, torch.zeros(3)], ids=str)
def test_a_checkpoint_with_something_else_in_place_of_a_part_ends_in_one_sentence(tmp_path, name, value):
    state = run_checkpoint(TINY.get(name, TINY_VQGAN))
    for part in ("model", "config"):
        rest = {k: v for k, v in state.items() if k != part}
        for changed in (rest, {**rest, part: value}):
            torch.save(changed, tmp_path / f"{name}.pt")
            assert result_or_sentence(load_any, tmp_path / f"{name}.pt") is None


def test_a_damaged_line_of_the_log_does_not_count(tmp_path):
    rows = [{"stage": "model", "step": i, "loss": 0.5} for i in range(3)]
    assert train.read_rows(tmp_path) == []
    good = [json.dumps(row).encode() for row in rows]
    for bad in (b'{"stage": "model", "st{"stage": "model", "step": 9}', b"\xff\xfe}", bytes(40), b"3", b"",
                b'{"step": 4}', b'{"stage": "model"}', b'{"stage": "model", "step": "4"}'):
        (tmp_path / "log.jsonl").write_bytes(b"\n".join([good[0], bad, *good[1:], good[0][:9]]))
        assert train.read_rows(tmp_path) == rows


def test_features_are_collected_where_nobody_says_how_much_memory_there_is(monkeypatch):
    monkeypatch.delattr(os, "sysconf")                                  # as on Windows
    cfg, data = settings(head="ridge"), pictures(6, 16)
    found, _ = probe.extract_features(lambda x, names: {"": x.flatten(1)}, data, torch.arange(6), cfg, "")
    assert found[""].shape == (6, 768)


# ---------------------------------------------------------------------------------------------------------------------------
# 10. The id cache, the learning rate, the closed-form probe


def test_cached_ids_are_the_ids_of_the_same_crops(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "images_at_once", lambda data, device: 4)
    vqgan, data = tokenizer(2), pictures(10, 8)
    ids, labels = train.cache_ids(tmp_path, vqgan, data, 3)
    assert ids.shape == (10, 3, 16) and ids.dtype == numpy.uint16 and labels.equal(data.labels)
    crops = unified.hash_ints(torch.arange(10)[:, None], torch.arange(3))
    x, _ = next(data.batches([(torch.arange(10), crops)]))
    assert torch.from_numpy(ids.astype(int)).equal(vqgan.encode(x.flatten(0, 1)).view(10, 3, 16))
    whole, _ = train.cache_ids(tmp_path, vqgan, data, 1)
    assert torch.from_numpy(whole.astype(int)).equal(vqgan.encode(data.images.float() / 255).view(10, 1, 16))   # one view: the picture


@pytest.mark.parametrize("done", [0, 3, 11, 20, 29])
def test_ids_that_were_interrupted_are_continued_and_equal_uninterrupted_ones(done, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "images_at_once", lambda data, device: 2)     # one image of two views
    monkeypatch.setattr(train, "SHARD", 12)
    monkeypatch.setattr(unified, "SIGNALS", {})
    vqgan, data, read = tokenizer(2), pictures(30, 8), []
    for name in ("through", "stopped"):
        (tmp_path / name).mkdir()
    through, _ = train.cache_ids(tmp_path / "through", vqgan, data, 2)
    batches = data.batches

    def counted(plan, workers):
        for item in batches(plan):
            read.append(item)
            if len(read) == done + 1:
                unified.SIGNALS[signal.SIGINT] = 0.0
            yield item
    data.batches = counted
    with pytest.raises(train.Stopped, match="ids"):
        train.cache_ids(tmp_path / "stopped", vqgan, data, 2)
    assert len(read) == done + 1                                        # it stopped right there,
    unified.SIGNALS.clear()
    stopped, labels = train.cache_ids(tmp_path / "stopped", vqgan, data, 2)
    assert len(read) == 30                                              # and what was done is not done twice
    assert (stopped == through).all() and labels.equal(data.labels)
    assert sorted(p.name.split("-")[0] for p in (tmp_path / "stopped").iterdir()) == ["ids", "labels"]


def test_finished_ids_are_read_and_those_of_another_tokenizer_are_not(tmp_path):
    data = pictures(10, 8)
    first, _ = train.cache_ids(tmp_path, tokenizer(2), data, 2)
    batches, data.batches = data.batches, lambda plan, workers: map(forbidden, plan)
    again, labels = train.cache_ids(tmp_path, tokenizer(2), data, 2)
    assert (again == first).all() and labels.equal(data.labels)
    data.batches = batches
    other, _ = train.cache_ids(tmp_path, tokenizer(2, seed=9), data, 2)
    assert (other != first).any()


def test_runs_that_share_a_folder_keep_each_others_ids(tmp_path):
    data, other = pictures(10, 8), pictures(12, 8)
    first, labels = train.cache_ids(tmp_path, tokenizer(2), data, 2)
    before, files = numpy.array(first), {p: p.read_bytes() for p in tmp_path.iterdir()}
    for options in ((tokenizer(2), other, 2), (tokenizer(2), data, 3), (tokenizer(2, seed=9), data, 2)):
        train.cache_ids(tmp_path, *options)
    assert all(p.read_bytes() == content for p, content in files.items())
    assert (first == before).all() and len([*tmp_path.glob("ids-*.npy")]) == 4              # still mapped, still itself


def test_images_that_were_exported_again_under_their_names_get_ids_of_their_own(tree):
    first, _ = train.cache_ids(tree, tokenizer(2), unified.open_data("any", str(tree), 8, train=True), 1)
    PIL.Image.effect_noise((20, 20), 99).convert("RGB").save(tree / "train/ant/0.png")
    second, _ = train.cache_ids(tree, tokenizer(2), unified.open_data("any", str(tree), 8, train=True), 1)
    assert (first[0] != second[0]).any() and (first[1:] == second[1:]).all()


def test_a_folder_that_was_moved_keeps_its_ids(tree, tmp_path_factory):
    vqgan, moved = tokenizer(2), tmp_path_factory.mktemp("moved") / "here"
    marks = [train.fingerprint(vqgan, unified.open_data("any", str(tree), 8, train=True), 1)]
    tree.rename(moved)
    marks.append(train.fingerprint(vqgan, unified.open_data("any", str(moved), 8, train=True), 1))
    (moved / "train/ant/2.png").unlink()
    (moved / "train/ant/2.png").symlink_to("nowhere")
    marks.append(train.fingerprint(vqgan, unified.open_data("any", str(moved), 8, train=True), 1))
    assert marks[0] == marks[1] != marks[2]


def test_every_image_in_memory_counts_for_its_ids():
    vqgan, data = tokenizer(2), pictures(10, 8)
    before = train.fingerprint(vqgan, data, 1)
    data.images[7, 0, 0, 0] ^= 1
    changed = train.fingerprint(vqgan, data, 1)
    data.images[7, 0, 0, 0] ^= 1
    data.labels = data.labels.flip(0)                                   # another order, the same sum
    assert len({before, changed, train.fingerprint(vqgan, data, 1)}) == 3


def test_a_corrupt_image_in_the_cache_has_the_label_of_its_replacement(tree):
    (tree / "train/ant/2.png").write_bytes(b"not a picture")
    data = unified.open_data("anything", str(tree), 8, train=True)
    ids, labels = train.cache_ids(tree, tokenizer(2), data, 1)
    assert labels.tolist() == [0, 0, 1, 1, 1, 1] and (ids[2] == ids[3]).all()


@pytest.mark.parametrize("codes, kind", [(65536, numpy.uint16), (65537, numpy.int32), (70000, numpy.int32)])
def test_ids_of_any_codebook_fit_their_file(codes, kind, tmp_path):
    vqgan, data = tokenizer(2, codes), pictures(4, 8)
    with torch.no_grad():
        vqgan.quantize.embedding.weight[:-3] = 99                       # all z are nearest to one of the last codes
    ids, labels = train.cache_ids(tmp_path, vqgan, data, 1)
    assert ids.dtype == kind and ids.min() >= codes - 3
    ids = torch.from_numpy(ids.view("int16") if ids.dtype == numpy.uint16 else ids)
    (x, _), = train.cached_batches(ids, labels, [(torch.arange(4), torch.zeros(4, 1, dtype=torch.long))])
    assert x[:, 0].long().equal(vqgan.encode(data.images.float() / 255).flatten(1))


def test_a_damaged_shard_is_made_again_and_damaged_ids_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SHARD", 4)
    vqgan, data = tokenizer(2), pictures(10, 8)
    whole = numpy.array(train.cache_ids(tmp_path, vqgan, data, 2)[0])
    (ids,), joined = tmp_path.glob("ids-*.npy"), train.join_shards
    monkeypatch.setattr(train, "join_shards", lambda *_: None)
    (content := ids.read_bytes()), ids.unlink()
    with pytest.raises(unified.UserError, match="delete them"):         # all shards are there, and were not joined
        train.cache_ids(tmp_path, vqgan, data, 2)
    shards = sorted(ids.with_suffix("").iterdir())
    shards[0].write_bytes(shards[0].read_bytes()[:-40])
    shards[1].write_bytes(b"junk")
    shards[2].with_name("000002.npz.9.tmp").write_bytes(b"half a")
    monkeypatch.setattr(train, "join_shards", joined)
    assert (train.cache_ids(tmp_path, vqgan, data, 2)[0] == whole).all()
    ids.write_bytes(content[:-9])
    with pytest.raises(unified.UserError, match="delete them"):
        train.cache_ids(tmp_path, vqgan, data, 2)


def test_pictures_are_mapped_in_order_or_the_same_part_of_them_every_time(monkeypatch):
    monkeypatch.setattr(probe, "images_at_once", lambda data, device: 4)
    data = pictures(10, 8)
    x = data.images.float() / 255
    means, labels = probe.map_images(lambda x: x.mean((2, 3)), data)
    assert means.equal(x.mean((2, 3))) and labels.equal(data.labels)
    part, labels = probe.map_images(lambda x: x[:, 0, 0, 0], data, count=5)
    which = (x[:, 0, 0, 0] == part[:, None]).nonzero()[:, 1]
    assert len(which.unique()) == 5 and labels.equal(data.labels[which])
    monkeypatch.setattr(probe, "images_at_once", lambda data, device: 3)
    assert probe.map_images(lambda x: x[:, 0, 0, 0], data, count=5)[0].equal(part)


def test_golden_learning_rate():
    g = golden("mage")
    s = g.inputs["lr_schedule"]
    ours = [probe.learning_rate(e, s["warmup_epochs"], s["epochs"], s["lr"], s["min_lr"]) for e in s["at_epochs"]]
    assert ours == pytest.approx(g.outputs["lr_schedule"], rel=1e-6, abs=1e-18)


def clouds(n, spread, seed=0):
    """Points around one centre for each of three classes, on axes of very different scale."""
    g = torch.Generator().manual_seed(seed)
    centres, labels = torch.randn(3, 5, generator=torch.Generator().manual_seed(9)), torch.arange(n) % 3
    return (centres[labels] + spread * torch.randn(n, 5, generator=g)) * torch.tensor([1e-3, 1, 1, 1, 100]) + 7, labels


def test_ridge_is_least_squares_with_a_penalty():
    x, y = clouds(3000, 0.3)                                            # more than one chunk of the sums
    mean, std = x.mean(0), x.std(0)
    ones = numpy.pad(((x - mean) / std).double().numpy(), ((0, 0), (0, 1)), constant_values=1)
    for penalty in (0.01, 0.1):
        rows = numpy.concatenate([ones, math.sqrt(penalty * 3000) * numpy.eye(6)])          # a penalty is rows that ask for zero
        target = numpy.concatenate([numpy.eye(3)[y.numpy()], numpy.zeros((6, 3))])
        weight = probe.ridge(*probe.moments(x, y, mean, std, 3), penalty)
        assert_close(weight, torch.from_numpy(numpy.linalg.lstsq(rows, target, rcond=None)[0]), 1e-5)


def test_the_ridge_probe_solves_a_separable_problem_and_the_test_set_chooses_nothing():
    assert probe.ridge_probe(*clouds(300, 0.05), *clouds(90, 0.05, seed=1)) == 1.0
    (x, y), (x_test, y_test) = clouds(120, 2.0), clouds(90, 2.0, seed=1)
    together = probe.ridge_probe(x, y, x_test, y_test)
    apart = [probe.ridge_probe(x, y, x_test[i:i + 1], y_test[i:i + 1]) for i in range(90)]
    assert 0.34 < together < 0.9 and together == pytest.approx(sum(apart) / 90)


# ---------------------------------------------------------------------------------------------------------------------------
# The scripts, with the words that a user types


def script(name, *args, expect=0):
    """What `python NAME ARGS` does and prints, after checking that its exit code is expected, or among those; in this
    process, since starting one takes longer than most tests."""
    printed, code = io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        patch.setattr(sys, "argv", [str(HERE / name), *map(str, args)])
        try:
            unified.run_main(importlib.import_module(name.removesuffix(".py")).main)
        except SystemExit as leaving:
            code = leaving.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    assert code in numpy.atleast_1d(expect), printed.getvalue()
    return printed.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A tree in ImageNet's layout: two classes, 24 pictures to train on and 8 to test on in each."""
    root = tmp_path_factory.mktemp("photos")
    for part, first in (("train", 0), ("val", 1000)):
        x, _ = unified.draw_shapes(torch.arange(first, first + (48 if part == "train" else 16)), 40)
        for i, tile in enumerate(x.movedim(1, -1).numpy()):
            folder = root / part / ("cat", "dog")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(tile).save(folder / f"{i:03d}.png")
    return root


def flags(photos, folder, *more):
    """A training of seconds."""
    return ("--dataset", photos, "--out-dir", folder, "--size", "tiny", "--image-size", 32, "--ids", 16, "--codes", 32, "--tokenizer-steps", 3,
            "--steps", 6, "--batch-size", 8, "--views", 2, "--log-every", 2, "--eval-every", 4, "--save-every", 1, "--workers", 0, "--device", "cpu", *more)


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    """The folder of a finished run, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, script("train.py", *flags(photos, folder, "--labels"))


def test_a_run_leaves_pictures_figures_and_the_next_commands(finished):
    folder, printed = finished
    for name in ("samples.png", "reconstructions.png", "loss.png"):
        assert min(PIL.Image.open(folder / name).size) > 100
    for words in ("PSNR", "of the codes used", "untrained", "raw pixels", "python sample.py", "python probe.py", "ln 32 = 3.47"):
        assert words in printed
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["stage"] == "model" and "loss" in r] == [2, 4, 6]
    assert all(r["loss"] > 0 and r["images_per_second"] > 0 and r["grad_norm"] > 0 for r in rows if "loss" in r)
    assert {"model", "ema", "optimizer", "stage", "step", "config"} == set(unified.load_checkpoint(folder / "model.pt"))


def test_mage_c_trains_on_two_views_of_a_shared_tokenizer(photos, finished, tmp_path):
    printed = script("train.py", *flags(photos, tmp_path / "c", "--model", "mage-c", "--tokenizer", finished[0], "--micro-batch", 4))
    assert "contrastive term compares 4 of the 8" in printed and not [*(tmp_path / "c").glob("ids*")]
    assert '"contrast"' in (tmp_path / "c" / "log.jsonl").read_text()


def test_samples_in_every_form(finished, tmp_path):
    run = finished[0]
    script("sample.py", run, "--n", 5, "--out", tmp_path / "a.png", "--gif", "--npz", tmp_path / "a.npz", "--png-dir", tmp_path / "flat",
           "--label", "dog,0", "--guidance", 2, "--steps", 4)
    script("sample.py", run, "--n", 5, "--batch", 2, "--out", tmp_path / "b.png", "--npz", tmp_path / "b.npz", "--label", "dog,0", "--guidance", 2, "--steps", 4)
    one, two = (numpy.load(tmp_path / name)["arr_0"] for name in ("a.npz", "b.npz"))
    assert one.shape == (5, 32, 32, 3) and one.dtype == numpy.uint8
    assert numpy.abs(one.astype(int) - two).max() <= 1                                      # the batch size changes no picture
    flat = numpy.stack([numpy.array(PIL.Image.open(p)) for p in sorted((tmp_path / "flat").glob("*.png"))])
    assert (flat == one).all() and PIL.Image.open(tmp_path / "a.gif").n_frames == 4
    assert "--overwrite" in script("sample.py", run, "--out", tmp_path / "a.png", expect=2)


def test_two_pictures_with_holes_in_different_places_in_one_call(photos, finished, tmp_path):
    files = sorted((photos / "val" / "cat").iterdir())[:2]
    script("sample.py", finished[0], "--image", *files, "--box", "4,4,12,12", "10,16,32,32", "--n", 1, "--gif", "--out", tmp_path / "p.png")
    sheet = numpy.array(PIL.Image.open(tmp_path / "p.png")).astype(int)
    zoom = (sheet.shape[1] - 8) // 96                                                       # three tiles of 32 with 2-pixel lines
    side = 32 * zoom
    for row, (x0, y0, x1, y1) in enumerate(((4, 4, 12, 12), (10, 16, 32, 32))):
        original, painted = (sheet[2 + row * (side + 2):, 2 + column * (side + 2):][:side:zoom, :side:zoom] for column in (0, 2))
        outside = numpy.ones((32, 32), bool)
        outside[y0:y1, x0:x1] = False
        assert (original[outside] == painted[outside]).all() and (original[~outside] != painted[~outside]).any()
    assert "wrote" in script("sample.py", finished[0], "--image", files[0], "--reconstruct", "--out", tmp_path / "r.png")


@pytest.fixture(scope="module")
def diffused(photos, tmp_path_factory):
    """The folder of a finished UMD run, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "umd"
    return folder, script("train.py", *flags(photos, folder, "--model", "umd", "--micro-batch", 4, "--views", 1, "--save-every", 2))


def test_a_model_of_pixels_trains_samples_paints_and_is_probed_like_any_other(photos, diffused, tmp_path):
    run, printed = diffused
    assert "16 tokens an image" in printed and "untrained" in printed and not (run / "tokenizer.pt").exists()
    for name in ("samples.png", "reconstructions.png", "loss.png"):
        assert min(PIL.Image.open(run / name).size) > 100
    assert unified.load_checkpoint(run / "model.pt")["ema"].keys() == {k for k, p in unified.load_model(run)[0].named_parameters()}
    file = sorted((photos / "val" / "cat").iterdir())[0]
    script("sample.py", run, "--n", 3, "--steps", 50, "--gif", "--out", tmp_path / "a.png")
    assert PIL.Image.open(tmp_path / "a.gif").n_frames <= 26
    for more in (("--box", "4,4,12,12", "--steps", 3, "--n", 1), ("--reconstruct",)):
        script("sample.py", run, "--image", file, *more, "--out", tmp_path / f"{len(more)}.png")
    script("probe.py", run, "--layers", "1,4", "--t", "0,50", "--workers", 0)
    row = json.loads((run / "probe.jsonl").read_text().splitlines()[-1])
    assert row["layer"] in (1, 4) and row["t"] in (0, 50) and row["pool"] == "mean"
    assert "0 to 1000" in script("probe.py", run, "--t", "1001", expect=2)


def test_the_unet_trains_and_shows_samples(photos, tmp_path):
    script("train.py", *flags(photos, tmp_path / "run", "--model", "adm", "--views", 1, "--steps", 2, "--eval-every", 0, "--image-size", 16))
    assert min(PIL.Image.open(tmp_path / "run" / "samples.png").size) > 100
    assert '"vb"' in (tmp_path / "run" / "log.jsonl").read_text()
    assert "takes none" in script("train.py", *flags(photos, tmp_path / "other", "--model", "adm", "--views", 1, "--labels"), expect=2)


def test_averaged_weights_resume_to_the_same_bits(photos, diffused, tmp_path):
    more = ("--model", "umd", "--micro-batch", 4, "--views", 1, "--eval-every", 0)
    process = start(tmp_path / "printed", run_script, "train.py", flags(photos, tmp_path / "run", *more))
    until((tmp_path / "run" / "model.pt").exists, process)
    process.kill()
    finish(process)
    script("train.py", *flags(photos, tmp_path / "run", *more, "--resume"))
    ours, theirs = (unified.load_checkpoint(folder / "model.pt") for folder in (tmp_path / "run", diffused[0]))
    for part in ("model", "ema"):
        assert all(torch.equal(v, theirs[part][k]) for k, v in ours[part].items())


def test_a_trained_model_learns_the_classes_and_lends_its_encoder(photos, diffused, tmp_path):
    printed = script("train.py", *flags(photos, tmp_path / "l", "--model", "umd", "--labels", "--init", diffused[0], "--views", 1, "--eval-every", 0))
    assert "fresh: label_embed" in printed
    model, config = unified.load_model(tmp_path / "l")
    assert (model.clean_ratio, model.mask_ratio_noised, model.classes) == (0.05, 0.0, 2)
    script("sample.py", tmp_path / "l", "--label", "dog", "--guidance", 2, "--n", 2, "--steps", 2, "--out", tmp_path / "l.png")
    printed = script("train.py", *flags(photos, tmp_path / "m", "--model", "mae", "--init-encoder", diffused[0], "--views", 1, "--eval-every", 0))
    assert "tensors from" in printed and not (tmp_path / "m" / "samples.png").exists()
    assert "start from nothing" in script("sample.py", tmp_path / "m", expect=2)
    assert "does not fit" in script("train.py", *flags(photos, tmp_path / "n", "--model", "umd", "--init", diffused[0], "--views", 1, "--ids", 64), expect=2)


@pytest.mark.parametrize("name", ["x_embedder.proj.weight", "decoder_pred.weight"])
def test_files_of_the_official_dit_and_mae_are_refused_in_one_sentence(name, tmp_path):
    torch.save({"model": {name: torch.ones(2)}}, tmp_path / "official.pt")
    with pytest.raises(unified.UserError, match="two ends of UMD"):
        unified.load_model(tmp_path / "official.pt")
    assert "not the official networks" in " ".join(script("train.py", "-h").split())


def test_micro_batches_share_the_clean_part_of_the_whole_batch():
    model = umd(clean=0.05)
    assert sum(model.micro_batch_args(first, 8)["n_clean"] for first in range(0, 256, 8)) == int(256 * 0.05)
    assert {umd(clean=0.5).micro_batch_args(first, 4)["n_clean"] for first in range(0, 64, 4)} == {2}


def test_a_probe_stands_beside_its_baselines(finished):
    printed = script("probe.py", finished[0], "--layers", "2,4", "--workers", 0)
    row = json.loads((finished[0] / "probe.jsonl").read_text().splitlines()[-1])
    assert {"head", "layer", "t", "pool", "top1", "untrained", "pixels", "images", "seconds"} <= set(row) and row["layer"] in (2, 4)
    assert "same network untrained" in printed and "raw pixels" in printed


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
        (root / "train" / "cat" / "b.jpg").write_bytes(b"\xff\xd8 not a picture")
    return root


@pytest.mark.parametrize("args, words", [
    (["--dataset", "imagenet", "--data-dir", "{tmp}/nowhere"], "nowhere"),
    (["--dataset", "cifar10", "--data-dir", "{tmp}/nowhere"], "nowhere"),
    (["--dataset", "{empty}"], "no image in"),
    (["--dataset", "{classes}"], "cow"),
    (["--dataset", "{corrupt}", "--strict-images", "--image-size", "32", "--size", "tiny", "--workers", "0", "--tokenizer-steps", "2"], "b.jpg"),
    (["--batch-size", "10", "--micro-batch", "4"], "10"),
    (["--ids", "17"], "--ids 17"),
    (["--image-size", "36", "--tokenizer", "{tokenizer}"], "36"),
    (["--colour"], "--colour"),
    (["--tokenizer", "{truncated}"], "truncated.pt"),
    (["--device", "cuda:77"], "cuda:77"),
])
def test_a_users_mistake_ends_in_one_sentence_and_exit_code_2(args, words, finished, tmp_path):
    (tmp_path / "truncated.pt").write_bytes((finished[0] / "model.pt").read_bytes()[:5000])
    places = {"tmp": tmp_path, "tokenizer": finished[0] / "tokenizer.pt", "truncated": tmp_path / "truncated.pt",
              **{what: broken_tree(tmp_path / what, what) for what in ("empty", "classes", "corrupt")}}
    printed = script("train.py", "--out-dir", tmp_path / "run", *(a.format(**places) for a in args), expect=2)
    assert words in printed and "Traceback" not in printed


@pytest.mark.parametrize("name", ["sample.py", "probe.py"])
def test_a_truncated_or_foreign_checkpoint_ends_in_one_sentence_too(name, finished, tmp_path):
    (tmp_path / "cut.pt").write_bytes((finished[0] / "model.pt").read_bytes()[:5000])
    torch.save({"weight": torch.ones(2)}, tmp_path / "foreign.pt")
    for file in ("cut.pt", "foreign.pt"):
        assert file in script(name, tmp_path / file, expect=2)


def test_a_bug_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        unified.run_main(lambda: 1 / 0)


def test_a_run_that_is_there_is_not_overwritten(photos, finished):
    before = (finished[0] / "model.pt").read_bytes()
    assert "--resume" in script("train.py", *flags(photos, finished[0], "--labels"), expect=2)
    assert "--batch-size 8, not 16" in script("train.py", *flags(photos, finished[0], "--labels", "--resume", "--batch-size", 16), expect=2)
    assert (finished[0] / "model.pt").read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------------
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
    monkeypatch.setattr(unified, "open_data", begin)
    monkeypatch.setattr(unified.MAGE, "sample_steps", functools.wraps(unified.MAGE.sample_steps)(lambda *_, **__: begin()))
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


OUTPUTS = [
    ("--out", "grid"), ("--out", "grid.gif"), ("--out", "grid.xyz"), ("--out", "folder"),
    ("--out", "folder.png"), ("--out", "no/grid.png"), ("--out", "file/grid.png"), ("--out", "g" * 300 + ".png"), ("--npz", "folder"),
    ("--npz", "grid.png"), ("--npz", "grid.gif"), ("--npz", "no/x.npz"), ("--png-dir", "file"),
    ("--png-dir", "file/below"), ("--png-dir", ".")]


@pytest.mark.parametrize("flag, value", OUTPUTS)
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


@pytest.mark.parametrize("model", [name for name, method in unified.MODELS.items() if not method.predictor])
def test_every_image_size_is_built_or_refused_in_a_sentence_that_helps(model):
    for size in ("tiny", "small", "base"):
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
                    vqgan = unified.tokenizer_config("toy", side // grid if model != "adm" else 2)
                    unified.build(unified.model_config(model, size, side, grid, vqgan))
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
    for more in (["--seed", 1], ["--temperature", 1], ["--steps", 1], ["--label", "cat"]):
        assert "--overwrite" in ask(*more, expect=2)
    assert "--overwrite" in ask(run=diffused[0], expect=2)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == whole
    ask("--seed", 1, "--overwrite", "--n", 2)                           # nothing of the other seed stays
    assert sorted(p.name for p in folder.iterdir()) == ["000000.png", "000001.png", "made-by.json"]
    (folder / "made-by.json").unlink()
    assert "--overwrite" in ask("--seed", 1, "--n", 2, expect=2)        # pictures of unknown origin


@pytest.mark.parametrize("value, name", [
    (numpy.float64(1), "scalar"), (pathlib.PurePosixPath("a"), "PurePosixPath"), (nn.Linear(2, 2), "Linear")], ids=str)
def test_an_intact_file_that_holds_more_than_tensors_is_not_called_damaged(value, name, tmp_path):
    (tmp_path / "own.pt").write_bytes(saved({"state_dict": {"w": torch.ones(2)}, "more": value}))
    with pytest.raises(unified.UserError, match=rf"own.pt holds \S*{name} .*run code.*state_dict") as error:
        unified.load_model(tmp_path / "own.pt")
    assert "damaged" not in str(error.value) and "download" not in str(error.value)


@pytest.mark.parametrize("name", [*TINY, "tokenizer"])
def test_a_tokenizer_where_a_model_belongs_is_called_what_it_is_and_the_reverse(name, tmp_path):
    state = run_checkpoint(TINY.get(name, TINY_VQGAN))
    others = {k.removeprefix("vqgan.") if name == "tokenizer" else k: v for k, v in state["model"].items()}
    load, words = (unified.load_tokenizer, "a model, not a tokenizer")
    if name == "tokenizer":
        load, words = (unified.load_model, "a tokenizer, not a model")
    for what in (state, {"state_dict": others}):                        # as train.py and as others keep it
        torch.save(what, tmp_path / "a.pt")
        with pytest.raises(unified.UserError, match=f"a.pt is {words}"):
            load(tmp_path / "a.pt")


def test_golden_attention_in_the_new_order():
    g = golden("adm_unet")
    for order, name in (("legacy", "unit_attn_legacy"), ("new", "unit_attn_new_order")):
        heads = g.inputs["unit_attn_x"].size(1) // g.config["num_head_channels"]
        for more in (dict(head=g.config["num_head_channels"]), dict(head=64, heads=heads)):
            attention = unified.ADMAttention(g.inputs["unit_attn_x"].size(1), groups=32, order=order, **more)
            attention.load_state_dict(g.state_dict_unit_attention)
            assert_close(attention(g.inputs["unit_attn_x"]), g.outputs[name])


def test_a_unet_that_others_trained_loads_with_its_heads_and_order_and_says_what_is_assumed(tmp_path):
    options, x, said = dict(ch=32, groups=32, ch_mult=(1, 2), attention=(2,)), some_pictures(2), []
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


def test_heads_and_order_belong_to_published_files_of_adm(finished, finished_adm):
    for run in (finished[0], finished_adm):
        for name in ("sample.py", "probe.py"):
            assert "leave --adm-... out" in script(name, run, "--adm-heads", 4, expect=2)


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


def test_a_mask_says_what_a_box_says_and_is_cropped_like_the_image(photos, finished, tmp_path):
    files = sorted((photos / "val" / "cat").iterdir())[:2]              # 40 x 40, of which 36 are read, as 32
    small, large = numpy.zeros((32, 32), numpy.uint8), numpy.zeros((40, 40), numpy.uint8)
    small[4:12, 8:20] = large[:20] = 255
    for name, mask in (("small", small), ("large", large), ("none", 0 * small)):
        PIL.Image.fromarray(mask).save(tmp_path / f"{name}.png")

    def paint(out, *more, expect=0):
        asked = ("--image", *files, *more, "--n", 1, "--steps", 2, "--out", tmp_path / f"{out}.png")
        printed = script("sample.py", finished[0], *asked, expect=expect)
        return printed if expect else numpy.array(PIL.Image.open(tmp_path / f"{out}.png"))
    masks = [tmp_path / f"{name}.png" for name in ("small", "large", "none")]
    for more in ([], ["--outside"]):
        one = paint("a" + "".join(more), "--mask", masks[0], *more)
        assert (one == paint("b" + "".join(more), "--box", "8,4,20,12", *more)).all()
    assert (paint("c", "--mask", *masks[:2]) == paint("d", "--box", "8,4,20,12", "0,0,32,16")).all()
    assert "nothing to paint" in paint("e", "--mask", masks[2], expect=2)
    assert "nothing to paint" in paint("e", "--box", "0,0,32,32", "--outside", expect=2)
    assert "either --box" in paint("e", "--mask", masks[0], "--box", "8,4,20,12", expect=2)
    assert "3 holes for 2" in paint("e", "--mask", *masks, expect=2)


def test_progress_counts_passes_through_the_network(photos, finished, diffused, tmp_path):
    file = next((photos / "val" / "cat").iterdir())
    asked = ("--n", 5, "--batch", 2, "--steps", 4, "--out", tmp_path / "a.png", "--overwrite")
    hole = ("--image", file, "--box", "4,4,12,12")
    for run, more, passes in ((finished[0], (), 12), (finished[0], hole, 12), (diffused[0], (), 15)):
        printed = script("sample.py", run, *asked, *more)
        assert f"{passes}/{passes}" in printed and ("pass/s" in printed or "s/pass" in printed), printed


# ---------------------------------------------------------------------------------------------------------------------------
# Several processes


def train_together(folder, micro, contrastive):
    """Twenty optimizer steps of 16 images as one of several processes; leaves losses, first gradients and parameters in folder/WORLD.pt."""
    unified.join_processes("cpu")
    rank, world = unified.rank_and_world()
    (folder / str(world)).mkdir(exist_ok=True)
    model = mage(contrastive=contrastive, dropout=0.0).train()
    views = 2 if contrastive else 1
    data = torch.randint(model.codes, (20, 16, views, model.length), generator=torch.Generator().manual_seed(1))
    noise = some_noise(20, 16 * views, model.length)

    def draws(step, first):                                             # given, since a micro-batch of 16 draws other numbers than two of 8
        return dict(mask_ratio=torch.tensor(0.6), mask_noise=noise[step, first * views:(first + micro) * views]) if contrastive else {}

    def batches(plan):
        places = ((step, first) for step in range(20) for first in range(rank * micro, 16, world * micro))
        return ((data[step, first:first + micro], torch.zeros(micro, dtype=torch.long)) for step, first in places)
    first = {}

    def optimizer(weights, recipe):
        def keep_first(*_):
            if not first:
                first.update({k: p.grad.clone() for k, p in weights.items()})
        adamw = train.adamw(weights, recipe)
        adamw.register_step_pre_hook(keep_first)
        return adamw
    recipe = dict(batch_size=16, micro_batch=micro, optimizer=optimizer)
    rows = trained(folder / str(world), model, recipe, batches, 20, data=pictures(16, 8), forward_args=draws)
    if rank == 0:
        losses = torch.tensor([row["loss"] for row in rows])
        torch.save((losses, first, {k: p.detach() for k, p in train.trainable(model).items()}), folder / f"{world}.pt")
    unified.leave_processes()


def without_keys(name, p):
    """Attention does not change when all keys shift alike, so the gradient of their bias is nothing but rounding, which AdamW enlarges."""
    return torch.cat([p.chunk(3)[0], p.chunk(3)[2]]) if name.endswith("qkv.bias") else p


@pytest.mark.parametrize("contrastive, alone, losses_agree", [(0.0, 8, 1e-5), (0.1, 16, 1e-4)])
def test_two_processes_train_as_one_does(contrastive, alone, losses_agree, tmp_path):
    """MAGE: one process that accumulates 2 x 8 images against two processes of 8. MAGE-C, which compares what is computed at once: 16 against 2 x 8."""
    torch.set_num_threads(1)
    train_together(tmp_path, alone, contrastive)
    both(tmp_path, train_together, tmp_path, 8, contrastive)
    (losses, first, weights), (losses2, first2, weights2) = (torch.load(tmp_path / f"{world}.pt") for world in (1, 2))
    assert losses[0] != losses[-1]
    assert_close(losses2, losses, losses_agree)
    whole = torch.cat([without_keys(k, g).flatten() for k, g in first.items()])
    assert_close(torch.cat([without_keys(k, g).flatten() for k, g in first2.items()]), whole, 1e-5)
    if not contrastive:
        for name, p in weights.items():
            assert (without_keys(name, weights2[name]) - without_keys(name, p)).abs().max() < 1e-5, name


def test_two_processes_share_the_ids_and_leave_one_run(photos, tmp_path):
    """As a user starts them, with torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", HERE / "train.py"]
    with open(tmp_path / "printed", "w") as file:
        process = subprocess.Popen([*command, *map(str, flags(photos, tmp_path / "run", "--labels"))], stdout=file, stderr=file,
                                   start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        process.wait(LIMIT)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    printed = (tmp_path / "printed").read_text()
    assert process.returncode == 0, printed
    assert printed.count("python probe.py") == 1
    vqgan, _ = unified.load_tokenizer(tmp_path / "run")
    data = unified.open_data(str(photos), "", 32, train=True)
    (tmp_path / "alone").mkdir()
    alone, labels = train.cache_ids(tmp_path / "alone", vqgan, data, 2)
    (ids,) = (tmp_path / "run").glob("ids-*.npy")
    assert (numpy.load(ids) == alone).all() and labels.equal(data.labels)


def make_ids(folder, shard):
    unified.join_processes("cpu")
    train.SHARD = shard
    train.cache_ids(folder, tokenizer(2), pictures(30, 8), 2)
    unified.leave_processes()


def test_ids_that_two_processes_began_are_finished_by_one_and_the_reverse(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SHARD", 4)
    vqgan, data = tokenizer(2), pictures(30, 8)
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


def test_umds_few_shot_evaluator_is_a_probe(diffused):
    printed = script("probe.py", diffused[0], "--head", "fewshot", "--shots", 4, "--workers", 0)
    assert "fewshot-4" in printed and "+-" in printed
    assert "belongs to --head fewshot" in script("probe.py", diffused[0], "--head", "knn", "--shots", 4, expect=2)


def test_two_processes_probe_as_one_does(diffused, tmp_path):
    rows, args = [], (diffused[0], "--head", "mlp", "--epochs", 3, "--workers", 0)
    for printed in (finish(start(tmp_path / "printed", run_script, "probe.py", args))[1], both(tmp_path, run_script, "probe.py", args)):
        assert printed.count("raw pixels") == 1, printed
        rows.append(json.loads((diffused[0] / "probe.jsonl").read_text().splitlines()[-1]))
    one, two = ({k: v for k, v in row.items() if k != "seconds"} for row in rows)
    assert one == two


def test_the_method_that_the_readme_adds_trains_and_samples():
    code = (HERE / "README.md").read_text().split("```python\nclass ")[1].split("```")[0]
    exec("class " + code, vars(unified).copy())
    try:
        model = unified.build(unified.model_config("denoiser", "tiny", 16, 4))
        loss, _ = model(some_pictures())
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        assert model.sample(2, steps=3).shape == (2, 3, 16, 16) and model.embed(some_pictures()).shape == (4, 128)
        model.to("meta")
        with Elsewhere():
            assert model.sample(2, steps=2).is_meta
    finally:
        unified.MODELS.pop("denoiser", None)


def test_two_processes_make_the_pictures_of_one(finished, tmp_path):
    flags = ["--n", 5, "--batch", 2, "--steps", 3, "--device", "cpu"]
    both(tmp_path, run_script, "sample.py", [finished[0], *flags, "--out", tmp_path / "two.png", "--npz", tmp_path / "two.npz", "--png-dir", tmp_path / "flat"])
    script("sample.py", finished[0], *flags, "--out", tmp_path / "one.png", "--npz", tmp_path / "one.npz")
    one, two = (numpy.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("one", "two"))
    assert abs(one.astype(int) - two).max() <= 1 and len(list((tmp_path / "flat").glob("*.png"))) == 5      # another number of threads rounds another way


# ---------------------------------------------------------------------------------------------------------------------------
# Signals, and what is lost when something fails: nothing


@pytest.fixture
def no_signals(monkeypatch):
    """What unified.SIGNALS holds of its own."""
    monkeypatch.setattr(unified, "SIGNALS", {})
    return unified.SIGNALS


def same_weights(one, two, names=("tokenizer.pt", "model.pt"), parts=("model", "ema", "optimizer")):
    """Whether the checkpoints of two runs hold the same bits."""
    def leaves(value):
        if isinstance(value, dict):
            return [leaf for key in value for leaf in leaves(value[key])]
        return [leaf for item in value for leaf in leaves(item)] if isinstance(value, (list, tuple)) else [value]
    states = [[unified.load_checkpoint(folder / name) for name in names] for folder in (one, two)]
    one, two = (leaves([[state[part] for part in (*parts, "step")] for state in side]) for side in states)
    return len(one) == len(two) and all(v.equal(w) if isinstance(v, torch.Tensor) else v == w for v, w in zip(one, two))


BARS = ("tokenizer:", "ids of every image:", "model:", "features:")     # what is printed when a stage begins


def slow_ids():
    """Ids a shard and an image at a time, as of a large set; and steps long enough to be hit."""
    train.SHARD, probe.images_at_once = 8, lambda data, device: 2
    learning_rate = probe.learning_rate
    probe.learning_rate = lambda *args: (time.sleep(0.02), learning_rate(*args))[1]


def killed(photos, run, more, stages, seed):
    """Exit codes of a run that is ended five times in each of the stages, without warning or asked to stop, at moments that a seed decides;
    each time it goes on with --resume."""
    dice, codes = random.Random(seed), []
    for stage in stages:
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGTERM):
            process = start(f"{run}-printed-{len(codes)}", run_script, "train.py", flags(photos, run, "--resume", *more), slow_ids)
            until(lambda: process.printed.exists() and any(bar in process.printed.read_text() for bar in BARS[stage:]), process)
            time.sleep(0.4 * dice.random() ** 2)
            os.kill(process.pid, number)
            codes.append(finish(process)[0])
            (run / "model.pt.tmp").write_bytes(b"half a checkpoint")                        # as a kill while saving leaves it
    return codes


def test_a_run_killed_at_twenty_moments_ends_with_the_same_bits(photos, tmp_path):
    more = ("--labels", "--tokenizer-steps", 12, "--steps", 12, "--save-every", 3)
    runs = [tmp_path / "early", tmp_path / "late"]
    with concurrent.futures.ThreadPoolExecutor() as both_at_once:
        through = both_at_once.submit(lambda: finish(start(tmp_path / "quiet", run_script, "train.py", flags(photos, tmp_path / "through", *more), slow_ids))[0])
        codes = sum(both_at_once.map(lambda i: killed(photos, runs[i], more, [(0, 1), (2, 3)][i], i), (0, 1)), [])
    assert through.result() == 0 and codes.count(-signal.SIGKILL) == 8, codes
    assert {-signal.SIGKILL, 128 + signal.SIGTERM, 128 + signal.SIGINT} >= set(codes) - {-signal.SIGTERM, 0, 130}, codes
    for run in runs:
        code, printed = finish(start(tmp_path / "printed", run_script, "train.py", flags(photos, run, "--resume", *more), slow_ids))
        assert code == 0 and "python probe.py" in printed and "Traceback" not in printed
        assert same_weights(run, tmp_path / "through")
        rows = [[(r["stage"], r["step"], r["loss"]) for r in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in r]
                for folder in (run, tmp_path / "through")]
        assert [row for row in rows[0] if row not in rows[1]] == [] or {r[:2] for r in rows[0]} == {r[:2] for r in rows[1]}


def chosen_method(method):
    torch.multiprocessing.set_start_method(method, force=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_signal_to_all_of_a_group_reaches_no_worker_before_its_parent(method, number, photos, tmp_path):
    """As SLURM, systemd, timeout and a terminal send it. What decodes images is forked or not."""
    args = flags(photos, tmp_path / "run", "--model", "umd", "--views", 1, "--steps", 100_000, "--workers", 2, "--eval-every", 0)
    process = start(tmp_path / "printed", run_script, "train.py", args, functools.partial(chosen_method, method))
    until((tmp_path / "run" / "model.pt").exists, process)
    os.killpg(process.pid, number)
    code, printed = finish(process, 60)
    assert code == 128 + number and "stopping" in printed and "--resume goes on" in printed and "Traceback" not in printed, printed
    assert unified.load_checkpoint(tmp_path / "run" / "model.pt")["step"] > 0


def test_a_worker_that_dies_ends_the_run_in_a_sentence_with_what_was_trained_saved(photos, tmp_path):
    args = flags(photos, tmp_path / "run", "--model", "umd", "--views", 1, "--steps", 100_000, "--workers", 1, "--eval-every", 0, "--save-every", 100_000)
    process = start(tmp_path / "printed", run_script, "train.py", args)
    until(lambda: (tmp_path / "run" / "log.jsonl").exists() and '"step": 4' in (tmp_path / "run" / "log.jsonl").read_text(), process)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    code, printed = finish(process, 120)
    assert code == 2 and "shared memory (/dev/shm)" in printed and "--workers 0" in printed and "Traceback" not in printed, printed
    assert unified.load_checkpoint(tmp_path / "run" / "model.pt")["step"] >= 4


def read_with_a_worker(tree):
    before = signal.getsignal(signal.SIGCHLD)
    data = unified.open_data("anything", str(tree), 16, train=True)
    for _ in data.batches([(torch.arange(6), None)], workers=1):
        print("same" if signal.getsignal(signal.SIGCHLD) == before else "torch's")


def test_nothing_raises_in_the_middle_of_a_step_when_a_worker_dies(tree, tmp_path):
    assert finish(start(tmp_path / "printed", read_with_a_worker, tree)) == (0, "same\n")    # torch's handler of SIGCHLD would


def test_workers_that_hand_nothing_over_end_the_wait(monkeypatch):
    class Stuck(torch.utils.data.Dataset):
        def __getitem__(self, i):
            time.sleep(3)
    loader = torch.utils.data.DataLoader(Stuck(), sampler=[0], num_workers=1, timeout=1, multiprocessing_context="fork")
    with pytest.raises(unified.UserError, match="/dev/shm.*--workers 0"):
        next(unified.handed_over(loader, patience=1))


def test_a_bug_in_a_worker_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"):
        list(unified.handed_over(item() for item in [lambda: (_ for _ in ()).throw(RuntimeError("a bug"))]))


def test_what_workers_hand_over_at_once_fits_into_a_containers_shared_memory(tree, monkeypatch):
    sizes, together = [], unified.together

    def measured(items):
        x, *rest = together(items)
        sizes.append(x.nbytes)
        return x, *rest
    monkeypatch.setattr(unified, "together", measured)
    data = unified.open_data("anything", str(tree), 64, train=True)
    index = torch.arange(256) % 6
    x, y = next(data.batches([(index, unified.hash_ints(index[:, None], torch.arange(10)))]))   # what made ids stand still at its third batch
    assert x.shape == (256, 10, 3, 64, 64) and y.equal(data.labels[index]) and sum(sizes) == x.numel() and max(sizes) <= 2**20
    assert_close(x[251], next(data.batches([(index[251:252], unified.hash_ints(index[251:252, None], torch.arange(10)))]))[0][0], 0)


def test_every_long_loop_stops_at_its_next_batch(no_signals, monkeypatch):
    """Features and PSNR, results that are drawn; of ids see test_ids_that_were_interrupted_..."""
    monkeypatch.setattr(probe, "images_at_once", lambda data, device: 2)
    read = []

    def embed(x):
        read.append(len(x))
        if len(read) == 3:
            no_signals[signal.SIGINT] = 0.0
        return x.mean((2, 3))
    with pytest.raises(unified.Stopped, match="images were read"):
        probe.map_images(embed, pictures(20, 8))
    assert len(read) == 3
    with pytest.raises(unified.Stopped, match="drawn"):
        list(train.until_asked(read))


def test_a_stop_while_averaged_weights_are_shown_saves_the_raw_ones(no_signals, tmp_path):
    model, shown = Linear(), []

    def evaluate():
        shown.append(model.inner.weight.detach().clone())
        no_signals[signal.SIGTERM] = 0.0
        raise unified.Stopped("while it is shown")
    with pytest.raises(unified.Stopped, match="at step 1 of the model"):
        trained(tmp_path, model, dict(ema=0.5, batch_size=4), lambda plan: itertools.repeat((torch.ones(4, 3), torch.zeros(4))), 9,
                evaluate=evaluate, data=pictures(8, 8), eval_every=1)
    state = unified.load_checkpoint(tmp_path / "model.pt")
    own, ema = state["model"]["inner.weight"], state["ema"]["inner.weight"]
    assert shown[0].equal(ema) and not own.equal(ema) and own.equal(model.inner.weight) and model.training


def test_a_signal_is_answered_in_words_at_once_and_a_second_one_at_once_in_deed(no_signals, capfd, monkeypatch):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        train.stop_when_asked()
        signal.raise_signal(signal.SIGTERM)
        assert "stopping" in capfd.readouterr().err and list(no_signals) == [signal.SIGTERM]
        signal.raise_signal(signal.SIGTERM)                             # what torchrun passes on a moment later changes nothing
        no_signals[signal.SIGTERM] -= 3
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        train.stop_when_asked()
        assert not no_signals
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def slowly_and_unevenly():
    """The second of two processes takes longer over what comes between two steps, and so sees a signal in another one."""
    step_done = train.Log.step_done
    train.Log.step_done = lambda *args: (time.sleep(0.05 * unified.rank_and_world()[0]), step_done(*args))


def test_two_processes_stop_after_the_same_step_and_save_once(photos, finished, tmp_path):
    args = flags(photos, tmp_path / "run", "--labels", "--tokenizer", finished[0], "--steps", 100_000, "--eval-every", 0, "--save-every", 100_000)
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
    both(tmp_path, run_script, "train.py", flags(photos, tmp_path / "run", "--model", "umd", "--views", 1, "--batch-size", 2, "--micro-batch", 1,
                                                 "--steps", 2, "--eval-every", 0))
    row = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
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


@pytest.mark.parametrize("before", [fail_in_a_step])
def test_ddp_is_gone_before_its_group_is_even_after_a_failure(before, photos, finished, tmp_path):
    """Freed later it could wait for the group's thread, which waits for Python: for good."""
    args = flags(photos, tmp_path / "run", "--labels", "--tokenizer", finished[0], "--eval-every", 0)
    ended = [finish(process) for process in start_two(tmp_path, run_script, "train.py", args, before)]
    for code, printed in ended:
        assert code == 1 and "a bug in a step" in printed and "\n0 wrappers left" in "\n" + printed, printed


@pytest.mark.parametrize("name, world, device, backend", [("cuda", 2, "cuda:1", "cpu:gloo,cuda:nccl"), ("cpu", 2, "cpu", "gloo"),
                                                           ("cuda:3", 1, "cuda:3", None)])
def test_a_process_touches_its_own_device_only_and_waits_for_hours(name, world, device, backend, monkeypatch):
    touched, joined = [], []
    monkeypatch.setenv("WORLD_SIZE", str(world)), monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch, "empty", lambda n, device: touched.append(device) or types.SimpleNamespace(device=torch.device(device)))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: touched.append(str(device)))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, timeout: joined.append((backend, timeout)))
    assert unified.join_processes(name) == torch.device(device) and set(touched) == {device}
    assert not joined if backend is None else joined[0][0] == backend and joined[0][1] >= datetime.timedelta(hours=1)


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
    assert "raw pixels" in script("probe.py", run, "--workers", 0, "--dataset", tree)       # on other data, as asked
    for part in ("train", "val"):
        (tree / part / "zebra").rename(tree / part / "cat")
    next((tree / "train" / "cat").iterdir()).unlink()
    assert "images 48 then and 47 now" in script("train.py", *rerun, expect=2)


def no_room(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


@pytest.mark.parametrize("limit, last", [(8_000_000, "tokenizer.pt"), (600_000, None)])
def test_a_disk_without_room_is_a_sentence_and_the_last_checkpoint_stays(limit, last, photos, tmp_path):
    process = start(tmp_path / "printed", run_script, "train.py", flags(photos, tmp_path / "run"), functools.partial(no_room, limit))
    code, printed = finish(process)
    assert code == 2 and "make room" in printed and "Traceback" not in printed, printed
    assert not [*(tmp_path / "run").glob("*.tmp")]
    if last:
        assert "last good checkpoint is untouched" in printed and unified.load_checkpoint(tmp_path / "run" / last)["step"] == 3


@pytest.mark.parametrize("links", [True, False])
def test_a_checkpoint_can_be_read_while_it_is_replaced(links, tmp_path, monkeypatch):
    path, replace, there = tmp_path / "model.pt", os.replace, []
    train.save_checkpoint(path, {"step": 1})
    monkeypatch.setattr(os, "replace", lambda *names: (there.append(path.exists()), replace(*names)))
    if not links:                                                       # as some network file systems
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "Operation not permitted")))
    for step in (2, 3):
        train.save_checkpoint(path, {"step": step})
    assert [unified.load_checkpoint(tmp_path / name)["step"] for name in ("model.pt", "model.pt.prev")] == [3, 2]
    assert there == [True] * 2 if links else there == [True, False] * 2                     # then .prev is read in its place


def test_a_save_that_fails_changes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    train.save_checkpoint(path, {"step": 1})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(unified.UserError, match="No space left.*untouched.*--resume"):
        train.save_checkpoint(path, {"step": 2})
    assert unified.load_checkpoint(path) == {"step": 1} and [*tmp_path.iterdir()] == [path]


def without_unix():
    """As on Windows, as far as the scripts can see."""
    for name in ("SC_PHYS_PAGES", "sysconf"):
        if hasattr(os, name):
            delattr(os, name)
    del signal.pthread_sigmask, signal.SIGCHLD
    sys.modules["fcntl"] = None
    importlib.reload(train)


@pytest.mark.parametrize("name", ["train.py", "probe.py"])
def test_scripts_run_without_what_windows_lacks(name, photos, finished, tmp_path):
    args = flags(photos, tmp_path / "run", "--labels", "--eval-every", 0) if name == "train.py" else (finished[0], "--workers", 0)
    code, printed = finish(start(tmp_path / "printed", run_script, name, args, without_unix))
    assert code == 0, printed


def test_a_training_of_more_than_a_day_is_announced_once(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    for name, steps, seconds in (("tokenizer", 1_000_000, 60), ("model", 2_000_000, 5), ("model", 100, 60)):
        log = train.Log(train.Config(), name, {"steps": steps}, 7, forbidden)
        for step in range(8, 30):
            now[0] += 500 if step == 8 else seconds                     # the first step compiles
            log.step_done(step, torch.tensor(1.0))
    told = [line for line in capsys.readouterr().out.splitlines() if "at this pace" in line]
    assert len(told) == 2 and "694 more days" in told[0] and "--tokenizer-batch-size" in told[0] and "116 more days" in told[1]


@pytest.mark.parametrize("args, batch", [({}, 16), (dict(dataset="imagenet"), 16), (dict(dataset="imagenet", device="cuda"), 256),
                                         (dict(dataset="imagenet", tokenizer_batch_size=8), 8), (dict(dataset="imagenet", size="tiny"), 16)])
def test_the_tokenizers_batch_fits_the_device_or_is_what_was_asked_for(args, batch, monkeypatch):
    monkeypatch.setattr(unified, "default_dtype", lambda device: "float32")
    assert train.settings(train.Config(device=args.pop("device", "cpu"), **args)).tokenizer_batch_size == batch


# ---------------------------------------------------------------------------------------------------------------------------
# The library: a wrong call is a ValueError


PUBLIC = ("forward", "sample_steps", "features", "embed", "reconstruct", "noise")


def right_arguments(model, method, views=1):
    """Arguments of a call that succeeds, {} of a method that the model lacks; each allows one number of rows only. A method of a fork
    whose own arguments are to be checked, too, gets a line here, and in its class's forms."""
    rows, x = torch.arange(4), some_pictures(8, 32).unflatten(0, (4, 2))
    known = dict(x=x[:, :views].squeeze(1), ids=torch.arange(64).view(4, 4, 4) % 32, n=4, steps=2,
                 temperature=0.5, eta=0.5, guidance=1.5, known=x[:, 0], mask=x[:, 0, 0] > 0.5, seeds=rows, schedule="linear", draw=3,
                 mask_ratio=0.7, index=20, gap=2, n_clean=2, layers=[1, 2])
    if isinstance(model, unified.Model):
        most = model.t_range[1]
        number = 4 if method != "forward" else 2 if isinstance(model, unified.UMD) else 4 * views
        known.update(labels=rows % 3 if model.classes else None, mask_noise=some_noise(4 * views, 16), keep_label=torch.arange(number) > 0,
                     noise=model.noise(torch.arange(number)), pool=model.pools[0], add={1: torch.zeros(4, *model.layers[1])},
                     t=torch.arange(1, 1 + number) if method == "forward" else most / 2 if isinstance(most, float) else min(most, 3))
    call = getattr(model, method, None)
    if known.get("labels") is None:
        known.pop("guidance")
    return {key: known[key] for key in inspect.signature(call).parameters if key in known} if call else {}


def near_tensors(v):
    """What is like a tensor but for rank, size, length, kind, device or values."""
    yield from (v[None], v[0], v[..., None], v[:-1], torch.cat([v, v]), v[..., :-1], torch.cat([v, v], -1), v.to("meta"), v.tolist(),
                v.numpy(), torch.tensor(0), None, 3, 0.5, "many", [], v.movedim(-1, 0), v > 0, v.to(torch.complex64), v[:0])
    yield from (v.to(dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int16, torch.int32, torch.uint8, torch.uint16))
    if v.dim() > 1:
        yield from (v.movedim(1, -1), v[:, :1], v[:, :, None], F.pad(v, (1, 1)), (255 * v.float()).byte())
    if not v.is_floating_point() and v.dtype != torch.bool:
        yield from (-1 - v, v + 10**6, v - 2**40)


def near_values(key, v):
    """What comes near an argument and is wrong, mostly."""
    if isinstance(v, torch.Tensor):
        return list(near_tensors(v))
    if key == "layers":
        return [3, [0], [-1], [99], "1", [None], [1.5], [[1]], torch.tensor([1, 2]), [torch.tensor([1, 2])], (b for b in [1, 2]), [10**30], [math.nan], 1.0]
    if key == "add":
        m = v[1]
        return [3, None, [1], "add", m, {99: m}, {0: m}, {"1": m}, {None: m}, {math.nan: m}, *({1: w} for w in near_tensors(m))]
    if isinstance(v, str):
        return ["other", "", None, 3, [v], (v,), torch.tensor(0), v.upper()]
    if v is None:
        return [torch.zeros(4, dtype=torch.long)] if key == "labels" else []
    return [-1, 0, -0.5, 0.5, 10**30, -10**30, math.nan, math.inf, -math.inf, 1j, "two", None, [1], (), {}, torch.tensor([1, 2]),
            torch.tensor(math.nan), torch.tensor(1, device="meta"), numpy.ones(2)]


def shapes(result):
    """Of all tensors of a result; of a generator's first state."""
    result = next(result) if isinstance(result, types.GeneratorType) else result
    return [v.shape for v in torch.utils._pytree.tree_leaves(result) if isinstance(v, torch.Tensor)]


def fitting(expected, v):
    """What the shapes of four images become if only v tells their number, and, where v are maps of ids, their size."""
    if not isinstance(v, torch.Tensor) or not v.dim():
        return expected
    return [torch.Size([len(v), *(size[1:] if v.dim() != 3 else (3, 4 * v.size(1), 4 * v.size(2)))]) for size in expected]


def assert_guarded(model, method, views=1):
    """Each argument in turn is replaced by what comes near it: that is a ValueError, or the shapes are right."""
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
@pytest.mark.parametrize("name", list(unified.MODELS))
def test_every_wrong_argument_of_every_public_method_is_a_value_error_or_harmless(name, method):
    for labels in [0, 3] if name in TAKES_LABELS else [0]:
        assert_guarded(small(name, labels).eval(), method, unified.MODELS[name].views if method == "forward" else 1)


@pytest.mark.parametrize("method", ["encode", "decode", "reconstruct"])
def test_every_wrong_argument_of_the_tokenizer_is_a_value_error_or_harmless(method):
    assert_guarded(tokenizer(), method)


def test_a_forks_model_is_guarded_without_a_line_of_its_own():
    code = (HERE / "README.md").read_text().split("```python\nclass ")[1].split("```")[0]
    names = vars(unified).copy()
    try:
        exec("class " + code, names)
        for method in PUBLIC:
            assert_guarded(names["Denoiser"](32, 4, width=16, depth=2), method)
    finally:
        unified.MODELS.pop("denoiser", None)


@pytest.mark.parametrize("name", ["mage", "mage-c", "addp"])
def test_ids_are_checked_as_pixels_are(name):
    model = small(name).eval()
    ids = some_ids(model)
    for method in ("forward", "features", "embed"):
        call = getattr(model, method)
        for dtype in (torch.uint8, torch.int16, torch.int32, torch.uint16):
            assert shapes(call(ids.to(dtype))) == shapes(call(ids))
        for wrong in (ids + 128, -1 - ids, ids.float(), ids[0], ids[:, :-1], ids[None], ids > 3, ids.to("meta"), ids.to(torch.complex64)):
            with pytest.raises(ValueError, match="^x must be .* int "):
                call(wrong)


@pytest.mark.parametrize("name", list(unified.MODELS))
def test_a_refusal_says_what_was_given_and_what_is_expected(name):
    model, x = small(name).eval(), some_pictures(2, 32)
    for call, words in [(lambda: model.features((255 * x).byte()), r"float \(B, 3, 32, 32\).*not torch.uint8 \(2, 3, 32, 32\).*divide.*255"),
                        (lambda: model.embed(x[0]), r"float \(B, 3, 32, 32\).*not torch.float32 \(3, 32, 32\)"),
                        (lambda: model.embed(x.to("meta")), "on meta; the model is torch.float32 on cpu"),
                        (lambda: model.features(x, layers=[99]), rf"layers in \[1, {len(model.layers)}\], not \[99\]"),
                        (lambda: model.features(x, t=1001), rf"t must be .*{model.t_range[1]}\], not 1001"),
                        (lambda: model.embed(x, pool="max"), "among .*mean.*, not 'max'"),
                        (lambda: model.sample(0, known=x, mask=x[:, 0] > 0), "n must be int in .*, not 0"),
                        (lambda: model.sample(2, known=x), "known and mask go together"),
                        (lambda: model(x.repeat(2, 1, 1, 1), torch.tensor([0, 1, 2, 3])), "labels must be .*not torch.int64")]:
        with pytest.raises(ValueError, match=words):
            call()


def test_pixels_that_are_far_outside_are_refused_where_an_image_is_finished():
    model, x = small("umd").eval(), some_pictures(2, 32)
    for wrong in (255 * x, 2 * x - 1, x / 0):
        for call in (model.embed, model.reconstruct, tokenizer().encode, small("mage").eval().embed,
                     lambda x: model.sample(2, steps=1, known=x, mask=x[:, 0] > 0)):
            with pytest.raises(ValueError, match="^(x|known) must be"):
                call(wrong)


@pytest.mark.parametrize("name", list(unified.MODELS))
def test_wrong_options_are_refused_before_the_first_step(name):
    model = small(name)
    for options in (dict(steps=0), dict(seeds=torch.arange(3)), dict(schedule="sqrt"), dict(temperature=math.nan), dict(eta=1.5), dict(mask=torch.ones(2, 32, 32) > 0)):
        if True:
            with pytest.raises(ValueError):
                model.sample_steps(2, **options)
    with pytest.raises(ValueError, match="'sqrt'"):
        unified.noise_schedule("sqrt")


@pytest.mark.parametrize("name", [name for name in unified.MODELS if name != "mae"])
def test_an_int_as_seeds_is_the_first_of_n(name):
    model = small(name).eval()
    loop = torch.cat([model.sample(2, steps=2, seeds=first) for first in range(-1, 3, 2)])
    assert_close(loop, model.sample(4, steps=2, seeds=torch.arange(-1, 3)), 1e-4)
    assert not loop[:2].allclose(loop[2:])
    assert model.sample(2, steps=2).equal(model.sample(2, steps=2, seeds=torch.arange(2, dtype=torch.int32)))


def test_labels_and_seeds_may_lie_on_the_cpu():
    model = small("umd", 3).eval().to("meta")
    with Elsewhere():
        assert next(model.sample_steps(2, seeds=torch.arange(2), labels=torch.tensor([0, 2]))).x.is_meta
        assert model(torch.zeros(2, 3, 32, 32, device="meta"), torch.tensor([0, 2]))[0].is_meta
        with pytest.raises(ValueError, match="labels"):
            model(torch.zeros(2, 3, 32, 32, device="meta"), torch.tensor([0, 3]))


def test_a_guarded_method_keeps_its_name_and_its_signature():
    assert unified.MAGE.features.__doc__.startswith("Outputs of blocks") and "layers" in inspect.signature(unified.MAGE.features).parameters


# ---------------------------------------------------------------------------------------------------------------------------
# GPU paths, checked without a GPU: a model on "meta" has no numbers, and whoever asks for one would have waited


KINDS = list(unified.MODELS)
TAKES_LABELS = [name for name in KINDS if name not in ("addp", "adm")]


def small(name, classes=0, size="tiny"):
    """A model of 32 x 32 pixels, 4 x 4 ids or patches, none of whose weights are all zero."""
    tokenizer = unified.tokenizer_config("toy", 8, 128) if unified.MODELS[name].tokenizer else None
    model = unified.build(unified.model_config(name, size, 32, 4, tokenizer, classes))
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
    return model


class Elsewhere(torch.utils._python_dispatch.TorchDispatchMode):
    """Makes "meta" a GPU without float64, for which nobody waits. Refused: to read values off it, to copy to it and
    wait, shapes that values decide, float64, and what mixes devices. The first reads have answers, if any are given."""

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
        found = [v for v in torch.utils._pytree.tree_leaves(result) if isinstance(v, torch.Tensor) and v.is_meta]
        assert all(v.dtype != torch.float64 for v in found), "float64 on the device"
        return result


def test_elsewhere_refuses_what_it_should():
    x, i = torch.ones(3, device="meta"), torch.zeros(2, dtype=torch.long)
    for wrong in (lambda: x.sum().item(), lambda: bool((x > 0).all()), lambda: x.tolist(), lambda: x.cpu(),
                  lambda: x.nonzero(), lambda: x.unique(), lambda: x[x > 0], lambda: x.index_put_((x > 0,), x[0]),
                  lambda: torch.ones(3).to("meta"), lambda: x.copy_(torch.ones(3)), lambda: x.double(),
                  lambda: i[i.to("meta", non_blocking=True)], lambda: x[i], lambda: x + torch.ones(3)):
        with Elsewhere(), pytest.raises(AssertionError):
            wrong()
    with Elsewhere(i):
        assert x.cpu() is i and (x + torch.ones((), dtype=torch.float64)).is_meta


def train_watched(folder, model, method, device, watches, size=32, **cfg):
    """Train on 8 images a step as train.py does, from cached ids or a set on the device: a step in each of the contexts `watches`, which
    begins with the step's batch and ends before the next one."""
    views, recipe = (method.views, method.recipe) if method else (1, train.TOKENIZER_RECIPE)
    recipe = {**recipe, "views": views, "batch_size": 8, "lr": 1e-4}
    if device == "meta":
        recipe["optimizer"] = functools.partial(train.adamw, fused=None)
    y, x = torch.arange(32) % 3, torch.randint(256, (32, 3, size, size), dtype=torch.uint8)
    data = unified.ImageTensor(x, y, [], (0.8, 1.0), device)
    ids = torch.randint(model.codes, (32, 4, model.length), dtype=torch.int16).to(device) if method and method.tokenizer else None

    def batches(plan):
        source = data.batches(plan) if ids is None else train.cached_batches(ids, y, plan)
        for watch in watches:
            with watch:
                yield next(source)
    watched = batches(train.plan(32, 0, {**recipe, "micro_batch": 8}, 0, 100))
    args = (lambda step, first: model.micro_batch_args(first, 8)) if method else lambda step, first: {"adversarial_weight": 0.8}
    with contextlib.closing(watched), contextlib.suppress(StopIteration):                   # no watch is left
        trained(folder, model, recipe, lambda plan: watched, 100, data=data, forward_args=args, device=device, log_every=100, **cfg)


@pytest.mark.parametrize("name", [*KINDS, "tokenizer"])
def test_no_training_step_waits_for_the_device_or_needs_float64_there(name, tmp_path, monkeypatch):
    method = unified.MODELS.get(name)
    labels = name in TAKES_LABELS
    model = small(name, 3 * labels) if method else unified.TokenizerTraining(tokenizer())
    monkeypatch.setattr(probe, "autocast", lambda cfg: contextlib.nullcontext())
    norms, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: norms.append(clip(*args)) or norms[-1])
    train_watched(tmp_path, model.to("meta"), method, "meta", [Elsewhere()], labels=labels, dtype="float32")
    assert len(norms) == 1 and norms[0].is_meta


@pytest.mark.parametrize("name", KINDS)
def test_generation_never_waits_for_the_device_once_it_has_begun(name):
    labels, token = name in TAKES_LABELS and name != "mae", unified.MODELS[name].tokenizer
    model = small(name, 3 * labels).eval().to("meta")
    told = dict(labels=torch.zeros(4, dtype=torch.long, device="meta"), guidance=2.0) if labels else {}
    hole = dict(known=torch.zeros(4, 3, 32, 32, device="meta"), mask=torch.ones(4, 32, 32, device="meta") > 0)
    for more in ([{}] if model.generates else []) + [hole]:
        for option in ({"temperature": 0.0},) if token else ({}, {"eta": 0.0}) if model.generates else ({},):
            read = bool(more) and (token or name == "mae")              # once: how large each hole is
            with Elsewhere(*[torch.tensor([9, 4, 16, 9])] * read) as device:
                states = model.sample_steps(4, steps=3, **option, **told, **more)
                first = next(states)
                assert not device.answers
                assert all(model.render(state).is_meta for state in (first, *states))


@pytest.mark.parametrize("name", KINDS)
def test_features_need_no_float64_on_the_device(name):
    model, x = small(name).eval().to("meta"), torch.zeros(4, 3, 32, 32, device="meta")
    with Elsewhere():
        for t in (0,) if name == "addp" else (0, 0.3 if unified.MODELS[name].tokenizer else 50):
            noise = model.noise(torch.arange(4, device="meta"))
            assert all(m.is_meta for m in model.features(x, t, layers=list(model.layers), noise=noise))
        assert all(model.embed(x, pool=pool).is_meta for pool in model.pools)
        if hasattr(model, "reconstruct"):
            assert all(y.is_meta for y in model.reconstruct(x))


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
    assert probe.ridge_probe(there[0][None], there[1], there[0][None], there[3]) == [probe.ridge_probe(x, y, x, y)]
    assert probe.few_umd(*there, 3) == probe.few_umd(x, y, x, y, 3)
    assert probe.knn(*there) == probe.knn(x, y, x, y)


def test_copies_to_apples_devices_are_waited_for(monkeypatch):
    how, x = [], types.SimpleNamespace(to=lambda device, non_blocking: how.append(non_blocking))
    for device in ("cuda:1", torch.device("mps"), "cpu"):
        unified.to_device(x, device)
    assert how == [True, False, True]


def test_schedules_stay_on_the_cpu_in_float64():
    for name in ("umd", "adm"):
        abar = small(name).to("meta").alpha_bar
        assert abar.device.type == "cpu" and abar.dtype == torch.float64


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
        model = small(name, 0, "small" if name in ("mage", "mage-c", "addp") else "tiny")   # these have dropout
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


@pytest.mark.parametrize("name", KINDS)
def test_torch_itself_chooses_a_fused_kernel(name, attended):
    model = small(name).eval()
    model.features(some_pictures(2, 32), layers=list(model.layers))
    fused = torch.nn.attention.SDPBackend.FLASH_ATTENTION.value
    assert attended and all(torch._fused_sdp_choice(q, k, v) == fused for q, k, v, _ in attended)


@pytest.mark.parametrize("version, first", [("2.13.0", "CUDNN_ATTENTION"), ("2.9.1", "FLASH_ATTENTION")])
def test_hopper_takes_cudnns_attention_first_unless_it_would_round_the_dropout(version, first, monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(unified, "sdpa_kernel", lambda order, set_priority: [kernel.name for kernel in order])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    order = unified.attention_kernels()
    assert order[0] == first and sorted(order[:2]) == ["CUDNN_ATTENTION", "FLASH_ATTENTION"] and order[3:] == ["MATH"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert isinstance(unified.attention_kernels(), contextlib.nullcontext)


# bfloat16: where it ends, and who takes it.


@pytest.mark.parametrize("name", KINDS)
def test_pixels_are_float32_whatever_the_network_computes_in(name):
    model, made = small(name).eval(), []
    last = model.vqgan.decoder.conv_out if unified.MODELS[name].tokenizer else getattr(model, "to_pixels", None)
    (last or model.out[-1]).register_forward_hook(lambda layer, inputs, output: made.append(output.dtype))
    mask = torch.zeros(2, 32, 32, dtype=torch.bool)
    mask[0, :8, :8], mask[1, 4:20, 6:] = True, True
    with torch.autocast("cpu", torch.bfloat16):
        for hole in [{}] * model.generates + [dict(known=some_pictures(2, 32), mask=mask)]:
            x = [model.render(state) for state in model.sample_steps(2, steps=2, **hole)]
            assert {v.dtype for v in (*x, model.sample(2, steps=2, **hole))} == {torch.float32}
        if hasattr(model, "reconstruct"):
            assert {v.dtype for v in model.reconstruct(some_pictures(2, 32))} == {torch.float32}
    assert set(made) == {torch.float32}


@pytest.fixture
def gpu(monkeypatch):
    """gpu(7, 5): from now on there seems to be a GPU of this CUDA capability."""
    def pretend(*capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(unified, "pick_device", torch.device)
    return pretend


@pytest.mark.parametrize("capability, dtype", [((7, 0), "float32"), ((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_bfloat16_is_the_default_where_it_is_computed_in(capability, dtype, gpu, monkeypatch):
    import sample
    gpu(*capability)
    monkeypatch.setattr(unified, "join_processes", torch.device)
    monkeypatch.setattr(sample, "run", lambda cfg, device: settled.append(cfg.dtype))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())       # looks for the device
    for device, expected in (("cuda", dtype), ("cuda:1", dtype), ("cpu", "float32"), ("mps", "float32")):
        settled = [unified.default_dtype(device), train.settings(train.Config(device=device)).dtype,
                   probe.settle(probe.Config(run="", device=device)).dtype]
        monkeypatch.setattr(unified, "parse_flags", lambda cls, *_: cls(run="", device=device))
        sample.main()
        assert set(settled) == {expected}
    assert train.settings(train.Config(device="cuda", dtype="float32")).dtype == "float32"
    assert probe.settle(probe.Config(run="", device="cuda", dtype="float32")).dtype == "float32"


def test_a_probe_compiles_on_a_gpu_and_not_on_a_cpu(gpu):
    gpu(8, 0)
    for device, compile in (("cuda", True), ("cuda:1", True), ("cpu", False), ("mps", False)):
        assert probe.settle(probe.Config(run="", device=device)).compile == compile
    assert not probe.settle(probe.Config(run="", device="cuda", compile=False)).compile


def test_a_compiled_probe_finds_what_the_plain_one_does(graphs, monkeypatch):
    found, config = [], {"arch": unified.model_config("umd", "tiny", 32, 4)}
    data = unified.ImageTensor(*unified.draw_shapes(torch.arange(40), 32), list(unified.SHAPES), (1.0, 1.0))
    monkeypatch.setattr(unified, "load_model", lambda *_, **__: (unified.build(config["arch"]).eval(), config))
    monkeypatch.setattr(probe, "open_sets", lambda *_: ("", data, data))
    monkeypatch.setattr(probe, "report", lambda wanted, dataset, labels, results, *rest: found.append(results))
    for compile in (False, True):
        torch.manual_seed(0)
        probe.run(settings(head="knn", compile=compile), True)
        assert len(graphs) == compile                                   # one for all blocks, none for a single picture
    assert found[0] == found[1]


def test_the_head_of_finetuning_is_float32_beside_a_network_in_bfloat16(monkeypatch):
    model, seen = small("mage"), []

    def loss(logits, x, y):
        seen.append(logits(x))
        return seen[0].sum()
    monkeypatch.setattr(probe, "mixup_loss", loss)
    cfg = settings(head="finetune", dtype="bfloat16", batch_size=8, epochs=1, lr=1e-3)
    data = unified.ImageTensor((255 * some_pictures(8, 32)).byte(), torch.arange(8) % 2, ["a", "b"], (1.0, 1.0))
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


# ---------------------------------------------------------------------------------------------------------------------------
# Speed


def block_operations(n, d):
    """Of a block's forward pass over n tokens of width d: four projections, two layers of 4 d, and two products with the attention map."""
    return 24 * n * d ** 2 + 4 * n ** 2 * d


def mage_operations(C, depth, decoder, L=256, K=1024):
    D, decoder_depth, seen = decoder[0], decoder[1], 1 + L - math.ceil(L / 2)
    forward = depth * block_operations(seen, C) + 2 * seen * C * D + decoder_depth * block_operations(1 + L, D) + 2 * L * (D * C + C * K)
    return 3 * forward - 2 * L * C * K                                  # the table of words gets no gradient as output matrix


def umd_operations(D, depth, decoder_depth, L=256, p=4):
    clean, noised, patch = 4 + L // 4, 4 + int(L * 0.625), 2 * L * D * 3 * p * p
    blocks = sum(depth * block_operations(n, D) + decoder_depth * block_operations(1 + L, D) for n in (clean, noised)) / 2
    told = 2 * (depth + decoder_depth) * 6 * D * D + 2 * 4 * D * D + 2 * 2 * D * D
    return 3 * (blocks + told + 2 * patch) + 2 * patch - patch          # to_pixels has twice the channels; pixels get no gradient


@pytest.mark.parametrize("name, size, pixels, formula, published", [
    ("mage", "base", 256, mage_operations(768, 12, (768, 8)), 162.7e9),
    ("mage", "large", 256, mage_operations(1024, 24, (1024, 8)), 404.9e9),
    ("umd", "base", 64, umd_operations(768, 12, 4), 107.5e9),
])
def test_operations_are_those_of_the_formulas(name, size, pixels, formula, published):
    method = unified.MODELS[name]
    with torch.device("meta"):
        model = unified.build(unified.model_config(name, size, pixels, 16, unified.tokenizer_config("base", 16) if method.tokenizer else None))
        x = torch.zeros(2, 256, dtype=torch.long) if method.tokenizer else torch.zeros(2, 3, pixels, pixels)
    counted = train.step_operations(model, x) / 2
    assert counted == pytest.approx(formula, rel=0.01) and counted == pytest.approx(published, rel=0.03)
    if (name, size) == ("mage", "base"):                                # with the tokenizer's encoder in every step
        assert train.step_operations(model, torch.zeros(2, 3, 256, 256, device="meta")) / 2 - counted == pytest.approx(128.6e9, rel=0.01)


def test_the_benchmark_compares_with_the_plain_path(monkeypatch):
    monkeypatch.setattr(train, "SECONDS", 0.01)
    printed = script("train.py", "--benchmark", "--batch-size", 4, "--device", "cpu")
    assert "of the product" in printed and "plain path" in printed and "times as long" in printed
    losses = [float(line.split("loss")[1].split()[0]) for line in printed.splitlines() if "loss" in line and "every step" not in line]
    assert len(losses) == 2 and losses[0] == pytest.approx(losses[1], abs=2e-3)


@pytest.fixture
def graphs(monkeypatch):
    """What torch.compile has traced since; the traces run as they are, without a compiler. What it cannot trace whole raises."""
    made, compile = [], nn.Module.compile

    def run_as_it_is(graph, inputs):
        made.append(graph)
        return graph.forward
    monkeypatch.setattr(nn.Module, "compile", lambda module, **how: compile(module, backend=run_as_it_is, fullgraph=True, **how))
    torch._dynamo.reset()
    yield made
    torch._dynamo.reset()


def tiny(name):
    """A model of 32 x 32 pixels, 4 x 4 ids or patches, with compiled blocks and without."""
    tokenizer = unified.tokenizer_config("toy", 8, 128) if unified.MODELS[name].tokenizer else None
    model = unified.build(unified.model_config(name, "tiny", 32, 4, tokenizer))
    twin = copy.deepcopy(model)
    probe.compile_blocks(twin)
    return twin, model


@pytest.mark.parametrize("name", list(unified.MODELS))
def test_compiled_blocks_compute_the_same_loss(name, graphs):
    x, losses = some_pictures(8, 32).unflatten(0, (4, 2))[:, :unified.MODELS[name].views].squeeze(1), []
    for model in tiny(name):
        torch.manual_seed(0)
        losses.append(model(x)[0])
    assert graphs and losses[0].equal(losses[1])


def test_blocks_of_one_shape_are_compiled_once(graphs):
    model, _ = tiny("mage")
    for _ in range(2):
        model(some_ids(model))[0].backward()
    assert len(graphs) == 2                                             # for the encoder's blocks, which read half of the ids, and the decoder's
    model.vqgan.decode(torch.zeros(1, 4, 4, dtype=torch.long))
    assert len(graphs) == 2 + 4                                         # 4, 8, 16 and 32 pixels


def test_addps_decoder_is_compiled_once_for_any_number_of_tokens(graphs):
    model, _ = tiny("addp")
    for index in (0, 10, 30, 60):
        model(some_ids(model), index=index)
        first = len(graphs) if index == 0 else first
    assert len(graphs) == first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", list(unified.MODELS))
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
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):      # all but the slow one
        train_watched(tmp_path, model, method, "cuda", watches, size=64, dtype="bfloat16")
    torch.cuda.set_sync_debug_mode("default")
