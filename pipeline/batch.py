"""Answers -> packed tensors, answer positions aligned.

In: tables of answers. Out: a plan of steps and rows that depends on lengths and the seed alone (so any number of
workers, and a resumed run, walk through the same samples), and the tensors of one micro-batch.
Several samples share a row; none sees another.
"""

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
    position_ids: Tensor  # int64 [rows, L], from zero in every sample
    attention_mask: Tensor  # bf16 [rows, 1, L, L], added to the scores: zero for earlier tokens of the same sample
    answer_index: Tensor  # int64 [A], into the flattened [rows * L]
    num_tokens: int  # without padding

    def to(self, device: torch.device) -> "Packed":
        """Return the same on another device."""
        return Packed(
            self.input_ids.to(device),
            self.position_ids.to(device),
            self.attention_mask.to(device),
            self.answer_index.to(device),
            self.num_tokens,
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

    def __len__(self) -> int:
        return self.table.num_rows

    def lengths(self) -> np.ndarray:
        """Return the tokens that each sample takes in a row, [samples]."""
        return self._prompt_tokens + self._answer_tokens - 1

    def count_tokens(self, indices: Sequence[int]) -> tuple[int, int]:
        """Return the answer tokens of some samples, and all their tokens."""
        answer_tokens = int(self._answer_tokens[indices].sum())
        return answer_tokens, answer_tokens + int(self._prompt_tokens[indices].sum()) - len(indices)

    def take(self, indices: Sequence[int]) -> pa.Table:
        return self.table.take(pa.array(indices, pa.int64()))


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
        for step in plan_epoch(lengths[samples], batch_tokens, row_tokens, seed + epoch):
            steps.append([samples[row].tolist() for row in step])
    return steps


def plan_epoch(lengths: np.ndarray, batch_tokens: int, row_tokens: int, seed: int) -> list[Step]:
    """Shuffle the samples, pack them best-fit into rows of `row_tokens`, and group the rows into steps; none give none.

    A sample longer than a row gets a row of its own and counts for as many rows as it needs.
    """
    rows_per_step = max(1, batch_tokens // row_tokens)
    window = rows_per_step * 8  # rows open at a time: enough choice for a tight fit, few enough for a random order
    done: list[tuple[int, Row]] = []
    open_rows: list[tuple[int, Row]] = []  # free tokens, samples
    for index in np.random.default_rng(seed).permutation(len(lengths)).tolist():
        length = int(lengths[index])
        fitting = [place for place, (free, _) in enumerate(open_rows) if free >= length]
        if fitting:
            place = min(fitting, key=lambda place: open_rows[place][0])
            free, row = open_rows[place]
            row.append(index)
            open_rows[place] = (free - length, row)
        else:
            open_rows.append((row_tokens - length, [index]))
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

    Padding sees only itself. No samples give one row of padding, so that a worker without work still takes part.
    """
    ends = np.cumsum(row_counts)
    rows = [samples[end - count : end] for end, count in zip(ends, row_counts, strict=True)]
    width = max((sum(sample.length for sample in row) for row in rows), default=1)
    shape = (max(1, len(rows)), width)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    segments = np.full(shape, -1, dtype=np.int64)
    answer_index = [np.empty(0, dtype=np.int64)]
    num_tokens = 0
    for number, row in enumerate(rows):
        start = 0
        for segment, sample in enumerate(row):
            end = start + sample.length
            input_ids[number, start:end] = np.concatenate([sample.prompt_ids, sample.answer_ids[:-1]])
            position_ids[number, start:end] = np.arange(sample.length)
            segments[number, start:end] = segment
            first = number * width + start + len(sample.prompt_ids) - 1
            answer_index.append(np.arange(first, first + len(sample.answer_ids)))
            start = end
        num_tokens += start
    ids = torch.from_numpy(segments)
    same = ids[:, :, None] == ids[:, None, :]
    # Padding sees the padding before it: a position that sees nothing would give NaN.
    sees = (same & torch.ones(width, width, dtype=torch.bool).tril()).unsqueeze(1)
    mask = torch.zeros(sees.shape, dtype=torch.bfloat16).masked_fill_(~sees, torch.finfo(torch.bfloat16).min)
    return Packed(
        torch.from_numpy(input_ids),
        torch.from_numpy(position_ids),
        mask,
        torch.from_numpy(np.concatenate(answer_index)),
        num_tokens,
    )
