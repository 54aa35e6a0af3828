"""mergekit's merges of a small Llama family beside ours at 1x. Not a test: it installs mergekit, and takes minutes.

    python -m tests.compare_mergekit                  in a temporary environment of its own
    python -m tests.compare_mergekit --python PYTHON  that has mergekit already

Conventions that differ are evened out by the arguments, and only so:
    linear           weights are averaged there, task vectors here
    task_arithmetic  a sum of weighted task vectors there, which is form=sum
    ties             int(density·n) elements of each tensor are kept there, int(K·n) + 1 here; 0.25·n is whole for every
                     tensor of the family, so that a K just under it keeps as many. Weights come before the election
                     there, so all of them are 1
    breadcrumbs      a tensor of which no outlier is dropped is all zero there; none here is so small
Exits with 1 if any element differs by more than TOLERANCE.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

TOLERANCE = 1e-5
TORCH = "torch==2.13.0"
TASKS = ("math", "prose", "code")
HIDDEN, INNER, WORDS, LAYERS = 64, 128, 256, 2

# Name -> mergekit's parameters of the merge and of each model, and ours.
CASES = {
    "linear": ({}, {"weight": 1.0}, "average"),
    "task_arithmetic": ({}, {"weight": 0.5}, "task_arithmetic:form=sum,scale=0.5"),
    "ties": ({"normalize": True}, {"weight": 1.0, "density": 0.25}, "ties:K=0.249999999,scope=tensor"),
    "breadcrumbs": ({}, {"weight": 0.5, "density": 0.5, "gamma": 0.02}, "breadcrumbs:beta=0.5,gamma=0.02,scale=0.5"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description="compare with mergekit")
    parser.add_argument("--python", type=Path, help="of an environment with mergekit")
    python = parser.parse_args().python
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        python = python or install(root / "venv")
        print(f"mergekit {version(python, 'mergekit')}, torch {version(python, 'torch')}")
        write_family(root)
        plan = root / "plan.json"
        flexmerge("plan", "--base", root / "base", "--tasks", root / "tasks", "--merge-heads", "-o", plan)
        worst = 0.0
        for name, (of_merge, of_model, method) in CASES.items():
            theirs = mergekit(python, root, name, of_merge, of_model)
            flexmerge("merge", plan, "--method", method, "--size", "1x", "-o", root / f"ours-{name}")
            flexmerge("export", root / f"ours-{name}", "--task", TASKS[0], "-o", root / f"model-{name}")
            ours, base = load_file(root / f"model-{name}/model.safetensors"), load_file(root / "base/model.safetensors")
            assert sorted(ours) == sorted(theirs) == sorted(base)
            largest = max(float(np.abs(ours[key] - theirs[key]).max()) for key in base)
            moved = max(float(np.abs(theirs[key] - base[key]).max()) for key in base)
            print(f"{name:16} largest difference {largest:.1e} where weights change by {moved:.3f}   {method}")
            worst = max(worst, largest)
    return int(worst > TOLERANCE)


def install(folder: Path) -> Path:
    """A new environment with mergekit in it."""
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    for packages in ([TORCH], ["mergekit", TORCH]):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def version(python: Path, package: str) -> str:
    code = f"from importlib.metadata import version; print(version('{package}'))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def write_family(root: Path) -> None:
    """A Llama of random weights and three fine-tunes, each with changes of its own and some that all share."""
    shapes = {
        "model.embed_tokens.weight": (WORDS, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (WORDS, HIDDEN),
    }
    for layer in range(LAYERS):
        path = f"model.layers.{layer}"
        shapes |= {f"{path}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{path}.mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{path}.mlp.down_proj.weight": (HIDDEN, INNER)}
        shapes |= {f"{path}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "vocab_size": WORDS,
        "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 4,
        "tie_word_embeddings": False, "torch_dtype": "float32", "rms_norm_eps": 1e-6, "max_position_embeddings": 128,
    }  # fmt: skip
    random = np.random.default_rng(0)

    def draw(size: float) -> dict[str, np.ndarray]:
        return {name: size * random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}

    base, common = draw(1.0), draw(0.02)
    models = {"base": base}
    for task in TASKS:
        models[f"tasks/{task}"] = {name: base[name] + common[name] + own for name, own in draw(0.05).items()}
    for folder, state in models.items():
        (root / folder).mkdir(parents=True)
        save_file(state, root / folder / "model.safetensors", metadata={"format": "pt"})
        (root / folder / "config.json").write_text(json.dumps(config))


def mergekit(python: Path, root: Path, method: str, of_merge: dict, of_model: dict) -> dict[str, np.ndarray]:
    """What mergekit makes of the family."""
    config = {
        "merge_method": method,
        "models": [{"model": str(root / "tasks" / task), "parameters": of_model} for task in TASKS],
        "parameters": of_merge,
        "dtype": "float32",
    }
    if method != "linear":
        config["base_model"] = str(root / "base")
    (root / f"{method}.yaml").write_text(json.dumps(config))
    command = [
        python.parent / "mergekit-yaml",
        root / f"{method}.yaml",
        root / f"theirs-{method}",
        "--no-copy-tokenizer",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"mergekit fails:\n{done.stderr[-2000:]}")
    found: dict[str, np.ndarray] = {}
    for path in sorted((root / f"theirs-{method}").glob("*.safetensors")):
        found |= load_file(path)
    return found


def flexmerge(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "flexmerge_cli", *map(str, arguments), "--quiet"], check=True)


if __name__ == "__main__":
    sys.exit(main())
