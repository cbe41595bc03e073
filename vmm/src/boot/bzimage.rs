//! The setup header of a bzImage (Linux `Documentation/arch/x86/boot.rst`).

use linux_loader::loader::bootparam::setup_header;
use vm_memory::ByteValued;

use super::error::LoadError;
use super::file::Source;

const HEADER: u64 = 0x1f1;
const HDRS: u32 = 0x5372_6448;
/// 2.12 brought `xloadflags`, which say whether there is a 64-bit entry.
const VERSION: u16 = 0x20c;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
const DEFAULT_LOAD: u64 = 0x10_0000;

pub(super) struct Image {
    pub(super) header: setup_header,
    /// Where the protected-mode part starts in the file, and its size.
    pub(super) offset: u64,
    pub(super) size: u64,
    /// Where it is loaded.
    pub(super) address: u64,
    /// Memory it needs from `address` on, to unpack itself.
    pub(super) room: u64,
}

pub(super) fn parse(source: &Source) -> Result<Image, LoadError> {
    let mut header = setup_header::default();
    source.read_at(HEADER, header.as_mut_slice())?;
    if header.header != HDRS {
        return Err(
            source.not_a_kernel("it has neither an ELF's nor a Linux kernel's magic number")
        );
    }
    // The header ends at 0x202 + the byte at 0x201; what comes after it is code, not fields.
    let mut length = [0];
    source.read_at(0x201, &mut length)?;
    let valid = usize::from(length[0]) + 0x202 - 0x1f1;
    if let Some(code) = header.as_mut_slice().get_mut(valid..) {
        code.fill(0);
    }
    if header.version < VERSION || header.loadflags & LOADED_HIGH == 0 {
        return Err(source.not_a_kernel("it is a Linux kernel older than 3.8"));
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(source.not_a_kernel("it is a 32-bit Linux kernel"));
    }
    let sectors = match header.setup_sects {
        0 => 4,
        n => u64::from(n),
    };
    let offset = (sectors + 1) * 512;
    let size = source
        .len
        .checked_sub(offset)
        .filter(|n| *n > 0x200)
        .ok_or_else(|| source.not_a_kernel("the file is too short"))?;
    let address = match header.pref_address {
        0 => DEFAULT_LOAD,
        address => address,
    };
    let room = size.max(header.init_size.into());
    Ok(Image {
        header,
        offset,
        size,
        address,
        room,
    })
}
