"""From a request to an answer: the picture is read, edited, written, and stored."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, TypeVar

from fluxfire.serve import decoding, fetching
from fluxfire.serve.engine import Engine, Place, Ticket
from fluxfire.serve.reading import Sent
from fluxfire.serve.refusing import Refused
from fluxfire.serve.schema import LARGEST_SEED, EditAnswer, EditRequest, ImageMade, Timings
from fluxfire.serve.settings import Settings
from fluxfire.serve.storage import Storage, fresh_name
from fluxfire.serve.wire import PipelineRequest, RawPicture, Result

P = ParamSpec("P")
T = TypeVar("T")


_AT_ONCE = 2  # pictures read or written: each holds its pixels, and the processor
_STORING = 4  # pictures on their way to the store, which may be slow


@dataclass
class Service:
    """What edits, with what and for how long.

    Pictures are read, written and stored by threads of their own, so that a slow picture or store
    keeps nothing else waiting; what nobody waits for any more leaves their queues.

    Attributes:
        settings: the service's.
        engine: the queue and its worker.
        storage: where pictures go; None puts them into the answers.
        on_answer: is told each answer.
    """

    settings: Settings
    engine: Engine
    storage: Storage | None
    on_answer: Callable[[EditAnswer], None] = lambda answer: None  # noqa: ARG005

    def __post_init__(self) -> None:
        self._pictures = ThreadPoolExecutor(_AT_ONCE, "pictures")
        self._storing = ThreadPoolExecutor(_STORING, "storing")

    def close(self) -> None:
        """Let the threads end, what they have begun once it is done."""
        for pool in (self._pictures, self._storing):
            pool.shutdown(wait=False, cancel_futures=True)

    async def edit(
        self,
        sent: Sent,
        place: Place | None = None,
        on_ticket: Callable[[Ticket], None] = lambda ticket: None,  # noqa: ARG005
    ) -> EditAnswer:
        """Edit. Cancelling this gives the request up.

        Args:
            sent: what the client sent, which is without its picture once that was read.
            place: kept for it in the queue, given back in the end; None takes one.
            on_ticket: is told the ticket once the request is in the queue.

        Raises:
            Refused: the request cannot be carried out, or was not within its time.
            StorageError: the pictures could not be stored.
        """
        began = time.perf_counter()
        request = sent.request
        ticket: Ticket | None = None
        place = place or self.engine.reserve(request.quality)
        try:
            async with asyncio.timeout(self.settings.request_seconds):
                ticket = self.engine.submit(await self._ask(sent), place)
                decoded = time.perf_counter()
                on_ticket(ticket)
                result = await asyncio.shield(ticket.done)
                answer = await self._answer(request, ticket, result, began, decoded)
                self.on_answer(answer)
                return answer
        except TimeoutError:
            if ticket is not None:
                self.engine.cancel(ticket, _late(self.settings.request_seconds))
            raise _late(self.settings.request_seconds) from None
        except asyncio.CancelledError:
            if ticket is not None:
                gone = Refused("the request was cancelled", status=499, code="cancelled")
                self.engine.cancel(ticket, gone)
            raise
        finally:
            self.engine.leave(place)
            del ticket  # or an error would hold this frame, and the frame all pixels

    async def _ask(self, sent: Sent) -> PipelineRequest:
        """Read the picture, and say all in the pipeline's terms."""
        request, picture = sent.request, await self._picture(sent)
        sent.forget_picture()
        first = request.seed if request.seed is not None else secrets.randbelow(LARGEST_SEED + 1)
        return PipelineRequest(
            prompt=request.prompt,
            prompt_2=request.prompt2,
            negative_prompt=request.negative_prompt,
            negative_prompt_2=request.negative_prompt2,
            picture=picture,
            seeds=tuple((first + i) % (LARGEST_SEED + 1) for i in range(request.num_images)),
            size=(request.width, request.height) if picture is None else request.size,
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            true_cfg_scale=request.true_cfg_scale,
            level=request.quality,
        )

    async def _picture(self, sent: Sent) -> RawPicture | None:
        """Read the picture, wherever it is; None if there is none."""
        most = self.settings.max_bytes
        request, file, url = sent.request, sent.file, sent.request.image_url
        if file is not None and (request.image or url) is not None:
            raise Refused("give one picture, not two", status=422, code="invalid-request")
        if file is not None and len(file) > most:
            raise Refused(
                f"the picture has {len(file)} bytes; at most {most} are taken",
                status=413, code="image-too-large",
            )  # fmt: skip
        text = url if url is not None and url[:5].lower() == "data:" else request.image
        if text is not None:
            file = await _by(self._pictures, decoding.unwrapped, text, max_bytes=most)
        elif url is not None:
            file = await fetching.fetch(
                url, allowed=self.settings.image_hosts, max_bytes=most,
                seconds=self.settings.fetch_seconds,
            )  # fmt: skip
        if file is None:
            return None
        return await _by(self._pictures, _decoded, file, self.settings.max_pixels)

    async def _answer(
        self, request: EditRequest, ticket: Ticket, result: Result, began: float, decoded: float
    ) -> EditAnswer:
        made = time.perf_counter()
        encoded = await asyncio.gather(
            *(_by(self._pictures, _encoded, raw, request) for raw in result.pictures)
        )
        written = time.perf_counter()
        images = [
            await self._image(data, raw, seed, request)
            for data, raw, seed in zip(encoded, result.pictures, ticket.ask.seeds, strict=True)
        ]
        ended = time.perf_counter()
        facts = self.engine.facts
        assert facts is not None  # noqa: S101 - something was made
        return EditAnswer(
            images=images,
            seed=ticket.ask.seeds[0],
            quality=request.quality or facts.level,
            steps=list(result.steps),
            hit_rate=result.hit_rate,
            inference_time=ticket.inference,
            processing_time=decoded - began + ended - made,
            total_time=ended - began,
            timings=Timings(
                decoding=decoded - began,
                waiting=max(0.0, made - decoded - ticket.inference),
                inference=ticket.inference,
                encoding=written - made,
                storing=ended - written,
            ),
        )

    async def _image(
        self, data: bytes, raw: RawPicture, seed: int, request: EditRequest
    ) -> ImageMade:
        """Put a picture into the answer, or into the store and a link into the answer."""
        name = fresh_name(request.output_format)
        link = None
        if self.storage is not None:
            kind = decoding.media_type(request.output_format)
            await _by(self._storing, self.storage.put, name, data, kind)
            link = await _by(self._storing, self.storage.url, name)
        return ImageMade(
            data_url=None if link else decoding.data_url(data, request.output_format),
            url=link,
            filename=name,
            filepath=name if link else None,
            seed=seed,
            width=raw.width,
            height=raw.height,
        )


def _late(seconds: float) -> Refused:
    return Refused(
        f"the request took more than {seconds:g} s; try again later, or ask for fewer steps",
        status=504, code="deadline",
    )  # fmt: skip


def _decoded(file: bytes, max_pixels: int) -> RawPicture:
    """Read a picture, no larger than is of use: many may wait, with all their pixels."""
    return RawPicture.of(decoding.reduced(decoding.decode(file, max_pixels=max_pixels)))


def _encoded(raw: RawPicture, request: EditRequest) -> bytes:
    return decoding.encode(raw.picture(), request.output_format, request.output_quality)


async def _by(pool: ThreadPoolExecutor, work: Callable[P, T], *args: P.args, **more: P.kwargs) -> T:
    """Have a pool's thread do some work; cancelled before it began, it never will."""
    return await asyncio.get_running_loop().run_in_executor(pool, partial(work, *args, **more))
