"""Bounds what a web server can make fsspec hold: the class of fsspec's responses, whose bodies have an end.

The seconds that an answer may take are bounded where it is asked for (urls.py).
"""

import re
from functools import cache
from typing import Any

from flexmerge_cli.errors import SourceError

MAX_PAGE_BYTES = 16 << 20  # of what is no range: a folder's listing


@cache
def bounded_response() -> type[Any]:
    """An aiohttp response that reads no more than the range that was asked for, or than MAX_PAGE_BYTES."""
    from aiohttp import ClientResponse

    class BoundedResponse(ClientResponse):
        async def read(self) -> bytes:
            """Raises SourceError for a longer body."""
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.request_info.headers.get("Range", ""))
            most = int(asked[2]) - int(asked[1]) + 1 if asked else MAX_PAGE_BYTES
            data = bytearray()
            async for chunk in self.content.iter_any():
                data += chunk
                if len(data) > most:
                    self.close()
                    raise SourceError(
                        f"{self.url} does not answer requests for a range: {most:,} bytes were asked for, more came"
                        if asked
                        else f"{self.url}: a page of more than {most:,} bytes",
                        hint="copy the checkpoint to this disk, and give its folder",
                    )
            self._body = bytes(data)
            return self._body

    return BoundedResponse
