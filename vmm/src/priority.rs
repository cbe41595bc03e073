//! What can wait, on a host whose processors guests need.

/// A tenth of a guest's share: behind it, and still done in bounded time on a host that is busy.
const BEHIND: i32 = 10;

/// From now on the calling thread goes after guests that want a processor.
///
/// For the time after a guest has moved: it may run on this very host, and to give back a gibibyte
/// of memory takes 20 to 50 ms. At equal priority the scheduler lets that have the guest's
/// processor for a slice (4 ms at 250 Hz), even while another one idles.
pub fn in_background() {
    // On Linux it is the thread's own (setpriority(2), "C library/kernel differences"), and
    // every user may lower it.
    if let Err(error) = rustix::process::setpriority_process(None, BEHIND) {
        tracing::debug!(%error, "tidying up at the usual priority");
    }
}
