"""Typical wrong answers to the exercises of notebook 3, and words of the sentence that each must get."""

ANGLES = ("def angles(side, d):\n"
          "    speed = 10000 ** (-{speed} * torch.arange(d // 4) / d)\n"
          "    place = torch.arange(side * side)\n"
          "    row, column = (place // side)[:, None] * speed, (place % side)[:, None] * speed\n"
          "    return torch.cat([{halves}], dim=1)\n")
LOSS = ("def loss(gpt, tokens, c):\n"
        "    logits = gpt({seen}, c)[0]\n"
        "    return F.cross_entropy({logits}.flatten(0, 1), {wanted}.flatten(){more})\n")

WRONG = {
    "rms_norm": [
        ("def rms_norm(x, g, eps):\n"
         "    x = x - x.mean(-1, keepdim=True)\n"
         "    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * g\n",
         "you subtracted the mean"),
        ("def rms_norm(x, g, eps):\n"
         "    return x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * g\n",
         "inside the root or outside"),
        ("def rms_norm(x, g, eps):\n"
         "    return x / (x.square().mean() + eps).sqrt() * g\n",
         "each row has a mean of its own"),
        ("def rms_norm(x, g, eps):\n"
         "    return x / (x.square().sum(-1, keepdim=True) + eps).sqrt() * g\n",
         "the mean of the squares of each row has to be 1"),
    ],
    "angles": [
        (ANGLES.format(speed=4, halves="column, row"), "the rows' half"),
        (ANGLES.format(speed=2, halves="row, column"), "at wrong speeds"),
        ("def angles(side, d):\n"
         "    place = torch.arange(side * side)\n"
         "    return place[:, None] * 10000 ** (-4 * torch.arange(d // 4) / d)\n",
         "shape (16, 4)"),
    ],
    "targets": [
        (LOSS.format(seen="tokens", logits="logits[:, :-1]", wanted="tokens", more=""), "shown all tokens"),
        (LOSS.format(seen="tokens[:, :-1]", logits="logits[:, :-1]", wanted="tokens[:, 1:]", more=""),
         "who predicts token 0"),
        (LOSS.format(seen="tokens[:, 1:]", logits="logits", wanted="tokens", more=""), "never ahead"),
        (LOSS.format(seen="tokens[:, :-1]", logits="logits", wanted="tokens", more=', reduction="sum"'),
         "you added up"),
    ],
}
