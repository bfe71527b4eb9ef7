"""data_filter.py - from a raw web crawl to clean text.

What:       WARC and WET archives in; HTML to text, language, quality rules, harm and quality classifiers, personal data
            masked; JSON lines out. Each step is a function of its own, in lecture order.
Source:     WARC 1.1 (ISO 28500); WHATWG HTML 13.2.5 and Encoding 4.2; Gopher, arXiv:2112.11446 A1.1; C4,
            arXiv:1910.10683 2.2; FineWeb, arXiv:2406.17557 3.6; FastText, arXiv:1607.01759 and 1607.04606.
Deviations: 1. The rules that count words are left out for scripts without spaces. 2. Gopher's stop words and C4's list
            of bad words are not used; the harm classifiers stand for the latter. 3. FineWeb's statistics are taken
            before C4's line rules, which would hide them. 4. Later copies count as duplicate n-grams, not the first.
            5. FastText: no quantised .ftz files, and softmax, not negative sampling, to train with. 6. HTML: words
            that Resiliparse glues and a browser shows apart (<details>, <option>) are kept apart.
Copy:       this file alone; needs numpy. MIT.
Run:        python data_filter.py CRAWL.warc.gz --out DIR      # --sample, --check, --train-quality, --bench: see --help
            python data_filter.py
            bytes              b'<title>x</title><h1>The caf\\xe9s</h1><p>You write to <b>a@b.org</b> &amp; wait. ...
            extract_text       'The cafés\\n\\nYou write to a@b.org & wait.\\n\\n  • one'
            identify_language  ('en', 0.9223142811103903)
            gopher_reasons     ['words under 50']
            ... archives, text, languages, masks, rules and FastText as known  OK
Measured:   2-core CPU: 98.7% of the 20-word and 100% of the 80-word pieces of the Declaration of Human Rights, in 54
            languages, right; 208 pydoc pages (10.2 MB) identical to Resiliparse 2.0.1's at 0.67 of its speed, 36 MB/s
            a core, and 33 times trafilatura's (tests/fixtures/make_data_filter.py languages, pydoc). --bench, 14,000
            pages: 3.1 to 4.1 MB of pages, 3.4 to 3.9 of WET text a second on both cores; 10 MB of any tag, under 2 s.
"""
import argparse, codecs, contextlib, functools, gzip, heapq, html, io, itertools, json, math, os, pydoc, random, re
import struct, sys, tempfile, time, unicodedata, zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPException
from multiprocessing import Pool
from pathlib import Path
from typing import BinaryIO

import numpy as np

@contextlib.contextmanager
def write_whole(path: str | os.PathLike) -> Iterator[BinaryIO]:   # twin: train.py
    """Opens a temporary file beside `path`, and renames it onto `path` only when everything was written."""
    path = Path(path)
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

# ------------------------------------------------------------------------------------------------------ 1. archives
BLOCK, MAX_RECORD = 1 << 16, 1 << 26         # bytes read at a time; longer records are stepped over, never held
CHUNK = re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")

@dataclass(slots=True)
class Record:
    """One WARC record."""
    kind: str                                # "response", "conversion" (WET), "warcinfo", "request", ...
    url: str
    headers: dict[str, str]                  # WARC headers, names in lower case; "warc-truncated" if the crawler cut it
    payload: bytes                           # the HTTP body of a response, the block of any other record
    status: int = 0                          # HTTP status, 0 where there is none
    http: dict[str, str] = field(default_factory=dict)

class Unpacked(io.RawIOBase):
    """A file, with gzip undone if there is any. All that stands before a fault can be read; `fault` names it."""

    def __init__(self, raw: BinaryIO) -> None:
        self.blocks, self.ready, self.fault = filter(None, self.unpack(raw)), memoryview(b""), ""

    def readable(self) -> bool:
        return True

    def readinto(self, target) -> int:
        self.ready = self.ready or memoryview(next(self.blocks, b""))
        n = min(len(target), len(self.ready))
        target[:n], self.ready = self.ready[:n], self.ready[n:]
        return n

    def unpack(self, raw: BinaryIO) -> Iterator[bytes]:
        block = raw.read(BLOCK)
        if block[:2] != b"\x1f\x8b":
            yield block
            yield from iter(lambda: raw.read(BLOCK), b"")
            return
        while block:                                                 # a member: one record, or the whole file
            unzip = zlib.decompressobj(31)
            while block and not unzip.eof:
                before = unzip.copy()
                try:
                    yield unzip.decompress(block, BLOCK)
                except zlib.error:
                    self.fault = "corrupt gzip member"
                    with contextlib.suppress(zlib.error):            # go up to the broken byte, byte by byte
                        for byte in block:
                            yield before.decompress(bytes((byte,)))
                    return
                block = unzip.unconsumed_tail or (b"" if unzip.eof else raw.read(BLOCK))
            if not unzip.eof:
                self.fault = "truncated gzip member"
                yield unzip.flush()
            block = (unzip.unused_data or raw.read(BLOCK)).lstrip(b"\0")         # some writers pad with zeros

def open_source(source) -> BinaryIO:
    """A path, "-" for stdin, an http(s) URL, or a binary file object."""
    if str(source).startswith(("http://", "https://")):
        from urllib.request import urlopen
        return urlopen(source, timeout=60)
    return source if hasattr(source, "read") else sys.stdin.buffer if source == "-" else open(source, "rb")

def parse_headers(block: bytes) -> dict[str, str]:
    """Names in lower case -> values; folded lines are joined, lines without a colon left out."""
    lines = re.sub(rb"\r?\n[ \t]+", b" ", block).decode("utf-8", "replace").split("\n")
    return {k.strip().lower(): v.strip() for k, colon, v in (line.partition(":") for line in lines) if colon}

def http_body(head: dict[str, str], body: bytes) -> bytes:
    """Undoes chunks (RFC 9112, 7.1) and compression where they are really there: Common Crawl stores bodies plain and
    masks these headers as X-Crawler-*, other archives keep both."""
    if body[:2] == b"\r\n" and (head.get("content-length") == str(len(body) - 2) or body[2:4] == b"\x1f\x8b"
                                or "x-crawler-content-length" in head):
        body = body[2:]                                             # CC-MAIN-2018-34 has a stray CRLF after the headers
    at, chunks, chunked = 0, [], "chunked" in head.get("transfer-encoding", "").lower()
    while chunked and (chunk := CHUNK.match(body, at)):
        at = chunk.end() + int(chunk[1], 16)
        chunks.append(body[chunk.end():at])
        at += 2 if body[at:at + 2] == b"\r\n" else 1
        chunked = chunks[-1] != b""
    body = b"".join(chunks) if chunks else body
    for coding in reversed(head.get("content-encoding", "").lower().replace(" ", "").split(",")):
        for wbits in {"gzip": (31,), "x-gzip": (31,), "deflate": (15, -15)}.get(coding, ()):   # -15: without a header
            with contextlib.suppress(zlib.error):
                body = zlib.decompressobj(wbits).decompress(body, MAX_RECORD)
                break
    return body

def read_warc(source, warnings: Counter | None = None) -> Iterator[Record]:
    """Streams the records of a WARC 1.0/1.1 or WET file: path, "-", URL or binary file; plain or gzip; constant memory.
    A fault ends the file: it is counted in `warnings`, and every complete record before it has been yielded.
    Example: for r in read_warc("CC-MAIN.warc.gz"): print(r.kind, r.url, r.status, len(r.payload))"""
    warnings, raw, fault = Counter() if warnings is None else warnings, open_source(source), ""
    with contextlib.nullcontext() if raw is source else raw:
        unpacked = Unpacked(raw)
        stream = io.BufferedReader(unpacked, BLOCK)
        while not fault and (line := stream.readline(BLOCK)):
            if not line.strip(b"\r\n\0"):
                continue
            lines = itertools.islice(iter(lambda: stream.readline(BLOCK).rstrip(b"\r\n"), b""), 1000)
            headers = parse_headers(b"\n".join(lines)) if line.startswith(b"WARC/1.") else {}
            length = headers.get("content-length", "")
            length = int(length) if re.fullmatch("[0-9]{1,15}", length) else -1
            block = stream.read(length) if 0 <= length <= MAX_RECORD else b""
            if length > MAX_RECORD:
                warnings["record over 64 MiB stepped over"] += 1
                while length and (part := stream.read(min(length, BLOCK))):
                    length -= len(part)
            elif len(block) != length:
                fault = "not a WARC record" if length < 0 else "truncated record"
            else:
                url = headers.get("warc-target-uri", "").strip("<>")
                record = Record(headers.get("warc-type", "").lower(), url, headers, block)
                if record.kind in ("response", "request") and re.match(rb"HTTP/|[A-Z]+ \S+ HTTP/", block[:9000]):
                    head, _, body = block.partition(b"\r\n\r\n")
                    record.http, status = parse_headers(head), re.match(rb"HTTP/\S+ +([0-9]{3})", head)
                    record.status, record.payload = int(status[1]) if status else 0, http_body(record.http, body)
                yield record
    if fault := unpacked.fault or fault:
        warnings[fault] += 1

# ------------------------------------------------------------------------------------------------------- 2. charset
# The web's labels mean the larger set (WHATWG Encoding 4.2).
ALIASES = {alias: real for real, names in {
    "cp1252": "latin-1 latin1 iso-8859-1 iso8859-1 us-ascii ascii", "gb18030": "gb2312 gbk x-gbk", "big5hkscs": "big5",
    "cp932": "shift_jis shift-jis x-sjis sjis", "cp949": "euc-kr ks_c_5601-1987", "cp874": "tis-620 iso-8859-11",
    "cp1254": "iso-8859-9", "utf-8": "utf8 unicode utf-16 utf-16le"}.items() for alias in names.split()}
# The letters outside ASCII of each charset's languages, the commonest first; the guess is the charset that yields most.
COMMON = {"cp1252": "éäöüèàßñóíáçêãõåæøúôâîëïû’“”«»–", "cp1251": "оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфёъ",
          "koi8_r": "оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфёъ", "cp1250": "áíéěščřžýůłąęśżźćńóőűăţşú", "cp1254": "ıışğüöçİâ",
          "cp1253": "αοιετσνηυρπκμλςάίόέγδήώχθύφβξζψ", "cp1255": "יוהלארתבמשנעםדקחטכגפסצזןךףץ",
          "cp1256": "اليمونترةبعدفهسقكحجشطصخىأضذغثزئءظ", "cp874": "านรอกเงมยลวดทส่้ตะปบคหแจขพใชไโผ",
          "gb18030": "的一是不了在有人我他这中大来上国个到说们为子和你地出道也时年，。", "cp949": "이다는에의을고하가지로은를한기사리도인서어나자시",
          "big5hkscs": "的一是不了在有人我他這中大來上國個到說們為子和你地，。", "cp932": "のにはをたがでてとしれさいるもなかっこ、。ー年日大",
          "euc_jp": "のにはをたがでてとしれさいるもなかっこ、。ー年日大"}
META = re.compile(rb"<meta[^>]{0,400}?charset\s{0,9}=\s{0,9}[\"']?\s{0,9}([\w:.-]{1,40})", re.I)

def guess_charset(data: bytes) -> str:
    """The charset under which most of the bytes above 127 become common letters of its languages."""
    def hits(charset: str) -> float:
        text = [c for c in data[:20_000].decode(charset, "replace") if c > "\x7f"]
        worth = {c: 1 - 0.6 * i / len(COMMON[charset]) for i, c in enumerate(COMMON[charset])} | {"\ufffd": -1}
        return sum(worth.get(c, 0.4 if c > "\u3000" else 0) for c in text) / (len(text) or 1)
    return max(COMMON, key=hits)

def decode(data: bytes, http_charset: str = "") -> str:
    """Bytes to text: byte-order mark, UTF-8 if valid, the HTTP header's charset, <meta>'s, a guess. Never raises."""
    for mark, charset in (b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"):
        if data.startswith(mark):
            return data[len(mark):].decode(charset, "replace")
    if b"\x1b$" in data:
        return data.decode("iso2022_jp", "replace")
    with contextlib.suppress(UnicodeDecodeError):
        return codecs.utf_8_decode(data, "strict", False)[0]         # not final: a character cut at the end is left out
    meta = META.search(data[:4096])
    for label in http_charset, meta[1].decode("ascii", "replace") if meta else "":
        with contextlib.suppress(LookupError, ValueError):           # no such charset
            label = label.strip(" \"'").lower() or "none"
            return data.decode(ALIASES.get(label, label), "replace")
    return data.decode(guess_charset(data), "replace")

# -------------------------------------------------------------------------------------------------- 3. HTML to text
# One regular expression cuts the page at its tags as the standard's tokenizer does. Each branch keeps what it has read,
# to the end of the page if it must (possessive `*+`), so that nothing is read twice and the time is linear. The look
# ahead spares the commonest tags the rarer branches.
ATTRIBUTES = r"""[^>=]*+(?:=\s*+(?:"[^"]*+"?+|'[^']*+'?+|[^\s>"'][^\s>]*+)?+[^>=]*+)*+"""
RAW = "".join(rf"|(?i:{name})(?=[\s/>]){ATTRIBUTES}>?+(?s:.*?)(?:</(?i:{name})(?=[\s/>])[^>]*+>?+|\Z)"
              for name in ("script", "style", "textarea", "title", "iframe", "noframes"))
TAG = re.compile(r"<(?:(?=[!?]|/(?![a-zA-Z])|[sS](?:[cC]|[tT][yY])|[tT][eEiI]|[iI][fF]|[nN][oO])(?:!--(?:>|->|(?s:.*?)"
                 rf"(?:--!?>|\Z))|!\[CDATA\[(?s:.*?)(?:\]\]>|\Z)|(?:[!?]|/(?=[^a-zA-Z]))[^>]*+>?+{RAW})"
                 rf"|((?i:img|area)\b{ATTRIBUTES}|/?+[a-zA-Z][^\s/>]*+)(?:>|{ATTRIBUTES}>?+))")
ALT = re.compile(r"""\balt\s*+=\s*+(?:"([^"]*+)|'([^']*+)|([^\s>"']++))""", re.I)
BLANK, SPACES = re.compile(r"&#(?:0*(?:9|1[023]|32)|[xX]0*(?:9|[aAcCdD]|20));"), re.compile(r"[ \t\n]{2,}|[\t\n]")
INLINE, BLOCK_TAG, STATE, PARAGRAPH, BREAK, CELL, OTHER = range(7)  # what a tag does to the text
KINDS = {None: INLINE} | {slash + name: kind for kind, names in {      # None: comments, scripts and the like
    INLINE: "a b i u em strong span font small big code sup sub", PARAGRAPH: "p h1 h2 h3 h4 h5 h6", BREAK: "br",
    STATE: "ul ol menu dir li pre tr", BLOCK_TAG: "html head body div article section nav footer header aside main "
    "address blockquote figure figcaption hr center dl dt dd table caption thead tbody tfoot form fieldset legend "
    "details summary dialog search hgroup optgroup"}.items() for name in names.split() for slash in ("", "/")}
KINDS |= {"td": CELL, "th": CELL}
LISTS = {"ul": -1, "ol": 0, "menu": -1, "dir": -1}                     # the number before the first item
TAB, INDENT = "\t\t", ["  " * depth for depth in range(10)]
SKIPPED = {"noscript", "template", "select", "button", "datalist", "label"}

def extract_text(page: bytes | str, http_charset: str = "") -> str:
    """The visible text of an HTML page, in the plain-text conventions of Resiliparse 2. Linear time; never raises.
    Example: extract_text("<h1>A</h1><ul><li>b &amp; c<li>d</ul>") -> "A\\n\\n  • b & c\\n  • d" """
    page = decode(page, http_charset) if isinstance(page, bytes) else page
    for blank, instead in ("\0", ""), ("&nbsp;", "\xa0"), ("\r\n", "\n"), ("\r", "\n"), ("\f", " "), ("\v", " "):
        page = page.replace(blank, instead)
    parts = TAG.split(BLANK.sub(" ", page))                          # text, tag, text, tag, ..., text
    texts, tags, names = parts[::2], parts[1::2] + ["div"], []
    kinds = [KINDS.get(tag, OTHER) for tag in tags]
    out, lists, missing = [], [-1], set()                            # lists: of each open one the last number, or -1
    begin, resume, breaks, cells, bullet, in_pre, in_paragraph, row_begun = 0, 0, 0, 0, "", False, False, False
    for i in itertools.compress(range(len(kinds)), kinds):           # at every tag that is not inline
        kind, tag = kinds[i], tags[i]
        if i < resume:
            continue
        if kind == OTHER:
            tag = tag.lower()
            kind = KINDS.get(tag, OTHER)
        if kind == OTHER or kind == INLINE or in_pre and kind == BREAK:          # the line goes on
            if kind == BREAK:
                texts[i] += "\n"
            elif tag.startswith(("img", "area")) and (alt := ALT.search(tags[i])):
                texts[i] += alt[1] or alt[2] or alt[3] or ""
            elif tag in SKIPPED and tag not in missing:
                names = names or [tag and tag.lower() for tag in tags]
                try:
                    resume = names.index("/" + tag, i)
                    texts[i + 1:resume + 1] = [""] * (resume - i)
                except ValueError:
                    missing.add(tag)                                 # never closed: keep what follows
            continue
        text = texts[i] if i == begin else "".join(texts[begin:i + 1])
        begin = i + 1
        if in_pre:
            text = text.removeprefix("\n").rstrip()
        elif text := text.strip(" \n\t"):
            text = SPACES.sub(" ", text) if "  " in text or "\n" in text or "\t" in text else text
        if text:
            if cells or bullet or len(lists) > 1:
                depth = len(lists) - 1 if len(lists) < 9 else 8      # or open lists would indent by their square
                text = f"{cells * TAB or INDENT[depth or 1 if bullet else depth + 1]}{bullet}{text}"
                cells, bullet = 0, ""
            out.append("\n" * breaks + text)
            breaks = 0
        if kind == CELL:                                             # tabs before all but the first of a row
            cells, row_begun = cells + row_begun, True
            continue
        cells = 0
        if kind == BREAK:
            breaks += 1
            continue
        if breaks < 2 and (kind == PARAGRAPH or in_paragraph and tag[0] != "/"):         # a block ends the paragraph
            breaks = 2
        breaks, in_paragraph = breaks or 1, tag == "p"
        if kind == STATE:
            if tag == "li":
                bullet = "• "
                if lists[-1] >= 0:
                    lists[-1] += 1
                    bullet = f"{lists[-1]}. "
            elif tag in LISTS:
                lists.append(LISTS[tag])
            elif tag == "/li":
                bullet = ""
            elif tag in ("tr", "/tr"):
                row_begun = False
            elif tag in ("pre", "/pre"):
                in_pre = tag == "pre"
            elif len(lists) > 1:
                lists.pop()
    text = "".join(out).lstrip("\n")
    for entity, character in ("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&#x27;", "'"), ("&#39;", "'"):
        text = text.replace(entity, character)                       # the commonest, at the speed of C
    return html.unescape(text) if "&" in text else text

# ------------------------------------------------------------------------------------------------------ 4. language
# Scripts by Unicode block: first and last code point / 64, and the language, or the name of a shared script.
SCRIPTS = """0-9 latin 120-123 latin 13-15 el 124-127 el 16-20 cyrillic 21-22 hy 23-23 he 24-29 arabic 36-37 devanagari
    38-39 bn 40-41 pa 42-43 gu 46-47 ta 48-49 te 50-51 kn 52-53 ml 54-55 si 56-57 th 58-59 lo 60-63 bo 64-65 my 66-67 ka
    72-77 am 94-95 km 193-195 ja 208-639 zh 688-862 ko""".split()
SCRIPT_OF = {block: name for span, name in zip(SCRIPTS[::2], SCRIPTS[1::2])
             for first, last in [map(int, span.split("-"))] for block in range(first, last + 1)}
# Each language of a shared script: the weights of its first and last trigram, and the trigrams that tell it from the
# others, the most telling first; "_" is the edge of a word. tests/fixtures/make_data_filter.py says from what.
TRIGRAMS = """
en 11 4 isheirwasof_ithly__ofth__whfroby_ounthi_wanittednd__it_withehe__ised__thry_ll__an_a_to_and_tois_in_tioing_in
de 12 3 _eieicein_zuvonhendieungichaussiesch_auundie_ch__weim_der_imn_dnd_en_lic_geinen_s_digen_voer_st_ten_sidenit_
fr 13 3 ée__dé_à_eur_répouux_iquté_our_d_ur__l_une_etnt_lesquedu_ue__ledantiole__au_unes_et_ns_st_ne_des_laun__esre_
es 12 3 _y_iónfueía_ón_loscióos_adodaddosdo_una_loqueel__elad_lasue_idaidoas_aciien_la_qun_ecio_esde__un_enntela_un_
pt 14 3 ão__é_açã_umeir_e_umadad_ou_emadodosos_um_do__o__oso_dem_idaqueadema_ais_quas_ou_ndo_asro_ntede_comno_to_por
it 13 4 _è_zioitàtà__e_glidi_o_dnelazigioi_d_ilonoattil_atolladeloneellco__diro_to_no_cheti_li__unlo_re_un_conel_la_
nl 13 6 oorvooijn_eeeerijkaarhet_zi_uieenjn_lijop_meewor_aaaatuitlaan_deelvanaan_wo_he_ge_wakenrdeen_et__is_vade__en
sv 16 4 förör__föär__är_ocochfrårånändtt__vä_avav_ttaattrnach_dra_påll_someraettska_atdet_i_varet_ar__enka_areden_so
da 12 3 af__af_væværrug_ud_ogog_rne_erdet_på_atindet_il_ligr_dforrertiller_i_den_hvretlle_enkkeer_ke__tideren_ereger
no 15 3 sjo_httpsjonav_ps__avrukjelinn_ogalg_utog__påett_erdetil_tilke__i_liget_sen_brforlernnesomer_tteden_ti_enen_
fi 14 6 tä_än_yksksisä_aa_oitssataaaaniinttaoisvuoais_joikktaiittiseja_vatlli_onsa_laieen_jallanenettta_on_in_en_ist
pl 14 6 rzyprzrzeająowasięjącściwieów_iejdziychym_nie_w_owigo_cznej_powegokieie__z_ch__ni_winiaskiny__zaki__i__po_na
cs 17 5 _přjí_ně_přecí_jsojícsouředpříní_ktenebvníeníky_íchho_ím__v_ké_tí_né_ýchch_ou_ého_jeje__vyce__po_a_se__ne_se
sk 15 4 sú__súajúať_ktoov_teľlebej_ýchky__v_né_ho__akch_nejsa_nietorom_jedie__ktje__jepreick_na_bomi_priale_a_dnoia_
sl 13 5 aškjo_ške_v_kem_upeganegih_ga__kiov__izki_je_leteljskiove_jeko_lovnijja_podem_skevenno_in_rav_nansklje_poanj
hr 13 4 koj_u_ičkoj_jezao_ojiazieziog_ijeih_rijjed_i_su__izja_je_skiim_ma_ju__jeijacijnje_odji_ka__naom_od_sko_koke_
hu 14 10 egyaz__ésmegséggy__eg_azagyssz_szés__csényszeeszközszák_aelyasznektt__köek_sztnakás_zerbanok_ak_ben_a_hatt_a
ro 15 5 tă__încă_în_ți_cu_oarul_ea__şiluişi_ulutul_acru__cuii_carui_aretrureadinlorei__o_ie_ntr_pe_esre_ste_dite__ca
tr 14 6 birır_arıınını_ın_çindırrı_anıındnınlı_larasıya_ir__yaılalerola_oldir_bi_buve_ndaileesiak__velanaraeririnini
vi 12 5 ột__mộác__nh_kh_cánh_có__cócác_ng_vàôngày_ên_và__ph_chthể_để_gi_làlà_ểngển__mể_thhể_ng__tể_trểc_ểi_n_tmểtiển
id 10 4 ngguk_ngantu_yaah_lahengsebnyaya_ganyankandalakaang_kedanlamdi_ng_daran_ada_daber_me_ad_pealaataat__diri_ama
et 15 8 _võvõiud_looid_õi_ks_ab_tsioonvad_vädustudasuusead_tusmisaksikuise_onsaaeksga__jamaaja__keustselst_ava_kuse_
lv 15 5 _ieībaās_enīinā_tāspēkā_iemām__iršan_izjasvieir_iekpieijams_em_tu_tieas_kasienai_ts__un_pi_viietiesja__no_ar
lt 15 6 _išpavių_ės_iauuosyraeikinėtų__šiinkijojosgaliks_irtaimasai_os_kaiojemo_usiausuriiniir_as_tinkurje_ti__paus_
ca 14 3 ió_mb_eix_ll_ésls__d_eu_és_ció_l_ambanyque_elts_ntsel_lestatuna_quat_delnt_ue_perun__peita_un_lala_es__a_ia_
ru 19 7 the_thhe__эт_выые_тсяны_ныхых_ннынойое_ый_ныйая_ть_ольии_ой_ов__со_и_скоогося_
uk 17 7 і_він_ють_бііль_якіствід_що_і_ів_ід__з__віть_ою__пінняні_ії_ськня__у_ого_виий_
bg 12 2 ци__съият_едят_се_ат__е_катетоа_сата_и_те_натитето_от__да_отва_ен_та_на_ия_ски
ar 13 6 ة_ان_اعلىلى_رة__إل_أنإلىدة_الأالق_للالسمن_التفي_اء_الم_فيية_الع_من_،_ها__الات_
fa 9 5 _کشارهکشفشف_اي_اينکه__که_شدارکرک_ره_ست_ده_يار_ازدر_سيااز_به__به_در_سي_و_است_اي
ur 9 5 نے_سے__ہويں__سےوں_کو__کہميں_ہيہے۔ے۔_ہيںکا_ايکہے_کے__کے_کي_ہےاور_کا_اوکي_ور__مي
hi 13 4 he__ththeto_ed__ines__to_a_हैंें_है__कीै।_ों__औरहै।में_इस_हैके__से_मेसे_की__के
mr 9 5 ाच््येचा_लेलतीलचे_च्यील_ून_याचची_ांच_हेआहे_आह_असयांहे_ात_ाती_व__हाहा_्या_याया_
"""
UNSPACED = {"zh", "ja", "th", "lo", "km", "my", "bo"}                # no spaces between words, so no counting of words
SEPARATORS = re.compile(r"[\s\d!-/:-@\[-`{-~\xa0-\xbf\u2000-\u206f।॥،؛۔]+")

@functools.cache
@functools.cache
def trigram_weights(script: str) -> tuple[list[str], dict[str, list[tuple[int, float]]]]:
    """The languages of a script, and trigram -> [(which language, weight)]."""
    lines, weights = [line.split() for line in TRIGRAMS.split("\n") if line], {}
    lines = [line for line in lines if script == SCRIPT_OF[max(map(ord, line[3])) >> 6]]
    for column, (_, first, last, grams) in enumerate(lines):
        for at, weight in zip(range(0, len(grams), 3), np.linspace(int(first), int(last), len(grams) // 3).tolist()):
            weights.setdefault(grams[at:at + 3], []).append((column, weight))
    return [line[0] for line in lines], weights

def identify_language(text: str, model: "FastText | None" = None) -> tuple[str, float]:
    """ISO 639-1 code and the probability that it is right; ("und", 1.0) where there are no letters.
    A softmax over the languages of the main script, times that script's share of the letters.
    Example: identify_language("Das ist nicht mein Hund.") -> ("de", 0.99)"""
    if model:
        return model.likeliest(text) or ("und", 1.0)
    if len(text) > 4000:                                             # the beginning, the middle and the end tell enough
        text = " ".join(text[at:at + 1300] for at in (0, len(text) // 2 - 650, len(text) - 1300))
    text, scripts = unicodedata.normalize("NFC", text.lower()), Counter()
    for character, n in Counter(text).items():
        if character.isalpha():
            scripts[SCRIPT_OF.get(ord(character) >> 6, "und")] += n
    if not scripts:
        return "und", 1.0
    if scripts["ja"] * 10 > scripts["zh"]:                           # Japanese is written in both
        scripts["ja"] += scripts.pop("zh", 0)
    (script, n), letters = scripts.most_common(1)[0], scripts.total()
    codes, weights = trigram_weights(script)
    if not codes:
        return script, n / letters
    padded, points = "_" + "_".join(SEPARATORS.split(text)) + "_", [0.0] * len(codes)
    for gram, times in (counts := Counter(map("".join, zip(padded, padded[1:], padded[2:])))).items():
        for column, weight in weights.get(gram, ()):
            points[column] += times * weight
    scale, best = 1 / math.sqrt(counts.total()), max(points)         # neighbouring trigrams are no independent evidence
    return codes[points.index(best)], n / letters / sum(math.exp(scale * (p - best)) for p in points)

# ------------------------------------------------------------------------------------------------- 5. personal data
NO_BOOK = "".join(rf"(?<!{w}{s})" for w in ("isbn", "issn", "isbn-10", "version", "release") for s in (" ", ": ", ":"))
EMAIL = re.compile(r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[a-z0-9-]{1,63}\.){1,8}[a-z]{2,24}(?![\w-])", re.I)
PHONE = re.compile(rf"(?<![\w.$€£#=/+-])(?<!\d[ \xa0]){NO_BOOK}(?:\+?1[-. \xa0]?)?(?:\([2-9]\d\d\)[-. \xa0]?|[2-9]\d\d"
                   r"([-. \xa0]?))\d{3}(?(1)\1|[-. \xa0]?)\d{4}(?![\w-]|[.,/]\d|[ \xa0]\d)", re.A | re.I)
OCTET = r"(?:25[0-5]|2[0-4]\d|[01]?\d?\d)"
IPV4 = re.compile(rf"(?<![\w.-]){NO_BOOK}(?:{OCTET}\.){{3}}{OCTET}(?![\w-]|\.\d)", re.A | re.I)

def mask_emails(text: str) -> tuple[str, int]:
    """Example: "Ask test@example.com." -> ("Ask |||EMAIL_ADDRESS|||.", 1)."""
    return EMAIL.subn("|||EMAIL_ADDRESS|||", text) if "@" in text else (text, 0)

def mask_phone_numbers(text: str) -> tuple[str, int]:
    """US numbers: 2831823829, (283)-182-3829, (283) 182 3829, 283-182-3829, 283.182.3829, each also after +1."""
    return PHONE.subn("|||PHONE_NUMBER|||", text)

def mask_ips(text: str) -> tuple[str, int]:
    """IPv4. Example: "at 10.0.0.1." -> ("at |||IP_ADDRESS|||.", 1)."""
    return IPV4.subn("|||IP_ADDRESS|||", text)

# ------------------------------------------------------------------------------------------------- 6. quality rules
# What is counted -> the least and the most of it that is kept; shares are of lines, words, paragraphs or characters.
# Gopher A1.1 and its Table A1; FineWeb 3.6, where the limits themselves are out; C4 2.2.
GOPHER = {"words": (50, 100_000), "mean word length": (3, 10), "lines that end in an ellipsis": (0, 0.3),
          "words with a letter": (0.8, 1)}
REPETITION = {"duplicate lines": (0, 0.3), "characters in duplicate lines": (0, 0.2), "duplicate paragraphs": (0, 0.3),
              "characters in duplicate paragraphs": (0, 0.2), "top 2-gram": (0, 0.2), "top 3-gram": (0, 0.18),
              "top 4-gram": (0, 0.16), **{f"duplicate {n}-grams": (0, (20 - n) / 100) for n in range(5, 11)}}
FINEWEB = {"lines that end in punctuation": (0.12 + 1e-9, 1), "characters in duplicate lines": (0, 0.1 - 1e-9),
           "short lines": (0, 0.67 - 1e-9)}
C4 = {"words in a line": 5, "lines": 3}
POLICY = re.compile(r"javascript|terms of use|privacy policy|cookie policy|uses? (?:of )?cookies", re.I)

def outside(found: dict[str, float], limits: dict[str, tuple[float, float]]) -> list[str]:
    """What lies outside its limits. Example: outside({"words": 7}, {"words": (50, 100)}) -> ["words under 50"]"""
    return [f"{name} under {low:g}" if found[name] < low else f"{name} over {high:g}"
            for name, (low, high) in limits.items() if not low <= found.get(name, 0) <= high]

def share(these: Iterable, total: int) -> float:
    """The sum of these in the total; 0 in nothing."""
    return sum(these) / (total or 1)

def gopher_reasons(text: str) -> list[str]:
    """Every Gopher quality rule that the text breaks. A token without letter or digit is no word."""
    tokens, lines = text.split(), [line.rstrip() for line in text.split("\n") if line.strip()]
    words = [w for w in tokens if w.isalnum() or any(map(str.isalnum, w))]
    lettered = (w.isalpha() or any(map(str.isalpha, w)) for w in tokens)
    return outside({"words": len(words), "mean word length": share(map(len, words), len(words)),
                    "lines that end in an ellipsis": share((x.endswith(("...", "…")) for x in lines), len(lines)),
                    "words with a letter": share(lettered, len(tokens))}, GOPHER)

def gopher_quality(text: str) -> bool:
    """True if the text passes Gopher's quality rules; `gopher_reasons` says which it breaks."""
    return not gopher_reasons(text)

def repetition_reasons(text: str) -> list[str]:
    """Every repetition rule of Gopher that the text breaks."""
    found, words, number = {}, text.lower().split(), {}
    for kind, separator in ("lines", "\n"), ("paragraphs", "\n\n"):
        pieces = [p for p in map(str.strip, text.split(separator)) if p]
        again = Counter(pieces) - Counter(set(pieces))               # every occurrence but one
        found[f"duplicate {kind}"] = share(again.values(), len(pieces))
        found[f"characters in duplicate {kind}"] = share((len(p) * n for p, n in again.items()), len("".join(pieces)))
    gram = ids = np.array([number.setdefault(w, len(number)) for w in words], dtype=np.uint64)
    width = length = np.array(list(map(len, words)), dtype=np.int64)
    for n in range(2, min(10, len(words)) + 1):
        gram = gram[:-1] * np.uint64(0x9E3779B97F4A7C15) + ids[n - 1:]         # a rolling hash of n words, modulo 2^64
        width = width[:-1] + length[n - 1:]
        _, first, count = np.unique(gram, return_index=True, return_counts=True)
        if len(first) == len(gram):
            break                                                    # nothing repeats, so nothing longer does
        again = np.bincount(first, minlength=len(gram)) == 0         # every n-gram that has occurred before
        found[f"duplicate {n}-grams"] = length[np.convolve(again, np.ones(n, np.int64)) > 0].sum() / length.sum()
        found[f"top {n}-gram"] = (count * width[first])[count > 1].max(initial=0) / length.sum()
    return outside(found, REPETITION)

def fineweb_reasons(text: str) -> list[str]:
    """FineWeb's three line statistics."""
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    ends = (line.endswith((".", "!", "?", ":", ";", '"', "”", "’", "'", ")")) for line in lines)
    again = (len(p) * (n - 1) for p, n in Counter(lines).items())
    return outside({"lines that end in punctuation": share(ends, len(lines)),
                    "characters in duplicate lines": share(again, len("".join(lines))),
                    "short lines": share((len(line) < 30 for line in lines), len(lines))}, FINEWEB)

def c4_lines(text: str) -> str:
    """C4's rules: keeps lines of five words or more that end a sentence and are no policy or script notice.
    A page with fewer than three of them, with a curly bracket or with lorem ipsum gives ""."""
    kept = [line for line in text.split("\n") if line.rstrip("\"'”’) ").endswith((".", "!", "?"))
            and not line.rstrip().endswith("...") and len(line.split()) >= C4["words in a line"]
            and not POLICY.search(line)]
    return "\n".join(kept) if len(kept) >= C4["lines"] and not re.search("[{]|(?i:lorem ipsum)", text) else ""

# --------------------------------------------------------------------------- 7. harm and quality, by visible weights
LOOSE = dict(a="[a@4*]", e="[e3*]", i="[i1!*]", o="[o0*]", u="[uv*]", s="[s$5*]")        # f*ck, pr0n, $hit

def lexicon(words: str, loose: bool = False) -> str:
    """A pattern for whole words with the common endings; `loose`: also spelled with stars and digits."""
    if loose:                                                        # stars anywhere but for a first consonant
        words = re.sub(r"\B\w|[aeiou]", lambda m: LOOSE.get(m[0], f"[{m[0]}*]"), words)
    return rf"(?<![\w*])(?=[^\sa-z]{{0,12}}[a-z])(?:{'|'.join(words.split())})(?:e?s|ing|ed|ers?)?(?![\w*])"

FOUL = lexicon("idiot moron imbecile retard scum filth trash loser stupid pathetic worthless disgusting ugly vermin "
               "asshole bitch cunt whore slut cocksucker motherfucker bastard faggot nigger kike dumbass", True)
YOU = r"\b(?:you|your|you're|youre|u|ur|ya)\b"
# What is weighed, in text of lower case -> the weight of each time that it occurs.
OBSCENE = {lexicon("fuck motherfucker cunt cock cocksucker blowjob handjob cumshot creampie gangbang milf porn porno "
                   "hentai pornstar dildo slut pussy cum horny whore xxx deepthroat jizz titties", True): 3,
           lexicon("dick tits boobs asshole naked nude orgasm erotic anal bitch escort bdsm fetish busty", True): 2,
           lexicon("sex sexy sexual shit ass penis vagina breast masturbate bastard threesome", True): 1,
           lexicon("study research health medical medicine disease law court century population education clinical "
                   "species journal history treatment according university patient society article film"): -0.7}
ABUSIVE = {r"\b(?:kill|hang|shoot) (?:yo)?urself\b|\bgo to hell\b|\bdrop dead\b|\bhope (?:yo)?u (?:die|rot)": 3,
           r"\bshut (?:the \S{1,8} )?up\b|\bf[u*][c*][k*] (?:(?:yo)?u|off|them)|\bi(?:'ll| will) kill (?:yo)?u": 3,
           r"\bnobody (?:likes|loves|wants) (?:yo)?u\b|\byou (?:should|deserve to) (?:die|be (?:shot|hung))": 3,
           YOU + r"[^.!?\n]{0,24}?\s" + FOUL + "|" + FOUL + r"[^.!?\n]{0,24}?\s" + YOU: 3,
           r"(?:^|[.!?,]\s*)" + FOUL + r"\s*(?:$|[.!?,])": 2,
           r"\b(?:they|those|these|all|the) \w{1,20} (?:are|is) (?:all |just |nothing but )?(?:an? )?" + FOUL: 3}
CITED = {r"\b(?:is|are|was|were|been|be) (?:an?|the|born|founded|published|named|known|used|located|called|defined|set|"
         r"described|written|based|considered|given|returned|made)\b": 0.35,
         r"\[\d{1,3}\]|\bet al\b|\bdoi\b|\bisbn\b|\((?:1[5-9]|20)\d\d\)|\bpp?\. \d": 0.5,
         r"\b(?:however|therefore|although|because|which|during|according to|such as|for example|in general|whether|"
         r"thus|between|century|several|often|usually|also)\b": 0.25,
         r"\b(?:click here|add to cart|log ?in|sign (?:up|in)|subscribe|newsletter|shopping|checkout|lol|"
         r"all rights reserved|powered by|posted by|reply|register|shipping|buy now|best price|cheap|discount|sale|"
         r"order now|wishlist|view all|read more|forums?|threads?|username|hotels?|casino|viagra|coupons?)\b": -1.2,
         r"\b(?:i|i'm|my|me|you|your|we|our|thanks|please|hi|hello)\b": -0.4, r"[!|»$%]|\.\.\.|http": -0.5,
         r"[^\n]{81,}": 0.7, r"(?m)^[^\n]{1,40}[^.!?:\n]$": -0.5}  # a line of text; a line of a menu

def weigh(text: str, weights: dict[str, float], scale: float, smooth: int, bias: float, labels: tuple[str, str],
          model: "FastText | None") -> tuple[str, float]:
    """The likelier label and its probability: log odds that are linear in how often each pattern occurs per word."""
    if model and (found := model.likeliest(text)):
        return found
    points = sum(weight * len(re.findall(pattern, text.lower())) for pattern, weight in weights.items())
    odds = scale * points / (len(text.split()) + smooth) + bias
    return labels[odds < 0], 1 / (1 + math.exp(-min(abs(odds), 30)))

def classify_nsfw(text: str, model: "FastText | None" = None) -> tuple[str, float]:
    """("nsfw" or "non-nsfw", score): obscene words, against sober words that name the same topics in another tone."""
    return weigh(text, OBSCENE, 50, 20, -3.0, ("nsfw", "non-nsfw"), model)

def classify_toxic(text: str, model: "FastText | None" = None) -> tuple[str, float]:
    """("toxic" or "non-toxic", score): abuse aimed at somebody; an expletive alone is not."""
    return weigh(text, ABUSIVE, 330, 150, -3.0, ("toxic", "non-toxic"), model)

def classify_quality(text: str, model: "FastText | None" = None) -> tuple[str, float]:
    """("wiki" or "cc", score): would an encyclopedia cite it? Explaining prose against navigation, shops, forums."""
    return weigh(text, CITED, 100, 20, -0.6, ("wiki", "cc"), model)

# ------------------------------------------------------------------------------------------------------ 8. FastText
FT_HEADER, FT_MAGIC, HS, SOFTMAX, SUPERVISED = "<14id3i2q", 793712314, 1, 3, 3       # loss 2 and 4: a sigmoid a label
FT_ARGS = "dim ws epoch minCount neg wordNgrams loss model bucket minn maxn lrUpdateRate t".split()
FT_WORD = re.compile(r"(?<![^ \n\r\t\v\f\0])(?!__label__)[^ \n\r\t\v\f\0]+")

def fnv1a(text: str) -> int:
    """FNV-1a over UTF-8 bytes taken as signed, as the official code does; 32 bits."""
    h = 2166136261
    for byte in text.encode("utf-8", "replace"):
        h = (h ^ (byte if byte < 128 else byte | 0xFFFFFF00)) * 16777619 & 0xFFFFFFFF
    return h

class FastText:
    """A linear classifier on the mean of word and n-gram vectors; the n-grams are hashed into `bucket` rows.
    Example: FastText.load("lid.176.bin").predict("Guten Morgen") -> (("__label__de",), array([0.99]))"""

    def __init__(self, args: dict, words: dict[str, int], labels: dict[str, int], inputs, outputs) -> None:
        self.args, self.words, self.labels, self.inputs, self.outputs = args, words, labels, inputs, outputs
        self.names, self.index = list(labels), {w: i for i, w in enumerate(words)}   # words, labels: name -> count
        self.known = functools.lru_cache(1 << 17)(self.word_rows)

    def word_rows(self, word: str) -> tuple[list[int], int]:
        """The rows of a word and of its character n-grams, and its hash as a signed integer."""
        rows, padded, h = [self.index[word]] if word in self.index else [], f"<{word}>", fnv1a(word)
        for i in range(len(padded) if self.args["maxn"] and word != "</s>" else 0):
            for n in range(max(1, self.args["minn"]), min(self.args["maxn"], len(padded) - i) + 1):
                if n > 1 or 0 < i < len(padded) - 1:
                    rows.append(len(self.words) + fnv1a(padded[i:i + n]) % self.args["bucket"])
        return rows, h - (h >> 31 << 32)

    def rows(self, text: str) -> list[int]:
        """The rows of all words of a text and of their n-grams."""
        found = [self.known(w) for w in FT_WORD.findall(text) + ["</s>"]]
        rows, hashes = [row for word, _ in found for row in word], [h for _, h in found]
        for i, h in enumerate(hashes if self.args["wordNgrams"] > 1 else []):
            for after in hashes[i + 1:i + self.args["wordNgrams"]]:
                h = (h * 116049371 + after) & 0xFFFFFFFFFFFFFFFF
                rows.append(len(self.words) + h % self.args["bucket"])
        return rows

    def predict(self, text: str, k: int = 1) -> tuple[tuple[str, ...], np.ndarray]:
        """The k likeliest labels and their probabilities, with the 1e-5 that the package adds, at most 1."""
        if not (rows := self.rows(text)):
            return (), np.zeros(0)
        score = self.outputs @ self.inputs[rows].mean(axis=0)
        if self.args["loss"] == HS:
            p = self.huffman(score.astype(np.float64))
        elif self.args["loss"] == SOFTMAX:
            p = np.exp(score - score.max())
            p = p / p.sum() + 1e-5
        else:                                                        # the package has its sigmoid in a table of 512
            p = 1 / (1 + np.exp(8 - np.floor((score.clip(-8, 8) + 8) * 32) / 32))
            p = np.where(score < -8, 0, np.where(score > 8, 1, p)) + 1e-5
        top = np.argsort(-p, kind="stable")[:k]
        return tuple(self.names[i] for i in top), np.minimum(p[top], 1)

    def likeliest(self, text: str) -> tuple[str, float] | None:
        """The likeliest label, without __label__, and its probability; None for a text without a known word."""
        labels, scores = self.predict(text)
        return (labels[0].removeprefix("__label__"), float(scores[0])) if labels else None

    def huffman(self, score: np.ndarray) -> np.ndarray:
        """Hierarchical softmax: a label's probability is the product of the turns on the way down to it."""
        n, log, children = len(self.labels), np.zeros(2 * len(self.labels) - 1), []
        heap = [(count, 1, -leaf, leaf) for leaf, count in enumerate(self.labels.values())]  # ties: nodes, last
        heapq.heapify(heap)
        for node in range(n, 2 * n - 1):
            (rare, *_, left), (common, *_, right) = heapq.heappop(heap), heapq.heappop(heap)
            heapq.heappush(heap, (rare + common, 0, node, node))
            children.append([left, right])
        for node, turns in reversed(list(enumerate(children, n))):
            p = 1 / (1 + np.exp(-score[node - n]))
            log[turns] = log[node] + np.log((1 - p + 1e-5, p + 1e-5))
        return np.exp(log[:n])

    @classmethod
    def train(cls, texts: list[str], labels: list[str], *, dim=100, epochs=5, lr=0.1, word_ngrams=1, minn=0, maxn=0,
              bucket=200_000, min_count=1, seed=0) -> "FastText":
        """Softmax regression by SGD, one text a step, with a rate that falls linearly to zero."""
        if len(texts) != len(labels) or not labels:
            raise ValueError(f"want one label for each text, got {len(texts)} texts and {len(labels)} labels")
        rng, labels = np.random.default_rng(seed), ["__label__" + y.removeprefix("__label__") for y in labels]
        words = Counter({"</s>": len(texts)}) + Counter(w for text in texts for w in FT_WORD.findall(text))
        words, kinds = {w: n for w, n in words.most_common() if n >= min_count}, dict(Counter(labels).most_common())
        bucket *= word_ngrams > 1 or maxn > 0
        args = dim, 5, epochs, min_count, 5, word_ngrams, SOFTMAX, SUPERVISED, bucket, minn, maxn, 100, 1e-4
        inputs = rng.uniform(-1 / dim, 1 / dim, (len(words) + bucket, dim)).astype(np.float32)
        model = cls(dict(zip(FT_ARGS, args)), words, kinds, inputs, outputs := np.zeros((len(kinds), dim), np.float32))
        pages = [np.unique(np.array(model.rows(t), np.int64), return_counts=True) for t in texts]
        for step, i in enumerate(np.concatenate([rng.permutation(len(texts)) for _ in range(epochs)])):
            rows, count = pages[i]
            weight, rate = (count / count.sum()).astype(np.float32), np.float32(lr * (1 - step / (epochs * len(texts))))
            hidden = weight @ inputs[rows]                           # (dim,) the mean of the text's vectors
            p = np.exp(outputs @ hidden - (outputs @ hidden).max())
            error = -rate * p / p.sum()
            error[model.names.index(labels[i])] += rate              # rate times the gradient of log p[label]
            inputs[rows] += np.outer(weight, error @ outputs)
            outputs += np.outer(error, hidden)
        return model

    @classmethod
    def load(cls, path: str) -> "FastText":
        """Reads the official .bin format. Raises: ValueError if it is another, is cut short, or is quantised (.ftz)."""
        def take(form: str) -> tuple:
            return struct.unpack(form, f.read(struct.calcsize(form)))
        try:
            with open(path, "rb") as f:
                magic, version, *values, size, _, _, tokens, pruned = take(FT_HEADER)
                if magic != FT_MAGIC or pruned >= 0:
                    raise ValueError("another format, or quantised (.ftz)")
                args, entries, matrices = dict(zip(FT_ARGS, values), tokens=tokens), ({}, {}), []
                args["maxn"] *= version > 11 or args["model"] != SUPERVISED      # as the package does for old files
                for _ in range(size):
                    name = b"".join(iter(lambda: f.read(1) or b"\0", b"\0"))
                    count, kind = take("<qb")
                    entries[kind][name.decode("utf-8", "surrogateescape")] = count
                for _ in range(2):
                    _, m, n = take("<?qq")
                    matrices.append(np.frombuffer(f.read(4 * m * n), "<f4").reshape(m, n).copy())
        except (struct.error, ValueError, LookupError, MemoryError, OverflowError) as fault:
            raise ValueError(f"{path} is no complete FastText .bin model: {fault}") from None
        return cls(args, *entries, *matrices)

    def save(self, path: str) -> None:
        """Writes the official .bin format, whole or not at all."""
        entries, tokens = [*self.words.items(), *self.labels.items()], self.args.get("tokens", sum(self.words.values()))
        sizes = len(entries), len(self.words), len(self.labels)
        with write_whole(path) as f:
            f.write(struct.pack(FT_HEADER, FT_MAGIC, 12, *map(self.args.get, FT_ARGS), *sizes, tokens, -1))
            for name, count in entries:
                kind = name.startswith("__label__")
                f.write(name.encode("utf-8", "surrogateescape") + struct.pack("<xqb", count, kind))
            for matrix in self.inputs, self.outputs:
                f.write(struct.pack("<?qq", False, *matrix.shape) + np.ascontiguousarray(matrix, "<f4").tobytes())

# -------------------------------------------------------------------------------------------------- 9. the pipeline
load_model = functools.lru_cache(FastText.load)                      # once a process
RULES = {"gopher": gopher_reasons, "repetition": repetition_reasons, "fineweb": fineweb_reasons}
JUDGES = {"nsfw": (classify_nsfw, "nsfw"), "toxic": (classify_toxic, "toxic"), "quality": (classify_quality, "cc")}
MASKS = {"emails": mask_emails, "phones": mask_phone_numbers, "ips": mask_ips}
STEPS = [*RULES, "c4", *JUDGES, "pii"]
REPORT = "documents bytes masked warnings".split()                   # each a count by reason, kind or fault
EVERY = 10                                                           # seconds from one line of progress to the next

def filter_record(record: Record, languages=("en",), min_language=0.65, without=(), models={}) -> tuple[str, dict]:
    """One record through every step: ("kept", document), or (why it was dropped, what is known of it).
    Args: languages: codes to keep, none for all. without: of STEPS. models: "lid", "nsfw", ... -> a FastText file."""
    document, kind = {"url": record.url, "bytes": len(record.payload)}, record.http.get("content-type", "").lower()
    model = {step: load_model(path) for step, path in models.items()}.get
    if record.status and not 200 <= record.status < 300:
        return "status", document
    if record.kind == "response" and not re.match(r"$|text/(?:html|plain)|application/xhtml", kind):
        return "content type", document
    to_text = decode if record.kind == "conversion" or kind.startswith("text/plain") else extract_text
    text = to_text(record.payload, (re.search(r"charset=[\"']?([\w:.-]+)", kind) or ("", ""))[1])
    language, score = identify_language(text, model("lid"))
    document |= {"text": text, "language": language, "scores": {"language": round(score, 4)}}
    if not text.strip() or languages and (language not in languages or score < min_language):
        return "language" if text.strip() else "empty", document
    skip = {*without, *([*RULES, "c4"] if language in UNSPACED else ())}
    for step, rules in RULES.items():
        if step not in skip and (reasons := rules(text)):
            return f"{step}: {reasons[0]}", document | {"reasons": reasons}
    if "c4" not in skip and not (text := c4_lines(text)):
        return "c4", document
    for step, (classify, bad) in JUDGES.items():
        label, score = classify(text, model(step))
        document["scores"][step] = round(score if label == bad else 1 - score, 4)      # the bad label's probability
        if label == bad and step not in skip:
            return step, document
    document["masked"] = {}
    for name, mask in MASKS.items() if "pii" not in skip else ():
        text, document["masked"][name] = mask(text)
    return "kept", document | {"text": text}

def filter_file(source: str, target: str, pool, keep_dropped: int, options: dict) -> Iterator[float]:
    """One archive to one file of JSON lines and its report, whole or not at all. Yields the bytes read so far."""
    report, examples, rng = {k: Counter() for k in REPORT}, {}, random.Random(0)
    with open_source(source) as raw, write_whole(target) as file, gzip.open(file, "wt", 4, "utf-8", "replace") as sink:
        records = read_warc(raw, report["warnings"])
        if not (first := next(records, None)):
            raise ValueError(f"no WARC record ({', '.join(report['warnings']) or 'empty'})")
        pages = (r for r in itertools.chain([first], records) if r.kind in ("response", "conversion"))
        for reason, document in pool.imap(functools.partial(filter_record, **options), pages, chunksize=16):
            report["documents"][reason] += 1
            report["bytes"][reason] += document["bytes"]
            if reason == "kept":
                report["masked"].update(document["masked"])
                sink.write(json.dumps(document, ensure_ascii=False) + "\n")
            elif (at := rng.randrange(report["documents"][reason])) < keep_dropped:      # a reservoir: equal chances
                some = examples.setdefault(reason, [])
                some[at:at + 1] = [document, *(some[at:at + 1] if len(some) < keep_dropped else [])]
            yield raw.tell() if raw.seekable() else math.nan
        with write_whole(target.replace(".jsonl.gz", ".report.json")) as notes:
            notes.write(json.dumps(report | {"dropped": examples}, ensure_ascii=False).encode("utf-8", "replace"))

def filter_files(sources: list[str], out: str, workers: int | None = None, keep_dropped: int = 0, **options) -> dict:
    """Every archive that has no output yet, each on all cores; returns the summed report of all of them.
    One process reads and writes, at 7% of the work: with more than 13 workers run several --shard side by side."""
    names = [os.path.basename(s.split("?")[0]).removesuffix(".gz") if s != "-" else "stdin" for s in sources]
    targets = [os.path.join(out, name + ".jsonl.gz") for name in names]
    if len(set(names)) < len(names):
        raise ValueError(f"two inputs are called {Counter(names).most_common(1)[0][0]}; use two --out folders")
    list(map(load_model, options.get("models", {}).values()))        # a bad model stops the run here; children share it
    jobs = [(s, t) for s, t in zip(sources, targets) if not os.path.exists(t)]
    ends = [0, *itertools.accumulate(os.path.getsize(s) if os.path.isfile(s) else math.nan for s, _ in jobs)]
    start, shown, documents, faults = time.time(), 0.0, 0, []
    with Pool(workers) as pool:
        for i, (source, target) in enumerate(jobs):
            try:
                for position in filter_file(source, target, pool, keep_dropped, options):
                    documents, seconds = documents + 1, time.time() - start
                    if seconds > shown + EVERY:                      # eta nan: from stdin or a URL
                        shown, left = seconds, seconds * (ends[-1] / (ends[i] + position) - 1)
                        print(f"file {i + 1}/{len(jobs)} | {documents:,} documents | {documents / seconds:,.0f} "
                              f"documents/s | eta {left:.0f}s", file=sys.stderr)
            except (OSError, ValueError, HTTPException) as fault:
                faults.append(f"{source}: {fault}")                  # the others are filtered all the same
    if faults:
        raise ValueError(f"{len(faults)} of {len(jobs)} inputs gave nothing: {'; '.join(faults[:9])}")
    total = {k: Counter() for k in REPORT}
    for target in targets:
        report = json.loads(Path(target.replace(".jsonl.gz", ".report.json")).read_text("utf-8"))
        for key, counts in total.items():
            counts.update(report[key])
    return total

def print_report(total: dict[str, Counter]) -> None:
    """What each step removed: documents and bytes, with their shares; then masks and warnings."""
    for reason, n in sorted(total["documents"].items(), key=lambda x: (x[0] == "kept", -x[1])):
        size, of, of_bytes = total["bytes"][reason], total["documents"].total(), total["bytes"].total() or 1
        print(f"{reason:50s} | {n:9,d} documents {n / of:6.1%} | {size:13,d} bytes {size / of_bytes:6.1%}")
    for key in "masked", "warnings":
        print(f"{key:50s} | " + (", ".join(f"{n:,} {name}" for name, n in total[key].items()) or "none"))

# ------------------------------------------------------------------------------------------------------ 10. a sample
SPEAK = {"de": "Der kleine Hund läuft jeden Morgen durch den Garten und sucht nach den Knochen von gestern.",
         "fr": "Le petit chien court chaque matin dans le jardin et cherche les os qu'il a cachés la veille.",
         "es": "El perro pequeño corre cada mañana por el jardín y busca los huesos que escondió ayer.",
         "ru": "Маленькая собака каждое утро бегает по саду и ищет кости, которые она вчера спрятала.",
         "ja": "小さな犬は毎朝庭を走って、昨日木の下に隠した骨を探しています。", "zh": "小狗每天早上在花园里跑来跑去，寻找昨天藏在树下的骨头。"}

def warc_record(url: str, body: bytes, head: str = "Content-Type: text/html", status: int = 200) -> bytes:
    """A response as one gzip member of a WARC file; with status 0 the text of a page, as WET files have it."""
    block = f"HTTP/1.1 {status} -\r\n{head}\r\n\r\n".encode() * bool(status) + body
    head = f"WARC/1.0\r\nWARC-Type: {'response' if status else 'conversion'}\r\nWARC-Target-URI: {url}\r\n"
    return gzip.compress(f"{head}Content-Length: {len(block)}\r\n\r\n".encode() + block + b"\r\n\r\n", mtime=0)

def library_prose() -> Iterator[tuple[str, list[str]]]:
    """(module, paragraphs) of Python's library, where its docstrings are prose: real text that needs no download."""
    root = Path(gzip.__file__).parent
    for path in sorted(p for p in root.rglob("*.py") if not {"site-packages", "test", "tests"} & set(p.parts)):
        strings = re.findall(r'"""(.*?)"""', path.read_text("utf-8", "replace"), re.S)
        pieces = dict.fromkeys(" ".join(p.split()) for p in re.split(r"\n\s*\n", "\n\n".join(strings)))
        prose = [p for p in pieces if len(p.split()) > 7 and p.endswith(".") and not re.search(r"[{}<>=]|--", p)]
        if len(" ".join(prose).split()) > 150:
            yield str(path.relative_to(root).with_suffix("")), prose

def sample_page(*paragraphs: str) -> bytes:
    """A page of HTML: a title, a script, a menu, and the paragraphs."""
    menu = "".join(f"<li><a href=/{w}>{w}</a>" for w in "Home Products Forum Login Register".split())
    body = "".join(f"<p>{p}</p>" for p in paragraphs)
    return f"<title>A page</title><script>if (a < b) {{}}</script><ul>{menu}</ul>{body}".encode()

def write_sample(out: str, seed: int = 0) -> None:
    """sample.warc.gz; expected.json: url -> what must happen to the planted page; heldout.txt: clean text kept back."""
    rng, page, host, planted, pages = random.Random(seed), sample_page, "http://sample.test/", {}, dict(library_prose())
    prose = [html.escape(p) for ps in pages.values() for p in ps if 25 < p.count(" ") < 90]
    prose = [p for p in prose if identify_language(p)[1] > 0.9]
    words, heldout = " ".join(prose).split(), "\n\n".join(p for ps in list(pages.values())[::10] for p in ps)
    others = {f"pydoc/{m.__name__}": pydoc.html.document(m).encode() for m in (argparse, gzip, html, json, random, re)}
    for i, (module, paragraphs) in enumerate(pages.items()):
        if i % 10:                                                   # a page, and as much debris of two kinds
            size, few = len(" ".join(paragraphs).split()), rng.sample(words, 9)
            others[f"doc/{module}"] = page(*map(html.escape, paragraphs))
            goods = [f"{rng.choice(words)} {rng.choice(words)} $9 Add to cart!" for _ in range(size // 5)]
            planted[f"shop/{i}"] = "dropped", page(*goods)
            planted[f"spam/{i}"] = "dropped", page(" ".join(rng.choices(few, k=size)) + ".")
    for i in range(20):                                              # five pages in four copies, alike but for one line
        near = rng.sample(prose, 8) if i % 4 == 0 else near
        copy = page(*near, f"This copy was made on day number {i} of the year.")
        planted[f"duplicate/{i}"] = "kept", copy, {"group": i // 4}
    near, has, head = rng.sample(prose, 8), {"has": "café of the naïve señor"}, "Content-Type: text/html"
    cafe = page(*near, "The café of the naïve señor opens at eight, which is “early” for this part of the town.")
    hostile = cafe.replace(b"<p>", b"<div <p title='>' <<b><p id=\"a > b\">").replace(b"</p>", b"<!-- > --></p></i>")
    packed, masked = gzip.compress(cafe, mtime=0), {"masked": {"emails": 1, "phones": 1, "ips": 1}}
    planted |= {"language/" + code: ("language", page(*[text] * 3)) for code, text in SPEAK.items()} | {
        "personal": ("kept", page(*near, "Write to test@example.com or call (283) 182-3829 from 192.168.0.1."), masked),
        "latin": ("kept", cafe.decode().encode("cp1252"), has, head + "; charset=iso-8859-1"),
        "hostile": ("kept", hostile, has), "menu": ("dropped", page()), "missing": ("status", cafe, {}, head, 404),
        "chunked": ("kept", b"%x\r\n%s\r\n0\r\n\r\n" % (len(packed), packed), has,
                    head + "\r\nTransfer-Encoding: chunked\r\nContent-Encoding: gzip"),
        "image": ("content type", b"\x89PNG" * 99, {}, "Content-Type: image/png"),
        "obscene": ("nsfw", page(*prose[:2], "Hot sl*ts want c0ck and pussy in this free xxx porn video: come, see.")),
        "abuse": ("toxic", page(*prose[:2], "You are a worthless idiot, nobody likes you. Shut up, go to hell now."))}
    records = [warc_record(host + name, body) for name, body in others.items()]
    expected = {host + name: {"want": want} | dict(*more[:1]) for name, (want, _, *more) in planted.items()}
    records += [warc_record(host + name, body, *more[1:]) for name, (_, body, *more) in planted.items()]
    rng.shuffle(records)
    records.append(warc_record(host + "cut", cafe)[:-200])
    for name, data in {"expected.json": json.dumps(expected).encode(), "heldout.txt": heldout.encode(),
                       "sample.warc.gz": b"".join(records)}.items():
        with write_whole(Path(out, name)) as f:
            f.write(data)

def check_sample(out: str, expected_path: str) -> None:
    """Compares what is left of the sample, here or after dedup.py, with the known answers. Raises: ValueError."""
    expected, report_path = json.loads(Path(expected_path).read_text("utf-8")), Path(out, "sample.warc.report.json")
    with gzip.open(Path(out, "sample.warc.jsonl.gz"), "rt", encoding="utf-8") as f:
        got = {page["url"]: ("kept", page) for page in map(json.loads, f)}
    groups = Counter(want["group"] for url, want in expected.items() if "group" in want and url in got)
    if set(groups.values()) != {4 if report_path.exists() else 1} or len(groups) < 5:
        raise ValueError(f"of five near-duplicates in four copies all should be kept, and one after dedup.py: {groups}")
    if not report_path.exists():
        return print(f"{len(groups)} groups of near-duplicates as expected: one page left of each  OK")
    report = json.loads(report_path.read_text("utf-8"))
    got |= {page["url"]: (reason, page) for reason, pages in report["dropped"].items() for page in pages}
    for url, want in expected.items():
        reason, page = got.get(url, ("not there; filter with --keep-dropped 100000", {}))
        fits = want["want"] == reason or want["want"] == "dropped" and page and reason != "kept"
        masked = want.get("masked") in (None, page.get("masked"))
        if not (fits and masked and want.get("has", "") in page.get("text", "")):
            raise ValueError(f"{url} should be {want}, is {reason}: {page}")
    if report["warnings"] != {"truncated gzip member": 1}:
        raise ValueError(f"the cut record should be the one warning, got {report['warnings']}")
    print(f"{len(expected)} planted pages as expected, {len(got) - len(expected)} others, 1 cut record counted  OK")

# --------------------------------------------------------------------------------------------------- 11. to run it
def walk_through() -> None:
    """One page, step by step."""
    page = b"<title>x</title><h1>The caf\xe9s</h1><p>You write to <b>a@b.org</b> &amp; wait.<ul><li>one<script>1<2"
    print(f"bytes              {page}\nextract_text       {(text := extract_text(page, 'iso-8859-1'))!r}")
    for step in identify_language, mask_emails, gopher_reasons, classify_nsfw, classify_toxic, classify_quality:
        print(f"{step.__name__:18s} {step(text)}")

def self_check() -> None:
    """Each step against known answers. Raises: AssertionError."""
    record, warnings = warc_record("http://a.test/", b"<p>1 &lt; 2"), Counter()
    got = [(r.url, r.status, extract_text(r.payload)) for r in read_warc(io.BytesIO(record + record[:-20]), warnings)]
    assert got == [("http://a.test/", 200, "1 < 2")] and warnings == {"truncated gzip member": 1}, (got, warnings)
    assert extract_text("<ol><li>a<li>b</ol><table><tr><td>c<td>d") == "  1. a\n  2. b\nc\t\td"
    assert all(identify_language(text)[0] == code for code, text in SPEAK.items())
    assert mask_phone_numbers("Call (283) 182 3829.") == ("Call |||PHONE_NUMBER|||.", 1)
    assert mask_ips("1.2.3.4, 1.2.3.4.5 and 300.1.1.1.") == ("|||IP_ADDRESS|||, 1.2.3.4.5 and 300.1.1.1.", 1)
    assert gopher_quality("the with " * 50) and gopher_reasons("a be " * 50) == ["mean word length under 3"]
    model = FastText.train(["good fine nice", "bad poor sad"] * 9, ["up", "down"] * 9, dim=8, lr=0.5)
    assert model.likeliest("fine")[0] == "up" and model.likeliest("poor")[0] == "down"

def bench(repeats: int = 3, copies: int = 20) -> None:
    """Megabytes a second: of each step on one core, and of the whole on all cores, for pages (WARC) and texts (WET)."""
    with tempfile.TemporaryDirectory() as out:
        write_sample(out)
        pages = [r.payload for r in read_warc(Path(out, "sample.warc.gz")) if r.status == 200 and r.payload[:1] == b"<"]
        texts, cores = list(map(extract_text, pages)), os.cpu_count()
        for step in (extract_text, identify_language, gopher_reasons, repetition_reasons, fineweb_reasons, c4_lines,
                     classify_nsfw, classify_toxic, classify_quality, mask_emails, mask_phone_numbers, mask_ips):
            given, speeds = pages if step is extract_text else texts, []
            for _ in range(repeats):
                start = time.perf_counter()
                list(map(step, given))
                speeds.append(sum(map(len, given)) / 1e6 / (time.perf_counter() - start))
            middle = sorted(speeds)[repeats // 2]
            print(f"{step.__name__:20s} {middle:7.1f} MB/s (min {min(speeds):.1f}, max {max(speeds):.1f})")
        for name, status, bodies in ("WARC", 200, pages), ("WET", 0, [text.encode() for text in texts]):
            packed = b"".join(warc_record("", body, status=status) for body in bodies) * copies
            Path(out, name).write_bytes(packed)
            start = time.perf_counter()
            filter_files([str(Path(out, name))], out)
            seconds, size = time.perf_counter() - start, sum(map(len, bodies)) * copies / 1e6
            print(f"{name:20s} {size / seconds:7.1f} MB/s, {len(packed) / seconds / 1e6:.1f} packed, on {cores} cores")
    for files in 5_000, 100_000:                                     # of 75 MB packed and 200 MB of text each
        hours = files * 200 / size * seconds * cores / 3600
        print(f"{files:,} WET files: {hours:,.0f} core hours, {hours / 16:,.0f} h on 16 cores")

def main() -> int:
    """The command line. Returns the exit code: 2 where the caller has to change something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="IN", help="WARC or WET files, http(s) URLs, or - for stdin")
    add("--out", metavar="DIR", default="out/data/filtered", help="one .jsonl.gz and one .report.json for each input")
    add("--workers", type=int, help="processes; default: all cores")
    add("--shard", default="0/1", metavar="I/N", help="only every N-th input, from the I-th: for job arrays")
    add("--keep-dropped", type=int, default=0, metavar="N", help="random examples of each reason, in the report")
    add("--languages", nargs="*", default=["en"], help="codes to keep; none for all")
    add("--min-language", type=float, default=0.65, metavar="P", help="least probability of the language")
    add("--without", nargs="*", default=[], choices=STEPS, help="steps to leave out")
    for step in "lid", *JUDGES:
        add("--" + step, metavar="MODEL", help="a FastText .bin in place of the embedded classifier")
    add("--train-quality", nargs=2, metavar=("POS", "NEG"), help="text files, a page a line; the model goes to --out")
    add("--sample", metavar="DIR", help="write a sample archive with known answers")
    add("--check", metavar="EXPECTED", help="compare --out with the sample's expected.json")
    add("--bench", action="store_true", help="the speed of each step and of the whole")
    args = parser.parse_args()
    try:
        if not (shard := re.fullmatch("([0-9]+)/([1-9][0-9]*)", args.shard)) or int(shard[1]) >= int(shard[2]):
            raise ValueError(f"--shard {args.shard}: want I/N with I from 0 to N - 1, as in 0/8")
        if args.bench:
            bench()
        elif args.sample:
            write_sample(args.sample)
        elif args.train_quality:
            good, bad = (Path(path).read_text("utf-8").splitlines() for path in args.train_quality)
            FastText.train(good + bad, ["wiki"] * len(good) + ["cc"] * len(bad), word_ngrams=2).save(args.out)
        elif args.inputs:
            models = {step: path for step in ("lid", *JUDGES) if (path := getattr(args, step))}
            mine = args.inputs[int(shard[1])::int(shard[2])]
            print_report(filter_files(mine, args.out, args.workers, args.keep_dropped, languages=args.languages,
                                      min_language=args.min_language, without=args.without, models=models))
        elif not args.check:
            walk_through()
            self_check()
            print("archives, text, languages, masks, rules and FastText as known  OK")
        if args.check:
            check_sample(args.out, args.check)
    except (ValueError, OSError, HTTPException) as fault:
        print(f"data_filter.py: {fault}", file=sys.stderr)
        return 2
    return 0

if __name__ == "__main__":
    sys.exit(main())
