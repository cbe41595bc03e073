//! Which system calls each kind of thread makes, and why the odd ones.
//!
//! A thread inherits the filters of the one that starts it, and every filter must allow a call. So
//! the kinds are nested: a vCPU or device thread may be started by a migration, a migration by a
//! request on the control socket, and that by the VMM.

use std::collections::BTreeMap;

use ferry_devices::thread::Kind;
use libc::{
    SYS_accept, SYS_accept4, SYS_access, SYS_bind, SYS_brk, SYS_chmod, SYS_clock_getres,
    SYS_clock_gettime, SYS_clock_nanosleep, SYS_clone, SYS_clone3, SYS_close, SYS_connect, SYS_dup,
    SYS_dup2, SYS_dup3, SYS_epoll_create, SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_pwait,
    SYS_epoll_pwait2, SYS_epoll_wait, SYS_eventfd, SYS_eventfd2, SYS_exit, SYS_exit_group,
    SYS_faccessat, SYS_faccessat2, SYS_fadvise64, SYS_fallocate, SYS_fchmod, SYS_fchmodat,
    SYS_fcntl, SYS_fdatasync, SYS_fgetxattr, SYS_flock, SYS_fstat, SYS_fstatfs, SYS_fsync,
    SYS_ftruncate, SYS_futex, SYS_getcpu, SYS_getcwd, SYS_getdents64, SYS_getegid, SYS_geteuid,
    SYS_getgid, SYS_getgroups, SYS_getpeername, SYS_getpgrp, SYS_getpid, SYS_getppid,
    SYS_getpriority, SYS_getrandom, SYS_getresgid, SYS_getresuid, SYS_getrusage, SYS_getsid,
    SYS_getsockname, SYS_getsockopt, SYS_gettid, SYS_gettimeofday, SYS_getuid, SYS_getxattr,
    SYS_inotify_add_watch, SYS_inotify_init1, SYS_inotify_rm_watch, SYS_ioctl, SYS_lgetxattr,
    SYS_link, SYS_linkat, SYS_listen, SYS_lseek, SYS_lstat, SYS_madvise, SYS_mbind, SYS_membarrier,
    SYS_memfd_create, SYS_mincore, SYS_mmap, SYS_mprotect, SYS_mremap, SYS_msync, SYS_munmap,
    SYS_nanosleep, SYS_newfstatat, SYS_open, SYS_openat, SYS_pipe, SYS_pipe2, SYS_poll, SYS_ppoll,
    SYS_prctl, SYS_pread64, SYS_preadv, SYS_preadv2, SYS_prlimit64, SYS_pselect6, SYS_pwrite64,
    SYS_pwritev, SYS_pwritev2, SYS_read, SYS_readlink, SYS_readlinkat, SYS_readv, SYS_recvfrom,
    SYS_recvmmsg, SYS_recvmsg, SYS_rename, SYS_renameat, SYS_renameat2, SYS_restart_syscall,
    SYS_rseq, SYS_rt_sigaction, SYS_rt_sigpending, SYS_rt_sigprocmask, SYS_rt_sigreturn,
    SYS_rt_sigtimedwait, SYS_sched_getaffinity, SYS_sched_getparam, SYS_sched_getscheduler,
    SYS_sched_setaffinity, SYS_sched_yield, SYS_seccomp, SYS_select, SYS_sendfile, SYS_sendmmsg,
    SYS_sendmsg, SYS_sendto, SYS_set_robust_list, SYS_setpriority, SYS_setsockopt, SYS_shutdown,
    SYS_sigaltstack, SYS_signalfd4, SYS_socket, SYS_socketpair, SYS_splice, SYS_stat, SYS_statfs,
    SYS_statx, SYS_sysinfo, SYS_tgkill, SYS_time, SYS_timerfd_create, SYS_timerfd_gettime,
    SYS_timerfd_settime, SYS_times, SYS_umask, SYS_uname, SYS_unlink, SYS_unlinkat,
    SYS_userfaultfd, SYS_vmsplice, SYS_write, SYS_writev,
};
use seccompiler::{BackendError, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};

/// System calls, with what their arguments must be; without rules, whatever they are.
pub(super) type Calls = BTreeMap<i64, Vec<SeccompRule>>;

/// What threads of every kind do: memory, locks, clocks, signals, their end, words on stderr.
const ALWAYS: &[i64] = &[
    // malloc, and the stacks of threads that end. `mmap` and `mprotect` have rules below.
    SYS_brk,
    SYS_madvise,
    SYS_mremap,
    SYS_munmap,
    SYS_futex,
    SYS_sched_yield,
    // The vDSO makes these where the host's clock source cannot be read from user space.
    SYS_clock_getres,
    SYS_clock_gettime,
    SYS_gettimeofday,
    SYS_time,
    SYS_clock_nanosleep,
    SYS_nanosleep,
    // The kernel's own, for a sleep that SIGSTOP has interrupted.
    SYS_restart_syscall,
    // A vCPU thread installs the handler of the kick. std's threads have an alternate stack.
    SYS_rt_sigaction,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_sigaltstack,
    SYS_exit,
    SYS_exit_group,
    SYS_getpid,
    SYS_gettid,
    // glibc's malloc asks how many processors there are before it makes a further arena.
    SYS_sched_getaffinity,
    // Seeds of hash maps.
    SYS_getrandom,
    // Eventfds (interrupts, wake-ups) and stderr.
    SYS_read,
    SYS_write,
    SYS_writev,
    SYS_close,
    SYS_fcntl,
    // A panic's backtrace names files relative to it.
    SYS_getcwd,
    // `priority::in_background`. It can only lower what unprivileged users have.
    SYS_setpriority,
];

/// A device's own: its disk, its tap, its queue's eventfd, the guest's memory.
const DEVICE: &[i64] = &[
    SYS_epoll_create1,
    SYS_epoll_ctl,
    SYS_epoll_pwait,
    SYS_epoll_wait,
    SYS_poll,
    SYS_ppoll,
    SYS_readv,
    SYS_pread64,
    SYS_preadv,
    SYS_preadv2,
    SYS_pwrite64,
    SYS_pwritev,
    SYS_pwritev2,
    SYS_lseek,
    SYS_fsync,
    SYS_fdatasync,
    // Discards of a disk, and pages that the balloon gives back.
    SYS_fallocate,
    SYS_mincore,
    SYS_fstat,
    SYS_newfstatat,
    SYS_statx,
];

/// A vsock device's: connections to and from programs of the host. A socket is a Unix one; which
/// file it is connected to is not for a filter to see.
const SOCKETS: &[i64] = &[
    SYS_accept4,
    SYS_connect,
    SYS_recvfrom,
    SYS_sendto,
    SYS_shutdown,
];

/// Sends and receives guests; the receiver builds the machine, so this starts vCPU and device
/// threads, opens /dev/kvm, disks and taps, and makes memory.
const MIGRATION: &[i64] = &[
    SYS_access,
    SYS_faccessat,
    SYS_faccessat2,
    SYS_fadvise64,
    SYS_flock,
    SYS_fstatfs,
    SYS_ftruncate,
    SYS_getdents64,
    SYS_lstat,
    SYS_open,
    SYS_openat,
    SYS_readlink,
    SYS_readlinkat,
    SYS_stat,
    SYS_statfs,
    // A disk that was being copied here and whose migration failed.
    SYS_unlink,
    SYS_unlinkat,
    SYS_dup,
    SYS_dup2,
    SYS_dup3,
    SYS_eventfd2,
    SYS_memfd_create,
    // A guest with NUMA nodes: its memory, and its vCPU threads, which inherit their processors.
    SYS_mbind,
    SYS_sched_setaffinity,
    SYS_pipe2,
    // Pages go to and come from a socket without a copy.
    SYS_splice,
    SYS_vmsplice,
    SYS_userfaultfd,
    SYS_accept,
    SYS_accept4,
    // The resolver's, of a netlink socket; no thread of this kind may listen.
    SYS_bind,
    SYS_connect,
    SYS_getpeername,
    SYS_getsockname,
    SYS_getsockopt,
    SYS_recvfrom,
    SYS_recvmsg,
    SYS_recvmmsg,
    SYS_sendmmsg,
    SYS_sendmsg,
    SYS_sendto,
    SYS_setsockopt,
    SYS_shutdown,
    SYS_getegid,
    SYS_geteuid,
    SYS_getgid,
    SYS_getuid,
    SYS_sysinfo,
    SYS_uname,
    // A thread's first calls are made under the filters of the one that starts it, and then it
    // applies its own.
    SYS_rseq,
    SYS_seccomp,
    SYS_set_robust_list,
];

/// What libraries may call that the host's /etc/nsswitch.conf has the resolver load (systemd, sssd,
/// mDNS, LDAP): a migration to a host by its name must not end the source's VMM. They tell a
/// process about itself and its files, or wait.
const NAME_SERVICES: &[i64] = &[
    SYS_epoll_create,
    SYS_epoll_pwait2,
    SYS_eventfd,
    SYS_getcpu,
    SYS_getgroups,
    SYS_getpgrp,
    SYS_getppid,
    SYS_getpriority,
    SYS_getresgid,
    SYS_getresuid,
    SYS_getrusage,
    SYS_getsid,
    SYS_getxattr,
    SYS_fgetxattr,
    SYS_inotify_add_watch,
    SYS_inotify_init1,
    SYS_inotify_rm_watch,
    SYS_lgetxattr,
    SYS_membarrier,
    SYS_msync,
    SYS_pipe,
    SYS_pselect6,
    SYS_rt_sigpending,
    SYS_rt_sigtimedwait,
    SYS_sched_getparam,
    SYS_sched_getscheduler,
    SYS_select,
    SYS_sendfile,
    SYS_socketpair,
    SYS_timerfd_create,
    SYS_timerfd_gettime,
    SYS_timerfd_settime,
    SYS_times,
];
/// Theirs too: `TCGETS` and its second version (is this a terminal?), `SIOCOUTQ`, and
/// `SIOCGIFNAME`, `SIOCGIFCONF`, `SIOCGIFFLAGS`, `SIOCGIFADDR`, `SIOCGIFHWADDR`.
const NAME_SERVICES_IOCTLS: &[u32] = &[
    0x5401,
    0x802c_542a,
    0x5411,
    0x8910,
    0x8912,
    0x8913,
    0x8915,
    0x8927,
];

/// A request on the control socket may be for a snapshot: a file that is written, and then named.
const API: &[i64] = &[
    SYS_chmod,
    SYS_fchmod,
    SYS_fchmodat,
    SYS_link,
    SYS_linkat,
    SYS_rename,
    SYS_renameat,
    SYS_renameat2,
];

/// The VMM's own: its listeners, signals and terminal.
const VMM: &[i64] = &[SYS_listen, SYS_signalfd4, SYS_umask];

/// `KVM_RUN`; `KVM_KVMCLOCK_CTRL` after a pause; `KVM_RESET_DIRTY_RINGS` where the vCPU's own ring
/// is full; `KVM_GET_REGS` and `KVM_GET_SREGS` for the sentence about a vCPU that cannot go on.
const VCPU_IOCTLS: &[u32] = &[0xae80, 0xaead, 0xaec7, 0x8090_ae81, 0x8138_ae83];
/// `TUNSETOFFLOAD` and `TUNSETVNETHDRSZ`: when a driver has negotiated, which a vCPU thread hears.
const TAP_IOCTLS: &[u32] = &[0x4004_54d0, 0x4004_54d8];
/// Opening what a machine is made of: `USERFAULTFD_IOC_NEW` and `UFFDIO_…`, `TUNSETIFF`,
/// `TUNGETIFF`, `TUNGETVNETHDRSZ`, `SIOCGIFINDEX` (is there such a tap?), `BLKSSZGET`,
/// `BLKPBSZGET`, `BLKGETSIZE64`, `FIONBIO` and `FIONREAD` (sockets, and the resolver's).
const MIGRATION_IOCTLS: &[u32] = &[
    0xaa00,
    0xc018_aa3f,
    0xc020_aa00,
    0x8010_aa01,
    0x8010_aa02,
    0xc028_aa03,
    0xc020_aa04,
    0xc020_aa07,
    0x4004_54ca,
    0x8004_54d2,
    0x8004_54d7,
    0x8933,
    0x1268,
    0x127b,
    0x8008_1272,
    0x5421,
    0x541b,
];
/// `TCGETS`, `TCSETS`, `TCSETSW`, `TCSETSF`, and their second versions, which newer versions of
/// glibc use; `TIOCGPGRP`, `TIOCGWINSZ`: the terminal, and whether there is one.
const VMM_IOCTLS: &[u32] = &[
    0x5401,
    0x5402,
    0x5403,
    0x5404,
    0x802c_542a,
    0x402c_542b,
    0x402c_542c,
    0x402c_542d,
    0x540f,
    0x5413,
];

/// A KVM ioctl of any kind has this in its second byte.
const KVMIO: u32 = 0xae00;

/// `PR_SET_VMA`: newer versions of glibc name their memory.
const PR_SET_VMA: u32 = 0x5356_4d41;

/// What threads of this kind may call.
///
/// # Errors
/// A defect in the lists.
pub(super) fn allowed(kind: Kind) -> Result<Calls, BackendError> {
    let mut calls = Calls::new();
    let wide = !matches!(kind, Kind::Vcpu | Kind::Device | Kind::Sockets);
    calls.any(ALWAYS);
    let own = getpid();
    // The kick of a vCPU, and abort(3): no signal goes to another process.
    calls.when(SYS_tgkill, &[(0, Is(own))])?;
    for option in [libc::PR_SET_NAME, libc::PR_GET_NAME] {
        calls.when(SYS_prctl, &[(0, Is(option.unsigned_abs()))])?;
    }
    calls.when(SYS_prctl, &[(0, Is(PR_SET_VMA))])?;
    calls.ioctls(TAP_IOCTLS)?;
    if wide {
        calls.any(DEVICE);
        calls.any(MIGRATION);
        calls.any(NAME_SERVICES);
        calls.ioctls(NAME_SERVICES_IOCTLS)?;
        // A limit is read where none is given; where one is, it is a violation.
        calls.when(SYS_prlimit64, &[(2, Null)])?;
        // The resolver loads libraries, as /etc/nsswitch.conf says.
        calls.any(&[SYS_mmap, SYS_mprotect]);
        // Threads, and no processes.
        let thread = libc::CLONE_THREAD.unsigned_abs();
        calls.when(SYS_clone, &[(0, Has(thread, thread))])?;
        calls.any(&[SYS_clone3]);
        calls.when(
            SYS_prctl,
            &[(0, Is(libc::PR_SET_NO_NEW_PRIVS.unsigned_abs()))],
        )?;
        for family in [
            libc::AF_UNIX,
            libc::AF_INET,
            libc::AF_INET6,
            libc::AF_NETLINK,
        ] {
            calls.when(SYS_socket, &[(0, Is(family.unsigned_abs()))])?;
        }
        calls.when(SYS_ioctl, &[(1, Has(0xff00, KVMIO))])?;
        calls.ioctls(MIGRATION_IOCTLS)?;
    } else {
        // Neither of the two makes code.
        let executable = libc::PROT_EXEC.unsigned_abs();
        for call in [SYS_mmap, SYS_mprotect] {
            calls.when(call, &[(2, Has(executable, 0))])?;
        }
        calls.when(SYS_openat, &[(2, Is(READ_ONLY))])?;
        calls.any(&[SYS_readlink, SYS_readlinkat]);
    }
    match kind {
        Kind::Vcpu => calls.ioctls(VCPU_IOCTLS)?,
        Kind::Device => calls.any(DEVICE),
        Kind::Sockets => {
            calls.any(DEVICE);
            calls.any(SOCKETS);
            calls.when(SYS_socket, &[(0, Is(libc::AF_UNIX.unsigned_abs()))])?;
        }
        Kind::Migration => {}
        Kind::Api => calls.any(API),
        _ => {
            calls.any(API);
            calls.any(VMM);
            calls.ioctls(VMM_IOCTLS)?;
        }
    }
    Ok(calls)
}

/// How glibc and std open files to read them.
const READ_ONLY: u32 = (libc::O_RDONLY | libc::O_CLOEXEC).unsigned_abs();

/// Calls that are no violation and yet are not done: the caller is told that the kernel does not
/// have them (ENOSYS), and has another way.
///
/// # Errors
/// A defect in the lists.
pub(super) fn refused(kind: Kind) -> Result<Calls, BackendError> {
    let mut calls = Calls::new();
    match kind {
        Kind::Vcpu | Kind::Device | Kind::Sockets => {
            // glibc's malloc reads /proc/sys/vm/overcommit_memory before it gives a heap back, and
            // a panic's backtrace looks for symbols.
            calls.when(SYS_openat, &[(2, Is(READ_ONLY))])?;
            calls.any(&[SYS_readlink, SYS_readlinkat]);
        }
        // What it asks for lies in memory, where a filter does not look. clone(2) can be seen.
        _ => calls.any(&[SYS_clone3]),
    }
    Ok(calls)
}

fn getpid() -> u32 {
    std::process::id()
}

/// What an argument must be. All but pointers are of 32 bits.
enum Must {
    /// This.
    Is(u32),
    /// Of these bits, those.
    Has(u32, u32),
    /// A null pointer.
    Null,
}
use Must::{Has, Is, Null};

trait Add {
    fn any(&mut self, calls: &[i64]);
    fn when(&mut self, call: i64, arguments: &[(u8, Must)]) -> Result<(), BackendError>;
    fn ioctls(&mut self, requests: &[u32]) -> Result<(), BackendError>;
}

impl Add for Calls {
    fn any(&mut self, calls: &[i64]) {
        self.extend(calls.iter().map(|call| (*call, Vec::new())));
    }

    fn when(&mut self, call: i64, arguments: &[(u8, Must)]) -> Result<(), BackendError> {
        let condition = |(index, must): &(u8, Must)| {
            let (length, operator, value) = match *must {
                Is(value) => (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value),
                Has(mask, value) => {
                    let operator = SeccompCmpOp::MaskedEq(mask.into());
                    (SeccompCmpArgLen::Dword, operator, value)
                }
                Null => (SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0),
            };
            SeccompCondition::new(*index, length, operator, value.into())
        };
        let conditions = arguments.iter().map(condition).collect::<Result<_, _>>()?;
        let rules = self.entry(call).or_default();
        rules.push(SeccompRule::new(conditions)?);
        Ok(())
    }

    fn ioctls(&mut self, requests: &[u32]) -> Result<(), BackendError> {
        for request in requests {
            self.when(SYS_ioctl, &[(1, Is(*request))])?;
        }
        Ok(())
    }
}
