"""How toy/ was made: its tokenizer, its model, and the text that everyone measures on.

    python -m appendix.toy --out mytoy                  tokenizer and model, about an hour
    python -m appendix.toy --text mytext.safetensors    the measuring text, seconds

1. The tokenizer: byte-level BPE (Sennrich et al. 2016), learned from Python's standard library. It
   starts from single bytes and merges the most frequent pair of neighbours, again and again.
2. The model: a GPT-NeoX of 16 blocks of width 128. It reads random windows of the library and
   learns to predict the next token, like any language model.
3. The measuring text: 32 pieces of 2,048 tokens of the library's calibration documents, and as many
   of its test documents, spread evenly. Another version of Python gives another text: keep the file
   in toy/, made by CPython 3.11.7, unless you train another toy.

Expect of the model, at the end: 2.30 nats per token on the test documents, 1.09 bits per byte, and
the right next token in 52 % of cases.

Letters: B batch, T positions, N tokens, V vocabulary.
"""
import argparse
import heapq
import json
import math
import platform
import re
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from appendix.runs import RunFolder
from model import (TOY, InputError, Pythia, PythiaConfig, Tokenizer, byte_letters, check_file,
                   command_line, official_name, seed_number, written_whole)
from train import Optimizer, Progress, split_of, stdlib_documents, tokens_of, windows

# ---------------------------------------------------------------- the tokenizer

# like model.WORDS, in the words of Python's re
WORDS = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")
SPACES = [" " * n for n in range(24, 1, -1)]      # runs of spaces are tokens of their own


def count_words(texts):
    """How often each word occurs, a Counter. Merges never cross the border of a word."""
    words = Counter()
    for text in texts:
        for part in re.split(" {2,24}", text):
            words.update(WORDS.findall(part))
    return words


def merge(pieces, pair):
    """The list of pieces with every `pair` of neighbours joined, from left to right."""
    merged, i = [], 0
    while i < len(pieces):
        if tuple(pieces[i:i + 2]) == pair:
            merged.append(pieces[i] + pieces[i + 1])
            i += 2
        else:
            merged.append(pieces[i])
            i += 1
    return merged


def learn_merges(words, letters, n):
    """The n merges [(left, right)] in the order they are learned: the most frequent pair each time.

    Of pairs equally frequent the smaller one is taken. words: Counter. Letters stand for bytes.
    Counts are kept up to date word by word. The heap holds old counts too, which are skipped.
    """
    corpus = [([letters[b] for b in word.encode()], times) for word, times in words.items()]
    count, where = Counter(), defaultdict(set)        # of each pair: occurrences, and words with it
    for w, (pieces, times) in enumerate(corpus):
        for pair in zip(pieces, pieces[1:]):
            count[pair] += times
            where[pair].add(w)
    heap = [(-times, pair) for pair, times in count.items()]
    heapq.heapify(heap)
    merges = []
    while len(merges) < n:
        if not heap:
            raise InputError(f"the corpus is too small for {n} merges; it has {len(merges)}")
        # 1. the most frequent pair, unless its count has changed since it was put on the heap
        times, best = heapq.heappop(heap)
        if -times != count[best] or not times:
            continue
        merges.append(best)
        # 2. merge it in the words that have it, and count their pairs anew
        changed = set()
        for w in where.pop(best):
            pieces, times = corpus[w]
            for pair in zip(pieces, pieces[1:]):
                count[pair] -= times
                changed.add(pair)
            pieces = merge(pieces, best)
            corpus[w] = pieces, times
            for pair in zip(pieces, pieces[1:]):
                count[pair] += times
                where[pair].add(w)
                changed.add(pair)
        # 3. put the new counts on the heap
        for pair in changed:
            heapq.heappush(heap, (-count[pair], pair))
    return merges


def train_bpe(texts, size):
    """Byte-level BPE learned from texts: the spec of a tokenizer.json like the official one.

    Ids: <|endoftext|>, <|padding|>, the 243 bytes that occur in UTF-8, the merges in the order they
    are learned, and runs of 24 .. 2 spaces; `size` of them. InputError if the texts are too small.
    """
    letters = byte_letters()
    special = ["<|endoftext|>", "<|padding|>"]
    alphabet = [letters[b] for b in range(256) if b not in (0xC0, 0xC1) and b < 0xF5]
    n = size - len(special) - len(alphabet) - len(SPACES)
    merges = learn_merges(count_words(texts), letters, n)
    tokens = special + alphabet + [left + right for left, right in merges]
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    added = []
    for i, content in enumerate(special):
        added.append({"id": i, "content": content, "normalized": False, "special": True, **flags})
    for i, content in enumerate(SPACES, len(tokens)):
        added.append({"id": i, "content": content, "normalized": True, "special": False, **flags})
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": added,
            "normalizer": {"type": "NFC"}, "pre_tokenizer": byte_level,
            "post_processor": byte_level, "decoder": byte_level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None,
                      "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False,
                      "vocab": {token: i for i, token in enumerate(tokens)},
                      "merges": [f"{left} {right}" for left, right in merges]}}


# ---------------------------------------------------------------- the model


def fresh_model(vocab_size):
    """The toy before training, with GPT-NeoX's start: small weights, smaller at blocks' outputs."""
    D, L = 128, 16
    model = Pythia(PythiaConfig(vocab_size=vocab_size, hidden_size=D, intermediate_size=4 * D,
                                num_hidden_layers=L, num_attention_heads=4,
                                max_position_embeddings=2048))
    for name, p in model.named_parameters():
        if name.endswith(("dense.weight", "4h_to_h.weight")):
            torch.nn.init.normal_(p, std=2 / L / D ** 0.5)
        elif p.dim() == 2:
            torch.nn.init.normal_(p, std=(2 / 5 / D) ** 0.5)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(p)
    return model


@torch.no_grad()
def language_score(model, stream, length=512, batch=16):
    """Loss in nats per token and next-token accuracy over the stream, in windows of `length`."""
    n = (len(stream) - 1) // length * length
    inputs, targets = stream[:n].view(-1, length), stream[1:n + 1].view(-1, length)
    loss = right = 0.0
    for x, y in zip(inputs.split(batch), targets.split(batch)):
        logits, _ = model(x)                                              # (B, T, V)
        loss += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
        right += (logits.argmax(-1) == y).sum().item()
    return loss / n, right / n


def learn(model, forward, stream, steps, batch_tokens, generator, save):
    """`steps` steps of `batch_tokens` tokens of language modelling; returns how many were made.

    forward: model.forward, perhaps compiled. save() is called every 250 steps. Ctrl-C ends it.
    """
    optimizer = Optimizer(model, model.layers, 3e-3, 0.02, betas=(0.9, 0.95), weight_decay=0.01)
    progress, done, smooth = Progress(steps * batch_tokens), 0, None
    try:
        for step in range(steps):
            # 1. short windows first: attention over long ones is dear on a CPU
            length = 256 if step < 0.8 * steps else 512
            ids = windows(stream, batch_tokens // length, length + 1, generator)
            # 2. loss and gradients
            logits, _ = forward(ids[:, :-1])                              # (B, T, V)
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            # 3. a step: warm-up, flat, and linear to 0 over the second half
            optimizer.step(min(1, (step + 1) / 100, (steps - step) / (0.5 * steps)))
            # 4. say how it goes
            done = step + 1
            smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
            progress.show(done * batch_tokens,
                          f"step {done:,}/{steps:,}  loss {smooth:.3f} nats/token")
            if done % 250 == 0:
                save()
    except KeyboardInterrupt:
        print(f"\ninterrupted after step {done:,}; the model trained so far is kept")
    return done


def train_backbone(out, library, library_tests, tokens, seed, compiled, batch_tokens=4096):
    """Train tokenizer and model of the toy into the folder `out`.

    library, library_tests: documents [(name, text)], stdlib_documents() without and with tests.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    training = [d for d in library if split_of(d[0]) == "train"]
    spec = train_bpe([text for _, text in training], 2048)
    tokenizer = Tokenizer(spec)
    # the library twice, its tests (where installed) once
    names = {name for name, _ in library}
    tests = [d for d in library_tests if d[0] not in names and split_of(d[0]) == "train"]
    stream = tokens_of(training * 2 + tests, tokenizer)
    held_out = [d for d in library if split_of(d[0]) == "test"]
    held_out_bytes = sum(len(text.encode()) for _, text in held_out)
    held_out = tokens_of(held_out, tokenizer)
    model = fresh_model(2048)
    steps = tokens // batch_tokens
    print(f"backbone: {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{len(stream):,} tokens of text, {steps:,} steps of {batch_tokens:,} tokens", flush=True)

    def save():
        save_model(out, model, spec)

    begin = time.perf_counter()
    forward = torch.compile(model.forward) if compiled else model.forward
    done = learn(model, forward, stream, steps, batch_tokens, generator, save)
    minutes = (time.perf_counter() - begin) / 60
    save()
    loss, accuracy = language_score(Pythia.from_pretrained(out), held_out)    # as written, in F16
    bits = loss / math.log(2) * len(held_out) / held_out_bytes
    print(f"{done * batch_tokens:,} tokens in {minutes:.0f} minutes; "
          f"held out: {loss:.4f} nats per token, "
          f"{bits:.3f} bits per byte, next-token accuracy {accuracy:.1%}")


def save_model(folder, model, tokenizer_spec):
    """Write config.json, tokenizer.json and model.safetensors (F16, official names) into folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {**model.config.to_dict(), "torch_dtype": "float16"}
    with written_whole(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    with written_whole(folder / "tokenizer.json") as temporary:
        temporary.write_text(json.dumps(tokenizer_spec, ensure_ascii=False, indent=0), "utf-8")
    tensors = {}
    for name, p in model.named_parameters():
        tensors[official_name(name)] = p.detach().half().contiguous()
    with written_whole(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


# ---------------------------------------------------------------- the measuring text


def spread_pieces(documents, tokenizer, pieces=32, length=2048):
    """`pieces` pieces of `length` tokens, spread evenly over documents [(name, text)].

    Returns ids (pieces * length,) and the names of the documents they come from. InputError if the
    documents are too short.
    """
    parts = [tokens_of([document], tokenizer) for document in documents]
    stream = torch.cat([torch.zeros(0, dtype=torch.long), *parts])
    n = len(stream) // length
    if n < pieces:
        raise InputError(f"the documents have {len(stream):,} tokens; "
                         f"{pieces} pieces of {length:,} are wanted")
    chosen = [n * i // pieces for i in range(pieces)]
    ids = stream[:n * length].view(n, length)[chosen].flatten()           # (pieces * length,)
    # a document is in a piece if it begins before the piece's end and ends after its beginning
    names, end = [], 0
    for (name, _), part in zip(documents, parts):
        begin, end = end, end + len(part)
        if any(begin < (c + 1) * length and end > c * length for c in chosen):
            names.append(name)
    return ids, names


def write_text(path, documents, tokenizer, pieces=32, length=2048):
    """Write the measuring text, int16 ids "calibration" and "test", with its source and licence."""
    tensors = {}
    metadata = {"source": f"CPython {platform.python_version()} standard library",
                "licence": "PSF-2.0, Copyright (c) 2001-2023 Python Software Foundation; "
                           "All Rights Reserved"}
    for split in ("calibration", "test"):
        chosen = [d for d in documents if split_of(d[0]) == split]
        ids, names = spread_pieces(chosen, tokenizer, pieces, length)
        tensors[split] = ids.to(torch.int16)
        metadata[f"{split}_files"] = json.dumps(names)
        print(f"{split}: {len(ids):,} tokens of {len(names)} files")
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    print(f"wrote {path}")


def main():
    parser = argparse.ArgumentParser(description="Make the toy: tokenizer and model, or its text.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", help="folder for tokenizer and model")
    what.add_argument("--text", help="safetensors file for the measuring text, in the toy's ids")
    parser.add_argument("--tokens", type=int, default=9_830_400, help="tokens to train on")
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile (needs a C++ compiler)")
    parser.add_argument("--seed", type=seed_number, default=0)
    args = parser.parse_args()
    if args.text:
        check_file(args.text, "--text")
        write_text(args.text, stdlib_documents(), Tokenizer.load(TOY))
        return
    if args.tokens < 4096:
        raise InputError("--tokens must be at least 4,096: one step of the model's training")
    with RunFolder(args.out):
        train_backbone(args.out, stdlib_documents(), stdlib_documents(tests=True), args.tokens,
                       args.seed, args.compile)


if __name__ == "__main__":
    command_line(main)
