"""Chapter 1. Pythia from scratch: a GPT-NeoX whose depth is a coordinate.

A decoder is a grid of positions and blocks. Plain decoding fills it column by column. Early exit
leaves the deep part of some columns empty. Self-speculation fills that part later, many positions
at once. So the model has one verb, and every method of this project is a policy over it:

    x = model.run(x, start, stop, cache)    advance these positions from depth start to depth stop

A block of Pythia reads the residual stream x once and adds two answers to it:

    x <- x + Attention(LN1(x)) + MLP(LN2(x))             parallel (Pythia)
    x <- x + Attention(LN1(x));  x <- x + MLP(LN2(x))    sequential (other GPT-NeoX models)

Queries and keys are rotated by their position (RoPE). The MLP is D -> 4D -> D with the exact GELU.
The unembedding is a matrix of its own. Modules carry the names of the official files.

    python model.py --prompt "def main("                    the toy continues the prompt, greedily
    python model.py --model pythia-70m --temperature 0.8

Letters: B batch, T positions, N cached positions, D hidden size, V vocabulary, H attention heads,
K head size, R rotated part of K, L blocks. A depth or layer n always means "n blocks executed".
"""
import argparse
import codecs
import json
import math
import os
import re
import reprlib
import secrets
import sys
import tempfile
import time
import unicodedata
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

TOY = Path(__file__).parent / "toy"   # the model that comes with the repository
LARGEST_JSON = 2 ** 24                # bytes; the official tokenizer.json has 2 million

# ---------------------------------------------------------------- the architecture


@dataclass
class PythiaConfig:
    """What changes the computation, under the names of the official config.json."""
    vocab_size: int = 50304               # V
    hidden_size: int = 512                # D
    intermediate_size: int = 2048         # 4D
    num_hidden_layers: int = 6            # L
    num_attention_heads: int = 8          # H
    max_position_embeddings: int = 2048   # the context: the longest sequence, in tokens
    rotary_pct: float = 0.25              # R / K
    rotary_emb_base: float = 10000
    layer_norm_eps: float = 1e-5
    use_parallel_residual: bool = True

    @property
    def block_weights(self):
        """Weights in the matrices of one block. This is the unit of cost, the block-equivalent."""
        return 4 * self.hidden_size ** 2 + 2 * self.hidden_size * self.intermediate_size

    @property
    def unembed_cost(self):
        """Cost of the unembedding for one position, in block-equivalents."""
        return self.hidden_size * self.vocab_size / self.block_weights

    @property
    def full_cost(self):
        """Cost of a token at full depth, in block-equivalents: blocks and unembedding."""
        return self.num_hidden_layers + self.unembed_cost

    @classmethod
    def from_dict(cls, fields):
        """Read the content of a config.json, official or as current transformers writes it.

        Raises InputError that names a field which is missing, wrong, or not supported.
        """
        fields = supported_fields(fields)
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__})

    def to_dict(self):
        """The content of an official-style config.json."""
        return {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox",
                "hidden_act": "gelu", "tie_word_embeddings": False,
                "bos_token_id": 0, "eos_token_id": 0, **asdict(self)}


class KVCache:
    """Keys and values of every block (`blocks`: how many, else L), with room for max_len positions.

    `length[block]` positions are filled. Shallow blocks may be ahead of deep ones: the cache is
    jagged. To forget is to lower these integers. No tensor is touched.
    """

    def __init__(self, config, batch, max_len, device="cpu", dtype=torch.float32, blocks=None):
        H = config.num_attention_heads
        K = config.hidden_size // H
        L = config.num_hidden_layers if blocks is None else blocks
        self.max_len = max_len
        self.length = [0] * L
        self.kv = torch.empty(L, 2, batch, H, max_len, K, device=device, dtype=dtype)

    def append(self, block, kv):
        """Store new keys and values (2, B, H, T, K). Return the block's (2, B, H, N + T, K)."""
        n = self.length[block]
        end = n + kv.shape[3]
        self.kv[block, :, :, :, n:end] = kv
        self.length[block] = end
        return self.kv[block, :, :, :, :end]

    def check_room(self, n):
        """Raise InputError unless n positions fit."""
        check_room(n, self.max_len)

    def truncate(self, n):
        """Forget every position from n on, in every block."""
        self.length = [min(n, filled) for filled in self.length]

    def pick(self, entries):
        """Go on with these entries of the batch, some of them perhaps several times."""
        self.kv = self.kv[:, :, entries]


def rotation_table(config, like):
    """RoPE: cos and sin (context, 1, R) of all positions, in the type and place of `like`.

    Position p turns pair i of dimensions by the angle p * base^(-2i / R).
    """
    R = int(config.hidden_size // config.num_attention_heads * config.rotary_pct)
    with torch.inference_mode(False):     # the table may later serve training
        even = torch.arange(0, R, 2, device=like.device).float()             # (R/2,): 2i
        frequency = config.rotary_emb_base ** (-even / R)                    # (R/2,)
        position = torch.arange(config.max_position_embeddings, device=like.device)
        angle = (position[:, None, None] * frequency).repeat(1, 1, 2)        # (context, 1, R)
        return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x, cos, sin):
    """RoPE: turn the first R of K dimensions of x (B, T, H, K) by cos and sin (T, 1, R).

    Dimension i is paired with i + R/2: (a, b) -> (a cos - b sin, b cos + a sin).
    """
    R = cos.shape[-1]
    turned, rest = x[..., :R], x[..., R:]
    a, b = turned[..., :R // 2], turned[..., R // 2:]
    partner = torch.cat((-b, a), -1)                              # (B, T, H, R)
    return torch.cat((turned * cos + partner * sin, rest), -1)    # (B, T, H, K)


class Attention(nn.Module):
    """Causal attention of T new positions to the cached ones and themselves: (B, T, D) each."""

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.heads = config.num_attention_heads
        self.query_key_value = nn.Linear(D, 3 * D)
        self.dense = nn.Linear(D, D)

    def project(self, x, rope):
        """x (B, T, D) -> queries (B, H, T, K), and keys and values (2, B, H, T, K)."""
        B, T, _ = x.shape
        qkv = self.query_key_value(x).view(B, T, self.heads, -1)    # (B, T, H, 3K)
        q, k, v = qkv.chunk(3, -1)                                  # (B, T, H, K) each
        q = rotate(q, *rope)
        k = rotate(k, *rope)
        return q.transpose(1, 2), torch.stack((k, v)).transpose(2, 3)

    def forward(self, x, rope, mask, cache, block):
        B, T, D = x.shape
        q, kv = self.project(x, rope)
        if cache is not None:
            kv = cache.append(block, kv)
        k, v = kv                                                   # (B, H, N + T, K) each
        causal = mask is None and T > 1
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)    # (B, H, T, K)
        return self.dense(y.transpose(1, 2).reshape(B, T, D))                  # (B, T, D)


class MLP(nn.Module):
    """D -> 4D -> D with the exact GELU: (B, T, D) -> (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x)))


class Block(nn.Module):
    """One block: (B, T, D) -> (B, T, D). With a cache, `block` is its row there."""

    def __init__(self, config):
        super().__init__()
        D, eps = config.hidden_size, config.layer_norm_eps
        self.parallel = config.use_parallel_residual
        self.input_layernorm = nn.LayerNorm(D, eps=eps)
        self.post_attention_layernorm = nn.LayerNorm(D, eps=eps)
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x, rope, mask=None, cache=None, block=0):
        attended = x + self.attention(self.input_layernorm(x), rope, mask, cache, block)
        read = x if self.parallel else attended
        return attended + self.mlp(self.post_attention_layernorm(read))


class Pythia(nn.Module):
    """Embedding, L blocks, final LayerNorm and unembedding. Parameters carry the official names."""

    def __init__(self, config):
        super().__init__()
        D, V = config.hidden_size, config.vocab_size
        self.config = config
        self.embed_in = nn.Embedding(V, D, _weight=torch.empty(V, D))
        if not self.embed_in.weight.is_meta:      # drawing normal numbers there imports for 2 s
            self.embed_in.reset_parameters()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.embed_out = nn.Linear(D, V, bias=False)
        self.rope = None                  # (cos, sin), made by angles()

    @classmethod
    def from_pretrained(cls, name_or_dir=TOY, device="cpu", dtype=torch.float32):
        """A frozen model from a local folder or an official name.

        The names are pythia-14m .. pythia-12b, each also with -deduped. Reads F16, BF16 and F32
        files, whole or in shards. Peak memory is little more than one copy of the weights.
        Raises InputError when files are missing, damaged or do not fit the config.
        """
        folder = locate(name_or_dir)
        fields = read_json(folder / "config.json", "is this a model's folder?")
        with torch.device("meta"):        # no memory yet: load_weights puts the parameters in
            model = cls(PythiaConfig.from_dict(fields))
        load_weights(model, folder, device, dtype)
        return model.eval()

    def embed(self, ids):
        """Token ids (B, T), a tensor or lists -> depth 0 of the residual stream (B, T, D). Or
        InputError: no such id.

        On a CPU the look-up itself finds a wrong id. On a GPU a check waits for the device. So a
        single token, the model's own choice, is not checked there.
        """
        ids = torch.as_tensor(ids, device=self.embed_in.weight.device)
        V, on_cpu = self.config.vocab_size, ids.device.type == "cpu"
        try:
            if on_cpu or ids.numel() <= 1 or 0 <= ids.min() <= ids.max() < V:
                return self.embed_in(ids)
        except IndexError:
            pass
        raise InputError(f"ids {ids.min()} .. {ids.max()} are not all in 0 .. {V - 1}")

    def run(self, x, start, stop, cache=None, between=None):
        """Advance T consecutive positions from depth start to depth stop: (B, T, D) -> (B, T, D).

        between {depth: (B, T, D)}: tensors that receive the streams at depths on the way.

        With a cache the positions continue where the entries of these blocks end, all equally long,
        and their keys and values are appended. Without a cache they are positions 0 .. T - 1.
        Raises InputError beyond the context or the cache's room.
        """
        T, offset, room = x.shape[1], 0, self.config.max_position_embeddings
        if cache is not None and start < stop:
            offset, room = cache.length[start], min(room, cache.max_len)
            lengths = set(cache.length[start:stop])
            assert lengths == {offset}, "blocks of one run() must be equally long"
        check_room(offset + T, room)
        rope, mask = self.angles(offset, T, x), self.mask(offset, T, x)
        for block in range(start, stop):
            x = self.layers[block](x, rope, mask, cache, block)
            if between and block + 1 in between:
                between[block + 1].copy_(x)
        return x

    def unembed(self, x):
        """The full model's own head: residual stream at depth L (B, T, D) -> logits (B, T, V)."""
        return self.embed_out(self.final_layer_norm(x))

    def angles(self, offset, T, like):
        """cos and sin (T, 1, R) of positions offset .. offset + T - 1, in the type of `like`."""
        table = self.rope
        if table is None or table[0].dtype != like.dtype or table[0].device != like.device:
            self.rope = rotation_table(self.config, like)
        cos, sin = self.rope
        return cos[offset:offset + T], sin[offset:offset + T]

    @staticmethod
    def mask(offset, T, like):
        """Which of offset + T positions each of T new ones sees: (T, offset + T), bool.

        None where attention needs none: a first pass is plainly causal, and one position sees all.
        """
        if offset == 0 or T == 1:
            return None
        return torch.ones(T, offset + T, dtype=torch.bool, device=like.device).tril(offset)

    def keys_values(self, x, block, cache):
        """Append only the block's keys and values for x (B, T, D): what later positions read."""
        layer = self.layers[block]
        rope = self.angles(cache.length[block], x.shape[1], x)
        _, kv = layer.attention.project(layer.input_layernorm(x), rope)
        cache.append(block, kv)

    def hidden_states(self, ids, depths):
        """ids (B, T) -> residual streams [(B, T, D)] at increasing `depths`, without a cache."""
        x, start, states = self.embed(ids), 0, []
        for depth in depths:
            x = self.run(x, start, depth)
            states.append(x)
            start = depth
        return states

    def forward(self, ids, exits=()):
        """ids (B, T) -> logits (B, T, V), and residual streams [(B, T, D)] at depths `exits`."""
        *hidden, last = self.hidden_states(ids, (*exits, self.config.num_hidden_layers))
        return self.unembed(last), hidden

    def new_states(self, depths, room):
        """Room for residual streams at so many depths: (depths, 1, room, D), not initialised.
        A twin may keep them in a form of its own."""
        like = self.embed_in.weight
        return like.new_empty(depths, 1, room, self.config.hidden_size)

    def new_cache(self, batch=1, max_len=None):
        """An empty KVCache in the model's type and place. max_len defaults to the context."""
        w, room = self.embed_in.weight, max_len or self.config.max_position_embeddings
        return KVCache(self.config, batch, room, w.device, w.dtype)


# ---------------------------------------------------------------- the official files

SIZES = {"vocab_size": [1, 2 ** 24], "hidden_size": [1, 2 ** 16], "intermediate_size": [1, 2 ** 20],
         "num_hidden_layers": [1, 2 ** 10], "num_attention_heads": [1, 2 ** 16]}    # no default
# What this model computes, as check_form reads it
SUPPORTED = {"model_type": ("gpt_neox", None), "hidden_act": ("gelu", None),
             "tie_word_embeddings": (False, None), "attention_bias": (True, None),
             "rope.rope_type": ("default", None), **SIZES, "max_position_embeddings": [1, 2 ** 20],
             "rotary_pct": [0.0, 1.0], "rotary_emb_base": [1e-6, 1e15],
             "layer_norm_eps": [0.0, 1.0], "use_parallel_residual": (True, False)}
BUFFERS = re.compile(r"attention\.(bias|masked_bias|rotary_emb\.inv_freq)$")   # of older exports


def check_form(content, form, where):
    """Raise InputError unless the values in nested dicts are what `form` allows.

    form: {"name" or "name.of.nested": a tuple of values, or [least, largest] of a number, a whole
    one if these are}. A missing name reads as None, NaN lies in no range.
    """
    for place, allowed in form.items():
        value, ranged = content, isinstance(allowed, list)
        for name in place.split("."):
            # What is no dict fits nothing
            value = value.get(name) if isinstance(value, dict) else value and [value]
        if ranged and type(value) in (int, type(allowed[0])):
            fits = allowed[0] <= value <= allowed[1]
        else:
            fits = not ranged and value in allowed
        if not fits:
            said = "missing" if value is None else reprlib.repr(value)
            only = f"from {allowed[0]} to {allowed[1]}" if ranged else repr(allowed[0])
            raise InputError(f"{where}: {place} is {said}, supported is {only}")


def supported_fields(fields):
    """The content of a config.json with the fields of PythiaConfig complete. Or InputError."""
    # Current transformers keeps RoPE in a dict of its own, which comes before the older names
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    rope = rope if isinstance(rope, dict) else {"rope_type": [rope]}
    rope = {"rope_type": rope.get("type"), **rope}
    default = {name: x for name, x in asdict(PythiaConfig()).items() if name not in SIZES}
    config = {**default, **fields, "rope": rope}
    config["rotary_pct"] = rope.pop("partial_rotary_factor", config["rotary_pct"])
    config["rotary_emb_base"] = rope.pop("rope_theta", config["rotary_emb_base"])
    check_form(config, SUPPORTED, "config.json")
    D, H = config["hidden_size"], config["num_attention_heads"]
    K, R = D // H, int(D // H * config["rotary_pct"])
    if D % H or R + R % 2 > K:            # an odd rotated width is rounded up: to whole pairs
        raise InputError(f"config.json: hidden_size {D} is not a multiple of num_attention_heads "
                         f"{H}, or their ratio is odd and rotary_pct {config['rotary_pct']}")
    # Numbers in a place that nobody reads are refused, unless they say the same
    same = {"rope_theta": config["rotary_emb_base"], "partial_rotary_factor": config["rotary_pct"],
            "head_dim": K, "rope_type": "default", "type": rope.get("type")}
    read = ("rope_scaling", "rope_parameters", "rotary_pct", "rotary_emb_base")
    for name, value in {**rope, **fields}.items():
        placed = name in rope or re.search("rope|rotary|head_dim", name)
        if placed and name not in read and value not in (None, same.get(name)):
            raise InputError(f"config.json: {name} = {reprlib.repr(value)} stands in a place that "
                             f"is not read; rotary_pct and rotary_emb_base are")
    return config


def official_name(name):
    """Our parameter name -> its name in the official checkpoints."""
    return name if name.startswith("embed_out") else "gpt_neox." + name


def read_json(path, what):
    """The content of a JSON file: an object, a dict. InputError that ends in `what` otherwise."""
    try:
        with open(path, "rb") as file:
            text = file.read(LARGEST_JSON + 1)
        content = json.loads(text) if len(text) <= LARGEST_JSON else None
    except FileNotFoundError:
        raise InputError(f"{path} is missing; {what}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); {what}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is no JSON object of at most {LARGEST_JSON >> 20} MB; {what}")
    return content


def shard_names(path, what="copy or download it again"):
    """The file names that a model.safetensors.index.json lists. InputError when it is damaged.

    They are names of files beside it: a path could lead anywhere.
    """
    places = read_json(path, what).get("weight_map")
    if not isinstance(places, dict):
        raise InputError(f"{path} has no weight_map; copy or download it again")
    for name in places.values():
        if not re.fullmatch(r"(?a)[\w.-]{1,200}\.safetensors", str(name)):
            raise InputError(f"{path}: {reprlib.repr(name)} is no plain name that ends in "
                             f".safetensors; copy or download it again")
    return sorted(set(places.values()))


def shards_of(folder):
    """The files of the weights of a folder without model.safetensors, as its index lists them."""
    what = "there is no model.safetensors either"
    if any(Path(folder).glob("*.bin")):
        what = ("*.bin weights are not read: they are pickles, which may run any program; "
                "save them as safetensors")
    return shard_names(Path(folder) / "model.safetensors.index.json", what)


def open_weights(path):
    """safe_open with a clear InputError for a missing, truncated or foreign file."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as safetensors ({error}); "
                         f"copy or download it again") from None


def find_weights(folder, shapes):
    """Where tensors are: shapes {official name: list} -> {official name: (path, the name there)}.

    Raises InputError that lists unexpected, misshapen, doubled and missing tensors.
    """
    whole = (folder / "model.safetensors").exists()
    files = ["model.safetensors"] if whole else shards_of(folder)
    places, problems = {}, []
    for name in files:
        with open_weights(folder / name) as file:
            for key in file.keys():
                if BUFFERS.search(key):
                    continue
                # Current transformers calls the unembedding lm_head, except in its files
                known = "embed_out.weight" if key == "lm_head.weight" else key
                shape = file.get_slice(key).get_shape()
                if known not in shapes:
                    problems.append(f"unexpected {key}")
                elif known in places:
                    problems.append(f"{known} twice")
                elif shape != shapes[known]:
                    problems.append(f"{key} has shape {shape}, not {shapes[known]}")
                places[known] = folder / name, key
    problems += [f"missing {key}" for key in shapes if key not in places]
    if problems:
        problems = "; ".join(problems[:5]) + (f"; {len(problems)} in all" if problems[5:] else "")
        raise InputError(f"the weights in {folder} do not fit its config.json: {problems}")
    return places


def load_weights(model, folder, device, dtype):
    """Fill the parameters of a model on the meta device from a folder, key by key, and freeze them.

    Raises InputError when the files are missing, damaged, or do not fit the model.
    """
    parameters = dict(model.named_parameters())
    shapes = {official_name(name): list(p.shape) for name, p in parameters.items()}
    places = find_weights(Path(folder), shapes)
    # The peak of memory is one copy and a small tensor: the largest tensor comes first, and each
    # file is opened anew, so that no page of it stays mapped
    sizes = {name: p.numel() for name, p in parameters.items()}
    for name in sorted(sizes, key=sizes.get, reverse=True):
        path, key = places[official_name(name)]
        with open_weights(path) as file:
            tensor = file.get_tensor(key).to(device=device, dtype=dtype, copy=True)
        module, leaf = name.rsplit(".", 1)
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))


def locate(name_or_dir):
    """The local folder of a model. Official names are found or downloaded by appendix/hub.py.

    Raises InputError for an unknown name, a failed download, or where the appendix is not there.
    """
    if Path(name_or_dir).is_dir():
        return Path(name_or_dir)
    try:
        from appendix.hub import download
    except ImportError:
        raise InputError(f"{name_or_dir} is no folder, and official names need appendix/hub.py, "
                         f"which is not there; copy it beside model.py, or give a folder") from None
    return download(str(name_or_dir))


# ---------------------------------------------------------------- the tokenizer

# GPT-2's split into words, which the official tokenizer.json calls ByteLevel with use_regex
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s++$|\s+(?!\S)|\s"
# Its space, of which a word takes all but the last before a letter. To find the last, tiktoken goes
# back from there, but cannot come from a million. So a long run is cut off first, at the same place
SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LONG_SPACE = re.compile(f"((?<![{SPACE}])[{SPACE}]{{9999,}}(?![^{SPACE}]))")

# The tokenizer.json that we compute: all that changes ids. None: not given
FORM = {"truncation": (None,), "padding": (None,), "normalizer.type": ("NFC",),
        "pre_tokenizer.type": ("ByteLevel",), "pre_tokenizer.add_prefix_space": (False,),
        "pre_tokenizer.use_regex": (True, None),
        "post_processor.type": ("ByteLevel", "TemplateProcessing", None),
        "post_processor.single": (None, [{"Sequence": {"id": "A", "type_id": 0}}]),
        "decoder.type": ("ByteLevel", None), "model.type": ("BPE",), "model.dropout": (None, 0),
        "model.continuing_subword_prefix": (None, ""), "model.end_of_word_suffix": (None, ""),
        "model.byte_fallback": (False, None), "model.ignore_merges": (False, None)}
ADDED = {"single_word": (False,), "lstrip": (False,), "rstrip": (False,),
         "normalized": (False, True)}


def byte_letters():
    """GPT-2's printable letter of every byte, {byte: letter}. Printable bytes are their own."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in plain}
    others = [byte for byte in range(256) if byte not in letters]
    for i, byte in enumerate(others):
        letters[byte] = chr(256 + i)
    return letters


def splitter(contents):
    """A pattern whose split() cuts at these strings, leftmost and longest first, and keeps them."""
    if not contents:
        return re.compile("(?!)")         # matches nowhere
    longest_first = sorted(contents, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")


def check_ids(spec, vocab, added):
    """Raise InputError unless ids count up: pieces in the order of their merges, then added tokens.

    Only then are the ids that tiktoken gives the official library's.
    """
    order = sorted(vocab, key=vocab.get) + [content for content in added if content not in vocab]
    numbers = {**vocab, **added}
    ids = [repr(numbers[content]) for content in order]                   # 1.0 and True are no ids
    longer = [piece for piece in order if len(piece) > 1 and piece not in added]
    merges = ["".join(pair).replace(" ", "") for pair in spec["model"]["merges"]]
    lacking = {byte for byte, letter in byte_letters().items() if letter not in vocab}
    if (ids != [*map(str, range(len(ids)))] or longer != merges or "" in added
            or len(added) < len(spec["added_tokens"])
            or not lacking <= {0xC0, 0xC1, *range(0xF5, 256)}):           # not in UTF-8
        raise InputError("ids must count up from 0: bytes and merges in order, then added tokens")


class Tokenizer:
    """The official tokenizer.json: byte-level BPE. tiktoken does the merges.

    Before them stands what tiktoken does not do. A text is cut at the special tokens. The rest is
    normalised (NFC) and cut at the other added tokens, the runs of spaces. What is left is split
    into words, and the bytes of each word are merged.

    `bytes` maps an id to its bytes, `end` is the id of <|endoftext|>, `spec` the file's content.
    """

    def __init__(self, spec):
        check_form(spec, FORM, "tokenizer.json")
        self.spec, vocab = spec, spec["model"]["vocab"]
        added = {token["content"]: token["id"] for token in spec["added_tokens"]}
        # 1. The pieces that merges build. In GPT-NeoX the id of a piece is the rank of its merge
        check_ids(spec, vocab, added)
        byte_of = {letter: byte for byte, letter in byte_letters().items()}
        self.bytes = {}
        for piece, i in vocab.items():
            if piece not in added:
                self.bytes[i] = bytes(byte_of[letter] for letter in piece)
        ranks = {piece: i for i, piece in self.bytes.items()}
        self.bpe = tiktoken.Encoding("nanoexit", pat_str=WORDS, mergeable_ranks=ranks,
                                     special_tokens={})
        # 2. The added tokens: special ones in the raw text, runs of spaces in the normalised text
        self.special, self.runs = {}, {}
        for token in spec["added_tokens"]:
            check_form(token, ADDED, f"tokenizer.json, token {token['id']}")
            if token["normalized"]:
                self.runs[unicodedata.normalize("NFC", token["content"])] = token["id"]
            else:
                self.special[token["content"]] = token["id"]
            self.bytes[token["id"]] = token["content"].encode()
        self.at_special, self.at_runs = splitter(self.special), splitter(self.runs)
        self.end = added["<|endoftext|>"]
        self.vocab_size = max(self.bytes) + 1

    @classmethod
    def load(cls, folder, name="tokenizer.json"):
        """Read folder/tokenizer.json, or what it is called.

        InputError when it is missing, no byte-level BPE, or larger than the model beside it.
        """
        path, config = Path(folder) / name, Path(folder) / "config.json"
        spec = read_json(path, "copy the official tokenizer.json beside the weights")
        try:
            tokenizer = cls(spec)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is not a GPT-NeoX tokenizer.json ({error!r})") from None
        if config.exists():
            V = PythiaConfig.from_dict(read_json(config, "is this a model's folder?")).vocab_size
            if tokenizer.vocab_size > V:
                raise InputError(f"{path}: token {V}, {tokenizer.bytes[V]!r}, has no row in the "
                                 f"embedding, vocab_size is {V}; take the model's own tokenizer")
        return tokenizer

    def encode(self, text):
        """Text -> list of ids, the same as the official tokenizer's. No token is added."""
        ids = []
        for part in self.at_special.split(text):
            if part in self.special:
                ids.append(self.special[part])
                continue
            for piece in self.at_runs.split(unicodedata.normalize("NFC", part)):
                if piece in self.runs:
                    ids.append(self.runs[piece])
                    continue
                for words in LONG_SPACE.split(piece):
                    ids.extend(self.bpe.encode_ordinary(words))
        return ids

    def decode(self, ids):
        """Ids -> text. Bytes that are no UTF-8 become U+FFFD, ids beyond the vocabulary nothing."""
        pieces = [self.bytes.get(i, b"") for i in ids]
        return b"".join(pieces).decode("utf-8", errors="replace")


# ---------------------------------------------------------------- decoding, the plain way


def new_token_limit(model, ids, max_new_tokens):
    """How many tokens can follow the prompt ids. InputError if it is empty or does not fit."""
    context = model.config.max_position_embeddings
    if not ids:
        raise InputError("the prompt is empty; give at least one token")
    if len(ids) > context:
        raise InputError(f"the prompt has {len(ids)} tokens, the context holds {context}; "
                         f"shorten it")
    # the last new token is never fed back, so it needs no room in the context
    return min(max_new_tokens, context - len(ids) + 1)


@torch.inference_mode()
def sample(model, ids, max_new_tokens, temperature=0.0, seed=0):
    """Continue a list of ids: yield new ones one by one, greedily at temperature 0, else sampled.

    It stops when the context is full. Raises InputError when ids are none or more than the context,
    or when logits are not numbers.
    """
    L, device = model.config.num_hidden_layers, model.embed_in.weight.device
    steps = new_token_limit(model, ids, max_new_tokens)
    generator = torch.Generator(device).manual_seed(seed)
    cache = model.new_cache(max_len=len(ids) + steps)
    new = torch.tensor([ids], device=device)                              # (1, T)
    for _ in range(steps):
        x = model.run(model.embed(new), 0, L, cache)                      # (1, T, D)
        logits = model.unembed(x[:, -1])                                  # (1, V)
        check_numbers(logits.amax(-1))
        if temperature:
            # a tiny temperature neither overflows nor becomes 0 in float32
            logits = (logits.float() - logits.max()) / max(temperature, 1e-30)
            new = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        else:
            new = logits.argmax(-1, keepdim=True)                         # (1, 1)
        yield new.item()


def printer(tokenizer):
    """A function that prints tokens as they come, holding back an unfinished character's bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def show(token):
        print(decoder.decode(tokenizer.bytes.get(token, b"")), end="", flush=True)
    return show


# ---------------------------------------------------------------- errors, files, the command line


class InputError(ValueError):
    """Something the user gave cannot be used. The message says what, and what to do."""


def check_room(n, room):
    """Raise InputError unless n tokens fit in a context of `room` tokens."""
    if n > room:
        raise InputError(f"{n} tokens do not fit in a context of {room}; shorten the prompt")


def check_numbers(largest):
    """Raise InputError unless the largest logit of every position, (...), is a finite number."""
    if not math.isfinite(largest.sum(dtype=torch.float32).item()):        # NaN is larger than all
        name = str(largest.dtype).removeprefix("torch.")
        raise InputError(f"the model's logits are not numbers in {name}; use float32 or bfloat16, "
                         f"or copy the model again if its files are damaged")


def check_file(path, option):
    """Fail before the work, not after it: InputError unless a file can be written to `path`."""
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"{option} {path}: there is no folder {path.parent}; make it first")
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{option} {path} is there and is no file; give another name")
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            probe.write(b"x")
    except OSError as error:
        raise InputError(f"{option} {path} cannot be written ({error.strerror}); "
                         f"give another place") from None


@contextmanager
def written_whole(path, resume=False):
    """Gives a temporary path beside `path` to write to, and renames it to `path` at the end.

    A run that fails or is killed leaves the old file whole. What a failed one wrote is removed,
    unless a later run is to resume it: then the temporary name is the same for all.
    """
    unique = "" if resume else f".{secrets.token_hex(4)}"
    temporary = Path(f"{path}{unique}.tmp")
    try:
        yield temporary
        os.chmod(temporary, 0o644)        # safetensors leaves its files private
        os.replace(temporary, path)
    except SafetensorError as error:      # a full disk, for one
        raise OSError(f"{path} cannot be written: {error}") from None
    finally:
        if not resume:
            temporary.unlink(missing_ok=True)


def seed_number(text):
    """The type of a --seed: a whole number that every generator takes, with some added too."""
    if not text.isdecimal() or int(text) >= 2 ** 62:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 0 to 2**62 - 1")
    return int(text)


def command_line(main):
    """Run a chapter's main(). Bad input ends in one line and exit status 2, not in a traceback."""
    if hasattr(sys.stdout, "reconfigure"):    # a letter that the console lacks becomes ?
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            main()
        finally:
            print(end="", flush=True)         # so that a closed pipe shows here, not at the exit
    except BrokenPipeError:                   # the reader has left, as in `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)                         # as a shell says it
    except (ValueError, OSError) as error:    # InputError, or a file that cannot be written
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except ImportError as error:
        print(f"error: {error}; install what requirements.txt lists", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def main():
    parser = argparse.ArgumentParser(description="Generate text with Pythia, plainly.")
    parser.add_argument("--prompt", default="def main(", help="text to continue")
    parser.add_argument("--model", default=TOY, help="folder or official name (default: the toy)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=seed_number, default=0, help="of sampling")
    args = parser.parse_args()
    if args.max_new_tokens < 1:
        raise InputError("--max-new-tokens must be at least 1")
    if not 0 <= args.temperature < math.inf:
        raise InputError("--temperature must be a number of at least 0")
    folder = locate(args.model)
    model, tokenizer = Pythia.from_pretrained(folder), Tokenizer.load(folder)
    ids, show = tokenizer.encode(args.prompt), printer(tokenizer)
    for token in ids:
        show(token)
    begin, count = time.perf_counter(), 0
    for token in sample(model, ids, args.max_new_tokens, args.temperature, args.seed):
        count += 1
        if token == tokenizer.end:
            break
        show(token)
    seconds = time.perf_counter() - begin
    print(f"\n{count} tokens in {seconds:.2f} s, {count / seconds:.0f} tokens/s (prefill included)")


if __name__ == "__main__":
    command_line(main)
