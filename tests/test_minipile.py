"""appendix/minipile.py: pages from a server on this machine, faults, what is fetched again, and
reading them."""
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from appendix import corpus as C
from appendix import minipile as M
from conftest import assert_refused, call
from train import split_of


class Server(BaseHTTPRequestHandler):
    """Rows as the dataset viewer gives them, of 250 documents. `faults` are answered first."""
    faults, asked = [], []

    def do_GET(self):
        query = parse_qs(urlsplit(self.path).query)
        first, n = int(query["offset"][0]), int(query["length"][0])
        assert query["dataset"] == ["JeanKaddour/minipile"]
        self.asked.append(first)
        rows = [{"row_idx": i, "row": {"text": f"document {i} \u00e9"}, "truncated_cells": []}
                for i in range(first, min(first + n, 250))]
        page, fault = ({"rows": rows, "num_rows_total": 250, "partial": False},
                       self.faults.pop() if self.faults else 200)
        if fault == "cut":
            rows[3]["truncated_cells"] = ["text"]
        if fault == "missing":
            del rows[3]
        body = json.dumps(page).encode() if fault != "html" else b"<html>sign in</html>"
        body = body[:-9] if fault == "short" else body
        self.send_response(fault if isinstance(fault, int) else 200)
        self.send_header("content-length", str(len(body) + 9 * (fault == "short")))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def host():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    Server.faults, Server.asked = [], []
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_minipile_is_fetched_in_pieces_and_goes_on(tmp_path, monkeypatch, toy_tokenizer, host):
    monkeypatch.setattr(M, "PAUSES", (0, 0))
    monkeypatch.setenv("NANOEXIT_CACHE", str(tmp_path))
    folder = tmp_path / "minipile"
    Server.faults = [429, 503]                                # a busy server is asked again
    M.fetch_minipile(folder, 100, host)
    assert Server.asked == [0, 0, 0]
    for fault in ("cut", "missing", "html", "short", 404):    # 404 thrice: a status is asked again
        Server.faults = [fault] * 3
        with pytest.raises(ValueError, match="documents from 100 on could not be fetched"):
            M.fetch_minipile(folder, 1000, host)
    Server.faults, Server.asked[:] = [], []
    M.fetch_minipile(folder, 1000, host)
    assert Server.asked == [100, 200] and sorted(os.listdir(folder)) == [
        "0000000.jsonl", "0000100.jsonl", "0000200.jsonl"]
    # what is there needs no server
    monkeypatch.setattr(C, "fetch_minipile",
                        lambda folder: M.fetch_minipile(folder, 300, "http://127.0.0.1:9"))
    streams = C.read_corpus("minipile", toy_tokenizer)
    texts = [f"document {i} \u00e9" for i in range(250)]
    expected = [i for t in texts if split_of(t.encode()) == "test"
                for i in [*toy_tokenizer.encode(t), toy_tokenizer.end]]
    assert streams["test"].tolist() == expected
    with pytest.raises(ValueError, match="could not be fetched .*refused.*run again to go on"):
        M.fetch_minipile(folder, 400, "http://127.0.0.1:9")


def test_an_answer_that_does_not_end_is_refused(tmp_path, monkeypatch, host):
    monkeypatch.setattr(M, "LARGEST", 2000)
    with pytest.raises(ValueError, match="does not end"):
        M.fetch_minipile(tmp_path, 100, host)


def test_command_line(tmp_path, monkeypatch):
    assert_refused(call(M, "--documents", 0), "at least 1")
    monkeypatch.setenv("NANOEXIT_CACHE", str(tmp_path))
    (tmp_path / "minipile").mkdir()
    (tmp_path / "minipile" / "0000000.jsonl").write_text('{"text": "x"}\n')
    status, printed, _ = call(M, "--documents", 100)
    assert (status, printed) == (0, f"{tmp_path / 'minipile'}\n")
