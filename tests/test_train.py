"""Chapter 6: the main job end to end on small runs, its files, its text, and what it refuses."""
import json
import math
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train as T
from appendix.corpus import read_corpus
from appendix.runs import RunFolder
from appendix.team import Team
from appendix.toy import save_model
from conftest import ROOT, TOY, assert_refused, call, run, tiny
from confidence import MEASURES
from heads import ExitHeads, evaluate, measuring_text
from model import Pythia, Tokenizer

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"),
                                reason="torch has Muon from 2.9 on")
FAST = ("--steps", 3, "--batch", 2, "--length", 64)


def learn(model, heads, batches, steps, folder, **options):
    """Train heads on batches -> the Training, when all is done or Ctrl-C came."""
    args = SimpleNamespace(steps=steps, lr=1e-3, loss="kl", accumulate=1, positions=1, seed=0)
    vars(args).update(options)
    training = T.Training(model, heads, args, Team())
    assert T.train_heads(training, batches, RunFolder(folder))
    return training


@pytest.fixture(scope="session")
def library():
    return T.stdlib_documents()


@pytest.fixture(scope="session")
def text(tmp_path_factory, library):
    """A small real corpus, so that the runs below take seconds."""
    path = tmp_path_factory.mktemp("text") / "small.py"
    path.write_text("\n".join(text for _, text in library[:30])[:60000])
    return path


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The folder of a random model of 4 blocks with the toy's tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    save_model(folder, tiny(vocab_size=2048, max_position_embeddings=72), Tokenizer.load(TOY).spec)
    return folder


@pytest.fixture(scope="session")
def small_run(tmp_path_factory, small, text):
    """The run folder of linear heads at layers 1 and 3 of `small`."""
    out = tmp_path_factory.mktemp("run")
    options = ("--model", small, "--layers", "1,3", "--data", text, "--out", out)
    status, _, errors = call(T, *options, *FAST)
    assert status == 0, errors
    return out


# ---------------------------------------------------------------- runs


def check_main_job(model, text, out):
    """Run the main job with exits at 4, 8 and 12 of 16 blocks, and look at all that it leaves."""
    status, printed, errors = call(T, "--model", model, "--layers", "4,8,12", "--data", text,
                                   "--out", out, *FAST)
    assert status == 0, errors
    files = sorted(p.name for p in out.iterdir())
    assert files == ["heads.safetensors", "metrics.jsonl", "report.png"]
    heads = ExitHeads.load(out / "heads.safetensors", Pythia.from_pretrained(model))
    assert heads.layers == [4, 8, 12] and heads.measure == "entropy"
    assert len(heads.calibration) == 50 and len(heads.thresholds(0.95)) == 3
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines[:3]] == [1, 2, 3]
    assert [r["exit"] for r in lines[3:6]] == [4, 8, 12]
    for record in lines[3:6]:
        assert 0 <= record["agreement"] <= 1
        assert set(record["levels"]) == {"0.80", "0.90", "0.95", "0.98"}
    assert len(lines[6]["own_greedy_agreement"]) == 3
    pace, limit = map(
        int, re.search(r"ran at (\d+)% of the .* alone it would be (\d+)%", printed).groups())
    shares = re.search(r"blocks took (\d+)% .* heads (\d+)%, the optimizer (\d+)%; ", printed)
    assert 0 < pace <= 100 and 0 < limit < 100 and 98 <= sum(map(int, shares.groups())) <= 102
    assert 0.05 < float(re.search(r"; peak memory (.*) GB", printed)[1]) < 100
    assert "agrees with full" in printed
    assert "mean entropy (nats)" in printed and "threshold (nats)" in printed


def test_main_job(tmp_path, text):
    deep = tiny(vocab_size=2048, num_hidden_layers=16, max_position_embeddings=72)
    save_model(tmp_path / "deep", deep, Tokenizer.load(TOY).spec)
    check_main_job(tmp_path / "deep", text, tmp_path / "run")


@pytest.mark.slow
def test_main_job_on_the_toy(tmp_path, text):
    check_main_job(TOY, text, tmp_path / "run")


def test_the_same_seed_gives_the_same_heads(tmp_path, small, small_run, text):
    options = ("--model", small, "--layers", "1,3", "--data", text, "--out", tmp_path)
    status, _, errors = call(T, *options, *FAST)
    assert status == 0, errors
    names = [folder / "heads.safetensors" for folder in (small_run, tmp_path)]
    assert names[0].read_bytes() == names[1].read_bytes()


@pytest.mark.parametrize("data", ["self", "file+self"])
def test_text_of_its_own(tmp_path, data, text, small):
    data = data.replace("file", str(text))
    options = ("--model", small, "--layers", 2, "--head", "block", "--data", data)
    status, printed, errors = call(T, *options, "--out", tmp_path / "run", *FAST)
    assert status == 0, errors
    assert "written by the model" in printed and "own greedy text" in printed


def test_the_model_writes_on_after_short_prefixes(tmp_path, small):
    model, splits = Pythia.from_pretrained(small), {"train": torch.arange(300)}
    for length in (2, 9, 17, 64):
        written = T.written_splits(model, splits, ("train",), 0, length, 200, seed=0)["train"]
        assert written.shape == (max(8, 200 // length), length)
        follows = (written[:, 1:] == written[:, :-1] + 1).float().mean(0)    # 1 within the prefix
        P = min(32, length // 2)
        assert (follows[:P - 1] == 1).all() and (follows[P - 1:] < 0.5).all()


def test_what_is_no_number_is_shown_as_such(capsys, small_run, small):
    model = Pythia.from_pretrained(small)
    heads = ExitHeads.load(small_run / "heads.safetensors", model)
    test = evaluate(model, heads, torch.randint(2048, (2, 33)), {"entropy": MEASURES["entropy"]})
    test.kl[0] = test.uncertainty["entropy"][3, 1] = math.nan
    records = T.records_of(heads, test, T.test_levels(heads, test))
    T.describe(model, heads, test, records)
    assert [r["kl_nats"] is None for r in records] == [True, False]
    assert capsys.readouterr().out.count("nan") == 2 and json.dumps(records, allow_nan=False)


def test_calibrating_anew_leaves_a_checkpoint_alone(tmp_path, small, small_run, text):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"of a run that was stopped")
    options = ("--model", small, "--start", small_run / "heads.safetensors", "--data", text)
    assert call(T, *options, "--steps", 0, "--length", 64, "--out", tmp_path)[0] == 0
    assert (tmp_path / "checkpoint.safetensors").exists()


def test_heads_are_calibrated_anew_for_another_measure(tmp_path, small, small_run, text):
    start = small_run / "heads.safetensors"
    options = ("--model", small, "--start", start, "--data", text, "--length", 64)
    status, printed, errors = call(T, *options, "--steps", 0, "--measure", "margin",
                                   "--out", tmp_path)
    assert status == 0, errors
    assert "mean uncertainty (margin)" in printed and "training time" not in printed
    before, after = load_file(start), load_file(tmp_path / "heads.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    model = Pythia.from_pretrained(small)
    old, heads = ExitHeads.load(start, model), ExitHeads.load(tmp_path / "heads.safetensors", model)
    assert heads.measure == "margin" and heads.kind == "linear" and heads.layers == [1, 3]
    assert heads.calibration != old.calibration
    assert all(t is None or -1 <= t <= 0 for row in heads.calibration.values() for t in row)


def test_training_goes_on_from_a_heads_file(tmp_path, small, small_run):
    start, model = small_run / "heads.safetensors", Pythia.from_pretrained(small)
    args = SimpleNamespace(start=start, head="linear", layers=[1, 3], measure=None)
    heads = T.make_heads(args, model)
    assert heads.measure == "entropy" and not heads.calibration
    before = load_file(start)
    assert all(torch.equal(p, before[name].float()) for name, p in heads.named_parameters())
    learn(model, heads, iter(torch.randint(0, 2048, (1, 2, 20))), 1, tmp_path)
    assert not any(torch.equal(p, before[name].float()) for name, p in heads.named_parameters())
    options = ("--model", small, "--start", start, "--out", tmp_path / "run")
    assert_refused(call(T, *options, "--head", "block"), "holds linear heads at layers 1, 3")
    assert_refused(call(T, *options, "--layers", "2"), "leave --head and --layers out")


# ---------------------------------------------------------------- text


def test_splits_are_by_document_and_disjoint(library):
    names = [name for name, _ in library]
    share = {s: sum(T.split_of(n) == s for n in names) / len(names) for s in T.SPLITS}
    assert share["train"] > 0.7 and min(share.values()) > 0.05
    assert not any("test" in n.split("/") or "site-packages" in n for n in names)
    tests = [n for n, _ in T.stdlib_documents(tests=True)]
    assert set(names) <= set(tests)


def test_one_file_is_cut_in_three(text, toy_tokenizer):
    splits = T.load_splits(str(text), toy_tokenizer, 64, read_corpus)
    whole = toy_tokenizer.encode(text.read_text()) + [toy_tokenizer.end]
    assert torch.cat([splits[s] for s in T.SPLITS]).tolist() == whole


def test_a_file_that_moved_is_not_learned():
    lines = [f"    this_is_a_long_line_of_code({i}, and=more)" for i in range(15)]
    moved = [f"train_{i}.py" for i in range(40) if T.split_of(f"train_{i}.py") == "train"]
    documents = [(moved[0], "\n".join(lines)),                # 15 long lines of the measured text
                 (moved[1], "\n".join(lines[:14] * 2)),       # 14 of them, twice
                 (moved[2], "short lines\n" * 50)]
    held_out = next(f"{i}.py" for i in range(100) if T.split_of(f"{i}.py") == "test")
    measured = ["short lines\n" * 50, "\n".join(line.strip() for line in lines)]
    kept = T.unmeasured(documents + [(held_out, "other")], measured)
    assert [name for name, _ in kept] == moved[1:3]


def test_the_library_is_measured_on_the_text_that_is_everyones(library, toy_tokenizer):
    few = [d for d in library if T.split_of(d[0]) == "train"][:5]
    splits = T.stdlib_splits(few, toy_tokenizer)
    for split in ("calibration", "test"):
        assert torch.equal(splits[split], measuring_text(split))
    assert 0 < len(splits["train"]) <= len(T.tokens_of(few, toy_tokenizer))


# ---------------------------------------------------------------- training


@needs_muon
def test_muon_takes_the_blocks_matrices_and_adamw_all_the_rest(tmp_path):
    model = tiny()
    heads = ExitHeads(model, [1, 3], "block")
    optimizer = T.Optimizer(heads, [head.block for head in heads.heads], 1e-3, 1e-2)
    adamw, muon = [part.param_groups[0]["params"] for part, _ in optimizer.parts]
    assert len(muon) == 8 and all(p.dim() == 2 for p in muon)
    assert sorted(map(id, adamw + muon)) == sorted(map(id, heads.parameters()))
    before = [p.clone() for p in heads.parameters()]
    batches = iter([torch.randint(0, 96, (2, 20)) for _ in range(3)])
    learn(model, heads, batches, 3, tmp_path)
    assert not any(torch.equal(a, b) for a, b in zip(before, heads.parameters()))
    without = T.Optimizer(heads, [], 1e-3, 1e-2)
    assert [len(part.param_groups[0]["params"]) for part, _ in without.parts] == [len(before)]


@needs_muon
def test_a_step_of_muon_is_nearly_orthogonal():
    torch.manual_seed(0)
    for rows, columns in ((16, 40), (40, 16)):
        layer = torch.nn.Linear(columns, rows, bias=False)
        module = torch.nn.ModuleList([layer, torch.nn.Linear(2, 2)])
        before = layer.weight.detach().clone()
        optimizer = T.Optimizer(module, [layer], 1e-3, 0.1)
        layer.weight.grad = torch.randn(rows, columns)
        optimizer.step(0.5)
        # decoupled weight decay of 0.01, then the step; tall matrices move more
        step = (before * (1 - 0.01 * 0.05) - layer.weight) / 0.05 / max(1, rows / columns) ** 0.5
        s = torch.linalg.svdvals(step.detach())
        assert 0.6 < s.min() and s.max() < 1.3       # Newton-Schulz steps aim at 1, loosely


def test_without_muon_adamw_trains_all(monkeypatch, capsys):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    heads = ExitHeads(tiny(), [1, 3], "block")
    optimizer = T.Optimizer(heads, [head.block for head in heads.heads], 1e-3, 1e-2)
    assert "this torch has no Muon" in capsys.readouterr().out
    (adamw, _), = optimizer.parts
    assert len(adamw.param_groups[0]["params"]) == len(list(heads.parameters()))


def test_ctrl_c_ends_training_only(capsys, tmp_path):
    def interrupted():
        for _ in range(2):
            yield torch.randint(0, 96, (2, 20))
        raise KeyboardInterrupt

    model = tiny()
    training = learn(model, ExitHeads(model, [1, 3]), interrupted(), 10, tmp_path)
    assert [m["step"] for m in training.metrics] == [1, 2]
    assert "interrupted after 2 steps" in capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_trained_and_a_kill_leaves_old_files(tmp_path, text, small):
    out = tmp_path / "run"
    out.mkdir()
    (out / "heads.safetensors").write_bytes(b"old")
    options = ["--model", small, "--layers", 2, "--data", text, "--out", out, "--steps", 100000,
               "--batch", 2, "--length", 64]
    command = [sys.executable, "-u", "train.py", *map(str, options)]

    def listen():                                    # a background job ignores Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True,
                                   preexec_fn=listen)
        # until its heads are made, or until it trains
        started = "linear heads at layers 2" if number == signal.SIGKILL else "step "
        while not process.stdout.readline().startswith(started):
            assert process.poll() is None
        process.send_signal(number)
        printed, _ = process.communicate(timeout=120)
        if number == signal.SIGKILL:
            assert (out / "heads.safetensors").read_bytes() == b"old"
    assert process.returncode == 0
    assert "interrupted after" in printed and f"wrote {out}" in printed
    assert ExitHeads.load(out / "heads.safetensors", Pythia.from_pretrained(small)).layers == [2]


def test_no_report_of_an_earlier_run_stays_beside_new_heads(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "report.png").write_bytes(b"old")
    (out / "notes.txt").write_text("not ours")
    with RunFolder(out) as folder:
        folder.write(ExitHeads(tiny(), [1]), [{"step": 1}], None, None)
    files = sorted(p.name for p in out.iterdir())
    assert files == ["heads.safetensors", "metrics.jsonl", "notes.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


# ---------------------------------------------------------------- what is refused


def test_bad_layers(tmp_path):
    cases = {"0,4": "between 1 and 15", "4,16": "between 1 and 15",
             "8,4": "increasing", "4,4": "increasing",
             "": "whole numbers", "four": "whole numbers", "4,,8": "whole numbers"}
    for layers, words in cases.items():
        assert_refused(call(T, f"--layers={layers}", "--out", tmp_path / "run"), words)
    assert not (tmp_path / "run").exists()


def test_bad_text(tmp_path, small):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81")
    (tmp_path / "folder").mkdir()
    cases = {"empty.txt": "no text was found", "short.txt": "fewer than one window",
             "binary": "not UTF-8", "folder": "no text was found",
             "absent": "no such file or folder"}
    for name, words in cases.items():
        options = ("--model", small, "--data", tmp_path / name, "--out", tmp_path / "run")
        assert_refused(call(T, *options), words)
    assert not (tmp_path / "run").exists()


def test_other_bad_options(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert_refused(run("train.py", "--out", tmp_path / "file"), "not a folder")
    assert_refused(call(T, "--steps", 0), "must be positive")
    assert_refused(call(T, "--start", TOY / "heads.safetensors", "--steps", -1), "must be positive")
    assert_refused(call(T, "--start", "lense"), "neither lens, random nor a heads file")
    assert_refused(call(T, "--start", TOY / "config.json"), "cannot be read as a heads file")
    assert_refused(call(T, "--model", "nosuch"), "neither a folder nor an official name")
    assert_refused(call(T, "--head", "huge"), "invalid choice")
    assert_refused(call(T, "--measure", "doubt"), "invalid choice")
    if not torch.cuda.is_available():
        assert_refused(call(T, "--device", "cuda", "--steps", 1), "device")
