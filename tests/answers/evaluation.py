"""Typical wrong answers to the exercises of notebook 5, and words of the sentence that each has to get."""

WRONG = {
    "frechet": [
        ("import torch\ndef frechet(mu1, S1, mu2, S2):\n"
         "    root = (S1 @ S2).sqrt()\n"
         "    return (mu1 - mu2).square().sum() + (S1 + S2 - 2 * root).trace()\n",
         "distance 0 from itself"),
        ("import torch\ndef frechet(mu1, S1, mu2, S2):\n"
         "    roots = torch.linalg.eigvals(S1 @ S2).real.clamp(min=0).sqrt()\n"
         "    return (mu1 - mu2).norm() + S1.trace() + S2.trace() - 2 * roots.sum()\n",
         "must add |d|^2"),
        ("import torch\ndef frechet(mu1, S1, mu2, S2):\n"
         "    roots = (torch.linalg.eigvalsh(S1) * torch.linalg.eigvalsh(S2)).clamp(min=0).sqrt()\n"
         "    return (mu1 - mu2).square().sum() + S1.trace() + S2.trace() - 2 * roots.sum()\n",
         "a standing ellipse"),
    ],
    "precision": [
        ("import torch\ndef precision(real, fake, k):\n"
         "    radius = torch.cdist(real, real).sort(dim=1).values[:, k - 1]\n"
         "    return (torch.cdist(fake, real) <= radius).any(dim=1).double().mean().item()\n",
         "the point itself"),
        ("import torch\ndef precision(real, fake, k):\n"
         "    radius = torch.cdist(fake, fake).sort(dim=1).values[:, min(k, len(fake) - 1)]\n"
         "    return (torch.cdist(fake, real) <= radius[:, None]).any(dim=1).double().mean().item()\n",
         "around the samples"),
        ("import torch\ndef precision(real, fake, k):\n"
         "    radius = torch.cdist(real, real).sort(dim=1).values[:, k]\n"
         "    nearest = torch.cdist(fake, real).min(dim=1)\n"
         "    return (nearest.values <= radius[nearest.indices]).double().mean().item()\n",
         "any ball will do"),
    ],
    "detective": [
        ('answer = {"A": "FID", "B": "nearest", "C": "accuracy"}', "does not say in which way"),
        ('answer = {"A": "recall", "B": "precision", "C": "accuracy"}', "Where do they come from"),
        ('answer = {"A": "recall", "B": "nearest", "C": "recall"}', "does not know which class"),
    ],
}
