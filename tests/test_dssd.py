"""Chapter 5: lossless against plain decoding, no block evaluated twice, exact sampling, and the bookkeeping."""
import math
import os
import random
from collections import Counter

import pytest
import torch

import dssd as D
from conftest import TOY, assert_refused, run, tiny
from dssd import DSSD, EarlyExit, LayerSkip, Plain, Stats, fast, generate, held_out_prompts
from heads import KINDS, ExitHeads
from model import InputError, Pythia, sample
from test_heads import shaken


def random_thresholds(rnd, n):
    return [rnd.choice((None, 0.0, rnd.random() * 4, rnd.random() * 4, math.inf)) for _ in range(n)]


# ---------------------------------------------------------------- the fused twin


@pytest.mark.parametrize("partial", [0.25, 1.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("graphs", [False, True])
def test_fused_equals_readable(partial, kind, graphs):
    model, rnd = tiny(rotary_pct=partial), random.Random(1)
    fused, heads = fast(model, graphs), shaken(model, [1, 3], kind)
    ids = torch.randint(0, 96, (1, 60))
    caches, at = (model.new_cache(1, 60), fused.new_cache(1, 60)), 0
    while at < 60:
        n = min(rnd.choice((1, 2, 7, 40)), 60 - at)
        a, b = (m.run(m.embed(ids[:, at:at + n]), 0, 4, c) for m, c in zip((model, fused), caches))
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
        assert torch.allclose(model.unembed(a), fused.unembed(b), rtol=1e-4, atol=1e-3)
        at += n
    for head in heads.heads:
        twin = fused.twin(head)
        own, others = head.new_cache(1, 60), twin.new_cache(1, 60)
        for n, back_to in ((5, None), (1, 3), (20, None), (2, 9), (1, None), (7, 0)):
            x = torch.randn(1, n, 32)                                     # read on, or back to an earlier position first
            if own and back_to is not None:
                own.truncate(back_to), others.truncate(back_to)
            assert torch.allclose(head(x, own), twin.output(twin.body(x, others)), rtol=1e-4, atol=1e-3)
        if own:
            for reader, cache in ((head, own), (twin, others)):
                with pytest.raises(InputError, match="61 tokens do not fit"):
                    reader.body(torch.randn(1, 54, 32), cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, m", [(40, 24), (256, 300), (1024, 1024)])      # plain, packed, packed and padded to four rows
def test_products_equal_plain_ones_in_float64(dtype, n, m):
    torch.manual_seed(0)
    w, b = torch.randn(n, m, dtype=torch.double).to(dtype).double(), torch.randn(m).to(dtype)
    for offset in (b, None):
        product = D.Product(w, offset, dtype)
        for T in (1, 2, 3, 5, 18):
            x, rest, out = torch.randn(T, n).to(dtype), torch.randn(T, m).to(dtype), torch.empty(T, m)
            want = x.double() @ w + (0 if offset is None else offset.double())
            near = {"rtol": 1e-4 if dtype == torch.float32 else 0.02, "atol": 1e-3 if dtype == torch.float32 else 0.4}
            assert product(x).shape == (T, m) and product(x).dtype == dtype and torch.allclose(product(x).double(), want, **near)
            assert torch.allclose(product.onto(rest, x).double(), rest.double() + want, **near)
            product.into(out, x)
            assert torch.allclose(out.double(), want, **near)
            if offset is not None:
                assert torch.allclose(product.columns(3, 9, x).double(), want[:, 3:9], **near)
    if D.packs(dtype):
        assert product.packed == (dtype == torch.bfloat16 or n >= 256)


@pytest.mark.parametrize("packed", [True, False])                        # False: as on a machine without packed products
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("wide", [True, False])                          # in float32, wide enough to be packed, or not
def test_fused_in_bfloat16_and_with_or_without_packed_products(packed, graphs, wide, monkeypatch):
    if not packed:
        monkeypatch.setattr(D, "packs", lambda dtype: False)
    elif not D.packs(torch.bfloat16):
        pytest.skip("oneDNN has no packed products in bfloat16 here")
    model = tiny(**{"hidden_size": 256, "intermediate_size": 512} if wide else {})
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.35 if wide and p.dim() == 2 else 1)
    ids, heads = torch.randint(0, 96, (1, 30)), shaken(model, [2], "block")
    want = generate(model, [1, 2], 30, Plain()).tokens
    assert generate(fast(model, graphs), [1, 2], 30, DSSD(heads, [2.0])).tokens == want
    exact, model = model(ids)[0], model.bfloat16()
    fused, at, parts = fast(model, graphs), 0, []
    cache, readable = fused.new_cache(1, 30), model(ids)[0]
    for n in (4, 1, 3, 1, 2, 18, 1):
        parts.append(fused.unembed(fused.run(fused.embed(ids[:, at:at + n]), 0, 4, cache)))
        at += n
    apart = (readable.float() - exact).pow(2).mean().sqrt()               # what bfloat16 itself does
    assert (torch.cat(parts, 1).float() - exact).pow(2).mean().sqrt() < 1.5 * apart
    a, b, x = model.new_cache(1, 2), fused.new_cache(1, 2), model.embed(ids[:, :1])
    model.keys_values(x, 3, a), fused.keys_values(x, 3, b)
    assert torch.allclose(a.kv[3, 1, ..., :1, :], b.kv[3, 1, ..., :1, :], rtol=0.05, atol=0.05)   # values: keys are reordered


def test_unknown_types_are_not_packed():
    assert not D.packs(torch.float16) and not D.packs(torch.float64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_on_cuda_equal_eager():
    model = Pythia.from_pretrained(TOY, "cuda")
    heads = ExitHeads.load(TOY / "heads-fast.safetensors", model)
    decoders = fast(model), fast(model, graphs=True)
    for ids in held_out_prompts(TOY, 4):
        for policy in (Plain(), DSSD(heads, [1.0] * len(heads.layers)), LayerSkip(heads, heads.layers[0], 3)):
            eager, graphed = (generate(decoder, ids, 64, policy) for decoder in decoders)
            assert eager.tokens == graphed.tokens and eager.depths == graphed.depths


def test_sequential_models_stay_readable():
    model = tiny(use_parallel_residual=False)
    assert fast(model) is model
    assert generate(model, [1, 2], 9, DSSD(shaken(model), [1.0, 2.0, None])).tokens == generate(model, [1, 2], 9, Plain()).tokens


def test_plain_equals_the_reference_loop():
    model = tiny()
    for decoder in (model, fast(model)):
        assert generate(decoder, [5, 6, 7], 20, Plain()).tokens == list(sample(model, [5, 6, 7], 20))


# ---------------------------------------------------------------- lossless, and nothing twice


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [lambda model: model, fast, lambda model: fast(model, graphs=True)],
                         ids=["readable", "fused", "static shapes"])
def test_lossless_on_random_models(kind, make):
    rnd = random.Random(2)
    for trial in range(25):
        model = tiny(trial, vocab_size=24)
        decoder, heads = make(model), shaken(model, kind=kind)
        ids = [rnd.randrange(24) for _ in range(rnd.choice((1, 5, 30, 63, 64)))]
        n, stop = rnd.choice((1, 2, 7, 40)), rnd.choice((None, rnd.randrange(24)))
        plain = generate(decoder, ids, n, Plain(), stop=stop)
        assert plain.stats.blocks == (len(plain.tokens) - 1) * 4
        for policy in (DSSD(heads, random_thresholds(rnd, 3), rnd.randint(1, 16), veto=rnd.random() < 0.5),
                       LayerSkip(heads, rnd.choice((1, 2, 3)), rnd.randint(1, 16))):
            out = generate(decoder, ids, n, policy, stop=stop)
            s = out.stats
            assert out.tokens == plain.tokens, (trial, policy)
            assert s.blocks == (s.emitted - 1) * 4 + s.redone             # again only for drafts that were rejected
            assert sum(s.exits.values()) == s.emitted == len(out.tokens) == len(out.depths)
            assert sum(k * v for k, v in s.draft_lengths.items()) == s.drafted >= s.accepted
            assert max(s.draft_lengths, default=0) <= policy.max_draft


def test_lossless_on_the_toy(toy):
    rnd = random.Random(3)
    decoder = fast(toy)
    prompts = held_out_prompts(TOY, 50)
    heads = [ExitHeads.load(TOY / f"heads{kind}.safetensors", toy) for kind in ("", "-fast")]
    total = Stats()
    for i, ids in enumerate(prompts):
        ids = ids[:rnd.choice((1, 8, 64))] if i < 47 else (ids * 32)[:2048 - rnd.choice((0, 40, 127))]
        plain = generate(decoder, ids, 128, Plain())
        assert len(plain.tokens) == min(128, 2048 - len(ids) + 1)
        chosen = heads[i % 2]
        stop = rnd.choice(plain.tokens) if i % 7 == 0 else None           # it then ends the text, often within a draft
        policy = DSSD(chosen, random_thresholds(rnd, len(chosen.layers)), rnd.randint(1, 16), veto=i % 3 == 0)
        if i % 5 == 4:
            policy = LayerSkip(chosen, rnd.choice(chosen.layers), rnd.randint(1, 16))
        out = generate(decoder, ids, 128, policy, stop=stop, stats=Stats())
        wanted = plain.tokens[:plain.tokens.index(stop) + 1] if stop is not None else plain.tokens
        assert out.tokens == wanted, (i, policy.thresholds)
        assert out.stats.blocks == (out.stats.emitted - 1) * 16 + out.stats.redone
        total += out.stats
    assert total.accepted > 100                                           # the drafts were not all idle


def test_cache_after_rejections_equals_a_fresh_one():
    rnd = random.Random(4)
    for trial in range(20):
        model = tiny(trial, vocab_size=24)
        heads, ids = shaken(model, kind="block" if trial % 2 else "linear"), [rnd.randrange(24) for _ in range(6)]
        policy = DSSD(heads, [2.5, None, 3.0], rnd.randint(1, 6), veto=trial % 3 == 0)
        decoder = D.Decoder(model, ids, 30, policy, 0.0, 1.0, None, 0, Stats())   # the fused twin's head caches are tested above
        text = ids + [token for token, _ in decoder]
        f, fresh = decoder.frontier, model.new_cache(1, 64)
        for head, cache, unread in zip(f.heads, f.head_caches, f.unread):   # what a block head has read is right as well
            if cache:
                known, layer = cache.length[0], head.backbone[0].hidden_states
                own = head.new_cache(1, 64)
                with torch.no_grad():
                    head.body(layer(torch.tensor([text[:known]]), (policy.heads.layers[[*policy.heads.heads].index(head)],))[0], own)
                assert torch.allclose(own.kv[..., :known, :], cache.kv[..., :known, :], atol=1e-4)
                assert known + (0 if unread is None else unread.shape[1]) == f.reached[-1]
        n = f.reached[-1]
        with torch.no_grad():
            model.run(model.embed(torch.tensor([text[:n]])), 0, 4, fresh)
        assert f.cache.length == [n] * 4
        assert torch.allclose(f.cache.kv[..., :n, :], fresh.kv[..., :n, :], atol=1e-4)


def test_unconsulted_heads_are_never_evaluated(monkeypatch):
    model = tiny()
    heads = shaken(model)
    monkeypatch.setattr(heads.heads[1], "body", lambda *a: pytest.fail("a head with threshold None was asked"))
    generate(model, [1, 2, 3], 30, DSSD(heads, [2.0, None, math.inf]))
    never = generate(model, [1, 2, 3], 30, DSSD(heads, [None, None, None])).stats
    assert never.drafted == 0 and never.blocks == 29 * 4
    assert never.extra_cost == pytest.approx(29 * 96 / 384)               # the full model's unembedding alone


def test_always_certain_counts_by_hand():
    model = tiny()
    s = generate(model, [1, 2, 3], 21, LayerSkip(ExitHeads(model, [2], "tied"), 2, 4)).stats
    assert s.rounds == sum(s.draft_lengths.values()) and s.emitted == 21 and s.prefills == 1
    assert s.tau == pytest.approx(20 / s.rounds)
    assert s.accepted + s.rounds == 20                                    # each round: its drafts, and one of the full model
    assert s.wasted == s.drafted - s.accepted and s.redone == 4 * s.wasted
    assert s.layers_per_token == pytest.approx(4 + 4 * s.wasted / 20)


def silence(model, blocks):
    """Make deep blocks add nothing, so that a shallower depth knows all that the full model knows."""
    for i in blocks:
        for linear in (model.layers[i].attention.dense, model.layers[i].mlp.dense_4h_to_h):
            linear.weight.zero_(), linear.bias.zero_()
    return model


def test_drafts_of_a_perfect_head_are_all_accepted():
    model = silence(tiny(), (2, 3))
    heads = ExitHeads(model, [2], "tied")
    for decoder in (model, fast(model)):
        out = generate(decoder, [1, 2, 3], 26, DSSD(heads, [math.inf], 4))
        assert out.stats.acceptance == 1 and out.stats.tau == 5 and out.depths[1:6] == [2, 2, 2, 2, 4]


def test_a_well_informed_veto_saves_work():
    wasted = 0
    for seed in range(8):
        model = silence(tiny(seed, vocab_size=24), (3,))                  # the head at depth 3 is always right
        heads = ExitHeads(model, [1, 3], "tied")
        cut, whole = (generate(model, [1, 2], 50, DSSD(heads, [math.inf, math.inf], 8, veto=v)) for v in (True, False))
        assert cut.tokens == whole.tokens and cut.stats.wasted == whole.stats.wasted
        assert cut.stats.redone == 3 * cut.stats.wasted and whole.stats.redone == 4 * whole.stats.wasted
        wasted += whole.stats.wasted
    assert wasted > 0


# ---------------------------------------------------------------- early exit


def test_early_exit_exact_equals_recomputing_with_full_prefixes():
    model, heads = tiny(vocab_size=24), shaken(tiny(vocab_size=24))
    thresholds = [1.5, 2.0, 2.5]
    out = generate(model, [1, 2, 3], 30, EarlyExit(heads, thresholds))
    text = [1, 2, 3]
    for i, (token, depth) in enumerate(zip(out.tokens, out.depths)):
        full, hidden = model(torch.tensor([text]), exits=heads.layers)
        say = [(n, z[0, -1]) for n, z, t in zip(heads.layers, heads.logits(hidden), thresholds) if D.entropy(z[0, -1]) < t]
        n, z = say[0] if say and i else (4, full[0, -1])                  # the prefill's token is the full model's
        assert (token, depth) == (z.argmax().item(), n)
        text.append(token)
    assert 0 < out.stats.layers_per_token < 4


def test_copied_state_is_another_approximation():
    model, heads = tiny(vocab_size=24), shaken(tiny(vocab_size=24))
    for decoder in (model, fast(model), fast(model, graphs=True)):
        exact, copy = (generate(decoder, [1, 2, 3], 40, EarlyExit(heads, [2.2, 2.4, 2.6], fill)) for fill in ("exact", "copy"))
        assert copy.stats.blocks <= exact.stats.blocks and copy.stats.emitted == 40
        never = generate(decoder, [1, 2, 3], 40, EarlyExit(heads, [0.0] * 3, "copy"))
        assert never.tokens == generate(decoder, [1, 2, 3], 40, Plain()).tokens
    a, b, c = (generate(m, [1, 2, 3], 40, EarlyExit(heads, [2.2, 2.4, 2.6], "copy")).tokens
               for m in (model, fast(model), fast(model, graphs=True)))
    assert a == b == c


# ---------------------------------------------------------------- sampling


@torch.inference_mode()
def exact_joint(model, ids, temperature, top_p, n=3):
    """P(first n tokens) by walking the whole tree."""
    paths = {(): 1.0}
    for _ in range(n):
        grown = {}
        for path, p in paths.items():
            cache, text = model.new_cache(1, 9), torch.tensor([ids + list(path)])
            x = model.run(model.embed(text), 0, model.config.num_hidden_layers, cache)
            q = D.distribution(model.unembed(x)[0, -1], temperature, top_p)
            grown.update({(*path, t): p * q[t].item() for t in range(len(q))})
        paths = grown
    return paths


DRAWS = int(os.environ.get("NANOEXIT_DRAWS", 4000))                       # per case; CI takes 24,000 in all


def chi_square(model, policy, temperature, top_p, draws=DRAWS):
    """The statistic of `draws` generations against the exact joint of 3 tokens, as a normal deviate."""
    torch.manual_seed(0)
    want = exact_joint(model, [1, 2], temperature, top_p)
    seen = Counter(tuple(generate(model, [1, 2], 4, policy, temperature=temperature, top_p=top_p, seed=i).tokens[:3])
                   for i in range(draws))   # the fourth token lets the third be a draft
    assert all(want[path] > 0 for path in seen)
    big = {path: p * draws for path, p in want.items() if p * draws >= 8}
    rest = draws - sum(big.values())
    chi2 = sum((seen[path] - e) ** 2 / e for path, e in big.items())
    if rest > 1:
        chi2 += (draws - sum(seen[path] for path in big) - rest) ** 2 / rest
    df = len(big) - (rest <= 1)
    return (chi2 - df) / math.sqrt(2 * df)


def small(kind="linear"):
    model = tiny(vocab_size=4, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    return fast(model), shaken(model, [1, 2], kind)


@pytest.mark.parametrize("kind, thresholds, temperature, top_p", [("linear", (math.inf, None), 1.0, 1.0), ("block", (0.9, 1.2), 0.7, 1.0),
                                                                  ("linear", (0.8, math.inf), 1.5, 0.85)])
def test_sampled_output_has_the_full_models_distribution(kind, thresholds, temperature, top_p):
    model, heads = small(kind)
    assert abs(chi_square(model, DSSD(heads, thresholds, 3), temperature, top_p)) < 4


def test_a_wrong_accept_rule_fails_the_same_test(monkeypatch):
    model, heads = small()
    monkeypatch.setattr(D, "keep_or_replace", lambda p, q, token, generator: (True, token) if
                        torch.rand((), generator=generator) < p[token].sqrt() else (False, D.draw(p, generator)))
    assert chi_square(model, DSSD(heads, (math.inf, None), 3), 1.0, 1.0, draws=2000) > 10


def test_sampling_is_reproducible_and_top_p_is_the_nucleus():
    model, heads = small()
    runs = [generate(model, [1], 20, DSSD(heads, [1.0, 1.0]), temperature=1.0, seed=s).tokens for s in (7, 7, 8)]
    assert runs[0] == runs[1] != runs[2]
    p = D.distribution(torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), 1.0, 0.7)
    assert torch.allclose(p, torch.tensor([0.625, 0.375, 0, 0]))


# ---------------------------------------------------------------- the automatic level


def test_replay_of_plain_decoding_is_the_sum_of_its_parts():
    cost = {"block": [1.0, 1.5, 2.0], "full": [3.0, 3.0, 3.0], "head": [0.5], "choice": [0.5]}
    assert D.replay({0: 2}, 6, [None] * 10, [False] * 10, 4, cost) == pytest.approx(6 + 0.5 * 0.9 + 3)   # the last asks none
    # two good drafts per round: 2 shallow steps, then 3 rows through the deep part, for 3 tokens
    ms = D.replay({0: 2}, 6, [0] * 300, [True] * 300, 2, cost)
    assert ms == pytest.approx((2 * (2 + 0.5) + 2 + 4 * 2.0 + 3) / 3)


def test_replay_counts_what_decoding_counts():
    model = tiny(vocab_size=24)
    heads, prompts = shaken(model, [1, 2]), [[i, i + 1] for i in range(12)]
    uncertainty, kept = D.record(model, heads, prompts, 40)
    assert uncertainty.shape == kept.shape == (12 * 39, 2)
    cost = {"block": [1.0] * 20, "full": [0.0] * 20, "head": [0.0, 0.0], "choice": [0.0, 0.0]}
    exits = [0 if u < 1.5 else None for u in uncertainty[:, 0]]
    ms = D.replay({0: 1}, 4, exits, kept[:, 0].tolist(), 1, cost)         # block time alone, one draft a round
    total = Stats()
    for p in prompts:
        generate(model, p, 40, DSSD(heads, [1.5, None], 1), stats=total)
    steps = total.rounds * 4 + total.drafted                              # a round: 4 block steps; a draft: one more
    assert ms == pytest.approx(steps / total.decoded, rel=0.05)


def test_tune_prefers_what_is_cheap():
    rnd = torch.Generator().manual_seed(0)
    u = torch.rand(2000, 2, generator=rnd).numpy()
    kept = (torch.rand(2000, 2, generator=rnd).numpy() > u).astype(float)
    model = tiny()
    heads = ExitHeads(model, [1, 2])
    cheap = {"block": [1.0] * 17, "full": [0.5] * 17, "head": [0.01, 0.01], "choice": [0.01, 0.01]}
    found = D.tune(model, heads, u, kept, cheap)
    ms, thresholds, cap = found[0]
    assert any(t is not None for t in thresholds) and ms < 4.5
    assert [f[0] for f in found] == sorted(f[0] for f in found) and (4.5, [None, None], 1) in found
    dear = {**cheap, "head": [50.0, 50.0], "choice": [50.0, 50.0]}
    assert D.tune(model, heads, u, kept, dear)[0] == (4.5, [None, None], 1)   # plain decoding is then the fastest


def test_automatic_is_lossless_and_costs_are_measured(toy, capsys, monkeypatch):
    heads, decoder = ExitHeads.load(TOY / "heads-fast.safetensors", toy), fast(toy)
    cost = D.measure(decoder, heads, 3, repeats=3)
    monkeypatch.setattr(D, "measure", lambda *_: {"block": [1.0] * 17, "full": [0.5] * 17, "head": [0.1] * 3, "choice": [0.1] * 3})
    monkeypatch.setattr(D, "run_in_turn", lambda decoder, entrants, *_, **__: {    # the expected order decides, not the clock
        p.name: [(Stats(emitted=2, decode_seconds=1 + float(p.name)), [])] for p in entrants})
    prompts = held_out_prompts(TOY, 2, split="calibration")
    known = D.record(toy, heads, prompts, 24)
    policy = D.automatic(toy, heads, prompts, 24)
    monkeypatch.setattr(D, "record", lambda *_: pytest.fail("recorded again"))
    assert D.automatic(toy, heads, prompts, 24, recorded=known) == policy
    assert "automatic level: exit" in capsys.readouterr().out and policy.name == "DSSD"
    stats = Stats()
    for ids in held_out_prompts(TOY, 2):
        assert generate(decoder, ids, 24, policy, stats=stats).tokens == generate(decoder, ids, 24, Plain()).tokens
    assert stats.accepted > 0
    assert {k: len(v) for k, v in cost.items()} == {"block": 3, "full": 3, "head": len(heads.layers), "choice": len(heads.layers)}
    assert min(cost["block"]) > 0 and min(cost["full"] + cost["head"] + cost["choice"]) >= 0


# ---------------------------------------------------------------- bad input, command line


def test_bad_requests():
    model = tiny()
    heads = shaken(model)
    for ids, n, policy, options, words in (
            ([], 5, Plain(), {}, "empty"), ([1] * 65, 5, Plain(), {}, "the context holds 64"), ([1], 0, Plain(), {}, "at least 1"),
            ([1], 5, DSSD(heads, [1.0]), {}, "1 thresholds were given for 3 heads"),
            ([1], 5, Plain(), {"temperature": -1}, "temperature"), ([1], 5, Plain(), {"top_p": 0}, "top_p")):
        with pytest.raises(InputError, match=words):
            generate(model, ids, n, policy, **options)
    for make in (lambda: LayerSkip(heads, 5, 2), lambda: LayerSkip(heads, 1, 0), lambda: DSSD(heads, [1] * 3, 0),
                 lambda: EarlyExit(heads, [1] * 3, "guess")):
        with pytest.raises(InputError):
            make()


def test_the_stream_is_coloured_on_a_terminal_only(toy_tokenizer, monkeypatch, capsys):
    pairs = [(toy_tokenizer.encode("def")[0], 4), (toy_tokenizer.encode("\u00e9")[0], 16), (toy_tokenizer.end, 16)]
    monkeypatch.setattr(D.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert D.show_stream(toy_tokenizer, pairs, 16) == pairs
    coloured = capsys.readouterr().out
    assert f"\033[38;5;{D.colour(4, 16)[1]}mdef" in coloured and f"\033[38;5;{D.colour(16, 16)[1]}m16 of 16 blocks 67%" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    D.show_stream(toy_tokenizer, pairs, 16)
    assert "\033" not in capsys.readouterr().out
    assert len({D.colour(d, 16) for d in (2, 6, 10)}) == 3


def test_command_line(tmp_path):
    status, out, errors = run("dssd.py", "--prompts", "1", "--max-new-tokens", "16", "--level", "0.9",
                              "--figure", tmp_path / "tokens.png", NO_COLOR="1")
    assert status == 0, errors
    assert "\033" not in out and "LayerSkip's grid" in out and (tmp_path / "tokens.png").stat().st_size > 3000
    row = next(line.split() for line in out.splitlines() if line.startswith("DSSD"))
    assert row[-1] == "100%"                                              # the same text as Plain
    assert_refused(run("dssd.py", "--level", "high"), "--level 'high'")
    assert_refused(run("dssd.py", "--level", "0.4"), "not calibrated for level 0.4")
    assert_refused(run("dssd.py", "--prompt", ""), "empty")
    assert_refused(run("dssd.py", "--heads", tmp_path / "none"), "cannot be read as a heads file")
