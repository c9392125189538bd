"""Fixtures of the tests on a real SLURM: a cluster of two nodes, and what one machine makes of the same slides."""

import os

import pytest

from cluster_runs import make_folder, run_locally
from two_nodes import two_nodes, why_not


@pytest.fixture(scope="session")
def cluster():
    """The two nodes. They are started for `make cluster-test` alone, since that takes the machine's SLURM over."""
    if "DINOSCOPE_CLUSTER_TESTS" not in os.environ:
        pytest.skip("tests on a real SLURM run with make cluster-test, which starts one on this machine")
    if (reason := why_not()) is not None:
        pytest.skip(f"no SLURM can be started here: {reason}")
    with two_nodes() as nodes:
        yield nodes


@pytest.fixture(scope="session")
def local(cluster, tmp_path_factory):
    """The whole workflow on this machine, without SLURM; what all others must equal."""
    folder = make_folder(tmp_path_factory.mktemp("local"))
    run_locally(folder)
    return folder
