"""Checks of notebook 7: verdicts from seeds, the slope of a scaling curve, a claim of one's own."""
import math


def number(value):
    """The property that most answers here have to have first."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return good, f"the result is {value!r}, not a finite number.", "print what you return"


def verdict(answer):
    apart = answer([1.0, 1.1, 1.2], [2.0, 2.1, 2.2])
    yield number(apart)
    yield apart in (-1, 0, 1), f"a verdict is -1, 0 or 1; yours was {apart!r}.", "verdict([1, 1.1], [2, 2.2])"
    yield apart != 0, "two ranges that are far apart allow a verdict.", "verdict([1, 1.1], [2, 2.2])"
    yield apart == -1, "the sign is turned round: -1 says that the first has the lower losses.", \
        "read the goal once more"
    yield answer([2.0, 2.1, 2.2], [1.0, 1.1, 1.2]) == 1, \
        "one order of the two works, the other does not.", "verdict([2, 2.2], [1, 1.1])"
    yield answer([1.0, 1.1, 1.9], [1.5, 1.8, 1.6]) == 0, \
        "a mean that is lower is not enough: here one bad seed of the first reaches beyond the second.", \
        "draw both as bars from the lowest to the highest seed"
    yield answer([1.0, 3.0], [1.9, 2.0]) == 0, \
        "one range lies inside the other, and yet you decide.", "verdict([1, 3], [1.9, 2])"
    yield answer([2.0, 1.0, 1.5], [3.0, 2.5, 9.0]) == -1, \
        "the order of the seeds changes your verdict: no seed comes first.", "shuffle both lists"
    yield answer([1.0, 2.0], [2.0, 3.0]) == 0, \
        "the ranges touch in one value: that is no gap.", "verdict([1, 2], [2, 3])"


def slope(answer):
    weights = [1e5, 4e5, 3e6]
    falling = answer(weights, [20 * w ** -0.2 for w in weights])
    yield number(falling)
    yield falling < 0, "a loss that falls with the weights has a slope below 0; yours is not.", \
        "which of the two differences came first?"
    flat = answer(weights, [2.0, 2.0, 2.0])
    yield abs(flat) < 1e-9, "a loss that never changes has slope 0; yours has not.", \
        "slope(weights, [2, 2, 2])"
    yield abs(falling) > 1e-3, \
        "the slope almost vanishes: it seems to be one on plain axes, in nats per weight.", \
        "which axes make a power law straight?"
    yield abs(falling + 5) > 1e-2, "the axes are exchanged: you divide by the change of the loss.", \
        "rise over run: the loss is the rise"
    scaled = answer([1000 * w for w in weights], [20 * w ** -0.2 for w in weights])
    yield abs(scaled - falling) < 1e-6, \
        "counting weights in thousands changes your slope: their ratio would not.", \
        "which axis has no logarithm yet?"
    yield abs(answer(weights, [50 * w ** -0.2 for w in weights]) - falling) < 1e-6, \
        "the loss in bits instead of nats changes your slope: a ratio of losses would not.", \
        "which axis has no logarithm yet?"
    yield abs(falling + 0.2) < 1e-6, "a power law with a known exponent comes out with another one.", \
        "slope([1, 10, 100], [1, 0.1, 0.01])"


def hypothesis(answer):
    keys = {"claim", "changed", "unchanged"}
    yield isinstance(answer, dict) and set(answer) == keys, \
        "the answer is a dict with the keys claim, changed and unchanged.", "answer = dict(claim=..., ...)"
    a, b, claim = list(answer["changed"]), list(answer["unchanged"]), answer["claim"]
    yield claim in ("lower", "higher", "cannot say"), \
        'the claim about the changed model is "lower", "higher" or "cannot say".', "print the claim"
    yield len(a) >= 3 and len(b) >= 3, \
        "two seeds lie apart by chance too often: a claim needs three of each.", "run with two more seeds"
    yield all(number(x)[0] and x > 0 for x in a + b), \
        "a loss in nats is a positive number; one of yours is none.", \
        "print both lists"
    yield len(set(a)) > 1 and len(set(b)) > 1, \
        "all your seeds agree to the last digit: did the seed reach the weights and the batches?", \
        "call run with SEEDS = 3, and copy the whole list from results"
    yield set(a) != set(b), "both lists are the same: the change did not reach the model.", \
        "give the change to run as an argument"
    gap = "lower" if max(a) < min(b) else "higher" if min(a) > max(b) else None
    yield gap or claim == "cannot say", "the ranges of the seeds overlap: you cannot say.", \
        "more steps, or a larger change (more seeds only widen a range)"
    yield not gap or claim != "cannot say", \
        "the ranges do not even touch: here you may say something.", "compare the highest with the lowest"
    yield not gap or claim == gap, "the ranges are apart, but in the other direction than you claim.", \
        "compare max(changed) with min(unchanged)"
