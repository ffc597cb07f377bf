"""Text of any size: `read_corpus("my.jsonl", tokenizer)` tokenises it once and maps it from disk.

A list of ids in Python takes some 60 bytes a token, on disk a token takes 2 (4 where the vocabulary
has more than 65,536 tokens). A file that is mapped into memory looks like a tensor, but only what
is looked at is read. So a corpus may be larger than memory.

Files. A file that is UTF-8 text is a document. In a .jsonl file every line is one, by its field
"text". Hidden names are left out, links are followed, what is no text is left out and said.

Pieces. About 1 MB is tokenised at a time, in parallel processes. A text is cut only where the
tokenizer splits anyway: before a single space or newline that stands between two letters or signs.
So the ids are those of the uncut text. <|endoftext|> closes each document, and nothing is padded.

Splits. A hash of a file's name, or of a line's text, chooses a document's split, 80 : 10 : 10.
Fewer than 30 documents make one stream, which is cut 80 : 10 : 10.

Cache. The ids lie in a folder whose name is a hash of the files' names, sizes and times and of the
tokenizer. They are written under a temporary name, so a folder that is there is whole. One process
writes at a time: of those that torchrun starts, the others wait and find what the first has made.

    python -m appendix.corpus PATH --model pythia-70m       tokenise, and say what came out

    NANOEXIT_CACHE    where corpora are kept (default: XDG_CACHE_HOME/nanoexit/corpus, and
                      ~/.cache/nanoexit/corpus without that either)
"""
import argparse
import codecs
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import stat
import sys
import tempfile
import threading
from array import array
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from appendix.minipile import fetch_minipile
from appendix.runs import alone_in
from model import TOY, InputError, Tokenizer, command_line, locate
from train import SPLITS, Progress, split_of

FORMAT = 1                                # raise it when the same files would give other ids
PIECE = 1 << 20                           # bytes of text that are tokenised at a time
POOLED = 8 << 20                          # bytes of text that are worth more processes than one
# A space, its neighbours no space nor parts of a character cut by a block (escaped surrogates)
BREAK = re.compile(r"([^\s\udc80-\udcff]{1,20})([ \n][^\s\udc80-\udcff]{1,20})")
FEW = 30                                  # fewer documents than this make one stream
READ = ('plain UTF-8 text and .jsonl files (field "text") are read: unpack .gz and .zst files, '
        "turn .parquet into .jsonl and other encodings into UTF-8")

# ---------------------------------------------------------------- files


class File(NamedTuple):
    name: str                             # relative to --data, its parts joined by /
    path: Path
    size: int
    times: tuple                          # of the last change of content, and of any change, in ns

    @property
    def lines(self):
        return self.path.suffix.lower() == ".jsonl"


def files_of(data):
    """--data -> its files in the order of their names, and what was left out [(name, why)].

    Names that begin with a dot are left out. Links come after all that is really there, and what
    was met already is not read again. So loops end, and a text has one name.
    """
    root, files, left = Path(os.path.abspath(data)), [], []
    if not root.is_file() and not root.is_dir():
        raise InputError(f"--data {data}: no such file or folder "
                         f"(or stdlib, minipile; in training also self, stdlib+self)")
    base = root if root.is_dir() else root.parent
    waiting, met = deque([root]), set()
    while waiting:
        path = waiting.popleft()
        real = os.path.realpath(path)
        if real in met:
            continue
        met.add(real)
        name = path.relative_to(base).as_posix()
        try:
            status = path.stat()
            if stat.S_ISREG(status.st_mode):
                times = status.st_mtime_ns, status.st_ctime_ns
                files.append(File(name, path, status.st_size, times))
            elif stat.S_ISDIR(status.st_mode):
                for child in sorted(path.iterdir(), reverse=True):
                    if not child.name.startswith("."):
                        (waiting.append if child.is_symlink() else waiting.appendleft)(child)
        except OSError:                   # a broken link, or no permission
            left.append((name, "cannot be read"))
    return sorted(files, key=lambda file: file.name.split("/")), left


def left_out(left, total):
    """One line about the files that were left out, [(name, why)]. Empty if there are none."""
    if not left:
        return ""
    reasons = ", ".join(f"{n} {why}" for why, n in Counter(why for _, why in left).items())
    name = os.fsencode(left[0][0]).decode("utf-8", "backslashreplace")
    return f"{len(left)} of {total} files were left out: {reasons}, e.g. {name}"


# ---------------------------------------------------------------- pieces


def next_cut(file, start, tokenizer):
    """Where the piece that begins at byte `start` ends: after about PIECE bytes, or at the end."""
    at = start + PIECE
    if at >= file.size:
        return file.size
    try:
        with open(file.path, "rb") as stream:
            stream.seek(at)
            if file.lines:
                stream.readline()
                return min(stream.tell(), file.size)
            while block := stream.read(1 << 14):
                text = block.decode("utf-8", "surrogateescape")
                for space in BREAK.finditer(text):
                    a, b = space.group(1), space.group(2)
                    if tokenizer.encode(a) + tokenizer.encode(b) == tokenizer.encode(a + b):
                        before = text[:space.start(2)]
                        return min(file.size, at + len(before.encode("utf-8", "surrogateescape")))
                at += len(block)
    except OSError:                       # said when the piece is read
        pass
    return file.size


def batches_of(files, tokenizer):
    """All files as batches [(file, start, stop)] of about PIECE bytes, of one file or of many."""
    batch, size = [], 0
    for file in files:
        stop = 0
        while stop < file.size:
            start, stop = stop, next_cut(file, stop, tokenizer)
            batch.append((file, start, stop))
            size += stop - start
            if size >= PIECE:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def encode_piece(file, start, stop, tokenizer, dtype):
    """Read and tokenise the bytes from start to stop -> (parts, lines, trouble).

    parts: [(split, ids)], whole documents of a .jsonl file, or a part of a text. Blank documents
    are dropped. lines: of a .jsonl file. trouble: why this is no text, or the number of a bad line.
    """
    try:
        with open(file.path, "rb") as stream:
            stream.seek(start)
            raw = stream.read(stop - start)
        if start == 0:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if not file.lines:
            text = raw.decode("utf-8")
            ids = tokenizer.encode(text) if text.strip() else []
            return [(split_of(file.name), np.array(ids, dtype))], 0, ""
    except OSError:
        return [], 0, "cannot be read"
    except UnicodeDecodeError:
        return [], 0, "not UTF-8 text"
    parts = []
    for number, line in enumerate(raw.split(b"\n")):
        if not line.strip():
            continue
        try:
            text = json.loads(line.decode("utf-8"))["text"]
            ids = tokenizer.encode(text)
        except (ValueError, LookupError, TypeError, RecursionError):
            return [], 0, number + 1
        if text.strip():
            split = split_of(text.encode("utf-8", "surrogatepass"))
            parts.append((split, np.array(ids, dtype)))
    return parts, raw.count(b"\n"), ""


WORKER = []                               # in a process of the pool: its tokenizer and type


def end_with_parent():
    parent_process().join()               # a parent that was killed does not end its pool
    os._exit(1)


def begin_worker(spec, dtype):
    signal.signal(signal.SIGINT, signal.SIG_IGN)      # Ctrl-C ends the parent, which ends the pool
    threading.Thread(target=end_with_parent, daemon=True).start()
    WORKER[:] = Tokenizer(spec), dtype


def work(batch, worker=WORKER):
    """[(piece, what encode_piece makes of it)] of a batch of pieces (file, start, stop)."""
    return [(piece, encode_piece(*piece, *worker)) for piece in batch]


def encode_all(files, tokenizer, dtype, processes):
    """What work() makes of all files, in order, one by one. Few batches are under way at a time."""
    batches = batches_of(files, tokenizer)
    if processes == 1:
        for batch in batches:
            yield from work(batch, (tokenizer, dtype))
        return
    # a fork shares its parent's memory: here that of a fresh process, without threads or a GPU
    context = get_context("forkserver" if sys.platform == "linux" else "spawn")
    context.set_forkserver_preload(["train"])
    pool = ProcessPoolExecutor(processes, context, begin_worker, (tokenizer.spec, dtype))
    waiting = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(work, batch))
            if len(waiting) > 2 * processes:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise InputError("a process that tokenised the text was ended, perhaps for want of memory; "
                         "run python -m appendix.corpus with --processes 1") from None
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------- from files to streams


def write_documents(coded, size, left, one, end):
    """Write the ids of all documents, in order, to the file `one`: yields (split, bytes) of each.

    size: bytes of all files. `end` closes a document. Files that are no text are added to `left`.
    """
    progress, seen, tokens = Progress(1), 0, 0
    line, written, trouble = 1, 0, ""
    for (file, start, stop), (parts, lines, problem) in coded:
        # 1. one bad line ends it all, one bad part spoils a whole text
        if start == 0:
            line, written, trouble = 1, 0, ""
        if file.lines and problem:
            raise InputError(f"{file.path}, line {line + problem - 1}: not a JSON object whose "
                             f'field "text" is a text; mend or remove that line')
        line += lines
        trouble = trouble or problem
        # 2. a part of a document, or whole ones
        for split, ids in parts:
            written += one.write(ids)
            tokens += len(ids)
            if file.lines or stop == file.size and not trouble and written:
                yield split, written + one.write(end)
                written = 0
        if trouble and stop == file.size:
            one.seek(-written, os.SEEK_CUR)
            one.truncate()
            left.append((file.name, trouble))
        # 3. say how it goes
        seen += stop - start
        progress.total = tokens * size // seen        # an estimate, exact at the end
        if tokens:
            progress.show(tokens, "tokenising")


def deal(one, runs, folder):
    """Copy the file `one`, run by run [(split, bytes)], to a file for each split."""
    files = {split: open(folder / f"{split}.bin", "wb") for split in SPLITS}
    one.seek(0)
    for split, size in runs:
        while size:
            size -= files[split].write(one.read(min(size, 1 << 20)))
    for file in files.values():
        file.close()


def build(folder, data, files, left, tokenizer, dtype, processes):
    """Tokenise the files into a new folder, with about.json, which says what is there."""
    total, size = len(files) + len(left), sum(file.size for file in files)
    width, end = np.dtype(dtype).itemsize, np.array([tokenizer.end], dtype).tobytes()
    if processes is None:                 # a small corpus is done before a pool has started
        processes = min(8, os.cpu_count()) if size > POOLED else 1
    splits, sizes = bytearray(), array("Q")
    with open(folder / "ids", "w+b") as one, \
            closing(encode_all(files, tokenizer, dtype, processes)) as coded:
        for split, n in write_documents(coded, size, left, one, end):
            splits.append(SPLITS.index(split))
            sizes.append(n)
        said = left_out(left, total)
        if not sizes:
            raise InputError(f"--data {data}: no text was found; {said}{'; ' * bool(said)}{READ}")
        runs = zip((SPLITS[i] for i in splits), sizes)
        if len(sizes) < FEW:
            n = one.tell() // width
            cuts = 0, int(0.8 * n), int(0.9 * n), n
            runs = [(s, (b - a) * width) for s, a, b in zip(SPLITS, cuts, cuts[1:])]
        deal(one, runs, folder)
    os.unlink(folder / "ids")
    tokens = {split: (folder / f"{split}.bin").stat().st_size // width for split in SPLITS}
    about = {"documents": len(sizes), "tokens": tokens, "type": dtype, "left_out": said}
    (folder / "about.json").write_text(json.dumps(about), "utf-8")


# ---------------------------------------------------------------- the cache


def cache_home():
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("NANOEXIT_CACHE") or home / "nanoexit" / "corpus").expanduser()


def prepare(data, tokenizer, processes=None):
    """--data -> the folder of its ids, written at first use, and the content of its about.json."""
    root = fetch_minipile(cache_home() / "minipile") if data == "minipile" else data
    files, left = files_of(root)
    key = repr((FORMAT, files, left, json.dumps(tokenizer.spec)))
    folder = cache_home() / hashlib.sha256(key.encode()).hexdigest()[:20]
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    if not folder.is_dir():
        try:
            with new_folder(folder) as temporary:
                if temporary:
                    build(temporary, data, files, left, tokenizer, dtype, processes)
                    if files_of(root)[0] != files:
                        raise InputError(f"--data {data} changed while it was read; run again")
        except OSError as error:
            if not folder.is_dir():       # else another process was faster
                raise InputError(f"the ids of --data {data} cannot be kept ({error}); set "
                                 f"NANOEXIT_CACHE to a folder with room for them") from None
    return folder, json.loads((folder / "about.json").read_text("utf-8"))


@contextmanager
def new_folder(folder):
    """Gives a temporary folder to fill, which gets the name `folder` at the end.

    One process does so at a time. None if another has done it meanwhile.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone_in(folder.parent) as alone:
        if folder.is_dir():
            yield None
            return
        # some file systems keep a lock from processes of this machine only: so the name has it
        mark = f".{platform.node()}."
        if alone:                         # then this was left by processes that were killed
            for left in folder.parent.glob("[0-9a-f]" * 20 + glob.escape(mark) + "*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(".tmp", folder.name + mark, folder.parent))
        try:
            yield temporary
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def read_corpus(data, tokenizer):
    """--data -> {split: ids (N,)}, uint16 or uint32, mapped from disk and read where looked at."""
    folder, about = prepare(data, tokenizer)
    if about["left_out"]:
        print(f"--data {data}: {about['left_out']}")
    streams = {}
    for split, n in about["tokens"].items():
        path, dtype = folder / f"{split}.bin", about["type"]
        if path.stat().st_size != n * np.dtype(dtype).itemsize:
            raise InputError(f"{path} is damaged; delete the folder and run again")
        streams[split] = torch.from_file(str(path), False, n, dtype=getattr(torch, dtype))
    return streams


def main():
    parser = argparse.ArgumentParser(description="Tokenise a corpus and say what came out.")
    add = parser.add_argument
    add("data", help="a text or .jsonl file, a folder of them, or minipile")
    add("--model", default=TOY, help="folder or official name; its tokenizer (default: the toy's)")
    add("--processes", type=int, help="that tokenise (default: one a core)")
    args = parser.parse_args()
    if args.processes is not None and args.processes < 1:
        raise InputError("--processes must be at least 1")
    tokenizer = Tokenizer.load(locate(args.model))
    folder, about = prepare(args.data, tokenizer, args.processes)
    tokens = ", ".join(f"{n:,} {split}" for split, n in about["tokens"].items())
    print(f"{about['documents']:,} documents; tokens: {tokens}; kept in {folder}")
    if about["left_out"]:
        print(about["left_out"])


if __name__ == "__main__":
    command_line(main)
