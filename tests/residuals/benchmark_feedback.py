"""`python -m tests.residuals.benchmark_feedback`: processor time of coding a matrix with feedback and without."""

import time

import numpy as np
import torch

from flexmerge_cli.residuals import feedback
from flexmerge_cli.residuals.sign_runs import residual_code

CASES = [(768, 768, 0.1875), (768, 768, 2), (3072, 768, 0.1875), (768, 3072, 0.1875), (768, 3072, 2)]


def main() -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    for m, n, bits in CASES:
        matrix = torch.from_numpy(rng.standard_normal((m, n), np.float32))
        inputs, coder = rng.standard_normal((n + 8, n), np.float32), residual_code(bits, "byte", m)
        moments = inputs.T @ inputs / len(inputs)
        start = time.process_time()
        coder.encode(matrix, "F32")
        middle = time.process_time()
        feedback.encode(matrix, coder, moments)
        seconds = middle - start, time.process_time() - middle
        told = feedback.workspace((m, n)) >> 20
        print(f"{m} × {n}, {bits} bits: {seconds[0]:.2f} s, with feedback {seconds[1]:.1f} s and {told} MiB")


if __name__ == "__main__":
    main()
