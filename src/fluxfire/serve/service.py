"""Turns a request into an answer: reads, edits, encodes and stores the pictures."""

from __future__ import annotations

import asyncio
import base64
import logging
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, TypeVar

from fluxfire.serve import decoding, fetching, tracing
from fluxfire.serve.decoding_process import decode_apart
from fluxfire.serve.engine import Engine
from fluxfire.serve.errors import RefusedError
from fluxfire.serve.request_body import SentRequest
from fluxfire.serve.schema import LARGEST_SEED, EditAnswer, EditRequest, ImageMade, Timings
from fluxfire.serve.settings import Settings
from fluxfire.serve.storage import Storage, StorageError, fresh_name
from fluxfire.serve.store_watch import StoreWatch
from fluxfire.serve.tickets import QueueSlot, Ticket
from fluxfire.serve.tracing import Phase
from fluxfire.serve.wire import PipelineRequest, RawPicture, Result

P = ParamSpec("P")
T = TypeVar("T")
_log = logging.getLogger(__name__)
_PICTURE_THREADS = (
    2  # each decodes or encodes one picture, and needs a core and memory for its pixels
)
_STORING_THREADS = 4  # each waits for the store, which may be slow


@dataclass
class Service:
    """Edits requests with an engine.

    Two thread pools decode, encode and store pictures, so that a slow picture or store does not
    block the event loop. Cancelling a request removes its work from their queues.

    Attributes:
        settings: the service's settings.
        engine: the request queue and its worker.
        storage: where pictures go; None puts them into the answers.
        on_answer: callback with each answer, and the owner of its request.
        on_failure: callback with the code of each error that ends an edit without an answer, and
            the owner of its request.
    """

    settings: Settings
    engine: Engine
    storage: Storage | None
    on_answer: Callable[[EditAnswer, str | None], None] = lambda answer, owner: None  # noqa: ARG005
    on_failure: Callable[[str, str | None], None] = lambda code, owner: None  # noqa: ARG005

    def __post_init__(self) -> None:
        self._pictures = ThreadPoolExecutor(_PICTURE_THREADS, "pictures")
        self._storing = ThreadPoolExecutor(_STORING_THREADS, "storing")
        self.store_watch = StoreWatch(self.storage)
        # One at a time, because a large picture may need more than a gigabyte.
        self._large = asyncio.Semaphore(1)

    def close(self) -> None:
        """Shut the thread pools down; running work finishes, waiting work is dropped."""
        for pool in (self._pictures, self._storing):
            pool.shutdown(wait=False, cancel_futures=True)

    async def edit(
        self,
        sent: SentRequest,
        slot: QueueSlot | None = None,
        on_ticket: Callable[[Ticket], None] = lambda ticket: None,  # noqa: ARG005
        *,
        owner: str | None = None,
    ) -> EditAnswer:
        """Edit. Cancelling this coroutine cancels the request.

        Args:
            sent: the client's request; its picture is dropped once it is decoded.
            slot: its reserved queue slot; None reserves one. This method releases it.
            on_ticket: callback with the ticket once the request is in the queue.
            owner: name of the client's key, if there is no slot yet; None without keys.

        Raises:
            RefusedError: the request cannot be carried out, or takes longer than `request_seconds`.
            StorageError: the store did not take the pictures.
        """
        began = time.perf_counter()
        decoded = made = None
        written: list[Phase] = []
        request = sent.request
        ticket: Ticket | None = None
        failure: str | None = "internal"
        slot = slot or self.engine.reserve(request.quality, owner)
        try:
            async with asyncio.timeout(self.settings.request_seconds):
                ticket = self.engine.submit(await self._pipeline_request(sent), slot)
                decoded = time.perf_counter()
                on_ticket(ticket)
                result = await asyncio.shield(ticket.done)
                made = time.perf_counter()
                answer = await self._answer(request, ticket, result, began, decoded, phases=written)
                self.on_answer(answer, slot.owner)
                failure = None
                return answer
        except TimeoutError:
            if ticket is not None:
                self.engine.cancel(ticket, _deadline_error(self.settings.request_seconds))
            failure = "deadline"
            raise _deadline_error(self.settings.request_seconds) from None
        except asyncio.CancelledError:
            if ticket is not None:
                gone = RefusedError("the request was cancelled", status=499, code="cancelled")
                self.engine.cancel(ticket, gone)
            failure = "cancelled"
            raise
        except RefusedError as refusal:
            failure = refusal.code
            raise
        except StorageError:
            failure = "storage"
            self.store_watch.note_failure()
            raise
        finally:
            self.engine.release(slot)
            if failure is not None:
                self.on_failure(failure, slot.owner)
            tracing.record([*_phases(ticket, began, decoded, made), *written])
            del ticket  # an error holds this frame, and the frame would hold all pixels

    async def read(self, image: ImageMade) -> tuple[bytes, str]:
        """Read a picture of an answer.

        Returns:
            Its file's bytes and their media type.

        Raises:
            LinkRefusedError: the store has deleted it.
            StorageError: the store could not read it, or the service has no store any more.
        """
        kind = decoding.media_type_of(image.filename)
        if image.data_url is not None:
            return base64.b64decode(image.data_url.partition(",")[2]), kind
        if self.storage is None:
            raise StorageError(f"{image.filename} is in a store that this service does not use now")
        return await _run_in(self._storing, self.storage.get, image.filename), kind

    async def _pipeline_request(self, sent: SentRequest) -> PipelineRequest:
        """Decode the picture and translate the fields into a request to the pipeline."""
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

    async def _picture(self, sent: SentRequest) -> RawPicture | None:
        """Decode the picture from the file, base64 or URL; None if the request has no picture."""
        most = self.settings.max_bytes
        request, file, url = sent.request, sent.file, sent.request.image_url
        if file is not None and (request.image or url) is not None:
            raise RefusedError("give one picture, not two", status=422, code="invalid-request")
        if file is not None and len(file) > most:
            raise RefusedError(
                f"the picture has {len(file)} bytes; the limit is {most}",
                status=413,
                code="image-too-large",
            )
        text = url if url is not None and url[:5].lower() == "data:" else request.image
        if text is not None:
            file = await _run_in(self._pictures, decoding.decode_base64, text, max_bytes=most)
        elif url is not None:
            file = await fetching.fetch(
                url,
                allowed=self.settings.image_hosts,
                max_bytes=most,
                seconds=self.settings.fetch_seconds,
            )
        if file is None:
            return None
        most_pixels = self.settings.max_pixels
        pixels = await _run_in(self._pictures, decoding.pixels_of, file, max_pixels=most_pixels)
        if pixels <= decoding.KEPT_PIXELS:
            return await _run_in(self._pictures, _decode, file, most_pixels)
        async with self._large:
            return await decode_apart(file, most_pixels)

    async def _answer(
        self,
        request: EditRequest,
        ticket: Ticket,
        result: Result,
        began: float,
        decoded: float,
        *,
        phases: list[Phase],
    ) -> EditAnswer:
        made = time.perf_counter()
        encoded = await asyncio.gather(
            *(_run_in(self._pictures, _encode, raw, request) for raw in result.pictures)
        )
        written = time.perf_counter()
        pictures = zip(encoded, result.pictures, ticket.request.seeds, strict=True)
        images = await asyncio.gather(
            *(self._image(data, raw, seed, request) for data, raw, seed in pictures)
        )
        ended = time.perf_counter()
        phases.append(Phase("encoding", made, written))
        phases.append(Phase("storing", written, ended, {"pictures": len(images)}))
        for warning in result.warnings:
            _log.warning("%s", warning)
        facts = self.engine.facts
        assert facts is not None  # noqa: S101 - a worker gave the result, so it was ready
        return EditAnswer(
            images=images,
            seed=ticket.request.seeds[0],
            quality=request.quality or facts.level,
            steps=list(result.steps),
            hit_rate=result.hit_rate,
            warnings=list(result.warnings),
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
        """Store a picture and return its link; without a store, return the picture itself."""
        name = fresh_name(request.output_format)
        link = None
        if self.storage is not None:
            kind = decoding.media_type(request.output_format)
            await _run_in(self._storing, self.storage.put, name, data, kind)
            link = self._public(await _run_in(self._storing, self.storage.url, name))
        return ImageMade(
            data_url=None if link else decoding.data_url(data, request.output_format),
            url=link,
            filename=name,
            filepath=name if link else None,
            seed=seed,
            width=raw.width,
            height=raw.height,
        )

    def _public(self, link: str) -> str:
        """Return a link as clients can follow it: the store may know only the service's path."""
        base = self.settings.public_url
        return base.rstrip("/") + link if base and link.startswith("/") else link


def _phases(
    ticket: Ticket | None, began: float, decoded: float | None, made: float | None
) -> list[Phase]:
    """Say how long an edit was decoded, waited and ran, as far as it came."""
    now = time.perf_counter()
    found = [Phase("decoding", began, decoded or now)]
    if ticket is not None and decoded is not None:
        ran = made or now
        if ticket.began is not None:  # in the loop's time
            since = asyncio.get_running_loop().time() - ticket.began
            facts = {"steps": ticket.request.steps, "tries": ticket.tries}
            found.append(Phase("edit", max(decoded, now - since), ran, facts))
            ran = found[-1].began
        found.append(Phase("waiting", decoded, ran, {"key": ticket.owner}))
    return found


def _deadline_error(seconds: float) -> RefusedError:
    return RefusedError(
        f"the request took more than {seconds:g} s; try again later, or ask for fewer steps",
        status=504,
        code="deadline",
    )


def _decode(file: bytes, max_pixels: int) -> RawPicture:
    return RawPicture.of(decoding.decode(file, max_pixels=max_pixels))


def _encode(raw: RawPicture, request: EditRequest) -> bytes:
    return decoding.encode(raw.picture(), request.output_format, request.output_quality)


async def _run_in(
    pool: ThreadPoolExecutor, work: Callable[P, T], *args: P.args, **more: P.kwargs
) -> T:
    """Run a function in a thread pool; cancelling before its start drops it."""
    return await asyncio.get_running_loop().run_in_executor(pool, partial(work, *args, **more))
