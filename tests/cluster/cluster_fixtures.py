"""Fixtures of the tests on a real SLURM: a cluster of two nodes, and what one machine makes of the same slides.

Loaded by tests/conftest.py: a second file of that name would hide it from the tests that import from it.
"""

import os

import pytest


@pytest.fixture(scope="session")
def cluster():
    """The two nodes. They are started for `make cluster-test` alone, since that takes the machine's SLURM over."""
    if "DINOSCOPE_CLUSTER_TESTS" not in os.environ:
        pytest.skip("tests on a real SLURM run with make cluster-test, which starts one on this machine")
    from two_nodes import two_nodes, why_not

    if (reason := why_not()) is not None:
        pytest.skip(f"no SLURM can be started here: {reason}")
    with two_nodes() as nodes:
        yield nodes


@pytest.fixture(scope="session")
def local(cluster, tmp_path_factory):
    """The whole workflow on this machine, without SLURM; what all others must equal."""
    # here, because these load what most test runs do not need
    from cluster_runs import make_folder, run_locally

    folder = make_folder(tmp_path_factory.mktemp("local"))
    run_locally(folder)
    return folder
