//! Getting a vCPU out of guest code from another thread, without a race.
//!
//! Two things are needed. `immediate_exit` in the shared `kvm_run` page makes the *next* KVM_RUN
//! return at once; a signal makes the *current* one return. The flag is set first: a thread that is
//! between two KVM_RUNs sees the flag, one that is inside is hit by the signal, and there is no
//! third place. The handler does nothing; it exists because the default action would kill the
//! process.

use std::io;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, OnceLock};

use super::run_page::RunPage;

/// Stops one vCPU's KVM_RUN. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Kicker {
    page: Arc<RunPage>,
    /// Thread id of the vCPU's thread; 0 before it has started.
    tid: Arc<AtomicI32>,
}

impl Kicker {
    pub(super) fn new(page: Arc<RunPage>) -> Self {
        Self {
            page,
            tid: Arc::new(AtomicI32::new(0)),
        }
    }

    /// Makes the vCPU leave KVM_RUN, now and at each further attempt, until
    /// [`release`](Self::release).
    pub fn kick(&self) {
        self.page.immediate_exit().store(1, Ordering::SeqCst);
        let tid = self.tid.load(Ordering::SeqCst);
        if tid != 0 {
            signal(tid);
        }
    }

    /// Makes the vCPU leave KVM_RUN once, if it is in it now.
    pub fn nudge(&self) {
        let tid = self.tid.load(Ordering::SeqCst);
        if tid != 0 {
            signal(tid);
        }
    }

    /// Lets the vCPU enter guest code again.
    pub fn release(&self) {
        self.page.immediate_exit().store(0, Ordering::SeqCst);
    }

    /// Makes the calling thread the one that is signalled, and lets the signal through to it. To be
    /// called by the vCPU's thread before it first runs.
    ///
    /// # Errors
    /// When the handler cannot be installed.
    pub fn adopt_this_thread(&self) -> io::Result<()> {
        install_handler()?;
        // Threads inherit the mask of the one that made them, and an embedder may block everything.
        vmm_sys_util::signal::unblock_signal(kick_signal())
            .map_err(|e| io::Error::other(e.to_string()))?;
        // SAFETY: gettid takes nothing and cannot fail.
        let tid = unsafe { libc::gettid() };
        self.tid.store(tid, Ordering::SeqCst);
        Ok(())
    }
}

/// The first real-time signal that libc leaves to programs.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

fn signal(tid: i32) {
    // tgkill names the process too: a thread that has ended gives ESRCH, and a number that was
    // given to another thread of ours meanwhile gets a signal that does nothing. SAFETY: integers
    // by value; our handler for this signal is installed before any tid is stored.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, kick_signal()) };
}

extern "C" fn ignore(_: libc::c_int) {}

/// Installs the handler, once per process.
fn install_handler() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let result = INSTALLED.get_or_init(|| {
        // SAFETY: sigaction is a plain C struct for which all zeroes is a valid value.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = ignore as extern "C" fn(libc::c_int) as usize;
        // KVM_RUN returns EINTR all the same; a device's write() that the kick happens to hit goes
        // on.
        action.sa_flags = libc::SA_RESTART;
        // SAFETY: `action` is initialised, the handler is async-signal-safe since it does nothing,
        // and no old action is asked for.
        let r = unsafe { libc::sigaction(kick_signal(), &raw const action, std::ptr::null_mut()) };
        if r < 0 {
            Err(io::Error::last_os_error().raw_os_error().unwrap_or(0))
        } else {
            Ok(())
        }
    });
    result.map_err(io::Error::from_raw_os_error)
}
