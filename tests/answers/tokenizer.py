"""Typical wrong answers to the exercises of notebook 2, and words of the sentence that each must get."""

WRONG = {
    "nearest": [
        ("import torch.nn.functional as F\ndef nearest_on_sphere(z, codes):\n"
         "    return (F.normalize(z, dim=-1) @ F.normalize(codes, dim=-1).T).argmin(dim=-1)\n",
         "every answer is the *farthest* code"),
        ("def nearest_on_sphere(z, codes):\n    return (z @ codes.T).argmax(dim=-1)\n",
         "one code is made 100 times as long"),
        ("import torch.nn.functional as F\ndef nearest_on_sphere(z, codes):\n"
         "    return (F.normalize(z, dim=0) @ F.normalize(codes, dim=-1).T).argmax(dim=-1)\n",
         "normalised along the wrong dimension"),
    ],
    "straight_through": [
        ("def through(z, zq):\n    return zq + (z - zq).detach()\n", "forward must return the code"),
        ("def through(z, zq):\n    return zq\n", "the gradient does not reach the encoder"),
        ("def through(z, zq):\n    return z + zq - z.detach()\n", "the code gets a gradient"),
    ],
    "statistics": [
        ("def statistics(counts):\n    p = counts[counts > 0] / counts.sum()\n"
         "    return (counts > 0).float().mean(), -(p * p.log()).sum()\n", "you give log K"),
        ("def statistics(counts):\n    p = counts / counts.sum()\n"
         "    return (counts > 0).float().mean(), (-(p * p.log()).sum()).exp()\n",
         "makes the perplexity nan"),
        ("def statistics(counts):\n    p = counts[counts > 0] / counts.sum()\n"
         "    return (counts > 0).sum(), (-(p * p.log()).sum()).exp()\n", "yours is a number of codes"),
    ],
}
