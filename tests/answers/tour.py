"""Typical wrong answers to the exercises of notebook 1, and words of the sentence that each has to get."""

WRONG = {
    "dice": [('answer = "a"', "same pixels"), ('answer = "C"', "same logits"),
             ('answer = "the draw"', "three letters")],
    "film": [('answer = "a"', "column by column"), ('answer = "c"', "blurred"),
             ("answer = 2", "three letters")],
    "surprise": [('answer = "a"', "also read"), ('answer = " c"', "not written yet"),
                 ('answer = ["b"]', "three letters")],
}
