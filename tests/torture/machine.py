"""Faults of the machine: no room, no descriptors, no memory, no entropy, no output, signals, what is missing or
broken, and an environment that means harm.

What is asked of every run: one of the four exit statuses, the key file unharmed, and that the next, undisturbed run
ends where it would have ended without the fault.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, Optional

import world
from world import Run

from torture import power
from torture.fleet import DeviceUnderTest, Fleet
from torture.namespaces import cover, isolated, memory_disk, read_only, small_disk
from torture.report import Case, sample

#: Those that end a process, signal(7).
SIGNALS = [
    *("HUP", "INT", "QUIT", "TERM", "USR1", "USR2", "ALRM"),
    *("VTALRM", "PROF", "IO", "STKFLT", "XCPU", "XFSZ", "PWR"),
]


def case(
    fleet: Fleet,
    name: str,
    make: Callable[[], DeviceUnderTest],
    *options: str,
    status: Optional[int] = None,
    unchanged: bool = False,
    **how: Any,
) -> Case:
    """One run under `how`, which ends with `status` (None: as if nothing were), and then an undisturbed one."""

    def act() -> list[str]:
        dut = make()
        run = dut.run(*options, **how)
        return verdict(fleet, dut, run, (dut.status if status is None else status,), unchanged)

    return Case(name, act)


def verdict(
    fleet: Fleet, dut: DeviceUnderTest, run: Run, expected: Sequence[int], unchanged: bool = False
) -> list[str]:
    """What went wrong in a run and in the one after it."""
    wrong = fleet.broken(dut, run)
    if run.status not in expected:
        wrong.append(f"exit status {run.status} where {list(expected)} was to be expected: {run.err[-200:]!r}")
    if unchanged and dut.content != dut.old:
        wrong.append("the key file was changed")
    wrong += [f"next: {problem}" for problem in fleet.recovered(dut)]
    if not wrong:
        fleet.forget(dut)
    return wrong


# --- Disks


def _fill(folder: Path, left: int) -> None:
    """Fills the file system of `folder` but for `left` bytes."""
    with open(folder / "filler", "wb", buffering=0) as file:
        for size in (65536, 4096, 1024, 1):
            try:
                while file.write(b"x" * size) == size:
                    pass
            except OSError:
                continue
        os.fsync(file.fileno())
        file.truncate(max(0, file.tell() - left))
        os.fsync(file.fileno())


def _no_more_files(folder: Path) -> None:
    """Takes all the inodes that are left."""
    for number in range(6):
        with suppress(OSError):
            (folder / f"filler{number}").touch()


def full_disk(fleet: Fleet, scenario: str, kind: str, left: int) -> Case:
    """A scenario on a file system that has `left` bytes left, or, of the kind "inodes", as many and no inode."""

    def on_it() -> list[str]:
        dut = fleet.scenarios[scenario]()
        folder = dut.device.key_file.parent
        folder.mkdir(exist_ok=True)
        present = {path.name: (path.read_bytes(), path.stat()) for path in folder.iterdir()}
        if kind == "ext4":
            small_disk(folder, dut.device.folder / "disk")
        else:
            memory_disk(folder, 65536, inodes=5 if kind == "inodes" else 0)
        for name, (data, state) in present.items():
            (folder / name).write_bytes(data)
            (folder / name).chmod(state.st_mode & 0o777)
            os.chown(folder / name, state.st_uid, state.st_gid)
        if dut.inode is not None:
            dut.inode = dut.device.key_file.stat().st_ino
        if kind == "inodes":
            _no_more_files(folder)
        else:
            _fill(folder, left)
        run = dut.run()
        # With nothing left nothing new can be stored: then it has to be 127, unless a left draft made room.
        nothing = (left == 0 or kind == "inodes") and scenario != "clean-up of a bad file"
        expected = (127,) if nothing else (127, dut.status)
        wrong = fleet.broken(dut, run)
        if run.status not in expected:
            wrong.append(f"exit status {run.status}, not among {expected}: {run.err!r}")
        for filler in folder.glob("filler*"):
            filler.unlink()
        return wrong + [f"next: {problem}" for problem in fleet.recovered(dut)]

    return Case(f"{scenario} on a {kind} with {left} bytes left", lambda: isolated(on_it))


def read_only_disk(fleet: Fleet, name: str, make: Callable[[], DeviceUnderTest], expected: int) -> Case:
    def act() -> list[str]:
        dut = make()
        dut.device.key_file.parent.mkdir(exist_ok=True)

        def on_it() -> Run:
            read_only(dut.device.key_file.parent)
            return dut.run()

        return verdict(fleet, dut, isolated(on_it), (expected,), unchanged=dut.old is not None)

    return Case(f"{name} on a read-only file system", act)


def disks(fleet: Fleet, full: bool = True) -> list[Case]:
    scenarios = list(fleet.scenarios) if full else ["first enrollment", "renewal"]
    sizes = {"ext4": (0, 1024, 4096, 8192), "tmpfs": (0, 4096, 8192), "inodes": (65536,)}
    if not full:
        sizes = {"ext4": (0, 1024), "inodes": (65536,)}
    found = [
        full_disk(fleet, scenario, kind, left)
        for kind, lefts in sizes.items()
        for left in lefts
        for scenario in scenarios
        if (kind, scenario) != ("inodes", "clean-up of a bad file")
    ]
    found += [
        read_only_disk(fleet, "an unchanged certificate", fleet.certified, 0),
        read_only_disk(fleet, "a pending request", fleet.pending, 69),
        read_only_disk(fleet, "a first enrollment", fleet.first_enrollment, 127),
        read_only_disk(fleet, "a renewal", fleet.renewal, 127),
    ]
    if full:
        found.append(read_only_disk(fleet, "a rejection", fleet.rejection, 127))
    return found


# --- Descriptors and memory


def _interpreter() -> str:
    return str(Path(world.PLAIN).with_name("python3"))


def _shell_starts(before: Sequence[str], folder: Path) -> bool:
    """Whether a shell script that does nothing gets through under the same limit."""
    script = folder / "bare"
    script.write_text("#!/bin/sh\nexit 7\n")
    script.chmod(0o755)
    done = subprocess.run(
        [*before, str(script)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=30,
    )
    return done.returncode == 7


def limited(fleet: Fleet, scenario: str, *limit: str) -> Case:
    """A scenario under a limit of prlimit(1). Where no shell starts, the status is the shell's."""

    def act() -> list[str]:
        dut = fleet.scenarios[scenario]()
        before = ("prlimit", *limit)
        run = dut.run("--timeout=5", before=before)
        if run.status not in (127, dut.status) and not _shell_starts(before, dut.device.folder):
            run = Run(127, run.out, run.err, run.seconds)
        return verdict(fleet, dut, run, (127, dut.status))

    return Case(f"{scenario} with {' '.join(limit)}", act)


def starved(fleet: Fleet, full: bool = True) -> list[Case]:
    scenarios = list(fleet.scenarios) if full else ["first enrollment", "renewal"]
    descriptors = range(3, 20) if full else (11, 12, 13, 14, 16)
    megabytes = [*range(4, 40), *range(40, 120, 4)] if full else (12, 20, 24, 28, 32, 40, 60)
    cases = [
        limited(fleet, scenarios[number % len(scenarios)], f"--nofile={limit}")
        for number, limit in enumerate(limit for limit in descriptors for _ in range(2 if full else 1))
    ]
    cases += [
        limited(fleet, scenarios[number % len(scenarios)], f"--as={limit * 1_000_000}")
        for number, limit in enumerate(megabytes)
    ]
    # Nowhere near a limit that the shell and the interpreter mind, but none of our files may grow.
    cases += [limited(fleet, scenario, f"--fsize={size}") for scenario in scenarios for size in (0, 1000)]
    return cases


# --- Entropy


def no_entropy(fleet: Fleet, name: str, make: Callable[[], DeviceUnderTest]) -> Case:
    """getrandom(2) says that it would block, as it does early after a boot."""

    def act() -> list[str]:
        dut = make()
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "trace"
            inject = "inject=getrandom:error=EAGAIN"
            trace = "trace=getrandom,openat,connect,clock_nanosleep,poll,select"
            before = ("strace", "-f", "-y", "-o", str(log), "-e", trace, "-e", inject)
            run = dut.run(before=before)
            text = log.read_text(errors="replace")
        wrong = []
        if "(INJECTED)" not in text:
            wrong.append("getrandom was never asked")
        for line in text.splitlines():
            if "getrandom(" in line and "GRND_NONBLOCK" not in line:
                wrong.append(f"would have waited: {line}")
            if "/dev/random" in line or "AF_INET" in line:
                wrong.append(f"went on: {line}")
        if run.seconds > 5:
            wrong.append(f"took {run.seconds:.1f} s")
        if not dut.old and dut.content is not None:
            wrong.append("made something")
        return wrong + verdict(fleet, dut, run, (127,), unchanged=True)

    return Case(f"{name} without entropy", act)


def entropy(fleet: Fleet) -> list[Case]:
    return [
        no_entropy(fleet, name, make)
        for name, make in [*fleet.scenarios.items(), ("certified", fleet.certified), ("pending", fleet.pending)]
    ]


# --- Standard input, output and error


def _shell(redirections: str) -> tuple[str, ...]:
    return ("/bin/sh", "-c", f'exec "$@" {redirections}', "sh")


def outputs(fleet: Fleet, full: bool = True) -> list[Case]:
    scenarios = dict(fleet.scenarios) if full else {"first enrollment": fleet.first_enrollment}
    ways = [
        " ".join(f"{fd}>&-" for fd in range(3) if number & (1 << fd)) for number in (range(1, 8) if full else (4, 7))
    ]
    ways += [">/dev/full 2>/dev/full"] + (["</dev/full 2>/dev/full", "<&- >/dev/full"] if full else [])
    cases = []
    for scenario, make in scenarios.items():
        for way in ways:
            for loud in ("-v", "-q") if full else ("-v",):
                cases.append(case(fleet, f"{scenario} {loud} {way}", make, loud, before=_shell(way)))
        cases += [_piped(fleet, scenario, make, how) for how in ("full", "broken")]
    for option in ("--help", "--version", "--status"):
        for way in (">&-", ">/dev/full"):
            how: dict[str, Any] = {"status": 127, "unchanged": True, "before": _shell(way)}
            cases.append(case(fleet, f"{option} {way}", fleet.certified, option, **how))
    return cases


def _piped(fleet: Fleet, scenario: str, make: Callable[[], DeviceUnderTest], how: str) -> Case:
    """Standard error is a pipe that is full and that nobody reads, or one whose reader is gone."""

    def act() -> list[str]:
        dut = make()
        reader, writer = os.pipe()
        if how == "full":
            os.set_blocking(writer, False)
            with suppress(BlockingIOError):
                while True:
                    os.write(writer, b"x" * 4096)
            os.set_blocking(writer, True)
        else:
            os.close(reader)
        try:
            return verdict(fleet, dut, _with_stderr(dut, writer), (dut.status,))
        finally:
            os.close(writer)
            if how == "full":
                os.close(reader)

    return Case(f"{scenario}, standard error is a {how} pipe", act)


def _with_stderr(dut: DeviceUnderTest, fd: int) -> Run:
    with subprocess.Popen(
        dut.device.arguments(*dut.options, "-v"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=fd,
        env=world.environment(),
        start_new_session=True,
    ) as process:
        try:
            status = process.wait(30)
        except subprocess.TimeoutExpired:
            world.end(process)
            status = -1
    return Run(status, "", "", 0)


# --- Signals


def signals(fleet: Fleet, full: bool = True) -> list[Case]:
    """Each signal that can be caught, at a sample of the system calls after the program has taken them over, and one
    of them at every call inside the key file's folder."""
    cases = []
    for scenario in fleet.scenarios if full else ("renewal",):
        found = power.reference(fleet, scenario)
        taken = max(number for number, point in enumerate(found) if "(SIGPWR, {sa_handler=0x" in point.text)
        after = found[taken + 1 :]
        chosen = [Case(str(number), list) for number in range(len(after))]
        for index, name in enumerate(SIGNALS):
            picked = sample(chosen[index:], 1)
            cases += [_signal(fleet, scenario, after[int(pick.name)], name) for pick in picked]
        inside = [point for point in after if point.inside]
        cases += [_signal(fleet, scenario, point, "TERM") for point in (inside if full else inside[::6])]
    return cases


def _signal(fleet: Fleet, scenario: str, point: power.Point, name: str) -> Case:
    def act() -> list[str]:
        for _ in range(3):
            dut = fleet.scenarios[scenario]()
            run, happened = power.injected(dut, point.call, point.number, f"signal=SIG{name}")
            if happened or "SIG" in run.err or "signal" in run.err:
                break
        return verdict(fleet, dut, run, (127, dut.status))

    return Case(f"{scenario}, SIG{name} at {point}", act)


#: What a caller may ignore, and with it all that it starts.
IGNORED = ("CHLD", "PIPE", "HUP,INT,QUIT,TERM", "ALRM,VTALRM", "CHLD,HUP,INT,QUIT,TERM,PIPE,ALRM,VTALRM,XFSZ")


def ignored(fleet: Fleet, full: bool = True) -> list[Case]:
    """Signals that the caller ignores change nothing: not how a run ends, and not whether a hook has failed."""
    scenarios = list(fleet.scenarios) if full else ["renewal with a hook"]
    cases = [
        case(
            fleet,
            f"{scenario} with SIG{names} ignored",
            fleet.scenarios[scenario],
            before=("env", f"--ignore-signal={names}"),
        )
        for names in IGNORED
        for scenario in scenarios
    ]

    def failing(names: str, starter: bool) -> Case:
        def act() -> list[str]:
            dut = fleet.renewal_with_hook()
            hook = dut.device.folder / "hook"
            good = hook.read_text()
            hook.write_text("#!/bin/sh\nexit 3\n")
            # Some shells undo what is ignored, and some don't: the program has to do without their help.
            run = (dut.run if starter else dut.run_alone)(before=("env", f"--ignore-signal={names}"))
            hook.write_text(good)
            wrong = [] if "failed with status 3" in run.err else [f"it says {run.err!r}"]
            return wrong + verdict(fleet, dut, run, (127,))

        how = "" if starter else ", without the starter"
        return Case(f"a hook that fails with SIG{names} ignored{how}", act)

    return cases + [failing(names, starter) for names in IGNORED for starter in (True, False)]


def starter(fleet: Fleet, full: bool = True) -> list[Case]:
    """A signal to the starter, which is the only process that a caller knows: at each of its system calls once its
    traps are set, and at moments of the run."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "trace"
        dut = fleet.renewal()
        # Without -f: only the starter is looked at.
        dut.run(before=("strace", "-y", "-o", str(log)))
        found = power.points("".join(f"0 {line}\n" for line in log.read_text().splitlines()), Path(folder))
    ready = max(number for number, point in enumerate(found) if "(SIGXFSZ, " in point.text)
    after = found[ready + 1 :]
    # By SIGIO the starter passes the others on: before it has a child to pass them to, it has no trap for that one.
    names = [name for name in SIGNALS if name != "IO"]

    def at_call(point: power.Point, name: str) -> Case:
        def act() -> list[str]:
            dut = fleet.renewal()
            inject = f"inject={point.call}:signal=SIG{name}:when={point.number}"
            run = dut.run(before=("strace", "-o", os.devnull, "-e", f"trace={point.call}", "-e", inject))
            return verdict(fleet, dut, run, (127, dut.status))

        return Case(f"SIG{name} to the starter at {point}", act)

    def after_a_while(seconds: float, name: str) -> Case:
        def act() -> list[str]:
            dut = fleet.renewal()
            process = dut.device.start(*dut.options)
            time.sleep(seconds)
            process.send_signal(getattr(signal, f"SIG{name}"))
            return verdict(fleet, dut, dut.device.finish(process), (127, dut.status))

        return Case(f"SIG{name} to the starter after {seconds:g} s", act)

    cases = [at_call(point, names[number % len(names)]) for number, point in enumerate(after)]
    moments = [0.02 * (number + 1) for number in range(24 if full else 6)]
    return cases + [after_a_while(moment, names[number % len(names)]) for number, moment in enumerate(moments)]


def stopped(fleet: Fleet) -> Case:
    """Stopped for longer than its time limit, and then continued."""

    def act() -> list[str]:
        dut = fleet.renewal()
        process = dut.device.start(*dut.options, "--timeout=1")
        time.sleep(0.15)
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        process.send_signal(signal.SIGCONT)
        return verdict(fleet, dut, dut.device.finish(process), (0, 127))

    return Case("a renewal, stopped for a while", act)


# --- What is missing or broken


def _site() -> Path:
    return next(Path(world.PLAIN).parent.parent.glob("lib/python3*/site-packages"))


def _standard(name: str) -> Path:
    done = subprocess.run(
        [_interpreter(), "-I", "-c", f"import {name}; print({name}.__file__)"],
        capture_output=True,
        check=True,
        timeout=30,
    )
    return Path(done.stdout.decode().strip())


#: What a broken Python file may do when it is imported.
BROKEN = {
    "empty": "",
    "no Python": "this is\x00 no Python",
    "cut in the middle": "def f(:\n",
    "raises": "raise RuntimeError('broken')\n",
    "ends the process": "raise SystemExit(1)\n",
    "interrupts": "raise KeyboardInterrupt\n",
    "lacks a module of its own": "import no_such_module_anywhere\n",
}


def _covered(dut: DeviceUnderTest, target: Path, content: Optional[str], mode: int = 0o644) -> Run:
    """A run with `content` in the place of a file; None: with an empty folder in the place of a folder."""
    by = dut.device.folder / "instead"
    if content is None:
        by.mkdir()
    else:
        by.write_bytes(content.encode("latin-1"))
        by.chmod(mode)

    def there() -> Run:
        cover(target, by)
        return dut.run("--timeout=5")

    return isolated(there)


def covered(
    fleet: Fleet,
    name: str,
    scenario: str,
    target: Path,
    content: Optional[str],
    harmless: bool = False,
    mode: int = 0o644,
) -> Case:
    """A scenario with something else in the place of a file or folder; `harmless`: it may end as if nothing were."""

    def act() -> list[str]:
        dut = fleet.scenarios.get(scenario, fleet.certified)()
        run = _covered(dut, target, content, mode)
        return verdict(fleet, dut, run, (127, dut.status) if harmless else (127,))

    return Case(f"{scenario}: {name}", act)


#: The packages that the program stands on: the folder, the name that it is installed by, and whether a check that
#: finds nothing new needs it.
PACKAGES = {
    "cryptography": ("cryptography", False),
    "OpenSSL": ("pyOpenSSL", False),
    "urllib3": ("urllib3", True),
    "fasteners": ("fasteners", True),
}


def without(fleet: Fleet, folder: str, scenario: str, make: Callable[[], DeviceUnderTest]) -> Case:
    """A run without a package: the same as with it where nothing is new, else 127 with the package's name."""
    package, always = PACKAGES[folder]

    def act() -> list[str]:
        dut = make()
        run = _covered(dut, _site() / folder, None)
        if dut.expected is not None and dut.old == dut.expected and not always:
            return verdict(fleet, dut, run, (dut.status,), unchanged=True)
        wrong = [] if f"lacks the Python package {package}," in run.err else [f"it says {run.err!r}"]
        return wrong + verdict(fleet, dut, run, (127,), unchanged=dut.old is not None)

    return Case(f"{scenario} without {package}", act)


def missing(fleet: Fleet, full: bool = True) -> list[Case]:
    site = _site()
    rust = next((site / "cryptography" / "hazmat" / "bindings").glob("_rust*.so"))
    scenarios = {"unchanged": fleet.certified, "pending": fleet.pending, **fleet.scenarios}
    if not full:
        scenarios = {name: scenarios[name] for name in ("unchanged", "first enrollment", "renewal")}
    cases = [without(fleet, folder, name, make) for folder in PACKAGES for name, make in scenarios.items()]
    cases += [
        covered(fleet, "cryptography's compiled part is empty", "first enrollment", rust, ""),
        covered(fleet, "cryptography's compiled part is rubbish", "first enrollment", rust, "\x7fELF" + "x" * 999),
        covered(fleet, "the program's own part is gone", "renewal", site / "caramel_embedded", None),
        covered(fleet, "nothing is installed", "renewal", site, None),
    ]
    files = {
        "cryptography": (site / "cryptography" / "__init__.py", "first enrollment"),
        "cryptography.x509": (site / "cryptography" / "x509" / "__init__.py", "first enrollment"),
        "OpenSSL": (site / "OpenSSL" / "__init__.py", "renewal"),
        "urllib3": (site / "urllib3" / "__init__.py", "renewal"),
        "fasteners": (site / "fasteners" / "__init__.py", "unchanged"),
        "the program's certificates": (site / "caramel_embedded" / "certificates.py", "first certificate"),
        "the program's session": (site / "caramel_embedded" / "session.py", "renewal"),
        "the program's key file": (site / "caramel_embedded" / "keyfile.py", "renewal"),
        "the program's errors": (site / "caramel_embedded" / "errors.py", "renewal"),
        "the program itself": (site / "caramel_embedded" / "__main__.py", "renewal"),
        "ssl": (_standard("ssl"), "renewal"),
        "encodings": (_standard("encodings"), "unchanged"),
        "site": (_standard("site"), "unchanged"),
        "os": (_standard("os"), "unchanged"),
        "http.client": (_standard("http.client"), "renewal"),
        "hashlib": (_standard("hashlib"), "renewal"),
        "argparse": (_standard("argparse"), "renewal"),
        "socket": (_standard("socket"), "first enrollment"),
    }
    for name, (path, scenario) in files.items():
        for how, content in BROKEN.items() if full else list(BROKEN.items())[1:6:2]:
            # An empty file is no obstacle where nothing that it held is needed, nor is one that isn't read: from
            # Python 3.11 on the interpreter has some modules inside itself.
            harmless = how == "empty" or name in ("os", "site")
            cases.append(covered(fleet, f"{name}: {how}", scenario, path, content, harmless))
    return cases


#: What may stand in the interpreter's place: contents of the file, and how a shell would see them end.
INTERPRETERS = {
    "no program": "\x7fELF" + "x" * 999,
    "a power cut has emptied": "",
    "ends with 0": "#!/bin/sh\nexit 0\n",
    "for another interpreter": "#!/nonexistent\n",
    "ends with 1": "#!/bin/sh\nexit 1\n",
    "ends with 2": "#!/bin/sh\nexit 2\n",
    "ends with 120": "#!/bin/sh\nexit 120\n",
    "crashes": "#!/bin/sh\nkill -SEGV $$\n",
    "aborts": "#!/bin/sh\nkill -ABRT $$\n",
    "is killed": "#!/bin/sh\nkill -KILL $$\n",
}


def cannot_start(fleet: Fleet, full: bool = True) -> list[Case]:
    """An interpreter that can't start: that is 127, and never the status that means "locked"."""
    library = _standard("encodings").parent.parent
    interpreter = Path(_interpreter()).resolve()
    cases = [
        covered(fleet, "no standard library", "unchanged", library, None),
        covered(fleet, "no standard library", "renewal", library, None),
        covered(fleet, "no encodings", "unchanged", library / "encodings", None),
    ]
    for how, content in INTERPRETERS.items() if full else list(INTERPRETERS.items())[::3]:
        cases.append(covered(fleet, f"an interpreter that {how}", "unchanged", interpreter, content, mode=0o755))
    cases.append(covered(fleet, "an interpreter not to be run", "unchanged", interpreter, "#!/bin/sh\n"))
    return cases


def etc(fleet: Fleet) -> list[Case]:
    """/etc can't be read: it is empty, it is a file, or it gives errors."""

    def failing(name: str, make: Callable[[], DeviceUnderTest]) -> Case:
        def act() -> list[str]:
            dut = make()
            dut.device.config = None  # the host's own
            found = _openings_of_etc(fleet, make)
            wrong = []
            for number in found:
                dut = make()
                dut.device.config = None
                run, _ = power.injected(dut, "openat", number, "error=EACCES")
                wrong += verdict(fleet, dut, run, (127, dut.status))
            return wrong if found else ["nothing of /etc was opened"]

        return Case(f"{name}, each file of /etc in turn can't be opened", act)

    return [
        # Without /etc/hosts the C library may not know what "localhost" is.
        covered(fleet, "an empty /etc", "first enrollment", Path("/etc"), None, harmless=True),
        covered(fleet, "an empty /etc", "renewal", Path("/etc"), None, harmless=True),
        failing("a renewal", fleet.renewal),
    ]


def _openings_of_etc(fleet: Fleet, make: Callable[[], DeviceUnderTest]) -> list[int]:
    dut = make()
    dut.device.config = None
    _, trace = power.traced(dut)
    found = power.points(trace, dut.device.key_file.parent)
    return [
        point.number
        for point in found
        if point.call == "openat" and point.started and re.search(r'"/etc/(?!ld\.so)', point.text)
    ]


# --- An environment that means harm


PROXIES = ("http_proxy", "https_proxy", "all_proxy", "ftp_proxy")


def hostile(fleet: Fleet, folder: Path) -> Mapping[str, Mapping[str, str]]:
    """Environments: what they try, and the variables."""
    evil = folder / "evil"
    evil.mkdir(parents=True, exist_ok=True)
    marker = folder / "marker"
    modules = ("ssl", "http", "socket", "sitecustomize", "usercustomize", "cryptography", "caramel_embedded", "gc")
    for module in modules:
        (evil / f"{module}.py").write_text(f"open({str(marker)!r}, 'a').write('{module} ')\nraise SystemExit(0)\n")
    startup = evil / "startup"
    startup.write_text(f"open({str(marker)!r}, 'a').write('startup ')\n")
    shell = evil / "shell"
    shell.write_text(f"echo shell >>{marker}; exit 0\n")
    configuration = evil / "openssl.cnf"
    configuration.write_text(
        "openssl_conf = all\n[all]\nproviders = p\nssl_conf = s\n[p]\nevil = e\ndefault = d\n[d]\nactivate = 1\n"
        "[e]\nmodule = /nonexistent.so\nactivate = 1\n"
        "[s]\nsystem_default = t\n[t]\nVerifyMode = Never\nMinProtocol = TLSv1.3\nMaxProtocol = TLSv1.1\n"
    )
    nonsense = evil / "nonsense.cnf"
    nonsense.write_bytes(b"[\n= = =\0\n" * 9)
    return {
        "PYTHONPATH": {"PYTHONPATH": str(evil)},
        "PYTHONHOME": {"PYTHONHOME": "/nonexistent"},
        "PYTHONSTARTUP, INSPECT": {"PYTHONSTARTUP": str(startup), "PYTHONINSPECT": "1"},
        "PYTHON debugging": {
            "PYTHONDEVMODE": "1",
            "PYTHONMALLOC": "debug",
            "PYTHONTRACEMALLOC": "9",
            "PYTHONVERBOSE": "1",
        },
        "PYTHON nonsense": {"PYTHONHASHSEED": "x", "PYTHONMALLOC": "x", "PYTHONTRACEMALLOC": "x", "PYTHONUTF8": "x"},
        "PYTHONIOENCODING": {"PYTHONIOENCODING": "utf-16:strict"},
        "PYTHONWARNINGS": {"PYTHONWARNINGS": "error", "PYTHONOPTIMIZE": "2"},
        "PYTHONUSERBASE": {"PYTHONUSERBASE": str(evil), "PYTHONPLATLIBDIR": "evil"},
        "PYTHONEXECUTABLE": {
            "PYTHONEXECUTABLE": "/nonexistent",
            "PYTHONPYCACHEPREFIX": str(evil),
            "__PYVENV_LAUNCHER__": "x",
        },
        "PYTHONBREAKPOINT": {"PYTHONBREAKPOINT": "os.abort", "PYTHONFAULTHANDLER": "1", "PYTHONCASEOK": "1"},
        "SSL_CERT_FILE": {"SSL_CERT_FILE": "/dev/null", "SSL_CERT_DIR": "/nonexistent"},
        "SSLKEYLOGFILE": {"SSLKEYLOGFILE": str(marker)},
        "OPENSSL_CONF": {
            "OPENSSL_CONF": str(configuration),
            "OPENSSL_MODULES": str(evil),
            "OPENSSL_ENGINES": str(evil),
        },
        "OPENSSL_CONF nonsense": {"OPENSSL_CONF": str(nonsense), "OPENSSL_ia32cap": ":0"},
        "proxies": {name: "http://127.0.0.1:9" for kind in PROXIES for name in (kind, kind.upper())},
        "no locale": {"LC_ALL": "xx_XX.nonsense", "LANG": "tr_TR.UTF-8", "LANGUAGE": "../../../etc"},
        "the C locale": {"LC_ALL": "C", "LANG": "", "PYTHONCOERCECLOCALE": "0"},
        "TZ": {"TZ": ":/dev/zero", "TZDIR": "/nonexistent"},
        "shell": {
            "ENV": str(shell),
            "BASH_ENV": str(shell),
            "IFS": "/",
            "CDPATH": "/",
            "PS4": "$(false)",
            "SHELLOPTS": "noexec",
        },
        "an empty PATH": {"PATH": ""},
        "TMPDIR": {"TMPDIR": "/nonexistent", "XDG_CONFIG_HOME": "/nonexistent"},
        "the resolver": {
            "HOSTALIASES": str(nonsense),
            "RES_OPTIONS": "timeout:1 attempts:1",
            "LOCALDOMAIN": "example.com",
        },
        "a long one": {f"LONG{number}": "x" * 100_000 for number in range(9)},
        "not UTF-8": {"CARAMEL_NOTHING": "\udcff\udcfe", "LOGNAME": "\udcff"},
    }


def environments(fleet: Fleet, full: bool = True) -> list[Case]:
    """No environment changes how a run ends, and none makes it run or write anything else."""
    folder = fleet.folder / "hostile"
    cases = []
    for name, variables in hostile(fleet, folder).items():
        for scenario in ("first enrollment", "renewal with a hook", "rejection") if full else ("first enrollment",):

            def act(scenario: str = scenario, variables: Mapping[str, str] = variables) -> list[str]:
                dut = fleet.scenarios[scenario]()
                marker = folder / "marker"
                run = dut.run(env=variables)
                wrong = verdict(fleet, dut, run, (dut.status,))
                if marker.exists():
                    wrong.append(f"something else happened: {marker.read_bytes()[:99]!r}")
                    marker.unlink()
                if run.out:
                    wrong.append(f"standard output: {run.out[:99]!r}")
                return wrong

            cases.append(Case(f"{scenario} with {name}", act))
    return cases
