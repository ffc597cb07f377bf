"""--dry-run: sizes of the ten official models and of every kind of heads, memory, what is refused,
nothing written."""
import json
import re
from types import SimpleNamespace

import pytest
import torch

import train as T
from appendix import plan as P
from appendix.team import Team
from conftest import SHARED, TOY, assert_refused, call
from heads import ExitHeads
from model import InputError, Pythia

PARAMETERS = {"pythia-14m": 14067712, "pythia-31m": 30494720,
              "pythia-70m": 70426624, "pythia-160m": 162322944,
              "pythia-410m": 405334016, "pythia-1b": 1011781632, "pythia-1.4b": 1414647808,
              "pythia-2.8b": 2775208960, "pythia-6.9b": 6857302016, "pythia-12b": 11846072320}


def planned(name, monkeypatch, *options):
    """What --dry-run prints, without the trial of a step."""
    monkeypatch.setattr(P, "seconds", lambda training, length: (10.0, 20.0, 30.0))
    status, printed, errors = call(T, "--model", name, "--dry-run", *options)
    assert status == 0, errors
    return printed


def inside(kind, D):
    """Parameters of a head without its matrix D -> V: its norm, and what the kinds add."""
    block = 12 * D * D + 9 * D + 4 * D               # matrices, their biases, two norms
    return 2 * D + {"linear": 0, "tied": 0, "mlp": 2 * D * D + D,
                    "lowrank": D * D // 4, "block": D * D + block}[kind]


def test_all_ten_sizes_and_their_heads(monkeypatch):
    assert list(P.SHAPES) == list(PARAMETERS)
    for name, parameters in PARAMETERS.items():
        D, L, _, V = P.SHAPES[name]
        for kind in (("linear", "mlp", "tied", "lowrank", "block") if name == "pythia-70m"
                     else ("linear",)):
            printed = planned(name, monkeypatch, "--head", kind)
            assert (f"{kind} heads on {name}: {L} blocks of width {D:,}, "
                    f"{parameters:,} parameters") in printed
            matrix = 0 if kind in ("tied", "lowrank") else V * D
            rows = re.findall(r"^ *(\d+) +([\d,]+) +(\d+\.\d\d)$", printed, re.M)
            assert ([int(layer) for layer, _, _ in rows]
                    == [L // 5, 2 * L // 5, 3 * L // 5, 4 * L // 5])
            for _, count, cost in rows:
                assert int(count.replace(",", "")) == inside(kind, D) + matrix
                assert float(cost) >= round(V / 12 / D, 2)
            assert ("dear" in printed) == (
                matrix > 0 and (4 * matrix > 5e8 or 4 * matrix > 12 * L * D * D)), name


def test_official_names_are_spelled_in_three_ways_and_shapes_are_the_official_ones():
    for name in ("pythia-6.9b", "pythia-6.9b-deduped", "EleutherAI/pythia-6.9b"):
        assert P.config_of(name).vocab_size == 50432
    path = SHARED / "data" / "pythia" / "configs.json"
    if not path.exists():
        pytest.skip("official configurations not at hand")
    for name, fields in json.loads(path.read_text()).items():
        assert P.config_of(name) == P.PythiaConfig.from_dict(fields)


def test_the_toys_plan_is_what_its_heads_are(toy, monkeypatch):
    for kind in ("linear", "block"):
        heads, printed = ExitHeads(toy, [4, 8, 12], kind), planned(TOY, monkeypatch, "--head", kind)
        for layer, head in zip(heads.layers, heads.heads):
            assert re.search(rf"^ +{layer} +{P.count(head):,} +{head.cost():.2f}$", printed, re.M)
        assert (f"{P.count(toy):,} parameters; "
                f"a token at full depth costs {toy.config.full_cost:.2f}") in printed
    assert "409,600 tokens to train on, 131,072 to calibrate" in printed
    assert "60 s a step, 100.0 minutes to train, 16.0 minutes to calibrate" in printed
    assert "dear" not in printed and "the model writes text first" not in printed
    printed = planned(TOY, monkeypatch, "--layers", "2,9", "--data", "self",
                      "--steps", 1, "--length", 9999)
    assert re.findall(r"^ +(\d+) +\d+,", printed, re.M) == ["2", "9"]
    # 8 x 2,047
    assert "16,376 tokens to train on" in printed and "the model writes text first" in printed


@pytest.mark.parametrize("kind", ["linear", "block"])
def test_memory_of_parameters_and_optimizer_is_what_training_allocates(toy, kind):
    args = SimpleNamespace(steps=5, lr=1e-3, loss="kl", accumulate=1, positions=1, seed=0, batch=2,
                           device="cpu", dtype="float32")
    heads = ExitHeads(toy, [4], kind).float().train()
    training = T.Training(toy, heads, args, Team())
    parts = P.memory(training, 32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        heads.heads[0].body(torch.randn(2, 32, 128))
    shown = {x.data_ptr(): x.numel() for x in kept if x.numel() % 64 == 0 and x.dim() > 2}
    training.step(iter([torch.randint(0, 2048, (2, 32))]), torch.zeros(1))
    state = 0
    for part, _ in training.optimizer.parts:
        for values in part.state_dict()["state"].values():
            state += sum(4 * x.numel() for x in values.values() if x.dim())
    assert parts["their optimizer's state"] == state
    assert parts["heads"] == parts["their gradients"] == 4 * P.count(heads)
    assert parts["the frozen model"] == 4 * P.count(toy)
    # residual streams, and what autograd keeps, which the formula rounds
    assert parts["residual streams at 2 depths"] == 4 * 2 * 2 * 32 * 128
    assert 0.4 < 4 * sum(shown.values()) / parts["the heads' bodies, for the gradients"] < 1.5


def test_a_trial_gives_the_time(tmp_path, monkeypatch):
    """The real trial, from a folder that holds a config.json only; nothing is made or written."""
    (tmp_path / "model").mkdir()
    fields = P.PythiaConfig(96, 32, 128, 10, 4, 64).to_dict()
    (tmp_path / "model" / "config.json").write_text(json.dumps(fields))
    monkeypatch.chdir(tmp_path)
    status, printed, errors = call(T, "--model", "model", "--dry-run",
                                   "--head", "block", "--accumulate", 2)
    assert status == 0, errors
    assert re.search(r"about [\d.e-]+ s a step, .* to train, .* to calibrate and test", printed)
    assert "8 windows of 63 tokens" in printed and "100,800 tokens to train on" in printed
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "config.json"]


def test_the_trial_is_scaled_by_blocks_and_heads():
    """Ten times the blocks: about ten times their seconds. A busy machine may spoil some of it."""
    args = SimpleNamespace(steps=5, lr=1e-3, loss="kl", accumulate=1, positions=1, seed=0, batch=8,
                           device="cpu", dtype="float32")
    found = []
    for blocks in (4, 40):
        with torch.device("meta"):
            model = Pythia(P.PythiaConfig(96, 32, 128, blocks, 4, 64))
            training = T.Training(model, ExitHeads(model, [1, 2]), args, Team())
        found.append(min(P.seconds(training, 63) for _ in range(3)))
    assert 2 < found[1][0] / found[0][0] < 50


def test_what_is_refused(tmp_path):
    cases = [(("--model", "pythia-13b"), "'pythia-13b' is neither a folder nor an official name"),
             (("--model", tmp_path), "config.json is missing"),
             (("--layers", "4,16"), "between 1 and 15"),
             (("--start", "lense"), "neither lens, random nor"),
             (("--start", TOY / "heads.safetensors"), "--head and --layers of that file"),
             (("--steps", 0), "must be positive")]
    for options, words in cases:
        assert_refused(call(T, "--dry-run", "--out", tmp_path / "run", *options), words)
    with pytest.raises(InputError, match="pythia-14m, .*pythia-12b, each also with -deduped"):
        P.config_of("gpt-2")
    assert not (tmp_path / "run").exists()
