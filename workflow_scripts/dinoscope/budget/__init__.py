"""What a configured workflow will take, before its first job: tiles, disk space, hours, jobs."""
