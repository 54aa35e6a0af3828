import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from flexmerge_cli.evaluation import processes

from .curves import Digits, digits


@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> Digits:
    """Read only."""
    return digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture
def forked_workers(monkeypatch):
    """Fork the processes of scores, which need not import torch then, and pickle what they get all the same.

    They are started afresh in test_processes.py and test_scores.py, and where CUDA, which no fork survives, is in use.
    """
    if torch.cuda.is_initialized():
        return
    fork = multiprocessing.get_context("fork")

    def pool(number, _context, begin, given):
        return ProcessPoolExecutor(number, fork, begin, pickle.loads(pickle.dumps(given)))

    monkeypatch.setattr(processes, "ProcessPoolExecutor", pool)
