"""What a run needs, whatever it trains, draws or measures. Nothing about pictures or networks is in here.

    errors -> flags -> device, processes, long jobs -> precision, schedule -> a training run -> weights

The sections stand in the order in which a run comes to them. Every command ends in `run(main, get_args)`.
"""
import argparse
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import time
import zipfile
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm


# ------------------------------------------------------------------------------------------------------------
# Errors: what the user can mend is one clear line; everything else is a bug and keeps its traceback

class InputError(ValueError):
    """The user gave something unusable: the message says what, and what to do about it."""


@contextmanager
def explained(what, cure="", kinds=Exception):
    """Turn whatever the block raises (kinds: only these) into one line: "what (reason): cure". Readers of
    foreign files raise almost anything. InputErrors pass as they are."""
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        reason = textwrap.shorten(str(error), 300) or type(error).__name__
        raise InputError(f"{what} ({reason})" + (f": {cure}" if cure else "")) from None


def run(main, get_args):
    """Run a command; what the user can mend is told in one line, with exit status 1."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):       # a terminal without UTF-8 gets \\xe9 instead of an error
            stream.reconfigure(errors="backslashreplace")
    try:
        with on_signals(signal.default_int_handler):
            main(get_args())
    except (InputError, OSError, MemoryError) as error:          # OSError: no permission, no such folder
        sys.exit(f"error: {error or 'not enough memory'}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


@contextmanager
def on_signals(handler):
    """In this block handler is called on Ctrl-C, on kill or a cluster's time limit (SIGTERM), and when the
    terminal closes (SIGHUP), but for those that nohup has switched off. Only a main thread may set handlers:
    in others, as of a web server, none are."""
    main = threading.current_thread() is threading.main_thread()
    known = {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal)) if main else ()         # Windows has no SIGHUP
    before = {number: signal.signal(number, handler) for number in (getattr(signal, name) for name in known)
              if number == signal.SIGINT or signal.getsignal(number) not in (None, signal.SIG_IGN)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


# ------------------------------------------------------------------------------------------------------------
# Flags, and arguments from Python

def number(kind, words, fits):
    """An argparse type: a finite number of this kind for which fits(number) holds; words describe those."""
    def parse(text):
        value = kind(text)
        if kind is int and abs(value) >= 2 ** 63:        # torch and NumPy count in 64 bits
            raise argparse.ArgumentTypeError(f"{text} is too large: it has to be within 64 bits")
        if not (math.isfinite(value) and fits(value)):
            raise argparse.ArgumentTypeError(f"{text} is not {words}")
        return value
    parse.__name__ = kind.__name__                       # argparse: "invalid float value: 'x'"
    return parse


natural = number(int, "0 or more", lambda n: n >= 0)
counting = number(int, "above zero", lambda n: n > 0)
positive = number(float, "above zero", lambda x: x > 0)
not_negative = number(float, "0 or more", lambda x: x >= 0)
finite = number(float, "a finite number", lambda x: True)
share = number(float, "between 0 and 1", lambda x: 0 <= x <= 1)


def check_tensor(name, x, shape, device=None, ids=None, wait=False, most=math.inf):
    """InputError unless x is a tensor of this shape (a letter: any size; the last at most `most`), on this
    device and, with ids, of integers from 0 to ids - 1; returns its last size. Values are looked at on the
    CPU only: for a GPU's it would have to wait, and a compiled graph would break. wait: wait for them."""
    if not (torch.is_tensor(x) and x.ndim == len(shape) and device in (None, x.device) and
            all(n == size or isinstance(n, str) for n, size in zip(shape, x.shape)) and
            x.shape[-1] <= most and (ids is None or x.dtype in (torch.int64, torch.int32))):
        found = f"{x.dtype} {tuple(x.shape)} on {x.device}" if torch.is_tensor(x) else type(x).__name__
        raise InputError(f"{name} is {found}: it has to be {'int64' if ids else 'a tensor'} of shape "
                         f"({', '.join(map(str, shape))})" + (f" on {device}" if device else "") +
                         (f", at most {most} long" if most < math.inf else ""))
    seen = ids and x.numel() and not torch.compiler.is_compiling() and (wait or x.device.type == "cpu")
    if seen and not 0 <= x.min() <= x.max() < ids:
        raise InputError(f"{name} holds {x.min()} to {x.max()}: it has to be from 0 to {ids - 1}")
    return x.shape[-1]


def check_compile(args, device):
    """Compile a small function: if --compile cannot work here, the run ends now and not at its first step."""
    if args.compile:
        with explained("--compile does not work here", "leave it out, or install a C++ compiler such as g++"):
            torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))


def flag_parser(file, doc):
    """An ArgumentParser that answers a wrong flag with two lines instead of with all flags there are."""
    return argparse.ArgumentParser(Path(file).name, usage="%(prog)s [flags]; --help explains them",
                                   description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


DEVICE_HELP = "cuda, mps or cpu; the best one present if left out"


def add_training_flags(parser, out, minutes):
    """The flags that train_vq.py and train_gpt.py share. out, minutes: each script's own defaults."""
    add = parser.add_argument_group("data and files").add_argument
    add("--data", default="shapes", help="shapes, fashion_mnist, mnist, cifar10; a folder, .jsonl or .tar")
    add("--data-dir", help="where to look for the data set's files first")
    add("--limit", type=counting, help="use only so many pictures of each split")
    add("--cond", default="class", choices=("class", "text"), help="what a picture has: class or caption")
    add("--out", default=out, help="the checkpoint; its log and preview are written beside it")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    group = parser.add_argument_group("how long and where")
    add, length = group.add_argument, group.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=positive, default=minutes, help="fit training into this time")
    length.add_argument("--steps", type=counting, help="train for this many steps instead")
    add("--device", help=DEVICE_HELP)
    add("--seed", type=natural, default=0, help="of weights, order of the data and dropout")
    add("--compile", action="store_true", help="compile forward and backward: slow start, faster steps")
    add("--eval-every", type=counting, default=500, help="steps between checkpoints")
    add("--log-every", type=counting, default=20, help="steps between lines of the log")
    add = parser.add_argument_group("optimisation").add_argument
    add("--lr-final", type=share, default=0.02, help="end of the cosine as a share of --lr; 1: constant")
    add("--clip", type=positive, default=1.0, help="largest norm of the gradient")
    add("--ema", type=share, default=0.995, help="decay of the averaged weights that are saved; 0: off")


# ------------------------------------------------------------------------------------------------------------
# Device, processes, and long jobs that lose nothing when they are killed

def pick_device(name):
    """The device asked for, or the best one present; under torchrun, each process its own GPU."""
    local = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    best = local if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    cure = "use another one, and under torchrun at most one process for each GPU"
    with explained(f"--device {name or best} is not usable here", cure, (RuntimeError, AssertionError)):
        device = torch.device(local if name == "cuda" else name or best)
        torch.zeros(1, device=device)
    if device.type == "cuda":
        torch.cuda.set_device(device)                    # for what asks for "the" GPU, such as random states
    return device


def rank_and_world():
    """Which of how many processes this is, as torchrun tells it; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def wait_for_all():
    """Under torchrun: go on when every process has come this far."""
    if rank_and_world()[1] > 1:
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(days=7))   # the slowest may be hours behind
        dist.barrier()


def short_hash(parts):
    """16 hex digits that name these parts, one after another: bytes as they are, all else by its repr."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
    return digest.hexdigest()[:16]


def partial_name(path):
    """Where `path` is written until it is whole; with its ending, by which some writers know the format."""
    return path.with_name(f"{path.stem}.{os.getpid()}.partial{path.suffix}")


@contextmanager
def whole_file(path, kinds=OSError):
    """Gives a temporary name to write to; `path` is its name only when the block has ended well. So a kill
    or a full disk leaves the old file or the new one, never half of one. kinds: what a writer that fails
    raises."""
    path = Path(path)
    partial = partial_name(path)
    try:
        with explained(f"{path} cannot be written", "is there room on the disk?", kinds):
            yield partial
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_output(path, endings=(), flag="--out", reads=(), also=()):
    """Refuse a name that could not be written, or not in the right format, before all work, and one that is,
    or whose companions `also` are, among the files that are read. Makes its folder; returns it as a Path."""
    if os.path.isdir(path) or str(path).endswith(("/", os.sep)):
        raise InputError(f"{flag} {path} is a folder: give the name of a file in it")
    if endings and Path(path).suffix.lower() not in endings:
        raise InputError(f"{flag} {path}: give a name that ends in {' or '.join(endings)}")
    for other in filter(None, reads):
        if Path(other).resolve() in [Path(name).resolve() for name in (path, *also)]:
            raise InputError(f"{flag} {path} would overwrite {other}, which is to be read: give another name")
    with explained(f"{flag} {path} cannot be written", "give another place", OSError):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        partial_name(Path(path)).touch()
        partial_name(Path(path)).unlink()
    return Path(path)


@contextmanager
def alone(path, wait=False):
    """No other command works on `path` in this block: a second one waits for the first, or ends in one line.
    Under torchrun one process holds the lock for all of its job."""
    lock = None
    # Windows has no fcntl; some file systems have no locks, some folders are read-only: all do without.
    with suppress(ImportError, OSError):
        import fcntl                                     # its locks end with their holder, however it ends
        if rank_and_world()[0] == 0:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            while lock is None or not (os.path.exists(lock.name) and os.path.samestat(
                    os.fstat(lock.fileno()), os.stat(lock.name))):       # the holder before takes it away
                lock = open(f"{path}.lock", "a")
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if not wait:
                        raise InputError(f"another run writes {path} now: give another name") from None
                    print(f"another run makes {path}: waiting for it", file=sys.stderr)
                    fcntl.flock(lock, fcntl.LOCK_EX)
    wait_for_all()
    try:
        yield
    finally:
        if lock:
            Path(lock.name).unlink(missing_ok=True)
            lock.close()


class SharedArray:
    """A .npy file that one or several processes fill unit by unit; what is filled survives a kill.

    key    names what the rows depend on: an earlier try is continued only if it had the same key
    units  how many pieces the work has; if left out, each row is one
    mine   the units that this process has to fill, evenly shared out
    rows   the array; write the rows of a unit, then mark done[unit] as DONE or, if it has none, as SKIPPED
    """
    DONE, SKIPPED = 1, 2

    def __init__(self, path, shape, dtype, key, units=None):
        rank, world = rank_and_world()
        self.path = Path(path)
        self.partial = self.path.with_name(f"{self.path.name}.{key}.partial")
        self.flags = self.path.with_name(f"{self.path.name}.{key}.done")
        if rank == 0 and not (self.flags.exists() and self.partial.exists()):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.reserve(shape, np.dtype(dtype))
            with whole_file(self.flags) as name, open(name, "wb") as file:   # last: where flags are, rows are
                np.save(file, np.zeros(units or shape[0], np.uint8))
        wait_for_all()
        self.rows, self.done = (np.load(name, mmap_mode="r+") for name in (self.partial, self.flags))
        # What an earlier try had to skip is tried again: perhaps a disk was away.
        self.mine = np.array_split(np.flatnonzero(self.done != self.DONE), world)[rank]
        wait_for_all()                                           # all know their share before anyone works

    def reserve(self, shape, dtype):
        """Make the empty file with all its room on the disk: where that lacks, writing to a mapped file does
        not raise an error but kills the process."""
        size, free = math.prod(shape) * dtype.itemsize, shutil.disk_usage(self.path.parent).free
        lacking = f"{self.path} needs {size / 1e6:,.1f} MB, {free / 1e6:,.1f} are free"
        cure = "make room, or write to another disk"
        with whole_file(self.partial) as name, explained(lacking, cure, OSError):
            np.lib.format.open_memmap(name, mode="w+", dtype=dtype, shape=shape)
            if hasattr(os, "posix_fallocate"):
                with open(name, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
            elif free < size:
                raise OSError("the disk is full")

    def finish(self):
        """Give the file its name once all processes are done."""
        wait_for_all()
        if rank_and_world()[0] == 0:
            self.partial.replace(self.path)
            self.flags.unlink()
        wait_for_all()


# ------------------------------------------------------------------------------------------------------------
# Precision and schedule

def fast_dtype(device):
    """bf16 where the hardware multiplies it: CUDA cards from Ampere on, CPUs with AMX or AVX-512 BF16. Else
    float32: older cards emulate bf16, slowly, and in their float16 small gradients would vanish."""
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    fast = (able.get("amx_bf16", False) or able.get("avx512_bf16", False) or
            device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.bfloat16 if fast else torch.float32


@contextmanager
def mixed_precision(device):
    """Matrix products in fast_dtype, weights in float32."""
    half = fast_dtype(device) == torch.bfloat16
    # On the CPU, PyTorch's fused attention goes backward 4 times slower in bf16 than in float32, and 2 times
    # slower than the plain formula, which SDPBackend.MATH selects.
    attention = sdpa_kernel(SDPBackend.MATH) if half and device.type == "cpu" else nullcontext()
    with torch.autocast(device.type, torch.bfloat16, enabled=half), attention:
        yield


def learning_rate(peak, step, progress, warmup, final=0.02):
    """Warm-up by steps, then a cosine over `progress` (0 at the start, 1 at the end) down to final * peak;
    final = 1 keeps it constant."""
    if step < warmup:
        return peak * (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * (final + (1 - final) * cosine)


@torch.no_grad()
def update_ema(average, model, decay, step):
    """average <- d average + (1 - d) model. d grows to `decay`: with it from the start, the average would
    remember the random first weights for 1 / (1 - decay) steps."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - d)


# ------------------------------------------------------------------------------------------------------------
# A training run: clock, bar, log, saves, and going on

class Progress:
    """Where a run stands. state: the checkpoint it goes on from, or None for a fresh run.

    Ctrl-C, SIGTERM and SIGHUP let the step in progress end, so what is saved is a whole state. The log is
    NAME.jsonl beside the checkpoint NAME.pt, one JSON object a line. A fresh run writes NAME.new.jsonl until
    its first save: only then do the log, preview and checkpoint that were there become NAME.previous."""

    def __init__(self, args, device, state):
        self.args, self.device, self.fresh, self.interrupted = args, device, state is None, False
        self.step, seconds = (state["step"], state["seconds"]) if state else (0, 0.0)
        # The random numbers of the CPU and those of the device are two streams.
        self.streams = {"cpu": torch} | {kind: getattr(torch, kind) for kind in {device.type} - {"cpu"}}
        for kind in self.streams.keys() & (state or {}).get("random", {}).keys():
            self.streams[kind].set_rng_state(state["random"][kind])
        self.log_path = Path(args.out).with_suffix(".jsonl")
        self.new_log = self.log_path.with_suffix(".new.jsonl")
        self.first, self.started = self.step, time.perf_counter() - seconds
        self.begin_stretch()

    def __enter__(self):
        self.ending = ExitStack()
        self.ending.enter_context(alone(self.args.out))
        self.ending.enter_context(on_signals(self.interrupt))
        if self.fresh:
            self.new_log.write_bytes(b"")
        self.bar = self.ending.enter_context(tqdm(total=self.args.steps, initial=self.step, unit=" steps"))
        return self

    def __exit__(self, kind, *_):
        self.ending.close()
        if kind is None and self.interrupted:
            sys.exit(f"interrupted; step {self.step} is saved: the same flags and --resume go on from it")

    def interrupt(self, number, _):
        if self.interrupted and number == signal.SIGINT:         # a second Ctrl-C stops at once
            raise KeyboardInterrupt
        self.interrupted = True

    def running(self):
        return not self.interrupted and self.fraction() < 1

    def fraction(self):
        """0 at the start, 1 at the end, by steps or by minutes."""
        return self.step / self.args.steps if self.args.steps else self.seconds() / (60 * self.args.minutes)

    def seconds(self):
        return time.perf_counter() - self.started

    def begin_stretch(self):
        """From here on numbers are added up, until `means` asks for them."""
        self.since, self.since_seconds, self.sums = self.step, self.seconds(), {}
        self.good = torch.zeros((), dtype=torch.int64, device=self.device)

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
        raise InputError(f"step {step}: {what} is NaN or infinite, so the run ends. {self.args.out} stays as "
                         "it was last saved; try a lower --lr")

    def means(self):
        """The mean of each number since the last call (steps without it count as 0), and the steps per
        second. Apart from evaluating and saving, this is where the CPU waits for the device."""
        self.check()
        steps = self.step - self.since
        values = (torch.stack(list(self.sums.values())) / steps).tolist()
        means = dict(zip(self.sums, values), steps_per_second=steps / (self.seconds() - self.since_seconds))
        self.begin_stretch()
        return means

    def log(self, **values):
        """Add a line to the log: step, seconds and these."""
        values = {"step": self.step, "seconds": self.seconds(), **values}
        rounded = {name: float(f"{v:.6g}") if isinstance(v, float) else v for name, v in values.items()}
        path = self.new_log if self.fresh else self.log_path
        with explained(f"{path} cannot be written", "is there room on the disk?", OSError):
            with open(path, "a", encoding="utf-8") as file:
                print(json.dumps(rounded), file=file)

    def save(self, **contents):
        """Write the checkpoint: contents, and what else it takes to go on from here."""
        self.check()
        if not all(w.isfinite().all() for name in ("raw", "disc") for w in contents.get(name, {}).values()):
            self.give_up(self.step, "a weight")
        path, random = Path(self.args.out), {kind: s.get_rng_state() for kind, s in self.streams.items()}
        if self.fresh:                       # copies: at no moment is there no checkpoint of that name
            for old in filter(Path.exists, (path, self.log_path, path.with_suffix(".png"))):
                with whole_file(old.with_suffix(f".previous{old.suffix}")) as partial:
                    shutil.copyfile(old, partial)
        contents.update(step=self.step, seconds=self.seconds(), random=random, args=vars(self.args))
        with whole_file(path, (OSError, RuntimeError)) as partial:       # torch.save raises the second
            torch.save(contents, partial)
        if self.fresh:
            self.new_log.replace(self.log_path)
        self.fresh = False


# Only these flags may change between a run and its resume: they say how long, where and how fast it runs and
# what is shown on the way, not what is learnt. (A tokenizer is known by the hash of its weights.)
MAY_CHANGE = {"out", "resume", "minutes", "steps", "device", "compile", "eval_every",
              "log_every", "data_dir", "vq", "vgg", "lpips", "live_features", "cfg_scale", "temperature"}


def resume_state(args, *needed):
    """The checkpoint in --out with everything needed to go on (`needed`: what only this script's have), or
    None for a fresh run. InputError names the flag that differs from that run's."""
    if rank_and_world()[1] > 1:
        raise InputError("training runs in one process: start it with python, not with torchrun")
    # --init may be --out itself: a copy of that is kept, as NAME.previous.
    also = [args.out[:-3] + end for end in (".jsonl", ".new.jsonl", ".png", ".previous.pt")]
    reads = [v for name, v in vars(args).items() if isinstance(v, str) and name != "out" and
             not (name == "init" and v == args.out)]
    out = check_output(args.out, (".pt",), reads=reads, also=also)
    if Path(args.data).is_dir() and Path(args.data).resolve() in out.resolve().parents:
        raise InputError(f"--out {out} lies in the folder of --data, where its preview would be a picture")
    if not args.resume:
        return None
    state = read_checkpoint(args.out)
    if not {"config", "optimizer", "raw", "random", *needed} <= state.keys():
        raise InputError(f"{args.out} has no complete state to go on from: it was not written by this script")
    for name, now in vars(args).items():
        before = state["args"].get(name, now)            # missing: a flag that is newer than the checkpoint
        same = now == before or {type(now), type(before)} == {str} and (
            Path(now).resolve() == Path(before).resolve())       # --data ./x/ and --data x
        if not same and name not in MAY_CHANGE:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{args.out} was trained with other settings, {flag} {before} instead of {now}: "
                             f"resume with that run's flags")
    return state


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
# Weights from files

def plain_names(part):
    """A state dict under the names of the bare model, without those that torch.compile, DDP and FSDP put in
    front or in between; None for what is no state dict."""
    if not isinstance(part, dict) or not part or not all(map(torch.is_tensor, part.values())):
        return None
    wrappers = r"(?<![^.])(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
    return {re.sub(wrappers, "", str(name)): w for name, w in part.items()}


def read_config(config_class, saved, path):
    """The dataclass from the dict that a checkpoint keeps of it; fields that it lacks have their defaults."""
    with explained(f"{path} is damaged: its config makes no sense"):
        if newer := dict(saved).keys() - {field.name for field in fields(config_class)}:
            raise InputError(f"{path} was written by a newer version of this code, its config has "
                             f"{', '.join(sorted(map(str, newer)))}: update the code")
        return config_class(**saved)


def read_checkpoint(path, mmap=False):
    """Read a .pt file into a dict with at least "model" (a state dict). Never runs code hidden in the file.

    Reads this project's checkpoints and the released files, whose weights are under "model" (beside an
    `argparse.Namespace`), under "module" (DeepSpeed), under "state_dict", or bare (FSDP). mmap: leave the
    tensors on disk until they are used, which saves their size in memory; copy what you keep.
    """
    if not Path(path).is_file():
        raise InputError(f"{path} is a folder: pass the .pt file in it" if Path(path).is_dir() else
                         f"{path} does not exist: train it first, or pass the right path")
    try:
        # weights_only refuses every class but tensors and plain containers. Namespace is a bag of flags.
        with torch.serialization.safe_globals([argparse.Namespace]):
            mmap = mmap and zipfile.is_zipfile(path)     # files from before torch 1.6 cannot be mapped
            file = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception:                                    # the reason is long and advises to run hidden code
        raise InputError(f"{path} cannot be read as a checkpoint: it is empty, damaged, no PyTorch file, or "
                         f"holds pickled code, of which nothing was run") from None
    file = file if isinstance(file, dict) else {}
    if isinstance(text := file.get("text_encoder"), dict):       # a GPT's, with weights of its own
        text["model"] = plain_names(text.get("model"))
    for part in (file.get("model"), file.get("module"), file.get("state_dict"), file):
        if weights := plain_names(part):
            return {**({} if part is file else file), "model": weights}
    raise InputError(f"{path} holds no weights, neither bare nor under model, module or state_dict")


def fill_weights(model, weights, path, assign=False):
    """Put `weights` into `model`, copied or taken over as they are (assign); names and shapes have to fit."""
    with explained(f"{path} does not fit this model", kinds=RuntimeError):
        model.load_state_dict(weights, strict=True, assign=assign)
    return model


def build(model_class, config, weights, path, device, dtype):
    """model_class(config) in eval mode with these weights, on the device in the dtype asked for. It is made
    without memory (on the meta device) and takes over copies of the weights, one tensor at a time: with
    memory-mapped weights no more than the finished model is ever held. Left out are the tables, masks, caches
    and counters that some versions save beside the layers; what is in a layer would change what it does."""
    with explained(f"{path} cannot be loaded"):
        with torch.device("meta"):
            model = model_class(config)
        own, copies = model.state_dict().keys(), {}
        for name, weight in weights.items():
            layer, _, last = name.rpartition(".")
            if name in own or last in ("weight", "bias") or f"{layer}.weight" in own:
                if not weight.is_floating_point():
                    raise InputError(f"{path} holds quantised weights: pass what they were made from")
                copies[name] = weight.to(device=device, dtype=dtype, copy=True)
        return fill_weights(model, copies, path, assign=True).to(device).eval()


def weights_hash(model):
    """A short name for exactly these weights: a GPT remembers which tokenizer its tokens came from."""
    return short_hash(name.encode() + weight.detach().float().cpu().numpy().tobytes()
                      for name, weight in sorted(model.state_dict().items()))
