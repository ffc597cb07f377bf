"""The paper's corpus, MiniPile: a million documents of about 6 kB, `--data minipile`.

The Hugging Face hub keeps it (JeanKaddour/minipile) as parquet, which Python cannot read by itself.
But the hub's dataset viewer gives the rows of a dataset as JSON, at most 100 at a time:

    https://datasets-server.huggingface.co/rows?dataset=...&offset=0&length=100

Each such page becomes a .jsonl file in a folder, and appendix/corpus.py reads the folder. A page
gets its name when it is whole, so the next run fetches only what is missing. The server bears a few
requests a second: 20,000 documents, some 30 million tokens, are 200 requests. The split is our own,
by a hash of each document: only the rows that the hub calls train are fetched.

    python -m appendix.minipile --documents 100000      fetch that many; --data minipile reads all
"""
import argparse
import http.client
import json
import os
import tempfile
import time
import urllib.parse
import urllib.request

from appendix.runs import alone_in
from model import InputError, command_line
from train import Progress

HOST = "https://datasets-server.huggingface.co"
ROWS = 100                                # documents in a page, the most that are given
DOCUMENTS = 20_000                        # at least so many are fetched
LARGEST, LONGEST = 64 << 20, 300          # bytes of a page, and seconds that it may take
PAUSES = (1, 10, 60)                      # seconds between the tries to get a page


def receive(url):
    """The JSON that a server answers. Raises an error for an answer that does not end."""
    body, begin = bytearray(), time.monotonic()
    with urllib.request.urlopen(url, timeout=30) as response:
        if urllib.parse.urlsplit(response.url).scheme != urllib.parse.urlsplit(url).scheme:
            raise ValueError(f"it leads to {response.url}")
        while chunk := response.read1(1 << 16):
            body += chunk
            if len(body) > LARGEST or time.monotonic() - begin > LONGEST:
                raise ValueError("the answer does not end")
    return json.loads(body)


def texts_of(page, first):
    """The texts of a page of rows from `first` on. Raises an error unless all are there, whole."""
    rows = page["rows"]
    stop = min(first + ROWS, page["num_rows_total"])
    if [row["row_idx"] for row in rows] != list(range(first, stop)):
        raise ValueError("some of its rows are missing")
    if any(row["truncated_cells"] for row in rows):
        raise ValueError("some of its texts are cut")
    return [row["row"]["text"] for row in rows]


def fetch_page(host, first):
    """The texts of the rows from `first` on. A busy server is asked again."""
    query = {"dataset": "JeanKaddour/minipile", "config": "default", "split": "train",
             "offset": first, "length": ROWS}
    url = f"{host}/rows?{urllib.parse.urlencode(query)}"
    for pause in (*PAUSES, None):
        try:
            return texts_of(receive(url), first)
        except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException) as error:
            trouble = error
        if pause is None or not hasattr(trouble, "code"):     # no HTTP status: no network
            break
        time.sleep(pause)
    raise InputError(f"minipile: documents from {first:,} on could not be fetched ({trouble}); "
                     f"run again to go on, or give a local copy as --data (text or .jsonl files)")


def fetch_minipile(folder, documents=DOCUMENTS, host=HOST):
    """See to it that the folder holds the first `documents` documents. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        fetch_missing(folder, documents, host)
    return folder


def fetch_missing(folder, documents, host):
    """Fetch the pages that the folder lacks."""
    paths = {first: folder / f"{first:07}.jsonl" for first in range(0, documents, ROWS)}
    missing = [first for first, path in paths.items() if not path.exists()]
    progress = Progress(ROWS * len(missing), "documents")
    for done, first in enumerate(missing, 1):
        texts = fetch_page(host, first)
        handle, temporary = tempfile.mkstemp(prefix=".", dir=folder)      # hidden until it is whole
        with open(handle, "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        os.replace(temporary, paths[first])
        progress.show(ROWS * done, "fetching minipile")
        if len(texts) < ROWS:             # the last page
            break


def main():
    from appendix.corpus import cache_home
    parser = argparse.ArgumentParser(description="Fetch documents of MiniPile.")
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help="at least so many")
    args = parser.parse_args()
    if args.documents < 1:
        raise InputError("--documents must be at least 1")
    print(fetch_minipile(cache_home() / "minipile", args.documents))


if __name__ == "__main__":
    command_line(main)
