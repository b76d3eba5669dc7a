"""Exact and near duplicates: shingles against literal sets, decisions against the exact Jaccard similarity."""

import base64
import random
import re
import unicodedata
from pathlib import Path

import pytest
from corpus_text import config, own_build_folder, texts_of, words, write_rows  # noqa: F401  (a fixture)

from sparsity_utils.console import InputError
from sparsity_utils.study.profiles import read_profile
from sparsity_utils.text.config import DUPLICATE_RULES, CorpusConfig
from sparsity_utils.text.corpus import build_corpus
from sparsity_utils.text.duplicates import Duplicates, shingles

# Characters by their names in the Unicode database: another way than the code points of the rule.
UNSPACED = (
    "CJK ",
    "HIRAGANA ",
    "KATAKANA ",
    "THAI ",
    "LAO ",
    "KHMER ",
    "MYANMAR ",
    "TIBETAN ",
    "IDEOGRAPHIC FULL STOP",
)
ALPHABETS = {
    "Chinese": [chr(code) for code in range(0x4E00, 0x5200)],
    "Japanese": [chr(code) for code in (*range(0x3041, 0x3094), *range(0x30A1, 0x30F6), *range(0x65E5, 0x6700))],
    "Thai": [chr(code) for code in range(0x0E01, 0x0E2F)],
    "Lao": [letter for letter in map(chr, range(0x0E81, 0x0EB1)) if unicodedata.name(letter, "")],
    "Burmese": [chr(code) for code in range(0x1000, 0x102B)],
    "Khmer": [chr(code) for code in range(0x1780, 0x17A3)],
    "Tibetan": [chr(code) for code in range(0x0F40, 0x0F48)],
}
SPACED = {
    "Latin": "abcdefghij",
    "Korean": [chr(code) for code in range(0xAC00, 0xAD00)],
    "Arabic": [chr(code) for code in range(0x0627, 0x063B)],
    "Cyrillic": [chr(code) for code in range(0x0430, 0x0450)],
    "Hindi": [chr(code) for code in range(0x0915, 0x0939)],
}


def literal_shingles(text: str, rule: int) -> set[tuple[str, ...]]:
    """The rules, character by character; only ASCII white space parts the words of rule 1."""
    found = []
    for word in unicodedata.normalize("NFC", text).split() if rule == 2 else re.split(r"[ \t\n\v\f\r]+", text):
        run = ""
        for character in word:
            if rule == 2 and unicodedata.name(character, "").startswith(UNSPACED):
                found += [run, character]
                run = ""
            else:
                run += character
        found += [run[i : i + 9] for i in range(len(run) - 8)] if rule == 2 and len(run) > 32 else [run]
    found = [unit for unit in found if unit]
    return {tuple(found[start : start + 5]) for start in range(max(1, len(found) - 4))}


def similarity(one: str, other: str, rule: int) -> float:
    sets = [literal_shingles(text, rule) for text in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def sentences(alphabet: list[str] | str, seed: int, count: int, space: str = "") -> list[str]:
    """Words of two letters, by default without spaces between them; a sentence ends with a space after ten words."""
    rng = random.Random(seed)
    return ["".join(rng.choices(alphabet, k=2)) + (" " if place % 10 == 9 else space) for place in range(count)]


def changed(words: list[str], alphabet: list[str] | str, share: float) -> str:
    """The text with so large a share of its words, evenly spread, replaced by others; at least one."""
    count = max(1, round(share * len(words)))
    places = {(2 * place + 1) * len(words) // (2 * count) for place in range(count)}
    other = alphabet[0] * 3
    return "".join(other if place in places else word for place, word in enumerate(words))


@pytest.mark.parametrize("rule", DUPLICATE_RULES)
@pytest.mark.parametrize("count", [1, 4, 5, 6, 63, 400])
def test_hashed_shingles_give_the_literal_jaccard_similarity(count: int, rule: int) -> None:
    one = words(0, count)
    other = [*one[: count // 2], "zzz", *one[count // 2 + 1 :]]
    assert_literal(" ".join(one), " ".join(other), rule)


def assert_literal(one: str, other: str, rule: int) -> None:
    sets = [literal_shingles(text, rule) for text in (one, other)]
    hashed = [set(shingles(text, rule).tolist()) for text in (one, other)]
    assert [len(found) for found in hashed] == [len(wanted) for wanted in sets]
    assert len(hashed[0] & hashed[1]) == len(sets[0] & sets[1])


MIXED = (
    "使用 GPU加速,見 https://example.org/a/very/long/address?x=1 と書く。ภาษา Thai \u3000 ใน 12 words ພາສາ မြန်မာ ខ្មែរ"
)


@pytest.mark.parametrize("rule", DUPLICATE_RULES)
def test_shingles_of_mixed_scripts_and_of_long_runs_are_the_literal_ones(rule: int) -> None:
    assert_literal(MIXED, MIXED.replace("GPU", "CPU").replace("x=1", "x=2"), rule)
    for script, letters in (ALPHABETS | SPACED).items():
        found = sentences(letters, 1, 50, " " if script in SPACED else "")
        assert_literal("".join(found), changed(found, letters, 0.1), rule)


@pytest.mark.parametrize("script", ALPHABETS)
def test_one_word_changed_is_near_in_scripts_without_spaces(script: str) -> None:
    """Rule 1 takes a sentence for a word, and keeps these."""
    letters = ALPHABETS[script]
    for seed in range(20):
        original = sentences(letters, seed, 150)
        copy = changed(original, letters, 0)
        assert similarity("".join(original), copy, 2) > 0.9
        assert decision("".join(original), copy, 2) == "near"
        assert similarity("".join(original), copy, 1) < 0.6 and decision("".join(original), copy, 1) is None


@pytest.mark.parametrize("script", [*ALPHABETS, *SPACED])
def test_texts_that_share_half_their_words_stay(script: str) -> None:
    letters = (ALPHABETS | SPACED)[script]
    for seed in range(20):
        space = " " if script in SPACED else ""
        original = sentences(letters, seed, 150, space)
        other = original[:75] + sentences(letters, 1000 + seed, 75, space)
        assert similarity("".join(original), "".join(other), 2) < 0.6
        assert decision("".join(original), "".join(other), 2) is None


def decision(one: str, other: str, rule: int) -> str | None:
    seen = Duplicates(rule)
    assert seen.kind(one) is None
    return seen.kind(other)


def minified(seed: int) -> str:
    rng = random.Random(seed)
    names = ["".join(rng.choices("abcdefg", k=rng.randint(1, 3))) for _ in range(40)]
    return ";".join(
        f"{n}=function({m}){{return({m}*{k})}}" for n, m, k in zip(names, names[1:], names[2:], strict=False)
    )


def encoded(seed: int) -> str:
    return base64.b64encode(random.Random(seed).randbytes(700)).decode()


def genes(seed: int) -> str:
    return "".join(random.Random(seed).choices("ACGT", k=20_000))


@pytest.mark.parametrize("make", [minified, encoded, genes])
def test_one_place_changed_is_near_in_runs_without_spaces_and_others_stay(make) -> None:
    one = make(0)
    copy = one[:300] + "QQ" + one[301:]
    assert similarity(one, copy, 2) > 0.9 and decision(one, copy, 2) == "near" and decision(one, copy, 1) is None
    assert similarity(one, make(1), 2) < 0.5 and decision(one, make(1), 2) is None


def test_line_breaks_invisible_breaks_and_composed_letters_are_no_difference_to_rule_2() -> None:
    thai, japanese = ("".join(sentences(ALPHABETS[script], 3, 150)) for script in ("Thai", "Japanese"))
    copies = [(thai, re.sub("(.{7})", "\\1\u200b", thai)), (japanese, re.sub("(.{20})", "\\1\n", japanese))]
    accents = " ".join(["é" * 3 + str(number) for number in range(60)])
    copies += [(accents, unicodedata.normalize("NFD", accents)), (japanese, unicodedata.normalize("NFD", japanese))]
    for one, copy in copies:
        assert decision(one, copy, 2) == "near"
        assert set(shingles(one, 2).tolist()) == set(shingles(copy, 2).tolist())


@pytest.mark.parametrize("rule", DUPLICATE_RULES)
def test_shingles_depend_on_the_order_of_words(rule: int) -> None:
    assert not set(shingles("a b c d e", rule)) & set(shingles("e d c b a", rule))


@pytest.mark.parametrize("rule", DUPLICATE_RULES)
def test_exact_and_near_duplicates_are_told_from_other_texts(rule: int) -> None:
    original, seen = words(1), Duplicates(rule)
    one_word_changed = [*original[:150], "zzz", *original[151:]]  # Jaccard 291/301
    half_changed = [*original[:150], *words(2, 150)]  # Jaccard about 1/3
    assert seen.kind(" ".join(original)) is None
    assert seen.kind("\n ".join(original) + "\n") == "exact"  # white space is no difference
    assert seen.kind(" ".join(one_word_changed)) == "near"
    assert seen.kind(" ".join(half_changed)) is None


@pytest.mark.parametrize("rule", DUPLICATE_RULES)
def test_near_duplicates_are_found_every_time_not_only_when_almost_equal(rule: int) -> None:
    """Three words of 300 changed: a similarity of 0.9, which a coarser index finds nine times in ten."""
    for seed in range(60):
        line, seen = words(seed), Duplicates(rule)
        assert seen.kind(" ".join(line)) is None
        for place in (50, 150, 250):
            line[place] = f"other{place}"
        assert seen.kind(" ".join(line)) == "near", seed


def test_chinese_near_duplicates_are_on_neither_side_of_a_corpus(tmp_path: Path) -> None:
    texts = [sentences(ALPHABETS["Chinese"], seed, 150) for seed in range(30)]
    copies = [changed(text, ALPHABETS["Chinese"], 0) for text in texts]
    rows = write_rows(tmp_path / "rows.jsonl", ["".join(text) for text in texts] + copies)
    corpus = build_corpus(config(rows))
    assert corpus.manifest["duplicates_removed"] == {"exact": 0, "near": 30}
    kept = texts_of(corpus, "train") + texts_of(corpus, "validation")
    assert sorted(kept) == sorted("".join(text) for text in texts)
    before = build_corpus(config(rows, near_duplicates=1))
    assert before.manifest["duplicates_removed"]["near"] == 0 and before.folder != corpus.folder


def test_existing_corpora_keep_the_first_rule_and_their_names() -> None:
    for name in ("smoke", "laptop", "gpu", "long"):
        corpus = read_profile(name).corpus
        wanted = {"max_megabytes": corpus.max_megabytes, "vocabulary": corpus.vocabulary}
        assert corpus.settings() == {
            "source": "python-source",
            "path": None,
            "revision": None,
            "text_field": "text",
        } | (wanted | {"validation_share": corpus.validation_share})
    assert [CorpusConfig(source, "x", "1").duplicate_rule for source in ("python-source", "path", "hub")] == [1, 2, 2]
    assert CorpusConfig("path", "x").settings() == CorpusConfig("path", "x", near_duplicates=2).settings()
    assert "near_duplicates" not in CorpusConfig("path", "x", near_duplicates=1).settings()
    with pytest.raises(InputError, match=r"corpus\.near_duplicates is 3; choose rule 1 \(words\) or 2"):
        CorpusConfig(near_duplicates=3)
