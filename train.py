"""Chapter 6. The main job: train, calibrate and test exit heads (arXiv 2407.21082).

    python train.py --layers 4,8,12                     the toy, about two minutes
    python train.py --layers 1,2,4 --head block --data stdlib+self \\
                    --steps 2000 --batch 16 --length 256    the fast heads, 43 minutes
    python train.py --start toy/heads-fast.safetensors --steps 0 --measure margin
                                                        calibrate anew, without training
    python train.py --model pythia-70m --data my.txt --out run70

What happens:
1. Training. Random windows of text pass through the frozen model once. Every head reads the
   residual stream at its depth and learns to give the full model's distribution (chapter 2).
2. Calibration. On other text, each head gets a threshold for every level (chapter 3).
3. Test. A third text shows what the thresholds are worth.
The run folder then holds heads.safetensors, metrics.jsonl and report.png.

Without --data the heads learn from the source of the reader's Python. Calibration and test then use
the measuring text of chapter 2, which is the same for everyone.

Expect on the toy: deeper exits agree more, and the coverage at a level grows with depth.
Letters: B batch, T positions, N tokens, D hidden size, L blocks, M exits.
A layer n means n blocks executed: --layers 4,8,12 puts heads after the 4th, 8th and 12th block.
"""
import argparse
import hashlib
import json
import math
import os
import sys
import sysconfig
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from confidence import MEASURES, calibrate, obtained, unit_of
from heads import (KINDS, ExitHeads, check_layers, distill_in_chunks, evaluate, fingerprint, hard,
                   kl, measuring_text, self_text, topk_kl)
from model import (TOY, InputError, Pythia, Tokenizer, check_numbers, command_line, locate,
                   seed_number)

LEVELS = [f"{0.50 + 0.01 * i:.2f}" for i in range(50)]    # 0.50 .. 0.99, kept in the heads file
SHOWN = ("0.80", "0.90", "0.95", "0.98")                  # those in the printed table
SPLITS = ("train", "calibration", "test")
LOSSES = {"kl": kl, "topk": topk_kl, "hard": hard}
MEASURED = 65536                                          # tokens to calibrate on, and to test on
CHECKPOINT = 300                                          # seconds from one to the next

# ---------------------------------------------------------------- text


def stdlib_documents(tests=False):
    """The source of this Python's standard library, [(relative name, text)].

    encodings and pydoc_data are left out: they are generated tables, not code that someone wrote.
    The library's tests are left out unless asked for.
    """
    root, documents = Path(sysconfig.get_paths()["stdlib"]), []
    skip = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
    if not tests:
        skip |= {"test", "tests", "idle_test"}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not skip & set(name.parts):
            try:
                documents.append((name.as_posix(), path.read_bytes().decode("utf-8")))
            except UnicodeDecodeError:    # a file that tests another encoding
                continue
    return documents


def split_of(name):
    """train, calibration or test: by a hash of the document's relative name, 80 : 10 : 10."""
    h = hashlib.sha256(os.fsencode(name)).digest()[0]     # also of a name that is no UTF-8
    if h < 26:
        return "test"
    return "calibration" if h < 52 else "train"


def tokens_of(documents, tokenizer):
    """Documents [(name, text)] as one stream of ids (N,), each closed by <|endoftext|>."""
    ids = []
    for _, text in documents:
        ids += tokenizer.encode(text)
        ids.append(tokenizer.end)
    return torch.tensor(ids, dtype=torch.long)


def long_lines(text):
    """The different lines of a text that have over 30 characters, without indentation."""
    return {line.strip() for line in text.splitlines() if len(line.strip()) > 30}


def unmeasured(documents, measured, shared=15):
    """The training documents that share fewer than `shared` long lines with the texts `measured`.

    A file's name decides its split, and a file may move between versions of Python. A text that is
    measured on must not be learned under another name.
    """
    lines = set().union(*map(long_lines, measured))
    training = [d for d in documents if split_of(d[0]) == "train"]
    return [d for d in training if len(long_lines(d[1]) & lines) < shared]


def stdlib_splits(documents, tokenizer):
    """{split: ids (N,)}: this Python's library to train on, the measuring text for the rest."""
    documents = [d for d in documents if d[1].strip()]
    splits = {split: measuring_text(split, tokenizer) for split in SPLITS[1:]}
    measured = [tokenizer.decode(ids.tolist()) for ids in splits.values()]
    return {"train": tokens_of(unmeasured(documents, measured), tokenizer), **splits}


def load_splits(data, tokenizer, length, read_corpus):
    """{split: ids (N,)} of --data. InputError unless each has a window of `length` + 1 tokens."""
    if data == "stdlib":
        splits = stdlib_splits(stdlib_documents(), tokenizer)
    else:
        splits = read_corpus(data, tokenizer)
    for split, ids in splits.items():
        if len(ids) <= length:
            raise InputError(f"--data {data}: its {split} split has {len(ids)} tokens, "
                             f"fewer than one window of {length + 1}; give more text")
    return splits


def written_splits(model, splits, names, end, length, tokens, seed):
    """Text that the model writes itself: {split: ids (n, length)} for the splits in `names`.

    With a corpus `splits` it continues up to 32 tokens of it, as a decoder does, a third each at
    temperature 0, 0.8 and 1. Without one it starts from <|endoftext|> and a few sampled tokens.
    """
    written, generator = {}, torch.Generator().manual_seed(seed)
    device = model.embed_in.weight.device
    at_once = 128 if device.type == "cpu" else 1024       # rows; a GPU takes many as fast as few
    for split in names:
        seeds = 1000 * SPLITS.index(split)
        n = max(8, (tokens if split == "train" else min(tokens, MEASURED)) // length)
        rows, progress = [], Progress(n * length)
        for done in range(0, n, at_once):
            B = min(at_once, n - done)
            if splits:
                temperatures = (0.0, 0.8, 1.0)
                P = min(32, length // 2)
                prefix = windows(splits[split], B, P, generator).to(device)         # (B, P)
            else:
                # sampled beginnings, else all greedy rows would be the same
                temperatures = (0.0, 0.8, 1.0, 1.0)
                prefix = torch.full((B, 1), end, device=device)
                prefix = self_text(model, prefix, 8, (1.0,), seed=seeds + done)     # (B, 8)
            ids = self_text(model, prefix, length, temperatures, seed=seeds + done + 1)
            rows.append(ids.cpu())                                                  # (B, length)
            progress.show((done + B) * length, f"the model writes its {split} text")
        written[split] = torch.cat(rows)                                            # (n, length)
    return written


def load_text(args, model, tokenizer, length, read_corpus):
    """{split: ids (N,)} of --data, and windows (n, length + 1) that the model wrote, or None.

    read_corpus: the function that reads a user's own text.
    """
    corpus, names = {}, SPLITS            # self: no corpus, the model writes all three splits
    if args.data != "self":
        data, names = args.data.removesuffix("+self"), ("train",)
        corpus = load_splits(data, tokenizer, length, read_corpus)
        if not args.data.endswith("+self"):
            return corpus, None
    tokens = max(args.steps * args.batch * length // 4, 8 * length)
    written = written_splits(model, corpus, names, tokenizer.end, length + 1, tokens, args.seed)
    splits = corpus or {split: ids.flatten() for split, ids in written.items()}
    return splits, written["train"]


def windows(stream, batch, length, generator):
    """A batch of random windows of the stream, (batch, length). Reads no more of it than these."""
    starts = torch.randint(len(stream) - length + 1, (batch,), generator=generator)
    return torch.stack([stream[start:start + length].long() for start in starts.tolist()])


def training_batches(args, stream, written, length, generator, team):
    """For ever: windows (B, T) of the corpus, of what the model wrote, or both, 1/3 and 2/3.

    All processes draw the windows of a whole step. Each yields its own, --accumulate batches.
    """
    total, n_written = args.batch * args.accumulate * team.size, 0
    if written is not None:
        n_written = total if args.data == "self" else max(1, total * 2 // 3)
    while True:
        rows = []
        if n_written < total:
            rows.append(windows(stream, total - n_written, length, generator))
        if n_written:
            pick = torch.randint(len(written), (n_written,), generator=generator)
            rows.append(written[pick, :length])
        batches = torch.cat(rows).split(args.batch)                       # (B, T) each
        for ids in batches[team.rank::team.size]:
            yield ids.to(args.device)


def spread_windows(stream, length):
    """MEASURED tokens of the stream, or up to twice as many, as windows (n, length) all over it."""
    every = stream[:len(stream) // length * length].view(-1, length)
    return every[::max(1, every.numel() // MEASURED)].long()


# ---------------------------------------------------------------- training


class Progress:
    """One updating line with rate and time left; without a terminal, a plain line now and then."""

    def __init__(self, total, unit="tokens", start=0):
        self.total, self.unit, self.start = total, unit, start
        self.terminal, self.begin = sys.stdout.isatty(), time.perf_counter()
        self.shown = self.begin

    def show(self, done, text):
        now, last = time.perf_counter(), done >= self.total
        if not last and now - self.shown < (0.2 if self.terminal else 10):
            return
        self.shown = now
        rate = max(1e-9, done - self.start) / (now - self.begin)
        digits = 0 if rate > 100 else 2
        line = f"{text}  {rate:,.{digits}f} {self.unit}/s  {(self.total - done) / rate:.0f} s left"
        if self.terminal:
            print(f"\r\033[K{line}", end="\n" if last else "", flush=True)
        else:
            print(line, flush=True)


class Optimizer:
    """Muon (Jordan 2024) for the matrices of `blocks`, AdamW for all other parameters of a module.

    Muon's step is the momentum made orthogonal. Block heads learn far sooner by it: in a trial at
    exit 1, 500 steps gave 85 % agreement on the model's own text, by AdamW alone 64 %.
    lr and muon_lr are the peaks; `adamw` holds other options of AdamW.
    """

    def __init__(self, module, blocks, lr, muon_lr, **adamw):
        matrices = [p for block in blocks for p in block.parameters() if p.dim() == 2]
        if matrices and not hasattr(torch.optim, "Muon"):
            print("this torch has no Muon (2.9 has): AdamW trains the blocks' matrices too")
            matrices = []
        taken = {id(p) for p in matrices}
        others = [p for p in module.parameters() if id(p) not in taken]
        self.module, self.parts = module, [(torch.optim.AdamW(others, **adamw), lr)]
        if matrices:
            # "original": the step of a tall matrix is scaled by sqrt(rows / columns)
            muon = torch.optim.Muon(matrices, weight_decay=0.01, momentum=0.95, nesterov=True,
                                    adjust_lr_fn="original")
            self.parts.append((muon, muon_lr))

    def step(self, scale):
        """One step at `scale` times the peak learning rates. The gradients are cleared."""
        for optimizer, peak in self.parts:
            optimizer.param_groups[0]["lr"] = peak * scale
            optimizer.step()
        self.module.zero_grad()


def listed(layers):
    return ", ".join(map(str, layers))


def make_heads(args, model):
    """New heads, or those of the file --start with its kind, layers and measure; ready to train."""
    L, layers = model.config.num_hidden_layers, args.layers
    if layers is not None:
        check_layers(layers, L)
    if args.start in ("lens", "random"):
        # the toy is shallow: 3 exits; elsewhere 4, as in the paper
        parts = 4 if Path(args.model).resolve() == TOY.resolve() else 5
        layers = layers or sorted({max(1, L * i // parts) for i in range(1, parts)})
        kind, measure = args.head or "linear", args.measure or "entropy"
        return ExitHeads(model, layers, kind, args.start, measure).float().train()
    if not Path(args.start).exists():
        raise InputError(f"--start {args.start}: neither lens, random nor a heads file that exists")
    heads = ExitHeads.load(args.start, model)
    if args.head not in (None, heads.kind) or layers not in (None, heads.layers):
        raise InputError(f"--start {args.start} holds {heads.kind} heads at layers "
                         f"{listed(heads.layers)}; leave --head and --layers out")
    heads.float().load_state_dict(load_file(args.start))      # exact, whatever the backbone's type
    heads.measure, heads.calibration = args.measure or heads.measure, {}
    return heads.requires_grad_(True).train()


class Training:
    """What a run learns with and counts: heads, optimizer, random state, and a record per step."""

    def __init__(self, model, heads, args, team):
        blocks = [head.block for head in heads.heads] if heads.kind == "block" else []
        self.model, self.heads, self.args, self.team = model, heads, args, team
        self.optimizer = Optimizer(heads, blocks, args.lr, 10 * args.lr, weight_decay=0.0)
        self.generator = torch.Generator().manual_seed(args.seed)
        self.metrics = []                 # {"step": .., "loss_nats": [..]}
        self.seconds = [0.0, 0.0, 0.0]    # of the frozen blocks; unembedding, heads; optimizer

    def clock(self):
        if self.team.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    def some(self, N):
        """Where the loss is taken: a random part --positions of N positions, None for all."""
        if self.args.positions == 1:
            return None
        count = max(1, round(self.args.positions * N))
        return torch.randperm(N, generator=self.generator)[:count].to(self.team.device)

    def step(self, batches, notice):
        """One step on --accumulate batches -> the heads' losses (M,).

        notice: 1 where SIGTERM has come, else 0; it becomes the mean of all processes.
        """
        model, heads, n = self.model, self.heads, self.args.accumulate
        depths, losses = (*heads.layers, model.config.num_hidden_layers), 0
        for _ in range(n):
            # 1. the frozen model, once for all heads
            ids, begin = next(batches), self.clock()
            with torch.no_grad():
                *hidden, last = model.hidden_states(ids, depths)      # (B, T, D) each
            middle = self.clock()
            # 2. the heads' losses, and the gradients, which add up
            loss, some = LOSSES[self.args.loss], self.some(ids.numel())
            losses = losses + distill_in_chunks(heads, hidden, last, loss, some) / n
            self.seconds[0] += middle - begin
            self.seconds[1] += self.clock() - middle
        # 3. the mean of all batches and processes
        begin = self.clock()
        gradients = [p.grad for p in heads.parameters()]
        self.team.average([*gradients, losses, notice])
        for gradient in gradients:
            gradient /= n
        # 4. a step: 20 steps of warm-up, and down along a cosine
        done = len(self.metrics)
        cosine = 0.5 + 0.5 * math.cos(math.pi * done / self.args.steps)
        self.optimizer.step(min(1, (done + 1) / 20) * cosine)
        self.seconds[2] += self.clock() - begin
        rounded = [round(x, 5) for x in losses.tolist()]
        self.metrics.append({"step": done + 1, "loss_nats": rounded})
        return losses

    def multiplications(self):
        """Multiply-adds per token: of the blocks, and of unembedding and heads.

        A matrix that learns multiplies three times: forward, and for two gradients. The frozen
        unembedding does so once for the full model, and twice for a head that borrows it.
        """
        config, part = self.model.config, self.args.positions
        blocks = config.num_hidden_layers * config.block_weights
        unembed = part * config.hidden_size * config.vocab_size
        others = unembed
        for head in self.heads.heads:
            sizes = {name: p.numel() for name, p in head.named_parameters() if p.dim() == 2}
            others += 3 * part * sizes.pop("out.weight", 0) + 3 * sum(sizes.values())
            others += 0 if head.owns_matrix else 2 * unembed
        return blocks, others


def report_pace(training):
    """Print the pace of training, what it would be by multiplications alone, and what took time."""
    config, team, seconds = training.model.config, training.team, training.seconds
    whole = sum(seconds)
    blocks, others = training.multiplications()
    # a token of the frozen model alone: its blocks, and its unembedding at the same pace
    full = config.full_cost / config.num_hidden_layers
    limit = full * blocks / (blocks + others)
    print(f"training ran at {full * seconds[0] / whole:.0%} of the frozen model's own tokens/s; "
          f"by multiplications alone it would be {limit:.0%}")
    shares = [f"{second / whole:.0%}" for second in seconds]
    print(f"the frozen model's blocks took {shares[0]} of the time, its unembedding and the heads "
          f"{shares[1]}, the optimizer {shares[2]}; peak memory {team.peak_memory():.2f} GB")


def train_heads(training, batches, folder):
    """Train to the last of --steps, with a checkpoint every few minutes -> is all done?

    Ctrl-C ends training early, not the run. SIGTERM ends it after a step and a checkpoint.
    InputError if the losses show that training diverged.
    """
    steps, metrics, smooth = training.args.steps, training.metrics, None
    progress, saved = Progress(steps, "steps", len(metrics)), time.monotonic()
    # diverged: more than twice the first loss, or twice an even guess if that is worse
    guess = math.log(training.model.config.vocab_size)
    try:
        while len(metrics) < steps:
            notice = torch.tensor([float(folder.terminated)], device=training.team.device)
            losses = training.step(batches, notice)                   # (M,)
            smooth = losses if smooth is None else 0.95 * smooth + 0.05 * losses
            first, done = torch.tensor(metrics[0]["loss_nats"]).clamp(min=guess), len(metrics)
            if not (smooth.cpu() < 2 * first).all():
                raise InputError(f"training diverged: a loss of {losses.max():.3g} nats at step "
                                 f"{done:,}; nothing is written; use a smaller --lr, or "
                                 f"float32 or bfloat16")
            progress.show(done, f"step {done:,}/{steps:,}  loss {smooth.mean():.3f} nats/token")
            if notice or done == steps or time.monotonic() - saved > CHECKPOINT:
                folder.save(training)
                saved = time.monotonic()
            if notice:
                return False
    except KeyboardInterrupt:
        if not metrics:
            raise                         # nothing was learned
        print(f"\ninterrupted after {len(metrics):,} steps: calibrating what was trained "
              "(Ctrl-C again to stop without)")
    if sum(training.seconds):
        report_pace(training)
    return True


# ---------------------------------------------------------------- calibration and test


def calibrate_heads(model, heads, ids, team):
    """Set heads.calibration: thresholds for each of LEVELS, from windows ids (n, T + 1)."""
    text = team.evaluate(model, heads, ids, {heads.measure: MEASURES[heads.measure]})
    uncertainty, calibration = text.uncertainty[heads.measure], {}                # (N, M)
    for level in LEVELS:
        pairs = zip(uncertainty.T, text.agree.T)
        calibration[level] = [calibrate(u, agree, float(level)) for u, agree in pairs]
    heads.calibration = calibration


def test_levels(heads, test):
    """What the thresholds give on an Evaluation: {level: [(agreement or NaN, coverage)] * M}."""
    uncertainty, curves = test.uncertainty[heads.measure], {}                     # (N, M)
    for level, thresholds in heads.calibration.items():
        triples = zip(uncertainty.T, test.agree.T, thresholds)
        curves[level] = [obtained(u, agree, threshold) for u, agree, threshold in triples]
    return curves


def number(x):
    """None, JSON's null, for what is not a finite number."""
    return x if math.isfinite(x) else None


def records_of(heads, test, curves):
    """The test, one record per exit for metrics.jsonl: quality, and what the levels SHOWN give."""
    records = []
    for m, layer in enumerate(heads.layers):
        levels = {}
        for level in SHOWN:
            agreement, coverage = curves[level][m]
            levels[level] = {"threshold": heads.calibration[level][m], "coverage": coverage,
                             "agreement": number(agreement)}
        records.append({
            "exit": layer, "agreement": test.agree[:, m].mean().item(),
            "accuracy": test.right[:, m].mean().item(), "kl_nats": number(test.kl[m].item()),
            "measure": heads.measure,
            "uncertainty": number(test.uncertainty[heads.measure][:, m].mean().item()),
            "cost_blocks": heads.heads[m].cost(), "levels": levels})
    return records


def describe(model, heads, test, records):
    """Print two tables: how good each exit is, and what each level gives."""
    unit = unit_of(heads.measure)
    name = f"mean {heads.measure} ({unit})" if unit else f"mean uncertainty ({heads.measure})"
    right, cost = test.right[:, -1].mean(), model.config.full_cost
    print(f"\non {len(test.agree):,} test tokens; the full model predicts the true next token on "
          f"{right:.1%}, at a cost of {cost:.1f} block-equivalents")
    print(f"exit  agrees with full  true next token  KL (nats)  {name}  head's cost (blocks)")
    for r in records:
        r = {key: math.nan if value is None else value for key, value in r.items()}
        print(f"{r['exit']:4d}  {r['agreement']:16.1%}  {r['accuracy']:15.1%}  "
              f"{r['kl_nats']:9.3f}  {r['uncertainty']:{len(name)}.3f}  {r['cost_blocks']:20.2f}")
    name = f"threshold ({unit or heads.measure})"
    print(f"\nexit  level  {name}  coverage  agreement among the tokens that exit (test)")
    for record in records:
        for level, r in record["levels"].items():
            threshold = "never" if r["threshold"] is None else f"{r['threshold']:.3f}"
            agreement = "-" if r["agreement"] is None else f"{r['agreement']:.1%}"
            print(f"{record['exit']:4d}  {level:>5}  {threshold:>{len(name)}}  "
                  f"{r['coverage']:8.1%}  {agreement}")


def own_greedy_agreement(model, heads, stream, n=64):
    """Agreement (M,) on what the model writes greedily after n pieces of 32 tokens of stream.

    The pieces are shorter where the stream or half of the context is.
    """
    length = max(2, min(160, model.config.max_position_embeddings))
    P = min(32, len(stream), length // 2)
    prefixes = windows(stream, n, P, torch.Generator().manual_seed(1))            # (n, P)
    texts = self_text(model, prefixes.to(model.embed_in.weight.device), length, (0.0,)).cpu()
    agree = evaluate(model, heads, texts, {}).agree                               # (N, M)
    agree = agree.reshape(n, length - 1, len(heads.layers))                       # (n, T, M)
    return agree[:, P - 1:].mean((0, 1))                                          # not the prefixes


def test_heads(model, heads, ids, stream, metrics, team):
    """The test on windows ids (n, T + 1) and after pieces of stream (N,), printed.

    It is appended to `metrics`. Returns what test_levels gives, for the figure.
    """
    test = team.evaluate(model, heads, ids, {heads.measure: MEASURES[heads.measure]})
    curves = test_levels(heads, test)
    records = records_of(heads, test, curves)
    describe(model, heads, test, records)
    agreement = own_greedy_agreement(model, heads, stream)
    shares = ", ".join(f"{share:.1%} at exit {n}" for n, share in zip(heads.layers, agreement))
    print("\non the model's own greedy text, which a decoder meets "
          f"(64 continuations of test prefixes): agreement {shares}")
    metrics += records
    metrics.append({"own_greedy_agreement": agreement.round(4).tolist()})
    return curves


# ---------------------------------------------------------------- the run


def settings_of(args, heads, team):
    """What a checkpoint must have in common with the run that goes on from it."""
    names = ("loss", "data", "steps", "batch", "accumulate", "positions", "length", "lr", "seed")
    return {**{name: getattr(args, name) for name in names}, "layers": heads.layers,
            "head": heads.kind, "start": str(args.start), "processes": team.size,
            "model": fingerprint(heads.backbone[0])}


def load_all(args, read_corpus):
    """The run's model, heads, texts as of load_text, and tokens per window. InputError if unfit."""
    folder = locate(args.model)
    tokenizer = Tokenizer.load(folder)
    model = Pythia.from_pretrained(folder, args.device, getattr(torch, args.dtype))
    heads = make_heads(args, model)
    length = max(1, min(args.length, model.config.max_position_embeddings - 1))
    splits, written = load_text(args, model, tokenizer, length, read_corpus)
    for ids in splits.values():
        check_numbers(model(ids[None, :length].long().to(args.device))[0].amax(-1))
    more = "" if written is None else f", {written.numel():,} written by the model"
    print(f"{heads.kind} heads at layers {listed(heads.layers)} of {len(model.layers)}: "
          f"{sum(p.numel() for p in heads.parameters()):,} parameters; "
          f"{len(splits['train']):,} training tokens of text{more}", flush=True)
    return model, heads, splits, written, length


def run_heads(args, folder, team, read_corpus, report):
    """The main job. folder, team: where it is kept, and who works (appendix/runs.py, team.py).

    read_corpus: the function that reads a user's own text; report: the one that draws report.png.
    """
    # 1. model, heads and text
    begin = time.perf_counter()
    torch.manual_seed(args.seed)
    model, heads, splits, written, length = load_all(args, read_corpus)
    training = Training(model, heads, args, team)
    # 2. training; from here on the heads are kept, whatever comes
    if args.steps:
        settings = settings_of(args, heads, team)
        folder.prepare(training, settings, args.resume)
        batches = training_batches(args, splits["train"], written, length, training.generator, team)
        with folder.listening():
            if not train_heads(training, batches, folder):
                print(f"stopped after {len(training.metrics):,} steps: --resume goes on from there")
                sys.exit(143)             # as a process that SIGTERM ends
    heads.eval()
    with torch.no_grad():
        for p in heads.parameters():
            p.copy_(p.half())             # calibrate what the file will hold: F16
    # 3. calibration and test
    metrics, curves, trouble = training.metrics, None, None
    complete = 0 < args.steps == len(metrics)
    try:
        windows_of = {split: spread_windows(splits[split], length + 1) for split in SPLITS[1:]}
        calibrate_heads(model, heads, windows_of["calibration"], team)
        curves = test_heads(model, heads, windows_of["test"], splits["test"], metrics, team)
    except (Exception, KeyboardInterrupt) as error:
        trouble = error
        if not (metrics or heads.calibration):    # nothing was learned
            raise
    # 4. the run folder
    names = folder.write(heads, metrics, curves, report)
    if complete:
        folder.forget()
    without = "" if heads.calibration else " without calibration"
    if isinstance(trouble, KeyboardInterrupt):
        print(f"\nstopped: the heads are kept{without}")
    elif trouble:
        raise InputError(f"the heads are kept in {args.out}{without}; the run ended in "
                         f"{type(trouble).__name__}: {trouble}") from trouble
    print(f"\nwrote {Path(args.out) / ', '.join(names)} "
          f"after {time.perf_counter() - begin:.0f} s")


def layer_list(text):
    try:
        return [int(n) for n in text.split(",")]
    except ValueError:
        message = f"{text!r} must be whole numbers joined by commas, e.g. 4,8,12"
        raise argparse.ArgumentTypeError(message) from None


def main():
    parser = argparse.ArgumentParser(description="Train, calibrate and test exit heads.")
    add = parser.add_argument
    add("--layers", type=layer_list, help="blocks before each exit (default: at 1/5 .. 4/5 of the "
        "depth, as in the paper; of the toy at the quarters: 4,8,12)")
    add("--head", choices=KINDS, help="kind of head (default: linear)")
    add("--start", default="lens", help="lens (default): the model's own norm and unembedding; "
        "random; or a heads file: its kind and layers stay, and --steps 0 only calibrates it anew")
    add("--loss", choices=LOSSES, default="kl", help="kl (default), topk (32), hard (argmax)")
    add("--measure", choices=MEASURES, help="uncertainty (default: entropy, or the heads file's)")
    add("--data", default="stdlib", help="stdlib (default), a text or .jsonl file, a folder of "
        "them, or minipile; self: text that the model writes; X+self: both")
    add("--steps", type=int, default=100, help="training steps")
    add("--batch", type=int, default=8, help="windows at a time")
    add("--accumulate", type=int, default=1, help="batches per step, their gradients added up")
    add("--positions", type=float, default=1.0,
        help="share of the positions that the loss is taken at, at random (default: all)")
    add("--length", type=int, default=512, help="tokens per window")
    add("--lr", type=float, default=2e-3, help="AdamW's peak learning rate; Muon's is ten times it")
    add("--model", default=TOY, help="folder or official name (default: the toy)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"),
        help="of the backbone (default: float32, on cuda bfloat16)")
    add("--seed", type=seed_number, default=0)
    add("--out", default="run", help="folder for the results, and for a checkpoint meanwhile")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    add("--dry-run", action="store_true",
        help="only print what the run needs: heads, memory, time; loads and writes nothing")
    args = parser.parse_args()
    fewest = 1 if args.start in ("lens", "random") else 0
    if args.steps < fewest or min(args.batch, args.accumulate, args.length) < 1:
        raise InputError("--steps, --batch, --accumulate and --length must be positive "
                         "(--steps may be 0 with --start FILE)")
    if not 0 < args.lr < math.inf or not 0 < args.positions <= 1:
        raise InputError("--lr must be positive, and --positions above 0 and at most 1")
    if args.device != "cpu" and not torch.cuda.is_available():
        raise InputError(f"--device {args.device}: no such device here; use cpu")
    from appendix.corpus import read_corpus
    from appendix.figures import report
    from appendix.runs import RunFolder
    from appendix.team import Team
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    with Team(args.device) as team:
        args.device = team.device
        if args.dry_run:
            from appendix.plan import plan
            return plan(args, team)
        with RunFolder(args.out, team.rank) as folder:
            run_heads(args, folder, team, read_corpus, report)


if __name__ == "__main__":
    command_line(main)
