"""What logging costs a default PPO run on the tiny world, tracked offline by W&B.

    python benchmarks/tracking.py [overrides of stages/ppo.py]

Needs sft/tiny and rm/tiny (make sft rm). CPU seconds, because other work may run beside it:
those spent inside the tracker's calls and in what is computed for it alone, those of W&B's threads
in the same process, and those of W&B's own processes, beside those of the whole run. Importing
wandb is aside.
"""

from __future__ import annotations

import functools
import os
import resource
import runpy
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

spent: Counter[str] = Counter()
calls: Counter[str] = Counter()
threads: dict[str, float] = {}
_inside = False


def timed(owner: Any, name: str) -> None:
    """Count the CPU seconds of the outermost of the watched calls, on their own thread."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        global _inside
        if _inside:
            return function(*args, **kwargs)
        _inside, start = True, time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            _inside = False
            spent[name] += time.thread_time() - start
            calls[name] += 1
            note_threads()

    setattr(owner, name, watched)


def note_threads() -> None:
    """CPU seconds so far of the threads that wandb started in this process."""
    tick = os.sysconf("SC_CLK_TCK")
    for thread in threading.enumerate():
        if "wandb" in thread.name.lower() or "asyncio" in thread.name.lower():
            stat = Path(f"/proc/self/task/{thread.native_id}/stat")
            if stat.exists():
                fields = stat.read_text().rpartition(")")[2].split()
                threads[thread.name] = (int(fields[11]) + int(fields[12])) / tick


def children() -> float:
    """CPU seconds of the processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    import wandb

    from rlhf import ppo
    from rlhf.tracking import Tracker

    watched = ("__init__", "log", "histograms", "samples", "summary", "publish", "close")
    for name in watched:
        timed(Tracker, name)
    timed(ppo, "distributions")
    start, began = time.process_time(), time.perf_counter()
    fresh = ["run_name=tracking-cost", "overwrite=true"]  # a finished run would cost nothing
    sys.argv = ["stages/ppo.py", "tracking.mode=offline", *fresh, *sys.argv[1:]]
    try:
        runpy.run_path(str(ROOT / "stages" / "ppo.py"), run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise
    assert calls["log"], "it logged nothing: is this run finished already?"
    whole, wall, before = time.process_time() - start, time.perf_counter() - began, children()
    wandb.teardown()
    service = children() - before

    def row(what: str, seconds: float, count: str = "") -> None:
        print(f"| {what} | {count} | {seconds:.2f} | {100 * seconds / whole:.2f} % |")

    print("\n| | calls | CPU s | of the run |\n|---|---|---|---|")
    row(f"the run ({wall:.0f} s by the clock)", whole)
    for name in ("__init__", "log", "histograms", "samples", "distributions", "summary"):
        row(name, spent[name], str(calls[name]))
    for name in ("publish", "close"):
        row(name, spent[name], str(calls[name]))
    row("**in all**", sum(spent.values()))
    row("W&B's threads in this process", sum(threads.values()))
    row("W&B's own processes", service)


if __name__ == "__main__":
    main()
