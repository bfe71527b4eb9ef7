"""data_filter.py - from a raw web crawl to clean text.

What:       WARC/WET archives in; HTML to text, language, quality rules, harm and quality classifiers, PII masking; JSON
            lines out. Each step is a function of its own, in the order of the pipeline.
Source:     WARC 1.1 (ISO 28500); WHATWG HTML 13.2.5 (tokenizer) and Encoding; Gopher, arXiv:2112.11446 A1.1;
            C4, arXiv:1910.10683 2.2; FineWeb, arXiv:2406.17557 3.5; FastText, arXiv:1607.01759 and 1607.04606.
Copy:       this file alone; needs numpy. MIT.
Run:        python data_filter.py                           # a walk through one page, then the self-check
            python data_filter.py CRAWL.warc.gz --out DIR   # the pipeline
"""
import argparse
import codecs
import gzip
import html
import io
import json
import math
import os
import random
import re
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import Pool

import numpy as np

# ----------------------------------------------------------------------------------------------- 1. archives
BLOCK, MAX_RECORD = 1 << 16, 1 << 26         # bytes read at a time; records above 64 MiB are stepped over, not held


@dataclass(slots=True)
class Record:
    """One WARC record. `payload` is the HTTP body of a response, the block of every other record."""
    kind: str                                # "response", "conversion" (WET), "warcinfo", "request", ...
    url: str
    headers: dict[str, str]                  # WARC headers, names in lower case
    status: int = 0                          # HTTP status, 0 where there is none
    http: dict[str, str] = field(default_factory=dict)
    payload: bytes = b""
    truncated: str = ""                      # WARC-Truncated: length, time, disconnect, ...
    end: int = 0                             # bytes of the (compressed) file read so far


class ByteStream:
    """A file as bytes, gzip undone: `read(n)` and `readline()` give all that came before a fault; `error` names it."""

    def __init__(self, raw) -> None:
        self.raw, self.error, self.position = raw, "", 0
        self.ahead, self.buffer = raw.read(BLOCK), bytearray()
        self.inflate = zlib.decompressobj(31) if self.ahead[:2] == b"\x1f\x8b" else None

    def fill(self) -> bool:
        """Adds at least one byte to the buffer, or returns False at the end or at a fault."""
        before = len(self.buffer)
        while len(self.buffer) == before:
            if not self.ahead:
                self.ahead = self.raw.read(BLOCK)
                self.position += len(self.ahead)
            if self.error or not self.ahead:
                if self.inflate and not self.error and not self.inflate.eof:
                    self.buffer += self.inflate.flush()
                    self.error = "truncated gzip member"
                return len(self.buffer) > before
            if not self.inflate:
                self.buffer += self.ahead
                self.ahead = b""
            elif self.inflate.eof:                                   # next member; some writers pad with zeros
                self.ahead = self.ahead.lstrip(b"\0")
                if self.ahead:
                    self.inflate = zlib.decompressobj(31)
            else:
                spare = self.inflate.copy()
                try:
                    self.buffer += self.inflate.decompress(self.ahead, 16 * BLOCK)
                    self.ahead = self.inflate.unused_data if self.inflate.eof else self.inflate.unconsumed_tail
                except zlib.error:                                   # keep what lies before the broken byte
                    self.error = "corrupt gzip member"
                    for byte in self.ahead:
                        try:
                            self.buffer += spare.decompress(bytes((byte,)))
                        except zlib.error:
                            break
        return True

    def read(self, size: int, keep: bool = True) -> bytes:
        parts, left = [], size
        while left and (self.buffer or self.fill()):
            piece = bytes(self.buffer[:left])
            del self.buffer[:left]
            left -= len(piece)
            parts.append(piece if keep else b"")
        return b"".join(parts)

    def readline(self) -> bytes:
        while (end := self.buffer.find(b"\n")) < 0 and len(self.buffer) < BLOCK and self.fill():
            pass
        return self.read(end + 1 if end >= 0 else min(len(self.buffer), BLOCK))


def open_source(source):
    """A path, "-" for stdin, an http(s) URL, or a binary file object."""
    if hasattr(source, "read"):
        return source
    if source == "-":
        return sys.stdin.buffer
    if str(source).startswith(("http://", "https://")):
        from urllib.request import urlopen
        return urlopen(source, timeout=60)
    return open(source, "rb")


def header_lines(lines: list[bytes]) -> dict[str, str]:
    headers: dict[str, str] = {}
    name = ""
    for line in lines:
        if line[:1] in b" \t" and name:                              # a folded header goes on
            headers[name] += " " + line.strip().decode("utf-8", "replace")
        elif b":" in line:
            name, value = line.decode("utf-8", "replace").split(":", 1)
            name = name.strip().lower()
            headers[name] = value.strip()
    return headers


def inflate_body(body: bytes, wbits: int) -> bytes:
    """Decompresses at most MAX_RECORD bytes; what came before a fault is kept; not compressed at all: as it is."""
    stream, out = zlib.decompressobj(wbits), b""
    try:
        out = stream.decompress(body, MAX_RECORD)
    except zlib.error:
        stream = zlib.decompressobj(wbits)
        try:
            for at in range(0, len(body), 64):
                out += stream.decompress(body[at:at + 64], MAX_RECORD)
        except zlib.error:
            pass
    return out or body


def dechunk(body: bytes) -> bytes:
    """Undoes chunked transfer encoding where it is really there (RFC 9112, 7.1); else gives the body back."""
    out, at = [], 0
    while match := re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n").match(body, at):
        size = int(match[1], 16)
        at = match.end() + size
        out.append(body[match.end():at])
        if size == 0 or at >= len(body):
            return b"".join(out)
        at += 2 if body[at:at + 2] == b"\r\n" else 1
    return b"".join(out) if out else body


def http_body(head: dict[str, str], body: bytes) -> bytes:
    """Common Crawl stores bodies plain and masks these headers as X-Crawler-*; other archives keep both."""
    length = head.get("content-length", "")
    if body[:2] == b"\r\n" and (length == str(len(body) - 2) or head.get("x-crawler-content-length")
                                or body[2:4] == b"\x1f\x8b"):
        body = body[2:]                                              # CC-MAIN-2018-34 has a stray CRLF here
    if "chunked" in head.get("transfer-encoding", "").lower():
        body = dechunk(body)
    for coding in reversed(head.get("content-encoding", "").lower().replace(" ", "").split(",")):
        if coding in ("gzip", "x-gzip") and body[:2] == b"\x1f\x8b":
            body = inflate_body(body, 31)
        elif coding == "deflate":
            plain = inflate_body(body, 15)
            body = inflate_body(body, -15) if plain is body else plain
    return body


def read_warc(source, warnings: Counter | None = None) -> Iterator[Record]:
    """Streams the records of a WARC 1.0/1.1 or WET file: path, "-", URL or binary file; plain or gzip.

    A fault ends the file: it is counted in `warnings` and every complete record before it has been yielded.
    Example: for r in read_warc("CC-MAIN.warc.gz"): print(r.kind, r.url, r.status, len(r.payload))
    """
    warnings = Counter() if warnings is None else warnings
    raw = open_source(source)
    try:
        stream = ByteStream(raw)
        while line := stream.readline():
            if not line.strip(b"\r\n\0"):
                continue
            if not line.startswith(b"WARC/1."):
                warnings["not a WARC record"] += 1
                return
            lines = []
            while (line := stream.readline()).strip(b"\r\n"):
                lines.append(line)
            headers = header_lines(lines)
            length = headers.get("content-length", "")
            if not length.isdecimal():
                warnings["no Content-Length"] += 1
                return
            if int(length) > MAX_RECORD:
                warnings["record over 64 MiB stepped over"] += 1
                stream.read(int(length), keep=False)
                continue
            block = stream.read(int(length))
            if len(block) < int(length):
                warnings[stream.error or "truncated record"] += 1
                return
            record = Record(headers.get("warc-type", "").lower(), headers.get("warc-target-uri", "").strip("<>"), headers,
                            payload=block, truncated=headers.get("warc-truncated", ""), end=stream.position)
            if record.kind in ("response", "request") and "http" in headers.get("content-type", ""):
                head, _, body = block.partition(b"\r\n\r\n")
                first, *rest = head.split(b"\n")
                status = first.split(b" ", 2)[1:2]
                record.status = int(status[0]) if status and status[0].strip().isdigit() else 0
                record.http = header_lines(rest)
                record.payload = http_body(record.http, body)
            yield record
        if stream.error:
            warnings[stream.error] += 1
    finally:
        if raw is not source:
            raw.close()


# ----------------------------------------------------------------------------------------------- 2. charset
# The web's labels mean the larger set (WHATWG Encoding 4.2).
ALIASES = {"latin-1": "cp1252", "latin1": "cp1252", "iso-8859-1": "cp1252", "iso8859-1": "cp1252", "us-ascii": "cp1252",
           "ascii": "cp1252", "gb2312": "gb18030", "gbk": "gb18030", "x-gbk": "gb18030", "euc-kr": "cp949",
           "ks_c_5601-1987": "cp949", "shift_jis": "cp932", "shift-jis": "cp932", "x-sjis": "cp932", "sjis": "cp932",
           "big5": "big5hkscs", "iso-8859-9": "cp1254", "tis-620": "cp874", "iso-8859-11": "cp874",
           "windows-874": "cp874", "utf8": "utf-8", "unicode": "utf-8", "utf-16": "utf-8"}
# The commonest letters outside ASCII of what each charset is used for: the guess is the one that yields most of them.
COMMON = {"gb18030": "的一是不了在有人我他这中大来上国个到说们为子和你地出道也时年",
          "big5hkscs": "的一是不了在有人我他這中大來上國個到說們為子和你地出道也時年",
          "cp932": "のにはをたがでてとしれさいるもなかっこ、。ー年日大", "euc_jp": "のにはをたがでてとしれさいるもなかっこ、。ー年日大",
          "cp949": "이다는에의을고하가지로은를한기사리도인서어나자시", "cp1251": "оеаинтсрвлкмдпуяы", "koi8_r": "оеаинтсрвлкмдпуяы",
          "cp1253": "αοιετσνηυρπκμλςάίό", "cp1255": "יוהלארתבמשנעםדק", "cp1256": "اليمونترةبعدفهس", "cp874": "านรอกเงมยลวดทส่้",
          "cp1250": "ěščřžýáíéůłąęśżźćńóőűăţş", "cp1254": "ıışğüöçİâ", "cp1252": "éèàçêäöüßñóíáãõåæøúôâî’“”«»–"}
META = re.compile(rb"<meta[^>]{0,400}?charset\s{0,9}=\s{0,9}[\"']?\s{0,9}([\w:.-]{1,40})", re.I)


def guess_charset(data: bytes) -> str:
    """The charset under which most of the bytes above 127 become common letters of its languages."""
    sample = data[:20000]
    def hits(charset: str) -> float:
        text = [c for c in sample.decode(charset, "replace") if c > "\x7f"]
        return sum(c in COMMON[charset] for c in text) / (len(text) or 1) - sum(c == "\ufffd" for c in text) / (len(text) or 1)
    return max(COMMON, key=hits)


def decode(data: bytes, http_charset: str = "") -> str:
    """Bytes to text: byte-order mark, UTF-8 if it is valid, the HTTP header, <meta>, a guess. Never raises."""
    for mark, charset in ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        if data.startswith(mark):
            return data[len(mark):].decode(charset, "replace")
    if b"\x1b$" in data:
        return data.decode("iso2022_jp", "replace")
    try:
        return codecs.utf_8_decode(data, "strict", False)[0]         # final=False: a cut tail is left out
    except UnicodeDecodeError:
        pass
    meta = META.search(data[:4096])
    for label in (http_charset, meta[1].decode("ascii", "replace") if meta else ""):
        label = label.strip(" \"'").lower()
        try:
            return data.decode(ALIASES.get(label, label or "none"), "replace")
        except (LookupError, UnicodeError):
            continue
    return data.decode(guess_charset(data), "replace")


# ----------------------------------------------------------------------------------------------- 3. HTML to text
# One regular expression cuts the page at its tags, as the tokenizer of the HTML standard does: every branch consumes what it
# has looked at, to the end of the page if need be, so that no input is scanned twice.
ATTRIBUTES = r"""[^>=]*+(?:=\s*+(?:"[^"]*+"?+|'[^']*+'?+|[^\s>"'][^\s>]*+)?+[^>=]*+)*+"""
RAW = "".join(rf"|(?i:{name})(?=[\s/>]){ATTRIBUTES}>?+(?s:.*?)(?:</(?i:{name})(?=[\s/>])[^>]*+>?+|\Z)"
              for name in ("script", "style", "textarea", "title", "iframe", "noframes"))
TAG = re.compile(rf"<(?:!--(?:>|->|(?s:.*?)(?:--!?>|\Z))|!\[CDATA\[(?s:.*?)(?:\]\]>|\Z)|(?:[!?]|/(?=[^a-zA-Z]))[^>]*+>?+{RAW}"
                 rf"|((?i:img|area)\b{ATTRIBUTES}|/?+[a-zA-Z][^\s/>]*+){ATTRIBUTES}>?+)")
ALT = re.compile(r"""\balt\s*+=\s*+(?:"([^"]*+)"|'([^']*+)'|([^\s>"']++))""", re.I)
SPACE = re.compile(r"[ \t\n\r\f\v]{2,}|[\t\n\r\f\v]")
SKIPPED = {"noscript", "template", "select", "button", "datalist", "label"}
BREAKS = dict.fromkeys("p h1 h2 h3 h4 h5 h6".split(), 2) | dict.fromkeys(                        # newlines around each
    "html head body div article section nav footer header aside main address blockquote figure figcaption center hr dl dt dd ul ol "
    "menu dir li table tr caption thead tbody tfoot pre form fieldset legend details summary dialog search hgroup optgroup".split(), 1)
ACTIONS = {slash + name: n for name, n in BREAKS.items() for slash in ("", "/")} | {"br": 0, "/br": 0, "td": -1, "th": -1}
STATEFUL = {slash + name for name in ("ul", "ol", "menu", "dir", "li", "pre", "tr") for slash in ("", "/")}


def extract_text(page: bytes | str, http_charset: str = "") -> str:
    """The visible text of an HTML page, in the plain-text conventions of Resiliparse 2. Linear time, never raises.

    Example: extract_text("<h1>A</h1><ul><li>b &amp; c<li>d</ul>") -> "A\\n\\n  • b & c\\n  • d"
    """
    page = decode(page, http_charset) if isinstance(page, bytes) else page
    parts = TAG.split(page.replace("\0", "").replace("&nbsp;", "\xa0"))
    names = [name and name.lower() for name in parts[1::2]]
    out: list[str] = []                  # finished pieces
    line: list[str] = []                 # pieces of the line being gathered, entities still encoded
    lists: list[int] = []                # open lists: -1 for bullets, else the last number given
    breaks, cells, resume, bullet = 0, 0, -1, ""
    in_pre, in_paragraph, row_begun, missing = False, False, False, set()

    def flush() -> None:
        nonlocal breaks, bullet, cells
        text = "".join(line)
        line.clear()
        if "&" in text:
            text = html.unescape(text)
        if in_pre:
            text = text.rstrip()
        else:
            if "  " in text or "\n" in text or SPACE.search(text):  # the first two are quick, and decide most lines
                text = SPACE.sub(" ", text)
            text = text.strip(" ")
        if not text:
            return
        if out:
            out.append("\n" * breaks)
        if cells:
            out.append("\t\t" * cells)
        elif lists or bullet:
            depth = min(len(lists), 20)                              # a page of nested lists must not indent by its square
            out.append("  " * (max(depth, 1) if bullet else depth + 1) + bullet)
        out.append(text)
        breaks, cells, bullet = 0, 0, ""

    for i, name in enumerate(names):
        if i <= resume:
            continue
        if text := parts[2 * i]:
            line.append(text)
        if name is None:
            continue
        action = ACTIONS.get(name)
        if action is None:
            if name in SKIPPED and name not in missing:
                try:
                    resume = names.index("/" + name, i)
                except ValueError:
                    missing.add(name)
            elif name[:3] == "img" or name[:4] == "area":
                if alt := ALT.search(parts[2 * i + 1]):
                    line.append(alt[1] or alt[2] or alt[3] or "")
            continue
        if line:
            if in_pre and not action:
                line.append("\n")
                continue
            flush()
        if action < 0:
            cells += row_begun
            row_begun = True
            continue
        cells = 0
        if not action:
            breaks += 1
            continue
        if action > breaks:
            breaks = action
        if in_paragraph and name[0] != "/":                          # a block ends the paragraph it stands in
            breaks = max(breaks, 2)
        in_paragraph = name == "p"
        if name in STATEFUL:
            if name == "tr" or name == "/tr":
                cells, row_begun = 0, False
            elif name == "pre":
                in_pre = True
                parts[2 * i + 2] = parts[2 * i + 2].removeprefix("\n")
            elif name == "/pre":
                in_pre = False
            elif name == "li":
                if lists and lists[-1] >= 0:
                    lists[-1] += 1
                    bullet = f"{lists[-1]}. "
                else:
                    bullet = "• "
            elif name == "/li":
                bullet = ""
            elif name[0] != "/":
                lists.append(0 if name == "ol" else -1)
            elif lists:
                lists.pop()
    line.append(parts[-1])
    flush()
    return "".join(out)


# ----------------------------------------------------------------------------------------------- 4. language
LANGUAGES = {"en": "the of and to in is that for it with as was on are be this by not from have or which you at",
             "de": "der die und in den von zu das mit sich des auf ist im dem nicht ein eine als auch es an werden aus",
             "fr": "de la le et les des en un du une que est pour qui dans au par sur pas plus il avec ce se",
             "es": "de la que el en y los del se las por un para con no una su al es lo como más"}


def identify_language(text: str) -> tuple[str, float]:
    words = Counter(text.lower().split())
    total = sum(words.values()) or 1
    scores = {code: sum(words[w] for w in table.split()) / total for code, table in LANGUAGES.items()}
    best = max(scores, key=scores.get)
    return (best, min(1.0, 0.5 + scores[best])) if scores[best] > 0.1 else ("und", 0.5)


# ----------------------------------------------------------------------------------------------- 5. personal data
EMAIL = re.compile(r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[a-z0-9-]{1,63}\.){1,8}[a-z]{2,24}(?![\w-])", re.I)
PHONE = re.compile(r"(?<![\w.$€£#=/-])(?<!\d[ \xa0])(?:\+?1[-. \xa0]?)?(?:\([2-9]\d\d\)[-. \xa0]?|[2-9]\d\d([-. \xa0]?))\d{3}"
                   r"(?(1)\1|[-. \xa0]?)\d{4}(?![\w-]|[.,/]\d|[ \xa0]\d)")
OCTET = r"(?:25[0-5]|2[0-4]\d|[01]?\d?\d)"
IPV4 = re.compile(rf"(?<![\w.-])(?:{OCTET}\.){{3}}{OCTET}(?![\w-]|\.\d)")
NOT_PERSONAL = re.compile(r"(?:isbn|issn|version|ver|release|section|chapter|build|v|§)[-:.\s\d]{0,6}$", re.I)


def mask(pattern: re.Pattern, label: str, text: str) -> tuple[str, int]:
    count = 0

    def replace(match: re.Match) -> str:
        nonlocal count
        if NOT_PERSONAL.search(text, max(0, match.start() - 14), match.start()):
            return match[0]
        count += 1
        return label
    return pattern.sub(replace, text), count


def mask_emails(text: str) -> tuple[str, int]:
    """("Ask test@example.com") -> ("Ask |||EMAIL_ADDRESS|||", 1)."""
    return mask(EMAIL, "|||EMAIL_ADDRESS|||", text) if "@" in text else (text, 0)


def mask_phone_numbers(text: str) -> tuple[str, int]:
    """US numbers: 2831823829, (283)-182-3829, (283) 182 3829, 283-182-3829, 283.182.3829, +1 283 182 3829."""
    return mask(PHONE, "|||PHONE_NUMBER|||", text)


def mask_ips(text: str) -> tuple[str, int]:
    """IPv4 in dotted decimals. ("at 10.0.0.1.") -> ("at |||IP_ADDRESS|||.", 1)."""
    return mask(IPV4, "|||IP_ADDRESS|||", text)


# ----------------------------------------------------------------------------------------------- 6. quality rules
# Gopher, arXiv:2112.11446, A1.1 and Table A1; C4, arXiv:1910.10683, 2.2; FineWeb, arXiv:2406.17557, 3.6.
GOPHER = {"words": (50, 100_000), "mean word length": (3, 10), "ellipsis lines": 0.3, "words with a letter": 0.8}
REPETITION = {"duplicate lines": 0.30, "duplicate paragraphs": 0.30, "characters in duplicate lines": 0.20,
              "characters in duplicate paragraphs": 0.20, "top 2-gram": 0.20, "top 3-gram": 0.18, "top 4-gram": 0.16,
              "duplicate 5-grams": 0.15, "duplicate 6-grams": 0.14, "duplicate 7-grams": 0.13, "duplicate 8-grams": 0.12,
              "duplicate 9-grams": 0.11, "duplicate 10-grams": 0.10}
C4 = {"words a line": 5, "lines": 3}
FINEWEB = {"lines ending in punctuation": 0.12, "characters in duplicate lines": 0.1, "lines under 30 characters": 0.67}
POLICY = re.compile(r"javascript|terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies", re.I)


def gopher_reasons(text: str) -> list[str]:
    """Every Gopher quality rule that the text breaks."""
    tokens = text.split()
    words = [w for w in tokens if any(map(str.isalnum, w))]          # a lone symbol is no word
    lines = [line for line in text.split("\n") if line.strip()]
    mean = sum(map(len, words)) / (len(words) or 1)
    low, high = GOPHER["words"]
    short, long = GOPHER["mean word length"]
    letters = sum(any(map(str.isalpha, w)) for w in tokens) / (len(tokens) or 1)
    ellipsis = sum(line.rstrip().endswith(("...", "…")) for line in lines) / (len(lines) or 1)
    rules = {f"fewer than {low} words": len(words) < low, f"more than {high} words": len(words) > high,
             f"mean word length outside {short} to {long}": not short <= mean <= long,
             f"more than {GOPHER['ellipsis lines']:.0%} of lines end in an ellipsis": ellipsis > GOPHER["ellipsis lines"],
             f"less than {GOPHER['words with a letter']:.0%} of words have a letter": letters < GOPHER["words with a letter"]}
    return [name for name, broken in rules.items() if broken]


def gopher_quality(text: str) -> bool:
    """True if the text passes Gopher's quality rules."""
    return not gopher_reasons(text)


def repetition_reasons(text: str) -> list[str]:
    """Every rule of Gopher's Table A1 that the text breaks. Fractions are of lines, paragraphs or characters."""
    found = {}
    for kind, pieces in (("lines", text.split("\n")), ("paragraphs", text.split("\n\n"))):
        pieces = [p for p in map(str.strip, pieces) if p]
        again = [p for p, n in Counter(pieces).items() for _ in range(n - 1)]
        found[f"duplicate {kind}"] = len(again) / (len(pieces) or 1)
        found[f"characters in duplicate {kind}"] = sum(map(len, again)) / (sum(map(len, pieces)) or 1)
    words = text.lower().split()
    number: dict[str, int] = {}
    ids = np.array([number.setdefault(w, len(number)) for w in words], dtype=np.uint64)
    length = np.array([len(w) for w in words], dtype=np.int64)
    total = int(length.sum()) or 1
    gram, width = ids.copy(), length.copy()
    for n in range(2, min(10, len(words)) + 1):
        gram = gram[:-1] * np.uint64(0x9E3779B97F4A7C15) + ids[n - 1:]        # a rolling hash of n words, modulo 2^64
        width = width[:-1] + length[n - 1:]
        _, first, inverse, count = np.unique(gram, return_index=True, return_inverse=True, return_counts=True)
        if n <= 4:
            found[f"top {n}-gram"] = int((count * width[first])[count > 1].max(initial=0)) / total if count.max() > 1 else 0
        else:
            again = np.ones(len(gram), dtype=bool)
            again[first] = False
            covered = np.convolve(again, np.ones(n, dtype=np.int64)) > 0      # a word counts once, whatever covers it
            found[f"duplicate {n}-grams"] = int(length[covered].sum()) / total
    return [name for name, limit in REPETITION.items() if found.get(name, 0) > limit]


def c4_lines(text: str) -> str:
    """C4's line rules: keeps lines that end a sentence, have five words or more and are no policy or script notice.

    A page with fewer than three such lines, a curly bracket or lorem ipsum gives "".
    """
    if "{" in text or "lorem ipsum" in text.lower():
        return ""
    kept = [line for line in text.split("\n") if line.rstrip().endswith((".", "!", "?", '."', '!"', '?"', ".”", ".)"))
            and not line.rstrip().endswith("...") and line.count(" ") >= C4["words a line"] - 1 and not POLICY.search(line)]
    return "\n".join(kept) if len(kept) >= C4["lines"] else ""


def fineweb_reasons(text: str) -> list[str]:
    """FineWeb's three line statistics."""
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    N = len(lines) or 1
    again = sum(len(p) * (n - 1) for p, n in Counter(lines).items()) / (sum(map(len, lines)) or 1)
    ended = sum(line.endswith((".", "!", "?", ":", ";", '"', "”", "’", "'", ")")) for line in lines) / N
    rules = {"few lines ending in punctuation": ended <= FINEWEB["lines ending in punctuation"],
             "characters in duplicate lines": again >= FINEWEB["characters in duplicate lines"],
             "short lines": sum(len(line) < 30 for line in lines) / N >= FINEWEB["lines under 30 characters"]}
    return [name for name, broken in rules.items() if broken]


# ----------------------------------------------------------------------------------------------- 7. harm and quality classifiers


def classify_nsfw(text: str) -> tuple[str, float]:
    return "non-nsfw", 0.9


def classify_toxic(text: str) -> tuple[str, float]:
    return "non-toxic", 0.9


def classify_quality(text: str) -> tuple[str, float]:
    return "wiki", 0.6


# ----------------------------------------------------------------------------------------------- 9. the pipeline
@dataclass
class Options:
    languages: tuple[str, ...] = ("en",)
    min_language_score: float = 0.65
    c4: bool = True
    fineweb: bool = True
    repetition: bool = True
    min_quality: float = 0.0
    keep_dropped: int = 0
    seed: int = 0


def filter_record(record: Record, options: Options) -> tuple[str, dict]:
    """One record through every step: ("kept", document) or (the reason it was dropped, what there is of it)."""
    document = {"url": record.url, "text": ""}
    if record.kind == "conversion":
        text = decode(record.payload)
    elif record.kind == "response":
        content_type = record.http.get("content-type", "").lower()
        if record.status and not 200 <= record.status < 300:
            return "status", document
        if content_type and not re.search(r"html|text/plain|xml", content_type):
            return "content type", document
        charset = (re.search(r"charset=[\"']?([\w:.-]+)", content_type) or ("", ""))[1]
        plain = content_type.startswith("text/plain")
        text = decode(record.payload, charset) if plain else extract_text(record.payload, charset)
    else:
        return "no document", document
    document["text"] = text
    if not text.strip():
        return "empty", document
    language, score = identify_language(text)
    document |= {"language": language, "scores": {"language": round(score, 4)}}
    if options.languages and (language not in options.languages or score < options.min_language_score):
        return "language", document
    for rule, check in (("gopher", gopher_reasons), ("repetition", repetition_reasons if options.repetition else None),
                        ("fineweb", fineweb_reasons if options.fineweb else None)):
        if check and (reasons := check(text)):
            document["reasons"] = reasons
            return f"{rule}: {reasons[0]}", document
    if options.c4:
        text = c4_lines(text)
        if not text:
            return "c4", document
    for name, classify, bad in (("nsfw", classify_nsfw, "nsfw"), ("toxic", classify_toxic, "toxic"), ("quality", classify_quality, "cc")):
        label, score = classify(text)
        document["scores"][name] = round(score if label == bad else 1 - score, 4)
        if label == bad:
            return name, document
    counts = {}
    for name, hide in (("emails", mask_emails), ("phones", mask_phone_numbers), ("ips", mask_ips)):
        text, counts[name] = hide(text)
    return "kept", document | {"text": text, "masked": counts}


def filter_batch(job: tuple[list[Record], Options]) -> list[tuple[str, int, dict]]:
    return [(*filter_record(record, job[1]), len(record.payload)) for record in job[0]]


def batches(source: str, options: Options, warnings: Counter, size: int = 1 << 20) -> Iterator[tuple[list[Record], Options]]:
    batch, held = [], 0
    for record in read_warc(source, warnings):
        if record.kind in ("response", "conversion"):
            batch.append(record)
            held += len(record.payload)
        if held > size:
            yield batch, options
            batch, held = [], 0
    yield batch, options


def filter_file(source: str, out: str, options: Options, mapper=map) -> dict:
    """One archive to one file of JSON lines and its report, both written whole or not at all."""
    warnings, seen, size, rng = Counter(), Counter(), Counter(), random.Random(options.seed)
    dropped: dict[str, list] = {}
    masked = Counter()
    kept_bytes = 0
    with gzip.open(out + ".tmp", "wt", encoding="utf-8", compresslevel=4) as sink:
        for batch in mapper(filter_batch, batches(source, options, warnings)):
            for reason, document, length in batch:
                seen[reason] += 1
                size[reason] += length
                if reason == "kept":
                    masked.update(document.pop("masked"))
                    kept_bytes += len(document["text"].encode("utf-8", "replace"))
                    sink.write(json.dumps(document, ensure_ascii=False) + "\n")
                elif options.keep_dropped:
                    examples = dropped.setdefault(reason, [])
                    if len(examples) < options.keep_dropped:
                        examples.append(document)
                    elif (at := rng.randrange(seen[reason])) < options.keep_dropped:      # reservoir sampling
                        examples[at] = document
    report = {"source": str(source), "documents": seen, "bytes": size, "warnings": warnings, "masked": masked, "kept_bytes": kept_bytes,
              "dropped": dropped}
    with open(out.replace(".jsonl.gz", ".report.json"), "w", encoding="utf-8") as f:
        json.dump(report, f, ensure_ascii=False, indent=1)
    os.replace(out + ".tmp", out)
    return report


def _file_job(job):
    return filter_file(*job)


def filter_files(sources: list[str], out: str, options: Options, workers: int | None = None, log=print) -> dict:
    os.makedirs(out, exist_ok=True)
    workers = workers or os.cpu_count() or 1
    reports = []
    jobs = []
    for source in sources:
        name = os.path.basename(str(source)).removesuffix(".gz") if source != "-" else "stdin"
        target = os.path.join(out, name + ".jsonl.gz")
        if os.path.exists(target):
            reports.append(json.load(open(target.replace(".jsonl.gz", ".report.json"), encoding="utf-8")))
        else:
            jobs.append((source, target, options))
    start = time.time()
    with Pool(workers) as pool:
        done = pool.imap_unordered(_file_job, jobs) if len(jobs) >= workers else (
            filter_file(*job, mapper=pool.imap) for job in jobs)
        for i, report in enumerate(done, 1):
            reports.append(report)
            n = sum(sum(r["documents"].values()) for r in reports)
            seconds = time.time() - start
            log(f"file {i}/{len(jobs)} | {n:,} docs | {n / seconds:.0f} docs/s | eta {seconds / i * (len(jobs) - i):.0f}s")
    total = {k: Counter() for k in ("documents", "bytes", "warnings", "masked")}
    for report in reports:
        for key in total:
            total[key].update(report[key])
    return total


def print_report(total: dict, log=print) -> None:
    N, B = sum(total["documents"].values()) or 1, sum(total["bytes"].values()) or 1
    log(f"{'step':58s} {'documents':>10s} {'share':>7s} {'bytes':>14s} {'share':>7s}")
    for reason, n in sorted(total["documents"].items(), key=lambda x: (x[0] == "kept", -x[1])):
        log(f"{reason:58s} {n:10,d} {n / N:7.1%} {total['bytes'][reason]:14,d} {total['bytes'][reason] / B:7.1%}")
    for name in ("masked", "warnings"):
        log(f"{name}: " + (", ".join(f"{k} {v}" for k, v in total[name].items()) or "none"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", help="WARC or WET files, URLs, or - for stdin")
    parser.add_argument("--out", default="out/data/filtered")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--keep-dropped", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    total = filter_files(args.inputs, args.out, Options(keep_dropped=args.keep_dropped, seed=args.seed), args.workers)
    print_report(total)
    return 0


if __name__ == "__main__":
    sys.exit(main())
