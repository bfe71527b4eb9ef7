"""bpe.py - byte-level byte-pair encoding: text to token ids and back, and how the tokens are learnt.

What:       A tokenizer starts from the 256 bytes and learns to join the pair of neighbours that is most frequent, again
            and again, inside the "pre-tokens" (roughly: words with their leading space) that a pattern cuts text into.
            Encoding replays those merges, earliest first. Nothing is ever unknown: every byte is a token.
Source:     Sennrich, Haddow & Birch 2016, arXiv:1508.07909, Algorithm 1; Radford et al. 2019 (GPT-2), section 2.2:
            bytes instead of characters, merges kept inside pre-tokens.
Deviations: ties go to the greater pair of byte strings (the papers leave it open); special tokens end a document.
            Llama 3's and Qwen2's patterns and NFC take the plain path, 5 MB/s instead of 36. What is a letter
            or a number, the regex module says; code points that are not assigned yet may differ in other libraries.
Copy:       this file alone; needs numpy and regex. MIT.
Run:        python bpe.py                            (the last line of what it prints:)
            fast = plain = known merges, there and back  OK
"""
import argparse
import contextlib
import functools
import heapq
import itertools
import json
import os
import re
import sys
import time
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterable, Iterator

import numpy as np
import regex

# Dims: N bytes of text, P pre-tokens ("words" once they are cut), W distinct ones
Log, Source, Pair = Callable[[str], None] | None, str | os.PathLike, tuple[bytes, bytes]
CHUNK, WINDOW = 1 << 21, 1 << 16    # bytes of a file handled at a time; where a place to cut it is looked for

# ---- Pre-tokenization: merges never cross the borders of these pieces ------------------------------------------------
MODERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
PATTERNS = {"gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
            "llama3": MODERN % r"\p{N}{1,3}", "qwen2": MODERN % r"\p{N}"}
# Where all three start a new pre-token, whatever stands further left or right: between a letter or number and a mark,
# between a line and the next, before a space or tab. (?r) searches from the end.
CUT = r"(?r)(?<=[\p{L}\p{N}])(?=[\p{P}\p{S}\s])|(?<=\S\n)(?=\S)|(?<=\S)(?=[ \t])"

def special_pattern(special_tokens: Iterable[str]) -> str:
    """A pattern for any of the special tokens, the longest that fits first: of "<a>" and "<a><a>", the latter."""
    tokens = list(special_tokens)
    if isinstance(special_tokens, str) or "" in tokens or len(set(tokens)) < len(tokens):
        raise ValueError(f"special tokens must be a list of different, non-empty strings, got {special_tokens!r}")
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)"           # (?!) never matches

def safe_cut(raw: bytes, special_tokens: Iterable[str]) -> int:
    """The last place where raw, a part of any text, can be cut so that each side gives its ids in the whole; else 0.
    A special token or a pre-token starts there, and no special token has the characters on both sides as neighbours.
    """
    tail = raw[-WINDOW:].lstrip(bytes(range(0x80, 0xC0)))       # from the first byte of a character on
    text = tail.decode("utf-8", "ignore")
    for match in regex.finditer(f"{CUT}|(?={special_pattern(special_tokens)})", text, pos=1):
        if not any(text[match.start() - 1:match.start() + 1] in token for token in special_tokens):
            return len(raw) - len(tail) + len(text[:match.start()].encode())
    return 0

def file_ranges(path: str, special_tokens: Iterable[str]) -> Iterator[tuple[int, int]]:
    """Stretches (start, end) of about CHUNK bytes into which a file can be cut; reads a window at each end only."""
    cuts, size, window = {0}, os.path.getsize(path), min(WINDOW, CHUNK)
    with open(path, "rb") as f:
        for start in range(CHUNK - window, size - window, CHUNK):
            f.seek(start)
            if cut := safe_cut(f.read(window), special_tokens):
                cuts.add(start + cut)
    return itertools.pairwise(sorted(cuts | {size}))

def read_range(path: str, start: int, end: int) -> bytes:
    """A stretch of a file. Raises: ValueError where it is not UTF-8."""
    with open(path, "rb") as f:
        f.seek(start)
        raw = f.read(end - start)
    try:
        raw.isascii() or raw.decode()
    except UnicodeDecodeError as e:
        where = f"byte 0x{raw[e.start]:02x} at offset {start + e.start}"
        raise ValueError(f"{path} is not UTF-8: {where}; convert it (iconv -t utf-8) or leave it out") from None
    return raw

# ---- Training, plain -------------------------------------------------------------------------------------------------
def count_words_plain(path: str, special_tokens: list[str]) -> dict[bytes, int]:
    """How often each pre-token occurs in a file. Memory follows the distinct ones, not the file."""
    counts: Counter[str] = Counter()
    for start, end in file_ranges(path, special_tokens):
        for document in re.split(special_pattern(special_tokens), read_range(path, start, end).decode()):
            counts.update(regex.findall(PATTERNS["gpt2"], document))
    return {word.encode(): count for word, count in counts.items()}

def merge_words_plain(word_counts: dict[bytes, int], num_merges: int) -> list[Pair]:
    """arXiv:1508.07909, Algorithm 1: joins the most frequent pair of neighbours, of several the greatest, again.

    Example: merge_words_plain({b"low": 5, b"lower": 2}, 1) -> [(b"o", b"w")]    # as frequent as (b"l", b"o")
    """
    words, merges = {word: [bytes([byte]) for byte in word] for word in word_counts}, []
    while len(merges) < num_merges:
        pair_count: Counter[Pair] = Counter()
        for word, symbols in words.items():
            for pair in zip(symbols, symbols[1:]):
                pair_count[pair] += word_counts[word]
        if not pair_count:
            break
        left, right = max(pair_count, key=lambda pair: (pair_count[pair], pair))
        merges.append((left, right))
        for symbols in words.values():
            for i in range(len(symbols) - 1):                   # joined symbols leave an empty one to their right
                if (symbols[i], symbols[i + 1]) == (left, right):
                    symbols[i], symbols[i + 1] = left + right, b""
            symbols[:] = filter(None, symbols)
    return merges

# ---- Tokenizer -------------------------------------------------------------------------------------------------------
@functools.cache
def byte_to_unicode() -> dict[int, str]:
    """GPT-2's way to write bytes as printable characters: visible Latin-1 as itself, the others from U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in visible]
    return dict(zip(visible + hidden, map(chr, [*visible, *range(256, 512)])))

class Tokenizer:
    """Text to token ids and back.

    Args: vocab {id: bytes}; merges [(left, right)], earliest first; special_tokens: strings that become one token each
          wherever they stand, appended to the vocabulary if it lacks them. pattern: a key of PATTERNS. ignore_merges: a
          pre-token that is in the vocabulary is taken whole, as in Llama 3. normalize: a Unicode normal form, or None.
    Raises: ValueError if a byte is missing from the vocabulary, or a merge's parts or product are.
    Example: Tokenizer({**{i: bytes([i]) for i in range(256)}, 256: b"hi"}, [(b"h", b"i")]).encode("hi!") -> [256, 33]
    """
    cache_size = 1 << 17                                        # words remembered; then the cache starts anew
    fast_from = 1 << 13                                         # characters from which whole chunks pay
    document: dict | None = None                                # of the tokenizer.json that it was read from
    unset = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")      # and more, in a tokenizer.json
    unsupported = (*unset, "add_prefix_space", "invert", "byte_fallback", "lstrip", "rstrip", "single_word")

    def __init__(self, vocab: dict[int, bytes], merges: list[Pair], special_tokens: list[str] | None = None, *,
                 pattern: str = "gpt2", ignore_merges: bool = False, normalize: str | None = None):
        self.vocab, self.merges, special_tokens = dict(vocab), merges, special_tokens or []
        self.pattern, self.ignore_merges, self.normalize = pattern, ignore_merges, normalize
        self.token_id = ids = {token: i for i, token in self.vocab.items()}
        with explained("the vocabulary needs all 256 bytes, and the parts and product of every merge"):
            self.byte_id = [ids[bytes([byte])] for byte in range(256)]
            self.ranks = {(ids[a], ids[b]): (rank, ids[a + b]) for rank, (a, b) in enumerate(merges)}
        with explained(f"pattern must be one of {', '.join(PATTERNS)}"):
            self._words, self._cache = regex.compile(PATTERNS[pattern]), {}
        ascii_only = PATTERNS[pattern].replace(r"\p{L}\p{N}]", "A-Za-z0-9]").replace(r"\p{L}", "[A-Za-z]")
        self._ascii_words = re.compile(ascii_only.replace(r"\p{N}", "[0-9]"), re.ASCII)        # twice as fast as regex
        self._special, self.special_tokens = re.compile(f"({special_pattern(special_tokens)})"), {}
        appended = itertools.count(max(self.vocab) + 1)
        for token in special_tokens:
            self.special_tokens[token] = i = ids[token.encode()] if token.encode() in ids else next(appended)
            self.vocab[i], ids[token.encode()] = token.encode(), i
        self.dtype = np.dtype("<u2" if max(self.vocab) < 1 << 16 else "<u4")

    def encode(self, text: str) -> list[int]:
        """The token ids of a text. Raises: ValueError for lone surrogates, which have no UTF-8 form."""
        return self.encode_plain(text) if len(text) < self.fast_from else list(self.encode_iterable([text], CHUNK))

    def encode_iterable(self, chunks: Iterable[str], size: int = WINDOW) -> Iterator[int]:
        """The ids of the joined chunks, however they are cut, from little more than `size` bytes of text at a time."""
        rest, want = bytearray(), size
        for chunk in chunks:
            rest += chunk.encode()
            if len(rest) >= want:
                cut = safe_cut(rest, self.special_tokens)
                yield from self.encode_bytes(bytes(rest[:cut])).tolist()
                del rest[:cut]
                want = max(size, 2 * len(rest))
        yield from self.encode_bytes(bytes(rest)).tolist()

    def encode_bytes(self, raw: bytes) -> np.ndarray:
        """The ids of valid UTF-8, as uint16 if the vocabulary fits and uint32 otherwise."""
        if self.pattern == "gpt2" and not self.normalize and not self.ignore_merges:
            if len(self.fast.words.words) > self.fast.max_words:
                del self.fast                                   # a cached property: it starts anew
            return self.fast.encode(raw)
        return np.array(self.encode_plain(raw.decode()), self.dtype)

    @functools.cached_property
    def fast(self) -> "FastEncoder":
        return FastEncoder(self)

    def encode_plain(self, text: str) -> list[int]:
        """Cuts at the special tokens, then into pre-tokens, and merges those that are not remembered."""
        ids, cache = [], self._cache
        for i, piece in enumerate(self._special.split(text)):
            if i % 2:                                           # every second piece is a special token
                ids.append(self.special_tokens[piece])
                continue
            if self.normalize and not piece.isascii():
                piece = unicodedata.normalize(self.normalize, piece)
            for word in (self._ascii_words if piece.isascii() else self._words).findall(piece):
                known = cache.get(word)
                if known is None:
                    if len(cache) >= self.cache_size:
                        cache.clear()
                    known = cache[word] = self.merge_word(word.encode())
                ids += known
        return ids

    def merge_word(self, word: bytes) -> list[int]:
        """Joins the pair that was learnt first, again and again, until no neighbours are left that were ever joined."""
        if self.ignore_merges and word in self.token_id:
            return [self.token_id[word]]
        ids, ranks, end = [*map(self.byte_id.__getitem__, word), -1], self.ranks, len(word)           # -1: no symbol
        after, before = [*range(1, end + 1), end], [*range(-1, end)]        # links that lead over those that are gone
        heap = [(ranks[pair], i, pair) for i, pair in enumerate(zip(ids, ids[1:])) if pair in ranks]
        heapq.heapify(heap)                                     # so n bytes take time n log n
        while heap:
            (_, new), i, pair = heapq.heappop(heap)
            gone = after[i]
            if (ids[i], ids[gone]) == pair:                     # else one of the two was joined to another since
                ids[i], ids[gone], after[i] = new, -1, after[gone]
                before[after[i]] = i
                for left in (before[i], i):
                    if (pair := (ids[left], ids[after[left]])) in ranks:
                        heapq.heappush(heap, (ranks[pair], left, pair))
        return [i for i in ids if i >= 0]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; bytes that are no valid UTF-8 become U+FFFD. Raises: ValueError for an unknown id."""
        with explained(f"an id is not in the vocabulary of {len(self.vocab):,} tokens"):
            return b"".join([self.vocab[i] for i in ids]).decode("utf-8", "replace")

    @classmethod
    def from_files(cls, vocab_path: Source, merges_path: Source, special_tokens: list[str] | None = None):
        """Reads GPT-2's vocab.json ({token: id}) and merges.txt (a pair a line). Raises: ValueError, OSError."""
        with explained(f"{vocab_path} and {merges_path} are no vocab.json and merges.txt"):
            vocab, lines = json.loads(Path(vocab_path).read_bytes()), Path(merges_path).read_text("utf-8").split("\n")
            pairs = [line for line in lines if line and not line.startswith("#version")]
            return cls(*from_printable(vocab, pairs, ["<|endoftext|>", *(special_tokens or [])]), special_tokens)

    @classmethod
    def from_file(cls, tokenizer_json: Source) -> "Tokenizer":
        """Reads a byte-level BPE, to encode as `tokenizers` does with add_special_tokens=False. Raises: ValueError."""
        with explained(f"{os.fspath(tokenizer_json)} is no tokenizer.json of a byte-level BPE that can be read"):
            document = json.loads(Path(tokenizer_json).read_bytes())
            model, first = document["model"], document["pre_tokenizer"]
            steps = first.get("pretokenizers", [first])
            splits = [PATTERNS["gpt2"] if step["type"] == "ByteLevel" else step["pattern"]["Regex"]
                      for step in steps if step.get("use_regex", True)]
            pattern = next((name for name in PATTERNS if splits == [PATTERNS[name]]), None)
            added = {token["content"]: token for token in document.get("added_tokens") or []}
            normalize = (document.get("normalizer") or {}).get("type")
            odd = [f"{key} = {part[key]!r}" for part in (model, *added.values(), *steps) for key in part
                   if part[key] and key in cls.unsupported]
            if odd or not pattern or normalize not in (None, "NFC"):
                raise ValueError(f"it splits by {splits}, normalizes by {normalize}, sets {odd}")
            vocab, merges = from_printable(model["vocab"], model["merges"], added)
            vocab.update({token["id"]: content.encode() for content, token in added.items()})
            whole = bool(model.get("ignore_merges"))
            tokenizer = cls(vocab, merges, list(added), pattern=pattern, ignore_merges=whole, normalize=normalize)
        tokenizer.document = document
        return tokenizer

    def save(self, tokenizer_json: Source) -> None:
        """Writes a tokenizer.json that `tokenizers`, `transformers`, vLLM load; one that was read stays as it was."""
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        split = {"type": "Split", "pattern": {"Regex": PATTERNS[self.pattern]}, "behavior": "Isolated", "invert": False}
        steps = {"type": "Sequence", "pretokenizers": [split, byte_level | {"use_regex": False}]}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        text = {token: token.decode("latin-1").translate(byte_to_unicode()) for token in self.vocab.values()}
        names = {i: text[token] for i, token in self.vocab.items()} | {i: s for s, i in self.special_tokens.items()}
        added = [{"id": i, "content": names[i], **flags} for i in sorted(self.special_tokens.values())]
        document = self.document or {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "decoder": byte_level,
            "normalizer": {"type": self.normalize} if self.normalize else None,
            "pre_tokenizer": byte_level if self.pattern == "gpt2" else steps,
            "post_processor": byte_level | {"trim_offsets": False},
            "model": {"type": "BPE", **dict.fromkeys((*self.unset, "unk_token")), "fuse_unk": False,
                      "byte_fallback": False, "ignore_merges": self.ignore_merges,
                      "vocab": {names[i]: i for i in sorted(names)},
                      "merges": [f"{text[a]} {text[b]}" for a, b in self.merges]}}
        with write_whole(tokenizer_json) as f:
            f.write(json.dumps(document, ensure_ascii=False).encode())

def from_printable(vocab: dict[str, int], merges: list, clear: Iterable[str]) -> tuple[dict[int, bytes], list[Pair]]:
    """Vocabulary and merges ("left right" or [left, right]) from the byte_to_unicode form, but for tokens in clear."""
    byte_of = {ord(char): byte for byte, char in byte_to_unicode().items()}
    tokens = {text: text.translate(byte_of).encode("latin-1") for text in vocab if text not in clear}
    tokens |= {text: text.encode() for text in clear}
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return {i: tokens[text] for text, i in vocab.items()}, [(tokens[a], tokens[b]) for a, b in pairs]

@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns what goes wrong with foreign data into one ValueError that says what they should have been."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, EOFError) as e:
        raise ValueError(f"{what}: {'missing ' if isinstance(e, KeyError) else ''}{e}") from None

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

# ---- Fast: the same, a whole chunk of bytes at a time ----------------------------------------------------------------
EDGE, SPACE, BLANK, LETTER, NUMBER, OTHER, UNKNOWN = range(7)   # classes of characters; EDGE: no text, a special token
CLASS_OF = np.full(0x110000, UNKNOWN, np.uint8)                 # by code point; filled in as characters turn up
SAMPLES = ("", " ", "\n", "a", "1", ".")                        # one of each class. Of any three characters, does a
STARTS = bytes([this != "" and any(match.start() == len(before) for match in        # pre-token start at the second?
                                   regex.finditer(PATTERNS["gpt2"], before + this + after))
                for before, this, after in itertools.product(SAMPLES, repeat=3)]).ljust(256)
CONTRACTION = np.zeros((256, 256), np.uint8)                    # how many of the two bytes after an apostrophe it takes
CONTRACTION[list(b"sdmt")], CONTRACTION[list(b"lvr"), list(b"lee")] = 1, 2

def classify(code_points: np.ndarray) -> np.ndarray:
    """The class of each character, as the pattern sees it: the regex module is asked once for each."""
    for i in set(code_points[CLASS_OF[code_points] == UNKNOWN].tolist()):
        CLASS_OF[i] = regex.match(r"(?s)( )|(\s)|(\p{L})|(\p{N})|(.)", chr(i)).lastindex
    return CLASS_OF[code_points]

BYTE_CLASS = classify(np.arange(128)).tobytes().ljust(256)

def pretoken_starts(raw: bytes, special: re.Pattern) -> np.ndarray:
    """Where GPT-2's pre-tokens start in UTF-8 bytes; a special token counts as one. Returns int64 (P,).

    Whether one starts at a character depends on the classes of three, the one before, itself and the next: a table
    stands for the regular expression. Put right afterwards: contractions, and blanks of several bytes.
    """
    N, data = len(raw), np.frombuffer(raw + bytes(2), np.uint8)
    padded = np.frombuffer(bytearray(b"\0%b\0\0" % raw.translate(BYTE_CLASS)), np.uint8)       # EDGE on either side
    beyond = np.flatnonzero(data >= 0x80)
    lead = beyond[data[beyond] >= 0xC0]
    width = 2 + (data[lead] >= 0xE0) + (data[lead] >= 0xF0)
    lead_class = classify(np.frombuffer(data[beyond].tobytes().decode().encode("utf-32-le"), np.uint32))
    padded[1 + beyond] = np.repeat(lead_class, width)           # all bytes of a character alike
    for match in special.finditer(raw):
        padded[1 + match.start():1 + match.end()] = EDGE
    three = 36 * padded[:N] + 6 * padded[1:N + 1] + padded[2:N + 2]
    starts = np.frombuffer(bytearray(three).translate(STARTS), bool)                    # (N,)
    blank, last = lead[lead_class == BLANK], (lead + width - 1)[lead_class == BLANK]
    starts[blank] |= starts[last]                               # its last byte saw what follows
    starts[last] = False
    quote = np.flatnonzero((data[:N] == ord("'")) & starts)
    end = quote + 1 + CONTRACTION[data[quote + 1], data[quote + 2]]
    whole = (end > quote + 1) & (padded[quote + 2] == LETTER) & (padded[end] == LETTER)  # no special token cuts it
    starts[quote[whole] + 1] = False
    starts[end[whole & (padded[end + 1] == LETTER)]] = True
    starts[[match.start() for match in special.finditer(raw)]] = True
    return np.flatnonzero(starts)

ODD = np.uint64(0x9E3779B97F4A7C15)                             # 2**64 over the golden ratio: Knuth, volume 3, 6.4
ONES, JOINED = np.uint64(2**64 - 1), np.uint64(0xFE << 56)      # of the bytes 0xFF and 0xFE, which UTF-8 never has
GAP, GONE, NEVER = -1, -2, 2**63 - 1                            # in a row of symbols: between words; merged away
MIRROR = bytes(range(255, -1, -1))

class Index:
    """Finds keys in a sorted array: np.searchsorted, and a table that knows most of the answers sooner."""
    def __init__(self, keys: np.ndarray):
        keys = np.append(np.sort(keys), ONES)                   # uint64; ONES is no key
        self.keys = keys[np.append(True, keys[1:] != keys[:-1])]
        self.missing = len(self.keys) - 1
        self.shift = np.uint64(60 - self.missing.bit_length())  # at least eight slots a key
        self.table = np.full(1 << 64 - int(self.shift), self.missing, np.int32)
        self.table[self.keys[:-1] * ODD >> self.shift] = np.arange(self.missing)        # of several, one gets the slot

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Where in self.keys these are, `missing` for those that are not there. Returns int64."""
        place = self.table.take((keys * ODD >> self.shift).view(np.int64)).astype(np.int64)
        astray = np.flatnonzero((self.keys.take(place) != keys) & (place < self.missing))       # another has the slot
        place[astray] = searched = np.searchsorted(self.keys, keys[astray])
        place[astray[self.keys[searched] != keys[astray]]] = self.missing
        return place

class Words:
    """The distinct words of all chunks seen. No key is a hash, so different words never have the same number."""
    def __init__(self):
        self.keys, self.numbers = np.array([ONES]), np.array([0])       # ascending keys; their numbers
        self.words, self.index = [], np.zeros(0, np.int64)              # index: in words, by number
        np.empty(31 << 20, np.uint8)    # freed at once: glibc then keeps arrays up to this size for the next chunk

    def number(self, eight: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """The numbers of words, int64 (P,), in a chunk of which eight[i] are the eight bytes from i on."""
        bits = 8 * (ends - starts)                              # the key is the word, filled up with 0xFF; of a word
        keys = eight[starts] | ONES << bits.view(np.uint64)     # over eight bytes, it is the numbers of its halves
        if (long := np.flatnonzero(bits > 64)).size:
            left, right = starts[long], ends[long]
            middle = left + right >> 1
            halves = self.number(eight, np.append(left, middle), np.append(middle, right)).view(np.uint64)
            keys[long] = JOINED | halves[:len(long)] << np.uint64(28) | halves[len(long):]
        index = Index(keys)
        at = np.searchsorted(self.keys, index.keys)
        new = np.flatnonzero(self.keys[at] != index.keys)
        self.numbers = np.insert(self.numbers, at[new], len(self.keys) + np.arange(len(new)))
        self.keys = np.insert(self.keys, at[new], index.keys[new])
        return self.numbers[np.searchsorted(self.keys, index.keys)][index.find(keys)]

    def look_up(self, raw: bytes, starts: np.ndarray) -> np.ndarray:
        """Which of self.words starts at each of these places and ends where the next one starts. Both int64 (P,)."""
        ends, eight = np.append(starts[1:], len(raw)), np.ndarray(len(raw) + 1, "<u8", raw + bytes(8), strides=(1,))
        numbers = self.number(eight, starts, ends)
        self.index = np.pad(self.index, (0, len(self.keys) - len(self.index)), constant_values=-1)
        new = np.flatnonzero(self.index[numbers] < 0)
        self.index[numbers[new]] = new                          # of several places of a word, one remains
        new = new[self.index[numbers[new]] == new]
        new = new[(ends - starts)[new].argsort(kind="stable")]  # short words first
        self.index[numbers[new]] = np.arange(len(new)) + len(self.words)
        self.words += [raw[i:j] for i, j in zip(starts[new].tolist(), ends[new].tolist())]
        return self.index[numbers]

def count_words(ranges: list[tuple[int, int]]) -> dict[bytes, int]:
    """count_words_plain for some ranges of a file, special tokens too: a process's share of train_bpe."""
    path, special = count_words.shared
    words, counts = Words(), np.zeros(0, np.int64)
    for raw in (read_range(path, *stretch) for stretch in ranges):
        more = np.bincount(words.look_up(raw, pretoken_starts(raw, special)), minlength=len(counts))
        counts = more + np.pad(counts, (0, len(more) - len(counts)))
    return dict(zip(words.words, counts.tolist()))

def greatest_first(left: int, right: int, tokens: list[bytes]) -> str:
    """A key by which the greatest pair sorts first: bytes mirrored, each string ended by a mark above all of them."""
    return "\u0100".join([tokens[i].translate(MIRROR).decode("latin-1") for i in (left, right)]) + "\u0100"

def in_a_row(words: Iterable[bytes]) -> np.ndarray:
    """The bytes of all words, with a GAP before each and at the end, as int64. (0xFF is no byte of UTF-8.)"""
    row = np.frombuffer(b"\xff".join([b"", *words, b""]), np.uint8).astype(np.int64)
    row[row == 0xFF] = GAP
    return row

def merge_words(word_counts: dict[bytes, int], num_merges: int, tie_key: Callable = greatest_first) -> list[Pair]:
    """merge_words_plain on flat arrays: all words in one row, and links that jump over what is merged away.

    For each pair a heap has its count, and `places` where it was seen, both upper bounds (new places come with new
    symbols only): a popped pair is counted again. Those rarer than `floor` wait until the heap is empty.
    """
    symbol = in_a_row(word_counts)                              # and the count of the word in which it stands:
    weight = np.array([0, *word_counts.values()])[np.cumsum(symbol == GAP) % (len(word_counts) + 1)]
    following = np.arange(1, len(symbol) + 1)
    preceding = following - 2
    tokens, merges, heap, places, floor = [bytes([i]) for i in range(256)], [], [], {}, 0

    def remember(at: np.ndarray) -> None:
        """Puts the pairs that start at these places on the heap, with their counts, unless they are rare."""
        nonlocal floor
        keys = symbol[at] << 32 | symbol[following[at]]
        inside = keys >= 0                                      # else there is a GAP
        keys, at = keys[inside], at[inside]
        order = keys.argsort()
        keys, at = keys[order], at[order]
        bounds = np.concatenate([[True], keys[1:] != keys[:-1], [True]]).nonzero()[0]   # of stretches of equal keys
        sums = np.add.reduceat(weight[at], bounds[:-1]).tolist() if keys.size else []
        floor = floor or max(1, max(sums, default=0) // 8)
        for i, count in enumerate(sums):
            if count >= floor:
                pair = divmod(int(keys[bounds[i]]), 1 << 32)
                places[pair] = at[bounds[i]:bounds[i + 1]].copy()
                heapq.heappush(heap, (-count, tie_key(*pair, tokens), pair))

    while len(merges) < num_merges:
        if not heap:
            floor = 0
            remember(np.flatnonzero(symbol >= 0))               # neither GAP nor GONE
        if not heap:
            break
        bound, key, (left, right) = heapq.heappop(heap)
        at = places.pop((left, right))
        at = at[(symbol[at] == left) & (symbol[following[at]] == right)]
        count = int(np.add.reduce(weight[at]))
        if count < -bound:
            if count >= floor:
                places[left, right] = at
                heapq.heappush(heap, (-count, key, (left, right)))
            continue
        if left == right:                                       # of the three places in "aaaa", the second overlaps two
            at, nth = np.sort(at), np.arange(len(at))
            run = np.maximum.accumulate(np.where(np.append(-1, following[at])[:-1] == at, 0, nth))
            at = at[(nth - run) % 2 == 0]
        new = len(tokens)
        merges.append((tokens[left], tokens[right]))
        tokens.append(tokens[left] + tokens[right])
        gone = following[at]
        after = following[gone]
        symbol[at], symbol[gone] = new, GONE
        following[at], preceding[after] = after, at
        before = preceding[at]
        remember(np.concatenate([before[symbol[before] != new], at]))       # (new, new) counts once, by its left half
    return merges

class FastEncoder:
    """Tokenizer.encode_plain for GPT-2's pattern, a chunk at a time: words are looked up, new ones merged together."""
    max_words, long = 1 << 18, 64       # remembered, then all starts anew; bytes, longer ones are merged one by one

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.byte_ids = tokenizer, np.array([*tokenizer.byte_id, GAP])          # the last is [GAP]
        self.merged = np.array([new for _, new in tokenizer.ranks.values()], np.int64)          # by rank
        pairs = np.array([left << 32 | right for left, right in tokenizer.ranks], np.uint64)
        self.pairs, self.costs = Index(pairs), np.append(pairs.argsort() << 32, NEVER)  # as the keys are sorted: ranks
        tokens, self.words = [token.encode() for token in tokenizer.special_tokens], Words()
        self.special = re.compile(special_pattern(tokenizer.special_tokens).encode())
        self.words.look_up(b"".join(tokens), np.cumsum([0, *map(len, tokens)])[:-1])
        self.ids = np.array([tokenizer.token_id[token] for token in self.words.words], tokenizer.dtype)
        self.bounds = np.arange(len(tokens) + 1)                # word i has the ids from bounds[i] to bounds[i + 1]

    def encode(self, raw: bytes) -> np.ndarray:
        """The ids of valid UTF-8."""
        places = self.words.look_up(raw, pretoken_starts(raw, self.special))
        new = self.words.words[len(self.bounds) - 1:]
        short = sum(len(word) <= self.long for word in new)     # they come first
        ids, counts = self.merge(new[:short])
        merged = [self.tokenizer.merge_word(word) for word in new[short:]]
        counts = np.concatenate([self.bounds[-1:], counts, np.array([*map(len, merged)], np.int64)])
        self.bounds = np.append(self.bounds[:-1], np.cumsum(counts))
        self.ids = np.concatenate([self.ids, ids, *merged]).astype(self.ids.dtype)
        counts = self.bounds[places + 1] - self.bounds[places]
        shift = self.bounds[places] - np.cumsum(counts) + counts
        return self.ids[np.repeat(shift, counts) + np.arange(counts.sum())]

    def merge(self, words: list[bytes], rounds: list | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Tokenizer.merge_word for many words at once. Returns: their ids, end to end, and how many of each.
        They stand in a row with links, as in merge_words. In every round each word joins its first pair of lowest rank.
        """
        symbol = self.byte_ids[in_a_row(words)]
        following, begins = np.arange(1, len(symbol) + 1), np.flatnonzero(symbol == GAP)[:-1]
        preceding, active = following - 2, begins + 1           # words that are not done, by where they start
        cost = np.full(len(symbol), NEVER)                      # of the pair that starts here: its rank, then its place
        at = following[:-1] - 1
        while active.size:
            if rounds is not None:
                rounds.append(symbol.copy())
            pairs = (symbol[at] << 32 | symbol[following[at]]).view(np.uint64)
            cost[at] = self.costs[self.pairs.find(pairs)] | at
            best = np.minimum.reduceat(cost[active[0]:], active - active[0])    # words done, in between, cost NEVER
            active, best = active[best < NEVER], best[best < NEVER]
            at = best & 0xFFFFFFFF
            gone = following[at]
            after = following[gone]
            symbol[at], symbol[gone], cost[gone] = self.merged[best >> 32], GONE, NEVER
            following[at], preceding[after] = after, at
            at = np.concatenate([preceding[at], at])
        counts = np.add.reduceat(symbol[:-1] != GONE, begins, dtype=np.int64) - 1       # less the gap
        return symbol[symbol >= 0], counts

# ---- Whole files -----------------------------------------------------------------------------------------------------
def over_file(function: Callable, path: str, shared: Any, special_tokens: Iterable[str], num_processes: int | None,
              step: int = 1) -> Iterator:
    """function(ranges) for every `step` ranges of a file or fewer, in order. It finds (path, shared) in its .shared."""
    from concurrent.futures import BrokenExecutor, ProcessPoolExecutor      # here, for it would slow down every start
    if os.path.getsize(path) == 0:
        raise ValueError(f"{path} is empty; give it some text")
    ranges, num_processes = list(file_ranges(path, special_tokens)), num_processes or os.cpu_count() or 1
    step = max(1, min(step, len(ranges) // num_processes))      # so that there is work for all
    jobs = [ranges[i:i + step] for i in range(0, len(ranges), step)]
    share = function, "shared", (path, shared)                  # once a process
    if min(num_processes, len(jobs)) == 1:
        setattr(*share)
        yield from map(function, jobs)
    else:
        try:
            with ProcessPoolExecutor(num_processes, initializer=setattr, initargs=share) as pool:
                yield from pool.map(function, jobs)
        except BrokenExecutor:
            raise ChildProcessError("a process was killed, for lack of memory? Try fewer --processes") from None

def train_bpe(input_path: Source, vocab_size: int, special_tokens: list[str], num_processes: int | None = None,
              log: Log = print, tie_key: Callable = greatest_first) -> tuple[dict[int, bytes], list[Pair]]:
    """Learns a byte-level BPE vocabulary from a UTF-8 text file, with GPT-2's pre-tokenization, over its raw bytes.

    Args: vocab_size: all tokens together; special_tokens: strings that split the text and are never part of a merge;
          num_processes: for the counting (default: all cores); log: is told if no pair is left before the end;
          tie_key(left id, right id, tokens): of pairs equally frequent, the one with the least key is merged.
    Returns: vocab {id: bytes}: the bytes, the special tokens as given, the merges; merges [(left, right)] as made.
    Raises: ValueError: too small a vocabulary, bad special tokens, a file empty or not UTF-8; OSError: it is not there.
    Example: train_bpe("corpus.txt", 10_000, ["<|endoftext|>"])
    """
    special, words = re.compile(special_pattern(special_tokens).encode()), Counter()
    num_merges = vocab_size - 256 - len(special_tokens)
    if overlapping := [(a, b) for a, b in itertools.permutations(special_tokens, 2) if a in b]:
        raise ValueError(f"special tokens overlap: %r is part of %r; leave one out of the training" % overlapping[0])
    if num_merges < 0:
        raise ValueError(f"vocab_size {vocab_size} is too small for {vocab_size - num_merges} bytes and special tokens")
    for counts in over_file(count_words, os.fspath(input_path), special, special_tokens, num_processes, 24):
        words.update(counts)
    for token in special_tokens:
        del words[token.encode()]
    merges = merge_words(words, num_merges, tie_key)
    if len(merges) < num_merges and log:
        log(f"stopped early: no pair is left after {len(merges):,} merges of {num_merges:,}")
    tokens = [bytes([i]) for i in range(256)] + [s.encode() for s in special_tokens] + [a + b for a, b in merges]
    return dict(enumerate(tokens)), merges

def encode_range(ranges: list[tuple[int, int]]) -> np.ndarray:
    """The ids of one range of a file: a process's share of encode_file."""
    path, tokenizer = encode_range.shared
    return tokenizer.encode_bytes(read_range(path, *ranges[0]))

def encode_file(tokenizer: Tokenizer, text_path: Source, npy_path: Source, num_processes: int | None = None) -> int:
    """Encodes a file into a .npy of tokenizer.dtype. Returns: how many ids. Raises: ValueError if it is empty or not
    UTF-8, OSError if it is not there. Example: encode_file(tokenizer, "text.txt", "ids.npy"); np.load("ids.npy")"""
    with write_whole(npy_path) as f:
        header, total = {"descr": tokenizer.dtype.str, "fortran_order": False, "shape": (0,)}, 0
        np.lib.format.write_array_header_1_0(f, header)         # with room for the length, not known yet
        for ids in over_file(encode_range, os.fspath(text_path), tokenizer, tokenizer.special_tokens, num_processes):
            total += f.write(ids) // ids.itemsize
        f.seek(0)
        np.lib.format.write_array_header_1_0(f, header | {"shape": (total,)})
    return total

# ---- Walk-through, self-check, benchmark, command line ---------------------------------------------------------------
EXAMPLE = {b"low": 5, b"lower": 2, b"widest": 3, b"newest": 6}  # the words of Sennrich et al., section 3.2
EXAMPLE_MERGES = [(b"s", b"t"), (b"e", b"st"), (b"o", b"w"), (b"l", b"ow"), (b"w", b"est"), (b"n", b"e")]
EXAMPLE_VOCAB = dict(enumerate([bytes([i]) for i in range(256)] + [a + b for a, b in EXAMPLE_MERGES]))

def walk_through() -> None:
    """A small training, then what the fast version sees when it encodes a short sentence."""
    print("words   ", ", ".join(f"{word.decode()} x{count}" for word, count in EXAMPLE.items()))
    for rank, (a, b) in enumerate(merge_words_plain(EXAMPLE, 6)):
        print(f"merge {rank}  {a.decode()} + {b.decode()}")
    text, encoder, rounds = b"It's lower,  the newest.", Tokenizer(EXAMPLE_VOCAB, EXAMPLE_MERGES).fast, []
    starts = pretoken_starts(text, encoder.special).tolist()
    ids, _ = encoder.merge([text[i:j] for i, j in zip(starts, [*starts[1:], None])], rounds)
    print("text    ", text.decode())
    print("classes ", "".join("?_ a1."[i] for i in text.translate(BYTE_CLASS)))
    print("starts  ", "".join(" ^"[i in starts] for i in range(len(text))))
    for i, row in enumerate(rounds):
        symbols = ("|" if id == GAP else EXAMPLE_VOCAB[id].decode() + "." for id in row.tolist() if id != GONE)
        print(f"round {i}  {''.join(symbols).replace('.|', '|')}")
    print("ids     ", *ids.tolist())

def self_check(seed: int = 0) -> None:
    """Fast against plain on random text, and both against known merges. Raises: AssertionError on any difference."""
    assert merge_words_plain(EXAMPLE, 6) == merge_words(EXAMPLE, 6) == EXAMPLE_MERGES
    tokenizer, rng = Tokenizer(EXAMPLE_VOCAB, EXAMPLE_MERGES, ["<|endoftext|>"]), np.random.default_rng(seed)
    pieces = [*"newstlowr '.é\u00a0\u3000字😀\n\t0", "<|endoftext|>", "'ll", "  ", "internationalization"]
    for _ in range(300):
        text = "".join(rng.choice(pieces, rng.integers(0, 60)))
        ids = tokenizer.encode_plain(text)
        assert tokenizer.decode(ids) == text
        assert ids == tokenizer.fast.encode(text.encode()).tolist() == list(tokenizer.encode_iterable(text, 9)), text

def bench(text: str | None, peer_python: str) -> int:
    """Whole processes of ours and of other libraries in turn, by tests/fixtures/bpe_peers.py: one table. Exit code."""
    import subprocess                                           # here, for it would slow down every start
    peers = Path(__file__).parent / "tests/fixtures/bpe_peers.py"                       # if missing, Python says so
    return subprocess.run([peer_python, peers, "table", text or "", sys.executable, __file__]).returncode

def main(argv: list[str] | None = None) -> int:
    """The command line. Returns: its exit code, 2 for a caller's mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=["train", "encode", "decode", "bench"], help="none: walk-through")
    parser.add_argument("--input", help="a UTF-8 text; for decode, a .npy of token ids")
    parser.add_argument("--out", help="train: a tokenizer.json; encode: a .npy; decode: a text")
    parser.add_argument("--tokenizer", default="out/bpe/tokenizer.json", help="default: %(default)s, train's too")
    parser.add_argument("--vocab-size", type=int, default=10_000, help="default: %(default)s, all tokens together")
    parser.add_argument("--special", action="append", help="train: a special token, one or several (<|endoftext|>)")
    parser.add_argument("--processes", type=int, help="default: all cores")
    parser.add_argument("--peer-python", default=sys.executable, help="bench: one with tiktoken, tokenizers, rustbpe")
    parser.add_argument("--seed", type=int, default=0)
    args, began = parser.parse_args(argv), time.monotonic()
    try:
        if args.command is None:
            walk_through()
            self_check(args.seed)
            print("fast = plain = known merges, there and back  OK")
        elif args.input and not os.path.isfile(args.input):
            raise ValueError(f"--input {args.input} is no file; give a text (to decode, a .npy of token ids)")
        elif args.command == "bench":
            return bench(args.input, args.peer_python)
        elif not args.input or args.command == "encode" and not args.out:
            raise ValueError(f"{args.command} needs --input FILE{' and --out FILE' * (args.command == 'encode')}")
        elif args.command != "train" and not os.path.isfile(args.tokenizer):
            raise ValueError(f"--tokenizer {args.tokenizer} is no file; bpe.py train --input TEXT --out IT makes it")
        elif args.command == "train":
            special, out = args.special or ["<|endoftext|>"], args.out or "out/bpe/tokenizer.json"
            vocab, merges = train_bpe(args.input, args.vocab_size, special, args.processes)
            Tokenizer(vocab, merges, special).save(out)
            print(f"{out}: {len(vocab):,} tokens in {time.monotonic() - began:.1f}s")
        elif args.command == "encode":
            count = encode_file(Tokenizer.from_file(args.tokenizer), args.input, args.out, args.processes)
            size, took = os.path.getsize(args.input), time.monotonic() - began
            print(f"{args.out}: {count:,} tokens from {size:,} bytes, {size / count:.3f} bytes a token, in {took:.1f}s")
        else:
            with explained(f"{args.input} is no .npy of token ids of {args.tokenizer}"):
                text = Tokenizer.from_file(args.tokenizer).decode(np.load(args.input).ravel().tolist())
            with write_whole(args.out) if args.out else contextlib.nullcontext(sys.stdout.buffer) as f:
                f.write(text.encode())
    except (ValueError, OSError) as e:
        print(f"bpe.py: {e}", file=sys.stderr)
        return 2
    return 0

if __name__ == "__main__":
    sys.exit(main())
