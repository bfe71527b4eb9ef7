"""bpe.py against tiktoken, tokenizers and rustbpe (tests/fixtures/make_bpe.py), and fast against plain."""
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import regex

import bpe

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures"
END = "<|endoftext|>"
ANSWERS = json.loads((FIXTURES / "bpe_answers.json").read_text())
MERGES = [(bytes.fromhex(a), bytes.fromhex(b)) for a, b in ANSWERS["merges"]]
STRINGS = ANSWERS["strings"]


def tokenizer(special=tuple(ANSWERS["special"]), **options) -> bpe.Tokenizer:
    tokens = [bytes([i]) for i in range(256)] + [a + b for a, b in MERGES]
    return bpe.Tokenizer(dict(enumerate(tokens)), MERGES, list(special), **options)


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "text.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def fast(t: bpe.Tokenizer, text: str) -> list[int]:
    return t.fast.encode(text.encode()).tolist()


def random_cuts(text: str, rng: random.Random) -> list[str]:
    pieces = []
    while text:
        n = rng.randint(1, 12)
        pieces.append(text[:n])
        text = text[n:]
    return pieces


# ---- training ----

def test_merges_are_those_of_a_training_that_recounts_everything(tmp_path):
    path = write(tmp_path, ANSWERS["text"])
    vocab, merges = bpe.train_bpe(path, 256 + 1 + 300, [END], num_processes=1, log=None)
    assert merges == MERGES
    assert bpe.merge_words_plain(bpe.count_words_plain(str(path), [END]), 300) == MERGES
    assert [vocab[i] for i in range(257)] == [bytes([i]) for i in range(256)] + [END.encode()]
    assert [vocab[257 + rank] for rank in range(300)] == [a + b for a, b in MERGES] and len(vocab) == 557


def test_merges_are_those_of_rustbpe_and_tokenizers_under_their_tie_rules(tmp_path):
    path = write(tmp_path, ANSWERS["text"])
    _, merges = bpe.train_bpe(path, 557, [END], log=None, tie_key=lambda left, right, tokens: (left, right))
    assert [(a + b).hex() for a, b in merges] == ANSWERS["rustbpe"]
    printable = bpe.byte_to_unicode()
    order = sorted(range(256), key=printable.__getitem__) + list(range(256, 557))      # tokenizers sorts its alphabet
    rank = {token: i for i, token in enumerate(order)}
    _, merges = bpe.train_bpe(path, 557, [END], log=None, tie_key=lambda left, right, tokens: (rank[left], rank[right]))
    assert [["".join(printable[x] for x in token) for token in pair] for pair in merges] == ANSWERS["tokenizers"]


def test_processes_and_chunks_do_not_change_the_merges(tmp_path, monkeypatch):
    path = write(tmp_path, ANSWERS["text"].replace(END, "") * 3)                       # no special token to cut at
    one = bpe.train_bpe(path, 500, [END], 1, log=None)
    monkeypatch.setattr(bpe, "CHUNK", 1 << 10)                                          # dozens of chunks
    assert bpe.train_bpe(path, 500, [END], 1, log=None) == one
    assert bpe.train_bpe(path, 500, [END], 2, log=None) == one


@pytest.mark.parametrize("seed", range(6))
def test_fast_merges_are_plain_merges_where_ties_and_overlaps_abound(seed):
    rng = random.Random(seed)
    words = {bytes(rng.choices(b"ab", k=rng.randint(1, 12))): rng.randint(1, 3) for _ in range(40)}
    plain = bpe.merge_words_plain(words, 10_000)                                        # until no pair is left
    assert bpe.merge_words(words, 10_000) == plain
    assert len({a + b for a, b in plain}) == len(plain)


def test_special_tokens_are_never_merged_across_and_line_ends_are_kept(tmp_path):
    vocab, merges = bpe.train_bpe(write(tmp_path, f"ab{END}\r\nab{END}\r\nab{END}\r\n"), 300, [END], log=None)
    assert merges[:2] == [(b"a", b"b"), (b"\r", b"\n")]
    assert not any(b"<" in token or b"|" in token for i, token in vocab.items() if i >= 257)


def test_training_stops_early_and_says_so(tmp_path):
    lines = []
    vocab, merges = bpe.train_bpe(write(tmp_path, "aaaa aaaa b"), 1000, [], log=lines.append)
    assert merges == [(b"a", b"a"), (b"aa", b"aa"), (b" ", b"b"), (b" ", b"aaaa")] and len(vocab) == 260
    assert lines == ["stopped early: no pair is left after 4 merges of 744"]
    assert bpe.train_bpe(write(tmp_path, "abab"), 256, [], log=None)[1] == []


# ---- encoding ----

@pytest.mark.parametrize("how", ["plain", "fast", "encode", "stream"])
def test_ids_are_tiktokens(how):
    t, rng = tokenizer(), random.Random(0)
    t.fast_from = 0
    for text, ids in zip(STRINGS, ANSWERS["tiktoken"]):
        got = (t.encode_plain(text) if how == "plain" else fast(t, text) if how == "fast" else t.encode(text)
               if how == "encode" else list(t.encode_iterable(random_cuts(text, rng), rng.choice((1, 4, 20)))))
        assert got == ids, repr(text)
        assert t.decode(ids) == text


@pytest.mark.parametrize("name", ["llama3", "qwen2"])
def test_llama3_and_qwen2_files_encode_as_tokenizers_does(name, tmp_path):
    t, rng = bpe.Tokenizer.from_file(FIXTURES / f"bpe_{name}.json"), random.Random(1)
    assert (t.pattern, t.ignore_merges, t.normalize) == (name, name == "llama3", {"llama3": None, "qwen2": "NFC"}[name])
    t.save(tmp_path / "again.json")
    again = bpe.Tokenizer.from_file(tmp_path / "again.json")
    for text, ids in zip(STRINGS, ANSWERS[name]):
        assert t.encode(text) == again.encode(text) == ids, repr(text)
        assert list(t.encode_iterable(random_cuts(text, rng), rng.choice((1, 4, 20)))) == ids, repr(text)


def test_saved_file_says_what_the_file_of_tokenizers_says(tmp_path):
    for name in ("llama3", "qwen2"):
        theirs, read = FIXTURES / f"bpe_{name}.json", bpe.Tokenizer.from_file(FIXTURES / f"bpe_{name}.json")
        read.save(tmp_path / "ours.json")
        assert json.loads((tmp_path / "ours.json").read_text()) == json.loads(theirs.read_text())
        again = bpe.Tokenizer(read.vocab, read.merges, list(read.special_tokens), pattern=read.pattern,
                              ignore_merges=read.ignore_merges, normalize=read.normalize)
        again.save(tmp_path / "ours.json")                      # this time without the file before its eyes
        ours, theirs = json.loads((tmp_path / "ours.json").read_text()), json.loads(theirs.read_text())
        assert ours["added_tokens"] == [{**token, "special": True} for token in theirs["added_tokens"]]
        assert ours["normalizer"] == theirs["normalizer"]
        assert ours["pre_tokenizer"]["pretokenizers"][0] == theirs["pre_tokenizer"]["pretokenizers"][0]
        assert [merge.split(" ") for merge in ours["model"]["merges"]] == theirs["model"]["merges"]
        assert theirs["model"]["vocab"].items() <= ours["model"]["vocab"].items()
        assert ours["model"]["ignore_merges"] == theirs["model"]["ignore_merges"]


def test_gpt2_files(tmp_path):
    t = bpe.Tokenizer.from_files(FIXTURES / "bpe_vocab.json", FIXTURES / "bpe_merges.txt", [END])
    plain = tokenizer([END])
    assert t.vocab == plain.vocab and t.special_tokens == {END: 556}
    t.save(tmp_path / "t.json")
    for text in STRINGS:
        assert t.encode(text) == plain.encode(text) == bpe.Tokenizer.from_file(tmp_path / "t.json").encode(text)


def test_the_longest_special_token_wins_and_later_ones_are_appended():
    t = tokenizer()
    one, two, start = (t.special_tokens[s] for s in ANSWERS["special"])
    assert (one, two, start) == (556, 557, 558) and t.vocab[557] == (END + END).encode()
    assert t.encode(END * 3) == fast(t, END * 3) == [two, one]
    assert list(t.encode_iterable(END * 3, 1)) == [two, one]                            # one character at a time
    assert tokenizer([]).encode(END) == tokenizer([]).encode("<|") + tokenizer([]).encode("endoftext|>")


@pytest.mark.parametrize("special", [["aXa", "the", "|>the", "ll", "'s x", "é—", " ", "s"], ["r", "v"], ["e", "l"]])
def test_overlapping_and_odd_special_tokens(special):
    rng, t = random.Random(3), tokenizer(special)
    pieces = [*special, *special, "a", "X", "'", "l", " the", "\n", "x", "|", "é", "'re", "'ve", "'ll"]
    for _ in range(300):
        text = "".join(rng.choices(pieces, k=12))
        ends = [*bpe.pretoken_starts(text.encode(), t.fast.special).tolist(), None]
        words = [[piece] if i % 2 else regex.findall(bpe.PATTERNS["gpt2"], piece)
                 for i, piece in enumerate(t._special.split(text))]
        assert [text.encode()[i:j].decode() for i, j in zip(ends, ends[1:])] == sum(words, []), repr(text)
        ids = t.encode_plain(text)
        streamed = list(t.encode_iterable(random_cuts(text, rng), rng.choice((1, 5, 9))))
        assert ids == fast(t, text) == streamed, repr(text)


@pytest.mark.parametrize("pattern", list(bpe.PATTERNS))
def test_text_can_be_cut_where_safe_cut_says(pattern):
    rng, split, cuts = random.Random(4), regex.compile(bpe.PATTERNS[pattern]), 0
    pieces = [*"ab1'  \n\n\r\t!é字²\u00a0\u3000\u0301", "'s", "'ll", "\r\n", "12"]
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=10))
        cut = bpe.safe_cut(text.encode(), [])
        left, right = (half.decode() for half in (text.encode()[:cut], text.encode()[cut:]))
        assert split.findall(left) + split.findall(right) == split.findall(text), (left, right)
        cuts += cut > 0
    assert cuts > 2000


@pytest.mark.parametrize("seed", range(3))
def test_fast_is_plain_on_random_unicode(seed):
    rng, t = random.Random(seed), tokenizer()
    classes = ["\u00a0\u1680\u2003\u2028\u2029\u202f\u205f\u3000\x85\x0b\x0c\x1c\x1d\x1e\x1f \n\t\r", "aZéßжक字𝐀ſ",
               "0²½١𝟗Ⅷ", ".,'\"!—€😀\u0301\u200d\ufeff\0", "'", "'", " "]
    for _ in range(150):
        text = "".join(rng.choice(rng.choice(classes)) if rng.random() < 0.9 else chr(rng.choice((rng.randrange(0xD800),
                       rng.randrange(0xE000, 0x110000)))) for _ in range(60))
        assert fast(t, text) == t.encode_plain(text), repr(text)
        raw, no_special = text.encode(), re.compile(b"(?!)")
        ends = [*bpe.pretoken_starts(raw, no_special).tolist(), len(raw)]
        pieces = [raw[i:j].decode() for i, j in zip(ends, ends[1:])]
        assert pieces == regex.findall(bpe.PATTERNS["gpt2"], text), repr(text)


def test_words_are_told_apart_by_their_bytes():
    """Words are found again exactly where they stand: of all lengths, alike at either end, one in another."""
    rng, table = random.Random(6), bpe.Words()
    for _ in range(20):
        sizes = rng.choices((1, 7, 8, 9, 15, 16, 17, 24, 25, 33, 64, 65), k=300)
        words = [bytes(rng.choices(b"ab", k=size)) for size in sizes]
        words += [b"a" * n for n in range(1, 80)] + [b"\0" * n for n in range(1, 20)]
        words += [words[0] + b"x", words[0][8:] or b"y"]
        starts = np.cumsum([0, *map(len, words)])[:-1]
        assert [table.words[i] for i in table.look_up(b"".join(words), starts).tolist()] == words
    assert len(set(table.words)) == len(table.words)
    assert sorted(table.numbers.tolist()) == list(range(len(table.keys)))               # one for each key, and it stays


def test_numbers_of_pairs_do_not_run_into_each_other_nor_into_text():
    table = bpe.Words()
    table.keys = np.append(np.arange(1 << 60, (1 << 60) + (1 << 21), dtype=np.uint64), bpe.ONES)
    table.numbers = np.arange(len(table.keys))                                          # numbers of over 20 bits
    words = [b"row%05d" % i + b"row%05d" % j for i in range(40) for j in range(40)]
    starts = 16 * np.arange(len(words))
    places = table.look_up(b"".join(words), starts)
    assert [table.words[i] for i in places.tolist()] == words and len(set(places.tolist())) == len(words)
    eight = np.array([int.from_bytes(words[1][i:i + 8], "little") for i in (0, 8)], np.uint64)
    left, right = table.numbers[np.searchsorted(table.keys, eight)].tolist()
    text = (left << 28 | right).to_bytes(8, "little")           # the eight bytes that would be the key of that pair
    assert table.words[table.look_up(text, np.array([0]))[0]] == text


def test_keys_that_want_one_slot_are_found_too(monkeypatch):
    for factor in (bpe.ODD, np.uint64(1)):                                              # with 1, small keys want slot 0
        monkeypatch.setattr(bpe, "ODD", factor)
        keys = np.arange(1, 300, dtype=np.uint64)
        index = bpe.Index(np.append(keys[::2], keys[10:1:-2]))                          # in any order, some twice
        found = index.find(np.append(keys, bpe.ONES - np.uint64(1)))
        assert (found[:-1:2] == np.arange(150)).all() and (index.keys[:-1] == keys[::2]).all()
        assert (found[1::2] == index.missing).all() and found[-1] == index.missing == 150


def test_tables_that_run_full_start_anew(monkeypatch):
    monkeypatch.setattr(bpe.FastEncoder, "max_words", 50)
    monkeypatch.setattr(bpe.Tokenizer, "cache_size", 20)
    t, plain = tokenizer(), tokenizer()
    for text in STRINGS:
        assert t.encode_bytes(text.encode()).tolist() == t.encode_plain(text) == plain.encode_plain(text)
        assert len(t._cache) <= 20
        assert len(t.fast.words.words) < 100


def test_streaming_reads_no_further_than_it_must():
    taken, t = 0, tokenizer()

    def source():
        nonlocal taken
        while True:                                                                     # endless
            taken += 1
            yield "It's the same line again.\n"
    ids = t.encode_iterable(source())
    for _ in range(50_000):
        next(ids)
    assert taken * 26 < 50_000 * 6 + (1 << 17)        # a token has under 6 bytes here; two buffers of 64 kB at most


def test_very_long_words():
    word = "".join(random.Random(5).choices("therin", k=3000))
    t = tokenizer()
    ids = [t.byte_id[byte] for byte in word.encode()]
    while known := [pair for pair in zip(ids, ids[1:]) if pair in t.ranks]:             # as slow as it is plain
        first = min(known, key=t.ranks.__getitem__)
        at = next(i for i, pair in enumerate(zip(ids, ids[1:])) if pair == first)
        ids[at:at + 2] = [t.ranks[first][1]]
    assert t.merge_word(word.encode()) == fast(t, word) == t.encode_plain(word) == ids
    million = "".join(random.Random(6).choices("therin", k=1 << 20))                    # days, if it were quadratic
    assert t.decode(t.encode(million)) == million


def test_broken_utf8_decodes_to_replacement_characters():
    t = tokenizer()
    assert [t.decode(ids) for ids in ANSWERS["broken"]] == ANSWERS["broken_text"]
    assert t.encode("") == [] and t.decode([]) == "" and fast(t, "") == []


# ---- files ----

@pytest.mark.parametrize("vocab_size, dtype", [(65_535, np.uint16), (65_536, np.uint16), (65_537, np.uint32)])
def test_encode_file_at_the_border_of_16_bits(vocab_size, dtype, tmp_path):
    tokens = [bytes([i]) for i in range(256)] + [a + b for a, b in MERGES]
    tokens += [b"\xff%d" % i for i in range(vocab_size - 1 - len(tokens))]              # filler that no text contains
    t = bpe.Tokenizer(dict(enumerate(tokens)), MERGES, [END])
    path = write(tmp_path, ANSWERS["text"])
    assert bpe.encode_file(t, path, tmp_path / "ids.npy", 1) == len(t.encode_plain(ANSWERS["text"]))
    ids = np.load(tmp_path / "ids.npy", mmap_mode="r")
    assert ids.dtype == dtype and ids.max() == vocab_size - 1 and ids.tolist() == t.encode_plain(ANSWERS["text"])
    np.save(tmp_path / "again.npy", ids)
    assert (tmp_path / "again.npy").read_bytes() == (tmp_path / "ids.npy").read_bytes()


def test_encode_file_in_parallel_and_in_chunks(tmp_path, monkeypatch):
    text, t = ANSWERS["text"] + "".join(STRINGS) * 3, tokenizer()
    path = write(tmp_path, text)
    monkeypatch.setattr(bpe, "CHUNK", 1 << 12)
    for processes in (1, 2):
        bpe.encode_file(t, path, tmp_path / "ids.npy", processes)
        assert np.load(tmp_path / "ids.npy").tolist() == t.encode_plain(text)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ids.npy", "text.txt"]


def test_a_file_that_turns_out_not_to_be_utf8_leaves_the_old_result(tmp_path, monkeypatch):
    monkeypatch.setattr(bpe, "CHUNK", 1 << 12)
    path = write(tmp_path, ANSWERS["text"].encode() + b"\xe9t\xe9" + ANSWERS["text"].encode())
    (tmp_path / "ids.npy").write_bytes(b"old")
    offset = len(ANSWERS["text"].encode())
    for processes in (1, 2):
        with pytest.raises(ValueError, match=rf"not UTF-8: byte 0xe9 at offset {offset}"):
            bpe.encode_file(tokenizer(), path, tmp_path / "ids.npy", processes)
    with pytest.raises(ValueError, match=f"offset {offset}"):
        bpe.train_bpe(path, 300, [END], log=None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ids.npy", "text.txt"]
    assert (tmp_path / "ids.npy").read_bytes() == b"old"


# ---- bad input ----

@pytest.mark.parametrize("call, message", [
    (lambda f: bpe.train_bpe(f, 256, [END]), "vocab_size 256 is too small"),
    (lambda f: bpe.train_bpe(f, 300, [""]), "non-empty"),
    (lambda f: bpe.train_bpe(f, 300, ["a", "a"]), "different"),
    (lambda f: bpe.train_bpe(f, 300, END), "must be a list"),
    (lambda f: bpe.train_bpe(f, 300, ["<e>", "<e><e>"]), "'<e>' is part of '<e><e>'"),
    (lambda f: tokenizer().encode("a\ud800b"), "surrogates"),
    (lambda f: tokenizer().encode("a\ud800b" * 5000), "surrogates"),
    (lambda f: tokenizer().decode([999_999]), "not in the vocabulary of 559 tokens: missing 999999"),
    (lambda f: tokenizer().decode([-1]), "not in the vocabulary"),
    (lambda f: bpe.Tokenizer({0: b"a"}, []), "needs all 256 bytes"),
    (lambda f: bpe.Tokenizer(dict(enumerate(bytes([i]) for i in range(256))), [(b"a", b"b")]), "missing b'ab'"),
    (lambda f: tokenizer(pattern="gpt5"), "gpt2, llama3, qwen2"),
    (lambda f: bpe.Tokenizer.from_file(f), "is no tokenizer.json"),
    (lambda f: bpe.Tokenizer.from_files(f, f), "are no vocab.json and merges.txt")])
def test_mistakes_get_one_clear_line(call, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        call(write(tmp_path, "some text"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [
    lambda d: d.pop("model"), lambda d: d["model"].pop("vocab"), lambda d: d["model"].update(merges=[["a"]]),
    lambda d: d["model"].update(merges=[["zzz", "q"]]), lambda d: d["model"]["vocab"].update({"€": 9999}),
    lambda d: d["model"].update(byte_fallback=True), lambda d: d["added_tokens"][0].update(lstrip=True),
    lambda d: d["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+"),
    lambda d: d.update(pre_tokenizer=None), lambda d: d.update(normalizer={"type": "Lowercase"}),
    lambda d: d.update(model=[1]), lambda d: d["model"].update(vocab={"a": 0})])
def test_foreign_tokenizer_files_are_refused(change, tmp_path):
    document = json.loads((FIXTURES / "bpe_qwen2.json").read_text())
    change(document)
    (tmp_path / "t.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="is no tokenizer.json of a byte-level BPE that can be read") as caught:
        bpe.Tokenizer.from_file(tmp_path / "t.json")
    assert "\n" not in str(caught.value)


def command(folder: Path, *words: str) -> subprocess.CompletedProcess:
    program = [sys.executable, str(HERE.parent / "bpe.py"), *words]
    return subprocess.run(program, cwd=folder, capture_output=True, timeout=600)


def test_command_line_there_and_back(tmp_path):
    text = ANSWERS["text"] + "\r\nlast"
    write(tmp_path, text)
    assert command(tmp_path, "train", "--input", "text.txt", "--vocab-size", "400", "--out", "t.json").returncode == 0
    encoded = command(tmp_path, "encode", "--tokenizer", "t.json", "--input", "text.txt", "--out", "ids.npy")
    assert encoded.returncode == 0 and b"tokens from" in encoded.stdout
    decoded = command(tmp_path, "decode", "--tokenizer", "t.json", "--input", "ids.npy")
    assert decoded.stdout == text.encode()
    command(tmp_path, "decode", "--tokenizer", "t.json", "--input", "ids.npy", "--out", "back.txt")
    assert (tmp_path / "back.txt").read_bytes() == text.encode()


@pytest.mark.parametrize("words, content", [
    ("train --input text.txt --out x", None), ("train --input text.txt --out x", b""),
    ("train --input text.txt --out x", bytes(range(256))), ("train --input text.txt --vocab-size 200 --out x", b"abc"),
    ("train --input text.txt --special a --special a --out x", b"abc"), ("train --out x", b"abc"),
    ("encode --tokenizer text.txt --input text.txt --out x", b"abc"), ("encode --input text.txt --out x", b"abc"),
    ("encode --tokenizer t.json --input . --out x", None), ("decode --tokenizer t.json --input text.txt", b""),
    ("decode --tokenizer t.json --input ids.npz", None), ("bench --input nowhere", None),
    ("decode --tokenizer t.json --input text.txt --out x", b"abc")])
def test_command_line_mistakes_exit_with_2_and_write_nothing(words, content, tmp_path):
    tokenizer().save(tmp_path / "t.json")
    np.savez(tmp_path / "ids.npz", ids=np.arange(3))
    if content is not None:
        write(tmp_path, content)
    before = sorted(p.name for p in tmp_path.iterdir())
    done = command(tmp_path, *words.split())
    assert done.returncode == 2 and done.stdout == b""
    assert done.stderr.startswith(b"bpe.py: ") and done.stderr.count(b"\n") == 1, done.stderr.decode()
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_files_that_are_not_there_come_with_the_remedy(tmp_path):
    write(tmp_path, "abc")
    done = command(tmp_path, "encode", "--input", "text.txt", "--out", "x.npy")
    assert done.stderr == (b"bpe.py: --tokenizer out/bpe/tokenizer.json is no file; "
                           b"bpe.py train --input TEXT --out IT makes it\n")
    done = command(tmp_path, "train", "--input", "nowhere", "--out", "x.json")
    assert done.stderr == b"bpe.py: --input nowhere is no file; give a text (to decode, a .npy of token ids)\n"


def die(ranges):
    os.kill(os.getpid(), 9)


def test_a_killed_process_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(bpe, "CHUNK", 1 << 12)
    path = write(tmp_path, ANSWERS["text"])
    with pytest.raises(ChildProcessError, match="a process was killed, for lack of memory"):
        list(bpe.over_file(die, path, None, [], 2))


def test_walk_through_and_self_check(tmp_path):
    done = command(tmp_path)
    assert done.returncode == 0 and done.stdout.endswith(b"OK\n") and list(tmp_path.iterdir()) == []
