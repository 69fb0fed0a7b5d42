"""How passages are changed so that only reading helps; no model."""

import random

from pipeline.reading import exchange, names_in

TEXTS = [
    "The mill on the River Arden was built in 1874 by Rosa Lindqvist. Lindqvist sold it to Emil Tarn in 1880.",
    "The river at the mill of Rosa Lindqvist, near Sabel, is 4 metres deep. Its garden is older.",
]
NAMES = ["Arden", "Emil", "Lindqvist", "Rosa", "Sabel", "Tarn"]


def test_names_are_words_that_never_lack_their_capital_letter() -> None:
    assert names_in(TEXTS) == NAMES, "neither River, which is a river too, nor The"


def test_names_and_numbers_are_exchanged_alike_in_all_texts() -> None:
    for seed in range(20):
        changed = exchange(TEXTS, "Who built the mill?", NAMES, random.Random(seed))
        words, before = [" ".join(texts).replace(".", "").replace(",", "").split() for texts in (changed, TEXTS)]
        others = dict(zip(before, words, strict=True))
        assert [others[word] for word in before] == words, "a word becomes the same wherever it stands"
        assert sorted(others[name] for name in NAMES) == NAMES, "no name is lost, none comes from elsewhere"
        assert all(others[word] != word for word in [*NAMES, "1874", "1880", "4"])
        assert all(others[word] == word for word in before if word not in NAMES and not word.isdigit())
        assert [len(others[number]) for number in ("1874", "4")] == [4, 1] and others["1874"][0] == "1"


def test_what_the_question_names_stays() -> None:
    changed = exchange(TEXTS, "What did Rosa Lindqvist build in 1874?", NAMES, random.Random(0))
    assert all("Rosa Lindqvist" in text for text in changed) and "1874" in changed[0] and "1880" not in changed[0]
