"""Makes the README.md of a bundle, which the Hub shows, from its manifest, its plan and its scores.

The card is for people, who may rewrite it, so it is in no list of the manifest and counts nothing in sizes. The last
line holds the digest of what is above it: a card that nobody has changed is flexmerge's own, which `--force` replaces.
Names and licences may come from strangers, so nothing of them is Markdown, HTML or YAML here.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from flexmerge_cli.checkpoint.place import HubPlace, is_remote
from flexmerge_cli.errors import FlexmergeError, UsageError
from flexmerge_cli.formats.manifest import Manifest
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.regular_file import read_file

MAX_CARD_BYTES = 16 << 20
UNKNOWN = "unknown"
PLAIN = re.compile(r"[A-Za-z0-9][\w./@:+-]*", re.ASCII)
ARCHITECTURE = re.compile(r"[A-Za-z]\w{0,80}", re.ASCII)
MARK = "<!-- flexmerge replaces this card as long as it is unchanged: sha256 {} -->\n"
REPOSITORY = "ORG/NAME"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """The score of one task, as text."""

    metric: str
    merged: str
    fine_tuned: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The scores of a bundle."""

    bundle: str
    """The id of its manifest."""
    tasks: Mapping[str, TaskScore]

    def check(self, manifest: Manifest) -> None:
        """Raise UsageError if the scores belong to another bundle."""
        if self.bundle != manifest.id:
            raise UsageError(
                f"the scores are of the bundle {self.bundle}, and this is {manifest.id}: it is not published",
                hint="score the bundle of this plan and request, with `flexmerge eval bundle/ --json`",
            )


def make_card(folder: Path, manifest: Manifest, plan: Plan, scores: Scores | None = None) -> str:
    """Return the card of the bundle in a folder. The same bundle and scores give the same text."""
    text = "\n\n".join(
        [
            f"---\n{yaml.safe_dump(_front_matter(plan), sort_keys=False, allow_unicode=True)}---",
            _what_it_is(manifest, plan),
            _tasks(manifest, plan, scores),
            _use(folder, manifest, plan),
            _licenses(plan),
        ]
    )
    text += "\n\n"
    return text + MARK.format(hashlib.sha256(text.encode()).hexdigest())


def is_own_card(path: Path) -> bool:
    """Return whether flexmerge wrote this card and nobody has changed it since."""
    try:
        text, _, _ = read_file(path, MAX_CARD_BYTES, "a card").rpartition(MARK.split("{}")[0].encode())
        return text + MARK.format(hashlib.sha256(text).hexdigest()).encode() == path.read_bytes()
    except (FlexmergeError, OSError):
        return False


def _front_matter(plan: Plan) -> dict[str, Any]:
    sources = (plan.base.source, *(reader.source for reader in plan.readers))
    models = [name for name in dict.fromkeys(map(_repository, sources)) if name is not None]
    found: dict[str, Any] = {}
    if models:
        found = {"base_model": models, "base_model_relation": "merge"}
    found |= {"library_name": "flexmerge", "tags": ["flexmerge", "merge", "model-merging"]}
    named = set(_licenses_of(plan).values())
    if UNKNOWN in named:
        return found | {"license": UNKNOWN}
    if len(named) > 1:
        return found | {"license": "other", "license_name": "several-see-the-card"}
    return found | {"license": named.pop()}


def _what_it_is(manifest: Manifest, plan: Plan) -> str:
    count = len(manifest.tasks)
    factor = manifest.stored_bytes / max(1, manifest.one_model_bytes)
    models = f"{count} fine-tuned models of" if count > 1 else "A fine-tuned model of"
    text = f"""# {count} fine-tuned {"models" if count > 1 else "model"} in one bundle

{models} {_name(plan.base.source)}, packed by flexmerge, which stores what they share once:
{manifest.stored_bytes:,} bytes of tensors, {factor:.4g} times those of one model."""
    if manifest.request is None:
        return text
    return f"{text} Made by\n\n{_fence(manifest.request.command, 'bash')}"


def _tasks(manifest: Manifest, plan: Plan, scores: Scores | None) -> str:
    scored = scores.tasks if scores is not None else {}
    heads = ["task", "fine-tuned model", "folder", "bytes that it reads", "distance"]
    heads += ["metric", "here", "fine-tuned"] if scored else []
    rows = []
    for reader in plan.readers:
        entry = manifest.tasks[reader.name]
        num_bytes = sum(manifest.files[path].bytes for path in manifest.weight_files(reader.name))
        distance = "exact" if entry.exact else "–" if entry.distance is None else f"{entry.distance:.4f}"
        folder = manifest.side_folder(reader.name)
        row = [f"`{reader.name}`", _name(reader.source), f"`{folder}`", f"{num_bytes:,}", distance]
        score = scored.get(reader.name)
        if scored:
            row += [_plain(score.metric), score.merged, score.fine_tuned] if score is not None else ["–"] * 3
        rows.append(row)
    lines = [heads, ["---"] * len(heads), *rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    way = "must be exported first" if _is_exportable(manifest) else "can be used in Python alone"
    as_it_is = (
        "loads as it lies" if manifest.surgery is None else "loads without the corrections of what last layers get"
    )
    return f"""## Tasks

{table}

Distance is ‖θ̂ − θ‖/‖τ‖: how far the weights are from those of the fine-tuned model, relative to what fine-tuning
changed. A folder below `tasks` {as_it_is}; what is below `coded` {way}."""


def _is_exportable(manifest: Manifest) -> bool:
    """Return whether ordinary checkpoints can hold the models."""
    return manifest.surgery is None and not any(map(manifest.has_experts, manifest.tasks))


def _use(folder: Path, manifest: Manifest, plan: Plan) -> str:
    first = plan.readers[0].name
    in_place = [n for n in manifest.tasks if manifest.tasks[n].stem is not None and manifest.surgery is None]
    kinds = {task.name: task.library for task in plan.tasks}
    loads = next((name for name in in_place if kinds.get(name) == "transformers"), None)
    parts = ["## Use"]
    if loads is not None:
        model = _architecture(folder / manifest.side_folder(loads) / "config.json")
        snippet = f'from transformers import {model}\n\nmodel = {model}.from_pretrained("{REPOSITORY}", '
        parts.append("One task in transformers:\n\n" + _fence(f'{snippet}subfolder="tasks/{loads}")', "python"))
    elif manifest.kept and manifest.base_stem is not None:
        snippet = f'base = AutoModel.from_pretrained("{REPOSITORY}", subfolder="base")\n'
        snippet += f'model = PeftModel.from_pretrained(base, "{REPOSITORY}", subfolder="tasks/{manifest.kept[0]}")'
        imports = "from peft import PeftModel\nfrom transformers import AutoModel\n\n"
        parts.append("One adapter in peft:\n\n" + _fence(imports + snippet, "python"))
    commands = [
        "pip install flexmerge-cli",
        f"flexmerge export hf://{REPOSITORY} --task {first} -o {first}/   # any task as an ordinary checkpoint",
    ][: 2 if _is_exportable(manifest) else 1]
    python = f'from flexmerge_cli import open_bundle\n\nmodel = open_bundle("hf://{REPOSITORY}").model("{first}")'
    parts.append(f"Any task, of which only its own files are fetched:\n\n{_fence(chr(10).join(commands), 'bash')}")
    parts.append(f"Several tasks in one process share what the bundle stores once:\n\n{_fence(python, 'python')}")
    parts.append(f"All tasks over HTTP:\n\n{_fence(f'flexmerge serve hf://{REPOSITORY}', 'bash')}")
    return "\n\n".join(parts)


def _licenses_of(plan: Plan) -> dict[str, str]:
    """Map every task, and the base under the empty name, to its licence."""
    named = {"": plan.base.license} | {reader.name: reader.license for reader in plan.readers}
    return {name: license or UNKNOWN for name, license in named.items()}


def _licenses(plan: Plan) -> str:
    by_license: dict[str, list[str]] = {}
    for name, license in _licenses_of(plan).items():
        by_license.setdefault(license, []).append(f"`{name}`" if name else "the base")
    lines = [
        f"- {'**unknown**' if license == UNKNOWN else _plain(license)}: {', '.join(names)}"
        for license, names in sorted(by_license.items())
    ]
    known = by_license.keys() - {UNKNOWN}
    notes = []
    if len(known) > 1:
        notes.append("The models have different licences; whoever uses a task is bound by its own and by the base's.")
    if UNKNOWN in by_license:
        notes.append("Where the licence is unknown, the model's card names none, or was not there.")
    return "\n\n".join(["## Licences", "As the models' own cards name them:", "\n".join(lines), *notes])


def _architecture(config: Path) -> str:
    try:
        named = json.loads(read_file(config, MAX_CARD_BYTES, "a config")).get("architectures")
        if isinstance(named, list) and isinstance(named[0], str) and ARCHITECTURE.fullmatch(named[0]):
            return named[0]
    except (FlexmergeError, ValueError, LookupError, AttributeError, RecursionError):
        pass
    return "AutoModel"


def _name(source: str) -> str:
    """Return a source as readers see it: a repository of the Hub, or the last part of a local path."""
    repository = _repository(source)
    if repository is not None:
        return f"[`{repository}`](https://huggingface.co/{repository})"
    return _plain(source if is_remote(source) else PurePosixPath(source).name or source)


def _repository(source: str) -> str | None:
    """Return the repository of a source on the Hub, and None for any other source."""
    try:
        return HubPlace.of(source).repository
    except UsageError:
        return None


def _plain(text: str) -> str:
    """Escape text so that Markdown shows it unchanged, also in the cell of a table."""
    if PLAIN.fullmatch(text):
        return f"`{text}`"
    one_line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return "".join(c if c.isalnum() or c in " ," else f"&#{ord(c)};" for c in one_line)


def _fence(text: str, language: str) -> str:
    """Return a fenced block of code that holds any text, backticks included."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return f"{'`' * max(3, longest + 1)}{language}\n{text}\n{'`' * max(3, longest + 1)}"
