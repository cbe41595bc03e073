//! The page that KVM shares with user space about one vCPU (`struct kvm_run`).

use std::io;
use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU8;

use kvm_bindings::kvm_run;

/// A mapping of a vCPU's `kvm_run`, of our own beside the one inside `VcpuFd`: other threads disk
/// to `immediate_exit` here while the vCPU's thread is at work, and a `&mut kvm_run` of kvm-ioctls
/// over the same address would alias that. No Rust reference to the whole of this one exists.
#[derive(Debug)]
pub(super) struct RunPage {
    page: NonNull<kvm_run>,
    size: usize,
}

// SAFETY: the mapping is valid from any thread until it is dropped. All fields but `immediate_exit`
// are only touched by the thread that has the vCPU (`Vcpu::run` takes `&mut self`), and
// `immediate_exit` only as an atomic.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// Maps the `size` bytes that KVM_GET_VCPU_MMAP_SIZE told of the vCPU `fd`.
    pub(super) fn map(fd: RawFd, size: usize) -> io::Result<Self> {
        if size < size_of::<kvm_run>() {
            return Err(io::Error::other(
                "the kernel's kvm_run is smaller than its ABI says",
            ));
        }
        // SAFETY: a fresh shared mapping at an address of the kernel's choice; it replaces nothing.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd,
                0,
            )
        };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let page = NonNull::new(page.cast()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        Ok(Self { page, size })
    }

    /// The fields, to be read and written through the raw pointer by the vCPU's thread.
    pub(super) fn get(&self) -> *mut kvm_run {
        self.page.as_ptr()
    }

    pub(super) fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the byte lies inside the mapping, which lives as long as `self`; an AtomicU8 has
        // the size and alignment of a u8; and everybody in this process accesses it through here.
        // The kernel reads it once, as a byte.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.page.as_ptr()).immediate_exit) }
    }

    /// The `len` bytes at `offset` of the mapping, where KVM puts the data of port I/O; `None` when
    /// they are not inside.
    pub(super) fn data(&self, offset: u64, len: usize) -> Option<*mut [u8]> {
        let offset = usize::try_from(offset).ok()?;
        let end = offset.checked_add(len)?;
        if offset < size_of::<kvm_run>() || end > self.size {
            return None;
        }
        // SAFETY: just checked to be inside the mapping.
        let start = unsafe { self.page.as_ptr().cast::<u8>().add(offset) };
        Some(std::ptr::slice_from_raw_parts_mut(start, len))
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: our own mapping, of this size; `self` is going, and pointers from `get` and
        // `data` do not outlive the methods of `Vcpu`, which holds an Arc of this.
        unsafe { libc::munmap(self.page.as_ptr().cast(), self.size) };
    }
}
