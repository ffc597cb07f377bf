"""The costs of drafting: measured with the loop, and near what fixed pieces of work cost."""
import time

import pytest

import appendix.tune as T
from appendix.fast import fast
from appendix.gain import AutoDSSD
from conftest import assert_refused, call, shaken, tiny
from dssd import Plain, generate
from heads import ExitHeads
from model import TOY
from test_dssd import silence


def clocked(model, monkeypatch):
    """The model, on a clock of its own: every block of every pass takes 1 ms for each row."""
    now, run = [0.0], model.run

    def timed(x, start, stop, *others):
        now[0] += (stop - start) * x.shape[1] / 1000
        return run(x, start, stop, *others)
    model.run = timed
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return model


def test_costs_are_those_of_the_work_that_is_done(monkeypatch):
    model = clocked(tiny(max_position_embeddings=64), monkeypatch)
    heads = shaken(model, [1, 3])
    few, many = T.measure_costs(model, heads, repeats=2)
    assert (few.positions, many.positions) == (4, 32)
    for costs in (few, many):
        # a plain step and one more row of a verification: 4 blocks; a question: no block. A draft
        # does the first block of its row, and the verification the other three. So it adds nothing
        assert costs.plain == pytest.approx(4)
        assert costs.rows == pytest.approx([4 * row for row in range(17)])
        assert [costs.first, costs.further] == pytest.approx([0, 0])
        assert costs.question == pytest.approx(0) and costs.deeper == pytest.approx([0, 0])


def test_a_short_context_holds_rounds_enough(monkeypatch):
    """Where all drafts are kept, 12 tokens are six rounds of one draft, and two of four."""
    model = clocked(silence(tiny(max_position_embeddings=24), (2, 3)), monkeypatch)
    for costs in T.measure_costs(model, ExitHeads(model, [2], "tied"), repeats=2):
        assert [costs.plain, costs.first, costs.further] == pytest.approx([4, 0, 0])
        assert costs.rows[:9] == pytest.approx([4 * row for row in range(9)])
        assert len(costs.rows) == 17


def test_a_head_with_a_memory_is_timed_in_the_shortest_contexts():
    for context in (4, 16):
        model = tiny(max_position_embeddings=context)
        for decoder, heads in ((model, shaken(model, [2], "block")),
                               fast(model, shaken(model, [2], "block"))):
            few, many = T.measure_costs(decoder, heads, repeats=1)
            assert len(few.rows) == len(many.rows) == 17


def test_measured_costs_make_a_lossless_policy():
    model = tiny()
    heads = shaken(model)
    policy = AutoDSSD(heads, T.measure_costs(model, heads, repeats=2))
    assert policy.name == "DSSD auto" and len(policy.costs) == 2
    out = generate(model, [1, 2, 3], 30, policy)
    assert out.tokens == generate(model, [1, 2, 3], 30, Plain()).tokens
    sampled = T.measure_costs(model, heads, 0.8, repeats=2)
    assert all(costs.plain > 0 for costs in sampled)


def test_command_line(monkeypatch):
    monkeypatch.setattr(T, "LONGEST", 0.2)
    status, out, errors = call(T, "--repeats", 1)
    assert status == 0, errors
    assert "1024 positions cached" in out and "pays alone from p = " in out
    assert_refused(call(T, "--repeats", 0), "--repeats")
    assert_refused(call(T, "--heads", TOY / "config.json"), "cannot be read as a heads file")


@pytest.mark.slow
def test_hard_texts_on_the_command_line(monkeypatch):
    monkeypatch.setattr(T, "LONGEST", 0.2)
    status, out, errors = call(T, "--hard", "--prompts", 1, "--repeats", 1)
    assert status == 0, errors
    rows = [line.split() for line in out.splitlines() if line.startswith(("code", "Eng", "random"))]
    assert [(name, int(n), float(t)) for name, n, t, *_ in rows] == list(T.HARD)
    for row in rows:
        assert all(0.2 < float(ratio) < 5 for ratio in row[4:6])
        assert sum(int(n.strip(",")) for n in row[9::2]) == 96
