"""Chapter 1. Pythia from scratch: a GPT-NeoX whose depth is a coordinate.

A decoder is a grid of (position, block). Plain decoding fills it column by column; early exit leaves
the deep part of some columns empty; self-speculation fills that part later, many positions at once.
So the model has one verb, and every method of this project is a policy over it:

    x = model.run(x, start, stop, cache)    advance these positions from depth `start` to depth `stop`

A block of Pythia (`use_parallel_residual`) reads the residual stream x once and adds two answers:

    x <- x + Attention(LN1(x)) + MLP(LN2(x))          parallel (Pythia)
    x <- x + Attention(LN1(x));  x <- x + MLP(LN2(x)) sequential (other GPT-NeoX models)

Queries and keys are rotated by their position over the first `rotary_pct` of each head (RoPE); the MLP
is D -> 4D -> D with the exact GELU; the unembedding is not tied to the embedding. The names of the
modules are those of the official checkpoints, so that weights load key by key.

    python model.py --prompt "def main("           # the toy in toy/, greedy, streamed
    python model.py --model pythia-70m --temperature 0.8
Expect text as it is produced, then the rate in tokens/s.

Letters: B batch, T positions, N cached positions, D hidden size, V vocabulary, H heads, K head size,
R rotated part of K, L blocks. A depth or layer n always means "n blocks executed".
"""
import argparse
import codecs
import hashlib
import http.client
import json
import math
import os
import re
import sys
import time
import unicodedata
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

TOY = Path(__file__).parent / "toy"


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what and what to do."""


def command_line(main):
    """Run a chapter's main(): bad input ends in one line and exit status 2, never in a traceback."""
    try:
        main()
    except (InputError, OSError) as error:                                # OSError: a file that cannot be written
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def written_whole(path):
    """Gives a temporary path to write to, and renames it to `path` at the end: a killed run leaves the old file whole."""
    temporary = Path(f"{path}.tmp")
    yield temporary
    os.chmod(temporary, 0o644)                                            # safetensors leaves its files private
    os.replace(temporary, path)


# ---------------------------------------------------------------- the architecture


@dataclass
class PythiaConfig:
    """The fields of the official config.json that change what is computed, under their official names."""
    vocab_size: int = 50304               # V
    hidden_size: int = 512                # D
    intermediate_size: int = 2048         # 4D
    num_hidden_layers: int = 6            # L
    num_attention_heads: int = 8          # H
    max_position_embeddings: int = 2048   # the longest sequence, in tokens
    rotary_pct: float = 0.25              # R / K
    rotary_emb_base: float = 10000
    layer_norm_eps: float = 1e-5
    use_parallel_residual: bool = True

    @classmethod
    def from_dict(cls, d):
        """Official or current-transformers config.json as a dict. Raises InputError naming a field we do not support."""
        if not isinstance(d, dict):
            raise InputError("config.json is no JSON object; is this a model's folder?")
        d = dict(d)
        rope = d.get("rope_parameters") or d.get("rope_scaling") or {}   # where newer transformers keeps RoPE
        d.setdefault("rotary_pct", rope.get("partial_rotary_factor", 0.25))
        d.setdefault("rotary_emb_base", rope.get("rope_theta", 10000))
        supported = {"model_type": "gpt_neox", "hidden_act": "gelu", "tie_word_embeddings": False,
                     "attention_bias": True}
        for field, value in supported.items():
            if d.get(field, value) != value:
                raise InputError(f"config.json: {field} = {d[field]!r} is not supported, only {value!r}")
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise InputError(f"config.json: rope type {rope!r} is not supported, only 'default'")
        missing = [f for f in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                               "num_attention_heads") if f not in d]
        if missing:
            raise InputError(f"config.json: missing {', '.join(missing)}; is this a GPT-NeoX config?")
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        if any(type(d[f]) is not int or d[f] < 1 for f in sizes):
            raise InputError(f"config.json: {', '.join(sizes)} must be positive whole numbers")
        if d["hidden_size"] % d["num_attention_heads"]:
            raise InputError(f"config.json: hidden_size {d['hidden_size']} is not a multiple of "
                             f"num_attention_heads {d['num_attention_heads']}")
        return cls(**{f: d[f] for f in cls.__dataclass_fields__ if f in d})

    def to_dict(self):
        """The content of an official-style config.json."""
        return {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "hidden_act": "gelu",
                "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0, **asdict(self)}


class KVCache:
    """Keys and values of every block, preallocated for max_len positions, each block with its own length.

    `length[block]` positions are filled; shallow blocks may be ahead of deep ones (the cache is jagged).
    Rolling back is `truncate(n)`: it lowers integers and touches no tensor.
    """

    def __init__(self, config, batch, max_len, device="cpu", dtype=torch.float32, blocks=None):
        H, K = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        L = config.num_hidden_layers if blocks is None else blocks
        self.max_len = max_len
        self.length = [0] * L
        self.kv = torch.empty(L, 2, batch, H, max_len, K, device=device, dtype=dtype)

    def append(self, block, kv):
        """Store new keys and values kv (2, B, H, T, K); return all of the block's (2, B, H, N + T, K)."""
        n = self.length[block]
        end = n + kv.shape[3]
        self.kv[block, :, :, :, n:end] = kv
        self.length[block] = end
        return self.kv[block, :, :, :, :end]

    def check_room(self, n):
        """InputError unless n positions fit."""
        if n > self.max_len:
            raise InputError(f"{n} tokens do not fit in a context of {self.max_len}; shorten the prompt")

    def truncate(self, n):
        """Forget every position from n on, in every block."""
        self.length = [min(n, m) for m in self.length]

    def pick(self, entries):
        """Go on with these entries of the batch, some of them perhaps several times."""
        self.kv = self.kv[:, :, entries]


def rotate(x, cos, sin):
    """RoPE: rotate the first R of K dimensions of x (B, T, H, K) by their position's angles (T, 1, R)."""
    R = cos.shape[-1]
    turned, rest = x[..., :R], x[..., R:]
    half = torch.cat((-turned[..., R // 2:], turned[..., :R // 2]), -1)   # (B, T, H, R)
    return torch.cat((turned * cos + half * sin, rest), -1)               # (B, T, H, K)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.heads = config.num_attention_heads
        self.query_key_value = nn.Linear(D, 3 * D)
        self.dense = nn.Linear(D, D)

    def project(self, x, rope):
        """Queries (B, H, T, K), and keys and values (2, B, H, T, K)."""
        B, T, _ = x.shape
        qkv = self.query_key_value(x).view(B, T, self.heads, -1)          # (B, T, H, 3K): per head q, k, v
        q, k, v = qkv.chunk(3, -1)                                        # (B, T, H, K) each
        q, k = rotate(q, *rope), rotate(k, *rope)
        return q.transpose(1, 2), torch.stack((k, v)).transpose(2, 3)

    def forward(self, x, rope, mask, cache, block):
        B, T, D = x.shape
        q, kv = self.project(x, rope)
        k, v = kv if cache is None else cache.append(block, kv)           # (B, H, N + T, K) each
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)
        return self.dense(y.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x)))


class Block(nn.Module):
    """One GPT-NeoX block, the definition: (B, T, D) -> (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        D, eps = config.hidden_size, config.layer_norm_eps
        self.parallel = config.use_parallel_residual
        self.input_layernorm = nn.LayerNorm(D, eps=eps)
        self.post_attention_layernorm = nn.LayerNorm(D, eps=eps)
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x, rope, mask=None, cache=None, block=0):
        a = x + self.attention(self.input_layernorm(x), rope, mask, cache, block)
        return a + self.mlp(self.post_attention_layernorm(x if self.parallel else a))


class Pythia(nn.Module):
    """embed -> L blocks -> final LayerNorm and unembedding. Parameters carry the official names."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, V = config.hidden_size, config.vocab_size
        self.embed_in = nn.Embedding(V, D)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.embed_out = nn.Linear(D, V, bias=False)
        self.rope = None                                                  # (cos, sin), made at first use

    @classmethod
    def from_pretrained(cls, name_or_dir=TOY, device="cpu", dtype=torch.float32):
        """A frozen model from a local folder or an official name (pythia-14m .. pythia-12b, also -deduped).

        Reads F16, BF16 and F32 files, whole or in shards; peak memory is little more than one copy of the
        weights. Raises InputError when files are missing, damaged or do not fit the config.
        """
        folder = locate(name_or_dir)
        config = PythiaConfig.from_dict(read_json(folder / "config.json", "is this a model's folder?"))
        with torch.device("meta"):
            model = cls(config)
        load_weights(model, folder, device, dtype)
        return model.eval()

    def embed(self, ids):
        """Token ids (B, T) -> depth 0 of the residual stream (B, T, D)."""
        return self.embed_in(ids)

    def angles(self, offset, T, like):
        """cos and sin (T, 1, R) of positions offset .. offset + T - 1, in the type and place of `like`."""
        c = self.config
        if self.rope is None or self.rope[0].device != like.device or self.rope[0].dtype != like.dtype:
            R = int(c.hidden_size // c.num_attention_heads * c.rotary_pct)
            with torch.inference_mode(False):                             # the table may later serve training
                frequency = c.rotary_emb_base ** (-torch.arange(0, R, 2, device=like.device).float() / R)   # (R/2,)
                position = torch.arange(c.max_position_embeddings, device=like.device)
                angle = (position[:, None, None] * frequency).repeat(1, 1, 2)                   # (context, 1, R)
                self.rope = angle.cos().to(like.dtype), angle.sin().to(like.dtype)
        return self.rope[0][offset:offset + T], self.rope[1][offset:offset + T]

    @staticmethod
    def mask(offset, T, like):
        """Which of offset + T columns each of T new rows sees, (T, offset + T); None where SDPA needs none."""
        if offset and T > 1:
            return torch.ones(T, offset + T, dtype=torch.bool, device=like.device).tril(offset)

    def run(self, x, start, stop, cache=None):
        """Advance T consecutive positions through blocks start .. stop - 1: (B, T, D) -> (B, T, D).

        With a cache the positions continue where those blocks' entries end (all must be equally long),
        and their keys and values are appended; without one they are positions 0 .. T - 1.
        Raises InputError beyond the context or the cache's capacity.
        """
        T, offset = x.shape[1], 0
        limit = self.config.max_position_embeddings
        if cache is not None and start < stop:
            offset = cache.length[start]
            limit = min(limit, cache.max_len)
            assert all(n == offset for n in cache.length[start:stop]), "blocks of one run() must be equally long"
        if offset + T > limit:
            raise InputError(f"{offset + T} tokens do not fit in a context of {limit}; shorten the prompt")
        rope, mask = self.angles(offset, T, x), self.mask(offset, T, x)
        for block in range(start, stop):
            x = self.layers[block](x, rope, mask, cache, block)
        return x

    def keys_values(self, x, block, cache):
        """Append only the block's keys and values for x (B, T, D): what a position leaves for later ones to read."""
        layer, offset = self.layers[block], cache.length[block]
        cache.append(block, layer.attention.project(layer.input_layernorm(x), self.angles(offset, x.shape[1], x))[1])

    def unembed(self, x):
        """The full model's own head: residual stream at depth L (B, T, D) -> logits (B, T, V)."""
        return self.embed_out(self.final_layer_norm(x))

    def hidden_states(self, ids, depths):
        """Residual stream after each of the sorted depths, without a cache: list of (B, T, D)."""
        x, at, states = self.embed(ids), 0, []
        for depth in depths:
            x, at = self.run(x, at, depth), depth
            states.append(x)
        return states

    def forward(self, ids, exits=()):
        """ids (B, T) -> logits (B, T, V) and the hidden states [(B, T, D)] at the sorted depths `exits`."""
        *hidden, last = self.hidden_states(ids, (*exits, self.config.num_hidden_layers))
        return self.unembed(last), hidden

    def new_cache(self, batch=1, max_len=None):
        """An empty KVCache in the model's type and place; max_len defaults to the whole context."""
        w = self.embed_in.weight
        return KVCache(self.config, batch, max_len or self.config.max_position_embeddings, w.device, w.dtype)


# ---------------------------------------------------------------- the official weights

BUFFERS = re.compile(r"attention\.(bias|masked_bias|rotary_emb\.inv_freq)$")   # saved by older exports, no parameters

# Official repositories: revision, then size in bytes and sha256 of model.safetensors where they are on record.
# Elsewhere the server's own checksum of the pinned revision is used. "-deduped" names take the branch of the
# final checkpoint, step143000.
OFFICIAL = {
    "pythia-14m": ("cf967c0a9a04383db6f7b1108d86b2962634b4ac", 28143920,
                   "116a02532db461f91386a5b20f942ff2c8d4de7341e21b55caafc3d7b25f49a1"),
    "pythia-31m": ("e556ace21b489575e94e9d50b6dad2fcc7419679", 60997960,
                   "02ddadd516061264cd44b47c84ae49c6641f869e6d3f06c7d0e4855f31e34059"),
    "pythia-70m": ("a39f36b100fe8a5377810d56c3f4789b9c53ac42", 166029852,
                   "ebfa4e2f18696ebd83716a0d39fe2c025f2ff8483f72a83ca59c475692fc9d15"),
    "pythia-160m": ("50f5173d932e8e61f858120bcb800b97af589f46", 374998696,
                    "29d2e457a664e41c12c735f20a36dc0956a665f614a54ce5db21a32e75965270"),
    "pythia-410m": ("9879c9b5f8bea9051dcb0e68dff21493d67e9d4f", 911373632, None),
    "pythia-1b": ("f73d7dcc545c8bd326d8559c8ef84ffe92fea6b2", 2090701528, None),
    "pythia-1.4b": ("fedc38a16eea3bd36a96b906d78d11d2ce18ed79", 2930002184, None),
    "pythia-2.8b": ("2a259cdd96a4beb1cdf467512e3904197345f6a9", None, None),
    "pythia-6.9b": ("c0e3eee36dc47af0c49f361c74cfe459c09f7f23", None, None),
    "pythia-12b": ("bb1e3e710cdf6b524461d543cfb5ba773f0a81b6", None, None),
}


def official_name(name):
    """Our parameter name -> its name in the official checkpoints."""
    return name if name.startswith("embed_out") else "gpt_neox." + name


def read_json(path, what):
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; {what}") from None
    except ValueError:
        raise InputError(f"{path} is not JSON; {what}") from None


def shards_of(folder):
    """The files that model.safetensors.index.json names."""
    path = Path(folder) / "model.safetensors.index.json"
    index = read_json(path, "there is no model.safetensors either")
    try:
        return sorted(set(index["weight_map"].values()))
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{path} has no weight_map; copy or download it again") from None


def open_weights(path):
    """safe_open with a clear error for a missing, truncated or foreign file."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as safetensors ({error}); copy or download it again") from None


def load_weights(model, folder, device, dtype):
    """Fill the parameters of a meta-device model from folder, tensor by tensor, names key by key.

    Single file or shards. Raises InputError that lists missing, unexpected and misshapen names.
    """
    folder = Path(folder)
    files = ["model.safetensors"]
    if not (folder / files[0]).exists():
        files = shards_of(folder)
    wanted = {official_name(name): (name, tuple(p.shape)) for name, p in model.named_parameters()}
    home, problems = {}, []                                               # home: which file holds a tensor
    for file in files:
        with open_weights(folder / file) as f:
            for key in f.keys():
                if BUFFERS.search(key):
                    continue
                home[key] = folder / file
                if key not in wanted:
                    problems.append(f"unexpected {key}")
                elif tuple(f.get_slice(key).get_shape()) != wanted[key][1]:
                    problems.append(f"{key} has shape {f.get_slice(key).get_shape()}, not {list(wanted[key][1])}")
    problems += [f"missing {key}" for key in wanted if key not in home]
    if problems:
        raise InputError(f"the weights in {folder} do not fit its config.json: " + "; ".join(problems))
    # largest first, and each file reopened so that no mapped page is kept: the peak is one copy and a small tensor
    for key, (name, _) in sorted(wanted.items(), key=lambda item: -math.prod(item[1][1])):
        with open_weights(home[key]) as f:
            tensor = f.get_tensor(key).to(device=device, dtype=dtype, copy=True)
        parent, leaf = name.rsplit(".", 1)
        setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))


class KeepHeaders(urllib.request.HTTPRedirectHandler):
    """The hub announces a file's size and checksum on the redirect to its storage: keep those headers."""

    def __init__(self):
        self.announced = {}

    def redirect_request(self, request, response, code, message, headers, url):
        self.announced.update((k.lower(), v) for k, v in headers.items())
        return super().redirect_request(request, response, code, message, headers, url)


def checksum(path, like):
    """sha256 of a file, or git's blob id where `like` is one (40 digits: how the hub names its small files)."""
    h = hashlib.sha256()
    if len(like) == 40:
        h = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            h.update(chunk)
    return h.hexdigest()


def receive(url, part, size):
    """One attempt to complete the file `part` from url, continuing what it holds; returns the headers."""
    have = part.stat().st_size if part.exists() else 0
    keep = KeepHeaders()
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.build_opener(keep).open(request, timeout=30) as response:
        headers = {**keep.announced, **{k.lower(): v for k, v in response.headers.items()}}
        if response.status != 206:                                        # the server sends it all again
            have = 0
        total = size or have + int(headers.get("content-length", 0))
        with open(part, "ab" if have else "wb") as f:
            while chunk := response.read(1 << 20):
                f.write(chunk)
                have += len(chunk)
                if sys.stderr.isatty():
                    print(f"\r{part.stem}: {have / 1e6:,.1f} of {total / 1e6:,.1f} MB", end="", file=sys.stderr, flush=True)
    print(f"{part.stem}: {have / 1e6:,.1f} MB", file=sys.stderr)
    if have < total:
        raise ConnectionError(f"{have:,} of {total:,} bytes came")
    return headers


def fetch(url, path, size=None, sha256=None, tries=3):
    """Download url to path by way of path.part, which a later try resumes; checks size and checksum, then renames.

    Raises FileNotFoundError where the server has no such file, InputError when the transfer or a check fails.
    """
    part, trouble, headers = Path(f"{path}.part"), None, {}
    for attempt in range(tries):
        if sha256 and part.exists() and part.stat().st_size == size:      # whole already, only not yet renamed
            break
        try:
            headers = receive(url, part, size)
            break
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise FileNotFoundError(url) from None
            if error.code == 416:                                         # what we hold is no beginning of the file
                part.unlink()
            trouble = error
        except (OSError, ValueError, http.client.HTTPException) as error:   # no network, a broken transfer, a bad address
            trouble = error
    else:
        raise InputError(f"{url} could not be downloaded ({trouble}); run again to resume, give the folder of a local "
                         f"copy as the model, or use the toy, which is the default")
    wanted = sha256 or headers.get("x-linked-etag", headers.get("etag", "")).strip('W/"')
    size = size or int(headers.get("x-linked-size", part.stat().st_size))
    if part.stat().st_size != size or len(wanted) in (40, 64) and checksum(part, wanted) != wanted:
        part.unlink()
        raise InputError(f"{url}: the file that came has the wrong size or checksum and was deleted; run again")
    os.replace(part, path)


def complete(folder):
    """Whether a folder holds a whole model: config, tokenizer, and the weights in one file or all shards."""
    def there(*files):
        return all((folder / f).is_file() for f in files)
    weights = there("model.safetensors") or there("model.safetensors.index.json") and there(*shards_of(folder))
    return there("config.json", "tokenizer.json") and weights


def locate(name):
    """A local folder, or an official name -> the folder with its files, downloaded at first use.

    An existing Hugging Face cache (HF_HOME, HF_HUB_CACHE) is used when it holds the pinned revision;
    HF_ENDPOINT changes the host. Raises InputError for an unknown name or a failed download.
    """
    if Path(name).is_dir():
        return Path(name)
    short = str(name).removeprefix("EleutherAI/")
    revision, size, sha256 = OFFICIAL.get(short.removesuffix("-deduped"), (None, None, None))
    if revision is None:
        raise InputError(f"{name!r} is neither a folder nor an official name; the names are "
                         + ", ".join(OFFICIAL) + ", each also with -deduped")
    if short.endswith("-deduped"):
        revision, size, sha256 = "step143000", None, None
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / f"models--EleutherAI--{short}"
    snapshot = hub / "snapshots" / revision
    if (hub / "refs" / revision).is_file():
        snapshot = hub / "snapshots" / (hub / "refs" / revision).read_text().strip()
    if complete(snapshot):
        return snapshot
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nanoexit" / f"{short}-{revision[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    base = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/EleutherAI/{short}/resolve/{revision}/"

    def need(file, size=None, sha256=None):
        if not (folder / file).exists():
            fetch(base + file, folder / file, size, sha256)

    try:
        need("config.json"), need("tokenizer.json")
        try:
            need("model.safetensors", size, sha256)
        except FileNotFoundError:
            need("model.safetensors.index.json")
            for shard in shards_of(folder):
                need(shard)
    except FileNotFoundError as error:
        raise InputError(f"{error} does not exist on the server; this checkpoint has no safetensors there") from None
    return folder


# ---------------------------------------------------------------- the tokenizer

# GPT-2's split into words, which the official tokenizer.json calls ByteLevel with use_regex.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_letters():
    """GPT-2's printable stand-in for every byte: {byte: letter}. Printable bytes stand for themselves."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(others)}}


class Tokenizer:
    """The official tokenizer.json, byte-level BPE by tiktoken. Around tiktoken's merge loop it does what
    tiktoken does not: NFC, and the added tokens (specials in the raw text, runs of spaces after NFC),
    each matched leftmost-longest before the text is split into words."""

    def __init__(self, spec):
        self.spec = spec
        byte_of = {letter: byte for byte, letter in byte_letters().items()}
        added = spec["added_tokens"]
        contents = {t["content"] for t in added}
        vocab = spec["model"]["vocab"]
        self.bytes = {i: bytes(byte_of[c] for c in token) for token, i in vocab.items() if token not in contents}
        ranks = {piece: i for i, piece in self.bytes.items()}             # in GPT-NeoX the id is the rank of the merge
        self.bytes.update({t["id"]: t["content"].encode() for t in added})
        self.added = {t["content"]: t["id"] for t in added}
        self.raw = self.matcher(t["content"] for t in added if not t["normalized"])
        self.normalized = self.matcher(t["content"] for t in added if t["normalized"])
        self.vocab_size = max(self.bytes) + 1
        self.end = self.added["<|endoftext|>"]
        self.bpe = tiktoken.Encoding("nanoexit", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})

    @classmethod
    def load(cls, folder):
        """Read folder/tokenizer.json. Raises InputError when it is missing or not a byte-level BPE."""
        path = Path(folder) / "tokenizer.json"
        try:
            spec = json.loads(path.read_text("utf-8"))
            if (spec["model"]["type"], spec["pre_tokenizer"]["type"]) != ("BPE", "ByteLevel"):
                raise ValueError("no byte-level BPE")
            return cls(spec)
        except FileNotFoundError:
            raise InputError(f"{path} is missing; copy the official tokenizer.json beside the weights") from None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not a GPT-NeoX tokenizer.json ({error!r})") from None

    @staticmethod
    def matcher(contents):
        """A pattern that finds the given strings leftmost-longest; its split() keeps them at odd places."""
        longest_first = sorted(contents, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else re.compile("(?!)()")

    def encode(self, text):
        """Text -> list of ids, token for token what the official tokenizer gives (no token is added)."""
        ids = []
        for i, part in enumerate(self.raw.split(text)):
            if i % 2:
                ids.append(self.added[part])
                continue
            for j, piece in enumerate(self.normalized.split(unicodedata.normalize("NFC", part))):
                if j % 2:
                    ids.append(self.added[piece])
                elif piece:
                    ids.extend(self.bpe.encode_ordinary(piece))
        return ids

    def decode(self, ids):
        """Ids -> text; bytes that are no UTF-8 become U+FFFD, ids beyond the vocabulary nothing."""
        return b"".join(self.bytes.get(i, b"") for i in ids).decode("utf-8", errors="replace")


# ---------------------------------------------------------------- decoding, the plain way


@torch.inference_mode()
def sample(model, ids, max_new_tokens, temperature=0.0, seed=0):
    """Yield new token ids one by one: greedy at temperature 0, else sampled. Stops when the context is full."""
    if not ids:
        raise InputError("the prompt is empty; give at least one token")
    generator = torch.Generator(model.embed_in.weight.device).manual_seed(seed)
    room = model.config.max_position_embeddings - len(ids) + 1           # the last new token is never fed back
    if room < 1:
        raise InputError(f"the prompt has {len(ids)} tokens, the context holds {room + len(ids) - 1}; shorten it")
    cache = model.new_cache(max_len=len(ids) + min(max_new_tokens, room))
    new = torch.tensor([ids], device=model.embed_in.weight.device)        # (1, T)
    for _ in range(min(max_new_tokens, room)):
        x = model.run(model.embed(new), 0, model.config.num_hidden_layers, cache)
        logits = model.unembed(x[:, -1])                                  # (1, V)
        if temperature:
            logits = logits.float() - logits.max()                        # so that a tiny temperature cannot overflow
            new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            new = logits.argmax(-1, keepdim=True)                         # (1, 1)
        yield new.item()


def printer(tokenizer):
    """A function that prints tokens as they come, holding back the bytes of an unfinished character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return lambda token: print(decoder.decode(tokenizer.bytes.get(token, b"")), end="", flush=True)


def main():
    parser = argparse.ArgumentParser(description="Generate text with Pythia, plainly.")
    parser.add_argument("--prompt", default="def main(", help="text to continue")
    parser.add_argument("--model", default=TOY, help="folder or official name (default: the toy)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.max_new_tokens < 1 or not 0 <= args.temperature < float("inf"):
        raise InputError("--max-new-tokens must be at least 1 and --temperature at least 0")
    folder = locate(args.model)
    model, tokenizer = Pythia.from_pretrained(folder), Tokenizer.load(folder)
    show = printer(tokenizer)
    ids = tokenizer.encode(args.prompt)
    for i in ids:
        show(i)
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
