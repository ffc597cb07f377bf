"""appendix/corpus.py: which files are read, the same ids as of the uncut text, the cache."""
import json
import os
import platform
import threading
import time

import numpy as np
import pytest
import torch

from appendix import corpus as C
from appendix import runs as R
from appendix.toy import save_model
from conftest import ROOT, TOY, assert_refused, call, run, tiny
from model import Tokenizer
from train import SPLITS, spread_windows, split_of, windows


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOEXIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def ids_of(path, tokenizer):
    """The ids of all splits of a corpus, one after the other."""
    streams = C.read_corpus(str(path), tokenizer)
    return torch.cat([streams[split].long() for split in SPLITS]).tolist()


def coded(path, tokenizer, processes=1):
    """The ids of a text file, piece by piece."""
    files, _ = C.files_of(path)
    results = C.encode_all(files, tokenizer, "uint16", processes)
    return [ids.tolist() for _, (parts, _, _) in results for _, ids in parts]


# ---------------------------------------------------------------- files


def test_which_files_are_read(tmp_path, toy_tokenizer, capsys):
    """Hidden names are left out, links followed once, the mark removed, other encodings said in one
    line."""
    folder, other = tmp_path / "texts", tmp_path / "other"
    for path in (folder / ".git" / "hooks", folder / "sub", other):
        path.mkdir(parents=True)
    texts = {folder / ".git" / "hooks" / "sample": "hidden",
             folder / ".hidden": "hidden", folder / "sub" / "b": "two",
             folder / "a.txt": "\ufeffone \ufeff", folder / "blank": " \n", other / "c.md": "three"}
    for path, text in texts.items():
        path.write_text(text, "utf-8")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "x.parquet").write_bytes(b"PAR1\x15\x04\x15\xff\x81")
    (folder / "broken").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to(folder)
    (folder / "again").symlink_to(folder / "a.txt")
    (folder / "linked").symlink_to(other)
    expected = []
    for text in ("one \ufeff", "three", "two"):               # a.txt, linked/c.md, sub/b
        expected += [*toy_tokenizer.encode(text), toy_tokenizer.end]
    for _ in range(2):                                        # tokenised, and from the cache
        assert ids_of(folder, toy_tokenizer) == expected
        said = "3 of 7 files were left out: 1 cannot be read, 2 not UTF-8 text, e.g. broken"
        assert f"--data {folder}: {said}" in capsys.readouterr().out


def test_nothing_left_is_an_error_that_says_why(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    assert_refused(call(C, folder), "no text was found", ".gz")
    for name in ("a.gz", "b.zst"):
        (folder / name).write_bytes(b"\x1f\x8b\x08\x00\xff")
    assert_refused(call(C, folder),
                   "2 of 2 files were left out: 2 not UTF-8 text, e.g. a.gz", "unpack .gz")
    assert_refused(call(C, folder / "a.gz"), "1 of 1 files")
    assert_refused(call(C, tmp_path / "absent"), "no such file or folder")
    assert os.listdir(tmp_path / "cache") == []               # nothing half-written stays


def test_every_name_has_a_split_and_a_printed_form(tmp_path, toy_tokenizer, capsys):
    name = os.fsdecode(b"caf\xe9.txt")
    assert (split_of(name) in SPLITS
            and split_of("caf\u00e9.txt") == split_of("caf\u00e9.txt".encode()))
    assert C.left_out([(name, "cannot be read")], 3).endswith("e.g. caf\\xe9.txt")
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"text {i}")
    try:
        (folder / name).write_text("more")
    except OSError:
        pytest.skip("this file system wants UTF-8")
    streams = C.read_corpus(str(folder), toy_tokenizer)
    ends = {split: (streams[split].long() == toy_tokenizer.end).sum().item() for split in SPLITS}
    names = [name, *(f"{i}.txt" for i in range(40))]
    assert ends == {split: sum(split_of(n) == split for n in names) for split in SPLITS}


# ---------------------------------------------------------------- ids


@pytest.mark.parametrize("piece", [7, 90, 3000])
def test_a_cut_changes_no_id(tmp_path, monkeypatch, toy_tokenizer, piece):
    """Where a text is cut, and that the ids are those of the whole: hard text, and prose without a
    line end."""
    monkeypatch.setattr(C, "PIECE", piece)
    signs = [*"ab Z9\n\n  \t\r.'-é漢。\u0301\u3000\u2003\u0085\x1c\U0001f600s",
             "<|endoftext|>", "   ", "'s", " the", "\r\n"]
    generator = np.random.default_rng(0)
    texts = ["".join(generator.choice(signs, 2000)) for _ in range(8)]
    texts += ["word of prose, " * 600, "漢字" * 3000,
              (ROOT / "model.py").read_text("utf-8")[:20000]]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}").write_bytes(text.encode())
        pieces = coded(tmp_path / f"{i}", toy_tokenizer)
        assert sum(pieces, []) == toy_tokenizer.encode(text)
        assert len(pieces) > 1 or piece == 3000 or "漢字漢" in text
    assert len(coded(tmp_path / "10", toy_tokenizer)) >= min(100, 18000 // piece)


def test_lines_of_jsonl_are_documents(tmp_path, monkeypatch, toy_tokenizer):
    """Each in its split by its text, whatever the pieces; blank ones are dropped, a bad line is
    named."""
    texts = [f"line {i}\nof é <|endoftext|> " for i in range(100)]
    lines = [json.dumps({"text": text, "meta": {}}) for text in texts]
    lines[50:50] = ["", json.dumps({"text": " "})]
    path = tmp_path / "my.jsonl"
    path.write_text("\ufeff" + "\n".join(lines), "utf-8")
    expected = {split: [] for split in SPLITS}
    for text in texts:
        expected[split_of(text.encode())] += [*toy_tokenizer.encode(text), toy_tokenizer.end]
    for piece in (1 << 20, 200):
        monkeypatch.setattr(C, "PIECE", piece)
        monkeypatch.setattr(C, "FORMAT", piece)               # not from the cache
        streams = C.read_corpus(str(path), toy_tokenizer)
        assert {split: stream.tolist() for split, stream in streams.items()} == expected
    for bad in ('{"text": 1}', '{"words": "x"}', '["text"]', "braces {", "[" * 100000,
                '{"text": "\xff"}', '"text"'):
        path.write_bytes("\n".join([*lines[:70], bad, *lines[70:]]).encode("latin-1"))
        assert_refused(call(C, path), f"{path}, line 71:", "text")


def test_processes_give_the_same_in_the_same_order(tmp_path, monkeypatch, toy_tokenizer):
    monkeypatch.setattr(C, "PIECE", 4000)
    (tmp_path / "code").write_bytes((ROOT / "model.py").read_bytes())
    assert coded(tmp_path / "code", toy_tokenizer, 2) == coded(tmp_path / "code", toy_tokenizer)


def test_a_bad_byte_late_in_a_large_text_leaves_it_out(tmp_path, monkeypatch, toy_tokenizer):
    monkeypatch.setattr(C, "PIECE", 200)
    (tmp_path / "texts").mkdir()
    for name, text in {"a": "first " * 50,
                       "b": "bad " * 500 + "\udcff" + " end" * 500,
                       "c": "last " * 50}.items():
        (tmp_path / "texts" / name).write_bytes(os.fsencode(text))
    expected = [*toy_tokenizer.encode("first " * 50), toy_tokenizer.end,
                *toy_tokenizer.encode("last " * 50)]
    assert ids_of(tmp_path / "texts", toy_tokenizer) == [*expected, toy_tokenizer.end]


def test_windows_of_a_mapped_stream_are_those_of_the_ids(tmp_path, toy_tokenizer):
    (tmp_path / "code").write_bytes((ROOT / "model.py").read_bytes())
    streams = C.read_corpus(str(tmp_path / "code"), toy_tokenizer)
    assert {stream.dtype for stream in streams.values()} == {torch.uint16}
    plain = torch.tensor(streams["train"].tolist())
    draws = [windows(s, 4, 50, torch.Generator().manual_seed(3)) for s in (streams["train"], plain)]
    assert torch.equal(*draws) and draws[0].dtype == torch.long and draws[0].shape == (4, 50)
    assert torch.equal(spread_windows(streams["train"], 20), spread_windows(plain, 20))


# ---------------------------------------------------------------- the cache


def test_the_cache_is_used_and_never_half_written(tmp_path, monkeypatch, toy_tokenizer, cache):
    path = tmp_path / "my.txt"
    path.write_text("one two three " * 40)
    folder, about = C.prepare(str(path), toy_tokenizer)
    before = (folder / "train.bin").stat().st_mtime_ns
    assert C.prepare(str(path), toy_tokenizer) == (folder, about)
    assert (folder / "train.bin").stat().st_mtime_ns == before
    path.write_text("one two seven " * 40)                    # as long as before
    os.utime(path, ns=(0, 0))
    other, _ = C.prepare(str(path), toy_tokenizer)
    assert other != folder and sorted(os.listdir(cache)) == sorted([folder.name, other.name])
    (other / "test.bin").write_bytes(b"12")
    with pytest.raises(ValueError, match="damaged"):
        C.read_corpus(str(path), toy_tokenizer)
    # interrupted, or changed, while it is written: nothing stays
    path.write_text("one two eight " * 40)
    whole = C.deal

    def interrupted(*arguments):
        raise KeyboardInterrupt

    def changed(*arguments):
        path.write_text("changed")
        whole(*arguments)

    for deal, error in ((interrupted, KeyboardInterrupt), (changed, ValueError)):
        monkeypatch.setattr(C, "deal", deal)
        with pytest.raises(error):
            C.prepare(str(path), toy_tokenizer)
    assert sorted(os.listdir(cache)) == sorted([folder.name, other.name])


@pytest.mark.parametrize("locks", [True, False])
def test_of_two_at_once_one_tokenises(tmp_path, monkeypatch, toy_tokenizer, cache, locks, capsys):
    path, whole, dealt, found = tmp_path / "my.txt", C.deal, [], []
    path.write_text("one two three " * 40)
    if not locks:                         # as on Windows: both work, one is kept
        monkeypatch.setattr(R, "lock", lambda folder, wait=False: None)

    def prepare():
        found.append(C.prepare(str(path), toy_tokenizer))

    def slow_deal(*arguments):
        dealt.append(arguments)
        if len(dealt) == 1:
            other.start()
            if locks:
                while "waiting for another process" not in capsys.readouterr().err:
                    time.sleep(0.01)
            else:
                other.join()
        whole(*arguments)

    other = threading.Thread(target=prepare)
    monkeypatch.setattr(C, "deal", slow_deal)
    prepare()
    other.join()
    assert len(dealt) == (1 if locks else 2) and found[0] == found[1]
    assert os.listdir(cache) == [found[0][0].name]


def test_what_a_killed_process_left_goes_and_nothing_else(tmp_path, toy_tokenizer, cache):
    path = tmp_path / "my.txt"
    path.write_text("one two three " * 40)
    key, here = "0123456789" * 2, platform.node()
    for name in ("a.tmp", f"{key}.{here}.abc.tmp", f"{key}.other-{here}.abc.tmp"):
        (cache / name).mkdir(parents=True)
        (cache / name / "ids").write_bytes(b"12")
    folder, _ = C.prepare(str(path), toy_tokenizer)
    stay = ["a.tmp", f"{key}.other-{here}.abc.tmp", folder.name]
    assert sorted(os.listdir(cache)) == sorted(stay)


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "my.txt"
    path.write_text("one two three " * 40)
    monkeypatch.setenv("NANOEXIT_CACHE", str(path))
    assert_refused(call(C, path), "cannot be kept", "NANOEXIT_CACHE")


def test_command_line(tmp_path, monkeypatch):
    (tmp_path / "my.txt").write_text("one two three " * 40)
    status, printed, errors = call(C, tmp_path / "my.txt", "--model", TOY)
    assert status == 0 and "1 documents; tokens: " in printed and "tokens/s" in printed, errors
    assert_refused(call(C, tmp_path / "my.txt", "--processes", 0), "at least 1")


@pytest.mark.slow
def test_train_on_a_corpus_that_takes_processes(tmp_path, cache):
    """10 MB of lines: python train.py starts processes, and its splits are those of one process."""
    text = (ROOT / "model.py").read_text("utf-8")
    with open(tmp_path / "my.jsonl", "w") as file:
        for i in range(400):
            file.write(json.dumps({"text": f"{i} {text}"}) + "\n")
    save_model(tmp_path / "small", tiny(vocab_size=2048), Tokenizer.load(TOY).spec)
    options = ("--model", tmp_path / "small", "--steps", 1, "--batch", 1, "--length", 32,
               "--out", tmp_path / "run")
    status, printed, errors = run("train.py", "--data", tmp_path / "my.jsonl", *options,
                                  NANOEXIT_CACHE=str(cache))
    assert status == 0 and "left out" not in printed, errors
    folder, = cache.iterdir()
    status, printed, _ = run("-m", "appendix.corpus", tmp_path / "my.jsonl", "--processes", 1,
                             NANOEXIT_CACHE=str(tmp_path / "other"))
    assert status == 0
    for name in ("train.bin", "test.bin"):
        assert ((folder / name).read_bytes()
                == (tmp_path / "other" / folder.name / name).read_bytes())
