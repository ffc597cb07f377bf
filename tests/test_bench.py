"""Chapter 7: the counted costs and bytes are right, and the benchmark's numbers add up."""
import json
import math
import multiprocessing
import os
import resource
import sys

import pytest
import torch

import bench as B
from appendix.fast import fast
from appendix.toy import save_model
from conftest import assert_refused, call, run, shaken, tiny
from dssd import DSSD, EarlyExit, LayerSkip, Plain, generate
from heads import ExitHeads, distill_in_chunks, distill_loss
from model import Pythia, PythiaConfig

# bytes in tiny(), float32: a block's matrices, the unembedding, a position's keys and values
BLOCK, UNEMBEDDING, POSITION = 4 * 12 * 32 * 32, 4 * 32 * 96, 4 * 2 * 32


# ---------------------------------------------------------------- costs, from the log


def test_bytes_of_plain_decoding_are_those_of_the_weights_and_the_cache():
    model = tiny()
    plain = generate(model, [1, 2, 3], 4, Plain())
    cost, read = B.cost_of(model, Plain(), [plain])
    # three passes, over 4, 5 and 6 positions
    weights = 3 * (4 * BLOCK + UNEMBEDDING)
    assert 3 * read == pytest.approx(weights + 4 * (4 + 5 + 6) * POSITION)
    assert cost == pytest.approx(model.config.full_cost)
    assert B.cost_of(model, Plain(), [plain, plain]) == pytest.approx((cost, read))   # per token


def test_bytes_of_drafts_and_verifications():
    model = tiny()
    policy = LayerSkip(shaken(model, [2]), 2, 3)
    drafted = generate(model, [1, 2, 3], 4, policy)
    rounds = len(drafted.log.rounds)
    drafts = sum(n for n, _ in drafted.log.rounds)
    cost, read = B.cost_of(model, policy, [drafted])
    decoded = len(drafted.tokens) - 1
    # each draft reads two blocks and its head's matrix, each verification two blocks and the
    # unembedding, whatever its rows; beside the weights only keys and values
    steps = drafts + rounds
    least = steps * (2 * BLOCK + UNEMBEDDING) + rounds * 2 * BLOCK
    assert least < decoded * read < least + steps * 6 * 4 * POSITION
    # arithmetic counts rows: every round has one row more than drafts, each through all blocks
    unembed = model.config.unembed_cost
    assert decoded * cost == pytest.approx(steps * (4 + unembed) + drafts * unembed)


def test_bytes_of_a_copied_state():
    model = tiny()
    policy = EarlyExit(shaken(model, [2]), [math.inf], fill="copy")
    early = generate(model, [1, 2, 3], 4, policy)
    cost, read = B.cost_of(model, policy, [early])
    # of a block only 2 of 12 D x D
    weights = 3 * (2 * BLOCK + UNEMBEDDING + 2 * BLOCK / 6)
    assert 3 * read == pytest.approx(weights + 2 * (4 + 5 + 6) * POSITION)
    assert cost == pytest.approx(2 + 2 / 6 + model.config.unembed_cost)


def test_a_block_head_reads_a_block_more_and_its_own_cache():
    model = tiny()
    linear, block = (LayerSkip(shaken(model, [2], kind), 2, 1) for kind in ("linear", "block"))
    done = generate(model, [1, 2, 3], 3, block)
    asked = [entry for entry in done.log.asked if entry[1] >= 3]
    assert asked == [(2, 3, 4)]                       # one position, behind the prompt's three
    # the same log, as if a linear head had answered
    cost, read = B.cost_of(model, block, [done])
    least_cost, least_read = B.cost_of(model, linear, [done])
    decoded = len(done.tokens) - 1
    assert decoded * (cost - least_cost) == pytest.approx(1 + 1 / 12)     # block, token shift
    own = BLOCK + BLOCK / 12 + 4 * POSITION
    assert decoded * (read - least_read) == pytest.approx(own)


def test_who_is_not_asked_costs_nothing():
    model = tiny()
    plain = generate(model, [1, 2, 3], 2, Plain())
    for kind in ("linear", "block"):
        policy = LayerSkip(shaken(model, [2], kind), 2, 1)
        done = generate(model, [1, 2, 3], 2, policy)                      # no room for a draft
        costs = B.cost_of(model, policy, [done])
        assert costs[0] == pytest.approx(model.config.full_cost)
        # its one pass is two: blocks 0 and 1, then 2 and 3
        assert costs == pytest.approx(B.cost_of(model, Plain(), [plain]))


def test_the_fast_twin_costs_what_the_readable_model_costs():
    model = tiny()
    for kind in ("linear", "block"):
        heads = shaken(model, [1, 3], kind)
        decoder, twins = fast(model, heads)
        policy, twin_policy = DSSD(heads, [2.0, 3.0]), DSSD(twins, [2.0, 3.0])
        readable = generate(model, [1, 2, 3], 20, policy)
        twin = generate(decoder, [1, 2, 3], 20, twin_policy)
        assert readable.tokens == twin.tokens and readable.log == twin.log
        costs = B.cost_of(decoder, twin_policy, [twin])
        assert costs == pytest.approx(B.cost_of(model, policy, [readable]))


# ---------------------------------------------------------------- the physics, policies in turn


def test_distinct_counts_ngrams():
    assert B.distinct([[1, 2, 3, 4, 5]]) == 1 and B.distinct([[7] * 10]) == 1 / 7
    assert B.distinct([[1, 2, 3, 4], [1, 2, 3, 4]]) == 0.5 and B.distinct([[1]]) == 0


def test_what_rows_cost_is_measured_for_each_number_of_rows():
    times = B.cost_of_rows(tiny(), max_rows=3, positions=8, repeats=3)
    assert len(times) == 3 and min(times) > 0


class Odd:
    """A model in which a row's result depends on the rows beside it."""

    def __init__(self, model):
        self.model, self.config, self.embed_in = model, model.config, model.embed_in
        self.new_cache, self.embed, self.unembed = model.new_cache, model.embed, model.unembed

    def run(self, x, start, stop, *others):
        rows = x.shape[1]
        x = x + (rows - 1) * torch.linspace(-1, 1, 128)
        return self.model.run(x, start, stop, *others)


def test_row_dependence_sees_a_dependence(toy, capsys):
    decoder, _ = fast(toy)
    changes = B.row_dependence(decoder)
    assert len(changes) == 17 and changes[0] == 0
    assert max(changes) < 1e-3                        # float32: rounding alone
    alone, *together = B.row_dependence(Odd(toy), 3)
    assert alone == 0 and min(together) > 0.01
    B.report_rows(Odd(toy), "float32")
    assert "already two rows" in capsys.readouterr().out


def test_policies_run_in_turn_and_the_middle_repeat_counts():
    model = tiny()
    policies = {"a": Plain(), "b": DSSD(shaken(model), [1.0, 2.0, None])}
    runs = B.run_in_turn(model, policies, [[1, 2], [3]], 5, repeats=3)
    assert list(runs) == ["a", "b"]
    for repeats in runs.values():
        assert [len(generations) for generations in repeats] == [2, 2, 2]
        assert all(len(g.tokens) == 5 for generations in repeats for g in generations)
    # prompt i is sampled from seed + i, in every repeat
    sampled = B.run_in_turn(model, policies, [[1], [1]], 9, temperature=1.0, repeats=2, seed=3)
    texts = [[g.tokens for g in generations] for generations in sampled["a"]]
    assert texts[0] == texts[1] and texts[0][0] != texts[0][1]
    assert texts[0][1] == generate(model, [1], 9, Plain(), temperature=1.0, seed=4).tokens
    for seconds, generations in zip((3.0, 1.0, 2.0), runs["a"]):
        for g in generations:
            g.decode_seconds = seconds
    assert B.middle_of(Plain(), runs["a"]).ms_per_token == 1000 * 2 * 2.0 / 8


def test_first_gaps_are_where_texts_part():
    model = tiny()
    text = generate(model, [1, 2, 3], 6, Plain()).tokens
    other = text[:4] + [(text[4] + 1) % 96, 0]
    with torch.no_grad():
        logits, _ = model(torch.tensor([[1, 2, 3] + text[:4]]))
    first, second = logits[0, -1].topk(2).values.tolist()
    gaps = B.first_gaps(model, [[1, 2, 3]] * 2, [text, text], [other, text])
    assert gaps == pytest.approx([first - second])


# ---------------------------------------------------------------- memory


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="no peak starts anew here")
def test_peak_memory_is_of_one_policy(capsys):
    model = tiny()
    heads, hungry = shaken(model, [2]), shaken(model, [2])
    output = hungry.heads[0].output

    def hungry_output(x):
        torch.ones(50 * 2 ** 20).sum()                                    # 200 MB, for a moment
        return output(x)

    hungry.heads[0].output = hungry_output
    policies = {"Plain": Plain(), "DSSD": DSSD(hungry, [math.inf]),
                "EarlyExit": EarlyExit(heads, [1.0])}
    peaks = B.peak_memories(model, policies, B.Setting([[1, 2, 3]], 4, 0.0, 1, 0))
    assert list(peaks) == ["so far", "Plain", "DSSD", "EarlyExit"]
    assert "GB" in capsys.readouterr().out
    assert peaks["DSSD"] > peaks["Plain"] + 0.15
    assert peaks["DSSD"] > peaks["EarlyExit"] + 0.15


def peak():
    """Bytes; the system counts in other units on a Mac."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peaks_of_the_loss():
    """Bytes that a training step of 4 heads adds to the peak: in chunks, then by the definition."""
    torch.manual_seed(0)
    model = Pythia(PythiaConfig(10000, 32, 128, 5, 4)).requires_grad_(False)
    heads = ExitHeads(model, [1, 2, 3, 4])
    *hidden, last = torch.randn(5, 2, 512, 32)
    before = peak()
    distill_in_chunks(heads, hidden, last, chunk=64)
    chunked = peak()
    distill_loss(heads, hidden, last).sum().backward()
    return chunked - before, peak() - before


@pytest.mark.slow
def test_the_loss_in_chunks_needs_far_less_memory_than_its_definition():
    # a process of its own, for a peak of its own
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        chunked, naive = pool.apply(peaks_of_the_loss)
    assert naive > 4 * 1024 * 10000 * 4               # all logits at once: heads x tokens x V
    assert chunked < naive / 4


# ---------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def small(tmp_path_factory, toy_tokenizer):
    """A folder with a tiny model that reads the toy's tokens, and its calibrated heads."""
    folder = tmp_path_factory.mktemp("small")
    save_model(folder, tiny(vocab_size=2048, max_position_embeddings=256), toy_tokenizer.spec)
    heads = shaken(Pythia.from_pretrained(folder), [1, 3])
    heads.calibration = {"0.80": [5.0, 6.0], "0.90": [4.0, 5.0], "0.95": [None, 4.0]}
    heads.save(folder / "heads-fast.safetensors")
    return folder


def check_part(part, greedy):
    policies, plain = part["policies"], part["policies"]["Plain"]
    for name in ("EarlyExit 0.80", "DSSD 0.95", "DSSD auto", part["best_layerskip"]):
        assert name in policies
    # Plain, DSSD auto, two exits with eight lengths each; greedy: with the unembedding tied, too
    assert len(part["grid"]) == 2 + 2 * 8 * (2 if greedy else 1)
    assert plain["x_plain"] == 1 and plain["acceptance"] is None
    for name, row in policies.items():
        assert row["min_ms"] == row["ms_per_token"] == row["max_ms"] > 0   # of one repeat
        read_ms = row["bytes_per_token"] / part["gigabytes_per_second"] / 1e6
        assert row["roofline"] == pytest.approx(read_ms / row["ms_per_token"])
        assert row["x_plain"] == pytest.approx(plain["ms_per_token"] / row["ms_per_token"])
        if greedy and not name.startswith("EarlyExit"):
            assert row["same_tokens"] == row["same_text"] == 1
    assert list(part["peak_memory_gb"]) == ["so far", *policies]


@pytest.mark.slow
def test_command_line(small, tmp_path):
    options = {"--prompts": 1, "--max-new-tokens": 4, "--repeats": 1, "--widen": 2,
               "--json": tmp_path / "b.json", "--figure": tmp_path / "b.png"}
    words = [word for pair in options.items() for word in pair]
    status, out, errors = call(B, "--model", small, *words)
    assert status == 0, errors
    record = json.loads(out.splitlines()[-1])
    assert record == json.loads((tmp_path / "b.json").read_text())
    check_part(record["greedy"], True)
    check_part(record["sampled at 0.8"], False)
    assert record["greedy"]["first_gaps"] == [] and len(record["block_ms"]) == 16
    assert (tmp_path / "b.png").stat().st_size > 5000
    # the tables fit a terminal of 120 columns
    starts = "policy", "Plain", "LayerSkip", "EarlyExit"
    table = [line for line in out.splitlines() if line.startswith(starts)]
    assert len(table) > 50 and max(map(len, table)) <= 120


def test_refused(small, tmp_path):
    for options, words in ((("--prompts", 0), "--prompts"),
                           (("--widen", 0), "--widen"),
                           (("--max-new-tokens", 1), "--max-new-tokens"),
                           (("--figure", tmp_path / "none" / "b.png"), "there is no folder"),
                           (("--json", tmp_path / "none" / "b.json"), "there is no folder")):
        assert_refused(call(B, "--model", small, *options), words)
    if not torch.cuda.is_available():
        assert_refused(call(B, "--device", "cuda"), "no such device")


def test_exit_status():
    assert_refused(run("bench.py", "--prompts", 0), "--prompts")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_command_line_on_a_gpu():
    status, out, errors = call(B, "--device", "cuda", "--dtype", "bfloat16", "--prompts", 1,
                               "--max-new-tokens", 8, "--repeats", 1)
    assert status == 0, errors
    assert set(json.loads(out.splitlines()[-1])["graphs"]) == {"Plain", "DSSD auto"}
