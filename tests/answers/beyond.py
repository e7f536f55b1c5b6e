"""Wrong answers to the exercises of notebook 11, and words of the sentence that each has to get."""
WRONG = {
    "cca": [
        ("def cca(r, other, beta, lam):\n"
         "    return -(F.logsigmoid(beta * r) / lam + F.logsigmoid(beta * other)).mean()",
         "a sign is missing"),
        ("def cca(r, other, beta, lam):\n"
         "    return -(F.logsigmoid(beta * r) + lam * F.logsigmoid(-beta * other)).mean()",
         "divides the first"),
        ("def cca(r, other, beta, lam):\n"
         "    return -(F.logsigmoid(beta * r) / lam + F.logsigmoid(-beta * other)).sum()", "it is a mean"),
        ("def cca(r, other, beta, lam):\n"
         "    return -(beta * F.logsigmoid(r) / lam + beta * F.logsigmoid(-other)).mean()",
         "is not (1 / lam + 1) log 2"),
    ],
    "passes": [
        ("def passes(n):\n    return [[place] for place in range(n * n)]", "that is raster order"),
        ("def passes(n):\n    return [[row * n + d - row for row in range(n) if d - row >= 0]\n"
         "            for d in range(2 * n - 1)]", "drawn exactly once"),
        ("def passes(n):\n    return [[row * n + d - row for row in reversed(range(n)) if 0 <= d - row < n]\n"
         "            for d in range(2 * n - 1)]", "for n = 2 it is"),
    ],
}
