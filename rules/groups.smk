"""Grouped jobs of thousands of slides are planned in one pass.

Snakemake (9.27) looks for groups that wait for themselves anew for every job of a group, through everything that the job
depends on: for 300 slides in groups that is many minutes, for 5,000 it would be days. The same is found here at once.
"""

from collections import Counter, defaultdict

from snakemake.dag import DAG
from snakemake.exceptions import WorkflowError


def check_groups(dag):
    """Raises WorkflowError when a group waits for itself, by way of jobs or groups outside of it.

    With a group counted as one job there must be an order in which all can run.
    """
    units = {job: id(dag._group.get(job, job)) for job in dag.jobs}
    followers, waits_for = defaultdict(set), Counter()
    for job, unit in units.items():
        for dependency in dag._dependencies[job]:
            other = units[dependency]
            if other != unit and unit not in followers[other]:
                followers[other].add(unit)
                waits_for[unit] += 1
    ready = [unit for unit in set(units.values()) if not waits_for[unit]]
    while ready:
        for follower in followers[ready.pop()]:
            waits_for[follower] -= 1
            if not waits_for[follower]:
                ready.append(follower)
    stuck = {unit for unit, number in waits_for.items() if number}
    if stuck:
        labels = sorted(
            {job.group for job, unit in units.items() if unit in stuck and job.group}
        )
        raise WorkflowError(
            f"jobs of the groups {', '.join(labels)} wait for each other: give their rules other groups"
        )


if hasattr(DAG, "_check_groups") and hasattr(DAG, "validate_group"):
    DAG._check_groups = check_groups
    DAG.validate_group = lambda dag, group: None  # what it looks for is found above
