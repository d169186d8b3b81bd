"""Starting the processes of a run, and what a started process needs to know. Never imports torch."""

from llm_launch.local import launch_local
from llm_launch.worker import WorkerEnv, report_error, worker_environment

__all__ = ["WorkerEnv", "launch_local", "report_error", "worker_environment"]
