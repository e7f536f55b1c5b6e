"""Train the weights that come with the notebooks, and round them to 16 bits.

    python notebooks/make_weights.py                       # all of them; hours: text_gpt took one by itself
    python notebooks/make_weights.py judge                 # these: vq gpt text_vq text_gpt judge

GPTs are trained on the tokens of the *rounded* tokenizers: rounding moves some latents to other codes and
changes the hash by which a GPT knows its tokenizer. The runs themselves are kept in out/weights.
"""
import torch

from course import ROOT, WEIGHTS

import train_gpt
import train_vq
from data import load_data
from fid import train_classifier
from runs import InputError, flag_parser, read_checkpoint, run, whole_file

OUT = ROOT / "out/weights"
RUNS = {                                     # in this order: a GPT needs its tokenizer
    "vq": (train_vq, "--steps", 4000),
    "gpt": (train_gpt, "--steps", 4500, "--vq", WEIGHTS / "vq.pt"),
    "text_vq": (train_vq, "--cond", "text", "--steps", 3000),
    "text_gpt": (train_gpt, "--cond", "text", "--steps", 3000, "--vq", WEIGHTS / "text_vq.pt"),
    "judge": (None,),                        # fid.py trains it, and has no flags for that
}


def half(value):
    """A checkpoint's dicts and tensors with float32 rounded to float16; the rest as it is."""
    if isinstance(value, dict):
        return {name: half(inside) for name, inside in value.items()}
    return value.half() if torch.is_tensor(value) and value.dtype == torch.float32 else value


def make(name):
    script, *flags = RUNS[name]
    if script is None:
        net = train_classifier(load_data("shapes", "train"), torch.device("cpu"))
        kept = {"model": net.state_dict()}
    else:
        script.main(script.get_args([*map(str, flags), "--device", "cpu", "--out", str(OUT / f"{name}.pt")]))
        saved = read_checkpoint(OUT / f"{name}.pt")
        kept = {part: saved[part] for part in ("model", "config", "image_size", "class_names", "vq_hash",
                                               "text_encoder") if part in saved}
        kept["args"] = {"data": saved["args"]["data"]}           # what fid.py compares with
    with whole_file(WEIGHTS / f"{name}.pt") as path:
        torch.save(half(kept), path)
    print(f"wrote {WEIGHTS / name}.pt")


def get_args(argv=None):
    parser = flag_parser(__file__, __doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(RUNS)}; all if left out")
    return parser.parse_args(argv)


def main(args):
    if unknown := set(args.names) - RUNS.keys():
        raise InputError(f"no weights called {', '.join(sorted(unknown))}: there are {', '.join(RUNS)}")
    for name in RUNS:
        if name in args.names or not args.names:
            make(name)


if __name__ == "__main__":
    run(main, get_args)
