"""The automatic level: the replay counts what decoding counts, and tuning chooses what is cheap."""
import math
import random

import numpy as np
import pytest
import torch

import appendix.tune as room
from appendix.fast import fast
from appendix.tune import Costs, automatic, measure_costs, race, record, replay, tune
from conftest import assert_refused, call, shaken, tiny
from dssd import DSSD, Plain, generate, summarize
from heads import held_out_prompts

FIXED = Costs([1.0] * 17, [0.5] * 17, [0.1] * 3, [0.1] * 3)


def test_replay_of_plain_decoding_is_the_sum_of_its_parts():
    costs = Costs(block=[1.0, 1.5, 2.0], ends=[3.0, 3.0, 3.0], draft=[0.5], always=[0.5])
    # the last token asks no head
    ms = replay([0, 2, 6], costs, [0.5], [None] * 10, [False] * 10, 4)
    assert ms == pytest.approx(6 + 0.5 * 0.9 + 3)
    # two good drafts per round: 2 shallow steps, then 3 rows through the deep part, for 3 tokens
    ms = replay([0, 2, 6], costs, [0.5], [0] * 300, [True] * 300, 2)
    assert ms == pytest.approx((2 * (2 + 0.5) + 2 + 4 * 2.0 + 3) / 3)
    # more rows than were timed cost as many as were timed
    ms = replay([0, 2, 6], costs, [0.5], [0] * 300, [True] * 300, 5)
    assert ms == pytest.approx((5 * (2 + 0.5) + 2 + 4 * 2.0 + 3) / 6)


def test_replay_with_two_exits_by_hand():
    costs = Costs([1.0, 1.5, 2.0, 2.5], [3.0] * 4, [0.5, 0.7], [0.5, 0.7])
    # the second exit drafts the first token, nobody the second: one round of two tokens
    ms = replay([0, 1, 3, 6], costs, [0.5, 0.7], [1, None] * 100 + [None], [True] * 201, 4)
    shallow = 2 * (1 + 0.5 + 2 + 0.7)
    deep = 3 * 1.5 + 3
    last = 6 + 3
    assert ms == pytest.approx((100 * (shallow + deep) + last) / 201)


def test_replay_counts_what_decoding_counts():
    model = tiny(vocab_size=24)
    heads, prompts = shaken(model, [1, 2]), [[i, i + 1] for i in range(12)]
    uncertainty, chance = record(model, heads, prompts, 40)
    assert uncertainty.shape == chance.shape == (12 * 39, 2)
    assert set(np.unique(chance)) <= {0.0, 1.0}
    # block time alone, one draft a round
    costs = Costs([1.0] * 20, [0.0] * 20, [0.0, 0.0], [0.0, 0.0])
    exits = [0 if u < 1.5 else None for u in uncertainty[:, 0]]
    ms = replay([0, 1, 4], costs, [0.0], exits, chance[:, 0].tolist(), 1)
    policy = DSSD(heads, [1.5, None], 1)
    runs = [generate(model, prompt, 40, policy) for prompt in prompts]
    did = summarize(policy, runs)
    # a round: 4 block steps; a draft: one more
    steps = did.rounds * 4 + did.drafted
    assert ms == pytest.approx(steps / (did.emitted - 12), rel=0.05)


def test_the_record_is_the_heads_own_answer_on_their_own_measure():
    model = tiny(vocab_size=24)
    heads = shaken(model, [1, 2], measure="margin")
    uncertainty, chance = record(model, heads, [[1, 2, 3]], 9)
    tokens = generate(model, [1, 2, 3], 9, Plain()).tokens
    full, hidden = model(torch.tensor([[1, 2, 3] + tokens[:-1]]), exits=[1, 2])
    for m, z in enumerate(heads.logits(hidden)):
        top = z[0, 3:].log_softmax(-1).exp().topk(2, -1).values
        wanted = top[:, 1] - top[:, 0]
        assert torch.allclose(torch.from_numpy(uncertainty[:, m]), wanted, atol=1e-5)
        agrees = (z[0, 3:].argmax(-1) == full[0, 3:].argmax(-1)).float()
        assert chance[:, m].tolist() == agrees.tolist()
    # at a temperature a draft is kept with the chance sum min(p, q)
    _, chance = record(model, heads, [[1, 2, 3]], 9, temperature=0.7)
    tokens = generate(model, [1, 2, 3], 9, Plain(), temperature=0.7, seed=0).tokens
    full, hidden = model(torch.tensor([[1, 2, 3] + tokens[:-1]]), exits=[1, 2])
    p = (full[0, 3:] / 0.7).softmax(-1)
    for m, z in enumerate(heads.logits(hidden)):
        q = (z[0, 3:] / 0.7).softmax(-1)
        shared = torch.minimum(p, q).sum(-1)
        assert torch.allclose(torch.from_numpy(chance[:, m]), shared, atol=1e-5)


def test_tune_prefers_what_is_cheap():
    generator = np.random.default_rng(0)
    uncertainty = generator.random((800, 2)).astype(np.float32)
    chance = (generator.random((800, 2)) > uncertainty).astype(float)
    cheap = Costs([1.0] * 17, [0.5] * 17, [0.01, 0.01], [0.01, 0.01])
    settings = tune([1, 2], 4, uncertainty, chance, cheap)
    ms, thresholds, cap = settings[0]
    assert any(t is not None for t in thresholds) and ms < 4.5
    assert [s.expected for s in settings] == sorted(s.expected for s in settings)
    plain = (4.5, [None, None], 1)
    assert plain in settings
    # one setting for each choice of heads and each cap: two heads, one pair
    assert len(settings) == 1 + 3 * len(room.CAPS)
    # plain decoding is the fastest where heads are dear
    dear = Costs(cheap.block, cheap.ends, [50.0, 50.0], [50.0, 50.0])
    assert tune([1, 2], 4, uncertainty, chance, dear)[0] == plain


def test_a_head_that_is_always_certain_pays_for_no_measure():
    uncertainty = np.linspace(0, 1, 300, dtype=np.float32)[:, None]
    costs = Costs([1.0] * 17, [0.5] * 17, [0.3], [0.1])
    best = tune([1], 4, uncertainty, np.ones((300, 1)), costs)[0]
    assert best.thresholds == [math.inf] and best.max_draft == 16


def test_costs_are_measured(toy, fast_heads):
    decoder, twins = fast(toy, fast_heads)
    M = len(fast_heads.layers)
    costs = measure_costs(decoder, twins, 3, repeats=3)
    assert [len(costs.block), len(costs.ends)] == [3, 3]
    assert [len(costs.draft), len(costs.always)] == [M, M]
    assert min(costs.block + costs.ends + costs.draft + costs.always) > 0
    # also where the context is short
    model = tiny()
    for kind in ("linear", "block"):
        costs = measure_costs(model, shaken(model, kind=kind), repeats=1)
        assert len(costs.block) == room.MOST_ROWS and len(costs.draft) == 3


def test_race_times_every_policy():
    model = tiny()
    policies = [DSSD(shaken(model), [None] * 3, 1), DSSD(shaken(model), [2.0, None, None], 3)]
    times = race(model, policies, [[1, 2], [3]], 6, temperature=0.5, repeats=2)
    assert len(times) == 2 and min(times) > 0


def test_the_fastest_in_the_race_is_taken(capsys):
    model = tiny(vocab_size=24)
    heads, prompts = shaken(model), [[i, i + 1] for i in range(6)]
    recorded = record(model, heads, prompts, 20)
    expected = tune(heads.layers, 4, *recorded, FIXED)
    drafting = [s for s in expected if any(t is not None for t in s.thresholds)]
    for winner in (0, 3, 6):
        seen = []

        def clock(decoder, policies, prompts, *_):
            seen.extend([len(policies), len(prompts)])
            return [1.0 if i == winner else 2.0 for i in range(len(policies))]

        policy = automatic(model, heads, prompts, 20, recorded=recorded, costs=FIXED, clock=clock)
        assert seen == [7, 3] and policy.name == "DSSD"
        said = capsys.readouterr().out
        if winner == 6:
            # plain decoding raced last and won
            assert policy.thresholds == (None,) * 3 and "plain decoding" in said
        else:
            assert policy.thresholds == tuple(drafting[winner].thresholds)
            assert policy.max_draft == drafting[winner].max_draft
            assert "automatic level: exit" in said and "nats" in said or "always" in said


def test_automatic_is_lossless(toy, fast_heads, capsys):
    decoder, twins = fast(toy, fast_heads)
    prompts = held_out_prompts(2, split="calibration")
    recorded = record(toy, fast_heads, prompts, 24, decoder=decoder)

    def clock(decoder, policies, *_):
        # the expected order decides
        return list(range(len(policies)))

    given = {"decoder": decoder, "twins": twins, "costs": FIXED, "clock": clock}
    policy = automatic(toy, fast_heads, prompts, 24, **given)
    assert automatic(toy, fast_heads, prompts, 24, recorded=recorded, **given) == policy
    assert "automatic level: exit" in capsys.readouterr().out
    assert policy.name == "DSSD" and policy.heads is twins
    runs = []
    for ids in held_out_prompts(2):
        runs.append(generate(decoder, ids, 24, policy))
        assert runs[-1].tokens == generate(decoder, ids, 24, Plain()).tokens
    assert summarize(policy, runs).accepted > 0


def test_automatic_without_twins_is_made_from_the_heads(capsys):
    model, rnd = tiny(), random.Random(0)
    heads = shaken(model, kind="block")
    prompts = [[rnd.randrange(96) for _ in range(5)] for _ in range(2)]
    policy = automatic(model, heads, prompts, 6, temperature=0.8, costs=FIXED)
    assert policy.heads is heads and "raced" in capsys.readouterr().out


@pytest.mark.slow
def test_demonstration():
    status, out, errors = call(room, "--prompts", "2", "--max-new-tokens", "12")
    assert status == 0, errors
    assert "expected" in out and "fastest in the race" in out


def test_bad_options(tmp_path):
    assert_refused(call(room, "--prompts", "0"), "--prompts")
    assert_refused(call(room, "--heads", tmp_path / "none"), "cannot be read as a heads file")
