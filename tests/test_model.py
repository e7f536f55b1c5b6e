"""pytest -q tests/test_model.py"""
import argparse
import math

import pytest
import torch
import torch.nn.functional as F

import model
from model import (GPT, GPT_SIZES, GPTConfig, Int8Linear, KVCache, Neighbours, RMSNorm, apply_rope, load_gpt,
                   packed, quantize, rope_table)
from runs import InputError

SMALL = dict(dim=64, n_layer=3, n_head=4, vocab_size=96, block_size=16, num_classes=10)


def small_gpt(**changes):
    """A small GPT with a random output layer: the initial zeros would make every logit equal."""
    gpt = GPT(GPTConfig(**{**SMALL, **changes}))
    torch.nn.init.normal_(gpt.output.weight, std=0.5)
    return gpt


@pytest.mark.parametrize("kind", ["c2i", "t2i"])
@pytest.mark.parametrize("training", [False, True])
def test_logits_and_loss_equal_the_official_code(golden, kind, training):
    arrays, weights = golden(f"gpt_{kind}")
    config = {key[7:]: int(value) for key, value in arrays.items() if key.startswith("config.")}
    gpt = GPT(GPTConfig(**config, model_type=kind, token_dropout=0, resid_dropout=0, ffn_dropout=0,
                        class_dropout=0))
    gpt.load_state_dict(weights)
    gpt.train(training)
    tokens = arrays["tokens"]
    logits, loss = gpt(tokens[:, :-1], arrays["cond"], targets=tokens, cond_mask=arrays.get("cond_mask"))
    assert logits.dtype == torch.float32
    assert (logits - arrays["logits"]).abs().max() < 1e-4
    assert abs(loss.item() - arrays["loss"].item()) < 1e-5


def test_the_loss_in_blocks_of_rows_is_the_loss_with_its_gradient(monkeypatch):
    logits, targets = torch.randn(50, 96, generator=torch.manual_seed(0)), torch.arange(50)
    whole, parts = logits.clone().requires_grad_(), logits.bfloat16().requires_grad_()
    F.cross_entropy(whole, targets).backward()
    monkeypatch.setattr(model, "LOSS_BLOCK", 96 * 16)            # 16 + 16 + 16 + 2
    loss = model.cross_entropy(parts, targets)
    assert loss.dtype == torch.float32                           # and not of rounded log p
    torch.testing.assert_close(loss, F.cross_entropy(parts.float(), targets), rtol=0, atol=1e-6)
    loss.backward()
    torch.testing.assert_close(parts.grad.float(), whole.grad, rtol=2e-2, atol=1e-5)
    exact = logits.clone().requires_grad_()
    model.cross_entropy(exact, targets).backward()
    torch.testing.assert_close(exact.grad, whole.grad, rtol=0, atol=1e-8)


def test_logits_that_nobody_wants_are_not_returned_and_the_loss_is_the_same():
    tokens, cond = torch.arange(64)[None], torch.tensor([3])
    gpt = small_gpt(block_size=64).eval()
    (logits, loss), (none, same) = (gpt(tokens[:, :-1], cond, tokens, None, want) for want in (True, False))
    assert logits.shape == (1, 64, 96) and none is None and torch.equal(loss, same)


PARAMETERS = {"GPT-B": (110_888_448, 112_282_368), "GPT-L": (342_910_976, 345_031_680),
              "GPT-XL": (774_699_520, 777_678_080), "GPT-XXL": (1_410_972_672, 1_414_940_160),
              "GPT-XXXL": (3_893_027_840, 3_902_261_760), "GPT-1B": (1_199_616_000, 1_205_954_560),
              "GPT-3B": (3_096_659_200, 3_110_249_600), "GPT-7B": (6_614_589_440, 6_635_655_168)}


@pytest.mark.parametrize("size", PARAMETERS)
def test_every_size_has_the_official_number_of_parameters(size):
    for kind, L, expected in zip(("c2i", "t2i"), (1, 120), PARAMETERS[size]):
        with torch.device("meta"):
            gpt = GPT(GPTConfig(**GPT_SIZES[size], model_type=kind, cls_token_num=L))
        assert sum(p.numel() for p in gpt.parameters()) == expected


def test_the_first_loss_is_that_of_guessing():
    gpt = GPT(GPTConfig(**SMALL)).eval()
    tokens = torch.randint(96, (2, 16))
    _, loss = gpt(tokens[:, :-1], torch.tensor([1, 2]), targets=tokens)
    assert loss.item() == pytest.approx(math.log(96), abs=1e-5)


@pytest.mark.parametrize("t", [0, 5, 14])
def test_changing_a_token_leaves_the_logits_before_it_alone(t):
    gpt = small_gpt().eval()
    tokens = torch.randint(96, (1, 15))
    changed = tokens.clone()
    changed[0, t] = (tokens[0, t] + 1) % 96
    before, _ = gpt(tokens, torch.tensor([3]))
    after, _ = gpt(changed, torch.tensor([3]))
    assert torch.equal(before[:, :t + 1], after[:, :t + 1])
    assert not torch.allclose(before[:, t + 1], after[:, t + 1])


def test_no_tokens_give_the_logits_of_the_first_and_too_many_are_refused():
    gpt = small_gpt().eval()
    logits, loss = gpt(torch.zeros(2, 0, dtype=torch.long), torch.tensor([0, 10]))
    assert logits.shape == (2, 1, 96) and loss is None
    with pytest.raises(InputError, match=r"tokens is .*\(2, 16\).*at most 15 long"):
        gpt(torch.zeros(2, 16, dtype=torch.long), torch.tensor([0, 10]))


# ------------------------------------------------------------------------------------------------------------
# Drawn by neighbours

def near_gpt(**changes):
    gpt = small_gpt(order="neighbours", **changes).eval()
    torch.nn.init.normal_(gpt.lower.weight, std=0.5)
    return gpt


def test_by_neighbours_all_places_of_a_distance_follow_one_another():
    near = Neighbours(3)
    assert near.order.tolist() == [0, 1, 3, 2, 4, 6, 5, 7, 8]
    assert near.turn.tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 4]
    assert [near.order[part].tolist() for part in near.passes] == [[0], [1, 3], [2, 4, 6], [5, 7], [8]]


def test_by_neighbours_a_token_moves_exactly_the_logits_of_larger_distances():
    gpt, cond = near_gpt(), torch.tensor([3])
    tokens = torch.arange(16)[None]
    before, distance = gpt(tokens[:, :-1], cond)[0], torch.arange(16) // 4 + torch.arange(16) % 4
    for place in range(15):
        changed = tokens.clone()
        changed[:, place] += 50
        after = gpt(changed[:, :-1], cond)[0]
        moved = (after - before).abs().amax(dim=-1)[0] > 1e-4
        assert torch.equal(moved, distance > distance[place]), place
    assert ((gpt(tokens[:, :-1], cond + 1)[0] - before).abs().amax(dim=-1) > 1e-4).all()


def test_by_neighbours_a_place_has_the_mean_of_what_its_left_and_its_upper_neighbour_say():
    """In blocks that change nothing the output of a token is that of its own embedding."""
    gpt = near_gpt(block_size=9, n_layer=1)
    torch.nn.init.zeros_(gpt.layers[0].attention.wo.weight)
    torch.nn.init.zeros_(gpt.layers[0].feed_forward.w2.weight)
    tokens, cond = torch.randint(96, (1, 9)), torch.tensor([3])
    h = gpt.norm(gpt.tok_embeddings(tokens))[0].unflatten(0, (3, 3))             # (row, column, D)
    right, lower = gpt.output(h), gpt.lower(h)
    expected = torch.zeros(3, 3, 96)
    for row in range(3):
        for column in range(3):
            said = [right[row, column - 1]] * (column > 0) + [lower[row - 1, column]] * (row > 0)
            expected[row, column] = (sum(said) / len(said) if said else
                                     gpt.output(gpt.norm(gpt.cls_embedding(cond)))[0, 0])
    logits, loss = gpt(tokens[:, :-1], cond, tokens)
    torch.testing.assert_close(logits[0], expected.flatten(0, 1), rtol=1e-4, atol=1e-4)
    assert loss.item() == pytest.approx(F.cross_entropy(logits[0], tokens[0]).item(), abs=1e-5)


def test_by_neighbours_the_last_token_is_never_an_input_and_parts_of_a_picture_are_refused():
    gpt, tokens, cond = near_gpt(), torch.zeros(2, 15, dtype=torch.long), torch.tensor([1, 2])
    assert gpt(tokens, cond)[0].shape == (2, 16, 96)
    with pytest.raises(InputError, match="all tokens but the last"):
        gpt(tokens[:, :9], cond)


def test_by_neighbours_a_checkpoint_says_what_it_is_and_one_that_does_not_is_raster(tmp_path):
    gpt = near_gpt()
    saved = {"model": gpt.state_dict(), "config": vars(gpt.config)}
    torch.save(saved, tmp_path / "near.pt")
    tokens, cond = torch.randint(96, (2, 15)), torch.tensor([1, 2])
    assert torch.equal(load_gpt(tmp_path / "near.pt")(tokens, cond)[0], gpt(tokens, cond)[0])
    before = {name: value for name, value in saved["config"].items() if name != "order"}
    torch.save(saved | {"config": before}, tmp_path / "old.pt")
    with pytest.raises(InputError, match="lower.weight"):
        load_gpt(tmp_path / "old.pt")


# ------------------------------------------------------------------------------------------------------------

def test_rope_keeps_lengths_and_depends_on_the_distance_only():
    config = GPTConfig(**SMALL)
    table = rope_table(config)[1:]                             # 4 x 4 positions, the condition's row left out
    q, k = torch.randn(2, 1, 1, 1, 16)
    turned = lambda x, row, column: apply_rope(x, table[row * 4 + column][None])
    torch.testing.assert_close(turned(q, 2, 3).norm(), q.norm())
    score = lambda a, b: (turned(q, *a) * turned(k, *b)).sum()
    torch.testing.assert_close(score((0, 1), (1, 3)), score((2, 0), (3, 2)))        # both one down, two right
    assert not torch.isclose(score((0, 1), (1, 3)), score((0, 1), (3, 2)))


def test_condition_rows_of_rope_are_zero_and_the_table_stays_float32():
    gpt = small_gpt(model_type="t2i", cls_token_num=3, caption_dim=8).to(torch.bfloat16)
    assert gpt.rope.dtype == torch.float32 and gpt.norm.weight.dtype == torch.bfloat16
    assert gpt.rope[:3].abs().max() == 0 and gpt.rope.shape[0] == 3 + 16
    assert not any("rope" in name or "freqs" in name for name in gpt.state_dict())


def test_with_identity_rows_the_condition_is_seen_unturned_and_a_config_without_the_field_means_zero():
    sizes = dict(dim=32, n_layer=1, n_head=2, vocab_size=16, block_size=16, cls_token_num=3, model_type="t2i")
    zero, identity = GPTConfig(**sizes), GPTConfig(**sizes, cond_rope="identity")
    assert zero.cond_rope == "zero" and not rope_table(zero)[:3].any()
    table, x = rope_table(identity), torch.randn(2, 3, 2, 16)
    assert torch.equal(apply_rope(x, table[:3]), x) and torch.equal(table[3:], rope_table(zero)[3:])
    with pytest.raises(InputError, match="cond_rope 'none': has to be zero or identity"):
        GPTConfig(**sizes, cond_rope="none")


def test_rmsnorm_follows_its_formula():
    norm = RMSNorm(8)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 8)
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight)


def test_grouped_heads_equal_full_heads_with_repeated_keys_and_values():
    grouped, full = small_gpt(n_kv_head=2).eval(), small_gpt().eval()
    weights = grouped.state_dict()
    for name in [n for n in weights if n.endswith("wqkv.weight")]:
        q, k, v = weights[name].split([64, 32, 32])
        double = lambda w: w.unflatten(0, (2, 16)).repeat_interleave(2, dim=0).flatten(0, 1)
        weights[name] = torch.cat([q, double(k), double(v)])
    full.load_state_dict(weights)
    tokens, cond = torch.randint(96, (2, 15)), torch.tensor([4, 5])
    torch.testing.assert_close(grouped(tokens, cond)[0], full(tokens, cond)[0], atol=1e-5, rtol=1e-5)


def test_label_dropout_replaces_that_share_by_the_null_class_in_training_only():
    gpt = small_gpt(class_dropout=0.3)
    embed, cond = gpt.cls_embedding, torch.full((4000,), 2)
    null = embed.embedding_table.weight[10]
    share = lambda: (embed(cond)[:, 0] == null).all(dim=-1).float().mean().item()
    assert share() == pytest.approx(0.3, abs=0.03)
    gpt.eval()
    assert share() == 0


def test_stochastic_depth_skips_the_later_layers_more_often_and_keeps_the_mean():
    gpt = small_gpt(drop_path=0.5)
    assert [layer.drop_path for layer in gpt.layers] == [0, 0.25, 0.5]
    kept = gpt.layers[2].skip_path(torch.ones(4000, 1, 1))
    assert set(kept.flatten().tolist()) == {0.0, 2.0} and kept.mean().item() == pytest.approx(1, abs=0.05)
    gpt.eval()
    assert torch.equal(gpt.layers[2].skip_path(torch.ones(2, 1, 1)), torch.ones(2, 1, 1))


def test_padded_condition_tokens_are_never_read(golden):
    arrays, weights = golden("gpt_t2i")
    config = {key[7:]: int(value) for key, value in arrays.items() if key.startswith("config.")}
    gpt = GPT(GPTConfig(**config, model_type="t2i")).eval()
    gpt.load_state_dict(weights)
    cond, mask, tokens = arrays["cond"], arrays["cond_mask"], arrays["tokens"][:, :-1]
    noise = cond + (mask == 0)[..., None] * torch.randn_like(cond)
    logits = gpt(tokens, cond, cond_mask=mask)[0]
    torch.testing.assert_close(gpt(tokens, noise, cond_mask=mask.bool())[0], logits)
    assert logits.isfinite().all() and not torch.allclose(gpt(tokens, noise)[0], logits)


def test_it_overfits_one_batch():
    gpt = GPT(GPTConfig(**SMALL, token_dropout=0, resid_dropout=0, ffn_dropout=0, class_dropout=0))
    tokens, cond = torch.randint(96, (4, 16)), torch.arange(4)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=3e-3)
    for _ in range(120):
        _, loss = gpt(tokens[:, :-1], cond, targets=tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@pytest.mark.parametrize("changes, message", [
    (dict(block_size=15), "square"), (dict(dim=60), "multiple of 4"), (dict(n_kv_head=3),
                                                                       "multiple of n_kv_head"),
    (dict(model_type="t2I"), "has to be c2i or t2i")])
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        GPTConfig(**{**SMALL, **changes})


@pytest.mark.parametrize("kind", ["c2i", "t2i"])
@pytest.mark.parametrize("container", ["model", "module", "state_dict", None])
def test_a_released_gpt_loads_from_every_container(tmp_path, container, kind):
    config = GPTConfig(**GPT_SIZES["tiny"], vocab_size=32, block_size=64, num_classes=10, model_type=kind,
                       cls_token_num=1 if kind == "c2i" else 5, caption_dim=2048 if kind == "c2i" else 24)
    gpt = GPT(config).eval()
    weights = {**gpt.state_dict(), "freqs_cis": torch.zeros(65, 32, 2)}
    file = {container: weights, "ema": {}, "args": argparse.Namespace(), "steps": 1} if container else weights
    torch.save(file, tmp_path / "gpt.pt")
    loaded = load_gpt(tmp_path / "gpt.pt", image_size=128)
    assert (loaded.config.n_head, loaded.config.block_size, loaded.config.model_type) == (4, 64, kind)
    assert not loaded.training and torch.equal(loaded.rope, gpt.rope)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), gpt.parameters()))
    assert load_gpt(tmp_path / "gpt.pt").config.block_size == 256
    half = load_gpt(tmp_path / "gpt.pt", dtype=torch.bfloat16)
    assert half.output.weight.dtype == torch.bfloat16 and half.rope.dtype == torch.float32


def test_a_gpt_of_unknown_size_says_which_shapes_it_found(tmp_path):
    torch.save(small_gpt().state_dict(), tmp_path / "odd.pt")
    with pytest.raises(InputError, match="3 layers of width 64"):
        load_gpt(tmp_path / "odd.pt")


def test_the_cache_hands_out_what_is_filled_or_with_tensors_all_places():
    cache = KVCache(R=2, G=3, length=5, d=4, dtype=torch.float32, device="cpu")
    first, second = torch.randn(2, 2, 3, 2, 4), torch.randn(2, 2, 3, 1, 4)
    for places in ((slice(0, 2), slice(2, 3)), (torch.tensor([0, 1]), torch.tensor([2]))):
        cache.update(places[0], *first)
        k, v = cache.update(places[1], *second)
        for found, a, b in ((k, first[0], second[0]), (v, first[1], second[1])):
            assert torch.equal(found[:, :, :2], a) and torch.equal(found[:, :, 2:3], b)
        assert k.shape[2] == v.shape[2] == (3 if isinstance(places[0], slice) else 5)
    assert not k[:, :, 3:].any() and torch.equal(cache.first(1).k, cache.k[:1])


TOKENS, COND = torch.zeros(2, 15, dtype=torch.long), torch.tensor([1, 2])


@pytest.mark.parametrize("changes, told", [
    (dict(tokens=[1, 2]), "tokens is list"), (dict(tokens=TOKENS + 96), "0 to 95"),
    (dict(tokens=TOKENS - 1), "0 to 95"), (dict(tokens=TOKENS.float()), "int64"),
    (dict(tokens=TOKENS[0]), "tokens"), (dict(tokens=TOKENS[:1]), r"\(2, T\)"),
    (dict(tokens=TOKENS.bool()), "int64"), (dict(cond=[1, 2]), "cond is list"),
    (dict(tokens=None), "tokens is NoneType"), (dict(cond=COND + 10), "0 to 10"),
    (dict(cond=COND - 3), "0 to 10"), (dict(cond=COND[None]), r"\(B\)"),
    (dict(cond=COND.to("meta")), "on meta"), (dict(cond=COND.float()), "int64"),
    (dict(targets=TOKENS), r"targets .*\(2, 16\)"), (dict(targets=torch.full((2, 16), 96)), "0 to 95"),
    (dict(targets=[1]), "targets is list"), (dict(targets=torch.zeros(2, 16)), "int64"),
    (dict(cond_mask=torch.ones(2, 4)), r"cond_mask .*\(2, 1\)"),
    (dict(cond_mask=[1, 1]), "cond_mask is list")])
def test_a_gpt_refuses_at_its_door_what_does_not_fit_with_the_shape_that_does(changes, told):
    with pytest.raises(InputError, match=told):
        small_gpt()(**{"tokens": TOKENS, "cond": COND, **changes})


@pytest.mark.parametrize("cond", [torch.zeros(2, 3), torch.zeros(2, 4, 8), torch.zeros(2, 3, 9), [1], COND])
def test_a_text_gpt_asks_for_features_of_its_own_shape(cond):
    gpt = small_gpt(model_type="t2i", cls_token_num=3, caption_dim=8)
    with pytest.raises(InputError, match=r"cond .*\(B, 3, 8\)"):
        gpt(TOKENS, cond)
    with pytest.raises(InputError, match=r"cond_mask .*\(2, 3\)"):
        gpt(TOKENS, torch.zeros(2, 3, 8), cond_mask=torch.ones(2, 8))


def test_the_checks_at_the_door_break_no_compiled_graph():
    torch._dynamo.reset()
    gpt, tokens = small_gpt().eval(), torch.randint(96, (2, 16))
    compiled = torch.compile(gpt, backend="aot_eager", fullgraph=True)
    for B in (2, 1):                                             # the second size makes the shapes symbols
        given = tokens[:B, :-1], COND[:B], tokens[:B], torch.ones(B, 1)
        for found, expected in zip(compiled(*given), gpt(*given)):
            torch.testing.assert_close(found, expected)


@pytest.mark.cuda
def test_cuda_gives_the_same_logits_as_the_cpu():
    gpt = small_gpt().eval()
    tokens, cond = torch.randint(96, (2, 15)), torch.tensor([1, 2])
    expected = gpt(tokens, cond)[0]
    gpt.cuda()
    torch.testing.assert_close(gpt(tokens.cuda(), cond.cuda())[0].cpu(), expected, atol=1e-3, rtol=1e-3)


# Linear layers for decoding

def tiny_gpt():
    gpt = GPT(GPTConfig(dim=64, n_layer=2, n_head=4, vocab_size=64, block_size=16, num_classes=10)).eval()
    torch.nn.init.normal_(gpt.output.weight, std=0.3)
    return gpt


def test_packed_layers_give_the_same_sums_and_leave_the_gpt_as_it_was():
    gpt = tiny_gpt()
    names, tokens = list(gpt.state_dict()), torch.randint(64, (2, 7))
    other = packed(gpt)
    assert not any(isinstance(part, torch.nn.Linear) for part in other.modules()) or \
        not torch.backends.mkldnn.is_available()
    with torch.no_grad():
        expected = gpt(tokens, COND)[0]
        torch.testing.assert_close(other(tokens, COND)[0], expected, atol=1e-4, rtol=1e-4)
    assert list(gpt.state_dict()) == names and torch.equal(gpt(tokens, COND)[0], expected)


def test_without_room_for_a_second_copy_nothing_is_packed(monkeypatch):
    gpt = tiny_gpt()
    monkeypatch.setattr(model, "free_memory", lambda device: 1000)
    assert packed(gpt) is gpt


def test_int8_is_exact_where_weights_and_inputs_are_whole_numbers_of_their_scales():
    linear = torch.nn.Linear(96, 128, bias=False)
    with torch.no_grad():
        whole = torch.randint(-127, 128, (128, 96)).float()
        whole[:, 0] = 127                                        # so that a row's scale is that of its factor
        linear.weight.copy_(whole * torch.rand(128, 1))
    x = torch.randint(-127, 129, (5, 96)).float()
    x[0, :2] = torch.tensor([-127., 128.])                       # 256 steps of 1
    torch.testing.assert_close(Int8Linear(linear)(x), x @ linear.weight.T, atol=1e-2, rtol=1e-5)


def test_int8_inputs_that_were_not_normalised_have_a_scale_for_each_row():
    for inputs, outputs, most in ((256, 64, 0.02), (64, 256, 1.1)):      # w2's shape; what happens without
        linear, x = torch.nn.Linear(inputs, outputs, bias=False), torch.randn(2, inputs)
        x[1] *= 1000
        y, expected = Int8Linear(linear)(x), linear(x)
        error = ((y - expected).norm(dim=-1) / expected.norm(dim=-1)).tolist()
        assert error[1] < 0.02 and (error[0] < most) and (error[0] > 0.1) == (inputs < outputs)
    assert not Int8Linear(torch.nn.Linear(8, 4, bias=False))(torch.zeros(2, 8)).any()


@pytest.mark.parametrize("bits, far", [(8, 0.05), (16, 0.02)])
def test_a_quantised_gpt_is_near_and_loads_as_such_and_outlives_its_file(tmp_path, bits, far):
    gpt = tiny_gpt()
    path = tmp_path / "gpt.pt"
    torch.save({"model": gpt.state_dict(), "config": dict(vars(gpt.config))}, path)
    loaded = load_gpt(path, bits=bits)
    path.unlink()
    tokens = torch.randint(64, (2, 15))
    with torch.no_grad():
        logits = [net(tokens, COND)[0] for net in (gpt, quantize(gpt, bits), loaded)]
    assert torch.equal(logits[1], logits[2]) and not torch.equal(logits[0], logits[1])
    assert (logits[1] - logits[0]).norm() < far * logits[0].norm()
    assert not any(isinstance(part, torch.nn.Linear) for part in loaded.modules())


def test_other_widths_than_8_and_16_bits_are_refused():
    with pytest.raises(InputError, match="bits=4: linear layers can have 8 or 16"):
        quantize(tiny_gpt(), 4)


@pytest.mark.cuda
def test_cuda_quantises_the_weights_alone():
    gpt = tiny_gpt().cuda()
    tokens, cond = torch.randint(64, (2, 15), device="cuda"), COND.cuda()
    with torch.no_grad():
        expected, logits = gpt(tokens, cond)[0], quantize(gpt)(tokens, cond)[0]
    assert (logits - expected).norm() < 0.05 * expected.norm()


def test_the_caches_of_the_last_pictures_are_used_again_if_they_fit():
    gpt = tiny_gpt()
    first = gpt.take_caches(4)
    assert gpt.take_caches(4)[0] is not first[0]                 # taken: another thread makes its own
    for rows, same in ((2, True), (4, True), (5, False)):
        gpt.idle_caches[:] = [first]
        assert (gpt.take_caches(rows)[0] is first[0]) == same and not gpt.idle_caches
    gpt.idle_caches[:] = [first]
    assert gpt.bfloat16().take_caches(2)[0].k.dtype == torch.bfloat16
