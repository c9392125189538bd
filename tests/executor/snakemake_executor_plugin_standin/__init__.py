"""A stand-in for a cluster: jobs are submitted as to one, run on this machine, and their demands written down.

Found by Snakemake under the name `standin` when this folder is in PYTHONPATH.
"""

import json
import subprocess
from pathlib import Path

from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor
from snakemake_interface_executor_plugins.settings import CommonSettings

common_settings = CommonSettings(non_local_exec=True, implies_no_shared_fs=False, job_deploy_sources=False)


class Executor(RemoteExecutor):
    """Runs what would be submitted and appends {"name", "jobs", "cores", "mem_mb", "runtime"} to submitted.jsonl."""

    def __post_init__(self):
        self.processes = {}

    def run_job(self, job):
        demands = {name: job.resources.get(name) for name in ("mem_mb", "runtime")}
        line = {"name": job.name, "jobs": len(job.jobs) if job.is_group() else 1, "cores": job.threads, **demands}
        with open("submitted.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        script = Path(self.get_jobscript(job))
        self.write_jobscript(job, script)
        self.processes[job] = subprocess.Popen(["bash", script])
        self.report_job_submission(SubmittedJobInfo(job))

    async def check_active_jobs(self, active_jobs):
        for submitted in active_jobs:
            status = self.processes[submitted.job].poll()
            if status is None:
                yield submitted
            elif status == 0:
                self.report_job_success(submitted)
            else:
                self.report_job_error(submitted)

    def cancel_jobs(self, active_jobs):
        for submitted in active_jobs:
            self.processes[submitted.job].kill()
