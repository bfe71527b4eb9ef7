"""dedup.py - exact line and MinHash-LSH fuzzy deduplication of a corpus that does not fit in memory.

What:       lines that occur more than once in a corpus removed; of near-duplicate documents one kept.
Source:     Broder 1997 (resemblance, min-wise hashing); Leskovec, Rajaraman & Ullman 2014, chapter 3 (shingles, bands).
Deviations: 1. The random orders are x -> a x + b mod 2^32 with odd a, min-wise in effect, not by proof: the tests hold
            recall against theory. 2. Shingles are 32-bit hashes of word n-grams: Jaccard comes out up to |A| / 2^33
            too large. 3. casefold() for lower(); a Chinese or Japanese character is a word. 4. In buckets of over 32
            documents not all pairs are candidates.
Speed:      python dedup.py bench 100000 400: 15,100 documents and 38 MB a second in one process, 49 in two; datasketch
            2.0.0: 1,970 and 5.0, and it verifies and writes nothing. Peak memory for 1,000,000 documents 62 MB.
On paper:   5,000 WET files (375 GB packed) are 1 TB of text. data_filter.py --bench says 160 core hours, 10 h on
            one machine of 16 cores. If 15% is left, 150 GB in 40 M documents, dedup.py takes 50 minutes on 2 cores;
            disk 13 GB of keys, 100 GB of shingles, 60 GB of output; memory 0.5 GB. 100,000 files are 20 times that: 10
            machines for 20 h, then one for 17 h with 3.5 TB of disk and 10 GB of memory. The shingles break first
            (--no-verify has none), then the one process that reads.
Copy:       this file alone; needs numpy and regex. MIT.
Run:        python dedup.py
            text 0 and text 1: 20 of 22 3-grams in common, Jaccard 0.91; 134 of 140 hashes and 16 of 20 bands agree
            similarity  1-(1-s^7)^20  measured  (# theory, o measured)
                   0.7         0.821     0.814  #################################o
            fast = plain, bit for bit  OK
"""
import argparse
import contextlib
import gzip
import json
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import zlib
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import lru_cache
from itertools import chain, compress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import regex

# Dims: B bands, R rows (hashes) a band, H = B * R hashes a signature, W words, S shingles (word n-grams), d documents

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15                             # 2^64 / golden ratio, odd
MIX_1, MIX_2 = 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53   # the finalizer of MurmurHash3 (Appleby, public domain)
BATCH = 1 << 19                                         # bytes hashed at once: their shingles stay in the L2 cache
BUCKET = 32                                             # in buckets of up to so many documents all pairs are candidates
LOW_BYTES = np.array([(1 << 8 * i) - 1 for i in range(9)], np.uint64)
LINE = re.compile(rb"[^\n]*\n|[^\n]+\Z")
JSON_LINES = (".jsonl", ".jsonl.gz")                    # in such files every line is a document, {"text": .., ..}

# ---- The idea, plainly: one document at a time, in Python integers, which cannot overflow ---------------------------
def normalize_character(c: str) -> str:
    """What becomes of one character: NFD, accents and punctuation removed, lower case, white space to a space.

    Example: normalize_character("É") -> "e"; normalize_character("—") -> ""; normalize_character("猫") -> " 猫 "
    """
    if c.isspace():
        return " "
    kept = [x for x in unicodedata.normalize("NFD", c) if not unicodedata.combining(x)
            and unicodedata.category(x)[0] not in "PS" and unicodedata.category(x) != "Cf"]
    c = "".join(kept).casefold()                        # not lower(): "ς" and "σ" are one, whatever stands beside them
    # Chinese and Japanese put no space between words: each of their characters is made one.
    return f" {c} " if "\u2e80" <= c[:1] <= "\u9fff" or "\uf900" <= c[:1] <= "\ufaff" or c[:1] >= "\U00020000" else c

class Characters(dict):
    """A table of normalize_character for str.translate, each entry worked out when it is first asked for."""

    def __missing__(self, code: int) -> str:
        return self.setdefault(code, normalize_character(chr(code)))

CHARACTERS = Characters()

def words(text: str) -> list[str]:
    """Example: words("Don't  panic, Zoë!") -> ["dont", "panic", "zoe"]. Punctuation alone is one word, not nothing."""
    return text.translate(CHARACTERS).split() or ["\0" + "".join(text.split())]

def mix(x):
    """A one-to-one scrambling of 64 bits: of a Python integer, or of a uint64 array, whose arithmetic is modulo 2^64 by
    numpy's definition, so that & MASK does nothing there."""
    x = x ^ x >> 33
    x = x * MIX_1 & MASK
    x = x ^ x >> 33
    x = x * MIX_2 & MASK
    return x ^ x >> 33

def hash_bytes(data: bytes) -> int:
    """A 64-bit hash that is the same in every process and on every machine, which Python's own hash of a str is not."""
    chunks = (int.from_bytes(data[i:i + 8], "little") for i in range(0, max(len(data), 1), 8))
    return mix(sum(mix(chunk + i * GOLDEN & MASK) for i, chunk in enumerate(chunks, 1)) + len(data) & MASK)

def shingles(text: str, ngram: int) -> set[int]:
    """The document as a set: a 32-bit hash of every `ngram` consecutive words, or of all words if there are fewer."""
    hashes = [hash_bytes(word.encode("utf-8", "surrogatepass")) for word in words(text)]
    out = set()
    for i in range(max(len(hashes) - ngram + 1, 1)):
        window = 0
        for h in hashes[i:i + ngram]:
            window = window * GOLDEN + h & MASK         # a polynomial in GOLDEN: the order of the words counts
        out.add(mix(window) >> 32)
    return out

def jaccard(a: set, b: set) -> float:
    """Shared elements over all elements. Example: jaccard({1, 2, 3}, {2, 3, 4}) -> 0.5"""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)

def permutations(num_hashes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Multipliers (odd, so that x -> a x + b mod 2^32 is one-to-one) and offsets, (H,) uint32 each."""
    draw = [mix((seed * 2 * num_hashes + i + 1) * GOLDEN & MASK) >> 32 for i in range(2 * num_hashes)]
    return np.array(draw[::2], np.uint32) | np.uint32(1), np.array(draw[1::2], np.uint32)

def minhash(document: set[int], a: np.ndarray, b: np.ndarray) -> list[int]:
    """The signature: the element that comes first in each of H random orders of all 2^32 shingles. Of the union of two
    sets any element may come first, and it is in both with probability jaccard(A, B): that share of places agrees."""
    return [min((int(m) * x + int(c)) % 2**32 for x in document) for m, c in zip(a, b)]

def lsh_probability(s, num_bands: int, rows: int):
    """Chance that two sets of Jaccard similarity s agree in some band: the S-curve. Example: (0.8, 20, 7) -> 0.991"""
    return 1 - (1 - s ** rows) ** num_bands

def find(parent: memoryview, x: int) -> int:
    """The root of x's tree, which names its cluster. Every other node on the way skips a step: the paths stay short."""
    while parent[x] != x:
        parent[x] = x = parent[parent[x]]
    return x

def union(parent: memoryview, x: int, y: int, seed: int) -> None:
    """Makes two clusters one. The seed ranks all documents; the first in rank of a cluster is its root and survives."""
    x, y = sorted((find(parent, x), find(parent, y)), key=lambda document: mix(document + seed * GOLDEN & MASK))
    parent[y] = x

def plain_minhash_dedup(texts: list[str], *, num_hashes: int = 140, num_bands: int = 20, ngram: int = 5,
                        jaccard_threshold: float = 0.8, verify: bool = True, seed: int = 0) -> list[int]:
    """For each text the number of the text that stands for its cluster; a text that stands for itself survives."""
    rows, (a, b) = num_hashes // num_bands, permutations(num_hashes, seed)
    documents, buckets, parent = [shingles(text, ngram) for text in texts], {}, memoryview(np.arange(len(texts)))
    for i, document in enumerate(documents):
        signature = minhash(document, a, b)
        for band in range(num_bands):
            bucket = buckets.setdefault((band, *signature[band * rows:(band + 1) * rows]), [])
            for j in bucket:
                if not verify or jaccard(document, documents[j]) >= jaccard_threshold:
                    union(parent, i, j, seed)
            bucket.append(i)
    return [find(parent, i) for i in range(len(texts))]

def plain_exact_line_dedup(files: list[bytes]) -> list[bytes]:
    """Only the lines that occur once in all files together. Lines are compared without their ending, \\n or \\r\\n."""
    lines = [[(line, line.removesuffix(b"\n").removesuffix(b"\r")) for line in LINE.findall(data)] for data in files]
    count = Counter(content for file in lines for _, content in file)
    return [b"".join(line for line, content in file if count[content] == 1) for file in lines]

# ---- The same, a batch of documents at a time -----------------------------------------------------------------------
NON_ASCII = regex.compile(r"([^\x00-\x7f]+)")
normalize_stretch = lru_cache(1 << 14)(lambda stretch: stretch.translate(CHARACTERS))
ASCII = [normalize_character(chr(code)) for code in range(128)]
LOWER = bytes(ord(c or "\0") for c in ASCII) + bytes(range(128, 256))
DELETE = bytes(code for code, c in enumerate(ASCII) if not c)

def clean(text: str) -> bytes:
    """words(text) in UTF-8 with one or more spaces between them: ASCII by a table, stretches of the rest by a cache."""
    parts = [text] if text.isascii() else NON_ASCII.split(text)                  # ASCII and the rest in turn
    if 8 * len(parts) > len(text):                                               # another script: faster in one go
        parts = [text.translate(CHARACTERS)]
    parts[1::2] = map(normalize_stretch, parts[1::2])
    data = "".join(parts).encode("utf-8", "surrogatepass").translate(LOWER, DELETE)
    return data if data and not data.isspace() else words(text)[0].encode("utf-8", "surrogatepass")

def hash_spans(buffer: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`hash_bytes` of n stretches of a buffer, which has 8 more bytes behind the last of them: -> (n,) uint64."""
    eight = np.ndarray((len(buffer) - 7,), "<u8", buffer, strides=(1,))          # the 8 bytes at any offset
    total = mix((eight[starts] & LOW_BYTES[np.minimum(lengths, 8)]) + GOLDEN)
    longer = np.flatnonzero(lengths > 8)                                         # few words are: one load does for most
    if len(longer):
        chunks = lengths[longer] - 1 >> 3                                        # 8-byte chunks after the first
        first = np.cumsum(chunks) - chunks
        k = np.arange(chunks.sum()) - np.repeat(first - 1, chunks)               # 1, 2, .. within each span
        left = np.repeat(lengths[longer], chunks) - 8 * k
        chunk = eight[np.repeat(starts[longer], chunks) + 8 * k] & LOW_BYTES[np.minimum(left, 8)]
        total[longer] += np.add.reduceat(mix(chunk + (k + 1).astype(np.uint64) * GOLDEN), first)
    return mix(total + lengths.astype(np.uint64))

def shingle_batch(texts: list[str], ngram: int) -> tuple[np.ndarray, np.ndarray]:
    """`shingles` of many texts, repeats included: (S,) uint32, text behind text, and (d,) how many each has."""
    cleaned = [clean(text) for text in texts]
    buffer = np.frombuffer(b"".join((b" ", b" ".join(cleaned), b" " * 9)), np.uint8)
    is_word = buffer != ord(" ")
    edges = np.flatnonzero(is_word[1:] != is_word[:-1]) + 1                      # word starts and ends in turn
    starts, ends = edges[0::2], edges[1::2]
    hashes = hash_spans(buffer, starts, ends - starts)                           # (W,)
    first = np.searchsorted(starts, np.cumsum([0] + [len(x) + 1 for x in cleaned[:-1]]))   # (d,) each text's first word
    count = np.diff(first, append=len(hashes))                                   # (d,) >= 1: clean() sees to that
    window = np.zeros_like(hashes)
    for i in range(min(ngram, len(hashes))):                                     # Horner's rule in all windows at once
        window[:len(hashes) - i] = window[:len(hashes) - i] * GOLDEN + hashes[i:]
    sizes = np.maximum(count - ngram + 1, 1)
    begin = np.cumsum(sizes) - sizes
    inside = np.arange(sizes.sum()) + np.repeat(first - begin, sizes)            # the windows that lie within one text
    hashed = (mix(window[inside]) >> 32).astype(np.uint32)
    for text in np.flatnonzero(count < ngram):                                   # too short for a window: plainly
        hashed[begin[text]], = shingles(texts[text], ngram)
    return hashed, sizes

def minhash_batch(shingles: np.ndarray, sizes: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`minhash` of many documents: (S,) uint32, (d,) sizes >= 1 -> (H, d) uint32. Modulo 2^32 is what uint32 does."""
    starts = np.cumsum(sizes) - sizes
    signatures, scratch = np.empty((len(a), len(sizes)), np.uint32), np.empty_like(shingles)
    for row, multiplier, offset in zip(signatures, a, b):
        np.multiply(shingles, multiplier, out=scratch)
        np.add(scratch, offset, out=scratch)
        np.minimum.reduceat(scratch, starts, out=row)
    return signatures

def band_keys(signatures: np.ndarray, num_bands: int) -> np.ndarray:
    """Each band's number and R places as 64 bits: (H, d) uint32 -> (d, B) uint64. Sharing one makes two candidates."""
    H, d = signatures.shape
    keys = np.repeat(np.arange(num_bands, dtype=np.uint64)[:, None], d, axis=1)  # (B, d)
    for place in signatures.reshape(num_bands, H // num_bands, d).swapaxes(0, 1):
        keys = mix((keys + GOLDEN) ^ place)
    return keys.T

# ---- Larger than memory: files in, partitions on disk, files out ----------------------------------------------------
class Partitions:
    """Records of uint64 columns on disk, in 256 files by the top byte of the first column, which must be spread evenly:
    each fits into memory. Iterating gives all records in order of the first column, a file at a time."""

    def __init__(self, path: Path, columns: int):
        self.path, self.columns, self.pending, self.waiting = path, columns, [], 0

    def add(self, records: np.ndarray, limit: int = 1 << 17) -> None:
        self.pending.append(records)                                             # (n, columns)
        self.waiting += len(records)
        if self.waiting < limit:
            return
        records = np.concatenate(self.pending)
        part = (records[:, 0] >> 56).astype(np.uint8)
        order = np.argsort(part, kind="stable")
        for i, rows in enumerate(np.split(records[order], np.searchsorted(part[order], np.arange(1, 256)))):
            with open(f"{self.path}.{i}", "ab") as f:
                f.write(rows)                                   # tofile would keep silent about a full disk
        self.pending, self.waiting = [], 0

    def __iter__(self):
        self.add(np.empty((0, self.columns), np.uint64), limit=0)                # what is still pending
        for i in range(256):
            records = np.fromfile(f"{self.path}.{i}", np.uint64).reshape(-1, self.columns)
            if len(records):
                yield records[np.argsort(records[:, 0])]

@contextlib.contextmanager
def write_whole(path: str | os.PathLike) -> Iterator[BinaryIO]:   # twin: train.py
    """Opens a temporary file beside `path`, and renames it onto `path` only when everything was written."""
    if (path := Path(path)).exists() and not path.is_file():   # a folder, or /dev/null, which root would replace
        raise FileExistsError(f"{path} is there and is no file; name another")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())                       # the rename must not reach the disk before the bytes do
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def open_output(path: Path):
    """The file for writing, gzipped if its name says so; the same content gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return gzip.GzipFile(path, "wb", compresslevel=6, mtime=0) if path.suffix == ".gz" else open(path, "wb")

def read_batches(paths, whole: bool = True):
    """Yields lists of (path, line number, bytes) of about BATCH bytes: the lines of .jsonl[.gz] files, a document each,
    and any other file as one document or, if not whole, as blocks of whole lines. Raises ValueError for broken gzip."""
    batch, size = [], 0
    for path in paths:
        try:
            with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as f:
                if path.name.endswith(JSON_LINES):
                    pieces = f
                else:
                    pieces = [f.read()] if whole else iter(lambda: f.read(BATCH) + f.readline(), b"")
                for number, raw in enumerate(pieces, 1):
                    batch.append((path, number, raw))
                    size += len(raw) + 64
                    if size >= BATCH:
                        yield batch
                        batch, size = [], 0
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: broken gzip ({error}); make the file again or leave it out") from None
    if batch:
        yield batch

def parse_text(path: Path, number: int, raw: bytes) -> str:
    """The text of a document. Raises ValueError with file, line and remedy if it should be JSON and is not."""
    if not path.name.endswith(JSON_LINES):
        return raw.decode("utf-8", "replace")
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        text = json.loads(raw)["text"]
        if isinstance(text, str):
            return text
    raise ValueError(f'{path}, line {number}: not a JSON object with a string under "text"; correct or remove the line')

def collect_inputs(input_files, output_dir: Path) -> dict[str, Path]:
    """Files, and what folders hold but for hidden files and .json reports -> {name in the output: path}."""
    files, out = {}, output_dir.resolve()
    for given in map(Path, [input_files] if isinstance(input_files, (str, Path)) else input_files):
        if not given.is_file() and not given.is_dir():
            raise ValueError(f"{given} does not exist, or is no file that can be read twice; give files or folders")
        folder = given if given.is_dir() else given.parent
        if out == folder.resolve() or folder == given and folder.resolve() in out.parents:
            raise ValueError(f"the output {output_dir} and the input {given} overlap; write to another folder")
        for path in sorted(given.rglob("*")) if folder == given else [given]:
            name = path.relative_to(folder)
            if path == given or path.is_file() and path.suffix != ".json" and not re.search(r"(^|/)\.", str(name)):
                if files.setdefault(str(name), path) != path:
                    raise ValueError(f"{path} and {files[str(name)]} would get the same name; rename one of them")
    if not files:
        raise ValueError("no input files; give at least one file, or a folder that holds some")
    return files

@contextlib.contextmanager
def staged_output(output_dir: Path, names):
    """A scratch folder inside output_dir. What is under its out/ moves into place at the end, all of it or nothing."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".dedup-", dir=output_dir) as stage:
        yield Path(stage)
        for name in names:
            if (made := Path(stage, "out", name)).exists():
                (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(made, output_dir / name)
            else:
                (output_dir / name).unlink(missing_ok=True)                      # what an earlier run left there

def follow_parent() -> None:   # twin: data_filter.py
    """In a worker: ends it when the process that started it is gone, be it by kill -9; a pool alone would not."""
    threading.Thread(target=lambda: os._exit(multiprocessing.parent_process().join() or 1), daemon=True).start()

def run_jobs(function, jobs, files: dict[str, Path], num_processes: int | None):
    """map(function, jobs) over processes, in order, with few jobs waiting at a time; for 4 MB of files one will do.
    Raises: ChildProcessError if a process was killed."""
    if num_processes == 1 or sum(path.stat().st_size for path in files.values()) < 4 << 20:
        yield from map(function, jobs)
        return
    num_processes, waiting = num_processes or os.cpu_count() or 1, deque()
    try:
        with ProcessPoolExecutor(num_processes, initializer=follow_parent) as pool:
            for job in jobs:
                waiting.append(pool.submit(function, job))
                if len(waiting) > 2 * num_processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenExecutor:
        raise ChildProcessError("a process was killed, for lack of memory? Try fewer --num-processes") from None

# ---- Exact lines ----------------------------------------------------------------------------------------------------
def hash_lines(batch) -> tuple[np.ndarray, list[bytes]]:
    """A 64-bit hash of each line, without its ending, and the texts or blocks that the lines are of."""
    texts = [parse_text(*document).encode("utf-8", "surrogatepass") if document[0].name.endswith(JSON_LINES)
             else document[2] for document in batch]
    ended = [text if not text or text.endswith(b"\n") else text + b"\n" for text in texts]
    buffer = np.frombuffer(b"".join(ended) + b" " * 8, np.uint8)
    ends = np.flatnonzero(buffer == ord("\n"))
    starts = np.append(0, ends + 1)[:-1]
    lengths = ends - starts
    lengths -= (lengths > 0) & (buffer[ends - 1] == ord("\r"))
    return hash_spans(buffer, starts, lengths), texts

def _drop_lines(job) -> int:
    path, target, repeated_path = job
    repeated, kept = np.memmap(repeated_path, np.uint64, "r"), 0                 # sorted; behind the last a stopper
    with open_output(target) as out:
        for batch in read_batches([path], whole=False):
            hashes, texts = hash_lines(batch)
            keep = iter((repeated[np.searchsorted(repeated[:-1], hashes)] != hashes).tolist())
            for (_, _, raw), text in zip(batch, texts):
                lines = LINE.findall(text)
                left = list(compress(lines, keep))                               # takes one flag a line
                kept += len(left)
                if len(left) == len(lines):
                    out.write(raw)
                elif not path.name.endswith(JSON_LINES):
                    out.write(b"".join(left))
                elif any(map(bytes.strip, left)):                                # a text without lines is no document
                    record = json.loads(raw) | {"text": b"".join(left).decode("utf-8", "surrogatepass")}
                    out.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
    return kept

def exact_line_dedup(input_files, output_dir, *, num_processes: int | None = None) -> dict:
    """Writes each input file to output_dir with only the lines that occur once in all files together.

    Args: input_files: paths of files or folders; of .jsonl[.gz] files the lines of every object's "text" count, and an
            object that is left without any is dropped. output_dir: created; files keep their names, empty ones too.
    Returns: {"lines", "distinct_lines", "repeated_lines" (distinct ones), "kept_lines", "bytes"}.
    Raises: ValueError for missing or clashing files, broken gzip or JSON; then nothing is written.
    Memory: a constant, and 8 bytes a line that occurs more than once, shared by all processes. Disk: 8 bytes a line.
    Example: files b"a\\nb\\n" and b"b\\nc" -> b"a\\n" and b"c"
    """
    output_dir = Path(output_dir)
    files = collect_inputs(input_files, output_dir)
    with staged_output(output_dir, files) as stage:
        hashed, size, lines, distinct, repeated = Partitions(stage / "lines", 1), 0, 0, 0, 0
        for hashes, texts in run_jobs(hash_lines, read_batches(files.values(), whole=False), files, num_processes):
            size, lines = size + sum(map(len, texts)), lines + len(hashes)
            hashed.add(hashes[:, None])
        with open(stage / "repeated", "wb") as out:
            for records in hashed:
                values, counts = np.unique(records, return_counts=True)
                out.write(values[counts > 1])
                distinct, repeated = distinct + len(values), repeated + int((counts > 1).sum())
            out.write(np.array([MASK], np.uint64))
        jobs = ((path, stage / "out" / name, stage / "repeated") for name, path in files.items())
        kept = sum(run_jobs(_drop_lines, jobs, files, num_processes))
    return {"lines": lines, "distinct_lines": distinct, "repeated_lines": repeated, "kept_lines": kept, "bytes": size}

# ---- Fuzzy documents ------------------------------------------------------------------------------------------------
def _sign(job) -> tuple[Counter, int, np.ndarray, np.ndarray, np.ndarray]:
    batch, ngram, a, b, num_bands = job
    hashes, sizes = shingle_batch([parse_text(*document) for document in batch], ngram)
    keys = band_keys(minhash_batch(hashes, sizes, a, b), num_bands)
    return Counter(path for path, _, _ in batch), sum(len(raw) for _, _, raw in batch), keys, hashes, sizes

def candidate_pairs(keys: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Records sorted by key -> (low, high) pairs of documents that share one, (n, 2) uint64, some more than once. In a
    bucket of over BUCKET documents, where all pairs might be billions, everyone with the first and with the next."""
    first = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
    size = np.diff(first, append=len(keys))                                      # of each bucket
    left, right, lag = [np.repeat(documents[first], size)], [documents], 1
    while (same := keys[lag:] == keys[:-lag]).any():
        left.append(documents[:-lag][same])
        right.append(documents[lag:][same])
        if lag == 1:
            small = np.repeat(size <= BUCKET, size)
            keys, documents = keys[small], documents[small]
        lag += 1
    left, right = np.concatenate(left), np.concatenate(right)
    return np.stack([np.minimum(left, right), np.maximum(left, right)], axis=1)[left != right]

def _verify(job) -> list[tuple[int, int]]:
    pairs, stage, threshold = job
    data, ends = np.memmap(stage / "shingles", np.uint32, "r"), np.memmap(stage / "ends", np.uint64, "r")
    load = lru_cache(2)(lambda document: set(data[ends[document]:ends[document + 1]].tolist()))
    return [(low, high) for low, high in pairs if jaccard(load(low), load(high)) >= threshold]

def _write_survivors(job) -> None:
    path, target, keep = job
    target.parent.mkdir(parents=True, exist_ok=True)
    if keep.all():
        shutil.copyfile(path, target)
    elif path.name.endswith(JSON_LINES):
        flags = iter(keep.tolist())
        with open_output(target) as out:
            for batch in read_batches([path]):
                out.writelines(compress((raw for _, _, raw in batch), flags))

def minhash_dedup(input_files, output_dir, *, num_hashes: int = 140, num_bands: int = 20, ngram: int = 5,
                  jaccard_threshold: float = 0.8, verify: bool = True, seed: int = 0, num_processes: int | None = None,
                  report=None, log=None) -> dict:
    """Writes to output_dir one document of each cluster of near-duplicates, and every document that is in none.

    Args: input_files: paths of files or folders; a line of a .jsonl[.gz] file is a document ("text" is compared), any
            other file is one. output_dir: created; survivors are byte-identical and keep their file names.
        num_hashes = num_bands * R: a pair is a candidate with chance 1 - (1 - s^R)^num_bands. ngram: words a shingle.
        jaccard_threshold in (0, 1]: candidates below it are let go; with verify=False none is looked at again.
        seed: picks the hash functions and each cluster's survivor. report: path for the clusters, a line "kept TAB
        removed" a removed document. log: called with progress lines. num_processes: None for one a processor.
    Returns: {"documents", "kept", "clusters" (of two or more), "largest", "candidate_pairs", "bytes"}.
    Raises: ValueError for parameters that do not fit and for files as in exact_line_dedup; then nothing is written.
    Memory: a constant, the largest document, 5 bytes a document. Disk: 16 * num_bands bytes a document, 4 a word; in a
            folder .dedup-* in output_dir, which a run that is killed leaves there.
    Example: minhash_dedup("pages", "clean")["kept"], with {"text": "Hello, world"} and {"text": "hello world!"} -> 1
    """
    if num_hashes < 1 or num_bands < 1 or num_hashes % num_bands:
        raise ValueError(f"num_hashes ({num_hashes}) must be a multiple of num_bands ({num_bands}), 1 or more")
    if ngram < 1 or not 0 < jaccard_threshold <= 1:
        raise ValueError(f"ngram ({ngram}) must be at least 1 and jaccard_threshold ({jaccard_threshold}) in (0, 1]")
    output_dir, begin, two32 = Path(output_dir), time.perf_counter(), np.uint64(1 << 32)
    files, (a, b) = collect_inputs(input_files, output_dir), permutations(num_hashes, seed)
    with staged_output(output_dir, files) as stage:
        # 1. Sign: every document's band keys go to partitions, its shingles to one long file.
        jobs = ((batch, ngram, a, b, num_bands) for batch in read_batches(files.values()))
        bands = Partitions(stage / "bands", 2)
        count, documents, size, end, last = Counter(), 0, 0, 0, begin            # count: documents of each file
        with open(stage / "shingles", "wb") as shingles_file, open(stage / "ends", "wb") as ends_file:
            ends_file.write(np.zeros(1, np.uint64))
            for counted, length, keys, hashes, sizes in run_jobs(_sign, jobs, files, num_processes):
                ids = np.arange(documents, documents + len(keys), dtype=np.uint64)
                bands.add(np.stack([keys.ravel(), np.repeat(ids, num_bands)], axis=1))
                if verify:
                    shingles_file.write(hashes)
                    ends_file.write(np.cumsum(sizes, dtype=np.uint64) + end)
                count, end = count + counted, end + len(hashes)
                documents, size, now = documents + len(keys), size + length, time.perf_counter()
                if log and now - last > 10:
                    last, s = now, now - begin
                    log(f"file {len(count)}/{len(files)} | {documents:,} documents | {documents / s:,.0f} documents/s"
                        f" | {size / s / 1e6:.1f} MB/s | eta {s * (len(files) / len(count) - 1):.0f}s")
        # 2. Bucket: equal keys lie together now.
        candidates, spread = Partitions(stage / "pairs", 2), np.array([MASK // max(documents, 1), 1], np.uint64)
        for records in bands:
            candidates.add(candidate_pairs(records[:, 0], records[:, 1]) * spread)
        # 3. Verify and cluster. Two documents that others have joined already need no look.
        parents, found = np.arange(documents, dtype=np.uint32), 0
        parent = memoryview(parents)

        def verifying():
            nonlocal found
            for records in candidates:
                pairs = np.unique(records[:, 0] // spread[0] * two32 + records[:, 1])
                found += len(pairs)
                for low in range(0, len(pairs), 1024):
                    chunk = zip(*(side.tolist() for side in np.divmod(pairs[low:low + 1024], two32)))
                    yield [(x, y) for x, y in chunk if find(parent, x) != find(parent, y)], stage, jaccard_threshold

        similar = run_jobs(_verify, verifying(), files, num_processes) if verify else (job[0] for job in verifying())
        for x, y in chain.from_iterable(similar):
            union(parent, x, y, seed)
        # 4. Write: the root of each cluster survives.
        keep = parents == np.arange(documents, dtype=np.uint32)
        first = np.cumsum([0] + [count[path] for path in files.values()])        # number of each file's first document
        jobs = ((path, stage / "out" / name, keep[i:j]) for (name, path), i, j in zip(files.items(), first, first[1:]))
        deque(run_jobs(_write_survivors, jobs, files, num_processes), maxlen=0)
        removed = np.flatnonzero(~keep)
        roots = np.fromiter((find(parent, x) for x in removed.tolist()), np.int64, len(removed))
        if report:
            def place(document, names=list(files)):
                i = np.searchsorted(first, document, side="right") - 1
                return f"{names[i]}#{document - first[i] + 1}" if names[i].endswith(JSON_LINES) else names[i]

            with write_whole(report) as f:
                for i in np.argsort(roots, kind="stable"):
                    f.write(f"{place(roots[i])}\t{place(removed[i])}\n".encode("utf-8", "surrogateescape"))
    sizes = np.unique(roots, return_counts=True)[1] + 1
    return {"documents": documents, "kept": documents - len(removed), "clusters": len(sizes),
            "largest": int(sizes.max(initial=min(documents, 1))), "candidate_pairs": found, "bytes": size}

# ---- Show, check, measure -------------------------------------------------------------------------------------------
def measured_recall(s: float, pairs: int, seed: int = 0) -> float:
    """Share of pairs of random sets, 100 s of their 100 elements in common, that share one of 20 bands of 7 hashes."""
    common = round(100 * s)
    sets = np.random.default_rng((seed, common)).integers(0, 2**32, (pairs, 100), dtype=np.uint32)
    (a, b), half, keys = permutations(140, seed), 50 + common // 2, []
    for document in sets[:, :half], np.concatenate([sets[:, :common], sets[:, half:]], axis=1):
        keys.append(band_keys(minhash_batch(document.ravel(), np.full(pairs, document.shape[1]), a, b), 20))
    return float((keys[0] == keys[1]).any(axis=1).mean())

def walk_through(seed: int = 0) -> None:
    """Three short texts from characters to clusters, then the S-curve beside what the code does."""
    texts = ["The cat sat on the mat; the dog lay by the door, and nobody in the old house said a word all evening.",
             "THE CAT sat on the mat -- the dog lay by the door, and nobody in the old house said a word all day!",
             "Rain fell over the harbour for the third day, and the ferries stayed where they were."]
    sets = [shingles(text, 3) for text in texts]
    signatures = [minhash(document, *permutations(140, seed)) for document in sets]
    print("words of text 1:", " ".join(words(texts[1])))
    for i in 0, 2:
        same = [x == y for x, y in zip(signatures[i], signatures[1])]
        bands = sum(all(same[k:k + 7]) for k in range(0, 140, 7))
        print(f"text {i} and text 1: {len(sets[i] & sets[1])} of {len(sets[i] | sets[1])} 3-grams in common, Jaccard "
              f"{jaccard(sets[i], sets[1]):.2f}; {sum(same)} of 140 hashes and {bands} of 20 bands agree")
    print("stands for each:", plain_minhash_dedup(texts, ngram=3, seed=seed))
    print("\nsimilarity  1-(1-s^7)^20  measured  (# theory, o measured)")
    for s in np.arange(1, 10) / 10:
        theory, measured = float(lsh_probability(s, 20, 7)), measured_recall(s, 5000, seed)
        bar = list("#" * round(40 * theory) + " " * 41)
        bar[round(40 * measured)] = "o"
        print(f"{s:10.1f}  {theory:12.3f}  {measured:8.3f}  {''.join(bar).rstrip()}")

def self_check(seed: int = 0) -> None:
    """Fast against plain, bit for bit: shingles, signatures, lines left, survivors; and one hash against a known one.
    Raises AssertionError."""
    assert hash_bytes(b"stable across machines") == 0xa88580f218be1aed, "the hash has changed"
    rng = np.random.default_rng(seed)
    vocabulary = ["a", "of", "Straße", "naïve", "“deduplication”", "ς", "Under-standing's", "字", "가", "\u200b", "?!"]
    texts = [" ".join(rng.choice(vocabulary, size)) for size in (0, 1, 2, 3, 9, 40, 200)] + ["!", "?", "?", "a\ud800"]
    texts += [text.upper().replace(" ", "\n") for text in texts] + [text + " more" for text in texts]
    (hashed, sizes), (a, b) = shingle_batch(texts, 3), permutations(28, seed)
    signatures = minhash_batch(hashed, sizes, a, b)
    for i, (text, end) in enumerate(zip(texts, np.cumsum(sizes))):
        assert set(hashed[end - sizes[i]:end].tolist()) == shingles(text, 3), f"shingles of {text!r}"
        assert signatures[:, i].tolist() == minhash(shingles(text, 3), a, b), f"signature of {text!r}"
    lines = [b"a\nb\r\n\n", b"b\nc", b"", b"\xff\n" + b"long line " * 99 + b"\nlong line", b"a\rb\nc\n\n\nend\r"]
    with tempfile.TemporaryDirectory() as folder:
        source, out = [Path(folder, str(i)) for i in range(len(lines))], Path(folder, "out")
        for path, data in zip(source, lines):
            path.write_bytes(data)
        exact_line_dedup(source, out)
        assert [(out / path.name).read_bytes() for path in source] == plain_exact_line_dedup(lines), "lines left"
        corpus = Path(folder, "t.jsonl")
        corpus.write_text("".join(json.dumps({"url": i, "text": text}) + "\n" for i, text in enumerate(texts)))
        for options in dict(jaccard_threshold=0.5, seed=seed + 1), dict(verify=False, num_hashes=30, num_bands=10):
            minhash_dedup([corpus], out, ngram=3, **options)
            left = [json.loads(line)["url"] for line in (out / "t.jsonl").read_text().splitlines()]
            assert left == sorted(set(plain_minhash_dedup(texts, ngram=3, **options))), f"survivors with {options}"

def bench(documents: int = 100_000, num_words: int = 400, seed: int = 0) -> None:
    """Both jobs on JSON lines of random words, a fifth of the documents near-duplicates: speed and peak memory of this
    file as a process of its own, then the speed of datasketch, if it is there, on the first 2,000 documents."""
    rng = np.random.default_rng(seed)
    vocabulary = np.array(["".join(rng.choice(list("aeiounrstlmd"), size)) for size in rng.integers(2, 9, 30_000)])
    vocabulary[::50] = np.char.add(vocabulary[::50], "é")
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus.jsonl")
        with open(corpus, "w", encoding="utf-8") as f:
            for i in range(documents):
                fresh = vocabulary[(30_000 * rng.random(num_words) ** 3).astype(int)]      # few words are frequent
                tokens = fresh if i % 5 < 4 else np.where(rng.random(num_words) < 0.02, fresh, tokens)
                text = "\n".join(" ".join(tokens[k:k + 10]) for k in range(0, num_words, 10))
                f.write(json.dumps({"url": str(i), "text": text}, ensure_ascii=False) + "\n")
        for options in ["--num-processes", "1"], [], ["--exact"]:
            print("\npython dedup.py corpus.jsonl --out out", *options, flush=True)
            subprocess.run([sys.executable, __file__, corpus, "--out", f"{folder}/out", *options], check=True)
        lines = corpus.read_text(encoding="utf-8").splitlines()[:2000]
    try:
        datasketch = __import__("datasketch")
    except ImportError:
        return print("\npip install datasketch shows its speed beside this")
    begin, cpu = time.perf_counter(), time.process_time()
    index, pairs = datasketch.MinHashLSH(num_perm=140, params=(20, 7)), 0
    for i, line in enumerate(lines):
        tokens, sketch = json.loads(line)["text"].lower().split(), datasketch.MinHash(140)   # the least one can do
        sketch.update_batch({" ".join(tokens[k:k + 5]).encode() for k in range(len(tokens) - 4)})
        pairs += len(index.query(sketch))
        index.insert(i, sketch)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    print(f"\ndatasketch {datasketch.__version__}, one process, {len(lines)} documents, {pairs} candidate pairs"
          f"\n{seconds:.1f}s, CPU {cpu:.1f}s | {len(lines) / seconds:,.0f} documents/s | "
          f"{sum(len(line.encode()) for line in lines) / seconds / 1e6:.1f} MB/s")

def main() -> int:
    """The command line. Returns the exit code: 2 where the caller has to change something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", metavar="IN", help="files and folders; or: bench [DOCUMENTS [WORDS]]")
    parser.add_argument("--out", type=Path, help="folder for what is left; the clusters go to OUT.clusters.tsv")
    parser.add_argument("--exact", action="store_true", help="lines that occur once, instead of one of near-duplicates")
    parser.add_argument("--no-verify", action="store_true", help="believe the bands")
    parser.add_argument("--text", help="also write the texts left to one file, <|endoftext|> after each")
    numbers = dict(num_hashes=140, num_bands=20, ngram=5, jaccard_threshold=0.8, seed=0, num_processes=None)
    for name, default in numbers.items():
        text = "default: all cores" if default is None else f"default: {default}"
        parser.add_argument("--" + name.replace("_", "-"), type=type(default or 0), default=default, help=text)
    args = parser.parse_args()
    try:
        if args.inputs[:1] == ["bench"]:
            if len(args.inputs) > 3 or not all(re.fullmatch("[1-9][0-9]*", number) for number in args.inputs[1:]):
                raise ValueError(f"want bench [DOCUMENTS [WORDS]], as in bench 20000 400; got {' '.join(args.inputs)}")
            bench(*map(int, args.inputs[1:]), seed=args.seed)
        elif not args.inputs:
            walk_through(args.seed)
            self_check(args.seed)
            print("fast = plain, bit for bit  OK")
        elif not args.out:
            raise ValueError("where to? add --out FOLDER")
        else:
            begin = time.perf_counter()
            if args.exact:
                result = exact_line_dedup(args.inputs, args.out, num_processes=args.num_processes)
            else:
                result = minhash_dedup(args.inputs, args.out, verify=not args.no_verify, log=print,
                                       report=f"{args.out}.clusters.tsv", **{x: vars(args)[x] for x in numbers})
            seconds = time.perf_counter() - begin
            usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
            memory = [int(use.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)) for use in usage]
            print(f"{seconds:.1f}s, CPU {sum(use.ru_utime + use.ru_stime for use in usage):.1f}s | "
                  f"{result.get('documents', 0) / seconds:,.0f} documents/s | "
                  f"{result['bytes'] / seconds / 1e6:.1f} MB/s | mem {memory[0]} MB, a worker {memory[1]} MB")
            if args.text:
                left = [args.out / name for name in collect_inputs(args.inputs, args.out)]
                with write_whole(args.text) as f:
                    for batch in read_batches(path for path in left if path.exists()):
                        f.writelines(parse_text(*text).encode("utf-8", "replace") + b"<|endoftext|>" for text in batch)
            print("RESULT", json.dumps(result))
    except (ValueError, OSError) as error:
        print(f"dedup.py: {error}", file=sys.stderr)
        return 2
    return 0

if __name__ == "__main__":
    sys.exit(main())
