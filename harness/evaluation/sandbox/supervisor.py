"""Runs programs one after another in bubblewrap: a small process of its own, which imports nothing of the project.

It is a process of its own because it gives up root before bubblewrap starts (the kernel does not count the processes of
uid 0), because it adopts and ends whatever a program leaves behind (a subreaper), and because a harness that holds a
model must not be forked. It reads jobs as JSON lines from standard input and answers each with one JSON line. At the
end of its input, and so also when the harness was killed, it ends the running program and itself.
"""

import ctypes
import fcntl
import json
import os
import resource  # noqa: F401  (os.wait4 imports it, which an unreadable installation forbids after the uid is dropped)
import select
import shlex
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORK = "/tmp"  # the program's folder in the sandbox: a tmpfs of bounded size
_TICK = 0.1  # seconds between two looks at the memory
_STAGE = 3  # the descriptor on which the script in the sandbox says how far it got
_SYSTEM = ("/etc/alternatives", "/etc/ld.so.cache")
_FILES = 256  # open files a process; R does not start with fewer
_WMEM_DEFAULT = Path("/proc/sys/net/core/wmem_default")
_SOCKET = 1 << 16  # bytes by which a socket's buffer may exceed that limit
_INODE = 1536  # bytes of the kernel's memory that a file or folder in a tmpfs takes, with its name
_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}

# linux/prctl.h, linux/sched.h, linux/mount.h
_PR_SET_CHILD_SUBREAPER = 36
_CLONE_NEWNS = 0x00020000
_MS_BIND, _MS_REC, _MS_PRIVATE = 1 << 12, 1 << 14, 1 << 18


def main() -> None:
    """Reads jobs from standard input and writes their outcomes to standard output until the input ends."""
    config = json.loads(sys.argv[1])
    # The script's descriptor is kept taken, so that no other file ever gets its number.
    null = fcntl.fcntl(os.open(os.devnull, os.O_RDWR), fcntl.F_DUPFD_CLOEXEC, _STAGE + 1)
    os.dup2(null, _STAGE, inheritable=False)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if config["cpu"] is not None:
        os.sched_setaffinity(0, {config["cpu"]})
    # Where memory runs short the kernel ends a program, which inherits this, and not the harness with its model.
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    places, broken = {root: root for root in config["roots"]}, None
    if config["bwrap"] and os.geteuid() == 0:
        try:
            places = _staged(libc, config["roots"])
        except OSError as error:
            broken = {"error": str(error)}
        _drop_root()
    for line in sys.stdin.buffer:
        try:
            reply = broken or _run(json.loads(line), config, places, null)
        except OSError as error:
            reply = {"error": str(error)}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


def _staged(libc: ctypes.CDLL, roots: list[str]) -> dict[str, str]:
    """Paths at which each root can be read without root's rights: bind mounts that only this process sees."""

    def mount(source: str, target: str, kind: str, flags: int) -> None:
        if libc.mount(source.encode(), target.encode(), kind.encode(), flags, None):
            raise OSError(ctypes.get_errno(), f"cannot mount {source}")

    if libc.unshare(_CLONE_NEWNS):  # a container without the right to: what everybody can read must do
        return {root: root for root in roots}
    mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    opened = [os.open(root, os.O_PATH) for root in roots]  # before the next mount may hide one
    mount("fusellm", "/mnt", "tmpfs", 0)
    Path("/mnt").chmod(0o755)
    places = {}
    for number, (root, descriptor) in enumerate(zip(roots, opened, strict=True)):
        places[root] = f"/mnt/{number}"
        Path(places[root]).mkdir()
        mount(f"/proc/self/fd/{descriptor}", places[root], "", _MS_BIND | _MS_REC)
        os.close(descriptor)
    return places


def _drop_root() -> None:
    """Takes an unused uid, so that no file, signal or count of processes is shared with another user."""
    mapped = Path("/proc/self/uid_map").read_text(encoding="utf-8").splitlines()
    highest = max(int(first) + int(count) - 1 for first, _, count in map(str.split, mapped))
    uid = min(highest, 2**31 - 2) - 1 - os.getpid() % 4096
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def _run(job: dict[str, Any], config: dict[str, Any], places: dict[str, str], null: int) -> dict[str, Any]:
    limits = config["limits"]
    pipes = [os.pipe() for _ in range(3)]
    lent: list[int] = []  # descriptors that the child inherits by their number
    folder = None
    try:
        if config["bwrap"]:
            command = _sandboxed(job, config, places, lent)
            environment: dict[str, str] = {}  # bubblewrap's own can be read in the sandbox, as /proc/1/environ
        else:
            folder = tempfile.mkdtemp(prefix="fusellm-")
            for name, text in job["files"].items():
                Path(folder, name).write_bytes(_bytes(text))
            command = ["/bin/sh", "-c", f"cd {shlex.quote(folder)} && {_script(job, limits)}"]
            environment = _environment(job, folder)
        for descriptor in lent:
            os.set_inheritable(descriptor, True)
        ends = [(os.POSIX_SPAWN_DUP2, null, 0)]
        ends += [(os.POSIX_SPAWN_DUP2, pipe[1], to) for pipe, to in zip(pipes, (1, 2, _STAGE), strict=True)]
        child = os.posix_spawn(command[0], command, environment, file_actions=ends, setpgroup=0)
        for pipe in pipes:
            os.close(pipe[1])
        pipes = [(pipe[0], -1) for pipe in pipes]
        running = _Running(child, *(pipe[0] for pipe in pipes), watch=job["watch"].encode(), cap=limits["output"])
        running.follow(limits["wall"], limits["memory"] if config["bwrap"] else None)
        return running.reply(bool(job["compile"]), limits["cpu"])
    finally:
        for descriptor in [*lent, *(end for pipe in pipes for end in pipe if end >= 0)]:
            os.close(descriptor)
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


class _Running:
    """One running program: its output, as far as it is kept, and how it ends."""

    def __init__(self, child: int, out: int, err: int, stage: int, *, watch: bytes, cap: int) -> None:
        self.child, self.out, self.err, self.stage = child, out, err, stage
        self.watch, self.cap = watch, cap
        self.kept = {out: b"", err: b""}
        self.tail, self.seen = b"", False
        self.reached = b""  # what the script said: s(tarted), c(ompiled)
        self.stopped = ""
        self.status, self.cpu = 0, 0.0

    def follow(self, wall: float, memory: int | None) -> None:
        """Reads until the program and all that it started are gone; `wall` seconds to compile and again to run."""
        ended = os.pidfd_open(self.child)
        poller = select.poll()
        for descriptor in (self.out, self.err, self.stage, ended, 0):
            poller.register(descriptor, select.POLLIN)
        waiting = {self.out, self.err, ended}
        now = time.monotonic()
        deadline, look, namespace = now + wall, now + _TICK, 0
        while waiting:
            until = deadline if memory is None else min(deadline, look)
            for descriptor, _ in poller.poll(max(1.0, 1000 * (until - now))):
                if descriptor == 0:  # no job comes before this one is answered: the harness is gone
                    self._end()
                    sys.exit(1)
                data = b"" if descriptor == ended else os.read(descriptor, 1 << 16)
                if not data:
                    poller.unregister(descriptor)
                    waiting.discard(descriptor)
                if descriptor == ended:
                    self._end()
                elif descriptor != self.stage:
                    self._keep(descriptor, data)
                elif len(self.reached) < 2:
                    self.reached += data
                    if b"c" in data:
                        deadline = time.monotonic() + wall
            now = time.monotonic()
            if self.stopped or ended not in waiting:
                continue
            if now >= deadline:
                self._stop("time")
            elif memory is not None and now >= look:
                look = now + _TICK
                namespace = namespace or _namespace(self.child)
                if namespace and _memory(namespace) > memory:
                    self._stop("memory")
        os.close(ended)
        self.reached += os.read(self.stage, 2)

    def reply(self, compiles: bool, cpu: float) -> dict[str, Any]:
        """The outcome, as the harness reads it."""
        code = self.status if self.status >= 0 else 128 - self.status
        # The limit counts ticks, which on a busy machine come to more than the time that is reported.
        if not self.stopped and code and self.cpu > 0.75 * cpu:
            self.stopped = "time"
        return {
            "exit_code": -1 if self.stopped else code,
            "stdout": self.kept[self.out].decode("utf-8", "replace"),
            "stderr": self.kept[self.err].decode("utf-8", "replace"),
            "started": b"s" in self.reached,
            "compiled": b"c" in self.reached or not compiles,
            "stopped": self.stopped,
            "seen": self.seen,
            "cpu": self.cpu,
        }

    def _keep(self, descriptor: int, data: bytes) -> None:
        """Keeps the first bytes of an output; all bytes of standard output are searched for the watched text."""
        room = self.cap - len(self.kept[descriptor])
        self.kept[descriptor] += data[: max(0, room)]
        if descriptor == self.out and self.watch and not self.seen:
            self.seen = self.watch in self.tail + data
            self.tail = (self.tail + data)[1 - len(self.watch) :]

    def _stop(self, why: str) -> None:
        self.stopped = why
        os.killpg(self.child, signal.SIGKILL)

    def _end(self) -> None:
        """Ends and reaps everything that this process started or adopted."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
                if pid == 0:
                    for orphan in _children(os.getpid()):
                        os.kill(orphan, signal.SIGKILL)
                    pid, status, usage = os.wait4(-1, 0)
            except ChildProcessError:
                return
            self.cpu += usage.ru_utime + usage.ru_stime
            if pid == self.child:
                self.status = os.waitstatus_to_exitcode(status)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]


def _namespace(bwrap: int) -> int:
    """The process namespace of the sandbox; 0 where it does not exist yet, or any more."""
    try:
        own = Path("/proc/self/ns/pid").stat().st_ino
        found = [Path(f"/proc/{child}/ns/pid").stat().st_ino for child in _children(bwrap)]
    except OSError:
        return 0
    return next((one for one in found if one != own), 0)


def _memory(namespace: int) -> int:
    """Bytes that the processes of the namespace hold, in memory, in the swap space, and in tables of the kernel."""
    total = 0
    shared: dict[bytes, int] = {}
    task = None
    for process in Path("/proc").iterdir():
        try:
            if not process.name.isdigit() or (process / "ns/pid").stat().st_ino != namespace:
                continue
            task, status = _living_thread(process)
            maps = (task / "maps").read_bytes().splitlines()
        except OSError:
            continue
        total += sum(1024 * int(status[key].split()[0]) for key in ("RssAnon", "VmPTE", "VmSwap"))
        # By their size, because a page that a dead process touched is in nobody's resident set.
        for span, _, _, _, inode, *_ in (line.split() for line in maps if b" /dev/zero " in line):
            first, last = (int(end, 16) for end in span.split(b"-"))
            shared[inode] = max(shared.get(inode, 0), last - first)
    return total + sum(shared.values()) + (_of_kernel(task) if task else 0)


def _living_thread(process: Path) -> tuple[Path, dict[str, str]]:
    """A thread that has not ended, and its status; /proc says nothing of the memory of one that has.

    Raises OSError where none is left.
    """
    for task in (process / "task").iterdir():
        status = dict(line.split(":", 1) for line in (task / "status").read_text(encoding="utf-8").splitlines())
        if "RssAnon" in status:
            return task, status
    raise FileNotFoundError


def _of_kernel(task: Path) -> int:
    """At most the bytes that the kernel keeps for the sandbox of a process, in no process's name.

    These are the sockets' buffers, and the files and folders of the tmpfs, whose size bounds only what is in them.
    """
    try:
        sockets = int((task / "net/sockstat").read_text(encoding="ascii").split()[2])
        # Containers with a network of their own may not have the file; this is the kernel's default.
        buffer = int(_WMEM_DEFAULT.read_text(encoding="ascii")) if _WMEM_DEFAULT.exists() else 212992
        filled = [os.statvfs(f"{task}/root{folder}") for folder in (WORK, "/dev/shm")]
    except OSError:  # it has ended meanwhile
        return 0
    return sockets * (buffer + _SOCKET) + _INODE * sum(one.f_files - one.f_ffree for one in filled)


def _sandboxed(job: dict[str, Any], config: dict[str, Any], places: dict[str, str], lent: list[int]) -> list[str]:
    """The bubblewrap command; descriptors that it must inherit are added to `lent`."""
    limits = config["limits"]
    # --unshare-user is part of --unshare-all, but --disable-userns wants to hear it.
    args = ["--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent"]
    args += ["--uid", "1000", "--gid", "1000", "--hostname", "sandbox", "--ro-bind", "/usr", "/usr"]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if Path(name).is_symlink():
            args += ["--symlink", str(Path(name).readlink()), name]
        else:
            args += ["--ro-bind-try", name, name]
    args += ["--proc", "/proc", "--dev", "/dev", "--size", str(limits["shared"]), "--tmpfs", "/dev/shm"]
    args += ["--size", str(limits["disk"]), "--tmpfs", WORK]
    for path in _SYSTEM:
        args += [*_parents(path), "--ro-bind-try", path, path]
    for root in sorted(places):
        args += [*_parents(root), "--ro-bind", places[root], root]
    for name, text in job["files"].items():
        lent.append(_in_memory(_bytes(text)))
        args += ["--file", str(lent[-1]), f"{WORK}/{name}"]
    lent.append(_in_memory(bytes.fromhex(config["seccomp"])))
    args += ["--seccomp", str(lent[-1]), "--chdir", WORK]
    for path in ("/proc", "/dev", "/"):  # /proc, so that no program takes back its oom_score_adj
        args += ["--remount-ro", path]
    for name, value in _environment(job, WORK).items():
        args += ["--setenv", name, value]
    return [config["bwrap"], *args, "/bin/sh", "-c", _script(job, limits)]


def _parents(path: str) -> list[str]:
    """Options that make the folders above a mount; those that bubblewrap makes itself are readable by root only."""
    above = path.split("/")[1:-1]
    return [o for n in range(len(above)) for o in ("--perms", "0755", "--dir", "/" + "/".join(above[: n + 1]))]


def _script(job: dict[str, Any], limits: dict[str, Any]) -> str:
    """A shell script that sets the limits, compiles and runs, and reports its progress on its own descriptor."""
    kib = limits["memory"] // 1024
    lines = [
        f"{{ ulimit -u {limits['processes']} 2>/dev/null || ulimit -p {limits['processes']}; }}",  # bash, dash
        f"ulimit -t {limits['cpu']} && ulimit -d {kib} && ulimit -f {limits['disk'] // 512}",
        f"ulimit -n {_FILES} && ulimit -c 0 && printf s >&{_STAGE} || exit",
    ]
    text = " && ".join(lines)
    if job["compile"]:
        compile_ = shlex.join(job["compile"])
        text += f"\n{compile_} >compiler.txt 2>&1 {_STAGE}>&- || {{ code=$?; cat compiler.txt >&2; exit $code; }}"
        text += f"\nprintf c >&{_STAGE}"
    return f"{text}\nexec {_STAGE}>&-\nexec {shlex.join(job['run'])}"


def _environment(job: dict[str, Any], home: str) -> dict[str, str]:
    return {**_ENVIRONMENT, "HOME": home, "TMPDIR": home, **job["env"]}


def _bytes(text: str) -> bytes:
    """UTF-8; a lone surrogate becomes a byte that is not UTF-8, which is for the compiler to judge."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def _in_memory(data: bytes) -> int:
    descriptor = os.memfd_create("sandbox")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


if __name__ == "__main__":
    main()
