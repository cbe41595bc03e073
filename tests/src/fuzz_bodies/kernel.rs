//! A kernel file that is anything at all.

use ferry_vmm::boot::{Entry, Kernel, Platform, WriteData, load};
use ferry_vmm::memory::RamLayout;
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;

/// Of the guests that a kernel is loaded into.
const RAM: [u64; 4] = [1 << 20, 4 << 20, 64 << 20, 5 << 30];

/// A kernel, for a guest whose memory the first byte chooses, and with an initial RAM disk where
/// that says so. It is refused, or all that is to be written lies in the guest's memory and apart
/// from the rest, what comes from the file is in the file, and the kernel is entered where it is.
/// Returns whether it would be booted.
pub fn kernel(bytes: &[u8]) -> bool {
    let Some((&mode, bytes)) = bytes.split_first() else {
        return false;
    };
    let mut file = File::from(memfd_create("kernel", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(bytes).unwrap();
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let kernel = Kernel {
        path: path.clone().into(),
        // Any file will do.
        initrd: (mode & 4 > 0).then(|| path.into()),
        cmdline: "console=ttyS0".into(),
    };
    let ram = RamLayout::new(RAM[usize::from(mode % 4)], false).unwrap();
    let platform = Platform {
        cpus: 2,
        ..Platform::default()
    };
    let Ok(image) = load(&kernel, &ram, &platform) else {
        return false;
    };
    let mut places = Vec::new();
    for write in &image.writes {
        let place = (write.address, write.address + write.len());
        assert!(
            ram.contains(write.address, write.len()),
            "{place:x?} is no RAM"
        );
        if let WriteData::File { offset, len, .. } = write.data {
            assert!(offset + len <= bytes.len() as u64);
        }
        if !write.is_empty() {
            places.push(place);
        }
    }
    places.sort_unstable();
    assert!(
        places.is_sorted_by(|before, after| before.1 <= after.0),
        "{places:x?} overlap"
    );
    let entry = match image.entry {
        Entry::Protected32 { eip, .. } => u64::from(eip),
        Entry::Long64 { rip, .. } => rip,
    };
    assert!(
        entry < ram.low_end(),
        "the kernel is entered at {entry:#x}, which is no RAM"
    );
    true
}
