r"""A side room: accuracy against cost on language-model tasks.

A decoder that exits early answers with a shallower head where that head is certain. What does it
lose? Here the question is asked with tasks whose right answers are known, zero-shot. A *reader* is
a list of thresholds, one per exit. It takes the answer of the first certain exit, else the full
model's. All readers read the same tokens, so the accuracy of each stands beside its cost.

The tasks are scored as lm-evaluation-harness scores the version-0 tasks of Pythia's published
results. A choice is a pair (context, continuation). Its score is a log-probability:

    log p(continuation | context) = sum over its tokens of log softmax(logits)[token]
    acc       the right choice has the largest score; a sole choice: all its tokens are the argmax
    acc_norm  the right choice has the largest score per character
    ppl       exp of the mean of -score: perplexity per continuation, not per token

    python -m appendix.tasks      lines of held-out code, completed from the middle
    python -m appendix.tasks lambada,piqa --task-dir DIR --model pythia-410m \
        --heads run/heads.safetensors
Expect a table per task: a line per reader, its accuracy, and its cost per token in
block-equivalents. The last line of stdout is one JSON object.

Letters: B rows of a batch, T positions, P positions of a shared prefix, D hidden size,
V vocabulary, S scored tokens, M exits, R readers.
"""
import argparse
import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from bench import finish
from confidence import MEASURES, is_certain
from dssd import always
from heads import FAST, held_out, load_model, measuring_windows, model_options
from model import InputError, check_file, command_line
from train import Progress

# -------------------------------------------------------- the tasks and their files

FILES = {
    "lambada": "lambada_openai.jsonl",
    "piqa": "piqa_valid.jsonl",
    "arc_easy": "arc_easy.jsonl",
    "winogrande": "winogrande_dev.jsonl",
    "arc_challenge": "arc_challenge.jsonl",
}
COLUMNS = {
    "lambada": ("acc", "ppl"),
    "piqa": ("acc", "acc_norm"),
    "arc_easy": ("acc", "acc_norm"),
    "winogrande": ("acc",),
    "arc_challenge": ("acc", "acc_norm"),
    "code": ("acc", "token_acc"),
}


class Task(NamedTuple):
    """Examples [(pairs, gold)], and rows [(ids, n)] for score() that hold their continuations.

    A row's last n ids are scored. `spans` has, for every row, the slices of its scored ids that are
    one continuation each. Over all rows they are in the order of the examples' pairs.
    """
    examples: list
    rows: list
    spans: list


def pairs_of(name, record):
    """An object of a task's file -> [(context, continuation)] per choice, and which is right."""
    if name == "lambada":
        context, word = record["text"].rsplit(" ", 1)
        return [(context, " " + word)], 0
    if name == "winogrande":  # the choices are in the contexts
        continuation, contexts = " " + record["continuation"], record["context_options"]
        return [(context, continuation) for context in contexts], record["gold"]
    if name == "piqa":
        question, gold = record["goal"], record["label"]
        choices = [record["sol1"], record["sol2"]]
    else:  # ARC, whose labels are A .. E or 1 .. 5
        question = record["question"]["stem"]
        choices = [choice["text"] for choice in record["question"]["choices"]]
        labels = [choice["label"] for choice in record["question"]["choices"]]
        gold = labels.index(record["answerKey"])
    context = "Question: " + question + "\nAnswer:"
    return [(context, " " + choice) for choice in choices], gold


def check_example(pairs, gold):
    """ValueError unless gold is the index of a choice and every context is text."""
    if type(gold) is not int or not 0 <= gold < len(pairs):
        raise ValueError(f"no choice {gold!r}")
    if not all(isinstance(context, str) for context, _ in pairs):
        raise ValueError("a context is no text")


def read_lines(name, path):
    """The lines of a task's file, and piqa's labels, one a line, which have a file of their own."""
    lines = path.read_text("utf-8").rstrip().split("\n")
    if name != "piqa":
        return lines, None
    labels = path.with_name("piqa_valid-labels.lst").read_text("utf-8").split()
    if len(labels) != len(lines):
        raise ValueError(f"{path} has {len(lines):,} lines, its labels are {len(labels):,}")
    return lines, labels


def read_task(name, folder, limit=None):
    """The first `limit` examples of a task's file, [(pairs, gold)]. InputError for a bad file."""
    path = Path(folder) / FILES[name]
    try:
        lines, labels = read_lines(name, path)
    except (OSError, ValueError) as error:
        raise InputError(f"task {name}: {error}; --task-dir must be the folder "
                         f"that holds its files") from None
    examples = []
    for n, line in enumerate(lines[:limit]):
        try:
            record = json.loads(line)
            if labels:
                record = {**record, "label": int(labels[n])}
            pairs, gold = pairs_of(name, record)
            check_example(pairs, gold)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{path}, line {n + 1} is no example of {name} ({error!r}); "
                             f"correct it") from None
        examples.append((pairs, gold))
    return examples


# -------------------------------------------------------- from text to rows of ids


def encode_pair(tokenizer, context, continuation, max_len):
    """The last max_len + 1 ids of context and continuation, and how many are the continuation's.

    Both are read as one text, as the harness does now. For Pythia's published results it read them
    apart. On these files the ids are the same. White space that ends the context is scored, too.
    """
    before = tokenizer.encode(context.rstrip())
    after = tokenizer.encode(context + continuation)[len(before):]
    if not 0 < len(after) <= max_len:
        raise InputError(f"{continuation[:40]!r} adds {len(after)} tokens to its context; "
                         f"it must add 1 .. {max_len}")
    if not before:  # what nothing precedes follows <|endoftext|>
        before = [tokenizer.end]
    ids = before + after
    return ids[-max_len - 1:], len(after)


def file_task(examples, tokenizer, max_len):
    """A task of a file: every pair is a row, and all its scored ids are one continuation."""
    rows = []
    for pairs, _ in examples:
        rows += [encode_pair(tokenizer, *pair, max_len) for pair in pairs]
    whole = [slice(None)]
    return Task(examples, rows, [whole] * len(rows))


def code_task(tokenizer, windows, text=None):
    """The task without a file: windows of 256 tokens of text (None: the toy's), which is code.

    All tokens but a window's first are scored. A line of two tokens or more is given up to its
    middle. It is completed if each further token, the newline too, is the argmax: given the true
    tokens, that is what greedy decoding writes.
    """
    newlines = {i for i, text in tokenizer.bytes.items() if b"\n" in text}
    examples, rows, spans = [], [], []
    length = min(256, text.context + 1) if text else 256
    for ids in measuring_windows("test", length * windows, length, text).tolist():
        lines = []
        ends = [i for i, token in enumerate(ids) if token in newlines]
        for start, end in zip(ends, ends[1:]):
            if end - start > 2:
                middle = (start + end) // 2
                given, rest = ids[start + 1:middle + 1], ids[middle + 1:end + 1]
                examples.append(([(tokenizer.decode(given), tokenizer.decode(rest))], 0))
                lines.append(slice(middle, end))  # scored id i is ids[i + 1]
        rows.append((ids, len(ids) - 1))
        spans.append(lines)
    if not examples:
        raise InputError("no window holds a whole line of the text; give another as --data, or a "
                         "larger --limit")
    return Task(examples, rows, spans)


# -------------------------------------------------------- every exit reads the rows, each once


def shared_prefixes(rows):
    """Per row the first ids, where another row has the same before what is scored, else ().

    So a question with several choices is read once. The last id before the scored ones stays in the
    row, because its output predicts the first of them.
    """
    before = [tuple(ids[:-n - 1]) for ids, n in rows]
    count = Counter(before)
    return [prefix if count[prefix] > 1 else () for prefix in before]


def batches(rows, prefixes, batch_tokens):
    """Yield lists of row numbers: of equally long prefixes, and together within batch_tokens."""
    def place(i):
        return len(prefixes[i]), prefixes[i], -len(rows[i][0])

    batch = []
    for i in sorted(range(len(rows)), key=place):
        longest = max(len(rows[j][0]) for j in [*batch, i])
        fits = (len(batch) + 1) * (longest - 1) <= batch_tokens
        if batch and (not fits or len(prefixes[i]) != len(prefixes[batch[0]])):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def read_on(model, heads, ids, caches):
    """Ids (B, T) after what the caches hold -> what every head's matrix reads, then depth L.

    These bodies are M + 1 x (B, T, D).
    """
    own, *of_heads = caches
    x, depth, bodies = model.embed(ids), 0, []  # (B, T, D)
    for layer, head, cache in zip(heads.layers, heads.heads, of_heads):
        x = model.run(x, depth, layer, own)
        bodies.append(head.body(x, cache))
        depth = layer
    bodies.append(model.run(x, depth, model.config.num_hidden_layers, own))
    return bodies


def read_batch(model, heads, rows, prefixes):
    """Rows [(ids, n)], and their prefixes of P ids each -> bodies as read_on gives, ids (B, T + 1).

    Every distinct prefix is read once, into an entry of the caches. Each row goes on from there.
    """
    P = len(prefixes[0])
    rests = [torch.tensor(ids[P:]) for ids, _ in rows]
    ids = pad_sequence(rests, batch_first=True)  # (B, T + 1), padded on the right
    ids = ids.to(model.embed_in.weight.device)
    T = ids.shape[1] - 1
    distinct = list(dict.fromkeys(prefixes))
    caches = [module.new_cache(len(distinct), P + T) for module in (model, *heads.heads)]
    if P:
        read_on(model, heads, torch.tensor(distinct, device=ids.device), caches)
    entries = [distinct.index(prefix) for prefix in prefixes]
    for cache in caches:
        if cache is not None:
            cache.pick(entries)
    return read_on(model, heads, ids[:, :-1], caches), ids


def scored_places(rows, P, T):
    """Which of T inputs after a prefix of P predict a scored id, (B, T). None sees the padding."""
    inputs = torch.tensor([len(ids) - 1 - P for ids, _ in rows])[:, None]  # (B, 1)
    scored = torch.tensor([n for _, n in rows])[:, None]  # (B, 1)
    place = torch.arange(T)
    return (inputs - scored <= place) & (place < inputs)


class Answers(NamedTuple):
    """What the exits, and last the full model, say on S scored tokens: (M + 1, S) each."""
    logprob: torch.Tensor  # of the true token, in nats
    match: torch.Tensor  # is the true token the argmax?
    uncertainty: torch.Tensor  # by the heads' measure


def answers_of(model, heads, bodies, scored, targets):
    """Bodies M + 1 x (B, T, D) at the scored places (B, T) -> Answers on their targets (S,)."""
    measure = MEASURES[heads.measure]
    outputs = [head.output for head in heads.heads] + [model.unembed]
    logprob, match, uncertainty = [], [], []
    for output, body in zip(outputs, bodies):
        logits = output(body[scored])  # (S, V), of one exit at a time
        logprob.append(logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0])
        match.append(logits.argmax(-1) == targets)
        uncertainty.append(measure(logits))
    return Answers(*(torch.stack(rows).cpu() for rows in (logprob, match, uncertainty)))


# -------------------------------------------------------- every reader chooses among their answers


def leaving_exit(uncertainty, thresholds):
    """Index of the first certain exit, M where none is: uncertainty (M + 1, S) -> (S,)."""
    M = len(thresholds)
    first = torch.full(uncertainty.shape[1:], M)
    for m in reversed(range(M)):
        first[is_certain(uncertainty[m], thresholds[m])] = m
    return first


def leaving_costs(heads, thresholds):
    """Cost of a token by where it leaves, the exits then full depth, (M + 1,).

    In block-equivalents: its blocks, and the heads consulted on the way. A head whose threshold is
    None is not consulted.
    """
    consulted, costs = 0.0, []
    for layer, head, threshold in zip(heads.layers, heads.heads, thresholds):
        if threshold is not None:
            consulted += head.cost()
        costs.append(layer + consulted)
    costs.append(heads.backbone[0].config.full_cost + consulted)
    return torch.tensor(costs, dtype=torch.double)


def choose(answers, thresholds, costs):
    """Log-probability, match and cost of the first certain exit's answer, (3, S)."""
    first = leaving_exit(answers.uncertainty, thresholds)  # (S,)
    logprob = answers.logprob.gather(0, first[None])[0]
    match = answers.match.gather(0, first[None])[0]
    return torch.stack((logprob.double(), match.double(), costs[first]))


@torch.inference_mode()
def score(model, heads, readers, rows, name="rows", batch_tokens=2048):
    """Log-probability (nats), argmax match (0 or 1) and cost of scored tokens: (3, R, n) per row.

    rows [(ids, n)]: the last n ids are scored. readers: R lists of thresholds, one per exit.
    The cost, in block-equivalents, is that of the scored tokens: their depth, the heads consulted.
    The tokens before have exact keys and values (EarlyExit's fill="exact"), which are not counted.
    """
    costs = [leaving_costs(heads, thresholds) for thresholds in readers]
    prefixes, scores = shared_prefixes(rows), [None] * len(rows)
    progress, done = Progress(len(rows), "sequences"), 0
    for batch in batches(rows, prefixes, batch_tokens):
        # every exit reads the rows
        batch_rows = [rows[i] for i in batch]
        batch_prefixes = [prefixes[i] for i in batch]
        bodies, ids = read_batch(model, heads, batch_rows, batch_prefixes)
        # every exit answers at the scored places
        scored = scored_places(batch_rows, len(batch_prefixes[0]), ids.shape[1] - 1).to(ids.device)
        answers = answers_of(model, heads, bodies, scored, ids[:, 1:][scored])
        # every reader chooses among the answers
        chosen = [choose(answers, reader, cost) for reader, cost in zip(readers, costs)]
        # from the scored tokens of the batch back to those of each row
        parts = torch.stack(chosen, 1).split([n for _, n in batch_rows], -1)  # (3, R, n) each
        for i, part in zip(batch, parts):
            scores[i] = part
        done += len(batch)
        progress.show(done, f"scoring {name}")
    return scores


# -------------------------------------------------------- accuracy, and the table


def accuracies(examples, scores):
    """Examples [(pairs, gold)] and the scores (3, R, n) of their pairs in order -> {column: (R,)}.

    Of equal choices the first is chosen. The space before a continuation is no character of it.
    """
    scores, results = iter(scores), []
    for pairs, gold in examples:
        own = [next(scores) for _ in pairs]
        logprob = torch.stack([s[0].sum(-1) for s in own])  # (choices, R)
        characters = torch.tensor([max(1, len(text) - 1) for _, text in pairs])[:, None]
        if len(pairs) > 1:
            right = logprob.argmax(0) == gold  # (R,)
        else:
            right = own[0][1].all(-1)
        right_norm = (logprob / characters).argmax(0) == gold
        results.append(torch.stack((right, right_norm, logprob[gold])))
    acc, acc_norm, logprob = torch.stack(results).double().mean(0)
    return {"acc": acc, "acc_norm": acc_norm, "ppl": (-logprob).exp()}


def score_task(model, heads, name, task, readers):
    """One task, read by {name: thresholds} -> its record {examples, scored_tokens, readers}."""
    scores = score(model, heads, list(readers.values()), task.rows, name)
    continuations = []
    for row, spans in zip(scores, task.spans):
        continuations += [row[..., span] for span in spans]
    _, token_acc, cost = torch.cat(scores, -1).double().mean(-1)  # (R,) each
    values = {**accuracies(task.examples, continuations), "token_acc": token_acc, "cost": cost}
    columns, by_reader = (*COLUMNS[name], "cost"), {}
    for r, reader in enumerate(readers):
        by_reader[reader] = {column: values[column][r].item() for column in columns}
    scored = sum(n for _, n in task.rows)
    return {"examples": len(task.examples), "scored_tokens": scored, "readers": by_reader}


def report(name, record):
    """Print the table of a task: a line per reader."""
    print(f"{record['examples']:,} examples, {record['scored_tokens']:,} scored tokens; "
          f"cost per scored token, in block-equivalents")
    columns = (*COLUMNS[name], "cost")
    print(f"{'task':<15}{'reader':<12}" + "".join(f"{column:>11}" for column in columns))
    for reader, values in record["readers"].items():
        line = f"{name:<15}{reader:<12}"
        for column in columns:
            line += f"{values[column]:>11.1%}" if "acc" in column else f"{values[column]:>11.4g}"
        print(line, flush=True)


def readers_of(heads, levels):
    """Named thresholds: the full model alone, every exit alone, and the levels of agreement."""
    readers = {"full": [None] * len(heads.layers)}
    for layer in heads.layers:
        readers[f"exit {layer}"] = always(heads, layer)
    for level in levels:
        readers[f"level {level:.2f}"] = heads.thresholds(level)
    return readers


def run_tasks(model, heads, tokenizer, names, task_dir=None, limit=None, levels=(0.80, 0.90, 0.95),
              text=None):
    """Print and return {task: record}. `limit` counts examples; of code, windows (default 128)."""
    # all that can fail, before the long work
    readers = readers_of(heads, levels)
    files = {name: read_task(name, task_dir, limit) for name in names if name != "code"}
    context = model.config.max_position_embeddings
    records = {}
    for name in names:
        if name == "code":
            task = code_task(tokenizer, limit or 128, text or held_out(context, tokenizer))
        else:
            task = file_task(files[name], tokenizer, context)
        records[name] = score_task(model, heads, name, task, readers)
        report(name, records[name])
    return records


# -------------------------------------------------------- command line


def check(names, task_dir, limit):
    """InputError for an unknown task, a task without its folder, a limit below 1."""
    unknown = [repr(name) for name in names if name not in COLUMNS]
    if unknown:
        raise InputError(f"unknown {', '.join(unknown)}; the tasks are {', '.join(COLUMNS)}")
    if not task_dir and set(names) != {"code"}:
        raise InputError("tasks other than code need the folder of their files as --task-dir")
    if limit is not None and limit < 1:
        raise InputError("--limit must be at least 1")


def arguments():
    parser = argparse.ArgumentParser(prog="python -m appendix.tasks",
                                     description="Accuracy against cost on language-model tasks.")
    parser.add_argument("tasks", nargs="?", default="code",
                        help=f"of {', '.join(COLUMNS)}, joined by commas (default: code)")
    parser.add_argument("--task-dir", help="folder of the tasks' JSONL files; code needs none")
    model_options(parser, FAST)
    parser.add_argument("--limit", type=int,
                        help="examples per task (default: all; of code 128 windows)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="of weights and arithmetic")
    parser.add_argument("--json", help="also write the JSON object to this file")
    args = parser.parse_args()
    check(args.tasks.split(","), args.task_dir, args.limit)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no such device here; use cpu")
    if args.json:
        check_file(args.json, "--json")
    return args


def main():
    args = arguments()
    model, heads, tokenizer, text = load_model(args, FAST)
    records = run_tasks(model, heads, tokenizer, args.tasks.split(","), args.task_dir, args.limit,
                        text=text)
    finish({"tasks": records}, args)


if __name__ == "__main__":
    command_line(main)
