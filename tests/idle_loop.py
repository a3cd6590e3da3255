"""An event loop whose time passes only while nothing else happens, and then at once.

What is tested on it can wait for an hour, and no machine is too slow for it: a timer never
rings while there is something to do.
"""

from __future__ import annotations

import asyncio
import selectors


class IdleLoop(asyncio.SelectorEventLoop):
    """Waits for its threads and for the network, but skips all sleep.

    Args:
        network: seconds that the kernel may need to carry something over loopback.
    """

    def __init__(self, network=0.0):
        self._now, self._at_work = 0.0, 0
        super().__init__(_Skipping(self, network))

    def time(self):
        return self._now

    def run_in_executor(self, executor, func, *args):
        future = super().run_in_executor(executor, func, *args)
        self._at_work += 1
        future.add_done_callback(self._one_finished)
        return future

    def _one_finished(self, _):
        self._at_work -= 1


class _Skipping(selectors.DefaultSelector):
    """Tells the loop that time has passed, where it would wait until a timer rings."""

    def __init__(self, loop, network):
        super().__init__()
        self._loop, self._network = loop, network

    def select(self, timeout=None):
        if not timeout or timeout < 0:  # for ever, or not at all
            return super().select(timeout)
        if self._loop._at_work:
            return super().select()
        ready = super().select(self._network)
        if not ready:
            self._loop._now += timeout + self._loop._clock_resolution
        return ready


def run(story, network=0.0):
    """Run a coroutine on such a loop."""
    with asyncio.Runner(loop_factory=lambda: IdleLoop(network)) as runner:
        return runner.run(story)
