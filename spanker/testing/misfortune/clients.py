# SPDX-License-Identifier: Apache-2.0
"""Clients: whoever asks for tokens or logits, takes them slowly, and may leave."""

from __future__ import annotations

import contextlib
import math

import trio

from spanker.errors import SpankerError, again
from spanker.fleet import Model
from spanker.testing.misfortune.answers import number_of_model, prompt_of, stop_of
from spanker.testing.misfortune.outcome import Got
from spanker.testing.misfortune.scenario import Client, Way
from spanker.testing.misfortune.world import World


async def attend(world: World, number: int) -> None:
    """Be one client of a scenario, from its beginning to its end."""
    client, got = world.scenario.clients[number], world.got[number]
    await world.begins(client)
    try:
        begin = got.began_s = trio.current_time()
        world.tell(f"client {number} asks: {describe(client)}")
        patience_s = math.inf if client.deadline_s is None else client.deadline_s
        with trio.CancelScope(deadline=begin + patience_s) as scope:
            model = await world.model(number_of_model(world.scenario, client))
            if client.score:
                await _score(world, client, got, model, scope)
            else:
                await _generate(world, client, got, model, scope)
        if scope.cancelled_caught:
            got.left = "cancelled" if scope.deadline != begin + patience_s else "deadline"
    except SpankerError as error:
        # Its traceback refers to all that was under way.
        got.error = again(error)
    finally:
        got.ended_s = trio.current_time()
        world.tell(f"client {number} {_ending(got)}")
        world.ends()


async def _generate(
    world: World, client: Client, got: Got, model: Model, scope: trio.CancelScope
) -> None:
    generation = model.generate(
        prompt_of(client),
        max_tokens=client.tokens_max,
        temperature=client.temperature,
        top_p=client.top_p,
        seed=client.sampling_seed,
        ignore_eos=True,
        logits=client.logits,
        stop=[stop] if (stop := stop_of(world.scenario, client)) else [],
    )
    while not _is_time_to_leave(client, got, scope):
        try:
            token = await anext(generation)
        except StopAsyncIteration:
            got.finish = generation.finish_reason
            return
        if token.id is not None:
            got.positions.append(token.position)
            got.ids.append(token.id)
            if token.logits is not None:
                got.logits.append(token.logits.tobytes())
        world.item()
        if client.pause_s:
            await trio.sleep(client.pause_s)
    got.left = client.leave_by.value
    if client.leave_by is Way.CLOSE:
        generation.close()
        world.look()
    # Else the last reference goes with this frame.


async def _score(
    world: World, client: Client, got: Got, model: Model, scope: trio.CancelScope
) -> None:
    async with contextlib.aclosing(model.score(prompt_of(client))) as pieces:
        while not _is_time_to_leave(client, got, scope):
            try:
                position, rows = await anext(pieces)
            except StopAsyncIteration:
                got.finish = "length"
                return
            got.positions += range(position, position + len(rows))
            got.logits += [row.tobytes() for row in rows]
            world.item()
            if client.pause_s:
                await trio.sleep(client.pause_s)
    got.left = client.leave_by.value


def _is_time_to_leave(client: Client, got: Got, scope: trio.CancelScope) -> bool:
    if client.leave_after is None or len(got.positions) < client.leave_after:
        return False
    if client.leave_by is not Way.CANCEL:
        return True
    # It goes while it waits for the next one.
    scope.deadline = min(scope.deadline, trio.current_time() + client.leave_s)
    return False


def describe(client: Client) -> str:
    """A client in words."""
    prompt = f"a prompt of {client.prompt_length} from {client.prompt_first}"
    if client.score:
        words = [f"scores {prompt}"]
    else:
        words = [f"up to {client.tokens_max} tokens to {prompt}"]
        if client.temperature:
            words.append(f"temperature {client.temperature:g}, top-p {client.top_p:g}")
        if client.logits:
            words.append("with logits")
    if client.pause_s:
        words.append(f"{client.pause_s:g} s between items")
    if client.leave_after is not None:
        words.append(f"leaves ({client.leave_by.value}) after {client.leave_after}")
    if client.deadline_s is not None:
        words.append(f"within {client.deadline_s:g} s")
    if client.stop_at is not None:
        words.append(f"stops at the text of token {client.stop_at}")
    if client.model:
        words.append("of the second model")
    return ", ".join(words)


def _ending(got: Got) -> str:
    count = f"{len(got.positions)} item{'' if len(got.positions) == 1 else 's'}"
    if got.error is not None:
        return f"gets {type(got.error).__name__} after {count}: {got.error}"
    if got.left is not None:
        return f"leaves after {count} ({got.left})"
    return f"has all it asked for, {count} ({got.finish})" if got.finish else f"ends, {count}"
