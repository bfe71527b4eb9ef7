"""dedup.py against perl's Unicode, awk, datasketch and scipy, against its own plain versions, and against theory.

`DEDUP_DOCUMENTS=100000 python -m pytest -s tests/test_dedup.py -k planted` prints recall and precision at full size.
"""
import gzip
import json
import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import dedup

ANSWERS = json.loads((Path(__file__).parent / "fixtures" / "dedup_answers.json").read_text())
SURE = {"num_hashes": 400, "num_bands": 100, "ngram": 5, "jaccard_threshold": 0.8}     # 1 - (1 - 0.8^4)^100 = 1 - 1e-23


def write_files(folder: Path, contents: dict[str, bytes]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return [folder / name for name in contents]


def read_folder(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def json_lines(texts, first: int = 0) -> bytes:
    return "".join(json.dumps({"url": f"u{i}", "text": text, "language": "en", "scores": {"language": 0.99}}) + "\n"
                   for i, text in enumerate(texts, first)).encode()


def random_text(rng: random.Random, size: int) -> str:
    pools = ["abcdefgh", "  \n\t,.;-'\"", "éÉßςΣİñ", "漢字かなカナ", "\u200b\u00ad\u0301", "Жщ", "\U0001f600½", "한", "\ud800"]
    return "".join(rng.choice(rng.choices(pools, [20, 8, 3, 1, 1, 1, 1, 1, 0.2])[0]) for _ in range(size))


# ---- known answers from outside -------------------------------------------------------------------------------------

def test_words_as_perl_has_them():
    for text, expected in ANSWERS["words"]:
        assert dedup.words(text) == expected, text
        assert dedup.clean(text).decode().split() == expected, text


def test_exact_lines_as_awk_leaves_them(tmp_path):
    files = ANSWERS["exact"]["files"]
    inputs = write_files(tmp_path / "in", {f"doc{i}.txt": text.encode() for i, text in enumerate(files)})
    result = dedup.exact_line_dedup(inputs, tmp_path / "out")
    assert read_folder(tmp_path / "out") == {f"doc{i}.txt": text.encode() for i,
                                             text in enumerate(ANSWERS["exact"]["left"])}
    assert result["lines"] == sum(text.count("\n") for text in files)
    assert result["distinct_lines"] == len({line for text in files for line in text.splitlines()})
    assert result["kept_lines"] == sum(text.count("\n") for text in ANSWERS["exact"]["left"])


def test_signatures_as_datasketch_has_them():
    known = ANSWERS["minhash"]
    a, b = np.array(known["a"], np.uint32), np.array(known["b"], np.uint32)
    sizes = np.array([len(elements) for elements in known["sets"]])
    fast = dedup.minhash_batch(np.array(sum(known["sets"], []), np.uint32), sizes, a, b)
    assert fast.T.tolist() == known["signatures"]
    assert [dedup.minhash(set(elements), a, b) for elements in known["sets"]] == known["signatures"]


@pytest.mark.parametrize("form", ["txt", "jsonl", "jsonl.gz"])
def test_clusters_as_scipy_has_them(tmp_path, form):
    texts, cluster = ANSWERS["clusters"]["texts"], ANSWERS["clusters"]["cluster"]
    if form == "txt":
        contents = {f"part{i % 3}/{i}.txt": text.encode() for i, text in enumerate(texts)}
    else:
        pack = (lambda data: gzip.compress(data)) if form.endswith("gz") else (lambda data: data)
        contents = {f"{i}.{form}": pack(json_lines(texts[i:i + 15], i)) for i in range(0, 60, 15)}
    write_files(tmp_path / "in", contents)
    survivors = set()
    for seed in range(3):
        out = tmp_path / f"out{seed}"
        result = dedup.minhash_dedup([tmp_path / "in"], out, **SURE, seed=seed, report=tmp_path / "report.tsv")
        left = read_folder(out)
        if form == "txt":
            assert all(contents[name] == data for name, data in left.items()), "survivors are byte-identical"
            kept = [int(Path(name).stem) for name in left]
        else:
            assert left.keys() == contents.keys()
            unpack = gzip.decompress if form.endswith("gz") else bytes
            lines = [line for data in left.values() for line in unpack(data).splitlines(keepends=True)]
            assert set(lines) <= {line for data in contents.values() for line in unpack(data).splitlines(keepends=True)}
            kept = [int(json.loads(line)["url"][1:]) for line in lines]
        assert sorted(cluster[i] for i in kept) == list(range(max(cluster) + 1)), "one survivor of each cluster"
        assert result["documents"] == 60 and result["kept"] == len(kept) == max(cluster) + 1
        sizes = np.bincount(cluster)
        assert result["clusters"] == (sizes > 1).sum() and result["largest"] == sizes.max()
        rows = [row.split("\t") for row in (tmp_path / "report.tsv").read_text().splitlines()]
        place = (lambda name: int(Path(name).stem)) if form == "txt" else \
            (lambda name: int(name.split(".")[0]) + int(name.split("#")[1]) - 1)
        assert {place(removed) for _, removed in rows} == set(range(60)) - set(kept) and len(rows) == 60 - len(kept)
        assert all(cluster[place(keeper)] == cluster[place(removed)] and place(keeper) in kept for keeper,
                   removed in rows)
        survivors.add(tuple(sorted(kept)))
    assert len(survivors) > 1, "the seed chooses who survives"


def test_two_versions_of_one_page(tmp_path):
    """Of two pages that differ in a few words one is kept, whichever; four others are left alone."""
    page = "\n".join(ANSWERS["sentences"] * 2)
    other = page.replace("second Monday", "third Friday", 1).replace(",", ";") + "\n"
    contents = {"a.txt": page.encode(), "b.txt": other.upper().encode()}
    contents |= {f"{i}.txt": " ".join(random.Random(i).sample(page.split(), 150)).encode() for i in range(4)}
    dedup.minhash_dedup(write_files(tmp_path / "in", contents), tmp_path / "out", num_hashes=500, num_bands=50, ngram=5,
                        jaccard_threshold=0.8)
    left = read_folder(tmp_path / "out")
    assert left.keys() - {"a.txt", "b.txt"} == {f"{i}.txt" for i in range(4)} and len(left) == 5
    assert all(contents[name] == data for name, data in left.items())


def test_s_curve_as_fineweb_prints_it():
    """arXiv:2406.17557, 3.4: 14 bands of 8 find pairs of similarity 0.7, 0.75, 0.8, 0.85 in 56, 77, 92 and 98.8%."""
    for s, percent in (0.7, 56), (0.75, 77), (0.8, 92), (0.85, 98.8):
        assert abs(100 * dedup.lsh_probability(s, 14, 8) - percent) < 0.6


# ---- theory ---------------------------------------------------------------------------------------------------------

def planted_corpus(path: Path, documents: int, num_words: int = 120, seed: int = 0) -> dict[tuple[int, int], float]:
    """Random words; every third document is the one before it with some words replaced at random places. Returns
    {(number, number of its copy): Jaccard similarity of their word 5-grams, counted in Python sets of tuples}."""
    rng, planted = np.random.default_rng(seed), {}
    vocabulary = np.array(["".join(rng.choice(list("aeiounrstlmd"), size)) for size in rng.integers(2, 9, 30_000)])
    with open(path, "w") as f:
        for i in range(documents):
            fresh = vocabulary[rng.integers(0, len(vocabulary), num_words)]
            if i % 3 == 2:
                before, tokens = tokens, np.where(rng.permutation(num_words) < rng.integers(0, 16), fresh, tokens)
                one, two = ({tuple(t[k:k + 5]) for k in range(num_words - 4)}
                            for t in (before.tolist(), tokens.tolist()))
                planted[i - 1, i] = len(one & two) / len(one | two)
            else:
                tokens = fresh
            f.write(json.dumps({"url": i, "text": " ".join(tokens)}) + "\n")
    return planted


def test_recall_and_precision_of_planted_pairs(tmp_path):
    """Bands alone follow the S-curve in every tenth of similarity; recall and precision are theory's to 2 points."""
    documents = int(os.environ.get("DEDUP_DOCUMENTS", 4500))
    planted = planted_corpus(tmp_path / "c.jsonl", documents)
    s = np.array(list(planted.values()))
    for num_bands, rows in (20, 7), (14, 8):
        chance, wanted = dedup.lsh_probability(s, num_bands, rows), s >= 0.8
        for verify in True, False:
            result = dedup.minhash_dedup([tmp_path / "c.jsonl"], tmp_path / "out", num_hashes=num_bands * rows,
                                         num_bands=num_bands, ngram=5, jaccard_threshold=0.8, verify=verify)
            left = {json.loads(line)["url"] for line in open(tmp_path / "out" / "c.jsonl")}
            found = np.array([not (i in left and j in left) for i, j in planted])
            assert result["kept"] == len(left) and documents - len(left) == found.sum(), "nothing but planted pairs"
            recall, precision = found[wanted].mean(), wanted[found].mean()
            expected = 1.0 if verify else chance[wanted].sum() / chance.sum()
            print(f"\n{num_bands} x {rows} verify={verify}: {len(s):,} pairs, recall {recall:.4f} (theory "
                  f"{chance[wanted].mean():.4f}), precision {precision:.4f} (theory {expected:.4f})")
            # 4 standard errors of a share of n pairs stay within 2 points from n = 10,000 on; small runs get their own
            slack = lambda n: max(0.02, 4 * (0.25 / n) ** 0.5)
            assert abs(recall - chance[wanted].mean()) < slack(wanted.sum())
            assert abs(precision - expected) < slack(found.sum())
            if verify:
                assert not found[~wanted].any(), "a pair below the threshold was joined"
        for low in np.arange(0.3, 1, 0.1):
            at = (s >= low) & (s < low + 0.1)
            if at.sum() > 50:
                print(f"   {low:.1f}+: {at.sum():6d} pairs, found {found[at].mean():.3f}, theory "
                      f"{chance[at].mean():.3f}")
                error = (chance[at] * (1 - chance[at])).sum() ** 0.5 / at.sum()
                assert abs(found[at].mean() - chance[at].mean()) < 5 * error + 1e-9


# ---- fast = plain ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(12))
def test_batches_equal_one_text_at_a_time(seed):
    rng = random.Random(seed)
    ngram = rng.choice([1, 2, 3, 5, 13])
    texts = [random_text(rng, rng.choice([0, 1, 3, 20, 300])) for _ in range(30)]
    hashed, sizes = dedup.shingle_batch(texts, ngram)
    a, b = dedup.permutations(12, seed)
    fast, end = dedup.minhash_batch(hashed, sizes, a, b), 0
    for i, text in enumerate(texts):
        document = dedup.shingles(text, ngram)
        assert set(hashed[end:end + sizes[i]].tolist()) == document
        assert fast[:, i].tolist() == dedup.minhash(document, a, b)
        end += sizes[i]
    keys = dedup.band_keys(fast, 4)
    bands = [[tuple(fast[3 * k:3 * k + 3, i]) for k in range(4)] for i in range(len(texts))]
    assert len(set(keys.ravel().tolist())) == len({(k, band) for row in bands for k, band in enumerate(row)})
    alone = [dedup.shingle_batch([text], ngram)[0].tolist() for text in texts]
    assert sum(alone, []) == hashed.tolist(), "what stands beside a text in its batch changes nothing"


@pytest.mark.parametrize("seed", range(8))
def test_survivors_equal_plain(tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    monkeypatch.setattr(dedup, "BATCH", rng.choice([64, 1000, 1 << 19]))
    base = [random_text(rng, rng.choice([0, 2, 30, 300])) for _ in range(25)]
    texts = [rng.choice(base) + rng.choice(["", "!", " a", " more words"]) for _ in range(80)]
    options = dict(num_hashes=24, num_bands=rng.choice([4, 8, 12]), ngram=rng.choice([1, 3]), seed=seed,
                   jaccard_threshold=rng.choice([0.3, 0.7, 1.0]), verify=rng.random() < 0.8)
    (tmp_path / "c.jsonl").write_bytes(json_lines(texts))
    dedup.minhash_dedup(tmp_path / "c.jsonl", tmp_path / "out", **options)
    left = [int(json.loads(line)["url"][1:]) for line in open(tmp_path / "out" / "c.jsonl")]
    assert left == sorted(set(dedup.plain_minhash_dedup(texts, **options)))


@pytest.mark.parametrize("seed", range(10))
def test_lines_left_equal_plain(tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    monkeypatch.setattr(dedup, "BATCH", rng.choice([8, 100, 1 << 19]))
    pieces = [b"", b"a", b"a ", b"\r", b"x\r", b"\xff\xfe", b"eight888", b"eight8888",
              b"a longer line, of several words",
              b"a longer line, of several wordz", "ünïcode".encode(), bytes(9), bytes(8), b"\x00" * 7
              + b"a"] + [b"%d" % i for i in range(60)]
    files = [b"".join(rng.choice(pieces) + rng.choice([b"\n", b"\n", b"\r\n"])
                      for _ in range(rng.choice([0, 1, 5, 40])))
             + rng.choice([b"", rng.choice(pieces)]) for _ in range(6)]
    inputs = write_files(tmp_path / "in", {f"{i}.txt": data for i, data in enumerate(files)})
    dedup.exact_line_dedup(inputs, tmp_path / "out")
    assert list(read_folder(tmp_path / "out").values()) == dedup.plain_exact_line_dedup(files)


def test_many_processes_write_what_one_writes(tmp_path):
    """Above 4 MB the jobs go to processes; the bytes that come out are the same, in both modes, gzip too."""
    rng = np.random.default_rng(1)
    vocabulary = np.array(["word number %d" % i for i in range(999)])
    texts = [" ".join(vocabulary[rng.integers(0, 999, 300)]) + "\n" + "same line\n" * (i % 2) for i in range(1300)]
    texts[::7] = texts[1::7]
    contents = {"a.jsonl": json_lines(texts[:1100]), "b.jsonl.gz": gzip.compress(json_lines(texts[1100:], 1100)),
                "c.txt": b"w1 w2"}
    inputs = write_files(tmp_path / "in", contents)
    assert sum(map(len, contents.values())) > 4 << 20
    for name, function in ("m", dedup.minhash_dedup), ("x", dedup.exact_line_dedup):
        results = [function(inputs, tmp_path / f"{name}{n}", num_processes=n) for n in (1, 2)]
        assert results[0] == results[1]
        assert read_folder(tmp_path / f"{name}1") == read_folder(tmp_path / f"{name}2")
    left = gzip.decompress((tmp_path / "m1" / "b.jsonl.gz").read_bytes())
    assert 0 < left.count(b"\n") < 200 and left.count(b"\n") == left.count(b'{"url"')
    assert b"same line" not in (tmp_path / "x1" / "a.jsonl").read_bytes()


def test_the_hash_is_the_same_in_every_process():
    code = ("import dedup; print(dedup.hash_bytes(b'x' * 99), dedup.shingles('a b c', 2), "
            "[p.tolist() for p in dedup.permutations(2)])")
    seen = {subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed,
                                                              "PYTHONPATH": str(Path(dedup.__file__).parent)},
                           capture_output=True, text=True, check=True).stdout for seed in "12"}
    assert len(seen) == 1


# ---- edges ----------------------------------------------------------------------------------------------------------

def test_short_and_wordless_documents_are_compared_whole(tmp_path):
    texts = ["", "", "   ", "!!!", "???", "?!", "one", "One.", "two", "one two", "two one", "one two three",
             "one, two, three"]
    alike = [{0, 1, 2}, {6, 7}, {11, 12}]
    inputs = write_files(tmp_path / "in", {f"{i:02}.txt": text.encode() for i, text in enumerate(texts)})
    dedup.minhash_dedup(inputs, tmp_path / "out", num_hashes=20, num_bands=10, ngram=5, jaccard_threshold=0.8)
    kept = {int(name[:2]) for name in read_folder(tmp_path / "out")}
    assert all(len(kept & group) == 1 for group in alike)
    assert kept >= set(range(len(texts))) - set.union(*alike)


@pytest.mark.parametrize("verify", [True, False])
def test_a_page_that_everybody_copied(tmp_path, verify):
    """A bucket larger than BUCKET gives a line of pairs, not a square, and is still one cluster."""
    page = " ".join(ANSWERS["sentences"])
    texts = [page if i % 3 else f"{page} visitor {i}" for i in range(900)] + ["something else altogether"]
    (tmp_path / "c.jsonl").write_bytes(json_lines(texts))
    result = dedup.minhash_dedup(tmp_path / "c.jsonl", tmp_path / "out", verify=verify)
    assert result["kept"] == 2 and result["largest"] == 900
    assert result["candidate_pairs"] < 900 * 60, "900 documents have 404,550 pairs"


def test_a_chain_is_one_cluster(tmp_path):
    """A is like B and B like C, A is not like C: union-find joins all three."""
    words = [f"w{i}" for i in range(60)]
    texts = [" ".join(words[i:i + 40]) for i in (0, 4, 8)]                      # 36 of 44 words common, then 32 of 48
    (tmp_path / "c.jsonl").write_bytes(json_lines(texts))
    options = dict(num_hashes=200, num_bands=100, ngram=1, jaccard_threshold=0.8)
    assert dedup.minhash_dedup(tmp_path / "c.jsonl", tmp_path / "out", **options)["kept"] == 1
    (tmp_path / "c.jsonl").write_bytes(json_lines(texts[::2]))
    assert dedup.minhash_dedup(tmp_path / "c.jsonl", tmp_path / "out", **options)["kept"] == 2


def test_threshold_is_inclusive(tmp_path):
    """Four of five words common is 0.8 exactly, and 0.8 is enough."""
    (tmp_path / "c.jsonl").write_bytes(json_lines(["a b c d e", "a b c d"]))
    for threshold, kept in (0.8, 1), (0.81, 2):
        assert dedup.minhash_dedup(tmp_path / "c.jsonl", tmp_path / "out", num_hashes=100, num_bands=100, ngram=1,
                                   jaccard_threshold=threshold)["kept"] == kept


def test_empty_inputs(tmp_path):
    inputs = write_files(tmp_path / "in", {"a.jsonl": b"", "b.jsonl.gz": gzip.compress(b"")})
    assert dedup.minhash_dedup(inputs, tmp_path / "m")["documents"] == 0
    assert dedup.exact_line_dedup(inputs, tmp_path / "x")["lines"] == 0
    assert set(read_folder(tmp_path / "m")) == set(read_folder(tmp_path / "x")) == {"a.jsonl", "b.jsonl.gz"}


def test_lines_of_json_documents(tmp_path):
    texts = ["menu\nfirst story\nabout us", "menu\nabout us", "second story\r\nmenu", "all my own", "",
             "Grüße \ud800\nmenu"]
    (tmp_path / "c.jsonl").write_bytes(json_lines(texts))
    dedup.exact_line_dedup(tmp_path / "c.jsonl", tmp_path / "out")
    lines = (tmp_path / "out" / "c.jsonl").read_bytes().splitlines(keepends=True)
    left = {json.loads(line)["url"]: json.loads(line) for line in lines}
    assert {url: record["text"] for url, record in left.items()} == {
        "u0": "first story\n", "u2": "second story\r\n", "u3": "all my own", "u4": "", "u5": "Grüße \ud800\n"}
    assert left["u0"]["scores"] == {"language": 0.99}
    assert lines[2] == json_lines(texts).splitlines(keepends=True)[3], "an unchanged document is byte-identical"


def test_a_rerun_leaves_nothing_of_the_last(tmp_path):
    page = " ".join(ANSWERS["sentences"])
    inputs = write_files(tmp_path / "in", {"a.txt": page.encode(), "b.txt": page.encode(), "c.txt": b"other"})
    write_files(tmp_path / "out", {"a.txt": b"old", "b.txt": b"old", "mine.md": b"not ours"})
    dedup.minhash_dedup(inputs, tmp_path / "out", **SURE)
    left = read_folder(tmp_path / "out")
    assert len(left) == 3 and left.keys() > {"c.txt", "mine.md"} and b"old" not in left.values()


# ---- bad input ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, complaint", [
    ({"num_hashes": 100, "num_bands": 30}, "multiple"), ({"num_hashes": 0}, "multiple"), ({"num_bands": 0}, "multiple"),
    ({"ngram": 0}, "ngram"), ({"jaccard_threshold": 0.0}, "jaccard_threshold"),
    ({"jaccard_threshold": 1.1}, "jaccard_threshold")])
def test_bad_parameters(tmp_path, options, complaint):
    inputs = write_files(tmp_path / "in", {"a.txt": b"text"})
    with pytest.raises(ValueError, match=complaint):
        dedup.minhash_dedup(inputs, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


PACKED = gzip.compress(json_lines([str(random.Random(i).random()) for i in range(2000)]))
BAD_FILES = {"cut.jsonl.gz": (PACKED[:len(PACKED) // 2], "gzip"),
             "flipped.jsonl.gz": (PACKED[:5000] + b"\0\0\0\0" + PACKED[5004:], "gzip"),
             "not.jsonl.gz": (b"plain", "gzip"), "a.jsonl": (b'{"text": "x"}\n{"text": \n', "line 2"),
             "b.jsonl": (b'{"txt": "x"}\n', "text"),
             "c.jsonl": (b'{"text": 5}\n', "text"), "d.jsonl": (b"[1]\n", "line 1"),
             "e.jsonl": (b'{"text": "\xff"}\n', "line 1"),
             "deep.jsonl": (b'{"text": "x", "meta": ' + b"[" * 99_999 + b"]" * 99_999 + b"}\n", "line 1")}


@pytest.mark.parametrize("function", [dedup.exact_line_dedup, dedup.minhash_dedup])
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_leave_everything_as_it_was(tmp_path, function, name):
    data, complaint = BAD_FILES[name]
    inputs = write_files(tmp_path / "in", {"good.txt": b"good", name: data})
    write_files(tmp_path / "out", {"good.txt": b"from an earlier run"})
    with pytest.raises(ValueError, match=complaint) as caught:
        function(inputs, tmp_path / "out")
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert read_folder(tmp_path / "out") == {"good.txt": b"from an earlier run"}
    assert len(os.listdir(tmp_path / "out")) == 1


@pytest.mark.parametrize("function", [dedup.exact_line_dedup, dedup.minhash_dedup])
def test_bad_places(tmp_path, function):
    a, b = write_files(tmp_path / "a", {"x.txt": b"1"})[0], write_files(tmp_path / "b", {"x.txt": b"2"})[0]
    (tmp_path / "empty").mkdir()
    for inputs, out, complaint in [([a, b], "out", "same name"), ([tmp_path / "gone.txt"], "out", "does not exist"),
                                   ([], "out", "no input"),
                                   ([tmp_path / "empty"], "out", "no input"), ([a], "a", "overlap"),
                                   ([tmp_path / "a"], "a", "overlap"),
                                   ([tmp_path / "a"], "a/deeper", "overlap")]:
        with pytest.raises(ValueError, match=complaint):
            function(inputs, tmp_path / out)
    assert not (tmp_path / "out").exists() and a.read_bytes() == b"1"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("count", [1, 100, 9999])                # numpy's tofile keeps silent about up to 511 numbers
def test_a_full_disk_is_noticed(tmp_path, count):
    for i in range(256):
        (tmp_path / f"lines.{i}").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        dedup.Partitions(tmp_path / "lines", 1).add(np.arange(count, dtype=np.uint64)[:, None], limit=0)


@pytest.mark.parametrize("function", [dedup.exact_line_dedup, dedup.minhash_dedup])
def test_what_can_be_read_only_once_is_refused(tmp_path, function):
    """A pipe, as from <(zcat a b): it would be read for the hashes, and be empty when the lines are written."""
    reader, writer = os.pipe()
    os.write(writer, b"a\nb\n")
    os.close(writer)
    with pytest.raises(ValueError, match="is no file that can be read twice"):
        function(f"/dev/fd/{reader}", tmp_path / "out")
    os.close(reader)


def die(job):
    os.kill(os.getpid(), 9)


def test_a_killed_process_is_told(tmp_path):
    (tmp_path / "large").write_bytes(bytes(5 << 20))
    with pytest.raises(ChildProcessError, match="a process was killed, for lack of memory"):
        list(dedup.run_jobs(die, range(9), {"large": tmp_path / "large"}, 2))


WAIT = """
import sys, time
from pathlib import Path
import dedup
for _ in dedup.run_jobs(time.sleep, [0, 10**6, 10**6], {"large": Path(sys.argv[1])}, 2):
    print("working", flush=True)
"""


def test_workers_end_when_the_run_is_killed(tmp_path):
    (tmp_path / "large").write_bytes(bytes(5 << 20))
    process = subprocess.Popen([sys.executable, "-c", WAIT, tmp_path / "large"], stdout=subprocess.PIPE,
                               cwd=Path(dedup.__file__).parent)
    assert process.stdout.readline() == b"working\n"             # one is done, the other two sleep
    process.kill()
    process.communicate(timeout=120)                             # ends when no worker has the pipe open any more


def test_bench_without_its_peer(tmp_path):
    (tmp_path / "datasketch.py").write_text("raise ImportError")
    done = subprocess.run([sys.executable, dedup.__file__, "bench", "40", "30"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("RESULT ") == 3
    assert done.stdout.endswith("pip install datasketch shows its speed beside this\n")


def command_line(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, dedup.__file__, *map(str, arguments)], capture_output=True, text=True)


def test_command_line_says_what_is_wrong(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(b"{")
    for arguments in [tmp_path / "gone", "--out", tmp_path / "out"], [tmp_path / "c.jsonl"], \
            [tmp_path / "c.jsonl", "--out", tmp_path / "out"], [tmp_path / "c.jsonl", "--out", tmp_path / "out",
                                                                "--num-bands", "3"], \
            ["bench", "x"], ["bench", "0"], ["bench", "1", "2", "3"]:
        done = command_line(*arguments)
        assert done.returncode == 2 and done.stderr.startswith("dedup.py: "), done.stderr
        assert done.stderr.count("\n") == 1, done.stderr


# ---- memory ---------------------------------------------------------------------------------------------------------

def peak_bytes(function, *arguments, **options) -> int:
    tracemalloc.start()                                   # numpy reports its arrays to it
    function(*arguments, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_exact_lines_need_under_16_bytes_a_distinct_line(tmp_path):
    """From 80,000 to 400,000 distinct lines, each of them twice: the worst case, all of them must be remembered."""
    peaks = []
    for lines in 80_000, 400_000:
        text = "".join(f"line number {i}\n" for i in range(lines)).encode()
        inputs = write_files(tmp_path / str(lines), {"a.txt": text, "b.txt": text})
        peaks.append(peak_bytes(dedup.exact_line_dedup, inputs, tmp_path / f"out{lines}", num_processes=1))
    assert (peaks[1] - peaks[0]) / 320_000 < 16, peaks


def test_memory_does_not_grow_with_the_documents(tmp_path):
    peaks = []
    for documents in 12_000, 48_000:
        (tmp_path / f"{documents}.jsonl").write_bytes(json_lines([f"word{i} word{i % 7} and {i // 2} more of it"
                                                                  for i in range(documents)]))
        peaks.append(peak_bytes(dedup.minhash_dedup, tmp_path / f"{documents}.jsonl", tmp_path / "out",
                                num_processes=1))
    # 5 bytes a document, and 1/256 of 16 bytes for each of 20 bands, a few times: 0.4 MB. All keys would be 11 MB.
    assert peaks[1] - peaks[0] < 1e6, peaks


# ---- behind data_filter.py ------------------------------------------------------------------------------------------

def test_from_filtered_pages_to_one_text_file(tmp_path):
    """What data_filter.py leaves (a .jsonl.gz a crawl file, its report beside it) through both modes to one text."""
    rng = random.Random(3)
    stories = [" ".join(rng.choice(" ".join(ANSWERS["sentences"]).split()) for _ in range(120)) for _ in range(30)]
    stories[20] = stories[4].replace("the", "The", 3) + " updated today"         # near-duplicates, in other files
    stories[29] = stories[7].upper()
    texts = [f"Home | About | Contact\n\n{story}\n© {i} all rights" for i, story in enumerate(stories)]
    records = [{"url": f"http://example.org/{i}", "text": text, "language": "en",
                "scores": {"language": 0.98, "quality": 0.7},
                "masked": {}} for i, text in enumerate(texts)]
    contents = {}
    for k in range(3):
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records[10 * k:10 * k + 10])
        contents[f"CC-{k}.warc.wet.jsonl.gz"] = gzip.compress(lines.encode())
        contents[f"CC-{k}.warc.wet.report.json"] = json.dumps({"kept": 10}).encode()
    write_files(tmp_path / "filtered", contents)
    done = command_line(tmp_path / "filtered", "--out", tmp_path / "lines", "--exact")
    assert done.returncode == 0, done.stderr
    done = command_line(tmp_path / "lines", "--out", tmp_path / "clean", "--text", tmp_path / "train.txt")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.split("RESULT ")[1])
    assert (result["documents"], result["kept"], result["clusters"]) == (30, 28, 2)
    left = [json.loads(line) for path in sorted((tmp_path / "clean").iterdir()) for line in gzip.open(path)]
    urls = {int(record["url"].split("/")[-1]) for record in left}
    assert len(urls) == 28 and len(urls & {4, 20}) == 1 and len(urls & {7, 29}) == 1
    for record in left:
        i = int(record["url"].split("/")[-1])
        text = f"{stories[i]}\n© {i} all rights"
        assert record == records[i] | {"text": text}, "the menu and the blank line went, no more"
    assert (tmp_path / "train.txt").read_text() == "".join(record["text"] + "<|endoftext|>" for record in left)
    assert len((tmp_path / "clean.clusters.tsv").read_text().splitlines()) == 2
