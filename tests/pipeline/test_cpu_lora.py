"""LoRA on the CPU build against one product per row, and against what vLLM does itself."""

import pytest
import torch

vllm = pytest.importorskip("vllm")

from vllm.lora.layers import LoRAMapping  # noqa: E402
from vllm.lora.ops.torch_ops import bgmv_expand_slice, bgmv_shrink  # noqa: E402
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU  # noqa: E402

import pipeline.cpu_lora  # noqa: E402, F401

SLOTS, RANK, WIDTH, SLICES = 3, 4, 16, (8, 24)


def weights(dtype: torch.dtype) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    a = tuple(torch.randn(SLOTS, 1, RANK, WIDTH, dtype=dtype) for _ in SLICES)
    b = tuple(torch.randn(SLOTS, 1, size, RANK, dtype=dtype) for size in SLICES)
    return a, b


def apply(row_ids: list[int], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x, y before and y after, for rows that name adapter ids 11, 12, 13 in slots 0, 1, 2, or 0 for none."""
    wrapper = PunicaWrapperCPU(64, 8, "cpu", max_loras=SLOTS)
    wrapper.update_metadata(LoRAMapping(tuple(row_ids), tuple(row_ids), is_prefill=True), [11, 12, 13], SLOTS, 100)
    x, before = torch.randn(len(row_ids), WIDTH, dtype=dtype), torch.randn(len(row_ids), sum(SLICES), dtype=dtype)
    after = before.clone()
    wrapper.add_lora_linear(after, x, *weights(dtype), 1.0, SLICES)
    return x, before, after


@pytest.mark.parametrize("row_ids", [[11, 0, 13, 13, 12, 0, 11], [12] * 5, [0, 0], [13, 0], [11], [12, 13, 12, 13]])
def test_every_row_gets_its_own_adapter_and_the_others_none(row_ids: list[int]) -> None:
    x, before, after = apply(row_ids)
    a, b = weights(torch.float32)
    for row, lora_id in enumerate(row_ids):
        wanted, slot = before[row], lora_id - 11
        if lora_id:
            wanted = wanted + torch.cat([bs[slot, 0] @ as_[slot, 0] @ x[row] for as_, bs in zip(a, b, strict=True)])
        torch.testing.assert_close(after[row], wanted)


def test_it_agrees_with_vllm_where_every_row_has_an_adapter() -> None:
    row_ids = [11, 13, 13, 12]
    x, before, after = apply(row_ids)
    slots, start, wanted = torch.tensor(row_ids) - 11, 0, before.clone()
    for a, b, size in zip(*weights(torch.float32), SLICES, strict=True):
        shrunk = torch.zeros(len(row_ids), RANK)
        bgmv_shrink(x, a, shrunk, slots, 1.0)
        bgmv_expand_slice(shrunk, b, wanted, slots, start, size, add_inputs=True)
        start += size
    torch.testing.assert_close(after, wanted)


def test_bf16_stays_within_its_precision() -> None:
    row_ids = [11, 0, 12]
    x, before, after = apply(row_ids, torch.bfloat16)
    a, b = weights(torch.bfloat16)
    exact = torch.cat([bs[0, 0].float() @ (as_[0, 0].float() @ x[0].float()) for as_, bs in zip(a, b, strict=True)])
    torch.testing.assert_close(after[0].float(), before[0].float() + exact, rtol=0.02, atol=0.2)
