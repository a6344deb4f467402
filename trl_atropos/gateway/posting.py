"""Groups on their way to the trajectory API: each is posted so that no trainer gets it twice."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import aiohttp
import msgspec

from .counts import GatewayCounts


logger = logging.getLogger(__name__)

MAX_WAITING_GROUPS = 64
"""Groups that wait for the API. When there are more, the ends of sessions wait."""

RETRY_PAUSE_S = 1.0
ANSWER_TIMEOUT_S = 180.0
"""`trl-atropos api` holds a post for a minute while its queue is full."""

RECOGNISING_HEADER = "trl-atropos-api"
"""An API with it knows a post that comes again."""


class GroupPoster:
    """Posts groups to `/scored_data`, one after another.

    A post that never arrived is repeated until it does. One whose answer was lost is repeated where the API recognises it,
    which `trl-atropos api` does; for others the group is given up, because it may be in their queue.

    Args:
        api_url (`str`):
            URL of the API, which may hold a key: `http://name:KEY@host:port`.
        counts ([`GatewayCounts`]):
            What is counted.
    """

    def __init__(self, api_url: str, counts: GatewayCounts):
        self.url = api_url.rstrip("/") + "/scored_data"
        self.counts = counts
        self._groups: asyncio.Queue[dict[str, Any]] = asyncio.Queue(MAX_WAITING_GROUPS)
        self._recognises = False

    @property
    def num_waiting_groups(self) -> int:
        """Groups that are not posted yet."""
        return self._groups.qsize()

    async def put(self, group: dict[str, Any]) -> None:
        """Take a group; wait while there are too many."""
        await self._groups.put(group)

    async def join(self) -> None:
        """Wait until every group is posted or given up."""
        await self._groups.join()

    async def run(self) -> None:
        """Post what comes, until it is cancelled."""
        # No `trust_env`, as for the servers. The key of the URL becomes the header of basic authentication.
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S)) as http:
            while True:
                group = await self._groups.get()
                try:
                    await self._post(http, msgspec.json.encode(group))
                finally:
                    self._groups.task_done()

    async def _post(self, http: aiohttp.ClientSession, body: bytes) -> None:
        has_complained = False
        while True:
            try:
                async with http.post(self.url, data=body, headers={"Content-Type": "application/json"}) as response:
                    text = await response.text()
            except aiohttp.ClientConnectorError as exc:
                reason, may_repeat = str(exc), True
            except (aiohttp.ClientError, TimeoutError, ConnectionError) as exc:
                reason, may_repeat = f"{type(exc).__name__}: {exc}", self._recognises
            else:
                self._recognises = RECOGNISING_HEADER in response.headers
                if response.status < 300:
                    self.counts.num_groups_sent += 1
                    return
                reason, may_repeat = f"{response.status} {text[:300]}", response.status in (429, 503)
            if not may_repeat:
                self.counts.num_groups_lost += 1
                logger.error("event=group_lost reason=%r", reason)
                return
            if not has_complained:
                logger.warning("event=api_absent reason=%r", reason)
            has_complained = True
            await asyncio.sleep(RETRY_PAUSE_S)
