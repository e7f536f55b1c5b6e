"""pytest -q tests/test_training.py      Both training scripts: losses,
schedule, a few real steps, resuming."""
import argparse
import contextlib
import copy
import functools
import json
import math
import signal
import subprocess
import sys
import time
from itertools import chain

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import runs
import sample
import train_gpt
import train_vq
import training
from conftest import ROOT, run_gpt, run_vq
from model import GPT, GPTConfig, load_gpt
from test_text import write_t5
from text import Classes, tiny_text_encoder, tiny_text_encoder_from
from runs import InputError, learning_rate, update_ema
from tokenizer import VQConfig, VQModel, evaluate, load_tokenizer
from training import Progress
from train_vq import (LPIPS, PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss,
                      load_lpips, restart_dead_codes)


@contextlib.contextmanager
def ctrl_c(module, step):
    """The training loop of `module` gets a Ctrl-C before this step, and ends as it should."""
    class Interrupted(Progress):
        def running(self):
            if self.step == step:
                signal.raise_signal(signal.SIGINT)
            return super().running()

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="--resume"):
        patch.setattr(module, "Progress", Interrupted)
        yield


# losses

@pytest.mark.parametrize("kind", ["hinge", "vanilla", "non-saturating"])
def test_a_perfect_discriminator_scores_below_a_random_one_and_a_wrong_one_above(kind):
    sure, unsure = torch.full((4, 1, 2, 2), 5.0), torch.zeros(4, 1, 2, 2)
    perfect, guess, wrong = (discriminator_loss(*pair, kind) for pair in ((sure, -sure), (unsure, unsure),
                                                                          (-sure, sure)))
    assert perfect < guess < wrong
    assert generator_loss(sure, kind) < generator_loss(unsure, kind) < generator_loss(-sure, kind)


def test_adversarial_losses_have_their_closed_forms_at_zero():
    zero = torch.zeros(2, 1, 3, 3)
    assert discriminator_loss(zero, zero, "hinge").item() == 1
    assert discriminator_loss(zero, zero, "vanilla").item() == pytest.approx(math.log(2))
    assert generator_loss(zero, "non-saturating").item() == pytest.approx(math.log(2))
    assert generator_loss(zero, "hinge").item() == 0


def test_the_discriminator_learns_to_tell_two_kinds_of_patches_apart():
    disc, real, fake = PatchDiscriminator(width=16), torch.rand(8, 3, 32, 32), -torch.rand(8, 3, 32, 32)
    optimizer = torch.optim.Adam(disc.parameters(), lr=1e-3)
    for _ in range(30):
        loss = discriminator_loss(disc(real), disc(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 and disc(real).ndim == 4


def test_the_adaptive_weight_makes_both_gradients_equally_long():
    layer = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    a, b = (layer * torch.tensor([3.0, 4.0])).sum(), (layer * torch.tensor([0.0, 0.5])).sum()
    assert adaptive_weight(a, b, layer).item() == pytest.approx(5 / 0.5, rel=1e-3)


@pytest.fixture
def lpips_files(tmp_path):
    """Random weights in the layout of the two public files, classifier included."""
    widths = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256),
              14: (256, 256),
              17: (256, 512), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512)}
    vgg = {"classifier.0.weight": torch.zeros(2, 2)}
    for i, (c_in, c_out) in widths.items():
        vgg[f"features.{i}.weight"] = torch.randn(c_out, c_in, 3, 3) / (3 * c_in ** 0.5)
        vgg[f"features.{i}.bias"] = torch.randn(c_out) / 10
    lins = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}
    torch.save(vgg, tmp_path / "vgg16.pth")
    torch.save(lins, tmp_path / "lpips.pth")
    return tmp_path / "vgg16.pth", tmp_path / "lpips.pth"


def test_lpips_follows_its_formula_is_zero_for_equal_pictures_and_frozen(lpips_files):
    lpips = LPIPS(*lpips_files)
    a, b = (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_(), torch.rand(2, 3, 32, 32) * 2 - 1
    distance = lpips(a, b)
    assert distance.shape == (2, 1, 1, 1) and distance.min() > 0 and lpips(b, b).abs().max() == 0
    distance.sum().backward()
    assert a.grad.abs().sum() > 0 and not lpips.training
    assert not any(p.requires_grad for p in lpips.parameters())

    vgg, lins = torch.load(lpips_files[0]), torch.load(lpips_files[1])
    mean, deviation = torch.tensor([[-.030, -.088, -.188], [.458, .448, .450]]).view(2, 3, 1, 1)
    scale = lambda x: (x - mean) / deviation
    features, total, tap = [scale(a.detach()), scale(b)], 0, 0
    for stage in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)):
        for i in stage:
            features = [torch.relu(torch.conv2d(x, vgg[f"features.{i}.weight"], vgg[f"features.{i}.bias"],
                                                padding=1))
                        for x in features]
        unit = [x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for x in features]
        total = total + ((unit[0] - unit[1]) ** 2 * lins[f"lin{tap}.model.1.weight"]).sum(1).mean((1, 2))
        features, tap = [torch.max_pool2d(x, 2) for x in features], tap + 1
    torch.testing.assert_close(distance.detach().flatten(), total)


def test_lpips_has_a_finite_gradient_where_all_channels_are_zero(lpips_files):
    lpips = LPIPS(*lpips_files)
    lpips.features[0].bias.data.fill_(-100)                      # the first ReLU lets nothing pass
    a = (torch.rand(1, 3, 32, 32) * 2 - 1).requires_grad_()
    lpips(a, torch.zeros_like(a)).sum().backward()
    assert a.grad.isfinite().all()
    x = torch.zeros(1, 2, 1, 1, requires_grad=True)              # and without a ReLU in front of it
    F.normalize(x, eps=1e-10).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("flags", [[], ["--resume"], ["--vgg", "typo.pth"]])
def test_lpips_that_is_asked_for_but_cannot_be_had_ends_the_run_at_once(tmp_path, monkeypatch, flags):
    def missing(group, name, data_dir=None):
        raise InputError(f"get {name}")
    if "--resume" in flags:
        run_vq(tmp_path, "--steps", "1", "--lpips-weight", "0")
        state = torch.load(tmp_path / "vq.pt", weights_only=True)
        torch.save({**state, "args": {**state["args"], "lpips_weight": 1.0}}, tmp_path / "vq.pt")
    monkeypatch.setattr(train_vq, "find_file", missing)
    with pytest.raises(InputError, match="vgg16-397923af.pth|typo.pth|vgg.pth"):
        run_vq(tmp_path, "--steps", "2", "--lpips-weight", "1", *flags)
    assert load_lpips(train_vq.get_args([]), "cpu") is None      # not asked for: no file is looked for


# parts

def test_the_learning_rate_warms_up_then_falls_to_its_final_share():
    rate = lambda step, progress: learning_rate(2.0, step, progress, warmup=10, final=0.1)
    assert rate(0, 0) == pytest.approx(0.2) and rate(9, 0.01) == pytest.approx(2.0)
    assert rate(10, 0.5) == pytest.approx(1.1) and rate(99, 1.0) == pytest.approx(0.2)
    assert learning_rate(2.0, 50, 0.7, warmup=0, final=1.0) == 2.0


def test_the_average_follows_the_weights_at_the_given_rate():
    average, model = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = [0.9 * a + 0.1 * m for a, m in zip(average.parameters(), model.parameters())]
    update_ema(average, model, 0.9, step=10_000)
    for a, e in zip(average.parameters(), expected):
        torch.testing.assert_close(a.data, e.data)


def test_only_unused_codes_are_restarted_and_they_land_on_latents():
    vq = VQModel(VQConfig(codebook_size=64, ch=32, ch_mult=(1, 2), z_channels=32))
    before, counts = vq.quantize.embedding.weight.clone(), torch.ones(64)
    counts[[3, 9]] = 0
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    restart_dead_codes(vq, counts, images)
    changed = (vq.quantize.embedding.weight != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == [3, 9]
    z = torch.nn.functional.normalize(vq.encode(images).flatten(2), dim=1)
    for code in vq.quantize.embedding.weight[changed]:
        assert (z - code[:, None]).abs().amax(dim=1).min() < 1e-5


def test_psnr_usage_and_perplexity_have_their_definitions():
    class Half(VQModel):
        """Shifts every pixel by 2 of 255 and uses two codes equally often."""
        def tokenize(self, images):
            self.images = images
            return torch.tensor([[0, 1]]).repeat(len(images), 1)

        def detokenize(self, tokens, wait):
            return self.images[:len(tokens)] + 2 / 127.5

    class Grey:
        def __len__(self):
            return 3

        def passes(self, batch_size):
            yield torch.full((3, 1, 3, 8, 8), 100, dtype=torch.uint8), None

    psnr, usage, perplexity = evaluate(Half(VQConfig(codebook_size=8, ch=32, ch_mult=(1,))), Grey(), "cpu", 3)
    assert psnr == pytest.approx(20 * math.log10(255 / 2), abs=1e-3)
    assert usage == 2 / 8 and perplexity == pytest.approx(2)


def test_decay_touches_matrices_only_and_every_parameter_is_trained():
    gpt = load_gpt_config()
    decayed, plain = train_gpt.parameter_groups(list(gpt.named_parameters()), 0.05)
    assert all(p.dim() >= 2 for p in decayed["params"]) and all(p.dim() == 1 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(gpt.parameters()))
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0)


@pytest.mark.parametrize("flags, layers_by_muon", [([], True), (["--optimizer", "adamw"], False)])
def test_muon_moves_the_matrices_of_the_layers_and_adamw_all_else(flags, layers_by_muon):
    nets = torch.nn.ModuleDict({"gpt": load_gpt_config(), "text": tiny_text_encoder(["a red star"])})
    optimizers = train_gpt.prepare_optimizers(nets, train_gpt.get_args(flags))
    owner = {id(weight): type(optimizer).__name__ for optimizer in optimizers
             for group in optimizer.param_groups for weight in group["params"]}
    assert len(owner) == len(list(nets.parameters()))
    for name, weight in nets.named_parameters():
        of_layer = name.startswith("gpt.layers.") and weight.dim() == 2
        assert owner[id(weight)] == ("Muon" if layers_by_muon and of_layer else "AdamW"), name


def test_muons_step_is_nearly_as_long_in_every_direction_whatever_the_gradient():
    """U V^T of the gradient U S V^T, times the rate and match_rms_adamw's 0.2 sqrt(longer side)."""
    gpt = load_gpt_config()
    nets = torch.nn.ModuleDict({"gpt": gpt})
    muon, _ = train_gpt.prepare_optimizers(nets, train_gpt.get_args(["--weight-decay", "0"]))
    weight = gpt.layers[0].attention.wo.weight                   # (32, 32)
    u, _, v = torch.linalg.svd(torch.randn(32, 32))
    weight.grad, before = u @ torch.diag(torch.logspace(0, -1, 32)) @ v, weight.detach().clone()
    muon.param_groups[0]["lr"] = 1e-3
    muon.step()
    step = (before - weight.detach()) / (1e-3 * 0.2 * 32 ** 0.5)
    sizes = (u.T @ step @ v.T).diagonal()
    assert sizes.min() > 0.5 and sizes.max() < 1.3               # the gradient's: from 1 down to 0.1
    assert torch.nn.functional.cosine_similarity(step.flatten(), (u @ v).flatten(), dim=0) > 0.95


def load_gpt_config():
    from model import GPT, GPTConfig
    return GPT(GPTConfig(dim=32, n_layer=2, n_head=2, vocab_size=16, block_size=4))


def two_gpts():
    config = GPTConfig(dim=32, n_layer=1, n_head=2, vocab_size=16, block_size=4, num_classes=5)
    gpts = GPT(config).eval(), GPT(config).eval()
    for weight in chain(*(gpt.parameters() for gpt in gpts)):
        torch.nn.init.normal_(weight, std=0.3)
    return gpts


def test_the_contrast_of_a_gpt_with_itself_has_its_closed_form():
    gpt, tokens = two_gpts()[0], torch.randint(16, (4, 4))
    args = argparse.Namespace(class_dropout=0.0, cca_beta=0.02, cca_lambda=10.0)
    for classes, weight in (([0, 1, 2, 3], 1.0), ([2, 2, 2, 2], 0.1), ([0, 0, 1, 2], (3 + 0.1) / 4)):
        loss = train_gpt.contrast(gpt, gpt, tokens, torch.tensor(classes), args)
        assert loss.item() == pytest.approx(math.log(2) * (0.1 + weight), abs=1e-6)
    args.class_dropout = 1.0                                     # without a class nothing is wrong
    loss = train_gpt.contrast(gpt, gpt, tokens, torch.tensor([0, 1, 2, 3]), args)
    assert loss.item() == pytest.approx(math.log(2) * 0.2, abs=1e-6)


def test_the_contrast_is_that_of_the_formula():
    (gpt, reference), tokens, cond = two_gpts(), torch.randint(16, (3, 4)), torch.tensor([0, 1, 2])
    args = argparse.Namespace(class_dropout=0.0, cca_beta=0.5, cca_lambda=7.0)
    logits = lambda net, picture, c: net(tokens[picture:picture + 1, :-1], torch.tensor([c]))[0][0]
    log_p = lambda *what: logits(*what).log_softmax(-1)[range(4), tokens[what[1]]].sum()
    expected = 0
    for picture, (right, wrong) in enumerate(((0, 2), (1, 0), (2, 1))):
        r, other = (log_p(gpt, picture, c) - log_p(reference, picture, c) for c in (right, wrong))
        expected -= (torch.sigmoid(0.5 * r).log() + 7 * torch.sigmoid(-0.5 * other).log()) / 7 / 3
    loss = train_gpt.contrast(gpt, reference, tokens, cond, args)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(weight.grad is None for weight in reference.parameters())


def test_steps_along_the_contrast_make_pictures_likelier_with_their_class_than_with_others():
    gpt, _ = two_gpts()
    reference, tokens, cond = copy.deepcopy(gpt), torch.randint(16, (5, 4)), torch.arange(5)
    args = argparse.Namespace(class_dropout=0.0, cca_beta=0.1, cca_lambda=10.0)
    gap = lambda: (train_gpt.log_likelihood(gpt, tokens, cond) - train_gpt.log_likelihood(
        gpt, tokens, cond.roll(1))).mean().item()
    before, optimizer = gap(), torch.optim.SGD(gpt.parameters(), lr=1.0)
    for _ in range(20):
        train_gpt.contrast(gpt, reference, tokens, cond, args).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert gap() > before + 1


def test_guidance_is_folded_into_a_copy_of_the_reference_also_in_a_resumed_run(trained, tmp_path):
    flags = ["--vq", str(trained / "vq.pt"), "--cca", str(trained / "gpt.pt"), "--optimizer", "adamw",
             "--steps", "4"]
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole = run_gpt(tmp_path / "a", *flags)
    reference = torch.load(trained / "gpt.pt", weights_only=True)["model"]
    assert whole["model"].keys() == reference.keys()
    assert not torch.equal(whole["model"]["output.weight"], reference["output.weight"])
    with ctrl_c(train_gpt, step=2):
        run_gpt(tmp_path / "b", *flags)
    resumed = run_gpt(tmp_path / "b", *flags, "--resume")
    assert all(torch.equal(resumed["model"][name], weight) for name, weight in whole["model"].items())
    with pytest.raises(InputError, match="--batch-size has to be at least 2"):
        run_gpt(tmp_path / "a", *flags, "--batch-size", "1")


def test_a_checkpoint_from_before_an_order_could_be_chosen_is_resumed(trained, tmp_path):
    flags = ["--vq", str(trained / "vq.pt"), "--steps"]
    state = run_gpt(tmp_path, *flags, "1")
    del state["config"]["order"]
    torch.save(state, tmp_path / "gpt.pt")
    assert run_gpt(tmp_path, *flags, "2", "--resume")["step"] == 2


def test_a_gpt_that_draws_by_neighbours_is_trained_resumed_and_starts_another(trained, tmp_path):
    flags = ["--vq", str(trained / "vq.pt"), "--order", "neighbours", "--steps", "2"]
    state = run_gpt(tmp_path, *flags)
    assert state["config"]["order"] == "neighbours" and "lower.weight" in state["model"]
    run_gpt(tmp_path, *flags[:-1], "3", "--resume")
    base = str(tmp_path / "gpt.pt")
    (tmp_path / "next").mkdir()
    state = run_gpt(tmp_path / "next", "--vq", str(trained / "vq.pt"), "--init", base, "--steps", "1")
    assert state["config"]["order"] == "neighbours"


def test_batches_of_codes_pick_a_random_crop_of_each_picture_that_could_be_read():
    codes = np.arange(7 * 4 * 3).reshape(7, 4, 3).astype(np.uint16)
    labels = np.array([0, 1, 2, -1, 4, 5, 6])
    classes, kept = Classes(list("abcdefg"), labels), np.flatnonzero(labels >= 0)
    batches = train_gpt.code_batches(codes, kept, classes, 6, seed=0, device=torch.device("cpu"))
    crops = set()
    for _ in range(10):
        tokens, rows = next(batches)
        cond, cond_mask = classes(rows, None, "cpu")
        assert tokens.dtype == torch.int64 and sorted(cond.tolist()) == kept.tolist() and cond_mask is None
        for row, label in zip(tokens.tolist(), cond.tolist()):
            assert row in codes[label].tolist()
            crops.add(codes[label].tolist().index(row))
    assert crops == {0, 1, 2, 3}


# whole runs

def test_both_scripts_leave_a_checkpoint_a_log_and_a_picture(trained):
    for name, load in (("vq", load_tokenizer), ("gpt", load_gpt)):
        model = load(trained / f"{name}.pt")
        assert not model.training
        assert Image.open(trained / f"{name}.png").width > 100
        lines = [json.loads(line) for line in (trained / f"{name}.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "lr" in line] == [1, 2]
    vq = load_tokenizer(trained / "vq.pt")
    assert load_gpt(trained / "gpt.pt").config.vocab_size == vq.config.codebook_size
    first = json.loads((trained / "vq.jsonl").read_text().splitlines()[0])
    assert {"psnr", "usage", "l2", "codebook", "commitment"} <= set(first)
    assert not list(trained.glob("*.partial"))


def test_the_quick_start_gives_like_codes_like_embeddings_and_blocks_that_change_nothing():
    codes = F.normalize(torch.randn(256, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    gpt = GPT(GPTConfig(n_layer=2, n_head=4, dim=256, vocab_size=256, block_size=16, num_classes=3)).eval()
    train_gpt.quick_start(gpt.requires_grad_(False), codes)
    cosines = lambda x: (F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).T).flatten()
    both = torch.stack([cosines(codes), cosines(gpt.tok_embeddings.weight)])
    assert torch.corrcoef(both)[0, 1] > 0.8
    assert gpt.tok_embeddings.weight.std() == pytest.approx((0.5 ** 2 + 0.25 ** 2) ** 0.5, rel=0.1)
    x = torch.randn(2, 5, 256)
    assert torch.equal(gpt.layers[1](x, gpt.rope[:5]), x)
    assert gpt.layers[0].attention.wqkv(gpt.norm(x)).std() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("script, length", [("vq", 8), ("gpt", 4)])
def test_an_interrupted_and_resumed_run_equals_one_that_was_not(trained, tmp_path, script, length):
    if script == "vq":
        run = lambda folder, *flags: run_vq(folder, "--steps", "8", "--disc-start", "1", "--restart-every",
                                            "3", *flags)
    else:
        run = lambda folder, *flags: run_gpt(folder, "--steps", "4", "--dropout", "0.1", "--vq",
                                             str(trained / "vq.pt"), *flags)
    module = {"vq": train_vq, "gpt": train_gpt}[script]
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole = run(tmp_path / "a")
    with ctrl_c(module, step=length // 2):
        run(tmp_path / "b")
    assert torch.load(tmp_path / "b" / f"{script}.pt", weights_only=True)["step"] == length // 2
    resumed = run(tmp_path / "b", "--resume")
    assert resumed["step"] == whole["step"] == length
    for part in ("model", "raw"):
        for name in whole[part]:
            assert torch.equal(whole[part][name], resumed[part][name]), (part, name)


def test_the_gpt_takes_the_image_size_from_its_tokenizer(tmp_path):
    run_vq(tmp_path, "--steps", "1", "--image-size", "48")
    assert run_gpt(tmp_path, "--steps", "1")["config"]["block_size"] == 144


def test_a_new_run_keeps_the_checkpoint_that_was_there(tmp_path):
    first = run_vq(tmp_path, "--steps", "1")
    run_vq(tmp_path, "--steps", "1", "--seed", "5")
    kept = torch.load(tmp_path / "vq.previous.pt", weights_only=True)
    assert torch.equal(kept["model"]["quant_conv.weight"], first["model"]["quant_conv.weight"])


def test_minutes_end_a_run_in_time(tmp_path):
    state = run_vq(tmp_path, "--minutes", "0.03")
    assert state["step"] >= 1 and 1.8 <= state["seconds"] < 10


def test_every_loss_and_option_of_the_tokenizer_runs(tmp_path, lpips_files):
    vgg, lin = (str(path) for path in lpips_files)
    state = run_vq(tmp_path, "--steps", "2", "--lpips-weight", "1", "--vgg", vgg, "--lpips", lin,
                   "--disc-start", "0", "--disc-adaptive", "--disc-loss", "non-saturating",
                   "--entropy-weight", "0.1", "--codebook-size", "1024", "--ema", "0", "--image-size", "64")
    first = json.loads((tmp_path / "vq.jsonl").open().readline())
    assert {"lpips", "gan", "disc", "entropy"} <= set(first)
    assert state["model"]["quantize.embedding.weight"].shape == (1024, 8)


def test_a_gpt_with_every_option_runs(trained, tmp_path):
    state = run_gpt(tmp_path, "--steps", "2", "--vq", str(trained / "vq.pt"), "--grad-accum", "2",
                    "--drop-path", "0.1",
                    "--class-dropout", "0.5", "--weight-decay", "0", "--ema", "0", "--cfg-scale", "3")
    assert state["config"]["drop_path"] == 0.1
    with pytest.raises(InputError, match="drop_path"):
        run_gpt(tmp_path, "--steps", "1", "--vq", str(trained / "vq.pt"), "--drop-path", "1")


# text

@pytest.fixture(scope="module")
def texts(trained):
    """The tokenizer of `trained` and a text-conditional GPT after 4 steps."""
    run_gpt(trained, "--cond", "text", "--steps", "4", "--out", str(trained / "text.pt"))
    return trained


def test_captions_and_their_encoder_are_trained_and_saved_in_the_checkpoint(texts):
    state = torch.load(texts / "text.pt", weights_only=True)
    assert state["config"]["model_type"] == "t2i" and state["text_encoder"]["length"] == 13
    text = tiny_text_encoder_from(state["text_encoder"], "text.pt")
    torch.manual_seed(0)
    assert state["config"]["cls_token_num"] == 13 and {"red", "above", "navy"} <= set(text.tokenizer.words)
    start = tiny_text_encoder([" ".join(text.tokenizer.words)]).t5.state_dict()
    moved = [name for name, w in text.t5.state_dict().items() if not torch.equal(w, start[name])]
    assert len(moved) == len(start)
    assert (texts / "text.png").exists()


@pytest.mark.parametrize("flags", [["--cond", "text"], ["--cond", "text", "--ema", "0"]])
def test_a_resumed_text_run_equals_one_that_was_not_interrupted(texts, tmp_path, flags):
    flags = [*flags, "--vq", str(texts / "vq.pt"), "--steps"]
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole = run_gpt(tmp_path / "a", *flags, "4")
    with ctrl_c(train_gpt, step=2):
        run_gpt(tmp_path / "b", *flags, "4")
    resumed = run_gpt(tmp_path / "b", *flags, "4", "--resume")
    assert resumed["step"] == whole["step"] == 4
    for a, b in ((whole["raw"], resumed["raw"]), (whole["model"], resumed["model"]),
                 (whole["text_encoder"]["model"], resumed["text_encoder"]["model"])):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_cached_features_of_a_frozen_encoder_train_like_live_ones(texts, tmp_path):
    (tmp_path / "t5").mkdir()
    write_t5(tmp_path / "t5")
    learnt = []                                                  # what reads the features, after training
    for mode in (["--lr", "1e-12"], [], ["--live-features"]):
        folder = tmp_path / f"run{len(learnt)}"
        folder.mkdir()
        state = run_gpt(folder, "--cond", "text", "--vq", str(texts / "vq.pt"), "--steps", "6",
                        "--warmup", "0", "--text-length", "10", "--text-encoder", str(tmp_path / "t5"), *mode)
        assert state["config"]["caption_dim"] == 24 and state["config"]["cls_token_num"] == 10
        assert "text_encoder" not in state
        learnt.append(state["raw"]["gpt.cls_embedding.cap_proj.fc1.weight"].flatten())
    start, cached, live = learnt
    assert torch.cosine_similarity(cached - start, live - start, dim=0) > 0.9
    with pytest.raises(InputError, match="reads 13 tokens of width 192, the encoder gives 13 of width 24"):
        run_gpt(tmp_path, "--cond", "text", "--vq", str(texts / "vq.pt"), "--init", str(texts / "text.pt"),
                "--text-encoder", str(tmp_path / "t5"))


def test_the_second_stage_starts_from_the_first_at_another_image_size(texts, tmp_path):
    first = torch.load(texts / "text.pt", weights_only=True)
    flags = ["--cond", "text", "--vq", str(texts / "vq.pt"), "--init", str(texts / "text.pt")]
    state = run_gpt(tmp_path, *flags, "--image-size", "48", "--steps", "1", "--lr", "1e-12", "--ema", "0")
    assert first["config"]["block_size"] == 64 and state["config"]["block_size"] == 144
    for name, weight in first["model"].items():
        assert torch.allclose(state["model"][name], weight, atol=1e-6), name
    assert state["text_encoder"]["words"] == first["text_encoder"]["words"]
    with pytest.raises(InputError, match="does not fit"):
        run_gpt(tmp_path, "--vq", str(texts / "vq.pt"), "--init", str(texts / "text.pt"), "--steps", "1")


def test_captioned_files_train_end_to_end(trained, tmp_path):
    (tmp_path / "set").mkdir()
    for i in range(8):
        Image.new("RGB", (32, 32), (30 * i, 0, 0)).save(tmp_path / "set" / f"{i}.png")
        (tmp_path / "set" / f"{i}.txt").write_text(f"number {i}\nthe picture that has the number {i}")
    state = run_gpt(tmp_path, "--vq", str(trained / "vq.pt"), "--data", str(tmp_path / "set"), "--cond",
                    "text", "--steps", "2")
    assert "picture" in state["text_encoder"]["words"]


@pytest.mark.parametrize("flags, crops", [([], 2), (["--no-flip"], 1), (["--flip"], 2)])
def test_mirror_images_are_used_unless_told_otherwise(trained, tmp_path, flags, crops):
    for i, kind in enumerate("bd" * 5):
        (tmp_path / "set" / kind).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (30 * i, 0, 0)).save(tmp_path / "set" / kind / f"{i}.png")
    flags = ["--vq", str(trained / "vq.pt"), "--data", str(tmp_path / "set"), "--steps", "1", *flags]
    run_gpt(tmp_path, *flags)
    folders = list((tmp_path / "codes").iterdir())
    assert len(folders) == 2 and all(data.read_codes(folder)[0].shape[1] == crops for folder in folders)
    with pytest.raises(InputError, match="--flip .* instead of"):
        run_gpt(tmp_path, *flags, "--resume", "--no-flip" if crops == 2 else "--flip")


def test_codes_that_were_extracted_before_are_used_and_have_to_fit(trained, tmp_path):
    extract = ["extract", "--data", "shapes", "--limit", "20", "--cond", "text", "--vq",
               str(trained / "vq.pt")]
    data.main(data.get_args([*extract, "--out", str(tmp_path / "codes")]))
    for cond in ("class", "text"):
        run_gpt(tmp_path, "--vq", str(trained / "vq.pt"), "--codes", str(tmp_path / "codes"), "--steps", "1",
                "--cond", cond)
    # Had it tokenized again, a folder of its own would lie there, beside --out.
    assert {path.name for path in (tmp_path / "codes").iterdir()} == {"train", "test"}
    run_vq(tmp_path, "--steps", "1", "--seed", "9")
    with pytest.raises(InputError, match="do not belong together"):
        run_gpt(tmp_path, "--codes", str(tmp_path / "codes"), "--steps", "1")


def test_a_tokenizer_and_a_gpt_train_from_the_weights_of_others(trained, tmp_path):
    first = torch.load(trained / "vq.pt", weights_only=True)
    state = run_vq(tmp_path, "--init", str(trained / "vq.pt"), "--steps", "1", "--lr", "1e-12", "--ema", "0",
                   "--restart-every", "0")
    assert all(torch.allclose(state["model"][name], w, atol=1e-6) for name, w in first["model"].items())
    first = torch.load(trained / "gpt.pt", weights_only=True)
    state = run_gpt(tmp_path, "--init", str(trained / "gpt.pt"), "--vq", str(trained / "vq.pt"),
                    "--steps", "1", "--lr", "1e-12", "--ema", "0")
    assert all(torch.allclose(state["model"][name], w, atol=1e-6) for name, w in first["model"].items())


def test_a_resumed_run_on_a_folder_equals_one_that_was_not_interrupted(tmp_path):
    for i in range(12):
        pixels = np.random.default_rng(i).integers(256, size=(40, 40, 3)).astype(np.uint8)
        (tmp_path / "set").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "set" / f"{i}.png")
    flags = ["--data", str(tmp_path / "set"), "--batch-size", "4", "--restart-every", "1", "--steps"]
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole = run_vq(tmp_path / "a", *flags, "4")
    with ctrl_c(train_vq, step=2):
        run_vq(tmp_path / "b", *flags, "4")
    resumed = run_vq(tmp_path / "b", *flags, "4", "--resume")
    assert all(torch.equal(w, resumed["raw"][name]) for name, w in whole["raw"].items())


def test_small_pictures_can_have_an_adversary_too(tmp_path):
    run_vq(tmp_path, "--steps", "1", "--image-size", "16", "--disc-start", "0")
    for size in (8, 12, 16, 20, 24, 28, 32, 256):
        assert PatchDiscriminator(size).eval()(torch.zeros(1, 3, size, size)).numel() >= 1


@pytest.mark.cuda
def test_both_scripts_train_and_resume_on_cuda(tmp_path):
    for run, flags in ((run_vq, ["--disc-start", "0"]), (run_gpt, []), (run_gpt, ["--cond", "text"])):
        run(tmp_path, "--device", "cuda", "--steps", "2", *flags)
        assert run(tmp_path, "--device", "cuda", "--steps", "4", "--resume", *flags)["step"] == 4


# wrong input: one line, exit status not 0, nothing damaged

def test_wrong_input_is_one_clear_line_and_not_a_traceback(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "junk.pt").write_bytes(b"junk")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    models = ["--gpt", trained / "gpt.pt", "--vq", trained / "vq.pt"]
    for module, flags, expected in [
        (train_vq, ["--data", "nonsense"], "nonsense"),
        (train_vq, ["--data", tmp_path / "empty"], "no pictures"),
        (train_vq, ["--codebook-size", "70000"], "65,536"),
        (train_vq, ["--steps", "0"], "not above zero"),
        (train_vq, ["--lr", "nan"], "not above zero"),
        (train_vq, ["--image-size", "30"], "multiple of 4"),
        (train_vq, ["--resume", "--out", tmp_path / "none.pt"], "does not exist"),
        (train_vq, ["--device", "warp"], "--device warp"),
        (train_vq, ["--out", tmp_path / "empty"], "is a folder"),
        (train_vq, ["--steps", "1", "--out", "/proc/none/vq.pt"], "/proc/none"),
        (train_gpt, ["--seed", "-1"], "not 0 or more"),
        (train_gpt, ["--dropout", "1.5"], "between 0 and 1"),
        (train_gpt, ["--resume", "--out", trained / "vq.pt"], "not written by this script"),
        (train_gpt, ["--vq", trained / "vq.pt", "--data", "mnist", "--cond", "text"], "no captions"),
        (train_gpt, ["--vq", tmp_path / "junk.pt"], "junk.pt"),
        (train_gpt, ["--order", "spiral"], "spiral"),
        (train_gpt, ["--vq", trained / "vq.pt", "--cca", tmp_path / "none.pt"], "none.pt does not exist"),
        (train_gpt, ["--cca", trained / "gpt.pt", "--init", trained / "gpt.pt"], "not allowed with"),
        (train_gpt, ["--vq", trained / "vq.pt", "--cca", trained / "gpt.pt", "--cond", "text"],
         "for classes"),
        (train_gpt, ["--vq", trained / "vq.pt", "--cca", trained / "gpt.pt", "--out", trained / "gpt.pt"],
         "would overwrite"),
        (sample, [*models, "--cfg-schedule", "steep"], "steep"),
        (sample, [*models, "--jacobi", "0"], "not above zero"),
        (sample, [*models, "--jacobi", "4", "--compile"], "one token at a time"),
        (train_gpt, ["--vq", trained / "gpt.pt"], "not a tokenizer"),
        (sample, [*models, "--classes", "10"], "0 to 9"),
        (sample, ["--temperature", "nan"], "not 0 or more"),
        (sample, ["--cfg-interval", "-5"], "not -1 or more"),
        (sample, ["--gpt", trained / "vq.pt", "--vq", trained / "vq.pt"], "not a GPT"),
    ]:
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
        with pytest.raises(SystemExit) as end:
            runs.run(module.main, module.get_args)
        told = capsys.readouterr().err.strip().splitlines()      # argparse prints two lines itself
        told += end.value.code.splitlines() if isinstance(end.value.code, str) else []
        assert end.value.code != 0 and "error" in told[-1] and expected in told[-1], (flags, told)
        assert len(told) == 1 + (" [flags]" in told[0]), (flags, told)


def test_a_command_ends_with_one_line_and_exit_status_1(tmp_path):
    command = [sys.executable, ROOT / "train_vq.py", "--data", "nonsense"]
    result = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
    assert result.returncode == 1 and result.stderr.startswith("error: --data nonsense")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("flags", [["--codebook-size", "32"], ["--batch-size", "4"], ["--lr", "0.001"],
                                   ["--lpips-weight", "0.5"], ["--ema", "0"], ["--cond", "text"]])
def test_resuming_with_other_settings_names_the_flag_and_changes_nothing(tmp_path, flags):
    run_vq(tmp_path, "--steps", "1")
    before = (tmp_path / "vq.pt").read_bytes()
    with pytest.raises(InputError, match=f"other settings, {flags[0]} .* instead of {flags[1]}"):
        run_vq(tmp_path, "--steps", "2", "--resume", *flags)
    assert (tmp_path / "vq.pt").read_bytes() == before


# what a run must not do

@contextlib.contextmanager
def poisoned(module, step):
    """The numbers of this step of the training loop of `module` are NaN."""
    class Poisoned(Progress):
        def count(self, numbers):
            bad = torch.tensor(math.nan if self.step == step - 1 else 0.0)
            super().count({name: value + bad for name, value in numbers.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Progress", Poisoned)
        yield


@pytest.mark.parametrize("script", ["vq", "gpt"])
def test_a_run_that_has_become_nan_ends_names_the_step_and_keeps_the_last_good_checkpoint(trained, tmp_path,
                                                                                            script):
    run, module = {"vq": (run_vq, train_vq), "gpt": (run_gpt, train_gpt)}[script]
    flags = ["--steps", "30", "--eval-every", "4", "--log-every", "5"]
    flags += ["--vq", str(trained / "vq.pt")] if script == "gpt" else []
    with poisoned(module, step=7), pytest.raises(InputError, match="step 7: the loss or its gradient is NaN"):
        run(tmp_path, *flags)
    state = torch.load(tmp_path / f"{script}.pt", weights_only=True)
    assert state["step"] == 4 and all(weight.isfinite().all() for weight in state["model"].values())


def test_a_learning_rate_that_is_far_too_high_ends_in_one_line_also_with_restarts(tmp_path):
    with pytest.raises(InputError, match=r"step \d+: the loss"):
        run_vq(tmp_path, "--steps", "40", "--lr", "1e10", "--warmup", "0", "--restart-every", "1",
               "--eval-every", "100", "--log-every", "50")
    assert not (tmp_path / "vq.pt").exists()


def test_the_log_tells_how_long_the_process_waited_for_data(tmp_path, monkeypatch):
    batches = train_gpt.code_batches
    monkeypatch.setattr(train_gpt, "code_batches", lambda *args: (
        time.sleep(0.5) or batch for batch in batches(*args)))
    run_vq(tmp_path, "--steps", "1")
    run_gpt(tmp_path, "--steps", "2")
    for line in (tmp_path / "gpt.jsonl").read_text().splitlines()[:2]:
        line = json.loads(line)
        seconds = line["data_wait"] * 8 * 64 / line["tokens_per_second"]
        assert 0.5 <= seconds < 0.9


def test_a_run_that_dies_before_its_first_save_leaves_the_old_checkpoint_and_the_old_log(tmp_path):
    run_vq(tmp_path, "--steps", "2")
    before = {name: (tmp_path / name).read_bytes() for name in ("vq.pt", "vq.jsonl")}
    with poisoned(train_vq, step=1), pytest.raises(InputError):
        run_vq(tmp_path, "--steps", "2", "--seed", "1")
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    run_vq(tmp_path, "--steps", "3", "--seed", "1")
    assert (tmp_path / "vq.previous.jsonl").read_bytes() == before["vq.jsonl"]
    steps = [json.loads(line)["step"] for line in (tmp_path / "vq.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 3] and not (tmp_path / "vq.new.jsonl").exists()


def test_ctrl_c_does_not_tell_the_flags_of_a_kernel_and_gives_the_handler_back(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "/some/kernel.json"])
    before = signal.getsignal(signal.SIGINT)

    class Interrupted(Progress):
        def running(self):
            signal.raise_signal(signal.SIGINT)
            return super().running()
    monkeypatch.setattr(train_vq, "Progress", Interrupted)
    with pytest.raises(SystemExit) as end:
        run_vq(tmp_path, "--steps", "2", "--data-dir", "my pictures")
    assert "kernel.json" not in str(end.value) and "the same flags and --resume" in str(end.value)
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    with pytest.raises(InputError):                              # also where the loop raises
        run_vq(tmp_path, "--steps", "40", "--lr", "1e10", "--warmup", "0")
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("name, capability, expected", [("cuda", True, torch.bfloat16),
                                                        ("cuda", False, torch.float32)])
def test_bf16_is_used_only_where_the_card_multiplies_it(monkeypatch, name, capability, expected):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: asked.append(including_emulation) or capability)
    assert runs.fast_dtype(torch.device(name)) == expected and asked == [False]


def test_bf16_matrix_products_give_nearly_the_loss_of_float32():
    gpt = GPT(GPTConfig(n_layer=2, n_head=4, dim=64, vocab_size=96, block_size=16, num_classes=3)).eval()
    torch.nn.init.normal_(gpt.output.weight, std=0.1)
    tokens, cond = torch.randint(96, (8, 16)), torch.randint(3, (8,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "fast_dtype", lambda device: torch.bfloat16)
        with runs.mixed_precision(torch.device("cpu")):
            _, half = gpt(tokens[:, :-1], cond, tokens)
    _, whole = gpt(tokens[:, :-1], cond, tokens)
    assert half.item() == pytest.approx(whole.item(), rel=0.01) and half.item() != whole.item()


def test_nothing_of_the_checkpoint_is_held_while_a_resumed_run_trains(trained, tmp_path, monkeypatch):
    import gc
    import weakref
    run_vq(tmp_path, "--steps", "1")
    held, read = [], training.read_checkpoint

    class Watched(Progress):
        def running(self):
            gc.collect()
            assert self.step > 1 or all(ref() is None for ref in held)
            return super().running()

    def watched(*args, **named):
        state = read(*args, **named)
        held.extend(weakref.ref(weight) for part in ("model", "raw") for weight in state[part].values())
        return state
    monkeypatch.setattr(training, "read_checkpoint", watched)
    monkeypatch.setattr(train_vq, "Progress", Watched)
    run_vq(tmp_path, "--steps", "2", "--resume")
    assert len(held) > 100


@pytest.mark.parametrize("ema, copies", [("0.9", 2), ("0", 1)])
def test_without_an_average_there_is_no_second_copy_of_the_weights(tmp_path, monkeypatch, ema, copies):
    seen = []

    class Counted(Progress):
        def save(self, **contents):
            seen.append({contents[part][name].data_ptr() for part, name in
                         (("model", "quant_conv.weight"), ("raw", "vq.quant_conv.weight"))})
            super().save(**contents)
    monkeypatch.setattr(train_vq, "Progress", Counted)
    run_vq(tmp_path, "--steps", "1", "--ema", ema)
    assert len(seen[0]) == copies


def test_compiling_does_not_count_as_training(tmp_path):
    args = train_vq.get_args(["--compile", "--minutes", "1", "--out", str(tmp_path / "x.pt")])
    with Progress(args, torch.device("cpu"), None) as progress:
        progress.started -= 100                                  # the first step compiles for so long
        progress.count({"loss": torch.tensor(1.0)})
        assert progress.seconds() < 1 and progress.running()
        progress.started -= 100
        progress.count({"loss": torch.tensor(1.0)})
        assert progress.seconds() > 99 and not progress.running()


def test_gradients_of_small_batches_add_up_to_that_of_a_large_one(trained, tmp_path):
    flags = ["--vq", str(trained / "vq.pt"), "--steps", "1", "--class-dropout", "0", "--ema", "0", "--limit",
             "8"]
    norms = []
    for size, parts in (("8", "1"), ("4", "2")):                 # the same 8 pictures: an epoch of either
        folder = tmp_path / size
        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runs, "fast_dtype", lambda device: torch.float32)
            run_gpt(folder, *flags, "--batch-size", size, "--grad-accum", parts)
        line = json.loads((folder / "gpt.jsonl").open().readline())
        norms.append((line["loss"], line["grad_norm"]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_the_paper_starts_from_std_0_02_and_quick_start_does_not(trained, tmp_path):
    flags = ["--vq", str(trained / "vq.pt"), "--steps", "1", "--lr", "1e-12", "--ema", "0"]
    for paper, expected in ((["--paper-init"], 0.02), ([], 192 ** -0.5)):
        weight = run_gpt(tmp_path, *flags, *paper)["model"]["layers.1.feed_forward.w1.weight"]
        assert weight.std().item() == pytest.approx(expected, rel=0.05)


def test_each_group_learns_at_its_share_of_the_rate(texts, tmp_path, monkeypatch):
    rates, real = [], torch.optim.AdamW.step

    def step(self, *args):
        rates.append([(group["rate"], group["lr"]) for group in self.param_groups])
        return real(self, *args)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run_gpt(tmp_path, "--cond", "text", "--vq", str(texts / "vq.pt"), "--steps", "2", "--lr", "0.004",
            "--text-lr", "0.25", "--warmup", "2")
    assert np.allclose(rates[0], [(1.0, 0.002)] * 2 + [(0.25, 0.0005)] * 2, rtol=1e-6)
    assert np.allclose(rates[1], [(1.0, 0.004)] * 2 + [(0.25, 0.001)] * 2, rtol=1e-2)    # the cosine begins


def test_text_models_look_for_words_unless_told_otherwise_or_started_from_one_that_cannot(texts, tmp_path):
    flags = ["--cond", "text", "--vq", str(texts / "vq.pt"), "--steps", "1"]
    assert run_gpt(tmp_path / "a", *flags)["config"]["cond_rope"] == "identity"
    assert run_gpt(tmp_path / "b", *flags, "--cond-rope", "zero")["config"]["cond_rope"] == "zero"
    started = run_gpt(tmp_path / "c", *flags, "--init", str(tmp_path / "b" / "gpt.pt"))
    assert started["config"]["cond_rope"] == "zero"


def test_the_discriminator_is_left_alone_until_its_start(tmp_path):
    disc = lambda *flags: {name: weight for name, weight in run_vq(tmp_path, *flags)["raw"].items()
                           if name.startswith("disc.main.")}
    start = disc("--steps", "2", "--disc-start", "2", "--eval-every", "1")
    more = disc("--steps", "2", "--disc-start", "1")
    same = lambda a, b: bool(a) and all(torch.equal(a[name], b[name]) for name in a)
    again = disc("--steps", "1", "--disc-start", "1")
    assert same(start, again) and not same(start, more)
    assert "gan" not in (tmp_path / "vq.jsonl").read_text()


@pytest.mark.parametrize("script", ["vq", "gpt"])
def test_compiled_training_learns_what_eager_training_learns(trained, tmp_path, monkeypatch, script):
    # aot_eager captures the forward and the backward graph as the default backend does, without a compiler
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    losses = []
    for flags in ([], ["--compile"]):
        folder = tmp_path / f"run{len(losses)}"
        folder.mkdir()
        vq = [] if script == "vq" else ["--vq", str(trained / "vq.pt")]
        {"vq": run_vq, "gpt": run_gpt}[script](folder, "--steps", "3", *vq, *flags)
        lines = [json.loads(line) for line in (folder / f"{script}.jsonl").read_text().splitlines()]
        losses.append([line.get("loss", line.get("l2")) for line in lines if "lr" in line])
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
