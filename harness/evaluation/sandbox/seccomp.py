"""The system calls that a program in the sandbox is refused, and the filter (seccomp) that refuses them.

Sockets are refused whatever their family, since some are not separated by a network namespace (AF_VSOCK). One kind is
allowed, because two of the ten languages do not run without it: pairs of AF_UNIX sockets, which reach nobody but each
other. The JVM makes one before it opens its first file, and Rust's standard library one to start a process, as rustc
does with its linker. The other eight languages need none.
"""

import platform
import struct

from fusion.errors import UserError

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h

# Numbers on x86_64 and on aarch64; -1 where there is no such call.
REFUSED = {
    # Sockets, with which a program reaches beyond the sandbox.
    "socket": (41, 198),
    "setsockopt": (54, 208),  # would enlarge the buffers of a pair
    # Memory that belongs to no process and so escapes every other bound.
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    # Work that the kernel does by itself, unseen by this filter.
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    # Another process's memory and descriptors, and the kernel's instruments.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "perf_event_open": (298, 241),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "fanotify_init": (300, 262),
    # Keyrings, which programs share with the session that the harness runs in.
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # Mounts.
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_tree_attr": (467, 467),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # Namespaces; `clone` is refused by its flags.
    "unshare": (272, 97),
    "setns": (308, 268),
    # The machine.
    "acct": (163, 89),
    "clock_settime": (227, 112),
    "delete_module": (176, 106),
    "finit_module": (313, 273),
    "init_module": (175, 105),
    "ioperm": (173, -1),
    "iopl": (172, -1),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "modify_ldt": (154, -1),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "reboot": (169, 142),
    "setdomainname": (171, 162),
    "sethostname": (170, 161),
    "settimeofday": (164, 170),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    # Another core, which would slow another program down.
    "sched_setaffinity": (203, 122),
}
_CLONE, _CLONE3, _SOCKETPAIR = (56, 220), (435, 435), (53, 199)
_AF_UNIX = 1
# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET (linux/sched.h). CLONE_NEWTIME is for clone3 only.
_NEW_NAMESPACES = 0x7E020000
_X32 = 0x40000000  # the first number of an ABI that has other numbers for the same calls

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _ANSWER = 0x20, 0x15, 0x35, 0x45, 0x06  # linux/bpf_common.h
_KILL, _ALLOW, _EPERM, _ENOSYS = 0x80000000, 0x7FFF0000, 0x00050001, 0x00050026  # linux/seccomp.h
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data


def refused_numbers(machine: str = platform.machine()) -> dict[str, int]:
    """The numbers of the refused calls by name. Raises UserError for a machine whose numbers are not known."""
    if machine not in _ARCHITECTURES:
        raise UserError(f"The sandbox is made for {' and '.join(_ARCHITECTURES)}, not for {machine}.")
    column = list(_ARCHITECTURES).index(machine)
    return {name: numbers[column] for name, numbers in REFUSED.items() if numbers[column] >= 0}


def seccomp_filter(machine: str = platform.machine()) -> bytes:
    """The BPF program that bubblewrap installs: refused calls are answered with EPERM, another ABI's program is killed.

    `clone3` is answered with ENOSYS, since a filter cannot read its flags; C libraries then use `clone`. Raises
    UserError for a machine whose numbers are not known.
    """
    numbers = list(refused_numbers(machine).values())
    column = list(_ARCHITECTURES).index(machine)
    end = 8 + len(numbers)

    def to(target: int, at: int) -> int:
        """The offset of a jump from the instruction `at` to the last ones, of which `target` counts from 0."""
        return end + target - at - 1

    instructions = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, _ARCHITECTURES[machine]),
        (_ANSWER, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, to(5, 4), 0, _X32),
        (_EQUAL, to(7, 5), 0, _CLONE3[column]),
        (_EQUAL, to(1, 6), 0, _CLONE[column]),
        (_EQUAL, to(3, 7), 0, _SOCKETPAIR[column]),
        *((_EQUAL, to(5, at), 0, number) for at, number in enumerate(numbers, 8)),
        (_ANSWER, 0, 0, _ALLOW),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),  # 1: of clone
        (_ANY_BIT, 2, 3, _NEW_NAMESPACES),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),  # 3: of socketpair
        (_EQUAL, 1, 0, _AF_UNIX),
        (_ANSWER, 0, 0, _EPERM),  # 5
        (_ANSWER, 0, 0, _ALLOW),
        (_ANSWER, 0, 0, _ENOSYS),  # 7
    ]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
