"""Official names: `download("pythia-70m")` finds or fetches a model and returns its folder.

A model on the Hugging Face hub is a few files at one commit of a repository, its revision:

    https://huggingface.co/EleutherAI/NAME/resolve/REVISION/FILE

A branch may move on. A commit never does. So the table below pins the commit of every official
model, and everybody gets the same bytes. The bytes are checked. Sizes and SHA-256 sums on record
stand in the table. For other files the server announces them, when it redirects to its storage.
What is no such file all the same, say a portal's page, is not kept. No body is read for ever.

A transfer may stop half way. What came is kept under a temporary name, and the next try asks for
the rest only (an HTTP range). A file gets its own name after its size and checksum were checked.
So a file that carries its name is whole, and the second `download` needs no network.

An existing Hugging Face cache serves too, if it holds a whole model at the pinned revision. It is
where huggingface_hub looks: HF_HUB_CACHE, HUGGINGFACE_HUB_CACHE, HF_HOME or XDG_CACHE_HOME say so.

    python -m appendix.hub pythia-70m       fetch it at first use, and print its folder

    HF_ENDPOINT             another host than https://huggingface.co
    HF_HUB_OFFLINE=1        no network (also TRANSFORMERS_OFFLINE=1)
    XDG_CACHE_HOME          downloads are kept in its subfolder nanoexit (default ~/.cache/nanoexit)
"""
import argparse
import hashlib
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from appendix.runs import alone_in
from model import (LARGEST_JSON, InputError, PythiaConfig, Tokenizer, command_line, open_weights,
                   read_json, shard_names, shards_of, written_whole)

PATIENCE, SLOWEST = 60, 10_000       # after so many seconds, fewer bytes per second are given up

# Revision, then size in bytes and SHA-256 of model.safetensors where they are on record.
# Names with -deduped take the branch of the final checkpoint, step143000.
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

# ---------------------------------------------------------------- a name -> a folder


def official(name):
    """An official name -> (name without its owner, revision, size, sha256).

    Size and sha256 are None where they are not on record. Raises InputError for another name.
    """
    short = name.removeprefix("EleutherAI/")
    plain = short.removesuffix("-deduped")
    if plain not in OFFICIAL:
        raise InputError(f"{name!r} is neither a folder nor an official name; the names are "
                         + ", ".join(OFFICIAL) + ", each also with -deduped")
    if short == plain:
        return short, *OFFICIAL[plain]
    return short, "step143000", None, None


def complete(folder):
    """Whether a folder holds a whole model: config, tokenizer, weights in one file or in shards."""
    weights = ["model.safetensors"]
    if (folder / "model.safetensors.index.json").is_file() and not (folder / weights[0]).is_file():
        weights = shards_of(folder)
    return all((folder / file).is_file() for file in ["config.json", "tokenizer.json", *weights])


def setting(*names, default):
    """The first of these environment variables that is set, ~ and $NAME expanded, as a path."""
    values = [os.environ[name] for name in names if os.environ.get(name)]
    return Path(os.path.expandvars(os.path.expanduser([*values, default][0])))


def hugging_face_cache(short, revision):
    """Where the Hugging Face cache of this machine keeps a revision, whether it is there or not."""
    home = setting("HF_HOME", default=setting("XDG_CACHE_HOME", default="~/.cache") / "huggingface")
    hub = setting("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", default=home / "hub")
    hub = hub / f"models--EleutherAI--{short}"
    branch = hub / "refs" / revision
    commit = branch.read_text().strip() if branch.is_file() else revision
    return hub / "snapshots" / commit


def download(name):
    """An official name -> the folder with its files, downloaded at first use.

    Raises InputError for an unknown name, a failed download, or a checkpoint without safetensors.
    """
    short, revision, size, sha256 = official(name)
    cached = hugging_face_cache(short, revision)
    home = setting("XDG_CACHE_HOME", default="~/.cache")
    folder = home / "nanoexit" / f"{short}-{revision[:12]}"
    for whole in (cached, folder):
        if complete(whole):
            return whole
    others = [str(other) for other in cached.parent.glob("*") if complete(other)]
    hint = f"; another revision is in {others[0]}: give this folder to use it" if others else ""
    offline = [os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")]
    if {"1", "ON", "YES", "TRUE"} & {value.upper() for value in offline}:
        raise InputError(f"{short} at {revision} is in no cache, and HF_HUB_OFFLINE is set{hint}")
    if hint:
        print(f"{short} at {revision} is in no cache{hint}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    host = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    address = f"{host}/EleutherAI/{short}/resolve/{revision}/"

    def need(file, size=None, sha256=None):
        if not (folder / file).exists():
            fetch(address + file, folder / file, size, sha256)

    try:
        with alone_in(folder):
            need("config.json")
            need("tokenizer.json")
            try:
                need("model.safetensors", size, sha256)
            except FileNotFoundError:     # large models come in shards
                need("model.safetensors.index.json")
                for shard in shards_of(folder):
                    need(shard)
    except FileNotFoundError as error:
        raise InputError(f"{error} does not exist on the server; "
                         f"this checkpoint has no safetensors there") from None
    return folder


# ---------------------------------------------------------------- one file


def fetch(url, path, size=None, sha256=None, tries=3):
    """Download url to path, and check its size in bytes and its checksum.

    Where these are not given, those that the server announces hold. What came of a failed transfer
    is kept for the next run. A file that fails a check is deleted.
    Raises FileNotFoundError where the server has no such file, InputError for any other failure.
    """
    with written_whole(path, resume=True) as part:
        headers = receive_all(url, part, size, sha256, tries)
        if not sha256:
            announced = headers.get("x-linked-etag", headers.get("etag", ""))
            sha256 = announced.strip('W/"')
        size = size or headers["size"]
        known = len(sha256) in (40, 64)   # an etag may also be something that is no checksum
        try:
            if part.stat().st_size != size or known and checksum(part, sha256) != sha256:
                raise InputError("it has the wrong size or checksum")
            if path.suffix == ".json" and not known:
                raise InputError("nobody announced its checksum")
            CONTENT.get(path.name, open_weights)(part)
        except InputError as error:
            part.unlink()
            raise InputError(f"{url}: what came was deleted, it may be another server's answer: "
                             f"{error}; run again") from None


# How a file is read that must be what its name says. All others are weights
CONTENT = {"config.json": lambda part: PythiaConfig.from_dict(read_json(part, "is it a page?")),
           "tokenizer.json": lambda part: Tokenizer.load(part.parent, part.name),
           "model.safetensors.index.json": shard_names}


def receive_all(url, part, size, sha256, tries):
    """Complete the file `part` from url in at most `tries` tries. Returns the headers.

    They are empty if the file was whole already. Raises FileNotFoundError or InputError as fetch.
    """
    trouble = None
    for _ in range(tries):
        # A killed run may have left it whole, only not yet renamed
        if sha256 and part.exists() and part.stat().st_size == size:
            return {}
        try:
            return receive(url, part, size)
        except InputError:
            part.unlink()                 # more than there should be: no beginning of the file
            raise
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise FileNotFoundError(url) from None
            if error.code == 416:         # what we hold is no beginning of the file
                part.unlink()
            trouble = error
        except (OSError, ValueError, http.client.HTTPException) as error:
            trouble = error               # no network, a broken transfer, a bad address
    raise InputError(f"{url} could not be downloaded ({trouble}); run again to resume, give the "
                     f"folder of a local copy as the model, or use the toy, which is the default")


def receive(url, part, size):
    """One try to complete the file `part` from url, continuing what it holds. Returns the headers.

    Raises ConnectionError when fewer bytes came than announced, InputError when more, TimeoutError
    when they come too slowly, and what urllib raises.
    """
    have = part.stat().st_size if part.exists() else 0
    redirects = KeepHeaders()
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.build_opener(redirects).open(request, timeout=30) as response:
        headers = {**redirects.announced, **lower(response.headers)}
        if response.status != 206:        # not the rest, but all of it again
            have = 0
        rest = int(response.headers.get("content-length", 0))
        total = size or int(headers.get("x-linked-size", 0)) or have + rest
        most = LARGEST_JSON if part.stem.endswith(".json") else total
        if rest and have + rest != total:
            raise ConnectionError(f"{have + rest:,} bytes are offered, not {total:,}")
        came, begin = 0, time.perf_counter()
        with open(part, "ab" if have else "wb") as file:
            while chunk := response.read1(1 << 20):
                have += len(chunk)
                came += len(chunk)
                seconds = time.perf_counter() - begin
                if have > most:
                    raise InputError(f"{url}: more came than the {most:,} bytes expected")
                if seconds > PATIENCE and came < SLOWEST * seconds:
                    raise TimeoutError(f"only {came:,} bytes came in {seconds:.0f} s")
                file.write(chunk)
                show_progress(part.stem, have, total, came / seconds)
    print(f"{part.stem}: {have / 1e6:,.1f} MB".ljust(80), file=sys.stderr)
    if have < total:
        raise ConnectionError(f"{have:,} of {total:,} bytes came")
    return {**headers, "size": total or have}


def show_progress(name, have, total, rate):
    """On a terminal, rewrite one line: bytes that we have, of all, bytes per second, time left."""
    if sys.stderr.isatty():
        left = max(0, total - have) / rate
        line = (f"{name}: {have / 1e6:,.1f} of {total / 1e6:,.1f} MB, "
                f"{rate / 1e6:.1f} MB/s, {left:.0f} s left")
        print(line.ljust(80), end="\r", file=sys.stderr, flush=True)


class KeepHeaders(urllib.request.HTTPRedirectHandler):
    """Follows redirects and keeps their headers: they announce the size and checksum of a file.

    It does not follow from https to a place where others could read and change what comes.
    """

    def __init__(self):
        self.announced = {}

    def redirect_request(self, request, response, code, message, headers, url):
        if request.type == "https" and not url.lower().startswith("https:"):
            raise urllib.error.URLError(f"a redirect from https to {url} is not followed")
        self.announced.update(lower(headers))
        return super().redirect_request(request, response, code, message, headers, url)


def lower(headers):
    """HTTP headers as a dict with lower-case names."""
    return {name.lower(): value for name, value in headers.items()}


def checksum(path, like):
    """The checksum of a file, of the same kind as `like`: SHA-256 of 64 digits, or git's of 40.

    The hub announces small files by the latter, git's blob id.
    """
    if len(like) == 40:
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    else:
        digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def main():
    parser = argparse.ArgumentParser(description="Fetch an official model and print its folder.")
    parser.add_argument("name", help="pythia-14m .. pythia-12b, each also with -deduped")
    print(download(parser.parse_args().name))


if __name__ == "__main__":
    command_line(main)
