//! The end of a process in which a thread has tried what it may not: one sentence on stderr, by a
//! handler of SIGSYS.

use std::io;
use std::os::raw::{c_int, c_void};

use super::VIOLATION;
use super::filter::kind_of;
use super::names::name;

/// Has violations told and the process ended from now on.
///
/// # Errors
/// The kernel's.
pub(super) fn handle() -> io::Result<()> {
    // SAFETY: a sigaction is plain old data, for which all zeros is a value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = told as extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) as usize;
    // On the alternate stack where a thread has one: it may be its stack that is wrong.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `action` is whole, its mask is empty, and the handler has the signature that
    // SA_SIGINFO asks for; it calls nothing but system calls and functions that neither allocate
    // nor lock, as signal-safety(7) demands.
    match unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `siginfo_t` as the kernel fills it in for SIGSYS (`asm-generic/siginfo.h`).
#[repr(C)]
struct Sigsys {
    signo: c_int,
    errno: c_int,
    code: c_int,
    padding: c_int,
    call_addr: *const c_void,
    syscall: c_int,
    arch: u32,
}

/// `SYS_SECCOMP` of `asm-generic/siginfo.h`.
const BY_SECCOMP: c_int = 1;

extern "C" fn told(_: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel calls this with a siginfo of SIGSYS, which is larger than a `Sigsys`, laid
    // out as that and aligned as a pointer; it lives as long as the handler runs.
    let info = unsafe { &*info.cast::<Sigsys>() };
    // SAFETY: SA_SIGINFO hands over the thread's context, a `ucontext_t` that lives as long.
    let context = unsafe { &*context.cast::<libc::ucontext_t>() };
    let mut sentence = Sentence::default();
    sentence.violation(info, second_argument(context));
    // SAFETY: the buffer holds as many bytes; both calls are async-signal-safe, and allowed to
    // every kind of thread. A stderr that takes nothing loses the sentence.
    unsafe {
        libc::write(
            libc::STDERR_FILENO,
            sentence.bytes.as_ptr().cast(),
            sentence.len,
        );
        libc::_exit(VIOLATION.into())
    }
}

/// The second argument of the call: which ioctl it is.
fn second_argument(context: &libc::ucontext_t) -> u64 {
    let index = usize::try_from(libc::REG_RSI).unwrap_or(0);
    let register = context.uc_mcontext.gregs.get(index);
    register.map_or(0, |value| value.cast_unsigned())
}

/// Text without an allocator; what has no room is left out.
struct Sentence {
    bytes: [u8; 512],
    len: usize,
}

impl Default for Sentence {
    fn default() -> Self {
        Self {
            bytes: [0; 512],
            len: 0,
        }
    }
}

impl Sentence {
    fn add(&mut self, text: &[u8]) {
        for (to, from) in self.bytes[self.len..].iter_mut().zip(text) {
            *to = *from;
            self.len += 1;
        }
    }

    fn number(&mut self, mut number: usize) {
        let mut digits = [0; 20];
        let mut at = digits.len();
        loop {
            at -= 1;
            // A remainder of ten is one digit.
            digits[at] = b'0' + u8::try_from(number % 10).unwrap_or_default();
            number /= 10;
            if number == 0 {
                break;
            }
        }
        self.add(&digits[at..]);
    }

    fn hexadecimal(&mut self, number: u64) {
        let digits = number.to_be_bytes().map(|byte| {
            let digit = |half: u8| b"0123456789abcdef"[usize::from(half)];
            [digit(byte >> 4), digit(byte & 15)]
        });
        let digits = digits.as_flattened();
        let zeros = digits.iter().take_while(|digit| **digit == b'0').count();
        self.add(&digits[zeros.min(digits.len() - 1)..]);
    }

    fn violation(&mut self, info: &Sigsys, second: u64) {
        let call = usize::try_from(info.syscall).unwrap_or(usize::MAX);
        let kind = usize::try_from(info.errno).ok().and_then(kind_of);
        self.add(b"ferry: ");
        match kind {
            Some(kind) if info.code == BY_SECCOMP => {
                self.add(b"a ");
                self.add(kind.name().as_bytes());
                self.add(b" thread");
            }
            // Another filter than ours, perhaps of who has started this process.
            _ => self.add(b"a thread"),
        }
        self.thread_name();
        self.add(b" tried the system call ");
        match name(call) {
            Some(name) => self.add(name.as_bytes()),
            None => self.number(call),
        }
        if libc::c_long::from(info.syscall) == libc::SYS_ioctl {
            self.add(b" 0x");
            self.hexadecimal(second);
        }
        self.add(
            b", which the sandbox forbids: the VMM ends at once, and the guest with it; this is a \
              break-in or a defect of ferry, so keep what is here and report it\n",
        );
    }

    /// The calling thread's name, which the kernel bounds to 15 bytes and a zero.
    fn thread_name(&mut self) {
        let mut name = [0_u8; 16];
        // SAFETY: PR_GET_NAME writes 16 bytes, which `name` has; every kind of thread may ask.
        let asked = unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
        let end = name.iter().position(|b| *b == 0).unwrap_or(0);
        if asked == 0 && end > 0 {
            self.add(b" (");
            self.add(&name[..end]);
            self.add(b")");
        }
    }
}
