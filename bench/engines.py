# SPDX-License-Identifier: Apache-2.0
"""The two engines under one stopwatch: Spanker on a fleet, llama.cpp through llama-cpp-python.

Both do the same piece of work on the same token ids.  Spanker answers greedily through its whole
runtime (actors, messages, sampling, detokenising); llama.cpp only evaluates forced tokens, with the
package's defaults but for the numbers of threads and positions.

While one engine works the other sleeps: an idle fleet waits in the kernel, and llama.cpp's threads
stop spinning during the pause before the other's turn.
"""

from __future__ import annotations

import time
from typing import Any

import spanker

PROMPT_TOKENS = 5
DECODE_TOKENS = 128
PREFILL_TOKENS = 512
# Positions of a sequence where only short ones are measured.
CONTEXT = 1024
# llama.cpp's OpenMP threads spin for some milliseconds after their work.
PAUSE_S = 0.1

# In every vocabulary of the benchmarks, and past the bytes and control tokens of all of them.
_FIRST_ID, _IDS = 300, 30000


def made_up_prompt(tokens: int) -> list[int]:
    """Token ids that no prefix repeats."""
    return [_FIRST_ID + (i * 7919) % _IDS for i in range(tokens)]


def llama_cpp_version() -> str | None:
    """The version of llama-cpp-python in this interpreter, or None."""
    try:
        import llama_cpp
    except ImportError:
        return None
    return str(llama_cpp.__version__)


def llama_cpp_features() -> str:
    """What llama.cpp says it was compiled with."""
    import llama_cpp

    return bytes(llama_cpp.llama_print_system_info()).decode().strip()


class LlamaCpp:
    """A model in llama.cpp with a number of threads.  Its calls block."""

    def __init__(self, path: str, threads: int, context: int = CONTEXT) -> None:
        from llama_cpp import Llama

        self._llama: Any = Llama(
            path,
            n_ctx=context,
            n_batch=PREFILL_TOKENS,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        self._prefilled = 0

    def close(self) -> None:
        self._llama.close()

    def decode(self) -> float:
        """Tokens a second after a short prompt."""
        return self.decode_at(PROMPT_TOKENS, DECODE_TOKENS)

    def decode_at(self, position: int, tokens: int) -> float:
        """Tokens a second of so many tokens from a position on; what stands before it is kept."""
        llama = self._llama
        # The first `_prefilled` positions hold the made-up prompt; eval drops what lies behind.
        llama.n_tokens = min(self._prefilled, position - 1)
        llama.eval(made_up_prompt(position)[llama.n_tokens :])
        self._prefilled = position
        begin = time.perf_counter()
        for i in range(tokens):
            llama.eval([_FIRST_ID + i])
        return tokens / (time.perf_counter() - begin)

    def prefill(self) -> float:
        """Prompt tokens a second of a prompt in one batch."""
        llama = self._llama
        llama.reset()
        self._prefilled = 0
        prompt = made_up_prompt(PREFILL_TOKENS)
        begin = time.perf_counter()
        llama.eval(prompt)
        return PREFILL_TOKENS / (time.perf_counter() - begin)


class Spanker:
    """A model on a fleet.  Its calls are checkpoints."""

    def __init__(self, model: spanker.Model) -> None:
        self.model = model

    async def decode(self) -> float:
        """Tokens a second after a short prompt, from the first token's arrival to the last's."""
        return await self.decode_at(PROMPT_TOKENS, DECODE_TOKENS)

    async def decode_at(self, position: int, tokens: int) -> float:
        """Tokens a second of so many tokens after a prompt of `position` tokens."""
        times = []
        prompt = made_up_prompt(position)
        async with self.model.generate(
            prompt, max_tokens=tokens + 1, ignore_eos=True
        ) as generation:
            async for token in generation:
                if token.id is not None:
                    times.append(time.perf_counter())
        return tokens / (times[tokens] - times[0])

    async def prefill(self) -> float:
        """Prompt tokens a second, from the call to the first token."""
        prompt = made_up_prompt(PREFILL_TOKENS)
        begin = time.perf_counter()
        async with self.model.generate(prompt, max_tokens=1, ignore_eos=True) as generation:
            await generation.__anext__()
            return PREFILL_TOKENS / (time.perf_counter() - begin)
