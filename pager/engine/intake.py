"""Which requests an engine can serve at all; asked before one is queued."""

from __future__ import annotations

from dataclasses import dataclass

from pager.errors import InvalidRequest, PromptTooLong
from pager.sampling_rules import check_sampling
from pager.types import GenerateRequest


@dataclass(frozen=True, slots=True)
class Intake:
    """What bounds a single request: the model's context and vocabulary, and the tokens that all of KV memory holds."""

    context_tokens: int
    kv_tokens: int
    vocab_size: int

    def check(self, request: GenerateRequest) -> None:
        """Raises InvalidRequest or PromptTooLong. Pools are checked by who reserves them."""
        check_sampling(request.sampling)
        if not request.prompt_token_ids:
            raise InvalidRequest("the prompt is empty; give at least one token", field="prompt")
        for token_id in (min(request.prompt_token_ids), max(request.prompt_token_ids)):
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequest(
                    f"token id {token_id} is outside the vocabulary of {self.vocab_size}", field="prompt"
                )
        prompt, answer = len(request.prompt_token_ids), request.sampling.max_tokens
        if prompt + answer > self.context_tokens:
            raise PromptTooLong(
                f"{prompt} prompt tokens and max_tokens {answer} are {prompt + answer}, more than the context of "
                f"{self.context_tokens}; shorten the prompt or ask for fewer tokens",
                field="prompt" if prompt >= self.context_tokens else "sampling.max_tokens",
            )
        if prompt + answer - 1 > self.kv_tokens:
            raise PromptTooLong(
                f"{prompt} prompt tokens and max_tokens {answer} need KV for {prompt + answer - 1} tokens and there is "
                f"room for {self.kv_tokens}; shorten the prompt, ask for fewer tokens or raise kv_memory",
                field="prompt" if prompt >= self.kv_tokens else "sampling.max_tokens",
            )
