"""The only place where prompts live: what the question writer, the teacher and the student are told.

In: passages and questions. Out: chats (lists of role/content messages), and questions parsed from replies.
Teacher and student chats differ by what stands before the question in the same user turn; neither sets a system prompt,
so that the adapter answers a client who sends nothing but a question.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import regex

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

_GRADE = re.compile(r"\bgrade:\W*(correct|wrong)\b", re.IGNORECASE)
_ITEM = re.compile(r"^\s*(?:(?:Q|Question)?\s?\(?\d{1,2}[.):]|[-*\u2022]|Q:)\s*(.+)$")
_QUESTION_END = regex.compile(r"(?:[?\uff1f\u061f\u037e]|\p{Greek}\s?;)$")


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


def prompts_digest() -> str:
    """Change whenever a prompt of the writing stages changes: part of their settings."""
    chats = [question_chat("<passage>", "<heading>", kind, 0, "<focus>", ["<answer>"]) for kind in QUESTION_KINDS]
    return digest(json.dumps([chats, teacher_chat("<passage>", "<heading>", "<question>"), student_chat("<question>")]))
