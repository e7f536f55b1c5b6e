"""Checks of notebook 10: a training pair of flow matching, and Euler's sampler."""
import torch

from checks import is_tensor


def pair(answer):
    generator = torch.Generator().manual_seed(0)
    picture, noise = (torch.randn(4, 64, 8, generator=generator) for _ in range(2))
    t = torch.tensor([0.0, 1.0, 0.5, 0.25])
    result = answer(picture, noise, t)
    yield (isinstance(result, (tuple, list)) and len(result) == 2,
           "two tensors are asked for, the point and the velocity.", "print(type(result))")
    x, v = result
    yield is_tensor(x, (4, 64, 8), "the point")
    yield is_tensor(v, (4, 64, 8), "the velocity")
    near = lambda a, b: torch.allclose(a, b, atol=1e-5)
    yield not near(x[0], picture[0]), \
        "at t = 0 your point is the picture: time runs from noise to picture.", \
        "pair(picture, noise, torch.zeros(4))"
    yield near(x[0], noise[0]) and near(x[1], picture[1]), \
        "the ends are wrong: the noise belongs to t = 0, the picture to t = 1.", "print x[0] - noise[0]"
    yield near(x[2], (noise[2] + picture[2]) / 2) and near(x[3], 0.75 * noise[3] + 0.25 * picture[3]), \
        "the ends are right, what lies between them is not on the straight line.", \
        "where should the point be at t = 0.25?"
    yield not near(v, noise - picture), "the velocity points from the picture to the noise.", \
        "x at t = 1 minus x at t = 0"
    yield near(v, picture - noise), "the velocity is not the derivative of the line by t.", \
        "(pair at t = 0.26 - pair at t = 0.25) / 0.01"


def euler(answer):
    x, asked = torch.zeros(2, 64, 8), []
    velocity = lambda x, t: asked.append(float(t)) or torch.ones_like(x)
    result = answer(velocity, x, 4)
    yield is_tensor(result, (2, 64, 8))
    yield len(asked) == 4, f"n = 4, but the velocity was asked for {len(asked)} times.", "count the passes"
    yield not torch.allclose(result, torch.full_like(x, 4.0)), \
        "a constant velocity of 1 leads 4 far in time 1: each step lasts 1 / n.", "n = 1, then n = 2"
    yield torch.allclose(result, torch.ones_like(x)), \
        "a constant velocity of 1 has to lead from 0 to 1, and does not.", "print x after each step"
    yield asked[0] == 0 and max(asked) < 1, \
        "the first velocity is that at t = 0, the last that of the last step's beginning.", "print t"
    yield asked == [0.0, 0.25, 0.5, 0.75], "the times are not evenly spread from 0 on.", "print t"
    grown = answer(lambda x, t: x, torch.ones(1, 64, 8), 10)
    yield torch.allclose(grown, torch.full_like(grown, 1.1 ** 10)), \
        "the velocity has to be asked for where the last step led, not at the start.", \
        "what do you hand to velocity as x?"
    yield (x == 0).all(), "the x that was handed in has changed: x = x + ... makes a new one.", "print x"
