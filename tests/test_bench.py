"""Chapter 7: the widened model is the same function, the counted bytes are right, and the benchmark's numbers add up."""
import argparse
import json
import math
import random
from pathlib import Path

import pytest
import torch

import bench as B
from confidence import entropy
from conftest import SHARED, TOY, assert_refused, run, tiny
from dssd import DSSD, EarlyExit, LayerSkip, Plain, fast, generate, held_out_prompts
from heads import KINDS, ExitHeads, full_cost
from model import InputError, Pythia, locate, sample
from test_heads import shaken


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("r", [2, 3])
def test_a_widened_model_is_the_same_function(kind, r):
    model = tiny()
    heads = shaken(model, [1, 3], kind)
    wide, wide_heads = B.widen(model, heads, r)
    assert wide.config.hidden_size == 32 * r and wide.config.num_attention_heads == 4 * r
    ids = torch.randint(0, 96, (2, 20))
    with torch.no_grad():
        (a, hidden), (b, wide_hidden) = model(ids, [1, 3]), wide(ids, [1, 3])
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-3)
        for x, y in zip(hidden, wide_hidden):
            assert torch.allclose(x.repeat(1, 1, r), y, rtol=1e-4, atol=1e-4)   # the residual stream, r times over
        for x, y in zip(heads.logits(hidden), wide_heads.logits(wide_hidden)):
            assert torch.allclose(x, y, rtol=1e-4, atol=1e-3)


def test_the_widened_toy_writes_the_toys_text_with_any_vocabulary(toy):
    heads = ExitHeads.load(TOY / "heads-fast.safetensors", toy)
    wide, wide_heads = B.widen(toy, heads, 2, 5000)
    ids = held_out_prompts(TOY, 1)[0]
    with torch.no_grad():
        (a, hidden), (b, wide_hidden) = toy(torch.tensor([ids]), heads.layers), wide(torch.tensor([ids]), heads.layers)
        assert b.shape[-1] == 5000 and torch.allclose(a, b[..., :2048], rtol=1e-4, atol=2e-3)
        assert (b[..., 2048:] + 50).abs().max() < 0.01                    # the padding is out of the running
        for x, y in zip(heads.logits(hidden), wide_heads.logits(wide_hidden)):
            assert torch.allclose(entropy(x), entropy(y), atol=1e-3)
    policy = DSSD(heads, [1.0] * len(heads.layers))
    narrow = generate(fast(toy), ids, 24, policy)
    wider = generate(fast(wide), ids, 24, DSSD(wide_heads, policy.thresholds))
    assert narrow.tokens == wider.tokens and narrow.depths == wider.depths
    for r, vocab in ((0, 0), (1, 2047)):
        with pytest.raises(InputError, match="--widen"):
            B.widen(toy, heads, r, vocab)
    with pytest.raises(InputError, match="kind lowrank"):
        B.widen(toy, ExitHeads(toy, [4], "lowrank"), 2, 5000)


def test_bytes_are_those_of_the_weights_and_the_cache():
    model = tiny()                                                        # float32: 4 bytes a number
    block, unembedding, position = 4 * 12 * 32 * 32, 4 * 32 * 96, 4 * 2 * 32
    heads = shaken(model, [2])
    plain = generate(model, [1, 2, 3], 4, Plain()).stats                  # three passes, over 4, 5 and 6 positions
    assert plain.bytes == pytest.approx(3 * (4 * block + unembedding) + 4 * (4 + 5 + 6) * position)
    drafted = generate(model, [1, 2, 3], 4, LayerSkip(heads, 2, 3)).stats
    # each draft reads two blocks and its head's matrix, each verification two blocks and the unembedding, whatever its rows
    steps = drafted.drafted + drafted.rounds
    least = steps * (2 * block + unembedding) + drafted.rounds * 2 * block
    assert least < drafted.bytes < least + steps * 6 * 4 * position       # beside the weights only keys and values
    early = generate(model, [1, 2, 3], 4, EarlyExit(heads, [math.inf], fill="copy")).stats
    assert early.bytes == pytest.approx(3 * (2 * block + unembedding + 2 * block / 6) + 2 * (4 + 5 + 6) * position)


def test_distinct_counts_ngrams():
    assert B.distinct([[1, 2, 3, 4, 5]]) == 1 and B.distinct([[7] * 10]) == 1 / 7
    assert B.distinct([[1, 2, 3, 4], [1, 2, 3, 4]]) == 0.5 and B.distinct([[1]]) == 0


def test_row_dependence_sees_a_dependence(toy, capsys):
    found = B.row_dependence(fast(toy))
    assert len(found) == 17 and found[0] == 0 and max(found) < 1e-3       # float32: rounding alone

    class Odd:                                                            # a row's result depends on the rows beside it
        config, embed_in, new_cache, embed, unembed = (getattr(toy, n) for n in ("config", "embed_in", "new_cache", "embed", "unembed"))

        def run(self, x, start, stop, cache):
            return toy.run(x + (x.shape[1] - 1) * torch.linspace(-1, 1, 128), start, stop, cache)
    alone, *together = B.row_dependence(Odd(), 3)
    assert alone == 0 and min(together) > 0.01
    B.report_rows(Odd(), "float32")
    assert "already two rows" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak cannot start anew here")
def test_peak_memory_is_of_one_policy(monkeypatch, capsys):
    args, hungry = argparse.Namespace(device="cpu", max_new_tokens=2, seed=0), DSSD(shaken(tiny(), [2]), [1.0])
    monkeypatch.setattr(B, "generate", lambda _, prompt, n, policy, **options: torch.ones(50 * 2 ** 20 if policy is hungry else 1).sum())
    peaks = B.peak_memories(None, [Plain(), hungry, EarlyExit(hungry.heads, [1.0])], [1], args, 0.0)
    assert list(peaks) == ["so far", "Plain", "DSSD", "EarlyExit"] and "GB" in capsys.readouterr().out
    assert peaks["DSSD"] > peaks["Plain"] + 0.15 and peaks["DSSD"] > peaks["EarlyExit"] + 0.15


def test_command_line(tmp_path):
    status, out, errors = run("bench.py", "--prompts", 1, "--max-new-tokens", 6, "--repeats", 1, "--widen", 2,
                              "--json", tmp_path / "b.json", "--figures", tmp_path)
    assert status == 0, errors
    record = json.loads(out.splitlines()[-1])
    assert record == json.loads((tmp_path / "b.json").read_text())
    for part in ("greedy", "sampled at 0.8"):
        policies = record[part]["policies"]
        assert {"Plain", "EarlyExit 0.80", "DSSD 0.95", "DSSD auto"} <= set(policies) and len(record[part]["grid"]) == 2 + 3 * 8 * (2 if part == "greedy" else 1)
        assert policies["Plain"]["x_plain"] == 1 and policies["Plain"]["acceptance"] is None
        for name, row in policies.items():
            assert row["min_ms"] == row["ms_per_token"] == row["max_ms"] > 0   # of one repeat
            assert row["roofline"] == pytest.approx(row["bytes_per_token"] / record[part]["gigabytes_per_second"] / 1e6 / row["ms_per_token"])
            assert row["x_plain"] == pytest.approx(policies["Plain"]["ms_per_token"] / row["ms_per_token"])
            if part == "greedy" and not name.startswith("EarlyExit"):
                assert row["same_tokens"] == 1
    assert (tmp_path / "bench.png").stat().st_size > 5000
    assert_refused(run("bench.py", "--prompts", 0), "--prompts")
    assert_refused(run("bench.py", "--widen", 0), "--widen")
    assert_refused(run("bench.py", "--figures", tmp_path / "none"), "there is no folder")
    assert_refused(run("bench.py", "--json", tmp_path / "none" / "b.json"), "there is no folder")
    assert_refused(run("bench.py", "--tasks", "code", "--widen", 2), "--tasks")


def test_the_peer_has_the_same_weights():
    pytest.importorskip("transformers")
    for model in (tiny(), B.widen(tiny(), shaken(tiny(), [2]), 2)[0]):
        found = B.peer_times(model, [[1, 2, 3], [7]], 12, 1)
        plain = [generate(fast(model), ids, 12, Plain()).tokens for ids in ([1, 2, 3], [7])]
        assert all(ms > 0 and texts == plain for ms, texts in found.values()) and len(found) == 2


def test_growth_and_its_figure(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(B.pace, "__defaults__", (1,))                     # one repeat is enough here
    heads = ExitHeads.load(TOY / "heads-fast.safetensors", toy)
    found = B.growth(fast(toy), toy, heads, TOY, DSSD(heads, [1.0] * len(heads.layers)), (1, 2), 1e9)
    assert [n for n, *_ in found["width"]] == [128, 256] and [n for n, *_ in found["context"]][-1] == 1920
    assert all(min(row[1:]) > 0 for rows in found.values() for row in rows)
    (_, _, _, narrow), (_, _, _, wide) = found["width"]
    assert narrow / 4 < wide < narrow / 3                                 # nearly all bytes are those of the blocks' D x D matrices
    B.draw_growth(tmp_path / "growth.png", found)
    assert (tmp_path / "growth.png").stat().st_size > 5000


# ---------------------------------------------------------------- tasks

TASK_FILES = SHARED / "data" / "tasks"
LINES = {"lambada": '{"text": "the cat sat on the mat"}',
         "piqa": '{"goal": "g", "sol1": "a", "sol2": "bb "}',
         "arc_easy": '{"question": {"stem": "s", "choices": [{"text": "x", "label": "1"}, '
                     '{"text": "y", "label": "2"}]}, "answerKey": "2"}',
         "winogrande": '{"context_options": ["Ann", "Bob"], "continuation": "won.", "gold": 1}'}


def write_task(folder, name, *lines):
    (folder / B.TASKS[name][0]).write_text("\n".join(lines) + "\n", "utf-8")
    if name == "piqa":
        (folder / "piqa_valid-labels.lst").write_text("1\n" * len(lines))


def alone(model, heads, thresholds, ids, n):
    """One row by itself in float64 and token by token: [(log-probability, is argmax, cost)] of its last n ids."""
    logits, hidden = model(torch.tensor([ids[:-1]]), heads.layers)
    rows = [z[0, -n:].double() for z in (*heads.logits(hidden), logits)]
    L, out = model.config.num_hidden_layers, []
    for t, token in enumerate(ids[-n:]):
        cost = 0
        for layer, head, threshold, z in zip(heads.layers, heads.heads, thresholds, rows):
            if threshold is not None:
                cost += head.cost()
                p = z[t].softmax(-1)
                if -(p * p.log()).sum() < threshold:
                    cost += layer
                    break
        else:
            cost, z = cost + full_cost(model), rows[-1]
        out.append((z[t].log_softmax(-1)[token].item(), z[t].argmax().item() == token, cost))
    return out


def some_thresholds(model, heads, ids):
    """Per exit the median entropy of its head, so that some tokens leave at each."""
    _, hidden = model(torch.tensor([ids]), heads.layers)
    return [entropy(z).median().item() + 1e-3 for z in heads.logits(hidden)]


def random_rows(rnd, count, vocab=96, longest=40):
    rows = []
    for _ in range(count):
        ids = [rnd.randrange(vocab) for _ in range(rnd.randrange(2, longest))]
        rows.append((ids, rnd.randrange(1, len(ids))))
    return rows


@pytest.mark.parametrize("kind", ["linear", "tied", "block"])
def test_scores_equal_every_row_by_itself(kind):
    model, rnd = tiny(), random.Random(1)
    heads, rows = shaken(model, [1, 3], kind), random_rows(rnd, 25)
    with torch.no_grad():
        a, b = some_thresholds(model, heads, [rnd.randrange(96) for _ in range(60)])
        readers = [[None, None], [math.inf, None], [None, math.inf], [a, b], [None, b], [a, None]]
        for batch_tokens in (1, 100, 4000):                               # unbatched, ragged batches, all in one
            for (ids, n), found in zip(rows, B.score(model, heads, readers, rows, batch_tokens=batch_tokens)):
                assert found.shape == (3, len(readers), n)
                for r, thresholds in enumerate(readers):
                    expected = torch.tensor(alone(model, heads, thresholds, ids, n)).T
                    assert torch.allclose(found[:, r].float(), expected.float(), atol=2e-4), (r, ids)


@pytest.mark.parametrize("kind", ["linear", "block"])
def test_what_several_rows_share_is_read_once(kind, monkeypatch):
    model, rnd = tiny(), random.Random(5)
    heads, readers, rows, read = shaken(model, [1, 3], kind), [[None, None], [4.0, None]], [], []
    for length in (1, 9, 9, 20):                                          # questions of so many ids, each with 2 to 4 answers
        question = [rnd.randrange(96) for _ in range(length)]
        rows += [(question + [rnd.randrange(96) for _ in range(n)], n) for n in rnd.choices(range(1, 8), k=rnd.randrange(2, 5))]
    rnd.shuffle(rows)
    embed = model.embed
    monkeypatch.setattr(model, "embed", lambda ids: read.append(ids.numel()) or embed(ids))
    together = B.score(model, heads, readers, rows)
    widest = [max(n for ids, n in rows if len(ids) - n == length) for length in (1, 9, 20)]
    padded = sum(len([1 for ids, n in rows if len(ids) - n == length]) * w for length, w in zip((1, 9, 20), widest))
    assert sum(read) == 8 + 8 + 19 + padded                               # all but each question's last id, which starts its rows
    for row, found in zip(rows, together):
        assert torch.allclose(found, B.score(model, heads, readers, [row])[0], atol=1e-4)


def test_early_exit_always_and_never_are_an_exit_and_the_full_model():
    model, rows = tiny(), random_rows(random.Random(2), 12)
    heads = shaken(model, [1, 3])
    readers = [None, None], [math.inf, None], [None, math.inf], [math.inf, math.inf], [0.0, 0.0], [0.0, math.inf]
    full, exit_1, exit_3, always, never, unreached = torch.cat(B.score(model, heads, readers, rows), -1).unbind(1)
    assert torch.equal(always, exit_1)
    assert torch.equal(never[:2], full[:2]) and torch.equal(unreached[:2], exit_3[:2])
    head = 96 * 32 / (12 * 32 * 32)                                       # a matrix D -> V over a block's 12 D D: 0.25
    for read, cost in ((full, 4 + head), (exit_1, 1 + head), (exit_3, 3 + head), (never, 4 + 3 * head),
                       (unreached, 3 + 2 * head)):
        assert torch.allclose(read[2], torch.tensor(cost, dtype=read.dtype))


def test_bfloat16_models_can_be_scored():
    model = tiny().bfloat16()
    scores = B.score(model, shaken(model, [2]), [[None], [1.0]], random_rows(random.Random(3), 5))
    assert all(torch.isfinite(s).all() for s in scores)


def test_pairs_are_encoded_as_the_harness_does(toy_tokenizer):
    encode, end = toy_tokenizer.encode, toy_tokenizer.end
    assert B.encode_pair(toy_tokenizer, "a cat", " sat", 64) == (encode("a cat sat"), len(encode(" sat")))
    assert B.encode_pair(toy_tokenizer, "", "sat", 64) == ([end] + encode("sat"), len(encode("sat")))
    ids, n = B.encode_pair(toy_tokenizer, "a cat  ", "sat", 64)           # the spaces are part of what is scored
    assert ids == encode("a cat  sat") and toy_tokenizer.decode(ids[-n:]) == "  sat"
    assert B.encode_pair(toy_tokenizer, "  ", "sat", 64) == ([end] + encode("  sat"), len(encode("  sat")))
    ids, n = B.encode_pair(toy_tokenizer, "a\n", "sat", 64)               # any white space moves
    assert toy_tokenizer.decode(ids[-n:]) == "\nsat"
    whole = encode("x = 1\n" * 30 + "y = 2")
    for max_len in (2, 8, len(whole) - 1, len(whole)):
        ids, n = B.encode_pair(toy_tokenizer, "x = 1\n" * 30 + "y", " = 2", max_len)
        assert ids == whole[-(max_len + 1):] and n == len(encode(" = 2")) and len(ids[:-1]) <= max_len
    with pytest.raises(InputError, match="adds 3 tokens"):
        B.encode_pair(toy_tokenizer, "x", "\ny =", 2)
    with pytest.raises(InputError, match="adds 0 tokens"):
        B.encode_pair(toy_tokenizer, "x", "", 64)


def test_inputs_longer_than_the_context_keep_their_end(toy_tokenizer):
    model = tiny(vocab_size=2048)                                         # a context of 64
    heads, text = shaken(model, [2]), "value = other + 1\n" * 40
    ids, n = B.encode_pair(toy_tokenizer, text, "value = 3", 64)
    assert len(ids) == 65
    with torch.no_grad():
        found, = B.score(model, heads, [[None]], [(ids, n)])
        expected = alone(model, heads, [None], ids, n)
    assert torch.allclose(found[0, 0].float(), torch.tensor([e[0] for e in expected]), atol=1e-4)


def test_accuracy_and_accuracy_per_character_by_hand():
    def scores(*logprobs, match=1):                                       # of one token each, one reader
        return [torch.tensor([[[x]], [[match]], [[1.0]]]) for x in logprobs]
    pairs = [("q", " yes"), ("q", " certainly")]                          # 3 and 9 characters
    # -6 / 3 = -2 and -9 / 9 = -1: the sum prefers the short answer, the mean the long one
    found = B.accuracies([(pairs, 0), (pairs, 1)], scores(-6.0, -9.0) * 2)
    assert found["acc"].tolist() == [0.5] and found["acc_norm"].tolist() == [0.5]
    found = B.accuracies([(pairs, 1)], scores(-6.0, -9.0))
    assert found["acc"].tolist() == [0] and found["acc_norm"].tolist() == [1]
    found = B.accuracies([(pairs, 0)], scores(-2.0, -2.0))
    assert found["acc"].tolist() == [1]                                   # the first of equals, as numpy's argmax
    two = torch.tensor([[[-1.0, -2.0]], [[1, 0]], [[1.0, 1.0]]])          # two tokens, one of them not the argmax
    found = B.accuracies([([("c", " w")], 0)] * 2, [two, *scores(-1.0)])
    assert found["acc"].tolist() == [0.5] and found["ppl"].item() == pytest.approx(math.exp((3 + 1) / 2))


def test_a_whole_task_equals_the_harness_done_by_hand(toy_tokenizer, tmp_path, capsys):
    rnd, words = random.Random(4), ["red", "a b", "wall,", "(1, 2)", "return", "naïve", " x"]
    lines = [json.dumps({"question": {"stem": " ".join(rnd.choices(words, k=rnd.randrange(1, 9))), "choices": [
        {"text": " ".join(rnd.choices(words, k=rnd.randrange(1, 5))), "label": label}
        for label in "ABCDE"[:rnd.randrange(3, 6)]]},
        "answerKey": rnd.choice("ABC")}, ensure_ascii=False) for _ in range(30)]
    write_task(tmp_path, "arc_easy", *lines)
    model = tiny(vocab_size=2048, max_position_embeddings=48)
    heads = shaken(model, [1, 2])
    heads.calibration = {"0.90": [5.5, None]}
    record = B.run_tasks(model, heads, TOY, ["arc_easy"], tmp_path, levels=(0.90,))["arc_easy"]
    assert record["examples"] == 30 and list(record["readers"]) == ["full", "exit 1", "exit 2", "level 0.90"]
    with torch.no_grad():
        all_thresholds = [None, None], [math.inf, None], [None, math.inf], [5.5, None]
        for reader, thresholds in zip(record["readers"], all_thresholds):
            acc, acc_norm, costs = 0, 0, []
            for d in map(json.loads, lines):
                sums, means = [], []
                for choice in d["question"]["choices"]:
                    context = toy_tokenizer.encode(f"Question: {d['question']['stem']}\nAnswer:")
                    more = toy_tokenizer.encode(f" {choice['text']}")
                    tokens = alone(model, heads, thresholds, (context + more)[-49:], len(more))
                    sums.append(sum(t[0] for t in tokens))
                    means.append(sums[-1] / float(len(choice["text"])))
                    costs += [t[2] for t in tokens]
                gold = "ABCDE".index(d["answerKey"])
                acc += sums.index(max(sums)) == gold
                acc_norm += means.index(max(means)) == gold
            row = record["readers"][reader]
            assert (row["acc"], row["acc_norm"]) == (pytest.approx(acc / 30), pytest.approx(acc_norm / 30))
            assert row["cost"] == pytest.approx(sum(costs) / len(costs)) and len(costs) == record["scored_tokens"]
    out = capsys.readouterr().out
    assert "30 examples" in out and "block-equivalents" in out
    assert [line[15:27].strip() for line in out.splitlines() if line.startswith("arc_easy ")] == list(record["readers"])


def test_formats_by_hand(tmp_path):
    for name, line in LINES.items():
        write_task(tmp_path, name, line, line)
        assert len(B.read_task(name, tmp_path)) == 2 and len(B.read_task(name, tmp_path, 1)) == 1
    assert B.read_task("lambada", tmp_path)[0] == ([("the cat sat on the", " mat")], 0)
    assert B.read_task("piqa", tmp_path)[0] == ([("Question: g\nAnswer:", " a"), ("Question: g\nAnswer:", " bb ")], 1)
    assert B.read_task("arc_easy", tmp_path)[0] == ([("Question: s\nAnswer:", " x"), ("Question: s\nAnswer:", " y")], 1)
    assert B.read_task("winogrande", tmp_path)[0] == ([("Ann", " won."), ("Bob", " won.")], 1)
    write_task(tmp_path, "lambada", '{"text": "one\u2028line \u0085of text"}')   # no ends of lines in JSONL
    assert len(B.read_task("lambada", tmp_path)) == 1


@pytest.mark.parametrize("name, examples, choices", [
    ("lambada", 5153, {1}), ("piqa", 1838, {2}), ("arc_easy", 2376, {3, 4, 5}), ("arc_challenge", 1170, {3, 4, 5}),
    ("winogrande", 1267, {2})])
def test_formats_of_the_files(name, examples, choices, toy_tokenizer):
    if not TASK_FILES.exists():
        pytest.skip("the tasks' files are not at hand")
    found = B.read_task(name, TASK_FILES)
    assert len(found) == examples and {len(pairs) for pairs, _ in found} == choices
    assert name == "lambada" or len({gold for _, gold in found}) > 1
    for pairs, _ in found[::20]:
        for context, continuation in pairs:
            assert context == context.rstrip() and continuation[0] == " " and continuation.strip()
            ids, n = B.encode_pair(toy_tokenizer, context, continuation, 2048)
            apart = toy_tokenizer.encode(context), toy_tokenizer.encode(continuation)
            assert ids == apart[0] + apart[1] and n == len(apart[1])      # so the harness' older encoding agrees


def test_the_toys_own_task(toy, toy_tokenizer):
    heads = ExitHeads.load(TOY / "heads.safetensors", toy)
    record = B.run_tasks(toy, heads, TOY, ["code"], limit=6)["code"]
    rows, lines = B.code_rows(TOY, 6)
    assert record["scored_tokens"] == 6 * 255 and record["examples"] == sum(map(len, lines)) > 20
    assert all(n == 255 and len(ids) == 256 for ids, n in rows)
    done, right = [], []
    for (ids, n), spans in zip(rows, lines):
        text = toy_tokenizer.decode
        for span in spans:
            given, rest = ids[:span.start + 1], ids[span.start + 1:span.stop + 1]
            start = max(i for i, token in enumerate(given) if "\n" in text([token])) + 1
            assert "\n" not in text(rest[:-1]) and text(rest[-1:]).startswith("\n")   # up to the newline, no further
            assert len(given) - start - (len(rest) - 1) in (0, 1) and len(rest) >= 2   # from the middle on
            if len(done) < 12:
                done.append(list(sample(toy, given, len(rest))) == rest)
        logits, _ = toy(torch.tensor([ids[:-1]]))
        right.append((logits[0].argmax(-1) == torch.tensor(ids[1:])).float())
    full = record["readers"]["full"]
    assert full["token_acc"] == pytest.approx(torch.cat(right).mean().item())
    scores = B.score(toy, heads, [[None] * 3], rows)
    matches = [bool(s[1, 0, span].all()) for s, spans in zip(scores, lines) for span in spans]
    assert matches[:12] == done and any(done)                             # teacher forcing is greedy decoding
    assert full["acc"] == pytest.approx(sum(matches) / len(matches))
    assert full["cost"] == pytest.approx(full_cost(toy)) and record["readers"]["exit 4"]["cost"] < full["cost"]
    json.dumps(record, allow_nan=False)


def test_all_tasks_on_the_toy(toy):
    if not TASK_FILES.exists():
        pytest.skip("the tasks' files are not at hand")
    heads = ExitHeads.load(TOY / "heads-fast.safetensors", toy)
    record = B.run_tasks(toy, heads, TOY, list(B.TASKS), TASK_FILES, limit=2)
    for name, (_, measures) in B.TASKS.items():
        for row in record[name]["readers"].values():
            assert list(row) == [*measures, "cost"]
            assert all(0 <= row[m] <= 1 for m in measures if m != "ppl") and row["cost"] > 1
            assert row.get("ppl", 2) > 1
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize("name, line", [
    ("piqa", "not json"), ("piqa", "[1]"), ("piqa", '{"goal": "g", "sol1": "a"}'), ("lambada", "null"),
    ("piqa", '{"goal": 1, "sol1": "a", "sol2": "b"}'), ("lambada", '{"text": "word"}'), ("lambada", '{"text": 3}'),
    ("arc_easy", '{"question": "s"}'), ("arc_easy", LINES["arc_easy"].replace('Key": "2"', 'Key": "3"')),
    *(("winogrande", LINES["winogrande"].replace("1}", gold)) for gold in ("2}", "-1}", "true}")),
    ("winogrande", LINES["winogrande"].replace('"Ann"', "5"))])
def test_malformed_lines_are_named(name, line, tmp_path):
    write_task(tmp_path, name, LINES[name], line)
    with pytest.raises(InputError, match=f"line 2 is no example of {name}") as caught:
        B.read_task(name, tmp_path)
    assert "\n" not in str(caught.value)


def test_bad_input(toy, tmp_path):
    heads = ExitHeads.load(TOY / "heads.safetensors", toy)
    for names, folder, limit, words in (
            (["lambda"], tmp_path, None, "unknown 'lambda'; the tasks are lambada, piqa"),
            ([""], tmp_path, None, "unknown ''"), (["piqa"], None, None, "--task-dir"),
            (["code"], None, 0, "--task-limit"),
            (["code", "piqa"], tmp_path / "none", None, "task piqa: .*No such file.*--task-dir")):
        with pytest.raises(InputError, match=words) as caught:
            B.run_tasks(toy, heads, TOY, names, folder, limit)
        assert "\n" not in str(caught.value)
    (tmp_path / "lambada_openai.jsonl").write_text("")
    with pytest.raises(InputError, match="line 1"):
        B.read_task("lambada", tmp_path)
    (tmp_path / "lambada_openai.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="task lambada"):
        B.read_task("lambada", tmp_path)
    write_task(tmp_path, "piqa", LINES["piqa"])
    (tmp_path / "piqa_valid-labels.lst").write_text("1\n0\n")
    with pytest.raises(InputError, match="1 lines, its labels are 2"):
        B.read_task("piqa", tmp_path)
    (tmp_path / "piqa_valid-labels.lst").unlink()
    with pytest.raises(InputError, match="labels.lst"):
        B.read_task("piqa", tmp_path)
    with pytest.raises(InputError, match="not calibrated"):
        B.run_tasks(toy, ExitHeads(toy, [4]), TOY, ["code"])


def test_official_scores(monkeypatch):
    def missing(*_):
        pytest.skip("the official weights are not at hand")
    monkeypatch.setattr("model.fetch", missing)                           # use what is there, download nothing
    expected = SHARED / "data" / "pythia" / "expected_evals.json"
    if not expected.exists():
        pytest.skip("the official scores are not at hand")
    folder = locate("pythia-70m")
    model = Pythia.from_pretrained(folder)
    found = B.run_tasks(model, ExitHeads(model, [3], "tied"), folder, ["piqa", "winogrande"], TASK_FILES, levels=())
    for name, record in found.items():
        for measure, value in json.loads(expected.read_text())["results"]["pythia-70m"][name].items():
            assert record["readers"]["full"][measure] == pytest.approx(value, abs=0.005), (name, measure)
