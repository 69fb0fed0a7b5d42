"""Packing: no sample is lost, none sees another, answer positions hold the answers."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.align import check_mask
from pipeline.batch import (
    AnswerData,
    Sample,
    common_opening,
    pack,
    plan_epoch,
    plan_run,
    rows_in_order,
    samples_of,
    topk_of,
)
from pipeline.schema import ANSWER

samples_strategy = st.lists(
    st.tuples(st.integers(1, 30), st.integers(1, 20)).map(
        lambda sizes: Sample(np.arange(1, sizes[0] + 1), np.arange(101, 101 + sizes[1]))
    ),
    min_size=1,
    max_size=40,
)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=200), st.integers(0, 5))
@settings(deadline=None, max_examples=50)
def test_a_plan_holds_every_sample_once_and_respects_the_rows(lengths: list[int], seed: int) -> None:
    sizes = np.asarray(lengths)
    plan = plan_epoch(sizes, batch_tokens=1024, row_tokens=256, seed=seed)
    assert sorted(index for step in plan for row in step for index in row) == list(range(len(lengths)))
    for step in plan:
        assert step
        for row in step:
            assert sizes[row].sum() <= 256 or len(row) == 1
        assert sum(max(1, -(-int(sizes[row].sum()) // 256)) for row in step) <= 4 or len(step) == 1


def test_general_samples_take_their_share_and_their_turns() -> None:
    lengths = np.full(100, 50)
    plan = plan_run(lengths, [80, 20], [0.2], epochs=3, batch_tokens=512, row_tokens=256, seed=0)
    counts = np.bincount([index for step in plan for row in step for index in row], minlength=100)
    assert (counts[:80] == 3).all(), "every answer once an epoch"
    assert counts[80:].sum() == 3 * 20 and (counts[80:] == 3).all(), "each general sample before one comes again"
    without = plan_run(lengths, [80, 20], [0.0], epochs=1, batch_tokens=512, row_tokens=256, seed=0)
    assert sorted(index for step in without for row in step for index in row) == list(range(80))
    replayed = plan_run(lengths, [10, 70, 20], [0.5, 0.25], epochs=2, batch_tokens=512, row_tokens=256, seed=0)
    counts = np.bincount([index for step in replayed for row in step for index in row], minlength=100)
    assert (counts[:10] == 2).all() and counts[10:80].sum() == 2 * 20 and counts[80:].sum() == 2 * 10
    assert counts[10:].max() == 1, "no sample comes again before all others of its group"


def test_nothing_new_gives_no_steps() -> None:
    assert plan_epoch(np.empty(0, int), batch_tokens=512, row_tokens=256, seed=0) == []
    assert plan_run(np.full(30, 50), [0, 20, 10], [0.5, 0.2], epochs=3, batch_tokens=512, row_tokens=256, seed=0) == []


def test_a_worker_without_work_has_a_batch_all_the_same() -> None:
    ids, logprobs = topk_of(ANSWER.empty_table(), len(pack([], []).answer_index))
    assert len(ids) == len(logprobs) == 0


def test_padding_stays_under_five_percent() -> None:
    lengths = np.random.default_rng(0).integers(30, 110, 2000)
    plan = plan_epoch(lengths, batch_tokens=4096, row_tokens=512, seed=0)
    rows = sum(len(step) for step in plan)
    assert 1 - lengths.sum() / (rows * 512) < 0.05


def test_the_order_depends_on_the_seed_alone() -> None:
    lengths = np.random.default_rng(0).integers(10, 100, 300)
    plans = [plan_epoch(lengths, 1024, 256, seed) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]


@given(samples_strategy, st.integers(64, 256))
@settings(deadline=None, max_examples=50)
def test_answer_positions_predict_the_answers(samples: list[Sample], row_tokens: int) -> None:
    counts = rows_in_order(samples, row_tokens)
    assert sum(counts) == len(samples)
    packed = pack(samples, counts)
    width = packed.input_ids.shape[1]
    expected_inputs = np.concatenate([[s.prompt_ids[-1], *s.answer_ids[:-1]] for s in samples])
    flat = packed.input_ids.flatten()
    assert flat[packed.answer_index].tolist() == expected_inputs.tolist()
    visible = packed.attention_mask[:, 0] == 0
    seen = visible.sum(-1).flatten()[packed.answer_index]
    positions = packed.position_ids.flatten()[packed.answer_index]
    assert (seen == positions + 1).all(), f"a sample sees more or less than itself in rows of {width}"
    texts = [np.concatenate([s.prompt_ids, s.answer_ids[:-1]]) for s in samples for _ in s.answer_ids]
    for place, text, position in zip(packed.answer_index.tolist(), texts, positions.tolist(), strict=True):
        row, column = divmod(place, width)
        assert packed.input_ids[row][visible[row, column]].tolist() == text[: position + 1].tolist()
    check_mask(samples)


def test_the_guard_sees_a_shifted_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    import pipeline.align

    def shifted(samples: list[Sample], counts: list[int]) -> object:
        packed = pack(samples, counts)
        return dataclasses.replace(packed, answer_index=packed.answer_index - 1)

    monkeypatch.setattr(pipeline.align, "pack", shifted)
    with pytest.raises(ValueError, match="alignment guard"):
        check_mask([Sample(np.arange(5), np.arange(10, 14)), Sample(np.arange(3), np.arange(20, 29))])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_samples_get_the_states_and_gradients_they_get_alone(attention: str) -> None:
    """Those that share the opening of a row, too: its gradients are the sum of what each sample would have given."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention).model
    rng = np.random.default_rng(0)
    opening = np.arange(5)
    samples = [
        Sample(
            np.concatenate([opening, rng.integers(0, 64, rng.integers(2, 9))]), rng.integers(0, 64, rng.integers(1, 9))
        )
        for _ in range(7)
    ]

    def gradients(states: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        states.square().sum().backward()
        return [value.grad.clone() for value in model.parameters() if value.grad is not None]

    packed = pack(samples, [3, 1, 3])
    states = model(
        input_ids=packed.input_ids, position_ids=packed.position_ids, attention_mask=packed.attention_mask.float()
    ).last_hidden_state.flatten(0, 1)[packed.answer_index]
    alone = torch.cat(
        [
            model(
                input_ids=torch.from_numpy(np.concatenate([s.prompt_ids, s.answer_ids[:-1]]))[None]
            ).last_hidden_state[0, len(s.prompt_ids) - 1 :]
            for s in samples
        ]
    )
    torch.testing.assert_close(states, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients(states), gradients(alone), rtol=1e-3, atol=1e-4)


def test_what_all_prompts_begin_with_stands_in_a_row_once() -> None:
    opening, rng = np.arange(20), np.random.default_rng(0)
    prompts = [np.concatenate([opening, rng.integers(100, 200, 4)]) for _ in range(200)]
    rows = [
        dict.fromkeys(ANSWER.names) | {"prompt_ids": prompt, "answer_ids": np.arange(rng.integers(2, 40))}
        for prompt in prompts
    ]
    data = AnswerData([pa.Table.from_pylist(rows[:150], ANSWER)], [pa.Table.from_pylist(rows[150:], ANSWER)])
    assert data.opening == common_opening(samples_of(data.table)) == 20
    plan = plan_run(data.lengths(), data.sizes, [0.25], 1, 256, 128, seed=0, opening=data.opening)
    packed_rows = [row for step in plan for row in step]
    widths = [pack(samples_of(data.take(row)), [len(row)]).input_ids.shape[1] for row in packed_rows]
    assert max(widths) <= 128 and np.mean(widths) > 0.95 * 128
    apart = plan_run(data.lengths(), data.sizes, [0.25], 1, 256, 128, seed=0)
    assert len(plan) < 0.75 * len(apart)


def test_no_samples_give_one_row_of_padding() -> None:
    packed = pack([], [])
    assert packed.input_ids.shape == (1, 1)
    assert len(packed.answer_index) == 0
