"""What a text says, told by rules: its words and sentences, and whether a question or an answer is of use.

In: questions, answers and passages of any script. Out: words, sentences, and yes or no. What speaks of a text, declines
or dangles is known in English only; in other languages it passes.
"""

import re
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping

import regex
from sentencex import segment  # pyright: ignore[reportAttributeAccessIssue]

_LEAK = re.compile(
    r"\b(?:the|this|that|given|provided|above|following)\s+"
    r"(?:(?:given|provided|above|following|short)\s+)?(?:text|passage|article|context|document|excerpt|paragraph|"
    r"author|writer|information (?:given|provided|above))\b(?!\s+(?:of\b|\d))"  # but: the author of Faust, article 8
    r"|\b(?:mentioned|described|stated|provided|listed|given) (?:above|here)\b",
    re.IGNORECASE,
)
_DANGLING = re.compile(
    r"^(?:(?:who|what|when|where|why|how|which|whose|in which|for what)\b[^?]*?\b)?"
    r"(?:he|she|they|it|this|these|those|his|her|their|its)\b",
    re.IGNORECASE,
)
_DECLINES = re.compile(
    r"\b(?:I|we)(?: am|'m| was| do|'ve| have| could| can)?\s?(?:not|n't|no|cannot|can't|unable)\b"
    r"|\bno (?:\w+ )?(?:information|record|evidence|knowledge|mention)\b"
    r"|\bnot (?:known|aware|familiar|sure|available|specified|a real)\b"
    r"|\b(?:unknown|unaware|unclear|fictional|fictitious|there is no|(?:does not|doesn't) (?:exist|appear))\b",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"(?<!\d)\d{1,3}(?:[.,'\u2019\s]\d{3})+(?!\d)|\d+")  # thousands apart, or any digits
# Scripts that put no spaces between words, their punctuation, and emoji.
UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\U0001f000-\U0003ffff"
_UNSPACED = re.compile(f"[{UNSPACED}]")
_DENSE = re.compile(rf"[{UNSPACED}\ua000-\uf8ff]")  # these and syllabic scripts, Hangul above all: a letter says much
_BETWEEN_SPACES = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
_WORD = regex.compile(r"[\w\p{M}]+")  # with the vowel signs of Indic scripts, which are no letters to Python
# A name or a number inside a sentence.
_NAME_INSIDE = regex.compile(r"(?<=[^.?!:]\s)[\"'(\u201e\u201c]?(\p{Lu}\w+|\d[\d.,]*\d|\d)")
_GERMAN = frozenset("der die das und ist nicht ein eine von mit den dem des auf wird".split())  # noqa: SIM905
_MOST_TOLD = 6  # words that an answer gives to its question; a sentence recited has more
_COMMON = frozenset(
    """
    about after also been before being between both could does doing during each from have having into just like
    made main make many more most much name only other over same should some such take than that their them then
    there these they this those through under used very were what when where which while whom whose will with work
    would your important known kind type people thing things different happened following role purpose
    """.split()  # noqa: SIM905
)


def normalise(text: str) -> str:
    """Lower-case words without punctuation, for comparing texts."""
    return " ".join(_WORD.findall(text.lower()))


def split_words(text: str) -> list[str]:
    """Return what stands between spaces, and of scripts that have none the characters, without mere punctuation."""
    return [part for part in _BETWEEN_SPACES.findall(text) if _WORD.search(part)]


def content_words(text: str) -> set[str]:
    """Words that carry meaning: four letters and more, numbers, and any word of a script without word spaces."""
    return {
        word
        for word in _WORD.findall(text.lower())
        if (len(word) > 3 or _DENSE.search(word) or any(map(str.isdigit, word))) and word not in _COMMON
    }


def spaced_words(text: str) -> set[str]:
    """Return the content words that stand between spaces: what can be told, or not, one by one."""
    return {word for word in content_words(text) if not _UNSPACED.search(word)}


def told_words(question: str, answer: str) -> set[str]:
    """Return the words that an answer gives to its question; none if there are many: then it recites."""
    told = spaced_words(answer) - spaced_words(question)
    return told if len(told) <= _MOST_TOLD else set()


def told_by_passage(questions: Mapping[str, str], answers: Iterable[Mapping[str, str]]) -> dict[str, set[str]]:
    """Return the words that answers told, by the passage that they are about; `questions` maps ids to texts."""
    told: dict[str, set[str]] = defaultdict(set)
    for row in answers:
        told[row["passage_id"]] |= told_words(questions[row["question_id"]], row["text"])
    return told


def untold(sentence: str, told: Container[str]) -> list[str]:
    """Return the words of a sentence that were not told, neighbours together, as they stand there."""
    runs: list[str] = []
    end = -1
    for word in _WORD.finditer(sentence):
        if spaced_words(word[0]) and word[0].lower() not in told:
            if runs and sentence[end : word.start()] == " ":
                runs[-1] += f" {word[0]}"
            else:
                runs.append(word[0])
            end = word.end()
    return list(dict.fromkeys(runs))


def speaks_of_text(text: str) -> bool:
    """True if the text speaks of "the passage", "the article" and the like instead of the subject."""
    return bool(_LEAK.search(text))


def invents_number(answer: str, source: str) -> bool:
    """True if the answer has a number of three digits or more that its source lacks, whole, short (1931-32) or cut off.

    Smaller ones are often spelt out, counted, or those of a list's items.
    """
    # What looks like one number with its thousands apart may be a row of a table.
    known = [number for number in _numbers(source) | set(re.findall(r"\d+", source)) if len(number) > 1]
    return any(
        not any(has.endswith(number) or has.startswith(number) or number.endswith(has) for has in known)
        for number in _numbers(answer)
        if len(number) > 2
    )


def _numbers(text: str) -> set[str]:
    """Return its numbers as ASCII digits, without what parts thousands and without leading zeros."""
    return {str(int(re.sub(r"\D", "", number))) for number in _NUMBER.findall(text)}


def is_standalone(question: str, passage: str) -> bool:
    """True if the question can be understood without the passage: it names something and speaks of no text."""
    named = _known_words(content_words(question), passage)
    return not speaks_of_text(question) and bool(named) and not (_DANGLING.match(question) and len(named) < 2)


def is_about(question: str, passage: str) -> bool:
    """True if the question stays with the passage: no name or number that the passage lacks, and mostly its words."""
    source = passage.lower()
    names = _NAME_INSIDE.findall(question)
    if _is_german(passage):
        names = [name for name in names if name[0].isdigit()]
    words = content_words(question)
    return all(name.lower() in source for name in names) and 2 * len(_known_words(words, passage)) >= len(words)


def _is_german(text: str) -> bool:
    """True if a tenth of the words say so: in German a capital letter makes no name."""
    words = _WORD.findall(text.lower())
    return 10 * sum(word in _GERMAN for word in words) >= len(words)


def _known_words(words: set[str], passage: str) -> set[str]:
    """The words that occur in the passage, inflected or not; words of scripts without spaces count by characters."""
    source = passage.lower()
    return {
        word
        for word in words
        if word[: max(4, len(word) - 3)] in source or (_DENSE.search(word) and set(word) & set(source))
    }


def declines(reply: str) -> bool:
    """True if a reply says that it does not know, or that there is no such thing."""
    return bool(_DECLINES.search(reply.replace("\u2019", "'")))


def sentences(text: str) -> list[str]:
    """Split a passage into sentences of at least three words, or dense letters; one that has none counts as a whole."""
    parts = [part.strip() for part in segment("en", text)]
    return [part for part in parts if len(part.split()) > 2 or len(_DENSE.findall(part)) > 2] or [text.strip()]
