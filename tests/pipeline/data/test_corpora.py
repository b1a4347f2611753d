import bz2
import gzip
import itertools
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.corpora import check_corpus, read_documents
from pipeline.data.presets import CORPUS_PRESETS
from pipeline.errors import InputError
from pipeline.hub import hub_answers
from pipeline.specs import Corpus, FileCorpus, HubCorpus, TestbedCorpus

TEXTS = [f"text {number} " + "déjà vu " * number for number in range(40)]


def json_lines(texts: list[str], field: str = "text") -> str:
    return "".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts)


def texts_of(corpus: Corpus, seed: int | None = None) -> list[str]:
    return [document.text for document in read_documents(corpus, seed)]


def write_every_format(folder: Path) -> dict[str, Path]:
    content = json_lines(TEXTS).encode()
    files = {
        name: folder / f"corpus{name}"
        for name in (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.bz2", ".txt")
    }
    files[".jsonl"].write_bytes(content)
    files[".json"].write_bytes(content)
    files[".jsonl.gz"].write_bytes(gzip.compress(content))
    files[".json.gz"].write_bytes(gzip.compress(content[:999]) + gzip.compress(content[999:]))
    files[".jsonl.bz2"].write_bytes(bz2.compress(content))
    files[".txt"].write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    files[".jsonl.zst"] = folder / "corpus.jsonl.zst"
    with pa.CompressedOutputStream(str(files[".jsonl.zst"]), "zstd") as stream:
        stream.write(content)
    files[".parquet"] = folder / "corpus.parquet"
    pq.write_table(pa.table({"text": TEXTS}), files[".parquet"], row_group_size=7)
    return files


def test_every_format_gives_the_same_texts(tmp_path: Path) -> None:
    for name, path in write_every_format(tmp_path).items():
        assert texts_of(FileCorpus(path=str(path))) == TEXTS, name


def test_a_line_separator_inside_a_json_text_does_not_end_the_line(tmp_path: Path) -> None:
    odd = ["one\u2028two", "three\x85four\x0bfive\r\nsix"]
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in odd)
    (tmp_path / "odd.jsonl").write_text(content, encoding="utf-8")
    assert texts_of(FileCorpus(path=str(tmp_path / "odd.jsonl"))) == odd


def test_a_glob_reads_files_in_the_order_of_their_paths_and_ids_name_file_and_row(
    tmp_path: Path,
) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.jsonl").write_text(json_lines(["x", "y"]))
    (tmp_path / "a.txt").write_text("z\n")
    assert list(read_documents(FileCorpus(path=f"{tmp_path}/**"))) == [
        ("a.txt:0", "z"),
        ("b/one.jsonl:0", "x"),
        ("b/one.jsonl:1", "y"),
    ]


def test_blank_texts_are_left_out_and_rows_keep_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("a\n\n   \nb\n")
    found = list(read_documents(FileCorpus(path=str(tmp_path / "c.txt"))))
    assert found == [("c.txt:0", "a"), ("c.txt:3", "b")]


def test_a_null_text_counts_as_blank(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None, "b"]}), tmp_path / "c.parquet")
    (tmp_path / "c.jsonl").write_text('{"text": null}\n{"text": "c"}\n')
    assert texts_of(FileCorpus(path=f"{tmp_path}/*")) == ["c", "a", "b"]


def test_a_seed_orders_all_rows_of_all_files_once_each(tmp_path: Path) -> None:
    for number in range(4):
        part = TEXTS[number * 10 : number * 10 + 10]
        (tmp_path / f"{number}.jsonl").write_text(json_lines(part))
    corpus = FileCorpus(path=f"{tmp_path}/*.jsonl")
    first = texts_of(corpus, seed=3)
    assert sorted(first) == sorted(TEXTS)
    assert first != TEXTS
    assert first == texts_of(corpus, seed=3)
    assert first != texts_of(corpus, seed=4)
    first_files = {document.id[0] for document in itertools.islice(read_documents(corpus, 3), 12)}
    assert len(first_files) > 1


@pytest.mark.parametrize("streaming", [True, False])
def test_the_json_builder_gives_the_same_texts_as_the_file(tmp_path: Path, streaming: bool) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(json_lines(TEXTS))
    hub = HubCorpus(path="json", data_files=(str(path),), streaming=streaming)
    assert texts_of(hub) == texts_of(FileCorpus(path=str(path)))
    shuffled = texts_of(hub, seed=1)
    assert sorted(shuffled) == sorted(TEXTS)
    assert shuffled != TEXTS
    assert shuffled == texts_of(hub, seed=1)
    assert shuffled != texts_of(hub, seed=2)


def test_ids_of_a_downloaded_corpus_are_row_numbers_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(json_lines(TEXTS))
    hub = HubCorpus(path="json", data_files=str(path), streaming=False)
    assert all(TEXTS[int(document.id)] == document.text for document in read_documents(hub, seed=5))


def test_testbed_text_is_endless_and_drawn_by_the_seed() -> None:
    corpus = TestbedCorpus(mixture={"facts": 1.0})

    def first(seed: int | None) -> list[str]:
        return [document.text for document in itertools.islice(read_documents(corpus, seed), 200)]

    assert len(set(first(1))) > 190
    assert first(1) == first(1)
    assert first(1) != first(2)
    assert first(None) == first(0)


def broken(folder: Path, name: str, content: str) -> FileCorpus:
    (folder / name).write_text(content)
    return FileCorpus(path=str(folder / name))


def test_the_error_for_a_broken_file_gives_the_reason(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.parquet"
    pq.write_table(pa.table({"text": [1], "body": ["a"]}), numbers)
    cases: list[tuple[FileCorpus, list[str]]] = [
        (FileCorpus(path=f"{tmp_path}/no*.jsonl"), ["no*.jsonl", "no file"]),
        (FileCorpus(path="nosuch://bucket/a.txt"), ["nosuch://bucket/a.txt", "file system"]),
        (broken(tmp_path, "a.csv", "text\nx\n"), ["a.csv", "unknown ending", ".parquet"]),
        (broken(tmp_path, "b.jsonl", '{"text": "x"}\n{"text": \n'), ["b.jsonl, line 2", "JSON"]),
        (broken(tmp_path, "c.json", '[{"text": "x"}]\n'), ["c.json, line 1", "object a line"]),
        (broken(tmp_path, "d.jsonl", '{"body": "x", "a": 1}\n'), ["text_field", "['a', 'body']"]),
        (broken(tmp_path, "e.jsonl", '{"text": ["x"]}\n'), ["text_field", "line 1", "['x']"]),
        (broken(tmp_path, "f.parquet", "no parquet"), ["f.parquet", "no Parquet file"]),
        (FileCorpus(path=str(numbers)), ["text_field", "int64"]),
        (FileCorpus(path=str(numbers), text_field="no"), ["'no'", "['body', 'text']"]),
        (broken(tmp_path, "g.txt", "\n  \n"), ["g.txt", "no text"]),
        (
            broken(tmp_path, "h.jsonl", '{"text": "x"}\n{"text": "cut \\ud83d"}\n'),
            ["line 2", "half"],
        ),
        (broken(tmp_path, "i.jsonl", '{"text": "a", "text": "b"}\n'), ["line 1", "2 times"]),
        (broken(tmp_path, "j.jsonl", '{"text": NaN}\n'), ["line 1", "nan", "not text"]),
        (broken(tmp_path, "k.jsonl", '{"text": {"a": 1}}\n'), ["line 1", "an object"]),
        (broken(tmp_path, "l.jsonl", "[" * 100_000), ["l.jsonl, line 1", "JSON"]),
        (broken(tmp_path, "m", "text\n"), ["m", "unknown ending"]),
        (broken(tmp_path, "n.jsonl.gz", '{"text": "x"}\n'), ["n.jsonl.gz", "no whole gzip file"]),
    ]
    for corpus, expected in cases:
        for refuse in (lambda given: list(read_documents(given)), check_corpus):
            with pytest.raises(InputError) as error:
                refuse(corpus)
            for words in expected:
                assert words in str(error.value)


@pytest.mark.parametrize("ending", [".jsonl.gz", ".txt.gz", ".jsonl.bz2", ".jsonl.zst", ".parquet"])
def test_a_truncated_file_is_named(tmp_path: Path, ending: str) -> None:
    files = write_every_format(tmp_path)
    files[".txt.gz"] = tmp_path / "corpus.txt.gz"
    files[".txt.gz"].write_bytes(gzip.compress(files[".txt"].read_bytes()))
    content = files[ending].read_bytes()
    for share in (0.1, 0.5, 0.9):
        files[ending].write_bytes(content[: int(len(content) * share)])
        with pytest.raises(InputError, match=rf"corpus{ending}.*(no whole|no Parquet|damaged)"):
            list(read_documents(FileCorpus(path=str(files[ending]))))


def test_damaged_pages_and_text_that_is_not_utf8_in_a_parquet_file_are_named(
    tmp_path: Path,
) -> None:
    path = tmp_path / "c.parquet"
    texts = pa.array([b"good", b"caf\xe9"]).cast(pa.binary())
    damaged = pa.Array.from_buffers(pa.string(), 2, texts.buffers())
    pq.write_table(pa.table({"text": damaged}), path, use_dictionary=False)
    with pytest.raises(InputError, match=r"c\.parquet, row 1.*not UTF-8"):
        list(read_documents(FileCorpus(path=str(path))))
    pq.write_table(pa.table({"text": TEXTS}), path, compression="gzip", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[200:220] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"c\.parquet.*damaged"):
        list(read_documents(FileCorpus(path=str(path))))


def test_byte_order_marks_and_line_ends_of_any_system_are_read(tmp_path: Path) -> None:
    windows = "\ufeff" + json_lines(TEXTS).replace("\n", "\r\n")
    (tmp_path / "a.JSONL").write_bytes(windows.encode())
    assert texts_of(FileCorpus(path=str(tmp_path / "a.JSONL"))) == TEXTS
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\x0cthree\xe2\x80\xa8four\r\n")
    assert texts_of(FileCorpus(path=str(tmp_path / "b.txt"))) == ["one", "two\x0cthree\u2028four"]
    builder = HubCorpus(path="text", data_files=str(tmp_path / "b.txt"))
    assert texts_of(builder) == ["one", "two\x0cthree\u2028four"]
    category = pa.table({"text": pa.array(TEXTS).dictionary_encode()})  # as pandas writes one
    pq.write_table(category, tmp_path / "c.parquet")
    assert texts_of(FileCorpus(path=str(tmp_path / "c.parquet"))) == TEXTS


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("é\n".encode("latin-1"))
    with pytest.raises(InputError, match="UTF-8"):
        list(read_documents(FileCorpus(path=str(tmp_path / "a.txt"))))


def test_a_builder_without_the_text_field_or_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(json_lines(["a"], field="body"))
    files = str(tmp_path / "c.jsonl")
    with pytest.raises(InputError, match="body"):
        list(read_documents(HubCorpus(path="json", data_files=files)))
    with pytest.raises(InputError, match="split"):
        list(
            read_documents(
                HubCorpus(path="json", data_files=files, split="test", text_field="body")
            )
        )
    with pytest.raises(InputError, match=r"none\.jsonl"):
        check_corpus(HubCorpus(path="json", data_files=f"{tmp_path}/none.jsonl"))


def test_a_data_set_that_cannot_be_loaded_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("script", "empty", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "script" / "script.py").write_text("")
    card = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in "ab")
    (tmp_path / "two" / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    for name in ("a", "b"):
        (tmp_path / "two" / f"{name}.jsonl").write_text(json_lines(TEXTS))
    (tmp_path / "good.jsonl").write_text(json_lines(TEXTS))
    (tmp_path / "cut.jsonl").write_text(json_lines(TEXTS) + '{"text": "cut \\ud83d"}\n')
    (tmp_path / "numbers.jsonl").write_text('{"text": 1}\n')
    (tmp_path / "packed.jsonl.gz").write_text(json_lines(TEXTS))
    cases: list[tuple[dict[str, str], str]] = [
        ({"path": "script"}, "Python script.*set revision: refs/convert/parquet"),
        ({"path": "script/script.py"}, "Python script"),
        ({"path": "empty"}, "cannot be loaded: .*any data files"),
        ({"path": "good.jsonl"}, "is a file: set kind: file-corpus"),
        ({"path": "jsn", "data_files": "good.jsonl"}, "no builder of datasets"),
        ({"path": "two"}, r"Config name is missing.*\['a', 'b'\]"),
        ({"path": "two", "name": "c"}, r"'c' not found.*\['a', 'b'\]"),
        ({"path": "two", "name": "a", "split": "test"}, r"split: 'test': two has only \['train'\]"),
        ({"path": "two", "name": "a", "split": "train[:5]"}, "set streaming: false"),
        ({"path": "two", "name": "a", "text_field": "body"}, "text_field: 'body': .*text"),
        ({"path": "json", "data_files": "cut.jsonl"}, r"cut\.jsonl, line 41.*half of a surrogate"),
        ({"path": "json", "data_files": "numbers.jsonl"}, "row 0 holds 1 there, not text"),
        ({"path": "json", "data_files": "packed.jsonl.gz"}, r"packed\.jsonl\.gz.*no whole gzip"),
    ]
    for fields, expected in cases:
        with pytest.raises(InputError, match=expected) as error:
            check_corpus(HubCorpus(**fields))
        assert len(str(error.value)) < 300
    assert check_corpus(HubCorpus(path="two", name="a"), 40) is None
    parts = HubCorpus(path="two", name="a", split="train[:5]", streaming=False)
    assert texts_of(parts) == TEXTS[:5]
    with pytest.raises(InputError, match="41 texts of at least 1 tokens are needed"):
        check_corpus(HubCorpus(path="json", data_files="good.jsonl"), 41)


def test_an_endpoint_that_is_no_url_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "hf-mirror.com")
    hub_answers.cache_clear()
    with pytest.raises(InputError, match=r"'hf-mirror\.com': HF_ENDPOINT is no URL"):
        check_corpus(HubCorpus(path="nobody/nothing-of-this-name"))


def test_a_corpus_passes_the_check_exactly_when_bytes_plus_two_reach_seqlen(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_text("é" * 5 + "\n" + "a" * 10 + "\nb\n", encoding="utf-8")
    corpus = FileCorpus(path=str(path))
    assert check_corpus(corpus, 2, 12) is None
    assert check_corpus(corpus, 3, 3) is None
    for nsamples, seqlen in ((2, 13), (3, 4)):
        with pytest.raises(InputError, match="lower seqlen or nsamples"):
            check_corpus(corpus, nsamples, seqlen)
    assert check_corpus(corpus, 1, 27, joined=True) is None
    warning = check_corpus(corpus, 2, 27, joined=True)
    assert warning is not None
    assert "overlap: all texts have at most 27 tokens, not 54" in warning
    with pytest.raises(InputError, match="at most 27 tokens"):
        check_corpus(corpus, 1, 28, joined=True)


def test_the_check_of_the_testbed_knows_its_domains_and_lengths() -> None:
    corpus = TestbedCorpus(mixture={"facts": 1.0})
    assert check_corpus(corpus, 10_000_000, 32) is None
    assert check_corpus(corpus, 1, 10**9, joined=True) is None
    with pytest.raises(InputError, match="lower seqlen"):
        check_corpus(corpus, 1, 1_000_000)
    with pytest.raises(InputError, match="nonsense"):
        check_corpus(TestbedCorpus(mixture={"nonsense": 1.0}))


def test_a_hub_out_of_reach_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    hub_answers.cache_clear()
    try:
        warning = check_corpus(HubCorpus(path="nobody/nothing-of-this-name"))
    finally:
        hub_answers.cache_clear()
    assert warning is not None
    assert "nobody/nothing-of-this-name" in warning


def test_named_files_are_read_as_the_split_train_in_every_preset() -> None:
    named = [corpus for corpus in CORPUS_PRESETS.values() if isinstance(corpus, HubCorpus)]
    assert {corpus.split for corpus in named if corpus.data_files is not None} == {"train"}


def test_the_page_names_every_preset() -> None:
    page = (Path(__file__).parents[3] / "docs/corpora.md").read_text()
    assert [name for name in CORPUS_PRESETS if f"`{name}`" not in page] == []
