"""pytest -q tests/test_checkpoints.py      Checkpoints of other people, other versions and other wrappers."""
from dataclasses import asdict

import numpy as np
import pytest
import torch

import train_gpt
from model import GPT, GPTConfig, load_gpt
from runs import InputError, read_checkpoint, weights_hash
from conftest import run_gpt, run_vq
from text import saved_text_encoder, tiny_text_encoder, tiny_text_encoder_from
from tokenizer import VQConfig, VQModel, load_tokenizer

SMALL = dict(dim=64, n_layer=2, n_head=4, vocab_size=64, block_size=16, num_classes=10)
TINY = dict(codebook_size=64, ch=32, ch_mult=(1, 2), z_channels=32)


def wrapped(weights, how):
    """A state dict as wrappers leave it: `how` is put in front, or, from %, in between as well."""
    if "%" not in how:
        return {how + name: w for name, w in weights.items()}
    return {name.replace("layers.", f"layers.{how[1:]}").replace("encoder.", f"encoder.{how[1:]}"): w
            for name, w in weights.items()}


@pytest.mark.parametrize("container", ["model", "module", "state_dict", None])
@pytest.mark.parametrize("how", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.",
                                 "_fsdp_wrapped_module.", "module.module.", "%_orig_mod.",
                                 "%_fsdp_wrapped_module._checkpoint_wrapped_module."])
def test_names_of_compiled_and_distributed_models_are_understood(tmp_path, how, container):
    gpt, vq = GPT(GPTConfig(**SMALL)), VQModel(VQConfig(**TINY))
    for model in (gpt, vq):
        weights = wrapped(model.state_dict(), how)
        assert weights.keys() != model.state_dict().keys()
        file = {container: weights, "config": asdict(model.config)} if container else weights
        if container or model is vq:                             # bare, a GPT of this size is unknown
            torch.save(file, tmp_path / "x.pt")
            loaded = (load_gpt if model is gpt else load_tokenizer)(tmp_path / "x.pt")
            assert weights_hash(loaded) == weights_hash(model)


def test_the_text_encoder_inside_a_checkpoint_loses_its_prefixes_too(tmp_path):
    text = tiny_text_encoder(["a red star"])
    saved = saved_text_encoder(text)
    saved["model"] = wrapped(saved["model"], "_orig_mod.module.")
    torch.save({"model": GPT(GPTConfig(**SMALL)).state_dict(), "text_encoder": saved}, tmp_path / "x.pt")
    loaded = tiny_text_encoder_from(read_checkpoint(tmp_path / "x.pt")["text_encoder"], "x.pt")
    assert weights_hash(loaded.t5) == weights_hash(text.t5)


@pytest.mark.parametrize("name", ["freqs_cis", "rope", "kv_cache.v_cache", "causal_mask", "n_averaged",
                                  "layers.0.attention.kv_cache.k_cache", "module.rope",
                                  "layers.1.attention.rotary_emb.inv_freq", "_orig_mod.freqs_cis"])
def test_tables_masks_and_caches_of_other_versions_are_left_out(tmp_path, name):
    gpt = GPT(GPTConfig(**SMALL))
    weights = {**gpt.state_dict(), name: torch.zeros(3, dtype=torch.int64)}
    torch.save({"model": weights, "config": asdict(gpt.config)}, tmp_path / "gpt.pt")
    assert weights_hash(load_gpt(tmp_path / "gpt.pt")) == weights_hash(gpt)
    vq = VQModel(VQConfig(**TINY))
    torch.save({**vq.state_dict(), name: torch.zeros(3)}, tmp_path / "vq.pt")
    assert weights_hash(load_tokenizer(tmp_path / "vq.pt")) == weights_hash(vq)


@pytest.mark.parametrize("change, told", [
    (dict(extra=torch.zeros(2)), None),                          # beside the layers: no weight of ours
    ({"layers.0.attention.wqkv.scales": torch.zeros(2)}, "scales"),
    ({"layers.0.attention.wqkv.lora_A": torch.zeros(2)}, "lora_A"),
    ({"layers.7.attention.wo.weight": torch.zeros(2)}, "layers.7"),
    ({"output.bias": torch.zeros(2)}, "output.bias"),
    ({"norm.weight": torch.zeros(63)}, "norm.weight"),
    ({"output.weight": torch.zeros(64, 64, dtype=torch.int8)}, "quantised")])
def test_what_would_change_the_model_is_never_left_out(tmp_path, change, told):
    gpt = GPT(GPTConfig(**SMALL))
    torch.save({"model": {**gpt.state_dict(), **change}, "config": asdict(gpt.config)}, tmp_path / "x.pt")
    if told is None:
        load_gpt(tmp_path / "x.pt")
        return
    with pytest.raises(InputError, match=told) as error:
        load_gpt(tmp_path / "x.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config, told", [
    (dict(rope_base=1), "newer version.*rope_base"), (dict(n_head=0), "makes no sense"),
    (dict(dim="64"), "x.pt"), (dict(n_layer=-1), "x.pt"), (dict(n_layer=2.5), "x.pt"),
    (dict(dim=None), "x.pt"), (dict(block_size=-4), "square"), (dict(cls_token_num=3), "one token"),
    (dict(token_dropout=7), "x.pt"),
    (dict(num_classes=11), "embedding_table"), (dict(block_size=10 ** 14), "x.pt"), (None, "makes no sense"),
    ("GPT-B", "makes no sense"), (3, "makes no sense"), ([1], "makes no sense"), ({1: 2}, "newer version")])
def test_a_config_that_cannot_be_is_one_line(tmp_path, config, told):
    gpt = GPT(GPTConfig(**SMALL))
    config = {**asdict(gpt.config), **config} if isinstance(config, dict) else config
    torch.save({"model": gpt.state_dict(), "config": config}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=told) as error:
        load_gpt(tmp_path / "x.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [dict(colour=1), dict(ch=-3), dict(norm_groups=0), dict(ch_mult=None),
                                    dict(ch_mult=()), dict(codebook_size=65), None])
def test_a_tokenizer_and_a_text_encoder_with_such_a_config_too(tmp_path, config):
    vq, text = VQModel(VQConfig(**TINY)), saved_text_encoder(tiny_text_encoder(["a red star"]))
    config = {**asdict(vq.config), **config} if config else config
    torch.save({"model": vq.state_dict(), "config": config}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="x.pt"):
        load_tokenizer(tmp_path / "x.pt")
    for change in ({"config": {**text["config"], "bias": 2}}, {"config": {"d_model": 0}}, {"config": None},
                   {"model": None}, {"words": 5}):
        with pytest.raises(InputError, match="x.pt"):
            tiny_text_encoder_from({**text, **change}, "x.pt")


@pytest.mark.parametrize("file", [
    {"ema": {"w": torch.zeros(1)}}, {"model": {}}, {"model": {"w": 1}}, {}, [], torch.zeros(3), "text", 5,
    {"model": {"tok_embeddings.weight": torch.zeros(4)}}, {"tok_embeddings.weight": torch.zeros(64, 192)},
    {1: torch.zeros(2)}, {"text_encoder": 3, "model": {"quantize.embedding.weight": torch.zeros(4)}}])
def test_a_file_without_the_weights_is_one_line(tmp_path, file):
    torch.save(file, tmp_path / "x.pt")
    for load in (load_gpt, load_tokenizer):
        with pytest.raises(InputError, match="x.pt") as error:
            load(tmp_path / "x.pt")
        assert "\n" not in str(error.value) and "()" not in str(error.value)


def test_an_empty_file_says_so_without_an_empty_reason(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(InputError, match="empty") as error:
        read_checkpoint(tmp_path / "x.pt")
    assert "()" not in str(error.value)


# --init

@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A tokenizer, and GPTs for other classes, another codebook, captions."""
    folder = tmp_path_factory.mktemp("bases")
    run_vq(folder, "--steps", "1")
    config = dict(dim=64, n_layer=1, n_head=4, vocab_size=512, block_size=64, num_classes=4)
    for name, change in (("four", {}), ("thousand", dict(num_classes=1000)), ("other", dict(vocab_size=96)),
                         ("ten", dict(num_classes=10)),
                         ("text", dict(model_type="t2i", cls_token_num=5, caption_dim=192))):
        gpt = GPT(GPTConfig(**config | change))
        names = dict(class_names=list("abcdefghij")) if name == "ten" else {}
        torch.save({"model": gpt.state_dict(), "config": asdict(gpt.config), **names}, folder / f"{name}.pt")
    return folder


@pytest.mark.parametrize("name", ["four", "thousand", "ten"])
def test_a_gpt_for_other_classes_gives_all_but_its_table_of_classes(bases, tmp_path, capsys, name):
    state = run_gpt(tmp_path, "--vq", str(bases / "vq.pt"), "--init", str(bases / f"{name}.pt"), "--steps",
                    "1", "--lr", "1e-12", "--ema", "0", "--weight-decay", "0")
    told = [line for line in capsys.readouterr().out.splitlines() if "starts anew" in line]
    assert len(told) == 1 and "the data 10 others" in told[0]
    table = "cls_embedding.embedding_table.weight"
    for key, weight in load_gpt(bases / f"{name}.pt").state_dict().items():
        assert torch.allclose(state["model"][key][-1:] if key == table else state["model"][key],
                              weight[-1:] if key == table else weight, atol=1e-6), key
    assert state["model"][table].shape == (11, 64) and state["config"]["num_classes"] == 10
    assert state["model"][table].std(dim=0).min() > 0            # no two classes start alike


@pytest.mark.parametrize("name, cond, told", [
    ("other", "class", "codebook of 512"),
    ("text", "class", "does not fit --cond class: it was trained with --cond text"),
    ("four", "text", "does not fit --cond text: it was .* --cond class"), ("vq", "class", "no GPT")])
def test_a_gpt_that_cannot_be_the_start_is_told_before_any_picture_is_tokenized(bases, tmp_path, monkeypatch,
                                                                                name, cond, told):
    monkeypatch.setattr(train_gpt, "prepare_codes", None)
    with pytest.raises(InputError, match=told):
        run_gpt(tmp_path, "--vq", str(bases / "vq.pt"), "--init", str(bases / f"{name}.pt"), "--cond", cond,
                "--steps", "1")


@pytest.mark.parametrize("cond", ["class", "text"])
def test_held_out_classes_that_were_never_trained_are_left_out_and_told(capsys, cond):
    # As .cls files in archives may have them: a class beyond the table, and that of the null class's row.
    labels = np.array([0, 1, 2, 3, 7, -1, 1, 0])
    kept = train_gpt.usable(labels, 3, cond)
    told = capsys.readouterr().err
    if cond == "class":
        assert kept.tolist() == [0, 1, 2, 6, 7] and "left out 2 pictures" in told
    else:
        assert kept.tolist() == [0, 1, 2, 3, 4, 6, 7] and not told
