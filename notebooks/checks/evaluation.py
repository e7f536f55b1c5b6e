"""Checks of notebook 5: the Frechet distance, precision, and the detective's three sets."""
import math

import torch

from fid import frechet_distance, precision_recall


def is_number(value):
    """The first property: one number, a float or a tensor without axes, that is not NaN."""
    one = isinstance(value, (int, float)) or torch.is_tensor(value) and value.numel() == 1
    found = f"a tensor of shape {tuple(value.shape)}" if torch.is_tensor(value) else type(value).__name__
    yield one, f"the result is {found}, not one number.", "print what you return"
    yield math.isfinite(value), "the result is NaN or infinite.", "print each step of yours"


def covariance(D, rows, seed):
    x = torch.randn(rows, D, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    return torch.cov(x.T)


def near(a, b):
    return math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-4)


def frechet(answer):
    D = 4
    S, T = covariance(D, 30, 0), covariance(D, 30, 1)
    zero, d = torch.zeros(D, dtype=torch.double), torch.tensor([1.0, 0.0, -2.0, 2.0], dtype=torch.double)
    yield from is_number(answer(zero, S, d, T))
    yield near(answer(zero, S, zero, S), 0), \
        "a Gaussian has distance 0 from itself, and yours has another: which of the three " \
        "terms with S have to cancel?", "frechet(mu, S, mu, S)"
    yield near(answer(zero, S, d, S), 9), \
        "moving one Gaussian by d must add |d|^2, and yours adds something else.", \
        "d = (3, 4): |d| is 5, |d|^2 is 25"
    one = lambda value: torch.full((1, 1), value, dtype=torch.double)
    yield near(answer(zero[:1], one(4.0), zero[:1], one(9.0)), 1), "in one dimension, with standard " \
        "deviations 2 and 3, the distance is (2 - 3)^2, and yours is another. S holds variances.", \
        "print each term for S1 = [[4.]] and S2 = [[9.]]"
    lying, standing = (torch.diag(torch.tensor(x).double()) for x in ([9.0, 1.0], [1.0, 9.0]))
    yield answer(zero[:2], lying, zero[:2], standing) > 1e-3, \
        "a lying and a standing ellipse have distance 0: eigenvalues alone know no directions.", \
        "the eigenvalues of S1 @ S2, beside the products of theirs"
    yield near(answer(zero, S, d, T), answer(d, T, zero, S)), \
        "the distance from 1 to 2 is not that from 2 to 1.", \
        "swap the two Gaussians"
    few = covariance(8, 4, 2)
    wide = torch.zeros(8, dtype=torch.double)
    yield math.isfinite(answer(wide, few, wide, covariance(8, 30, 3))), "with fewer pictures than features " \
        "you get NaN: rounding makes an eigenvalue of 0 a little negative.", "clamp(min=0) before the root"
    yield near(answer(zero, S, d, T), frechet_distance(zero, S, d, T)), "for covariances that are not " \
        "diagonal your distance differs from the module's.", \
        "is the root that of each entry, or that of the matrix S1 @ S2?"


def precision(answer):
    line = lambda *x: torch.tensor(x).float()[:, None]                       # points on a line: (M, 1)
    real = line(0, 1, 2, 3, 10)
    yield from is_number(answer(real, real, 1))
    yield answer(real, real, 1) == 1, \
        "the real points themselves lie in their own balls: precision 1, and yours is lower.", \
        "precision(real, real, 1)"
    yield answer(line(0, 0.1, 0.2, 0.3), line(0, 50, 100), 1) < 0.5, "the balls stand around the real " \
        "points, and yours around the samples: that is recall.", \
        "which set's radii may not depend on the samples?"
    yield answer(real, line(500, -500), 1) == 0, "two points far from everything have precision 0.", \
        "print the radii, and the distances from one such point"
    yield answer(line(0, 10, 20, 30), line(2, 12, 28), 1) == 1, "a point at 2 is inside the ball around 0 " \
        "that reaches to 10, and you say it is not: the nearest of all neighbours is the point itself.", \
        "print the radii of the points 0, 10, 20, 30 for k = 1"
    yield answer(real, line(0.5, 500), 1) == 0.5, "one of two samples is inside: the share is a half.", \
        "print how many you count, and what you divide by"
    # A dense pair and a lone point, whose ball is wide: 2 is nearer to the pair, but in the other's ball.
    yield answer(line(0, 0.1, 9), line(2), 1) == 1, "a sample may lie outside the ball of its nearest real " \
        "point, and inside that of another: any ball will do.", "real points 0, 0.1, 9, a sample at 2, k = 1"
    make = torch.Generator().manual_seed(0)
    real, fake = torch.randn(60, 3, generator=make), 1.3 * torch.randn(60, 3, generator=make)
    yield abs(answer(real, fake, 3) - precision_recall(real, fake)[0]) < 0.04, \
        "on random points in 3 dimensions your share differs from the module's.", "try k = 1, 2, 3"


NUMBERS = ("accuracy", "FID", "precision", "recall", "nearest")


def suspects(real, labels, train, train_labels, count=200):
    """Three sets of `count` pictures, each with something wrong: name -> (pictures, the classes asked for).
    (Whoever reads on knows the answers.)"""
    few, times = count // 10, 10
    return {"A": (real[:few].repeat(times, 1, 1, 1), labels[:few].repeat(times)),
            "B": (train[:count], train_labels[:count]),
            "C": (real[:count], labels[:count].roll(7))}


def detective(answer):
    yield isinstance(answer, dict) and set(answer) == set("ABC"), \
        "the answer has three entries, A, B and C.", \
        'answer = {"A": "FID", "B": "FID", "C": "FID"}'
    for name, column in answer.items():
        yield column in NUMBERS, f"{name}: the columns are called {', '.join(NUMBERS)}.", "copy one of them"
    yield answer["A"] != "FID", "A: its FID is bad, but does not say in which way. Which other number is?", \
        "compare the last columns of A and of the honest set"
    yield answer["A"] == "recall", "A: that number is about as good as that of the honest set.", \
        "show the first 40 pictures of A"
    yield answer["B"] not in ("FID", "precision", "recall"), "B: by that number B is as good as real " \
        "pictures: it *is* made of real pictures. Where do they come from?", "what do you know of `train`?"
    yield answer["B"] == "nearest", "B: its pictures are of the classes that were asked for.", \
        "compare B with the honest set, column by column"
    yield answer["C"] not in ("FID", "precision", "recall"), "C: that number does not know which class was " \
        "asked for.", "show ten pictures of C with their classes as titles"
    yield answer["C"] == "accuracy", \
        "C: its pictures are as far from the training set as new pictures are.", \
        "compare C with the honest set, column by column"
