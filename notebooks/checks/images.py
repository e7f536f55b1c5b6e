"""Checks of notebook 9: mirror images, held-out pictures, and a line of a .jsonl."""
import json


def mirror(answer):
    yield (isinstance(answer, str) and answer.isalpha() and answer.isascii() and answer.isupper(),
           "a string of capital letters is asked for, without commas.", "print(repr(answer))")
    upright = set("AMTUVWY") & set(answer)
    yield (upright or not set("BCDEK") <= set(answer), "these are the letters that a mirror lying below them leaves "
           "as they are.", "hold a mirror beside the paper, not under it")
    wrong = [letter for letter in answer if letter in "BCDEFGJKLNPQRSZ"]
    yield (not wrong, f"{len(wrong)} of your letters look different in a mirror.",
           "write each on thin paper and look at it from behind")
    yield (len(set(answer)) == len(answer), "a letter is there twice.", "print(sorted(answer))")
    yield (len(answer) == 11, "all of these are right, and there are more.", "go through A to Z once more")


def hold_out(split):
    files = [(f"{name}/{i}.png", name) for name in ("cat", "cow", "dog", "owl", "pig") for i in range(60)]
    given = list(files)
    result = split(given)
    yield (isinstance(result, (tuple, list)) and len(result) == 2 and all(isinstance(r, list) for r in result),
           "two lists are to come back.", "print(type(result), [type(part) for part in result])")
    train, held_out = map(set, result)
    yield not train & held_out, "some pictures are in both lists.", "print(len(set(train) & set(held_out)))"
    yield (train | held_out == set(files), "some pictures are in neither list.",
           "compare len(files) and the two lengths")
    yield ({name for _, name in held_out} == {name for _, name in files} == {name for _, name in train},
           "whole classes are missing in one of the lists.", "print({name for _, name in held_out})")
    yield (15 <= len(held_out) <= 60, "the part that is held out is not between a twentieth and a fifth.",
           "print(len(held_out) / len(files))")
    again = split(list(files))
    yield (set(again[1]) == held_out, "a second call holds out other pictures.",
           "call it twice and compare")


def caption_line(line):
    path = 'letters/the "L"/0.png'
    given = line(path, "L", "red", "navy")
    yield isinstance(given, str), f"a string is asked for, not {type(given).__name__}.", "print(type(line))"
    yield ("\n" not in given.strip(), "it is more than one line, and each line of a .jsonl is a picture of its own.",
           "print(repr(line))")
    try:
        record = json.loads(given)
    except ValueError:
        record = None
    yield (isinstance(record, dict), "it is not JSON, at least not if a file name holds quotation marks.",
           "json.loads(caption_line('a \"b\".png', 'L', 'red', 'navy'))")
    yield ({"image", "text"} <= record.keys(), "the names under which path and caption are looked for are others.",
           "print the lines in the cell above")
    yield record["image"] == path, "the path is not the one that was given.", "print(record['image'])"
    lacking = [word for word in ("L", "red", "navy") if word not in str(record["text"]).split()]
    yield not lacking, f"the caption lacks {len(lacking)} of the three words.", "print(record['text'])"
