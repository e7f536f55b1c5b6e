"""Checks of notebook 11: the contrast of CCA, and the passes of a grid drawn by neighbours."""
import math

import torch


def cca(answer):
    zero = torch.zeros(4)
    start = answer(zero, zero, 0.5, 10.0)
    yield torch.is_tensor(start) and start.numel() == 1, "one number is asked for, a tensor: the mean.", \
        "print what you return"
    value = lambda r, other, beta=0.5: float(answer(torch.tensor(r), torch.tensor(other), beta, 10.0))
    yield value([9.0], [0.0]) < value([0.0], [0.0]), \
        "the loss does not fall when a picture becomes likelier with its own class.", "r = 0, then r = 9"
    yield value([0.0], [-9.0]) < value([0.0], [0.0]), \
        "the loss does not fall when a picture becomes unlikelier with another class: a sign is missing.", \
        "other = 0, then other = -9"
    yield abs(value([0.0, 0.0], [0.0, 0.0]) - value([0.0], [0.0])) < 1e-6, \
        "two pictures give twice the loss of one: it is a mean.", "the same numbers once and twice"
    yield abs(start.item() - 11 * math.log(2)) > 1e-4, \
        "lam multiplies the second term: here it divides the first one, so that the loss stays near 1.", \
        "lam = 10, then 1000"
    yield abs(start.item() - 1.1 * math.log(2)) < 1e-5, \
        "with r = r' = 0 the loss is not (1 / lam + 1) log 2.", "which term does lam weigh, and how?"
    yield abs(value([4.0], [0.0]) - value([2.0], [0.0], beta=1.0)) < 1e-6, \
        "twice beta is not the same as twice r: beta belongs into the sigmoid.", \
        "beta = 1, r = 2; beta = 0.5, r = 4"
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    expected = -(math.log(sigmoid(1.5)) / 10 + math.log(sigmoid(-1.0)))
    yield abs(value([3.0], [2.0]) - expected) < 1e-5, "one pair of numbers gives another loss.", \
        "compute r = 3, r' = 2, beta = 0.5, lam = 10 by hand"


def passes(answer):
    two = answer(2)
    yield isinstance(two, list) and all(isinstance(part, list) for part in two), \
        "a list of lists is asked for, one for each pass.", "print(type(passes(2)))"
    yield sorted(sum(two, [])) == [0, 1, 2, 3], "not every place is drawn exactly once.", \
        "sort all places of yours"
    yield len(two) != 4, "four passes for four places: that is raster order.", \
        "which of them can be drawn together?"
    yield two == [[0], [1, 2], [3]], "for n = 2 it is [[0], [1, 2], [3]].", "print(passes(2))"
    three = answer(3)
    yield len(three) == 5, f"3 x 3 takes 5 passes, yours takes {len(three)}.", "which distances are there?"
    yield sorted(sum(three, [])) == list(range(9)), "for n = 3 not every place is drawn exactly once.", \
        "does a pass run over the edge of the grid?"
    yield [set(part) for part in three] == [{0}, {1, 3}, {2, 4, 6}, {5, 7}, {8}], \
        "for n = 3 some places are in the wrong pass.", "row + column of each place"
    yield three[2] == [2, 4, 6], "within a pass the smaller row comes first.", "print(passes(3)[2])"
