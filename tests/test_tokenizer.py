"""pytest -q tests/test_tokenizer.py"""
import argparse
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

import tokenizer
from runs import InputError, read_checkpoint, weights_hash
from tokenizer import (VQ_SIZES, VectorQuantizer, VQConfig, VQModel, load_tokenizer, pass_size, to_float,
                       to_pictures, to_uint8, tokenize_in_passes)

TINY = dict(codebook_size=64, ch=32, ch_mult=(1, 2), z_channels=32)


def test_tokens_reconstruction_and_losses_equal_the_official_code(golden):
    arrays, weights = golden("vq")
    vq = VQModel(VQConfig(**TINY)).eval()
    vq.load_state_dict(weights)
    tokens = vq.tokenize(arrays["images"])
    assert torch.equal(tokens, arrays["tokens"])
    assert (vq.detokenize(tokens) - arrays["recon"]).abs().max() < 1e-4
    recon, tokens, losses = vq(arrays["images"])
    assert torch.equal(tokens, arrays["tokens"])
    assert (recon - arrays["recon_train"]).abs().max() < 1e-4
    assert abs(losses["codebook"].item() - arrays["vq_loss"].item()) < 1e-6
    assert abs(losses["commitment"].item() - arrays["commit_loss"].item()) < 1e-6
    assert losses["entropy"].item() == 0


@pytest.mark.parametrize("size, parameters, entries", [("VQ-16", 71_883_403, 344), ("VQ-8", 70_109_835, 300)])
def test_released_sizes_have_the_published_number_of_parameters(size, parameters, entries):
    with torch.device("meta"):
        vq = VQModel(VQConfig(**VQ_SIZES[size]))
    assert sum(p.numel() for p in vq.parameters()) == parameters
    assert len(vq.state_dict()) + 1 == entries           # the released files also hold quantize.codebook_used


def test_the_nearest_code_is_the_one_at_the_smallest_distance():
    quantizer = VectorQuantizer(VQConfig(**TINY))
    z = F.normalize(torch.randn(3, 5, 8), dim=-1)
    distances = torch.cdist(z, quantizer.codes()[None])
    assert torch.equal(quantizer.nearest(z, quantizer.codes()), distances.argmin(dim=-1))


def test_gradient_passes_straight_through_the_lookup():
    quantizer = VectorQuantizer(VQConfig(**TINY))
    z = torch.randn(2, 8, 4, 4, requires_grad=True)
    zq, _, _ = quantizer(z)
    upstream = torch.randn_like(zq)
    through, = torch.autograd.grad(zq, z, upstream)
    identity, = torch.autograd.grad(F.normalize(z, dim=1), z, upstream)      # z is normalised on the way in
    torch.testing.assert_close(through, identity)


def test_codebook_loss_moves_only_the_codebook_and_commitment_only_the_encoder():
    quantizer = VectorQuantizer(VQConfig(**TINY))
    z = torch.randn(2, 8, 4, 4, requires_grad=True)
    _, _, losses = quantizer(z)
    weight = quantizer.embedding.weight
    gradient = lambda loss, x: torch.autograd.grad(loss, x, retain_graph=True, allow_unused=True)[0]
    assert gradient(losses["codebook"], z) is None and gradient(losses["codebook"], weight).abs().sum() > 0
    assert gradient(losses["commitment"], weight) is None and gradient(losses["commitment"],
                                                                       z).abs().sum() > 0


def test_entropy_loss_is_lowest_when_vectors_are_sure_and_codes_equally_used():
    quantizer = VectorQuantizer(VQConfig(codebook_size=8, codebook_embed_dim=8, entropy_weight=1.0))
    quantizer.embedding.weight.data = torch.eye(8)
    loss = lambda z: quantizer.entropy_loss(z, quantizer.codes()).item()
    assert loss(torch.eye(8)[None]) == pytest.approx(-math.log(8), abs=1e-3)         # 0 - ln 8
    assert loss(torch.eye(8)[:1].repeat(8, 1)[None]) == pytest.approx(0, abs=1e-3)   # one code only
    undecided = F.normalize(torch.ones(1, 8, 8), dim=-1)
    assert loss(undecided) == pytest.approx(0, abs=1e-3)                             # ln 8 - ln 8


def test_a_rectangular_grid_comes_back_as_one():
    vq = VQModel(VQConfig(**TINY)).eval()
    tokens = vq.tokenize(torch.rand(1, 3, 16, 24) * 2 - 1)
    assert tokens.shape == (1, 96)
    assert vq.detokenize(tokens, grid=(8, 12)).shape == (1, 3, 16, 24)
    with pytest.raises(InputError, match="grid"):
        vq.detokenize(tokens)
    with pytest.raises(InputError, match="divisible by 2"):
        vq.tokenize(torch.rand(1, 3, 15, 16))


@pytest.mark.parametrize("container", ["model", "module", "state_dict", None])
def test_a_released_tokenizer_loads_from_every_container(tmp_path, container):
    vq = VQModel(VQConfig(**TINY)).eval()
    weights = {**vq.state_dict(), "quantize.codebook_used": torch.zeros(65536)}
    file = {container: weights, "args": argparse.Namespace(lr=1e-4), "steps": 3} if container else weights
    torch.save(file, tmp_path / "vq.pt")
    loaded = load_tokenizer(tmp_path / "vq.pt")
    assert loaded.config == vq.config and not loaded.training
    assert weights_hash(loaded) == weights_hash(vq)
    (tmp_path / "vq.pt").unlink()
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(loaded.tokenize(images), vq.tokenize(images))


class Planted:
    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_file_with_hidden_code_is_refused_and_nothing_runs(tmp_path):
    Planted.path = tmp_path / "ran"
    torch.save({"model": VQModel(VQConfig(**TINY)).state_dict(), "args": Planted()}, tmp_path / "bad.pt")
    with pytest.raises(InputError) as error:
        read_checkpoint(tmp_path / "bad.pt")
    assert "\n" not in str(error.value) and not Planted.path.exists()
    with open(tmp_path / "plain.pkl", "wb") as file:
        pickle.dump(Planted(), file)
    with pytest.raises(InputError):
        read_checkpoint(tmp_path / "plain.pkl")
    assert not Planted.path.exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 half a zip file", b"\x80\x02garbage"])
def test_a_file_that_is_no_checkpoint_is_told_in_one_line(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(InputError) as error:
        load_tokenizer(tmp_path / "x.pt")
    assert "\n" not in str(error.value) and "x.pt" in str(error.value)


def test_a_gpt_or_a_misshapen_file_is_not_taken_for_a_tokenizer(tmp_path):
    torch.save({"tok_embeddings.weight": torch.zeros(4, 4)}, tmp_path / "gpt.pt")
    with pytest.raises(InputError, match="quantize.embedding"):
        load_tokenizer(tmp_path / "gpt.pt")
    weights = VQModel(VQConfig(**TINY)).state_dict()
    weights["decoder.conv_out.weight"] = torch.zeros(3, 5, 3, 3)
    torch.save({"model": weights}, tmp_path / "odd.pt")
    with pytest.raises(InputError, match="decoder.conv_out.weight"):
        load_tokenizer(tmp_path / "odd.pt")
    with pytest.raises(InputError, match="does not exist"):
        load_tokenizer(tmp_path / "none.pt")
    with pytest.raises(InputError, match="folder"):
        load_tokenizer(tmp_path)


def test_passes_bound_the_pixels_of_a_batch_for_any_size():
    assert [pass_size(side, side) for side in (32, 256, 384, 512, 1024, 4096)] == [32, 16, 7, 4, 1, 1]


def test_pictures_are_decoded_pass_by_pass_as_they_would_be_at_once(monkeypatch):
    monkeypatch.setattr(tokenizer, "pass_size", lambda H, W: 3)
    vq = VQModel(VQConfig(**TINY)).eval()
    tokens, sizes, detokenize = torch.randint(64, (8, 64)), [], vq.detokenize
    with torch.no_grad():
        expected, small = detokenize(tokens), F.interpolate(detokenize(tokens), size=(12, 12), mode="bicubic")
    monkeypatch.setattr(vq, "detokenize", lambda block, wait: sizes.append(len(block)) or detokenize(block))
    for side, images in ((None, expected), (12, small)):
        assert (to_pictures(vq, tokens, side).int() - to_uint8(images).int()).abs().max() <= 1
    assert sizes == [3, 3, 2] * 2


def test_tokens_do_not_depend_on_how_pictures_are_grouped(monkeypatch):
    vq = VQModel(VQConfig(**TINY)).eval()
    images = torch.randint(256, (40, 3, 16, 16), dtype=torch.uint8)
    whole = tokenize_in_passes(vq, images, "cpu")
    assert torch.equal(whole[:7], tokenize_in_passes(vq, images[:7], "cpu"))
    assert torch.equal(whole, torch.cat([tokenize_in_passes(vq, block, "cpu") for block in images.split(9)]))
    assert torch.equal(whole[:32], vq.tokenize(to_float(images[:32])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pictures_of_any_precision_go_into_a_tokenizer_of_any_precision(dtype):
    vq, images = VQModel(VQConfig(**TINY)).eval(), torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(vq.tokenize(images.double()), vq.tokenize(images))
    vq = vq.to(dtype)
    tokens, (recon, again, losses) = vq.tokenize(images), vq(images)
    assert torch.equal(tokens, again) and recon.dtype == vq.detokenize(tokens).dtype == dtype
    assert all(loss.isfinite() for loss in losses.values())
    assert to_pictures(vq, tokens).shape == (2, 16, 16, 3)


@pytest.mark.parametrize("images, told", [
    (torch.zeros(1, 1, 16, 16), r"\(B, 3, H, W\)"), (torch.zeros(3, 16, 16), r"\(B, 3, H, W\)"),
    (torch.zeros(1, 16, 16, 3), r"\(B, 3, H, W\)"), (torch.zeros(1, 4, 16, 16), r"\(B, 3, H, W\)"),
    (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "float in"), ([[1.0]], "images is list"),
    (torch.zeros(1, 3, 0, 0), "0x0 pixels"), (torch.zeros(1, 3, 15, 16), "divisible by 2")])
def test_a_tokenizer_refuses_other_pictures_with_the_shape_that_it_reads(images, told):
    vq = VQModel(VQConfig(**TINY)).eval()
    for use in (vq, vq.encode, vq.tokenize):
        with pytest.raises(InputError, match=told):
            use(images)


@pytest.mark.parametrize("tokens, told", [
    (torch.full((1, 4), 64), "0 to 63"), (torch.full((1, 4), -1), "0 to 63"), (torch.zeros(1, 4), "int64"),
    (torch.zeros(4).long(), r"\(B, N\)"), (torch.zeros(1, 2, 2).long(), r"\(B, N\)"),
    ([[1, 2, 3, 4]], "tokens is list"), (torch.zeros(1, 4, dtype=torch.uint8), "int64"),
    (torch.zeros(1, 0).long(), "grid")])
def test_tokens_that_are_none_are_refused_and_not_wrapped_around(tokens, told):
    with pytest.raises(InputError, match=told):
        VQModel(VQConfig(**TINY)).detokenize(tokens)
