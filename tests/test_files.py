"""Documents where they lie: which files of a folder are read, and what is said of the others."""

import pytest

from cream_peft.evals.needle import split_sentences
from cream_peft.evals.prompts import TaskError
from cream_peft.train.data import load_data
from cream_peft.train.files import MOST_TEXTS, first_texts, load_documents
from cream_peft.train.recipe import parse_recipe
from cream_peft.train.rows import DataError

ROW = '{"text": "a row"}\n'


def texts_of(name, **options):
    return sorted(row["text"] for row in load_documents(str(name), **options))


def filled(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ROW if "json" in name else name)
    return folder


def test_files_of_other_kinds_are_left_out_and_named_once(tmp_path, caplog):
    filled(tmp_path, "x.jsonl", "x.jsonl.bak", "x.jsonl.gz", "old/x.jsonl.bak", "t.csv")
    for name in (tmp_path, f"{tmp_path}/**/*"):
        caplog.clear()
        assert texts_of(name) == texts_of(name) == ["a row"]
        assert caplog.messages == [f"{name}: 4 files of other kinds (.bak, .csv, .gz) are not read"]
    (tmp_path / "x.jsonl").unlink()
    with pytest.raises(DataError, match=r"holds no data files: .jsonl"):
        load_documents(str(tmp_path))


def test_texts_are_read_whatever_the_case_of_their_ending(tmp_path, caplog):
    filled(tmp_path, "notes.txt", "one.md", "deep/two.MD", "three.TXT")
    for name in (tmp_path, f"{tmp_path}/**/*.*"):
        assert texts_of(name) == ["deep/two.MD", "notes.txt", "one.md", "three.TXT"]
    assert texts_of(tmp_path / "three.TXT") == ["three.TXT"] and not caplog.messages
    filled(tmp_path, "train.txt")
    assert len(texts_of(f"{tmp_path}/**/*.*")) == 5
    with pytest.raises(DataError, match=r"train.txt looks like the split 'train', and 2 files look like none"):
        load_documents(str(tmp_path))


def test_what_describes_a_data_set_is_no_document_of_it(tmp_path, caplog):
    filled(tmp_path, "README.md", "LICENSE", "LICENSE.md", "CITATION.cff", ".gitattributes", ".cache/a.lock")
    filled(tmp_path, "train-0.jsonl", "test-0.jsonl", "dataset_infos.json", "metadata.json", "__pycache__/a.pyc")
    assert texts_of(tmp_path) == ["a row"] and not caplog.messages
    filled(tmp_path, "notes.md")
    assert texts_of(tmp_path) == ["a row"]
    assert caplog.messages == [f"{tmp_path}: 1 file of another kind (.md) is not read"]
    assert texts_of(tmp_path / "*.md") == ["LICENSE.md", "README.md", "notes.md"]


def test_a_file_that_is_not_read_makes_no_split(tmp_path, caplog):
    filled(tmp_path, "test.pdf", "a.txt")
    assert texts_of(tmp_path) == ["a.txt"] and "(.pdf)" in caplog.text


@pytest.mark.parametrize("streaming", ["false", "true"])
@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("text.jsonl", '{{"text": "caf{}"}}\n'),
        ("chat.jsonl", '{{"messages": [{{"role": "user", "content": "{}"}}]}}\n'),
        ("b.txt", "Of a caf{}.\n"),
    ],
)
def test_a_file_that_is_not_utf_8_is_named(streaming, name, written, tmp_path, byte_tokenizer):
    byte_tokenizer.chat_template = "{{ messages[0]['content'] }}"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes((written.format("e") + written.format("é")).encode("latin-1"))
    recipe = ["--dataset_name", str(tmp_path / "data"), "--output_dir", str(tmp_path), "--dataset_streaming", streaming]
    with pytest.raises(DataError, match=rf"^dataset_name: .*{name} is not UTF-8 \(byte 0xe9 in line 2\): save it"):
        load_data(parse_recipe(recipe), byte_tokenizer, 300)


@pytest.mark.parametrize("written", ["\n \n", "[]", "\n"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_file_without_a_row_is_empty(written, name, tmp_path):
    (tmp_path / name).write_text(written)
    with pytest.raises(DataError, match="is empty: it must hold documents"):
        load_documents(str(tmp_path / name))


def test_texts_to_measure_are_found_at_home_and_by_a_pattern(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "docs.jsonl").write_text(ROW * MOST_TEXTS)
    for name in ("~/docs.jsonl", f"{tmp_path}/d*.jsonl"):
        assert len(first_texts(name, None, "test")) == MOST_TEXTS and not caplog.messages
    (tmp_path / "docs.jsonl").write_text(ROW * (MOST_TEXTS + 1))
    assert len(first_texts("~/docs.jsonl", None, "test")) == MOST_TEXTS
    assert caplog.messages == ["--text ~/docs.jsonl: its first 1,000 rows are read, and no others"]


def test_texts_are_found_at_home_and_the_file_of_another_encoding_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.TXT").write_text("A text.")
    assert split_sentences("~/a.TXT") == split_sentences("~/") == ["A text."]
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(TaskError, match=r"b\.txt is no text that can be read"):
        split_sentences("~/")
