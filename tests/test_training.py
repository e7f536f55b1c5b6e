"""pytest -q tests/test_training.py      Both training scripts: losses,
schedule, a few real steps, resuming."""
import contextlib
import json
import math
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import train_gpt
import train_vq
from conftest import ROOT
from model import GPT, GPTConfig, load_gpt
from test_text import write_t5
from text import tiny_text_encoder, tiny_text_encoder_from
from runs import InputError, Progress, learning_rate, update_ema
from tokenizer import VQConfig, VQModel, evaluate, load_tokenizer
from train_vq import (LPIPS, PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss,
                      load_lpips, restart_dead_codes)

QUICK = ["--limit", "64", "--device", "cpu", "--batch-size", "8", "--log-every", "1", "--eval-every", "2"]


def run_vq(tmp_path, *flags):
    train_vq.main(train_vq.get_args([*QUICK, "--out", str(tmp_path / "vq.pt"), *flags]))
    return torch.load(tmp_path / "vq.pt", weights_only=True)


def run_gpt(tmp_path, *flags):
    train_gpt.main(train_gpt.get_args([*QUICK, "--out", str(tmp_path / "gpt.pt"), "--vq",
                                       str(tmp_path / "vq.pt"), *flags]))
    return torch.load(tmp_path / "gpt.pt", weights_only=True)


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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run_vq(folder, "--steps", "2")
    run_gpt(folder, "--steps", "2")
    return folder


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


def test_lpips_is_switched_off_with_one_line_where_its_weights_are_missing(tmp_path, monkeypatch, capsys):
    def missing(group, name, data_dir=None):
        raise InputError(f"get {name}")
    monkeypatch.setattr(train_vq, "find_file", missing)
    assert load_lpips(train_vq.get_args(["--lpips-weight", "1"])) is None
    assert capsys.readouterr().out == "LPIPS is off: get vgg16-397923af.pth\n"
    with pytest.raises(InputError):
        load_lpips(train_vq.get_args(["--lpips-weight", "1", "--vgg", str(tmp_path / "typo.pth")]))


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

        def detokenize(self, tokens):
            return self.images + 2 / 127.5

    class Grey:
        def passes(self, batch_size):
            yield torch.full((3, 1, 3, 8, 8), 100, dtype=torch.uint8), None

    psnr, usage, perplexity = evaluate(Half(VQConfig(codebook_size=8, ch=32, ch_mult=(1,))), Grey(), "cpu", 3)
    assert psnr == pytest.approx(20 * math.log10(255 / 2), abs=1e-3)
    assert usage == 2 / 8 and perplexity == pytest.approx(2)


def test_decay_touches_matrices_only_and_every_parameter_is_trained():
    gpt = load_gpt_config()
    decayed, plain = train_gpt.parameter_groups(gpt, 0.05)
    assert all(p.dim() >= 2 for p in decayed["params"]) and all(p.dim() == 1 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(gpt.parameters()))
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0)


def load_gpt_config():
    from model import GPT, GPTConfig
    return GPT(GPTConfig(dim=32, n_layer=2, n_head=2, vocab_size=16, block_size=4))


def test_batches_of_codes_pick_a_random_crop_of_each_picture():
    codes = np.arange(6 * 4 * 3).reshape(6, 4, 3).astype(np.uint16)
    labels = np.arange(6)
    classes = train_gpt.Classes(labels, ["a"] * 6)
    batches = train_gpt.code_batches(codes, classes, 6, seed=0, device=torch.device("cpu"))
    crops = set()
    for _ in range(10):
        tokens, classes = next(batches)
        assert tokens.dtype == torch.int64 and sorted(classes.tolist()) == list(range(6))
        for row, label in zip(tokens.tolist(), classes.tolist()):
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
    for i in range(8):
        Image.new("RGB", (32, 32), (30 * i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"number {i}\nthe picture that has the number {i}")
    state = run_gpt(tmp_path, "--vq", str(trained / "vq.pt"), "--data", str(tmp_path), "--cond", "text",
                    "--steps", "2")
    assert "picture" in state["text_encoder"]["words"]


def test_codes_that_were_extracted_before_are_used_and_have_to_fit(trained, tmp_path):
    extract = ["extract", "--data", "shapes", "--limit", "20", "--vq", str(trained / "vq.pt"), "--cond", "text"]
    data.main(data.get_args([*extract, "--out", str(tmp_path / "codes")]))
    for cond in ("class", "text"):
        run_gpt(tmp_path, "--vq", str(trained / "vq.pt"), "--codes", str(tmp_path / "codes"), "--steps", "1",
                "--cond", cond)
    assert not (tmp_path / "gpt" / "codes").exists()
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

def command(*words, cwd):
    return subprocess.run([sys.executable, *(str(word) for word in words)], cwd=cwd, capture_output=True,
                          text=True)


def test_wrong_input_is_one_clear_line_and_not_a_traceback(trained, tmp_path):
    (tmp_path / "junk.pt").write_bytes(b"junk")
    (tmp_path / "empty").mkdir()
    for script, flags, expected in [
        ("train_vq.py", ["--data", "nonsense"], "nonsense"),
        ("train_vq.py", ["--data", tmp_path / "empty"], "no pictures"),
        ("train_vq.py", ["--codebook-size", "70000"], "65,536"),
        ("train_vq.py", ["--steps", "0"], "not above zero"),
        ("train_vq.py", ["--image-size", "30"], "multiple of 4"),
        ("train_vq.py", ["--resume", "--out", tmp_path / "none.pt"], "does not exist"),
        ("train_vq.py", ["--device", "warp"], "--device warp"),
        ("train_vq.py", ["--steps", "1", "--out", "/proc/none/vq.pt"], "/proc/none"),
        ("train_gpt.py", ["--seed", "-1"], "below zero"),
        ("train_gpt.py", ["--dropout", "1.5"], "between 0 and 1"),
        ("train_gpt.py", ["--resume", "--out", trained / "vq.pt"], "not written by this script"),
        ("train_gpt.py", ["--vq", trained / "vq.pt", "--data", "mnist", "--cond", "text"], "no captions"),
        ("train_gpt.py", ["--vq", tmp_path / "junk.pt"], "junk.pt"),
        ("train_gpt.py", ["--vq", trained / "gpt.pt"], "not a tokenizer"),
        ("sample.py", ["--gpt", trained / "gpt.pt", "--vq", trained / "vq.pt", "--classes", "10"], "0 to 9"),
        ("sample.py", ["--gpt", trained / "vq.pt", "--vq", trained / "vq.pt"], "not a GPT"),
    ]:
        result = command(ROOT / script, *flags, cwd=tmp_path)
        lines = result.stderr.strip().splitlines()
        last = lines[-1]
        assert len(lines) == 1 + (" [flags]" in lines[0]), (script, flags, lines)      # argparse says two
        assert result.returncode != 0 and "Traceback" not in result.stderr, (script, flags, result.stderr)
        assert expected in last and "error" in last, (script, flags, last)


def test_resuming_with_other_settings_is_refused_and_changes_nothing(trained, tmp_path):
    run_vq(tmp_path, "--steps", "1")
    before = (tmp_path / "vq.pt").read_bytes()
    with pytest.raises(InputError, match="other settings"):
        run_vq(tmp_path, "--steps", "2", "--resume", "--codebook-size", "32")
    assert (tmp_path / "vq.pt").read_bytes() == before
