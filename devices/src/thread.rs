//! The one way to start a thread in ferry: when it fails, a callback is told, and nothing
//! waits for it.

use std::any::Any;
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use std::thread::{Builder, JoinHandle};

/// What a thread is for, and so what it may ask of the kernel where the process has
/// [confined](confine) its threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// Runs guest code.
    Vcpu,
    /// Works for a device: reads what the guest wrote into its queues.
    Device,
    /// Works for a device that connects the guest to Unix sockets of the host.
    Sockets,
    /// Sends or receives a guest.
    Migration,
    /// Answers a request on the control socket.
    Api,
    /// Everything else: what the VMM itself does.
    Vmm,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Vcpu,
        Self::Device,
        Self::Sockets,
        Self::Migration,
        Self::Api,
        Self::Vmm,
    ];

    /// Its name in a sentence.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vcpu => "vCPU",
            Self::Device => "device",
            Self::Sockets => "vsock",
            Self::Migration => "migration",
            Self::Api => "API",
            Self::Vmm => "VMM",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Gives up, for the calling thread, what threads of its kind do not need.
pub type Confine = dyn Fn(Kind) -> Result<(), String> + Send + Sync;

static CONFINE: OnceLock<Box<Confine>> = OnceLock::new();

/// From now on every thread of [`spawn`] calls `confine` before its work; where that fails the
/// thread does not work, and its failure is told. Threads that run already are left alone. False
/// when this process has such a rule already: the first one stays.
pub fn confine(confine: Box<Confine>) -> bool {
    CONFINE.set(confine).is_ok()
}

/// Starts a thread. `on_failure` gets a sentence when `work` panics or returns one as its error; it
/// runs on that thread.
///
/// # Errors
/// The system has no thread left (`ulimit -u`, `TasksMax=`, a pids cgroup); neither closure is
/// called.
pub fn spawn(
    kind: Kind,
    name: &str,
    work: impl FnOnce() -> Result<(), String> + Send + 'static,
    on_failure: impl FnOnce(String) + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let sentence = name.to_owned();
    let confined = move || {
        CONFINE.get().map_or(Ok(()), |confine| confine(kind))?;
        work()
    };
    Builder::new().name(name.to_owned()).spawn(move || {
        // What `work` shared is behind locks, which outlive a panic (`sync`).
        match catch_unwind(AssertUnwindSafe(confined)) {
            Ok(Ok(())) => {}
            Ok(Err(why)) => on_failure(why),
            Err(payload) => on_failure(panicked(&sentence, &*payload)),
        }
    })
}

/// The sentence for a panic of the thread `name`.
#[must_use]
pub fn panicked(name: &str, payload: &(dyn Any + Send)) -> String {
    let what = payload
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| payload.downcast_ref::<&str>().copied())
        .unwrap_or("no reason was given");
    format!("the VMM's thread {name} panicked ({what}): a defect of ferry, please report it")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    fn told(work: impl FnOnce() -> Result<(), String> + Send + 'static) -> Option<String> {
        let (tell, told) = mpsc::channel();
        let thread = spawn(Kind::Vmm, "worker", work, move |why| {
            tell.send(why).unwrap()
        })
        .unwrap();
        thread.join().unwrap();
        told.try_recv().ok()
    }

    #[test]
    fn a_failure_is_told_and_a_good_end_is_not() {
        let sentence = told(|| panic!("index {} of 3", 4)).unwrap();
        assert!(
            sentence.contains("worker panicked (index 4 of 3)"),
            "{sentence}"
        );
        assert!(told(|| panic!("plain")).unwrap().contains("(plain)"));
        assert_eq!(
            told(|| Err("no descriptor is left".into())).as_deref(),
            Some("no descriptor is left")
        );
        assert_eq!(told(|| Ok(())), None);
    }

    /// One test: the rule is the process's.
    #[test]
    fn a_thread_that_cannot_be_confined_does_not_work() {
        let rule = |kind| match kind {
            Kind::Api => Err(format!("no filter for {kind} threads")),
            _ => Ok(()),
        };
        assert!(confine(Box::new(rule)));
        assert!(!confine(Box::new(|_| Ok(()))));
        let (tell, heard) = mpsc::channel();
        for kind in Kind::ALL {
            let (worked, failed) = (tell.clone(), tell.clone());
            let work = move || {
                worked.send((kind, None)).unwrap();
                Ok(())
            };
            let failure = move |why| failed.send((kind, Some(why))).unwrap();
            spawn(kind, "worker", work, failure)
                .unwrap()
                .join()
                .unwrap();
            let expected = (kind == Kind::Api).then(|| "no filter for API threads".to_owned());
            assert_eq!(heard.try_recv().unwrap(), (kind, expected));
        }
    }
}
