"""Chapter 6: the main job end to end on small runs, its files, BPE, and what it refuses."""
import json
import signal
import subprocess
import sys
import time

import pytest
import torch

import train as T
from conftest import ROOT, TOY, assert_refused, run, tiny
from heads import ExitHeads, split_of, stdlib_documents
from model import Pythia, Tokenizer

FAST = ("--steps", "3", "--batch", "2", "--length", "64")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A small real corpus, so that the runs below take seconds."""
    path = tmp_path_factory.mktemp("text") / "small.py"
    path.write_text("\n".join(t for _, t in stdlib_documents()[:30])[:60000])
    return path


def test_main_job(tmp_path, text):
    out = tmp_path / "run"
    status, printed, errors = run("train.py", "--layers", "4,8,12", "--data", text, "--out", out, *FAST)
    assert status == 0, errors
    assert sorted(p.name for p in out.iterdir()) == ["heads.safetensors", "metrics.jsonl", "report.png"]
    heads = ExitHeads.load(out / "heads.safetensors", Pythia.from_pretrained(TOY))
    assert heads.layers == [4, 8, 12] and len(heads.calibration) == 50 and len(heads.thresholds(0.95)) == 3
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines[:3]] == [1, 2, 3] and [r["exit"] for r in lines[3:6]] == [4, 8, 12]
    assert all(0 <= r["agreement"] <= 1 and set(r["levels"]) == {"0.80", "0.90", "0.95", "0.98"} for r in lines[3:6])
    assert len(lines[6]["own_greedy_agreement"]) == 3
    assert "agrees with full" in printed and "frozen model's blocks took" in printed
    again = run("train.py", "--layers", "4,8,12", "--data", text, "--out", tmp_path / "again", *FAST)
    assert again[0] == 0
    assert (out / "heads.safetensors").read_bytes() == (tmp_path / "again" / "heads.safetensors").read_bytes()


@pytest.mark.parametrize("data", ["self", "file+self"])
def test_text_of_its_own(tmp_path, data, text):
    data = data.replace("file", str(text))
    status, printed, errors = run("train.py", "--layers", "8", "--head", "block", "--data", data, "--out", tmp_path / "run", *FAST)
    assert status == 0 and "written by the model" in printed and "own greedy text" in printed, errors


def test_evaluate_equals_a_direct_computation():
    model = tiny()
    heads, ids = ExitHeads(model, [1, 3], "mlp"), torch.randint(0, 96, (5, 17))
    found = T.evaluate(model, heads, ids, batch=2)
    full, hidden = model(ids[:, :-1], exits=[1, 3])
    for m, z in enumerate(heads.logits(hidden)):
        p, q = full.softmax(-1), z.softmax(-1)
        assert torch.allclose(found["entropy"][:, m], -(q * q.log()).sum(-1).flatten(), atol=1e-4)
        assert torch.equal(found["agree"][:, m], (z.argmax(-1) == full.argmax(-1)).flatten())
        assert torch.equal(found["right"][:, m], (z.argmax(-1) == ids[:, 1:]).flatten())
        assert found["kl"][m].item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), abs=1e-4)
    assert torch.equal(found["full_right"], (full.argmax(-1) == ids[:, 1:]).flatten())


def test_splits_are_by_document_and_disjoint():
    names = [name for name, _ in stdlib_documents()]
    share = {s: sum(split_of(n) == s for n in names) / len(names) for s in T.SPLITS}
    assert share["train"] > 0.7 and min(share.values()) > 0.05
    assert not any("test" in n.split("/") or "site-packages" in n for n in names)
    tests = [n for n, _ in stdlib_documents(tests=True)]
    assert set(names) <= set(tests)


def test_one_file_is_cut_in_three(text, toy_tokenizer):
    splits = T.load_splits(str(text), toy_tokenizer, 64)
    whole = toy_tokenizer.encode(text.read_text()) + [toy_tokenizer.end]
    assert torch.cat([splits[s] for s in T.SPLITS]).tolist() == whole


def test_bpe_by_hand():
    """The textbook example: 'ab' is the most frequent pair, then 'abab' can only come from 'ab' + 'ab'."""
    spec = T.train_bpe(["abab abab abab cab"], 2 + 243 + 23 + 3)
    assert spec["model"]["merges"][:2] == ["a b", "ab ab"]
    tokenizer = Tokenizer(spec)
    assert tokenizer.decode(tokenizer.encode("  abab cab\n<|endoftext|>")) == "  abab cab\n<|endoftext|>"
    assert len(tokenizer.encode("abab")) == 1 and tokenizer.vocab_size == 271


def test_bpe_equals_a_naive_trainer():
    texts = [t for _, t in stdlib_documents()[:3]]
    merges = T.train_bpe([t[:3000] for t in texts], 2 + 243 + 23 + 40)["model"]["merges"]
    letters = T.byte_letters()
    words = T.Counter(w for t in texts for part in T.re.split(" {2,24}", t[:3000]) for w in T.re.findall(
        r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+", part))
    pieces = {w: [letters[b] for b in w.encode()] for w in words}
    for merge in merges:
        count = T.Counter()
        for w, p in pieces.items():
            for pair in zip(p, p[1:]):
                count[pair] += words[w]
        best = min(count, key=lambda pair: (-count[pair], pair))
        assert merge == " ".join(best)
        for w, p in pieces.items():
            i = 0
            while i < len(p) - 1:
                if (p[i], p[i + 1]) == best:
                    p[i:i + 2] = ["".join(best)]
                i += 1


def test_orthogonalize():
    for shape in ((3, 16, 40), (2, 40, 16)):
        x = T.orthogonalize(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))
        s = torch.linalg.svdvals(x)
        assert x.shape == shape and 0.6 < s.min() and s.max() < 1.3       # Newton-Schulz steps aim at 1, loosely


def test_muon_takes_the_blocks_matrices_and_adamw_all_the_rest():
    model = tiny()
    heads = ExitHeads(model, [1, 3], "block")
    muon = T.Muon([head.block for head in heads.heads])
    mine, others = [p for stack in muon.stacks for p in stack], muon.others(heads)
    assert len(mine) == 8 and all(p.dim() == 2 for p in mine)
    assert sorted(map(id, mine + others)) == sorted(map(id, heads.parameters()))
    before = [p.clone() for p in heads.parameters()]
    batches = iter([torch.randint(0, 96, (2, 20)) for _ in range(3)])
    T.train_heads(model, heads, batches, 3, 1e-3, T.kl, [])
    assert not any(torch.equal(a, b) for a, b in zip(before, heads.parameters()))
    assert T.Muon([]).stacks == [] and len(T.Muon([]).others(heads)) == len(before)


def test_backbone_training_writes_a_loadable_folder(tmp_path, monkeypatch, capsys):
    some = stdlib_documents()[:60]                                        # few files, so that it takes seconds
    monkeypatch.setattr(T, "stdlib_documents", lambda tests=False: some)
    T.train_backbone(tmp_path / "toy", 8192, 0, False)
    model, tokenizer = Pythia.from_pretrained(tmp_path / "toy"), Tokenizer.load(tmp_path / "toy")
    assert model.config.num_hidden_layers == 16 and tokenizer.vocab_size == 2048
    printed = capsys.readouterr().out
    assert "nats per token" in printed and "bits per byte" in printed


@pytest.mark.parametrize("layers, words", [("0,4", "between 1 and 15"), ("4,16", "between 1 and 15"), ("8,4", "increasing"),
                                           ("4,4", "increasing"), ("", "whole numbers"), ("four", "whole numbers"),
                                           ("4,,8", "whole numbers")])
def test_bad_layers(layers, words, tmp_path):
    assert_refused(run("train.py", f"--layers={layers}", "--out", tmp_path / "run"), words)
    assert not (tmp_path / "run").exists()


def test_bad_text(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81")
    (tmp_path / "folder").mkdir()
    for name, words in (("empty.txt", "0 tokens"), ("short.txt", "fewer than one window"), ("binary", "not UTF-8"),
                        ("folder", "0 tokens"), ("absent", "no such file or folder")):
        assert_refused(run("train.py", "--data", tmp_path / name, "--out", tmp_path / "run"), words)
    assert not (tmp_path / "run").exists()


def test_other_bad_options(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert_refused(run("train.py", "--out", tmp_path / "file"), "not a folder")
    assert_refused(run("train.py", "--backbone", "--tokens", "100", "--out", tmp_path / "b"), "at least 4,096")
    assert_refused(run("train.py", "--steps", "0"), "must be positive")
    assert_refused(run("train.py", "--model", "nosuch"), "neither a folder nor an official name")
    assert_refused(run("train.py", "--head", "huge"), "invalid choice")
    if not torch.cuda.is_available():
        assert_refused(run("train.py", "--device", "cuda", "--steps", "1"), "device")


def test_ctrl_c_keeps_what_was_trained_and_a_kill_leaves_old_files(tmp_path, text):
    out = tmp_path / "run"
    out.mkdir()
    (out / "heads.safetensors").write_bytes(b"old")
    command = [sys.executable, "-u", "train.py", "--layers", "8", "--data", str(text), "--out", str(out), "--steps", "100000",
               "--batch", "2", "--length", "64"]
    for number in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True,   # a background job ignores Ctrl-C
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        assert "linear heads at layers 8" in process.stdout.readline()
        time.sleep(3)
        process.send_signal(number)
        printed, _ = process.communicate(timeout=120)
        if number == signal.SIGKILL:
            assert (out / "heads.safetensors").read_bytes() == b"old"
    assert process.returncode == 0 and "interrupted after" in printed and f"wrote {out}" in printed
    assert ExitHeads.load(out / "heads.safetensors", Pythia.from_pretrained(TOY)).layers == [8]
