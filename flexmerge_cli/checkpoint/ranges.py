"""Reads ranges of a file over HTTP with the Hub's own client: its session, headers and retries."""

import errno
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from flexmerge_cli.errors import FlexmergeError, SourceError

OF_THIS_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOENT)
MAX_PASSED_BYTES = 1 << 20
EXPIRED = (401, 403, 404, 410)  # status codes of a signed address that has expired
TRIES = 5  # with fewer than MIN_ANSWER_BYTES between them
MIN_ANSWER_BYTES = 1 << 12
# The seconds that every read gets, whatever its size, and the slowest rate allowed. No server is waited for
# indefinitely.
SLOW_SECONDS = 120.0
SLOW_BYTES_PER_SECOND = 10_000
WAIT_SECONDS = 0.5  # before the second try; doubled each time

Answer = TypeVar("Answer")

# Address at the Hub -> the signed address that it redirects to. This halves the requests, and the Hub limits its own.
_signed: dict[str, str] = {}


def allowed_seconds(num_bytes: int) -> float:
    """Return how long a read of so many bytes may take."""
    return SLOW_SECONDS + num_bytes / SLOW_BYTES_PER_SECOND


def read_range(url: str, start: int, stop: int) -> bytes:
    """Read bytes [start, stop) at a Hub address. Raises like `stream_range`."""
    data = bytearray()
    stream_range(url, start, stop, data.extend)
    return bytes(data)


def stream_range(
    url: str,
    start: int,
    stop: int,
    write: Callable[[bytes], object],
    *,
    max_passed_bytes: int = MAX_PASSED_BYTES,
    before_try: Callable[[], object] = lambda: None,
) -> None:
    """Hand over bytes [start, stop) at a Hub address as they arrive, in order, each once.

    A connection that breaks or stalls is resumed; a signed address that has expired is requested again. A server that
    does not support ranges sends the file from the beginning, and the bytes before `start` are skipped. before_try may
    raise, to abort. Raises what the Hub's client raises, and SourceError if more than max_passed_bytes would have to
    be skipped.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    position, tries = start, 0
    deadline = time.monotonic() + allowed_seconds(stop - start)
    while position < stop:
        before_try()
        earlier = position
        at_url = _signed.get(url, url)
        # A signed address belongs to another origin, which must not receive the token.
        headers = build_hf_headers() if at_url == url else build_hf_headers(token=False)
        headers |= {"Accept-Encoding": "identity", "Range": f"bytes={position}-{stop - 1}"}
        try:
            with http_stream_backoff(
                "GET", at_url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, retry_on_exceptions=()
            ) as response:
                if response.status_code in EXPIRED and at_url != url:
                    _signed.pop(url, None)
                    continue
                hf_raise_for_status(response)
                if response.url.host != urlsplit(url).hostname:
                    _signed[url] = str(response.url)
                at = _first_byte(response, url, position, whole=start <= max_passed_bytes)
                for chunk in response.iter_bytes():
                    wanted = chunk[max(0, position - at) : stop - at]
                    at += len(chunk)
                    write(wanted)
                    position += len(wanted)
                    tries = 0 if position - earlier >= MIN_ANSWER_BYTES else tries
                    if time.monotonic() > deadline:
                        raise SourceError(
                            f"{url} sends too slowly: {position - start:,} of {stop - start:,} bytes came in "
                            f"{allowed_seconds(stop - start):,.0f} s",
                            hint="try again, or fetch the repository with `hf download`",
                        )
                    if position >= stop:
                        break
                else:  # the length differs from the request: retrying for missing bytes would never end
                    raise ConnectionError(f"a response ended at byte {position:,} of {stop:,}")
        except Exception as error:
            tries += 1
            if tries >= TRIES or not is_transient(error):
                raise
            time.sleep(WAIT_SECONDS * 2 ** (tries - 1))


def _first_byte(response: Any, url: str, position: int, *, whole: bool) -> int:
    """Return where in the file a response begins. whole: whether the server may send the whole file."""
    start = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if response.status_code == 206 and (start is None or int(start[1]) == position):
        return position
    if response.status_code == 200 and whole:
        return 0
    raise SourceError(
        f"{url} does not answer requests for a range (status {response.status_code})",
        hint="download the repository with `hf download`, and give its folder",
    )


def patiently(ask: Callable[[], Answer]) -> Answer:
    """Call `ask`, retrying a few times if the connection breaks."""
    tries = 0
    while True:
        try:
            return ask()
        except Exception as error:
            tries += 1
            if tries >= TRIES or not is_transient(error):
                raise
            time.sleep(WAIT_SECONDS * 2 ** (tries - 1))


def is_transient(error: Exception) -> bool:
    """Return whether a connection broke or stalled. Error responses do not count: the client retries those."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    answered = isinstance(error, (FlexmergeError, HfHubHTTPError, OfflineModeIsEnabled))
    answered |= isinstance(error, OSError) and error.errno in OF_THIS_MACHINE
    return isinstance(error, (http_error(), OSError)) and not answered


def http_error() -> type[Exception]:
    """Return the base class of all errors of the HTTP library that the Hub's client uses, which depends on its
    version."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(kind for kind in HfHubHTTPError.__mro__[1:] if issubclass(kind, Exception))
