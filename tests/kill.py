"""python tests/kill.py --times 50      Kill training at random moments and see whether it goes on.

Each time a run of train_vq.py or train_gpt.py that saves every few steps is killed (SIGKILL) somewhere after
its start, during saves too, and resumed. What has to hold: there is a whole checkpoint whenever one was ever
written, the next start goes on from it, at most one interval of saving is lost, and half-written files do not
pile up.
"""
import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
EVERY = 2                                                        # steps between saves


def command(script, folder, *more, processes=1):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    more += ("--shard",) * (processes > 1)
    vq = ["--vq", folder / "tokenizer.pt"] if script == "gpt" else []
    return [sys.executable, *torchrun[:4 * (processes > 1)], *map(str, (
        ROOT / f"train_{script}.py", "--limit", 64, "--device", "cpu", "--batch-size", 8, "--log-every", 1,
        "--eval-every", EVERY, "--steps", 100000, "--out", folder / f"{script}.pt", *vq, *more))]


def last_step(*logs):
    text = "".join(log.read_text() for log in logs if log.exists())
    return max([0, *map(int, re.findall(r'"step": (\d+)', text))])


def kill_once(script, folder, delay, processes):
    """Start or resume, wait for a step, then for `delay` seconds, and kill. Returns the last step that was
    logged, that of the checkpoint that is there (0: none), and the half-written files."""
    path, logs = folder / f"{script}.pt", [folder / f"{script}{end}" for end in (".jsonl", ".new.jsonl")]
    before = torch.load(path, weights_only=True)["step"] if path.exists() else 0
    process = subprocess.Popen(command(script, folder, *["--resume"] * path.exists(), processes=processes),
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    # An earlier run's lines from after its last save are taken away first.
    while process.poll() is None and last_step(*logs) != before + 1:
        time.sleep(0.005)
    time.sleep(delay)
    subprocess.run(["pkill", "-KILL", "-f", str(folder)])        # all processes at once, as a reboot would
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err[-2000:]
    saved = torch.load(path, weights_only=True)["step"] if path.exists() else 0
    return last_step(*logs), saved, [file.name for file in folder.iterdir() if ".partial" in file.name]


def main(times, seed=0, processes=1):
    rng, during = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        subprocess.run(command("vq", folder, "--steps", 1, "--out", folder / "tokenizer.pt"), check=True,
                       capture_output=True)
        for turn in range(times):
            script = ("vq", "gpt")[turn % 2]
            reached, saved, partial = kill_once(script, folder, 1.5 * rng.random(), processes)
            assert reached - EVERY <= saved <= reached, (script, reached, saved)
            assert len(partial) <= 4, partial        # at most two of each script: its next start removes them
            during += any(name.startswith(script) for name in partial)
            print(f"{turn + 1:3}  {script:3}  killed at step {reached}, {saved} is saved", *partial)
    print(f"{times} kills, {during} of them in the middle of a save: every time a whole checkpoint was there")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="with more than one, in shards")
    args = parser.parse_args()
    main(args.times, args.seed, args.processes)
