//! What the kernel here can give.

/// What of the sandbox this kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Support {
    /// Filters of system calls (Linux 4.14 and later).
    pub seccomp: bool,
}

impl Support {
    /// What is not there, as one sentence without a full stop.
    #[must_use]
    pub fn missing(self) -> Option<String> {
        (!self.seccomp).then(|| {
            "this kernel has no seccomp filters (CONFIG_SECCOMP_FILTER), so system calls are not confined".into()
        })
    }
}

/// Asks the kernel; changes nothing.
#[must_use]
pub fn support() -> Support {
    let action = |action: u32| {
        // SAFETY: SECCOMP_GET_ACTION_AVAIL reads one u32, which outlives the call, and changes
        // nothing.
        let asked = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_GET_ACTION_AVAIL,
                0,
                &raw const action,
            )
        };
        asked == 0
    };
    Support {
        seccomp: action(libc::SECCOMP_RET_TRAP) && action(libc::SECCOMP_RET_ERRNO),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_said() {
        assert_eq!(Support { seccomp: true }.missing(), None);
        let sentence = Support { seccomp: false }.missing().unwrap();
        assert!(sentence.contains("seccomp"), "{sentence}");
    }
}
