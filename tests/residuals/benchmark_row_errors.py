"""`python -m tests.residuals.benchmark_row_errors`: ns an element for 2, 3, 4 and 8 bits, by elements of a block."""

import time

import torch

from flexmerge_cli.residuals import row_errors
from flexmerge_cli.residuals.coding_error import WEIGHT_BITS
from flexmerge_cli.residuals.low_bit import weight_code
from flexmerge_cli.residuals.quantise import squared_errors


def main() -> None:
    torch.set_num_threads(1)
    matrix = torch.randn(2048, 768, generator=torch.Generator().manual_seed(0))
    for exponent in range(13, 19):
        row_errors.BLOCK_ELEMENTS = 1 << exponent
        print(f"2^{exponent}: {best(lambda: row_errors.row_errors(matrix, WEIGHT_BITS)) / matrix.numel() * 1e9:.1f}")
    plain = best(lambda: [squared_errors(matrix, weight_code(bits)) for bits in WEIGHT_BITS])
    print(f"plain: {plain / matrix.numel() * 1e9:.1f}")


def best(run, repeat: int = 7) -> float:
    """CPU seconds."""
    seconds = []
    for _ in range(repeat):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
