"""Wrong answers to the exercises of notebook 10, and words of the sentence that each has to get."""
WRONG = {
    "pair": [
        ("def pair(picture, noise, t):\n    t = t[:, None, None]\n"
         "    return (1 - t) * picture + t * noise, picture - noise", "at t = 0 your point is the picture"),
        ("def pair(picture, noise, t):\n    t = t[:, None, None]\n"
         "    return (1 - t) * noise + t * picture, noise - picture", "from the picture to the noise"),
        ("def pair(picture, noise, t):\n    t = t[:, None, None]\n"
         "    return (1 - t).sqrt() * noise + t.sqrt() * picture, picture - noise",
         "not on the straight line"),
        ("def pair(picture, noise, t):\n    t = t[:, None, None]\n    x = (1 - t) * noise + t * picture\n"
         "    return x, picture - x", "not the derivative"),
    ],
    "euler": [
        ("def euler(velocity, x, n):\n    for i in range(n):\n        x = x + velocity(x, i / n)\n"
         "    return x",
         "each step lasts 1 / n"),
        ("def euler(velocity, x, n):\n    for i in range(1, n + 1):\n        x = x + velocity(x, i / n) / n\n"
         "    return x", "the first velocity is that at t = 0"),
        ("def euler(velocity, x, n):\n    return x + sum(velocity(x, i / n) for i in range(n)) / n",
         "where the last step led"),
        ("def euler(velocity, x, n):\n    for i in range(n):\n        x += velocity(x, i / n) / n\n"
         "    return x",
         "has changed"),
    ],
}
