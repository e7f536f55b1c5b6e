"""Checks that diagnose: what is asked, of an answer to an exercise, one property after the other.

Each file here holds the checks of one notebook. A check is a function of the answer that yields

    (whether the property holds, "what is wrong, in one sentence", "an experiment of one or two lines")

in the order in which a student should mend them; the experiment may be left out. The first that does not hold
is told, no other, and never the answer. What the answer raises is told in one line. Names are
"<notebook>.<exercise>".
"""
import importlib
import textwrap

FILES = {"1": "tour", "2": "tokenizer", "3": "gpt", "4": "sampling", "5": "evaluation", "6": "text",
         "7": "claims", "8": "speed", "9": "images", "10": "diffusion", "11": "beyond"}


class NoAnswer(Exception):
    """The dots of a stub are still there."""


def answered(result):
    """What an answer is, or what it returns, unless that is the dots of a stub."""
    if result is ...:
        raise NoAnswer
    return result


def check(name, answer):
    """Print whether the answer to an exercise is right, and if not, the first property that does not hold.

    name  such as "2.straight_through". Never raises for a wrong answer.
    """
    number, exercise = name.split(".")
    module = importlib.import_module(f"checks.{FILES[number]}")
    count = 0
    try:
        if answer is None:
            raise NoAnswer
        asked = (lambda *given, **named: answered(answer(*given, **named))) if callable(answer) else (
            answered(answer))
        for holds, wrong, *experiment in getattr(module, exercise)(asked):
            if not holds:
                return print(f"not yet: {wrong}", *(f"Try: {words}" for words in experiment))
            count += 1
    except NoAnswer:
        return print("not yet: there is no answer. Replace the dots by yours")
    except Exception as error:
        where = type(error).__name__
        return print(f"not yet: your code ended with {where}: {textwrap.shorten(str(error), 200)}")
    print(f"yes: {count} {'property holds' if count == 1 else 'properties hold'}")


def is_tensor(value, shape, what="the result"):
    """The first property of most checks: a tensor of this shape."""
    import torch
    if not torch.is_tensor(value):
        return False, f"{what} is {type(value).__name__}, not a tensor.", "print the type of what you return"
    return (tuple(value.shape) == tuple(shape),
            f"{what} has shape {tuple(value.shape)}, not {tuple(shape)}.", "print the shape after each step")
