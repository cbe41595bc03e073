//! What the VMM says: `hvm_start_info` of the PVH boot protocol (Xen,
//! `xen/include/public/arch-x86/hvm/start_info.h`).

use core::fmt;

const MAGIC: u32 = 0x336e_c578;
const RAM: u32 = 1;
const MAX_REGIONS: usize = 64;
const MAX_COMMAND_LINE: usize = 2048;

/// A range of usable memory.
#[derive(Clone, Copy, Default)]
pub struct Region {
    /// Its first byte.
    pub start: u64,
    /// The byte after its last one.
    pub end: u64,
}

/// A copy of what was said, before its memory is used for something else.
pub struct StartInfo {
    regions: [Region; MAX_REGIONS],
    count: usize,
    command_line: [u8; MAX_COMMAND_LINE],
    length: usize,
}

/// Why it cannot be used.
pub enum Error {
    Magic(u64),
    Address(&'static str, u64),
    NoMap,
    CommandLine,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic(at) => write!(
                f,
                "there is no hvm_start_info at {at:#x}; boot this image by the PVH entry"
            ),
            Self::Address(what, at) => write!(
                f,
                "{what} lies at {at:#x}, out of the 4 GiB that are mapped; the VMM must put it lower"
            ),
            Self::NoMap => {
                f.write_str("the VMM gave no memory map; it must speak version 1 of hvm_start_info")
            }
            Self::CommandLine => write!(
                f,
                "the command line is not text of at most {MAX_COMMAND_LINE} bytes; shorten it"
            ),
        }
    }
}

/// The `len` bytes at `address`, if they are within what is mapped at the start.
fn physical(what: &'static str, address: u64, len: u64) -> Result<*const u8, Error> {
    let out = Error::Address(what, address);
    if address == 0 || address.checked_add(len).is_none_or(|end| end > 1 << 32) {
        return Err(out);
    }
    Ok(core::ptr::with_exposed_provenance(
        usize::try_from(address).map_err(|_| out)?,
    ))
}

fn read<T: Copy>(what: &'static str, address: u64) -> Result<T, Error> {
    let at = physical(what, address, size_of::<T>() as u64)?;
    // SAFETY: the first 4 GiB are mapped one to one and nothing of this program lies where the VMM
    // put its data; the types read are plain integers, valid whatever the bytes. (Where there is no
    // memory, reads give all ones.)
    Ok(unsafe { at.cast::<T>().read_unaligned() })
}

impl StartInfo {
    /// Copies it from where the VMM put it.
    pub fn read(address: u64) -> Result<Self, Error> {
        const WHAT: &str = "hvm_start_info";
        let (magic, version): (u32, u32) = (read(WHAT, address)?, read(WHAT, address + 4)?);
        if magic != MAGIC {
            return Err(Error::Magic(address));
        }
        let (map, entries) = (
            read::<u64>(WHAT, address + 40)?,
            read::<u32>(WHAT, address + 48)?,
        );
        if version < 1 || map == 0 || entries == 0 {
            return Err(Error::NoMap);
        }
        let mut info = Self {
            regions: [Region::default(); MAX_REGIONS],
            count: 0,
            command_line: [0; MAX_COMMAND_LINE],
            length: 0,
        };
        for entry in 0..u64::from(entries).min(1024) {
            let at = map.wrapping_add(entry * 24);
            let [start, size] = read::<[u64; 2]>("the memory map", at)?;
            if read::<u32>("the memory map", at.wrapping_add(16))? != RAM {
                continue;
            }
            if let (Some(region), Some(end)) =
                (info.regions.get_mut(info.count), start.checked_add(size))
            {
                *region = Region { start, end };
                info.count += 1;
            }
        }
        let text = read::<u64>(WHAT, address + 24)?;
        if text != 0 {
            loop {
                let byte: u8 = read("the command line", text + info.length as u64)?;
                if byte == 0 {
                    break;
                }
                *info
                    .command_line
                    .get_mut(info.length)
                    .ok_or(Error::CommandLine)? = byte;
                info.length += 1;
            }
        }
        Ok(info)
    }

    /// The usable memory.
    pub fn regions(&self) -> &[Region] {
        self.regions.get(..self.count).unwrap_or(&[])
    }

    /// The command line.
    pub fn command_line(&self) -> Result<&str, Error> {
        let bytes = self.command_line.get(..self.length).unwrap_or(&[]);
        str::from_utf8(bytes).map_err(|_| Error::CommandLine)
    }
}
