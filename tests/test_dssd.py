"""Chapter 5: DSSD equals its definition and plain decoding, nothing twice, exact sampling, the
accounts."""
import math
import os
import random
from collections import Counter
from itertools import product

import pytest
import torch

import dssd as D
from conftest import assert_refused, call, run, shaken, tiny
from dssd import DSSD, EarlyExit, LayerSkip, Plain, by_definition, generate, summarize
from heads import KINDS, ExitHeads
from model import InputError, sample


def random_thresholds(rnd, n, low=0.0, high=4.0):
    """For every exit: never, (nearly) never certain, somewhere in between, or always."""
    between = rnd.uniform(low, high), rnd.uniform(low, high)
    return [rnd.choice((None, low, *between, math.inf)) for _ in range(n)]


def silence(model, blocks):
    """Make deep blocks add nothing, so that a shallower depth knows all that the full model knows.
    """
    for i in blocks:
        for linear in (model.layers[i].attention.dense, model.layers[i].mlp.dense_4h_to_h):
            linear.weight.zero_(), linear.bias.zero_()
    return model


class Counted:
    """Wraps model.run and counts for itself how often every (position, block) is computed."""

    def __init__(self, model):
        self.model, self.times, self.run_before = model, Counter(), model.run

    def __enter__(self):
        def run(x, start, stop, cache=None, between=None):
            offset = cache.length[start]
            for position in range(offset, offset + x.shape[1]):
                for block in range(start, stop):
                    self.times[position, block] += 1
            return self.run_before(x, start, stop, cache, between)
        self.model.run = run
        return self

    def __exit__(self, *_):
        del self.model.run


def logged(log):
    """How often every (position, block) was computed, as the log says."""
    times = Counter()
    for first, end, start, last in log.passes:
        times.update((p, b) for p in range(first, end) for b in range(start, last))
    return times


# --------------------------------------------------------------- the definition, and plain decoding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("measure", ["entropy", "margin"])
@pytest.mark.parametrize("cases", [10, pytest.param(24, marks=pytest.mark.slow)])
def test_dssd_equals_its_definition(kind, measure, cases):
    """Tokens, depths, rounds, draft lengths and acceptance, on 100 random cases, in CI on 240."""
    rnd, drafted = random.Random(f"{kind}, {measure}"), 0
    low, high = (0.0, 4.0) if measure == "entropy" else (-1.0, 0.0)
    for case in range(cases):
        model = tiny(case, vocab_size=24)
        if case % 2 == 0:
            # then many drafts are right
            silence(model, (2, 3))
        heads = shaken(model, kind=kind, measure=measure)
        ids = [rnd.randrange(24) for _ in range(rnd.choice((1, 5, 30, 58, 64)))]
        n, stop = rnd.choice((1, 7, 12, 20)), rnd.choice((None, rnd.randrange(24)))
        policy = DSSD(heads, random_thresholds(rnd, 3, low, high), rnd.randint(1, 8))
        if case % 4 == 3:
            policy = LayerSkip(heads, rnd.choice((1, 2, 3)), rnd.randint(1, 8))
        tokens, depths, rounds = by_definition(model, ids, n, policy, stop)
        out = generate(model, ids, n, policy, stop=stop)
        assert (out.tokens, out.depths, out.log.rounds) == (tokens, depths, rounds), (
            case, policy.thresholds)
        s = summarize(policy, [out])
        assert s.drafted == sum(d for d, _ in rounds) and s.accepted == sum(k for _, k in rounds)
        assert s.draft_lengths == Counter(d for d, _ in rounds)
        drafted += s.drafted
    assert drafted >= cases // 2


def test_plain_equals_the_reference_loop():
    model = tiny()
    assert generate(model, [5, 6, 7], 20, Plain()).tokens == list(sample(model, [5, 6, 7], 20))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trials", [4, pytest.param(12, marks=pytest.mark.slow)])
def test_lossless_and_nothing_computed_twice(kind, trials):
    """Against plain decoding on random models. A block is computed again only where a draft was
    rejected."""
    rnd = random.Random(2)
    for trial in range(trials):
        model = tiny(trial, vocab_size=24)
        heads = shaken(model, kind=kind)
        ids = [rnd.randrange(24) for _ in range(rnd.choice((1, 5, 30, 63, 64)))]
        n, stop = rnd.choice((1, 2, 7, 40)), rnd.choice((None, rnd.randrange(24)))
        plain = generate(model, ids, n, Plain(), stop=stop)
        assert summarize(Plain(), [plain]).layers_per_token == (4 if len(plain.tokens) > 1 else 0)
        for policy in (DSSD(heads, random_thresholds(rnd, 3), rnd.randint(1, 16)),
                       LayerSkip(heads, rnd.choice((1, 2, 3)), rnd.randint(1, 16))):
            with Counted(model) as counted:
                out = generate(model, ids, n, policy, stop=stop)
            s = summarize(policy, [out])
            assert out.tokens == plain.tokens, (trial, policy)
            # the log tells what was run
            assert counted.times == logged(out.log)
            # position by position: how often a token there was rejected and replaced
            again, at = Counter(), len(ids)
            for drafts, kept in out.log.rounds:
                again.update(range(at + kept + 1, at + drafts + 1))
                at += kept + 1
            for (position, _), times in counted.times.items():
                assert times <= 1 + again[position]
            assert sum(s.exits.values()) == s.emitted == len(out.tokens) == len(out.depths)
            assert sum(k * v for k, v in s.draft_lengths.items()) == s.drafted >= s.accepted
            assert max(s.draft_lengths, default=0) <= policy.max_draft


def check_on_the_toy(model, heads, prompts, new, seed=3):
    """Random settings, prompts up to the end of the context, and stop tokens: the text is Plain's.
    """
    rnd, accepted = random.Random(seed), 0
    for i, ids in enumerate(prompts):
        ids = ids[:rnd.choice((1, 8, 64))]
        if i == len(prompts) - 1:
            ids = (prompts[0] * 32)[:2048 - rnd.choice((0, 10, new - 1))]
        chosen = heads[i % 2]
        plain = generate(model, ids, new, Plain()).tokens
        assert len(plain) == min(new, 2048 - len(ids) + 1)
        # it then ends the text, often in a draft
        stop = rnd.choice(plain) if i % 7 == 0 else None
        low, high = (0.0, 4.0) if chosen.measure == "entropy" else (-1.0, 0.0)
        policy = DSSD(chosen, random_thresholds(rnd, len(chosen.layers), low, high),
                      rnd.randint(1, 16))
        if i % 5 == 4:
            policy = LayerSkip(chosen, rnd.choice(chosen.layers), rnd.randint(1, 16))
        out = generate(model, ids, new, policy, stop=stop)
        wanted = plain if stop is None else plain[:plain.index(stop) + 1]
        assert out.tokens == wanted, (i, policy.thresholds)
        accepted += summarize(policy, [out]).accepted
    return accepted


def test_lossless_on_the_toy(toy, paper_heads, fast_heads, prompts):
    assert check_on_the_toy(toy, [paper_heads, fast_heads], prompts[:6], 16) > 10


@pytest.mark.slow
def test_lossless_on_fifty_prompts_of_the_toy(toy, paper_heads, fast_heads, prompts):
    from appendix.fast import fast
    heads = []
    for own in (paper_heads, fast_heads):
        decoder, twins = fast(toy, own)
        heads.append(twins)
    assert check_on_the_toy(decoder, heads, prompts, 128) > 100


def test_cache_after_rejections_equals_a_fresh_one(monkeypatch):
    """After a generation: keys, values, and what a block head has read, beside a fresh cache over
    the same text."""
    frontiers = []

    class Kept(D.Frontier):
        def __init__(self, *args):
            super().__init__(*args)
            frontiers.append(self)

    monkeypatch.setattr(D, "Frontier", Kept)
    rnd = random.Random(4)
    for trial in range(8):
        model = tiny(trial, vocab_size=24)
        heads, ids = (shaken(model, kind="block" if trial % 2 else "linear"),
                      [rnd.randrange(24) for _ in range(6)])
        policy = DSSD(heads, [2.5, None, 3.0], rnd.randint(1, 6))
        text = ids + generate(model, ids, 30, policy).tokens
        f, fresh = frontiers[-1], model.new_cache(1, 64)
        n = f.reached[-1]
        with torch.no_grad():
            for layer, head, cache in zip((1, 3), f.heads, f.head_caches):
                if cache is not None:
                    known, own = cache.length[0], head.new_cache(1, 64)
                    head.body(model.hidden_states(torch.tensor([text[:known]]), (layer,))[0], own)
                    assert torch.allclose(own.kv[..., :known, :], cache.kv[..., :known, :],
                                          atol=1e-4)
                    assert 0 < known <= n
            model.run(model.embed(torch.tensor([text[:n]])), 0, 4, fresh)
        assert f.cache.length == [n] * 4
        assert torch.allclose(f.cache.kv[..., :n, :], fresh.kv[..., :n, :], atol=1e-4)


def test_unconsulted_heads_are_never_evaluated(monkeypatch):
    model = tiny()
    heads = shaken(model)
    monkeypatch.setattr(heads.heads[1], "body",
                        lambda *a: pytest.fail("a head with threshold None was asked"))
    generate(model, [1, 2, 3], 30, DSSD(heads, [2.0, None, math.inf]))
    policy = DSSD(heads, [None, None, None])
    out = generate(model, [1, 2, 3], 30, policy)
    s = summarize(policy, [out])
    assert s.drafted == 0 and s.layers_per_token == 4 and out.log.asked == []


def test_always_certain_counts_by_hand():
    model = tiny()
    policy = LayerSkip(ExitHeads(model, [2], "tied"), 2, 4)
    s = summarize(policy, [generate(model, [1, 2, 3], 21, policy)])
    assert s.rounds == sum(s.draft_lengths.values()) and s.emitted == 21
    assert s.tau == pytest.approx(20 / s.rounds)
    # each round: its drafts, and one of the full model
    assert s.accepted + s.rounds == 20
    assert s.wasted == s.drafted - s.accepted
    assert s.layers_per_token == pytest.approx(4 + 4 * s.wasted / 20)


def test_drafts_of_a_perfect_head_are_all_accepted():
    model = silence(tiny(), (2, 3))
    policy = DSSD(ExitHeads(model, [2], "tied"), [math.inf], 4)
    out = generate(model, [1, 2, 3], 26, policy)
    s = summarize(policy, [out])
    assert s.acceptance == 1 and s.tau == 5 and out.depths[1:6] == [2, 2, 2, 2, 4]


def test_a_summary_adds_generations_up():
    model = tiny()
    policy = DSSD(shaken(model), [2.5, None, 3.0], 4)
    runs = [generate(model, [i], 12, policy) for i in range(3)]
    each, all_ = [summarize(policy, [g]) for g in runs], summarize(policy, runs)
    for name in ("emitted", "drafted", "accepted", "wasted", "rounds", "prefill_seconds"):
        assert getattr(all_, name) == pytest.approx(sum(getattr(s, name) for s in each))
    assert all_.layers_per_token == pytest.approx(sum(s.layers_per_token for s in each) / 3)
    assert (math.isnan(summarize(Plain(), runs[:0]).tau)
            and math.isnan(summarize(Plain(), runs[:0]).acceptance))


# ---------------------------------------------------------------- early exit


def test_early_exit_exact_equals_recomputing_with_full_prefixes():
    model, heads = tiny(vocab_size=24), shaken(tiny(vocab_size=24))
    thresholds = [1.5, 2.0, 2.5]
    policy = EarlyExit(heads, thresholds)
    out = generate(model, [1, 2, 3], 30, policy)
    text = [1, 2, 3]
    for i, (token, depth) in enumerate(zip(out.tokens, out.depths)):
        full, hidden = model(torch.tensor([text]), exits=heads.layers)
        say = [(n, z[0, -1]) for n, z, t in zip(heads.layers, heads.logits(hidden), thresholds)
               if D.MEASURES["entropy"](z[0, -1]) < t]
        # the prefill's token is the full model's
        n, z = say[0] if say and i else (4, full[0, -1])
        assert (token, depth) == (z.argmax().item(), n)
        text.append(token)
    assert 0 < summarize(policy, [out]).layers_per_token < 4


def test_copied_state_is_another_approximation():
    model, heads = tiny(vocab_size=24), shaken(tiny(vocab_size=24))
    layers = {}
    for fill in ("exact", "copy"):
        policy = EarlyExit(heads, [2.2, 2.4, 2.6], fill)
        s = summarize(policy, [generate(model, [1, 2, 3], 40, policy)])
        layers[fill] = s.layers_per_token
        assert s.emitted == 40
    assert layers["copy"] <= layers["exact"]
    never = generate(model, [1, 2, 3], 40, EarlyExit(heads, [0.0] * 3, "copy"))
    assert never.tokens == generate(model, [1, 2, 3], 40, Plain()).tokens


# ---------------------------------------------------------------- sampling


@torch.inference_mode()
def exact_joint(model, ids, temperature, top_p, n=3):
    """P(first n tokens) by walking the whole tree."""
    paths = {(): 1.0}
    for _ in range(n):
        grown = {}
        for path, p in paths.items():
            logits, _ = model(torch.tensor([ids + list(path)]))
            q = D.distribution(logits[0, -1], temperature, top_p)
            grown.update({(*path, t): p * q[t].item() for t in range(len(q))})
        paths = grown
    return paths


# per case; CI takes 10,000 in all
DRAWS = int(os.environ.get("NANOEXIT_DRAWS", 200))


def chi_square(model, policy, temperature, top_p, draws=DRAWS):
    """The statistic of `draws` generations against the exact joint of 3 tokens, as a normal
    deviate."""
    torch.manual_seed(0)
    want, seen = exact_joint(model, [1, 2], temperature, top_p), Counter()
    # the fourth token lets the third be a draft
    for i in range(draws):
        out = generate(model, [1, 2], 4, policy, temperature=temperature, top_p=top_p, seed=i)
        seen[tuple(out.tokens[:3])] += 1
    assert all(want[path] > 0 for path in seen)
    big = {path: p * draws for path, p in want.items() if p * draws >= 8}
    rest = draws - sum(big.values())
    chi2 = sum((seen[path] - e) ** 2 / e for path, e in big.items())
    if rest > 1:
        chi2 += (draws - sum(seen[path] for path in big) - rest) ** 2 / rest
    df = len(big) - (rest <= 1)
    return (chi2 - df) / math.sqrt(2 * df)


def small(kind="linear"):
    model = tiny(vocab_size=4, hidden_size=16, intermediate_size=32,
                 num_hidden_layers=3, num_attention_heads=2)
    return model, shaken(model, [1, 2], kind)


@pytest.mark.parametrize("kind, thresholds, temperature, top_p", [
    ("linear", (math.inf, None), 1.0, 1.0), ("block", (0.9, 1.2), 0.7, 1.0),
    pytest.param("linear", (0.8, math.inf), 1.5, 0.85, marks=pytest.mark.slow)])
def test_sampled_output_has_the_full_models_distribution(kind, thresholds, temperature, top_p):
    model, heads = small(kind)
    assert abs(chi_square(model, DSSD(heads, thresholds, 3), temperature, top_p)) < 4


def one_by_one(full, drafts, choice, keep=None):
    """The older accept rule, draft by draft: min(1, p / q), or a wrong chance to keep a draft."""
    for i, (x, _, q) in enumerate(drafts):
        p = full[i]
        if choice.random() >= (keep(p, q)[x] if keep else p[x] / q[x]):
            return i, choice.draw(p if keep else (p - q).clip(0)), [1.0] * len(drafts)
    return len(drafts), choice.draw(full[-1]), [1.0] * len(drafts)


def keep_too_much(full, drafts, choice):
    return one_by_one(full, drafts, choice, lambda p, q: torch.ones_like(p))


def keep_by_the_root(full, drafts, choice):
    return one_by_one(full, drafts, choice, lambda p, q: p.sqrt())


class Unweighted(D.Choice):
    def residual(self, weight, p, q):
        return super().residual(1.0, p, q)


def two_drafts(rule, choice, n):
    """Two drafts of a head that always says q, for a model that always says p, n times -> (kept on
    average, chi-square of the first three tokens)."""
    p, q = torch.tensor([0.4, 0.4, 0.2]), torch.tensor([0.8, 0.1, 0.1])
    seen, total = Counter(), 0
    for _ in range(n):
        drafts = [D.Draft(choice.draw(q), 1, q) for _ in range(2)]
        kept, token, chances = rule([p] * 3, drafts, choice)
        # what was kept, what was drawn, and plain decoding
        text = [draft.token for draft in drafts[:kept]] + [token]
        text += [choice.draw(p) for _ in range(3 - len(text))]
        seen[tuple(text)] += 1
        total += kept
        if rule is D.verify and type(choice) is D.Choice:
            # after the token 0 with w_1 = 0.5, else with 1
            assert chances == pytest.approx([0.6, 0.6 if drafts[0].token else 0.8], abs=1e-6)
    chi2 = 0
    for text in product(range(3), repeat=3):
        want = n * math.prod(p[x].item() for x in text)
        chi2 += (seen[text] - want) ** 2 / want
    return total / n, chi2


@pytest.mark.parametrize("rule, kept", [(one_by_one, 0.96), (D.verify, 1.04)])
def test_a_block_keeps_more_than_its_drafts_one_by_one(rule, kept):
    average, chi2 = two_drafts(rule, D.Choice(1.0, 1.0, 0), 5000)
    # one by one: 0.6 + 0.6^2. As a block: 0.6, and 0.8 w_1 0.8 + 0.2 0.6
    assert average == pytest.approx(kept, abs=0.03)
    assert chi2 < 54.1                                   # 26 degrees of freedom: once in 1,000


def test_a_residual_without_its_weight_fails_the_same_test():
    assert two_drafts(D.verify, Unweighted(1.0, 1.0, 0), 10000)[1] > 80


def test_a_block_of_certain_or_equal_heads_is_kept_or_dropped_whole():
    choice, p = D.Choice(1.0, 1.0, 0), torch.tensor([0.25, 0.75, 0.0])
    never, drafts = torch.tensor([0.0, 0.0, 1.0]), [D.Draft(1, 1, p)] * 3
    for _ in range(50):
        assert D.verify([p] * 4, drafts, choice)[0] == 3
        kept, token, chances = D.verify([p] * 3, [D.Draft(2, 1, never)] * 2, choice)
        assert kept == 0 and token < 2 and chances == [0.0]


@pytest.mark.parametrize("wrong, draws", [
    (keep_too_much, 150), pytest.param(keep_by_the_root, 800, marks=pytest.mark.slow)])
def test_a_wrong_accept_rule_fails_the_same_test(monkeypatch, wrong, draws):
    model, heads = small()
    monkeypatch.setattr(D, "verify_block", wrong)
    assert chi_square(model, DSSD(heads, (math.inf, None), 3), 1.0, 1.0, draws) > 6


def test_sampling_is_reproducible_and_top_p_is_the_nucleus():
    model, heads = small()
    runs = [generate(model, [1], 20, DSSD(heads, [1.0, 1.0]), temperature=1.0, seed=s).tokens
            for s in (7, 7, 8)]
    assert runs[0] == runs[1] != runs[2]
    p = D.distribution(torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), 1.0, 0.7)
    assert torch.allclose(p, torch.tensor([0.625, 0.375, 0, 0]))


# ---------------------------------------------------------------- bad input, command line


def test_bad_requests():
    model = tiny()
    heads = shaken(model)
    strange = shaken(model, measure="mood")
    for ids, n, policy, options, words in (
            ([], 5, Plain(), {}, "empty"), ([1] * 65, 5, Plain(), {}, "the context holds 64"),
            ([1], 0, Plain(), {}, "at least 1"),
            ([1], 5, DSSD(heads, [1.0]), {}, "1 thresholds were given for 3 heads"),
            ([1], 5, Plain(), {"temperature": -1}, "temperature"),
            ([1], 5, Plain(), {"top_p": 0}, "top_p"),
            ([1], 5, DSSD(strange, [1.0] * 3), {}, "'mood' is not one of entropy")):
        with pytest.raises(InputError, match=words):
            generate(model, ids, n, policy, **options)
    for make in (lambda: LayerSkip(heads, 5, 2), lambda: LayerSkip(heads, 1, 0),
                 lambda: DSSD(heads, [1] * 3, 0),
                 lambda: EarlyExit(heads, [1] * 3, "guess")):
        with pytest.raises(InputError):
            make()


def test_the_stream_is_coloured_on_a_terminal_only(toy_tokenizer, monkeypatch, capsys):
    pairs = [(toy_tokenizer.encode("def")[0], 4), (toy_tokenizer.encode("\u00e9")[0], 16),
             (toy_tokenizer.end, 16)]
    monkeypatch.setattr(D.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert D.show_stream(toy_tokenizer, pairs, 16) == pairs
    coloured = capsys.readouterr().out
    assert f"\033[38;5;{D.terminal_colour(4, 16)}mdef" in coloured
    assert f"\033[38;5;{D.terminal_colour(16, 16)}m16 of 16 blocks 67%" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    D.show_stream(toy_tokenizer, pairs, 16)
    assert "\033" not in capsys.readouterr().out
    assert len({D.terminal_colour(d, 16) for d in (2, 4, 10, 16)}) == 4


def test_command_line(tmp_path):
    status, out, errors = call(D, "--prompts", 1, "--max-new-tokens", 8, "--level", "0.9",
                               "--figure", tmp_path / "tokens.png")
    assert status == 0, errors
    assert ("\033" not in out and "LayerSkip 4x8" in out
            and (tmp_path / "tokens.png").stat().st_size > 3000)
    rows = [line.split() for line in out.splitlines()
            if line.startswith(("DSSD,", "DSSD ", "LayerSkip"))]
    assert len(rows) == 4 + 9 and all(row[-1] == "100%" for row in rows)  # the same text as Plain
    assert_refused(run("dssd.py", "--level", "high"), "argument --level", "'high'")
    assert_refused(call(D, "--level", "0.4"), "not calibrated for level 0.4")
    assert_refused(call(D, "--prompt", ""), "empty")
    assert_refused(call(D, "--heads", tmp_path / "none"), "cannot be read as a heads file")
    assert_refused(call(D, "--figure", tmp_path / "none" / "f.png"), "there is no folder")
