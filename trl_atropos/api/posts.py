"""Posts whose answers may not have arrived: an environment sends them again, and they must not be stored twice.

Only such posts are remembered. The same group from a client that got its answer is another group.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Post:
    """A post whose answer is not known to have arrived; `client_is_gone` if it is known that it has not.

    `digest` is that of its text, `answer` is done when it is on the disk.
    """

    digest: bytes
    answer: asyncio.Future[dict[str, Any]]
    client_is_gone: bool = False
    since: float = field(default_factory=time.monotonic)


class UnansweredPosts:
    """The posts that are on their way, and those of the last `window_s` seconds whose clients had gone before the answer.

    `digests` are those of the last posts before the process began: which of their answers arrived is not known, so each is
    recognised once. Make it on the running event loop.
    """

    def __init__(self, digests: Iterable[bytes], window_s: float):
        self._window_s = window_s
        self._posts: dict[bytes, list[Post]] = {}
        for digest in digests:
            post = self.begin(digest)
            post.answer.set_result({"status": "received"})
            post.client_is_gone = True

    def find(self, digest: bytes) -> Post | None:
        """The post of which one with this digest is a repetition; None if it is new."""
        self.forget_old()
        return next((post for post in self._posts.get(digest, ()) if post.client_is_gone), None)

    def begin(self, digest: bytes) -> Post:
        """Remember a new post."""
        post = Post(digest, asyncio.get_running_loop().create_future())
        # Mostly nobody else waits for it, and an exception that nobody read is reported.
        post.answer.add_done_callback(lambda answer: answer.cancelled() or answer.exception())
        self._posts.setdefault(digest, []).append(post)
        return post

    def forget(self, post: Post) -> None:
        """Forget a post: its answer arrived, or it was not stored."""
        others = [other for other in self._posts.get(post.digest, []) if other is not post]
        if others:
            self._posts[post.digest] = others
        else:
            self._posts.pop(post.digest, None)

    def forget_old(self) -> None:
        """Forget posts that no client repeats any more."""
        before = time.monotonic() - self._window_s
        # In the order in which they came, so that the first one that is young ends it.
        while self._posts:
            post = self._posts[next(iter(self._posts))][0]
            if post.since >= before or not post.answer.done():
                return
            self.forget(post)
