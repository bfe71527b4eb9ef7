"""The Makefile: what it lists, and its downloads, against a server of our own that can break off, resume and lie."""
import gzip
import hashlib
import http.server
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = b"Once upon a time there was a checksum. " * 3000


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["make", "-C", str(folder), "VENV=", *arguments], capture_output=True, text=True, timeout=600)


@pytest.fixture
def folder(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    return tmp_path


@pytest.fixture
def hub():
    """Serves TEXT under every name (packed under .gz) with size and SHA-256 on the head; remembers ranges asked for."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def body(self) -> bytes:
            return gzip.compress(TEXT, mtime=0) if self.path.endswith(".gz") else TEXT

        def do_HEAD(self):
            self.send_response(200)
            self.send_header("X-Linked-Size", str(len(self.body())))
            self.send_header("X-Linked-ETag", '"' + (server.lie or hashlib.sha256(self.body()).hexdigest()) + '"')
            self.send_header("Content-Length", str(len(self.body())))
            self.end_headers()

        def do_GET(self):
            start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-")).group(1))
            server.starts.append(start)
            rest = self.body()[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(rest)))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(self.body()) - 1}/{len(self.body())}")
            self.end_headers()
            self.wfile.write(rest)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.starts, server.lie, server.url = [], "", f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_bare_make_lists_every_public_target(folder):
    listed = make(folder).stdout
    for target in re.findall(r"^([a-z][a-z-]*):.*##", (ROOT / "Makefile").read_text(), re.M):
        assert f"  make {target} " in listed
    assert "make train " in listed and "make test " in listed


def test_download_verifies_and_resumes(folder, hub):
    part = folder / "out/tinystories/TinyStoriesV2-GPT4-valid.txt.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(TEXT[:1000])                                         # what a broken download left behind
    done = make(folder, "out/tinystories/valid.txt", f"HUB={hub.url}")
    assert done.returncode == 0, done.stderr
    assert (folder / "out/tinystories/valid.txt").read_bytes() == TEXT and hub.starts == [1000] and not part.exists()
    done = make(folder, "out/owt/valid.txt", f"HUB={hub.url}")
    assert done.returncode == 0 and (folder / "out/owt/valid.txt").read_bytes() == TEXT, done.stderr
    assert [path.name for path in (folder / "out/owt").iterdir()] == ["valid.txt"]


def test_wrong_checksum_and_wrong_size_leave_no_text(folder, hub):
    hub.lie = "0" * 64
    done = make(folder, "out/tinystories/valid.txt", f"HUB={hub.url}")
    assert done.returncode != 0 and "SHA-256 is wrong" in done.stderr
    assert not list((folder / "out/tinystories").iterdir())
    (folder / "out/tinystories/TinyStoriesV2-GPT4-valid.txt.part").write_bytes(TEXT + b"more")
    done = make(folder, "out/tinystories/valid.txt", f"HUB={hub.url}")
    assert done.returncode != 0 and not (folder / "out/tinystories/valid.txt").exists()


def test_no_network_says_what_to_do(folder):
    done = make(folder, "out/tinystories/valid.txt", "HUB=http://127.0.0.1:9")
    assert done.returncode != 0 and "cannot reach" in done.stderr
    assert "put the text at out/tinystories/valid.txt" in done.stderr
