"""Let a language model's engine, vLLM, draw the tokens: the paper's fourth result. Nothing else needs it.

    class or caption -> vLLM (this file) -> tokens -> the tokenizer -> pictures, as in sample.py

vLLM knows sequences of tokens, a cache in blocks, many requests at a time; it does not know guidance, which
compares two sequences. So both go in as one: to vLLM the model has R = 2 times the width, heads and caches. A
token is two rows, [conditional | unconditional]; every matrix sees the rows one by one, attention sees heads
0 .. H-1 of the first and H .. 2H-1 of the second, and the logits of the two leave as one row. They cannot get
out of step, whatever the engine does with its requests.

Shapes: T tokens of all requests in one call, R rows of each (1: no guidance), and model.py's letters.
Paper:  LlamaGen (arXiv 2406.06525), on its serving; PagedAttention (Kwon 2023).
Run:    python serve_vllm.py --classes heart star --cfg-scale 2         # sample.py's flags and those below
"""
import argparse
import gc
import json
import os
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import sample
from model import GPTConfig, RMSNorm, apply_rope, load_gpt, rope_table
from runs import InputError, check_tensor, counting, explained, free_memory, run

# One process, so that what is registered here is known where the model runs; no thread bound to a core; GiB
# of a CPU's memory for the caches; no report over the network.
for name, value in (("VLLM_ENABLE_V1_MULTIPROCESSING", "0"), ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
                    ("VLLM_CPU_KVCACHE_SPACE", "4"), ("VLLM_NO_USAGE_STATS", "1"),
                    ("VLLM_LOGGING_LEVEL", "ERROR")):
    os.environ.setdefault(name, value)
try:
    import vllm
    from vllm.compilation.decorators import support_torch_compile
    from vllm.distributed import get_tensor_model_parallel_world_size
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.linear import (MergedColumnParallelLinear, QKVParallelLinear,
                                                   RowParallelLinear)
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
    from vllm.model_executor.model_loader import BaseModelLoader, register_model_loader
    MISSING = None
except ImportError as error:                                     # told by whoever starts an engine
    MISSING = error

TRIED = "0.32."
KERNEL_WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)   # of a head; between them zeros are added
HIDDEN = -3e4                                                    # a score far below all others; bf16 holds it


# ------------------------------------------------------------------------------------------------------------
# The model, of vLLM's layers: they are shared out over GPUs, and their attention reads the blocks of the
# cache. The names are model.py's, RMSNorm and RoPE are model.py's own.

def kernel_width(config):
    """The head width that the engine gets. A text model needs a channel to spare, which hides padding."""
    needed = config.dim // config.n_head + (config.model_type == "t2i")
    return next(width for width in KERNEL_WIDTHS if width >= needed)


class ServedAttention(nn.Module):
    def __init__(self, config, rows, vllm_config, prefix):
        super().__init__()
        H, G, d = config.n_head, config.n_kv_head or config.n_head, config.dim // config.n_head
        parts = get_tensor_model_parallel_world_size()
        self.H, self.G, self.d, self.rows = H // parts, G // parts, d, rows      # heads of this GPU
        self.spare = kernel_width(config) - d
        self.wqkv = QKVParallelLinear(config.dim, d, H, G, bias=False)
        self.wo = RowParallelLinear(config.dim, config.dim, bias=False)
        self.attend = Attention(rows * self.H, d + self.spare, d ** -0.5, num_kv_heads=rows * self.G,
                                cache_config=vllm_config.cache_config, prefix=prefix)

    def forward(self, x, rope, padding):                         # x    (T R, D), rope (T R, d/2, 2)
        heads = self.wqkv(x)[0].unflatten(-1, (-1, self.d))      #      (T R, H + 2 G, d)
        turned, v = heads.split([self.H + self.G, self.G], dim=1)
        q, k = apply_rope(turned[None], rope)[0].split([self.H, self.G], dim=1)
        q, k, v = (F.pad(t, (0, self.spare)) for t in (q, k, v))
        if padding is not None:       # vLLM has no mask but the causal one: 1 in q times HIDDEN in k is one
            q[..., self.d] = 1
            k[..., self.d] = HIDDEN * padding[:, None]
        # Rows of a token stand one after another: (T R, H, d) in memory is (T, R H d).
        q, k, v = (t.reshape(len(x) // self.rows, -1) for t in (q, k, v))
        y = self.attend(q, k, v).view(len(x), self.H, -1)[..., :self.d]
        return self.wo(y.flatten(1))[0]


class ServedFeedForward(nn.Module):
    def __init__(self, config, hidden):
        super().__init__()
        self.w13 = MergedColumnParallelLinear(config.dim, [hidden, hidden], bias=False)
        self.w2 = RowParallelLinear(hidden, config.dim, bias=False)

    def forward(self, x):
        a, b = self.w13(x)[0].chunk(2, dim=-1)
        return self.w2(F.silu(a) * b)[0]


class ServedBlock(nn.Module):
    def __init__(self, config, hidden, rows, vllm_config, prefix):
        super().__init__()
        self.attention = ServedAttention(config, rows, vllm_config, prefix)
        self.feed_forward = ServedFeedForward(config, hidden)
        self.attention_norm, self.ffn_norm = RMSNorm(config.dim), RMSNorm(config.dim)

    def forward(self, x, rope, padding):
        x = x + self.attention(self.attention_norm(x), rope, padding)
        return x + self.feed_forward(self.ffn_norm(x))


class Trunk(nn.Module):
    """Embeddings (T, R D) and positions (T,) to what the output layer reads, (T, R D)."""

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        saved = vllm_config.model_config.hf_config
        self.config, self.rows = GPTConfig(**saved.llamagen["config"]), saved.llamagen["rows"]
        self.layers = nn.ModuleList(
            ServedBlock(self.config, saved.intermediate_size, self.rows, vllm_config, f"{prefix}.layers.{i}")
            for i in range(self.config.n_layer))
        self.norm = RMSNorm(self.config.dim)
        self.register_buffer("rope", rope_table(self.config), persistent=False)
        self.register_buffer("interval", torch.tensor(self.config.block_size), persistent=False)

    def forward(self, positions, inputs_embeds):
        c, R, L = self.config, self.rows, self.config.cls_token_num
        x = inputs_embeds.unflatten(-1, (R, c.dim)).flatten(0, 1)                # (T R, D)
        padding = (x == 0).all(dim=-1) if c.model_type == "t2i" else None        # embed_captions left zeros
        rope = self.rope[positions].repeat_interleave(R, dim=0)                  # (T R, d/2, 2)
        for layer in self.layers:
            x = layer(x, rope, padding)
        x = self.norm(x).unflatten(0, (-1, R))                                   # (T, R, D)
        # The token at position L + i makes token i + 1, and is guided if i <= interval (see sample.py). Past
        # it the second row becomes a copy of the first: guidance then changes nothing.
        past = (positions - L > self.interval)[:, None]
        return torch.cat([x[:, 0], torch.where(past, x[:, 0], x[:, -1])][:R], dim=-1)


class ServedGPT(nn.Module):
    """What vLLM calls: embed_input_ids, forward, compute_logits."""

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        about = vllm_config.model_config.hf_config.llamagen
        config = self.config = GPTConfig(**about["config"])
        self.rows, self.cfg_scale = about["rows"], 1.0           # see set_guidance
        # Class c is token V + c, the null class V + K. They cannot be drawn: the output layer has V rows.
        classes = config.num_classes + 1 if config.model_type == "c2i" else 0
        self.null = config.vocab_size + config.num_classes
        self.tok_embeddings = VocabParallelEmbedding(config.vocab_size + classes, config.dim)
        self.trunk = Trunk(vllm_config=vllm_config, prefix="trunk")
        self.output = ParallelLMHead(config.vocab_size, config.dim)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids):                        # (T,) -> (T, R D)
        null = torch.where(input_ids >= self.config.vocab_size, self.null, input_ids)
        return torch.cat([self.tok_embeddings(ids) for ids in (input_ids, null)[:self.rows]], dim=-1)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        if inputs_embeds is None:
            inputs_embeds = self.embed_input_ids(input_ids)
        return self.trunk(positions, inputs_embeds)

    def compute_logits(self, hidden):                            # (n, R D) -> (n, V), n places that draw
        logits = self.logits_processor(self.output, torch.cat(hidden.chunk(self.rows, dim=-1)))
        if logits is None or self.rows == 1:                     # None: another GPU has them
            return logits
        return sample.guide(logits.float(), self.cfg_scale)

    def take_weights(self, gpt):
        """Copy the weights of a GPT of model.py; vLLM's layers keep the part that this GPU needs."""
        tokens = gpt.tok_embeddings.weight
        if gpt.config.model_type == "c2i":
            tokens = torch.cat([tokens, gpt.cls_embedding.embedding_table.weight])
        theirs = dict(self.named_parameters())
        for name, weight in {**gpt.state_dict(), "tok_embeddings.weight": tokens}.items():
            if name.startswith("cls_embedding."):
                continue
            name, shard = "trunk." + name if name.startswith(("layers.", "norm.")) else name, ()
            for i, part in enumerate(("w1", "w3")):
                if f".{part}." in name:
                    name, shard = name.replace(f".{part}.", ".w13."), (i,)
            mine = theirs[name]
            load = getattr(mine, "weight_loader", lambda mine, whole: mine.data.copy_(whole))
            load(mine, weight.data, *shard)


# ------------------------------------------------------------------------------------------------------------
# The engine

def register():
    """Tell vLLM of the architecture and of how its weights are read: here, and in each further process."""
    @register_model_loader("llamagen")
    class Loader(BaseModelLoader):
        def download_model(self, model_config):
            pass

        def load_weights(self, model, model_config):
            about = model_config.hf_config.llamagen
            model.take_weights(load_gpt(about["path"], about["image_size"]))

    if not hasattr(Trunk, "do_not_compile"):                     # what the decorator adds
        support_torch_compile(dynamic_arg_dims={"positions": 0, "inputs_embeds": 0})(Trunk)
    vllm.ModelRegistry.register_model("LlamaGen", ServedGPT)


def set_guidance(scale, interval, model):
    """Of a model that is running: s, and how many tokens are guided."""
    model.cfg_scale = scale
    model.trunk.interval.fill_(interval)


class Engine:
    """A GPT of model.py as vLLM serves it; `generate` draws with it. One at a time: close it before the next.

    path        the checkpoint, our own or a released one; gpt is what load_gpt(path, image_size) gave
    guided      whether sequences have two rows: then every cfg_scale can be drawn
    dtype       "float32" or "bfloat16"
    settings    further arguments of vllm.LLM, such as tensor_parallel_size, max_num_seqs, enforce_eager
    """

    def __init__(self, gpt, path, image_size=None, guided=True, dtype="float32", **settings):
        if MISSING is not None:
            raise InputError(f"vLLM is missing or does not fit here ({MISSING}): in a virtual environment of "
                             "its own, pip install -r tests/requirements-vllm.txt")
        if not vllm.__version__.startswith(TRIED):
            print(f"vLLM {vllm.__version__}: this was tried with {TRIED}x only", file=sys.stderr)
        c = self.config = gpt.config
        self.rows, self.dtype = 1 + guided, getattr(torch, dtype)
        text = c.model_type == "t2i"
        self.embed = gpt.cls_embedding.to(self.dtype) if text else None
        about = dict(path=str(Path(path).absolute()), image_size=image_size, config=asdict(c), rows=self.rows)
        self.folder = tempfile.TemporaryDirectory()
        config = dict(
            architectures=["LlamaGen"], model_type="llama", vocab_size=c.vocab_size,
            hidden_size=self.rows * c.dim, num_attention_heads=self.rows * c.n_head,
            num_key_value_heads=self.rows * (c.n_kv_head or c.n_head), head_dim=kernel_width(c),
            num_hidden_layers=c.n_layer, intermediate_size=gpt.layers[0].feed_forward.w1.out_features,
            max_position_embeddings=len(gpt.rope), llamagen=about)
        (Path(self.folder.name) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        self.announce(settings.get("tensor_parallel_size", 1))
        register()
        with explained("vLLM does not start", "is there memory for its caches and weights?",
                       (ValueError, RuntimeError)):
            self.llm = vllm.LLM(self.folder.name, load_format="llamagen", skip_tokenizer_init=True,
                                generation_config="vllm", max_model_len=len(gpt.rope), dtype=dtype,
                                enable_prompt_embeds=text, disable_log_stats=True,
                                # A prompt read in parts winds its seed back, which a CPU's cannot.
                                **{"enable_chunked_prefill": gpt.rope.device.type != "cpu"} | settings)

    def announce(self, parts):
        """Let the processes of further GPUs find `register`: vLLM asks every installed package for plugins,
        and a folder with this file in it, on Python's path, counts as one."""
        if parts == 1:
            return
        package = Path(self.folder.name) / "llamagen_vllm-1.dist-info"
        package.mkdir()
        for name, words in (("METADATA", "Metadata-Version: 2.1\nName: llamagen-vllm\nVersion: 1\n"),
                            ("entry_points.txt", "[vllm.general_plugins]\nllamagen = serve_vllm:register\n")):
            (package / name).write_text(words, encoding="utf-8")
        sys.path += [self.folder.name, str(Path(__file__).absolute().parent)]   # its processes get a copy
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"    # set_guidance goes there as a function

    def close(self):
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        self.folder.cleanup()
        gc.collect()


def embed_captions(engine, cond, cond_mask):
    """Features (B, L, E) and which are words (B, L) to vLLM's embeddings (B, L, R D), zeros for padding."""
    with torch.no_grad():
        both = [cond, engine.embed.null(cond)][:engine.rows]
        x = torch.cat([engine.embed(features.to(engine.dtype)) for features in both], dim=-1)
    return x if cond_mask is None else x.masked_fill(~cond_mask.bool()[..., None], 0)


def generate(engine, cond, cond_mask=None, cfg_scale=1.0, cfg_interval=-1, temperature=1.0, top_k=0,
             top_p=1.0, prefix=None, generator=None, cfg_schedule="constant", jacobi=1):
    """sample.generate, drawn by vLLM: tokens (B, N) from class ids (B,) or features (B, L, E). A picture's
    random numbers are vLLM's own, from a seed that the generator gives: other pictures, equally likely.
    cfg_schedule and jacobi are not heeded: get_args refuses their flags."""
    V, N, B = engine.config.vocab_size, engine.config.block_size, len(cond)
    if cfg_scale != 1 and engine.rows == 1:
        raise InputError(f"cfg_scale {cfg_scale}: this engine was started without guidance")
    if prefix is not None and engine.embed is not None:
        raise InputError("prefix: vLLM completes pictures of classes only, not of captions")
    P = 0 if prefix is None else check_tensor("prefix", prefix, (B, "P"), prefix.device, V, most=N - 1)
    engine.llm.apply_model(partial(set_guidance, cfg_scale, cfg_interval if cfg_interval > -1 else N))
    if engine.embed is None:
        start = V + cond[:, None] if prefix is None else torch.cat([V + cond[:, None], prefix], dim=1)
        prompts = [{"prompt_token_ids": ids} for ids in start.tolist()]
    else:
        prompts = [{"prompt_embeds": x} for x in embed_captions(engine, cond, cond_mask).cpu()]
    # Each picture has a seed of its own, or equal classes would be equal pictures; the likeliest needs none.
    seeds = [None] * B if top_k == 1 or temperature == 0 else torch.randint(
        2 ** 62, (B,), generator=generator, device=generator.device if generator else None).tolist()
    settings = [vllm.SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
                                    max_tokens=N - P, ignore_eos=True, detokenize=False) for seed in seeds]
    drawn = engine.llm.generate(prompts, settings, use_tqdm=False)
    tokens = torch.tensor([request.outputs[0].token_ids for request in drawn], device=cond.device)
    return tokens if prefix is None else torch.cat([prefix, tokens], dim=1)


# ------------------------------------------------------------------------------------------------------------

def get_args(argv=None):
    parser = argparse.ArgumentParser(usage="serve_vllm.py [flags]", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="All other flags are those of sample.py.")
    add = parser.add_argument
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and caches")
    add("--max-num-seqs", type=counting, default=64, help="pictures drawn at the same time")
    add("--tensor-parallel-size", type=counting, default=1, help="GPUs that share each matrix")
    add("--cache-gb", type=counting, default=4, help="memory for the caches, on a CPU")
    ours, rest = parser.parse_known_args(argv)
    args = sample.get_args(rest)
    if args.int8 or args.bf16:
        raise InputError("--int8 and --bf16 are sample.py's own: with vLLM use --dtype bfloat16")
    if args.cfg_schedule != "constant" or args.jacobi > 1:
        raise InputError("--cfg-schedule and --jacobi are sample.py's own: vLLM has neither")
    return argparse.Namespace(**vars(args), **vars(ours))


def start(gpt, args):
    """sample.ready for vLLM: the GPT as an Engine."""
    if gpt.neighbours:
        raise InputError(f"{args.gpt} draws by neighbours, vLLM one token after the other: use sample.py")
    if gpt.rope.device.type == "cpu":
        if args.cache_gb * 2 ** 30 > free_memory(gpt.rope.device):
            raise InputError(f"--cache-gb {args.cache_gb} is more memory than is free")
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(args.cache_gb)
    return Engine(gpt, args.gpt, args.image_size, args.cfg_scale != 1, args.dtype,
                  enforce_eager=not args.compile, max_num_seqs=args.max_num_seqs,
                  tensor_parallel_size=args.tensor_parallel_size)


def main(args):
    # sample.py from end to end; only what makes a GPT ready to draw, and what draws, are vLLM's.
    sample.ready, sample.generate = start, generate
    sample.main(args)


if __name__ == "__main__":
    run(main, get_args)
