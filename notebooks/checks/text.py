"""Checks of notebook 6: the best cut of a word, padding and mask, hidden captions."""
import itertools

import torch

from checks import is_tensor
from model import GPT, GPTConfig


def best_cut(answer):
    score = {"a": -3.0, "b": -3.0, "c": -3.0, "ab": -5.0, "bc": -3.5, "abc": -9.0}
    result = answer("a", score)
    yield isinstance(result, list), "the result is no list of pieces.", 'print(best_cut("a", {"a": -3.0}))'
    yield result == ["a"], "a word of one letter is not cut into that letter.", \
        'best_cut("a", {"a": -3.0})'
    for word in ("abc", "cab", "bcab"):
        yield "".join(answer(word, score)) == word, \
            "your pieces, one after another, are not the word.", 'print("".join(best_cut("cab", score)))'
    yield all(piece in score for piece in answer("cab", score)), "a piece is not in the vocabulary.", \
        "which of your pieces have a score?"
    total = lambda pieces: sum(score[piece] for piece in pieces)
    yield total(answer("abc", score)) > -9, \
        "you took the longest piece where shorter ones have a larger sum.", \
        'score = {"a": -3, "b": -3, "ab": -9}: which cut of "ab" has the larger sum?'
    yield total(answer("abc", score)) == -6.5, \
        "a choice made early is never taken back: what looks best at its place may cost more later.", \
        'score = {"a": -3, "b": -3, "c": -3, "ab": -5, "bc": -3.5}: compare the cuts of "abc"'
    make = torch.Generator().manual_seed(0)
    for trial in range(20):
        word = "".join("ab"[i] for i in torch.randint(2, (8,), generator=make))
        pieces = ["a", "b"] + ["".join(p) for n in (2, 3) for p in itertools.product("ab", repeat=n)]
        score = dict(zip(pieces, (-9 * torch.rand(len(pieces), generator=make) - 1).tolist()))
        ways = [[word[a:b] for a, b in zip((0, *places), (*places, 8))]
                for n in range(8) for places in itertools.combinations(range(1, 8), n)]
        best = max((way for way in ways if all(piece in score for piece in way)), key=total)
        yield abs(total(answer(word, score)) - total(best)) < 1e-6, \
            "there is a better cut of a longer word than yours.", "compare with all ways, as the figure does"
    word = "ab" * 20
    yield "".join(answer(word, score)) == word, "a word of 40 letters is not cut.", \
        "best_cut('ab' * 20, score)"


def left_padding(answer):
    captions, L, N = [[5, 6, 1], [7, 1], [3, 4, 5, 6, 1]], 5, 4
    result = answer([list(caption) for caption in captions], L, N)
    yield isinstance(result, tuple) and len(result) == 2, "there are two results: the ids, and the mask.", \
        "return ids, mask"
    ids, mask = result
    yield is_tensor(ids, (3, 5), "ids")
    yield all(row[row != 0].tolist() == caption for row, caption in zip(ids, captions)), \
        "the ids of a caption are not all there, in their order, with 0 around them.", "print(ids)"
    yield (ids[:, -1] != 0).all(), \
        "the last place of a caption is padding: token 0 would be predicted there.", "print(ids[:, -1])"
    yield is_tensor(mask, (3, 9, 9), "the mask")
    yield mask.dtype == torch.bool, "the mask is not boolean.", "print(mask.dtype)"
    later = torch.ones(9, 9, dtype=torch.bool).triu(1)
    yield not (mask & later).any(), "somebody looks at what comes after it.", "print(mask[2].int())"
    yield mask.diagonal(dim1=1, dim2=2).all(), "a row does not see itself: softmax would be 0 / 0.", \
        "print(mask[1].int().diagonal())"
    itself = torch.eye(9, dtype=torch.bool)
    yield not (mask & ~itself)[1, :, :3].any(), "somebody else looks at padding.", "print(mask[1].int())"
    yield mask[:, 5:, 5:].equal(~later[5:, 5:].expand(3, 4, 4)), \
        "a token does not see the tokens before it.", \
        "print(mask[:, L:, L:].int())"
    yield mask[2, 5:, :5].all() and mask[1, 5:, 3:5].all(), \
        "a token does not see all words of its caption.", \
        "print(mask[1, L:, :L].int())"
    gpt = GPT(GPTConfig(dim=8, n_layer=1, n_head=2, vocab_size=4, block_size=4, model_type="t2i",
                        cls_token_num=5, caption_dim=4))
    yield mask.equal(gpt.attention_mask(ids != 0)[:, 0]), "a word does not see the words before it.", \
        "print(mask[:, :L, :L].int())"


def caption_dropout(answer):
    make = torch.Generator().manual_seed(0)
    features, null = torch.randn(400, 5, 3, generator=make), torch.randn(5, 3, generator=make)
    before = features.clone()
    state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        result = answer(features, null, 0.25)
        yield is_tensor(result, (400, 5, 3))
        yield features.equal(before), "the features that were passed in have changed: work on a copy.", \
            "print the argument before and after"
        yield answer(features, null, 0.0).equal(before), "with p = 0 captions are hidden all the same.", \
            "caption_dropout(features, null, 0.0)"
        yield not answer(features, null, 1.0).equal(before), "with p = 1 nothing is hidden.", \
            "caption_dropout(features, null, 1.0)"
        hidden, kept = ((result == other).all(dim=2) for other in (null, before))            # (400, 5)
        yield (hidden | kept).all(), "what takes the place of a caption is not the null caption.", \
            "compare what is hidden with null"
        yield (hidden.all(dim=1) | kept.all(dim=1)).all(), \
            "a caption has lost some of its words: it is hidden as a whole or not at all.", \
            "print((result == null).all(dim=2)[:10])"
        yield hidden.any() and kept.any(), \
            "a batch is hidden as a whole: each caption has a chance of its own.", \
            "print((result == null).all(dim=2).all(dim=1))"
        yield 0.15 < hidden[:, 0].float().mean() < 0.35, \
            "the share of hidden captions is not p.", "count them with p = 0.1 and with p = 0.9"
    finally:
        torch.set_rng_state(state)
