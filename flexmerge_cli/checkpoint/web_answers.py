"""Bounds what a web server can make fsspec hold, by a class of responses whose bodies have an end.

urls.py bounds the seconds that a response may take.
"""

import re
from functools import cache
from typing import Any

from flexmerge_cli.errors import SourceError

MAX_PAGE_BYTES = 16 << 20  # of a response that is not a range, such as a folder's listing


@cache
def bounded_response() -> type[Any]:
    """Return an aiohttp response class that reads no more than the requested range, or than MAX_PAGE_BYTES."""
    from aiohttp import ClientResponse

    class BoundedResponse(ClientResponse):
        async def read(self) -> bytes:
            """Read the body. Raises SourceError for a longer one."""
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
