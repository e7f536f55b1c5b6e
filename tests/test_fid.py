"""pytest -q tests/test_fid.py      Closed forms of the metrics, the network's layout, and the command."""
import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import fid
import sample
from fid import (InceptionV3, feature_statistics, fold_batch_norm, frechet_distance, get_args,
                 inception_score, main, precision_recall, resize_as_tf1, ssim)
from model import GPT, GPTConfig
from tokenizer import VQ_SIZES, InputError, VQConfig, VQModel, weights_hash
from train_vq import evaluate


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
    assert fid.average_pool(torch.ones(1, 1, 4, 4)).min() == 1
    assert [inception.Mixed_7b.max_pool, inception.Mixed_7c.max_pool] == [False, True]


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
    fid.open_set.cache_clear()
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
    fid.open_set.cache_clear()
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
    count, batches = fid.npz_images(tmp_path / "x.npz", 4)
    batches = list(batches)
    assert count == 10 and [len(batch) for batch in batches] == [4, 4, 2]
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
    monkeypatch.setattr(data.urllib.request, "urlopen", refuse)
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")


def test_without_weights_or_network_one_line_says_what_to_fetch(tmp_path, offline):
    np.savez(tmp_path / "x.npz", arr_0=pictures(3, 0))
    with pytest.raises(InputError, match="pt_inception-2015-12-05-6726825d.pth and put it into"):
        main(get_args([str(tmp_path / "x.npz"), str(tmp_path / "x.npz")]))


# the classifier, reconstructions, the sweep

@pytest.fixture
def small_world(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    fid.classifier_reference.cache_clear()
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
    assert real["Recall-classifier"] > 0.5 and "  circle" in real
    assert len(list((tmp_path / "cache" / "classifier").iterdir())) == 1      # trained once


def test_reconstruction_agrees_with_the_training_script_and_leaves_out_what_it_cannot_have(
        tmp_path, capsys, small_world, offline):
    vq = VQModel(VQConfig(**VQ_SIZES["VQ-tiny"])).eval()
    torch.save({"model": vq.state_dict(), "config": dict(vars(vq.config)), "image_size": 32},
               tmp_path / "vq.pt")
    main(get_args(["--recon", str(tmp_path / "vq.pt"), *small_world]))
    captured = capsys.readouterr()
    assert "rFID is left out" in captured.err
    numbers = lines_of(captured.out)
    psnr, usage, perplexity = evaluate(vq, data.ArrayData("shapes", "test", 32, 600), "cpu", 64)
    assert "rFID" not in numbers and numbers["PSNR"] == pytest.approx(psnr, abs=1e-3)
    assert numbers["Codebook usage"] == pytest.approx(usage, abs=1e-4)
    assert 2 ** numbers["Codebook entropy"] == pytest.approx(numbers["Codebook perplexity"], rel=1e-3)
    main(get_args(["--recon", str(tmp_path / "vq.pt"), "--features", "classifier", *small_world]))
    assert lines_of(capsys.readouterr().out)["rFID-classifier"] > 0


def test_a_sweep_writes_its_table_and_its_curves(tmp_path, monkeypatch, small_world):
    vq = VQModel(VQConfig(**VQ_SIZES["VQ-tiny"]))
    gpt = GPT(GPTConfig(dim=64, n_layer=2, n_head=4, vocab_size=512, block_size=64, num_classes=10))
    torch.save({"model": vq.state_dict(), "config": dict(vars(vq.config))}, tmp_path / "vq.pt")
    torch.save({"model": gpt.state_dict(), "config": dict(vars(gpt.config)), "vq_hash": weights_hash(vq),
                "class_names": list(data.KINDS)}, tmp_path / "gpt.pt")
    monkeypatch.setattr(data, "SHAPES_COUNT", {"train": 200, "test": 200})
    sample.main(sample.get_args(["--gpt", str(tmp_path / "gpt.pt"), "--vq", str(tmp_path / "vq.pt"),
                                 "--out", str(tmp_path / "out" / "x.png"), "--num-samples", "20",
                                 "--sweep", "0,1.5,3", "--device", "cpu"]))
    rows = (tmp_path / "out" / "sweep.csv").read_text().splitlines()
    assert rows[0].startswith("cfg_scale,Real test accuracy,Class accuracy,FID-classifier")
    assert [row.split(",")[0] for row in rows[1:]] == ["0.0", "1.5", "3.0"]
    assert Image.open(tmp_path / "out" / "sweep.png").width == 4 * 300
    with np.load(tmp_path / "out" / "sweep" / "cfg_1.5.npz") as file:
        assert file["arr_0"].shape == (20, 32, 32, 3)


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


def test_agreement_counts_what_was_read_and_tells_order_from_presence(monkeypatch):
    captions = ["a large red star on a navy background", "a small blue ring on a white background",
                "a red star left of a blue ring on a navy background",
                "a blue ring right of a red star on a navy background",
                "a red star above a blue ring on a navy background"]
    read = list(captions)
    read[1] = "a large blue ring on a black background"          # size and background wrong
    read[4] = "a blue ring above a green star on a navy background"      # swapped, one colour wrong
    reader = fid.AttributeReader(32)
    answers = [reader.answers(fid.parse_caption(caption)) for caption in read]
    one_hot = [torch.cat([F.one_hot(torch.tensor(max(answer, 0)), len(words)).float()
                          for answer, words in zip(row, reader.HEADS.values())]) for row in answers]
    assert reader.answers(fid.parse_caption(captions[2])) == reader.answers(fid.parse_caption(captions[3]))
    monkeypatch.setattr(reader, "features", lambda images: {"logits": torch.stack(one_hot)})
    monkeypatch.setattr(fid, "train_reader", lambda device, side: reader)
    shares = fid.agreement(torch.zeros(5, 3, 32, 32, dtype=torch.uint8), captions, "cpu")
    assert shares == pytest.approx({"Kind": 1, "Colour": 7 / 8, "Background": 4 / 5, "Size": 1 / 2,
                                    "Order": 2 / 3})


def test_the_reader_learns_from_its_answers():
    images, items = data.captioned_shapes("train", 48)
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    targets = torch.tensor([fid.AttributeReader.answers(item) for item in items])
    reader = fid.AttributeReader(32).train()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = reader.loss(reader(data.to_float(images))[1], targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
