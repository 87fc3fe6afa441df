"""Each job in a process of its own, so that its peak memory is its own; it ends with its parent.

In: jobs and their folders. Out: nothing but what jobs leave in their folders. Never: two at once, since their wall
times are compared.
"""

from __future__ import annotations

from multiprocessing import connection, get_context
from pathlib import Path

from pipeline.benchmark.records import Job
from pipeline.children import begin_child
from pipeline.errors import EvidenceError, Interrupted, TakedownError, UsageError
from pipeline.progress import listening, tell

CLASSES = {kind.exit_code: kind for kind in (EvidenceError, UsageError, Interrupted)}


def run_alone(job: Job, folder: Path) -> None:
    """Do a job in a new process and wait for it, passing on its progress.

    Raises:
        TakedownError: The job's own, by its exit code.
        Interrupted: The process died; what it finished is kept.
    """
    context = get_context("spawn")  # not forked: this process may have threads, and its memory would be counted
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_begin, args=(job.model_dump_json(), str(folder), send), daemon=True)
    process.start()
    send.close()
    failed: tuple[int, str] | None = None
    try:
        while True:
            kind, told = receive.recv()
            if kind == "progress":
                tell(*told)
            else:
                failed = told
    except EOFError:
        process.join()
    finally:
        process.kill()  # where this process was interrupted; nothing that was finished is lost
        process.join()
        receive.close()
    if failed is not None:
        raise CLASSES[failed[0]](failed[1])
    if process.exitcode != 0:
        raise Interrupted(
            f"The process of {job.method}, seed {job.settings.runtime.seed}, ended with {process.exitcode}, perhaps "
            "for want of memory. What it finished is kept: the same command goes on."
        )


def _begin(job: str, folder: str, send: connection.Connection) -> None:
    """The new process: torch is imported here, and Ctrl-C is the parent's to handle."""
    begin_child()
    import torch
    import transformers

    from pipeline.benchmark.sequence import work

    task = Job.model_validate_json(job)
    torch.set_num_threads(task.threads)
    transformers.utils.logging.disable_progress_bar()  # the parent draws its own
    transformers.utils.logging.set_verbosity_error()
    with listening(lambda *told: send.send(("progress", told))):
        try:
            work(task, Path(folder))
        except TakedownError as error:
            send.send(("failed", (error.exit_code, str(error))))
