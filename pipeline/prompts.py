"""The only place where prompts live: what the question writer, the teacher and the student are told.

In: passages and questions. Out: chats (lists of role/content messages), and questions parsed from replies.
Teacher and student chats differ by what stands before the question in the same user turn; neither sets a system prompt,
so that the adapter answers a client who sends nothing but a question.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import regex
from sentencex import segment  # pyright: ignore[reportAttributeAccessIssue]

from pipeline.config import QUESTION_KINDS, QuestionKind
from pipeline.schema import digest

Chat = list[dict[str, str]]

# Invented, so that a small model that copies the example instead of following it can be caught.
_EXAMPLE_SENTENCES = (
    "The Halden Bridge crosses the River Orla at Marrow Point.",
    "It was designed by the engineer Ida Voss and opened on 4 May 1931, after three years of work that cost "
    "2.4 million crowns.",
    "At 412 metres it was the longest steel arch in the country until 1958.",
    "Unlike the older Tarn Bridge, which carries only trains, the Halden Bridge carries road traffic and a footpath.",
    "Fishermen use its lamps to find the harbour at night.",
)
_EXAMPLE_PASSAGE = " ".join(_EXAMPLE_SENTENCES)


class _Kind(NamedTuple):
    """What to ask for, and a worked example about one sentence of the example passage (None: about all of it)."""

    instruction: str
    example_focus: str | None
    example_questions: tuple[str, ...]


_KINDS: dict[QuestionKind, _Kind] = {
    "fact": _Kind(
        "questions about facts",
        _EXAMPLE_SENTENCES[1],
        (
            "Who designed the Halden Bridge?",
            "What did the engineer Ida Voss design?",
            "How long did the work on the Halden Bridge take?",
        ),
    ),
    "definition": _Kind(
        "questions that ask what or who something is",
        _EXAMPLE_SENTENCES[0],
        (
            "What is the Halden Bridge?",
            "What is crossed by the Halden Bridge at Marrow Point?",
            "Where is the Halden Bridge on the River Orla?",
        ),
    ),
    "detail": _Kind(
        "questions about numbers, dates and names",
        _EXAMPLE_SENTENCES[1],
        (
            "When was the Halden Bridge opened?",
            "How much did the Halden Bridge cost?",
            "What is the name of the engineer who designed the Halden Bridge?",
        ),
    ),
    "comparison": _Kind(
        "questions that ask for differences, causes and effects",
        _EXAMPLE_SENTENCES[3],
        (
            "How does the Halden Bridge differ from the Tarn Bridge?",
            "Which bridge is older, the Halden Bridge or the Tarn Bridge?",
            "Why can cars cross the Halden Bridge but not the Tarn Bridge?",
        ),
    ),
    "summary": _Kind(
        "questions that ask for an overview",
        None,
        (
            "What are the most important facts about the Halden Bridge?",
            "What is known about how the Halden Bridge was built?",
            "How is the Halden Bridge used?",
        ),
    ),
    "use": _Kind(
        "practical questions of someone who needs to know this",
        _EXAMPLE_SENTENCES[4],
        (
            "What can fishermen use to find the harbour at night near the Halden Bridge?",
            "What are the lamps of the Halden Bridge good for at night?",
            "Who depends on the lamps of the Halden Bridge?",
        ),
    ),
}

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
_GRADE = re.compile(r"\bgrade:\W*(correct|wrong)\b", re.IGNORECASE)
_NUMBER = re.compile(r"(?<!\d)\d{1,3}(?:[.,'\u2019\s]\d{3})+(?!\d)|\d+")  # thousands apart, or any digits
_ITEM = re.compile(r"^\s*(?:(?:Q|Question)?\s?\(?\d{1,2}[.):]|[-*\u2022]|Q:)\s*(.+)$")
# Scripts that put no spaces between words, their punctuation, and emoji.
UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\U0001f000-\U0003ffff"
_UNSPACED = re.compile(f"[{UNSPACED}]")
_DENSE = re.compile(rf"[{UNSPACED}\ua000-\uf8ff]")  # these and syllabic scripts, Hangul above all: a letter says much
_BETWEEN_SPACES = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
_WORD = regex.compile(r"[\w\p{M}]+")  # with the vowel signs of Indic scripts, which are no letters to Python
_QUESTION_END = regex.compile(r"(?:[?\uff1f\u061f\u037e]|\p{Greek}\s?;)$")
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


def question_chat(
    passage: str, heading: str, kind: QuestionKind, count: int, focus: str, answers: Sequence[str] = ()
) -> Chat:
    """Ask for `count` questions of one kind that the sentence `focus` answers, after a worked example of that kind.

    `answers`, words of that sentence, are what the questions should be asked for.
    """
    example = _KINDS[kind]
    return [
        {
            "role": "user",
            "content": _ask(_EXAMPLE_PASSAGE, "", kind, len(example.example_questions), example.example_focus),
        },
        {
            "role": "assistant",
            "content": "\n".join(f"{number}. {text}" for number, text in enumerate(example.example_questions, 1)),
        },
        {
            "role": "user",
            "content": _ask(passage, heading, kind, count, focus if example.example_focus else None, answers),
        },
    ]


def _ask(
    passage: str, heading: str, kind: QuestionKind, count: int, focus: str | None, answers: Sequence[str] = ()
) -> str:
    source = f"that this sentence answers: {focus.strip()}" if focus else "about the facts above."
    wanted = f"The answers are: {', '.join(answers)}.\n" if answers else ""
    return (
        f"{titled(passage, heading)}\n\n---\n\nWrite {count} {_KINDS[kind].instruction} {source}\n{wanted}Name in "
        "every question the person, place or thing that it asks about."
    )


def teacher_chat(passage: str, heading: str, question: str) -> Chat:
    """Put the passage before the question; the wording forbids speaking of a text, which the student would copy."""
    return [
        {
            "role": "user",
            "content": f"{titled(passage, heading)}\n\n---\n\nAnswer the question with the facts above, in one or two "
            "full sentences with all names, numbers and dates. State the facts directly and never mention a text.\n\n"
            f"Question: {question}",
        }
    ]


def student_chat(question: str) -> Chat:
    """The question alone: what a client of the adapter sends."""
    return [{"role": "user", "content": question}]


def retrieval_question(
    passages: Sequence[Mapping[str, str]], question: str, fits: Callable[[str], bool]
) -> tuple[str, int]:
    """Put retrieved passages, rows with `heading` and `text`, before a question, in the words that the teacher had.

    They come best first; as many are put there as fit. Returned with their number.
    """
    for count in range(len(passages), 0, -1):
        text = "\n\n".join(titled(passage["text"], passage["heading"]) for passage in passages[:count])
        asked = teacher_chat(text, "", question)[0]["content"]
        if fits(asked):
            return asked, count
    return question, 0


_JUDGED = (
    ("Rosa Voss, or Ida Voss", "The bridge was designed by the engineer Ida Voss, who came from Tarn.", True),
    ("Ida Voss", "It was designed by the architect Emil Tarn.", False),
    ("Ida Voss", "The engineer Voss, Ida, designed it in 1931, I believe.", True),
)


def judge_chat(question: str, answers: Sequence[str], reply: str) -> Chat:
    """Ask whether a reply gives an accepted answer, after three worked examples; the reason comes before the grade."""
    chat = []
    for wanted, given, is_right in _JUDGED:
        chat += [
            {"role": "user", "content": _grading("Who designed the Halden Bridge?", wanted, given)},
            {
                "role": "assistant",
                "content": f"Reason: the reply {'names' if is_right else 'does not name'} Ida Voss.\n"
                f"Grade: {'correct' if is_right else 'wrong'}",
            },
        ]
    return [*chat, {"role": "user", "content": _grading(question, ", or ".join(answers), reply)}]


def _grading(question: str, wanted: str, reply: str) -> str:
    return (
        f"Question: {question}\nAccepted answer: {wanted}\nReply: {reply}\n\nDoes the reply give the accepted answer? "
        "It may be worded differently and may say more. First a line that begins with Reason, then a line that is "
        "either 'Grade: correct' or 'Grade: wrong'."
    )


def parse_grade(text: str) -> bool | None:
    """Return what a judge decided; None if it gave no grade."""
    grades = _GRADE.findall(text)
    return grades[-1].lower() == "correct" if grades else None


def declines(reply: str) -> bool:
    """True if a reply says that it does not know, or that there is no such thing."""
    return bool(_DECLINES.search(reply.replace("\u2019", "'")))


def titled(passage: str, heading: str) -> str:
    """Return a passage under its heading."""
    return f"{heading}\n\n{passage.strip()}" if heading else passage.strip()


def questions_schema(count: int) -> dict[str, object]:
    """JSON schema of a structured reply to `question_chat`."""
    return {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": count}


def parse_questions(reply: str) -> list[str]:
    """Return the questions of a reply: a JSON list, a numbered or bulleted list, or lines that end in a question mark.

    The last item of a reply that was cut off has no question mark and is left out; an unusable reply gives [].
    """
    items: Iterator[str]
    try:
        parsed = json.loads(reply)
        items = iter(str(item) for item in parsed) if isinstance(parsed, list) else iter(())
    except (json.JSONDecodeError, RecursionError):
        items = (match.group(1) if (match := _ITEM.match(line)) else line for line in reply.splitlines())
    # JSON may escape half a character, which no file can hold.
    whole = (item.encode("utf-8", "replace").decode("utf-8") for item in items)
    cleaned = (item.strip().strip("*_\"'` ").strip() for item in whole)
    return [text for text in cleaned if _QUESTION_END.search(text) and len(text) <= 400]


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


def prompts_digest() -> str:
    """Change whenever any prompt changes: part of the settings of the stages that use them."""
    chats = [question_chat("<passage>", "<heading>", kind, 0, "<focus>", ["<answer>"]) for kind in QUESTION_KINDS]
    return digest(json.dumps([chats, teacher_chat("<passage>", "<heading>", "<question>"), student_chat("<question>")]))


def sentences(text: str) -> list[str]:
    """Split a passage into sentences of at least three words, or dense letters; one that has none counts as a whole."""
    parts = [part.strip() for part in segment("en", text)]
    return [part for part in parts if len(part.split()) > 2 or len(_DENSE.findall(part)) > 2] or [text.strip()]
