"""The generator: a Llama-style transformer that predicts the tokens of an image one after another.

    [condition | token 0 | token 1 | ... | token N-2]  ->  logits of tokens 0, 1, ..., N-1

Shapes: B images, R sequences (B, or 2 B with guidance), T tokens given so far, N = block_size tokens of an
        image, V vocabulary, L condition tokens, S = L + T sequence, D model width, H heads, G key-value
        heads, d = D / H head width, E caption feature width, Q tokens drawn in one pass.
Paper:  LlamaGen (arXiv 2406.06525) section 2.2. RMSNorm (Zhang 2019), SwiGLU (Shazeer 2020), RoPE (Su 2021).
Run:    python model.py              # the shapes of one forward pass
"""
import copy
import math
import warnings
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

from runs import InputError, build, check_tensor, explained, free_memory, read_checkpoint, read_config


@dataclass
class GPTConfig:
    dim: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None         # fewer than n_head: grouped-query attention; None: as many
    vocab_size: int = 16384              # = the tokenizer's codebook size
    block_size: int = 256                # N, tokens of an image; a square
    num_classes: int = 1000
    model_type: str = "c2i"              # c2i: class to image; t2i: text features to image
    cls_token_num: int = 1               # L: 1 for a class, 120 in the released text models
    caption_dim: int = 2048              # E, t2i only: the width of FLAN-T5 XL's features
    token_dropout: float = 0.1
    resid_dropout: float = 0.1
    ffn_dropout: float = 0.1
    class_dropout: float = 0.1           # share of conditions replaced by the null condition, for guidance
    drop_path: float = 0.0           # stochastic depth: the last layer is skipped this often, the first never
    cond_rope: str = "zero"              # the condition's rows of the RoPE table: zero or identity, see there
    order: str = "raster"                # in which tokens are drawn: row by row, or neighbours, see there

    def __post_init__(self):
        for wrong, message in (
            (self.model_type not in ("c2i", "t2i"), f"model_type {self.model_type!r}: has to be c2i or t2i"),
            (self.cond_rope not in ("zero", "identity"),
             f"cond_rope {self.cond_rope!r}: has to be zero or identity"),
            (self.order not in ("raster", "neighbours"),
             f"order {self.order!r}: has to be raster or neighbours"),
            (self.model_type == "c2i" and self.cls_token_num != 1,
             f"cls_token_num {self.cls_token_num}: a class is one token"),
            (self.block_size < 1 or math.isqrt(self.block_size) ** 2 != self.block_size,
             f"block_size {self.block_size} is not a square: an image is a square grid of tokens"),
            (self.dim % self.n_head or self.dim // self.n_head % 4,
             f"dim {self.dim} over {self.n_head} heads: the head width has to be a multiple of 4, one half "
             f"for rows and one for columns, each in pairs"),
            (not 0 <= self.drop_path < 1, f"drop_path {self.drop_path}: has to be from 0 to below 1"),
            (self.n_kv_head and self.n_head % self.n_kv_head,
             f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}"),
        ):
            if wrong:
                raise InputError(message)


GPT_SIZES = {                                                    # GPT(GPTConfig(**GPT_SIZES["GPT-B"]))
    "tiny":     dict(n_layer=4,  n_head=4,  dim=192),            # 2M; a laptop, minutes
    "GPT-B":    dict(n_layer=12, n_head=12, dim=768),            # 111M
    "GPT-L":    dict(n_layer=24, n_head=16, dim=1024),           # 343M
    "GPT-XL":   dict(n_layer=36, n_head=20, dim=1280),           # 775M
    "GPT-XXL":  dict(n_layer=48, n_head=24, dim=1536),           # 1.4B
    "GPT-XXXL": dict(n_layer=48, n_head=40, dim=2560),           # 3.9B
    "GPT-1B":   dict(n_layer=22, n_head=32, dim=2048),           # 1.2B
    "GPT-3B":   dict(n_layer=24, n_head=32, dim=3200),           # 3.1B
    "GPT-7B":   dict(n_layer=32, n_head=32, dim=4096),           # 6.6B
}


# ------------------------------------------------------------------------------------------------------------
# 2D rotary position embedding

def rope_table(config, device=None, base=10000.0):
    """Cosine and sine of every position's angles, (L + N, d/2, 2) float32.

    RoPE turns each pair of channels by an angle proportional to the position, so that q.k depends on the
    distance between the two. In 2D the first half of a head's pairs turns with the row, the second half with
    the column:
        angle(row, pair i) = row * base^(-4 i / d),  i = 0 .. d/4 - 1,  and the same for the column.
    The condition's L rows are zeros in the released weights, not the identity: their q and k vanish, so that
    every image token scores every condition token exactly 0 and sees the plain mean of their values. Of one
    class token that is all there is; of a caption, cond_rope = "identity" (cos 1, sin 0: not turned) lets
    every image token look for the words that it needs.
    """
    d = config.dim // config.n_head
    side = math.isqrt(config.block_size)
    frequencies = base ** (-4 * torch.arange(d // 4, dtype=torch.float32, device=device) / d)        # (d/4,)
    angles = torch.arange(side, dtype=torch.float32, device=device)[:, None] * frequencies       # (side, d/4)
    rows = angles[:, None].expand(side, side, -1)
    columns = angles[None, :].expand(side, side, -1)
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)                                       # (N, d/2)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)                                    # (N, d/2, 2)
    condition = table.new_zeros(config.cls_token_num, *table.shape[1:])                          # (L, d/2, 2)
    condition[..., 0] = config.cond_rope == "identity"           # the cosine; the sine stays 0
    return torch.cat([condition, table])


class Neighbours:
    """An order of fewer passes (NAR, arXiv 2503.10696): all places at one distance, row + column, from the
    corner are drawn at once, 2 n - 1 passes for n x n tokens instead of n^2.

        0 1 2      Each token predicts two others: its right neighbour through GPT.output and its lower one
        1 2 3      through GPT.lower. Where both reach a place, their logits are averaged. The tokens of a
        2 3 4      pass do not see each other before they are drawn, but from then on all see all.

    order    (N,)    the raster index of the token that stands at each place of the sequence
    turn     (N,)    the pass in which that one is drawn
    passes   the parts of the sequence that are drawn together, 2 n - 1 slices
    sources  (N, 2)  of each raster index: where in the sequence its left and its upper neighbour stand,
                     counted from 1; 0 is the condition, and also stands for a neighbour that is not there
    shares   (N, 2)  how much each of the two counts
    """

    def __init__(self, n, device=None):
        place = torch.arange(n * n, device=device)
        row, column = place // n, place % n
        self.order = ((row + column) * n + row).argsort()
        self.turn = (row + column)[self.order]
        ends = list(accumulate(min(d, n, 2 * n - d) for d in range(2 * n)))      # 0, 1, 3, ..., N
        self.passes = [slice(start, stop) for start, stop in zip(ends, ends[1:])]
        there = torch.stack([column > 0, row > 0], dim=-1)                                       # (N, 2)
        rank = self.order.argsort()
        self.sources = torch.stack([rank[place - 1], rank[place - n]], dim=-1).add(1) * there
        self.shares = there / there.sum(dim=-1, keepdim=True).clamp(min=1)
        self.shares[0, 0] = 1                                    # the condition predicts the corner


def apply_rope(x, table):
    """Turn the channel pairs (2i, 2i+1) of x (B, S, H, d) by the angles of table (S, d/2, 2), in float32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)           # a    (B, S, H, d/2)
    cos, sin = table[:, None].unbind(-1)                         # cos  (S, 1, d/2)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


# ------------------------------------------------------------------------------------------------------------
# Building blocks. Attribute names are those of the released weights.

class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * g: LayerNorm without the mean and the bias, computed in float32."""

    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class KVCache:
    """The keys and values of one layer for R sequences, each (R, G, L + N, d), filled from left to right.

    What a token looks at does not change when others follow it, so its key and value are computed once.
    """

    def __init__(self, R, G, length, d, dtype, device):
        self.k = torch.zeros(R, G, length, d, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)

    def update(self, place, k, v):
        """Write k and v (R, G, S, d) to the places of the sequence; returns what there is to look at.

        place  a slice: then all up to its end, so that nothing empty is read; or a tensor (S,): then the full
               length, of which a mask has to hide what is empty, but all steps have the same shapes
        """
        self.k[:, :, place] = k.to(self.k.dtype)
        self.v[:, :, place] = v.to(self.v.dtype)
        end = place.stop if isinstance(place, slice) else None
        return self.k[:, :, :end], self.v[:, :, :end]

    def first(self, R):
        """The first R sequences, in the same memory, where a CUDA graph may write to without a copy."""
        few = copy.copy(self)
        few.k, few.v = self.k[:R], self.v[:R]
        if self.k.device.type == "cuda":
            torch._dynamo.mark_static_address(few.k)
            torch._dynamo.mark_static_address(few.v)
        return few


class Attention(nn.Module):
    """Causal multi-head attention. With n_kv_head < n_head, groups of query heads share a key and a value."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head or config.n_head
        self.head_dim = config.dim // config.n_head
        self.wqkv = nn.Linear(config.dim, (self.n_head + 2 * self.n_kv_head) * self.head_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.resid_dropout = nn.Dropout(config.resid_dropout)

    def forward(self, x, rope, mask=None, cache=None, place=None):       # x  (B, S, D)
        heads = self.wqkv(x).unflatten(-1, (-1, self.head_dim))          #    (B, S, H + 2 G, d)
        # Values carry what is said, not where: only queries and keys are turned.
        turned, v = heads.split([self.n_head + self.n_kv_head, self.n_kv_head], dim=2)
        q, k = apply_rope(turned, rope).split([self.n_head, self.n_kv_head], dim=2)
        # q (B, H, S, d)   k, v (B, G, S, d)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(place, k, v)
        # A query that is alone sees all that there is: it came last.
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1,
                                           enable_gqa=self.n_kv_head != self.n_head)
        return self.resid_dropout(self.wo(y.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x): w1 decides how much of w3 x passes. Three matrices instead of two: 2/3
    of the usual width of 4 D keeps the number of weights; rounded up to 256s, as hardware likes it."""

    def __init__(self, config):
        super().__init__()
        hidden = -(-int(8 * config.dim / 3) // 256) * 256
        self.w1 = nn.Linear(config.dim, hidden, bias=False)
        self.w3 = nn.Linear(config.dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, config.dim, bias=False)
        self.ffn_dropout = nn.Dropout(config.ffn_dropout)

    def forward(self, x):
        return self.ffn_dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)): a language model's block, without AdaLN."""

    def __init__(self, config, drop_path):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim)
        self.ffn_norm = RMSNorm(config.dim)
        self.drop_path = drop_path

    def skip_path(self, x):
        """Stochastic depth (Huang 2016): in training, drop a branch for whole samples, and scale up the rest
        so that the mean stays."""
        if self.drop_path == 0 or not self.training:
            return x
        keep = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.drop_path
        return x * keep / (1 - self.drop_path)

    def forward(self, x, rope, mask=None, cache=None, place=None):
        x = x + self.skip_path(self.attention(self.attention_norm(x), rope, mask, cache, place))
        return x + self.skip_path(self.feed_forward(self.ffn_norm(x)))


class LabelEmbedder(nn.Module):
    """Class ids to one condition token each. The last row of the table is the null class: trained whenever
    the class is dropped, it makes the model unconditional, which guidance needs."""

    def __init__(self, config):
        super().__init__()
        self.num_classes, self.dropout = config.num_classes, config.class_dropout
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.dim)

    def forward(self, cond):                                     # cond (B,)
        if self.training and self.dropout > 0:
            dropped = torch.rand(cond.shape[0], device=cond.device) < self.dropout
            cond = torch.where(dropped, self.num_classes, cond)
        return self.embedding_table(cond)[:, None]               #      (B, 1, D)

    def null(self, cond):
        return torch.full_like(cond, self.num_classes)


class CaptionMLP(nn.Module):
    """Text features to model width: linear, tanh-GELU, linear."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.caption_dim, config.dim, bias=False)
        self.fc2 = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Text features (B, L, E) to L condition tokens. The null caption is random and never trained, as in the
    released models."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.class_dropout
        self.cap_proj = CaptionMLP(config)
        null = torch.randn(config.cls_token_num, config.caption_dim) / config.caption_dim ** 0.5
        self.register_buffer("uncond_embedding", null)           # a buffer, so no optimizer ever sees it

    def forward(self, cond):                                     # cond (B, L, E)
        cond = cond.to(self.uncond_embedding.dtype)
        if self.training and self.dropout > 0:
            dropped = torch.rand(cond.shape[0], 1, 1, device=cond.device) < self.dropout
            cond = torch.where(dropped, self.uncond_embedding.to(cond.dtype), cond)
        return self.cap_proj(cond)                               #      (B, L, D)

    def null(self, cond):
        return self.uncond_embedding.to(cond.dtype).expand_as(cond)


# ------------------------------------------------------------------------------------------------------------

LOSS_BLOCK = 2 ** 24                                             # logits, 64 MB in float32


def cross_entropy(logits, targets):
    """Mean over M rows of -log softmax(logits)[target], from logits (M, V) in any precision, targets (M,).

    It needs log p in float32, and so does its gradient: of all rows these would be the largest tensors of a
    training step. So each block of rows computes its log p once more in the backward pass.
    """
    rows = max(1, LOSS_BLOCK // logits.shape[1])
    if len(logits) <= rows:
        return F.cross_entropy(logits.float(), targets)
    part = lambda block, wanted: F.cross_entropy(block.float(), wanted, reduction="sum")
    again = partial(torch.utils.checkpoint.checkpoint, part, use_reentrant=False, preserve_rng_state=False)
    return sum(again(*both) for both in zip(logits.split(rows), targets.split(rows))) / len(targets)


class GPT(nn.Module):
    """Condition and image tokens to the logits of the next token; see forward."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.cls_embedding = LabelEmbedder(config) if config.model_type == "c2i" else CaptionEmbedder(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.tok_dropout = nn.Dropout(config.token_dropout)
        last = max(config.n_layer - 1, 1)
        self.layers = nn.ModuleList(Block(config, config.drop_path * i / last) for i in range(config.n_layer))
        self.norm = RMSNorm(config.dim)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.order == "neighbours":
            self.lower = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.make_tables()
        self.idle_caches = []                               # see take_caches

        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        # The first loss is exactly ln V: all tokens are alike.
        for head in [self.output] if config.order == "raster" else [self.output, self.lower]:
            nn.init.zeros_(head.weight)

    def make_tables(self):
        """What is not learnt and stays out of the state dict, on the device of the weights."""
        device, L, self.neighbours = self.norm.weight.device, self.config.cls_token_num, None
        self.rope = rope_table(self.config, device)
        if self.config.order == "neighbours":
            self.neighbours = Neighbours(math.isqrt(self.config.block_size), device)
            self.rope[L:] = self.rope[L:][self.neighbours.order]         # as they follow one another

    def _apply(self, fn, recurse=True):
        # Called by .to(), .cuda(), .bfloat16(). The tables follow the weights to their device but stay
        # float32 and out of the state dict, which buffers would not; rebuilding them takes microseconds.
        super()._apply(fn, recurse)
        self.make_tables()
        return self

    def attention_mask(self, cond_mask):
        """Who may look at whom, bool: causal, and padded condition tokens are seen by nobody but themselves.

        cond_mask (B, L), nonzero = valid. Returns (B, 1, L + N, L + N), or for None (L + N, L + N).
        """
        total, L = self.rope.shape[0], self.config.cls_token_num
        when = torch.arange(total, device=self.rope.device)      # known to all from then on
        if self.neighbours:
            when[L:] = L + self.neighbours.turn
        causal = when[:, None] >= when                           # a triangle, or one of blocks
        if cond_mask is None:
            return causal
        valid = F.pad(cond_mask != 0, (0, total - cond_mask.shape[1]), value=True)       # (B, L + N)
        # A padded row without any key would give NaN: let it see itself. No other row ever reads it.
        itself = torch.eye(total, dtype=torch.bool, device=causal.device)
        return ((causal & valid[:, None]) | itself)[:, None]

    def check_cond(self, cond, cond_mask, wait=False):
        """InputError for a condition that this GPT does not read; wait: see check_tensor."""
        c, device = self.config, self.norm.weight.device
        shape, ids = (("B",), c.num_classes + 1) if c.model_type == "c2i" else (
            ("B", c.cls_token_num, c.caption_dim), None)
        check_tensor("cond", cond, shape, device, ids, wait)
        if cond_mask is not None:
            check_tensor("cond_mask", cond_mask, (len(cond), c.cls_token_num), device)

    def forward(self, tokens, cond, targets=None, cond_mask=None, want_logits=True):
        """Logits for the token at every position given those before it, and the loss.

        tokens     (B, T), 0 <= T <= N - 1
        cond       (B,) class ids, num_classes is the null class; or (B, L, E) text features
        targets    (B, T + 1), or None for no loss
        cond_mask  (B, L), nonzero = valid, padding on the left; None = all valid
        Returns logits (B, T + 1, V) in float32, position t predicting token t, or None for who does not
        want_logits, which are large; and the loss, a mean in nats per token. All in raster order, whatever
        the order of drawing; but by neighbours all tokens have to be there, T = N - 1.
        """
        self.check_cond(cond, cond_mask)
        c, L = self.config, self.config.cls_token_num
        T = check_tensor("tokens", tokens, (len(cond), "T"), cond.device, c.vocab_size, most=c.block_size - 1)
        if self.neighbours:
            if T < c.block_size - 1:
                raise InputError(f"order neighbours: all tokens but the last are needed, {c.block_size - 1}")
            tokens = tokens[:, self.neighbours.order[:-1]]       # the last is the last in both orders
        x = torch.cat([self.cls_embedding(cond), self.tok_embeddings(tokens)], dim=1)    # x (B, S, D)
        plain = cond_mask is None and not self.neighbours
        mask = None if plain else self.attention_mask(cond_mask)[..., :L + T, :L + T]
        x = self.tok_dropout(x)
        for layer in self.layers:
            x = layer(x, self.rope[:L + T], mask)
        # The last condition token predicts token 0; the condition tokens before it predict nothing.
        logits = self.predict(self.norm(x[:, L - 1:]), slice(None), 0)                   #   (B, T + 1, V)
        loss = None
        if targets is not None:
            check_tensor("targets", targets, (len(cond), T + 1), cond.device, c.vocab_size)
            loss = cross_entropy(logits.flatten(0, 1), targets.long().flatten())
        return logits.float() if want_logits else None, loss

    def predict(self, h, places, start):
        """Logits (B, Q, V) from outputs h (B, S, D): each of the token that follows it or, by neighbours, of
        the raster indices `places`, h being the outputs from number `start` on, as Neighbours counts."""
        if not self.neighbours:
            return self.output(h)
        left, above = (self.neighbours.sources[places] - start).clamp(min=0).unbind(-1)          # (Q,)
        share = self.neighbours.shares[places].to(h.dtype)                                       # (Q, 2)
        return self.output(h[:, left] * share[:, :1]) + self.lower(h[:, above] * share[:, 1:])

    # Decoding with a cache: `prefill` once, then `step` for every further token. sample.py drives them.

    def new_caches(self, R):
        """A KVCache for each layer, for R sequences."""
        attention, like = self.layers[0].attention, self.tok_embeddings.weight
        return [KVCache(R, attention.n_kv_head, self.rope.shape[0], attention.head_dim, like.dtype,
                        like.device) for _ in self.layers]

    def take_caches(self, R):
        """Those of the last pictures, if they are large enough, or new ones. Whoever draws takes them out of
        idle_caches and puts them back at the end: a second thread makes its own meanwhile."""
        like = self.tok_embeddings.weight
        kept = self.idle_caches.pop() if self.idle_caches else None
        if kept and len(kept[0].k) >= R and kept[0].k.dtype == like.dtype and kept[0].k.device == like.device:
            return kept
        del kept                                                 # before others take its place
        return self.new_caches(R)

    def compile_step(self):
        """One graph for the decoding step, which serves all places. On a GPU it is recorded once and then
        replayed without Python, as a CUDA graph."""
        mode = "reduce-overhead" if self.norm.weight.device.type == "cuda" else None
        self.step = torch.compile(self.step, fullgraph=True, dynamic=False, mode=mode)

    def prefill(self, tokens, cond, mask, caches):
        """Run condition and given tokens (R, T) at once, filling the caches; logits (R, 1, V) of token T."""
        x = torch.cat([self.cls_embedding(cond), self.tok_embeddings(tokens)], dim=1)    # x (R, S, D)
        return self.output(self.advance(x, slice(0, x.shape[1]), mask, caches)[:, -1:]).float()

    def step(self, tokens, place, mask, caches):
        """Run tokens (R, S), mostly one, at their places in the sequence, L + their index, as a slice or a
        tensor (S,), see KVCache.update. Logits (R, Q, V): after each of them, so that Q = S, or by neighbours
        of the next pass. mask: attention_mask's; None, for one token: all is seen."""
        h = self.advance(self.tok_embeddings(tokens), place, mask, caches)               # h (R, S, D)
        if not self.neighbours:
            return self.output(h).float()
        first = place.start - self.config.cls_token_num
        later = next(part for part in self.neighbours.passes if part.start > first)
        return self.predict(h, self.neighbours.order[later], first + 1).float()

    def advance(self, x, place, mask, caches):                   # x (R, S, D), S places
        rope = self.rope[place]                                  #   (S, d/2, 2)
        if mask is not None:
            mask = mask[..., place, :place.stop if isinstance(place, slice) else None]
        for layer, cache in zip(self.layers, caches):
            x = layer(x, rope, mask, cache, place)
        return self.norm(x)


# ------------------------------------------------------------------------------------------------------------
# Linear layers for decoding. A step multiplies every weight with a few rows only and takes the time of
# reading the weights: what counts is how they lie in memory, and how many bytes they are.

class PackedLinear(nn.Module):
    """A linear layer laid out in blocks, as oneDNN reads them, in float32 or bf16. PyTorch's own float32
    product on CPUs is made for hundreds of rows, and for a few takes twice to three times as long."""

    def __init__(self, linear, dtype=None):
        super().__init__()
        self.dtype = dtype or linear.weight.dtype
        weight = linear.weight.detach().to(self.dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def forward(self, x):
        y = torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, None, "none", [], "")
        return y.to(x.dtype)


class Int8Linear(nn.Module):
    """y = W x with the weights in 8 bits: W ~ scale q, q whole numbers, scale = max |row| / 127 per row.

    On a CPU x is rounded to 8 bits as well, and the product is one of whole numbers. On a GPU q becomes
    floats again on its way to the multiplier: torch.compile makes one kernel of that.
    """

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127                          # (out,)
        q = (weight / scale[:, None]).round().to(torch.int8)                             # (out, in)
        self.on_cpu = q.device.type == "cpu"
        # One scale serves all rows of x. Those that an RMSNorm made are alike; of the products that w2 reads
        # some are many times as large as others, and each row is brought to length 1 first.
        self.uneven = linear.in_features > linear.out_features
        if self.on_cpu:
            with warnings.catch_warnings(action="ignore"):       # the type is to leave PyTorch after 2.13
                q = torch._make_per_channel_quantized_tensor(q, scale.double(), 0 * q[:, 0].long(), 0)
            self.packed = torch.ops.quantized.linear_prepack(q, None)
            # Without VNNI, pairs of products are added in 16 bits: 7 bits of x keep them from overflow.
            self.reduce_range = not torch.cpu.get_capabilities().get("avx512_vnni", False)
        else:
            self.register_buffer("q", q, persistent=False)
            self.register_buffer("scale", scale, persistent=False)

    def forward(self, x):
        if not self.on_cpu:
            return F.linear(x, self.q.to(x.dtype)) * self.scale.to(x.dtype)
        if self.uneven:
            length = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True).clamp_(min=1e-12)
            x = x / length
        y = torch.ops.quantized.linear_dynamic(x.float(), self.packed, self.reduce_range).to(x.dtype)
        return y * length if self.uneven else y


def with_linears(module, make):
    """A copy of a module with make(linear) in place of each linear layer; everything else is shared."""
    if isinstance(module, nn.Linear):
        return make(module)
    twin = copy.copy(module)
    twin._modules = {name: with_linears(child, make) for name, child in module._modules.items()}
    return twin


def packed(gpt):
    """The same GPT with packed linear layers, where oneDNN has them and there is room for a second copy."""
    device, size = gpt.norm.weight.device, sum(weight.nbytes for weight in gpt.parameters())
    fits = device.type == "cpu" and torch.backends.mkldnn.is_available() and 2 * size < free_memory(device)
    return with_linears(gpt, PackedLinear) if fits else gpt


def quantize(gpt, bits=8):
    """A GPT to sample from with all linear layers in int8 (bits = 8) or, on a CPU, bf16 (16): a quarter or a
    half of float32's bytes. Embeddings, norms, caches and sums stay as they were, so does `gpt`."""
    if bits not in (8, 16):
        raise InputError(f"bits={bits}: linear layers can have 8 or 16")
    if bits == 16 and not (gpt.norm.weight.device.type == "cpu" and torch.backends.mkldnn.is_available()):
        raise InputError("bits=16 is for CPUs with oneDNN: elsewhere pass dtype=torch.bfloat16 to load_gpt")
    return with_linears(gpt, Int8Linear if bits == 8 else partial(PackedLinear, dtype=torch.bfloat16))


# ------------------------------------------------------------------------------------------------------------
# Checkpoints

def infer_gpt_config(weights, image_size, path):
    """The configuration of a released GPT from the shapes of its tensors. n_head leaves no trace in them: it
    is that of the row of GPT_SIZES with this depth and width."""
    with explained(f"{path} is no whole GPT checkpoint: a tensor is missing or misshapen"):
        vocab_size, dim = weights["tok_embeddings.weight"].shape
        n_layer = sum(name.endswith(".attention.wqkv.weight") for name in weights)
        n_head = {(s["n_layer"], s["dim"]): s["n_head"] for s in GPT_SIZES.values()}.get((n_layer, dim))
        if n_head is None:
            raise InputError(f"{path} fits no known size: found {n_layer} layers of width {dim}; "
                             f"known are {', '.join(GPT_SIZES)}")
        kv_rows = weights["layers.0.attention.wqkv.weight"].shape[0] - dim
        config = dict(dim=dim, n_layer=n_layer, n_head=n_head, n_kv_head=kv_rows // (2 * dim // n_head),
                      vocab_size=vocab_size, block_size=(image_size // 16) ** 2)
        if "cls_embedding.uncond_embedding" in weights:
            L, E = weights["cls_embedding.uncond_embedding"].shape
            return GPTConfig(**config, model_type="t2i", cls_token_num=L, caption_dim=E)
        return GPTConfig(**config, num_classes=weights["cls_embedding.embedding_table.weight"].shape[0] - 1)


def load_gpt(path, image_size=None, device="cpu", dtype=torch.float32, checkpoint=None, bits=None):
    """A GPT in eval mode from this project's checkpoint or from a released file (c2i_L_384.pt,
    t2i_XL_stage1_256.pt, ...).

    image_size  pixels; for released files, whose grid is image_size // 16 on a side (None: 256). This
                project's own checkpoints know their grid
    checkpoint  what read_checkpoint(path) gave, if the file has been read already
    bits        8 or 16: through quantize, layer by layer, so that the file may be larger than the memory
    """
    checkpoint = checkpoint or read_checkpoint(path, mmap=True)
    weights = checkpoint["model"]
    if "tok_embeddings.weight" not in weights:
        raise InputError(f"{path} is not a GPT checkpoint: it has no tok_embeddings.weight")
    config = (read_config(GPTConfig, checkpoint["config"], path) if "config" in checkpoint else
              infer_gpt_config(weights, image_size or 256, path))
    if image_size and (image_size // 16) ** 2 != config.block_size:
        raise InputError(f"{path} makes {config.block_size} tokens per image: leave the image size out")
    if not bits:
        return build(GPT, config, weights, path, device, dtype)
    gpt = quantize(build(GPT, config, weights, path, device, copy=False), bits)
    for tensor in chain(gpt.parameters(), gpt.buffers()):        # what is left of the file
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype, copy=True)
    return gpt


if __name__ == "__main__":
    config = GPTConfig(**GPT_SIZES["tiny"], vocab_size=512, block_size=64, num_classes=10)
    gpt = GPT(config)
    tokens, cond = torch.randint(512, (4, 64)), torch.tensor([0, 1, 2, 10])
    logits, loss = gpt(tokens[:, :-1], cond, targets=tokens)
    print(f"GPT tiny   {sum(p.numel() for p in gpt.parameters()):,} parameters")
    print(f"tokens     {tuple(tokens.shape)}, of which {tokens.shape[1] - 1} are input")
    print(f"condition  {tuple(gpt.cls_embedding(cond).shape)}, classes {cond.tolist()}; 10 is the null class")
    print(f"RoPE       {tuple(gpt.rope.shape)}, the first {config.cls_token_num} row(s) {config.cond_rope}")
    print(f"logits     {tuple(logits.shape)}")
    print(f"loss       {loss:.4f} nats per token; ln 512 = {math.log(512):.4f}: all are alike at first")
