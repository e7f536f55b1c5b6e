"""Checks of notebook 1: three predictions, each one letter. What is told is where to look again."""


def prediction(**wrong):
    """A check of a letter. wrong: for each letter that is not right, what it overlooks and where to look."""
    def check(answer):
        letter = answer.strip().lower() if isinstance(answer, str) else None
        yield (letter in ("a", "b", "c"), "the answer is one of the three letters, in quotes.",
               'write answer = "a", "b" or "c"')
        for other, (overlooked, where) in wrong.items():
            yield letter != other, overlooked, where
    return check


dice = prediction(
    a=("the same 64 tokens came back as the same pixels.",
       "look at the first assert of the next cell: what was decoded twice?"),
    c=("the same beginning got the same logits.",
       "look at the last assert of the next cell: what was computed twice?"))

film = prediction(
    a=("the tokens are not written column by column.",
       "run the next cell, and look at the film's first frame: beside which one is the second token?"),
    c=("no place of the film is blurred: it is either painted or grey.",
       "run the next cell, and look at the frame after 32 tokens: how much of it is grey, and where?"))

surprise = prediction(
    a=("the replaced tokens are also read, when others are predicted.",
       "run the next cells, and look at the two maps, just right of the white frame and below it"),
    c=("the GPT cannot read what is not written yet.",
       "run the next cells, and look at the two maps, in the three rows above the white frame"))
