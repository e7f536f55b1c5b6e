"""What every notebook needs, and the check of a laptop on the day before the workshop.

    python notebooks/course.py                           # is this machine ready, and how long will each take?
    python notebooks/course.py --without-solutions DIR      # copies of the notebooks for a class

In a notebook: `from course import start, load, show, Curve, check` and `start("2 tokenizer", minutes=3)`.
"""
import argparse
import importlib
import io
import json
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = next(folder for folder in HERE.parents if (folder / "tokenizer.py").exists())
WEIGHTS = HERE / "weights"
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from checks import check                                         # notebooks import it from here
from runs import fill_weights, read_checkpoint
from tokenizer import load_tokenizer, to_uint8

REFERENCE_SECONDS = 0.09             # what `speed_test` takes on 2 cores of an AMD EPYC with AVX-512 BF16
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]   # Okabe and Ito 2008


def speed_test():
    """Seconds of a fixed piece of work, products and convolutions, the best of five."""
    a, x, w = torch.randn(768, 768), torch.randn(16, 32, 32, 32), torch.randn(32, 32, 3, 3)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(10):
            a @ a
            F.conv2d(x, w, padding=1)
        best = min(best, time.perf_counter() - begin)
    return best


def small_png(figure):
    """A figure as a PNG of at most 256 colours, which takes a third of the bytes."""
    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", bbox_inches="tight")
    Image.open(full).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def start(title, minutes):
    """Prepare a notebook and print one line: what runs it, and about how long it takes here.

    minutes  what the whole notebook takes on the reference machine
    """
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")            # the same pictures on every machine
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    import matplotlib.pyplot as plt
    from IPython import get_ipython
    from matplotlib_inline.backend_inline import set_matplotlib_formats
    set_matplotlib_formats("png")                # now: later the backend would replace small_png by its own
    if get_ipython():
        get_ipython().display_formatter.formatters["image/png"].for_type(plt.Figure, small_png)
    plt.rcParams.update({"figure.dpi": 80, "figure.figsize": (6, 3), "axes.grid": True, "grid.alpha": 0.3,
                         "axes.prop_cycle": plt.cycler(color=COLOURS, linestyle=["-", "--", "-.", *":---"]),
                         "axes.spines.top": False, "axes.spines.right": False, "image.cmap": "viridis"})
    slower = speed_test() / REFERENCE_SECONDS
    print(f"{title}: torch {torch.__version__}, {torch.get_num_threads()} threads. This machine takes "
          f"{slower:.1f} times as long as the reference: about {max(1, round(minutes * slower))} minutes.")


def load(name):
    """Of the weights in notebooks/weights: "vq" and "gpt" (shapes by class), "text_vq", "text_gpt" and "text"
    (shapes by caption, its text encoder), or "judge" (the CNN of fid.py that names shapes)."""
    from fid import Classifier
    from model import load_gpt
    from text import tiny_text_encoder_from
    path = WEIGHTS / f"{'text_gpt' if name == 'text' else name}.pt"
    if name == "text":
        return tiny_text_encoder_from(read_checkpoint(path)["text_encoder"], path, torch.device("cpu"))
    if name == "judge":
        saved = read_checkpoint(path)["model"]
        return fill_weights(Classifier(len(saved["head.bias"])), saved, path).eval()
    return (load_tokenizer if name.endswith("vq") else load_gpt)(path)


def show(images, titles=None, columns=None, size=96, note=None, row_names=()):
    """Display pictures side by side as one JPEG, each `size` pixels wide, nearest neighbour.

    images   float (B, 3, H, W) in [-1, 1], or uint8 (B, H, W, 3); titles: a line above each
    columns  in a row, at most 10 if left out; note: what is to be seen, a sentence below
    row_names  one at the left of each row
    """
    from IPython.display import Image as Shown, display
    from data import image_grid
    floating = torch.is_tensor(images) and images.is_floating_point()
    arrays = np.asarray(to_uint8(images.detach()) if floating else images)
    big = np.stack([np.asarray(Image.fromarray(a).resize((size, size), Image.NEAREST)) for a in arrays])
    sheet = image_grid(big, columns or min(10, len(big)), row_names, titles or (), scale=1)
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=76, optimize=True)
    display(Shown(buffer.getvalue(), format="jpeg"))
    if note:
        print(note)


class Curve:
    """A curve that grows while a loop runs; only its last state is stored in the notebook.

        curve = Curve("loss in nats", {"uniform": math.log(512)})
        curve.add(train=loss.item())            # once per step; draws itself now and then
        curve.close()
    """

    def __init__(self, label, lines=None, every=2.0):
        import matplotlib.pyplot as plt
        from IPython.display import display
        self.plt, self.every, self.last, self.values = plt, every, time.perf_counter(), {}
        self.figure, self.axes = plt.subplots()
        self.label, self.lines = label, lines or {}
        self.handle = display(self.figure, display_id=True)

    def add(self, **values):
        for name, value in values.items():
            self.values.setdefault(name, []).append(float(value))
        if time.perf_counter() - self.last > self.every:
            self.draw()

    def draw(self):
        self.last = time.perf_counter()
        self.axes.clear()
        for name, values in self.values.items():
            self.axes.plot(values, label=name)
        for i, (name, height) in enumerate(self.lines.items()):
            self.axes.axhline(height, color="grey", linewidth=1)
            self.axes.text(0, height, name, fontsize=8, va="bottom")
        self.axes.set(xlabel="step", ylabel=self.label)
        self.axes.legend()
        self.handle.update(self.figure)

    def close(self):
        self.draw()
        self.plt.close(self.figure)


# ------------------------------------------------------------------------------------------------------------
# The day before

def notebooks():
    return sorted(HERE.glob("[1-9]*_*.ipynb"), key=lambda path: int(path.name.split("_")[0]))


def tell(good, what):
    print(f"[{'OK' if good else 'FAIL'}] {what}", flush=True)
    return good


def ready():
    """Print a line for each thing that the notebooks need; returns whether all are there."""
    good = tell(sys.version_info >= (3, 10), f"Python {sys.version.split()[0]} (3.10 or later)")
    for package in ("torch", "numpy", "PIL", "tqdm", "scipy", "matplotlib", "nbclient", "ipykernel",
                    "jupyterlab"):
        try:
            version = getattr(importlib.import_module(package), "__version__", "")
            tell(True, f"{package} {version}")
        except ImportError:
            good = tell(False, f"{package} is missing: pip install -r requirements.txt "
                               "-r notebooks/requirements.txt")
    for name in ("vq", "gpt", "text_vq", "text_gpt", "text", "judge"):
        try:
            load(name)
            tell(True, f"weights of {name}")
        except Exception as error:
            good = tell(False, f"weights of {name}: {error}")
    slower = speed_test() / REFERENCE_SECONDS
    for path in notebooks():
        about = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("course", {})
        if "seconds" in about:
            minutes = about["seconds"] * slower / 60
            tell(True, f"{path.name}: about {minutes:.1f} minutes on this machine")
    print("ready" if good else "not ready: see the lines with FAIL")
    return good


def without_solutions(folder):
    """Copies of the notebooks without the cells tagged `solution`, and without outputs."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir() or folder.resolve() == HERE:
        sys.exit(f"{folder} would be overwritten: give the name of another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for path in notebooks():
        notebook = json.loads(path.read_text(encoding="utf-8"))
        notebook["cells"] = [cell for cell in notebook["cells"]
                             if "solution" not in cell["metadata"].get("tags", [])]
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell.update(outputs=[], execution_count=None)
        text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
        (folder / path.name).write_text(text, encoding="utf-8")
        print(f"wrote {folder / path.name}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without-solutions", metavar="DIR", help="write copies without solutions there")
    args = parser.parse_args()
    if args.without_solutions:
        without_solutions(args.without_solutions)
    else:
        sys.exit(not ready())
