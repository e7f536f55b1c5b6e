"""Wrong answers to the exercises of notebook 7, and words of the sentence that each has to get."""
WRONG = {
    "verdict": [
        ("def verdict(a, b):\n    return -1 if sum(a) / len(a) < sum(b) / len(b) else 1",
         "a mean that is lower is not enough"),
        ("def verdict(a, b):\n    return 1 if max(a) < min(b) else -1 if max(b) < min(a) else 0",
         "the sign is turned round"),
        ("def verdict(a, b):\n    return -1 if max(a) < min(b) else 0", "one order of the two works"),
        ("def verdict(a, b):\n    return -1 if max(a) <= min(b) else 1 if max(b) <= min(a) else 0",
         "touch in one value"),
    ],
    "slope": [
        ("def slope(weights, losses):\n    return (losses[-1] - losses[0]) / (weights[-1] - weights[0])",
         "it seems to be one on plain axes"),
        ("import math\ndef slope(weights, losses):\n    rise = math.log(losses[-1] / losses[0])\n"
         "    return rise and math.log(weights[-1] / weights[0]) / rise", "the axes are exchanged"),
        ("import math\ndef slope(weights, losses):\n"
         "    return math.log(losses[0] / losses[-1]) / math.log(weights[-1] / weights[0])",
         "has a slope below 0"),
        ("import math\ndef slope(weights, losses):\n"
         "    return (losses[-1] - losses[0]) / math.log(weights[-1] / weights[0])",
         "in bits instead of nats"),
    ],
    "hypothesis": [
        ('answer = dict(claim="lower", changed=[3.1, 3.3, 3.2], unchanged=[3.25, 3.4, 3.5])',
         "overlap: you cannot say"),
        ('answer = dict(claim="lower", changed=[3.1, 3.2], unchanged=[3.4, 3.5])', "a claim needs three"),
        ('answer = dict(claim="higher", changed=[3.1, 3.2, 3.0], unchanged=[3.4, 3.5, 3.6])',
         "in the other direction"),
        ('answer = dict(claim="lower", changed=[3.1, 3.1, 3.1], unchanged=[3.4, 3.5, 3.6])',
         "agree to the last digit"),
    ],
}
