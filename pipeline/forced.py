"""A vLLM logits processor under which a request can only say the tokens that it is given."""

from functools import partial
from typing import Any

from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

FORCED = "forced"


class ForcedReply(AdapterLogitsProcessor):
    """Forces the tokens in `extra_args["forced"]`; the raw log-probabilities it reports stay as they were."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        forced = (params.extra_args or {}).get(FORCED)
        return partial(_force, forced) if forced else None


def _force(forced: list[int], said: list[int], logits: Tensor) -> Tensor:
    if len(said) < len(forced):  # vLLM may run a step ahead of a request's end
        logits[forced[len(said)]] = float("inf")
    return logits
