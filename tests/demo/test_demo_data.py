"""The corpus of standard-library docstrings: enough text, no leak between the splits, a clear refusal without sources."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from graphpeft.demo.data import AREAS, OPENING, Corpus, CorpusError, Text, clean, corpus, docstrings, unique


@pytest.fixture(scope="module")
def real() -> Corpus:
    return corpus(seed=0)


def fake_library(root: Path, counts: dict[str, int]) -> Path:
    """One module per area, with that many functions whose docstrings differ in their first words."""
    for number, (area, count) in enumerate(counts.items()):
        functions = (f'def f{i}():\n    "Function {i} of area {number} has this text"\n' for i in range(count))
        (root / f"{AREAS[area].split()[0]}.py").write_text("\n".join(functions), encoding="utf-8")
    return root


def openings(texts: tuple[Text, ...]) -> set[str]:
    return {" ".join(re.findall(r"\w+", text.words.lower())[:OPENING]) for text in texts}


def test_the_running_python_has_enough_balanced_text(real: Corpus) -> None:
    assert len(real.areas) >= 8
    assert len(real.train) >= 1200  # 8 areas of 150, even where a distribution packs tkinter and others apart
    labels = real.labels(real.train)
    assert {labels.count(i) for i in range(len(real.areas))} == {150}
    assert {text.area for text in real.test} == set(real.areas)


def test_no_text_and_no_opening_stands_on_both_sides(real: Corpus) -> None:
    both = real.train + real.test
    assert len({text.words for text in both}) == len(both)
    assert not openings(real.train) & openings(real.test)


def test_the_split_is_a_function_of_the_seed(tmp_path: Path) -> None:
    root = fake_library(tmp_path, dict.fromkeys(AREAS, 200))
    assert corpus(seed=0, root=root) == corpus(seed=0, root=root)
    assert set(corpus(seed=1, root=root).test) != set(corpus(seed=0, root=root).test)


def test_names_of_the_module_are_struck_from_its_text() -> None:
    assert clean("The email.mime package.\n\n  E-mails and _mime types", ("email", "mime")) == (
        "The . package. E-mails and types"
    )
    assert clean("Threading, by _threading_local", ("_threading_local",)) == "Threading, by"


def test_an_opening_counts_once_in_whichever_area() -> None:
    same = "one two three four five six seven eight"
    texts = [Text(f"{same} nine", "web"), Text(f"{same.upper()}, ten", "email"), Text("one two three four five", "xml")]
    assert unique(iter(texts)) == [texts[0], texts[2]]


def test_tests_of_the_library_and_short_texts_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "json" / "tests").mkdir(parents=True)
    (tmp_path / "json" / "tests" / "deep.py").write_text('"Five words and one more, in a test"')
    (tmp_path / "json" / "core.py").write_text(
        'class A:\n    "Only three words"\n    async def f(): "Waits for five long words"'
    )
    assert [text.words for text in docstrings(tmp_path)] == ["Waits for five long words"]


def test_an_area_with_too_little_text_is_left_out(tmp_path: Path) -> None:
    areas = list(AREAS)[:9]
    root = fake_library(tmp_path, dict.fromkeys(areas[:8], 200) | {areas[8]: 199})
    assert corpus(root=root).areas == tuple(areas[:8])


@pytest.mark.parametrize("counts", [{}, dict.fromkeys(list(AREAS)[:7], 250), dict.fromkeys(AREAS, 20)])
def test_missing_sources_are_refused_with_a_remedy(tmp_path: Path, counts: dict[str, int]) -> None:
    train, test = (15, 5) if counts and min(counts.values()) < 200 else (150, 50)
    with pytest.raises(CorpusError, match=r"Usually this Python comes without the sources.*full CPython"):
        corpus(train=train, test=test, root=fake_library(tmp_path, counts))
