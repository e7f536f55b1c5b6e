"""pytest -q tests/test_project.py      What the README and the comments say is true; the notebooks run."""
import argparse
import ast
import re
import shlex
import sys

import pytest
import torch

import data
import fid
import model
import sample
import text
import tokenizer
import train_gpt
import train_vq
from conftest import ROOT

SCRIPTS = {"data.py": data, "train_vq.py": train_vq, "train_gpt.py": train_gpt, "sample.py": sample,
           "fid.py": fid}


def parser_of(module, monkeypatch):
    """The ArgumentParser that a script's get_args builds."""
    found = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self,
                        argv=None: found.append(self) or sys.exit())
    with pytest.raises(SystemExit):
        module.get_args([])
    monkeypatch.undo()
    return found[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_help_and_is_read(script, monkeypatch):
    source = "".join((ROOT / name).read_text() for name in SCRIPTS)
    read = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)
            and isinstance(node.value, (ast.Name,
                                        ast.Attribute)) and ast.unparse(node.value).endswith("args")}
    parser = parser_of(SCRIPTS[script], monkeypatch)
    actions = list(parser._actions)
    for action in parser._actions:                               # data.py has a parser per command
        if isinstance(action, argparse._SubParsersAction):
            actions.remove(action)
            actions += [flag for command in action.choices.values() for flag in command._actions]
    for action in actions:
        assert action.help, action.option_strings
        assert action.dest == "help" or action.dest in read, f"{script} {action.option_strings} is never read"


def test_the_commands_in_the_readme_parse(monkeypatch):
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = [line for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text,
                                             re.S) for line in block.splitlines()]
    parsed = 0
    for line in commands:
        for part in line.split("#")[0].split("&&"):
            words = shlex.split(part)
            if words[:1] == ["python"] and words[1] in SCRIPTS:
                SCRIPTS[words[1]].get_args(words[2:])
                parsed += 1
            elif words[:1] == ["python"] and words[1] != "-m":
                assert (ROOT / words[1]).exists(), line
    assert parsed >= 8


def test_every_file_the_readme_links_to_exists():
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target


# The comments with shapes: run a forward pass line by line, bind each letter to a size, and compare.

COMMENT = re.compile(r"#\s+(?:([A-Za-z_][\w, ]*?)\s+)?\(([^()]*)\)(?=\s|$|[;,.])")


def shape_checker(functions, sizes):
    """A tracer for sys.settrace and the list of lines it checked. `sizes` binds letters known beforehand."""
    codes = {function.__code__: function for function in functions}
    checked = []

    def check(frame, line, returned=None):
        import linecache
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
        assert len(terms) == value.ndim, f"line {line}: {text.strip()} but the shape is {tuple(value.shape)}"
        for term, size in zip(terms, value.shape):
            expression = re.sub(r"(\d) ([A-Za-z])", r"\1*\2",
                                re.sub(r"([A-Za-z]) ([A-Za-z])", r"\1*\2", term))
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


@pytest.mark.parametrize("kind", ["c2i", "t2i"])
def test_shape_comments_of_the_model_are_true(kind):
    L = 1 if kind == "c2i" else 5
    config = model.GPTConfig(dim=48, n_layer=1, n_head=4, n_kv_head=2, vocab_size=96, block_size=16,
                             num_classes=10, model_type=kind, cls_token_num=L, caption_dim=24)
    gpt = model.GPT(config)
    functions = [model.rope_table, model.apply_rope, model.Attention.forward, model.LabelEmbedder.forward,
                 model.CaptionEmbedder.forward, model.GPT.forward, model.GPT.attention_mask,
                 sample.generate.__wrapped__]
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


def test_shape_comments_of_the_text_encoder_are_true():
    encoder = text.tiny_text_encoder(["a red star", "a blue heart on white"])
    functions = [text.T5Attention.forward, text.T5Encoder.forward, text.TextEncoder.forward]
    ids = encoder.tokenize(["a red star", "a star", "blue"])
    tracer, checked = shape_checker(functions, dict(B=3, L=ids.shape[1], H=4, d=48))
    sys.settrace(tracer)
    try:
        encoder(ids)
    finally:
        sys.settrace(None)
    assert len({line for _, line in checked}) >= 6


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
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 110, f"{path.name}:{number}"
