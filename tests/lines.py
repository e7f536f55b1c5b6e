"""python tests/lines.py      Lines, share of comments and longest function of each file, and the sums."""
import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATH_OF_A_PICTURE = ("tokenizer.py", "model.py", "sample.py", "train_vq.py", "train_gpt.py", "training.py",
                     "runs.py")
AROUND_IT = ("data.py", "files.py", "shapes.py", "text.py", "fid.py")


def functions(source):
    """(name, lines) of every function; a nested one counts in its own right and in the one around it."""
    return [(node.name, node.end_lineno - node.lineno + 1) for node in ast.walk(ast.parse(source))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def comment_share(source):
    """Docstring lines and lines that are nothing but a comment, over all lines that are not blank.

    Comments behind code do not count: this measures sentences, and those are the names of shapes.
    """
    lines, explaining = source.splitlines(), set()
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and ast.get_docstring(node) is not None:
            explaining |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.strip().startswith("#"):
            explaining.add(token.start[0])
    filled = {number for number, line in enumerate(lines, 1) if line.strip()}
    return len(explaining) / max(1, len(filled))


def count(names):
    """Lines of these files together."""
    return sum(len((ROOT / name).read_text().splitlines()) for name in names)


if __name__ == "__main__":
    for name in PATH_OF_A_PICTURE + AROUND_IT:
        source = (ROOT / name).read_text()
        longest, length = max(functions(source), key=lambda pair: pair[1])
        print(f"{name:14}{count([name]):6,} lines {comment_share(source):6.1%} comments   "
              f"longest function: {longest}, {length}")
    print(f"{'path':14}{count(PATH_OF_A_PICTURE):6,} lines")
    print(f"{'all':14}{count(PATH_OF_A_PICTURE + AROUND_IT):6,} lines")
