"""Maps numbers to one of eight levels, a colour, or a picture, given their range. No text, no pages.

One ramp for terminal and page, light for low and dark for high: it keeps its order in grey and to colour-blind eyes.
"""

import base64
import math
import struct
import zlib
from dataclasses import dataclass

import numpy as np

LEVELS = "▁▂▃▄▅▆▇█"

# ColorBrewer's YlGnBu without its lightest third, which is lost on white paper.
RAMP = np.array(
    [(217, 240, 175), (165, 219, 183), (87, 190, 193), (36, 152, 193), (33, 99, 170), (31, 47, 135), (8, 29, 88)], float
)
NOTHING = (238, 238, 238)
"""The colour of cells without a number."""

Colour = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """The range that the ramp spans."""

    low: float
    high: float

    @staticmethod
    def over(values: np.ndarray) -> "Scale":
        """Return the range from the least to the greatest finite value; 0 to 1 if there is none."""
        found = values[np.isfinite(values)]
        return Scale(low=float(found.min()), high=float(found.max())) if found.size else Scale(low=0.0, high=1.0)

    def place(self, values: np.ndarray | float) -> np.ndarray:
        """Return positions on the ramp: 0 is low, 1 is high, NaN without a number. Values outside go to the nearer
        end."""
        span = self.high - self.low
        return np.clip((np.asarray(values, float) - self.low) / (span if span > 0 else 1.0), 0.0, 1.0)

    def text(self, value: float | None) -> str:
        """Format the value with enough digits to distinguish values in this range."""
        if value is None or math.isnan(value):
            return "–"
        span = self.high - self.low
        decimals = min(max(1 - math.floor(math.log10(span)), 2), 8) if span > 0 else 2
        return f"{round(value, decimals) + 0.0:.{decimals}f}"  # + 0.0: no -0.00

    def level(self, value: float) -> str:
        place = float(self.place(value))
        return " " if np.isnan(place) else LEVELS[min(int(place * len(LEVELS)), len(LEVELS) - 1)]

    def colours(self, values: np.ndarray) -> np.ndarray:
        """Map values to colours: […] -> […, 3] uint8."""
        place = self.place(values)
        along = np.nan_to_num(place) * (len(RAMP) - 1)
        below = np.minimum(along.astype(int), len(RAMP) - 2)
        mixed = RAMP[below] + (RAMP[below + 1] - RAMP[below]) * (along - below)[..., None]
        return np.where(np.isnan(place)[..., None], NOTHING, mixed.round()).astype(np.uint8)

    def colour(self, value: float) -> Colour:
        red, green, blue = (int(part) for part in self.colours(np.array(value)))
        return red, green, blue


def ink(colour: Colour) -> Colour:
    """Return black or white, whichever has the higher contrast: at least 4.5 to 1, as WCAG requires for text."""
    linear = [part / 3294.6 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in colour]
    luminance = sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))
    return (0, 0, 0) if luminance > 0.179 else (255, 255, 255)


def png(pixels: np.ndarray) -> str:
    """Encode [rows, columns, 3] uint8 as a `data:` URI of a PNG. A 30 by 30 heat map is 2 kB; as SVG it would be 60."""
    rows, columns, _ = pixels.shape
    lines = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(pixels))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(file).decode()
