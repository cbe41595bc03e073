//! What the kernel here can give.

/// What of the sandbox this kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Support {
    /// Filters of system calls (Linux 4.14 and later).
    pub seccomp: bool,
    /// The version of landlock, the restriction of files; 0 where there is none.
    pub landlock: u32,
}

/// The first version of landlock (Linux 6.2) that keeps files which may be read from being
/// truncated.
const WITH_TRUNCATE: u32 = 3;

impl Support {
    /// What is not there, as one sentence without a full stop.
    #[must_use]
    pub fn missing(self) -> Option<String> {
        let seccomp = (!self.seccomp).then_some(
            "this kernel has no seccomp filters (CONFIG_SECCOMP_FILTER), so system calls are not confined",
        );
        let landlock = match self.landlock {
            0 => Some(
                "this kernel has no landlock (CONFIG_SECURITY_LANDLOCK, and `landlock` in the parameter lsm=), so the VMM may \
                 open what its user may",
            ),
            1..WITH_TRUNCATE => Some(
                "this kernel's landlock is older than Linux 6.2, so files that may only be read can be truncated",
            ),
            _ => None,
        };
        let missing: Vec<&str> = seccomp.into_iter().chain(landlock).collect();
        (!missing.is_empty()).then(|| missing.join("; "))
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
        landlock: landlock(),
    }
}

/// `LANDLOCK_CREATE_RULESET_VERSION` of `linux/landlock.h`.
const VERSION: libc::c_long = 1;

fn landlock() -> u32 {
    let (none, size): (*const libc::c_void, libc::c_long) = (std::ptr::null(), 0);
    // SAFETY: with this flag, a null pointer and no size, the kernel makes nothing and reads
    // nothing: it returns a number.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, size, VERSION) };
    // Negative where there is none (ENOSYS) or it is off (EOPNOTSUPP).
    u32::try_from(version).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_said() {
        let missing = |seccomp, landlock| Support { seccomp, landlock }.missing();
        assert_eq!(missing(true, 3), None);
        assert_eq!(missing(true, 9), None);
        for (seccomp, landlock, words) in [
            (false, 3, "no seccomp filters"),
            (true, 0, "no landlock"),
            (true, 2, "truncated"),
            (false, 0, "confined; this kernel has no landlock"),
        ] {
            let sentence = missing(seccomp, landlock).unwrap();
            assert!(sentence.contains(words), "{sentence}");
        }
    }
}
