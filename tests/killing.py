"""A process that is killed at a moment of the test's choice."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable

from tqdm import tqdm


def killed(work: Callable[[], object], is_time: Callable[[], bool]) -> bool:
    """Do `work` in a child process that gets SIGKILL as soon as `is_time`; whether that came before its end."""
    child = os.fork()
    if child == 0:
        # The one of all processes would stay locked after a kill.
        tqdm.set_lock(threading.RLock())
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    while not is_time():
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, "the work failed by itself"
            return False
        time.sleep(0.0002)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])
