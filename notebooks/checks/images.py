"""Checks of notebook 9: held-out pictures, a line of a .jsonl, mirror images."""
import json

from files import json_captions


def hold_out(split):
    files = [(f"{name}/{i}.png", name) for name in ("cat", "cow", "dog", "owl", "pig") for i in range(60)]
    parts = split(list(files))
    yield (isinstance(parts, (tuple, list)) and len(parts) == 2 and all(isinstance(p, list) for p in parts),
           "two lists are to come back.", "print the type of what you return, and of its parts")
    train, held_out = map(set, parts)
    yield train | held_out <= set(files), "the lists hold what was not given.", "print(parts[1][:3])"
    yield not train & held_out, "some pictures are in both lists.", "print(len(set(train) & set(held_out)))"
    yield (train | held_out == set(files), "some pictures are in neither list.",
           "compare len(files) with the two lengths")
    yield ({name for _, name in held_out} == {name for _, name in files} == {name for _, name in train},
           "whole classes are missing in one of the lists.", "print({name for _, name in held_out})")
    yield (15 <= len(held_out) <= 60, "the part that is held out is not between a twentieth and a fifth.",
           "print(len(held_out) / len(files))")
    yield (set(split(list(files))[1]) == held_out,
           "a second call holds out other pictures: what was trained on yesterday would be a test today.",
           "call it twice and compare")


def caption_line(line):
    path = 'letters/the "L"/0.png'
    given = line(path, "L", "red", "pink")
    yield isinstance(given, str), f"a string is asked for, not {type(given).__name__}.", \
        "print the type of what you return"
    yield ("\n" not in given.strip(), "it is more than one line, and each line of a .jsonl is a picture.",
           "print(repr(...)) of what you return")
    try:
        record = json.loads(given)
    except ValueError:
        record = None
    yield (isinstance(record, dict), "it is not JSON, at least not if a file name holds quotation marks.",
           "json.loads(caption_line('a \"b\".png', 'L', 'red', 'pink'))")
    found = record.get("image") or record.get("file_name")
    yield (found and json_captions(record), "the reader finds no path or no caption under your names.",
           "compare your names with the line above the exercise")
    yield found == path, "the path is not the one that was given.", "print the path beside the argument"
    words = json_captions(record)[0].split()
    lacking = [word for word in ("L", "red", "pink") if word not in words]
    yield not lacking, f"the caption lacks {len(lacking)} of the three words.", "print the caption"


def mirror(answer):
    yield (isinstance(answer, str) and answer.isalpha() and answer.isascii() and answer.isupper(),
           "a string of capital letters is asked for, without commas.", "print(repr(mirror))")
    upright = set("AMTUVWY") & set(answer)
    yield (upright or not set("BCDEK") <= set(answer), "these are the letters that a mirror lying below them "
           "leaves as they are.", "hold a mirror beside the paper, not under it")
    wrong = [letter for letter in answer if letter in "BCDEFGJKLNPQRSZ"]
    yield (not wrong, f"{len(wrong)} of your letters look different in a mirror.",
           "write each on thin paper and look at it from behind")
    yield len(set(answer)) == len(answer), "a letter is there twice.", "print(sorted(mirror))"
    yield len(answer) == 11, "all of these are right, and there are more.", "go through A to Z once more"
