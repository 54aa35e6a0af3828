"""What the method `auto` predicts from a plan, beside what storing really loses: squared errors of every tensor.

    python samples/predicted_error.py [--family samples/digits] [--picture FILE.png]

Needs the `eval` extra for the picture. Predicted: from the plan's statistics alone, for residuals of 1, 2, 3, 4 and 8
bits on the average of all tasks, dense or in 8, 4, 3 and 2. True: the weights themselves coded and decoded, in float32,
before the cast to the dtype that a task has. A dot is a tensor at one number of bits, all tasks together, on an average
in 8 bits.
"""

import json
from pathlib import Path

import numpy as np
import torch
from family import arguments, plan_of
from safetensors.torch import load_file

from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.residuals.coder import MatrixView
from flexmerge_cli.residuals.coding_error import RESIDUAL_BITS, WEIGHT_BITS
from flexmerge_cli.residuals.low_bit import LowBit, weight_code

QUANTILES = (0.05, 0.5, 0.95)
DENSE = 16  # bits of a centre that is not coded
COLOURS = dict(zip(RESIDUAL_BITS, ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#555555")))


def errors(family: Path, plan: Plan) -> np.ndarray:
    """Rows (residual bits, centre bits, predicted, true)."""
    base = load_file(family / "base/model.safetensors")
    tasks = [load_file(family / f"tasks/{task.name}/model.safetensors") for task in plan.tasks]
    found = []
    for tensor in plan.tensors:
        if tensor.class_ is not TensorClass.MERGEABLE or tensor.coding_error is None:
            continue
        matrix = MatrixView.SQUEEZED.matrix(tensor.shape)
        origin = base[tensor.name].float()
        models = [task[tensor.name].float() for task in tasks]
        deltas = torch.stack([model - origin for model in models])
        average = (origin + deltas.double().mean(0).float()).reshape(matrix)
        gram = plan.gram(tensor)
        spread = np.diag(gram).sum() - gram.mean() * len(tasks)  # Σ ‖τ_k - mean τ‖²
        for centre_bits in (*WEIGHT_BITS, DENSE):
            centre = average if centre_bits == DENSE else coded(average, weight_code(centre_bits))
            residuals = [model.reshape(matrix) - centre for model in models]
            lost_by_centre = 0.0 if centre_bits == DENSE else tensor.coding_error.average[centre_bits]
            energy = max(0.0, spread) + len(tasks) * lost_by_centre
            for bits in RESIDUAL_BITS:
                code = LowBit(bits=bits, scales="bfloat16", clip="search")  # rows that decode longer are farther off
                lost = sum(float((r - coded(r, code)).double().square().sum()) for r in residuals)
                found.append((bits, centre_bits, tensor.coding_error.ratio[bits] * energy, lost))
    return np.array(found)


def coded(matrix: torch.Tensor, code: LowBit) -> torch.Tensor:
    return torch.from_numpy(code.decode(code.encode(matrix, "F32"), tuple(matrix.shape), "F32"))


def draw(found: np.ndarray, path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for bits, colour in COLOURS.items():
        of_bits = found[found[:, 0] == bits]
        label = f"{bits} bit{'s' * (bits > 1)}"
        axes.loglog(of_bits[:, 2], of_bits[:, 3] / of_bits[:, 2], ".", color=colour, markersize=5, label=label)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylim(0.5, 2)
    ticks = (0.5, 0.8, 1, 1.35, 2)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("predicted squared error of a tensor, all tasks together")
    axes.set_ylabel("true / predicted")
    axes.legend(frameon=False, ncols=len(COLOURS), loc="upper center", fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def main() -> None:
    given = arguments(__doc__)
    found = errors(given.family, plan_of(given.family))
    found = found[found[:, 3] > 0]
    told = []
    for centre_bits in (DENSE, 8, 4, 3, 2):
        of_centre = found[found[:, 1] == centre_bits]
        parts = {f"{bits} bit{'s' * (bits > 1)}": of_centre[of_centre[:, 0] == bits] for bits in RESIDUAL_BITS} | {
            "all": of_centre
        }
        for name, rows in parts.items():
            low, median, high = np.quantile(rows[:, 3] / rows[:, 2], QUANTILES).round(3).tolist()
            centre = "dense" if centre_bits == DENSE else f"{centre_bits} bits"
            told.append({"centre": centre, "residual": name, "low": low, "median": median, "high": high})
    if given.json:
        print(json.dumps(told, indent=2))
    else:
        print("true / predicted:   centre   residual       5 %   median     95 %")
        for row in told:
            numbers = f"{row['low']:8.3f} {row['median']:8.3f} {row['high']:8.3f}"
            print(f"{'':20}{row['centre']:8} {row['residual']:9} {numbers}")
    if given.picture:
        draw(found[found[:, 1] == 8], given.picture)


if __name__ == "__main__":
    main()
