"""Tasks: scores equal every row by itself, accuracies the harness by hand, files are checked."""
import json
import math
import random

import pytest
import torch

from appendix import tasks as A
from confidence import MEASURES
from conftest import SHARED, TOY, assert_refused, call, shaken, tiny
from heads import ExitHeads
from model import InputError, Pythia, sample

TASK_FILES = SHARED / "data" / "tasks"
LINES = {
    "lambada": '{"text": "the cat sat on the mat"}',
    "piqa": '{"goal": "g", "sol1": "a", "sol2": "bb "}',
    "arc_easy": '{"question": {"stem": "s", "choices": [{"text": "x", "label": "1"}, '
                '{"text": "y", "label": "2"}]}, "answerKey": "2"}',
    "winogrande": '{"context_options": ["Ann", "Bob"], "continuation": "won.", "gold": 1}',
}


def write_task(folder, name, *lines):
    (folder / A.FILES[name]).write_text("\n".join(lines) + "\n", "utf-8")
    if name == "piqa":
        (folder / "piqa_valid-labels.lst").write_text("1\n" * len(lines))


def one_token(heads, thresholds, logits, token):
    """What a reader gets of a token: its log-probability, whether it is the argmax, its cost.

    logits: (V,) of every head, the full model's last.
    """
    cost = 0
    for layer, head, threshold, z in zip(heads.layers, heads.heads, thresholds, logits):
        if threshold is None:
            continue
        cost += head.cost()
        if MEASURES[heads.measure](z) < threshold:
            return z.log_softmax(-1)[token].item(), z.argmax().item() == token, cost + layer
    z, cost = logits[-1], cost + heads.backbone[0].config.full_cost
    return z.log_softmax(-1)[token].item(), z.argmax().item() == token, cost


def alone(model, heads, readers, ids, n):
    """One row by itself, token by token: per reader what one_token gives of its last n ids."""
    logits, hidden = model(torch.tensor([ids[:-1]]), heads.layers)
    rows = torch.stack([z[0, -n:] for z in (*heads.logits(hidden), logits)], 1).double()
    results = []
    for thresholds in readers:
        results.append([one_token(heads, thresholds, z, i) for z, i in zip(rows, ids[-n:])])
    return results


def some_thresholds(model, heads, ids):
    """Per exit the median uncertainty of its head, so that some tokens leave at each."""
    _, hidden = model(torch.tensor([ids]), heads.layers)
    measure = MEASURES[heads.measure]
    return [measure(z).median().item() + 1e-3 for z in heads.logits(hidden)]


def random_ids(rnd, length, vocab=96):
    return [rnd.randrange(vocab) for _ in range(length)]


def random_rows(rnd, count, longest=40):
    rows = []
    for _ in range(count):
        ids = random_ids(rnd, rnd.randrange(2, longest))
        rows.append((ids, rnd.randrange(1, len(ids))))
    return rows


# -------------------------------------------------------- scores


@pytest.mark.parametrize("kind, measure", [
    ("linear", "entropy"), ("tied", "entropy"), ("block", "entropy"), ("linear", "margin")])
@torch.no_grad()
def test_scores_equal_every_row_by_itself(kind, measure):
    model, rnd = tiny(), random.Random(1)
    heads, rows = shaken(model, [1, 3], kind, measure=measure), random_rows(rnd, 25)
    a, b = some_thresholds(model, heads, random_ids(rnd, 60))
    readers = [[None, None], [math.inf, None], [None, math.inf], [a, b], [None, b], [a, None]]
    expected = []
    for ids, n in rows:
        by_reader = torch.tensor(alone(model, heads, readers, ids, n))  # (R, n, 3)
        expected.append(by_reader.permute(2, 0, 1))
    for batch_tokens in (1, 100, 4000):  # unbatched, ragged batches, all in one
        scores = A.score(model, heads, readers, rows, batch_tokens=batch_tokens)
        for (ids, n), found, wanted in zip(rows, scores, expected):
            assert found.shape == (3, len(readers), n)
            assert torch.allclose(found.float(), wanted.float(), atol=2e-4), ids


@pytest.mark.parametrize("kind", ["linear", "block"])
def test_what_several_rows_share_is_read_once(kind, monkeypatch):
    model, rnd = tiny(), random.Random(5)
    heads, readers = shaken(model, [1, 3], kind), [[None, None], [4.0, None]]
    rows, read = [], []
    for length in (1, 9, 9, 20):  # questions of so many ids, each with 2 to 4 answers
        question = random_ids(rnd, length)
        for n in rnd.choices(range(1, 8), k=rnd.randrange(2, 5)):
            rows.append((question + random_ids(rnd, n), n))
    rnd.shuffle(rows)
    embed = model.embed

    def counted(ids):
        read.append(ids.numel())
        return embed(ids)

    monkeypatch.setattr(model, "embed", counted)
    together = A.score(model, heads, readers, rows)
    padded = 0
    for length in (1, 9, 20):
        answers = [n for ids, n in rows if len(ids) - n == length]
        padded += len(answers) * max(answers)
    # of a question all but the last id is read once; the last id starts each of its rows
    assert sum(read) == 8 + 8 + 19 + padded
    for row, found in zip(rows, together):
        assert torch.allclose(found, A.score(model, heads, readers, [row])[0], atol=1e-4)


def test_early_exit_always_and_never_are_an_exit_and_the_full_model():
    model, rows, inf = tiny(), random_rows(random.Random(2), 12), math.inf
    heads = shaken(model, [1, 3])
    readers = [None, None], [inf, None], [None, inf], [inf, inf], [0.0, 0.0], [0.0, inf]
    scores = torch.cat(A.score(model, heads, readers, rows), -1)
    full, exit_1, exit_3, always, never, unreached = scores.unbind(1)
    assert torch.equal(always, exit_1)
    assert torch.equal(never[:2], full[:2]) and torch.equal(unreached[:2], exit_3[:2])
    head = 96 * 32 / (12 * 32 * 32)  # a matrix D -> V over a block's 12 D D: 0.25
    for read, cost in ((full, 4 + head), (exit_1, 1 + head), (exit_3, 3 + head),
                       (never, 4 + 3 * head), (unreached, 3 + 2 * head)):
        assert torch.allclose(read[2], torch.tensor(cost, dtype=read.dtype))


def test_bfloat16_models_can_be_scored():
    model = tiny().bfloat16()
    rows = random_rows(random.Random(3), 5)
    scores = A.score(model, shaken(model, [2]), [[None], [1.0]], rows)
    assert all(torch.isfinite(s).all() for s in scores)


# -------------------------------------------------------- from text to rows


def test_pairs_are_encoded_as_the_harness_does(toy_tokenizer):
    encode, end = toy_tokenizer.encode, toy_tokenizer.end

    def pair(context, continuation, max_len=64):
        return A.encode_pair(toy_tokenizer, context, continuation, max_len)

    assert pair("a cat", " sat") == (encode("a cat sat"), len(encode(" sat")))
    assert pair("", "sat") == ([end] + encode("sat"), len(encode("sat")))
    ids, n = pair("a cat  ", "sat")  # the spaces are part of what is scored
    assert ids == encode("a cat  sat") and toy_tokenizer.decode(ids[-n:]) == "  sat"
    assert pair("  ", "sat") == ([end] + encode("  sat"), len(encode("  sat")))
    ids, n = pair("a\n", "sat")  # any white space moves
    assert toy_tokenizer.decode(ids[-n:]) == "\nsat"
    whole = encode("x = 1\n" * 30 + "y = 2")
    for max_len in (2, 8, len(whole) - 1, len(whole)):
        ids, n = pair("x = 1\n" * 30 + "y", " = 2", max_len)
        assert ids == whole[-(max_len + 1):] and n == len(encode(" = 2"))
        assert len(ids[:-1]) <= max_len
    with pytest.raises(InputError, match="adds 3 tokens"):
        pair("x", "\ny =", 2)
    with pytest.raises(InputError, match="adds 0 tokens"):
        pair("x", "")


@torch.no_grad()
def test_inputs_longer_than_the_context_keep_their_end(toy_tokenizer):
    model = tiny(vocab_size=2048)  # a context of 64
    heads, text = shaken(model, [2]), "value = other + 1\n" * 40
    ids, n = A.encode_pair(toy_tokenizer, text, "value = 3", 64)
    assert len(ids) == 65
    found, = A.score(model, heads, [[None]], [(ids, n)])
    reading, = alone(model, heads, [[None]], ids, n)
    logprobs = [logprob for logprob, _, _ in reading]
    assert torch.allclose(found[0, 0].float(), torch.tensor(logprobs), atol=1e-4)


def test_formats_by_hand(tmp_path):
    for name, line in LINES.items():
        write_task(tmp_path, name, line, line)
        assert len(A.read_task(name, tmp_path)) == 2
        assert len(A.read_task(name, tmp_path, 1)) == 1

    def first(name):
        return A.read_task(name, tmp_path)[0]

    assert first("lambada") == ([("the cat sat on the", " mat")], 0)
    question = "Question: g\nAnswer:"
    assert first("piqa") == ([(question, " a"), (question, " bb ")], 1)
    question = "Question: s\nAnswer:"
    assert first("arc_easy") == ([(question, " x"), (question, " y")], 1)
    assert first("winogrande") == ([("Ann", " won."), ("Bob", " won.")], 1)
    write_task(tmp_path, "lambada", '{"text": "one\u2028line \u0085of text"}')  # no ends of lines
    assert len(A.read_task("lambada", tmp_path)) == 1


@pytest.mark.parametrize("name, examples, choices", [
    ("lambada", 5153, {1}), ("piqa", 1838, {2}), ("arc_easy", 2376, {3, 4, 5}),
    ("arc_challenge", 1170, {3, 4, 5}), ("winogrande", 1267, {2})])
def test_formats_of_the_files(name, examples, choices, toy_tokenizer):
    if not TASK_FILES.exists():
        pytest.skip("the tasks' files are not at hand")
    found = A.read_task(name, TASK_FILES)
    assert len(found) == examples and {len(pairs) for pairs, _ in found} == choices
    assert name == "lambada" or len({gold for _, gold in found}) > 1
    for pairs, _ in found[::20]:
        for context, continuation in pairs:
            assert context == context.rstrip()
            assert continuation[0] == " " and continuation.strip()
            ids, n = A.encode_pair(toy_tokenizer, context, continuation, 2048)
            before, after = toy_tokenizer.encode(context), toy_tokenizer.encode(continuation)
            assert ids == before + after and n == len(after)  # as the harness' older encoding


# -------------------------------------------------------- accuracies


def one_token_scores(*logprobs, match=1):
    """Scores (3, 1, 1) of continuations of one token each, by one reader."""
    return [torch.tensor([[[x]], [[match]], [[1.0]]]) for x in logprobs]


def test_accuracy_and_accuracy_per_character_by_hand():
    pairs = [("q", " yes"), ("q", " certainly")]  # 3 and 9 characters
    # -6 / 3 = -2 and -9 / 9 = -1: the sum prefers the short answer, the mean the long one
    found = A.accuracies([(pairs, 0), (pairs, 1)], one_token_scores(-6.0, -9.0) * 2)
    assert found["acc"].tolist() == [0.5] and found["acc_norm"].tolist() == [0.5]
    found = A.accuracies([(pairs, 1)], one_token_scores(-6.0, -9.0))
    assert found["acc"].tolist() == [0] and found["acc_norm"].tolist() == [1]
    found = A.accuracies([(pairs, 0)], one_token_scores(-2.0, -2.0))
    assert found["acc"].tolist() == [1]  # the first of equals, as numpy's argmax
    # two tokens, one of them not the argmax
    two = torch.tensor([[[-1.0, -2.0]], [[1, 0]], [[1.0, 1.0]]])
    found = A.accuracies([([("c", " w")], 0)] * 2, [two, *one_token_scores(-1.0)])
    assert found["acc"].tolist() == [0.5]
    assert found["ppl"].item() == pytest.approx(math.exp((3 + 1) / 2))


def random_questions(rnd, count):
    """Lines of an ARC file with awkward words."""
    words, lines = ["red", "a b", "wall,", "(1, 2)", "return", "naïve", " x"], []
    for _ in range(count):
        stem = " ".join(rnd.choices(words, k=rnd.randrange(1, 9)))
        choices = []
        for label in "ABCDE"[:rnd.randrange(3, 6)]:
            text = " ".join(rnd.choices(words, k=rnd.randrange(1, 5)))
            choices.append({"text": text, "label": label})
        record = {"question": {"stem": stem, "choices": choices}, "answerKey": rnd.choice("ABC")}
        lines.append(json.dumps(record, ensure_ascii=False))
    return lines


@torch.no_grad()
def by_hand(model, heads, tokenizer, readers, lines):
    """Of an ARC file, per reader: right answers, right per character, costs of scored tokens."""
    acc, acc_norm, costs = [0] * len(readers), [0] * len(readers), [[] for _ in readers]
    for record in map(json.loads, lines):
        readings = []  # per choice, per reader, per token
        for choice in record["question"]["choices"]:
            context = tokenizer.encode(f"Question: {record['question']['stem']}\nAnswer:")
            more = tokenizer.encode(f" {choice['text']}")
            ids = (context + more)[-49:]
            readings.append(alone(model, heads, readers, ids, len(more)))
        gold = "ABCDE".index(record["answerKey"])
        for r in range(len(readers)):
            sums, means = [], []
            for choice, reading in zip(record["question"]["choices"], readings):
                sums.append(sum(logprob for logprob, _, _ in reading[r]))
                means.append(sums[-1] / len(choice["text"]))
                costs[r] += [cost for _, _, cost in reading[r]]
            acc[r] += sums.index(max(sums)) == gold
            acc_norm[r] += means.index(max(means)) == gold
    return zip(acc, acc_norm, costs)


def test_a_whole_task_equals_the_harness_done_by_hand(toy_tokenizer, tmp_path, capsys):
    lines = random_questions(random.Random(4), 30)
    write_task(tmp_path, "arc_easy", *lines)
    model = tiny(vocab_size=2048, max_position_embeddings=48)
    heads = shaken(model, [1, 2])
    heads.calibration = {"0.90": [5.5, None]}
    records = A.run_tasks(model, heads, toy_tokenizer, ["arc_easy"], tmp_path, levels=(0.90,))
    record = records["arc_easy"]
    readers = {"full": [None, None], "exit 1": [math.inf, None], "exit 2": [None, math.inf],
               "level 0.90": [5.5, None]}
    assert record["examples"] == 30 and list(record["readers"]) == list(readers)
    expected = by_hand(model, heads, toy_tokenizer, list(readers.values()), lines)
    for row, (acc, acc_norm, costs) in zip(record["readers"].values(), expected):
        assert row["acc"] == pytest.approx(acc / 30)
        assert row["acc_norm"] == pytest.approx(acc_norm / 30)
        assert row["cost"] == pytest.approx(sum(costs) / len(costs))
        assert len(costs) == record["scored_tokens"]
    out = capsys.readouterr().out
    assert "30 examples" in out and "block-equivalents" in out
    table = [line[15:27].strip() for line in out.splitlines() if line.startswith("arc_easy ")]
    assert table == list(readers)


# -------------------------------------------------------- the toy


def check_line(tokenizer, ids, span):
    """A line of a window is given up to its middle -> what is given of the window, what is left."""
    given, rest = ids[:span.start + 1], ids[span.start + 1:span.stop + 1]
    newlines = [i for i, token in enumerate(given) if "\n" in tokenizer.decode([token])]
    start = max(newlines) + 1
    assert "\n" not in tokenizer.decode(rest[:-1])
    assert tokenizer.decode(rest[-1:]).startswith("\n")  # up to the newline, no further
    assert len(rest) >= 2 and len(given) - start - (len(rest) - 1) in (0, 1)  # from the middle on
    return given, rest


def test_the_toys_own_task(toy, toy_tokenizer, paper_heads):
    record = A.run_tasks(toy, paper_heads, toy_tokenizer, ["code"], limit=4)["code"]
    task = A.code_task(toy_tokenizer, 4)
    lines = [(ids, span) for (ids, _), spans in zip(task.rows, task.spans) for span in spans]
    assert record["scored_tokens"] == 4 * 255
    assert record["examples"] == len(lines) == len(task.examples) > 20
    assert all(n == 255 and len(ids) == 256 for ids, n in task.rows)
    done = []
    for (ids, span), (pairs, gold) in zip(lines, task.examples):
        given, rest = check_line(toy_tokenizer, ids, span)
        assert gold == 0 and pairs[0][1] == toy_tokenizer.decode(rest)
        assert toy_tokenizer.decode(given).endswith(pairs[0][0])
        if len(done) < 12:
            done.append(list(sample(toy, given, len(rest))) == rest)
    right = []
    for ids, _ in task.rows:
        logits, _ = toy(torch.tensor([ids[:-1]]))
        right.append((logits[0].argmax(-1) == torch.tensor(ids[1:])).float())
    full = record["readers"]["full"]
    assert full["token_acc"] == pytest.approx(torch.cat(right).mean().item())
    scores = A.score(toy, paper_heads, [[None] * 3], task.rows)
    matches = []
    for row, spans in zip(scores, task.spans):
        matches += [bool(row[1, 0, span].all()) for span in spans]
    assert matches[:12] == done and any(done)  # teacher forcing is greedy decoding
    assert full["acc"] == pytest.approx(sum(matches) / len(matches))
    assert full["cost"] == pytest.approx(toy.config.full_cost)
    assert record["readers"]["exit 4"]["cost"] < full["cost"]
    json.dumps(record, allow_nan=False)


def test_all_tasks_on_the_toy(toy, toy_tokenizer, fast_heads):
    if not TASK_FILES.exists():
        pytest.skip("the tasks' files are not at hand")
    names = list(A.COLUMNS)
    records = A.run_tasks(toy, fast_heads, toy_tokenizer, names, TASK_FILES, limit=2)
    for name, columns in A.COLUMNS.items():
        for row in records[name]["readers"].values():
            assert list(row) == [*columns, "cost"]
            assert all(0 <= row[column] <= 1 for column in columns if column != "ppl")
            assert row["cost"] > 1 and row.get("ppl", 2) > 1
    json.dumps(records, allow_nan=False)


# -------------------------------------------------------- bad input, command line


@pytest.mark.parametrize("name, line", [
    ("piqa", "not json"), ("piqa", "[1]"), ("piqa", '{"goal": "g", "sol1": "a"}'),
    ("piqa", '{"goal": 1, "sol1": "a", "sol2": "b"}'),
    ("lambada", "null"), ("lambada", '{"text": "word"}'), ("lambada", '{"text": 3}'),
    ("arc_easy", '{"question": "s"}'),
    ("arc_easy", LINES["arc_easy"].replace('Key": "2"', 'Key": "3"')),
    ("winogrande", LINES["winogrande"].replace("1}", "2}")),
    ("winogrande", LINES["winogrande"].replace("1}", "-1}")),
    ("winogrande", LINES["winogrande"].replace("1}", "true}")),
    ("winogrande", LINES["winogrande"].replace('"Ann"', "5"))])
def test_malformed_lines_are_named(name, line, tmp_path):
    write_task(tmp_path, name, LINES[name], line)
    with pytest.raises(InputError, match=f"line 2 is no example of {name}") as caught:
        A.read_task(name, tmp_path)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "lambada_openai.jsonl").write_text("")
    with pytest.raises(InputError, match="line 1"):
        A.read_task("lambada", tmp_path)
    (tmp_path / "lambada_openai.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="task lambada"):
        A.read_task("lambada", tmp_path)
    write_task(tmp_path, "piqa", LINES["piqa"])
    (tmp_path / "piqa_valid-labels.lst").write_text("1\n0\n")
    with pytest.raises(InputError, match="1 lines, its labels are 2"):
        A.read_task("piqa", tmp_path)
    (tmp_path / "piqa_valid-labels.lst").unlink()
    with pytest.raises(InputError, match="labels.lst"):
        A.read_task("piqa", tmp_path)


def test_bad_options(toy, toy_tokenizer, tmp_path):
    assert_refused(call(A, "lambda"), "unknown 'lambda'; the tasks are lambada, piqa")
    assert_refused(call(A, ""), "unknown ''")
    assert_refused(call(A, "piqa"), "--task-dir")
    assert_refused(call(A, "code", "--limit", 0), "--limit")
    none = tmp_path / "none"
    result = call(A, "code,piqa", "--task-dir", none)
    assert_refused(result, "task piqa: ", "No such file", "--task-dir")
    assert result[2].count("\n") == 1
    assert_refused(call(A, "code", "--json", none / "t.json"), "there is no folder")
    with pytest.raises(InputError, match="not calibrated"):
        A.run_tasks(toy, ExitHeads(toy, [4]), toy_tokenizer, ["code"])


def test_command_line(tmp_path):
    status, out, errors = call(A, "code", "--limit", 2, "--json", tmp_path / "t.json")
    assert status == 0, errors
    record = json.loads(out.splitlines()[-1])
    assert record == json.loads((tmp_path / "t.json").read_text())
    assert record["tasks"]["code"]["scored_tokens"] == 2 * 255
    assert_refused(call(A, "lambda"), "unknown 'lambda'")
