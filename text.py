"""Text: the encoder of T5 (v1.1 and FLAN), its tokenizer, and the caption cleaning of the released models.

    caption --clean--> text --unigram segmentation--> ids (B, L) --T5Encoder--> features (B, L, D)

Shapes: B captions, L tokens of a caption, D model width, H heads, d channels of a head, F hidden width;
        for the GPT that reads the features D is called E.
Paper:  T5 (Raffel 2020), FLAN-T5 (Chung 2022); unigram segmentation: SentencePiece (Kudo 2018).
Run:    python text.py               # the shapes of one pass through a tiny encoder
"""
import base64
import html
import json
import math
import re
import unicodedata
import urllib.parse
from collections import Counter
from dataclasses import asdict, dataclass, fields
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import to_device
from runs import InputError, SharedArray, build, read_checkpoint, short_hash, weights_hash


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


class T5Norm(nn.Module):
    """RMSNorm: no mean, no bias, computed in float32."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.eps = config.layer_norm_epsilon

    def forward(self, x):
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(self.weight.dtype)


def relative_buckets(L, config, device=None):
    """Which entry of the position bias a query (row) uses for a key (column): (L, L) int64.

    Half of the buckets are for keys after the query. In each half, the first half counts single steps; the
    others grow with the logarithm of the distance up to max_distance.
    """
    half = config.relative_attention_num_buckets // 2
    single = half // 2
    place = torch.arange(L, device=device)
    distance = place[None, :] - place[:, None]                   # key - query
    steps = distance.abs()
    scale = (half - single) / math.log(config.relative_attention_max_distance / single)
    far = single + ((steps.clamp(min=1) / single).log() * scale).long()
    bucket = torch.where(steps < single, steps, far.clamp(max=half - 1))
    return bucket + half * (distance > 0)


class T5Attention(nn.Module):
    """Self-attention over the whole caption. Scores are not divided by sqrt(d); q starts smaller instead."""

    def __init__(self, config, with_bias):
        super().__init__()
        width = config.num_heads * config.d_kv
        self.d_kv = config.d_kv
        self.q = nn.Linear(config.d_model, width, bias=False)
        self.k = nn.Linear(config.d_model, width, bias=False)
        self.v = nn.Linear(config.d_model, width, bias=False)
        self.o = nn.Linear(width, config.d_model, bias=False)
        if with_bias:
            buckets = config.relative_attention_num_buckets
            self.relative_attention_bias = nn.Embedding(buckets, config.num_heads)

    def forward(self, x, bias):                                  # x  (B, L, D)   bias (B, H, L, L)
        heads = lambda t: t.unflatten(2, (-1, self.d_kv)).transpose(1, 2)        # (B, L, H d) -> (B, H, L, d)
        y = F.scaled_dot_product_attention(heads(self.q(x)), heads(self.k(x)), heads(self.v(x)),
                                           attn_mask=bias, scale=1.0)
        return self.o(y.transpose(1, 2).flatten(2))


class T5FeedForward(nn.Module):
    """Gated GELU, in its tanh approximation: wo(gelu(wi_0 x) * wi_1 x)."""

    def __init__(self, config):
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x):
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class T5Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)). Nested like the names in the public files."""

    def __init__(self, config, with_bias):
        super().__init__()
        self.layer = nn.ModuleList([nn.Module(), nn.Module()])
        self.layer[0].SelfAttention = T5Attention(config, with_bias)
        self.layer[0].layer_norm = T5Norm(config)
        self.layer[1].DenseReluDense = T5FeedForward(config)
        self.layer[1].layer_norm = T5Norm(config)

    def forward(self, x, bias):
        first, second = self.layer
        x = x + first.SelfAttention(first.layer_norm(x), bias)
        return x + second.DenseReluDense(second.layer_norm(x))


class T5Encoder(nn.Module):
    """Token ids to features, without a position embedding: only attention knows about places."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = nn.Module()
        self.encoder.embed_tokens = self.shared                  # two names for one table, as in the files
        self.encoder.block = nn.ModuleList(T5Block(config, with_bias=i == 0)    # one bias serves all layers
                                           for i in range(config.num_layers))
        self.encoder.final_layer_norm = T5Norm(config)

        for name, weight in self.named_parameters():             # scores are not scaled, so q starts smaller
            if weight.dim() == 2 and name != "shared.weight":
                scale = config.d_kv ** -0.5 if name.endswith("SelfAttention.q.weight") else 1
                nn.init.normal_(weight, std=scale * weight.shape[1] ** -0.5)

    def forward(self, ids, mask=None):
        """ids (B, L) -> features (B, L, D). mask (B, L), nonzero = valid; at padding they mean nothing."""
        L = ids.shape[1]
        x = self.shared(ids)                                     # x  (B, L, D)
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        bias = table(relative_buckets(L, self.config, ids.device)).permute(2, 0, 1)[None]       # (1, H, L, L)
        if mask is not None:
            # The lowest number instead of -inf, which would turn a caption without any token into NaN.
            hidden = torch.where(mask == 0, torch.finfo(bias.dtype).min, 0).to(bias.dtype)      # (B, L)
            bias = bias + hidden[:, None, None]                                          # (B, H, L, L)
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)


# ------------------------------------------------------------------------------------------------------------
# Loading the public files (Hugging Face's layout)

def load_t5(folder, device="cpu", dtype=torch.float32):
    """A T5Encoder in eval mode from a folder with config.json and pytorch_model.bin, its shards with their
    index, or .safetensors. Decoder weights are ignored."""
    folder = Path(folder)
    try:
        settings = dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder} has no readable config.json ({error}): --text-encoder wants a folder "
                         f"such as flan-t5-xl, with its config, weights and spiece.model") from None
    gated = settings.get("feed_forward_proj", "relu") == "gated-gelu"
    if settings.get("model_type", "t5") != "t5" or not gated:
        raise InputError(f"{folder} is not T5 v1.1 or FLAN-T5 (model_type {settings.get('model_type')}, "
                         f"feed_forward_proj {settings.get('feed_forward_proj', 'relu')})")
    config = T5Config(**{f.name: settings[f.name] for f in fields(T5Config) if f.name in settings})
    weights = {name: w for name, w in read_weights(folder).items()
               if name.startswith(("shared.", "encoder."))}
    table = weights.get("shared.weight", weights.get("encoder.embed_tokens.weight"))
    if table is None:
        raise InputError(f"{folder} holds no T5 encoder: shared.weight is missing")
    weights["shared.weight"] = weights["encoder.embed_tokens.weight"] = table
    return build(T5Encoder, config, weights, folder, device, dtype)


def read_weights(folder):
    """All tensors of a folder, memory-mapped: of one file, or of all files that the index names."""
    lacking = []
    for name, read in (("pytorch_model.bin", lambda path: read_checkpoint(path, mmap=True)["model"]),
                       ("model.safetensors", read_safetensors)):
        index, files = folder / f"{name}.index.json", [name]
        if index.exists():
            try:
                files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{index} is damaged ({error!r}): fetch it again") from None
        missing = [file for file in files if not (folder / file).exists()]
        if not missing:
            return {key: w for file in files for key, w in read(folder / file).items()}
        lacking += missing
    raise InputError(f"{folder} lacks its weights: there is no {' and no '.join(lacking)}")


def read_safetensors(path):
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise InputError(f"{path} needs the package safetensors: pip install safetensors, or use "
                         f"pytorch_model.bin") from None
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({error}): fetch it again") from None


# ------------------------------------------------------------------------------------------------------------
# The tokenizer: SentencePiece's unigram model

def protobuf_fields(data):
    """(field number, value) pairs of one protobuf message: int for varints, bytes for the rest."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
    while at < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        length = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        yield number, data[at:at + length]
        at += length


class CharacterMap:
    """SentencePiece's normalisation: replaces byte sequences by others, the longest match first.

    The map is a double-array trie. Unit u: label u & 0x800000FF, bit 8 = a value hangs here, offset in the
    upper bits; the value is the place of the replacement in a list of strings that end in a zero byte.
    """

    def __init__(self, blob):
        size = int.from_bytes(blob[:4], "little")
        self.units = np.frombuffer(blob[4:4 + size], "<u4").tolist()
        self.replacements = blob[4 + size:]

    @staticmethod
    def offset(unit):
        return (unit >> 10) << ((unit & 512) >> 6)

    def longest_match(self, data, start):
        """The end of the longest match from `start` and its replacement, or None."""
        node, found = self.offset(self.units[0]), None
        for at in range(start, len(data)):
            node ^= data[at]
            if node >= len(self.units) or self.units[node] & 0x800000FF != data[at]:
                break
            unit = self.units[node]
            node ^= self.offset(unit)
            if unit & 256:
                place = self.units[node] & 0x7FFFFFFF
                found = at + 1, self.replacements[place:self.replacements.index(0, place)]
        return found

    def __call__(self, text):
        data, out, at = text.encode("utf-8", "replace"), [], 0
        while at < len(data):
            match = self.longest_match(data, at)
            if match:
                at, new = match
            else:                                                # one character as it is
                end = at + 1
                while end < len(data) and data[end] & 0xC0 == 0x80:
                    end += 1
                at, new = end, data[at:end]
            out.append(new)
        return b"".join(out).decode("utf-8", "replace")


class T5Tokenizer:
    """Text to ids, by spiece.model or tokenizer.json; without cleaning, cutting or padding."""
    SPACE, END = "\u2581", 1

    def __init__(self, path):
        try:
            data = Path(path).read_bytes()
            read = self.read_json if data[:1] == b"{" else self.read_protobuf
            pieces, blob, self.special = read(data)
            self.normalise = CharacterMap(blob) if blob else lambda text: text
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error})") from None
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise InputError(f"{path} is neither a spiece.model nor a tokenizer.json of T5 "
                             f"({error!r})") from None
        self.size = len(pieces)
        self.scores = {piece: (np.float32(score), i) for i, (piece, score) in enumerate(pieces)
                       if score is not None}
        if len(self.scores) < 2:
            raise InputError(f"{path} holds no unigram vocabulary")
        self.longest = max(map(len, self.scores))
        self.unknown_score = min(score for score, _ in self.scores.values()) - np.float32(10)
        self.words = {}                                          # ids of words met before

    @staticmethod
    def read_protobuf(data):
        pieces, blob = [], b""
        for number, value in protobuf_fields(data):
            if number == 1:                                      # a piece: 1 text, 2 score, 3 type
                fields = dict(protobuf_fields(value))
                normal = fields.get(3, 1) == 1
                score = np.frombuffer(fields[2], "<f4")[0] if 2 in fields else np.float32(0)
                pieces.append((fields[1].decode(), score if normal else None))
            elif number == 3:                                    # the normaliser: 2 precompiled map
                blob = dict(protobuf_fields(value)).get(2, b"")
        return pieces, blob, {}

    @staticmethod
    def read_json(data):
        file = json.loads(data)
        if file["model"]["type"] != "Unigram":
            raise ValueError(f"a {file['model']['type']} model")
        special = {token["content"]: token["id"] for token in file["added_tokens"]}
        pieces = [(piece, None if piece in special else score) for piece, score in file["model"]["vocab"]]
        normaliser = file.get("normalizer") or {}
        parts = normaliser.get("normalizers", [normaliser])
        blob = next((part["precompiled_charsmap"] for part in parts if "precompiled_charsmap" in part), "")
        return pieces, base64.b64decode(blob), special

    def encode(self, text):
        """The ids of a text, a list that ends in 1 (</s>)."""
        ids = []
        for part in self.split_special(text):
            if part in self.special:
                ids.append(self.special[part])
                continue
            # Plain ASCII maps to itself, but for control characters.
            if not (part.isascii() and part.isprintable()):
                part = self.normalise(part)
            for word in part.split(" "):
                if word:                                         # runs of blanks count as one
                    if word not in self.words:
                        self.words[word] = self.segment(self.SPACE + word)
                    ids += self.words[word]
        return ids + [self.END]

    def split_special(self, text):
        if not self.special or "<" not in text:
            return [text]
        pattern = "|".join(map(re.escape, sorted(self.special, key=len, reverse=True)))
        return re.split(f"({pattern})", text)

    def segment(self, word):
        """The pieces of one word with the largest sum of scores (Viterbi), as ids.

        No piece of T5 has a blank inside, so words do not influence each other. Sums are in float32 and the
        first of two equal ways stays, as in SentencePiece.
        """
        best = [(np.float32(0), 0, None)] + [None] * len(word)   # per end: score, start of last piece, its id
        for start in range(len(word)):
            before = best[start][0]
            for end in range(start + 1, min(len(word), start + self.longest) + 1):
                piece = self.scores.get(word[start:end])
                if piece is None and end == start + 1:
                    piece = (self.unknown_score, 2)
                if piece and (best[end] is None or before + piece[0] > best[end][0]):
                    best[end] = (before + piece[0], start, piece[1])
        ids, at = [], len(word)
        while at > 0:
            _, at, i = best[at]
            if not (i == 2 and ids and ids[-1] == 2):            # neighbouring unknowns become one
                ids.append(i)
        return ids[::-1]


# ------------------------------------------------------------------------------------------------------------
# The cleaning that captions went through before the released models saw them

ADDRESSES = (
    (r"<person>", "person"),
    (r"(https?:|www\.)\S+", ""),
    (r"\b[\w.-]+\.(com|co|ru|net|org|edu|gov|it)\b[\w/-]*", ""),
)
SIGNS = (
    (r"@\w+", ""),                                               # names of people
    ("[\u31c0-\u4dff\u4e00-\u9fff]", ""),                       # Chinese characters and signs
    ("[\"`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    ("[\u2018\u2019]", "'"),
    (r"&(quot|amp);?", ""),
    (r"\\n", " "),                                              # a line break that was spelled out
    (r"\b\d{1,3}(\.\d{1,3}){3}\b", " "),                        # internet addresses
    (r"#\d{1,3}\b|#\d{5,}\b|\b\d{6,}\b", ""),                  # numbers of articles
    (r"\S+\.(png|jpe?g|bmp|webp|eps|pdf|apk|mp4)", ""),          # names of files
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    ("[#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~()\\[\\]{}|\\\\/*]+", " "),
    (r"\s\.\s", " "),
)
ADVERTS = (
    (r"\b[a-z]{1,3}\d{3,15}\b|\b[a-z]+\d+[a-z]+\b|\b\d+[a-z]+\d+\b", ""),     # codes such as jc6640
    (r"(worldwide\s+)?(free\s+)?shipping|(free\s)?download(\sfree)?|\bclick\b\s(for|on)\s\w+", ""),
    (r"\b(png|jpe?g|bmp|webp|eps|pdf|apk|mp4)(\simages?)?", ""),
    (r"\b\d*[a-z]+\d+[a-z]+\d+[a-z\d]*\b", " "),                  # longer codes, j2d1a2a
    (r"\bpage\s+\d+\b|\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", " "),     # pages; 8.5 by 11
    (r"\s:\s", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"""^\s+|\s+$""", ""),
    (r"""^["'](.+)["']$""", r"\1"),
    (r"^['_,:;-]|['_,:+-]$|^\.\S+$", ""),
)


class TextOfHTML(HTMLParser):
    """Collects what stands between the tags."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        try:
            self.feed(text)
            self.close()
        except AssertionError:                                   # "<![" that opens nothing
            self.found = [text]

    def handle_data(self, data):
        self.found.append(data)


def clean_caption(text):
    """A web picture's caption without addresses, tags, file names, product codes, odd signs; in lower case.

    The released text models saw captions cleaned like this, twice over. There, ftfy and BeautifulSoup repair
    encodings and strip tags; here, the standard library does what it can.
    """
    def replace(table):
        nonlocal text
        for pattern, new in table:
            text = re.sub(pattern, new, text)

    for _ in range(2):
        text = urllib.parse.unquote_plus(text).strip().lower()
        replace(ADDRESSES)
        text = "".join(TextOfHTML(text).found)
        if not text.isascii():                                   # Pd: every dash that Unicode has
            text = "".join("-" if unicodedata.category(c) == "Pd" else c for c in text)
        text = re.sub("-+", "-", text)
        replace(SIGNS)
        if len(re.findall("[-_]", text)) > 3:                    # this-is-a-title
            text = re.sub("[-_]", " ", text)
        text = html.unescape(html.unescape(text)).strip()
        replace(ADVERTS)
        text = text.strip()
    return text


# ------------------------------------------------------------------------------------------------------------
# Captions as the GPT's condition

class WordTokenizer:
    """Words to ids, for a small data set: 0 padding, 1 the end, 2 unknown, then the words of the training
    captions, the most frequent first."""

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

    def __init__(self, tokenizer, t5, length, clean=lambda text: text):
        super().__init__()
        self.tokenizer, self.t5, self.length, self.clean = tokenizer, t5, length, clean
        self.cut = 0                                             # captions so far that were too long

    def tokenize(self, captions):
        """Captions (a list of B strings) -> ids (B, L) int32, padded with 0 on the left. Of a caption that is
        too long the first L - 1 ids and </s> stay."""
        ids = np.zeros((len(captions), self.length), np.int32)
        for row, caption in zip(ids, captions):
            found = self.tokenizer.encode(self.clean(caption))
            if len(found) > self.length:
                found = found[:self.length - 1] + found[-1:]
                self.cut += 1
            row[self.length - len(found):] = found
        return torch.from_numpy(ids)

    def forward(self, ids):                                      # ids       (B, L)
        mask = ids != 0
        return self.t5(ids, mask) * mask[..., None], mask        # features  (B, L, E), mask (B, L)


def tiny_text_encoder(captions, max_length=32, max_words=8000):
    """An untrained TextEncoder for these captions, to be trained together with the GPT. Its L is the length
    of the longest caption, at most max_length."""
    counts = Counter(word for caption in captions for word in WordTokenizer.split(caption))
    tokenizer = WordTokenizer(word for word, _ in counts.most_common(max_words))
    length = min(max_length, max(len(tokenizer.encode(caption)) for caption in captions))
    return TextEncoder(tokenizer, T5Encoder(T5Config(vocab_size=len(tokenizer.words) + 3, **TINY_T5)), length)


def pretrained_text_encoder(folder, length=120, device="cpu"):
    """FLAN-T5 from a folder of Hugging Face's layout, frozen, with the captions cleaned; bf16 on CUDA."""
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    t5 = load_t5(folder, device, dtype).requires_grad_(False)
    names = ("spiece.model", "tokenizer.json")
    path = next((Path(folder) / name for name in names if (Path(folder) / name).exists()), None)
    if path is None:
        raise InputError(f"{folder} holds no tokenizer: put its spiece.model or tokenizer.json there")
    tokenizer = T5Tokenizer(path)
    if tokenizer.size > t5.config.vocab_size:
        raise InputError(f"{path} does not belong to this encoder: it has {tokenizer.size:,} pieces, the "
                         f"encoder knows {t5.config.vocab_size:,}")
    return TextEncoder(tokenizer, t5, length, clean_caption)


def saved_text_encoder(text):
    """What a GPT's checkpoint keeps of a tiny TextEncoder; see tiny_text_encoder_from."""
    return dict(model=text.t5.state_dict(), config=asdict(text.t5.config), words=text.tokenizer.words,
                length=text.length)


def tiny_text_encoder_from(saved, path, device="cpu"):
    """The TextEncoder, in eval mode, that saved_text_encoder described."""
    t5 = build(T5Encoder, T5Config(**saved["config"]), saved["model"], path, device, torch.float32)
    return TextEncoder(WordTokenizer(saved["words"]), t5, saved["length"]).eval()


class Classes:
    """The classes of M pictures as conditions.

    names   of the classes, K
    labels  int64 (M,), -1 for pictures that could not be read and are never asked for; None: only for drawing
    """

    def __init__(self, names, labels=None):
        self.names, self.labels = names, labels

    def draw(self, pictures, rng):
        """For each of these pictures, (B,), the row of names that it shows: (B,)."""
        return self.labels[pictures]

    def __call__(self, rows, text, device):
        """The GPT's cond (B,) and no cond_mask for these rows of names, (B,)."""
        return to_device(torch.from_numpy(rows), device), None


class Captions:
    """The captions of M pictures, one or several each, as conditions: from their ids, or from features that
    were computed once.

    names  the U captions that differ
    ids    (U, L) int32
    rows   for all captions of all pictures, one picture after another, their place in names
    width  E
    """

    def __init__(self, captions, text):
        flat = [caption for several in captions for caption in sorted(several, key=len)]
        self.names = list(dict.fromkeys(flat))
        number = {caption: i for i, caption in enumerate(self.names)}
        self.ids, self.width = text.tokenize(self.names), text.t5.config.d_model
        self.rows = np.array([number[caption] for caption in flat])
        self.count = np.array([len(several) for several in captions])
        self.first = self.count.cumsum() - self.count            # where each picture's captions begin in rows
        self.features = None

    def draw(self, pictures, rng):
        """For each of these pictures, (B,), one of its captions as a row of names: (B,). The shortest in 30 of
        100 cases, else one of the others, as in the paper's second stage: captions there came in a long and a
        short form, and prompts are short."""
        count, chance = self.count[pictures], rng.random(len(pictures))
        place = np.where(chance < 0.3, 0, 1 + (chance - 0.3) / 0.7 * (count - 1)).astype(int)
        return self.rows[self.first[pictures] + place.clip(max=count - 1)]

    def __call__(self, rows, text, device):
        """The GPT's cond (B, L, E) and cond_mask (B, L) for these rows of names, (B,): by the TextEncoder
        `text`, or from the cache if there is one."""
        ids = self.ids[rows]                                     # (B, L)
        if self.features is None:
            return text(to_device(ids, device))
        mask = ids != 0
        place = np.where(mask.numpy(), self.places(rows, ids.shape[1]), 0)
        features = torch.from_numpy(self.features[place]).view(torch.bfloat16) * mask[..., None]
        return to_device(features, device), to_device(mask, device)

    def places(self, rows, L):
        """Where the last L tokens of these captions are in the file of features, (B, L); wrong at padding."""
        return self.end[rows][:, None] - np.arange(L, 0, -1)

    @torch.inference_mode()
    def cache_features(self, text, folder, device, batch_size=32):
        """Run the frozen text encoder over all captions, once: features.KEY.npy in `folder` holds their valid
        tokens one after another, (all tokens, E) uint16, the bits of bf16."""
        length = (self.ids != 0).sum(dim=1).numpy()
        self.end = length.cumsum()
        key = short_hash([weights_hash(text.t5).encode(), self.ids.numpy().tobytes()])
        path = Path(folder) / f"features.{key}.npy"
        if not path.exists():
            cache = SharedArray(path, (int(self.end[-1]), text.t5.config.d_model), np.uint16, key,
                                units=len(length))
            mine = cache.mine[np.argsort(length[cache.mine])]    # neighbours of one length: little padding
            batches = [mine[i:i + batch_size] for i in range(0, len(mine), batch_size)]
            for batch in tqdm(batches, desc="text features", unit=" batches"):
                ids = self.ids[batch, -length[batch].max():]
                features, mask = (t.cpu() for t in text(ids.to(device)))
                place = self.places(batch, ids.shape[1])[mask.numpy()]
                cache.rows[place] = features[mask].bfloat16().view(torch.uint16).numpy()
                cache.done[batch] = cache.DONE
            cache.finish()
        self.features = np.load(path, mmap_mode="r")


if __name__ == "__main__":
    captions = ["a large red star on a navy background", "a red circle left of a blue square"]
    text = tiny_text_encoder(captions)
    ids = text.tokenize(captions)
    features, mask = text(ids)
    print(f"T5Encoder  {sum(p.numel() for p in text.parameters()):,} parameters")
    print(f"captions   {captions}")
    print(f"ids        {tuple(ids.shape)}: {ids[0].tolist()}, padding on the left")
    print(f"features   {tuple(features.shape)}, zeros where the mask {tuple(mask.shape)} is")
    print(f"cleaned    {clean_caption('A RED circle, see https://example.com/circle.png &amp; <b>more</b>')}")
