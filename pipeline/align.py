"""The alignment guard: proof, before the first step, that student and teacher speak of the same tokens.

In: the stored answers, the config, the base model. Out: nothing, or a `ValueError` that shows where they differ.
A student trained on shifted or foreign targets has a normal loss curve, so this is checked and not hoped for.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.batch import Sample, pack, samples_of, topk_of
from pipeline.config import Config
from pipeline.engine import load_tokenizer, render_chat
from pipeline.loss import Labels
from pipeline.prompts import student_chat, teacher_chat
from pipeline.store import Stage
from pipeline.student import Student

NUM_CHECKED = 8
# bf16 logits of size 20 differ by up to 0.06 between two implementations; a wrong template moves the mean by nats.
MAX_MEAN_DIFFERENCE = 0.2


class TeacherPrompts:
    """The teacher's prompts of given answers, rendered from the stored passages and questions."""

    def __init__(self, config: Config, units: Iterable[str] | None = None) -> None:
        """Load the passages and questions of some units of the filter stage; unset: of all."""
        self.tokenizer = load_tokenizer(config.model.path)
        passages, questions = Stage(config.run_dir, "chunk"), Stage(config.run_dir, "question")
        self._passages: dict[str, dict[str, Any]] = {}
        self._questions: dict[str, str] = {}
        for unit in Stage(config.run_dir, "filter").committed() if units is None else units:
            self._passages |= {row["passage_id"]: row for row in passages.read_shard(f"{unit}.parquet").to_pylist()}
            self._questions |= {row["question_id"]: row["text"] for row in questions.read_unit(unit).to_pylist()}

    def of(self, answers: pa.Table) -> list[np.ndarray]:
        """Return the prompt of every answer; general answers have no passage, so theirs is the student's."""
        prompts = []
        for row in answers.select(["passage_id", "question_id", "prompt_ids"]).to_pylist():
            if not row["passage_id"]:
                prompts.append(np.asarray(row["prompt_ids"]))
                continue
            passage = self._passages[row["passage_id"]]
            chat = teacher_chat(passage["text"], passage["heading"], self._questions[row["question_id"]])
            prompts.append(np.asarray(render_chat(self.tokenizer, chat)))
        return prompts

    def student_prompts(self, answers: pa.Table) -> list[list[int]]:
        return [
            render_chat(self.tokenizer, student_chat(self._questions[question_id]))
            for question_id in answers["question_id"].to_pylist()
        ]


def check_alignment(config: Config, student: Student, device: torch.device) -> None:
    """Compare some stored answers with what student and teacher, the same network on `device`, make of them now.

    Raises ValueError if the prompts differ, if the packed answer positions do not hold the answer, or if the base
    model with the passage in its prompt does not give the stored log-probabilities.
    """
    filtered = Stage(config.run_dir, "filter")
    units = [unit.name for unit in filtered.units() if unit.rows_out]
    units = [units[index] for index in spaced(len(units))]
    data = pa.concat_tables(map(filtered.read_unit, units))
    answers = data.take(spaced(len(data)))
    prompts = TeacherPrompts(config, units)
    samples = samples_of(answers)
    for answer_id, sample, prompt in zip(
        answers["answer_id"].to_pylist(), samples, prompts.student_prompts(answers), strict=True
    ):
        if sample.prompt_ids.tolist() != prompt:
            raise ValueError(
                f"alignment guard: answer {answer_id} was stored with another student prompt:\n"
                f"stored: {prompts.tokenizer.decode(sample.prompt_ids)!r}\nnow:    {prompts.tokenizer.decode(prompt)!r}"
            )
    check_mask(samples)
    teacher = [Sample(prompt, s.answer_ids) for prompt, s in zip(prompts.of(answers), samples, strict=True)]
    packed = pack(teacher, [1] * len(teacher))
    ids, logprobs = topk_of(answers, len(packed.answer_index))
    with student.adapter_off():
        now = -student(packed.to(device), Labels(ids[:, 0].to(device))).cpu()
    difference = (now - logprobs[:, 0]).abs()
    if not difference.mean() <= MAX_MEAN_DIFFERENCE:
        worst = int(difference.argmax())
        owner = int(np.searchsorted(np.cumsum([len(s.answer_ids) for s in samples]), worst, side="right"))
        raise ValueError(
            f"alignment guard: the teacher's stored log-probabilities are not those of {config.model.path}: mean "
            f"difference {difference.mean():.2f} nats (at most {MAX_MEAN_DIFFERENCE}), worst in answer "
            f"{answers['answer_id'][owner]} at token {prompts.tokenizer.decode([int(ids[worst, 0])])!r}: stored "
            f"{logprobs[worst, 0]:.2f}, now {now[worst]:.2f}"
        )


def spaced(count: int) -> list[int]:
    """Return at most `NUM_CHECKED` indices, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, NUM_CHECKED).astype(int)).tolist()


def check_mask(samples: list[Sample]) -> None:
    """Raise ValueError unless the packed answer positions predict exactly the answers."""
    packed = pack(samples, [len(samples)])
    following = torch.roll(packed.input_ids.flatten(), -1)[packed.answer_index]
    expected = np.concatenate([sample.answer_ids for sample in samples])
    # The token behind the last position of an answer is the next sample's, or padding: it is predicted, never read.
    inside = np.ones(len(expected), dtype=bool)
    inside[np.cumsum([len(sample.answer_ids) for sample in samples]) - 1] = False
    wrong = np.flatnonzero((following.numpy() != expected) & inside)
    if len(following) != len(expected) or len(wrong):
        raise ValueError(f"alignment guard: packed answer positions {wrong[:5].tolist()} do not hold the answer tokens")
