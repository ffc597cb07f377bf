"""Every chapter and room that measures runs on another model: --model, --heads and --data, in a
small context."""
import json

import pytest
import torch

import bench
import confidence
import dssd
import eero
import heads as chapter_heads
from appendix import certified, scale, tasks, tune
from appendix.toy import save_model
from conftest import ROOT, SHARED, assert_refused, call, shaken, tiny
from heads import HeldOut, held_out_prompts, measuring_windows
from model import TOY, InputError, Pythia, read_json

CALIBRATION = {"0.80": [5.0, 6.0], "0.90": [4.0, 5.0], "0.95": [None, 4.0]}
# blocks, and the unembedding
FULL = 3 + 2048 / (12 * 32)


def saved(folder, spec, calibration=CALIBRATION, layers=(1, 2), **changes):
    """The options of a tiny random model in a folder, and of its heads in a file elsewhere."""
    save_model(folder / "model",
               tiny(**{"vocab_size": 2048, "num_hidden_layers": 3, **changes}), spec)
    heads = shaken(Pythia.from_pretrained(folder / "model"), layers)
    heads.calibration = calibration
    heads.save(folder / "mine.safetensors")
    return "--model", folder / "model", "--heads", folder / "mine.safetensors"


@pytest.fixture(scope="module")
def small(tmp_path_factory, toy_tokenizer):
    """Three blocks, a context of 24 tokens."""
    return saved(tmp_path_factory.mktemp("small"), toy_tokenizer.spec, max_position_embeddings=24)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "my.txt"
    path.write_text((ROOT / "model.py").read_text("utf-8"), "utf-8")
    return "--data", path


def last(out):
    return json.loads(out.splitlines()[-1])


def check_table(out):
    """dssd.py: Plain runs all blocks; what is lossless writes Plain's text."""
    assert "prompts have 12, 6 follow" in out
    rows = {line[:15].strip(): line[15:].split() for line in out.splitlines() if line.endswith("%")}
    assert float(rows["Plain"][-2]) == 3 and rows["DSSD"][-1] == rows["LayerSkip 2x4"][-1] == "100%"


def check_bench(out):
    record = last(out)
    policies = record["greedy"]["policies"]
    assert "one block at 8 cached positions" in out and record["options"]["max_new_tokens"] == 3
    assert policies["DSSD 0.80"]["same_text"] == policies["DSSD auto"]["same_text"] == 1
    assert policies["Plain"]["cost_per_token_blocks"] == pytest.approx(FULL)


RUNS = {
    "heads": (chapter_heads, ("--tokens", 256),
              lambda out: f"240 held-out tokens; a full token costs {FULL:.2f} blocks" in out),
    "confidence": (confidence, ("--tokens", 256),
                   lambda out: "240 calibration and 240 test tokens" in out),
    "eero": (eero, ("--tokens", 257, "--prompts", 1, "--beta", 5),
             lambda out: (f"{FULL:.2f} for the model without exits" in out
                          and "1 test prompts x 13 tokens" in out)),
    "dssd": (dssd, ("--prompts", 1, "--max-new-tokens", 6), check_table),
    "certified": (certified, ("--tokens", 256), lambda out: "on 240 test tokens" in out),
    "tasks": (tasks, ("--limit", 8),
              lambda out: last(out)["tasks"]["code"]["scored_tokens"] == 8 * 24),
    "tune": (tune, ("--repeats", 1), lambda out: "12 positions cached" in out),
    "hard texts": (tune, ("--repeats", 1, "--prompts", 1, "--hard"),
                   lambda out: out.count(f"\ncode{11:>12}") == 4),
    "peers": (scale, ("--prompts", 1, "--repeats", 1, "--level", 0.8),
              lambda out: last(out)["options"]["max_new_tokens"] == 13),
    "growth": (scale, ("--growth", "--widths", 1, "--repeats", 1, "--level", 0.8,
                       "--max-new-tokens", 3),
               lambda out: ([row[0] for row in last(out)["depth"]] == [1, 2]
                            and last(out)["context"][0][0] == 12)),
    "bench": (bench, ("--prompts", 1, "--repeats", 1, "--max-new-tokens", 3), check_bench),
}


SLOW = "hard texts", "growth", "bench"    # seconds: the help topics are encoded, the memory is read


@pytest.mark.parametrize("name", [
    pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in RUNS])
def test_another_model(name, small, data):
    module, options, check = RUNS[name]
    own = () if module is tune else data
    status, out, errors = call(module, *small, *own, *options)
    assert status == 0, errors
    assert check(out) is not False, out


def test_text_is_cut_to_the_context(capsys):
    text = HeldOut({"test": torch.arange(1000, dtype=torch.int16)}, 24)
    # the last token needs no place
    assert text.fit(8, 17) == (8, 17) and capsys.readouterr().out == ""
    assert text.fit(64, 96) == (12, 13) and text.fit(64, 5) == (12, 5)
    assert capsys.readouterr().out.startswith(
        "the context is 24 tokens: prompts have 12, 13 follow\n")
    windows = measuring_windows("test", 100, text=text)
    assert windows[:, 0].tolist() == [0, 250, 500, 750] and windows[0].tolist() == [*range(25)]
    assert [ids[::11] for ids in held_out_prompts(2, 12, text=text)] == [[0, 11], [500, 511]]
    with pytest.raises(InputError, match="room for 83 prompts only, not 90"):
        held_out_prompts(90, 12, text=text)
    with pytest.raises(
            InputError, match="has 1000 tokens, fewer than one window of 1001; give more text"):
        measuring_windows("test", 2000, 2000, HeldOut(text.splits, 1000))


def test_what_cannot_be_measured_is_one_line(small, toy_tokenizer, tmp_path):
    bare = saved(tmp_path, toy_tokenizer.spec, {}, max_position_embeddings=24)
    for chapter in (dssd, bench):         # before the long work
        refused = call(chapter, *bare)
        assert_refused(refused, "not calibrated for level 0.8", "levels: none")
        assert refused[1] == ""
    assert_refused(call(confidence, "--model", tmp_path / "model"),
                   "heads.safetensors", "--heads", "train.py")
    assert_refused(call(eero, *small[:2], "--heads", TOY / "heads.safetensors"), "another backbone")
    assert_refused(call(tasks, *small, "--data", tmp_path / "absent"), "no such file or folder")
    (tmp_path / "short.txt").write_text("def f(x):\n    return x\n", "utf-8")
    assert_refused(call(certified, *small, "--data", tmp_path / "short.txt"),
                   "fewer than one window", "give more text")


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data").exists(), reason="the official tokenizer is not at hand")
def test_the_official_tokenizer_two_blocks_and_one_exit(tmp_path):
    spec = read_json(SHARED / "data" / "tokenizer" / "tokenizer.json", "")
    calibration = {level: thresholds[1:] for level, thresholds in CALIBRATION.items()}
    options = saved(tmp_path, spec, calibration, [1],
                    vocab_size=50304, num_hidden_layers=2, max_position_embeddings=96)
    for name in ("heads", "confidence", "eero", "dssd", "certified", "tasks", "growth"):
        module, few, _ = RUNS[name]
        few = ("--tokens", 257, "--prompts", 0) if name == "eero" else few
        status, out, errors = call(module, *options, *few)
        assert status == 0, (name, errors)
    assert [row[0] for row in last(out)["context"]] == [64]
