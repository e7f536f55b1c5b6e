"""Typical wrong answers to the exercises of notebook 6, and words of the sentence that each must get."""

WRONG = {
    "best_cut": [
        ("def best_cut(word, score):\n"                              # the longest piece first
         "    pieces = []\n"
         "    while word:\n"
         "        end = max(n for n in range(1, len(word) + 1) if word[:n] in score)\n"
         "        pieces, word = pieces + [word[:end]], word[end:]\n"
         "    return pieces\n",
         "you took the longest piece"),
        ("def best_cut(word, score):\n"                              # the best piece at each place
         "    pieces = []\n"
         "    while word:\n"
         "        end = max((n for n in range(1, len(word) + 1) if word[:n] in score),\n"
         "                  key=lambda n: score[word[:n]] / n)\n"
         "        pieces, word = pieces + [word[:end]], word[end:]\n"
         "    return pieces\n",
         "never taken back"),
        ("def best_cut(word, score):\n"                              # from the end, and not turned round
         "    best = [(0.0, [])]\n"
         "    for end in range(1, len(word) + 1):\n"
         "        best.append(max(((best[start][0] + score[word[start:end]],\n"
         "                          [word[start:end]] + best[start][1])\n"
         "                         for start in range(end) if word[start:end] in score),\n"
         "                        key=lambda way: way[0]))\n"
         "    return best[-1][1]\n",
         "one after another, are not the word"),
    ],
    "left_padding": [
        ("import torch\ndef left_padding(captions, L, N):\n"         # padding behind
         "    ids = torch.tensor([caption + [0] * (L - len(caption)) for caption in captions])\n"
         "    valid = torch.cat([ids != 0, torch.ones(len(ids), N, dtype=torch.bool)], dim=1)\n"
         "    causal = torch.ones(L + N, L + N, dtype=torch.bool).tril()\n"
         "    return ids, causal & valid[:, None] | torch.eye(L + N, dtype=torch.bool)\n",
         "the last place of a caption is padding"),
        ("import torch\ndef left_padding(captions, L, N):\n"         # no diagonal
         "    ids = torch.tensor([[0] * (L - len(caption)) + caption for caption in captions])\n"
         "    valid = torch.cat([ids != 0, torch.ones(len(ids), N, dtype=torch.bool)], dim=1)\n"
         "    return ids, torch.ones(L + N, L + N, dtype=torch.bool).tril() & valid[:, None]\n",
         "does not see itself"),
        ("import torch\ndef left_padding(captions, L, N):\n"         # causal alone
         "    ids = torch.tensor([[0] * (L - len(caption)) + caption for caption in captions])\n"
         "    causal = torch.ones(L + N, L + N, dtype=torch.bool).tril()\n"
         "    return ids, causal.expand(len(ids), -1, -1)\n",
         "somebody else looks at padding"),
    ],
    "caption_dropout": [
        ("import torch\ndef caption_dropout(features, null, p):\n"   # word by word
         "    return torch.where(torch.rand(*features.shape[:2], 1) < p, null, features)\n",
         "lost some of its words"),
        ("import torch\ndef caption_dropout(features, null, p):\n"   # one draw for all
         "    return torch.where(torch.rand(1) < p, null.expand_as(features), features)\n",
         "a batch is hidden as a whole"),
        ("import torch\ndef caption_dropout(features, null, p):\n"   # zeros
         "    return features * (torch.rand(len(features), 1, 1) >= p)\n",
         "is not the null caption"),
    ],
}
