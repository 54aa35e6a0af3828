"""GB/s of float32 that `unpack` and a whole decode give, and of codes that `pack` takes; one core. No test.

python -m tests.residuals.benchmark_packing
"""

import time

import numpy as np

from flexmerge_cli.residuals.low_bit import LookUp, LowBit, scaled_levels
from flexmerge_cli.residuals.packing import pack, unpack


def seconds(work):
    times = []
    for _ in range(7):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def main():
    print("bits  pack  unpack  decode")
    for bits in range(1, 9):
        codes = np.random.default_rng(0).integers(0, 1 << bits, (16384, 768)).astype(np.uint8)
        packed, levels = pack(codes, bits), LowBit(bits=bits).table()
        scale = np.ones((len(codes), 1), np.float32)
        rates = (
            codes.size / seconds(lambda: pack(codes, bits)),  # noqa: B023
            4 * codes.size / seconds(lambda: unpack(packed, 768, bits, levels)),  # noqa: B023
            4 * codes.size / seconds(lambda: scaled_levels(LookUp(packed, 768, bits, levels, scale))),  # noqa: B023
        )
        print(f"{bits:4}" + "".join(f"{rate / 1e9:7.1f}" for rate in rates))


if __name__ == "__main__":
    main()
