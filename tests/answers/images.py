"""Typical wrong answers to the exercises of notebook 9, and words of the sentence that each must get."""

WRONG = {
    "hold_out": [
        ("def hold_out(files):\n"
         "    cut = len(files) * 9 // 10\n"
         "    return files[:cut], files[cut:]\n",
         "whole classes are missing"),
        ("def hold_out(files):\n"
         "    return files, files[::10]\n",
         "in both lists"),
        ("import random\ndef hold_out(files):\n"
         "    files = random.sample(files, len(files))\n"
         "    return files[30:], files[:30]\n",
         "a second call holds out other pictures"),
    ],
    "caption_line": [
        ("def caption_line(path, letter, ink, paper):\n"
         "    return f'{{\"image\": \"{path}\", \"text\": \"{letter} in {ink} on {paper}\"}}'\n",
         "not JSON"),
        ("import json\ndef caption_line(path, letter, ink, paper):\n"
         "    return json.dumps({'path': path, 'caption': f'{letter} in {ink} on {paper}'})\n",
         "finds no path or no caption"),
        ("import json\ndef caption_line(path, letter, ink, paper):\n"
         "    return json.dumps({'image': path, 'text': f'{letter} in {ink}'})\n",
         "lacks 1 of the three words"),
    ],
    "mirror": [
        ("mirror = 'BCDEHIKOX'\n", "a mirror lying below them"),
        ("mirror = 'AHIMNOSTUVWXYZ'\n", "3 of your letters look different"),
        ("mirror = 'AHMTUVWY'\n", "there are more"),
    ],
}
