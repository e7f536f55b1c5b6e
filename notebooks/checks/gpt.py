"""Checks of notebook 3: RMSNorm, the angles of 2D RoPE, inputs and targets."""
import torch
import torch.nn.functional as F

from checks import is_tensor
from model import GPTConfig, RMSNorm, rope_table


def rms_norm(answer):
    x, ones = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) + 1, torch.ones(8)
    same = lambda a, b: torch.allclose(a, b, atol=1e-4)
    result = answer(x, ones, 1e-5)
    yield is_tensor(result, (3, 8))
    yield answer(torch.full((1, 8), 2.0), ones, 1e-5).abs().min() > 1e-3, \
        "eight equal numbers became zeros: you subtracted the mean. RMSNorm does not re-centre.", \
        "rms_norm(torch.full((1, 8), 2.0), torch.ones(8), 1e-5)"
    yield same(result[:1], answer(x[:1], ones, 1e-5)), \
        "the first row comes out differently when others stand below it: each row has a mean of its own.", \
        "print the shape of your mean; keepdim keeps a dimension"
    yield same(result.square().mean(-1), torch.ones(3)), \
        "with g = 1 the mean of the squares of each row has to be 1, and yours is not.", \
        "rms_norm(x, torch.ones(8), 1e-5).square().mean(-1): did you take a sum for a mean, or no root?"
    yield same(answer(x * 1e-4, ones, 1e-5), x * 1e-4 / ((x * 1e-4).square().mean(-1, True) + 1e-5).sqrt()), \
        "tiny numbers come out wrong: where does eps stand, inside the root or outside?", \
        "x = torch.full((1, 8), 1e-4)"
    gain = torch.arange(8.0)
    yield same(answer(x, gain, 1e-5), gain * result), "g does not multiply the channels.", \
        "pass g = torch.arange(8.)"
    module = RMSNorm(8)
    module.weight.data = gain
    yield same(answer(x, gain, 1e-5), module(x)), "the module gives other numbers."


def angles(answer):
    side, d = 4, 16                                              # 4 x 4 places, 8 pairs
    result = answer(side, d)
    yield is_tensor(result, (16, 8))
    rows, columns = result.float().unflatten(0, (4, 4)).chunk(2, dim=-1)             # (4, 4, 4)
    still = lambda a, b: torch.allclose(a, b, atol=1e-5)
    yield still(result[0].float(), torch.zeros(8)), \
        "place 0 is in row 0 and column 0: nothing turns there.", "print(angles(4, 16)[0])"
    yield still(rows[:, 1:], rows[:, :-1]), \
        "one place to the right only the column grows, but the first half of your pairs turns, " \
        "the rows' half.", \
        "angles(4, 16)[1] - angles(4, 16)[0]"
    yield still(columns[1:], columns[:-1]), \
        "one place down only the row grows, but the second half of your pairs turns, " \
        "the columns' half.", \
        "angles(4, 16)[4] - angles(4, 16)[0]"
    yield still(rows[:, 0, 0], torch.arange(4.0)) and still(columns[0, :, 0], torch.arange(4.0)), \
        "the first pair of each half has i = 0: it turns by 1 from one row (or column) to the next.", \
        "print(angles(4, 16)[:, [0, 4]])"
    yield still(rows[1, 0], 10000 ** (-torch.arange(4) / 4)), \
        "the pairs after the first turn at wrong speeds: each half has d / 4 pairs, and starts at i = 0.", \
        "print(angles(4, 16)[4, :4]) beside the equation"
    yield still(rows[:, 0], columns[0]), "rows and columns turn at different speeds."
    table = rope_table(GPTConfig(dim=24, n_head=1, block_size=9))[1:]                            # (9, 12, 2)
    other = answer(3, 24)
    yield is_tensor(other, (9, 12), "the table of 3 x 3 places")
    yield torch.allclose(torch.stack([other.cos(), other.sin()], -1).float(), table, atol=1e-5), \
        "on a grid of 3 x 3 places your table is not the module's: is the side fixed?"


class Listener:
    """Stands in for the GPT: remembers what it was shown, and answers with logits made by chance."""

    def __init__(self):
        self.seen = []

    def __call__(self, tokens, c, *others):
        self.seen.append(tokens)
        make = torch.Generator().manual_seed(1)
        return torch.randn(len(tokens), tokens.shape[1] + 1, 7, generator=make), None


def targets(answer):
    gpt, tokens, c = Listener(), torch.tensor([[1, 2, 3, 4, 5, 6], [6, 0, 5, 0, 4, 0]]), torch.tensor([0, 1])
    trouble = None
    try:
        result = answer(gpt, tokens, c)
    except Exception as error:                   # the sentences below say more than this error would
        trouble = error
    if trouble and not gpt.seen:
        raise trouble
    yield len(gpt.seen) == 1, "the model has to be asked exactly once: it answers for all places together.", \
        "gpt(seen, c)[0]"
    seen = gpt.seen[0]
    yield seen.shape[1] < 6, \
        "the model is shown all tokens of the picture: what is then left to predict after the last?", \
        "print the shape of what you pass to gpt, and that of its logits"
    yield seen.shape == (2, 5) and torch.equal(seen, tokens[:, :5]), \
        "the model is shown other tokens than the first N - 1: a place may look back, never ahead.", \
        "print what you pass to gpt"
    if trouble:
        raise trouble
    yield is_tensor(result, ())
    log_p = gpt(seen, c)[0].log_softmax(-1)                      # (2, 6, 7)
    nats = -log_p.gather(2, tokens[..., None])                   # (2, 6, 1)
    late = -log_p[:, :-1].gather(2, tokens[:, 1:, None]).mean()
    yield not torch.allclose(result, late, atol=1e-5), \
        "token 0 is predicted by nobody, and every other token by a place too early: who predicts token 0?", \
        "draw the two rows of section 1 for a picture of three tokens"
    yield result > 0, "-log p is never negative, yours is: the sign.", "print it for a p of one half"
    yield not torch.allclose(result, nats.sum(), atol=1e-4), \
        "you added up where the loss is a mean over pictures and places.", "pass the same picture twice"
    yield not torch.allclose(result, nats.mean() / torch.tensor(2.0).log(), atol=1e-5), \
        "these are bits: a nat has the natural logarithm."
    yield torch.allclose(result, F.cross_entropy(log_p.flatten(0, 1), tokens.flatten()), atol=1e-5), \
        "this is not the mean of -log p of the tokens that came.", \
        "F.cross_entropy wants logits (M, V), not probabilities, and targets (M,)"
