"""The folder of a run: its files appear together or not at all, and a stopped run can go on.

    with RunFolder("run") as folder:        made if need be, and locked: one run writes at a time
        folder.save(training)               every few minutes
        folder.write(...)                   heads.safetensors, metrics.jsonl, report.png

Files are made in a new folder inside the run's folder and moved into place at the end. A process
that is killed in between leaves old files whole, and no report beside another run's heads. Nothing
is removed that this process did not make, except a checkpoint that is no longer needed.

A checkpoint is a safetensors file: the heads in float32, the optimizers' state, the state of the
random generator, and as text the step, the losses so far and the settings. It is only used with
the same settings. SIGTERM, by which a cluster announces the end, is noted in `.terminated`.
"""
import json
import os
import shutil
import signal
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import InputError, check_file, written_whole

FILES = ("heads.safetensors", "metrics.jsonl", "report.png")


@contextmanager
def undisturbed():
    """Ctrl-C and SIGTERM are not heard in the block, which is a matter of moments."""
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def lock(folder, wait=False):
    """Lock a folder -> a handle to close, None where there are no locks.

    If another process has the lock, wait for it, or raise BlockingIOError. The lock is the kernel's
    and ends with the process: one that is killed leaves none behind.
    """
    try:
        import fcntl
        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):        # Windows, or a folder that may not be listed
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return handle
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return None                       # a file system without locks


@contextmanager
def alone_in(folder):
    """One process at a time is in the block for a folder; the others wait, and say so.

    Gives False where there are no locks. So of the processes that torchrun starts, one fetches or
    tokenises, and the others find its files.
    """
    try:
        handle = lock(folder)
    except BlockingIOError:
        print(f"waiting for another process that writes in {folder}", file=sys.stderr)
        handle = lock(folder, wait=True)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


class RunFolder:
    """A context manager. On entry it fails, if it must, before the work rather than after it."""

    def __init__(self, out, rank=0):
        self.path, self.writes = Path(os.path.realpath(out)), rank == 0
        self.checkpoint = self.path / "checkpoint.safetensors"
        self.made, self.handle, self.terminated = False, None, False
        self.settings = {}

    def __enter__(self):
        if not self.writes:               # one process of several does
            return self
        if self.path == self.path.parent:
            raise InputError(f"--out {self.path} is the root of all folders; give one in it")
        self.made = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {self.path} is not a folder that can be written to "
                             f"({error.strerror})") from None
        try:
            self.handle = self.locked()
            for name in FILES:
                check_file(self.path / name, "--out")
        except InputError:
            self.__exit__()
            raise
        return self

    def locked(self):
        try:
            return lock(self.path)
        except BlockingIOError:
            raise InputError(f"--out {self.path}: another run writes there; "
                             f"give another folder") from None

    def __exit__(self, *_):
        if self.handle is not None:
            os.close(self.handle)
        if self.made:
            with suppress(OSError):       # something is in it
                self.path.rmdir()

    @contextmanager
    def listening(self):
        """In the block SIGTERM is only noted. After it, SIGTERM is what Ctrl-C is."""
        def note(*_):
            self.terminated = True

        signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.default_int_handler)

    def prepare(self, training, settings, resume):
        """Before the first step: go on from the checkpoint if `resume`. Its settings must equal."""
        self.settings = settings
        if not self.checkpoint.exists():
            return
        if not resume:
            print(f"{self.checkpoint} will be overwritten: --resume would go on from there")
            return
        tensors, info = read_checkpoint(self.checkpoint)
        for name, value in settings.items():
            if info["settings"].get(name) != value:
                raise InputError(f"{self.checkpoint} is of a run with {name} "
                                 f"{info['settings'].get(name)}, now it is {value}; give the same "
                                 f"options, or leave --resume out to begin anew")
        restore(training, tensors)
        training.metrics[:] = info["metrics"]
        print(f"going on after step {len(training.metrics):,}")

    def save(self, training):
        """Keep a checkpoint, whole, in place of the last one."""
        if self.writes:
            info = {"settings": self.settings, "metrics": training.metrics}
            with undisturbed(), written_whole(self.checkpoint, resume=True) as temporary:
                save_file(state_of(training), temporary, metadata={"checkpoint": json.dumps(info)})

    def forget(self):
        """Training is done and its files are written: no checkpoint is needed."""
        if self.writes:
            self.checkpoint.unlink(missing_ok=True)

    def write(self, heads, metrics, curves, report):
        """Write the run's files -> their names. curves None: there is no report.

        Where the folder takes no more, the heads are kept in the system's temporary folder.
        """
        if not self.writes:
            return []
        try:
            with undisturbed():
                return self._write(heads, metrics, curves, report)
        except OSError as error:
            other = Path(tempfile.mkdtemp(prefix="nanoexit-")) / FILES[0]
            heads.save(other)
            raise InputError(f"--out {self.path} cannot be written ({error}); the files of the "
                             f"last run are whole, and the trained heads are in {other}") from None

    def _write(self, heads, metrics, curves, report):
        # 1. all files, in a new folder
        fresh = Path(tempfile.mkdtemp(prefix=".run-", dir=self.path))
        try:
            heads.save(fresh / FILES[0])
            lines = [json.dumps(record, allow_nan=False) + "\n" for record in metrics]
            (fresh / FILES[1]).write_text("".join(lines), "utf-8")
            try:
                if curves:
                    report(fresh / FILES[2], heads, metrics, curves)
            except Exception as error:    # a picture less is no run lost
                print(f"{FILES[2]} could not be drawn: {error}")
            # 2. what describes the old heads goes before them, what describes the new comes after
            for name in FILES[1:]:
                if (self.path / name).is_file():
                    os.replace(self.path / name, fresh / f"old {name}")
            names = [name for name in FILES if (fresh / name).exists()]
            for name in names:
                os.replace(fresh / name, self.path / name)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        return names


# ---------------------------------------------------------------- what a checkpoint holds


def state_of(training):
    """{name: tensor} of heads, all optimizers and the random generator."""
    tensors = {f"heads.{name}": p for name, p in training.heads.named_parameters()}
    tensors["generator"] = training.generator.get_state()
    for i, (part, _) in enumerate(training.optimizer.parts):
        for number, values in part.state_dict()["state"].items():
            for name, value in values.items():
                tensors[f"optimizer.{i}.{number}.{name}"] = torch.as_tensor(value)
    return {name: x.detach().cpu().contiguous() for name, x in tensors.items()}


def restore(training, tensors):
    """The reverse of state_of, in place."""
    own = {name[6:]: x for name, x in tensors.items() if name.startswith("heads.")}
    training.heads.load_state_dict(own)
    training.generator.set_state(tensors["generator"])
    for i, (part, _) in enumerate(training.optimizer.parts):
        state = {}
        for full, value in tensors.items():
            if full.startswith(f"optimizer.{i}."):
                number, name = full.split(".")[2:]
                state.setdefault(int(number), {})[name] = value
        part.load_state_dict({**part.state_dict(), "state": state})


def read_checkpoint(path):
    """-> {name: tensor}, {"settings": .., "metrics": ..}. InputError if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as f:
            info = json.loads(f.metadata()["checkpoint"])
            return {name: f.get_tensor(name) for name in f.keys()}, info
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}); "
                         f"leave --resume out to begin anew") from None
