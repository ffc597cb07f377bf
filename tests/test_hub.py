"""appendix/hub.py: official names, a server with the hub's habits and faults, the cache."""
import functools
import hashlib
import http.server
import json
import os
import threading
import time
import urllib.request

import pytest
import torch

from appendix import hub
from appendix.hub import download, fetch
from conftest import assert_refused, call, tiny
from model import TOY, InputError, Pythia
from test_model import saved

small = functools.partial(tiny, vocab_size=2176)    # at least as many as the toy's tokens


class Hub(http.server.BaseHTTPRequestHandler):
    """A small server like the hub: a redirect that announces the checksum, ranges, faults."""
    files, log, faults = {}, [], {}

    def do_GET(self):
        self.log.append((self.path, self.headers.get("Range")))
        name = self.path.rsplit("/", 1)[-1]
        if name not in self.files:
            return self.send_error(404)
        data, fault = self.files[name], self.faults.pop(name, None)
        if fault in ("page", "no checksum", "drip", "endless"):
            return self.answer(data, fault)
        if self.path.startswith("/EleutherAI"):
            return self.redirect(name, data, fault)
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        if fault == "no ranges":
            start = 0
        body = data[start:]
        half = body[:len(body) // 2]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(half if fault == "truncated" else body)))
        self.end_headers()
        self.wfile.write(half if fault in ("broken", "truncated") else body)

    def redirect(self, name, data, fault):
        digest = hashlib.sha256(data).hexdigest()
        if fault == "wrong hash":
            digest = "0" * 64
        elif fault:                       # a fault of the storage, to which we send the client
            self.faults[name] = fault
        self.send_response(302)
        self.send_header("X-Linked-Etag", f'"{digest}"')
        self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("Location", f"/storage/{name}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, data, fault):
        """Status 200 and not what was asked for, or not as it should come."""
        body = {"page": b"<html>log in</html>", "no checksum": data}.get(fault)
        self.send_response(200)
        if body:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            if body:
                self.wfile.write(body)
            for _ in range(0 if body else 60):
                self.wfile.write(b" " * (1 if fault == "drip" else 1 << 20))
                time.sleep(0.05 if fault == "drip" else 0)
        except OSError:                   # the client has gone
            pass

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    """Of a server that runs through all tests of this file."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def place(tmp_path, monkeypatch, address):
    """A folder for caches and downloads; the server offers the files of small() and no fault."""
    folder = saved(small(), tmp_path / "origin", torch.float16)
    (folder / "tokenizer.json").write_text((TOY / "tokenizer.json").read_text())
    Hub.files, Hub.log, Hub.faults = {p.name: p.read_bytes() for p in folder.iterdir()}, [], {}
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(hub.OFFICIAL, "pythia-14m", ("abc123", None, None))
    return tmp_path


def weights_url():
    return os.environ["HF_ENDPOINT"] + "/storage/model.safetensors"


def same_weights(model):
    return torch.equal(model.embed_in.weight, small().embed_in.weight.half().float())


def test_official_names():
    for name in "14m 31m 70m 160m 410m 1b 1.4b 2.8b 6.9b 12b".split():
        assert f"pythia-{name}" in hub.OFFICIAL
    assert hub.official("EleutherAI/pythia-70m") == ("pythia-70m", *hub.OFFICIAL["pythia-70m"])
    assert hub.official("pythia-1b-deduped") == ("pythia-1b-deduped", "step143000", None, None)
    with pytest.raises(InputError, match="'pythia-13b' is neither a folder nor .*pythia-70m"):
        download("pythia-13b")


def test_download_once(place):
    assert same_weights(Pythia.from_pretrained("EleutherAI/pythia-14m"))
    asked = len(Hub.log)
    Pythia.from_pretrained("pythia-14m")
    assert len(Hub.log) == asked and not list(place.rglob("*.tmp"))


def test_of_two_at_once_one_downloads(place):
    others = [threading.Thread(target=download, args=("pythia-14m",)) for _ in range(3)]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    assert same_weights(Pythia.from_pretrained("pythia-14m"))
    assert sum(path == "/storage/model.safetensors" for path, _ in Hub.log) == 1


def test_download_in_shards(place):
    for file in saved(small(), place / "sharded", torch.float16, shards=3).iterdir():
        Hub.files[file.name] = file.read_bytes()
    del Hub.files["model.safetensors"]
    assert same_weights(Pythia.from_pretrained("pythia-14m"))


def test_broken_transfer_resumes(place):
    Hub.faults["model.safetensors"] = "broken"
    Pythia.from_pretrained("pythia-14m")
    size = len(Hub.files["model.safetensors"])
    assert ("/storage/model.safetensors", f"bytes={size // 2}-") in Hub.log


def test_a_later_run_resumes_and_a_whole_file_needs_no_server(place):
    data = Hub.files["model.safetensors"]
    digest = hashlib.sha256(data).hexdigest()
    Hub.faults["model.safetensors"] = "broken"
    with pytest.raises(InputError, match="could not be downloaded.*run again to resume"):
        fetch(weights_url(), place / "f", len(data), digest, tries=1)
    assert (place / "f.tmp").read_bytes() == data[:len(data) // 2] and not (place / "f").exists()
    fetch(weights_url(), place / "f", len(data), digest)
    assert (place / "f").read_bytes() == data and Hub.log[-1][1] == f"bytes={len(data) // 2}-"
    (place / "g.tmp").write_bytes(data)
    asked = len(Hub.log)
    fetch(weights_url(), place / "g", len(data), digest)
    assert (place / "g").read_bytes() == data and len(Hub.log) == asked


def test_broken_transfer_restarts_where_ranges_are_ignored(place):
    data = Hub.files["model.safetensors"]
    (place / "f.tmp").write_bytes(b"x" * 100)
    Hub.faults["model.safetensors"] = "no ranges"
    fetch(weights_url(), place / "f", sha256=hashlib.sha256(data).hexdigest())
    assert (place / "f").read_bytes() == data


def test_truncated_and_wrong_files_never_get_the_name(place):
    data = Hub.files["model.safetensors"]
    Hub.faults["model.safetensors"] = "truncated"         # the server itself says half the length
    with pytest.raises(InputError, match="wrong size or checksum"):
        fetch(weights_url(), place / "f", sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(InputError, match="wrong size or checksum"):
        fetch(weights_url(), place / "f", sha256="0" * 64)
    assert not list(place.glob("f*"))
    Hub.faults["model.safetensors"] = "wrong hash"
    with pytest.raises(InputError, match="wrong size or checksum"):
        Pythia.from_pretrained("pythia-14m")
    Pythia.from_pretrained("pythia-14m")                  # and the next try starts clean


def test_small_files_are_checked_by_git_blob_ids(tmp_path):
    (tmp_path / "f").write_bytes(b"hello\n")              # git hash-object says:
    assert hub.checksum(tmp_path / "f", "0" * 40) == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert hub.checksum(tmp_path / "f", "0" * 64) == hashlib.sha256(b"hello\n").hexdigest()


def test_no_such_file_and_no_network(place, monkeypatch):
    del Hub.files["model.safetensors"]
    with pytest.raises(InputError, match="has no safetensors there"):
        Pythia.from_pretrained("pythia-14m")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="local copy.*toy"):
        Pythia.from_pretrained("pythia-31m")


def test_existing_hugging_face_cache_is_used(place):
    home = place / "hf" / "hub"
    branch = home / "models--EleutherAI--pythia-14m-deduped" / "refs" / "step143000"
    branch.parent.mkdir(parents=True)
    branch.write_text("def456")
    for model, commit in {"pythia-14m": "abc123", "pythia-14m-deduped": "def456"}.items():
        snapshot = home / f"models--EleutherAI--{model}" / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for name, data in Hub.files.items():
            (snapshot / name).write_bytes(data)
        assert download(model) == snapshot
        Pythia.from_pretrained(model)
    assert not Hub.log
    (snapshot / "tokenizer.json").unlink()                # an incomplete one is not
    assert download("pythia-14m-deduped") != snapshot and Hub.log


# ---------------------------------------------------------------- servers that send something else


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("fault", ["page", "no checksum"])
def test_what_is_no_such_file_is_not_kept(place, name, fault):
    Hub.faults[name] = fault
    # a weight file says itself what it is
    if (name, fault) != ("model.safetensors", "no checksum"):
        with pytest.raises(InputError, match=f"{name}: what came was deleted"):
            download("pythia-14m")
        assert not list((place / "cache").rglob(name + "*"))
    assert same_weights(Pythia.from_pretrained("pythia-14m"))    # the next run needs no help


@pytest.mark.parametrize("name, text", [
    ("config.json", '{"error": "log in"}'), ("tokenizer.json", "{}")])
def test_json_of_something_else_is_not_kept(place, name, text):
    good, Hub.files[name] = Hub.files[name], text.encode()
    with pytest.raises(InputError, match="what came was deleted"):
        download("pythia-14m")
    Hub.files[name] = good
    download("pythia-14m")


@pytest.mark.parametrize("shard", [
    "../../x.safetensors", "/tmp/x.safetensors", "x.pth", "a/x.safetensors", "..", 7,
    "a\\x.safetensors", "\ud800.safetensors", None, ["x.safetensors"]])
def test_an_index_names_files_beside_it_only(place, shard):
    index = json.dumps({"weight_map": {"embed_out.weight": shard}})
    Hub.files["model.safetensors.index.json"], weights = (
        index.encode(), Hub.files.pop("model.safetensors"))
    Hub.files["x.safetensors"] = Hub.files["x.pth"] = weights
    before = {p for p in place.rglob("*")}
    with pytest.raises(InputError, match="is no plain name that ends in .safetensors"):
        download("pythia-14m")
    new = {p.name for p in place.rglob("*")} - {p.name for p in before}
    assert new <= {"cache", "nanoexit", "pythia-14m-abc123"}
    (place / "origin" / "model.safetensors").rename(place / "x.safetensors")
    (place / "origin" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match="is no plain name"):
        Pythia.from_pretrained(place / "origin")


def test_no_body_is_longer_than_its_size(place, monkeypatch):
    monkeypatch.setattr(hub, "LARGEST_JSON", 3 << 20)
    Hub.faults["config.json"] = "endless"
    with pytest.raises(InputError, match="more came than the 3,145,728 bytes"):
        download("pythia-14m")
    Hub.faults["f"], Hub.files["f"] = "endless", b""
    with pytest.raises(InputError, match="more came than the 2,000,000 bytes"):
        fetch(weights_url().replace("model.safetensors", "f"), place / "f", 2_000_000, "0" * 64)
    assert not [p for p in place.rglob("*") if p.name.startswith(("f", "config.json.tmp"))]


def test_a_drip_is_given_up(place, monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    Hub.files["f"], Hub.faults["f"], begin = b"", "drip", time.perf_counter()
    with pytest.raises(InputError, match="bytes came in 0 s"):
        fetch(weights_url().replace("model.safetensors", "f"), place / "f", 1000, "0" * 64, tries=1)
    assert time.perf_counter() - begin < 2


def test_a_page_of_another_size_leaves_the_beginning_alone(place):
    data = Hub.files["model.safetensors"]
    digest, Hub.files["model.safetensors"] = (
        hashlib.sha256(data).hexdigest(), b"<html>log in</html>")
    (place / "f.tmp").write_bytes(data[:1000])
    Hub.faults["model.safetensors"] = "no ranges"
    with pytest.raises(InputError, match="19 bytes are offered, not"):
        fetch(weights_url(), place / "f", len(data), digest, tries=1)
    Hub.files["model.safetensors"] = data
    fetch(weights_url(), place / "f", len(data), digest)
    assert Hub.log[-1][1] == "bytes=1000-" and (place / "f").read_bytes() == data


def test_a_redirect_leaves_https_for_nothing_else():
    follow, secure = hub.KeepHeaders().redirect_request, urllib.request.Request("https://a/f")
    assert follow(secure, None, 302, "", {"X-Linked-Size": "5"},
                  "https://b/f").full_url == "https://b/f"
    for place in ("http://b/f", "ftp://b/f"):
        with pytest.raises(OSError, match="from https to .* is not followed"):
            follow(secure, None, 302, "", {}, place)
    assert follow(urllib.request.Request("http://a/f"), None, 302, "", {},
                  "http://b/f").full_url == "http://b/f"


# --------------------------------------------------------------- the cache of the hub's own library


@pytest.mark.parametrize("settings, cache", [
    ({}, "{home}/.cache/huggingface/hub"), ({"XDG_CACHE_HOME": "~/x"}, "{home}/x/huggingface/hub"),
    ({"HF_HOME": "~/models"}, "{home}/models/hub"),
    ({"HF_HOME": "$HOME/m", "XDG_CACHE_HOME": "/x"}, "{home}/m/hub"),
    ({"HUGGINGFACE_HUB_CACHE": "~/h", "HF_HOME": "/x"}, "{home}/h"),
    ({"HF_HUB_CACHE": "${{HOME}}/c", "HUGGINGFACE_HUB_CACHE": "/x"}, "{home}/c"),
    ({"HF_HOME": ""}, "{home}/.cache/huggingface/hub")])
def test_the_cache_is_where_huggingface_hub_looks(place, monkeypatch, settings, cache):
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(place))
    for name, value in settings.items():
        monkeypatch.setenv(name, value.format())
    found = hub.hugging_face_cache("pythia-70m", "abc")
    assert str(found) == cache.format(home=place) + "/models--EleutherAI--pythia-70m/snapshots/abc"


def test_offline_asks_nobody_and_names_another_revision(place, monkeypatch, capsys):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        with monkeypatch.context() as patched:
            patched.setenv(name, "yes")
            with pytest.raises(InputError, match="pythia-14m at abc123 is in no cache, "
                                                 "and HF_HUB_OFFLINE is set$"):
                download("pythia-14m")
    other = place / "hf" / "hub" / "models--EleutherAI--pythia-14m" / "snapshots" / "def456"
    other.mkdir(parents=True)
    for name, data in Hub.files.items():
        (other / name).write_bytes(data)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
            InputError, match=f"another revision is in {other}: give this folder to use it"):
        download("pythia-14m")
    assert not Hub.log and same_weights(Pythia.from_pretrained(other))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    folder = download("pythia-14m")
    assert f"another revision is in {other}" in capsys.readouterr().err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert download("pythia-14m") == folder           # what was downloaded serves offline


def test_command_line(place):
    status, out, _ = call(hub, "pythia-14m")
    assert status == 0 and out.strip() == str(place / "cache" / "nanoexit" / "pythia-14m-abc123")
    unknown = call(hub, "pythia-13b")
    assert_refused(unknown, "neither a folder nor an official name", "pythia-70m")
