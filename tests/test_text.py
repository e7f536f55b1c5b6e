"""pytest -q tests/test_text.py      The T5 encoder, its tokenizer, cleaning, captions as conditions."""
import base64
import builtins
import json
import time

import numpy as np
import pytest
import torch

from conftest import ROOT
from runs import InputError
from text import (Captions, Classes, T5Config, T5Encoder, T5Tokenizer, TextEncoder, WordTokenizer,
                  clean_caption, load_t5, pretrained_text_encoder, relative_buckets, saved_text_encoder,
                  tiny_text_encoder, tiny_text_encoder_from)

SMALL = dict(vocab_size=80, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=4)


@pytest.fixture
def t5(golden):
    """The encoder that transformers ran for tests/golden/t5.npz, and what went in and came out."""
    with np.load(ROOT / "tests" / "golden" / "t5.npz") as file:
        arrays = {name: file[name] for name in file.files}
    encoder = T5Encoder(T5Config(**json.loads(arrays["config"].item()))).eval()
    weights = {name[2:]: torch.from_numpy(w).float() for name, w in arrays.items() if name.startswith("w.")}
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    encoder.load_state_dict(weights)
    return encoder, *(torch.from_numpy(arrays[name]) for name in ("ids", "mask", "hidden"))


# the encoder

def test_hidden_states_equal_those_of_transformers_with_padding_on_either_side(t5):
    encoder, ids, mask, hidden = t5
    for kind in (torch.long, torch.float32, torch.bool):
        assert (encoder(ids, mask.to(kind)) - hidden)[mask.bool()].abs().max() < 1e-4


def test_features_do_not_depend_on_padding_nor_on_the_side_where_it_is(t5):
    encoder, ids, _, _ = t5
    ids = ids[:, :10]
    alone, mask = encoder(ids), torch.ones(3, 16)
    left, right = mask.clone(), mask.clone()
    left[:, :6], right[:, 10:] = 0, 0
    padding = torch.full((3, 6), 7)
    assert torch.allclose(encoder(torch.cat([padding, ids], 1), left)[:, 6:], alone, atol=1e-5)
    assert torch.allclose(encoder(torch.cat([ids, padding], 1), right)[:, :10], alone, atol=1e-5)


def test_a_caption_without_any_token_gives_numbers(t5):
    encoder, ids, mask, _ = t5
    assert encoder(ids, mask * 0).isfinite().all()


def test_relative_buckets_are_single_steps_then_logarithmic_then_one_for_all_that_is_far():
    row = relative_buckets(200, T5Config())[0].tolist()          # query at 0: keys 0, 1, 2, ... after it
    column = relative_buckets(200, T5Config())[:, 0].tolist()    # key at 0: before every query
    expected = [*range(8), *[8] * 4, *[9] * 4, *[10] * 7, *[11] * 9, *[12] * 14, *[13] * 18, *[14] * 27]
    expected += [15] * (200 - len(expected))
    assert column == expected and row == [0] + [16 + bucket for bucket in expected[1:]]


def write_t5(folder, layout="one file"):
    """A folder as transformers saves it: config.json, weights, and the golden sentencepiece model."""
    torch.manual_seed(1)
    encoder = T5Encoder(T5Config(**SMALL)).eval()
    weights = encoder.state_dict() | {"decoder.block.0.x": torch.ones(2), "lm_head.weight": torch.ones(2)}
    config = SMALL | {"model_type": "t5", "feed_forward_proj": "gated-gelu", "dropout_rate": 0.1}
    (folder / "config.json").write_text(json.dumps(config))
    if layout == "only shared":
        del weights["encoder.embed_tokens.weight"]
    if layout == "only embed_tokens":
        del weights["shared.weight"]
    if layout == "shards":
        names = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(weights)}
        for file in set(names.values()):
            torch.save({name: w for name, w in weights.items() if names[name] == file}, folder / file)
        index = {"metadata": {}, "weight_map": names}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    elif layout == "safetensors":                                # no two names for one table in this format
        from safetensors.torch import save_file
        del weights["encoder.embed_tokens.weight"]
        save_file(weights, folder / "model.safetensors")
        (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "not_fetched.bin"}}')
    else:
        torch.save(weights, folder / "pytorch_model.bin")
    with np.load(ROOT / "tests" / "golden" / "spiece.npz") as file:
        (folder / "spiece.model").write_bytes(file["model"].tobytes())
    return encoder


@pytest.mark.parametrize("layout", ["one file", "only shared", "only embed_tokens", "shards",
                                    "safetensors"])
def test_every_layout_of_the_public_files_loads(tmp_path, layout):
    encoder, ids = write_t5(tmp_path, layout), torch.randint(50, (2, 9))
    loaded = load_t5(tmp_path)
    assert not loaded.training and torch.equal(loaded(ids), encoder(ids))
    assert load_t5(tmp_path, dtype=torch.bfloat16)(ids).dtype == torch.bfloat16


def test_safetensors_without_the_package_is_one_line_that_says_so(tmp_path, monkeypatch):
    write_t5(tmp_path, "safetensors")
    real = builtins.__import__

    def no_safetensors(name, *args, **named):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *args, **named)
    monkeypatch.setattr(builtins, "__import__", no_safetensors)
    with pytest.raises(InputError, match="pip install safetensors"):
        load_t5(tmp_path)


@pytest.mark.parametrize("change, message", [
    ({"model_type": "bert"}, "is not T5"), ({"feed_forward_proj": "relu"}, "is not T5"),
    ({"d_model": 32}, "does not fit"), ({"num_layers": 3}, "does not fit")])
def test_files_of_another_architecture_are_refused(tmp_path, change, message):
    write_t5(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=message):
        load_t5(tmp_path)


def test_missing_parts_of_a_t5_folder_are_named(tmp_path):
    with pytest.raises(InputError, match="config.json"):
        load_t5(tmp_path)
    write_t5(tmp_path)
    config = SMALL | {"model_type": "t5", "feed_forward_proj": "gated-gelu", "vocab_size": 70}
    torch.save(T5Encoder(T5Config(**SMALL | {"vocab_size": 70})).state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="75 pieces"):
        pretrained_text_encoder(tmp_path)
    (tmp_path / "spiece.model").unlink()
    with pytest.raises(InputError, match="holds no tokenizer"):
        pretrained_text_encoder(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match="no pytorch_model.bin and no model.safetensors"):
        load_t5(tmp_path)


@pytest.mark.parametrize("file, content, message", [
    ("config.json", b"[1]", "no readable config.json"), ("config.json", b"\xff", "no readable config.json"),
    ("config.json", b'{"d_model": null}', "no readable config.json"),
    ("pytorch_model.bin.index.json", b'{"weight_map": {"a": 3}}', "there is no 3"),
    ("pytorch_model.bin.index.json", b'{"weight_map"', "fetch it again"),
    ("pytorch_model.bin.index.json", b"{}", "fetch it again"),
    ("pytorch_model.bin", b"version https://git-lfs.github.com/spec/v1", "pytorch_model.bin"),
    ("model.safetensors", b"version https://git-lfs.github.com/spec/v1", "fetch it again")])
def test_damaged_parts_of_a_t5_folder_are_named(tmp_path, file, content, message):
    write_t5(tmp_path, "safetensors" if file == "model.safetensors" else "one file")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_t5(tmp_path)


# the tokenizers

def golden_tokenizer(tmp_path):
    with np.load(ROOT / "tests" / "golden" / "spiece.npz") as file:
        (tmp_path / "spiece.model").write_bytes(file["model"].tobytes())
        return T5Tokenizer(tmp_path / "spiece.model"), json.loads(file["cases"].item())


def test_ids_equal_those_of_sentencepiece_on_blanks_accents_emoji_and_long_texts(tmp_path):
    tokenizer, cases = golden_tokenizer(tmp_path)
    assert len(cases) >= 70
    for string, ids in cases:
        assert tokenizer.encode(string) == ids, string
    assert tokenizer.encode("") == [1]


def test_the_same_model_as_tokenizer_json_gives_the_same_ids_and_knows_special_words(tmp_path):
    tokenizer, cases = golden_tokenizer(tmp_path)
    pieces, blob, _ = T5Tokenizer.read_protobuf((tmp_path / "spiece.model").read_bytes())
    vocab = [[piece, 0.0 if score is None else float(score)] for piece, score in pieces]
    special = [{"id": i, "content": vocab[i][0]} for i in range(3)]
    normalizer = {"type": "Sequence", "normalizers": [
        {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(blob).decode()}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({
        "model": {"type": "Unigram", "unk_id": 2, "vocab": vocab}, "added_tokens": special,
        "normalizer": normalizer}))
    other = T5Tokenizer(tmp_path / "tokenizer.json")
    for string, ids in cases:
        assert other.encode(string) == ids, string
    assert other.encode("</s>") == [1, 1] and tokenizer.encode("</s>") != [1, 1]


WORDLESS = b'{"model": {"type": "Unigram", "vocab": [["a", "x"], ["b", "y"]]}, "added_tokens": []}'


@pytest.mark.parametrize("content", [b"", b"junk", b"{}", b'{"model": {"type": "BPE"}}', b"\x0a\xff",
                                     WORDLESS])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(InputError, match="spiece.model"):
        T5Tokenizer(tmp_path / "spiece.model")


def test_words_are_remembered_up_to_a_bound_and_long_ones_not_at_all(tmp_path):
    tokenizer, _ = golden_tokenizer(tmp_path)
    for i in range(70_000):
        tokenizer.encode(str(i))
    tokenizer.encode("ab" * 5000)
    known = tokenizer.remembered.cache_info()
    assert known.currsize <= known.maxsize <= 70_000 and known.misses == 70_000


def test_a_model_that_was_cut_at_any_byte_is_refused(tmp_path):
    golden_tokenizer(tmp_path)
    whole = (tmp_path / "spiece.model").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "spiece.model").write_bytes(whole[:length])
        with pytest.raises(InputError, match="spiece.model is not a readable"):
            T5Tokenizer(tmp_path / "spiece.model")


def test_words_are_numbered_by_frequency_and_unknown_ones_share_an_id():
    text = tiny_text_encoder(["a red star", "A red, RED heart"])
    assert text.tokenizer.words[:2] == ["red", "a"] and text.length == 6
    assert text.tokenizer.encode("red dragon") == [3, 2, 1]
    assert WordTokenizer.split("Don't: a  b") == ["don", "'", "t", ":", "a", "b"]


@pytest.mark.parametrize("given, cleaned", [
    ("A Red&nbsp;Circle", "a red circle"),
    ("see https://example.com/a.png now", "see now"),
    ("from www.shop.com/x today", "from today"),
    ("<b>bold</b> <person> here", "bold person here"),
    ("by @painter in oil", "by in oil"),
    ("\u4f60\u597d hello", "hello"),
    ("tall \u2014 short \u201cquoted\u201d \u2018s", "tall - short \"quoted\" 's"),
    ("at 192.168.0.1 or 1234567", "at or"),
    ("item #12 and #123456", "item and"),
    ("photo_0012.jpg of a cat", "of a cat"),
    ("wow!!! ... \u00ae\u2122 (new) [x]", "wow!!! new x"),
    ("this-is-a-long_title", "this is a long title"),
    ("caf%C3%A9+table", "caf\u00e9 table"),
    ("part jc6640 and 12ab34", "part and"),
    ("free shipping worldwide free shipping", ""),
    ("a poster 60x90 page 12", "a poster"),
    ("on 8.5\u00d711 paper", "on paper"),
    ("part a1b2c3 left", "part left"),
    ("two lines\\nof text", "two lines of text"),
    ("red --- or --- blue", "red - or - blue"),
    ("sale <![ now ]> red shoes", "sale red shoes"),
    ("one,two.three 3.5", "one, two. three 3.5"),
    ("'_quoted_'", "quoted"),
    ("", ""),
])
def test_captions_are_cleaned_step_by_step(given, cleaned):
    assert clean_caption(given) == cleaned


@pytest.mark.parametrize("unit", ["a", "<", "&", "http://", "-", "(", "a1", "a.", "1.", "<a ", "\u0130",
                                  ".jpg", "&#9999", " ", "a1b <a&"])
def test_a_caption_of_any_length_and_kind_is_cleaned_in_less_than_a_second(unit):
    started = time.process_time()
    clean_caption(unit * (1_000_000 // len(unit)))
    assert time.process_time() - started < 1


def test_only_what_is_beyond_all_tokens_of_a_caption_is_cut_off():
    words = " ".join(f"word{'ab'[i % 2]}" for i in range(600))
    assert len(words) > 3500 and clean_caption(words) == clean_caption(" " * 9000 + words) == words
    assert len(clean_caption("&#" + "9" * 5000 + "; red")) < 4000        # once a traceback from int()


def test_a_caption_of_which_nothing_is_left_is_one_end_token(tmp_path):
    write_t5(tmp_path)
    text = pretrained_text_encoder(tmp_path, length=5)
    ids = text.tokenize(["http://example.com", "<b></b>", "  ", "&amp;#0"])
    assert ids[:3].tolist() == [[0, 0, 0, 0, 1]] * 3 and text(ids)[0].isfinite().all()


# captions as conditions

CAPTIONS = [["a red star"], ["a blue heart on a white background", "blue heart"],
            ["a red star", "b", "c d e f"]]


def test_ids_are_padded_on_the_left_and_long_captions_keep_their_end_token():
    text = tiny_text_encoder(["one two three"])
    assert text.tokenize(["two", "one two three four five"]).tolist() == [[0, 0, 4, 1], [3, 4, 5, 1]]
    assert text.cut == 1
    features, mask = text(text.tokenize(["two"]))
    assert mask.tolist() == [[False, False, True, True]] and (features[0, :2] == 0).all()
    assert (features[0, 2:] != 0).all()


def test_a_caption_of_ten_thousand_words_is_cut():
    text = tiny_text_encoder([" ".join(map(str, range(10_000)))])
    assert text.length == 32 and text.tokenize(["7 " * 10_000]).shape == (1, 32)


def test_short_captions_are_drawn_in_30_of_100_cases_and_the_others_share_the_rest():
    captions = Captions(CAPTIONS, tiny_text_encoder(["a"]))
    names, rng = captions.names, np.random.default_rng(0)
    assert len(names) == len(captions.ids) == 5                  # "a red star" is there twice
    drawn = lambda picture: [names[i] for i in captions.draw(np.full(20_000, picture), rng)]
    share = lambda words, caption: words.count(caption) / 20_000
    assert set(drawn(0)) == {"a red star"}
    assert share(drawn(1), "blue heart") == pytest.approx(0.3, abs=0.02)
    third = drawn(2)
    shares = [share(third, caption) for caption in ("b", "c d e f", "a red star")]
    assert shares == pytest.approx([0.3, 0.35, 0.35], abs=0.02)


def test_cached_features_are_those_of_the_encoder_stored_without_padding(tmp_path, monkeypatch):
    write_t5(tmp_path)
    text = pretrained_text_encoder(tmp_path, length=12)
    captions = Captions(CAPTIONS, text)
    rows = np.array([3, 0, 2, 2])
    features, mask = captions(rows, text, "cpu")
    assert torch.equal(features, text(captions.ids[rows])[0])
    captions.cache_features(text, tmp_path, "cpu", batch_size=2)
    file = np.load(next(tmp_path.glob("features.*.npy")))
    assert file.dtype == np.uint16 and file.shape == ((captions.ids != 0).sum(), 24)
    kept, kept_mask = captions(rows, None, "cpu")
    assert torch.equal(kept_mask, mask)
    assert torch.allclose(kept.float(), features, rtol=1e-2, atol=1e-3) and (kept[~mask] == 0).all()
    monkeypatch.setattr(TextEncoder, "forward", None)            # found again, the encoder is not run
    again = Captions(CAPTIONS, text)
    again.cache_features(text, tmp_path, "cpu")
    assert torch.equal(again(rows, None, "cpu")[0], kept)


def test_prompts_keep_their_order_and_equal_ones_share_a_row_of_the_names():
    prompts = ["a red star", "a blue heart", "a red star"]
    text = tiny_text_encoder(prompts)
    conditions = Captions([[prompt] for prompt in prompts], text)
    rows = conditions.rows
    assert conditions.names == prompts[:2] and rows.tolist() == [0, 1, 0]
    assert conditions.draw(np.arange(3), np.random.default_rng(0)).tolist() == [0, 1, 0]
    features, mask = conditions(rows, text, "cpu")
    expected, expected_mask = text(text.tokenize(prompts))
    assert torch.equal(features, expected) and torch.equal(mask, expected_mask)


def test_classes_are_drawn_by_label_and_pictures_that_cannot_be_read_are_never_asked_for():
    conditions = Classes(["cat", "dog"], np.array([1, -1, 0, 1]))
    rows = conditions.draw(np.array([3, 2, 0]), np.random.default_rng(0))
    cond, mask = conditions(rows, None, "cpu")
    assert cond.dtype == torch.int64 and cond.tolist() == [1, 0, 1] and mask is None
    cond, _ = Classes(["cat", "dog"])([1, 1], None, "cpu")       # without pictures, as when samples are drawn
    assert cond.tolist() == [1, 1]


def test_a_tiny_text_encoder_survives_a_checkpoint(tmp_path):
    text = tiny_text_encoder(["a red star", "a blue heart"])
    torch.save(saved_text_encoder(text), tmp_path / "text.pt")
    again = tiny_text_encoder_from(torch.load(tmp_path / "text.pt", weights_only=True), "text.pt")
    ids = text.tokenize(["red heart"])
    assert torch.equal(ids, again.tokenize(["red heart"])) and torch.equal(text(ids)[0], again(ids)[0])
