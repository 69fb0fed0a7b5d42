"""Replies -> scores: the metrics, their intervals, and what follows from them.

In: replies with the accepted answers, and points per question and arm. Out: numbers from 0 to 1, the report's figures.
Pure functions. Intervals are 95 % percentile bootstrap over the questions; arms are compared question by question, also
by an exact sign test, as the bootstrap is too sure where few questions differ.
"""

import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import regex

from pipeline.config import Evaluate
from pipeline.text import split_words

# The name and what answers, in the order of a table: from what knows nothing to what reads everything.
ARMS = {
    "closed_book": ("Closed book", "the base model alone"),
    "raw_text": ("Raw text", "an adapter trained on the text of the documents"),
    "sft": ("Fine-tuned", "an adapter trained on the teacher's answers without its probabilities"),
    "previous": ("Previous version", "the adapter that this one replaces"),
    "adapter": ("Adapter", "this run's adapter, without a passage"),
    "retrieval": ("Retrieval", "the base model with the passages that BM25 finds"),
    "embedding_retrieval": ("Retrieval by embeddings", "the base model with the passages whose embeddings are nearest"),
    "adapter_retrieval": ("Adapter + retrieval", "the adapter with these passages"),
    "gold_passage": ("Gold passage", "the base model with the passage that holds the answer"),
}
COMPARED = (
    ("adapter", "closed_book"),
    ("adapter", "raw_text"),
    ("adapter", "sft"),
    ("adapter", "previous"),
    ("adapter", "retrieval"),
    ("adapter", "embedding_retrieval"),
    ("adapter_retrieval", "retrieval"),
    ("adapter", "gold_passage"),
)
RIGHT = 0.5  # points from which a reply counts as right; with token F1, half of the words
CALIBRATION_BINS = 5
_PUNCTUATION = regex.compile(r"[\p{P}\p{S}]")
_THOUSANDS = regex.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_ARTICLE = regex.compile(r"\b(?:a|an|the)\b")
_LETTER = regex.compile(r"[\p{Latin}\p{Greek}\p{Cyrillic}]?")
_TELLING_END = regex.compile(r"\w\s+A\W*$|(?<!\w)\p{L}[+#\p{Pd}]+$")  # Schedule A, C++, Grade B-
_DASH = regex.compile(r"\p{Pd}")
_SYMBOLS = frozenset("+#-&%")

Points = dict[str, dict[str, list[float]]]  # arm -> metric -> one number per question


def normalise_answer(text: str) -> str:
    """Lower case, punctuation and articles out, white space folded (SQuAD; Rajpurkar et al. 2016).

    Of any script, so that a typographic quote is as good as a straight one; 2,400 is 2400.
    """
    text = _PUNCTUATION.sub(" ", _THOUSANDS.sub("", unicodedata.normalize("NFKC", text).lower()))
    return " ".join(_ARTICLE.sub(" ", text).split())


def comparable(answer: str) -> bool:
    """True if there is something in an accepted answer that a reply could match."""
    return bool(_compared(answer, "")[0])


def _compared(answer: str, reply: str) -> tuple[str, str]:
    """Return both as they are compared, the answer as "" if nothing is left of it.

    By SQuAD's rules, for which the A of "Schedule A" is an article and "C++" a C: what ends so, and a single letter, is
    compared as a word of its own, with article and symbols; a lone A or B must be a capital in the reply, too.
    """
    short = normalise_answer(answer)
    if not _LETTER.fullmatch(short) and not _TELLING_END.search(answer):
        return short, normalise_answer(reply)
    answer, reply = (_DASH.sub("-", unicodedata.normalize("NFKC", text)) for text in (answer, reply))
    symbols = _SYMBOLS & set(answer)
    wanted, said = (
        " ".join(_PUNCTUATION.sub(lambda m: m[0] if m[0] in symbols else " ", text).split()) for text in (answer, reply)
    )
    if wanted != "A" and not _ARTICLE.sub("", wanted.lower()).strip():
        return "", said
    return (f" {wanted} ", f" {said} ") if len(wanted) == 1 else (f" {wanted.lower()} ", f" {said.lower()} ")


def substring_match(reply: str, answers: Sequence[str]) -> bool:
    """True if any accepted answer stands in the reply, both normalised (the paper's Appendix N).

    By characters, as there: "20" stands in "1205", too.
    """
    pairs = (_compared(answer, reply) for answer in answers)
    return any(wanted and wanted in said for wanted, said in pairs)


def token_f1(reply: str, answers: Sequence[str]) -> float:
    """Harmonic mean of token precision and recall, the best over the accepted answers (SQuAD).

    In scripts without spaces between words a character is a token, as in MLQA (Lewis et al. 2020).
    """

    def f1(answer: str) -> float:
        wanted, given = map(split_words, _compared(answer, reply))
        common = sum((Counter(given) & Counter(wanted)).values())
        return 2 * common / (len(given) + len(wanted)) if common else 0.0

    return max(map(f1, answers))


def make_report(points: Points, metric: str, settings: Evaluate) -> dict[str, Any]:
    """Means with intervals, paired differences, and the share of the gap that the adapter closes, by one metric.

    `gap_closed` is None if the gold passage is not clearly of help: if the interval of what it adds holds 0.
    """
    scores: dict[str, Any] = {}
    for arm in filter(points.__contains__, ARMS):
        scores[arm] = {}
        for name, values in points[arm].items():
            scores[arm] |= {name: float(np.mean(values)), f"{name}_interval": interval(values, settings)}
    of = {arm: np.asarray(points[arm][metric]) for arm in scores}
    comparisons = _compare(of, lambda values: float(values.mean()), lambda values: interval(values, settings, -1.0))
    ends = (of["closed_book"], of["gold_passage"], of["adapter"])
    closed, spread = None, None
    # A share of what may be no gap at all would be anything: -9 for nine questions that are lost where one is to gain.
    if interval(of["gold_passage"] - of["closed_book"], settings, -1.0)[0] > 0:
        closed = gap_closed(*ends)
        spread = _resample(lambda *arms, axis: _share(*(arm.mean(axis) for arm in arms)), ends, settings)
    return {
        "metric": metric,
        "questions": len(ends[0]),
        "scores": scores,
        "comparisons": comparisons,
        "gap_closed": closed,
        # The same share in every resample says nothing of how far it could be off.
        "gap_closed_interval": spread if spread and spread[0] < spread[1] else None,
    }


def gap_closed(closed: np.ndarray, gold: np.ndarray, adapter: np.ndarray) -> float | None:
    """Share of the gap between closed book and gold passage that the adapter closes; None if there is no gap."""
    return float(_share(closed.mean(), gold.mean(), adapter.mean())) if gold.mean() > closed.mean() else None


def _share(closed: Any, gold: Any, adapter: Any) -> Any:
    gap = gold - closed
    return np.where(gap > 0, adapter - closed, np.nan) / np.where(gap > 0, gap, 1.0)


def compare_kl(kl: dict[str, np.ndarray], tokens: np.ndarray, settings: Evaluate) -> dict[str, Any]:
    """Mean KL per token of every arm with its interval, and paired differences; `kl` has each answer's mean."""

    def per_token(sums: np.ndarray, counts: np.ndarray, axis: int) -> np.ndarray:
        return sums.mean(axis) / counts.mean(axis)

    def mean(values: np.ndarray) -> float:
        return float(per_token(values * tokens, tokens, 0))

    def spread(values: np.ndarray) -> list[float] | None:
        # Of one question all resamples are the same.
        return _resample(per_token, (values * tokens, tokens), settings) if len(tokens) > 1 else None

    return {
        "kl_to_teacher": {arm: mean(values) for arm, values in kl.items()},
        "kl_to_teacher_interval": {arm: spread(values) for arm, values in kl.items()},
        "kl_comparisons": _compare(kl, mean, spread),
    }


def _compare(
    values: dict[str, np.ndarray],
    mean: Callable[[np.ndarray], float],
    spread: Callable[[np.ndarray], list[float] | None],
) -> list[dict[str, Any]]:
    """Compare the arms question by question; `values` has one number per question."""
    differences = {
        (arm, other): values[arm] - values[other] for arm, other in COMPARED if arm in values and other in values
    }
    return [
        {
            "arm": arm,
            "over": other,
            "difference": mean(difference),
            "interval": spread(difference),
            "p": sign_test(difference),
        }
        for (arm, other), difference in differences.items()
    ]


def sign_test(differences: np.ndarray) -> float:
    """Two-sided p of so uneven a split into questions that are better and worse, if either were as likely.

    For points of 0 and 1 it is McNemar's test, exact (McNemar 1947).
    """
    from scipy.stats import binomtest

    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def interval(values: Any, settings: Evaluate, least: float = 0.0) -> list[float]:
    """95 % percentile bootstrap interval of the mean of values from `least` to 1.

    If all are equal, resampling says nothing. Then it says how far other values could move the mean that are so rare
    that a sample of this size has none once in forty: for 0 or n of n right, the exact binomial interval (Clopper and
    Pearson 1934).
    """
    values = np.asarray(values, dtype=float)
    if np.ptp(values) == 0:
        unseen = 1 - 0.025 ** (1 / len(values))
        return [float(values[0] + unseen * (end - values[0])) for end in (least, 1.0)]
    return _resample(np.mean, (values,), settings)


def _resample(statistic: Callable[..., Any], arms: tuple[np.ndarray, ...], settings: Evaluate) -> list[float]:
    if all(np.ptp(values) == 0 for values in arms):
        return [float(statistic(*arms, axis=0))] * 2
    from scipy.stats import DegenerateDataWarning, bootstrap

    # It warns of resamples that have no gap; their NaN is left out.
    with warnings.catch_warnings(action="ignore", category=DegenerateDataWarning):
        result = bootstrap(
            arms,
            statistic,
            paired=len(arms) > 1,
            n_resamples=settings.bootstrap_resamples,
            method="percentile",
            vectorized=True,
            rng=np.random.default_rng(settings.seed),
            batch=100,
        )
    low, high = np.nanpercentile(result.bootstrap_distribution, [2.5, 97.5])
    return [float(low), float(high)]


def calibrate(confidence: Sequence[float], right: Sequence[float]) -> dict[str, Any]:
    """Compare how sure an arm was with how often it was right, in bins of equally many replies.

    `confidence` is the geometric mean of a reply's token probabilities; `expected_error` is the mean distance of the
    two over the replies (expected calibration error, Guo et al. 2017).
    """
    order = np.argsort(confidence, kind="stable")
    sure, points = np.asarray(confidence)[order], np.asarray(right, dtype=float)[order]
    bins = [
        {"confidence": float(sure[part].mean()), "accuracy": float(points[part].mean()), "count": len(part)}
        for part in np.array_split(np.arange(len(order)), CALIBRATION_BINS)
        if len(part)
    ]
    error = sum(abs(each["confidence"] - each["accuracy"]) * each["count"] for each in bins) / max(1, len(order))
    return {"expected_error": float(error), "bins": bins}


def group_means(name: str, groups: Sequence[str], points: Points, metric: str) -> list[dict[str, Any]]:
    """Mean of every arm in every group, the groups where the adapter does worst first; [] if nothing is grouped."""
    if not any(groups):
        return []
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    rows = []
    for group, chosen in members.items():
        means = {arm: float(np.mean([metrics[metric][index] for index in chosen])) for arm, metrics in points.items()}
        rows.append({name: group, "questions": len(chosen), **means})
    return sorted(rows, key=lambda row: row["adapter"])
