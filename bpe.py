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
import itertools
import json
import os
import re
import sys
import time
import unicodedata
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, BinaryIO, Callable, Iterable, Iterator

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
# number before a mark, between a line and the next (a single line end), before a space or tab. (?r) searches from the end.
CUT = r"(?r)(?<=[\p{L}\p{N}])(?=[\p{P}\p{S}\s])|(?<=\S\n)(?=\S)|(?<=\S)(?=[ \t])"


def special_pattern(special_tokens: Iterable[str]) -> str:
    """A pattern for any of the special tokens, the longest that fits first: of "<a>" and "<a><a>", the latter."""
    return "|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True))) or "(?!)"   # (?!) never matches


def safe_cut(raw: bytes, special_tokens: Iterable[str]) -> int:
    """The last place where raw can be cut so that each side gives the tokens it would within the whole; 0 if none is seen.

    A special token or, in every pattern, a pre-token starts there, and no special token can lie across it. Holds whatever
    precedes and follows raw, which must start on a character; its last one may be incomplete.
    """
    reach = max(map(len, special_tokens), default=1)
    special = regex.compile(special_pattern(special_tokens))
    candidates = regex.compile(f"{CUT}|(?={special.pattern})")
    window = 4096
    while True:
        start = max(0, len(raw) - window)
        while start < len(raw) and raw[start] & 0xC0 == 0x80:   # step forward to the first byte of a character
            start += 1
        text = raw[start:].decode("utf-8", "ignore")
        for match in candidates.finditer(text, reach, max(reach, len(text) - reach)):
            cut = match.start()
            around = special.finditer(text, cut - reach, cut + reach, overlapped=True)
            if not any(m.start() < cut < m.end() for m in around):
                return start + len(text[:cut].encode())
        if start == 0:
            return 0
        window *= 8


def safe_chunks(pieces: Iterable[bytes], special_tokens: Iterable[str], size: int) -> Iterator[bytes]:
    """Joins the pieces, and cuts them again where it is safe, into chunks of about `size` bytes."""
    rest, want = bytearray(), size
    for piece in pieces:
        rest += piece
        if len(rest) >= want:
            cut = safe_cut(rest, special_tokens)
            if cut:
                yield bytes(rest[:cut])
                del rest[:cut]
            want = max(size, 2 * len(rest))
    yield bytes(rest)


def file_ranges(path: str, special_tokens: Iterable[str], size: int) -> list[tuple[int, int]]:
    """Stretches (start, end) of about `size` bytes, cut where it is safe, that make up the file."""
    total, cuts = os.path.getsize(path), [0]
    with open(path, "rb") as f:
        for target in range(size, total, size):
            cut, window = 0, 1 << 14
            while target > cuts[-1] and not cut and target + window < total:
                f.seek(target)
                raw = f.read(window)
                skip = next((i for i in range(4) if raw[i] & 0xC0 != 0x80), 0)
                cut = safe_cut(raw[skip:], special_tokens)
                window *= 8
            if cut:
                cuts.append(target + skip + cut)
    return list(zip(cuts, cuts[1:] + [total]))


def read_range(path: str, start: int, end: int) -> bytes:
    """A stretch of a file. Raises: ValueError where it is not UTF-8."""
    with open(path, "rb") as f:
        f.seek(start)
        raw = f.read(end - start)
    try:
        raw.isascii() or raw.decode()
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text: byte 0x{raw[e.start]:02x} at offset {start + e.start}; "
                         f"convert it first (iconv -t utf-8) or leave it out") from None
    return raw


def check_special_tokens(special_tokens: Iterable[str] | None) -> list[str]:
    """The special tokens as a list. Raises: ValueError unless they are different, non-empty strings."""
    if isinstance(special_tokens, str):
        raise ValueError(f"special_tokens must be a list of strings, got the string {special_tokens!r}")
    special_tokens = list(special_tokens or ())
    for i, token in enumerate(special_tokens):
        if not isinstance(token, str) or not token or token in special_tokens[:i]:
            raise ValueError(f"special tokens must be different, non-empty strings; number {i + 1} is {token!r}")
    return special_tokens


# ------------------------------------------------------------------------------------------------------------------
# Training, plain
# ------------------------------------------------------------------------------------------------------------------

def count_words_plain(path: str, special_tokens: list[str]) -> dict[bytes, int]:
    """How often each pre-token occurs in a file. Memory follows the distinct ones, not the file."""
    counts: Counter[str] = Counter()
    pattern = regex.compile(PATTERNS["gpt2"])
    for start, end in file_ranges(path, special_tokens, 1 << 21):
        for document in re.split(special_pattern(special_tokens), read_range(path, start, end).decode()):
            counts.update(pattern.findall(document))
    return {word.encode(): count for word, count in counts.items()}


MIRROR = bytes(range(255, -1, -1))


def greatest_first(left: int, right: int, tokens: list[bytes]) -> str:
    """A key by which the lexicographically greatest pair of byte strings sorts first.

    Every byte is mirrored, and a mark above all of them ends each string: of "a" and "ab", the longer must come first.
    """
    return "\u0100".join([tokens[left].translate(MIRROR).decode("latin-1"),
                          tokens[right].translate(MIRROR).decode("latin-1"), ""])


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


def merge_words_plain(word_counts: dict[bytes, int], num_merges: int, tie_key: Callable = greatest_first,
                      ) -> list[tuple[bytes, bytes]]:
    """The merges in order: each time the most frequent pair of neighbours over all words, ties by the least tie_key.

    Only the words that hold the pair are touched. The heap's counts are upper bounds, for the count of a pair that is
    already there never grows (a merge makes pairs with its new token only): one that is stale is put back when popped.
    Source: arXiv:1508.07909, Algorithm 1, with the counts kept up to date instead of taken anew.
    Example: merge_words_plain({b"low": 5, b"lower": 2}, 1) -> [(b"o", b"w")]   # as frequent as (b"l", b"o"), and greater
    """
    words, counts = [list(word) for word in word_counts], list(word_counts.values())
    tokens = [bytes([i]) for i in range(256)]
    pair_count: dict[tuple[int, int], int] = defaultdict(int)
    pair_words: dict[tuple[int, int], set[int]] = defaultdict(set)
    for w, ids in enumerate(words):
        for pair in zip(ids, ids[1:]):
            pair_count[pair] += counts[w]
            pair_words[pair].add(w)
    heap = [(-count, tie_key(*pair, tokens), pair) for pair, count in pair_count.items()]
    heapq.heapify(heap)
    merges: list[tuple[bytes, bytes]] = []
    while len(merges) < num_merges and heap:
        bound, key, pair = heapq.heappop(heap)
        if pair_count[pair] < -bound:
            if pair_count[pair]:
                heapq.heappush(heap, (-pair_count[pair], key, pair))
            continue
        new, born = len(tokens), set()
        merges.append((tokens[pair[0]], tokens[pair[1]]))
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        for w in pair_words.pop(pair):
            for old in zip(words[w], words[w][1:]):
                pair_count[old] -= counts[w]
            words[w] = merge_pair(words[w], pair, new)
            for now in zip(words[w], words[w][1:]):
                pair_count[now] += counts[w]
                if new in now:
                    pair_words[now].add(w)
                    born.add(now)
        for now in born:
            heapq.heappush(heap, (-pair_count[now], tie_key(*now, tokens), now))
    return merges


# ------------------------------------------------------------------------------------------------------------------
# Tokenizer, plain
# ------------------------------------------------------------------------------------------------------------------

@functools.cache
def byte_to_unicode() -> dict[int, str]:
    """GPT-2's way to write bytes as printable characters: visible Latin-1 as itself, the others from U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in visible]
    return {**{b: chr(b) for b in visible}, **{b: chr(256 + i) for i, b in enumerate(hidden)}}


class Tokenizer:
    """Text to token ids and back.

    Args: vocab {id: bytes}; merges [(left, right)], earliest first; special_tokens: strings that become one token each
          wherever they stand; those that the vocabulary lacks are appended to it. pattern: a key of PATTERNS.
          ignore_merges: a pre-token that is itself in the vocabulary is taken whole (Llama 3). normalize: "NFC" or None.
    Raises: ValueError if a byte is missing from the vocabulary, or a merge's parts or product are.
    Example: Tokenizer({**{i: bytes([i]) for i in range(256)}, 256: b"hi"}, [(b"h", b"i")]).encode("hi!") -> [256, 33]
    """
    cache_size = 1 << 17                                        # words remembered; then the cache starts anew
    fast_from = 1 << 12                                         # characters of text from which whole chunks pay

    def __init__(self, vocab: dict[int, bytes], merges: list[tuple[bytes, bytes]], special_tokens: list[str] | None = None,
                 *, pattern: str = "gpt2", ignore_merges: bool = False, normalize: str | None = None):
        if pattern not in PATTERNS:
            raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, got {pattern!r}")
        self.vocab, self.merges = dict(vocab), merges
        self.pattern, self.ignore_merges, self.normalize = pattern, ignore_merges, normalize
        self.token_id = ids = {token: i for i, token in self.vocab.items()}
        missing = [i for i in range(256) if bytes([i]) not in ids]
        if missing:
            raise ValueError(f"the vocabulary lacks {len(missing)} of the 256 single bytes, byte {missing[0]} first; "
                             f"a byte-level vocabulary needs them all")
        try:
            self.ranks = {}
            for a, b in merges:                                  # a pair's place is its rank; a repeated one counts once
                self.ranks.setdefault((ids[a], ids[b]), (len(self.ranks), ids[a + b]))
        except KeyError as e:
            raise ValueError(f"a merge needs the token {e.args[0]!r}, which the vocabulary lacks") from None
        self.special_tokens: dict[str, int] = {}
        for token in check_special_tokens(special_tokens):
            new = ids.setdefault(token.encode(), max(self.vocab) + 1)
            self.vocab[new] = token.encode()
            self.special_tokens[token] = new
        self._special = re.compile(special_pattern(self.special_tokens))
        self._words = regex.compile(PATTERNS[pattern])
        self._cache: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> list[int]:
        """The token ids of a text. Raises: ValueError for lone surrogates, which have no UTF-8 form."""
        if len(text) < self.fast_from:
            return self.encode_plain(text)
        return list(self.encode_iterable([text], 1 << 20))

    def encode_iterable(self, chunks: Iterable[str], size: int = 1 << 16) -> Iterator[int]:
        """The ids of the joined chunks, however they are cut, holding little more than `size` bytes of text at a time."""
        for raw in safe_chunks(map(utf8, chunks), self.special_tokens, size):
            yield from self.encode_bytes(raw).tolist()

    def encode_bytes(self, raw: bytes) -> np.ndarray:
        """The ids of valid UTF-8, as uint16 if the vocabulary fits and uint32 otherwise."""
        if self.pattern == "gpt2" and not self.normalize:
            return self.fast.encode(raw)
        return np.array(self.encode_plain(raw.decode()), self.dtype)

    @functools.cached_property
    def fast(self) -> "FastEncoder":
        return FastEncoder(self)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("<u2" if max(self.vocab) < 1 << 16 else "<u4")

    def encode_plain(self, text: str) -> list[int]:
        """Cut at the special tokens, cut into pre-tokens, and merge those that are not remembered."""
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
                if len(cache) >= self.cache_size:
                    cache.clear()
                known = cache[word] = self.merge_word(utf8(word))
            ids += known
        return ids

    def merge_word(self, word: bytes) -> tuple[int, ...]:
        """Joins the pair that was learnt first, again and again, until none of the neighbours was ever joined."""
        if self.ignore_merges and word in self.token_id:
            return (self.token_id[word],)
        ids = [self.token_id[word[i:i + 1]] for i in range(len(word))]
        while True:
            known = [pair for pair in zip(ids, ids[1:]) if pair in self.ranks]
            if not known:
                return tuple(ids)
            first = min(known, key=self.ranks.__getitem__)
            ids = merge_pair(ids, first, self.ranks[first][1])

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
        with open(merges_path, encoding="utf-8") as f:
            lines = [line.rstrip("\n") for line in f if line.strip() and not line.startswith("#version")]
        vocab, merges = parse_model(read_json(vocab_path), lines, {"<|endoftext|>", *(special_tokens or ())}, vocab_path)
        return cls(vocab, merges, special_tokens)

    @classmethod
    def from_file(cls, tokenizer_json: str | os.PathLike) -> "Tokenizer":
        """Reads a Hugging Face tokenizer.json of a byte-level BPE with GPT-2's, Llama 3's or Qwen2's pattern.

        Encodes as `tokenizers` does with add_special_tokens=False. Raises: ValueError naming what cannot be honoured.
        """
        path, document = os.fspath(tokenizer_json), read_json(tokenizer_json)
        model = document.get("model") if isinstance(document, dict) else None
        if not isinstance(model, dict) or "vocab" not in model or "merges" not in model:
            raise ValueError(f"{path} is no tokenizer.json of a BPE: it has no model with vocab and merges")
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
            if model.get(key):
                raise ValueError(f"{path}: the model sets {key} = {model[key]!r}, which byte-level BPE does without")
        pattern, normalize = parse_pipeline(document, path)
        added = {token["content"]: token for token in document.get("added_tokens") or []}
        for content, token in added.items():
            for flag in ("lstrip", "rstrip", "single_word"):
                if token.get(flag):
                    raise ValueError(f"{path}: added token {content!r} sets {flag}, which is not supported")
        vocab, merges = parse_model(model["vocab"], model["merges"], added, path)
        vocab.update({token["id"]: content.encode() for content, token in added.items()})
        tokenizer = cls(vocab, merges, list(added), pattern=pattern, normalize=normalize,
                        ignore_merges=bool(model.get("ignore_merges")))
        tokenizer.added, tokenizer.post_processor = added, document.get("post_processor")
        return tokenizer

    added: dict[str, dict] = {}                                 # flags and post-processor of the file it was read from,
    post_processor: dict | None = None                          # kept for save()

    def save(self, tokenizer_json: str | os.PathLike) -> None:
        """Writes a Hugging Face tokenizer.json, which `tokenizers`, `transformers` and vLLM load."""
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        split = {"type": "Split", "pattern": {"Regex": PATTERNS[self.pattern]}, "behavior": "Isolated", "invert": False}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        as_text = {token: token.decode("latin-1").translate(byte_to_unicode()) for token in self.vocab.values()}
        names = {i: as_text[token] for i, token in self.vocab.items()} | {i: s for s, i in self.special_tokens.items()}
        document = {
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": i, "content": s, **flags, **self.added.get(s, {})}
                             for s, i in sorted(self.special_tokens.items(), key=lambda item: item[1])],
            "normalizer": {"type": self.normalize} if self.normalize else None,
            "pre_tokenizer": byte_level if self.pattern == "gpt2" else
                             {"type": "Sequence", "pretokenizers": [split, byte_level | {"use_regex": False}]},
            "post_processor": self.post_processor or byte_level | {"trim_offsets": False},
            "decoder": byte_level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                      "ignore_merges": self.ignore_merges, "vocab": {names[i]: i for i in sorted(names)},
                      "merges": [f"{as_text[a]} {as_text[b]}" for a, b in self.merges]}}
        with whole_file(tokenizer_json) as f:
            f.write(json.dumps(document, ensure_ascii=False, indent=1).encode())


def utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"the text has a lone surrogate, U+{ord(text[e.start]):04X}, which is no character; "
                         f"replace it first: text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')") from None


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


def read_json(path: str | os.PathLike) -> Any:
    with open(path, "rb") as f:
        raw = f.read()
    try:
        return json.loads(raw)
    except ValueError as e:
        raise ValueError(f"{os.fspath(path)} is not JSON: {e}") from None


def parse_model(vocab: dict[str, int], merges: list, added: Iterable[str], path: str | os.PathLike,
                ) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    """Vocabulary and merges ("left right" or [left, right]) from the byte_to_unicode form. Added tokens are in clear."""
    bytes_of = {ord(char): byte for byte, char in byte_to_unicode().items()}
    tokens: dict[str, bytes] = {}
    try:
        for text in vocab:
            tokens[text] = text.encode() if text in added else text.translate(bytes_of).encode("latin-1")
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        return {i: tokens[text] for text, i in vocab.items()}, [(tokens[a], tokens[b]) for a, b in pairs]
    except UnicodeEncodeError:
        raise ValueError(f"{os.fspath(path)}: token {text!r} has a character that stands for no byte; "
                         f"only byte-level vocabularies can be read") from None
    except KeyError as e:
        raise ValueError(f"{os.fspath(path)}: a merge needs the token {e}, which the vocabulary lacks") from None
    except (TypeError, ValueError, AttributeError):
        raise ValueError(f"{os.fspath(path)}: vocab must be {{token: id}}, and every merge two tokens") from None


def parse_pipeline(document: dict, path: str) -> tuple[str, str | None]:
    """The pattern's name and the normalization of a tokenizer.json, or a ValueError that says what is foreign in it."""
    steps = document.get("pre_tokenizer") or {}
    pattern, normalizer = None, (document.get("normalizer") or {}).get("type")
    for step in steps.get("pretokenizers", [steps]):
        if step.get("type") == "ByteLevel" and not step.get("add_prefix_space"):
            pattern = PATTERNS["gpt2"] if step.get("use_regex", True) else pattern
        elif step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            pattern = (step.get("pattern") or {}).get("Regex")
        else:
            raise ValueError(f"{path} has the pre-tokenizer {step}; known are ByteLevel and an isolated Split")
    name = next((name for name in PATTERNS if PATTERNS[name] == pattern), None)
    if name is None or normalizer not in (None, "NFC"):
        raise ValueError(f"{path} has the pattern {pattern!r} and normalizer {normalizer!r}; "
                         f"known are the patterns of {', '.join(PATTERNS)}, and NFC or none")
    return name, normalizer


# ------------------------------------------------------------------------------------------------------------------
# Fast: the same work on a whole chunk of bytes at a time
# ------------------------------------------------------------------------------------------------------------------

BLANK, SPACE, LETTER, NUMBER, OTHER, EDGE, UNKNOWN = range(7)   # classes of characters; EDGE: no text, a special token
SAMPLES = ("\n", " ", "a", "1", ".", "")


@functools.cache
def character_classes() -> np.ndarray:
    """(0x110000,) uint8: the class of every code point, UNKNOWN until `classify` has asked the regex module for it."""
    return np.full(0x110000, UNKNOWN, np.uint8)


def classify(code_points: np.ndarray) -> np.ndarray:
    """The classes of code points, as the pattern would see them."""
    table = character_classes()
    classes = table[code_points]
    if UNKNOWN in classes:
        for code_point in np.unique(code_points[classes == UNKNOWN]).tolist():
            char = chr(code_point)
            table[code_point] = (SPACE if char == " " else BLANK if regex.match(r"\s", char) else
                                 LETTER if regex.match(r"\p{L}", char) else
                                 NUMBER if regex.match(r"\p{N}", char) else OTHER)
        classes = table[code_points]
    return classes


@functools.cache
def lookup_tables() -> tuple[bytes, np.ndarray, np.ndarray]:
    """What the pattern says, asked once and written into three tables.

    byte_class (256,): the class of every ASCII byte; starts (216,): for the classes (previous, this, next), read as a
    number in base 6, whether a pre-token starts here; contraction (65536,): for two bytes after an apostrophe, how many
    of them it takes along ("s": 1, "ll": 2).
    """
    byte_class = bytes(classify(np.arange(128))) + bytes([OTHER]) * 128
    starts, contraction = np.zeros(216, bool), np.zeros(1 << 16, np.uint8)
    pattern = regex.compile(PATTERNS["gpt2"])
    for i, (before, this, after) in enumerate(itertools.product(SAMPLES, repeat=3)):
        starts[i] = this != "" and any(m.start() == len(before) for m in pattern.finditer(before + this + after))
    for first, second in itertools.product(range(128), range(256)):
        if chr(first).isalpha():
            length = pattern.match("'" + chr(first) + chr(second)).end() - 1
            contraction[first + 256 * second] = length if length <= 2 else 0
    return byte_class, starts, contraction


def pretoken_starts(raw: bytes, special: re.Pattern) -> np.ndarray:
    """Where GPT-2's pre-tokens start in UTF-8 bytes; a special token counts as one. Returns int64 (P,).

    Whether a pre-token starts at a character depends on its class and its two neighbours' only, so that one table
    replaces the regular expression. Two things do not fit the table and are put right where they occur: contractions,
    and characters of several bytes, of which only the first may start a pre-token.
    """
    byte_class, start_table, contraction = lookup_tables()
    N, data = len(raw), np.frombuffer(raw, np.uint8)
    padded = np.full(N + 3, EDGE, np.uint8)
    classes = padded[1:N + 1]                                                       # (N,) with an EDGE on either side
    classes[:] = np.frombuffer(raw.translate(byte_class), np.uint8)
    if not raw.isascii():
        beyond = np.flatnonzero(data >= 0x80)
        lead = beyond[data[beyond] >= 0xC0]
        width = 2 + (data[lead] >= 0xE0) + (data[lead] >= 0xF0)
        code_points = np.frombuffer(raw.translate(None, bytes(range(128))).decode().encode("utf-32-le"), np.uint32)
        char_class = classify(code_points)
        classes[beyond] = np.repeat(char_class, width)                             # all bytes of a character alike
    spans = [match.span() for match in special.finditer(raw)]
    for start, end in spans:
        classes[start:end] = EDGE
    starts = start_table[36 * padded[:N] + 6 * classes + padded[2:N + 2]]           # (N,) 0 or 1

    quote = np.flatnonzero(data == ord("'"))
    quote = quote[(padded[quote] != OTHER) & (padded[quote] != SPACE)]              # else it is inside " '" or "(('"
    after = np.frombuffer(raw + bytes(2), np.uint8)
    take = contraction[after[quote + 1] + 256 * after[quote + 2].astype(np.uint16)]
    ends = quote + 1 + take
    ok = (take > 0) & (padded[quote + 2] == LETTER) & (padded[ends] == LETTER)      # not when a special token cuts it
    starts[quote[ok] + 1] = 0
    ends = ends[ok]
    starts[ends[padded[ends + 1] == LETTER]] = 1
    if not raw.isascii():
        blank, size = lead[char_class == BLANK], width[char_class == BLANK]
        starts[blank] |= starts[blank + size - 1]                                   # its last byte saw what follows
        starts[blank + 1] = starts[blank + size - 1] = 0
    starts[[start for start, _ in spans]] = 1
    return np.flatnonzero(starts)


class Growing:
    """A numpy array that is appended to. Its `data` is longer than its `size`, by at least LONG + 8 elements."""

    def __init__(self, dtype: Any):
        self.data, self.size = np.zeros(1024, dtype), 0

    def append(self, values: Any) -> None:
        end = self.size + len(values)
        if end + LONG + 8 > len(self.data):
            self.data = np.concatenate([self.data[:self.size], np.zeros(end + LONG + 8, self.data.dtype)])
        self.data[self.size:end] = values
        self.size = end


class KeyTable:
    """Numbers distinct uint64 keys 1, 2, 3, ... in the order in which they are added; whole arrays at a time.

    A hash table with open addressing: a key's number is in the slot that its product with a large odd number names, or
    in the next one that was free. Number 0 marks a free slot; its key, 2**64 - 1, is nobody's.
    """

    def __init__(self):
        self.keys, self.slots = Growing(np.uint64), np.zeros(1 << 12, np.int32)
        self.keys.append([2**64 - 1])

    def first_slot(self, keys: np.ndarray) -> np.ndarray:
        bits = len(self.slots).bit_length() - 1
        return ((keys * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - bits)).view(np.int64)

    def get(self, keys: np.ndarray) -> np.ndarray:
        """The numbers of the keys, 0 for those that were never added."""
        slot = self.first_slot(keys)
        numbers = self.slots[slot]
        on = np.flatnonzero(self.keys.data[numbers] != keys)
        on = on[numbers[on] > 0]                                # another key sits there: go on to the next slot
        slot = slot[on]
        while on.size:
            slot = (slot + 1) & (len(self.slots) - 1)
            numbers[on] = other = self.slots[slot]
            further = (other > 0) & (self.keys.data[other] != keys[on])
            on, slot = on[further], slot[further]
        return numbers

    def add(self, keys: np.ndarray) -> None:
        """Adds keys that are all different and not there yet. At most a fourth of the slots is ever taken."""
        first = self.keys.size
        self.keys.append(keys)
        if 4 * self.keys.size > len(self.slots):
            self.slots = np.zeros(1 << (8 * self.keys.size).bit_length(), np.int32)
            first = 1
        numbers = np.arange(first, self.keys.size, dtype=np.int32)
        slot = self.first_slot(self.keys.data[first:self.keys.size])
        while numbers.size:
            free = self.slots[slot] == 0
            self.slots[slot[free]] = numbers[free]              # of several that want one slot, the last one gets it
            on = self.slots[slot] != numbers
            numbers, slot = numbers[on], (slot[on] + 1) & (len(self.slots) - 1)


# FILL[n] sets all but the first n bytes of a 64-bit word to 0xFF, which never occurs in UTF-8: what a short word lacks
FILL = np.array([2**64 - 2**(8 * n) for n in range(8)] + [0], np.uint64)
LONG = 64                                                       # words of more bytes are looked up one by one
MULTIPLIERS = np.random.default_rng(0).integers(0, 2**63, LONG // 8).astype(np.uint64) * np.uint64(2) + np.uint64(1)


def eight_bytes(padded: bytes) -> np.ndarray:
    """A view of the eight bytes from every position on as one uint64; it copies nothing."""
    return np.ndarray(len(padded) - 7, "<u8", padded, strides=(1,))


def spread(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The positions of many stretches in one array: spread([5, 9], [2, 3]) -> [5, 6, 9, 10, 11]."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


class WordTable:
    """Gives every distinct word a number 1, 2, 3, ... and keeps its bytes: a dict of words, a chunk at a time.

    A word of up to eight bytes is its own 64-bit key. A longer one has a hash for a key, and its bytes are compared
    with those of the word that was found; where they differ, and for words over LONG bytes, a dict decides.
    """

    def __init__(self):
        self.table, self.others = KeyTable(), {}
        self.text, self.starts, self.lengths = Growing(np.uint8), Growing(np.int64), Growing(np.int64)
        self.starts.append([0])                                 # of number 0, which is no word
        self.lengths.append([0])

    def numbers(self, raw: bytes, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The numbers of the words that stand in raw at starts; words not seen before are added. Returns int32 (P,)."""
        view = eight_bytes(raw + bytes(8))
        keys = view[starts] | FILL[np.minimum(lengths, 8)]
        long = np.flatnonzero(lengths > 8)                      # for these: all their bytes, in rows of eight
        clipped = np.minimum(lengths[long], LONG)
        num_rows = (clipped + 7) >> 3
        begins = np.cumsum(num_rows) - num_rows
        owner = np.repeat(np.arange(len(long)), num_rows)
        row = np.arange(len(owner)) - begins[owner]
        fill = FILL[np.minimum(clipped[owner] - 8 * row, 8)]
        rows = view[starts[long][owner] + 8 * row] | fill
        if long.size:
            keys[long] = word_hash(np.add.reduceat(rows * MULTIPLIERS[row], begins))
        numbers = self.table.get(keys)
        new = np.flatnonzero(numbers == 0)
        if new.size:
            distinct, first = np.unique(keys[new], return_index=True)
            self.add(raw, starts[new[first]], np.minimum(lengths[new[first]], LONG), distinct)
            numbers[new] = self.table.get(keys[new])
        found = numbers[long]
        same = self.lengths.data[found] == lengths[long]
        kept = eight_bytes(self.text.data)[self.starts.data[found][owner] + 8 * row] | fill
        same[owner[kept != rows]] = False
        wrong = long[~same]                                     # too long, or two words have one hash
        if wrong.size:
            numbers[wrong] = self.one_by_one(raw, starts[wrong], lengths[wrong])
        return numbers

    def add(self, raw: bytes, starts: np.ndarray, lengths: np.ndarray, keys: np.ndarray) -> None:
        self.table.add(keys)
        self.starts.append(self.text.size + np.cumsum(lengths) - lengths)
        self.lengths.append(lengths)
        self.text.append(np.frombuffer(raw, np.uint8)[spread(starts, lengths)])

    def one_by_one(self, raw: bytes, starts: np.ndarray, lengths: np.ndarray) -> list[int]:
        words = [raw[start:start + length] for start, length in zip(starts.tolist(), lengths.tolist())]
        new = {word: i for i, word in enumerate(words) if word not in self.others}
        self.others.update(zip(new, itertools.count(self.lengths.size)))
        at = np.fromiter(new.values(), np.int64)
        self.add(raw, starts[at], lengths[at], np.full(len(at), 2**64 - 1, np.uint64))     # a key that is never asked for
        return [self.others[word] for word in words]


def word_hash(total: np.ndarray) -> np.ndarray:
    """56 mixed bits below the byte 0xFE, which never occurs in UTF-8: the key of no short word."""
    return ((total ^ (total >> np.uint64(32))) * MULTIPLIERS[0] >> np.uint64(8)) | np.uint64(0xFE << 56)


def count_words(path: str, special_tokens: list[str], ranges: list[tuple[int, int]]) -> tuple[np.ndarray, ...]:
    """count_words_plain over some ranges of a file. Returns: all words' bytes end to end, their lengths, their counts."""
    words, counts = WordTable(), np.zeros(1, np.int64)
    special = re.compile(special_pattern(special_tokens).encode())
    for start, end in ranges:
        raw = read_range(path, start, end)
        starts = pretoken_starts(raw, special)
        numbers = words.numbers(raw, starts, np.diff(starts, append=len(raw)))
        seen = np.bincount(numbers, minlength=words.lengths.size)
        seen[:len(counts)] += counts
        counts = seen
    return words.text.data[:words.text.size], words.lengths.data[1:words.lengths.size], counts[1:]


def count_all_words(path: str, special_tokens: list[str], num_processes: int | None = None, log: Callable | None = None,
                    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """count_words over the whole file, by several processes; the special tokens are left out."""
    ranges = file_ranges(path, special_tokens, CHUNK)
    num_processes = min(num_processes or os.cpu_count() or 1, len(ranges))
    step = max(1, min(16, len(ranges) // (2 * num_processes)))
    jobs = [(path, special_tokens, ranges[i:i + step]) for i in range(0, len(ranges), step)]
    words, totals, lengths = WordTable(), np.zeros(0, np.int64), np.array([len(s.encode()) for s in special_tokens], int)
    words.numbers("".join(special_tokens).encode(), np.cumsum(lengths) - lengths, lengths)
    report = progress("count bytes", ranges[-1][1], log)
    for job, (text, lengths, counts) in zip(jobs, in_order(count_words, jobs, num_processes)):
        numbers = words.numbers(text.tobytes(), np.cumsum(lengths) - lengths, lengths)
        totals = np.append(totals, np.zeros(words.lengths.size - len(totals), np.int64))
        totals[numbers] += counts
        report(job[2][-1][1])
    S, lengths = 1 + len(special_tokens), words.lengths.data[:words.lengths.size]
    return words.text.data[lengths[:S].sum():words.text.size], lengths[S:], totals[S:]


GAP, GONE = -1, -2                                              # in a row of symbols: between words, and merged away
NEVER = 2**63 - 1


def pair_key(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return ((left << 32) | (right & 0xFFFFFFFF)).view(np.uint64)


def merge_words(text: np.ndarray, lengths: np.ndarray, counts: np.ndarray, num_merges: int,
                tie_key: Callable = greatest_first, log: Callable | None = None) -> list[tuple[bytes, bytes]]:
    """merge_words_plain on flat arrays. text: all words' bytes end to end, uint8; lengths, counts: (W,) of each word.

    All words stand in one row of symbols with a gap before each. What is merged away stays in the row until it is next
    closed up; links jump over it. For each pair the heap has a count and `places` the positions where it was seen, both
    of them upper bounds: a pair that is popped is counted again. Only pairs that occur `floor` times are kept at all;
    when none of them is left, the row is closed up and all pairs are taken anew, with a lower floor. (A pair below the
    floor cannot rise above it, for new places come with new symbols only.)
    """
    symbol = np.full(len(text) + len(lengths) + 1, GAP, np.int32)
    inside = spread(np.cumsum(lengths) - lengths + np.arange(1, len(lengths) + 1), lengths)
    symbol[inside] = text
    weight = np.zeros(len(symbol), np.int32 if counts.max(initial=0) < 2**31 else np.int64)
    weight[inside] = np.repeat(counts, lengths)
    del inside
    tokens, merges = [bytes([i]) for i in range(256)], []
    heap: list[tuple[int, Any, tuple[int, int]]] = []
    places: dict[tuple[int, int], np.ndarray] = {}

    def group(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        begins = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        return begins, np.append(begins[1:], len(keys))

    def remember(pair: tuple[int, int], count: int, at: np.ndarray) -> None:
        places[pair] = at
        heapq.heappush(heap, (-count, tie_key(*pair, tokens), pair))

    report = progress("merge", num_merges, log)
    while len(merges) < num_merges:
        if not heap:                                            # close up the row and take all pairs anew
            alive = symbol != GONE
            symbol, weight = symbol[alive], weight[alive]
            del alive
            at = np.flatnonzero((symbol[:-1] != GAP) & (symbol[1:] != GAP))
            if not at.size:
                break
            id_bits, place_bits = len(tokens).bit_length(), len(symbol).bit_length()
            keys = (symbol[at].astype(np.int64) << id_bits) | symbol[at + 1]
            if 2 * id_bits + place_bits < 64:                   # sorting one number is faster than sorting two by one
                keys = np.sort((keys << place_bits) | at)
                at = (keys & ((1 << place_bits) - 1)).astype(np.int32)
                keys >>= place_bits
            else:
                order = np.argsort(keys, kind="stable")
                keys, at = keys[order], at[order].astype(np.int32)
            begins, ends = group(keys)
            sums = np.add.reduceat(weight[at], begins, dtype=np.int64)
            floor = max(1, int(sums.max()) // 20)
            for i in np.flatnonzero(sums >= floor).tolist():
                pair = divmod(int(keys[begins[i]]), 1 << id_bits)
                remember(pair, int(sums[i]), at[begins[i]:ends[i]].copy())
            del keys, at, begins, ends, sums
            following = np.arange(1, len(symbol) + 1, dtype=np.int32)
            preceding = following - 2
            continue

        bound, key, (left, right) = heapq.heappop(heap)
        at = places.pop((left, right))
        at = at[(symbol[at] == left) & (symbol[following[at]] == right)]
        count = int(weight[at].sum())
        if count < -bound:
            if count >= floor:
                remember((left, right), count, at)
            continue
        if left == right and len(at) > 1:                       # in "aaaa", two places overlap the one before
            at = np.sort(at)
            chained = np.append(False, following[at[:-1]] == at[1:])
            nth = np.arange(len(at))
            at = at[(nth - np.maximum.accumulate(np.where(chained, 0, nth))) % 2 == 0]
        new = len(tokens)
        merges.append((tokens[left], tokens[right]))
        tokens.append(tokens[left] + tokens[right])
        gone = following[at]
        after = following[gone]
        symbol[at], symbol[gone] = new, GONE
        following[at], preceding[after] = after, at
        before = preceding[at]
        x, y = symbol[before], symbol[after]
        has_x, has_y = (x >= 0) & (x != new), y >= 0            # (new, new) is counted once, by its left half
        keys = np.concatenate([2 * x[has_x], 2 * y[has_y] + 1])
        if keys.size:
            at = np.concatenate([before[has_x], at[has_y]])
            order = keys.argsort()
            keys, at = keys[order], at[order]
            begins, ends = group(keys)
            sums = np.add.reduceat(weight[at], begins, dtype=np.int64)
            for i in np.flatnonzero(sums >= floor).tolist():
                other, on_the_right = divmod(int(keys[begins[i]]), 2)
                pair = (new, other) if on_the_right else (other, new)
                remember(pair, int(sums[i]), at[begins[i]:ends[i]].copy())
        report(len(merges))
    return merges


class FastEncoder:
    """Tokenizer.encode_plain for GPT-2's pattern, a chunk of UTF-8 at a time.

    Every word of the chunk is looked up by its number; words met for the first time are merged, all of them together.
    """
    max_words, max_bytes = 1 << 19, 1 << 24                     # what is remembered; then the tables start anew

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.dtype = tokenizer, tokenizer.dtype
        pairs = np.array(list(tokenizer.ranks), np.int64).reshape(-1, 2)
        self.ranks = KeyTable()                                 # of pairs, in order: a pair's number is its rank, plus 1
        self.ranks.add(pair_key(pairs[:, 0], pairs[:, 1]))
        self.merged = np.array([0] + [new for _, new in tokenizer.ranks.values()])
        self.byte_ids = np.array([tokenizer.token_id[bytes([i])] for i in range(256)])
        self.special = re.compile(special_pattern(tokenizer.special_tokens).encode())
        self.forget()

    def forget(self) -> None:
        self.words, self.ids, self.begins, self.counts = WordTable(), Growing(self.dtype), Growing(int), Growing(int)
        self.remember([], [0])
        for token, i in self.tokenizer.special_tokens.items():
            raw = token.encode()
            self.words.numbers(raw, np.array([0]), np.array([len(raw)]))
            self.remember([i], [1])

    def remember(self, ids: np.ndarray, counts: np.ndarray) -> None:
        self.begins.append(self.ids.size + np.cumsum(counts) - counts)
        self.counts.append(counts)
        self.ids.append(ids)

    def encode(self, raw: bytes) -> np.ndarray:
        """The ids of valid UTF-8, in the tokenizer's dtype."""
        if self.words.lengths.size > self.max_words or self.words.text.size > self.max_bytes:
            self.forget()
        starts = pretoken_starts(raw, self.special)
        numbers = self.words.numbers(raw, starts, np.diff(starts, append=len(raw)))
        if self.words.lengths.size > self.counts.size:
            self.learn(self.counts.size)
        return self.ids.data[spread(self.begins.data[numbers], self.counts.data[numbers])]

    def learn(self, first: int) -> None:
        """Merges the words from number `first` on."""
        starts, lengths = (a.data[first:a.size] for a in (self.words.starts, self.words.lengths))
        self.remember(*self.merge_batch(self.words.text.data[starts[0]:self.words.text.size], lengths))

    def merge_batch(self, text: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokenizer.merge_word for many words at once, end to end in text. Returns: their ids, and how many of each.

        The words stand in a row with a gap before each, and links jump over what is merged away, as in merge_words. In
        every round each word joins its pair of lowest rank, the first of them; a word without such a pair is done.
        """
        first = np.cumsum(lengths + 1) - lengths
        symbol = np.full(len(text) + len(lengths) + 1, GAP, np.int64)
        symbol[spread(first, lengths)] = self.byte_ids[text]
        following = np.arange(1, len(symbol) + 1)
        preceding = following - 2
        cost = np.full(len(symbol), NEVER)                      # of the pair that starts here: its rank, then its place
        at, words = np.arange(len(symbol) - 1), first
        while True:
            rank = self.ranks.get(pair_key(symbol[at], symbol[following[at]]))
            cost[at] = np.where(rank == 0, NEVER, (rank.astype(np.int64) << 32) | at)
            best = np.minimum.reduceat(cost, words)             # what is done lies behind a word, and costs NEVER
            words, best = words[best < NEVER], best[best < NEVER]
            if not words.size:
                break
            at = best & 0xFFFFFFFF
            gone = following[at]
            after = following[gone]
            symbol[at], symbol[gone], cost[gone] = self.merged[best >> 32], GONE, NEVER
            following[at], preceding[after] = after, at
            at = np.concatenate([preceding[at], at])
        alive = symbol != GONE
        counts = np.add.reduceat(alive[:-1], first - 1, dtype=np.int64) - 1         # less the gap
        return symbol[alive & (symbol != GAP)], counts


# ------------------------------------------------------------------------------------------------------------------
# Whole files
# ------------------------------------------------------------------------------------------------------------------

CHUNK = 1 << 20                                                 # bytes handled at a time


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


def in_order(function: Callable, jobs: list[tuple], num_processes: int, start: Callable | None = None,
             state: tuple = ()) -> Iterator:
    """function(*job) for every job, in order, by several processes that first call start(*state); few results wait."""
    if num_processes == 1:
        if start:
            start(*state)
        yield from (function(*job) for job in jobs)
        return
    with ProcessPoolExecutor(num_processes, initializer=start, initargs=state) as pool:
        pending: deque = deque()
        for job in jobs:
            pending.append(pool.submit(function, *job))
            if len(pending) > 2 * num_processes:
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
    for a, b in itertools.permutations(special_tokens, 2):
        if a in b:
            raise ValueError(f"special tokens overlap: {a!r} is part of {b!r}; leave one out of the training")
    num_merges = vocab_size - 256 - len(special_tokens)
    if num_merges < 0:
        raise ValueError(f"vocab_size {vocab_size} is too small: 256 bytes and {len(special_tokens)} special tokens need "
                         f"{256 + len(special_tokens)}")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{path} is empty; there is nothing to learn from")
    merges = merge_words(*count_all_words(path, special_tokens, num_processes, log), num_merges, log=log)
    if len(merges) < num_merges and log:
        log(f"stopped early: no pair is left after {len(merges):,} merges of {num_merges:,}; the vocabulary has "
            f"{256 + len(special_tokens) + len(merges):,} tokens")
    tokens = [bytes([i]) for i in range(256)] + [s.encode() for s in special_tokens] + [a + b for a, b in merges]
    return dict(enumerate(tokens)), merges


def start_worker(tokenizer: Tokenizer, path: str) -> None:
    global _worker
    _worker = tokenizer, path


def encode_range(start: int, end: int) -> np.ndarray:
    tokenizer, path = _worker
    return tokenizer.encode_bytes(read_range(path, start, end))


np.empty(31 << 20, np.uint8)


def encode_file(tokenizer: Tokenizer, text_path: str | os.PathLike, npy_path: str | os.PathLike,
                num_processes: int | None = None, log: Callable[[str], None] | None = None) -> int:
    """Encodes a UTF-8 text file into a .npy of token ids, uint16 if the vocabulary fits and uint32 otherwise.

    Written whole or not at all. Returns: the number of tokens. Raises: ValueError for an empty file or one not UTF-8.
    """
    path, size, total = os.fspath(text_path), os.path.getsize(text_path), 0
    if size == 0:
        raise ValueError(f"{path} is empty; there is nothing to encode")
    ranges = file_ranges(path, tokenizer.special_tokens, CHUNK)
    num_processes = min(num_processes or os.cpu_count() or 1, len(ranges))
    report = progress("encode bytes", size, log)
    with whole_file(npy_path) as f:
        f.write(npy_header(tokenizer.dtype, 0))
        for (_, end), ids in zip(ranges, in_order(encode_range, ranges, num_processes, start_worker, (tokenizer, path))):
            f.write(ids)
            total += len(ids)
            report(end)
        f.seek(0)
        f.write(npy_header(tokenizer.dtype, total))
    return total


def npy_header(dtype: np.dtype, length: int) -> bytes:
    """The 128 bytes in front of a one-dimensional array in numpy's file format, version 1.0."""
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({length},), }}"
    return b"\x93NUMPY\x01\x00\x76\x00" + text.ljust(117).encode() + b"\n"


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
        for start, end in file_ranges(path, tokenizer.special_tokens, CHUNK):
            size, count = end, count + len(tokenizer.encode_bytes(read_range(path, start, end)))
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
