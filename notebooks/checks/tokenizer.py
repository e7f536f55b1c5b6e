"""Checks of notebook 2: the nearest code, the straight-through line, usage and perplexity."""
import math

import torch
import torch.nn.functional as F

from checks import is_tensor


def nearest(find):
    random = torch.Generator().manual_seed(0)
    z, codes = 3 * torch.randn(50, 4, generator=random), torch.randn(12, 4, generator=random)
    codes *= torch.rand(12, 1, generator=random) + 0.2
    tokens = find(z, codes)
    yield is_tensor(tokens, (50,))
    yield not tokens.is_floating_point() and 0 <= tokens.min() and tokens.max() < 12, \
        "codes have numbers from 0 to K - 1, and these are others.", "print what comes back"
    products = F.normalize(z, dim=-1) @ F.normalize(codes, dim=-1).T
    yield not torch.equal(tokens, products.argmin(dim=-1)), \
        "every answer is the *farthest* code: on the sphere a large dot product means near.", \
        "print (2 - 2 * products) for one latent"
    long = codes.clone()
    long[3] *= 100
    yield torch.equal(find(z, long), tokens), \
        "your answers change when one code is made 100 times as long, and on the sphere only its direction " \
        "counts.", "compare the answers for codes and for F.normalize(codes, dim=-1)"
    yield torch.equal(find(z[:5], codes), tokens[:5]), \
        "the answer for one latent depends on the others: something was normalised along the wrong " \
        "dimension.", "compare find(z, codes)[:1] with find(z[:1], codes)"
    right = products.argmax(dim=-1)
    yield torch.equal(tokens, right), \
        f"{(tokens != right).sum()} of 50 latents do not get the code whose direction is nearest.", \
        "take two codes and one latent in the plane, and draw them"


def straight_through(line):
    random = torch.Generator().manual_seed(0)
    z, zq, weight = (torch.randn(5, 3, generator=random) for _ in range(3))
    z.requires_grad_()
    zq.requires_grad_()
    hat = line(z, zq)
    yield is_tensor(hat, (5, 3))
    yield not torch.allclose(hat, z, atol=1e-6), "forward must return the code, yours returns z.", \
        "print(hat - z, hat - zq)"
    yield torch.allclose(hat, zq, atol=1e-6), "the value is not that of the code.", "print(hat - zq)"
    yield hat.requires_grad, "the result has no gradient at all: everything was detached.", \
        "print(hat.grad_fn)"
    at_z, at_zq = torch.autograd.grad((hat * weight).sum(), (z, zq), allow_unused=True)
    yield at_z is not None and bool(at_z.any()), \
        "the gradient does not reach the encoder: what does detach() remove?", \
        "hat.sum().backward(), then print(z.grad)"
    yield at_zq is None or not at_zq.any(), \
        "the code gets a gradient from the decoder as well, and it has a loss of its own.", \
        "hat.sum().backward(), then print(zq.grad)"
    yield torch.allclose(at_z, weight), \
        "the encoder's gradient is not the decoder's: it was multiplied on its way.", \
        "hat.sum().backward(), then print(z.grad): all ones?"


def statistics(count):
    def both(*counts):
        usage, perplexity = count(torch.tensor(counts))
        return float(usage), float(perplexity)

    def close(a, b):
        return math.isclose(a, b, rel_tol=1e-3)

    given = count(torch.tensor([3, 1]))
    yield isinstance(given, (tuple, list)) and len(given) == 2, \
        "two numbers are asked for, usage and perplexity.", "print what comes back"
    usage, perplexity = both(*[5] * 8)
    yield usage <= 1, "usage is a share, at most 1, and yours is a number of codes.", "four codes, all used"
    yield close(usage, 1), "all codes are used here, and your usage is not 1.", "counts of (5, 5, 5, 5)"
    yield not close(perplexity, math.log(8)), \
        "uniform counts over K must give perplexity K, you give log K.", \
        "read the definition above: what stands around the sum?"
    yield not close(perplexity, 1 / 8), "eight equally popular codes give less than 1: a sign is lost.", \
        "print each term of the sum"
    yield not close(perplexity, math.exp(3)), "logarithm and exponential do not have the same base.", \
        "print the sum for two equally popular codes"
    yield close(perplexity, 8), "uniform counts over 8 codes do not give perplexity 8.", \
        "counts of (5, 5, 5, 5)"
    usage, perplexity = both(6, 0, 2, 0)
    yield not math.isnan(perplexity), \
        "a code that was never used makes the perplexity nan: 0 ln 0 is 0 times minus infinity.", \
        "print p * p.log()"
    yield close(usage, 0.5), "two of four codes were used, and your usage is not a half.", \
        "counts of (6, 0, 2, 0)"
    by_hand = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    yield close(perplexity, by_hand), "all is right for uniform counts, but not for others.", \
        "counts of (6, 0, 2, 0) by hand"
    yield close(both(600, 0, 200, 0)[1], perplexity), \
        "a hundred times as many counts change the perplexity.", "divide by their sum"
