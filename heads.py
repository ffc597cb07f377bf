"""Chapter 2. Exit heads that learn without labels (arXiv 2407.21082).

A frozen model predicts at its last depth L. An exit head at depth n < L reads the residual stream h
after n blocks and guesses what the full model would say:

    z_head = W norm(h)                                  norm: LayerNorm, W: D -> V without bias
    loss   = KL( softmax(z_full) || softmax(z_head) )   mean over positions

No labels are needed, any text will do: this is what "self-supervised" means. The model can even
write the text itself (`self_text`). Only the heads learn. The backbone is never touched.

The paper's head is `ExitHead` (kind "linear"). The other kinds are ours, each a small change:

    mlp       x = norm(h), then x + U GELU(A x), then W
    tied      norm(h), then the backbone's own unembedding: LayerSkip's exit, only the norm learns
    lowrank   x = norm(h), then x + U A x with a narrow middle, then the backbone's unembedding
    block     h + S h' with h' the position before, then a block of its own, then norm and W

All kinds start from the backbone's own final norm and unembedding, the "logit lens", unless told
otherwise. The token shift S is what lets one block copy. To continue a text as it went on the last
time ("induction"), the key of a position must tell which token stood before it (Olsson et al. 2022,
smeared keys).

    python heads.py                      a table: how often each head agrees, and at what cost
    python heads.py --figure lens.png    also the top prediction at every depth for one line of code
    python heads.py --model pythia-70m --heads run70/heads.safetensors --data my.txt
                                         another model; all chapters that measure take these

Letters: B batch, T positions, N tokens, D hidden size, V vocabulary, L blocks, M exits.
A layer n always means "after n blocks".
"""
import argparse
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from model import (TOY, Block, InputError, KVCache, Pythia, Tokenizer, check_form, check_numbers,
                   command_line, locate, written_whole)

PAPER, FAST = "heads.safetensors", "heads-fast.safetensors"    # the files in a model's folder
CHUNK = 1024                                                   # positions of the loss at a time

# ---------------------------------------------------------------- the paper's head, and four more


class ExitHead(nn.Module):
    """The paper's head (kind "linear"): residual stream (B, T, D) -> logits (B, T, V).

    `body` gives what the final matrix reads, (B, T, D). `output` applies the matrix. They are two
    methods so that the loss can apply the matrix to a few positions at a time.
    """
    owns_matrix = True                    # False: the backbone's unembedding serves

    def __init__(self, model, layer, start="lens"):
        super().__init__()
        D, V = model.config.hidden_size, model.config.vocab_size
        self.backbone = (model,)          # in a tuple: read here, not owned
        self.norm = nn.LayerNorm(D, eps=model.config.layer_norm_eps)
        if self.owns_matrix:
            self.out = nn.Linear(D, V, bias=False)
        if start == "lens":
            self.norm.load_state_dict(model.final_layer_norm.state_dict())
            if self.owns_matrix:
                self.out.load_state_dict(model.embed_out.state_dict())

    def body(self, h, cache=None):
        return self.norm(self.own_type(h))                                # (B, T, D)

    def output(self, x):
        matrix = self.out if self.owns_matrix else self.backbone[0].embed_out
        return matrix(x.to(matrix.weight.dtype))                          # (B, T, V)

    def forward(self, h, cache=None):
        return self.output(self.body(h, cache))

    def own_type(self, h):
        """Heads may learn in float32 on a bfloat16 backbone."""
        return h.to(self.norm.weight.dtype)

    def new_cache(self, batch=1, max_len=None):
        """What the head remembers between calls. None: it looks at one position only."""
        return None

    def cost(self):
        """Multiply-adds per token in block-equivalents: its matrices over those of one block."""
        config = self.backbone[0].config
        weights = sum(p.numel() for p in self.parameters() if p.dim() == 2)
        if not self.owns_matrix:
            weights += config.hidden_size * config.vocab_size
        return weights / config.block_weights


class TiedHead(ExitHead):
    """LayerSkip's exit: the backbone's own unembedding, behind a norm that learns."""
    owns_matrix = False


class MLPHead(ExitHead):
    """x + U GELU(A x) between norm and matrix. U starts at 0: the logit lens."""

    def __init__(self, model, layer, start="lens"):
        super().__init__(model, layer, start)
        D = model.config.hidden_size
        self.down, self.up = nn.Linear(D, D), nn.Linear(D, D, bias=False)
        nn.init.zeros_(self.up.weight)

    def body(self, h, cache=None):
        x = super().body(h)
        return x + self.up(F.gelu(self.down(x)))


class LowRankHead(ExitHead):
    """x + U A x, the middle an eighth as wide, then the backbone's unembedding."""
    owns_matrix = False

    def __init__(self, model, layer, start="lens"):
        super().__init__(model, layer, start)
        D = model.config.hidden_size
        self.down, self.up = nn.Linear(D, D // 8, bias=False), nn.Linear(D // 8, D, bias=False)
        nn.init.zeros_(self.up.weight)

    def body(self, h, cache=None):
        x = super().body(h)
        return x + self.up(self.down(x))


class BlockCache(KVCache):
    """What a block head remembers: keys and values, and after a zero the states it has read."""

    def __init__(self, config, batch, max_len, device, dtype):
        super().__init__(config, batch, max_len, device, dtype, blocks=1)
        self.seen = torch.zeros(batch, 1 + max_len, config.hidden_size, device=device, dtype=dtype)

    def push(self, h):
        """Keep the states h (B, T, D). Return those of the positions before them (B, T, D)."""
        n, T = self.length[0], h.shape[1]
        self.check_room(n + T)
        self.seen[:, n + 1:n + 1 + T] = h
        return self.seen[:, n:n + T]

    def pick(self, entries):
        super().pick(entries)
        self.seen = self.seen[entries]


class BlockHead(ExitHead):
    """h + S h', a block of its own, norm, W. Starts as S = 0 and the backbone's next block."""

    def __init__(self, model, layer, start="lens"):
        super().__init__(model, layer, start)
        D = model.config.hidden_size
        self.shift = nn.Linear(D, D, bias=False)
        self.block = Block(model.config)
        nn.init.zeros_(self.shift.weight)
        if start == "lens":
            self.block.load_state_dict(model.layers[layer].state_dict())

    def body(self, h, cache=None):
        model, h = self.backbone[0], self.own_type(h)
        T, offset = h.shape[1], 0
        if cache is None:
            before = F.pad(h, (0, 0, 1, -1))                              # (B, T, D), 0 at first
        else:
            offset = cache.length[0]
            before = cache.push(h)                                        # (B, T, D)
        h = h + self.shift(before)
        h = self.block(h, model.angles(offset, T, h), model.mask(offset, T, h), cache)
        return super().body(h)

    def new_cache(self, batch=1, max_len=None):
        config, w = self.backbone[0].config, self.norm.weight
        length = max_len or config.max_position_embeddings
        return BlockCache(config, batch, length, w.device, w.dtype)


KINDS = {"linear": ExitHead, "mlp": MLPHead, "tied": TiedHead, "lowrank": LowRankHead,
         "block": BlockHead}
# the keys of confidence.MEASURES, which this chapter does not import
MEASURE_NAMES = ("entropy", "max_probability", "margin", "logit_gap", "max_logit", "topk_entropy")


# ---------------------------------------------------------------- the heads of one backbone


def check_layers(layers, depth):
    """Raise InputError unless layers are increasing whole numbers in 1 .. depth - 1."""
    inside = layers and all(type(n) is int and 1 <= n < depth for n in layers)
    if not inside or any(a >= b for a, b in zip(layers, layers[1:])):
        raise InputError(f"layers {layers} must be increasing whole numbers between 1 and "
                         f"{depth - 1}: blocks executed before the exit, of {depth} in this model")


def check_info(info, path):
    """What a heads file says of itself. Raises InputError unless it is complete and well formed."""
    types = {"kind": str, "layers": list, "calibration": dict, "backbone": str}
    if not isinstance(info, dict) or not all(isinstance(info.get(n), t) for n, t in types.items()):
        raise InputError(f"{path} holds no exit heads (in its metadata 'nanoexit'); "
                         f"train heads with train.py")
    info = {"measure": "entropy", **info}                                 # older files mean entropy
    check_form(info, {"kind": tuple(KINDS), "measure": MEASURE_NAMES}, path)
    for level, row in info["calibration"].items():
        if not isinstance(row, list) or len(row) != len(info["layers"]):
            raise InputError(f"{path}: calibration {level!r:.80} is no threshold per exit")
        known = {f"threshold {m}": t for m, t in enumerate(row) if t is not None}
        check_form(known, dict.fromkeys(known, [-1e300, 1e300]), f"{path}, level {level!r:.80}")
    return info


def fingerprint(model):
    """A short name of a backbone: a hash of its shape and of 256 values of every tensor.

    Values count, not spellings: 10000 is 10000.0, and F16 weights, as the official ones are, may be
    read in 16 or 32 bits. The step is odd, so that the values stand in all columns.
    """
    shape = [float(value) for value in asdict(model.config).values()]
    some = [p.detach().flatten()[::p.numel() // 256 | 1].bfloat16() for p in model.parameters()]
    h = hashlib.sha256(json.dumps(shape).encode())
    h.update(torch.cat(some).cpu().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()[:16]


class ExitHeads(nn.Module):
    """The heads of one backbone at increasing depths `.layers`, and their calibration.

    `.measure` names the uncertainty that the thresholds are on, a key of confidence.MEASURES.
    `.calibration` maps a level, with two digits ("0.95"), to one threshold or None per exit.
    """

    def __init__(self, model, layers, kind="linear", start="lens", measure="entropy"):
        super().__init__()
        check_layers(layers, model.config.num_hidden_layers)
        if kind not in KINDS:
            raise InputError(f"head kind {kind!r} is not one of {', '.join(KINDS)}")
        self.layers, self.kind = list(layers), kind
        self.measure, self.calibration = measure, {}
        self.backbone = (model,)
        self.heads = nn.ModuleList(KINDS[kind](model, n, start) for n in layers)
        self.to(model.embed_out.weight.device, model.embed_out.weight.dtype)

    def logits(self, hidden):
        """Residual streams [(B, T, D)] at .layers -> [(B, T, V)]."""
        return [head(h) for head, h in zip(self.heads, hidden)]

    def thresholds(self, level):
        """One threshold or None per exit for a level such as 0.95, or InputError."""
        known = self.calibration.get(f"{level:.2f}")
        if known is None or abs(level - round(level, 2)) > 1e-9:
            levels = sorted(self.calibration) or ["none"]
            raise InputError(f"these heads are not calibrated for level {level}; "
                             f"levels: {levels[0]} .. {levels[-1]}, step 0.01")
        return known

    def save(self, path):
        """Write a safetensors file (F16) with description and fingerprint, atomically.

        InputError if a weight is not a number in F16.
        """
        info = {"kind": self.kind, "layers": self.layers, "measure": self.measure,
                "calibration": self.calibration, "backbone": fingerprint(self.backbone[0])}
        tensors = {name: p.detach().half().contiguous() for name, p in self.named_parameters()}
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise InputError("these heads are not numbers in float16, so training diverged: "
                             "nothing is written; use a smaller --lr")
        with written_whole(path) as temporary:
            save_file(tensors, temporary, metadata={"nanoexit": json.dumps(info)})

    @classmethod
    def load(cls, path, model):
        """Read what save() wrote. InputError for anything else, or another backbone."""
        try:
            with safe_open(path, framework="pt") as f:
                info = json.loads((f.metadata() or {}).get("nanoexit", "null"))
                tensors = {name: f.get_tensor(name) for name in f.keys()}
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} cannot be read as a heads file ({error}); "
                             f"give one as --heads, or train heads with train.py") from None
        info = check_info(info, path)
        name = fingerprint(model)
        if info["backbone"] != name:
            raise InputError(f"the heads in {path} were trained on another backbone (fingerprint "
                             f"{info['backbone']!r:.80}, this model's is {name}); "
                             f"train heads for this model with train.py")
        heads = cls(model, info["layers"], info["kind"], measure=info["measure"])
        try:
            heads.load_state_dict(tensors)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            message = f"the tensors in {path} do not fit its description: {reason}"
            raise InputError(message) from None
        heads.calibration = info["calibration"]
        return heads.requires_grad_(False).eval()


# ---------------------------------------------------------------- the self-supervised loss


def kl(full, head):
    """Sum over positions of KL(softmax(full) || softmax(head)); logits (N, V)."""
    logp, logq = full.log_softmax(-1), head.log_softmax(-1)
    return F.kl_div(logq, logp, reduction="sum", log_target=True)


def topk_kl(full, head, k=32):
    """KL over the k tokens that the full model likes best, both sides renormalised over them."""
    full, at = full.topk(min(k, full.shape[-1]), -1)                      # (N, k)
    return kl(full, head.gather(-1, at))


def hard(full, head, weight=0.1):
    """The paper's first version: (1 - weight) CE(head, argmax full) - weight H(head), summed."""
    logq = head.log_softmax(-1)                                           # (N, V)
    entropy = -(logq.exp() * logq).sum()
    return (1 - weight) * F.nll_loss(logq, full.argmax(-1), reduction="sum") - weight * entropy


def distill_loss(heads, hidden, last, loss=kl):
    """The definition: mean loss per position of every head, (M,), for autograd.

    hidden: residual streams [(B, T, D)] at heads.layers; last: at depth L.
    """
    with torch.no_grad():
        full = heads.backbone[0].unembed(last).flatten(0, 1).float()      # (N, V)
    sums = [loss(full, z.flatten(0, 1).float()) for z in heads.logits(hidden)]
    return torch.stack(sums) / len(full)


def rows_at_once(width, device):
    """How many rows of `width` numbers to compute with at once.

    On a processor 4 MB, which stay in its cache: a loss takes a fifth of the time. On a GPU many.
    """
    return max(1, (2 ** 20 if device.type == "cpu" else 2 ** 26) // width)


def gradient_in_place(loss, full, logits, n):
    """The sum of loss(full, logits) / n, rows by rows; the gradient takes the logits' place."""
    total, rows = 0, rows_at_once(full.shape[-1], full.device)
    for i in range(0, len(full), rows):
        z = logits[i:i + rows].float().requires_grad_()                   # (rows, V)
        part = loss(full[i:i + rows].float(), z) / n
        part.backward()
        logits[i:i + rows] = z.grad
        total = total + part.detach()
    return total


def distill_in_chunks(heads, hidden, last, loss=kl, some=None, chunk=CHUNK):
    """The same losses (M,), with the gradients of their sum added to the heads' parameters.

    Logits exist for `chunk` positions and one head at a time, so that memory does not grow with
    V x N x M. some: the positions (n,), of the N = B T, where the loss is taken (default: all).
    """
    some = slice(None) if some is None else some
    last = last.flatten(0, 1)[some]                                       # (n, D)
    # 1. every head's body for all positions; a leaf collects the gradient that arrives at it
    bodies = [head.body(h).flatten(0, 1)[some] for head, h in zip(heads.heads, hidden)]
    leaves = [body.detach().requires_grad_() for body in bodies]          # (n, D) each
    total = torch.zeros(len(bodies), device=last.device)
    for i in range(0, len(last), chunk):
        # 2. logits of a chunk and of one head; the loss, and its gradient in their place
        with torch.no_grad():
            full = heads.backbone[0].unembed(last[i:i + chunk])           # (chunk, V)
        for m, head in enumerate(heads.heads):
            logits = head.output(leaves[m][i:i + chunk])                  # (chunk, V)
            gradient = logits.detach()                                    # the same memory
            total[m] += gradient_in_place(loss, full, gradient, len(last))
            # 3. back through the matrix, whose own gradient adds up
            logits.backward(gradient)
    # 4. from the leaves back through the bodies
    for body, leaf in zip(bodies, leaves):
        body.backward(leaf.grad)
    return total


# ---------------------------------------------------------------- the heads beside the full model


@dataclass
class Evaluation:
    """What every head said on N tokens, beside the full model. Arrays of numpy."""
    uncertainty: dict      # {measure: (N, M)}
    choice: np.ndarray     # (N, M + 1) most likely token of each head, the full model's last;
                           # -1 where the logits are not numbers, which agrees with nothing
    agree: np.ndarray      # (N, M) is it the full model's choice?
    right: np.ndarray      # (N, M + 1) is it the true next token?
    kl: np.ndarray         # (M,) mean KL from the full model, nats


def likeliest(logits):
    """The most likely token (N,) of logits (N, V), or -1 where they are not numbers."""
    token = logits.argmax(-1)             # NaN is larger than all
    largest = logits.gather(-1, token[:, None])[:, 0]
    return torch.where(largest.isfinite(), token, -1)


@torch.inference_mode()
def evaluate(model, heads, ids, measures, batch=8):
    """Every head on windows ids (n, T + 1), the last column only a target: N = n T -> Evaluation.

    measures: {name: function of logits}, e.g. confidence.MEASURES. Logits exist for a few
    positions of one head at a time: memory does not grow with N x V.
    """
    config, device = model.config, model.embed_in.weight.device
    M, N, done = len(heads.layers), ids[:, 1:].numel(), 0
    depths = (*heads.layers, config.num_hidden_layers)
    batch = min(batch, rows_at_once(ids.shape[1] * config.intermediate_size, device))
    chunk = rows_at_once(config.vocab_size, device)
    # filled in place: many small results among large tensors would leave holes in memory
    uncertainty = {name: torch.zeros(N, M) for name in measures}
    choice, divergence = torch.zeros(N, M + 1, dtype=torch.int32), torch.zeros(M)
    for rows in ids.split(batch):
        # the residual streams, and the heads' bodies, for whole windows
        *hidden, last = model.hidden_states(rows[:, :-1].to(device), depths)  # (B, T, D) each
        bodies = [head.body(h).flatten(0, 1) for head, h in zip(heads.heads, hidden)]
        for i in range(0, len(bodies[0]), chunk):
            # the logits of a chunk, one head after the other
            full = model.unembed(last.flatten(0, 1)[i:i + chunk])         # (n, V)
            at = slice(done, done + len(full))
            for m, head in enumerate(heads.heads):
                z = head.output(bodies[m][i:i + chunk])                   # (n, V)
                for name, measure in measures.items():
                    uncertainty[name][at, m] = measure(z).float().cpu()
                choice[at, m] = likeliest(z).cpu()
                divergence[m] += kl(full.float(), z.float()).cpu()
            choice[at, M] = likeliest(full).cpu()
            done += len(full)
    choice, target = choice.numpy(), ids[:, 1:].flatten().cpu().numpy()
    return Evaluation(
        uncertainty={name: values.numpy() for name, values in uncertainty.items()},
        choice=choice,
        agree=(choice[:, :-1] == choice[:, -1:]) & (choice[:, -1:] >= 0),
        right=choice == target[:, None],
        kl=divergence.numpy() / len(target))


# ---------------------------------------------------------------- text


def measuring_text(split, tokenizer=None):
    """The measuring text, the same for everyone: 65,536 ids of a split, "calibration" or "test".

    It is code of CPython 3.11.7's library that the toy was not trained on: 32 pieces of 2,048
    tokens a split. The ids are the toy's. For another tokenizer the text is encoded anew.
    """
    ids = load_file(TOY / "text.safetensors")[split].long()               # (65536,)
    if tokenizer is None:
        return ids
    toys = Tokenizer.load(TOY)
    if tokenizer.bytes == toys.bytes:
        return ids
    return torch.tensor(tokenizer.encode(toys.decode(ids.tolist())))


class HeldOut(NamedTuple):
    """Text that a model is measured on, in its own ids, and how much of it the model takes."""
    splits: dict           # {"calibration" and "test": ids (N,)}
    context: int           # the longest sequence, in tokens

    def fit(self, prompt, new):
        """Tokens of a prompt, and new ones, that the context holds: (prompt, new), or fewer."""
        if prompt + new > self.context + 1:   # the last new one needs no place
            prompt = min(prompt, self.context // 2)
            new = min(new, self.context + 1 - prompt)
            print(f"the context is {self.context} tokens: prompts have {prompt}, {new} follow")
        return prompt, new


def held_out(context=2048, tokenizer=None, data="stdlib"):
    """A HeldOut: the measuring text, or text of --data that train.py does not train on."""
    if data == "stdlib":
        splits = {split: measuring_text(split, tokenizer) for split in ("calibration", "test")}
    else:
        from appendix.corpus import read_corpus
        splits = read_corpus(data, tokenizer)
    return HeldOut(splits, context)


def measuring_windows(split, tokens, length=256, text=None):
    """About `tokens` tokens of text, a HeldOut (None: the toy's), as windows (n, length).

    They are spread over it. The last token is only a target: context + 1 tokens fit.
    """
    splits, context = text or held_out()
    ids, length = splits[split], min(length, context + 1)
    if len(ids) < length:
        raise InputError(f"the {split} text has {len(ids)} tokens, fewer than one window of "
                         f"{length}; give more text")
    windows = ids[:len(ids) // length * length].view(-1, length)
    wanted = max(1, tokens // length)
    return windows[::max(1, len(windows) // wanted)][:wanted].long()


def held_out_prompts(n, length=64, split="test", text=None):
    """n prompts of `length` tokens from text, a HeldOut (None: the toy's), as lists of ids."""
    text = text or held_out()
    every = max(length, min(512, text.context + 1, len(text.splits[split]) // n))
    windows = measuring_windows(split, n * every, every, text)[:, :length]
    if len(windows) < n:
        raise InputError(f"the {split} text has room for {len(windows)} prompts only, not {n}")
    return windows.tolist()


# ---------------------------------------------------------------- any model, on any text


def model_options(parser, file=PAPER, data=True):
    """The options of every chapter that measures: which model, which heads, on which text."""
    add = parser.add_argument
    add("--model", default=TOY, help="folder or official name (default: the toy)")
    add("--heads", help=f"heads file (default: {file} in the model's folder)")
    if data:
        add("--data", default="stdlib", help="text to measure on, as in train.py: a text or .jsonl "
            "file, or a folder of them (default: the measuring text)")


def load_model(args, file=PAPER):
    """What these options name: model, heads, tokenizer, HeldOut."""
    folder, given = locate(args.model), {"device": "cpu", "dtype": "float32", **vars(args)}
    model = Pythia.from_pretrained(folder, given["device"], getattr(torch, given["dtype"]))
    heads = ExitHeads.load(args.heads or folder / file, model)
    tokenizer = Tokenizer.load(folder)
    context = model.config.max_position_embeddings
    return model, heads, tokenizer, held_out(context, tokenizer, given.get("data", "stdlib"))


@torch.inference_mode()
def self_text(model, prefixes, length, temperatures=(0.0, 0.8), seed=0):
    """Text that the model writes itself: prefixes (B, P) go on to `length` tokens (B, length).

    Row b is written at temperatures[b % n], 0 being greedy. Start from <|endoftext|> to need no
    corpus at all.
    """
    generator = torch.Generator(prefixes.device).manual_seed(seed)
    B, P = prefixes.shape
    t = torch.tensor(temperatures, device=prefixes.device)
    t = t.repeat(B)[:B, None]                                             # (B, 1)
    cache, new, out = model.new_cache(B, length), prefixes, [prefixes]
    for _ in range(length - P):
        x = model.run(model.embed(new), 0, model.config.num_hidden_layers, cache)
        logits = model.unembed(x[:, -1])                                  # (B, V)
        check_numbers(logits.amax(-1))
        # Gumbel: argmax(z / t + g) samples softmax(z / t), and is greedy at t = 0
        logits = logits.float()
        noise = -torch.log(torch.empty_like(logits).exponential_(generator=generator))
        new = (logits + t * noise).argmax(-1, keepdim=True)               # (B, 1)
        out.append(new)
    return torch.cat(out, 1)                                              # (B, length)


# ---------------------------------------------------------------- the chapter's demonstration


@torch.inference_mode()
def previous_token_attention(model, ids):
    """The largest mean attention that a head of each block pays to the previous token: [L].

    On windows ids (n, T). To copy what followed the last time, a block needs such a head in an
    earlier one. Without their token shift, block heads at and after the depth where this is near 1
    learned to copy, the ones before did not.
    """
    x, largest = model.embed(ids), []
    T = ids.shape[1]
    rope, future = model.angles(0, T, x), torch.ones(T, T, dtype=torch.bool).triu(1)
    for layer in model.layers:
        q, (k, _) = layer.attention.project(layer.input_layernorm(x), rope)
        scores = q @ k.mT / q.shape[-1] ** 0.5                            # (n, H, T, T)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        to_previous = weights.diagonal(-1, -2, -1)                        # (n, H, T - 1)
        largest.append(to_previous.mean((0, 2)).max().item())
        x = layer(x, rope)
    return largest


def main():
    parser = argparse.ArgumentParser(description="Exit heads of a model: agreement and cost.")
    model_options(parser, f"{PAPER} and {FAST}")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens to measure on")
    parser.add_argument("--figure", help="also draw the logit lens of a line of code to this PNG")
    args = parser.parse_args()
    if args.tokens < 1:
        raise InputError("--tokens must be at least 1")
    if args.figure:
        from appendix import figures
        figures.check(args.figure)
    folder = locate(args.model)
    model, tokenizer = Pythia.from_pretrained(folder), Tokenizer.load(folder)
    L, context = model.config.num_hidden_layers, model.config.max_position_embeddings
    files = [path for path in (folder / PAPER, folder / FAST) if path.exists()]
    if args.heads:
        files = [args.heads]
    by_name = {Path(f).name: ExitHeads.load(f, model) for f in files}
    quarters = sorted({max(1, L * i // 4) for i in (1, 2, 3)})
    by_name["tied, untrained (logit lens)"] = ExitHeads(model, quarters, "tied")
    text = held_out(context, tokenizer, args.data)
    test = measuring_windows("test", args.tokens, text=text)              # (n, 256)
    print(f"agreement with the full model on {test[:, 1:].numel():,} held-out tokens; "
          f"a full token costs {model.config.full_cost:.2f} blocks")
    print(f"{'heads':<30}{'kind':<9}{'depth':>6}{'agreement':>11}{'parameters':>12}"
          f"{'cost (blocks)':>15}")
    for name, heads in by_name.items():
        agreement = evaluate(model, heads, test, {}).agree.mean(0)        # (M,)
        for layer, head, share in zip(heads.layers, heads.heads, agreement):
            parameters = sum(p.numel() for p in head.parameters())
            print(f"{name:<30}{heads.kind:<9}{layer:>6}{share:>11.1%}{parameters:>12,}"
                  f"{head.cost():>15.2f}")
    largest = ", ".join(f"{a:.2f}" for a in previous_token_attention(model, test[:8, :context]))
    print("largest mean attention of a block's heads to the previous token, "
          f"blocks 1 .. {L}: {largest}")
    if args.figure:
        figures.lens(args.figure, model, tokenizer, "def read(self, size=-1):\n    return self.")
        print(f"wrote {args.figure}")


if __name__ == "__main__":
    command_line(main)
