"""Scores ensembles of fine-tuned models whose heads have the same labels: what a merge of them has to beat.

mean       the mean of the models' outputs
weighted   the mean weighted by each model's confidence on the example: 1 - H(p)/log C, with H the entropy of its C
           probabilities
max_model  the greatest output of each class over the models
The outputs are logits, float32 [n, C]. No labels are used. An ensemble costs the bytes of M models, and M models run on
each example.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from flexmerge_cli.evaluation.cross import mismatches
from flexmerge_cli.evaluation.kinds.classes import class_scores
from flexmerge_cli.evaluation.scored import Scored, TaskModel
from flexmerge_cli.evaluation.scoring import Scorer

LOGITS = "recall@1"
"""A metric whose outputs are the logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ensemble:
    """The scores of an ensemble on the data of each of its tasks."""

    rule: str
    """A name in RULES."""
    num_bytes: int
    """The bytes of all its models."""
    scores: Mapping[str, Scored]
    """The scores by task; every task's model is a member."""


def mean(logits_MnC: np.ndarray) -> np.ndarray:
    found: np.ndarray = logits_MnC.mean(0)
    return found


def weighted(logits_MnC: np.ndarray) -> np.ndarray:
    from scipy.special import log_softmax

    logs = log_softmax(logits_MnC.astype(np.float64), -1)
    entropy_Mn = -(np.exp(logs) * logs).sum(-1)
    weight_Mn = np.maximum(1 - entropy_Mn / np.log(logs.shape[-1]), np.finfo(np.float64).tiny)
    found: np.ndarray = np.einsum("mn,mnc->nc", weight_Mn / weight_Mn.sum(0), logits_MnC)
    return found


def max_model(logits_MnC: np.ndarray) -> np.ndarray:
    found: np.ndarray = logits_MnC.max(0)
    return found


RULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"mean": mean, "weighted": weighted, "max_model": max_model}


def one_label_space(scorer: Scorer, folders: Mapping[str, Path]) -> list[list[str]]:
    """Return the groups of at least two tasks whose models can be scored on each other's data, in the spec's order.

    folders: maps each task to the folder of its side files. Only kinds with classes count.
    """
    tasks = [task for task in scorer.spec.tasks if "recall@k" in scorer.spec.kind(task).metrics]
    others = {task: mismatches(scorer, task, folders) for task in tasks}
    groups: list[list[str]] = []
    for task in tasks:
        alike = (group for group in groups if all(others[task][of] is others[of][task] is None for of in group))
        group = next(alike, None)
        if group is None:
            groups.append([task])
        else:
            group.append(task)
    return [group for group in groups if len(group) > 1]


def ensembles(
    scorer: Scorer,
    models: Mapping[str, TaskModel],
    folders: Mapping[str, Path],
    *,
    on_score: Callable[[str, int, int], None] = lambda *_step: None,
) -> list[Ensemble]:
    """Score every rule on every group of one label space; one model is in memory at a time.

    models: the fine-tuned ones, by task. Every model of a group runs on the data of every task of the group.
    """
    found = []
    for group in one_label_space(scorer, folders):
        outputs, labels = _outputs(scorer, models, folders, group, on_score)
        num_bytes = sum(models[task].num_bytes or 0 for task in group)
        for rule, combine in RULES.items():
            scores = {
                task: class_scores(combine(outputs[task]), labels[task], [_metric(scorer, task, folders)])[0]
                for task in group
            }
            found.append(Ensemble(rule=rule, num_bytes=num_bytes, scores=scores))
    return found


def _metric(scorer: Scorer, task: str, folders: Mapping[str, Path]) -> str:
    return scorer.examples(task, folders[task]).metrics[0]


def _outputs(
    scorer: Scorer,
    models: Mapping[str, TaskModel],
    folders: Mapping[str, Path],
    group: Sequence[str],
    on_score: Callable[[str, int, int], None],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the logits of all models on each task's data, [M, n, C], and the labels, [n]."""
    tasks = {task: scorer.spec.tasks[task].model_copy(update={"metric": LOGITS}) for task in group}
    of_logits = replace(scorer, spec=scorer.spec.model_copy(update={"tasks": tasks}), _examples={})
    found: dict[str, list[Scored]] = {task: [] for task in group}
    for place, member in enumerate(group):
        for number, task in enumerate(group):
            on_score("ensembles", place * len(group) + number, len(group) ** 2)
            model = replace(models[member], task=task, folder=folders[member])
            found[task].append(of_logits.score(model))
    logits = {task: np.stack([one.predictions for one in scored]) for task, scored in found.items()}
    return logits, {task: scored[0].labels for task, scored in found.items()}
