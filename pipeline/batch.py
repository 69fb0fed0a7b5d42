"""Answers -> packed tensors, answer positions aligned.

In: tables of answers. Out: a plan of steps and rows that depends on lengths and the seed alone (so any number of
workers, and a resumed run, walk through the same samples), and the tensors of one micro-batch.
Several samples share a row; none sees another, but the tokens that all their prompts begin with, the chat template's
opening, stand there once for all: what they see, and the sum of the gradients, is the same as if each had its own.
"""

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from pipeline.schema import ANSWER

Row = list[int]  # indices of the samples that share a packed row
Step = list[Row]  # rows of one optimiser step, over all workers
OPENING, PADDING = -1, -2  # segments of a row that belong to no one sample


class Sample(NamedTuple):
    """Token ids of a prompt and the answer behind it."""

    prompt_ids: np.ndarray
    answer_ids: np.ndarray

    @property
    def length(self) -> int:
        """The last answer token is predicted, never read."""
        return len(self.prompt_ids) + len(self.answer_ids) - 1


@dataclass(frozen=True)
class Packed:
    """Samples packed into rows; `answer_index` lists, sample by sample, the positions that predict answer tokens."""

    input_ids: Tensor  # int64 [rows, L]
    position_ids: Tensor  # int64 [rows, L], from zero in every sample; each goes on behind the shared opening
    attention_mask: Tensor  # bf16 [rows, 1, L, L], added to the scores: zero for a sample's earlier tokens and opening
    answer_index: Tensor  # int64 [A], into the flattened [rows * L]

    def to(self, device: torch.device) -> "Packed":
        """Return the same on another device."""
        return Packed(
            self.input_ids.to(device),
            self.position_ids.to(device),
            self.attention_mask.to(device),
            self.answer_index.to(device),
        )


class AnswerData:
    """Random access to answers on local disk, memory-mapped: memory does not grow with their number."""

    def __init__(self, *groups: Iterable[pa.Table]) -> None:
        """Copy the rows, group by group, into a temporary Arrow file; it lives as long as this object."""
        self._folder = tempfile.TemporaryDirectory(prefix="answers-")
        path = Path(self._folder.name) / "answers.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, ANSWER) as writer:
            self.sizes = [sum(_write(writer, table) for table in group) for group in groups]
        self.table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        self._prompt_tokens, self._answer_tokens = (
            np.asarray(pc.call_function("list_value_length", [self.table[name]]))
            for name in ("prompt_ids", "answer_ids")
        )
        self.opening = self._find_opening()

    def __len__(self) -> int:
        return self.table.num_rows

    def lengths(self) -> np.ndarray:
        """Return the tokens that the student reads of each sample, [samples]."""
        return self._prompt_tokens + self._answer_tokens - 1

    def count_tokens(self, indices: Sequence[int]) -> tuple[int, int]:
        """Return the answer tokens of some samples, and all their tokens."""
        answer_tokens = int(self._answer_tokens[indices].sum())
        return answer_tokens, answer_tokens + int(self._prompt_tokens[indices].sum()) - len(indices)

    def answer_tokens_per_step(self, plan: Sequence[Step]) -> float:
        """Return the mean over the steps of a plan."""
        samples = list(chain.from_iterable(chain.from_iterable(plan)))
        return self.count_tokens(samples)[0] / max(1, len(plan))

    def take(self, indices: Sequence[int]) -> pa.Table:
        # Row by row: `Table.take` would first copy all chunks of a list column into one.
        return pa.concat_tables([ANSWER.empty_table(), *(self.table.slice(index, 1) for index in indices)])

    def _find_opening(self) -> int:
        """Return the `common_opening` of all samples."""
        shortest = min(self._prompt_tokens, default=1)
        for place in range(shortest - 1):
            tokens = pc.call_function("list_element", [self.table["prompt_ids"], pa.scalar(place)])
            bounds = pc.call_function("min_max", [tokens]).as_py()
            if bounds["min"] != bounds["max"]:
                return place
        return int(shortest) - 1


def _write(writer: Any, table: pa.Table) -> int:
    writer.write_table(table)
    return table.num_rows


def samples_of(answers: pa.Table) -> list[Sample]:
    """The student's view of a few answers."""
    columns = (answers[name].combine_chunks() for name in ("prompt_ids", "answer_ids"))
    prompts, replies = ([np.asarray(row.values) for row in column] for column in columns)
    return [Sample(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]


def topk_of(answers: pa.Table, num_answer_tokens: int) -> tuple[Tensor, Tensor]:
    """Return the stored top-k of all answer tokens: ids int64 [A, k] and log-probabilities float32 [A, k]."""
    ids, logprobs = (np.asarray(answers[name].combine_chunks().flatten()) for name in ("topk_ids", "topk_logprobs"))
    shape = (num_answer_tokens, len(ids) // max(1, num_answer_tokens))  # a worker without work has no answers
    ids, logprobs = ids.reshape(shape), logprobs.reshape(shape)
    return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(logprobs.astype(np.float32))


def plan_run(
    lengths: np.ndarray,
    sizes: Sequence[int],
    shares: Sequence[float],
    epochs: int,
    batch_tokens: int,
    row_tokens: int,
    seed: int,
    opening: int = 0,
) -> list[Step]:
    """Plan all epochs over groups of samples that lie one behind the other, `sizes[i]` of them in group i.

    An epoch has every sample of the first group once, and of each other group so many that they are its share of the
    epoch's samples (`shares`, one less than `sizes`): the next ones in a shuffled order that goes on from epoch to
    epoch, so that each is used before one is used twice.
    """
    starts = np.cumsum(sizes)
    shares = [share if size else 0.0 for size, share in zip(sizes[1:], shares, strict=True)]
    num_samples = sizes[0] / (1 - sum(shares))
    generator = np.random.default_rng(seed)
    turns = [
        (start + generator.permutation(size), round(share * num_samples))
        for start, size, share in zip(starts, sizes[1:], shares, strict=False)
    ]
    steps = []
    for epoch in range(epochs):
        picked = [
            np.take(order, np.arange(epoch * wanted, (epoch + 1) * wanted), mode="wrap")
            for order, wanted in turns
            if wanted
        ]
        samples = np.concatenate([np.arange(sizes[0]), *picked])
        for step in plan_epoch(lengths[samples], batch_tokens, row_tokens, seed + epoch, opening):
            steps.append([samples[row].tolist() for row in step])
    return steps


def plan_epoch(lengths: np.ndarray, batch_tokens: int, row_tokens: int, seed: int, opening: int = 0) -> list[Step]:
    """Shuffle the samples, pack them best-fit into rows of `row_tokens`, and group the rows into steps; none give none.

    Of the `lengths`, the first `opening` tokens are the same in all samples and stand in a row once. A sample longer
    than a row gets a row of its own and counts for as many rows as it needs.
    """
    rows_per_step = max(1, batch_tokens // row_tokens)
    window = rows_per_step * 8  # rows open at a time: enough choice for a tight fit, few enough for a random order
    done: list[tuple[int, Row]] = []
    open_rows: list[tuple[int, Row]] = []  # free tokens, samples
    for index in np.random.default_rng(seed).permutation(len(lengths)).tolist():
        length = int(lengths[index]) - opening
        fitting = [place for place, (free, _) in enumerate(open_rows) if free >= length]
        if fitting:
            place = min(fitting, key=lambda place: open_rows[place][0])
            free, row = open_rows[place]
            row.append(index)
            open_rows[place] = (free - length, row)
        else:
            open_rows.append((row_tokens - opening - length, [index]))
        if len(open_rows) > window:
            done.append(open_rows.pop(min(range(len(open_rows)), key=lambda place: open_rows[place][0])))
    done += open_rows
    steps: list[Step] = [[]]
    weight = 0
    for free, row in done:
        needed = max(1, -(-(row_tokens - free) // row_tokens))
        if steps[-1] and weight + needed > rows_per_step:
            steps.append([])
            weight = 0
        steps[-1].append(row)
        weight += needed
    return steps if done else []


def rows_in_order(samples: Sequence[Sample], row_tokens: int) -> list[int]:
    """Return how many consecutive samples go into each row, so that rows hold at most `row_tokens` where they can."""
    counts, free = [], -1
    for sample in samples:
        free -= sample.length
        if free < 0:
            counts.append(0)
            free = row_tokens - sample.length
        counts[-1] += 1
    return counts


def pack(samples: Sequence[Sample], row_counts: Sequence[int], pad_id: int = 0) -> Packed:
    """Lay out the samples in order, `row_counts[i]` of them in row i; rows are padded to the longest.

    A row begins with what all its prompts begin with, once. Padding sees only that and itself. No samples give one row
    of padding, so that a worker without work still takes part.
    """
    ends = np.cumsum(row_counts)
    rows = [samples[end - count : end] for end, count in zip(ends, row_counts, strict=True)]
    openings = [common_opening(row) for row in rows]
    used = [
        opening + sum(sample.length - opening for sample in row) for opening, row in zip(openings, rows, strict=True)
    ]
    width = max(used, default=1)
    shape = (max(1, len(rows)), width)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    segments = np.full(shape, PADDING, dtype=np.int64)
    answer_index = [np.empty(0, dtype=np.int64)]
    for number, (opening, row) in enumerate(zip(openings, rows, strict=True)):
        input_ids[number, :opening] = row[0].prompt_ids[:opening]
        position_ids[number, :opening] = np.arange(opening)
        segments[number, :opening] = OPENING
        start = opening
        for segment, sample in enumerate(row):
            end = start + sample.length - opening
            input_ids[number, start:end] = np.concatenate([sample.prompt_ids[opening:], sample.answer_ids[:-1]])
            position_ids[number, start:end] = np.arange(opening, sample.length)
            segments[number, start:end] = segment
            first = number * width + start + len(sample.prompt_ids) - opening - 1
            answer_index.append(np.arange(first, first + len(sample.answer_ids)))
            start = end
    ids = torch.from_numpy(segments)
    belongs = (ids[:, :, None] == ids[:, None, :]) | (ids[:, None, :] == OPENING)
    # Padding sees the padding before it: a position that sees nothing would give NaN.
    sees = (belongs & torch.ones(width, width, dtype=torch.bool).tril()).unsqueeze(1)
    mask = torch.zeros(sees.shape, dtype=torch.bfloat16).masked_fill_(~sees, torch.finfo(torch.bfloat16).min)
    return Packed(
        torch.from_numpy(input_ids),
        torch.from_numpy(position_ids),
        mask,
        torch.from_numpy(np.concatenate(answer_index)),
    )


def common_opening(samples: Sequence[Sample]) -> int:
    """Return how many tokens all prompts begin with; each keeps one of its own, which predicts its answer."""
    opening = min((len(sample.prompt_ids) for sample in samples), default=1) - 1
    for sample in samples[1:]:
        differs = np.flatnonzero(sample.prompt_ids[:opening] != samples[0].prompt_ids[:opening])
        opening = int(differs[0]) if len(differs) else opening
    return opening
