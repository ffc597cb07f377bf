"""Chapter 6. The main job: train, calibrate and test exit heads on a frozen Pythia (arXiv 2407.21082).

    python train.py --layers 4,8,12                  the toy, standard-library source, about two minutes
    python train.py --layers 1,2,4 --head block --data stdlib+self --steps 2000 --batch 16 --length 256   the fast heads, 43 minutes
    python train.py --model pythia-70m --data my.txt --out run70
    python train.py --backbone --out mytoy           how the toy itself was made, about an hour

What happens: (1) random windows of text pass through the frozen model once; every head learns from the
residual stream at its depth to give the full model's distribution; (2) on the calibration split, each head
gets its largest-coverage threshold on the entropy for every level of agreement; (3) the test split shows
what that is worth on new text. The run folder then holds heads.safetensors, metrics.jsonl and report.png.

Expect on the toy: deeper exits agree more, and the coverage at a level grows with depth.
A layer number n means n blocks executed: --layers 4,8,12 puts heads after the 4th, 8th and 12th block.
"""
import argparse
import heapq
import json
import math
import os
import re
import shutil
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from confidence import calibrate, entropy, is_certain
from heads import (KINDS, ExitHeads, check_layers, distill_loss, full_cost, hard, kl, self_text, split_of,
                   stdlib_documents, tokens_of, topk_kl)
from model import TOY, InputError, Pythia, PythiaConfig, Tokenizer, byte_letters, command_line, locate, official_name, written_whole

LEVELS = [round(0.50 + 0.01 * i, 2) for i in range(50)]                   # 0.50 .. 0.99, kept in the heads file
SHOWN = (0.80, 0.90, 0.95, 0.98)
SPLITS = ("train", "calibration", "test")
LOSSES = {"kl": kl, "topk": topk_kl, "hard": hard}


# ---------------------------------------------------------------- text


def read_documents(data):
    """`stdlib`, a text file, or a folder of them -> [(name, text)]. InputError when there is nothing to read."""
    if data == "stdlib":
        return stdlib_documents()
    root = Path(data)
    if not root.exists():
        raise InputError(f"--data {data}: no such file or folder (or use stdlib, self, stdlib+self)")
    documents = []
    for path in [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file()):
        try:
            documents.append((str(path.relative_to(root)), path.read_bytes().decode("utf-8")))
        except UnicodeDecodeError:
            if root.is_file():
                raise InputError(f"--data {data} is not UTF-8 text") from None
    return documents


def load_splits(data, tokenizer, length):
    """{split: ids (N,)}: documents split by a hash of their names, or one stream cut 80 : 10 : 10 if they are few.

    Raises InputError unless every split holds at least one window of `length` + 1 tokens.
    """
    documents = [d for d in read_documents(data) if d[1].strip()]
    if len(documents) >= 30:
        streams = {s: tokens_of([d for d in documents if split_of(d[0]) == s], tokenizer) for s in SPLITS}
    else:
        stream = tokens_of(documents, tokenizer)
        a, b = int(0.8 * len(stream)), int(0.9 * len(stream))
        streams = dict(zip(SPLITS, (stream[:a], stream[a:b], stream[b:])))
    for split, stream in streams.items():
        if len(stream) <= length:
            raise InputError(f"--data {data}: its {split} split has {len(stream)} tokens, fewer than one window of "
                             f"{length + 1}; give more text")
    return streams


def written_splits(model, data, splits, end, length, tokens, seed):
    """Text that the model writes itself, half greedy, half sampled at temperature 0.8: {split: ids (n, length)}.

    `self` starts from <|endoftext|> and fully sampled text, with no corpus; `stdlib+self` continues 32 tokens
    of the corpus, which is how a decoder is used.
    """
    out, generator = {}, torch.Generator().manual_seed(seed)
    device = model.embed_in.weight.device
    for i, split in enumerate(SPLITS):
        n = max(8, (tokens if split == "train" else min(tokens, 65536)) // length)
        rows, progress = [], Progress(n * length)
        for j in range(0, n, 128):
            B = min(128, n - j)
            if data == "self":
                prefix, temperatures = torch.full((B, 1), end), (0.0, 0.8, 1.0, 1.0)
                prefix = self_text(model, prefix.to(device), 8, (1.0,), seed=1000 * i + j)   # else all greedy rows are one
            else:
                prefix, temperatures = windows(splits[split], B, 32, generator), (0.0, 0.8)
            rows.append(self_text(model, prefix.to(device), length, temperatures, seed=1000 * i + j + 1).cpu())
            progress.show(min(n, j + 128) * length, f"the model writes its {split} text")
        out[split] = torch.cat(rows)
    return out


def windows(stream, batch, length, generator):
    """A batch of random windows of the stream, (batch, length)."""
    starts = torch.randint(len(stream) - length + 1, (batch,), generator=generator)
    return stream[starts[:, None] + torch.arange(length)]


class Progress:
    """One updating line with rate and time left; plain lines, now and then, when stdout is no terminal."""

    def __init__(self, total, unit="tokens"):
        self.total, self.unit = total, unit
        self.begin = self.shown = time.perf_counter()

    def show(self, done, text):
        now, tty = time.perf_counter(), sys.stdout.isatty()
        if now - self.shown < (0.2 if tty else 10) and done < self.total:
            return
        self.shown = now
        rate = done / (now - self.begin)
        line = f"{text}  {rate:,.{0 if rate > 100 else 2}f} {self.unit}/s  {(self.total - done) / rate:.0f} s left"
        print(f"\r\033[K{line}" if tty else line, end="" if tty and done < self.total else "\n", flush=True)


# ---------------------------------------------------------------- the optimiser of blocks

KINDS_OF_MATRIX = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")


def orthogonalize(g):
    """Nearest semi-orthogonal matrices to a stack g (n, rows, columns): Muon's five Newton-Schulz steps."""
    tall = g.shape[1] > g.shape[2]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class Muon:
    """Momentum whose step is orthogonalised (Jordan 2024), for the blocks' matrices, one stack per kind.

    AdamW trains all other parameters. At the toy's budget of tokens the backbone reaches a lower loss than by AdamW alone,
    and block heads learn far sooner (in a trial at exit 1, after 500 steps: 85% agreement on the model's own text, AdamW 64%).
    """

    def __init__(self, blocks):
        self.stacks = [[block.get_submodule(kind).weight for block in blocks] for kind in KINDS_OF_MATRIX] if blocks else []
        self.momentum = [torch.zeros_like(torch.stack(s)) for s in self.stacks]

    def others(self, module):
        """The module's parameters that are left to another optimiser."""
        mine = {id(p) for stack in self.stacks for p in stack}
        return [p for p in module.parameters() if id(p) not in mine]

    @torch.no_grad()
    def step(self, lr):
        for stack, m in zip(self.stacks, self.momentum):
            g = torch.stack([p.grad for p in stack])                      # (L, rows, columns)
            m.lerp_(g, 0.05)
            rows, columns = g.shape[1:]
            update = orthogonalize(g.lerp(m, 0.95)) * max(1, rows / columns) ** 0.5
            for p, u in zip(stack, update):
                p.mul_(1 - 0.01 * lr).sub_(u, alpha=lr)


# ---------------------------------------------------------------- the heads


@torch.inference_mode()
def evaluate(model, heads, ids, batch=8):
    """Every head against the full model on windows ids (n, length + 1), the last column only a target.

    Returns arrays over the N = n * length tokens: entropy (N, M) in nats, agree (N, M) with the full model's
    argmax, right (N, M) on the true next token, and full_right (N,), plus the mean KL (M,) in nats.
    """
    collected, divergence = [], torch.zeros(len(heads.layers))
    for rows in ids.split(batch):
        rows = rows.to(model.embed_in.weight.device)
        full, hidden = model(rows[:, :-1], exits=heads.layers)                # (B, T, V), [(B, T, D)]
        choice, truth = full.argmax(-1), rows[:, 1:]                      # (B, T)
        columns = [choice == truth]
        for m, logits in enumerate(heads.logits(hidden)):
            divergence[m] += kl(full.flatten(0, 1).float(), logits.flatten(0, 1).float()).cpu()
            guess = logits.argmax(-1)
            columns += [entropy(logits), guess == choice, guess == truth]
        collected.append(torch.stack([c.flatten().float().cpu() for c in columns], 1))   # (N, 1 + 3M)
    table = torch.cat(collected)
    return {"entropy": table[:, 1::3], "agree": table[:, 2::3].bool(), "right": table[:, 3::3].bool(),
            "full_right": table[:, 0].bool(), "kl": divergence / len(table)}


def teacher_and_heads(model, heads, ids, loss):
    """One batch: frozen forward pass, then the heads' losses and gradients. Returns losses (M,) and the seconds of each."""
    begin = time.perf_counter()
    with torch.no_grad():
        *hidden, last = model.hidden_states(ids, (*heads.layers, model.config.num_hidden_layers))
    middle = time.perf_counter()
    losses = distill_loss(heads, hidden, last, loss)
    return losses, middle - begin, time.perf_counter() - middle


def train_heads(model, heads, batches, steps, lr, loss, metrics):
    """AdamW, and Muon for the matrices of block heads' blocks, with warm-up and cosine decay to 0.

    Ctrl-C ends training early, not the run.
    """
    muon = Muon([head.block for head in heads.heads] if heads.kind == "block" else [])
    optimizer = torch.optim.AdamW(muon.others(heads), lr=lr, weight_decay=0.0)
    smooth, spent, progress, step = None, [0.0, 0.0], Progress(steps, "steps"), 0
    try:
        for step in range(1, steps + 1):
            scale = min(1, step / 20) * (0.5 + 0.5 * math.cos(math.pi * (step - 1) / steps))
            optimizer.param_groups[0]["lr"] = lr * scale
            losses, teacher, students = teacher_and_heads(model, heads, next(batches), loss)
            optimizer.step()
            muon.step(10 * lr * scale)
            heads.zero_grad()
            spent = [spent[0] + teacher, spent[1] + students]
            smooth = losses if smooth is None else 0.95 * smooth + 0.05 * losses
            metrics.append({"step": step, "loss_nats": [round(x, 5) for x in losses.tolist()]})
            progress.show(step, f"step {step:,}/{steps:,}  loss {smooth.mean():.3f} nats/token")
    except KeyboardInterrupt:
        print(f"\ninterrupted after {step - 1:,} steps: calibrating what was trained (Ctrl-C again to stop without)")
    print(f"the frozen model's blocks took {spent[0] / max(sum(spent), 1e-9):.0%} of the training time, "
          f"its unembedding and the heads {spent[1] / max(sum(spent), 1e-9):.0%}")


def describe(heads, model, found, test):
    """Print the table and return it as records: per exit, quality, and threshold and coverage per level."""
    print(f"\non {len(test['entropy']):,} test tokens; the full model predicts the true next token on "
          f"{test['full_right'].float().mean():.1%}, at a cost of {full_cost(model):.1f} block-equivalents")
    print("exit  agrees with full  true next token  KL (nats)  mean entropy (nats)  head's cost (blocks)")
    records = []
    for m, (layer, head) in enumerate(zip(heads.layers, heads.heads)):
        record = {"exit": layer, "agreement": test["agree"][:, m].float().mean().item(),
                  "accuracy": test["right"][:, m].float().mean().item(), "kl_nats": test["kl"][m].item(),
                  "entropy_nats": test["entropy"][:, m].mean().item(), "cost_blocks": head.cost(), "levels": {}}
        print(f"{layer:4d}  {record['agreement']:16.1%}  {record['accuracy']:15.1%}  {record['kl_nats']:9.3f}  "
              f"{record['entropy_nats']:19.3f}  {record['cost_blocks']:20.2f}")
        for level in SHOWN:
            threshold = found[f"{level:.2f}"][m]
            exits = is_certain(test["entropy"][:, m], threshold)
            agreed = test["agree"][:, m][exits].float().mean().item() if exits.any() else None
            record["levels"][f"{level:.2f}"] = {"threshold_nats": threshold, "coverage": exits.float().mean().item(),
                                                "agreement": agreed}
        records.append(record)
    print("\nexit  level  threshold (nats)  coverage  agreement among the tokens that exit (test)")
    for record in records:
        for level, r in record["levels"].items():
            never = "   never" if r["threshold_nats"] is None else f"{r['threshold_nats']:8.3f}"
            print(f"{record['exit']:4d}  {level:>5}  {never:>16}  {r['coverage']:8.1%}  "
                  + (f"{r['agreement']:.1%}" if r["agreement"] is not None else "-"))
    return records


def report(path, heads, metrics, found, test):
    """report.png: the losses, coverage against level, and agreement obtained against the level asked for."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (a, b, c) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    losses = torch.tensor([m["loss_nats"] for m in metrics if "step" in m])   # (steps, M)
    for m, layer in enumerate(heads.layers):
        if len(losses):
            a.plot(losses[:, m], lw=0.8, label=f"exit {layer}")
        exits = [is_certain(test["entropy"][:, m], found[f"{level:.2f}"][m]) for level in LEVELS]
        b.plot(LEVELS, [e.float().mean() for e in exits], label=f"exit {layer}")
        c.plot(LEVELS, [test["agree"][:, m][e].float().mean() if e.any() else math.nan for e in exits])
    c.plot(LEVELS, LEVELS, "k:", lw=1)
    a.set(title="training", xlabel="step", ylabel="loss (nats per token)")
    b.set(title="tokens that exit (test)", xlabel="level asked for", ylabel="coverage", ylim=(0, 1))
    c.set(title="agreement obtained (test)", xlabel="level asked for", ylabel="agreement with the full model")
    a.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_run(out, heads, metrics, found, test):
    """Make the run's files in a folder beside `out`, then move each into place: a killed run leaves old files whole."""
    out = Path(out).resolve()
    fresh = out.with_name(out.name + ".tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    heads.save(fresh / "heads.safetensors")
    (fresh / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics), "utf-8")
    if test:
        report(fresh / "report.png", heads, metrics, found, test)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.png").unlink(missing_ok=True)                          # none of an earlier run beside these heads
    for file in sorted(fresh.iterdir(), reverse=True):                    # the heads last
        os.replace(file, out / file.name)
    fresh.rmdir()


def check_out(out):
    """Fail before the work, not after it: `out` must be a folder, or be able to become one."""
    out = Path(out).resolve()
    parent = next(p for p in (out, *out.parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"--out {out}: {parent} is not a folder that can be written to")


def run_heads(args):
    """The main job with the command line's options."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    if args.device != "cpu" and not torch.cuda.is_available():
        raise InputError(f"--device {args.device}: no such device here; use cpu")
    folder = locate(args.model)
    tokenizer = Tokenizer.load(folder)
    model = Pythia.from_pretrained(folder, args.device, getattr(torch, args.dtype))
    L = model.config.num_hidden_layers
    layers = args.layers if args.layers is not None else sorted({max(1, L * i // 4) for i in (1, 2, 3)})
    check_layers(layers, L)
    length = min(args.length, model.config.max_position_embeddings - 1)
    corpus = args.data.removesuffix("+self")
    splits = {} if args.data == "self" else load_splits(corpus, tokenizer, length)
    written = {}
    if args.data == "self" or args.data.endswith("+self"):
        tokens = max(args.steps * args.batch * length // 4, 8 * length)
        written = written_splits(model, args.data, splits, tokenizer.end, length + 1, tokens, args.seed)
        splits = splits or {s: ids.flatten() for s, ids in written.items()}

    heads = ExitHeads(model, layers, args.head, args.start)
    heads.float().train()
    print(f"{args.head} heads at layers {', '.join(map(str, layers))} of {L}: "
          f"{sum(p.numel() for p in heads.parameters()):,} parameters; {len(splits['train']):,} training tokens of text"
          + (f", {written['train'].numel():,} written by the model" if written else ""), flush=True)

    def batches():
        while True:
            own = max(1, args.batch * 2 // 3) if args.data.endswith("+self") else args.batch if written else 0
            rows = [windows(splits["train"], args.batch - own, length, generator)] if own < args.batch else []
            if own:
                pick = torch.randint(len(written["train"]), (own,), generator=generator)
                rows.append(written["train"][pick, :length])
            yield torch.cat(rows).to(args.device)

    metrics, test, found = [], None, {}
    begin = time.perf_counter()
    train_heads(model, heads, batches(), args.steps, args.lr, LOSSES[args.loss], metrics)
    heads.eval()
    with torch.no_grad():
        for p in heads.parameters():                                      # calibrate what the file will hold: F16
            p.copy_(p.half())
    try:
        cut = {s: splits[s][:len(splits[s]) // (length + 1) * (length + 1)].view(-1, length + 1)
               for s in ("calibration", "test")}
        some = {s: w[::max(1, w.numel() // 65536)] for s, w in cut.items()}   # about 65,000 tokens, spread out
        calibration = evaluate(model, heads, some["calibration"])
        found = {f"{level:.2f}": [calibrate(calibration["entropy"][:, m], calibration["agree"][:, m], level)
                                  for m in range(len(layers))] for level in LEVELS}
        heads.calibration = found
        test = evaluate(model, heads, some["test"])
        metrics += describe(heads, model, found, test)
        prefixes = windows(splits["test"], 64, 32, torch.Generator().manual_seed(1)).to(args.device)
        own = self_text(model, prefixes, min(160, model.config.max_position_embeddings), (0.0,)).cpu()
        agree = evaluate(model, heads, own)["agree"].view(64, -1, len(layers))[:, 31:].float().mean((0, 1))   # not the prefixes
        print("\non the model's own greedy text, which a decoder meets (64 continuations of test prefixes): agreement "
              + ", ".join(f"{a:.1%} at exit {n}" for n, a in zip(layers, agree)))
        metrics.append({"own_greedy_agreement": [round(a, 4) for a in agree.tolist()]})
    except KeyboardInterrupt:
        print("\nstopped: the heads are kept" + ("" if heads.calibration else " without calibration"))
    write_run(args.out, heads, metrics, found, test)
    print(f"\nwrote {Path(args.out) / 'heads.safetensors'}, metrics.jsonl{' and report.png' if test else ''} after "
          f"{time.perf_counter() - begin:.0f} s")


# ---------------------------------------------------------------- the backbone


def train_bpe(texts, size):
    """Byte-level BPE learned from texts: the spec of a tokenizer.json laid out like the official one.

    Ids: <|endoftext|>, <|padding|>, the 243 bytes that occur in UTF-8, the merges in the order they were
    learned, and runs of 24 .. 2 spaces. Each step merges the most frequent pair (Sennrich et al. 2016);
    ties go to the smaller pair. Pairs live in a heap with stale entries skipped, so a step is cheap.
    """
    letters = byte_letters()
    words = Counter()
    pattern = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")   # ~ model.WORDS
    for text in texts:
        for part in re.split(" {2,24}", text):                            # runs of spaces are tokens of their own
            words.update(pattern.findall(part))
    vocab = [letters[b] for b in range(256) if b not in (0xC0, 0xC1) and b < 0xF5]
    merges, runs = [], [" " * n for n in range(24, 1, -1)]
    corpus = [([letters[b] for b in word.encode()], n) for word, n in words.items()]
    count, where = Counter(), defaultdict(set)                            # of each pair: occurrences, words
    for w, (pieces, n) in enumerate(corpus):
        for pair in zip(pieces, pieces[1:]):
            count[pair] += n
            where[pair].add(w)
    heap = [(-n, pair) for pair, n in count.items()]
    heapq.heapify(heap)
    while len(vocab) < size - 2 - len(runs):
        if not heap:
            raise InputError(f"the corpus is too small for a vocabulary of {size} entries")
        n, pair = heapq.heappop(heap)
        if -n != count[pair] or not n:
            continue
        vocab.append("".join(pair))
        merges.append(" ".join(pair))
        changed = set()
        for w in where.pop(pair):
            pieces, n = corpus[w]
            for old in zip(pieces, pieces[1:]):
                count[old] -= n
                changed.add(old)
            i = 0
            while i < len(pieces) - 1:
                if (pieces[i], pieces[i + 1]) == pair:
                    pieces[i:i + 2] = [pieces[i] + pieces[i + 1]]
                i += 1
            for new in zip(pieces, pieces[1:]):
                count[new] += n
                where[new].add(w)
                changed.add(new)
        for c in changed:
            heapq.heappush(heap, (-count[c], c))
    special = [{"id": i, "content": c, "normalized": False, "special": True}
               for i, c in enumerate(("<|endoftext|>", "<|padding|>"))]
    spaces = [{"id": len(vocab) + 2 + i, "content": c, "normalized": True, "special": False}
              for i, c in enumerate(runs)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokens = [t["content"] for t in special] + vocab
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{**t, **flags} for t in special + spaces],
            "normalizer": {"type": "NFC"}, "pre_tokenizer": byte_level, "post_processor": byte_level,
            "decoder": byte_level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False,
                      "vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges}}


@torch.no_grad()
def language_score(model, stream, length=512, batch=16):
    """Held-out loss in nats per token and next-token accuracy over the whole stream, in windows of length."""
    n = (len(stream) - 1) // length * length
    x, y = stream[:n].view(-1, length), stream[1:n + 1].view(-1, length)
    loss = right = 0.0
    for i in range(0, len(x), batch):
        logits, _ = model(x[i:i + batch])                                 # (B, T, V)
        target = y[i:i + batch]
        loss += F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum").item()
        right += (logits.argmax(-1) == target).sum().item()
    return loss / n, right / n


def train_backbone(out, tokens, seed, compiled):
    """Train the toy: BPE, then a 16 x 128 GPT-NeoX on the standard library, into the folder `out`."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    own = stdlib_documents()
    names = {name for name, _ in own}
    tests = [d for d in stdlib_documents(tests=True) if d[0] not in names]
    own_train = [d for d in own if split_of(d[0]) == "train"]
    spec = train_bpe([text for _, text in own_train], 2048)
    tokenizer = Tokenizer(spec)
    # the library twice, its tests (where installed) once: what is held out comes from the library
    stream = tokens_of(own_train * 2 + [d for d in tests if split_of(d[0]) == "train"], tokenizer)
    held_out = [d for d in own if split_of(d[0]) == "test"]
    held_out_bytes = sum(len(text.encode()) for _, text in held_out)
    held_out = tokens_of(held_out, tokenizer)
    config = PythiaConfig(vocab_size=2048, hidden_size=128, intermediate_size=512, num_hidden_layers=16,
                          num_attention_heads=4, max_position_embeddings=2048)
    model = Pythia(config)
    for name, p in model.named_parameters():                              # GPT-NeoX: small init, outputs scaled by depth
        if p.dim() == 2:
            std = 2 / 16 / 128 ** 0.5 if name.endswith(("dense.weight", "4h_to_h.weight")) else (2 / 5 / 128) ** 0.5
            torch.nn.init.normal_(p, std=std)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(p)
    muon = Muon(model.layers)
    adam = torch.optim.AdamW(muon.others(model), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)
    forward = torch.compile(model.forward) if compiled else model.forward
    batch_tokens, done = 4096, 0
    steps = tokens // batch_tokens
    print(f"backbone: {sum(p.numel() for p in model.parameters()):,} parameters, {len(stream):,} tokens of text, "
          f"{steps:,} steps of {batch_tokens:,} tokens", flush=True)
    progress, begin, smooth = Progress(steps * batch_tokens), time.perf_counter(), None
    try:
        for step in range(steps):
            length = 256 if step < 0.8 * steps else 512                   # short first: attention is dear on a CPU
            ids = windows(stream, batch_tokens // length, length + 1, generator)
            scale = min(1, (step + 1) / 100, (steps - step) / (0.5 * steps))   # warm-up, flat, linear to 0
            logits, _ = forward(ids[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            adam.param_groups[0]["lr"] = 3e-3 * scale
            adam.step()
            muon.step(0.02 * scale)
            model.zero_grad()
            done = step + 1
            smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
            progress.show(done * batch_tokens, f"step {done:,}/{steps:,}  loss {smooth:.3f} nats/token")
            if done % 250 == 0:
                save_model(out, model, spec)
    except KeyboardInterrupt:
        print(f"\ninterrupted after step {done:,}; the backbone trained so far goes to {out}")
    minutes = (time.perf_counter() - begin) / 60
    save_model(out, model, spec)
    loss, accuracy = language_score(Pythia.from_pretrained(out), held_out)   # as written, in F16
    bits = loss / math.log(2) * len(held_out) / held_out_bytes
    print(f"{done * batch_tokens:,} tokens in {minutes:.0f} minutes; held out: {loss:.4f} nats per token, "
          f"{bits:.3f} bits per byte, next-token accuracy {accuracy:.1%}")


def save_model(folder, model, tokenizer_spec):
    """Write config.json, tokenizer.json and model.safetensors (F16, official names) into folder, each atomically."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    texts = {"config.json": json.dumps({**model.config.to_dict(), "torch_dtype": "float16"}, indent=2) + "\n",
             "tokenizer.json": json.dumps(tokenizer_spec, ensure_ascii=False, indent=0)}
    for name, text in texts.items():
        with written_whole(Path(folder) / name) as temporary:
            temporary.write_text(text, "utf-8")
    tensors = {official_name(name): p.detach().half().contiguous() for name, p in model.named_parameters()}
    with written_whole(Path(folder) / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def layer_list(text):
    try:
        return [int(n) for n in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers joined by commas, e.g. 4,8,12") from None


def main():
    parser = argparse.ArgumentParser(description="Train, calibrate and test exit heads on a frozen model.")
    parser.add_argument("--layers", type=layer_list, help="blocks executed before each exit (default: quarter points)")
    parser.add_argument("--head", choices=KINDS, default="linear", help="kind of head (default: linear)")
    parser.add_argument("--start", choices=("lens", "random"), default="lens",
                        help="start from the model's own final norm and unembedding, or at random")
    parser.add_argument("--loss", choices=LOSSES, default="kl", help="kl (default), topk (32), hard (argmax labels)")
    parser.add_argument("--data", default="stdlib", help="stdlib, a text file, or a folder of them; self: text the model writes; X+self: both")
    parser.add_argument("--steps", type=int, default=100, help="training steps")
    parser.add_argument("--batch", type=int, default=8, help="windows per step")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate of AdamW; Muon's, for the matrices of block heads, is ten times that")
    parser.add_argument("--model", default=TOY, help="folder or official name (default: the toy)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the backbone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="run", help="folder for the results")
    parser.add_argument("--backbone", action="store_true", help="train the toy itself instead of heads")
    parser.add_argument("--tokens", type=int, default=9_830_400, help="with --backbone: tokens to train on")
    parser.add_argument("--compile", action="store_true", help="with --backbone: torch.compile (needs a C++ compiler)")
    args = parser.parse_args()
    if min(args.steps, args.batch, args.length, args.tokens) < 1 or not 0 < args.lr < float("inf"):
        raise InputError("--steps, --batch, --length, --tokens and --lr must be positive")
    check_out(args.out)
    if args.backbone:
        if args.tokens < 4096:
            raise InputError("--tokens must be at least 4,096: one step of the backbone's training")
        train_backbone(args.out, args.tokens, args.seed, args.compile)
    else:
        run_heads(args)


if __name__ == "__main__":
    command_line(main)
