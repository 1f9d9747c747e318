"""Text sources and tokenisation, against the published joins and hashes made by hand."""

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from conftest import byte_tokenizer

from owl_deploy.errors import OwlDeployError, RecipeError, UnsupportedModelError
from owl_deploy.text import Encoder, Part, documents, evaluation_text, tokens_sha256

WIKITEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "wikitext-2-raw" / "wiki.test.raw"


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(*lines: str) -> Path:
        path = tmp_path / "documents.jsonl"
        path.write_bytes("\n".join(lines).encode())
        return path

    return write


@pytest.fixture
def data_sets(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Stand in for the hub: every data set has two rows; return the calls that were made."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def load_dataset(path: str, **arguments: Any) -> list[dict[str, str]]:
        calls.append((path, arguments))
        return [{"text": "first\n"}, {"text": ""}, {"text": "second\n"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return calls


def test_python_docs_are_cut_into_four_fifths_and_one_fifth() -> None:
    whole = "\n\n".join(topics[name] for name in sorted(topics))
    (calibration,), (evaluation,) = documents("python-docs", "calibration"), documents("python-docs", "evaluation")
    assert calibration + evaluation == whole
    assert len(calibration) == int(0.8 * len(whole))


@pytest.mark.parametrize("part", ["calibration", "evaluation"])
def test_python_docs_are_the_same_each_time(part: Part) -> None:
    assert list(documents("python-docs", part)) == list(documents("python-docs", part))
    assert evaluation_text("python-docs") == evaluation_text("python-docs")


def test_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a:b.txt"
    path.write_text("one\n\ntwo é\n", encoding="utf-8")
    assert list(documents(f"text:{path}", "calibration")) == ["one\n\ntwo é\n"]
    assert evaluation_text(f"text:{path}") == "one\n\ntwo é\n"


def test_text_file_that_is_missing_or_no_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OwlDeployError, match=r"cannot read the text .*missing\.txt"):
        list(documents(f"text:{tmp_path / 'missing.txt'}", "calibration"))
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    with pytest.raises(OwlDeployError, match=r"cannot read the text .*latin\.txt"):
        list(documents(f"text:{tmp_path / 'latin.txt'}", "calibration"))


def test_json_lines_give_their_field_and_blank_lines_are_skipped(jsonl: Callable[..., Path]) -> None:
    path = jsonl('{"text": "a", "body": "x"}', "", '{"text": "b", "body": "y"}', "")
    assert list(documents(f"jsonl:{path}", "calibration")) == ["a", "b"]
    assert list(documents(f"jsonl:{path}:body", "calibration")) == ["x", "y"]
    assert evaluation_text(f"jsonl:{path}:body") == "x\n\ny"


def test_json_lines_end_at_line_feeds_only(jsonl: Callable[..., Path]) -> None:
    # These count as line ends for str.splitlines, and are allowed inside a JSON string.
    texts = ["a\u2028b", "c\u0085d\u2029e"]
    path = jsonl(*(json.dumps({"text": text}, ensure_ascii=False) for text in texts))
    assert list(documents(f"jsonl:{path}", "calibration")) == texts


@pytest.mark.parametrize("bad", ["{not json", '{"other": "a"}', '["text"]', '"text"', "3"])
def test_bad_json_line_is_named_by_its_number(jsonl: Callable[..., Path], bad: str) -> None:
    path = jsonl('{"text": "a"}', "", bad)
    with pytest.raises(OwlDeployError, match=r"documents\.jsonl line 3 is not a JSON object with a field 'text'"):
        list(documents(f"jsonl:{path}", "calibration"))


def test_json_field_that_is_no_text_is_an_error(jsonl: Callable[..., Path]) -> None:
    path = jsonl('{"text": "a"}', '{"text": ["b"]}')
    with pytest.raises(OwlDeployError, match="line 2: field 'text' is not text"):
        list(documents(f"jsonl:{path}", "calibration"))


def test_documents_are_read_lazily(jsonl: Callable[..., Path]) -> None:
    path = jsonl('{"text": "a"}', "broken")
    assert next(documents(f"jsonl:{path}", "calibration")) == "a"


@pytest.mark.parametrize(
    "source", ["", "nothing", "text:", "text", "jsonl:", "jsonl", "hf", "hf:", "python-docs:x", "Python-docs"]
)
def test_unknown_source_is_an_error_that_lists_the_known_ones(source: str) -> None:
    with pytest.raises(RecipeError, match=r"unknown text source .*known are generated, python-docs, wikitext2"):
        list(documents(source, "calibration"))


def test_generated_text_cannot_be_evaluated_on() -> None:
    with pytest.raises(RecipeError, match="generated text comes from the model itself"):
        evaluation_text("generated")


def test_local_wikitext_is_joined_as_the_hub_serves_it(tmp_path: Path) -> None:
    path = tmp_path / "wiki.raw"
    path.write_text(" \n = Title = \n \n A \x0c\u2028 line . \n", encoding="utf-8")
    rows = ["", " = Title = \n", "", " A \x0c\u2028 line . \n"]
    assert evaluation_text(f"wikitext2:{path}") == "\n\n".join(rows)


@pytest.mark.skipif(not WIKITEXT.is_file(), reason="WikiText-2 is not beside the repository")
def test_real_wikitext_is_joined_by_the_published_protocol() -> None:
    with WIKITEXT.open(encoding="utf-8") as file:
        rows = ["" if line.strip() == "" else line for line in file]
    assert len(rows) == 4358
    text = evaluation_text(f"wikitext2:{WIKITEXT}")
    assert text == "\n\n".join(rows)
    assert text.startswith("\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is an English film")


@pytest.mark.parametrize(
    ("part", "split", "text"),
    [("calibration", "train", "first\n  second\n"), ("evaluation", "test", "first\n\n\n\n\nsecond\n")],
)
def test_wikitext_of_the_hub_keeps_its_parts_apart(
    data_sets: list[tuple[str, dict[str, Any]]], part: Part, split: str, text: str
) -> None:
    assert list(documents("wikitext2", part)) == [text]
    ((name, arguments),) = data_sets
    assert (name, arguments["name"], arguments["split"]) == ("Salesforce/wikitext", "wikitext-2-raw-v1", split)


def test_c4_takes_the_first_shard_of_each_part(data_sets: list[tuple[str, dict[str, Any]]]) -> None:
    assert list(documents("c4", "calibration")) == ["first\n", "", "second\n"]
    assert evaluation_text("c4") == "first\n  second\n"
    files = [arguments["data_files"] for _, arguments in data_sets]
    assert files == [
        {"train": "en/c4-train.00000-of-01024.json.gz"},
        {"validation": "en/c4-validation.00000-of-00008.json.gz"},
    ]


def test_c4_evaluation_stops_after_1100_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": str(i)} for i in range(2000)]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: iter(rows))
    assert evaluation_text("c4:local.json.gz").split(" ") == [str(i) for i in range(1100)]


@pytest.mark.parametrize(
    ("source", "config", "split"),
    [("hf:a/b", None, "train"), ("hf:a/b:small", "small", "train"), ("hf:a/b:small:test", "small", "test")],
)
def test_data_set_of_the_hub_by_name_configuration_and_split(
    data_sets: list[tuple[str, dict[str, Any]]], source: str, config: str | None, split: str
) -> None:
    assert list(documents(source, "calibration")) == ["first\n", "", "second\n"]
    ((name, arguments),) = data_sets
    assert (name, arguments["name"], arguments["split"]) == ("a/b", config, split)


def test_data_set_that_cannot_be_read_says_what_to_use_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(OwlDeployError, match=r"a/b cannot be read \(ConnectionError\).*python-docs"):
        list(documents("hf:a/b", "calibration"))


def test_data_set_without_text_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"body": "a"}])
    with pytest.raises(OwlDeployError, match="no column named text"):
        list(documents("hf:a/b", "calibration"))


@pytest.mark.parametrize("adds_bos", [False, True])
def test_encoder_sees_whether_the_tokenizer_adds_a_bos(tmp_path: Path, adds_bos: bool) -> None:
    byte_tokenizer(adds_bos=adds_bos).save_pretrained(tmp_path)
    encoder = Encoder.open(tmp_path)
    assert (encoder.bos_token_id, encoder.eos_token_id, encoder.adds_bos) == (0, 1, adds_bos)
    expected = byte_tokenizer(adds_bos=adds_bos)("Où?")["input_ids"]
    assert encoder.encode("Où?").tolist() == expected
    assert (expected[0] == 0) is adds_bos
    assert encoder.encode("Où?", special_tokens=False).tolist() == expected[1 if adds_bos else 0 :]
    assert encoder.encode("").dtype == np.int64


def test_encoder_without_a_bos_token_adds_none(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).unlink(missing_ok=True)
    encoder = Encoder.open(tmp_path)
    assert (encoder.bos_token_id, encoder.eos_token_id, encoder.adds_bos) == (None, None, False)


@pytest.mark.parametrize("bos", ["<a>", {"content": "<a>", "lstrip": False}])
def test_bos_token_is_named_in_the_configuration_as_text_or_as_a_mapping(
    tmp_path: Path, bos: str | dict[str, Any]
) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos}))
    assert Encoder.open(tmp_path).bos_token_id == 2


def test_truncation_and_padding_stored_in_the_tokenizer_are_switched_off(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=8, pad_id=1, pad_token="<eos>")
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(Encoder.open(tmp_path).encode("a long text")) == 11
    assert len(Encoder.open(tmp_path).encode("a")) == 1


@pytest.mark.parametrize("content", [None, "{}", "not json"])
def test_folder_without_a_usable_tokenizer_is_an_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UnsupportedModelError, match="no tokenizer in"):
        Encoder.open(tmp_path)


def test_token_hash_is_that_of_little_endian_64_bit_integers_in_row_order() -> None:
    tokens = np.array([[1, 2, 3], [4, 5, 2**40]], dtype=np.int64)
    expected = hashlib.sha256(struct.pack("<6q", 1, 2, 3, 4, 5, 2**40)).hexdigest()
    assert tokens_sha256(tokens) == expected
    assert tokens_sha256(np.asfortranarray(tokens)) == expected
    assert tokens_sha256(tokens[:, ::-1]) != expected
