"""What a step says while it runs reaches those who watch, in order, a few times a second."""

from __future__ import annotations

import asyncio

from ferrum.voice import Voice


def test_pieces_are_told_in_order_and_those_of_one_stream_together() -> None:
    told: list[tuple[str, str]] = []

    async def tell(stream: str, text: str) -> None:
        await asyncio.sleep(0)
        told.append((stream, text))

    async def story() -> None:
        voice = Voice(tell)
        voice.say("stdout", "a")
        voice.say("stdout", "b")
        voice.say("stderr", "c")
        voice.say("stdout", "d")
        await voice.aclose()

    asyncio.run(story())
    assert told == [("stdout", "ab"), ("stderr", "c"), ("stdout", "d")]


def test_what_was_said_is_told_while_it_goes_on() -> None:
    told: list[str] = []
    heard = asyncio.Event()

    async def tell(stream: str, text: str) -> None:
        told.append(text)
        heard.set()

    async def story() -> None:
        voice = Voice(tell)
        for text in ("a", "b"):
            voice.say("stdout", text)
            await heard.wait()
            heard.clear()
        await voice.aclose()

    asyncio.run(story())
    assert told == ["a", "b"]


def test_who_said_nothing_tells_nothing() -> None:
    async def tell(stream: str, text: str) -> None:
        raise AssertionError("nothing was said")

    async def story() -> None:
        await Voice(tell).aclose()

    asyncio.run(story())
