"""What a training run needs: flags, going on after an end, one device or many, clock, log and saves; and, by
arithmetic, what the paper's sizes need.

    torchrun starts W processes, one for each device. Each has its part of every batch:
        rows r B/W .. (r + 1) B/W - 1 -> forward -> backward -> mean of the gradients over all W -> one step
    data parallel (DDP): each has all weights;  sharded (FSDP2, --shard): each has 1/W of the weights, their
    gradients and the optimizer's state, and collects the weights of a block only while it runs

Letters: W processes, B pictures of a batch, M of a data set, K crops of each, S tokens of a sequence, N of a
         picture, D channels, F hidden channels, V vocabulary, P weights.
Paper:   data parallel (Li 2020), fully sharded (Zhao 2023), activation checkpointing (Chen 2016).
Run:     torchrun --nproc-per-node=2 train_gpt.py --device cpu     # the same flags; --shard
         python training.py                                      # memory and days of the paper's sizes
"""
import json
import math
import os
import re
import shutil
import signal
import sys
import textwrap
import time
from argparse import BooleanOptionalAction
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

import torch
import torch.distributed.checkpoint as sharded_files
import torch.nn as nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_state_dict,
                                                     set_model_state_dict, set_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (FSDPModule, MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from files import warning
from model import GPT, GPT_SIZES, GPTConfig
from runs import (DEVICE_HELP, InputError, alone, check_output, counting, explained, fast_dtype, gathered,
                  largest, mixed_precision, natural, on_signals, patient_group, positive, rank_and_world,
                  read_checkpoint, share, summed, wait_for_all, whole_file)


# ------------------------------------------------------------------------------------------------------------
# Flags, and what is to be gone on from

def add_training_flags(parser, out, minutes):
    """The flags that train_vq.py and train_gpt.py share. out, minutes: each script's own defaults."""
    add = parser.add_argument_group("data and files").add_argument
    add("--data", default="shapes", help="shapes, fashion_mnist, mnist, cifar10; a folder, .jsonl or .tar")
    add("--data-dir", help="where to look for the data set's files first")
    add("--limit", type=counting, help="use only so many pictures of each split")
    add("--cond", default="class", choices=("class", "text"), help="what a picture has: class or caption")
    add("--flip", action=BooleanOptionalAction, help="mirror images too; left out: if no captions")
    add("--out", default=out, help="the checkpoint; its log and preview are written beside it")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    group = parser.add_argument_group("how long and where")
    add, length = group.add_argument, group.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=positive, default=minutes, help="fit training into this time")
    length.add_argument("--steps", type=counting, help="train for this many steps instead")
    add("--device", help=DEVICE_HELP)
    add("--seed", type=natural, default=0, help="of weights, order of the data and dropout")
    add("--compile", action="store_true", help="compile forward and backward: slow start, faster steps")
    add("--shard", action="store_true", help="under torchrun: weights in parts, one on each GPU (FSDP2)")
    add("--checkpoint-activations", action="store_true", help="compute them again in the backward pass")
    add("--eval-every", type=counting, default=500, help="steps between looks at the model, and saves")
    add("--save-minutes", type=positive, default=10.0, help="most minutes between saves")
    add("--log-every", type=counting, default=20, help="steps between lines of the log")
    add = parser.add_argument_group("optimisation").add_argument
    add("--lr-final", type=share, default=0.02, help="end of the cosine as a share of --lr; 1: constant")
    add("--clip", type=positive, default=1.0, help="largest norm of the gradient")
    add("--ema", type=share, default=0.995, help="decay of the averaged weights that are saved; 0: off")


# Only these flags may change between a run and its resume: they say how long (which the learning rate
# follows), where and how fast it runs, where its files lie, what is shown on the way; not what is learnt. (A
# tokenizer is known by the hash of its weights.)
MAY_CHANGE = {"out", "resume", "minutes", "steps", "device", "compile", "eval_every", "save_minutes", "shard",
              "checkpoint_activations", "log_every", "data_dir", "vq", "vgg", "lpips", "live_features",
              "cfg_scale", "temperature"}


def batch_of(args, count):
    """The pictures of a step: --batch-size, or as many of all `count` as can be shared out evenly."""
    _, world = rank_and_world()
    batch_size = min(args.batch_size, count) // world * world
    if args.batch_size % world or not batch_size:
        raise InputError(f"--batch-size {args.batch_size} with {count:,} pictures cannot be shared out among "
                         f"{world} processes: it has to be a multiple of {world}, with a picture for each")
    return batch_size


def resume_state(args, *needed):
    """The checkpoint in --out with everything needed to go on (`needed`: what only this script's have), or
    None for a fresh run. InputError names the flag that differs from that run's."""
    _, world = rank_and_world()
    batch_of(args, args.batch_size)
    if args.shard and world == 1:
        raise InputError("--shard shares the weights out among processes: start it with torchrun")
    # --init may be --out itself: a copy of that is kept, as NAME.previous.
    also = [args.out[:-3] + end for end in (".jsonl", ".new.jsonl", ".png", ".previous.pt", ".backup.pt")]
    reads = [v for name, v in vars(args).items() if isinstance(v, str) and name != "out" and
             not (name == "init" and v == args.out)]
    out = check_output(args.out, (".pt",), reads=reads, also=also)
    if Path(args.data).is_dir() and Path(args.data).resolve() in out.resolve().parents:
        raise InputError(f"--out {out} lies in the folder of --data, where its preview would be a picture")
    if not args.resume:
        return None
    state = read_newest(out)
    if not {"config", "started", "random", *needed} <= state.keys() or not {"raw", "parts"} & state.keys():
        raise InputError(f"{args.out} has no complete state to go on from: it was not written by this "
                         "script, or by an older version of it")
    if "raw" not in state and not (shards(out) / state["parts"] / ".metadata").is_file():
        raise InputError(f"{args.out} was saved in parts, and {shards(out) / state['parts']} lacks them")
    for name, now in vars(args).items():
        before = state["args"].get(name, now)            # missing: a flag that is newer than the checkpoint
        same = now == before or {type(now), type(before)} == {str} and (
            Path(now).resolve() == Path(before).resolve())       # --data ./x/ and --data x
        if not same and name not in MAY_CHANGE:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{args.out} was trained with other settings, {flag} {before} instead of {now}: "
                             f"resume with that run's flags")
    return state


def shards(path):
    """The folder for the parts of checkpoints that are saved with --shard, a folder each."""
    return Path(path).with_suffix(".shards")


def read_newest(path):
    """The checkpoint, or, if that cannot be read, the one before it, with "damaged"."""
    backup, mmap = path.with_suffix(".backup.pt"), rank_and_world()[1] > 1       # of many, none holds a copy
    try:
        return read_checkpoint(path, mmap)
    except InputError as error:
        if not backup.exists():
            raise
        warning(f"{error}. Going on from {backup}, the save before it")
        return read_checkpoint(backup, mmap) | {"damaged": True}


def check_same_data(args, state, identity):
    """Refuse to go on with other data than before. identity: a dict of what the data are known by; given
    back, for the next checkpoint."""
    for name, now in identity.items():
        before = (state or {}).get("data", {}).get(name, now)    # missing: the checkpoint is older
        if before != now:
            before, now = (textwrap.shorten(str(value), 80) for value in (before, now))
            raise InputError(f"{args.out} was trained on other data, {name} {before} instead of {now}: go on "
                             "with the same, or start anew without --resume")
    return identity


# ------------------------------------------------------------------------------------------------------------
# Networks, on one device or on many

def shard(net, blocks, device):
    """Give each process 1 / W of every weight of `net`, in place. A block's weights are collected, in bf16
    where the device has it, when it comes to run, and given back after it; what is not in a block stays in
    float32, as do the weights that are learnt and the sums of the gradients."""
    patient_group()
    mesh = init_device_mesh(device.type, (rank_and_world()[1],))
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(
            fast_dtype(device), torch.float32, cast_forward_inputs=False))
    fully_shard(net, mesh=mesh)
    if hasattr(net, "encode"):                           # which restart_dead_codes calls beside forward
        register_fsdp_forward_method(net, "encode")


def prepare(nets, best, blocks, args, device):
    """What to call in place of each of `nets`, a ModuleDict, while it learns; best: their averages, or nets.
    blocks(net): the parts of one that can be run, sharded and computed again by themselves, a list."""
    forwards, world = {}, rank_and_world()[1]
    for net in dict.fromkeys([*nets.values(), *best.values()] if args.shard else []):
        shard(net, blocks(net), device)
    for name, net in nets.items():
        for block in blocks(net) if args.checkpoint_activations else []:
            # What a block computes is forgotten, and computed again, alike, when the gradient comes by.
            again = mixed_precision(device)(block.forward)
            block.forward = partial(checkpoint, again, use_reentrant=False)
        forwards[name] = torch.compile(net) if args.compile else net
        if world > 1 and not args.shard:
            patient_group()
            # No buffers are sent: a discriminator's batch statistics stay those of each process.
            forwards[name] = DistributedDataParallel(
                forwards[name], device_ids=[device] if device.type == "cuda" else None,
                forward_sync_buffers=False, gradient_as_bucket_view=True)
    return forwards


@contextmanager
def exchange(forwards, now):
    """In this block's backward pass gradients are averaged over all processes, or, if not now, only added up
    in each: of the batches that make one step, the last one is enough."""
    with ExitStack() as stack:
        for forward in forwards:
            if isinstance(forward, DistributedDataParallel) and not now:
                stack.enter_context(forward.no_sync())
            elif isinstance(net := getattr(forward, "_orig_mod", forward), FSDPModule):
                net.set_requires_gradient_sync(now)
        yield


@contextmanager
def aside(net, device):
    """For a call of one of its methods in between, which no backward pass follows. Sharded, its blocks may be
    in bf16, so their input is, too."""
    sharded = isinstance(net, FSDPModule)
    with mixed_precision(device) if sharded else nullcontext():
        yield
    if sharded:
        net.reshard()


def whole(tensor):
    """All of a tensor of which each process has a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def put(values, tensor):
    """Overwrite a tensor, or the part of it that this process has."""
    if isinstance(tensor, DTensor):
        values = distribute_tensor(values, tensor.device_mesh, tensor.placements)
    tensor.copy_(values)


def clip_gradients(net, most):
    """Scale the gradients so that together they are at most so long; how long they were."""
    return whole(nn.utils.clip_grad_norm_(net.parameters(), most))


# ------------------------------------------------------------------------------------------------------------
# Clock, bar, log and saves

def step_of(line):
    """The step of a line of the log; of one that was cut off, none."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


class Progress:
    """Where a run stands. state: the checkpoint it goes on from, or None for a fresh run.

    Ctrl-C, SIGTERM and SIGHUP let the step in progress end, so what is saved is a whole state. The log is
    NAME.jsonl beside the checkpoint NAME.pt, one JSON object a line. A fresh run writes NAME.new.jsonl until
    its first save: only then do the log, preview and checkpoint that were there become NAME.previous. Later
    saves keep the one before as NAME.backup.pt. All processes of a run have a Progress, the first one writes.
    """

    def __init__(self, args, device, state):
        self.args, self.device, self.fresh = args, device, state is None
        self.asked = self.interrupted = False    # to stop: this process; and what all have agreed on
        self.step, seconds = (state["step"], state["seconds"]) if state else (0, 0.0)
        self.rank, self.world = rank_and_world()
        # The random numbers of the CPU and those of the device are two streams, each process has its own.
        self.streams = {"cpu": torch} | {kind: getattr(torch, kind) for kind in {device.type} - {"cpu"}}
        random = state["random"] if state else []
        if self.rank < len(random):
            for kind in self.streams.keys() & random[self.rank].keys():
                self.streams[kind].set_rng_state(random[self.rank][kind])
        elif self.rank > 0:
            torch.manual_seed(hash((args.seed, self.rank, self.step)))
        self.path = Path(args.out)
        self.log_path, self.backup = self.path.with_suffix(".jsonl"), self.path.with_suffix(".backup.pt")
        self.new_log = self.log_path.with_suffix(".new.jsonl")
        self.first, self.started = self.step, time.perf_counter() - seconds
        self.now = self.saved_at = seconds       # the time that all processes agree on; that of the last save
        self.last_saved = self.step if state else None
        self.damaged = bool(state and state.get("damaged"))      # what lies at --out
        self.begin_stretch()

    def __enter__(self):
        self.ending = ExitStack()
        self.ending.enter_context(alone(self.path))
        self.ending.enter_context(on_signals(self.interrupt))
        if self.rank == 0:
            self.tidy()
        self.bar = self.ending.enter_context(tqdm(total=self.args.steps, initial=self.step, unit=" steps",
                                                  disable=self.rank > 0))
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            wait_for_all()                       # the first one may still draw or evaluate
        self.ending.close()
        if kind is None and self.interrupted:
            sys.exit(f"interrupted; step {self.step} is saved: the same flags and --resume go on from it"
                     if self.rank == 0 else 1)

    def tidy(self):
        """Take away what a killed run left: half-written files, lines of the log from after its last save."""
        ours = re.compile(re.escape(self.path.stem) + r"(\.previous|\.backup)?\.\d+\.partial\.(pt|png|jsonl)")
        for file in self.path.parent.iterdir():
            if ours.fullmatch(file.name):
                file.unlink()
        self.remove_parts()
        if self.fresh:
            self.new_log.write_bytes(b"")
        elif self.log_path.exists():
            lines = self.log_path.read_text(encoding="utf-8").splitlines(keepends=True)
            while lines and step_of(lines[-1]) > self.step:
                lines.pop()
            with whole_file(self.log_path) as partial:
                partial.write_text("".join(lines), encoding="utf-8")

    def interrupt(self, number, _):
        # A second Ctrl-C stops at once; torchrun passes on the first one to processes that have had it.
        if self.asked and number == signal.SIGINT and self.world == 1:
            raise KeyboardInterrupt
        self.asked = True

    def running(self):
        """Whether there is a step to come."""
        self.now, self.interrupted = largest(self.seconds(), self.asked)
        return not self.interrupted and self.fraction() < 1

    def fraction(self):
        """0 at the start, 1 at the end, by steps or by minutes."""
        return self.step / self.args.steps if self.args.steps else self.now / (60 * self.args.minutes)

    def save_is_due(self):
        """By steps and by the clock, so that slow steps do not mean a lost hour."""
        return (self.step % self.args.eval_every == 0 or
                self.now - self.saved_at >= 60 * self.args.save_minutes)

    def seconds(self):
        return time.perf_counter() - self.started

    def begin_stretch(self):
        """From here on numbers are added up, until `means` asks for them."""
        self.since, self.since_seconds, self.sums, self.waited = self.step, self.seconds(), {}, 0.0
        self.good = torch.zeros((), dtype=torch.int64, device=self.device)

    def next_of(self, batches):
        """The next batch. What share of the time the process waited for them is in the log, as data_wait."""
        start = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - start
        return batch

    def count(self, numbers):
        """A step is over. numbers, a dict of scalar tensors, are added up where they are: nothing waits."""
        for name, value in numbers.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
        if self.args.compile and self.step == self.first:
            self.started += self.seconds() - self.since_seconds  # compiling is not training
        # A sum that is NaN or infinite stays so: this counts the steps before the first bad one.
        self.good += torch.stack(list(self.sums.values())).isfinite().all()
        self.step += 1
        self.bar.update()

    def check(self):
        """End the run if its numbers are no longer finite, before anything uses them or is saved."""
        bad = self.since + int(self.good) + 1
        if bad <= self.step:
            self.give_up(bad, "the loss or its gradient")

    def give_up(self, step, what):
        raise InputError(f"step {step}: {what} is NaN or infinite, so the run ends. {self.path} stays as it "
                         "was last saved; try a lower --lr")

    def means(self):
        """The mean of each number since the last call (steps without it count as 0), and the steps per
        second. Apart from evaluating and saving, this is where the CPU waits for the device."""
        self.check()
        steps = self.step - self.since
        values = (summed(torch.stack(list(self.sums.values()))) / (steps * self.world)).tolist()
        seconds = self.seconds() - self.since_seconds
        means = dict(zip(self.sums, values), data_wait=self.waited / seconds,
                     steps_per_second=steps / seconds)
        self.begin_stretch()
        return means

    def log(self, **values):
        """Add a line to the log: step, seconds and these."""
        values = {"step": self.step, "seconds": self.seconds(), **values}
        rounded = {name: float(f"{v:.8g}") if isinstance(v, float) else v for name, v in values.items()}
        path = self.new_log if self.fresh else self.log_path
        if self.rank == 0:
            with explained(f"{path} cannot be written", "is there room on the disk?", OSError):
                with open(path, "a", encoding="utf-8") as file:
                    print(json.dumps(rounded), file=file)

    def save(self, raw, optimizer, **contents):
        """Write the checkpoint: raw and optimizer, all that training has changed, and contents. What it takes
        to go on from here is added. With --shard every process writes its part of the first two."""
        self.check()
        parts = [part.to_local() if isinstance(part, DTensor) else part for part in raw.values()]
        if any(largest(not torch.stack([part.isfinite().all() for part in parts]).all())):
            self.give_up(self.step, "a weight")
        contents |= dict(step=self.step, seconds=self.seconds(), args=vars(self.args), random=gathered(
            {kind: stream.get_rng_state() for kind, stream in self.streams.items()}))
        if self.args.shard:
            contents["parts"] = gathered(f"{self.step:09}-{os.urandom(4).hex()}")[0]     # the first one's
            folder = shards(self.path) / contents["parts"]
            with explained(f"{folder} cannot be written", "is there room on the disk?", CheckpointException):
                sharded_files.save(dict(raw=raw, optimizer=optimizer), checkpoint_id=folder,
                                   process_group=patient_group())
        else:
            contents |= dict(raw=raw, optimizer=optimizer)
        if self.rank == 0:
            if self.step != self.last_saved:     # at the end of a run a step may be saved a second time
                self.keep()
            with whole_file(self.path, (OSError, RuntimeError)) as partial:      # torch.save's is the second
                torch.save(contents, partial)
                if self.fresh:
                    self.backup.unlink(missing_ok=True)          # that of the run before
                    self.new_log.replace(self.log_path)
            self.remove_parts()
        self.fresh, self.damaged, self.last_saved = False, False, self.step
        self.saved_at, = largest(self.seconds())

    def keep(self):
        """Give what is there a second name, before its name goes to the next: at no moment is there none."""
        old = (self.path, self.log_path, self.path.with_suffix(".png")) if self.fresh else (self.path,)
        for file in filter(Path.exists, () if self.damaged else old):
            second = file.with_suffix(f".{'previous' if self.fresh else 'backup'}{file.suffix}")
            with whole_file(second) as partial:
                try:
                    os.link(file, partial)
                except OSError:                                  # a file system without links
                    shutil.copyfile(file, partial)

    def remove_parts(self):
        """Take away the parts that no checkpoint names; none if there is one that cannot be read."""
        files = filter(Path.exists, (self.path, self.backup, self.path.with_suffix(".previous.pt")))
        with suppress(InputError):
            named = [read_checkpoint(file, mmap=True).get("parts") for file in files]
            for folder in shards(self.path).glob("*-*"):
                if folder.name not in named:
                    shutil.rmtree(folder, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------
# The state of a training, whole or in parts

def whole_weights(net, args):
    """The state dict of `net` for a file that anyone can read; complete in the first process only."""
    if not args.shard:
        return net.state_dict()
    return get_model_state_dict(net, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def put_weights(weights, net, args):
    """Fill `net` from a state dict that whole_weights gave."""
    set_model_state_dict(net, weights, options=StateDictOptions(full_state_dict=args.shard))


def training_state(nets, optimizers):
    """For Progress.save: raw, the weights; optimizer, the state of those that have made a step (`started`),
    by the names of the weights, so that it fits whatever they are sharded into."""
    raw, optimizer = get_state_dict(nets, [optimizer for optimizer in optimizers if optimizer.state])
    return dict(raw=raw, optimizer=optimizer, started=[bool(optimizer.state) for optimizer in optimizers])


def restore(nets, optimizers, state, args):
    """Put back what training_state gave, from a checkpoint's `state`, which loses it, or from its shards,
    whether this run is sharded or not, in as many parts or in others."""
    started = [optimizer for optimizer, has in zip(optimizers, state["started"]) if has]
    one_file = "raw" in state
    if one_file:
        raw, optimizer = state.pop("raw"), state.pop("optimizer")
    else:
        raw, optimizer = get_state_dict(nets, started)           # of the right shapes, to be overwritten
        folder, world = shards(args.out) / state["parts"], rank_and_world()[1]
        with explained(f"{folder} cannot be read", f"copy {args.out[:-3]}.backup.pt, the save before, over "
                       f"{args.out}", CheckpointException):
            sharded_files.load(dict(raw=raw, optimizer=optimizer), checkpoint_id=folder, no_dist=world == 1,
                               process_group=patient_group() if world > 1 else None)
    set_state_dict(nets, started, model_state_dict=raw, optim_state_dict=optimizer,
                   options=StateDictOptions(full_state_dict=one_file and args.shard))


# ------------------------------------------------------------------------------------------------------------
# On paper: what a GPT of some size needs. gpt: one on the "meta" device, which has shapes and no memory

A100 = 312e12              # multiplications and additions of bf16 numbers a second, by its data sheet


def sizes(gpt):
    """Number of weights: all, those of one block, those that are multiplied: rows of embeddings are not."""
    count = lambda net: sum(weight.numel() for weight in net.parameters())
    return count(gpt), count(gpt.layers[0]), len(gpt.layers) * count(gpt.layers[0]) + count(gpt.output)


def activation_bytes(gpt, pictures, checkpointed=False):
    """What the forward pass keeps for the backward pass, in bf16 autocast, without dropout.

    A block, of one token: of each of the two norms its input, the result before the gain (float32, 4 D each)
    and the matrix's input (bf16, 2 D); what wqkv gives, of which v is a part (6 D), q and k turned (4 D), and
    what attention gives (2 D); w1 x, w3 x, silu(w1 x) and their product (2 F each). checkpointed: of a block
    its input alone, and all of one. At the end, of one token: the norm's 10 D, the logits (2 V).
    """
    D, F = gpt.config.dim, gpt.layers[0].feed_forward.w1.out_features
    block, layers = 32 * D + 8 * F, len(gpt.layers)
    per_token = 4 * D * layers + block if checkpointed else block * layers
    S, N = gpt.rope.shape[0] - 1, gpt.config.block_size          # the last token is not an input
    return pictures * (S * per_token + N * (10 * D + 2 * gpt.config.vocab_size))


def memory(gpt, pictures, parts=1, checkpointed=False, ema=False):
    """Bytes on each GPU with `pictures` of the batch on it, AdamW, and 1 / parts of the state (DDP: 1)."""
    P, block, _ = sizes(gpt)
    root = P - len(gpt.layers) * block                   # embeddings, output
    # Beside its part of all: in bf16 the weights of this block and of the next, and in float32 the gradients
    # of the one that is being summed up, the root and its gradients; or, in bf16, all weights, which autocast
    # keeps. Of the logits two gradients in bf16: of the blocks of rows, and those together.
    working = (4 * block + 4 * block + 8 * root if parts > 1 else 2 * P) + (
        4 * pictures * gpt.config.block_size * gpt.config.vocab_size)
    return {"weights": 4 * P / parts, "gradients": 4 * P / parts, "optimizer": 8 * P / parts,
            "average": 4 * P / parts * ema, "working copies": working,
            "activations": activation_bytes(gpt, pictures, checkpointed)}


def training_flops(gpt, pictures):
    """Multiplications and additions to learn from so many pictures: 2 for each weight and token forward, and
    twice that backward; attention has 2 products of S x S / 2 (causal) x D in each layer."""
    S, c = gpt.rope.shape[0] - 1, gpt.config
    return 3 * pictures * (2 * sizes(gpt)[2] * S + 2 * 2 * S * S / 2 * c.dim * len(gpt.layers))


def table():
    """The lines of the README's table."""
    yield "GB on each GPU: batch 256, 256 tokens, AdamW, --ema 0 (in brackets with --checkpoint-activations)"
    yield "size     weights  DDP on 8       --shard on 8   on 32         300 epochs  8 at 40 %  authors  used"
    for name, gpus, days in (("GPT-B", 8, 1), ("GPT-L", 8, 2), ("GPT-XL", 16, 3), ("GPT-XXL", 32, 4),
                             ("GPT-3B", 32, 5)):
        with torch.device("meta"):
            gpt = GPT(GPTConfig(**GPT_SIZES[name]))
        total = lambda W, parts, less: sum(memory(gpt, 256 / W, parts, less).values()) / 1e9
        need = [f"{total(W, parts, False):5.1f} ({total(W, parts, True):5.1f})"
                for W, parts in ((8, 1), (8, 8), (32, 32))]
        flops, day = training_flops(gpt, 300 * 1_281_167), 86400 * A100
        yield (f"{name:8} {sizes(gpt)[0] / 1e6:5,.0f}M  {'  '.join(need)}  {flops / 1e18:6,.0f} EFLOP "
               f"{flops / (8 * 0.4 * day):5.1f} days  {gpus:2} x {days} d  {flops / (gpus * days * day):.0%}")
    for name, M, K in (("ImageNet", 1_281_167, 10), ("ImageNet", 1_281_167, 20), ("LAION", 50_000_000, 1)):
        yield f"codes of {name}: {M:,} x {K} crops x 256 tokens x 2 bytes = {M * K * 512 / 1e9:.1f} GB"


if __name__ == "__main__":
    print(*table(), sep="\n")
