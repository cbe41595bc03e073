use std::io;

/// A KVM ioctl that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("{call} failed: {source}")]
pub struct IoctlError {
    /// The ioctl by its name in the kernel's documentation.
    pub call: &'static str,
    /// The kernel's reason.
    pub source: io::Error,
}

impl IoctlError {
    pub(super) fn last(call: &'static str) -> Self {
        Self {
            call,
            source: io::Error::last_os_error(),
        }
    }

    pub(super) fn errno(call: &'static str, errno: i32) -> Self {
        Self {
            call,
            source: io::Error::from_raw_os_error(errno),
        }
    }
}

/// Names the ioctl behind a result of `kvm-ioctls`.
pub(super) trait Named<T> {
    fn named(self, call: &'static str) -> Result<T, IoctlError>;
}

impl<T> Named<T> for Result<T, kvm_ioctls::Error> {
    fn named(self, call: &'static str) -> Result<T, IoctlError> {
        self.map_err(|e| IoctlError::errno(call, e.errno()))
    }
}
