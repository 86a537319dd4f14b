"""The system calls that code in a sandbox may make, as the program (BPF) that the kernel asks about each of them.

An allow-list: what is not named in it does not exist (`ENOSYS`, so that programs fall back as on an older kernel), and
what is known to be dangerous is refused (`EPERM`). A pure function of the machine's name; no library is needed.

See seccomp(2), and `linux/filter.h` and `linux/seccomp.h` for the numbers.
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from ferrum.sandbox.backend import Missing

# Each is its name, its number on x86-64 and its number on aarch64.

_ALLOWED = """
    read:0:63 write:1:64 open:2:- close:3:57 stat:4:- fstat:5:80 lstat:6:- poll:7:- lseek:8:62 mprotect:10:226
    munmap:11:215 brk:12:214 rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 pread64:17:67
    pwrite64:18:68 readv:19:65 writev:20:66 preadv:295:69 pwritev:296:70 preadv2:327:286 pwritev2:328:287
    access:21:- pipe:22:- pipe2:293:59 select:23:- pselect6:270:72 ppoll:271:73 sched_yield:24:124 mremap:25:216
    msync:26:227 mincore:27:232 madvise:28:233 dup:32:23 dup2:33:- dup3:292:24 pause:34:- nanosleep:35:101
    clock_nanosleep:230:115 getitimer:36:102 setitimer:38:103 alarm:37:- getpid:39:172 gettid:186:178
    getppid:110:173 sendfile:40:71 copy_file_range:326:285 splice:275:76 tee:276:77 connect:42:203 accept:43:202
    accept4:288:242 sendto:44:206 recvfrom:45:207 sendmsg:46:211 recvmsg:47:212 sendmmsg:307:269 recvmmsg:299:243
    shutdown:48:210 bind:49:200 listen:50:201 getsockname:51:204 getpeername:52:205 getsockopt:55:209 fork:57:-
    vfork:58:- execve:59:221 execveat:322:281 exit:60:93 exit_group:231:94 wait4:61:260 waitid:247:95 kill:62:129
    tkill:200:130 tgkill:234:131 uname:63:160 flock:73:32 fsync:74:82 fdatasync:75:83 sync_file_range:277:84
    truncate:76:45 ftruncate:77:46 fallocate:285:47 fadvise64:221:223 readahead:187:213 getdents:78:-
    getdents64:217:61 getcwd:79:17 chdir:80:49 fchdir:81:50 rename:82:- renameat:264:38 renameat2:316:276 mkdir:83:-
    mkdirat:258:34 rmdir:84:- creat:85:- link:86:- linkat:265:37 unlink:87:- unlinkat:263:35 symlink:88:-
    symlinkat:266:36 readlink:89:- readlinkat:267:78 chmod:90:- fchmod:91:52 fchmodat:268:53 fchmodat2:452:452
    chown:92:- fchown:93:55 lchown:94:- fchownat:260:54 umask:95:166 gettimeofday:96:169 time:201:- times:100:153
    getrlimit:97:163 getrusage:98:165 sysinfo:99:179 getuid:102:174 geteuid:107:175 getgid:104:176
    getegid:108:177 getresuid:118:148 getresgid:120:150 getgroups:115:158 setuid:105:146 setgid:106:144
    setreuid:113:145 setregid:114:143 setresuid:117:147 setresgid:119:149 setpgid:109:154 getpgid:121:155
    getpgrp:111:- setsid:112:157 getsid:124:156 capget:125:90 rt_sigpending:127:136 rt_sigtimedwait:128:137
    rt_sigqueueinfo:129:138 rt_tgsigqueueinfo:297:240 rt_sigsuspend:130:133 sigaltstack:131:132 signalfd:282:-
    signalfd4:289:74 eventfd:284:- eventfd2:290:19 timerfd_create:283:85 timerfd_settime:286:86
    timerfd_gettime:287:87 utime:132:- utimes:235:- utimensat:280:88 futimesat:261:- mknod:133:- mknodat:259:33
    statfs:137:43 fstatfs:138:44 getpriority:140:141 sched_getparam:143:121 sched_getscheduler:145:120
    sched_get_priority_max:146:125 sched_get_priority_min:147:126 sched_rr_get_interval:148:127
    sched_getaffinity:204:123 sched_getattr:315:275 mlock:149:228 munlock:150:229 mlock2:325:284 mlockall:151:230
    munlockall:152:231 arch_prctl:158:- futex:202:98 futex_waitv:449:449 futex_wait:455:455 futex_wake:454:454
    futex_requeue:456:456 set_tid_address:218:96 set_robust_list:273:99 get_robust_list:274:100
    restart_syscall:219:128 timer_create:222:107 timer_settime:223:110 timer_gettime:224:108
    timer_getoverrun:225:109 timer_delete:226:111 clock_gettime:228:113 clock_getres:229:114 epoll_create:213:-
    epoll_create1:291:20 epoll_ctl:233:21 epoll_wait:232:- epoll_pwait:281:22 epoll_pwait2:441:441 openat:257:56
    openat2:437:437 newfstatat:262:79 statx:332:291 faccessat:269:48 faccessat2:439:439 getrandom:318:278
    getcpu:309:168 rseq:334:293 membarrier:324:283 close_range:436:436 pidfd_open:434:434 pidfd_send_signal:424:424
    getxattr:191:8 lgetxattr:192:9 fgetxattr:193:10 listxattr:194:11 llistxattr:195:12 flistxattr:196:13
    pkey_alloc:330:289 pkey_free:331:290 pkey_mprotect:329:288 mseal:462:462
    map_shadow_stack:453:453
"""

#: Allowed with some of their arguments only; see `_CHECKS`.
_CHECKED = """
    clone:56:220 socket:41:198 socketpair:53:199 setsockopt:54:208 ioctl:16:29 prctl:157:167 prlimit64:302:261
    setpriority:141:140 personality:135:92 fcntl:72:25 mmap:9:222 setrlimit:160:164
"""

#: What they are is known: other namespaces, mounts, other processes' memory, keys, the kernel's own programs and
#: counters, asynchronous requests that no filter sees, memory and files that no limit holds, what is the host's.
_REFUSED = """
    ptrace:101:117 process_vm_readv:310:270 process_vm_writev:311:271 pidfd_getfd:438:438 kcmp:312:272
    process_madvise:440:440 process_mrelease:448:448 move_pages:279:239 migrate_pages:256:238 mount:165:40
    umount2:166:39 pivot_root:155:41 chroot:161:51 open_tree:428:428 move_mount:429:429 fsopen:430:430
    fsconfig:431:431 fsmount:432:432 fspick:433:433 mount_setattr:442:442 open_tree_attr:467:467 statmount:457:457
    listmount:458:458 unshare:272:97 setns:308:268 name_to_handle_at:303:264 open_by_handle_at:304:265
    quotactl:179:60 quotactl_fd:443:443 swapon:167:224 swapoff:168:225 sethostname:170:161 setdomainname:171:162
    keyctl:250:219 add_key:248:217 request_key:249:218 bpf:321:280 perf_event_open:298:241 userfaultfd:323:282
    io_uring_setup:425:425 io_uring_enter:426:426 io_uring_register:427:427 io_setup:206:0 io_destroy:207:1
    io_submit:209:2 io_cancel:210:3 io_getevents:208:4 io_pgetevents:333:292 init_module:175:105
    finit_module:313:273 delete_module:176:106 kexec_load:246:104 kexec_file_load:320:294 reboot:169:142
    syslog:103:116 acct:163:89 lookup_dcookie:212:18 iopl:172:- ioperm:173:- modify_ldt:154:- vmsplice:278:75
    memfd_create:319:279 memfd_secret:447:447 remap_file_pages:216:234 shmget:29:194 shmat:30:196 shmctl:31:195
    shmdt:67:197 semget:64:190 semop:65:193 semctl:66:191 semtimedop:220:192 msgget:68:186 msgsnd:69:189
    msgrcv:70:188 msgctl:71:187 mq_open:240:180 mq_unlink:241:181 mq_timedsend:242:182 mq_timedreceive:243:183
    mq_notify:244:184 mq_getsetattr:245:185 sched_setaffinity:203:122 sched_setscheduler:144:119
    sched_setparam:142:118 sched_setattr:314:274 ioprio_set:251:30 ioprio_get:252:31 mbind:237:235
    set_mempolicy:238:237 get_mempolicy:239:236 set_mempolicy_home_node:450:450 setgroups:116:159 capset:126:91
    setfsuid:122:151 setfsgid:123:152 vhangup:153:58 settimeofday:164:170 adjtimex:159:171 clock_settime:227:112
    clock_adjtime:305:266 fanotify_init:300:262 fanotify_mark:301:263 inotify_init:253:- inotify_init1:294:26
    inotify_add_watch:254:27 inotify_rm_watch:255:28 landlock_create_ruleset:444:444 landlock_add_rule:445:445
    landlock_restrict_self:446:446 seccomp:317:277 setxattr:188:5 lsetxattr:189:6 fsetxattr:190:7 removexattr:197:14
    lremovexattr:198:15 fremovexattr:199:16 ustat:136:- sysfs:139:- _sysctl:156:- uselib:134:- nfsservctl:180:42
    sync:162:81 syncfs:306:267 cachestat:451:451
"""

ALLOW = 0x7FFF0000
KILL = 0x80000000
_ERRNO = 0x00050000
REFUSE = _ERRNO | errno.EPERM
UNKNOWN = _ERRNO | errno.ENOSYS
NO_FAMILY = _ERRNO | errno.EAFNOSUPPORT
NO_TERMINAL = _ERRNO | errno.ENOTTY

# Two that are in no table are unknown on purpose. `clone3`: its flags are in memory, where no filter sees them; glibc
# then uses `clone`. x32: other numbers for the same calls, all of them beyond the last one here.

LOAD = 0x20
JUMP_EQUAL = 0x15
_JUMP_GREATER = 0x25
JUMP_ANY_BIT = 0x45
RETURN = 0x06

_RLIMIT_CORE = 4

_NUMBER = 0
_ARCHITECTURE = 4
_LAST = 0xFFFFFFFF

#: What `/usr/include/linux/audit.h` calls them, and which column of the tables they have.
_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}


def _argument(index: int) -> int:
    """Where the low half of an argument is. The kernel ignores the upper half of all that are looked at here."""
    return 16 + 8 * index


@dataclass(frozen=True, slots=True)
class Instruction:
    code: int
    k: int
    #: How many of the following instructions are skipped where the comparison holds, and where it does not.
    true: int = 0
    false: int = 0

    def pack(self) -> bytes:
        return struct.pack("=HBBI", self.code, self.true, self.false, self.k)


Block = list[Instruction]


def _only(argument: int, values: tuple[int, ...], otherwise: int) -> Block:
    """Allowed where the argument is one of these."""
    return [
        Instruction(LOAD, _argument(argument)),
        *(Instruction(JUMP_EQUAL, value, len(values) - at) for at, value in enumerate(values)),
        Instruction(RETURN, otherwise),
        Instruction(RETURN, ALLOW),
    ]


def _none(argument: int, values: tuple[int, ...], otherwise: int) -> Block:
    """Allowed where the argument is none of these."""
    return [
        Instruction(LOAD, _argument(argument)),
        *(Instruction(JUMP_EQUAL, value, len(values) - at) for at, value in enumerate(values)),
        Instruction(RETURN, ALLOW),
        Instruction(RETURN, otherwise),
    ]


def _clone() -> Block:
    """No new namespace; and no process that shares a table of open files with another one.

    The locks of such a process stay when it has ended, and nobody can see them.
    """
    new_ones = 0x7E020000  # CLONE_NEWNS, -CGROUP, -UTS, -IPC, -USER, -PID, -NET
    files, thread = 0x400, 0x10000
    return [
        Instruction(LOAD, _argument(0)),
        Instruction(JUMP_ANY_BIT, new_ones, 3),
        Instruction(JUMP_ANY_BIT, files, 0, 1),
        Instruction(JUMP_ANY_BIT, thread, 0, 1),
        Instruction(RETURN, ALLOW),
        Instruction(RETURN, REFUSE),
    ]


def _mapping() -> Block:
    """No memory that no limit holds and nobody counts.

    Huge pages are no process's; and what is shared and of no file stays as long as any part of it is mapped, and only
    that part is seen. Files in memory are held by the size of their file system.
    """
    huge, shared, anonymous = 0x40000, 0x1, 0x20
    return [
        Instruction(LOAD, _argument(3)),
        Instruction(JUMP_ANY_BIT, huge, 3),
        Instruction(JUMP_ANY_BIT, shared, 0, 1),
        Instruction(JUMP_ANY_BIT, anonymous, 1),
        Instruction(RETURN, ALLOW),
        Instruction(RETURN, REFUSE),
    ]


def _socket_option() -> Block:
    """Any but the size of a socket's buffer: that is the kernel's memory and nobody's, 3.7 GB of it."""
    level, names = 1, (7, 8, 32, 33)
    return [
        Instruction(LOAD, _argument(1)),
        Instruction(JUMP_EQUAL, level, 1),
        Instruction(RETURN, ALLOW),
        *_none(2, names, REFUSE),
    ]


def _own_limits() -> Block:
    """One's own, for PID 1 has the same user; and not RLIMIT_CORE, which may only be asked for.

    It is set to what stops a core dump from being handed to a program of the host's.
    """
    return [
        Instruction(LOAD, _argument(0)),
        Instruction(JUMP_EQUAL, 0, 1),
        Instruction(RETURN, REFUSE),
        Instruction(LOAD, _argument(1)),
        Instruction(JUMP_EQUAL, _RLIMIT_CORE, 1),
        Instruction(RETURN, ALLOW),
        # Where the new limit is; both halves of the address.
        Instruction(LOAD, _argument(2)),
        Instruction(JUMP_EQUAL, 0, 1),
        Instruction(RETURN, REFUSE),
        Instruction(LOAD, _argument(2) + 4),
        Instruction(JUMP_EQUAL, 0, 1),
        Instruction(RETURN, REFUSE),
        Instruction(RETURN, ALLOW),
    ]


def _priority() -> Block:
    """One's own: it could make PID 1 wait for it, and so outrun it."""
    return [
        Instruction(LOAD, _argument(0)),
        Instruction(JUMP_EQUAL, 0, 1),
        Instruction(RETURN, REFUSE),
        *_only(1, (0,), REFUSE),
    ]


_CHECKS: dict[str, Block] = {
    "clone": _clone(),
    # AF_UNIX. A network namespace is no wall for AF_VSOCK, which reaches the hypervisor.
    "socket": _only(0, (1,), NO_FAMILY),
    "socketpair": _only(0, (1,), NO_FAMILY),
    "setsockopt": _socket_option(),
    # Terminals' settings, sizes and groups, but neither TIOCSTI nor TIOCLINUX, which type for others, nor TIOCSETD; and
    # FIONREAD, FIONBIO, FIONCLEX, FIOCLEX, FIOASYNC.
    "ioctl": _only(
        1,
        (0x5401, 0x5402, 0x5403, 0x5404, 0x540F, 0x5410, 0x5413, 0x5414, 0x541B, 0x5421, 0x5450, 0x5451, 0x5452),
        NO_TERMINAL,
    ),
    # PDEATHSIG, DUMPABLE, NAME, SECCOMP (to ask), CAPBSET_READ, TIMERSLACK, NO_NEW_PRIVS, THP_DISABLE, SPECULATION (to
    # ask), and SET_VMA, by which glibc names its memory.
    "prctl": _only(0, (1, 2, 3, 4, 15, 16, 21, 23, 29, 30, 38, 39, 41, 42, 52, 0x53564D41), REFUSE),
    "prlimit64": _own_limits(),
    "setrlimit": _none(0, (_RLIMIT_CORE,), REFUSE),
    "setpriority": _priority(),
    # To ask, and what it is anyway: not READ_IMPLIES_EXEC or a fixed layout of memory.
    "personality": _only(0, (0, 0xFFFFFFFF), REFUSE),
    # F_SETLEASE, F_NOTIFY, F_SETPIPE_SZ, which is the kernel's memory again, and F_OFD_SETLK and F_OFD_SETLKW, locks
    # that PID 1 could not count.
    "fcntl": _none(1, (1024, 1026, 1031, 37, 38), REFUSE),
    "mmap": _mapping(),
}


def rules(machine: str) -> dict[int, Block]:
    """What is done about each system call that is known, by its number. Raises `Missing` for another machine."""
    if machine not in _MACHINES:
        raise Missing(
            f"no sandbox on {machine}: ferrum knows the system calls of x86_64 and aarch64 only, so run the workers "
            "that execute code on one of these"
        )
    column = _MACHINES[machine][1]
    found = {number: [Instruction(RETURN, ALLOW)] for _, number in _numbers(_ALLOWED, column)}
    found |= {number: _CHECKS[name] for name, number in _numbers(_CHECKED, column)}
    found |= {number: [Instruction(RETURN, REFUSE)] for _, number in _numbers(_REFUSED, column)}
    return found


def names(machine: str) -> dict[int, str]:
    """What each number is called."""
    column = _MACHINES[machine][1]
    return {number: name for name, number in _numbers(_ALLOWED + _CHECKED + _REFUSED, column)}


@cache
def program(machine: str | None = None) -> bytes:
    """The program for a machine, this one where none is named; what `bwrap --seccomp` and others want to be given."""
    machine = machine or platform.machine()
    return assemble(machine, rules(machine))


def assemble(machine: str, known: Mapping[int, Block]) -> bytes:
    """Rules as a program: a wrong architecture kills, then the numbers are gone through in order."""
    instructions = [
        Instruction(LOAD, _ARCHITECTURE),
        Instruction(JUMP_EQUAL, _MACHINES[machine][0], 1),
        Instruction(RETURN, KILL),
        Instruction(LOAD, _NUMBER),
    ]
    for last, block in _ranges(known):
        # The last range has no end; the kernel refuses a jump that leads out of the program.
        beyond = [Instruction(_JUMP_GREATER, last, len(block))] if last < _LAST else []
        instructions += [*beyond, *block]
    return b"".join(instruction.pack() for instruction in instructions)


def _ranges(known: Mapping[int, Block]) -> Iterator[tuple[int, Block]]:
    """Every number there is, as ranges that have the same block: the last of each, and the block."""
    unknown = [Instruction(RETURN, UNKNOWN)]
    block = known.get(0, unknown)
    for number in range(1, max(known) + 2):
        following = known.get(number, unknown)
        if following != block:
            yield number - 1, block
        block = following
    yield _LAST, block


def _numbers(table: str, column: int) -> Iterator[tuple[str, int]]:
    for entry in table.split():
        name, *numbers = entry.split(":")
        if numbers[column] != "-":
            yield name, int(numbers[column])
