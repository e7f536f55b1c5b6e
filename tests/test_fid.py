"""pytest -q tests/test_fid.py      Closed forms of the metrics, the network's layout, and the command."""
import copy
import json
import os
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image

import data
import fid
import sample
import shapes
from fid import (InceptionV3, feature_statistics, fold_batch_norm, frechet_distance, get_args,
                 inception_score, main, precision_recall, resize_as_tf1, ssim)
from model import GPT, GPTConfig
from runs import InputError, weights_hash
from tokenizer import VQ_SIZES, VQConfig, VQModel, pass_size


def gaussian(D, rank=None, seed=0):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(D, rank or 2 * D))
    return rng.normal(size=D), root @ root.T / root.shape[1]


# Frechet distance

@pytest.mark.parametrize("rank", [None, 5])
def test_frechet_distance_is_zero_for_equals_and_symmetric(rank):
    a, b = gaussian(20, rank), gaussian(20, rank, seed=1)
    assert frechet_distance(*a, *a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), rel=1e-6)
    assert frechet_distance(*a, *b) > 1


@pytest.mark.filterwarnings("ignore::scipy.linalg.LinAlgWarning")
def test_the_distance_is_that_of_scipys_matrix_root():
    (mu1, sigma1), (mu2, sigma2) = gaussian(20), gaussian(20, seed=1)
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-9)


def test_inception_score_is_that_of_scipys_relative_entropy():
    logits = np.random.default_rng(0).normal(size=(50, 12)) * 3
    p = scipy.special.softmax(logits, axis=1)
    expected = np.exp(scipy.stats.entropy(p, p.mean(axis=0)[None], axis=1).mean())
    assert inception_score(logits) == pytest.approx(expected, rel=1e-9)


def test_ssim_is_that_of_scipys_gaussian_filter():
    a, b = np.random.default_rng(0).uniform(0, 255, (2, 20, 30))
    blur = lambda x: scipy.ndimage.gaussian_filter(x, 1.5, radius=5)[5:-5, 5:-5]
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ma, mb = blur(a), blur(b)
    value = ((2 * ma * mb + c1) * (2 * (blur(a * b) - ma * mb) + c2)
             / ((ma ** 2 + mb ** 2 + c1) * (blur(a * a) - ma ** 2 + blur(b * b) - mb ** 2 + c2)))
    images = (torch.from_numpy(np.stack([x] * 3))[None] for x in (a, b))
    assert ssim(*images).item() == pytest.approx(value.mean(), rel=1e-6)


def test_a_shift_adds_its_square_and_four_times_the_covariance_adds_its_trace():
    mu, sigma = gaussian(20)
    shift = np.linspace(-1, 1, 20)
    assert frechet_distance(mu, sigma, mu + shift, sigma) == pytest.approx((shift ** 2).sum(), rel=1e-9)
    assert frechet_distance(mu, 4 * sigma, mu, sigma) == pytest.approx(np.trace(sigma), rel=1e-9)


@pytest.mark.parametrize("counts", [(200, 200), (15, 200), (200, 15), (15, 10)])
def test_any_rank_gives_the_distance_that_follows_from_the_features(counts):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(counts[0], 40)) * 2, rng.normal(size=(counts[1], 40)) + 0.3
    a, b = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
    root_trace = np.linalg.svd(a @ b.T, compute_uv=False).sum()          # nuclear norm = tr sqrt(S1 S2)
    exact = ((x.mean(0) - y.mean(0)) ** 2).sum() + (a ** 2).sum() + (b ** 2).sum() - 2 * root_trace
    assert frechet_distance(*feature_statistics(x), *feature_statistics(y)) == pytest.approx(exact, rel=1e-6)


def test_statistics_are_those_of_numpy_however_large_the_mean():
    x = np.random.default_rng(0).normal(size=(5000, 7)) + 1000
    mu, sigma = feature_statistics(torch.from_numpy(x))
    assert mu.dtype == sigma.dtype == np.float64
    assert np.allclose(mu, x.mean(0), rtol=1e-12) and np.allclose(sigma, np.cov(x, rowvar=False), rtol=1e-9)
    with pytest.raises(InputError, match="at least two"):
        feature_statistics(x[:1])


def test_statistics_that_cannot_be_compared_are_refused():
    with pytest.raises(InputError, match="20 and of 10"):
        frechet_distance(*gaussian(20), *gaussian(10))
    mu, sigma = gaussian(5)
    with pytest.raises(InputError, match="NaN"):
        frechet_distance(mu, sigma * np.nan, mu, sigma)


# the other metrics

def test_inception_score_is_one_for_alike_and_the_number_of_classes_for_sure_and_balanced():
    assert inception_score(torch.ones(60, 10)) == pytest.approx(1)
    sure = 1000.0 * F.one_hot(torch.arange(60) % 10, 10)
    assert inception_score(sure) == pytest.approx(10)
    assert inception_score(sure, split_size=50) == pytest.approx(10)
    # runs of 20: the first two see 10 classes, the last, shorter one sees 5 equally often
    uneven = torch.cat([sure[:40], sure[40:45]])
    assert inception_score(uneven, split_size=20) == pytest.approx((10 + 10 + 5) / 3)


def test_precision_and_recall_follow_their_definition():
    torch.manual_seed(0)
    real, fake = torch.randn(150, 8), torch.randn(120, 8) * 0.8 + 0.2
    inside = lambda points, centres: (torch.cdist(points, centres) <= torch.cdist(centres, centres)
                                      .sort(dim=1).values[:, 3]).any(dim=1).double().mean().item()
    expected = inside(fake.double(), real.double()), inside(real.double(), fake.double())
    assert precision_recall(real, fake, block=17) == pytest.approx(expected)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1


def test_a_subset_is_precise_with_less_recall_and_far_noise_has_neither():
    torch.manual_seed(0)
    real = torch.randn(300, 4)
    assert precision_recall(real, real) == (1, 1)
    precision, recall = precision_recall(real, real[real[:, 0] > 0.5])
    assert precision == 1 and 0.2 < recall < 0.7
    assert precision_recall(real, torch.randn(300, 4) + 50) == (0, 0)
    with pytest.raises(InputError, match="more than 3"):
        precision_recall(real, real[:3])


def test_ssim_is_one_for_equals_and_has_its_closed_form_for_plain_grey():
    images = torch.rand(2, 3, 20, 30, dtype=torch.float64) * 255
    assert torch.allclose(ssim(images, images), torch.ones(2, dtype=torch.float64))
    a, b, c1 = 100.0, 140.0, (0.01 * 255) ** 2
    plain = torch.ones(1, 3, 12, 12, dtype=torch.float64)
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert ssim(a * plain, b * plain).item() == pytest.approx(expected, rel=1e-6)
    noisy = (images + 30 * torch.randn_like(images)).clamp(0, 255)
    assert (ssim(images, noisy) < 0.99).all() and torch.allclose(ssim(images, noisy), ssim(noisy, images))


# the network

@pytest.fixture(scope="module")
def inception():
    torch.manual_seed(0)
    net = InceptionV3().eval()
    for name, tensor in net.state_dict().items():
        if ".bn." in name and tensor.ndim:               # norms that do something, so that folding can fail
            tensor.uniform_(0.5, 1.5) if "weight" in name or "var" in name else tensor.normal_(std=0.1)
        elif name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(tensor)
    return net


def test_the_network_has_the_names_and_the_number_of_parameters_of_the_public_file(inception):
    names = inception.state_dict().keys()
    assert sum(p.numel() for p in inception.parameters()) == 23_850_960
    assert len(names) == 566 and sum("num_batches_tracked" not in name for name in names) == 472
    assert {"Conv2d_1a_3x3.conv.weight", "Mixed_5b.branch_pool.bn.running_var",
            "Mixed_6a.branch3x3.conv.weight", "Mixed_6e.branch7x7dbl_5.conv.weight",
            "Mixed_7a.branch7x7x3_4.bn.bias",
            "Mixed_7c.branch3x3dbl_3b.conv.weight", "fc.weight", "fc.bias"} <= names
    assert inception.Mixed_6d.branch7x7_2.conv.weight.shape == (160, 160, 1, 7)


def test_features_have_the_documented_shapes_and_folding_changes_nothing(inception):
    images = torch.randint(0, 256, (2, 3, 40, 50), dtype=torch.uint8)
    plain, folded = inception.features(images), fold_batch_norm(copy.deepcopy(inception)).features(images)
    assert {name: tuple(x.shape) for name, x in plain.items()} == {"pool": (2, 2048), "spatial": (2, 2023),
                                                                   "logits": (2, 1008)}
    for name in plain:
        assert torch.allclose(plain[name], folded[name], rtol=1e-4, atol=1e-5 * plain[name].abs().max()), name
    expected = plain["pool"] @ inception.fc.weight.T             # without the bias
    assert torch.allclose(plain["logits"], expected, rtol=1e-4, atol=1e-5)


def test_spatial_features_are_the_first_seven_channels_of_mixed_6d_row_by_row(inception):
    seen = []
    handle = inception.Mixed_6d.register_forward_hook(lambda module, args, out: seen.append(out))
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    spatial = inception.features(images)["spatial"].view(17, 17, 7)
    handle.remove()
    assert torch.equal(spatial[3, 5], seen[0][0, :7, 3, 5])


def test_pooling_does_not_count_the_padding_and_only_the_last_block_takes_the_maximum(inception):
    assert fid.average(torch.ones(1, 1, 4, 4)).min() == 1
    pools = {name: inception.get_submodule(name).branches[-1][0] for name in fid.BLOCKS}
    assert pools["Mixed_7c"] is fid.maximum and pools["Mixed_6a"] is pools["Mixed_7a"] is fid.halve
    assert sum(pool is fid.average for pool in pools.values()) == 8


@pytest.mark.parametrize("size", [(5, 7), (32, 32), (299, 299), (400, 310)])
def test_resizing_is_that_of_tensorflow_1(size):
    image = torch.rand(1, 3, *size)
    resized = resize_as_tf1(image)
    assert resized.shape == (1, 3, 299, 299)
    for i, j in ((0, 0), (0, 298), (17, 230), (298, 298), (150, 3)):
        y, x = np.float32(i) * np.float32(size[0] / 299), np.float32(j) * np.float32(size[1] / 299)
        top, left = int(y), int(x)
        bottom, right = min(top + 1, size[0] - 1), min(left + 1, size[1] - 1)
        fy, fx = float(y - top), float(x - left)
        expected = ((image[0, :, top, left] * (1 - fx) + image[0, :, top, right] * fx) * (1 - fy)
                    + (image[0, :, bottom, left] * (1 - fx) + image[0, :, bottom, right] * fx) * fy)
        assert torch.allclose(resized[0, :, i, j], expected, atol=1e-5)
    if size == (299, 299):
        assert torch.equal(resized, image)


# the command

def pictures(count, seed, size=16):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def lines_of(text):
    return {name: float(value) for name, value in (line.split(": ") for line in text.splitlines())}


def test_statistics_files_are_compared_without_a_network(tmp_path, capsys):
    for name, seed in (("a", 0), ("b", 1)):
        mu, sigma = gaussian(6, seed=seed)
        np.savez(tmp_path / f"{name}.npz", mu=mu, sigma=sigma)
    flags = [str(tmp_path / "a.npz"), str(tmp_path / "b.npz")]
    expected = frechet_distance(*gaussian(6), *gaussian(6, seed=1))
    main(get_args(flags))
    assert capsys.readouterr().out == f"FID: {expected:.4f}\n"
    main(get_args([*flags, "--json"]))
    assert json.loads(capsys.readouterr().out) == {"FID": pytest.approx(expected)}


def test_folders_npz_files_and_saved_statistics_give_the_same_numbers(tmp_path, capsys, inception):
    weights = {name: x for name, x in inception.state_dict().items() if "num_batches" not in name}
    torch.save(weights, tmp_path / "weights.pth")
    real, fake = pictures(6, 0), pictures(7, 1)
    for name, images in (("real", real), ("fake", fake)):
        (tmp_path / name / "deep").mkdir(parents=True)
        for i, pixels in enumerate(images):
            Image.fromarray(pixels).save(tmp_path / name / ("deep" if i % 2 else ".") / f"{i}.png")
    np.savez_compressed(tmp_path / "fake.npz", arr_0=fake)
    flags = ["--inception", str(tmp_path / "weights.pth"), "--device", "cpu", "--batch-size", "4"]
    main(get_args([str(tmp_path / "real"), str(tmp_path / "fake"), "--cache", *flags]))
    first = capsys.readouterr()
    assert "warning: 7 samples" in first.err
    numbers = lines_of(first.out)
    assert list(numbers) == ["FID", "sFID", "IS", "Precision", "Recall"]
    feats = [inception.features(torch.from_numpy(x).permute(0, 3, 1, 2)) for x in (real, fake)]
    for name, key in (("FID", "pool"), ("sFID", "spatial")):
        expected = frechet_distance(*feature_statistics(feats[0][key]), *feature_statistics(feats[1][key]))
        assert numbers[name] == pytest.approx(expected, rel=1e-3)
    assert numbers["IS"] == pytest.approx(inception_score(feats[1]["logits"]), abs=1e-3)
    kept = [path for path in tmp_path.iterdir() if path.name.endswith(".features.npz")]
    assert len(kept) == 2                                        # one per folder
    main(get_args([str(tmp_path / "real"), "--save-stats", str(tmp_path / "stats.npz"), *flags]))
    capsys.readouterr()
    main(get_args([str(tmp_path / "stats.npz"), str(tmp_path / "fake.npz"), *flags]))
    again = lines_of(capsys.readouterr().out)
    assert list(again) == ["FID", "sFID", "IS"]                  # no real pictures: no precision and recall
    for name in again:
        assert again[name] == pytest.approx(numbers[name], rel=2e-3)


@pytest.mark.parametrize("compressed", [False, True])
def test_an_npz_is_read_block_by_block(tmp_path, compressed):
    images = pictures(10, 0)
    (np.savez_compressed if compressed else np.savez)(tmp_path / "x.npz", arr_0=images, label=np.arange(10))
    images_found = fid.ImageSet(tmp_path / "x.npz")
    batches = list(images_found.batches(4))
    assert images_found.count == 10 and [len(batch) for batch in batches] == [4, 4, 2]
    assert np.array_equal(torch.cat(batches).permute(0, 2, 3, 1), images)


def test_wrong_input_is_one_clear_line(tmp_path, inception):
    torch.save(inception.state_dict(), tmp_path / "weights.pth")
    flags = ["--inception", str(tmp_path / "weights.pth"), "--device", "cpu"]
    good = tmp_path / "good"
    for name in ("good", "empty", "broken", "one", "sizes"):
        (tmp_path / name).mkdir()
    for i, pixels in enumerate(pictures(3, 0)):
        Image.fromarray(pixels).save(good / f"{i}.png")
    Image.fromarray(pixels).save(tmp_path / "one" / "0.png")
    (tmp_path / "broken" / "x.png").write_bytes(b"no picture")
    (tmp_path / "broken" / "y.png").write_bytes(b"no picture")
    Image.fromarray(pixels).save(tmp_path / "sizes" / "a.png")
    Image.fromarray(pixels[:9]).save(tmp_path / "sizes" / "b.png")
    (tmp_path / "text.npz").write_text("not an archive")
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{}], dtype=object))
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((3, 8, 8, 3)))
    np.savez(tmp_path / "nothing.npz", other=np.zeros(3))
    np.savez(tmp_path / "nan.npz", mu=np.full(2048, np.nan), sigma=np.eye(2048))
    for name, message in (("empty", "holds no pictures"), ("broken", "x.png cannot be read"),
                          ("one", "one picture"), ("sizes", "b.png is 16x9 pixels"),
                          ("text.npz", "neither a folder"), ("objects.npz", "uint8"), ("floats.npz", "uint8"),
                          ("nothing.npz", "neither arr_0 nor mu"), ("nan.npz", "NaN"),
                          ("absent", "not exist")):
        with pytest.raises(InputError, match=message) as error:
            main(get_args([str(good), str(tmp_path / name), *flags]))
        assert "\n" not in str(error.value), name


@pytest.fixture
def offline(tmp_path, monkeypatch):
    def refuse(*args, **named):
        raise OSError("no network")
    monkeypatch.setattr(data.torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")


def test_without_weights_or_network_one_line_says_what_to_fetch(tmp_path, offline):
    np.savez(tmp_path / "x.npz", arr_0=pictures(3, 0))
    with pytest.raises(InputError, match="pt_inception-2015-12-05-6726825d.pth and put it into"):
        main(get_args([str(tmp_path / "x.npz"), str(tmp_path / "x.npz")]))


# the classifier, reconstructions, the sweep

@pytest.fixture
def small_world(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    return ["--limit", "600", "--device", "cpu"]


def test_the_classifier_recognises_real_pictures_and_not_wrong_labels(tmp_path, capsys, small_world):
    images, labels, _ = data.load_array("shapes", "test", 400)
    np.savez(tmp_path / "real.npz", arr_0=images, label=labels)
    np.savez(tmp_path / "wrong.npz", arr_0=images, label=(labels + 1) % 10)
    results = []
    for name in ("real", "wrong"):
        main(get_args(["shapes", str(tmp_path / f"{name}.npz"), "--limit", "4000", "--device", "cpu"]))
        captured = capsys.readouterr()
        assert "cannot be compared with published" in captured.err
        results.append(lines_of(captured.out))
    real, wrong = results
    assert real["Class accuracy"] > 0.4 and real["Class accuracy"] > wrong["Class accuracy"] + 0.3
    assert real["Real test accuracy"] == pytest.approx(real["Class accuracy"], abs=0.15)
    assert real["FID-classifier"] == wrong["FID-classifier"]                  # it does not look at labels
    assert real["Recall-classifier"] > 0.5 and 0 <= real["Class accuracy of circle"] <= 1
    assert len(list((tmp_path / "cache" / "classifier").iterdir())) == 1      # trained once


def test_reconstruction_agrees_with_formulas_written_out_and_leaves_out_what_it_cannot_have(
        tmp_path, capsys, small_world, offline):
    vq = VQModel(VQConfig(**VQ_SIZES["VQ-tiny"])).eval()
    torch.save({"model": vq.state_dict(), "config": dict(vars(vq.config)), "image_size": 32},
               tmp_path / "vq.pt")
    main(get_args(["--recon", str(tmp_path / "vq.pt"), *small_world]))
    captured = capsys.readouterr()
    assert "rFID is left out" in captured.err
    numbers = lines_of(captured.out)
    real = data.load_array("shapes", "test", 600)[0].astype(np.float64)                  # (M, H, W, 3)
    with torch.no_grad():
        tokens = vq.tokenize(torch.from_numpy(real).float().permute(0, 3, 1, 2) / 127.5 - 1)
        recon = np.trunc(np.clip(vq.detokenize(tokens).numpy() * 127.5 + 128, 0, 255)).transpose(0, 2, 3, 1)
    psnr = (10 * np.log10(255 ** 2 / ((real - recon) ** 2).mean(axis=(1, 2, 3)))).mean()
    share = np.unique(tokens, return_counts=True)[1] / tokens.numel()
    entropy = scipy.stats.entropy(share)                         # nats
    assert numbers["Outline"] < 0.2 and numbers["Outline (real)"] > 0.95
    assert "rFID" not in numbers and numbers["PSNR"] == pytest.approx(psnr, abs=1e-3)
    assert numbers["Codebook usage"] == pytest.approx(len(share) / 512, abs=1e-4)
    assert numbers["Codebook perplexity"] == pytest.approx(np.exp(entropy), rel=1e-3)
    assert numbers["Codebook entropy"] == pytest.approx(entropy / np.log(2), rel=1e-3)
    main(get_args(["--recon", str(tmp_path / "vq.pt"), "--features", "classifier", *small_world]))
    assert lines_of(capsys.readouterr().out)["rFID-classifier"] > 0


@pytest.fixture
def models(tmp_path, monkeypatch, small_world):
    """Flags of a tiny tokenizer and a tiny GPT; models(text, **args): what the GPT says of its training."""
    for module in (data, shapes):
        monkeypatch.setattr(module, "SHAPES_COUNT", {"train": 200, "test": 200})
    vq = VQModel(VQConfig(**VQ_SIZES["VQ-tiny"]))
    torch.save({"model": vq.state_dict(), "config": dict(vars(vq.config))}, tmp_path / "vq.pt")

    def save(text=False, **args):
        gpt = GPT(GPTConfig(dim=64, n_layer=2, n_head=4, vocab_size=512, block_size=64, num_classes=10,
                            model_type="t2i" if text else "c2i"))
        torch.save({"model": gpt.state_dict(), "config": dict(vars(gpt.config)), "vq_hash": weights_hash(vq),
                    "class_names": list(data.KINDS), "args": args}, tmp_path / "gpt.pt")
        return ["--gpt", str(tmp_path / "gpt.pt"), "--vq", str(tmp_path / "vq.pt"), "--device", "cpu",
                "--out", str(tmp_path / "out" / "sweep.csv")]
    return save


def test_a_sweep_compares_with_real_pictures_and_with_reconstructions_at_equal_counts_and_temperature_1(
        tmp_path, monkeypatch, models):
    counts, temperatures, draw = [], [], sample.main
    monkeypatch.setattr(sample, "main", lambda args: (temperatures.append(args.temperature), draw(args)))
    measured = fid.precision_recall
    monkeypatch.setattr(fid, "precision_recall", lambda real, fake: counts.append((len(real), len(fake)))
                        or measured(real, fake))
    main(get_args(["--sweep", "0", "1.5", "3", "--num-samples", "20", "--cfg-schedule", "linear",
                   *models(data="shapes")]))
    rows = (tmp_path / "out" / "sweep.csv").read_text().splitlines()
    metrics = ["FID-classifier", "Precision-classifier", "Recall-classifier"]
    assert rows[0].split(",") == ["cfg_scale", "Real test accuracy", "Class accuracy", "Outline", *metrics,
                                  *(f"{name} (reconstructions)" for name in metrics)]
    assert [row.split(",")[0] for row in rows[1:]] == ["0.0", "1.5", "3.0"]
    assert counts == [(20, 20)] * 6 and temperatures == [1.0] * 3
    assert Image.open(tmp_path / "out" / "sweep.png").width == 5 * 300
    with np.load(tmp_path / "out" / "sweep" / "cfg_1.5.npz") as file:
        assert file["arr_0"].shape == (20, 32, 32, 3)


@pytest.mark.parametrize("args", [{"data": "/pictures"}, {"data": "shapes", "codes": "/codes"}, {}])
def test_a_sweep_of_a_model_that_names_no_known_data_set_asks_for_the_real_pictures(models, args):
    with pytest.raises(InputError, match="give REF"):
        main(get_args(["--sweep", "1", *models(**args)]))


def test_a_sweep_takes_its_data_set_from_the_checkpoint_unless_one_is_given(models, monkeypatch):
    asked = []

    def note(args, device, *rest):
        asked.append(args.ref)
        raise InputError("enough")
    monkeypatch.setattr(fid, "Judged", note)
    monkeypatch.setattr(fid, "draw", lambda *args: None)
    for ref in ([], ["cifar10"]):
        with pytest.raises(InputError, match="enough"):
            main(get_args([*ref, "--sweep", "1", *models(data="mnist")]))
    assert asked == ["mnist", "cifar10"]


def test_under_torchrun_only_the_first_process_measures_and_writes(tmp_path, models, monkeypatch, capsys):
    flags = ["--sweep", "1", "2", "--num-samples", "5", *models(data="shapes")]
    drawn = []
    monkeypatch.setattr(fid, "draw", lambda args, path, *rest: drawn.append(path))     # and no file is there
    monkeypatch.setattr(fid, "rank_and_world", lambda: (1, 2))
    main(get_args(flags))
    assert len(drawn) == 2 and not (tmp_path / "out" / "sweep.csv").exists()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("text, args", [(False, {"data": "shapes"}), (True, {"data": "/pictures"}),
                                        (True, {})])
def test_alignment_refuses_a_model_that_was_not_trained_on_captions_of_shapes(models, text, args):
    with pytest.raises(InputError, match="captions of shapes"):
        main(get_args(["--alignment", "2", *models(text, **args)]))


def test_alignment_measures_each_group_of_captions_by_its_own_pictures(tmp_path, models, monkeypatch, capsys):
    asked = []

    def write(args, path, *rest):
        words = open(rest[1], encoding="utf-8").read().splitlines()
        pixels = np.arange(len(words), dtype=np.uint8)[:, None, None, None] + np.zeros((1, 8, 8, 3), np.uint8)
        np.savez(path, arr_0=pixels, prompt=np.array(words))

    def note(images, captions):
        asked.append((images[:, 0, 0, 0].tolist(), captions))
        return {"Kind": 0.5}
    monkeypatch.setattr(fid, "draw", write)
    monkeypatch.setattr(fid, "agreement", note)
    main(get_args(["--alignment", "3", *models(True, data="shapes")]))
    assert [place for place, _ in asked] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    found = [[fid.parse_caption(caption) for caption in captions] for _, captions in asked]
    assert [["shapes" in item for item in items] for items in found] == [[two] * 3 for two in (0, 1, 0, 1)]
    held = [[any(map(shapes.held_out, item.get("shapes", [item]))) for item in items] for items in found]
    assert held == [[False] * 3] * 2 + [[True] * 3] * 2
    assert capsys.readouterr().out.splitlines()[3] == ("3 pictures of two shapes, held-out combinations: "
                                                       "Kind 50.0%")


# bounded, remembered, whole

@pytest.mark.parametrize("side", [16, 2048])
def test_networks_see_few_large_pictures_at_a_time(tmp_path, side):
    seen, count = [], 3 if side > 1000 else 70

    class Net:
        def features(self, images):
            seen.append(len(images))
            return {"pool": images.float().mean(dim=(2, 3))}
    images = torch.zeros(1, 3, 1, 1, dtype=torch.uint8).expand(count, 3, side, side)
    found = fid.stack_features(Net(), [images], count, "cpu", "x")
    assert sum(seen) == len(found["pool"]) == count and max(seen) <= pass_size(side, side)
    np.savez_compressed(tmp_path / "x.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    read = [len(batch) for batch in fid.ImageSet(tmp_path / "x.npz").batches(64)]
    assert sum(read) == count and max(read) <= pass_size(side, side)


def test_a_second_comparison_in_one_process_uses_its_own_network_and_the_files_as_they_are_now(
        tmp_path, capsys, monkeypatch):
    class Net:
        def __init__(self, factor):
            self.factor = factor

        def features(self, images):
            pool = images.float().mean(dim=(2, 3)) * self.factor
            return {"pool": pool, "spatial": pool, "logits": pool}
    monkeypatch.setattr(fid, "load_inception", lambda path, *rest: Net(float(path)))
    for name, seed in (("a", 0), ("b", 1), ("c", 2)):
        np.savez(tmp_path / f"{name}.npz", arr_0=pictures(9, seed))
    flags = [str(tmp_path / "a.npz"), str(tmp_path / "b.npz"), "--device", "cpu", "--inception"]

    def measured(factor):
        main(get_args([*flags, factor]))
        return lines_of(capsys.readouterr().out)["FID"]
    once = measured("1")
    assert measured("2") == pytest.approx(4 * once, rel=1e-3)    # twice the features, four times the distance
    (tmp_path / "c.npz").replace(tmp_path / "a.npz")
    assert measured("1") != pytest.approx(once, rel=1e-3)


def test_saved_statistics_get_exactly_the_name_given_and_are_never_half_written(tmp_path, monkeypatch):
    mu, sigma = gaussian(6)
    np.savez(tmp_path / "a.npz", mu=mu, sigma=sigma)
    flags = [str(tmp_path / "a.npz"), "--device", "cpu", "--save-stats"]
    main(get_args([*flags, str(tmp_path / "stats")]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "stats"]
    before = (tmp_path / "stats").read_bytes()

    def killed(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(np, "savez", killed)
    with pytest.raises(KeyboardInterrupt):
        main(get_args([*flags, str(tmp_path / "stats")]))
    assert (tmp_path / "stats").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "stats"]


def test_a_damaged_file_of_the_cache_is_made_again(tmp_path, monkeypatch, capsys):
    class Net(torch.nn.Linear):
        def features(self, images):
            pool = images.float().mean(dim=(2, 3))
            return {"pool": pool, "spatial": pool, "logits": pool}
    net = Net(2, 2)
    np.savez(tmp_path / "a.npz", arr_0=pictures(9, 0))
    args = get_args([str(tmp_path / "a.npz"), "x", "--cache"])
    first = fid.ImageSet(tmp_path / "a.npz").features(net, "cpu", args)
    kept, = tmp_path.glob("*.features.npz")
    for damage in (b"", kept.read_bytes()[:300]):
        kept.write_bytes(damage)
        again = fid.ImageSet(tmp_path / "a.npz").features(net, "cpu", args)
        assert all(torch.equal(again[name], first[name]) for name in first)
        assert "made again" in capsys.readouterr().err
    monkeypatch.setattr(fid, "stack_features", None)             # now whole again: nothing is computed
    assert torch.equal(fid.ImageSet(tmp_path / "a.npz").features(net, "cpu", args)["pool"], first["pool"])


@pytest.mark.parametrize("count", [1, 10, 30])
def test_a_classifier_learns_from_however_few_pictures(tmp_path, monkeypatch, capsys, count):
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    torch.manual_seed(0)
    untrained = fid.Classifier(10)
    few = SimpleNamespace(images=images, labels=torch.arange(count) % 10, class_names=list(data.KINDS))
    train = lambda: fid.train_classifier(few, "cpu")
    net = train()
    assert not torch.equal(net.head.weight, untrained.head.weight)
    kept, = (tmp_path / "cache" / "classifier").iterdir()
    kept.write_bytes(b"damaged")
    again = train()
    assert torch.equal(net.head.weight, again.head.weight) and "made again" in capsys.readouterr().err


# agreement with captions

def test_captions_of_shapes_are_parsed_back_into_what_was_drawn():
    _, items = data.captioned_shapes("test", 200)
    for item in items:
        found = fid.parse_caption(item["caption"])
        assert found["background"] == item["background"] and found.get("relation") == item.get("relation")
        assert found.get("size") == item.get("size")
        for a, b in zip(found.get("shapes", [found]), item.get("shapes", [item]), strict=True):
            assert (a["kind"], a["colour"]) == (b["kind"], b["colour"])
    for wrong in ("a red star", "a large red dog on a navy background", "a red star on a lilac background"):
        with pytest.raises(InputError, match="not a caption of shapes"):
            fid.parse_caption(wrong)


def test_a_wrong_word_of_a_caption_lowers_its_own_figure_and_no_other():
    def shares(caption, *items):
        images = torch.from_numpy(shapes.render(items, 32)).permute(0, 3, 1, 2)
        return fid.agreement(images, [item["caption"] for item in items[:-1]] + [caption])
    one = shapes.shape_attributes("test", 0)
    two = next(item for item in (shapes.scene_attributes("test", i) for i in range(99))
               if item["relation"] == "left of" and len({s["kind"] for s in item["shapes"]}) == 2)
    figures = {"Kind": 1, "Colour": 1, "Background": 1, "Size": 1, "Order": 1, "Everything": 1}
    other = lambda words, word: next(name for name in words if name != word)
    kinds, colours = ([s[word] for s in two["shapes"]] for word in ("kind", "colour"))
    third = next(kind for kind in shapes.KINDS if kind not in kinds)
    colour = next(colour for colour in shapes.COLOURS if colour not in colours)
    assert shares(two["caption"], one, two) == figures
    for figure, share, old, new in [
            ("Kind", 2 / 3, " " + kinds[1] + " on", " " + third + " on"),
            ("Colour", 2 / 3, colours[0] + " " + kinds[0], colour + " " + kinds[0]),
            ("Background", 1 / 2, two["background"], other(shapes.BACKGROUNDS, two["background"])),
            ("Order", 0, "left of", "right of"), ("Order", 0, "left of", "above")]:
        wrong = two["caption"].replace(old, new)
        assert wrong != two["caption"]
        expected = figures | {figure: share, "Everything": 1 / 2}
        assert shares(wrong, one, two) == pytest.approx(expected), figure
    wrong = one["caption"].replace(one["size"], other(shapes.SIZES, one["size"]))
    assert shares(wrong, two, one) == pytest.approx(figures | {"Size": 0, "Everything": 1 / 2})


def test_pictures_without_shapes_agree_with_no_caption():
    captions = ["a large red star on a black background",
                "a red star above a blue ring on a black background"]
    for value in (0, 18):
        shares = fid.agreement(torch.full((2, 3, 32, 32), value, dtype=torch.uint8), captions)
        assert shares == {"Kind": 0, "Colour": 0, "Background": 1, "Size": 0, "Order": 0, "Everything": 0}


def test_outlines_of_samples_real_pictures_and_reconstructions_are_printed_side_by_side(
        tmp_path, capsys, models):
    images, labels, _ = data.load_array("shapes", "test", 60)
    labels[:30] = (labels[:30] + 5) % 10
    np.savez(tmp_path / "half.npz", arr_0=images, label=labels)
    *_, vq = flags = models(data="shapes")[2:6]
    main(get_args(["shapes", str(tmp_path / "half.npz"), "--limit", "200", *flags]))
    found = lines_of(capsys.readouterr().out)
    assert found["Outline"] == 0.5 and found["Outline (real)"] > 0.95
    assert found["Outline (reconstructions)"] < 0.2              # of a tokenizer that has not been trained
    assert found["Outline of star"] == pytest.approx(np.mean([i >= 30 for i in np.flatnonzero(labels == 5)]),
                                                     abs=1e-4)


def test_an_empty_file_among_pictures_is_one_clear_line_with_the_cache_too(tmp_path, inception):
    torch.save(inception.state_dict(), tmp_path / "weights.pth")
    (tmp_path / "set").mkdir()
    for i, pixels in enumerate(pictures(2, 0)):
        Image.fromarray(pixels).save(tmp_path / "set" / f"{i}.png")
    (tmp_path / "set" / "2.png").write_bytes(b"")
    with pytest.raises(InputError, match="2.png cannot be read"):
        main(get_args([str(tmp_path / "set"), str(tmp_path / "set"), "--cache", "--device", "cpu",
                       "--inception", str(tmp_path / "weights.pth")]))


# files of other people

class Tiny(torch.nn.Linear):
    """Stands for Inception: the mean colour is its feature."""

    def __init__(self, *args):
        super().__init__(2, 2)

    def features(self, images):
        pool = images.float().mean(dim=(2, 3))
        return {"pool": pool, "spatial": pool, "logits": pool}


def rewritten(path, member, change):
    """The .npz with the bytes of one member changed and the archive whole: its checksums are right."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, change(content) if name == member else content)


STATS = dict(mu=np.zeros(3), sigma=np.eye(3))


@pytest.mark.parametrize("arrays, message", [
    ({"arr_0": np.zeros((0, 16, 16, 3), np.uint8)}, "uint8"),
    ({"arr_0": np.zeros((5, 0, 16, 3), np.uint8)}, "uint8"),
    ({"arr_0": np.asfortranarray(pictures(5, 0))}, "C order"), ({"arr_0": pictures(5, 0)[0]}, "uint8"),
    ({"label": np.arange(4)}, "label"), ({"label": np.arange(5.0)}, "label"),
    ({"label": np.array(list("abcde"))}, "label"), ({"label": np.zeros((5, 1), int)}, "label"),
    ({"label": np.int64(3)}, "len()"), ({"label": np.array([None] * 5)}, "label"),
    ({"label": np.zeros(0, int)}, "label"), ({"prompt": np.array(["a"] * 6)}, "prompt"),
    ({"prompt": np.array([b"\xff"] * 5)}, "prompt"),
    (STATS | {"mu": np.zeros(4)}, "sigma"), (STATS | {"sigma": np.eye(3)[:2]}, "sigma"),
    (STATS | {"sigma": np.zeros(3)}, "sigma"), (STATS | {"mu": np.zeros((3, 1))}, "mu"),
    (STATS | {"mu": np.zeros(3, complex)}, "mu"), (STATS | {"mu": np.array(list("abc"))}, "mu"),
    (STATS | {"mu": np.array([0, np.inf, 0])}, "NaN"),
    (STATS | {"mu_s": np.zeros(3), "sigma_s": np.eye(2)}, "sigma_s"),
    (dict(mu=np.zeros(0), sigma=np.zeros((0, 0))), "mu"),
    (STATS | {"mu": np.array([None] * 3)}, "mu"), (STATS | {"mu": np.float64(3)}, "len()")])
def test_arrays_that_do_not_belong_together_are_refused_when_the_file_is_opened(tmp_path, arrays, message):
    arrays = arrays if "mu" in arrays else {"arr_0": pictures(5, 0)} | arrays
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputError) as error:
        fid.ImageSet(tmp_path / "x.npz")
    assert message in str(error.value) and "x.npz" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["uint8", "uint64", ">i4", "bool"])
def test_labels_of_any_whole_type_are_read(tmp_path, dtype):
    np.savez(tmp_path / "x.npz", arr_0=pictures(5, 0), label=np.array([0, 1, 1, 0, 1]).astype(dtype))
    label = fid.ImageSet(tmp_path / "x.npz").stored["label"]
    assert label.dtype == np.int64 and torch.from_numpy(label).tolist() == [0, 1, 1, 0, 1]


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_header_is_read(tmp_path, version):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array(file, pictures(5, 0), version)
    found = torch.cat(list(fid.ImageSet(tmp_path / "x.npz").batches(2)))
    assert np.array_equal(found.permute(0, 2, 3, 1), pictures(5, 0))


@pytest.mark.parametrize("member", ["arr_0.npy", "label.npy"])
@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: x[:100], lambda x: x[:5], lambda x: b"",
                                    lambda x: b"text" + x])
def test_arrays_shorter_than_their_header_says_are_refused(tmp_path, member, change):
    np.savez(tmp_path / "x.npz", arr_0=pictures(5, 0), label=np.arange(5))
    rewritten(tmp_path / "x.npz", member, change)
    with pytest.raises(InputError, match="x.npz"):
        fid.ImageSet(tmp_path / "x.npz")


def test_pictures_longer_than_their_header_says_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=pictures(5, 0))
    rewritten(tmp_path / "x.npz", "arr_0.npy", lambda x: x + b"0")
    with pytest.raises(InputError, match="no whole"):
        fid.ImageSet(tmp_path / "x.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_one_damaged_byte_anywhere_or_a_cut_is_one_line_or_changes_nothing(tmp_path, save):
    path, pixels = tmp_path / "x.npz", pictures(4, 0, size=4)
    save(path, arr_0=pixels, label=np.arange(4), mu=np.zeros(2), sigma=np.eye(2))
    whole = path.read_bytes()
    damaged = [whole[:i] + bytes([whole[i] ^ 255]) + whole[i + 1:] for i in range(0, len(whole), 3)]
    refused = 0
    for content in damaged + [whole[:i] for i in range(0, len(whole), 17)]:
        path.write_bytes(content)
        try:
            found = fid.ImageSet(path)
            if found.count:
                assert np.array_equal(torch.cat(list(found.batches(3))).permute(0, 2, 3, 1), pixels)
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 250


@pytest.mark.parametrize("write", [lambda path: np.save(path.open("wb"), pictures(5, 0)),
                                   lambda path: path.write_text("0 1 2"), lambda path: path.write_bytes(b""),
                                   lambda path: Image.new("RGB", (16, 16)).save(path, "PNG")])
def test_a_file_that_is_no_archive_is_one_line(tmp_path, write):
    write(tmp_path / "x.npz")
    with pytest.raises(InputError, match="neither a folder of pictures nor an .npz"):
        fid.ImageSet(tmp_path / "x.npz")


def test_numbers_too_large_for_a_distance_are_one_line():
    with pytest.raises(InputError, match="no distance"):
        frechet_distance(np.zeros(3), 1e300 * np.eye(3), np.zeros(3), 1e300 * np.eye(3))


@pytest.mark.parametrize("name", [".", "..", "folder/.", b"\xff"])
def test_features_are_kept_beside_a_folder_of_any_name(tmp_path, monkeypatch, name):
    folder = tmp_path / "folder" / (os.fsdecode(name) if isinstance(name, bytes) else "set")
    (folder / "folder").mkdir(parents=True)
    for i, pixels in enumerate(pictures(4, 0)):
        Image.fromarray(pixels).save(folder / "folder" / f"{i}.png")
    monkeypatch.chdir(folder / "folder" if name == ".." else folder)
    ref = str(folder) if isinstance(name, bytes) else name
    monkeypatch.setattr(fid, "load_inception", Tiny)
    main(get_args([ref, ref, "--cache", "--device", "cpu"]))
    kept, = tmp_path.rglob("*.features.npz")
    assert kept.parent == (folder if name == "folder/." else folder.parent)


@pytest.mark.parametrize("module, name", [(fid.np, "savez"), (fid.Path, "mkdir")])
def test_features_that_cannot_be_kept_are_used_and_a_warning_says_so(tmp_path, monkeypatch, capsys, module,
                                                                     name):
    np.savez(tmp_path / "x.npz", arr_0=pictures(5, 0))
    monkeypatch.setattr(fid, "load_inception", Tiny)

    def full(*args, **named):                                    # as the disk would, in the middle of writing
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(module, name, full)
    main(get_args([str(tmp_path / "x.npz"), str(tmp_path / "x.npz"), "--cache", "--device", "cpu"]))
    found = capsys.readouterr()
    assert "is not kept" in found.err and "No space left" in found.err and lines_of(found.out)["FID"] < 1e-6


def test_statistics_are_saved_into_a_new_folder_but_never_over_what_is_read(tmp_path, monkeypatch):
    np.savez(tmp_path / "x.npz", arr_0=pictures(5, 0))
    monkeypatch.setattr(fid, "load_inception", Tiny)
    flags = [str(tmp_path / "x.npz"), "--device", "cpu", "--save-stats"]
    main(get_args([*flags, str(tmp_path / "new" / "deep" / "stats")]))
    assert np.load(tmp_path / "new" / "deep" / "stats")["sigma"].shape == (3, 3)
    monkeypatch.chdir(tmp_path)
    before = (tmp_path / "x.npz").read_bytes()
    for target in (".", str(tmp_path), "x.npz", "new/../x.npz"):
        with pytest.raises(InputError, match="is a folder|give another name"):
            main(get_args([*flags, target]))
    assert (tmp_path / "x.npz").read_bytes() == before


@pytest.mark.parametrize("out", ["sweep", "sweep.png", ".", "", "gpt.pt"])
def test_a_table_without_an_ending_or_over_a_model_is_refused_before_drawing(models, monkeypatch, tmp_path,
                                                                             out):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fid, "draw", None)
    with pytest.raises(InputError, match="ends in .csv|is a folder"):
        main(get_args(["--sweep", "1", *models(data="shapes"), "--out", out]))


@pytest.mark.parametrize("scales", [["1"], ["1", "1"], ["-1"]])
def test_curves_are_drawn_for_one_scale_and_for_equal_ones(models, tmp_path, scales):
    main(get_args(["--sweep", *scales, "--num-samples", "5", *models(data="shapes")]))
    assert len((tmp_path / "out" / "sweep.csv").read_text().splitlines()) == 1 + len(scales)


@pytest.mark.parametrize("shape, stored, message", [
    ((5, 8, 8, 3), {"label": np.arange(5)}, "16 x 16"), ((5, 16, 32, 3), {"label": np.arange(5)}, "square"),
    ((5, 8, 8, 3), {"prompt": np.array(["a large red star on a navy background"] * 5)}, "16 x 16"),
    ((5, 32, 32, 3), {"label": np.arange(7, 12)}, "from 7 to 11"),
    ((5, 32, 32, 3), {"label": np.arange(-1, 4)}, "-1"),
    ((5, 32, 32, 3), {"prompt": np.array(["a dog"] * 5)}, "not a caption"),
    ((1, 32, 32, 3), {"label": [3]}, "at least two"),
    ((5, 32, 32, 3), {}, "label")])
def test_samples_that_a_judge_cannot_read_are_one_line(tmp_path, models, monkeypatch, shape, stored, message):
    models()
    np.savez(tmp_path / "x.npz", arr_0=np.zeros(shape, np.uint8), **stored)
    with pytest.raises(InputError, match=message):
        main(get_args(["shapes", str(tmp_path / "x.npz"), "--limit", "20", "--device", "cpu"]))


@pytest.mark.parametrize("flags, message", [
    (["--image-size", "30"], "not a multiple"), (["--image-size", "3"], "not a multiple"),
    (["--image-size", "8", "--features", "classifier"], "16 x 16"), (["--image-size", "8"], "11 x 11"),
    (["--limit", "1", "--image-size", "32", "--features", "classifier"], "at least two"),
    (["--data", "mnist", "--image-size", "64"], "32x32")])
def test_reconstructions_that_cannot_be_measured_are_one_line(tmp_path, models, offline, flags, message):
    models()
    with pytest.raises(InputError, match=message):
        main(get_args(["--recon", str(tmp_path / "vq.pt"), "--device", "cpu", *flags]))
