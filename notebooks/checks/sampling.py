"""Checks of notebook 4: top-p, guidance, completing a picture."""
import torch

from checks import is_tensor
from sample import filter_logits, guide


def kept(logits):
    return torch.isfinite(logits)


def top_p(answer):
    logits = torch.tensor([[1.0, 3.0, 0.0, 2.0], [0.0, 0.0, 5.0, 0.0]])    # p: 0.09 0.64 0.03 0.24; 0.01 0.98
    before = logits.clone()
    result = answer(logits, 0.8)
    yield is_tensor(result, (2, 4))
    yield torch.equal(logits, before), "the logits that were passed in have changed: work on a copy.", \
        "print the argument before and after"
    yield not torch.isnan(result).any(), "there is NaN in what you return.", \
        "0 * inf is NaN: fill, do not multiply"
    sure = torch.tensor([[0.0, 9.0, 1.0]])
    yield kept(answer(sure, 0.01)).any(), "a tiny p leaves no token at all: the likeliest must survive.", \
        "top_p(torch.tensor([[0., 9., 1.]]), 0.01)"
    yield kept(answer(sure, 1e-6))[0, 1], "with a tiny p the one that survives is not the likeliest.", \
        "print the order in which you go through the tokens"
    yield (result.exp().sum(-1) < before.exp().sum(-1)).all(), "nothing is removed, or not by -inf.", \
        "print(top_p(logits, 0.8).softmax(-1))"
    share = torch.where(kept(result), before.softmax(-1), 0.0).sum(-1)
    yield (share >= 0.8).all(), \
        "what is left has less than p together: you removed the token that crosses p.", \
        "p = 0.8 with probabilities 0.64, 0.24, 0.09, 0.03: which survive?"
    yield torch.equal(result[kept(result)], before[kept(result)]), \
        "the logits of the survivors have changed, or sit at the places of others: sorting has to be " \
        "undone.", \
        "compare the places of the largest logit before and after"
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0)) * 3
    yield torch.equal(kept(answer(logits, 0.7)), kept(filter_logits(logits, top_p=0.7))), \
        "some rows keep more tokens than they need, or others than the module keeps.", \
        "count the survivors of each row with p = 0.5"


def guidance(answer):
    make = torch.Generator().manual_seed(0)
    c, u = torch.randn(3, 7, generator=make), torch.randn(3, 7, generator=make)
    yield is_tensor(answer(c, u, 2.0), (3, 7))
    zero, one, two = (answer(c, u, float(s)) for s in range(3))
    same = lambda a, b: torch.allclose(a, b, atol=1e-5)
    yield not same(zero, two), "s changes nothing.", "compare s = 0 with s = 2"
    yield not (same(zero, c) and same(one, u)), "cond and uncond have changed places.", \
        "which of the two does s = 1 give back?"
    yield same(one, c), \
        "s = 1 must give the conditional logits: that is no guidance, and yours are others.", \
        "put s = 1 into the equation"
    yield same(zero, u), "s = 0 must give the unconditional logits, and yours are others.", \
        "put s = 0 into the equation"
    yield same(answer(c, c, 5.0), c), "where the class changes nothing, guidance has nothing to add.", \
        "pass the same logits twice"
    yield same(two, guide(torch.cat([c, u]), 2.0)), \
        "s = 2 has to lie as far beyond cond as cond is from uncond.", \
        "put s = 2 into the equation"


def complete(answer):
    seen = []

    def count(tokens):                       # an easy picture: every token is one more than the one before it
        seen.append(tokens.shape[1])
        last = tokens[:, -1] if tokens.shape[1] else torch.full((len(tokens),), 99)
        return torch.nn.functional.one_hot((last + 1) % 100, 100).float()

    given = torch.tensor([[7, 8, 9], [50, 51, 52]])
    result = answer(count, given)
    longer = torch.is_tensor(result) and result.dim() == 2 and result.shape[1] > 64
    yield not longer, "the picture has more than 64 tokens: how many are missing after P given ones?", \
        "print(range(3, 64))"
    yield is_tensor(result, (2, 64))
    yield torch.equal(result[:, :3], given), "the given tokens are not the first of the picture.", \
        "print(result[:, :5])"
    yield seen[:1] == [3], "the model's first look is not at the given tokens.", \
        "print tokens.shape in the loop"
    yield seen == list(range(3, 64)), "the model does not see every token so far, or is asked too often.", \
        "print tokens.shape in the loop"
    yield torch.equal(result[:, 3:], (given[:, 2:] + torch.arange(1, 62)) % 100), \
        "the tokens drawn are not the likeliest ones.", "print logits.argmax(-1) beside them"
    yield torch.equal(answer(count, result), result), "with all 64 given, nothing is left to draw.", \
        "complete(logits_of, complete(logits_of, given))"
    yield is_tensor(answer(count, given[:, :0]), (2, 64), "with no token given, the picture")
