//! Work that a cancellation ends although it waits in the kernel, for a page that does not come.

use std::sync::mpsc;
use std::time::Duration;

use ferry_migration::port::PortError;

/// Calls `stop` once `cancelled` says so while `work`, which that ends, is under way.
pub(super) fn unless<T>(
    cancelled: &(dyn Fn() -> bool + Sync),
    stop: &(dyn Fn() + Sync),
    work: impl FnOnce() -> Result<T, PortError>,
) -> Result<T, PortError> {
    /// How late a cancellation may be seen.
    const TICK: Duration = Duration::from_millis(50);
    let (over, ended) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let watch = move || {
            while !cancelled() {
                if ended.recv_timeout(TICK) != Err(mpsc::RecvTimeoutError::Timeout) {
                    return;
                }
            }
            stop();
        };
        std::thread::Builder::new()
            .name("ferry-cancel".into())
            .spawn_scoped(scope, watch)?;
        let result = work();
        drop(over);
        result
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cancellation_ends_work_that_waits() {
        let (page, came) = mpsc::channel();
        let stop = move || page.send("stopped").unwrap();
        let ended = unless(&|| true, &stop, || Ok(came.recv()?));
        assert_eq!(ended.unwrap(), "stopped");
    }

    #[test]
    fn work_that_is_not_cancelled_is_left_alone() {
        let stop = || unreachable!("nothing was cancelled");
        let ended = unless(&|| false, &stop, || Err::<(), _>("its own end".into()));
        assert_eq!(ended.unwrap_err().to_string(), "its own end");
    }
}
