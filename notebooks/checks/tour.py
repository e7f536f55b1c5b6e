"""Checks of notebook 1: three predictions, each one letter. What is told is where to look again."""


def letter(answer):
    """The first property of all three."""
    return (isinstance(answer, str) and answer.strip().lower() in ("a", "b", "c"),
            "the answer is one of the three letters, in quotes.", 'write answer = "a", "b" or "c"')


def chosen(answer, which):
    return answer.strip().lower() == which


def dice(answer):
    yield letter(answer)
    yield (not chosen(answer, "a"), "the same 64 tokens came back as the same pixels.",
           "look at the first assert of the next cell: what was decoded twice?")
    yield (not chosen(answer, "c"), "the same beginning got the same logits.",
           "look at the last assert of the next cell: what was computed twice?")


def film(answer):
    yield letter(answer)
    yield (not chosen(answer, "a"), "the tokens are not written column by column.",
           "look at the first frame of the film again: beside which one does the second token stand?")
    yield (not chosen(answer, "c"), "no place of the film is blurred: it is either painted or grey.",
           "look at the frame after 32 tokens again: how much of it is grey, and where?")


def surprise(answer):
    yield letter(answer)
    yield (not chosen(answer, "a"), "the replaced tokens are also read, when others are predicted.",
           "look at the two maps again, just right of the white frame and below it")
    yield (not chosen(answer, "c"), "the GPT cannot read what is not written yet.",
           "look at the two maps again, in the three rows above the white frame")
