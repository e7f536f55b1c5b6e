"""Text: the encoder of T5 (v1.1 and FLAN), its tokenizer, caption cleaning, and conditions for the GPT.

    caption --clean--> text --unigram segmentation--> ids (B, L) --T5Encoder--> features (B, L, E)

Shapes: B captions, L tokens of a caption, D width (for the GPT: E), H heads, d channels of a head.
Paper:  T5 (Raffel 2020), FLAN-T5 (Chung 2022); unigram segmentation: SentencePiece (Kudo 2018).
Run:    python text.py               # the shapes of one pass through a tiny encoder
"""
import base64
import html
import json
import math
import re
import urllib.parse
from collections import Counter
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import to_device
from model import RMSNorm
from runs import (InputError, SharedArray, alone, build, explained, fast_dtype, read_checkpoint, read_config,
                  short_hash, weights_hash)


# ------------------------------------------------------------------------------------------------------------
# The encoder

@dataclass
class T5Config:
    """Names as in config.json. The defaults are T5 v1.1 small; flan-t5-xl is 2048, 64, 5120, 24, 32."""
    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64                       # channels of a head; num_heads * d_kv may differ from d_model
    d_ff: int = 1024
    num_layers: int = 8
    num_heads: int = 6
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6


TINY_T5 = dict(d_model=192, d_kv=48, d_ff=512, num_layers=1, num_heads=4)    # trained together with the GPT


def relative_buckets(L, config, device=None):
    """Which entry of the position bias a query (row) uses for a key (column): (L, L) int64.

    Half of the 32 are for keys after the query. Of a side's 16, the first 8 count single steps, as the order
    of neighbours decides what a phrase means. Farther off, "about how far" is enough: the other 8 grow with
    the logarithm of the distance n, up to max_distance = 128.
    """
    half = config.relative_attention_num_buckets // 2            # buckets of one side
    exact = half // 2
    place = torch.arange(L, device=device)
    distance = place[None, :] - place[:, None]                   # key - query
    steps = distance.abs()
    # bucket(n) = exact + (half - exact) log(n / exact) / log(max_distance / exact)
    scale = (half - exact) / math.log(config.relative_attention_max_distance / exact)
    far = exact + ((steps.clamp(min=1) / exact).log() * scale).long()
    bucket = torch.where(steps < exact, steps, far.clamp(max=half - 1))
    return bucket + half * (distance > 0)


class T5Attention(nn.Module):
    """Self-attention over the caption: softmax(q k^T + bias) v. No division by sqrt(d); q starts smaller."""

    def __init__(self, config):
        super().__init__()
        self.d_kv, width = config.d_kv, config.num_heads * config.d_kv
        self.q, self.k, self.v = (nn.Linear(config.d_model, width, bias=False) for _ in range(3))
        self.o = nn.Linear(width, config.d_model, bias=False)

    def forward(self, x, bias):                                  # x  (B, L, D)   bias (B, H, L, L)
        q, k, v = (part(x).unflatten(2, (-1, self.d_kv)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)      # y  (B, H, L, d)
        return self.o(y.transpose(1, 2).flatten(2))


class T5Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)). Nested as the names in the public files are."""

    def __init__(self, config):
        super().__init__()
        norm = lambda: RMSNorm(config.d_model, config.layer_norm_epsilon)
        linear = lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False)
        D, hidden = config.d_model, config.d_ff
        gated = {"wi_0": linear(D, hidden), "wi_1": linear(D, hidden), "wo": linear(hidden, D)}
        self.layer = nn.ModuleList([
            nn.ModuleDict({"SelfAttention": T5Attention(config), "layer_norm": norm()}),
            nn.ModuleDict({"DenseReluDense": nn.ModuleDict(gated), "layer_norm": norm()})])

    def forward(self, x, bias):
        first, second = self.layer
        x = x + first.SelfAttention(first.layer_norm(x), bias)
        # Gated GELU, in its tanh approximation: wo(gelu(wi_0 y) * wi_1 y)
        y, gated = second.layer_norm(x), second.DenseReluDense
        return x + gated.wo(F.gelu(gated.wi_0(y), approximate="tanh") * gated.wi_1(y))


class T5Encoder(nn.Module):
    """Token ids to features, without a position embedding: only attention knows about places."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = nn.Module()
        self.encoder.embed_tokens = self.shared                  # two names for one table, as in the files
        self.encoder.block = nn.ModuleList(T5Block(config) for _ in range(config.num_layers))
        bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)     # one for all layers
        self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias = bias
        self.encoder.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

        # With q_i and k_i of about 1, a score q.k has a standard deviation of sqrt(d), and the softmax sees
        # little but one key. T5 divides not every score but the first weights of q: training may change it.
        for name, weight in self.named_parameters():
            if weight.dim() == 2 and name != "shared.weight":
                scale = config.d_kv ** -0.5 if name.endswith("SelfAttention.q.weight") else 1
                nn.init.normal_(weight, std=scale * weight.shape[1] ** -0.5)

    def forward(self, ids, mask=None):
        """ids (B, L) -> features (B, L, D). mask (B, L), nonzero = valid; at padding they mean nothing."""
        x = self.shared(ids)                                     # x  (B, L, D)
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        bias = table(relative_buckets(ids.shape[1], self.config, ids.device)).permute(2, 0, 1)   # (H, L, L)
        if mask is not None:
            # Not -inf: where a row has nothing else, as in a caption without any token, softmax is 0 / 0.
            hidden = torch.where(mask == 0, torch.finfo(bias.dtype).min, 0).to(bias.dtype)      # (B, L)
            bias = bias + hidden[:, None, None]                                          # (B, H, L, L)
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)


# ------------------------------------------------------------------------------------------------------------
# Loading the public files (Hugging Face's layout)

def load_t5(folder, device="cpu", dtype=torch.float32):
    """A T5Encoder in eval mode from config.json and weights, .bin or .safetensors; the decoder is ignored."""
    folder = Path(folder)
    cure = "--text-encoder wants a folder such as flan-t5-xl, with its config, weights and spiece.model"
    with explained(f"{folder} has no readable config.json", cure):
        given = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        config = T5Config(**{f.name: f.type(given[f.name]) for f in fields(T5Config) if f.name in given})
    # T5 v1.0 has the same names but a ReLU without a gate; files that say nothing are of that kind.
    kind, activation = given.get("model_type", "t5"), given.get("feed_forward_proj", "relu")
    if (kind, activation) != ("t5", "gated-gelu"):
        raise InputError(f"{folder} is not T5 v1.1 or FLAN-T5 (model_type {kind}, feed_forward_proj "
                         f"{activation}): pass a folder such as flan-t5-xl")
    weights = {name: w for name, w in read_weights(folder).items() if re.match(r"(shared|encoder)\.", name)}
    table = weights.get("shared.weight", weights.get("encoder.embed_tokens.weight"))
    if table is None:
        raise InputError(f"{folder} holds no T5 encoder: shared.weight is missing")
    weights["shared.weight"] = weights["encoder.embed_tokens.weight"] = table
    return build(T5Encoder, config, weights, folder, device, dtype)


def read_weights(folder):
    """All tensors of one file, or of all that an index names; one with files never fetched does not count."""
    lacking = []
    for name, read in (("pytorch_model.bin", lambda path: read_checkpoint(path, mmap=True)["model"]),
                       ("model.safetensors", read_safetensors)):
        index, files = folder / f"{name}.index.json", [name]
        if index.exists():
            with explained(f"{index} is damaged", "fetch it again"):
                files = sorted(set(map(str, json.loads(index.read_text("utf-8"))["weight_map"].values())))
        missing = [file for file in files if not (folder / file).exists()]
        if not missing:
            return {key: w for file in files for key, w in read(folder / file).items()}
        lacking += missing
    raise InputError(f"{folder} lacks its weights: there is no {' and no '.join(lacking)}")


def read_safetensors(path):
    with explained(f"{path} cannot be read", "pip install safetensors, or fetch it again"):
        from safetensors.torch import load_file
        return load_file(path)


# ------------------------------------------------------------------------------------------------------------
# The tokenizer: SentencePiece's unigram model

def protobuf_fields(data):
    """(field number, value) pairs of one protobuf message: int for varints, bytes for the rest."""
    at = 0

    def varint():
        """7 bits a byte, the lowest first; the top bit says that another byte follows."""
        nonlocal at
        byte, at = data[at], at + 1
        return byte if byte < 128 else byte - 128 + 128 * varint()

    while at < len(data):
        field, kind = divmod(varint(), 8)
        number = varint() if kind in (0, 2) else {1: 8, 5: 4}[kind]      # the value itself, or its bytes
        begin, at = at, at + (number if kind else 0)
        if at > len(data):
            raise ValueError("it ends early")
        yield field, data[begin:at] if kind else number


class CharacterMap:
    """SentencePiece's normalisation: replaces byte sequences by others, the longest match first.

    The map is a trie, a tree whose paths from the root spell the sequences, in one array. The child of a node
    for byte b is at node ^ offset ^ b, if the label there is b; children of other nodes lie in the gaps. Of a
    unit, bits 0-7 and 31 are the label, bit 8 says that a sequence ends here, bits 9-30 hold the offset.
    Where byte 0 would lead is then the place of its replacement in a list of strings that end in a zero byte.
    """

    def __init__(self, blob):
        size = int.from_bytes(blob[:4], "little")
        self.units = np.frombuffer(blob[4:4 + size], "<u4").tolist()
        self.offsets = [(unit >> 10) << ((unit & 512) >> 6) for unit in self.units]     # bit 9: steps of 256
        self.replacements = blob[4 + size:]

    def __call__(self, text):
        data, out, start = text.encode("utf-8", "replace"), [], 0
        while start < len(data):
            # Without a match one byte stays as it is; no sequence begins inside a character.
            node, end, new = self.offsets[0], start + 1, data[start:start + 1]
            for at in range(start, len(data)):
                node ^= data[at]
                if node >= len(self.units) or (unit := self.units[node]) & 0x800000FF != data[at]:
                    break
                node ^= self.offsets[node]
                if unit & 256:                                   # a sequence ends here
                    place = self.units[node] & 0x7FFFFFFF
                    end, new = at + 1, self.replacements[place:self.replacements.index(0, place)]
            out.append(new)
            start = end
        return b"".join(out).decode("utf-8", "replace")


class T5Tokenizer:
    """Text to ids, by spiece.model or tokenizer.json; without cleaning, cutting or padding."""

    def __init__(self, path):
        with explained(f"{path} is not a readable spiece.model or tokenizer.json of T5", "fetch it again"):
            data = Path(path).read_bytes()
            pieces, blob, self.special = (self.read_json if data[:1] == b"{" else self.read_protobuf)(data)
            self.normalise = CharacterMap(blob) if blob else str
            self.scores = {piece: (np.float32(score), i) for i, (piece, score) in enumerate(pieces)
                           if score is not None}
        if len(self.scores) < 2:
            raise InputError(f"{path} holds no unigram vocabulary: fetch it again")
        self.size, self.longest = len(pieces), max(map(len, self.scores))
        # One character, so that every end can be reached; SentencePiece's penalty of 10 below all pieces.
        self.unknown = min(self.scores.values())[0] - np.float32(10), 2
        # The longest first, in parentheses: re.split then gives the markers as parts of their own.
        markers = "|".join(map(re.escape, sorted(self.special, key=len, reverse=True)))
        self.split_markers = re.compile(f"({markers})").split if markers else lambda text: [text]
        self.remembered = lru_cache(2 ** 16)(self.segment)       # the same words come again and again

    @staticmethod
    def read_protobuf(data):
        pieces, blob = [], None
        for field, message in protobuf_fields(data):
            if field == 1:                                       # a piece: 1 text, 2 score, 3 type
                piece = dict(protobuf_fields(message))
                score = np.frombuffer(piece[2], "<f4")[0] if 2 in piece else np.float32(0)
                pieces.append((piece[1].decode(), score if piece.get(3, 1) == 1 else None))
            elif field == 3:                                     # the normaliser: 2 precompiled map
                blob = dict(protobuf_fields(message)).get(2, b"")
        if blob is None:                                         # it comes last: cut between two fields
            raise ValueError("it ends early")
        return pieces, blob, {}

    @staticmethod
    def read_json(data):
        file = json.loads(data)
        if file["model"]["type"] != "Unigram":
            raise ValueError(f"a {file['model']['type']} model")
        # Markers such as </s> are found before the segmentation, which must not make them of other text.
        special = {token["content"]: token["id"] for token in file["added_tokens"]}
        pieces = [(piece, None if piece in special else score) for piece, score in file["model"]["vocab"]]
        normaliser = file.get("normalizer") or {}
        parts = normaliser.get("normalizers", [normaliser])
        blob = next((part["precompiled_charsmap"] for part in parts if "precompiled_charsmap" in part), "")
        return pieces, base64.b64decode(blob), special

    def encode(self, text):
        """The ids of a text, a list that ends in 1 (</s>)."""
        ids = []
        for part in self.split_markers(text):
            if part in self.special:
                ids.append(self.special[part])
                continue
            # Plain ASCII maps to itself, but for control characters.
            plain = part if part.isascii() and part.isprintable() else self.normalise(part)
            for word in filter(None, plain.split(" ")):          # no piece of T5 has a blank inside
                ids += (self.remembered if len(word) < 50 else self.segment)("\u2581" + word)
        return ids + [1]

    def segment(self, word):
        """The pieces of one word with the largest sum of scores, as ids: the likeliest way to cut it, as the
        score of a piece is the logarithm of its probability.

        Viterbi's algorithm: a word of n characters can be cut in 2^(n-1) ways, but the best way to reach
        `end` is the best way to some `start` and one piece more:

            best(end) = max over start of  best(start) + score(word[start:end])

        Sums are in float32 and the first of two equal ways stays, as in SentencePiece.
        """
        best = [(np.float32(0), 0, None)] + [None] * len(word)   # per end: score, start of last piece, its id
        for start in range(len(word)):
            for end in range(start + 1, min(len(word), start + self.longest) + 1):
                piece = self.scores.get(word[start:end], self.unknown if end == start + 1 else None)
                if piece and (best[end] is None or best[start][0] + piece[0] > best[end][0]):
                    best[end] = (best[start][0] + piece[0], start, piece[1])
        # From the end of the word back to its beginning, along the remembered starts.
        ids, at = [], len(word)
        while at > 0:
            _, at, i = best[at]
            if not (i == 2 and ids and ids[-1] == 2):            # neighbouring unknowns become one
                ids.append(i)
        return ids[::-1]


# ------------------------------------------------------------------------------------------------------------
# The cleaning that captions went through before the released models saw them

def without_tags(text):
    """What stands between the tags, entities such as &nbsp; resolved."""
    found, parser = [], HTMLParser()
    parser.handle_data = found.append
    try:
        parser.feed(text)
        parser.close()
    except AssertionError:                                       # "<![" that opens nothing
        return text
    return "".join(found)


# Steps in the order of the released models' code: each expects what the steps before it have left.
CLEANING = (
    urllib.parse.unquote_plus, str.strip, str.lower,
    # First what HTML's parser and the signs would tear apart: addresses.
    (r"<person>", "person"),
    (r"(https?:|www\.)\S+", ""),
    (r"\b[\w.-]+\.(com|co|ru|net|org|edu|gov|it)\b[\w/-]*", ""),
    without_tags,
    # Then names, numbers and signs that no picture shows.
    (r"[-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u2e5d\u301c\u3030\u30a0"
     r"\ufe31\ufe32\ufe58\ufe63\uff0d\U00010ead]+", "-"),        # every dash that Unicode has
    ("@\\w+|[\u31c0-\u4dff\u4e00-\u9fff]", ""),                 # names of people; Chinese characters
    ("[\"`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    ("[\u2018\u2019]", "'"),
    (r"&(quot|amp);?", ""),
    (r"\\n", " "),                                              # a line break that was spelled out
    (r"\b\d{1,3}(\.\d{1,3}){3}\b", " "),                        # internet addresses
    (r"#\d{1,3}\b|#\d{5,}\b|\b\d{6,}\b", ""),                  # numbers of articles
    (r"(?<!\S)\S+\.(png|jpe?g|bmp|webp|eps|pdf|apk|mp4)", ""),          # names of files
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    ("[#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~()\\[\\]{}|\\\\/*]+", " "),
    (r"\s\.\s", " "),
    (r"(?s)^([^-_]*[-_]){4}.*", lambda found: re.sub("[-_]", " ", found[0])),      # this-is-a-long-title
    html.unescape, html.unescape, str.strip,
    # Last what shops write around their pictures, and what all this has left at both ends.
    (r"\b[a-z]{1,3}\d{3,15}\b|\b[a-z]+\d+[a-z]+\b|\b\d+[a-z]+\d+\b", ""),     # codes such as jc6640
    (r"(worldwide\s+)?(free\s+)?shipping|(free\s)?download(\sfree)?|\bclick\b\s(for|on)\s\w+", ""),
    (r"\b(png|jpe?g|bmp|webp|eps|pdf|apk|mp4)(\simages?)?", ""),
    (r"\b\d*[a-z]+\d+[a-z]+\d+[a-z\d]*\b", " "),                  # longer codes, j2d1a2a
    (r"\bpage\s+\d+\b|\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", " "),     # pages; 8.5 by 11
    (r"\s:\s", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^\s+|\s+$", ""),
    (r"""^["'](.+)["']$""", r"\1"),
    (r"^['_,:;-]|['_,:+-]$|^\.\S+$", ""),
    str.strip,
)


def clean_caption(text):
    """A web picture's caption without addresses, tags, file names, product codes, odd signs; in lower case.

    The released text models saw captions cleaned like this, twice over: what was escaped twice shows its tags
    only after the first round. There, ftfy and BeautifulSoup repair more than the standard library does here.

    Some steps take the square of the length, so a very long text is cut first: FLAN-T5's 120 tokens are never
    above 1,920 characters. Beyond 4,300 digits html.unescape fails.
    """
    text = text.strip()[:4000]
    for step in CLEANING * 2:
        text = step(text) if callable(step) else re.sub(*step, text)
    return text


# ------------------------------------------------------------------------------------------------------------
# From captions to features

class WordTokenizer:
    """Ids of words: 0 padding, 1 the end, 2 unknown, as in T5; then the words, the most frequent first."""

    def __init__(self, words):
        self.words = list(words)
        self.ids = {word: i for i, word in enumerate(self.words, 3)}

    @staticmethod
    def split(text):
        return re.findall(r"\w+|[^\w\s]", text.lower())

    def encode(self, text):
        return [self.ids.get(word, 2) for word in self.split(text)] + [1]


class TextEncoder(nn.Module):
    """A tokenizer and a T5Encoder under one roof: captions -> the GPT's condition and its mask."""

    def __init__(self, tokenizer, t5, length, clean=str):
        super().__init__()
        self.tokenizer, self.t5, self.length, self.clean = tokenizer, t5, length, clean
        self.cut = 0                                             # captions so far that were too long

    def tokenize(self, captions):
        """B captions -> ids (B, L) int32. Of one that is too long, the first L - 1 ids and </s> stay. Padded
        with 0 on the left: the GPT predicts token 0 where the condition ends, so that place must be valid."""
        ids = np.zeros((len(captions), self.length), np.int32)
        for row, caption in zip(ids, captions):
            found = self.tokenizer.encode(self.clean(caption))
            self.cut += len(found) > self.length
            found = found[:-1][:self.length - 1] + found[-1:]
            row[-len(found):] = found
        return torch.from_numpy(ids)

    def forward(self, ids):                                      # ids       (B, L)
        mask = ids != 0
        return self.t5(ids, mask) * mask[..., None], mask        # features  (B, L, E), mask (B, L)


def tiny_text_encoder(captions, max_length=32, max_words=8000):
    """A TextEncoder to train together with the GPT; its L is the longest caption's, at most max_length."""
    counts = Counter(word for caption in captions for word in WordTokenizer.split(caption))
    tokenizer = WordTokenizer(word for word, _ in counts.most_common(max_words))
    length = min(max_length, max(len(tokenizer.encode(caption)) for caption in captions))
    return TextEncoder(tokenizer, T5Encoder(T5Config(vocab_size=len(tokenizer.words) + 3, **TINY_T5)), length)


def saved_text_encoder(text):
    """What a GPT's checkpoint keeps of a tiny TextEncoder; see tiny_text_encoder_from."""
    return dict(model=text.t5.state_dict(), config=asdict(text.t5.config), words=text.tokenizer.words,
                length=text.length)


def tiny_text_encoder_from(saved, path, device="cpu"):
    """The TextEncoder, in eval mode, that saved_text_encoder described."""
    with explained(f"{path} holds a damaged text encoder"):
        config = read_config(T5Config, saved["config"], path)
        t5 = build(T5Encoder, config, saved["model"], path, device, torch.float32)
        return TextEncoder(WordTokenizer(saved["words"]), t5, saved["length"]).eval()


def pretrained_text_encoder(folder, length=120, device="cpu"):
    """FLAN-T5 from a folder of Hugging Face's layout, frozen, with the captions cleaned; bf16 on cards that
    multiply it. Never float16, in which T5's large activations overflow."""
    device = torch.device(device)
    t5 = load_t5(folder, device, fast_dtype(device) if device.type == "cuda" else torch.float32)
    path = next(filter(Path.exists, map(Path(folder).joinpath, ("spiece.model", "tokenizer.json"))), None)
    if path is None:
        raise InputError(f"{folder} holds no tokenizer: put its spiece.model or tokenizer.json there")
    tokenizer = T5Tokenizer(path)
    if tokenizer.size > t5.config.vocab_size:
        raise InputError(f"{path} has {tokenizer.size:,} pieces, but the encoder beside it knows only "
                         f"{t5.config.vocab_size:,}: fetch both from the same model")
    return TextEncoder(tokenizer, t5.requires_grad_(False), length, clean_caption)


# ------------------------------------------------------------------------------------------------------------
# The condition of a GPT: classes or captions. Both know M pictures and have
#   names                                    what can be drawn: the class names, or the captions that differ
#   draw(pictures, rng) -> rows              which of the names each of these pictures (B,) is drawn for, (B,)
#   self(rows, text_encoder, device)         the GPT's cond and cond_mask for these names

class Classes:
    """Class ids (B,) and no mask. labels: int64 (M,), -1 for unreadable pictures: no one asks for those."""

    def __init__(self, names, labels=None):
        self.names, self.labels = names, labels

    def draw(self, pictures, rng):
        return self.labels[pictures]

    def __call__(self, rows, text_encoder, device):
        return to_device(torch.from_numpy(np.asarray(rows)), device), None


class Captions:
    """Text features (B, L, E) and their mask (B, L). captions: one or several of each of M pictures, M lists.

    names  the U captions that differ; ids (U, L) int32 are theirs, width is E
    rows   of all captions, one picture after another, their rows in names

    A text encoder that is trained along runs in every call; after cache_features, None takes its place.
    """

    def __init__(self, captions, text_encoder):
        flat = [caption for several in captions for caption in sorted(several, key=len)]
        row_of = {caption: row for row, caption in enumerate(dict.fromkeys(flat))}
        self.names = list(row_of)
        self.ids, self.width = text_encoder.tokenize(self.names), text_encoder.t5.config.d_model
        self.rows = np.array([row_of[caption] for caption in flat], np.int64)
        self.count = np.array([len(several) for several in captions])
        self.first = self.count.cumsum() - self.count            # where each picture's captions begin in rows
        self.features = None

    def draw(self, pictures, rng):
        """One caption for each picture: in 30 of 100 cases the shortest, else one of the others, as in the
        paper's second stage, where those are long descriptions by a machine; users type short ones."""
        count, chance = self.count[pictures], rng.random(len(pictures))
        # The part of [0, 1) from 0.3 on, stretched over the count - 1 others.
        place = np.where(chance < 0.3, 0, 1 + (chance - 0.3) / 0.7 * (count - 1)).astype(int)
        return self.rows[self.first[pictures] + place.clip(max=count - 1)]

    def __call__(self, rows, text_encoder, device):
        ids = self.ids[rows]                                     # ids  (B, L)
        if self.features is None:
            return text_encoder(to_device(ids, device))
        mask = ids != 0
        place = np.where(mask.numpy(), self.places(rows, ids.shape[1]), 0)
        features = to_device(torch.from_numpy(self.features[place]).view(torch.bfloat16), device)
        mask = to_device(mask, device)
        return features * mask[..., None], mask                  # features  (B, L, E), mask (B, L)

    def places(self, rows, L):
        """Where the last L tokens of these captions are in the file of features, (B, L); wrong at padding."""
        return self.end[rows][:, None] - np.arange(L, 0, -1)

    @torch.inference_mode()
    def cache_features(self, text_encoder, folder, device, batch_size=32):
        """Run the frozen text encoder once: features.KEY.npy in `folder` holds the captions' valid tokens one
        after another, (all tokens, E), in bf16, half of float32; NumPy, without bf16, calls it uint16."""
        length = (self.ids != 0).sum(dim=1).numpy()
        self.end = length.cumsum()
        key = short_hash([weights_hash(text_encoder.t5), self.ids.shape, self.ids.numpy().tobytes()])
        path = Path(folder) / f"features.{key}.npy"
        with alone(path, wait=True):
            if not path.exists():
                cache = SharedArray(path, (int(self.end[-1]), self.width), np.uint16, key, units=len(length))
                mine = cache.mine[np.argsort(length[cache.mine])]    # of one length: little padding
                batches = [mine[i:i + batch_size] for i in range(0, len(mine), batch_size)]
                for batch in tqdm(batches, desc="text features", unit=" batches"):
                    ids = self.ids[batch, -length[batch].max():]     # ids  (B, L) of the longest here
                    features, mask = (t.cpu() for t in text_encoder(ids.to(device)))
                    place = self.places(batch, ids.shape[1])[mask.numpy()]
                    cache.rows[place] = features[mask].bfloat16().view(torch.uint16).numpy()
                    cache.done[batch] = cache.DONE
                cache.finish()
        self.features = np.load(path, mmap_mode="r")


if __name__ == "__main__":
    captions = ["a large red star on a navy background", "a red circle left of a blue square"]
    text_encoder = tiny_text_encoder(captions)
    ids = text_encoder.tokenize(captions)
    features, mask = text_encoder(ids)
    print(f"T5Encoder  {sum(p.numel() for p in text_encoder.parameters()):,} parameters")
    print(f"captions   {captions}")
    print(f"ids        {tuple(ids.shape)}: {ids[0].tolist()}, padding on the left")
    print(f"features   {tuple(features.shape)}, zeros where the mask {tuple(mask.shape)} is")
    print(f"cleaned    {clean_caption('A RED circle, see https://example.com/circle.png &amp; <b>more</b>')}")
