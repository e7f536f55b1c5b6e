"""pytest -q tests/test_sample.py"""
import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import sample
import train_gpt
import train_vq
from conftest import ROOT
from data import image_grid, imagenet_names
from model import GPT, GPT_SIZES, GPTConfig
from sample import draw, filter_logits, generate, get_args, guidance_scales, main, parse_classes
from test_text import write_t5
from text import saved_text_encoder, tiny_text_encoder
from runs import InputError, weights_hash
from tokenizer import VQConfig, VQModel, to_uint8

SMALL = dict(dim=64, n_layer=2, n_head=4, vocab_size=64, block_size=16, num_classes=10)


@pytest.fixture
def gpt():
    gpt = GPT(GPTConfig(**SMALL)).eval()
    for weight in gpt.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return gpt


def slow_generate(gpt, cond, cfg_scale, cfg_interval=-1):
    """Greedy sampling without a cache: the full forward pass for every token, twice for guidance."""
    tokens = torch.zeros(len(cond), 0, dtype=torch.long)
    for i in range(gpt.config.block_size):
        conditional = gpt(tokens, cond)[0][:, -1]
        unconditional = gpt(tokens, torch.full_like(cond, gpt.config.num_classes))[0][:, -1]
        inside = cfg_interval == -1 or i <= cfg_interval + 1
        logits = unconditional + cfg_scale * (conditional - unconditional) if inside else conditional
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    return tokens


@pytest.mark.parametrize("kind", ["c2i", "t2i"])
def test_greedy_tokens_equal_the_official_code_under_all_guidance_settings(golden, kind):
    arrays, weights = golden(f"gpt_{kind}")
    config = {key[7:]: int(value) for key, value in arrays.items() if key.startswith("config.")}
    gpt = GPT(GPTConfig(**config, model_type=kind)).eval()
    gpt.load_state_dict(weights)
    cond = arrays["cond"][:2] if kind == "c2i" else arrays["cond"]
    for name, settings in {"cfg1": {}, "cfg2": dict(cfg_scale=2.0),
                           "cfg3_interval5": dict(cfg_scale=3.0, cfg_interval=5)}.items():
        tokens = generate(gpt, cond, arrays.get("cond_mask"), top_k=1, **settings)
        assert torch.equal(tokens, arrays[f"greedy.{name}"]), name


@pytest.mark.parametrize("cfg_scale, cfg_interval",
                         [(1.0, -1), (0.5, -1), (3.0, -1), (3.0, 0), (3.0, 4), (0.0, -1)])
def test_decoding_with_the_cache_equals_the_full_forward(gpt, cfg_scale, cfg_interval):
    cond = torch.tensor([1, 7, 10])
    assert torch.equal(generate(gpt, cond, cfg_scale=cfg_scale, cfg_interval=cfg_interval, top_k=1),
                       slow_generate(gpt, cond, cfg_scale, cfg_interval))


def test_grouped_heads_decode_like_the_full_forward_with_a_smaller_cache():
    gpt = GPT(GPTConfig(**SMALL, n_kv_head=2)).eval()
    torch.nn.init.normal_(gpt.output.weight)
    cond = torch.tensor([1, 7])
    assert [cache.k.shape for cache in gpt.new_caches(2)] == [(2, 2, 17, 16)] * 2
    assert torch.equal(generate(gpt, cond, cfg_scale=2.0, top_k=1), slow_generate(gpt, cond, 2.0))


def test_scale_zero_is_unconditional_and_scale_one_never_runs_a_second_row(gpt, monkeypatch):
    null = torch.tensor([10, 10])
    cond = torch.tensor([1, 2])
    assert torch.equal(generate(gpt, cond, cfg_scale=0.0, top_k=1), generate(gpt, null, top_k=1))
    rows = []
    prefill = gpt.prefill
    monkeypatch.setattr(gpt, "prefill", lambda given, *rest: rows.append(len(given)) or prefill(given, *rest))
    generate(gpt, cond, cfg_scale=1.0)
    generate(gpt, cond, cfg_scale=1.5)
    assert rows == [2, 4]


def test_after_the_interval_the_unconditional_rows_are_not_computed(gpt, monkeypatch):
    rows, step = [], gpt.step
    monkeypatch.setattr(gpt, "step", lambda token, *rest: rows.append(len(token)) or step(token, *rest))
    generate(gpt, torch.tensor([1, 2]), cfg_scale=2.0, cfg_interval=3)
    assert rows == [4] * 4 + [2] * 11                            # tokens 1 .. 4 are guided, 5 .. 15 are not


def test_a_prefix_is_kept_and_completed_as_if_it_had_been_sampled(gpt):
    cond = torch.tensor([4, 5])
    whole = generate(gpt, cond, cfg_scale=2.0, top_k=1)
    for P in (1, 9, 16):
        assert torch.equal(generate(gpt, cond, cfg_scale=2.0, top_k=1, prefix=whole[:, :P]), whole)
    other = (whole[:, :9] + 1) % 64
    assert torch.equal(generate(gpt, cond, prefix=other)[:, :9], other)


def test_growing_scales_start_at_one_and_end_at_the_scale(gpt):
    """By formula: 1 + (s - 1) t, or half a cosine; and each token is that of its own scale."""
    assert guidance_scales(3.0, "constant", -1, 4) == [3.0] * 4
    assert guidance_scales(3.0, "linear", -1, 5) == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert guidance_scales(3.0, "linear", 1, 5) == [1.0, 1.5, 2.0, 1.0, 1.0]         # tokens 0 .. 2
    assert guidance_scales(3.0, "cosine", -1, 5) == pytest.approx([1, 1 + 2 * .146447, 2, 1 + 2 * .853553, 3])
    cond, null, tokens = torch.tensor([1, 7]), torch.tensor([10, 10]), torch.zeros(2, 0, dtype=torch.long)
    for i in range(16):
        with_class, without = gpt(tokens, cond)[0][:, -1], gpt(tokens, null)[0][:, -1]
        logits = without + (1 + 4 * i / 15) * (with_class - without)
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generate(gpt, cond, cfg_scale=5.0, cfg_schedule="linear", top_k=1), tokens)
    assert not torch.equal(generate(gpt, cond, cfg_scale=5.0, top_k=1), tokens)


@pytest.mark.parametrize("settings", [{}, dict(top_k=1, cfg_scale=3.0), dict(cfg_scale=2.0, cfg_interval=5),
                                      dict(cfg_scale=4.0, cfg_schedule="linear", top_k=9, top_p=0.8)])
@pytest.mark.parametrize("width", [2, 5, 16, 40])
def test_tokens_drawn_ahead_are_those_drawn_one_by_one(gpt, settings, width):
    cond, prefix = torch.tensor([1, 7, 10]), torch.tensor([[5, 6, 7]]).expand(3, 3)
    seed = lambda: torch.Generator().manual_seed(3)
    for more in ({}, dict(prefix=prefix)):
        plain = generate(gpt, cond, generator=seed(), **settings, **more)
        assert torch.equal(generate(gpt, cond, generator=seed(), jacobi=width, **settings, **more), plain)


def test_tokens_drawn_ahead_with_padded_captions_are_those_drawn_one_by_one(golden):
    arrays, weights = golden("gpt_t2i")
    config = {key[7:]: int(value) for key, value in arrays.items() if key.startswith("config.")}
    gpt = GPT(GPTConfig(**config, model_type="t2i")).eval()
    gpt.load_state_dict(weights)
    tokens = generate(gpt, arrays["cond"], arrays["cond_mask"], cfg_scale=3.0, cfg_interval=5, top_k=1,
                      jacobi=4)
    assert torch.equal(tokens, arrays["greedy.cfg3_interval5"])


def test_tokens_drawn_ahead_follow_the_exact_distribution():
    """Pearson's statistic over the 81 pictures of 4 tokens out of 3, beside their exact probabilities."""
    gpt = GPT(GPTConfig(**SMALL | dict(vocab_size=3, block_size=4, n_layer=1, dim=16))).eval()
    for weight in gpt.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    pictures = torch.cartesian_prod(*[torch.arange(3)] * 4)                      # (81, 4)
    with torch.no_grad():
        log_p = gpt(pictures[:, :-1], torch.full((81,), 2))[0].log_softmax(-1).gather(2, pictures[..., None])
    p = log_p.sum(dim=(1, 2)).exp()
    assert p.sum() == pytest.approx(1, abs=1e-5) and p.max() < 0.5
    generator = torch.Generator().manual_seed(0)                 # one at a time, each at its own pace
    drawn = torch.cat([generate(gpt, torch.tensor([2]), generator=generator, jacobi=3) for _ in range(1000)])
    seen = torch.bincount(drawn @ torch.tensor([27, 9, 3, 1]), minlength=81)
    often = 1000 * p >= 5                                        # the seldom ones are counted together
    expected, counted = (torch.cat([x[often], x[~often].sum()[None]]) for x in (1000 * p, seen))
    k = often.sum().item()
    assert k > 20 and ((counted - expected) ** 2 / expected).sum() < k + 4 * (2 * k) ** 0.5


def test_a_model_that_repeats_itself_is_drawn_in_fewer_passes(monkeypatch):
    gpt = GPT(GPTConfig(**SMALL)).eval()                         # all tokens alike: the likeliest is number 0
    runs, step = [], GPT.step
    monkeypatch.setattr(GPT, "step", lambda self, given, *rest: runs.append(given.shape) or step(self, given,
                                                                                                  *rest))
    generate(gpt, torch.tensor([1]), top_k=1, jacobi=5)
    assert runs == [(1, 5)] * 3                                  # 1 from the prefill, then 5 a pass


# ------------------------------------------------------------------------------------------------------------
# Drawn by neighbours

@pytest.fixture
def near():
    gpt = GPT(GPTConfig(**SMALL, order="neighbours")).eval()
    for weight in gpt.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return gpt


@pytest.mark.parametrize("kind", ["c2i", "t2i"])
@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_by_neighbours_decoding_with_the_cache_equals_the_full_forward(near, kind, cfg_scale):
    cond, mask = torch.tensor([1, 7, 10]), None
    if kind == "t2i":
        near = GPT(GPTConfig(**SMALL, order="neighbours", model_type="t2i", cls_token_num=3,
                             caption_dim=8)).eval()
        for weight in near.parameters():
            torch.nn.init.normal_(weight, std=0.3)
        cond, mask = torch.randn(3, 3, 8), torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 1]])
    null, tokens = near.cls_embedding.null(cond), torch.zeros(3, 16, dtype=torch.long)
    distance = torch.arange(16) // 4 + torch.arange(16) % 4
    for turn in range(7):
        asked, without = (near(tokens[:, :-1], given, cond_mask=mask)[0] for given in (cond, null))
        drawn = (without + cfg_scale * (asked - without)).argmax(dim=-1)
        tokens = torch.where(distance == turn, drawn, tokens)
    assert torch.equal(generate(near, cond, mask, cfg_scale=cfg_scale, top_k=1), tokens)


def test_by_neighbours_a_picture_takes_as_many_passes_as_there_are_distances(near, monkeypatch):
    runs, step = [], GPT.step
    monkeypatch.setattr(GPT, "step", lambda self, given, *rest: runs.append(given.shape) or step(self, given,
                                                                                                  *rest))
    generate(near, torch.tensor([1]), cfg_scale=2.0, cfg_interval=2)
    # The prefill was one pass; 0 to 3 of 7 are guided.
    assert runs == [(2, 1), (2, 2), (2, 3), (1, 4), (1, 3), (1, 2)]


@pytest.mark.cuda
def test_by_neighbours_and_ahead_cuda_draws_what_the_cpu_draws(gpt, near):
    for model, settings in ((near, {}), (gpt, dict(jacobi=5)), (gpt, dict(cfg_schedule="linear"))):
        draws = [generate(model.to(device), torch.tensor([1, 7], device=device), cfg_scale=3.0, top_k=1,
                          **settings).cpu() for device in ("cpu", "cuda")]
        assert torch.equal(*draws)


def test_what_goes_with_one_order_only_is_refused_in_the_other(gpt, near):
    cond = torch.tensor([1])
    for settings in (dict(prefix=torch.zeros(1, 3, dtype=torch.long)), dict(jacobi=2)):
        with pytest.raises(InputError, match="neighbours"):
            generate(near, cond, **settings)
    gpt.compile_step()
    near.compile_step()
    for given, settings in ((near, {}), (gpt, dict(jacobi=2))):
        with pytest.raises(InputError, match="compiled"):
            generate(given, cond, **settings)
    with pytest.raises(InputError, match="jacobi 0|jacobi >= 1"):
        generate(gpt, cond, jacobi=0)
    with pytest.raises(InputError, match="cfg_schedule"):
        generate(gpt, cond, cfg_schedule="steep")


def test_the_same_generator_seed_gives_the_same_picture_and_another_does_not(gpt):
    cond = torch.tensor([4, 5])
    make = lambda seed: generate(gpt, cond, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(make(1), make(1)) and not torch.equal(make(1), make(2))


def test_top_k_keeps_ties_and_top_p_keeps_the_token_that_crosses():
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0]])
    kept = lambda **settings: filter_logits(logits, **settings).isfinite()[0].tolist()
    assert kept(top_k=2) == [True, False, True, True, False]
    assert kept(top_k=99) == kept(top_k=0) == kept(top_p=1.0) == [True] * 5
    probabilities = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    count = lambda p: int(filter_logits(probabilities, top_p=p).isfinite().sum())
    assert [count(p) for p in (1e-9, 0.49, 0.51, 0.79, 0.81, 0.96)] == [1, 1, 2, 2, 3, 4]


def test_draws_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    tokens = draw(logits.expand(40000, 4))
    frequencies = torch.bincount(tokens, minlength=4) / 40000
    torch.testing.assert_close(frequencies, logits.softmax(0), atol=0.01, rtol=0)
    cold = torch.bincount(draw(logits.expand(40000, 4), temperature=0.5), minlength=4) / 40000
    torch.testing.assert_close(cold, (logits / 0.5).softmax(0), atol=0.01, rtol=0)


def test_one_decoding_step_compiles_without_graph_breaks_or_recompilation(gpt):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    expected = generate(gpt, torch.tensor([1, 2]), cfg_scale=2.0, top_k=1)
    gpt.step = torch.compile(gpt.step, backend=count, fullgraph=True, dynamic=False)
    for _ in range(2):
        assert torch.equal(generate(gpt, torch.tensor([1, 2]), cfg_scale=2.0, top_k=1), expected)
    assert len(graphs) == 1                                    # one graph serves all positions and both calls


def test_no_tensor_of_a_step_or_a_draw_is_read_by_the_host(gpt, monkeypatch):
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(function.name().removeprefix("aten::").split(".")[0])
            return function(*args, **(kwargs or {}))

    def watched(function):
        def run(*args, **kwargs):
            with Watch():
                return function(*args, **kwargs)
        return run
    waiting = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique",
               "_unique2", "bincount", "multinomial", "allclose"}
    seen = set()
    watched(lambda: torch.ones(2).sum().item())()
    assert seen & waiting                                        # the check can fail
    seen.clear()
    monkeypatch.setattr(gpt, "step", watched(gpt.step))          # shapes that stay, as on a GPU
    monkeypatch.setattr(sample, "draw", watched(draw))
    generate(gpt, torch.tensor([1, 2]), cfg_scale=2.0, top_k=5, top_p=0.9)
    assert {"mm", "index_put_", "exponential_", "topk"} <= seen and not seen & waiting


def test_two_threads_draw_what_each_would_draw_alone(gpt):
    conds = [torch.tensor([i, i + 1]) for i in range(4)]
    alone = [generate(gpt, cond, cfg_scale=2.0, top_k=1) for cond in conds]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda cond: generate(gpt, cond, cfg_scale=2.0, top_k=1), conds * 3))
    assert all(torch.equal(a, b) for a, b in zip(alone * 3, together))


@pytest.mark.parametrize("flag", ["--int8", "--bf16"])
def test_low_precision_draws_and_is_other_work_than_the_unfinished(tmp_path, checkpoints, monkeypatch, flag):
    flags = [*checkpoints, "--num-samples", "10", "--batch-size", "5", "--npz", str(tmp_path / "s.npz")]
    drawn = die_at(2, monkeypatch)
    with pytest.raises(RuntimeError, match="killed"):
        main(get_args(flags))
    main(get_args([*flags, flag]))
    assert drawn == [0, 1, 0, 1]                                 # what float32 had drawn is not mixed in
    with np.load(tmp_path / "s.npz") as file:
        assert file["arr_0"].shape == (10, 8, 8, 3)


def test_the_batch_is_what_fits_into_half_of_the_free_memory(gpt, monkeypatch):
    caches = sum(cache.k.nbytes + cache.v.nbytes for cache in gpt.new_caches(2))
    one = caches + 2 * 16 * 64                                   # and its logits
    for free, expected in ((2 * one * 100, 100), (2 * one * 99, 64), (2 * one * 3, 2), (0, 1)):
        monkeypatch.setattr(sample, "free_memory", lambda device: free)
        assert sample.fitting_batch(gpt, 2.0, torch.device("cpu")) == expected
    monkeypatch.setattr(sample, "free_memory", lambda device: 2 * one * 2)
    assert sample.fitting_batch(gpt, 1.0, torch.device("cpu")) == 4      # no second row


def test_pixels_are_clamped_and_truncated_like_the_released_samplers():
    x = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.5, 0.99, 1.0, 3.0]).view(1, 1, 1, 8).expand(1, 3, 1, 8)
    assert to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 0, 128, 191, 254, 255, 255]


def test_class_names_and_numbers_are_understood_and_others_refused():
    names = ["cat", "dog", "7"]
    assert parse_classes(["dog, 0,cat"], names) == parse_classes(["dog", "0", "Cat"], names) == [1, 0, 0]
    for wrong in ("3", "-1", "horse", "1,,2", ""):
        with pytest.raises(InputError, match="0 to 2"):
            parse_classes([wrong], names)


def test_a_grid_is_labelled_on_the_left_and_holds_every_picture():
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.full((6, 8, 8, 3), 40, np.uint8)
    sheet = np.asarray(image_grid(images, columns=3, row_names=["circle", "star"], scale=2))
    for i in range(6):
        assert (sheet[2 + i // 3 * 18 + 8, sheet.shape[1] - 3 * 18 + i % 3 * 18 + 4] == 40 * i).all()


def test_imagenet_classes_have_their_names():
    names = imagenet_names()
    assert len(set(names)) == 1000
    assert parse_classes(["golden retriever", "360", " Loggerhead ,volcano"], names) == [207, 360, 33, 980]


def test_titles_stand_above_the_pictures_and_long_ones_are_cut():
    images = np.full((5, 32, 32, 3), 200, np.uint8)
    sheet = image_grid(images, columns=4, titles=["a"] * 4 + ["a very long title " * 9], scale=2)
    pixels = np.asarray(sheet)
    assert pixels.shape == (2 * (24 + 64 + 2) + 2, 4 * 66 + 2, 3)
    assert (pixels[28:88, 4:60] == 200).all()
    assert (pixels[92:116, :66] < 100).any() and (pixels[92:116, 68:] == 255).all()


@pytest.fixture
def checkpoints(tmp_path, gpt):
    vq = VQModel(VQConfig(codebook_size=64, ch=32, ch_mult=(1, 2), z_channels=32))
    torch.save({"model": vq.state_dict(), "config": dict(vars(vq.config))}, tmp_path / "vq.pt")
    torch.save({"model": gpt.state_dict(), "config": dict(vars(gpt.config)), "vq_hash": weights_hash(vq),
                "class_names": [f"class {i}" for i in range(10)]}, tmp_path / "gpt.pt")
    return ["--gpt", str(tmp_path / "gpt.pt"), "--vq", str(tmp_path / "vq.pt"), "--device", "cpu"]


def test_npz_has_the_evaluators_format_and_balanced_labels(tmp_path, checkpoints, capsys):
    main(get_args([*checkpoints, "--npz", str(tmp_path / "new" / "s.npz"), "--num-samples", "23",
                   "--batch-size", "10", "--classes", "3,class 1"]))
    with np.load(tmp_path / "new" / "s.npz", allow_pickle=False) as file:
        assert file["arr_0"].shape == (23, 8, 8, 3) and file["arr_0"].dtype == np.uint8
        assert np.bincount(file["label"]).tolist() == [0, 11, 0, 12]
    assert "images/s" in capsys.readouterr().out


def test_random_classes_follow_the_seed_and_cover_all(tmp_path, checkpoints):
    labels = []
    for seed in "112":
        main(get_args([*checkpoints, "--npz", str(tmp_path / "s.npz"), "--num-samples", "60",
                       "--random-classes", "--image-size-eval", "12", "--seed", seed]))
        with np.load(tmp_path / "s.npz") as file:
            labels.append(file["label"])
            assert file["arr_0"].shape == (60, 12, 12, 3)
    assert set(labels[0]) == set(range(10)) and np.bincount(labels[0]).std() > 0
    assert np.array_equal(labels[0], labels[1]) and not np.array_equal(labels[0], labels[2])


def die_at(count, monkeypatch):
    """Sampling dies once, when it draws its batch number `count`. Returns the list of all that were begun."""
    drawn, real = [], sample.sample_batch

    def sample_batch(models, conditions, rows, batch, *rest):
        drawn.append(batch)
        if len(drawn) == count:
            raise RuntimeError("killed")
        return real(models, conditions, rows, batch, *rest)
    monkeypatch.setattr(sample, "sample_batch", sample_batch)
    return drawn


def test_a_killed_npz_goes_on_where_it_was_and_equals_one_that_was_not(tmp_path, checkpoints, monkeypatch):
    flags = [*checkpoints, "--num-samples", "22", "--batch-size", "5", "--npz"]
    main(get_args([*flags, str(tmp_path / "whole.npz")]))
    drawn = die_at(3, monkeypatch)
    with pytest.raises(RuntimeError, match="killed"):
        main(get_args([*flags, str(tmp_path / "parts.npz")]))
    assert not (tmp_path / "parts.npz").exists()
    main(get_args([*flags, str(tmp_path / "parts.npz")]))
    assert drawn == [0, 1, 2, 2, 3, 4]
    with np.load(tmp_path / "whole.npz") as whole, np.load(tmp_path / "parts.npz") as parts:
        assert np.array_equal(whole["arr_0"], parts["arr_0"])
        assert np.array_equal(whole["label"], parts["label"])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("parts.npz.")]


def test_killed_while_packing_nothing_is_drawn_twice(tmp_path, checkpoints, monkeypatch):
    flags = [*checkpoints, "--num-samples", "12", "--batch-size", "5", "--npz", str(tmp_path / "s.npz")]

    def die(*args, **named):
        raise RuntimeError("killed")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(sample.np, "savez", die)
        main(get_args(flags))
    assert not (tmp_path / "s.npz").exists()
    monkeypatch.setattr(sample, "sample_batch", None)            # whoever draws again fails
    main(get_args(flags))
    with np.load(tmp_path / "s.npz") as file:
        assert file["arr_0"].shape == (12, 8, 8, 3) and file["arr_0"].std() > 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("s.npz.")]


@pytest.mark.parametrize("other", [["--cfg-scale", "3"], ["--cfg-schedule", "linear"], ["--jacobi", "3"]])
def test_unfinished_work_is_not_continued_under_other_flags(tmp_path, checkpoints, monkeypatch, other):
    drawn = die_at(2, monkeypatch)
    flags = [*checkpoints, "--num-samples", "12", "--batch-size", "5", "--npz", str(tmp_path / "s.npz")]
    with pytest.raises(RuntimeError, match="killed"):
        main(get_args(flags))
    main(get_args([*flags, *other]))
    assert drawn == [0, 1, 0, 1, 2]


def test_more_prompts_or_classes_than_pictures_are_all_drawn_or_the_rest_is_told(checkpoints, capsys):
    args = get_args([*checkpoints, "--npz", "x.npz"])
    assert np.bincount(sample.balanced(list(range(1500)), args)).tolist() == [1] * 1500
    assert len(sample.balanced([3, 1], args)) == 1000 and capsys.readouterr().err == ""
    args = get_args([*checkpoints, "--npz", "x.npz", "--num-samples", "2"])
    assert sample.balanced([5, 6, 7], args).tolist() == [5, 6]
    assert "leaves room for the first 2 of 3 classes or prompts only" in capsys.readouterr().err


def test_a_tokenizer_with_as_many_codes_but_another_grid_is_refused_for_a_released_gpt(tmp_path):
    gpt = GPT(GPTConfig(**GPT_SIZES["tiny"], vocab_size=64, block_size=16, num_classes=1000))
    torch.save({"model": gpt.state_dict()}, tmp_path / "gpt.pt")
    vq = VQModel(VQConfig(codebook_size=64, ch=32, ch_mult=(1, 1, 1, 1), z_channels=32, num_res_blocks=1))
    torch.save({"model": vq.state_dict()}, tmp_path / "vq8.pt")
    flags = ["--gpt", str(tmp_path / "gpt.pt"), "--image-size", "64", "--classes", "1", "--out",
             str(tmp_path / "x.png")]
    with pytest.raises(InputError, match="tokens of 16 x 16 pixels, this tokenizer's are of 8 x 8"):
        main(get_args([*flags, "--vq", str(tmp_path / "vq8.pt"), "--device", "cpu"]))
    main(get_args([*flags, *sixteen(tmp_path)]))
    assert (tmp_path / "x.png").exists()


def sixteen(folder):
    """A tokenizer like the released ones, one token for 16 x 16 pixels, as flags."""
    vq = VQModel(VQConfig(codebook_size=64, ch=32, ch_mult=(1, 1, 1, 1, 1), z_channels=32, num_res_blocks=1))
    torch.save({"model": vq.state_dict()}, folder / "vq16.pt")
    return ["--vq", str(folder / "vq16.pt"), "--device", "cpu"]


def test_a_released_gpt_draws_one_picture_of_each_imagenet_class(tmp_path, checkpoints, monkeypatch, capsys):
    released = GPT(GPTConfig(**GPT_SIZES["tiny"], vocab_size=64, block_size=9, num_classes=1000))
    torch.nn.init.normal_(released.output.weight)
    torch.save({"model": released.state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "released.pt")
    sheets = []

    def remember(*args, **named):
        sheets.append((args, named))
        return image_grid(*args, **named)
    monkeypatch.setattr(sample, "image_grid", remember)
    flags = ["--gpt", str(tmp_path / "released.pt"), *sixteen(tmp_path), "--out", str(tmp_path / "grid.png")]
    args = get_args([*flags, "--image-size", "48", "--classes", "207,otter,22", "--top-k", "30"])
    main(args)
    (images, columns), named = sheets[0]
    assert images.shape == (3, 48, 48, 3) and columns == 4
    assert named["titles"] == ["golden retriever", "otter", "bald eagle"]
    assert (args.cfg_scale, args.temperature) == (4.0, 1.0)
    for wrong in ("50", "0", "-16"):
        with pytest.raises(SystemExit):
            get_args([*flags, "--image-size", wrong])
        assert f"{wrong} is not a multiple of 16" in capsys.readouterr().err


def test_the_command_draws_a_grid_with_every_sampling_flag(tmp_path, checkpoints):
    main(get_args([*checkpoints, "--out", str(tmp_path / "grid.png"), "--per-class", "2", "--cfg-scale", "3",
                   "--cfg-interval", "4", "--temperature", "0.9", "--top-k", "20", "--top-p", "0.9",
                   "--cfg-schedule", "cosine", "--jacobi", "4", "--seed", "1"]))
    assert (tmp_path / "grid.png").stat().st_size > 1000


def test_a_tokenizer_of_another_gpt_is_refused(tmp_path, checkpoints):
    other = VQModel(VQConfig(codebook_size=64, ch=32, ch_mult=(1, 2), z_channels=32))
    torch.save({"model": other.state_dict(), "config": dict(vars(other.config))}, tmp_path / "vq.pt")
    with pytest.raises(InputError, match="do not belong together"):
        main(get_args(checkpoints))
    other = VQModel(VQConfig(codebook_size=32, ch=32, ch_mult=(1, 2), z_channels=32))
    torch.save({"model": other.state_dict(), "config": dict(vars(other.config))}, tmp_path / "vq.pt")
    with pytest.raises(InputError, match="64 tokens.*32 entries"):
        main(get_args(checkpoints))


@pytest.mark.parametrize("flags", [["--num-samples", "0"], ["--temperature", "-1"], ["--top-p", "0"],
                                   ["--per-class", "x"], ["--seed", str(2 ** 64)], ["--seed", "9" * 400],
                                   ["--num-samples", "1" + "0" * 30], ["--top-k", "1" + "0" * 400],
                                   ["--batch-size", str(2 ** 63)], ["--cfg-interval", str(-2 ** 70)],
                                   ["--temperature", "nan"], ["--temperature", "inf"], ["--cfg-scale", "nan"],
                                   ["--cfg-scale", "-inf"], ["--cfg-interval", "-5"], ["--top-p", "nan"]])
def test_impossible_flags_end_with_a_message(flags):
    with pytest.raises(SystemExit) as error:
        get_args(flags)
    assert error.value.code == 2


@pytest.mark.parametrize("flags", [["--seed", str(2 ** 63)], ["--limit", "1" + "0" * 30],
                                   ["--steps", "9" * 400],
                                   ["--batch-size", str(2 ** 64)]])
def test_numbers_beyond_64_bits_are_told_by_the_training_scripts_too(flags, capsys):
    for module in (train_vq, train_gpt):
        with pytest.raises(SystemExit) as error:
            module.get_args(flags)
        assert error.value.code == 2 and "too large" in capsys.readouterr().err
    assert train_gpt.get_args(["--seed", str(2 ** 63 - 1)]).seed == 2 ** 63 - 1
    with pytest.raises(SystemExit):
        train_gpt.get_args(["--ten-crop", "nan"])


# text

@pytest.fixture
def text_checkpoints(tmp_path, checkpoints):
    """A text-conditional GPT with its tiny text encoder, as train_gpt.py saves them, and its tokenizer."""
    text = tiny_text_encoder([f"{sample.EXAMPLES[0]} {sample.EXAMPLES[2]}"])
    config = GPTConfig(dim=64, n_layer=2, n_head=4, vocab_size=64, block_size=9, model_type="t2i",
                       cls_token_num=text.length, caption_dim=192)
    gpt = GPT(config)
    torch.nn.init.normal_(gpt.output.weight)
    torch.save({"model": gpt.state_dict(), "config": asdict(config), "class_names": ["a"], "args": {},
                "text_encoder": saved_text_encoder(text)}, tmp_path / "text.pt")
    return ["--gpt", str(tmp_path / "text.pt"), *checkpoints[2:]]


def test_prompts_make_a_row_each_and_stay_with_their_pictures_in_an_npz(tmp_path, text_checkpoints,
                                                                         capsys):
    out = tmp_path / "grid.png"
    main(get_args([*text_checkpoints, "--out", str(out), "--per-class", "3", "--prompts", "a star", "navy"]))
    with Image.open(out) as sheet:
        assert sheet.height == 2 * (6 * 4 + 2) + 2
    (tmp_path / "prompts.txt").write_text("a red star\n\n  \nan orange ring\nwhite\n")
    main(get_args([*text_checkpoints, "--prompts-file", str(tmp_path / "prompts.txt"), "--num-samples", "7",
                   "--npz", str(tmp_path / "out.npz")]))
    with np.load(tmp_path / "out.npz") as file:
        assert file["arr_0"].shape == (7, 6, 6, 3) and "label" not in file
        assert file["prompt"].tolist() == (["a red star", "an orange ring", "white"] * 3)[:7]
    main(get_args([*text_checkpoints, "--out", str(out)]))       # without prompts: a few examples
    assert "warning" not in capsys.readouterr().err
    for per_class in ("1", "8"):                                 # as a title, as the name of a row
        main(get_args([*text_checkpoints, "--out", str(out), "--prompts", "word " * 10_000,
                       "--per-class", per_class]))
        assert "1 prompts are longer than 21 tokens" in capsys.readouterr().err


def test_prompts_and_models_that_do_not_fit_are_told_in_one_line(tmp_path, text_checkpoints, checkpoints):
    for flags, message in [
        ([*checkpoints, "--prompts", "a"], "draws classes, not prompts"),
        ([*text_checkpoints, "--classes", "1"], "draws from text"),
        ([*text_checkpoints, "--prompts", "a star", " "], "a prompt is empty"),
        ([*text_checkpoints, "--prompts-file", str(tmp_path / "none.txt")], "none.txt cannot be read"),
    ]:
        with pytest.raises(InputError, match=message):
            main(get_args(flags))
    checkpoint = torch.load(tmp_path / "text.pt", weights_only=True)
    torch.save({"model": checkpoint["model"]}, tmp_path / "released.pt")
    with pytest.raises(InputError, match="fits no known size"):
        main(get_args(["--gpt", str(tmp_path / "released.pt"), *checkpoints[2:]]))


def test_a_released_text_model_asks_for_its_encoder_and_refuses_one_of_another_width(tmp_path, checkpoints):
    config = GPTConfig(**GPT_SIZES["tiny"], vocab_size=64, block_size=9, model_type="t2i", cls_token_num=8,
                       caption_dim=24)
    gpt = GPT(config)
    torch.save({"model": gpt.state_dict()}, tmp_path / "t2i.pt")
    flags = ["--gpt", str(tmp_path / "t2i.pt"), *sixteen(tmp_path), "--image-size", "48", "--prompts", "star",
             "--out", str(tmp_path / "x.png")]
    with pytest.raises(InputError, match="flan-t5-xl"):
        main(get_args(flags))
    (tmp_path / "t5").mkdir()
    write_t5(tmp_path / "t5")
    args = get_args([*flags, "--text-encoder", str(tmp_path / "t5")])
    main(args)
    assert args.cfg_scale == 7.5 and (tmp_path / "x.png").exists()
    wide = GPT(replace(config, caption_dim=32))
    torch.save({"model": wide.state_dict()}, tmp_path / "t2i.pt")
    with pytest.raises(InputError, match="features of width 32, the encoder gives 24"):
        main(get_args([*flags, "--text-encoder", str(tmp_path / "t5")]))


@pytest.mark.parametrize("given, interval", [(0, 3), (3, 3), (4, 3), (5, 3), (9, 3), (5, 4)])
def test_a_prefix_counts_for_the_guidance_interval(gpt, given, interval):
    cond, whole = torch.tensor([1, 2]), torch.randint(64, (2, 16))
    tokens = generate(gpt, cond, cfg_scale=3, cfg_interval=interval, top_k=1, prefix=whole[:, :given])
    expected = whole[:, :given]
    for i in range(given, 16):
        conditional = gpt(expected, cond)[0][:, -1]
        unconditional = gpt(expected, torch.full_like(cond, 10))[0][:, -1]
        guided = unconditional + 3 * (conditional - unconditional)
        logits = guided if i <= interval + 1 else conditional
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(tokens, expected)


# from Python, and --compile

@pytest.mark.parametrize("settings, told", [
    (dict(temperature=-1.0), "temperature"), (dict(temperature=float("nan")), "temperature"),
    (dict(cfg_scale=float("inf")), "cfg_scale"),
    (dict(cfg_scale=float("nan")), "cfg_scale"), (dict(cfg_interval=-5), "cfg_interval"),
    (dict(top_k=-1), "top_k"), (dict(top_p=0), "top_p"), (dict(top_p=1.5), "top_p"),
    (dict(top_p=float("nan")), "top_p"), (dict(prefix=torch.zeros(2, 17).long()), "at most 16 long"),
    (dict(prefix=torch.full((2, 3), 64)), "0 to 63"), (dict(prefix=torch.full((2, 3), -1)), "0 to 63"),
    (dict(prefix=torch.zeros(2, 3)), "prefix"), (dict(prefix=[[1], [2]]), "prefix is list"),
    (dict(prefix=torch.zeros(3, 2, dtype=torch.long)), r"\(2, P\)"),
    (dict(prefix=torch.zeros(2).long()), "prefix"),
    (dict(cond_mask=torch.ones(2, 3)), r"cond_mask .*\(2, 1\)"), (dict(cond=[1, 2]), "cond is list"),
    (dict(cond=torch.tensor([1, 11])), "0 to 10"), (dict(cond=torch.tensor([-1, 1])), "0 to 10"),
    (dict(cond=torch.tensor(3)), r"\(B\)"), (dict(cond=torch.tensor([1.0, 2.0])), "int64"),
    (dict(cond=7), "cond is int")])
def test_generate_refuses_at_its_door_what_it_cannot_use(gpt, settings, told):
    with pytest.raises(InputError, match=told):
        generate(gpt, **{"cond": torch.tensor([1, 2]), **settings})


def test_a_temperature_that_float32_cannot_divide_by_is_that_of_zero(gpt):
    cond = torch.tensor([1, 2])
    for temperature in (1e-300, 1e-30, 1e-12):
        assert torch.equal(generate(gpt, cond, temperature=temperature), generate(gpt, cond, temperature=0))
    assert generate(gpt, cond, top_k=10 ** 18).shape == (2, 16)


def test_batches_of_other_sizes_compile_nothing_new_and_draw_the_same(tmp_path, checkpoints, monkeypatch):
    shapes, drawn, real = [], [], torch.compile

    def count(function, **named):
        return real(function, **named, backend=lambda graph, inputs: shapes.append(graph) or graph.forward)
    torch._dynamo.reset()
    for flags in ([], ["--compile"]):
        monkeypatch.setattr(torch, "compile", count)
        main(get_args([*checkpoints, "--npz", str(tmp_path / "s.npz"), "--num-samples", "13", "--batch-size",
                       "5", "--cfg-interval", "4", *flags]))
        with np.load(tmp_path / "s.npz") as file:
            drawn.append(file["arr_0"])
    assert np.array_equal(*drawn) and len(shapes) == 3           # the probe, with guidance, without


def test_compile_without_a_compiler_is_one_line_before_anything_else(tmp_path):
    command = [sys.executable, "-c", "import sys, runs, sample, train_vq, train_gpt\n"
               "for module in (sample, train_vq, train_gpt):\n"
               "    try: runs.run(lambda args: module.main(args), lambda: module.get_args(sys.argv[1:]))\n"
               "    except SystemExit as end: print(end, file=sys.stderr)", "--compile", "--device", "cpu"]
    result = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, env=os.environ | {
        "CXX": "no-such-compiler", "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
    told = result.stderr.strip().splitlines()
    assert len(told) == 3 and all("error: --compile does not work here" in line for line in told), told


def test_before_anyone_has_trained_the_weights_that_come_along_draw_and_afterwards_the_own_ones(
        trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw = ["--device", "cpu", "--per-class", "1", "--classes", "heart"]
    main(get_args(draw))
    assert "notebooks/weights/gpt.pt" in Path(capsys.readouterr().out.splitlines()[0]).as_posix()
    assert (tmp_path / "out/samples.png").stat().st_size > 1000
    main(get_args([*draw[:4], "--prompts", "a large red heart on a white background"]))
    assert "notebooks/weights/text_gpt.pt" in Path(capsys.readouterr().out.splitlines()[0]).as_posix()
    for name in ("vq.pt", "gpt.pt"):
        shutil.copy(trained / name, tmp_path / "out" / name)
    main(get_args(draw))
    assert "notebooks" not in capsys.readouterr().out
