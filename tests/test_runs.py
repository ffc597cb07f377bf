"""The folder of a run, checkpoints, several processes, and runs that end badly."""
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import train as T
from appendix.runs import RunFolder, read_checkpoint
from appendix.toy import save_model
from conftest import ROOT, TOY, assert_refused, call, shaken, tiny
from heads import ExitHeads
from model import InputError, Pythia, Tokenizer


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "small.py"
    path.write_text("\n".join(text for _, text in T.stdlib_documents()[:30])[:60000])
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    save_model(folder, tiny(vocab_size=2048, max_position_embeddings=72), Tokenizer.load(TOY).spec)
    return folder


@pytest.fixture
def options(small, text):
    return ("--model", small, "--layers", "1,3", "--data", text, "--length", 32, "--batch", 2)


def weights(out):
    return load_file(out / "heads.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- stop and go on


@pytest.mark.parametrize("head", ["linear", pytest.param("block", marks=pytest.mark.slow)])
def test_stopped_and_resumed_is_uninterrupted(tmp_path, options, head, monkeypatch):
    options = (*options, "--head", head, "--steps", 6, "--positions", 0.5)
    status, _, errors = call(T, *options, "--out", tmp_path / "whole")
    assert status == 0, errors
    # SIGTERM arrives in the third step; the run ends after it
    step = T.Training.step

    def terminated(self, batches, notice):
        if len(self.metrics) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batches, notice)

    monkeypatch.setattr(T.Training, "step", terminated)
    status, printed, _ = call(T, *options, "--out", tmp_path / "parts")
    assert status == 143 and "stopped after 4 steps: --resume" in printed
    assert [p.name for p in (tmp_path / "parts").iterdir()] == ["checkpoint.safetensors"]
    monkeypatch.undo()
    # other settings are refused, the same ones go on
    resume = (*options, "--out", tmp_path / "parts", "--resume")
    assert_refused(call(T, *resume, "--lr", 0.1), "of a run with lr 0.002, now it is 0.1")
    status, printed, errors = call(T, *resume)
    assert status == 0, errors
    assert "going on after step 4" in printed
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert lines[0] == lines[1]
    assert not (tmp_path / "parts" / "checkpoint.safetensors").exists()


def test_a_damaged_checkpoint_is_refused(tmp_path, options):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"damaged")
    assert_refused(call(T, *options, "--out", tmp_path, "--resume"), "cannot be read")
    status, printed, _ = call(T, *options, "--out", tmp_path, "--steps", 1)
    assert status == 0 and "will be overwritten" in printed


@pytest.mark.slow
def test_killed_at_any_moment_a_run_goes_on(tmp_path, options):
    options = [*map(str, options), "--steps", "60"]
    code = "import train; train.CHECKPOINT = 0; train.command_line(train.main)"
    command = [sys.executable, "-u", "-c", code, *options, "--out", str(tmp_path / "killed")]
    checkpoint = tmp_path / "killed" / "checkpoint.safetensors"
    for wait in (0.0, 0.03):
        process = subprocess.Popen([*command, "--resume"], cwd=ROOT, stdout=subprocess.DEVNULL)
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before:
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(wait)
        process.kill()
        process.wait()
        assert len(read_checkpoint(checkpoint)[1]["metrics"]) > 0
    subprocess.run([*command, "--resume"], cwd=ROOT, check=True, capture_output=True)
    assert call(T, *options, "--out", tmp_path / "whole")[0] == 0
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


# ---------------------------------------------------------------- several batches and processes


@pytest.fixture(scope="module")
def doubled(tmp_path_factory, small, text):
    """The heads of one process with batches of 8."""
    out = tmp_path_factory.mktemp("doubled")
    options = ("--model", small, "--layers", "1,3", "--data", text, "--length", 32, "--steps", 4)
    assert call(T, *options, "--batch", 8, "--out", out)[0] == 0
    return out


def close(out, doubled):
    one, other = weights(out), weights(doubled)
    return all((one[name].float() - other[name].float()).abs().max() < 2e-3 for name in one)


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line["loss_nats"] for line in lines if "loss_nats" in line])


def test_accumulated_batches_equal_one_large_one(tmp_path, options, doubled):
    status, _, errors = call(T, *options, "--accumulate", 4, "--steps", 4, "--out", tmp_path)
    assert status == 0, errors
    assert (losses(tmp_path) - losses(doubled)).abs().max() < 2e-5 and close(tmp_path, doubled)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_learn_what_one_does(tmp_path, options, doubled, accumulate):
    options = [*map(str, options), "--batch", str(4 // accumulate), "--steps", "4"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
               "--master_port=29713", "train.py", *options, "--accumulate", str(accumulate),
               "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("agrees with full") == 1
    out = tmp_path / "run"
    assert (losses(out) - losses(doubled)).abs().max() < 2e-5 and close(out, doubled)
    records = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
                if "exit" in line] for folder in (out, doubled)]
    for one, other in zip(*records):
        assert one["agreement"] == pytest.approx(other["agreement"], abs=0.002)


# ---------------------------------------------------------------- runs that end badly


def test_only_this_process_files_are_touched(tmp_path, options):
    (tmp_path / "run.tmp").mkdir()
    (tmp_path / "run.tmp" / "mine").write_text("a user's own")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.png").write_bytes(b"of an earlier run")
    # nothing can be made beside --out, as on the root of a mount
    os.chmod(tmp_path, 0o555)
    status, _, errors = call(T, *options, "--steps", 1, "--out", tmp_path / "run")
    os.chmod(tmp_path, 0o755)
    assert status == 0, errors
    assert (tmp_path / "run.tmp" / "mine").read_text() == "a user's own"
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == ["heads.safetensors", "metrics.jsonl", "report.png"]
    assert (tmp_path / "run" / "report.png").read_bytes() != b"of an earlier run"


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no second mount here")
def test_out_on_another_mount(options):
    import tempfile
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        assert call(T, *options, "--steps", 1, "--out", folder)[0] == 0
        assert "heads.safetensors" in os.listdir(folder)


def test_one_run_writes_at_a_time(tmp_path, options):
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert_refused(call(T, *options, "--out", tmp_path), "another run writes there")
    os.close(handle)
    assert_refused(call(T, *options, "--out", "/"), "root of all folders")


def test_a_full_folder_costs_no_heads(tmp_path, monkeypatch):
    heads, save = ExitHeads(tiny(), [1]), ExitHeads.save

    def full(self, path):
        if str(path).startswith(str(tmp_path / "run")):
            raise OSError(28, "No space left on device")
        save(self, path)

    monkeypatch.setattr(ExitHeads, "save", full)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with RunFolder(tmp_path / "run") as folder:
        (tmp_path / "run" / "heads.safetensors").write_bytes(b"old")
        with pytest.raises(InputError, match="the trained heads are in") as error:
            folder.write(heads, [{"step": 1}], None, None)
    kept = str(error.value).split(" are in ")[-1]
    assert equal(load_file(kept), {name: p.half() for name, p in heads.named_parameters()})
    assert (tmp_path / "run" / "heads.safetensors").read_bytes() == b"old"
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["heads.safetensors"]


@pytest.mark.parametrize("trouble", [KeyboardInterrupt, MemoryError, ZeroDivisionError])
def test_once_trained_heads_are_kept(tmp_path, options, monkeypatch, trouble):
    def fails(*_):
        raise trouble("in the test")

    monkeypatch.setattr(T, "own_greedy_agreement", fails)
    status, printed, errors = call(T, *options, "--steps", 1, "--out", tmp_path)
    heads = ExitHeads.load(tmp_path / "heads.safetensors", Pythia.from_pretrained(options[1]))
    assert heads.calibration and not (tmp_path / "report.png").exists()
    if trouble is KeyboardInterrupt:
        assert status == 0 and "the heads are kept" in printed
    else:
        assert status == 2 and f"{trouble.__name__}: in the test" in errors


def test_a_diverged_run_replaces_nothing(tmp_path, options):
    (tmp_path / "heads.safetensors").write_bytes(b"good")
    for steps in (1, 4):
        result = call(T, *options, "--steps", steps, "--lr", 1e30, "--out", tmp_path)
        assert_refused(result, "training diverged")
    assert (tmp_path / "heads.safetensors").read_bytes() == b"good"


def test_short_texts_and_contexts_are_fitted(tmp_path, text):
    for context in (6, 24):
        model = tiny(vocab_size=2048, max_position_embeddings=context)
        save_model(tmp_path / "short", model, Tokenizer.load(TOY).spec)
        status, _, errors = call(T, "--model", tmp_path / "short", "--layers", 2, "--data", text,
                                 "--steps", 1, "--batch", 2, "--out", tmp_path / "run")
        assert status == 0, errors


# ---------------------------------------------------------------- logits that are not numbers


@pytest.fixture(scope="module")
def damaged(small, tmp_path_factory):
    """The folder of `small` with one weight that is not a number."""
    folder = tmp_path_factory.mktemp("damaged")
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes((small / name).read_bytes())
    tensors = load_file(small / "model.safetensors")
    tensors["gpt_neox.layers.2.mlp.dense_h_to_4h.weight"][5, 7] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_what_is_not_a_number_is_never_written_nor_learned(tmp_path, damaged, text):
    import dssd
    import model as M
    words = "not numbers in float32; use float32 or bfloat16"
    for temperature in (0, 0.8):
        assert_refused(
            call(M, "--prompt", "def f(", "--model", damaged, "--temperature", temperature), words)
    options = ("--model", damaged, "--layers", 1, "--data", text, "--steps", 1, "--length", 32)
    assert_refused(call(T, *options, "--out", tmp_path / "run"), words)
    assert not (tmp_path / "run").exists()
    model = Pythia.from_pretrained(damaged)
    heads = shaken(model, [1, 3])
    for policy in (dssd.Plain(), dssd.LayerSkip(heads, 1, 2), dssd.DSSD(heads, [1e9, 1e9]),
                   dssd.EarlyExit(heads, [None, None])):
        for temperature in (0.0, 0.8):
            with pytest.raises(InputError, match="not numbers"):
                dssd.generate(model, [1, 2, 3], 8, policy, temperature=temperature)


def test_what_is_not_a_number_agrees_with_nothing(damaged):
    from heads import evaluate
    model = Pythia.from_pretrained(damaged)
    found = evaluate(model, ExitHeads(model, [1, 3]), torch.randint(0, 2048, (2, 9)), {})
    assert not found.agree.any() and (found.choice[:, -1] == -1).all()
