# SPDX-License-Identifier: MIT OR Apache-2.0
"""Starts one program after the other and says what each one cost. A process of its own, as small as Python
can be.

Small, because Linux counts what a process had in memory *before* execve(2) into its peak (getrusage(2),
`ru_maxrss`): a program started by the benchmark itself would seem to need the benchmark's memory. So this
imports built-in modules only, and runs without `site`.

Standard input brings, in `marshal`'s format, a command, its environment, its folder and the file for its
output; standard output gives its process ID at once, and at its end its wait status, seconds of wall time,
user time and system time, and the peak memory in KiB, each with all its children.
"""

import marshal
import posix
import sys
import time


def main() -> None:
    """Serve until standard input ends."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while True:
        try:
            command, environment, folder, output = marshal.load(requests)
        except EOFError:
            return
        started = time.perf_counter()
        child = posix.fork()
        if not child:
            try:
                posix.chdir(folder)
                nothing = posix.open("/dev/null", posix.O_RDONLY)
                said = posix.open(output, posix.O_WRONLY | posix.O_CREAT | posix.O_TRUNC, 0o600)
                posix.dup2(nothing, 0)
                posix.dup2(said, 1)
                posix.dup2(said, 2)
                posix.execve(command[0], command, environment)
            finally:
                posix._exit(126)
        marshal.dump(child, answers)
        answers.flush()
        _, status, usage = posix.wait4(child, 0)
        took = time.perf_counter() - started
        marshal.dump((status, took, usage.ru_utime, usage.ru_stime, usage.ru_maxrss), answers)
        answers.flush()


main()
