"""The fast twins: the readable model's values, and lossless decoding with them."""
import math
import random
import warnings
from functools import partial

import numpy as np
import pytest
import torch

import appendix.fast as room
from appendix import small
from appendix.fast import FusedHeads, PackedProduct, Product, fast, packs
from appendix.gain import AutoDSSD, Costs
from appendix.small import PanelProduct, Small, SmallChoice
from conftest import TOY, assert_refused, call, shaken, tiny
from dssd import DSSD, Choice, EarlyExit, LayerSkip, Plain, generate
from heads import KINDS, ExitHeads, held_out_prompts
from model import InputError, Pythia, sample

# ---------------------------------------------------------------- values


@pytest.mark.parametrize("D, rotated", [(32, 0.25), (32, 1.0), (36, 0.25)])     # 36: an odd K
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("graphs", [False, True])
def test_fused_equals_readable(D, rotated, kind, graphs):
    model, rnd = tiny(hidden_size=D, rotary_pct=rotated), random.Random(1)
    heads = shaken(model, [1, 3], kind)
    fused, twins = fast(model, heads, graphs)
    ids = torch.randint(0, 96, (1, 60))
    caches, at = (model.new_cache(1, 60), fused.new_cache(1, 60)), 0
    while at < 60:
        n = min(rnd.choice((1, 2, 7, 40)), 60 - at)
        a, b = (m.run(m.embed(ids[:, at:at + n]), 0, 4, c) for m, c in zip((model, fused), caches))
        assert torch.allclose(a, torch.as_tensor(b), rtol=1e-4, atol=1e-4)
        assert torch.allclose(model.unembed(a), fused.unembed(b), rtol=1e-4, atol=1e-3)
        at += n
    for head, twin in zip(heads.heads, twins.heads):
        assert twin.cost() == head.cost()
        own, others = head.new_cache(1, 60), twin.new_cache(1, 60)
        # read on, or back to an earlier position first
        for n, back_to in ((5, None), (1, 3), (20, None), (2, 9), (1, None), (7, 0)):
            x = torch.randn(1, n, D)
            if own and back_to is not None:
                own.truncate(back_to)
                others.truncate(back_to)
            said = twin.output(twin.body(x, others))
            assert torch.allclose(head(x, own), said, rtol=1e-4, atol=1e-3)
        if own:
            for reader, cache in ((head, own), (twin, others)):
                with pytest.raises(InputError, match="61 tokens do not fit"):
                    reader.body(torch.randn(1, 54, D), cache)


def test_run_leaves_its_input_alone():
    # the frontier passes views of its states
    for changes in ({}, {"hidden_size": 512}):
        model = tiny(**changes)
        heads = shaken(model, [2], "block")
        for graphs in (False, True):
            fused, twins = fast(model, heads, graphs)
            cache, own = fused.new_cache(1, 30), twins.heads[0].new_cache(1, 30)
            states = torch.randn(1, 30, model.config.hidden_size)
            before = states.clone()
            for first, end in ((0, 9), (9, 10), (10, 14)):
                fused.run(states[:, first:end], 0, 4, cache)
                twins.heads[0].body(states[:, first:end], own)
            fused.unembed(states[:, 3:5])
            assert torch.equal(states, before)


def test_more_tokens_than_fit_are_refused():
    model = tiny()
    for graphs in (False, True):
        fused, _ = fast(model, None, graphs)
        # the cache is too small, or the context is
        for size, words in ((9, "10 tokens .* a context of 9"), (99, "65 tokens .* of 64")):
            cache = fused.new_cache(1, size)
            full = min(size, 64)
            fused.run(torch.randn(1, full, 32), 0, 4, cache)
            with pytest.raises(InputError, match=words):
                fused.run(torch.randn(1, 1, 32), 0, 4, cache)


SINGLE, HALF = torch.float32, torch.bfloat16


@pytest.mark.parametrize("hidden, dtype, n, m, kind", [
    (32, SINGLE, 40, 24, PanelProduct),                 # one panel
    (32, SINGLE, 96, 192, PanelProduct),                # three
    (32, SINGLE, 2048, 128, PanelProduct),              # for 3 rows at most, more in pieces
    (32, SINGLE, 64, 9000, Product),
    (512, SINGLE, 64, 128, Product),
    (512, SINGLE, 256, 300, PackedProduct),
    (512, HALF, 256, 300, PackedProduct),
    (512, SINGLE, 1024, 1024, PackedProduct),           # padded to four rows
    (512, HALF, 1024, 1024, PackedProduct)])
def test_products_equal_plain_ones_in_float64(hidden, dtype, n, m, kind):
    torch.manual_seed(0)
    decoder, _ = fast(tiny(hidden_size=hidden))
    w = torch.randn(n, m, dtype=torch.double).to(dtype).double()
    b = torch.randn(m).to(dtype)
    near = {"rtol": 1e-4, "atol": 1e-3} if dtype == SINGLE else {"rtol": 0.02, "atol": 0.4}
    for offset in (b, None):
        multiply = decoder.product(w, offset, dtype)
        for T in (1, 2, 3, 4, 5, 7, 18):
            x, rest = torch.randn(T, n).to(dtype), torch.randn(T, m).to(dtype)
            out = torch.empty(T, m)
            want = x.double() @ w
            if offset is not None:
                want += offset.double()
            got = multiply(x)
            assert got.shape == (T, m) and got.dtype == dtype
            assert torch.allclose(got.double(), want, **near)
            assert torch.allclose(multiply.onto(rest, x).double(), rest.double() + want, **near)
            multiply.into(out, x)
            assert torch.allclose(out.double(), want, **near)
        if packs(dtype):
            assert type(multiply) is kind
        if kind is PanelProduct:
            assert multiply.most == (3 if n == 2048 else 17)


def test_small_models_multiply_by_numpy_up_to_a_limit_and_never_warn(monkeypatch):
    model = tiny()
    heads = shaken(model, [2], "block")
    decoder, twins = fast(model, heads)
    assert isinstance(decoder, Small)
    for other in (fast(tiny(hidden_size=512)), fast(tiny().bfloat16()),
                  fast(tiny(), shaken(tiny(), [2]).bfloat16()), fast(tiny(), graphs=True)):
        assert not isinstance(other[0], Small)
    want = generate(model, [1, 2], 30, DSSD(heads, [2.0])).tokens
    assert generate(decoder, [1, 2], 30, DSSD(twins, [2.0])).tokens == want
    monkeypatch.setattr(small, "ONE_THREAD", 1)                           # all to PyTorch
    decoder, twins = fast(model, heads)
    assert generate(decoder, [1, 2], 30, DSSD(twins, [2.0])).tokens == want
    monkeypatch.undo()
    decoder, twins = fast(model, heads)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        broken, cache = torch.full((1, 2, 32), float("inf")), decoder.new_cache(1, 9)
        decoder.unembed(decoder.run(broken, 0, 3, cache))
        decoder.keys_values(broken, 3, cache)
        twins.heads[0].body(broken, twins.heads[0].new_cache(1, 9))


@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (0.8, 1.0), (1e-30, 1.0), (1.2, 0.9)])
def test_a_small_models_choices_are_those_of_tensors(temperature, top_p):
    torch.manual_seed(0)
    logits = 4 * torch.randn(6, 50)
    logits[2, 7:] = -math.inf
    plain, arrays = Choice(temperature, top_p, seed=3), SmallChoice(temperature, top_p, seed=3)
    want, got = plain.of(logits), arrays.of(logits)
    assert got.shape == want.shape and np.allclose(got, want, atol=1e-6)
    chances = arrays.chance_kept(got, np.roll(got, 1, 0))
    assert np.allclose(chances, plain.chance_kept(want, want.roll(1, 0)), atol=1e-5)
    if temperature:
        for p, q in zip(want, want.roll(1, 0)):
            residual, total = arrays.residual(0.7, p.numpy(), q.numpy())
            residual_too, total_too = plain.residual(0.7, p, q)
            assert np.allclose(residual, residual_too)
            assert total == pytest.approx(total_too, abs=1e-6)
    singles = zip(logits, plain.each(want), arrays.each(got), strict=True)
    for z, of_all, of_all_too in singles:
        a, b = plain.of(z), arrays.of(z)
        assert np.allclose(b, a, atol=1e-6)
        assert np.allclose(of_all, a) and np.allclose(of_all_too, b)
        assert [plain.token(a) for _ in range(20)] == [arrays.token(b) for _ in range(20)]
        for measure in ("margin", "entropy"):
            u = arrays.uncertainty(measure, z).item()
            assert u == pytest.approx(plain.uncertainty(measure, z).item(), abs=1e-5)
    assert np.allclose(arrays.uncertainty("margin", logits), plain.uncertainty("margin", logits))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_small_models_choices_refuse_what_is_no_number(wrong):
    z = torch.full((50,), wrong)
    if wrong != -math.inf:
        z[1:] = 0
    for temperature in (0.0, 0.8):
        for logits in (z, torch.stack((torch.zeros(50), z))):
            with pytest.raises(InputError, match="not numbers in float32"):
                SmallChoice(temperature, 1.0).of(logits)
    if wrong is math.nan:
        assert SmallChoice(0.0, 1.0).uncertainty("margin", z).item() == math.inf


@pytest.mark.parametrize("packed", [True, False])     # False: as where nothing can be packed
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("wide", [True, False])       # in float32, wide enough to be packed, or not
def test_in_bfloat16_and_with_or_without_packed_products(packed, graphs, wide, monkeypatch):
    if not packed:
        monkeypatch.setattr(room, "packs", lambda dtype: False)
    model = tiny(**{"hidden_size": 512, "intermediate_size": 512} if wide else {})
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.35 if wide and p.dim() == 2 else 1)
    # float32: decoding is lossless
    ids, heads = torch.randint(0, 96, (1, 30)), shaken(model, [2], "block")
    want = generate(model, [1, 2], 30, Plain()).tokens
    fused, twins = fast(model, heads, graphs)
    assert generate(fused, [1, 2], 30, DSSD(twins, [2.0])).tokens == want
    # bfloat16: as near to float32 as the readable model is
    exact, model = model(ids)[0], model.bfloat16()
    fused, _ = fast(model, None, graphs)
    at, parts, cache, readable = 0, [], fused.new_cache(1, 30), model(ids)[0]
    for n in (4, 1, 3, 1, 2, 18, 1):
        x = fused.run(fused.embed(ids[:, at:at + n]), 0, 4, cache)
        parts.append(fused.unembed(x))
        at += n
    apart = (readable.float() - exact).pow(2).mean().sqrt()
    assert (torch.cat(parts, 1).float() - exact).pow(2).mean().sqrt() < 1.5 * apart
    # values alone: the order of a key's dimensions differs
    a, b, x = model.new_cache(1, 2), fused.new_cache(1, 2), model.embed(ids[:, :1])
    model.keys_values(x, 3, a)
    fused.keys_values(x, 3, b)
    assert torch.allclose(a.kv[3, 1, ..., :1, :], b.kv[3, 1, ..., :1, :], rtol=0.05, atol=0.05)


def test_unknown_types_are_not_packed():
    assert not packs(torch.float16) and not packs(torch.float64)


def test_heads_in_float32_on_a_bfloat16_model():
    model = tiny().bfloat16()
    for kind in ("linear", "block"):
        heads = shaken(model, [1, 2], kind).float()
        fused, twins = fast(model, heads)
        h = torch.randn(1, 6, 32).bfloat16()
        for head, twin in zip(heads.heads, twins.heads):
            own, others = head.new_cache(1, 9), twin.new_cache(1, 9)
            if own:
                own.kv, others.kv = own.kv.float(), others.kv.float()
            said = twin.output(twin.body(h, others))
            assert torch.allclose(head(h, own), said, rtol=0.02, atol=0.02)


# ---------------------------------------------------------------- the doors


def test_what_has_no_twin_stays_readable():
    for changes in ({"use_parallel_residual": False}, {"rotary_pct": 0.4}, {"rotary_pct": 0.0},
                    {"hidden_size": 24, "num_attention_heads": 2}):       # 3 rotated dimensions
        model = tiny(**changes)
        heads = shaken(model)
        decoder, twins = fast(model, heads)
        assert decoder is model and twins is heads
    model = tiny(use_parallel_residual=False)
    decoder, twins = fast(model, shaken(model))
    drafted = generate(decoder, [1, 2], 9, DSSD(twins, [1.0, 2.0, None]))
    assert drafted.tokens == generate(model, [1, 2], 9, Plain()).tokens


def test_the_twins_of_heads_say_what_the_heads_say_about_themselves(toy, fast_heads):
    decoder, twins = fast(toy, fast_heads)
    assert isinstance(twins, FusedHeads) and decoder.config is toy.config
    for name in ("layers", "kind", "measure", "calibration"):
        assert getattr(twins, name) == getattr(fast_heads, name)
    assert twins.thresholds(0.9) == fast_heads.thresholds(0.9)
    with pytest.raises(InputError, match="not calibrated for level 0.4"):
        twins.thresholds(0.4)
    decoder, twins = fast(toy)
    assert twins is None and decoder is not toy


# ---------------------------------------------------------------- decoding


def test_plain_equals_the_reference_loop():
    model = tiny()
    for graphs in (False, True):
        fused, _ = fast(model, None, graphs)
        assert generate(fused, [5, 6, 7], 20, Plain()).tokens == list(sample(model, [5, 6, 7], 20))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("graphs", [False, True], ids=["fused", "static shapes"])
def test_lossless_on_random_models(kind, graphs):
    rnd = random.Random(2)
    for trial in range(5):
        model = tiny(trial, vocab_size=24)
        decoder, heads = fast(model, shaken(model, kind=kind), graphs)
        ids = [rnd.randrange(24) for _ in range(rnd.choice((1, 5, 30, 63, 64)))]
        n, stop = rnd.choice((1, 2, 7, 40)), rnd.choice((None, rnd.randrange(24)))
        plain = generate(model, ids, n, Plain(), stop=stop)
        choices = (None, 0.0, rnd.random() * 4, rnd.random() * 4, math.inf)
        thresholds = [rnd.choice(choices) for _ in range(3)]
        for policy in (DSSD(heads, thresholds, rnd.randint(1, 16)),
                       LayerSkip(heads, rnd.choice((1, 2, 3)), rnd.randint(1, 16))):
            out = generate(decoder, ids, n, policy, stop=stop)
            assert out.tokens == plain.tokens, (trial, policy)
            assert len(out.depths) == len(out.tokens)


@pytest.mark.parametrize("measure, thresholds, temperature", [
    ("entropy", (1.5, 2.0, 2.5), 0.0), ("entropy", (1.5, 2.0, 2.5), 0.8),
    ("margin", (-0.5, -0.3, -0.2), 0.0), ("margin", (-0.5, -0.3, -0.2), 0.8)])
def test_drafts_and_rounds_are_those_of_the_readable_heads(measure, thresholds, temperature):
    costs = [Costs(n, 4.0, 0.1, 0.6, 0.4, [0.0, 0.1, 0.2], [0.1 * n for n in range(17)])
             for n in (0, 100)]
    options, drafted = {"temperature": temperature, "seed": 1}, 0
    for seed, kind in enumerate(KINDS):
        model = tiny(seed, vocab_size=24)
        heads = shaken(model, kind=kind, measure=measure)
        heads.calibration = {"0.90": list(thresholds)}
        for graphs in (False, True):
            decoder, twins = fast(model, heads, graphs)
            for policy in (partial(DSSD, thresholds=thresholds, max_draft=4),
                           partial(AutoDSSD, costs=costs)):
                wanted = generate(model, [1, 2, 3], 24, policy(heads), **options)
                out = generate(decoder, [1, 2, 3], 24, policy(twins), **options)
                assert (out.tokens, out.depths) == (wanted.tokens, wanted.depths)
                assert out.log == wanted.log
                drafted += sum(drafts for drafts, _ in out.log.rounds)
    assert drafted > 100


def test_early_exit_with_copied_state_is_the_readable_one():
    model = tiny(vocab_size=24)
    heads, texts = shaken(model), []
    for decoder, twins in ((model, heads), fast(model, heads), fast(model, heads, graphs=True)):
        policy = EarlyExit(twins, [2.2, 2.4, 2.6], "copy")
        texts.append(generate(decoder, [1, 2, 3], 40, policy).tokens)
        never = generate(decoder, [1, 2, 3], 40, EarlyExit(twins, [0.0] * 3, "copy"))
        assert never.tokens == generate(decoder, [1, 2, 3], 40, Plain()).tokens
    assert texts[0] == texts[1] == texts[2]


def test_a_decoder_serves_inside_and_outside_inference_mode():
    model = tiny()
    for graphs in (False, True):
        fused, _ = fast(model, None, graphs)
        for inside in (True, False, True):
            with torch.inference_mode(inside):
                cache, ids = fused.new_cache(1, 9), torch.tensor([[1, 2, 3]])
                x = fused.run(fused.embed(ids), 0, 4, cache)
                x = fused.run(x[:, :1], 0, 4, cache)
                assert x.shape == (1, 1, 32) and cache.length == [4] * 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_on_cuda_equal_eager():
    model = Pythia.from_pretrained(TOY, "cuda")
    heads = ExitHeads.load(TOY / "heads-fast.safetensors", model)
    pairs = fast(model, heads), fast(model, heads, graphs=True)
    for ids in held_out_prompts(4):
        runs = []
        for decoder, twins in pairs:
            policies = (Plain(), DSSD(twins, [1.0] * len(heads.layers)),
                        LayerSkip(twins, heads.layers[0], 3))
            done = [generate(decoder, ids, 64, policy) for policy in policies]
            runs.append([(generation.tokens, generation.depths) for generation in done])
        assert runs[0] == runs[1]


# ---------------------------------------------------------------- command line


def test_command_line():
    status, out, errors = call(room, "--repeats", "1", "--cached", "16")
    assert status == 0, errors
    assert "one token" in out and "the block head at depth" in out
    assert_refused(call(room, "--repeats", "0"), "--repeats")
    assert_refused(call(room, "--model", "no/such/folder"))
