//! The one way to start a thread in ferry: when it fails, a callback is told, and nothing
//! waits for it.

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::{Builder, JoinHandle};

/// Starts a thread. `on_failure` gets a sentence when `work` panics or returns one as its error; it
/// runs on that thread.
///
/// # Errors
/// The system has no thread left (`ulimit -u`, `TasksMax=`, a pids cgroup); neither closure is
/// called.
pub fn spawn(
    name: &str,
    work: impl FnOnce() -> Result<(), String> + Send + 'static,
    on_failure: impl FnOnce(String) + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let sentence = name.to_owned();
    Builder::new().name(name.to_owned()).spawn(move || {
        // What `work` shared is behind locks, which outlive a panic (`sync`).
        match catch_unwind(AssertUnwindSafe(work)) {
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
        let thread = spawn("worker", work, move |why| tell.send(why).unwrap()).unwrap();
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
}
