"""Chapter 2: heads, their files, the loss against a direct computation, and text the model writes
itself."""
import json
import random

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import heads as H
from confidence import MEASURES
from conftest import TOY, assert_refused, call, run, shaken, tiny
from dssd import DSSD, generate
from heads import (KINDS, ExitHeads, distill_in_chunks, distill_loss, evaluate, fingerprint, hard,
                   kl, self_text, topk_kl)
from model import InputError
from test_model import mutated, used_or_refused


def test_lens_start_is_the_models_own_exit():
    model = tiny()
    ids = torch.randint(0, 96, (2, 9))
    _, hidden = model(ids, exits=(1, 3))
    for kind in ("linear", "mlp", "tied", "lowrank"):
        for z, h in zip(ExitHeads(model, [1, 3], kind).logits(hidden), hidden):
            assert torch.allclose(z, model.unembed(h), atol=1e-5)
    # starts as the next block: here the last one
    block = ExitHeads(model, [3], "block")
    assert torch.allclose(block.logits(hidden[1:])[0], model(ids)[0], atol=1e-4)
    random_start = ExitHeads(model, [1, 3], "linear", start="random")
    assert not torch.allclose(random_start.logits(hidden)[0], model.unembed(hidden[0]), atol=0.1)


def test_block_head_cached_equals_uncached():
    model, rnd = tiny(), random.Random(0)
    head = shaken(model, [2], "block").heads[0]
    h = torch.randn(1, 30, 32)
    want, cache, at, parts = head(h), head.new_cache(1, 30), 0, []
    while at < 30:
        n = rnd.randint(1, 30 - at)
        parts.append(head(h[:, at:at + n], cache))
        at += n
    assert torch.allclose(torch.cat(parts, 1), want, atol=1e-5)


def test_cost_in_block_equivalents():
    # D 32, V 96: a block has 12 D^2 weights in matrices
    model = tiny()
    cost = {kind: ExitHeads(model, [2], kind).heads[0].cost() for kind in KINDS}
    unembed = 96 * 32 / (12 * 32 * 32)
    assert cost == pytest.approx({"linear": unembed, "tied": unembed,
                                  "mlp": unembed + 2 / 12, "block": unembed + 13 / 12,
                                  "lowrank": unembed + 2 * 32 * 4 / (12 * 32 * 32)})
    assert model.config.full_cost == pytest.approx(4 + unembed)


# ---------------------------------------------------------------- losses


def direct_kl(full, head):
    p, q = full.double().softmax(-1), head.double().softmax(-1)
    return (p * (p.log() - q.log())).sum(-1).mean()


def direct_topk(full, head, k=32):
    total = 0
    for z, s in zip(full.double(), head.double()):
        best = sorted(range(len(z)), key=lambda i: -z[i])[:k]
        total = total + direct_kl(z[best][None], s[best][None])
    return total / len(full)


def direct_hard(full, head, weight=0.1):
    q = head.double().softmax(-1)
    right = q[range(len(q)), full.argmax(-1)]
    return ((1 - weight) * -right.log() + weight * (q * q.log()).sum(-1)).mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss, direct", [
    (kl, direct_kl), (topk_kl, direct_topk), (hard, direct_hard)])
def test_chunked_loss_and_gradients_equal_direct_autograd(kind, loss, direct, monkeypatch):
    # the gradient of three rows at a time
    monkeypatch.setattr(H, "rows_at_once", lambda width, device: 3)
    model, ids = tiny(), torch.randint(0, 96, (2, 13))
    chunked, plain = shaken(model, kind=kind), shaken(model, kind=kind)
    *hidden, last = model.hidden_states(ids, (1, 2, 3, 4))
    total = distill_in_chunks(chunked, hidden, last, loss, chunk=5)
    full = model.unembed(last).flatten(0, 1)
    wants = [direct(full, z.flatten(0, 1)) for z in plain.logits(hidden)]
    sum(wants).backward()
    assert torch.allclose(total, torch.stack(wants).float().detach(), atol=1e-5)
    # the definition has the same gradients
    defined = shaken(model, kind=kind)
    losses = distill_loss(defined, hidden, last, loss)
    losses.sum().backward()
    assert torch.allclose(losses.detach(), total, atol=1e-5)
    for (name, a), (_, b) in zip(defined.named_parameters(), plain.named_parameters()):
        assert torch.allclose(a.grad, b.grad, atol=1e-5), name
    for (name, a), (_, b) in zip(chunked.named_parameters(), plain.named_parameters()):
        assert torch.allclose(a.grad, b.grad, atol=1e-5), name
    # the backbone is never touched
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("chunk", [1, 7, 26, 1000])
def test_chunks_do_not_change_the_loss(chunk):
    model, ids = tiny(), torch.randint(0, 96, (2, 13))
    heads = shaken(model)
    *hidden, last = model.hidden_states(ids, (1, 2, 3, 4))
    assert torch.allclose(distill_in_chunks(heads, hidden, last, chunk=chunk),
                          distill_loss(heads, hidden, last), atol=1e-5)


def test_loss_is_zero_only_for_the_full_models_own_distribution():
    z = torch.randn(6, 50)
    assert kl(z, z + 3.0).abs() < 1e-5 and kl(z, torch.randn(6, 50)) > 0.1
    assert topk_kl(z, z, 5).abs() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_float32_heads_learn_on_a_half_precision_backbone(kind):
    ids, losses = torch.randint(0, 96, (2, 13)), []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny().to(dtype)
        heads = shaken(model, kind=kind).float()
        *hidden, last = model.hidden_states(ids, (1, 2, 3, 4))
        losses.append(distill_in_chunks(heads, hidden, last))
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all()
                   for p in heads.parameters())
    assert torch.allclose(*losses, rtol=0.1)


def test_heads_learn():
    model = tiny()
    heads = ExitHeads(model, [3], start="random")
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-2)
    ids = torch.randint(0, 96, (8, 32))
    *hidden, last = model.hidden_states(ids, (3, 4))
    losses = []
    for _ in range(60):
        losses.append(distill_in_chunks(heads, hidden, last).item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.3 * losses[0]


# ---------------------------------------------------------------- text the model writes


def test_self_text_is_greedy_where_asked_and_follows_the_prefix():
    model = tiny()
    prefixes = torch.randint(0, 96, (4, 5))
    ids = self_text(model, prefixes, 20, temperatures=(0.0, 1.0), seed=1)
    assert (torch.equal(ids[:, :5], prefixes)
            and torch.equal(ids, self_text(model, prefixes, 20, (0.0, 1.0), seed=1)))
    choice = model(ids[:, :-1])[0].argmax(-1)[:, 4:]
    assert torch.equal(choice[::2], ids[::2, 5:]) and not torch.equal(choice[1::2], ids[1::2, 5:])


def test_sampled_self_text_has_the_models_distribution():
    model = tiny(vocab_size=8)
    first = self_text(model, torch.full((20000, 1), 3), 2, temperatures=(1.0,))[:, 1]
    want = model(torch.tensor([[3]]))[0][0, 0].softmax(-1)
    chi2 = ((first.bincount(minlength=8) - 20000 * want) ** 2 / (20000 * want))[want > 1e-3].sum()
    # 0.1 % point at 7 degrees of freedom
    assert chi2 < 24.3


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(tmp_path, kind):
    model = tiny()
    heads = shaken(model, kind=kind)
    heads.measure, heads.calibration = "margin", {"0.90": [0.5, None, 1.25]}
    heads.save(tmp_path / "h.safetensors")
    loaded = ExitHeads.load(tmp_path / "h.safetensors", model)
    assert (loaded.layers, loaded.kind, loaded.measure) == ([1, 2, 3], kind, "margin")
    assert loaded.thresholds(0.9) == [0.5, None, 1.25]
    for (n, a), (_, b) in zip(heads.named_parameters(), loaded.named_parameters()):
        assert torch.equal(a.half().float(), b) and "embed_out" not in n
    assert [p.name for p in tmp_path.iterdir()] == ["h.safetensors"]
    for level in (0.91, 0.9001):
        with pytest.raises(InputError, match="not calibrated"):
            loaded.thresholds(level)


def test_older_files_mean_entropy(tmp_path):
    model, path = tiny(), tmp_path / "h.safetensors"
    tensors = {name: p.half() for name, p in shaken(model, [2]).named_parameters()}
    info = {"kind": "linear", "layers": [2], "calibration": {}, "backbone": fingerprint(model)}
    save_file(tensors, path, metadata={"nanoexit": json.dumps(info)})
    assert ExitHeads.load(path, model).measure == "entropy"


def test_fingerprint_survives_dtypes_and_tells_backbones_apart():
    model = tiny()
    for p in model.parameters():
        p.copy_(p.half())                                                 # official weights are F16
    same = tiny()
    same.load_state_dict(model.state_dict())
    assert fingerprint(model) == fingerprint(same.bfloat16())
    assert fingerprint(model) == fingerprint(model.half())
    assert fingerprint(tiny(1)) != fingerprint(tiny(0))
    assert fingerprint(tiny(num_hidden_layers=5)) != fingerprint(tiny(0))


def test_the_fingerprint_is_of_values_and_of_every_tensor():
    # tensors of more than 256 values among them
    model = tiny(vocab_size=2000, hidden_size=64)
    name = fingerprint(model)
    model.config.rotary_emb_base, model.config.use_parallel_residual = 10000.0, 1
    assert fingerprint(model) == name
    for _, p in model.named_parameters():
        before = p.clone()
        # fine-tuned, and in its second half only
        for part in (slice(None), slice(len(p) // 2, None)):
            p[part] += 0.1
            assert fingerprint(model) != name
            p.copy_(before)
    assert fingerprint(model) == name
    for field, value in (("rotary_emb_base", 10001), ("layer_norm_eps", 1e-6),
                         ("use_parallel_residual", False)):
        assert fingerprint(tiny(vocab_size=2000, hidden_size=64, **{field: value})) != name


def said(model, **changes):
    """The metadata of a heads file for tiny(), with something changed."""
    rows = {"0.90": [0.5, None, 1.25], "0.95": [0, None, None]}
    info = {"kind": "linear", "layers": [1, 2, 3], "measure": "margin", "calibration": rows,
            "backbone": fingerprint(model)}
    return {**info, **changes}


def write_heads(path, model, info):
    tensors = {name: p.half() for name, p in shaken(model).named_parameters()}
    save_file(tensors, path,
              metadata={"nanoexit": info if isinstance(info, str) else json.dumps(info)})


@pytest.mark.parametrize("changes, named", [
    ({"layers": ["1", "2", "3"]}, "increasing whole numbers"),
    ({"layers": [1.0, 2, 3]}, "whole numbers"),
    ({"layers": "123"}, "no exit heads"),
    ({"calibration": None}, "no exit heads"),
    ({"measure": "nosuch"}, "measure is 'nosuch'"),
    ({"calibration": {"0.90": ["a", None, 1]}}, "level '0.90': threshold 0 is 'a'"),
    ({"kind": ["linear"]}, "no exit heads"),
    ({"calibration": {"0.90": [0.1, float("nan"), None]}}, "threshold 1 is nan"),
    ({"kind": "nosuch"}, "kind is 'nosuch'"),
    ({"calibration": {"0.90": [0.1]}}, "'0.90' is no threshold per exit"),
    ({"calibration": {"0.90": None}}, "per exit"),
    ({"backbone": None}, "no exit heads"), ({"backbone": "x" * 10 ** 6}, "another backbone")])
def test_what_a_heads_file_says_of_itself_is_checked(tmp_path, changes, named):
    model = tiny()
    write_heads(tmp_path / "h", model, said(model, **changes))
    with pytest.raises(InputError, match=named):
        ExitHeads.load(tmp_path / "h", model)


def test_damaged_metadata_is_used_or_refused_in_one_line(tmp_path):
    model, rnd, used = tiny(), random.Random(0), 0
    for _ in range(100):
        write_heads(tmp_path / "h", model, mutated(said(model), rnd))
        used += used_or_refused(lambda: generate(model, [1, 2], 4, DSSD(
            heads := ExitHeads.load(tmp_path / "h", model), heads.thresholds(0.9))))
    assert 5 < used < 60
    for damage in ("[" * 10 ** 5, "{", "null", "7", '"x"', "[1]"):
        write_heads(tmp_path / "h", model, damage)
        assert not used_or_refused(lambda: ExitHeads.load(tmp_path / "h", model))


def test_measures_are_those_of_the_next_chapter():
    assert H.MEASURE_NAMES == tuple(MEASURES)


def test_heads_that_cannot_be_used(tmp_path):
    model, path = tiny(), tmp_path / "h.safetensors"
    shaken(model).save(path)
    with pytest.raises(InputError, match="another backbone"):
        ExitHeads.load(path, tiny(1))
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(InputError, match="cannot be read as a heads file"):
        ExitHeads.load(path, model)
    save_file({"x": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="holds no exit heads"):
        ExitHeads.load(path, model)
    save_file({"x": torch.zeros(3)}, path, metadata={"nanoexit": json.dumps(
        {"kind": "linear", "layers": [1], "calibration": {}, "backbone": fingerprint(model)})})
    with pytest.raises(InputError, match="do not fit"):
        ExitHeads.load(path, model)
    with pytest.raises(InputError, match="cannot be read"):
        ExitHeads.load(tmp_path / "absent", model)


@pytest.mark.parametrize("layers", [[], [0, 2], [2, 4], [2, 1], [2, 2], [-1]])
def test_impossible_layers(layers):
    with pytest.raises(InputError, match="between 1 and 3"):
        ExitHeads(tiny(), layers)


def test_unknown_kind():
    with pytest.raises(InputError, match="linear, mlp, tied, lowrank, block"):
        ExitHeads(tiny(), [1], "nosuch")


def test_command_line(tmp_path):
    assert_refused(run("heads.py", "--heads", tmp_path / "none"), "cannot be read as a heads file")
    assert_refused(call(H, "--tokens", 0), "--tokens")
    assert_refused(call(H, "--figure", tmp_path / "lens.exe"), ".png")
    status, out, errors = call(H, "--tokens", 1024, "--figure", tmp_path / "lens.png")
    assert status == 0, errors
    assert "cost (blocks)" in out and (tmp_path / "lens.png").stat().st_size > 10000


# --------------------------------------------------------------- one evaluation, one measuring text


# one row at a time; some; all
@pytest.mark.parametrize("rows", [1, 10, 1000])
def test_evaluate_equals_a_direct_computation(rows, monkeypatch):
    monkeypatch.setattr(H, "rows_at_once", lambda width, device: rows)
    model = tiny()
    heads, ids = shaken(model, [1, 3], "mlp"), torch.randint(0, 96, (5, 17))
    found = evaluate(model, heads, ids, MEASURES, batch=2)
    full, hidden = model(ids[:, :-1], exits=[1, 3])
    choice, truth = full.argmax(-1).flatten(), ids[:, 1:].flatten()
    for m, z in enumerate(heads.logits(hidden)):
        p, q, guess = full.softmax(-1), z.softmax(-1), z.argmax(-1).flatten()
        entropy = -(q * q.log()).sum(-1).flatten()
        top = q.topk(2).values
        assert torch.allclose(torch.tensor(found.uncertainty["entropy"][:, m]), entropy, atol=1e-4)
        assert torch.allclose(torch.tensor(found.uncertainty["margin"][:, m]),
                              (top[..., 1] - top[..., 0]).flatten(), atol=1e-5)
        assert found.choice[:, m].tolist() == guess.tolist()
        assert found.agree[:, m].tolist() == (guess == choice).tolist()
        assert found.right[:, m].tolist() == (guess == truth).tolist()
        assert found.kl[m] == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), abs=1e-4)
    assert (found.choice[:, 2].tolist() == choice.tolist()
            and found.right[:, 2].tolist() == (choice == truth).tolist())
    assert set(found.uncertainty) == set(MEASURES) and found.agree.shape == (80, 2)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that anything computes meanwhile."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, torch.Tensor) and x.dim() and not x._is_view():
                self.numbers = max(getattr(self, "numbers", 0), x.numel())
        return made


@pytest.mark.parametrize("kind", [
    "block", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "block")])
def test_no_tensor_grows_with_the_vocabulary(kind, monkeypatch):
    """200 windows of 17 tokens, V = 9,000: all logits of a head would be 29 M numbers, of 20 rows
    180,000."""
    monkeypatch.setattr(H, "rows_at_once", lambda width, device: 180_000 // width)
    model = tiny(vocab_size=9000)
    heads, ids = shaken(model, kind=kind), torch.randint(0, 9000, (200, 17))
    with Largest() as largest:
        evaluate(model, heads, ids, MEASURES)
    assert 9000 * 19 < largest.numbers <= 180_000
    # the loss: the logits of one chunk of one head, or a gradient of its matrix
    *hidden, last = model.hidden_states(ids, (*heads.layers, 4))
    with Largest() as largest:
        distill_in_chunks(heads, hidden, last, chunk=100)
    assert largest.numbers == 9000 * 100


def test_the_measuring_text_is_the_same_everywhere(toy_tokenizer):
    """Its ids by their sum, so that no figure of the results can change without this test."""
    texts = {split: H.measuring_text(split) for split in ("calibration", "test")}
    for split, ids in texts.items():
        assert len(ids) == 65536 and 0 <= ids.min() and ids.max() < 2048
    sums = {split: (ids * (1 + torch.arange(65536) % 97)).sum().item()
            for split, ids in texts.items()}
    assert sums == {"calibration": 1839669029, "test": 1835595011}
    windows = H.measuring_windows("test", 4096, 512)
    assert windows.shape == (8, 512) and torch.equal(windows[0], texts["test"][:512])
    assert H.held_out_prompts(5) == [
        row[:64].tolist() for row in H.measuring_windows("test", 5 * 512, 512)]
    with pytest.raises(InputError, match="room for 1024 prompts only"):
        H.held_out_prompts(1025)


def test_the_measuring_text_for_another_tokenizer(toy_tokenizer):
    other = type(toy_tokenizer)({**toy_tokenizer.spec,
                                 "added_tokens": toy_tokenizer.spec["added_tokens"][:2]})
    ids = H.measuring_text("test", other)
    # no tokens for runs of spaces
    assert len(ids) > 65536
    assert other.decode(ids.tolist()) == toy_tokenizer.decode(H.measuring_text("test").tolist())


def test_previous_token_attention_sees_a_head_made_for_it():
    model = tiny(rotary_pct=1.0, max_position_embeddings=32)
    attention = model.layers[2].attention
    before = H.previous_token_attention(model, torch.randint(0, 96, (2, 32)))
    assert len(before) == 4 and all(0 < a < 0.9 for a in before)
    # of one position: q is k turned by it
    K, angle = 8, 10000 ** (-torch.arange(0, 8, 2) / 8)
    # head 0: q, k and v from the bias alone
    attention.query_key_value.weight[:3 * K].zero_()
    q, k = attention.query_key_value.bias[:K], attention.query_key_value.bias[K:2 * K]
    k.fill_(12.0)
    q[:4], q[4:] = 12 * (angle.cos() + angle.sin()), 12 * (angle.cos() - angle.sin())
    after = H.previous_token_attention(model, torch.randint(0, 96, (2, 32)))
    assert after[2] > 0.9 and after[:2] == pytest.approx(before[:2], abs=0.1)
