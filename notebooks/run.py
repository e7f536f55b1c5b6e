"""Execute notebooks and store them, with their outputs, in the form that the tests ask for.

    python notebooks/run.py                          # all, in full
    python notebooks/run.py 2 3                      # these
    python notebooks/run.py --fast --keep            # with few steps, and without writing: what a push tests

What is refused: errors, stderr, warnings, absolute paths, object addresses, pictures and notebooks too large.
"""
import argparse
import base64
import hashlib
import json
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

sys.path.insert(0, str(Path(__file__).resolve().parent))
from course import HERE, notebooks

FAST = "# A fast run, to see that everything works. It shows little.\nSTEPS, SEEDS, FAST = 15, 1, True"
PICTURE, NOTEBOOK, ALL = 60_000, 300_000, 2_500_000              # bytes at most
UNWANTED = {"an absolute path": r"(?<![\w/.])/(home|root|tmp|Users|work|opt|usr)/|[A-Z]:\\\\",
            "a warning": r"Warning", "the address of an object": r"0x[0-9a-f]{6,}"}


def sources_hash(notebook):
    """Of all that its author wrote: a notebook that was edited and not run again has another."""
    words = [[cell.cell_type, cell.source] for cell in notebook.cells]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]


def execute(notebook, fast=False, solve=False):
    """Run all cells in place; returns seconds for each code cell. fast: a cell with small numbers follows the
    one tagged `parameters`. solve: the solutions take the places of the exercises' stubs."""
    if solve:
        for cell, code in solutions(notebook):
            cell.source = code
    if fast:
        at = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
        for i in reversed(at):
            notebook.cells.insert(i + 1, nbformat.v4.new_code_cell(FAST, metadata={"tags": ["fast"]}))
    client = NotebookClient(notebook, timeout=180, kernel_name="python3", record_timing=False,
                            resources={"metadata": {"path": str(HERE)}})
    began, seconds = [], []

    def begin(cell, cell_index):
        began.append(time.perf_counter())

    def end(cell, cell_index, execute_reply):
        seconds.append(time.perf_counter() - began[-1])

    client.on_cell_execute, client.on_cell_executed = begin, end
    client.execute()
    return seconds


def solutions(notebook):
    """(cell of an exercise, the code of its solution) for each: the Python block in the next cell tagged
    `solution`, followed by the check that the exercise ends in."""
    found = []
    for i, cell in enumerate(notebook.cells):
        if "exercise" in cell.metadata.get("tags", []):
            answer = next(later for later in notebook.cells[i:]
                          if "solution" in later.metadata.get("tags", []))
            code = re.search(r"```python\n(.*?)```", answer.source, re.S)[1]
            checks = [line for line in cell.source.splitlines() if line.startswith("check(")]
            found.append((cell, "\n".join([code.rstrip(), *checks])))
    return found


def clean(notebook):
    """Take away what differs from run to run and from machine to machine."""
    for cell in notebook.cells:
        cell.metadata = {name: value for name, value in cell.metadata.items() if name == "tags"}
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}


def faults(notebook):
    """What is wrong with the stored outputs, a sentence each."""
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                yield f"cell {number} ended with {output.ename}: {output.evalue}"
            if output.get("name") == "stderr":
                yield f"cell {number} wrote to stderr: {output.text[:200]}"
            text = output.get("text", "") or output.get("data", {}).get("text/plain", "")
            for what, pattern in UNWANTED.items():
                if hit := re.search(pattern, text):
                    yield f"cell {number} shows {what}: {text[max(0, hit.start() - 40):hit.end() + 40]!r}"
            for kind, data in output.get("data", {}).items():
                size = len(base64.b64decode(data)) if kind.startswith("image/") else 0
                if size > PICTURE:
                    yield f"cell {number} has a picture of {size:,} bytes, at most {PICTURE:,}"
    size = len(nbformat.writes(notebook).encode())
    if size > NOTEBOOK:
        yield f"the notebook has {size:,} bytes, at most {NOTEBOOK:,}"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", help="such as 2 3; all if left out")
    parser.add_argument("--fast", action="store_true", help="few steps")
    parser.add_argument("--keep", action="store_true", help="do not write the notebooks")
    args = parser.parse_args()
    paths = {path.name.split("_")[0]: path for path in notebooks()}
    if unknown := set(args.numbers) - paths.keys():
        sys.exit(f"no notebook {', '.join(sorted(unknown))}: there are {', '.join(paths)}")
    bad = 0
    for path in map(paths.get, args.numbers or paths):
        notebook, began = nbformat.read(path, as_version=4), time.perf_counter()
        seconds = execute(notebook, args.fast)
        total = time.perf_counter() - began
        clean(notebook)
        found = list(faults(notebook))
        bad += len(found)
        print(f"{path.name}: {total:.0f} s, slowest cell {max(seconds):.0f} s", *found, sep="\n    ",
              flush=True)
        if not args.keep and not found:
            notebook.metadata["course"] = {"seconds": round(total), "sources": sources_hash(notebook)}
            nbformat.write(notebook, path)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
