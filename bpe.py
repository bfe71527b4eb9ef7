"""bpe.py - byte-level byte-pair encoding: text to token ids and back, and how the tokens are learnt.

What:       A tokenizer starts from the 256 bytes and learns to join the pair of neighbours that is most frequent, again
            and again, inside the "pre-tokens" (roughly: words with their leading space) that a pattern cuts the text into.
            Encoding replays those merges, earliest first. Nothing is ever unknown: every byte is a token.
Source:     Gage 1994, "A New Algorithm for Data Compression"; Sennrich, Haddow & Birch 2016, arXiv:1508.07909, Alg. 1;
            Radford et al. 2019 (GPT-2), section 2.2: bytes instead of characters, merges kept inside pre-tokens.
Deviations: ties are broken by the greater pair of byte strings (the papers leave it open); special tokens end a document
            and are never merged across.
Copy:       this file alone; needs numpy and regex. MIT.
Run:        python bpe.py
"""
import argparse
import functools
import heapq
import json
import os
import re
import sys
import time
import unicodedata
import warnings
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import BinaryIO, Callable, Iterable, Iterator

import numpy as np
import regex

# Dims: N bytes of text, P pre-tokens, W distinct pre-tokens ("words"), V vocabulary

# ------------------------------------------------------------------------------------------------------------------
# Pre-tokenization: merges never cross the borders of these pieces
# ------------------------------------------------------------------------------------------------------------------

PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
             r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
# Three places where all three patterns start a new pre-token, whatever stands further left or right: after a letter or
# number before a mark, after a line's end before anything visible, before a space or tab. (?r) searches from the end.
CUT = r"(?r)(?<=[\p{L}\p{N}])(?=[\p{P}\p{S}\s])|(?<=\n)(?=\S)|(?<=\S)(?=[ \t])"


def special_pattern(special_tokens: Iterable[str], prefix: str = "") -> "regex.Pattern":
    """Matches any of the special tokens, the longest that fits first (of "<a>" and "<a><a>", the latter)."""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return regex.compile(prefix + "|".join(map(regex.escape, longest_first)) if longest_first else prefix + r"(?!)")


def safe_cut(raw: bytes, special_tokens: Iterable[str]) -> int:
    """The last place where `raw` can be cut and each side still gives the tokens that the whole would; 0 if none is seen.

    It is where a special token starts or every pattern starts a pre-token, and where no special token lies across it.
    Holds whatever stands before raw or follows it. raw must start on a character; its last one may be incomplete.
    """
    special_tokens = sorted(special_tokens)
    reach = max(map(len, special_tokens), default=1)          # a special token that lies across is at most this near
    special = special_pattern(special_tokens)
    candidates = regex.compile(CUT + f"|(?={special.pattern})")
    window = 4096
    while True:
        start = max(0, len(raw) - window)
        while start < len(raw) and raw[start] & 0xC0 == 0x80:  # step forward to the first byte of a character
            start += 1
        text = raw[start:].decode("utf-8", "ignore")
        for match in candidates.finditer(text, reach, max(reach, len(text) - reach)):
            cut = match.start()
            near = text[cut - reach:cut + reach]
            if not any(m.start() < reach < m.end() for m in special.finditer(near, overlapped=True)):
                return start + len(text[:cut].encode())
        if start == 0:
            return 0
        window *= 8


def read_chunks(path: str, special_tokens: Iterable[str], start: int = 0, end: int | None = None,
                size: int = 1 << 21) -> Iterator[bytes]:
    """The bytes of a file from start to end, in chunks of about `size` that end at a safe cut."""
    special_tokens = list(special_tokens)
    end = os.path.getsize(path) if end is None else end
    with open(path, "rb") as f:
        f.seek(start)
        rest, want = b"", size
        while start < end:
            data = f.read(min(want, end - start))
            if not data:
                raise ValueError(f"{path} became shorter while it was read; run again when nothing writes to it")
            start += len(data)
            data = rest + data
            cut = len(data) if start == end else safe_cut(data, special_tokens)
            if cut:
                yield data[:cut]
            rest, want = data[cut:], size if cut else 2 * want
    

def file_ranges(path: str, num_ranges: int, special_tokens: Iterable[str]) -> list[tuple[int, int]]:
    """Cuts a file into about num_ranges stretches (start, end) that can be tokenized apart."""
    special_tokens, size = list(special_tokens), os.path.getsize(path)
    cuts = [0]
    with open(path, "rb") as f:
        for i in range(1, num_ranges):
            target, window, cut = max(cuts[-1], size * i // num_ranges), 1 << 14, 0
            while not cut and target + window < size:
                f.seek(target)
                raw = f.read(window)
                skip = next((k for k in range(4) if raw[k] & 0xC0 != 0x80), 0)
                cut = safe_cut(raw[skip:], special_tokens)
                window *= 8
            if cut:
                cuts.append(target + skip + cut)
    return list(zip(cuts, cuts[1:] + [size]))


def decode_utf8(raw: bytes, path: str, offset: int = 0) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text: byte 0x{raw[e.start]:02x} at offset {offset + e.start}; "
                         f"convert it first (iconv -t utf-8) or leave it out") from None


def check_special_tokens(special_tokens: Iterable[str]) -> list[str]:
    if isinstance(special_tokens, str):
        raise ValueError(f"special_tokens must be a list of strings, got the string {special_tokens!r}")
    special_tokens = list(special_tokens or ())
    for token in special_tokens:
        if not isinstance(token, str) or not token:
            raise ValueError(f"special tokens must be strings of at least one character, got {token!r}")
    for token, times in Counter(special_tokens).items():
        if times > 1:
            raise ValueError(f"special token {token!r} is given {times} times; name each once")
    return special_tokens


# ------------------------------------------------------------------------------------------------------------------
# Training, plain
# ------------------------------------------------------------------------------------------------------------------

def count_words_plain(path: str, special_tokens: list[str], start: int = 0, end: int | None = None) -> dict[bytes, int]:
    """How often each pre-token occurs in a stretch of a file. Memory follows the distinct ones, not the file."""
    counts: Counter[str] = Counter()
    special, pattern = special_pattern(special_tokens), regex.compile(PATTERNS["gpt2"])
    for raw in read_chunks(path, special_tokens, start, end):
        for document in special.split(decode_utf8(raw, path, start)):
            counts.update(pattern.findall(document))
        start += len(raw)
    return {word.encode(): count for word, count in counts.items()}


def greatest_first(a: bytes, b: bytes) -> str:
    """A key under which the lexicographically greatest pair of byte strings sorts first.

    Every byte is mirrored, and a mark above all of them ends each string: of "a" and "ab" the longer must come first.
    """
    return "".join([chr(255 - byte) for byte in a] + [END_MARK] + [chr(255 - byte) for byte in b] + [END_MARK])


END_MARK = chr(256)


def merge_words_plain(word_counts: dict[bytes, int], num_merges: int, log: Callable[[str], None] | None = None,
                      ) -> list[tuple[bytes, bytes]]:
    """The merges, in order: each time the most frequent pair of neighbours over all words; ties by greatest_first.

    Only the words that hold the pair are touched. The heap's counts are upper bounds, for the count of a pair that is
    already there never grows (a merge makes pairs with its new token only): one that is stale is put back when popped.
    Example: merge_words_plain({b"low": 5, b"lower": 2}, 1) -> [(b"o", b"w")]   # ties with (b"l", b"o"), and greater
    """
    words = [list(word) for word in word_counts]
    counts = list(word_counts.values())
    token_bytes = [bytes([i]) for i in range(256)]
    pair_count: dict[tuple[int, int], int] = defaultdict(int)
    pair_words: dict[tuple[int, int], set[int]] = defaultdict(set)
    for w, ids in enumerate(words):
        for pair in zip(ids, ids[1:]):
            pair_count[pair] += counts[w]
            pair_words[pair].add(w)
    def entry(pair):
        return -pair_count[pair], greatest_first(token_bytes[pair[0]], token_bytes[pair[1]]), pair
    heap = [entry(pair) for pair in pair_count]
    heapq.heapify(heap)
    merges: list[tuple[bytes, bytes]] = []
    report = progress("merge", num_merges, log)
    while len(merges) < num_merges and heap:
        bound, _, pair = heapq.heappop(heap)
        if pair_count[pair] != -bound:
            if pair_count[pair] > 0:
                heapq.heappush(heap, entry(pair))
            continue
        new = len(token_bytes)
        token_bytes.append(token_bytes[pair[0]] + token_bytes[pair[1]])
        merges.append((token_bytes[pair[0]], token_bytes[pair[1]]))
        changed = set()
        for w in pair_words.pop(pair):
            before, after = words[w], merge_pair(words[w], pair, new)
            for old in zip(before, before[1:]):
                pair_count[old] -= counts[w]
            for now in zip(after, after[1:]):
                pair_count[now] += counts[w]
                if new in now:
                    pair_words[now].add(w)
                    changed.add(now)
            words[w] = after
        for now in changed:
            heapq.heappush(heap, entry(now))
        report(len(merges))
    return merges


def merge_pair(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Replaces the pair by the new id from left to right: merge_pair([7, 7, 7], (7, 7), 9) -> [9, 7]."""
    out, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and ids[i] == pair[0] and ids[i + 1] == pair[1]:
            out.append(new)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


def progress(what: str, total: float, log: Callable[[str], None] | None) -> Callable[[float], None]:
    """A function to call with the amount done; it logs a line with the time left every two seconds."""
    began = last = time.monotonic()

    def report(done: float) -> None:
        nonlocal last
        now = time.monotonic()
        if log and now - last >= 2 and done:
            last = now
            log(f"{what} {done:,.0f}/{total:,.0f} | {now - began:.0f}s | eta {(now - began) * (total - done) / done:.0f}s")
    return report


def in_order(pool: ProcessPoolExecutor, function: Callable, jobs: Iterable[tuple], ahead: int) -> Iterator:
    """function(*job) for every job over the pool's processes, results in order, at most `ahead` jobs in flight."""
    pending: deque = deque()
    for job in jobs:
        pending.append(pool.submit(function, *job))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def train_bpe(input_path: str | os.PathLike, vocab_size: int, special_tokens: list[str], num_processes: int | None = None,
              log: Callable[[str], None] | None = print) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    """Learns a byte-level BPE vocabulary from a UTF-8 text file, with GPT-2's pre-tokenization, over its raw bytes.

    Args: vocab_size: all tokens together; special_tokens: strings that split the text and are never part of a merge;
          num_processes: for the counting (default: all cores); log: takes lines of progress, None for silence.
    Returns: vocab {id: bytes}: ids 0..255 are the bytes, then the special tokens as given, then the merges in order;
             merges [(left, right)] in the order in which they were made. Fewer than asked for if no pair is left.
    Raises: ValueError for a vocabulary too small, bad special tokens, an empty file or one that is not UTF-8.
    Example: train_bpe("corpus.txt", 10_000, ["<|endoftext|>"])
    """
    path, special_tokens = os.fspath(input_path), check_special_tokens(special_tokens)
    for a in special_tokens:
        for b in special_tokens:
            if a != b and a in b:
                raise ValueError(f"special tokens overlap: {a!r} is part of {b!r}; leave one out of the training")
    num_merges = vocab_size - 256 - len(special_tokens)
    if num_merges < 0:
        raise ValueError(f"vocab_size {vocab_size} is too small: 256 bytes and {len(special_tokens)} special tokens need "
                         f"{256 + len(special_tokens)}")
    size = os.path.getsize(path)
    if size == 0:
        raise ValueError(f"{path} is empty; there is nothing to learn from")
    word_counts = count_words(path, special_tokens, num_processes, log)
    merges = merge_words_plain(word_counts, num_merges, log)
    if len(merges) < num_merges and log:
        log(f"stopped early: no pair is left after {len(merges):,} merges of {num_merges:,}; the vocabulary has "
            f"{256 + len(special_tokens) + len(merges):,} tokens")
    tokens = [bytes([i]) for i in range(256)] + [s.encode() for s in special_tokens] + [a + b for a, b in merges]
    return dict(enumerate(tokens)), merges


def count_words(path: str, special_tokens: list[str], num_processes: int | None = None,
                log: Callable[[str], None] | None = None) -> dict[bytes, int]:
    """count_words_plain over the whole file, by several processes."""
    size = os.path.getsize(path)
    num_processes = min(num_processes or os.cpu_count() or 1, 1 + size // (1 << 20))
    if num_processes == 1:
        return count_words_plain(path, special_tokens)
    ranges = file_ranges(path, 4 * num_processes, special_tokens)
    report, total = progress("count bytes", size, log), Counter()
    with ProcessPoolExecutor(num_processes) as pool:
        jobs = [(path, special_tokens, start, end) for start, end in ranges]
        for (_, end), counts in zip(ranges, in_order(pool, count_words_plain, jobs, len(jobs))):
            total.update(counts)
            report(end)
    return total


# ------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ------------------------------------------------------------------------------------------------------------------

@functools.cache
def byte_to_unicode() -> dict[int, str]:
    """GPT-2's way to write bytes as printable characters: visible Latin-1 as itself, the others from U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in visible]
    return {**{b: chr(b) for b in visible}, **{b: chr(256 + i) for i, b in enumerate(hidden)}}


@functools.cache
def unicode_to_byte() -> dict[str, int]:
    return {char: byte for byte, char in byte_to_unicode().items()}


def token_to_text(token: bytes) -> str:
    return "".join(map(byte_to_unicode().__getitem__, token))


def text_to_token(text: str, path: str) -> bytes:
    try:
        return bytes(map(unicode_to_byte().__getitem__, text))
    except KeyError as e:
        raise ValueError(f"{path}: token {text!r} has the character {e}, which stands for no byte; "
                         f"only byte-level vocabularies can be read") from None


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file that appears under its name when the block ends without an error, and not at all otherwise."""
    path = os.fspath(path)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:
            yield f
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


class Tokenizer:
    """Text to token ids and back.

    Args: vocab {id: bytes}; merges [(left, right)], earliest first; special_tokens: strings that become one token each
          wherever they stand; those that the vocabulary lacks are appended to it. pattern: a key of PATTERNS.
          ignore_merges: a pre-token that is itself in the vocabulary is taken whole (Llama 3). normalize: "NFC" or None.
    Raises: ValueError if a byte is missing from the vocabulary, or a merge's parts or product are.
    Example: t = Tokenizer({**{i: bytes([i]) for i in range(256)}, 256: b"hi"}, [(b"h", b"i")]); t.encode("hi!") -> [256, 33]
    """
    cache_limit = 1 << 17                                       # words remembered; then it starts anew

    def __init__(self, vocab: dict[int, bytes], merges: list[tuple[bytes, bytes]], special_tokens: list[str] | None = None,
                 *, pattern: str = "gpt2", ignore_merges: bool = False, normalize: str | None = None):
        if pattern not in PATTERNS:
            raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, got {pattern!r}")
        self.vocab, self.merges = dict(vocab), merges
        self.pattern, self.ignore_merges, self.normalize = pattern, ignore_merges, normalize
        self.token_id = {token: i for i, token in self.vocab.items()}
        missing = [i for i in range(256) if bytes([i]) not in self.token_id]
        if missing:
            raise ValueError(f"the vocabulary lacks {len(missing)} of the 256 single bytes, byte {missing[0]} first; "
                             f"a byte-level vocabulary needs them all")
        try:
            ids = self.token_id
            self.ranks = {(ids[a], ids[b]): (rank, ids[a + b]) for rank, (a, b) in reversed(list(enumerate(merges)))}
        except KeyError as e:
            raise ValueError(f"a merge needs the token {e.args[0]!r}, which the vocabulary lacks") from None
        self.special_tokens: dict[str, int] = {}
        for token in check_special_tokens(special_tokens or []):
            raw = token.encode()
            if raw not in self.token_id:
                self.token_id[raw] = max(self.vocab) + 1
                self.vocab[self.token_id[raw]] = raw
            self.special_tokens[token] = self.token_id[raw]
        self._special = special_pattern(self.special_tokens)
        self._words = regex.compile(PATTERNS[pattern])
        self._cache: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> list[int]:
        """The token ids of a text. Raises: ValueError for lone surrogates, which have no UTF-8 form."""
        ids: list[int] = []
        position = 0
        for match in self._special.finditer(text):
            ids += self._encode_ordinary(text[position:match.start()])
            ids.append(self.special_tokens[match.group()])
            position = match.end()
        return ids + self._encode_ordinary(text[position:])

    def _encode_ordinary(self, text: str) -> list[int]:
        if self.normalize and not text.isascii():
            text = unicodedata.normalize(self.normalize, text)
        ids: list[int] = []
        cache = self._cache
        for word in self._words.findall(text):
            known = cache.get(word)
            if known is None:
                if len(cache) >= self.cache_limit:
                    cache.clear()
                known = cache[word] = self._merge_word(word)
            ids += known
        return ids

    def _merge_word(self, word: str) -> tuple[int, ...]:
        """Sennrich et al.: join the pair that was learnt first, until none of the neighbours was ever joined."""
        try:
            raw = word.encode()
        except UnicodeEncodeError as e:
            raise ValueError(f"the text has a lone surrogate, U+{ord(word[e.start]):04X}, which is no character; "
                             f"decode with errors='replace' first") from None
        if self.ignore_merges and raw in self.token_id:
            return (self.token_id[raw],)
        ids = [self.token_id[raw[i:i + 1]] for i in range(len(raw))]
        while len(ids) > 1:
            known = [pair for pair in zip(ids, ids[1:]) if pair in self.ranks]
            if not known:
                break
            first = min(known, key=self.ranks.__getitem__)
            ids = merge_pair(ids, first, self.ranks[first][1])
        return tuple(ids)

    def encode_iterable(self, chunks: Iterable[str]) -> Iterator[int]:
        """The ids of the joined chunks, however they are cut, holding little more than 64 kB of them at a time."""
        pending, want = "", 1 << 16
        for chunk in chunks:
            pending += chunk
            if len(pending) >= want:
                raw = pending.encode("utf-8", "surrogatepass")
                cut = safe_cut(raw, self.special_tokens)
                if cut:
                    yield from self.encode(raw[:cut].decode("utf-8", "surrogatepass"))
                    pending = raw[cut:].decode("utf-8", "surrogatepass")
                want = max(1 << 16, 2 * len(pending))
        yield from self.encode(pending)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; bytes that are no valid UTF-8 become U+FFFD. Raises: ValueError for an unknown id."""
        try:
            return b"".join([self.vocab[i] for i in ids]).decode("utf-8", "replace")
        except KeyError as e:
            raise ValueError(f"token id {e} is not in the vocabulary of {len(self.vocab):,} tokens") from None

    # ---- files -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_files(cls, vocab_path: str | os.PathLike, merges_path: str | os.PathLike,
                   special_tokens: list[str] | None = None) -> "Tokenizer":
        """Reads GPT-2's vocab.json ({token: id}) and merges.txt (a pair a line), tokens written with byte_to_unicode."""
        known = set(special_tokens or ())
        vocab = {i: t.encode() if t in known or t == "<|endoftext|>" else text_to_token(t, os.fspath(vocab_path))
                 for t, i in read_json(vocab_path).items()}
        with open(merges_path, encoding="utf-8") as f:
            lines = [line.rstrip("\n") for line in f if line.strip() and not line.startswith("#version")]
        return cls(vocab, parse_merges(lines, os.fspath(merges_path)), special_tokens)

    @classmethod
    def from_file(cls, tokenizer_json: str | os.PathLike) -> "Tokenizer":
        """Reads a Hugging Face tokenizer.json of a byte-level BPE with GPT-2's, Llama 3's or Qwen2's pattern.

        Encodes as `tokenizers` does with add_special_tokens=False. Raises: ValueError naming what cannot be honoured.
        """
        path, document = os.fspath(tokenizer_json), read_json(tokenizer_json)
        model = document.get("model") if isinstance(document, dict) else None
        if not isinstance(model, dict) or "vocab" not in model or "merges" not in model:
            raise ValueError(f"{path} is no tokenizer.json of a BPE: it has no model with vocab and merges")
        pattern, normalize = parse_pipeline(document, path)
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
            if model.get(key):
                raise ValueError(f"{path}: the model sets {key} = {model[key]!r}, which byte-level BPE does without")
        added = document.get("added_tokens") or []
        for token in added:
            for flag in ("lstrip", "rstrip", "single_word"):
                if token.get(flag):
                    raise ValueError(f"{path}: added token {token['content']!r} sets {flag}, which is not supported")
        contents = {token["content"] for token in added}
        vocab = {i: t.encode() if t in contents else text_to_token(t, path) for t, i in model["vocab"].items()}
        vocab.update({token["id"]: token["content"].encode() for token in added})
        tokenizer = cls(vocab, parse_merges(model["merges"], path), [token["content"] for token in added],
                        pattern=pattern, ignore_merges=bool(model.get("ignore_merges")), normalize=normalize)
        tokenizer.added = {token["content"]: token for token in added}
        tokenizer.post_processor = document.get("post_processor")
        return tokenizer

    added: dict[str, dict] = {}                                 # flags and post-processor of the file it was read from,
    post_processor: dict | None = None                          # kept for save()

    def save(self, tokenizer_json: str | os.PathLike) -> None:
        """Writes a Hugging Face tokenizer.json, which `tokenizers`, `transformers` and vLLM load."""
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": PATTERNS[self.pattern]}, "behavior": "Isolated", "invert": False}
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        text = {i: token_to_text(t) for i, t in self.vocab.items()} | {i: s for s, i in self.special_tokens.items()}
        document = {
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": i, "content": s, **plain, **self.added.get(s, {})}
                             for s, i in sorted(self.special_tokens.items(), key=lambda item: item[1])],
            "normalizer": {"type": self.normalize} if self.normalize else None,
            "pre_tokenizer": byte_level | {"use_regex": True} if self.pattern == "gpt2" else
                             {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": self.post_processor or byte_level | {"use_regex": True, "trim_offsets": False},
            "decoder": byte_level | {"use_regex": True},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                      "ignore_merges": self.ignore_merges,
                      "vocab": {text[i]: i for i in sorted(text)},
                      "merges": [f"{token_to_text(a)} {token_to_text(b)}" for a, b in self.merges]}}
        with whole_file(tokenizer_json) as f:
            f.write(json.dumps(document, ensure_ascii=False, indent=1).encode())


def read_json(path: str | os.PathLike):
    with open(path, "rb") as f:
        raw = f.read()
    try:
        return json.loads(raw)
    except ValueError as e:
        raise ValueError(f"{os.fspath(path)} is not JSON: {e}") from None


def parse_merges(merges: list, path: str) -> list[tuple[bytes, bytes]]:
    """Merges as "left right" lines or as [left, right] lists."""
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]
    for number, pair in enumerate(pairs, 1):
        if len(pair) != 2:
            raise ValueError(f"{path}: merge {number} is {merges[number - 1]!r}; expected two tokens with a space between")
    return [(text_to_token(a, path), text_to_token(b, path)) for a, b in pairs]


def parse_pipeline(document: dict, path: str) -> tuple[str, str | None]:
    """The pattern's name and the normalization of a tokenizer.json, or a ValueError that says what is foreign in it."""
    steps = document.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    pattern = None
    for step in steps:
        if step.get("type") == "ByteLevel":
            if step.get("add_prefix_space"):
                raise ValueError(f"{path} asks for add_prefix_space, which is not supported")
            if step.get("use_regex", True):
                pattern = "gpt2"
        elif step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            text = (step.get("pattern") or {}).get("Regex")
            pattern = next((name for name, p in PATTERNS.items() if p == text), None)
            if pattern is None:
                raise ValueError(f"{path} splits by {text!r}; known are the patterns of {', '.join(PATTERNS)}")
        else:
            raise ValueError(f"{path} has the pre-tokenizer {step.get('type')!r}; only byte-level BPE can be read")
    normalizer = (document.get("normalizer") or {}).get("type")
    if pattern is None or normalizer not in (None, "NFC"):
        raise ValueError(f"{path} has the normalizer {normalizer!r} and pattern {pattern!r}; "
                         f"known are NFC or none, and the patterns of {', '.join(PATTERNS)}")
    return pattern, normalizer


# ------------------------------------------------------------------------------------------------------------------
# Whole files
# ------------------------------------------------------------------------------------------------------------------

def encode_range(start: int, end: int) -> np.ndarray:
    tokenizer, path, dtype = _worker
    parts = []
    for raw in read_chunks(path, tokenizer.special_tokens, start, end):
        parts.append(np.array(tokenizer.encode(decode_utf8(raw, path, start)), dtype))
        start += len(raw)
    return np.concatenate(parts)


def start_worker(*state) -> None:
    global _worker
    _worker = state


def encode_file(tokenizer: Tokenizer, text_path: str | os.PathLike, npy_path: str | os.PathLike,
                num_processes: int | None = None, log: Callable[[str], None] | None = None) -> int:
    """Encodes a UTF-8 text file into a .npy of token ids, uint16 if the vocabulary fits and uint32 otherwise.

    Written whole or not at all. Returns: the number of tokens. Raises: ValueError for an empty file or one not UTF-8.
    """
    path, size = os.fspath(text_path), os.path.getsize(text_path)
    if size == 0:
        raise ValueError(f"{path} is empty; there is nothing to encode")
    dtype = np.dtype("<u2" if max(tokenizer.vocab) < 1 << 16 else "<u4")
    num_processes = min(num_processes or os.cpu_count() or 1, 1 + size // (1 << 20))
    ranges = file_ranges(path, 1 + size // (1 << 23), tokenizer.special_tokens)
    report, total = progress("encode bytes", size, log), 0
    with whole_file(npy_path) as f:
        f.write(npy_header(dtype, 0))
        with ProcessPoolExecutor(num_processes, initializer=start_worker, initargs=(tokenizer, path, dtype)) as pool:
            for (_, end), ids in zip(ranges, in_order(pool, encode_range, ranges, 2 * num_processes)):
                f.write(ids.tobytes())
                total += len(ids)
                report(end)
        f.seek(0)
        f.write(npy_header(dtype, total))
    return total


def npy_header(dtype: np.dtype, length: int) -> bytes:
    """The 128 bytes in front of a one-dimensional array in numpy's file format, version 1.0."""
    text = str({"descr": dtype.str, "fortran_order": False, "shape": (length,)})
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n"


# ------------------------------------------------------------------------------------------------------------------
# Walk-through, self-check, command line
# ------------------------------------------------------------------------------------------------------------------

def walk_through() -> None:
    """Sennrich et al.'s example, as the merges happen."""
    counts = {b"low": 5, b"lower": 2, b"widest": 3, b"newest": 6}
    print("words", {w.decode(): c for w, c in counts.items()})
    merges = merge_words_plain(counts, 6)
    tokenizer = Tokenizer(dict(enumerate([bytes([i]) for i in range(256)] + [a + b for a, b in merges])), merges)
    for rank, (a, b) in enumerate(merges):
        print(f"merge {rank}: {a.decode()} + {b.decode()}")
    for word in ("newest", "lowest"):
        print(word, "->", [tokenizer.vocab[i].decode() for i in tokenizer.encode(word)])


def self_check(seed: int = 0) -> None:
    """Round trips over random text. Raises: AssertionError on any difference."""
    counts = {b"low": 5, b"lower": 2, b"widest": 3, b"newest": 6}
    merges = merge_words_plain(counts, 6)
    assert merges == [(b"s", b"t"), (b"e", b"st"), (b"o", b"w"), (b"l", b"ow"), (b"w", b"est"), (b"n", b"e")], merges
    tokenizer = Tokenizer(dict(enumerate([bytes([i]) for i in range(256)] + [a + b for a, b in merges])), merges,
                          ["<|endoftext|>"])
    rng = np.random.default_rng(seed)
    alphabet = np.array(list("newstlowr '.é\u00a0\u3000字😀\n\t") + ["<|endoftext|>"])
    for _ in range(200):
        text = "".join(rng.choice(alphabet, rng.integers(0, 60)))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def inspect(tokenizer: Tokenizer, path: str | None) -> None:
    longest = sorted(tokenizer.vocab.values(), key=len, reverse=True)[:10]
    print(f"{len(tokenizer.vocab):,} tokens, {len(tokenizer.merges):,} merges, special {list(tokenizer.special_tokens)}")
    print("longest:", ", ".join(repr(t.decode("utf-8", "replace")) for t in longest))
    if path:
        began, size, count = time.perf_counter(), 0, 0
        for raw in read_chunks(path, tokenizer.special_tokens):
            size, count = size + len(raw), count + len(tokenizer.encode(decode_utf8(raw, path, size)))
        seconds = time.perf_counter() - began
        print(f"{path}: {size:,} bytes, {count:,} tokens, {size / max(count, 1):.3f} bytes per token, "
              f"{size / seconds / 1e6:.1f} MB/s in one process")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bpe.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    commands = parser.add_subparsers(dest="command", metavar="train | encode | decode | inspect")
    train = commands.add_parser("train", help="learn a vocabulary from a text file")
    train.add_argument("--input", required=True)
    train.add_argument("--vocab-size", type=int, default=10_000)
    train.add_argument("--special", action="append", help="a special token; may be repeated (default <|endoftext|>)")
    train.add_argument("--out", default="out/bpe/tokenizer.json")
    encode = commands.add_parser("encode", help="a text file to a .npy of token ids")
    decode = commands.add_parser("decode", help="a .npy of token ids to text")
    look = commands.add_parser("inspect", help="longest tokens; with --input: bytes per token, speed")
    for sub in (encode, decode, look):
        sub.add_argument("--tokenizer", default="out/bpe/tokenizer.json")
        sub.add_argument("--input", required=sub is not look)
    encode.add_argument("--out", required=True)
    decode.add_argument("--out", help="default: print it")
    for sub in (train, encode):
        sub.add_argument("--processes", type=int, default=None)
    args = parser.parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError) as e:
        print(f"bpe.py: {e}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    began = time.perf_counter()
    def log(line):
        print(line, file=sys.stderr, flush=True)
    if args.command is None:
        walk_through()
        self_check(args.seed)
        print("round trips and known merges  OK")
        return 0
    if args.command == "train":
        special = ["<|endoftext|>"] if args.special is None else args.special
        vocab, merges = train_bpe(args.input, args.vocab_size, special, args.processes, log)
        Tokenizer(vocab, merges, special).save(args.out)
        print(f"{args.out}: {len(vocab):,} tokens from {os.path.getsize(args.input):,} bytes in "
              f"{time.perf_counter() - began:.1f}s")
        return 0
    tokenizer = Tokenizer.from_file(args.tokenizer)
    if args.command == "encode":
        count, size = encode_file(tokenizer, args.input, args.out, args.processes, log), os.path.getsize(args.input)
        print(f"{args.out}: {count:,} tokens from {size:,} bytes ({size / count:.3f} a token) in "
              f"{time.perf_counter() - began:.1f}s")
    elif args.command == "decode":
        text = tokenizer.decode(np.load(args.input, allow_pickle=False).ravel().tolist())
        if args.out:
            with whole_file(args.out) as f:
                f.write(text.encode())
        else:
            sys.stdout.write(text)
    else:
        inspect(tokenizer, args.input)
    return 0


if __name__ == "__main__":
    sys.exit(main())
