"""pytest -q tests/test_runs.py      What a run survives: signals, full disks,
other data, other runs, odd names."""
import contextlib
import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import fid
import runs
import sample
import train_gpt
import train_vq
from conftest import QUICK, ROOT, run_gpt, run_vq
from runs import InputError, SharedArray, alone, whole_file
from training import Progress


def pictures(folder, classes="abc", count=4):
    """A folder with `count` pictures of each of these classes."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (34, 40), (label * 80, i * 20, 0)).save(folder / name / f"{i}.png")
    return folder


@contextlib.contextmanager
def started(command, ready, limit=60, **more):
    """A command of the project in a session of its own, once `ready` is there; killed at the end."""
    process = subprocess.Popen([sys.executable, *map(str, command)], text=True, stderr=subprocess.PIPE,
                               stdout=subprocess.PIPE, start_new_session=True, **more)
    try:
        end = time.monotonic() + limit
        while not ready() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        assert ready(), process.communicate() if process.poll() is not None else "not ready in time"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def last_line(process, limit=15):
    """What a process that was told to end says last; it ends soon, not with status 0, without a traceback."""
    _, error = process.communicate(timeout=limit)
    assert process.returncode != 0 and "Traceback" not in error, error
    return error.replace("\r", "\n").strip().splitlines()[-1]


def alive(group):
    """How many processes of this group are left."""
    found = subprocess.run(["ps", "-o", "stat=", "-g", str(group)], capture_output=True, text=True).stdout
    return sum(not line.strip().startswith("Z") for line in found.splitlines())


def steps_of(log):
    return len(log.read_text().splitlines()) if log.exists() else 0


# signals

def training(folder, out, *flags):
    return [ROOT / "train_vq.py", "--data", folder, "--out", out, "--device", "cpu", "--minutes", "5",
            "--batch-size", "4", "--log-every", "1", *flags]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_all_processes_lets_the_step_end_and_saves(tmp_path, number):
    command = training(pictures(tmp_path / "set"), tmp_path / "vq.pt")
    with started(command, lambda: steps_of(tmp_path / "vq.new.jsonl") > 1) as process:
        os.killpg(process.pid, number)
        if number == signal.SIGTERM:                             # as timeout does: to the process, and to all
            os.killpg(process.pid, number)
        line = last_line(process)
        assert "is saved: the same flags and --resume go on from it" in line
        assert alive(process.pid) == 0
    assert torch.load(tmp_path / "vq.pt", weights_only=True)["step"] == int(line.split("step ")[1].split()[0])


def test_workers_do_not_outlive_a_killed_parent_and_a_vanished_folder_ends_the_run(tmp_path):
    folder = pictures(tmp_path / "set")
    with started(training(folder, tmp_path / "a.pt"), lambda: steps_of(tmp_path / "a.new.jsonl") > 1) as one:
        os.kill(one.pid, signal.SIGKILL)
        one.wait()
        end = time.monotonic() + 15
        while alive(one.pid) and time.monotonic() < end:
            time.sleep(0.1)
        assert alive(one.pid) == 0
    with started(training(folder, tmp_path / "b.pt"), lambda: steps_of(tmp_path / "b.new.jsonl") > 1) as two:
        shutil.rmtree(folder)
        assert "in a row cannot be read: has the folder gone?" in last_line(two)


def test_extraction_ends_on_sigterm_without_a_traceback_and_leaves_no_process(trained, tmp_path):
    command = [ROOT / "data.py", "extract", "--data", pictures(tmp_path / "set", count=400), "--vq",
               trained / "vq.pt", "--device", "cpu", "--batch-size", "1", "--out", tmp_path / "codes"]
    with started(command, lambda: list(tmp_path.glob("codes/train/*.done"))) as process:
        os.killpg(process.pid, signal.SIGTERM)
        assert last_line(process) == "interrupted" and alive(process.pid) == 0


def test_a_second_signal_stops_at_once_and_nohup_stays_in_force(tmp_path):
    args = train_vq.get_args(["--out", str(tmp_path / "x.pt")])
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), Progress(args, torch.device("cpu"), None) as progress:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)                  # timeout sends it twice and means it once
            assert not progress.running()
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_training_runs_in_a_thread_that_is_not_the_main_one(tmp_path):
    failed = []

    def work():
        try:
            runs.run(train_vq.main, lambda: train_vq.get_args([*QUICK, "--steps", "1", "--out",
                                                               str(tmp_path / "vq.pt")]))
        except BaseException as error:
            failed.append(error)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed and (tmp_path / "vq.pt").exists()


# the data of a resumed run

@pytest.mark.parametrize("change, told", [
    (lambda set: (set / "a").rename(set / "z"), r"class_names \['a', 'b'.*instead of \['b'"),
    (lambda set: (set / "b" / "1.png").unlink(), "pictures 11 instead of 10"),
    (lambda set: (set / "b" / "1.png").rename(set / "b" / "9.png"), "names, order, captions"),
])
def test_a_run_does_not_go_on_with_other_pictures(trained, tmp_path, change, told):
    folder = pictures(tmp_path / "set")
    flags = ["--data", str(folder), "--batch-size", "4", "--steps"]
    run_vq(tmp_path, *flags, "1")
    run_gpt(tmp_path, *flags, "1", "--vq", str(trained / "vq.pt"))
    shutil.move(folder, tmp_path / "kept")
    shutil.copytree(tmp_path / "kept", folder)                   # the same pictures, other times
    run_vq(tmp_path, *flags[:1], f"{folder}/../set/", *flags[2:], "2", "--resume")
    change(folder)
    for run, more in ((run_vq, []), (run_gpt, ["--vq", str(trained / "vq.pt")])):
        with pytest.raises(InputError, match=f"was trained on other data, {told}"):
            run(tmp_path, *flags, "3", "--resume", *more)


def test_a_run_does_not_go_on_with_other_captions_or_replaced_codes_but_old_checkpoints_do(trained, tmp_path):
    folder = pictures(tmp_path / "set", "a", 8)
    for i in range(8):
        (folder / "a" / f"{i}.txt").write_text(f"number {i}")
    flags = ["--vq", str(trained / "vq.pt"), "--cond", "text", "--batch-size", "4", "--steps"]
    run_gpt(tmp_path, *flags, "1", "--data", str(folder))
    (folder / "a" / "3.txt").write_text("number 5")
    with pytest.raises(InputError, match="was trained on other data, names, order, captions"):
        run_gpt(tmp_path, *flags, "2", "--data", str(folder), "--resume")
    state = torch.load(tmp_path / "gpt.pt", weights_only=True)
    del state["data"]
    torch.save(state, tmp_path / "gpt.pt")
    assert run_gpt(tmp_path, *flags, "2", "--data", str(folder), "--resume")["step"] == 2
    extract = ["extract", "--vq", str(trained / "vq.pt"), "--out", str(tmp_path / "codes"), "--device", "cpu"]
    flags = ["--vq", str(trained / "vq.pt"), "--codes", str(tmp_path / "codes"), "--steps"]
    for limit in ("20", "24"):
        shutil.rmtree(tmp_path / "codes", ignore_errors=True)
        data.main(data.get_args([*extract, "--data", "shapes", "--limit", limit]))
        if limit == "20":
            run_gpt(tmp_path, *flags, "1")
    with pytest.raises(InputError, match="was trained on other data, pictures 20 instead of 24"):
        run_gpt(tmp_path, *flags, "2", "--resume")


# not a number

@pytest.mark.parametrize("flags", [["--lr", "1e38"], ["--lr", "1e38", "--ema", "0", "--disc-start", "0"]])
def test_weights_that_the_last_step_made_infinite_are_not_saved(tmp_path, flags):
    run_vq(tmp_path, "--steps", "1")
    before = (tmp_path / "vq.pt").read_bytes()
    with pytest.raises(InputError, match=r"step \d: .*NaN or infinite"):
        run_vq(tmp_path, "--steps", "2", "--warmup", "0", "--restart-every", "1", "--eval-every", "9", *flags)
    assert (tmp_path / "vq.pt").read_bytes() == before


def test_a_discriminator_that_has_become_nan_ends_the_run(tmp_path):
    args = train_vq.get_args(["--out", str(tmp_path / "x.pt")])
    with pytest.raises(InputError, match="a weight is NaN"), \
            Progress(args, torch.device("cpu"), None) as progress:
        progress.count({"l2": torch.tensor(1.0)})
        progress.save(raw={"vq.w": torch.ones(2), "disc.w": torch.tensor(float("nan"))}, optimizer={})
    assert not (tmp_path / "x.pt").exists()


# full disks

@contextlib.contextmanager
def files_up_to(size):
    """In this block no file can grow beyond so many bytes, as on a disk that is full."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_room_for_an_array_is_reserved_before_it_is_filled(tmp_path, monkeypatch):
    SharedArray(tmp_path / "good.npy", (100, 1000), np.uint16, "key")
    assert (tmp_path / "good.npy.key.partial").stat().st_blocks * 512 >= 200_000
    for name in ("a", "b"):
        with files_up_to(50_000), pytest.raises(InputError, match=rf"{name}.npy needs 0.2 MB, .* are free"):
            SharedArray(tmp_path / f"{name}.npy", (100, 1000), np.uint16, "key")
        monkeypatch.delattr(os, "posix_fallocate", raising=False)            # as on the Mac

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(InputError, match="No space left on device"):
        SharedArray(tmp_path / "c.npy", (10, 10), np.uint16, "key")
    assert sorted(path.name[:4] for path in tmp_path.iterdir()) == ["good", "good"]


def test_a_full_disk_ends_a_run_in_one_line_and_keeps_the_checkpoint(tmp_path):
    run_vq(tmp_path, "--steps", "1")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for folder in (tmp_path, tmp_path / "new"):
        folder.mkdir(exist_ok=True)
        with files_up_to(2_000_000), pytest.raises(InputError, match="vq.pt cannot be written"):
            run_vq(folder, "--steps", "1", "--seed", "1")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["vq.new.jsonl"]
    after = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    assert {name: after[name] for name in before} == before
    previous = {"vq.previous.pt", "vq.previous.png", "vq.previous.jsonl"}
    assert set(after) - set(before) == {"vq.new.jsonl"} | previous


def test_what_does_not_fit_leaves_the_old_file_and_no_half_one(tmp_path):
    picture, array = Image.effect_noise((200, 200), 99).convert("RGB"), np.random.rand(9999)
    for name in ("a.png", "a.jpg"):
        with files_up_to(4000), pytest.raises(InputError, match=f"{name} cannot be written"):
            data.save_picture(picture, tmp_path / name)
    writers = {"a.npy": lambda name: np.save(name, array), "a.npz": lambda name: np.savez(name, array),
               "a.txt": lambda name: name.write_text("x" * 9999)}
    for name, write in writers.items():
        (tmp_path / name).write_text("old")
        with files_up_to(4000), pytest.raises(InputError, match=f"{name} cannot be written"):
            with whole_file(tmp_path / name) as partial:
                write(partial)
        assert (tmp_path / name).read_text() == "old"
        with whole_file(tmp_path / name) as partial:
            write(partial)
    assert {path.name for path in tmp_path.iterdir()} == set(writers)


def test_a_log_that_cannot_be_written_is_one_line(tmp_path):
    args = train_vq.get_args(["--out", str(tmp_path / "x.pt")])
    with Progress(args, torch.device("cpu"), None) as progress:
        progress.log(loss=1.0)
        room = progress.new_log.stat().st_size + 10
        with files_up_to(room), pytest.raises(InputError, match="x.new.jsonl cannot be written"):
            progress.log(loss=2.0)


# file descriptors

def test_eight_workers_and_large_batches_need_few_file_descriptors(tmp_path):
    pictures(tmp_path / "set", "ab", 150)
    code = f"""
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (128, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
os.cpu_count = lambda: 8
from data import FolderData, spread
folder = FolderData({str(tmp_path / "set")!r}, "train", 32)
batches = folder.batches(128, 0)
kept = [next(batches).shape for _ in range(12)]
images, labels = next(iter(folder.take([spread(range(len(folder)), 16)])))
print(len(kept), len(images), sum(len(images) for images, _ in folder.passes(32)))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.split() == ["12", "16", "285"], result.stderr


# several runs at a time

def test_a_second_run_waits_for_the_codes_of_the_first(trained, tmp_path):
    folder, vq = pictures(tmp_path / "set", count=40), trained / "vq.pt"
    commands = [[sys.executable, ROOT / "train_gpt.py", "--data", folder, "--vq", vq, "--device", "cpu",
                 "--steps", "1", "--limit", "60", "--batch-size", "4", "--out", tmp_path / f"{name}.pt"]
                for name in "ab"]
    both = [subprocess.Popen(list(map(str, command)), text=True, stderr=subprocess.PIPE)
            for command in commands]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert {path.name for path in tmp_path.glob("codes/*/*")} == {"about.json", "codes.npy", "labels.npy"}


def test_only_one_run_at_a_time_writes_to_one_name(trained, tmp_path, capsys):
    (tmp_path / "codes.npy.lock").touch()                        # left by one that was killed
    with alone(tmp_path / "codes.npy"):
        entered = []

        def wait():
            with alone(tmp_path / "codes.npy", wait=True):
                entered.append(time.monotonic())
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.5)
        assert not entered
        left = time.monotonic()
    thread.join()
    assert entered[0] >= left and "waiting for it" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    run_vq(tmp_path, "--steps", "1")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    models = ["--gpt", str(trained / "gpt.pt"), "--vq", str(trained / "vq.pt"), "--num-samples", "10"]
    with alone(tmp_path / "vq.pt"), alone(tmp_path / "s.npz"):
        for flags in (["--seed", "1"], ["--resume"]):
            with pytest.raises(InputError, match="another run writes .*vq.pt now"):
                run_vq(tmp_path, "--steps", "2", *flags)
        with pytest.raises(InputError, match="another run writes .*s.npz now"):
            sample.main(sample.get_args([*models, "--npz", str(tmp_path / "s.npz")]))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_without_locks_a_run_does_without(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", none)
    with alone(tmp_path / "x"):
        pass
    monkeypatch.setitem(sys.modules, "fcntl", None)              # as on Windows
    with alone(tmp_path / "x"):
        pass
    assert not list(tmp_path.iterdir())


# names of what is written

def test_a_name_that_cannot_be_written_is_told_before_the_work(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x"), (tmp_path / "folder.pt").mkdir(), (tmp_path / "folder.png").mkdir()
    shutil.copy(trained / "vq.pt", tmp_path / "vq.pt"), shutil.copy(trained / "vq.pt", "vq.previous.pt")
    (tmp_path / "link.pt").symlink_to("vq.pt")
    Path("pets.jsonl").write_text('{"image": "x.png", "text": "x"}')
    long = "x" * 250
    models = ["--gpt", str(trained / "gpt.pt"), "--vq", str(trained / "vq.pt")]
    for module in (train_vq, train_gpt, sample, data, fid):      # nothing else may be reached
        for name in ("pick_device", "load_data", "load_tokenizer"):
            monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("work was begun"), raising=False)
    monkeypatch.setattr(sample, "pick_device", runs.pick_device)
    for module, flags, told in [
        *((script, ["--out", name], "ends in .pt") for script in (train_vq, train_gpt)
          for name in ("out/gpt", "lr0.001", "x.jsonl")),
        *((train_vq, ["--out", name], "is a folder") for name in ("out/x.pt/", "folder.pt", ".")),
        *((train_vq, ["--out", name], "cannot be written") for name in ("file/x.pt", f"{long}.pt")),
        *((train_gpt, ["--vq", vq, "--out", out], "would overwrite") for vq, out in [
            ("vq.pt", "./vq.pt"), ("link.pt", "vq.pt"), ("vq.previous.pt", "vq.pt")]),
        (train_vq, ["--init", "vq.previous.pt", "--out", "vq.pt"], "would overwrite"),
        (train_vq, ["--data", "pets.jsonl", "--out", "pets.pt"], "would overwrite"),
        (train_vq, ["--data", "pets.jsonl", "--out", "pets.PT"], "would overwrite"),
        (train_vq, ["--data", "z.new.jsonl", "--out", "z.pt"], "would overwrite"),
        (train_vq, ["--data", "folder.png", "--out", "folder.png/out/vq.pt"], "lies in the folder of --data"),
        *((sample, [*models, "--out", name], "ends in .png") for name in ("grid", "grid.txt")),
        (sample, [*models, "--npz", "file/x.npz"], "--npz file/x.npz cannot be written"),
        (data, ["draw", "--out", "grid"], "ends in .png"), (data, ["draw", "--out", "folder.png"], "folder"),
        (data, ["check", "codes", "--out", "grid"], "ends in .png"),
    ]:
        with pytest.raises(InputError, match=told):
            module.main(module.get_args(flags))
    monkeypatch.setattr(fid, "pick_device", lambda name: None)
    for flags, told in ((["shapes", "--sweep", "1", "--out", "x.png"], "ends in .csv"),
                        (["shapes", "--save-stats", "file/x.npz"], "--save-stats file/x.npz cannot be")):
        with pytest.raises(InputError, match=told):
            fid.main(fid.get_args(flags))
    assert not list(tmp_path.rglob("*.partial*"))


def test_names_with_dots_have_logs_of_their_own_and_a_preview_that_was_there_is_kept(tmp_path):
    Image.new("RGB", (3, 3)).save(tmp_path / "lr0.001.png")
    for name in ("lr0.001", "lr0.002"):
        train_vq.main(train_vq.get_args([*QUICK, "--steps", "1", "--out", str(tmp_path / f"{name}.pt")]))
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {f"lr0.00{i}.{end}" for i in "12" for end in ("pt", "jsonl", "png")} | {
        "lr0.001.previous.png"}
    assert Image.open(tmp_path / "lr0.001.previous.png").size == (3, 3)


# names outside ASCII

@pytest.mark.parametrize("odd", ["\u732b", os.fsdecode(b"caf\xe9")])
def test_a_name_outside_ascii_does_not_end_a_run(trained, tmp_path, odd):
    folder = pictures(tmp_path / "set", ["a", odd])
    out = tmp_path / odd / "vq.pt"
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, ROOT / "train_gpt.py", "--data", folder, "--vq", trained / "vq.pt", "--steps",
               "1", "--device", "cpu", "--out", out]
    result = subprocess.run(list(map(str, command)), env=env, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert os.fsencode(torch.load(out, weights_only=True)["class_names"][1]) == os.fsencode(odd)
    assert json.loads(out.with_suffix(".jsonl").read_text().splitlines()[0])["step"] == 1


def test_every_file_is_opened_with_its_encoding():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("notebooks/*.py")]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            text = any(call in line for call in (".read_text(", ".write_text(", 'open(path, "a"'))
            assert not text or "utf-8" in line, f"{path.name}:{number}"


# what a killed run leaves

def test_a_damaged_checkpoint_is_told_and_the_save_before_it_goes_on(tmp_path, capsys):
    whole = run_vq(tmp_path, "--steps", "4", "--eval-every", "1")["raw"]
    assert torch.load(tmp_path / "vq.backup.pt", weights_only=True)["step"] == 3
    (tmp_path / "vq.pt").write_bytes((tmp_path / "vq.pt").read_bytes()[:1000])      # a disk that lost its end
    again = run_vq(tmp_path, "--steps", "4", "--eval-every", "1", "--resume")["raw"]
    assert "vq.pt cannot be read" in capsys.readouterr().err
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    steps = [json.loads(line)["step"] for line in (tmp_path / "vq.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 4]                              # each once, and the last one's evaluation


def test_half_written_files_of_this_run_and_lines_after_its_last_save_are_taken_away(tmp_path):
    run_vq(tmp_path, "--steps", "2")
    log = (tmp_path / "vq.jsonl").read_text()
    (tmp_path / "vq.jsonl").write_text(log + json.dumps({"step": 3, "l2": 0.5}) + '\n{"step": 4, "l')
    ours = ["vq.77.partial.pt", "vq.backup.77.partial.pt", "vq.77.partial.png", "vq.previous.8.partial.jsonl"]
    others = ["vq.large.77.partial.pt", "gpt.77.partial.pt", "vq.77.partial.txt"]
    for name in ours + others:
        (tmp_path / name).write_bytes(b"half")
    run_vq(tmp_path, "--steps", "3", "--resume")
    assert {path.name for path in tmp_path.glob("*.partial.*")} == set(others)
    steps = [json.loads(line)["step"] for line in (tmp_path / "vq.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 2, 3, 3]


def test_saves_come_by_the_clock_as_well_as_by_steps(tmp_path, monkeypatch):
    saved = []

    class Noted(Progress):
        def save(self, **contents):
            saved.append(self.step)
            super().save(**contents)
    monkeypatch.setattr(train_vq, "Progress", Noted)
    run_vq(tmp_path, "--steps", "3", "--eval-every", "1000", "--save-minutes", "1e-9")
    assert saved == [1, 2, 3, 3]                                 # and at the end
    assert torch.load(tmp_path / "vq.backup.pt", weights_only=True)["step"] == 2
    saved.clear()
    run_vq(tmp_path / "new", "--steps", "3", "--eval-every", "2")
    assert saved == [2, 3]
