"""Typical wrong answers to the exercises of notebook 4, and words of the sentence that each must get."""

WRONG = {
    "top_p": [
        ("import torch\ndef top_p(logits, p):\n"
         "    values, order = logits.sort(dim=-1, descending=True)\n"
         "    outside = values.softmax(-1).cumsum(-1) > p\n"
         "    return logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)\n",
         "the likeliest must survive"),
        ("import torch\ndef top_p(logits, p):\n"
         "    values, order = logits.sort(dim=-1, descending=True)\n"
         "    outside = values.softmax(-1).cumsum(-1) > p\n"
         "    outside[:, 0] = False\n"
         "    return logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)\n",
         "removed the token that crosses p"),
        ("import torch\ndef top_p(logits, p):\n"
         "    values, order = logits.sort(dim=-1, descending=True)\n"
         "    total = values.softmax(-1).cumsum(-1)\n"
         "    return values.masked_fill(total - values.softmax(-1) >= p, -torch.inf)\n",
         "the one that survives is not the likeliest"),
    ],
    "guidance": [
        ("import torch\ndef guidance(cond, uncond, s):\n    return cond + s * (cond - uncond)\n",
         "s = 1 must give the conditional logits"),
        ("import torch\ndef guidance(cond, uncond, s):\n    return cond + s * (uncond - cond)\n",
         "have changed places"),
        ("import torch\ndef guidance(cond, uncond, s):\n    return s * cond + (s - 1) * uncond\n",
         "s = 0 must give the unconditional logits"),
    ],
    "complete": [
        ("import torch\ndef complete(logits_of, given):\n"
         "    tokens = given\n"
         "    for i in range(64):\n"
         "        tokens = torch.cat([tokens, logits_of(tokens).argmax(-1)[:, None]], dim=1)\n"
         "    return tokens\n",
         "more than 64 tokens"),
        ("import torch\ndef complete(logits_of, given):\n"
         "    tokens = given[:, :0]\n"
         "    for i in range(64):\n"
         "        tokens = torch.cat([tokens, logits_of(tokens).argmax(-1)[:, None]], dim=1)\n"
         "    return tokens\n",
         "not the first of the picture"),
        ("import torch\ndef complete(logits_of, given):\n"
         "    tokens = given\n"
         "    for i in range(given.shape[1], 64):\n"
         "        tokens = torch.cat([tokens, logits_of(tokens[:, -1:]).argmax(-1)[:, None]], dim=1)\n"
         "    return tokens\n",
         "first look is not at the given tokens"),
    ],
}
