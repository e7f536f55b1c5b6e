"""What every command needs, whether it trains, draws or measures. Nothing here is about pictures or networks.

    errors -> flags -> device, processes, long jobs -> precision, schedule -> weights

The sections stand in the order in which a run comes to them. Every command ends in `run(main, get_args)`.
"""
import argparse
import hashlib
import io
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
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import fields
from datetime import timedelta
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel


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
    """Run a command; what the user can mend is told in one line, with exit status 1. Under torchrun the first
    process speaks for all."""
    rank, _ = rank_and_world()
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):       # a terminal without UTF-8 gets \\xe9 instead of an error
            stream.reconfigure(errors="backslashreplace")
    try:
        with on_signals(signal.default_int_handler):
            with redirect_stderr(io.StringIO() if rank > 0 else sys.stderr):
                args = get_args()
            main(args)
        if dist.is_initialized():
            wait_for_all()                       # the first one may still evaluate
            dist.destroy_process_group()
    except (InputError, OSError, MemoryError) as error:          # OSError: no permission, no such folder
        time.sleep(3 * (rank > 0))           # if the first one has the same to tell, torchrun ends us by then
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


@cache
def patient_group():
    """Under torchrun, the processes' second line, between CPUs, which waits for a week: the slowest may be
    hours behind, tokenizing or looking at the model. Gradients take the first, which breaks after minutes."""
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))


@contextmanager
def together():
    """What all processes do at once, over their patient line."""
    with explained("another process has ended, or did not come for a week", "see what it told", RuntimeError):
        yield patient_group()


def wait_for_all():
    """Under torchrun: go on when every process has come this far."""
    if rank_and_world()[1] > 1:
        with together() as group:
            dist.barrier(group=group)


def largest(*numbers):
    """Of each number the largest that any process has: so all of them decide alike."""
    if rank_and_world()[1] == 1:
        return numbers
    numbers = torch.tensor(numbers, dtype=torch.float64)
    with together() as group:
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=group)
    return numbers.tolist()


def summed(tensor):
    """The sum over all processes, a new tensor."""
    tensor = tensor.clone()
    if rank_and_world()[1] > 1:
        patient_group()                          # with the second line, the first is there too
        dist.all_reduce(tensor)
    return tensor


def joined(tensor):
    """The rows of all processes, in order of their ranks."""
    _, world = rank_and_world()
    if world == 1:
        return tensor
    rows = tensor.new_empty(world * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(rows, tensor.contiguous())
    return rows


def of_first(tensor):
    """What the first process has, for all; in place."""
    if rank_and_world()[1] > 1:
        dist.broadcast(tensor, 0)
    return tensor


def gathered(thing):
    """What each process has, a list in order of their ranks."""
    things = [thing] * rank_and_world()[1]
    if len(things) > 1:
        with together() as group:
            dist.all_gather_object(things, thing, group=group)
    return things


def my_part(batch):
    """This process's rows of a batch that all processes share out: everything random was drawn for the whole
    of it, so their number does not change what is learnt."""
    rank, world = rank_and_world()
    return batch[rank * len(batch) // world:(rank + 1) * len(batch) // world]


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
    """Gives a temporary name to write to; `path` is its name only when the block has ended well. So a kill,
    a power cut or a full disk leaves the old file or the new one, never half of one. kinds: what a writer
    that fails raises."""
    path = Path(path)
    partial = partial_name(path)
    try:
        with explained(f"{path} cannot be written", "is there room on the disk?", kinds):
            yield partial
            with open(partial, "r+b" if os.name == "nt" else "rb") as file:
                os.fsync(file.fileno())                  # on the disk, before its name says so
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
        partial_name(Path(path)).unlink(missing_ok=True)     # of another machine's process with this number
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


def free_memory(device):
    """Bytes that a run may still take on this device, without what other programs hold."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, ValueError):                          # Linux
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
        return int(dict(line.split(":") for line in text.splitlines())["MemAvailable"].split()[0]) * 1024
    return 4 * 2 ** 30


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
            # Files from before torch 1.6 cannot be mapped, nor those whose names are in another encoding.
            usual = zipfile.is_zipfile(path) and os.fsencode(path) == str(path).encode(errors="replace")
            file = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and usual)
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


def build(model_class, config, weights, path, device, dtype=None, copy=True):
    """model_class(config) in eval mode with these weights, on the device in the dtype asked for. It is made
    without memory (on the meta device) and takes over copies of the weights, one tensor at a time: with
    memory-mapped weights no more than the finished model is ever held (copy=False: not even that). Left out
    are the tables, masks, caches and counters that some versions save beside the layers; what is in a layer
    would change what it does."""
    with explained(f"{path} cannot be loaded"):
        with torch.device("meta"):
            model = model_class(config)
        own, copies = model.state_dict().keys(), {}
        for name, weight in weights.items():
            layer, _, last = name.rpartition(".")
            if name in own or last in ("weight", "bias") or f"{layer}.weight" in own:
                if not weight.is_floating_point():
                    raise InputError(f"{path} holds quantised weights: pass what they were made from")
                copies[name] = weight.to(device=device, dtype=dtype, copy=copy)
        return fill_weights(model, copies, path, assign=True).to(device).eval()


def weights_hash(model):
    """A short name for exactly these weights: a GPT remembers which tokenizer its tokens came from."""
    return short_hash(name.encode() + weight.detach().float().cpu().numpy().tobytes()
                      for name, weight in sorted(model.state_dict().items()))
