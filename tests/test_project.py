"""pytest -q tests/test_project.py      What the README and the comments say is true; the notebooks run."""
import argparse
import ast
import itertools
import json
import linecache
import re
import shlex
import sys

import pytest
import torch

import data
import fid
import lines
import model
import sample
import text
import tokenizer
import train_gpt
import train_vq
from conftest import ROOT

SCRIPTS = {"data.py": data, "train_vq.py": train_vq, "train_gpt.py": train_gpt, "sample.py": sample,
           "fid.py": fid}
PAGES = sorted(path.name for path in ROOT.glob("*.md"))


def parser_of(module, monkeypatch):
    """The ArgumentParser that a script's get_args builds."""
    found = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self,
                        argv=None: found.append(self) or sys.exit())
    with pytest.raises(SystemExit):
        module.get_args([])
    monkeypatch.undo()
    return found[0]


def every_action(parser):
    """All flags of a parser, also those of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from every_action(command)
        else:
            yield action


def flags_read(name, sources):
    """The attributes of `args` that module `name` reads, or a module to whose functions it hands `args`.

    sources: module name -> source. A flag that some other script reads is not read by this one.
    """
    done, waiting, read = set(), [name], set()
    while waiting:
        name = waiting.pop()
        if name in done or name not in sources:
            continue
        done.add(name)
        nodes = list(ast.walk(ast.parse(sources[name])))
        imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        origin = {alias.asname or alias.name: node.module for node in imports for alias in node.names}
        for node in nodes:
            if (isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
                    and ast.unparse(node.value) in ("args", "self.args")):
                read.add(node.attr)
            elif isinstance(node, ast.Call) and "args" in map(ast.unparse, node.args):
                called = ast.unparse(node.func).split(".")[0]
                waiting.append(origin.get(called, called))
    return read


SOURCES = {path.stem: path.read_text() for path in ROOT.glob("*.py")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_help_and_is_read_by_its_own_script(script, monkeypatch):
    read = flags_read(script.removesuffix(".py"), SOURCES)
    for action in every_action(parser_of(SCRIPTS[script], monkeypatch)):
        assert action.help, action.option_strings
        assert action.dest == "help" or action.dest in read, f"{script} {action.option_strings} is never read"


def test_a_flag_that_only_another_script_reads_would_be_noticed():
    sources = {"one": "from shared import go\ndef main(args):\n    go(args, args.a)\n    args.set = 1\n",
               "shared": "import other\ndef go(args, a):\n    return Run(args)\n"
                         "class Run:\n    def f(self):\n        return self.args.b\n",
               "other": "def main(args):\n    return args.c, args.set\n"}
    assert flags_read("one", sources) == {"a", "b"}
    assert flags_read("other", sources) == {"c", "set"}
    more = "\nprint(args.not_a_flag)"
    for script in ("train_vq", "train_gpt", "sample"):           # the same among the real ones
        assert "not_a_flag" not in flags_read(script, SOURCES | {"fid": SOURCES["fid"] + more})
        assert "not_a_flag" in flags_read(script, SOURCES | {script: SOURCES[script] + more})


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_parse(page):
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [line for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text,
                                             re.S) for line in block.splitlines()]
    parsed = 0
    for line in commands:
        for part in line.split("#")[0].split("&&"):
            words = shlex.split(part)
            if words[:1] == ["torchrun"]:                        # its own flags come first
                words = ["python", *itertools.dropwhile(lambda word: word not in SCRIPTS, words)]
            if words[:1] == ["python"] and words[1] in SCRIPTS:
                SCRIPTS[words[1]].get_args(words[2:])
                parsed += 1
            elif words[:1] == ["python"] and words[1] != "-m":
                assert (ROOT / words[1]).exists(), line
    assert parsed >= {"README.md": 40, "FORKING.md": 5}.get(page, 0)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_a_page_links_to_exists(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


def test_each_row_from_paper_to_code_names_what_is_there():
    """| what the paper says | [file](file) `name` | [2](notebook) | [`test`](its file) |"""
    first_screens = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:60])
    rows = re.findall(r"^\| [^|]+ \| \[([\w.]+)\]\(\1\) `(\w+)` \| \[(\d)\]\(([\w/.]+)\) "
                      r"\| \[`(\w+)`\]\(([\w/.]+)\) \|$", first_screens, re.M)
    assert len(rows) == first_screens.split("From paper to code")[1].count("\n| ") - 1 >= 12
    for file, name, number, notebook, test, tests in rows:
        code = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
        named = {getattr(part, "name", None) or part.targets[0].id for part in code
                 if isinstance(part, (ast.ClassDef, ast.FunctionDef, ast.Assign))}
        cells = (ROOT / notebook).read_text(encoding="utf-8")
        assert name in named and f"/{number}_" in notebook and name in cells, (name, notebook)
        assert f"def {test}(" in (ROOT / tests).read_text(encoding="utf-8"), test


def test_the_readme_names_every_notebook_with_the_minutes_of_its_stored_run():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| \[\w+\]\(notebooks/(\w+).ipynb\) \| (\d+) \|", readme, re.M))
    notebooks = {path.stem: json.loads(path.read_text(encoding="utf-8"))["metadata"]["course"]["seconds"]
                 for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert rows == {name: str(max(1, round(seconds / 60))) for name, seconds in notebooks.items()}


# The comments with shapes: run a forward pass line by line, bind each letter to a size, and compare.

COMMENT = re.compile(r"#\s+(?:([A-Za-z_][\w, ]*?)\s+)?\(([^()]*)\)(?=\s|$|[;,.])")


def shape_checker(functions, sizes):
    """A tracer for sys.settrace and the list of lines it checked. `sizes` binds letters known beforehand."""
    codes = {function.__code__: function for function in functions}
    checked = []

    def check(frame, line, returned=None):
        text = linecache.getline(frame.f_code.co_filename, line)
        match = COMMENT.search(text)
        if not match:
            return
        name, shape = match.groups()
        if name is None:
            target = re.match(r"\s*(\w+) = ", text)
            value = frame.f_locals.get(target[1]) if target else returned
        else:
            value = frame.f_locals.get(name.split(",")[0].strip())
        if not isinstance(value, torch.Tensor):
            return
        letters = frame_letters.setdefault(frame, dict(sizes))
        terms = [term.strip() for term in shape.split(",") if term.strip()]
        if terms[-1:] == ["..."]:                                # (R, ...): whatever follows
            terms = terms[:-1] + ["_"] * (value.ndim - len(terms) + 1)
        assert len(terms) == value.ndim, f"line {line}: {text.strip()} but the shape is {tuple(value.shape)}"
        for term, size in zip(terms, value.shape):
            expression = re.sub(r"(\d) ([A-Za-z])", r"\1*\2",
                                re.sub(r"([A-Za-z]) ([A-Za-z])", r"\1*\2", term))
            if expression == "_":
                continue
            if expression.isidentifier():
                letters.setdefault(expression, size)
            names = set(re.findall(r"[A-Za-z]\w*", expression))
            if names <= letters.keys():
                assert eval(expression, {}, letters) == size, f"line {line}: {text.strip()}: {term} is {size}"
        checked.append((frame.f_code.co_name, line))

    frame_letters = {}

    def tracer(frame, event, arg):
        if frame.f_code not in codes:
            return None
        previous = [frame.f_lineno]

        def local(frame, event, arg):
            if event in ("line", "return"):
                check(frame, previous[0], arg if event == "return" else None)
                previous[0] = frame.f_lineno
            return local
        return local
    return tracer, checked


def test_shape_comments_of_the_tokenizer_are_true():
    config = tokenizer.VQConfig(codebook_size=96, codebook_embed_dim=8, ch=32, ch_mult=(1, 2), z_channels=40)
    vq = tokenizer.VQModel(config)
    quantizer = tokenizer.VectorQuantizer
    functions = [tokenizer.ResBlock.forward, tokenizer.AttnBlock.forward, tokenizer.Encoder.forward,
                 tokenizer.Decoder.forward, quantizer.forward, quantizer.nearest, quantizer.entropy_loss,
                 tokenizer.VQModel.detokenize]
    config.entropy_weight = 1.0
    tracer, checked = shape_checker(functions, dict(B=3, V=96, C=8, Z=40))
    sys.settrace(tracer)
    try:
        vq(torch.rand(3, 3, 16, 16))
        vq.detokenize(vq.tokenize(torch.rand(3, 3, 16, 16)))
    finally:
        sys.settrace(None)
    assert len({line for _, line in checked}) >= 14


def test_shape_comments_of_whole_data_sets_in_passes_are_true():
    config = tokenizer.VQConfig(codebook_size=96, ch=32, ch_mult=(1, 2), z_channels=40)
    vq = tokenizer.VQModel(config).eval()

    class Pictures:                                              # a data set of one batch
        def __len__(self):
            return 3

        def passes(self, batch_size):
            yield torch.randint(256, (3, 1, 3, 16, 16), dtype=torch.uint8), None

    functions = [tokenizer.tokenize_in_passes, tokenizer.to_pictures.__wrapped__,
                 tokenizer.evaluate.__wrapped__]
    tracer, checked = shape_checker(functions, dict(B=3, M=3, N=64, H=16, W=16))
    sys.settrace(tracer)
    try:
        tokenizer.evaluate(vq, Pictures(), torch.device("cpu"), 3)
    finally:
        sys.settrace(None)
    assert {name for name, _ in checked} >= {"to_pictures", "evaluate"}


@pytest.mark.parametrize("kind", ["c2i", "t2i"])
def test_shape_comments_of_the_model_are_true(kind):
    L = 1 if kind == "c2i" else 5
    config = model.GPTConfig(dim=48, n_layer=1, n_head=4, n_kv_head=2, vocab_size=96, block_size=16,
                             num_classes=10, model_type=kind, cls_token_num=L, caption_dim=24)
    gpt = model.GPT(config)
    functions = [model.rope_table, model.apply_rope, model.Attention.forward, model.LabelEmbedder.forward,
                 model.CaptionEmbedder.forward, model.GPT.forward, model.GPT.attention_mask,
                 model.KVCache.update, model.GPT.prefill, model.GPT.advance, sample.generate.__wrapped__]
    tracer, checked = shape_checker(functions, dict(N=16, L=L, D=48, G=2, d=12, V=96, E=24))
    cond = torch.tensor([1, 2, 3]) if kind == "c2i" else torch.randn(3, L, 24)
    mask = None if kind == "c2i" else torch.ones(3, L)
    sys.settrace(tracer)
    try:
        gpt(torch.randint(96, (3, 7)), cond, targets=torch.randint(96, (3, 8)), cond_mask=mask)
        sample.generate.__wrapped__(gpt, cond, mask, cfg_scale=2.0)
    finally:
        sys.settrace(None)
    assert len({line for _, line in checked}) >= 9
    assert {name for name, _ in checked} >= {"advance", "generate"}          # with the cache as well


def test_shape_comments_of_the_text_encoder_are_true(tmp_path):
    encoder = text.tiny_text_encoder(["a red star", "a blue heart on white"])
    functions = [text.T5Attention.forward, text.T5Encoder.forward, text.TextEncoder.forward,
                 text.Captions.__call__]
    prompts = ["a red star", "a star", "blue"]
    ids, captions = encoder.tokenize(prompts), text.Captions([[prompt] for prompt in prompts], encoder)
    captions.cache_features(encoder, tmp_path, "cpu")
    tracer, checked = shape_checker(functions, dict(B=3, L=ids.shape[1], H=4, d=48))
    sys.settrace(tracer)
    try:
        encoder(ids)
        captions(captions.rows, None, "cpu")
    finally:
        sys.settrace(None)
    assert len({line for _, line in checked}) >= 8


def test_the_shape_check_would_notice_a_wrong_comment(tmp_path):
    (tmp_path / "wrong.py").write_text("import torch\ndef f(x):                # x (B, D)\n    y = x.T     "
                                       "# (B, D)\n    return y\n")
    sys.path.insert(0, str(tmp_path))
    import wrong
    tracer, _ = shape_checker([wrong.f], {})
    sys.settrace(tracer)
    try:
        with pytest.raises(AssertionError, match="line 3"):
            wrong.f(torch.zeros(2, 3))
    finally:
        sys.settrace(None)
        sys.path.remove(str(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer.py", "model.py", "text.py"])
def test_the_demos_run(name, capsys):
    import runpy
    runpy.run_path(str(ROOT / name), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) >= 5


def test_lines_fit_the_page():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("notebooks/**/*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 110, f"{path.name}:{number}"


# Weight: what is counted by tests/lines.py

CORE = lines.PATH_OF_A_PICTURE + lines.AROUND_IT


def test_every_module_is_counted():
    assert {path.name for path in ROOT.glob("*.py")} == {*CORE, "serve_vllm.py"}      # which is optional


def test_the_path_of_a_picture_and_the_whole_stay_within_their_lines():
    assert lines.count(lines.PATH_OF_A_PICTURE) <= 3446
    assert lines.count(CORE) <= 6453


@pytest.mark.parametrize("name", CORE)
def test_a_fifth_of_each_file_explains_it(name):
    share = lines.comment_share((ROOT / name).read_text())
    assert 0.20 <= share <= 0.30


@pytest.mark.parametrize("name", CORE)
def test_functions_fit_a_screen_and_only_main_is_longer(name):
    for function, length in lines.functions((ROOT / name).read_text()):
        assert length <= (110 if function == "main" else 60), f"{name}: {function} has {length} lines"


def test_the_measures_count_what_they_say():
    source = ('"""One\ntwo."""\n\n# three\nx = 1    # behind code\n'
              'def f():\n    """Four."""\n    return "# none"\n')
    assert lines.comment_share(source) == 4 / 7                  # of 7 lines that are not blank
    assert lines.functions(source) == [("f", 3)]


def counts_of(readme):
    """The rows of the README's table of files: | 2 | [name.py](name.py) | 424 | ..."""
    rows = re.findall(r"^\| *\d+ *\| *\[(\w+\.py)\]\(\1\) *\| *([\d,]+) *\|", readme, re.M)
    return {name: int(number.replace(",", "")) for name, number in rows}


def test_the_line_counts_in_the_readme_are_true():
    assert counts_of("| 2 | [a.py](a.py) | 1,024 | text |") == {"a.py": 1024}
    assert counts_of((ROOT / "README.md").read_text()) == {name: lines.count([name]) for name in CORE}
